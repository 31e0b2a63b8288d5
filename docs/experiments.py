"""The experiments: what coupling, credit and luck change, from one start and on the same questions.

Every run is `python train.py` with the options that `parts` lists, or another program that stands
before them; docs/record.py trains them, and docs/experiments.jsonl holds a line a run. A table
takes runs of one start and one code, and the seeds that all its rows have, so a series may be
stopped at any time and goes on where it was.

On three pages, experiments.md (what is reported), limits.md (in other conditions) and choices.md
(how settings were chosen), a table stands below a line such as `<!-- table: end -->`: the part and
its columns. The text is written by hand.

Run it:  python docs/experiments.py                       # draws the tables of the pages
         python docs/experiments.py --run table           # first trains what this part lacks
"""
import argparse
import math
import re
import statistics
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from record import Job, expected_seconds, origin, present, read_runs, settings, train_all

PAGES = [Path(__file__).with_name(name) for name in ("experiments.md", "limits.md", "choices.md")]
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
       2.145, 2.131)                              # Student's t, 95%, of 2, 3, .. 16 values

# A column: held out, after training (how answered, measure, of which questions), or the mean of a
# curve over some steps.
EARLY, LATE = slice(0, 20), slice(230, 250)
END = {"accuracy, greedy": ("greedy", "accuracy", "all"),
       "accuracy, sampled": ("sampled", "accuracy", "all"),
       "hit, sampled": ("sampled", "hit", "all"),
       "gap, greedy": ("greedy", "gap", "all"),
       "gap, sampled": ("sampled", "gap", "all"),
       "looks at two objects": ("sampled", "calls", "comparison"),
       "both seen": ("sampled", "hit", "comparison")}
FEW = {name: END[name] for name in ("accuracy, greedy", "accuracy, sampled", "gap, sampled",
                                    "looks at two objects")}
COLUMNS = {
    "end": END,
    "speed": {"accuracy, steps 1-20": ("accuracy", EARLY), "hit, steps 1-20": ("hit", EARLY),
              "gap, steps 1-20": ("gap", EARLY), "lucky, steps 1-20": ("lucky", EARLY),
              "groups with signal": ("signal_groups", EARLY),
              "trajectories a step": ("sampled", EARLY)},
    "kinds": {f"{name}, {how}": (how, "accuracy", category)
              for name, category in (("one mark", "direct_attributes"), ("two marks", "comparison"),
                                     ("small", "coarse_to_fine"))
              for how in ("greedy", "sampled")},
    "choice": FEW,
    "looks": {name: END[name] for name in ("accuracy, greedy", "accuracy, sampled", "hit, sampled")}
    | {"looks, sampled": ("sampled", "calls", "all")},
    "long": FEW | {
        "turns without error": ("sampled", "valid", "all"),
        "entropy, steps 1-20": ("entropy", EARLY),
        "entropy, steps 231-250": ("entropy", LATE),
        "groups with signal, steps 231-250": ("signal_groups", LATE)}}


# ---- what is run ---------------------------------------------------------------------------------

@dataclass
class Part:
    """Runs that are compared."""
    seeds: range
    rows: dict[str, str]                               # row -> options of train.py
    differences: dict[str, list[tuple[str, str]]]      # row -> pairs of rows; several are averaged
    columns: str = "end"                               # in which the rows may be compared


BASES = {"gspo": "--algo gspo --clip 10", "grpo": "--algo grpo", "dapo": "--algo dapo"}
PPO = "--algo ppo --clip 0.5 --critic_lr 3e-3"
MAPO = "--algo gspo --clip 10 --beta 0.4 --credit aim"      # what the row of --algo mapo says
SMALL = " --questions 8 --steps 30 --eval_questions "       # train.py's default size
CHOICE = f"{SMALL}600 --eval_start 100000"                  # for choices: other questions
LARGE = " --questions 16 --steps 50 --eval_questions 1000"
LONG = " --questions 8 --steps 250 --eval_questions 1000"
FEWEST = 2                                                  # seeds of a table


def coupled(beta: str, credit: str) -> dict[str, str]:
    return {f"{base} + beta {beta}, {credit}": f"{options} --beta {beta} --credit {credit}"
            for base, options in BASES.items()}


