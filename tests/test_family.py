"""Other models of the family go through the same code, and any number of ranks through the same arithmetic.

Random Qwen2.5-VL and Qwen3-VL directories (conftest.py) must give what transformers gives, sample what they train, and train,
stop, resume and be evaluated by the real commands, without a branch on a model's name. Then tiny/ on one rank and on two.
"""
import json
import math
import shutil
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

import eval as evaluation
import mapo
from lib import policy as policy_module
from lib import shard
import tools
import train as training
from conftest import FAMILY, ROOT
from lib.data import write_jsonl
from tiny.world import World, world_questions
from lib.policy import Policy, Tokens
from reward import Scorer, score
from rollout import Trajectory, Turn, act, collect
from lib.shard import ShardedAdamW, launch, rank, world
from tests.test_eval import files  # noqa: F401, a fixture: a file of each benchmark
from tools import fit
from train import Config, Questions, accumulate, load_checkpoint, spread, train

SETTINGS = {"qwen2_5_vl": dict(coordinates="pixels", recompute=True), "qwen3_vl": dict(coordinates="1000", recompute=True, train_vision=True)}
CLOCK = {"seconds", "rollout_seconds", "tokens_per_s", "peak_mb"}


@pytest.fixture(scope="module", params=FAMILY)
def model(request, directories):
    return Policy(directories[request.param])


@pytest.fixture(scope="module")
def sampled(model):
    """24 trajectories of 1 to 3 turns, and how often the batch shrank while they were sampled."""
    shrank, real = [], policy_module.Spare.absorb
    policy_module.Spare.absorb = lambda *arguments: shrank.append(1) or real(*arguments)
    part = collect(model, world_questions(World(), 0, "test", 0, 8), 3, 3, 26, generator=torch.Generator().manual_seed(0))
    policy_module.Spare.absorb = real
    return part, len(shrank) // 2  # layers


# ---- one model of the family, one process --------------------------------------------------------------------------------

def test_hidden_states_equal_transformers_own(model):
    """Images of different sizes encoded together, one to three of them in a sequence, a padded batch: our features, positions,
    DeepStack and masks are the whole model's forward pass on each sequence alone."""
    patch = model.resolution.factor
    pictures = [fit(q.open(), tools.Resolution(patch, (w * patch) ** 2, (w * patch) ** 2)).crop((0, 0, w * patch, h * patch))
                for q, (w, h) in zip(world_questions(World(), 0, "test", 0, 6), ((6, 6), (6, 2), (3, 3), (5, 6), (2, 2), (6, 5)))]
    encoded = model.encode_images(pictures)
    batch, at = [], [[0], [1, 2], [3, 4, 5]]
    for places in at:
        parts = [part for i in places for part in ("<|vision_start|>", encoded[i], "<|vision_end|>a crop of the red circle")]
        batch.append(model.tokens("<|im_start|>user\n", *parts))
    with torch.no_grad():
        ours, _, _ = model.hidden(batch)
        for row, (tokens, places) in enumerate(zip(batch, at)):
            inputs = model.processor(images=[pictures[i] for i in places], do_resize=False, return_tensors="pt")
            ids = torch.tensor([tokens.ids])
            theirs = model.model.model(input_ids=ids, mm_token_type_ids=(ids == model.image_id).int(), **inputs).last_hidden_state
            assert (ours[row, :len(tokens.ids)] - theirs[0]).abs().max() < 1e-4
    assert theirs.std() > .1 and len({t.ids.count(model.image_id) for t in batch}) == 3


