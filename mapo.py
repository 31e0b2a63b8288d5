"""Scores -> returns -> advantages -> loss: MAPO, GRPO and its kin, and PPO as rows of one table.

What it teaches: *where* the semantic score enters. A group of G trajectories answers one question.
Trajectory i has an outcome r_i, 1 or 0: was the answer right? A turn t of it that looks has a score
s_it in [0, 1]: did the crop show what the agent said that it looks for?

    S_i = sum_t lam^(n_it) s_it / sum_t lam^(n_it)                (1)
    R_i = (1 - beta) r_i + beta S_i                               (2)
    A_i = (R_i - mean R) / (std R + 1e-6)                         (3)
    L = - sum_ij w_ij min(ratio_ij A_i, clip(ratio_ij, 1 - low, 1 + high) A_i)       (4)

Eq. 1: the sums are over the turns that look; n_it is the number of looks after turn t. Later looks
lead to the answer, so they weigh more. No look: S_i = 0.
Eq. 2: the coupling. With beta = 0 this is GRPO (arXiv 2402.03300).
Eq. 3: mean and std are those of the group. This is GRPO's advantage. With credit by look or by aim
it becomes A_it, one for each turn (eq. 5, 6).
Eq. 4: PPO's clipped surrogate, over the tokens j of the agent. ratio_ij is the token's probability
under the new policy over that under the old one; the w_ij sum to 1 over the batch.

N trajectories, T turns, L tokens of the longest trajectory. Tensors over tokens are (N, L - 1):
column j speaks of token j + 1, as nothing predicts the first token.

MAPO (arXiv 2604.06777) publishes no formula that we could reach. Eq. 1 and 2 are our reading of
it, and each number is an option. README.md lists what is the paper's and what is assumed.
docs/theory.md says when the coupling pays, and where it fails; docs/credit.md, which turn to pay.

Run it:  python mapo.py     # advantages of a group of five, by each row's beta, by each credit; 2 s
"""
from dataclasses import dataclass

import torch
from torch import Tensor


# ---- eq. 1 to 3: scores -> advantages ------------------------------------------------------------

def trajectory_score(scores: Tensor, looked: Tensor, lam: float) -> Tensor:
    """Eq. 1. scores (N, T); looked (N, T), whether turn t was a look -> S (N,)."""
    weight = look_weights(looked, lam).to(scores.dtype)
    return (weight * scores).sum(1) / weight.sum(1).clamp(min=1e-8)


def look_weights(looked: Tensor, lam: float) -> Tensor:
    """lam^n_it of eq. 1, and 0 for a turn without a look: looked (N, T) -> (N, T)."""
    later = looks_left(looked) - looked.float()           # n_it, the looks after turn t
    return lam ** later * looked


def looks_left(looked: Tensor) -> Tensor:
    """looked (N, T) -> (N, T), the number of looks from turn t on."""
    return looked.float().flip(1).cumsum(1).flip(1)


def coupled_return(r: Tensor, S: Tensor, beta: float) -> Tensor:
    """Eq. 2, the return of every row of the table: r and S of one shape -> R of that shape."""
    return (1 - beta) * r + beta * S


def group_mean(values: Tensor, group: int) -> Tensor:
    """values (N, ..) of contiguous groups -> (N, ..): the mean of each trajectory's group."""
    groups = values.view(-1, group, *values.shape[1:])
    return groups.mean(1).repeat_interleave(group, 0)


def advantages(r: Tensor, scores: Tensor, looked: Tensor, group: int, beta: float,
               lam: float = .95, credit: str = "trajectory", std: bool = True) -> Tensor:
    """Eq. 1 to 3: outcomes r (N,), scores and looked (N, T) -> advantages.

    N is questions x group; the trajectories of a group are contiguous. `credit` says which turns
    the score pays: "trajectory", all alike, (N,); "look", eq. 5, or "aim", eq. 6: (N, T).
    All are divided by the std of the returns R; std False leaves that out (Dr. GRPO). A group of
    equal returns gets exactly 0; one of nearly equal returns gets advantages as large as any. By
    look or aim there is no bound: R may hardly differ where the looks of a turn do. (The largest of
    450 trajectories of the row mapo was 2.9; by trajectory none exceeds sqrt(G - 1).)
    The standard deviation divides by G, not by G - 1 as in verl and TRL: a constant factor.
    Raises ValueError on shapes or options that do not fit."""
    check(r, scores, looked, group, beta, lam, credit)
    S = trajectory_score(scores, looked, lam)                                 # (N,)
    R = coupled_return(r, S, beta)                                            # (N,)
    sigma = R.view(-1, group).std(1, correction=0).repeat_interleave(group)   # (N,)
    scale = 1 / (sigma + 1e-6) if std else torch.ones_like(sigma)
    scale = torch.where(sigma > 1e-6, scale, 0.)          # equal returns, but for their rounding
    if credit == "trajectory":
        return (R - group_mean(R, group)) * scale
    if credit == "look":
        return look_credit(r, S, scores, looked, group, beta, lam) * scale[:, None]
    return aim_credit(r, S, scores, looked, group, beta) * scale[:, None]