def part(seeds: range, rows: dict[str, str], size: str, first: str = "",
         pooled: dict[str, list[tuple[str, str]]] | None = None) -> Part:
    """The rows with the options that they share; each is compared with the `first`."""
    rows = {row: options + size for row, options in rows.items()}
    pairs = {f"{first} - {row}, paired": [(first, row)] for row in rows if first and row != first}
    return Part(seeds, rows, pairs | (pooled or {}))


def parts() -> dict[str, Part]:
    compared = {"mapo": MAPO} | BASES | {"dr_grpo": "--algo dr_grpo", "ppo": PPO}
    with_score = {f"{base} + S": f"{options} --beta 0.4 --credit aim"
                  for base, options in BASES.items()}
    pairs = [(f"{base} + S", base) for base in BASES]
    effects = {f"{base}: with S - without": [pair] for pair, base in zip(pairs, BASES)}
    effects["the three pooled"] = pairs
    larger = {"mapo": MAPO, "gspo": BASES["gspo"], "grpo": BASES["grpo"]}
    return {"table": part(range(200, 216), compared, f"{SMALL}1000", "mapo"),
            "coupling": part(range(200, 216), with_score | BASES, f"{SMALL}1000", "", effects),
            "longer": part(range(200, 205), larger, LARGE, "mapo"),
            "stability": stability(larger),
            "dev": development(),
            "tuning": tuning(compared),
            "apart": apart(),
            "rate": rate(compared),
            "revised": revised(compared),
            "harder": harder(larger, 12, "mapo"),
            "rare": replace(harder(larger, 16, "mapo, by trajectory"), columns="looks"),
            "luck": luck()}


def stability(rows: dict[str, str]) -> Part:
    """What happens to an agent that is trained eight times as long."""
    rows = rows | {"mapo, beta 1": MAPO.replace("--beta 0.4", "--beta 1")}
    return replace(part(range(200, 203), rows, LONG), columns="long")


def development() -> Part:
    """For choices, on seeds and questions that no other part has."""
    credits = {credit: coupled("0.4", credit) for credit in ("trajectory", "look", "aim")}
    rows = credits["trajectory"] | credits["look"] | credits["aim"]
    for beta in ("0.2", "0.6"):
        row = f"gspo + beta {beta}, aim"
        rows[row] = coupled(beta, "aim")[row]
    pairs = {f"{one} - {other}, three bases pooled": list(zip(credits[one], credits[other]))
             for one, other in (("aim", "trajectory"), ("aim", "look"), ("look", "trajectory"))}
    for base in ("grpo", "dapo"):
        pairs[f"gspo - {base}, three credits pooled"] = [
            (f"gspo + beta 0.4, {credit}", f"{base} + beta 0.4, {credit}") for credit in credits]
    for beta in ("0.2", "0.4"):
        pairs[f"beta 0.6 - beta {beta}"] = [("gspo + beta 0.6, aim", f"gspo + beta {beta}, aim")]
    return replace(part(range(100, 108), rows, CHOICE, pooled=pairs), columns="choice")


def tuning(compared: dict[str, str]) -> Part:
    """The baselines that are near `mapo`, with half and twice their clip range."""
    rows = {"mapo": MAPO}
    for row in ("gspo", "grpo", "dapo", "dr_grpo"):
        rows[row] = options = compared[row]
        rows[f"{row}, clip x 0.5"] = clip_scaled(options, .5)
        rows[f"{row}, clip x 2"] = clip_scaled(options, 2)
    return replace(part(range(100, 103), rows, CHOICE), columns="choice")


def apart() -> Part:
    """The coupling before and after the normalisation, on GSPO's ratio (docs/apart.py)."""
    rows, pairs = {}, {}
    for credit in ("aim", "trajectory"):
        before, after = f"before, {credit}", f"after, {credit}"
        rows[before] = coupled("0.4", credit)[f"gspo + beta 0.4, {credit}"]
        rows[after] = f"--program docs/apart.py {rows[before]}"
        pairs[f"before - after, {credit}, paired"] = [(before, after)]
    pairs["before - after, pooled"] = [pair for [pair] in pairs.values()]
    return replace(part(range(100, 108), rows, CHOICE, pooled=pairs), columns="choice")


