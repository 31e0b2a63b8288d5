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

from data import Question
from policy import Policy, Session, Tokens
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


def film_strip(trajectory: Trajectory, title: str = "", side: int = 192) -> Image.Image:
    """The trajectory as a picture: for every look the overview with its box, the crop, the label and its score."""
    font, small = ImageFont.load_default(15), ImageFont.load_default(12)
    frames = max(len(trajectory.looks), 1)
    width, height = frames * (2 * side + 24) + 12, side + 96
    strip = Image.new("RGB", (max(width, 560), height), "white")
    pen = ImageDraw.Draw(strip)
    question = trajectory.question
    pen.text((12, 6), f"{title}{question.text}"[:90], "black", font)
    ratio = side / max(trajectory.seen)  # the overview as the agent saw it: marks do not show
    overview = question.open().resize(trajectory.seen, Image.BOX).resize(
        tuple(max(round(v * ratio), 1) for v in trajectory.seen), Image.NEAREST)
    for i, turn in enumerate(trajectory.looks or [None]):
        left = 12 + i * (2 * side + 24)
        strip.paste(overview, (left, 30))
        if turn is None:
            pen.text((left + side + 12, 30), "(never looked)", "black", font)
            continue
        box = [v * ratio * trajectory.seen[k % 2] / trajectory.space[k % 2] for k, v in enumerate(turn.call.bbox)]
        for grow, colour in ((0, "white"), (1, "black")):
            pen.rectangle((left + box[0] - grow, 30 + box[1] - grow, left + box[2] + grow, 30 + box[3] + grow), outline=colour)
        crop = turn.crop
        crop = crop.resize(tuple(max(round(v * side / max(crop.size)), 1) for v in crop.size), Image.NEAREST)
        strip.paste(crop, (left + side + 6, 30))
        score = "" if turn.score is None else f"   score {turn.score:.2f}"
        pen.text((left, side + 36), f"“{turn.call.label}”{score}"[:60], "black", small)
    pen.text((12, side + 56), f"answer: {trajectory.answer or '(' + trajectory.end + ')'}    right answer: {question.answer}", "black", font)
    options = ", ".join(question.choices)
    pen.text((12, side + 76), f"options: {options}"[:100] if options else "", "gray", small)
    return strip


def stack(strips: list[Image.Image]) -> Image.Image:
    """Film strips, one below the other."""
    page = Image.new("RGB", (max(s.width for s in strips), sum(s.height for s in strips)), "white")
    top = 0
    for strip in strips:
        page.paste(strip, (0, top))
        top += strip.height
    return page


def transcript(policy: Policy, trajectory: Trajectory) -> str:
    """The whole trajectory as text, images as [image h x w]."""
    text = policy.decode(trajectory.tokens.ids)
    for h, w in trajectory.tokens.grids:
        text = text.replace("<|image_pad|>" * (h * w), f"[image {h} x {w}]", 1)
    return text


if __name__ == "__main__":
    from data import World, world_question
    parser = argparse.ArgumentParser(description="Show one trajectory.")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--index", type=int, default=0, help="which held-out question")
    parser.add_argument("--temperature", type=float, default=0., help="0 is greedy")
    args = parser.parse_args()
    policy = Policy(args.model)
    question = world_question(World(), seed=0, split="test", index=args.index)
    trajectory = collect(policy, [question], temperature=args.temperature, generator=torch.Generator().manual_seed(0))[0]
    print(transcript(policy, trajectory))
    print(f"\n{len(trajectory.mask)} tokens, {sum(trajectory.mask)} of them the agent's; ended by {trajectory.end}; "
          f"answer {trajectory.answer!r}, right answer {question.answer!r}")
    Path("runs").mkdir(exist_ok=True)
    film_strip(trajectory).save("runs/rollout.png")
    print("film strip: runs/rollout.png")
