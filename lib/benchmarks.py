"""The benchmarks' own files, and how each is scored: V*, HR-Bench 4K and 8K, MME-RealWorld-Lite.

What it teaches: a number is comparable only if the questions are read, asked and counted as others
do. And a file of gigabytes needs no memory: a question keeps the place of its row in the file, and
`open()` reads that one row again.

    V*                  VStarBench.tsv
                        -> accuracy of each category, and of all rows
    HR-Bench            hr_bench_4k.tsv, hr_bench_8k.tsv: each question 4 times, options rotated
                        -> the same, as the mean over the four cycles
    MME-RealWorld-Lite  mme_realworld_lite.tsv, options (A) to (E)
                        -> accuracy of each task, of Perception, of Reasoning, and of all rows

A file is known by its columns, not by its name. Two rules say which option an answer names: the
reference's, to compare with others, and ours (docs/scoring.md).

Run it:  python -m lib.benchmarks FILE      # rows, categories, right answers, the first questions
"""
import argparse
import ast
import base64
import csv
import functools
import io
import re
from collections.abc import Iterator
from itertools import chain, count
from pathlib import Path
from statistics import fmean
from typing import BinaryIO

from lib.data import DataError, describe, expect, is_text, listed, noted, opener, read_jsonl
from lib.question import Question, choose, normalise

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
COLUMNS = ["index", "image", "question", "answer", "category"]
MORE_COLUMNS = {"HR-Bench": ["A", "B", "cycle_category"],      # the first that a file has all of
                "MME-RealWorld-Lite": ["multi-choice options", "l2-category"], "V*": ["A", "B"]}
MAX_FIELD = 2**27   # letters: a quote that is never closed must not swallow a file of gigabytes


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
    if b"\t" in first and b"{" not in first:       # names of columns, and no JSON
        return read_tsv(path, bad)
    return "", list(read_jsonl(path, bad))


def read_tsv(path: Path, bad: list[DataError] | None) -> tuple[str, list[Question]]:
    """One pass over the file, with one row in memory at a time."""
    questions, openers, borrowed = [], {}, []
    with path.open("rb") as file:
        columns = [column.strip() for column in read_row(file, f"{path}:1")]
        name = benchmark_with(columns, f"{path}:1")
        for where, offset, fields in read_rows(file):
            with noted(bad):
                expect(len(fields) == len(columns), where, "columns", len(columns), len(fields))
                row = dict(zip(columns, fields))
                image, index, load = row["image"].strip(), row["index"].strip(), None
                if len(image) > 64 and index:              # else the index of a row that has it
                    column = columns.index("image")
                    load = opener(functools.partial(read_image, path, offset, column), where)
                    openers.setdefault(index, load)
                question = tsv_question(name, row, where)
                question.open = load
                questions.append(question)
                if load is None:
                    borrowed.append((question, image))
    for question, index in borrowed:                       # that row may stand below
        question.open = openers.get(index)
        with noted(bad):
            expect(question.open, question.where, "image", "base64, or the index of a row with it",
                   index)
    return name, [question for question in questions if question.open]


def benchmark_with(columns: list[str], where: str) -> str:
    """The name of the benchmark whose files have these columns."""
    names = [name for name, more in MORE_COLUMNS.items() if {*COLUMNS, *more} <= {*columns}]
    known = f"{COLUMNS} and those of one of {MORE_COLUMNS}"
    expect(names, where, "columns", known, columns)
    return names[0]


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
    Else the csv module, which takes ten times as long, reads as many lines as the row has."""
    csv.field_size_limit(MAX_FIELD)                    # its own is shorter than most images
    lines = lines_of(file)
    try:
        first = next(lines, None)
        if first is None:
            return None
        if '"' not in first:
            return first.rstrip("\r\n").split("\t")
        return next(csv.reader(chain([first], lines), delimiter="\t", strict=True))
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{where}: expected tab-separated UTF-8 with every quote closed, "
                        f"found: {error}") from None


def lines_of(file: BinaryIO) -> Iterator[str]:
    """Without the byte-order mark of Windows. A line without an end comes in parts."""
    while line := file.readline(MAX_FIELD + 1):
        yield line.decode("utf-8-sig")


def read_image(path: Path, offset: int, column: int) -> io.BytesIO:
    """The picture of the row at `offset`, in base64: a list of questions need not hold pictures."""
    with path.open("rb") as file:
        file.seek(offset)
        text = read_row(file, str(path))[column]
    return io.BytesIO(base64.b64decode(text.strip(), validate=True))


def tsv_question(name: str, row: dict[str, str], where: str) -> Question:
    """A row's question, still without its image."""
    row = {column: text.strip() for column, text in row.items() if column != "image"}
    for field in ("index", "question"):
        expect(row[field], where, field, "a text that is not empty", row[field])
    category, cycle = row["category"], ""
    if name == "MME-RealWorld-Lite":
        options = mme_options(row["multi-choice options"], where)
        if "/" not in category:   # "Perception/Remote Sensing": what is asked, and where
            category = f"{category}/{row['l2-category']}"
    else:                         # absent options are empty fields
        options = {letter: row[letter] for letter in "ABCDEFGH" if row.get(letter)}
    if name == "HR-Bench":
        cycle = row["cycle_category"]
    expect(len(options) >= 2, where, "options", "at least two options", list(options.values()))
    letter = row["answer"].strip("(). ").upper()
    expect(letter in options, where, "answer", f"one of {', '.join(options)}", row["answer"])
    answer = LETTERS[list(options).index(letter)]      # its letter in the order of these options
    return Question(row["question"], answer, None, tuple(options.values()), category,
                    id=row["index"], benchmark=name, cycle=cycle, where=where)


