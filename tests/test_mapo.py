"""Hand-worked values for the method and the baselines: returns, advantages, credit, losses; theory against measurement."""
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


def test_look_credit_by_hand():
    """S = .5, .4, no look: mean .3. Turn 1 has the looks from then on; an answer after a look has the mean .3, and only its own outcome
    beside it; who never looked keeps S = 0. R = .8, .16, 0 of whole trajectories: mean .32, std .3451."""
    r, s = torch.tensor([1., 0., 0.]), torch.tensor([[.2, .8, 0.], [.4, 0., 0.], [0., 0., 0.]])
    looked = torch.tensor([[T, T, F], [T, F, F], [F, F, F]])
    A = advantages(r, s, looked, 3, .4, lam=1., credit="look")
    std = (torch.tensor([.8, .16, 0.])).std(correction=0)
    expected = torch.tensor([[.8, .92, .72], [.16, .12, .12], [0., 0., 0.]])        # .6 r + .4 x (.5, .8, .3 | .4, .3, .3 | 0)
    assert torch.allclose(A, (expected - .32) / std, atol=1e-4)
    assert torch.equal(advantages(r, s, looked, 3, 0., credit="look"), advantages(r, s, looked, 3, 0., credit="turn"))


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


# ---- DAPO and PPO --------------------------------------------------------------------------------------------------

def test_rows_of_the_table():
    """Each row's numbers as its paper publishes them; only PPO has a critic, only DAPO resamples and punishes length."""
    rows = mapo.ALGORITHMS
    assert [(k, v.clip_low, v.clip_high) for k, v in rows.items() if k in ("dapo", "gspo", "ppo", "grpo")] == [
        ("grpo", .2, .2), ("dapo", .2, .28), ("gspo", 3e-4, 4e-4), ("ppo", .2, .2)]
    assert (rows["dapo"].mean, rows["dapo"].max_draws, rows["dapo"].overlong, rows["dapo"].std) == ("token", 10, .2, True)
    assert {k for k, v in rows.items() if v.critic} == {"ppo"} and {k for k, v in rows.items() if v.beta} == {"mapo"}
    assert {k for k, v in rows.items() if v.max_draws > 1} == {k for k, v in rows.items() if v.overlong} == {"dapo"}


def test_dapo_by_hand():
    """Clip-higher over all tokens of the batch: ratios 1.25 (free), 1.5 (to 1.28), .7 (A < 0: to .8), each token 1/3."""
    row, logp = mapo.ALGORITHMS["dapo"], torch.tensor([[1.25, 1.5], [.7, 1.]]).log()
    weight = token_weights(torch.tensor([[T, T], [T, F]]), row.mean)
    value, stats = loss(logp, torch.zeros(2, 2), torch.tensor([[1., 1.], [-1., -1.]]), weight, row.clip_low, row.clip_high, row.ratio)
    assert value.item() == pytest.approx(-(1.25 + 1.28 - .8) / 3) and stats["clip_fraction"].item() == pytest.approx(2 / 3)


def test_dynamic_sampling_keeps_what_teaches():
    """Groups of three: all right and all wrong go, mixed stays; rounding is no signal, a semantic score is."""
    none, looked = torch.zeros(9, 1), torch.ones(9, 1, dtype=torch.bool)
    r = torch.tensor([1., 1, 1, 0, 0, 0, 0, 1, 0])
    assert mapo.has_signal(mapo.coupled_return(r, none, looked, 0.), 3).tolist() == [F, F, T]
    assert mapo.has_signal(torch.tensor([.3, .3 + 3e-8]), 2).tolist() == [F]
    s = none.clone()
    s[3] = .5  # one of the wrong answers looked well
    assert mapo.has_signal(mapo.coupled_return(r, s, looked, .4), 3).tolist() == [F, T, T]
    assert mapo.has_signal(mapo.coupled_return(r, s, looked, 0.), 3).tolist() == [F, F, T]


