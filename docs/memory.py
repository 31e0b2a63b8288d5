"""What a training step's peak memory depends on: measured, each row in a fresh process.

A random Qwen3-VL of hidden size 256, 6 layers and 32,000 words takes one step (accumulate, clip, AdamW: train.py) on synthetic
trajectories of 512 tokens, eight to a prompt. "peak" is the process's largest resident memory (ru_maxrss) above what it had when model,
optimiser and trajectories were loaded; the optimiser's shard is its own count of its bytes.

Run it:  python docs/memory.py             # about 2.5 minutes; writes docs/memory.md
"""
import gc
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
LENGTH, OWN, PROMPT = 512, 64, 64  # tokens of a trajectory, of them the agent's (the last ones), and of the shared prompt
ROWS = [  # ranks, trajectories a rank, --micro_tokens, --recompute
    (1, 8, 2048, False), (1, 16, 2048, False), (1, 32, 2048, False),
    (1, 32, 4096, False), (1, 32, 8192, False),
    (1, 32, 2048, True), (1, 32, 8192, True),
    (2, 8, 2048, False)]


def build(folder: Path) -> None:
    """A model directory with random weights and tiny/'s tokenizer."""
    import torch
    from transformers import AutoTokenizer, Qwen3VLConfig, Qwen3VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny")
    token = tokenizer.convert_tokens_to_ids
    torch.manual_seed(0)
    config = Qwen3VLConfig(
        text_config=dict(vocab_size=32_000, hidden_size=256, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=2, head_dim=32,
                         intermediate_size=1024, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [6, 5, 5],
                                                                  "mrope_interleaved": True}),
        vision_config=dict(depth=1, hidden_size=32, num_heads=2, intermediate_size=64, out_hidden_size=256, patch_size=16,
                           num_position_embeddings=64, deepstack_visual_indexes=[0]),
        image_token_id=token("<|image_pad|>"), video_token_id=token("<|video_pad|>"), vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"), tie_word_embeddings=True)
    Qwen3VLForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil(patch_size=16, temporal_patch_size=2, merge_size=2,
                             size={"shortest_edge": 64**2, "longest_edge": 128**2}).save_pretrained(folder)


