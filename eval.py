"""Evaluate an agent: accuracy per category with 95% intervals, and what the agent looked at.

What it teaches: accuracy alone cannot tell an agent that looks from one that guesses. Beside it
stand `hit` (all the evidence was shown, close enough to read), `gap` (looks whose crop does not
hold what their label names), `lucky` (right answers without a hit) and `semantic` (the mean score
of a look); reward.py measures them.

Run it:  python eval.py --model runs/mapo                    # the world's held-out questions; 20 s
         python eval.py --model tiny --data questions.jsonl  # your own; its fields: lib/data.py
         python eval.py --model DIR --data VStarBench.tsv --max_turns 6 --max_tokens 512 \\
             --device cuda --dtype bfloat16                  # a benchmark: lib/benchmarks.py
         torchrun --nproc-per-node 2 -- eval.py --model DIR  # two processes share the batches;
                                                 # without the -- torchrun takes --n for its own

A run is asked as it was trained: with its --objects, --options, --max_turns and --max_tokens, if
the command names none. A benchmark's table counts as its reference does, and beside that by our
rule (docs/scoring.md).

Each process appends to its own predictions-<rank>.jsonl. A killed run goes on with `--resume`, with
any number of processes, and ends at the same table. It expects the same settings, and the files of
the model and the questions as they were.
"""
import argparse
import json
import math
import os
import sys
from pathlib import Path
from typing import Callable

import torch
from tqdm import tqdm

from lib import benchmarks, checkpoint, page, shard
from lib.data import DataError, check_pictures, listed
from lib.policy import Policy, Tokens
from lib.question import Question
from reward import Scorer, astray, hit, measure, outcome, score_looks
from rollout import Trajectory, Turn, collect
from show import film_strip, is_same, stack, write_page
from tiny.world import World, world_questions
from tools import Call

COLUMNS = ("calls", "valid", "hit", "gap", "lucky", "semantic")
# Taken from the training of the weights, unless the command names them; these, if nothing is noted.
AS_TRAINED = {"options": 4, "objects": 6, "max_turns": 4, "max_tokens": 64}
# What a --resume may change. (With another batch, sampled answers are others, but as good.)
FREE = ("n", "batch", "films", "out", "resume", "device")


def wilson(right: float, n: float) -> tuple[float, float]:
    """95% interval of a share, from `right` successes in `n` trials (Wilson 1927)."""
    if n == 0:
        return 0., 1.
    z, p = 1.959964, right / n
    centre = p + z * z / (2 * n)
    spread = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max((centre - spread) / scale, 0.), min((centre + spread) / scale, 1.)


def evaluate(policy: Policy, questions: list[Question], scorer: Scorer | None = None,
             temperature: float = 0., seed: int = 0, max_turns: int = 4, max_tokens: int = 64,
             batch: int = 64, quiet: bool = True) -> list[Trajectory]:
    """One trajectory per question, in order; temperature 0 is greedy. Images are open only while
    their batch runs. Of what was seen only the crops are kept, for films."""
    generator = torch.Generator(policy.device).manual_seed(seed)
    trajectories = []
    for start in tqdm(range(0, len(questions), batch), disable=quiet, unit="batch"):
        part = collect(policy, questions[start:start + batch], 1, max_turns, max_tokens,
                       temperature, generator)
        if scorer:
            score_looks(part, scorer)
        for trajectory in part:
            trajectory.prompt.features = trajectory.tokens.features = []
            for turn in trajectory.turns:
                turn.crop_tokens = None
        trajectories += part
    return trajectories


# ---- what it says --------------------------------------------------------------------------------

def summary(trajectories: list[Trajectory], questions: list[Question],
            total: Callable[[float], float] = float) -> dict[str, dict]:
    """n and the measures (reward.measure) of each category of `questions`, and of "all". `total`
    may sum a number over the ranks, each of which has its own trajectories."""
    categories = sorted({question.category for question in questions})
    rows = {}
    for category in [*categories, "all"] if len(categories) > 1 else ["all"]:
        part = [t for t in trajectories if category in ("all", t.question.category)]
        rows[category] = {"n": int(total(len(part))), **measure(part, total)}
    return rows


