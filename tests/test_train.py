"""The loop: micro-batches add up, the environment's tokens get no gradient, a stopped run continues bit for bit."""
import dataclasses
import json
import subprocess
import sys

import pytest
import torch

import mapo
import reward
from lib import shard
from conftest import ROOT
from lib.data import write_jsonl
from tiny.world import World, world_questions
from lib.policy import Policy
from reward import Scorer, format_reward, score
from train import Config, Questions, accumulate, collapse, micro_batches, noise, paid_for, parse_config, payments, spread, train


def small(tmp_path, **changes):
    return Config(**(dict(model=str(ROOT / "tiny"), out=str(tmp_path / "run"), algo="mapo", beta=.4, steps=4, questions=2, group=4,
                          eval_questions=0, save_every=2) | changes))


@pytest.fixture(scope="module")
def trainable():
    policy = Policy(ROOT / "tiny")
    policy.model.requires_grad_(False)
    return policy, [p.requires_grad_() for n, p in policy.model.named_parameters() if "visual" not in n]


@pytest.fixture(scope="module")
def advantage(policy, trajectories):
    r, s, looked = score(trajectories, Scorer(policy, world_questions(World(), 0, "train", 10**6, 16)))
    return mapo.advantages(r, s, looked, 4, .4)


def gradient(trainable, trajectories, advantage, order=None, **changes):
    """The flat gradient in the order of the parameters, and accumulate's statistics."""
    policy, parameters = trainable
    order = order or list(range(len(trajectories)))
    part, optimiser = [trajectories[i] for i in order], shard.ShardedAdamW(parameters)
    stats = accumulate(policy, [optimiser], part, spread(advantage[order], part), Config(**changes), mapo.ALGORITHMS["mapo"])
    found = {id(p): b.gradient[span] for b in optimiser.buckets for p, span in zip(b.parameters, b.spans)}
    optimiser.close()
    return torch.cat([found[id(p)] for p in parameters]), stats


@pytest.mark.parametrize("micro_tokens", [1, 1200, 2400])
def test_micro_batches_give_the_same_gradient(trainable, trajectories, advantage, micro_tokens):
    """One micro-batch, two, four, or one a trajectory: the same sum, because token counts are summed first."""
    whole, stats = gradient(trainable, trajectories, advantage, micro_tokens=10**9)
    pieces, more = gradient(trainable, trajectories, advantage, micro_tokens=micro_tokens)
    assert (whole - pieces).norm() < 1e-4 * whole.norm() and whole.norm() > 0
    assert more["loss"] == pytest.approx(stats["loss"], abs=1e-5) and more["entropy"] == pytest.approx(stats["entropy"], rel=1e-4)


def test_batch_order_changes_nothing(trainable, trajectories, advantage):
    whole, _ = gradient(trainable, trajectories, advantage)
    back, _ = gradient(trainable, trajectories, advantage, order=list(range(len(trajectories)))[::-1])
    assert (whole - back).norm() < 1e-4 * whole.norm()


def test_observations_get_no_gradient(trainable, trajectories, advantage):
    """Where the mask is false nothing is learnt: a different old log-probability there changes nothing, and the
    loss's weights are zero at every token of the environment."""
    whole, _ = gradient(trainable, trajectories, advantage)
    saved = [t.logps for t in trajectories]
    for t in trajectories:
        t.logps = [p if m else -7. for p, m in zip(t.logps, t.mask)]
    changed, _ = gradient(trainable, trajectories, advantage)
    for t, logps in zip(trajectories, saved):
        t.logps = logps
    assert torch.equal(whole, changed)
    weight = mapo.token_weights(torch.tensor([trajectories[0].mask]))
    assert weight.sum().item() == pytest.approx(1) and (weight[0, ~torch.tensor(trajectories[0].mask)] == 0).all()


def test_gradient_is_reinforce_at_ratio_one(trainable, trajectories, advantage):
    """Before a step the clipped surrogate's gradient is that of - sum_i A_i mean_t log pi, computed here the plain way."""
    policy, parameters = trainable
    whole, stats = gradient(trainable, trajectories, advantage)
    total = 0
    for i, t in enumerate(trajectories):
        logits = policy.model.lm_head(policy.hidden([t.tokens])[0])[0, :-1].float()
        logits[:, policy.banned] = float("-inf")
        logp = logits.log_softmax(-1).gather(1, torch.tensor(t.tokens.ids[1:])[:, None])[:, 0]
        total = total - advantage[i] * logp[torch.tensor(t.mask[1:])].mean() / len(trajectories)
    plain = torch.cat([g.flatten() for g in torch.autograd.grad(total, parameters)])
    assert (whole - plain).norm() < 1e-3 * plain.norm()
    assert stats["kl"] < 1e-6 and stats["clip_fraction"] == 0 and stats["grad_norm"] == pytest.approx(plain.norm().item(), rel=1e-3)


