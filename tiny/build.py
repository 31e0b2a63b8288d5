"""Builds the embedded agent from nothing: its tokenizer, a small Qwen2.5-VL, and the cold start before RL.

What it teaches: an agent has to *see*, to *aim* and to *act* before RL can improve it, and these are learnt best one
after the other (joint training from scratch stayed at the prior over positions). Four supervised stages:

    see     the vision tower alone: what and where in the overview, which mark in a crop, read by the words for them
    aim     the language model alone: "the red circle" -> its box, for all objects of an image
    act     whole demonstrations: think, say, look, read, answer; the embedding of crops beside that of labels; and, without
            a picture, a guess among the options
    habit   the same from a demonstrator with a systematic *reasoning-action gap*: it names the right object, and
            in 60% of its questions looks one cell to its right (wrapping round); of two objects it leaves out the second in 30%,
            whatever its aim. What it has not seen it bluffs: says what some option says

The result talks well and looks badly, although it could look well: what MAPO is for. It is an ordinary model
directory. Two processes share the work (gradients are averaged), each with one thread.

Run it:  python tiny.py              # writes runs/tiny, and each stage beside it
"""
import argparse
import json
import math
import os
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # at this size a second thread costs more than it brings

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from lib.data import Question, holds, shows
from tiny.world import COLOURS, MARKS, SHAPES, World, draw_overview, world_question
from lib.policy import Policy, Tokens
from tools import TOOL_NAME, fit

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
           "<|image_pad|>", "<|video_pad|>"]
# Qwen has the first two as tokens of their own; the rest keeps the agent's turns, and so the experiments, short
SCAFFOLD = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>", "<answer>",
            "</answer>", f'{{"name": "{TOOL_NAME}", "arguments": {{"label": "', '", "bbox_2d": [', "]}}"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
SEEN = (96, 96)   # the overview's size: min_pixels and max_pixels below fix it
CELL = 24         # of the world's grid, in overview pixels


# ---- the empty model ---------------------------------------------------------------------------------------------

def build_tokenizer(corpus: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE with Qwen's special tokens. Whole numbers and whole words become single tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"\p{N}+| ?[\p{L}_]+| ?[^\s\p{L}\p{N}]+|\s+"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=2000, min_frequency=20, special_tokens=SPECIAL, show_progress=False,
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    numbers = [str(n) for n in range(0, SEEN[0] + 1)] * 50
    tokenizer.train_from_iterator(corpus + numbers, trainer)
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in SCAFFOLD])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>",
                                   chat_template=CHAT_TEMPLATE)


def build_model(folder: Path, seed: int) -> None:
    """Write a model directory with random weights: Qwen2.5-VL's architecture at 1.4M parameters."""
    torch.manual_seed(seed)
    corpus, rng = [], np.random.default_rng(seed)
    for i in range(1500):
        question = world_question(World(options=i % 9 if i % 9 != 1 else 4), seed, "cold", i)
        corpus += [question.prompt, LIST_PROMPT, "Summary above image in one word:", "Summary above sentence in one word:",
                   "system user assistant Error no"] + [text for text, _ in demonstrate(question, rng, noise=0.)]
    for piece in SCAFFOLD:
        corpus = [text.replace(piece, "\n") for text in corpus]
    tokenizer = build_tokenizer(corpus)
    token = tokenizer.convert_tokens_to_ids
    config = Qwen2_5_VLConfig(
        text_config=dict(vocab_size=len(tokenizer), hidden_size=128, num_hidden_layers=4, num_attention_heads=4,
                         num_key_value_heads=2, intermediate_size=384, initializer_range=.08, max_position_embeddings=4096,
                         rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1] * 16},
                         bos_token_id=None, eos_token_id=token("<|im_end|>"), pad_token_id=token("<|endoftext|>")),
        vision_config=dict(depth=3, hidden_size=96, num_heads=3, intermediate_size=192, out_hidden_size=128, patch_size=12,
                           temporal_patch_size=1, spatial_merge_size=2, window_size=96, fullatt_block_indexes=[0, 1, 2],
                           initializer_range=.08),
        image_token_id=token("<|image_pad|>"), video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"), vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True)
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil(patch_size=12, temporal_patch_size=1, merge_size=2, do_convert_rgb=True,
                             size={"shortest_edge": 48 * 48, "longest_edge": 96 * 96}).save_pretrained(folder)
    (folder / "agent.json").write_text(json.dumps({"coordinates": "pixels", "system_prompt": ""}))  # the cold start teaches the format


