"""One GPU, one command: does it compute what the CPU computes, how fast, and does the plan hold?

What it teaches: what to measure on a new machine, and in which order. First whether the numbers are
right, then time and memory. Each part is a process of its own with a limit of time: what fails is
recorded in words, and the others go on.

    checks            tiny/, in float32 and in bfloat16: sampler, trainer, greedy text, resume
    the default run   a few steps of train.py
    a random 3B       load, rollout, score, two updates, checkpoint, resume: docs/gpu_model.py

Run it:  python docs/gpu.py                         # under 10 minutes -> gpu.jsonl, gpu.md
         python docs/gpu.py --device cpu --small    # the same path with small models; 1.5 minutes
The 3B needs a GPU of 80 GB, and 55 GB of disk in runs/.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import plan                                     # first: it finds the project
import torch
import transformers

from gpu_model import MAPO, begin, bits, learnable, random_model, resume, unequal
from lib import checkpoint
from lib.batches import pad
from rollout import collect
from tiny.world import World, world_questions
from train import Config, accumulate, parse_config, take_step, train

ROOT = Path(__file__).parent.parent
RESULTS, PAGE = ROOT / "docs/gpu.jsonl", ROOT / "docs/gpu.md"


# ---- checks --------------------------------------------------------------------------------------

LIMITS = {"sampler - trainer, log-probability": (1e-4, .3),            # float32, bfloat16
          "trainer - the CPU's, log-probability": (1e-3, .5),
          "gradient - the CPU's, relative": (1e-3, .1),
          "greedy trajectories unlike the CPU's, share": (.1, .5),
          "tensors unequal after checkpoint and resume": (0, 0)}


def checks(write, config: Config, small: bool, folder: Path) -> None:
    """tiny/ on the device against itself, and against the CPU in float32."""
    questions = world_questions(World(), 0, "test", 0, 2 if small else 16)
    sides = [begin("tiny", config, folder), begin("tiny", Config(), folder)]
    here, texts, logps, gradients = sides[0], [], [], []
    for run in sides:
        answers = collect(run.policy, questions, temperature=0.)
        texts.append([[turn.text for turn in t.turns] for t in answers])
    sampled = collect(here.policy, questions, 4, generator=here.generator)
    batch, own = learnable(sampled), pad([t.mask for t in sampled], False)
    for run in sides:
        with torch.no_grad():
            logp, _ = run.policy.logprobs([t.tokens for t in sampled], [t.mask for t in sampled],
                                          prompts=[t.prompt for t in sampled])
        logps.append(logp.cpu()[own])
        totals = accumulate(run.policy, run.optimiser, batch, MAPO, run.config)
        gradients.append(torch.cat([b.gradient.cpu() for b in run.optimiser.buckets]))
    # The second side's totals are as good: take_step needs them for its statistics alone.
    take_step(here, batch, totals, 0)
    checkpoint.save(folder, 1, here.policy, [here.optimiser], here.generator, {})
    found = [(logps[0] - batch.old_logp[own]).abs().max().item(),
             (logps[0] - logps[1]).abs().max().item(),
             ((gradients[0] - gradients[1]).norm() / gradients[1].norm()).item(),
             unequal(*texts) / len(questions),
             unequal(bits(here), bits(resume(config, folder)))]
    for (row, limits), value in zip(LIMITS.items(), found):
        limit = limits[config.dtype == "bfloat16"]
        write({"row": row, "precision": config.dtype, "found": value, "limit": limit,
               "good": "yes" if value <= limit else "**no**"})


# ---- the default run -----------------------------------------------------------------------------

def default_run(write, config: Config, small: bool, folder: Path) -> None:
    """Medians of the steps after the first, which also waits for libraries."""
    options = ["--questions", "2", "--steps", "2"] if small else ["--steps", "5"]
    train(parse_config([*options, "--device", config.device, "--eval_questions", "0", "--quiet",
                        "--out", str(folder / "run")]))
    steps = [json.loads(line) for line in (folder / "run/metrics.jsonl").open()][1:]
    for name in ("seconds", "rollout_seconds", "tokens_per_s", "logp_gap", "peak_mb"):
        write({"row": name, "a step": median(step[name] for step in steps)})


# ---- each part in a process of its own -----------------------------------------------------------

PARTS = {"checks in float32": (checks, "float32", 50),                  # its limit in seconds
         "checks in bfloat16": (checks, "bfloat16", 50),
         "the default run": (default_run, "float32", 90),
         "a random 3B": (random_model, "bfloat16", 370)}


def watch(part: str, command: list[str], file: Path, limit: float) -> list[dict]:
    """Run a command that appends its records to the file. Returns them; if it fails or is too
    slow, one more says so."""
    trouble = ""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit)
        if done.returncode:
            said = done.stderr.strip().split("\n")[-1]
            trouble = said or f"ended with {done.returncode}"
    except subprocess.TimeoutExpired:
        trouble = f"stopped after {limit:g} s"
    lines = file.read_text().splitlines() if file.is_file() else []
    records = [json.loads(line) for line in lines]
    if trouble:
        last = records[-1]["row"] if records else "its start"
        records.append({"failed": f"{part}, after {last}: {trouble}"})
    return [{"part": part, **record} for record in records]


def run_all(device: str, small: bool) -> dict:
    """All parts: a line of gpu.jsonl."""
    began, records = time.time(), []
    (ROOT / "runs").mkdir(exist_ok=True)
    for part, (_, _, limit) in PARTS.items():
        with tempfile.TemporaryDirectory(dir=ROOT / "runs") as folder:
            command = [sys.executable, __file__, "--device", device, "--part", part, "--folder",
                       folder] + ["--small"] * small
            if small:
                limit *= 10                     # a laptop may be busy
            records += watch(part, command, Path(folder) / "records.jsonl", limit)
        print(f"{part}: ended at {time.time() - began:.0f} s", flush=True)
    chip = "a CPU" if device == "cpu" else torch.cuda.get_device_name()
    about = (f"{chip}, torch {torch.__version__}, transformers {transformers.__version__}, "
             f"{time.strftime('%Y-%m-%d')}, {time.time() - began:.0f} s in all")
    return {"machine": about, "records": records}


# ---- the page ------------------------------------------------------------------------------------

def report(run: dict) -> str:
    """A table for each kind of part, with its records' keys as columns; and what failed."""
    lines = [f"{run['machine']}."]
    for kind in (checks, default_run, random_model):
        rows = [r for r in run["records"] if PARTS[r["part"]][0] is kind and "row" in r]
        columns = list(dict.fromkeys(key for r in rows for key in r if key != "part"))
        if rows:
            lines += ["", f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
        for r in rows:
            lines.append(f"| {' | '.join(cell(r.get(column)) for column in columns)} |")
    failed = [f"- **Failed: {r['failed']}**" for r in run["records"] if "failed" in r]
    return "\n".join([*lines, "", *(failed or ["All parts ended."])])


def cell(value) -> str:
    return plan.rounded(value) if isinstance(value, int | float) else value or ""


def page(runs: list[dict]) -> str:
    """The page as it stands, with the newest run between its markers."""
    before, rest = PAGE.read_text().split("<!-- run -->\n")
    after = rest.split("<!-- end -->\n")[1]
    inside = report(runs[-1]) if runs else "**Not run**: no GPU was at hand."
    return f"{before}<!-- run -->\n{inside}\n<!-- end -->\n{after}"


def read() -> list[dict]:
    return [json.loads(line) for line in RESULTS.open()] if RESULTS.is_file() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--small", action="store_true", help="small models; the page stays")
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.device == "cpu" and not args.small:
        parser.error("--device cpu: expected --small with it; a CPU is too slow for a 3B")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU; --device cpu --small shows the path")
    if args.part:
        os.chdir(ROOT)
        function, dtype, _ = PARTS[args.part]
        file, config = args.folder / "records.jsonl", Config(device=args.device, dtype=dtype)
        function(lambda record: checkpoint.append(file, [record]), config, args.small, args.folder)
        return
    run = run_all(args.device, args.small)
    print(report(run))
    if not args.small:
        checkpoint.append(RESULTS, [run])
        PAGE.write_text(page(read()))


if __name__ == "__main__":
    main()
