"""The sampler."""
import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from lib.policy import Policy, Tokens, causal


def draw(logp: Tensor, generator: torch.Generator | None) -> Tensor:
    """(B, V) -> a token for each row (B,), by inverting the distribution function: torch.multinomial would draw B x V
    random numbers. u > 0, so that a token of probability 0 is never drawn."""
    cdf = logp.exp().cumsum(-1, dtype=torch.float64)
    u = 1 - torch.rand(len(logp), 1, generator=generator, dtype=torch.float64, device=logp.device)
    return torch.searchsorted(cdf, u * cdf[:, -1:])[:, 0]

class Spare(DynamicLayer):
    """A cache layer for sampling: new columns are written into spare ones, where torch.cat would copy all the others."""

    def update(self, keys: Tensor, values: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        used, end = self.get_seq_length(), self.get_seq_length() + keys.shape[2]
        if not used or end > self.store.shape[3]:
            store = keys.new_zeros(2, *keys.shape[:2], end + 64, keys.shape[3])  # zeros: masked columns must be finite
            if used:
                store[:, :, :, :used] = self.store[:, :, :, :used]
            self.store, self.is_initialized = store, True
        self.store[0, :, :, used:end], self.store[1, :, :, used:end] = keys, values
        self.keys, self.values = self.store[:, :, :, :end]
        return self.keys, self.values

    def rows(self, index: Tensor) -> "Spare":
        """A copy of these rows."""
        copy = Spare()
        copy.store, copy.is_initialized = self.store[:, index], True
        copy.keys, copy.values = copy.store[:, :, :, :self.get_seq_length()]
        return copy

    def absorb(self, other: "Spare", index: Tensor) -> None:
        """Take over the columns that `other`, a copy of the rows `index`, has gained since."""
        used, (_, heads, end, width) = self.get_seq_length(), other.keys.shape
        self.update(*self.store.new_zeros(2, self.store.shape[1], heads, end - used, width))
        self.store[:, index, :, used:end] = other.store[:, :, :, used:end]

class Session:
    """A batch of growing conversations in one KV cache.

    Each step appends columns to the cache for all rows; a row that has nothing to say in a column is masked there.
    Positions are explicit, so holes change nothing. The last sampled token of a turn is not yet in the cache: it
    waits in `pending` and goes in with the next observation."""

    @torch.no_grad()
    def __init__(self, policy: Policy, prompts: list[Tokens], group: int = 1):
        """Prefill each prompt once, then repeat its cache for its group: rows are [q0, q0, .., q1, q1, ..]."""
        self.policy = policy
        self.cache = Cache(layer_class_to_replicate=Spare)
        self.mask = None
        self.next, self.pending = [0] * len(prompts), [[] for _ in prompts]
        self._feed(prompts)
        if group > 1:
            self.keep([row for row in range(len(prompts)) for _ in range(group)])

    def _feed(self, batch: list[Tokens]) -> None:
        """Append tokens, padded on the left so that the last column is every row's newest; keep its hidden state."""
        hidden, self.mask, self.next = self.policy.hidden(batch, self.next, left=True, past=self.mask, cache=self.cache)
        self.last = hidden[:, -1]

    @torch.no_grad()
    def append(self, observations: list[Tokens]) -> None:
        """Add one observation to every row."""
        self._feed([Tokens(p) + o for p, o in zip(self.pending, observations)])

    @torch.no_grad()
    def sample(self, max_tokens: int, temperature: float = 1.0,
               generator: torch.Generator | None = None) -> tuple[list[list[int]], list[list[float]]]:
        """One turn for every row: token ids and their log-probabilities. temperature 0 takes the most likely token.

        A row stops after </tool_call>, </answer>, the end of turn, or max_tokens. When half of the rows have stopped,
        the others go on in a smaller batch."""
        policy, device, count = self.policy, self.policy.device, len(self.mask)
        ids = torch.zeros(count, max_tokens, dtype=torch.long, device=device)
        logps = torch.zeros(count, max_tokens, device=device)
        lengths = torch.zeros(count, dtype=torch.long, device=device)
        position = torch.tensor(self.next, device=device)
        talks = torch.ones(count, dtype=torch.bool, device=device)
        rows, last, cache, mask, parents = torch.arange(count, device=device), self.last, self.cache, self.mask, []
        for step in range(max_tokens):                          # rows (B,): who is in the batch; last (B, D), mask (B, L)
            logp = policy.log_softmax(last, temperature or 1.0)                                    # (B, V)
            token = logp.argmax(-1) if temperature == 0 else draw(logp, generator)
            ids[rows, step], logps[rows, step] = token, logp.gather(-1, token[:, None])[:, 0]
            lengths += talks
            now = talks[rows] & (token != policy.end_id)
            if (maybe := now & policy.closes[token]).any():  # only a token with ">" can complete a closing tag
                for i in maybe.nonzero()[:, 0].tolist():
                    tail = policy.decode(ids[rows[i], max(step - 11, 0):step + 1].tolist())
                    now[i] = "</tool_call>" not in tail and "</answer>" not in tail
            talks[rows] = now
            if step + 1 == max_tokens or not now.any():
                break
            if 2 * now.sum() <= len(rows):
                index = now.nonzero()[:, 0]
                parents.append((cache, index))
                cache = Cache(layers=[layer.rows(index) for layer in cache.layers])
                rows, token, mask, now = rows[index], token[index], mask[index], now[index]
            mask = torch.cat([mask, now[:, None]], 1)
            last = policy.language(
                inputs_embeds=policy.language.embed_tokens(token)[:, None], attention_mask=causal(mask, 1),
                position_ids=(position[rows] + step).expand(3, -1)[..., None], past_key_values=cache,
                use_cache=True).last_hidden_state[:, -1]
        for parent, index in reversed(parents):
            for whole, part in zip(parent.layers, cache.layers):
                whole.absorb(part, index)
            cache = parent
        fed = torch.arange(step, device=device) < lengths[:, None] - 1  # all but the last token are in the cache
        self.mask = torch.cat([self.mask, fed], 1)
        lengths = lengths.tolist()
        ids, logps = [r[:n] for r, n in zip(ids.tolist(), lengths)], [r[:n] for r, n in zip(logps.tolist(), lengths)]
        self.next = [p + n - 1 for p, n in zip(self.next, lengths)]
        self.pending = [r[-1:] for r in ids]
        return ids, logps

    def keep(self, rows: list[int]) -> None:
        """Keep (and reorder, or repeat) these rows; the others leave the batch and its cost."""
        index = torch.tensor(rows, device=self.policy.device)
        self.cache = Cache(layers=[layer.rows(index) for layer in self.cache.layers])
        self.mask, self.last = self.mask[index], self.last[index]
        self.next, self.pending = [self.next[r] for r in rows], [self.pending[r] for r in rows]