def test_gspo_is_grpo_until_the_policy_has_moved(trainable, trajectories, advantage):
    """At ratio 1 the sequence's ratio has the gradient of the tokens' mean: with one update a batch GSPO *is* GRPO, and a
    comparison of the two needs --updates 2 or more."""
    policy, parameters = trainable
    gradients = []
    for algo in ("grpo", "gspo"):
        optimiser = shard.ShardedAdamW(parameters)
        accumulate(policy, [optimiser], trajectories, spread(advantage, trajectories), Config(), mapo.ALGORITHMS[algo])
        gradients.append(torch.cat([b.gradient for b in optimiser.buckets]))
        optimiser.close()
    assert (gradients[0] - gradients[1]).norm() < 1e-4 * gradients[0].norm()


def test_trajectories_without_signal_cost_nothing_and_add_nothing(trainable, trajectories):
    zero, stats = gradient(trainable, trajectories, torch.zeros(len(trajectories)))
    assert not zero.any() and stats["grad_norm"] == 0 and stats["grad_noise"] is None


def test_credit_per_turn_lands_on_the_turns_tokens(trajectories):
    values = torch.arange(1., 5).repeat(len(trajectories), 1)
    tokens = spread(values, trajectories)
    for i, t in enumerate(trajectories):
        for k, turn in enumerate(t.turns):
            assert (tokens[i, turn.tokens.start - 1:turn.tokens.stop - 1] == k + 1).all()
        assert (tokens[i, :len(t.mask) - 1][~torch.tensor(t.mask[1:])] == 0).all()


def test_micro_batches_are_bounded_and_complete(trajectories):
    batches = micro_batches(trajectories, list(range(len(trajectories))), 700)
    assert sorted(i for b in batches for i in b) == list(range(len(trajectories)))
    assert all(len(b) == 1 or len(b) * max(len(trajectories[i].mask) for i in b) <= 700 for b in batches)


def test_noise_by_hand():
    """Half the questions, then all. Nothing but noise: the half's square is half of the whole's. Nothing but signal: a quarter.
    A signal of 1 and a noise of .5: 1/4 + 1/4, and 3/2. A third of them: 1/9 + 1/6."""
    for part, whole, share, signal, trace in ((.25, .5, .5, 0, .5), (.25, 1., .5, 1, 0), (.5, 1.5, .5, 1, .5), (1 / 9 + 1 / 6, 1.5, 1 / 3, 1, .5)):
        found = noise(part, whole, share)
        assert found["grad_signal"] == pytest.approx(signal) and found["grad_trace"] == pytest.approx(trace)
        assert found["grad_noise"] == pytest.approx(trace / whole)
    assert noise(1., 1., 1.)["grad_noise"] is None


def test_noise_is_unbiased():
    """64 samples, gradients drawn around a known mean, a part of 24 first: both estimates average to the truth."""
    parts = (torch.tensor([.3, -.2, .1]) + torch.randn(20_000, 64, 3, generator=torch.Generator().manual_seed(0))) / 64
    found = [noise(part, whole, 24 / 64) for part, whole in zip(*(x.sum(1).square().sum(1).tolist() for x in (parts[:, :24], parts)))]
    average = lambda key: sum(f[key] for f in found) / len(found)
    assert average("grad_signal") == pytest.approx(.14, abs=.005)
    assert average("grad_trace") == pytest.approx(3 / 64, rel=.05)              # of the whole batch's gradient


