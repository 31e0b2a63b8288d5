"""The variance theory, predicted and measured: the tables of docs/theory.md and credit.md.

What it teaches: a proposition is worth what its check is worth. Each function below is one
experiment. It states a proposition of these two pages, where the equations and proofs are, and
returns what the proposition predicts beside what was measured. Advantages with a score go through
mapo.advantages, the code that trains. Measured is on a sample, with its standard error, or exactly,
over all groups of trajectories that there can be.

Run it:  python docs/theory.py        # every table of both; 11 s
"""
import math
import sys
from dataclasses import dataclass
from itertools import combinations_with_replacement
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
from mapo import CREDITS, advantages, score_to_go, trajectory_score

BETAS = (0., .1, .2, .4, .6, .8, 1.)


# ---- the model of one look -----------------------------------------------------------------------

@dataclass(frozen=True)
class Moments:
    """What z moves of r and of s, and their noise given z. Eq. 15 to 17 follow from these."""
    d_r: float            # E[r | z=1] - E[r | z=0]
    d_s: float
    v_r: float            # E[Var(r | z)]
    v_s: float
    c: float = 0.         # E[Cov(r, s | z)], the noise that r and s share

    def snr(self, beta: float) -> float:
        """Eq. 15."""
        signal = (1 - beta) * self.d_r + beta * self.d_s
        noise = (1 - beta) ** 2 * self.v_r + beta ** 2 * self.v_s + 2 * beta * (1 - beta) * self.c
        return signal ** 2 / noise

    @property
    def best_beta(self) -> float:
        """Eq. 16."""
        gain = self.d_s * self.v_r - self.d_r * self.c
        cost = self.d_r * self.v_s - self.d_s * self.c
        return weight_of(gain, cost)

    @property
    def break_even(self) -> float:
        """Eq. 17: the beta past which coupling is worse than none; 1: no beta is."""
        gain = 2 * self.d_r * (self.d_s * self.v_r - self.d_r * self.c)
        cost = self.d_r ** 2 * self.v_s - self.d_s ** 2 * self.v_r
        return weight_of(gain, cost)


def weight_of(gain: float, cost: float) -> float:
    """The beta with beta / (1 - beta) = gain / cost."""
    if gain <= 0:
        return 0.
    return 1. if cost <= 0 else gain / (gain + cost)


@dataclass(frozen=True)
class Looking:
    """One look: z says whether the crop shows the evidence; then come an outcome and a score."""
    p: float = .25                         # P(z = 1): one of 1/p places shows the evidence
    eps: float = .1                        # P(wrong | z = 1)
    luck: float = .25                      # P(right | z = 0)
    mu: tuple[float, float] = (.3, .8)     # E[s | z = 0], E[s | z = 1]
    sd: float = .2                         # the score's own noise
    shared: float = 0.                     # how much of the outcome's noise the score repeats

    @property
    def moments(self) -> Moments:
        v_r = self.p * self.eps * (1 - self.eps) + (1 - self.p) * self.luck * (1 - self.luck)
        v_s = self.sd ** 2 + self.shared ** 2 * v_r
        d_s = self.mu[1] - self.mu[0]
        return Moments(1 - self.eps - self.luck, d_s, v_r, v_s, self.shared * v_r)

    def gradient_snr(self, beta: float, group: int = 8) -> float:
        """Eq. 18, under the uniform policy of `sample`: of 1 / p places one shows the evidence."""
        k, grad_p = 1 - self.p, self.p ** 2 * (1 - self.p)       # |phi|^2; |gradient of p|^2
        snr = self.moments.snr(beta)
        if not snr:
            return 0.
        noise = k / ((group - 1) * grad_p) * (1 / snr + self.p * (1 - self.p))
        return 1 / (noise - (group - 2) / (group * (group - 1)))

    def sample(self, shape: tuple[int, ...], generator: torch.Generator) -> tuple[Tensor, ...]:
        """Places under a uniform policy (place 0 shows the evidence), outcomes, scores: `shape`."""
        place = torch.randint(0, round(1 / self.p), shape, generator=generator)
        right = torch.where(place == 0, 1 - self.eps, self.luck)
        r = (torch.rand(shape, generator=generator) < right).float()
        noise = self.sd * torch.randn(shape, generator=generator) + self.shared * (r - right)
        return place, r, torch.where(place == 0, self.mu[1], self.mu[0]) + noise