def test_sampled_equals_recomputed(model, sampled):
    """Ratio 1 before a step, with looks (several images a sequence), shrinking batches, padding, shared prompts and not."""
    trajectories, shrank = sampled
    assert shrank > 0 and max(len(t.looks) for t in trajectories) == 2 and {len(t.turns) for t in trajectories} >= {2, 3}
    lengths = [sum(t.mask) for t in trajectories]
    assert max(lengths) > 5 * min(lengths)
    tokens, masks = [t.tokens for t in trajectories], [t.mask for t in trajectories]
    old, mask = training.pad([t.logps for t in trajectories], 0.), training.pad(masks, False)
    with torch.no_grad():
        for prompts in (None, [t.prompt for t in trajectories]):
            logp, entropy, _ = model.logprobs(tokens, masks, prompts=prompts)
            assert ((logp - old) * mask).abs().max() < 1e-4 and entropy[mask].mean() > .05


def test_semantic_scores(model, sampled):
    """Looks get scores in [0, 1] that depend on neither the batch nor its order."""
    trajectories, _ = sampled
    scorer = Scorer(model, world_questions(World(), 0, "train", 0, 4))
    _, s, looked = score(trajectories, scorer)
    looks = [turn for t in trajectories for turn in t.looks]
    assert looked.sum() == len(looks) > 5 and (0 <= s).all() and (s <= 1).all() and len({turn.score for turn in looks}) > 3
    alone = torch.cat([scorer([turn.call.label], [turn.crop_tokens]) for turn in reversed(looks)]).flip(0)
    assert torch.allclose(alone, torch.tensor([turn.score for turn in looks]), atol=1e-3)


@pytest.mark.parametrize("coordinates", ["pixels", "1000"])
def test_coordinates(directories, coordinates):
    """[0, 0, 500, 500] in thousandths, or half the seen sides in pixels, is the upper left quarter of the original. The
    prompt says which; a saved model remembers."""
    for name in FAMILY:
        model = Policy(directories[name], coordinates=coordinates)
        image = world_questions(World(), 0, "test", 0, 1)[0].open().crop((0, 0, 768, 512))
        seen = model.resolution.size(*image.size)
        box = [0, 0, 500, 500] if coordinates == "1000" else [0, 0, seen[0] // 2, seen[1] // 2]
        trajectory = Trajectory(None, Tokens([]), Tokens([]), [], [], seen, model.space(seen))
        turn = Turn(f'<tool_call>{{"name": "{tools.TOOL_NAME}", "arguments": {{"label": "the red circle", "bbox_2d": {box}}}}}</tool_call>', slice(0))
        act(model, trajectory, turn, image, last=False)
        assert turn.box == (0, 0, 384, 256) and turn.crop.tobytes() == fit(image.crop((0, 0, 384, 256)), model.resolution.crop()).tobytes()
    assert ("thousandths" in tools.system_prompt(coordinates)) == (coordinates == "1000")


def gradient(policy, trajectories, optimiser):
    values = torch.linspace(-1, 1, len(trajectories))
    accumulate(policy, [optimiser], trajectories, spread(values, trajectories), Config(micro_tokens=800), mapo.ALGORITHMS["mapo"])
    return torch.cat([b.gradient for b in optimiser.buckets]).clone()


def test_recompute_gives_the_same_gradient(directories):
    """Activation checkpointing changes memory, not numbers, with prompts shared through a cache."""
    for name in FAMILY:
        policy = Policy(directories[name])
        policy.model.requires_grad_(False)
        optimiser = ShardedAdamW([p.requires_grad_() for n, p in policy.model.named_parameters() if "visual" not in n])
        trajectories = collect(policy, world_questions(World(), 0, "test", 0, 2), 2, 3, 26, generator=torch.Generator().manual_seed(0))
        plain = gradient(policy, trajectories, optimiser)
        policy.recompute_layers()
        assert plain.norm() > 0 and (plain - gradient(policy, trajectories, optimiser)).norm() < 1e-6 * plain.norm()


@pytest.fixture
def seeing(model):
    """The model with a vision tower that learns, and three questions' images with a crop each: sequences, and how they begin."""
    model.train_vision = True
    qs = world_questions(World(), 0, "test", 0, 3)
    pictures = [(fit(q.open(), model.resolution), fit(q.open(), model.resolution.crop())) for q in qs]
    encoded = [model.encode_images(list(pair)) for pair in pictures]
    prompts = [model.prompt(image, q.prompt) for (image, _), q in zip(encoded, qs)]
    yield pictures, [p + model.observation(crop) + model.tokens("the red circle") for p, (_, crop) in zip(prompts, encoded)], prompts
    model.train_vision = False
    model.model.zero_grad()


def vision_gradient(model, loss):
    model.model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.model.model.visual.parameters()])


