"""Questions for other engines: our .jsonl -> verl's parquet or TRL's dataset, and back.

What it teaches: what an engine wants to know of a question. Both want a conversation and a picture;
the conversation begins with our system prompt, which explains the tool. All else travels beside it
to the reward function. A picture's bytes are copied as they are, so nothing is lost on the way.

    verl   one .parquet: data_source, prompt, images, ability, reward_model, extra_info
    TRL    one folder (datasets.load_from_disk): prompt, image, and the fields of our .jsonl

It needs the package datasets, in the environment of docs/references.py. All pictures stand in
memory for a while.

Run it:  python docs/engines/convert.py questions.jsonl train.parquet       # for verl
         python docs/engines/convert.py questions.jsonl train.parquet 1000  # .. boxes of Qwen3-VL
         python docs/engines/convert.py questions.jsonl train               # for TRL
         python docs/engines/convert.py train.parquet folder                # back; or from train
         python docs/engines/convert.py --check      # both ways, 12 questions of the world; 3 s
"""
import io
import json
import re
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from datasets import Dataset, Features, Image, List, Value, disable_progress_bars, load_from_disk
from PIL import Image as Pillow

from lib.data import DataError, expect, read_jsonl, write_jsonl
from lib.question import Question
from tiny.world import World, world_questions
from tools import system_prompt

TEXT, BOX = Value("string"), List(Value("float64"))
PROMPT = List({"role": TEXT, "content": TEXT})
OURS = {"id": TEXT, "question": TEXT, "answer": TEXT, "choices": List(TEXT), "category": TEXT,
        "boxes": List(BOX), "objects": List({"name": TEXT, "box": BOX})}
TRL = Features({"prompt": PROMPT, "image": Image(), **OURS})
VERL = Features({"data_source": TEXT, "prompt": PROMPT, "images": List(Image()),
                 "ability": TEXT, "reward_model": {"style": TEXT, "ground_truth": TEXT},
                 "extra_info": {"index": Value("int64"), **OURS}})


def convert(source: Path, target: Path, coordinates: str = "pixels") -> None:
    """A .jsonl -> verl's file, if the target ends in .parquet; else TRL's folder.

    coordinates: of the agent's boxes, "pixels" or "1000". Raises DataError as read_jsonl does, and
    on a question with a word that verl would replace by a picture."""
    system = {"role": "system", "content": system_prompt(coordinates)}
    questions = list(read_jsonl(source))
    if target.suffix == ".parquet":
        rows = [verl_row(i, question, system) for i, question in enumerate(questions)]
        Dataset.from_list(rows, VERL).to_parquet(target)
    else:
        rows = [trl_row(question, system) for question in questions]
        Dataset.from_list(rows, TRL).save_to_disk(target)


def verl_row(i: int, question: Question, system: dict) -> dict:
    plain = not re.search("<(image|video|audio)>", question.prompt)
    expect(plain, question.where, "question", "no <image>, <video> or <audio>", question.prompt)
    user = {"role": "user", "content": f"<image>{question.prompt}"}
    return {"data_source": "mapo", "prompt": [system, user], "images": [picture(question)],
            "ability": question.category or "vision",
            "reward_model": {"style": "rule", "ground_truth": question.answer},
            "extra_info": {"index": i, **fields(question)}}


def trl_row(question: Question, system: dict) -> dict:
    """TRL puts the picture before the text by itself."""
    user = {"role": "user", "content": question.prompt}
    return {"prompt": [system, user], "image": picture(question), **fields(question)}


def fields(question: Question) -> dict:
    """All of a question but its picture. A table has no names that change from row to row, so the
    objects become a list."""
    objects = [{"name": name, "box": box} for name, box in question.objects.items()]
    return {"id": question.id, "question": question.text, "answer": question.answer,
            "choices": question.choices, "category": question.category,
            "boxes": question.boxes, "objects": objects}


def picture(question: Question) -> dict:
    """The bytes of the file."""
    return {"bytes": question.open(Path.read_bytes), "path": None}


def back(source: Path, folder: Path) -> Path:
    """verl's file or TRL's folder -> questions.jsonl in a folder, with its pictures."""
    if source.suffix == ".parquet":
        rows = Dataset.from_parquet(str(source))
        rows = rows.cast_column("images", List(Image(decode=False)))      # the bytes, as they are
    else:
        rows = load_from_disk(source).cast_column("image", Image(decode=False))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "questions.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for i, row in enumerate(rows):
            pixels = (row["images"][0] if "images" in row else row["image"])["bytes"]
            suffix = Pillow.open(io.BytesIO(pixels)).format.lower()
            (folder / f"{i:04d}.{suffix}").write_bytes(pixels)
            record = {name: row.get("extra_info", row)[name] for name in OURS}
            record["objects"] = {thing["name"]: thing["box"] for thing in record["objects"]}
            file.write(json.dumps(record | {"image": f"{i:04d}.{suffix}"}) + "\n")
    return path


def check() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = write_jsonl(world_questions(World(), 0, "test", 0, 12), folder / "world")
        for engine, target in (("verl", folder / "train.parquet"), ("TRL", folder / "train")):
            convert(source, target)
            again = read_jsonl(back(target, folder / engine))
            pairs = zip(read_jsonl(source), again, strict=True)
            equal = [contents(one) == contents(other) for one, other in pairs]
            print(f"{engine}: {sum(equal)} of {len(equal)} questions came back equal, in all "
                  "fields and in the bytes of their pictures")


def contents(question: Question) -> dict:
    return fields(question) | picture(question)


if __name__ == "__main__":
    disable_progress_bars()
    paths, units = [Path(word) for word in sys.argv[1:3]], sys.argv[3:]
    ours = bool(paths) and paths[0].suffix == ".jsonl"
    if sys.argv[1:] == ["--check"]:
        check()
    elif len(paths) != 2 or units and not (ours and units in (["pixels"], ["1000"])):
        sys.exit("expected SOURCE TARGET, and after a SOURCE.jsonl perhaps pixels or 1000 as the "
                 "units of boxes; or --check")
    elif ours:
        try:
            convert(*paths, *units)
        except DataError as error:
            sys.exit(str(error))
    else:
        print(f"wrote {back(*paths)}")
