"""Trajectories -> rewards: was the answer right, and did each look show what its description says?

What it teaches: two signals of different kind. The outcome r is exact but sparse, and luck and misreading blur it.
The semantic score s is dense, one number per look, but only as good as the encoder. MAPO needs no CLIP for it: the
*frozen base model* summarises a text or a crop "in one word", and the two last hidden states are compared (E5-V).

    c(l, x) = cosine(embed label l, embed crop x)                                     (5)
    z(l, x) = (c(l, x) - mean_x' c(l, x')) / std_x' c(l, x')                          (6) contrast: x' are reference crops
    s(l, x) = sigmoid(k (z(l, x) - z0)),  k = 1.5, z0 = 2                             (7) calibration to [0, 1]

The contrast is what defeats vague labels: over the reference crops every label has mean z 0, so one that fits all
crops alike earns no more with any of them than with the average one, where s is low (docs/vague.md shows an agent with
and without it). Being in standard deviations, (6) needs no fit for a new encoder. MAPO (arXiv 2604.06777) names the
alignment of description and result; (5) to (7) are this project's reading of it.

Run it:  python reward.py            # labels x crops of one image, and how well s tells right from wrong crops
"""
import argparse
import re
from typing import Callable

import numpy as np
import torch
from torch import Tensor

from lib.data import DataError, Question, holds, shows
from tiny.world import World, world_questions
from lib.policy import Policy, Tokens, distinct
from rollout import Trajectory, Turn
from tools import MAX_LABEL_CHARS, MAX_LABEL_WORDS, Call, fit, zoom

SHARPNESS, THRESHOLD = 1.5, 2.0   # k and z0 of eq. 7


# ---- outcome -------------------------------------------------------------------------------------------------------

def normalise(text: str) -> str:
    """Lower case, single spaces, without punctuation that is no part of a word (a text of signs alone stays as it is)."""
    return " ".join(re.findall(r"[\w.%<>+#$-]*\w[\w%+#]*", text.lower())) or text.strip()


def choose(answer: str, choices: tuple[str, ...]) -> int | None:
    """Which option an answer names: its text, its letter ("B", "(b)", "B."), or its letter and text. None: no option."""
    texts, said = [normalise(choice) for choice in choices], normalise(answer)
    if said in texts:
        return texts.index(said)
    if match := re.fullmatch(r"\s*\(?([A-Za-z])[).:]?\s*(.*?)\s*", answer, re.DOTALL):
        index, rest = ord(match[1].upper()) - ord("A"), normalise(match[2])
        if index < len(choices) and rest in ("", texts[index]):
            return index
    return None


def outcome(question: Question, answer: str | None) -> float:
    """1.0 if the answer is right, else 0.0. Options by text or letter; open questions by normalised text."""
    if answer is None:
        return 0.0
    if question.choices:
        chosen = choose(answer, question.choices)
        return float(chosen is not None and chosen == choose(question.answer, question.choices))
    return float(normalise(answer) == normalise(question.answer))


def answerable(questions: list[Question]) -> list[Question]:
    """The questions, if each answer is one of its choices. Raises DataError: what can never be right teaches nothing, silently."""
    for q in questions:
        if q.choices and choose(q.answer, q.choices) is None:
            raise DataError(f"question {q.id}: field 'answer': expected one of {list(q.choices)} or its letter, found {q.answer!r}")
    return questions


def format_reward(trajectory: Trajectory) -> float:
    """1.0 if every turn was a valid call or answer and the last one answered."""
    return float(trajectory.end == "answer" and not any(turn.error for turn in trajectory.turns))


# ---- semantic score ------------------------------------------------------------------------------------------------

