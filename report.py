"""What a run tells: a line of numbers a step, held-out questions before and after, a collapse.

What it teaches: which numbers to watch while an agent trains, and when one of them is an alarm.

    log       after each step: a line of metrics.jsonl, a few whole trajectories, the bar
    collapse  what went wrong, in words
    judge     the held-out questions, answered greedily and sampled: before training, and after it
    watch     a handful of them at each checkpoint, always the same ones
    compare   the tables before and after, and films of the same questions
    closing   what training changed, and where things lie

docs/run.md explains the numbers. `run` is train.py's Run; train.py imports this file.

Run it:  python report.py runs/mapo         # where a run stands, and in which steps it collapsed
"""
import json
import math
import resource
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from eval import evaluate, record, summary, table, wilson
from lib import checkpoint, page, shard
from lib.policy import Policy
from lib.question import Question
from rollout import Trajectory
from show import film_strip, stack, write_page


# ---- after each step -----------------------------------------------------------------------------

def log(run, metrics: dict, batch, bar: tqdm) -> None:
    """Rank 0 writes and says what a step was. batch: train.Batch, what the step learnt from."""
    with shard.together():
        if shard.rank() == 0:
            write_lines(run, metrics, batch)
            say(run, metrics, bar)


def write_lines(run, metrics: dict, batch) -> None:
    checkpoint.append(run.out / "metrics.jsonl", [metrics])
    for i in sorted({0, 1, run.config.group} & set(range(len(batch.trajectories)))):
        trajectory, advantage = batch.trajectories[i], batch.advantage[i]
        # token k stands in column k - 1; a turn's last token is span.stop - 1
        of_turns = [round(advantage[turn.span.stop - 2].item(), 4) for turn in trajectory.turns]
        line = {"step": metrics["step"], "advantage": of_turns, **record(trajectory)}
        checkpoint.append(run.out / "trajectories.jsonl", [line])


def say(run, metrics: dict, bar: tqdm) -> None:
    """Beside the bar; where there is no terminal for one, each step prints a line."""
    step, words = metrics["step"], in_short(metrics)
    bar.set_postfix_str(words)
    if bar.disable and not run.config.quiet:
        print(f"step {step}/{run.config.steps}  {words}  {metrics['seconds']:.1f} s", flush=True)
    if trouble := collapse(metrics):
        tqdm.write(f"step {step}: collapse: {trouble}")


def in_short(metrics: dict) -> str:
    shown = [(name, metrics[name]) for name in ("accuracy", "calls", "hit", "gap", "semantic")]
    return "  ".join(f"{name} {v:.2f}" for name, v in shown if v is not None)


def collapse(metrics: dict) -> str:
    """What went wrong, in words; empty while all is well."""
    if not math.isfinite(metrics["grad_norm"]):
        return "the gradient of an update is not finite: it was skipped; lower --lr"
    if not math.isfinite(metrics.get("value_loss", 0.)):
        return "the critic's gradient is not finite: its update was skipped; lower --critic_lr"
    if metrics["skipped"]:
        return "no group had a signal: the step was skipped"
    if metrics["calls"] < .1:
        return ("the agent has stopped looking (fewer than 0.1 calls a trajectory): "
                "raise --beta, or try --credit trajectory")
    if metrics["answered"] < .5:
        return ("fewer than half of the trajectories end in an answer: lower --beta or --lr, or "
                "raise --max_tokens")
    if metrics["entropy"] < .005:
        return ("the policy is nearly deterministic (entropy below 0.005): "
                "nothing is left to learn from")
    if metrics["valid"] < .5:
        return "most turns are malformed: lower --lr"
    return ""


def no_bar(config) -> bool:
    return shard.rank() > 0 or config.quiet or not sys.stderr.isatty()


def peak_mb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


# ---- held-out questions --------------------------------------------------------------------------

def judge(run, policy: Policy) -> dict[str, list[Trajectory]]:
    """This rank's part of the held-out questions, answered greedily and sampled."""
    mine, config = run.tests[shard.rank()::shard.ranks()], run.config
    answers = {}
    with shard.together():
        for name, temperature in (("greedy", 0.), ("sampled", 1.)):
            answers[name] = evaluate(policy, mine, run.scorer, temperature, 0, config.max_turns,
                                     config.max_tokens, side_by_side(config, shard.ranks()),
                                     no_bar(config))
    return answers


