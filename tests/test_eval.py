"""Evaluation: intervals and tables say what happened. Runs stop, go on, and are shared by
processes, and always end at the same table."""
import base64
import csv
import io
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import eval as evaluation
from conftest import ROOT
from eval import (benchmark_table, evaluate, final_answer, read_predictions, record, restore,
                  summary, table, wilson)
from lib import checkpoint
from lib.data import write_jsonl
from lib.policy import Policy, Tokens
from lib.question import Question
from reward import measure
from rollout import Trajectory, Turn
from tiny.world import World, world_questions
from tools import Call


@pytest.mark.parametrize("right, n, low, high", [
    (5, 10, .2366, .7634), (0, 10, 0, .2775), (191, 191, .9803, 1), (0, 0, 0, 1),
    (0, 58, 0, .0621)])
def test_wilson_interval_by_hand(right, n, low, high):
    """Against values worked out from Wilson's formula."""
    found = wilson(right, n)
    assert found == pytest.approx((low, high), abs=2e-4)
    assert found[0] >= 0 and found[1] <= 1


def test_greedy_evaluation_does_not_depend_on_the_batch(policy, questions):
    """One at a time or all at once: the same answers and the same looks. No features are kept, so
    that memory stays flat over thousands of questions."""
    one, all_ = evaluate(policy, questions, batch=1), evaluate(policy, questions, batch=6)
    assert [record(a) for a in one] == [record(b) for b in all_]
    for t in all_:
        assert not t.tokens.features and not t.prompt.features
        assert all(turn.crop_tokens is None for turn in t.turns)


def about(category, answer, right, *turns) -> Trajectory:
    question = Question("?", right, lambda: None, ("red", "blue", "green"), category)
    return Trajectory(question, Tokens([]), Tokens([]), [], [], (96, 96), (96, 96), list(turns),
                      answer, "answer")


def test_table_by_hand():
    call = Call("image_zoom_in_tool", "the cup", {"bbox_2d": (0, 0, 9, 9)})
    look = Turn("", slice(0, 0), call, (0, 0, 9, 9), score=.25)
    found = [about("a", "B", "blue", look, look), about("a", "(c)", "A"), about("b", None, "A"),
             about("", "what?", "C")]
    lines = table(summary(found, [t.question for t in found])).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["(none)", "a", "b", "all"]
    low, high = wilson(1, 4)
    assert lines[4].split() == ["all", "4", "0.250", f"({low:.3f}", "..", f"{high:.3f})",
                                "0.50", "1.00", "-", "-", "-", "0.25"]
    assert len({len(line) for line in lines[1:]}) == 1


def test_a_benchmarks_table_by_hand():
    """V*'s reference reads "It is red." and a whole turn, and we do not; we read "(b)"."""
    found = [about("a", "It is red.", "A"), about("a", "B", "B"), about("b", "(b)", "B"),
             about("b", None, "C", Turn("<think>green</think>", slice(0, 0)))]
    for t in found:
        t.question.benchmark = "V*"
        t.answer = final_answer(t)
    lines = benchmark_table("V*", found).splitlines()
    assert lines[0].split() == ["V*", "n", "accuracy", "(95%", "interval)", "ours"]
    cells = [line.split() for line in lines[1:4]]
    assert [(row[0], row[1], row[2], row[-1]) for row in cells] == [
        ("a", "2", "1.000", "0.500"), ("b", "2", "0.500", "0.500"), ("all", "4", "0.750", "0.500")]
    assert len({len(line) for line in lines[:4]}) == 1


# ---- trajectories on disk ------------------------------------------------------------------------

def test_a_record_restores_its_trajectory(trajectories):
    """Every measure and every table is the same after a round trip through JSON."""
    saved = [json.loads(json.dumps(record(t))) for t in trajectories]
    back = [restore(line, t.question) for line, t in zip(saved, trajectories)]
    assert measure(back) == measure(trajectories)
    questions = [t.question for t in trajectories]
    assert summary(back, questions) == summary(trajectories, questions)
    again = [json.loads(json.dumps(record(t))) for t in back]
    sizes = [turn.pop("crop") for line in saved for turn in line["turns"]]
    assert [48, 48] in sizes and None in sizes
    for line in again:
        for turn in line["turns"]:
            assert turn.pop("crop") is None              # pixels are not saved: show.py cuts again
    assert again == saved
    assert any(t.looks for t in back)


