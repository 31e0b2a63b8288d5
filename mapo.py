"""Scores -> returns -> advantages -> loss: MAPO, and GRPO and two of its kin. Only tensors, nothing of the project.

What it teaches: *where* the semantic score enters. A group of G trajectories answers one question; trajectory i has
the outcome r_i in [0, 1] and, for its look at turn t, the score s_it in [0, 1] of the description against the crop.

    S_i = sum_t lam^(T_i - t) s_it / sum_t lam^(T_i - t)            (1) later looks lead to the answer; no look: S_i = 0
    R_i = (1 - beta) r_i + beta S_i                                 (2) the coupling; beta = 0 is GRPO
    A_i = (R_i - mean R) / (std R + 1e-6)                           (3) in the group: GRPO, arXiv 2402.03300, eq. 3
    L   = - sum_it w_it min(rho_it A_i, clip(rho_it, 1 - low, 1 + high) A_i)        (4) PPO's clipped surrogate, tokens
          rho_it = pi(token) / pi_old(token),  w_it = 1 / (number of trajectories x tokens of trajectory i)

MAPO (arXiv 2604.06777) publishes no formula that we could reach; (1) and (2) are this project's reading of it, each
number an option. README.md lists what is the paper's and what is assumed.

Run it:  python mapo.py               # one group by hand; then theory against measurement, and where coupling hurts
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


ALGORITHMS = {
    "mapo": Algorithm(beta=0.4),
    "grpo": Algorithm(),                                                        # arXiv 2402.03300
    "dr_grpo": Algorithm(std=False, mean="token"),                              # arXiv 2503.20783 (token mean for its fixed length)
    "gspo": Algorithm(ratio="sequence", clip_low=3e-4, clip_high=4e-4),         # arXiv 2507.18071
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
               credit: str = "trajectory", std: bool = True) -> Tensor:
    """Outcomes r (N,), scores and looked (N, T), N = questions x group, groups contiguous -> advantages.

    credit "trajectory": (N,), eq. 1 to 3. "turn": (N, T), the score part from turn t on; mean and std stay those of
    whole trajectories, because a baseline per turn index would depend on when the policy stops, and be biased.
    std False leaves out the division. A group of equal returns gets exactly 0. Raises ValueError on shapes or options that do not fit."""
    if r.ndim != 1 or len(r) % group or scores.shape != looked.shape or len(scores) != len(r):
        raise ValueError(f"expected r (N,), scores and looked (N, T), N a multiple of group={group}; "
                         f"found {tuple(r.shape)}, {tuple(scores.shape)}, {tuple(looked.shape)}")
    if not (0 <= beta <= 1 and 0 < lam <= 1 and credit in ("trajectory", "turn")):
        raise ValueError(f"expected 0 <= beta <= 1, 0 < lam <= 1 and credit trajectory or turn; found {beta}, {lam}, {credit!r}")
    R = (1 - beta) * r + beta * trajectory_score(scores, looked, lam)          # (N,) eq. 2
    groups = R.view(-1, group)
    mean = groups.mean(1, keepdim=True).expand_as(groups).reshape(-1)
    sigma = groups.std(1, keepdim=True, correction=0).expand_as(groups).reshape(-1)
    scale = torch.where(sigma > 1e-6, 1 / (sigma + 1e-6) if std else 1., 0.)    # equal returns: rounding is no signal
    if credit == "turn":
        R = (1 - beta) * r[:, None] + beta * turn_score(scores, looked, lam)   # (N, T)
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

    ratio "sequence": every token of a trajectory has rho = exp(mean of its tokens' log-ratios), GSPO's eq. 5.
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


# ---- why it can work, and when it does not: a model of one visual action --------------------------------------------
#
# z: did the crop show the evidence? P(r=1 | z=1) = 1 - eps (misreading), P(r=1 | z=0) = rho (luck), E[s | z] = mu_z,
# Var(s | z) = sd^2, r and s independent given z. Signal to noise of a return: what z moves over what is left given z.
#
#     SNR(beta) = ((1-beta) Dr + beta Ds)^2 / ((1-beta)^2 v_r + beta^2 v_s)     Dr = 1 - eps - rho, Ds = mu_1 - mu_0    (8)
#
# It is largest at beta*/(1-beta*) = (Ds/v_s) / (Dr/v_r), where the two simply add up: SNR_r + SNR_s. It is free of scale,
# which raw variance is not: halving a reward quarters its variance and teaches nothing.

@dataclass(frozen=True)
class Looking:
    p: float = 0.25        # P(z = 1)
    eps: float = 0.1
    rho: float = 0.25
    mu: tuple[float, float] = (0.3, 0.8)
    sd: float = 0.2

    @property
    def moments(self) -> tuple[float, float, float, float]:
        """Dr, Ds, v_r = E[Var(r | z)], v_s."""
        v_r = self.p * self.eps * (1 - self.eps) + (1 - self.p) * self.rho * (1 - self.rho)
        return 1 - self.eps - self.rho, self.mu[1] - self.mu[0], v_r, self.sd ** 2

    def snr(self, beta: float) -> float:
        """Eq. 8 (5 to 7 stand in reward.py)."""
        d_r, d_s, v_r, v_s = self.moments
        return ((1 - beta) * d_r + beta * d_s) ** 2 / ((1 - beta) ** 2 * v_r + beta ** 2 * v_s)

    @property
    def best_beta(self) -> float:
        d_r, d_s, v_r, v_s = self.moments
        return (d_s / v_s) / (d_s / v_s + d_r / v_r)

    @property
    def break_even(self) -> float:
        """The beta past which coupling is worse than none; 1 if there is none (the score tells as much as the outcome)."""
        d_r, d_s, v_r, v_s = self.moments
        bottom = d_r ** 2 * v_s - d_s ** 2 * v_r
        w = 2 * d_r * d_s * v_r / bottom if bottom > 0 else float("inf")
        return 1. if w == float("inf") else w / (1 + w)

    def sample(self, shape: tuple[int, ...], generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Actions 0 .. 1/p - 1, of which 0 shows the evidence, under a uniform policy; outcomes; scores."""
        action = torch.randint(0, round(1 / self.p), shape, generator=generator)
        z = action == 0
        r = (torch.rand(shape, generator=generator) < torch.where(z, 1 - self.eps, self.rho)).float()
        return action, r, torch.where(z, self.mu[1], self.mu[0]) + self.sd * torch.randn(shape, generator=generator)


