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
from typing import BinaryIO, Iterator

from PIL import Image

from data import DataError, Question, image_opener, read_jsonl
from reward import choose, normalise

MAX_FIELD = 2**29  # characters; the csv module's own limit of 131,072 is shorter than most images
COLUMNS = {  # the first whose columns are all there
    "HR-Bench": {"index", "image", "question", "answer", "category", "A", "B", "cycle_category"},
    "MME-RealWorld-Lite": {"index", "image", "question", "answer", "category", "l2-category", "multi-choice options"},
    "V*": {"index", "image", "question", "answer", "category", "A", "B"}}
VSTAR_FIELDS = {"image", "text", "label", "category", "question_id"}  # of test_questions.jsonl
PREFIXES = re.compile(r"(The )?([Bb]est |correct )?([Aa]nswer|[Oo]ption)( is)?:?")  # MME's script takes these away


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


def read_row(file: BinaryIO) -> list[str] | None:
    """The fields of the row that starts where the file stands, None at the end. Leaves the file at the next row."""
    line = file.readline()
    if b'"' not in line:
        return line.decode().rstrip("\r\n").split("\t") if line else None
    csv.field_size_limit(MAX_FIELD)  # also bounds what a quote that is never closed can swallow
    return next(csv.reader(map(bytes.decode, chain([line], iter(file.readline, b""))), delimiter="\t", strict=True))


def read_tsv(path: Path) -> tuple[str, list[Question]]:
    """One pass over the file, one row in memory at a time."""
    questions, owner, number = [], {}, 1  # owner: index -> the byte offset of the row with that image, for rows that share it
    with path.open("rb") as file:
        columns = [name.lstrip("\ufeff").strip() for name in checked_row(file, f"{path}:1")]
        name = next((name for name, needed in COLUMNS.items() if needed <= set(columns)), None)
        if name is None:
            raise DataError(f"{path}:1: columns: expected those of a benchmark, " + " or ".join(
                f"{', '.join(sorted(needed))} ({name})" for name, needed in COLUMNS.items()) + f"; found {columns}"[:300])
        while True:
            number, offset = number + 1, file.tell()
            where = f"{path}: row {number} (byte {offset})"  # lines do not count rows: a quoted field may hold line breaks
            fields = checked_row(file, where)
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


