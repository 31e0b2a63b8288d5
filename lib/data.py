"""Files of questions about images: read them, check them, write them.

What it teaches: what is wrong with a line is said before a run begins, not after an hour: which
file, line and field, what was found and what was expected.

Your own questions (lib/question.py) stand in a .jsonl file, one object a line (broken here):

    {"image": "a.png", "question": "What is on the sign?", "answer": "42", "choices": ["42", "17"],
     "category": "signs", "boxes": [[10, 20, 50, 60]], "objects": {"sign": [10, 20, 50, 60]}}

Only image, question and answer are needed. The image is a path relative to the file. Boxes are
[x1, y1, x2, y2] in pixels of the original image, as it is shown: turned by its EXIF note.

Run it:  python -m lib.data runs/world/questions.jsonl  # a summary; `python -m tiny.world` makes it
"""
import argparse
import difflib
import io
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import ExifTags, Image, ImageOps
from tqdm import tqdm

from lib.question import Box, Question, choose, normalise
from tools import MAX_IMAGE_ASPECT

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
MAX_PIXELS = 2**28                       # of a picture; 2^28 are 800 MB in memory
Image.MAX_IMAGE_PIXELS = MAX_PIXELS      # Pillow's own limit, which only warns, is lower

NEEDED = ("image", "question", "answer")                      # fields of a line ..
OPTIONAL = ("choices", "category", "boxes", "objects", "id")
SURROGATE = re.compile("[\ud800-\udfff]")                     # half a character: "\ud83d"


class DataError(ValueError):
    """A question that cannot be read: which file, line and field, what was found and expected."""


# ---- files of questions --------------------------------------------------------------------------

