"""Train an agent that looks: roll out, score, advantage, accumulate, step.

What it teaches: the whole loop of agentic RL on one screen, nothing hidden in a framework. `train`
is the loop; its lines are named steps. The method is

    roll out     `group` trajectories of each of `questions` questions, and the semantic
                 score s of every look                    (rollout.py, reward.py)
    advantage    couple outcome and score in the return, normalise in the group      (mapo.py)
    accumulate   the gradient of the clipped loss, over micro-batches and ranks      (here)
    step         AdamW, its states divided among the ranks                           (lib/shard.py)

DAPO draws again where a group has no signal, and PPO has a critic instead of the group; both are
rows of mapo.ALGORITHMS. The vision tower is frozen, so that an image is encoded once and serves
sampling, training and the semantic score. What a run tells (judge, watch, log, compare) is in
report.py. Left out: a KL penalty (kl, to the policy that sampled, is only measured), and
asynchronous sampling.

Run it:  python train.py                              # MAPO on the embedded agent
         python train.py --beta 0                     # without the semantic score: GSPO, clip 10
         python train.py --algo grpo                  # GRPO, another row of mapo.ALGORITHMS
         python train.py --resume --steps 60          # goes on from the newest checkpoint
         torchrun --nproc-per-node 2 train.py         # two processes share the questions
         python train.py --help                       # every setting
"""
import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")   # waiting threads must not take the core

import argparse
import dataclasses
import functools
import math
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import mapo
from lib import checkpoint, shard
from lib.batches import micro_batches, pad, spread
from lib.critic import Critic, payments
from lib.data import DataError, check_pictures, listed, read_jsonl
from lib.policy import Policy, not_finite
from lib.question import Question
from report import closing, compare, judge, log, no_bar, peak_mb, show_page, watch
from reward import Scorer, measure, rewards, score_looks
from rollout import Trajectory, collect
from tiny.world import World, world_questions


# ---- settings ------------------------------------------------------------------------------------

def option(default, text: str, **more):
    """more: what else argparse takes, such as `choices`."""
    return dataclasses.field(default=default, metadata={"help": text, **more})


@dataclass
class Config:
    """Every field is a command-line option of the same name."""
    model: str = option("tiny", "model directory, or a run: where training starts; it also scores")
    out: str = option("", "the run's folder; default: runs/ and what differs from the defaults")
    algo: str = option("mapo", "the algorithm", choices=list(mapo.ALGORITHMS))
    beta: float = option(None, "weight of the semantic score; None: the algorithm's")
    lam: float = option(.95, "discount of earlier looks in the trajectory's score")
    credit: str = option(None, "which turns the score pays; None: the algorithm's",
                         choices=mapo.CREDITS)
    steps: int = option(30, "batches of trajectories")
    questions: int = option(8, "questions a step")
    group: int = option(8, "trajectories a question")
    updates: int = option(2, "optimiser steps on each batch of trajectories")
    max_turns: int = option(4, "turns a trajectory; the last cannot look")
    max_tokens: int = option(64, "tokens a turn")
    temperature: float = option(1., "of sampling, and of the distribution that is trained")
    lr: float = option(1.5e-4, "learning rate, after 5 steps of warm-up")
    critic_lr: float = option(1e-2, "of PPO's value head, a linear map of hidden states")
    clip: float = option(1., "scales the algorithm's clip range")
    grad_clip: float = option(1., "largest gradient norm")
    micro_tokens: int = option(2048, "padded tokens a micro-batch")
    data: str = option("", ".jsonl of training questions; default: the embedded world")
    test: str = option("", ".jsonl of held-out questions, with --data")
    options: int = option(4, "the world's luck: options of a mark question, 0 or 2 to 8")
    objects: int = option(6, "the world's difficulty: objects of a scene, 2 to 16")
    eval_questions: int = option(400, "held-out questions before and after")
    eval_start: int = option(0, "the first of them, in the embedded world")
    save_every: int = option(10, "steps between checkpoints")
    seed: int = option(0, "of questions and sampling")
    device: str = option("cpu", "cpu or cuda")
    dtype: str = option("float32", "of the weights; the optimiser's are float32",
                        choices=("float32", "bfloat16"))
    coordinates: str = option("", "of boxes: pixels, or thousandths of a side; default: as "
                                  "agent.json beside the model says, else as its family",
                              choices=("pixels", "1000"))
    recompute: bool = option(False, "activation checkpointing: less memory, a third more time")
    resume: bool = option(False, "go on from the newest checkpoint of the run")
    quiet: bool = option(False, "no bar, no line a step, no tables")

    def __post_init__(self):
        row = mapo.ALGORITHMS.get(self.algo, mapo.Algorithm())
        self.beta = row.beta if self.beta is None else self.beta
        self.credit = self.credit or row.credit


