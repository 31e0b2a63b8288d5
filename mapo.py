"""Scores -> returns -> advantages -> loss: MAPO, and GRPO, DAPO, GSPO, PPO as rows of one table. Only tensors.

What it teaches: *where* the semantic score enters. A group of G trajectories answers one question; trajectory i has
the outcome r_i in [0, 1] and, for its t-th look of T_i, the score s_it in [0, 1] of the description against the crop.

    S_i = sum_t lam^(T_i - t) s_it / sum_t lam^(T_i - t)            (1) later looks lead to the answer; no look: S_i = 0
    R_i = (1 - beta) r_i + beta S_i                                 (2) the coupling; beta = 0 is GRPO
    A_i = (R_i - mean R) / (std R + 1e-6)                           (3) in the group: GRPO, arXiv 2402.03300, eq. 3
    L   = - sum_ik w_ik min(rho_ik A_i, clip(rho_ik, 1 - low, 1 + high) A_i)        (4) PPO's clipped surrogate, over tokens k
          rho_ik = pi(token) / pi_old(token),  w_ik = 1 / (number of trajectories x tokens of trajectory i)

MAPO (arXiv 2604.06777) publishes no formula that we could reach; (1) and (2) are this project's reading of it, each
number an option. README.md lists what is the paper's and what is assumed. The first half of this file is the method,
the second the theory of when it pays and where it fails; docs/theory.md has the proofs.

Run it:  python mapo.py               # one group by hand, then every proposition and counterexample, predicted and measured
"""
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Algorithm:
    """One row of the table: how scores become a return, and how far one batch may move the policy."""
    beta: float = 0.0            # weight of the semantic score in the return, eq. 2; --beta composes with any row
    std: bool = True             # divide by the group's standard deviation, eq. 3
    ratio: str = "token"         # rho of each token, or "sequence": the geometric mean over the trajectory's tokens
    mean: str = "trajectory"     # every trajectory weighs the same, or "token": every token does
    clip_low: float = 0.2
    clip_high: float = 0.2
    max_draws: int = 1           # a group without signal is dropped and another drawn, this many draws in all; 1: kept as it is
    overlong: float = 0.0        # share of the length limit over which the penalty ramps from 0 to -1, eq. 9; 0: no penalty
    critic: bool = False         # a value head and GAE (eq. 10) give the advantage, not the group (eq. 3)


ALGORITHMS = {
    "mapo": Algorithm(beta=0.4),
    "grpo": Algorithm(),                                                        # arXiv 2402.03300
    "dr_grpo": Algorithm(std=False, mean="token"),                              # arXiv 2503.20783 (token mean for its fixed length)
    "dapo": Algorithm(mean="token", clip_high=0.28, max_draws=10, overlong=0.2),  # arXiv 2503.14476: 4096 of 20480 tokens
    "gspo": Algorithm(ratio="sequence", clip_low=3e-4, clip_high=4e-4),         # arXiv 2507.18071
    "ppo": Algorithm(std=False, mean="token", critic=True),                     # arXiv 1707.06347
}


def looks_left(looked: Tensor) -> Tensor:
    """looked (N, T) -> (N, T), the number of looks from turn t on."""
    return looked.flip(1).cumsum(1).flip(1)


def look_weights(looked: Tensor, lam: float) -> Tensor:
    """lam^(T - t) of eq. 1, 0 for turns without a look: looked (N, T) -> (N, T). `T - t` counts the looks that follow."""
    looked = looked * 1.
    later = looks_left(looked) - looked                        # (N, T) looks after this one
    return lam ** later * looked


def trajectory_score(scores: Tensor, looked: Tensor, lam: float) -> Tensor:
    """Eq. 1. scores, looked: (N, T), score and whether turn t looked -> S (N,)."""
    weight = look_weights(looked.to(scores.dtype), lam)
    return (weight * scores).sum(1) / weight.sum(1).clamp(min=1e-8)


def turn_score(scores: Tensor, looked: Tensor, lam: float) -> Tensor:
    """Credit per turn: (N, T), eq. 1 over the looks from turn t on (a score earned before an action does not depend
    on it). A turn with no look left, such as the answer, gets the whole trajectory's S."""
    rest = [trajectory_score(scores[:, t:], looked[:, t:], lam) for t in range(scores.shape[1])]
    return torch.where(looks_left(looked) > 0, torch.stack(rest, 1), trajectory_score(scores, looked, lam)[:, None])


