"""When evidence is seen, what an answer names; and a file of your own questions is read, or refused
with a reason."""
import io
import json
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, UnidentifiedImageError

from conftest import ROOT
from lib import data
from lib.data import (DataError, check_pictures, listed, read_jsonl, read_picture, read_size,
                      write_jsonl)
from lib.question import Question, choose, coverage, holds, normalise, shows
from tiny.world import World, world_questions
from tools import MAX_ANSWER_CHARS


# ---- when is evidence seen? ----------------------------------------------------------------------

TARGET = (10, 10, 40, 40)


@pytest.mark.parametrize("box, share", [
    (TARGET, 1), ((0, 0, 100, 100), 1), ((10, 10, 25, 40), 1 / 2), ((25, 25, 99, 99), 1 / 4),
    ((20, 20, 30, 30), 1 / 9), ((40, 10, 60, 40), 0), ((50, 50, 60, 60), 0), ((0, 0, 5, 99), 0)])
def test_coverage_by_hand(box, share):
    assert coverage(box, TARGET) == pytest.approx(share)


def test_holds_from_two_thirds_on():
    assert holds((10, 10, 30, 40), TARGET) and holds((0, 0, 100, 100), TARGET)
    assert not holds((10, 10, 29.9, 40), TARGET) and not holds((60, 60, 90, 90), TARGET)


def test_shows_up_to_two_and_a_half_times_the_side():
    """The target's side is 30, so the crop's longest side may be 75. And the crop must hold it."""
    assert shows(TARGET, TARGET) and shows((10, 10, 30, 40), TARGET)
    assert shows((-12, -12, 63, 63), TARGET) and not shows((-12, -12, 63.1, 63), TARGET)
    assert not shows((10, 10, 29, 40), TARGET) and not shows((100, 100, 130, 130), TARGET)
    assert shows((0, 0, 60, 20), (0, 0, 30, 10)) and not shows((0, 0, 30, 80), (0, 0, 30, 10))


# ---- what does an answer name? -------------------------------------------------------------------

CHOICES = ("rising", "the red sign", "42", "C")


@pytest.mark.parametrize("answer, index", [
    ("rising", 0), (" Rising. ", 0), ("A", 0), ("(a)", 0), ("a.", 0), ("(A) rising", 0),
    ("A: rising", 0), ("The Red Sign", 1), ("B", 1), ("42", 2), ("(C) 42", 2), ("C", 3),
    ("(D)", 3), ("d) c", 3), ("E", None), ("rising 42", None), ("A rising sun", None),
    ("(B) rising", None), ("", None), ("neither", None), ("a red sign", None), ("Answer A", None),
    ("ＡＡ", None), ("(A) (B)", None)])
def test_which_option_an_answer_names(answer, index):
    """By text or letter, or both if they agree; never by a letter inside a sentence."""
    assert choose(answer, CHOICES) == index


@pytest.mark.parametrize("text, normal", [
    ("  Red   Sign!", "red sign"), ("3.5", "3.5"), ("c++.", "c++"), ("<5", "<5"), ("+", "+"),
    ("$3 (net)", "$3 net"), ("50%", "50%"), ("...", "..."), ("", ""), ("\u22125", "-5"),
    ("≥5!", "≥5"), ("€5", "€5"), ("cafe\u0301", "caf\u00e9"), ("\u0915\u0940.", "\u0915\u0940"),
    ("\u0e40\u0e2a\u0e37\u0e49\u0e2d", "\u0e40\u0e2a\u0e37\u0e49\u0e2d"), ("5€.", "5€"),
    ("\u2b06\ufe0f", "\u2b06\ufe0f"), ("1\ufe0f\u20e3", "1"), ("a-b, c", "a-b c")])
def test_normalise(text, normal):
    """Signs that change the meaning stay; case, spaces and other punctuation go. Accents and vowel
    signs stay, as in Thai and Hindi, and one word in two codings is one."""
    assert normalise(text) == normal


