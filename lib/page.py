"""One self-contained HTML page of one or several runs, and an animation of one.

What it teaches: how to show hostile text safely. The data stand in the page as JSON in which no tag
can begin. lib/page.html writes text as text, never as HTML. The page's own policy lets a browser
run this one script and fetch nothing.

Crops are not stored with a run: the call of a look is carried out again on the question's image.

    folder -> views.read_run -> add_pictures -> write -> page.html

Run it:  python show.py runs/a runs/b        # writes runs/a/page.html
"""
import base64
import hashlib
import io
import json
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from lib.data import DataError, Question
from lib.views import LONG, pair, text
from tools import TOOLS, ToolError

TEMPLATE = Path(__file__).with_name("page.html")
OVERVIEW, CROP = 320, 144       # longer side of the page's pictures in pixels, at most
SIDE = 192                      # of a film's pictures
PANEL = SIDE + 48               # width of a question's part of the animation


# ---- pictures ------------------------------------------------------------------------------------

def enlarge(image: Image.Image, to: int = SIDE) -> Image.Image:
    """The longer side becomes `to` pixels. Nothing is smoothed: one sees how coarse it is."""
    scale = to / max(image.size)
    size = [max(round(side * scale), 1) for side in image.size]
    return image.resize(size, Image.NEAREST)


def draw_box(pen: ImageDraw.ImageDraw, box: tuple, scale: tuple, corner: tuple) -> None:
    """A box in pixels of the original, on a picture that is scale (x, y) times as large and has its
    upper left corner at `corner`. White within black shows on any ground."""
    x1, x2 = (corner[0] + x * scale[0] for x in (box[0], box[2]))
    y1, y2 = (corner[1] + y * scale[1] for y in (box[1], box[3]))
    pen.rectangle((x1, y1, x2, y2), outline="white")
    pen.rectangle((x1 - 1, y1 - 1, x2 + 1, y2 + 1), outline="black")


def encode(image: Image.Image, side: int) -> dict:
    """The picture, its longer side at most `side` pixels, as a data URI and its size."""
    scale = min(side / max(image.size), 1)
    width, height = (max(round(length * scale), 1) for length in image.size)
    small = image.convert("RGB").resize((width, height), Image.BOX)
    forms = []
    for form, options in (("png", {"optimize": True}), ("jpeg", {"quality": 80})):
        file = io.BytesIO()
        small.save(file, form, **options)
        forms.append((len(file.getvalue()), form, file.getvalue()))
    _, form, data = min(forms)                              # drawings: PNG; photographs: JPEG
    return {"uri": f"data:image/{form};base64,{base64.b64encode(data).decode()}",
            "width": width, "height": height}


def add_pictures(views: list[dict], questions: dict[str, Question], pictures: list[dict]) -> None:
    """Give each view the numbers of its pictures, boxes in shares of the image, and the evidence.

    questions: by id; a view whose question is not there, or has changed, gets no picture. Equal
    pictures are kept once."""
    known = {picture["uri"]: i for i, picture in enumerate(pictures)}

    def keep(image: Image.Image, side: int) -> int:
        picture = encode(image, side)
        number = known.setdefault(picture["uri"], len(pictures))
        if number == len(pictures):
            pictures.append(picture)
        return number

    for trajectory in views:
        question = questions.get(trajectory["id"])
        image = open_image(trajectory, question)
        if image is None:
            continue
        size = trajectory["seen"] or image.size
        trajectory["picture"] = keep(image.resize(size, Image.BOX), OVERVIEW)
        trajectory["evidence"] = [share(evidence, image.size) for evidence in question.boxes]
        for turn, call in zip(trajectory["turns"], trajectory["calls"]):
            turn["place"] = turn["box"] and share(turn["box"], image.size)
            crop = cut_again(image, trajectory["space"], *call)
            if crop:
                turn["crop"] = keep(crop, CROP)


def open_image(trajectory: dict, question: Question | None) -> Image.Image | None:
    """The image of a view; None if it is not there any more, or another question has its id."""
    if question is None or text(question.text, LONG) != trajectory["question"]:
        return None
    try:
        return question.open()
    except (DataError, OSError):
        return None


def cut_again(image: Image.Image, space: tuple | None, tool: object, arguments: object,
              size: object) -> Image.Image | None:
    """The crop of a saved look: the same call on the same image, shrunk to `size` as the agent
    saw it. None if it cannot be carried out: what is saved in a file is checked like a new call."""
    size = pair(size, 4096)
    known = isinstance(tool, str) and tool in TOOLS and isinstance(arguments, dict)
    if not known or space is None or size is None:
        return None
    try:
        checked = TOOLS[tool].check(arguments, space)
        return TOOLS[tool].run(image, checked, space)[0].resize(size, Image.BOX)
    except ToolError:
        return None


