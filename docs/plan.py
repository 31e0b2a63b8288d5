"""What a run will cost, before it runs: memory of each GPU and work of each step, from config.json alone.

What it teaches: where 80 GB go. n weights, m of them trained, b bytes a weight (bf16 2, float32 4), N ranks:

    weights       2 n b: the policy, and the frozen base that scores it; train.py loads the model twice
    optimiser     16 m / N: float32 gradient 4, master 4, Adam's moments 8 (ZeRO-2, shard.py)
    bucket        the largest bucket of gradients on its way, 4 + 4 / N a weight, and 2 b of the largest weight as backward leaves it
    KV cache      2 layers x kv heads x head size x b a token, x conversations x longest conversation; twice, because
                  Session.keep copies the rows that go on
    activations   what backward needs of a layer, a token: transformers' layer counted as Korthikanti et al. do (arXiv 2205.05198,
                  sec. 4.1). D hidden, I MLP, A = heads x head size, K keys that the token may see:
                      2 D (4 + 2 b)   two RMSNorms: input in float32, normalised, output
                      4 I b           SwiGLU: gate, silu(gate), up, their product
                      2 A b           query and output of attention; as much again for each *key*, repeated to all heads
                      K b             the mask, which each layer turns from booleans into numbers
                  --recompute stores D b instead. Backward then needs a layer's gradients, with --recompute also that layer again.
                  --train_vision adds the vision tower's layers, a patch: 2 D (4 + 2 b) + 5 D b + 4 I b
    logits        12 x vocabulary x min(512, own tokens): logits, their exp and what logsumexp needs in policy.TokenLogprobs; they
                  are gone before backward reaches a layer, so the larger of the two counts

All are upper bounds: each trajectory takes all its turns, each turn all its tokens. Not counted: CUDA's context (1 GB), the
allocator's fragments, the kernels' workspace.

Run it:  python train.py --plan                # with any other options: prints this for them, and stops
"""
import json
import math
import os
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from lib.data import read_jsonl
from tiny.world import World, world_questions
from lib.policy import read_config
from tools import Resolution, system_prompt

TFLOPS, TERABYTES = 100., 1.                            # assumed, sustained, a GPU: a third of an A100's bf16 peak, half of its bandwidth
CHUNK, SPARE, BUCKET, SUMMARY, TRIAL = 512, 64, 2**25, 256, 64    # policy.logprobs, .Spare, shard.ShardedAdamW, policy.embed, eval.evaluate
WRAP, FIRST = 32, 32                                    # tokens of ChatML and tool tags around a text or an image; rows of --data looked at


def read_model(path: str, dtype: str = "float32", train_vision: bool = False) -> SimpleNamespace:
    """The numbers that the arithmetic needs. The model is built on the meta device: shapes without memory."""
    config = read_config(path)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    sizes = {name: p.numel() for name, p in model.named_parameters()}                           # tied weights once
    language = sum(n for name, n in sizes.items() if "visual" not in name)
    trained = [n for name, n in sizes.items() if train_vision or "visual" not in name]          # as Policy.learners
    ends = {id(e.weight): e.weight.numel() for e in (model.get_input_embeddings(), model.get_output_embeddings())}
    text, vision, processor = config.get_text_config(), config.vision_config, Qwen2VLImageProcessorPil.from_pretrained(path)
    (vocabulary, hidden), heads = model.get_output_embeddings().weight.shape, text.num_attention_heads
    head_size = getattr(text, "head_dim", None) or hidden // heads
    return SimpleNamespace(
        path=Path(path), b=getattr(torch, dtype).itemsize, all=sum(sizes.values()), trained=sum(trained), largest=max(trained),
        language=language, vision=sum(sizes.values()) - language, train_vision=train_vision, ends=sum(ends.values()), layers=text.num_hidden_layers, hidden=hidden,
        inner=text.intermediate_size, vocabulary=vocabulary, attention=heads * head_size, kv=text.num_key_value_heads * head_size,
        features=hidden * (1 + len(getattr(vision, "deepstack_visual_indexes", ()))), patches=processor.merge_size ** 2,  # a token
        vision_hidden=vision.hidden_size, vision_inner=vision.intermediate_size, vision_layers=vision.depth,
        patch=3 * vision.temporal_patch_size * processor.patch_size ** 2, resolution=Resolution(
            processor.patch_size * processor.merge_size, processor.size["shortest_edge"], processor.size["longest_edge"]))


