"""Trajectories -> padded tensors and micro-batches.

What it teaches: the bookkeeping between lists of tokens and tensors. In a tensor (N, L - 1) column
j speaks of token j + 1 of the trajectory, because a model at token j predicts the next one.

Run it:  python -m lib.batches        # three made-up trajectories, cut into micro-batches
"""
import torch
from torch import Tensor


def pad(rows: list[list], fill) -> Tensor:
    """N lists over tokens -> (N, L - 1), from the second token on, filled up to the longest."""
    longest = max(map(len, rows))
    return torch.tensor([row[1:] + [fill] * (longest - len(row)) for row in rows])


def spread(values: Tensor, trajectories: list) -> Tensor:
    """(N,), or one value a turn (N, T) -> one value a token (N, L - 1). Tokens that are not the
    agent's may have one, too: their weight w is 0."""
    longest = max(len(t.mask) for t in trajectories)
    if values.ndim == 1:
        return values[:, None].expand(-1, longest - 1)
    tokens = torch.zeros(len(trajectories), longest)
    for i, trajectory in enumerate(trajectories):
        for k, turn in enumerate(trajectory.turns):
            tokens[i, turn.span] = values[i, k]
    return tokens[:, 1:]


def micro_batches(trajectories: list, rows: list[int], limit: int) -> list[list[int]]:
    """The rows, cut so that a batch's padded size stays within `limit` tokens (at least one row).

    Rows are sorted by the longest trajectory of their group: little padding, and trajectories that
    share a prompt stay together, so that it is computed once a micro-batch. (It is counted with
    each row all the same.)"""
    lengths = {i: len(trajectories[i].mask) for i in rows}
    longest = {}                                           # of each group, by its prompt
    for i in rows:
        prompt = id(trajectories[i].prompt)
        longest[prompt] = max(longest.get(prompt, 0), lengths[i])
    ordered = sorted(rows, key=lambda i: (longest[id(trajectories[i].prompt)], i))
    batches, width = [], 0
    for i in ordered:
        width = max(width, lengths[i])
        if batches and (len(batches[-1]) + 1) * width <= limit:
            batches[-1].append(i)
        else:
            batches.append([i])
            width = lengths[i]
    return batches


if __name__ == "__main__":
    from types import SimpleNamespace
    made_up = [SimpleNamespace(mask=[False] * 4 + [True] * n, prompt=None) for n in (3, 9, 5)]
    print("masks, from the second token on:\n", pad([t.mask for t in made_up], False).int())
    for limit in (10, 26, 100):
        print(f"at most {limit:3} padded tokens: rows {micro_batches(made_up, [0, 1, 2], limit)}")