class Scorer:
    """Eq. 5 to 7 with a frozen policy as the encoder."""

    def __init__(self, policy: Policy, questions: list[Question] | None = None, per_question: int = 2, own_eyes: bool = False):
        """Reference crops are cut from these questions' images (None: 64 of the embedded world) at random, with sides of
        1/8 to 1/2 of the image (so they need no annotation). own_eyes: the agent has another vision tower, or trains it,
        so that its features of a crop cannot serve here."""
        self.policy, self.own_eyes = policy, own_eyes
        rng, crops = np.random.default_rng(0), []
        for question in questions or world_questions(World(), 0, "train", 10**6, 64):
            image = question.open()
            seen = policy.resolution.size(*image.size)
            for _ in range(per_question):
                side = rng.uniform(1 / 8, 1 / 2)
                x, y = rng.uniform(0, 1 - side, 2)
                box = (x * seen[0], y * seen[1], (x + side) * seen[0], (y + side) * seen[1])
                crops.append(zoom(image, Call("", box), seen, policy.resolution)[0])
        self.references = policy.embed(policy.encode_images(crops))                  # (K, D)

    def crops(self, looks: list[Turn]) -> list[Tokens]:
        """What each look showed, as this encoder sees it."""
        if not self.own_eyes:
            return [turn.crop_tokens for turn in looks]
        _, which = distinct([turn.crop_tokens for turn in looks])                    # many looks share a crop
        shown = dict(zip(which, (turn.crop for turn in looks)))
        seen = self.policy.encode_images([fit(crop, self.policy.resolution.crop()) for crop in shown.values()])
        return [seen[i] for i in which]

    def embed_labels(self, labels: list[str]) -> Tensor:
        """(N, D), in a form that neither case nor an article changes; labels that agree are embedded once."""
        keys = [re.sub(r"^(the|a|an) ", "", label.lower()) for label in labels]
        different = sorted(set(keys))
        embedded = dict(zip(different, self.policy.embed([f"the {key}" for key in different])))
        return torch.stack([embedded[key] for key in keys])

    def __call__(self, labels: list[str], crops: list[Tokens]) -> Tensor:
        """Semantic scores (N,) in [0, 1] of N (label, crop) pairs."""
        return self.matrix(labels, crops, paired=True)

    def matrix(self, labels: list[str], crops: list[Tokens], paired: bool = False) -> Tensor:
        """Every label against every crop (labels, crops), or, `paired`, only label i against crop i (N,)."""
        shown, which = distinct(crops)                                               # many looks share a crop
        text, image = self.embed_labels(labels), self.policy.embed(shown)[which]
        cosine = (text * image).sum(-1) if paired else text @ image.T                # eq. 5
        reference = text @ self.references.T                                         # (N, K)
        mean, std = reference.mean(1), reference.std(1) + 1e-4
        z = (cosine - mean) / std if paired else (cosine - mean[:, None]) / std[:, None]   # eq. 6
        return torch.sigmoid(SHARPNESS * (z - THRESHOLD))                            # eq. 7


def score(trajectories: list[Trajectory], scorer: Scorer, describe: str = "before") -> tuple[Tensor, Tensor, Tensor]:
    """Write each look's semantic score into its turn; returns `rewards`. describe: the words that are scored are those
    "before" the look, its label, or those "after" it, when the crop has been seen."""
    looks = [(t, k, turn) for t in trajectories for k, turn in enumerate(t.turns) if turn.crop_tokens]
    if looks:
        labels = [turn.call.label if describe == "before" else said_after(t, k) for t, k, turn in looks]
        for (*_, turn), value in zip(looks, scorer(labels, scorer.crops([turn for *_, turn in looks])).tolist()):
            turn.score = value
    return rewards(trajectories)


def said_after(trajectory: Trajectory, k: int) -> str:
    """The first words of the thought that follows turn k, as long as a label may be."""
    following = trajectory.turns[k + 1].text if k + 1 < len(trajectory.turns) else ""
    thought = following[:2000].removeprefix("<think>").split("</think>")[0]
    return " ".join(thought.split()[:MAX_LABEL_WORDS])[:MAX_LABEL_CHARS] or "nothing"


def rewards(trajectories: list[Trajectory]) -> tuple[Tensor, Tensor, Tensor]:
    """Outcomes r (N,), semantic scores s (N, T) and looked (N, T): was turn t a look that was scored?"""
    r = torch.tensor([outcome(t.question, t.answer) for t in trajectories])
    turns = max(len(t.turns) for t in trajectories)
    s, looked = torch.zeros(len(trajectories), turns), torch.zeros(len(trajectories), turns, dtype=torch.bool)
    for i, trajectory in enumerate(trajectories):
        for k, turn in enumerate(trajectory.turns):
            if turn.score is not None:
                s[i, k], looked[i, k] = turn.score, True
    return r, s, looked


# ---- what actually happened (needs a world that knows; None where it does not) ---------------------------------------

