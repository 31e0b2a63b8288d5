"""What a run will cost, before it runs: memory of each GPU and work of a step, from shapes alone.

What it teaches: where 80 GB go. n weights, m of them trained, b bytes a weight (bf16 2, float32 4),
N ranks; L layers, D hidden, I MLP, A = heads x head size, V vocabulary:

    weights       2 n b: the policy, and the frozen base that scores it
    optimiser     16 m / N: float32 gradient 4, master 4, Adam's moments 8 (lib/shard.py)
    KV cache      2 L x kv heads x head size x b a token, x conversations x longest
    activations   what backward needs of a layer, a token. transformers' layer, counted as
                  Korthikanti et al. do (arXiv 2205.05198, sec. 4.1); the token may see K keys:
                      2 D (4 + 2 b)   two RMSNorms: input in float32, normalised, output
                      4 I b           SwiGLU: gate, silu(gate), up, their product
                      2 A b           query and output of attention; as much for each *key*
                      K b             the mask, which each layer turns from booleans to numbers
                  --recompute stores D b instead, and computes a layer again in backward.
    gradients     m b: backward passes through all that follows the prompts before it reaches the
                  prompts. Both use the same weights, so the gradients wait for the second part.
    bucket        gradients on their way to the optimiser: 4 + 4 / N a weight of the largest bucket
    logits        12 V x min(512, own tokens), in policy.TokenLogprobs

The model directory needs config.json alone. Weights and optimiser are exact. The rest are upper
bounds for questions like the first 32 of --data: each trajectory takes all its turns, each turn all
its tokens. Not counted: larger pictures and longer texts of other questions, --test's among them;
the images of DAPO's second to tenth draw; the scorer's start, which encodes 128 crops in one call;
CUDA's context, the allocator's fragments, the kernels' workspace, PPO's critic. tests/test_plan.py
compares a micro-batch on the CPU, docs/gpu.py a step of a 3B on a GPU.

Run it:  python docs/plan.py                                # tiny/, with train.py's defaults; 5 s
         python docs/plan.py --model DIR --questions 4 ..   # train.py's options (docs/larger.md)
"""
import json
import math
import sys
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

sys.path.insert(0, str(Path(__file__).parent.parent))
from lib.checkpoint import newest
from lib.data import DataError, read_jsonl
from lib.policy import read_config, usual_coordinates
from report import side_by_side
from tiny.world import world_questions
from tools import Resolution, system_prompt
from train import Config, parse_config, world_of

# Fitted to a step of a 3B on one H200, 16 trajectories side by side (docs/gpu.md). Its peaks are
# 989 TFLOP/s in bf16 and 4.8 TB/s. On another card they are others.
TFLOPS, TERABYTES = 300., 2.5   # a second
VISION = 35.                    # TFLOP/s of the vision tower
LAYER = 2e-4                    # s a layer and token of decoding: small kernels, gaps between them
CHUNK, BUCKET, SUMMARY = 512, 2**25, 256     # logprobs, ShardedAdamW, embed
WRAP, ERROR, FIRST = 32, 64, 32     # tokens of ChatML around a text, of an error; questions read


@dataclass
class Shape:
    """The numbers of a model that the arithmetic needs, and how many pixels it takes."""
    b: int                      # bytes a weight
    n: int                      # weights; tied ones once
    m: int                      # trained: the language model's, as Policy.freeze_vision has it
    largest: int                # of the trained parameters
    ends: int                   # embedding and lm_head
    L: int
    D: int
    I: int
    A: int
    V: int
    kv: int                     # kv heads x head size
    features: int               # numbers of an image's token: D, with DeepStack more
    patches: int                # an image's token
    a_patch: int                # bytes a patch in the vision tower: rotary in float32, or its MLP
    resolution: Resolution


