"""Evaluate an agent: accuracy per category with 95% intervals, what it looked at, and film strips to see it.

What it teaches: accuracy alone cannot tell an agent that looks from one that guesses. Beside it stand `hit` (all the
evidence was shown), `gap` (looks whose crop does not hold what the label names), `lucky` (right answers without a
hit), the histogram of answers (a model that always says A shows), and `--no_tools`: the same questions without a look.

Run it:  python eval.py --model runs/mapo                       # the embedded world's held-out questions
         python eval.py --model tiny --data questions.jsonl     # your own; see data.py for the fields
         python eval.py --model DIR --data VStarBench.tsv --max_turns 6 --max_tokens 512 --device cuda --dtype bfloat16
         torchrun --nproc-per-node 2 -- eval.py --model DIR --data hr_bench_4k.tsv  # each process asks every second question

Predictions are written batch by batch, so that a killed run goes on with `--resume` and ends at the same table.
"""
import argparse
import hashlib
import itertools
import json
import math
import sys
from collections import Counter
from pathlib import Path
from typing import Callable

import torch
from tqdm import tqdm

from lib import benchmarks
from lib import shard
from lib.data import DataError, Question
from tiny.world import World, world_questions
from lib.policy import Policy, Tokens
from reward import Scorer, answerable, measure, outcome, score
from rollout import Trajectory, Turn, collect
from show import film_strip, stack
from tools import MAX_ANSWER_CHARS, Call, zoom

COLUMNS = ("accuracy", "calls", "valid", "hit", "gap", "lucky", "semantic")
NO_TOOLS_PROMPT = """You are a careful visual agent.

Think first, then finish with the letter or the text of your answer:
<think>The sign says 42.</think><answer>42</answer>"""


def wilson(right: float, n: float) -> tuple[float, float]:
    """95% interval of a share from `right` successes in `n` trials (Wilson 1927)."""
    if n == 0:
        return 0.0, 1.0
    z, p = 1.959964, right / n
    centre, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max((centre - spread) / (1 + z * z / n), 0.), min((centre + spread) / (1 + z * z / n), 1.)


def evaluate(policy: Policy, questions: list[Question], scorer: Scorer | None = None, temperature: float = 0.,
             seed: int = 0, max_turns: int = 4, max_tokens: int = 64, batch: int = 64, quiet: bool = True) -> list[Trajectory]:
    """One trajectory per question, in order; images are open only while their batch runs. temperature 0 is greedy."""
    generator, trajectories = torch.Generator(policy.device).manual_seed(seed), []
    for start in tqdm(range(0, len(questions), batch), disable=quiet, unit="batch"):
        part = collect(policy, questions[start:start + batch], 1, max_turns, max_tokens, temperature, generator)
        if scorer:
            score(part, scorer)
        for trajectory in part:  # numbers and crops stay, features go
            for tokens in (trajectory.prompt, trajectory.tokens):
                tokens.features = tokens.patches = []
            for turn in trajectory.turns:
                turn.crop_tokens = None
        trajectories += part
    return trajectories


# ---- what it says ------------------------------------------------------------------------------------------------------

def summary(trajectories: list[Trajectory], questions: list[Question], total: Callable[[float], float] = lambda x: x) -> dict[str, dict]:
    """Measures (reward.measure) with n, of each category of `questions` and of "all"; over all ranks, if `total` sums over them."""
    categories, result = sorted({q.category for q in questions}), {}
    for category in ([*categories, "all"] if len(categories) > 1 else ["all"]):
        part = [t for t in trajectories if category in ("all", t.question.category)]
        result[category] = {"n": int(total(len(part))), **measure(part, total)}
    return result


