"""The benchmarks' files are read as they are written, whatever stands in a field, and counted as
their references count. How an answer is read: test_scoring.py."""
import base64
import csv
import io
import json
import random
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import ROOT
from lib import benchmarks
from lib.benchmarks import accuracies, chosen_by_us, correct, load
from lib.data import DataError
from lib.question import Question


def encoded(image: Image.Image, kind: str = "PNG") -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return base64.b64encode(buffer.getvalue()).decode()


def picture(colour=(200, 30, 30), kind="PNG") -> str:
    return encoded(Image.new("RGB", (12, 9), colour), kind)


def noise(side: int) -> str:
    """A large field: noise does not compress."""
    pixels = np.random.default_rng(side).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return encoded(Image.fromarray(pixels))


VSTAR = {"index": 0, "image": picture(), "question": "What colour is the cup?",
         "A": "red", "B": "blue", "C": "", "D": "", "answer": "A", "category": "direct_attributes"}
HR = {"index": 0, "question": "Which?", "answer": "B", "category": "single",
      "A": "1", "B": "2", "C": "3", "D": "4", "cycle_category": "0", "image": picture()}
MME = {"index": 0, "image": picture(kind="JPEG"), "question": "What does the sign say?",
       "multi-choice options": str(["(A) it's", '(B) a "quoted" word', "(C) three", "(D) four",
                                    "(E) The image does not feature the content."]),
       "answer": "B", "category": "Perception/OCR with Complex Context", "l2-category": "signage"}