def mme_options(text: str, where: str) -> dict[str, str]:
    """"['(A) red', .. '(E) ..']" -> {"A": "red", ..}."""
    try:
        options = ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        options = None
    is_five = isinstance(options, list) and len(options) == 5 and all(map(is_text, options))
    expect(is_five, where, "multi-choice options", "a list of five texts '(A) ...'", text)
    return {letter: option.strip().removeprefix(f"({letter})").strip()
            for letter, option in zip("ABCDE", options)}


# ---- answers -> right or wrong -------------------------------------------------------------------

API_FAILED = "Failed to obtain answer via API"
REFUSALS = ("Sorry, I can't help with images of people yet.", "I can't process this file.",
            "I'm sorry, but without the image provided", "Cannot determine the answer")
SIGNS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
MME_PREFIXES = ("The best answer is", "The correct answer is", "The answer is", "The answer")
OUR_PREFIXES = re.compile(r"\b(the )?((best|correct) )?(answer|option)\b( is)?:?", re.IGNORECASE)


def chosen(question: Question, answer: str | None) -> int | None:
    """Which option an answer names, by the rule of the benchmark's reference (docs/scoring.md)."""
    if answer is None or not question.benchmark:
        return chosen_by_us(question, answer)
    if question.benchmark == "MME-RealWorld-Lite":
        return chosen_by_authors(answer, question.choices)
    return chosen_by_vlmevalkit(answer, question.choices)


def chosen_by_vlmevalkit(answer: str, choices: tuple[str, ...]) -> int | None:
    """Its rule without a judge: the only letter, if among the last four words; else the only text.
    VLMEvalKit writes API_FAILED where a model could not be asked: then the text alone counts."""
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
    if not question.benchmark:
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
    if letter and question.benchmark == "MME-RealWorld-Lite":
        return LETTERS.index(letter[0])
    return None


def correct(question: Question, answer: str | None, ours: bool = False) -> bool:
    """Is the answer to a benchmark's question right? The reference compares letters. By our rule,
    of two options with the same text either is right."""
    right = LETTERS.index(question.answer)
    if not ours:
        return chosen(question, answer) == right
    option = chosen_by_us(question, answer)
    return option is not None and question.choices[option] == question.choices[right]


# ---- right or wrong -> the benchmark's table -----------------------------------------------------

def accuracies(results: list[tuple[Question, bool]]) -> list[tuple[str, float, int, float]]:
    """The benchmark's own table from (question, right?): rows of label, accuracy, rows counted, and
    how many independent questions these are. HR-Bench asks each question in four cycles: its
    accuracy is the mean over the cycles, and four rows are one question."""
    groups = {}
    for question, right in results:
        for place in enumerate(rows_of(question)):     # (level, label): sorted, "all" comes last
            groups.setdefault(place, {}).setdefault(question.cycle, []).append(right)
    rows = []
    for (_, label), cycles in sorted(groups.items()):
        n = sum(map(len, cycles.values()))
        rows.append((label, fmean(map(fmean, cycles.values())), n, n / len(cycles)))
    return rows


def rows_of(question: Question) -> list[str]:
    """The rows of the table in which a question counts."""
    category = question.category or "(none)"
    if question.benchmark == "MME-RealWorld-Lite":
        return [category, category.split("/")[0], "all"]
    return [category, "all"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Say what is in a benchmark's file.")
    parser.add_argument("file")
    path, bad = parser.parse_args().file, []
    try:
        name, questions = load(path, bad)
        describe(name or "your own questions", questions, bad)
    except DataError as error:     # nothing below it can be told apart
        raise SystemExit(listed([*bad, error]))
