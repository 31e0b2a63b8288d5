"""The world forces a look, its questions are fair, and a file of your own questions is read or refused with a reason."""
import base64
import io
import json
import struct
import zlib
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lib.data import DataError, Question, coverage, holds, read_jsonl, shows, write_jsonl
from tiny.world import BLOCK, CANVAS, COLOURS, DARK, LIGHT, MARKS, SHAPES, Thing, World, draw, draw_overview, mark_pixels, world_question, world_questions
from tools import Call, Resolution, fit, to_original, zoom

RESOLUTION, SEEN = Resolution(24, 48 * 48, 96 * 96), (96, 96)
BOTH = pytest.mark.parametrize("small", [False, True], ids=["large", "small"])


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def look(image: Image.Image, box) -> np.ndarray:
    """The pixels of a zoom on a box, in pixels of the overview."""
    return pixels(zoom(image, Call("x", box), SEEN, RESOLUTION)[0])


def things(mark: str, small: bool) -> list[Thing]:
    """One object of every shape, all with the same mark."""
    return [Thing(shape, colour, mark, (96 + 192 * i, 112 + 176 * i), small)
            for i, (shape, colour) in enumerate(zip(SHAPES, COLOURS))]


@pytest.fixture(scope="module")
def scenes() -> dict[bool, dict[str, Image.Image]]:
    """The same scene with every mark, for large and for small objects."""
    return {small: {mark: draw(things(mark, small), clutter=4, seed=1) for mark in MARKS} for small in (False, True)}


# ---- why the agent must look -------------------------------------------------------------------------------------

