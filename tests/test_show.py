"""What a person looks at: film strips show every look where it was; transcripts are whole."""
import sys

import pytest
from PIL import Image

import show
from conftest import ROOT
from lib.data import Question
from lib.policy import Tokens
from rollout import Trajectory, Turn
from show import FRAME, SIDE, film_strip, stack, transcript
from tools import Call

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


@pytest.mark.parametrize("flags", [[], ["--index", "3", "--temperature", "1"]])
def test_the_demonstration(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["show.py", "--model", str(ROOT / "tiny"), *flags])
    show.main()
    said = capsys.readouterr().out
    assert "[image 4 x 4]" in said and "<answer>" in said and "right answer" in said
    assert Image.open(tmp_path / "runs/show.png").size[1] == SIDE + 96
