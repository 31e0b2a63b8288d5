"""docs/ and the house: pages say what was measured, equations have one number each, links lead
somewhere, imports go one way, lines are short. And what docs/ alone can do is tested here."""
import ast
import graphlib
import importlib
import json
import math
import re
import runpy
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import ROOT
from tiny.world import World, world_questions

sys.path.insert(0, str(ROOT / "docs"))
import apart
import experiments
import mapo
import record
import train
import vague


def tracked(*endings: str) -> list[Path]:
    """The files of the project, relative to its root: also new ones, without what git ignores."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    paths = [Path(name) for name in sorted(set(names))]
    return [path for path in paths if path.suffix in endings and (ROOT / path).is_file()]


def text(path: Path | str) -> str:
    return (ROOT / path).read_text()


# ---- pages and numbers ---------------------------------------------------------------------------

def records_of(name: str) -> list[dict]:
    return [json.loads(line) for line in text(f"docs/{name}.jsonl").splitlines()]


NUMBERS = {path.stem for path in (ROOT / "docs").glob("*.jsonl")}


@pytest.mark.parametrize("name", sorted(NUMBERS - {"experiments"}))
def test_page_is_made_of_its_numbers(name):
    """Nobody wrote a number by hand."""
    assert importlib.import_module(name).page(records_of(name)) == text(f"docs/{name}.md")


@pytest.mark.parametrize("path", experiments.PAGES, ids=lambda path: path.name)
def test_the_experiments_tables_are_made_of_their_numbers(path):
    assert experiments.redrawn(text(path), records_of("experiments")) == text(path)


def tables(page: str) -> list[dict]:
    """Every Markdown table, as {(row, column): cell}."""
    found, header = [], None
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if not line.startswith("|"):
            header = None
        elif header is None:
            header = cells
            found.append({})
        elif "---" not in line:
            found[-1] |= {(cells[0], column): cell for column, cell in zip(header[1:], cells[1:])}
    return found


def test_readme_quotes_the_experiments():
    """README's tables over seeds are parts of tables of the pages, and so is every interval."""
    page, readme = "\n".join(map(text, experiments.PAGES)), text("README.md")
    quoted = [table for table in tables(readme) if any(column == "seeds" for _, column in table)]
    assert quoted
    for table in quoted:
        assert any(table.items() <= source.items() for source in tables(page)), table
    for interval in re.findall(r"\d\.\d{3} ± \d\.\d{3}", readme):
        assert interval in page, interval


# ---- the experiments' machinery ------------------------------------------------------------------

def fabricated(options: str, seed: int, accuracy: float, pair=("s", "c"), **more) -> dict:
    """A line of experiments.jsonl in which every measure, of every kind of question, is a tenth,
    but for the accuracy."""
    measures = dict.fromkeys(("hit", "gap", "calls", "lucky"), .1) | {"accuracy": accuracy}
    kinds = ("all", "direct_attributes", "comparison", "coarse_to_fine")
    results = {f"after {how}": {"categories": dict.fromkeys(kinds, measures)}
               for how in ("greedy", "sampled")}
    curves = {name: [.5, .5] for name in record.CURVES} | {"seconds": [30., 30.]}
    return {"seed": seed, "options": options.split(), "start": pair[0], "code": pair[1],
            "seconds": 60, "results": results, "curves": curves, **more}


def of_part(name: str, pair=("s", "c"), accuracy=lambda row, seed: .5) -> list[dict]:
    part = experiments.parts()[name]
    return [fabricated(options, seed, accuracy(row, seed), pair)
            for row, options in part.rows.items() for seed in part.seeds]


def test_intervals_by_hand():
    """1, 2, 3: mean 2, standard deviation 1, t(2) 4.303: 2 ± 4.303 / sqrt 3."""
    assert experiments.mean_interval([1, 2, None, 3]) == "2.000 ± 2.484"
    assert experiments.mean_interval([1.]) == "1.000" and experiments.mean_interval([None]) == "-"
    assert experiments.mean_interval([1., 2.]) == "1.000, 2.000"
    assert experiments.mean_interval([1, 2, 3], bold=True) == "2.000 ± 2.484"
    assert experiments.mean_interval([4, 5, 6], bold=True) == "**5.000 ± 2.484**"