# ---- measuring on a sample -----------------------------------------------------------------------

def with_error(statistic, *samples: Tensor, blocks: int = 20) -> tuple[Tensor, Tensor]:
    """A statistic of the samples, and its standard error, from the same of 20 equal blocks."""
    parts = [statistic(*block) for block in zip(*(x.chunk(blocks) for x in samples))]
    return statistic(*samples), torch.stack(parts).std(0) / blocks ** .5


def snr_of(g: Tensor) -> Tensor:
    """Gradients (n, D), one of each question -> |E g|^2 / tr Cov(g)."""
    return g.mean(0).square().sum() / g.var(0).sum()


def snr_ratio(g: Tensor, g_0: Tensor) -> Tensor:
    return snr_of(g) / snr_of(g_0)


def scalar_snr(R: Tensor, z: Tensor) -> Tensor:
    """Eq. 15, measured: returns R (n,), z (n,) bool."""
    noise = torch.where(z, R - R[z].mean(), R - R[~z].mean()).square().mean()
    return (R[z].mean() - R[~z].mean()).square() / noise


def policy_gradient(A: Tensor, action: Tensor, actions: int, group: int) -> Tensor:
    """A, action (N,) -> (questions, actions), by the logits of a uniform softmax."""
    phi = torch.eye(actions)[action] - 1 / actions           # grad of log pi, (N, actions)
    return (A[:, None] * phi).view(-1, group, actions).mean(1)


def drawn(model: Looking, questions: int = 40_000, group: int = 8) -> tuple[Tensor, ...]:
    """Places, outcomes and scores of groups end to end, (N,) each: the same whatever beta is."""
    return model.sample((questions * group,), torch.Generator().manual_seed(0))


def gradients(draw: tuple[Tensor, ...], model: Looking, beta: float, group: int = 8,
              std: bool = False) -> Tensor:
    """Each question's gradient by eq. 3 (questions, places); std: with its division by the group's
    deviation."""
    place, r, s = draw
    A = advantages(r, s[:, None], torch.ones(len(r), 1, dtype=torch.bool), group, beta, std=std)
    return policy_gradient(A, place, round(1 / model.p), group)


def edge(model: Looking, beta: float) -> tuple[float, float, tuple[Tensor, Tensor]]:
    """SNR at beta over that at 0: by eq. 15, by eq. 18, and of the gradient, with its error."""
    draw = drawn(model)
    g, g_0 = gradients(draw, model, beta), gradients(draw, model, 0.)
    return (model.moments.snr(beta) / model.moments.snr(0.),
            model.gradient_snr(beta) / model.gradient_snr(0.), with_error(snr_ratio, g, g_0))


# ---- the propositions ----------------------------------------------------------------------------