# A resumed run may change these; they are no part of a run's default name either.
FREE = {"steps", "out", "resume", "save_every", "eval_questions", "eval_start", "test", "device",
        "recompute", "micro_tokens", "quiet"}


def parse_config(arguments: list[str] | None = None) -> Config:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for f in dataclasses.fields(Config):
        kind = {"action": "store_true"} if f.type is bool else {"type": f.type}
        parser.add_argument(f"--{f.name}", default=f.default, **kind, **f.metadata)
    config = Config(**vars(parser.parse_args(arguments)))
    least = {"steps": 1, "questions": 1, "group": 2, "updates": 1, "max_turns": 1, "max_tokens": 1,
             "save_every": 1, "eval_questions": 0, "eval_start": 0, "seed": 0}
    for name, value in least.items():              # a group of one has no baseline
        if getattr(config, name) < value:
            parser.error(f"--{name}: expected at least {value}, found {getattr(config, name)}")
    for name in ("temperature", "lr", "critic_lr", "clip", "grad_clip"):
        if not 0 < getattr(config, name) < math.inf:
            parser.error(f"--{name}: expected a number above 0, found {getattr(config, name)}")
    if not (0 <= config.beta <= 1 and 0 < config.lam <= 1):
        parser.error(f"expected --beta in [0, 1], --lam in (0, 1]; found {config.beta}, "
                     f"{config.lam}")
    if config.test and not config.data:
        parser.error("--test: needs --data, the questions to train on")
    config.out = config.out or f"runs/{run_name(config)}"
    return config


def run_name(config: Config) -> str:
    """The algorithm, and each setting that differs from its usual one: gspo-beta0.4-seed3."""
    parts, usual = [config.algo], Config(algo=config.algo)
    for f in dataclasses.fields(Config):
        value = getattr(config, f.name)
        if f.name not in FREE | {"algo"} and value != getattr(usual, f.name):
            if f.name == "model":
                value = Path(value).name
            if f.name == "data":
                value = Path(value).stem
            parts.append(f"{f.name}{value}")
    return "-".join(parts)


# ---- the loop ------------------------------------------------------------------------------------

def train(config: Config) -> dict:
    """Run the whole training; returns the last step's metrics."""
    run, metrics = prepare(config), {}
    before = judge(run, run.base)                             # held-out questions, if there are any
    if run.first == 0:
        watch(run, 0)                                         # a handful of them
    bar = tqdm(range(run.first, config.steps), config.algo, initial=run.first, total=config.steps,
               dynamic_ncols=True, disable=no_bar(config))
    with checkpoint.signals_noted() as stopped:               # Ctrl-C finishes the step
        for step in bar:
            began = time.time()
            with shard.together():
                trajectories, sampled = roll_out(run, step)            # with semantic scores
            rolled = time.time()
            advantage = token_advantages(run, trajectories)            # (N, L - 1)
            batch = to_batch(trajectories, advantage, run.algorithm)
            updates = []
            for _ in range(config.updates):   # in the first one all ratios are 1, to rounding
                totals = accumulate(run.policy, run.optimiser, batch, run.algorithm, config)
                updates.append(take_step(run, batch, totals, step))
            metrics = measured(run, step, sampled, updates, began, rolled)
            log(run, metrics, batch, bar)
            del trajectories, sampled, batch  # their features must not lie beside the next step's
            save_if_due(run, step, stopped())
    if run.tests:
        compare(run, before, judge(run, run.policy))
        show_page(run)
    if shard.rank() == 0:
        print(closing(run.out))
    return metrics


