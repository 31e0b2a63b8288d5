"""What a run tells: a collapse is named, the same handful of held-out questions is watched, and a
page is written while the run goes on."""
import json
import math
import subprocess
import sys

import pytest

import train as training
from conftest import ROOT
from lib.question import Question
from report import collapse, handful, side_by_side


@pytest.mark.parametrize("metrics, words", [
    ({}, ""), ({"calls": .05}, "stopped looking"), ({"grad_norm": math.nan}, "not finite"),
    ({"entropy": .001}, "deterministic"), ({"valid": .2}, "malformed"),
    ({"answered": .4}, "end in an answer"), ({"value_loss": math.nan}, "critic"),
    ({"skipped": 1., "entropy": 0.}, "no group had a signal"),
    ({"skipped": 1., "grad_norm": math.inf}, "not finite")])
def test_collapse_is_named(metrics, words):
    well = {"calls": 1., "grad_norm": 1., "entropy": .5, "valid": 1., "skipped": 0., "answered": 1.}
    said = collapse(well | metrics)
    assert words in said and bool(said) == bool(words)


def test_the_watched_questions_are_a_handful():
    """By hand: the first of each category, then the first others, in their own order."""
    def named(kinds):
        return [Question(str(i), "x", None, category=kind) for i, kind in enumerate(kinds)]

    def chosen(kinds, count=6):
        return [question.text for question in handful(named(kinds), count)]

    assert chosen("aaaaaaabc") == ["0", "1", "2", "3", "7", "8"]
    assert chosen("abcdefgh") == list("012345") and chosen("ab") == ["0", "1"] and chosen("") == []


def test_a_handful_is_watched_and_a_page_written(tmp_path, capsys):
    """At the start, at each checkpoint and at the end, the same questions; and one page."""
    def run(steps, *more):
        training.train(training.parse_config(
            ["--steps", str(steps), "--questions", "1", "--group", "2", "--save_every", "2",
             "--eval_questions", "3", "--out", str(tmp_path / "run"), "--quiet", *more]))

    run(3)
    said = capsys.readouterr().out
    assert "step 1/3" not in said and "3 held-out questions" in said and "page.html" in said
    first = (tmp_path / "run/watched.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in first] == [0] * 3 + [2] * 3 + [3] * 3
    assert len({json.loads(line)["id"] for line in first}) == 3
    assert (tmp_path / "run/page.html").is_file()


@pytest.mark.parametrize("questions, group, ranks, expected", [(8, 8, 1, 64), (16, 8, 1, 64),
                                                               (4, 4, 1, 16), (4, 4, 2, 8)])
def test_no_more_side_by_side_than_in_a_rollout(questions, group, ranks, expected):
    config = training.Config(questions=questions, group=group)
    assert side_by_side(config, ranks) == expected


def test_the_command(tmp_path):
    """Which steps collapsed, and where the run stands; or what is missing."""
    well = {"accuracy": .5, "calls": 1., "hit": None, "gap": .25, "semantic": .75, "grad_norm": 1.,
            "entropy": .5, "valid": 1., "skipped": 0., "answered": 1.}
    lines = [json.dumps({"step": step, **well, "calls": calls}) for step, calls in
             ((1, 0.), (2, 1.))]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")

    def said(folder):
        return subprocess.run([sys.executable, "report.py", str(folder)], cwd=ROOT,
                              capture_output=True, text=True)

    first, second, *rest = said(tmp_path).stdout.splitlines()
    assert first.startswith("step 1: collapse: the agent has stopped looking")
    assert str(tmp_path / "metrics.jsonl") in rest[-1]
    assert second == "step 2: accuracy 0.50  calls 1.00  gap 0.25  semantic 0.75"
    assert "expected lines of a run of train.py; found none" in said(tmp_path / "x").stderr
