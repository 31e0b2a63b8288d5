"""Hostile turns, damaged files, sudden death: what survives.

What it teaches: what runs for days is judged by its worst minute. So each danger is made here on
purpose, many times, from a seed. What is tried *survives* if it ends as it should:

    a hostile turn        a checked Call, an Answer, or a ToolError of one line; within 0.1 s
    a damaged file        questions whose fields and pictures hold, or a DataError with its name
    a damaged model       an error of one line, or a model that says what it said before
    a damaged checkpoint  an error by checkpoint.verify, which a run calls before it goes on
    a kill                the run goes on, and ends as one that nobody killed, bit for bit
    a full disk           an error of one line; the older checkpoint stands, and the run goes on

All else is *lost*.

Run it:  python docs/reliability.py            # 8 minutes -> the table of docs/reliability.md
         python docs/reliability.py --quick    # a part, in 42 s; writes nothing
         python docs/reliability.py --long     # does a long run fill the memory? 8 minutes
"""
import argparse
import base64
import io
import json
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Callable

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT)]

import numpy as np
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file

from lib import benchmarks, checkpoint
from lib.data import FORMATS, DataError, check_pictures
from lib.labels import MAX_LABEL_CHARS
from lib.policy import Policy
from lib.question import Question
from rollout import collect
from tiny.world import World, world_question
from tools import (MAX_ANSWER_CHARS, MAX_ASPECT, MIN_SIDE, Answer, Call, ToolError, parse,
                   zoom_call)

PAGE = ROOT / "docs/reliability.md"
SEEN = (96, 72)                                  # of the hostile turns' image
CLOCK = {"seconds", "rollout_seconds", "tokens_per_s", "peak_mb"}    # not the same in two runs
TRAIN = ["train.py", "--steps", "8", "--save_every", "1", "--questions", "2", "--group", "4",
         "--eval_questions", "0"]
LONG = ["train.py", "--steps", "2000", "--save_every", "200", "--questions", "1", "--group", "2",
        "--eval_questions", "0", "--lr", "1e-6", "--quiet"]     # with the usual --lr it collapses
EVERY = 5                                        # seconds between two samples of a run's memory
EVAL = ["eval.py", "--n", "60", "--batch", "2", "--films", "0", "--temperature", "1"]


# ---- hostile turns -------------------------------------------------------------------------------

PIECES = ["<tool_call>", "</tool_call>", "<answer>", "</answer>", "<think>", "</think>", "{", "}",
          "[", "]", '"', ",", ":", "\\", "\0", "\ud800", "\\ud800", "\u202e", "\u200b", "＜", "0",
          " ", "\n", "NaN", "1e999", "-", "9" * 500, "[" * 500, "null", "true", "B", "the object",
          '"name": "image_zoom_in_tool"', '"arguments": {', '"label": "red sign"', '"label": ""',
          '"bbox_2d": [10, 20, 50, 60]', '"bbox_2d": [9, 9, 1, 1]', "<|im_end|>", "<|image_pad|>"]
TURNS = ["<think>look</think>" + zoom_call("the red sign", (10, 20, 50, 60)),
         "<think>so</think><answer>(B)</answer>", zoom_call("a cup", (0, 0, 96, 72), edge="\n")]

LETTERS = [*"object image", *"оbjесt іmаgе", "red ", "the ", "<", "\u2039", "\u0301", "\u200b",
           "\ud800", "\ufdfa", "7", *map(chr, range(0, 0x30000, 4097))]
NUMBERS = [*range(-7, 105, 7), 0.5, 3.999, 1e9, 1e10, 10**400, float("nan"), True, None, "7", []]


def hostile_turn(rng: random.Random) -> str:
    """Pieces in any order; a call with any label and box; or a good turn with a few changes."""
    kind = rng.randrange(3)
    if kind == 0:
        return "".join(rng.choices(PIECES, k=rng.randrange(40)))
    if kind == 1:
        label = "".join(rng.choice(LETTERS) for _ in range(rng.randrange(30)))
        return zoom_call(label, [rng.choice(NUMBERS) for _ in range(rng.choice([4, 4, 4, 3, 5]))])
    turn = rng.choice(TURNS)
    for _ in range(rng.randrange(1, 4)):
        start = rng.randrange(len(turn) + 1)
        end = rng.choice([start, start + 1, start + rng.randrange(20)])
        any_character = chr(rng.choice([rng.randrange(128), rng.randrange(0x110000)]))
        number = str(rng.randint(-50, 150))
        turn = turn[:start] + rng.choice(["", any_character, number, *PIECES]) + turn[end:]
    return turn