def read_questions(m: SimpleNamespace, config) -> SimpleNamespace:
    """How many questions there are, and the longest lengths in tokens: image, crop, prompt, observation, whole conversation."""
    file = read_jsonl(config.data) if config.data else iter(world_questions(World(options=config.options), 0, "train", 0, FIRST))
    rows = [q for _, q in zip(range(FIRST), file)]
    if not rows:
        raise ValueError(f"{config.data}: holds no questions")
    sizes, note, tokenizer = [q.open().size for q in rows], m.path / "agent.json", m.path / "tokenizer.json"
    tokens = lambda resolution: max(math.prod(resolution.size(*size)) for size in sizes) // m.resolution.factor ** 2
    encode = AutoTokenizer.from_pretrained(m.path).encode if tokenizer.is_file() else lambda text: text[::3]  # 3 characters a token, or more
    agent = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else {}
    system = agent.get("system_prompt", system_prompt(config.coordinates or "pixels"))
    image, crop = tokens(m.resolution), tokens(m.resolution.crop())
    prompt = len(encode(system)) + max(len(encode(q.prompt)) for q in rows) + WRAP + image
    return SimpleNamespace(
        count=config.data and len(rows) + sum(1 for _ in file), sizes=(min(sizes), max(sizes)), exact=tokenizer.is_file(), image=image, crop=crop,
        prompt=prompt, observation=crop + WRAP, total=prompt + config.max_turns * config.max_tokens + (config.max_turns - 1) * (crop + WRAP))


# ---- bytes -----------------------------------------------------------------------------------------------------------

def cache_bytes(m: SimpleNamespace, rows: int, columns: int) -> int:
    """Keys and values. policy.Spare allocates up to 64 columns more."""
    return 2 * m.layers * m.kv * m.b * rows * columns


def activation_bytes(m: SimpleNamespace, rows: int, group: int, prompt: int, total: int, recompute: bool = False) -> tuple[int, int]:
    """Of a micro-batch of `rows` trajectories, whose groups share their prompts (policy.hidden_after): stored, and of the layer in backward."""
    def saved(sequences: int, tokens: int, keys: int) -> int:                                                # by one layer
        a_token = 2 * m.hidden * (4 + 2 * m.b) + 4 * m.inner * m.b + 2 * m.attention * m.b + keys * m.b
        return sequences * (tokens * a_token + keys * 2 * m.attention * m.b)

    prompts = math.ceil(rows / group)
    layer = saved(prompts, prompt, prompt) + saved(rows, total - prompt, total)
    tokens = prompts * prompt + rows * (total - prompt)
    caches = cache_bytes(m, 1, prompts * prompt + rows * prompt + rows * total)                             # policy.Repeatable and its `past`
    outside = tokens * m.hidden * (4 + 5 * m.b)                                                             # embeddings, last norm, own states
    return m.layers * (tokens * m.hidden * m.b if recompute else layer) + caches + outside, layer * (1 + recompute)


def vision_bytes(m: SimpleNamespace, patches: int, recompute: bool = False) -> tuple[int, int]:
    """Of the vision tower, where it learns: stored for backward, and of the layer in backward."""
    layer = patches * (m.vision_hidden * (8 + 9 * m.b) + 4 * m.vision_inner * m.b)
    outside = patches * (m.patch * m.b + 3 * m.vision_hidden * (4 + 4 * m.b))                                # patches, embedding, merger
    return m.vision_layers * (patches * m.vision_hidden * m.b if recompute else layer) + outside, layer * (1 + recompute)


