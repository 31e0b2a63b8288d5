"""Our functions beside the field's own code: verl, TRL, VLMEvalKit, lmms-eval, transformers.

What it teaches: whether a number from here means the same as a number from there. Each function
below gives the same inputs to our code and to theirs. What differs by a constant factor alone is
multiplied by it first. TRL's group advantage is one line inside a long function: it is written
down here again.

Run it in an environment of its own (on the CPU; two minutes to install, 12 s to run):

    pip install torch==2.13.0 transformers==5.23.0 pillow numpy tqdm trl==1.16.0
    pip install --no-deps verl==0.9.1 ms-vlmeval==0.0.20 lmms-eval==0.7.3
    pip install ray tensordict codetiming hydra-core pandas loguru orjson requests
    python docs/references.py

pip complains: they want more packages, and verl an older transformers. What is used here works.
"""
import random
import sys
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import torch
from PIL import Image
from torch import Tensor

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import mapo
from lib import critic
from lib.policy import Policy, mrope_positions
from scoring import compare
from tools import Resolution, fit


def row(what: str, whose: str, ours: Tensor, theirs: Tensor, why="", factor=1.) -> list[str]:
    """What, whose, factor, largest difference, why."""
    difference = (ours - factor * theirs).abs().max().item()
    why = why or ("rounding" if difference < 1e-5 else "NOT EXPLAINED")
    return [what, whose, f"{factor:.3f}", f"{difference:.1e}", why]


def count(what: str, whose: str, ours: list, theirs: list, why: str) -> list[str]:
    different = sum(a != b for a, b in zip(ours, theirs, strict=True))
    why = why or "NOT EXPLAINED" if different else "the same"
    return [what, whose, "", f"{different} of {len(ours)}", why]


# ---- losses --------------------------------------------------------------------------------------

def batch() -> SimpleNamespace:
    """8 trajectories of 12 tokens, some of them the tool's; the policy has moved since. Advantages:
    one for a trajectory, and each token its own."""
    generator = torch.Generator().manual_seed(0)
    old = -3 * torch.rand(8, 12, generator=generator)
    logp = old + .4 * torch.randn(8, 12, generator=generator)
    mask = torch.rand(8, 12, generator=generator) > .3
    mask[:, 0] = True
    one = torch.randn(8, 1, generator=generator).expand(8, 12)
    each = torch.randn(8, 12, generator=generator)
    return SimpleNamespace(old=old, logp=logp, mask=mask, one=one, each=each)


def value_and_slope(loss, logp: Tensor) -> Tensor:
    """The loss of log-probs (B, L) and its gradient, in one row of 1 + B L numbers."""
    logp = logp.clone().requires_grad_()
    value = loss(logp)
    slope, = torch.autograd.grad(value, logp)
    return torch.cat([value.detach()[None], slope.flatten()])


def our_loss(x, advantage: Tensor, mean: str, low=.2, high=.2, ratio="token") -> Tensor:
    weight = mapo.token_weights(x.mask, mean)
    return value_and_slope(
        lambda logp: mapo.loss(logp, x.old, advantage, weight, low, high, ratio)[0], x.logp)


def verl_loss(x, advantage, mean: str, low=.2, high=.2, name="vanilla", dual=1e9) -> Tensor:
    from verl.trainer.ppo.core_algos import get_policy_loss_fn
    from verl.workers.config import ActorConfig
    config = ActorConfig(strategy="fsdp", ppo_micro_batch_size_per_gpu=1, rollout_n=1,
                         clip_ratio_low=low, clip_ratio_high=high, clip_ratio_c=dual)
    loss, own = get_policy_loss_fn(name), x.mask.float()
    return value_and_slope(
        lambda logp: loss(x.old, logp, advantage, own, mean, config)[0], x.logp)