def test_vision_gradient_equals_transformers_own(model, seeing):
    """--train_vision: through features, DeepStack and a prompt that rows share (three times the first one, encoded once), the tower
    gets the gradient of the whole model's own forward passes."""
    pictures, sequences, prompts = seeing
    batch, starts = [sequences[i] for i in (0, 0, 0, 1, 2)], [prompts[i] for i in (0, 0, 0, 1, 2)]
    masks = [[i >= len(t.ids) - 3 for i in range(len(t.ids))] for t in batch]
    ours = [vision_gradient(model, model.logprobs(batch, masks, prompts=p)[0].sum()) for p in (starts, None)]
    total = 0.
    for row, mask, i in zip(batch, masks, (0, 0, 0, 1, 2)):
        inputs = model.processor(images=list(pictures[i]), do_resize=False, return_tensors="pt")
        ids = torch.tensor([row.ids])
        hidden = model.model.model(input_ids=ids, mm_token_type_ids=(ids == model.image_id).int(), **inputs).last_hidden_state
        total = total + model.log_softmax(hidden[0, -4:-1], 1.).gather(-1, ids[0, -3:, None]).sum()
    theirs = vision_gradient(model, total)
    assert theirs.norm() > 0 and all((g - theirs).norm() < 1e-4 * theirs.norm() for g in ours)


def test_shared_images_are_encoded_once(model, seeing, monkeypatch):
    """A micro-batch of one group: its overview and each different crop go through the tower once; without gradients, nothing does."""
    _, sequences, prompts = seeing
    counts, real = [], Policy.see
    monkeypatch.setattr(Policy, "see", lambda self, patches, grids: counts.append(len(patches)) or real(self, patches, grids))
    masks = [[False] * (len(sequences[0].ids) - 1) + [True]] * 4
    with torch.no_grad():
        still = model.logprobs([sequences[0]] * 4, masks, prompts=[prompts[0]] * 4)[0]
    assert counts == []
    moving = model.logprobs([sequences[0]] * 4, masks, prompts=[prompts[0]] * 4)[0]
    assert counts == [1, 1] and (still - moving).abs().max() < 1e-5


def test_a_base_with_other_eyes_looks_itself(model, sampled, directories):
    """Semantic scores do not change when the agent's vision tower does: the frozen base encodes the crops again."""
    trajectories, _ = sampled
    base, qs = Policy(directories[model.path.name]), world_questions(World(), 0, "train", 0, 4)
    assert evaluation.same_eyes(model, base)
    expected = score(trajectories, Scorer(base, qs))[1]
    looks = [turn for t in trajectories for turn in t.looks]
    real = [turn.crop_tokens for turn in looks]
    for turn in looks:  # as from a tower that has changed
        turn.crop_tokens = Tokens(turn.crop_tokens.ids, turn.crop_tokens.grids, [torch.randn_like(turn.crop_tokens.features[0])])
    blind, own = score(trajectories, Scorer(base, qs))[1], score(trajectories, Scorer(base, qs, own_eyes=True))[1]
    for turn, tokens in zip(looks, real):
        turn.crop_tokens = tokens
    assert torch.allclose(own, expected, atol=1e-3) and not torch.allclose(blind, expected, atol=1e-2)
    with torch.no_grad():
        next(base.model.model.visual.parameters()).add_(1e-3)
    assert not evaluation.same_eyes(model, base)


