"""What the agent can do: parse and check one tool call, and run it on the image.

What it teaches: model output is *hostile input*. A turn of text becomes exactly one of three things: a `Call`, an
`Answer`, or a `ToolError` whose message the agent reads as its next observation. Nothing here evaluates, trusts
or waits for what a model wrote, and every length is bounded.

    <think>...</think><tool_call>{"name": "image_zoom_in_tool",
        "arguments": {"label": "the red sign", "bbox_2d": [x1, y1, x2, y2]}}</tool_call>

MAPO makes `label` mandatory and puts it first: say what you look for, *then* look. The box is in pixels of the image
that the model saw; the crop is cut from the original, and one function, `to_original`, maps between the two.

Run it:  python tools.py            # some good and bad calls, and what the agent gets back; crops in runs/tools/
"""
import json
import math
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

TOOL_NAME = "image_zoom_in_tool"
MAX_TURN_CHARS, MAX_CALL_CHARS, MAX_ANSWER_CHARS = 20_000, 2_000, 500   # longer turns and answers are cut, longer calls refused unread
MAX_LABEL_WORDS, MAX_LABEL_CHARS = 12, 80
MIN_SIDE, MAX_ASPECT = 4, 100                    # of a box, in its own units, after clamping

def system_prompt(coordinates: str = "pixels") -> str:
    """The "# Tools" prompt in Qwen's style, for a model that never saw our cold start. coordinates: "pixels" or "1000"."""
    unit = "pixels of the image" if coordinates == "pixels" else "thousandths of the image's width and height, 0 to 1000"
    schema = {"type": "function", "function": {
        "name": TOOL_NAME,
        "description": "Zoom in on a region of the image. Say first what you are looking for; the crop is cut from the "
                       "image at full resolution.",
        "parameters": {"type": "object", "required": ["label", "bbox_2d"], "properties": {
            "label": {"type": "string", "description": f"What the region shows, specifically: at most {MAX_LABEL_WORDS} words."},
            "bbox_2d": {"type": "array", "items": {"type": "number"}, "minItems": 4, "maxItems": 4,
                        "description": f"[x1, y1, x2, y2] in {unit}, x1 < x2 and y1 < y2."}}}}}
    return f"""You are a careful visual agent. Details may be too small to see at first: zoom in before you answer.

# Tools
You may call one function per turn. Its signature is within <tools></tools> XML tags:
<tools>
{json.dumps(schema)}
</tools>

Think first, then either call the function:
<think>The sign is at the left, I need to read it.</think><tool_call>{{"name": "{TOOL_NAME}", "arguments": {{"label": "the red sign", "bbox_2d": [10, 40, 90, 120]}}}}</tool_call>
or finish with the letter or the text of your answer:
<think>The sign says 42.</think><answer>42</answer>"""


@dataclass(frozen=True)
class Call:
    label: str                                # cleaned: one line, no control characters
    bbox: tuple[float, float, float, float]   # pixels of the seen image (or thousandths), clamped to it
    dropped: int = 0                          # earlier calls of the same turn, which were ignored


@dataclass(frozen=True)
class Answer:
    text: str


class ToolError(Exception):
    """A turn that cannot be run. `kind` is a short name for counting, `str(error)` is what the agent reads.
    `final`: the turn neither called nor answered, which ends the episode."""

    def __init__(self, kind: str, message: str, final: bool = False):
        super().__init__(message)
        self.kind, self.final = kind, final


# ---- one turn of text -> Call, Answer or ToolError ---------------------------------------------------------------

def parse(text: str, seen: tuple[int, int]) -> Call | Answer:
    """Read one assistant turn. seen: (width, height) of the image that the model saw, in the units of its
    boxes: pixels, or (1000, 1000).

    An answer wins over a call; of several calls the last counts. Raises ToolError, and nothing else."""
    text = text[:MAX_TURN_CHARS]
    said = text.rsplit("</think>", 1)[-1]  # tags inside a finished thought are thoughts
    answers = bodies("answer", said)
    if answers:
        if not answers[-1].strip():
            raise ToolError("empty_answer", "Error: the answer is empty. Write <answer>your answer</answer>.", final=True)
        return Answer(answers[-1].strip()[:MAX_ANSWER_CHARS])
    calls = bodies("tool_call", said)
    if calls:
        return parse_call(calls[-1], seen, dropped=len(calls) - 1)
    for tag in ("tool_call", "answer"):
        if f"<{tag}>" in said:
            raise ToolError(f"unterminated_{tag}", f"Error: <{tag}> was opened but </{tag}> is missing.")
    raise ToolError("no_action", "Error: expected a <tool_call> or an <answer>, found neither.", final=True)


def bodies(tag: str, text: str) -> list[str]:
    """What stands between each <tag> and the next </tag>. In linear time, which a regular expression is not."""
    return [part.split(f"<{tag}>", 1)[1] for part in text.split(f"</{tag}>")[:-1] if f"<{tag}>" in part]