def test_noise_of_real_gradients_compares_half_the_questions_with_all(trainable, trajectories, advantage):
    """`part` and `whole` by hand: the gradient of the even questions' trajectories alone, weighted as in the whole batch."""
    first = [float(i // 4 % 2 == 0) for i in range(len(trajectories))]
    half, whole = (gradient(trainable, trajectories, a, group=4)[0].square().sum().item() for a in (advantage * torch.tensor(first), advantage))
    stats = gradient(trainable, trajectories, advantage, group=4)[1]
    wanted = noise(half, whole, sum(first) / len(first))
    assert all(stats[key] == pytest.approx(value, rel=1e-3) for key, value in wanted.items())


def test_the_formats_share_is_part_of_the_signal(trajectories):
    """Two wrong answers, one of them well-formed, are no equal returns once --format_weight pays the form."""
    pair = [t for t in trajectories if format_reward(t)][:2]
    pair = [dataclasses.replace(pair[0], answer="no"), dataclasses.replace(pair[1], answer="no", end="max_turns")]
    for weight, wanted in ((0., False), (.5, True)):
        assert mapo.has_signal(mapo.coupled_return(*paid_for(pair, Config(format_weight=weight)), 0.), 2).tolist() == [wanted]


def test_ppos_payments_sum_to_the_return(trajectories, policy):
    """Whatever the credit, what a trajectory's tokens are paid adds up to its coupled return, at tokens of the agent only."""
    r, s, looked = score(trajectories, Scorer(policy, world_questions(World(), 0, "train", 10**6, 16)))
    for credit in ("trajectory", "turn", "look"):
        paid = payments(trajectories, r, s, looked, Config(beta=.4, credit=credit))
        assert torch.allclose(paid.sum(1), mapo.coupled_return(r, s, looked, .4), atol=1e-6)
        for i, t in enumerate(trajectories):
            assert (paid[i, :len(t.mask) - 1][~torch.tensor(t.mask[1:])] == 0).all()


def weights(folder):
    from safetensors.torch import load_file
    return load_file(folder / "model.safetensors")


def test_resume_continues_bit_for_bit(tmp_path):
    """Four steps, or two, a stop and two more: equal weights, equal metrics (but for the clock)."""
    train(small(tmp_path, out=str(tmp_path / "whole")))
    train(small(tmp_path, out=str(tmp_path / "parts"), steps=2))
    train(small(tmp_path, out=str(tmp_path / "parts"), resume=True))
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(whole[k], parts[k]) for k in whole)
    assert any(not torch.equal(whole[k], v) for k, v in weights(ROOT / "tiny").items())
    lines = [[json.loads(line) for line in open(tmp_path / name / "metrics.jsonl")] for name in ("whole", "parts")]
    clock = {"seconds", "rollout_seconds", "tokens_per_s", "peak_mb"}
    assert [{k: v for k, v in a.items() if k not in clock} for a in lines[0]] == [{k: v for k, v in b.items() if k not in clock} for b in lines[1]]
    assert [a["step"] for a in lines[0]] == [1, 2, 3, 4]
    assert {"accuracy", "calls", "valid", "hit", "gap", "semantic", "signal_groups", "entropy", "kl", "clip_fraction", "grad_norm",
            "grad_noise", "lr", "tokens_per_s", "seconds", "peak_mb"} <= set(lines[0][0])


def test_resume_survives_a_torn_checkpoint(tmp_path):
    """A checkpoint that was being written when the run died is not taken for one; lines after the last are dropped."""
    train(small(tmp_path, steps=3, save_every=2))
    run = tmp_path / "run"
    (run / "step-000003").rename(run / "saving")       # died while saving step 3
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        train(small(tmp_path, steps=4, resume=True))


def test_resume_refuses_other_settings(tmp_path):
    """A run that goes on with another seed or algorithm would be neither; what is different is named."""
    train(small(tmp_path, steps=1))
    with pytest.raises(ValueError, match="--seed 0 there and 1 now"):
        train(small(tmp_path, steps=2, seed=1, resume=True))


def test_groups_that_are_always_right_teach_nothing(tmp_path, monkeypatch):
    """Without differences in a group, the outcome has no gradient; the semantic score has one."""
    monkeypatch.setattr(reward, "outcome", lambda question, answer: 1.)
    metrics = train(small(tmp_path, steps=1, algo="grpo", beta=0.))
    assert metrics["signal_groups"] == 0 and metrics["grad_norm"] == 0
    metrics = train(small(tmp_path, steps=1))
    assert metrics["signal_groups"] > 0 and metrics["grad_norm"] > 0


def test_dynamic_sampling_keeps_only_groups_with_signal(tmp_path, monkeypatch):
    """DAPO draws again for groups of equal returns, ten times at most: more is sampled than learnt from, never the reverse."""
    metrics = train(small(tmp_path, steps=1, questions=4, algo="dapo", beta=0.))
    assert metrics["sampled"] >= 16 and metrics["sampled"] % 4 == 0
    monkeypatch.setattr(reward, "outcome", lambda question, answer: 1.)
    assert train(small(tmp_path, steps=1, questions=2, algo="dapo", beta=0.))["sampled"] == 10 * 2 * 4


def test_vision_tower_stays_frozen(tmp_path):
    train(small(tmp_path, steps=2))
    before, after = weights(ROOT / "tiny"), weights(tmp_path / "run")
    assert all(torch.equal(v, after[k]) for k, v in before.items() if "visual" in k)


def test_two_updates_move_the_ratio(tmp_path):
    """With a second update on the same batch the policy is no longer the one that sampled: kl is above zero."""
    assert train(small(tmp_path, steps=2, updates=2, lr=1e-3))["kl"] > 1e-6
    assert train(small(tmp_path, steps=2, updates=1))["kl"] < 1e-6


@pytest.mark.parametrize("algo", mapo.ALGORITHMS)
def test_every_algorithm_trains(tmp_path, algo):
    """Every row of the table takes a step, alone and with MAPO's coupling."""
    for beta in (0., .4):
        assert train(small(tmp_path, algo=algo, beta=beta, steps=1, questions=4, updates=1))["grad_norm"] > 0  # GSPO may clip all of a second


def test_training_on_your_own_questions(tmp_path):
    """A .jsonl trains too; its order is shuffled by the seed and passes are complete."""
    file = write_jsonl(world_questions(World(), 1, "train", 0, 6), tmp_path)
    stream = Questions(small(tmp_path, data=str(file), questions=3))
    assert sorted(q.id for s in (0, 1) for q in stream(s)) == sorted(q.id for s in (2, 3) for q in stream(s))
    assert len({q.id for s in (0, 1) for q in stream(s)}) == 6
    assert train(small(tmp_path, data=str(file), steps=1))["step"] == 1


@pytest.mark.parametrize("metrics, word", [(dict(calls=0.), "stopped looking"), (dict(grad_norm=float("nan")), "not finite"),
                                           (dict(entropy=.001), "deterministic"), (dict(valid=.2), "malformed"), ({}, "")])
def test_collapse_is_named(metrics, word):
    said = collapse(dict(calls=1., grad_norm=1., entropy=.5, valid=1., signal_groups=1.) | metrics)
    assert word in said and bool(said) == bool(word)


@pytest.mark.parametrize("arguments", [["--algo", "reinforce"], ["--group", "1"], ["--steps", "0"], ["--nonsense"]])
def test_bad_arguments_stop_before_anything_runs(arguments, capsys):
    with pytest.raises(SystemExit):
        parse_config(arguments)
    assert "error" in capsys.readouterr().err


def run(*arguments, **options):
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=300, **options)


