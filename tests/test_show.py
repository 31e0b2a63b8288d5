"""What a person looks at: film strips show every look where it was; transcripts are whole; the page
of a run shows what the run's files hold, and nothing that is written in them can do anything."""
import base64
import hashlib
import io
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import report
import show
from conftest import ROOT
from eval import record
from lib.data import write_jsonl
from lib.page import (CROP, CURVES, LONG, MAX_TURNS, OVERVIEW, SHORT, coarse, evenly, keep,
                      read_run)
from lib.policy import Tokens
from lib.question import Question
from rollout import Trajectory, Turn
from show import FRAME, SIDE, film_strip, find_questions, stack, tell, transcript
from show import write_page
from tiny.world import World, world_question
from tools import Call

sys.path.insert(0, str(ROOT / "docs"))
from gif import replay, write_animation

GREEN, RED = (0, 128, 0), (255, 0, 0)


def told(*turns, size=(400, 200), seen=(96, 48), **end) -> Trajectory:
    """A trajectory about a green picture."""
    question = Question("What?", "x", lambda: Image.new("RGB", size, GREEN), ("x", "y"))
    return Trajectory(question, Tokens([]), Tokens([]), [], [], seen, (1000, 1000), list(turns),
                      **end)


def look(box, size=(24, 48), **call) -> Turn:
    call = Call("any_tool", "the red thing", call)
    return Turn("", slice(0, 0), call, box, Image.new("RGB", size, RED))


def test_the_box_is_where_the_look_was():
    """Box and picture from pixels of the original, whatever the tool and the coordinates are. By
    hand: 400 x 200 is drawn 192 x 96, so (100, 50, 200, 150) is (48, 24, 96, 72)."""
    strip = film_strip(told(look((100., 50., 200., 150.), angle=90)))
    left, top = 12, 30
    assert strip.getpixel((left, top)) == strip.getpixel((left + 191, top + 95)) == GREEN
    assert strip.getpixel((left + 192, top + 96)) == (255, 255, 255)
    for x, y in ((48, 24), (96, 24), (48, 72), (96, 72)):
        assert strip.getpixel((left + x, top + y)) == (255, 255, 255)
    for x, y in ((47, 23), (97, 73)):
        assert strip.getpixel((left + x, top + y)) == (0, 0, 0)
    crop = left + SIDE + 6                    # its longer side, the height, is enlarged to SIDE
    assert strip.getpixel((crop, top)) == strip.getpixel((crop + 95, top + 191)) == RED
    assert strip.getpixel((crop + 96, top)) == (255, 255, 255)


def test_one_frame_for_each_look():
    """Turns that failed have no frame; a trajectory without looks has one, and a text."""
    failed = Turn("", slice(0, 0), error="bad_json")
    box = (0, 0, 9, 9)
    three = film_strip(told(look(box), failed, look(box), look(box, (1, 300)), answer="x"))
    assert three.width == 3 * FRAME + 12
    for i, size in enumerate(((24, 48), (24, 48), (1, 300))):
        assert three.getpixel((12 + i * FRAME + SIDE + 6, 31)) == RED, size
    never = film_strip(told(failed, answer="x" * 99, seen=(2, 96)), "title: ")
    assert never.getpixel((12, 31)) == GREEN and never.width == 560


def test_strips_stack(trajectories):
    strips = [film_strip(t, "test: ") for t in trajectories[:3]]
    page = stack(strips)
    assert page.size == (max(s.width for s in strips), sum(s.height for s in strips))
    assert page.crop((0, strips[0].height, strips[1].width, 2 * strips[0].height)) == strips[1]


def test_a_transcript_is_what_was_sampled(policy, trajectories):
    """Every token is in it; each image is one word with its size."""
    for t in trajectories:
        text = transcript(policy, t)
        assert "<|image_pad|>" not in text and text.count("[image ") == len(t.tokens.grids)
        for h, w in t.tokens.grids:
            text = text.replace(f"[image {h} x {w}]", "<|image_pad|>" * (h * w), 1)
        assert text == policy.decode(t.tokens.ids)


