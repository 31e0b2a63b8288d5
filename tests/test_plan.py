"""docs/plan.py against reality: weights, optimiser and cache to the byte, a micro-batch's peak."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, Qwen3VLConfig

from conftest import ROOT
from lib import shard
from lib.batches import micro_batches
from lib.policy import Policy, Tokens
from lib.sampler import Session
from tools import ToolError, fit, parse
from train import Config, parse_config

sys.path.insert(0, str(ROOT / "docs"))
import plan

PAGE = (ROOT / "docs/larger.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tiny():
    return plan.read_shape(str(ROOT / "tiny"))


@pytest.fixture(scope="module")
def lengths(tiny):
    return plan.read_lengths(tiny, Config())[0]


# ---- exact: weights, optimiser, cache ------------------------------------------------------------

def test_weights_and_optimiser_equal_the_real_tensors(tiny, lengths):
    own = Policy(ROOT / "tiny")
    parameters = own.freeze_vision()
    table = plan.memory(tiny, Config(), lengths, 1)
    real = sum(p.numel() * p.element_size() for p in own.model.parameters())
    assert table["policy's weights"] == table["frozen base's weights"] == real
    assert tiny.m == sum(p.numel() for p in parameters)
    optimiser = table["gradient shard"] + table["optimiser shard"]
    assert optimiser == shard.ShardedAdamW(parameters).bytes()


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_ranks_share_what_is_trained(tiny, lengths, ranks):
    """lib/shard.py rounds each bucket up to a multiple of the ranks; tiny/ has one bucket."""
    table = plan.memory(tiny, Config(), lengths, ranks)
    assert table["gradient shard"] + table["optimiser shard"] == 16 * -(-tiny.m // ranks)


def test_cache_of_a_real_session(tiny, policy, questions):
    """Two questions x 3 rows after a turn and an error."""
    images = policy.encode_images([fit(q.open(), policy.resolution) for q in questions[:2]])
    prompts = [policy.prompt(image, q.prompt) for image, q in zip(images, questions)]
    session = Session(policy, prompts, group=3)
    session.sample(20, generator=torch.Generator().manual_seed(0))
    session.append([policy.observation("no")] * 6)
    held = [x.untyped_storage().nbytes() for layer in session.cache.layers
            for x in (layer.keys, layer.values)]
    assert sum(held) == plan.cache_bytes(tiny, 6 * session.mask.shape[1])


# Hidden, layers, heads, kv heads, embedding, weights in all: as Qwen publishes them.
PUBLISHED = {"3B": (2048, 36, 16, 2, 151_936 * 2048, 3_754_622_976),
             "7B": (3584, 28, 28, 4, 152_064 * 3584, 8_292_166_656)}


@pytest.fixture(scope="module")
def shapes(example):
    return {name: plan.read_shape(str(example / f"runs/{name}"), "bfloat16") for name in PUBLISHED}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models(shapes, name):
    """Of config.json alone; 3B ties its embedding to lm_head. Heads have a size of 128."""
    s = shapes[name]
    hidden, layers, heads, kv, embedding, weights = PUBLISHED[name]
    assert (s.n, s.D, s.L, s.A, s.b) == (weights, hidden, layers, heads * 128, 2)
    assert s.ends == embedding * (1 if name == "3B" else 2)
    assert plan.cache_bytes(s, 1) == layers * 2 * kv * 128 * 2
    assert s.resolution.factor == 28 and s.resolution.max_pixels == 1280 * 28 ** 2


def test_without_a_preprocessor_config(example, tmp_path):
    """Then an image takes up to 16,384 tokens, as published."""
    (tmp_path / "config.json").write_bytes((example / "runs/3B/config.json").read_bytes())
    assert plan.read_shape(str(tmp_path)).resolution.max_pixels == 16_384 * 28 ** 2


def test_another_family(tmp_path):
    """Qwen3-VL: head size of its own, and with DeepStack's two layers thrice the features."""
    text = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                head_dim=32, intermediate_size=96, vocab_size=512)
    vision = dict(depth=4, hidden_size=32, num_heads=2, intermediate_size=48, out_hidden_size=64,
                  deepstack_visual_indexes=[0, 1])
    Qwen3VLConfig(text_config=text, vision_config=vision).save_pretrained(tmp_path)
    s = plan.read_shape(str(tmp_path))
    assert (s.A, s.kv, s.features) == (4 * 32, 2 * 32, 3 * 64)


# ---- bounds: lengths, a micro-batch --------------------------------------------------------------

def test_lengths_bound_real_trajectories(lengths, trajectories):
    assert lengths.image == 16
    assert max(len(t.prompt.ids) for t in trajectories) <= lengths.prompt
    assert max(len(t.mask) for t in trajectories) <= lengths.whole
    grids = [grid for t in trajectories for grid in t.tokens.grids[1:]]
    assert max(height * width for height, width in grids) <= lengths.crop


