"""A turn with a cache of fixed size is the turn with one that grows. To record it needs a GPU, and
docs/gpu.py does it there. Here a stand-in keeps what a graph would keep."""
import copy

import pytest
import torch

import rollout
from lib import graph
from lib.graph import GraphSession
from lib.policy import Policy
from lib.sampler import Session
from test_sampler import prompts           # a fixture


def recording(step, device):
    """As a graph does it: the first run is not recorded; each replay reads the tensors that were
    there at the recording, and writes one tensor."""
    step()
    then = copy.copy(step.__self__)
    output = then.step()

    def replay():
        output.copy_(then.step())
        return output

    return replay


@pytest.fixture
def recorded(monkeypatch):
    monkeypatch.setattr(graph, "recorded", recording)


def compare(policy, questions, monkeypatch, temperature=1.):
    """Whole trajectories, with crops; rows leave between the turns; when hot, with errors."""
    def conversations():
        generator = torch.Generator().manual_seed(3)
        return rollout.collect(policy, questions, 4, 3, 40, temperature, generator)

    plain, count = conversations(), []
    step = GraphSession.step
    monkeypatch.setattr(GraphSession, "step", lambda self: count.append(1) or step(self))
    monkeypatch.setattr(rollout, "Session", GraphSession)
    fixed = conversations()
    turns = [turn for t in plain for turn in t.turns]
    assert count and len({len(t.turns) for t in plain}) > 1
    assert any(turn.crop_tokens for turn in turns)
    assert temperature < 1.5 or any(turn.error for turn in turns)
    for one, other in zip(plain, fixed, strict=True):
        assert one.tokens.ids == other.tokens.ids
        assert one.logps == pytest.approx(other.logps, abs=1e-4)


def test_the_agent_says_the_same(policy, questions, monkeypatch):
    """Unrecorded, as a CPU has it."""
    compare(policy, questions, monkeypatch, temperature=1.5)


@pytest.mark.parametrize("temperature", [0., 1.5])
def test_recorded_it_says_the_same(policy, questions, monkeypatch, recorded, temperature):
    compare(policy, questions, monkeypatch, temperature)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_other_families_say_the_same(directories, questions, monkeypatch, recorded, name):
    """Grouped queries, DeepStack; with activation checkpointing, which must not ask for the random
    state: in a recording that is an error."""
    model = Policy(directories[name])
    model.recompute_layers()
    monkeypatch.setattr(torch, "get_rng_state", None)
    compare(model, questions, monkeypatch)


def test_a_turn_leaves_the_cache_as_the_other_does(policy, prompts, recorded):
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


def test_a_turn_of_one_token(policy, prompts, recorded):
    """And what comes after it."""
    said = []
    for kind in (Session, GraphSession):
        session = kind(policy, prompts)
        first, _ = session.sample(1, temperature=0)
        session.append([policy.observation("Error: no")] * len(prompts))
        said.append([first, session.sample(30, temperature=0)[0]])
    assert said[0] == said[1] and {len(ids) for ids in said[0][0]} == {1}


def test_a_turn_that_fails_leaves_a_session(policy, prompts, monkeypatch):
    """Out of memory in the third step: what was said before it stands, and the session goes on."""
    session, step, count = GraphSession(policy, prompts), GraphSession.step, []

    def failing(self):
        count.append(1)
        if len(count) == 3:
            raise RuntimeError("out of memory")
        return step(self)

    width = session.mask.shape[1]
    monkeypatch.setattr(GraphSession, "step", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        session.sample(30, temperature=0)
    assert session.mask.shape[1] == session.cache.get_seq_length() == width + 2
    session.append([policy.observation("Error: no")] * len(prompts))
    assert session.sample(5, temperature=0)[0]


def test_a_gpu_is_sampled_by_graphs(policy, questions, monkeypatch):
    """Which session rollout.collect begins, by the policy's device."""
    def kind_of(device):
        fake = copy.copy(policy)
        monkeypatch.setattr(rollout, "begin", lambda *_: ([], [], []))
        begun = []
        for kind in (Session, GraphSession):
            monkeypatch.setattr(kind, "__init__",
                                lambda self, *_, kind=kind: begun.append(kind.__name__))
        monkeypatch.setattr(Session, "sample", lambda *_: ([], []))
        monkeypatch.setattr(GraphSession, "sample", lambda *_: ([], []))
        fake.device = torch.device(device)
        rollout.collect(fake, questions)
        return begun

    assert kind_of("cpu") == ["Session"] and kind_of("cuda") == ["GraphSession"]