def test_the_worst_answer_takes_no_time():
    """Dots and spaces must not make the patterns of `normalise` and `choose` quadratic."""
    start = time.process_time()
    for answer in ("." * MAX_ANSWER_CHARS, "B x" + " " * (MAX_ANSWER_CHARS - 4) + "x"):
        assert choose(answer, ("a", "b")) is None
    assert normalise("." * 100_000 + " a." + "." * 100_000) == "a"
    assert time.process_time() - start < .5


def test_prompt():
    """Options get letters in their order; an open question is only its text."""
    question = Question("Which?", "cat", None, ("dog", "cat", "cow"))
    assert question.prompt == "Which?\nOptions: (A) dog (B) cat (C) cow"
    assert Question("Which?", "cat", None).prompt == "Which?"


# ---- your own questions --------------------------------------------------------------------------

def png(side: int = 12) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "PNG")
    return buffer.getvalue()


GOOD = {"image": "good.png", "question": "Which?", "answer": "B", "choices": ["x", "y"],
        "boxes": [[0, 0, 6.5, 6]]}


def save(folder: Path, *lines: dict | bytes) -> Path:
    """A .jsonl file and a picture beside it; a line is a record, or raw bytes."""
    (folder / "good.png").write_bytes(png())
    file = folder / "own.jsonl"
    with file.open("wb") as output:
        for line in lines:
            output.write((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n")
    return file


def same_pixels(one: Image.Image, other: Image.Image) -> bool:
    return one.size == other.size and one.tobytes() == other.tobytes()


def test_round_trip(tmp_path):
    """What write_jsonl saves, read_jsonl reads back: every field and every pixel."""
    questions = [*world_questions(World(options=0), 0, "test", 0, 3),
                 *world_questions(World(comparison=1, coarse=0), 0, "test", 3, 1)]
    again = list(read_jsonl(write_jsonl(questions, tmp_path / "new" / "folder")))
    for old, new in zip(questions, again, strict=True):
        for name in ("text", "answer", "choices", "category", "boxes", "objects", "id"):
            assert getattr(old, name) == getattr(new, name), name
        assert same_pixels(old.open(), new.open())


def test_defaults(tmp_path):
    """Only image, question and answer are needed. Blank lines are skipped, but counted. A text may
    be any Unicode, and null stands for nothing."""
    record = {"image": GOOD["image"], "question": "Où ? 红", "answer": "ici"}
    nulls = {"choices": None, "boxes": None, "objects": None, "category": None, "id": None}
    first, second, third = read_jsonl(save(tmp_path, record, b"", b"  \t", record | nulls,
                                           record | {"id": 0}))
    assert (first.text, first.answer, first.id) == ("Où ? 红", "ici", "own-1")
    assert (second.id, third.id) == ("own-4", "0")
    for question in (first, second, third):
        assert question.choices == question.boxes == () and question.objects == {}
        assert question.category == question.benchmark == "" and question.marks == {}


def test_every_field(tmp_path):
    """A record with windows' byte-order mark and line end, spaces around it and fields that nobody
    knows. A name that looks like a known one is no misspelling if that is there, too."""
    record = GOOD | {"objects": {"cat": [1, 2, 3, 4]}, "category": "pets", "more": [1],
                     "question_id": 7, "choices2": ["p", "q"]}
    line = b"\xef\xbb\xbf " + json.dumps(record).encode() + b" \r"
    question, = read_jsonl(save(tmp_path, line))
    assert question.open().size == (12, 12)
    assert question.choices == ("x", "y") and question.boxes == ((0, 0, 6.5, 6),)
    assert question.objects == {"cat": (1, 2, 3, 4)} and question.category == "pets"


def test_image_file(tmp_path):
    """A path is relative to the .jsonl file, and any mode becomes RGB."""
    (tmp_path / "sub").mkdir()
    Image.new("RGBA", (5, 4), (9, 8, 7, 255)).save(tmp_path / "sub" / "é.png")
    question, = read_jsonl(save(tmp_path, GOOD | {"image": "sub/é.png"}))
    image = question.open()
    assert image.mode == "RGB" and image.size == (5, 4) and image.getpixel((0, 0)) == (9, 8, 7)


# ---- hostile files -------------------------------------------------------------------------------

BAD = {  # a line, or changes to a good record; and what the message names
    "not JSON": (b"hello", "one JSON object"),
    "cut off": (json.dumps(GOOD).encode()[:-5], "one JSON object"),
    "two records": (json.dumps(GOOD).encode() * 2, "one JSON object"),
    "list": (b"[1, 2]", "found list"),
    "string": (b'"question"', "found str"),
    "null": (b"null", "found NoneType"),
    "two byte-order marks": (b"\xef\xbb\xbf" * 2 + json.dumps(GOOD).encode(), "one JSON object"),
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
    "image a longer name": ({"image": "*" * 5000}, "'image'.*a file in"),
    "question number": ({"question": 7}, "'question'.*found 7"),
    "question empty": ({"question": ""}, "'question'"),
    "answer bool": ({"answer": True}, "'answer'.*found True"),
    "answer list": ({"answer": ["B"]}, "'answer'"),
    "answer blank": ({"answer": "\n"}, "'answer'"),
    "answer is no choice": ({"answer": "C"}, "'answer'.*one of .* found 'C'"),
    "choices text": ({"choices": "AB"}, "'choices'"),
    "choices of numbers": ({"choices": [1, 2]}, "'choices'"),
    "choices object": ({"choices": {"A": "x"}}, "'choices'"),
    "too many choices": ({"choices": list(map(str, range(27)))}, "'choices'"),
    "one choice": ({"choices": ["x"]}, "'choices'.*2 to 26"),
    "equal choices": ({"choices": ["Red!", "blue", " red"]}, "'choices'.*different"),
    "choice blank": ({"choices": ["x", " "]}, "'choices'.*not empty"),
    "choice a lone surrogate": ({"choices": ["x", "\ud800"]}, "'choices'"),
    "question a lone surrogate": ({"question": "Which \udfff?"}, "'question'"),
    "answer a lone surrogate": ({"answer": "\ud83d"}, "'answer'"),
    "category a lone surrogate": ({"category": "\ud83d"}, "'category'"),
    "category a list": ({"category": ["pets"]}, "'category'"),
    "id an object": ({"id": {"a": 1}}, "'id'"),
    "id a bool": ({"id": True}, "'id'"),
    "category an empty list": ({"category": []}, "'category'"),
    "repeated field": (json.dumps(GOOD)[:-1].encode() + b', "answer": "A"}', "'answer'.*twice"),
    "repeated field, by escape": (json.dumps(GOOD)[:-1].encode() + b', "\\u0061nswer": "A"}',
                                  "'answer'.*twice"),
    "repeated object": (json.dumps(GOOD)[:-1].encode() + b', "objects": {"cat": [0, 0, 6, 6], '
                        b'"cat": [3, 3, 6, 6]}}', "'cat'.*twice"),
    "misspelt category": ({"catgory": "pets"}, "'catgory'.*'category'"),
    "misspelt objects": ({"Object": {"cat": [0, 0, 6, 6]}}, "'Object'.*'objects'"),
    "misspelt boxes": (json.dumps(GOOD).replace("boxes", "bboxes").encode(), "'bboxes'.*'boxes'"),
    "misspelt choices": (json.dumps(GOOD).replace("choices", "choice").encode(),
                         "'choice'.*'choices'"),
    "one box, not a list of boxes": ({"boxes": [0, 0, 6, 6]}, "'boxes'"),
    "boxes object": ({"boxes": {"a": [0, 0, 6, 6]}}, "'boxes'"),
    "box of three": ({"boxes": [[0, 0, 6]]}, "'boxes'"),
    "box of texts": ({"boxes": [["0", "0", "6", "6"]]}, "'boxes'"),
    "box of bools": ({"boxes": [[False, False, True, True]]}, "'boxes'"),
    "box inverted": ({"boxes": [[0, 0, 6, 6], [6, 0, 0, 6]]}, "'boxes'"),
    "box without area": ({"boxes": [[0, 3, 6, 3]]}, "'boxes'"),
    "box whose area is rounded to 0": ({"boxes": [[0, 0, 1e-200, 1e-200]]}, "'boxes'"),
    "box in shares of the picture": ({"boxes": [[.2, .2, .6, .9]]}, "'boxes'.*pixels"),
    "box NaN": ({"boxes": [[0, 0, float("nan"), 6]]}, "'boxes'"),
    "box infinite": ({"boxes": [[0, 0, float("inf"), 6]]}, "'boxes'"),
    "box of a huge integer": ({"boxes": [[0, 0, 10**400, 6]]}, "'boxes'"),
    "objects list": ({"objects": [[0, 0, 6, 6]]}, "'objects'"),
    "objects without boxes": ({"objects": {"cat": None}}, "'objects'"),
    "objects without a name": ({"objects": {" ": [0, 0, 6, 6]}}, "'objects'"),
    "objects inverted": ({"objects": {"cat": [0, 6, 6, 0]}}, "'objects'"),
}


@pytest.mark.parametrize("line, names", BAD.values(), ids=BAD)
def test_bad_line(tmp_path, line, names):
    """A bad line is a DataError that names file, line and field, in few words. The lines before it
    are read."""
    file = save(tmp_path, GOOD, b"", line if isinstance(line, bytes) else GOOD | line)
    questions = read_jsonl(file)
    assert next(questions).answer == "B"
    with pytest.raises(DataError, match=names) as error:
        next(questions)
    assert f"{file}:3" in str(error.value) and len(str(error.value)) < 500 + 3 * len(str(file))


def test_an_id_stands_once(tmp_path):
    """Also one that a line without an id has got."""
    for first, second in ((GOOD | {"id": "a"}, GOOD | {"id": "a"}), (GOOD, GOOD | {"id": "own-1"})):
        questions = read_jsonl(save(tmp_path, first, second))
        next(questions)
        with pytest.raises(DataError, match="own.jsonl:2: field 'id': .* found '(a|own-1)'"):
            next(questions)


def test_bad_lines_can_be_left_out(tmp_path):
    """All of them are named, and the good ones between them are read."""
    good = [GOOD | {"question": text} for text in "abc"]
    file = save(tmp_path, b"{", good[0], GOOD | {"answer": ""}, good[1], good[2], b"[]")
    bad = []
    assert [question.text for question in read_jsonl(file, bad)] == ["a", "b", "c"]
    assert [str(error).split(": ")[0] for error in bad] == [f"{file}:{n}" for n in (1, 3, 6)]
    assert listed(bad).count("\n") == 2
    assert listed(bad, most=1).splitlines()[1:] == [".. and 2 more"]


def chunk(kind: bytes, content: bytes) -> bytes:
    """Of a PNG."""
    check = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + check


SIZE = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
NOISE = png(192)                        # two data chunks: the second begins beyond byte 65,536
SECOND = NOISE.index(b"IDAT", 60_000)
BROKEN = {
    "text": b"this is no picture at all",
    "GIF header": b"GIF89a" + bytes(40),
    "cut short": png()[:60],
    "cut in the middle": NOISE[:70_000],
    "broken chunk": NOISE[:SECOND] + b"\0" + NOISE[SECOND + 1:],
    "overwritten": NOISE[:5000] + bytes(500) + NOISE[5500:],
    "DDS header": b"DDS " + struct.pack("<I", 124) + bytes(120),
    "bomb of 900 megapixels": b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", SIZE) + chunk(b"IDAT", b""),
}


@pytest.mark.parametrize("data", BROKEN.values(), ids=BROKEN)
def test_broken_picture(tmp_path, data):
    """A picture that cannot be decoded is a DataError of open() that names the line."""
    (tmp_path / "broken.png").write_bytes(data)
    file = save(tmp_path, GOOD, GOOD | {"image": "broken.png"})
    _, question = read_jsonl(file)
    with pytest.raises(DataError, match="'image'") as error:
        question.open()
    assert f"{file}:2" in str(error.value)


def test_one_pass_over_the_pictures(tmp_path):
    """Broken pictures, and boxes outside of them, are found before a run begins: those whose
    header is broken at once, and those whose end is missing if the whole is read."""
    (tmp_path / "cut.png").write_bytes(NOISE[:70_000])
    (tmp_path / "text.png").write_bytes(BROKEN["text"])
    lines = [GOOD, GOOD | {"image": "text.png"}, GOOD | {"image": "cut.png"},
             GOOD | {"boxes": [[0, 0, 6, 6], [6, 6, 14, 12]]}, GOOD | {"boxes": [[-1, 0, 13, 13]]},
             GOOD | {"objects": {"cat": [0, -2, 6, 6]}}]
    questions = list(read_jsonl(save(tmp_path, *lines)))
    for whole, expected in ((False, [0, 2, 4]), (True, [0, 4])):
        bad = []
        assert check_pictures(questions, bad, whole) == [questions[i] for i in expected]
        assert len(bad) == 6 - len(expected)
    assert "own.jsonl:2: field 'image'" in str(bad[0])
    assert "own.jsonl:4: field 'boxes': expected a box in 12 x 12 pixels" in str(bad[2])
    assert "own.jsonl:6: field 'objects'" in str(bad[3])


def saved(image: Image.Image, kind: str, **options) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file


def test_pictures_are_read_as_they_are_seen():
    """A phone's picture stands upright, transparency is white, and of an animation the first frame
    is shown."""
    upright = Image.new("RGB", (30, 20), "red")
    upright.paste("blue", (0, 0, 10, 20))                # at the left ..
    exif = Image.Exif()
    exif[0x0112] = 6                                     # .. of what was turned to the left
    turned = saved(upright.transpose(Image.ROTATE_90), "PNG", exif=exif)
    assert read_picture(turned).tobytes() == upright.tobytes()
    assert read_size(turned) == upright.size == (30, 20)

    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    clear.putpixel((0, 0), (255, 0, 0, 255))
    seen = read_picture(saved(clear, "PNG"))
    assert seen.getpixel((0, 0)) == (255, 0, 0) and seen.getpixel((1, 1)) == (255, 255, 255)

    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    seen = read_picture(saved(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert seen.getpixel((0, 0)) == (255, 0, 0)


def test_other_formats_and_sizes_are_refused(monkeypatch):
    """PostScript would start another program. A limit on pixels is named."""
    with pytest.raises(UnidentifiedImageError):
        read_picture(saved(Image.new("RGB", (8, 8)), "EPS"))
    for read in (read_picture, read_size):
        with pytest.raises(ValueError, match="402 x 2 pixels; .* at most 200:1"):
            read(saved(Image.new("RGB", (402, 2)), "PNG"))
    for deep, kind in ((np.uint16, "PNG"), (np.float32, "TIFF")):
        with pytest.raises(ValueError, match="expected 8 bits a channel"):
            read_picture(saved(Image.fromarray(np.ones((2, 2), dtype=deep)), kind))
    monkeypatch.setattr(data, "MAX_PIXELS", 100)
    with pytest.raises(ValueError, match="11 x 10 pixels; expected at most 100"):
        read_picture(saved(Image.new("RGB", (11, 10)), "PNG"))


def test_a_file_that_goes_away(tmp_path):
    """A picture that is deleted after the reading: a DataError, too."""
    question, = read_jsonl(save(tmp_path, GOOD))
    (tmp_path / "good.png").unlink()
    with pytest.raises(DataError, match="own.jsonl:1: field 'image'"):
        question.open()


@pytest.mark.parametrize("name", ["missing.jsonl", ".", "no/such/folder.jsonl"])
def test_missing_file(tmp_path, name):
    with pytest.raises(DataError, match="no such file"):
        next(read_jsonl(tmp_path / name))


def test_the_summary(tmp_path):
    """`python -m lib.data` counts the good lines of a file, and says what is wrong with all others.
    """
    def run(*lines):
        command = [sys.executable, "-m", "lib.data", str(save(tmp_path, *lines))]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    (tmp_path / "large.png").write_bytes(png(20))
    (tmp_path / "cut.png").write_bytes(png()[:60])
    done = run(GOOD, GOOD | {"category": "pets", "image": "large.png"})
    assert done.returncode == 0 and "own.jsonl: 2 questions\n" in done.stdout
    assert "pets: 1" in done.stdout and "2: 2" in done.stdout
    done = run(b"?", GOOD, GOOD | {"image": "cut.png"})
    assert done.returncode == 1 and "own.jsonl: 1 questions\n" in done.stdout
    first, second = done.stderr.splitlines()
    assert "own.jsonl:1: expected" in first and "own.jsonl:3: field 'image'" in second