@pytest.mark.parametrize("flags", [[], ["--index", "3"]])
def test_the_demonstration(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["show.py", "--model", str(ROOT / "tiny"), *flags])
    show.main()
    said = capsys.readouterr().out
    assert "[image 4 x 4]" in said and "<answer>" in said and "right answer" in said
    assert Image.open(tmp_path / "runs/show.png").size[1] == SIDE + 96


# ---- a run's folder ------------------------------------------------------------------------------

def lines(file: Path, records: list) -> None:
    texts = [saved if isinstance(saved, str) else json.dumps(saved) for saved in records]
    file.write_text("\n".join(texts) + "\n", encoding="utf-8")


def saved_run(folder: Path, stories: list, watched: list = (), **settings) -> Path:
    """A folder as train.py leaves it, after two steps."""
    step = folder / "step-000002"
    step.mkdir(parents=True)
    (step / "state-0.pt").touch()
    (step / "train.json").write_text(json.dumps({"steps": 2, "options": 4, **settings}))
    lines(folder / "metrics.jsonl",
          [{"step": 1, "accuracy": .25, "gap": None}, {"step": 2, "accuracy": .75, "gap": .5}])
    lines(folder / "trajectories.jsonl", stories)
    lines(folder / "watched.jsonl", watched)
    rows = {"n": 8, "accuracy": .5, "hit": .25, "gap": None, "calls": 1., "semantic": .5}
    later = rows | {"accuracy": .75, "hit": .125}
    results = {f"{when} {how}": row | {"categories": {"all": row}} for how in ("greedy", "sampled")
               for when, row in (("before", rows), ("after", later))}
    (folder / "results.json").write_text(json.dumps(results))
    return folder


class Tags(HTMLParser):
    """The elements of a page as a browser's parser finds them, and what stands in the scripts."""

    def __init__(self, file: Path):
        super().__init__()
        self.tags, self.scripts, self.policy, self.inside = [], [], "", False
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.inside = tag == "script"
        if self.inside:
            self.scripts.append("")
        given = dict(attributes)
        if given.get("http-equiv") == "Content-Security-Policy":
            self.policy = given["content"]
        assert not any(name.startswith("on") for name in given)

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, data):
        if self.inside:
            self.scripts[-1] += data


def data_of(page: Path) -> dict:
    return json.loads(Tags(page).scripts[0])


@pytest.fixture(scope="module")
def run(tmp_path_factory, trajectories):
    """24 sampled trajectories with advantages, and the first four as if watched at two steps."""
    for trajectory in trajectories:
        for i, turn in enumerate(trajectory.looks):
            turn.score = .125 * (i + 1)
    told = [{"step": 1 + i % 2, "advantage": [.5] * len(t.turns), **record(t)}
            for i, t in enumerate(trajectories)]
    watched = [{"step": step, **record(t)} for step in (0, 2) for t in trajectories[::6]]
    return saved_run(tmp_path_factory.mktemp("runs") / "mapo", told, watched)


def test_a_crop_is_cut_again(trajectories):
    """Of a crop only its size is saved; the call, the box and the image give every pixel back."""
    count = 0
    for t in trajectories:
        again = replay(json.loads(json.dumps(record(t))), t.question)
        assert len(again.looks) == len(t.looks)
        for turn, new in zip(t.looks, again.looks):
            assert new.crop.tobytes() == turn.crop.tobytes() and new.crop.size == turn.crop.size
            assert new.box == pytest.approx(turn.box) and new.call.label == turn.call.label
            count += 1
    assert count > 20