# ---- the demonstrator --------------------------------------------------------------------------------------------

LIST_PROMPT = "Where is each object?"


def call_text(label: str, box: tuple) -> str:
    """The tool call as the agent writes it: say, then look."""
    return f'<tool_call>{{"name": "{TOOL_NAME}", "arguments": {{"label": "{label}", "bbox_2d": {json.dumps(list(box))}}}}}</tool_call>'


def around(plate: tuple, side: int, rng: np.random.Generator, shift: int = 0, noise: float = 0.) -> tuple:
    """A box of `side` around an object, in overview pixels; with probability `noise` it is off by 2 or 4 pixels."""
    scale = SEEN[0] / 768
    x, y = (plate[0] + plate[2]) / 2 * scale, (plate[1] + plate[3]) / 2 * scale
    if shift:  # one cell to the right, from the last cell back to the first
        x = (x + CELL) % SEEN[0]
    if rng.random() < noise:
        x, y = x + 2 * rng.integers(-2, 3), y + 2 * rng.integers(-2, 3)
    x, y = (min(max(v, side / 2), SEEN[0] - side / 2) for v in (x, y))
    return tuple(int(v) for v in (x - side / 2, y - side / 2, x + side / 2, y + side / 2))


def demonstrate(question: Question, rng: np.random.Generator, gap: float = 0., noise: float = .1) -> list[tuple[str, tuple | None]]:
    """One demonstration: turns of (text, box looked at or None). With probability `gap` it looks beside the objects that
    it names, and with half of that it leaves out the second of two; what it has not seen it makes up. The two faults are
    independent, so that a true first look says nothing about whether a second follows."""
    names = [name for box in question.boxes for name, plate in question.objects.items() if plate == box]
    shift, short = int(rng.random() < gap), len(names) == 2 and rng.random() < gap / 2
    small = question.category == "coarse_to_fine"
    turns, known, marks = [], "", []
    for name, plate in zip(names[:1] if short else names, question.boxes):
        for aim, side in (("find", 16), ("look closer at", 8)) if small else (("find", 16),):
            box = around(plate, side, rng, shift, noise)
            turns.append((f"<think>{known}{aim} the {name}</think>{call_text('the ' + name, box)}", box))
        seen = shows(tuple(v * 8 for v in box), plate)
        marks.append(question.marks[name] if seen else made_up(question, marks, rng))
        known += f"the {name} has {marks[-1]}, "
    if short:
        marks.append(made_up(question, marks, rng))
    return turns + [(f"<think>{known[:-2]}</think><answer>{' and '.join(marks)}</answer>", None)]


def made_up(question: Question, marks: list[str], rng: np.random.Generator) -> str:
    """The next mark, which was not seen: what some option says that agrees with the marks given so far."""
    options = [option.split(" and ") for option in question.choices] or [[*marks, mark] for mark in MARKS]
    fitting = [option[len(marks)] for option in options if option[:len(marks)] == marks]
    return fitting[int(rng.integers(len(fitting)))]


# ---- batches -----------------------------------------------------------------------------------------------------