def turn_survives(turn: str) -> bool:
    began = time.process_time()
    try:
        action = parse(turn, SEEN)
    except ToolError as error:
        good = 0 < len(str(error)) < 400 and "\n" not in str(error)
    except Exception:
        return False
    else:
        good = in_bounds(action)
    return good and time.process_time() - began < .1


def in_bounds(action: Call | Answer) -> bool:
    if isinstance(action, Answer):
        return 0 < len(action.text) <= MAX_ANSWER_CHARS
    x1, y1, x2, y2 = action.arguments["bbox_2d"]
    inside = 0 <= x1 and 0 <= y1 and x2 <= SEEN[0] and y2 <= SEEN[1]
    short, long = sorted((x2 - x1, y2 - y1))
    label = action.label.isprintable() and 0 < len(action.label) <= MAX_LABEL_CHARS
    return inside and MIN_SIDE <= short and long <= MAX_ASPECT * short and label


# ---- damaged files -------------------------------------------------------------------------------

def damaged(content: bytes, rng: random.Random) -> bytes:
    """One thing happens to the bytes: a bit turns, a part goes, comes twice, is overwritten."""
    start = rng.randrange(len(content))
    end = min(len(content), start + rng.choice([1, 4, 64, 4096]))
    part = content[start:end]
    replaced = rng.choice([bytes([part[0] ^ 1 << rng.randrange(8)]) + part[1:], b"", part * 2,
                           bytes(len(part)), rng.randbytes(len(part)), part[::-1]])
    return content[:start] + replaced + (content[end:] if rng.random() < .8 else b"")