def rate(compared: dict[str, str]) -> Part:
    """Half and twice the learning rate, of all that are compared."""
    rows = {}
    for row, options in compared.items():
        rows[row] = options
        rows[f"{row}, lr x 0.5"] = f"{options} --lr 7.5e-5"
        rows[f"{row}, lr x 2"] = f"{options} --lr 3e-4"
    return replace(part(range(100, 103), rows, CHOICE), columns="choice")


def revised(compared: dict[str, str]) -> Part:
    """What the runs for choices would have chosen, on seeds that are reported."""
    rows = {"mapo": MAPO, "mapo, beta 0.6": MAPO.replace("--beta 0.4", "--beta 0.6"),
            "gspo": compared["gspo"]}
    for row in ("grpo", "dapo", "dr_grpo"):
        rows[f"{row}, clip x 0.5"] = clip_scaled(compared[row], .5)
    return part(range(200, 206), rows, f"{SMALL}1000", "mapo")


def clip_scaled(options: str, factor: float) -> str:
    """The options with another --clip. It is 1 where they do not name it."""
    words = options.split()
    if "--clip" not in words:
        words += ["--clip", "1"]
    place = words.index("--clip") + 1
    words[place] = f"{factor * float(words[place]):g}"
    return " ".join(words)


def harder(compared: dict[str, str], objects: int, first: str) -> Part:
    """More objects a scene than the six with which the start was taught. Among 16 it hardly ever
    looks: docs/credit.md predicts that credit by aim then hardly teaches it."""
    compared = compared | {"mapo, by trajectory": MAPO.replace("aim", "trajectory")}
    rows = {row: f"{options} --objects {objects}" for row, options in compared.items()}
    return part(range(200, 208), rows, f"{SMALL}1000", first)


def luck() -> Part:
    """The plainest coupling, credit by trajectory on GRPO, of whose gradient eq. 18 speaks. The
    first 20 steps count; with 4 options, GRPO's are those of the table, of 30."""
    rows, pairs = {}, {}
    for number in ("2", "4", "8", "0"):
        options = "" if number == "4" else f" --options {number}"
        short = f"{options} --questions 8 --steps 20 --eval_questions 200"
        names = f"grpo + S, {number} options", f"grpo, {number} options"
        rows[names[0]] = f"--algo grpo --beta 0.4{short}"
        rows[names[1]] = f"--algo grpo{f'{SMALL}1000' if number == '4' else short}"
        pairs[f"with S - without, {number} options, paired"] = [names]
    for number in ("8", "0"):
        pairs[f"half of (that with 2 options - with {number})"] = [
            ("grpo + S, 2 options", "grpo, 2 options"),
            (f"grpo, {number} options", f"grpo + S, {number} options")]
    return replace(part(range(200, 208), rows, "", pooled=pairs), columns="speed")


# ---- tables --------------------------------------------------------------------------------------

def chosen(name: str, runs: list[dict]) -> tuple[tuple[str, str], dict[str, dict[int, dict]]]:
    """The (start, code) with the most seeds for which every row of a part has a run, the newer one
    of equals; and row -> seed -> run of these seeds. Nothing with fewer than FEWEST seeds."""
    part, found = parts()[name], {}
    rows = {settings(options.split()): row for row, options in part.rows.items()}
    for run in runs:
        row = rows.get(settings(run["options"]))
        if row and run["seed"] in part.seeds:
            group = found.setdefault(origin(run), {row: {} for row in part.rows})
            group[row][run["seed"]] = run
    best, most = (("", ""), {}), FEWEST
    for pair, group in found.items():
        seeds = sorted(set.intersection(*(set(of_seed) for of_seed in group.values())))
        if len(seeds) >= most:
            most = len(seeds)
            best = pair, {row: {seed: group[row][seed] for seed in seeds} for row in group}
    return best


def value(run: dict, column: tuple) -> float | None:
    """None: nothing to measure, such as the gap of an agent that never looks."""
    if len(column) == 2:
        curve, steps = column
        values = [v for v in run["curves"][curve][steps] if v is not None]
        return statistics.mean(values) if values else None
    how, measure, questions = column
    return run["results"][f"after {how}"]["categories"][questions][measure]


