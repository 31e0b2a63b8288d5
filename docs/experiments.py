"""The experiments: five algorithms from the same start, luck, beta, and what else README speaks of.

Every run is `python train.py` with the options below; runs of one comparison share start, questions and steps, so that
differences are paired by seed. Learning rate, clip range and PPO's critic were chosen for each algorithm on seeds 100 and 101, which
are in no comparison ("Tuning" below).

Run it:  python docs/experiments.py                       # trains what docs/experiments.jsonl lacks, two runs at a time (--jobs)
         python docs/experiments.py --only options        # one part
         python docs/experiments.py --table               # only docs/experiments.md, from docs/experiments.jsonl
"""
import argparse
import hashlib
import json
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
RUNS, RESULTS = ROOT / "runs/experiments", ROOT / "docs/experiments.jsonl"
START = hashlib.sha256((ROOT / "tiny/model.safetensors").read_bytes()).hexdigest()[:8]  # the weights that all runs begin with
T95 = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262, 11: 2.228, 12: 2.201,
       13: 2.179, 14: 2.16, 15: 2.145, 16: 2.131}  # Student's t, by number of seeds
CURVES = ("accuracy", "hit", "gap", "lucky", "calls", "semantic", "signal_groups", "grad_noise", "entropy", "clip_fraction", "seconds", "sampled")
ALGORITHMS = ("mapo", "grpo", "dapo", "gspo", "ppo")
MAIN = {"mapo": (), "grpo": (), "dapo": (), "gspo, tuned": ("--clip", "10"), "ppo, tuned": ("--clip", "0.5", "--critic_lr", "3e-3")}
FINALISTS = ("mapo, lr 1e-4", "mapo, lr 1.5e-4", "mapo, clip x 0.5", "grpo, lr 1e-4", "grpo, lr 1.5e-4", "grpo, clip x 0.5", "dapo, lr 1.5e-4",
             "dapo, clip x 0.5", "gspo, lr 1.5e-4", "gspo, clip x 10", "ppo, lr 1.5e-4", "ppo, clip x 0.5", "ppo, critic lr 3e-3", "ppo, clip x 0.5, critic lr 3e-3")
NOTES = {"long": ["250 steps of 8 x 8, five times the default number. `beta 1` is the score alone. `docs/long.png` has the curves.", ""],
         "variants": ["`describe after` scores the words that follow the look, which can always be true; `2 turns` allow one look, `6 turns` five.", ""]}
SHORT, LEVEL = 20, .45  # steps of the runs that compare learning speed, and an accuracy on the way


def parts() -> dict[str, dict[str, tuple[list[str], range]]]:
    """part -> name of a run -> (options of train.py, seeds)."""
    run = lambda algo, *options, seeds=range(8): (["--algo", algo, "--eval_questions", "200", *options], seeds)
    small = lambda algo, *options, **more: run(algo, "--questions", "8", *options, **more)
    short = lambda algo, *options: small(algo, "--steps", str(SHORT), *options, seeds=range(3))
    return {
        "tuning": tuning(small),
        "default": {f"{algo}, default": run(algo, seeds=range(3)) for algo in ("mapo", "grpo")},
        "main": {name: small(name.split(",")[0], "--steps", "30", *options, seeds=range(8 if name in ("mapo", "grpo") else 5)) for name, options in MAIN.items()},
        "credit": {"mapo, credit look": small("mapo", "--steps", "30", "--credit", "look")},
        "options": {f"{algo}, options {n}": short(algo, "--options", n) for n in ("2", "8", "0") for algo in ("mapo", "grpo")},
        "beta": {f"mapo, beta {beta}": short("mapo", "--beta", beta) for beta in ("0.2", "0.6", "1")},
        "long": {"mapo, long": small("mapo", "--steps", "250", seeds=range(1)), "mapo, beta 1 long": small("mapo", "--beta", "1", "--steps", "250", seeds=range(1))},
        "variants": {"mapo, describe after": short("mapo", "--describe", "after"), "mapo, credit turn": short("mapo", "--credit", "turn"),
                     "mapo, lam 0.5": short("mapo", "--lam", "0.5"), "mapo, 2 turns": short("mapo", "--max_turns", "2"),
                     "mapo, 6 turns": short("mapo", "--max_turns", "6")},
    }


