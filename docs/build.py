"""Builds the embedded agent from nothing: its tokenizer, random weights, and their cold start.

What it teaches: an agent must *see*, *aim* and *act* before RL can improve it. It learns them best
one after the other: trained on all at once, it aimed at the average place. Four supervised stages,
each from the weights of the one before:

    see     The vision tower alone: what stands where in the overview, which mark is in a crop.
    aim     The language model alone: "the red circle" -> its box, for all objects of an image.
    act     The language model: whole demonstrations (think, say, look, read, answer). Beside them,
            labels and crops learn to meet in one space, and guesses learn to name an option.
    habit   The same, from a demonstrator with a *reasoning-action gap*. It names the right object,
            but in 60% of the questions it looks one cell to the right of it. In 30%, whatever its
            aim, it leaves out the second of two objects. What it has not seen, it makes up.

The result talks well and looks badly, although it could look well. That is what MAPO is for.

The semantic score needs no CLIP model. But the encoder of tiny/ is *trained here with CLIP's loss*
(`clip_loss`), for the objects of this world. A real Qwen is not (reward.py).

Run it:  python docs/build.py        # 20 minutes on two cores: runs/tiny, and each stage beside it
"""
import argparse
import functools
import math
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from lib.batches import pad
from lib.policy import Policy, Tokens
from lib.question import Box, Question, holds, shows
from lib.shard import ShardedAdamW, agree, launch, rank, ranks, setup
from tiny.world import (BLOCK, CANVAS, CLUTTER, COLOURS, GRID, MARKS, SHAPES, Thing, World, bars,
                        ground, sprite, world_question)
from tools import ZOOM, fit, zoom_call

HERE = ROOT / "tiny"       # whose configuration and chat template a new agent takes
SIDE = CANVAS // BLOCK   # of the overview in pixels: 96
CELL = SIDE // GRID      # of the world's grid in overview pixels: 24, what one image token sees
LIST_PROMPT = "Where is each object?"

Sample = tuple[Tokens, list[bool]]  # a conversation, and which of its tokens are learnt
Turn = tuple[str, Box | None]       # what the demonstrator writes, and the box that it looks at
Pair = tuple[Tokens, str, bool]     # a crop, a label, and whether the crop holds what it names


# ---- the empty model -----------------------------------------------------------------------------

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
           "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
# Qwen has tokens for the first two; the others keep the agent's turns, and so the runs, short.
SCAFFOLD = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>",
            "<think>", "</think>", "<answer>", "</answer>",
            f'{{"name": "{ZOOM}", "arguments": {{"label": "', '", "bbox_2d": [', "]}}"]


def build_tokenizer(corpus: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE with Qwen's special tokens. Whole numbers and whole words are one token."""
    tokenizer = Tokenizer(models.BPE())
    pieces = Regex(r"\p{N}+| ?[\p{L}_]+| ?[^\s\p{L}\p{N}]+|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(pieces, "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000, min_frequency=20, special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in SCAFFOLD])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>",
                                   pad_token="<|endoftext|>",
                                   chat_template=(HERE / "chat_template.jinja").read_text())


def tokenizer_corpus(seed: int) -> list[str]:
    """All that is said in this world, without the scaffold: that has tokens of its own."""
    rng = np.random.default_rng(seed)
    corpus = [LIST_PROMPT, "Summary above image in one word:",
              "Summary above sentence in one word:", "system user assistant Error no"] * 1500
    for i in range(1500):
        options = [0, 4, 2, 3, 4, 5, 6, 7, 8][i % 9]
        question = world_question(World(options=options), seed, "cold", i)
        corpus.append(question.prompt)
        corpus += [text for text, _ in demonstration(question, rng, noise=0.)]
    for piece in SCAFFOLD:
        corpus = [text.replace(piece, "\n") for text in corpus]
    return corpus + [str(n) for n in range(SIDE + 1)] * 50


