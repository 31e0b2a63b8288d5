"""Evaluation: intervals, tables and histograms that say what happened; runs that stop, go on, and are shared by processes."""
import base64
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import ImageChops

import eval as evaluation
from lib.data import write_jsonl
from tiny.world import World, world_questions
from eval import accept_plain, evaluate, histogram, record, restore, summary, table, wilson
from lib.policy import Policy, Tokens
from reward import measure
from rollout import Trajectory, Turn
from show import film_strip
from tests.test_benchmarks import HR, MME, VSTAR, save
from tools import system_prompt, zoom

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("right, n, low, high", [(5, 10, .2366, .7634), (0, 10, 0, .2775), (191, 191, .9803, 1), (0, 0, 0, 1), (0, 58, 0, .0621)])
def test_wilson_interval_by_hand(right, n, low, high):
    """Against values worked out from Wilson's formula."""
    assert wilson(right, n) == pytest.approx((low, high), abs=2e-4)
    assert wilson(right, n)[0] >= 0 and wilson(right, n)[1] <= 1


def test_greedy_evaluation_does_not_depend_on_the_batch(policy, questions):
    """One at a time or all at once: the same answers and the same looks."""
    one, all_ = evaluate(policy, questions, batch=1), evaluate(policy, questions, batch=6)
    assert [record(a) for a in one] == [record(b) for b in all_]


def test_evaluation_keeps_no_features(policy, questions):
    """Memory stays flat over thousands of questions."""
    t = evaluate(policy, questions[:2])[0]
    assert not t.tokens.features and all(turn.crop_tokens is None for turn in t.turns)


def test_table_has_every_category_and_the_histogram_every_letter(policy):
    trajectories = evaluate(policy, world_questions(World(), 0, "test", 0, 40))
    text = table(summary(trajectories, [t.question for t in trajectories]))
    assert all(word in text for word in ("direct_attributes", "comparison", "coarse_to_fine", "all", "95% interval"))
    assert sum(int(w) for w in histogram(trajectories).split()[2::4]) == 40


# ---- trajectories on disk, and the command ------------------------------------------------------------------------------