@BOTH
def test_marks_average_out(small):
    """Every 8 x 8 block of every mark is half dark and half light, so its average says nothing."""
    for mark in MARKS:
        plate = mark_pixels(mark, small)
        assert set(np.unique(plate)) == {DARK, LIGHT}
        blocks = plate.reshape(plate.shape[0] // BLOCK, BLOCK, -1, BLOCK).mean((1, 3))
        assert (blocks == (DARK + LIGHT) / 2).all()


@BOTH
def test_overview_holds_no_trace(scenes, small):
    """Changing every mark changes the overview by exactly 0, and so does it a crop as wide as the image."""
    overviews = {mark: pixels(fit(image, RESOLUTION)) for mark, image in scenes[small].items()}
    wide = {mark: look(image, (0, 0, *SEEN)) for mark, image in scenes[small].items()}
    for mark in MARKS[1:]:
        assert abs(pixels(scenes[small][mark]) - pixels(scenes[small][MARKS[0]])).max() == LIGHT - DARK
        assert (overviews[mark] == overviews[MARKS[0]]).all()
        assert (wide[mark] == wide[MARKS[0]]).all()


@BOTH
def test_zoom_shows_the_mark(scenes, small):
    """A close crop changes a lot with the mark, whatever the object's shape: any two marks differ."""
    for thing in things(MARKS[0], small):
        box = tuple(v / 8 for v in thing.plate)
        crops = {mark: look(image, box) for mark, image in scenes[small].items()}
        for one, other in combinations(MARKS, 2):
            assert abs(crops[one] - crops[other]).mean() > 24, (one, other)


@BOTH
@pytest.mark.parametrize("share", [1., 1.5, 2., 2.5, 3.])
def test_shows_means_readable(scenes, small, share):
    """Where `shows` says that a square crop can be read, any two marks differ visibly in it."""
    thing = things(MARKS[0], small)[1]
    side = int(share * (thing.plate[2] - thing.plate[0]) / 8)
    for shift in (0, 1):
        x, y = thing.centre[0] // 8 - side // 2 + shift, thing.centre[1] // 8 - side // 2
        box = (x, y, x + side, y + side)
        if shows(to_original(box, SEEN, (CANVAS, CANVAS)), thing.plate):
            crops = {mark: look(image, box) for mark, image in scenes[small].items()}
            for one, other in combinations(MARKS, 2):
                assert abs(crops[one] - crops[other]).max() >= 48, (one, other, box)


def test_coverage_holds_shows_by_hand():
    """Hand-worked shares: two thirds hold, and a crop longer than 2.5 targets shows nothing."""
    target = (10, 10, 40, 40)
    assert coverage(target, target) == 1 and coverage((0, 0, 100, 100), target) == 1
    assert coverage((10, 10, 25, 40), target) == .5 and coverage((25, 25, 99, 99), target) == .25
    assert coverage((20, 20, 30, 30), target) == pytest.approx(1 / 9)
    assert coverage((40, 10, 60, 40), target) == coverage((50, 50, 60, 60), target) == coverage((0, 0, 5, 99), target) == 0
    assert holds((10, 10, 30, 40), target) and holds((0, 0, 100, 100), target)
    assert not holds((10, 10, 29.9, 40), target) and not holds((60, 60, 90, 90), target)
    assert shows(target, target) and shows((0, 0, 50, 50), target) and shows((-12, -12, 63, 63), target)
    assert not shows((-12, -12, 63.1, 63), target) and not shows((10, 10, 29, 40), target)
    assert not shows((0, 0, 768, 768), target) and not shows((100, 100, 130, 130), target)


@BOTH
def test_shortcuts_draw_the_same(scenes, small):
    """A region is drawn as the whole scene's crop, pixel for pixel; the fast overview is within one grey level."""
    image, scene = scenes[small]["vee"], things("vee", small)
    for region in ((0, 0, 96, 96), (40, 70, 180, 150), (700, 600, 768, 768), (90, 100, 91, 101)):
        assert (pixels(draw(scene, 4, 1, region)) == pixels(image.crop(region))).all()
    assert abs(pixels(draw_overview(scene, 4, 1)) - pixels(fit(image, RESOLUTION))).max() <= 1


# ---- fair questions ----------------------------------------------------------------------------------------------

def fingerprint(q: Question) -> str:
    return json.dumps([q.text, q.answer, q.choices, q.objects, q.marks])


def test_deterministic():
    """The same arguments give the same question and the same pixels, alone or in a list; the seed matters."""
    for split in ("train", "test", "cold"):
        one, again = world_question(World(), 3, split, 7), world_questions(World(), 3, split, 5, 4)[2]
        assert one.id == again.id == f"{split}-3-7" and fingerprint(one) == fingerprint(again) and one.boxes == again.boxes
        assert (pixels(one.open()) == pixels(again.open())).all() and (pixels(one.open()) == pixels(one.open())).all()
        assert fingerprint(one) != fingerprint(world_question(World(), 4, split, 7))


def test_splits_are_disjoint():
    """No scene appears twice, within a split or in two; not even when the indices are the same."""
    prints = [fingerprint(q) for split in ("train", "test", "cold") for q in world_questions(World(), 0, split, 0, 400)]
    assert len(set(prints)) == 1200
    images = {world_question(World(), 0, split, i).open().tobytes() for split in ("train", "test", "cold") for i in range(2)}
    assert len(images) == 6


@pytest.mark.parametrize("options", [0, 2, 3, 4, 5, 6, 7, 8])
def test_options(options):
    """The answer is one of the choices, choices are unique marks, and their number is the one configured."""
    for q in world_questions(World(options=options), 0, "train", 0, 80):
        if q.category == "comparison":
            assert all(c.count(" and ") == 1 for c in q.choices) and len(q.boxes) == 2 and len(set(q.choices)) == options
        else:
            assert len(q.choices) == len(set(q.choices)) == options and set(q.choices) <= set(MARKS) and len(q.boxes) == 1
            assert q.answer in MARKS
        assert q.answer in q.choices or not q.choices and options == 0


@pytest.mark.parametrize("options", [2, 4, 8])
def test_no_position_and_no_mark_is_favoured(options):
    """The right option stands anywhere, every mark is as often right: luck is one in the number of options."""
    questions = world_questions(World(options=options, comparison=0), 0, "train", 0, 1500)
    for values, n in (([q.choices.index(q.answer) for q in questions], options), ([q.answer for q in questions], len(MARKS)),
                      ([c for q in questions for c in q.choices], len(MARKS))):
        counts = Counter(values)
        expected = len(values) / n
        assert len(counts) == n and max(abs(c - expected) for c in counts.values()) < 5 * expected**.5


@pytest.mark.parametrize("options", range(2, 9))
def test_comparison_needs_both_looks(options):
    """One look does not settle a pair: always choosing an option that agrees on the first mark (or on the second) is
    right less than eight times in ten, and at four options exactly half of the time."""
    for place in (0, 1):
        share = 0.
        for q in world_questions(World(comparison=1, coarse=0, options=options), 0, "train", 0, 400):
            seen = q.answer.split(" and ")[place]
            fitting = [c for c in q.choices if c.split(" and ")[place] == seen]
            share += 1 / len(fitting) / 400
        assert share < .8
        if options == 4:
            assert share == pytest.approx(.5)


@pytest.mark.parametrize("comparison, coarse", [(.25, .15), (0, 0), (1, 0), (0, 1), (.5, .5)])
def test_shares(comparison, coarse):
    """Categories come as often as configured."""
    counts = Counter(q.category for q in world_questions(World(comparison=comparison, coarse=coarse), 1, "test", 0, 1000))
    assert counts["comparison"] == pytest.approx(1000 * comparison, abs=60 if 0 < comparison < 1 else 0)
    assert counts["coarse_to_fine"] == pytest.approx(1000 * coarse, abs=60 if 0 < coarse < 1 else 0)
    assert sum(counts.values()) == 1000 and set(counts) <= {"direct_attributes", "comparison", "coarse_to_fine"}


@pytest.mark.parametrize("objects", [2, 6, 16])
def test_question_is_true(objects):
    """Objects are unique, inside the canvas and apart; the answer follows from the marks of the objects that are named."""
    for q in world_questions(World(objects=objects, options=8), 2, "train", 0, 60):
        assert len(q.objects) == len(q.marks) == objects
        named = [name for name in q.objects if f"the {name} " in q.text or f"the {name}?" in q.text]
        assert sorted(q.boxes) == sorted(q.objects[name] for name in named)
        marks = [q.marks[name] for name in named]
        assert q.answer == (f"{marks[0]} and {marks[1]}" if q.category == "comparison" else marks[0])
        side = 32 if q.category == "coarse_to_fine" else 64
        for x1, y1, x2, y2 in q.objects.values():
            assert side // 2 <= x1 < x2 <= CANVAS - side // 2 and side // 2 <= y1 < y2 <= CANVAS - side // 2
            assert x2 - x1 == y2 - y1 == side and x1 % BLOCK == y1 % BLOCK == 0
        assert all(max(abs(a[0] - b[0]), abs(a[1] - b[1])) >= 2 * side for a, b in combinations(q.objects.values(), 2))


def test_boxes_lie_on_the_plates():
    """The evidence box of a question frames exactly the pixels of the mark that is the answer."""
    for q in world_questions(World(comparison=0, coarse=.5), 0, "test", 0, 6):
        x1, y1, x2, y2 = q.boxes[0]
        plate = pixels(q.open())[y1:y2, x1:x2]
        assert (plate == mark_pixels(q.answer, q.category == "coarse_to_fine")[..., None]).all()


@pytest.mark.parametrize("settings, name", [
    ({"objects": 1}, "objects"), ({"objects": 17}, "objects"), ({"objects": -3}, "objects"), ({"options": 1}, "options"),
    ({"options": 9}, "options"), ({"options": -1}, "options"), ({"comparison": -.1}, "comparison"), ({"coarse": -.1}, "coarse"),
    ({"comparison": .6, "coarse": .5}, "comparison"), ({"comparison": float("nan")}, "comparison"), ({"coarse": float("inf")}, "coarse")])
def test_world_refuses(settings, name):
    """A world that cannot be built says which setting is wrong and what was found."""
    with pytest.raises(DataError, match=f"{name}.*expected.*found"):
        World(**settings)


def test_prompt():
    """Options get letters in order; an open question is only its text."""
    q = Question("Which?", "cat", lambda: None, ("dog", "cat", "cow"))
    assert q.prompt == "Which?\nOptions: (A) dog (B) cat (C) cow"
    assert Question("Which?", "cat", lambda: None).prompt == "Which?"


# ---- your own questions ------------------------------------------------------------------------------------------

def png(side: int = 12) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def base64_png(side: int = 12) -> str:
    return base64.b64encode(png(side)).decode()


GOOD = {"image": base64_png(), "question": "Which?", "answer": "B", "choices": ["x", "y"], "boxes": [[0, 0, 6.5, 6]]}


def save(folder: Path, *lines) -> Path:
    """A .jsonl file; a line is a record, or raw bytes."""
    file = folder / "own.jsonl"
    file.write_bytes(b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines))
    return file


