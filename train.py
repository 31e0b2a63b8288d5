"""Train an agent that looks: roll out, score, advantages, accumulate, step.

What it teaches: the whole loop of agentic RL on one page, nothing hidden in a framework. One step:

    1. sample `group` trajectories for each of `questions` questions           rollout.py
    2. outcome r, and the semantic score s of every look                       reward.py, frozen base model
    3. couple both in the return, normalise in the group                       mapo.py
    4. accumulate the clipped loss over micro-batches, clip, AdamW             here

What is left out: no KL penalty and no reference policy in the loss (kl is measured, not punished), no value network,
no asynchronous sampling; the vision tower stays frozen, so that each image is encoded once and serves sampling,
training and the semantic score.

Run it:  python train.py                       # MAPO on the embedded agent
         python train.py --algo grpo           # the same without the semantic score
         python train.py --help                # every setting
"""
import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # waiting threads must not take the core that works

import argparse
import dataclasses
import json
import math
import resource
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import mapo
from data import DataError, Question, World, read_jsonl, world_questions
from eval import evaluate, record, table, wilson
from policy import Policy
from reward import Scorer, format_reward, measure, score
from rollout import Trajectory, collect, film_strip, stack


@dataclass
class Config:
    """Every field is a command-line option of the same name; the metadata is its help."""
    model: str = dataclasses.field(default="tiny", metadata={"help": "model directory to start from (and the frozen encoder)"})
    out: str = dataclasses.field(default="", metadata={"help": "run directory; default runs/<algo>"})
    algo: str = dataclasses.field(default="mapo", metadata={"help": f"one of {', '.join(mapo.ALGORITHMS)}"})
    beta: float = dataclasses.field(default=-1., metadata={"help": "weight of the semantic score; default: the algorithm's"})
    lam: float = dataclasses.field(default=.95, metadata={"help": "discount of earlier looks in the trajectory's score"})
    credit: str = dataclasses.field(default="trajectory", metadata={"help": "advantage per trajectory or per turn"})
    format_weight: float = dataclasses.field(default=0., metadata={"help": "share of the outcome that pays valid format"})
    steps: int = dataclasses.field(default=80, metadata={"help": "optimiser steps"})
    questions: int = dataclasses.field(default=16, metadata={"help": "questions a step"})
    group: int = dataclasses.field(default=8, metadata={"help": "trajectories a question"})
    max_turns: int = dataclasses.field(default=4, metadata={"help": "turns a trajectory; the last cannot look"})
    max_tokens: int = dataclasses.field(default=64, metadata={"help": "tokens a turn"})
    temperature: float = dataclasses.field(default=1., metadata={"help": "of sampling, and of the trained distribution"})
    lr: float = dataclasses.field(default=1.5e-4, metadata={"help": "peak learning rate; 5 steps of warm-up, then constant"})
    updates: int = dataclasses.field(default=1, metadata={"help": "optimiser steps on each batch of trajectories"})
    micro_tokens: int = dataclasses.field(default=6144, metadata={"help": "padded tokens a micro-batch"})
    grad_clip: float = dataclasses.field(default=1., metadata={"help": "largest gradient norm"})
    data: str = dataclasses.field(default="", metadata={"help": ".jsonl of training questions; default: the embedded world"})
    test: str = dataclasses.field(default="", metadata={"help": ".jsonl of held-out questions, with --data"})
    options: int = dataclasses.field(default=4, metadata={"help": "the world's luck: options of a mark question, 0 or 2 to 8"})
    eval_questions: int = dataclasses.field(default=400, metadata={"help": "held-out questions before and after"})
    save_every: int = dataclasses.field(default=50, metadata={"help": "steps between checkpoints"})
    seed: int = dataclasses.field(default=0, metadata={"help": "of questions and sampling"})
    device: str = dataclasses.field(default="cpu", metadata={"help": "cpu or cuda"})
    threads: int = dataclasses.field(default=1, metadata={"help": "CPU threads"})
    resume: bool = dataclasses.field(default=False, metadata={"help": "continue from the newest checkpoint in --out"})


