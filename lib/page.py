"""One self-contained HTML page of one or several runs: the folders of the runs -> page.html.

What it teaches: what a model wrote is hostile input for its reader, too. It may be endless, or hold
what a browser or a terminal would obey; and a file may be torn, or hold anything. Three steps:

1. Here every text is cut, every number is checked, and only known fields go on (`view`).
2. They stand in the page as JSON in which no tag can begin (`write`).
3. lib/page.html writes text as text, never as HTML, and its policy lets a browser run this one
   script and fetch nothing.

docs/run.md says what a run's files hold. Crops are not among them: a look is carried out again.

Run it:  python show.py runs/a runs/b        # writes runs/a/page.html
"""
import base64
import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

from lib.checkpoint import newest
from lib.data import DataError
from lib.question import Question
from tools import TOOLS, ToolError

TEMPLATE = Path(__file__).with_name("page.html")
LONG, SHORT = 2000, 200         # characters that are kept of a turn or question, of other texts
MAX_TURNS, MAX_CHOICES = 12, 26
MAX_TRAJECTORIES = 150          # of all runs together, beside the watched ones
MAX_STEPS, MAX_WATCHED = 20, 8  # of the watched questions
MAX_POINTS = 500                # of a curve
MAX_ROWS = 400                  # of results.json, and of settings
OVERVIEW, CROP = 320, 144       # longer side of a picture in pixels, at most
CURVES = ("accuracy", "hit", "gap", "lucky", "semantic", "calls", "entropy", "signal_groups")
COLUMNS = ("n", "accuracy", "hit", "gap", "lucky", "calls", "semantic")
OWN = {"out", "resume", "quiet"}                    # settings that say nothing about learning


# ---- values that can be trusted ------------------------------------------------------------------

def text(value: object, limit: int = SHORT) -> str:
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


def as_list(value: object) -> list:
    return value if isinstance(value, list) else []


def as_dict(value: object) -> dict:
    return value if isinstance(value, dict) else {}


# ---- a run's folder ------------------------------------------------------------------------------

