"""How good is the semantic score? Its ranking, its two constants, and an encoder that is untrained.

What it teaches: a score can be judged by two different questions.

- *Does it rank?* AUC: the chance that a look whose crop holds the labelled object scores above one
  whose crop does not. Eq. 10 is monotone, so sharpness and threshold do not change the AUC.
- *Is it a probability?* The Brier score, the mean of (s - truth)^2; 0.25 is that of s = 1/2. Here
  the constants count.

The looks are those that the agent of tiny/ samples about held-out questions. Half of the questions
choose the constants that fit best, the other half judges them.

Run it:  python docs/score.py                              # 30 s: the tables of docs/score.md
         python docs/score.py --encoder runs/tiny-aim      # a stage of docs/build.py, left there
"""
import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from lib.policy import Policy
from lib.question import holds
from reward import SHARPNESS, THRESHOLD, Scorer, astray, crop_at
from rollout import Turn, collect
from tiny.world import World, world_questions

SHARPNESSES, THRESHOLDS = (.5, 1., 1.5, 2., 3., 4.), (0., 1., 1.5, 2., 2.5, 3., 4.)


def sampled_looks(policy: Policy, count: int) -> tuple[list[Turn], np.ndarray, np.ndarray]:
    """The looks of four trajectories a question; whether each crop holds what its label names; and
    the number of its question."""
    generator = torch.Generator().manual_seed(0)
    looks, truth, number = [], [], []
    for start in range(0, count, 50):
        questions = world_questions(World(), 0, "test", start, min(50, count - start))
        for i, t in enumerate(collect(policy, questions, 4, generator=generator)):
            looks += t.looks
            truth += [not astray(look, t.question) for look in t.looks]
            number += [start + i // 4] * len(t.looks)
    return looks, np.array(truth), np.array(number)


@torch.no_grad()
def measures(encoder: Policy, looks: list[Turn]) -> tuple[Tensor, Tensor]:
    """Cosine (eq. 8) and contrast (eq. 9) of each look (N,), by this encoder's eyes and words."""
    scorer, cosines, contrasts = Scorer(encoder), [], []
    for start in range(0, len(looks), 256):
        part = looks[start:start + 256]
        text = scorer.embed_labels([look.call.label for look in part])
        crops = encoder.embed(encoder.encode_images([look.crop for look in part]))
        cosine = (text * crops).sum(1)
        reference = text @ scorer.references.T
        cosines.append(cosine)
        contrasts.append((cosine - reference.mean(1)) / (reference.std(1) + 1e-4))
    return torch.cat(cosines), torch.cat(contrasts)


def area_under_curve(scores: np.ndarray, positive: np.ndarray) -> float:
    """P(a positive scores higher than a negative), ties half."""
    ordered = np.sort(scores)
    below, up_to = (np.searchsorted(ordered, scores, side) for side in ("left", "right"))
    ranks = (below + up_to + 1) / 2                       # from 1; of ties the mean
    p, n = positive.sum(), (~positive).sum()
    return float((ranks[positive].sum() - p * (p + 1) / 2) / (p * n))


def brier(contrast: Tensor, truth: np.ndarray, sharpness: float, threshold: float) -> float:
    score = torch.sigmoid(sharpness * (contrast - threshold))
    return (score - torch.from_numpy(truth).float()).square().mean().item()


def sweep(contrast: Tensor, truth: np.ndarray) -> None:
    columns = " | ".join(f"{t:g}" for t in THRESHOLDS)
    print(f"\n| sharpness (down), threshold | {columns} |")
    print("|---" * (1 + len(THRESHOLDS)) + "|")
    for sharpness in SHARPNESSES:
        row = [f"{brier(contrast, truth, sharpness, t):.3f}" for t in THRESHOLDS]
        print(f"| {sharpness:g} | " + " | ".join(row) + " |")


def best_constants(contrast: Tensor, truth: np.ndarray) -> tuple[float, float]:
    """By logistic regression: the pair under which the truth is most likely."""
    slope, bias = torch.ones(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    target = torch.from_numpy(truth).float()
    optimiser = torch.optim.LBFGS([slope, bias], max_iter=200)

    def closure():
        optimiser.zero_grad()
        logits = slope * contrast + bias
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, target)
        loss.backward()
        return loss

    optimiser.step(closure)
    return slope.item(), -(bias / slope).item()


def reliability(contrast: Tensor, truth: np.ndarray) -> None:
    """What share of the looks is true, by their score."""
    score = torch.sigmoid(SHARPNESS * (contrast - THRESHOLD)).numpy()
    print("\n| score | looks | mean score | share that holds the object |\n|---|---|---|---|")
    for low in np.arange(0, 1, .2):
        inside = (score >= low) & (score < low + .2)
        print(f"| {low:.1f} to {low + .2:.1f} | {inside.sum()} | {score[inside].mean():.2f} "
              f"| {truth[inside].mean():.2f} |")


def near_misses(policy: Policy) -> None:
    """Looks aimed well, one cell off, and half off: harder than what the agent does."""
    labels, crops, truth, shifts = [], [], [], []
    for question in world_questions(World(coarse=0), 0, "test", 0, 200):
        image = question.open()
        plates = list(question.objects.items())[:3]
        for (name, plate), shift in zip(plates, (0, 24, 10)):     # well, one cell off, half off
            x1, y1, x2, y2 = (v / 8 for v in plate)               # in pixels of the overview
            box = x1 - 4 + shift, y1 - 4, x2 + 4 + shift, y2 + 4
            if box[2] <= 96:
                labels.append(name)
                crops.append(crop_at(policy, image, box))
                truth.append(holds([8 * v for v in box], plate))
                shifts.append(shift)
    truth, shifts = np.array(truth), np.array(shifts)
    scores = Scorer(policy)(labels, policy.encode_images(crops)).numpy()
    print(f"\n{len(labels)} looks, AUC {area_under_curve(scores, truth):.3f}; mean score "
          f"{scores[shifts == 0].mean():.2f} if aimed well, {scores[shifts == 10].mean():.2f} if "
          f"half off, {scores[shifts == 24].mean():.2f} if one cell off")


def main() -> None:
    parser = argparse.ArgumentParser(description="Judge the semantic score.")
    parser.add_argument("--encoder", help="another model directory, to be compared")
    parser.add_argument("--questions", type=int, default=400)
    args = parser.parse_args()
    torch.set_num_threads(1)
    policy = Policy(ROOT / "tiny")
    looks, truth, number = sampled_looks(policy, args.questions)
    print(f"{len(looks)} looks, {truth.mean():.2f} of them hold what their label names\n")
    print("| encoder | AUC of the cosine | AUC of the contrast |\n|---|---|---|")
    cosine, contrast = measures(policy, looks)
    rows = [("tiny/", cosine, contrast)]
    if args.encoder:
        rows.append((args.encoder, *measures(Policy(args.encoder), looks)))
    for name, *values in rows:
        cells = [f"{area_under_curve(value.numpy(), truth):.3f}" for value in values]
        print(f"| {name} | {' | '.join(cells)} |")
    sweep(contrast, truth)
    reliability(contrast, truth)
    fit, judged = number % 2 == 0, number % 2 == 1
    sharpness, threshold = best_constants(contrast[fit], truth[fit])
    print(f"\nfitted on half of the questions: sharpness {sharpness:.2f}, threshold {threshold:.2f}"
          f"\nBrier score on the other half: fitted "
          f"{brier(contrast[judged], truth[judged], sharpness, threshold):.3f}, "
          f"{SHARPNESS:g} and {THRESHOLD:g} "
          f"{brier(contrast[judged], truth[judged], SHARPNESS, THRESHOLD):.3f}, "
          f"always {truth[fit].mean():.2f}: "
          f"{((truth[judged] - truth[fit].mean()) ** 2).mean():.3f}")
    near_misses(policy)


if __name__ == "__main__":
    main()