def side_by_side(config, ranks: int) -> int:
    """How many questions a rank asks at a time: at most 64, and no more than it has trajectories in
    a rollout, which fits in memory."""
    return min(64, config.questions // ranks * config.group)


def watch(run, step: int) -> None:
    """Answer a handful of held-out questions greedily, the same ones every time: what was learnt
    can be watched. One line a trajectory in watched.jsonl."""
    config = run.config
    with shard.together():
        if shard.rank() == 0:
            watched = evaluate(run.policy, handful(run.tests), run.scorer, 0., 0, config.max_turns,
                               config.max_tokens, side_by_side(config, shard.ranks()))
            checkpoint.append(run.out / "watched.jsonl",
                              [{"step": step, **record(trajectory)} for trajectory in watched])


def handful(questions: list[Question], count: int = 6) -> list[Question]:
    """The first question of each category, then the first others; in their own order."""
    first = first_of_each(questions)
    others = [i for i in range(len(questions)) if i not in first]
    return [questions[i] for i in sorted([*first, *others][:count])]


def first_of_each(questions: list[Question]) -> list[int]:
    """The place of the first question of each category."""
    first = {}
    for i, question in enumerate(questions):
        first.setdefault(question.category, i)
    return list(first.values())


def show_page(run) -> None:
    """Write the run's page anew: a browser's reload shows the run as it is now."""
    with shard.together():
        if shard.rank() == 0:
            write_page([run.out])


# ---- at the end ----------------------------------------------------------------------------------

def compare(run, before: dict, after: dict) -> None:
    """The tables before and after, over all ranks; results.json; films of the same questions.
    before, after: as `judge` returns them."""
    results, loud = {}, shard.rank() == 0 and not run.config.quiet
    for name in ("greedy", "sampled"):
        for moment, answers in (("before", before), ("after", after)):
            rows = summary(answers.get(name, []), run.tests, shard.all_sum)
            m = rows["all"]
            interval = wilson(m["accuracy"] * m["n"], m["n"])
            results[f"{moment} {name}"] = {**m, "interval": interval, "categories": rows}
            if loud:
                print(f"\n{moment} training, {name}\n{table(rows)}")
    with shard.together():
        if shard.rank() == 0:
            (run.out / "results.json").write_text(json.dumps(results, indent=1))
            strips = []
            for i in first_of_each([t.question for t in before["greedy"]])[:4]:
                strips.append(film_strip(before["greedy"][i], "before: "))
                strips.append(film_strip(after["greedy"][i], "after: "))
            stack(strips).save(run.out / "films.png")


def closing(folder: Path) -> str:
    """A finished run in a few lines: what training changed, and where things lie."""
    rows = [row for row in page.read_results(folder) if row["category"] == "all"]
    found = {(row["when"], row["how"]): row for row in rows}
    lines = [f"\n{folder}"]
    if rows:
        lines.append(f"  {rows[0]['n']:.0f} held-out questions".ljust(26) + f"{'greedy':28}sampled")
        for name in ("accuracy", "hit", "gap", "calls", "semantic"):
            greedy, sampled = (change(found, how, name) for how in ("greedy", "sampled"))
            lines.append(f"    {name:22}{greedy:28}{sampled}")
    places = {"look at it": "page.html", "films before, after": "films.png",
              "the model": checkpoint.newest(folder).name, "the numbers": "metrics.jsonl"}
    for what, name in places.items():
        if (folder / name).exists():
            lines.append(f"  {what:24}{folder / name}")
    return "\n".join(lines)


def change(found: dict, how: str, name: str) -> str:
    """Before -> after, and the difference; "-" where nothing is known."""
    before, after = (found.get((when, how), {}).get(name) for when in ("before", "after"))
    if before is None or after is None:
        return "-"
    return f"{before:.3f} -> {after:.3f} ({after - before:+.3f})"


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/mapo")
    lines = page.raw_lines([folder / "metrics.jsonl"])
    steps = [metrics for metrics in map(page.parse, lines) if metrics]
    if not steps:
        sys.exit(f"{folder}/metrics.jsonl: expected lines of a run of train.py; found none")
    for metrics in steps:
        if trouble := collapse(metrics):
            print(f"step {metrics['step']}: collapse: {trouble}")
    print(f"step {metrics['step']}: {in_short(metrics)}\n{closing(folder)}")
