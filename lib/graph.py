"""The sampler on a GPU: one token's kernels, recorded once and replayed as one.

What it teaches: a GPU does what the CPU sends it, kernel by kernel. To read one token, a model of
36 layers needs over a thousand of them. Most end sooner than Python has sent the next: the GPU
waits. A *CUDA graph* is a recorded list of kernels, which is sent at once. A recorded kernel reads
and writes the same addresses each time, so whatever changes from token to token must lie in a
tensor of fixed place and shape:

    ids, positions, who speaks,     in `fed`, which is written before each replay; the column, too,
    the column                      must be a tensor: a number would be recorded as it was
    the mask, keys and values       as wide as the turn can become, not as it is

On a GPU this class takes the place of lib/sampler.py's, whose loop it uses as it stands: the same
tokens, but for rounding. docs/gpu.md has what it gains.

Run it:  python -m lib.graph      # a turn with a fixed and with a growing cache: the same tokens
"""
import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from lib.policy import Policy, Tokens
from lib.sampler import Session, example


class GraphSession(Session):
    """A Session whose turns are sampled by a graph. On a CPU the same step runs unrecorded."""

    replay, sampling = None, False

    def sample(self, max_tokens: int, temperature: float = 1.0,
               generator: torch.Generator | None = None
               ) -> tuple[list[list[int]], list[list[float]]]:
        """As Session.sample does it. While it runs, the cache has max_tokens columns more. Each
        turn has another width, so each is recorded anew."""
        growing, used = self.cache, self.mask.shape[1]
        self.mask = F.pad(self.mask, (0, max_tokens))               # False: not there yet
        self.columns = torch.arange(used + max_tokens, device=self.mask.device)
        self.fed = torch.zeros(4, len(self.next), dtype=torch.long, device=self.mask.device)
        column = self.fed[3, :1]                                    # a view: it follows `fed`
        self.cache = Cache(layers=[Fixed(layer, max_tokens, column) for layer in growing.layers])
        self.filled, self.sampling = used, True                   # how many columns hold something
        try:
            return super().sample(max_tokens, temperature, generator)
        finally:                                                    # the cache may grow again
            self.sampling, self.replay = False, None
            self.mask = self.mask[:, :self.filled]
            for layer, fixed in zip(growing.layers, self.cache.layers):
                layer.keys = fixed.keys[:, :, :self.filled]
                layer.values = fixed.values[:, :, :self.filled]
            self.cache = growing

    @torch.no_grad()
    def append(self, batch: list[Tokens]) -> None:
        """While a turn is sampled: one token a row, or none, into the next column."""
        if not self.sampling:
            return super().append(batch)
        real = [len(tokens.ids) for tokens in batch]
        ids = [tokens.ids[0] if tokens.ids else self.policy.end_id for tokens in batch]
        columns = [self.filled] * len(batch)
        self.fed.copy_(torch.tensor([ids, self.next, real, columns]))
        self.replay = self.replay or recorded(self.step, self.mask.device)
        self.last = self.replay()
        self.next = [position + new for position, new in zip(self.next, real)]
        self.filled += 1

    def step(self) -> Tensor:
        """What is recorded: `fed` (4, B) -> hidden states (B, D). It may run twice: it writes the
        column that `fed` names, and adds none."""
        ids, positions, real, columns = self.fed                    # columns: B times the same
        self.mask.index_copy_(1, columns[:1], real[:, None].bool())
        # (B, P + max_tokens); itself, too, for a silent row: see policy.causal
        attended = self.mask | (self.columns == columns[:1])
        output = self.policy.language(
            inputs_embeds=self.policy.language.embed_tokens(ids[:, None]),
            attention_mask=attended[:, None, None], position_ids=positions.expand(3, -1)[..., None],
            past_key_values=self.cache, use_cache=True)
        return output.last_hidden_state[:, 0]


class Fixed(DynamicLayer):
    """A cache's layer that does not grow: what comes now is written into its `column` (1,)."""

    def __init__(self, layer: DynamicLayer, more: int, column: Tensor):
        super().__init__()
        self.keys = F.pad(layer.keys, (0, 0, 0, more))              # (B, heads, P + more, size)
        self.values = F.pad(layer.values, (0, 0, 0, more))
        layer.keys = layer.values = None                            # not twice in memory
        self.column, self.is_initialized = column, True

    def update(self, keys: Tensor, values: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        self.keys.index_copy_(2, self.column, keys)
        self.values.index_copy_(2, self.column, values)
        return self.keys, self.values


def recorded(step: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """A function that does what the step does, by a graph; its result is one tensor, written anew
    each time. On a CPU it is the step."""
    if device.type != "cuda":
        return step
    stream, graph = side_stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()                                  # unrecorded: libraries prepare themselves
        graph.capture_begin()                   # from here on kernels are noted, not run
        try:
            output = step()
        finally:
            graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)

    def replay() -> Tensor:
        graph.replay()
        return output

    return replay


@functools.cache
def side_stream() -> torch.cuda.Stream:
    """One for all recordings: for each stream cuBLAS keeps 32 MB."""
    return torch.cuda.Stream()


def demonstrate() -> None:
    """Two turns of the agent in tiny/ about one picture, in both ways."""
    torch.set_num_threads(1)
    policy = Policy("tiny")
    prompt, _ = example(policy)
    for kind in (Session, GraphSession):
        session = kind(policy, [prompt], group=2)
        ids, logps = session.sample(64, .5, torch.Generator().manual_seed(0))
        print(f"{kind.__name__}: the cache has {session.mask.shape[1]} columns")
        for row in range(2):
            print(f"  log-probability {sum(logps[row]):.4f}: {policy.decode(ids[row])}")


if __name__ == "__main__":
    demonstrate()