def with_interval(accuracy: float, trials: float) -> str:
    low, high = wilson(accuracy * trials, trials)
    return f"{accuracy:6.3f} ({low:.3f} .. {high:.3f})"


def table(rows: dict[str, dict]) -> str:
    """A `summary` as text, a line for each row."""
    names = "".join(f"{column:>9}" for column in COLUMNS)
    lines = [f"{'':20}{'n':>5}  accuracy (95% interval) {names}"]
    for category, row in rows.items():
        values = [row[column] for column in COLUMNS]
        cells = "".join(f"{'-':>9}" if value is None else f"{value:9.2f}" for value in values)
        accuracy = with_interval(row["accuracy"], row["n"])
        lines.append(f"{category or '(none)':20}{row['n']:5}  {accuracy} {cells}")
    return "\n".join(lines)


def benchmark_table(name: str, trajectories: list[Trajectory]) -> str:
    """The benchmark's own rows, by the reference's rule and by ours, and how the tool was used."""
    reference, ours = [], []
    for t in trajectories:
        reference.append((t.question, benchmarks.correct(t.question, t.answer)))
        ours.append((t.question, benchmarks.correct(t.question, t.answer, ours=True)))
    lines = [f"{name:36}{'n':>5}  accuracy (95% interval)    ours"]
    for row, our_row in zip(benchmarks.accuracies(reference), benchmarks.accuracies(ours)):
        label, accuracy, n, trials = row
        lines.append(f"{label:36}{n:5}  {with_interval(accuracy, trials)}  {our_row[1]:6.3f}")
    m = measure(trajectories)
    semantic = "" if m["semantic"] is None else f", semantic {m['semantic']:.2f}"
    lines.append(f"calls per question {m['calls']:.2f}, valid turns {m['valid']:.2f}{semantic}")
    return "\n".join(lines)


# ---- trajectories on disk ------------------------------------------------------------------------

def record(trajectory: Trajectory) -> dict:
    """A trajectory as one JSON object, for a .jsonl file. Of a crop only its size (width, height)
    is kept: show.py cuts it again. hit, astray: as in reward.py; null where nothing is known."""
    question, turns = trajectory.question, []
    for turn in trajectory.turns:
        call = turn.call
        strayed = astray(turn, question) if call and question.objects else None
        turns.append({"text": turn.text, "tool": call and call.tool, "label": call and call.label,
                      "arguments": call and call.arguments, "box": turn.box,
                      "crop": turn.crop and turn.crop.size, "score": turn.score,
                      "astray": strayed, "error": turn.error, "message": turn.message})
    return {"id": question.id, "category": question.category, "question": question.text,
            "choices": question.choices, "right": question.answer, "answer": trajectory.answer,
            "end": trajectory.end, "correct": outcome(question, trajectory.answer),
            "hit": hit(trajectory) if question.boxes else None, "seen": trajectory.seen,
            "space": trajectory.space, "turns": turns}


def restore(saved: dict, question: Question) -> Trajectory:
    """The trajectory of a saved line: what was said, done and scored, without tokens and crops."""
    turns = []
    for turn in saved["turns"]:
        call = turn["tool"] and Call(turn["tool"], turn["label"], turn["arguments"])
        turns.append(Turn(turn["text"], slice(0, 0), call, turn["box"], error=turn["error"],
                          message=turn.get("message", ""), score=turn["score"]))
    return Trajectory(question, Tokens([]), Tokens([]), [], [], saved["seen"], saved["space"],
                      turns, saved["answer"], saved["end"])


def predictions(out: Path) -> list[Path]:
    return sorted(out.glob("predictions-*.jsonl"))


def read_predictions(out: Path) -> dict[int, dict]:
    """All ranks' records by the question's number, "n". A line that a kill has torn is ignored."""
    found = {}
    for file in predictions(out):
        for line in file.read_bytes().splitlines():
            try:
                saved = json.loads(line)
                found[saved["n"]] = saved
            except ValueError:
                continue
    return found


# ---- the run -------------------------------------------------------------------------------------

def trained_with(model: str) -> dict:
    """The settings that train.py noted beside the weights; {} for another model."""
    note = Path(model) / "train.json"
    return json.loads(note.read_text(encoding="utf-8")) if note.is_file() else {}


