"""Rewards: right is right however it is written, and a label scores by what the crop shows."""
import sys

import numpy as np
import pytest
import torch

from conftest import ROOT
from lib.policy import Tokens
from lib.question import Question, holds
from reward import (SHARPNESS, THRESHOLD, Scorer, astray, crop_at, hit, measure, outcome,
                    rewards, score_looks)
from rollout import Trajectory, Turn
from tiny.world import BLOCK, World, world_questions
from tools import ZOOM, Call

sys.path.insert(0, str(ROOT / "docs"))
from score import area_under_curve


# ---- outcome -------------------------------------------------------------------------------------

PETS = ("cat", "dog")


@pytest.mark.parametrize("right, choices, answer, value", [
    ("rising", ("rising", "vee"), "a", 1), ("rising", ("rising", "vee"), "b", 0),
    ("B", PETS, "dog", 1), ("B", PETS, "B", 1), ("dog", PETS, "(B) dog", 1), ("dog", PETS, None, 0),
    ("-", ("x", "y"), "z", 0), ("<5", ("<5", ">5"), "<5", 1), ("<5", ("<5", ">5"), ">5", 0),
    ("Red Sign", (), "red  sign!", 1), ("3.5", (), "3.5", 1), ("3.5", (), "35", 0),
    ("+", (), "-", 0), ("C++", (), "c++.", 1), ("x", (), None, 0)])
def test_outcome(right, choices, answer, value):
    """1 if both name the same option, by text or letter; without options, if the texts agree."""
    assert outcome(Question("?", right, None, choices), answer) == value


def test_outcome_of_a_benchmark_is_its_own_rule():
    """V*'s reference finds the option in a sentence, where our rule finds none."""
    question = Question("?", "B", None, PETS, benchmark="V*")
    assert outcome(question, "It is a dog.") == 1 and outcome(question, "It is a cat.") == 0
    assert outcome(Question("?", "B", None, PETS), "It is a dog.") == 0


# ---- semantic score ------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def scorer(policy) -> Scorer:
    return Scorer(policy)


@pytest.fixture(scope="module")
def looks(trajectories) -> list[Turn]:
    return [turn for t in trajectories for turn in t.looks]


def test_score_by_hand():
    """Eq. 9 and 10. References at cosines .1, .2, .3: mean .2, deviation .1. So a cosine of .4 is 2
    deviations above the mean, which is the threshold; .5 is 3, and .2 is 0."""
    scorer = Scorer.__new__(Scorer)                      # without a model
    scorer.references = torch.tensor([[.1, 0], [.2, 0], [.3, 0]])
    s = scorer.squash(torch.tensor([.4, .5, .2]), text=torch.tensor([[1., 0.]]).expand(3, 2))
    expected = torch.sigmoid(torch.tensor([0., SHARPNESS, -SHARPNESS * THRESHOLD]))
    assert torch.allclose(s, expected, atol=5e-3)


def test_references(policy, scorer, questions):
    """128 unit vectors or a few more, however few the images are: of the questions that are given,
    or of 64 others. No chance."""
    own = Scorer(policy, questions[:3]).references
    assert len(own) == 3 * 43 and len(scorer.references) == 128
    assert torch.allclose(own.norm(dim=1), torch.ones(129), atol=1e-5)
    assert torch.equal(own, Scorer(policy, questions[:3]).references)


def test_score_tells_right_crops_from_wrong_ones(policy, scorer):
    """On held-out scenes: crops of the object that the label names, and crops one cell beside."""
    labels, crops, truth = [], [], []
    for question in world_questions(World(coarse=0), 0, "test", 500, 80):
        image, plates = question.open(), list(question.objects.items())
        for (name, plate), shift in zip(plates, (0, 24)):
            x1, y1, x2, y2 = (v / BLOCK for v in plate)
            box = (x1 - 4 + shift, y1 - 4, x2 + 4 + shift, y2 + 4)
            if box[2] <= 96:
                labels.append(f"the {name}")
                crops.append(crop_at(policy, image, box))
                truth.append(holds(tuple(BLOCK * v for v in box), plate))
    values = scorer(labels, policy.encode_images(crops)).numpy()
    assert values.min() >= 0 and values.max() <= 1
    assert area_under_curve(values, np.array(truth)) > .9


