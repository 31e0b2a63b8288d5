"""A run's folder: its name, its lines of numbers, its checkpoints. A kill loses nothing of it but
the steps since the last checkpoint.

    runs/mapo/metrics.jsonl          a line a step
    runs/mapo/step-000030/           the newest checkpoint, which is also the model: a standard
                                     directory, and beside it what `--resume` needs

What it teaches: a run can be killed at any moment. A checkpoint is written aside, and gets its name
when it is complete and on the disk; only then does the older one go. What a run needs to go on
*bit for bit*: the weights in float32 (the optimiser's masters), Adam's moments, how many steps
were done, and the state of every random stream. A folder belongs to one process at a time (`lock`).

Run it:  python -m lib.checkpoint runs/mapo        # the files of a run's newest checkpoint
"""
import fcntl
import json
import math
import os
import shutil
import signal
import sys
import time
import zlib
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError

from lib import shard
from lib.policy import Policy, not_finite


ROOT = Path(__file__).resolve().parent.parent


# ---- folders -------------------------------------------------------------------------------------

def holds_a_run(folder: Path) -> bool:
    """Of train.py, or of eval.py."""
    if (folder / "metrics.jsonl").exists() or checkpoints(folder):
        return True
    return any(folder.glob("predictions-*.jsonl"))


def next_folders(folder: Path) -> tuple[list[Path], Path]:
    """Of folder, folder-2, folder-3, ..: those that hold runs, and the first that holds none."""
    new, taken = folder, []
    while holds_a_run(new) or owner(new):
        taken.append(new)
        new = folder.with_name(f"{folder.name}-{len(taken) + 1}")
    return taken, new


def choose_folder(folder: Path, resume: bool) -> Path:
    """Where a run goes. A new one: the first of folder, folder-2, folder-3, .. that holds no run. A
    resumed one: the last before it that has a checkpoint.

    Raises FileNotFoundError if there is nothing to resume."""
    taken, new = next_folders(folder)
    if not resume:
        return new
    found = [path for path in taken if checkpoints(path)]
    if not found:
        raise FileNotFoundError(f"--resume: no checkpoint in {folder}; expected {folder}/step-*"
                                "/state-0.pt. A run is named after its settings: repeat them, "
                                "or name its folder by --out")
    return found[-1]


LOCKS = {}      # this process's: closing the file would unlock the folder


def lock(folder: Path) -> None:
    """This process alone may write into the folder, until it ends, however it ends.

    Raises ValueError if another one does."""
    if folder in LOCKS:
        return
    file = (folder / "lock").open("a+")
    for _ in range(20):                  # whoever only asks, as `owner` does, holds it for a moment
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            time.sleep(.05)
        except OSError:                  # a disk of a cluster that knows no locks
            break
    else:
        file.seek(0)
        raise ValueError(f"{folder}: process {file.read() or '?'} writes there; wait for its end, "
                         "or choose another --out")
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    LOCKS[folder] = file


def owner(folder: Path) -> str:
    """The other process that holds the folder's lock, or ""."""
    if folder in LOCKS or not (folder / "lock").is_file():
        return ""
    with (folder / "lock").open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)       # several may ask at once
        except BlockingIOError:
            return file.read() or "?"
        except OSError:
            pass
        return ""


def checkpoints(folder: Path) -> list[Path]:
    """The complete ones, oldest first."""
    return sorted(path for path in folder.glob("step-*") if (path / "state-0.pt").is_file())


def newest(folder: str | Path) -> Path:
    """The model directory that a name means: of a run its newest checkpoint, else the folder."""
    folder = Path(folder)
    found = checkpoints(folder)
    return found[-1] if found else folder


def noted(folder: str | Path) -> str:
    """A model's directory as a run notes it: within the project from ROOT on, so that both may be
    moved; else the full path. ROOT / noted(..) finds it."""
    path = newest(folder).resolve()
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


# ---- checkpoints ---------------------------------------------------------------------------------

def save(folder: Path, step: int, policy: Policy, optimisers: list[shard.ShardedAdamW],
         generator: torch.Generator, settings: dict) -> None:
    """Write folder/step-..: the model, and of each rank its part of the optimisers and its random
    state. All ranks must call it. `settings` are the run's own, checked when it is resumed.

    Raises ValueError if weights are not finite, and OSError if the disk is full: then the older
    checkpoint stays."""
    final, aside = folder / f"step-{step:06}", folder / "saving"
    with shard.together():
        if bad := not_finite(policy.model):
            raise ValueError(f"{final}: not saved, {len(bad)} weights are not finite ({bad[0]} ..)")
    try:
        write(aside, step, policy, optimisers, generator, settings)
    except shard.RankFailed:
        raise
    except (OSError, RuntimeError, SafetensorError) as error:     # torch and safetensors have these
        free = shutil.disk_usage(folder).free
        raise OSError(f"{aside}: cannot be written, the older checkpoint stands; {free:,} bytes "
                      f"are free on the disk: {error}") from error
    with shard.together():
        if shard.rank() == 0:
            (aside / "sums.json").write_text(json.dumps(sums(aside), indent=1))
            shutil.rmtree(final, ignore_errors=True)
            os.sync()               # a power cut must find the content ..
            aside.rename(final)
            os.sync()               # .. and its name, before the older one goes
            for old in checkpoints(folder):
                if old != final:
                    shutil.rmtree(old)