def parse_config(arguments: list[str] | None = None) -> Config:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for f in dataclasses.fields(Config):
        kind = {"action": "store_true"} if f.type is bool else {"type": f.type}
        parser.add_argument(f"--{f.name}", default=f.default, help=f.metadata["help"], **kind)
    config = Config(**vars(parser.parse_args(arguments)))
    if config.algo not in mapo.ALGORITHMS:
        parser.error(f"--algo: expected one of {', '.join(mapo.ALGORITHMS)}, found {config.algo!r}")
    if config.group < 2 or config.questions < 1 or config.steps < 1 or config.updates < 1:
        parser.error("--group must be at least 2 (a group of one has no baseline); --questions, --steps, --updates at least 1")
    config.beta = mapo.ALGORITHMS[config.algo].beta if config.beta < 0 else config.beta
    config.out = config.out or f"runs/{config.algo}"
    return config


def spread(values: Tensor, trajectories: list[Trajectory]) -> Tensor:
    """(N,) or, per turn, (N, T) -> a value for each token (N, L - 1); column t speaks of token t + 1."""
    longest = max(len(t.mask) for t in trajectories)
    if values.ndim == 1:
        return values[:, None].expand(-1, longest - 1)
    tokens = torch.zeros(len(trajectories), longest)
    for i, trajectory in enumerate(trajectories):
        for k, turn in enumerate(trajectory.turns):
            tokens[i, turn.tokens] = values[i, k]
    return tokens[:, 1:]


def micro_batches(trajectories: list[Trajectory], rows: list[int], limit: int) -> list[list[int]]:
    """Rows sorted by the length of their group, so that trajectories which share a prompt stay together, and cut so that
    padded size stays within `limit` tokens (at least one row each)."""
    lengths = {i: len(trajectories[i].mask) for i in rows}
    longest: dict[int, int] = {}
    for i in rows:
        longest[id(trajectories[i].prompt)] = max(longest.get(id(trajectories[i].prompt), 0), lengths[i])
    batches, width = [], 0
    for row in sorted(rows, key=lambda i: (longest[id(trajectories[i].prompt)], i)):
        width = max(width, lengths[row])
        if batches and (len(batches[-1]) + 1) * width <= limit:
            batches[-1].append(row)
        else:
            batches.append([row])
            width = lengths[row]
    return batches


def accumulate(policy: Policy, parameters: list[Tensor], trajectories: list[Trajectory], advantage: Tensor, config: Config,
               row: mapo.Algorithm) -> dict[str, float]:
    """Gradient of the loss over all trajectories, left in `.grad` (float32). Returns statistics of the same sum.

    The weights of all tokens are fixed before the first backward, so that the micro-batches' gradients simply add up.
    A trajectory with advantage 0 everywhere has no gradient and is skipped (but counted)."""
    longest = max(len(t.mask) for t in trajectories)
    pad = lambda rows, fill: torch.tensor([r[1:] + [fill] * (longest - len(r)) for r in rows])
    mask, old = pad([t.mask for t in trajectories], False), pad([t.logps for t in trajectories], 0.)
    weight, advantage = mapo.token_weights(mask, row.mean), spread(advantage, trajectories)          # (N, L - 1) each
    total = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
    stats = {"loss": 0., "kl": 0., "clip_fraction": 0., "entropy": 0.}
    micro_norms, shares = [], []
    rows = [i for i in range(len(trajectories)) if (advantage[i] * mask[i]).any()]
    for batch in micro_batches(trajectories, rows, config.micro_tokens):
        logp, entropy = policy.logprobs([trajectories[i].tokens for i in batch], [trajectories[i].mask for i in batch],
                                        config.temperature, prompts=[trajectories[i].prompt for i in batch])
        piece = [x[batch, :logp.shape[1]].to(policy.device) for x in (old, advantage, weight)]
        loss, more = mapo.loss(logp, *piece, row.clip_low, row.clip_high, row.ratio)
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for sum_, gradient in zip(total, gradients):
            if gradient is not None:
                sum_ += gradient.float()
        stats["loss"] += loss.item()
        stats["entropy"] += (piece[2] * entropy).sum().item()
        for key, value in more.items():
            stats[key] += value.item()
        shares.append(piece[2].sum().item())
        micro_norms.append(sum(g.float().pow(2).sum().item() for g in gradients if g is not None) / shares[-1] ** 2)
    for p, gradient in zip(parameters, total):
        p.grad = gradient.to(p.dtype)
    stats["entropy"] /= max(sum(shares), 1e-8)
    stats["grad_norm"] = math.sqrt(sum(g.pow(2).sum().item() for g in total))
    stats["grad_noise"] = noise_share(micro_norms, shares, stats["grad_norm"] ** 2)
    return stats


