"""Train an agent that looks: roll out, score, advantages, accumulate, step.

What it teaches: the whole loop of agentic RL on one page, nothing hidden in a framework. One step:

    1. sample `group` trajectories for each of `questions` questions           rollout.py
    2. outcome r, and the semantic score s of every look                       reward.py, frozen base model
    3. couple both in the return, normalise in the group                       mapo.py
    4. `updates` times: accumulate the clipped loss over micro-batches and ranks, AdamW     here, shard.py

DAPO draws again where a group has no signal, PPO has a critic instead of the group; both are rows of mapo.ALGORITHMS.
A checkpoint every `save_every` steps; --resume goes on from the newest one.

What is left out: no KL penalty and no reference policy in the loss (kl is measured, not punished), no asynchronous
sampling. By default the vision tower is frozen, so that each image is encoded once and serves sampling, training and the
semantic score; with --train_vision every update encodes it again, and the frozen base looks at the crops itself.

Run it:  python train.py                                     # MAPO on the embedded agent
         python train.py --algo grpo                         # the same without the semantic score
         torchrun --nproc-per-node 2 train.py                # two processes share the questions
         python train.py --help                              # every setting
"""
import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # waiting threads must not take the core that works

import argparse
import dataclasses
import functools
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
from lib import shard
from lib.data import DataError, Question, read_jsonl
from tiny.world import World, world_questions
from eval import differences, evaluate, record, summary, table, wilson
from lib.policy import Policy
from reward import Scorer, answerable, format_reward, measure, rewards, score
from rollout import Trajectory, collect
from show import film_strip, stack


@dataclass
class Config:
    """Every field is a command-line option of the same name; the metadata is its help."""
    model: str = dataclasses.field(default="tiny", metadata={"help": "model directory to start from (and the frozen encoder)"})
    out: str = dataclasses.field(default="", metadata={"help": "run directory; default runs/<algo>"})
    algo: str = dataclasses.field(default="mapo", metadata={"help": f"one of {', '.join(mapo.ALGORITHMS)}"})
    beta: float = dataclasses.field(default=-1., metadata={"help": "weight of the semantic score; default: the algorithm's"})
    lam: float = dataclasses.field(default=.95, metadata={"help": "discount of earlier looks in the trajectory's score"})
    credit: str = dataclasses.field(default="trajectory", metadata={"help": "what the score pays: trajectory, turn (looks from a turn on), or look (as turn, but an answer has the mean score of its group; for ppo the same as turn)"})
    describe: str = dataclasses.field(default="before", metadata={"help": "the words that are scored: before the look, or after (to see why not)"})
    format_weight: float = dataclasses.field(default=0., metadata={"help": "share of the outcome that pays valid format"})
    steps: int = dataclasses.field(default=50, metadata={"help": "batches of trajectories"})
    questions: int = dataclasses.field(default=16, metadata={"help": "questions a step"})
    group: int = dataclasses.field(default=8, metadata={"help": "trajectories a question"})
    max_turns: int = dataclasses.field(default=4, metadata={"help": "turns a trajectory; the last cannot look"})
    max_tokens: int = dataclasses.field(default=64, metadata={"help": "tokens a turn"})
    temperature: float = dataclasses.field(default=1., metadata={"help": "of sampling, and of the trained distribution (held-out questions: greedy and 1)"})
    lr: float = dataclasses.field(default=1.5e-4, metadata={"help": "peak learning rate; 5 steps of warm-up, then constant"})
    critic_lr: float = dataclasses.field(default=1e-2, metadata={"help": "of PPO's value head, a linear map of hidden states"})
    clip: float = dataclasses.field(default=1., metadata={"help": "scales the algorithm's clip range"})
    updates: int = dataclasses.field(default=2, metadata={"help": "optimiser steps on each batch of trajectories"})
    micro_tokens: int = dataclasses.field(default=2048, metadata={"help": "padded tokens a micro-batch"})
    grad_clip: float = dataclasses.field(default=1., metadata={"help": "largest gradient norm"})
    data: str = dataclasses.field(default="", metadata={"help": ".jsonl of training questions; default: the embedded world"})
    test: str = dataclasses.field(default="", metadata={"help": ".jsonl of held-out questions, with --data"})
    options: int = dataclasses.field(default=4, metadata={"help": "the world's luck: options of a mark question, 0 or 2 to 8"})
    eval_questions: int = dataclasses.field(default=400, metadata={"help": "held-out questions before and after"})
    save_every: int = dataclasses.field(default=10, metadata={"help": "steps between checkpoints"})
    seed: int = dataclasses.field(default=0, metadata={"help": "of questions and sampling"})
    device: str = dataclasses.field(default="cpu", metadata={"help": "cpu or cuda"})
    dtype: str = dataclasses.field(default="float32", metadata={"help": "of the weights, float32 or bfloat16; the optimiser is float32"})
    coordinates: str = dataclasses.field(default="", metadata={"help": "of boxes: pixels, or 1000 (thousandths); default: the model's, else pixels"})
    train_vision: bool = dataclasses.field(default=False, metadata={"help": "train the vision tower as well; frozen, images are encoded once"})
    recompute: bool = dataclasses.field(default=False, metadata={"help": "activation checkpointing: less memory, a third more time"})
    timeout: float = dataclasses.field(default=1800., metadata={"help": "seconds to wait for another rank before it is an error"})
    threads: int = dataclasses.field(default=1, metadata={"help": "CPU threads"})
    resume: bool = dataclasses.field(default=False, metadata={"help": "continue from the newest checkpoint in --out"})
    plan: bool = dataclasses.field(default=False, metadata={"help": "print what the run would cost (plan.py), and stop"})


