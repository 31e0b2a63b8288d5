"""Trajectories: what was sampled stays as it was, and every token knows who wrote it."""
import dataclasses

import pytest
import torch
from PIL import Image

import rollout
from conftest import ROOT
from lib.question import Question
from lib.sampler import Session
from rollout import collect
from test_tools import MIRROR, ROTATE, add_tools, rotate_call
from tools import ZOOM, zoom_call

CALL = zoom_call("the red circle", (8, 8, 24, 24))
ANSWER = "<answer>rising</answer>"


@pytest.fixture
def script(policy, monkeypatch):
    """script(turn, turn, ..): what is "sampled", one text for all rows or a list of one a row."""
    def play(*turns):
        left = iter(turns)

        def sample(session, max_tokens, temperature, generator):
            said = next(left)
            texts = said if isinstance(said, list) else [said] * len(session.next)
            assert len(texts) == len(session.next)
            batch = [policy.tokens(text) for text in texts]
            session.append(batch)
            return [t.ids for t in batch], [[-1.] * len(t.ids) for t in batch]

        monkeypatch.setattr(Session, "sample", sample)
    return play


def test_tokens_are_kept_as_sampled(policy, trajectories):
    """Ids, mask and log-probabilities have one length; each turn's slice holds exactly its text;
    only the agent's tokens are in the mask; image placeholders are never the agent's."""
    for t in trajectories:
        assert len(t.tokens.ids) == len(t.mask) == len(t.logps)
        assert sum(t.mask) == sum(turn.span.stop - turn.span.start for turn in t.turns)
        for turn in t.turns:
            assert all(t.mask[turn.span])
            text = policy.decode(t.tokens.ids[turn.span])
            assert text.removesuffix("<|im_end|>") == turn.text
        assert not any(own for i, own in zip(t.tokens.ids, t.mask) if i == policy.image_id)
        assert all(logp == 0 for logp, own in zip(t.logps, t.mask) if not own)
        placeholders = t.tokens.ids.count(policy.image_id)
        assert placeholders == sum(height * width for height, width in t.tokens.grids)
        assert placeholders == sum(len(features) for features in t.tokens.features)


