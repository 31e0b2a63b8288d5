"""What a second look is paid, before any training.

What it teaches: a policy gradient compares what the policy does *now*. Questions about two objects need two true looks and a right
reading of both; as long as a second look mostly misses, it lowers the mean score S of a true first one, and hardly raises the outcome r.
The table sorts sampled trajectories by the looks they made and by which of these held what their label names (fewer than ten: not shown).

Run it:  python docs/looks.py                     # of tiny/; 30 s
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
from tiny.world import World, world_questions
from lib.policy import Policy
from reward import Scorer, astray, rewards, score
from rollout import collect

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=str(ROOT / "tiny"))
    parser.add_argument("--questions", type=int, default=200, help="about two objects, eight trajectories each")
    args = parser.parse_args()
    torch.set_num_threads(1)
    questions = world_questions(World(comparison=1, coarse=0), 0, "train", 50_000, args.questions)
    trajectories = collect(Policy(args.model), questions, 8, generator=torch.Generator().manual_seed(0))
    score(trajectories, Scorer(Policy(ROOT / "tiny")))
    r, scores, looked = rewards(trajectories)
    S, R = mapo.trajectory_score(scores, looked, .95), mapo.coupled_return(r, scores, looked, .4)
    found = defaultdict(list)
    for i, trajectory in enumerate(trajectories):
        looks = ["beside" if astray(turn, trajectory.question) else "true" for turn in trajectory.looks]
        found[", ".join(looks) or "no look"].append(i)
        if looks and looks[0] == "true":
            found["true first look, then " + ("no other" if len(looks) == 1 else "others")].append(i)
    print(f"{'looks':34} share      r      S    R = 0.6 r + 0.4 S")
    for name, rows in sorted(found.items(), key=lambda item: ("first" in item[0], item[0].count(","), item[0])):  # sums of others come last
        if len(rows) >= 10:
            print(f"{name:34} {len(rows) / len(trajectories):5.2f}  " + "  ".join(f"{x[rows].float().mean():5.2f}" for x in (r, S, R)))