def load_questions(args: argparse.Namespace) -> tuple[str, list[Question]]:
    """The benchmark's name, or "", and all its questions. All bad rows and pictures are named
    before the first question is asked (DataError)."""
    if not args.data:
        world = World(objects=args.objects, options=args.options)
        return "", world_questions(world, 0, "test", 0, args.n or 500)
    bad = []
    name, questions = benchmarks.load(args.data, bad)
    questions = check_pictures(questions, bad)
    if bad or not questions:
        raise DataError(listed(bad) or f"{args.data}: no questions")
    return name, questions


def load_scorer(args: argparse.Namespace, policy: Policy, questions: list[Question]) -> Scorer:
    """Its encoder is the frozen model at which training began, as train.py notes it beside the
    weights; else the model itself. Reference crops are of --data, or of the world. (A run on your
    own questions took them from its training file: its scores differ a little.)"""
    note, encoder = trained_with(args.model).get("model"), policy
    if note:
        base = checkpoint.ROOT / note
        if not base.is_dir():
            raise FileNotFoundError(f"{base}: the model at which training began, which scores the "
                                    "looks, is gone; --no_score judges without it")
        encoder = Policy(base, policy.device, policy.model.dtype)
    return Scorer(encoder, questions[:64] if args.data else None)


def to_resume(begun: list[Path], settings: dict) -> Path:
    """Of the evaluations that were begun with these settings the one with most answers. If there is
    none, the last one: open_folder then says what differs."""
    same = [path for path in begun if page.read_settings(path) == settings]
    return max(same or begun[-1:], key=lambda path: len(read_predictions(path)))


def open_folder(out: Path, settings: dict) -> None:
    """Begin in a folder that holds none, or go on in one whose predictions have these settings."""
    out.mkdir(parents=True, exist_ok=True)
    checkpoint.lock(out)                 # before anything in it is touched
    if predictions(out):
        checkpoint.check_settings(out, settings, set(), "settings.json")
    else:
        (out / "settings.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")
        (out / "predictions-0.jsonl").touch()       # from now on the folder holds an evaluation
    for file in predictions(out):        # what is appended must not continue a torn line
        os.truncate(file, file.read_bytes().rfind(b"\n") + 1)


def ask(args: argparse.Namespace, policy: Policy, scorer: Scorer | None, questions: list[Question],
        out: Path) -> None:
    """This rank's batches. A batch and its seed do not depend on the number of ranks, so neither
    does the table. A batch of which answers are missing is asked whole: its draws are the same."""
    done, rank = read_predictions(out), shard.rank()
    for n, saved in done.items():
        if n < len(questions) and not is_same(questions[n], saved):
            raise ValueError(f"{out}: answer {n} is to question {saved['id']}, found now "
                             f"{questions[n].id}, or with another text; begin anew")
    starts = range(rank * args.batch, len(questions), shard.ranks() * args.batch)
    for start in tqdm(starts, disable=rank > 0 or not sys.stderr.isatty(), unit="batch"):
        numbers = range(start, min(start + args.batch, len(questions)))
        if all(n in done for n in numbers):
            continue
        part = evaluate(policy, [questions[n] for n in numbers], scorer, args.temperature,
                        args.seed + start, args.max_turns, args.max_tokens, args.batch)
        for trajectory in part:
            trajectory.answer = final_answer(trajectory)
        if args.films and start == 0:
            strips = [film_strip(trajectory) for trajectory in part[:args.films]]
            stack(strips).save(out / "films.png")
        checkpoint.append(out / f"predictions-{rank}.jsonl",
                          [{"n": n, **record(t)} for n, t in zip(numbers, part) if n not in done])


def final_answer(trajectory: Trajectory) -> str | None:
    """Where no <answer> was closed, a benchmark's question takes the whole last turn, as the
    references read it; another question has no answer."""
    if trajectory.answer is None and trajectory.question.benchmark:
        return trajectory.turns[-1].text
    return trajectory.answer


