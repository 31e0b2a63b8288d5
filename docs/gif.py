"""Watch a run learn: the film strips of three held-out questions, step by step, as a GIF.

Run it:  python docs/gif.py runs/mapo        # runs/mapo/watch.gif; 5 s
"""
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from eval import restore
from lib import page
from lib.question import Question
from rollout import Trajectory
from show import SIDE, film_strip, find_questions, stack


def write_animation(folder: Path) -> Path:
    """The film strips of three watched questions, one below the other, as a GIF: a frame for each
    step. They are one of each category, as far as there are three."""
    watched = page.read_run(folder)["watched"]
    questions, first, steps = {}, {}, {}
    for saved, question in zip(watched, find_questions(watched, folder, held_out=True)):
        if question:
            questions[saved["id"]] = question
            first.setdefault(saved["category"], saved["id"])
            steps.setdefault(saved["step"], {})[saved["id"]] = saved
    if not steps:
        raise FileNotFoundError(f"{folder}: expected watched.jsonl of a run of train.py")
    chosen = list(dict.fromkeys([*first.values(), *questions]))[:3]
    frames = []
    for step, asked in steps.items():
        films = [replay(asked[name], questions[name]) for name in chosen if name in asked]
        frames.append(stack([film_strip(film, f"step {step}: ") for film in films]))
    file = folder / "watch.gif"
    write_gif(frames, file)
    return file


def write_gif(frames: list[Image.Image], file: Path) -> None:
    """Pictures of one height as an animation."""
    film = stack(frames).quantize(256)                 # one palette for all: no colour flickers
    height = frames[0].height
    frames = [film.crop((0, top, film.width, top + height))
              for top in range(0, film.height, height)]
    times = [900] * (len(frames) - 1) + [3000]         # milliseconds
    frames[0].save(file, save_all=True, append_images=frames[1:], duration=times, loop=0)


def replay(saved: dict, question: Question) -> Trajectory:
    """The trajectory of a saved line; its looks are carried out again."""
    image, trajectory = question.open(), restore(saved, question)
    for turn, line in zip(trajectory.turns, saved["turns"]):
        if turn.call:
            crop, turn.box = page.look_again(image, line, saved["space"])
            turn.crop = page.coarse(crop, line["crop"], SIDE)
    return trajectory


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("docs/gif.py: expected one folder of a run")
    try:
        print(write_animation(Path(sys.argv[1])))
    except (OSError, ValueError) as error:
        sys.exit(f"docs/gif.py: {error}")