def coupled_return(r: Tensor, scores: Tensor, looked: Tensor, beta: float, lam: float = 0.95,
                   credit: str = "trajectory") -> Tensor:
    """Eq. 2, the R of every row of the table: r (N,), scores and looked (N, T) -> (N,), with credit "turn" (N, T).

    A penalty for length (eq. 9) is added to r. Raises ValueError on shapes or options that do not fit."""
    if r.ndim != 1 or scores.shape != looked.shape or len(scores) != len(r):
        raise ValueError(f"expected r (N,), scores and looked (N, T); found {tuple(r.shape)}, {tuple(scores.shape)}, "
                         f"{tuple(looked.shape)}")
    if not (0 <= beta <= 1 and 0 < lam <= 1 and credit in ("trajectory", "turn")):
        raise ValueError(f"expected 0 <= beta <= 1, 0 < lam <= 1 and credit trajectory or turn (in advantages also look); found {beta}, {lam}, {credit!r}")
    if credit == "turn":
        return (1 - beta) * r[:, None] + beta * turn_score(scores, looked, lam)
    return (1 - beta) * r + beta * trajectory_score(scores, looked, lam)


def advantages(r: Tensor, scores: Tensor, looked: Tensor, group: int, beta: float, lam: float = 0.95,
               credit: str = "trajectory", std: bool = True) -> Tensor:
    """Outcomes r (N,), scores and looked (N, T), N = questions x group, groups contiguous -> advantages.

    credit "trajectory": (N,), eq. 1 to 3. "turn": (N, T), the score part from turn t on; mean and std stay those of
    whole trajectories, because a baseline per turn index would depend on when the policy stops, and be biased.
    "look": as "turn", but an answer after a look has the group's mean S, which the baseline takes away again: the score says
    nothing of stopping, and of going on only whether the looks to come beat that mean.
    std False leaves out the division. A group of equal returns gets exactly 0. Raises ValueError as coupled_return does."""
    if group < 1 or len(r) % group:
        raise ValueError(f"expected a multiple of group={group} trajectories, found {len(r)}")
    R = coupled_return(r, scores, looked, beta, lam)                            # (N,) eq. 2
    groups = R.view(-1, group)
    mean = groups.mean(1).repeat_interleave(group)
    sigma = groups.std(1, correction=0).repeat_interleave(group)
    scale = torch.where(sigma > 1e-6, 1 / (sigma + 1e-6) if std else 1., 0.)    # equal returns: rounding is no signal
    if credit != "trajectory":
        R = coupled_return(r, scores, looked, beta, lam, "turn" if credit == "look" else credit)  # (N, T)
        if credit == "look":
            S = trajectory_score(scores, looked, lam).view(-1, group).mean(1).repeat_interleave(group)
            after = looked.any(1, keepdim=True) & (looks_left(looked) == 0)
            R = torch.where(after, ((1 - beta) * r + beta * S)[:, None], R)
        mean, scale = mean[:, None], scale[:, None]
    return (R - mean) * scale                                                   # eq. 3


def token_weights(mask: Tensor, mean: str = "trajectory") -> Tensor:
    """w of eq. 4: mask (N, L) of the agent's tokens in the *whole* batch -> (N, L), which sums to 1. Computed before
    the first backward, so that micro-batches of any size add up to the same gradient."""
    mask = mask.float()
    if mean == "token":
        return mask / mask.sum().clamp(min=1)
    return mask / mask.sum(1, keepdim=True).clamp(min=1) / len(mask)


def loss(logp: Tensor, old_logp: Tensor, advantage: Tensor, weight: Tensor, clip_low: float = 0.2,
         clip_high: float = 0.2, ratio: str = "token") -> tuple[Tensor, dict[str, Tensor]]:
    """Eq. 4. logp, old_logp, advantage, weight: (B, L); weight is 0 where the token is not the agent's.

    ratio "sequence": every token of a trajectory has rho = exp(mean of its tokens' log-ratios), GSPO's s_i.
    Returns the scalar loss and, summed with the same weights: kl, the estimate E[rho - 1 - log rho] of
    KL(old || new) (Schulman's k3), and clip_fraction, the share of tokens whose gradient the clip removed."""
    log_ratio = (logp - old_logp).clamp(-20, 20)
    with torch.no_grad():
        kl = (weight * (log_ratio.exp() - 1 - log_ratio)).sum()
    if ratio == "sequence":
        own = (weight > 0).float()
        log_ratio = ((own * log_ratio).sum(1, keepdim=True) / own.sum(1, keepdim=True).clamp(min=1)).expand_as(logp)
    rho = log_ratio.exp()
    surrogate = torch.minimum(rho * advantage, rho.clamp(1 - clip_low, 1 + clip_high) * advantage)
    with torch.no_grad():
        stopped = ((rho > 1 + clip_high) & (advantage > 0)) | ((rho < 1 - clip_low) & (advantage < 0))
        stats = {"kl": kl, "clip_fraction": (weight * stopped).sum()}
    return -(weight * surrogate).sum(), stats


# ---- what DAPO and PPO add ------------------------------------------------------------------------------------------

