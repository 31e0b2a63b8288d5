"""The usual ways that docs/bench.py compares ours with: `generate`, and padded batches.

What it teaches: what a careful user would write with transformers alone. Rollouts call
`model.generate` once a turn, over the left-padded conversations of all unfinished rows with all
their pixels. Pixels are prepared once, and ids are never encoded again. Updates go through padded
batches in order of arrival, logits of *all* tokens, and log_softmax. Tools, parsing and the loss
are this project's, so that only the way through the model differs.

Run it:  python docs/bench_usual.py        # eight trajectories by `generate`; 10 s
"""
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

import mapo
import rollout
from lib.batches import pad
from lib.policy import Policy, Tokens
from rollout import Trajectory
from tiny.world import World, world_questions
from tools import fit


def usual_model(path: str | Path) -> nn.Module:
    """The model alone, its vision tower frozen as ours is."""
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
    model.model.visual.requires_grad_(False)
    return model


def pixels_of(policy: Policy, images: list) -> list[tuple[Tensor, Tensor]]:
    """(pixel_values, image_grid_thw) of each image, as the processor makes them."""
    if not images:
        return []
    batch = policy.processor(images=images, do_resize=False, return_tensors="pt")
    grids = batch["image_grid_thw"]
    return list(zip(batch["pixel_values"].split(grids.prod(-1).tolist()), grids.split(1)))


def placeholders(policy: Policy, grid: Tensor) -> Tokens:
    height, width = grid[0, 1].item() // policy.merge, grid[0, 2].item() // policy.merge
    return Tokens([policy.image_id] * (height * width), [(height, width)])


def padded(policy: Policy, rows: list[list[int]], pixels: list[list], left: bool) -> dict:
    """The model's inputs (B, L) for a batch of conversations with all their images."""
    longest = max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(longest - len(row), None) if left else slice(len(row))
        ids[i, place] = torch.tensor(row)
        mask[i, place] = 1
    values, grids = zip(*(image for row in pixels for image in row))
    return {"input_ids": ids, "attention_mask": mask,
            "mm_token_type_ids": (ids == policy.image_id).long(),
            "pixel_values": torch.cat(values), "image_grid_thw": torch.cat(grids)}


def ends(policy: Policy) -> list[int]:
    """The tokens that end a turn."""
    return [policy.end_id, *policy.tokenizer.convert_tokens_to_ids(["</tool_call>", "</answer>"])]


@torch.no_grad()
def usual_rollouts(model: nn.Module, policy: Policy, questions: list, group: int, turns: int,
                   tokens: int) -> list[Trajectory]:
    """rollout.collect, written around `generate`; without log-probabilities."""
    images = [question.open() for question in questions]
    overviews = [fit(image, policy.resolution) for image in images]
    trajectories, pixels = [], []
    for question, overview, first in zip(questions, overviews, pixels_of(policy, overviews)):
        prompt, seen = policy.prompt(placeholders(policy, first[1]), question.prompt), overview.size
        for _ in range(group):
            trajectory = Trajectory(question, prompt, Tokens([]), [], [], seen, policy.space(seen))
            rollout.extend(trajectory, prompt)
            trajectories.append(trajectory)
            pixels.append([first])
    active = list(range(len(trajectories)))
    for number in range(1, turns + 1):
        turns_ids = generate(model, policy, [trajectories[i].tokens.ids for i in active],
                             [pixels[i] for i in active], tokens)
        for i, ids in zip(active, turns_ids):
            turn = rollout.write(policy, trajectories[i], ids, [0.] * len(ids))
            rollout.act(policy, trajectories[i], turn, images[i // group], last=number == turns)
        active = [i for i in active if not trajectories[i].end]
        if not active:
            break
        looked = [i for i in active if trajectories[i].turns[-1].crop]
        crops = [trajectories[i].turns[-1].crop for i in looked]
        for i, crop in zip(looked, pixels_of(policy, crops)):
            pixels[i].append(crop)
            trajectories[i].turns[-1].crop_tokens = placeholders(policy, crop[1])
        for i in active:
            rollout.observe(policy, trajectories[i])
    return trajectories


def generate(model: nn.Module, policy: Policy, rows: list[list[int]], pixels: list[list],
             tokens: int) -> list[list[int]]:
    """One turn of each conversation: the ids up to the first that ends it."""
    inputs, stops = padded(policy, rows, pixels, left=True), ends(policy)
    output = model.generate(**inputs, max_new_tokens=tokens, do_sample=True, temperature=1.,
                            top_k=0, top_p=1., pad_token_id=0, eos_token_id=stops,
                            suppress_tokens=policy.banned.tolist())
    turns = []
    for ids in output[:, inputs["input_ids"].shape[1]:].tolist():
        length = next((k + 1 for k, token in enumerate(ids) if token in stops), len(ids))
        turns.append(ids[:length])
    return turns


def usual_update(model: nn.Module, policy: Policy, trajectories: list[Trajectory],
                 pixels: list[list], advantage: Tensor, micro: int) -> None:
    """The gradient of eq. 4, left in the parameters. `micro`: padded tokens a batch; advantage
    (N,)."""
    weight = mapo.token_weights(pad([t.mask for t in trajectories], False))     # (N, L - 1)
    old = pad([t.logps for t in trajectories], 0.)                              # (N, L - 1)
    model.zero_grad()
    start = 0
    while start < len(trajectories):
        stop = start + 1
        longest = len(trajectories[start].mask)
        while stop < len(trajectories):
            longest = max(longest, len(trajectories[stop].mask))
            if (stop + 1 - start) * longest > micro:
                break
            stop += 1
        part = slice(start, stop)
        inputs = padded(policy, [t.tokens.ids for t in trajectories[part]], pixels[part], False)
        logits = model(**inputs, use_cache=False).logits[:, :-1].float()        # (B, L - 1, V)
        targets = inputs["input_ids"][:, 1:, None]
        logp = F.log_softmax(logits, -1).gather(-1, targets)[..., 0]            # (B, L - 1)
        n = logp.shape[1]
        A = advantage[part, None].expand(-1, n)
        mapo.loss(logp, old[part, :n], A, weight[part, :n])[0].backward()
        start = stop


if __name__ == "__main__":
    torch.set_num_threads(1)
    questions = world_questions(World(), 0, "train", 0, 1)
    for trajectory in usual_rollouts(usual_model("tiny"), Policy("tiny"), questions, 8, 4, 64):
        print(f"{len(trajectory.looks)} looks, answer {trajectory.answer!r}")