@pytest.mark.parametrize("credit", ["trajectory", "turn", "look"])
def test_a_group_has_signal_where_its_advantages_are_not_zero(credit):
    """The criterion on returns and that on advantages agree, whichever train.py has at hand."""
    g = torch.Generator().manual_seed(1)
    r, s, looked = torch.randint(0, 2, (60,), generator=g).float(), torch.zeros(60, 2), torch.rand(60, 2, generator=g) < .8
    s[:30] = torch.rand(30, 2, generator=g)
    A = advantages(r, s, looked, 3, .4, credit=credit)
    signal = mapo.has_signal(mapo.coupled_return(r, s, looked, .4), 3)
    assert signal.any() and not signal.all()
    assert torch.equal(signal, mapo.has_signal(A, 3)) and torch.equal(signal, (A.view(20, -1) != 0).any(1))


def test_overlong_penalty_at_the_corners():
    """DAPO's eq. 13, limit 100, buffer 20: nothing up to 80, half at 90, -1 at the limit and past it."""
    assert torch.allclose(mapo.overlong_penalty(torch.tensor([0, 80, 85, 90, 100, 130]), 100, 20), torch.tensor([0., 0, -.25, -.5, -1, -1]))
    for buffer in (0, 101):
        with pytest.raises(ValueError, match="expected 0 < buffer <= limit"):
            mapo.overlong_penalty(torch.tensor([1]), 100, buffer)


def test_coupled_return_by_hand():
    """Eq. 2: R = .6 r + .4 S; with credit per turn each turn has its own, and no look scores 0."""
    r, s, looked = torch.tensor([1., 0.]), torch.tensor([[.2, .8], [.9, .9]]), torch.tensor([[T, T], [F, F]])
    assert torch.allclose(mapo.coupled_return(r, s, looked, .4, 1.), torch.tensor([.6 + .4 * .5, 0.]))
    assert torch.allclose(mapo.coupled_return(r, s, looked, .4, 1., "turn"), torch.tensor([[.8, .6 + .4 * .8], [0., 0.]]))


def test_gae_by_hand():
    """Three tokens of the agent, V = .5, .2, .4, one observation token between; R = 1 at the end, gamma .9, lam .5.
    delta = .9 x .2 - .5, .9 x .4 - .2, 1 - .4 = -.32, .16, .6; A_3 = .6, A_2 = .16 + .45 x .6 = .43, A_1 = -.32 + .45 x .43."""
    values, mask = torch.tensor([[.5, .2, 99., .4, 99.]]), torch.tensor([[T, T, F, T, F]])
    A, target = mapo.gae(torch.tensor([1.]), values, mask, .9, .5)
    assert torch.allclose(A, torch.tensor([[-.1265, .43, 0., .6, 0.]]))
    assert torch.allclose(target, torch.tensor([[.3735, .63, 0., 1., 0.]]))


def test_gae_reward_per_token():
    """A score paid at a turn's last token and the outcome at the end: with lam = gamma = 1, A is reward-to-go less V."""
    reward, values = torch.tensor([[0., .3, 0., 1.]]), torch.tensor([[.5, .2, 7., .4]])
    A, target = mapo.gae(reward, values, torch.tensor([[T, T, F, T]]), 1., 1.)
    assert torch.allclose(A, torch.tensor([[.8, 1.1, 0., .6]])) and torch.allclose(target, torch.tensor([[1.3, 1.3, 0., 1.]]))
    last = torch.tensor([[0., 0., 0., 1.]])
    for ours, theirs in zip(mapo.gae(last, values, torch.tensor([[T, T, F, T]])), mapo.gae(last[:, 3], values, torch.tensor([[T, T, F, T]]))):
        assert torch.equal(ours, theirs)


def test_gae_without_smoothing_is_one_step():
    """lam = 0: A_t is the temporal difference; a perfect critic leaves no advantage at any lam."""
    values, mask = torch.tensor([[.5, .2, .4]]), torch.ones(1, 3)
    assert torch.allclose(mapo.gae(torch.tensor([1.]), values, mask, 1., 0.)[0], torch.tensor([[-.3, .2, .6]]))
    A, target = mapo.gae(torch.tensor([.7]), torch.full((1, 3), .7), mask)
    assert torch.allclose(A, torch.zeros(1, 3)) and torch.allclose(target, torch.full((1, 3), .7))