def has_signal(values: Tensor, group: int) -> Tensor:
    """Does a group teach anything? R (N,) of whole trajectories, or advantages (N,) or (N, T) -> bool (N / group,).

    False where all are equal. DAPO's dynamic sampling (its eq. 11: some right, some wrong) drops such groups and draws
    other questions. Ask before the penalty for length is added: lengths alone are no reason to keep a group."""
    return values.reshape(len(values) // group, -1).std(1, correction=0) > 1e-6


def overlong_penalty(lengths: Tensor, limit: int, buffer: int) -> Tensor:
    """DAPO's eq. 13: lengths (N,) in tokens -> (N,) in [-1, 0], to be added to the outcome.

        p(l) = clip((limit - buffer - l) / buffer, -1, 0)                       (9) 0 up to limit - buffer, -1 at limit"""
    if not 0 < buffer <= limit:
        raise ValueError(f"expected 0 < buffer <= limit, found buffer {buffer}, limit {limit}")
    return ((limit - buffer - lengths) / buffer).clamp(-1, 0)


@torch.no_grad()
def gae(reward: Tensor, values: Tensor, mask: Tensor, gamma: float = 1., lam: float = .95) -> tuple[Tensor, Tensor]:
    """PPO's advantages, arXiv 1707.06347 eq. 11 and 12 (arXiv 1506.02438): the agent's tokens are the steps.

        delta_t = reward_t + gamma V_t+1 - V_t,   A_t = delta_t + gamma lam A_t+1,   target_t = A_t + V_t            (10)

    values (N, L): V of the state in which token t is chosen; mask (N, L): the agent's tokens. `t + 1` is the agent's next
    token: what the environment writes is no step, and after the last V is 0. reward: R (N,), paid at the agent's last
    token, or (N, L), so that each look's score can be paid when it is earned. Returns advantage and target, (N, L), 0
    off the mask. Raises ValueError if a reward stands where no token of the agent does: it would be lost."""
    own = mask.bool()
    if reward.ndim == 1:
        reward = reward[:, None] * (own & (own.flip(1).cumsum(1).flip(1) == 1))
    if reward.shape != values.shape or own.shape != values.shape or (reward[~own] != 0).any():
        raise ValueError(f"expected values and mask (N, L), reward (N,) or (N, L) at the agent's tokens only; found "
                         f"{tuple(values.shape)}, {tuple(mask.shape)}, {tuple(reward.shape)}")
    advantage, next_value, next_advantage = torch.zeros_like(values), values.new_zeros(len(values)), values.new_zeros(len(values))
    for t in reversed(range(values.shape[1])):
        delta = reward[:, t] + gamma * next_value - values[:, t]
        next_advantage = torch.where(own[:, t], delta + gamma * lam * next_advantage, next_advantage)
        next_value = torch.where(own[:, t], values[:, t], next_value)
        advantage[:, t] = next_advantage
    return torch.where(own, advantage, 0.), torch.where(own, advantage + values, 0.)


def value_loss(values: Tensor, old_values: Tensor, target: Tensor, weight: Tensor, clip: float = .2) -> Tensor:
    """Half the squared error of the value head, all (B, L), weight as in eq. 4 -> scalar.

        V' = V_old + clip(V - V_old, -c, c),   L_V = 1/2 sum w max((V - target)^2, (V' - target)^2)                  (11)

    PPO's paper has the plain square (its eq. 9); the clip, which keeps V near V_old, is that of its released code."""
    near = old_values + (values - old_values).clamp(-clip, clip)
    return .5 * (weight * torch.maximum((values - target).square(), (near - target).square())).sum()


if __name__ == "__main__":
    torch.set_num_threads(1)    # the tensors are small: more threads only wait for each other
    stories = ["looked well, right", "looked well, misread", "looked badly, lucky", "looked badly, wrong", "never looked, lucky"]
    r = torch.tensor([1., 0, 1, 0, 1])
    scores = torch.tensor([[.9, .9], [.9, .9], [.1, .1], [.1, .1], [0, 0]])
    looked = torch.tensor([[True, True]] * 4 + [[False, False]])
    rows = {name: row for name, row in ALGORITHMS.items() if not row.critic}          # PPO asks a value head, not the group
    print(f"{'one group of five':22} {'r':>4} {'S':>5}" + "".join(f"{'A, ' + name:>12}" for name in rows))
    S = trajectory_score(scores, looked, .95)
    columns = [advantages(r, scores, looked, 5, row.beta, std=row.std) for row in rows.values()]
    for i, story in enumerate(stories):
        print(f"{story:22} {r[i]:4.0f} {S[i]:5.2f}" + "".join(f"{column[i]:12.2f}" for column in columns))
    print("GRPO pays all right answers alike; MAPO tells the look that earned the answer from the guess that hit it.")
