"""docs/extending.md: each of its changes is applied to a copy of the files, and does what
it says."""
import importlib.util
import json
import re
import sys

import pytest
import torch
from PIL import Image

import rollout
import tools
from conftest import ROOT
from lib.policy import Tokens
from lib.question import Question
from reward import Scorer, score_looks
from rollout import Trajectory, Turn
from show import film_strip
from tools import Call

PAGE = (ROOT / "docs/extending.md").read_text()


def changed(lines: list[str], kept: str) -> str:
    """A hunk's lines before the change (kept "-") or after it (kept "+")."""
    return "".join(line[1:] + "\n" for line in lines if (line or " ")[0] in f" {kept}")


def apply(block: str, folder) -> list[str]:
    """Apply a diff block to the files in `folder`. The place of each hunk must be found once."""
    names = []
    for part in re.split(r"^--- ", block, flags=re.MULTILINE)[1:]:
        name, *hunks = re.split(r"\n@@\n", part.rstrip("\n"))
        file = folder / name
        if not file.exists():
            file.parent.mkdir(exist_ok=True)
            file.write_text((ROOT / name).read_text())
        text = file.read_text()
        for hunk in hunks:
            before = changed(hunk.split("\n"), "-")
            assert text.count(before) == 1, f"{name}: found {text.count(before)} times:\n{before}"
            text = text.replace(before, changed(hunk.split("\n"), "+"))
        file.write_text(text)
        names.append(name)
    return names


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    """The files of the page, all of its changes applied."""
    folder = tmp_path_factory.mktemp("extended")
    for block in re.findall(r"^```diff\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL):
        apply(block, folder)
    return folder


@pytest.fixture
def load(copies, monkeypatch):
    """load("mapo") -> the changed file as a module; it takes the place of the real one if asked."""
    def load(name: str, in_place: bool = False):
        spec = importlib.util.spec_from_file_location(f"changed_{name}", copies / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)        # dataclasses look there
        if in_place:
            monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module
    return load


def test_every_block_is_tried(copies):
    """Five files are changed, and no line of code gets too long to be one of ours."""
    files = {str(file.relative_to(copies)): file.read_text() for file in copies.rglob("*.py")}
    assert set(files) == {"mapo.py", "train.py", "reward.py", "tools.py", "lib/benchmarks.py"}
    for name, text in files.items():
        assert max(map(len, text.split("\n"))) <= 100, name


# ---- the algorithm -------------------------------------------------------------------------------

def test_rloo_by_hand(load, capsys):
    """One right answer of four: 1 - 0, and 0 - 1/3. For any returns: R less the others' mean."""
    mapo = load("mapo")
    none = torch.zeros(4, 1)
    r = torch.tensor([1., 0, 0, 0])
    A = mapo.advantages(r, none, none.bool(), 4, 0., std=False, others=True)
    assert torch.allclose(A, torch.tensor([1, -1 / 3, -1 / 3, -1 / 3]))
    r = torch.tensor([.9, .2, .4, .1])
    A = mapo.advantages(r, none, none.bool(), 4, 0., std=False, others=True)
    for i in range(4):
        rest = torch.cat([r[:i], r[i + 1:]])
        assert torch.allclose(A[i], r[i] - rest.mean())
    mapo.demonstrate()
    assert "A, rloo" in capsys.readouterr().out


def test_the_other_rows_are_as_they_were(load):
    """A new field has a default: GRPO's advantages do not change."""
    import mapo
    r, none = torch.tensor([1., 0, 0, 1, 0, 0]), torch.zeros(6, 1)
    new, old = load("mapo").advantages, mapo.advantages
    assert torch.equal(new(r, none, none.bool(), 3, 0.), old(r, none, none.bool(), 3, 0.))


def test_rloo_trains(load, tmp_path):
    """`--algo rloo` is a choice of the command line, and a step is taken, form included in r."""
    load("mapo", in_place=True)
    load("reward", in_place=True)
    train = load("train")
    options = {"algo": "rloo", "updates": 1, "steps": 1, "questions": 2, "group": 3,
               "eval_questions": 1, "out": tmp_path / "run"}
    arguments = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    metrics = train.train(train.parse_config(arguments))
    assert metrics["clip_fraction"] == 0 and metrics["sampled"] == 6


# ---- the reward ----------------------------------------------------------------------------------

def spoken(answer: str | None, *errors: str) -> Trajectory:
    """A trajectory with a turn for each error, "" for none, that ends with this answer."""
    question = Question("What?", "vee", open=lambda: None, choices=("vee", "checks"))
    turns = [Turn("", slice(0, 1), error=error) for error in errors]
    return Trajectory(question, Tokens([]), Tokens([]), [], [], (96, 96), (96, 96), turns, answer)


def test_form_by_hand(load):
    cases = [spoken("vee", "", ""), spoken("vee", "bad_box", ""), spoken("checks", ""),
             spoken("checks", "bad_box", ""), spoken(None, "", "")]
    r, s, looked = load("reward").rewards(cases)
    assert torch.allclose(r, torch.tensor([1, .9, .1, 0, 0])) and not looked.any()


# ---- the tool ------------------------------------------------------------------------------------

ROTATE = ('<tool_call>{"name": "rotate", "arguments": '
          '{"label": "the red circle", "angle": 90}}</tool_call>')


def test_rotate_is_read_and_refused(load):
    changed = load("tools")
    call = changed.parse(ROTATE, (96, 96))
    assert (call.tool, call.label, call.arguments) == ("rotate", "the red circle", {"angle": 90})
    hostile = {'"angle": 45': "bad_angle", '"angle": true': "bad_angle",
               '"angle": [90]': "bad_angle",
               '"angle": "90"': "bad_angle", '"angle": 1e999': "bad_angle",
               '"bbox_2d": [0, 0, 9, 9]': "bad_arguments", '"angle": 90, "x": 1': "bad_arguments"}
    for arguments, kind in hostile.items():
        with pytest.raises(changed.ToolError) as error:
            changed.parse(ROTATE.replace('"angle": 90', arguments), (96, 96))
        assert error.value.kind == kind
    with pytest.raises(changed.ToolError, match="label"):
        changed.parse(ROTATE.replace('"label": "the red circle", ', ""), (96, 96))
    assert '"name": "rotate"' in changed.system_prompt()


def test_rotate_turns_clockwise(load):
    """3 x 2 pixels with a red one at the upper left: it is at the upper right of 2 x 3."""
    image = Image.new("RGB", (3, 2))
    image.putpixel((0, 0), (255, 0, 0))
    turned, box = load("tools").rotate(image, {"angle": 90}, (3, 2))
    assert turned.size == (2, 3) and turned.getpixel((1, 0)) == (255, 0, 0) and box == (0, 0, 3, 2)


def test_the_rest_follows_by_itself(load, policy, questions, monkeypatch):
    """One entry in TOOLS: the rollout shows the picture, it is scored and drawn, and is no hit."""
    from eval import record, restore
    from reward import astray, hit
    monkeypatch.setitem(tools.TOOLS, "rotate", load("tools").TOOLS["rotate"])
    question = questions[0]
    label = f"the {list(question.objects)[0]}"
    text = ROTATE.replace("the red circle", label)
    images, _, trajectories = rollout.begin(policy, [question], group=2)
    for trajectory in trajectories:
        ids = policy.tokens(text).ids
        turn = rollout.write(policy, trajectory, ids, [-1.] * len(ids))
        rollout.act(policy, trajectory, turn, images[0], last=False)
    rollout.encode_crops(policy, trajectories, [0, 1], group=2)
    for trajectory in trajectories:
        rollout.observe(policy, trajectory)
    score_looks(trajectories, Scorer(policy, questions[:2]))
    first, second = (trajectory.turns[0] for trajectory in trajectories)
    assert first.crop.size == (48, 48) and first.crop_tokens is second.crop_tokens
    assert 0 < first.score < 1 and not astray(first, question)
    assert film_strip(trajectories[0]).width > 500 and not hit(trajectories[0])
    saved = json.loads(json.dumps(record(trajectories[0])))
    assert restore(saved, question).turns[0].call == Call("rotate", label, {"angle": 90})


# ---- the benchmark -------------------------------------------------------------------------------

def test_chartqa(load, tmp_path):
    benchmarks = load("lib/benchmarks")
    (tmp_path / "png").mkdir()
    Image.new("RGB", (40, 30)).save(tmp_path / "png/1.png")
    rows = [{"imgname": "1.png", "query": "How much?", "label": "50"},
            {"imgname": "1.png", "query": "Which country?", "label": "Peru"}]
    (tmp_path / "test_human.json").write_text(json.dumps(rows))
    name, questions = benchmarks.load(tmp_path / "test_human.json")
    assert name == "ChartQA" and questions[1].open().size == (40, 30)
    said = {"52": True, "53": False, "47.5": True, "fifty": False, "nan": False, "": False}
    assert {text: benchmarks.correct(questions[0], text) for text in said} == said
    assert benchmarks.correct(questions[1], "peru") and not benchmarks.correct(questions[1], "50")
    assert not benchmarks.correct(questions[0], None)