class Source:
    """Endless cold-start scenes for one process, and what the stages make of them. No scene is used twice."""

    def __init__(self, policy: Policy, seed: int, rank: int, ranks: int):
        self.policy, self.seed, self.index, self.ranks = policy, seed, rank, ranks
        self.rng = np.random.default_rng([seed, 7, rank])

    def question(self, **world) -> Question:
        self.index += self.ranks
        options = int(self.rng.choice([0, 2, 4, 4, 8]))
        return world_question(World(options=options, objects=int(self.rng.integers(4, 9)), **world), self.seed, "cold", self.index)

    def pick(self, items: list):
        return items[int(self.rng.integers(len(items)))]

    def overview(self, question: Question):
        return draw_overview(*question.open.args)

    def crop(self, question: Question, box: tuple):
        """What the zoom tool returns, without drawing the whole canvas."""
        return fit(question.open(region=tuple(8 * int(v) for v in box)), self.policy.resolution.crop())

    def nearby(self, question: Question, name: str, reach: float = .25) -> tuple:
        """A box near the object: off by up to `reach` of its side, so that a small reach shows the object."""
        side = int(self.rng.choice([16, 16, 20] if question.category != "coarse_to_fine" else [16, 8, 8, 12]))
        box = around(question.objects[name], side, self.rng)
        dx, dy = (int(v) for v in self.rng.integers(-int(reach * side), int(reach * side) + 1, 2))
        x1, y1, x2, y2 = box[0] + dx, box[1] + dy, box[2] + dx, box[3] + dy
        dx, dy = max(0, -x1) - max(0, x2 - 96), max(0, -y1) - max(0, y2 - 96)  # back into the picture
        return x1 + dx, y1 + dy, x2 + dx, y2 + dy

    def listings(self, count: int) -> list[tuple[Tokens, list[bool]]]:
        """An image and the boxes of all its objects in random order; only what follows each name is learnt."""
        questions = [self.question() for _ in range(count)]
        samples = []
        for question, overview in zip(questions, self.policy.encode_images([self.overview(q) for q in questions])):
            tokens = self.policy.prompt(overview, LIST_PROMPT)
            mask = [False] * len(tokens.ids)
            for name in self.rng.permutation(list(question.objects)):
                box = around(question.objects[name], 16, self.rng)
                for text, learn in ((f" the {name}", False), (", ".join(map(str, box)), True)):
                    piece = self.policy.tokens(text)
                    tokens, mask = tokens + piece, mask + [learn] * len(piece.ids)
            samples.append((tokens, mask))
        return samples

    def guesses(self, count: int) -> list[tuple[Tokens, list[bool]]]:
        """Questions without a picture: their options in random order, then one of them. Bluffs learn here to read the options."""
        samples = []
        while len(samples) < count:
            if (question := self.question(comparison=.3)).choices:
                options = ", ".join(self.rng.permutation(question.choices))
                prompt = self.policy.prompt(Tokens([]), question.prompt)
                said = self.policy.tokens(f"<think>{options}</think><answer>{self.pick(question.choices)}</answer>")
                samples.append((prompt + said, [False] * len(prompt.ids) + [True] * len(said.ids)))
        return samples

    def demonstrations(self, count: int, gap: float) -> tuple[list, list[tuple[Tokens, str, bool]]]:
        """Demonstrations as (tokens, mask), and for the embedding, two a scene, (crop, label, does the crop hold it?)."""
        scenes, images = [], []
        for _ in range(count):
            question = self.question(comparison=.3, coarse=.2)
            turns, name = demonstrate(question, self.rng, gap), self.pick(list(question.objects))
            near = [self.nearby(question, name), self.nearby(question, name, reach=1.25)]
            scenes.append((question, turns, name, [holds(tuple(8 * v for v in box), question.objects[name]) for box in near]))
            images += [self.overview(question)] + [self.crop(question, box) for box in [b for _, b in turns if b] + near]
        encoded, samples, pairs = iter(self.policy.encode_images(images)), [], []
        for question, turns, name, good in scenes:
            tokens = self.policy.prompt(next(encoded), question.prompt)
            mask = [False] * len(tokens.ids)
            for text, box in turns:
                said = self.policy.tokens(text)
                tokens, mask = tokens + said, mask + [True] * len(said.ids)
                if box:
                    seen = self.policy.observation(next(encoded))
                    tokens, mask = tokens + seen, mask + [False] * len(seen.ids)
            samples.append((tokens, mask))
            pairs += [(next(encoded), f"the {name}", g) for g in good]
        return samples, pairs


# ---- training ----------------------------------------------------------------------------------------------------