def group_effect(group: int = 8, questions: int = 50_000, seed: int = 0) -> list[tuple]:
    """What baselines remove, and the group's mean among them; eq. 13 and 14.

    Half of the questions are easy, P(r=1) = .5, the others hard, .1. Where the look is right, one
    place of four, it is .4 more. So E[r | q] is .6 or .2, and Var(r) = .2 within + .04 between.
    The gradient of E[r | q] is (.075, -.025, -.025, -.025) in both kinds of question; its square
    is .0075, and |phi|^2 is .75. Returns rows: what, predicted, (measured, error)."""
    g = torch.Generator().manual_seed(seed)
    place = torch.randint(0, 4, (questions, group), generator=g)
    base = torch.where(torch.rand(questions, 1, generator=g) < .5, .5, .1)
    true_mean = base + .1
    r = (torch.rand(questions, group, generator=g) < base + .4 * (place == 0)).float()
    total, within = (r - .4).square().mean(1), r.var(1)
    centred = r - r.mean(1, keepdim=True)
    others = r - (r.sum(1, keepdim=True) - r) / (group - 1)
    mean = torch.Tensor.mean
    rows = [("Var(r)", .24, with_error(mean, total)),
            ("within questions", .20, with_error(mean, within)),
            ("between questions", .04, with_error(mean, total - within)),
            ("left after the mean, eq. 14", .20 * (1 - 1 / group),
             with_error(mean, centred.square().mean(1)))]
    exact, square = torch.tensor([.075, -.025, -.025, -.025]), .0075

    def alone(second_moment: float) -> float:          # E[A^2], if A_i depends on no other r
        return square * group / (.75 * second_moment - square)

    of_group = square / (.75 * .20 / (group - 1) - (group - 2) / (group * (group - 1)) * square)
    for name, A, length, snr in (
            ("none", r, 1., alone(.40)), ("a constant, .4", r - .4, 1., alone(.24)),
            ("mean of the others", others, 1., of_group),
            ("mean of the group", centred, 1 - 1 / group, of_group),
            ("true mean of the question", r - true_mean, 1., alone(.20))):
        gradient = policy_gradient(A.flatten(), place.flatten(), 4, group)
        along = gradient @ exact / square
        rows += [(f"length, {name}", length, with_error(mean, along)),
                 (f"SNR, {name}", snr, with_error(snr_of, gradient))]
    return rows


def vague_label(beta: float, vague_score: float | None) -> float:
    """Where eq. 15 fails: the score depends on the words, not on z alone.

    Four places times two labels, uniform policy. A specific label scores .8 or .3 with z, a vague
    one `vague_score` everywhere (None: as a specific one). Returns the cosine between the gradients
    of E[R] and of E[r], exactly."""
    place, vague = torch.arange(8) % 4, torch.arange(8) >= 4
    r, s = torch.where(place == 0, .9, .25), torch.where(place == 0, .8, .3)
    if vague_score is not None:
        s = torch.where(vague, vague_score, s)
    R = (1 - beta) * r + beta * s                            # of each of the eight actions
    return torch.cosine_similarity(R - R.mean(), r - r.mean(), dim=0).item()


def credit_effect(turns: int = 3, lam: float = .95, group: int = 8, questions: int = 20_000,
                  seed: int = 0) -> list[tuple]:
    """A look is paid with less noise if only what it can change is counted, eq. 19.

    Three independent looks, S alone. Returns rows: turn and credit, eq. 19, (measured, error) on
    what the look is paid, and (SNR, error) of its policy gradient."""
    model = Looking()
    place, _, s = model.sample((questions * group, turns), torch.Generator().manual_seed(seed))
    looked = torch.ones_like(s, dtype=torch.bool)
    S, to_go = trajectory_score(s, looked, lam), score_to_go(s, looked, lam)
    d_s, v_s = model.moments.d_s, model.moments.v_s
    V = v_s + model.p * (1 - model.p) * d_s ** 2             # the variance of any look's score
    w = [lam ** (turns - 1 - t) for t in range(turns)]
    rows = []
    for t in range(turns):
        paid = {"trajectory": (S, range(turns)), "look": (to_go[:, t], range(t, turns)),
                "aim": (s[:, t], [t])}
        for credit, (R, counted) in paid.items():
            noise = w[t] ** 2 * v_s + sum(w[u] ** 2 * V for u in counted if u != t)
            A = advantages(torch.zeros(len(s)), s, looked, group, 1., lam, credit)
            A = A if credit == "trajectory" else A[:, t]
            gradient = policy_gradient(A, place[:, t], 4, group)
            rows.append((f"turn {t + 1}, {credit}", (w[t] * d_s) ** 2 / noise,
                         with_error(scalar_snr, R, place[:, t] == 0), with_error(snr_of, gradient)))
    return rows