def read_run(folder: Path, share: int = 1) -> dict:
    """What the folder of a run, or of an evaluation, holds; it may be unfinished. All is bounded
    but the lines of "watched" and "trajectories", which are for `view`.

    share: among how many runs the page's trajectories are divided. Raises FileNotFoundError if
    the folder holds no run."""
    metrics, _ = read_evenly([folder / "metrics.jsonl"], MAX_POINTS)
    metrics = [line for line in metrics if number(line.get("step")) is not None]
    files = [folder / "trajectories.jsonl", *sorted(folder.glob("predictions-*.jsonl"))]
    trajectories, left_out = read_evenly(files, MAX_TRAJECTORIES // share)
    if not metrics and not trajectories:
        raise FileNotFoundError(f"{folder}: expected the folder of a run of train.py or eval.py; "
                                "found neither metrics.jsonl nor predictions-*.jsonl")
    settings = read_settings(folder)
    curves = {name: [number(line.get(name)) for line in metrics] for name in CURVES}
    known = [name for name in CURVES if any(point is not None for point in curves[name])]
    return {
        "name": text(folder.resolve().name),
        "planned": number(settings.get("steps")),
        "settings": {text(name): text(value)
                     for name, value in list(settings.items())[:MAX_ROWS] if name not in OWN},
        "results": read_results(folder),
        "steps": [number(line["step"]) for line in metrics],
        "curves": {name: curves[name] for name in known},
        "watched": read_watched(folder),
        "trajectories": trajectories,
        "left_out": left_out,
    }


def raw_lines(files: Sequence[Path]) -> Iterator[bytes]:
    """Line by line: training writes a page, too, and must not hold the files of a long run."""
    for file in files:
        if file.is_file():
            with file.open("rb") as lines:
                yield from lines


def parse(line: bytes) -> dict:
    """The object of a line; empty if a kill has torn the line, or it holds something else."""
    try:
        return as_dict(json.loads(line))
    except (ValueError, RecursionError):
        return {}


def read_evenly(files: Sequence[Path], limit: int) -> tuple[list[dict], int]:
    """At most `limit` objects of .jsonl files, evenly spaced, and how many are left out."""
    count = sum(1 for _ in raw_lines(files))
    places = set(evenly(range(count), limit))
    kept = [parse(line) for i, line in enumerate(raw_lines(files)) if i in places]
    kept = [saved for saved in kept if saved]
    return kept, count - len(kept)


def evenly(items: Sequence, count: int) -> Sequence:
    """At most `count` of the items, evenly spaced, the first and the last among them."""
    if len(items) <= count:
        return items
    return [items[i * (len(items) - 1) // max(count - 1, 1)] for i in range(count)]


def read_watched(folder: Path) -> list[dict]:
    """The lines of at most MAX_STEPS steps, and of these at most MAX_WATCHED each."""
    file = [folder / "watched.jsonl"]
    steps = dict.fromkeys(number(parse(line).get("step")) for line in raw_lines(file))   # in order
    steps.pop(None, None)
    kept = {step: [] for step in evenly(list(steps), MAX_STEPS)}
    for saved in map(parse, raw_lines(file)):
        lines = kept.get(number(saved.get("step")), [])
        if len(lines) < MAX_WATCHED:
            lines.append(saved)
    return [saved for lines in kept.values() for saved in lines]


def read_settings(folder: Path) -> dict:
    """What a run was started with: train.py saves it beside the model, eval.py in the folder."""
    for file in (newest(folder) / "train.json", folder / "settings.json"):
        if file.is_file():
            return parse(file.read_bytes())
    return {}


def read_results(folder: Path) -> list[dict]:
    """Rows of results.json: "before greedy" -> when and how, and of each category the measures."""
    file, rows = folder / "results.json", []
    saved = parse(file.read_bytes()) if file.is_file() else {}
    for title, found in saved.items():
        when, _, how = text(title).partition(" ")
        for category, measures in as_dict(as_dict(found).get("categories")).items():
            values = {name: number(as_dict(measures).get(name)) for name in COLUMNS}
            rows.append({"when": when, "how": how, "category": text(category), **values})
    return rows[:MAX_ROWS]


# ---- a saved trajectory -> its view --------------------------------------------------------------

def view(saved: dict) -> dict:
    """A record of eval.py as a person sees it."""
    turns, advantages = [], as_list(saved.get("advantage"))
    for i, turn in enumerate(saved_turns(saved)):
        turns.append({
            "text": text(turn.get("text"), LONG),
            "look": turn.get("tool") is not None,
            "label": text(turn.get("label")),
            "score": number(turn.get("score")),
            "advantage": number(advantages[i]) if i < len(advantages) else None,
            "astray": turn.get("astray") is True,
            "error": text(turn.get("error")),
            "message": text(turn.get("message")),
        })
    correct, hit = saved.get("correct") == 1, saved.get("hit")
    return {
        "step": number(saved.get("step")),
        "id": text(saved.get("id")),
        "category": text(saved.get("category")),
        "question": text(saved.get("question"), LONG),
        "choices": [text(choice) for choice in as_list(saved.get("choices"))[:MAX_CHOICES]],
        "right": text(saved.get("right")),
        "answer": text(saved.get("answer")),
        "end": text(saved.get("end")),
        "correct": correct,
        "hit": hit if isinstance(hit, bool) else None,
        "lucky": correct and hit is False,
        "turns": turns,
    }


def saved_turns(saved: dict) -> list[dict]:
    turns = [turn for turn in as_list(saved.get("turns")) if isinstance(turn, dict)]
    return turns[:MAX_TURNS]


# ---- pictures ------------------------------------------------------------------------------------

def add_pictures(view: dict, saved: dict, question: Question, pictures: dict) -> None:
    """Give a view the names of its pictures, and its boxes. What cannot be drawn is left out."""
    try:
        place_pictures(view, saved, question, pictures)
    except (DataError, ToolError, OSError, MemoryError, ArithmeticError, AttributeError,
            LookupError, TypeError, ValueError):        # a file may hold anything
        return


def place_pictures(view: dict, saved: dict, question: Question, pictures: dict) -> None:
    image = question.open()
    view["evidence"] = [share(box, image.size) for box in question.boxes]
    view["picture"] = keep(coarse(image, saved["seen"], OVERVIEW), pictures)
    for turn, call in zip(view["turns"], saved_turns(saved)):
        if turn["look"]:
            crop, box = look_again(image, call, saved["space"])
            turn["crop"] = keep(coarse(crop, call["crop"], CROP), pictures)
            turn["place"] = share(box, image.size)


def look_again(image: Image.Image, turn: dict, space: tuple) -> tuple[Image.Image, tuple]:
    """The crop of a saved look, and its box in pixels of the image. It is checked like a new one:
    raises ToolError."""
    tool = TOOLS[turn["tool"]]
    return tool.run(image, tool.check(turn["arguments"], space), space)


def coarse(image: Image.Image, size: tuple[int, int], most: int) -> Image.Image:
    """The image as coarse as the agent saw it, in `size` (width, height), and each side at most
    `most` pixels long. Raises ValueError or TypeError if this is no size."""
    if not min(size) >= 1:
        raise ValueError(f"expected a width and a height, found {size}")
    scale = min(most / max(size), 1)
    width, height = (max(round(side * scale), 1) for side in size)
    return image.convert("RGB").resize((width, height), Image.BOX)


def keep(image: Image.Image, pictures: dict) -> str:
    """Put a picture among the page's. Its name comes from its bytes, so equal ones stand there
    once. Drawings are smaller as PNG, photographs as JPEG."""
    files = []
    for form, options in (("png", {"optimize": True}), ("jpeg", {"quality": 80})):
        file = io.BytesIO()
        image.save(file, form, **options)
        files.append((len(file.getvalue()), form, file.getvalue()))
    _, form, data = min(files)
    name = hashlib.sha256(data).hexdigest()[:16]
    uri = f"data:image/{form};base64,{base64.b64encode(data).decode()}"
    pictures[name] = {"uri": uri, "width": image.width, "height": image.height}
    return name


def share(box: tuple, size: tuple[int, int]) -> list[float]:
    """A box in pixels -> in shares of the image's width and height."""
    return [round(box[i] / size[i % 2], 4) for i in range(4)]


# ---- the page ------------------------------------------------------------------------------------

def write(runs: list[dict], pictures: dict, file: Path) -> None:
    """Fill the template. Written aside first: a browser that reloads never finds half a page."""
    data = json.dumps({"runs": runs, "pictures": pictures}, ensure_ascii=False, allow_nan=False)
    for sign in "<>&":                         # so no tag or comment can begin or end in the data
        data = data.replace(sign, f"\\u{ord(sign):04x}")
    page = TEMPLATE.read_text(encoding="utf-8")
    script = page.split("<script>")[1].split("</script>")[0]
    fingerprint = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = page.replace("{{script}}", f"'sha256-{fingerprint}'").replace("{{data}}", data)
    aside = file.with_suffix(".tmp")
    aside.write_text(page, encoding="utf-8")
    aside.replace(file)
