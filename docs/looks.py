"""What a second look is paid, before any training.

What it teaches: a policy gradient compares what the policy does *now*. A question about two objects
needs two true looks, and a right reading of both. While a second look mostly misses, it lowers the
score S of a trajectory whose first look was true, and it hardly raises the outcome r. The table
sorts sampled trajectories by which of their looks held what their label names: "true", or "beside".

Run it:  python docs/looks.py                     # of tiny/; about 1 minute
         python docs/looks.py --model runs/mapo   # of a trained one
"""
import argparse
import sys
from collections import defaultdict
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import mapo
from lib.checkpoint import newest
from lib.policy import Policy
from reward import Scorer, astray, rewards, score_looks
from rollout import Trajectory, collect
from tiny.world import World, world_questions

BETA, LAM = .4, .95


def kinds(trajectories: list[Trajectory]) -> dict[str, list[int]]:
    """The trajectories that looked alike; last, those with a true first look, without and with
    others after it."""
    alike, first_true = defaultdict(list), {"no other": [], "others": []}
    for i, trajectory in enumerate(trajectories):
        looks = ["beside" if astray(turn, trajectory.question) else "true"
                 for turn in trajectory.looks]
        alike[", ".join(looks) or "no look"].append(i)
        if looks and looks[0] == "true":
            first_true["others" if len(looks) > 1 else "no other"].append(i)
    found = {kind: alike[kind] for kind in sorted(alike, key=by_looks)}
    return found | {f"true first look, then {then}": rows for then, rows in first_true.items()}


def by_looks(kind: str) -> tuple[int, str]:
    return kind.count(","), kind


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=ROOT / "tiny", help="a model directory, or a run")
    parser.add_argument("--questions", type=int, default=200, help="about two objects")
    args = parser.parse_args()
    questions = world_questions(World(comparison=1, coarse=0), 0, "train", 50_000, args.questions)
    generator = torch.Generator().manual_seed(0)
    trajectories = collect(Policy(newest(args.model)), questions, group=8, generator=generator)
    score_looks(trajectories, Scorer(Policy(ROOT / "tiny")))
    r, scores, looked = rewards(trajectories)
    S = mapo.trajectory_score(scores, looked, LAM)
    R = mapo.coupled_return(r, S, BETA)
    print(f"{'looks':34} share      r      S    R = {1 - BETA:g} r + {BETA:g} S")
    for kind, rows in kinds(trajectories).items():
        if len(rows) >= 10:                    # of fewer, a mean says little
            means = "".join(f"{x[rows].mean():7.2f}" for x in (r, S, R))
            print(f"{kind:34} {len(rows) / len(trajectories):5.2f}{means}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