def generating(m: SimpleNamespace, c, t: SimpleNamespace, questions: int, group: int) -> dict[str, float]:
    """Bytes of a rollout and its scores; the workspace is that of the largest of their forward passes."""
    rows, looks = questions * group, questions * group * (c.max_turns - 1)
    a_token = 3 * m.inner * m.b + 4 * m.hidden * m.b                            # silu(gate), up, product; residual, norm, input ..
    a_patch = max(m.vision_hidden * (24 + 5 * m.b), 3 * (m.vision_inner + m.vision_hidden) * m.b)           # rotary in float32, or the MLP
    forward = lambda n, new, keys: n * (new * (a_token + keys * (1 + m.b)) + keys * 2 * m.attention * m.b)
    return {"KV cache": cache_bytes(m, rows, t.total + SPARE), "KV cache's copy": cache_bytes(m, rows, t.total + SPARE),
            "rollout's workspace": max(
                m.patches * a_patch * max(questions * t.image, rows * t.crop * (looks > 0)),                # vision tower, all at once
                forward(questions, t.prompt, t.prompt), forward(rows, t.observation, t.total) * (looks > 0),
                forward(min(SUMMARY, looks), t.observation, t.observation),                                 # semantic score
                24 * m.vocabulary * rows)}                                                                  # policy.draw, in float64


