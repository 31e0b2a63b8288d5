"""PPO's parts, by hand: advantages, the value loss, payments, and a critic that disturbs nobody."""
import math
import runpy
from types import SimpleNamespace

import pytest
import torch

import mapo
from conftest import ROOT
from lib.critic import Critic, gae, payments, value_loss
from lib.policy import Policy

T, F = True, False


# ---- eq. 11 --------------------------------------------------------------------------------------

def test_gae_by_hand():
    """Three tokens of the agent, V = .5, .2, .4, one token of the environment between them; reward
    1 at the end, gamma .9, gae_lam .5. delta = .9 x .2 - .5 = -.32, .9 x .4 - .2 = .16, 1 - .4;
    A_3 = .6, A_2 = .16 + .45 x .6 = .43, A_1 = -.32 + .45 x .43 = -.1265."""
    values, mask = torch.tensor([[.5, .2, 99., .4, 99.]]), torch.tensor([[T, T, F, T, F]])
    reward = torch.tensor([[0., 0., 0., 1., 0.]])
    A, target = gae(reward, values, mask, .9, .5)
    assert torch.allclose(A, torch.tensor([[-.1265, .43, 0., .6, 0.]]))
    assert torch.allclose(target, torch.tensor([[.3735, .63, 0., 1., 0.]]))


def test_gae_of_a_reward_on_the_way():
    """A score at a turn's end and the outcome at the last token: with gae_lam = gamma = 1, A is the
    reward to go less V."""
    reward, values = torch.tensor([[0., .3, 0., 1.]]), torch.tensor([[.5, .2, 7., .4]])
    A, target = gae(reward, values, torch.tensor([[T, T, F, T]]), 1., 1.)
    assert torch.allclose(A, torch.tensor([[.8, 1.1, 0., .6]]))
    assert torch.allclose(target, torch.tensor([[1.3, 1.3, 0., 1.]]))


def test_gae_without_smoothing_is_one_step():
    """gae_lam 0: A is the temporal difference."""
    reward, values = torch.tensor([[0., 0., 1.]]), torch.tensor([[.5, .2, .4]])
    A, _ = gae(reward, values, torch.ones(1, 3), 1., 0.)
    assert torch.allclose(A, torch.tensor([[-.3, .2, .6]]))


def test_a_critic_that_is_right_leaves_no_advantage():
    reward, values = torch.tensor([[0., 0., .7]]), torch.full((1, 3), .7)
    A, target = gae(reward, values, torch.ones(1, 3))
    assert torch.allclose(A, torch.zeros(1, 3)) and torch.allclose(target, values)
    assert value_loss(target, target, target, torch.ones(1, 3) / 3) == 0


def test_gae_ignores_padding_and_what_the_environment_wrote():
    """NaN off the mask, other lengths, a turn of one token, a trajectory without own tokens."""
    nan = math.nan
    values = torch.tensor([[.5, nan, .2], [nan, .3, nan], [nan] * 3])
    mask = torch.tensor([[T, F, T], [F, T, F], [F, F, F]])
    reward = torch.tensor([[0., 0., 1.], [0., .5, 0.], [0.] * 3])
    A, target = gae(reward, values, mask, 1., 1.)
    assert torch.allclose(A, torch.tensor([[.5, 0., .8], [0., .2, 0.], [0.] * 3]))
    assert torch.allclose(target, torch.tensor([[1., 0., 1.], [0., .5, 0.], [0.] * 3]))


def test_gae_carries_no_gradient():
    values = torch.zeros(1, 2, requires_grad=True)
    assert not any(x.requires_grad for x in gae(torch.ones(1, 2), values, torch.ones(1, 2)))


# ---- eq. 12 --------------------------------------------------------------------------------------

def test_value_loss_by_hand():
    """Target 1, V_old 0, clip .2. V = .1: inside, .9^2. V = .5: the clipped .2 is worse, .8^2.
    V = -.5: the plain one is worse, 1.5^2. The fourth token weighs nothing. Half of the mean."""
    values, zeros = torch.tensor([[.1, .5, -.5, 50.]]), torch.zeros(1, 4)
    weight = torch.tensor([[1., 1, 1, 0]]) / 3
    value = value_loss(values, zeros, torch.ones(1, 4), weight)
    assert value.item() == pytest.approx((.81 + .64 + 2.25) / 6)