def look_lengths(turns: int = 3, lam: float = .95, group: int = 8, questions: int = 20_000,
                 seed: int = 0) -> list[tuple]:
    """Credit by look pays later looks more: how long each turn's update is beside its part of the
    gradient of E[S]. Returns rows: turn, W_1 / W_t - 1 / G, (measured, error)."""
    model = Looking()
    place, _, s = model.sample((questions * group, turns), torch.Generator().manual_seed(seed))
    A = advantages(torch.zeros(len(s)), s, torch.ones_like(s, dtype=torch.bool), group, 1., lam,
                   "look", std=False)
    w = [lam ** (turns - 1 - t) for t in range(turns)]
    grad_p, rows = model.p * (torch.eye(4)[0] - 1 / 4), []
    for t in range(turns):
        exact = w[t] / sum(w) * model.moments.d_s * grad_p
        gradient = policy_gradient(A[:, t], place[:, t], 4, group)
        along = gradient @ exact / exact.square().sum()
        rows.append((f"turn {t + 1}", sum(w) / sum(w[t:]) - 1 / group,
                     with_error(torch.Tensor.mean, along)))
    return rows


def answers(luck: float, credit: str, beta: float = .4, count: int = 200_000,
            seed: int = 0) -> list[tuple]:
    """S in an answer's advantage: no signal, and noise of either sign, eq. 20.

    After one look the agent writes two words. The first decides: it is right with P(r | z), one
    logit for each z. The second is a coin and changes nothing. One group of `count` trajectories,
    so that its mean is the true one. Returns rows: what, predicted, (measured, error)."""
    model, g = Looking(luck=luck), torch.Generator().manual_seed(seed)
    place, r, s = model.sample((count,), g)
    coin = torch.randint(0, 2, (count,), generator=g)
    scores = torch.stack([s, torch.zeros(count)], 1)         # turn 2 is the answer
    looked = torch.tensor([[True, False]]).expand(count, 2)
    A = advantages(r, scores, looked, count, beta, credit=credit, std=False)
    A = A if credit == "trajectory" else A[:, 1]
    phi = r - torch.where(place == 0, 1 - model.eps, luck)
    # predicted, over z and r: (1, 1), (1, 0), (0, 1), (0, 0)
    p, right = torch.tensor([.25, .25, .75, .75]), torch.tensor([.9, .9, luck, luck])
    outcome, mu = torch.tensor([1., 0., 1., 0.]), torch.tensor([.8, .8, .3, .3])
    chance = p * torch.where(outcome == 1, right, 1 - right)
    share = beta if credit == "trajectory" else 0.           # the weight of S in A
    mean_A = (1 - beta) * (outcome - chance @ outcome) + share * (mu - chance @ mu)
    square = mean_A ** 2 + (share * model.sd) ** 2           # E[A^2 | z, r]
    mean = torch.Tensor.mean
    return [("signal", chance @ (mean_A * (outcome - right)), with_error(mean, A * phi)),
            ("noise, deciding word", chance @ (square * (outcome - right) ** 2),
             with_error(mean, (A * phi).square())),
            ("noise, other word", chance @ square / 4,
             with_error(mean, (A * (coin - .5)).square()))]


# ---- exactly: tables of trajectories -------------------------------------------------------------
# A table has a row for each kind of trajectory: (chance, scores by turn, phi by logit). NONE is the
# score of a turn without a look; phi is the gradient of the log-probability of what was chosen.

NONE = math.nan


