"""docs/probe.py: sketches keep products, its gradients are train.py's, its estimates unbiased."""
import dataclasses
import json
import sys
from types import SimpleNamespace

import pytest
import torch

import mapo
from conftest import ROOT
from lib import shard
from lib.policy import Policy
from reward import Scorer, hit, outcome, score_looks
from tiny.world import World, world_questions
from train import Config, accumulate, token_advantages, to_batch

sys.path.insert(0, str(ROOT / "docs"))
import probe
import theory


# ---- eq. 23 --------------------------------------------------------------------------------------

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
    error, bound = torch.tensor(found), (2 / width) ** .5
    assert (error.mean(0).abs() < 3 * bound / 200 ** .5).all()
    assert (error.square().mean(0).sqrt() < 1.15 * bound).all() and error[:, 1].std() > .8 * bound


@pytest.fixture(scope="module")
def sketched(trajectories):
    """24 scored trajectories, a policy to differentiate, and u. As elsewhere, but the first group
    never answers: its outcomes are all equal."""
    told = [dataclasses.replace(t, answer=None) if i < 4 else t
            for i, t in enumerate(trajectories)]
    policy = Policy(ROOT / "tiny")
    score_looks(told, Scorer(policy, world_questions(World(), 0, "train", 10**6, 16)))
    return policy, told, probe.score_vectors(policy, told)