def test_differences_are_taken_seed_by_seed():
    """gspo is worse by .1, .2, .1, .2, .1: .14 in the mean, with the standard deviation .05477.
    t(4) .05477 / sqrt 5 = .068. The seeds themselves differ more."""
    def accuracy(row, seed):
        return .5 + seed / 20 - (.1 + seed % 2 / 10 if row == "gspo" else 0)
    runs = of_part("longer", accuracy=accuracy)
    lines = experiments.table("longer", experiments.COLUMNS["end"], runs[::-1])
    assert lines[0].startswith("| start s, code c | seeds | accuracy, greedy | accuracy, sampled")
    assert lines[-2].startswith("| mapo - gspo, paired | 5 | **0.140 ± 0.068** |")


def test_a_lacking_value_is_counted_out():
    """A run that never looked has no gap: the difference says how many seeds it has."""
    runs = of_part("longer")
    runs[0]["results"]["after greedy"] = {"categories": {"all": {"accuracy": .5, "gap": None}}}
    lines = experiments.table("longer", experiments.COLUMNS["end"], runs)
    assert lines[-1].split(" | ")[4:7] == ["0.000 ± 0.000", "0.000 ± 0.000 (4 seeds)",
                                           "0.000 ± 0.000"]


def test_the_pooled_effect():
    """The score gives .03 to gspo, .06 to grpo, .0 to dapo: .03 in the mean, in every seed."""
    gains = {"gspo + S": .03, "grpo + S": .06}
    runs = of_part("coupling", accuracy=lambda row, seed: .5 + gains.get(row, 0) + seed / 1000)
    lines = experiments.table("coupling", experiments.COLUMNS["end"], runs)
    found = {line.split(" | ")[0][2:]: line.split(" | ")[1:3] for line in lines}
    assert found["the three pooled"] == ["16", "**0.030 ± 0.000**"]
    assert found["grpo: with S - without"] == ["16", "**0.060 ± 0.000**"]


def test_the_row_of_mapo_is_that_of_the_experiments():
    """The options that the experiments spell out are those of `--algo mapo`, and the size of the
    tables is that of the default run."""
    spelt = train.parse_config((experiments.MAPO + experiments.SMALL + "400").split())
    default = train.parse_config([])
    mine, row = mapo.ALGORITHMS["mapo"], mapo.ALGORITHMS[spelt.algo]
    assert (mine.beta, mine.credit, mine.ratio) == (spelt.beta, spelt.credit, row.ratio)
    assert (mine.mean, mine.std, mine.critic) == (row.mean, row.std, row.critic)
    assert mine.clip_low == pytest.approx(spelt.clip * row.clip_low)
    assert mine.clip_high == pytest.approx(spelt.clip * row.clip_high)
    for name in ("questions", "steps", "group", "updates", "lr", "eval_questions"):
        assert getattr(spelt, name) == getattr(default, name)


def test_a_table_takes_one_start_and_one_code():
    """The pair that has all rows in the most seeds, and the newer of equals; a seed that a row
    lacks is left out; fewer than two are no table."""
    old, new = of_part("longer", ("s", "c"), lambda *_: .2), of_part("longer", ("s", "d"))
    (pair, group) = experiments.chosen("longer", old + new[:-1])
    assert pair == ("s", "c") and len(group["mapo"]) == 5
    assert {run["code"] for of_seed in group.values() for run in of_seed.values()} == {"c"}
    assert experiments.chosen("longer", new + old)[0] == ("s", "c")
    assert experiments.chosen("longer", old + new)[0] == ("s", "d")
    group = experiments.chosen("longer", new[:-1])[1]
    assert all(list(of_seed) == [200, 201, 202, 203] for of_seed in group.values())
    assert experiments.chosen("longer", new[:-4])[1] == {}
    assert experiments.table("longer", experiments.COLUMNS["end"], new[:-4]) == []


