"""What a person looks at: film strips, transcripts, one page of one or several runs.

What it teaches: look at what an agent does before you believe its numbers. A film strip has one
frame for each look. On its left is the overview, as coarse as the agent saw it, with the box of the
look; on its right is the crop that came back. Below them stand the label, which the agent wrote
before it saw the crop, and the semantic score of the look, if it has one. The page has curves,
tables, the same held-out questions at several steps, and trajectories to page through.

Run it:  python show.py                               # one trajectory of tiny/ in text; 7 s
         python show.py --model runs/mapo --index 3   # its film strip is in runs/show.png
         python show.py runs/mapo runs/grpo           # both side by side: runs/mapo/page.html
         python show.py --text runs/mapo --step 20    # what the agent did at that step
"""
import argparse
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from lib import benchmarks, page
from lib.checkpoint import newest
from lib.data import DataError
from lib.policy import Policy
from lib.question import Question
from rollout import Trajectory, collect
from tiny.world import World, world_question

SIDE = 192                    # longer side of a picture in a film strip, in pixels
FRAME = 2 * SIDE + 24         # width of a frame: the overview, the crop, and space


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


def stack(pictures: list[Image.Image]) -> Image.Image:
    """Pictures, one below the other."""
    width = max(picture.width for picture in pictures)
    whole = Image.new("RGB", (width, sum(picture.height for picture in pictures)), "white")
    top = 0
    for picture in pictures:
        whole.paste(picture, (0, top))
        top += picture.height
    return whole


def transcript(policy: Policy, trajectory: Trajectory) -> str:
    """The whole trajectory as text, images as [image height x width], in placeholders."""
    text = policy.decode(trajectory.tokens.ids)
    for h, w in trajectory.tokens.grids:
        text = text.replace("<|image_pad|>" * (h * w), f"[image {h} x {w}]", 1)
    return text


# ---- the page of runs ----------------------------------------------------------------------------

def write_page(folders: list[str | Path]) -> Path:
    """One page of the runs, in the first one's folder. A run calls this itself, while it goes."""
    folders, runs, pictures = [Path(folder) for folder in folders], [], {}
    names = {folder.resolve().name for folder in folders}
    for folder in folders:
        run = page.read_run(folder, len(folders))
        if len(names) < len(folders):                  # two runs of one name are told apart
            run["name"] = page.text(folder)
        for part in ("watched", "trajectories"):
            views = [page.view(saved) for saved in run[part]]
            questions = find_questions(run[part], folder, held_out=part == "watched")
            for view, saved, question in zip(views, run[part], questions):
                if question:
                    page.add_pictures(view, saved, question, pictures)
            run[part] = views
        runs.append(run)
    file = folders[0] / "page.html"
    page.write(runs, pictures, file)
    return file


def find_questions(lines: list[dict], folder: Path, held_out: bool) -> list[Question | None]:
    """The question of each saved trajectory: from the run's files, or drawn again by the world.
    None where it is gone, or is not any more what was asked."""
    settings = page.read_settings(folder)
    file = (held_out and settings.get("test")) or settings.get("data")
    ids = {page.text(line.get("id")) for line in lines}
    try:
        if file and ids:
            questions = benchmarks.load(file, [])[1]
        else:
            world = World(settings.get("objects", 6), settings.get("options", 4))
            questions = draw_again(ids, world)
        found = {question.id: question for question in questions if question.id in ids}
    except (DataError, OSError, TypeError, ValueError) as error:
        print(f"{folder}: no pictures: {str(error)[:200]}", file=sys.stderr)
        found = {}
    matched = [found.get(page.text(line.get("id"))) for line in lines]
    return [question if question and is_same(question, line) else None
            for question, line in zip(matched, lines)]


def is_same(question: Question, saved: dict) -> bool:
    """Is it still what was asked? Else it may have another picture, too."""
    asked = saved.get("id"), saved.get("question"), saved.get("choices")
    return asked == (question.id, question.text, list(question.choices))


def draw_again(names: Iterable[str], world: World) -> Iterator[Question]:
    """The world's questions of these ids, such as "test-0-7": split, seed, index."""
    for name in names:
        if match := re.fullmatch(r"(train|test)-(\d{1,9})-(\d{1,15})", name):
            yield world_question(world, int(match[2]), match[1], int(match[3]))


# ---- runs as text --------------------------------------------------------------------------------

def tell(folder: Path, step: int) -> str:
    """The trajectories of a step. Raises FileNotFoundError if there are none."""
    parts, steps = [], set()
    for name in ("trajectories", "watched"):
        for saved in map(page.parse, page.raw_lines([folder / f"{name}.jsonl"])):
            view = page.view(saved)
            steps.add(view["step"])
            if view["step"] == step:
                parts.append(f"{name}, {view['id']}, {view['category']}\n{tell_one(view)}")
    if not parts:
        known = sorted(steps - {None})
        found = f"steps {known[0]} to {known[-1]}" if known else "no trajectories.jsonl"
        raise FileNotFoundError(f"{folder}: expected trajectories of step {step}; found {found}")
    return "\n\n".join(parts)


def tell_one(view: dict) -> str:
    options = "  ".join(f"({chr(65 + i)}) {choice}" for i, choice in enumerate(view["choices"]))
    lines = [f"{view['question']}  {options}".rstrip()]
    for i, turn in enumerate(view["turns"], 1):
        paid = "" if turn["advantage"] is None else f", advantage {turn['advantage']:+.2f}"
        lines.append(f"  turn {i}{paid}: {turn['text']}")
        if turn["look"]:
            score = "" if turn["score"] is None else f", score {turn['score']:.2f}"
            gap = "; the crop does not hold it" if turn["astray"] else ""
            lines.append(f"    -> crop of “{turn['label']}”{score}{gap}")
        if turn["error"]:
            lines.append(f"    -> {turn['error']}: {turn['message']}")
    luck = ", by luck: evidence was not shown, or not close enough to read" if view["lucky"] else ""
    verdict = f"right{luck}" if view["correct"] else f"wrong, right is {view['right']}"
    return "\n".join([*lines, f"  answer: {view['answer'] or view['end']}: {verdict}"])


# ---- the command ---------------------------------------------------------------------------------

def show_one(args: argparse.Namespace) -> None:
    """A trajectory of a model, in text and as a film strip."""
    torch.set_num_threads(1)
    policy = Policy(newest(args.model))
    question = world_question(World(), seed=0, split="test", index=args.index)
    t = collect(policy, [question], temperature=0.)[0]
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
    parser.add_argument("--model", default="tiny", help="without runs: a model directory")
    parser.add_argument("--index", type=int, default=0, help="of the held-out question")
    args = parser.parse_args()
    if args.text and not args.runs:
        parser.error("--text: expected the folder of a run")
    try:
        if not args.runs:
            show_one(args)
        elif args.text:
            for folder in args.runs:
                print(f"{folder}\n\n{tell(folder, args.step)}\n")
        else:
            print(write_page(args.runs))
    except (OSError, ValueError) as error:
        sys.exit(f"show.py: {error}")


if __name__ == "__main__":
    main()
