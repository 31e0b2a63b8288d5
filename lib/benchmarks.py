"""The benchmarks' own files, and how each is scored: V*, HR-Bench 4K and 8K, MME-RealWorld-Lite.

What it teaches: a number is comparable only if the questions are read, asked and counted as its authors do. And files of
gigabytes need no memory: a question keeps the byte offset of its row, and `open()` reads that one row again.

    V*        VStarBench.tsv, or test_questions.jsonl beside its folders of images    accuracy per category and over all
    HR-Bench  hr_bench_4k.tsv, hr_bench_8k.tsv: every question 4 times, its options    accuracy per cycle, single, cross and
              rotated; the column cycle_category says which rotation                   all; then the mean over the cycles
    MME-RealWorld-Lite  mme_realworld_lite.tsv, options (A) to (E)                     per task, Perception, Reasoning, all rows

A file is known by its columns, never by its name. The .tsv files are written by pandas: tab-separated, a field that holds a tab, a
quote or a line break stands in double quotes, quotes inside are doubled. A line without any quote is split at its tabs;
from a line with one on, Python's csv module reads one row, over as many lines as it takes.

Run it:  python benchmarks.py VStarBench.tsv      # rows, categories, right answers, sizes of the first images; then
         python eval.py --model DIR --data VStarBench.tsv
"""
import argparse
import ast
import csv
import hashlib
import json
import re
import sys
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from lib.data import DataError, Question, image_opener, read_jsonl
from reward import choose, normalise

MAX_FIELD = 2**29  # characters; the csv module's own limit of 131,072 is shorter than most images
COLUMNS = {  # the first whose columns are all there
    "HR-Bench": {"index", "image", "question", "answer", "category", "A", "B", "cycle_category"},
    "MME-RealWorld-Lite": {"index", "image", "question", "answer", "category", "l2-category", "multi-choice options"},
    "V*": {"index", "image", "question", "answer", "category", "A", "B"}}
VSTAR_FIELDS = {"image", "text", "label", "category", "question_id"}  # of test_questions.jsonl
PREFIXES = re.compile(r"\b(the )?((best|correct) )?(answer|option)\b( is)?:?", re.IGNORECASE)  # MME's script drops these, too


# ---- files -> questions ------------------------------------------------------------------------------------------------