def read_jsonl(path: str | Path, bad: list[DataError] | None = None) -> Iterator[Question]:
    """Questions from a .jsonl file (format: the top of this file). Blank lines are skipped.

    bad: see `noted`. Raises DataError with file, line and field."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file; expected one JSON object a line")
    ids = set()
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                with noted(bad):
                    question = parse_record(line, path, number)
                    new = question.id not in ids     # a run's page finds questions by their ids
                    expect(new, question.where, "id", "one that no line above has", question.id)
                    ids.add(question.id)
                    yield question


@contextmanager
def noted(bad: list[DataError] | None) -> Iterator[None]:
    """A DataError within goes into the list `bad`, and reading goes on; None: it is raised."""
    try:
        yield
    except DataError as error:
        if bad is None:
            raise
        bad.append(error)


def parse_record(line: bytes, path: Path, number: int) -> Question:
    """One line of a .jsonl file -> Question. Raises DataError."""
    where = f"{path}:{number}"
    record = parse_object(line, where)
    boxes = record.get("boxes") or []
    objects = record.get("objects") or {}
    expect(isinstance(boxes, list), where, "boxes", "a list of boxes", boxes)
    named = isinstance(objects, dict) and all(map(is_text, objects))
    expect(named, where, "objects", "an object of name: box", objects)
    return Question(
        text=record["question"],
        answer=record["answer"],
        open=image_opener(record["image"], path.parent, where),
        choices=parse_choices(record, where),
        category=parse_name(record, "category", where) or "",
        boxes=tuple(parse_box(where, "boxes", box) for box in boxes),
        objects={name: parse_box(where, "objects", box) for name, box in objects.items()},
        id=parse_name(record, "id", where) or f"{path.stem}-{number}",
        where=where)


def parse_choices(record: dict, where: str) -> tuple[str, ...]:
    """The options, of which the answer must name one; () for an open question."""
    choices = record.get("choices") or []
    if not choices:
        return ()
    texts = isinstance(choices, list) and all(map(is_text, choices))
    expect(texts, where, "choices", "a list of texts that are not empty", choices)
    different = len(set(map(normalise, choices))) == len(choices)
    expect(different and 2 <= len(choices) <= 26, where, "choices", "2 to 26 different texts",
           choices)
    right = choose(record["answer"], choices) is not None
    expect(right, where, "answer", f"one of {choices}, or its letter"[:200], record["answer"])
    return tuple(choices)


def parse_name(record: dict, field: str, where: str) -> str | None:
    """A text, or a number as a text; None if there is none."""
    value = record.get(field)
    if value in (None, ""):
        return None
    plain = type(value) in (str, int, float) and is_text(str(value))           # no bool
    expect(plain, where, field, "a text", value)
    return str(value)


def parse_object(line: bytes, where: str) -> dict:
    """The fields of one line: all that are needed, none twice, none misspelt. Raises DataError."""
    try:
        record = json.loads(line.decode("utf-8-sig"), object_pairs_hook=unique_names)
    except (ValueError, RecursionError) as error:
        found = f"{line.strip()[:60]!r} ({error})"
        raise DataError(f"{where}: expected one JSON object, found {found}") from None
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected one JSON object, found {type(record).__name__}")
    for name in NEEDED:
        if name not in record:
            raise DataError(f"{where}: field '{name}': missing; found {sorted(record)}")
        expect(is_text(record[name]), where, name, "a text that is not empty", record[name])
    absent = [name for name in OPTIONAL if name not in record]
    for name in record:                      # "choice" would be ignored, and its question be open
        meant = difflib.get_close_matches(name.lower(), absent, 1, cutoff=.75)
        if meant and name not in OPTIONAL:
            raise DataError(f"{where}: field '{name[:80]}': expected '{meant[0]}'")
    return record


def unique_names(pairs: list[tuple[str, object]]) -> dict:
    record = {}
    for name, value in pairs:
        if name in record:
            raise ValueError(f"'{name[:80]}' stands twice")
        record[name] = value
    return record


def is_text(value: object) -> bool:
    """Not blank, and without half characters, which no file and no tokenizer takes."""
    return isinstance(value, str) and bool(value.strip()) and not SURROGATE.search(value)


def parse_box(where: str, name: str, value: object) -> Box:
    """At least a pixel wide and high: less is no evidence, and often a share of the picture."""
    four = isinstance(value, list) and len(value) == 4
    # a bool is no number here, and neither are NaN and infinity
    numbers = four and all(type(side) in (int, float) and abs(side) < 1e9 for side in value)
    is_box = numbers and value[0] + 1 <= value[2] and value[1] + 1 <= value[3]
    expect(is_box, where, name, "[x1, y1, x2, y2] in pixels, at least 1 x 1", value)
    return tuple(value)


def expect(ok: object, where: str, name: str, expected: str, found: object) -> None:
    if not ok:
        found = repr(found)[:80]
        raise DataError(f"{where}: field '{name}': expected {expected}, found {found}")


def write_jsonl(questions: list[Question], folder: str | Path) -> Path:
    """Save questions and their images as `read_jsonl` reads them; returns the .jsonl file."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "questions.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for i, question in enumerate(questions):
            question.open().save(folder / f"{i:04d}.png")
            record = {"image": f"{i:04d}.png", "question": question.text,
                      "answer": question.answer, "choices": question.choices,
                      "category": question.category, "boxes": question.boxes,
                      "objects": question.objects, "id": question.id}
            file.write(json.dumps(record) + "\n")
    return path


# ---- pictures ------------------------------------------------------------------------------------

def image_opener(name: str, folder: Path, where: str) -> Callable[..., Image.Image]:
    """A function that opens a file in the folder. Raises DataError now if there is none."""
    there = os.path.isfile(folder / name)           # False, too, for what is no name
    expect(there, where, "image", f"a file in {folder}", name)
    return opener(lambda: folder / name, where)


def opener(source: Callable[[], Path | io.BytesIO], where: str) -> Callable[..., Image.Image]:
    """A function that opens the picture of source(), by `read_picture` or another `read`. It raises
    DataError, which begins with `where`, for a picture that cannot be read."""
    def load(read: Callable = read_picture):
        try:
            return read(source())
        except Exception as error:  # Pillow's readers raise nearly anything on broken files
            raise DataError(f"{where}: field 'image': expected a picture that can be read, "
                            f"found: {error}") from None

    return load