@pytest.mark.parametrize("call", ["{", '{"name": "x", "arguments": {}}',
                                  '{"name": "image_zoom_in_tool", "arguments": {"a": 1}}',
                                  '{"name": "image_zoom_in_tool", "arguments": '
                                  '{"label": "the object", "bbox_2d": [1, 2, 3, 4]}}'])
def test_errors_are_no_longer_than_assumed(policy, lengths, call):
    """tiny/ writes them nearly letter by letter; other tokenizers need fewer tokens."""
    with pytest.raises(ToolError) as error:
        parse(f"<tool_call>{call}</tool_call>", (96, 96))
    assert len(policy.observation(str(error.value)).ids) <= lengths.observation


@pytest.mark.parametrize("micro_tokens", [1, 600, 2048, 5000, 100_000])
def test_micro_batches_are_as_planned(micro_tokens):
    """The first micro-batch of one group whose trajectories are all as long as they may be."""
    prompt, mask = object(), [True] * 300
    group = [SimpleNamespace(prompt=prompt, mask=mask) for _ in range(8)]
    real = len(micro_batches(group, list(range(8)), micro_tokens)[0])
    longest = plan.Lengths(0, 0, 100, 0, whole=300)
    assert plan.micro_rows(Config(micro_tokens=micro_tokens), longest, 8) == real


def test_gradients_wait_for_the_prompts(tiny):
    """When backward has passed all layers of what follows the prompts, only the last layer's
    weights, behind which the prompts hold nothing, have their gradients: so the plan counts all."""
    own = Policy(ROOT / "tiny")
    arrived, counts = [], []
    for p in own.freeze_vision():
        p.register_post_accumulate_grad_hook(lambda p: arrived.append(p.numel()))
    own.language.layers[0].mlp.register_full_backward_hook(lambda *_: counts.append(sum(arrived)))
    prompt = Tokens([20] * 30)
    batch = [prompt + Tokens([21 + i] * 20) for i in range(3)]
    masks = [[False] * 30 + [True] * 20] * 3
    own.logprobs(batch, masks, prompts=[prompt] * 3)[0].sum().backward()
    last = sum(p.numel() for p in own.language.layers[-1].parameters())
    assert 0 < counts[0] <= last + own.language.norm.weight.numel() and len(counts) == 2
    planned = plan.update_bytes(tiny, Config(), plan.Lengths(0, 0, 30, 0, 50), 1)
    assert planned["gradients that wait"] == 4 * sum(arrived)