def test_gradient_of_value_loss():
    """w (V - target) while V may move; none once V has passed the clip towards the target."""
    values = torch.tensor([[.1, .5, -.5]], requires_grad=True)
    value_loss(values, torch.zeros(1, 3), torch.ones(1, 3), torch.ones(1, 3)).backward()
    assert torch.allclose(values.grad, torch.tensor([[-.9, 0., -1.5]]))


# ---- payments ------------------------------------------------------------------------------------

def told(length: int, *spans: tuple[int, int]) -> SimpleNamespace:
    """A trajectory of so many tokens, with turns at these spans of its own tokens."""
    mask = [any(start <= j < stop for start, stop in spans) for j in range(length)]
    turns = [SimpleNamespace(span=slice(*span)) for span in spans]
    return SimpleNamespace(mask=mask, turns=turns)


def test_payments_by_hand():
    """beta .5, lam .5. First: right; looks of .4 and .7 around an error, S = (.2 + .7) / 1.5 = .6,
    shares .5 x .2 / 1.5 = 1/15 and .5 x .7 / 1.5 = 7/30. Second: right, never looked."""
    two = [told(14, (2, 4), (6, 7), (8, 10), (12, 14)), told(6, (2, 6))]
    r, s = torch.ones(2), torch.tensor([[.4, 0., .7, 0.], [0.] * 4])
    looked = torch.tensor([[T, F, T, F], [F] * 4])
    whole = payments(two, r, s, looked, .5, .5, "trajectory")
    by_look = payments(two, r, s, looked, .5, .5, "look")
    expected = torch.zeros(2, 14)
    expected[0, 13], expected[1, 5] = .5 + .3, .5
    assert torch.allclose(whole, expected[:, 1:])
    expected[0, 3], expected[0, 9], expected[0, 13] = 1 / 15, 7 / 30, .5
    assert torch.allclose(by_look, expected[:, 1:])


@pytest.mark.parametrize("credit", mapo.CREDITS)
def test_payments_sum_to_the_return(trajectories, credit):
    """Whatever the credit: the sum is eq. 2's R, and it is paid at tokens of the agent only."""
    looked = torch.zeros(len(trajectories), 4, dtype=torch.bool)
    for i, trajectory in enumerate(trajectories):
        for k, turn in enumerate(trajectory.turns):
            looked[i, k] = turn.call is not None
    g = torch.Generator().manual_seed(0)
    r, s = torch.rand(len(looked), generator=g), torch.rand(looked.shape, generator=g) * looked
    paid = payments(trajectories, r, s, looked, .4, .9, credit)
    R = mapo.coupled_return(r, mapo.trajectory_score(s, looked, .9), .4)
    assert torch.allclose(paid.sum(1), R, atol=1e-6)
    for i, trajectory in enumerate(trajectories):
        own = torch.tensor(trajectory.mask[1:])
        assert (paid[i, :len(own)][~own] == 0).all() and (paid[i, len(own):] == 0).all()


# ---- the critic ----------------------------------------------------------------------------------

def own_tokens(trajectories) -> torch.Tensor:
    """(N, L - 1)"""
    mask = torch.zeros(len(trajectories), max(len(t.mask) for t in trajectories), dtype=torch.bool)
    for i, trajectory in enumerate(trajectories):
        mask[i, :len(trajectory.mask)] = torch.tensor(trajectory.mask)
    return mask[:, 1:]


class Batch:
    """12 trajectories, paid at random at their ends."""

    def __init__(self, policy, trajectories):
        g = torch.Generator().manual_seed(0)
        self.policy, self.trajectories = policy, trajectories[:12]
        self.mask = own_tokens(self.trajectories)
        self.reward = torch.zeros(self.mask.shape)
        for i, trajectory in enumerate(self.trajectories):
            self.reward[i, trajectory.turns[-1].span.stop - 2] = torch.rand(1, generator=g)
        self.weight = mapo.token_weights(self.mask, "token")

    def critic(self, micro_tokens: int) -> tuple[Critic, torch.Tensor]:
        """A critic that has taken a step, so that V is not 0, and then saw the batch again."""
        critic = Critic(self.policy)
        critic.advantages(self.trajectories, self.reward, 10**9)
        critic.update(self.weight, lr=1e-2, grad_clip=1.)
        return critic, critic.advantages(self.trajectories, self.reward, micro_tokens)

    def update(self, critic: Critic) -> tuple[torch.Tensor, float]:
        """The gradient of an update, weight and then bias, and its loss."""
        value = critic.update(self.weight, lr=1e-3, grad_clip=1e9)
        bucket, = critic.optimiser.buckets
        parts = {id(p): bucket.gradient[span] for p, span in zip(bucket.parameters, bucket.spans)}
        return torch.cat([parts[id(p)] for p in critic.head.parameters()]), value


