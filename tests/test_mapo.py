"""The method and its rows, by hand: scores, returns, credit, advantages, losses and gradients."""
import ast
import math

import pytest
import torch

import mapo
from mapo import advantages, loss, token_weights, trajectory_score

T, F = True, False
NO_LOOKS = torch.zeros(4, 1), torch.zeros(4, 1, dtype=torch.bool)     # scores and looked of four


# ---- eq. 1 to 3 ----------------------------------------------------------------------------------

def test_trajectory_score_by_hand():
    """Eq. 1: later looks weigh more; turns without a look do not count; no look scores 0."""
    s = torch.tensor([[.2, .8, 0.], [.2, .5, .8], [.9, .9, .9], [.3, .0, .9]])
    looked = torch.tensor([[T, T, F], [T, T, T], [F, F, F], [T, F, T]])
    expected = [(.5 * .2 + .8) / 1.5, (.25 * .2 + .5 * .5 + .8) / 1.75, 0., (.5 * .3 + .9) / 1.5]
    assert torch.allclose(trajectory_score(s, looked, .5), torch.tensor(expected))


def test_coupled_return_by_hand():
    """Eq. 2 with beta .4."""
    R = mapo.coupled_return(torch.tensor([1., 0.]), torch.tensor([.5, .9]), .4)
    assert torch.allclose(R, torch.tensor([.8, .36]))


def test_advantages_by_hand():
    """Eq. 3 for two groups of two. R = .8, .4 and .7, .9: means .6 and .8, deviations .2 and .1."""
    r = torch.tensor([1., 0., 1., 1.])
    s, looked = torch.tensor([[.5], [1.], [.25], [.75]]), torch.tensor([[T]] * 4)
    A = advantages(r, s, looked, 2, beta=.4)
    assert torch.allclose(A, torch.tensor([1., -1., -1., 1.]), atol=1e-4)
    # GRPO sees the first group the same way and nothing at all in the second
    A = advantages(r, s, looked, 2, beta=0.)
    assert torch.allclose(A, torch.tensor([1., -1., 0., 0.]), atol=1e-4)


def test_the_deviation_is_that_of_the_group():
    """It divides by G, not by G - 1: r = 1, 0, 0, 0 has the deviation sqrt(3) / 4."""
    A = advantages(torch.tensor([1., 0, 0, 0]), *NO_LOOKS, 4, beta=0.)
    assert torch.allclose(A, torch.tensor([3., -1, -1, -1]) / math.sqrt(3), atol=1e-4)


def test_dr_grpo_does_not_divide():
    A = advantages(torch.tensor([1., 0, 0, 0]), *NO_LOOKS, 4, beta=0., std=False)
    assert torch.allclose(A, torch.tensor([.75, -.25, -.25, -.25]))


@pytest.mark.parametrize("credit", mapo.CREDITS)
@pytest.mark.parametrize("std", [True, False])
@pytest.mark.parametrize("beta", [0., .4, 1.])
def test_equal_returns_give_exactly_nothing(beta, std, credit):
    """Rounding must not be amplified by 1 / std; looks of other order with one S are no signal."""
    equal = torch.full((8, 2), .1)
    A = advantages(torch.full((8,), 1 / 3), equal, equal > 0, 8, beta, std=std, credit=credit)
    assert (A == 0).all()
    swapped = torch.tensor([[.2, .8], [.8, .2]])
    A = advantages(torch.ones(2), swapped, swapped > 0, 2, beta, 1., credit, std)
    assert (A == 0).all()


@pytest.mark.parametrize("credit", mapo.CREDITS)
def test_order_in_the_group_does_not_matter(credit):
    """Shuffling within groups shuffles the advantages; a group does not see the others."""
    g = torch.Generator().manual_seed(0)
    r = torch.randint(0, 2, (12,), generator=g).float()
    s, looked = torch.rand(12, 3, generator=g), torch.rand(12, 3, generator=g) < .7
    order = torch.cat([4 * i + torch.randperm(4, generator=g) for i in (1, 0, 2)])
    A = advantages(r, s, looked, 4, .4, credit=credit)
    again = advantages(r[order], s[order], looked[order], 4, .4, credit=credit)
    assert torch.allclose(again, A[order], atol=1e-6)


@pytest.mark.parametrize("bad", [dict(group=3), dict(group=0), dict(beta=1.5), dict(lam=0.),
                                 dict(credit="token"), dict(credit="turn"),
                                 dict(r=torch.zeros(4, 1)), dict(scores=torch.zeros(4, 2)),
                                 dict(r=torch.zeros(6))], ids=str)
