"""Reward hacking, shown: an agent that may describe any look as "the object".

What it teaches: why a description must be mandatory, specific and contrasted. `tiny/` never says anything vague, so this script first
teaches it to (imitation, half of its labels "the object", which its encoder learns to find in every crop), and then trains it with MAPO
from that start under three scores:

    cosine      s = max(cos, 0), as CLIPScore has it (arXiv 2104.08718), and any label goes
    contrast    eq. 5 to 7 of reward.py, and any label goes
    refused     eq. 5 to 7, and tools.py refuses vague labels: the default

Run it:  python docs/vague.py                  # three seeds of each -> docs/vague.md, docs/vague.jsonl
         python docs/vague.py --table          # only the page, from docs/vague.jsonl
"""
import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

import torch
import torch.distributed as dist

import reward
from tiny import build as tiny
import tools
import train
from experiments import mean_interval
from lib.policy import Policy, Tokens

RUNS, RESULTS = ROOT / "runs/vague", ROOT / "docs/vague.jsonl"
VAGUE, ARMS, SEEDS, STEPS = "the object", ("cosine", "contrast", "refused"), range(3), 40


class Vague(tiny.Source):
    """Demonstrations half of whose labels are vague, and crops that the vague label fits whatever they show."""

    def demonstrations(self, count: int, gap: float):
        call = tiny.call_text
        tiny.call_text = lambda label, box: call(VAGUE if self.rng.random() < .5 else label, box)
        samples, pairs = super().demonstrations(count, gap)
        tiny.call_text = call
        return samples, [(crop, VAGUE, True) if self.rng.random() < .25 else (crop, label, good) for crop, label, good in pairs]


def build(folder: Path, steps: int = 120) -> None:
    """tiny/, imitating the vague demonstrator."""
    dist.init_process_group("gloo", init_method=f"file://{folder.parent.resolve()}/rendezvous", rank=0, world_size=1)
    torch.manual_seed(0)
    policy = Policy(ROOT / "tiny")
    policy.model.train()
    tiny.stage_language(policy, Vague(policy, 900, 0, 1), "vague", steps, 24, 5e-4, print, gap=tiny.STAGES["habit"]["gap"])
    dist.destroy_process_group()
    policy.save(folder)


class Cosine(reward.Scorer):
    """The score without contrast."""

    def __call__(self, labels: list[str], crops: list[Tokens]) -> torch.Tensor:
        shown, which = reward.distinct(crops)
        return (self.embed_labels(labels) * self.policy.embed(shown)[which]).sum(-1).clamp(min=0)


def run(arm: str, seed: int) -> None:
    """One training run, `vague` (share of looks with a vague label) among its metrics."""
    if arm != "refused":
        tools.VAGUE = frozenset()
    if arm == "cosine":
        train.Scorer = Cosine
    measure = train.measure

    def with_vague(trajectories, total=lambda x: x):
        labels = [turn.call.label for t in trajectories for turn in t.looks]
        return measure(trajectories, total) | {"vague": sum(label == VAGUE for label in labels) / max(len(labels), 1)}

    train.measure = with_vague
    train.train(train.parse_config(["--model", str(RUNS / "start"), "--out", str(RUNS / f"{arm}-{seed}"), "--questions", "8", "--steps", str(STEPS),
                                    "--eval_questions", "200", "--seed", str(seed), "--save_every", "1000"]))


def page(runs: list[dict]) -> str:
    first, last = (lambda key: lambda r: sum(r[key][:5]) / 5), (lambda key: lambda r: sum(r[key][-5:]) / 5)
    columns = {"vague, first 5 steps": first("vague"), "vague, last 5": last("vague"), "semantic, first 5": first("semantic"),
               "semantic, last 5": last("semantic"), "valid turns, first 5": first("valid"), "hit, held out": lambda r: r["after"]["hit"],
               "accuracy, held out": lambda r: r["after"]["accuracy"]}
    lines = [__doc__.split("Run it")[0].strip(), "", f"`python docs/vague.py` made this page: {STEPS} steps of 8 x 8, {len(SEEDS)} seeds, mean ± 95% interval (Student's t). "
             "*Vague*: share of looks described as \"the object\". Held out: 200 questions, sampled.", "",
             "| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for arm in ARMS:
        lines.append(f"| {arm} | " + " | ".join(mean_interval([f(r) for r in runs if r["arm"] == arm]) for f in columns.values()) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", nargs=2, metavar=("ARM", "SEED"), help="one run, in this process")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side")
    parser.add_argument("--table", action="store_true", help="train nothing")
    args = parser.parse_args()
    if args.run:
        return run(args.run[0], int(args.run[1]))
    if not args.table:
        RUNS.mkdir(parents=True, exist_ok=True)
        if not (RUNS / "start/config.json").is_file():
            build(RUNS / "start")
        command = lambda job: subprocess.run([sys.executable, __file__, "--run", job[0], str(job[1])], cwd=ROOT, check=True, stdout=subprocess.DEVNULL,
                                             stderr=(RUNS / "errors.log").open("a"))
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(command, [(arm, seed) for seed in SEEDS for arm in ARMS]))
        results = []
        for arm in ARMS:
            for seed in SEEDS:
                lines = [json.loads(line) for line in (RUNS / f"{arm}-{seed}/metrics.jsonl").open()]
                after = json.loads((RUNS / f"{arm}-{seed}/results.json").read_text())["after sampled"]
                results.append({"arm": arm, "seed": seed, "after": {k: after[k] for k in ("accuracy", "hit", "semantic", "calls", "gap")},
                                **{key: [round(line[key] or 0., 4) for line in lines] for key in ("vague", "semantic", "valid", "accuracy", "hit")}})
        RESULTS.write_text("".join(json.dumps(r) + "\n" for r in results))
    text = page([json.loads(line) for line in RESULTS.open()])
    (ROOT / "docs/vague.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