def noise_share(micro_norms: list[float], shares: list[float], total: float) -> float | None:
    """Which part of the squared gradient norm is sampling noise: (tr(Sigma) / B) / |g_B|^2, after McCandlish et al. 2018
    (arXiv 1812.06162), app. A.1: E|g_b|^2 = |G|^2 + tr(Sigma) / b for a batch of size b.

    micro_norms: |g_b|^2 of each micro-batch's *mean* gradient, shares: its part b of the batch, total: |g|^2 of the sum.
    1 is all noise; an estimate, so it may leave [0, 1]. None with fewer than two micro-batches. These are sorted by
    length, not drawn at random: read the trend, not the digits."""
    if len(micro_norms) < 2 or total == 0:
        return None
    whole = sum(shares)
    small, b = sum(n * s for n, s in zip(micro_norms, shares)) / whole, sum(s * s for s in shares) / whole
    large = total / whole ** 2
    return (small - large) / (1 / b - 1 / whole) / whole / large


class Questions:
    """The training stream: question `i` is the same in every run with the same seed, so runs can be compared in pairs."""

    def __init__(self, config: Config):
        self.config, self.file = config, list(read_jsonl(config.data)) if config.data else []
        if config.data and not self.file:
            raise DataError(f"{config.data}: holds no questions")

    def __getitem__(self, step: int) -> list[Question]:
        c, start = self.config, step * self.config.questions
        if not self.file:
            return world_questions(World(options=c.options), c.seed, "train", start, c.questions)
        chosen = []
        for i in range(start, start + c.questions):
            epoch, place = divmod(i, len(self.file))
            order = torch.randperm(len(self.file), generator=torch.Generator().manual_seed(c.seed * 1_000_003 + epoch))
            chosen.append(self.file[order[place]])
        return chosen


def held_out(config: Config) -> list[Question]:
    if config.data:
        return list(read_jsonl(config.test))[:config.eval_questions] if config.test else []
    return world_questions(World(options=config.options), 0, "test", 0, config.eval_questions)


# ---- checkpoints -----------------------------------------------------------------------------------------------------

def save_checkpoint(policy: Policy, optimiser, generator: torch.Generator, step: int, config: Config) -> None:
    """runs/x/step-000050: a model directory plus state.pt; written aside and renamed, then the older one goes."""
    out = Path(config.out)
    folder, aside = out / f"step-{step:06}", out / "saving"
    shutil.rmtree(aside, ignore_errors=True)
    policy.save(aside)
    torch.save({"step": step, "optimiser": optimiser.state_dict(), "generator": generator.get_state(),
                "config": dataclasses.asdict(config)}, aside / "state.pt")
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)
    for old in out.glob("step-*"):
        if old != folder:
            shutil.rmtree(old)


def newest_checkpoint(out: str) -> Path | None:
    return max((p for p in Path(out).glob("step-*") if (p / "state.pt").is_file()), default=None)


