"""ZeRO-2: any split over ranks and micro-batches is AdamW, nothing hangs, checkpoints fit any number of ranks."""
import os
import time

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from lib.shard import RankFailed, ShardedAdamW, agree, all_sum, cleanup, cut, even, launch, rank, read_shards, setup, squared, together, world

X, Y = torch.randn(24, 8, generator=torch.Generator().manual_seed(1)).split([5, 3], 1)
SMALL = 20      # elements: several buckets, some with padding, and a parameter larger than a bucket


def network(dtype=torch.float32) -> torch.nn.ModuleDict:
    """125 parameters: no multiple of 2 or 3. `spare` takes part only where a batch asks for it."""
    torch.manual_seed(0)
    net = torch.nn.ModuleDict({"first": torch.nn.Linear(5, 9), "spare": torch.nn.Linear(5, 8), "second": torch.nn.Linear(9, 2)})
    net.register_parameter("scale", torch.nn.Parameter(torch.ones(3)))
    return net.to(dtype)


def loss(net, rows, spare=False):
    """A part of the sum over 24 rows; with `spare` from two more matrices."""
    x, y = X[rows].to(net.scale.dtype), Y[rows]
    out = net.second(torch.tanh(net.first(x))).sum(-1, keepdim=True) * net.scale
    return ((out - y).square().sum() + (net.spare(x).square().sum() if spare else 0)) / 24


def values(net):
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def steps(net, optimiser, count, batches=None, lr=1e-2):
    """`count` steps; `batches`: this rank's micro-batches (rows, spare), by default its share of the rows as one."""
    batches = [(list(range(rank(), 24, world())), False)] if batches is None else batches
    for _ in range(count):
        optimiser.zero_grad()
        for batch in even(batches):
            if batch is not None:
                loss(net, *batch).backward()
            optimiser.finish_micro_batch()
        norm = optimiser.clip(.5)
        changed = optimiser.step(lr)
    return norm, changed


def ours(batches=None, count=3, dtype=torch.float32, lr=1e-2, **options):
    """-> parameters, (norm, share changed) after `count` steps."""
    net = network(dtype)
    optimiser = ShardedAdamW(list(net.parameters()), **(dict(weight_decay=.1, bucket=SMALL) | options))
    last = steps(net, optimiser, count, batches, lr)
    return values(net), last, optimiser


def by_torch(count=3, spare_rows=()):
    """The same by torch.optim.AdamW, the whole batch at once -> parameters, last norm."""
    net = network()
    optimiser = torch.optim.AdamW(net.parameters(), 1e-2, (.9, .95), weight_decay=.1)
    for _ in range(count):
        optimiser.zero_grad()
        loss(net, list(range(24))).backward()
        if spare_rows:
            (loss(net, spare_rows, True) - loss(net, spare_rows)).backward()
        for p in net.parameters():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), .5).item()
        optimiser.step()
    return values(net), norm


def thirds(r):
    """Uneven: rank 0 has three micro-batches, the second with `spare`; rank 1 one; rank 2 none."""
    rows = list(range(24))
    return [[(rows[:5], False), (rows[5:9], True), (rows[9:15], False)], [(rows[15:], False)], []][r]


# ---- what the ranks do; each writes what it saw, the tests below look at it -------------------------------------------

def work(folder):
    setup(timeout=60)
    seen = {}
    for name, batches in {"one": None, "four": [(list(range(rank(), 24, world()))[i::4], False) for i in range(4)],
                          "uneven": thirds(rank())}.items():
        seen[name], (seen[f"{name} norm"], _), optimiser = ours(batches)
    seen["bytes"] = optimiser.bytes()
    seen["bf16"], _, optimiser = ours(dtype=torch.bfloat16)
    seen["sum"], seen["tensor sum"], seen["even"] = all_sum(rank() + .5), all_sum(torch.tensor([1, rank()])), even([7] * rank())

    net = network()                             # four steps without a stop; a checkpoint after two, and one from before
    optimiser = ShardedAdamW(list(net.parameters()), weight_decay=.1, bucket=SMALL)
    steps(net, optimiser, 2)
    os.makedirs(f"{folder}/after-{world()}", exist_ok=True)
    optimiser.save(f"{folder}/after-{world()}")
    steps(net, optimiser, 2)
    seen["straight"], seen["resumed"] = values(net), resumed(f"{folder}/after-{world()}")
    seen["resharded"] = resumed(f"{folder}/after-1")
    try:                                        # only one rank has a file that does not fit: both must say so
        with together():
            read_shards(f"{folder}/after-{world()}", [b.size for b in optimiser.buckets] if rank() else [1])
    except Exception as e:
        seen["mismatch"] = f"{type(e).__name__} {e}"
    torch.save(seen, f"{folder}/seen-{rank()}-of-{world()}")