@pytest.mark.parametrize("name", FAMILY)
def test_every_benchmark(name, directories, files, tmp_path, monkeypatch, capsys):  # noqa: F811
    """eval.py asks V*, HR-Bench and MME-RealWorld-Lite, semantic score included."""
    for benchmark, file in files.items():
        monkeypatch.setattr(sys, "argv", ["eval.py", "--model", str(directories[name]), "--data", str(file), "--out", str(tmp_path / benchmark),
                                          "--max_tokens", "26", "--n", "8", "--films", "1", "--temperature", "1", "--coordinates", "1000"])
        evaluation.main()
        said = capsys.readouterr().out
        assert said.startswith(benchmark) and "all  " in said
        lines = [json.loads(line) for line in (tmp_path / benchmark / "predictions.jsonl").open()]
        assert len(lines) == 8 and all(line["space"] == [1000, 1000] for line in lines)
        assert any(turn["score"] is not None for line in lines for turn in line["turns"])


# ---- the real command on two ranks ---------------------------------------------------------------------------------------

def torchrun(*arguments):
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py",
                           *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=300)


def small(model, out, **changes):
    return Config(**dict(model=str(model), out=str(out), beta=.4, steps=2, questions=2, group=4, max_turns=2, max_tokens=26,
                         eval_questions=0, save_every=99, lr=1e-3, timeout=120.) | changes)


def flags(config):
    return [word for key, value in vars(config).items() if value is not False and value != "" for word in (f"--{key}", value)[:1 if value is True else 2]]


@pytest.fixture(scope="module")
def trained(directories, tmp_path_factory):
    """Both models, two steps on two ranks by torchrun -> folder with a run for each."""
    folder = tmp_path_factory.mktemp("runs")
    file = write_jsonl(world_questions(World(), 0, "train", 0, 8), folder / "data")
    for name in FAMILY:
        done = torchrun(*flags(small(directories[name], folder / name, data=str(file), test=str(file), eval_questions=4 * (name == FAMILY[0]),
                                     **SETTINGS[name])))
        assert done.returncode == 0, done.stderr[-3000:]
        (folder / name / "stdout").write_text(done.stdout)
    return folder


def metrics(folder):
    return [{k: v for k, v in json.loads(line).items() if k not in CLOCK} for line in (folder / "metrics.jsonl").open()]


@pytest.mark.parametrize("name", FAMILY)
def test_two_ranks_train(name, directories, trained):
    """Signal, gradients and scores from both ranks; the language model moved, the vision tower only with --train_vision; boxes as asked."""
    lines = metrics(trained / name)
    assert [line["step"] for line in lines] == [1, 2] and lines[0]["sampled"] == 8 and len(list(trained.glob(f"{name}/step-000002/state-*.pt"))) == 2
    assert all(0 < line["grad_norm"] < math.inf and line["signal_groups"] > 0 and line["calls"] > 0 and line["semantic"] > 0 for line in lines)
    assert all(line["logp_gap"] < 1e-4 for line in lines)
    before, after = load_file(directories[name] / "model.safetensors"), load_file(trained / name / "model.safetensors")
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    deaf = "deepstack_merger_list.1."  # joins after the last of two layers, where no later token hears of it
    assert moved == {key for key in before if "visual" not in key or "train_vision" in SETTINGS[name] and deaf not in key}
    assert json.loads((trained / name / "agent.json").read_text())["coordinates"] == SETTINGS[name]["coordinates"]
    assert ("after training, sampled" in (trained / name / "stdout").read_text()) == (name == FAMILY[0])


