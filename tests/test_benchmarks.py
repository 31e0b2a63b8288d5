"""The benchmarks' files are read as they are written, whatever stands in a field, and scored as their authors do."""
import base64
import csv
import io
import json
import random
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lib.benchmarks import chosen, correct, load, scores, shuffled
from lib.data import DataError, Question


def picture(colour=(200, 30, 30), size=(12, 9), kind="PNG") -> str:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, kind)
    return base64.b64encode(buffer.getvalue()).decode()


def noise(side: int) -> str:
    """A large field: noise does not compress."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(side).integers(0, 256, (side, side, 3), dtype=np.uint8)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


VSTAR = {"index": 0, "image": picture(), "question": "What colour is the cup?", "A": "red", "B": "blue", "C": "", "D": "",
         "answer": "A", "category": "direct_attributes"}
HR = {"index": 0, "question": "Which?", "answer": "B", "category": "single", "A": "1", "B": "2", "C": "3", "D": "4",
      "cycle_category": "0", "image": picture()}
MME = {"index": 0, "image": picture(kind="JPEG"), "question": "What does the sign say?",
       "multi-choice options": str([f"({letter}) {text}" for letter, text in zip("ABCDE", (
           "it's", 'a "quoted" word', "three", "four", "The image does not feature the content."))]),
       "answer": "B", "category": "Perception/OCR with Complex Context", "l2-category": "signage"}


def save(folder: Path, rows: list[dict], name="bench.tsv") -> Path:
    """As pandas' to_csv(sep="\\t", index=False) does: minimal quoting, doubled quotes, "\\n" at the ends."""
    file = folder / name
    with file.open("w", encoding="utf-8", newline="") as out:
        writer = csv.DictWriter(out, list(rows[0]), delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return file


def ask(benchmark: str, category="", answer="A", choices=("red", "blue", "green", "white", "none"), **meta) -> Question:
    return Question("?", answer, lambda: None, choices, category, meta={"benchmark": benchmark, **meta})


# ---- reading -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("row, name", [(VSTAR, "V*"), (HR, "HR-Bench"), (MME, "MME-RealWorld-Lite")])
def test_a_file_is_known_by_its_columns(tmp_path, row, name):
    """In any order of columns, under any name, with columns that nobody asked for."""
    items = [*row.items(), ("extra", "x")]
    for order in (items, items[::-1]):
        found, (question,) = load(save(tmp_path, [dict(order)], "anything.txt"))
        assert found == name and question.id == "0" and question.open().size == (12, 9)
        assert chosen(question, question.answer) == "ABCDE".index(row["answer"])


def test_fields_of_each_benchmark(tmp_path):
    _, (q,) = load(save(tmp_path, [VSTAR]))
    assert (q.prompt, q.answer, q.category) == ("What colour is the cup?\nOptions: (A) red (B) blue", "A", "direct_attributes")
    _, (q,) = load(save(tmp_path, [HR]))
    assert q.choices == ("1", "2", "3", "4") and q.meta["cycle_category"] == "0" and q.category == "single"
    _, (q,) = load(save(tmp_path, [MME]))
    assert q.choices == ("it's", 'a "quoted" word', "three", "four", "The image does not feature the content.")
    assert q.category == "Perception/OCR with Complex Context" and q.meta["l2-category"] == "signage"
    _, (q,) = load(save(tmp_path, [MME | {"category": "Reasoning", "l2-category": "Monitoring"}]))
    assert q.category == "Reasoning/Monitoring"  # whichever column the task stands in


def test_quotes_tabs_line_breaks_and_huge_fields(tmp_path):
    """What pandas quotes comes back as it was; offsets stay right behind it; fields pass the csv module's limit."""
    big = noise(260)
    assert len(big) > 131_072
    texts = ['a\ttab', 'a "quote"', 'two\nlines\n\nand "more"\r\nand\tmore', '"', 'plain', "5' by 3'", 'é 红 \u2028 x']
    rows = [VSTAR | {"index": i, "question": text, "A": text, "image": big if i % 2 else picture((i, 0, 0))} for i, text in enumerate(texts)]
    _, questions = load(save(tmp_path, rows))
    for i, (question, text) in enumerate(zip(questions, texts, strict=True)):
        assert question.text == text.strip() and question.choices[0] == text.strip()
        image = question.open()
        assert image.size == (260, 260) if i % 2 else image.getpixel((0, 0)) == (i, 0, 0)


def test_as_pandas_reads_windows_ends_byte_order_mark_and_unquoted_quotes(tmp_path):
    file = tmp_path / "a.tsv"
    header = "\t".join(VSTAR)
    line = "\t".join(str(v) for v in (VSTAR | {"question": 'a 5" screen', "index": 7}).values())
    file.write_bytes(f"\ufeff{header}\r\n{line}\r\n\r\n".encode())
    _, (question,) = load(file)
    assert question.text == 'a 5" screen' and question.id == "7" and question.open().size == (12, 9)


def test_empty_options_are_left_out_wherever_they_stand(tmp_path):
    """The right answer's letter moves with its text; "None" and "NA", which pandas would drop, are texts."""
    _, (a, b) = load(save(tmp_path, [VSTAR, VSTAR | {"A": "", "B": "None", "C": "NA", "D": "x", "answer": "D"}]))
    assert a.choices == ("red", "blue") and b.choices == ("None", "NA", "x") and b.answer == "C"


def test_shared_images(tmp_path):
    """A row may name the row that holds its image, above or below."""
    rows = [VSTAR | {"index": i, "image": image} for i, image in ((5, "9"), (9, picture((1, 2, 3))), (11, " 9"))]
    _, questions = load(save(tmp_path, rows))
    assert [q.open().getpixel((0, 0)) for q in questions] == [(1, 2, 3)] * 3


VSTAR_LINE = {"image": "direct_attributes/sa_1.png", "label": "A", "category": "direct_attributes", "question_id": 3,
              "text": "What is the material of the glove?\n(A) rubber\n(B) cotton\n(C) kevlar\n(D) leather\n"
                      "Answer with the option's letter from the given choices directly."}


def save_lines(folder: Path, *records) -> Path:
    (folder / "direct_attributes").mkdir(exist_ok=True)
    Image.new("RGB", (20, 10)).save(folder / "direct_attributes" / "sa_1.png")
    file = folder / "test_questions.jsonl"
    file.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return file


def test_vstar_jsonl(tmp_path):
    """Text and options are taken apart, options shuffled, and the right text stays right."""
    name, questions = load(save_lines(tmp_path, *(VSTAR_LINE | {"question_id": i, "label": label} for i, label in enumerate("ABCD" * 3))))
    assert name == "V*" and len({q.choices for q in questions}) > 3
    for question, right in zip(questions, ("rubber", "cotton", "kevlar", "leather") * 3, strict=True):
        assert sorted(question.choices) == ["cotton", "kevlar", "leather", "rubber"]
        assert question.text == "What is the material of the glove?" and question.open().size == (20, 10)
        assert question.choices["ABCD".index(question.answer)] == right and correct(question, right)


@pytest.mark.parametrize("n", [2, 4])
def test_shuffling_is_fixed_and_fair(n):
    """The first option (the right one) ends at each place equally often; the order never changes between runs."""
    letters = list("ABCD"[:n])
    places = Counter(shuffled(letters, str(i)).index("A") for i in range(4000))
    assert all(abs(places[k] - 4000 / n) < 4 * (4000 / n) ** .5 for k in range(n))
    assert shuffled(list("ABCD"), "0") == ["B", "D", "C", "A"]  # for ever


def test_your_own_jsonl_is_still_read(tmp_path):
    file = tmp_path / "own.jsonl"
    file.write_text(json.dumps({"image": picture(), "question": "Which?", "answer": "x"}) + "\n")
    name, (question,) = load(file)
    assert name == "" and question.text == "Which?" and not question.meta


def test_memory_stays_flat(tmp_path):
    """60 rows of 1 MB: reading them, and opening them one by one, holds about a row (ten, where csv needs its 4 bytes a letter)."""
    image = noise(500)
    rows = [HR | {"index": i, "image": image, "question": "q" if i % 2 else 'a "q"'} for i in range(60)]
    for part, most in ((rows[1::2] * 2, 6), (rows, 13)):
        file = save(tmp_path, part)
        assert file.stat().st_size > 60 * len(image) > 55e6
        tracemalloc.start()
        try:
            _, questions = load(file)
            kept, peak = tracemalloc.get_traced_memory()
            assert kept < 3e5 and peak < most * len(image)
            for question in questions[:9]:
                assert question.open().size == (500, 500)
            kept, peak = tracemalloc.get_traced_memory()
            assert kept < 3e5 and peak < most * len(image)
        finally:
            tracemalloc.stop()


BAD = {  # changes to a good row -> what the message names
    "no image": (VSTAR | {"image": ""}, "'image'.*nothing"), "no question": (VSTAR | {"question": " "}, "'question'"),
    "no index": (VSTAR | {"index": ""}, "'index'"), "answer not an option": (VSTAR | {"answer": "C"}, "'answer'.*A, B.*'C'"),
    "answer a text": (VSTAR | {"answer": "red"}, "'answer'"), "one option": (VSTAR | {"B": ""}, "two options"),
    "image no base64": (VSTAR | {"image": "<html>not found</html>"}, "'image'.*html"),
    "image of nobody": (VSTAR | {"image": "77"}, "'image'.*'77'"), "image its own": (VSTAR | {"image": "0", "index": 0}, "'image'.*'0'"),
    "options no list": (MME | {"multi-choice options": "(A) x (B) y"}, "multi-choice options.*list of five"),
    "options code": (MME | {"multi-choice options": "__import__('os').getcwd()"}, "multi-choice options"),
    "options numbers": (MME | {"multi-choice options": "[1, 2, 3, 4, 5]"}, "multi-choice options"),
    "options deep": (MME | {"multi-choice options": "[" * 9000}, "multi-choice options"),
    "four options": (MME | {"multi-choice options": "['(A) a', '(B) b', '(C) c', '(D) d']"}, "multi-choice options.*five")}


@pytest.mark.parametrize("row, names", [pytest.param(*case, id=name) for name, case in BAD.items()])
def test_bad_rows_are_named(tmp_path, row, names):
    good = (MME if "multi-choice options" in row else VSTAR) | {"index": "good", "question": "two\nlines"}
    file = save(tmp_path, [good, row])
    with pytest.raises(DataError, match=names) as error:
        load(file)
    assert str(file) in str(error.value) and len(str(error.value)) < 400 + len(str(file))
    assert "row 3" in str(error.value) or "index 0" in str(error.value)


@pytest.mark.parametrize("content, names", [
    (b"", "one JSON object|no questions|"), (b"index\timage\nx\ty\n", ":1: columns.*found"), (b"hello\n", "one JSON object"),
    ("\t".join(VSTAR).encode() + b"\n1\t2\n", "row 2.*9 fields, found 2"), ("\t".join(VSTAR).encode() + b"\n1\t\xff\n", "row 2.*UTF-8"),
    ("\t".join(VSTAR).encode() + b'\n1\t"never closed\n' + b"x\n" * 99, "row 2.*quote")])
def test_malformed_files_are_named(tmp_path, content, names):
    file = tmp_path / "bad.tsv"
    file.write_bytes(content)
    if not content:
        assert load(file) == ("", [])
        return
    with pytest.raises(DataError, match=names):
        load(file)
    with pytest.raises(DataError, match="no such file"):
        load(tmp_path / "missing.tsv")


@pytest.mark.parametrize("line, names", [
    (VSTAR_LINE | {"label": "E"}, "'label'.*A.*'E'"), (VSTAR_LINE | {"text": "no options"}, "two options"), (VSTAR_LINE | {"image": "x.png"}, "'image'"),
    (VSTAR_LINE | {"text": "q\n(A) a\n(C) c"}, "'text'"), (VSTAR_LINE | {"label": None}, "'label'"), ("[1]", "JSON object"), ("{", "JSON object"),
    ({k: v for k, v in VSTAR_LINE.items() if k != "category"}, "'category'")])
def test_bad_vstar_lines_are_named(tmp_path, line, names):
    with pytest.raises(DataError, match=names) as error:
        load(save_lines(tmp_path, VSTAR_LINE, line))
    assert "test_questions.jsonl:2" in str(error.value)


def test_broken_picture_is_named_when_opened(tmp_path):
    _, (question,) = load(save(tmp_path, [VSTAR | {"image": base64.b64encode(b"not a picture at all").decode()}]))
    with pytest.raises(DataError, match="row 2.*'image'"):
        question.open()


# ---- scoring -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("answer, index", [
    ("B", 1), ("(b)", 1), ("B.", 1), ("blue", 1), ("(B) blue", 1), (" Blue. ", 1), (None, None), ("", None), ("?", None), ("F", None),
    ("The answer is B", 1), ("The best answer is (B).", 1), ("Answer: blue", 1), ("The answer is", None), ("The answer is F", None),
    ("the blue one", None), ("Because it is red", None), ("A or B", None)])