def parse_config(arguments: list[str] | None = None) -> Config:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for f in dataclasses.fields(Config):
        kind = {"action": "store_true"} if f.type is bool else {"type": f.type}
        parser.add_argument(f"--{f.name}", default=f.default, help=f.metadata["help"], **kind)
    config = Config(**vars(parser.parse_args(arguments)))
    if config.algo not in mapo.ALGORITHMS:
        parser.error(f"--algo: expected one of {', '.join(mapo.ALGORITHMS)}, found {config.algo!r}")
    if config.describe not in ("before", "after"):
        parser.error(f"--describe: expected before or after, found {config.describe!r}")
    if config.dtype not in ("float32", "bfloat16"):
        parser.error(f"--dtype: expected float32 or bfloat16, found {config.dtype!r}")
    if config.coordinates not in ("", "pixels", "1000"):
        parser.error(f"--coordinates: expected pixels or 1000, found {config.coordinates!r}")
    if min(config.max_turns, config.max_tokens, config.save_every, config.threads) < 1 or config.temperature <= 0 or config.lr <= 0:
        parser.error("--max_turns, --max_tokens, --save_every, --threads must be at least 1, --temperature and --lr above 0")
    if config.beta > 1 or not 0 < config.lam <= 1 or config.credit not in ("trajectory", "turn", "look"):
        parser.error(f"expected --beta up to 1, --lam in (0, 1], --credit trajectory, turn or look; found {config.beta}, {config.lam}, {config.credit!r}")
    if config.test and not config.data:
        parser.error("--test: needs --data, the questions to train on")
    if config.group < 2 or config.questions < 1 or config.steps < 1 or config.updates < 1:
        parser.error("--group must be at least 2 (a group of one has no baseline); --questions, --steps, --updates at least 1")
    config.beta = mapo.ALGORITHMS[config.algo].beta if config.beta < 0 else config.beta
    config.out = config.out or f"runs/{config.algo}"
    if Path(config.out).resolve() in (Path(config.model).resolve(), *Path(config.model).resolve().parents):
        parser.error(f"--out: a new run clears its folder; expected one that does not hold --model {config.model}, found {config.out}")
    return config


# ---- one step --------------------------------------------------------------------------------------------------------

