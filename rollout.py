"""Questions -> trajectories: the conversation of the policy with its tool, over several turns.

What it teaches: what is new in agentic RL is that the *environment* writes part of the sequence.
A trajectory is one sequence of tokens; a mask says which of them are the agent's own. Sampled ids
are kept exactly as they were sampled, never decoded and encoded again: one text has several
encodings, and another one would have another log-probability than the one that was sampled. What
the tool returns is appended as new ids, under mask 0. An *overview* is the whole image, reduced to
what the model can take; the agent sees it first.

    prompt -> (think, call) -> crop or error -> .. -> (think, answer)      in brackets: mask 1

All conversations of a batch go on side by side; those that have answered leave it. `Tokens` are ids
with the features of the images in them (lib/policy.py); a `Session` samples the next turn of many
conversations (lib/sampler.py).

Run it:  python rollout.py      # one trajectory of tiny/, turn by turn; 6 s
"""
from dataclasses import dataclass, field

import torch
from PIL import Image

from lib.graph import GraphSession
from lib.policy import Policy, Tokens
from lib.question import Question
from lib.sampler import Session
from tiny.world import World, world_question
from tools import Answer, Call, ToolError, fit, parse, run_tool

HELD = 2**24                            # pixels of an image that stays open: 50 MB


@dataclass
class Turn:
    """What the agent wrote in one turn, and what came of it."""
    text: str
    span: slice                         # where its ids stand in the trajectory
    call: Call | None = None            # a look: the call that was carried out ..
    box: tuple | None = None            # .. the box that it showed, in pixels of the original
    crop: Image.Image | None = field(default=None, repr=False)
    crop_tokens: Tokens | None = field(default=None, repr=False)
    error: str = ""                     # or the kind of error ..
    message: str = ""                   # .. and what the agent was told
    score: float | None = None          # semantic score of the look (reward.py)


@dataclass
class Trajectory:
    question: Question
    prompt: Tokens                      # how it begins: one object for the whole group
    tokens: Tokens                      # the whole sequence, as sampled
    mask: list[bool]                    # True: a token of the agent
    logps: list[float]                  # of the agent's tokens when they were sampled; else 0
    seen: tuple[int, int]               # (width, height) of the overview, in pixels ..
    space: tuple[int, int]              # .. and in the units of the agent's boxes
    turns: list[Turn] = field(default_factory=list)
    answer: str | None = None
    end: str = ""                       # "answer", "max_turns", or the kind of a final error

    @property
    def looks(self) -> list[Turn]:
        return [turn for turn in self.turns if turn.call]