def gradient_snr(model: Looking, beta: float, group: int = 8, questions: int = 20_000, seed: int = 0) -> float:
    """Monte Carlo: SNR |E g|^2 / tr Cov(g) of the policy gradient g of one question's group, with eq. 3's advantages."""
    action, r, s = model.sample((questions * group,), torch.Generator().manual_seed(seed))
    A = advantages(r, s[:, None], torch.ones(len(r), 1, dtype=torch.bool), group, beta)
    score = torch.eye(round(1 / model.p))[action] - model.p                          # grad of log softmax, (N, actions)
    g = (A[:, None] * score).view(questions, group, -1).mean(1)
    return (g.mean(0).square().sum() / g.var(0).sum()).item()


def aim(beta: float, vague_score: float) -> float:
    """Cosine between the exact gradients of E[R] and E[r] when the agent can also say something vague: four places times
    two labels, uniform policy; a specific label scores .8 or .3 with z, a vague one `vague_score` wherever it looks."""
    place, vague = torch.arange(8) % 4, torch.arange(8) >= 4
    r = torch.where(place == 0, .9, .25)
    s = torch.where(vague, vague_score, torch.where(place == 0, .8, .3))
    centred = lambda value: value - value.mean()
    return torch.cosine_similarity(centred((1 - beta) * r + beta * s), centred(r), dim=0).item()


if __name__ == "__main__":
    stories = ["looked well, right", "looked well, misread", "looked badly, lucky", "looked badly, wrong", "never looked, lucky"]
    r = torch.tensor([1., 0, 1, 0, 1])
    scores = torch.tensor([[.9, .9], [.9, .9], [.1, .1], [.1, .1], [0, 0]])
    looked = torch.tensor([[True, True]] * 4 + [[False, False]])
    print(f"{'one group of five':22} {'r':>4} {'S':>5}" + "".join(f"{'A, ' + name:>12}" for name in ALGORITHMS))
    S = trajectory_score(scores, looked, .95)
    columns = [advantages(r, scores, looked, 5, row.beta, std=row.std) for row in ALGORITHMS.values()]
    for i, story in enumerate(stories):
        print(f"{story:22} {r[i]:4.0f} {S[i]:5.2f}" + "".join(f"{column[i]:12.2f}" for column in columns))
    print("GRPO pays all right answers alike; MAPO tells the look that earned the answer from the guess that hit it.")

    betas = (0., .1, .2, .4, .6, .8, 1.)
    print(f"\n{'signal to noise':34}" + "".join(f"  b={b:<4}" for b in betas) + "  best b   hurts past b")
    for name, model in {"good score, sd .2": Looking(sd=.2), "noisy score, sd .6": Looking(sd=.6),
                        "useless score, mu_1 = mu_0": Looking(mu=(.5, .5)), "two options, luck 1/2": Looking(rho=.5),
                        "no luck, noisy score": Looking(rho=0., eps=.05, sd=.6)}.items():
        useful = model.mu[0] != model.mu[1]
        limits = (f"{model.best_beta:8.3f}" + ("   never" if model.break_even == 1 else f"   {model.break_even:.3f}")) if useful else "       0   0"
        print(f"{name:26} eq. 8   " + "".join(f"{model.snr(b):8.3f}" for b in betas) + limits)
        print(f"{'':26} gradient" + "".join(f"{gradient_snr(model, b):8.2f}" for b in betas))
    print("\nIn each pair of rows the scalar theory and the measured policy gradient peak at the same beta.")
    print("\na vague label scores      " + "".join(f"  b={b:<4}" for b in betas) + "  (cosine with the gradient of E[r])")
    for vague in (.2, .425, .95):
        print(f"{vague:<26}" + "".join(f"{aim(b, vague):8.2f}" for b in betas))
    print("A score that words alone can raise turns the gradient away from looking; so labels are contrasted and bounded.")