def test_what_is_missing(monkeypatch):
    """All runs, seed by seed; not those of this start and code; a run of two parts once."""
    monkeypatch.setattr(experiments, "present", lambda: ("s", "c"))
    counts = {name: len(experiments.missing([name], [])) for name in experiments.parts()}
    assert counts == {"table": 6 * 16, "coupling": 6 * 16, "longer": 3 * 5, "dev": 11 * 8,
                      "luck": 8 * 8, "stability": 4 * 3, "harder": 8 * 4, "rare": 8 * 4,
                      "tuning": 13 * 3, "rate": 18 * 3, "revised": 6 * 6, "apart": 4 * 8}
    assert len(experiments.missing(["table", "coupling"], [])) == 8 * 16
    seeds = [seed for *_, seed in experiments.missing(["longer"], [])]
    assert seeds == sorted(3 * list(range(200, 205)))
    done = of_part("longer")[3:] + of_part("longer", ("s", "other"))
    left = experiments.missing(["longer"], done)
    assert [(row, seed) for row, _, seed in left] == [
        ("longer, mapo", 200), ("longer, mapo", 201), ("longer, mapo", 202)]


def test_development_shares_nothing_with_what_is_reported():
    """Neither seeds nor held-out questions."""
    seeds = {True: set(), False: set()}
    for name, part in experiments.parts().items():
        for_choices = name in ("dev", "tuning", "apart", "rate")
        seeds[for_choices] |= set(part.seeds)
        for options in part.rows.values():
            assert ("--eval_start 100000" in options) == for_choices
    assert not seeds[True] & seeds[False]


def p_value(values: list[float]) -> float:
    """Student's t test of the mean 0, two-sided: the density's tail, from t to infinity, as a sum
    over u in (0, 1) with x = t + u / (1 - u)."""
    df = len(values) - 1
    t = abs(statistics.mean(values)) / statistics.stdev(values) * math.sqrt(len(values))
    scale = math.gamma((df + 1) / 2) / math.sqrt(df * math.pi) / math.gamma(df / 2)
    tail = 0.
    for i in range(2000):
        u = (i + .5) / 2000
        tail += (1 + (t + u / (1 - u)) ** 2 / df) ** (-(df + 1) / 2) / (1 - u) ** 2 / 2000
    return 2 * scale * tail


def test_a_p_value_by_a_table():
    """Student's: of 16 values t = 2.131 is the bound of 95%, of 3 values 4.303."""
    for n, t in ((16, 2.131), (3, 4.303)):
        values = [(-1.) ** i for i in range(n)]
        offset = t * statistics.stdev(values) / n ** .5 - statistics.mean(values)
        assert p_value([v + offset for v in values]) == pytest.approx(.05, abs=1e-4)


def test_holms_correction_keeps_the_leads():
    """All are kept if the k-th largest p-value is at most .05 / k (Holm 1979)."""
    _, group = experiments.chosen("table", records_of("experiments"))
    columns = [name for name in experiments.END if name.split(",")[0] in ("accuracy", "hit", "gap")]
    p = sorted((p_value(experiments.differences(group, pairs, experiments.END[column]))
                for pairs in experiments.parts()["table"].differences.values()
                for column in columns), reverse=True)
    assert len(p) == 25 and all(value <= .05 / k for k, value in enumerate(p, 1))


def test_a_clip_range_is_scaled():
    scaled = experiments.clip_scaled
    assert scaled("--algo gspo --clip 10 --beta 0.4", .5) == "--algo gspo --clip 5 --beta 0.4"
    assert scaled("--algo grpo", 2) == "--algo grpo --clip 2"


def test_expected_time_by_hand():
    """Two runs of 8 x 30, as long as the median of those known: 60, then 60, 100 and 300 s."""
    jobs = [("a", "--questions 8 --steps 30 --algo grpo".split(), seed) for seed in range(2)]
    runs = [fabricated("--steps 30 --questions 8", 0, .5), fabricated("--steps 50", 0, .5)]
    assert record.expected_seconds(jobs, []) == 0
    assert record.expected_seconds(jobs, runs) == 120
    runs += [fabricated("--steps 30 --questions 8", 0, .5, seconds=s) for s in (100, 300)]
    assert record.expected_seconds(jobs, runs) == 200


