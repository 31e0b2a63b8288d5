"""The world forces a look, and its questions are fair and true."""
import json
import zlib
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from PIL import Image

from lib.data import DataError
from lib.question import Question, shows
from tiny.world import (BLOCK, CANVAS, CATEGORIES, COLOURS, DARK, LARGE, LIGHT, MARKS, SHAPES,
                        SMALL, STREAMS, Thing, World, draw_scene, mark_pixels, world_question,
                        world_questions)
from tools import ZOOM, Call, Resolution, fit, run_tool, to_original

RESOLUTION, SEEN = Resolution(24, 48 * 48, 14_000, Image.BOX), (96, 96)
BOTH = pytest.mark.parametrize("half", [LARGE, SMALL], ids=["large", "small"])


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def look(image: Image.Image, box: tuple) -> np.ndarray:
    """The pixels of a zoom on a box, in pixels of the overview."""
    return pixels(run_tool(image, Call(ZOOM, "x", {"bbox_2d": box}), SEEN, RESOLUTION)[0])


def things(mark: str, half: int) -> list[Thing]:
    """One object of every shape, all with the same mark."""
    colours = list(COLOURS)
    return [Thing(shape, colours[i], mark, (96 + 192 * i, 112 + 176 * i), half)
            for i, shape in enumerate(SHAPES)]


@pytest.fixture(scope="module")
def scenes() -> dict[int, dict[str, Image.Image]]:
    """The same scene with every mark, for large and for small objects."""
    return {half: {mark: draw_scene(things(mark, half), clutter=4, seed=1) for mark in MARKS}
            for half in (LARGE, SMALL)}


# ---- why the agent must look ---------------------------------------------------------------------

