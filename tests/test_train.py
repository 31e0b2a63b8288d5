"""The loop: a gradient that is eq. 4's however it is cut, steps that are skipped and said, runs
that are killed and go on bit for bit, and settings that are checked before anything runs."""
import dataclasses
import json
import math
import os
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import mapo
import reward
import train as training
from conftest import ROOT
from lib import checkpoint, shard
from lib.batches import spread
from lib.data import DataError, write_jsonl
from lib.policy import Policy
from tiny.world import World, world_questions
from train import (FREE, Batch, Config, Questions, accumulate, held_out, measured, own_questions,
                   parse_config, roll_out, run_name, take_step, to_batch, token_advantages, train)

CLOCK = {"seconds", "rollout_seconds", "tokens_per_s", "peak_mb"}


def small(out: Path, **changes) -> Config:
    """A question a step, four trajectories of it; no questions before and after."""
    settings = dict(model=str(ROOT / "tiny"), out=str(out), beta=.4, steps=1, questions=1, group=4,
                    eval_questions=0, save_every=2)
    return Config(**settings | changes)


# ---- the gradient --------------------------------------------------------------------------------

class Learner:
    """A policy of its own, and what accumulate() leaves in its optimiser."""

    def __init__(self):
        self.policy = Policy(ROOT / "tiny")
        self.parameters = self.policy.freeze_vision()

    def gradient(self, batch: Batch, row: mapo.Algorithm, **settings) -> tuple[Tensor, dict]:
        """Flat, in the order of the parameters; and the statistics."""
        optimiser = shard.ShardedAdamW(self.parameters)
        totals = accumulate(self.policy, optimiser, batch, row, Config(**settings))
        parts = {}
        for bucket in optimiser.buckets:
            for p, span in zip(bucket.parameters, bucket.spans):
                parts[id(p)] = bucket.gradient[span]
        return torch.cat([parts[id(p)] for p in self.parameters]), totals

    def plain(self, trajectories: list, A: Tensor, row: mapo.Algorithm, clip: float) -> Tensor:
        """The gradient of eq. 4, written out: one trajectory after the other, no padding, no shared
        prompts, no weights, by autograd. A: (N,)."""
        total, low, high = 0., 1 - clip * row.clip_low, 1 + clip * row.clip_high
        tokens = sum(sum(t.mask) for t in trajectories)
        for t, a in zip(trajectories, A):
            logits = self.policy.model.lm_head(self.policy.hidden([t.tokens])[0])[0, :-1]
            logits[:, self.policy.banned] = -math.inf
            logp = logits.log_softmax(-1)[range(len(logits)), t.tokens.ids[1:]]
            own = torch.tensor(t.mask[1:])
            log_ratio = (logp - torch.tensor(t.logps[1:]))[own]
            if row.ratio == "sequence":
                log_ratio = log_ratio.mean().expand(len(log_ratio))
            ratio = log_ratio.exp()
            surrogate = torch.minimum(ratio * a, ratio.clamp(low, high) * a)
            mean = surrogate.mean() / len(trajectories)
            total = total - (surrogate.sum() / tokens if row.mean == "token" else mean)
        slopes = torch.autograd.grad(total, self.parameters)
        return torch.cat([slope.flatten() for slope in slopes])


@pytest.fixture(scope="module")
def learner():
    return Learner()


@pytest.fixture(scope="module")
def twelve(trajectories):
    """Trajectories of three groups, and advantages (12,) at random."""
    return trajectories[:12], torch.randn(12, generator=torch.Generator().manual_seed(0))


def moved(trajectories: list) -> list:
    """The same, as if another policy had sampled them: at each token, log-probabilities differ by
    about .2."""
    g = torch.Generator().manual_seed(0)
    result = []
    for t in trajectories:
        noise = .2 * torch.randn(len(t.logps), generator=g)
        logps = (torch.tensor(t.logps) + noise).tolist()
        result.append(dataclasses.replace(t, logps=logps))
    return result


def close(a: Tensor, b: Tensor, tolerance: float = 1e-4) -> bool:
    return bool((a - b).norm() < tolerance * b.norm()) and b.norm().item() > 0


