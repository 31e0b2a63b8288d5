"""Runs of train.py side by side, each recorded in docs/experiments.jsonl as soon as it ends.

A line has the run's options, seed, curves and held-out results, and where it comes from: `start`,
the weights that it began with, and `code`, the statements that shape a run. So a table can refuse
to mix two versions, and a killed series goes on where it was. docs/experiments.py uses this.
"""
import ast
import hashlib
import json
import os
import re
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
RESULTS, RUNS = ROOT / "docs/experiments.jsonl", ROOT / "runs/experiments"
TRAIN, JUDGE = "train.py", "docs/record.py"
SHAPES_A_RUN = ("mapo.py", "rollout.py", "tools.py", "reward.py", "train.py", "tiny/world.py",
                "lib/policy.py", "lib/sampler.py", "lib/batches.py", "lib/critic.py",
                "lib/shard.py", "lib/question.py", "lib/data.py", "lib/labels.py")
# The present code computes what the recorded one did: in five short runs of both (grpo, gspo, dapo,
# dr_grpo, ppo; all credits) all metrics, trajectories and weights were equal.
EQUAL = {"0124a7db": "7252fb04"}
CURVES = ("accuracy", "hit", "gap", "lucky", "calls", "semantic", "signal_groups", "entropy",
          "clip_fraction", "seconds", "sampled")
Job = tuple[str, list[str], int]          # row of a table, options of train.py, seed


# ---- what is there -------------------------------------------------------------------------------

def read_runs() -> list[dict]:
    return [json.loads(line) for line in RESULTS.open()]


def origin(run: dict) -> tuple[str, str]:
    """(start, code) of a recorded run."""
    return run["start"], run["code"]


def present() -> tuple[str, str]:
    """(start, code) of a run that begins now."""
    start = hashlib.sha256((ROOT / "tiny/model.safetensors").read_bytes()).hexdigest()[:8]
    code = "\n".join(statements((ROOT / name).read_text()) for name in SHAPES_A_RUN)
    code = hashlib.sha256(code.encode()).hexdigest()[:8]
    return start, EQUAL.get(code, code)


def statements(source: str) -> str:
    """A program without its comments and docstrings, which may change. (Python 3.11 writes it;
    another one may write the same statements otherwise, and they count as another code.)"""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        if documented and ast.get_docstring(node):
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def settings(options: list[str]) -> frozenset:
    """The options in no order: {("--algo", "grpo"), ..}."""
    return frozenset(zip(options[::2], options[1::2]))


def size(options: list[str]) -> frozenset:
    """What the time of a run depends on most."""
    return frozenset(o for o in settings(options) if o[0] in ("--questions", "--steps"))


def expected_seconds(jobs: list[Job], runs: list[dict]) -> float:
    """One after the other, by the median of the recorded runs of each size."""
    total = 0.
    for _, options, _ in jobs:
        same = [run["seconds"] for run in runs if size(run["options"]) == size(options)]
        total += statistics.median(same or [0.])
    return total


# ---- what is added -------------------------------------------------------------------------------

def train_all(jobs: list[Job], side_by_side: int) -> None:
    """Train and record. What is under way when this is stopped is lost, and nothing else."""
    RUNS.mkdir(parents=True, exist_ok=True)
    pair = present()
    with ThreadPoolExecutor(side_by_side) as pool:
        try:
            for done in as_completed([pool.submit(train, *job, pair) for job in jobs]):
                print(done.result(), flush=True)
        finally:
            pool.shutdown(cancel_futures=True)


def train(row: str, options: list[str], seed: int, pair: tuple[str, str]) -> str:
    """One run, recorded; its folder and its log stay. Raises RuntimeError if it failed."""
    from lib.checkpoint import choose_folder        # with torch; who draws a page need not wait
    program, given = TRAIN, options
    if options[0] == "--program":             # such as docs/apart.py: train.py with a change
        _, program, *given = options
    name = row.replace(" ", "").replace("/", "-")
    out = choose_folder(RUNS / f"{name}-{seed}", resume=False)
    of_run, log = ["--seed", str(seed), "--out", str(out)], Path(f"{out}.log")
    began = time.time()
    with log.open("w") as file:
        for command in ([program, *given, *of_run, "--eval_questions", "0"],
                        [JUDGE, *given, *of_run]):
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment,
                                  stdout=file, stderr=file)
            if done.returncode:
                raise RuntimeError(f"{row}, seed {seed}: {log} ends {log.read_text()[-300:]!r}")
    if present() != pair:
        raise RuntimeError("the start or the code has changed meanwhile: the run is not recorded")
    run = {"name": row, "seed": seed, "start": pair[0], "code": pair[1], "options": options,
           "seconds": round(time.time() - began), "collapses": collapses(log.read_text()),
           **numbers(out)}
    with RESULTS.open("ab", buffering=0) as file:       # one write: a kill tears no line
        file.write((json.dumps(run) + "\n").encode())
    return f"{row}, seed {seed}: {run['seconds']} s, {out}"


def collapses(log: str) -> dict[str, list[int]]:
    """What train.py named as a collapse -> in which steps."""
    found = {}
    for step, words in re.findall(r"^step (\d+): collapse: (.*)", log, re.MULTILINE):
        found.setdefault(words, []).append(int(step))
    return found


def numbers(out: Path) -> dict:
    """The results and the curves of a run's folder."""
    results = json.loads((out / "results.json").read_text(), parse_float=four_decimals)
    lines = (out / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line, parse_float=four_decimals) for line in lines]
    return {"results": results, "curves": {name: [s[name] for s in steps] for name in CURVES}}


def judge(options: list[str]) -> None:
    """Ask the newest weights of a run the held-out questions, as train.py asks them; results.json.
    (train.py would also ask the start, the same in each run: that takes a fifth of a run.)"""
    import report
    import train as training
    from eval import summary
    from lib.checkpoint import newest
    from lib.policy import Policy
    from reward import Scorer
    config = training.parse_config(options)
    questions = training.held_out(config)
    scorer = Scorer(Policy(newest(config.model), config.device))
    run = SimpleNamespace(config=config, tests=questions, scorer=scorer)
    answers = report.judge(run, Policy(newest(config.out), config.device))
    results = {f"after {how}": {"categories": summary(answers[how], questions)} for how in answers}
    (Path(config.out) / "results.json").write_text(json.dumps(results))


def four_decimals(number: str) -> float:
    return round(float(number), 4)


if __name__ == "__main__":
    judge(sys.argv[1:])