def tuning(run) -> dict[str, tuple[list[str], range]]:
    """One option at a time, for each algorithm."""
    settings = {}
    for algo in ALGORITHMS:
        settings |= {f"{algo}, lr {lr}": ("--lr", lr) for lr in ("1e-4", "1.5e-4", "2.5e-4")}
        settings |= {f"{algo}, clip x {clip}": ("--clip", clip) for clip in (("10", "50") if algo == "gspo" else ("0.5", "2"))}
    settings |= {f"ppo, critic lr {lr}": ("--critic_lr", lr) for lr in ("3e-3", "3e-2")}
    settings["ppo, clip x 0.5, critic lr 3e-3"] = MAIN["ppo, tuned"]
    return {name: run(name.split(",")[0], "--steps", "30", *options, seeds=range(100, 102 if name in FINALISTS else 101)) for name, options in settings.items()}


def train(name: str, options: list[str], seed: int) -> dict:
    """One run's line in experiments.jsonl: its options, curves by step, and what it ended at."""
    out = RUNS / f"{name.replace(', ', '-').replace(' ', '')}-{seed}"
    print(f"training {name}, seed {seed}", flush=True)
    subprocess.run([sys.executable, "train.py", *options, "--seed", str(seed), "--out", str(out)], cwd=ROOT, check=True,
                   stdout=subprocess.DEVNULL, stderr=(RUNS / "errors.log").open("a"))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").open()]
    stories = [short_story(record) for record in map(json.loads, (out / "trajectories.jsonl").open()) if " and " in record["right"]]
    results = json.loads((out / "results.json").read_text()) if (out / "results.json").is_file() else {}
    return {"name": name, "seed": seed, "start": START, "options": options, "results": results,
            "curves": {key: [line[key] if line[key] is None else round(line[key], 4) for line in lines] for key in CURVES},
            "two objects": stories[-10:]}


def short_story(record: dict) -> dict:
    """What happened in a trajectory, in a line."""
    looks = [f"{turn['label']} {turn['bbox']}: {turn['score']:.2f}" for turn in record["turns"] if turn["score"] is not None]
    return {key: record[key] for key in ("step", "question", "right", "answer")} | {"looks": looks, "advantage": record["advantage"][-1]}


# ---- numbers ---------------------------------------------------------------------------------------------------------

def mean_interval(values: list[float], digits: int = 3) -> str:
    """mean ± half the 95% interval of the mean over seeds (Student's t); one seed has none."""
    values = [v for v in values if v is not None]
    if not values:
        return "-"
    mean = sum(values) / len(values)
    if len(values) < 2:
        return f"{mean:.{digits}f}"
    std = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
    return f"{mean:.{digits}f} ± {T95[len(values)] * std / math.sqrt(len(values)):.{digits}f}"


def at_end(run: dict, heat: str, key: str, category: str = "all") -> float:
    return run["results"][f"after {heat}"]["categories"][category][key]


def area(run: dict, key: str = "accuracy") -> float | None:
    """Mean over the first 20 steps of what the sampled trajectories did: how fast the agent learns."""
    values = [v for v in run["curves"][key][:SHORT] if v is not None]
    return sum(values) / len(values) if values else None


def steps_to(run: dict, level: float) -> float:
    """The first step at which the mean accuracy of five steps has reached `level`; the run's length if never."""
    values = run["curves"]["accuracy"]
    return next((i + 1 for i in range(4, len(values)) if sum(values[i - 4:i + 1]) / 5 >= level), len(values))


COLUMNS = {"accuracy, greedy": lambda r: at_end(r, "greedy", "accuracy"), "accuracy, sampled": lambda r: at_end(r, "sampled", "accuracy"),
           "hit, sampled": lambda r: at_end(r, "sampled", "hit"), "gap, greedy": lambda r: at_end(r, "greedy", "gap"),
           "gap, sampled": lambda r: at_end(r, "sampled", "gap"), "looks at two objects": lambda r: at_end(r, "sampled", "calls", "comparison"),
           "both seen": lambda r: at_end(r, "sampled", "hit", "comparison")}