@pytest.mark.parametrize("algo, clip", [("mapo", 1.), ("dapo", 1.), ("gspo", 50.)])
def test_gradient_is_that_of_eq_4(algo, clip, learner, twelve):
    """Away from ratio 1, with tokens that are clipped and others that are not: whatever the size of
    a micro-batch, the gradient is that of the whole batch by autograd."""
    trajectories, A = twelve
    trajectories, row = moved(trajectories), mapo.ALGORITHMS[algo]
    expected = learner.plain(trajectories, A, row, clip)
    batch, counts = to_batch(trajectories, spread(A, trajectories), row), []
    for micro_tokens in (1, 1200, 10**9):
        found, totals = learner.gradient(batch, row, clip=clip, micro_tokens=micro_tokens)
        assert close(found, expected) and .05 < totals["clip_fraction"] < .95
        counts.append(totals["micro_batches"])
    assert counts[0] == 12 > counts[1] > counts[2] == 1


def test_the_ratio_is_one_before_the_first_step(learner, twelve):
    """There the gradient is REINFORCE's, - sum A grad log pi: nothing is clipped, and sampler and
    trainer agree."""
    trajectories, A = twelve
    row = mapo.ALGORITHMS["mapo"]
    batch = to_batch(trajectories, spread(A, trajectories), row)
    found, totals = learner.gradient(batch, row)
    assert totals["logp_gap"] < 1e-4 and totals["kl"] < 1e-6 and totals["clip_fraction"] == 0
    assert totals["loss"] == pytest.approx(-A.mean().item(), abs=1e-4)
    total = 0.
    for t, a in zip(trajectories, A):
        logp, _ = learner.policy.logprobs([t.tokens], [t.mask])
        total = total - a * logp.sum() / sum(t.mask) / len(trajectories)
    slopes = torch.autograd.grad(total, learner.parameters)
    assert close(found, torch.cat([slope.flatten() for slope in slopes]))


def test_gspo_is_grpo_until_the_policy_has_moved(learner, twelve):
    """At ratio 1 both have one gradient: a comparison of the two needs --updates 2 or more."""
    trajectories, A = twelve
    gradients = []
    for algo in ("grpo", "gspo"):
        row = mapo.ALGORITHMS[algo]
        batch = to_batch(trajectories, spread(A, trajectories), row)
        gradients.append(learner.gradient(batch, row)[0])
    assert close(*gradients)


def test_what_the_environment_wrote_is_not_learnt(learner, twelve):
    """Other old log-probabilities at its tokens change nothing."""
    trajectories, A = twelve
    others = []
    for t in trajectories:
        logps = [p if own else -7. for p, own in zip(t.logps, t.mask)]
        others.append(dataclasses.replace(t, logps=logps))
    row, found = mapo.ALGORITHMS["mapo"], []
    for part in (trajectories, others):
        found.append(learner.gradient(to_batch(part, spread(A, part), row), row)[0])
    assert torch.equal(*found)


@pytest.mark.parametrize("mean", ["trajectory", "token"])
def test_trajectories_without_advantage_change_nothing(mean, learner, twelve):
    """They are skipped, and still count in the mean: the gradients of two halves, each with 0 for
    the other, add up to the whole one. Without any advantage there is no gradient at all."""
    trajectories, A = twelve
    row = mapo.Algorithm(mean=mean)
    first = torch.arange(12) % 3 == 0                     # 4 of 12, in all groups

    def part(advantage: Tensor) -> tuple[Tensor, dict]:
        batch = to_batch(trajectories, spread(advantage, trajectories), row)
        return learner.gradient(batch, row, micro_tokens=1)

    (whole, all_of), (half, some), (rest, _) = part(A), part(A * first), part(A * ~first)
    assert close(half + rest, whole) and half.norm() > 0 and rest.norm() > 0
    assert all_of["micro_batches"] == 12 and some["micro_batches"] == 4
    assert 0 < some["learnt"] < all_of["learnt"] == pytest.approx(1)
    nothing, totals = part(0 * A)
    assert not nothing.any() and not totals


