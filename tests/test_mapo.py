"""Hand-worked values for the method: returns, advantages, credit per turn, the clipped loss."""
import math

import pytest
import torch

import mapo
from mapo import advantages, loss, token_weights, trajectory_score, turn_score

T, F = True, False


def test_trajectory_score_by_hand():
    """Eq. 1: later looks weigh more; turns without a look do not count; no look scores 0."""
    s = torch.tensor([[.2, .8, 0.], [.2, .5, .8], [.9, .9, .9], [.3, .0, .9]])
    looked = torch.tensor([[T, T, F], [T, T, T], [F, F, F], [T, F, T]])
    expected = [(.5 * .2 + .8) / 1.5, (.25 * .2 + .5 * .5 + .8) / 1.75, 0., (.5 * .3 + .9) / 1.5]
    assert torch.allclose(trajectory_score(s, looked, .5), torch.tensor(expected))


def test_turn_score_by_hand():
    """A turn's score counts its own look and later ones; the answer's turn gets the whole trajectory's."""
    s, looked = torch.tensor([[.2, .8, 0.]]), torch.tensor([[T, T, F]])
    whole = (.5 * .2 + .8) / 1.5
    assert torch.allclose(turn_score(s, looked, .5), torch.tensor([[whole, .8, whole]]))


def test_advantages_by_hand():
    """Eq. 2 and 3 for two groups of two: R = .6 r + .4 S, then (R - mean) / std of the group."""
    r = torch.tensor([1., 0., 1., 1.])
    s, looked = torch.tensor([[.5], [1.], [.25], [.75]]), torch.tensor([[T]] * 4)
    # R = .8, .4 | .7, .9: means .6, .8; std .2, .1
    assert torch.allclose(advantages(r, s, looked, 2, beta=.4), torch.tensor([1., -1., -1., 1.]), atol=1e-4)
    # GRPO sees the first group the same way and nothing at all in the second
    assert torch.allclose(advantages(r, s, looked, 2, beta=0.), torch.tensor([1., -1., 0., 0.]), atol=1e-4)


def test_advantage_of_unequal_group():
    """Population standard deviation, as GRPO's released code in the field: r = 1, 0, 0, 0 -> std sqrt(3)/4."""
    A = advantages(torch.tensor([1., 0, 0, 0]), torch.zeros(4, 1), torch.zeros(4, 1, dtype=torch.bool), 4, beta=0.)
    assert torch.allclose(A, torch.tensor([3., -1, -1, -1]) / math.sqrt(3), atol=1e-4)


@pytest.mark.parametrize("beta", [0., .4, 1.])
def test_equal_returns_give_no_signal(beta):
    """A group of equal returns has advantage exactly 0: rounding errors must not be amplified by 1/std."""
    A = advantages(torch.full((8,), 1 / 3), torch.full((8, 2), .1), torch.ones(8, 2, dtype=torch.bool), 8, beta)
    assert (A == 0).all()


def test_advantages_ignore_group_order():
    """Shuffling within a group shuffles its advantages; shuffling groups shuffles the groups'."""
    g = torch.Generator().manual_seed(0)
    r, s, looked = torch.randint(0, 2, (12,), generator=g).float(), torch.rand(12, 3, generator=g), torch.rand(12, 3, generator=g) < .7
    order = torch.cat([4 + torch.randperm(4, generator=g), torch.randperm(4, generator=g), 8 + torch.randperm(4, generator=g)])
    A = advantages(r, s, looked, 4, .4)
    assert torch.allclose(advantages(r[order], s[order], looked[order], 4, .4), A[order])


def test_turn_credit_keeps_the_outcome_part():
    """With beta 0 credit per turn equals credit per trajectory; with beta the difference is the score part only."""
    r, s, looked = torch.tensor([1., 0.]), torch.tensor([[.2, .8], [.4, .4]]), torch.tensor([[T, T], [T, F]])
    assert torch.allclose(advantages(r, s, looked, 2, 0., credit="turn"), torch.tensor([[1., 1.], [-1., -1.]]), atol=1e-4)
    A = advantages(r, s, looked, 2, .4, lam=1., credit="turn")
    # R = .6 + .4 * .5, .4 * .4 = .8, .16: mean .48, std .32; turn 2 of the first: R = .6 + .4 * .8 = .92
    assert torch.allclose(A, torch.tensor([[1., .44 / .32], [-1., -1.]]), atol=1e-4)


