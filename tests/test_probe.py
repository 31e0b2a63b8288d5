"""docs/probe.py: sketches keep inner products, its gradients are train.py's, its estimates are unbiased."""
import dataclasses
import json
import sys

import pytest
import torch

import mapo
from lib import shard
from conftest import ROOT
from tiny.world import World, world_questions
from lib.policy import Policy
from reward import Scorer, score
from train import Config, accumulate, advantages

sys.path.insert(0, str(ROOT / "docs"))
import probe


def test_sketch_keeps_inner_products():
    """Over 200 sketches: linear, unbiased, and off by no more than the stated sqrt(2 / width)."""
    g = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, 5000, generator=g)
    y, found, width = .5 * x + noise, [], 256
    for seed in range(200):
        sketch = probe.count_sketch(5000, width, seed)
        a, b = sketch(x), sketch(y)
        found.append([(a @ b - x @ y) / (x.norm() * y.norm()), (a @ a) / (x @ x) - 1])
    assert torch.allclose(sketch(2 * x - y), 2 * a - b, atol=1e-4)
    error = torch.tensor(found)
    bound = (2 / width) ** .5
    assert (error.mean(0).abs() < 3 * bound / 200 ** .5).all()
    assert (error.square().mean(0).sqrt() < 1.15 * bound).all() and error[:, 1].std() > .8 * bound


@pytest.fixture(scope="module")
def trajectories(trajectories):
    """As elsewhere, but the first group never answers: its outcomes are all equal."""
    return [dataclasses.replace(t, answer=None) if i < 4 else t for i, t in enumerate(trajectories)]


@pytest.fixture(scope="module")
def sketched(trajectories):
    """24 scored trajectories, a policy to differentiate, its parameters, the sketch, and the score vectors."""
    policy = Policy(ROOT / "tiny")
    score(trajectories, Scorer(policy, world_questions(World(), 0, "train", 10**6, 16)))
    policy.model.requires_grad_(False)
    parameters = [p.requires_grad_() for n, p in policy.model.named_parameters() if "visual" not in n]
    sketch = probe.count_sketch(sum(p.numel() for p in parameters))
    u, error = probe.score_vectors(policy, parameters, trajectories, sketch, 4, quiet=True)
    return policy, parameters, sketch, u, error


