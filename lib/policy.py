"""The vision-language model as a policy: tokens in, tokens out.

What it teaches: everything between a Hugging Face model and an RL loop. Images become features once and placeholders
in the token sequence; M-RoPE gives every token three positions (time, height, width); a `Session` samples a batch of
conversations over several turns in one KV cache, with each question's prompt prefilled once for its whole group; and
`logprobs` recomputes, for training, the log-probabilities of the agent's own tokens only.

One rule holds it together: *the sampler and the trainer evaluate the same distribution*, log_softmax of the logits
over temperature with image placeholders banned, so that the ratio of new to old policy is 1 before a step,
up to rounding (tests/test_policy.py holds the two within 1e-4 in float32, for any padding and batch order).

Run it:  python policy.py            # loads tiny/, samples, recomputes, and prints the largest difference
"""
import functools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer
from transformers.cache_utils import Cache, DynamicLayer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils import logging as transformers_logging

from tools import Resolution, system_prompt

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()


@dataclass
class Tokens:
    """A piece of conversation: token ids, and for each image in it the grid of its placeholders and its features."""
    ids: list[int]
    grids: list[tuple[int, int]] = field(default_factory=list)   # (height, width) in placeholders
    features: list[Tensor] = field(default_factory=list)         # (height x width, D) each, with DeepStack (.., D + k D)
    patches: list[Tensor] = field(default_factory=list)          # what they were computed from, if the vision tower learns

    def __add__(self, other: "Tokens") -> "Tokens":
        return Tokens(self.ids + other.ids, self.grids + other.grids, self.features + other.features, self.patches + other.patches)

    def cut(self, start: int, stop: int | None = None, image: int = 0) -> "Tokens":
        """ids[start:stop], and the images from number `image` on."""
        return Tokens(self.ids[start:stop], self.grids[image:], self.features[image:], self.patches[image:])


def distinct(items: list) -> tuple[list, list[int]]:
    """The different objects among the items, and for each item which of them it is: what is shared is computed once."""
    objects = {id(item): item for item in items}
    place = {key: i for i, key in enumerate(objects)}
    return list(objects.values()), [place[id(item)] for item in items]


