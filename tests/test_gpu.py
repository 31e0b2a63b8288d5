"""docs/gpu.py: its parts with small models, on the CPU and where there is one on a GPU; what fails
is recorded in words; the page is made of its records."""
import json
import sys

import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

import rollout
from conftest import ROOT
from lib.policy import read_config
from train import Config

sys.path.insert(0, str(ROOT / "docs"))
import gpu
import gpu_model
import plan

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=CUDA)]


@pytest.fixture
def part(monkeypatch, tmp_path):
    """Run a part as a process would -> its records."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(rollout, "act", rollout.act)        # restored when the test ends

    def run(name, device):
        function, dtype, _ = gpu.PARTS[name]
        records = []
        function(records.append, Config(device=device, dtype=dtype), True, tmp_path)
        return records

    return run


@pytest.mark.parametrize("name, device", [
    ("checks in float32", "cpu"),                           # in bfloat16 the CPU takes 9 s
    pytest.param("checks in float32", "cuda", marks=CUDA),
    pytest.param("checks in bfloat16", "cuda", marks=CUDA)])
def test_checks(part, name, device):
    """The CPU equals itself."""
    records = part(name, device)
    assert [r["row"] for r in records] == list(gpu.LIMITS)
    assert all(r["good"] == "yes" for r in records)
    if device == "cpu":
        assert [r["found"] for r in records[1:]] == [0] * 4 and records[0]["found"] > 0


@pytest.mark.parametrize("device", DEVICES)
def test_the_random_model_goes_through_all_phases(part, device):
    records = part("a random 3B", device)
    assert [r["row"] for r in records] == [
        "build", "load", "rollout 1", "rollout 2", "32 tokens a row, kernel by kernel",
        "32 tokens a row, as a graph", "score", "update 1", "update 2", "checkpoint", "resume",
        "compare"]
    assert records[-1]["note"] == "0 tensors unequal"
    for record in records[2:4] + records[6:9]:
        assert record["tokens/s"] > 0 and record["planned s"] > 0 and record["planned GB"] > 0
    assert float(records[7]["note"].split()[-1]) < .5
    assert all((r["peak GB"] is None) == (device == "cpu") for r in records)


def test_the_whole_model_is_the_published_one(monkeypatch, tmp_path):
    """Its shapes, without its weights."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(Qwen2_5_VLForConditionalGeneration, "save_pretrained",
                        lambda self, folder: self.config.save_pretrained(folder))
    gpu_model.build(tmp_path, "meta", small=False)
    shape = plan.read_shape(str(tmp_path), "bfloat16")
    assert (shape.n, shape.m, shape.V) == (3_754_622_976, 3_085_938_688, 151_936)
    assert shape.resolution.factor == 28 and shape.resolution.max_pixels == 1280 * 28**2
    assert read_config(tmp_path).get_text_config().eos_token_id == 2           # tiny/'s <|im_end|>


@pytest.mark.parametrize("code, text", [
    ("raise ValueError('no memory')", "ValueError: no memory"), ("raise SystemExit(3)", "with 3"),
    ("import time; time.sleep(60)", "stopped after 2 s")])
def test_what_fails_is_said(tmp_path, code, text):
    """And what was recorded before it stays."""
    file = tmp_path / "records.jsonl"
    file.write_text('{"row": "load", "s": 1.5}\n')
    first, last = gpu.watch("a random 3B", [sys.executable, "-c", code], file, limit=2)
    assert first == {"part": "a random 3B", "row": "load", "s": 1.5}
    assert last["failed"].startswith("a random 3B, after load: ") and text in last["failed"]
    said = gpu.report({"machine": "A card", "records": [first, last]})
    assert said.startswith("A card.\n\n| row | s |\n|---|---|\n| load | 1.5 |\n\n- **Failed: ")


def test_all_limits_together_are_below_ten_minutes():
    assert sum(limit for *_, limit in gpu.PARTS.values()) < 580


def test_the_page(monkeypatch, tmp_path):
    """It is made of the runs there are; the newest one stands there, and the text stays."""
    page = gpu.PAGE.read_text()
    assert gpu.page(gpu.read()) == page and ("**Not run**" in page) == (not gpu.read())
    runs = [{"machine": name, "records": []} for name in ("an old card", "a new card")]
    monkeypatch.setattr(gpu, "PAGE", tmp_path / "gpu.md")
    gpu.PAGE.write_text(page)
    new = gpu.page(json.loads(json.dumps(runs)))
    assert "a new card." in new and "an old card" not in new and "**Not run**" not in new
    assert new.split("<!-- end -->")[1] == page.split("<!-- end -->")[1]


@pytest.mark.parametrize("options, said", [
    (["--device", "cpu"], "expected --small"),
    pytest.param([], "torch sees no GPU", marks=pytest.mark.skipif(torch.cuda.is_available(),
                                                                   reason="there is a GPU"))])
def test_what_cannot_be_measured_is_refused(monkeypatch, capsys, options, said):
    monkeypatch.setattr(sys, "argv", ["gpu.py", *options])
    with pytest.raises(SystemExit):
        gpu.main()
    assert said in capsys.readouterr().err
