"""The embedded world: questions whose answer cannot be seen without looking.

What it teaches: *why an agent must look*. The world stands in for V* (arXiv 2312.14135), where
details of large photographs are asked for.

- A scene is a canvas of 768 x 768 pixels with a few objects. Each has a shape, a colour, and a
  plate in its middle that carries a *mark*: one of eight patterns of dark and light.
- The agent first sees the overview: the canvas reduced 8 times, 96 x 96 pixels.
- The overview holds no trace of a mark. The proof: one pixel of the overview is the mean of one
  block of 8 x 8 pixels. Plates consist of whole blocks. In each block of each mark, half of the
  pixels are dark and half are light. So the mean is (DARK + LIGHT) / 2, whatever the mark is.
- A zoom on the object shows the mark. Without it an answer is a guess among the options, so the
  number of options k sets the luck: 1 / k.

The questions:

    direct_attributes   "What mark is on the red circle?"                             one look
    comparison          "What mark is on the red circle and the blue square?"         two looks
    coarse_to_fine      as the first, with all objects at half size: a coarse look finds the object,
                        a fine one reads it

Run it:  python -m tiny.world --out runs/world --n 12   # pictures, and a file for `eval.py --data`
"""
import argparse
import functools
from dataclasses import dataclass

import numpy as np
from PIL import Image

from lib.data import DataError, write_jsonl
from lib.question import Box, Question

CANVAS = 768           # side of the canvas in pixels
BLOCK = 8              # side of the square that one overview pixel averages
GRID = 4               # cells a side; an object stands in a cell of its own
CELL = CANVAS // GRID
LARGE, SMALL = 64, 32  # half the side of an object, and the side of its plate, in pixels
COLOURS = {"red": (214, 46, 46), "green": (44, 160, 64), "blue": (48, 84, 214),
           "yellow": (228, 196, 44), "purple": (146, 60, 176), "cyan": (60, 190, 206)}
SHAPES = ("circle", "square", "triangle", "diamond")
MARKS = ("horizontal", "vertical", "rising", "falling", "chevron", "vee", "split", "checks")
DARK, LIGHT = 32, 224  # (LIGHT - DARK) / 8 is whole: so is the mean of any 8 pixels in a row
CLUTTER = 90           # the grey of the bars
CATEGORIES = ("direct_attributes", "comparison", "coarse_to_fine")
STREAMS = {"train": 0, "test": 1, "cold": 2}


@dataclass(frozen=True)
class World:
    """How hard the world is. A share is the probability that a question is of that kind."""
    objects: int = 6          # a scene, 2 to 16; no two are alike in both shape and colour
    options: int = 4          # of a question, 2 to 8; 0 asks openly
    comparison: float = 0.25  # share of comparison questions
    coarse: float = 0.15      # share of coarse_to_fine questions
    clutter: int = 4          # grey bars on the ground, which carry nothing

    def __post_init__(self):
        if not 2 <= self.objects <= GRID * GRID:
            raise DataError(f"objects: expected 2 to {GRID * GRID}, found {self.objects}")
        if self.options != 0 and not 2 <= self.options <= len(MARKS):
            raise DataError(f"options: expected 0 or 2 to {len(MARKS)}, found {self.options}")


@dataclass(frozen=True)
class Thing:
    """An object of a scene."""
    shape: str
    colour: str
    mark: str
    centre: tuple[int, int]  # pixels of the original, multiples of BLOCK
    half: int                # LARGE or SMALL

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def plate(self) -> Box:
        x, y = self.centre
        h = self.half // 2
        return (x - h, y - h, x + h, y + h)


# ---- pictures ------------------------------------------------------------------------------------

