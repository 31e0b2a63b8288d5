"""The page's dangers, a few of each: what survives, and that what is lost would be seen."""
import json
import random
import re
import shutil
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from conftest import ROOT

sys.path.insert(0, str(ROOT / "docs"))
import reliability
from lib import benchmarks, data
from lib.page import read_run
from lib.policy import Policy
from tools import Answer, Call, ToolError, parse


def kind(turn: str) -> str:
    try:
        return type(parse(turn, reliability.SEEN)).__name__
    except ToolError as error:
        return error.kind


def test_hostile_turns():
    """5,000, and they reach every check."""
    rng = random.Random(1)
    turns = [reliability.hostile_turn(rng) for _ in range(5000)]
    assert all(map(reliability.turn_survives, turns))
    assert set(map(kind, turns)) >= {
        "Call", "Answer", "bad_json", "bad_call", "unknown_tool", "bad_arguments", "bad_box",
        "inverted_box", "not_finite", "label_characters", "label_markup", "empty_label",
        "long_label", "empty_answer", "unterminated_tool_call"}


@pytest.mark.parametrize("result", [
    ValueError("any"), ToolError("x", "two\nlines"), ToolError("x", "long" * 200),
    Call("zoom", "red", {"bbox_2d": (0, 0, 97, 50)}), Call("zoom", "\n", {"bbox_2d": (0, 0, 9, 9)}),
    Call("zoom", "red", {"bbox_2d": (0, 0, 3, 9)}), Answer("x" * 501), Answer("")])
def test_a_turn_that_is_lost_is_seen(result, monkeypatch):
    def bad_parse(turn, space):
        if isinstance(result, Exception):
            raise result
        return result
    monkeypatch.setattr(reliability, "parse", bad_parse)
    assert not reliability.turn_survives("a turn")


@pytest.mark.parametrize("pictures", [False, True], ids=["lines", "pictures"])
def test_damaged_files(pictures, tmp_path):
    assert all(reliability.damaged_files(60, random.Random(1), tmp_path, pictures))


def test_good_files_are_good(tmp_path):
    """Else nothing but errors were tried."""
    reliability.good_files(tmp_path)
    for name, count in (("own.jsonl", 3), ("rows.tsv", 2), ("pictures.jsonl", 6)):
        bad = []
        _, questions = benchmarks.load(tmp_path / name, bad)
        assert len(data.check_pictures(questions, bad, whole=True)) == count and not bad


def test_a_file_that_is_lost_is_seen(tmp_path, monkeypatch):
    """An error that is no DataError, one that does not name the file, and a box without area."""
    file = reliability.good_files(tmp_path)[0]
    assert reliability.file_survives(file)
    for error in (KeyError("image"), data.DataError("something is wrong")):
        def broken(path, bad):
            raise error
        with monkeypatch.context() as patch:
            patch.setattr(benchmarks, "load", broken)
            assert not reliability.file_survives(file)
    with monkeypatch.context() as patch:
        patch.setattr(data, "parse_box", lambda *_: (5, 5, 5, 9))
        assert not reliability.file_survives(file)


def test_damaged_models(tmp_path):
    assert all(reliability.damaged_models(4, random.Random(1), tmp_path / "model"))


def test_a_model_that_is_lost_is_seen(tmp_path, monkeypatch):
    """One that runs, and says something else."""
    monkeypatch.setattr(reliability, "damage_model", lambda *_: "nothing")
    assert reliability.damaged_models(1, random.Random(1), tmp_path / "model") == [True]
    monkeypatch.setattr(reliability, "damage_model", lambda folder, rng: shake(folder))
    assert reliability.damaged_models(1, random.Random(1), tmp_path / "model") == [False]


def shake(folder) -> str:
    """Weights that are finite, and others."""
    policy = Policy(folder)
    policy.model.lm_head.weight.data *= 1.01
    shutil.rmtree(folder)
    policy.save(folder)
    return "shaken"


def test_growth_is_a_straight_lines_slope():
    """3 MB per 1,000 steps around 500 MB, whatever the warm-up did."""
    samples = [(n, 500 + 3 * (n - 600.5) / 1000 - 400 * (n <= 200), 4) for n in range(1, 1001)]
    assert reliability.growth(samples) == pytest.approx((500, 3, 0), abs=1e-6)


def test_the_interval_holds_what_it_promises():
    """95 of 100 flat runs whose samples are correlated (.5, the next .25, ..) are called flat."""
    rng, flat = np.random.default_rng(0), 0
    for _ in range(400):
        noise = [0.]
        for shock in rng.normal(size=249):
            noise.append(.5 * noise[-1] + shock)
        _, slope, half = reliability.growth([(8 * n, noise[n], 4) for n in range(250)])
        flat += abs(slope) <= half
    assert 365 <= flat <= 393


LEAK = """
import pathlib, sys, time
kept, metrics = [], pathlib.Path(sys.argv[2]) / "metrics.jsonl"
metrics.parent.mkdir()
for step in range(60):
    kept += [bytearray(b"x" * 2**20), open(metrics, "a")]
    print("x" * 10_000)                         # more than a pipe holds
    print("{}", file=kept[-1], flush=True)
    time.sleep(.03)
"""


def test_a_leak_is_seen(tmp_path, monkeypatch):
    """1 MB and a file a step."""
    monkeypatch.setattr(reliability, "EVERY", .05)
    samples = reliability.run(["-c", LEAK], tmp_path / "run")
    samples = [sample for sample in samples if sample[0] < 60]           # before it cleans up
    _, slope, half = reliability.growth(samples)
    assert slope == pytest.approx(1000, rel=.1) and half < 100
    (steps, _, files), (later, _, more) = samples[0], samples[-1]
    assert more - files == pytest.approx(later - steps, abs=2) and later - steps > 30


def test_what_does_not_train_has_no_sample(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    assert not reliability.sample(Path("/proc/self"), metrics)           # not yet
    metrics.write_text("")
    assert not reliability.sample(Path("/proc/self"), metrics)
    metrics.write_text("{}\n")
    assert reliability.sample(Path("/proc/self"), metrics)
    assert not reliability.sample(Path("/proc/none"), metrics)           # not any more


def test_a_long_runs_trajectories_are_not_held(tmp_path):
    """Each checkpoint writes the run's page: files of 12 MB more take at most 1 MB of memory."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    line, peaks = json.dumps({"step": 1, "question": "x" * 2000}) + "\n", []
    for count in (500, 6500):
        (tmp_path / "trajectories.jsonl").write_text(line * count)
        tracemalloc.start()
        assert read_run(tmp_path)["left_out"] == count - 150
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 2**20


def test_the_page_is_made_of_its_table():
    """All kinds; a new table takes the place of the old one, and nothing else changes."""
    page = reliability.PAGE.read_text()
    rows = re.findall(r"^\| (.*) \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \|$", page, re.MULTILINE)
    found = {}
    for what, tried, survived, lost in rows:
        tried, survived, lost = (int(number.replace(",", "")) for number in (tried, survived, lost))
        assert tried == survived + lost and tried > 0
        found[what] = [True] * survived + [False] * lost
    assert len(found) == 9 and len(found["hostile turns"]) >= 100_000
    assert reliability.page(found, page) == page
    assert len(page.splitlines()) <= 80