def test_round_trip(tmp_path):
    """What write_jsonl saves, read_jsonl reads back: every field and every pixel."""
    questions = world_questions(World(options=0), 0, "test", 0, 3) + world_questions(World(comparison=1, coarse=0), 0, "test", 3, 1)
    for old, new in zip(questions, read_jsonl(write_jsonl(questions, tmp_path / "new" / "folder")), strict=True):
        for name in ("text", "answer", "choices", "category", "boxes", "objects", "id", "prompt"):
            assert getattr(old, name) == getattr(new, name), name
        assert (pixels(old.open()) == pixels(new.open())).all()


def test_defaults(tmp_path):
    """Only image, question and answer are needed; blank lines are skipped but counted; text may be any Unicode."""
    record = {"image": GOOD["image"], "question": "Où ? 红", "answer": "ici"}
    first, second = read_jsonl(save(tmp_path, record, b"", b"  \t", {**record, "choices": None, "boxes": None, "objects": None, "id": 5}))
    assert (first.text, first.answer, first.choices, first.boxes, first.objects, first.category, first.id) == (
        "Où ? 红", "ici", (), (), {}, "", "own-1")
    assert second.id == "5" and second.boxes == () and second.objects == {}


@pytest.mark.parametrize("prefix", ["", "data:image/png;base64,"], ids=["plain", "data URI"])
@pytest.mark.parametrize("side", [6, 12, 14, 15, 40])
def test_base64(tmp_path, side, prefix):
    """A picture inside the line gives its pixels, whatever its length (one that could be a file's name, too)."""
    question, = read_jsonl(save(tmp_path, {**GOOD, "image": prefix + base64_png(side)}))
    assert (pixels(question.open()) == pixels(Image.open(io.BytesIO(png(side))))).all()


