"""Trajectories -> rewards: was the answer right, and did each look show what its label says?

What it teaches: two signals of different kind. The outcome r is exact but sparse, and luck and
misreading blur it. The semantic score s is dense, one number a look, but only as good as the
encoder. No CLIP model is needed: the *frozen base model* summarises a text or a crop "in one word",
and the last hidden state of each is compared (E5-V, arXiv 2407.12580).

    cos(l, x) = cosine of embed(label l) and embed(crop x)                         (8)
    contrast(l, x) = (cos(l, x) - mean cos(l, x')) / std cos(l, x')                (9)
    s(l, x) = sigmoid(sharpness (contrast(l, x) - threshold))                      (10)

Eq. 9: mean and std are over reference crops x', at least 128 random ones of other images. This
keeps vague labels from paying: to score, a crop must fit the label better than those do, by two of
their standard deviations. A label that fits every crop has a contrast of 0 on the average, and
there s = sigmoid(1.5 (0 - 2)) = 0.05 (seen: docs/vague.md).
Eq. 10: a squashing to [0, 1]. Its two constants, 1.5 and 2, were chosen by hand; docs/score.md
judges them.

MAPO (arXiv 2604.06777) names the alignment of a description with what the tool returned; eq. 8 to
10 are our reading of it. The encoder of tiny/ was *trained* for this comparison, with CLIP's own
loss on the objects of its world (docs/build.py). How well a real Qwen scores is not measured.

Run it:  python reward.py       # the scores of labels x crops of one image
"""
import math
import re
import unicodedata
from typing import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lib import benchmarks
from lib.policy import Policy, Tokens, distinct
from lib.question import Question, choose, holds, normalise, shows
from rollout import Trajectory, Turn
from tiny.world import World, world_questions
from tools import ZOOM, Call, fit, run_tool

SHARPNESS, THRESHOLD = 1.5, 2.0   # of eq. 10
REFERENCES = 128                  # crops that a label is contrasted with, at least


# ---- outcome -------------------------------------------------------------------------------------

def outcome(question: Question, answer: str | None) -> float:
    """r: 1.0 if the answer is right, else 0.0. A benchmark's question is scored by its own rule.
    Else an answer names an option by text or letter; an open one is compared as `normalise` writes
    it: without case, and without most punctuation."""
    if answer is None:
        return 0.
    if question.benchmark:
        return float(benchmarks.correct(question, answer))
    if question.choices:
        chosen = choose(answer, question.choices)
        return float(chosen is not None and chosen == choose(question.answer, question.choices))
    return float(normalise(answer) == normalise(question.answer))


# ---- semantic score ------------------------------------------------------------------------------

class Scorer:
    """Eq. 8 to 10 with a frozen policy as the encoder."""

    def __init__(self, policy: Policy, questions: list[Question] | None = None):
        """At least REFERENCES reference crops are cut at random from these questions' images, with
        sides of 1/8 to 1/2 of theirs: they need no annotation. None: 64 questions of the embedded
        world, from the millionth on, which no run trains on."""
        self.policy = policy
        rng, crops = np.random.default_rng(0), []
        questions = questions or world_questions(World(), 0, "train", 10**6, 64)
        for question in questions:
            image = question.open()
            for _ in range(math.ceil(REFERENCES / len(questions))):
                crops.append(random_crop(policy, image, rng))
        self.references = policy.embed(policy.encode_images(crops))     # (K, D)

    def __call__(self, labels: list[str], crops: list[Tokens]) -> Tensor:
        """Semantic scores (N,) in [0, 1] of N pairs of a label and a crop."""
        text = self.embed_labels(labels)                        # (N, D)
        shown, which = distinct(crops)                          # many looks share a crop
        image = self.policy.embed(shown)[which]                 # (N, D)
        return self.squash((text * image).sum(-1), text)

    def squash(self, cosine: Tensor, text: Tensor) -> Tensor:
        """Eq. 9 and 10: cosines (N,) of N labels, embedded as text (N, D) -> scores (N,)."""
        reference = text @ self.references.T                    # (N, K)
        mean, std = reference.mean(1), reference.std(1)
        contrast = (cosine - mean) / (std + 1e-4)
        return torch.sigmoid(SHARPNESS * (contrast - THRESHOLD))

    def embed_labels(self, labels: list[str]) -> Tensor:
        """(N, D), in a form that neither case nor an article changes; equal ones embedded once."""
        keys = [plain(label) for label in labels]
        different = sorted(set(keys))
        embedded = self.policy.embed([f"the {key}" for key in different])
        return embedded[[different.index(key) for key in keys]]


def plain(label: str) -> str:
    """In lower case, and without an article before it. (NFKC: as lib/labels.py cleans a label.)"""
    return re.sub(r"^(the|a|an) ", "", unicodedata.normalize("NFKC", label).lower())


