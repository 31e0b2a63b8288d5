"""What the agent can do: read one turn of its text, run the tool that it calls.

What it teaches: an agent's output is *hostile input*. A turn of text becomes exactly one of three
things: a `Call`, an `Answer`, or a `ToolError`. If the episode goes on, the agent reads the error's
message as its next observation. Nothing here evaluates or trusts what a model wrote, and every
length is bounded.

    <think>...</think><tool_call>{"name": "image_zoom_in_tool",
        "arguments": {"label": "the red sign", "bbox_2d": [x1, y1, x2, y2]}}</tool_call>

MAPO makes `label` mandatory for every tool. The prompt puts it first: say what you look for, *then*
look.

Three sizes (width, height) are at work. `to_original` maps a box from `space` to the first one:

    image.size    of the original, from which a crop is cut at full resolution
    seen          of the overview: the whole image, reduced, which the agent sees first
    space         of the agent's boxes, also after a crop: as `seen`, or (1000, 1000)

The dict TOOLS holds the tools; a new one is added there and nowhere else (docs/extending.md).

Run it:  python tools.py            # good and bad calls, and what the agent gets back; 1 s
"""
import json
import math
from dataclasses import dataclass, replace
from typing import Callable

from PIL import Image

from lib import labels

ZOOM = "image_zoom_in_tool"
MAX_TURN_CHARS, MAX_ANSWER_CHARS = 20_000, 500   # longer turns and answers are cut ..
MAX_CALL_CHARS = 2_000                           # .. longer calls are refused unread
MIN_SIDE, MAX_ASPECT = 4, 100                    # of a box, in its own units, after clamping
MAX_IMAGE_ASPECT = 200                           # of an image that a model can take
LARGEST = 1e9                                    # a coordinate beyond this is no number


@dataclass(frozen=True)
class Call:
    """A tool call that can be carried out: checked, bounded, in the units of the agent's boxes."""
    tool: str
    label: str                  # cleaned: one line, no control characters
    arguments: dict             # the tool's other arguments, as its `check` returned them


@dataclass(frozen=True)
class Answer:
    text: str


class ToolError(Exception):
    """A turn that cannot be run. `kind` is a short name for counting; `str(error)` is what the
    agent reads. `final`: it ends the episode: no action was begun, or the answer is empty."""

    def __init__(self, kind: str, message: str, final: bool = False):
        super().__init__(f"Error: {message}")
        self.kind, self.final = kind, final


# ---- one turn of text -> Call, Answer or ToolError -----------------------------------------------

def parse(text: str, space: tuple[int, int]) -> Call | Answer:
    """Read one turn of the agent. space: the range of its boxes' coordinates, (width, height) of
    the image that it saw in pixels, or (1000, 1000).

    An answer wins over a call; of several calls the last counts. (Our sampler ends a turn at the
    first closing tag, even one inside a thought.) Raises ToolError, nothing else."""
    said = text[:MAX_TURN_CHARS].rsplit("</think>", 1)[-1]   # a finished thought is no action
    answers, calls = bodies("answer", said), bodies("tool_call", said)
    if answers:
        answer = answers[-1].strip()
        if not answer:
            message = "the answer is empty. Write <answer>your answer</answer>."
            raise ToolError("empty_answer", message, final=True)
        return Answer(answer[:MAX_ANSWER_CHARS])
    if calls:
        return parse_call(calls[-1], space)
    for tag in ("tool_call", "answer"):
        if f"<{tag}>" in said:
            raise ToolError(f"unterminated_{tag}", f"<{tag}> was opened but </{tag}> is missing.")
    message = "expected a <tool_call> or an <answer>, found neither."
    raise ToolError("no_action", message, final=True)


def bodies(tag: str, text: str) -> list[str]:
    """What stands between each <tag> and the next </tag>, in linear time."""
    closed = text.split(f"</{tag}>")[:-1]
    return [part.split(f"<{tag}>", 1)[1] for part in closed if f"<{tag}>" in part]


def parse_call(body: str, space: tuple[int, int]) -> Call:
    """The JSON between the <tool_call> tags -> Call. Raises ToolError."""
    if len(body) > MAX_CALL_CHARS:
        raise ToolError("too_long", f"the tool call has {len(body)} characters; "
                                    f"at most {MAX_CALL_CHARS} are read.")
    try:
        call = json.loads(body, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError):   # also integers of thousands of digits, and deep nesting
        arguments = '{"label": "...", "bbox_2d": [x1, y1, x2, y2]}'
        raise ToolError("bad_json", "the tool call is not one JSON object such as "
                                    f'{{"name": "{ZOOM}", "arguments": {arguments}}}.') from None
    if not isinstance(call, dict) or set(call) != {"name", "arguments"}:
        raise ToolError("bad_call", 'expected an object with exactly "name" and "arguments".')
    name, arguments = call["name"], call["arguments"]
    if not isinstance(name, str) or name not in TOOLS:
        raise ToolError("unknown_tool", f"there is no such tool; expected {' or '.join(TOOLS)}.")
    tool = TOOLS[name]
    expected = " and ".join(f'"{key}"' for key in ("label", *tool.parameters))
    if not isinstance(arguments, dict):
        raise ToolError("bad_arguments", f'"arguments" must be an object with {expected}.')
    if unknown := set(arguments) - {"label", *tool.parameters}:
        message = f"{len(unknown)} unknown argument(s); expected {expected}."
        raise ToolError("bad_arguments", message)
    label = check_label(arguments.get("label"))
    return Call(name, label, tool.check(arguments, space))