def test_gae_ignores_padding_and_what_the_environment_wrote():
    """NaN off the mask, other lengths in the batch, a one-token turn, and a trajectory without a token of the agent."""
    values = torch.tensor([[.5, math.nan, .2], [math.nan, .3, math.nan], [math.nan] * 3])
    A, target = mapo.gae(torch.tensor([1., .5, 1.]), values, torch.tensor([[T, F, T], [F, T, F], [F, F, F]]), 1., 1.)
    assert torch.allclose(A, torch.tensor([[.5, 0., .8], [0., .2, 0.], [0.] * 3]))
    assert torch.allclose(target, torch.tensor([[1., 0., 1.], [0., .5, 0.], [0.] * 3]))


def test_gae_refuses_a_reward_that_would_be_lost():
    with pytest.raises(ValueError, match="at the agent's tokens only"):
        mapo.gae(torch.tensor([[0., 1.]]), torch.zeros(1, 2), torch.tensor([[T, F]]))
    with pytest.raises(ValueError, match="expected"):
        mapo.gae(torch.zeros(1), torch.zeros(1, 3), torch.ones(1, 2))


def test_gae_carries_no_gradient():
    values = torch.zeros(1, 2, requires_grad=True)
    assert not any(x.requires_grad for x in mapo.gae(torch.ones(1), values, torch.ones(1, 2)))


def test_value_loss_by_hand():
    """Target 1, V_old 0, clip .2. V = .1: inside, .9^2. V = .5: the clipped .2 is worse, .8^2. V = -.5: the plain one is
    worse, 1.5^2. The fourth token weighs nothing. Half of the mean over three."""
    values, zeros, weight = torch.tensor([[.1, .5, -.5, 50.]]), torch.zeros(1, 4), torch.tensor([[1., 1, 1, 0]]) / 3
    value = mapo.value_loss(values, zeros, torch.ones(1, 4), weight)
    assert value.item() == pytest.approx((.81 + .64 + 2.25) / 6)


def test_gradient_of_value_loss():
    """w (V - target) while V may move; none once V has moved past the clip towards the target; the old V has none."""
    values = torch.tensor([[.1, .5, -.5]], requires_grad=True)
    mapo.value_loss(values, torch.zeros(1, 3), torch.ones(1, 3), torch.ones(1, 3)).backward()
    assert torch.allclose(values.grad, torch.tensor([[-.9, 0., -1.5]]))


@pytest.mark.parametrize("name", mapo.ALGORITHMS)
@pytest.mark.parametrize("beta", [0., .4])
def test_every_row_survives_the_edges(name, beta):
    """Equal returns, no calls, all invalid, a group of one, a one-token trajectory: loss and gradient are finite and,
    where nothing differs, exactly 0 (for PPO: where the critic is right)."""
    row, no, yes = mapo.ALGORITHMS[name], torch.zeros(4, 2, dtype=torch.bool), torch.ones(4, 2, dtype=torch.bool)
    mask = torch.tensor([[T, F, F], [T, T, F], [T, T, T], [F, F, T]])
    for r, looked, group in ((torch.ones(4), no, 4),       # all right without a call
                             (torch.zeros(4), no, 4),      # all invalid
                             (torch.ones(4), yes, 4),      # equal returns, equal scores
                             (torch.tensor([1., 0, 1, 0]), yes, 1)):  # groups of one
        s = torch.full((4, 2), .3)
        if row.critic:
            R = mapo.coupled_return(r, s, looked, beta)
            A, target = mapo.gae(R, R[:, None].expand(4, 3).clone(), mask)
            assert torch.allclose(target, R[:, None] * mask) and mapo.value_loss(target, target, target, token_weights(mask)) == 0
        else:
            A = advantages(r, s, looked, group, beta, std=row.std)[:, None].expand(4, 3)
        logp = torch.zeros(4, 3, requires_grad=True)
        value, stats = loss(logp, torch.zeros(4, 3), A, token_weights(mask, row.mean), row.clip_low, row.clip_high, row.ratio)
        value.backward()
        assert value == 0 and (logp.grad == 0).all() and all(math.isfinite(x) for x in stats.values())


@pytest.mark.parametrize("name", [name for name, row in mapo.ALGORITHMS.items() if not row.critic])
def test_coupling_composes_with_every_row(name):
    """With all answers right GRPO and its kin learn nothing; beta lets the better look win in each of them."""
    row, looked = mapo.ALGORITHMS[name], torch.ones(2, 1, dtype=torch.bool)
    better = lambda beta: advantages(torch.ones(2), torch.tensor([[.9], [.1]]), looked, 2, beta, std=row.std)
    assert (better(0.) == 0).all() and better(.4)[0] > 0 > better(.4)[1]


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
    predicted, measured = [model.snr(b) for b in BETAS], [
        mapo.snr_of(mapo.sampled(model, b, questions=10_000)[2]).item() for b in BETAS]
    assert predicted.index(max(predicted)) == measured.index(max(measured))