@BOTH
def test_marks_average_out(half):
    """Every block of every mark is half dark and half light, so its mean says nothing."""
    for mark in MARKS:
        plate = mark_pixels(mark, half)
        assert plate.shape == (half, half) and set(np.unique(plate)) == {DARK, LIGHT}
        blocks = plate.reshape(half // BLOCK, BLOCK, half // BLOCK, BLOCK).mean((1, 3))
        assert (blocks == (DARK + LIGHT) / 2).all()


@BOTH
def test_overview_holds_no_trace(scenes, half):
    """Other marks on every object change the overview by exactly 0, and so they do a crop that is
    as wide as the image. The original they change as much as can be."""
    first, *others = (scenes[half][mark] for mark in MARKS)
    overview, wide = pixels(fit(first, RESOLUTION)), look(first, (0, 0, *SEEN))
    for other in others:
        assert abs(pixels(other) - pixels(first)).max() == LIGHT - DARK
        assert (pixels(fit(other, RESOLUTION)) == overview).all()
        assert (look(other, (0, 0, *SEEN)) == wide).all()


@BOTH
def test_a_close_crop_shows_the_mark(scenes, half):
    """Whatever the object's shape, any two marks are far apart in a crop of its plate."""
    for thing in things(MARKS[0], half):
        box = tuple(v / BLOCK for v in thing.plate)
        crops = {mark: look(image, box) for mark, image in scenes[half].items()}
        for one, other in combinations(MARKS, 2):
            assert abs(crops[one] - crops[other]).mean() > 24, (one, other)


@BOTH
@pytest.mark.parametrize("share", [1., 1.5, 2., 2.5, 3.])
def test_shows_means_readable(scenes, half, share):
    """Where `shows` says that a square crop can be read, any two marks differ visibly in it. It
    says so up to a side of 2.5 times the plate's."""
    thing = things(MARKS[0], half)[1]
    side = int(share * half / BLOCK)
    x, y = thing.centre[0] // BLOCK - side // 2, thing.centre[1] // BLOCK - side // 2
    for left in (x, x + 1):
        box = (left, y, left + side, y + side)
        shown = shows(to_original(box, SEEN, (CANVAS, CANVAS)), thing.plate)
        assert shown == (share <= 2.5)
        if shown:
            crops = {mark: look(image, box) for mark, image in scenes[half].items()}
            for one, other in combinations(MARKS, 2):
                assert abs(crops[one] - crops[other]).max() >= 48, (one, other, box)


@BOTH
def test_a_region_is_the_scenes_crop(scenes, half):
    """Pixel for pixel."""
    scene, image = things("vee", half), scenes[half]["vee"]
    for region in ((0, 0, 96, 96), (40, 70, 180, 150), (700, 600, 768, 768), (90, 100, 91, 101)):
        assert (pixels(draw_scene(scene, 4, 1, region)) == pixels(image.crop(region))).all()


# ---- the stream of questions ---------------------------------------------------------------------

def fingerprint(q: Question) -> str:
    return json.dumps([q.text, q.answer, q.choices, q.boxes, q.objects, q.marks])


def test_the_stream_is_the_same_for_ever():
    """All results in docs/ were measured on this stream: whoever changes it must notice."""
    questions = world_questions(World(), 0, "test", 0, 50)
    first = questions[0]
    assert first.prompt == ("What mark is on the blue diamond?\n"
                            "Options: (A) vertical (B) horizontal (C) split (D) falling")
    assert first.answer == "horizontal" and first.boxes == ((624, 48, 656, 80),)
    assert pixels(first.open()).sum() == 211_205_165
    assert zlib.crc32("".join(map(fingerprint, questions)).encode()) == 2278401282


@pytest.mark.parametrize("split", STREAMS)
def test_the_same_arguments_give_the_same_question(split):
    """Text and pixels, alone or in a list, drawn once or twice; the seed matters."""
    one, again = world_question(World(), 3, split, 7), world_questions(World(), 3, split, 5, 4)[2]
    assert one.id == again.id == f"{split}-3-7" and fingerprint(one) == fingerprint(again)
    assert one.open().tobytes() == again.open().tobytes() == one.open().tobytes()
    assert fingerprint(one) != fingerprint(world_question(World(), 4, split, 7))


def test_splits_are_disjoint():
    """No question appears twice in train, test and cold, not even under the same index."""
    prints, images = set(), set()
    for split in STREAMS:
        questions = world_questions(World(), 0, split, 0, 400)
        prints |= {fingerprint(q) for q in questions}
        images |= {q.open().tobytes() for q in questions[:2]}
    assert len(prints) == 1200 and len(images) == 6


@pytest.mark.parametrize("comparison, coarse", [(.25, .15), (0, 0), (1, 0), (0, 1), (.5, .5)])
def test_shares(comparison, coarse):
    """Categories come as often as configured. 60 of 1,000 is 3.8 standard deviations of a half."""
    world = World(comparison=comparison, coarse=coarse)
    counts = Counter(q.category for q in world_questions(world, 1, "test", 0, 1000))
    shares = [1 - comparison - coarse, comparison, coarse]
    for category, share in zip(CATEGORIES, shares):
        assert abs(counts[category] - 1000 * share) <= (60 if 0 < share < 1 else 0)


# ---- fair and true questions ---------------------------------------------------------------------

@pytest.mark.parametrize("options", [0, 2, 3, 4, 5, 6, 7, 8])
def test_options(options):
    """As many as configured, all different, of the answer's kind, and the answer is one of them."""
    for q in world_questions(World(options=options), 0, "train", 0, 80):
        pair = q.category == "comparison"
        assert len(q.choices) == len(set(q.choices)) == options
        assert len(q.boxes) == (2 if pair else 1)
        assert q.answer in q.choices or not options
        for choice in (q.answer, *q.choices):
            marks = choice.split(" and ")
            assert len(marks) == (2 if pair else 1) and set(marks) <= set(MARKS)


@pytest.mark.parametrize("options", [2, 4, 8])
def test_luck_is_one_in_the_number_of_options(options):
    """The right option stands anywhere; every mark is as often right, and as often an option."""
    questions = world_questions(World(options=options, comparison=0), 0, "train", 0, 1500)
    places = [q.choices.index(q.answer) for q in questions]
    answers = [q.answer for q in questions]
    offered = [choice for q in questions for choice in q.choices]
    for values, kinds in ((places, options), (answers, len(MARKS)), (offered, len(MARKS))):
        counts, expected = Counter(values), len(values) / kinds
        assert len(counts) == kinds
        assert max(abs(count - expected) for count in counts.values()) < 5 * expected**.5


@pytest.mark.parametrize("options", range(2, 9))
def test_comparison_needs_both_looks(options):
    """One look does not settle a pair. Who sees one mark and guesses among the options that agree
    is right less than eight times in ten; of four options, half of the time."""
    questions = world_questions(World(comparison=1, coarse=0, options=options), 0, "train", 0, 400)
    for place in (0, 1):
        luck = []
        for q in questions:
            halves = [choice.split(" and ")[place] for choice in q.choices]
            luck.append(1 / halves.count(q.answer.split(" and ")[place]))
        assert np.mean(luck) < .8
        if options == 4:
            assert np.mean(luck) == .5


@pytest.mark.parametrize("objects", [2, 6, 16])
def test_question_is_true(objects):
    """No two objects are alike; all lie inside the canvas and apart. The answer are the marks of
    the objects that are named, in that order."""
    for q in world_questions(World(objects=objects, options=8), 2, "train", 0, 60):
        assert len(q.objects) == len(q.marks) == objects
        named = q.text.removeprefix("What mark is on the ").removesuffix("?").split(" and the ")
        assert q.boxes == tuple(q.objects[name] for name in named)
        assert q.answer == " and ".join(q.marks[name] for name in named)
        side = SMALL if q.category == "coarse_to_fine" else LARGE
        for x1, y1, x2, y2 in q.objects.values():
            assert x2 - x1 == y2 - y1 == side and x1 % BLOCK == y1 % BLOCK == 0
            assert side // 2 <= min(x1, y1) and max(x2, y2) <= CANVAS - side // 2
        for a, b in combinations(q.objects.values(), 2):
            assert max(abs(a[0] - b[0]), abs(a[1] - b[1])) >= 2 * side


def test_boxes_lie_on_the_plates():
    """The box of evidence frames exactly the pixels of the mark that is the answer."""
    for q in world_questions(World(comparison=0, coarse=.5), 0, "test", 0, 6):
        x1, y1, x2, y2 = q.boxes[0]
        plate = pixels(q.open())[y1:y2, x1:x2]
        assert (plate == mark_pixels(q.answer, x2 - x1)[..., None]).all()


@pytest.mark.parametrize("options", [-1, 1, 9])
def test_world_refuses(options):
    with pytest.raises(DataError, match=f"options: expected 0 or 2 to 8, found {options}"):
        World(options=options)


@pytest.mark.parametrize("objects", [1, 17])
def test_world_refuses_objects(objects):
    with pytest.raises(DataError, match=f"objects: expected 2 to 16, found {objects}"):
        World(objects=objects)
