"""ZeRO-2: any split over ranks and micro-batches is AdamW, nothing hangs, a failing rank is named,
and a checkpoint fits any number of ranks."""
import os
import re
import time
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from lib.shard import (STATES, RankFailed, ShardedAdamW, agree, all_sum, cleanup, demonstrate, even,
                       launch, named, rank, ranks, read_shards, setup, together)

ROWS = list(range(24))
DATA = torch.randn(24, 8, generator=torch.Generator().manual_seed(1))
SMALL = 20      # elements: several buckets, some with padding, and a parameter larger than a bucket


def network(dtype: torch.dtype = torch.float32) -> torch.nn.ModuleDict:
    """125 parameters, no multiple of 2 or 3. `spare` takes part only where a batch asks for it."""
    torch.manual_seed(0)
    net = torch.nn.ModuleDict({"first": torch.nn.Linear(5, 9), "spare": torch.nn.Linear(5, 8),
                               "second": torch.nn.Linear(9, 2)})
    net.register_parameter("scale", torch.nn.Parameter(torch.ones(3)))
    return net.to(dtype)


def loss(net, rows: list[int], spare: bool = False) -> torch.Tensor:
    """A part of the sum over 24 rows; with `spare` its layer, too, adds to it."""
    x, y = DATA[rows, :5].to(net.scale.dtype), DATA[rows, 5:]
    out = net.second(torch.tanh(net.first(x))).sum(-1, keepdim=True) * net.scale
    total = (out - y).square().sum()
    if spare:
        total = total + net.spare(x).square().sum()
    return total / 24


def values(net) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def sharded(net, **options) -> ShardedAdamW:
    return ShardedAdamW(list(net.parameters()), **dict(weight_decay=.1, bucket=SMALL) | options)


def share(pieces: int = 1) -> list[tuple]:
    """This rank's micro-batches (rows, spare): every N-th row, in so many pieces."""
    own = ROWS[rank()::ranks()]
    return [(own[i::pieces], False) for i in range(pieces)]


def thirds(number: int) -> list[tuple]:
    """Uneven: rank 0 has three micro-batches, the second with `spare`; rank 1 one; rank 2 none."""
    if number == 0:
        return [(ROWS[:5], False), (ROWS[5:9], True), (ROWS[9:15], False)]
    return [(ROWS[15:], False)] if number == 1 else []


def steps(net, optimiser: ShardedAdamW, count: int, batches: list[tuple]) -> float:
    """`count` steps -> the norm of the last gradient, before it was clipped."""
    for _ in range(count):
        optimiser.zero_grad()
        for batch in even(batches):
            if batch is not None:
                loss(net, *batch).backward()
            optimiser.finish_micro_batch()
        norm = optimiser.clip(.5)
        optimiser.step(1e-2)
    return norm


def ours(batches: list[tuple], count: int = 3, dtype: torch.dtype = torch.float32,
         **options) -> tuple[torch.Tensor, float]:
    """Parameters and last norm after `count` steps from the start."""
    net = network(dtype)
    norm = steps(net, sharded(net, **options), count, batches)
    return values(net), norm


def by_torch(count: int = 3, spare_rows: list[int] = ()) -> tuple[torch.Tensor, float]:
    """The same by torch.optim.AdamW, the whole batch at once."""
    net = network()
    optimiser = torch.optim.AdamW(net.parameters(), 1e-2, (.9, .95), weight_decay=.1)
    for _ in range(count):
        optimiser.zero_grad()
        loss(net, ROWS).backward()
        if spare_rows:
            (loss(net, spare_rows, True) - loss(net, spare_rows)).backward()
        for p in net.parameters():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), .5).item()
        optimiser.step()
    return values(net), norm


def resumed(folder) -> torch.Tensor:
    """Two more steps from a checkpoint, by a network that started elsewhere."""
    net = network()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(1)
    optimiser = sharded(net)
    optimiser.load(folder)
    steps(net, optimiser, 2, share())
    return values(net)


def reshard(source, target) -> None:
    """Load what any number of ranks saved, and save it on the present ones."""
    optimiser = sharded(network())
    optimiser.load(source)
    target.mkdir()
    optimiser.save(target)


