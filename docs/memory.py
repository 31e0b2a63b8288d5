"""What a training step's peak memory depends on: measured, each row in a fresh process.

What it teaches: memory is a matter of one micro-batch, not of the batch. A random Qwen3-VL takes
one step (accumulate, clip, AdamW) on made-up trajectories, eight to a prompt. "peak" is the
process's largest resident memory above what it had when model, optimiser and trajectories were
loaded.

Run it:  python docs/memory.py             # 2.5 minutes, Linux; writes docs/memory.md
"""
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from transformers import AutoTokenizer, Qwen3VLConfig, Qwen3VLForConditionalGeneration

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import mapo
from lib import shard
from lib.policy import Policy, Tokens
from rollout import Trajectory
from train import Config, accumulate, to_batch

LENGTH, OWN, PROMPT, GROUP = 512, 64, 64, 8     # tokens: whole, the agent's at the end, the prompt
ROWS = [    # ranks, trajectories a rank, --micro_tokens, --recompute
    (1, 8, 2048, False), (1, 16, 2048, False), (1, 32, 2048, False), (1, 32, 4096, False),
    (1, 32, 8192, False), (1, 32, 2048, True), (1, 32, 8192, True), (2, 8, 2048, False)]


def build(folder: Path) -> None:
    """A model directory: random weights, 32,000 words, the rest of tiny/'s."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny")
    rope = dict(rope_type="default", rope_theta=1e4, mrope_section=[6, 5, 5],
                mrope_interleaved=True)
    text = dict(vocab_size=32_000, hidden_size=256, num_hidden_layers=6, num_attention_heads=8,
                num_key_value_heads=2, head_dim=32, intermediate_size=1024, rope_parameters=rope)
    vision = dict(depth=1, hidden_size=32, num_heads=2, intermediate_size=64, out_hidden_size=256,
                  patch_size=16, num_position_embeddings=64, deepstack_visual_indexes=[0])
    names = {"image_token_id": "image_pad", "video_token_id": "video_pad",
             "vision_start_token_id": "vision_start", "vision_end_token_id": "vision_end"}
    ids = {key: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for key, name in names.items()}
    torch.manual_seed(0)
    config = Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **ids)
    Qwen3VLForConditionalGeneration(config).save_pretrained(folder)
    for file in (ROOT / "tiny").iterdir():
        if file.name.startswith(("tokenizer", "chat", "preprocessor")):
            (folder / file.name).write_bytes(file.read_bytes())


def status_mb(field: str) -> float:
    """VmRSS, the resident memory of this process now, or VmHWM, its largest until now."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 2**10 for line in lines if line.startswith(field))


def made_up(count: int, generator: torch.Generator) -> list[Trajectory]:
    trajectories = []
    for i in range(count):
        if i % GROUP == 0:
            ids = torch.randint(10, 500, (PROMPT,), generator=generator)
            prompt = Tokens(ids.tolist())
        rest = torch.randint(10, 500, (LENGTH - PROMPT,), generator=generator).tolist()
        mask = [False] * (LENGTH - OWN) + [True] * OWN
        trajectories.append(Trajectory(None, prompt, prompt + Tokens(rest), mask, [-10.] * LENGTH,
                                       (1, 1), (1, 1)))
    return trajectories


def step(folder: str, trajectories: int, micro_tokens: int, recompute: bool, out: str) -> None:
    """One rank's step. Writes its numbers to `out`-rank."""
    shard.setup(timeout=120)
    policy, row = Policy(folder), mapo.ALGORITHMS["grpo"]
    parameters = policy.freeze_vision()
    if recompute:
        policy.recompute_layers()
    optimiser = shard.ShardedAdamW(parameters)
    generator = torch.Generator().manual_seed(shard.rank())
    advantage = torch.linspace(-1, 1, trajectories)[:, None].expand(-1, LENGTH - 1)
    batch = to_batch(made_up(trajectories, generator), advantage, row)
    gc.collect()
    loaded, before = status_mb("VmRSS"), status_mb("VmHWM")
    totals = accumulate(policy, optimiser, batch, row, Config(micro_tokens=micro_tokens))
    optimiser.clip(1.)
    optimiser.step(1e-4)
    peak = status_mb("VmHWM")
    if peak <= before:
        raise RuntimeError(f"loading took more than the step ({before:.0f} MB): nothing measured")
    Path(f"{out}-{shard.rank()}").write_text(json.dumps({
        "loaded": loaded, "peak": peak - loaded, "optimiser": optimiser.bytes() / 2**20,
        "micro": totals["micro_batches"], "parameters": sum(p.numel() for p in parameters)}))
    shard.cleanup()


def measure(folder: str, number: int) -> dict[str, float]:
    """A row of the table: the larger number of its ranks."""
    ranks, trajectories, micro, recompute = ROWS[number]
    out = f"{folder}/row-{number}"
    command = [sys.executable, __file__, "step", f"{folder}/model", str(trajectories), str(micro),
               str(int(recompute)), out]
    if ranks > 1:
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
                        str(ranks), "--"]
    # Freed memory goes back to the system at once: else the peak is that of malloc's habits.
    settings = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536",
                "MALLOC_TRIM_THRESHOLD_": "65536"}
    subprocess.run(command, check=True, env=os.environ | settings)
    ends = [json.loads(Path(f"{out}-{rank}").read_text()) for rank in range(ranks)]
    return {key: max(end[key] for end in ends) for key in ends[0]}


HEAD = """# What a step's memory depends on

`python docs/memory.py` made this page on {system}, torch {torch}, transformers {transformers}:
float32, one thread a process. A random Qwen3-VL of {millions:.1f} million trained parameters takes
one step on made-up trajectories of {length} tokens, {group} to a prompt of {prompt}; the last {own}
are the agent's. *Loaded*: resident memory with Python, model, optimiser and trajectories.
*Peak*: the largest resident memory above it. Of two ranks the larger number stands.

| | ranks | trajectories a rank | `--micro_tokens` | micro-batches | `--recompute` | loaded, MB \
| peak, MB | optimiser's shard a rank, MB |
|---|---|---|---|---|---|---|---|---|
"""
TAIL = """
- **The number of micro-batches costs nothing**: rows 1 to 3. Gradients are added where they are.
- **The size of a micro-batch is what counts**: rows 3 to 5.
- **`--recompute`** saves nearly half of the peak with small micro-batches (row 6 against 3), and
  more than half with large ones (row 7 against 5). What is left is mostly one layer, logits and
  gradients.
- **Ranks share the optimiser**: row 8 against 1.
"""


def page(results: list[dict[str, float]]) -> str:
    text = HEAD.format(system=f"{platform.machine()}, {platform.system()}", length=LENGTH, own=OWN,
                       torch=torch.__version__, transformers=transformers.__version__, group=GROUP,
                       prompt=PROMPT, millions=results[0]["parameters"] / 1e6)
    for i, (row, r) in enumerate(zip(ROWS, results)):
        ranks, trajectories, micro_tokens, recompute = row
        cells = [i + 1, ranks, trajectories, micro_tokens, round(r["micro"]),
                 "yes" if recompute else "no", round(r["loaded"]), round(r["peak"]),
                 round(r["optimiser"])]
        text += f"| {' | '.join(map(str, cells))} |\n"
    return text + TAIL


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder) / "model")
        results = []
        for number, row in enumerate(ROWS):
            results.append(measure(folder, number))
            print(row, {key: round(value) for key, value in results[-1].items()}, flush=True)
    (ROOT / "docs/memory.md").write_text(page(results), encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["step"]:
        step(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5] == "1", sys.argv[6])
    else:
        main()
