"""The signal-to-noise ratio of each algorithm's gradient, on one fixed set of rollouts.

What it teaches: how to compare algorithms *before* training. One policy, one set of rollouts; only
the advantages differ. At the first update each ratio of eq. 4 is 1 and nothing is clipped. So the
gradient of a question's group is linear in the advantages:

    g_q = sum_it C_it u_it                                                        (23)
    |G|^2 = mean of <g_q, g_q'> over q != q',  SNR = |G|^2 / (mean |g_q|^2 - |G|^2)        (24)

Eq. 23: u_it is the gradient of the log-probability of what trajectory i wrote in turn t; C_it is
its advantage times its weight. Each u is computed once, and every algorithm is a sum.
Eq. 24: G is the mean of g over all possible questions. Only products are asked for, so a u of
860,000 numbers is kept as a sketch of 8,192. docs/probe.md explains both, and has the numbers.

Run it:  python docs/probe.py --models tiny runs/mapo      # 17 minutes
         python docs/probe.py --table                      # the page again, from docs/probe.jsonl
"""
import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Callable

import torch
from torch import Tensor
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

import mapo
from lib.batches import pad
from lib.checkpoint import newest
from lib.policy import Policy
from reward import Scorer, hit, measure, rewards, score_looks
from rollout import Trajectory, collect
from theory import BETAS, Moments
from tiny.world import World, world_questions
from train import Config, token_advantages, signal_of

ORACLE, AIM = "oracle, R = hit", "grpo + S, aim"
SWEEP = ["grpo"] + [f"grpo + S, beta {beta:g}" for beta in BETAS[1:]]      # S: the score
ROWS = {name: ("grpo", beta, "trajectory") for name, beta in zip(SWEEP, BETAS)}
ROWS |= {f"grpo + S, {credit}": ("grpo", .4, credit) for credit in ("look", "aim")}
ROWS |= {name: (name, 0., "trajectory") for name in ("dr_grpo", "dapo")}
ROWS |= {ORACLE: ("grpo", 0., "trajectory")}
KINDS = ("all", "looks", "answers")            # whose tokens count
WIDTH, RESAMPLES, GROUP, TURNS = 8192, 400, Config.group, Config.max_turns
PAGE, NUMBERS = ROOT / "docs/probe.md", ROOT / "docs/probe.jsonl"
MEASURED = "## What was measured"              # the part of the page that is made


# ---- eq. 23: gradients ---------------------------------------------------------------------------

def count_sketch(dimension: int, width: int = WIDTH, seed: int = 0) -> Callable[[Tensor], Tensor]:
    """A linear map (dimension,) -> (width,) that keeps products on average (Charikar, Chen,
    Farach-Colton 2002). |x|^2 is off by a share of sqrt(2 / width)."""
    g = torch.Generator().manual_seed(seed)
    bucket = torch.randint(0, width, (dimension,), generator=g)
    sign = torch.randint(0, 2, (dimension,), generator=g) * 2. - 1
    return lambda x: torch.zeros(width).index_add_(0, bucket, sign * x)


def counted(trajectories: list[Trajectory], kind: str) -> Tensor:
    """(N, TURNS): 1 for the turns whose tokens count: "all", or those that ended in "looks" or in
    "answers"."""
    kept = torch.zeros(len(trajectories), TURNS)
    for i, t in enumerate(trajectories):
        kinds = ["looks" if turn.call else "errors" for turn in t.turns]
        if t.answer is not None:
            kinds[-1] = "answers"
        for k, found in enumerate(kinds):
            kept[i, k] = kind in ("all", found)
    return kept


def score_vectors(policy: Policy, trajectories: list[Trajectory]) -> Tensor:
    """u of eq. 23, sketched: (N, TURNS, WIDTH); 0 for a turn that there was not."""
    parameters = policy.freeze_vision()
    sketch = count_sketch(sum(p.numel() for p in parameters))
    u = torch.zeros(len(trajectories), TURNS, WIDTH)
    for i, t in enumerate(tqdm(trajectories, "gradients", disable=None)):
        logp = policy.logprobs([t.tokens], [t.mask])[0][0]
        for k, turn in enumerate(t.turns):
            own = logp[turn.span.start - 1:turn.span.stop - 1].sum()
            gradient = torch.autograd.grad(own, parameters, retain_graph=True)
            u[i, k] = sketch(torch.cat([x.flatten() for x in gradient]))
    return u


def paid_for_hits(trajectories: list[Trajectory]) -> list[Trajectory]:
    """The same, but the answer is right exactly where the looks showed all the evidence."""
    return [replace(t, answer=t.question.answer if hit(t) else None) for t in trajectories]


