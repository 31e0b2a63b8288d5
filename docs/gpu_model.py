"""A part of docs/gpu.py: a random Qwen2.5-VL-3B through all phases of a step, measured.

What it teaches: what a real model's step costs on one GPU, phase by phase, beside what docs/plan.py
computed before. The configuration is the published one; the weights are random, so nothing is
downloaded. The tokenizer is that of tiny/: of 151,936 words only 542 have letters, but the model
chooses among all, scores and trains all.

A random model neither ends a turn nor looks. So its turns are *forced*: each has all its tokens,
and each but the last looks. The plan, an upper bound, assumes the same.

Run it:  python docs/gpu.py
"""
import dataclasses
import gc
import json
import random
import resource
import shutil
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import plan                                     # first: it finds the project
import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer, Qwen2_5_VLConfig

import mapo
import rollout
from lib import checkpoint
from lib.batches import spread
from lib.graph import GraphSession
from lib.policy import Policy
from lib.sampler import Session
from lib.shard import ShardedAdamW
from reward import Scorer, score_looks
from tiny.world import World, world_questions
from tools import ZOOM, Call, run_tool
from train import Batch, Config, accumulate, take_step, to_batch

MAPO, DICE = mapo.ALGORITHMS["mapo"], random.Random(0)
SHORT = 32                                      # tokens, to compare both ways of sampling

# config.json of Qwen/Qwen2.5-VL-3B-Instruct, but for the ids of special tokens.
TEXT = dict(vocab_size=151_936, hidden_size=2048, num_hidden_layers=36, num_attention_heads=16,
            num_key_value_heads=2, intermediate_size=11008, max_position_embeddings=128_000,
            rms_norm_eps=1e-6, initializer_range=.02, bos_token_id=None,
            rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[16, 24, 24]))
VISION = dict(depth=32, hidden_size=1280, num_heads=16, intermediate_size=3420, patch_size=14,
              out_hidden_size=2048, spatial_merge_size=2, temporal_patch_size=2, window_size=112,
              fullatt_block_indexes=[7, 15, 23, 31], tokens_per_second=2)
SMALL_TEXT = TEXT | dict(vocab_size=1024, hidden_size=64, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=1, intermediate_size=128,
                         rope_parameters=TEXT["rope_parameters"] | {"mrope_section": [4, 6, 6]})
SMALL_VISION = VISION | dict(depth=2, hidden_size=32, num_heads=2, intermediate_size=64,
                             out_hidden_size=64, fullatt_block_indexes=[1])


# ---- a run, as far as train.take_step needs one; docs/gpu.py uses it too -------------------------

def begin(path: Path | str, config: Config, folder: Path) -> SimpleNamespace:
    policy = Policy(path, config.device, getattr(torch, config.dtype))
    generator = torch.Generator(policy.device)
    generator.manual_seed(0)
    return SimpleNamespace(config=config, policy=policy, out=folder, critic=None, diverged=0,
                           generator=generator, optimiser=ShardedAdamW(policy.freeze_vision()))


def resume(config: Config, folder: Path) -> SimpleNamespace:
    saved = checkpoint.newest(folder)
    run = begin(saved, config, folder)
    checkpoint.load(saved, [run.optimiser], run.generator)
    return run


def bits(run: SimpleNamespace) -> list[int]:
    """For each tensor that a resumed run needs: its bits, read as integers and added."""
    tensors = [run.generator.get_state()]
    for b in run.optimiser.buckets:
        tensors += [*b.parameters, b.master, b.mean, b.square]
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
    return [t.detach().view(kinds[t.element_size()]).sum().item() for t in tensors]


def unequal(ours: list, others: list) -> int:
    return sum(a != b for a, b in zip(ours, others, strict=True))


def learnable(trajectories: list[rollout.Trajectory]) -> Batch:
    """With advantages from -1 to 1: each trajectory is learnt from."""
    advantage = spread(torch.linspace(-1, 1, len(trajectories)), trajectories)
    return to_batch(trajectories, advantage, MAPO)


# ---- the model -----------------------------------------------------------------------------------

def build(folder: Path, device: str, small: bool) -> None:
    """The model directory. A GPU draws 3.8 billion weights in seconds."""
    tokenizer = AutoTokenizer.from_pretrained("tiny")
    words = {"image_token_id": "image_pad", "video_token_id": "video_pad",
             "vision_start_token_id": "vision_start", "vision_end_token_id": "vision_end"}
    ids = {key: tokenizer.convert_tokens_to_ids(f"<|{word}|>") for key, word in words.items()}
    text = (SMALL_TEXT if small else TEXT) | {"eos_token_id": tokenizer.eos_token_id}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=SMALL_VISION if small else VISION,
                              tie_word_embeddings=True, **ids)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(f"tiny/{name}", folder)
    tokens = 36 if small else 1280                      # of an image, at most: docs/larger.md
    sizes = {"min_pixels": 4 * 28**2, "max_pixels": tokens * 28**2}
    (folder / "preprocessor_config.json").write_text(json.dumps(sizes))


def force(policy: Policy) -> None:
    """From here on no turn of this policy ends early, and each but the last looks."""
    ends = policy.tokenizer.convert_tokens_to_ids(["</tool_call>", "</answer>"])
    ends = torch.tensor([*policy.end_ids, *ends], device=policy.device)
    policy.banned = torch.cat([policy.banned, ends])
    rollout.act = look_there