def picture(kind: str) -> bytes:
    image = Image.new("RGB", (90, 60), "white")
    ImageDraw.Draw(image).ellipse((20, 10, 60, 50), "red")
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def good_files(folder: Path) -> list[Path]:
    """What is damaged: a .jsonl, a benchmark's .tsv, and a picture of each format. They belong
    together: pictures.jsonl names the pictures."""
    inside = base64.b64encode(picture("PNG")).decode()
    own = {"image": "png", "question": "Which colour?", "answer": "red", "choices": ["red", "blé"],
           "category": "colour", "boxes": [[20, 10, 60, 50]], "objects": {"disc": [20, 10, 60, 50]}}
    row = {"index": "7", "image": inside, "question": '"Which\ncolour?"', "A": "red", "B": "blue",
           "answer": "A", "category": "direct_attributes"}
    (folder / "own.jsonl").write_text(f"{json.dumps(own)}\n" * 3, encoding="utf-8")
    lines = ["\t".join(columns) for columns in (row, row.values(), row.values())]
    (folder / "rows.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for kind in FORMATS:
        (folder / kind.lower()).write_bytes(picture(kind))
    named = [json.dumps(own | {"image": kind.lower()}) for kind in FORMATS]
    (folder / "pictures.jsonl").write_text("\n".join(named), encoding="utf-8")
    return [folder / name for name in ("own.jsonl", "rows.tsv", *map(str.lower, FORMATS))]


def file_survives(file: Path) -> bool:
    """Whatever the file says: good questions, and errors that name the file."""
    bad = []
    try:
        _, questions = benchmarks.load(file, bad)
        good = all(map(is_sound, check_pictures(questions, bad, whole=True)))
    except DataError as error:
        bad.append(error)
        good = True
    except Exception:
        return False
    return good and all(str(file) in str(error) for error in bad)


def is_sound(question: Question) -> bool:
    """The texts can be written, the boxes have an area, and the picture is one."""
    texts = [question.text, question.answer, question.category, *question.choices]
    "\n".join([*texts, *question.objects]).encode()
    boxes = [*question.boxes, *question.objects.values()]
    return (all(texts[:2]) and all((x2 - x1) * (y2 - y1) > 0 for x1, y1, x2, y2 in boxes)
            and question.open().mode == "RGB")


def damaged_files(count: int, rng: random.Random, folder: Path, pictures: bool) -> list[bool]:
    survived, files = [], good_files(folder)
    for _ in range(count):
        file = rng.choice(files[2:] if pictures else files[:2])
        content = file.read_bytes()
        file.write_bytes(damaged(content, rng))
        survived.append(file_survives(folder / "pictures.jsonl" if pictures else file))
        file.write_bytes(content)
    return survived


# ---- damaged models ------------------------------------------------------------------------------

def damage_model(folder: Path, rng: random.Random) -> str:
    """A weight is lost, new, too long or no number; or a file is not copied whole. Says which."""
    weights = load_file(folder / "model.safetensors")
    name, what = rng.choice(sorted(weights)), rng.choice(["missing", "unknown", "misshapen", "NaN",
                                                          "cut", "empty", "removed", "zeros"])
    if what in ("cut", "empty", "removed", "zeros"):
        file = folder / rng.choice(["config.json", "model.safetensors", "tokenizer.json",
                                    "preprocessor_config.json"])
        content = file.read_bytes()
        half = content[:rng.randrange(1, len(content))]
        file.write_bytes({"cut": half, "zeros": bytes(len(content))}.get(what, b""))
        if what == "removed":
            file.unlink()
        return f"{file.name} {what}"
    weight = weights.pop(name)
    if what == "unknown":
        weights |= {name: weight, f"{name}.more": weight.clone()}
    elif what != "missing":
        weights[name] = weight * torch.nan if what == "NaN" else torch.cat([weight, weight])
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return f"{name} {what}"


def speech(folder: Path) -> list:
    """What a model says about a question, and how surely."""
    question = world_question(World(), seed=0, split="test", index=0)
    trajectory = collect(Policy(folder), [question], temperature=0.)[0]
    return [trajectory.tokens.ids, trajectory.logps]


def damaged_models(count: int, rng: random.Random, folder: Path) -> list[bool]:
    survived, right = [], speech(ROOT / "tiny")
    for _ in range(count):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(ROOT / "tiny", folder)
        what = damage_model(folder, rng)
        try:
            survived.append(speech(folder) == right)
        except (OSError, ValueError):                # what train.py and eval.py say in one line
            survived.append(True)
        except Exception:
            survived.append(False)
        if not survived[-1]:
            print(f"lost: {what}")
    return survived


def damaged_checkpoints(count: int, rng: random.Random, saved: Path) -> list[bool]:
    """Any byte of any file of a checkpoint. Only `verify` is called, no run goes on."""
    survived, files = [], sorted(path for path in saved.rglob("*") if path.is_file())
    for _ in range(count):
        file = rng.choice(files)
        content = file.read_bytes()
        file.write_bytes(damaged(content, rng))
        try:
            checkpoint.verify(saved)
            survived.append(file.read_bytes() == content)
        except (OSError, ValueError):
            survived.append(True)
        file.write_bytes(content)
    return survived


# ---- kills ---------------------------------------------------------------------------------------

def start(command: list[str], out: Path, *more: str, ranks: int = 1, limited: bool = False
          ) -> subprocess.Popen:
    """train.py or eval.py, on one rank or two. limited: no file may be longer than 1 MB."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "--"]
    return subprocess.Popen(
        [sys.executable, *(torchrun if ranks > 1 else []), *command, "--out", str(out), *more],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=limit_files if limited else None)


def limit_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))


def run(command: list[str], out: Path, *more: str, **options) -> list[tuple[int, float, int]]:
    """To its end; raises RuntimeError if that is no good one. Returns samples of it."""
    process, samples = start(command, out, *more, **options), []
    while process.returncode is None:
        try:
            said, _ = process.communicate(timeout=EVERY)
        except subprocess.TimeoutExpired:
            samples += sample(Path(f"/proc/{process.pid}"), out / "metrics.jsonl")
    if process.returncode:
        raise RuntimeError(f"{command[0]} {out}: {said[-2000:]}")
    return samples[:-1]                              # the last one may be of a process that ends


def state_of_training(out: Path) -> dict:
    """Weights, moments, random streams (the checkpoint's sums), metrics and trajectories."""
    metrics = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    lines = [{key: value for key, value in line.items() if key not in CLOCK} for line in metrics]
    state = checkpoint.sums(checkpoint.newest(out))
    for name in ("train.json", "sums.json"):         # the first names the run's folder
        state.pop(name, None)
    return state | {"metrics": lines, "trajectories": (out / "trajectories.jsonl").read_text()}


def state_of_evaluation(out: Path) -> dict:
    lines = [file.read_text().splitlines() for file in out.glob("predictions-*.jsonl")]
    return {json.loads(line)["n"]: line for line in sum(lines, [])}


def kill_and_go_on(command: list[str], state: Callable, kills: int, rng: random.Random,
                   folder: Path) -> list[bool]:
    """One run to its end, and others that are killed once, in the second half of the first's time.
    """
    began = time.time()
    run(command, folder / "whole")
    seconds, survived = time.time() - began, []
    for number in range(kills):
        out = folder / f"killed-{number}"
        process = start(command, out)
        time.sleep(rng.uniform(.5, 1) * seconds)     # what comes before is the loading
        process.kill()
        process.communicate()
        begun = checkpoint.checkpoints(out) or list(out.glob("predictions-*.jsonl"))
        if not begun:                                # killed before it had anything to lose
            shutil.rmtree(out, ignore_errors=True)
        survived.append(goes_on(command, out, state, state(folder / "whole"), resume=bool(begun)))
    return survived


def goes_on(command: list[str], out: Path, state: Callable, expected: dict, resume: bool = True,
            ranks: int = 1) -> bool:
    try:
        run(command, out, *["--resume"] * resume, ranks=ranks)
    except RuntimeError as error:
        print(f"lost: {error}")
        return False
    found = state(out)
    if found != expected:
        differ = [key for key in found | expected if found.get(key) != expected.get(key)]
        print(f"lost: {out} differs in {differ}")
    return found == expected


def kill_one_rank(kills: int, rng: random.Random, folder: Path) -> list[bool]:
    """Of two: the other must not wait for it, and both go on from the checkpoint."""
    survived = []
    run(TRAIN, folder / "both", ranks=2)
    for number in range(kills):
        out = folder / f"one-killed-{number}"
        process = start(TRAIN, out, ranks=2)
        while process.poll() is None and not checkpoint.checkpoints(out):
            time.sleep(.05)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(rng.choice(children)), 9)
        try:
            process.communicate(timeout=60)
            ended = process.returncode != 0
        except subprocess.TimeoutExpired:
            process.terminate()                      # it takes its children with it
            ended = False
        expected = state_of_training(folder / "both")
        survived.append(ended and goes_on(TRAIN, out, state_of_training, expected, ranks=2))
    return survived


# ---- full disk -----------------------------------------------------------------------------------

def full_disk(megabytes: int, whole: Path, disk: Path) -> bool:
    """On a disk of its own a run saves a checkpoint of 16 MB. Then the disk has so many megabytes:
    with 17 not even the second's model has place, with 23 its optimiser has none. Who may not mount
    a disk has a limit on the length of a file instead."""
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=99m", "none", disk]
    mounted = not subprocess.run(mount, stderr=subprocess.DEVNULL).returncode
    try:
        out = disk / "run"
        run(TRAIN, out, "--steps", "1")
        resize(disk, megabytes, mounted)
        process = start(TRAIN, out, "--resume", limited=not mounted)
        said, _ = process.communicate()
        resize(disk, 99, mounted)
        told = process.returncode == 1 and "Traceback" not in said and "\ntrain.py: " in said
        if not told:
            print(f"lost: {megabytes} MB: {said[-500:]}")
        return goes_on(TRAIN, out, state_of_training, state_of_training(whole)) and told
    finally:
        if mounted:
            subprocess.run(["umount", disk])


def resize(disk: Path, megabytes: int, mounted: bool) -> None:
    if mounted:
        subprocess.run(["mount", "-o", f"remount,size={megabytes}m", disk], check=True)


# ---- a long run ----------------------------------------------------------------------------------

def sample(process: Path, metrics: Path) -> list[tuple[int, float, int]]:
    """Steps done, resident MB, open files. Nothing of a process that does not train, or not yet."""
    try:
        steps, files = metrics.read_text().count("\n"), len(os.listdir(process / "fd"))
        kilobytes = re.search(r"VmRSS:\s*(\d+)", (process / "status").read_text())
    except OSError:
        return []
    return [(steps, int(kilobytes[1]) / 2**10, files)] if steps and kilobytes else []


def growth(samples: list[tuple[int, float, int]]) -> tuple[float, float, float]:
    """Memory: the mean in MB, the slope in MB per 1,000 steps, half of the slope's 95% interval.

    The first fifth of the steps is warm-up. Neighbouring samples are alike, and do not count one by
    one: so least squares see the means of 10 blocks, and Student's t has 8 degrees of freedom."""
    settled = np.array([sample for sample in samples if sample[0] > samples[-1][0] / 5])
    means = np.array([block.mean(0) for block in np.array_split(settled, 10)])
    steps, memory, _ = (means - means.mean(0)).T
    slope = steps @ memory / (steps @ steps)
    rest = memory - slope * steps
    half = 2.306 * np.sqrt(rest @ rest / 8 / (steps @ steps))
    return settled[:, 1].mean(), 1000 * slope, 1000 * half


def long_run(folder: Path) -> str:
    """How memory and open files went, in a sentence."""
    samples = run(LONG, folder / "long")
    mean, slope, half = growth(samples)
    return (f"{len(samples)} samples: {mean:.0f} MB, {slope:+.1f} MB per 1,000 steps (95% interval "
            f"{slope - half:.1f} to {slope + half:.1f}); open files: {samples[0][2]} at the start, "
            f"{samples[-1][2]} at the end")


# ---- the table -----------------------------------------------------------------------------------

FULL = {"turns": 100_000, "files": 2000, "models": 60, "checkpoints": 200, "kills": 5, "ranks": 2,
        "disks": (17, 23)}
QUICK = {"turns": 20_000, "files": 200, "models": 5, "checkpoints": 20, "kills": 1, "ranks": 0,
         "disks": ()}


def try_all(scale: dict, folder: Path) -> dict[str, list[bool]]:
    """Each kind, as often as `scale` says: which survived."""
    rng, rows = random.Random(0), {}

    def row(kind: str, survived: list[bool]) -> None:
        rows[kind] = survived
        print(f"{kind:24}{len(survived):9,} tried {sum(survived):9,} survived", flush=True)

    row("hostile turns", [turn_survives(hostile_turn(rng)) for _ in range(scale["turns"])])
    row("damaged .jsonl, .tsv", damaged_files(scale["files"], rng, folder, pictures=False))
    row("damaged pictures", damaged_files(scale["files"], rng, folder, pictures=True))
    row("damaged models", damaged_models(scale["models"], rng, folder / "model"))
    row("training killed", kill_and_go_on(TRAIN, state_of_training, scale["kills"], rng, folder))
    whole = folder / "whole"
    saved = checkpoint.newest(whole)
    row("damaged checkpoints", damaged_checkpoints(scale["checkpoints"], rng, saved))
    if scale is FULL:
        row("evaluation killed", kill_and_go_on(EVAL, state_of_evaluation, scale["kills"], rng,
                                                folder / "evaluation"))
        row("one of two ranks killed", kill_one_rank(scale["ranks"], rng, folder))
        row("full disk", [full_disk(size, whole, folder / f"{size}") for size in scale["disks"]])
    return rows


def page(rows: dict[str, list[bool]], old: str) -> str:
    """The old page with the new table."""
    table = ["| what | tried | survived | lost |", "|---|---|---|---|"]
    for kind, survived in rows.items():
        lost = survived.count(False)
        table.append(f"| {kind} | {len(survived):,} | {sum(survived):,} | {lost:,} |")
    return re.sub(r"(\|.*\n)+", "\n".join(table) + "\n", old, count=1)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a part; writes nothing")
    parser.add_argument("--long", action="store_true", help="memory in a long run; writes nothing")
    args, began = parser.parse_args(arguments), time.time()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")                  # Pillow's, about pictures that are damaged
    with tempfile.TemporaryDirectory() as folder:
        if args.long:
            print(f"{long_run(Path(folder))}; {time.time() - began:.0f} s")
            return
        rows = try_all(QUICK if args.quick else FULL, Path(folder))
    if not args.quick:
        PAGE.write_text(page(rows, PAGE.read_text()))
    lost = sum(survived.count(False) for survived in rows.values())
    print(f"{lost} lost, {time.time() - began:.0f} s")
    sys.exit(lost > 0)


if __name__ == "__main__":
    main()
