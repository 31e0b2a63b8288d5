"""The figures of docs/experiments.md, readable without colour, from docs/experiments.jsonl.

It needs matplotlib, which nothing else here does: pip install matplotlib

Run it:  python docs/plot.py          # docs/curves.png and docs/luck.png
"""
from itertools import accumulate
from pathlib import Path
from statistics import mean

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt

from experiments import chosen, differences, interval, parts
from record import read_runs

DOCS = Path(__file__).parent
STYLES = (dict(color="black", lw=2.2), dict(color="0.35", ls="--"), dict(color="0.35", ls=":"),
          dict(color="0.6", ls="-."), dict(color="0.6", marker="o", markevery=8, ms=4))
KEYS = {"accuracy": "accuracy", "hit": "hit", "gap": "gap", "lucky": "lucky",
        "signal_groups": "groups with signal"}
WINDOW = 5


def smooth(values: list[float | None]) -> list[float]:
    """The mean of the last WINDOW steps that have a value, at each step."""
    means = []
    for end in range(1, len(values) + 1):
        part = [v for v in values[max(0, end - WINDOW):end] if v is not None]
        means.append(mean(part) if part else float("nan"))
    return means


def over_seeds(runs: list[dict], key: str) -> list[tuple[float, float]]:
    """At each step the mean over runs, and half its 95% interval."""
    return [interval(list(values)) for values in zip(*(smooth(run["curves"][key]) for run in runs))]


def curves(rows: dict[str, list[dict]]) -> None:
    """What the sampled trajectories did, against steps; and accuracy against time."""
    figure, axes = plt.subplots(2, 3, figsize=(13, 7))
    *panels, clock = axes.flat
    for (row, runs), style in zip(rows.items(), STYLES):
        label = f"{row}, {len(runs)} seeds"
        for axis, (key, title) in zip(panels, KEYS.items()):
            points = over_seeds(runs, key)
            steps = range(1, len(points) + 1)
            axis.plot(steps, [middle for middle, _ in points], label=label, **style)
            axis.set(xlabel="step", title=title)
            if row == next(iter(rows)):
                low = [middle - half for middle, half in points]
                high = [middle + half for middle, half in points]
                axis.fill_between(steps, low, high, color="0.85")
        seconds = zip(*(run["curves"]["seconds"] for run in runs))
        times = list(accumulate(mean(values) for values in seconds))
        clock.plot(times, [middle for middle, _ in over_seeds(runs, "accuracy")], **style)
    clock.set(xlabel="seconds of training, two runs side by side", title="accuracy")
    panels[0].legend(fontsize=8)
    figure.suptitle(f"sampled trajectories, mean over seeds and {WINDOW} steps; grey: 95% interval "
                    f"of {next(iter(rows))}'s mean")
    save(figure, "curves.png")


def luck(group: dict[str, dict[int, dict]]) -> None:
    """MAPO minus GRPO against the number of options: the fewer, the more often a bluff is right."""
    figure, axis = plt.subplots(figsize=(7, 3.8))
    styles = {"accuracy": ("o", "black"), "hit": ("s", "0.4"), "gap": ("^", "0.7")}
    names = {"0": "open", "8": "8 options", "4": "4", "2": "2"}
    for shift, (key, (marker, color)) in enumerate(styles.items()):
        for x, number in enumerate(names):
            pairs = [(f"mapo, {number} options", f"grpo, {number} options")]
            middle, half = interval(differences(group, pairs, key))
            axis.errorbar(x + .15 * shift, middle, half, marker=marker, color=color, capsize=4,
                          label=f"{key}, steps 1-20" if x == 0 else None)
    axis.axhline(0, color="black", lw=.6)
    axis.set(xticks=range(len(names)), xticklabels=names.values(), ylabel="MAPO - GRPO",
             title="the edge against luck, 95% intervals")
    axis.legend(loc="upper center", bbox_to_anchor=(.5, -.08), ncols=3, fontsize=8)
    save(figure, "luck.png")


def save(figure, name: str) -> None:
    figure.tight_layout()
    figure.savefig(DOCS / name, dpi=80)


if __name__ == "__main__":
    runs = read_runs()
    for part in ("table", "five"):                 # the newer comparison, once it is there
        _, group = chosen(part, runs)
        if group:
            curves({row: list(of_seed.values()) for row, of_seed in list(group.items())[:5]})
            break
    _, group = chosen("luck", runs)
    if group:
        luck(group)