def look_there(policy: Policy, trajectory, turn, image, last: bool) -> None:
    """In place of rollout.act: a look at two thirds of the picture's sides, somewhere."""
    if last:
        trajectory.end = "max_turns"
        return
    width, height = trajectory.space
    x, y = DICE.uniform(0, width / 3), DICE.uniform(0, height / 3)
    box = (x, y, x + width * 2 / 3, y + height * 2 / 3)
    label = f"the {DICE.choice(list(trajectory.question.objects))}"
    turn.call = Call(ZOOM, label, {"bbox_2d": box})
    turn.crop, turn.box = run_tool(image, turn.call, trajectory.space, policy.resolution)


# ---- the phases ----------------------------------------------------------------------------------

def planned(config: Config) -> dict[str, tuple]:
    """By docs/plan.py, of each phase: seconds, FLOPs, the peak in GB of 10^9 bytes."""
    shape = plan.read_shape(config.model, config.dtype)
    lengths, _ = plan.read_lengths(shape, config)
    seconds, work = plan.seconds(shape, config, lengths, 1), plan.flops(shape, config, lengths)
    memory = plan.memory(shape, config, lengths, 1)
    fixed = [memory[name] for name in ("policy's weights", "frozen base's weights",
                                       "gradient shard", "optimiser shard")]

    def of(names: tuple, peak: float, share: int = 1) -> tuple:
        return (sum(seconds[name] for name in names) / share,
                sum(work[name] for name in names) / share, peak / 1e9)

    return {"load": (None, None, sum(fixed) / 1e9),
            "rollout": of(("decode", "prefill", "vision"), memory["peak of rollout"]),
            "score": of(("score",), memory["peak of rollout"]),
            "update": of(("update",), memory["peak of update"], config.updates)}


@contextmanager
def measured(write, device: str, row: str, computed: tuple = (None, None, None)):
    """Write seconds and peak memory of what happens inside, beside what was planned."""
    record, cuda = {}, device == "cuda"
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    yield record
    if cuda:
        torch.cuda.synchronize()
    seconds, tokens = time.perf_counter() - began, record.pop("tokens", None)
    planned_seconds, flops, planned_peak = computed
    write({"row": row, "s": seconds, "planned s": planned_seconds,
           "tokens/s": tokens and tokens / seconds,
           "TFLOP/s": flops and flops / seconds / 1e12,
           "peak GB": torch.cuda.max_memory_allocated() / 1e9 if cuda else None,
           "planned GB": planned_peak,
           "reserved GB": torch.cuda.max_memory_reserved() / 1e9 if cuda else None,
           "host GB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, **record})


def random_model(write, config: Config, small: bool, folder: Path) -> None:
    config = dataclasses.replace(config, model=str(folder / "start"), questions=2,
                                 group=2 if small else 8, max_tokens=8 if small else 256,
                                 micro_tokens=17_000, lr=1e-6, recompute=True)
    questions = world_questions(World(), 0, "train", 0, config.questions)
    phase = partial(measured, write, config.device)
    with phase("build"):
        build(folder / "start", config.device, small)
    gc.collect()
    computed = planned(config)
    with phase("load", computed["load"]):
        base = Policy(config.model, config.device, getattr(torch, config.dtype))
        scorer, run = Scorer(base, questions), begin(config.model, config, folder)
    run.policy.recompute_layers()
    force(run.policy)
    shutil.rmtree(folder / "start")             # the disk must hold the checkpoint, too
    for number in (1, 2):                       # the first one also waits for libraries
        with phase(f"rollout {number}", computed["rollout"]) as record:
            trajectories = rollout.collect(run.policy, questions, config.group, config.max_turns,
                                           config.max_tokens, 1., run.generator)
            record["tokens"] = sum(sum(t.mask) for t in trajectories)
    prompts = [t.prompt for t in trajectories[::config.group]]
    for name, kind in (("kernel by kernel", Session), ("as a graph", GraphSession)):
        kind(run.policy, prompts, config.group).sample(SHORT)        # cuDNN meets its lengths
        session = kind(run.policy, prompts, config.group)
        with phase(f"{SHORT} tokens a row, {name}") as record:
            session.sample(SHORT)
            record["tokens"] = SHORT * len(trajectories)
    del session
    with phase("score", computed["score"]) as record:
        score_looks(trajectories, scorer)
        crops = [turn.crop_tokens for t in trajectories for turn in t.looks]
        record["tokens"] = sum(len(crop.ids) for crop in crops)
    batch = learnable(trajectories)
    for number in range(1, config.updates + 1):
        with phase(f"update {number}", computed["update"]) as record:
            totals = accumulate(run.policy, run.optimiser, batch, MAPO, config)
            stats = take_step(run, batch, totals, number)
            record["tokens"] = sum(len(t.mask) for t in trajectories)
            record["note"] = f"logp_gap {stats['logp_gap']:.2g}"
    with phase("checkpoint"):
        checkpoint.save(folder, 1, run.policy, [run.optimiser], run.generator, {})
    before = bits(run)
    del run
    gc.collect()                                # hooks and wrapped layers are circles
    with phase("resume"):
        run = resume(config, folder)
    with phase("compare") as record:
        record["note"] = f"{unequal(before, bits(run))} tensors unequal"