def memory(m: SimpleNamespace, c, t: SimpleNamespace, ranks: int) -> dict[str, float]:
    """Bytes a GPU, by what holds them. Rollout, update and evaluation come one after the other."""
    questions, shard = c.questions // ranks, math.ceil(m.trained / ranks)
    rows = min(questions * c.group, max(1, c.micro_tokens // t.total))                                      # train.micro_batches
    trial = min(TRIAL, math.ceil(c.eval_questions / ranks)) if c.test or not c.data else 0
    always = {"policy's weights": m.all * m.b, "frozen base's weights": m.all * m.b, "gradient shard": 4 * shard, "optimiser shard": 12 * shard}
    images = lambda prompts, rows: prompts * t.image + rows * (c.max_turns - 1) * t.crop                    # their tokens
    rollout = {"image features": images(questions, questions * c.group) * m.features * m.b}
    stored, layer = activation_bytes(m, rows, c.group, t.prompt, t.total, c.recompute)
    if m.train_vision:
        more, one = vision_bytes(m, images(math.ceil(rows / c.group), rows) * m.patches, c.recompute)
        stored, layer = stored + more, max(layer, one)
    update = rollout | {"activations": stored, "a layer in backward": layer,
                        "logits": 12 * m.vocabulary * min(CHUNK, rows * c.max_turns * c.max_tokens),
                        "bucket": max(m.largest, min(BUCKET, m.trained)) * (4 + 4 / ranks * (ranks > 1)) + 2 * m.b * m.largest}
    rollout |= generating(m, c, t, questions, c.group)
    phases = {"rollout": rollout, "update": update, "evaluation": generating(m, c, t, trial, 1) if trial else {}}
    peaks = {f"peak of {name}": sum((always | parts).values()) for name, parts in phases.items() if parts}
    peaks["peak of update"] -= min(layer, update["logits"])
    return always | rollout | update | peaks


# ---- work ------------------------------------------------------------------------------------------------------------

def flops(m: SimpleNamespace, c, t: SimpleNamespace, ranks: int) -> dict[str, float]:
    """FLOPs of a step, all ranks together: 2 a weight and token forward, 6 with backward, 8 with recomputation (arXiv 2001.08361,
    sec. 2.1), and 4 A a layer for each pair of query and key. Left out: attention inside the vision tower."""
    body, head, pair = m.language - m.ends, m.vocabulary * m.hidden, 4 * m.attention * m.layers
    n, middle, times = c.questions * c.group, (t.prompt + t.total) / 2, 4 if c.recompute else 3
    looks, own, rows = n * (c.max_turns - 1), n * c.max_turns * c.max_tokens, min(n // ranks, max(1, c.micro_tokens // t.total))
    prompts, rest = n / rows * math.ceil(rows / c.group), t.total - t.prompt                                # a micro-batch shares a prompt
    return {"decode": own * (2 * (body + head) + pair * middle),
            "prefill": c.questions * t.prompt * (2 * body + pair * t.prompt) + looks * t.observation * (2 * body + pair * middle),
            "vision": 2 * m.vision * m.patches * (c.questions * t.image + looks * t.crop * (1 + m.train_vision)
                                                  + times * c.updates * m.train_vision * (prompts * t.image + looks * t.crop)),
            "score": 2 * body * looks * (t.observation + WRAP),                                             # a crop and a label
            "update": c.updates * (times * (2 * body * (prompts * t.prompt + n * rest) + pair * (
                prompts * t.prompt ** 2 + n * rest * t.total)) + 8 * head * own)}


def show(c) -> None:
    """Print the plan of a train.Config; of torchrun's ranks only the first does. Raises what Policy and read_jsonl raise."""
    if int(os.environ.get("RANK", 0)):
        return
    m, world = read_model(c.model, c.dtype, c.train_vision), int(os.environ.get("WORLD_SIZE", 1))
    t = read_questions(m, c)
    if c.questions % world:
        raise ValueError(f"--questions: expected a multiple of {world} ranks, found {c.questions}")
    print(f"""computed, not run: {c.model} in {c.dtype}, {c.questions} questions x {c.group} trajectories a step, up to {c.max_turns} turns of {c.max_tokens} tokens
parameters  {m.all:,}: language model {m.language:,}, trained, with embedding and lm_head of {m.ends:,}; vision tower {m.vision:,}, {"trained" if m.train_vision else "frozen"}
questions   {f"{t.count:,} in {c.data}, {t.count / c.questions:.1f} steps an epoch" if c.data else "the embedded world, endless"}; first images {t.sizes[0]} to {t.sizes[1]}
tokens      image {t.image}, crop {t.crop}, prompt {t.prompt}{"" if t.exact else " (no tokenizer.json: 3 characters a token)"}, conversation {t.total}, all at most
micro-batch {max(1, c.micro_tokens // t.total)} trajectories (--micro_tokens {c.micro_tokens})
""")
    columns = [n for n in sorted({1, 2, 4, 8, world}) if c.questions % n == 0]
    table = [memory(m, c, t, n) for n in columns]
    print(f"{'GB a GPU, computed, not run':30}" + "".join(f"{f'{n} rank' + 's' * (n > 1) + '*' * (n == world):>10}" for n in columns))
    for name in table[0]:
        print(f"{name:30}" + "".join(f"{column[name] / 1e9:10.{1 if m.all > 1e8 else 4}f}" for column in table))
    work = flops(m, c, t, world)
    seconds = {name: x / world / (TFLOPS * 1e12) for name, x in work.items()}
    reads = m.language * m.b + cache_bytes(m, c.questions * c.group // world, (t.prompt + t.total) // 2)    # for each token of a turn
    seconds["decode"] = max(seconds["decode"], c.max_turns * c.max_tokens * reads / (TERABYTES * 1e12))
    work["all"], seconds["all"] = sum(work.values()), sum(seconds.values())
    print(f"* WORLD_SIZE\n\n{'a step, computed, not run':30}{'PFLOP':>10}{'seconds':>10}")
    for name in work:
        print(f"{name:30}{work[name] / 1e15:10.3g}{seconds[name]:10.3g}")
    print(f"""{c.steps} steps: {seconds["all"] * c.steps / 3600:.2g} hours on {world} GPU(s), at an assumed, not measured, {TFLOPS:g} TFLOP/s, and {TERABYTES:g} TB/s where decoding waits for
memory. Python, kernel launches, pictures, communication, evaluations and dynamic sampling's further draws come on top.""")


if __name__ == "__main__":
    from train import parse_config
    show(parse_config())