def test_bad_arguments_are_named(bad):
    good = dict(r=torch.zeros(4), scores=NO_LOOKS[0], looked=NO_LOOKS[1], group=2, beta=.4, lam=.9)
    with pytest.raises(ValueError, match="expected .* found"):
        advantages(**good | bad)


# ---- eq. 5 and 6: credit -------------------------------------------------------------------------

# Three of a group: right after two looks; wrong after a look and an error; wrong without a look.
# With lam 1 and beta .4: S = .5, .4, 0 with the mean .3, and R = .8, .16, 0 with the mean .32.
THREE = dict(r=torch.tensor([1., 0., 0.]), group=3, beta=.4, lam=1.,
             scores=torch.tensor([[.2, .8, 0.], [.4, 0., 0.], [0., 0., 0.]]),
             looked=torch.tensor([[T, T, F], [T, F, F], [F, F, F]]))

# Two of a group, both with an error: before a look, and between looks.
# With lam .5 and beta .5: S = .6, .2 with the mean .4, and R = .8, .1: mean .45, deviation .35.
ERRORS = dict(r=torch.tensor([1., 0.]), group=2, beta=.5, lam=.5,
              scores=torch.tensor([[.4, 0., .7, 0.], [0., .2, 0., 0.]]),
              looked=torch.tensor([[T, F, T, F], [F, T, F, F]]))


def test_score_to_go_by_hand():
    """Eq. 1 over the looks from a turn on; an error turn has those after it; then 0."""
    S = mapo.score_to_go(ERRORS["scores"], ERRORS["looked"], .5)
    assert torch.allclose(S, torch.tensor([[.6, .7, .7, 0.], [.2, .2, 0., 0.]]))


def test_look_credit_by_hand():
    """.6 r + .4 S_it - .32, where S_it = .5, .8, .3 | .4, .3, .3 | 0, 0, 0: turns after the last
    look have the mean .3, and who never looked keeps 0."""
    A = advantages(**THREE, credit="look", std=False)
    returns = torch.tensor([[.8, .92, .72], [.16, .12, .12], [0., 0., 0.]])
    assert torch.allclose(A, returns - .32)
    A = advantages(**THREE, credit="look")
    std = torch.tensor([.8, .16, 0.]).std(correction=0)
    assert torch.allclose(A, (returns - .32) / std, atol=1e-4)


def test_look_credit_of_an_error_turn():
    """It is paid for the looks that it leads to: .5 r + .5 S_it - .45, divided by .35."""
    A = advantages(**ERRORS, credit="look")
    expected = torch.tensor([[.35, .4, .4, .25], [-.35, -.35, -.25, -.25]]) / .35
    assert torch.allclose(A, expected, atol=1e-4)


def test_aim_credit_by_hand():
    """Turn 1 has the looks .2 and .4, mean .3. Turn 2 has one look, which has nothing to be
    compared with. Who never looked has - .3 everywhere: .6 (r - 1/3) + .4 aim."""
    A = advantages(**THREE, credit="aim", std=False)
    assert torch.allclose(A, torch.tensor([[.36, .4, .4], [-.16, -.2, -.2], [-.32, -.32, -.32]]))


def test_aim_credit_where_no_turn_has_two_looks():
    """Only the outcome is left: .5 (r - .5), divided by the deviation .35 of the whole returns."""
    A = advantages(**ERRORS, credit="aim")
    assert torch.allclose(A, torch.tensor([[5 / 7] * 4, [-5 / 7] * 4]), atol=1e-4)


@pytest.mark.parametrize("credit", ["look", "aim"])
def test_who_never_looked_has_the_whole_trajectorys_advantage(credit):
    A = advantages(**THREE, credit=credit)
    assert torch.allclose(A[2], advantages(**THREE)[2].expand(3), atol=1e-6)


def test_aim_only_redistributes_within_a_turn():
    """The score's terms of a turn sum to 0 over the group's looks."""
    g = torch.Generator().manual_seed(0)
    r = torch.randint(0, 2, (40,), generator=g).float()
    s, looked = torch.rand(40, 3, generator=g), torch.rand(40, 3, generator=g) < .6
    A = advantages(r, s, looked, 8, .4, credit="aim", std=False)
    aim = (A - .6 * (r - mapo.group_mean(r, 8))[:, None]) * looked
    assert torch.allclose(aim.view(5, 8, 3).sum(1), torch.zeros(5, 3), atol=1e-6)
    assert aim.abs().max() > .1


