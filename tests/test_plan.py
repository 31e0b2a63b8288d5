"""The plan against reality: bytes of weights, optimiser and cache exactly, the peak of a micro-batch within a factor of 2."""
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, Qwen3VLConfig

import plan
from lib import shard
from conftest import FAMILY, ROOT
from lib.policy import Policy
from lib.sampler import Session
from tools import fit
from train import Config

# One micro-batch of 4 trajectories with 600 tokens each, half of them a shared prompt; without recomputation, then with.
ROWS, PROMPT, TOTAL = 4, 300, 600
MEASURE = f"""
import re, sys, torch
from pathlib import Path
from lib.policy import Policy, Tokens
from lib import shard
torch.set_num_threads(1)
policy = Policy(sys.argv[1])
policy.model.requires_grad_(False)
optimiser = shard.ShardedAdamW([p.requires_grad_() for n, p in policy.model.named_parameters() if "visual" not in n])
def status(name):
    return int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
def step(rows, prompt, total):
    start = Tokens(torch.randint(20, 500, (prompt,)).tolist())
    batch = [start + Tokens(torch.randint(20, 500, (total - prompt,)).tolist()) for _ in range(rows)]
    logp, *_ = policy.logprobs(batch, [[i >= prompt for i in range(total)]] * rows, prompts=[start] * rows)
    logp.sum().backward()
    optimiser.finish_micro_batch()
for _ in range(2):
    step(1, 8, 16)                                          # threads and libraries are there
    Path("/proc/self/clear_refs").write_text("5")           # the peak starts again from here
    before = status("VmRSS")
    step({ROWS}, {PROMPT}, {TOTAL})
    print(status("VmHWM") - before, flush=True)
    policy.recompute_layers()
"""


@pytest.fixture(scope="module")
def model():
    return plan.read_model(str(ROOT / "tiny"))


def test_weights_and_optimiser_equal_the_real_tensors(model, policy):
    """Sums over the loaded model and shard.ShardedAdamW.bytes(), to the byte."""
    own = Policy(ROOT / "tiny")
    own.model.requires_grad_(False)
    parameters = [p.requires_grad_() for n, p in own.model.named_parameters() if "visual" not in n]
    table = plan.memory(model, Config(), plan.read_questions(model, Config()), 1)
    assert table["policy's weights"] == table["frozen base's weights"] == sum(p.numel() * p.element_size() for p in own.model.parameters())
    assert model.trained == sum(p.numel() for p in parameters) and model.vision == model.all - model.trained
    assert table["gradient shard"] + table["optimiser shard"] == shard.ShardedAdamW(parameters).bytes()


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_shards_divide_what_is_trained(model, ranks):
    """shard.py rounds each bucket up to a multiple of the ranks; tiny/ has one bucket."""
    table = plan.memory(model, Config(), plan.read_questions(model, Config()), ranks)
    assert table["gradient shard"] + table["optimiser shard"] == 16 * -(-model.trained // ranks)


def test_cache_of_a_real_session(model, policy, questions):
    """Keys and values of 2 questions x 3 rows after a turn: the columns in use to the byte, what is allocated up to 64 more."""
    images = policy.encode_images([fit(q.open(), policy.resolution) for q in questions[:2]])
    session = Session(policy, [policy.prompt(i, q.prompt) for i, q in zip(images, questions)], group=3)
    session.sample(20, generator=torch.Generator().manual_seed(0))
    session.append([policy.observation("no")] * 6)
    columns = session.mask.shape[1]
    used = sum(x.numel() * x.element_size() for layer in session.cache.layers for x in (layer.keys, layer.values))
    allocated = sum(layer.store.untyped_storage().nbytes() for layer in session.cache.layers)
    assert used == plan.cache_bytes(model, 6, columns)
    assert used <= allocated <= plan.cache_bytes(model, 6, columns + plan.SPARE)


def test_lengths_bound_real_trajectories(model, policy, trajectories):
    t = plan.read_questions(model, Config())
    assert t.exact and (t.image, t.crop) == (16, 4)
    assert max(len(x.prompt.ids) for x in trajectories) <= t.prompt and max(len(x.mask) for x in trajectories) <= t.total
    assert max(h * w for x in trajectories for h, w in x.tokens.grids[1:]) <= t.crop


@pytest.fixture(scope="module")
def larger(tmp_path_factory):
    """8 layers of 256 from random weights, 8192 words, in tiny/'s form."""
    folder = tmp_path_factory.mktemp("larger")
    config = AutoConfig.from_pretrained(ROOT / "tiny")
    for key, value in dict(hidden_size=256, intermediate_size=1024, num_hidden_layers=8, vocab_size=8192, layer_types=["full_attention"] * 8).items():
        setattr(config.text_config, key, value)
    config.text_config.rope_parameters = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 12, 12]}
    config.vision_config.out_hidden_size = 256
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    for file in (ROOT / "tiny").iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.fixture(scope="module")
def measured(larger):
    """Growth of the process's resident memory (VmHWM) over forward, backward and the optimiser's buckets, in bytes."""
    if not os.path.exists("/proc/self/clear_refs"):
        pytest.skip("the peak of a process can be reset only on Linux")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    run = subprocess.run([sys.executable, "-c", MEASURE, larger], env=environment, capture_output=True, text=True)
    return [int(line) for line in run.stdout.split()] + [run.stderr[-500:]]


