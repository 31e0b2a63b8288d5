"""The sampler speaks from the distribution that is trained, whoever else is in the batch."""
import pytest
import torch

from conftest import ROOT
from lib import sampler
from lib.policy import Tokens
from lib.sampler import Session, draw, ends_turn
from rollout import collect
from tools import fit


@pytest.fixture(scope="module")
def prompts(policy, questions):
    images = policy.encode_images([fit(q.open(), policy.resolution) for q in questions])
    return [policy.prompt(image, q.prompt) for image, q in zip(images, questions)]


@pytest.mark.parametrize("max_turns, temperature", [(1, 1.3), (2, .7), (3, 1.)])
def test_sampled_logps_equal_recomputed(policy, questions, max_turns, temperature):
    """The ratio of new to old policy is 1 before a step: within 1e-4 in float32, after any number
    of turns, at any temperature, with shared prompts or without."""
    part = collect(policy, questions, 4, max_turns, 40, temperature,
                   torch.Generator().manual_seed(1))
    assert max(len(t.turns) for t in part) == max_turns
    for prompts in (None, [t.prompt for t in part]):
        with torch.no_grad():
            logp, _ = policy.logprobs([t.tokens for t in part], [t.mask for t in part],
                                      temperature, prompts)
        for row, t in enumerate(part):
            assert (logp[row, :len(t.mask) - 1] - torch.tensor(t.logps[1:])).abs().max() < 1e-4


def test_a_group_that_shares_its_prompt_speaks_as_rows_that_do_not(policy, prompts):
    shared, _ = Session(policy, prompts[:2], group=3).sample(40, temperature=0)
    own, _ = Session(policy, [p for p in prompts[:2] for _ in range(3)]).sample(40, temperature=0)
    assert shared == own


def test_rows_that_stop_early_change_nothing(policy, prompts):
    """Greedy turns of rows that stop at very different lengths, beside others or alone; and the
    next turns after them."""
    nearly = policy.tokens("<think>the red circle has rising</think><answer>rising")
    prompts = prompts[:3] + [prompt + nearly for prompt in prompts[3:]]      # these stop at once
    observation = policy.observation("Error: no")
    session, spoken = Session(policy, prompts), []
    for _ in range(2):
        spoken.append(session.sample(40, temperature=0))
        session.append([observation] * 6)
    lengths = [len(ids) for ids in spoken[0][0]]
    assert max(lengths) >= 4 * min(lengths)
    for row, prompt in enumerate(prompts):
        alone = Session(policy, [prompt])
        for ids, logps in spoken:
            own, own_logps = alone.sample(40, temperature=0)
            assert own[0] == ids[row]
            assert own_logps[0] == pytest.approx(logps[row], abs=1e-4)
            alone.append([observation])


def test_rows_leave_change_places_and_are_repeated(policy, prompts):
    """What a row says next does not depend on who has left between the turns."""
    def second_turns(rows):
        session = Session(policy, prompts)
        session.sample(30, temperature=0)
        session.keep(rows)
        session.append([policy.observation("Error: no")] * len(rows))
        return session.sample(30, temperature=0)

    everyone, logps = second_turns(list(range(6)))
    rows = [4, 1, 1]
    some, some_logps = second_turns(rows)
    assert some == [everyone[row] for row in rows] and len({len(ids) for ids in everyone}) > 1
    for found, row in zip(some_logps, rows):
        assert found == pytest.approx(logps[row], abs=1e-4)


def test_one_random_number_a_row_and_step(policy, prompts):
    """Also of rows that have stopped, until the last one does: so that two samplers that agree in
    the distributions say the same."""
    used, fresh = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    ids, _ = Session(policy, prompts).sample(40, generator=used)
    for _ in range(max(map(len, ids))):
        torch.rand(6, 1, generator=fresh, dtype=torch.float64)
    assert torch.equal(used.get_state(), fresh.get_state())


def test_a_turn_is_no_longer_than_max_tokens(policy, prompts):
    """Temperature 0 takes the most likely token: the beginning of the longer turn."""
    short, _ = Session(policy, prompts).sample(5, temperature=0)
    long, _ = Session(policy, prompts).sample(40, temperature=0)
    assert short == [ids[:5] for ids in long]


@pytest.mark.parametrize("text, ends", [
    ("<answer>rising</answer>", True), ("<tool_call>{}</tool_call>", True), ("yes<|im_end|>", True),
    ("yes<|endoftext|>", True), ("<answer>rising", False), ("</think>", False),
    ("<think>3 > 2", False)])
def test_where_a_turn_ends(policy, text, ends):
    assert ends_turn(policy.tokens(text).ids, policy) == ends


def test_draws_follow_the_distribution():
    """Frequencies match, and a token of probability 0 never comes, wherever it stands."""
    p = torch.tensor([0., .1, 0., .6, .3, 0.])
    tokens = draw(p.log().expand(20_000, -1), torch.Generator().manual_seed(0))
    share = torch.bincount(tokens, minlength=6) / 20_000
    assert share[[0, 2, 5]].sum() == 0 and (share - p).abs().max() < .012      # 3.5 standard errors


def test_a_row_may_be_fed_nothing(policy, prompts):
    """It hears the others' tokens as padding, which changes nothing for it."""
    observation = policy.observation("Error: no")
    session, plain = Session(policy, prompts[:2]), Session(policy, prompts[:2])
    session.append([Tokens([]), observation])
    session.append([observation, Tokens([])])
    plain.append([observation, observation])
    assert session.next == plain.next
    assert torch.allclose(session.last[0], plain.last[0], atol=1e-4)


def test_the_demonstration(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    sampler.demonstrate()
    assert float(capsys.readouterr().out.split()[-1].rstrip(".")) < 1e-4