def check(r: Tensor, scores: Tensor, looked: Tensor, group: int, beta: float, lam: float,
          credit: str) -> None:
    if r.ndim != 1 or scores.shape != looked.shape or len(scores) != len(r):
        shapes = f"{tuple(r.shape)}, {tuple(scores.shape)}, {tuple(looked.shape)}"
        raise ValueError(f"expected r (N,), scores and looked (N, T); found {shapes}")
    if group < 1 or len(r) % group:
        raise ValueError(f"expected a multiple of group={group} trajectories, found {len(r)}")
    if not (0 <= beta <= 1 and 0 < lam <= 1):
        raise ValueError(f"expected 0 <= beta <= 1 and 0 < lam <= 1; found {beta}, {lam}")
    if credit not in CREDITS:
        raise ValueError(f"expected credit {', '.join(CREDITS)}; found {credit!r}")


# ---- credit: which turns does the score pay? -----------------------------------------------------

CREDITS = ("trajectory", "look", "aim")


def look_credit(r: Tensor, S: Tensor, scores: Tensor, looked: Tensor, group: int, beta: float,
                lam: float) -> Tensor:
    """Credit by look -> (N, T), before the division by std R.

        A_it = (1 - beta) (r_i - mean r) + beta (S_it - mean S)                  (5)

    S_it is eq. 1 over the looks from turn t on, so a look is not paid for the looks before it. An
    answer cannot change the looks before it. So in a turn after the last look S_it is set to
    mean S, and the score neither pays nor blames the turn. (This forgets that whoever answers chose
    not to look again.)"""
    S_rest = score_to_go(scores, looked, lam)                                 # (N, T)
    no_look_left = looked.any(1, keepdim=True) & (looks_left(looked) == 0)
    S_rest = torch.where(no_look_left, group_mean(S, group)[:, None], S_rest)
    R = coupled_return(r, S, beta)
    return coupled_return(r[:, None], S_rest, beta) - group_mean(R, group)[:, None]


def score_to_go(scores: Tensor, looked: Tensor, lam: float) -> Tensor:
    """(N, T): eq. 1 over the looks from turn t on; 0 where no look is left."""
    turns = range(scores.shape[1])
    return torch.stack([trajectory_score(scores[:, t:], looked[:, t:], lam) for t in turns], 1)


def aim_credit(r: Tensor, S: Tensor, scores: Tensor, looked: Tensor, group: int,
               beta: float) -> Tensor:
    """Credit by aim -> (N, T), before the division by std R.

        A_it = (1 - beta) (r_i - mean r) + beta (s_it - mean of s_jt over the looks of turn t)  (6)

    A look is compared with the mean of the group's looks in the same turn: the score says where to
    look; whether to look again is left to the outcome. A turn without a look has no score term. One
    exception: a trajectory that never looked has - beta mean S in all its turns, as with the other
    credits (its S is 0), so that on the average the score still pays a first look. lam has a part
    only in mean S and in std R."""
    counts = group_mean(looked.float(), group)            # (N, T), the share that looks
    mean = group_mean(scores * looked, group) / counts.clamp(min=1e-8)
    aim = torch.where(looked.bool(), scores - mean, 0.)                       # (N, T)
    never = ~looked.any(1, keepdim=True)
    aim = torch.where(never, -group_mean(S, group)[:, None], aim)
    return (1 - beta) * (r - group_mean(r, group))[:, None] + beta * aim