def resumed(folder):
    """Two more steps from a checkpoint, by a network that started elsewhere."""
    net = network()
    with torch.no_grad():
        [p.add_(1) for p in net.parameters()]
    optimiser = ShardedAdamW(list(net.parameters()), weight_decay=.1, bucket=SMALL)
    optimiser.load(folder)
    steps(net, optimiser, 2)
    return values(net)


def fail(folder):
    """Rank 1 fails, then falls silent; rank 0 must get away each time, and say who it was."""
    setup(timeout=3)
    seen, start = {}, time.time()
    try:
        with together():
            if rank() == 1:
                raise MemoryError("too many pixels")
    except (MemoryError, RankFailed) as e:
        seen["failed"] = f"{type(e).__name__} {e}"
    seen["after"] = time.time() - start
    agree()                                     # and they can go on together
    if rank() == 0:
        for name, call in {"silent": agree, "collective": lambda: all_sum(1.)}.items():
            start = time.time()
            try:
                call()
            except RuntimeError as e:
                seen[name], seen[f"{name} after"] = f"{type(e).__name__} {e}", time.time() - start
    else:
        time.sleep(9)
    torch.save(seen, f"{folder}/fail-{rank()}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Everything that needs processes, once. after-1 is written by this process, alone."""
    folder = tmp_path_factory.mktemp("shard")
    net = network()
    optimiser = ShardedAdamW(list(net.parameters()), weight_decay=.1, bucket=SMALL)
    steps(net, optimiser, 2)
    (folder / "after-1").mkdir()
    optimiser.save(folder / "after-1")
    for ranks in (2, 3):
        launch(work, ranks, str(folder))
    return folder


@pytest.fixture(scope="module", params=[2, 3], ids=["2 ranks", "3 ranks"])
def seen(folder, request):
    return [torch.load(folder / f"seen-{r}-of-{request.param}", weights_only=True) for r in range(request.param)]


# ---- alone -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("bucket", [1, SMALL, 10**6])
def test_equals_torch_adamw(bucket):
    """Ten steps with weight decay and clipping, whatever the buckets; and the norm before clipping."""
    parameters, (norm, _), _ = ours(count=10, bucket=bucket)
    reference, reference_norm = by_torch(count=10)
    assert (parameters - reference).abs().max() < 1e-6 and norm == pytest.approx(reference_norm, rel=1e-5)


def test_micro_batches_add_up_and_gradients_are_freed():
    parameters, _, optimiser = ours([(list(range(i, 24, 4)), False) for i in range(4)])
    assert (parameters - by_torch()[0]).abs().max() < 1e-6
    net = network()
    optimiser = ShardedAdamW(list(net.parameters()), bucket=SMALL)
    loss(net, [3, 4], True).backward()
    assert all(p.grad is None for p in net.parameters())           # freed
    optimiser.finish_micro_batch()
    optimiser.close()
    loss(net, [3, 4], True).backward()
    assert optimiser.norm() ** 2 == pytest.approx(sum(p.grad.square().sum().item() for p in net.parameters()), rel=1e-5)


def test_bf16_updates_are_not_lost():
    """Below 1, bf16 numbers lie 1/256 apart: 6000 updates of 1e-6 cannot move a weight one by one, but together they do."""
    p = torch.nn.Parameter(torch.ones(100, dtype=torch.bfloat16))
    optimiser = ShardedAdamW([p])
    shares = []
    for _ in range(6000):
        optimiser.buckets[0].gradient.fill_(1.)
        shares.append(optimiser.step(1e-6))
    assert optimiser.buckets[0].master[0].item() == pytest.approx(1 - 6000e-6, abs=2e-4) and p[0] < 1
    assert set(shares) == {0., 1.} and shares[0] == 0 and sum(shares) == 1 + (p[0] < .9945)


def test_two_backwards_in_one_micro_batch_are_refused():
    net = network()
    optimiser = ShardedAdamW(list(net.parameters()), bucket=SMALL)
    loss(net, [0]).backward()
    with pytest.raises(RuntimeError, match="finish_micro_batch"):
        loss(net, [0]).backward()
    optimiser.zero_grad()                                          # and it can go on
    loss(net, [0]).backward()


def test_tied_weights_have_one_gradient():
    """An embedding that is also the output, recomputed in backward as in policy.py: both parts, once."""
    e = torch.nn.Parameter(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)))
    logits = lambda h: (h @ e.T).square().sum()
    f = lambda: checkpoint(logits, e[torch.tensor([1, 2])], use_reentrant=False)
    expected, = torch.autograd.grad(f(), e)
    optimiser = ShardedAdamW([e])
    f().backward()
    optimiser.finish_micro_batch()
    assert torch.allclose(optimiser.buckets[0].gradient.view(4, 4), expected)