@pytest.mark.parametrize("credit", ["look", "aim"])
def test_without_scores_credit_changes_nothing(credit):
    whole = advantages(**THREE | dict(beta=0.))
    assert torch.allclose(advantages(**THREE | dict(beta=0.), credit=credit), whole[:, None])


# ---- eq. 4 ---------------------------------------------------------------------------------------

def test_loss_by_hand():
    """Four tokens: inside the range, clipped above (A > 0), clipped below (A < 0), and not clipped
    though outside, because the clip must never hide a worse surrogate (ratio 1.5, A < 0)."""
    ratio, A = torch.tensor([[1.1, 1.5, .5, 1.5]]), torch.tensor([[2., 2., -1., -1.]])
    value, stats = loss(ratio.log(), torch.zeros(1, 4), A, torch.full((1, 4), .25))
    assert value.item() == pytest.approx(-(1.1 * 2 + 1.2 * 2 + .8 * -1 + 1.5 * -1) / 4, abs=1e-6)
    assert stats["clip_fraction"].item() == pytest.approx(.5)
    k3 = sum(x - 1 - math.log(x) for x in (1.1, 1.5, .5, 1.5)) / 4
    assert stats["kl"].item() == pytest.approx(k3, abs=1e-6)


def gradient(logp, A, weight, **options):
    """d loss / d logp, with an old log-probability of 0 everywhere."""
    logp = logp.clone().requires_grad_()
    loss(logp, torch.zeros_like(logp), A, weight, **options)[0].backward()
    return logp.grad


def test_gradient_of_loss():
    """At ratio 1 it is - w A (REINFORCE), at 1.1 it is - w 1.1 A; a clipped token has none."""
    logp = torch.tensor([[1., 1.1, 1.5]]).log()
    found = gradient(logp, torch.full((1, 3), 3.), torch.full((1, 3), .5))
    assert torch.allclose(found, torch.tensor([[-1.5, -1.65, 0.]]))


def test_clip_higher_is_asymmetric():
    one, logp = torch.ones(1, 1), torch.tensor([[1.5]]).log()
    value, _ = loss(logp, torch.zeros(1, 1), one, one, clip_low=.2, clip_high=.28)
    assert value.item() == pytest.approx(-1.28)


def test_huge_log_ratios_stay_finite():
    far = torch.tensor([[500., -500.]])
    value, stats = loss(far, torch.zeros(1, 2), torch.tensor([[1., -1.]]), torch.full((1, 2), .5))
    assert math.isfinite(value) and math.isfinite(stats["kl"])


def test_token_weights():
    """Trajectories of equal weight, or tokens; what the environment wrote weighs nothing."""
    mask = torch.tensor([[T, T, F, F], [F, T, T, T]])
    equal_trajectories = torch.tensor([[1 / 4, 1 / 4, 0, 0], [0, 1 / 6, 1 / 6, 1 / 6]])
    assert torch.allclose(token_weights(mask), equal_trajectories)
    equal_tokens = torch.tensor([[.2, .2, 0, 0], [0, .2, .2, .2]])
    assert torch.allclose(token_weights(mask, "token"), equal_tokens)
    for mean in ("trajectory", "token"):
        assert (token_weights(torch.zeros(2, 3), mean) == 0).all()


# ---- GSPO ----------------------------------------------------------------------------------------

def test_gspo_ratio_by_hand():
    """Ratios 2 and 1/2: their geometric mean is 1, so nothing is clipped. 1.21 and 1 give 1.1,
    clipped to 1.05. The environment's token, with a ratio of 100, does not count."""
    logp = torch.tensor([[2., .5, 100.], [1.21, 1., 100.], [1.02, 1., 1.]]).log()
    weight = token_weights(torch.tensor([[T, T, F], [T, T, F], [T, F, F]]))
    value, stats = loss(logp, torch.zeros(3, 3), torch.ones(3, 3), weight, .05, .05, "sequence")
    assert value.item() == pytest.approx(-(1 + 1.05 + 1.02) / 3, abs=1e-6)
    assert stats["clip_fraction"].item() == pytest.approx(1 / 3)