# ---- alone ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("bucket", [1, SMALL, 10**6])
def test_equals_torch_adamw(bucket):
    """Ten steps with weight decay and clipping, whatever the buckets; and the norm before it."""
    parameters, norm = ours(share(), 10, bucket=bucket)
    expected, expected_norm = by_torch(10)
    assert (parameters - expected).abs().max() < 1e-6 and expected_norm > .5     # it was clipped
    assert norm == pytest.approx(expected_norm, rel=1e-5)


def test_micro_batches_add_up():
    parameters, _ = ours(share(4))
    assert (parameters - by_torch()[0]).abs().max() < 1e-6


def test_gradients_are_freed():
    """After a micro-batch no parameter holds a gradient; the optimiser has their sum."""
    net = network()
    optimiser = sharded(net)
    loss(net, [3, 4], True).backward()
    expected = sum(p.grad.square().sum().item() for p in net.parameters() if p.grad is not None)
    optimiser.finish_micro_batch()
    assert all(p.grad is None for p in net.parameters())
    assert optimiser.norm() ** 2 == pytest.approx(expected, rel=1e-5)


def test_bf16_updates_are_not_lost():
    """Below 1, bf16 numbers lie 1/256 apart: 3000 updates of 1e-6 cannot move a weight one by one.
    The masters add them up, and 1 - 0.003 is nearer to the next number: one of them moves it."""
    p = torch.nn.Parameter(torch.ones(100, dtype=torch.bfloat16))
    optimiser = ShardedAdamW([p])
    shares = []
    for _ in range(3000):
        optimiser.buckets[0].gradient.fill_(1.)
        shares.append(optimiser.step(1e-6))
    assert optimiser.buckets[0].master[0].item() == pytest.approx(1 - 3000e-6, abs=1e-4)
    assert (p == 1 - 1 / 256).all() and shares[0] == 0 and sum(shares) == 1


def test_a_backward_that_failed_half_way_is_forgotten():
    net = network()
    optimiser = sharded(net)
    loss(net, [0]).backward()                               # and no finish_micro_batch
    norm = steps(net, optimiser, 1, [([1], False)])
    assert norm == ours([([1], False)], 1)[1]


def test_tied_weights_have_one_gradient():
    """An embedding that is also the output, recomputed in backward: both parts arrive, once."""
    e = torch.nn.Parameter(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)))

    def output(hidden):
        return (hidden @ e.T).square().sum()

    def forward():
        return checkpoint(output, e[torch.tensor([1, 2])], use_reentrant=False)

    expected, = torch.autograd.grad(forward(), e)
    optimiser = ShardedAdamW([e])
    forward().backward()
    optimiser.finish_micro_batch()
    assert torch.allclose(optimiser.buckets[0].gradient.view(4, 4), expected)


def test_norm_of_many_elements():
    """Of very different size; norm() itself, on the CPU, adds one after the other."""
    x = torch.randn(10**6, generator=torch.Generator().manual_seed(0)) ** 5
    optimiser = ShardedAdamW([torch.nn.Parameter(x)])
    optimiser.buckets[0].gradient.copy_(x)
    assert optimiser.norm() == pytest.approx(x.double().norm().item(), rel=1e-6)


def test_alone_all_is_local():
    assert (setup("cpu"), rank(), ranks()) == ("cpu", 0, 1)
    assert all_sum(2.5) == all_sum(2.5, "MAX") == 2.5 and even([1, 2]) == [1, 2]
    agree()
    with pytest.raises(KeyError), together():
        raise KeyError("mine")
    assert named(ValueError("one line")) == "one line"
    cleanup()


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "CPU", ""])
def test_another_device_is_named(device):
    with pytest.raises(ValueError, match=f"--device: expected cpu or cuda, found {device}$"):
        setup(device)


