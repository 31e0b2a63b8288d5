"""Evaluate an agent: accuracy per category with 95% intervals, and what the agent looked at.

What it teaches: accuracy alone cannot tell an agent that looks from one that guesses. Beside it
stand `hit` (all the evidence was shown, close enough to read), `gap` (looks whose crop does not
hold what their label names), `lucky` (right answers without a hit) and `semantic` (the mean score
of a look). The histogram of answers shows a model that always says A.

Run it:  python eval.py --model runs/mapo                    # the world's held-out questions; 20 s
         python eval.py --model tiny --data questions.jsonl  # your own; its fields: lib/data.py
         python eval.py --model tiny --no_tools              # the same questions without a look
         python eval.py --model DIR --data VStarBench.tsv --max_turns 6 --max_tokens 512 \\
             --device cuda --dtype bfloat16                  # a benchmark: lib/benchmarks.py
         torchrun --nproc-per-node 2 -- eval.py --model DIR  # two processes share the batches

A benchmark's table counts as its reference does, and beside that by our rule (docs/scoring.md).

Each process appends to its own predictions-<rank>.jsonl. A killed run goes on with `--resume`, with
any number of processes, and ends at the same table. It expects the same settings, and the files of
the model and the questions as they were.
"""
import argparse
import json
import math
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Callable

import torch
from tqdm import tqdm

from lib import benchmarks, shard
from lib.checkpoint import append, lock, newest
from lib.data import DataError, Question, check_pictures, listed
from lib.policy import Policy, Tokens
from reward import Scorer, astray, grounded, measure, outcome, score_looks
from rollout import Trajectory, Turn, collect
from show import film_strip, stack, write_page
from tiny.world import World, world_questions
from tools import Call

COLUMNS = ("calls", "valid", "hit", "gap", "lucky", "semantic")
# What a --resume may change. (With another batch, sampled answers are others, but as good.)
FREE = ("n", "check", "batch", "films", "out", "resume", "device")
NO_TOOLS_PROMPT = """You are a careful visual agent.

Think first, then finish with the letter or the text of your answer:
<think>The sign says 42.</think><answer>42</answer>"""


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
    their batch runs, and their features are not kept."""
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
    results, ours = [], []
    for t in trajectories:
        results.append((t.question, benchmarks.correct(t.question, t.answer)))
        ours.append((t.question, benchmarks.correct(t.question, t.answer, "ours")))
    lines = [f"{name:36}{'n':>5}  accuracy (95% interval)    ours"]
    for row, our_row in zip(benchmarks.accuracies(results), benchmarks.accuracies(ours)):
        label, accuracy, n, trials = row
        lines.append(f"{label:36}{n:5}  {with_interval(accuracy, trials)}  {our_row[1]:6.3f}")
    m = measure(trajectories)
    semantic = "" if m["semantic"] is None else f", semantic {m['semantic']:.2f}"
    lines.append(f"calls per question {m['calls']:.2f}, valid turns {m['valid']:.2f}{semantic}")
    return "\n".join(lines)


def histogram(trajectories: list[Trajectory]) -> str:
    """How often each option was answered, and was right; "-" is no answer, or no option."""
    said, right = Counter(), Counter()
    for t in trajectories:
        if t.question.choices:
            said[letter(t.question, t.answer)] += 1
            right[letter(t.question, t.question.answer)] += 1
    columns = [f"{key} {said[key]} (right {right[key]})" for key in sorted(said | right)]
    return "answers: " + "  ".join(columns)


def letter(question: Question, answer: str | None) -> str:
    option = benchmarks.chosen(question, answer)
    return "-" if option is None else chr(ord("A") + option)


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
            "hit": grounded(trajectory) if question.boxes else None, "seen": trajectory.seen,
            "space": trajectory.space, "turns": turns}


def restore(saved: dict, question: Question) -> Trajectory:
    """The trajectory of a `record`: what was said, done and scored, without tokens and pixels."""
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


def free_folder(out: Path) -> Path:
    """The folder, or, while that holds predictions, the next of out-2, out-3, .."""
    folder, number = out, 1
    while predictions(folder):
        number += 1
        folder = out.with_name(f"{out.name}-{number}")
    return folder


def prepare(out: Path, settings: dict) -> None:
    """Begin in an empty folder, or go on in one whose predictions have the same settings."""
    note = out / "settings.json"
    if not predictions(out):
        note.write_text(json.dumps(settings, indent=1), encoding="utf-8")
        return
    before = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else {}
    changed = [f"{key} {before.get(key)!r} there and {value!r} now"
               for key, value in settings.items() if before.get(key) != value]
    if changed:
        raise DataError(f"{note}: --resume expected the same settings, "
                        f"found {'; '.join(changed)}; choose another --out")
    for file in predictions(out):        # what is appended must not continue a torn line
        os.truncate(file, file.read_bytes().rfind(b"\n") + 1)


# ---- the run -------------------------------------------------------------------------------------

def load_questions(args: argparse.Namespace) -> tuple[str, list[Question]]:
    """The benchmark's name, or "", and all its questions."""
    if not args.data:
        return "", world_questions(World(options=args.options), 0, "test", 0, args.n or 500)
    bad = []
    name, questions = benchmarks.load(args.data, bad)
    if args.check or args.skip_bad:
        questions = check_pictures(questions, bad, whole=args.skip_bad)
    if bad and not args.skip_bad:
        raise DataError(listed(bad))
    if bad and shard.rank() == 0:
        print(f"--skip_bad: {len(bad)} questions are left out:\n{listed(bad)}")
    if not questions:
        raise DataError(f"{args.data}: no questions")
    return name, questions