# ---- the step ------------------------------------------------------------------------------------

def weights_of(learner: Learner) -> Tensor:
    return torch.cat([p.detach().flatten().clone() for p in learner.parameters])


def test_a_step_is_warmed_up_clipped_and_skipped_if_not_finite(trajectories):
    """A gradient with NaN moves nothing; the next one is as if it had never been."""
    learner, row, part = Learner(), mapo.ALGORITHMS["mapo"], trajectories[:4]
    config = Config(lr=1e-3, grad_clip=1e-3)
    optimiser = shard.ShardedAdamW(learner.parameters)
    run = SimpleNamespace(config=config, optimiser=optimiser, critic=None, policy=learner.policy,
                          diverged=0, out=Path("nowhere"))
    start = weights_of(learner)

    def step(A: list[float], number: int) -> dict:
        batch = to_batch(part, spread(torch.tensor(A), part), row)
        totals = accumulate(learner.policy, optimiser, batch, row, config)
        return take_step(run, batch, totals, number)

    for A in ([math.nan, 1., -1., 1.], [0.] * 4):
        stats = step(A, 0)
        assert stats["skipped"] == 1 and stats["changed"] == 0 and optimiser.steps == 0
        assert torch.equal(weights_of(learner), start)
    stats = step([1., -1., 1., -1.], 0)
    assert stats["skipped"] == 0 and stats["changed"] > .5 and optimiser.steps == 1
    assert stats["lr"] == pytest.approx(2e-4) and stats["grad_norm"] > .01
    assert optimiser.norm() == pytest.approx(1e-3, rel=1e-3)
    moves = (weights_of(learner) - start).abs()           # Adam's first step is at most lr
    assert 1.9e-4 < moves.max() < 2.1e-4
    later = [step([1., -1., 1., -1.], number)["lr"] for number in (3, 4, 50)]
    assert later == pytest.approx([8e-4, 1e-3, 1e-3])
    for number in range(2):                               # a third in a row stops the run
        step([math.nan, 1., -1., 1.], number)
    with pytest.raises(ValueError, match="step 8: three gradients in a row are not finite"):
        step([math.nan, 1., -1., 1.], 7)


def test_a_lost_update_is_told(trajectories):
    """Of two updates the first had no finite gradient: its numbers are the step's."""
    lost = {"grad_norm": math.nan, "skipped": 1., "logp_gap": 1e-6}
    good = {"grad_norm": .5, "skipped": 0., "logp_gap": .1}
    policy = SimpleNamespace(device=torch.device("cpu"))
    run = SimpleNamespace(config=Config(group=4), policy=policy)
    critic = good | {"value_loss": math.inf, "skipped": 0.}
    assert measured(run, 0, trajectories[:4], [critic, good], 0., 0.)["value_loss"] == math.inf
    for updates, skipped in (([lost, good], 1), ([good, lost], 1), ([good, good], 0)):
        found = measured(run, 0, trajectories[:4], updates, 0., 0.)
        assert found["skipped"] == skipped and found["logp_gap"] == updates[0]["logp_gap"]


# ---- dynamic sampling ----------------------------------------------------------------------------

def told(right: float, length: int = 8) -> SimpleNamespace:
    """A trajectory without a look, right or wrong."""
    question = SimpleNamespace(benchmark="", choices=(), answer="1.0")
    return SimpleNamespace(question=question, answer=str(right), mask=[True] * length,
                           turns=[SimpleNamespace(score=None)])


@pytest.fixture
def made_up(monkeypatch):
    """made_up(config, teaches) -> a run without a model. Its questions are numbers; draw d of step
    0 begins with 100 d. The group of a question that `teaches` is half right, another all right.
    `asked` notes the draws."""
    def made_up(config: Config, teaches: set[int] = frozenset()) -> SimpleNamespace:
        asked = []

        def collect(policy, questions, group, *_):
            asked.append(questions)
            trajectories = []
            for question in questions:
                for k in range(group):
                    trajectories.append(told(float(k % 2 or question not in teaches)))
            return trajectories

        monkeypatch.setattr(training, "collect", collect)
        monkeypatch.setattr(training, "score_looks", lambda *_: None)

        def stream(step: int, draw: int = 0) -> list[int]:
            start = step * config.questions + draw * 100
            return list(range(start, start + config.questions))

        return SimpleNamespace(config=config, algorithm=mapo.ALGORITHMS[config.algo], stream=stream,
                               policy=None, scorer=None, generator=None, critic=None, asked=asked)
    return made_up