@pytest.mark.parametrize("device, count", [("cuda", 0), ("cuda:1", 1)])
def test_a_gpu_that_is_not_there_is_named(device, count, monkeypatch):
    """torch's version says whether it is a CPU build."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(count))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)      # a driver may be too old for it
    words = f"--device {device}: torch {torch.__version__} sees {count} GPU(s)"
    with pytest.raises(ValueError, match=re.escape(words)):
        setup(device)


# ---- what the ranks do; each writes what it saw, the tests below look at it ----------------------

def work(folder: Path) -> None:
    """Everything that 2 and 3 ranks do alike. folder/after-1: what one rank saved."""
    setup(timeout=60)
    seen = {"one": ours(share()), "four": ours(share(4)), "uneven": ours(thirds(rank())),
            "bf16": ours(share(), dtype=torch.bfloat16)[0],
            "sum": all_sum(rank() + .5), "largest": all_sum(rank() + .5, "MAX"),
            "even": even([7] * rank()), "bytes": sharded(network()).bytes()}
    net, own = network(), folder / f"after-{ranks()}"       # four steps, with a checkpoint half-way
    optimiser = sharded(net)
    steps(net, optimiser, 2, share())
    with together():
        own.mkdir(exist_ok=True)
    optimiser.save(own)
    steps(net, optimiser, 2, share())
    seen |= {"straight": values(net), "resumed": resumed(own),
             "resharded": resumed(folder / "after-1")}
    sizes = [b.size for b in optimiser.buckets]
    try:                                    # only rank 0 expects other sizes: all must say so
        with together():
            read_shards(own, sizes if rank() else [1])
    except (ValueError, RankFailed) as error:
        seen["mismatch"] = f"{type(error).__name__} {error}"
    torch.save(seen, folder / f"seen-{rank()}-of-{ranks()}")


def part(folder: Path) -> None:
    """Two ranks go on with what one rank saved of two ranks' shards. Then rank 1 fails, and at last
    falls silent. Rank 0 must get away each time, and say who it was."""
    (folder / f"ready-{rank_to_be()}").touch()
    while not (folder / f"ready-{1 - rank_to_be()}").exists():
        time.sleep(.05)                     # who starts late is not silent
    setup(timeout=3)
    seen, start = {"back": resumed(folder / "2-to-1")}, time.time()
    try:
        with together():
            if rank() == 1:
                raise MemoryError("too many pixels")
    except (MemoryError, RankFailed) as error:
        seen["failed"] = named(error), time.time() - start
    agree()                                 # and they can go on together
    if rank() == 0:
        seen["agree"] = error_of(agree)
        seen["collective"] = error_of(all_sum, 1.)
    torch.save(seen, folder / f"part-{rank()}")
    while not (folder / "part-0").exists():
        time.sleep(.05)


def rank_to_be() -> int:
    return int(os.environ["RANK"])


def error_of(call, *arguments) -> tuple[str, float]:
    """What the call fails with, and after how many seconds."""
    start = time.time()
    try:
        call(*arguments)
    except RuntimeError as error:
        return named(error), time.time() - start


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Everything that needs processes, once."""
    folder = tmp_path_factory.mktemp("shard")
    net = network()
    optimiser = sharded(net)
    steps(net, optimiser, 2, share())
    (folder / "after-1").mkdir()
    optimiser.save(folder / "after-1")
    for count in (2, 3):
        launch(work, count, folder)
    reshard(folder / "after-2", folder / "2-to-1")
    launch(part, 2, folder)
    return folder


@pytest.fixture(scope="module", params=[2, 3], ids=["2 ranks", "3 ranks"])
def seen(folder, request):
    """What each rank saw."""
    count = request.param
    return [torch.load(folder / f"seen-{number}-of-{count}", weights_only=True)
            for number in range(count)]


# ---- together ------------------------------------------------------------------------------------

@pytest.mark.parametrize("case, spare_rows", [("one", []), ("four", []), ("uneven", [5, 6, 7, 8])])
def test_ranks_agree_with_torch_and_with_each_other(case, spare_rows, seen):
    """2 or 3 ranks; one micro-batch, four, or three on one rank and none on another, and a layer
    that only one micro-batch of one rank uses: torch's parameters, and the unsharded norm."""
    expected, expected_norm = by_torch(spare_rows=spare_rows)
    first, first_norm = seen[0][case]
    assert (first - expected).abs().max() < 1e-6
    assert first_norm == pytest.approx(expected_norm, rel=1e-5)
    for other in seen[1:]:
        assert torch.equal(other[case][0], first) and other[case][1] == first_norm


def test_bf16_ranks_agree(seen):
    """To the spacing of bf16, since each rank's gradient is itself rounded to it."""
    alone, _ = ours(share(), dtype=torch.bfloat16)
    assert all(torch.equal(s["bf16"], seen[0]["bf16"]) for s in seen)
    assert (seen[0]["bf16"] - alone).abs().max() < 2**-7


def test_shards_shrink(seen):
    """16 bytes a parameter over N, and at most N - 1 elements of padding a bucket."""
    alone, count = sharded(network()), len(seen)
    assert alone.bytes() == 16 * 125
    most = 16 * (125 + (count - 1) * len(alone.buckets))
    assert all(16 * 125 <= count * s["bytes"] <= most for s in seen)