def read_shape(path: str, dtype: str = "float32") -> Shape:
    """The model is built on the meta device: shapes without memory. Raises what read_config does.

    Without preprocessor_config.json: 4 to 16,384 tokens an image, as Qwen2.5-VL is published."""
    config, b = read_config(path), getattr(torch, dtype).itemsize
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    trained = [size for name, size in sizes.items() if "visual" not in name]
    first, last = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    (V, D), text, vision = last.shape, config.get_text_config(), config.vision_config
    head = getattr(text, "head_dim", None) or D // text.num_attention_heads
    factor = vision.patch_size * vision.spatial_merge_size
    size = {"shortest_edge": 4 * factor ** 2, "longest_edge": 16_384 * factor ** 2}
    if (Path(path) / "preprocessor_config.json").is_file():
        size = Qwen2VLImageProcessorPil.from_pretrained(path).size
    return Shape(
        b=b, n=sum(sizes.values()), m=sum(trained), largest=max(trained),
        ends=V * D if first is last else 2 * V * D, L=text.num_hidden_layers, D=D,
        I=text.intermediate_size, A=head * text.num_attention_heads, V=V,
        kv=head * text.num_key_value_heads,
        features=D * (1 + len(getattr(vision, "deepstack_visual_indexes", ()))),
        patches=vision.spatial_merge_size ** 2,
        a_patch=max(vision.hidden_size * (24 + 5 * b),
                    3 * (vision.intermediate_size + vision.hidden_size) * b),
        resolution=Resolution(factor, size["shortest_edge"], size["longest_edge"]))


@dataclass
class Lengths:
    """The longest lengths, in tokens."""
    image: int
    crop: int
    prompt: int                 # with its image
    observation: int            # a crop or an error, as the agent reads it
    whole: int                  # trajectory


def read_lengths(shape: Shape, config: Config) -> tuple[Lengths, str]:
    """Of the first questions, and a line about the questions. Raises what read_jsonl does."""
    path, area = Path(config.model), shape.resolution.factor ** 2
    stream = iter(world_questions(world_of(config), 0, "train", 0, FIRST))
    if config.data:
        stream = read_jsonl(config.data)
    first = list(islice(stream, FIRST))
    if not first:
        raise DataError(f"{config.data}: holds no questions")
    sizes = [question.open().size for question in first]
    note = " to ".join(f"{w:,} x {h:,}" for w, h in sorted({min(sizes), max(sizes)}))
    if config.data:
        count = len(first) + sum(1 for _ in stream)
        note = f"{count:,} in {config.data}, {count / config.questions:.1f} steps an epoch; {note}"
    agent = path / "agent.json"
    agent = json.loads(agent.read_text(encoding="utf-8")) if agent.is_file() else {}
    coordinates = config.coordinates or usual_coordinates(read_config(path).model_type)
    system = agent.get("system_prompt", system_prompt(coordinates))
    texts = count_tokens(path, [system] + [question.prompt for question in first])
    image = max(math.prod(shape.resolution.size(*size)) for size in sizes) // area
    crop = shape.resolution.crop().max_pixels // area
    prompt, observation = texts[0] + max(texts[1:]) + WRAP + image, max(crop, ERROR) + WRAP
    whole = prompt + config.max_turns * config.max_tokens + (config.max_turns - 1) * observation
    return Lengths(image, crop, prompt, observation, whole), note


def count_tokens(path: Path, texts: list[str]) -> list[int]:
    """Without a tokenizer.json a token is taken for 3 characters, fewer than English has."""
    if not (path / "tokenizer.json").is_file():
        return [math.ceil(len(text) / 3) for text in texts]
    tokenizer = AutoTokenizer.from_pretrained(path)
    return [len(tokenizer.encode(text)) for text in texts]


# ---- bytes ---------------------------------------------------------------------------------------

def cache_bytes(s: Shape, columns: int) -> int:
    """Keys and values of all layers."""
    return 2 * s.L * s.kv * s.b * columns


def layer_bytes(s: Shape, rows: int, new: int, keys: int) -> int:
    """What backward needs of one layer: `new` tokens in each of `rows` rows, which see `keys`."""
    a_token = 2 * s.D * (4 + 2 * s.b) + 4 * s.I * s.b + 2 * s.A * s.b + keys * s.b
    return rows * (new * a_token + keys * 2 * s.A * s.b)


def stored_bytes(s: Shape, rows: int, new: int, keys: int, recompute: bool) -> int:
    """What backward needs of all layers, the embeddings before and the norm after them."""
    inside = rows * new * s.D * s.b if recompute else layer_bytes(s, rows, new, keys)
    return s.L * inside + rows * new * s.D * (4 + 5 * s.b)