@pytest.mark.parametrize("name", probe.ROWS)
def test_gradients_are_those_of_training(sketched, name):
    """The mean of g_q, put together from sketches, is the sketch of the gradient that train.py
    accumulates. Only DAPO drops the group without a signal."""
    policy, told, u = sketched
    C, kept = probe.coefficients(told, name, 4)
    assembled = torch.einsum("nk,nkm->m", C[kept.repeat_interleave(4)],
                             u[kept.repeat_interleave(4)]) / kept.sum()
    assert 0 < kept.sum() and (kept.sum() < 6) == (name == "dapo")

    if name == probe.ORACLE:
        told = probe.paid_for_hits(told)
    algo, beta, credit = probe.ROWS[name]
    row, config = mapo.ALGORITHMS[algo], Config(algo=algo, beta=beta, credit=credit, group=4)
    part = [t for i, t in enumerate(told) if kept[i // 4]]
    run = SimpleNamespace(config=config, algorithm=row, critic=None)
    parameters = policy.freeze_vision()
    optimiser = shard.ShardedAdamW(parameters)
    accumulate(policy, optimiser, to_batch(part, token_advantages(run, part), row), row, config)
    places = {}
    for bucket in optimiser.buckets:
        for p, span in zip(bucket.parameters, bucket.spans):
            places[id(p)] = bucket.gradient[span]
    flat = torch.cat([places[id(p)] for p in parameters])
    trained = -probe.count_sketch(len(flat))(flat)
    assert trained.norm() > 0 and (assembled - trained).norm() < 2e-3 * trained.norm()


def test_the_oracle_is_paid_for_hits(sketched):
    _, told, _ = sketched
    paid = [outcome(t.question, t.answer) for t in probe.paid_for_hits(told)]
    assert paid == [float(hit(t)) for t in told] and 0 < sum(paid) < len(paid)


def test_turns_of_looks_and_of_answers(trajectories):
    """Errors are neither; a turn that looked is no answer."""
    t = next(t for t in trajectories if t.looks and t.answer is not None)
    last = len(t.turns) - 1
    looks = [float(k < last and turn.call is not None) for k, turn in enumerate(t.turns)]
    wrong = [dataclasses.replace(turn, call=None, error="json") for turn in t.turns]
    told = [t, dataclasses.replace(t, answer=None), dataclasses.replace(t, turns=wrong)]
    rest = [0.] * (probe.TURNS - 1 - last)
    assert probe.counted(told, "all").tolist() == [[1.] * (last + 1) + rest] * 3
    assert probe.counted(told, "looks").tolist() == [looks + rest] * 2 + [[0.] * probe.TURNS]
    answer = [0.] * last + [1.] + rest
    assert probe.counted(told, "answers").tolist() == [answer, [0.] * probe.TURNS, answer]


def test_all_is_looks_and_answers_and_errors(sketched):
    """Each kind's gradient is its share: with the errors they add up to the whole."""
    _, told, u = sketched
    C, _ = probe.coefficients(told, "grpo", 4)
    parts = [probe.counted(told, kind) for kind in ("looks", "answers")]
    errors = probe.counted(told, "all") - parts[0] - parts[1]
    assert errors.min() == 0
    total = sum(torch.einsum("nk,nkm->m", C * part, u) for part in [*parts, errors])
    assert torch.allclose(total, torch.einsum("nk,nkm->m", C, u), atol=1e-4)


# ---- eq. 24 --------------------------------------------------------------------------------------

def synthetic(n: int, generator: torch.Generator) -> torch.Tensor:
    """n gradients with |G|^2 = .25 and tr Cov = 10."""
    return .5 / 10 ** .5 + torch.randn(n, 10, generator=generator)


def test_estimates_are_unbiased_and_intervals_cover():
    """|G|^2 = .25 and tr Cov = 10 on average over 400 small samples, where |mean g|^2 says .25 +
    10/24. The interval of the SNR holds the truth in at least 93%, and is not absurdly wide."""
    g = torch.Generator().manual_seed(0)
    W, found, naive, covered, width = probe.resamples(24, 200), [], [], [], []
    for _ in range(400):
        x = synthetic(24, g)
        signal, noise = probe.signal_noise(x @ x.T, W)
        found.append([signal[0], noise[0]])
        naive.append(x.mean(0).square().sum())
        _, low, high = probe.interval(signal / noise)
        covered.append(low <= .025 <= high)
        width.append(high - low)
    signal, noise = torch.tensor(found).mean(0)
    assert signal.item() == pytest.approx(.25, abs=.03)
    assert noise.item() == pytest.approx(10, rel=.02)
    assert torch.tensor(naive).mean().item() == pytest.approx(.25 + 10 / 24, rel=.1)
    spread = (torch.tensor(found)[:, 0] / torch.tensor(found)[:, 1]).std().item()
    assert sum(covered) >= .93 * 400 and sum(width) / 400 < 2 * 4 * spread


def test_signal_and_noise_by_hand():
    """Gradients 1, 3, 5: products 3, 5, 15, so |G|^2 = 23/3; mean square 35/3, so noise 4."""
    x = torch.tensor([[1.], [3.], [5.]])
    signal, noise = probe.signal_noise(x @ x.T, torch.ones(1, 3))
    assert signal.item() == pytest.approx(23 / 3) and noise.item() == pytest.approx(4)


def test_weights_are_repetitions():
    """A question drawn twice counts as two with one gradient, but is no pair of its own."""
    x = synthetic(5, torch.Generator().manual_seed(1))
    drawn = [0, 0, 2, 3, 4]
    K = x[drawn] @ x[drawn].T
    pairs = [K[i, j] for i in range(5) for j in range(5) if drawn[i] != drawn[j]]
    signal, noise = probe.signal_noise(x @ x.T, torch.tensor([[2., 0, 1, 1, 1]]))
    assert signal.item() == pytest.approx((sum(pairs) / len(pairs)).item(), rel=1e-4)
    assert (signal + noise).item() == pytest.approx(K.diag().mean().item(), rel=1e-4)


def test_resamples_draw_n_questions():
    W = probe.resamples(7, 50)
    assert W.shape == (51, 7) and (W[0] == 1).all() and (W.sum(1) == 7).all()


def test_no_interval_where_a_resample_has_no_value():
    assert probe.interval(torch.tensor([1., 2., torch.inf])) == [None, None, None]
    assert probe.interval(torch.arange(401.)) == [0., pytest.approx(10.975), pytest.approx(390.025)]


# ---- eq. 15 --------------------------------------------------------------------------------------

def test_measured_moments_are_those_of_the_model():
    """Also where questions differ in r and S, whatever their share; the group's mean removes it."""
    model = theory.Looking(sd=.3, shared=.4)
    place, r, s = model.sample((8000, 8), torch.Generator().manual_seed(0))
    offset = torch.randn(8000, 1, generator=torch.Generator().manual_seed(1))
    W = torch.tensor([[1.] * 8000, [2.] * 4000 + [0.] * 4000])
    found, zz = probe.moments((place == 0).float(), r + offset, s - offset, W)
    for name, value in vars(model.moments).items():
        assert torch.allclose(getattr(found, name), torch.tensor(value), atol=.01), name
    assert found.snr(.4)[0].item() == pytest.approx(model.moments.snr(.4), rel=.03)
    assert zz[0].item() == pytest.approx(.25 * .75, rel=.01)
    by_15, by_18, oracle = probe.predicted(found, zz).values()
    x, x_0 = (.1875 * model.moments.snr(b) for b in (.4, 0.))
    assert by_15[0].item() == pytest.approx(x / x_0, rel=.03)
    assert by_18[0].item() == pytest.approx(x / (1 + x) / (x_0 / (1 + x_0)), rel=.03)
    assert oracle[0].item() == pytest.approx((1 + x_0) / x_0, rel=.03)


# ---- the page ------------------------------------------------------------------------------------

def test_the_command_measures_and_prints(tmp_path, capsys):
    """Numbers that go elsewhere leave docs/probe.md alone."""
    out, page = str(tmp_path / "new/x.jsonl"), (ROOT / "docs/probe.md").read_text()
    probe.main(["--models", str(ROOT / "tiny"), "--questions", "5", "--out", out])
    records = [json.loads(line) for line in (tmp_path / "new/x.jsonl").open()]
    assert [record["tokens"] for record in records] == list(probe.KINDS)
    assert all(list(record["rows"]) == list(probe.ROWS) for record in records)
    printed = capsys.readouterr().out
    assert "| grpo + S, aim |" in printed and "5 questions with 4 options" in printed
    probe.main(["--out", out, "--table"])
    assert capsys.readouterr().out == printed and (ROOT / "docs/probe.md").read_text() == page


def test_a_cell_is_bold_where_a_difference_is_not_0():
    assert probe.cell([.0012, .0004, .002], 1, 1000, "+") == "**+1.2** [+0.4, +2.0]"
    assert probe.cell([.0012, -.0004, .002], 1, 1000, "+") == "+1.2 [-0.4, +2.0]"
    assert probe.cell([2., 1., 3.], 2) == "2.00 [1.00, 3.00]"
    assert probe.cell(None, 2) == probe.cell([1., None, None], 2) == "-"


def test_what_the_page_says():
    """Its section "What it says" has these. Whoever measures again must read it again."""
    records = [json.loads(line) for line in (ROOT / "docs/probe.jsonl").open()]
    assert [x["tokens"] for x in records] == 2 * list(probe.KINDS)
    start, trained = records[:3], records[3:]
    text = (ROOT / "docs/probe.md").read_text().split(probe.MEASURED)[0]

    def change(record, name, key="snr - grpo"):
        return record["rows"][name][key]

    # 1: looks, at the start: above GRPO at every beta, growing with it; after training at .4
    sweep = [change(start[1], name) for name in probe.SWEEP[1:]]
    assert all(low > 0 for _, low, _ in sweep) and change(trained[1], "grpo + S, beta 0.4")[1] > 0
    assert [mean for mean, *_ in sweep] == sorted(mean for mean, *_ in sweep)
    assert change(start[1], probe.SWEEP[-1], "snr")[0] > change(start[1], probe.ORACLE, "snr")[0]
    for record in (start[1], trained[1]):
        assert probe.cell(record["gains"]["grpo + S, beta 0.4"], 2) in text.replace("\n", " ")
    # 2: answers are below; of all tokens no rise, and after training a fall
    assert all(change(x, "grpo + S, beta 0.4")[2] < 0 for x in (start[2], trained[2], trained[0]))
    assert change(start[0], "grpo + S, beta 0.4")[0] < 0
    # 3: aim
    gains = [x["gains"][probe.AIM] for x in (start[1], start[2], start[0], trained[0])]
    assert [f"{gain[0]:.2f}" for gain in gains] == ["2.20", "0.84", "1.09", "0.81"]
    assert gains[1][1] < 1 < gains[1][2] and gains[2][1] < 1 < gains[2][2]
    # 4
    assert change(trained[2], probe.ORACLE)[2] < 0