def build_model(folder: str, seed: int) -> None:
    """Write a model directory with random weights. The architecture (Qwen2.5-VL, 1.4M parameters)
    and the sizes of images stand in the .json files beside this one."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(tokenizer_corpus(seed))
    config = AutoConfig.from_pretrained(HERE)
    config.text_config.vocab_size = len(tokenizer)
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name in ("preprocessor_config.json", "agent.json"):
        shutil.copy(HERE / name, folder)


# ---- the demonstrator ----------------------------------------------------------------------------

def demonstration(question: Question, rng: np.random.Generator, miss: float = 0.,
                noise: float = .1) -> list[Turn]:
    """One demonstration, turn by turn; boxes in pixels of the overview.

    With probability `miss` it looks beside the objects that it names. With half of that it leaves
    out the second of two. The two faults are independent, so a true first look says nothing about
    whether a second follows. What it has not seen, it makes up."""
    names = [name for name, plate in question.objects.items() if plate in question.boxes]
    beside = rng.random() < miss
    short = len(names) == 2 and rng.random() < miss / 2
    looks = [("find", 16)]
    if question.category == "coarse_to_fine":
        looks.append(("look closer at", 8))
    turns, marks, known = [], [], ""
    for name in names[:1] if short else names:
        plate = question.objects[name]
        for aim, side in looks:
            box = around(plate, side, rng, beside, noise)
            thought = f"<think>{known}{aim} the {name}</think>"
            turns.append((thought + zoom_call(f"the {name}", box), box))
        seen = shows(in_original(box), plate)
        marks.append(question.marks[name] if seen else made_up(question, marks, rng))
        known += f"the {name} has {marks[-1]}, "
    if short:
        marks.append(made_up(question, marks, rng))
    answer = f"<think>{known[:-2]}</think><answer>{' and '.join(marks)}</answer>"
    return [*turns, (answer, None)]


def made_up(question: Question, marks: list[str], rng: np.random.Generator) -> str:
    """The next mark, unseen: what some option says that agrees with the marks given so far."""
    options = [option.split(" and ") for option in question.choices]
    if not options:
        options = [[*marks, mark] for mark in MARKS]
    fitting = [option[len(marks)] for option in options if option[:len(marks)] == marks]
    return str(rng.choice(fitting))


def around(plate: Box, side: int, rng: np.random.Generator, beside: bool = False,
           noise: float = 0.) -> tuple[int, ...]:
    """A box of `side` around an object, in pixels of the overview.

    beside: one cell to the right, from the last cell back to the first. noise: the probability of
    an aim that is off by up to 4 pixels."""
    x, y = centre(plate)
    if beside:
        x = (x + CELL) % SIDE
    if rng.random() < noise:
        x += 2 * int(rng.integers(-2, 3))
        y += 2 * int(rng.integers(-2, 3))
    return square(x - side // 2, y - side // 2, side)


def square(left: int, top: int, side: int) -> tuple[int, ...]:
    """The square that begins there, moved back into the overview."""
    left, top = min(max(left, 0), SIDE - side), min(max(top, 0), SIDE - side)
    return left, top, left + side, top + side


def centre(plate: Box) -> tuple[int, int]:
    """Of an object, in pixels of the overview."""
    return (plate[0] + plate[2]) // (2 * BLOCK), (plate[1] + plate[3]) // (2 * BLOCK)


def in_original(box: Box) -> Box:
    """A box in pixels of the overview -> in pixels of the original."""
    return tuple(BLOCK * v for v in box)


# ---- scenes -> what is learnt --------------------------------------------------------------------

class Source:
    """Endless scenes for one process, and what the stages make of them. None is used twice."""

    def __init__(self, policy: Policy, seed: int):
        self.policy, self.seed, self.index = policy, seed, rank()
        self.rng = np.random.default_rng([seed, 7, rank()])

    def question(self, **shares: float) -> Question:
        self.index += ranks()
        options = int(self.rng.choice([0, 2, 4, 4, 8]))
        objects = int(self.rng.integers(4, 9))
        world = World(options=options, objects=objects, **shares)
        return world_question(world, self.seed, "cold", self.index)

    def overview(self, question: Question) -> Image.Image:
        return draw_overview(*question.open.args)

    def crop(self, question: Question, box: Box) -> Image.Image:
        """What the zoom tool returns, without drawing the whole canvas."""
        return fit(question.open(region=in_original(box)), self.policy.resolution.crop())

    def pick(self, question: Question) -> str:
        """The name of one of its objects."""
        return str(self.rng.choice(list(question.objects)))

    def nearby(self, question: Question, name: str, reach: float = .25) -> Box:
        """A box near the object, off by up to `reach` of its side: a small reach shows it."""
        sides = [16, 8, 8, 12] if question.category == "coarse_to_fine" else [16, 16, 20]
        side = int(self.rng.choice(sides))
        x, y = around(question.objects[name], side, self.rng)[:2]
        far = int(reach * side)
        right, down = self.rng.integers(-far, far + 1, 2).tolist()
        return square(x + right, y + down, side)

    def listings(self, count: int) -> list[Sample]:
        """An image, and the boxes of its objects in random order; only the boxes are learnt."""
        questions = [self.question() for _ in range(count)]
        overviews = self.policy.encode_images([self.overview(q) for q in questions])
        samples = []
        for question, overview in zip(questions, overviews):
            pieces = [(self.policy.prompt(overview, LIST_PROMPT), False)]
            for name in self.rng.permutation(list(question.objects)):
                box = around(question.objects[name], 16, self.rng)
                pieces.append((self.policy.tokens(f" the {name}"), False))
                pieces.append((self.policy.tokens(", ".join(map(str, box))), True))
            samples.append(joined(pieces))
        return samples

    def guesses(self, count: int) -> list[Sample]:
        """Questions without a picture: all options in random order, then one of them. Here the
        agent learns to read the options, from which its bluffs choose."""
        samples = []
        while len(samples) < count:
            question = self.question(comparison=.3)
            if question.choices:
                options = ", ".join(self.rng.permutation(question.choices))
                answer = self.rng.choice(question.choices)
                prompt = self.policy.prompt(Tokens([]), question.prompt)
                said = f"<think>{options}</think><answer>{answer}</answer>"
                samples.append(joined([(prompt, False), (self.policy.tokens(said), True)]))
        return samples

    def demonstrations(self, count: int, miss: float) -> tuple[list[Sample], list[Pair]]:
        """Demonstrations, and pairs for `clip_loss`, two a scene."""
        samples, pairs = [], []
        for _ in range(count):
            question = self.question(comparison=.3, coarse=.2)
            turns = demonstration(question, self.rng, miss)
            name = self.pick(question)
            near = [self.nearby(question, name), self.nearby(question, name, reach=1.25)]
            boxes = [box for _, box in turns if box] + near
            images = [self.overview(question)] + [self.crop(question, box) for box in boxes]
            overview, *crops = self.policy.encode_images(images)
            pieces = [(self.policy.prompt(overview, question.prompt), False)]
            for text, box in turns:
                pieces.append((self.policy.tokens(text), True))
                if box:
                    pieces.append((self.policy.observation(crops.pop(0)), False))
            samples.append(joined(pieces))
            for crop, box in zip(crops, near):
                good = holds(in_original(box), question.objects[name])
                pairs.append((crop, f"the {name}", good))
        return samples, pairs


def draw_overview(things: list[Thing], clutter: int = 0, seed: int = 0) -> Image.Image:
    """draw_scene(..) reduced BLOCK times, within one grey level. There are a hundred thousand
    scenes: this takes less than a tenth of the time."""
    pixels = reduced_ground().copy()
    for x, y, width, height in bars(clutter, seed):
        pixels[y:y + height, x:x + width] = CLUTTER
    for thing in things:
        picture = reduced_sprite(thing.shape, thing.colour, thing.mark, thing.half)
        x, y, half = (v // BLOCK for v in (*thing.centre, thing.half))
        square = pixels[y - half:y + half, x - half:x + half]
        square += picture[..., :3] - picture[..., 3:] * square
    return Image.fromarray(pixels.round().astype(np.uint8))


@functools.cache
def reduced_ground() -> np.ndarray:
    return block_means(np.asarray(ground()))


@functools.cache
def reduced_sprite(shape: str, colour: str, mark: str, half: int) -> np.ndarray:
    """The share of each overview pixel that an object covers, last, and its colour times that."""
    pixels = np.asarray(sprite(shape, colour, mark, half)).astype(float)
    pixels[..., 3] /= 255
    pixels[..., :3] *= pixels[..., 3:]
    return block_means(pixels)


def block_means(pixels: np.ndarray) -> np.ndarray:
    """(h, w, c) -> (h / BLOCK, w / BLOCK, c)."""
    h, w, c = pixels.shape
    return pixels.reshape(h // BLOCK, BLOCK, w // BLOCK, BLOCK, c).mean((1, 3))


def joined(pieces: list[tuple[Tokens, bool]]) -> Sample:
    """Pieces of a conversation, each learnt or not -> the whole, and a mask token by token."""
    whole, mask = Tokens([]), []
    for tokens, learnt in pieces:
        whole = whole + tokens
        mask += [learnt] * len(tokens.ids)
    return whole, mask


# ---- stage 1: see --------------------------------------------------------------------------------

def stage_see(policy: Policy, source: Source, steps: int, batch: int, lr: float) -> None:
    """The vision tower. Colours, shapes and marks are read off its output by the *word embeddings*
    of their names: so what the eye reports and what a question says meet in one space. Places are
    read off by two heads, which are then thrown away."""
    encode = functools.partial(policy.encode_images.__wrapped__, policy)  # without its @no_grad
    colours, shapes = words(policy, [*COLOURS, "no"]), words(policy, [*SHAPES, "no"])
    marks = words(policy, MARKS)
    read_x, read_y = nn.Linear(128, 48), nn.Linear(128, 48)               # 2 pixels a class

    def next_loss():
        overviews, cells, crops, goals = see_batch(source, batch)
        cell = torch.cat([image.features[0] for image in encode(overviews)])     # (16 batch, D)
        crop = torch.stack([image.features[0].mean(0) for image in encode(crops)])  # (2 batch, D)
        read = {"colour": (cell @ colours, cells[:, 0]),
                "shape": (cell @ shapes, cells[:, 1]),
                "x": (read_x(cell), cells[:, 2]),
                "y": (read_y(cell), cells[:, 3]),
                "crop_colour": (crop @ colours, goals[:, 0]),
                "crop_shape": (crop @ shapes, goals[:, 1]),
                "mark": (crop @ marks, goals[:, 2])}
        loss, report = 0., {}
        for what, (logits, target) in read.items():
            loss = loss + F.cross_entropy(logits, target, ignore_index=-1)
            right = logits.argmax(-1) == target
            report[what] = right[target >= 0].float().mean().item()
        return loss, {"loss": loss.item()} | report

    vision = policy.model.model.visual.parameters()
    optimise([*vision, *read_x.parameters(), *read_y.parameters()], next_loss, steps, lr)


def words(policy: Policy, names: list[str]) -> Tensor:
    """The embeddings of words, (D, names): they stay as they are."""
    ids = [policy.tokens(f" {name}").ids[-1] for name in names]
    return policy.language.embed_tokens.weight[ids].detach().T


def see_batch(source: Source, count: int) -> tuple[list, Tensor, list, Tensor]:
    """Overviews with what is in each of their 16 cells, (16 count, 4): colour, shape, x, y; and
    crops, two a scene, with what they show, (2 count, 3): colour, shape, mark.

    All are classes. -1: there is nothing to tell. An empty cell has the last colour and shape."""
    overviews, cells, crops, goals = [], [], [], []
    for _ in range(count):
        question = source.question()
        overviews.append(source.overview(question))
        grid = [[len(COLOURS), len(SHAPES), -1, -1] for _ in range(GRID * GRID)]
        for name, plate in question.objects.items():
            x, y = centre(plate)
            grid[y // CELL * GRID + x // CELL] = [*kind(name), x // 2, y // 2]
        cells += grid
        for _ in range(2):
            name = source.pick(question)
            box = source.nearby(question, name)
            readable = shows(in_original(box), question.objects[name])
            crops.append(source.crop(question, box))
            goals.append([*kind(name), MARKS.index(question.marks[name]) if readable else -1])
    return overviews, torch.tensor(cells), crops, torch.tensor(goals)


def kind(name: str) -> tuple[int, int]:
    """An object's name -> the classes of its colour and its shape."""
    colour, shape = name.split()
    return list(COLOURS).index(colour), SHAPES.index(shape)