def all_groups(chances: list[float], group: int) -> tuple[Tensor, Tensor]:
    """Every group there can be, order aside: kinds (M, group), and the chance of each (M,)."""
    kinds = torch.tensor(list(combinations_with_replacement(range(len(chances)), group)))
    counts = torch.nn.functional.one_hot(kinds, len(chances)).sum(1)
    orders = math.lgamma(group + 1) - torch.lgamma(counts + 1.).sum(1)
    return kinds, orders.exp() * torch.tensor(chances)[kinds].prod(1)


def expected_update(table: list[tuple], turn: list[int], credit: str, group: int = 8) -> Tensor:
    """What the score alone does to each logit (D,): E[mean_i A_it phi_i], exactly.

    turn (D,): the turn, from 0, in which each logit chooses."""
    chances, scores, phi = zip(*table)
    kinds, weight = all_groups(chances, group)
    s = torch.tensor(scores)[kinds.flatten()]                # (M x group, T)
    A = advantages(torch.zeros(len(s)), s.nan_to_num(), ~s.isnan(), group, 1., 1., credit,
                   std=False)
    if credit == "trajectory":
        A = A[:, None].expand(s.shape)
    return weight @ (A[:, turn].view(*kinds.shape, -1) * torch.tensor(phi)[kinds]).mean(1)


# Scores .99, then .3: chance 1/2 to look again. The logit is that of a second look.
FALLING = [(.5, [.99, NONE, NONE], [-.5]),
           (.5, [.99, .3, NONE], [.5])]
# Scores .4, .2, .96: chance 1/2 to look again after each. Logits: a second look, a third look.
RISING = [(.5, [.4, NONE, NONE, NONE], [-.5, 0.]),
          (.25, [.4, .2, NONE, NONE], [.5, -.5]),
          (.25, [.4, .2, .96, NONE], [.5, .5])]
# A first look scores .9, a second .5; once in ten the first turn fails, and the only look is late.
BY_TURN = [(.45, [.9, NONE, NONE], [-.5]),
           (.45, [.9, .5, NONE], [.5]),
           (.1, [NONE, .9, NONE], [0.])]
BY_LOOK = [*BY_TURN[:2], (.1, [.9, NONE, NONE], [0.])]       # the same, where looks are counted


def first_look(look: float) -> list[tuple]:
    """Look once, with chance `look`, for a score of .8, or answer at once."""
    return [(1 - look, [NONE, NONE], [-look]),
            (look, [.8, NONE], [1 - look])]


def two_looks(first: float, beside: float, true: float, on: float = .7) -> list[tuple]:
    """A true look scores .99, one beside .1. The first is true with chance `first`; with chance
    `on` there is a second, true with chance `beside` or `true` after such a first one.

    Logits: the first aim; going on after a look beside; after a true one; the second aim."""
    miss = 1 - first
    return [(miss * (1 - on), [.1, NONE, NONE], [-first, -on, 0., 0.]),
            (miss * on * (1 - beside), [.1, .1, NONE], [-first, 1 - on, 0., -beside]),
            (miss * on * beside, [.1, .99, NONE], [-first, 1 - on, 0., 1 - beside]),
            (first * (1 - on), [.99, NONE, NONE], [miss, 0., -on, 0.]),
            (first * on * (1 - true), [.99, .1, NONE], [miss, 0., 1 - on, -true]),
            (first * on * true, [.99, .99, NONE], [miss, 0., 1 - on, 1 - true])]


def kept(chance: float, group: int) -> float:
    """Eq. 22."""
    return 1 - (1 - (1 - chance) ** group) / (group * chance)


def aim_objective(first: float, beside: float, true: float, on: float = .7,
                  group: int = 8) -> list[float]:
    """Eq. 21 for the four logits of `two_looks`, times eq. 22."""
    miss, mean = 1 - first, (1 - first) * beside + first * true
    spread = miss * beside * (1 - beside) + first * true * (1 - true)
    first_aim = first * miss * .89 * kept(1., group)
    second_turn = [miss * (1 - on) * (beside - mean), first * (1 - on) * (true - mean), spread]
    return [first_aim, *(on * .89 * kept(on, group) * x for x in second_turn)]


