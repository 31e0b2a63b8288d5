"""ZeRO-2 by hand: every rank has all the weights, and 1/N of everything that the optimiser needs.

What it teaches: why a 3B model does not fit where its weights do, and the two collectives that make
it fit. Bytes a parameter with N ranks between two steps (ZeRO-2, arXiv 1910.02054, sec. 3 and 5):

                              N ranks       1     2     8
    weights, bf16             2             2     2     2
    gradient, float32         4 / N         4     2    .5
    master weights, float32   4 / N         4     2    .5
    Adam's moments, float32   8 / N         8     4     1
    in all                    2 + 16 / N   18    10     4   (a run's frozen base has 2 more)

Weights in float32, as in the default run, have 4 bytes, the base as well.

1. After each backward the gradients are summed over the ranks, in float32. Each rank keeps 1/N of
   the sum (reduce-scatter) and adds it over micro-batches. The gradient itself, which is as large
   as the weights, is freed.
2. step: AdamW on the 1/N, in float32. An update of 1e-6 is lost in a bf16 weight of 0.1, but not in
   the master.
3. The masters, cast to the model's dtype, become every rank's model again (all-gather).

Why 1 and 2 ranks agree on the same trajectories: the loss is a sum over them, with weights that are
fixed beforehand, so its gradient is the sum of the gradients of any parts. AdamW treats each number
by itself, so it does not matter which rank keeps which. Only rounding differs. (In training each
rank samples its own trajectories, so a run on two ranks is another run.)

A collective must be joined by all ranks, in the same order, or they wait for ever. A rank may have
fewer micro-batches than another, so `even` appends None, and for None it sends zeros.

What is left out: sharded weights (ZeRO-3), communication during computation, CPU offload.

Run it:  python -m lib.shard        # 1 and 2 ranks, 1 and 4 micro-batches agree to rounding
"""
import os
import re
import tempfile
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor


# ---- ranks ---------------------------------------------------------------------------------------

STORE = None        # torchrun's key-value store, if setup() found other ranks; it outlives a rank


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def setup(device: str = "cpu", timeout: float = 1800) -> str:
    """Join the ranks that torchrun started, if it did. Returns this rank's device.

    timeout: seconds to wait for another rank before it is an error; longer than any rank ever works
    alone. Raises ValueError for a GPU that is not there, or another device."""
    global STORE
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ValueError(f"--device: expected cpu or cuda, found {device}")
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    if device.startswith("cuda"):
        number = int(device[5:] or 0)
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if number >= count:
            raise ValueError(f"--device {device}: torch {torch.__version__} sees {count} GPU(s)")
        torch.cuda.set_device(number)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        limit = timedelta(seconds=timeout)
        STORE, number, count = next(dist.rendezvous("env://", timeout=limit))
        backend = "nccl" if device.startswith("cuda") else "gloo"
        dist.init_process_group(backend, store=dist.PrefixStore("group", STORE), timeout=limit,
                                rank=number, world_size=count)
    return device


def cleanup() -> None:
    """Leave, in a `finally`: gloo aborts a process that ends in a group whose collective failed."""
    global STORE
    if dist.is_initialized():
        dist.destroy_process_group()
    STORE = None


class RankFailed(RuntimeError):
    """Another rank failed or fell silent; the message names it."""


def named(error: Exception) -> str:
    """The error's text, with this rank's name if there are several."""
    if ranks() == 1 or isinstance(error, RankFailed):
        return str(error)
    return f"rank {rank()} of {ranks()}: {error}"