def publish(policy: Policy, config: Config) -> None:
    """The final model at the top of the run directory, file by file, with a note on where it came from."""
    aside = Path(config.out) / "saving"
    shutil.rmtree(aside, ignore_errors=True)
    policy.save(aside)
    (aside / "train.json").write_text(json.dumps(dataclasses.asdict(config), indent=1))
    for file in aside.iterdir():
        file.replace(Path(config.out) / file.name)
    aside.rmdir()


# ---- the loop --------------------------------------------------------------------------------------------------------

def collapse(metrics: dict) -> str:
    """What went wrong, in words; empty while all is well."""
    if not math.isfinite(metrics["grad_norm"]):
        return "the gradient is not finite: the step was skipped; lower --lr"
    if metrics["calls"] < .1:
        return "the agent has stopped looking (fewer than 0.1 calls a trajectory): raise --beta"
    if metrics["entropy"] is not None and metrics["signal_groups"] > 0 and metrics["entropy"] < .005:
        return "the policy is nearly deterministic (entropy below 0.005): nothing is left to learn from"
    if metrics["valid"] < .5:
        return "most turns are malformed: lower --lr"
    return ""


def train(config: Config) -> dict:
    """Run the whole training; returns the last step's metrics."""
    torch.set_num_threads(config.threads)
    out, row = Path(config.out), mapo.ALGORITHMS[config.algo]
    checkpoint = newest_checkpoint(config.out) if config.resume else None
    if config.resume and not checkpoint:
        raise FileNotFoundError(f"--resume: no checkpoint in {config.out}; expected {config.out}/step-*/state.pt")
    stream, tests = Questions(config), held_out(config)
    base = Policy(config.model, config.device)
    policy = Policy(checkpoint or config.model, config.device)
    scorer = Scorer(base, stream[10**6][:16] + stream[10**6 + 1][:16] + stream[10**6 + 2][:16] + stream[10**6 + 3][:16])
    out.mkdir(parents=True, exist_ok=True)
    if not config.resume:  # everything has loaded: only now may the old run's lines and checkpoints go
        for old in [*out.glob("step-*"), out / "metrics.jsonl", out / "trajectories.jsonl"]:
            shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
    policy.model.requires_grad_(False)
    parameters = [p.requires_grad_() for n, p in policy.model.named_parameters() if "visual" not in n]
    optimiser = torch.optim.AdamW(parameters, lr=config.lr, betas=(.9, .95), weight_decay=0.)
    generator = torch.Generator(policy.device).manual_seed(config.seed)
    first = 0
    if checkpoint:
        state = torch.load(checkpoint / "state.pt", map_location=config.device, weights_only=True)
        first = state["step"]
        optimiser.load_state_dict(state["optimiser"])
        generator.set_state(state["generator"].cpu())
        keep_lines(out / "metrics.jsonl", first)
        keep_lines(out / "trajectories.jsonl", first)

    judge = lambda p, heat: evaluate(p, tests, scorer, heat, 0, config.max_turns, config.max_tokens)
    before = {name: judge(base, heat) for name, heat in (("greedy", 0.), ("sampled", 1.))} if tests else {}
    bar, metrics = tqdm(range(first, config.steps), initial=first, total=config.steps, desc=config.algo, dynamic_ncols=True), {}
    for step in bar:
        start = time.time()
        trajectories = collect(policy, stream[step], config.group, config.max_turns, config.max_tokens, config.temperature, generator)
        rolled = time.time()
        r, s, looked = score(trajectories, scorer)
        if config.format_weight:
            r = (1 - config.format_weight) * r + config.format_weight * torch.tensor([format_reward(t) for t in trajectories])
        advantage = mapo.advantages(r, s, looked, config.group, config.beta, config.lam, config.credit, row.std)
        lr = config.lr * min(1, (step + 1) / 5)
        for _ in range(config.updates):
            stats = accumulate(policy, parameters, trajectories, advantage, config, row)
            if math.isfinite(stats["grad_norm"]):
                for p in parameters:
                    p.grad *= min(1., config.grad_clip / (stats["grad_norm"] + 1e-6))
                optimiser.param_groups[0]["lr"] = lr
                optimiser.step()
        seconds = time.time() - start
        signal = (advantage.reshape(config.questions, -1) != 0).any(1).float().mean().item()
        metrics = {"step": step + 1, **measure(trajectories), "signal_groups": signal, **stats, "lr": lr,
                   "tokens_per_s": sum(len(t.mask) for t in trajectories) / seconds, "rollout_seconds": rolled - start,
                   "seconds": seconds, "peak_mb": peak_mb(config.device)}
        append(out / "metrics.jsonl", [metrics])
        append(out / "trajectories.jsonl", [{"step": step + 1, "advantage": advantage[i].tolist(), **record(trajectories[i])}
                                            for i in (0, 1, config.group)[:len(trajectories)] if i < len(trajectories)])
        bar.set_postfix_str("  ".join(f"{k} {metrics[k]:.2f}" for k in ("accuracy", "calls", "hit", "gap", "semantic")
                                      if metrics[k] is not None))
        if trouble := collapse(metrics):
            tqdm.write(f"step {step + 1}: collapse: {trouble}")
        if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
            save_checkpoint(policy, optimiser, generator, step + 1, config)
    publish(policy, config)
    if tests:
        after = {name: judge(policy, heat) for name, heat in (("greedy", 0.), ("sampled", 1.))}
        report(before, after, config)
    return metrics