def final_answer(trajectory: Trajectory, no_tools: bool = False) -> str | None:
    """What is scored when no <answer> was closed. To a benchmark's question it is the whole last
    turn, as the references read it. Without tools it is what follows the thought: a model that
    never learnt to write tags may just say "B". Else it is nothing."""
    if trajectory.answer is not None:
        return trajectory.answer
    if trajectory.question.meta:
        return trajectory.turns[-1].text
    if no_tools:
        rest = trajectory.turns[-1].text.rsplit("</think>", 1)[-1]
        return rest.strip().removeprefix("<answer>")
    return None


def base_of(model: str) -> str:
    """The frozen model that scored this one in training, as train.py notes; else the model."""
    note = Path(model) / "train.json"
    return json.loads(note.read_text(encoding="utf-8"))["model"] if note.is_file() else model


def load_scorer(args: argparse.Namespace, policy: Policy, questions: list[Question]) -> Scorer:
    """Its reference crops are of --data, or of the world. Raises ValueError if the encoder has
    another vision tower than the policy, whose features of the crops it scores."""
    encoder = policy
    if args.encoder != args.model:
        encoder = Policy(args.encoder, policy.device, policy.model.dtype)
        if not same_eyes(policy, encoder):
            raise ValueError(f"--encoder {args.encoder}: expected the vision tower of {args.model},"
                             f" found another; use --encoder none, or --encoder {args.model}")
    return Scorer(encoder, questions[:64] if args.data else None)


def same_eyes(a: Policy, b: Policy) -> bool:
    """Do both have the same vision tower, and the same size of crops?"""
    one, other = (list(policy.model.model.visual.parameters()) for policy in (a, b))
    equal = len(one) == len(other) and all(torch.equal(x, y) for x, y in zip(one, other))
    return equal and a.resolution == b.resolution


def ask(args: argparse.Namespace, policy: Policy, scorer: Scorer | None, questions: list[Question],
        out: Path) -> None:
    """This rank's batches. A batch and its seed do not depend on the number of ranks, so neither
    does the table. A batch of which answers are missing is asked whole: its draws are the same."""
    done, rank = read_predictions(out), shard.rank()
    starts = range(rank * args.batch, len(questions), shard.ranks() * args.batch)
    for start in tqdm(starts, disable=rank > 0 or not sys.stderr.isatty(), unit="batch"):
        numbers = range(start, min(start + args.batch, len(questions)))
        if all(n in done for n in numbers):
            continue
        part = evaluate(policy, [questions[n] for n in numbers], scorer, args.temperature,
                        args.seed + start, args.max_turns, args.max_tokens, args.batch)
        for trajectory in part:
            trajectory.answer = final_answer(trajectory, args.no_tools)
        if args.films and start == 0:
            strips = [film_strip(trajectory) for trajectory in part[:args.films]]
            stack(strips).save(out / "films.png")
        append(out / f"predictions-{rank}.jsonl",
               [{"n": n, **record(t)} for n, t in zip(numbers, part) if n not in done])


