"""PPO's own parts: a value head, GAE and the value loss. MAPO's readers may skip this file.

What it teaches: where the group's mean is GRPO's baseline, PPO (arXiv 1707.06347) learns one. V is
a linear map of the hidden state from which the policy chooses its next token. It reads the policy's
states without gradient, so it never disturbs the policy. The steps are the agent's own tokens; what
the environment writes is no step.

    delta_j = reward_j + gamma V_(j+1) - V_j
    A_j = delta_j + gamma gae_lam A_(j+1),   target_j = A_j + V_j                (11)
    L_V = 1/2 sum w max((V - target)^2, (V_near - target)^2)                     (12)
          V_near = V_old + clip(V - V_old, -c, c)

Eq. 11: generalised advantage estimation (arXiv 1506.02438); after the last token V is 0.
Eq. 12: PPO's paper has the plain square. The clip keeps V near V_old; it comes from their code.

Run it:  python -m lib.critic           # the advantages of one trajectory for three gae_lam
"""
import math

import torch
from torch import Tensor, nn

import mapo
from lib import shard
from lib.batches import micro_batches, pad
from lib.policy import Policy


@torch.no_grad()
def gae(reward: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.,
        gae_lam: float = .95) -> tuple[Tensor, Tensor]:
    """Eq. 11, all (N, L). mask: the agent's tokens; reward: 0 off the mask; values: V of the state
    in which token j is chosen. Returns advantage and target, 0 off the mask."""
    own = mask.bool()
    advantage = torch.zeros_like(values)
    next_value = torch.zeros(len(values))
    next_advantage = torch.zeros(len(values))
    for j in reversed(range(values.shape[1])):
        delta = reward[:, j] + gamma * next_value - values[:, j]
        here = delta + gamma * gae_lam * next_advantage
        # off the mask both are passed on: the agent's next token is what counts
        next_advantage = torch.where(own[:, j], here, next_advantage)
        next_value = torch.where(own[:, j], values[:, j], next_value)
        advantage[:, j] = next_advantage
    return torch.where(own, advantage, 0.), torch.where(own, advantage + values, 0.)


def value_loss(values: Tensor, old_values: Tensor, target: Tensor, weight: Tensor,
               clip: float = .2) -> Tensor:
    """Eq. 12: all (B, L), weight as in eq. 4 -> scalar."""
    near = old_values + (values - old_values).clamp(-clip, clip)
    worse = torch.maximum((values - target).square(), (near - target).square())
    return .5 * (weight * worse).sum()


def payments(trajectories: list, r: Tensor, s: Tensor, looked: Tensor, beta: float, lam: float,
             credit: str) -> Tensor:
    """The return R as rewards of tokens (N, L - 1). A trajectory's payments sum to its R (eq. 2).

    credit "trajectory": all at the last token. Else each look's share of S at its turn's end;
    "look" and "aim" are one here: there is no group to compare a look with."""
    paid = torch.zeros(len(trajectories), max(len(t.mask) for t in trajectories))
    weight = mapo.look_weights(looked, lam)
    shares = beta * s * weight / weight.sum(1, keepdim=True).clamp(min=1e-8)     # (N, T)
    for i, trajectory in enumerate(trajectories):
        last = trajectory.turns[-1].span.stop - 1
        paid[i, last] = (1 - beta) * r[i]
        for k, turn in enumerate(trajectory.turns):
            paid[i, last if credit == "trajectory" else turn.span.stop - 1] += shares[i, k]
    return paid[:, 1:]


class Critic:
    """The value head, its optimiser, and what it knows of the present batch."""

    def __init__(self, policy: Policy):
        width = policy.model.get_input_embeddings().embedding_dim
        self.policy, self.head = policy, nn.Linear(width, 1, device=policy.device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.optimiser = shard.ShardedAdamW(list(self.head.parameters()))

    def values(self, states: Tensor, own: Tensor) -> Tensor:
        """states (n, D) of the n agent tokens in own (B, L - 1) -> V (B, L - 1), 0 elsewhere."""
        zeros = torch.zeros(own.shape, device=states.device)
        return zeros.masked_scatter(own, self.head(states)[:, 0])

    @torch.no_grad()
    def advantages(self, trajectories: list, reward: Tensor, micro_tokens: int) -> Tensor:
        """Advantages (N, L - 1) of rewards (N, L - 1) by GAE, then whitened (mean 0, std 1) over
        the batch as PPO's released code does. Keeps states, values and targets for `update`."""
        mask = pad([t.mask for t in trajectories], False)
        self.batches, self.old = [], torch.zeros(mask.shape)
        for rows in micro_batches(trajectories, list(range(len(trajectories))), micro_tokens):
            part = [trajectories[i] for i in rows]
            states, own = self.policy.own_states([t.tokens for t in part], [t.mask for t in part],
                                                 [t.prompt for t in part])
            states = states.float()
            self.batches.append((rows, states, own))
            self.old[rows, :own.shape[1]] = self.values(states, own).cpu()
        advantage, self.target = gae(reward, self.old, mask)
        count = shard.all_sum(mask.sum().item())
        mean = shard.all_sum(advantage.sum().item()) / count
        square = shard.all_sum(advantage.square().sum().item()) / count
        return (advantage - mean) / math.sqrt(max(square - mean ** 2, 1e-12))

    def update(self, weight: Tensor, lr: float, grad_clip: float) -> float:
        """One step of eq. 12 on the batch's states; weight (N, L - 1) as in eq. 4. The policy may
        have moved since: its states are those of the rollout. Returns the loss of all ranks."""
        total = 0.
        self.optimiser.zero_grad()
        for batch in shard.even(self.batches):
            if batch is not None:
                rows, states, own = batch
                values = self.values(states, own)
                old, target, w = (x[rows, :own.shape[1]].to(states.device)
                                  for x in (self.old, self.target, weight))
                loss = value_loss(values, old, target, w)
                loss.backward()
                total += loss.item()
            self.optimiser.finish_micro_batch()
        if math.isfinite(self.optimiser.clip(grad_clip)):
            self.optimiser.step(lr)
        return shard.all_sum(total)


if __name__ == "__main__":
    mask = torch.tensor([[1, 1, 0, 0, 1, 1]])
    values, reward = torch.tensor([[.4, .4, 0, 0, .7, .9]]), torch.tensor([[0, 0, 0, 0, 0, 1.]])
    print("agent's tokens ", mask.tolist()[0])
    print("values          " + " ".join(f"{value:5.2f}" for value in values.tolist()[0]))
    for gae_lam in (0., .95, 1.):
        advantage = gae(reward, values, mask, gae_lam=gae_lam)[0][0]
        print(f"gae_lam {gae_lam:4}: A = " + " ".join(f"{a:5.2f}" for a in advantage.tolist()))