def load(path: str | Path) -> tuple[str, list[Question]]:
    """The benchmark's name and its questions; "" for a .jsonl of your own (data.py). No image is decoded.

    Raises DataError with file, line, field, what was found and what was expected."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file; expected a benchmark's .tsv, or a .jsonl")
    with path.open("rb") as file:
        first = file.readline(2**20)
    if first.lstrip(b"\xef\xbb\xbf")[:1] != b"{" and b"\t" in first:
        return read_tsv(path)
    try:
        fields = set(json.loads(first))
    except (ValueError, TypeError, RecursionError):
        fields = set()  # read_jsonl says what is wrong
    return ("V*", read_vstar(path)) if VSTAR_FIELDS <= fields else ("", list(read_jsonl(path)))


def read_row(file: BinaryIO, where: str) -> list[str] | None:
    """The fields of the row that starts where the file stands, None at the end. Leaves the file at the next row."""
    csv.field_size_limit(MAX_FIELD)  # also bounds what a quote that is never closed can swallow
    line = file.readline()
    try:
        if b'"' in line:
            return next(csv.reader(map(bytes.decode, chain([line], iter(file.readline, b""))), delimiter="\t", strict=True))
        return line.decode().rstrip("\r\n").split("\t") if line else None
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{where}: expected tab-separated UTF-8 with every quote closed, found: {error}") from None


def read_tsv(path: Path) -> tuple[str, list[Question]]:
    """One pass over the file, one row in memory at a time."""
    questions, owner, number = [], {}, 1  # owner: index -> the byte offset of the row with that image, for rows that share it
    with path.open("rb") as file:
        columns = [name.lstrip("\ufeff").strip() for name in read_row(file, f"{path}:1")]
        name = next((name for name, needed in COLUMNS.items() if needed <= set(columns)), None)
        if name is None:
            raise DataError(f"{path}:1: columns: expected those of a benchmark, " + " or ".join(
                f"{', '.join(sorted(needed))} ({name})" for name, needed in COLUMNS.items()) + f"; found {columns}"[:300])
        while True:
            number, offset = number + 1, file.tell()
            where = f"{path}: row {number} (byte {offset})"  # rows, not lines: a quoted field may hold line breaks
            fields = read_row(file, where)
            if fields is None:
                break
            if fields == [""]:
                continue
            if len(fields) != len(columns):
                raise DataError(f"{where}: expected {len(columns)} fields, found {len(fields)}")
            row = dict(zip(columns, fields))
            if not is_index(row["image"]):
                owner.setdefault(row["index"].strip(), offset)
            questions.append(tsv_question(row, name, where, path, offset, columns.index("image"), owner))
    for question in questions:  # an image may stand below the row that refers to it
        if "image" in question.meta and question.meta["image"] not in owner:
            raise DataError(f"{path}: index {question.id}: field 'image': expected base64 or the index of a row that has an image, "
                            f"found {question.meta['image']!r}")
    return name, questions


def tsv_question(row: dict[str, str], name: str, where: str, path: Path, offset: int, column: int, owner: dict[str, int]) -> Question:
    for field in ("index", "image", "question", "answer"):
        if not row[field].strip():
            raise DataError(f"{where}: field '{field}': expected a text, found nothing")
    if name == "MME-RealWorld-Lite":
        options = mme_options(row["multi-choice options"], where)
    else:
        options = {letter: row[letter].strip() for letter in "ABCDEFGH" if row.get(letter, "").strip()}  # absent ones are empty
    reference = row["image"].strip() if is_index(row["image"]) else None

    def open_image() -> Image.Image:
        with path.open("rb") as file:
            file.seek(owner[reference] if reference else offset)
            text = read_row(file, where)[column]
        return image_opener(text.strip(), path.parent, where)()

    image = row["image"].strip()
    if not reference and not re.fullmatch(r"[\w+/=:;,.-]{16,64}", image[:64]):
        raise DataError(f"{where}: field 'image': expected base64 or the index of a row, found {image[:60]!r}")
    meta = {key: row[key].strip() for key in ("cycle_category", "l2-category") if key in row} | {"benchmark": name}
    if reference:
        meta["image"] = reference
    if name == "MME-RealWorld-Lite" and "/" not in row["category"]:  # "Perception/Remote Sensing": what is asked, and where
        row["category"] = f"{row['category'].strip()}/{row['l2-category'].strip()}"
    return with_options(row["question"].strip(), options, row["answer"], open_image, row["category"].strip(), row["index"].strip(),
                        meta, where, "answer")


def is_index(image: str) -> bool:
    return len(image) <= 64 and image.strip().isdigit()


def mme_options(text: str, where: str) -> dict[str, str]:
    """"['(A) red', .. '(E) ..']" -> {"A": "red", ..}."""
    try:
        options = ast.literal_eval(text) if len(text) < 20_000 else None
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        options = None
    if not isinstance(options, list) or len(options) != 5 or not all(isinstance(option, str) for option in options):
        raise DataError(f"{where}: field 'multi-choice options': expected a list of five texts '(A) ...', found {text[:80]!r}")
    return {letter: re.sub(rf"^\s*\({letter}\)\s*", "", option).strip() for letter, option in zip("ABCDE", options)}


def read_vstar(path: Path) -> list[Question]:
    """V*'s test_questions.jsonl: {"image", "text": "question\\n(A) ..\\n(B) ..\\nAnswer with ..", "label": "A", "category",
    "question_id"}. V*'s annotations list the right option first, so options are shuffled."""
    questions = []
    with path.open("rb") as lines:
        for number, line in ((number, line) for number, line in enumerate(lines, 1) if line.strip()):
            where = f"{path}:{number}"
            try:
                record = dict(json.loads(line))
            except (ValueError, TypeError, RecursionError):
                raise DataError(f"{where}: expected one JSON object, found {line.strip()[:60]!r}") from None
            for field in sorted(VSTAR_FIELDS):
                if not isinstance(record.get(field), str | int) or not str(record[field]).strip():
                    raise DataError(f"{where}: field '{field}': expected a text, found {str(record.get(field))[:60]!r}")
            record = {field: str(record[field]).strip() for field in VSTAR_FIELDS}
            text, *lettered = re.split(r"^\s*\(([A-Z])\)", record["text"], flags=re.MULTILINE)
            options = {letter: option.strip().split("\n")[0].strip() for letter, option in zip(lettered[::2], lettered[1::2])}
            if list(options) != [chr(65 + i) for i in range(len(options))] or len(lettered) != 2 * len(options):
                raise DataError(f"{where}: field 'text': expected lines '(A) ..', '(B) ..', found {record['text'][:80]!r}")
            order = shuffled(list(options), record["question_id"])
            questions.append(with_options(text.strip(), {letter: options[letter] for letter in order}, record["label"],
                                          image_opener(record["image"], path.parent, where), record["category"],
                                          record["question_id"], {"benchmark": "V*"}, where, "label"))
    return questions