def test_what_an_answer_names(answer, index):
    assert chosen(ask("V*"), answer) == chosen(ask("HR-Bench"), answer) == index


@pytest.mark.parametrize("answer, index", [
    ("the blue one is C", 2), ("The best answer is D", 3), ("Answer: C", 2), ("Best option: (E)", 4), ("option E, I think", 4), ("red", 0),
    ("A or B", 0), ("Because of D", 1), ("none of these", None), ("F", None)])
def test_first_letter_of_mme(answer, index):
    """The authors' rule: the first capital of A to E, wherever it stands, without "The best answer is" and its like."""
    assert chosen(ask("MME-RealWorld-Lite"), answer) == index


def test_options_that_are_letters_or_alike():
    """A lone letter is a letter, even if another option's text is that letter; equal texts are equally right."""
    question = ask("HR-Bench", answer="A", choices=("B", "A", "C", "C"))
    assert correct(question, "A") and not correct(question, "B")
    assert chosen(ask("V*", choices=("G", "F")), "F") == 1  # no option has the letter F, one has the text
    question = ask("HR-Bench", answer="D", choices=("B", "A", "C", "C"))
    assert correct(question, "D") and correct(question, "C") and not correct(question, "A")


def test_vstar_scores_by_hand():
    results = [(ask("V*", "direct_attributes"), r) for r in (True, True, False)] + [(ask("V*", "relative_position"), False)]
    random.Random(0).shuffle(results)
    assert scores("V*", results) == [("direct_attributes", 2 / 3, 3, 3), ("relative_position", 0., 1, 1), ("all", .5, 4, 4)]