def run(args: argparse.Namespace) -> None:
    # a fast process waits for the slowest, however long that takes
    device = shard.setup(args.device, timeout=30 * 86400)
    with shard.together():
        name, every = load_questions(args)
        questions, named = every[:args.n], Path(args.model)
        # from here on, args say what is really used
        args.model = str(newest(named))
        args.batch = args.batch or (8 if name else 64)
        policy = Policy(args.model, device, getattr(torch, args.dtype), args.coordinates)
        if args.no_tools:
            args.encoder, args.max_turns = "none", 1
            # a model that was trained without a system prompt keeps none
            policy.system_prompt = policy.system_prompt and NO_TOOLS_PROMPT
        args.encoder = args.encoder or base_of(args.model)
        scorer = None if args.encoder == "none" else load_scorer(args, policy, every)
        out = Path(args.out) if args.resume else free_folder(Path(args.out))
        settings = {key: value for key, value in vars(args).items() if key not in FREE}
    with shard.together():
        if shard.rank() == 0:
            if Path(args.model) != named:
                print(f"judging {args.model}, the newest weights of {named}")
            if out != Path(args.out):
                print(f"{args.out} holds predictions; this run's are in {out}")
            out.mkdir(parents=True, exist_ok=True)
            lock(out)               # before anything in it is touched
            prepare(out, settings)
    with shard.together():
        ask(args, policy, scorer, questions, out)
    if shard.rank() == 0:
        saved = read_predictions(out)
        trajectories = [restore(saved[n], question) for n, question in enumerate(questions)]
        rows = summary(trajectories, questions)
        print(benchmark_table(name, trajectories) if name else table(rows))
        print(histogram(trajectories))
        moment = "evaluated greedy" if args.temperature == 0 else "evaluated sampled"
        results = {moment: {**rows["all"], "categories": rows}}
        (out / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
        films = f", {out}/films.png" if (out / "films.png").is_file() else ""
        print(f"saved {out}/predictions-*.jsonl{films}; look at it: {write_page([out])}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", default="tiny", help="a model directory, or a run of train.py")
    add("--data", help="a benchmark's file or a .jsonl; default: the world's held-out questions")
    add("--check", action="store_true", help="first open each picture of --data: its header")
    add("--skip_bad", action="store_true",
        help="first decode each picture of --data; leave bad questions out, and say which")
    add("--n", type=int, help="only the first n questions; default: 500 of the world, else all")
    add("--options", type=int, default=4, help="of the world's mark questions, 0 or 2 to 8")
    add("--temperature", type=float, default=0., help="0 is greedy")
    add("--max_turns", type=int, default=4)
    add("--max_tokens", type=int, default=64, help="per turn; larger models need a few hundred")
    add("--batch", type=int, help="questions asked side by side; default: 64, benchmarks 8")
    add("--seed", type=int, default=0, help="of sampling")
    add("--no_tools", action="store_true", help="one turn, and no word of tools")
    add("--encoder", help="model that scores the looks, or none; default: the frozen base model")
    add("--films", type=int, default=4, help="film strips of the first questions")
    add("--out", default="runs/eval", help="folder for predictions and film strips")
    add("--resume", action="store_true", help="keep the predictions in --out, ask only the rest")
    add("--device", default="cpu", help="cpu or cuda")
    add("--dtype", default="float32", choices=["float32", "bfloat16"])
    add("--coordinates", choices=["pixels", "1000"],
        help="of boxes: pixels of the seen image, or thousandths; default: the model's")
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
        sys.exit("\neval.py: stopped; the same command with --resume asks the rest")
    except (DataError, OSError, ValueError, shard.RankFailed) as error:
        sys.exit(f"eval.py: {shard.named(error)}")
    finally:
        shard.cleanup()


if __name__ == "__main__":
    main()