# ---- what a run consists of ----------------------------------------------------------------------

@dataclass
class Run:
    config: Config
    algorithm: mapo.Algorithm
    out: Path
    policy: Policy                  # what is trained
    base: Policy                    # what it was at first: frozen, and the encoder of the scores
    scorer: Scorer
    optimiser: shard.ShardedAdamW
    critic: Critic | None           # PPO's
    generator: torch.Generator      # of this rank's sampling
    stream: "Questions"
    tests: list[Question]           # held out
    first: int = 0                  # steps done before, if it was resumed
    diverged: int = 0               # updates in a row without a finite gradient

    @property
    def optimisers(self) -> list[shard.ShardedAdamW]:
        return [self.optimiser] + ([self.critic.optimiser] if self.critic else [])


def prepare(config: Config) -> Run:
    """Load everything, or fail before anything is written. All ranks do it alike."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    device = shard.setup(config.device)
    algorithm = mapo.ALGORITHMS[config.algo]
    with shard.together():
        if config.questions % shard.ranks():
            raise ValueError(f"--questions: expected a multiple of {shard.ranks()} ranks, "
                             f"found {config.questions}")
        out = checkpoint.choose_folder(Path(config.out), config.resume)
        saved = checkpoint.newest(out) if config.resume else None
        if saved:
            checkpoint.check_settings(saved, settings(config), FREE)
            if shard.rank() == 0:               # it reads every file; one rank is enough
                checkpoint.verify(saved)
        stream, tests = Questions(config), held_out(config)
        start, dtype = checkpoint.newest(config.model), getattr(torch, config.dtype)
        base = Policy(start, device, dtype, config.coordinates or None)
        policy = Policy(saved or start, device, dtype, config.coordinates or None)
        scorer = Scorer(base, stream.file[:64])
        parameters = policy.freeze_vision()
        if config.recompute:
            policy.recompute_layers()
        generator = torch.Generator(policy.device)
        generator.manual_seed(config.seed + 1_000_003 * shard.rank())
    optimiser = shard.ShardedAdamW(parameters)
    critic = Critic(policy) if algorithm.critic else None
    run = Run(config, algorithm, out, policy, base, scorer, optimiser, critic, generator, stream,
              tests)
    if saved:
        run.first = checkpoint.load(saved, run.optimisers, generator)
    with shard.together():
        if shard.rank() == 0:
            out.mkdir(parents=True, exist_ok=True)
            checkpoint.lock(out)
            for name in ("metrics.jsonl", "trajectories.jsonl", "watched.jsonl"):
                checkpoint.keep_lines(out / name, run.first if saved else -1)      # -1: none
            if run.first < config.steps:                   # those of older weights
                for name in ("results.json", "films.png"):
                    (out / name).unlink(missing_ok=True)
            if saved:
                print(f"going on from {saved}")
            elif out != Path(config.out):
                print(f"the run's folder is {out}: {config.out} holds one")
    return run


def settings(config: Config) -> dict:
    """The configuration as it is saved beside a model, with the frozen base's folder."""
    return dataclasses.asdict(config) | {"model": checkpoint.noted(config.model)}


# ---- questions -----------------------------------------------------------------------------------

class Questions:
    """The training stream. Question `i` is the same in every run with the same seed, so that runs
    can be compared in pairs."""

    def __init__(self, config: Config):
        self.config, self.file = config, []
        if config.data:
            self.file = own_questions(config.data)

    def __call__(self, step: int, draw: int = 0) -> list[Question]:
        """The questions of a step, of all ranks; `draw` counts further draws for the same step."""
        count = self.config.questions
        start = step * count + draw * 10**7
        if not self.file:
            world = world_of(self.config)
            return world_questions(world, self.config.seed, "train", start, count)
        places = [divmod(i, len(self.file)) for i in range(start, start + count)]
        return [self.file[self.order(epoch)[place]] for epoch, place in places]

    @functools.lru_cache(maxsize=2)         # an epoch's order is drawn once
    def order(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + epoch)
        return torch.randperm(len(self.file), generator=generator).tolist()