# Side by side, before the division by std R, with b for beta and r' for r_i - mean r:
#
#               a look in turn t                          an answer after looks   never looked
# trajectory    R_i - mean R                              R_i - mean R            R_i - mean R
# look, eq. 5   (1 - b) r' + b (S from t on - mean S)     (1 - b) r'              R_i - mean R
# aim, eq. 6    (1 - b) r' + b (s_it - mean s of turn t)  (1 - b) r'              R_i - mean R
#
# R_i - mean R of a trajectory that never looked is (1 - b) r' - b mean S. A turn that ended in an
# error has the advantage of an answer; under "look", that of the look that follows, if one does.
# Under "aim" a look that is the only one of its group in that turn has s_it - mean s = 0.


# ---- eq. 4: advantages -> loss -------------------------------------------------------------------

def token_weights(mask: Tensor, mean: str = "trajectory") -> Tensor:
    """w of eq. 4: mask (N, L - 1) of the agent's tokens in the *whole* batch -> same shape, sum 1.
    (Of several ranks each has its batch; train.to_batch makes the sum over all of them 1.)

    mean "trajectory": every trajectory weighs the same; "token": every token does. Computed before
    the first backward, so that micro-batches of any size add up to the same gradient."""
    mask = mask.float()
    if mean == "token":
        return mask / mask.sum().clamp(min=1)
    return mask / mask.sum(1, keepdim=True).clamp(min=1) / len(mask)


def loss(logp: Tensor, old_logp: Tensor, advantage: Tensor, weight: Tensor, clip_low: float = .2,
         clip_high: float = .2, ratio: str = "token") -> tuple[Tensor, dict[str, Tensor]]:
    """Eq. 4. logp, old_logp, advantage, weight: (B, L - 1), of the B trajectories of a micro-batch;
    weight is 0 where the token is not the agent's.

    Returns the loss, a scalar, and what was measured on the way, summed with the weights: kl,
    the estimate E[ratio - 1 - log ratio] of KL(old || new) (Schulman's k3), and clip_fraction,
    the share of tokens whose gradient the clip removed. There is no dual clip (arXiv
    1912.09729): it would also bound a large ratio under a negative advantage."""
    log_ratio = (logp - old_logp).clamp(-20, 20)          # (B, L - 1)
    kl = (weight * (log_ratio.exp() - 1 - log_ratio)).sum().detach()
    if ratio == "sequence":
        log_ratio = sequence_log_ratio(logp, log_ratio, weight)
    ratios = log_ratio.exp()
    clipped = ratios.clamp(1 - clip_low, 1 + clip_high)
    surrogate = torch.minimum(ratios * advantage, clipped * advantage)
    stopped = (ratios * advantage > clipped * advantage).float()
    stats = {"kl": kl, "clip_fraction": (weight * stopped).sum().detach()}
    return -(weight * surrogate).sum(), stats


def sequence_log_ratio(logp: Tensor, log_ratio: Tensor, weight: Tensor) -> Tensor:
    """The logarithm of GSPO's ratio: the mean of the log-ratios of a trajectory's tokens, in each
    column of its row (B, L - 1).

    Its gradient is that of GSPO-token (arXiv 2507.18071, sec. 4.3):

        value at token j:    the row's mean, as if it were constant
        derivative of it:    1 by logp_j, 0 by the log-probabilities of the row's other tokens

    In plain GSPO each token's loss moves all tokens of the row. With one advantage for the
    trajectory both give the same gradient, as the weights of a row are equal. With one for each
    turn plain GSPO would mix the turns up."""
    own = (weight > 0).float()
    count = own.sum(1, keepdim=True).clamp(min=1)
    mean = (own * log_ratio).sum(1, keepdim=True) / count                     # (B, 1)
    return mean.detach() + (logp - logp.detach())         # value: the mean; slope: that of logp


# ---- the table -----------------------------------------------------------------------------------

@dataclass(frozen=True)
class Algorithm:
    """One row: how scores become a return, and how far one batch may move the policy.

    The row of MAPO is the coupling on GSPO's ratio, with ten times GSPO's clip range. What we could
    read of the paper leaves base and credit open; docs/choices.md says how they were chosen."""
    beta: float = 0.            # weight of the semantic score, eq. 2; composes with every row
    credit: str = "trajectory"  # which turns the score pays; composes with every row, too
    std: bool = True            # divide by the group's standard deviation, eq. 3
    ratio: str = "token"        # of each token, or "sequence": the geometric mean over a row
    mean: str = "trajectory"    # every trajectory weighs the same, or "token": every token does
    clip_low: float = .2
    clip_high: float = .2
    max_draws: int = 1          # of questions for a step; > 1: replaces groups without signal
    overlong: float = 0.        # share of the length limit over which eq. 7's penalty ramps
    critic: bool = False        # a value head gives the advantage, not the group: lib/critic.py