def checked_row(file: BinaryIO, where: str) -> list[str] | None:
    try:
        return read_row(file)
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{where}: expected tab-separated UTF-8 with every quote closed, found: {error}") from None


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
            text = read_row(file)[column]
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
    for number, line in enumerate(path.open("rb"), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            record = json.loads(line)
            missing = VSTAR_FIELDS - set(record)
        except (ValueError, TypeError, RecursionError):
            raise DataError(f"{where}: expected one JSON object, found {line.strip()[:60]!r}") from None
        if missing:
            raise DataError(f"{where}: field '{min(missing)}': missing; found {sorted(record)}")
        for field in ("image", "text", "label"):
            if not isinstance(record[field], str) or not record[field].strip():
                raise DataError(f"{where}: field '{field}': expected a text, found {str(record[field])[:60]!r}")
        options = re.findall(r"^\s*\(([A-Z])\)[ \t]*(\S.*?)\s*$", record["text"], re.MULTILINE)
        if [letter for letter, _ in options] != [chr(65 + i) for i in range(len(options))] or len(options) < 2:
            raise DataError(f"{where}: field 'text': expected lines '(A) ..', '(B) .., found {record['text'][:80]!r}")
        order = shuffled(len(options), str(record["question_id"]))
        label = record["label"].strip().strip("().")
        if label not in dict(options):
            raise DataError(f"{where}: field 'label': expected one of {', '.join(dict(options))}, found {record['label']!r}")
        letters = {chr(65 + place): options[old][1] for place, old in enumerate(order)}
        questions.append(with_options(re.split(r"^\s*\(A\)", record["text"], 1, re.MULTILINE)[0].strip(), letters,
                                      chr(65 + order.index(ord(label) - 65)), image_opener(record["image"], path.parent, where),
                                      str(record["category"]), str(record["question_id"]), {"benchmark": "V*"}, where, "label"))
    return questions


def shuffled(n: int, key: str, seed: int = 0) -> list[int]:
    """An order of n options that depends on nothing but the question's id: the same in every run, on every machine."""
    return sorted(range(n), key=lambda i: hashlib.sha256(f"{seed}/{key}/{i}".encode()).digest())


def with_options(text, options: dict[str, str], answer: str, opener, category, id, meta, where: str, field: str) -> Question:
    """A question whose right answer is a letter of its options as they will be asked."""
    letter = answer.strip().strip("().").upper()
    if len(options) < 2:
        raise DataError(f"{where}: field 'A': expected at least two options, found {list(options.values())}")
    if letter not in options:
        raise DataError(f"{where}: field '{field}': expected one of {', '.join(options)}, found {answer[:60]!r}")
    return Question(text, chr(65 + list(options).index(letter)), opener, tuple(options.values()), category, id=id, meta=meta)


# ---- answers -> scores ---------------------------------------------------------------------------------------------------

def chosen(question: Question, answer: str | None) -> int | None:
    """Which option an answer names: a lone letter first (an option's text may be "B", too), then reward.choose, and for
    MME-RealWorld-Lite the first of A to E that stands anywhere in it, as its authors' script does. None: no option."""
    if answer is None or not normalise(answer):
        return None
    letter = re.fullmatch(r"\s*\(?([A-Z])[).:]?\s*", answer)
    if letter and ord(letter[1]) - 65 < len(question.choices):
        return ord(letter[1]) - 65
    index = choose(answer, question.choices)
    if index is None and question.meta.get("benchmark") == "MME-RealWorld-Lite":
        letter = re.search("[A-E]", PREFIXES.sub("", answer))
        index = ord(letter[0]) - 65 if letter else None
    return index


def correct(question: Question, answer: str | None) -> bool:
    """The right option, or one that says the same in the same words."""
    index = chosen(question, answer)
    return index is not None and question.choices[index] == question.choices[ord(question.answer) - 65]


def scores(name: str, results: list[tuple[Question, bool]]) -> list[tuple[str, float, int, float]]:
    """The benchmark's own table from (question, right?): rows of label, accuracy, rows counted, independent questions
    among them (for the interval: HR-Bench's four rotations of a question are one question)."""
    def row(label, part, trials=None):
        return (label, sum(part) / len(part), len(part), trials or len(part))

    def groups(key) -> dict[str, list[bool]]:
        found: dict[str, list[bool]] = {}
        for question, right in results:
            found.setdefault(key(question), []).append(right)
        return dict(sorted(found.items()))

    rows = []
    if name == "HR-Bench":
        by_cycle = groups(lambda q: (q.meta["cycle_category"], q.category))
        cycles, kinds = ([*dict.fromkeys(key[i] for key in by_cycle)] for i in (0, 1))
        kinds = sorted(kinds, key="single cross".find)
        for cycle in cycles:
            for kind in (*kinds, "all"):
                part = [r for (c, k), part in by_cycle.items() if c == cycle and kind in (k, "all") for r in part]
                if part:
                    rows.append(row(f"cycle {cycle}  {kind}", part))
        for kind in (*kinds, "all"):
            part = [r for r in rows if r[0].endswith(f"  {kind}")]
            n = sum(r[2] for r in part)
            rows.append((f"mean  {kind}", sum(r[1] for r in part) / len(part), n, n / len(part)))
        return rows
    rows = [row(category or "(none)", part) for category, part in groups(lambda q: q.category).items()]
    if name == "MME-RealWorld-Lite":
        rows += [row(area, part) for area, part in groups(lambda q: q.category.split("/")[0]).items()]
    return rows + [row("all", [right for _, right in results])]


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