@pytest.mark.parametrize("bad", [dict(group=3), dict(beta=1.5), dict(lam=0.), dict(credit="token")])
def test_bad_options_are_named(bad):
    options = dict(group=2, beta=.4, lam=.9, credit="trajectory") | bad
    with pytest.raises(ValueError, match="expected"):
        advantages(torch.zeros(4), torch.zeros(4, 1), torch.zeros(4, 1, dtype=torch.bool), **options)


def test_loss_by_hand():
    """Eq. 4 on four tokens: inside the range, clipped above (A > 0), clipped below (A < 0), and not clipped though
    outside, because the clip must never hide a worse surrogate (ratio 1.5, A < 0)."""
    ratio, A = torch.tensor([[1.1, 1.5, .5, 1.5]]), torch.tensor([[2., 2., -1., -1.]])
    value, stats = loss(ratio.log(), torch.zeros(1, 4), A, torch.full((1, 4), .25))
    assert value.item() == pytest.approx(-(1.1 * 2 + 1.2 * 2 + .8 * -1 + 1.5 * -1) / 4, abs=1e-6)
    assert stats["clip_fraction"].item() == pytest.approx(.5)
    k3 = sum(x - 1 - math.log(x) for x in (1.1, 1.5, .5, 1.5)) / 4
    assert stats["kl"].item() == pytest.approx(k3, abs=1e-6)


def test_gradient_of_loss():
    """At ratio 1 the gradient of a token's log-probability is -w A (REINFORCE); a clipped token has none."""
    logp = torch.tensor([[0., math.log(1.5)]], requires_grad=True)
    loss(logp, torch.zeros(1, 2), torch.tensor([[3., 3.]]), torch.tensor([[.5, .5]]))[0].backward()
    assert torch.allclose(logp.grad, torch.tensor([[-1.5, 0.]]))


def test_clip_higher_is_asymmetric():
    value, _ = loss(torch.tensor([[math.log(1.5)]]), torch.zeros(1, 1), torch.ones(1, 1), torch.ones(1, 1), .2, .28)
    assert value.item() == pytest.approx(-1.28)


def test_huge_log_ratios_stay_finite():
    value, stats = loss(torch.tensor([[500., -500.]]), torch.zeros(1, 2), torch.tensor([[1., -1.]]), torch.full((1, 2), .5))
    assert math.isfinite(value.item()) and math.isfinite(stats["kl"].item())


def test_token_weights():
    """Every trajectory weighs the same, whatever its length; environment tokens weigh nothing."""
    w = token_weights(torch.tensor([[T, T, F, F], [F, T, T, T]]))
    assert torch.allclose(w, torch.tensor([[1 / 4, 1 / 4, 0, 0], [0, 1 / 6, 1 / 6, 1 / 6]]))


def test_every_token_weighs_the_same_in_dr_grpo():
    w = token_weights(torch.tensor([[T, T, F, F], [F, T, T, T]]), "token")
    assert torch.allclose(w, torch.tensor([[.2, .2, 0, 0], [0, .2, .2, .2]]))


def test_dr_grpo_does_not_divide_by_the_standard_deviation():
    A = advantages(torch.tensor([1., 0, 0, 0]), torch.zeros(4, 1), torch.zeros(4, 1, dtype=torch.bool), 4, beta=0., std=False)
    assert torch.allclose(A, torch.tensor([.75, -.25, -.25, -.25]))
    assert (advantages(torch.full((4,), 1 / 3), torch.zeros(4, 1), torch.zeros(4, 1, dtype=torch.bool), 4, 0., std=False) == 0).all()


def test_gspo_ratio_by_hand():
    """Ratios 2 and 1/2 in one trajectory: their geometric mean is 1, so nothing is clipped; 1.21 and 1 give 1.1, clipped
    to 1.05. The environment's token, with a ratio of 100, does not count. One token is its own mean."""
    logp = torch.tensor([[2., .5, 100.], [1.21, 1., 100.], [1.02, 1., 1.]]).log()
    weight = token_weights(torch.tensor([[T, T, F], [T, T, F], [T, F, F]]))
    value, stats = loss(logp, torch.zeros(3, 3), torch.ones(3, 3), weight, .05, .05, "sequence")
    assert value.item() == pytest.approx(-(1 + 1.05 + 1.02) / 3, abs=1e-6)
    assert stats["clip_fraction"].item() == pytest.approx(1 / 3)


