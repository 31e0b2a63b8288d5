"""What a person looks at: one trajectory as a film strip, and as text.

What it teaches: look at what an agent does before you believe its numbers. A film strip has one
frame for each look. On its left is the overview, as coarse as the agent saw it, with the box of the
look; on its right is the crop that came back. Below them stand the label, which the agent wrote
before it saw the crop, and the look's semantic score.

Run it:  python show.py                               # one trajectory of tiny/ in text; 5 s
         python show.py --model runs/mapo --index 3   # its film strip is in runs/show.png
"""
import argparse
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from lib.policy import Policy
from rollout import Trajectory, collect
from tiny.world import World, world_question

SIDE = 192                    # longer side of each picture in a film strip, in pixels
FRAME = 2 * SIDE + 24         # width of a frame: the overview, the crop, and space


def film_strip(trajectory: Trajectory, title: str = "") -> Image.Image:
    """The trajectory as a picture, one frame for each look. Its looks need their crops."""
    question, looks = trajectory.question, trajectory.looks
    font, small = ImageFont.load_default(15), ImageFont.load_default(12)
    width = max(len(looks), 1) * FRAME + 12
    strip = Image.new("RGB", (max(width, 560), SIDE + 96), "white")
    pen = ImageDraw.Draw(strip)
    image = question.open()
    overview = enlarge(image.resize(trajectory.seen, Image.BOX))
    scale = overview.width / image.width, overview.height / image.height

    pen.text((12, 6), f"{title}{question.text}"[:90], "black", font)
    if not looks:
        strip.paste(overview, (12, 30))
        pen.text((SIDE + 24, 30), "(never looked)", "black", font)
    for i, turn in enumerate(looks):
        left = 12 + i * FRAME
        strip.paste(overview, (left, 30))
        draw_box(pen, turn.box, scale, (left, 30))
        strip.paste(enlarge(turn.crop), (left + SIDE + 6, 30))
        score = "" if turn.score is None else f"   score {turn.score:.2f}"
        pen.text((left, SIDE + 36), f"“{turn.call.label}”{score}"[:60], "black", small)
    answer = trajectory.answer or f"({trajectory.end})"
    pen.text((12, SIDE + 56), f"answer: {answer}    right answer: {question.answer}", "black", font)
    if question.choices:
        options = "options: " + ", ".join(question.choices)
        pen.text((12, SIDE + 76), options[:100], "gray", small)
    return strip


def enlarge(image: Image.Image) -> Image.Image:
    """The longer side becomes SIDE pixels. Nothing is smoothed: one sees how coarse it is."""
    scale = SIDE / max(image.size)
    size = [max(round(side * scale), 1) for side in image.size]
    return image.resize(size, Image.NEAREST)


def draw_box(pen: ImageDraw.ImageDraw, box: tuple, scale: tuple, corner: tuple) -> None:
    """A box in pixels of the original, on a picture that is scale (x, y) times as large and has its
    upper left corner at `corner`. White within black shows on any ground."""
    x1, x2 = (corner[0] + x * scale[0] for x in (box[0], box[2]))
    y1, y2 = (corner[1] + y * scale[1] for y in (box[1], box[3]))
    pen.rectangle((x1, y1, x2, y2), outline="white")
    pen.rectangle((x1 - 1, y1 - 1, x2 + 1, y2 + 1), outline="black")


def stack(strips: list[Image.Image]) -> Image.Image:
    """Film strips, one below the other."""
    width = max(strip.width for strip in strips)
    page = Image.new("RGB", (width, sum(strip.height for strip in strips)), "white")
    top = 0
    for strip in strips:
        page.paste(strip, (0, top))
        top += strip.height
    return page


def transcript(policy: Policy, trajectory: Trajectory) -> str:
    """The whole trajectory as text, images as [image height x width], in placeholders."""
    text = policy.decode(trajectory.tokens.ids)
    for h, w in trajectory.tokens.grids:
        text = text.replace("<|image_pad|>" * (h * w), f"[image {h} x {w}]", 1)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description="Show one trajectory.")
    parser.add_argument("--model", default="tiny", help="a model directory")
    parser.add_argument("--index", type=int, default=0, help="of the held-out question")
    parser.add_argument("--temperature", type=float, default=0., help="0 is greedy")
    args = parser.parse_args()
    torch.set_num_threads(1)
    policy = Policy(args.model)
    question = world_question(World(), seed=0, split="test", index=args.index)
    generator = torch.Generator().manual_seed(0)
    t = collect(policy, [question], temperature=args.temperature, generator=generator)[0]
    print(transcript(policy, t))
    print(f"\n{len(t.mask)} tokens, {sum(t.mask)} of them the agent's; ended by {t.end}; "
          f"answer {t.answer!r}, right answer {question.answer!r}")
    Path("runs").mkdir(exist_ok=True)
    film_strip(t).save("runs/show.png")
    print("film strip: runs/show.png")


if __name__ == "__main__":
    main()