def random_crop(policy: Policy, image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A crop with 1/8 to 1/2 of the image's sides, as the zoom tool would show it."""
    side = rng.uniform(1 / 8, 1 / 2)
    x, y = rng.uniform(0, 1 - side, 2)
    width, height = policy.resolution.size(*image.size)
    box = (x * width, y * height, (x + side) * width, (y + side) * height)
    return crop_at(policy, image, box)


def crop_at(policy: Policy, image: Image.Image, box: tuple) -> Image.Image:
    """What the zoom tool shows for a box in pixels of the seen image."""
    seen = policy.resolution.size(*image.size)
    return run_tool(image, Call(ZOOM, "", {"bbox_2d": box}), seen, policy.resolution)[0]


def score_looks(trajectories: list[Trajectory], scorer: Scorer) -> None:
    """Write the semantic score of each look, its label against its crop, into its turn."""
    looks = [turn for t in trajectories for turn in t.turns if turn.crop_tokens]
    if looks:
        labels, crops = [turn.call.label for turn in looks], [turn.crop_tokens for turn in looks]
        for turn, score in zip(looks, scorer(labels, crops).tolist()):
            turn.score = score


def rewards(trajectories: list[Trajectory]) -> tuple[Tensor, Tensor, Tensor]:
    """Outcomes r (N,), semantic scores s (N, T), looked (N, T): was turn t a look with a score?"""
    r = torch.tensor([outcome(t.question, t.answer) for t in trajectories])
    shape = len(trajectories), max(len(t.turns) for t in trajectories)
    s, looked = torch.zeros(shape), torch.zeros(shape, dtype=torch.bool)
    for i, trajectory in enumerate(trajectories):
        for k, turn in enumerate(trajectory.turns):
            if turn.score is not None:
                s[i, k], looked[i, k] = turn.score, True
    return r, s, looked


# ---- what really happened (needs a world that knows; None where it does not) ---------------------
# The world's boxes, of evidence and of objects, are those of the plates with the marks.

def astray(turn: Turn, question: Question) -> bool:
    """The crop holds no object that the label names. A label that names none is astray, too.

    "the two cats" names "cat", "the scattered" does not: in Latin letters words must be whole."""
    label = turn.call.label.lower()
    named = [box for name, box in question.objects.items()
             if re.search(rf"(?<![a-z0-9]){re.escape(plain(name))}s?(?![a-z0-9])", label)]
    return not any(holds(turn.box, box) for box in named)


def hit(trajectory: Trajectory) -> bool:
    """Every piece of evidence was shown by some look."""
    return all(any(shows(turn.box, box) for turn in trajectory.looks)
               for box in trajectory.question.boxes)


def measure(trajectories: list[Trajectory],
            total: Callable[[float], float] = lambda x: x) -> dict[str, float | None]:
    """Means over trajectories (over those of all ranks, if `total` sums over ranks):

    accuracy; answered, share of trajectories that end in an answer; calls, looks a trajectory;
    valid, share of turns without an error; hit, share of trajectories whose looks showed all the
    evidence; gap, share of looks that are astray; lucky, share of right answers without a hit;
    semantic, mean score of the looks. None: nothing known."""
    right = [bool(outcome(t.question, t.answer)) for t in trajectories]
    turns = [turn for t in trajectories for turn in t.turns]
    known = [i for i, t in enumerate(trajectories) if t.question.boxes]
    hits = {i: hit(trajectories[i]) for i in known}
    mapped = [t for t in trajectories if t.question.objects]
    values = {"accuracy": right,
              "answered": [t.answer is not None for t in trajectories],
              "calls": [len(t.looks) for t in trajectories],
              "valid": [not turn.error for turn in turns],
              "hit": list(hits.values()),
              "gap": [astray(turn, t.question) for t in mapped for turn in t.looks],
              "lucky": [not hits[i] for i in known if right[i]],
              "semantic": [turn.score for turn in turns if turn.score is not None]}
    means = {}
    for name, found in values.items():
        top, bottom = total(float(sum(found))), total(float(len(found)))
        means[name] = top / bottom if bottom else None
    return means


def demonstrate() -> None:
    """The scores of labels x crops of one image."""
    scorer = Scorer(Policy("tiny"))
    question = world_questions(World(coarse=0), 0, "test", 4, 1)[0]
    image, policy = question.open(), scorer.policy
    crops = []
    for plate in question.objects.values():
        x1, y1, x2, y2 = (v / 8 for v in plate)          # the overview is 8 times smaller
        crops.append(crop_at(policy, image, (x1 - 4, y1 - 4, x2 + 4, y2 + 4)))
    crops.append(fit(image, policy.resolution.crop()))
    crops = policy.encode_images(crops)
    print("semantic score, labels x crops (the last crop is the whole image)\n")
    names = [name.split() for name in question.objects]
    print(" " * 22 + "".join(f"{colour[:6]:>8}" for colour, _ in names) + "   whole")
    print(" " * 22 + "".join(f"{shape[:6]:>8}" for _, shape in names))
    for label in [*question.objects, "the white cat", "a nice pattern"]:
        scores = scorer([label] * len(crops), crops).tolist()
        print(f"{label:22}" + "".join(f"{score:8.2f}" for score in scores))


if __name__ == "__main__":
    torch.set_num_threads(1)
    demonstrate()