def share(sides: list[float], size: tuple[int, int]) -> list[float]:
    """A box in pixels -> in shares of the image's width and height, inside the image."""
    shares = [sides[i] / size[i % 2] for i in range(4)]
    return [round(min(max(value, 0), 1), 4) for value in shares]


# ---- watch it learn ------------------------------------------------------------------------------

def animate(watched: list[dict], questions: dict[str, Question], file: Path) -> None:
    """A GIF of three watched questions, one of each category as far as there are three: a frame for
    each step at which they were asked."""
    steps = {}
    for view in watched:
        steps.setdefault(view["step"], []).append(view)
    first = {}
    for view in next(iter(steps.values())):
        first.setdefault(view["category"], view["id"])
    chosen = dict.fromkeys([*first.values(), *(view["id"] for view in watched)])
    frames = []
    for step, views in steps.items():
        frame = Image.new("RGB", (3 * PANEL, 430), "white")
        ImageDraw.Draw(frame).text((12, 6), f"step {step}", "black", ImageFont.load_default(20))
        asked = {view["id"]: view for view in views}
        for i, name in enumerate(list(chosen)[:3]):
            if name in asked:
                frame.paste(panel(asked[name], questions.get(name)), (i * PANEL, 36))
        frames.append(frame)
    palette = stack(frames).quantize(256)                     # one for all: no colour flickers
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    times = [900] * (len(frames) - 1) + [3000]                  # milliseconds
    frames[0].save(file, save_all=True, append_images=frames[1:], duration=times, loop=0)


def panel(view: dict, question: Question | None) -> Image.Image:
    """One question at one step: the overview with the boxes of the looks; of the last two looks the
    crops, what they were said to be, and the scores; the answer."""
    picture = Image.new("RGB", (PANEL, 394), "white")
    pen, font, small = ImageDraw.Draw(picture), *map(ImageFont.load_default, (13, 10))
    pen.multiline_text((12, 0), textwrap.fill(view["question"][:70], 34), "black", font, spacing=2)
    image = open_image(view, question)
    if image is None:
        return picture
    overview = enlarge(image.resize(view["seen"] or image.size, Image.BOX))
    picture.paste(overview, (12, 36))
    scale, looks = (overview.width / image.width, overview.height / image.height), []
    for turn, call in zip(view["turns"], view["calls"]):
        crop = cut_again(image, view["space"], *call)
        if crop and turn["box"]:
            draw_box(pen, turn["box"], scale, (12, 36))
            looks.append((turn, crop))
    for i, (turn, crop) in enumerate(looks[-2:]):
        left, top = 12 + 100 * i, SIDE + 44
        picture.paste(enlarge(crop, 90), (left, top))
        score = "" if turn["score"] is None else f"\nscore {turn['score']:.2f}"
        pen.multiline_text((left, top + 93), f"{turn['label'][:20]}{score}", "black", small)
    colour, verdict = ("darkgreen", "right") if view["correct"] else ("firebrick", "wrong")
    pen.text((12, SIDE + 166), f"{view['answer'][:24] or '(none)'}: {verdict}", colour, font)
    return picture


def stack(pictures: list[Image.Image]) -> Image.Image:
    """Pictures, one below the other."""
    width = max(picture.width for picture in pictures)
    page = Image.new("RGB", (width, sum(picture.height for picture in pictures)), "white")
    top = 0
    for picture in pictures:
        page.paste(picture, (0, top))
        top += picture.height
    return page


# ---- the page ------------------------------------------------------------------------------------

def write(runs: list[dict], pictures: list[dict], file: Path) -> None:
    """Fill the template. Written aside first: a browser that reloads never finds half a page."""
    for run in runs:
        for trajectory in run["watched"] + run["trajectories"]:
            for name in ("calls", "seen", "space"):
                trajectory.pop(name, None)
    data = json.dumps({"runs": runs, "pictures": pictures}, ensure_ascii=False, allow_nan=False)
    for sign in "<>&":                         # so no tag or comment can begin or end in the data
        data = data.replace(sign, f"\\u{ord(sign):04x}")
    page = TEMPLATE.read_text(encoding="utf-8")
    script = page.split("<script>")[1].split("</script>")[0]
    fingerprint = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = page.replace("{{script}}", f"'sha256-{fingerprint}'").replace("{{data}}", data)
    aside = file.with_suffix(".tmp")
    aside.write_text(page, encoding="utf-8")
    aside.replace(file)
