"""The theory, predicted and measured."""
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
from mapo import advantages, trajectory_score, turn_score


# ---- why it can work, and when it does not: a model of one visual action --------------------------------------------
#
# z: did the crop show the evidence? P(r=1 | z=1) = 1 - eps (misreading), P(r=1 | z=0) = rho (luck), E[s | z] = mu_z,
# Var(s | z) = v_s. Signal to noise of a return: what z moves over what is left given z; c is the noise that r and s share.
#
#     SNR(b) = ((1-b) Dr + b Ds)^2 / ((1-b)^2 v_r + 2 b (1-b) c + b^2 v_s)     Dr = 1 - eps - rho, Ds = mu_1 - mu_0     (8)
#
# It is free of scale, which raw variance is not: halving a reward quarters its variance and teaches nothing.

@dataclass(frozen=True)
class Looking:
    p: float = 0.25        # P(z = 1)
    eps: float = 0.1
    rho: float = 0.25
    mu: tuple[float, float] = (0.3, 0.8)
    sd: float = 0.2        # the score's own noise
    shared: float = 0.0    # s = mu_z + sd x noise + shared x (r - E[r | z]): a judge that hears the answer

    @property
    def moments(self) -> tuple[float, float, float, float, float]:
        """Dr, Ds, v_r = E[Var(r | z)], v_s = E[Var(s | z)], c = E[Cov(r, s | z)]."""
        v_r = self.p * self.eps * (1 - self.eps) + (1 - self.p) * self.rho * (1 - self.rho)
        return 1 - self.eps - self.rho, self.mu[1] - self.mu[0], v_r, self.sd ** 2 + self.shared ** 2 * v_r, self.shared * v_r

    def snr(self, beta: float) -> float:
        """Eq. 8 (5 to 7 stand in reward.py)."""
        d_r, d_s, v_r, v_s, c = self.moments
        return ((1 - beta) * d_r + beta * d_s) ** 2 / ((1 - beta) ** 2 * v_r + 2 * beta * (1 - beta) * c + beta ** 2 * v_s)

    @property
    def best_beta(self) -> float:
        """The matched filter, w = b / (1-b) = (Ds v_r - Dr c) / (Dr v_s - Ds c)  (12); SNR_r + SNR_s there if c = 0."""
        d_r, d_s, v_r, v_s, c = self.moments
        top, bottom = d_s * v_r - d_r * c, d_r * v_s - d_s * c
        return 0. if top <= 0 else 1. if bottom <= 0 else top / (top + bottom)

    @property
    def break_even(self) -> float:
        """The b past which coupling is worse than none, w = 2 Dr (Ds v_r - Dr c) / (Dr^2 v_s - Ds^2 v_r)  (13); 1: no b hurts."""
        d_r, d_s, v_r, v_s, c = self.moments
        top, bottom = 2 * d_r * (d_s * v_r - d_r * c), d_r ** 2 * v_s - d_s ** 2 * v_r
        return 0. if top <= 0 else 1. if bottom <= 0 else top / (top + bottom)

    def sample(self, shape: tuple[int, ...], generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Actions 0 .. 1/p - 1, of which 0 shows the evidence, under a uniform policy; outcomes; scores."""
        action = torch.randint(0, round(1 / self.p), shape, generator=generator)
        right = torch.where(action == 0, 1 - self.eps, self.rho)
        r = (torch.rand(shape, generator=generator) < right).float()
        noise = self.sd * torch.randn(shape, generator=generator) + self.shared * (r - right)
        return action, r, torch.where(action == 0, self.mu[1], self.mu[0]) + noise


def with_error(statistic, *samples: Tensor, blocks: int = 20) -> tuple[Tensor, Tensor]:
    """A statistic of all the samples, and its Monte Carlo standard error, from the same statistic of 20 equal blocks."""
    parts = torch.stack([torch.as_tensor(statistic(*part)) for part in zip(*(x.chunk(blocks) for x in samples))])
    return torch.as_tensor(statistic(*samples)), parts.std(0) / blocks ** .5


def snr_of(g: Tensor) -> Tensor:
    """Gradients (n, D), one of each question -> |E g|^2 / tr Cov(g)."""
    return g.mean(0).square().sum() / g.var(0).sum()


def scalar_snr(R: Tensor, z: Tensor) -> Tensor:
    """Eq. 8 measured: returns R (n,), z (n,) bool -> what z moves, squared, over the variance left given z."""
    left = torch.where(z, R - R[z].mean(), R - R[~z].mean()).square().mean()
    return (R[z].mean() - R[~z].mean()).square() / left


def sampled(model: Looking, beta: float, questions: int = 40_000, group: int = 8, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Coupled returns (N,) of questions x group looks, z (N,), and each group's policy gradient (questions, actions), eq. 3."""
    action, r, s = model.sample((questions * group,), torch.Generator().manual_seed(seed))
    A = advantages(r, s[:, None], torch.ones(len(r), 1, dtype=torch.bool), group, beta)
    phi = torch.eye(round(1 / model.p))[action] - model.p                            # grad of log softmax, (N, actions)
    return (1 - beta) * r + beta * s, action == 0, (A[:, None] * phi).view(questions, group, -1).mean(1)


def edge(model: Looking, beta: float, **size) -> tuple[float, tuple, tuple]:
    """SNR at beta over SNR at 0: eq. 8; measured on returns, with error; on policy gradients, with error. Paired samples."""
    (R, z, g), (R_0, _, g_0) = sampled(model, beta, **size), sampled(model, 0., **size)
    return (model.snr(beta) / model.snr(0.), with_error(lambda a, b, z: scalar_snr(a, z) / scalar_snr(b, z), R, R_0, z),
            with_error(lambda a, b: snr_of(a) / snr_of(b), g, g_0))


def group_effect(group: int = 8, questions: int = 50_000, seed: int = 0) -> list[tuple]:
    """Proposition 1: rows (what, predicted, measured, error).

        Var(r) = E_q[Var(r | q)] + Var_q(E[r | q]),   E[(r_i - mean r)^2] = (1 - 1/G) E_q[Var(r | q)]        (14, 15)

    Half of the questions are easy: P(r=1) = .5, else .1; .4 more where the look is right, one place of four. So E[r | q]
    is .6 or .2, and grad E[r | q] = (.075, -.025, -.025, -.025) for both."""
    g = torch.Generator().manual_seed(seed)
    action = torch.randint(0, 4, (questions, group), generator=g)
    base = torch.where(torch.rand(questions, 1, generator=g) < .5, .5, .1)
    r = (torch.rand(questions, group, generator=g) < base + .4 * (action == 0)).float()
    phi, exact = torch.eye(4)[action] - .25, torch.tensor([.075, -.025, -.025, -.025])
    centred, others = r - r.mean(1, keepdim=True), (r.sum(1, keepdim=True) - r) / (group - 1)     # others: the mean without i
    within, size = r.var(1), exact.square().sum().item()
    estimate = {"no baseline": r, "mean of the others": r - others, "mean of all": centred}
    estimate = {k: (A[..., None] * phi).mean(1) for k, A in estimate.items()}
    one, two = (.2 * .75 - size) / 4, .5 * .315 - size    # Hoeffding's zeta of pairs; .315 = P(two differ in r and in place)
    paired = size * group * (group - 1) / (4 * (group - 2) * one + 2 * two)
    snr = {"no baseline": size * group / (.4 * .75 - size), "mean of the others": paired, "mean of all": paired}
    mean = torch.Tensor.mean
    return [("Var(r)", .24, *with_error(mean, (r - .4).square().mean(1))),
            ("  within questions, E_q[Var(r | q)]", .20, *with_error(mean, within)),
            ("  between questions, Var_q(E[r | q])", .04, *with_error(mean, (r - .4).square().mean(1) - within)),
            ("left after the group's mean, eq. 15", .20 * (1 - 1 / group), *with_error(mean, centred.square().mean(1))),
            *((f"gradient / exact one, {k}", 1 - 1 / group if k == "mean of all" else 1.,
               *with_error(lambda x: x.mean(0) @ exact / size, x)) for k, x in estimate.items()),
            *((f"gradient's SNR, {k}", snr[k], *with_error(snr_of, x)) for k, x in estimate.items())]


def credit_effect(model: Looking = Looking(), turns: int = 3, lam: float = .95, group: int = 8, questions: int = 20_000,
                  seed: int = 0) -> list[tuple]:
    """Proposition 3 on three looks, each with its own z. With w_t = lam^(T-t) and V = v_s + p (1-p) Ds^2, any look's variance,

        SNR_t = (w_t Ds)^2 / (w_t^2 v_s + sum_u w_u^2 V),   u over the other looks, or only over those after t       (16)

    Rows (what; what z_t moves of S: predicted, measured, error; SNR_t: the same; the gradient's SNR: measured, error)."""
    place, _, s = model.sample((questions * group, turns), torch.Generator().manual_seed(seed))
    looked, rows = torch.ones_like(s, dtype=torch.bool), []
    _, d_s, _, v_s, _ = model.moments
    other, w = v_s + model.p * (1 - model.p) * d_s ** 2, [lam ** (turns - 1 - t) for t in range(turns)]      # other: V
    S, to_go = trajectory_score(s, looked, lam)[:, None].expand(-1, turns), turn_score(s, looked, lam)
    moved = lambda R, z: R[z].mean() - R[~z].mean()
    for t in range(turns):
        z, phi = place[:, t] == 0, torch.eye(4)[place[:, t]] - .25
        for name, R, seen in (("whole trajectory", S, range(turns)), ("looks from t on", to_go, range(t, turns))):
            share = sum(w[u] for u in seen) / sum(w)                # turn_score divides by the weights it keeps: W_t / W
            snr = (w[t] * d_s) ** 2 / (w[t] ** 2 * v_s + sum(w[u] ** 2 * other for u in seen if u != t))
            credit = "trajectory" if R is S else "turn"
            A = advantages(torch.zeros(len(s)), s, looked, group, 1., lam, credit)
            g = ((A if A.ndim == 1 else A[:, t])[:, None] * phi).view(questions, group, -1).mean(1)
            rows.append((f"turn {t + 1}, {name}", w[t] * d_s / sum(w), *with_error(moved, R[:, t] * share, z),
                         snr, *with_error(scalar_snr, R[:, t], z), *with_error(snr_of, g)))
    return rows


def aim(beta: float, vague_score: float | None, questions: int = 20_000, seed: int = 0) -> tuple[float, Tensor, Tensor]:
    """Cosine between the gradients of E[R] and E[r] when the agent can also say something vague: four places times two
    labels, uniform policy; a specific label scores .8 or .3 with z, a vague one `vague_score` wherever it looks (None: as
    a specific one, so that the score moves through z alone). Exact, sampled with groups of 8 and no division, its error."""
    kind, centred = torch.arange(8), lambda value: value - value.mean()
    place, vague = kind % 4, (kind >= 4) & (vague_score is not None)
    r, s = torch.where(place == 0, .9, .25), torch.where(vague, vague_score or 0., torch.where(place == 0, .8, .3))
    exact = torch.cosine_similarity(centred((1 - beta) * r + beta * s), centred(r), dim=0).item()
    g = torch.Generator().manual_seed(seed)
    action = torch.randint(0, 8, (questions * 8,), generator=g)
    hit, noisy = (torch.rand(len(action), generator=g) < r[action]).float(), s[action] + .2 * torch.randn(len(action), generator=g)
    A = advantages(hit, noisy[:, None], torch.ones(len(action), 1, dtype=torch.bool), 8, beta, std=False)
    sampled = (A[:, None] * (torch.eye(8)[action] - 1 / 8)).view(questions, 8, -1).mean(1)
    return exact, *with_error(lambda x: torch.cosine_similarity(x.mean(0), centred(r), dim=0), sampled)


def stopping(baseline: str, group: int = 4, questions: int = 0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Baselines per turn when the policy decides how many turns there are. Turn 1: answer (reward .5) or go on; turn 2, if
    there is one: look well (.9) or badly (.3); every choice has chance 1/2 and its own logit, (going on, looking well).

    Expected gradient of a group, exactly (over all 3^group groups) or, with `questions`, sampled; and its error."""
    chance, reward = torch.tensor([.5, .25, .25]), torch.tensor([[.5, 0], [0, .9], [0, .3]])    # answers, looks well, looks badly
    phi = torch.tensor([[-.5, 0], [.5, .5], [.5, -.5]])                              # of each turn, in its own logit
    kinds = (torch.multinomial(chance, questions * group, True, generator=torch.Generator().manual_seed(seed)).view(-1, group)
             if questions else torch.cartesian_prod(*[torch.arange(3)] * group))
    R, there = reward[kinds], torch.stack([kinds >= 0, kinds > 0], 2)                # (groups, group, 2 turns)
    less_mean = lambda x: (x - (x * there).sum(1, keepdim=True) / there.sum(1, keepdim=True).clamp(min=1)) * there
    to_go = R.flip(2).cumsum(2).flip(2)
    nothing = torch.zeros(kinds.numel(), 1)
    A = {"whole trajectory": lambda: advantages(R.sum(2).view(-1), nothing, nothing, group, 0., std=False).view(*kinds.shape, 1),
         "reward per turn": lambda: less_mean(R).flip(2).cumsum(2).flip(2),          # centred turn by turn, then summed
         "return per turn": lambda: less_mean(to_go)}[baseline]()
    g = (A * phi[kinds]).mean(1)
    return (g.mean(0), g.std(0) / questions ** .5) if questions else (chance[kinds].prod(1) @ g, torch.zeros(2))


def going_on(credit: str, scores: tuple[float, float, float] = (.4, .2, .96)) -> Tensor:
    """Where turn_score is no reward-to-go: one, two or three looks with these scores, chance 1/2 to go on after each, lam = 1.
    Expected update by the score, exact, of the logits of a second and of a third look (2,): for "trajectory" the gradient of E[S]."""
    s, looked, chance = torch.tensor([scores] * 3), torch.ones(3, 3).tril().bool(), torch.tensor([.5, .25, .25])  # (kinds, turns)
    S, to_go = trajectory_score(s, looked, 1.), turn_score(s, looked, 1.)
    value = {"trajectory": S[:, None].expand(3, 3), "turn": to_go, "look": torch.where(looked, to_go, chance @ S)}[credit]
    phi = torch.tensor([[-.5, 0], [.5, -.5], [.5, .5]])
    return chance @ (value[:, 1:] * phi)


def report() -> None:
    """Every table of docs/theory.md."""
    print("\n1. the group: noise between questions cancels" + f"{'predicted':>21}{'measured':>12}   error")
    for what, predicted, measured, error in group_effect():
        print(f"   {what:52}{predicted:11.4f}{measured:12.4f} ± {error:.4f}")

    betas = (0., .1, .2, .4, .6, .8, 1.)
    head = "".join(f"  b={b:<4}" for b in betas)
    print(f"\n2. the score: signal to noise{'':10}{head} ± at most  best b  hurts past")
    for name, model in {"good score, sd .2": Looking(), "noisy score, sd .6": Looking(sd=.6),
                        "useless score, mu_1 = mu_0": Looking(mu=(.5, .5)), "two options, luck 1/2": Looking(rho=.5),
                        "no luck, noisy score": Looking(rho=0., eps=.05, sd=.6),
                        "shared noise, c/v_r = .5": Looking(shared=.5), "shared noise, c/v_r = 1": Looking(shared=1.)}.items():
        never = f"{model.break_even:10.3f}" if model.break_even < 1 else "     never"
        print(f"   {name:27}eq. 8   " + "".join(f"{model.snr(b):8.3f}" for b in betas) + f"{'':10}{model.best_beta:8.3f}{never}")
        samples = [sampled(model, b) for b in betas]
        for kind, cells in (("returns ", [with_error(scalar_snr, R, z) for R, z, _ in samples]),
                            ("gradient", [with_error(snr_of, g) for _, _, g in samples])):
            print(f"{'':30}{kind}" + "".join(f"{value:8.3f}" for value, _ in cells) + f"{max(e for _, e in cells):10.3f}")
    predicted, (R, R_error), (g, g_error) = edge(Looking(sd=.6), Looking(sd=.6).break_even)
    print(f"   Ds/Dr = {.5 / .65:.3f}: with shared noise c/v_r below it a small b helps, above it none does.\n"
          f"   noisy score at break-even, SNR over SNR at b=0: eq. 8 {predicted:.3f}, "
          f"returns {R:.3f} ± {R_error:.3f}, gradient {g:.3f} ± {g_error:.3f}")

    print(f"\n   aim: cosine with grad E[r]{'':12}{head} ± at most")
    for vague in (None, .2, .425, .95):
        cells = [aim(b, vague) for b in betas]
        name = "score through z alone" if vague is None else f"a vague label scores {vague}"
        print(f"   {name:27}exact   " + "".join(f"{c[0]:8.3f}" for c in cells))
        print(f"{'':30}sampled " + "".join(f"{c[1]:8.3f}" for c in cells) + f"{max(c[2] for c in cells):10.3f}")

    print(f"\n3. credit over turns: three looks, S alone    what z_t moves of S{'':13}signal to noise{'':17}gradient's SNR\n"
          f"{'':36}predicted measured   error  predicted measured   error   measured   error")
    for what, moved, m, m_error, snr, n, n_error, g, g_error in credit_effect():
        print(f"   {what:30}{moved:12.4f}{m:9.4f} ± {m_error:.4f}{snr:11.3f}{n:9.3f} ± {n_error:.3f} {g:10.3f} ± {g_error:.3f}")

    print(f"\n   turns by choice: gradient of{'':16}going on{'':20}looking well\n"
          f"{'':33}exact      sampled{'':13}exact      sampled")
    # of a choice: the chance to come to it x chance (1 - chance) x what it gains
    print(f"   {'E[R]':27}{.25 * (.6 - .5):8.4f}{'':20}{.5 * .25 * (.9 - .3):8.4f}")
    for baseline in ("whole trajectory", "reward per turn", "return per turn"):
        (exact, _), (value, error) = stopping(baseline), stopping(baseline, questions=50_000)
        print(f"   mean of {baseline:19}" + "  ".join(f"{x:8.4f}{v:9.4f} ± {e:.4f}" for x, v, e in zip(exact, value, error)))
    print("   looks by choice: gradient of      a second look, a third look; exact")
    for name, credit in (("S, whole trajectory", "trajectory"), ("turn_score, --credit turn", "turn"), ("--credit look", "look")):
        print(f"   {name:27}{going_on(credit)[0]:8.4f}{going_on(credit)[1]:15.4f}")

    print(f"\nluck: SNR at b=.4 over SNR at b=0{'':10}p(1-p) SNR:                 b=.4 over b=0\n"
          f"   k options   SNR(0) SNR(.4)         b=0    b=.4    eq. 8   returns    error gradient    error  best b  eq. 8 there")
    for k, luck in (2, 1 / 2), (4, 1 / 4), (8, 1 / 8), ("open", .001):
        model = Looking(rho=luck, eps=.05, mu=(.17, .64), sd=.06 ** .5)
        predicted, *measured = edge(model, .4)
        plain, coupled = model.snr(0), model.snr(.4)
        print(f"   {k:<9}{plain:9.3f}{coupled:8.3f}{.1875 * plain:12.2f}{.1875 * coupled:8.2f}{predicted:9.2f}"
              + "".join(f"{value:10.3f} ± {error:.3f}" for value, error in measured)
              + f"{model.best_beta:8.2f}{model.snr(model.best_beta) / plain:8.2f}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    report()