def test_squared_norm_of_many_elements():
    """Ones beyond 2^24, where adding in float32 stops; expand() costs no memory. And values of very different size."""
    assert squared(torch.ones(1).expand(2**28 + 5)).item() == pytest.approx(2**28 + 5, rel=1e-6)
    x = torch.randn(10**6, generator=torch.Generator().manual_seed(0)) ** 5
    assert squared(x).item() == pytest.approx(x.double().square().sum().item(), rel=1e-6)


def test_cut_is_a_slice_of_the_concatenation():
    whole = torch.arange(10)
    assert all(torch.equal(cut(list(whole.split(3)), i, j), whole[i:j]) for i in range(11) for j in range(i, 11))


def test_alone_all_is_local():
    assert (setup("cpu"), rank(), world(), all_sum(2.5), even([1, 2])) == ("cpu", 0, 1, 2.5, [1, 2])
    agree()
    with pytest.raises(KeyError), together():
        raise KeyError("mine")
    with pytest.raises(RuntimeError, match="in words"):
        agree("in words")
    cleanup()


# ---- together --------------------------------------------------------------------------------------------------------

def test_ranks_agree_with_torch_and_with_each_other(seen):
    """1, 2 or 3 ranks, 1 or 4 micro-batches each: one set of parameters, and the unsharded norm."""
    reference, norm = by_torch()
    for s in seen:
        for name in ("one", "four"):
            assert torch.equal(s[name], seen[0][name]) and (s[name] - reference).abs().max() < 1e-6
            assert s[f"{name} norm"] == seen[0][f"{name} norm"] == pytest.approx(norm, rel=1e-5)


def test_uneven_micro_batches_and_unused_parameters_do_not_hang(seen):
    """Three, one and no micro-batches; a layer that only one micro-batch of one rank uses."""
    reference, norm = by_torch(spare_rows=[5, 6, 7, 8])
    for s in seen:
        assert torch.equal(s["uneven"], seen[0]["uneven"]) and (s["uneven"] - reference).abs().max() < 1e-6
        assert s["uneven norm"] == pytest.approx(norm, rel=1e-5)


def test_bf16_ranks_agree(seen):
    """To the spacing of bf16, since the ranks' gradients are themselves rounded to it."""
    alone, _, _ = ours(dtype=torch.bfloat16)
    assert all(torch.equal(s["bf16"], seen[0]["bf16"]) for s in seen) and (seen[0]["bf16"] - alone).abs().max() < 2**-7