def test_a_vague_label_does_not_win(scorer, trajectories):
    """Words that fit every crop score clearly below the true description of the same crops."""
    good = [turn for t in trajectories for turn in t.looks if not astray(turn, t.question)]
    crops = [turn.crop_tokens for turn in good]
    true = scorer([turn.call.label for turn in good], crops).mean()
    for vague in ("a coloured mark on the ground", "some shape with a pattern",
                  "a circle or a square or a triangle"):
        assert scorer([vague] * len(good), crops).mean() < true - .3


def test_a_score_depends_on_its_pair_alone(scorer, looks):
    """Not on the batch, its order, or the padding by a longer label; and not on what was scored
    before, not even in the last bit: a resumed run begins with a fresh scorer."""
    labels = [turn.call.label for turn in looks[:6]]
    crops = [turn.crop_tokens for turn in looks[:6]]
    together = scorer(labels, crops)
    alone = torch.cat([scorer([label], [crop]) for label, crop in zip(labels, crops)])
    longer = scorer(["a label of many more words than these", *labels], [crops[0], *crops])
    assert torch.allclose(together, alone, atol=1e-4)
    assert torch.allclose(together, longer[1:], atol=1e-4)
    assert torch.allclose(together, scorer(labels[::-1], crops[::-1]).flip(0), atol=1e-4)
    assert torch.equal(together, scorer(labels, crops))


def test_neither_case_nor_article_counts(scorer, looks):
    crops = [looks[0].crop_tokens] * 4
    scores = scorer(["red circle", "The red circle", "a Red CIRCLE", "an red circle"], crops)
    assert torch.equal(scores, scores[:1].expand(4))


def test_scores_line_up_with_turns(scorer, trajectories):
    """s and looked have a column a turn: filled where the turn looked, 0 elsewhere."""
    score_looks(trajectories, scorer)
    r, s, looked = rewards(trajectories)
    assert s.shape == looked.shape == (len(trajectories), max(len(t.turns) for t in trajectories))
    for i, t in enumerate(trajectories):
        assert r[i] == outcome(t.question, t.answer)
        for k in range(s.shape[1]):
            looks_here = k < len(t.turns) and t.turns[k].crop_tokens is not None
            assert looked[i, k] == looks_here
            expected = 0.
            if looks_here:
                expected = scorer([t.turns[k].call.label], [t.turns[k].crop_tokens]).item()
            assert s[i, k].item() == pytest.approx(expected, abs=1e-4)


# ---- stories by hand -----------------------------------------------------------------------------

PLATE, OTHER = (0, 0, 64, 64), (192, 0, 256, 64)
CLOSE, BESIDE, WIDE = (-32, -32, 96, 96), (160, -32, 288, 96), (0, 0, 768, 768)
OBJECTS = {"red circle": PLATE, "blue square": OTHER}


def story(answer: str, *looks: tuple[str, tuple], objects=OBJECTS, boxes=(PLATE,)) -> Trajectory:
    """A trajectory of looks (label, box in pixels of the original) and a last turn that answers."""
    question = Question("?", "rising", None, ("rising", "vee"), boxes=boxes, objects=objects)
    turns = [Turn("", slice(0, 0), Call(ZOOM, label, {}), box) for label, box in looks]
    turns.append(Turn("<think>a b</think><answer>x</answer>", slice(0, 0)))
    return Trajectory(question, Tokens([]), Tokens([]), [], [], (96, 96), (96, 96), turns, answer)