def test_dynamic_sampling_draws_others_for_groups_without_signal(made_up):
    """DAPO, 4 questions: 2 teach, of 2 others 1, and then 1 is enough. 7 groups were sampled."""
    config = Config(algo="dapo", beta=0., questions=4, group=2)
    run = made_up(config, {4, 6, 105, 204})
    kept, sampled = roll_out(run, step=1)
    assert run.asked == [[4, 5, 6, 7], [104, 105], [204]]
    assert len(sampled) == 2 * 7 and len(kept) == 2 * 4
    assert [t.answer for t in kept] == ["0.0", "1.0"] * 4


def test_dynamic_sampling_gives_up_after_ten_draws(made_up):
    """With what it has; if that is nothing, with the last draw, to which no advantage is given."""
    config = Config(algo="dapo", beta=0., questions=4, group=2)
    run = made_up(config, {301})
    kept, sampled = roll_out(run, step=0)
    assert [len(draw) for draw in run.asked] == [4] * 4 + [3] * 6
    assert len(kept) == 2 and len(sampled) == 2 * (16 + 18)
    run = made_up(config)
    kept, sampled = roll_out(run, step=0)
    assert len(kept) == 8 and len(sampled) == 80 and not token_advantages(run, kept).any()


def test_the_other_rows_learn_from_the_first_draw(made_up):
    run = made_up(Config(algo="mapo", beta=0., questions=4, group=2))
    kept, sampled = roll_out(run, step=0)
    assert run.asked == [[0, 1, 2, 3]] and kept == sampled and len(kept) == 8


def test_a_penalty_for_length_is_no_signal(made_up):
    """Limit 20, buffer 4 tokens. A group of equal outcomes gets nothing, however long. Right, right
    at 18 tokens and wrong: 1, .5 and 0, by eq. 7; the deviation is 1 / sqrt 6."""
    config = Config(algo="dapo", beta=0., group=3, max_turns=4, max_tokens=5)
    part = [told(1., n) for n in (20, 16, 18)] + [told(1., 16), told(1., 18), told(0., 16)]
    A = token_advantages(made_up(config), part)
    expected = torch.tensor([0., 0, 0, math.sqrt(1.5), 0, -math.sqrt(1.5)])
    assert A.shape == (6, 19) and torch.allclose(A, expected[:, None], atol=1e-4)


# ---- whole runs ----------------------------------------------------------------------------------

def metrics_of(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    return [{key: line[key] for key in line if key not in CLOCK} for line in lines]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes()
            for path in sorted(folder.rglob("*")) if path.is_file()}


class Killed(BaseException):
    """As by kill -9: no `except` of ours sees it."""


