"""Other models of the family go through the same code, and any number of ranks through the same
arithmetic.

Random Qwen2.5-VL and Qwen3-VL directories (conftest.py) must give what transformers gives, sample
what they train, and train, stop, resume and be evaluated by the real commands. The code asks for a
model's name once, for the units of its boxes. Then tiny/ on one rank and on two.
"""
import json
import math
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import eval as evaluation
import mapo
import train as training
from conftest import FAMILY, ROOT
from lib import checkpoint, shard
from lib.batches import pad, spread
from lib.critic import Critic
from lib.data import write_jsonl
from lib.policy import Policy, Tokens
from reward import Scorer, rewards, score_looks
from rollout import Trajectory, Turn, act, collect
from test_eval import files  # noqa: F401, a fixture: a file of each benchmark
from tiny.world import World, world_questions
from tools import Resolution, fit, system_prompt, zoom_call
from train import Config, Questions, accumulate, take_step, to_batch, train

COORDINATES = {"qwen2_5_vl": "pixels", "qwen3_vl": "1000"}
CLOCK = {"seconds", "rollout_seconds", "tokens_per_s", "peak_mb"}


@pytest.fixture(scope="module", params=FAMILY)
def model(request, directories):
    return Policy(directories[request.param])


def roll(policy, count, group):
    """Trajectories of 1 to 3 turns, always the same."""
    questions = world_questions(World(), 0, "test", 0, count)
    return collect(policy, questions, group, 3, 26, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def sampled(model):
    return roll(model, 8, 3)


# ---- one model of the family, one process --------------------------------------------------------

def test_hidden_states_equal_transformers_own(model):
    """Images of different sizes encoded together, one to three of them in a sequence, a padded
    batch: our features, positions, DeepStack and masks are the whole model's forward pass on each
    sequence alone."""
    patch, pictures = model.resolution.factor, []
    sizes = ((6, 6), (6, 2), (3, 3), (5, 6), (2, 2), (6, 5))             # in placeholders
    for question, (w, h) in zip(world_questions(World(), 0, "test", 0, 6), sizes):
        square = fit(question.open(), Resolution(patch, (w * patch) ** 2, (w * patch) ** 2))
        pictures.append(square.crop((0, 0, w * patch, h * patch)))
    encoded = model.encode_images(pictures)
    batch, places = [], [[0], [1, 2], [3, 4, 5]]
    for row in places:
        tokens = model.tokens("<|im_start|>user\n")
        for i in row:
            tokens += model.tokens("<|vision_start|>", encoded[i], "<|vision_end|>a red circle")
        batch.append(tokens)
    assert len({t.ids.count(model.image_id) for t in batch}) == 3
    with torch.no_grad():
        ours, _, _ = model.hidden(batch)
        for states, tokens, row in zip(ours, batch, places):
            inputs = model.processor(images=[pictures[i] for i in row], do_resize=False,
                                     return_tensors="pt")
            ids = torch.tensor([tokens.ids])
            theirs = model.model.model(
                input_ids=ids, mm_token_type_ids=(ids == model.image_id).int(), **inputs)
            theirs = theirs.last_hidden_state[0]
            assert (states[:len(tokens.ids)] - theirs).abs().max() < 1e-4 and theirs.std() > .1


def test_sampled_equals_recomputed(model, sampled):
    """Ratio 1 before a step, with looks (several images a sequence), rows that stop early, padding,
    shared prompts and not."""
    assert max(len(t.looks) for t in sampled) == 2 and {len(t.turns) for t in sampled} >= {2, 3}
    lengths = [sum(t.mask) for t in sampled]
    assert max(lengths) > 5 * min(lengths)
    tokens, masks = [t.tokens for t in sampled], [t.mask for t in sampled]
    old, mask = pad([t.logps for t in sampled], 0.), pad(masks, False)
    for prompts in (None, [t.prompt for t in sampled]):
        with torch.no_grad():
            logp, entropy = model.logprobs(tokens, masks, prompts=prompts)
        assert (logp - old)[mask].abs().max() < 1e-4 and entropy[mask].mean() > .05


def test_semantic_scores(model, sampled):
    """Looks get scores in [0, 1] that depend on neither the batch nor its order."""
    scorer = Scorer(model, world_questions(World(), 0, "train", 0, 4))
    score_looks(sampled, scorer)
    _, s, looked = rewards(sampled)
    looks = [turn for t in sampled for turn in t.looks]
    assert looked.sum() == len(looks) > 5 and (0 <= s).all() and (s <= 1).all()
    assert len({turn.score for turn in looks}) > 3
    for turn in looks:
        alone = scorer([turn.call.label], [turn.crop_tokens])
        assert alone.item() == pytest.approx(turn.score, abs=1e-3)


def test_boxes_are_read_as_the_family_gives_them(directories):
    """No agent.json says otherwise here."""
    assert {name: Policy(directories[name]).coordinates for name in FAMILY} == COORDINATES


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("coordinates", ["pixels", "1000"])
def test_coordinates(directories, name, coordinates):
    """[0, 0, 500, 500] in thousandths, or half the seen sides in pixels, is the upper left quarter
    of the original. The prompt says which; a saved model remembers (test_two_ranks_train)."""
    model = Policy(directories[name], coordinates=coordinates)
    image = world_questions(World(), 0, "test", 0, 1)[0].open().crop((0, 0, 768, 512))
    seen = model.resolution.size(*image.size)
    box = [0, 0, seen[0] // 2, seen[1] // 2] if coordinates == "pixels" else [0, 0, 500, 500]
    trajectory = Trajectory(None, Tokens([]), Tokens([]), [], [], seen, model.space(seen))
    turn = Turn(zoom_call("the red circle", box), slice(0))
    act(model, trajectory, turn, image, last=False)
    quarter = fit(image.crop((0, 0, 384, 256)), model.resolution.crop())
    assert turn.box == (0, 0, 384, 256) and turn.crop.tobytes() == quarter.tobytes()
    assert ("thousandths" in system_prompt(coordinates)) == (coordinates == "1000")


@pytest.mark.parametrize("name", FAMILY)
def test_recompute_gives_the_same_gradient(name, directories):
    """Activation checkpointing changes memory, not numbers, with prompts shared through a cache."""
    policy, row = Policy(directories[name]), mapo.ALGORITHMS["mapo"]
    optimiser = shard.ShardedAdamW(policy.freeze_vision())
    trajectories = roll(policy, 2, 2)
    batch = to_batch(trajectories, spread(torch.linspace(-1, 1, 4), trajectories), row)

    def gradient():
        accumulate(policy, optimiser, batch, row, Config(micro_tokens=800))
        return torch.cat([b.gradient for b in optimiser.buckets])

    plain = gradient()
    policy.recompute_layers()
    assert plain.norm() > 0 and (plain - gradient()).norm() < 1e-6 * plain.norm()


@pytest.mark.parametrize("name", FAMILY)
def test_every_benchmark(name, directories, files, tmp_path, monkeypatch, capsys):  # noqa: F811
    """eval.py asks V*, HR-Bench and MME-RealWorld-Lite, semantic score included."""
    scores = []
    for benchmark, file in files.items():
        out = tmp_path / benchmark
        monkeypatch.setattr(sys, "argv", [
            "eval.py", "--model", str(directories[name]), "--data", str(file), "--out", str(out),
            "--max_tokens", "26", "--n", "8", "--films", "1", "--temperature", "1",
            "--coordinates", "1000"])
        evaluation.main()
        said = capsys.readouterr().out
        assert said.startswith(benchmark) and "all  " in said
        lines = list(evaluation.read_predictions(out).values())
        assert len(lines) == 8 and all(line["space"] == [1000, 1000] for line in lines)
        scores += [turn["score"] for line in lines for turn in line["turns"]]
    assert any(score is not None for score in scores)


# ---- the real command on two ranks ---------------------------------------------------------------

def torchrun(config):
    words = []
    for key, value in vars(config).items():
        if value is True:
            words.append(f"--{key}")
        elif value is not False and value != "":
            words += [f"--{key}", str(value)]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               "--nproc-per-node", "2", "train.py", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def small(model, out, **changes):
    settings = dict(model=str(model), out=str(out), beta=.4, steps=2, questions=2, group=4,
                    max_turns=2, max_tokens=26, eval_questions=0, save_every=99, lr=1e-3)
    return Config(**settings | changes)


def of_family(name, directories, out, file, **changes):
    return small(directories[name], out, data=str(file), coordinates=COORDINATES[name],
                 recompute=True, **changes)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write_jsonl(world_questions(World(), 0, "train", 0, 8), tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def trained(directories, file, tmp_path_factory):
    """Both models, two steps on two ranks by torchrun -> folder with a run for each. The first one
    is also judged before and after."""
    folder = tmp_path_factory.mktemp("runs")
    for name in FAMILY:
        judged = dict(test=str(file), eval_questions=4) if name == FAMILY[0] else {}
        done = torchrun(of_family(name, directories, folder / name, file, **judged))
        assert done.returncode == 0, done.stderr[-3000:]
        (folder / name / "stdout").write_text(done.stdout)
    return folder


def metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    return [{key: line[key] for key in line if key not in CLOCK} for line in lines]


@pytest.mark.parametrize("name", FAMILY)
def test_two_ranks_train(name, directories, trained):
    """Signal, gradients and scores from both ranks; the language model moved, the vision tower did
    not; boxes as asked."""
    lines, model = metrics(trained / name), checkpoint.newest(trained / name)
    assert [line["step"] for line in lines] == [1, 2] and lines[0]["sampled"] == 8
    assert model.name == "step-000002" and len(list(model.glob("state-*.pt"))) == 2
    for line in lines:
        assert 0 < line["grad_norm"] < math.inf and line["logp_gap"] < 1e-4
        assert line["signal_groups"] > 0 and line["calls"] > 0 and line["semantic"] > 0
    before = load_file(directories[name] / "model.safetensors")
    after = load_file(model / "model.safetensors")
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert moved == {key for key in before if "visual" not in key}
    assert json.loads((model / "agent.json").read_text())["coordinates"] == COORDINATES[name]
    said = (trained / name / "stdout").read_text()
    assert ("after training, sampled" in said) == (name == FAMILY[0])


@pytest.mark.parametrize("name", FAMILY)
def test_two_ranks_checkpoint_loads_on_one(name, trained):
    """The shards of two ranks, put together: parameters and master weights are the checkpoint's
    model, moments the shards end to end."""
    folder = checkpoint.newest(trained / name)
    policy = Policy(folder)
    parameters = policy.freeze_vision()
    weights = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for p in parameters:
            p.add_(1)
    optimiser = shard.ShardedAdamW(parameters)
    assert checkpoint.load(folder, [optimiser], torch.Generator()) == 2
    assert optimiser.steps == 2 * Config().updates
    assert all(torch.equal(p, w) for p, w in zip(parameters, weights))
    halves = [torch.load(folder / f"optimiser-0/optimiser-{r}-of-2.pt", weights_only=True)
              for r in (0, 1)]
    for i, bucket in enumerate(optimiser.buckets):
        for state in ("mean", "square"):
            whole = torch.cat([half[state][i] for half in halves])[:bucket.size]
            assert torch.equal(getattr(bucket, state)[:bucket.size], whole) and whole.any()


# ---- what two ranks do; each writes what it saw, the tests below look at it ----------------------

GROUPS = torch.arange(4).repeat_interleave(4)         # of the 16 trajectories


def fixed():
    """16 trajectories of tiny/ on 4 questions, the same on every rank."""
    policy = Policy(ROOT / "tiny")
    questions = world_questions(World(), 0, "test", 0, 4)
    return policy, collect(policy, questions, 4, generator=torch.Generator().manual_seed(0))


def three_steps(policy, trajectories, share=None, algo="mapo", micro_tokens=10**9, signal=None):
    """accumulate and take_step, three times, on this rank's trajectories (by default every N-th
    group) -> the parameters, and the first statistics. The policy is left as it was.

    Advantages are given by hand; those of the groups whose `signal` is 0 are 0. With PPO they are
    the rewards, and the critic's parameters come last."""
    if share is None:
        share = [i for i in range(16) if i // 4 % shard.ranks() == shard.rank()]
    value = torch.linspace(-1, 1, 16).roll(5)
    if signal:
        value = value * torch.tensor(signal)[GROUPS]
    mine, row = [trajectories[i] for i in share], mapo.ALGORITHMS[algo]
    parameters = policy.freeze_vision()
    start = [p.detach().clone() for p in parameters]
    # eps: near 0, Adam with 1e-8 would make a step of 1e-3 of a rounding error of 1e-9
    optimiser = shard.ShardedAdamW(parameters, eps=1e-4)
    config = Config(micro_tokens=micro_tokens, lr=1e-3, critic_lr=1e-3)
    run = SimpleNamespace(config=config, optimiser=optimiser, critic=None, policy=policy,
                          diverged=0)
    advantage = spread(value[share], mine)
    if row.critic:
        run.critic = Critic(policy)
        run.critic.optimiser = shard.ShardedAdamW(list(run.critic.head.parameters()), eps=1e-4)
        paid = torch.zeros(advantage.shape)
        for i, trajectory in enumerate(mine):
            paid[i, trajectory.turns[-1].span.stop - 2] = value[share[i]]
        advantage = run.critic.advantages(mine, paid, micro_tokens)
    batch, stats = to_batch(mine, advantage, row), []
    for step in (10, 11, 12):                           # after the warm-up
        totals = accumulate(policy, optimiser, batch, row, config)
        stats.append(take_step(run, batch, totals, step))
    found = parameters + (list(run.critic.head.parameters()) if run.critic else [])
    found = torch.cat([p.detach().flatten() for p in found])
    with torch.no_grad():
        for p, s in zip(parameters, start):
            p.copy_(s)
    return found, stats[0]


LAST = [12, 13, 14, 15]                               # rank 1 may have one group only


def on_two_ranks(folder, file, directories):
    """Everything that needs no command of its own, in one pair of processes."""
    shard.setup(timeout=120)
    training.shard.setup = lambda *_: "cpu"           # train() below finds the ranks already there
    policy, trajectories = fixed()
    uneven = [i for i in range(16) if i not in LAST] if shard.rank() == 0 else LAST
    seen = {"one": three_steps(policy, trajectories),
            "four": three_steps(policy, trajectories, micro_tokens=700),
            "token": three_steps(policy, trajectories, algo="dapo", micro_tokens=700),
            "no signal": three_steps(policy, trajectories, micro_tokens=700, signal=(1, 0, 1, 0)),
            "uneven": three_steps(policy, trajectories, uneven, micro_tokens=700),
            "ppo": three_steps(policy, trajectories, uneven, algo="ppo", micro_tokens=700)}
    for algo in ("ppo", "dapo"):
        config = small(ROOT / "tiny", f"{folder}/{algo}", algo=algo, questions=4, data=str(file))
        seen[f"train {algo}"] = train(config)
    for name in directories:
        out = f"{folder}/{name}"
        train(of_family(name, directories, out, file, steps=3))
        train(of_family(name, directories, f"{out}-resumed", file, steps=3, resume=True))
        train(of_family(name, directories, f"{out}-bfloat16", file, steps=1, dtype="bfloat16"))
    torch.save(seen, f"{folder}/seen-{shard.rank()}")


@pytest.fixture(scope="module")
def two(trained, file, directories, tmp_path_factory):
    """What each of two ranks saw, and the folder of their runs; `..-resumed` goes on from
    torchrun's checkpoints."""
    folder = tmp_path_factory.mktemp("two")
    for name in FAMILY:
        shutil.copytree(trained / name, folder / f"{name}-resumed")
    shard.launch(on_two_ranks, 2, str(folder), str(file), directories)
    return [torch.load(folder / f"seen-{r}", weights_only=True) for r in (0, 1)], folder


@pytest.mark.parametrize("name", FAMILY)
def test_two_ranks_resume_bit_for_bit(name, two):
    """Two steps by torchrun and a third after --resume are three steps without a stop: weights,
    moments, metrics."""
    _, folder = two
    whole, parts = (folder / f"{name}{end}/step-000003" for end in ("", "-resumed"))
    weights, weights_too = (load_file(part / "model.safetensors") for part in (whole, parts))
    assert all(torch.equal(weights[key], weights_too[key]) for key in weights)
    for shards in ("optimiser-0/optimiser-0-of-2.pt", "optimiser-0/optimiser-1-of-2.pt"):
        a, b = (torch.load(part / shards, weights_only=True) for part in (whole, parts))
        for state in ("master", "mean", "square"):
            assert all(torch.equal(x, y) for x, y in zip(a[state], b[state]))
    lines = metrics(folder / name)
    assert lines == metrics(folder / f"{name}-resumed") and len(lines) == 3


@pytest.mark.parametrize("name", FAMILY)
def test_resume_on_one_rank_runs(name, trained, tmp_path):
    out = tmp_path / name
    shutil.copytree(trained / name, out)
    before = json.loads((checkpoint.newest(out) / "train.json").read_text())
    assert train(Config(**before | dict(out=str(out), steps=3, resume=True)))["step"] == 3
    assert [line["step"] for line in metrics(out)] == [1, 2, 3]
    assert [f.name for f in out.glob("step-*/optimiser-0/*")] == ["optimiser-0-of-1.pt"]


@pytest.mark.parametrize("name", FAMILY)
def test_bfloat16_stays_finite(name, two):
    """Weights in bfloat16, master weights in float32; sampled and recomputed differ by rounding
    only."""
    folder = two[1] / f"{name}-bfloat16"
    for line in metrics(folder):
        assert 0 < line["grad_norm"] < math.inf and line["logp_gap"] < .5
    weights = load_file(checkpoint.newest(folder) / "model.safetensors")
    assert all(w.dtype == torch.bfloat16 and w.isfinite().all() for w in weights.values())


# ---- any number of ranks and micro-batches is the same training ----------------------------------

TOLERANCE = 2e-6   # of parameters after three steps of 1e-3 (the largest moves by 2.8e-3)


@pytest.fixture(scope="module")
def alone():
    """The same trajectories by one rank and one micro-batch, or four."""
    policy, trajectories = fixed()
    return {"one": three_steps(policy, trajectories),
            "four": three_steps(policy, trajectories, micro_tokens=1000),
            "token": three_steps(policy, trajectories, algo="dapo"),
            "ppo": three_steps(policy, trajectories, algo="ppo"),
            "no signal": three_steps(policy, trajectories, signal=(1, 0, 1, 0))}


@pytest.mark.parametrize("case, reference", [
    ("one", "one"), ("four", "one"), ("token", "token"), ("no signal", "no signal"),
    ("uneven", "one"), ("ppo", "ppo")])
def test_ranks_and_micro_batches_change_nothing(case, reference, two, alone):
    """One or two ranks; one micro-batch, four, or more on one rank than on the other; mean over
    trajectories or tokens; a rank without signal: the same parameters after three steps, on both
    ranks bit for bit, and the same statistics."""
    (mine, stats), (theirs, others) = (seen[case] for seen in two[0])
    expected, expected_stats = alone[reference]
    assert torch.equal(mine, theirs) and (mine - expected).abs().max() < TOLERANCE
    for key in ("loss", "entropy", "grad_norm"):
        assert stats[key] == others[key]
        assert stats[key] == pytest.approx(expected_stats[key], rel=1e-3, abs=1e-6)
    first, second = stats["micro_batches"], others["micro_batches"]
    if case == "one":
        assert (first, second) == (1, 1)
    elif case == "no signal":
        assert first > second == 0
    elif case in ("uneven", "ppo"):
        assert first > second > 0
    else:
        assert min(first, second) >= 2


def test_the_steps_above_moved_the_parameters(alone):
    """Far more than the tolerance; and four micro-batches on one rank are as good as one."""
    start = torch.cat([p.detach().flatten() for p in Policy(ROOT / "tiny").freeze_vision()])
    for name in ("one", "token", "no signal"):
        assert (alone[name][0] - start).abs().max() > 1000 * TOLERANCE
    assert (alone["four"][0] - alone["one"][0]).abs().max() < TOLERANCE
    assert alone["four"][1]["micro_batches"] >= 4 > alone["one"][1]["micro_batches"] == 1


@pytest.mark.parametrize("algo", ["ppo", "dapo"])
def test_ppo_and_dapo_on_two_ranks(algo, two):
    """PPO's second optimiser, DAPO's redraws (a different number on each rank): both ranks end at
    the same numbers."""
    (first, second), folder = two
    one, other = first[f"train {algo}"], second[f"train {algo}"]
    assert all(one[key] == other[key] for key in other if key not in CLOCK | {"micro_batches"})
    assert one["step"] == 2 and all(line["grad_norm"] > 0 for line in metrics(folder / algo))
    optimisers = list((folder / algo / "step-000002").glob("optimiser-*"))
    assert len(optimisers) == (2 if algo == "ppo" else 1)


def test_a_rank_that_fails_ends_all_and_is_named(tmp_path):
    """One broken image, at rank 1 after its first step: torchrun ends within seconds, with an error
    that names file, line and rank."""
    question = write_jsonl(world_questions(World(), 0, "train", 0, 1), tmp_path)
    line = json.loads(question.read_text())
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    config = small(ROOT / "tiny", tmp_path / "run", data=str(question), steps=400)

    def write(broken=None):
        lines = [line | {"id": str(i)} for i in range(160)]
        if broken is not None:
            lines[broken]["image"] = "broken.png"
        question.write_text("\n".join(map(json.dumps, lines)))

    write()
    stream = Questions(config)
    asked = [int(stream(step)[1].id) for step in range(1, 80)]     # by rank 1
    broken = next(i for i in asked if i >= 64)                     # the scorer opens the first 64
    write(broken)
    start = time.time()
    done = torchrun(config)
    assert done.returncode != 0 and time.time() - start < 60
    assert f"train.py: rank 1 of 2: {question}:{broken + 1}: " in done.stderr
    assert "broken.png" in done.stderr