def mark_pixels(mark: str, side: int) -> np.ndarray:
    """A plate's pixels, (side, side) uint8: every block has the mean (DARK + LIGHT) / 2."""
    stripe = side // 16
    y, x = np.mgrid[:side, :side]
    left = x < side // 2
    phase = {"horizontal": y,
             "vertical": x,
             "rising": x + y,
             "falling": x - y,
             "chevron": np.where(left, x + y, x - y),
             "vee": np.where(left, x - y, x + y),
             "split": np.where(left, y, x),
             "checks": stripe * (x // stripe + y // stripe)}[mark]
    return np.where(phase % (2 * stripe) < stripe, LIGHT, DARK).astype(np.uint8)


def shape_mask(shape: str, half: int) -> np.ndarray:
    """(2 half, 2 half) bool: which pixels of an object's square belong to its shape."""
    y, x = np.mgrid[:2 * half, :2 * half] + .5 - half
    return {"circle": x**2 + y**2 <= half**2,
            "square": np.maximum(abs(x), abs(y)) <= .8 * half,
            "triangle": 2 * abs(x) <= y + half,
            "diamond": abs(x) + abs(y) <= half}[shape]


@functools.cache
def sprite(shape: str, colour: str, mark: str, half: int) -> Image.Image:
    """An object's picture, RGBA; alpha is 255 on its shape and its plate, else 0."""
    pixels = np.zeros((2 * half, 2 * half, 4), np.uint8)
    pixels[..., :3] = COLOURS[colour]
    pixels[..., 3] = 255 * shape_mask(shape, half)
    plate = slice(half // 2, 3 * half // 2)
    pixels[plate, plate, :3] = mark_pixels(mark, half)[..., None]
    pixels[plate, plate, 3] = 255
    return Image.fromarray(pixels)


@functools.cache
def ground() -> Image.Image:
    """The empty canvas: red grows to the right and green downwards, a weak cue to the place."""
    y, x = np.mgrid[:CANVAS, :CANVAS] / CANVAS
    return Image.fromarray(np.stack([70 + 110 * x, 70 + 110 * y, 0 * x + 110], -1).astype(np.uint8))


def bars(count: int, seed: int) -> list[list[int]]:
    """Grey bars [x, y, width, height], in blocks."""
    blocks = CANVAS // BLOCK
    return np.random.default_rng(seed).integers(0, [blocks, blocks, 9, 9], (count, 4)).tolist()


def draw_scene(things: list[Thing], clutter: int = 0, seed: int = 0,
               region: tuple[int, int, int, int] = (0, 0, CANVAS, CANVAS)) -> Image.Image:
    """The scene at full resolution, RGB, or a region (x1, y1, x2, y2) of it."""
    left, top = region[:2]
    canvas = ground().crop(region)
    for bar in bars(clutter, seed):
        x, y, width, height = (BLOCK * v for v in bar)
        x, y = x - left, y - top
        canvas.paste((CLUTTER,) * 3, (x, y, x + width, y + height))
    for thing in things:
        picture = sprite(thing.shape, thing.colour, thing.mark, thing.half)
        x, y = thing.centre
        canvas.paste(picture, (x - thing.half - left, y - thing.half - top), mask=picture)
    return canvas


# ---- questions -----------------------------------------------------------------------------------

def world_question(world: World, seed: int, split: str, index: int) -> Question:
    """Question `index` of an endless stream: the same arguments always give the same question.

    The streams of the splits "train", "test" and "cold" share no random numbers."""
    rng = np.random.default_rng([seed, STREAMS[split], index])
    shares = [1 - world.comparison - world.coarse, world.comparison, world.coarse]
    category = CATEGORIES[rng.choice(3, p=shares)]
    things = scene(world.objects, SMALL if category == "coarse_to_fine" else LARGE, rng)
    evidence = things[:2] if category == "comparison" else things[:1]
    marks = [thing.mark for thing in evidence]
    answer = " and ".join(marks)
    wrong = wrong_pairs(*marks, rng) if category == "comparison" else other_marks(answer, rng)
    choices = []
    if world.options:
        choices = rng.permutation([answer, *wrong[:world.options - 1]]).tolist()
    clutter_seed = int(rng.integers(2**31))
    return Question(
        text=f"What mark is on {' and '.join(f'the {thing.name}' for thing in evidence)}?",
        answer=answer,
        open=functools.partial(draw_scene, things, world.clutter, clutter_seed),
        choices=tuple(choices),
        category=category,
        boxes=tuple(thing.plate for thing in evidence),
        objects={thing.name: thing.plate for thing in things},
        marks={thing.name: thing.mark for thing in things},
        id=f"{split}-{seed}-{index}")


def scene(objects: int, half: int, rng: np.random.Generator) -> list[Thing]:
    """Objects in different cells, none alike, each up to 4 blocks away from its cell's centre."""
    kinds = rng.choice(len(COLOURS) * len(SHAPES), objects, replace=False)
    cells = rng.choice(GRID * GRID, objects, replace=False)
    marks = rng.choice(MARKS, objects)
    things = []
    for kind, cell, mark in zip(kinds.tolist(), cells.tolist(), marks.tolist()):
        row, column = divmod(cell, GRID)
        right, down = (2 * BLOCK * rng.integers(-2, 3, 2)).tolist()
        centre = (column * CELL + CELL // 2 + right, row * CELL + CELL // 2 + down)
        colour, shape = divmod(kind, len(SHAPES))
        things.append(Thing(SHAPES[shape], list(COLOURS)[colour], mark, centre, half))
    return things


def other_marks(mark: str, rng: np.random.Generator) -> list[str]:
    return rng.permutation([other for other in MARKS if other != mark]).tolist()


def wrong_pairs(first: str, second: str, rng: np.random.Generator) -> list[str]:
    """Wrong options of a comparison. They share halves with the right one, and with one another,
    so that one look does not settle the question (of two options it may)."""
    a, b, *_ = other_marks(first, rng)
    c, d, *_ = other_marks(second, rng)
    pairs = [(first, c), (a, second)]
    if rng.random() >= .5:
        pairs.reverse()
    pairs += [(a, c), (first, d), (b, second), (a, d), (b, c)]
    return [f"{one} and {other}" for one, other in pairs]


def world_questions(world: World, seed: int, split: str, start: int, count: int) -> list[Question]:
    return [world_question(world, seed, split, start + i) for i in range(count)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Save some questions of the embedded world.")
    parser.add_argument("--out", default="runs/world", help="folder of pictures, questions.jsonl")
    parser.add_argument("--n", type=int, default=12, help="how many")
    args = parser.parse_args()
    questions = world_questions(World(), 0, "test", start=0, count=args.n)
    file = write_jsonl(questions, args.out)
    for question in questions:
        print(f"{question.category:18} {question.prompt!r} -> {question.answer}")
    print(f"saved {file}")
