"""docs/curves.png: the learning curves of docs/experiments.md, drawn by the page of a run.

The seeds of a row of docs/experiments.jsonl become the folder of one run: at each step, each number
is the mean of the seeds. show.py puts these folders side by side on a page, as it does with any
runs. A headless Chromium takes the picture of the page. Only this picture and docs/browser.py need
Chromium, and docs/browser.py says how to install it; without it, the page is written all the same.

Run it:  python docs/plot.py      # a page in runs/curves/, and docs/curves.png; 10 s
"""
import json
from pathlib import Path

from browser import Browser, take_picture
from experiments import chosen
from lib.page import CURVES
from record import read_runs
from show import write_page

ROOT = Path(__file__).parent.parent


def rows_of(runs: list[dict]) -> dict[str, list[dict]]:
    """Row -> its runs, one a seed, of the six algorithms."""
    _, group = chosen("table", runs)
    return {row: list(of_seed.values()) for row, of_seed in group.items()}


def means(runs: list[dict]) -> list[dict]:
    """The lines of metrics.jsonl: at each step the mean over the runs. A run that has no value
    there, such as a gap where nobody looked, does not count."""
    curves, lines = [run["curves"] for run in runs], []
    for i in range(len(curves[0]["accuracy"])):
        values = {name: mean([curve[name][i] for curve in curves]) for name in CURVES}
        lines.append({"step": i + 1, **values})
    return lines


def mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(sum(known) / len(known), 4) if known else None


def write_folder(row: str, runs: list[dict], above: Path) -> Path:
    """The folder of the mean run, named after the row and the number of seeds."""
    folder = above / f"{row}, {len(runs)} seeds"
    folder.mkdir(parents=True, exist_ok=True)
    lines, options = means(runs), runs[0]["options"]
    settings = {name.strip("-"): value for name, value in zip(options[::2], options[1::2])}
    settings["steps"] = len(lines)
    settings["seeds"] = ", ".join(str(run["seed"]) for run in runs)
    (folder / "settings.json").write_text(json.dumps(settings))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def main() -> None:
    rows, above = rows_of(read_runs()), ROOT / "runs/curves"
    folders = [write_folder(row, runs, above) for row, runs in rows.items()]
    page, picture = write_page(folders), ROOT / "docs/curves.png"
    print(page)
    with Browser() as browser:
        take_picture(browser, page, picture, 920, ("curves", "curves"), scale=2)
        assert not browser.complaints()
    print(f"{picture}: {picture.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