def mrope_positions(ids: Tensor, grids: list[tuple[int, int]], image_id: int, start: int = 0) -> tuple[Tensor, int]:
    """M-RoPE (Qwen2-VL, arXiv 2409.12191, sec. 2.1): ids (L,) -> positions (3, L) and the next free position.

    A text token has the same position on all three axes. An image of h x w placeholders starts at p: token (i, j)
    gets (p, p + i, p + j), and what follows it continues at p + max(h, w)."""
    is_image = ids == image_id
    if sum(h * w for h, w in grids) != int(is_image.sum()):
        raise ValueError(f"{int(is_image.sum())} image placeholders for grids {grids}: the counts must agree")
    positions, column, images = torch.empty(3, len(ids), dtype=torch.long), 0, iter(grids)
    while column < len(ids):
        if is_image[column]:
            h, w = next(images)
            grid = torch.stack([torch.zeros(h, w), *torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")])
            positions[:, column:column + h * w] = grid.reshape(3, -1).long() + start
            column, start = column + h * w, start + max(h, w)
        else:
            images_ahead = is_image[column:].nonzero()
            length = int(images_ahead[0]) if len(images_ahead) else len(ids) - column
            positions[:, column:column + length] = torch.arange(start, start + length)
            column, start = column + length, start + length
    return positions, start


def causal(mask: Tensor, new: int) -> Tensor:
    """mask (B, P + L), which columns are real -> (B, 1, L, P + L), which of them each of the `new` = L last ones attends to:
    all real ones before it, and itself (also where it is padding: a softmax over nothing would be NaN)."""
    column = torch.arange(mask.shape[1], device=mask.device)
    query = column[-new:, None]
    return ((mask[:, None] & (column < query)) | (column == query))[:, None]


def recomputed(forward: Callable, *args, **kwargs):
    return checkpoint(forward, *args, use_reentrant=False, **kwargs) if torch.is_grad_enabled() else forward(*args, **kwargs)


class TokenLogprobs(torch.autograd.Function):
    """log softmax(W h / T) at one token a row, and the entropy there, with the backward pass by hand:

        d logp_y / d logits = (1 at y) - p

    Logits are V numbers a token, more than all else of it. They exist for `chunk` tokens at a time, are changed in place, and are
    computed again in the backward pass; autograd would keep several copies of all of them."""

    @staticmethod
    def logits(hidden: Tensor, weight: Tensor, banned: Tensor, temperature: float) -> Tensor:
        """(n, D) -> (n, V) in float32. Banned: finite, so that 0 times it is 0, and too small to have an exp."""
        return F.linear(hidden / temperature, weight).float().index_fill_(-1, banned, -1e30)

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, banned: Tensor, temperature: float,
                chunk: int) -> tuple[Tensor, Tensor]:
        """hidden (N, D), targets (N,) -> logp (N,), and entropy (N,), which has no gradient."""
        logp, entropy, norms = [], [], []
        for h, y in zip(hidden.split(chunk), targets.split(chunk)):
            logits = TokenLogprobs.logits(h, weight, banned, temperature)
            norm = logits.logsumexp(-1, keepdim=True)
            logp.append((logits.gather(-1, y[:, None]) - norm)[:, 0])
            entropy.append(norm[:, 0] - torch.einsum("nv,nv->n", (logits - norm).exp_(), logits))
            norms.append(norm)
        ctx.save_for_backward(hidden, weight, targets, banned, torch.cat(norms))
        ctx.settings = temperature, chunk
        entropy = torch.cat(entropy)
        ctx.mark_non_differentiable(entropy)
        return torch.cat(logp), entropy

    @staticmethod
    def backward(ctx, slope: Tensor, _) -> tuple:
        (hidden, weight, targets, banned, norms), (temperature, chunk) = ctx.saved_tensors, ctx.settings
        to_hidden, to_weight = [], torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for h, y, norm, g in zip(*(x.split(chunk) for x in (hidden, targets[:, None], norms, slope[:, None]))):
            p = TokenLogprobs.logits(h, weight, banned, temperature).sub_(norm).exp_()
            to_logits = p.mul_(-g).scatter_add_(-1, y, g).to(weight.dtype)
            to_hidden.append(to_logits @ weight / temperature)
            if to_weight is not None:
                to_weight.addmm_(to_logits.T, h / temperature)
        return torch.cat(to_hidden), to_weight, None, None, None, None


def read_config(path: str | Path):
    """Of a model directory. A name on the hub is no directory: nothing is downloaded.

    Raises FileNotFoundError for a folder without a model, ValueError for a model of another kind."""
    if not (Path(path) / "config.json").is_file():
        raise FileNotFoundError(f"{path}: no config.json; expected the folder of a Hugging Face model")
    config = AutoConfig.from_pretrained(path)
    if not hasattr(config, "vision_config") or not hasattr(config, "image_token_id"):
        raise ValueError(f"{path}: expected a vision-language model such as qwen2_5_vl, found {config.model_type}")
    return config


class Policy:
    """A model directory of the Qwen2.5-VL or Qwen3-VL family with its tokenizer and image processor."""

    def __init__(self, path: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32, coordinates: str | None = None):
        """coordinates: in what the agent gives its boxes: "pixels" of the image that it sees (Qwen2.5-VL) or "1000", thousandths of
        its sides (Qwen3-VL); None: as the directory's agent.json says, else pixels.

        Raises what read_config raises."""
        self.path, config = Path(path), read_config(path)
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        # AutoProcessor would ask for torchvision, because of video; the two parts that we need do not
        self.processor = Qwen2VLImageProcessorPil.from_pretrained(path)
        self.model = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype).to(device).eval()
        self.device, self.image_id = torch.device(device), config.image_token_id
        self.language = self.model.model.language_model
        size, merge = self.processor.size, self.processor.merge_size
        self.merge = merge
        self.resolution = Resolution(self.processor.patch_size * merge, size["shortest_edge"], size["longest_edge"])
        note = self.path / "agent.json"  # our own models bring theirs; others get the prompt in tools.py
        agent = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else {}
        self.coordinates = coordinates or agent.get("coordinates", "pixels")
        self.system_prompt = agent.get("system_prompt", system_prompt(self.coordinates))
        self.encode = functools.lru_cache(4096)(functools.partial(self.tokenizer.encode, add_special_tokens=False))  # most pieces come again
        self.value_head: torch.nn.Linear | None = None  # only PPO has one
        self.train_vision = False                       # True: images keep their patches, and are encoded again where gradients are
        self.end_id = self.tokenizer.convert_tokens_to_ids("<|im_end|>")
        vision = {"<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"}
        self.banned = torch.tensor([i for t, i in self.tokenizer.get_added_vocab().items() if t in vision], device=device)
        pieces = self.tokenizer.convert_ids_to_tokens(range(len(self.tokenizer)))
        vocabulary = self.model.get_output_embeddings().weight.shape[0]  # may be larger than the tokenizer's
        self.closes = torch.tensor([">" in (p or "") for p in pieces] + [False] * (vocabulary - len(pieces)), device=device)

    def add_value_head(self) -> None:
        """V(state), a linear map of the hidden state from which the next token is chosen, for PPO. It starts at 0, reads the
        policy's hidden states without gradient, and so never disturbs the policy."""
        self.value_head = torch.nn.Linear(self.model.get_input_embeddings().embedding_dim, 1, device=self.device)
        torch.nn.init.zeros_(self.value_head.weight)
        torch.nn.init.zeros_(self.value_head.bias)

    def learners(self, vision: bool = False) -> list[torch.nn.Parameter]:
        """Freeze the model but for its language model and, with `vision`, its vision tower; returns what learns."""
        self.train_vision = vision
        self.model.requires_grad_(False)
        return [p.requires_grad_() for name, p in self.model.named_parameters() if vision or "visual" not in name]

    def recompute_layers(self) -> None:
        """Activation checkpointing: backward computes each layer again, and none is stored.
        (transformers' own switch turns the cache off, and with it the sharing of prompts.)"""
        for layer in [*self.language.layers, *self.model.model.visual.blocks]:
            layer.forward = functools.partial(recomputed, layer.forward)

    def space(self, seen: tuple[int, int]) -> tuple[int, int]:
        """The range of the boxes' coordinates for an image that is seen at (width, height) pixels."""
        return seen if self.coordinates == "pixels" else (1000, 1000)

    # ---- text and images -> Tokens -----------------------------------------------------------------------------

    def encode_images(self, images: list[Image.Image]) -> list[Tokens]:
        """Placeholders with features, one `Tokens` an image. The images have the size that the model shall see.

        Without gradients: where the vision tower is frozen, an image is encoded once for sampling, training and score."""
        if not images:
            return []
        batch = self.processor(images=images, do_resize=False, return_tensors="pt")
        grids = [(h // self.merge, w // self.merge) for _, h, w in batch["image_grid_thw"].tolist()]
        patches = batch["pixel_values"].split([h * w * self.merge ** 2 for h, w in grids])
        with torch.no_grad():
            features = self.see(patches, grids)
        return [Tokens([self.image_id] * (h * w), [(h, w)], [f], [p] if self.train_vision else [])
                for (h, w), f, p in zip(grids, features, patches)]

    def see(self, patches: Sequence[Tensor], grids: list[tuple[int, int]]) -> list[Tensor]:
        """The vision tower: the processor's patches of each image -> its features."""
        shapes = torch.tensor([[1, h * self.merge, w * self.merge] for h, w in grids], device=self.device)
        output = self.model.get_image_features(torch.cat(patches).to(self.device, self.model.dtype), shapes)
        layers = [output.pooler_output, *(getattr(output, "deepstack_features", None) or [])]  # Qwen3-VL has the latter
        return [torch.cat(f, -1) for f in zip(*layers)]

    def features(self, batch: list[Tokens]) -> list[Tensor]:
        """Of all images in the batch; with gradients, if the vision tower learns. Images that rows share are encoded once."""
        if not self.train_vision or not torch.is_grad_enabled():
            return [f for t in batch for f in t.features]
        patches, which = distinct([p for t in batch for p in t.patches])
        grids = dict(zip(which, [g for t in batch for g in t.grids]))
        seen = self.see(patches, [grids[i] for i in range(len(patches))]) if patches else []
        return [seen[i] for i in which]

    def tokens(self, *parts: "str | Tokens") -> Tokens:
        """Concatenate texts and encoded images. Text is trusted: special tokens in it become special tokens."""
        result = Tokens([])
        for part in parts:
            result = result + (Tokens(list(self.encode(part))) if isinstance(part, str) else part)
        return result

    def prompt(self, image: Tokens, text: str) -> Tokens:
        """The conversation's opening in ChatML: system prompt (unless empty), image, question, the agent's turn."""
        system = f"<|im_start|>system\n{self.system_prompt}<|im_end|>\n" if self.system_prompt else ""
        text = text.replace("<|", "< |")  # a question must not smuggle in special tokens
        return self.tokens(f"{system}<|im_start|>user\n<|vision_start|>", image,
                           f"<|vision_end|>{text}<|im_end|>\n<|im_start|>assistant\n")

    def observation(self, content: "Tokens | str") -> Tokens:
        """What the tool returned, as a user turn after the agent's: a crop, or an error's text."""
        if isinstance(content, Tokens):
            content = self.tokens("<|vision_start|>", content, "<|vision_end|>")
        return self.tokens("<|im_end|>\n<|im_start|>user\n<tool_response>", content,
                           "</tool_response><|im_end|>\n<|im_start|>assistant\n")

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    # ---- Tokens -> hidden states -------------------------------------------------------------------------------

    def hidden(self, batch: list[Tokens], starts: list[int] | None = None, left: bool = False, past: Tensor | None = None,
               cache: Cache | None = None) -> tuple[Tensor, Tensor, list[int]]:
        """The language model over a padded batch: last hidden states (B, L, D), mask (B, P + L), next positions (B).

        With a cache, the batch continues conversations whose mask was `past` (B, P) and whose positions go on at `starts`."""
        longest = max(len(t.ids) for t in batch)
        ids = torch.full((len(batch), longest), self.end_id)
        mask = torch.zeros(len(batch), longest, dtype=torch.bool)
        positions = torch.zeros(3, len(batch), longest, dtype=torch.long)
        ends = []
        for row, (tokens, start) in enumerate(zip(batch, starts or [0] * len(batch))):
            n = len(tokens.ids)
            span = slice(longest - n, None) if left else slice(0, n)
            row_ids = torch.tensor(tokens.ids)
            ids[row, span], mask[row, span] = row_ids, True
            positions[:, row, span], end = mrope_positions(row_ids, tokens.grids, self.image_id, start)
            ends.append(end)
        ids, mask, positions = ids.to(self.device), mask.to(self.device), positions.to(self.device)
        mask = mask if past is None else torch.cat([past, mask], 1)
        embeddings, more = self.language.embed_tokens(ids), {}
        if features := self.features(batch):
            images, width = ids == self.image_id, embeddings.shape[-1]
            first, *deeper = torch.cat(features).to(embeddings).split(width, -1)
            embeddings = embeddings.masked_scatter(images[..., None], first)
            if deeper:  # DeepStack (arXiv 2406.04334): later vision features join in the next layers
                more = {"visual_pos_masks": images, "deepstack_visual_embeds": deeper}
        attended = None if cache is None and not left else causal(mask, longest)  # padding at the end is after all that is real
        return self.language(inputs_embeds=embeddings, attention_mask=attended, position_ids=positions,
                             past_key_values=cache, use_cache=cache is not None, **more).last_hidden_state, mask, ends

    def hidden_after(self, batch: list[Tokens], prompts: list[Tokens]) -> Tensor:
        """Hidden states (B, L, D) of whole sequences from the last token of their prompts on. A prompt that several rows
        share (the same object) is computed once, and gradients flow back through its keys and values."""
        shared, which = distinct(prompts)
        index = torch.tensor(which, device=self.device)
        cache = Cache(layer_class_to_replicate=Repeatable)
        _, past, ends = self.hidden([p.cut(0, -1) for p in shared], left=True, cache=cache)
        layers = [Repeatable((layer.keys.index_select(0, index), layer.values.index_select(0, index))) for layer in cache.layers]
        rest = [t.cut(len(p.ids) - 1, image=len(p.grids)) for t, p in zip(batch, prompts)]
        return self.hidden(rest, [ends[i] for i in which], past=past[index], cache=Cache(layers=layers))[0]

    # ---- the one distribution ----------------------------------------------------------------------------------

    def log_softmax(self, hidden: Tensor, temperature: float) -> Tensor:
        """(..., D) -> log-probabilities (..., V) in float32: what is sampled from, and what is trained. (Not by F.log_softmax: on the
        CPU it adds up one after the other, and was off by 2e-4 over 151,936 words; logsumexp adds pairwise.)"""
        logits = TokenLogprobs.logits(hidden, self.model.lm_head.weight, self.banned, temperature)
        return logits - logits.logsumexp(-1, keepdim=True)

    def logprobs(self, batch: list[Tokens], masks: list[list[bool]], temperature: float = 1.0, chunk: int = 512,
                 prompts: list[Tokens] | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities of the tokens where a row's mask is true, the entropies there, and the values of the states in
        which they were chosen (0 without a value head), each (B, L - 1).

        Column t speaks of token t + 1; everything else is 0. Logits exist only at masked positions, `chunk` at a
        time: memory never holds (B, L, V). `prompts`: how each row begins (mask false); rows that share the object
        share its computation."""
        hidden = self.hidden_after(batch, prompts) if prompts else self.hidden(batch)[0]
        skipped = [len(p.ids) - 1 for p in prompts] if prompts else [0] * len(batch)
        own = torch.zeros(len(batch), max(len(t.ids) for t in batch) - 1, dtype=torch.bool)  # in whole sequences ..
        at = torch.zeros(hidden.shape[:2], dtype=torch.bool)                                 # .. and in `hidden`
        for row, (mask, skip) in enumerate(zip(masks, skipped)):
            own[row, :len(mask) - 1] = torch.tensor(mask[1:])
            at[row, :len(mask) - 1 - skip] = own[row, skip:len(mask) - 1]
        targets = torch.tensor([i for t, mask in zip(batch, masks) for i, m in zip(t.ids[1:], mask[1:]) if m], device=self.device)
        own, own_hidden = own.to(self.device), hidden[at.to(self.device)]

        logp, entropy = TokenLogprobs.apply(own_hidden, self.model.lm_head.weight, targets, self.banned, temperature, chunk)
        values = self.value_head(own_hidden.detach().float())[:, 0] if self.value_head else torch.zeros_like(logp)
        zeros = torch.zeros(own.shape, device=self.device)
        return zeros.masked_scatter(own, logp), zeros.masked_scatter(own, entropy), zeros.masked_scatter(own, values)

    # ---- the frozen model as an encoder ------------------------------------------------------------------------

    @torch.no_grad()
    def embed(self, items: "list[str | Tokens]", chunk: int = 256) -> Tensor:
        """Texts and encoded images -> unit vectors (N, D) in one space: the last hidden state after asking for a
        summary in one word (E5-V, arXiv 2407.12580, sec. 3.1), so no CLIP is needed."""
        rows = []
        for start in range(0, len(items), chunk):
            batch = []
            for item in items[start:start + chunk]:
                image = isinstance(item, Tokens)
                parts = ("<|vision_start|>", item, "<|vision_end|>") if image else (item.replace("<|", "< |"),)
                batch.append(self.tokens("<|im_start|>user\n", *parts, f"\nSummary above {'image' if image else 'sentence'} "
                                         "in one word:<|im_end|>\n<|im_start|>assistant\n"))
            last = torch.tensor([len(t.ids) - 1 for t in batch], device=self.device)
            rows.append(self.hidden(batch)[0][torch.arange(len(batch), device=self.device), last].float())
        return F.normalize(torch.cat(rows), dim=-1)

    def save(self, folder: str | Path) -> None:
        """Write a standard model directory, which this class and transformers load."""
        folder = Path(folder)
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        self.processor.save_pretrained(folder)
        (folder / "agent.json").write_text(json.dumps({"coordinates": self.coordinates, "system_prompt": self.system_prompt}), encoding="utf-8")


class Repeatable(DynamicLayer):
    """A cache layer for training: `past` and what comes now. It forgets what came before, so that activation
    checkpointing may run the same update twice."""

    def __init__(self, past: tuple[Tensor, Tensor] | None = None):
        super().__init__()
        self.past = past

    def update(self, keys: Tensor, values: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if self.past:
            keys, values = torch.cat([self.past[0], keys], 2), torch.cat([self.past[1], values], 2)
        self.keys, self.values, self.is_initialized = keys, values, True
        return keys, values