def stopping(baseline: str, group: int = 8) -> Tensor:
    """Baselines by turn, where the policy decides how many turns there are.

    Turn 1: answer, reward .5, or go on; turn 2: look well, .9, or badly, .3; each choice with
    chance 1/2. Returns the expected gradient by the logits of going on and of looking well (2,)."""
    kinds, weight = all_groups([.5, .25, .25], group)
    reward = torch.tensor([[.5, 0.], [0., .9], [0., .3]])[kinds]             # (M, group, turns)
    phi = torch.tensor([[-.5, 0.], [.5, .5], [.5, -.5]])[kinds]              # logit t is of turn t
    came = torch.stack([kinds >= 0, kinds > 0], 2).float()                   # to turn t
    count = came.sum(1, keepdim=True)
    to_go = reward.flip(2).cumsum(2).flip(2)
    total = to_go.sum(1, keepdim=True)
    if baseline == "whole trajectory":
        R, none = reward.sum(2).flatten(), torch.zeros(kinds.numel(), 1)
        A = advantages(R, none, none, group, 0., std=False).view(*kinds.shape, 1)
    elif baseline == "return, mean of others there":
        A = to_go - (total - to_go) / (count - 1).clamp(min=1)
    elif baseline == "return, mean of all there":
        A = to_go - total / count.clamp(min=1)
    else:                                                    # centred turn by turn, then summed
        centred = (reward - reward.sum(1, keepdim=True) / count.clamp(min=1)) * came
        A = centred.flip(2).cumsum(2).flip(2)
    return weight @ (A * phi * came).mean(1)


# ---- the tables ----------------------------------------------------------------------------------

def show(title: str, head: list, rows: list[tuple], width: int = 17, digits: int = 4) -> None:
    """Print a table. A cell is a text, a number, or a pair: value ± error."""
    def cell(value):
        if isinstance(value, str):
            return value
        if isinstance(value, tuple):
            return f"{value[0]:.{digits}f} ± {value[1]:.{digits}f}"
        return f"{round(float(value), digits) + 0.:.{digits}f}"              # + 0.: no -0

    print(f"\n{title}\n{'':33}" + "".join(f"{name:>{width}}" for name in head))
    for name, *values in rows:
        print(f"   {name:30}" + "".join(f"{cell(value):>{width}}" for value in values))


def score_rows() -> list[tuple]:
    """Eq. 15, and measured on returns; eq. 18, and measured on policy gradients,
    also with eq. 3's division by the group's deviation, which eq. 18 leaves out."""
    models = {"good score, sd .2": Looking(), "noisy score, sd .6": Looking(sd=.6),
              "useless score": Looking(mu=(.5, .5)), "two options, luck 1/2": Looking(luck=.5),
              "no luck, noisy score": Looking(luck=0., eps=.05, sd=.6),
              "shared noise, c/v_r .5": Looking(shared=.5),
              "shared noise, c/v_r 1": Looking(shared=1.)}
    rows = []
    for name, model in models.items():
        m, draw = model.moments, drawn(model)
        place, r, s = draw
        rows.append((name, *(m.snr(b) for b in BETAS), "", m.best_beta,
                     m.break_even if m.break_even < 1 else "never"))
        measured = {"returns": [with_error(scalar_snr, (1 - b) * r + b * s, place == 0)
                                for b in BETAS]}
        for kind, std in (("gradient", False), ("gradient, with std", True)):
            measured[kind] = [with_error(snr_of, gradients(draw, model, b, std=std))
                              for b in BETAS]
        for kind, found in measured.items():
            if kind == "gradient":
                rows.append(("   gradient, eq. 18", *map(model.gradient_snr, BETAS)))
            values, errors = zip(*found)
            rows.append((f"   {kind}", *values, max(errors)))
    return rows