def test_a_killed_run_goes_on_bit_for_bit(tmp_path, monkeypatch):
    """PPO, which has a second optimiser. Three steps; or a checkpoint after two, and a kill after
    the third, whose next line is torn; then --resume. Equal weights, moments and random streams;
    equal lines but for the clock."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    settings = dict(algo="ppo", steps=3, questions=2, micro_tokens=1200)
    train(small(whole, **settings))

    def dies(folder, step, *rest):
        if step == 3:
            raise Killed
        save(folder, step, *rest)

    save = checkpoint.save
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(checkpoint, "save", dies)
        train(small(parts, **settings))
    assert [line["step"] for line in metrics_of(parts)] == [1, 2, 3]
    with (parts / "metrics.jsonl").open("a") as lines:
        lines.write('{"step": 4, "accur')
    train(small(parts, **settings, resume=True))

    lines = metrics_of(whole)
    assert lines == metrics_of(parts) and [line["step"] for line in lines] == [1, 2, 3]
    a, b = files_of(whole), files_of(parts)
    assert a["trajectories.jsonl"] == b["trajectories.jsonl"] and set(a) == set(b)
    assert "step-000003/optimiser-1/optimiser-0-of-1.pt" in a             # the critic's
    for name in a:
        if name.endswith(".safetensors"):
            assert a[name] == b[name]
        elif name.endswith(".pt"):
            one, other = (torch.load(run / name, weights_only=True) for run in (whole, parts))
            assert_equal(one, other)
    before = load_file(ROOT / "tiny/model.safetensors")
    after = load_file(whole / "step-000003/model.safetensors")
    assert any(not torch.equal(before[key], after[key]) for key in before)

    assert {"accuracy", "answered", "calls", "valid", "hit", "gap", "lucky", "semantic",
            "signal_groups", "sampled", "loss", "entropy", "kl", "clip_fraction", "logp_gap",
            "micro_batches", "grad_norm", "lr", "skipped", "changed"} <= set(lines[0])
    for line in lines:                                    # of the second update: the ratio moved
        assert line["kl"] > 1e-6 and line["logp_gap"] < 1e-4 and line["skipped"] == 0
        assert line["grad_norm"] > 0 and line["value_loss"] > 0 and line["micro_batches"] > 1


def assert_equal(a, b) -> None:
    """What torch.save has written: dictionaries, lists, numbers, tensors."""
    assert type(a) is type(b)
    if isinstance(a, Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, (dict, list)):
        assert len(a) == len(b)
        for key in a if isinstance(a, dict) else range(len(a)):
            assert_equal(a[key], b[key])
    else:
        assert a == b


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of one step."""
    out = tmp_path_factory.mktemp("finished") / "run"
    train(small(out))
    return out


def test_a_new_run_leaves_the_old_one_alone(finished, tmp_path, capsys):
    """The folder is taken: it goes to run-2 and says so, and --resume goes on with run-2."""
    old, new = tmp_path / "run", tmp_path / "run-2"
    shutil.copytree(finished, old)
    before = files_of(old)
    train(small(old, seed=1))
    assert f"the run's folder is {new}: {old} holds one" in capsys.readouterr().out
    train(small(old, seed=1, steps=2, resume=True))
    assert f"going on from {new / 'step-000001'}\n" in capsys.readouterr().out
    assert [line["step"] for line in metrics_of(new)] == [1, 2]
    assert files_of(old) == before


