"""What a run's folder holds, as a person reads it: bounded, checked, in a few plain dicts.

What it teaches: a trajectory is hostile input for a reader, too. What a model wrote may be endless,
or hold what a terminal or a browser would obey; a file may be torn, or hold anything. So every text
is cut here, every number is checked, and only known fields go on.

    metrics.jsonl       -> curves
    results.json        -> rows of the table before and after
    trajectories.jsonl  -> views: what training sampled, three a step
    watched.jsonl       -> views: the same held-out questions at several steps

Run it:  python show.py --text runs/mapo --step 20     # views as text
"""
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from lib.checkpoint import newest

LONG, SHORT = 2000, 200         # characters that are kept of a turn, and of any other text
MAX_TURNS, MAX_CHOICES, MAX_ROWS = 12, 26, 400
MAX_TRAJECTORIES = 150          # of all runs together, beside the watched ones
MAX_STEPS, MAX_WATCHED = 20, 8  # of the watched questions
MAX_POINTS = 500                # of a curve; longer ones are averaged
CURVES = ("accuracy", "hit", "gap", "lucky", "semantic", "calls", "entropy", "signal_groups")
COLUMNS = ("n", "accuracy", "hit", "gap", "lucky", "calls", "semantic")
OWN = {"out", "resume", "quiet"}                    # settings that say nothing about learning


# ---- a folder -> a dict --------------------------------------------------------------------------

def read_run(folder: Path, share: int = 1) -> dict:
    """What the page shows of the folder of a run, or of an evaluation; it may be unfinished.

    share: among how many runs the page's trajectories are divided. Raises FileNotFoundError if
    the folder holds neither."""
    limit = MAX_TRAJECTORIES // share
    stories, unseen = read_evenly(limit, folder / "trajectories.jsonl")
    predictions, more = read_evenly(limit, *sorted(folder.glob("predictions-*.jsonl")))
    metrics = [{name: line.get(name) for name in ("step", *CURVES)}
               for line in read_lines(folder / "metrics.jsonl")]
    if not metrics and not predictions:
        raise FileNotFoundError(f"{folder}: expected the folder of a run of train.py or eval.py; "
                                "found neither metrics.jsonl nor predictions-*.jsonl")
    settings = read_settings(folder)
    watched = [view(saved, "held out")
               for saved in some_steps(list(read_lines(folder / "watched.jsonl")))]
    kept = [view(saved, "training") for saved in stories]
    kept += [view(saved, "held out") for saved in predictions]
    shown = {text(name, SHORT): text(value, SHORT) for name, value in list(settings.items())[:100]
             if name not in OWN}
    steps, curves = read_curves(metrics)
    return {"name": text(folder.resolve().name, SHORT), "steps": steps, "curves": curves,
            "planned": number(settings.get("steps")), "settings": shown,
            "results": read_results(folder), "watched": watched, "trajectories": kept,
            "left_out": unseen + more}


def read_lines(*files: Path) -> Iterator[dict]:
    """The objects of .jsonl files. A line that a kill has torn is left out."""
    return filter(None, map(parse, raw_lines(*files)))


def raw_lines(*files: Path) -> Iterator[bytes]:
    """Lines that look like objects, one by one: training reads the files of a long run, too, and
    must not hold them."""
    for file in files:
        if file.is_file():
            with file.open("rb") as lines:
                for line in map(bytes.strip, lines):
                    if line.startswith(b"{") and line.endswith(b"}"):
                        yield line


def read_evenly(limit: int, *files: Path) -> tuple[list[dict], int]:
    """At most `limit` objects, evenly spaced, and how many are left out."""
    count = sum(1 for _ in raw_lines(*files))
    places = set(evenly(range(count), limit))
    kept = [parse(line) for i, line in enumerate(raw_lines(*files)) if i in places]
    kept = [saved for saved in kept if saved]
    return kept, count - len(kept)


def parse(line: bytes | str) -> dict:
    try:
        saved = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return saved if isinstance(saved, dict) else {}


def read_settings(folder: Path) -> dict:
    """What a run was started with: train.py saves it beside the model, eval.py in the folder."""
    for file in (newest(folder) / "train.json", folder / "settings.json"):
        if file.is_file():
            return parse(file.read_bytes())
    return {}