def draw(policy: Policy, scorer: Scorer, stream: "Questions", step: int, config: Config, row: mapo.Algorithm,
         generator: torch.Generator) -> tuple[list[Trajectory], list[Trajectory]]:
    """This rank's trajectories of a step, scored: those to learn from, and all that were sampled.

    Dynamic sampling (DAPO, arXiv 2503.14476, sec. 3.2): groups of equal returns are left out and others drawn in their
    place, `max_draws` times at most; if no group has a signal, the last ones are returned."""
    kept, sampled = [], []
    for number in range(row.max_draws):
        missing = config.questions // shard.world() - len(kept) // config.group
        part = collect(policy, stream(step, number)[shard.rank()::shard.world()][:missing], config.group, config.max_turns,
                       config.max_tokens, config.temperature, generator)
        score(part, scorer, config.describe)
        sampled += part
        signal = mapo.has_signal(mapo.coupled_return(*paid_for(part, config), config.beta, config.lam), config.group)
        kept += [t for i, t in enumerate(part) if row.max_draws == 1 or signal[i // config.group]]
        if len(kept) // config.group == config.questions // shard.world():
            break
    return kept or part, sampled


def paid_for(trajectories: list[Trajectory], config: Config) -> tuple[Tensor, Tensor, Tensor]:
    """reward.rewards, with the format's share in the outcomes."""
    r, s, looked = rewards(trajectories)
    form = torch.tensor([format_reward(t) for t in trajectories])
    return (1 - config.format_weight) * r + config.format_weight * form, s, looked


def advantages(policy: Policy, trajectories: list[Trajectory], config: Config,
               row: mapo.Algorithm) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """Advantage of each token (N, L - 1); column t speaks of token t + 1. With a critic also (old values, targets)."""
    r, s, looked = paid_for(trajectories, config)
    if row.overlong:
        limit = config.max_turns * config.max_tokens
        r = r + mapo.overlong_penalty(torch.tensor([sum(t.mask) for t in trajectories]), limit, round(row.overlong * limit))
    if not row.critic:
        return spread(mapo.advantages(r, s, looked, config.group, config.beta, config.lam, config.credit, row.std), trajectories), None
    mask = pad([t.mask for t in trajectories], False)
    values = torch.zeros(mask.shape)
    with torch.no_grad():
        for batch in micro_batches(trajectories, list(range(len(trajectories))), config.micro_tokens):
            part = own_logprobs(policy, [trajectories[i] for i in batch], config)[2]
            values[batch, :part.shape[1]] = part.cpu()
    advantage, target = mapo.gae(payments(trajectories, r, s, looked, config), values, mask)
    count, total, squares = (shard.all_sum(x.sum().item()) for x in (mask, advantage, advantage.square()))
    mean = total / count                                                          # PPO's code whitens them over the batch
    return (advantage - mean) / math.sqrt(max(squares / count - mean ** 2, 1e-12)), (values, target)


def payments(trajectories: list[Trajectory], r: Tensor, s: Tensor, looked: Tensor, config: Config) -> Tensor:
    """The return as rewards of tokens (N, L - 1), for GAE: all of it at the last token, or, with --credit turn or look, each look's
    share of S at the end of its turn. A trajectory's payments sum to its R."""
    longest = max(len(t.mask) for t in trajectories)
    paid = torch.zeros(len(trajectories), longest)
    weight = mapo.look_weights(looked, config.lam)
    shares = config.beta * s * weight / weight.sum(1, keepdim=True).clamp(min=1e-8)          # (N, T)
    for i, trajectory in enumerate(trajectories):
        ends = [turn.tokens.stop - 1 for turn in trajectory.turns]
        paid[i, ends[-1]] = (1 - config.beta) * r[i]
        for k, end in enumerate(ends):
            paid[i, ends[-1] if config.credit == "trajectory" else end] += shares[i, k]
    return paid[:, 1:]


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


def pad(rows: list[list], fill) -> Tensor:
    """Lists over tokens -> (N, L - 1), from the second token on."""
    longest = max(map(len, rows))
    return torch.tensor([row[1:] + [fill] * (longest - len(row)) for row in rows])


def own_logprobs(policy: Policy, trajectories: list[Trajectory], config: Config) -> tuple[Tensor, Tensor, Tensor]:
    return policy.logprobs([t.tokens for t in trajectories], [t.mask for t in trajectories], config.temperature,
                           prompts=[t.prompt for t in trajectories])


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


def accumulate(policy: Policy, optimisers: list[shard.ShardedAdamW], trajectories: list[Trajectory], advantage: Tensor,
               config: Config, row: mapo.Algorithm, critic: tuple[Tensor, Tensor] | None = None) -> dict[str, float | None]:
    """Gradient of the loss over all trajectories of all ranks, left in the optimisers. Returns statistics of the same sum (and
    micro_batches, this rank's number of them).

    advantage and the critic's (old values, targets): (N, L - 1). The weights of all tokens are fixed before the first
    backward, so the micro-batches' gradients simply add up, on any number of ranks. A trajectory with advantage 0
    everywhere has no gradient and is skipped (but counted)."""
    mask, old = pad([t.mask for t in trajectories], False), pad([t.logps for t in trajectories], 0.)
    count = float(mask.sum() if row.mean == "token" else len(mask))
    weight = mapo.token_weights(mask, row.mean) * (count / shard.all_sum(count))                     # (N, L - 1)
    low, high = config.clip * row.clip_low, config.clip * row.clip_high
    stats, shares, squares, logp_gap = {"loss": 0., "kl": 0., "clip_fraction": 0., "entropy": 0., "value_loss": 0.}, [], [], 0.
    for optimiser in optimisers:
        optimiser.zero_grad()
    rows = [i for i in range(len(trajectories)) if critic or (advantage[i] * mask[i]).any()]
    for half in (0, 1):                                                     # of the questions: `noise` compares one with both
        part = [i for i in rows if i // config.group % 2 == half]
        for batch in shard.even(micro_batches(trajectories, part, config.micro_tokens)):
            if batch is not None:
                logp, entropy, values = own_logprobs(policy, [trajectories[i] for i in batch], config)
                cut = lambda x: x[batch, :logp.shape[1]].to(policy.device)
                w = cut(weight)
                loss, more = mapo.loss(logp, cut(old), cut(advantage), w, low, high, row.ratio)
                if critic:
                    more["value_loss"] = mapo.value_loss(values, cut(critic[0]), cut(critic[1]), w)
                losses = [loss, *([more["value_loss"]] if critic else [])]  # two graphs: the value head reads detached states
                for key, value in {"loss": loss, "entropy": (w * entropy).sum(), **more}.items():
                    stats[key] += value.item()
                shares.append(w.sum().item())
                logp_gap = max(logp_gap, (logp - cut(old)).abs()[w > 0].max().item())
            for number, optimiser in enumerate(optimisers):                 # in one order on all ranks, also on one without a batch
                if batch is not None:
                    losses[number].backward()
                optimiser.finish_micro_batch()
        squares.append(optimisers[0].norm() ** 2)
    stats = {key: shard.all_sum(value) for key, value in stats.items()}
    learnt = max(shard.all_sum(sum(shares)), 1e-8)
    stats |= {key: stats[key] / learnt for key in ("entropy", "kl", "clip_fraction")}       # means over what was learnt from
    stats |= {"logp_gap": shard.all_sum(logp_gap, "MAX"), "grad_norm": squares[1] ** .5, "micro_batches": len(shares)}
    first = sum(i // config.group % 2 == 0 for i in range(len(trajectories)))
    return stats | noise(*squares, shard.all_sum(first) / shard.all_sum(len(trajectories)))


def noise(part: float, whole: float, share: float) -> dict[str, float | None]:
    """How noisy the gradient is, from two numbers that accumulation passes anyway: |gradient|^2 of a `share` p of the questions,
    and of all of them. Questions are drawn at random, so with a signal |G|^2 and a noise tr(Sigma) of the whole batch

        E part = p^2 |G|^2 + p tr(Sigma),   E whole = |G|^2 + tr(Sigma)                     (two equations, two unknowns)

    (McCandlish et al. 2018, arXiv 1812.06162, app. A.1; by questions, because trajectories of a group share their mean, and
    micro-batches, sorted by length, are no random parts). Returns grad_signal and grad_trace, unbiased estimates of |G|^2 and
    tr(Sigma), each alone may be negative; and grad_noise = grad_trace / whole. None where there is only one part."""
    if not 0 < share < 1 or whole == 0:
        return {"grad_signal": None, "grad_trace": None, "grad_noise": None}
    trace = (part / share ** 2 - whole) / (1 / share - 1)
    return {"grad_signal": whole - trace, "grad_trace": trace, "grad_noise": trace / whole}


# ---- questions -------------------------------------------------------------------------------------------------------

class Questions:
    """The training stream: question `i` is the same in every run with the same seed, so runs can be compared in pairs."""

    def __init__(self, config: Config):
        self.config, self.file = config, answerable(list(read_jsonl(config.data))) if config.data else []
        if config.data and not self.file:
            raise DataError(f"{config.data}: holds no questions")

    def __call__(self, step: int, number: int = 0) -> list[Question]:
        """The questions of a step, of all ranks; `number` counts further draws for the same step."""
        c = self.config
        start = step * c.questions + number * 10**7
        if not self.file:
            return world_questions(World(options=c.options), c.seed, "train", start, c.questions)
        places = [divmod(i, len(self.file)) for i in range(start, start + c.questions)]
        return [self.file[self.order(epoch)[place]] for epoch, place in places]

    @functools.lru_cache(maxsize=2)
    def order(self, epoch: int) -> list[int]:
        return torch.randperm(len(self.file), generator=torch.Generator().manual_seed(self.config.seed * 1_000_003 + epoch)).tolist()


def held_out(config: Config) -> list[Question]:
    if config.data:
        return answerable(list(read_jsonl(config.test))[:config.eval_questions]) if config.test else []
    return world_questions(World(options=config.options), 0, "test", 0, config.eval_questions)


# ---- checkpoints -----------------------------------------------------------------------------------------------------

def save_checkpoint(policy: Policy, optimisers: list[shard.ShardedAdamW], generator: torch.Generator, step: int, config: Config) -> None:
    """runs/x/step-000050: a model directory, and of each rank its part of the optimisers and its random state; written
    aside and renamed, then the older one goes."""
    out = Path(config.out)
    folder, aside = out / f"step-{step:06}", out / "saving"
    with shard.together():
        if shard.rank() == 0:
            shutil.rmtree(aside, ignore_errors=True)
            policy.save(aside)
            note_start(aside, config)
            for number in range(len(optimisers)):
                (aside / f"optimiser-{number}").mkdir()
    for number, optimiser in enumerate(optimisers):
        optimiser.save(aside / f"optimiser-{number}")
    with shard.together():
        torch.save({"step": step, "generator": generator.get_state(), "config": dataclasses.asdict(config)},
                   aside / f"state-{shard.rank()}.pt")
    with shard.together():
        if shard.rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
            aside.rename(folder)
            for old in checkpoints(out):
                if old != folder:
                    shutil.rmtree(old)


def checkpoints(out: str | Path) -> list[Path]:
    return [p for p in Path(out).glob("step-*") if (p / "state-0.pt").is_file()]


def check_settings(folder: Path, config: Config) -> None:
    """Raises ValueError if the checkpoint's run had other settings: what goes on would be neither run."""
    before = torch.load(folder / "state-0.pt", weights_only=True)["config"]
    free = {"steps", "out", "resume", "save_every", "eval_questions", "test", "device", "threads", "timeout", "recompute", "micro_tokens"}
    now = {key: value for key, value in dataclasses.asdict(config).items() if key in before and key not in free}
    if changed := differences({f"--{key}": before[key] for key in now}, {f"--{key}": value for key, value in now.items()}):
        raise ValueError(f"{folder}: --resume expected the same settings, found {changed}")


def load_checkpoint(folder: Path, optimisers: list[shard.ShardedAdamW], generator: torch.Generator) -> int:
    """Everything but the model directory; returns the steps done. A rank that was not there has a fresh random state."""
    for number, optimiser in enumerate(optimisers):
        optimiser.load(folder / f"optimiser-{number}")
    with shard.together():
        state = torch.load(folder / "state-0.pt", weights_only=True)
        if (mine := folder / f"state-{shard.rank()}.pt").is_file():
            saved = torch.load(mine, weights_only=True)["generator"]
            if len(saved) == len(generator.get_state()):  # a CPU's state does not fit CUDA's generator
                generator.set_state(saved)
    return state["step"]


def note_start(folder: Path, config: Config) -> None:
    """train.json: the settings, and with them the frozen model that eval.py shall score with, from any working directory."""
    (folder / "train.json").write_text(json.dumps(dataclasses.asdict(config) | {"model": str(Path(config.model).resolve())}, indent=1))


def publish(policy: Policy, config: Config) -> None:
    """The final model at the top of the run directory, file by file, with a note on where it came from."""
    aside = Path(config.out) / "saving"
    shutil.rmtree(aside, ignore_errors=True)
    policy.save(aside)
    note_start(aside, config)
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
    if metrics["signal_groups"] > 0 and metrics["entropy"] < .005:
        return "the policy is nearly deterministic (entropy below 0.005): nothing is left to learn from"
    if metrics["valid"] < .5:
        return "most turns are malformed: lower --lr"
    return ""


def train(config: Config) -> dict:
    """Run the whole training; returns the last step's metrics."""
    torch.set_num_threads(config.threads)
    device = shard.setup(config.device, config.timeout)
    out, row, main = Path(config.out), mapo.ALGORITHMS[config.algo], shard.rank() == 0
    with shard.together():
        if config.questions % shard.world():
            raise ValueError(f"--questions: expected a multiple of {shard.world()} ranks, found {config.questions}")
        checkpoint = max(checkpoints(config.out), default=None) if config.resume else None
        if config.resume and not checkpoint:
            raise FileNotFoundError(f"--resume: no checkpoint in {config.out}; expected {config.out}/step-*/state-0.pt")
        if checkpoint:
            check_settings(checkpoint, config)
        stream, tests = Questions(config), held_out(config)
        dtype = getattr(torch, config.dtype)
        base, policy = (Policy(path, device, dtype, config.coordinates) for path in (config.model, checkpoint or config.model))
        scorer = Scorer(base, stream.file[:64] or None, own_eyes=config.train_vision)
        parameters = policy.learners(config.train_vision)
        if config.recompute:
            policy.recompute_layers()
        if row.critic:
            policy.add_value_head()
        out.mkdir(parents=True, exist_ok=True)
    optimisers = [shard.ShardedAdamW(parameters)]
    if row.critic:
        optimisers.append(shard.ShardedAdamW(list(policy.value_head.parameters())))
    rates = [config.lr, config.critic_lr][:len(optimisers)]
    generator = torch.Generator(policy.device).manual_seed(config.seed + 1_000_003 * shard.rank())
    first = load_checkpoint(checkpoint, optimisers, generator) if checkpoint else 0
    with shard.together():
        if main and checkpoint:
            keep_lines(out / "metrics.jsonl", first)
            keep_lines(out / "trajectories.jsonl", first)
        elif main:  # everything has loaded: only now may the old run's lines and checkpoints go
            for old in [*checkpoints(out), *(out / name for name in ("metrics.jsonl", "trajectories.jsonl", "results.json", "films.png"))]:
                shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)

    def judge(p: Policy) -> dict[str, list[Trajectory]]:  # of this rank's part of the held-out questions
        with shard.together():
            return {name: evaluate(p, tests[shard.rank()::shard.world()], scorer, heat, 0, config.max_turns, config.max_tokens,
                                   quiet=not (main and sys.stderr.isatty()))
                    for name, heat in (("greedy", 0.), ("sampled", 1.))}

    before, metrics = judge(base) if tests else {}, {}
    bar = tqdm(range(first, config.steps), initial=first, total=config.steps, desc=config.algo, dynamic_ncols=True, disable=not main)
    for step in bar:
        start = time.time()
        with shard.together():
            trajectories, sampled = draw(policy, scorer, stream, step, config, row, generator)
        rolled = time.time()
        advantage, critic = advantages(policy, trajectories, config, row)
        lr = config.lr * min(1, (step + 1) / 5)
        for number in range(config.updates):
            stats = accumulate(policy, optimisers, trajectories, advantage, config, row, critic)
            if number == 0:
                logp_gap = stats["logp_gap"]
            if math.isfinite(stats["grad_norm"]):
                for optimiser, rate, norm in zip(optimisers, rates, (stats["grad_norm"], None)):
                    optimiser.clip(config.grad_clip, norm)
                    changed = optimiser.step(rate * lr / config.lr)
                    stats.setdefault("changed", changed)
        seconds = time.time() - start
        signal = mapo.has_signal(mapo.coupled_return(*paid_for(sampled, config), config.beta, config.lam), config.group).tolist()
        metrics = {"step": step + 1, **measure(sampled, shard.all_sum),
                   "signal_groups": shard.all_sum(sum(signal)) / shard.all_sum(len(signal)), "sampled": shard.all_sum(len(sampled)),
                   **stats, "logp_gap": logp_gap, "lr": lr, "tokens_per_s": shard.all_sum(sum(len(t.mask) for t in sampled)) / seconds,
                   "rollout_seconds": rolled - start, "seconds": seconds, "peak_mb": peak_mb(device)}
        if main:
            append(out / "metrics.jsonl", [metrics])
            append(out / "trajectories.jsonl", [{"step": step + 1, "advantage": turn_advantages(advantage[i], trajectories[i]),
                                                 **record(trajectories[i])} for i in (0, 1, config.group) if i < len(trajectories)])
            bar.set_postfix_str("  ".join(f"{k} {metrics[k]:.2f}" for k in ("accuracy", "calls", "hit", "gap", "semantic")
                                          if metrics[k] is not None))
            if trouble := collapse(metrics):
                tqdm.write(f"step {step + 1}: collapse: {trouble}")
        del trajectories, sampled, advantage, critic  # their features must not lie beside the next step's
        if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
            save_checkpoint(policy, optimisers, generator, step + 1, config)
    with shard.together():
        if main:
            publish(policy, config)
    if tests:
        report(before, judge(policy), tests, config)
    return metrics


def turn_advantages(advantage: Tensor, trajectory: Trajectory) -> list[float]:
    """Of each turn, at its last token."""
    return [round(advantage[turn.tokens.stop - 2].item(), 4) for turn in trajectory.turns]


def report(before: dict, after: dict, tests: list[Question], config: Config) -> None:
    """The before/after table over all ranks, its numbers in results.json, and film strips of the same questions."""
    out, results = Path(config.out), {}
    for name in before:
        for moment, runs in (("before", before), ("after", after)):
            rows = summary(runs[name], tests, shard.all_sum)
            m = rows["all"]
            results[f"{moment} {name}"] = {**m, "interval": wilson(m["accuracy"] * m["n"], m["n"]), "categories": rows}
            if shard.rank() == 0:
                print(f"\n{moment} training, {name}\n{table(rows)}")
    if shard.rank() > 0:
        return
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
        kept = [line for line in file.read_text(encoding="utf-8").splitlines() if step_of(line) <= steps]
        file.write_text("".join(line + "\n" for line in kept), encoding="utf-8")


def step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except ValueError:  # torn by the kill
        return math.inf


def peak_mb(device: str) -> float:
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


if __name__ == "__main__":
    started = time.time()
    try:
        config = parse_config()
        if config.plan:
            import plan
            plan.show(config)
        else:
            train(config)
    except (DataError, OSError, ValueError, shard.RankFailed) as error:
        sys.exit(f"train.py: {shard.named(error)}")
    finally:
        main_rank = shard.rank() == 0
        shard.cleanup()
    if main_rank:
        print(f"{time.time() - started:.0f} s")