def test_the_real_commands(tmp_path):
    """train.py and eval.py as a user runs them: they end well, and leave what they promise."""
    out = tmp_path / "run"
    done = run("train.py", "--steps", 2, "--questions", 2, "--group", 4, "--eval_questions", 8, "--out", out)
    assert done.returncode == 0, done.stderr
    assert "before training, greedy" in done.stdout and "after training, sampled" in done.stdout and "accuracy" in done.stderr
    for name in ("model.safetensors", "metrics.jsonl", "trajectories.jsonl", "films.png", "results.json", "train.json", "step-000002/state-0.pt"):
        assert (out / name).is_file(), name
    record = json.loads(open(out / "trajectories.jsonl").readline())
    assert record["turns"] and {"text", "box", "label", "score"} <= set(record["turns"][0])
    done = run("eval.py", "--model", out, "--n", 8, "--out", tmp_path / "eval")
    assert done.returncode == 0, done.stderr
    assert "95% interval" in done.stdout and (tmp_path / "eval/films.png").is_file()
    assert len(open(tmp_path / "eval/predictions.jsonl").readlines()) == 8
    file = write_jsonl(world_questions(World(), 0, "test", 0, 5), tmp_path / "mine")
    done = run("eval.py", "--model", out, "--data", file, "--out", tmp_path / "eval")
    assert done.returncode == 0 and len(open(tmp_path / "eval/predictions.jsonl").readlines()) == 5


@pytest.mark.parametrize("arguments, words", [
    (["train.py", "--data", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
    (["train.py", "--model", "docs"], "docs: no config.json"),
    (["train.py", "--model", "Qwen/Qwen2.5-VL-3B-Instruct"], "Qwen/Qwen2.5-VL-3B-Instruct: no config.json"),
    (["train.py", "--resume"], "--resume: no checkpoint in"),
    (["train.py", "--model", "{out}/step-000050"], "--out: a new run clears its folder"),
    (["eval.py", "--max_tokens", "0"], "--max_tokens"),
    (["eval.py", "--temperature", "-1"], "--temperature"),
    (["eval.py", "--data", "nowhere.jsonl"], "nowhere.jsonl: no such file")])
def test_errors_are_one_clear_line_and_lose_nothing(arguments, words, tmp_path):
    """A typo is named in one line, and what an earlier run left in the folder is still there."""
    (tmp_path / "metrics.jsonl").write_text("{}")
    (tmp_path / "step-000050").mkdir()
    done = run(*(a.format(out=tmp_path) for a in arguments), "--out", tmp_path)
    assert done.returncode in (1, 2) and words in done.stderr and "Traceback" not in done.stderr
    assert (tmp_path / "metrics.jsonl").is_file() and (tmp_path / "step-000050").is_dir()