# ---- stages 2 to 4: aim, act, habit --------------------------------------------------------------

def stage_aim(policy: Policy, source: Source, steps: int, batch: int, lr: float) -> None:
    """The language model, on eyes that stay as they are: lists of boxes."""

    def next_loss():
        loss, exact = imitate(policy, source.listings(batch))
        return loss, {"loss": loss.item(), "exact": exact}

    optimise(list(policy.language.parameters()), next_loss, steps, lr)


def stage_act(policy: Policy, source: Source, steps: int, batch: int, lr: float,
              miss: float) -> None:
    """The language model: demonstrations with a gap, and beside them labels, crops and guesses."""

    def next_loss():
        samples, pairs = source.demonstrations(batch, miss)
        loss, exact = imitate(policy, samples)
        nce, match = clip_loss(policy, pairs)
        guess, _ = imitate(policy, source.guesses(batch // 2))
        report = {"loss": loss.item(), "exact": exact, "nce": nce.item(), "match": match,
                  "guess": guess.item()}
        return loss + .2 * nce + .5 * guess, report

    optimise(list(policy.language.parameters()), next_loss, steps, lr)


def imitate(policy: Policy, samples: list[Sample]) -> tuple[Tensor, float]:
    """Mean cross-entropy of the tokens that are learnt, and the share predicted exactly."""
    batch, masks = [tokens for tokens, _ in samples], [mask for _, mask in samples]
    states, learnt = policy.own_states(batch, masks)                        # (n, D), (B, L - 1)
    logits = policy.model.lm_head(states)                                   # (n, V)
    targets = pad([tokens.ids for tokens in batch], 0)[learnt]              # (n,)
    exact = (logits.argmax(-1) == targets).float().mean().item()
    return F.cross_entropy(logits, targets), exact


def clip_loss(policy: Policy, pairs: list[Pair]) -> tuple[Tensor, float]:
    """CLIP's loss (InfoNCE, arXiv 2103.00020, fig. 3) on the language model's own summaries of
    labels and crops, and how often a label finds its crop.

    A crop that does not hold its label's object is a negative for every label, the hardest for its
    own."""
    embed = functools.partial(policy.embed.__wrapped__, policy)     # as above
    crops, labels, good = zip(*pairs)
    names = sorted(set(labels))                                             # each is encoded once
    which = torch.tensor([names.index(label) for label in labels])          # (n,)
    good = torch.tensor(good)                                               # (n,)
    crops = embed(list(crops))                                              # (n, D)
    logits = embed(names)[which] @ crops.T / .07                            # (n labels, n crops)
    alike = (which == which[:, None]).fill_diagonal_(False)                 # the same label again
    # A label seeks its crop. Another good crop of the same label would be as right: left out.
    to_crop = logits.masked_fill(alike & good, -torch.inf)[good]
    # A crop seeks its label. The same label once more would be as right: left out.
    to_label = logits.T.masked_fill(alike, -torch.inf)[good]
    target = torch.arange(len(pairs))[good]
    loss = (F.cross_entropy(to_crop, target) + F.cross_entropy(to_label, target)) / 2
    return loss, (to_crop.argmax(1) == target).float().mean().item()


# ---- training ------------------------------------------------------------------------------------

def optimise(parameters: list[Tensor], next_loss: Callable, steps: int, lr: float) -> None:
    """AdamW with warm-up and cosine. next_loss() -> (loss, numbers to report), on a fresh batch."""
    optimiser = ShardedAdamW(parameters, betas=(.9, .98), weight_decay=.02)
    start, reports = time.time(), []
    for step in range(steps):
        optimiser.zero_grad()
        loss, report = next_loss()
        (loss / ranks()).backward()  # the optimiser sums over the processes
        optimiser.finish_micro_batch()
        optimiser.clip(1.)
        warm_up = min(1, (step + 1) / 50)
        cosine = .5 * (1 + math.cos(math.pi * step / steps))
        optimiser.step(lr * warm_up * (.02 + .98 * cosine))
        reports.append(report)
        if (step + 1) % max(steps // 10, 1) == 0 or step + 1 == steps:
            means = [f"{key} {fmean(r[key] for r in reports):.3f}" for key in report]
            log("  ".join([f"{step + 1:5}/{steps} {time.time() - start:5.0f} s", *means]))
            reports = []


def log(text: str) -> None:
    if rank() == 0:
        print(text, flush=True)


STAGES = {"see": (stage_see, 500, dict(batch=24, lr=2e-3)),  # batch: scenes of one process
          "aim": (stage_aim, 1500, dict(batch=12, lr=2e-3)),
          "act": (stage_act, 420, dict(batch=24, lr=1.5e-3, miss=0.)),
          "habit": (stage_act, 400, dict(batch=24, lr=1e-3, miss=.6))}


def build(out: str, seed: int, scale: float) -> None:
    """All stages. Several processes run it: each draws its own scenes, all share the gradients."""
    setup()
    if rank() == 0:
        build_model(f"{out}-empty", seed)
    agree()  # the others wait for it
    policy = Policy(f"{out}-empty")
    count = sum(p.numel() for p in policy.model.parameters())
    log(f"{count:,} parameters, {len(policy.tokenizer)} tokens")
    for number, (name, (stage, steps, settings)) in enumerate(STAGES.items()):
        log(name)
        source = Source(policy, seed * 100 + number)
        stage(policy, source, max(int(steps * scale), 2), **settings)
        if rank() == 0:
            policy.save(out if name == "habit" else f"{out}-{name}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Build the embedded agent from nothing.")
    parser.add_argument("--out", default="runs/tiny", help="the model directory")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1., help="of all steps; 0.003 is a test")
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    began = time.time()
    launch(build, args.processes, args.out, args.seed, args.scale)
    print(f"built {args.out} in {time.time() - began:.0f} s")
