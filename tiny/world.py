"""The embedded world: questions whose answer cannot be seen without looking.

What it teaches: *why an agent must look*. The world is a stand-in for V* (arXiv 2312.14135).

Run it:  python -m tiny.world --out runs/world --n 12      # pictures + questions.jsonl, a file `eval.py --data` can read
"""
import argparse
import functools
from dataclasses import dataclass

import numpy as np
from PIL import Image

from lib.data import Box, DataError, Question, write_jsonl

CANVAS, BLOCK, GRID = 768, 8, 4  # side of the canvas; side of the square that one overview pixel averages; cells a side
CELL = CANVAS // GRID
COLOURS = {"red": (214, 46, 46), "green": (44, 160, 64), "blue": (48, 84, 214),
           "yellow": (228, 196, 44), "purple": (146, 60, 176), "cyan": (60, 190, 206)}
SHAPES = ("circle", "square", "triangle", "diamond")
MARKS = ("horizontal", "vertical", "rising", "falling", "chevron", "vee", "split", "checks")
DARK, LIGHT = 32, 224  # (LIGHT - DARK) / 8 is whole, so averages of half-filled tiles are exact in 8 bits


# ---- the embedded world ----------------------------------------------------------------------------------------

@dataclass(frozen=True)
class World:
    """How hard the world is. Every share is a probability per question."""
    objects: int = 6       # objects a scene, 2 to 16, no two alike in both shape and colour
    options: int = 4       # options of a mark question, 2 to 8; 0 asks openly
    comparison: float = 0.25
    coarse: float = 0.15   # share of coarse_to_fine questions (all objects at half size)
    clutter: int = 4       # grey bars on the ground, which carry nothing

    def __post_init__(self):
        if not 2 <= self.objects <= GRID * GRID:
            raise DataError(f"objects: expected 2 to {GRID * GRID}, found {self.objects}")
        if self.options != 0 and not 2 <= self.options <= len(MARKS):
            raise DataError(f"options: expected 0 or 2 to {len(MARKS)}, found {self.options}")
        if not (self.comparison >= 0 and self.coarse >= 0 and self.comparison + self.coarse <= 1):
            raise DataError(f"comparison and coarse: expected shares with a sum of at most 1, found "
                            f"{self.comparison} and {self.coarse}")


@dataclass(frozen=True)
class Thing:
    shape: str
    colour: str
    mark: str
    centre: tuple[int, int]  # pixels of the original, a multiple of BLOCK
    small: bool

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def half(self) -> int:  # half the side of the object; its plate has half that side
        return 4 * BLOCK if self.small else 8 * BLOCK

    @property
    def plate(self) -> Box:
        (x, y), h = self.centre, self.half // 2
        return (x - h, y - h, x + h, y + h)