def astray(turn, question: Question) -> bool:
    """The crop does not hold what the label names (a label that names nothing in the image is astray too)."""
    named = [box for name, box in question.objects.items() if name.lower() in turn.call.label.lower()]
    return not any(holds(turn.box, box) for box in named)


def grounded(trajectory: Trajectory) -> bool:
    """Every piece of evidence was shown by some look."""
    return all(any(shows(turn.box, box) for turn in trajectory.looks) for box in trajectory.question.boxes)


def measure(trajectories: list[Trajectory], total: Callable[[float], float] = lambda x: x) -> dict[str, float | None]:
    """Shares and means over trajectories (of all ranks, if `total` sums over them): accuracy; calls (looks a trajectory); valid
    (turns without error); hit (all evidence shown); gap (looks that are astray); lucky (right answers without a hit); semantic (mean score of looks)."""
    def mean(values: list) -> float | None:
        top, bottom = total(float(sum(values))), total(float(len(values)))
        return top / bottom if bottom else None

    right = [bool(outcome(t.question, t.answer)) for t in trajectories]
    known = [i for i, t in enumerate(trajectories) if t.question.boxes]
    hits = {i: grounded(trajectories[i]) for i in known}
    looks = [(turn, t.question) for t in trajectories for turn in t.looks]
    return {"accuracy": mean(right), "calls": mean([len(t.looks) for t in trajectories]),
            "valid": mean([not turn.error for t in trajectories for turn in t.turns]), "hit": mean(list(hits.values())),
            "gap": mean([astray(turn, q) for turn, q in looks if q.objects]),
            "lucky": mean([not hits[i] for i in known if right[i]]),
            "semantic": mean([turn.score for turn, _ in looks if turn.score is not None])}


def area_under_curve(scores: np.ndarray, positive: np.ndarray) -> float:
    """P(a positive scores higher than a negative), ties half."""
    ranks = np.searchsorted(np.sort(scores), scores) + np.searchsorted(np.sort(scores), scores, side="right") + 1
    p, n = positive.sum(), (~positive).sum()
    return float((ranks[positive].sum() / 2 - p * (p + 1) / 2) / (p * n))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Score labels against crops.")
    parser.add_argument("--model", default="tiny")
    args = parser.parse_args()
    policy = Policy(args.model)
    scorer = Scorer(policy, world_questions(World(), seed=0, split="train", start=10**6, count=64))
    question = world_questions(World(coarse=0), seed=0, split="test", start=4, count=1)[0]
    image = question.open()
    seen = policy.resolution.size(*image.size)

    def look(image, plate, shift=0.):
        box = [v / 8 + d for v, d in zip(plate, (-4 + shift, -4, 4 + shift, 4))]
        return zoom(image, Call("", tuple(box)), seen, policy.resolution)[0]

    names = list(question.objects)
    labels = [f"the {name}" for name in names] + ["the white cat", "a nice pattern"]
    crops = [look(image, box) for box in question.objects.values()] + [fit(image, policy.resolution.crop())]
    print("semantic score, labels x crops (the last crop is the whole image)\n")
    print(" " * 22 + "".join(f"{n.replace(' ', chr(10)).split()[0][:6]:>8}" for n in names) + "   whole")
    print(" " * 22 + "".join(f"{n.split()[1][:6]:>8}" for n in names))
    for label, row in zip(labels, scorer.matrix(labels, policy.encode_images(crops))):
        print(f"{label:22}" + "".join(f"{v:8.2f}" for v in row))
    pairs = []
    for q in world_questions(World(coarse=0), seed=0, split="test", start=0, count=200):
        image = q.open()
        for (name, plate), shift in zip(list(q.objects.items())[:3], (0., 24., 10.)):
            if plate[2] / 8 + 4 + shift <= seen[0]:
                box = [v + 8 * d for v, d in zip(plate, (-4 + shift, -4, 4 + shift, 4))]
                pairs.append((f"the {name}", look(image, plate, shift), holds(box, plate)))
    values = scorer([p[0] for p in pairs], policy.encode_images([p[1] for p in pairs])).numpy()
    truth = np.array([p[2] for p in pairs])
    print(f"\n{len(pairs)} looks, aimed well, one cell off, or half off: mean score {values[truth].mean():.2f} where the crop "
          f"holds the labelled object, {values[~truth].mean():.2f} where not; AUC {area_under_curve(values, truth):.3f}")
