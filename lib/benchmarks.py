"""The benchmarks' own files, and how each is scored: V*, HR-Bench 4K and 8K, MME-RealWorld-Lite.

What it teaches: a number is comparable only if the questions are read, asked and counted as others
do. And a file of gigabytes needs no memory: a question keeps the place of its row in the file, and
`open()` reads that one row again.

    V*                  VStarBench.tsv, or test_questions.jsonl beside its folders of images
                        -> accuracy of each category, and of all rows
    HR-Bench            hr_bench_4k.tsv, hr_bench_8k.tsv: each question 4 times, options rotated
                        -> accuracy of each cycle, and the mean over the cycles
    MME-RealWorld-Lite  mme_realworld_lite.tsv, options (A) to (E)
                        -> accuracy of each task, of Perception, of Reasoning, and of all rows

A file is known by its columns, not by its name. Two rules say which option an answer names: the
reference's, to compare with others, and ours (docs/scoring.md).

Run it:  python -m lib.benchmarks FILE      # rows, categories, right answers, the first questions
"""
import argparse
import ast
import csv
import functools
import hashlib
import json
import re
from collections.abc import Iterator
from itertools import chain, count
from pathlib import Path
from statistics import fmean
from typing import BinaryIO

from lib.data import (DataError, Question, choose, describe, expect, image_opener, is_text,
                      listed, normalise, noted, parse_object, read_jsonl)

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
COLUMNS = ["index", "image", "question", "answer", "category"]
MORE_COLUMNS = {"HR-Bench": ["A", "B", "cycle_category"],      # the first that a file has all of
                "MME-RealWorld-Lite": ["multi-choice options", "l2-category"], "V*": ["A", "B"]}
VSTAR_FIELDS = ("image", "text", "label", "category")   # of test_questions.jsonl
MAX_ROW = 2**27     # bytes: a quote that is never closed must not swallow a file of gigabytes
BOM = b"\xef\xbb\xbf"


# ---- files -> questions --------------------------------------------------------------------------

def load(path: str | Path, bad: list[DataError] | None = None) -> tuple[str, list[Question]]:
    """The benchmark's name and its questions; "" for your own .jsonl (lib/data.py).

    bad: takes the errors of rows, which are left out; None: the first is raised. Raises DataError
    with file, row, field, what was found and what was expected."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file; expected a benchmark's .tsv, or a .jsonl")
    with path.open("rb") as file:
        first = file.readline(2**20)
    if b"\t" in first and not first.removeprefix(BOM).startswith(b"{"):
        return read_tsv(path, bad)
    try:
        is_vstar = {*VSTAR_FIELDS, "question_id"} <= set(json.loads(first))
    except (ValueError, TypeError, RecursionError):
        is_vstar = False   # read_jsonl says what is wrong
    return ("V*", read_vstar(path, bad)) if is_vstar else ("", list(read_jsonl(path, bad)))


def read_tsv(path: Path, bad: list[DataError] | None) -> tuple[str, list[Question]]:
    """One pass over the file, with one row in memory at a time."""
    questions, openers, borrowed = [], {}, []
    with path.open("rb") as file:
        file.seek(len(BOM) if file.read(len(BOM)) == BOM else 0)
        columns = [column.strip() for column in read_row(file, f"{path}:1")]
        names = [name for name, more in MORE_COLUMNS.items() if {*COLUMNS, *more} <= {*columns}]
        known = f"{COLUMNS} and those of one of {MORE_COLUMNS}"
        expect(names, f"{path}:1", "columns", known, columns)
        for where, offset, fields in read_rows(file):
            with noted(bad):
                row, wide = dict(zip(columns, fields)), len(columns)
                expect(len(fields) == wide, where, "columns", f"{wide}", len(fields))
                question, image = tsv_question(names[0], row, where), row["image"].strip()
                if len(image) <= 64 and image.isdigit():   # the index of the row with the image
                    borrowed.append((question, image))
                else:
                    column = columns.index("image")
                    again = functools.partial(read_image_field, path, offset, column)
                    question.open = image_opener(image, path.parent, where, again)
                    openers.setdefault(question.id, question.open)
                questions.append(question)
    for question, index in borrowed:                       # that row may stand below
        with noted(bad):
            found = index in openers
            expect(found, question.where, "image", "base64, or the index of a row with one", index)
            question.open = openers[index]
    return names[0], [question for question in questions if question.open]


def read_rows(file: BinaryIO) -> Iterator[tuple[str, int, list[str]]]:
    """Each row below the header: where it stands, its byte offset, its fields."""
    for number in count(2):                            # rows, not lines: a row may take several
        offset = file.tell()
        where = f"{file.name}: row {number} (byte {offset})"
        fields = read_row(file, where)
        if fields is None:
            return
        if fields != [""]:
            yield where, offset, fields


def read_row(file: BinaryIO, where: str) -> list[str] | None:
    """The fields of the row that begins where the file stands; None at the end.

    As pandas writes them: a field that holds a tab, a quote or a line break stands in quotes, and
    quotes inside are doubled. So a line without a quote is a row, and can be split at its tabs.
    Else the csv module reads one row, over as many lines as it takes."""
    csv.field_size_limit(MAX_ROW)                      # its own is shorter than most images
    lines = lines_of_a_row(file)
    try:
        first = next(lines, None)
        if first is None or '"' not in first:
            return first and first.rstrip("\r\n").split("\t")
        return next(csv.reader(chain([first], lines), delimiter="\t", strict=True))
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{where}: expected tab-separated UTF-8 with every quote closed, "
                        f"found: {error}") from None


def lines_of_a_row(file: BinaryIO) -> Iterator[str]:
    """As many as the row takes, MAX_ROW bytes at most."""
    left = MAX_ROW
    while line := file.readline(left):
        left -= len(line)
        if not left:
            raise csv.Error(f"no end within {MAX_ROW:,} bytes")
        yield line.decode()


def read_image_field(path: Path, offset: int, column: int) -> str:
    with path.open("rb") as file:
        file.seek(offset)
        return read_row(file, str(path))[column].strip()


def tsv_question(name: str, row: dict[str, str], where: str) -> Question:
    """A row's question, still without its image."""
    row = {column: text.strip() for column, text in row.items() if column != "image"}
    for field in ("index", "question"):
        expect(row[field], where, field, "a text that is not empty", row[field])
    category, meta = row["category"], {"benchmark": name}
    if name == "MME-RealWorld-Lite":
        options = mme_options(row["multi-choice options"], where)
        if "/" not in category:   # "Perception/Remote Sensing": what is asked, and where
            category = f"{category}/{row['l2-category']}"
    else:                         # absent options are empty fields
        options = {letter: row[letter] for letter in "ABCDEFGH" if row.get(letter)}
    if name == "HR-Bench":
        meta["cycle_category"] = row["cycle_category"]
    return Question(row["question"], right_letter(options, row["answer"], where, "answer"), None,
                    tuple(options.values()), category, id=row["index"], meta=meta, where=where)