def report(before: dict, after: dict, config: Config) -> None:
    """The before/after table, its numbers in results.json, and film strips of the same questions."""
    out, results = Path(config.out), {}
    for name in before:
        for moment, trajectories in (("before", before[name]), ("after", after[name])):
            print(f"\n{moment} training, {name}\n{table(trajectories)}")
            m = measure(trajectories)
            results[f"{moment} {name}"] = m | {"n": len(trajectories), "interval": wilson(m["accuracy"] * len(trajectories), len(trajectories)),
                "categories": {c: measure([t for t in trajectories if t.question.category == c])
                               for c in sorted({t.question.category for t in trajectories})}}
    print(f"\n{'held out':10}" + "".join(f"{name + ', ' + c:>22}" for name in before for c in ("accuracy", "gap")))
    for moment in ("before", "after"):
        cells = [results[f"{moment} {name}"][c] for name in before for c in ("accuracy", "gap")]
        print(f"{moment:10}" + "".join(f"{'-' if c is None else f'{c:.3f}':>22}" for c in cells))
    (out / "results.json").write_text(json.dumps(results, indent=1))
    first = {t.question.category: i for i, t in reversed(list(enumerate(before["greedy"])))}  # one question a category
    shown = sorted(first.values())[:4]
    stack([film_strip(moment[i], f"{name}: ") for i in shown
           for name, moment in (("before", before["greedy"]), ("after", after["greedy"]))]).save(out / "films.png")
    print(f"\nsaved the model in {out}, and there films.png, metrics.jsonl, trajectories.jsonl, results.json")


def append(file: Path, records: list[dict]) -> None:
    with file.open("a", encoding="utf-8") as lines:
        lines.writelines(json.dumps(r) + "\n" for r in records)


def keep_lines(file: Path, steps: int) -> None:
    """Drop lines written after the checkpoint that a run resumes from."""
    if file.is_file():
        kept = [line for line in file.read_text(encoding="utf-8").splitlines() if json.loads(line)["step"] <= steps]
        file.write_text("".join(line + "\n" for line in kept), encoding="utf-8")


def peak_mb(device: str) -> float:
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


if __name__ == "__main__":
    started = time.time()
    try:
        train(parse_config())
    except (DataError, OSError, ValueError) as error:
        sys.exit(f"train.py: {error}")
    print(f"{time.time() - started:.0f} s")