def test_base64_longer_than_a_file_name(tmp_path):
    """A picture whose base64 has no slash looks like one file name, longer than file systems take: no OSError."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "BMP")
    text = base64.b64encode(buffer.getvalue()).decode()
    assert 255 < len(text) < 1024 and "/" not in text
    question, = read_jsonl(save(tmp_path, {**GOOD, "image": text}))
    assert question.open().size == (8, 8)


def test_image_file(tmp_path):
    """A path is relative to the .jsonl file, and any mode becomes RGB."""
    (tmp_path / "sub").mkdir()
    Image.new("RGBA", (5, 4), (9, 8, 7, 128)).save(tmp_path / "sub" / "é.png")
    image = next(read_jsonl(save(tmp_path, {**GOOD, "image": "sub/é.png"}))).open()
    assert image.mode == "RGB" and image.size == (5, 4) and image.getpixel((0, 0)) == (9, 8, 7)


BAD = {  # a line, or changes to a good record -> what the message names
    "not JSON": (b"hello", "one JSON object"),
    "cut off": (json.dumps(GOOD).encode()[:-5], "one JSON object"),
    "two records": (json.dumps(GOOD).encode() * 2, "one JSON object"),
    "list": (b"[1, 2]", "found list"),
    "string": (b'"question"', "found str"),
    "null": (b"null", "found NoneType"),
    "byte-order mark": (b"\xef\xbb\xbf{}", "one JSON object"),
    "not UTF-8": (b'{"image": "\xff\xfe"}', "expected"),
    "deep brackets": (b"[" * 100_000, "one JSON object"),
    "huge integer": (b'{"image": ' + b"9" * 5000 + b"}", "one JSON object"),
    "empty object": (b"{}", "'image': missing"),
    "no question": (b'{"image": "x.png", "answer": "B"}', "'question': missing"),
    "no answer": (b'{"image": "x.png", "question": "Which?"}', "'answer': missing"),
    "image null": ({"image": None}, "'image'"),
    "image list": ({"image": ["a.png"]}, "'image'"),
    "image blank": ({"image": " "}, "'image'"),
    "image missing": ({"image": "nowhere.png"}, "'image'.*nowhere.png"),
    "image a folder": ({"image": "."}, "'image'"),
    "image a null byte": ({"image": "a\0b.png"}, "'image'"),
    "image a lone surrogate": ({"image": "\ud800.png"}, "'image'"),
    "image a long name": ({"image": "a" * 300 + ".png"}, "'image'"),
    "image broken base64": ({"image": "data:image/png;base64,iVBORw0KG\u00e9"}, "'image'"),
    "image long broken base64": ({"image": "*" * 5000}, "'image'"),
    "question number": ({"question": 7}, "'question'.*found 7"),
    "question empty": ({"question": ""}, "'question'"),
    "answer bool": ({"answer": True}, "'answer'.*found True"),
    "answer list": ({"answer": ["B"]}, "'answer'"),
    "answer blank": ({"answer": "\n"}, "'answer'"),
    "choices text": ({"choices": "AB"}, "'choices'"),
    "choices of numbers": ({"choices": [1, 2]}, "'choices'"),
    "choices object": ({"choices": {"A": "x"}}, "'choices'"),
    "too many choices": ({"choices": ["x"] * 27}, "'choices'"),
    "one box, not a list of boxes": ({"boxes": [0, 0, 6, 6]}, "'boxes'"),
    "boxes object": ({"boxes": {"a": [0, 0, 6, 6]}}, "'boxes'"),
    "box of three": ({"boxes": [[0, 0, 6]]}, "'boxes'"),
    "box of texts": ({"boxes": [["0", "0", "6", "6"]]}, "'boxes'"),
    "box of bools": ({"boxes": [[False, False, True, True]]}, "'boxes'"),
    "box inverted": ({"boxes": [[0, 0, 6, 6], [6, 0, 0, 6]]}, "'boxes'"),
    "box without area": ({"boxes": [[0, 3, 6, 3]]}, "'boxes'"),
    "box NaN": ({"boxes": [[0, 0, float("nan"), 6]]}, "'boxes'"),
    "box infinite": ({"boxes": [[0, 0, float("inf"), 6]]}, "'boxes'"),
    "box of a huge integer": ({"boxes": [[0, 0, 10**400, 6]]}, "'boxes'"),
    "objects list": ({"objects": [[0, 0, 6, 6]]}, "'objects'"),
    "objects without boxes": ({"objects": {"cat": None}}, "'objects'"),
    "objects inverted": ({"objects": {"cat": [0, 6, 6, 0]}}, "'objects'"),
}


@pytest.mark.parametrize("line, names", [pytest.param(*row, id=name) for name, row in BAD.items()])
def test_bad_line(tmp_path, line, names):
    """A bad line is a DataError that names file, line and field, in few words; the lines before it are read."""
    file = save(tmp_path, GOOD, b"", line if isinstance(line, bytes) else {**GOOD, **line})
    questions = read_jsonl(file)
    assert next(questions).answer == "B"
    with pytest.raises(DataError, match=names) as error:
        next(questions)
    assert f"{file}:3" in str(error.value) and len(str(error.value)) < 500 + 3 * len(str(file))


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


BOMB = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)) + chunk(b"IDAT", b"")
LARGE = png(192)  # two data chunks, the second starts beyond byte 65,536
SECOND = LARGE.index(b"IDAT", 60_000)


@pytest.mark.parametrize("data", [
    b"this is no picture at all", b"GIF89a" + bytes(40), png()[:60], LARGE[:70_000], LARGE[:SECOND] + b"\0" + LARGE[SECOND + 1:],
    LARGE[:5000] + bytes(500) + LARGE[5500:], b"DDS " + struct.pack("<I", 124) + bytes(120), BOMB],
    ids=["text", "GIF header", "cut short", "cut in the middle", "broken chunk", "overwritten", "DDS header", "bomb of 900 megapixels"])
def test_broken_picture(tmp_path, data):
    """A picture that cannot be decoded is a DataError on open() that names the line, from a file and from base64."""
    (tmp_path / "broken.png").write_bytes(data)
    file = save(tmp_path, GOOD, {**GOOD, "image": "broken.png"}, {**GOOD, "image": base64.b64encode(data).decode()})
    for number, question in list(enumerate(read_jsonl(file), 1))[1:]:
        with pytest.raises(DataError, match="'image'") as error:
            question.open()
        assert f"{file}:{number}" in str(error.value)


def test_picture_that_goes_away(tmp_path):
    """A file deleted after reading the questions is a DataError, too."""
    (tmp_path / "a.png").write_bytes(png())
    question, = read_jsonl(save(tmp_path, {**GOOD, "image": "a.png"}))
    (tmp_path / "a.png").unlink()
    with pytest.raises(DataError, match="own.jsonl:1: field 'image'"):
        question.open()


@pytest.mark.parametrize("name", ["missing.jsonl", ".", "no/such/folder.jsonl"])
def test_missing_file(tmp_path, name):
    """A missing file is named, not a traceback."""
    with pytest.raises(DataError, match="no such file"):
        next(read_jsonl(tmp_path / name))
