"""The vision-language model as a policy: tokens in, tokens out.

What it teaches: what stands between a Hugging Face model and an RL loop.

    an image  -> features, and a placeholder id for each of them      encode_images
    a text    -> ids                                                  tokens, prompt, observation
    ids       -> a hidden state for each token                        hidden, hidden_after
    a state   -> one distribution over the next token                 log_softmax
    sequences -> log-probabilities of the agent's own tokens          own_states, logprobs

The one distribution, for a hidden state h, the model's last matrix W and a temperature T, is

    log pi(token | h) = log_softmax(W h / T), without the ids of VISION below

An agent that wrote a word of VISION would claim an image that is not there. So these words are
banned when it samples, and in the trainer's softmax as well: if the two differed, the ratio of the
new policy to the old one would not be 1 before a step. It is, within 1e-4 in float32, for any
padding, any order of the batch and any number of turns.

Run it:  python -m lib.policy      # a small picture: its tokens, positions, log-probabilities
"""
import functools
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer
from transformers.cache_utils import Cache, DynamicLayer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils import logging as transformers_logging

from tools import Resolution, fit, system_prompt

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()

VISION = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
FAMILIES = ("qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
SLOT = "{slot}"                         # stands for a text in a rendered chat template


@dataclass
class Tokens:
    """A piece of a conversation: its ids, and for each image in it a grid and features."""
    ids: list[int]
    grids: list[tuple[int, int]] = field(default_factory=list)  # (height, width) in placeholders
    features: list[Tensor] = field(default_factory=list)  # (height * width, D) each

    def __add__(self, other: "Tokens") -> "Tokens":
        return Tokens(self.ids + other.ids, self.grids + other.grids,
                      self.features + other.features)


class Policy:
    """A model directory of the Qwen2.5-VL or Qwen3-VL family."""

    def __init__(self, path: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32,
                 coordinates: str | None = None):
        """coordinates: the units of the agent's boxes. "pixels": of the image that it sees
        (Qwen2.5-VL). "1000": thousandths of its sides (Qwen3-VL). None: as agent.json says, else
        as the model's family has them."""
        config = read_config(path)
        self.tokenizer, self.processor, model = read_model(path, dtype)
        self.model, self.device = model.to(device).eval(), torch.device(device)
        self.language = self.model.model.language_model

        self.merge = self.processor.merge_size  # a placeholder stands for merge x merge patches
        size = self.processor.size
        self.resolution = Resolution(self.processor.patch_size * self.merge, size["shortest_edge"],
                                     size["longest_edge"], int(self.processor.resample))

        note = Path(path) / "agent.json"  # how an agent of ours was taught to speak
        agent = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else {}
        usual = usual_coordinates(config.model_type)
        self.coordinates = coordinates or agent.get("coordinates", usual)
        self.system_prompt = agent.get("system_prompt", system_prompt(self.coordinates))

        words = self.tokenizer.get_added_vocab()
        self.positions = config.get_text_config().max_position_embeddings
        self.image_id, self.end_id = config.image_token_id, words["<|im_end|>"]
        self.banned = torch.tensor([words[word] for word in VISION if word in words], device=device)
        ends = model.generation_config.eos_token_id or []       # a number, a list, or None
        self.end_ids = {self.end_id, words.get("<|endoftext|>", self.end_id),
                        *(ends if isinstance(ends, list) else [ends])}
        # Qwen's templates put a line break on both sides of what a tool returned; tiny/'s has none.
        # A made-up conversation shows which this is.
        shown = self.chat([{"role": "user", "content": ""}, {"role": "tool", "content": SLOT}])
        self.line_break = "\n" if f"<tool_response>\n{SLOT}" in shown else ""

    def space(self, seen: tuple[int, int]) -> tuple[int, int]:
        """The range of a box's coordinates, if the image is seen at (width, height) pixels."""
        return seen if self.coordinates == "pixels" else (1000, 1000)

    # ---- images and texts -> Tokens

    @torch.no_grad()
    def encode_images(self, images: list[Image.Image]) -> list[Tokens]:
        """The vision tower. The images have the size that the model shall see."""
        if not images:
            return []
        batch = self.processor(images=images, do_resize=False, return_tensors="pt")
        shapes = batch["image_grid_thw"].to(self.device)  # time, height, width in patches
        patches = batch["pixel_values"].to(self.device, self.model.dtype)
        output = self.model.get_image_features(patches, shapes)
        # Qwen3-VL has DeepStack (arXiv 2406.04334): features of inner layers of the tower as well.
        # They stand beside the last ones: an image's features are (height * width, several D).
        layers = [output.pooler_output, *(getattr(output, "deepstack_features", None) or [])]
        encoded = []
        for (_, height, width), *parts in zip(shapes.tolist(), *layers):
            features, grid = torch.cat(parts, -1), (height // self.merge, width // self.merge)
            encoded.append(Tokens([self.image_id] * len(features), [grid], [features]))
        return encoded

    def tokens(self, *parts: "str | Tokens") -> Tokens:
        """Join texts and encoded images. Text is trusted: special tokens in it become special."""
        result = Tokens([])
        for part in parts:
            if isinstance(part, str):
                part = Tokens(self.tokenizer.encode(part, add_special_tokens=False))
            result = result + part
        return result

    def prompt(self, image: Tokens, text: str) -> Tokens:
        """How a conversation opens, by the directory's chat template: system prompt, image, text.
        Without a system prompt the template may write one of its own (Qwen2.5-VL's does)."""
        messages = [{"role": "user", "content": SLOT}]
        if self.system_prompt:
            messages.insert(0, {"role": "system", "content": self.system_prompt})
        before, after = self.chat(messages).rsplit(SLOT, 1)
        return self.tokens(f"{before}<|vision_start|>", image,
                           f"<|vision_end|>{harmless(text)}{after}")

    def observation(self, content: "Tokens | str") -> Tokens:
        """What the tool returned, as a user turn after the agent's: a crop, or an error's text."""
        if isinstance(content, Tokens):
            content = self.tokens("<|vision_start|>", content, "<|vision_end|>")
        edge = self.line_break
        return self.tokens(f"<|im_end|>\n<|im_start|>user\n<tool_response>{edge}", content,
                           f"{edge}</tool_response><|im_end|>\n<|im_start|>assistant\n")

    def chat(self, messages: list[dict]) -> str:
        return self.tokenizer.apply_chat_template(messages, tokenize=False,
                                                  add_generation_prompt=True)

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    # ---- Tokens -> hidden states

    def hidden(self, batch: list[Tokens], starts: list[int] | None = None,
               real: Tensor | None = None, cache: Cache | None = None
               ) -> tuple[Tensor, Tensor, list[int]]:
        """The language model over rows of tokens, padded at their ends.

        Returns the last hidden states (B, L, D), which columns are real (B, P + L), and each row's
        next free position. A cache that is given gets L more columns. If it held P columns before,
        `real` (B, P) says which of them are not padding, and `starts` where positions go on."""
        positions, ends = [], []
        for tokens, start in zip(batch, starts or [0] * len(batch)):
            row, end = mrope_positions(tokens.ids, tokens.grids, self.image_id, start)
            positions.append(row)
            ends.append(end)
        ids = padded([t.ids for t in batch], self.end_id).to(self.device)  # (B, L)
        mask = padded([[True] * len(t.ids) for t in batch], False).to(self.device)  # (B, L)
        positions = padded(positions, (0, 0, 0)).permute(2, 0, 1).to(self.device)  # (3, B, L)

        embeddings, deepstack = self.with_images(ids, batch)
        # A first batch      a b c .      Padding (.) stands after all that is real. So it is enough
        #                    d . . .      that a token attends to what is before it: mask None.
        # Then e, f g come   a b c . e .  Now padding stands in between, and the mask must say which
        #                    d . . . f g  columns are real.
        attended = None
        if real is not None:
            mask = torch.cat([real, mask], 1)
            attended = causal(mask, ids.shape[1])
        output = self.language(inputs_embeds=embeddings, attention_mask=attended,
                               position_ids=positions, past_key_values=cache,
                               use_cache=cache is not None, **deepstack)
        return output.last_hidden_state, mask, ends

    def with_images(self, ids: Tensor, batch: list[Tokens]) -> tuple[Tensor, dict]:
        """Embeddings (B, L, D) of ids (B, L): an image's features take its placeholders' places.
        Those of inner layers (DeepStack) are added by the language model's own layers."""
        embeddings = self.language.embed_tokens(ids)
        features = [feature for tokens in batch for feature in tokens.features]
        if not features:
            return embeddings, {}
        is_image = ids == self.image_id
        last, *inner = torch.cat(features).to(embeddings).split(embeddings.shape[-1], -1)
        embeddings = embeddings.masked_scatter(is_image[..., None], last)
        if not inner:
            return embeddings, {}
        return embeddings, {"visual_pos_masks": is_image, "deepstack_visual_embeds": inner}

    def hidden_after(self, batch: list[Tokens], prompts: list[Tokens]) -> Tensor:
        """Hidden states (B, L, D) of sequences, from the last token of their prompts on: what
        hidden(batch) gives there, in less time. A prompt that several rows share (the same object)
        is computed once. Three rows, two of which have the prompt p p P, one q q Q:

            1. the prompts, without      2. their keys and values,    3. the rows' rests go on
               their last tokens            repeated for each row        behind them
                   p p                          p p                          P a a
                   q q                          p p                          P b
                                                q q                          Q c c

        P is fed with the rows because the state at P predicts the agent's first token. The
        gradients of all rows add up in the keys and values that they share. (FirstKept and After,
        below, are layers of a cache that also works under recompute_layers.)"""
        shared, which = distinct(prompts)
        openings = [Tokens(p.ids[:-1], p.grids, p.features) for p in shared]
        once = Cache(layer_class_to_replicate=FirstKept)       # a FirstKept() for each layer
        _, real, ends = self.hidden(openings, cache=once)      # real columns; next positions

        rows = torch.tensor(which, device=self.device)
        layers = []
        for layer in once.layers:
            layers.append(After(layer.keys.index_select(0, rows),
                                layer.values.index_select(0, rows)))
        rests = []
        for tokens, prompt in zip(batch, prompts):
            length, images = len(prompt.ids), len(prompt.grids)
            rests.append(Tokens(tokens.ids[length - 1:], tokens.grids[images:],
                                tokens.features[images:]))
        starts = [ends[i] for i in which]
        return self.hidden(rests, starts, real[rows], Cache(layers=layers))[0]

    # ---- hidden states -> the one distribution

    def log_softmax(self, hidden: Tensor, temperature: float) -> Tensor:
        """(.., D) -> log-probabilities (.., V) in float32."""
        return log_softmax(hidden, self.model.lm_head.weight, self.banned, temperature)

    def own_states(self, batch: list[Tokens], masks: list[list[bool]],
                   prompts: list[Tokens] | None = None) -> tuple[Tensor, Tensor]:
        """The states in which the agent chose its tokens, which are those where a mask is true.

        Returns the states (n, D), row by row, and where they belong, own (B, L - 1): column t
        speaks of token t + 1. `prompts`: how each row begins (mask false). Then hidden_after gives
        no states of a prompt but its last one: it skips len(prompt) - 1 of them."""
        if prompts:
            states = self.hidden_after(batch, prompts)
            skipped = [len(prompt.ids) - 1 for prompt in prompts]
        else:
            states = self.hidden(batch)[0]
            skipped = [0] * len(batch)
        own = padded(masks, False)[:, 1:].to(self.device)
        row, column = own.nonzero(as_tuple=True)
        return states[row, column - torch.tensor(skipped, device=self.device)[row]], own

    def logprobs(self, batch: list[Tokens], masks: list[list[bool]], temperature: float = 1.0,
                 prompts: list[Tokens] | None = None, chunk: int = 512) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the agent's tokens, and entropies of the distributions from which
        they were chosen, each (B, L - 1): column t speaks of token t + 1; 0 at other tokens."""
        states, own = self.own_states(batch, masks, prompts)
        targets = padded([t.ids for t in batch], self.end_id)[:, 1:].to(self.device)[own]  # (n,)
        logp, entropy = TokenLogprobs.apply(states, self.model.lm_head.weight, targets,
                                            self.banned, temperature, chunk)
        zeros = torch.zeros(own.shape, device=self.device)
        return zeros.masked_scatter(own, logp), zeros.masked_scatter(own, entropy)

    # ---- the frozen model as an encoder of texts and images

    @torch.no_grad()
    def embed(self, items: "list[str | Tokens]", chunk: int = 256) -> Tensor:
        """Texts and encoded images -> unit vectors (N, D) in one space, without CLIP.

        E5-V (arXiv 2407.12580, sec. 3.1): ask for a summary in one word. The state from which the
        model would say this word is the embedding. chunk: items in memory at a time."""
        states = []
        for start in range(0, len(items), chunk):
            batch = [self.summary_prompt(item) for item in items[start:start + chunk]]
            states.append(last_state(self.hidden(batch)[0], batch).float())
        return F.normalize(torch.cat(states), dim=-1)

    def summary_prompt(self, item: "str | Tokens") -> Tokens:
        if isinstance(item, str):
            parts = [harmless(item), "\nSummary above sentence in one word:"]
        else:
            parts = ["<|vision_start|>", item, "<|vision_end|>\nSummary above image in one word:"]
        return self.tokens("<|im_start|>user\n", *parts, "<|im_end|>\n<|im_start|>assistant\n")

    # ---- training and saving

    def freeze_vision(self) -> list[torch.nn.Parameter]:
        """Only the language model learns: returns its parameters. So an image's features never
        change, and it is encoded once for sampling, training and the semantic score."""
        self.model.requires_grad_(True)
        self.model.model.visual.requires_grad_(False)
        return [p for p in self.model.parameters() if p.requires_grad]

    def recompute_layers(self) -> None:
        """Activation checkpointing: the backward pass computes each layer again, none is stored.
        (transformers' own switch turns the cache off, and with it the sharing of prompts.)"""
        for layer in self.language.layers:
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False,
                                              preserve_rng_state=False)    # nothing is random

    def save(self, folder: str | Path) -> None:
        """Write a standard model directory, which this class and transformers load."""
        for part in (self.model, self.tokenizer, self.processor):
            part.save_pretrained(folder)
        agent = {"coordinates": self.coordinates, "system_prompt": self.system_prompt}
        (Path(folder) / "agent.json").write_text(json.dumps(agent), encoding="utf-8")


# ---- the parts, in the order in which they are met above

def read_config(path: str | Path):
    """Of a model directory: nothing is downloaded, and no code that it brings is run.

    Raises FileNotFoundError for a folder without a model, ValueError for another kind of model."""
    if not (Path(path) / "config.json").is_file():
        raise FileNotFoundError(f"{path}: no config.json; expected a Hugging Face model's folder, "
                                "or a run with a checkpoint. Nothing is downloaded")
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:                      # transformers raises many kinds
        raise ValueError(f"{path}: config.json cannot be used: {error}") from error
    if config.model_type not in FAMILIES:
        raise ValueError(f"{path}: expected one of {', '.join(FAMILIES)}, "
                         f"found {config.model_type}")
    return config


def read_model(path: str | Path, dtype: torch.dtype) -> tuple:
    """Tokenizer, image processor, model. Raises ValueError with the names of wrong weights:
    transformers only logs that one is missing, and goes on with random numbers."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        # AutoProcessor asks for torchvision, because of video. The two parts that we need do not.
        processor = Qwen2VLImageProcessorPil.from_pretrained(path)
        model, found = AutoModelForImageTextToText.from_pretrained(
            path, dtype=dtype, trust_remote_code=False, output_loading_info=True,
            ignore_mismatched_sizes=True)
    except Exception as error:
        raise ValueError(f"{path}: cannot be loaded as a model: {error}") from error
    wrong = {"missing": found["missing_keys"], "unknown": found["unexpected_keys"],
             "of another shape": [name for name, *_ in found["mismatched_keys"]],
             "not finite": not_finite(model)}
    for what, names in wrong.items():
        if names:
            raise ValueError(f"{path}: expected all weights of the model and no others, "
                             f"found {len(names)} {what}: {', '.join(sorted(names)[:5])}")
    return tokenizer, processor, model


def usual_coordinates(model_type: str) -> str:
    """In what a family gives boxes, if nothing else is said."""
    return "1000" if model_type.startswith("qwen3_vl") else "pixels"


def not_finite(model: torch.nn.Module) -> list[str]:
    """The names of the weights that hold a NaN or an infinity."""
    return [name for name, p in model.named_parameters() if not p.isfinite().all()]


def harmless(text: str) -> str:
    """Text from outside must not smuggle in control tokens, such as <|im_end|> or <|image_pad|>."""
    return text.replace("<|", "< |")


def mrope_positions(ids: list[int], grids: list[tuple[int, int]], image_id: int, start: int = 0
                    ) -> tuple[list[tuple[int, int, int]], int]:
    """M-RoPE (Qwen2-VL, arXiv 2409.12191, sec. 2.1): time, height and width of each token.

    In a text token the three are equal. An image of h x w placeholders starts at p: placeholder
    (i, j) has (p, p + i, p + j), and what follows the image goes on at p + max(h, w).
    Returns the positions, and the next free one."""
    positions, images = [], iter(grids)
    while len(positions) < len(ids):
        if ids[len(positions)] == image_id:
            height, width = next(images)
            for i in range(height):
                for j in range(width):
                    positions.append((start, start + i, start + j))
            start += max(height, width)
        else:
            positions.append((start, start, start))
            start += 1
    return positions, start


def padded(rows: list[list], fill) -> Tensor:
    """Lists of different lengths -> (B, L), or (B, L, 3) if their items are positions."""
    longest = max(len(row) for row in rows)
    return torch.tensor([row + [fill] * (longest - len(row)) for row in rows])


def causal(mask: Tensor, new: int) -> Tensor:
    """Which columns are real, (B, P + L) -> to which each of the last L = `new` ones attends,
    (B, 1, L, P + L): to the real ones before it and to itself, even if it is padding: a softmax
    over nothing would be NaN."""
    column = torch.arange(mask.shape[1], device=mask.device)
    query = column[-new:, None]  # (L, 1)
    real_before = mask[:, None] & (column < query)  # (B, L, P + L)
    return (real_before | (column == query))[:, None]


def last_state(states: Tensor, batch: list[Tokens]) -> Tensor:
    """Hidden states (B, L, D) -> that of each row's last token (B, D)."""
    last = torch.tensor([len(tokens.ids) - 1 for tokens in batch], device=states.device)
    return states[torch.arange(len(batch), device=states.device), last]


def distinct(items: list) -> tuple[list, list[int]]:
    """The different objects among the items, and the place of each item among them: what is
    shared is computed once."""
    objects = list({id(item): item for item in items}.values())
    place = {id(item): i for i, item in enumerate(objects)}
    return objects, [place[id(item)] for item in items]


# Two layers of a cache, for hidden_after. With recompute_layers each layer of the model runs twice,
# once forward and again in backward. transformers' own DynamicLayer would append its keys twice.

class FirstKept(DynamicLayer):
    """Keeps the keys and values (B, heads, columns, head size) of the first run, to which the rows'
    gradients flow. Those of the second run are the same numbers, and would keep the layer's whole
    autograd graph in memory: 5 GB in a micro-batch of a 3B (docs/gpu.md)."""

    def update(self, keys: Tensor, values: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.keys, self.values, self.is_initialized = keys, values, True
        return keys, values


class After(DynamicLayer):
    """The keys and values of the past, and behind them those that come now, which are not kept."""

    def __init__(self, past_keys: Tensor, past_values: Tensor):
        super().__init__()
        self.past_keys, self.past_values = past_keys, past_values

    def update(self, keys: Tensor, values: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        return torch.cat([self.past_keys, keys], 2), torch.cat([self.past_values, values], 2)


def log_softmax(hidden: Tensor, weight: Tensor, banned: Tensor, temperature: float) -> Tensor:
    """log_softmax(W h / T): (.., D) -> (.., V) in float32."""
    logits = F.linear(hidden / temperature, weight).float()
    logits.index_fill_(-1, banned, -1e30)   # its exp is 0; and finite, so that 0 times it is 0
    # logsumexp adds pairwise. F.log_softmax adds one number after the other on the CPU, and was
    # off by 2e-4 over 151,936 words.
    logits -= logits.logsumexp(-1, keepdim=True)
    return logits


class TokenLogprobs(torch.autograd.Function):
    """The log-probability of one token a row, and the entropy there.

    A token's V log-probabilities are more numbers than all else of it, and autograd would keep
    several copies. Here they exist for `chunk` tokens at a time, once forward and once backward.
    So the gradient is written by hand; logits = W h / T, p are the probabilities, y is the token:

        d log pi(y) / d logits = (1 at y) - p =: g,  d / d h = g W / T,  d / d W = g^T h / T
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, banned: Tensor,
                temperature: float, chunk: int) -> tuple[Tensor, Tensor]:
        """hidden (n, D), targets (n,) -> log-probabilities (n,), entropies (n,; no gradient)."""
        ctx.save_for_backward(hidden, weight, targets, banned)
        ctx.temperature, ctx.chunk = temperature, chunk
        logps, entropies = [], []
        for h, y in zip(hidden.split(chunk), targets.split(chunk)):
            logp = log_softmax(h, weight, banned, temperature)  # (chunk, V)
            logps.append(logp.gather(-1, y[:, None])[:, 0])
            entropies.append(-logp.exp().mul_(logp).sum(-1))
        entropy = torch.cat(entropies)
        ctx.mark_non_differentiable(entropy)
        return torch.cat(logps), entropy

    @staticmethod
    def backward(ctx, slope: Tensor, _) -> tuple:
        """slope (n,): d loss / d log-probability of each token."""
        hidden, weight, targets, banned = ctx.saved_tensors
        to_hidden, to_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        for start in range(0, len(hidden), ctx.chunk):
            part = slice(start, start + ctx.chunk)
            h, g, y = hidden[part], slope[part, None], targets[part, None]
            p = log_softmax(h, weight, banned, ctx.temperature).exp_()  # (chunk, V)
            to_logits = p.mul_(-g).scatter_add_(-1, y, g).to(weight.dtype)
            to_hidden[part] = to_logits @ weight / ctx.temperature
            to_weight.addmm_(to_logits.T, h / ctx.temperature)
        return to_hidden, to_weight, None, None, None, None


def demonstrate() -> None:
    """One picture, one question, one thought of the agent in tiny/."""
    torch.set_num_threads(1)
    policy = Policy("tiny")
    picture = Image.new("RGB", (72, 48), "red")
    image = policy.encode_images([fit(picture, policy.resolution)])[0]
    prompt = policy.prompt(image, "What mark is on the red circle?")
    said = policy.tokens("<think>find the red circle</think>")
    whole = prompt + said
    positions, _ = mrope_positions(whole.ids, whole.grids, policy.image_id)
    mask = [False] * len(prompt.ids) + [True] * len(said.ids)
    with torch.no_grad():
        logp, _ = policy.logprobs([whole], [mask])

    print(f"72 x 48 pixels: {image.grids[0][0]} x {image.grids[0][1]} placeholders with features "
          f"{tuple(image.features[0].shape)}\n\n  id  time, height, width  log pi  token")
    for t, (i, position) in enumerate(zip(whole.ids, positions)):
        own = f"{logp[0, t - 1]:.3f}" if mask[t] else ""
        print(f"{i:4}  {str(position):19}  {own:>6}  {policy.decode([i])!r}")


if __name__ == "__main__":
    demonstrate()