@pytest.mark.parametrize("recompute", [False, True])
def test_peak_of_a_real_micro_batch(larger, measured, recompute):
    m = plan.read_model(str(larger))
    update = plan.memory(m, Config(questions=1, group=ROWS, max_turns=1, max_tokens=TOTAL - PROMPT, micro_tokens=ROWS * TOTAL, recompute=recompute),
                         SimpleNamespace(image=0, crop=0, observation=0, prompt=PROMPT, total=TOTAL), 1)
    fixed = sum(update[name] for name in ("policy's weights", "frozen base's weights", "gradient shard", "optimiser shard"))
    expected = update["peak of update"] - fixed
    print(f"\nrecompute {recompute}: measured {measured[recompute]} bytes, planned {expected}")
    assert .5 * expected < measured[recompute] < 1.1 * expected         # the plan is an upper bound, but for the allocator


@pytest.mark.parametrize("name", FAMILY)
def test_stored_by_a_vision_tower_that_learns(name, directories):
    """Bytes that autograd keeps, each storage once, without the weights; the plan is an upper bound."""
    policy, kept = Policy(directories[name]), {}
    policy.train_vision = True
    image = policy.encode_images([Image.new("RGB", (6 * policy.resolution.factor,) * 2)] * 4)
    own = {p.untyped_storage().data_ptr() for p in policy.model.parameters()}

    def pack(x):
        if x.untyped_storage().data_ptr() not in own:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        features = policy.features(image)
    expected = plan.vision_bytes(plan.read_model(str(directories[name]), train_vision=True), 4 * 6 * 6 * 4)[0]
    print(f"\n{name}: {sum(kept.values())} bytes, planned {expected}")
    assert features[0].requires_grad and .4 * expected < sum(kept.values()) <= expected


def test_trained_vision_costs_more(model, policy):
    """Its weights get an optimiser; the language model's part of the work stays."""
    c, more = Config(), Config(train_vision=True)
    m, t = plan.read_model(str(ROOT / "tiny"), train_vision=True), plan.read_questions(model, c)
    frozen, learns = plan.memory(model, c, t, 1), plan.memory(m, more, t, 1)
    assert m.trained == m.all and learns["optimiser shard"] - frozen["optimiser shard"] == 12 * m.vision
    assert learns["activations"] > frozen["activations"]
    before, after = plan.flops(model, c, t, 1), plan.flops(m, more, t, 1)
    assert after["vision"] > before["vision"] and all(after[k] == before[k] for k in before if k != "vision")


def test_recompute_and_shared_prompts_save_memory(model):
    whole = plan.activation_bytes(model, 8, 8, 300, 600)
    assert plan.activation_bytes(model, 8, 8, 300, 600, recompute=True)[0] < whole[0] < plan.activation_bytes(model, 8, 1, 300, 600)[0]


PUBLISHED = {"3B": (2048, 36, 16, 2, 11008, 151936, True, 3_754_622_976), "7B": (3584, 28, 28, 4, 18944, 152064, False, 8_292_166_656)}


