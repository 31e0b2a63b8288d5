"""MAPO and GRPO from the same start, on the same questions, for the same steps, at several seeds.

Run it:  python docs/seeds.py             # trains what runs/seeds lacks, two runs at a time; writes docs/seeds.md
         python docs/seeds.py --seeds 0   # one seed
"""
import argparse
import json
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
T95 = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}  # Student's t, by number of seeds


def run(algo: str, seed: int) -> Path:
    out = ROOT / f"runs/seeds/{algo}-{seed}"
    if not (out / "results.json").is_file():
        print(f"training {algo}, seed {seed}", flush=True)
        subprocess.run([sys.executable, "train.py", "--algo", algo, "--seed", str(seed), "--out", str(out)], cwd=ROOT, check=True,
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return out


def mean_interval(values: list[float]) -> str:
    """mean ± half the 95% interval of the mean over seeds (Student's t)."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return f"{mean:.3f}"
    std = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
    return f"{mean:.3f} ± {T95[len(values)] * std / math.sqrt(len(values)):.3f}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    seeds = parser.parse_args().seeds
    jobs = [(algo, seed) for seed in seeds for algo in ("mapo", "grpo")]
    with ThreadPoolExecutor(2) as pool:
        folders = dict(zip(jobs, pool.map(lambda job: run(*job), jobs)))
    results = {job: json.loads((folder / "results.json").read_text()) for job, folder in folders.items()}
    metrics = {job: [json.loads(line) for line in (folder / "metrics.jsonl").open()] for job, folder in folders.items()}

    first = results[jobs[0]]
    lines = ["# MAPO and GRPO at three seeds", "",
             f"`python docs/seeds.py` made this page: {len(metrics[jobs[0]])} steps a run, {first['before greedy']['n']} held-out questions, "
             "the same for all. `calls, comparison` counts looks at questions that need two.", "",
             "| run | | accuracy | hit | gap | lucky | semantic | calls | calls, comparison |", "|---|---|---|---|---|---|---|---|---|"]
    cells = lambda m: " | ".join(f"{m[k]:.3f}" for k in ("accuracy", "hit", "gap", "lucky", "semantic", "calls"))
    looks = lambda m: f"{m['categories']['comparison']['calls']:.2f}"
    for how in ("greedy", "sampled"):
        lines.append(f"| start | {how} | {cells(first['before ' + how])} | {looks(first['before ' + how])} |")
    for algo, seed in sorted(jobs, reverse=True, key=lambda j: (j[0], -j[1])):
        for how in ("greedy", "sampled"):
            m = results[algo, seed][f"after {how}"]
            lines.append(f"| {algo}, seed {seed} | {how} | {cells(m)} | {looks(m)} |")
    lines += ["", "Mean over seeds with its 95% interval, and the paired difference MAPO - GRPO (same seed, same questions):", "",
              "| | | accuracy | hit | gap |", "|---|---|---|---|---|"]
    for how in ("greedy", "sampled"):
        after = {algo: [results[algo, s][f"after {how}"] for s in seeds] for algo in ("mapo", "grpo")}
        for algo in ("mapo", "grpo"):
            lines.append(f"| {algo} | {how} | " + " | ".join(mean_interval([m[k] for m in after[algo]]) for k in ("accuracy", "hit", "gap")) + " |")
        lines.append(f"| difference | {how} | " + " | ".join(
            mean_interval([a[k] - b[k] for a, b in zip(after["mapo"], after["grpo"])]) for k in ("accuracy", "hit", "gap")) + " |")
    lines += ["", "On the way, sampled in training (mean over seeds of 20 steps each):", "",
              "| steps | " + " | ".join(f"{algo}, {k}" for algo in ("mapo", "grpo") for k in ("accuracy", "hit", "gap", "signal_groups")) + " |",
              "|---|" + "---|" * 8]
    for start in range(0, len(metrics[jobs[0]]), 20):
        part = lambda algo, k: sum(m[k] or 0 for s in seeds for m in metrics[algo, s][start:start + 20]) / sum(
            len(metrics[algo, s][start:start + 20]) for s in seeds)
        lines.append(f"| {start + 1}-{min(start + 20, len(metrics[jobs[0]]))} | " + " | ".join(
            f"{part(algo, k):.3f}" for algo in ("mapo", "grpo") for k in ("accuracy", "hit", "gap", "signal_groups")) + " |")
    (ROOT / "docs/seeds.md").write_text("\n".join(lines) + "\n")
    with (ROOT / "docs/seeds.jsonl").open("w") as file:
        for (algo, seed), result in results.items():
            file.write(json.dumps({"algo": algo, "seed": seed, **result}) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