def optimise(parameters: list[Tensor], loss_at, steps: int, lr: float, name: str, log) -> None:
    """AdamW with warm-up and cosine; gradients averaged over the processes."""
    optimiser = torch.optim.AdamW(parameters, lr=lr, betas=(.9, .98), weight_decay=.02)
    start, shown = time.time(), []
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 50) * (.02 + .98 * .5 * (1 + math.cos(math.pi * step / steps)))
        loss, report = loss_at(step)
        optimiser.zero_grad()
        loss.backward()
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        flat *= min(1, 1 / (flat.norm().item() + 1e-6))
        for p, g in zip(parameters, flat.split([p.numel() for p in parameters])):
            p.grad = g.view_as(p)
        optimiser.step()
        shown.append(report)
        if (step + 1) % max(steps // 10, 1) == 0 or step + 1 == steps:
            mean = {k: sum(r[k] for r in shown) / len(shown) for k in shown[0]}
            log(f"{name:6} step {step + 1:5}/{steps} {time.time() - start:5.0f} s  " + "  ".join(f"{k} {v:.3f}" for k, v in mean.items()))
            shown = []


def stage_see(policy: Policy, source: Source, steps: int, batch: int, lr: float, log) -> None:
    """The vision tower. Colour, shape and mark are read off its output by the *word embeddings* of their names, so that
    what the eye reports and what a question says meet in one space; places by throw-away heads."""
    visual, embed = policy.model.model.visual, policy.language.embed_tokens.weight.detach()
    words = lambda names: embed[[policy.tokens(" " + n).ids[-1] for n in names]]
    table = {"colour": words([*COLOURS, "no"]), "shape": words([*SHAPES, "no"]), "mark": words(MARKS)}
    heads = nn.ModuleDict({"x": nn.Linear(128, 48), "y": nn.Linear(128, 48)})  # in steps of 2 pixels
    for p in heads.parameters():
        dist.broadcast(p.data, 0)

    def features(images):
        inputs = policy.processor(images=images, do_resize=False, return_tensors="pt")
        return visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).pooler_output

    def loss_at(step):
        overviews, cells, crops, goals = [], [], [], []
        for _ in range(batch):
            question = source.question()
            overviews.append(source.overview(question))
            cell = torch.tensor([[len(COLOURS), len(SHAPES), -1, -1]]).repeat(16, 1)  # a token is a cell: colour, shape, x, y
            for name, plate in question.objects.items():
                colour, shape = name.split()
                x, y = (int(plate[i] + plate[i + 2]) // 16 for i in (0, 1))
                cell[y // CELL * 4 + x // CELL] = torch.tensor([list(COLOURS).index(colour), SHAPES.index(shape), x // 2, y // 2])
            cells.append(cell)
            for _ in range(2):
                name = source.pick(list(question.objects))
                box, (colour, shape) = source.nearby(question, name), name.split()
                readable = shows(tuple(8 * v for v in box), question.objects[name])
                crops.append(source.crop(question, box))
                goals.append([list(COLOURS).index(colour), SHAPES.index(shape), MARKS.index(question.marks[name]) if readable else -1])
        place, goal = torch.cat(cells), torch.tensor(goals)
        overview, crop = features(overviews), features(crops).view(len(crops), 4, -1).mean(1)
        pairs = {"colour": (overview @ table["colour"].T, place[:, 0]), "shape": (overview @ table["shape"].T, place[:, 1]),
                 "x": (heads["x"](overview), place[:, 2]), "y": (heads["y"](overview), place[:, 3]),
                 "crop_colour": (crop @ table["colour"].T, goal[:, 0]), "crop_shape": (crop @ table["shape"].T, goal[:, 1]),
                 "mark": (crop @ table["mark"].T, goal[:, 2])}
        loss = sum(F.cross_entropy(o, t, ignore_index=-1) for o, t in pairs.values())
        return loss, {"loss": loss.item()} | {k: (o.argmax(-1) == t)[t >= 0].float().mean().item() for k, (o, t) in pairs.items()}

    optimise(list(visual.parameters()) + list(heads.parameters()), loss_at, steps, lr, "see", log)


def imitate(policy: Policy, samples: list[tuple[Tokens, list[bool]]], rows: int = 8) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy over the demonstrator's own tokens, and the share predicted exactly. Samples of similar length
    go through the model together, `rows` at a time: a quarter fewer padded tokens."""
    samples, losses, exact = sorted(samples, key=lambda s: len(s[0].ids)), [], []
    for part in (samples[i:i + rows] for i in range(0, len(samples), rows)):
        hidden = policy.hidden([tokens for tokens, _ in part])[0]
        own = torch.zeros(hidden.shape[:2], dtype=torch.bool)  # column t predicts token t + 1
        for row, (_, mask) in enumerate(part):
            own[row, :len(mask) - 1] = torch.tensor(mask[1:])
        targets = torch.tensor([i for tokens, mask in part for i, m in zip(tokens.ids[1:], mask[1:]) if m])
        logits = policy.model.lm_head(hidden[own])
        losses.append(F.cross_entropy(logits, targets, reduction="none"))
        exact.append(logits.argmax(-1) == targets)
    return torch.cat(losses).mean(), torch.cat(exact).float().mean()


def contrast(policy: Policy, pairs: list[tuple[Tokens, str, bool]]) -> tuple[Tensor, Tensor]:
    """InfoNCE between crops and labels (CLIP's loss, on the language model's own summaries) and its accuracy.

    A crop that misses its object is a negative for every label, the hardest for its own."""
    good = torch.tensor([g for *_, g in pairs])
    names = sorted({label for _, label, _ in pairs})  # each is encoded once
    which = torch.tensor([names.index(label) for _, label, _ in pairs])
    embed = policy.embed.__wrapped__  # without its no_grad
    crops, labels = embed(policy, [c for c, *_ in pairs]), embed(policy, names)[which]
    same = which == which[:, None]
    logits = labels @ crops.T / .07                                                     # (labels, crops)
    other = same & good & ~torch.eye(len(pairs), dtype=torch.bool)                      # another crop that fits as well
    target = torch.arange(len(pairs))
    to_crop = logits.masked_fill(other, float("-inf"))[good]
    to_label = logits.T.masked_fill(same & ~torch.eye(len(pairs), dtype=torch.bool), float("-inf"))[good]
    return ((F.cross_entropy(to_crop, target[good]) + F.cross_entropy(to_label, target[good])) / 2,
            (to_crop.argmax(1) == target[good]).float().mean())


def stage_language(policy: Policy, source: Source, name: str, steps: int, batch: int, lr: float, log,
                   gap: float | None = None) -> None:
    """The language model on frozen eyes: box lists (gap None), or demonstrations with the embedding and guesses beside them."""

    def loss_at(step):
        samples, pairs = (source.listings(batch), []) if gap is None else source.demonstrations(batch, gap)
        loss, exact = imitate(policy, samples)
        report = {"loss": loss.item(), "exact": exact.item()}
        if pairs:
            (nce, match), (guess, _) = contrast(policy, pairs), imitate(policy, source.guesses(batch // 2))
            loss = loss + .2 * nce + .5 * guess
            report |= {"nce": nce.item(), "match": match.item(), "guess": guess.item()}
        return loss, report

    optimise(list(policy.language.parameters()), loss_at, steps, lr, name, log)


def embed_by_product(visual: nn.Module) -> None:
    """A patch is one window of the convolution that embeds it, so a matrix product does the same, in a fraction of the time."""
    projection = visual.patch_embed.proj
    projection.forward = lambda patches: F.linear(patches.flatten(1), projection.weight.flatten(1))


def worker(rank: int, ranks: int, out: str, seed: int, scale: float, start: str, port: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    log = (lambda text: print(text, flush=True)) if rank == 0 else (lambda text: None)
    names = list(STAGES)
    stage_folder = lambda stage: Path(out) if stage == names[-1] else Path(f"{out}-{stage}")
    if rank == 0 and start == names[0]:
        build_model(Path(f"{out}-empty"), seed)
    dist.barrier()
    policy = Policy(f"{out}-empty" if start == names[0] else stage_folder(names[names.index(start) - 1]))
    log(f"{sum(p.numel() for p in policy.model.parameters()):,} parameters, {len(policy.tokenizer)} tokens")
    policy.model.train()
    embed_by_product(policy.model.model.visual)
    for number in range(names.index(start), len(names)):
        name, settings = names[number], dict(STAGES[names[number]])
        source = Source(policy, seed * 100 + number, rank, ranks)
        settings["steps"] = max(int(settings["steps"] * scale), 2)
        if name == "see":
            stage_see(policy, source, log=log, **settings)
        else:
            stage_language(policy, source, name, log=log, **settings)
        if rank == 0:
            policy.save(stage_folder(name))
    dist.barrier()
    dist.destroy_process_group()


# batch: scenes a step and process
STAGES = {"see": dict(steps=500, batch=24, lr=2e-3), "aim": dict(steps=1500, batch=12, lr=2e-3),
          "act": dict(steps=420, batch=24, lr=1.5e-3, gap=0.), "habit": dict(steps=400, batch=24, lr=1e-3, gap=.6)}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Build the embedded agent from nothing.")
    parser.add_argument("--out", default="runs/tiny", help="where the model directory goes; stages are saved beside it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1., help="of all steps; 0.003 is a smoke test")
    parser.add_argument("--start", default="see", choices=STAGES, help="continue from the stage before this one")
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    began = time.time()
    torch.multiprocessing.start_processes(
        worker, (args.processes, args.out, args.seed, args.scale, args.start, 29500 + os.getpid() % 2000),
        nprocs=args.processes, start_method="spawn")
    print(f"built {args.out} in {time.time() - began:.0f} s")