def mme_options(text: str, where: str) -> dict[str, str]:
    """"['(A) red', .. '(E) ..']" -> {"A": "red", ..}."""
    try:
        options = ast.literal_eval(text) if len(text) < 20_000 else None
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        options = None
    is_five = isinstance(options, list) and len(options) == 5 and all(map(is_text, options))
    expect(is_five, where, "multi-choice options", "a list of five texts '(A) ...'", text)
    return {letter: re.sub(rf"^\s*\({letter}\)\s*", "", option).strip()
            for letter, option in zip("ABCDE", options)}


def right_letter(options: dict[str, str], answer: str, where: str, field: str) -> str:
    """The right answer's letter in the file -> its letter in the order of these options."""
    expect(len(options) >= 2, where, "options", "at least two options", list(options.values()))
    letter = answer.strip("(). ").upper()
    expect(letter in options, where, field, f"one of {', '.join(options)}", answer)
    return LETTERS[list(options).index(letter)]


def read_vstar(path: Path, bad: list[DataError] | None) -> list[Question]:
    """V*'s test_questions.jsonl: {"image", "text": "question\\n(A) ..\\n(B) ..\\nAnswer with ..",
    "label": "A", "category", "question_id"}."""
    questions = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                with noted(bad):
                    questions.append(vstar_question(line, path.parent, f"{path}:{number}"))
    return questions


def vstar_question(line: bytes, folder: Path, where: str) -> Question:
    """In this file the right option comes first, so the options are shuffled."""
    record = parse_object(line, where, VSTAR_FIELDS)
    number = record.get("question_id")
    plain = isinstance(number, str | int) and is_text(str(number))
    expect(plain, where, "question_id", "a number", number)
    text, *parts = re.split(r"^\s*\(([A-Z])\)", record["text"], flags=re.MULTILINE)
    letters, texts = "".join(parts[::2]), parts[1::2]
    in_order = LETTERS.startswith(letters)
    expect(in_order, where, "text", "lines '(A) ..', '(B) ..'", record["text"])
    options = {}
    for letter in shuffled(letters, str(number)):
        options[letter] = texts[letters.index(letter)].strip().split("\n")[0].strip()
    answer = right_letter(options, record["label"], where, "label")
    return Question(text.strip(), answer, image_opener(record["image"].strip(), folder, where),
                    tuple(options.values()), record["category"].strip(), id=str(number),
                    meta={"benchmark": "V*"}, where=where)


def shuffled(letters: str, key: str) -> list[str]:
    """An order that depends on the question's id alone: the same in every run, on every machine."""
    return sorted(letters, key=lambda letter: hashlib.sha256(f"0/{key}/{letter}".encode()).digest())


# ---- answers -> right or wrong -------------------------------------------------------------------

API_FAILED = "Failed to obtain answer via API"
REFUSALS = ("Sorry, I can't help with images of people yet.", "I can't process this file.",
            "I'm sorry, but without the image provided", "Cannot determine the answer")
SIGNS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
MME_PREFIXES = ("The best answer is", "The correct answer is", "The answer is", "The answer")
OUR_PREFIXES = re.compile(r"\b(the )?((best|correct) )?(answer|option)\b( is)?:?", re.IGNORECASE)


