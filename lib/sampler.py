"""The sampler: a batch of conversations that grow token by token, over several turns.

What it teaches: sampling from a language model is one loop. For each token:

    1. the distribution over the next token, from the newest hidden state (policy.log_softmax)
    2. draw from it
    3. does the turn end here?
    4. feed the token to the model, which gives the next hidden state

The model does not read a conversation again for each token: a cache holds the keys and values of
what it has read. A question's prompt is read once, and its row is repeated for the whole group of
conversations that begin with it. All rows stay in the batch until the last one ends its turn.

The trainer computes the log-probabilities of the sampled tokens again (policy.logprobs): the same
within 1e-4 in float32.

Run it:  python -m lib.sampler      # four conversations of two turns, sampled and recomputed
"""
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from transformers.cache_utils import DynamicCache

from lib.policy import Policy, Tokens, last_state
from tools import fit


class Session:
    """Conversations in one cache, a row each.

    Whatever is fed appends columns to the cache, for all rows. Where a row has less to say than
    others, its columns are padding, and `mask` (B, P) hides them from all later tokens. Each row
    counts its own positions, so these holes change nothing."""

    def __init__(self, policy: Policy, prompts: list[Tokens], group: int = 1):
        """Read each prompt once, then repeat its row: [q0, q0, .., q1, q1, ..]."""
        self.policy = policy
        self.cache, self.mask = DynamicCache(), None
        self.next = [0] * len(prompts)      # each row's next free position
        self.append(prompts)
        if group > 1:
            self.keep([row for row in range(len(prompts)) for _ in range(group)])

    @torch.no_grad()
    def sample(self, max_tokens: int, temperature: float = 1.0,
               generator: torch.Generator | None = None
               ) -> tuple[list[list[int]], list[list[float]]]:
        """One turn of every row: token ids, and their log-probabilities.

        temperature 0 takes the most likely token. A turn has at most max_tokens."""
        ids = [[] for _ in self.next]
        logps = [[] for _ in self.next]
        talking = [True] * len(self.next)
        for _ in range(max_tokens):
            logp = self.policy.log_softmax(self.last, temperature or 1.0)  # (B, V)
            token = logp.argmax(-1) if temperature == 0 else draw(logp, generator)  # (B,)
            chosen = logp.gather(-1, token[:, None])[:, 0]  # (B,)
            if not chosen.isfinite().all():
                raise ValueError("the model's probabilities are not finite: its weights are too "
                                 "large; lower --lr, or take an earlier checkpoint")
            fed = [Tokens([]) for _ in self.next]
            for row, (i, value) in enumerate(zip(token.tolist(), chosen.tolist())):
                if talking[row]:
                    ids[row].append(i)
                    logps[row].append(value)
                    fed[row] = Tokens([i])
                    talking[row] = not ends_turn(ids[row], self.policy)
            self.append(fed)
            if not any(talking):
                break
        return ids, logps

    @torch.no_grad()
    def append(self, batch: list[Tokens]) -> None:
        """Feed tokens to each row (to a row that is silent, none): sampled ones, an observation.
        `last` (B, D) are the hidden states after them; a silent row's is never used."""
        states, self.mask, self.next = self.policy.hidden(batch, self.next, self.mask, self.cache)
        self.last = last_state(states, batch)

    def keep(self, rows: list[int]) -> None:
        """Keep (and reorder, or repeat) these rows. The others leave the batch, and its cost."""
        index = torch.tensor(rows, device=self.policy.device)
        self.cache.batch_select_indices(index)
        self.mask, self.last = self.mask[index], self.last[index]
        self.next = [self.next[row] for row in rows]


def draw(logp: Tensor, generator: torch.Generator | None) -> Tensor:
    """(B, V) -> a token of each row (B,), by inverting its distribution function.

    One random number a row. torch.multinomial draws B x V: for 128 rows of 542 words it takes
    1.1 ms, this 0.1. u > 0, so that a token of probability 0 never comes."""
    cdf = logp.exp().cumsum(-1, dtype=torch.float64)
    u = 1 - torch.rand(len(logp), 1, generator=generator, dtype=torch.float64, device=logp.device)
    return torch.searchsorted(cdf, u * cdf[:, -1:])[:, 0].clamp(max=logp.shape[1] - 1)   # if NaN


def ends_turn(ids: list[int], policy: Policy) -> bool:
    """A turn ends with </tool_call>, </answer> (a closing tag may be 12 tokens), <|im_end|>, or
    what else ends a text of this model (<|endoftext|>, generation_config.json)."""
    said = policy.decode(ids[-12:])
    return ids[-1] in policy.end_ids or "</tool_call>" in said or "</answer>" in said


def example(policy: Policy) -> tuple[Tokens, Tokens]:
    """A prompt for the agent in tiny/ and a crop that it might see next, both of one picture. (It
    is not of the agent's world, and the agent may misread it.)"""
    picture, box = Image.new("RGB", (768, 768), (110, 110, 110)), (192, 416, 320, 544)
    ImageDraw.Draw(picture).ellipse(box, "red")
    image, crop = policy.encode_images([fit(picture, policy.resolution),
                                        fit(picture.crop(box), policy.resolution.crop())])
    prompt = policy.prompt(image, "What mark is on the red circle?\n"
                                  "Options: (A) horizontal (B) vertical (C) vee (D) checks")
    return prompt, policy.observation(crop)


def demonstrate() -> None:
    """Four conversations of the agent in tiny/ about one picture: a turn, a crop, a turn."""
    torch.set_num_threads(1)
    policy, generator = Policy("tiny"), torch.Generator().manual_seed(0)
    prompt, observation = example(policy)
    session = Session(policy, [prompt], group=4)
    first, first_logps = session.sample(64, 0.5, generator)
    session.append([observation] * 4)
    second, second_logps = session.sample(64, 0.5, generator)

    worst = 0.0
    for row in range(4):
        print(f"{policy.decode(first[row])}\n    crop -> {policy.decode(second[row])}")
        whole = prompt + Tokens(first[row]) + observation + Tokens(second[row])
        mask = [False] * len(prompt.ids) + [True] * len(first[row])
        mask += [False] * len(observation.ids) + [True] * len(second[row])
        with torch.no_grad():
            again, _ = policy.logprobs([whole], [mask], 0.5)
        sampled = torch.tensor(first_logps[row] + second_logps[row])
        difference = again[0][torch.tensor(mask[1:])] - sampled
        worst = max(worst, difference.abs().max().item())
    print(f"\nThe trainer's log-probabilities of these tokens differ by at most {worst:.0e}.")


if __name__ == "__main__":
    demonstrate()