def trl_loss(x, advantage: Tensor, kind: str, low=.2, high=.2, level="token", beta=0.) -> Tensor:
    """GRPOTrainer's own loss; only the model's forward pass is a stand-in. beta weighs its KL."""
    from trl import GRPOTrainer
    trainer = MagicMock(
        loss_type=kind, importance_sampling_level=level, epsilon_low=low, epsilon_high=high,
        beta=beta, top_entropy_quantile=1., off_policy_mask_threshold=None, use_vllm=False,
        aux_loss_enabled=False, _entropy_bonus_enabled=False, max_completion_length=12,
        current_gradient_accumulation_steps=1, _metrics=defaultdict(lambda: defaultdict(list)))
    trainer.args.configure_mock(delta=None, steps_per_generation=1, use_bias_correction_kl=False)
    trainer.accelerator.configure_mock(num_processes=1, gather=lambda x: x,
                                       reduce=lambda x, reduction: x)
    none, own = torch.zeros(8, 0, dtype=torch.long), x.mask.long()
    inputs = {"prompt_ids": none, "prompt_mask": none, "completion_ids": own,
              "completion_mask": own, "advantages": advantage, "old_per_token_logps": x.old,
              "ref_per_token_logps": x.old, "num_items_in_batch": own.sum()}

    def loss(logp: Tensor) -> Tensor:
        forward = trainer._get_per_token_logps_and_entropies
        forward.return_value = logp, torch.zeros_like(logp), None
        return GRPOTrainer._compute_loss(trainer, trainer.model, inputs)

    return value_and_slope(loss, x.logp)


def token_losses():
    x = batch()
    for mean, verl, trl in (("trajectory", "seq-mean-token-mean", "grpo"),
                            ("token", "token-mean", "dapo")):
        ours, what = our_loss(x, x.each, mean, high=.28), f"clipped loss, slope; mean by {mean}"
        yield row(what, "verl", ours, verl_loss(x, x.each, verl, high=.28))
        yield row(what, "TRL", ours, trl_loss(x, x.each, trl, high=.28))
    ours, trl = our_loss(x, x.one, "token"), trl_loss(x, x.one, "dr_grpo")
    yield row("Dr. GRPO's loss, slope", "TRL", ours, trl, "TRL divides by the limit of tokens, we "
              "by the tokens there are", 1 / x.mask.float().mean())
    x.logp, x.one = x.old + 2, -x.one.abs()
    verl = verl_loss(x, x.one, "token-mean", dual=3.)
    yield row("loss, slope; A < 0, ratio 7.4", "verl", our_loss(x, x.one, "token"), verl,
              "verl's dual clip ends at ratio 3; we have none, as TRL by default")


def sequence_losses():
    x, clip = batch(), (3e-4, 4e-4)
    x.logp = x.old + .001 * (x.logp - x.old)     # the clip stops some sequences, not all
    for what, advantage, why in (("GSPO's loss, slope", x.one, ""),
                                 ("GSPO-token's loss, slope", x.each,
                                  "TRL has GSPO only: one slope for all tokens of a sequence")):
        ours = our_loss(x, advantage, "trajectory", *clip, ratio="sequence")
        verl = verl_loss(x, advantage, "seq-mean-token-mean", *clip, name="gspo")
        yield row(what, "verl", ours, verl)
        yield row(what, "TRL", ours, trl_loss(x, advantage, "grpo", *clip, "sequence"), why)


def divergence():
    from verl.trainer.ppo.core_algos import agg_loss, kl_penalty
    x, what = batch(), "k3 estimate of KL(old, new)"
    ours = mapo.loss(x.logp, x.old, x.one, mapo.token_weights(x.mask, "token"))[1]["kl"]
    verl = agg_loss(kl_penalty(x.old, x.logp, "k3"), x.mask.float(), "token-mean")
    yield row(what, "verl", ours, verl)
    x.old, x.logp = x.logp, x.old                # TRL's is KL(new, reference)
    yield row(what, "TRL", ours, trl_loss(x, torch.zeros(8, 12), "dapo", beta=1.)[0])


# ---- what goes into the loss ---------------------------------------------------------------------

def group_advantages():
    from trl.trainer.utils import nanstd
    from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage as verl
    r, none = torch.rand(32, generator=torch.Generator().manual_seed(1)), torch.zeros(32, 1)
    groups, factor = torch.arange(4).repeat_interleave(8).numpy(), (8 / 7) ** .5
    ours = mapo.advantages(r, none, none.bool(), 8, 0.)
    theirs = verl(r[:, None].clone(), none + 1, groups)[0][:, 0]
    yield row("group advantages", "verl", ours, theirs, "verl divides by n - 1, we by n", factor)
    trl = (r.view(4, 8) - r.view(4, 8).mean(1, True)) / (nanstd(r.view(4, 8), 1, True) + 1e-4)
    yield row("group advantages", "TRL's line", ours, trl.flatten(),
              "by n - 1, and TRL adds 1e-4 to std, we and verl 1e-6", factor)
    ours = mapo.advantages(r, none, none.bool(), 8, 0., std=False)
    theirs = verl(r[:, None].clone(), none + 1, groups, norm_adv_by_std_in_grpo=False)[0][:, 0]
    yield row("Dr. GRPO's advantages", "verl", ours, theirs)