def test_recompute_and_shared_prompts_save_memory(tiny):
    def planned(group, **options):
        config = Config(questions=8 // group, group=group, micro_tokens=10**6, **options)
        parts = plan.update_bytes(tiny, config, plan.Lengths(16, 4, 300, 36, 600), 1)
        return parts["activations: prompts"] + parts["activations: the rest"]

    assert planned(8, recompute=True) < planned(8) < planned(2)


# One micro-batch of 4 trajectories of 600 tokens, half of them a shared prompt; without
# recomputation, then with. Prints by how much the process's largest resident memory grew.
ROWS, PROMPT, TOTAL = 4, 300, 600
MEASURE = f"""
import re, sys, torch
from pathlib import Path
from lib import shard
from lib.policy import Policy, Tokens
torch.set_num_threads(1)
policy = Policy(sys.argv[1])
optimiser = shard.ShardedAdamW(policy.freeze_vision())
def status(name):
    text = Path("/proc/self/status").read_text()
    return int(re.search(name + r":\\s+(\\d+) kB", text)[1]) * 1024
def some(count):
    return Tokens(torch.randint(20, 500, (count,)).tolist())
def step(rows, prompt, total):
    start = some(prompt)
    batch = [start + some(total - prompt) for _ in range(rows)]
    masks = [[i >= prompt for i in range(total)]] * rows
    logp, _ = policy.logprobs(batch, masks, prompts=[start] * rows)
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
def larger(tmp_path_factory):
    """8 layers of 256 from random weights, 8192 words, else as tiny/."""
    folder = tmp_path_factory.mktemp("larger")
    config = AutoConfig.from_pretrained(ROOT / "tiny")
    sizes = dict(hidden_size=256, intermediate_size=1024, num_hidden_layers=8, vocab_size=8192,
                 layer_types=["full_attention"] * 8)
    for key, value in sizes.items():
        setattr(config.text_config, key, value)
    config.text_config.rope_parameters = {"rope_type": "default", "rope_theta": 1e4,
                                          "mrope_section": [8, 12, 12]}
    config.vision_config.out_hidden_size = 256
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    for file in (ROOT / "tiny").iterdir():
        if file.suffix in (".json", ".jinja") and file.name != "config.json":
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.fixture(scope="module")
def measured(larger):
    """Bytes, of both steps of MEASURE."""
    if not os.path.exists("/proc/self/clear_refs"):
        pytest.skip("the peak of a process can be reset only on Linux")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
                                "MALLOC_MMAP_THRESHOLD_": "65536"}
    run = subprocess.run([sys.executable, "-c", MEASURE, larger], env=environment,
                         capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return [int(line) for line in run.stdout.split()]


@pytest.mark.parametrize("recompute", [False, True])
def test_peak_of_a_real_micro_batch(larger, measured, recompute):
    s = plan.read_shape(str(larger))
    config = Config(questions=1, group=ROWS, max_turns=1, max_tokens=TOTAL - PROMPT,
                    micro_tokens=ROWS * TOTAL, recompute=recompute)
    table = plan.memory(s, config, plan.Lengths(0, 0, PROMPT, 0, TOTAL), 1)
    fixed = 2 * 4 * s.n + 16 * s.m
    expected = table["peak of update"] - fixed
    print(f"\nrecompute {recompute}: measured {measured[recompute]:,}, planned {expected:,.0f}")
    # A bound, but for the allocator. With recomputation it was .81 of the plan while the layers'
    # second runs were kept (policy.FirstKept); now it is .59.
    assert .5 * expected < measured[recompute] < (.7 if recompute else 1.1) * expected


# ---- work ----------------------------------------------------------------------------------------

def test_flops_by_hand(tiny):
    """A step of 1 question x 2 trajectories of one turn of 10 tokens, prompt 30, in one
    micro-batch. tiny/ has 857,984 trained weights, of them 542 x 128 embedding; 4 layers."""
    config = Config(questions=1, group=2, max_turns=1, max_tokens=10, micro_tokens=1000, updates=1)
    work = plan.flops(tiny, config, plan.Lengths(16, 4, 30, 36, 40))
    body, head = 857_984 - 542 * 128, 542 * 128
    assert work["decode"] == 20 * (2 * (body + head) + 4 * 128 * 4 * 35)
    pairs = 4 * 128 * 4 * (30 * 30 + 2 * 10 * 40)
    assert work["update"] == 6 * body * (30 + 2 * 10) + 3 * pairs + 8 * head * 20
    assert work["score"] == 0


def test_a_group_in_one_micro_batch_is_less_work(tiny):
    """8 trajectories of 600 tokens, 300 of them a prompt: 4,800 tokens one by one, else 2,700."""
    longest = plan.Lengths(16, 4, 300, 36, 600)
    one, all_ = [plan.flops(tiny, Config(questions=1, micro_tokens=n, updates=1), longest)["update"]
                 for n in (600, 4800)]
    body, pair = 857_984 - 542 * 128, 4 * 128 * 4
    assert one - all_ == 3 * 7 * (300 * 2 * body + 300 * 300 * pair)


# ---- the command, and the page -------------------------------------------------------------------

@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """The folder in which the page's scripts have been run."""
    folder = tmp_path_factory.mktemp("example")
    for script in re.findall(r"python - <<'END'\n(.*?)\nEND\n", PAGE, re.DOTALL):
        subprocess.run([sys.executable, "-c", script], cwd=folder, check=True)
    return folder


def page_rows():
    """The rows of the page's table of plans: a plan's options, GPUs, and the other cells."""
    command = re.search(r"`python docs/plan\.py (.*?)`", PAGE, re.DOTALL)[1].split()
    rows = re.findall(r"^\| `(--model runs/.*?)` \| (\d+) \| (.*) \|$", PAGE, re.MULTILINE)
    return [(command + options.split(), int(ranks), cells) for options, ranks, cells in rows]


@pytest.mark.parametrize("number", range(len(page_rows())))
def test_the_page_is_what_the_command_computes(example, shapes, monkeypatch, number):
    arguments, ranks, cells = page_rows()[number]
    monkeypatch.chdir(example)
    config = parse_config(arguments)
    s = shapes[Path(config.model).name]
    longest, _ = plan.read_lengths(s, config)
    table = plan.memory(s, config, longest, ranks)
    peaks = [f"{table[f'peak of {x}'] / 1e9:.1f}" for x in ("rollout", "update", "evaluation")]
    time = plan.seconds(s, config, longest, ranks)["a step"]
    assert cells == " | ".join([*peaks, plan.rounded(time)])
    said = f"trajectory has {longest.whole:,} tokens, {longest.prompt:,} of them the prompt"
    assert said in " ".join(PAGE.split())


def test_the_command(example):
    """Warns of the micro-batch, needs no weights, writes nothing."""
    command = [sys.executable, str(ROOT / "docs/plan.py"), "--model", "runs/3B", "--questions", "4",
               "--data", "runs/mine/questions.jsonl", "--dtype", "bfloat16"]
    run = subprocess.run(command, cwd=example, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "computed, not run" in run.stdout and "4,000 x 3,000" in run.stdout
    assert "warning: so their prompt is computed 8 times" in run.stdout
    assert not (example / "runs/mapo").exists()


def test_a_missing_model_is_named(example):
    run = subprocess.run([sys.executable, str(ROOT / "docs/plan.py"), "--model", "runs/mine"],
                         cwd=example, capture_output=True, text=True)
    assert run.returncode == 1 and run.stderr.startswith("plan.py: runs/mine: no config.json")
