"""What a person looks at: film strips, transcripts, one page of one or several runs.

What it teaches: look at what an agent does before you believe its numbers. A film strip has one
frame for each look. On its left is the overview, as coarse as the agent saw it, with the box of the
look; on its right is the crop that came back. Below them stand the label, which the agent wrote
before it saw the crop, and the look's semantic score. The page has curves, tables, the same
held-out questions at several steps, and trajectories to page through.

Run it:  python show.py                               # one trajectory of tiny/ in text; 7 s
         python show.py --model runs/mapo --index 3   # its film strip is in runs/show.png
         python show.py runs/mapo runs/grpo           # both side by side: runs/mapo/page.html
         python show.py --text runs/mapo --step 20    # what the agent did at that step
         python show.py --gif runs/mapo               # watch it learn: runs/mapo/watch.gif
"""
import argparse
import re
import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from lib import benchmarks, page
from lib.data import DataError, Question
from lib.page import SIDE, draw_box, enlarge, stack
from lib.policy import Policy
from lib.views import SHORT, read_run, read_settings, tell, text
from rollout import Trajectory, collect
from tiny.world import World, world_question

FRAME = 2 * SIDE + 24         # width of a film strip's frame: the overview, the crop, and space


# ---- one trajectory ------------------------------------------------------------------------------

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


def transcript(policy: Policy, trajectory: Trajectory) -> str:
    """The whole trajectory as text, images as [image height x width], in placeholders."""
    text = policy.decode(trajectory.tokens.ids)
    for h, w in trajectory.tokens.grids:
        text = text.replace("<|image_pad|>" * (h * w), f"[image {h} x {w}]", 1)
    return text


# ---- runs ----------------------------------------------------------------------------------------

def write_page(folders: list[str | Path]) -> Path:
    """One page of the runs, in the first one's folder. train.py calls this while it runs."""
    folders, runs, pictures = [Path(folder) for folder in folders], [], []
    for folder in folders:
        run = read_run(folder, len(folders))
        for views in (run["watched"], run["trajectories"]):
            page.add_pictures(views, find_questions(views, folder), pictures)
        if len({path.resolve().name for path in folders}) < len(folders):
            run["name"] = text(str(folder), SHORT)
        runs.append(run)
    file = folders[0] / "page.html"
    page.write(runs, pictures, file)
    return file


def write_animation(folder: Path) -> Path:
    """The watched questions of a run as a GIF, in its folder."""
    watched, file = read_run(folder)["watched"], folder / "watch.gif"
    if not watched:
        raise FileNotFoundError(f"{folder}: expected watched.jsonl of a run of train.py")
    page.animate(watched, find_questions(watched, folder), file)
    return file


def find_questions(views: list[dict], folder: Path) -> dict[str, Question]:
    """The views' questions by id: from the run's files, or drawn again by the world. Those that are
    not there any more are left out."""
    settings, found = read_settings(folder), {}
    if not views:
        return found
    held_out = views[0]["source"] == "held out"
    file = (held_out and settings.get("test")) or settings.get("data")
    wanted = {view["id"] for view in views}
    try:
        if file:
            every = benchmarks.load(file, [])[1]
            return {question.id: question for question in every if question.id in wanted}
        world = World(options=settings.get("options", 4))
        for name in wanted:
            if match := re.fullmatch(r"(train|test)-(\d{1,9})-(\d{1,15})", name):
                found[name] = world_question(world, int(match[2]), match[1], int(match[3]))
    except (DataError, OSError, TypeError, ValueError) as error:
        print(f"{folder}: no pictures: {str(error)[:200]}", file=sys.stderr)
    return found


# ---- the command ---------------------------------------------------------------------------------

def show_one(args: argparse.Namespace) -> None:
    """A trajectory of a model, in text and as a film strip."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="*", type=Path, help="folders of runs: one page of them all")
    parser.add_argument("--text", action="store_true", help="a step's trajectories instead")
    parser.add_argument("--step", type=int, default=0, help="which step, with --text")
    parser.add_argument("--gif", action="store_true", help="an animation of the first run instead")
    parser.add_argument("--model", default="tiny", help="without runs: a model directory")
    parser.add_argument("--index", type=int, default=0, help="of the held-out question")
    parser.add_argument("--temperature", type=float, default=0., help="0 is greedy")
    args = parser.parse_args()
    if not args.runs:
        if args.text or args.gif:
            parser.error("--text and --gif: expected the folder of a run")
        return show_one(args)
    try:
        if args.text:
            print(tell(args.runs[0], args.step))
        else:
            print(write_animation(args.runs[0]) if args.gif else write_page(args.runs))
    except OSError as error:
        sys.exit(f"show.py: {error}")


if __name__ == "__main__":
    main()
