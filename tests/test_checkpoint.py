"""A run's folder: no run enters another's, and a kill at any moment loses nothing."""
import itertools
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from conftest import ROOT
from lib import checkpoint
from lib.checkpoint import (append, check_settings, checkpoints, choose_folder, keep_lines,
                            newest)
from lib.shard import ShardedAdamW


def made_run(folder: Path, *steps: int) -> Path:
    """A folder with a line of metrics, and checkpoints that hold only what names them complete."""
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    for step in steps:
        (folder / f"step-{step:06}").mkdir()
        (folder / f"step-{step:06}/state-0.pt").touch()
    return folder


# ---- names ---------------------------------------------------------------------------------------

def test_a_new_run_never_enters_a_folder_that_holds_one(tmp_path):
    """runs/mapo, then runs/mapo-2, then -3. A run without a checkpoint is one, and so is a
    checkpoint without metrics."""
    folder = tmp_path / "mapo"
    assert choose_folder(folder, resume=False) == folder
    folder.mkdir()
    (folder / "notes.txt").touch()
    assert choose_folder(folder, resume=False) == folder          # notes are no run
    made_run(tmp_path / "mapo-2")
    assert choose_folder(folder, resume=False) == folder          # it is still free
    (folder / "metrics.jsonl").touch()
    assert choose_folder(folder, resume=False) == tmp_path / "mapo-3"
    made_run(tmp_path / "mapo-3", 10)
    (tmp_path / "mapo-3/metrics.jsonl").unlink()
    assert choose_folder(folder, resume=False) == tmp_path / "mapo-4"


def test_resume_goes_to_the_latest_run(tmp_path):
    """Other names that begin alike are others'."""
    made_run(tmp_path / "mapo", 10)
    for end in ("-seed3", "-3b", "2", "-x-4"):
        made_run(tmp_path / f"mapo{end}", 50)
    assert choose_folder(tmp_path / "mapo", resume=True) == tmp_path / "mapo"
    for number in range(2, 11):
        made_run(tmp_path / f"mapo-{number}", 10)
    assert choose_folder(tmp_path / "mapo", resume=True) == tmp_path / "mapo-10"
    made_run(tmp_path / "mapo-11")                                # died before its first checkpoint
    assert choose_folder(tmp_path / "mapo", resume=True) == tmp_path / "mapo-10"
    assert choose_folder(tmp_path / "mapo-9", resume=True) == tmp_path / "mapo-9"


def test_a_name_is_no_pattern(tmp_path):
    """Brackets, stars and dots in a name mean themselves."""
    for name in ("a[1]", "b*", "c.d"):
        made_run(tmp_path / name, 1)
        made_run(tmp_path / f"{name}-2", 1)
    made_run(tmp_path / "cxd-3", 1)
    for name in ("a[1]", "b*", "c.d"):
        assert choose_folder(tmp_path / name, resume=True) == tmp_path / f"{name}-2"


def test_an_evaluation_is_a_run(tmp_path):
    """Neither train.py nor eval.py begins where eval.py's predictions are."""
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval/predictions-3.jsonl").touch()
    assert choose_folder(tmp_path / "eval", resume=False) == tmp_path / "eval-2"


def test_nothing_to_resume_is_named(tmp_path):
    """Neither a run that died early nor a checkpoint that was never finished is one."""
    run = made_run(tmp_path / "mapo")
    for name in ("saving", "step-000010"):
        (run / name).mkdir()
        (run / name / "model.safetensors").touch()
    (run / "saving/state-0.pt").touch()
    with pytest.raises(FileNotFoundError, match=r"--resume: no checkpoint in .*mapo; expected"):
        choose_folder(run, resume=True)
    assert newest(run) == run