def world_of(config: Config) -> World:
    return World(objects=config.objects, options=config.options)


def own_questions(file: str) -> list[Question]:
    """Of a .jsonl. All bad lines and pictures are named before anything runs (DataError)."""
    bad = []
    questions = check_pictures(read_jsonl(file, bad), bad)
    if bad or not questions:
        raise DataError(listed(bad) or f"{file}: holds no questions")
    return questions


def held_out(config: Config) -> list[Question]:
    if not config.data:
        first, count = config.eval_start, config.eval_questions
        return world_questions(world_of(config), 0, "test", first, count)
    if not config.test:
        return []
    return own_questions(config.test)[:config.eval_questions]


# ---- roll out ------------------------------------------------------------------------------------

def roll_out(run: Run, step: int) -> tuple[list[Trajectory], list[Trajectory]]:
    """This rank's trajectories of a step, scored: those to learn from, and all that were sampled,
    which are the same but for DAPO."""
    count = run.config.questions // shard.ranks()
    if run.algorithm.max_draws > 1:
        return draw_for_signal(run, step, count)
    trajectories = sample(run, run.stream(step), count)
    return trajectories, trajectories


def sample(run: Run, questions: list[Question], count: int) -> list[Trajectory]:
    """A group for each of this rank's first `count` questions; its looks are scored."""
    mine, config = questions[shard.rank()::shard.ranks()][:count], run.config
    trajectories = collect(run.policy, mine, config.group, config.max_turns, config.max_tokens,
                           config.temperature, run.generator)
    score_looks(trajectories, run.scorer)
    return trajectories


