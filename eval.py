"""Evaluate an agent: accuracy per category with 95% intervals, what it looked at, and film strips to see it.

What it teaches: accuracy alone cannot tell an agent that looks from one that guesses. Beside it stand `hit` (all the
evidence was shown), `gap` (looks whose crop does not hold what the label names), `lucky` (right answers without a
hit) and the histogram of answers (a model that always says A shows).

Run it:  python eval.py --model runs/mapo                       # the embedded world's held-out questions
         python eval.py --model tiny --data questions.jsonl     # your own; see data.py for the fields
"""
import argparse
import json
import math
import sys
from collections import Counter
from pathlib import Path

import torch
from tqdm import tqdm

from data import DataError, Question, World, read_jsonl, world_questions
from policy import Policy
from reward import Scorer, choose, measure, outcome, score
from rollout import Trajectory, collect, film_strip, stack

COLUMNS = ("accuracy", "calls", "valid", "hit", "gap", "lucky", "semantic")


def wilson(right: float, n: int) -> tuple[float, float]:
    """95% interval of a share from `right` successes in `n` trials (Wilson 1927)."""
    if n == 0:
        return 0.0, 1.0
    z, p = 1.959964, right / n
    centre, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (centre - spread) / (1 + z * z / n), (centre + spread) / (1 + z * z / n)


def evaluate(policy: Policy, questions: list[Question], scorer: Scorer | None = None, temperature: float = 0.,
             seed: int = 0, max_turns: int = 4, max_tokens: int = 64, batch: int = 64, quiet: bool = True) -> list[Trajectory]:
    """One trajectory per question, in order; images are open only while their batch runs. temperature 0 is greedy."""
    generator, trajectories = torch.Generator(policy.device).manual_seed(seed), []
    for start in tqdm(range(0, len(questions), batch), disable=quiet, unit="batch"):
        part = collect(policy, questions[start:start + batch], 1, max_turns, max_tokens, temperature, generator)
        if scorer:
            score(part, scorer)
        for trajectory in part:  # numbers and crops stay, features go
            trajectory.tokens.features = []
            for turn in trajectory.turns:
                turn.crop_tokens = None
        trajectories += part
    return trajectories


def table(trajectories: list[Trajectory]) -> str:
    """One row a category and one for all: n, accuracy with its interval, and the measures of reward.measure."""
    cell = lambda value: "     -" if value is None else f"{value:6.2f}"
    lines = [f"{'':20}{'n':>5}  accuracy (95% interval) " + "".join(f"{c:>9}" for c in COLUMNS[1:])]
    categories = sorted({t.question.category for t in trajectories})
    for category in ([*categories, "all"] if len(categories) > 1 else ["all"]):
        part = [t for t in trajectories if category in ("all", t.question.category)]
        m = measure(part)
        low, high = wilson(m["accuracy"] * len(part), len(part))
        lines.append(f"{category or '(none)':20}{len(part):5}  {m['accuracy']:6.3f} ({low:.3f} .. {high:.3f}) "
                     + "".join(f"   {cell(m[c])}" for c in COLUMNS[1:]))
    return "\n".join(lines)


def histogram(trajectories: list[Trajectory]) -> str:
    """How often each option letter was answered, and was right."""
    letters = lambda pairs: Counter("-" if c is None else chr(65 + c) for c in pairs)
    asked = [t for t in trajectories if t.question.choices]
    said = letters(choose(t.answer or "", t.question.choices) for t in asked)
    true = letters(choose(t.question.answer, t.question.choices) for t in asked)
    return "answers: " + "  ".join(f"{k} {said[k]} (right {true[k]})" for k in sorted(set(said) | set(true)))


def record(trajectory: Trajectory) -> dict:
    """A trajectory as one JSON object, for a .jsonl file."""
    return {"id": trajectory.question.id, "question": trajectory.question.text, "choices": trajectory.question.choices,
            "right": trajectory.question.answer, "answer": trajectory.answer, "end": trajectory.end,
            "correct": outcome(trajectory.question, trajectory.answer),
            "turns": [{"text": turn.text, "box": turn.box, "label": turn.call and turn.call.label, "score": turn.score,
                       "error": turn.error} for turn in trajectory.turns]}


def base_of(model: str) -> str:
    """The frozen model that scored this one in training (train.py notes it), or the model itself."""
    note = Path(model) / "train.json"
    return json.loads(note.read_text())["model"] if note.is_file() else model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="tiny", help="a model directory")
    parser.add_argument("--data", help="a .jsonl file; without it, held-out questions of the embedded world")
    parser.add_argument("--n", type=int, help="how many questions; default: 500 of the world, all of --data")
    parser.add_argument("--options", type=int, default=4, help="options of the world's mark questions, 0 or 2 to 8")
    parser.add_argument("--temperature", type=float, default=0., help="0 is greedy")
    parser.add_argument("--max_turns", type=int, default=4)
    parser.add_argument("--max_tokens", type=int, default=64, help="per turn")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0, help="of sampling")
    parser.add_argument("--encoder", help="model directory that scores the looks (default: the base model)")
    parser.add_argument("--films", type=int, default=4, help="save this many film strips")
    parser.add_argument("--out", default="runs/eval", help="folder for film strips and predictions.jsonl")
    args = parser.parse_args()
    torch.set_num_threads(1)
    try:
        if args.data:
            questions = list(read_jsonl(args.data))[:args.n]
        else:
            questions = world_questions(World(options=args.options), 0, "test", 0, 500 if args.n is None else args.n)
        if not questions:
            raise DataError(f"{args.data or '--n'}: no questions")
        policy, encoder = Policy(args.model), Policy(args.encoder or base_of(args.model))
        scorer = Scorer(encoder, questions[:64])
        trajectories = evaluate(policy, questions, scorer, args.temperature, args.seed, args.max_turns, args.max_tokens,
                                args.batch, quiet=not sys.stderr.isatty())
    except (DataError, OSError, ValueError) as error:
        sys.exit(f"eval.py: {error}")
    print(table(trajectories))
    print(histogram(trajectories))
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    with (out / "predictions.jsonl").open("w", encoding="utf-8") as file:
        for trajectory in trajectories:
            file.write(json.dumps(record(trajectory)) + "\n")
    if args.films:
        stack([film_strip(t) for t in trajectories[:args.films]]).save(out / "films.png")
    print(f"saved {out}/predictions.jsonl" + (f" and {out}/films.png" if args.films else ""))


if __name__ == "__main__":
    main()