def test_a_page_keeps_its_text():
    """Only the table below a marker is drawn again; a part without all its runs has none."""
    page = "# A\n\n<!-- longer: end -->\n{}\nWords.\n\n| a | table |\n|---|---|\n| of | ours |\n"
    old = page.replace("{}", "| old |\n|---|\n")
    assert experiments.redrawn(old, []) == page.replace("{}\n", "\n")
    runs = of_part("longer")
    table = "\n".join(experiments.table("longer", experiments.COLUMNS["end"], runs))
    assert experiments.redrawn(old, runs) == page.replace("{}", table + "\n")


def test_what_is_said_beforehand(tmp_path, monkeypatch, capsys):
    """15 runs of a minute each, two at a time."""
    monkeypatch.setattr(experiments, "PAGES", [tmp_path / "page.md"])
    experiments.PAGES[0].write_text("# A\n")
    monkeypatch.setattr(experiments, "read_runs", lambda: of_part("longer", ("s", "older")))
    trained = []
    monkeypatch.setattr(experiments, "train_all", lambda jobs, count: trained.extend(jobs))
    experiments.main([])
    assert not trained
    experiments.main(["--run", "longer"])
    assert capsys.readouterr().out.startswith("15 runs, 2 side by side: about 8 min\n")
    assert len(trained) == 15


TRAINER = """
import json, os, pathlib, sys
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
assert os.environ["OMP_NUM_THREADS"] == "1"
out = pathlib.Path(given["--out"])
out.mkdir(parents=True)
names = {names}
steps = [json.dumps(dict.fromkeys(names, 1 / 3)) for _ in range(2)]
(out / "metrics.jsonl").write_text("\\n".join(steps) + "\\n")
if given["--seed"] == "7":
    sys.exit("the seed 7 is unlucky")
"""

