"""How fast is it: against the usual ways, another library, and the machine's own limit?

What it teaches: how to compare speed on a machine that others use, too. Both sides alternate, A, B,
A, B, in one run, and the result is the median of the pairs' ratios. Seconds are CPU seconds of the
process, with one thread: a busy neighbour does not count. Memory is the peak of a fresh process
over what it held before. In *forced* turns the work is equal: tokens that end a turn are banned on
both sides, so each has 20 tokens, and the same crop follows.

    a  rollouts against `generate`
    b  updates against padded batches with all logits; and the memory of both
    c  a whole step against TRL: docs/bench_step.py
    d  rollouts and updates against their matrix products alone: docs/bench_limit.py
    e  growth with turns, group and image size; two ranks

Run it:  python docs/bench.py                  # a, b, e; 10 minutes -> bench.jsonl, bench.md
         python docs/bench.py --parts a        # only this; the other parts' results stay
         python docs/bench.py --table          # only bench.md, from bench.jsonl
Linux, for /proc.
"""
import argparse
import copy
import hashlib
import json
import operator
import os
import platform
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from statistics import mean, median

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

import numpy as np
import torch
import transformers

import mapo
import rollout
import train
from bench_usual import ends, pixels_of, usual_model, usual_rollouts, usual_update
from lib.batches import spread
from lib.policy import Policy
from lib.shard import ShardedAdamW
from rollout import Trajectory, collect
from tiny.world import World, world_questions
from tools import ZOOM, Call, Resolution, fit

RESULTS, PAGE = ROOT / "docs/bench.jsonl", ROOT / "docs/bench.md"
QUESTIONS, GROUP, TOKENS = 8, 8, 20        # tiny/'s own turns have about 20 tokens, too
MICRO = train.Config.micro_tokens
TARGETS = {"a forced 3": ">= 4", "a forced 6": ">= 6", "b tiny": ">= 1.5", "b vocabulary": ">= 1.5",
           "b memory tiny": "<= 0.6", "b memory vocabulary": "<= 0.6", "c step": ">= 5",
           "c memory": "< 1", "d rollouts": ">= 0.25", "d update": ">= 0.5", "e turns": "<= 7",
           "e group": "<= 0.7"}


# ---- measuring -----------------------------------------------------------------------------------

def seconds(function) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def status_mb(field: str) -> float:
    """VmRSS, what this process holds, or VmHWM, its peak. (ru_maxrss begins at its parent's.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def ratios(values: list[float]) -> dict[str, float]:
    return {"ratio": median(values), "low": min(values), "high": max(values)}


def compare(part: str, row: str, ours: list[float], other: list[float], **more) -> dict:
    """A record of both sides' seconds. Its ratio, other / ours, says how many times as fast."""
    found = ratios([b / a for a, b in zip(ours, other)])
    print(f"{part} {row}: {found['ratio']:.2f}", flush=True)
    return {"part": part, "row": row, "ours_s": ours, "other_s": other, **found, **more}


def alternate(ours, other, count: int) -> tuple[list[float], list[float]]:
    """Seconds of both, after one run of each that does not count."""
    ours(), other()
    times = [(seconds(ours), seconds(other)) for _ in range(count)]
    return [t[0] for t in times], [t[1] for t in times]


# ---- our side ------------------------------------------------------------------------------------

def training_questions(count: int) -> list:
    return world_questions(World(), 0, "train", 0, count)


def our_update(policy: Policy, optimiser: ShardedAdamW, trajectories: list[Trajectory],
               advantage: torch.Tensor, micro: int = MICRO) -> None:
    """The gradient of eq. 4, left in the optimiser; advantage (N,)."""
    row = mapo.ALGORITHMS["grpo"]
    batch = train.to_batch(trajectories, spread(advantage, trajectories), row)
    train.accumulate(policy, optimiser, batch, row, train.Config(micro_tokens=micro))


@contextmanager
def forced(policy: Policy):
    """Inside, no turn ends early, and every turn but the last sees the same crop."""
    banned, act = policy.banned, rollout.act
    policy.banned = torch.cat([banned, torch.tensor(ends(policy))])
    rollout.act = look_there
    try:
        yield
    finally:
        policy.banned, rollout.act = banned, act


def look_there(policy, trajectory, turn, image, last) -> None:
    """In place of rollout.act."""
    if last:
        trajectory.end = "max_turns"
    else:
        turn.call = Call(ZOOM, "forced", {})
        turn.crop = fit(image.crop((192, 192, 288, 288)), Resolution(24, 48 ** 2, 48 ** 2))


# ---- a: rollouts ---------------------------------------------------------------------------------