def qwen(folder, name="3B"):
    """config.json and preprocessor_config.json of Qwen2.5-VL as published."""
    hidden, layers, heads, kv, inner, vocabulary, tied, _ = PUBLISHED[name]
    vision = dict(model_type="qwen2_5_vl", depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, patch_size=14, out_hidden_size=hidden)
    (folder / "config.json").write_text(json.dumps(dict(
        model_type="qwen2_5_vl", architectures=["Qwen2_5_VLForConditionalGeneration"], hidden_size=hidden, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv, intermediate_size=inner, vocab_size=vocabulary, tie_word_embeddings=tied,
        image_token_id=151655, rope_theta=1e6, rope_scaling={"type": "mrope", "mrope_section": [16, 24, 24]}, vision_config=vision)))
    (folder / "preprocessor_config.json").write_text(json.dumps(dict(
        image_processor_type="Qwen2VLImageProcessor", min_pixels=3136, max_pixels=1280 * 28 * 28, patch_size=14, temporal_patch_size=2, merge_size=2)))
    return folder


@pytest.mark.parametrize("name", ["3B", "7B"])
def test_published_models(tmp_path, name):
    """The published parameter counts, from the published config.json; no weights, no tokenizer."""
    m = plan.read_model(str(qwen(tmp_path, name)), "bfloat16")
    assert m.all == PUBLISHED[name][-1] and m.b == 2 and m.resolution.factor == 28
    assert plan.cache_bytes(m, 1, 1) == {"3B": 36 * 2 * 256 * 2, "7B": 28 * 2 * 512 * 2}[name]         # by hand
    assert not plan.read_questions(m, Config()).exact


def test_another_family(tmp_path):
    """Qwen3-VL: thrice more features a token (DeepStack), a head size of its own; no branch on the name."""
    text = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=32, intermediate_size=96, vocab_size=512)
    Qwen3VLConfig(text_config=text, vision_config=dict(depth=4, hidden_size=32, num_heads=2, intermediate_size=48, out_hidden_size=64,
                                                       deepstack_visual_indexes=[0, 1, 2])).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_bytes((ROOT / "tiny/preprocessor_config.json").read_bytes())
    m = plan.read_model(str(tmp_path))
    assert (m.attention, m.kv, m.features) == (128, 64, 4 * 64)


def test_flops_by_hand(model):
    """A step of 1 question x 2 trajectories of one turn of 10 tokens, prompt 30, both in one micro-batch."""
    c = Config(questions=1, group=2, max_turns=1, max_tokens=10, micro_tokens=1000, updates=1)
    t = SimpleNamespace(image=16, crop=4, prompt=30, observation=36, total=40)
    body, head = 857_984 - 542 * 128, 542 * 128
    work = plan.flops(model, c, t, 1)
    assert work["decode"] == 20 * (2 * (body + head) + 4 * 128 * 4 * 35)
    assert work["update"] == 6 * body * (30 + 2 * 10) + 3 * 4 * 128 * 4 * (30 * 30 + 2 * 10 * 40) + 8 * head * 20
    assert work["score"] == 0


def test_the_command_stops_before_loading(tmp_path):
    """train.py --plan needs no weights: here there are none. Data gives steps an epoch and the images' sizes."""
    Image.new("RGB", (4000, 3000)).save(tmp_path / "a.png")
    (tmp_path / "q.jsonl").write_text('{"image": "a.png", "question": "What?", "answer": "x"}\n' * 40)
    run = subprocess.run([sys.executable, ROOT / "train.py", "--plan", "--model", qwen(tmp_path), "--data", tmp_path / "q.jsonl", "--questions", "8",
                          "--dtype", "bfloat16", "--out", tmp_path / "run"], env=os.environ | {"WORLD_SIZE": "2", "RANK": "0"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "computed, not run" in run.stdout and "40 in" in run.stdout and "5.0 steps an epoch" in run.stdout and "(4000, 3000)" in run.stdout
    assert "2 ranks*" in run.stdout and "8 ranks" in run.stdout and not (tmp_path / "run").exists()
    assert f"{3_754_622_976 * 2 / 1e9:.1f}" in run.stdout