def agree(error: Exception | None = None) -> None:
    """All ranks meet here. If one brings an error, it raises that; the others raise RankFailed.

    A collective that one rank never joins could only time out. So the ranks meet in torchrun's
    store, a dictionary that all can reach: each writes its error, or an empty text, and then reads
    what the others wrote. So one that failed, or is silent until the timeout, can be named. The
    calls of `agree` are numbered: in the third one rank 0 writes under "3/0"."""
    if STORE:
        meeting = STORE.add(f"meetings of {rank()}", 1)
        STORE.set(f"{meeting}/{rank()}", f"{type(error).__name__}: {error}" if error else "")
    if error:
        raise error
    for other in range(ranks() if STORE else 0):
        try:
            STORE.wait([f"{meeting}/{other}"])
            trouble = STORE.get(f"{meeting}/{other}").decode()
        except RuntimeError:                    # the timeout, or the store itself is gone
            trouble = f"silent, waited for up to {STORE.timeout.total_seconds():.0f} s"
        if trouble:
            raise RankFailed(f"rank {other} of {ranks()}: {trouble}")


@contextmanager
def together():
    """`with together(): ...` is left by all ranks, or all raise. Inside stand no collectives, and
    nothing that has a `together` of its own."""
    error = None
    try:
        yield
    except Exception as caught:
        error = caught
    agree(error)


# ---- the collectives (torch before 2.13: reduce_scatter_tensor, all_gather_into_tensor) ----------

def all_sum(x: float, op: str = "SUM") -> float:
    """Sum over ranks (or "MAX", the largest), in float64; alone, x itself."""
    if ranks() == 1:
        return x
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    total = torch.tensor(x, dtype=torch.float64, device=device)
    dist.all_reduce(total, getattr(dist.ReduceOp, op))
    return total.item()


