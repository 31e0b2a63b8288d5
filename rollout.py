"""Questions -> trajectories: the conversation between the policy and its tool, over several turns.

What it teaches: agentic RL's only new ingredient is that part of the sequence is written by the *environment*. A
trajectory is one token sequence; a mask says which tokens are the agent's own. The sampled ids are kept exactly as
they were sampled (never decoded and encoded again), and what the tool returns is appended as new ids, under mask 0.

    prompt ─▶ [think, call]* ─▶ crop or error ─▶ [think, call]* ─▶ crop or error ─▶ [think, answer]*      * mask 1

All conversations of a batch run side by side; those that have answered leave it.

Run it:  python rollout.py            # one trajectory of tiny/ in text, its film strip in runs/rollout.png
"""
import argparse
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from lib.data import Question
from lib.policy import Policy, Tokens
from lib.sampler import Session
from tools import Answer, Call, ToolError, fit, parse, zoom


@dataclass
class Turn:
    """What the agent wrote in one turn, and what came of it."""
    text: str
    tokens: slice                       # where its ids stand in the trajectory
    call: Call | None = None            # a visual action that was carried out ..
    box: tuple | None = None            # .. its box in pixels of the original
    crop: Image.Image | None = field(default=None, repr=False)
    crop_tokens: Tokens | None = field(default=None, repr=False)
    error: str = ""                     # or the kind of error
    message: str = ""                   # and what the agent was told
    score: float | None = None          # semantic score of the visual action (reward.py)


@dataclass
class Trajectory:
    question: Question
    prompt: Tokens                      # how it begins: one object for the whole group
    tokens: Tokens                      # the whole sequence, as sampled
    mask: list[bool]                    # True: a token of the agent
    logps: list[float]                  # of the agent's tokens when they were sampled; 0 elsewhere
    seen: tuple[int, int]               # (width, height) of the overview, in pixels ..
    space: tuple[int, int]              # .. and in the units of the agent's boxes
    turns: list[Turn] = field(default_factory=list)
    answer: str | None = None
    end: str = ""                       # "answer", "max_turns", or the kind of a final error

    @property
    def looks(self) -> list[Turn]:
        return [turn for turn in self.turns if turn.call]


def collect(policy: Policy, questions: list[Question], group: int = 1, max_turns: int = 4, max_tokens: int = 64,
            temperature: float = 1.0, generator: torch.Generator | None = None) -> list[Trajectory]:
    """`group` trajectories for each question, in the questions' order: [q0, q0, .., q1, q1, ..].

    max_turns: turns of the agent, the last of which cannot look any more; max_tokens: per turn.
    temperature 0 is greedy. Whatever the agent writes, this raises nothing."""
    originals = [question.open() for question in questions]
    overviews = [fit(image, policy.resolution) for image in originals]
    prompts = [policy.prompt(image, question.prompt) for image, question in zip(policy.encode_images(overviews), questions)]
    trajectories = [Trajectory(question, prompt, prompt + Tokens([]), [False] * len(prompt.ids), [0.] * len(prompt.ids),
                               overview.size, policy.space(overview.size))
                    for question, prompt, overview in zip(questions, prompts, overviews) for _ in range(group)]
    session = Session(policy, prompts, group)
    active = list(range(len(trajectories)))  # which trajectory each row of the session belongs to
    for turn_number in range(1, max_turns + 1):
        for i, ids, logps in zip(active, *session.sample(max_tokens, temperature, generator)):
            trajectory = trajectories[i]
            start = len(trajectory.mask)
            extend(trajectory, Tokens(ids), logps)
            text = policy.decode(ids).removesuffix("<|im_end|>")
            act(policy, trajectory, Turn(text, slice(start, start + len(ids))), originals[i // group], last=turn_number == max_turns)
        kept = [row for row, i in enumerate(active) if not trajectories[i].end]
        active = [active[row] for row in kept]
        if not active:
            break
        if len(kept) < len(session.mask):
            session.keep(kept)
        latest = [trajectories[i].turns[-1] for i in active]
        places = {(i // group, turn.box): turn.crop for i, turn in zip(active, latest) if turn.crop}  # many look alike
        crops = dict(zip(places, policy.encode_images(list(places.values()))))
        observations = []
        for i, turn in zip(active, latest):
            turn.crop_tokens = crops.get((i // group, turn.box))
            observation = policy.observation(turn.crop_tokens or turn.message)
            if trajectories[i].tokens.ids[-1] == policy.end_id:  # the agent closed its turn itself
                observation.ids = observation.ids[1:]
            extend(trajectories[i], observation)
            observations.append(observation)
        session.append(observations)
    return trajectories


def extend(trajectory: Trajectory, tokens: Tokens, logps: list[float] | None = None) -> None:
    """Append the agent's tokens (with logps) or the environment's (without)."""
    trajectory.tokens = trajectory.tokens + tokens
    trajectory.mask += [logps is not None] * len(tokens.ids)
    trajectory.logps += logps or [0.] * len(tokens.ids)


def act(policy: Policy, trajectory: Trajectory, turn: Turn, image: Image.Image, last: bool) -> None:
    """Carry out what the turn asks for, or end the trajectory."""
    trajectory.turns.append(turn)
    try:
        action = parse(turn.text, trajectory.space)
        if isinstance(action, Answer):
            trajectory.answer, trajectory.end = action.text, "answer"
        elif last:
            trajectory.end = "max_turns"
        else:
            turn.call = action
            turn.crop, turn.box = zoom(image, action, trajectory.space, policy.resolution)
    except ToolError as error:
        turn.error, turn.message = error.kind, str(error)
        trajectory.end = error.kind if error.final else "max_turns" if last else ""