def right_given(hit: bool, category: str = "all"):
    """Run -> accuracy of the held-out trajectories with all the evidence seen, or of the others; None where there are none."""
    def value(run: dict) -> float | None:
        m = run["results"]["after sampled"]["categories"][category]
        right, share = (1 - m["lucky"], m["hit"]) if hit else (m["lucky"], 1 - m["hit"])
        return m["accuracy"] * right / share if share else None
    return value


PARTS = {"one object: hit": lambda r: at_end(r, "sampled", "hit", "direct_attributes"), "one object: accuracy": lambda r: at_end(r, "sampled", "accuracy", "direct_attributes"),
         "two objects: hit": lambda r: at_end(r, "sampled", "hit", "comparison"), "two objects: accuracy": lambda r: at_end(r, "sampled", "accuracy", "comparison"),
         "two objects: right with both seen": right_given(True, "comparison"),
         "coarse to fine: accuracy": lambda r: at_end(r, "sampled", "accuracy", "coarse_to_fine"), "all: right with a hit": right_given(True), "all: right without": right_given(False)}
SPEED = {"accuracy, steps 1-20": area, "hit, steps 1-20": lambda r: area(r, "hit"), "gap, steps 1-20": lambda r: area(r, "gap"),
         "lucky, steps 1-20": lambda r: area(r, "lucky"), "groups with signal": lambda r: area(r, "signal_groups")}