def read_curves(metrics: list[dict]) -> tuple[list, dict[str, list]]:
    """Steps, and the curves by name. Of very long runs each point is the mean of some steps."""
    width = math.ceil(len(metrics) / MAX_POINTS) or 1
    parts = [metrics[start:start + width] for start in range(0, len(metrics), width)]
    steps = [number(part[-1].get("step")) for part in parts]
    curves = {}
    for name in CURVES:
        points = [mean([number(line.get(name)) for line in part]) for part in parts]
        if any(point is not None for point in points):
            curves[name] = points
    return steps, curves


def mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(sum(known) / len(known), 4) if known else None


def read_results(folder: Path) -> list[dict]:
    """Rows of results.json: "before greedy" -> when and how, and of each category the measures."""
    file, rows = folder / "results.json", []
    saved = parse(file.read_bytes()) if file.is_file() else {}
    for title, found in saved.items():
        categories = found.get("categories") if isinstance(found, dict) else None
        if not isinstance(categories, dict):
            continue
        when, _, how = text(title, SHORT).partition(" ")
        for category, measures in categories.items():
            if isinstance(measures, dict):
                values = {name: number(measures.get(name)) for name in COLUMNS}
                rows.append({"when": when, "how": how, "category": text(category, SHORT), **values})
    return rows[:MAX_ROWS]