@pytest.mark.parametrize("name", FAMILY)
def test_two_ranks_checkpoint_loads_on_one(name, trained, tmp_path):
    """The shards of two ranks, put together: parameters and master weights are the checkpoint's model, moments the shards end to end."""
    checkpoint = trained / name / "step-000002"
    policy = Policy(checkpoint)
    weights = {n: p.detach().clone() for n, p in policy.model.named_parameters() if "visual" not in n or "train_vision" in SETTINGS[name]}
    parameters = [p for n, p in policy.model.named_parameters() if n in weights]
    with torch.no_grad():
        [p.add_(1) for p in parameters]
    optimiser = ShardedAdamW(parameters)
    assert load_checkpoint(checkpoint, [optimiser], torch.Generator()) == 2 and optimiser.steps == 2 * Config().updates
    assert all(torch.equal(p, weights[n]) for n, p in policy.model.named_parameters() if n in weights)
    halves = [torch.load(checkpoint / f"optimiser-0/optimiser-{r}-of-2.pt", weights_only=True) for r in (0, 1)]
    for i, bucket in enumerate(optimiser.buckets):
        for state in ("mean", "square"):
            whole = torch.cat([half[state][i] for half in halves])[:bucket.size]
            assert torch.equal(getattr(bucket, state)[:bucket.size], whole) and whole.any()


# ---- what two ranks do; each writes what it saw, the tests below look at it --------------------------------------------------

def fixed():
    """16 trajectories of tiny/ on 4 questions, the same on every rank, with advantages by hand."""
    policy = Policy(ROOT / "tiny")
    trajectories = collect(policy, world_questions(World(), 0, "test", 0, 4), 4, generator=torch.Generator().manual_seed(0))
    return policy, trajectories, torch.linspace(-1, 1, 16).roll(5)


def three_steps(policy, trajectories, advantage, share=None, algo="mapo", **changes):
    """accumulate + step, three times, on this rank's groups (by default every N-th) -> the parameters, and the first statistics.
    The policy is left as it was."""
    share = [i for i in range(16) if i // 4 % world() == rank()] if share is None else share
    start = [p.detach().clone() for p in policy.model.parameters()]
    policy.model.requires_grad_(False)
    parameters = [p.requires_grad_() for n, p in policy.model.named_parameters() if "visual" not in n]
    mine = [trajectories[i] for i in share]
    tokens, optimisers, critic, first = spread(advantage[share], mine), [ShardedAdamW(parameters, eps=1e-4)], None, None
    if algo == "ppo":
        policy.add_value_head()
        optimisers.append(ShardedAdamW(list(policy.value_head.parameters())))
        critic = torch.zeros(tokens.shape), tokens * 1.
    for _ in range(3):
        stats = accumulate(policy, optimisers, mine, tokens, Config(**changes), mapo.ALGORITHMS[algo], critic)
        first = first or stats
        for optimiser in optimisers:
            optimiser.clip(1.)
            optimiser.step(1e-3)
    [optimiser.close() for optimiser in optimisers]
    policy.value_head = None
    found = torch.cat([p.detach().flatten() for p in parameters])
    with torch.no_grad():
        [p.copy_(s) for p, s in zip(policy.model.parameters(), start)]
    return found, first


def no_signal(advantage):
    """The second and the fourth group teach nothing: on two ranks, all that rank 1 has."""
    return advantage * torch.tensor([1., 0., 1., 0.]).repeat_interleave(4)


UNEVEN = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]  # rank 0's; rank 1 has one group


