"""docs/: the pages are what their scripts make of their numbers, README quotes the pages, and the vague agent is vague."""
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from conftest import ROOT
from tiny.world import World, world_questions

sys.path.insert(0, str(ROOT / "docs"))
import bench
import experiments
import probe
import vague


@pytest.mark.parametrize("script", [bench, experiments, probe, vague], ids=lambda s: s.__name__)
def test_page_is_made_of_its_numbers(script):
    """Nobody wrote a number by hand."""
    name = script.__name__
    records = [json.loads(line) for line in (ROOT / f"docs/{name}.jsonl").open()]
    assert script.page(records) == (ROOT / f"docs/{name}.md").read_text()


def test_readme_quotes_the_experiments():
    """Each row of README's table of algorithms stands in docs/experiments.md, number for number."""
    section = (ROOT / "README.md").read_text().split("## Does it hold?")[1].split("\n## ")[0]
    page = (ROOT / "docs/experiments.md").read_text().split("## Five algorithms")[1].split("\n\n| | steps to")[0]

    def cells(text):
        """(row, column) -> cell, of all tables whose rows are algorithms."""
        found, header = {}, []
        for line in text.splitlines():
            row = [cell.strip() for cell in line.split("|")[1:-1]]
            if re.match(r"(mapo|grpo|dapo|gspo|ppo)", row[0] if row else ""):
                found |= {(row[0], column): cell for column, cell in zip(header[1:], row[1:])}
            elif row and "---" not in row[0]:
                header = row
        return found

    quoted, source = cells(section), cells(page)
    assert quoted.items() <= source.items() and len(quoted) == 9 * 6


def test_intervals_by_hand():
    """1, 2, 3: mean 2, standard deviation 1, t(2) 4.303: 2 ± 4.303 / sqrt 3. Pairs: 5 of mapo's six runs have a partner."""
    assert experiments.mean_interval([1, 2, 3]) == "2.000 ± 2.484" and experiments.mean_interval([1.]) == "1.000"
    run = lambda name, seed, value: {"name": name, "seed": seed, "value": value}
    runs = {"mapo": [run("mapo", s, 1. + s) for s in range(6)], "grpo": [run("grpo", s, 2. * s) for s in range(5)]}
    line = experiments.table(runs, {"v": lambda r: r["value"]}, "mapo")[-1]
    assert line == "| mapo - grpo, paired | 5 | -1.000 ± 1.963 |"       # 1, 0, -1, -2, -3


def test_the_vague_demonstrator(policy):
    """About half of its labels are "the object"; names and boxes stay; tiny.py's own demonstrator is left as it was."""
    from tiny import build as tiny
    samples, pairs = vague.Vague(policy, 7, 0, 1).demonstrations(40, gap=.7)
    labels = [label for tokens, _ in samples for label in re.findall(r'"label": "(.*?)"', policy.decode(tokens.ids))]
    assert .35 < np.mean([label == vague.VAGUE for label in labels]) < .65 and len(labels) > 40
    assert {label for _, label, good in pairs if label == vague.VAGUE and good} == {vague.VAGUE}
    assert "the object" not in tiny.call_text("the red circle", (1, 2, 3, 4))


def test_without_contrast_a_score_is_the_cosine(policy, trajectories):
    looks = [turn for t in trajectories for turn in t.looks][:4]
    labels, crops = [turn.call.label for turn in looks], [turn.crop_tokens for turn in looks]
    cosine = vague.Cosine(policy, world_questions(World(), 0, "train", 10**6, 2))(labels, crops)
    text, image = policy.embed(labels), policy.embed(crops)
    assert torch.allclose(cosine, (text * image).sum(-1).clamp(min=0), atol=1e-5)


def test_every_script_shows_its_help():
    for script in ("vague", "experiments", "probe", "bench", "looks"):
        done = subprocess.run([sys.executable, f"docs/{script}.py", "--help"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0 and "usage" in done.stdout