def coefficients(trajectories: list[Trajectory], name: str, group: int) -> tuple[Tensor, Tensor]:
    """C of eq. 23 (N, TURNS), by the code that trains, and which questions are kept (n,).

    The batch's gradient is the mean of g_q over those kept. What belongs to the whole batch, its
    count of tokens, counts as constant."""
    algo, beta, credit = ROWS[name]
    row, config = mapo.ALGORITHMS[algo], Config(algo=algo, beta=beta, credit=credit, group=group)
    if name == ORACLE:
        trajectories = paid_for_hits(trajectories)
    kept = signal_of(trajectories, config) | (row.max_draws == 1)                   # (n,)
    run = SimpleNamespace(config=config, algorithm=row, critic=None)
    A = token_advantages(run, trajectories)                                         # (N, L - 1)
    C = torch.zeros(len(trajectories), TURNS)
    for i, t in enumerate(trajectories):       # all tokens of a turn have one advantage
        C[i, :len(t.turns)] = A[i, [turn.span.stop - 2 for turn in t.turns]]
    mask = pad([t.mask for t in trajectories], False)
    weight = mapo.token_weights(mask * kept.repeat_interleave(group)[:, None], row.mean)
    return C * weight.max(1, keepdim=True).values * kept.sum(), kept


# ---- eq. 24, for weights of the questions W (B, n) -----------------------------------------------

def resamples(n: int, count: int = RESAMPLES) -> Tensor:
    """(1 + count, n): ones, then how often each of n questions is drawn, with replacement."""
    drawn = torch.randint(0, n, (count, n), generator=torch.Generator().manual_seed(0))
    return torch.cat([torch.ones(1, n), torch.nn.functional.one_hot(drawn, n).sum(1)])


def signal_noise(K: Tensor, W: Tensor) -> tuple[Tensor, Tensor]:
    """Signal |G|^2 and noise tr Cov(g), each (B,), from K_qq' = <g_q, g_q'>.

    A question drawn twice is no pair of its own."""
    off = K - K.diag().diag()
    signal = ((W @ off) * W).sum(1) / (W.sum(1) ** 2 - W.square().sum(1))
    return signal, W @ K.diag() / W.sum(1) - signal


def interval(values: Tensor) -> list[float | None]:
    """values (1 + count,) -> [estimate, low, high], 95%. None: undefined in some resample."""
    if not values.isfinite().all():
        return [None, None, None]
    return [values[0].item(), *values[1:].quantile(torch.tensor([.025, .975])).tolist()]


def moments(z: Tensor, r: Tensor, S: Tensor, W: Tensor) -> tuple[Moments, Tensor]:
    """What eq. 15 asks for, and Var(z), each (B,), from z, r, S (n, group). The group's mean is
    taken off: what differs between questions is no noise of an advantage (eq. 14)."""
    z, r, S = (x - x.mean(1, keepdim=True) for x in (z, r, S))

    def mean(x: Tensor) -> Tensor:
        return W @ x.sum(1) / W.sum(1) / (x.shape[1] - 1)

    zz = mean(z * z)
    d_r, d_s = mean(z * r) / zz, mean(z * S) / zz
    return Moments(d_r, d_s, mean(r * r) - d_r ** 2 * zz, mean(S * S) - d_s ** 2 * zz,
                   mean(r * S) - d_r * d_s * zz), zz


def predicted(model: Moments, zz: Tensor) -> dict[str, Tensor]:
    """SNR over that of GRPO, each (B,): by eq. 15, and by eq. 18 where it is small, as it is for a
    policy of many tokens. There it is proportional to x / (1 + x) with x = Var(z) SNR(b). That is 1
    if the return is z itself."""
    x, x_0 = zz * model.snr(.4), zz * model.snr(0.)
    grpo = x_0 / (1 + x_0)
    return {"by eq. 15, beta 0.4": x / x_0, "by eq. 18, beta 0.4": x / (1 + x) / grpo,
            "by eq. 18, oracle": 1 / grpo}


# ---- one policy in one world ---------------------------------------------------------------------

def compare(trajectories: list[Trajectory], u: Tensor, W: Tensor,
            group: int) -> dict[str, dict[str, Tensor]]:
    """Of each of KINDS and each row the SNR (B,)."""
    snr, n = {kind: {} for kind in KINDS}, W.shape[1]
    counts = {kind: counted(trajectories, kind) for kind in KINDS}
    for name in ROWS:
        C, kept = coefficients(trajectories, name, group)
        for kind in KINDS:
            g = torch.bmm((C * counts[kind]).view(n, 1, -1), u.view(n, -1, WIDTH))[:, 0]   # eq. 23
            signal, noise = signal_noise(g @ g.T, W * kept)
            snr[kind][name] = signal / noise
    return snr