def on_two_ranks(folder, runs, directories):
    """Everything that needs no command of its own, in one pair of processes."""
    shard.setup(timeout=120)
    training.shard.setup = lambda *_: "cpu"     # train() below finds the ranks already there
    policy, trajectories, advantage = fixed()
    seen = {"one": three_steps(policy, trajectories, advantage, micro_tokens=10**9),
            "four": three_steps(policy, trajectories, advantage, micro_tokens=700),
            "token": three_steps(policy, trajectories, advantage, algo="dapo", micro_tokens=700),
            "no signal": three_steps(policy, trajectories, no_signal(advantage), micro_tokens=700),
            "uneven": three_steps(policy, trajectories, advantage, [UNEVEN, [12, 13, 14, 15]][rank()], micro_tokens=700),
            "ppo": three_steps(policy, trajectories, advantage, [UNEVEN, [12, 13, 14, 15]][rank()], algo="ppo", micro_tokens=700)}
    for algo in ("ppo", "dapo"):
        seen[f"train {algo}"] = train(small(ROOT / "tiny", f"{folder}/{algo}", algo=algo, questions=4, data=f"{runs}/data/questions.jsonl"))
    for name, model in directories.items():
        again = dict(data=f"{runs}/data/questions.jsonl", steps=3, **SETTINGS[name])
        train(small(model, f"{folder}/{name}", **again))
        train(small(model, f"{folder}/{name}-resumed", **again, resume=True))
        seen[f"{name} bfloat16"] = train(small(model, f"{folder}/{name}-bfloat16", **again | dict(steps=1, dtype="bfloat16")))
    torch.save(seen, f"{folder}/seen-{rank()}")


@pytest.fixture(scope="module")
def two(trained, directories, tmp_path_factory):
    """What each of two ranks saw, and the folder of their runs; `.._resumed` goes on from torchrun's checkpoints."""
    folder = tmp_path_factory.mktemp("two")
    for name in FAMILY:
        shutil.copytree(trained / name, folder / f"{name}-resumed")
    launch(on_two_ranks, 2, str(folder), str(trained), directories)
    return [torch.load(folder / f"seen-{r}", weights_only=True) for r in (0, 1)], folder


