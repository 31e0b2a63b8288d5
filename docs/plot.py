"""Figures of docs/experiments.jsonl, readable without colour. Needs matplotlib (pip install matplotlib), and only here.

Run it:  python docs/plot.py          # docs/curves.png, docs/luck.png, and of the long runs, where there are any, docs/long.png
"""
import json
import sys
from pathlib import Path

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS))
from experiments import MAIN, T95, area

STYLES = {"mapo": dict(color="black", lw=2.2), "grpo": dict(color="0.35", ls="--"), "dapo": dict(color="0.35", ls=":"),
          "gspo": dict(color="0.6", ls="-."), "ppo": dict(color="0.6", marker="o", markevery=8, ms=4)}


def mean_half(values: list[float]) -> tuple[float, float]:
    """Mean and half its 95% interval."""
    n, mean = len(values), sum(values) / len(values)
    return mean, T95[n] * (sum((v - mean) ** 2 for v in values) / (n - 1) / n) ** .5 if n > 1 else 0.


def smooth(values: list[float], window: int = 5) -> list[float]:
    """Mean of the last `window` steps."""
    return [sum(part) / len(part) for i in range(len(values)) if (part := [v for v in values[max(0, i - window + 1):i + 1] if v is not None])]


def curves(runs: list[dict]) -> None:
    """Accuracy, hit, gap and lucky answers of the sampled trajectories against steps, and accuracy against time."""
    keys = ("accuracy", "hit", "gap", "lucky", "signal_groups")
    figure, axes = plt.subplots(2, 3, figsize=(13, 7))
    for name in list(MAIN)[:5]:
        style, group = STYLES[name.split(",")[0]], [r for r in runs if r["name"] == name]
        if not group:
            continue
        for axis, key in zip(axes.flat, keys):
            points = [mean_half(values) for values in zip(*(smooth(r["curves"][key]) for r in group))]
            axis.plot(range(1, len(points) + 1), [m for m, _ in points], label=f"{name}, {len(group)} seeds", **style)
            if name == "mapo":
                axis.fill_between(range(1, len(points) + 1), [m - h for m, h in points], [m + h for m, h in points], color="0.85")
            axis.set(xlabel="step", title={"signal_groups": "groups with signal"}.get(key, key))
        points = [mean_half(values)[0] for values in zip(*(smooth(r["curves"]["accuracy"]) for r in group))]
        seconds, clock = [mean_half(values)[0] for values in zip(*(r["curves"]["seconds"] for r in group))], 0.
        times = [clock := clock + s for s in seconds]
        axes.flat[-1].plot(times, points, label=name, **style)
    axes.flat[-1].set(xlabel="seconds of training, two runs side by side", title="accuracy")
    axes.flat[0].legend()
    figure.suptitle("sampled trajectories, mean over seeds and 5 steps; grey: 95% interval of mapo's mean")
    figure.tight_layout()
    figure.savefig(DOCS / "curves.png", dpi=80)


def luck(runs: list[dict]) -> None:
    """MAPO minus GRPO, paired by seed, against the number of options: the fewer, the more often a bluff is right."""
    figure, axis = plt.subplots(figsize=(7, 3.8))
    for shift, (key, marker) in enumerate((("accuracy", "o"), ("hit", "s"), ("gap", "^"))):
        for x, options in enumerate(("0", "8", "4", "2")):
            suffix = "" if options == "4" else f", options {options}"
            found = {a: {r["seed"]: area(r, key) for r in runs if r["seed"] < 3 and r["name"] == a + suffix} for a in ("mapo", "grpo")}
            pairs = [found["mapo"][s] - found["grpo"][s] for s in found["mapo"] if s in found["grpo"]]
            if pairs:
                mean, half = mean_half(pairs)
                axis.errorbar(x + .15 * shift, mean, half, marker=marker, color=("black", "0.4", "0.7")[shift], capsize=4,
                              label=f"{key}, steps 1-20" if x == 0 else None)
    axis.axhline(0, color="black", lw=.6)
    axis.set(xticks=range(4), xticklabels=["open", "8 options", "4", "2"], ylabel="MAPO - GRPO", title="the edge against luck, 95% intervals")
    axis.legend(loc="upper center", bbox_to_anchor=(.5, -.08), ncols=3, fontsize=8)
    figure.tight_layout()
    figure.savefig(DOCS / "luck.png", dpi=80)


def long(runs: list[dict]) -> None:
    """250 steps: does anything collapse?"""
    windows = {"accuracy": 10, "hit": 10, "gap": 10, "lucky": 10, "calls": 10, "semantic": 10, "entropy": 10, "grad_noise": 50}
    figure, axes = plt.subplots(2, 4, figsize=(16, 6))
    for run in runs:
        algo, _, kind = run["name"].partition(", ")
        style, label = (STYLES[algo], algo) if kind == "long" else (dict(color="0.6", ls=":", lw=1.5), "mapo, beta 1")
        for axis, (key, window) in zip(axes.flat, windows.items()):
            axis.plot(smooth(run["curves"][key], window), label=label, **style)
            axis.set(xlabel="step", title=key if window == 10 else f"{key}, mean of {window} steps")
    axes.flat[0].legend()
    figure.suptitle("250 steps of 8 x 8, seed 0, sampled trajectories, mean of 10 steps")
    figure.tight_layout()
    figure.savefig(DOCS / "long.png", dpi=80)


if __name__ == "__main__":
    runs = [json.loads(line) for line in (DOCS / "experiments.jsonl").open()]
    curves(runs)
    luck(runs)
    if found := [run for run in runs if run["name"].endswith("long") and run["seed"] == 0]:
        long(found)