def chosen(question: Question, answer: str | None) -> int | None:
    """Which option an answer names, by the rule of the benchmark's reference (docs/scoring.md)."""
    if answer is None or not question.meta:
        return chosen_by_us(question, answer)
    if question.meta["benchmark"] == "MME-RealWorld-Lite":
        return chosen_by_authors(answer, question.choices)
    return chosen_by_vlmevalkit(answer, question.choices)


def chosen_by_vlmevalkit(answer: str, choices: tuple[str, ...]) -> int | None:
    """Its rule without a judge: the only letter, if among the last four words; else the only text.
    When the API has failed, it looks for a text alone."""
    if API_FAILED not in answer:
        words = answer.translate(SIGNS).split()
        named = [letter for letter in LETTERS[:len(choices)] if letter in words]
        refused = any(refusal in answer for refusal in REFUSALS)
        if refused or (not named and "Z" in words):
            return None
        if len(named) == 1 and words.index(named[0]) >= len(words) - 4:
            return LETTERS.index(named[0])
    said = answer.lower()
    if len(said) > 2 * sum(len(choice) for choice in choices):
        return None
    named = [i for i, choice in enumerate(choices) if choice.lower() in said]
    return named[0] if len(named) == 1 else None


def chosen_by_authors(answer: str, choices: tuple[str, ...]) -> int | None:
    """MME-RealWorld's script: the first capital A to E; else the first option that holds it all."""
    said = answer.strip()
    for prefix in MME_PREFIXES:
        said = said.replace(prefix, "")
    if letter := re.search("[A-E]", said):
        return LETTERS.index(letter[0])
    if len(said.split()) > 10:
        return None
    options = [f"({letter}) {choice}".lower() for letter, choice in zip(LETTERS, choices)]
    return next((i for i, option in enumerate(options) if said.lower() in option), None)


def chosen_by_us(question: Question, answer: str | None) -> int | None:
    """Our rule: a letter alone, an option's text, or both, with or without "The answer is". For
    MME-RealWorld-Lite then the first capital A to E, as a letter in a sentence counts there."""
    if answer is None:
        return None
    if not question.meta:
        return choose(answer, question.choices)
    plain = OUR_PREFIXES.sub("", answer)
    for text in (answer, plain):
        letter = re.fullmatch(r"\s*\(?([A-Z])[).:]*\s*", text)   # first: a text may be "B", too
        if letter and letter[1] in LETTERS[:len(question.choices)]:
            return LETTERS.index(letter[1])
        option = choose(text, question.choices) if normalise(text) else None
        if option is not None:
            return option
    letter = re.search("[A-E]", plain)
    if letter and question.meta["benchmark"] == "MME-RealWorld-Lite":
        return LETTERS.index(letter[0])
    return None


def correct(question: Question, answer: str | None, rule: str = "reference") -> bool:
    """Is the answer to a benchmark's question right? The reference compares letters; "ours" takes
    another option with the right one's text for right, too. Raises ValueError for other rules."""
    right = LETTERS.index(question.answer)
    if rule == "reference":
        return chosen(question, answer) == right
    if rule == "ours":
        option = chosen_by_us(question, answer)
        return option is not None and question.choices[option] == question.choices[right]
    raise ValueError(f"rule: expected reference or ours, found {rule!r}")


# ---- right or wrong -> the benchmark's table -----------------------------------------------------

def accuracies(results: list[tuple[Question, bool]]) -> list[tuple[str, float, int, float]]:
    """The benchmark's own table from (question, right?): rows of label, accuracy, rows counted, and
    how many independent questions these are: HR-Bench's four rotations are one question."""
    groups, cycles = {}, {}
    for question, right in results:
        for place in places(question):
            groups.setdefault(place, []).append(right)
    rows = []
    for (_, label, kind), part in sorted(groups.items()):
        rows.append((label, fmean(part), len(part), len(part)))
        if kind:
            cycles.setdefault(kind, []).append(part)
    for kind, parts in cycles.items():
        mean, n = fmean(map(fmean, parts)), sum(map(len, parts))
        rows.append((f"mean of cycles, {kind}", mean, n, n / len(parts)))
    return rows


def places(question: Question) -> list[tuple[int, str, str]]:
    """The rows in which a question counts: order, label; and what is averaged over the cycles."""
    category = question.category or "(none)"
    if cycle := question.meta.get("cycle_category"):
        return [(0, f"cycle {cycle}, {category}", category), (1, f"cycle {cycle}, all", "all")]
    if question.meta["benchmark"] == "MME-RealWorld-Lite":
        return [(0, category, ""), (1, category.split("/")[0], ""), (2, "all", "")]
    return [(0, category, ""), (2, "all", "")]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Say what is in a benchmark's file.")
    parser.add_argument("file")
    path, bad = parser.parse_args().file, []
    try:
        name, questions = load(path, bad)
        describe(name or "your own questions", questions, bad)
    except DataError as error:     # nothing below it can be told apart
        raise SystemExit(listed([*bad, error]))