def report(args: argparse.Namespace, name: str, questions: list[Question], out: Path) -> None:
    """The table of all ranks' predictions, results.json, and the page."""
    saved = read_predictions(out)
    trajectories = [restore(saved[n], question) for n, question in enumerate(questions)]
    rows = summary(trajectories, questions)
    print(benchmark_table(name, trajectories) if name else table(rows))
    moment = "evaluated greedy" if args.temperature == 0 else "evaluated sampled"
    results = {moment: {**rows["all"], "categories": rows}}
    (out / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    print(f"saved in {out}; look at it: {write_page([out])}")


def run(args: argparse.Namespace) -> None:
    # a fast process waits for the slowest, however long that takes
    device = shard.setup(args.device, timeout=30 * 86400)
    with shard.together():
        named = Path(args.model)
        # from here on, args say what is really used
        args.model = str(checkpoint.newest(named))
        trained = trained_with(args.model)
        for setting, usual in AS_TRAINED.items():
            if getattr(args, setting) is None:
                setattr(args, setting, trained.get(setting, usual))
        name, every = load_questions(args)
        questions = every[:args.n]
        args.batch = args.batch or (8 if name else 64)
        policy = Policy(args.model, device, getattr(torch, args.dtype), args.coordinates)
        scorer = None if args.no_score else load_scorer(args, policy, every)
        settings = {key: value for key, value in vars(args).items() if key not in FREE}
        taken, out = checkpoint.next_folders(Path(args.out))
        begun = [path for path in taken if predictions(path)]
        if args.resume and begun:
            out = to_resume(begun, settings)
    with shard.together():
        if shard.rank() == 0:
            if Path(args.model) != named:
                print(f"judging {args.model}, the newest weights of {named}")
            if args.resume and not begun:
                print(f"nothing to resume in {args.out}: this evaluation begins")
            if out != Path(args.out):
                print(f"the evaluation's folder is {out}: {args.out} holds another run")
            open_folder(out, settings)
    with shard.together():
        ask(args, policy, scorer, questions, out)
    if shard.rank() == 0:
        report(args, name, questions, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", default="tiny", help="a model directory, or a run of train.py")
    add("--data", help="a benchmark's file or a .jsonl; default: the world's held-out questions")
    add("--n", type=int, help="only the first n questions; default: 500 of the world, else all")
    add("--options", type=int, help="of the mark questions, 0 or 2 to 8; as trained, else 4")
    add("--objects", type=int, help="of a scene of the world, 2 to 16; as trained, else 6")
    add("--temperature", type=float, default=0., help="0 is greedy")
    add("--max_turns", type=int, help="as trained, else 4")
    add("--max_tokens", type=int, help="a turn, as trained, else 64; larger models need hundreds")
    add("--batch", type=int, help="questions asked side by side; default: 64, benchmarks 8")
    add("--seed", type=int, default=0, help="of sampling")
    add("--no_score", action="store_true", help="no semantic scores: no second model is loaded")
    add("--films", type=int, default=4, help="film strips of the first questions")
    add("--out", default="runs/eval", help="folder for predictions and film strips")
    add("--resume", action="store_true", help="keep the predictions of the same settings in --out, "
        "--out-2, .., ask only the rest")
    add("--device", default="cpu", help="cpu or cuda")
    add("--dtype", default="float32", choices=["float32", "bfloat16"])
    add("--coordinates", choices=["pixels", "1000"],
        help="of boxes: pixels of the overview, or thousandths of its sides; default: as "
             "agent.json beside the model says, else as its family")
    args = parser.parse_args()
    counts = (args.max_turns, args.max_tokens, args.batch, args.n)
    finite = 0 <= args.temperature < math.inf
    if not finite or any(count is not None and count < 1 for count in counts):
        parser.error("--max_turns, --max_tokens, --batch, --n must be at least 1, "
                     "--temperature not below 0")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    try:
        run(args)
    except KeyboardInterrupt:
        sys.exit("\neval.py: stopped; with --resume the same command asks the rest")
    except (DataError, OSError, ValueError, shard.RankFailed) as error:
        sys.exit(f"eval.py: {shard.named(error)}")
    except torch.OutOfMemoryError as error:
        sys.exit(f"eval.py: {shard.named(error)}\nTake a smaller --batch, or limit the images "
                 "(docs/larger.md)")
    finally:
        shard.cleanup()


if __name__ == "__main__":
    main()