def part_a(pairs: int) -> list[dict]:
    policy, model, questions = Policy("tiny"), usual_model("tiny"), training_questions(QUESTIONS)
    generator, own = torch.Generator().manual_seed(0), {"ours": [], "other": []}

    def ours():
        found = collect(policy, questions, GROUP, turns, tokens, 1., generator)
        own["ours"].append(mean(sum(t.mask) for t in found))

    def other():
        found = usual_rollouts(model, policy, questions, GROUP, turns, tokens)
        own["other"].append(mean(sum(t.mask) for t in found))

    records, rows, tokens = [], QUESTIONS * GROUP, TOKENS
    for turns in (1, 3, 6):
        with forced(policy):
            times = alternate(ours, other, pairs)
        records.append(compare("a", f"forced {turns}", *times, trajectories=rows))
    turns, tokens, own = 4, 64, {"ours": [], "other": []}
    times = alternate(ours, other, pairs)
    means = {side: mean(values) for side, values in own.items()}
    return [*records, compare("a", "natural 4", *times, trajectories=rows, own_tokens=means)]


# ---- b: updates ----------------------------------------------------------------------------------

class Case:
    """Trajectories as tiny/ samples them, and both sides' ways to learn from them."""

    def __init__(self, name: str):
        """name: "tiny", or "vocabulary", tiny/ with as many words as Qwen has."""
        small, generator = name == "tiny", torch.Generator().manual_seed(0)
        self.policy, self.micro = Policy("tiny"), 2048 if small else 1024
        questions = training_questions(8 if small else 1)
        self.trajectories = collect(self.policy, questions, 8, generator=generator)
        self.advantage = torch.randn(len(self.trajectories), generator=generator)
        if not small:
            self.policy.model.resize_token_embeddings(151_936, mean_resizing=False)
        parameters = self.policy.freeze_vision()
        self.model = copy.deepcopy(self.policy.model)
        self.optimiser = ShardedAdamW(parameters)
        self.pixels = []
        for t in self.trajectories:
            images = [t.question.open(), *(turn.crop for turn in t.looks)]
            images[0] = fit(images[0], self.policy.resolution)
            self.pixels.append(pixels_of(self.policy, images))
            with torch.no_grad():
                t.logps = [0.] + self.policy.logprobs([t.tokens], [t.mask])[0][0].tolist()

    def update(self, side: str) -> None:
        """side: "ours", the "usual" batches, or the usual way in one "whole" batch."""
        if side == "ours":
            our_update(self.policy, self.optimiser, self.trajectories, self.advantage, self.micro)
        else:
            micro = 10 ** 9 if side == "whole" else self.micro
            usual_update(self.model, self.policy, self.trajectories, self.pixels, self.advantage,
                         micro)

    def difference(self) -> float:
        """Of both gradients, as a share of their norm. Our buckets lie in reverse order."""
        ours = [b.gradient[span] for b in self.optimiser.buckets for span in b.spans]
        usual = [p.grad.flatten() for p in self.model.parameters() if p.grad is not None]
        ours, usual = torch.cat(ours[::-1]), torch.cat(usual)
        return ((ours - usual).norm() / usual.norm()).item()


def memory(name: str, side: str) -> None:
    """In a fresh process: what two updates need over what was there before."""
    case = Case(name)
    Path("/proc/self/clear_refs").write_text("5")            # forgets the peak so far
    before = status_mb("VmRSS")
    case.update(side)
    case.update(side)
    print(status_mb("VmHWM") - before)


def part_b(pairs: int) -> list[dict]:
    records = []
    for name, others in (("tiny", ("usual", "whole")), ("vocabulary", ("usual",))):
        case, used = Case(name), {}
        tokens = sum(len(t.mask) for t in case.trajectories)
        for side in others:
            times = alternate(lambda: case.update("ours"), lambda: case.update(side), pairs)
            label = f"{name}, one batch" if side == "whole" else name
            records.append(compare("b", label, *times, tokens=tokens))
            if side == "usual":
                records[-1]["difference"] = case.difference()
        for side in ("ours", *others):
            command = [sys.executable, __file__, "--memory", name, side]
            used[side] = float(subprocess.check_output(command, text=True).split()[-1])
        records.append({"part": "b", "row": f"memory {name}", "mb": used,
                        "ratio": used["ours"] / used["usual"]})
    return records


# ---- e: growth -----------------------------------------------------------------------------------

