"""ZeRO-2 by hand: every rank has all the weights, and 1/N of everything that the optimiser needs.

What it teaches: why a 3B model does not fit where its weights do, and the three collectives that make it fit. Bytes a
parameter, with N ranks (ZeRO, arXiv 1910.02054, sec. 3 and 5; stage 2 shards optimiser states and gradients):

    weights bf16  gradient float32  master weights float32  Adam's two moments float32      in all      N = 1   2   8
         2             4 / N                4 / N                     8 / N              2 + 16 / N        18  10   4

    backward   each gradient, as soon as it exists, is summed over the ranks in float32; a rank keeps its 1/N of the sum
               (reduce-scatter) and adds it over micro-batches; the gradient itself is freed
    step       AdamW on the 1/N, in float32: an update of 1e-6 is lost in bf16 weights of .1, not in the master
    after it   the masters, cast to the model's dtype, are put together again in every rank's model (all-gather)

Collectives must come in the same order on all ranks, or they wait for ever. Autograd promises no order, and a rank may
have fewer micro-batches or a parameter without a gradient. So gradients are put in buckets, buckets are sent in one
fixed order, and `finish_micro_batch()` sends zeros for what did not come; a rank without a micro-batch calls just that.

What is left out: weights are not sharded (ZeRO-3), communication does not overlap with computation, no CPU offload.

Run it:  python shard.py                        # 1 and 2 ranks, 1 and 4 micro-batches: the same parameters
"""
import itertools
import os
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 renamed both; its gloo has both, in bf16 too, so the CPU and NCCL take the same path.
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
STATES = ("master", "mean", "square")


# ---- ranks -----------------------------------------------------------------------------------------------------------

class RankFailed(RuntimeError):
    """Another rank failed or fell silent; the message names it."""


DEVICE, TIMEOUT, STORE = "cpu", timedelta(0), None      # setup() fills them in; alone, they stay like this
ROUND = itertools.count()                               # of agree()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def named(error: Exception) -> str:
    """The error's text, with this rank's name if there are several: the others may be ended before they can say who it was."""
    return str(error) if world() == 1 or isinstance(error, RankFailed) else f"rank {rank()} of {world()}: {error}"


def setup(device: str = "cpu", timeout: float = 1800) -> str:
    """Join the ranks that torchrun started; without torchrun, or with one rank, nothing. Returns this rank's device.

    timeout: seconds after which waiting for another rank is an error; longer than the slowest rank's longest lone phase.
    Raises ValueError for cuda without a GPU."""
    global DEVICE, TIMEOUT, STORE
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU")
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        DEVICE, TIMEOUT = device, timedelta(seconds=timeout)
        STORE, mine, ranks = next(dist.rendezvous("env://", timeout=TIMEOUT))
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", store=dist.PrefixStore("group", STORE),
                                rank=mine, world_size=ranks, timeout=TIMEOUT)
    return device


def cleanup() -> None:
    """Leave. Belongs into a `finally`: a process that ends with a group on which a collective failed is aborted by gloo."""
    global STORE
    if dist.is_initialized():
        dist.destroy_process_group()
    STORE = None


def agree(error: Exception | str | None = None) -> None:
    """All ranks meet here; if one brings an error, all raise: it its own, the others RankFailed, which names it.

    Call it before communication. It goes through torchrun's key-value store, so that a silent rank is named as well,
    after the timeout; and a collective that another rank never joins could only time out without a reason."""
    error, note = RuntimeError(error) if isinstance(error, str) else error, f"agree/{next(ROUND)}/"
    if STORE:
        STORE.set(f"{note}{rank()}", f"{type(error).__name__}: {error}" if error else "")
    if error:
        raise error
    for r in range(world()) if STORE else ():
        try:
            STORE.wait([f"{note}{r}"], TIMEOUT)
            word = STORE.get(f"{note}{r}").decode()
        except RuntimeError:                                # timeout, or the store itself is gone
            word = f"silent, waited for up to {TIMEOUT.total_seconds():.0f} s"
        if word:
            raise RankFailed(f"rank {r} of {world()}: {word}")


@contextmanager
def together():
    """`with together(): ...` is left by all ranks, or all raise. No collectives inside."""
    error = None
    try:
        yield
    except Exception as e:
        error = e
    agree(error)