def test_hr_bench_scores_by_hand():
    """2 questions x 4 cycles. Single: right in cycles 0, 1, 2; cross: right in cycle 0. The mean, not all four right."""
    results = [(ask("HR-Bench", kind, cycle_category=str(cycle)), right) for kind, rights in
               (("cross", (1, 0, 0, 0)), ("single", (1, 1, 1, 0))) for cycle, right in enumerate(map(bool, rights))]
    rows = scores("HR-Bench", results)
    assert {row[0]: row[1] for row in rows} == {
        "cycle 0, single": 1., "cycle 0, cross": 1., "cycle 0, all": 1., "cycle 1, single": 1., "cycle 1, cross": 0., "cycle 1, all": .5,
        "cycle 2, single": 1., "cycle 2, cross": 0., "cycle 2, all": .5, "cycle 3, single": 0., "cycle 3, cross": 0., "cycle 3, all": 0.,
        "mean of cycles, single": .75, "mean of cycles, cross": .25, "mean of cycles, all": .5}
    assert [row[0] for row in rows[-3:]] == ["mean of cycles, cross", "mean of cycles, single", "mean of cycles, all"]
    assert rows[-1][2:] == (8, 2)  # eight rows, but two questions: the interval is that of two


def test_hr_bench_cycles_weigh_the_same():
    """Cycle 0 has three rows, cycle 1 one: the mean over cycles is not the mean over rows."""
    results = [(ask("HR-Bench", "single", cycle_category="0"), True)] * 3 + [(ask("HR-Bench", "single", cycle_category="1"), False)]
    assert scores("HR-Bench", results)[-1][:3] == ("mean of cycles, all", .5, 4)


def test_mme_scores_by_hand():
    """Micro, not macro: Perception is (3 + 0) / (3 + 1), not the mean of its tasks' 1 and 0."""
    results = [(ask("MME", "Perception/OCR"), True)] * 3 + [(ask("MME", "Perception/Monitoring"), False), (ask("MME", "Reasoning/OCR"), True)]
    assert scores("MME-RealWorld-Lite", results) == [
        ("Perception/Monitoring", 0., 1, 1), ("Perception/OCR", 1., 3, 3), ("Reasoning/OCR", 1., 1, 1), ("Perception", .75, 4, 4),
        ("Reasoning", 1., 1, 1), ("all", .8, 5, 5)]