def test_the_page_shows_what_the_files_hold(run, trajectories):
    data = data_of(write_page([run]))
    shown, = data["runs"]
    assert shown["name"] == "mapo" and shown["steps"] == [1, 2] and shown["planned"] == 2
    assert shown["curves"] == {"accuracy": [.25, .75], "gap": [None, .5]}
    assert len(shown["results"]) == 4 and shown["results"][0]["accuracy"] == .5
    assert [t["step"] for t in shown["watched"]] == [0] * 4 + [2] * 4
    assert len(shown["trajectories"]) == len(trajectories) and shown["left_out"] == 0
    for t, story in zip(trajectories, shown["trajectories"]):
        assert story["question"] == t.question.text and story["right"] == t.question.answer
        assert story["id"] == t.question.id and story["category"] == t.question.category
        assert story["lucky"] == bool(story["correct"] and not story["hit"])
        picture = data["pictures"][story["picture"]]
        assert (picture["width"], picture["height"]) == t.seen           # as coarse as it was seen
        for turn, there in zip(t.turns, story["turns"]):
            assert there["text"] == turn.text and there["advantage"] == .5
            assert there["look"] == bool(turn.call) and ("crop" in there) == there["look"]
            if turn.call:
                assert there["label"] == turn.call.label and there["score"] == turn.score
                assert there["place"] == pytest.approx([side / 768 for side in turn.box], abs=1e-4)
    uris = [picture["uri"] for picture in data["pictures"].values()]
    assert len(set(uris)) == len(uris)                                    # each stands there once


def test_pictures_are_those_that_were_seen(run, trajectories):
    data = data_of(write_page([run]))
    story = data["runs"][0]["trajectories"][0]
    uri = data["pictures"][story["picture"]]["uri"]
    image = Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))
    expected = trajectories[0].question.open().resize(trajectories[0].seen, Image.BOX)
    assert np.abs(np.asarray(image, int) - np.asarray(expected, int)).mean() < 8     # JPEG or PNG


def test_runs_side_by_side(run, tmp_path, trajectories):
    """The page stands in the first one's folder; runs of the same name are told apart."""
    other = saved_run(tmp_path / "mapo", [{"step": 1, **record(trajectories[0])}], beta=.2)
    data = data_of(write_page([other, run]))
    assert (other / "page.html").is_file() and len(data["runs"]) == 2
    assert [shown["name"] for shown in data["runs"]] == [str(other), str(run)]
    assert data["runs"][0]["settings"] == {"steps": "2", "options": "4", "beta": "0.2"}
    assert "beta" not in data["runs"][1]["settings"]
    assert data["runs"][0]["trajectories"][0]["picture"] is not None


def test_an_unfinished_run_has_a_page(tmp_path, trajectories):
    """No checkpoint, no results, a torn line. But a folder without a run is an error."""
    lines(tmp_path / "metrics.jsonl", [{"step": 1, "accuracy": .5}, '{"step": 2, "accu'])
    lines(tmp_path / "trajectories.jsonl", [{"step": 1, **record(trajectories[0])}])
    shown, = data_of(write_page([tmp_path]))["runs"]
    assert shown["steps"] == [1] and shown["results"] == [] and shown["settings"] == {}
    assert len(shown["trajectories"]) == 1
    with pytest.raises(FileNotFoundError, match="found neither metrics.jsonl nor predictions"):
        write_page([tmp_path / "nothing"])


def test_an_evaluation_has_a_page(tmp_path, trajectories):
    (tmp_path / "settings.json").write_text('{"options": 4, "data": null}')
    for rank in range(2):
        lines(tmp_path / f"predictions-{rank}.jsonl",
              [{"n": i, **record(t)} for i, t in enumerate(trajectories) if i % 2 == rank])
    shown, = data_of(write_page([tmp_path]))["runs"]
    assert len(shown["trajectories"]) == len(trajectories) and shown["curves"] == {}
    assert all("picture" in story for story in shown["trajectories"])


