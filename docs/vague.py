"""Reward hacking, shown: an agent that may describe any look as "the object".

What it teaches: why a description must be specific, and why its score must be contrasted. `tiny/`
never says anything vague. So this script first teaches it to: by imitation, with "the object" as
half of the labels, which its encoder learns to find in every crop. From that start it trains with
MAPO under three scores:

    cosine      s = max(cos, 0), CLIPScore's form (arXiv 2104.08718); any label goes
    contrast    eq. 8 to 10 (reward.py); any label goes
    refused     eq. 8 to 10, and lib/labels.py refuses vague labels: the default

Run it:  python docs/vague.py             # trains what is missing, 20 to 40 minutes; -> vague.md
         python docs/vague.py --table     # only the page, from vague.jsonl
"""
import argparse
import json
import sys
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

import torch

import build
import reward
import train
from experiments import mean_interval
from lib import labels
from lib.policy import Policy
from record import present

RUNS, RESULTS = ROOT / "runs/vague", ROOT / "docs/vague.jsonl"
VAGUE, ARMS, SEEDS, STEPS = "the object", ("cosine", "contrast", "refused"), range(3), 40
FIRST, THIRD, LAST = slice(5), slice(10, 15), slice(-5, None)


class Vague(build.Source):
    """Demonstrations half of whose labels are vague, and crops that the vague label always fits."""

    def demonstrations(self, count: int, miss: float):
        specific = build.zoom_call

        def call(label, box):
            return specific(VAGUE if self.rng.random() < .5 else label, box)

        with patch.object(build, "zoom_call", call):
            samples, pairs = super().demonstrations(count, miss)
        for i, (crop, _, _) in enumerate(pairs):
            if self.rng.random() < .25:
                pairs[i] = crop, VAGUE, True
        return samples, pairs


class Cosine(reward.Scorer):
    """The score without contrast."""

    def squash(self, cosine: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return cosine.clamp(min=0)


def make_start() -> None:
    """tiny/, after 120 steps of imitating the vague demonstrator."""
    torch.manual_seed(0)
    policy = Policy(ROOT / "tiny")
    build.stage_act(policy, Vague(policy, 900), steps=120, batch=24, lr=5e-4, miss=.6)
    policy.save(RUNS / "start")


def measure(trajectories: list, *total) -> dict:
    """reward.measure, and `vague`: the share of looks with the vague label."""
    labels = [turn.call.label for t in trajectories for turn in t.looks]
    share = labels.count(VAGUE) / max(len(labels), 1)
    return reward.measure(trajectories, *total) | {"vague": share}


def run(arm: str, seed: int) -> dict:
    """One run of train.py. Returns its line in vague.jsonl: its curves, and what it ended at."""
    out = RUNS / f"{arm}-{seed}"
    scorer = Cosine if arm == "cosine" else reward.Scorer
    refused = labels.VAGUE if arm == "refused" else frozenset()
    with (patch.object(train, "measure", measure), patch.object(train, "Scorer", scorer),
          patch.object(labels, "VAGUE", refused)):
        train.train(train.parse_config([
            "--model", str(RUNS / "start"), "--out", str(out), "--seed", str(seed),
            "--steps", str(STEPS), "--eval_questions", "200"]))
    steps = [json.loads(line) for line in (out / "metrics.jsonl").open()]
    after = json.loads((out / "results.json").read_text())["after sampled"]
    line = {"arm": arm, "seed": seed, "tiny, code": present(),
            "after": {key: after[key] for key in ("hit", "accuracy")}}
    for key in ("vague", "semantic", "valid"):
        line[key] = [round(step[key] or 0., 4) for step in steps]
    return line


def page(runs: list[dict]) -> str:
    title, about = __doc__.split("\n\nRun it")[0].split("\n\n", 1)
    rows = []
    for arm in ARMS:
        own = [run for run in runs if run["arm"] == arm]
        first, third, last = (means(own, "vague", part) for part in (FIRST, THIRD, LAST))
        columns = [first, third, last, [b - a for a, b in zip(first, third)],
                   means(own, "semantic", FIRST), means(own, "semantic", LAST),
                   means(own, "valid", FIRST), [run["after"]["hit"] for run in own],
                   [run["after"]["accuracy"] for run in own]]
        rows.append(f"| {arm} | {' | '.join(mean_interval(values) for values in columns)} |")
    table = "\n".join(rows)
    return f"""# {title.rstrip(".")}

{about}

`python docs/vague.py` made this page, with `tiny/` and code {" and ".join(runs[0]["tiny, code"])}:
{STEPS} steps of 8 x 8, {len(SEEDS)} seeds, mean ± 95% interval (Student's t). *Vague* is the share
of looks described as "the object", over five steps; its change from the first column to the second
is taken seed by seed. Held out: 200 questions, sampled.

| | vague, steps 1-5 | vague, steps 11-15 | vague, last 5 | change to 11-15 | \
semantic, first 5 | semantic, last 5 | \
valid turns, first 5 | hit, held out | accuracy, held out |
|---|---|---|---|---|---|---|---|---|---|
{table}

- Under the cosine the vague label pays at first: its share grows in every seed. Later it falls
  again, to 0.59, 0.48 and 0.73, but it does not vanish. (The column of steps 11 to 15 was added
  when the curves had been seen.)
- Under the contrast it does not pay: after 15 steps it is nearly gone, after {STEPS} wholly, in
  every seed.
- To refuse it costs valid turns at first; a refused call is no look, so its share is 0. After
  {STEPS} steps the row `contrast` hits more often by 0.053 ± 0.047 (three seeds), and accuracy does
  not tell the two apart. Here the contrast alone was enough.
"""


def means(runs: list[dict], key: str, part: slice) -> list[float]:
    """Each run's mean over five steps."""
    return [sum(run[key][part]) / 5 for run in runs]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--table", action="store_true", help="train nothing")
    runs = [json.loads(line) for line in RESULTS.open()]
    if not parser.parse_args().table:
        runs = [done for done in runs if done["tiny, code"] == list(present())]
        done = {(line["arm"], line["seed"]) for line in runs}
        make_start()
        for seed, arm in ((seed, arm) for seed in SEEDS for arm in ARMS):
            if (arm, seed) not in done:
                runs.append(run(arm, seed))
                RESULTS.write_text("".join(json.dumps(line) + "\n" for line in runs))
    text = page(runs)
    (ROOT / "docs/vague.md").write_text(text)
    print(text)