def shuffled(letters: list[str], key: str, seed: int = 0) -> list[str]:
    """An order that depends on nothing but the question's id: the same in every run, on every machine."""
    return sorted(letters, key=lambda letter: hashlib.sha256(f"{seed}/{key}/{letter}".encode()).digest())


def with_options(text, options: dict[str, str], answer: str, opener, category, id, meta, where: str, field: str) -> Question:
    """A question from the file's options by letter, in the order to ask them; the right answer becomes its letter there."""
    letter = answer.strip().strip("().").upper()
    if len(options) < 2:
        raise DataError(f"{where}: field 'A': expected at least two options, found {list(options.values())}")
    if letter not in options:
        raise DataError(f"{where}: field '{field}': expected one of {', '.join(options)}, found {answer[:60]!r}")
    return Question(text, chr(65 + list(options).index(letter)), opener, tuple(options.values()), category, id=id, meta=meta)


# ---- answers -> scores ---------------------------------------------------------------------------------------------------

def chosen(question: Question, answer: str | None) -> int | None:
    """Which option an answer names: in a benchmark a lone letter first (an option's text may be "B", too), then reward.choose,
    with or without "The answer is"; for MME-RealWorld-Lite at last the first of A to E anywhere, as its authors' script does."""
    if answer is None or not normalise(answer):
        return None
    name = question.meta.get("benchmark")
    for text in (answer, PREFIXES.sub("", answer)) if name else ():
        letter = re.fullmatch(r"\s*\(?([A-Z])[).:]*\s*", text)
        if letter and ord(letter[1]) - 65 < len(question.choices):
            return ord(letter[1]) - 65
        if normalise(text) and (index := choose(text, question.choices)) is not None:
            return index
    if name == "MME-RealWorld-Lite":
        letter = re.search("[A-E]", PREFIXES.sub("", answer))
        return ord(letter[0]) - 65 if letter else None
    return None if name else choose(answer, question.choices)


def correct(question: Question, answer: str | None) -> bool:
    """The right option, or one that says the same in the same words."""
    index = chosen(question, answer)
    return index is not None and question.choices[index] == question.choices[ord(question.answer) - 65]


def scores(name: str, results: list[tuple[Question, bool]]) -> list[tuple[str, float, int, float]]:
    """The benchmark's own table from (question, right?): rows of label, accuracy, rows counted, and how many independent
    questions these are (for the interval: HR-Bench's four rotations of a question are one question)."""
    groups, mean = {}, lambda values: sum(values) / len(values)  # groups: label -> right?, in the order of the table

    def count(key) -> None:
        for label in sorted({key(question) for question, _ in results}):
            groups[label] = [right for question, right in results if key(question) == label]

    if name == "HR-Bench":
        count(lambda q: (q.meta["cycle_category"], q.category))
        count(lambda q: (q.meta["cycle_category"], "all"))
        rows = [(f"cycle {cycle}, {kind}", mean(part), len(part), len(part)) for (cycle, kind), part in groups.items()]
        for kind in dict.fromkeys(kind for _, kind in groups):
            parts = [part for (_, k), part in groups.items() if k == kind]
            n = sum(map(len, parts))
            rows.append((f"mean of cycles, {kind}", mean([mean(part) for part in parts]), n, n / len(parts)))
        return rows
    count(lambda q: q.category or "(none)")
    if name == "MME-RealWorld-Lite":
        count(lambda q: q.category.split("/")[0])
    count(lambda q: "all")
    return [(label, mean(part), len(part), len(part)) for label, part in groups.items()]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Say what is in a benchmark's file.")
    parser.add_argument("file")
    parser.add_argument("--n", type=int, default=3, help="how many images to open")
    args = parser.parse_args()
    try:
        name, questions = load(args.file)
        print(f"{args.file}: {name or 'your own questions'}, {len(questions)} rows")
        for label, key in (("category", lambda q: q.category), ("cycle", lambda q: q.meta.get("cycle_category", "")),
                           ("options", lambda q: str(len(q.choices))), ("right answer", lambda q: q.answer if name else "")):
            if counts := {k: v for k, v in sorted(Counter(map(key, questions)).items()) if k}:
                print(f"{label:13} " + ", ".join(f"{k} {v}" for k, v in counts.items()))
        for question in questions[:args.n]:
            print(f"\n{question.id}: image of {' x '.join(map(str, question.open().size))}\n{question.prompt}\n-> {question.answer}")
    except (DataError, OSError) as error:
        sys.exit(f"benchmarks.py: {error}")
