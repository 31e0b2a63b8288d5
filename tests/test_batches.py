"""From lists to tensors: column j speaks of token j + 1; micro-batches are bounded and complete."""
import runpy
from types import SimpleNamespace

import pytest
import torch

from conftest import ROOT
from lib.batches import micro_batches, pad, spread


def told(length: int, *spans: tuple[int, int], prompt: object = None) -> SimpleNamespace:
    """A trajectory of so many tokens, with turns at these spans."""
    turns = [SimpleNamespace(span=slice(*span)) for span in spans]
    return SimpleNamespace(mask=[False] * length, turns=turns, prompt=prompt)


def test_pad_begins_with_the_second_token():
    assert pad([[1, 2, 3], [4, 5], [6]], 0).tolist() == [[2, 3], [5, 0], [0, 0]]
    assert pad([[True, False, True]], False).dtype == torch.bool


def test_spread_by_hand():
    """One value for all tokens, or one for each turn's tokens and 0 elsewhere."""
    two = [told(6, (1, 3), (4, 6)), told(4, (2, 4))]
    whole = spread(torch.tensor([7., 8.]), two)
    assert whole.tolist() == [[7.] * 5, [8.] * 5]
    by_turn = spread(torch.tensor([[1., 2.], [3., 9.]]), two)
    assert by_turn.tolist() == [[1, 1, 0, 2, 2], [0, 3, 3, 0, 0]]


def test_micro_batches_by_hand():
    """Lengths 5, 9, 7 and 4: shortest first, and rows x longest within the limit."""
    four = [told(length, prompt=object()) for length in (5, 9, 7, 4)]
    rows = [0, 1, 2, 3]
    assert micro_batches(four, rows, 1) == [[3], [0], [2], [1]]        # at least one row
    assert micro_batches(four, rows, 9) == [[3], [0], [2], [1]]
    assert micro_batches(four, rows, 10) == [[3, 0], [2], [1]]
    assert micro_batches(four, rows, 18) == [[3, 0], [2, 1]]
    assert micro_batches(four, rows, 36) == [[3, 0, 2, 1]]
    assert micro_batches(four, [1, 3], 36) == [[3, 1]] and micro_batches(four, [], 36) == []


def test_groups_stay_together():
    """Sorted by the longest of a group, not by each one's own length: a prompt is computed once."""
    a, b = object(), object()
    five = [told(3, prompt=a), told(9, prompt=a), *(told(n, prompt=b) for n in (5, 4, 6))]
    assert micro_batches(five, [0, 1, 2, 3, 4], 10**9) == [[2, 3, 4, 0, 1]]


@pytest.mark.parametrize("limit", [1, 700, 2400, 10**9])
def test_micro_batches_are_bounded_and_complete(trajectories, limit):
    rows = list(range(len(trajectories)))
    batches = micro_batches(trajectories, rows, limit)
    assert sorted(i for batch in batches for i in batch) == rows
    for batch in batches:
        width = max(len(trajectories[i].mask) for i in batch)
        assert len(batch) == 1 or len(batch) * width <= limit


def test_the_demonstration(capsys):
    runpy.run_path(str(ROOT / "lib/batches.py"), run_name="__main__")
    assert "at most  10 padded tokens: rows [[0], [1], [2]]" in capsys.readouterr().out