def evenly(items: Sequence, count: int) -> Sequence:
    """At most `count` of the items, evenly spaced, the first and the last among them."""
    if len(items) <= count:
        return items
    return [items[i * (len(items) - 1) // max(count - 1, 1)] for i in range(count)]


def some_steps(watched: list[dict]) -> list[dict]:
    """The lines of at most MAX_STEPS steps, and of these at most MAX_WATCHED each."""
    steps = {}
    for saved in watched:
        steps.setdefault(str(saved.get("step")), []).append(saved)
    kept = []
    for lines in evenly(list(steps.values()), MAX_STEPS):
        kept += lines[:MAX_WATCHED]
    return kept


# ---- a saved trajectory -> its view --------------------------------------------------------------

def view(saved: dict, source: str) -> dict:
    """A record of eval.py as the page shows it: known fields alone, bounded, of the right kind.

    Its `calls` are what the crops are cut again from (lib/page.py)."""
    advantages = listed(saved.get("advantage"))
    turns, calls = [], []
    for turn in listed(saved.get("turns"))[:MAX_TURNS]:
        if isinstance(turn, dict):
            looked = turn.get("tool") is not None
            advantage = advantages[len(turns)] if len(turns) < len(advantages) else None
            turns.append({"text": text(turn.get("text"), LONG), "look": looked,
                          "label": text(turn.get("label"), SHORT), "box": box(turn.get("box")),
                          "score": number(turn.get("score")), "advantage": number(advantage),
                          "astray": flag(turn.get("astray")), "error": text(turn.get("error"), 60),
                          "message": text(turn.get("message"), SHORT)})
            calls.append((turn.get("tool"), turn.get("arguments"), turn.get("crop")))
    correct, hit = bool(number(saved.get("correct"))), flag(saved.get("hit"))
    return {"source": source, "step": number(saved.get("step")), "id": text(saved.get("id"), SHORT),
            "category": text(saved.get("category"), 60),
            "question": text(saved.get("question"), LONG),
            "choices": [text(c, SHORT) for c in listed(saved.get("choices"))[:MAX_CHOICES]],
            "right": text(saved.get("right"), SHORT), "answer": text(saved.get("answer"), SHORT),
            "end": text(saved.get("end"), 60), "correct": correct, "hit": hit,
            "lucky": correct and hit is False, "gap": any(turn["astray"] for turn in turns),
            "error": any(turn["error"] for turn in turns),
            "seen": pair(saved.get("seen"), 4096), "space": pair(saved.get("space"), 100_000),
            "turns": turns, "calls": calls}


def text(value: object, limit: int) -> str:
    """The value as text without what a terminal obeys, cut after `limit` characters."""
    whole = "" if value is None else str(value)
    cut = whole[:limit].encode("utf-8", "replace").decode("utf-8")       # no half surrogates
    cut = "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in cut)
    return cut if len(whole) <= limit else f"{cut} … ({len(whole):,} characters)"


def number(value: object) -> float | None:
    """A finite number, else None."""
    if type(value) not in (int, float, bool) or not abs(value) <= 1e9:
        return None
    return round(value, 4)


def flag(value: object) -> bool | None:
    return value if isinstance(value, bool) else None


def listed(value: object) -> list:
    return value if isinstance(value, list) else []


def box(value: object) -> list[float] | None:
    """Four finite numbers [x1, y1, x2, y2], else None."""
    sides = [number(side) for side in listed(value)]
    return sides if len(sides) == 4 and None not in sides else None


def pair(value: object, largest: int) -> tuple[int, int] | None:
    """(width, height), whole and from 1 to `largest`, else None."""
    sides = [number(side) for side in listed(value)]
    fits = len(sides) == 2 and all(side and 1 <= side <= largest for side in sides)
    return (int(sides[0]), int(sides[1])) if fits else None

# ---- a view as text ------------------------------------------------------------------------------

def tell(folder: Path, step: int) -> str:
    """The trajectories of a step. Raises FileNotFoundError if there are none."""
    parts, steps = [], set()
    for name, source in (("trajectories", "training"), ("watched", "held out")):
        for saved in read_lines(folder / f"{name}.jsonl"):
            steps.add(number(saved.get("step")))
            if saved.get("step") == step:
                parts.append(tell_one(view(saved, source)))
    if not parts:
        known = sorted(value for value in steps if value is not None)
        found = f"steps {known[0]} to {known[-1]}" if known else "no trajectories.jsonl"
        raise FileNotFoundError(f"{folder}: expected trajectories of step {step}; found {found}")
    return "\n\n".join(parts)


def tell_one(view: dict) -> str:
    options = "  ".join(f"({chr(65 + i)}) {choice}" for i, choice in enumerate(view["choices"]))
    lines = [f"{view['source']}, {view['id']}, {view['category']}",
             f"{view['question']}  {options}".rstrip()]
    for i, turn in enumerate(view["turns"], 1):
        paid = "" if turn["advantage"] is None else f", advantage {turn['advantage']:+.2f}"
        lines.append(f"  turn {i}{paid}: {turn['text']}")
        if turn["look"]:
            score = "" if turn["score"] is None else f", score {turn['score']:.2f}"
            gap = "; the crop does not hold it" if turn["astray"] else ""
            lines.append(f"    -> crop of “{turn['label']}”{score}{gap}")
        if turn["error"]:
            lines.append(f"    -> {turn['error']}: {turn['message']}")
    luck = ", by luck: evidence was not shown, or not close enough to read" if view["lucky"] else ""
    verdict = f"right{luck}" if view["correct"] else f"wrong, right is {view['right']}"
    return "\n".join([*lines, f"  answer: {view['answer'] or view['end']}: {verdict}"])


def closing(folder: Path) -> str:
    """A finished run in a few lines: what training changed, and where things lie."""
    rows = [row for row in read_results(folder) if row["category"] == "all"]
    found = {(row["when"], row["how"]): row for row in rows}
    lines = [f"\n{folder}"]
    if rows:
        lines.append(f"  {rows[0]['n']:.0f} held-out questions".ljust(26) + f"{'greedy':28}sampled")
        for name in ("accuracy", "hit", "gap", "calls", "semantic"):
            greedy, sampled = (change(found, how, name) for how in ("greedy", "sampled"))
            lines.append(f"    {name:22}{greedy:28}{sampled}")
    places = {"look at it": "page.html", "films before, after": "films.png",
              "the model": newest(folder).name, "the numbers": "metrics.jsonl"}
    lines += [f"  {what:24}{folder / name}" for what, name in places.items()
              if (folder / name).exists()]
    return "\n".join(lines)


def change(found: dict, how: str, name: str) -> str:
    """Before -> after, and the difference; "-" where nothing is known."""
    before, after = (found.get((when, how), {}).get(name) for when in ("before", "after"))
    if before is None or after is None:
        return "-"
    return f"{before:.3f} -> {after:.3f} ({after - before:+.3f})"