def test_lines_of_a_run_killed_before_its_first_step_are_dropped(tmp_path):
    """It had watched the start, and no folder of a run is left by that."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/watched.jsonl").write_text('{"step": 0, "id": "old"}\n')
    train(small(tmp_path / "run"))
    assert "old" not in (tmp_path / "run/watched.jsonl").read_text()


def test_resume_refuses_other_settings(finished):
    """What is different is named, and nothing has been written."""
    before = files_of(finished)
    with pytest.raises(ValueError, match="--lr 0.00015 there and 0.001 now; --seed 0 there"):
        train(small(finished, steps=2, seed=1, lr=1e-3, resume=True))
    assert files_of(finished) == before


def test_a_step_without_any_signal_is_skipped_counted_and_said(tmp_path, monkeypatch, capsys):
    """Every answer is right: DAPO draws ten times, and the step moves nothing, not even Adam's
    moments. The semantic score still has a signal."""
    monkeypatch.setattr(reward, "outcome", lambda question, answer: 1.)
    line = train(small(tmp_path / "dapo", algo="dapo", beta=0.))
    assert line["sampled"] == 10 * 4 and line["accuracy"] == 1 and line["signal_groups"] == 0
    assert (line["skipped"], line["changed"], line["grad_norm"], line["loss"]) == (1, 0, 0, 0)
    said = "step 1: collapse: no group had a signal: the step was skipped"
    assert said in capsys.readouterr().out
    saved = checkpoint.newest(tmp_path / "dapo")
    before = load_file(ROOT / "tiny/model.safetensors")
    after = load_file(saved / "model.safetensors")
    assert all(torch.equal(before[key], after[key]) for key in before)
    moments = torch.load(saved / "optimiser-0/optimiser-0-of-1.pt", weights_only=True)
    assert moments["steps"] == 0 and not any(part.any() for part in moments["mean"])
    line = train(small(tmp_path / "coupled", algo="dapo"))
    assert line["skipped"] == 0 and line["signal_groups"] == 1 and line["grad_norm"] > 0


@pytest.mark.parametrize("algo", mapo.ALGORITHMS)
def test_every_row_takes_a_step(algo, tmp_path):
    """With the coupling, and credit that differs from turn to turn. One update: of a second one,
    GSPO may clip everything."""
    line = train(small(tmp_path / "run", algo=algo, credit="look", updates=1))
    assert line["grad_norm"] > 0 and line["kl"] < 1e-6 and line["changed"] > .5


def test_credit_by_aim(tmp_path):
    line = train(small(tmp_path / "run", credit="aim"))
    assert line["grad_norm"] > 0 and 0 < line["semantic"] < 1


# ---- questions -----------------------------------------------------------------------------------

def test_the_world_never_repeats_a_question():
    """Steps and further draws; runs of one seed see the same ones, whatever else differs."""
    stream = Questions(Config(questions=3))
    ids = [q.id for step in (0, 1) for draw in (0, 1) for q in stream(step, draw)]
    assert len(set(ids)) == 12
    again = Questions(Config(questions=3, algo="grpo", group=2, lr=1.))
    assert [q.text for q in again(1)] == [q.text for q in stream(1)]
    assert [q.id for q in Questions(Config(questions=3, seed=1))(1)] != [q.id for q in stream(1)]


def test_a_file_is_shuffled_in_whole_passes(tmp_path):
    """8 questions, 3 a step: each comes once before any comes again, in another order each time."""
    file = write_jsonl(world_questions(World(), 1, "train", 0, 8), tmp_path)
    stream = Questions(Config(data=str(file), questions=3))
    ids = [q.id for step in range(8) for q in stream(step)]
    passes = [ids[start:start + 8] for start in (0, 8, 16)]
    assert all(len(set(one)) == 8 for one in passes)
    assert passes[0] != passes[1] != passes[2] and passes[0] != sorted(passes[0])


def test_which_questions_are_held_out(tmp_path):
    file = str(write_jsonl(world_questions(World(), 1, "train", 0, 4), tmp_path))
    assert held_out(Config(data=file)) == []
    assert len(held_out(Config(data=file, test=file, eval_questions=3))) == 3
    world = held_out(Config(eval_questions=5, seed=7))
    assert [q.text for q in world] == [q.text for q in world_questions(World(), 0, "test", 0, 5)]


def test_the_world_may_be_harder():
    """--objects and --options reach the questions to train on, and those held out."""
    config = parse_config(["--objects", "12", "--options", "2"])
    assert config.out == "runs/mapo-options2-objects12"
    for question in [*Questions(config)(0), *held_out(config)[:8]]:
        assert len(question.objects) == 12 and len(question.choices) == 2
    with pytest.raises(DataError, match="objects: expected 2 to 16, found 17"):
        Questions(parse_config(["--objects", "17"]))(0)


def test_an_empty_file_is_named(tmp_path):
    (tmp_path / "none.jsonl").touch()
    with pytest.raises(DataError, match="none.jsonl: holds no questions"):
        Questions(Config(data=str(tmp_path / "none.jsonl")))


# ---- settings ------------------------------------------------------------------------------------

@pytest.mark.parametrize("arguments, name", [
    ([], "mapo"),
    (["--algo", "gspo", "--beta", "0.4", "--seed", "3"], "gspo-beta0.4-seed3"),
    (["--credit", "look", "--lam", "0.5"], "mapo-lam0.5-creditlook"),
    (["--data", "runs/world/questions.jsonl"], "mapo-dataquestions"),
    (["--model", "runs/mapo"], "mapo-modelmapo"),
    (["--steps", "9", "--save_every", "3", "--device", "cuda", "--recompute"], "mapo")])
def test_a_run_is_named_after_what_differs(arguments, name):
    assert parse_config(arguments).out == f"runs/{name}"


def test_a_run_keeps_its_name_when_it_is_resumed():
    """What may change on the way is no part of the name."""
    config = Config()
    for name in FREE:
        kind = type(getattr(config, name))
        setattr(config, name, kind(9))
    assert run_name(config) == run_name(Config()) == "mapo"


def test_default_beta_and_credit_are_the_algorithms():
    for algo, row in mapo.ALGORITHMS.items():
        config = parse_config(["--algo", algo])
        assert (config.beta, config.credit) == (row.beta, row.credit)
    assert parse_config(["--beta", "0"]).beta == 0
    assert parse_config(["--credit", "look"]).credit == "look"


@pytest.mark.parametrize("arguments, words", [
    (["--algo", "reinforce"], "--algo: invalid choice: 'reinforce' (choose from 'mapo', 'grpo',"),
    (["--credit", "turn"], "'turn' (choose from 'trajectory', 'look', 'aim')"),
    (["--dtype", "int8"], "--dtype: invalid choice: 'int8'"),
    (["--coordinates", "cm"], "'cm' (choose from 'pixels', '1000')"),
    (["--group", "1"], "--group: expected at least 2, found 1"),
    (["--steps", "0"], "--steps: expected at least 1, found 0"),
    (["--save_every", "0"], "--save_every: expected at least 1, found 0"),
    (["--lr", "0"], "--lr: expected a number above 0, found 0.0"),
    (["--temperature", "nan"], "--temperature: expected a number above 0, found nan"),
    (["--grad_clip", "inf"], "--grad_clip: expected a number above 0, found inf"),
    (["--beta", "1.1"], "expected --beta in [0, 1]"), (["--lam", "0"], "--lam in (0, 1]"),
    (["--test", "a.jsonl"], "--test: needs --data"), (["--nonsense"], "--nonsense"),
    (["--steps", "many"], "--steps: invalid int value: 'many'")])
def test_bad_settings_stop_before_anything_runs(arguments, words, capsys):
    with pytest.raises(SystemExit):
        parse_config(arguments)
    assert words in capsys.readouterr().err


# ---- the command ---------------------------------------------------------------------------------

def main(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")


@pytest.mark.parametrize("arguments, words", [
    (["--data", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
    (["--model", "docs"], "docs: no config.json"),
    (["--model", "Qwen/Qwen2.5-VL-3B-Instruct"], "Qwen/Qwen2.5-VL-3B-Instruct: no config.json"),
    (["--resume"], "--resume: no checkpoint in")])
def test_errors_are_one_clear_line_and_write_nothing(arguments, words, tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").write_text("{}\n")
    with pytest.raises(SystemExit) as error:
        main(monkeypatch, *arguments, "--out", str(tmp_path / "run"))
    assert str(error.value).startswith("train.py: ") and words in str(error.value)
    assert "\n" not in str(error.value)
    assert files_of(tmp_path) == {"run/metrics.jsonl": b"{}\n"}


def test_the_real_command(tmp_path):
    """As a user runs it: it ends well, judges before and after, and leaves what it promises."""
    out = tmp_path / "run"
    words = f"--steps 1 --questions 2 --group 4 --eval_questions 4 --out {out}"
    done = subprocess.run([sys.executable, "train.py", *words.split()], cwd=ROOT, text=True,
                          capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for said in ("before training, greedy", "after training, sampled", "held-out questions",
                 "step 1/1  accuracy", f"{out}/page.html", f"{out}/step-000001"):
        assert said in done.stdout
    assert done.stderr == ""                              # no terminal: lines instead of the bar
    files = files_of(out)
    assert {"films.png", "step-000001/train.json", "step-000001/state-0.pt"} <= set(files)
    results = json.loads(files["results.json"])
    assert set(results) == {f"{moment} {name}" for moment in ("before", "after")
                            for name in ("greedy", "sampled")}
    assert all(row["n"] == 4 and 0 <= row["accuracy"] <= 1 for row in results.values())
    line = json.loads(files["trajectories.jsonl"].splitlines()[0])
    assert len(line["advantage"]) == len(line["turns"]) and line["step"] == 1
    assert {"text", "box", "label", "score"} <= set(line["turns"][0])
    base = json.loads(files["step-000001/train.json"])["model"]
    assert base == "tiny"            # from any working directory, and wherever the project lies


def test_a_step_that_is_too_large_is_not_saved(tmp_path, monkeypatch):
    """--lr 1e38: the weights are finite, but no probability is. The run stops, and says so."""
    words = f"--steps 9 --questions 1 --group 2 --eval_questions 0 --save_every 1 --lr 1e38"
    with pytest.raises(SystemExit, match="are not finite.*lower --lr"):
        main(monkeypatch, *words.split(), "--out", str(tmp_path / "wild"))
    assert checkpoint.checkpoints(tmp_path / "wild") == []


def test_a_run_that_ends_in_a_bad_gradient_says_so(tmp_path, monkeypatch):
    """Its last weights are not saved, so they are not judged either."""
    def accumulate(policy, optimiser, *rest):
        totals = original(policy, optimiser, *rest)
        if (tmp_path / "run/metrics.jsonl").is_file():    # from step 2 on
            optimiser.buckets[0].gradient[0] = math.nan
        return totals

    original = training.accumulate
    monkeypatch.setattr(training, "accumulate", accumulate)
    words = "step 2: the last gradient is not finite: .*neither saved nor judged.*in .*run: 1"
    with pytest.raises(ValueError, match=words):
        train(small(tmp_path / "run", steps=2, save_every=1, updates=1, eval_questions=2))
    assert checkpoint.newest(tmp_path / "run").name == "step-000001"
    assert not (tmp_path / "run/results.json").exists()


def test_a_resumed_run_has_no_results_of_older_weights(tmp_path):
    out = tmp_path / "run"
    train(small(out, eval_questions=2))
    assert (out / "results.json").is_file()
    training.prepare(small(out, eval_questions=2, steps=2, resume=True))
    assert not (out / "results.json").exists()


def test_a_signal_finishes_the_step_and_saves(tmp_path, monkeypatch):
    """SIGTERM during the first of nine steps: a checkpoint of one step, from which it goes on."""
    original = training.roll_out

    def roll_out(run, step):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(run, step)

    monkeypatch.setattr(training, "roll_out", roll_out)
    with pytest.raises(KeyboardInterrupt, match="stopped after step 1; --resume goes on"):
        train(small(tmp_path / "run", steps=9, save_every=5))
    assert checkpoint.newest(tmp_path / "run").name == "step-000001"


def test_a_signal_in_a_step_that_diverged(tmp_path):
    """Nothing was saved, so nothing can go on; a later one goes on from what was saved."""
    run = SimpleNamespace(config=small(tmp_path, steps=9), out=tmp_path, diverged=1)
    with pytest.raises(KeyboardInterrupt, match="step 1; Begin anew with a lower --lr; .*: 0$"):
        training.save_if_due(run, 0, True)
    (tmp_path / "step-000001").mkdir()
    (tmp_path / "step-000001/state-0.pt").touch()
    with pytest.raises(KeyboardInterrupt, match="step 2; --resume goes on from .*000001$"):
        training.save_if_due(run, 1, True)


def test_all_that_is_wrong_with_own_questions_is_named_first(tmp_path):
    """A broken picture in row 3 and an answer that is no choice in row 2; or an empty file."""
    file = write_jsonl(world_questions(World(), 1, "train", 0, 4), tmp_path)
    (tmp_path / "0002.png").write_bytes(b"no picture")
    lines = file.read_text().splitlines()
    lines[1] = json.dumps(json.loads(lines[1]) | {"answer": "nothing of that"})
    file.write_text("\n".join(lines))
    with pytest.raises(DataError, match="jsonl:2: field 'answer'(.|\n)*jsonl:3: field 'image'"):
        own_questions(str(file))
    file.write_text("\n")
    with pytest.raises(DataError, match="holds no questions"):
        own_questions(str(file))