def test_sums_and_even_lists(seen):
    """Of 1/2, 3/2, ..: the sum is N^2 / 2."""
    count = len(seen)
    for number, s in enumerate(seen):
        assert s["sum"] == count ** 2 / 2 and s["largest"] == count - .5
        assert s["even"] == [7] * number + [None] * (count - 1 - number)


# ---- checkpoints ---------------------------------------------------------------------------------

def test_resume_on_the_same_ranks_is_exact(seen):
    assert all(torch.equal(s["straight"], s["resumed"]) for s in seen)


def test_resume_on_other_ranks(seen, folder):
    """1 -> N and N -> 1; the sums over ranks round in another order."""
    for s in seen:
        assert (s["resharded"] - s["straight"]).abs().max() < 1e-6
    assert (resumed(folder / f"after-{len(seen)}") - seen[0]["straight"]).abs().max() < 1e-6


def test_there_and_back_is_exact(folder):
    """2 -> 1 -> 2 ranks, and two steps: bit for bit the two ranks that never stopped."""
    for number in (0, 1):
        straight = torch.load(folder / f"seen-{number}-of-2", weights_only=True)["straight"]
        back = torch.load(folder / f"part-{number}", weights_only=True)["back"]
        assert torch.equal(back, straight)


def test_resharding_moves_numbers_and_changes_none(folder):
    """One rank's file is the shards of two, end to end, less their padding."""
    halves = read_shards(folder / "after-2", [b.size for b in sharded(network()).buckets])
    whole, = read_shards(folder / "2-to-1", [b.size for b in sharded(network()).buckets])
    for name in STATES:
        for i, size in enumerate(whole["sizes"]):
            joined = torch.cat([half[name][i] for half in halves])
            assert torch.equal(whole[name][i], joined[:size]) and not joined[size:].any()


def test_a_mismatch_on_one_rank_is_everybodys_error(seen):
    mine = seen[0]["mismatch"]
    assert mine.startswith("ValueError")
    assert "optimiser-0-of-" in mine and "expected bucket sizes [1], found [" in mine
    for other in seen[1:]:
        assert other["mismatch"].startswith(f"RankFailed rank 0 of {len(seen)}: ValueError")


@pytest.mark.parametrize("files, words", [
    ({}, "expected optimiser-0-of-N.pt, .* found none"),
    ({"1-of-2": "1-of-2"}, "found optimiser-1-of-2.pt"),
    ({"0-of-2": "0-of-2", "1-of-2": "1-of-2", "0-of-1": "0-of-2"},
     "found optimiser-0-of-1.pt, optimiser-0-of-2.pt, optimiser-1-of-2.pt")])
def test_missing_shards_are_named(files, words, folder, tmp_path):
    """files: what is there, and of which real shard it is a copy."""
    for name, source in files.items():
        shard = (folder / f"after-2/optimiser-{source}.pt").read_bytes()
        (tmp_path / f"optimiser-{name}.pt").write_bytes(shard)
    with pytest.raises(FileNotFoundError, match=words):
        sharded(network()).load(tmp_path)


# ---- a rank that fails ---------------------------------------------------------------------------

def test_a_failing_or_silent_rank_is_named_in_time(folder):
    """The timeout is 3 s. An error arrives at once. Silence, where ranks agree or in a collective,
    ends with the timeout."""
    zero, one = (torch.load(folder / f"part-{r}", weights_only=True) for r in (0, 1))
    assert one["failed"][0] == "rank 1 of 2: too many pixels"
    text, seconds = zero["failed"]
    assert text == "rank 1 of 2: MemoryError: too many pixels" and seconds < 2.9
    text, seconds = zero["agree"]
    assert text == "rank 1 of 2: silent, waited for up to 3 s" and 2.9 < seconds < 6
    text, seconds = zero["collective"]
    assert text.startswith("rank 0 of 2: ") and seconds < 6


def test_the_demonstration_on_one_rank(tmp_path):
    """One micro-batch and four: they differ by rounding. 16 bytes for each of 10,504 numbers."""
    for micro in (1, 4):
        demonstrate(micro, str(tmp_path / f"{micro}"))
    (one, size), (four, _) = (torch.load(tmp_path / micro, weights_only=True) for micro in "14")
    assert 0 < (one - four).abs().max() < 1e-6 and size == 16 * len(one) == 168_064