def test_groups_share_a_question_and_a_prompt(trajectories, questions):
    """They differ in what they do."""
    assert [t.question.id for t in trajectories] == [q.id for q in questions for _ in range(4)]
    for i, t in enumerate(trajectories):
        assert t.prompt is trajectories[i // 4 * 4].prompt
        assert t.tokens.ids[:len(t.prompt.ids)] == t.prompt.ids
    first, second = trajectories[::4], trajectories[1::4]
    assert any(a.tokens.ids != b.tokens.ids for a, b in zip(first, second))


def test_same_seed_same_trajectories(policy, questions, trajectories):
    again = collect(policy, questions, group=4, generator=torch.Generator().manual_seed(0))
    assert [t.tokens.ids for t in again] == [t.tokens.ids for t in trajectories]
    assert [t.logps for t in again] == [t.logps for t in trajectories]


def test_a_turn_is_bounded(policy, questions):
    for t in collect(policy, questions[:2], max_turns=2, max_tokens=3, temperature=0.):
        assert all(turn.span.stop - turn.span.start <= 3 for turn in t.turns)


def test_a_call_returns_a_crop_and_an_answer_ends(policy, questions, script):
    script(CALL, ANSWER)
    t = collect(policy, questions[:1])[0]
    assert [bool(turn.call) for turn in t.turns] == [True, False] and t.looks == t.turns[:1]
    assert t.answer == "rising" and t.end == "answer"
    look = t.turns[0]
    assert look.box == (64, 64, 192, 192) and look.crop.size == (48, 48)
    assert len(t.tokens.grids) == 2 and look.crop_tokens.grids == [(2, 2)]
    shown = "<|vision_start|>" + 4 * "<|image_pad|>" + "<|vision_end|>"
    said = policy.decode(t.tokens.ids[len(t.prompt.ids):])
    assert said == (f"{CALL}<|im_end|>\n<|im_start|>user\n<tool_response>{shown}</tool_response>"
                    f"<|im_end|>\n<|im_start|>assistant\n{ANSWER}")


def test_an_error_is_an_observation(policy, questions, script):
    """A bad call costs a turn, is explained in words that the agent can learn from, and does not
    end the episode."""
    script(CALL.replace("the red circle", "object"), CALL, ANSWER)
    t = collect(policy, questions[:1])[0]
    assert [turn.error for turn in t.turns] == ["vague_label", "", ""]
    assert len(t.looks) == 1 and t.end == "answer"
    assert f"<tool_response>{t.turns[0].message}</tool_response>" in policy.decode(t.tokens.ids)
    assert "fits any picture" in t.turns[0].message


@pytest.mark.parametrize("turns, end", [
    (["hello"], "no_action"), ([CALL, "<answer> </answer>"], "empty_answer"),
    ([CALL] * 3, "max_turns"), ([CALL, CALL, "<tool_call>?"], "max_turns"),
    ([CALL, CALL, "hello"], "no_action"), ([CALL, CALL, ANSWER], "answer")])
def test_how_an_episode_ends(policy, questions, script, turns, end):
    """At the latest with the third turn of three, which cannot look: nothing would come of it."""
    script(*turns)
    t = collect(policy, questions[:1], max_turns=3)[0]
    assert t.end == end and (t.answer is not None) == (end == "answer")
    assert len(t.turns) == len(turns) and len(t.looks) == len(turns) - 1
    assert t.mask[-1], "nothing is appended after the end"


def test_a_turn_closed_by_the_agent_is_not_closed_twice(policy, questions, script):
    script(CALL + "<|im_end|>", ANSWER)
    t = collect(policy, questions[:1])[0]
    assert "<|im_end|><|im_end|>" not in policy.decode(t.tokens.ids) and len(t.looks) == 1
    assert t.turns[0].text == CALL


def test_the_end_of_a_text_ends_a_turn_and_is_no_part_of_it(policy, questions, script):
    """<|endoftext|>, too: a real model may close its turn by it."""
    script("red<|endoftext|>")
    t = rollout.collect(policy, questions[:1], temperature=0.)[0]
    assert t.turns[0].text == "red" and t.end == "no_action" and t.tokens.ids[-1] == 0


def test_those_that_have_answered_leave(policy, questions, script):
    """Four rows, then two, then one: each goes on as if it were alone."""
    other = CALL.replace("8, 8", "0, 0")
    script([ANSWER, CALL, "hello", other], [CALL, ANSWER], ["<answer>B</answer>"])
    batch = collect(policy, questions[:2], group=2)
    assert [t.end for t in batch] == ["answer", "answer", "no_action", "answer"]
    assert [t.answer for t in batch] == ["rising", "B", None, "rising"]
    assert [len(t.turns) for t in batch] == [1, 3, 1, 2]
    assert batch[3].looks[0].box == (0, 0, 192, 192)
    script(other, ANSWER)
    alone = collect(policy, questions[1:2])[0]
    assert batch[3].tokens.ids == alone.tokens.ids
    for a, b in zip(batch[3].tokens.features, alone.tokens.features):
        assert torch.allclose(a, b, atol=1e-5)


def test_other_image_sizes(policy, script):
    """The policy sees a size of its own, and boxes map to the original."""
    sizes = ((1600, 400), (30, 30), (200, 5000))
    asked = [Question("What?", "x", lambda size=size: Image.new("RGB", size)) for size in sizes]
    script(CALL.replace("8, 8, 24, 24", "0, 0, 24, 12"), ANSWER)
    for t, size in zip(collect(policy, asked), sizes):
        assert t.seen[0] * t.seen[1] <= policy.resolution.max_pixels and len(t.looks) == 1
        assert t.looks[0].box[2] == pytest.approx(24 * size[0] / t.seen[0])


# ---- crops are shared, and by whom ---------------------------------------------------------------

def test_a_large_image_is_not_held(policy, questions, script, monkeypatch):
    """It is opened again for each look, and the looks show the same."""
    script(CALL, ANSWER)
    held = collect(policy, questions[:2], group=2)
    monkeypatch.setattr(rollout, "HELD", 768 * 768 - 1)
    opened = []

    def open_and_count():
        opened.append(1)
        return questions[0].open()

    script(CALL, ANSWER)
    counted = dataclasses.replace(questions[0], open=open_and_count)
    again = collect(policy, [counted, questions[1]], group=2)
    assert len(opened) == 3                              # the overview, and two looks
    for one, other in zip(held, again):
        assert one.tokens.ids == other.tokens.ids and one.looks[0].box == other.looks[0].box
        assert one.looks[0].crop.tobytes() == other.looks[0].crop.tobytes()


def test_equal_calls_share_a_crop(policy, questions, script):
    """Equal but for the label: one crop. Another box or another question: another crop."""
    renamed, moved = CALL.replace("red", "blue"), CALL.replace("24, 24", "24, 25")
    script([CALL, renamed, moved, CALL, CALL, CALL], ANSWER)
    looks = [t.looks[0] for t in collect(policy, questions[:2], group=3)]
    assert looks[0].crop_tokens is looks[1].crop_tokens
    assert [look.call.label for look in looks[:2]] == ["the red circle", "the blue circle"]
    assert looks[3].crop_tokens is looks[4].crop_tokens is looks[5].crop_tokens
    assert len({id(look.crop_tokens) for look in looks}) == 3


def test_a_second_tool_end_to_end(policy, questions, script, monkeypatch):
    """A new entry of TOOLS is parsed, carried out, encoded and read as the zoom is. Calls of two
    tools with one box do not share a crop, nor do two angles."""
    add_tools(monkeypatch)
    mirrored, corner = CALL.replace(ZOOM, MIRROR), (0, 0, 768, 768)
    script([CALL, mirrored, mirrored, rotate_call(90), rotate_call(180),
            rotate_call(90, label="a blue car")], ANSWER)
    batch = collect(policy, questions[:1], group=6)
    looks = [t.looks[0] for t in batch]
    assert [look.call.tool for look in looks] == [ZOOM, MIRROR, MIRROR, ROTATE, ROTATE, ROTATE]
    assert [look.box for look in looks] == [(64, 64, 192, 192)] * 3 + [corner] * 3
    zoomed, mirror, again, quarter, half, named = (look.crop_tokens for look in looks)
    assert mirror is again and quarter is named
    assert len({id(tokens) for tokens in (zoomed, mirror, quarter, half)}) == 4
    assert not torch.equal(zoomed.features[0], mirror.features[0])
    assert not torch.equal(quarter.features[0], half.features[0])
    for t, look in zip(batch, looks):
        assert t.end == "answer" and t.tokens.features[1] is look.crop_tokens.features[0]


def test_the_demonstration(monkeypatch, capsys):
    """The environment's part of the sequence is what it teaches, so there must be one."""
    monkeypatch.chdir(ROOT)
    rollout.demonstrate()
    said = capsys.readouterr().out
    assert "tokens of the prompt" in said and "tokens of the tool's response" in said
    assert "ended by answer" in said


def test_a_question_that_is_too_long_is_named(policy, questions, monkeypatch):
    monkeypatch.setattr(policy, "positions", 60)
    long = dataclasses.replace(questions[0], text="vee " * 60, id="7")
    assert collect(policy, questions[:1])[0].turns
    with pytest.raises(ValueError, match="question 7: .* tokens .* has 60 positions"):
        collect(policy, [questions[0], long])