def read_picture(source: Path | io.BytesIO) -> Image.Image:
    """A picture as a person sees it, in RGB: turned as its EXIF note says, transparency on
    white. Of an animation it is the first frame."""
    with open_header(source) as image:
        image = ImageOps.exif_transpose(image)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
        return image.convert("RGB")


def read_size(source: Path | io.BytesIO) -> tuple[int, int]:
    """(width, height) as `read_picture` has them, but without reading the pixels."""
    with open_header(source) as image:
        exif = Image.Image.getexif(image)    # a PNG's own method reads its pixels
        turned = exif.get(ExifTags.Base.Orientation, 1) >= 5
        return image.size[::-1] if turned else image.size


def open_header(source: Path | io.BytesIO) -> Image.Image:
    """The picture, its pixels not yet read. Raises ValueError for what no model takes. Formats that
    are not in FORMATS are refused: some of Pillow's readers start other programs."""
    image = Image.open(source, formats=FORMATS)
    width, height = image.size
    long = max(width, height) > MAX_IMAGE_ASPECT * min(width, height)
    if long or width * height > MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels; expected at most {MAX_PIXELS:,}, "
                         f"and at most {MAX_IMAGE_ASPECT}:1")
    if image.mode.startswith(("I", "F")):            # Pillow would cut off what is above 255
        raise ValueError("grey in 16 or 32 bits; expected 8 bits a channel")
    return image


# ---- before a run --------------------------------------------------------------------------------

def check_pictures(questions: Iterable[Question], bad: list[DataError], whole: bool = False
                   ) -> list[Question]:
    """The questions whose pictures open and hold their boxes; the errors of others go into `bad`.

    It reads headers, 0.3 ms a picture. whole: all pixels, 200 ms for six million of them; so a
    missing end is found, too."""
    good = []
    for question in tqdm(questions, "pictures", disable=None):
        with noted(bad):
            width, height = question.open().size if whole else question.open(read_size)
            for name, boxes in (("boxes", question.boxes), ("objects", question.objects.values())):
                for box in boxes:            # rounding may put it a pixel outside
                    inside = box[0] >= -1 and box[1] >= -1
                    inside = inside and box[2] <= width + 1 and box[3] <= height + 1
                    expect(inside, question.where, name, f"a box in {width} x {height} pixels", box)
            good.append(question)
    return good


def listed(bad: list[DataError], most: int = 20) -> str:
    """The errors, one a line."""
    lines = [str(error) for error in bad[:most]]
    if len(bad) > most:
        lines.append(f".. and {len(bad) - most} more")
    return "\n".join(lines)


def describe(title: str, questions: Iterable[Question], bad: list[DataError]) -> None:
    """Print what is in a file. Ends the program with the errors of its bad lines, if any."""
    questions = check_pictures(questions, bad, whole=True)
    print(f"{title}: {len(questions)} questions")
    counted = {"categories": [question.category for question in questions],
               "options": [len(question.choices) for question in questions],
               "answers": [question.answer for question in questions]}
    for name, values in counted.items():
        counts = [f"{value}: {count}" for value, count in Counter(values).most_common(8)]
        print(f"{name:12}{', '.join(counts)}")
    for question in questions[:3]:
        print(f"\n{question.id}: {question.prompt}\n-> {question.answer}")
    if bad or not questions:
        raise SystemExit(listed(bad) or "expected questions, found none")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Summarise a .jsonl file of questions.")
    parser.add_argument("file", help="one JSON object a line")
    file, bad = parser.parse_args().file, []
    try:
        describe(file, read_jsonl(file, bad), bad)
    except DataError as error:               # there is no such file
        raise SystemExit(str(error))