def probe(policy: Policy, scorer: Scorer, options: int, n: int) -> list[dict]:
    """Roll out, score, sketch, compare: what the lines of the file hold, one for each of KINDS."""
    generator, trajectories = torch.Generator().manual_seed(0), []
    questions = world_questions(World(options=options), 0, "test", 10_000, n)
    for first in range(0, n, 16):
        trajectories += collect(policy, questions[first:first + 16], GROUP, generator=generator)
    score_looks(trajectories, scorer)
    r, s, looked = rewards(trajectories)
    S = mapo.trajectory_score(s, looked, Config.lam)
    z, W = torch.tensor([float(hit(t)) for t in trajectories]), resamples(n)
    model, zz = moments(z.view(n, GROUP), r.view(n, GROUP), S.view(n, GROUP), W)
    common = {"trajectories": measure(trajectories),
              "predicted": {name: interval(x) for name, x in predicted(model, zz).items()}}
    lines = []
    for kind, snr in compare(trajectories, score_vectors(policy, trajectories), W, GROUP).items():
        rows = {name: {"snr": interval(x), "snr - grpo": interval(x - snr["grpo"])}
                for name, x in snr.items()}
        base = snr["grpo"].clamp(min=0)        # a ratio to what may be 0 says nothing
        gains = {name: interval(snr[name] / base) for name in ("grpo + S, beta 0.4", AIM)}
        lines.append({"tokens": kind, "rows": rows, "gains": gains} | common)
    return lines


# ---- the page ------------------------------------------------------------------------------------

def cell(values: list | None, digits: int, scale: float = 1., sign: str = "") -> str:
    """estimate [low, high]; bold: a difference whose interval leaves out 0."""
    if values is None or None in values:
        return "-"
    estimate, low, high = (f"{scale * x:{sign}.{digits}f}" for x in values)
    bold = "**" if sign and values[1] * values[2] > 0 else ""
    return f"{bold}{estimate}{bold} [{low}, {high}]"


def table(title: str, records: list[dict], rows: dict[str, list[str]]) -> list[str]:
    heads = [f"{x['when']}: {x['tokens']}" for x in records]
    lines = ["", title, "", f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    return lines + [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()]


def page(records: list[dict]) -> str:
    """docs/probe.md: the text that stands there, and then the tables."""
    return PAGE.read_text().split(MEASURED)[0] + tables(records)


def tables(records: list[dict]) -> str:
    made = records[0]
    options = made["options"] or "no"
    lines = [MEASURED, "", f"    {made['command']}", "",
             f"{made['questions']} questions with {options} options, {GROUP} trajectories each, "
             f"with the code of commit {made['commit']}."]
    for x in records[::len(KINDS)]:
        found = x["trajectories"]
        lines.append(f"The rollouts {x['when']}: accuracy {found['accuracy']:.2f}, "
                     f"hit {found['hit']:.2f}.")
    for title, key, sign in (("SNR of one question, times 1000:", "snr", ""),
                             ("The same, minus GRPO's, paired:", "snr - grpo", "+")):
        rows = {name: [cell(x["rows"][name][key], 1, 1000, sign) for x in records]
                for name in ROWS if key == "snr" or name != "grpo"}
        lines += table(title, records, rows)
    ratios = {name: [cell(x["predicted"][name] if x["tokens"] == "looks" else None, 2)
                     for x in records] for name in made["predicted"]}
    ratios |= {f"of the gradient, {name}": [cell(x["gains"][name], 2) for x in records]
               for name in made["gains"]}
    lines += table("Over GRPO's:", records, ratios)
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", default=["tiny"], help="the start, which also "
                        "scores, and policies that were trained from it")
    parser.add_argument("--options", type=int, default=4, help="the world's luck")
    parser.add_argument("--questions", type=int, default=512)
    parser.add_argument("--out", type=Path, default=NUMBERS, help="what is measured; the default "
                        "makes docs/probe.md, too")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)                   # small tensors
    if not args.table:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        git = ["git", "describe", "--always", "--dirty"]
        about = {"command": " ".join(["python docs/probe.py", *(arguments or sys.argv[1:])]),
                 "commit": subprocess.check_output(git, cwd=ROOT, text=True).strip(),
                 "questions": args.questions, "options": args.options}
        scorer, lines = Scorer(Policy(newest(args.models[0]))), []
        for model in args.models:
            when = "at the start" if model == args.models[0] else "after training"
            policy = Policy(newest(model))
            for found in probe(policy, scorer, args.options, args.questions):
                line = about | {"when": when, "model": model} | found
                lines.append(json.dumps(line, allow_nan=False) + "\n")
            args.out.write_text("".join(lines))         # a kill loses one model's
    records = [json.loads(line) for line in args.out.open()]
    if args.out == NUMBERS:
        PAGE.write_text(page(records))
    print(tables(records))


if __name__ == "__main__":
    main()