def parse_call(body: str, seen: tuple[int, int], dropped: int = 0) -> Call:
    """The JSON between the <tool_call> tags -> Call. Raises ToolError."""
    if len(body) > MAX_CALL_CHARS:
        raise ToolError("too_long", f"Error: the tool call has {len(body)} characters; at most {MAX_CALL_CHARS} are read.")
    try:
        call = json.loads(body, object_pairs_hook=unique_keys, parse_constant=refuse_constant)
    except (ValueError, RecursionError):  # also integers of thousands of digits, and brackets nested too deep
        raise ToolError("bad_json", "Error: the tool call is not one JSON object such as {\"name\": \""
                        f"{TOOL_NAME}\", \"arguments\": {{\"label\": \"...\", \"bbox_2d\": [x1, y1, x2, y2]}}}}.") from None
    if not isinstance(call, dict) or set(call) != {"name", "arguments"}:
        raise ToolError("bad_call", "Error: expected an object with exactly \"name\" and \"arguments\".")
    if call["name"] != TOOL_NAME:
        raise ToolError("unknown_tool", f"Error: there is no such tool; the only one is {TOOL_NAME}.")
    arguments = call["arguments"]
    if not isinstance(arguments, dict):
        raise ToolError("bad_arguments", "Error: \"arguments\" must be an object with \"label\" and \"bbox_2d\".")
    if unknown := set(arguments) - {"label", "bbox_2d"}:
        raise ToolError("bad_arguments", f"Error: {len(unknown)} unknown argument(s); expected \"label\" and \"bbox_2d\".")
    return Call(check_label(arguments.get("label")), check_box(arguments.get("bbox_2d"), seen), dropped)


def unique_keys(pairs: list[tuple[str, object]]) -> dict:
    if len({key for key, _ in pairs}) < len(pairs):
        raise ToolError("repeated_key", "Error: a key appears twice in the tool call.")
    return dict(pairs)


def refuse_constant(name: str):
    raise ToolError("not_finite", "Error: bbox_2d must hold four finite numbers.")


# Words that fit any picture. A label made only of these says nothing that a crop could disagree with.
VAGUE = frozenset("""a an the this that these those it its he she they them there here of in on at to for with and or
    is are my some any other another one ones image images picture pictures photo photos photograph crop crops object
    objects thing things stuff item items something anything everything region regions area areas part parts section
    place spot location detail details view scene zoom zoomed look target label description content box bbox bounding
    visual whole entire full main interest relevant question answer left right top bottom upper lower center centre
    middle corner side small large big tiny""".split())


# what shows nothing, whatever its category: fillers, and variation selectors
BLANK = "\u034f\u115f\u1160\u17b4\u17b5\u2800" + "".join(map(chr, [*range(0x180b, 0x1810), *range(0xfe00, 0xfe10), *range(0xe0100, 0xe01f0)]))


def check_label(label: object) -> str:
    """The cleaned description. Refuses what is missing, empty, too long, vague, or carries markup. Raises ToolError."""
    if not isinstance(label, str):
        raise ToolError("no_label", "Error: \"label\" is required: a text that says what you are looking for.")
    label = unicodedata.normalize("NFKC", label)  # full-width letters and ligatures become plain ones
    if any(unicodedata.category(c) in ("Cc", "Cf", "Co", "Cs", "Cn") or c in BLANK for c in label):
        raise ToolError("label_characters", "Error: the label holds control, invisible or private characters.")
    if "<" in label or ">" in label:
        raise ToolError("label_markup", "Error: the label must be plain words, without < or >.")
    label = " ".join(label.split())
    words = re.findall(r"[^\W_]+", label.lower())
    if not words:
        raise ToolError("empty_label", "Error: the label is empty. Say what you are looking for.")
    if len(label) > MAX_LABEL_CHARS or len(label.split()) > MAX_LABEL_WORDS:
        raise ToolError("long_label", f"Error: the label is too long: at most {MAX_LABEL_WORDS} words "
                                      f"and {MAX_LABEL_CHARS} characters.")
    if all(word in VAGUE for word in words):
        raise ToolError("vague_label", "Error: the label fits any picture. Name the object that you are looking for.")
    return label


def check_box(box: object, seen: tuple[int, int]) -> tuple[float, float, float, float]:
    """Four numbers -> a box inside the seen image. Clamps what leaves it. Raises ToolError."""
    if not isinstance(box, list) or len(box) != 4 or any(type(v) not in (int, float) for v in box):  # bool is no number
        raise ToolError("bad_box", "Error: bbox_2d must be a list of four numbers [x1, y1, x2, y2].")
    if any(abs(v) > 1e9 if isinstance(v, int) else not math.isfinite(v) for v in box):
        raise ToolError("not_finite", "Error: bbox_2d must hold four finite numbers.")
    x1, y1, x2, y2 = box
    if x1 >= x2 or y1 >= y2:
        raise ToolError("inverted_box", "Error: bbox_2d must have x1 < x2 and y1 < y2.")
    width, height = seen
    x1, y1, x2, y2 = max(x1, 0), max(y1, 0), min(x2, width), min(y2, height)
    if x1 >= x2 or y1 >= y2:
        raise ToolError("outside_box", f"Error: bbox_2d lies outside the image, which is {width} x {height}.")
    if min(x2 - x1, y2 - y1) < MIN_SIDE:
        raise ToolError("small_box", f"Error: bbox_2d is too small: each side needs at least {MIN_SIDE}.")
    if max(x2 - x1, y2 - y1) > MAX_ASPECT * min(x2 - x1, y2 - y1):
        raise ToolError("thin_box", f"Error: bbox_2d is longer than {MAX_ASPECT}:1.")
    return float(x1), float(y1), float(x2), float(y2)