def test_proposition_1_predicted_and_measured():
    """Every row within 4 standard errors: the split of the variance, (1 - 1/G), the gradient's length under each
    baseline and its signal to noise."""
    for what, predicted, measured, error in mapo.group_effect(questions=20_000):
        assert measured.item() == pytest.approx(predicted, abs=4 * error.item()), what


def test_own_mean_only_shortens_the_gradient():
    """(r_i - mean of all) = (G-1)/G (r_i - mean of the others), sample by sample: no direction changes."""
    r = torch.rand(5, 8, generator=torch.Generator().manual_seed(0))
    others = (r.sum(1, keepdim=True) - r) / 7
    assert torch.allclose(r - r.mean(1, keepdim=True), 7 / 8 * (r - others), atol=1e-6)


@pytest.mark.parametrize("changes", [dict(sd=.2), dict(sd=.6), dict(mu=(.5, .5)), dict(shared=.5), dict(shared=1.)])
def test_proposition_2_predicted_and_measured(changes):
    """Eq. 8 against sampled returns, shared noise included, within 4 standard errors."""
    model = mapo.Looking(**changes)
    for beta in (0., .2, .4, .8):
        R, z, _ = mapo.sampled(model, beta, questions=10_000)
        measured, error = mapo.with_error(mapo.scalar_snr, R, z)
        assert measured.item() == pytest.approx(model.snr(beta), abs=4 * error.item())


@pytest.mark.parametrize("shared", [0., .5, .76, .78, 1.])
def test_a_small_beta_helps_unless_the_noise_is_shared(shared):
    """d log SNR / d beta at 0 is 2 (Ds/Dr - c/v_r): with Ds/Dr = .769 it changes sign between .76 and .78."""
    model = mapo.Looking(shared=shared)
    slope = (math.log(model.snr(1e-5)) - math.log(model.snr(0))) / 1e-5
    assert slope == pytest.approx(2 * (.5 / .65 - shared), abs=1e-3)
    assert (model.best_beta > 0) == (model.break_even > 0) == (shared < .769)


def test_shared_noise_in_the_gradient():
    """The same on policy gradients: below the threshold a small beta raises the SNR, above it lowers it, by 4 errors."""
    for shared, sign in ((.5, 1), (1., -1)):
        _, _, (ratio, error) = mapo.edge(mapo.Looking(shared=shared), .1, questions=20_000)
        assert sign * (ratio - 1) > 4 * error


def test_best_beta_is_the_best():
    """Closed forms against a search over beta, with and without shared noise, and where no beta above 0 helps."""
    grid = torch.linspace(0, 1, 1001)
    for model in (mapo.Looking(), mapo.Looking(sd=.6), mapo.Looking(shared=.5), mapo.Looking(shared=1.), mapo.Looking(mu=(.5, .5))):
        snr = torch.tensor([model.snr(b.item()) for b in grid])
        assert grid[snr.argmax()].item() == pytest.approx(model.best_beta, abs=1e-3)
        helped = grid[snr >= snr[0] - 1e-6].max().item()
        assert helped == pytest.approx(model.break_even, abs=2e-3)


def test_a_useless_score_hurts_at_every_beta():
    useless = mapo.Looking(mu=(.5, .5))
    assert useless.best_beta == useless.break_even == 0 and all(useless.snr(b) < useless.snr(0) for b in BETAS[1:])
    _, (returns, error), (gradient, gradient_error) = mapo.edge(useless, .4, questions=20_000)
    assert returns < 1 - 4 * error and gradient < 1 - 4 * gradient_error


@pytest.mark.parametrize("luck, plain, coupled, ratio, best, there", [
    (1 / 2, .19, .48, 2.54, .78, 4.62), (1 / 4, .60, 1.07, 1.78, .63, 2.15), (1 / 8, 1.36, 2.02, 1.48, .47, 1.51),
    (.001, 13.4, 7.60, .57, .09, 1.05)])