def resident() -> float:
    """MB of this process now (Linux; elsewhere its peak until now)."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return peak()
    return int(next(line for line in status.read_text().splitlines() if line.startswith("VmRSS")).split()[1]) / 2**10


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def step(folder: str, trajectories: int, micro_tokens: int, recompute: bool, out: str) -> None:
    """One rank's step. Writes its numbers to `out`-rank."""
    import torch
    import mapo
    from lib import shard
    from lib.policy import Policy, Tokens
    from rollout import Trajectory
    from train import Config, accumulate
    shard.setup(timeout=120)
    policy = Policy(folder)
    parameters = policy.learners()
    if recompute:
        policy.recompute_layers()
    generator = torch.Generator().manual_seed(shard.rank())
    batch = []
    for _ in range(trajectories // 8):
        prompt = Tokens(torch.randint(10, 500, (PROMPT,), generator=generator).tolist())
        for _ in range(8):
            rest = torch.randint(10, 500, (LENGTH - PROMPT,), generator=generator).tolist()
            batch.append(Trajectory(None, prompt, prompt + Tokens(rest), [False] * (LENGTH - OWN) + [True] * OWN, [-10.] * LENGTH, (1, 1), (1, 1)))
    advantage = torch.linspace(-1, 1, trajectories)[:, None].expand(-1, LENGTH - 1)
    optimiser = shard.ShardedAdamW(parameters)
    gc.collect()
    loaded, before = resident(), peak()
    stats = accumulate(policy, [optimiser], batch, advantage, Config(micro_tokens=micro_tokens), mapo.ALGORITHMS["mapo"])
    optimiser.clip(1.)
    optimiser.step(1e-4)
    if peak() <= before:
        raise RuntimeError(f"loading took more than the step ({before:.0f} MB): nothing was measured")
    Path(f"{out}-{shard.rank()}").write_text(json.dumps(
        {"loaded": loaded, "peak": peak() - loaded, "optimiser": optimiser.bytes() / 2**20, "micro": stats["micro_batches"],
         "weights": 4 * sum(p.numel() for p in parameters) / 2**20, "parameters": sum(p.numel() for p in parameters)}))
    shard.cleanup()


def main() -> None:
    import torch
    import transformers
    results = []
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder) / "model")
        for number, (ranks, trajectories, micro, recompute) in enumerate(ROWS):
            out = f"{folder}/row-{number}"
            command = [sys.executable, __file__, "step", f"{folder}/model", str(trajectories), str(micro), str(int(recompute)), out]
            if ranks > 1:
                command[1:1] = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "--"]
            # freed memory goes back to the system at once: otherwise the peak is that of malloc's habits
            subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536",
                                                                  "MALLOC_TRIM_THRESHOLD_": "65536"})
            ends = [json.loads(Path(f"{out}-{r}").read_text()) for r in range(ranks)]
            results.append({key: max(end[key] for end in ends) for key in ends[0]})
            print(ROWS[number], {k: round(v) for k, v in results[-1].items()}, flush=True)
    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "") \
        if Path("/proc/cpuinfo").is_file() else platform.processor()
    of = dict(zip(ROWS, results))
    p = lambda *row: of[row]["peak"]
    lines = [
        "# What a step's memory depends on", "",
        f"`python docs/memory.py` made this page on {cpu or platform.machine()}, {os.cpu_count()} cores, {platform.system()}, Python "
        f"{platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}, one thread a process, float32.", "",
        f"A random Qwen3-VL of {results[0]['parameters'] / 1e6:.1f} million trained parameters ({results[0]['weights']:.0f} MB) takes one step on "
        f"synthetic trajectories of {LENGTH} tokens, the last {OWN} of them the agent's, eight to a prompt of {PROMPT}. `peak` is the largest resident memory of "
        "the process above `loaded`, what it had with Python, model, optimiser and trajectories; of two ranks the larger. Every row is a fresh process.", "",
        "| ranks | trajectories a rank | `--micro_tokens` | micro-batches | `--recompute` | loaded, MB | peak, MB | optimiser's shard a rank, MB |",
        "|---|---|---|---|---|---|---|---|"]
    for (ranks, trajectories, micro, recompute), r in of.items():
        lines.append(f"| {ranks} | {trajectories} | {micro} | {r['micro']} | {'yes' if recompute else 'no'} | {r['loaded']:.0f} | {r['peak']:.0f} | {r['optimiser']:.0f} |")
    lines += [
        "", f"- **The number of micro-batches costs nothing.** Two and four times the trajectories at the same `--micro_tokens`: "
        f"{p(1, 8, 2048, False):.0f}, {p(1, 16, 2048, False):.0f}, {p(1, 32, 2048, False):.0f} MB. Gradients are added where they are.",
        f"- **The size of a micro-batch is what counts.** 2048, 4096, 8192 tokens: {p(1, 32, 2048, False):.0f}, {p(1, 32, 4096, False):.0f}, "
        f"{p(1, 32, 8192, False):.0f} MB, about {(p(1, 32, 8192, False) - p(1, 32, 2048, False)) / 6144 * 1024:.0f} KB a token.",
        f"- **Recomputing activations** lowers {p(1, 32, 8192, False):.0f} MB to {p(1, 32, 8192, True):.0f}, and {p(1, 32, 2048, False):.0f} to "
        f"{p(1, 32, 2048, True):.0f}, where what is left is mostly one layer, logits, and gradients on their way into the optimiser.",
        f"- **Ranks share the optimiser**: float32 master weights, two moments and gradients are {of[1, 8, 2048, False]['optimiser']:.0f} MB alone and "
        f"{of[2, 8, 2048, False]['optimiser']:.0f} MB a rank for two."]
    (ROOT / "docs/memory.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    if sys.argv[1:2] == ["step"]:
        step(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), bool(int(sys.argv[5])), sys.argv[6])
    else:
        main()