def save(folder: Path, rows: list[dict], name="bench.tsv") -> Path:
    """As pandas' to_csv(sep="\\t", index=False) does: quotes only where needed, doubled inside."""
    file = folder / name
    with file.open("w", encoding="utf-8", newline="") as out:
        writer = csv.DictWriter(out, list(rows[0]), delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return file


# ---- reading -------------------------------------------------------------------------------------

@pytest.mark.parametrize("row, name", [(VSTAR, "V*"), (HR, "HR-Bench"),
                                       (MME, "MME-RealWorld-Lite")])
def test_a_file_is_known_by_its_columns(tmp_path, row, name):
    """In any order of columns, under any name, with columns that nobody asked for."""
    items = [*row.items(), ("extra", "x")]
    for order in (items, items[::-1]):
        found, (question,) = load(save(tmp_path, [dict(order)], "anything.txt"))
        assert found == name and question.id == "0" and question.open().size == (12, 9)
        assert question.answer == row["answer"] and correct(question, row["answer"])


def test_fields_of_each_benchmark(tmp_path):
    """The agent reads the options one a line, as VLMEvalKit asks."""
    _, (q,) = load(save(tmp_path, [VSTAR]))
    assert q.prompt == "What colour is the cup?\nOptions:\nA. red\nB. blue"
    assert q.answer == "A" and q.category == "direct_attributes"
    _, (q,) = load(save(tmp_path, [HR]))
    assert q.choices == ("1", "2", "3", "4") and q.category == "single"
    assert q.cycle == "0"
    _, (q,) = load(save(tmp_path, [MME]))
    assert q.choices == ("it's", 'a "quoted" word', "three", "four",
                         "The image does not feature the content.")
    assert q.category == "Perception/OCR with Complex Context"
    _, (q,) = load(save(tmp_path, [MME | {"category": "Reasoning", "l2-category": "Monitoring"}]))
    assert q.category == "Reasoning/Monitoring"   # whichever column the task stands in


def test_quotes_tabs_line_breaks_and_huge_fields(tmp_path):
    """What pandas quotes comes back as it was, and what stands behind it is still found. A field
    may be longer than the csv module's own limit."""
    big = noise(260)
    assert len(big) > 131_072
    texts = ["a\ttab", 'a "quote"', 'two\nlines\n\nand "more"\r\nand\tmore', '"', "plain",
             "5' by 3'", "é 红 \u2028 x"]
    rows = [VSTAR | {"index": i, "question": text, "A": text,
                     "image": big if i % 2 else picture((i, 0, 0))} for i, text in enumerate(texts)]
    _, questions = load(save(tmp_path, rows))
    for i, (question, text) in enumerate(zip(questions, texts, strict=True)):
        assert question.text == question.choices[0] == text
        image = question.open()
        assert image.size == (260, 260) if i % 2 else image.getpixel((0, 0)) == (i, 0, 0)


def test_windows_line_ends_byte_order_mark_and_lone_quotes(tmp_path):
    """As pandas reads them; an empty line is no row."""
    file, row = tmp_path / "a.tsv", VSTAR | {"question": 'a 5" screen', "index": 7}
    line = "\t".join(str(value) for value in row.values())
    header = chr(9).join(row)
    for first in (header, header.replace("index", '"index"')):
        file.write_bytes(f"\ufeff{first}\r\n{line}\r\n\r\n".encode())
        _, (question,) = load(file)
        assert question.text == 'a 5" screen' and question.id == "7"
        assert question.open().size == (12, 9)


def test_empty_options_are_left_out_wherever_they_stand(tmp_path):
    """The right answer's letter moves with its text. "None" and "NA", which pandas would drop, are
    texts."""
    row = VSTAR | {"A": "", "B": "None", "C": "NA", "D": "x", "answer": "D"}
    _, (question,) = load(save(tmp_path, [row]))
    assert question.choices == ("None", "NA", "x") and question.answer == "C"


def test_shared_images(tmp_path):
    """A row may name the row that holds its image, above or below: the first with that index."""
    images = [(5, "9"), (9, picture((1, 2, 3))), (11, " 9"), (9, picture((4, 5, 6))), (12, "9")]
    rows = [VSTAR | {"index": i, "image": image} for i, image in images]
    _, questions = load(save(tmp_path, rows))
    found = [question.open().getpixel((0, 0)) for question in questions]
    assert found == [(1, 2, 3)] * 3 + [(4, 5, 6), (1, 2, 3)]


def test_your_own_jsonl_is_still_read(tmp_path):
    record = {"image": "a.png", "question": "A tab:\t?", "answer": "x"}
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    file = tmp_path / "own.jsonl"
    file.write_text(json.dumps(record).replace(": ", ":\t") + "\n")   # JSON may hold tabs, too
    name, (question,) = load(file)
    assert name == "" and question.answer == "x" and not question.benchmark
    file.write_text("")
    assert load(file) == ("", [])


def test_memory_stays_flat(tmp_path):
    """60 rows of 1 MB. Reading them, and opening them one by one, holds a few rows at most (more
    where the csv module needs its 4 bytes a letter)."""
    image = noise(500)
    plain = HR | {"image": image, "question": "q"}
    for row, most in ((plain, 6), (plain | {"question": 'a "q"'}, 13)):
        file = save(tmp_path, [row | {"index": i} for i in range(60)])
        assert file.stat().st_size > 60 * len(image) > 55e6
        tracemalloc.start()
        try:
            _, questions = load(file)
            for question in questions[:9]:
                assert question.open().size == (500, 500)
            kept, peak = tracemalloc.get_traced_memory()
            assert kept < 3e5 and peak < most * len(image)
        finally:
            tracemalloc.stop()


# ---- hostile files -------------------------------------------------------------------------------

BAD = {   # changes to a good row -> what the message names
    "no image": (VSTAR | {"image": ""}, "'image'.*base64, or .*found ''"),
    "no question": (VSTAR | {"question": " "}, "'question'"),
    "no index": (VSTAR | {"index": ""}, "'index'"),
    "no answer": (VSTAR | {"answer": ""}, "'answer'"),
    "answer not an option": (VSTAR | {"answer": "C"}, "'answer'.*A, B.*'C'"),
    "answer a text": (VSTAR | {"answer": "red"}, "'answer'"),
    "one option": (VSTAR | {"B": ""}, "two options"),
    "image no base64": (VSTAR | {"image": "<html>not found</html>"}, "'image'.*html"),
    "image of nobody": (VSTAR | {"image": "77"}, "'image'.*'77'"),
    "image its own": (VSTAR | {"image": "0", "index": 0}, "'image'.*'0'"),
    "options no list": (MME | {"multi-choice options": "(A) x (B) y"}, "options.*list of five"),
    "options code": (MME | {"multi-choice options": "__import__('os').getcwd()"}, "options"),
    "options numbers": (MME | {"multi-choice options": "[1, 2, 3, 4, 5]"}, "options"),
    "option a lone surrogate": (MME | {"multi-choice options": "['\\ud800', 'b', 'c', 'd', 'e']"},
                                "options.*five"),
    "options deep": (MME | {"multi-choice options": "[" * 9000}, "options"),
    "four options": (MME | {"multi-choice options": "['(A) a', '(B) b', '(C) c', '(D) d']"},
                     "options.*five")}


@pytest.mark.parametrize("row, names", BAD.values(), ids=BAD)
def test_bad_rows_are_named(tmp_path, row, names):
    """Rows are counted, not lines: the second row has two lines."""
    good = (MME if "multi-choice options" in row else VSTAR) | {"index": 9, "question": "two\nrows"}
    file = save(tmp_path, [good, row])
    with pytest.raises(DataError, match=f"row 3 .*{names}") as error:
        load(file)
    assert str(file) in str(error.value) and len(str(error.value)) < 400 + len(str(file))


HEADER = "\t".join(VSTAR).encode() + b"\n"


@pytest.mark.parametrize("content, names", [
    (b"index\timage\nx\ty\n", ":1: field 'columns'.*cycle_category.*found"),
    (b"hello\n", "one JSON object"), (HEADER + b"1\t2\n", "row 2.*expected 9, found 2"),
    (HEADER + b"1\t\xff\n", "row 2.*UTF-8"),
    (HEADER + b'1\t"never closed\n' + b"x\n" * 99, "row 2.*quote"), (None, "no such file")])
def test_malformed_files_are_named(tmp_path, content, names):
    file = tmp_path / "bad.tsv"
    if content:
        file.write_bytes(content)
    with pytest.raises(DataError, match=names):
        load(file)


def test_a_quote_that_is_never_closed_swallows_little(tmp_path, monkeypatch):
    """The reader stops at its limit, however long the file is, and names the row. So does a line
    without an end. A row within the limit may have any number of lines."""
    monkeypatch.setattr(benchmarks, "MAX_FIELD", 100_000)
    rest = b"x\n" * 4_000_000
    for row, names in ((b'1\t"never closed\n' + rest, "every quote closed, .*limit .100000"),
                       (b"y" * 8_000_000, "expected 9, found 1")):
        file = tmp_path / "bad.tsv"
        file.write_bytes(HEADER + row)
        tracemalloc.start()
        start = time.process_time()
        with pytest.raises(DataError, match=f"row 2 .*{names}"):
            load(file)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 3e6 and time.process_time() - start < 2
    _, (question,) = load(save(tmp_path, [VSTAR | {"question": "line\n" * 10_000}]))
    assert question.text.count("\n") == 9_999


def test_bad_rows_can_be_left_out(tmp_path):
    """All of them are named. Another row may borrow the picture of one whose answer is wrong, but
    none of a row that is not there."""
    rows = [VSTAR | {"answer": "C"}, VSTAR | {"index": 1}, VSTAR | {"index": 2, "image": "1"},
            VSTAR | {"index": 3, "image": "0"}, VSTAR | {"index": 4, "image": "9"}]
    bad = []
    _, questions = load(save(tmp_path, rows), bad)
    assert [question.id for question in questions] == ["1", "2", "3"]
    assert [str(error).split("row ")[1][0] for error in bad] == ["2", "6"]
    assert questions[2].open().size == questions[0].open().size


def test_a_broken_picture_is_named_when_opened(tmp_path):
    for broken in (base64.b64encode(b"not a picture at all" * 9).decode(), picture() + "!"):
        _, (question,) = load(save(tmp_path, [VSTAR | {"image": broken}]))
        with pytest.raises(DataError, match="row 2.*'image'"):
            question.open()


def test_the_command(tmp_path):
    """It says what is in a file, or in one line what is wrong with it."""
    for row, code in ((VSTAR, 0), (VSTAR | {"answer": "C"}, 1)):
        command = [sys.executable, "-m", "lib.benchmarks", str(save(tmp_path, [row]))]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == code
        if code:
            assert "row 2" in done.stderr and done.stderr.count("\n") == 1
        else:
            assert done.stdout.startswith("V*: 1 questions\n") and "A. red\nB. blue" in done.stdout


def test_imports_go_one_way():
    """reward.py stands on this module, so this module must not ask it for anything."""
    lines = (ROOT / "lib/benchmarks.py").read_text().splitlines()
    modules = {line.split()[1] for line in lines if line.startswith(("import ", "from "))}
    assert {name for name in modules if (ROOT / f"{name.replace('.', '/')}.py").exists()} == {
        "lib.data", "lib.question"}


# ---- our rule ------------------------------------------------------------------------------------

def ask(benchmark: str, category="", choices=("red", "blue", "green", "white", "none"), cycle=""):
    return Question("?", "A", None, choices, category, benchmark=benchmark, cycle=cycle)


@pytest.mark.parametrize("answer, index, in_mme", [
    ("B", 1, 1), ("(b)", 1, 1), ("blue", 1, 1), ("(B) blue", 1, 1), (" Blue. ", 1, 1),
    ("The best answer is (B).", 1, 1), ("Answer: blue", 1, 1), ("Best option: (E)", 4, 4),
    ("", None, None), ("?", None, None), ("F", None, None), ("The answer is", None, None),
    ("the blue one", None, None), ("none of these", None, None),
    # a letter in a sentence counts in MME-RealWorld-Lite alone: the first capital A to E
    ("A or B", None, 0), ("the blue one is C", None, 2), ("option E, I think", None, 4)])
def test_our_rule(answer, index, in_mme):
    assert chosen_by_us(ask("V*"), answer) == chosen_by_us(ask("HR-Bench"), answer) == index
    assert chosen_by_us(ask("MME-RealWorld-Lite"), answer) == in_mme


def test_a_lone_letter_is_a_letter():
    """Even if another option's text is that letter; a letter that no option has may be a text."""
    assert chosen_by_us(ask("V*", choices=("B", "A")), "A") == 0
    assert chosen_by_us(ask("V*", choices=("G", "F")), "F") == 1


# ---- the tables ----------------------------------------------------------------------------------

def test_vstar_by_hand():
    results = [(ask("V*", "direct_attributes"), right) for right in (True, True, False)]
    results.append((ask("V*", "relative_position"), False))
    random.Random(0).shuffle(results)
    assert accuracies(results) == [("direct_attributes", 2 / 3, 3, 3),
                                   ("relative_position", 0., 1, 1), ("all", .5, 4, 4)]


def test_hr_bench_by_hand():
    """2 questions x 4 cycles. Single: right in cycles 0, 1, 2; cross: right in cycle 0. It is the
    mean, not "right in all four". Eight rows are two questions: the interval is that of two."""
    rights = {"cross": (True, False, False, False), "single": (True, True, True, False)}
    results = [(ask("HR-Bench", kind, cycle=str(cycle)), rights[kind][cycle])
               for kind in rights for cycle in range(4)]
    assert accuracies(results) == [("cross", .25, 4, 1), ("single", .75, 4, 1), ("all", .5, 8, 2)]


def test_hr_bench_cycles_weigh_the_same():
    """Cycle 0 has three rows, cycle 1 one: the mean over cycles is not the mean over rows."""
    results = [(ask("HR-Bench", "single", cycle="0"), True)] * 3
    results.append((ask("HR-Bench", "single", cycle="1"), False))
    assert accuracies(results)[-1][:3] == ("all", .5, 4)


def test_mme_by_hand():
    """All rows weigh the same: Perception is (3 + 0) / (3 + 1), not the mean of 1 and 0."""
    name = "MME-RealWorld-Lite"
    results = [(ask(name, "Perception/OCR"), True)] * 3
    results += [(ask(name, "Perception/Monitoring"), False), (ask(name, "Reasoning/OCR"), True)]
    assert accuracies(results) == [
        ("Perception/Monitoring", 0., 1, 1), ("Perception/OCR", 1., 3, 3),
        ("Reasoning/OCR", 1., 1, 1), ("Perception", .75, 4, 4), ("Reasoning", 1., 1, 1),
        ("all", .8, 5, 5)]