FOUR = [story("rising", ("the red circle", CLOSE)),     # seen, right
        story("A", ("the Red Circle", BESIDE)),         # looked beside, lucky
        story("vee"),                                   # never looked, wrong
        story("rising", ("the red circle", WIDE), ("the blue square", BESIDE))]  # too wide, lucky


def test_measures_by_hand():
    """Three of four are right, and two of those by luck. One of the four looks is astray."""
    assert [hit(t) for t in FOUR] == [True, False, False, False]
    m = measure(FOUR)
    assert m["accuracy"] == .75 and m["calls"] == 1 and m["hit"] == .25 and m["gap"] == .25
    assert m["lucky"] == pytest.approx(2 / 3) and m["valid"] == 1 and m["semantic"] is None


def test_errors_and_scores_are_measured():
    """One turn of three failed; the two looks have scores .2 and .6."""
    told = story("rising", ("the red circle", CLOSE), ("the red circle", WIDE))
    told.turns[0].score, told.turns[1].score = .2, .6
    told.turns[2].error = "bad_json"
    m = measure([told])
    assert m["valid"] == pytest.approx(2 / 3) and m["semantic"] == pytest.approx(.4)


def test_how_many_end_in_an_answer():
    silent = story("rising", ("the red circle", CLOSE))
    silent.answer = None
    assert measure(FOUR)["answered"] == 1 and measure([silent, *FOUR])["answered"] == .8


def test_measures_over_ranks():
    """Two ranks with one and three of the stories say what one says of all four."""
    sums = {}
    for part in (FOUR[:1], FOUR[1:]):
        order = iter(range(99))

        def add(x):
            place = next(order)
            sums[place] = sums.get(place, 0) + x
            return sums[place]

        found = measure(part, add)
    assert found == measure(FOUR)


def test_all_the_evidence_must_be_seen():
    """Of two pieces of evidence one look shows one; a second look may show the other."""
    both = dict(boxes=(PLATE, OTHER))
    assert not hit(story("A", ("the red circle", CLOSE), **both))
    assert hit(story("A", ("the red circle", CLOSE), ("the blue square", BESIDE), **both))


def test_a_label_that_names_nothing_is_astray():
    told = story("rising", ("the green moon", CLOSE), ("the red circle", CLOSE))
    assert [astray(turn, told.question) for turn in told.looks] == [True, False]


def test_a_label_names_whole_words():
    """"car" is not named by "scarf", nor "red circle" by "coloured circle"; an article of the
    object's own name does not count."""
    objects = {"The Number": PLATE, "car": PLATE, "red circle": PLATE, "公交车": PLATE,
               "cafe\u0301": PLATE}
    said = {"number on the bus": False, "the scarf": True, "a coloured circle": True,
            "the car, red": False, "two cars": False, "carson": True, "红色公交车": False,
            "the caf\u00e9": False}
    told = story("rising", *((label, CLOSE) for label in said), objects=objects)
    assert [astray(turn, told.question) for turn in told.looks] == list(said.values())


def test_unknown_evidence_is_not_counted():
    """A photograph without boxes has no hit and no gap, rather than wrong ones."""
    m = measure([story("rising", ("the sign", CLOSE), objects={}, boxes=())])
    assert m["hit"] is m["gap"] is m["lucky"] is None and m["accuracy"] == 1


def test_a_look_has_the_score_of_its_label_and_its_crop(scorer, trajectories):
    t = next(t for t in trajectories if t.looks and t.turns[0].call)
    score_looks([t], scorer)
    alone = scorer([t.turns[0].call.label], [t.turns[0].crop_tokens]).item()
    assert t.turns[0].score == pytest.approx(alone, abs=1e-4)


def test_area_under_curve_by_hand():
    """Of the four pairs .9 beats both negatives; .3 loses to .8, and ties with .3: 2.5 of 4."""
    scores, positive = np.array([.9, .8, .3, .3]), np.array([True, False, True, False])
    assert area_under_curve(scores, positive) == 2.5 / 4
    assert area_under_curve(scores, ~positive) == 1.5 / 4