def stopping_rows(group: int = 8) -> list[tuple]:
    """Predicted and exact, going on; predicted and exact, looking well."""
    most, share = 1 - 1 / group, kept(.5, group)
    rows = []
    for name, on, well in (("whole trajectory", .025 * most, .075 * most),
                           ("return, mean of others there", .025, .075),
                           ("return, mean of all there", .025 * most, .075 * share),
                           ("reward, mean of all there", -.125 * most, .075 * share)):
        exact = stopping(name, group)
        rows.append((name, on, exact[0], well, exact[1]))
    return rows


def choice_rows() -> list[tuple]:
    """What the score does to the choice to look, under each credit."""
    rows = []
    for name, table, logit, turn in (
            ("scores .99, .3: look 2", FALLING, 0, [1]),
            ("scores .4, .2, .96: look 2", RISING, 0, [1, 2]),
            ("scores .4, .2, .96: look 3", RISING, 1, [1, 2]),
            ("look at all, chance .1", first_look(.1), 0, [0]),
            ("look at all, chance .5", first_look(.5), 0, [0]),
            ("look at all, chance .9", first_look(.9), 0, [0]),
            ("a late look, turns counted", BY_TURN, 0, [1]),
            ("a late look, looks counted", BY_LOOK, 0, [1])):
        rows.append((name, *(expected_update(table, turn, c)[logit] for c in CREDITS)))
    return rows


def two_looks_rows() -> list[tuple]:
    rows = []
    for name, world in {"at the start": (.33, .28, .28), "first look learnt": (.9, .5, .5),
                        "better after true": (.5, .2, .6)}.items():
        rows += [(f"{name}, {c}", *expected_update(two_looks(*world), [0, 1, 1, 1], c))
                 for c in CREDITS]
        rows.append(("   aim by eq. 21 and 22", *aim_objective(*world)))
    return rows


def luck_rows() -> list[tuple]:
    """Luck and eps as GRPO had them in its first 20 steps (docs/limits.md, its section Luck): from
    accuracy a, hit h and lucky l, luck = a l / (1 - h) and eps = 1 - a (1 - l) / h."""
    rows = []
    for name, luck, eps in (("2 options", .39, .18), ("4 options", .23, .20),
                            ("8 options", .16, .21), ("open", .11, .20)):
        model = Looking(luck=luck, eps=eps, mu=(.17, .64), sd=.06 ** .5)
        m = model.moments
        rows.append((f"{name}, luck {luck:.2f}", m.snr(0.), m.snr(.4), *edge(model, .4),
                     m.best_beta))
    return rows


def main() -> None:
    betas = [f"b={b:g}" for b in BETAS] + ["±"]
    show("1. the group", ["predicted", "measured"], group_effect())
    show("2. the score: SNR by eq. 15, and measured", betas + ["best b", "hurts past"],
         score_rows(), 11, 3)
    show("a vague label: cosine of grad E[R] and grad E[r]", betas[:-1],
         [(f"vague scores {score or 'as specific'}", *(vague_label(b, score) for b in BETAS))
          for score in (None, .2, .425, .95)], 9, 3)
    show("credit: three looks, S alone: SNR", ["eq. 19", "measured", "gradient"], credit_effect(),
         17, 3)
    show("credit by look: length of the update", ["predicted", "measured"], look_lengths(), 17, 3)
    show("baselines by turn: gradient of", ["going on", "exact", "looking well", "exact"],
         stopping_rows(), 14)
    for luck in (.25, .5):
        for credit in ("trajectory", "look"):
            show(f"an answer's words, luck {luck}, credit by {credit}", ["predicted", "measured"],
                 answers(luck, credit))
    show("what the score does to the choice to look", list(CREDITS), choice_rows(), 12)
    show("two looks", ["first aim", "on, beside", "on, true", "second aim"], two_looks_rows(), 12)
    show("3. luck", ["SNR, b=0", "b=.4", "ratio", "eq. 18", "of gradients", "best b"],
         luck_rows(), 16, 3)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