def test_a_record_restores_its_trajectory(policy, trajectories):
    """Every measure, every table and every film is the same after a round trip through JSON."""
    back = [restore(json.loads(json.dumps(record(t))), t.question) for t in trajectories]
    assert measure(back) == measure(trajectories) and table(summary(back, [t.question for t in back])) == table(summary(trajectories, [t.question for t in trajectories])) and histogram(back) == histogram(trajectories)
    assert [record(t) for t in back] == [record(t) for t in trajectories]
    old, new = next((a, b) for a, b in zip(trajectories, back) if a.looks)
    for turn in new.looks:
        turn.crop = zoom(new.question.open(), turn.call, new.seen, policy.resolution)[0]
    assert ImageChops.difference(film_strip(old), film_strip(new)).getbbox() is None


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The world's questions in the benchmarks' formats, 3 scenes x 4 rows."""
    folder, rows = tmp_path_factory.mktemp("benchmarks"), []
    for i, question in enumerate(world_questions(World(comparison=0, coarse=0), 0, "test", 0, 3)):
        buffer = io.BytesIO()
        question.open().save(buffer, "PNG")
        for cycle in range(4):
            options = question.choices[cycle:] + question.choices[:cycle]
            rows.append({"index": 4 * i + cycle, "question": question.text, **dict(zip("ABCD", options)), "cycle_category": str(cycle),
                         "answer": "ABCD"[options.index(question.answer)], "category": ("single", "cross")[i % 2],
                         "image": base64.b64encode(buffer.getvalue()).decode() if cycle == 0 else str(4 * i)})
    mme = [{key: row[key] for key in ("index", "image", "question", "answer")} | {
        "multi-choice options": str([f"({c}) {row.get(c, 'none of these')}" for c in "ABCDE"]), "category": f"{area}/Monitoring", "l2-category": "x"}
        for area, row in zip(("Perception", "Reasoning") * 6, rows)]
    return {"HR-Bench": save(folder, rows, "hr.tsv"), "MME-RealWorld-Lite": save(folder, mme, "mme.tsv"),
            "V*": save(folder, [{key: row[key] for key in VSTAR} for row in rows], "vstar.tsv")}


@pytest.fixture
def run(monkeypatch, capsys):
    """eval.py in this process; returns what it prints, or raises SystemExit."""
    def command(out, *arguments):
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", ["eval.py", "--model", "tiny", "--films", "0", "--out", str(out), *map(str, arguments)])
        evaluation.main()
        return capsys.readouterr().out
    return command


@pytest.mark.parametrize("name, rows", [
    ("V*", ["single", "cross", "all"]), ("HR-Bench", ["cycle 0, single", "cycle 3, cross", "mean of cycles, single", "mean of cycles, all"]),
    ("MME-RealWorld-Lite", ["Perception/Monitoring", "Reasoning/Monitoring", "Perception", "Reasoning", "all"])])
def test_benchmark_from_the_command(files, run, tmp_path, name, rows):
    text = run(tmp_path, "--data", files[name], "--encoder", "none", "--films", 2)
    lines = text.splitlines()
    assert lines[0].startswith(name) and all(any(line.startswith(f"{row} ") for line in lines) for row in rows)
    assert "calls per question " in text and "answers: " in text and (tmp_path / "films.png").is_file()
    saved = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert [s["n"] for s in saved] == list(range(12)) and [s["id"] for s in saved] == [str(i) for i in range(12)]
    if name != "HR-Bench":
        right = sum(s["correct"] for s in saved)
        assert f"{right / 12:.3f} ({wilson(right, 12)[0]:.3f} .. {wilson(right, 12)[1]:.3f})" in next(line for line in lines if line.startswith("all "))


def test_images_are_open_one_batch_at_a_time(files, run, tmp_path, monkeypatch):
    most, real = [], evaluation.collect
    monkeypatch.setattr(evaluation, "collect", lambda policy, questions, *rest: most.append(len(questions)) or real(policy, questions, *rest))
    run(tmp_path, "--data", files["V*"], "--encoder", "none", "--batch", 5)
    assert most == [5, 5, 2]


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_killed_run_goes_on_and_ends_the_same(files, run, tmp_path, monkeypatch, temperature):
    """Killed in its third batch, its last line torn: asks only what is missing, and ends at the same bytes."""
    arguments = "--data", files["V*"], "--batch", 3, "--temperature", temperature
    whole = run(tmp_path / "whole", *arguments)
    asked, real = [], evaluation.evaluate

    def killed(policy, questions, *rest):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(len(questions))
        return real(policy, questions, *rest)

    monkeypatch.setattr(evaluation, "evaluate", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", *arguments)
    file = tmp_path / "killed" / "predictions.jsonl"
    assert len(file.read_text().splitlines()) == 6
    third = (tmp_path / "whole" / "predictions.jsonl").read_bytes().splitlines()[6]
    file.write_bytes(file.read_bytes() + third[:len(third) // 2])
    asked.clear()
    monkeypatch.setattr(evaluation, "evaluate", lambda policy, questions, *rest: asked.append(len(questions)) or real(policy, questions, *rest))
    assert run(tmp_path / "killed", *arguments, "--resume").replace("/killed/", "/whole/") == whole
    assert asked == [3, 3]
    assert file.read_bytes() == (tmp_path / "whole" / "predictions.jsonl").read_bytes()
    asked.clear()
    run(tmp_path / "killed", *arguments, "--resume")
    assert asked == []  # nothing is left to ask


def test_resume_goes_from_few_questions_to_all(files, run, tmp_path):
    whole = run(tmp_path / "whole", "--data", files["V*"], "--encoder", "none")
    run(tmp_path / "grown", "--data", files["V*"], "--encoder", "none", "--n", 5)
    assert run(tmp_path / "grown", "--data", files["V*"], "--encoder", "none", "--resume").replace("grown", "whole") == whole


def test_resume_refuses_predictions_of_others(files, run, tmp_path, policy, capsys):
    """Other settings, data with other questions, other weights under the same name, or nobody knows."""
    arguments = ["--data", files["V*"], "--encoder", "none", "--n", 2]
    run(tmp_path, *arguments)
    before = (tmp_path / "predictions.jsonl").read_bytes()
    for change, names in ((["--temperature", 1], "temperature 0.0 there and 1.0 now"), (["--no_tools"], "no_tools"), (["--max_turns", 2], "max_turns"),
                          (["--dtype", "bfloat16"], "dtype"), (["--data", files["HR-Bench"]], "data"), (["--max_tokens", 9], "max_tokens")):
        with pytest.raises(SystemExit, match=f"settings.json: .*{names}"):
            run(tmp_path, *arguments, *change, "--resume")
    own = Policy(ROOT / "tiny")
    own.model.lm_head.weight.data.add_(1e-3)
    own.save(tmp_path / "other")
    note = tmp_path / "settings.json"
    settings = json.loads(note.read_text())
    with pytest.raises(SystemExit, match="weights"):
        run(tmp_path, *arguments, "--model", tmp_path / "other", "--resume")
    files["V*"].with_name("changed.tsv").write_text(files["V*"].read_text().replace("What mark", "Which mark"))
    with pytest.raises(SystemExit, match="questions"):
        run(tmp_path, *arguments, "--data", files["V*"].with_name("changed.tsv"), "--resume")
    note.unlink()
    with pytest.raises(SystemExit, match="model None"):
        run(tmp_path, *arguments, "--resume")
    assert (tmp_path / "predictions.jsonl").read_bytes() == before and settings["questions"]


def test_a_new_run_puts_old_predictions_aside(files, run, tmp_path):
    run(tmp_path, "--data", files["V*"], "--encoder", "none", "--n", 3)
    before = (tmp_path / "predictions.jsonl").read_bytes()
    run(tmp_path, "--data", files["V*"], "--encoder", "none", "--n", 2)
    assert (tmp_path / "previous-1" / "predictions.jsonl").read_bytes() == before
    assert len((tmp_path / "predictions.jsonl").read_text().splitlines()) == 2


def test_no_tools(files, run, tmp_path, monkeypatch):
    """One turn; a prompt for tools is replaced by one without, and a model without a prompt keeps none."""
    seen, real = [], evaluation.evaluate
    monkeypatch.setattr(evaluation, "evaluate", lambda policy, questions, scorer, heat, seed, turns, *rest: seen.append(
        (policy.system_prompt, scorer, turns)) or real(policy, questions, scorer, heat, seed, turns, *rest))
    text = run(tmp_path / "a", "--data", files["V*"], "--no_tools", "--max_tokens", 24)
    assert seen == [("", None, 1)] * 2 and "calls per question 0.00" in text
    own = Policy(ROOT / "tiny")
    own.system_prompt = system_prompt()
    own.save(tmp_path / "own")
    run(tmp_path / "b", "--data", files["V*"], "--no_tools", "--max_tokens", 4, "--model", tmp_path / "own")
    assert seen[-1][0] == evaluation.NO_TOOLS_PROMPT and "tool" not in seen[-1][0]


@pytest.mark.parametrize("text, answer", [
    ("B", "B"), ("<think>It is red.</think> The answer is (B).", "The answer is (B)."), ("<answer>B", "B"), ("", None), ("<think>x</think>", None),
    ('<tool_call>{"name": "image_zoom_in_tool"}</tool_call>', None), ("I see a cup and " * 9, None)])
def test_plain_answers(text, answer):
    """Without tools a short last word is an answer; a call, or a chain of thought, is none."""
    trajectory = Trajectory(None, Tokens([]), Tokens([]), [], [], (96, 96), (96, 96), [Turn(text, slice(0, 0))])
    accept_plain([trajectory])
    assert trajectory.answer == answer


@pytest.mark.parametrize("content, names", [("", "no questions"), ("index\timage\n", "columns"), ("\t".join(HR) + "\n0\n", "row 2"), ("{", "JSON")])
def test_a_bad_file_is_one_line(run, tmp_path, content, names):
    (tmp_path / "bad.tsv").write_text(content)
    with pytest.raises(SystemExit, match=f"eval.py: .*{names}"):
        run(tmp_path / "out", "--data", tmp_path / "bad.tsv")


def torchrun(out, *arguments):
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--", "eval.py", "--films", "0", "--out",
                           str(out), *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_two_processes_print_the_same_table(files, run, tmp_path):
    one = run(tmp_path / "one", "--data", files["HR-Bench"], "--n", 11, "--batch", 2)
    two = torchrun(tmp_path / "two", "--data", files["HR-Bench"], "--n", 11, "--batch", 2)
    assert two.returncode == 0 and "Warning" not in two.stderr, two.stderr
    assert two.stdout.replace(f"{tmp_path}/two", f"{tmp_path}/one") == one
    assert sorted(p.name for p in (tmp_path / "two").iterdir()) == ["predictions.jsonl", "settings.json"]
    a, b = ([json.loads(line) for line in (tmp_path / name / "predictions.jsonl").read_text().splitlines()] for name in ("one", "two"))
    for x, y in zip(a, b, strict=True):  # scores may differ in the last digit with the batch
        assert [t.pop("score") for t in x["turns"]] == pytest.approx([t.pop("score") for t in y["turns"]], abs=1e-4)
        assert x == y


def test_a_failing_process_hangs_nobody_and_loses_nothing(run, tmp_path):
    """The picture of question 3, which the second process asks, is broken: the command fails and says so; what was answered is
    kept, and once the file is whole, one process ends what two began."""
    data = write_jsonl(world_questions(World(), 0, "test", 0, 6), tmp_path / "world")
    picture = (tmp_path / "world" / "0003.png").read_bytes()
    (tmp_path / "world" / "0003.png").write_bytes(picture[:99])
    arguments = "--data", data, "--encoder", "none", "--batch", 1
    failed = torchrun(tmp_path / "out", *arguments)
    assert failed.returncode != 0 and "questions.jsonl:4: field 'image'" in failed.stderr
    kept = {s["n"] for f in (tmp_path / "out").glob("predictions*.jsonl") for s in map(json.loads, f.read_text().splitlines())}
    assert 1 in kept and 3 not in kept
    (tmp_path / "world" / "0003.png").write_bytes(picture)
    assert "all                     6" in run(tmp_path / "out", *arguments, "--resume")
    assert len((tmp_path / "out" / "predictions.jsonl").read_text().splitlines()) == 6