def table(rows: dict[str, dict]) -> str:
    """A `summary` as text: one row a category and one for all, accuracy with its 95% interval."""
    cell = lambda value: "     -" if value is None else f"{value:6.2f}"
    lines = [f"{'':20}{'n':>5}  accuracy (95% interval) " + "".join(f"{c:>9}" for c in COLUMNS[1:])]
    for category, m in rows.items():
        low, high = wilson(m["accuracy"] * m["n"], m["n"])
        lines.append(f"{category or '(none)':20}{m['n']:5}  {m['accuracy']:6.3f} ({low:.3f} .. {high:.3f}) "
                     + "".join(f"   {cell(m[c])}" for c in COLUMNS[1:]))
    return "\n".join(lines)


def benchmark_table(name: str, trajectories: list[Trajectory]) -> str:
    """The benchmark's own rows, and how the agent used its tool."""
    lines = [f"{name:36}{'n':>5}  accuracy (95% interval)"]
    results = [(t.question, benchmarks.correct(t.question, t.answer)) for t in trajectories]
    for label, accuracy, n, trials in benchmarks.scores(name, results):
        low, high = wilson(accuracy * trials, trials)
        lines.append(f"{label:36}{n:5}  {accuracy:6.3f} ({low:.3f} .. {high:.3f})")
    m = measure(trajectories)
    semantic = "" if m["semantic"] is None else f", semantic {m['semantic']:.2f}"
    return "\n".join([*lines, f"calls per question {m['calls']:.2f}, valid turns {m['valid']:.2f}{semantic}"])


def histogram(trajectories: list[Trajectory]) -> str:
    """How often each option letter was answered, and was right; "-" is no answer, or no option."""
    letters = lambda pairs: Counter("-" if c is None else chr(65 + c) for c in pairs)
    asked = [t for t in trajectories if t.question.choices]
    said = letters(benchmarks.chosen(t.question, t.answer) for t in asked)
    true = letters(benchmarks.chosen(t.question, t.question.answer) for t in asked)
    return "answers: " + "  ".join(f"{k} {said[k]} (right {true[k]})" for k in sorted(set(said) | set(true)))


# ---- trajectories on disk ----------------------------------------------------------------------------------------------

def record(trajectory: Trajectory) -> dict:
    """A trajectory as one JSON object, for a .jsonl file."""
    question = trajectory.question
    right = benchmarks.correct if question.meta else outcome
    return {"id": question.id, "question": question.text, "choices": question.choices, "right": question.answer,
            "answer": trajectory.answer, "end": trajectory.end, "correct": float(right(question, trajectory.answer)),
            "seen": trajectory.seen, "space": trajectory.space,
            "turns": [{"text": turn.text, "box": turn.box, "bbox": turn.call and turn.call.bbox, "label": turn.call and turn.call.label,
                       "score": turn.score, "error": turn.error} for turn in trajectory.turns]}


def restore(saved: dict, question: Question) -> Trajectory:
    """The trajectory of a `record`: what was said, done and scored, without tokens and pixels."""
    turns = [Turn(turn["text"], slice(0, 0), turn["bbox"] and Call(turn["label"], tuple(turn["bbox"])), turn["box"] and tuple(turn["box"]),
                  error=turn["error"], score=turn["score"]) for turn in saved["turns"]]
    return Trajectory(question, Tokens([]), Tokens([]), [], [], tuple(saved["seen"]), tuple(saved["space"]), turns, saved["answer"], saved["end"])


def merge(out: Path, write: bool = True) -> dict[int, dict]:
    """All predictions of the folder, by the question's place; `write` makes them one predictions.jsonl, in order."""
    found, files = {}, sorted(out.glob("predictions*.jsonl"))
    for line in (line for file in files for line in file.read_bytes().splitlines()):
        try:
            saved = json.loads(line)
        except ValueError:  # cut short by a kill: the question is asked again
            continue
        found[saved["n"]] = saved
    found = dict(sorted(found.items()))
    if write:  # aside first, then renamed: a kill in between loses nothing
        (out / "merging").write_text("".join(json.dumps(saved) + "\n" for saved in found.values()), encoding="utf-8")
        (out / "merging").replace(out / "predictions.jsonl")
        for file in out.glob("predictions.rank*.jsonl"):
            file.unlink()
    return found