def draw_for_signal(run: Run, step: int, count: int
                    ) -> tuple[list[Trajectory], list[Trajectory]]:
    """Dynamic sampling (DAPO, arXiv 2503.14476, sec. 3.2): groups of equal returns are left out,
    and others drawn in their place (of a small file it may be the same questions), in `max_draws`
    draws at most. If no group has a signal, the last ones are returned; their advantages are 0."""
    group, kept, sampled = run.config.group, [], []
    for draw in range(run.algorithm.max_draws):
        part = sample(run, run.stream(step, draw), count - len(kept) // group)
        sampled += part
        signal = signal_of(part, run.config).repeat_interleave(group).tolist()
        kept += [trajectory for trajectory, has_one in zip(part, signal) if has_one]
        if len(kept) == count * group:
            break
    return (kept or part), sampled


def signal_of(trajectories: list[Trajectory], config: Config) -> Tensor:
    """bool (groups,): are the returns of the group not all equal?"""
    r, s, looked = rewards(trajectories)
    S = mapo.trajectory_score(s, looked, config.lam)
    return mapo.has_signal(mapo.coupled_return(r, S, config.beta), config.group)


# ---- advantage -----------------------------------------------------------------------------------

def token_advantages(run: Run, trajectories: list[Trajectory]) -> Tensor:
    """Advantage of each token (N, L - 1); column j speaks of token j + 1."""
    config, algorithm = run.config, run.algorithm
    r, s, looked = rewards(trajectories)
    if algorithm.overlong:      # no penalty in a group of equal returns: it would be all its signal
        limit = config.max_turns * config.max_tokens
        lengths = torch.tensor([sum(t.mask) for t in trajectories])
        penalty = mapo.overlong_penalty(lengths, limit, round(algorithm.overlong * limit))
        r = r + penalty * signal_of(trajectories, config).repeat_interleave(config.group)
    if run.critic:
        paid = payments(trajectories, r, s, looked, config.beta, config.lam, config.credit)
        return run.critic.advantages(trajectories, paid, config.micro_tokens)
    A = mapo.advantages(r, s, looked, config.group, config.beta, config.lam, config.credit,
                        algorithm.std)
    return spread(A, trajectories)


# ---- accumulate, step ----------------------------------------------------------------------------

@dataclass
class Batch:
    """The trajectories of a step, as tensors (N, L - 1)."""
    trajectories: list[Trajectory]
    advantage: Tensor
    old_logp: Tensor                # log-probabilities at sampling
    weight: Tensor                  # w of eq. 4; sums to 1 over all ranks


def to_batch(trajectories: list[Trajectory], advantage: Tensor, algorithm: mapo.Algorithm) -> Batch:
    """The weights of all tokens are fixed here, before the first backward: so the gradients of
    micro-batches add up to the same sum, however they are cut, on any number of ranks. On each rank
    they sum to its share of all trajectories (or of all tokens, if `mean` says so)."""
    mask = pad([t.mask for t in trajectories], False)
    count = float(mask.sum() if algorithm.mean == "token" else len(mask))
    weight = mapo.token_weights(mask, algorithm.mean) * (count / shard.all_sum(count))
    return Batch(trajectories, advantage, pad([t.logps for t in trajectories], 0.), weight)


def accumulate(policy: Policy, optimiser: shard.ShardedAdamW, batch: Batch,
               algorithm: mapo.Algorithm, config: Config) -> dict[str, float]:
    """Leave the gradient of eq. 4, over all trajectories of all ranks, in the optimiser.

    A trajectory whose advantage is 0 everywhere has no gradient and is skipped. Returns the sums
    of `count_in` over the tokens that were learnt from."""
    low, high = config.clip * algorithm.clip_low, config.clip * algorithm.clip_high
    learnt = ((batch.advantage * batch.weight) != 0).any(1).nonzero()[:, 0].tolist()
    totals = defaultdict(float)
    optimiser.zero_grad()
    for rows in shard.even(micro_batches(batch.trajectories, learnt, config.micro_tokens)):
        if rows is not None:                   # None: another rank has a micro-batch more
            part = [batch.trajectories[i] for i in rows]
            logp, entropy = policy.logprobs([t.tokens for t in part], [t.mask for t in part],
                                            config.temperature, [t.prompt for t in part])
            old, advantage, weight = (x[rows, :logp.shape[1]].to(policy.device)
                                      for x in (batch.old_logp, batch.advantage, batch.weight))
            loss, stats = mapo.loss(logp, old, advantage, weight, low, high, algorithm.ratio)
            loss.backward()
            count_in(totals, loss, stats, logp, old, entropy, weight)
        optimiser.finish_micro_batch()
    return totals


def count_in(totals: dict, loss: Tensor, stats: dict, logp: Tensor, old: Tensor, entropy: Tensor,
             weight: Tensor) -> None:
    """Add a micro-batch to the statistics of the update."""
    totals["micro_batches"] += 1
    totals["learnt"] += weight.sum().item()
    totals["loss"] += loss.item()
    totals["entropy"] += (weight * entropy).sum().item()
    for name, value in stats.items():
        totals[name] += value.item()
    difference = (logp - old).abs()[weight > 0].max().item()
    totals["logp_gap"] = max(totals["logp_gap"], difference)


def take_step(run: Run, batch: Batch, totals: dict[str, float], step: int) -> dict[str, float]:
    """AdamW on the accumulated gradient; returns the update's statistics over all ranks."""
    config, warm = run.config, min(1, (step + 1) / 5)
    stats, learnt = over_ranks(totals)
    stats["grad_norm"] = run.optimiser.clip(config.grad_clip)
    stats["lr"] = warm * config.lr
    finite = math.isfinite(stats["grad_norm"])
    stats["skipped"] = float(learnt == 0 or not finite)
    stats["changed"] = 0. if stats["skipped"] else run.optimiser.step(stats["lr"])
    run.diverged = 0 if finite else run.diverged + 1
    stop_if_diverged(run, step)
    if run.critic:
        lr = warm * config.critic_lr
        stats["value_loss"] = run.critic.update(batch.weight, lr, config.grad_clip)
    return stats


def over_ranks(totals: dict[str, float]) -> tuple[dict[str, float], float]:
    """The statistics of an update, and the sum of the weights that were learnt from."""
    learnt = shard.all_sum(totals["learnt"])
    stats = {"loss": shard.all_sum(totals["loss"])}
    for name in ("entropy", "kl", "clip_fraction"):                # means over what was learnt from
        stats[name] = shard.all_sum(totals[name]) / max(learnt, 1e-8)
    stats["logp_gap"] = shard.all_sum(totals["logp_gap"], "MAX")
    stats["micro_batches"] = totals["micro_batches"]
    return stats, learnt


def stop_if_diverged(run: Run, step: int) -> None:
    if run.diverged == 3 or not_finite(run.policy.model):
        what = "three gradients in a row" if run.diverged else "the new weights"
        raise ValueError(f"step {step + 1}: {what} are not finite. {advice(run)}")


def advice(run: Run) -> str:
    found = len(checkpoint.checkpoints(run.out))
    return f"Begin anew with a lower --lr; older checkpoints in {run.out}: {found}"


# ---- measure -------------------------------------------------------------------------------------

def measured(run: Run, step: int, sampled: list[Trajectory], updates: list[dict], began: float,
             rolled: float) -> dict:
    """The numbers of a step, over all ranks (docs/run.md). Those of an update are of the last one,
    or of one with a number that is not finite; but logp_gap, by how much sampler and trainer
    disagree, is of the first one, before which nothing has moved the policy."""
    told = next((u for u in updates if not all(map(math.isfinite, u.values()))), updates[-1])
    seconds, signal = time.time() - began, signal_of(sampled, run.config).tolist()
    tokens = shard.all_sum(sum(len(t.mask) for t in sampled))
    return {"step": step + 1, **measure(sampled, shard.all_sum),
            "signal_groups": shard.all_sum(sum(signal)) / shard.all_sum(len(signal)),
            "sampled": shard.all_sum(len(sampled)),
            **told, "logp_gap": updates[0]["logp_gap"],
            "tokens_per_s": tokens / seconds, "rollout_seconds": rolled - began,
            "seconds": seconds, "peak_mb": peak_mb(run.policy.device)}


# ---- save ----------------------------------------------------------------------------------------

def save_if_due(run: Run, step: int, stopped: bool) -> None:
    """A checkpoint every `save_every` steps, after the last one, and before the run stops because
    some rank got Ctrl-C or SIGTERM. Not after a step that diverged: the older one is better."""
    config, done = run.config, step + 1
    stop = shard.all_sum(stopped, "MAX")
    due = stop or done % config.save_every == 0 or done == config.steps
    if run.diverged and done == config.steps:
        raise ValueError(f"step {done}: the last gradient is not finite: these weights are neither "
                         f"saved nor judged. {advice(run)}")
    if due and not run.diverged:
        watch(run, done)
        checkpoint.save(run.out, done, run.policy, run.optimisers, run.generator, settings(config))
        show_page(run)
    if stop:
        saved = checkpoint.checkpoints(run.out)         # none, if all steps diverged
        further = f"--resume goes on from {saved[-1]}" if saved else advice(run)
        raise KeyboardInterrupt(f"stopped after step {done}; {further}")


if __name__ == "__main__":
    started = time.time()
    try:
        train(parse_config())
        if shard.rank() == 0:
            print(f"{time.time() - started:.0f} s")
    except KeyboardInterrupt as stop:
        sys.exit(f"\ntrain.py: {stop or 'stopped'}")
    except (DataError, OSError, ValueError, shard.RankFailed) as error:
        sys.exit(f"train.py: {shard.named(error)}")
    except torch.OutOfMemoryError as error:
        sys.exit(f"train.py: {shard.named(error)}\nTake a smaller --micro_tokens, --questions or "
                 "--group, or --recompute; docs/plan.py computes what fits")
    finally:
        shard.cleanup()