def test_gspo_gradient_at_ratio_one_is_that_of_grpo():
    """d rho / d logp_t = 1 / T for each of T tokens: summed over the trajectory's tokens it is GRPO's at the start."""
    weight, A = token_weights(torch.tensor([[T, T, T, F]])), torch.full((1, 4), 2.)
    grads = []
    for ratio in ("token", "sequence"):
        logp = torch.zeros(1, 4, requires_grad=True)
        loss(logp, torch.zeros(1, 4), A, weight, ratio=ratio)[0].backward()
        grads.append(logp.grad)
    assert torch.allclose(grads[0], grads[1]) and torch.allclose(grads[0], torch.tensor([[-2 / 3] * 3 + [0.]]))


def test_imports_nothing_of_the_project():
    """mapo.py can be lifted into another framework alone."""
    import ast
    names = {n.name if isinstance(node, ast.Import) else node.module for node in ast.walk(ast.parse(open(mapo.__file__).read()))
             if isinstance(node, (ast.Import, ast.ImportFrom)) for n in node.names}
    assert names <= {"dataclasses", "torch", "math"}


# ---- theory --------------------------------------------------------------------------------------------------------

BETAS = (0., .1, .2, .4, .6, .8, 1.)


@pytest.mark.parametrize("changes, expected", [
    (dict(sd=.2), (2.590, 3.042, 3.626, 5.345, 7.743, 8.744, 6.250)),
    (dict(sd=.6), (2.590, 2.971, 3.236, 2.992, 2.014, 1.186, 0.694)),
    (dict(mu=(.5, .5)), (2.590, 2.582, 2.551, 2.336, 1.669, 0.526, 0.000))])
def test_signal_to_noise_by_hand(changes, expected):
    """Eq. 8 with Dr = .65, v_r = .25 x .09 + .75 x .1875, Ds = .5 or 0."""
    assert [mapo.Looking(**changes).snr(b) for b in BETAS] == pytest.approx(expected, abs=6e-4)


def test_best_and_break_even_beta():
    """At the best weight the two signals' SNR add up; at break-even the SNR is that of the outcome alone."""
    for sd in (.2, .6):
        model = mapo.Looking(sd=sd)
        assert model.snr(model.best_beta) == pytest.approx(model.snr(0) + model.snr(1))
    noisy = mapo.Looking(sd=.6)
    assert noisy.best_beta == pytest.approx(.258, abs=1e-3) and noisy.break_even == pytest.approx(.488, abs=1e-3)
    assert noisy.snr(noisy.break_even) == pytest.approx(noisy.snr(0))
    assert mapo.Looking(sd=.2).break_even == 1


@pytest.mark.parametrize("changes", [dict(sd=.2), dict(sd=.6), dict(mu=(.5, .5)), dict(rho=.5)])
def test_measured_gradient_peaks_where_theory_says(changes):
    """The policy gradient's SNR, through eq. 3's group normalisation, is largest at the beta that eq. 8 names."""
    model = mapo.Looking(**changes)
    predicted, measured = [model.snr(b) for b in BETAS], [mapo.gradient_snr(model, b, questions=10_000) for b in BETAS]
    assert predicted.index(max(predicted)) == measured.index(max(measured))


def test_group_mean_removes_the_variance_between_questions():
    """E[(r - mean of group)^2] = (1 - 1/G) E_q[Var(r | q)]: what differs between questions is gone. Questions are easy
    (.9) or hard (.1), so within each the variance is .09, whatever their mix; 5 standard errors allowed."""
    g, group = torch.Generator().manual_seed(0), 4
    p = torch.where(torch.rand(50_000, 1, generator=g) < .5, .9, .1)
    r = (torch.rand(50_000, group, generator=g) < p).float()
    left = (r - r.mean(1, keepdim=True)).square()
    assert left.mean().item() == pytest.approx(.75 * .09, abs=5 * left.mean(1).std().item() / 50_000 ** .5)
    assert r.var().item() == pytest.approx(.25, abs=.005)


def test_a_score_that_moves_only_with_the_look_keeps_the_aim():
    """Where the score depends on the action through z alone the gradient is parallel for every beta; a vague label
    that scores high wherever it looks turns it away, the more the larger beta."""
    r, s = torch.tensor([.9, .25, .25, .25]), torch.tensor([.8, .3, .3, .3])
    mixed = .6 * r + .4 * s
    assert torch.cosine_similarity(mixed - mixed.mean(), r - r.mean(), dim=0).item() == pytest.approx(1)
    turned = [mapo.aim(b, .95) for b in BETAS]
    assert turned[0] == pytest.approx(1) and turned == sorted(turned, reverse=True) and turned[-1] < .5
