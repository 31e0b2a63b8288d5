"""Rewards: right is right however it is written, and a description scores by what the crop shows."""
import time

import numpy as np
import pytest
import torch

from lib.data import DataError, Question, holds
from tiny.world import World, world_questions
from reward import Scorer, answerable, area_under_curve, astray, choose, grounded, measure, outcome, score
from rollout import Trajectory, Turn
from tools import MAX_ANSWER_CHARS, Call, zoom
from lib.policy import Tokens


@pytest.fixture(scope="module")
def scorer(policy):
    return Scorer(policy, world_questions(World(), 0, "train", 10**6, 64))


CHOICES = ("rising", "the red sign", "42", "C")


@pytest.mark.parametrize("answer, index", [
    ("rising", 0), (" Rising. ", 0), ("A", 0), ("(a)", 0), ("a.", 0), ("(A) rising", 0), ("A: rising", 0), ("The Red Sign", 1),
    ("B", 1), ("42", 2), ("(C) 42", 2), ("C", 3), ("(D)", 3), ("d) c", 3), ("E", None), ("rising 42", None), ("A rising sun", None),
    ("(B) rising", None), ("", None), ("neither", None), ("a red sign", None), ("Answer A", None), ("ＡＡ", None), ("(A) (B)", None)])
def test_which_option_an_answer_names(answer, index):
    """Text or letter, or both when they agree; never a letter found inside a sentence."""
    assert choose(answer, CHOICES) == index


@pytest.mark.parametrize("right, choices, answer, value", [
    ("rising", CHOICES, "a", 1), ("rising", CHOICES, "b", 0), ("B", ("cat", "dog"), "dog", 1), ("B", ("cat", "dog"), "B", 1),
    ("dog", ("cat", "dog"), None, 0), ("Red Sign", (), "red  sign!", 1), ("3.5", (), "3.5", 1), ("3.5", (), "35", 0), ("-", ("x", "y"), "z", 0)])
def test_outcome(right, choices, answer, value):
    assert outcome(Question("?", right, None, choices), answer) == value


def test_score_tells_right_crops_from_wrong_ones(policy, scorer):
    """On held-out scenes: a crop of the labelled object against a crop one cell beside it, AUC over 0.9 (issue's target)."""
    labels, crops, truth = [], [], []
    for q in world_questions(World(coarse=0), 0, "test", 500, 80):
        image = q.open()
        for (name, p), shift in zip(list(q.objects.items())[:2], (0, 24)):
            box = tuple(v / 8 + d for v, d in zip(p, (-4 + shift, -4, 4 + shift, 4)))
            if box[2] <= 96:
                crops.append(zoom(image, Call("", box), (96, 96), policy.resolution)[0])
                labels.append(f"the {name}")
                truth.append(holds(tuple(v * 8 for v in box), p))
    values = scorer(labels, policy.encode_images(crops)).numpy()
    assert values.min() >= 0 and values.max() <= 1
    assert area_under_curve(values, np.array(truth)) > .9


def test_a_vague_label_does_not_win(policy, scorer, trajectories):
    """Words that fit every crop score clearly below the true description, on the same crops."""
    good = [(turn.call.label, turn.crop_tokens) for t in trajectories for turn in t.looks if not astray(turn, t.question)]
    true = scorer([l for l, _ in good], [c for _, c in good]).mean()
    for vague in ("a coloured mark on the ground", "some shape with a pattern", "a circle or a square or a triangle"):
        assert scorer([vague] * len(good), [c for _, c in good]).mean() < true - .3


def test_score_ignores_batch_and_article(policy, scorer, trajectories):
    """A pair's score depends on the pair alone; "The red circle" is "red circle"."""
    looks = [turn for t in trajectories for turn in t.looks][:6]
    labels, crops = [t.call.label for t in looks], [t.crop_tokens for t in looks]
    together = scorer(labels, crops)
    assert torch.allclose(together[2], scorer(labels[2:3], crops[2:3])[0], atol=1e-4)
    assert torch.allclose(together, scorer.matrix(labels, crops).diagonal(), atol=1e-4)
    assert torch.allclose(scorer(["red circle"], crops[:1]), scorer(["The red circle"], crops[:1]), atol=1e-6)