def interval(values: list[float]) -> tuple[float, float]:
    """The mean, and half its 95% interval over seeds, two or more (Student's t)."""
    n = len(values)
    return statistics.mean(values), T95[n - 2] * statistics.stdev(values) / math.sqrt(n)


def mean_interval(values: list[float | None], bold: bool = False) -> str:
    """mean ± half; `bold`, if the interval excludes 0. One value or two as they are."""
    values = [v for v in values if v is not None]
    if len(values) <= 2:                               # too few for an interval
        return ", ".join(f"{v:.3f}" for v in values) or "-"
    mean, half = interval(values)
    text = f"{mean:.3f} ± {half:.3f}"
    return f"**{text}**" if bold and abs(mean) > half else text


def differences(group: dict, pairs: list[tuple[str, str]], column: tuple) -> list[float]:
    """One for each seed: one row minus the other, the mean over the pairs."""
    found = []
    for seed in group[pairs[0][0]]:
        both = [(value(group[a][seed], column), value(group[b][seed], column)) for a, b in pairs]
        if not any(None in two for two in both):
            found.append(statistics.mean(one - other for one, other in both))
    return found


def table(name: str, columns: dict, runs: list[dict]) -> list[str]:
    """A line for each row and for each difference; [] while runs are missing."""
    (start, code), group = chosen(name, runs)
    if not group:
        return []
    lines = [f"| start {start}, code {code} | seeds | {' | '.join(columns)} |",
             "|---" * (len(columns) + 2) + "|"]
    for row, of_seed in group.items():
        cells = [mean_interval([value(run, column) for run in of_seed.values()])
                 for column in columns.values()]
        lines.append(f"| {row} | {len(of_seed)} | {' | '.join(cells)} |")
    for row, pairs in parts()[name].differences.items():
        values = [differences(group, pairs, column) for column in columns.values()]
        count = max(len(of_column) for of_column in values)
        cells = [mean_interval(of_column, bold=len(of_column) == count)
                 + (f" ({len(of_column)} seeds)" if len(of_column) < count else "")
                 for of_column in values]
        lines.append(f"| {row} | {count} | {' | '.join(cells)} |")
    return lines


def redrawn(page: str, runs: list[dict]) -> str:
    """The page with its tables drawn again."""
    lines, old_table = [], False
    for line in page.splitlines():
        old_table = old_table and line.startswith("|")
        if old_table:
            continue
        lines.append(line)
        if marker := re.fullmatch(r"<!-- (\w+): (\w+) -->", line):
            name, kind = marker.groups()
            lines += table(name, COLUMNS[kind], runs)
            old_table = True
    return "\n".join(lines) + "\n"


def missing(names: list[str], runs: list[dict]) -> list[Job]:
    """What the parts lack of the present start and code, seed by seed: if the series is stopped
    early, the rows have as many seeds."""
    jobs, now = {}, present()
    done = {(settings(run["options"]), run["seed"]) for run in runs if origin(run) == now}
    for name in names:
        for row, options in parts()[name].rows.items():
            for seed in parts()[name].seeds:
                jobs[settings(options.split()), seed] = f"{name}, {row}", options.split(), seed
    return sorted((job for key, job in jobs.items() if key not in done), key=lambda job: job[2])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", nargs="+", default=[], choices=list(parts()), metavar="PART",
                        help=f"train what is missing of: {', '.join(parts())}")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side")
    args = parser.parse_args(arguments)
    if args.run:
        jobs = missing(args.run, read_runs())
        minutes = expected_seconds(jobs, read_runs()) / args.jobs / 60
        print(f"{len(jobs)} runs, {args.jobs} side by side: about {minutes:.0f} min", flush=True)
        try:
            train_all(jobs, args.jobs)
        except RuntimeError as error:
            sys.exit(f"experiments.py: {error}")
        for name in args.run:
            print("\n".join(table(name, COLUMNS[parts()[name].columns], read_runs())))
    for page in PAGES:
        page.write_text(redrawn(page.read_text(), read_runs()))


if __name__ == "__main__":
    main()