@pytest.mark.parametrize("world", [World(objects=12), World(options=8)])
def test_the_worlds_questions_are_drawn_again(world, tmp_path):
    """In the run's world: in another one the scene is another, and so is the text, or the options.
    (Before its first checkpoint a run does not say which world it has.)"""
    question = world_question(world, 0, "train", 3)
    saved = {"id": question.id, "question": question.text, "choices": list(question.choices)}
    for settings, same in (({"objects": world.objects, "options": world.options}, True),
                           ({}, False)):
        folder = saved_run(tmp_path / str(same), [], **settings)
        again = find_questions([saved], folder, held_out=False)
        assert [q and q.open().tobytes() for q in again] == [question.open().tobytes()
                                                             if same else None]


def test_questions_are_found_again(tmp_path, questions, trajectories):
    """In the run's own file; a question that has changed since then has no picture."""
    file = write_jsonl(questions[:2], tmp_path / "mine")
    folder = saved_run(tmp_path / "run", [{"step": 1, **record(trajectories[0])},
                                          {"step": 1, **record(trajectories[4])},
                                          {"step": 1, **record(trajectories[8])}], data=str(file))
    found = find_questions(read_run(folder)["trajectories"], folder, held_out=False)
    assert [q and q.id for q in found] == [questions[0].id, questions[1].id, None]
    changed = file.read_text().replace(questions[1].text, "Another question?")
    file.write_text(changed)
    stories = data_of(write_page([folder]))["runs"][0]["trajectories"]
    assert ["picture" in story for story in stories] == [True, False, False]
    file.unlink()
    stories = data_of(write_page([folder]))["runs"][0]["trajectories"]
    assert not any("picture" in story for story in stories)


def test_fifty_photographs_stay_under_5_mb(tmp_path):
    """Trajectories of three looks each at an image as large and as rough as a photograph."""
    rng, pictures = np.random.default_rng(0), {}
    for number in range(5):
        rough = rng.integers(0, 256, (75, 100, 3), dtype=np.uint8)
        image = Image.fromarray(rough).resize((1600, 1200), Image.BICUBIC)
        keep(coarse(image, image.size, OVERVIEW), pictures)
        for x in (0, 400, 800):
            crop = image.crop((x, 0, x + 600, 600))
            keep(coarse(crop, crop.size, CROP), pictures)
    assert len(pictures) == 20
    assert 10 * sum(len(picture["uri"]) for picture in pictures.values()) < 4.5e6


# ---- hostile files -------------------------------------------------------------------------------

ATTACKS = ["</script><script>window.hacked = 1</script>", "<img src=x onerror='window.hacked = 1'>",
           "<!--<script>", "]]></svg><iframe src='javascript:parent.hacked = 1'></iframe>",
           "{{data}} {{script}} ${window.hacked = 1} `'\"\\", "\x1b[2J\x1b]0;title\x07\u202e\u2028",
           "\ud800 half a pair", "w" * 10**6, "&lt;b onclick='window.hacked = 1'&gt;"]
WRONG = [None, [], {}, "text", True, -1e308, float("nan"), float("inf"), [[[[]]]], {"toString": 1}]


def hostile_run(folder: Path) -> Path:
    """A run whose every text attacks the reader, and whose every field is of a wrong kind once."""
    box, stories = [0, 0, 300, 300], []
    for text in ATTACKS:
        many = 99 if len(text) < 1000 else 1
        look = {"text": text, "tool": "image_zoom_in_tool", "label": text, "box": box,
                "arguments": {"bbox_2d": [0, 0, 40, 40]}, "crop": [48, 48], "score": .5,
                "astray": True, "error": text, "message": text}
        stories.append({"step": 1, "advantage": [1., -1.], "id": text, "category": text,
                        "question": text, "choices": [text] * many, "right": text, "answer": text,
                        "end": text, "correct": 1., "hit": False, "seen": [96, 96],
                        "space": [96, 96], "turns": [look] * many})
    model = json.loads(json.dumps(stories[0]))
    question = world_question(World(), 0, "train", 0)
    model |= {"id": question.id, "turns": model["turns"][:2], "question": question.text,
              "choices": list(question.choices)}
    stories.append(model)                                            # one that has a picture
    for name in model:
        stories += [model | {name: value} for value in WRONG]
    for name in model["turns"][0]:
        for value in WRONG:
            stories.append(model | {"turns": [model["turns"][0] | {name: value}]})
    torn = ['{"step": 1, "turns": [', "[" * 10**5, "null", "[]", "7", '{"step": 1e999}', "\x00"]
    saved_run(folder / "<b>hostile</b>", stories + torn, stories[:12] + torn,
              **{text: text for text in ATTACKS[:-3]}, options="<script>")
    folder = folder / "<b>hostile</b>"
    (folder / "step-000002/train.json").write_text(json.dumps(
        {text: text for text in ATTACKS} | {"options": 4}))
    results = {text: {"categories": {text: {"n": value, "accuracy": value}}}
               for text, value in zip(ATTACKS, WRONG)}
    (folder / "results.json").write_text(json.dumps(results | {"x": 1, "y": {"categories": 1}}))
    return folder