def part_e(pairs: int) -> list[dict]:
    policy, questions, rows = Policy("tiny"), training_questions(32), 64
    optimiser, generator = ShardedAdamW(policy.freeze_vision()), torch.Generator().manual_seed(0)
    usual = policy.resolution

    def point(group: int, turns: int, image: int) -> list[float]:
        """Seconds a trajectory: rollout, update, both."""
        policy.resolution = Resolution(usual.factor, usual.min_pixels, image * usual.factor ** 2)
        clock = [time.process_time()]
        with forced(policy):
            found = collect(policy, questions[:rows // group], group, turns, TOKENS, 1., generator)
        clock.append(time.process_time())
        our_update(policy, optimiser, found, torch.randn(rows, generator=generator))
        clock.append(time.process_time())
        spans = clock[1] - clock[0], clock[2] - clock[1], clock[2] - clock[0]
        return [span / rows for span in spans]

    points = [("turns", turns, 8, turns, 16) for turns in range(1, 7)]
    points += [("group", group, group, 3, 16) for group in (2, 4, 8, 16, 32)]
    points += [("image tokens", tokens, 8, 3, tokens) for tokens in (16, 64, 144, 256)]
    rounds = [[point(*settings) for _, _, *settings in points] for _ in range(pairs + 1)]
    times = np.array(rounds[1:])                    # (pairs, points, 3); the first round warms up
    names = [(axis, value) for axis, value, *_ in points]
    medians = np.median(times, 0).tolist()
    table = [[*name, *three] for name, three in zip(names, medians)]
    records = [{"part": "e", "row": "points", "points": table}]
    for axis, high, low in (("turns", 6, 1), ("group", 16, 2)):
        both = times[:, names.index((axis, high)), 2] / times[:, names.index((axis, low)), 2]
        records.append({"part": "e", "row": axis, **ratios(both.tolist())})
    two, one = zip(*((on_ranks(2), on_ranks(1)) for _ in range(2)))
    return [*records, compare("e", "ranks", list(two), list(one))]


def on_ranks(ranks: int) -> float:
    """Wall seconds of a step of 16 questions, one thread a rank; not the first step."""
    with tempfile.TemporaryDirectory() as out:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command = [*torchrun, "--nproc-per-node", str(ranks), "train.py", "--questions", "16",
                   "--steps", "4", "--eval_questions", "2", "--out", out]
        subprocess.run(command, check=True, capture_output=True)
        lines = Path(out, "metrics.jsonl").read_text().splitlines()
    return median(json.loads(line)["seconds"] for line in lines[1:])


# ---- the page ------------------------------------------------------------------------------------

INTRODUCTION = """
`python docs/bench.py` made this page; bench_step.py measured part c, bench_limit.py part d. Every
single time is in [bench.jsonl](bench.jsonl). A ratio is the median over alternating pairs, with the
smallest and the largest. Seconds are CPU seconds. Other jobs may have run: read the ratios."""
SECTIONS = {
    "a": """
## a. Rollouts against `generate`

64 trajectories (8 questions x 8). *Forced*: so many turns of 20 tokens on both sides, with the same
crop after each. *Natural*: at most 4 turns of at most 64 tokens, which end when the agent ends
them. The other side calls `generate` once a turn, over the left-padded conversations of all
unfinished rows with all their pixels. It returns no log-probabilities; ours does.""",
    "b": """
## b. Updates against padded batches and full logits

Trajectories as `tiny/` samples them: 8 questions x 8, micro-batches of 2,048 padded tokens. The
other side: padded batches in order of arrival, of as many tokens, or all in *one batch*; pixels
through the frozen vision tower; float32 logits of *all* tokens; the same loss. *Vocabulary*: a
model of 151,936 words, where logits are nearly everything (1 question x 8, 1,024 tokens). Memory:
the peak over the start.""",
    "c": """
## c. A whole step against TRL

TRL 1.16's `GRPOTrainer` with `environment_factory`, whose tool returns the crop as an image;
`generate`, float32, no gradient checkpointing, micro-batches of 32 rows. Both sides: 16 questions
x 8, at most 4 turns of 64 tokens, one update, no KL term, the same start and questions; the first
step does not count. Ours computes the semantic score as well. TRL keeps trajectories without
advantage in the update, runs the vision tower again in each turn and in the update, and ends a
trajectory at a call that is not JSON.""",
    "d": """
## d. Against the machine's limit

The other side is the limit: the time that `torch.matmul` takes, in the same run, for the matrix
products of the work and nothing else. The work: forced rollouts of 3 turns, and the update on
them. A ratio above 1 says that it was no limit: in decoding each product is a vector times a small
matrix, which `torch.matmul`, called alone, does more slowly than the kernels of the run.""",
    "e": """
## e. Growth

Forced turns; milliseconds of a trajectory, of 64 a point. Turns and image size: groups of 8. Group
and image size: 3 turns. An image has 16 tokens where nothing else is said. The ratios: 6 turns over
1, group 16 over group 2; and two ranks against one, a step of 16 questions x 8 in wall time."""}


def row(*cells) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def header(*cells) -> list[str]:
    return ["", row(*cells), "|---" * len(cells) + "|"]


def sides(r: dict) -> list[str]:
    """Two cells: what we took and what the other side did, in MB or in seconds."""
    if "mb" in r:
        return [f"{r['mb'][side]:.0f} MB" for side in ("ours", "usual")]
    times = [r.get("ours_s"), r.get("other_s") or r.get("limit_s")]
    return [f"{median(values):.2f} s" if values else "" for values in times]


def result(r: dict) -> list[str]:
    """Three cells: the ratio with its range, the target, and whether it was met."""
    text = f"{r['ratio']:.2f}" + (f" ({r['low']:.2f} to {r['high']:.2f})" if "low" in r else "")
    target = TARGETS.get(f"{r['part']} {r['row']}")
    if not target:
        return [text, "", ""]
    sign, number = target.split()
    met = {">=": operator.ge, "<=": operator.le, "<": operator.lt}[sign](r["ratio"], float(number))
    return [text, target, "met" if met else "not met"]


def shares(records: list[dict]) -> list[str]:
    """Where time goes: a column for each record, in percent."""
    spent = [r["seconds"] for r in records]
    lines = header("operations (torch.profiler)", *(r["row"].split(", ")[1] for r in records))
    for kind in spent[0]:
        lines.append(row(kind, *(f"{s[kind] / sum(s.values()):.0%}" for s in spent)))
    return lines


def remarks(r: dict) -> list[str]:
    """What makes sure that both sides did the same."""
    if "own_tokens" in r:
        own = r["own_tokens"]
        return ["", f"The agent's tokens a natural trajectory: {own['ours']:.1f} ours, "
                    f"{own['other']:.1f} `generate`."]
    if "difference" in r:
        return ["", f"{r['row']}: both gradients differ by {r['difference']:.0e} of their norm."]
    lines = []
    if "detail" in r:
        lines = header("", "tokens after the prompt", "looks", "accuracy", "peak over the start")
        for side, d in r["detail"].items():
            lines.append(row(side, f"{d['tokens']:.0f}", f"{d['calls']:.0f}",
                             f"{d['accuracy']:.2f}", f"{d['peak_mb']:.0f} MB"))
    return lines


def page(records: list[dict]) -> str:
    notes = {r["part"]: r for r in records if r["row"] == "machine"}
    lines = ["# Speed and memory", INTRODUCTION, *header("part", "measured on")]
    lines += [row(part, note["text"]) for part, note in notes.items()]
    for part in notes:
        rows = [r for r in records if r["part"] == part]
        lines += [SECTIONS[part], *header("", "ours", "other", "ratio", "target", "")]
        lines += [row(r["row"], *sides(r), *result(r)) for r in rows if "ratio" in r]
        for r in rows:
            lines += remarks(r)
        if operations := [r for r in rows if r["row"].startswith("operations")]:
            lines += shares(operations)
        for r in rows:
            if "points" in r:
                lines += header("", "", "rollout, ms", "update, ms", "both, ms")
                lines += [row(*point[:2], *(f"{1e3 * s:.1f}" for s in point[2:]))
                          for point in r["points"]]
    return "\n".join(lines) + "\n"


# ---- the run -------------------------------------------------------------------------------------

def measure(part: str, function, *arguments) -> None:
    """Put a part's new records in the place of its old ones, and draw the page."""
    about = (f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load "
             f"{os.getloadavg()[0]:.1f} at the start; Python {platform.python_version()}, torch "
             f"{torch.__version__}, transformers {transformers.__version__}; "
             f"{time.strftime('%Y-%m-%d')}")
    new = function(*arguments)
    start = hashlib.sha256((ROOT / "tiny/model.safetensors").read_bytes()).hexdigest()[:8]
    note = {"part": part, "row": "machine", "start": start, "text": f"{about}; start {start}"}
    kept = [r for r in read() if r["part"] != part]
    records = sorted([*kept, note, *new], key=lambda r: r["part"])
    RESULTS.write_text("".join(json.dumps(r) + "\n" for r in records))
    PAGE.write_text(page(records))


def read() -> list[dict]:
    return [json.loads(line) for line in RESULTS.open()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parts", nargs="+", default=list("abe"), choices=list("abe"))
    parser.add_argument("--pairs", type=int, default=5, help="of each comparison; default: 5")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    parser.add_argument("--memory", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.chdir(ROOT)
    torch.set_num_threads(1)
    if args.memory:
        return memory(*args.memory)
    for part in [] if args.table else args.parts:
        measure(part, {"a": part_a, "b": part_b, "e": part_e}[part], args.pairs)
    PAGE.write_text(page(read()))


if __name__ == "__main__":
    main()