def test_a_run_is_its_newest_checkpoint(tmp_path):
    """Wherever a model is asked for, a run's folder will do; a model directory is itself."""
    run = made_run(tmp_path / "mapo", 100, 20)
    assert checkpoints(run) == [run / "step-000020", run / "step-000100"]
    assert newest(str(run)) == run / "step-000100"
    assert newest(run / "step-000020") == run / "step-000020" and newest("tiny") == Path("tiny")
    # as it is noted: inside the project from there on
    assert checkpoint.noted(run) == str(run / "step-000100")
    assert checkpoint.noted(ROOT / "tiny") == "tiny" and checkpoint.ROOT / "tiny" == ROOT / "tiny"


# ---- checkpoints ---------------------------------------------------------------------------------

class Trained:
    """Eleven numbers in place of a model, with their optimiser, a critic's, and a random stream."""

    def __init__(self):
        self.weights = torch.nn.Parameter(torch.zeros(8))
        self.head = torch.nn.Parameter(torch.zeros(3))
        self.optimisers = [ShardedAdamW([self.weights]), ShardedAdamW([self.head])]
        self.generator = torch.Generator().manual_seed(0)
        model = torch.nn.ParameterList([self.weights, self.head])
        self.policy = SimpleNamespace(save=self.save_model, model=model)

    def save_model(self, folder: Path) -> None:
        folder.mkdir()
        (folder / "model").write_text(str(self.weights.tolist()))

    def step(self) -> None:
        """A step whose gradient is random."""
        for optimiser in self.optimisers:
            gradient = optimiser.buckets[0].gradient
            gradient.copy_(torch.randn(gradient.shape, generator=self.generator))
            optimiser.step(.1)

    def save(self, folder: Path, step: int) -> None:
        settings = {"seed": 0}
        checkpoint.save(folder, step, self.policy, self.optimisers, self.generator, settings)

    def load(self, folder: Path) -> int:
        return checkpoint.load(folder, self.optimisers, self.generator)

    def state(self) -> list[float]:
        """All that goes on: weights, moments, counts, and what the random stream says next."""
        found = []
        for optimiser in self.optimisers:
            bucket = optimiser.buckets[0]
            found += [optimiser.steps, bucket.master, bucket.mean, bucket.square]
        found += [self.weights, self.head, self.generator.get_state()]
        return [torch.as_tensor(x).flatten().tolist() for x in found]


def test_what_is_saved_goes_on_bit_for_bit(tmp_path):
    one, other = Trained(), Trained()
    one.step()
    one.save(tmp_path, 1)
    other.step()
    other.step()
    assert other.load(tmp_path / "step-000001") == 1 and other.state() == one.state()
    for trained in (one, other):
        trained.step()
    assert other.state() == one.state()