def test_a_hostile_run_cannot_do_anything(tmp_path):
    """The parser finds the template's own elements, whatever the trajectories say."""
    page = write_page([hostile_run(tmp_path)])
    clean = write_page([saved_run(tmp_path / "clean", [])])
    found, expected = Tags(page), Tags(clean)
    assert found.tags == expected.tags and found.tags.count("script") == 2
    assert found.scripts[1] == expected.scripts[1] and "hacked" not in found.scripts[1]
    for sign in "<>&":
        assert sign not in found.scripts[0]
    assert page.stat().st_size < 5e6
    data = json.loads(found.scripts[0], parse_constant=pytest.fail)       # no NaN, no Infinity
    stories = data["runs"][0]["trajectories"]
    assert any("picture" in story for story in stories)
    assert ATTACKS[0] in [story["question"] for story in data["runs"][0]["watched"]]
    for story in stories:
        assert len(story["turns"]) <= MAX_TURNS and len(story["question"]) < LONG + 40
        for turn in story["turns"]:
            assert len(turn["label"]) < SHORT + 40 and len(turn["text"]) < LONG + 40
            for name in ("score", "advantage"):
                assert turn[name] is None or abs(turn[name]) <= 1e9


def test_the_policy_names_the_one_script(run):
    """A browser runs what has this fingerprint, and loads nothing but the page's own pictures."""
    found = Tags(write_page([run]))
    digest = base64.b64encode(hashlib.sha256(found.scripts[1].encode()).digest()).decode()
    assert found.policy == ("default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
                            f"script-src 'sha256-{digest}'")
    source = found.scripts[1]
    for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert way not in source


def test_a_hostile_step_as_text(tmp_path):
    """What a terminal would obey is gone, and a long label is cut."""
    said = tell(hostile_run(tmp_path), 1)
    assert all(c.isprintable() or c == "\n" for c in said)
    assert "\x1b" not in said and "\ufffd[2J" in said and "… (1,000,000 characters)" in said
    assert "w" * (LONG + 1) not in said


# ---- what is kept, what is said ------------------------------------------------------------------

def test_what_does_not_fit_is_left_out_evenly():
    assert evenly([1, 2, 3], 3) == [1, 2, 3] and evenly([], 3) == []
    assert evenly(list(range(101)), 5) == [0, 25, 50, 75, 100]           # both ends stay


def test_of_a_long_run_only_a_part_is_read(tmp_path):
    """500 of 1,000 steps, both ends among them; of 41 steps that were watched 20, the ends, too."""
    lines(tmp_path / "metrics.jsonl",
          [{"step": i + 1, "accuracy": i / 1000, "gap": None} for i in range(1000)])
    lines(tmp_path / "watched.jsonl",
          [{"step": step, "id": i} for step in range(0, 410, 10) for i in range(9)])
    run = read_run(tmp_path)
    assert len(run["steps"]) == 500 and (run["steps"][0], run["steps"][-1]) == (1, 1000)
    assert run["curves"].keys() == {"accuracy"} and run["curves"]["accuracy"][-1] == .999
    steps = sorted({line["step"] for line in run["watched"]})
    assert len(steps) == 20 and (steps[0], steps[-1]) == (0, 400) and len(run["watched"]) == 20 * 8