def test_the_edge_grows_with_luck(luck, plain, coupled, ratio, best, there):
    """The prediction to be tested on the real agent: worked out apart from this code; SNR times p (1 - p) in the first two."""
    model = mapo.Looking(rho=luck, eps=.05, mu=(.17, .64), sd=.06 ** .5)
    assert (.1875 * model.snr(0), .1875 * model.snr(.4)) == pytest.approx((plain, coupled), rel=5e-3, abs=6e-3)
    assert (model.snr(.4) / model.snr(0), model.best_beta, model.snr(model.best_beta) / model.snr(0)) == pytest.approx(
        (ratio, best, there), abs=6e-3)
    _, (measured, error), (gradient, _) = mapo.edge(model, .4, questions=10_000)
    assert measured.item() == pytest.approx(ratio, abs=4 * error.item() + 5e-3) and (gradient > 1) == (ratio > 1)


def test_proposition_3_predicted_and_measured():
    """turn_score removes the variance of earlier looks (SNR) and no signal (the part of S that z_t moves), within 4
    standard errors; at the first turn it is the whole score; later the policy gradient's SNR rises."""
    rows = mapo.credit_effect(questions=10_000)
    for what, moved, m, m_error, snr, n, n_error, _, _ in rows:
        assert m.item() == pytest.approx(moved, abs=4 * m_error.item()), what
        assert n.item() == pytest.approx(snr, abs=4 * n_error.item()), what
    assert rows[-1][4] == pytest.approx(.5 ** 2 / .2 ** 2)  # the last look alone: Ds^2 / v_s
    gradients = [row[7] for row in rows]
    assert gradients[0] == gradients[1] and gradients[3] > 1.3 * gradients[2] and gradients[5] > 2 * gradients[4]


def test_baselines_per_turn_index_are_biased():
    """Exact gradient: .25 x (.6 - .5) for going on, .5 x .25 x (.9 - .3) for looking well. The whole trajectory's mean
    only shortens it, by 3/4 in a group of four. Rewards centred turn by turn never pay for going on: its sign flips.
    Returns centred turn by turn change the direction, since few reach the second turn; less so in larger groups."""
    exact = torch.tensor([.025, .075])
    assert torch.allclose(mapo.stopping("whole trajectory")[0], .75 * exact)
    assert mapo.stopping("reward per turn")[0][0] < -.05
    turned = mapo.stopping("return per turn")[0]
    assert turned[0].item() == pytest.approx(.75 * .025) and turned[1] < .6 * .075
    larger = mapo.stopping("return per turn", group=8)[0]
    assert turned[1] / turned[0] < larger[1] / larger[0] < 3 and mapo.stopping("reward per turn", group=8)[0][0] < -.09375
    for baseline in ("whole trajectory", "reward per turn", "return per turn"):
        measured, error = mapo.stopping(baseline, questions=20_000)
        assert ((measured - mapo.stopping(baseline)[0]).abs() < 4 * error).all()


def test_turn_score_is_no_reward_to_go_where_looks_are_a_choice():
    """S of one, two, three looks: .4, .3, .52; turn_score at the second: .4 (kept), .2, .58, at the third: .3 (kept), .96.
    Going on raises S, .25 x (.41 - .4), and turn_score pays for stopping, .25 x (.39 - .4). Known, and in docs/theory.md."""
    assert torch.allclose(mapo.going_on("trajectory"), torch.tensor([.0025, .125 * (.52 - .3)]), atol=1e-6)
    assert torch.allclose(mapo.going_on("turn"), torch.tensor([-.0025, .125 * (.96 - .3)]), atol=1e-6)
    # credit "look": who stops has the mean of S, .405; who goes on the looks to come, .39 and .96
    assert torch.allclose(mapo.going_on("look"), torch.tensor([.25 * (.39 - .405), .125 * (.96 - .405)]), atol=1e-6)


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
    turned = [mapo.aim(b, .95, questions=100)[0] for b in BETAS]
    assert turned[0] == pytest.approx(1) and turned == sorted(turned, reverse=True) and turned[-1] < .5
    for vague in (None, .95):
        exact, measured, error = mapo.aim(.4, vague, questions=10_000)
        assert measured.item() == pytest.approx(exact, abs=4 * error.item() + 1e-3)