@pytest.mark.parametrize("name", FAMILY)
def test_two_ranks_resume_bit_for_bit(name, two):
    """Two steps by torchrun and a third after --resume are three steps without a stop: weights, moments, metrics."""
    _, folder = two
    whole, parts = (load_file(folder / f / "model.safetensors") for f in (name, f"{name}-resumed"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    for r in (0, 1):
        a, b = (torch.load(folder / f / f"step-000003/optimiser-0/optimiser-{r}-of-2.pt", weights_only=True) for f in (name, f"{name}-resumed"))
        assert all(torch.equal(x, y) for state in ("master", "mean", "square") for x, y in zip(a[state], b[state]))
    assert metrics(folder / name) == metrics(folder / f"{name}-resumed") and len(metrics(folder / name)) == 3


@pytest.mark.parametrize("name", FAMILY)
def test_resume_on_one_rank_runs(name, trained, directories, tmp_path):
    shutil.copytree(trained / name, tmp_path / name)
    before = json.loads((tmp_path / name / "train.json").read_text())
    assert train(Config(**before | dict(out=str(tmp_path / name), steps=3, resume=True)))["step"] == 3
    assert [line["step"] for line in metrics(tmp_path / name)] == [1, 2, 3]
    assert [f.name for f in (tmp_path / name).glob("step-*/optimiser-0/*")] == ["optimiser-0-of-1.pt"]


@pytest.mark.parametrize("name", FAMILY)
def test_bfloat16_stays_finite(name, two):
    """Weights in bfloat16, master weights in float32; sampled and recomputed differ by rounding only."""
    seen, folder = two
    for line in metrics(folder / f"{name}-bfloat16"):
        assert math.isfinite(line["grad_norm"]) and line["grad_norm"] > 0 and line["logp_gap"] < .5
    weights = load_file(folder / f"{name}-bfloat16/model.safetensors")
    assert all(w.dtype == torch.bfloat16 and w.isfinite().all() for w in weights.values())


# ---- any number of ranks and micro-batches is the same training -----------------------------------------------------------

TOLERANCE = 2e-6  # of parameters after three steps of 1e-3 (measured: 1.2e-7; the largest moves by 2.8e-3). eps 1e-4: near 0, Adam with 1e-8
                  # would make a step of 1e-3 of a rounding error of 1e-9


@pytest.fixture(scope="module")
def alone():
    """The same trajectories by one rank and one micro-batch."""
    policy, trajectories, advantage = fixed()
    return {"one": three_steps(policy, trajectories, advantage, micro_tokens=10**9),
            "four": three_steps(policy, trajectories, advantage, micro_tokens=1000),
            "token": three_steps(policy, trajectories, advantage, algo="dapo", micro_tokens=10**9),
            "ppo": three_steps(policy, trajectories, advantage, algo="ppo", micro_tokens=10**9),
            "no signal": three_steps(policy, trajectories, no_signal(advantage), micro_tokens=10**9)}


@pytest.mark.parametrize("case, reference", [("one", "one"), ("four", "one"), ("token", "token"), ("no signal", "no signal"), ("uneven", "one"), ("ppo", "ppo")])
def test_ranks_and_micro_batches_change_nothing(case, reference, two, alone):
    """One or two ranks; one micro-batch, four, or more on one rank than on the other; mean over trajectories or tokens; a rank
    without signal: the same parameters after three steps, on both ranks bit for bit, and the same statistics."""
    (mine, stats), (theirs, others) = (seen[case] for seen in two[0])
    expected, reference_stats = alone[reference]
    start = torch.cat([p.flatten() for n, p in Policy(ROOT / "tiny").model.named_parameters() if "visual" not in n])
    assert torch.equal(mine, theirs) and (mine - expected).abs().max() < TOLERANCE
    assert (expected - start).abs().max() > 1000 * TOLERANCE and (alone["four"][0] - alone["one"][0]).abs().max() < TOLERANCE
    for key in ("loss", "entropy", "grad_norm"):
        assert stats[key] == others[key] == pytest.approx(reference_stats[key], rel=1e-3, abs=1e-6)
    pieces = stats["micro_batches"], others["micro_batches"]
    assert {"one": pieces == (1, 1), "no signal": pieces[1] == 0 < pieces[0], "uneven": pieces[0] > pieces[1] > 0, "ppo": pieces[0] > pieces[1] > 0}.get(case, min(pieces) >= 2)


@pytest.mark.parametrize("algo", ["ppo", "dapo"])
def test_ppo_and_dapo_on_two_ranks(algo, two):
    """PPO's second optimiser, DAPO's redraws (a different number on each rank): both ranks end at the same numbers."""
    seen, folder = two
    assert all(seen[0][f"train {algo}"][k] == v for k, v in seen[1][f"train {algo}"].items() if k not in CLOCK)
    assert seen[0][f"train {algo}"]["step"] == 2 and all(line["grad_norm"] > 0 for line in metrics(folder / algo))
    assert len(list((folder / algo / "step-000002").glob("optimiser-*"))) == 1 + (algo == "ppo")


def test_a_rank_that_fails_ends_all_and_is_named(tmp_path):
    """One broken image, at rank 1 in its second step: torchrun ends within seconds, with an error that names file, line and rank."""
    file = write_jsonl(world_questions(World(), 0, "train", 0, 1), tmp_path)
    line = json.loads(file.read_text())
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    config = small(ROOT / "tiny", tmp_path / "run", data=str(file), steps=400)
    file.write_text("\n".join(json.dumps(line | {"id": str(i)}) for i in range(160)))
    stream = Questions(config)
    broken = next(q.id for step in range(1, 80) if int((q := stream(step)[1]).id) >= 64)  # the first 64 are opened for the scorer
    file.write_text("\n".join(json.dumps(line | {"id": str(i)} | ({"image": "broken.png"} if str(i) == broken else {})) for i in range(160)))
    start = time.time()
    done = torchrun(*flags(config))
    assert done.returncode != 0 and time.time() - start < 60
    assert f"train.py: rank 1 of 2: {file}:{int(broken) + 1}: " in done.stderr and "broken.png" in done.stderr
