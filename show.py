"""What a person looks at."""
from PIL import Image, ImageDraw, ImageFont

from lib.policy import Policy
from rollout import Trajectory


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
