"""The real policy's gradients on one fixed set of rollouts, under each algorithm: is MAPO's less noisy, as eq. 8 says?

What it teaches: how to compare algorithms *before* training. One policy, one set of rollouts; only the advantages differ. At
the first update the ratio is 1 and nothing clips, so the gradient of a question's group is linear in the advantages,

    g_q = sum_it C_it u_it,    u_it = grad of the log-probability of what trajectory i wrote in turn t                (17)

so each u is computed once, by one backward, and every algorithm is a matrix product. Trajectories go through the model one by
one: a backward through a whole group would compute all of its rows again for each of its turns.

The u are sketched: 860,000 numbers x 2,400 turns would be 8 GB, and only inner products are asked for. A count sketch (Charikar,
Chen, Farach-Colton 2002) gives each coordinate a random sign and adds it to one of m random buckets: linear, no matrix,
<Sx, Sy> unbiased for <x, y> with Var <= 2 |x|^2 |y|^2 / m. With m = 8,192 a squared norm is off by 1.6% (the error found is
printed), and the SNR by 1.6% x (1 + 1 / SNR of the batch). Intervals over questions are ten times wider, and all algorithms share
the one sketch.

    E|mean g|^2 = |G|^2 + tr Cov(g) / n,    so |G|^2 is estimated by the mean of <g_q, g_q'> over q != q'             (18)
    SNR = |G|^2 / tr Cov(g) of one question; the batch of n questions has n times that

Beside it stands what eq. 8 predicts from z, r and S of the same rollouts. The gradient also carries the noise of which tokens were
sampled, which an outcome that is exactly z would have too (`oracle`). If a reward depends on the tokens through z alone,

    1 / SNR(b) = 1 / SNR_oracle + k / SNR_8(b),    k from b = 0                                                       (19)

The answer is written after the looks, so r also depends on tokens that z knows nothing of: see whether `grpo` is above `oracle`.

What to distrust: of two gradients the less noisy one need not be the more useful one. Hence the columns against GRPO: the cosine of
an algorithm's mean gradient in one half of the questions with GRPO's in the other half (above GRPO's own: it points where GRPO points
better than GRPO does), and `aim`, that cosine without its noise. Only questions are resampled: one policy, one draw of rollouts.

Run it:  python docs/probe.py                                             # at the start, and after runs/mapo if it is there
         python docs/probe.py --options 4 2 8 0 --after runs/mapo         # all of docs/probe.md: also by luck
"""
import argparse
import functools
import json
import math
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Callable

import torch
from torch import Tensor
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import mapo
from tiny.world import World, world_questions
from mapo import ALGORITHMS
from theory import Looking
from lib.policy import Policy
from reward import Scorer, grounded, measure, rewards, score
from rollout import Trajectory, collect
from train import Config, advantages, pad

ORACLE = "oracle, R = hit"
BETAS = (0., .1, .2, .4, .6, .8, 1.)
ROWS = {"grpo": ("grpo", 0., "trajectory"), **{f"mapo, beta {b:g}": ("mapo", b, "trajectory") for b in BETAS[1:]},
        "mapo, credit turn": ("mapo", .4, "turn"), "dr_grpo": ("dr_grpo", 0., "trajectory"),
        "dr_grpo, beta 0.4": ("dr_grpo", .4, "trajectory"), "dapo": ("dapo", 0., "trajectory"),
        "dapo, beta 0.4": ("dapo", .4, "trajectory"), "gspo": ("gspo", 0., "trajectory"),
        "ppo, critic 0": ("ppo", 0., "trajectory"),               # mapo at beta 0 is grpo, line for line
        ORACLE: ("oracle", 0., "trajectory")}                     # grpo paid by what really happened: no luck, no misreading
SWEEP = ["grpo", *(f"mapo, beta {b:g}" for b in BETAS[1:])]
WIDTH, RESAMPLES, HALVES = 8192, 400, 50


# ---- gradients -------------------------------------------------------------------------------------------------------

