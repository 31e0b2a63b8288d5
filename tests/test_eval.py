"""Evaluation: intervals, tables and histograms that say what happened."""
import pytest

from data import World, world_questions
from eval import evaluate, histogram, record, table, wilson


@pytest.mark.parametrize("right, n, low, high", [(5, 10, .2366, .7634), (0, 10, 0, .2775), (191, 191, .9803, 1), (0, 0, 0, 1)])
def test_wilson_interval_by_hand(right, n, low, high):
    """Against values worked out from Wilson's formula."""
    assert wilson(right, n) == pytest.approx((low, high), abs=2e-4)


def test_greedy_evaluation_does_not_depend_on_the_batch(policy, questions):
    """One at a time or all at once: the same answers and the same looks."""
    one, all_ = evaluate(policy, questions, batch=1), evaluate(policy, questions, batch=6)
    assert [record(a) for a in one] == [record(b) for b in all_]


def test_evaluation_keeps_no_features(policy, questions):
    """Memory stays flat over thousands of questions."""
    t = evaluate(policy, questions[:2])[0]
    assert not t.tokens.features and all(turn.crop_tokens is None for turn in t.turns)


def test_table_has_every_category_and_the_histogram_every_letter(policy):
    trajectories = evaluate(policy, world_questions(World(), 0, "test", 0, 40))
    text = table(trajectories)
    assert all(word in text for word in ("direct_attributes", "comparison", "coarse_to_fine", "all", "95% interval"))
    assert sum(int(w) for w in histogram(trajectories).split()[2::4]) == 40