@pytest.mark.parametrize("mean", ["trajectory", "token"])
def test_gspo_with_one_advantage_is_the_plain_sequence_ratio(mean):
    """GSPO-token's gradient is that of exp(mean log-ratio), away from ratio 1, clip included."""
    g = torch.Generator().manual_seed(0)
    logp, mask = .5 * torch.randn(8, 5, generator=g), torch.rand(8, 5, generator=g) < .7
    mask[:, 0] = True
    A, weight = torch.randn(8, 1, generator=g).expand(8, 5), token_weights(mask, mean)
    found = gradient(logp, A, weight, clip_low=.2, clip_high=.2, ratio="sequence")

    logp.requires_grad_()
    ratio = ((logp * mask).sum(1) / mask.sum(1)).exp()                    # (8,)
    surrogate = torch.minimum(ratio * A[:, 0], ratio.clamp(.8, 1.2) * A[:, 0])
    (-(surrogate * weight.sum(1)).sum()).backward()
    assert torch.allclose(found, logp.grad, atol=1e-7)
    clipped = (found == 0).all(1)
    assert clipped.any() and not clipped.all()


def test_gspo_with_an_advantage_for_each_token():
    """Ratios 1.44 and 1: the sequence's is 1.2. Each token's gradient is - w 1.2 A of its own; the
    plain form would mix them. With the range up to 1.1 the token with A > 0 is clipped alone."""
    logp, weight = torch.tensor([[1.44, 1., 9.]]).log(), torch.tensor([[.5, .5, 0.]])
    A = torch.tensor([[1., -2., 7.]])
    found = gradient(logp, A, weight, clip_low=.5, clip_high=.5, ratio="sequence")
    assert torch.allclose(found, torch.tensor([[-.6, 1.2, 0.]]))
    found = gradient(logp, A, weight, clip_low=.1, clip_high=.1, ratio="sequence")
    assert torch.allclose(found, torch.tensor([[0., 1.2, 0.]]))


# ---- the table -----------------------------------------------------------------------------------

def test_rows_of_the_table():
    """Each row's numbers as its paper publishes them; MAPO's clip range is ten times GSPO's."""
    rows = mapo.ALGORITHMS
    ranges = {name: (row.clip_low, row.clip_high) for name, row in rows.items()}
    assert ranges == {"mapo": (3e-3, 4e-3), "grpo": (.2, .2), "dr_grpo": (.2, .2),
                      "dapo": (.2, .28), "gspo": (3e-4, 4e-4), "ppo": (.2, .2)}
    dapo = rows["dapo"]
    assert (dapo.mean, dapo.max_draws, dapo.overlong, dapo.std) == ("token", 10, .2, True)
    assert [name for name, row in rows.items() if row.critic] == ["ppo"]
    assert [name for name, row in rows.items() if row.beta] == ["mapo"] and rows["mapo"].beta == .4
    assert {name: row.credit for name, row in rows.items() if row.credit != "trajectory"} \
        == {"mapo": "aim"}
    assert [name for name, row in rows.items() if row.max_draws > 1 or row.overlong] == ["dapo"]
    assert [name for name, row in rows.items() if row.ratio == "sequence"] == ["mapo", "gspo"]


def test_dapo_by_hand():
    """Ratios 1.25 (free), 1.5 (to 1.28), .7 (A < 0: to .8), each token 1/3 of the batch."""
    row, logp = mapo.ALGORITHMS["dapo"], torch.tensor([[1.25, 1.5], [.7, 1.]]).log()
    weight = token_weights(torch.tensor([[T, T], [T, F]]), row.mean)
    A = torch.tensor([[1., 1.], [-1., -1.]])
    value, stats = loss(logp, torch.zeros(2, 2), A, weight, row.clip_low, row.clip_high, row.ratio)
    assert value.item() == pytest.approx(-(1.25 + 1.28 - .8) / 3)
    assert stats["clip_fraction"].item() == pytest.approx(2 / 3)


GROUP_ROWS = [name for name, row in mapo.ALGORITHMS.items() if not row.critic]