def all_sum(x: float | Tensor, op: str = "SUM") -> float | Tensor:
    """Sum over ranks of a number (in float64) or a tensor (in its dtype, a new tensor); alone, x itself."""
    if world() == 1:
        return x
    tensor = x.detach() if isinstance(x, Tensor) else torch.tensor(x, dtype=torch.float64)
    total = tensor.to(DEVICE, copy=True)                    # NCCL speaks only of CUDA tensors
    dist.all_reduce(total, getattr(dist.ReduceOp, op))
    return total.to(tensor.device) if isinstance(x, Tensor) else total.item()


def even(batches: list) -> list:
    """The batches and then None, so that all ranks' lists have the length of the longest. All ranks must call it."""
    return batches + [None] * (int(all_sum(len(batches), "MAX")) - len(batches))


def squared(x: Tensor) -> Tensor:
    """|x|^2 as a float64 scalar. Not by norm(): on the CPU it adds up one after the other in float32, and was 1e-3 off over
    3e7 elements and half over 3e8, an embedding; sum() adds pairwise. In chunks, because square() needs room."""
    return torch.stack([c.square().sum() for c in x.split(2**24)]).double().sum()


# ---- the optimiser ---------------------------------------------------------------------------------------------------

@dataclass
class Bucket:
    """Parameters that travel together, flattened and laid end to end, then zeros up to a multiple of N."""
    parameters: list[Tensor] = field(default_factory=list)
    size: int = 0                                           # elements, without the zeros
    spans: list[slice] = field(default_factory=list)        # where each parameter lies
    master: Tensor = None                                   # (ceil(size / N),) float32, and so are the next three
    mean: Tensor = None
    square: Tensor = None
    gradient: Tensor = None
    arriving: Tensor | None = None                          # this micro-batch's gradients, whole, until they are sent
    arrived: set[int] = field(default_factory=set)          # whose these are

    def zeros(self) -> Tensor:
        """(N ceil(size / N),) float32."""
        return torch.zeros(-(-self.size // world()) * world(), device=self.parameters[0].device)


class ShardedAdamW:
    """AdamW (arXiv 1711.05101, alg. 2, as in torch.optim.AdamW) of parameters that are float32 or bfloat16.

        for _ in steps:
            optimiser.zero_grad()
            for batch in even(batches):
                if batch is not None: loss(batch).backward()        # a part of the sum over all micro-batches and ranks
                optimiser.finish_micro_batch()
            norm = optimiser.clip(1.)
            changed = optimiser.step(lr)
    """

    @torch.no_grad()
    def __init__(self, parameters: list[Tensor], betas: tuple[float, float] = (.9, .95), eps: float = 1e-8,
                 weight_decay: float = 0., bucket: int = 2**25):
        """Rank 0's values are everybody's start. Nobody else may write to the parameters from now on: the master wins.

        bucket: elements sent at once (2^25 are 128 MB of float32); a larger parameter has a bucket of its own."""
        self.betas, self.eps, self.weight_decay, self.steps = betas, eps, weight_decay, 0
        self.buckets, self.handles = [Bucket()], []
        for p in reversed(parameters):                      # about the order in which backward comes by
            last = self.buckets[-1]
            if last.parameters and (last.size + p.numel() > bucket or p.dtype != last.parameters[0].dtype):
                last = Bucket()
                self.buckets.append(last)
            last.parameters.append(p)
            last.spans.append(slice(last.size, last.size + p.numel()))
            last.size += p.numel()
            if world() > 1:
                dist.broadcast(p.detach(), 0)
        for b in self.buckets:
            whole = b.zeros()
            for i, (p, span) in enumerate(zip(b.parameters, b.spans)):
                whole[span] = p.flatten()
                self.handles.append(p.register_post_accumulate_grad_hook(partial(self._arrive, b, i)))
            b.master = whole.chunk(world())[rank()].clone()
            b.mean, b.square, b.gradient = (torch.zeros_like(b.master) for _ in range(3))
        self.zero_grad()

    def close(self) -> None:
        """Let go of the parameters: they have ordinary gradients again."""
        for handle in self.handles:
            handle.remove()

    def zero_grad(self) -> None:
        """Forget gradients, also those of a backward that failed half-way."""
        for b in self.buckets:
            b.gradient.zero_()
        self._forget()

    def _arrive(self, bucket: Bucket, i: int, p: Tensor) -> None:
        """The hook: backward has finished p.grad. Take it, free it, and send the buckets whose turn it is."""
        if i in bucket.arrived:
            raise RuntimeError("a second gradient in one micro-batch: call finish_micro_batch() after each backward()")
        if bucket.arriving is None:
            bucket.arriving = bucket.zeros()
        bucket.arriving[bucket.spans[i]] = p.grad.flatten()
        bucket.arrived.add(i)
        p.grad = None
        while self.next < len(self.buckets) and len(self.buckets[self.next].arrived) == len(self.buckets[self.next].parameters):
            self._send()

    def _send(self) -> None:
        """Reduce-scatter the next bucket; what did not arrive is zero."""
        b = self.buckets[self.next]
        whole = b.zeros() if b.arriving is None else b.arriving
        part = whole
        if world() > 1:
            part = torch.empty_like(b.gradient)
            reduce_scatter(part, whole)
        b.gradient += part
        b.arriving, self.next = None, self.next + 1

    def finish_micro_batch(self) -> None:
        """All ranks call it equally often: after each backward, or without one where a rank has no batch left."""
        while self.next < len(self.buckets):
            self._send()
        self._forget()

    def _forget(self) -> None:
        self.next = 0
        for b in self.buckets:
            b.arriving, b.arrived = None, set()

    def norm(self) -> float:
        """Length of the whole gradient, the same on all ranks."""
        return all_sum(sum(squared(b.gradient).item() for b in self.buckets)) ** .5

    def clip(self, limit: float, norm: float | None = None) -> float:
        """Scale the gradient to at most `limit`; returns the norm it had (`norm`, if it is known already). Not finite: skip
        the step, on all ranks alike."""
        norm = self.norm() if norm is None else norm
        for b in self.buckets:
            b.gradient *= min(1., limit / (norm + 1e-6))
        return norm

    @torch.no_grad()
    def step(self, lr: float) -> float:
        """Update this rank's part, hand it round. Returns the share of weights that changed in the model's dtype:
        in bf16, with 8 bits of precision, most updates of a small lr move only the master until they add up."""
        self.steps += 1
        (beta1, beta2), changed = self.betas, 0
        for b in self.buckets:
            before = b.master.to(b.parameters[0].dtype, copy=True)
            b.mean.lerp_(b.gradient, 1 - beta1)
            b.square.mul_(beta2).addcmul_(b.gradient, b.gradient, value=1 - beta2)
            scale = (b.square / (1 - beta2 ** self.steps)).sqrt_().add_(self.eps)
            b.master.mul_(1 - lr * self.weight_decay).addcdiv_(b.mean, scale, value=-lr / (1 - beta1 ** self.steps))
            changed += (b.master.to(before.dtype) != before).sum().item()
        self._publish()
        return all_sum(changed) / sum(b.size for b in self.buckets)

    @torch.no_grad()
    def _publish(self) -> None:
        """Master shards -> every rank's parameters, in the model's dtype: half the traffic of float32 for bf16."""
        for b in self.buckets:
            whole = part = b.master.to(b.parameters[0].dtype)
            if world() > 1:
                whole = torch.empty(world() * len(part), dtype=part.dtype, device=part.device)
                all_gather(whole, part)
            for p, span in zip(b.parameters, b.spans):
                p.copy_(whole[span].view_as(p))

    def bytes(self) -> int:
        """Of this rank's optimiser, gradients included: 16 / N a parameter."""
        return 4 * 4 * sum(len(b.master) for b in self.buckets)

    # ---- checkpoints: one file a rank, for any number of ranks ------------------------------------------------------

    def state_dict(self) -> dict:
        """This rank's part, on the CPU; `sizes` is the layout that it belongs to."""
        return {"rank": rank(), "world": world(), "steps": self.steps, "sizes": [b.size for b in self.buckets],
                **{name: [getattr(b, name).cpu() for b in self.buckets] for name in STATES}}

    def load_state_dict(self, states: list[dict]) -> None:
        """The parts of all ranks that saved, in order; how many may differ from how many there are now.
        Also writes the parameters, so they are exact even if the model was stored in bf16."""
        self.steps = states[0]["steps"]
        for k, b in enumerate(self.buckets):
            start = rank() * len(b.master)
            for name in STATES:
                own = cut([s[name][k] for s in states], start, start + len(b.master))
                getattr(b, name).zero_()[:len(own)] = own   # what is beyond is padding, as is the end of `own`: zeros
        self.zero_grad()
        self._publish()

    def save(self, folder: str | Path) -> None:
        """Each rank writes its file; returns, or raises, when all have. The folder must be one that all ranks see."""
        with together():
            torch.save(self.state_dict(), Path(folder) / f"optimiser-{rank()}-of-{world()}.pt")

    def load(self, folder: str | Path) -> None:
        with together():
            states = read_shards(folder, [b.size for b in self.buckets])
        self.load_state_dict(states)


def cut(parts: list[Tensor], start: int, stop: int) -> Tensor:
    """cat(parts)[start:stop], without reading the rest: mapped files stay on the disk."""
    pieces, offset = [], 0
    for part in parts:
        pieces.append(part[max(start - offset, 0):max(stop - offset, 0)])
        offset += len(part)
    return torch.cat(pieces)


def read_shards(folder: str | Path, sizes: list[int]) -> list[dict]:
    """The states of all ranks that saved. Raises FileNotFoundError for a missing file, ValueError for one that does not fit."""
    found = sorted(Path(folder).glob("optimiser-*-of-*.pt"))
    worlds = sorted({int(f.stem.split("-")[3]) for f in found})
    if len(worlds) != 1:
        raise FileNotFoundError(f"{folder}: expected optimiser-0-of-N.pt, -1-of-N.pt, .. of one N, found N = {worlds or 'none'}")
    states = []
    for r in range(worlds[0]):
        file = Path(folder) / f"optimiser-{r}-of-{worlds[0]}.pt"
        if not file.is_file():
            raise FileNotFoundError(f"{file}: missing, though {found[0].name} is there")
        try:
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            head = [state[key] for key in ("rank", "world", "steps", "sizes")]
        except Exception as error:  # torch.load raises many kinds
            raise ValueError(f"{file}: not an optimiser's shard: {error}") from error
        if head != (expected := [r, worlds[0], (states or [state])[0]["steps"], sizes]):
            raise ValueError(f"{file}: expected rank, world, steps, bucket sizes {expected}, found {head}")
        states.append(state)
    return states


# ---- the demonstration -----------------------------------------------------------------------------------------------

def launch(function, ranks: int, *arguments) -> None:
    """function(*arguments) in `ranks` processes, as torchrun would start them: for this file's demonstration and its tests."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)   # ours, like torchrun's: it outlives a rank
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": str(ranks),
                   "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0", "OMP_NUM_THREADS": "1"}
    torch.multiprocessing.spawn(_child, (function, environment, arguments), nprocs=ranks)


def _child(index: int, function, environment: dict, arguments: tuple) -> None:
    os.environ.update(environment, RANK=str(index), LOCAL_RANK=str(index))
    torch.set_num_threads(1)
    try:
        function(*arguments)
    finally:
        cleanup()


def demonstrate(micro: int, file: str) -> None:
    """Three steps of a small network on 64 rows, split over ranks and micro-batches; rank 0 writes what came out."""
    setup(timeout=60)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 256), torch.nn.Tanh(), torch.nn.Linear(256, 8))
    x, y = torch.randn(64, 32), torch.randn(64, 8)
    optimiser = ShardedAdamW(list(model.parameters()))
    for _ in range(3):
        optimiser.zero_grad()
        for rows in even(list(torch.arange(64)[rank()::world()].chunk(micro))):
            ((model(x[rows]) - y[rows]) ** 2).sum().div(64).backward()    # 64: the whole batch, not this part of it
            optimiser.finish_micro_batch()
        optimiser.step(1e-3)
    if rank() == 0:
        torch.save([torch.nn.utils.parameters_to_vector(model.parameters()).detach(), optimiser.bytes()], file)


if __name__ == "__main__":
    import tempfile
    with tempfile.TemporaryDirectory() as folder:
        print("ranks  micro-batches  largest difference from the first row  optimiser's bytes a rank")
        for ranks, micro in ((1, 1), (1, 4), (2, 1), (2, 4)):
            launch(demonstrate, ranks, micro, f"{folder}/{ranks}x{micro}")
            (first, _), (this, size) = (torch.load(f"{folder}/{name}", weights_only=True) for name in ("1x1", f"{ranks}x{micro}"))
            print(f"{ranks:5} {micro:14} {(this - first).abs().max():38.1e} {size:25,}")
    print("\nGB a rank for 3.1 billion weights in bf16, Qwen2.5-VL-3B's language model, without activations: "
          + ", ".join(f"{n} ranks {3.1 * (2 + 16 / n):.0f}" for n in (1, 2, 4, 8)))