@pytest.mark.parametrize("name", ["grpo", "mapo, beta 0.4", "mapo, credit turn", "dr_grpo, beta 0.4", "dapo", "gspo", "ppo, critic 0"])
def test_gradients_are_those_of_training(sketched, trajectories, name):
    """The mean of g_q, put together from sketches, is the sketch of the gradient that train.py accumulates."""
    policy, parameters, sketch, u, error = sketched
    assert error < 1.5 * (2 / probe.WIDTH) ** .5
    C, kept = probe.coefficients(trajectories, name, 4, 4)
    assembled = probe.question_gradients(C, u, 4)[kept].mean(0)

    algo, beta, credit = probe.ROWS[name]
    row, config = mapo.ALGORITHMS[algo], Config(algo=algo, beta=beta, credit=credit, group=4)
    part = [t for i, t in enumerate(trajectories) if kept[i // 4]]
    assert 0 < len(part) and (len(part) < 24) == (name == "dapo")
    if row.critic:
        policy.add_value_head()
    try:
        advantage, critic = advantages(policy, part, config, row)
        optimiser = shard.ShardedAdamW(parameters)
        accumulate(policy, [optimiser], part, advantage, config, row, critic)
        places = {id(p): b.gradient[span] for b in optimiser.buckets for p, span in zip(b.parameters, b.spans)}
        trained = -sketch(torch.cat([places[id(p)] for p in parameters]))
        optimiser.close()
    finally:
        policy.value_head = None
    assert trained.norm() > 0 and (assembled - trained).norm() < 2e-3 * trained.norm()


def synthetic(n, generator, width=10, length=.5):
    """n gradients with |G|^2 = length^2 and tr Cov = width."""
    return length / width ** .5 + torch.randn(n, width, generator=generator)


def test_estimates_are_unbiased_and_intervals_cover():
    """|G|^2 = .25 and tr Cov = 10 on average over 400 small samples, where |mean g|^2 says .25 + 10/24; the 95% interval of the
    SNR holds the truth in at least 93% of them, and is not absurdly wide."""
    g = torch.Generator().manual_seed(0)
    W, found, naive, covered, width = probe.resamples(24, 200), [], [], [], []
    for _ in range(400):
        x = synthetic(24, g)
        signal, trace = probe.signal_noise(x @ x.T, W)
        found.append([signal[0], trace[0]])
        naive.append(x.mean(0).square().sum())
        _, low, high = probe.interval(signal / trace, centred=True)
        covered.append(low <= .025 <= high)
        width.append(high - low)
    signal, trace = torch.tensor(found).mean(0)
    assert signal.item() == pytest.approx(.25, abs=.03) and trace.item() == pytest.approx(10, rel=.02)
    assert torch.tensor(naive).mean().item() == pytest.approx(.25 + 10 / 24, rel=.1)
    spread = (torch.tensor(found)[:, 0] / torch.tensor(found)[:, 1]).std().item()
    assert sum(covered) >= .93 * 400 and sum(width) / 400 < 2 * 4 * spread


def test_weights_are_repetitions():
    """A question drawn twice counts as two with the same gradient, but is no pair of its own."""
    x = synthetic(5, torch.Generator().manual_seed(1))
    w = torch.tensor([2., 0, 1, 1, 1])
    rows = x[[0, 0, 2, 3, 4]]
    K = rows @ rows.T
    pairs = [K[i, j] for i in range(5) for j in range(5) if i != j and {i, j} != {0, 1}]
    assert probe.pairs_mean(x @ x.T, w[None])[0].item() == pytest.approx((sum(pairs) / len(pairs)).item(), rel=1e-4)


def test_cosine_of_halves():
    """1 without noise, 0 without signal, and otherwise what n/2 questions a half give: s / (s + 2 / n), s the SNR. With another
    algorithm's gradients it is the cosine of the two directions."""
    g, halves, one = torch.Generator().manual_seed(0), probe.random_halves(400), torch.ones(1, 400)
    assert (halves.sum(1) == 200).all()
    cosine = lambda x: probe.half_cosine(x @ x.T, one, halves)[0].item()
    assert cosine(torch.ones(400, 5)) == pytest.approx(1, abs=1e-4)
    trial = lambda length: sum(cosine(synthetic(400, g, 50, length)) for _ in range(20)) / 20
    assert trial(0.) == pytest.approx(0, abs=.06)
    assert trial(.5) == pytest.approx(.005 / (.005 + 2 / 400), abs=.06)
    x, y = torch.zeros(2, 400, 2)
    x[:, 0], y[:] = 1, torch.tensor([3., 4.])
    assert probe.half_cosine(x @ x.T, one, halves, (x @ y.T, y @ y.T, one))[0].item() == pytest.approx(.6, abs=1e-4)


def test_eq_8_of_measured_moments_is_the_snr_of_returns():
    """Plugging moments into eq. 8 is mapo.scalar_snr, and taking each group's mean off removes what differs between questions."""
    model = mapo.Looking(sd=.3, shared=.4)
    action, r, s = model.sample((4000, 8), torch.Generator().manual_seed(0))
    z, one = (action == 0).float(), torch.ones(1, 4000)
    curve, best, _ = probe.predicted([m.item() for m in probe.moments(z, r, s, one, within=False)])
    for b, value in zip(probe.BETAS, curve):
        assert value == pytest.approx(mapo.scalar_snr((1 - b) * r + b * s, z == 1).item(), rel=1e-3)
    assert best == pytest.approx(model.best_beta, abs=.03)
    offset = torch.randn(4000, 1, generator=torch.Generator().manual_seed(1))
    within = torch.stack(probe.moments(z, r + offset, s - offset, one, within=True))[:, 0]
    assert torch.allclose(within, torch.tensor(model.moments), atol=.01)


def test_eq_19_in_the_model():
    """Without the division by the deviation the noise of a group's gradient splits exactly: what z alone leaves, and eq. 8."""
    model = mapo.Looking(rho=.5, sd=.4)
    action, r, s = model.sample((60_000 * 8,), torch.Generator().manual_seed(0))
    phi, looked = torch.eye(4)[action] - .25, torch.ones(len(r), 1, dtype=torch.bool)

    def snr(r, beta):
        A = mapo.advantages(r, s[:, None], looked, 8, beta, std=False)
        return mapo.snr_of((A[:, None] * phi).view(-1, 8, 4).mean(1)).item()

    ceiling, plain = snr((action == 0).float(), 0.), snr(r, 0.)
    for beta in (.2, .4, .8):
        k = 1 / plain - 1 / ceiling
        assert 1 / (1 / ceiling + k * model.snr(0.) / model.snr(beta)) == pytest.approx(snr(r, beta), rel=.05)


def test_rank_correlation():
    x = torch.tensor([1., 2, 3, 4])
    assert probe.rank_correlation(x, x ** 3) == 1 and probe.rank_correlation(x, -x) == -1
    assert probe.rank_correlation(x, torch.tensor([1., 2, 4, 3])).item() == pytest.approx(.8)


def test_command_writes_both_files(tmp_path, capsys):
    out = str(tmp_path / "x")
    probe.main(["--model", str(ROOT / "tiny"), "--questions", "5", "--group", "2", "--after", "nowhere", "--out", out])
    record = json.loads((tmp_path / "x.jsonl").read_text())
    assert list(record["rows"]) == list(probe.ROWS) and record["questions"] == 5
    assert record["rows"]["grpo"]["signal"] == record["rows"]["gspo"]["signal"]
    text = (tmp_path / "x.md").read_text()
    assert "nowhere: no config.json" in capsys.readouterr().out and "| grpo |" in text and "eq. 8" in text
    (tmp_path / "x.md").unlink()
    probe.main(["--out", out, "--page"])
    assert (tmp_path / "x.md").read_text() == text
