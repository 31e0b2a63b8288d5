"""A turn with a cache of fixed size is the turn with one that grows. To record it needs a GPU:
docs/gpu.py compares sampler and trainer there."""
import pytest
import torch

import rollout
from lib.graph import GraphSession
from lib.policy import Policy
from lib.sampler import Session
from test_sampler import prompts           # a fixture


def conversations(policy, questions, temperature):
    generator = torch.Generator().manual_seed(3)
    return rollout.collect(policy, questions, 4, 3, 40, temperature, generator)


def compare(policy, questions, monkeypatch, temperature=1.):
    """Whole trajectories, with crops, errors, and rows that leave between the turns."""
    plain = conversations(policy, questions, temperature)
    monkeypatch.setattr(rollout, "Session", GraphSession)
    fixed = conversations(policy, questions, temperature)
    assert len({len(t.turns) for t in plain}) > 1
    for one, other in zip(plain, fixed, strict=True):
        assert one.tokens.ids == other.tokens.ids
        assert one.logps == pytest.approx(other.logps, abs=1e-4)


@pytest.mark.parametrize("temperature", [0., 1.])
def test_the_agent_says_the_same(policy, questions, monkeypatch, temperature):
    compare(policy, questions, monkeypatch, temperature)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_other_families_say_the_same(directories, questions, monkeypatch, name):
    """Grouped queries, DeepStack, activation checkpointing."""
    model = Policy(directories[name])
    model.recompute_layers()
    compare(model, questions, monkeypatch)


def test_a_turn_leaves_the_cache_as_the_other_does(policy, prompts):
    """As many columns as were spoken: keys, values, mask, positions, and the newest states."""
    both = [kind(policy, prompts[:2], group=2) for kind in (Session, GraphSession)]
    for session in both:
        session.sample(30, temperature=0)
    plain, fixed = both
    assert torch.equal(plain.mask, fixed.mask) and plain.next == fixed.next
    assert torch.allclose(plain.last[plain.mask[:, -1]], fixed.last[plain.mask[:, -1]], atol=1e-4)
    for one, other in zip(plain.cache.layers, fixed.cache.layers, strict=True):
        real = plain.mask[:, None, :, None].float()
        assert torch.allclose(one.keys * real, other.keys * real, atol=1e-4)
        assert torch.allclose(one.values * real, other.values * real, atol=1e-4)


def test_a_step_may_run_twice(policy, prompts, monkeypatch):
    """Before it is recorded it runs once for the libraries' sake."""
    def say():
        session = GraphSession(policy, prompts)
        return session.sample(30, generator=torch.Generator().manual_seed(0))

    once, step = say(), GraphSession.step
    monkeypatch.setattr(GraphSession, "step", lambda self: step(self) is None or step(self))
    assert say() == once