def test_a_record_names_the_tool_and_its_arguments():
    """Whatever the tool is; a turn without a call has none."""
    turns = [Turn("a", slice(0, 0), Call("turn_it", "the cup", {"angle": 90}), (0, 0, 9, 9)),
             Turn("b", slice(0, 0), error="bad_json")]
    saved = json.loads(json.dumps(record(about("", "B", "blue", *turns))))
    first, second = saved["turns"]
    assert first["tool"] == "turn_it" and first["label"] == "the cup"
    assert first["arguments"] == {"angle": 90}
    assert second["tool"] is second["label"] is second["arguments"] is None
    assert second["error"] == "bad_json" and saved["correct"] == 1
    again = restore(saved, about("", "B", "blue").question)
    assert again.turns[0].call == turns[0].call and again.turns[1].call is None


# ---- the command ---------------------------------------------------------------------------------

def write_tsv(file, rows):
    with file.open("w", encoding="utf-8", newline="") as out:
        writer = csv.DictWriter(out, list(rows[0]), delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return file


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The world's questions in the benchmarks' formats, 3 scenes x 4 rows."""
    folder, rows = tmp_path_factory.mktemp("benchmarks"), []
    for i, question in enumerate(world_questions(World(comparison=0, coarse=0), 0, "test", 0, 3)):
        buffer = io.BytesIO()
        question.open().save(buffer, "PNG")
        picture = base64.b64encode(buffer.getvalue()).decode()
        for cycle in range(4):
            options = question.choices[cycle:] + question.choices[:cycle]
            rows.append({"index": 4 * i + cycle, "question": question.text,
                         **dict(zip("ABCD", options)), "cycle_category": str(cycle),
                         "answer": "ABCD"[options.index(question.answer)],
                         "category": ("single", "cross")[i % 2],
                         "image": picture if cycle == 0 else str(4 * i)})
    mme = []
    for i, row in enumerate(rows):
        options = [f"({c}) {row.get(c, 'none of these')}" for c in "ABCDE"]
        mme.append({key: row[key] for key in ("index", "image", "question", "answer")} | {
            "multi-choice options": str(options), "l2-category": "x",
            "category": ("Perception", "Reasoning")[i % 2] + "/Monitoring"})
    vstar = [{key: row[key] for key in row if key != "cycle_category"} for row in rows]
    return {"HR-Bench": write_tsv(folder / "hr.tsv", rows),
            "MME-RealWorld-Lite": write_tsv(folder / "mme.tsv", mme),
            "V*": write_tsv(folder / "vstar.tsv", vstar)}


@pytest.fixture
def run(monkeypatch, capsys):
    """eval.py in this process; returns what it prints, or raises SystemExit."""
    def command(out, *arguments):
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", ["eval.py", "--model", "tiny", "--films", "0",
                                          "--out", str(out), *map(str, arguments)])
        evaluation.main()
        return capsys.readouterr().out
    return command


def torchrun(out, *arguments):
    """eval.py in two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
               "2", "--", "eval.py", "--films", "0", "--out", str(out), *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.fixture
def asked(monkeypatch):
    """The sizes of the batches that were asked."""
    sizes, real = [], evaluation.evaluate

    def counted(policy, questions, *rest):
        sizes.append(len(questions))
        return real(policy, questions, *rest)

    monkeypatch.setattr(evaluation, "evaluate", counted)
    return sizes


@pytest.mark.parametrize("name, rows", [
    ("V*", ["single", "cross", "all"]),
    ("HR-Bench", ["single", "cross", "all"]),
    ("MME-RealWorld-Lite", ["Perception/Monitoring", "Reasoning/Monitoring", "Perception",
                            "Reasoning", "all"])])
def test_a_benchmark(files, run, asked, tmp_path, name, rows):
    """Its table, its films, its predictions; images are open one batch at a time."""
    text = run(tmp_path, "--data", files[name], "--no_score", "--films", 2, "--batch", 5)
    lines = text.splitlines()
    assert asked == [5, 5, 2]
    assert lines[0].startswith(name)
    assert all(any(line.startswith(f"{row} ") for line in lines) for row in rows)
    assert "calls per question " in text
    assert (tmp_path / "films.png").is_file()
    saved = [json.loads(line) for line in (tmp_path / "predictions-0.jsonl").open()]
    assert [s["n"] for s in saved] == list(range(12))
    assert [s["id"] for s in saved] == [str(i) for i in range(12)]
    if name != "HR-Bench":
        right = sum(s["correct"] for s in saved)
        low, high = wilson(right, 12)
        last = next(line for line in lines if line.startswith("all "))
        assert f"{right / 12:.3f} ({low:.3f} .. {high:.3f})" in last


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_killed_run_goes_on_and_ends_the_same(files, run, asked, tmp_path, monkeypatch,
                                                temperature):
    """Killed in its third batch, of which one line is whole and the next is torn. The batch is
    asked again whole, so that its draws are the same, and the run ends at the same predictions. A
    third run has nothing to ask. At temperature 1 two processes go on."""
    arguments = "--data", files["V*"], "--batch", 3, "--temperature", temperature
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    table_of_whole = run(whole, *arguments)
    real = evaluation.evaluate

    def dies(policy, questions, *rest):
        if len(asked) == 6:
            raise KeyboardInterrupt
        return real(policy, questions, *rest)

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="resume .* asks the rest"):
        patch.setattr(evaluation, "evaluate", dies)
        run(killed, *arguments)
    checkpoint.LOCKS.pop(killed).close()                  # as the end of a process does
    file = killed / "predictions-0.jsonl"
    assert len(file.read_bytes().splitlines()) == 6
    third = (whole / "predictions-0.jsonl").read_bytes().splitlines()[6:8]
    file.write_bytes(file.read_bytes() + third[0] + b"\n" + third[1][:len(third[1]) // 2])
    assert sorted(read_predictions(killed)) == [0, 1, 2, 3, 4, 5, 6]
    asked.clear()
    if temperature:
        done = torchrun(killed, *arguments, "--resume")
        assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr
        assert len((killed / "predictions-1.jsonl").read_bytes().splitlines()) == 3
        text = done.stdout
    else:
        text = run(killed, *arguments, "--resume")
        assert asked == [3, 3]
    assert text.replace(str(killed), str(whole)) == table_of_whole
    assert read_predictions(killed) == read_predictions(whole)
    asked.clear()
    assert run(killed, *arguments, "--resume") == text and asked == []


def test_resume_goes_to_the_evaluation_with_the_same_settings(files, run, tmp_path):
    """Of three, eval, -2 and -3, to the second by its settings, though it was stopped before its
    first answer and the third one's note is torn. Where there is none, it says so and begins."""
    out, arguments = tmp_path / "eval", ("--data", files["V*"], "--no_score")
    run(out, *arguments, "--n", 2)
    note = json.loads((out / "settings.json").read_text())
    for name in ("eval-2", "eval-3"):
        (tmp_path / name).mkdir()
        evaluation.open_folder(tmp_path / name, note | {"seed": 7})
    (tmp_path / "eval-3/settings.json").write_text("{")
    said = run(out, *arguments, "--seed", 7, "--n", 3, "--resume")
    assert f"folder is {tmp_path / 'eval-2'}: {out} holds another run\n" in said
    found = [len(read_predictions(tmp_path / name)) for name in ("eval", "eval-2", "eval-3")]
    assert found == [2, 3, 0]
    assert "nothing to resume" in run(tmp_path / "new", *arguments, "--n", 1, "--resume")


def test_answers_to_other_questions_are_refused(run, tmp_path):
    """A line was put into the file after some answers: they would be counted for others."""
    file, out = write_jsonl(world_questions(World(), 0, "test", 0, 3), tmp_path), tmp_path / "out"
    run(out, "--data", file, "--no_score", "--n", 2)
    lines = file.read_text().splitlines()
    file.write_text("\n".join([lines[2], lines[0], lines[1]]) + "\n")
    with pytest.raises(SystemExit, match="answer 0 is to question test-0-0, found now test-0-2"):
        run(out, "--data", file, "--no_score", "--resume")


def test_a_base_that_is_gone_is_named(tmp_path):
    """A run's looks are scored by the model at which it began."""
    (tmp_path / "train.json").write_text(json.dumps({"model": str(tmp_path / "gone")}))
    args = SimpleNamespace(model=str(tmp_path), data=None)
    with pytest.raises(FileNotFoundError, match="gone: the model at which .* --no_score judges"):
        evaluation.load_scorer(args, None, [])


def test_resume_goes_from_few_questions_to_all(files, run, asked, tmp_path):
    arguments = "--data", files["V*"], "--no_score"
    run(tmp_path / "grown", *arguments, "--n", 5)
    grown = run(tmp_path / "grown", *arguments, "--resume")
    assert asked == [5, 8, 4]
    assert grown.replace("grown", "whole") == run(tmp_path / "whole", *arguments)
    assert "all                                     5 " in run(
        tmp_path / "grown", *arguments, "--n", 5, "--resume")


def test_resume_refuses_predictions_of_others(files, run, tmp_path):
    """Of another model or file, with other settings, or of nobody knows what."""
    out, arguments = tmp_path / "out", ["--data", files["V*"], "--n", 2]
    run(out, *arguments)
    before = (out / "predictions-0.jsonl").read_bytes()
    for change, names in ((["--temperature", 1], "temperature 0.0 there and 1.0 now"),
                          (["--no_score"], "no_score"), (["--max_turns", 2], "max_turns"),
                          (["--dtype", "bfloat16"], "dtype"), (["--max_tokens", 9], "max_tokens"),
                          (["--data", files["HR-Bench"]], "data"), (["--seed", 1], "seed"),
                          (["--model", ROOT / "tiny"], "model"),
                          (["--coordinates", "1000"], "coordinates")):
        with pytest.raises(SystemExit, match=f"out: .*{names}"):
            run(out, *arguments, *change, "--resume")
    (out / "settings.json").unlink()
    with pytest.raises(SystemExit, match="out/settings.json"):
        run(out, *arguments, "--resume")
    assert (out / "predictions-0.jsonl").read_bytes() == before


def test_predictions_are_never_overwritten(files, run, tmp_path):
    """A new run into a folder that holds some takes a new name, and says so."""
    arguments = "--data", files["V*"], "--no_score", "--n"
    out = tmp_path / "eval"
    run(out, *arguments, 3)
    before = [file.read_bytes() for file in sorted(out.iterdir())]
    for n, name in ((2, "eval-2"), (1, "eval-3")):
        text = run(out, *arguments, n)
        assert f"folder is {tmp_path / name}: {out} holds another run\n" in text
        assert f"saved in {tmp_path / name};" in text
        assert len(read_predictions(tmp_path / name)) == n
    assert [file.read_bytes() for file in sorted(out.iterdir())] == before


def test_a_run_is_asked_as_it_was_trained(run, tmp_path):
    """Its world and its limits, unless the command says otherwise; and the usual ones of others."""
    model = tmp_path / "model"
    shutil.copytree(ROOT / "tiny", model, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    trained = {"model": str(ROOT / "tiny"), "objects": 9, "options": 2, "max_tokens": 70}
    (model / "train.json").write_text(json.dumps(trained))
    for name, words, expected in (
            ("as", (), {"objects": 9, "options": 2, "max_turns": 4, "max_tokens": 70}),
            ("not", ("--options", 8, "--max_tokens", 64), {"options": 8, "max_tokens": 64})):
        run(tmp_path / name, "--model", model, "--n", 1, *words)
        settings = json.loads((tmp_path / name / "settings.json").read_text())
        assert settings | expected == settings
    assert {len(line["choices"]) for line in read_predictions(tmp_path / "as").values()} == {2}
    usual = {"objects": 6, "options": 4, "max_turns": 4, "max_tokens": 64}
    run(tmp_path / "tiny", "--n", 1)
    settings = json.loads((tmp_path / "tiny" / "settings.json").read_text())
    assert settings | usual == settings


def test_a_killed_runs_newest_checkpoint_is_judged(run, tmp_path, monkeypatch):
    """Its base, from train.json, scores the looks; a model directory is judged itself."""
    loaded = []

    def spied(directory, *rest):
        loaded.append(str(directory))
        return Policy(directory, *rest)

    monkeypatch.setattr(evaluation, "Policy", spied)
    own = Policy(ROOT / "tiny")
    own.model.lm_head.weight.data.mul_(1.01)
    checkpoint = tmp_path / "run" / "step-000002"
    own.save(checkpoint)
    torch.save({}, checkpoint / "state-0.pt")
    (checkpoint / "train.json").write_text(json.dumps({"model": str(ROOT / "tiny")}))
    text = run(tmp_path / "out", "--model", tmp_path / "run", "--n", 8)
    assert f"judging {checkpoint}, the newest weights of {tmp_path / 'run'}\n" in text
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert settings["model"] == str(checkpoint)
    assert loaded == [str(checkpoint), str(ROOT / "tiny")]
    scores = [turn["score"] for line in read_predictions(tmp_path / "out").values()
              for turn in line["turns"] if turn["tool"]]
    assert scores and None not in scores
    assert "judging" not in run(tmp_path / "out", "--model", checkpoint, "--n", 1)


@pytest.mark.parametrize("text", ["B", "<think>It is red.</think> (B)", "<answer>B", ""])
def test_an_answer_that_was_not_closed(text):
    """A benchmark's question takes the whole last turn, your own nothing. A closed answer is kept.
    """
    turns = Turn("<think>A</think>", slice(0, 0)), Turn(text, slice(0, 0))
    own, benchmark = about("", None, "A", *turns), about("", None, "A", *turns)
    benchmark.question.benchmark = "V*"
    assert final_answer(own) is None and final_answer(benchmark) == text
    for trajectory in (own, benchmark):
        trajectory.answer = "C"
        assert final_answer(trajectory) == "C"


def test_unclosed_answers_of_a_run(files, run, tmp_path, monkeypatch):
    """Cut off after a few tokens, no answer is closed: a benchmark reads the turns, the world and
    a file of your own read nothing."""
    run(tmp_path / "a", "--data", files["V*"], "--max_tokens", 3, "--n", 4)
    for saved in read_predictions(tmp_path / "a").values():
        assert saved["answer"] == saved["turns"][-1]["text"] and saved["end"] != "answer"
    run(tmp_path / "b", "--max_tokens", 3, "--n", 4)
    assert all(saved["answer"] is None for saved in read_predictions(tmp_path / "b").values())


HR_COLUMNS = "index question answer category A B C D cycle_category image".split()


@pytest.mark.parametrize("content, names", [
    ("", "no questions"), ("index\timage\n", "columns"), ("{", "JSON"),
    ("\t".join(HR_COLUMNS) + "\n0\n", "row 2"),
    ('{"image": "x.png", "question": "?", "answer": "a"}', "bad.tsv:1: field 'image'")])
def test_a_bad_file_is_one_line(run, tmp_path, content, names):
    (tmp_path / "bad.tsv").write_text(content)
    with pytest.raises(SystemExit, match=f"eval.py: .*{names}"):
        run(tmp_path / "out", "--data", tmp_path / "bad.tsv")


@pytest.mark.parametrize("flags", [["--n", 0], ["--batch", 0], ["--temperature", -1]])
def test_bad_flags(run, tmp_path, flags, capsys):
    with pytest.raises(SystemExit):
        run(tmp_path, *flags)
    assert "must be at least 1, --temperature not below 0" in capsys.readouterr().err


def test_a_failing_process_hangs_nobody_and_loses_nothing(run, tmp_path):
    """The picture of question 3, which the second process asks, is broken: the command fails and
    says so. What was answered is kept. With a whole picture, one process ends what two began, at
    the table of a run that one process began: the draws do not depend on their number."""
    data = write_jsonl(world_questions(World(), 0, "test", 0, 6), tmp_path / "world")
    broken = tmp_path / "world" / "0003.png"
    picture = broken.read_bytes()
    broken.write_bytes(picture[:99])
    out = tmp_path / "out"
    arguments = "--data", data, "--no_score", "--batch", 1, "--temperature", 1
    failed = torchrun(out, *arguments)
    assert failed.returncode != 0 and "questions.jsonl:4: field 'image'" in failed.stderr
    kept = read_predictions(out)
    assert 1 in kept and 3 not in kept
    broken.write_bytes(picture)
    ended = run(out, *arguments, "--resume")
    assert "all                     6" in ended
    assert ended.replace(str(out), str(tmp_path / "one")) == run(tmp_path / "one", *arguments)
    assert read_predictions(out) == read_predictions(tmp_path / "one") and len(kept) < 6


def test_bad_pictures_are_found_first(run, asked, tmp_path):
    """The fourth of five pictures is broken, and a box of the fifth is outside: both are named
    before the first question is asked."""
    data = write_jsonl(world_questions(World(), 0, "test", 0, 5), tmp_path / "world")
    (data.parent / "0003.png").write_bytes(b"no picture")
    lines = data.read_text().splitlines()
    last = json.loads(lines[4]) | {"boxes": [[0, 0, 5000, 50]]}
    data.write_text("\n".join([*lines[:4], json.dumps(last)]))
    with pytest.raises(SystemExit, match="jsonl:4: field 'image'(.|\n)*jsonl:5: field 'boxes'"):
        run(tmp_path / "out", "--data", data)
    assert asked == []