def reduce_scatter(whole: Tensor) -> Tensor:
    """(N n,) -> this rank's (n,) of the sum over ranks."""
    if ranks() == 1:
        return whole
    part = whole.new_empty(len(whole) // ranks())
    dist.reduce_scatter_single(part, whole)
    return part


def all_gather(part: Tensor) -> Tensor:
    """(n,) -> the parts of all ranks, end to end (N n,)."""
    if ranks() == 1:
        return part
    whole = part.new_empty(len(part) * ranks())
    dist.all_gather_single(whole, part)
    return whole


def even(batches: list) -> list:
    """The batches and then None, as many as the rank with most has. All ranks must call it."""
    longest = int(all_sum(len(batches), "MAX"))
    return batches + [None] * (longest - len(batches))


# ---- the optimiser -------------------------------------------------------------------------------

class Bucket:
    """Parameters of one dtype that travel together, and this rank's part of their optimiser."""

    def __init__(self, parameters: list[Tensor]):
        self.parameters = parameters
        self.spans, self.size = [], 0       # where each parameter lies
        for p in parameters:
            self.spans.append(slice(self.size, self.size + p.numel()))
            self.size += p.numel()
        self.master = self.mine(self.joined(parameters)).clone()     # (ceil(size / N),) float32
        self.mean = torch.zeros_like(self.master)
        self.square = torch.zeros_like(self.master)
        self.gradient = torch.zeros_like(self.master)

    def joined(self, parts: list[Tensor | None]) -> Tensor:
        """A tensor or None (zeros) for each parameter -> all end to end, then padding, so that N
        equal parts can be cut: (N ceil(size / N),) float32."""
        length = -(-self.size // ranks()) * ranks()
        whole = torch.zeros(length, device=self.parameters[0].device)
        for part, span in zip(parts, self.spans):
            if part is not None:
                whole[span] = part.flatten()
        return whole

    def mine(self, whole: Tensor) -> Tensor:
        """The part of this rank."""
        return whole.chunk(ranks())[rank()]


def pack(parameters: list[Tensor], limit: int) -> list[Bucket]:
    """Neighbours of one dtype, together at most `limit` elements; a larger parameter alone."""
    groups, size = [], 0
    for p in parameters:
        if not groups or size + p.numel() > limit or p.dtype != groups[-1][0].dtype:
            groups.append([])
            size = 0
        groups[-1].append(p)
        size += p.numel()
    return [Bucket(group) for group in groups]


class ShardedAdamW:
    """AdamW (arXiv 1711.05101, alg. 2, as in torch.optim.AdamW) of float32 or bfloat16 parameters.

        for _ in steps:
            optimiser.zero_grad()
            for batch in even(batches):
                if batch is not None:
                    loss(batch).backward()      # a part of the sum over all micro-batches and ranks
                optimiser.finish_micro_batch()
            norm = optimiser.clip(1.)
            changed = optimiser.step(lr)
    """

    @torch.no_grad()
    def __init__(self, parameters: list[Tensor], betas: tuple[float, float] = (.9, .95),
                 eps: float = 1e-8, weight_decay: float = 0., bucket: int = 2**25):
        """Rank 0's values are everybody's start. Nobody else may write to them: the master wins.

        bucket: elements sent at once (2^25 are 128 MB); a larger parameter has its own bucket."""
        self.betas, self.eps, self.weight_decay, self.steps = betas, eps, weight_decay, 0
        if ranks() > 1:
            for p in parameters:
                dist.broadcast(p.detach(), 0)
        self.buckets = pack(parameters[::-1], bucket)       # backward reaches the first ones last

    def zero_grad(self) -> None:
        """Forget gradients, also those of a backward that failed half-way."""
        for b in self.buckets:
            b.gradient.zero_()
            for p in b.parameters:
                p.grad = None

    def finish_micro_batch(self) -> None:
        """Sum the gradients over the ranks, keep this rank's part, free the rest: so no rank keeps
        a whole gradient in float32. All ranks call it equally often: after each backward, or
        without one, with none left."""
        for b in self.buckets:
            whole = b.joined([p.grad for p in b.parameters])
            for p in b.parameters:
                p.grad = None
            b.gradient += reduce_scatter(whole)

    def norm(self) -> float:
        """Length of the whole gradient, the same on all ranks. (Not b.gradient.norm(): on the CPU
        it adds one number after the other, and was wrong by half for an embedding. sum() adds
        pairs.)"""
        return all_sum(sum(b.gradient.square().sum().item() for b in self.buckets)) ** .5

    def clip(self, limit: float) -> float:
        """Scale the gradient to at most `limit`; returns the norm it had, the same on all ranks. If
        that is not finite, the caller must skip the step."""
        norm = self.norm()
        for b in self.buckets:
            b.gradient *= min(1., limit / (norm + 1e-6))
        return norm

    @torch.no_grad()
    def step(self, lr: float) -> float:
        """Update this rank's part, hand it round. Returns the share of weights that changed in the
        model's dtype: in bf16, small updates move only the masters, until they have added up."""
        self.steps += 1
        beta1, beta2 = self.betas
        changed = 0
        for b in self.buckets:
            before = b.master.to(b.parameters[0].dtype, copy=True)
            b.mean.lerp_(b.gradient, 1 - beta1)
            b.square.mul_(beta2).addcmul_(b.gradient, b.gradient, value=1 - beta2)
            scale = (b.square / (1 - beta2 ** self.steps)).sqrt_().add_(self.eps)
            b.master.mul_(1 - lr * self.weight_decay)
            b.master.addcdiv_(b.mean, scale, value=-lr / (1 - beta1 ** self.steps))
            changed += (b.master.to(before.dtype) != before).sum().item()
        self._publish()
        return all_sum(changed) / sum(b.size for b in self.buckets)

    @torch.no_grad()
    def _publish(self) -> None:
        """The masters -> every rank's parameters. bf16 halves the traffic: cast, then send."""
        for b in self.buckets:
            whole = all_gather(b.master.to(b.parameters[0].dtype))
            for p, span in zip(b.parameters, b.spans):
                p.copy_(whole[span].view_as(p))

    def bytes(self) -> int:
        """Of this rank's optimiser, gradients included: 16 / N a parameter."""
        return 16 * sum(len(b.master) for b in self.buckets)

    # ---- checkpoints: one file a rank, for any number of ranks ----

    def save(self, folder: str | Path) -> None:
        """Each rank writes its file. Returns, or raises, when all have; all must see the folder."""
        state = {"steps": self.steps, "sizes": [b.size for b in self.buckets]}
        for name in STATES:
            state[name] = [getattr(b, name).cpu() for b in self.buckets]
        with together():
            torch.save(state, Path(folder) / f"optimiser-{rank()}-of-{ranks()}.pt")

    def load(self, folder: str | Path) -> None:
        """Take over what any number of ranks saved. The parameters are written as well, so they are
        exact even if the model was stored in bf16. Raises what read_shards raises."""
        with together():
            states = read_shards(folder, [b.size for b in self.buckets])
            self.steps = states[0]["steps"]
            for number, b in enumerate(self.buckets):
                for name in STATES:
                    saved = torch.cat([state[name][number] for state in states])
                    parts = [saved[span] for span in b.spans]
                    getattr(b, name).copy_(b.mine(b.joined(parts)))
        self.zero_grad()
        self._publish()


STATES = ("master", "mean", "square")                   # of a bucket, in a checkpoint


def read_shards(folder: str | Path, sizes: list[int]) -> list[dict]:
    """What each rank saved, in order; the tensors stay on the disk until they are used. Damage is
    found before, in lib/checkpoint.py.

    sizes: of our buckets. Raises FileNotFoundError unless the files of one N are all there, and
    ValueError for those of another model."""
    found = sorted(file.name for file in Path(folder).glob("optimiser-*-of-*.pt"))
    expected = [f"optimiser-{number}-of-{len(found)}.pt" for number in range(len(found))]
    if not found or found != sorted(expected):
        raise FileNotFoundError(f"{folder}: expected optimiser-0-of-N.pt, -1-of-N.pt, .. of one N, "
                                f"found {', '.join(found) or 'none'}")
    states = []
    for name in expected:
        state = torch.load(Path(folder) / name, map_location="cpu", weights_only=True, mmap=True)
        if state["sizes"] != sizes:
            raise ValueError(f"{folder}/{name}: expected bucket sizes {sizes}, "
                             f"found {state['sizes']}")
        states.append(state)
    return states


# ---- the demonstration ---------------------------------------------------------------------------

def launch(function, count: int, *arguments) -> None:
    """function(*arguments) in `count` processes, as torchrun would start them."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port),
                   "WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1",
                   "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    torch.multiprocessing.spawn(_child, (function, environment, arguments), nprocs=count)


def _child(number: int, function, environment: dict, arguments: tuple) -> None:
    os.environ.update(environment, RANK=str(number), LOCAL_RANK=str(number))
    torch.set_num_threads(1)
    try:
        function(*arguments)
    finally:
        cleanup()


def demonstrate(micro: int, file: str) -> None:
    """Three steps of a small network on 64 rows, split over ranks and micro-batches."""
    setup(timeout=60)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 256), torch.nn.Tanh(), torch.nn.Linear(256, 8))
    x, y = torch.randn(64, 32), torch.randn(64, 8)
    own = torch.arange(64)[rank()::ranks()]
    optimiser = ShardedAdamW(list(model.parameters()))
    for _ in range(3):
        optimiser.zero_grad()
        for rows in even(list(own.chunk(micro))):
            loss = (model(x[rows]) - y[rows]).square().sum() / 64       # 64: the whole batch
            loss.backward()
            optimiser.finish_micro_batch()
        optimiser.step(1e-3)
    if rank() == 0:
        weights = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
        torch.save([weights, optimiser.bytes()], file)


if __name__ == "__main__":
    print("ranks  micro-batches  largest difference from the first row  optimiser's bytes a rank")
    with tempfile.TemporaryDirectory() as folder:
        for count, micro in ((1, 1), (1, 4), (2, 1), (2, 4)):
            launch(demonstrate, count, micro, f"{folder}/{count}x{micro}")
            first, _ = torch.load(f"{folder}/1x1", weights_only=True)
            weights, size = torch.load(f"{folder}/{count}x{micro}", weights_only=True)
            print(f"{count:5} {micro:14} {(weights - first).abs().max():38.1e} {size:25,}")