def test_score_does_not_remember(policy, scorer, trajectories):
    """A resumed run starts with a fresh scorer: what was embedded before must not show, not even in the last bit."""
    looks = [turn for t in trajectories for turn in t.looks][:4]
    labels, crops = [t.call.label for t in looks], [t.crop_tokens for t in looks]
    first = scorer(labels, crops)
    scorer(["a label of many more words than these", *labels[:2]], crops[:3])
    assert torch.equal(first, scorer(labels, crops))


def test_the_worst_answer_takes_no_time():
    """Dots and spaces made the patterns of `normalise` and `choose` take seconds."""
    question, start = Question("?", "a", None, ("a", "b")), time.time()
    for answer in ("." * MAX_ANSWER_CHARS, "B x" + " " * (MAX_ANSWER_CHARS - 4) + "x"):
        assert outcome(question, answer) == 0
    assert time.time() - start < .5


def test_scores_line_up_with_turns(policy, scorer, trajectories):
    """s and looked have a column per turn: filled where the turn looked, 0 elsewhere."""
    r, s, looked = score(trajectories, scorer)
    for i, t in enumerate(trajectories):
        assert r[i] == outcome(t.question, t.answer)
        for k in range(s.shape[1]):
            turn = t.turns[k] if k < len(t.turns) else None
            assert bool(looked[i, k]) == bool(turn and turn.crop_tokens)
            assert s[i, k].item() == pytest.approx(turn.score if looked[i, k] else 0)


def story(answer, *looks, objects={"red circle": (0, 0, 64, 64), "blue square": (192, 0, 256, 64)}, boxes=((0, 0, 64, 64),)):
    question = Question("?", "rising", None, ("rising", "dots"), boxes=boxes, objects=objects)
    turns = [Turn("", slice(0, 0), Call(label, (0,) * 4), box, error="") for label, box in looks] + [Turn("", slice(0, 0))]
    return Trajectory(question, Tokens([]), Tokens([]), [], [], (96, 96), (96, 96), turns, answer, "answer")


def test_measures_by_hand():
    """Four stories: seen and right; looked beside and lucky; never looked and wrong; too wide to read and lucky."""
    close, beside, wide = (-0., 0., 128., 128.), (192., 0., 320., 128.), (0., 0., 768., 768.)
    told = [story("rising", ("the red circle", close)), story("A", ("the red circle", beside)), story("dots"),
            story("rising", ("the red circle", wide), ("the blue square", beside))]
    m = measure(told)
    assert m["accuracy"] == .75 and m["calls"] == 1 and m["hit"] == .25 and m["gap"] == .25
    assert m["lucky"] == pytest.approx(2 / 3) and m["valid"] == 1 and m["semantic"] is None
    assert [grounded(t) for t in told] == [True, False, False, False]


def test_a_label_that_names_nothing_is_astray():
    t = story("rising", ("the green moon", (0., 0., 128., 128.)))
    assert astray(t.turns[0], t.question)


def test_unknown_evidence_is_not_counted():
    """Photographs without boxes have no hit and no gap, rather than a wrong one."""
    m = measure([story("rising", ("the sign", (0., 0., 10., 10.)), objects={}, boxes=())])
    assert m["hit"] is None and m["gap"] is None and m["lucky"] is None and m["accuracy"] == 1


def test_area_under_curve_by_hand():
    assert area_under_curve(np.array([.9, .8, .3, .3]), np.array([True, False, True, False])) == pytest.approx((1 + 1 + 0 + .5) / 4)


def test_answers_that_no_option_names_are_refused(questions):
    """Such a question could never be right; the error names it. Signs count: "<5" is not ">5", and "+" is not "-"."""
    with pytest.raises(DataError, match="question 7: field 'answer': expected one of .'a', 'b'.* found 'c'"):
        answerable([Question("?", "c", None, ("a", "b"), id="7")])
    assert answerable(questions) == questions
    signs = Question("?", "<5", None, ("<5", ">5"))
    assert outcome(signs, "<5") == 1 and outcome(signs, ">5") == 0 and outcome(signs, "A") == 1
    assert outcome(Question("?", "+", None), "-") == 0 and outcome(Question("?", "C++", None), "c++.") == 1