def unique_keys(pairs: list[tuple[str, object]]) -> dict:
    if len({key for key, _ in pairs}) < len(pairs):
        raise ToolError("repeated_key", "a key appears twice in the tool call.")
    return dict(pairs)


def check_label(label: object) -> str:
    """The cleaned description. Raises ToolError for what lib/labels.py finds fault with."""
    if not isinstance(label, str):
        message = '"label" is required: a text that says what you are looking for.'
        raise ToolError("no_label", message)
    if found := labels.fault(label):
        raise ToolError(*found)
    return labels.clean(label)


# ---- pixels --------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Resolution:
    """How many pixels a model takes: sides are multiples of `factor`, areas lie in the bounds."""
    factor: int                 # patch size x merge size
    min_pixels: int
    max_pixels: int
    resample: int = Image.BICUBIC   # Pillow's filter; tiny/ has BOX, the mean of an area

    def crop(self) -> "Resolution":
        """A crop has at most a quarter of the largest image's pixels: looking stays cheap."""
        return replace(self, max_pixels=max(self.min_pixels, self.max_pixels // 4))

    def size(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) that the model will see, by Qwen's rule (`smart_resize`): the nearest
        multiples of factor; if the area is out of bounds, the image is scaled to the bound, and its
        sides are rounded down (too large) or up (too small). Raises ValueError beyond 200:1."""
        if max(width, height) > MAX_IMAGE_ASPECT * min(width, height):
            raise ValueError(f"expected an image of at most {MAX_IMAGE_ASPECT}:1, "
                             f"found {width} x {height}")
        w, h = (round(side / self.factor) * self.factor for side in (width, height))
        if w * h > self.max_pixels:
            shrink = math.sqrt(width * height / self.max_pixels)
            w, h = (max(1, math.floor(side / shrink / self.factor)) * self.factor
                    for side in (width, height))
        elif w * h < self.min_pixels:
            grow = math.sqrt(self.min_pixels / (width * height))
            w, h = (math.ceil(side * grow / self.factor) * self.factor for side in (width, height))
        return w, h


def fit(image: Image.Image, resolution: Resolution) -> Image.Image:
    """The image as the model sees it."""
    return image.resize(resolution.size(*image.size), resolution.resample)


def to_original(box: tuple, space: tuple[int, int], original: tuple[int, int]) -> tuple:
    """A box in the agent's units -> the same box in pixels of the original (width, height)."""
    sx, sy = original[0] / space[0], original[1] / space[1]
    return box[0] * sx, box[1] * sy, box[2] * sx, box[3] * sy


# ---- the tools -----------------------------------------------------------------------------------

@dataclass(frozen=True)
class Tool:
    """What a tool is called with, and what it does.

    check(arguments, space) -> the checked arguments; raises ToolError.
    run(image, arguments, space) -> (what it shows, its box in pixels of the original); it may
    raise ToolError, too."""
    description: str
    parameters: dict[str, dict]              # JSON schema of its arguments; "label" comes before
    check: Callable[[dict, tuple[int, int]], dict]
    run: Callable[[Image.Image, dict, tuple[int, int]], tuple[Image.Image, tuple]]


def check_box(box: object, space: tuple[int, int]) -> tuple[float, float, float, float]:
    """Four numbers -> a box inside the image. Clamps what leaves it. Raises ToolError."""
    numbers = isinstance(box, list) and all(type(v) in (int, float) for v in box)   # no bool
    if not numbers or len(box) != 4:
        raise ToolError("bad_box", "bbox_2d must be a list of four numbers [x1, y1, x2, y2].")
    if not all(abs(v) <= LARGEST for v in box):      # NaN and infinity fail here too
        raise ToolError("not_finite", "bbox_2d must hold four finite numbers.")
    x1, y1, x2, y2 = box
    if x1 >= x2 or y1 >= y2:
        raise ToolError("inverted_box", "bbox_2d must have x1 < x2 and y1 < y2.")
    width, height = space
    x1, y1, x2, y2 = max(x1, 0), max(y1, 0), min(x2, width), min(y2, height)
    short, long = sorted((x2 - x1, y2 - y1))
    if short <= 0:
        message = f"bbox_2d lies outside the image, which is {width} x {height}."
        raise ToolError("outside_box", message)
    if short < MIN_SIDE:
        message = f"bbox_2d is too small: each side needs at least {MIN_SIDE}."
        raise ToolError("small_box", message)
    if long > MAX_ASPECT * short:
        raise ToolError("thin_box", f"bbox_2d is longer than {MAX_ASPECT}:1.")
    return float(x1), float(y1), float(x2), float(y2)


def check_zoom(arguments: dict, space: tuple[int, int]) -> dict:
    return {"bbox_2d": check_box(arguments.get("bbox_2d"), space)}


def zoom(image: Image.Image, arguments: dict, space: tuple[int, int]) -> tuple[Image.Image, tuple]:
    """Cut the box out of the original, whole pixels."""
    box = to_original(arguments["bbox_2d"], space, image.size)
    x1, y1 = math.floor(box[0] + 1e-6), math.floor(box[1] + 1e-6)
    x2, y2 = math.ceil(box[2] - 1e-6), math.ceil(box[3] - 1e-6)
    crop = image.crop((x1, y1, min(x2, image.width), min(y2, image.height)))
    if max(crop.size) > MAX_IMAGE_ASPECT * min(crop.size):     # of an image that is long itself
        raise ToolError("thin_box", f"the crop would be longer than {MAX_IMAGE_ASPECT}:1.")
    return crop, box


TOOLS = {
    ZOOM: Tool(
        description="Zoom in on a region of the image. Say first what you are looking for; the "
                    "crop is cut from the image at full resolution.",
        parameters={"bbox_2d": {
            "type": "array", "items": {"type": "number"}, "minItems": 4, "maxItems": 4,
            "description": "[x1, y1, x2, y2] in {unit}, x1 < x2 and y1 < y2."}},
        check=check_zoom, run=zoom),
}


def run_tool(image: Image.Image, call: Call, space: tuple[int, int],
             resolution: Resolution) -> tuple[Image.Image, tuple]:
    """Carry out a call: what it shows, as the model will see it, and its box in the original."""
    shown, box = TOOLS[call.tool].run(image, call.arguments, space)
    return fit(shown, resolution.crop()), box


def zoom_call(label: str, box: tuple | list, edge: str = "") -> str:
    """A call of the zoom tool as an agent writes it: say, then look. Qwen's own models write a
    line break (edge) inside the tags; tiny/ does not, and `parse` reads both."""
    arguments = {"label": label, "bbox_2d": list(box)}
    call = json.dumps({"name": ZOOM, "arguments": arguments})
    return f"<tool_call>{edge}{call}{edge}</tool_call>"


def system_prompt(coordinates: str = "pixels") -> str:
    """The "# Tools" prompt in Qwen's style. tiny/ needs none: it was taught by imitation.
    coordinates: in what boxes are given, "pixels" or "1000"."""
    units = {"pixels": "pixels of the image",
             "1000": "thousandths of the image's width and height, 0 to 1000"}
    label = {"type": "string", "description": "What the region shows, specifically: at most "
                                              f"{labels.MAX_LABEL_WORDS} words."}
    schemas = []
    for name, tool in TOOLS.items():
        properties = {"label": label} | tool.parameters
        schemas.append(json.dumps({"type": "function", "function": {
            "name": name, "description": tool.description,
            "parameters": {"type": "object", "required": list(properties),
                           "properties": properties}}}))
    tools = "\n".join(schemas).replace("{unit}", units[coordinates])
    example = zoom_call("the red sign", [10, 40, 90, 120], edge="\n")
    return f"""You are a careful visual agent. \
Details may be too small to see at first: zoom in before you answer.

# Tools
You may call one function per turn. Its signature is within <tools></tools> XML tags:
<tools>
{tools}
</tools>

Think first, then either call the function:
<think>The sign is at the left, I need to read it.</think>
{example}
or finish with the letter or the text of your answer:
<think>The sign says 42.</think><answer>42</answer>"""


def demonstrate() -> None:
    """Good and bad turns about a picture of 768 x 768, and what the agent gets back."""
    image = Image.new("RGB", (768, 768))
    resolution = Resolution(factor=24, min_pixels=48 * 48, max_pixels=14_000)
    seen, box = resolution.size(*image.size), [60, 20, 76, 32]
    print(f"image {image.size}, seen by the model as {seen}\n")
    for text in (zoom_call("the red sign", box), zoom_call("the object", box),
                 zoom_call("red sign", [50, 50, 10, 90]), zoom_call("red sign", box)[:-12],
                 '<tool_call>__import__("os").system("ls")</tool_call>', "<answer>(B)</answer>"):
        try:
            result = parse(text, seen)
        except ToolError as error:
            result = f"{error.kind}: {error}"
        print(f"{text}\n    -> {result}")
        if isinstance(result, Call):
            crop, cut = run_tool(image, result, seen, resolution)
            print(f"    -> {cut} of the original, seen as {crop.size}")


if __name__ == "__main__":
    demonstrate()