def test_the_curves_of_the_documents(tmp_path, monkeypatch):
    """By hand: a row of two seeds is one run of their means, where a seed without a value does not
    count. The page has a line of its own for as many rows as can be drawn."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import plot
    runs = [{"seed": seed, "options": ["--algo", "gspo", "--steps", "2"],
             "curves": dict.fromkeys(CURVES, [seed / 8, .5]) | {"gap": [None, gap]}}
            for seed, gap in ((3, None), (4, .25))]
    folders = [plot.write_folder(row, runs, tmp_path) for row in ("gspo + beta 0.4, aim", "gspo")]
    one, other = data_of(write_page(folders))["runs"]
    assert (one["name"], other["name"]) == ("gspo + beta 0.4, aim, 2 seeds", "gspo, 2 seeds")
    assert one["steps"] == [1, 2] and one["curves"] == other["curves"]
    assert one["curves"] == dict.fromkeys(CURVES, [.4375, .5]) | {"gap": [None, .25]}
    assert one["settings"] == {"algo": "gspo", "steps": "2", "seeds": "3, 4"}
    assert one["planned"] == 2
    script = Tags(folders[0] / "page.html").scripts[1]
    patterns = re.search(r"const DASH = (\[.*?\]);", script)
    assert len(set(json.loads(patterns[1]))) == 6 and plot.rows_of([]) == {}


def test_a_step_as_text(run, trajectories):
    said = tell(run, 1)
    for t in trajectories[::2]:
        assert t.question.text in said and t.question.answer in said
        for turn in t.looks:
            assert f"“{turn.call.label}”, score {turn.score:.2f}" in said
    assert "advantage +0.50" in said and "by luck" in said
    with pytest.raises(FileNotFoundError, match="of step 7; found steps 0 to 2"):
        tell(run, 7)


def test_the_closing_words(run):
    said = report.closing(run).split("\n")
    assert said[2].split() == ["8", "held-out", "questions", "greedy", "sampled"]
    assert said[3].split() == ["accuracy", *(["0.500", "->", "0.750", "(+0.250)"] * 2)]
    assert said[5].split() == ["gap", "-", "-"]
    assert str(run / "step-000002") in said[-2] and "films.png" not in "\n".join(said)


def test_the_animation(run, trajectories):
    """A frame for each step, under 1 MB: three film strips, one below the other."""
    film = Image.open(write_animation(run))
    assert film.n_frames == 2 and film.info["loop"] == 0 and film.size[1] == 3 * (SIDE + 96)
    assert (run / "watch.gif").stat().st_size < 1e6
    overview = trajectories[0].question.open().resize(trajectories[0].seen, Image.BOX)
    corner = np.asarray(film.convert("RGB"), int)[30 + SIDE - 1, 12]            # lower left
    assert np.abs(corner - np.asarray(overview, int)[-1, 0]).max() < 24         # 256 colours
    film.seek(1)
    assert film.info["duration"] == 3000
    with pytest.raises(FileNotFoundError, match="nowhere: expected the folder of a run"):
        write_animation(Path("nowhere"))


@pytest.mark.parametrize("flags, words", [
    ([], "page.html"), (["--text", "--step", "1"], "advantage +0.50")])
def test_the_commands(run, flags, words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["show.py", str(run), *flags])
    show.main()
    assert words in capsys.readouterr().out


@pytest.mark.parametrize("flags, words", [
    (["nowhere"], "show.py: nowhere: expected the folder of a run"),
    (["--text", "nowhere"], "show.py: nowhere: expected trajectories of step 0"),
    (["--text"], 2)])
def test_errors_are_one_line(flags, words, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["show.py", *flags])
    with pytest.raises(SystemExit) as stopped:
        show.main()
    assert stopped.value.code == words or str(stopped.value.code).startswith(str(words))