def test_shards_shrink(seen):
    """16 bytes a parameter over N, and at most N - 1 elements of padding a bucket."""
    alone = ours(count=1)[2]
    whole = alone.bytes()
    assert whole == 16 * 125 and all(whole <= len(seen) * s["bytes"] < whole + 16 * len(seen) * len(alone.buckets) for s in seen)


def test_sums_and_even_lists(seen):
    n = len(seen)
    for r, s in enumerate(seen):
        assert s["sum"] == n * (n - 1) / 2 + n / 2 and s["tensor sum"].tolist() == [n, n * (n - 1) / 2]
        assert s["even"] == [7] * r + [None] * (n - 1 - r)


def test_resume_on_the_same_ranks_is_exact(seen):
    assert all(torch.equal(s["straight"], s["resumed"]) for s in seen)


def test_resume_on_other_ranks(seen, folder):
    """1 -> N and N -> 1."""
    for s in seen:
        assert (s["resharded"] - s["straight"]).abs().max() < 1e-6
    assert (resumed(folder / f"after-{len(seen)}") - seen[0]["straight"]).abs().max() < 1e-6


def test_resharded_state_is_the_same_numbers(folder):
    """2 and 3 ranks' files, read by one: every moment and master as that of one rank, but for the order of sums."""
    states = []
    for ranks in (1, 2, 3):
        optimiser = ShardedAdamW(list(network().parameters()), bucket=SMALL)
        optimiser.load(folder / f"after-{ranks}")
        states.append(torch.cat([t for name in ("master", "mean", "square") for t in optimiser.state_dict()[name]]))
    assert (states[1] - states[0]).abs().max() < 1e-6 and (states[2] - states[0]).abs().max() < 1e-6


def test_a_mismatch_on_one_rank_is_everybodys_error(seen):
    assert seen[0]["mismatch"].startswith("ValueError") and "expected rank, world, steps, bucket sizes" in seen[0]["mismatch"]
    assert all(s["mismatch"].startswith(f"RankFailed rank 0 of {len(seen)}: ValueError") for s in seen[1:])


def test_missing_and_broken_files(folder, tmp_path):
    optimiser = ShardedAdamW(list(network().parameters()), bucket=SMALL)
    with pytest.raises(FileNotFoundError, match="found N = none"):
        optimiser.load(tmp_path)
    (tmp_path / "optimiser-1-of-2.pt").write_bytes((folder / "after-2" / "optimiser-1-of-2.pt").read_bytes())
    with pytest.raises(FileNotFoundError, match="optimiser-0-of-2.pt: missing"):
        optimiser.load(tmp_path)
    (tmp_path / "optimiser-0-of-2.pt").write_bytes(b"half a file")
    with pytest.raises(ValueError, match="optimiser-0-of-2.pt: not an optimiser's shard"):
        optimiser.load(tmp_path)
    (tmp_path / "optimiser-0-of-2.pt").write_bytes((tmp_path / "optimiser-1-of-2.pt").read_bytes())
    with pytest.raises(ValueError, match=r"optimiser-0-of-2.pt: expected rank, world, steps, bucket sizes \[0, 2.*found \[1, 2"):
        optimiser.load(tmp_path)
    (tmp_path / "optimiser-0-of-1.pt").touch()
    with pytest.raises(FileNotFoundError, match=r"found N = \[1, 2\]"):
        optimiser.load(tmp_path)


def test_a_failing_or_silent_rank_is_named_in_time(tmp_path):
    """The timeout is 3 s. An error arrives at once; silence, at agree() or in a collective, ends with the timeout."""
    launch(fail, 2, str(tmp_path))
    zero, one = (torch.load(tmp_path / f"fail-{r}", weights_only=True) for r in (0, 1))
    assert one["failed"] == "MemoryError too many pixels"
    assert zero["failed"] == "RankFailed rank 1 of 2: MemoryError: too many pixels" and zero["after"] < 2.9
    assert zero["silent"] == "RankFailed rank 1 of 2: silent, waited for up to 3 s" and 2.9 < zero["silent after"] < 6
    assert zero["collective after"] < 6
