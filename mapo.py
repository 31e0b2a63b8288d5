"""Scores -> returns -> advantages -> loss: MAPO, and GRPO as its special case. Only tensors, nothing of the project.

What it teaches: *where* the semantic score enters. A group of G trajectories answers one question; trajectory i has
the outcome r_i in [0, 1] and, for its look at turn t, the score s_it in [0, 1] of the description against the crop.

    S_i = sum_t lam^(T_i - t) s_it / sum_t lam^(T_i - t)            (1) later looks lead to the answer; no look: S_i = 0
    R_i = (1 - beta) r_i + beta S_i                                 (2) the coupling; beta = 0 is GRPO
    A_i = (R_i - mean R) / (std R + 1e-6)                           (3) in the group: GRPO, arXiv 2402.03300, eq. 3
    L   = - sum_it w_it min(rho_it A_i, clip(rho_it, 1 - low, 1 + high) A_i)        (4) PPO's clipped surrogate, tokens
          rho_it = pi(token) / pi_old(token),  w_it = 1 / (number of trajectories x tokens of trajectory i)

MAPO (arXiv 2604.06777) publishes no formula that we could reach; (1) and (2) are this project's reading of it, each
number an option. README.md lists what is the paper's and what is assumed.

Run it:  python mapo.py               # one group by hand: returns and advantages of four typical trajectories
"""
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Algorithm:
    """One row of the table: how scores become a return, and how far one batch may move the policy."""
    beta: float = 0.0        # weight of the semantic score in the return, eq. 2
    clip_low: float = 0.2
    clip_high: float = 0.2


ALGORITHMS = {
    "mapo": Algorithm(beta=0.4),
    "grpo": Algorithm(beta=0.0),
}


def trajectory_score(scores: Tensor, looked: Tensor, lam: float) -> Tensor:
    """Eq. 1. scores, looked: (N, T), score and whether turn t looked -> S (N,). Turns without a look do not count,
    so `T - t` counts the looks that follow."""
    looked = looked.to(scores.dtype)
    later = looked.flip(1).cumsum(1).flip(1) - looked          # (N, T) looks after this one
    weight = lam ** later * looked
    return (weight * scores).sum(1) / weight.sum(1).clamp(min=1e-8)


def turn_score(scores: Tensor, looked: Tensor, lam: float) -> Tensor:
    """Credit per turn: (N, T), eq. 1 over the looks from turn t on (a score earned before an action does not depend
    on it). A turn with no look left, such as the answer, gets the whole trajectory's S."""
    rest = [trajectory_score(scores[:, t:], looked[:, t:], lam) for t in range(scores.shape[1])]
    left = looked.flip(1).cumsum(1).flip(1) > 0
    return torch.where(left, torch.stack(rest, 1), trajectory_score(scores, looked, lam)[:, None])


def advantages(r: Tensor, scores: Tensor, looked: Tensor, group: int, beta: float, lam: float = 0.95,
               credit: str = "trajectory") -> Tensor:
    """Outcomes r (N,), scores and looked (N, T), N = questions x group, groups contiguous -> advantages.

    credit "trajectory": (N,), eq. 1 to 3. "turn": (N, T), the score part from turn t on; mean and std stay those of
    whole trajectories, because a baseline per turn index would depend on when the policy stops, and be biased.
    A group of equal returns gets exactly 0. Raises ValueError on shapes or options that do not fit."""
    if r.ndim != 1 or len(r) % group or scores.shape != looked.shape or len(scores) != len(r):
        raise ValueError(f"expected r (N,), scores and looked (N, T), N a multiple of group={group}; "
                         f"found {tuple(r.shape)}, {tuple(scores.shape)}, {tuple(looked.shape)}")
    if not (0 <= beta <= 1 and 0 < lam <= 1 and credit in ("trajectory", "turn")):
        raise ValueError(f"expected 0 <= beta <= 1, 0 < lam <= 1 and credit trajectory or turn; found {beta}, {lam}, {credit!r}")
    R = (1 - beta) * r + beta * trajectory_score(scores, looked, lam)          # (N,) eq. 2
    groups = R.view(-1, group)
    mean = groups.mean(1, keepdim=True).expand_as(groups).reshape(-1)
    std = groups.std(1, keepdim=True, correction=0).expand_as(groups).reshape(-1)
    scale = torch.where(std > 1e-6, 1 / (std + 1e-6), 0.)                       # equal returns: rounding is no signal
    if credit == "turn":
        R = (1 - beta) * r[:, None] + beta * turn_score(scores, looked, lam)   # (N, T)
        mean, scale = mean[:, None], scale[:, None]
    return (R - mean) * scale                                                   # eq. 3


def token_weights(mask: Tensor) -> Tensor:
    """w of eq. 4: mask (N, L) of the agent's tokens in the *whole* batch -> (N, L), which sums to 1. Computed before
    the first backward, so that micro-batches of any size add up to the same gradient."""
    mask = mask.float()
    return mask / mask.sum(1, keepdim=True).clamp(min=1) / len(mask)


def loss(logp: Tensor, old_logp: Tensor, advantage: Tensor, weight: Tensor, clip_low: float = 0.2,
         clip_high: float = 0.2) -> tuple[Tensor, dict[str, Tensor]]:
    """Eq. 4. logp, old_logp, advantage, weight: (B, L); weight is 0 where the token is not the agent's.

    Returns the scalar loss and, summed with the same weights: kl, the estimate E[rho - 1 - log rho] of
    KL(old || new) (Schulman's k3), and clip_fraction, the share of tokens whose gradient the clip removed."""
    log_ratio = (logp - old_logp).clamp(-20, 20)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    surrogate = torch.minimum(ratio * advantage, clipped * advantage)
    with torch.no_grad():
        stopped = ((ratio > 1 + clip_high) & (advantage > 0)) | ((ratio < 1 - clip_low) & (advantage < 0))
        stats = {"kl": (weight * (ratio - 1 - log_ratio)).sum(), "clip_fraction": (weight * stopped).sum()}
    return -(weight * surrogate).sum(), stats


if __name__ == "__main__":
    stories = ["looked well, right", "looked well, misread", "looked badly, lucky", "looked badly, wrong", "never looked, lucky"]
    r = torch.tensor([1., 0, 1, 0, 1])
    scores = torch.tensor([[.9, .9], [.9, .9], [.1, .1], [.1, .1], [0, 0]])
    looked = torch.tensor([[True, True]] * 4 + [[False, False]])
    print(f"{'trajectory':22} {'r':>4} {'S':>5}" + "".join(f"{'A, ' + name:>9}" for name in ALGORITHMS))
    S = trajectory_score(scores, looked, .95)
    columns = [advantages(r, scores, looked, 5, row.beta) for row in ALGORITHMS.values()]
    for i, story in enumerate(stories):
        print(f"{story:22} {r[i]:4.0f} {S[i]:5.2f}" + "".join(f"{column[i]:9.2f}" for column in columns))
    print("\nGRPO pays all right answers alike; MAPO tells the look that earned the answer from the guess that hit it.")