def collect(policy: Policy, questions: list[Question], group: int = 1, max_turns: int = 4,
            max_tokens: int = 64, temperature: float = 1.,
            generator: torch.Generator | None = None) -> list[Trajectory]:
    """`group` trajectories of each question, in the questions' order: [q0, q0, .., q1, q1, ..].

    max_turns: turns of the agent; in the last one a call is not carried out, and the trajectory
    ends as "max_turns"; max_tokens: per turn.
    temperature 0 is greedy. No text of the agent makes this raise. It raises ValueError for a
    prompt that is longer than the model's positions (docs/plan.py says how long a trajectory may
    become), or probabilities that are not finite."""
    images, prompts, trajectories = begin(policy, questions, group)
    kind = GraphSession if policy.device.type == "cuda" else Session      # the same up to rounding
    session = kind(policy, prompts, group)
    active = list(range(len(trajectories)))     # the trajectory of each row of the session
    for number in range(1, max_turns + 1):
        ids, logps = session.sample(max_tokens, temperature, generator)
        for row, i in enumerate(active):
            turn = write(policy, trajectories[i], ids[row], logps[row])
            act(policy, trajectories[i], turn, images[i // group], last=number == max_turns)
        kept = [row for row, i in enumerate(active) if not trajectories[i].end]
        active = [active[row] for row in kept]
        if not active:
            break
        if len(kept) < len(ids):
            session.keep(kept)
        encode_crops(policy, trajectories, active, group)
        session.append([observe(policy, trajectories[i]) for i in active])
    return trajectories


def begin(policy: Policy, questions: list[Question], group: int
          ) -> tuple[list[Image.Image | None], list[Tokens], list[Trajectory]]:
    """The images and prompts, one a question, and the trajectories that begin with them.

    An image above HELD pixels is None, and opened again for each look at it: dozens of them side
    by side would fill the memory."""
    images, overviews, prompts, trajectories = [], [], [], []
    for question in questions:
        image = question.open()
        overviews.append(fit(image, policy.resolution))
        images.append(image if image.width * image.height <= HELD else None)
    for question, overview, tokens in zip(questions, overviews, policy.encode_images(overviews)):
        prompt = policy.prompt(tokens, question.prompt)
        if len(prompt.ids) >= policy.positions:
            raise ValueError(f"question {question.id}: {len(prompt.ids)} tokens with its image; "
                             f"the model has {policy.positions} positions")
        prompts.append(prompt)
        for _ in range(group):
            trajectory = Trajectory(question, prompt, Tokens([]), [], [], overview.size,
                                    policy.space(overview.size))
            extend(trajectory, prompt)
            trajectories.append(trajectory)
    return images, prompts, trajectories


def extend(trajectory: Trajectory, tokens: Tokens, logps: list[float] | None = None) -> None:
    """Append the agent's tokens (with logps) or the environment's (without)."""
    trajectory.tokens = trajectory.tokens + tokens
    trajectory.mask += [logps is not None] * len(tokens.ids)
    trajectory.logps += logps or [0.] * len(tokens.ids)


def write(policy: Policy, trajectory: Trajectory, ids: list[int], logps: list[float]) -> Turn:
    """The agent's next turn, appended to its trajectory."""
    start = len(trajectory.mask)
    extend(trajectory, Tokens(ids), logps)
    said = ids[:-1] if ids[-1] in policy.end_ids else ids
    turn = Turn(policy.decode(said), slice(start, start + len(ids)))
    trajectory.turns.append(turn)
    return turn


def act(policy: Policy, trajectory: Trajectory, turn: Turn, image: Image.Image | None, last: bool
        ) -> None:
    """Carry out what the turn asks for, or end the trajectory. image: the original, or None."""
    try:
        action = parse(turn.text, trajectory.space)
        if isinstance(action, Answer):
            trajectory.answer, trajectory.end = action.text, "answer"
        elif last:
            trajectory.end = "max_turns"
        else:
            image = image or trajectory.question.open()
            turn.crop, turn.box = run_tool(image, action, trajectory.space, policy.resolution)
            turn.call = action
    except ToolError as error:
        turn.error, turn.message = error.kind, str(error)
        if error.final:
            trajectory.end = error.kind
        elif last:
            trajectory.end = "max_turns"


def encode_crops(policy: Policy, trajectories: list[Trajectory], active: list[int], group: int
                 ) -> None:
    """Encode the crops of the latest turns. Trajectories of one question that made the same call,
    tool and arguments alike, share one crop: it is encoded once."""
    places, crops = {}, {}
    for i in active:
        turn = trajectories[i].turns[-1]
        if turn.call:
            places[i] = (i // group, turn.call.tool, str(turn.call.arguments))
            crops[places[i]] = turn.crop
    encoded = dict(zip(crops, policy.encode_images(list(crops.values()))))
    for i, place in places.items():
        trajectories[i].turns[-1].crop_tokens = encoded[place]


def observe(policy: Policy, trajectory: Trajectory) -> Tokens:
    """What the agent reads next, a crop or an error, appended to its trajectory. Where the agent's
    turn ended at </tool_call>, the environment closes it, by <|im_end|> under mask 0."""
    turn = trajectory.turns[-1]
    observation = policy.observation(turn.crop_tokens or turn.message)
    if trajectory.tokens.ids[-1] == policy.end_id:     # the agent has closed its turn itself
        observation.ids = observation.ids[1:]
    extend(trajectory, observation)
    return observation


def demonstrate() -> None:
    """One trajectory of tiny/ about a question of its world: who wrote what."""
    question = world_question(World(), seed=0, split="test", index=0)
    policy = Policy("tiny")
    trajectory = collect(policy, [question], temperature=0.)[0]
    print(f"{len(trajectory.prompt.ids):4} tokens of the prompt: {question.prompt!r}")
    end = len(trajectory.prompt.ids)
    for turn in trajectory.turns:
        if turn.span.start > end:
            print(f"{turn.span.start - end:4} tokens of the tool's response")
        end = turn.span.stop
        logp = sum(trajectory.logps[turn.span])
        print(f"{end - turn.span.start:4} tokens of the agent, log-probability {logp:.2f}: "
              f"{turn.text}")
    print(f"ended by {trajectory.end}; answer {trajectory.answer!r}, right {question.answer!r}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    demonstrate()