def count_sketch(dimension: int, width: int = WIDTH, seed: int = 0) -> Callable[[Tensor], Tensor]:
    """A linear map (dimension,) -> (width,) that keeps inner products, up to a relative error of sqrt(2 / width)."""
    g = torch.Generator().manual_seed(seed)
    bucket = torch.randint(0, width, (dimension,), generator=g)
    sign = torch.randint(0, 2, (dimension,), generator=g) * 2. - 1
    return lambda x: torch.zeros(width).index_add_(0, bucket, sign * x)


def score_vectors(policy: Policy, parameters: list[Tensor], trajectories: list[Trajectory], sketch: Callable[[Tensor], Tensor],
                  turns: int, quiet: bool = False) -> tuple[Tensor, float]:
    """u of eq. 17, sketched: (N, turns + 1, width), and the root mean square of the relative error of their squared norms.

    The last one is for PPO: the trajectory's tokens weighed as GAE pays the return to them while the critic is 0."""
    mask = pad([t.mask for t in trajectories], False)
    late = mapo.gae(torch.ones(len(mask)), torch.zeros(mask.shape), mask)[0]                 # lam^(tokens that follow)
    found, errors = None, []
    for i, t in enumerate(tqdm(trajectories, "gradients", disable=quiet, dynamic_ncols=True)):
        logp = policy.logprobs([t.tokens], [t.mask])[0][0]                                   # (L - 1,)
        sums = {k: logp[turn.tokens.start - 1:turn.tokens.stop - 1].sum() for k, turn in enumerate(t.turns)}
        sums[turns] = (logp * late[i, :len(logp)]).sum()
        for k, value in sums.items():
            flat = torch.cat([x.flatten() for x in torch.autograd.grad(value, parameters, retain_graph=k < turns)])
            u = sketch(flat)
            found = torch.zeros(len(mask), turns + 1, len(u)) if found is None else found
            found[i, k] = u
            if exact := flat.square().sum().item():
                errors.append(u.square().sum().item() / exact - 1)
    return found, math.sqrt(sum(e * e for e in errors) / len(errors))