def differences(before: dict, now: dict) -> str:
    """Which of the settings `now` were others `before`, for the error of a --resume; empty if none."""
    return "; ".join(f"{key} {before.get(key)!r} there and {now[key]!r} now" for key in now if before.get(key) != now[key])


def prepare(out: Path, settings: dict, resume: bool) -> None:
    """The folder to predict into, with what it holds (`resume`) if that was made with the same settings, else without."""
    note, files = out / "settings.json", list(out.glob("predictions*.jsonl"))
    out.mkdir(parents=True, exist_ok=True)
    if resume and files:
        before = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else {}
        if changed := differences(before, settings):
            raise DataError(f"{note}: --resume expected the same settings, found {changed}; choose another --out")
        merge(out)
        return
    if files:  # somebody may have forgotten --resume
        aside = next(folder for i in itertools.count(1) if not (folder := out / f"previous-{i}").exists())
        aside.mkdir()
        for file in [*files, *([note] if note.is_file() else [])]:
            file.replace(aside / file.name)
    note.write_text(json.dumps(settings, indent=1), encoding="utf-8")


def fingerprint(*pieces: bytes) -> str:
    return hashlib.sha256(b"".join(hashlib.sha256(piece).digest() for piece in pieces)).hexdigest()[:16]


def weights_of(policy: Policy) -> str:
    """A fingerprint from some 256 numbers of every weight: another training step shows, and 7B take a second."""
    sample = lambda p: p.detach().flatten()[::max(1, p.numel() // 256)].float().cpu().numpy().tobytes()
    return fingerprint(*map(sample, policy.model.parameters()))


def same_eyes(a: Policy, b: Policy) -> bool:
    """Do both have the same vision tower, and the same size of crops?"""
    one, other = (list(p.model.model.visual.parameters()) for p in (a, b))
    return a.resolution == b.resolution and len(one) == len(other) and all(torch.equal(x, y) for x, y in zip(one, other))


# ---- the run -----------------------------------------------------------------------------------------------------------

def accept_plain(trajectories: list[Trajectory]) -> None:
    """Without tools, a model that never learnt to write tags may just say "B": a short last word is an answer, too."""
    for trajectory in trajectories:
        said = trajectory.turns[-1].text.rsplit("</think>", 1)[-1].strip()
        if trajectory.answer is None and 0 < len(said.split()) <= 20 and "<tool_call>" not in said:
            trajectory.answer, trajectory.end = said.removeprefix("<answer>").strip()[:MAX_ANSWER_CHARS], "plain"


def base_of(model: str) -> str:
    """The frozen model that scored this one in training (train.py notes it), or the model itself."""
    note = Path(model) / "train.json"
    return json.loads(note.read_text())["model"] if note.is_file() else model


def run(args: argparse.Namespace) -> None:
    device = shard.setup(args.device, timeout=30 * 86400)  # a fast process waits for the slowest, however long that takes
    rank, world, out, name = shard.rank(), shard.world(), Path(args.out), ""
    with shard.together():
        if args.data:
            name, questions = benchmarks.load(args.data)
            if not name:
                answerable(questions)
        else:
            questions = world_questions(World(options=args.options), 0, "test", 0, 500 if args.n is None else args.n)
        every, questions = questions, questions[:args.n]
        if not questions:
            raise DataError(f"{args.data or '--n'}: no questions")
        policy = Policy(args.model, device, getattr(torch, args.dtype), args.coordinates)
        base = args.encoder or base_of(args.model)
        settings = {key: getattr(args, key) for key in ("model", "data", "options", "temperature", "seed", "max_turns", "max_tokens",
                                                        "no_tools", "dtype", "coordinates")}
        settings |= {"encoder": base, "weights": weights_of(policy),
                     "questions": args.data and fingerprint(*(repr((q.prompt, q.answer)).encode() for q in every))}
        if rank == 0:
            prepare(out, settings, args.resume)
        scorer = None
        if base != "none" and not args.no_tools:
            encoder = policy if base == args.model else Policy(base, device, getattr(torch, args.dtype))
            scorer = Scorer(encoder, every[:64] if args.data else None, own_eyes=not same_eyes(policy, encoder))
        if args.no_tools:  # a model that was trained without a prompt keeps none
            policy.system_prompt = policy.system_prompt and NO_TOOLS_PROMPT
    with shard.together():  # everybody knows what is done before anybody writes
        done, batch = set(merge(out, write=False)), args.batch or (8 if name else 64)
    with shard.together():
        mine = range(rank, len(questions), world)
        with (out / ("predictions.jsonl" if world == 1 else f"predictions.rank{rank}.jsonl")).open("a", encoding="utf-8") as file:
            for start in tqdm(range(0, len(mine), batch), disable=rank > 0 or not sys.stderr.isatty(), unit="batch"):
                places = [n for n in mine[start:start + batch] if n not in done]
                if places:
                    part = evaluate(policy, [questions[n] for n in places], scorer, args.temperature, args.seed + places[0],
                                    1 if args.no_tools else args.max_turns, args.max_tokens, batch)
                    if args.no_tools:
                        accept_plain(part)
                    file.write("".join(json.dumps({"n": n, **record(t)}) + "\n" for n, t in zip(places, part)))
                    file.flush()
    if rank > 0:
        return
    trajectories = [restore(saved, questions[n]) for n, saved in merge(out).items() if n < len(questions)]
    print(benchmark_table(name, trajectories) if name else table(summary(trajectories, questions)))
    print(histogram(trajectories))
    if args.films:
        for trajectory in trajectories[:args.films]:
            image = trajectory.question.open()
            for turn in trajectory.looks:
                turn.crop = zoom(image, turn.call, trajectory.space, policy.resolution)[0]
        stack([film_strip(t) for t in trajectories[:args.films]]).save(out / "films.png")
    print(f"saved {out}/predictions.jsonl" + (f" and {out}/films.png" if args.films else ""))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="tiny", help="a model directory")
    parser.add_argument("--data", help="a benchmark's file (benchmarks.py) or a .jsonl file; without it, held-out questions of the world")
    parser.add_argument("--n", type=int, help="only the first n questions; default: 500 of the world, all of --data")
    parser.add_argument("--options", type=int, default=4, help="options of the world's mark questions, 0 or 2 to 8")
    parser.add_argument("--temperature", type=float, default=0., help="0 is greedy")
    parser.add_argument("--max_turns", type=int, default=4)
    parser.add_argument("--max_tokens", type=int, default=64, help="per turn; 64 suits tiny/, larger models think in a few hundred")
    parser.add_argument("--batch", type=int, help="questions side by side, whose images are open together; default: 64, benchmarks 8")
    parser.add_argument("--seed", type=int, default=0, help="of sampling")
    parser.add_argument("--no_tools", action="store_true", help="one turn and no word of tools: answer from the overview")
    parser.add_argument("--encoder", help="model directory that scores the looks (default: the base model), or none")
    parser.add_argument("--films", type=int, default=4, help="save this many film strips")
    parser.add_argument("--out", default="runs/eval", help="folder for film strips and predictions.jsonl")
    parser.add_argument("--resume", action="store_true", help="keep the predictions that --out holds, and ask only the rest")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--coordinates", choices=["pixels", "1000"], help="of boxes: pixels of the seen image, or thousandths of its sides;"
                        " default: what the model's directory says, else pixels")
    args = parser.parse_args()
    if min(args.max_turns, args.max_tokens, args.batch or 1) < 1 or args.temperature < 0:
        parser.error("--max_turns, --max_tokens, --batch must be at least 1, --temperature not below 0")
    torch.set_num_threads(1)
    try:
        run(args)
    except (DataError, OSError, ValueError, shard.RankFailed) as error:
        sys.exit(f"eval.py: {shard.named(error)}")
    finally:
        shard.cleanup()


if __name__ == "__main__":
    main()