JUDGE = """
import json, pathlib, sys
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
(out / "results.json").write_text(json.dumps({"after greedy": {"accuracy": 2 / 3}}))
"""


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    """A fake train.py and a fake judge, which end at once, and folders of their own. Seed 7
    fails."""
    (tmp_path / "train.py").write_text(TRAINER.replace("{names}", repr(record.CURVES)))
    (tmp_path / "judge.py").write_text(JUDGE)
    monkeypatch.setattr(record, "TRAIN", str(tmp_path / "train.py"))
    monkeypatch.setattr(record, "JUDGE", str(tmp_path / "judge.py"))
    monkeypatch.setattr(record, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(record, "RESULTS", tmp_path / "experiments.jsonl")
    monkeypatch.setattr(record, "present", lambda: ("s", "c"))
    return tmp_path


def jobs_of(*seeds: int) -> list[tuple]:
    return [("a row / 2", ["--algo", "grpo"], seed) for seed in seeds]


def test_runs_are_recorded_as_they_end(trainer):
    """Options, origin, curves and results, with four decimals; and no folder is used twice."""
    (trainer / "experiments.jsonl").write_text('{"an": "older run"}\n')
    record.train_all(jobs_of(0, 1, 2), side_by_side=2)
    record.train_all(jobs_of(0), side_by_side=2)
    old, *runs = record.read_runs()
    assert old == {"an": "older run"} and sorted(run["seed"] for run in runs) == [0, 0, 1, 2]
    run = runs[-1]
    assert (run["start"], run["code"]) == ("s", "c")
    assert run["options"] == ["--algo", "grpo"] and run["curves"]["gap"] == [.3333, .3333]
    assert run["results"] == {"after greedy": {"accuracy": .6667}}
    folders = sorted(path.name for path in (trainer / "runs").iterdir() if path.is_dir())
    assert folders == ["arow-2-0", "arow-2-0-2", "arow-2-1", "arow-2-2"]


def test_a_row_may_name_its_program(trainer):
    """It runs in place of train.py, with the other options; the line keeps its name."""
    other = trainer / "other.py"
    other.write_text((trainer / "train.py").read_text().replace("1 / 3", "1 / 4"))
    options = ["--program", str(other), "--algo", "grpo"]
    record.train_all([("a row", options, 0)], side_by_side=1)
    [run] = record.read_runs()
    assert run["options"] == options and run["curves"]["gap"] == [.25, .25]


def test_coupled_after_the_normalisation_by_hand():
    """Two trajectories, one right. By eq. 3 the right one has 1 by trajectory, whether its score is
    above the other's or below; apart it has .6 + .4 or .6 - .4. Aim is alike here: one turn."""
    r, looked = torch.tensor([1., 0]), torch.ones(2, 1, dtype=torch.bool)
    for scores, expected in (((.9, .1), 1.), ((.1, .9), .2)):
        scores = torch.tensor(scores)[:, None]
        for credit, turns in (("trajectory", ()), ("aim", (1,))):
            A = apart.advantages(r, scores, looked, 2, .4, .95, credit)
            assert torch.allclose(A, torch.tensor([expected, -expected]).view(2, *turns), atol=1e-4)
            before = mapo.advantages(r, scores, looked, 2, .4, .95, credit)
            assert torch.allclose(before, torch.tensor([1., -1]).view(2, *turns), atol=1e-4)


def test_a_failed_run_stops_the_series_and_loses_none(trainer):
    with pytest.raises(RuntimeError, match="seed 7.*log ends.*the seed 7 is unlucky"):
        record.train_all(jobs_of(0, 7, *range(8, 40)), side_by_side=1)
    seeds = [run["seed"] for run in record.read_runs()]
    assert seeds[0] == 0 and 7 not in seeds and len(seeds) < 10


def test_a_run_whose_code_changed_is_not_recorded(trainer, monkeypatch):
    origins = iter([("s", "c"), ("s", "d")])
    monkeypatch.setattr(record, "present", lambda: next(origins))
    with pytest.raises(RuntimeError, match="changed meanwhile"):
        record.train_all(jobs_of(0), side_by_side=1)
    assert not record.RESULTS.exists()


def test_code_is_what_shapes_a_run(tmp_path, monkeypatch):
    """A comment or a docstring may be reworded or new; a number may not be changed."""
    for name in (*record.SHAPES_A_RUN, "tiny/model.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setattr(record, "ROOT", tmp_path)

    def code(source: str) -> str:
        (tmp_path / "mapo.py").write_text(source)
        return record.present()[1]
    first = code('"""One."""\ndef f():\n    """Two."""\n    return .4\n')
    assert code('"""1"""\ndef f():  # new\n    """2"""\n    return 0.4\n') == first
    assert code("def f():\n    return .4\n") == first
    assert code('"""One."""\ndef f():\n    """Two."""\n    return .5\n') != first


def test_what_is_recorded_says_where_it_came_from():
    """Every line has a start and a code, and none stands twice."""
    runs = record.read_runs()
    made = {(record.origin(run), record.settings(run["options"]), run["seed"]) for run in runs}
    assert len(made) == len(runs) > 100 and all(start and code for (start, code), *_ in made)


# ---- equations -----------------------------------------------------------------------------------

EQUATION = re.compile(r"^ {4,}(\S.*\S) {2,}\((\d+)\)$", re.MULTILINE)
PLACES = ("mapo.py", "reward.py", "lib/critic.py", "docs/theory.md", "docs/credit.md",
          "docs/probe.md")


def equations(path: Path | str) -> list[tuple[int, str]]:
    """(number, equation) of each equation line; how it is spaced does not matter."""
    return [(int(number), " ".join(line.split()))
            for line, number in EQUATION.findall(text(path))]


def test_equations_are_numbered_in_the_order_of_reading():
    """1, 2, 3, .., each once."""
    numbers = [number for path in PLACES for number, _ in equations(path)]
    assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) >= 21


def test_an_equation_is_the_same_wherever_it_is_repeated():
    defined = {number: line for path in PLACES for number, line in equations(path)}
    for path in tracked(".py", ".md"):
        for number, line in equations(path):
            assert defined.get(number) == line, f"{path}: eq. {number}"


def test_every_equation_that_is_cited_exists():
    """"eq. 4", "eq. 1 to 3", "eq. 8 and 9"; "its eq. 11" is another paper's."""
    known = {number for path in PLACES for number, _ in equations(path)}
    cited = re.compile(r"(?<!its )\beq\.\s(\d+)(?:(?: to | and |, )(\d+))*", re.IGNORECASE)
    for path in tracked(".py", ".md"):
        for match in cited.finditer(text(path)):
            numbers = {int(number) for number in re.findall(r"\d+", match[0])}
            assert numbers <= known, f"{path}: {match[0]}"


# ---- the house -----------------------------------------------------------------------------------

LEVELS = (("mapo", "tools", "lib"), ("tiny.world",), ("rollout",), ("reward",), ("show",),
          ("eval",), ("report",), ("train",), ("docs",), ("tests",))


def module(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def level(name: str) -> int:
    return next(number for number, names in enumerate(LEVELS)
                if name in names or name.split(".")[0] in names)


def imports_of(path: Path, modules: set[str]) -> set[str]:
    """The project's modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(text(path))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    inside = {f"{path.parent}.{name}" for name in names} if path.parent.name == "docs" else set()
    return {name for name in names | inside if name in modules} - {"lib", "tiny"}


def test_imports_go_one_way():
    """tools, lib -> tiny.world -> rollout -> reward -> show -> eval -> report -> train; docs/ and
    tests/ may import all; no circles; mapo and lib.shard import nothing of the project."""
    files = {module(path): path for path in tracked(".py")}
    graph = {name: imports_of(path, set(files)) for name, path in files.items()}
    for name, imported in graph.items():
        upwards = {other for other in imported if level(other) > level(name)}
        assert not upwards, f"{files[name]} imports {upwards}"
    assert graph["mapo"] == graph["lib.shard"] == set()
    list(graphlib.TopologicalSorter(graph).static_order())                # CycleError names them


def test_lines_are_short():
    """At most 100 characters, but for Markdown tables and addresses."""
    found = []
    for path in tracked(".py", ".md"):
        for number, line in enumerate(text(path).splitlines(), 1):
            free = path.suffix == ".md" and line.startswith("|") or "://" in line
            if len(line) > 100 and not free:
                found.append(f"{path}:{number}: {len(line)}")
    assert not found


@pytest.mark.parametrize("path", sorted((ROOT / "docs").glob("*.md")), ids=lambda path: path.name)
def test_a_chapter_is_short(path):
    assert len(path.read_text().splitlines()) <= 150


def headings(page: str) -> set[str]:
    """The anchors of a page, as GitHub names them."""
    titles = re.findall(r"^#+ (.*)$", page, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", tracked(".md"), ids=str)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", text(path)):
        if "://" not in target:
            file, _, anchor = target.partition("#")
            there = ROOT / path.parent / file if file else ROOT / path
            assert there.exists(), target
            assert not anchor or anchor in headings(there.read_text()), target


# docs/engines has scripts for environments of their own.
@pytest.mark.parametrize("path", [path for path in tracked(".py") if path.parts[0] == "docs"
                                  and "argparse" in text(path) and "engines" not in path.parts],
                         ids=lambda path: path.stem)
def test_scripts_show_their_help(path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / path), run_name="__main__")
    assert not ended.value.code and "usage" in capsys.readouterr().out


# ---- the vague agent -----------------------------------------------------------------------------

def test_the_vague_demonstrator(policy):
    """About half of its labels are "the object"; names and boxes stay; the demonstrator of
    docs/build.py is left as it was."""
    import build
    samples, pairs = vague.Vague(policy, 7).demonstrations(40, miss=.7)
    texts = [policy.decode(tokens.ids) for tokens, _ in samples]
    labels = re.findall(r'"label": "(.*?)"', "\n".join(texts))
    assert .35 < np.mean([label == vague.VAGUE for label in labels]) < .65 and len(labels) > 40
    assert {label for _, label, good in pairs if label == vague.VAGUE and good} == {vague.VAGUE}
    assert "the object" not in build.zoom_call("the red circle", (1, 2, 3, 4))


def test_without_contrast_a_score_is_the_cosine(policy, trajectories):
    looks = [turn for t in trajectories for turn in t.looks][:4]
    labels, crops = [turn.call.label for turn in looks], [turn.crop_tokens for turn in looks]
    references = world_questions(World(), 0, "train", 10**6, 2)
    cosine = vague.Cosine(policy, references)(labels, crops)
    words, images = policy.embed(labels), policy.embed(crops)
    assert torch.allclose(cosine, (words * images).sum(-1).clamp(min=0), atol=1e-5)