def coefficients(trajectories: list[Trajectory], name: str, group: int, turns: int) -> tuple[Tensor, Tensor]:
    """C of eq. 17 (N, turns + 1), from the advantages that train.py computes, and which questions are kept (N / group,).

    The gradient of the batch is the mean of g_q over kept questions. Token means divide by the batch's tokens, PPO whitens
    its advantages over the batch: both as if these sums were constants."""
    algo, beta, credit = ROWS[name]
    row = ALGORITHMS["grpo" if algo == "oracle" else algo]
    config = Config(algo=algo, beta=beta, credit=credit, group=group, max_turns=turns)
    R = mapo.coupled_return(*rewards(trajectories), beta, config.lam)
    kept = mapo.has_signal(R, group) if row.max_draws > 1 else torch.ones(len(R) // group, dtype=torch.bool)
    tokens = torch.tensor([float(sum(t.mask)) for t in trajectories])
    C = torch.zeros(len(R), turns + 1)
    own = torch.zeros(len(R), turns)
    for i, t in enumerate(trajectories):
        own[i, :len(t.turns)] = 1
    if row.critic:
        mask = pad([t.mask for t in trajectories], False)
        A = mapo.gae(R, torch.zeros(mask.shape), mask)[0][mask.bool()]
        C[:, :turns], C[:, turns] = -A.mean() / A.std(correction=0) * own, R / A.std(correction=0)
    elif algo == "oracle":
        nothing = torch.zeros(len(R), 1)
        C[:, :turns] = mapo.advantages(torch.tensor([float(grounded(t)) for t in trajectories]), nothing, nothing, group, 0.)[:, None] * own
    else:
        A = advantages(None, trajectories, config, row)[0]                                   # (N, L - 1), equal in a turn
        for i, t in enumerate(trajectories):
            C[i, :len(t.turns)] = A[i, [turn.tokens.stop - 2 for turn in t.turns]]
    weight = tokens if row.mean == "trajectory" else tokens[kept.repeat_interleave(group)].mean()
    return C / torch.as_tensor(weight).expand(len(R))[:, None] / group, kept


def question_gradients(C: Tensor, u: Tensor, group: int) -> Tensor:
    """Eq. 17: C (N, K), u (N, K, m) -> g (N / group, m), in the direction of ascent."""
    n = len(C) // group
    return torch.bmm(C.reshape(n, 1, -1), u.reshape(n, -1, u.shape[-1]))[:, 0]


# ---- statistics of inner products K (n, n), for weights of the questions W (B, n): resamples, the first of them the sample itself -----

def resamples(n: int, count: int = RESAMPLES, seed: int = 0) -> Tensor:
    """(1 + count, n): ones, then how often each question is drawn when n are drawn with replacement."""
    drawn = torch.randint(0, n, (count, n), generator=torch.Generator().manual_seed(seed))
    return torch.cat([torch.ones(1, n), torch.zeros(count, n).scatter_add_(1, drawn, torch.ones(count, n))])


def random_halves(n: int, count: int = HALVES, seed: int = 0) -> Tensor:
    """(count, n) of 0 and 1."""
    g = torch.Generator().manual_seed(seed)
    return torch.stack([(torch.randperm(n, generator=g) < n // 2).float() for _ in range(count)])


def pairs_mean(K: Tensor, W: Tensor, W_2: Tensor | None = None) -> Tensor:
    """Weighted mean of K_qq' over pairs of two different questions (B,): eq. 18; q' may have other weights than q. A question drawn
    twice is no pair of its own."""
    W_2, off = W if W_2 is None else W_2, K - K.diag().diag()
    return ((W @ off) * W_2).sum(1) / (W.sum(1) * W_2.sum(1) - (W * W_2).sum(1))


def signal_noise(K: Tensor, W: Tensor) -> tuple[Tensor, Tensor]:
    """Unbiased |G|^2 and tr Cov(g) (B,) from K_qq' = <g_q, g_q'>."""
    signal = pairs_mean(K, W)
    return signal, W @ K.diag() / W.sum(1) - signal


def half_cosine(K: Tensor, W: Tensor, halves: Tensor, other: tuple[Tensor, Tensor, Tensor] | None = None) -> Tensor:
    """Cosine between the mean gradients of two halves of the questions, averaged over splits (B,).

    other (cross (n, n), K_other, W_other): the second half's gradient is another algorithm's, cross_qq' = <g_q, other_q'>."""
    cross, K_2, W_2 = other or (K, K, W)
    a, b = halves * W[:, None], (1 - halves) * W_2[:, None]                                  # (B, S, n)
    norm = lambda x, K: ((x @ K) * x).sum(2).clamp(min=1e-30)
    return (((a @ cross) * b).sum(2) / (norm(a, K) * norm(b, K_2)).sqrt()).mean(1)


def interval(values: Tensor, centred: bool = False) -> list[float | None]:
    """values (1 + count,): [estimate, low, high], 95%, from the quantiles of the resamples.

    centred: about the estimate, not about their own median. Questions drawn twice add no information, which shifts the cosines of
    resamples downwards. None where there is no value, or none in a twentieth of the resamples."""
    values = values.float()
    good = values[1:][values[1:].isfinite()]
    if not values[0].isfinite() or len(good) < .95 * (len(values) - 1):
        return [values[0].item() if values[0].isfinite() else None, None, None]
    ends = good.quantile(torch.tensor([.025, .975]))
    return [values[0].item(), *(ends + (values[0] - good.median()) * centred).tolist()]


# ---- eq. 8 on what was measured -----------------------------------------------------------------------------------------

def moments(z: Tensor, r: Tensor, S: Tensor, W: Tensor, within: bool) -> list[Tensor]:
    """Dr, Ds, v_r, v_s, c of eq. 8 for each resample: z, r, S (n, group), W (B, n) -> five (B,).

    within: after the group's mean is taken off, since what differs between questions is no noise of an advantage."""
    dof = z.shape[1] / (z.shape[1] - 1) if within else 1.
    W = W / W.sum(1, keepdim=True) / z.shape[1]
    found = []
    for w in W:
        mean = (lambda x: x.mean(1, keepdim=True)) if within else (lambda x: (w @ x).sum())
        zc, rc, sc = (x - mean(x) for x in (z, r, S))
        E = lambda x: (w @ x).sum()
        d_r, d_s = E(zc * rc) / E(zc * zc), E(zc * sc) / E(zc * zc)
        e_r, e_s = rc - d_r * zc, sc - d_s * zc
        found.append(torch.stack([d_r, d_s, E(e_r * e_r) * dof, E(e_s * e_s) * dof, E(e_r * e_s) * dof]))
    return list(torch.stack(found, 1))


def predicted(m: list[float]) -> tuple[list[float], float, float]:
    """Eq. 8 at BETAS, 12 and 13, by mapo.py's own code, which asks of `self` only its moments."""
    d_r, d_s, v_r, v_s, c = m
    model = SimpleNamespace(moments=(d_r, d_s, max(v_r, 1e-6), max(v_s, 1e-6), c))            # 0: a few questions without any noise
    return [Looking.snr(model, b) for b in BETAS], Looking.best_beta.fget(model), Looking.break_even.fget(model)


def ranks(x: Tensor) -> Tensor:
    return x.argsort(-1).argsort(-1).double()


def rank_correlation(x: Tensor, y: Tensor) -> Tensor:
    """Spearman's, over the last axis."""
    a, b = (ranks(v) - ranks(v).mean(-1, keepdim=True) for v in (x, y))
    return (a * b).sum(-1) / (a.square().sum(-1) * b.square().sum(-1)).sqrt()


# ---- one policy, one world ----------------------------------------------------------------------------------------------

def compare(g: dict[str, Tensor], weights: dict[str, Tensor], W: Tensor) -> tuple[dict[str, dict], dict[str, Tensor]]:
    """The first table: g[name] (n, m), weights[name] (B, n), W without what dapo drops. Also each row's SNR (B,)."""
    halves, about = random_halves(W.shape[1]), functools.partial(interval, centred=True)
    grpo, hit = g["grpo"], g[ORACLE]
    K_grpo, K_hit, raw, rows = grpo @ grpo.T, hit @ hit.T, {}, {}
    positive = lambda x: torch.where(x > 0, x, math.nan)                                     # no direction without a signal
    signal_grpo, trace_grpo = signal_noise(K_grpo, W)
    for name, w in weights.items():                                                          # grpo comes first
        K, cross = g[name] @ g[name].T, g[name] @ grpo.T
        signal, trace = signal_noise(K, w)
        raw[name] = {"snr": signal / trace, "half": half_cosine(K, w, halves), "towards": half_cosine(K, w, halves, (cross, K_grpo, W)),
                     "hit": half_cosine(K, w, halves, (g[name] @ hit.T, K_hit, W))}
        row = {"questions": int((w[0] > 0).sum()), "groups": (K.diag() > 0).float().mean().item(), "signal": about(signal),
               "trace": interval(trace), "aim": interval(pairs_mean(cross, w, W) / (positive(signal) * positive(signal_grpo)).sqrt())}
        for key, value in raw[name].items():
            row |= {key: about(value), f"{key} - grpo": about(value - raw["grpo"][key])}
        rows[name] = row | {"batch": about(raw[name]["snr"] * row["questions"])}
    return rows, {name: values["snr"] for name, values in raw.items()}


def explain(z: Tensor, r: Tensor, S: Tensor, W: Tensor, snr: dict[str, Tensor]) -> dict[str, dict]:
    """Eq. 8 and 19 from z, r, S (n, group) beside the measured SNR, for moments "pooled" over all trajectories and "within" groups."""
    measured, oracle, at, theory = torch.stack([snr[name] for name in SWEEP], 1), snr[ORACLE][:, None], BETAS.index(.4), {}
    for kind in ("pooled", "within"):
        m = moments(z, r, S, W, kind == "within")
        if not torch.stack(m)[:, 0].isfinite().all():                                        # always, or never, a hit
            continue
        curve, best, hurts = zip(*(predicted(v) for v in torch.stack(m, 1).tolist()))
        curve = torch.tensor(curve)                                                          # (B, betas)
        sized = 1 / (1 / oracle + (1 / measured[:, :1] - 1 / oracle) * curve[:, :1] / curve)     # eq. 19
        theory[kind] = {"moments": {k: interval(v) for k, v in zip(("Dr", "Ds", "v_r", "v_s", "c"), m)},
                        "snr": [interval(c) for c in curve.T], "gain": interval(curve[:, at] / curve[:, 0]),
                        "sized": [interval(c) for c in sized.T], "sized_gain": interval(sized[:, at] / sized[:, 0]),
                        "best": interval(torch.tensor(best)), "break_even": interval(torch.tensor(hurts)),
                        "rank": interval(rank_correlation(curve, measured)),
                        "same_best": (curve[1:].argmax(1) == measured[1:].argmax(1)).float().mean().item()}
    return theory


def probe(policy: Policy, scorer: Scorer, options: int, n: int, group: int, turns: int = 4, quiet: bool = False) -> dict:
    """Roll out, score, sketch, and every number of the report."""
    start = time.process_time()
    generator, trajectories = torch.Generator(policy.device).manual_seed(0), []
    for first in tqdm(range(0, n, 16), "rollouts", disable=quiet, dynamic_ncols=True):
        questions = world_questions(World(options=options), 0, "test", 10_000 + first, min(16, n - first))
        trajectories += collect(policy, questions, group, turns, generator=generator)
    r, s, looked = score(trajectories, scorer)
    parameters = policy.learners()
    sketch = count_sketch(sum(p.numel() for p in parameters))
    u, sketch_error = score_vectors(policy, parameters, trajectories, sketch, turns, quiet)
    vectors = time.process_time()

    W, g, weights = resamples(n), {}, {}
    for name in ROWS:
        C, kept = coefficients(trajectories, name, group, turns)
        g[name], weights[name] = question_gradients(C, u, group), W * kept
    rows, snr = compare(g, weights, W)
    z = torch.tensor([float(grounded(t)) for t in trajectories]).view(n, group)
    r, S = r.view(n, group), mapo.trajectory_score(s, looked, Config().lam).view(n, group)
    mean = lambda x, where: x[where].mean().item() if where.any() else None
    right = mean(r, z == 1)
    solid = (snr["grpo"][1:] > 0).float().mean() > .99              # a ratio to a number that may be 0 says nothing
    best = torch.stack([snr[name] for name in SWEEP], 1)[1:].argmax(1)
    return {"options": options, "questions": n, "group": group, "trajectories": measure(trajectories), "rows": rows,
            "looking": {"p": z.mean().item(), "eps": None if right is None else 1 - right, "rho": mean(r, z == 0),
                        "mu_1": mean(S, z == 1), "mu_0": mean(S, z == 0)},
            "theory": explain(z, r, S, W, snr), "gain": interval(snr["mapo, beta 0.4"] / snr["grpo"]) if solid else None,
            "removable": interval(1 - snr["grpo"] / snr[ORACLE], centred=True),
            "gradient": [rows[name]["snr"] for name in SWEEP],
            "best": {str(b): (best == i).float().mean().item() for i, b in enumerate(BETAS)},
            "sketch_error": sketch_error, "seconds": {"rollouts and gradients": vectors - start, "statistics": time.process_time() - vectors}}


# ---- the page -------------------------------------------------------------------------------------------------------------

def cell(v: list[float | None] | None, digits: int = 3, plus: bool = False) -> str:
    """estimate [low, high]"""
    if v is None or None in v:
        return "-"
    show = lambda x: f"{x:{'+' if plus else ''}.{digits}f}"
    return f"{show(v[0])} [{show(v[1])}, {show(v[2])}]"


def tables(x: dict) -> list[str]:
    """One policy in one world."""
    show = lambda v: "-" if v is None else f"{v:.3f}"
    numbers = lambda d: ", ".join(f"{k} {show(v)}" for k, v in d.items())
    names = {"pooled": "all trajectories", "within": "within groups"}
    columns = {"snr": ("per-question SNR", 4), "batch": ("of the batch", 2), "snr - grpo": ("SNR - GRPO's", 4), "half": ("cosine of halves", 2),
               "half - grpo": ("- GRPO's", 2), "towards": ("with GRPO's other half", 2), "towards - grpo": ("- GRPO's", 2),
               "hit": ("with the oracle's", 2), "hit - grpo": ("- GRPO's", 2), "aim": ("aim", 2)}
    lines = ["", f"## {x['when']} (`{x['model']}`), {x['options'] or 'no'} options", "",
             f"{x['questions']} questions x {x['group']} trajectories: {numbers(x['trajectories'])}.", "",
             "| | " + " | ".join(title for title, _ in columns.values()) + " | tr Cov | groups |", "|" + "---|" * (len(columns) + 3)]
    for name, row in x["rows"].items():
        cells = [cell(row[key], digits, "grpo" in key) for key, (_, digits) in columns.items()]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {row['trace'][0]:.3g} | {row['groups']:.2f} |")
    lines += ["", f"What the looks did to both signals: {numbers(x['looking'])}. Share of GRPO's noise that the oracle's reward lacks, "
              f"1 - SNR / SNR(oracle): {cell(x['removable'], 2)} (below 0: the outcome teaches more than z).", "",
              "| | Dr | Ds | v_r | v_s | c | best beta | hurts past | rank correlation | best beta the same |", "|" + "---|" * 10]
    for kind, th in x["theory"].items():
        never = th["break_even"][0] == 1
        cells = [*map(cell, th["moments"].values()), cell(th["best"], 2), "never" if never else cell(th["break_even"], 2), cell(th["rank"], 2)]
        lines.append(f"| {names[kind]} | " + " | ".join(cells) + f" | {th['same_best']:.2f} |")
    lines += ["", "| SNR by beta | " + " | ".join(f"{b:g}" for b in BETAS) + " |", "|" + "---|" * (len(BETAS) + 1)]
    for kind, th in x["theory"].items():
        lines.append(f"| eq. 8, {names[kind]} | " + " | ".join(f"{v[0]:.3f}" for v in th["snr"]) + " |")
        lines.append("| eq. 19 from it | " + " | ".join(cell(v, 4) for v in th["sized"]) + " |")
    return lines + ["| the gradient | " + " | ".join(cell(v, 4) for v in x["gradient"]) + " |",
                    "| resamples in which it is best there | " + " | ".join(f"{v:.2f}" for v in x["best"].values()) + " |"]


def page(records: list[dict]) -> str:
    """docs/probe.md."""
    world = lambda x: f"{x['when'].lower()}, {x['options'] or 'no'} options"
    off = max(x["sketch_error"] for x in records)
    took = [(world(x), sum(x["seconds"].values())) for x in records]
    lines = [f"""# The gradients of the real policy

`{records[0]['command']}` made this page in {sum(t for _, t in took) / 60:.1f} minutes of one core
({'; '.join(f'{name}: {t:.0f} s' for name, t in took)}).
One fixed set of rollouts a section, the same for every row; `docs/probe.py` says how.

[low, high] are 95% intervals from resampling questions (not policies, not rollouts); they read a little wide where the signal is weak.
Differences are paired. `batch`: the number of questions times the per-question SNR. *with GRPO's*, *with the oracle's*: cosine of the mean
gradient of one half of the questions with the other algorithm's in the other half. `aim`: cosine with GRPO's gradient, noise taken out.
`groups`: share of questions with a gradient. tr Cov is not free of scale (half the advantages, a quarter of it): do not compare rows by it.
Sketches of {WIDTH:,} numbers: squared norms are off by {math.sqrt(2 / WIDTH):.1%} (root mean square; found: {off:.1%}).

- `gspo` is `grpo` here: at ratio 1 the two have one gradient; they differ from the second update on.
- `dapo` drops groups of equal returns, so its SNR is that of a kept question; it pays for each with 1 / `groups` draws.
- `ppo` is its first update, with a critic that says 0: the batch's mean is its only baseline. A trained critic is not measured.
- `oracle` is `grpo` paid for the hit itself: no luck, no misreading. If the outcome depended on the actions through z alone, as eq. 8 has
  it, hardly a reward could beat it. Where `grpo` does, the outcome also teaches what z does not (to read, to name an option), and
  neither eq. 8 nor eq. 19 can be expected to hold.
- *eq. 8* takes z (all the evidence shown) from the world, and every moment from these rollouts. It leaves out the noise of which tokens
  were sampled, so compare the order of its columns and not their size. *eq. 19* adds that noise, from the measured `oracle` and `grpo`:
  at beta 0 it is the measurement, from beta .1 on a prediction."""]
    for x in records:
        lines += tables(x)
    if len({x["options"] for x in records}) > 1:
        lines += ["", "## Luck: SNR at beta .4 over SNR at beta 0", "",
                  "| | options | P(right, no hit) | eq. 8, all trajectories | eq. 8, within groups | eq. 19 | the gradient | its SNR, difference |",
                  "|" + "---|" * 8]
        for x in records:
            th = x["theory"]
            gains = [cell(th[kind][key], 2) if kind in th else "-"
                     for kind, key in (("pooled", "gain"), ("within", "gain"), ("within", "sized_gain"))]
            lines.append(f"| {x['when']} | {x['options'] or 'open'} | {x['looking']['rho'] or 0:.3f} | " + " | ".join(gains) +
                         f" | {cell(x['gain'], 2)} | {cell(x['rows']['mapo, beta 0.4']['snr - grpo'], 4, True)} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", default="tiny", help="the policy at the start, and the frozen encoder")
    parser.add_argument("--after", default="runs/mapo", help="a trained policy; left out where it is missing")
    parser.add_argument("--questions", type=int, default=128)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--options", type=int, nargs="+", default=[4], help="the world's luck, one or several of 0 and 2 to 8")
    parser.add_argument("--out", default=str(ROOT / "docs/probe"), help="writes .md and .jsonl")
    parser.add_argument("--page", action="store_true", help="measure nothing: write the .md again from the .jsonl")
    args = parser.parse_args(arguments)
    lines, text = Path(args.out + ".jsonl"), Path(args.out + ".md")
    if args.page:
        text.write_text(page([json.loads(line) for line in lines.open()]))
        return
    if args.questions < 4 or args.group < 2:
        parser.error("--questions must be at least 4, --group at least 2")
    torch.set_num_threads(1)                                                                 # small tensors
    command = " ".join(["python docs/probe.py", *(sys.argv[1:] if arguments is None else arguments)])
    scorer, records = Scorer(Policy(args.model)), []
    models = [("At the start", args.model)]
    if (Path(args.after) / "config.json").is_file():
        models.append(("After training", args.after))
    else:
        print(f"{args.after}: no config.json there, so only the start", flush=True)
    for when, path in models:
        for options in args.options:
            print(f"{when.lower()}, {path}, {options or 'no'} options", flush=True)
            records.append({"command": command, "when": when, "model": path} | probe(Policy(path), scorer, options, args.questions, args.group))
            lines.write_text("".join(json.dumps(x, allow_nan=False) + "\n" for x in records))
            text.write_text(page(records))
            print("\n".join(tables(records[-1])), flush=True)


if __name__ == "__main__":
    main()