# ---- pixels ------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Resolution:
    """How many pixels a model takes: sides are multiples of `factor`, areas lie between the bounds."""
    factor: int       # patch size x merge size
    min_pixels: int
    max_pixels: int

    def crop(self) -> "Resolution":
        """A crop costs at most a quarter of the largest image's tokens, so that looking often stays affordable."""
        return Resolution(self.factor, self.min_pixels, max(self.min_pixels, self.max_pixels // 4))

    def size(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) that the model will see: the aspect kept as well as whole factors allow."""
        scale = 1.0
        if width * height > self.max_pixels:
            scale = math.sqrt(self.max_pixels / (width * height))
        elif width * height < self.min_pixels:
            scale = math.sqrt(self.min_pixels / (width * height))
        w, h = (max(self.factor, round(side * scale / self.factor) * self.factor) for side in (width, height))
        while w * h > self.max_pixels and max(w, h) > self.factor:  # rounding up, or a very long image
            w, h = (w - self.factor, h) if w >= h else (w, h - self.factor)
        while w * h < self.min_pixels and w * h + self.factor * min(w, h) <= self.max_pixels:
            w, h = (w + self.factor, h) if w >= h else (w, h + self.factor)
        return w, h


def fit(image: Image.Image, resolution: Resolution) -> Image.Image:
    """The image as the model sees it. Reducing averages over areas; enlarging interpolates."""
    size = resolution.size(*image.size)
    return image.resize(size, Image.BOX if size[0] * size[1] <= image.width * image.height else Image.BICUBIC)


def to_original(box, seen: tuple[int, int], original: tuple[int, int]) -> tuple[float, float, float, float]:
    """A box in pixels of the seen image (width, height) -> the same box in pixels of the original."""
    sx, sy = original[0] / seen[0], original[1] / seen[1]
    return box[0] * sx, box[1] * sy, box[2] * sx, box[3] * sy


def zoom(image: Image.Image, call: Call, seen: tuple[int, int], resolution: Resolution) -> tuple[Image.Image, tuple]:
    """Run the tool: the crop as the model will see it, and its box in pixels of the original."""
    box = to_original(call.bbox, seen, image.size)
    x1, y1, x2, y2 = (math.floor(box[0] + 1e-6), math.floor(box[1] + 1e-6), math.ceil(box[2] - 1e-6), math.ceil(box[3] - 1e-6))
    x2, y2 = min(x2, image.width), min(y2, image.height)
    return fit(image.crop((x1, y1, x2, y2)), resolution.crop()), box


if __name__ == "__main__":
    from tiny.world import World, world_question
    question = world_question(World(), seed=0, split="test", index=4)
    image, resolution = question.open(), Resolution(factor=24, min_pixels=48 * 48, max_pixels=96 * 96)
    seen = resolution.size(*image.size)
    name, box = next(iter(question.objects.items()))
    good = [round(v * seen[0] / image.width) for v in (box[0] - 32, box[1] - 32, box[2] + 32, box[3] + 32)]
    call = lambda label, box: (f'<tool_call>{{"name": "{TOOL_NAME}", "arguments": {{"label": "{label}", '
                               f'"bbox_2d": {json.dumps(box)}}}}}</tool_call>')
    print(f"image {image.size}, seen by the model as {seen}; {name} stands at {good}\n")
    folder = Path("runs/tools")
    folder.mkdir(parents=True, exist_ok=True)
    fit(image, resolution).save(folder / "overview.png")
    for text in [call(f"the {name}", good), call("the object", good), call(name, [50, 50, 10, 90]), call(name, [-9, 60, 400, 90]),
                 call(name, good)[:-12], '<tool_call>__import__("os").system("ls")</tool_call>', "<answer>(B)</answer>"]:
        try:
            result = parse(text, seen)
            if isinstance(result, Call):
                crop, original_box = zoom(image, result, seen, resolution)
                crop.save(folder / f"{'_'.join(map(str, map(round, result.bbox)))}.png")
                result = f"{result}\n    -> crop of {tuple(map(round, original_box))} at {crop.size}"
        except ToolError as error:
            result = f"{error.kind}: {error}"
        print(f"{text}\n    -> {result}")
    print(f"\nsaved the overview and the crops in {folder}")
