"""Questions about images: an embedded world to look at, and a reader for your own .jsonl files.

What it teaches: *why an agent must look*. The world is a stand-in for V* (arXiv 2312.14135): a 768 x 768 canvas
with small objects (a shape and a colour), each with a plate that carries a *mark*. The agent first sees the canvas
reduced 8 times. Every mark is built from 8 x 8 tiles that are half dark and half light, so one pixel of the
overview is the same grey whatever the mark: the overview holds no trace of it (tests/test_data.py proves it).
Only a zoom shows the mark; without it, an answer is a guess among the options, and the number of options is the luck.

    direct_attributes   "What mark is on the red circle?"                              one look
    comparison          "What mark is on the red circle and the blue square?"          two looks
    coarse_to_fine      as the first, in a scene at half size: a coarse look finds the object, a fine one reads it

Run it:  python data.py --out runs/world --n 12      # pictures + questions.jsonl, a file `eval.py --data` can read
"""
import argparse
import base64
import binascii
import functools
import io
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, Iterator

import numpy as np
from PIL import Image

Box = tuple[float, float, float, float]  # x1, y1, x2, y2 in pixels of the original image



class DataError(ValueError):
    """A question that cannot be read; says which file, line and field, what was found and what was expected."""


@dataclass
class Question:
    """One question about one image. `open()` loads the image; a list of questions holds no pixels."""
    text: str
    answer: str
    open: Callable[[], Image.Image] = field(repr=False)
    choices: tuple[str, ...] = ()           # empty: an open question
    category: str = ""
    boxes: tuple[Box, ...] = ()             # evidence: every one of these must be seen to know the answer; () = unknown
    objects: dict[str, Box] = field(default_factory=dict)  # what is where, by name; {} = unknown (real photographs)
    marks: dict[str, str] = field(default_factory=dict)    # and which mark it carries, for demonstrations
    id: str = ""
    meta: dict[str, str] = field(default_factory=dict)     # what a benchmark's scoring needs (benchmarks.py)

    @property
    def prompt(self) -> str:
        """The text that the agent reads: the question, then lettered options."""
        options = " ".join(f"({chr(65 + i)}) {choice}" for i, choice in enumerate(self.choices))
        return f"{self.text}\nOptions: {options}" if options else self.text


# ---- when is evidence seen? ------------------------------------------------------------------------------------

def coverage(box: Box, target: Box) -> float:
    """Share of the target's area that lies inside the box."""
    width = min(box[2], target[2]) - max(box[0], target[0])
    height = min(box[3], target[3]) - max(box[1], target[1])
    return max(width, 0) * max(height, 0) / ((target[2] - target[0]) * (target[3] - target[1]))


def holds(box: Box, target: Box) -> bool:
    """The crop contains the target: at least two thirds of it."""
    return coverage(box, target) >= 2 / 3


def shows(box: Box, target: Box) -> bool:
    """The crop contains the target *and* is close enough to read it: no side longer than 2.5 times the target's longest.

    A crop keeps a bounded number of pixels, so a wide one is as blurred as the overview (test_data.py)."""
    longest = lambda b: max(b[2] - b[0], b[3] - b[1])
    return holds(box, target) and longest(box) <= 2.5 * longest(target)


# ---- your own questions ----------------------------------------------------------------------------------------

def read_jsonl(path: str | Path) -> Iterator[Question]:
    """Questions from a .jsonl file, one object a line: image (a path relative to the file, or base64), question,
    answer; optional choices, category, boxes ([[x1, y1, x2, y2], ..] in pixels of the original), objects
    ({name: box}), id. Blank lines are skipped. Raises DataError with file, line and field."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file; expected one JSON object a line")
    offset = 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield parse_record(line, path, f"{path}:{number}", f"{path.stem}-{number}", offset)
            offset += len(line)


def parse_record(line: bytes, path: Path, where: str, default_id: str, offset: int) -> Question:
    """`offset`: where the line begins in the file, so that a picture in base64 is read again instead of held."""
    def fail(name, expected, found):
        found = repr(found)
        raise DataError(f"{where}: field '{name}': expected {expected}, found {found[:80]}")

    try:
        record = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: expected one JSON object, found {line.strip()[:60]!r} ({error})") from None
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected one JSON object, found {type(record).__name__}")
    for name in ("image", "question", "answer"):
        if name not in record:
            raise DataError(f"{where}: field '{name}': missing; found {sorted(record)}")
        if not isinstance(record[name], str) or not record[name].strip():
            fail(name, "a text that is not empty", record[name])
    choices = record.get("choices") or []
    if not isinstance(choices, list) or not all(isinstance(c, str) for c in choices) or len(choices) > 26:
        fail("choices", "a list of at most 26 texts", choices)

    def as_box(name, value) -> Box:
        numbers = isinstance(value, list) and len(value) == 4 and all(
            type(v) in (int, float) and abs(v) < 1e9 for v in value)  # NaN and bool fail here too
        if not numbers or value[0] >= value[2] or value[1] >= value[3]:
            fail(name, "[x1, y1, x2, y2] with x1 < x2 and y1 < y2", value)
        return tuple(value)

    def again() -> str:
        with path.open("rb") as file:
            file.seek(offset)
            return json.loads(file.read(len(line)))["image"]

    boxes, objects = record.get("boxes") or [], record.get("objects") or {}
    if not isinstance(boxes, list):
        fail("boxes", "a list of boxes", boxes)
    if not isinstance(objects, dict):
        fail("objects", "an object of name: box", objects)
    return Question(record["question"], record["answer"], image_opener(record["image"], path.parent, where, again),
                    tuple(choices), str(record.get("category") or ""), tuple(as_box("boxes", b) for b in boxes),
                    {k: as_box("objects", b) for k, b in objects.items()},
                    id=str(record.get("id") or default_id))


def image_opener(text: str, folder: Path, where: str, again: Callable[[], str] | None = None) -> Callable[[], Image.Image]:
    """A function that opens the image named (or contained, as base64) in `text`. Checked now, opened when asked; `again`
    reads the text anew then, so that a list of questions holds no pictures."""
    def decode(text: str) -> bytes:
        try:
            return base64.b64decode(text.split(",", 1)[-1] if text.startswith("data:") else text, validate=True)
        except (binascii.Error, ValueError):
            return b""

    file = folder / text if len(text) < 1024 else None
    if file is not None and os.path.isfile(file):  # unlike Path.is_file, False for a name that is too long
        source = lambda: file
    elif len(decode(text)) < 16:
        raise DataError(f"{where}: field 'image': expected a file beside {folder} or base64, found {text[:60]!r}")
    else:
        again = again or (lambda: text)
        source = lambda: io.BytesIO(decode(again()))

    def load():
        try:
            return Image.open(source()).convert("RGB")
        except Exception as error:  # Pillow's readers raise nearly anything on broken files
            raise DataError(f"{where}: field 'image': expected a picture that Pillow can read, found: {error}") from None

    return load


def write_jsonl(questions: list[Question], folder: str | Path) -> Path:
    """Save questions with their images in the format that `read_jsonl` reads; returns the .jsonl file's path."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "questions.jsonl").open("w", encoding="utf-8") as file:
        for i, q in enumerate(questions):
            q.open().save(folder / f"{i:04d}.png")
            file.write(json.dumps({"image": f"{i:04d}.png", "question": q.text, "answer": q.answer,
                                   "choices": q.choices, "category": q.category, "boxes": q.boxes,
                                   "objects": q.objects, "id": q.id}) + "\n")
    return folder / "questions.jsonl"