def table(runs: dict[str, list[dict]], columns: dict, base: str | None = None) -> list[str]:
    """A row for each name; with `base`, below it the paired difference (same seeds), bold if its interval excludes zero."""
    lines = ["| | seeds | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    for name, group in runs.items():
        lines.append(f"| {name} | {len(group)} | " + " | ".join(mean_interval([f(r) for r in group]) for f in columns.values()) + " |")
    for name, group in runs.items():
        if base and name != base and len(group) > 1:
            other = {r["seed"]: r for r in runs[base]}
            pairs = [(other[r["seed"]], r) for r in group if r["seed"] in other]
            cells = []
            for f in columns.values():
                values = [f(a) - f(b) for a, b in pairs if None not in (f(a), f(b))]
                text = mean_interval(values)
                mean, half = (float(x) for x in text.split(" ± ")) if " ± " in text else (0., 0.)
                cells.append(f"{text} ({len(values)} pairs)" if len(values) < len(pairs) else f"**{text}**" if abs(mean) > half else text)
            lines.append(f"| {base} - {name}, paired | {len(pairs)} | " + " | ".join(cells) + " |")
    return lines


def page(runs: list[dict]) -> str:
    by_name: dict[str, list[dict]] = {}
    for run in runs:
        if run["start"] == START or run["name"] in parts()["tuning"]:
            by_name.setdefault(run["name"], []).append(run)
    chosen = lambda part: {name: by_name[name] for name in parts()[part] if name in by_name}
    lines = [__doc__.split("Run it")[0].strip(), "", "`python docs/experiments.py` made this page; every run's options, curves and results are in "
             "[experiments.jsonl](experiments.jsonl), `python docs/plot.py` draws them. Start (but for the tuning's) and held-out questions (200) "
             "are the same in all; ± is the 95% interval of the mean over seeds (Student's t), bold where a paired difference's excludes zero. "
             "*Looks at two objects*: calls on the questions about two, which need two; *both seen*: their hit (both sampled).", ""]
    if found := chosen("tuning"):
        lines += tuning_table(found)
    if found := chosen("default"):
        lines += ["## The default run", "", "`python train.py` and `python train.py --algo grpo`, 50 steps of 16 questions x 8 trajectories, with 200 held-out questions.", "",
                  *table(found, COLUMNS, "mapo, default"), "", *table(found, SPEED, "mapo, default"), ""]
    if main := chosen("main"):
        start = main["mapo"][0]["results"]
        lines += ["## Five algorithms", "", "30 steps of 8 questions x 8 trajectories, two updates a batch. `tuned`: with the settings chosen above; the others' are "
                  f"train.py's. The start: accuracy {start['before greedy']['accuracy']:.3f} greedy, {start['before sampled']['accuracy']:.3f} "
                  f"sampled; gap {start['before greedy']['gap']:.3f} and {start['before sampled']['gap']:.3f}.", "", *table(main, COLUMNS, "mapo"), "", *table(main, SPEED, "mapo"), "",
                  "| | steps to 0.5 | steps to 0.7 | seconds a step | trajectories sampled a step | calls at the end | seeds below 1.1 looks at two objects |", "|---" * 7 + "|"]
        for name, group in main.items():
            lines.append(f"| {name} | {mean_interval([steps_to(r, .5) for r in group], 1)} | {mean_interval([steps_to(r, .7) for r in group], 1)} | "
                         f"{mean_interval([area(r, 'seconds') for r in group], 2)} | {mean_interval([sum(r['curves']['sampled']) / len(r['curves']['sampled']) for r in group], 1)} | "
                         f"{mean_interval([at_end(r, 'sampled', 'calls') for r in group], 2)} | "
                         f"{sum(COLUMNS['looks at two objects'](r) < 1.1 for r in group)} of {len(group)} |")
        lines += ["", "## Where accuracy comes from", "", "accuracy = hit x right with a hit + (1 - hit) x right without, all sampled, on the same held-out questions:", "", *table(main, PARTS, "mapo"), ""]
        lines += stories([r for r in main["mapo"] if r.get("two objects")])
    if (found := chosen("credit")) and main:
        found = {"mapo": main["mapo"]} | found
        lines += ["## Credit by look", "", "`--credit look` ([theory.md](theory.md), section 3) against the whole trajectory's S, at the settings of the five algorithms. (A first version was "
                  "tried on seeds 1 to 4 before this table was made.)", "", *table(found, COLUMNS, "mapo"), "",
                  "Looks at two objects, seed by seed: " + "; ".join(f"{name}: " + ", ".join(f"{COLUMNS['looks at two objects'](r):.2f}" for r in sorted(group, key=lambda r: r["seed"]))
                                                                     for name, group in found.items()) + ".", ""]
    if chosen("options"):
        lines += ["", "## Luck", "", "The fewer options a question has, the more often a bluff is right, and the less the outcome says about the look: "
                  "the theory says that the semantic score must help more. Eq. 8 from the moments that [probe.md](probe.md) measured at the start "
                  "(p: hit; rho: right without one; eps: wrong with one):", "", *luck_table(), ""]
        for options in ("2", "4", "8", "0"):  # 4: the first seeds of the main part
            pair = {f"{algo}, {options} options": [r for r in by_name.get(algo if options == "4" else f"{algo}, options {options}", []) if r["seed"] < 3]
                    for algo in ("mapo", "grpo")}
            lines += ["", *table(pair, SPEED | {f"steps to {LEVEL} (at most {SHORT})": lambda r: min(steps_to(r, LEVEL), SHORT)}, f"mapo, {options} options")]
    for part, title in (("beta", "Beta"), ("variants", "Variants of MAPO"), ("long", "A long run")):
        if found := chosen(part):
            same = {"mapo": [r for r in by_name.get("mapo", []) if r["seed"] < 3]} if part != "long" else {}
            lines += ["", f"## {title}", "", *NOTES.get(part, []), *table({k: v for k, v in (same | found).items() if v}, COLUMNS if part == "long" else SPEED, "mapo" if same.get("mapo") else None)]
    return "\n".join(lines) + "\n"


def stories(runs: list[dict]) -> list[str]:
    """Logged trajectories about two objects, of the run with the fewest second looks and of the one with the most."""
    lines, looks = ["## What happens to the second look", "", "The last logged trajectories about two objects of two runs of MAPO, those with the fewest and the most looks at them "
                    "(held out, at the end), as *label box: score*. An advantage is relative to the other seven trajectories of the question."], COLUMNS["looks at two objects"]
    for run in sorted(runs, key=looks)[::max(len(runs) - 1, 1)]:
        lines += ["", f"{run['name']}, seed {run['seed']}, {looks(run):.2f} looks:", ""]
        for s in run["two objects"][-6:]:
            right = "right" if s["answer"] == s["right"] else f"wrong: {s['right']}"
            lines.append(f"- step {s['step']}: {s['question']} {' → '.join(s['looks']) or 'no look'} → *{s['answer']}*, {right}; advantage {s['advantage']:+.2f}")
    return [*lines, ""] if runs else []


def tuning_table(found: dict[str, list[dict]]) -> list[str]:
    """A row for each setting, a number for each development seed."""
    earlier = sorted({r["start"] for group in found.values() for r in group} - {START})
    lines = ["## Tuning", "", "30 steps of 8 x 8 on seed 100 for every setting, on seed 101 as well for the finalists: train.py's own (learning rate 1.5e-4, clip range x 1, critic "
             "1e-2) and the best of the others. `clip_fraction`: of each batch's second update. Chosen is the highest accuracy over the last ten steps on training questions, each of which is seen once (the held-out "
             "ones choose nothing); train.py's own setting, if it is within 0.01 of that. It stays for MAPO, GRPO and DAPO."
             + (f" *These runs began with an earlier `tiny/`* (sha256 {', '.join(earlier)}..; the others' is {START}..): the settings were chosen with that one." if earlier else ""), "",
             "| | accuracy, steps 21-30 | gap, steps 21-30 | clip_fraction, steps 1-30 | accuracy held out, greedy | sampled |", "|---" * 6 + "|"]
    for name, group in found.items():
        cells = [[sum(r["curves"][key][-last:]) / last for r in group] for key, last in (("accuracy", 10), ("gap", 10), ("clip_fraction", 30))] + [[at_end(r, heat, "accuracy") for r in group] for heat in ("greedy", "sampled")]
        lines.append(f"| {name} | " + " | ".join(", ".join(f"{v:.3f}" for v in values) for values in cells) + " |")
    return [*lines, ""]


def luck_table() -> list[str]:
    """What eq. 8 predicts for each number of options, as docs/probe.py worked it out from its rollouts at the start."""
    lines = ["| options | p | eps | rho | SNR at beta 0.4 / SNR of the outcome |", "|---" * 5 + "|"]
    for line in (ROOT / "docs/probe.jsonl").open():
        probe = json.loads(line)
        if probe["when"] == "At the start":
            (ratio, low, high), looking = probe["theory"]["pooled"]["gain"], probe["looking"]
            lines.append(f"| {probe['options'] or 'none'} | {looking['p']:.2f} | {looking['eps']:.2f} | {looking['rho']:.2f} | {ratio:.1f} [{low:.1f}, {high:.1f}] |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", default=list(parts()), choices=list(parts()))
    parser.add_argument("--seeds", type=int, default=16, help="at most so many")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side")
    parser.add_argument("--table", action="store_true", help="train nothing")
    args = parser.parse_args()
    runs = [json.loads(line) for line in RESULTS.open()] if RESULTS.is_file() else []
    if not args.table:
        RUNS.mkdir(parents=True, exist_ok=True)
        done = [(r["name"], r["options"], r["seed"]) for r in runs if r["start"] == START]
        jobs = [(name, options, seed) for part in args.only for name, (options, seeds) in parts()[part].items() for seed in seeds[:args.seeds]
                if (name, options, seed) not in done]
        jobs = sorted(jobs, key=lambda job: (args.only.index(next(p for p in args.only if job[0] in parts()[p])), job[2]))  # seed by seed
        with ThreadPoolExecutor(args.jobs) as pool:
            for run in pool.map(lambda job: train(*job), jobs):
                runs = [r for r in runs if (r["name"], r["seed"]) != (run["name"], run["seed"])] + [run]
                RESULTS.write_text("".join(json.dumps(r) + "\n" for r in runs))
    (ROOT / "docs/experiments.md").write_text(page(runs))


if __name__ == "__main__":
    main()