def micro_rows(config: Config, lengths: Lengths, trajectories: int) -> int:
    """Trajectories in a micro-batch (batches.micro_batches), if all are as long as they may be."""
    return min(trajectories, max(1, config.micro_tokens // lengths.whole))


def update_bytes(s: Shape, config: Config, lengths: Lengths, ranks: int) -> dict[str, float]:
    """Bytes of a micro-batch whose groups share their prompts (policy.hidden_after)."""
    prompt, trajectories = lengths.prompt, config.questions // ranks * config.group
    rows = micro_rows(config, lengths, trajectories)
    prompts, rest = math.ceil(rows / config.group), lengths.whole - prompt
    # The larger of the two would be enough, but it was 8% below the peak of tests/test_plan.py.
    layer = layer_bytes(s, prompts, prompt, prompt) + layer_bytes(s, rows, rest, lengths.whole)
    sent = max(s.largest, min(BUCKET, s.m))
    return {
        "activations: prompts": stored_bytes(s, prompts, prompt, prompt, config.recompute)
        + cache_bytes(s, prompts * prompt),
        "activations: the rest": stored_bytes(s, rows, rest, lengths.whole, config.recompute)
        + cache_bytes(s, rows * (prompt + lengths.whole)),             # a row copies its prompt's
        "gradients that wait": s.m * s.b,
        "a layer in backward": layer * (1 + config.recompute),
        "logits": 12 * s.V * min(CHUNK, rows * config.max_turns * config.max_tokens),
        "bucket": sent * (4 + (4 / ranks if ranks > 1 else 0)) + 2 * s.b * s.largest}


def rollout_bytes(s: Shape, config: Config, lengths: Lengths, questions: int,
                  group: int) -> dict[str, float]:
    """Bytes of a rollout and its scores. The workspace is that of its largest forward pass: of a
    layer, which takes less than what backward would need of it, or of the vision tower."""
    rows, looks = questions * group, questions * group * (config.max_turns - 1)
    cache, later = cache_bytes(s, rows * lengths.whole), min(rows, looks)
    passes = [max(questions * lengths.image, later * lengths.crop) * s.patches * s.a_patch,
              layer_bytes(s, questions, lengths.prompt, lengths.prompt),
              layer_bytes(s, later, lengths.observation, lengths.whole),
              layer_bytes(s, min(SUMMARY, looks), lengths.observation, lengths.observation),
              24 * s.V * rows]                            # sampler.draw, in float64
    features = (questions * lengths.image + looks * lengths.crop) * s.features * s.b
    return {"image features": features, "KV cache": cache,
            "rollout's workspace": max(passes) + cache / (2 * s.L)}    # torch.cat: a layer's keys


def memory(s: Shape, config: Config, lengths: Lengths, ranks: int) -> dict[str, float]:
    """Bytes a GPU, by what holds them. Rollout, update and evaluation take turns."""
    part = math.ceil(s.m / ranks)
    always = {"policy's weights": s.n * s.b, "frozen base's weights": s.n * s.b,
              "gradient shard": 4 * part, "optimiser shard": 12 * part}
    rollout = rollout_bytes(s, config, lengths, config.questions // ranks, config.group)
    update = update_bytes(s, config, lengths, ranks)
    fixed = sum(always.values())
    peaks = {"peak of rollout": fixed + sum(rollout.values()),
             "peak of update": fixed + sum(update.values()) + rollout["image features"]}
    for pair in (("activations: the rest", "gradients that wait"),     # one shrinks, one grows
                 ("a layer in backward", "logits")):                   # one after the other
        peaks["peak of update"] -= min(update[name] for name in pair)
    if config.test or not config.data:
        trial = min(side_by_side(config, ranks), math.ceil(config.eval_questions / ranks))
        parts = rollout_bytes(s, config, lengths, trial, 1)
        peaks["peak of evaluation"] = fixed + sum(parts.values())
    return always | rollout | update | peaks


# ---- work ----------------------------------------------------------------------------------------

def flops(s: Shape, config: Config, lengths: Lengths) -> dict[str, float]:
    """FLOPs of a step, of all ranks: 2 a weight and token forward, 6 with backward, 8 with
    recomputation (arXiv 2001.08361, sec. 2.1), and 4 A a layer for each pair of query and key.
    Left out: attention inside the vision tower."""
    body, head, pair = 2 * (s.m - s.ends), 2 * s.V * s.D, 4 * s.A * s.L
    n, middle = config.questions * config.group, (lengths.prompt + lengths.whole) / 2
    looks, own = n * (config.max_turns - 1), n * config.max_turns * config.max_tokens
    images = config.questions * lengths.image + looks * lengths.crop
    rest, rows = lengths.whole - lengths.prompt, micro_rows(config, lengths, n)
    prompts = n / rows * math.ceil(rows / config.group)     # a micro-batch computes one for a group
    prompt = lengths.prompt * (body + pair * lengths.prompt)
    update = prompts * prompt + n * rest * (body + pair * lengths.whole)
    return {
        "decode": own * (body + head + pair * middle),
        "prefill": config.questions * prompt + looks * lengths.observation * (body + pair * middle),
        "vision": 2 * (s.n - s.m) * s.patches * images,
        "score": looks * (lengths.observation + WRAP) * body,          # a crop and a label
        "update": config.updates * ((4 if config.recompute else 3) * update + 4 * head * own)}


def seconds(s: Shape, config: Config, lengths: Lengths, ranks: int) -> dict[str, float]:
    """Of a step. Decoding waits for memory, each token reads weights and cache, and for the many
    small kernels of a layer (lib/graph.py)."""
    work = flops(s, config, lengths)
    times = {name: work[name] / ranks / (TFLOPS * 1e12) for name in work}
    rows, middle = config.questions * config.group // ranks, (lengths.prompt + lengths.whole) // 2
    a_token = (s.m * s.b + cache_bytes(s, rows * middle)) / (TERABYTES * 1e12) + s.L * LAYER
    times["decode"] = max(times["decode"], config.max_turns * config.max_tokens * a_token)
    times["vision"] *= TFLOPS / VISION
    return times | {"a step": sum(times.values())}


# ---- what a person reads -------------------------------------------------------------------------

def show(config: Config) -> None:
    config.model = str(newest(config.model))                  # of a run, as train.py takes it
    s = read_shape(config.model, config.dtype)
    lengths, note = read_lengths(s, config)
    rows, group = micro_rows(config, lengths, config.group), config.group
    print(f"computed, not run: {config.model} in {config.dtype}; a step is {config.questions} "
          f"questions x {group} trajectories")
    print(f"weights      {s.n:,}: {s.m:,} in the language model, trained; the rest frozen")
    print(f"questions    {note} pixels")
    print(f"tokens       at most, of the first {FIRST} questions: image {lengths.image:,}, crop "
          f"{lengths.crop:,}, prompt {lengths.prompt:,}, trajectory {lengths.whole:,}")
    print(f"micro-batch  holds {rows} of a group's {group} longest trajectories")
    if rows < group:
        print(f"warning: so their prompt is computed {math.ceil(group / rows)} times; "
              f"--micro_tokens {group * lengths.whole} holds all {group}")
    columns = [ranks for ranks in (1, 2, 4, 8) if config.questions % ranks == 0]
    heads = "".join(f"{ranks:10}" for ranks in columns)
    print(f"\n{'GB a GPU, with GPUs':24}{heads}")
    tables = [memory(s, config, lengths, ranks) for ranks in columns]
    digits = 1 if s.n > 1e8 else 4
    for name in tables[0]:
        print(f"{name:24}" + "".join(f"{t[name] / 1e9:10.{digits}f}" for t in tables))
    print(f"\n{'seconds, with GPUs':24}{heads}     PFLOP")
    work, tables = flops(s, config, lengths), [seconds(s, config, lengths, r) for r in columns]
    work["a step"] = sum(work.values())
    for name in work:
        cells = [t[name] for t in tables] + [work[name] / 1e15]
        print(f"{name:24}" + "".join(f"{rounded(cell):>10}" for cell in cells))
    print(f"at {TFLOPS:g} TFLOP/s and {TERABYTES:g} TB/s a GPU, fitted to an H200; Python, new "
          "lengths, pictures,\ncommunication and evaluation come on top")


def rounded(x: float) -> str:
    return f"{x:.3g}" if x < 1000 else f"{x:,.0f}"


if __name__ == "__main__":
    try:
        show(parse_config())
    except (DataError, OSError, ValueError) as error:
        sys.exit(f"plan.py: {error}")