def mark_pixels(mark: str, small: bool) -> np.ndarray:
    """The plate's pixels, (side, side) uint8: every aligned 8 x 8 block averages exactly to (DARK + LIGHT) / 2."""
    period = BLOCK // 2 if small else BLOCK
    side = 8 * period
    y, x = np.mgrid[:side, :side]
    half, left = period // 2, x < side // 2
    phase = {"horizontal": y, "vertical": x, "rising": x + y, "falling": x - y, "chevron": np.where(left, x + y, x - y),
             "vee": np.where(left, x - y, x + y), "split": np.where(left, y, x),
             "checks": half * (x // half + y // half)}[mark]
    light = phase % period < half
    return np.where(light, LIGHT, DARK).astype(np.uint8)


def shape_mask(shape: str, half: int) -> np.ndarray:
    """(2 half, 2 half) bool, which pixels of an object's square belong to its shape."""
    y, x = np.mgrid[:2 * half, :2 * half] + .5 - half
    return {"circle": x**2 + y**2 <= half**2, "square": np.maximum(abs(x), abs(y)) <= .8 * half,
            "triangle": 2 * abs(x) <= y + half, "diamond": abs(x) + abs(y) <= half}[shape]


@functools.cache
def painted(shape: str, colour: str, mark: str, small: bool) -> tuple[np.ndarray, np.ndarray]:
    """What to paint for an object: mask (2 half, 2 half) and colours (2 half, 2 half, 3)."""
    half = 4 * BLOCK if small else 8 * BLOCK
    mask, plate = shape_mask(shape, half).copy(), slice(half // 2, 3 * half // 2)
    pixels = np.broadcast_to(np.array(COLOURS[colour], np.uint8), (2 * half, 2 * half, 3)).copy()
    pixels[plate, plate], mask[plate, plate] = mark_pixels(mark, small)[..., None], True
    return mask, pixels


@functools.cache
def ground() -> np.ndarray:
    """The canvas without objects: red grows to the right, green downwards (a weak cue to where a crop was cut)."""
    y, x = np.mgrid[:CANVAS, :CANVAS] / CANVAS
    return np.stack([70 + 110 * x, 70 + 110 * y, 0 * x + 110], -1).astype(np.uint8)


def draw(things: list[Thing], clutter: int = 0, seed: int = 0, region: tuple[int, int, int, int] = (0, 0, CANVAS, CANVAS)) -> Image.Image:
    """The scene at full resolution, RGB, or a region (x1, y1, x2, y2) of it."""
    left, top, right, bottom = region
    pixels, rng = ground()[top:bottom, left:right].copy(), np.random.default_rng(seed)
    for x, y, width, height in (BLOCK * rng.integers(0, [CANVAS // BLOCK] * 2 + [9, 9], (clutter, 4))).tolist():
        pixels[max(y - top, 0):max(y + height - top, 0), max(x - left, 0):max(x + width - left, 0)] = 90
    for thing in things:
        (x, y), h = thing.centre, thing.half
        x1, y1, x2, y2 = max(x - h, left), max(y - h, top), min(x + h, right), min(y + h, bottom)  # its visible part
        if x1 < x2 and y1 < y2:
            part = slice(y1 - y + h, y2 - y + h), slice(x1 - x + h, x2 - x + h)
            shape, colour = painted(thing.shape, thing.colour, thing.mark, thing.small)
            np.copyto(pixels[y1 - top:y2 - top, x1 - left:x2 - left], colour[part], where=shape[part][..., None])
    return Image.fromarray(pixels)


def draw_overview(things: list[Thing], clutter: int = 0, seed: int = 0) -> Image.Image:
    """draw(..) reduced BLOCK times, within one grey level and many times faster: for the cold start's many scenes."""
    pixels, rng = reduced_ground().copy(), np.random.default_rng(seed)
    for x, y, width, height in rng.integers(0, [CANVAS // BLOCK] * 2 + [9, 9], (clutter, 4)).tolist():
        pixels[y:y + height, x:x + width] = 90
    for thing in things:
        (x, y), h = (v // BLOCK for v in thing.centre), thing.half // BLOCK
        share, colour = reduced(thing.shape, thing.colour, thing.mark, thing.small)
        square = pixels[y - h:y + h, x - h:x + h]
        square += colour - share * square
    return Image.fromarray(pixels.round().astype(np.uint8))


def block_means(pixels: np.ndarray) -> np.ndarray:
    """(h, w, c) -> (h / BLOCK, w / BLOCK, c)."""
    h, w, c = pixels.shape
    return pixels.reshape(h // BLOCK, BLOCK, w // BLOCK, BLOCK, c).mean((1, 3))


@functools.cache
def reduced(shape: str, colour: str, mark: str, small: bool) -> tuple[np.ndarray, np.ndarray]:
    mask, pixels = painted(shape, colour, mark, small)
    return block_means(mask[..., None] * 1.), block_means(mask[..., None] * 1. * pixels)


@functools.cache
def reduced_ground() -> np.ndarray:
    return block_means(ground())


def scene(rng: np.random.Generator, objects: int, small: bool) -> list[Thing]:
    """Objects in different cells, none alike, each moved from its cell's centre by up to 4 blocks, 2 at a time."""
    kinds = rng.choice(len(COLOURS) * len(SHAPES), objects, replace=False)
    cells = rng.choice(GRID * GRID, objects, replace=False)
    marks = rng.choice(MARKS, objects)
    things = []
    for kind, cell, mark in zip(kinds, cells, marks):
        move = 2 * BLOCK * rng.integers(-2, 3, 2)
        centre = (int(cell % GRID * CELL + CELL // 2 + move[0]), int(cell // GRID * CELL + CELL // 2 + move[1]))
        things.append(Thing(SHAPES[kind % 4], list(COLOURS)[kind // 4], str(mark), centre, small))
    return things


def world_question(world: World, seed: int, split: str, index: int) -> Question:
    """Question `index` of an endless stream, always the same for the same arguments. Streams of different splits
    ("train", "test", "cold") never share their random numbers."""
    stream = {"train": 0, "test": 1, "cold": 2}[split]
    rng = np.random.default_rng([seed, stream, index])
    kind = rng.choice(3, p=[1 - world.comparison - world.coarse, world.comparison, world.coarse])
    things = scene(rng, world.objects, small=bool(kind == 2))
    first, second = things[:2]
    evidence = (first, second) if kind == 1 else (first,)
    text = "What mark is on " + " and ".join(f"the {thing.name}" for thing in evidence) + "?"
    answer = " and ".join(thing.mark for thing in evidence)
    if kind == 1:  # wrong options share a half with the right one, so that one look does not settle it
        (a, *x), (b, *y) = ([thing.mark, *rng.permutation([m for m in MARKS if m != thing.mark])[:2]] for thing in evidence)
        wrong = [(a, y[0]), (x[0], b)] if rng.random() < .5 else [(x[0], b), (a, y[0])]
        wrong = [f"{m} and {n}" for m, n in wrong + [(x[0], y[0]), (a, y[1]), (x[1], b), (x[0], y[1]), (x[1], y[0])]]
    else:
        wrong = [str(mark) for mark in rng.permutation([mark for mark in MARKS if mark != answer])]
    choices = tuple(str(c) for c in rng.permutation([answer, *wrong[:world.options - 1]])) if world.options else ()
    return Question(text, answer, functools.partial(draw, things, world.clutter, int(rng.integers(2**31))), choices,
                    ("direct_attributes", "comparison", "coarse_to_fine")[kind],
                    tuple(t.plate for t in evidence), {t.name: t.plate for t in things},
                    {t.name: t.mark for t in things}, f"{split}-{seed}-{index}")


def world_questions(world: World, seed: int, split: str, start: int, count: int) -> list[Question]:
    return [world_question(world, seed, split, start + i) for i in range(count)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Save some questions of the embedded world.")
    parser.add_argument("--out", default="runs/world", help="folder for the pictures and questions.jsonl")
    parser.add_argument("--n", type=int, default=12, help="how many")
    parser.add_argument("--options", type=int, default=4, help="options of a mark question, 0 or 2 to 8")
    args = parser.parse_args()
    questions = world_questions(World(options=args.options), seed=0, split="test", start=0, count=args.n)
    file = write_jsonl(questions, args.out)
    for q in questions:
        print(f"{q.category:18} {q.prompt!r} -> {q.answer}")
    print(f"saved {file}")