def write(aside: Path, step: int, policy: Policy, optimisers: list[shard.ShardedAdamW],
          generator: torch.Generator, settings: dict) -> None:
    """The files of a checkpoint, without its name."""
    with shard.together():
        if shard.rank() == 0:
            shutil.rmtree(aside, ignore_errors=True)
            policy.save(aside)
            (aside / "train.json").write_text(json.dumps(settings, indent=1))
            for number in range(len(optimisers)):
                (aside / f"optimiser-{number}").mkdir()
    for number, optimiser in enumerate(optimisers):
        optimiser.save(aside / f"optimiser-{number}")
    with shard.together():
        state = {"step": step, "generator": generator.get_state()}
        torch.save(state, aside / f"state-{shard.rank()}.pt")


def sums(folder: Path) -> dict[str, int]:
    """CRC-32 of each file, by its name in the folder: nothing may go on from damaged files."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        total = 0
        with path.open("rb") as file:
            while part := file.read(2**20):
                total = zlib.crc32(part, total)
        found[str(path.relative_to(folder))] = total
    return found


def verify(checkpoint: Path) -> None:
    """Raises ValueError with the names of files that are not as they were saved."""
    found = sums(checkpoint)
    saved = json.loads((checkpoint / "sums.json").read_text())
    wrong = [name for name in saved if found.get(name) != saved[name]]
    if wrong:
        raise ValueError(f"{checkpoint}: expected the files as they were saved, found "
                         f"{', '.join(wrong)} missing or changed")


def load(checkpoint: Path, optimisers: list[shard.ShardedAdamW], generator: torch.Generator) -> int:
    """Everything but the model directory; returns the steps done. All ranks must call it; they may
    be more or fewer than those that saved. A rank that was not there has a fresh random state."""
    for number, optimiser in enumerate(optimisers):
        optimiser.load(checkpoint / f"optimiser-{number}")
    with shard.together():
        step = torch.load(checkpoint / "state-0.pt", weights_only=True)["step"]
        mine = checkpoint / f"state-{shard.rank()}.pt"
        if mine.is_file():
            state = torch.load(mine, weights_only=True)["generator"]
            if len(state) == len(generator.get_state()):     # a CPU's does not fit CUDA's generator
                generator.set_state(state)
    return step


def check_settings(folder: Path, settings: dict, free: set[str], note: str = "train.json") -> None:
    """Raises ValueError if the run had other settings, by the note in its folder, but for the
    `free` ones: it would end as neither the old run nor a new one."""
    before = json.loads((folder / note).read_text(encoding="utf-8"))
    if note == "train.json" and "model" in before:    # an older one has the base's full path
        before["model"] = noted(ROOT / before["model"])
    changed = [f"--{name} {before[name]!r} there and {value!r} now"
               for name, value in settings.items()
               if name not in free and name in before and before[name] != value]
    if changed:
        raise ValueError(f"{folder}: --resume expected the same settings, "
                         f"found {'; '.join(changed)}")


# ---- lines of numbers ----------------------------------------------------------------------------

def append(file: Path, records: list[dict]) -> None:
    with file.open("a", encoding="utf-8") as lines:
        lines.writelines(json.dumps(record) + "\n" for record in records)


def keep_lines(file: Path, steps: int) -> None:
    """Drop the lines written after the checkpoint of `steps` steps, from which a run goes on. They
    are written aside first: a kill must not lose those that stay."""
    if file.is_file():
        lines = file.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if step_of(line) <= steps]
        aside = file.with_name(f"{file.name}.saving")
        aside.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        aside.replace(file)


def step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except ValueError:                                       # torn by a kill
        return math.inf


# ---- stopping ------------------------------------------------------------------------------------

@contextmanager
def signals_noted():
    """Within it the first Ctrl-C or SIGTERM does not end the process: the function that it gives
    says whether one came; rank 0 says so on the screen. The second is a KeyboardInterrupt."""
    came = []

    def note(number, frame) -> None:
        if came:
            raise KeyboardInterrupt
        came.append(number)
        if shard.rank() == 0:
            with suppress(OSError):              # nobody may listen any more
                os.write(2, b"\nstopping after this step; once more stops at once, unsaved\n")

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/mapo")
    if not checkpoints(folder):
        sys.exit(f"{folder}: holds no checkpoint; expected the folder of a run of train.py")
    for path in sorted(newest(folder).rglob("*")):
        if path.is_file():
            print(f"{path.stat().st_size:12,} bytes  {path.relative_to(folder)}")