@pytest.mark.parametrize("name", GROUP_ROWS)
@pytest.mark.parametrize("beta", [0., .4])
def test_every_row_survives_the_edges(name, beta):
    """Equal returns, no calls, all invalid, groups of one, a one-token trajectory: nothing differs,
    so loss and gradient are exactly 0."""
    row, no = mapo.ALGORITHMS[name], torch.zeros(4, 2, dtype=torch.bool)
    mask = torch.tensor([[T, F, F], [T, T, F], [T, T, T], [F, F, T]])
    weight = token_weights(mask, row.mean)
    for r, looked, group in ((torch.ones(4), no, 4),                   # all right without a call
                             (torch.zeros(4), no, 4),                  # all invalid
                             (torch.ones(4), ~no, 4),                  # equal returns and scores
                             (torch.tensor([1., 0, 1, 0]), ~no, 1)):   # groups of one
        A = advantages(r, torch.full((4, 2), .3), looked, group, beta, std=row.std)
        logp = torch.zeros(4, 3, requires_grad=True)
        value, stats = loss(logp, torch.zeros(4, 3), A[:, None].expand(4, 3), weight,
                            row.clip_low, row.clip_high, row.ratio)
        value.backward()
        assert value == 0 and (logp.grad == 0).all()
        assert all(math.isfinite(x) for x in stats.values())


@pytest.mark.parametrize("name", GROUP_ROWS)
def test_coupling_composes_with_every_row(name):
    """All answers right: GRPO and its kin learn nothing; with beta the better look wins."""
    row, scores = mapo.ALGORITHMS[name], torch.tensor([[.9], [.1]])
    for credit in mapo.CREDITS:
        without, coupled = (advantages(torch.ones(2), scores, scores > 0, 2, beta, credit=credit,
                                       std=row.std) for beta in (0., .4))
        assert (without == 0).all() and (coupled[0] > 0).all() and (coupled[1] < 0).all()


# ---- what DAPO adds ------------------------------------------------------------------------------

def test_dynamic_sampling_keeps_what_teaches():
    """Groups of three: all right and all wrong go, mixed stays; rounding is no signal, a semantic
    score is."""
    r, S = torch.tensor([1., 1, 1, 0, 0, 0, 0, 1, 0]), torch.zeros(9)
    S[3] = .5                                      # one of the wrong answers looked well
    assert mapo.has_signal(r, 3).tolist() == [F, F, T]
    assert mapo.has_signal(mapo.coupled_return(r, S, .4), 3).tolist() == [F, T, T]
    assert mapo.has_signal(mapo.coupled_return(r, S, 0.), 3).tolist() == [F, F, T]
    assert mapo.has_signal(torch.tensor([.3, .3 + 3e-8]), 2).tolist() == [F]


@pytest.mark.parametrize("credit", mapo.CREDITS)
def test_a_group_has_signal_where_its_advantages_are_not_zero(credit):
    """Returns and advantages agree on which groups teach. Not quite for credit by aim: a turn with
    a single look compares it with nothing."""
    g = torch.Generator().manual_seed(1)
    r, looked = torch.randint(0, 2, (60,), generator=g).float(), torch.rand(60, 2, generator=g) < .8
    s = torch.zeros(60, 2)
    s[:30] = torch.rand(30, 2, generator=g)
    R = mapo.coupled_return(r, trajectory_score(s * looked, looked, .95), .4)
    signal = mapo.has_signal(R, 3)
    assert signal.any() and not signal.all()
    A = advantages(r, s * looked, looked, 3, .4, credit=credit)
    learns = (A.view(20, -1) != 0).any(1)
    assert (signal | ~learns).all() and (credit == "aim" or torch.equal(signal, learns))


def test_overlong_penalty_at_the_corners():
    """Eq. 7, limit 100, buffer 20: nothing up to 80, half at 90, -1 at the limit and past it."""
    lengths = torch.tensor([0, 80, 85, 90, 100, 130])
    expected = torch.tensor([0., 0, -.25, -.5, -1, -1])
    assert torch.allclose(mapo.overlong_penalty(lengths, 100, 20), expected)
    for buffer in (0, 101):
        with pytest.raises(ValueError, match="expected 0 < buffer <= limit"):
            mapo.overlong_penalty(lengths, 100, buffer)


def test_the_demonstration(capsys):
    """GRPO's deviation of r = 1, 0, 1, 0, 1 is sqrt(.24): .4 and -.6 become .82 and -1.22."""
    mapo.demonstrate()
    said = capsys.readouterr().out
    assert "A, mapo" in said and "ppo" not in said
    assert said.count(" 0.82") >= 9 and said.count("-1.22") >= 6
    credits = said.split("mapo, by credit")[1]
    assert all(credit in credits for credit in mapo.CREDITS) and len(credits.splitlines()) == 7


def test_imports_nothing_of_the_project():
    """mapo.py can be lifted into another framework alone."""
    names = set()
    for node in ast.walk(ast.parse(open(mapo.__file__).read())):
        if isinstance(node, ast.ImportFrom):
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    assert names == {"dataclasses", "torch"}