def overlong():
    from trl.rewards import get_soft_overlong_punishment
    trl = get_soft_overlong_punishment(100, 20)([[0] * n for n in range(1, 101)])
    ours = mapo.overlong_penalty(torch.arange(1, 101), 100, 20)
    yield row("DAPO's penalty for length", "TRL", ours, torch.tensor(trl))


def critics():
    from verl.trainer.ppo.core_algos import compute_gae_advantage_return, compute_value_loss
    x = batch()
    reward, V, own = x.each * x.mask, x.old, x.mask.float()
    advantage, target = critic.gae(reward, V, x.mask, gamma=.99, gae_lam=.9)
    white, returns = compute_gae_advantage_return(reward, V, own, .99, .9)
    yield row("GAE", "verl", advantage, (returns - V) * own)
    ours = (advantage - advantage[x.mask].mean()) / advantage[x.mask].std(correction=0)
    yield row(".. whitened", "verl", ours * own, white * own, "verl divides by n - 1, we by n",
              (own.sum() / (own.sum() - 1)) ** .5)
    ours = critic.value_loss(x.logp, V, target, mapo.token_weights(x.mask, "token"))
    verl = compute_value_loss(x.logp, target, V, own, .2)[0]
    yield row("clipped value loss", "verl", ours, verl)


# ---- the model -----------------------------------------------------------------------------------

@torch.no_grad()
def conversation():
    """Two pictures and two turns: our forward pass from Tokens, transformers' from ids, pixels."""
    from verl.utils.torch_functional import entropy_from_logits, logprobs_from_logits
    policy = Policy(ROOT / "tiny")
    grey = Image.linear_gradient("L").convert("RGB")
    pictures = [fit(grey.resize(size), policy.resolution) for size in ((300, 200), (90, 140))]
    first, second = policy.encode_images(pictures)
    whole = policy.prompt(first, "Which?") + policy.tokens("<think>the red one")
    whole = whole + policy.observation(second) + policy.tokens("<answer>B</answer>")
    mask = [i != policy.image_id for i in whole.ids]
    logp, entropy = policy.logprobs([whole], [mask], temperature=.7)
    ids, own = torch.tensor([whole.ids]), torch.tensor([mask[1:]])
    pixels = policy.processor(images=pictures, do_resize=False, return_tensors="pt")
    kinds = (ids == policy.image_id).int()
    logits = policy.model(input_ids=ids, mm_token_type_ids=kinds, **pixels).logits[:, :-1] / .7
    logits[..., policy.banned] = -1e30           # ours bans the placeholders of images
    theirs = logprobs_from_logits(logits, ids[:, 1:])
    yield row("log-probs of tokens", "transformers, verl", logp, own * theirs)
    theirs = entropy_from_logits(logits)
    yield row("entropy", "transformers, verl", entropy, own * theirs)
    ours, _ = mrope_positions(whole.ids, whole.grids, policy.image_id)
    theirs, _ = policy.model.model.get_rope_index(ids, kinds, pixels["image_grid_thw"])
    yield row("M-RoPE positions", "transformers", torch.tensor(ours), theirs[:, 0].T)


def sizes():
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
    images = [random.Random(i).choices(range(28, 4000), k=2) for i in range(2000)]
    for most in (12_845_056, 1_003_520):
        ours = [Resolution(28, 3136, most).size(w, h) for w, h in images]
        qwen = [smart_resize(h, w, 28, 3136, most)[::-1] for w, h in images]
        yield count(f"image sizes, max_pixels {most:,}", "transformers", ours, qwen,
                    "beyond the bounds Qwen's always rounds down, ours may not")


# ---- answers, and the table ----------------------------------------------------------------------

def answers():
    for what, whose, ours, theirs, why in compare():
        yield count(f"answers, {what}", whose, ours, theirs, why)


def main() -> None:
    packages = ("torch", "transformers", "verl", "trl", "ms-vlmeval", "lmms-eval")
    print(", ".join(f"{name} {version(name)}" for name in packages), "\n")
    print("| what | whose | factor | largest difference | why |\n|---|---|---|---|---|")
    for comparison in (group_advantages, token_losses, sequence_losses, divergence, overlong,
                       critics, conversation, sizes, answers):
        for cells in comparison():
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