def test_only_the_newest_stays(tmp_path):
    trained = Trained()
    for step in (9, 10):
        trained.save(tmp_path, step)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000010"]
    files = {str(path.relative_to(tmp_path / "step-000010"))
             for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {"model", "train.json", "state-0.pt", "optimiser-0/optimiser-0-of-1.pt",
                     "optimiser-1/optimiser-0-of-1.pt", "sums.json"}


class Killed(BaseException):
    """As by kill -9: no `except` and no clean-up of ours sees it."""


def write_half(text: str, file: Path) -> None:
    with open(file, "w") as out:
        out.write(text[:len(text) // 2])


def remove_half(folder: Path) -> None:
    """The model is gone, and all that says that the checkpoint was complete is still there."""
    if (folder / "model").exists():
        (folder / "model").unlink()


# All by which lib/checkpoint.py changes the disk, and how far each gets before the kill.
WRITERS = [(Path, "write_text", lambda file, text, **_: write_half(text, file)),
           (torch, "save", lambda state, file: write_half("no shard", file)),
           (shutil, "rmtree", lambda folder, **_: remove_half(folder)),
           (Path, "mkdir", lambda folder, **_: None),
           (Path, "rename", lambda folder, target: None),
           (Path, "replace", lambda file, target: None),
           (os, "sync", lambda: None)]


def kill_at(number: int, patch: pytest.MonkeyPatch) -> None:
    """The process dies in the number-th change of the disk."""
    changes = itertools.count()

    def mortal(whole, half):
        def call(*arguments, **options):
            if next(changes) == number:
                half(*arguments, **options)
                raise Killed
            return whole(*arguments, **options)
        return call

    for owner, name, half in WRITERS:
        patch.setattr(owner, name, mortal(getattr(owner, name), half))


def test_a_kill_at_any_moment_of_a_save_loses_nothing(tmp_path, monkeypatch):
    """One of both checkpoints is always whole, and is the one that is found; the run goes on from
    it, and what the dead one left does not disturb it."""
    found = []
    for number in itertools.count():
        folder, trained, states = tmp_path / str(number), Trained(), {}
        folder.mkdir()
        trained.step()
        trained.save(folder, 1)
        states[1] = trained.state()
        trained.step()
        states[2] = trained.state()
        with monkeypatch.context() as patch:
            kill_at(number, patch)
            try:
                trained.save(folder, 2)
                break                                             # it had fewer changes
            except Killed:
                pass
        again = Trained()
        found.append(again.load(newest(folder)))
        assert again.state() == states[found[-1]]
        assert (newest(folder) / "model").read_text() == str(again.weights.tolist())
        again.save(folder, 3)
        assert [path.name for path in folder.iterdir()] == ["step-000003"]
    assert found == sorted(found) and found.count(1) >= 8 and found.count(2) == 2


def test_a_random_stream_of_another_device_is_left_alone(tmp_path):
    """A CPU's state does not fit CUDA's generator: the run goes on with a fresh one."""
    trained = Trained()
    trained.save(tmp_path, 1)
    kept = []
    other = SimpleNamespace(get_state=lambda: torch.zeros(16), set_state=kept.append)
    assert checkpoint.load(tmp_path / "step-000001", trained.optimisers, other) == 1 and not kept


# ---- settings ------------------------------------------------------------------------------------

def test_changed_settings_are_named(tmp_path):
    """Each with both values. Free ones may change; one that an older run did not have is no
    change."""
    (tmp_path / "train.json").write_text(json.dumps({"seed": 0, "lr": .1, "algo": "mapo",
                                                     "steps": 10}))
    now = {"seed": 0, "lr": .1, "algo": "mapo", "steps": 20, "credit": "look"}
    check_settings(tmp_path, now, {"steps"})
    (tmp_path / "older").mkdir()
    (tmp_path / "older/train.json").write_text(json.dumps({"model": str(ROOT / "tiny")}))
    check_settings(tmp_path / "older", {"model": "tiny"}, set())        # its full path, once
    with pytest.raises(ValueError) as error:
        check_settings(tmp_path, now | {"seed": 1, "algo": "grpo"}, {"steps"})
    assert str(error.value) == (f"{tmp_path}: --resume expected the same settings, found --seed 0 "
                                "there and 1 now; --algo 'mapo' there and 'grpo' now")


# ---- lines of numbers ----------------------------------------------------------------------------

LINES = [{"step": step, "accuracy": step / 10} for step in (1, 2, 2, 3, 4)]


def test_lines_after_the_checkpoint_go(tmp_path):
    """And a line that the kill has torn. The others stay, character for character."""
    file = tmp_path / "metrics.jsonl"
    keep_lines(file, 2)
    assert not file.exists()                                      # there is none to change
    append(file, LINES[:2])
    append(file, LINES[2:])
    before = file.read_text().splitlines()
    with file.open("a") as lines:
        lines.write('{"step": 2, "accu')
    keep_lines(file, 2)
    assert file.read_text() == "".join(line + "\n" for line in before[:3])
    append(file, [{"step": 3}])
    assert [json.loads(line)["step"] for line in file.open()] == [1, 2, 2, 3]
    keep_lines(file, 0)
    assert file.read_text() == "" and list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("number", [0, 1])
def test_a_kill_while_lines_are_dropped_loses_none(number, tmp_path, monkeypatch):
    file = tmp_path / "metrics.jsonl"
    append(file, LINES)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(number, patch)
        keep_lines(file, 2)
    assert [json.loads(line) for line in file.open()] == LINES
    keep_lines(file, 2)
    assert [json.loads(line) for line in file.open()] == LINES[:3]


def test_the_demonstration(tmp_path, monkeypatch, capsys):
    """What a run's checkpoint holds; a folder without one is named."""
    append(tmp_path / "metrics.jsonl", LINES)
    Trained().save(tmp_path, 4)
    monkeypatch.setattr(sys, "argv", ["checkpoint.py", str(tmp_path)])
    runpy.run_path(str(ROOT / "lib/checkpoint.py"), run_name="__main__")
    said = capsys.readouterr().out
    assert "bytes  step-000004/optimiser-1/optimiser-0-of-1.pt" in said
    monkeypatch.setattr(sys, "argv", ["checkpoint.py", str(tmp_path / "none")])
    with pytest.raises(SystemExit, match="none: holds no checkpoint"):
        runpy.run_path(str(ROOT / "lib/checkpoint.py"), run_name="__main__")


# ---- one process a folder, whole files, signals --------------------------------------------------

HOLD = """import sys, time
from pathlib import Path
from lib.checkpoint import lock
lock(Path(sys.argv[1]))
print("locked", flush=True)
time.sleep(60)"""


def test_a_folder_belongs_to_one_process(tmp_path):
    """The second process is refused by name; a new run takes the next folder; a killed process
    holds nothing."""
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], cwd=ROOT,
                              stdout=subprocess.PIPE, text=True)
    (tmp_path / "run").mkdir(exist_ok=True)
    try:
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(ValueError, match=f"run: process {holder.pid} writes there"):
            checkpoint.lock(tmp_path / "run")
        assert checkpoint.choose_folder(tmp_path / "run", resume=False).name == "run-2"
    finally:
        holder.kill()
        holder.wait()
    checkpoint.lock(tmp_path / "run")
    checkpoint.lock(tmp_path / "run")                    # it is ours already
    assert checkpoint.choose_folder(tmp_path / "other", resume=False).name == "other"


@pytest.fixture
def saved(policy, tmp_path):
    """A checkpoint of tiny/ without an optimiser, as a run writes it."""
    checkpoint.save(tmp_path, 3, policy, [], torch.Generator(), {"lr": 1.})
    return checkpoint.newest(tmp_path)


@pytest.mark.parametrize("file", ["model.safetensors", "state-0.pt", "tokenizer.json",
                                  "train.json"])
def test_a_changed_file_is_named(saved, file):
    """One byte, somewhere in the middle; or the file is gone."""
    checkpoint.verify(saved)
    content = bytearray((saved / file).read_bytes())
    content[len(content) // 2] ^= 1
    (saved / file).write_bytes(content)
    with pytest.raises(ValueError, match=f"as they were saved, found {file} missing or changed"):
        checkpoint.verify(saved)
    (saved / file).unlink()
    with pytest.raises(ValueError, match=f"found {file} missing"):
        checkpoint.verify(saved)


def test_weights_that_are_not_finite_are_never_saved(policy, saved, tmp_path, monkeypatch):
    weight = policy.model.lm_head.weight
    value = weight.data[3, 5].clone()
    weight.data[3, 5] = float("nan")
    try:
        with pytest.raises(ValueError, match="step-000004: not saved, .* not finite"):
            checkpoint.save(tmp_path, 4, policy, [], torch.Generator(), {})
    finally:
        weight.data[3, 5] = value
    assert checkpoint.newest(tmp_path) == saved


def test_the_first_signal_is_noted_and_the_second_ends(monkeypatch):
    """The first says so, even if nobody listens."""
    def write(file: int, words: bytes) -> None:
        said.append(words)
        raise BrokenPipeError

    before, said = signal.getsignal(signal.SIGINT), []
    monkeypatch.setattr(os, "write", write)
    with pytest.raises(KeyboardInterrupt), checkpoint.signals_noted() as stopped:
        assert not stopped()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stopped() and b"stopping after this step" in said[0]
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before and len(said) == 1