@pytest.fixture(scope="module")
def batch(policy, trajectories):
    return Batch(policy, trajectories)


def test_first_gradient_is_that_of_the_dense_loss(batch):
    """1/2 sum w (V - target)^2 over all tokens at once, its targets too, by autograd."""
    critic, _ = batch.critic(700)
    weight, bias = (p.detach().clone().requires_grad_() for p in critic.head.parameters())
    found, value = batch.update(critic)
    with torch.no_grad():
        states = batch.policy.hidden([t.tokens for t in batch.trajectories])[0][:, :-1]
    V = torch.where(batch.mask, (states @ weight.T + bias)[..., 0], 0.)           # (N, L - 1)
    assert V.abs().max() > .01
    _, target = gae(batch.reward, V.detach(), batch.mask)
    dense = .5 * (batch.weight * (V - target).square()).sum()
    assert value == pytest.approx(dense.item(), rel=1e-4)
    plain = torch.cat([g.flatten() for g in torch.autograd.grad(dense, [weight, bias])])
    assert (found - plain).norm() < 1e-4 * plain.norm() and plain.norm() > 0


def test_micro_batches_do_not_change_the_critic(batch):
    """One micro-batch, or one a trajectory: equal advantages, equal loss, equal gradient."""
    (one, whole), (many, pieces) = batch.critic(10**9), batch.critic(1)
    assert len(one.batches) == 1 and len(many.batches) == 12
    assert torch.allclose(whole, pieces, atol=1e-3)
    (whole, value), (pieces, other) = batch.update(one), batch.update(many)
    assert (whole - pieces).norm() < 1e-4 * whole.norm() and other == pytest.approx(value, rel=1e-4)


def test_advantages_are_whitened_over_the_agents_tokens(batch):
    critic, A = batch.critic(2048)
    own = A[batch.mask]
    assert own.mean().abs() < 1e-5 and own.std(correction=0).item() == pytest.approx(1, abs=1e-4)
    raw, _ = gae(batch.reward, critic.old, batch.mask)
    raw = raw[batch.mask]
    assert torch.allclose(own, (raw - raw.mean()) / raw.std(correction=0), atol=1e-4)


def test_the_value_head_never_disturbs_the_policy(trajectories):
    """The policy's parameters could learn here, and get no gradient and no step."""
    policy = Policy(ROOT / "tiny")
    parameters = policy.freeze_vision()
    before = [p.detach().clone() for p in parameters]
    batch = Batch(policy, trajectories)
    critic, _ = batch.critic(2048)
    batch.update(critic)
    assert all(p.grad is None for p in parameters)
    assert all(torch.equal(p, b) for p, b in zip(parameters, before))
    assert (critic.head.weight != 0).any()


def test_the_critic_learns(batch):
    """Repeated updates on one batch bring the value loss down."""
    critic, _ = batch.critic(10**9)
    losses = [critic.update(batch.weight, lr=1e-2, grad_clip=1.) for _ in range(10)]
    assert losses[-1] < losses[0]


def test_a_gradient_that_is_not_finite_leaves_the_critic_alone(batch):
    critic, _ = batch.critic(10**9)
    batch.update(critic)
    before = critic.head.weight.detach().clone()
    critic.target[0, :] = math.nan
    critic.update(batch.weight, lr=1e-2, grad_clip=1.)
    assert torch.equal(critic.head.weight, before) and before.any()


def test_the_demonstration(capsys):
    """gae_lam 1: the reward to go, 1, less V."""
    runpy.run_path(str(ROOT / "lib/critic.py"), run_name="__main__")
    last = capsys.readouterr().out.splitlines()[-1]
    assert "0.60  0.60  0.00  0.00  0.30  0.10" in last
