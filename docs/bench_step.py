"""Part c of docs/bench.py: a whole step of train.py against the same step of TRL's GRPOTrainer.

What it teaches: what a library's generality costs where one machine and one task are enough. Two
processes take steps by turns, one each, so that a busy neighbour meets both. The first step of each
does not count.

TRL needs an environment of its own (docs/bench_trl.py names its packages):

    python -m venv /tmp/trl
    /tmp/trl/bin/pip install torch==2.13.0 transformers==5.23.0 trl==1.16.0 datasets accelerate \\
        pillow numpy jmespath

Run it:  python docs/bench_step.py --trl /tmp/trl/bin/python       # 2 minutes -> bench.jsonl
"""
import argparse
import json
import subprocess
import sys
import time

import bench                                    # first: it finds the project
import torch

import mapo
import train
from lib.batches import spread
from lib.policy import Policy
from lib.shard import ShardedAdamW
from reward import Scorer, rewards, score_looks
from rollout import collect
from tiny.world import World, world_questions

STEP = {"model": "tiny", "questions": 16, "group": 8, "max_turns": 4, "max_tokens": 64,
        "lr": 1.5e-4, "micro_rows": 32}


def our_steps() -> None:
    """Our side: a step, with the semantic score, for each line on standard input."""
    policy, row = Policy(STEP["model"]), mapo.ALGORITHMS["grpo"]
    scorer = Scorer(Policy(STEP["model"]))
    optimiser = ShardedAdamW(policy.freeze_vision())
    generator, first = torch.Generator().manual_seed(0), 0
    baseline = bench.status_mb("VmRSS")
    say({"baseline_mb": baseline})
    while sys.stdin.readline().strip():
        wall, cpu = time.perf_counter(), time.process_time()
        questions = world_questions(World(), 0, "train", first, STEP["questions"])
        first += STEP["questions"]
        part = collect(policy, questions, STEP["group"], STEP["max_turns"], STEP["max_tokens"],
                       generator=generator)
        score_looks(part, scorer)
        r, s, looked = rewards(part)
        advantage = mapo.advantages(r, s, looked, STEP["group"], row.beta)
        batch = train.to_batch(part, spread(advantage, part), row)
        train.accumulate(policy, optimiser, batch, row, train.Config())
        optimiser.clip(1.)
        optimiser.step(STEP["lr"])
        say({"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu,
             "peak_mb": bench.status_mb("VmHWM") - baseline,
             "calls": sum(len(t.looks) for t in part), "accuracy": r.mean().item(),
             "tokens": sum(len(t.mask) - len(t.prompt.ids) for t in part)})


def say(result: dict) -> None:
    print("RESULT " + json.dumps(result), flush=True)


class Side:
    """A process that takes a step when it is told to."""

    def __init__(self, *command: str):
        self.process = subprocess.Popen(command, cwd=bench.ROOT, text=True, stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self.about, self.results = self.answer(), []

    def answer(self) -> dict:
        for line in self.process.stdout:
            if line.startswith("RESULT "):
                return json.loads(line.removeprefix("RESULT "))
        raise RuntimeError(f"{self.process.args} ended early; run it by hand to see why")

    def step(self) -> None:
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        self.results.append(self.answer())

    def mean(self, key: str) -> float:
        return sum(result[key] for result in self.results[1:]) / (len(self.results) - 1)

    def summary(self) -> dict:
        means = {key: self.mean(key) for key in ("tokens", "calls", "accuracy")}
        return means | {"peak_mb": self.results[-1]["peak_mb"]}


def part_c(trl: str, pairs: int) -> list[dict]:
    """Both sides' CPU seconds of `pairs` steps."""
    ours = Side(sys.executable, __file__, "--ours")
    other = Side(trl, "docs/bench_trl.py", json.dumps(STEP | {"steps": pairs + 2}))
    for _ in range(pairs + 1):
        ours.step()
        other.step()
    for side in (ours, other):
        side.process.kill()
        side.process.wait()
    detail = {"ours": ours.summary(), "other": other.summary()}
    times = [[result["cpu"] for result in side.results[1:]] for side in (ours, other)]
    memory = detail["ours"]["peak_mb"] / detail["other"]["peak_mb"]
    return [bench.compare("c", "step", *times, detail=detail, settings=STEP, about=other.about),
            {"part": "c", "row": "memory", "ratio": memory}]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trl", help="the python of an environment with TRL")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--ours", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.ours:
        our_steps()
    elif args.trl:
        bench.measure("c", part_c, args.trl, args.pairs)
        bench.PAGE.write_text(bench.page(bench.read()))
    else:
        parser.error("expected --trl, the python of an environment with TRL")