ALGORITHMS = {
    "mapo": Algorithm(beta=.4, credit="aim", ratio="sequence", clip_low=3e-3, clip_high=4e-3),
    "grpo": Algorithm(),                                                 # arXiv 2402.03300
    "dr_grpo": Algorithm(std=False, mean="token"),  # 2503.20783; the paper divides by a constant
    "dapo": Algorithm(mean="token", clip_high=.28, max_draws=10, overlong=.2),     # 2503.14476
    "gspo": Algorithm(ratio="sequence", clip_low=3e-4, clip_high=4e-4),  # arXiv 2507.18071
    "ppo": Algorithm(mean="token", critic=True),                         # arXiv 1707.06347
}


# ---- what DAPO adds ------------------------------------------------------------------------------

def has_signal(R: Tensor, group: int) -> Tensor:
    """R (N,) -> bool (N / group,): does the group teach anything? Not if all returns are equal.

    DAPO drops such groups and draws other questions (its eq. 11). Ask before the penalty for
    length is added: lengths alone are no reason to keep a group."""
    return R.view(-1, group).std(1, correction=0) > 1e-6


def overlong_penalty(lengths: Tensor, limit: int, buffer: int) -> Tensor:
    """DAPO's penalty for length (its eq. 13): lengths (N,) in tokens -> (N,), added to r.

        p(l) = clip((limit - buffer - l) / buffer, -1, 0)                        (7)

    It is 0 up to limit - buffer, and -1 at the limit. Raises ValueError on a buffer outside."""
    if not 0 < buffer <= limit:
        raise ValueError(f"expected 0 < buffer <= limit, found buffer {buffer}, limit {limit}")
    return ((limit - buffer - lengths) / buffer).clamp(-1, 0)


def demonstrate() -> None:
    """Five stories of one question, and what each row of the table makes of them: first with credit
    by trajectory, one number a story; then, for MAPO, a look and an answer by each credit."""
    stories = ["looked well, right", "looked well, misread", "looked badly, lucky",
               "looked badly, wrong", "never looked, lucky"]
    r = torch.tensor([1., 0, 1, 0, 1])
    scores = torch.tensor([[.9, .9], [.9, .9], [.1, .1], [.1, .1], [0, 0]])
    looked = torch.tensor([[True, True]] * 4 + [[False, False]])
    S = trajectory_score(scores, looked, .95)
    columns = {name: advantages(r, scores, looked, 5, row.beta, std=row.std)
               for name, row in ALGORITHMS.items() if not row.critic}    # PPO asks a value head
    header = "".join(f"{'A, ' + name:>12}" for name in columns)
    print(f"{'credit by trajectory':22} {'r':>4} {'S':>5}{header}")
    for i, story in enumerate(stories):
        cells = "".join(f"{column[i]:12.2f}" for column in columns.values())
        print(f"{story:22} {r[i]:4.0f} {S[i]:5.2f}{cells}")
    print("GRPO pays all right answers alike; "
          "MAPO tells the look that earned the answer from the lucky guess.\n"
          "dapo and gspo differ from grpo in eq. 4, dapo also in its questions and its penalty.\n"
          "MAPO's own credit is aim:\n")

    scores, looked = (torch.cat([x, torch.zeros(5, 1)], 1) for x in (scores, looked))   # + answers
    print(f"{'mapo, by credit':22}" + "".join(f"{credit:>18}" for credit in CREDITS))
    print(" " * 22 + f"{'look':>11}{'answer':>7}" * 3)
    of_credit = []
    for credit in CREDITS:
        A = advantages(r, scores, looked, 5, beta=.4, credit=credit)      # (5,) or (5, 3)
        A = A[:, None].expand(5, 3) if credit == "trajectory" else A
        of_credit.append(A)
    for i, story in enumerate(stories):
        print(f"{story:22}" + "".join(f"{A[i, 0]:11.2f}{A[i, 2]:7.2f}" for A in of_credit))


if __name__ == "__main__":
    torch.set_num_threads(1)
    demonstrate()
