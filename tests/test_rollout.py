"""Trajectories: what was sampled stays as it was, and every token knows who wrote it."""
import torch
from PIL import Image

from lib.data import Question
from rollout import collect
from show import film_strip, stack, transcript


class Script:
    """A policy that says what it is told to, one text a turn, through the real session's interface."""

    def __init__(self, policy, turns):
        self.policy, self.turns = policy, turns

    def __enter__(self):
        from lib.sampler import Session
        self.original, turns, policy = Session.sample, iter(self.turns), self.policy

        def sample(session, max_tokens, temperature, generator):
            text = next(turns)
            ids = [policy.tokens(text).ids for _ in session.next]
            session.next = [p + len(i) - 1 for p, i in zip(session.next, ids)]
            session.pending = [i[-1:] for i in ids]
            # the session's cache lacks the scripted tokens; nothing here reads it
            return ids, [[-1.] * len(i) for i in ids]

        Session.sample = sample

    def __exit__(self, *_):
        from lib.sampler import Session
        Session.sample = self.original


CALL = '<tool_call>{"name": "image_zoom_in_tool", "arguments": {"label": "the red circle", "bbox_2d": [8, 8, 24, 24]}}</tool_call>'


def test_tokens_are_kept_as_sampled(policy, trajectories):
    """Ids, masks and log-probabilities have one length; each turn's slice holds exactly its text; only the agent's
    tokens are in the mask; image placeholders are never the agent's."""
    for t in trajectories:
        assert len(t.tokens.ids) == len(t.mask) == len(t.logps)
        assert sum(t.mask) == sum(turn.tokens.stop - turn.tokens.start for turn in t.turns)
        for turn in t.turns:
            assert all(t.mask[turn.tokens])
            assert policy.decode(t.tokens.ids[turn.tokens]).removesuffix("<|im_end|>") == turn.text
        assert not any(m for i, m in zip(t.tokens.ids, t.mask) if i == policy.image_id)
        assert all(p == 0 for p, m in zip(t.logps, t.mask) if not m)
        assert t.tokens.ids.count(policy.image_id) == sum(h * w for h, w in t.tokens.grids) == sum(len(f) for f in t.tokens.features)


def test_groups_share_a_question_and_differ_in_what_they_do(trajectories, questions):
    assert [t.question.id for t in trajectories] == [q.id for q in questions for _ in range(4)]
    assert any(a.tokens.ids != b.tokens.ids for a, b in zip(trajectories[::4], trajectories[1::4]))


def test_same_seed_same_trajectories(policy, questions, trajectories):
    again = collect(policy, questions, group=4, generator=torch.Generator().manual_seed(0))
    assert [t.tokens.ids for t in again] == [t.tokens.ids for t in trajectories]


def test_a_call_returns_a_crop_and_an_answer_ends(policy, questions):
    with Script(policy, [CALL, "<answer>rising</answer>"]):
        t = collect(policy, questions[:1])[0]
    assert [bool(turn.call) for turn in t.turns] == [True, False] and t.answer == "rising" and t.end == "answer"
    assert t.turns[0].box == (64, 64, 192, 192) and t.turns[0].crop.size == (48, 48) and len(t.tokens.grids) == 2
    assert "<tool_response><|vision_start|>[image 2 x 2]<|vision_end|></tool_response>" in transcript(policy, t)


def test_an_error_is_an_observation(policy, questions):
    """A bad call costs a turn, is explained in words the agent can learn from, and does not end the episode."""
    with Script(policy, [CALL.replace("the red circle", "object"), CALL, "<answer>x</answer>"]):
        t = collect(policy, questions[:1])[0]
    assert [turn.error for turn in t.turns] == ["vague_label", "", ""] and len(t.looks) == 1 and t.end == "answer"
    assert "fits any picture" in transcript(policy, t)


def test_neither_call_nor_answer_ends_the_episode(policy, questions):
    with Script(policy, ["hello"]):
        t = collect(policy, questions[:1])[0]
    assert t.end == "no_action" and t.answer is None


def test_turns_are_bounded(policy, questions):
    """The last turn cannot look: nothing would come of it."""
    with Script(policy, [CALL] * 9):
        t = collect(policy, questions[:1], max_turns=3)[0]
    assert t.end == "max_turns" and len(t.turns) == 3 and len(t.looks) == 2


def test_a_turn_closed_by_the_agent_is_not_closed_twice(policy, questions):
    with Script(policy, [CALL + "<|im_end|>", "<answer>x</answer>"]):
        t = collect(policy, questions[:1])[0]
    assert "<|im_end|><|im_end|>" not in transcript(policy, t) and len(t.looks) == 1


def test_other_image_sizes(policy):
    """A wide photograph, a small one: the policy sees a size of its own, and boxes map to the original."""
    asked = [Question("What?", "x", lambda size=size: Image.new("RGB", size, "red")) for size in ((1600, 400), (30, 30), (200, 5000))]
    with Script(policy, [CALL.replace("8, 8, 24, 24", "0, 0, 24, 12"), "<answer>x</answer>"]):
        for t, size in zip(collect(policy, asked), ((1600, 400), (30, 30), (200, 5000))):
            assert t.seen[0] * t.seen[1] <= policy.resolution.max_pixels and len(t.looks) == 1
            assert abs(t.looks[0].box[2] - 24 * size[0] / t.seen[0]) < 1e-6


def test_film_strips(trajectories, policy, questions):
    """A strip shows every look; a trajectory without looks has one too; strips stack."""
    page = stack([film_strip(t, "test: ") for t in trajectories[:3]])
    assert page.height == 3 * film_strip(trajectories[0]).height and len(page.getcolors(10**6)) > 100
    with Script(policy, ["<answer>x</answer>"]):
        film_strip(collect(policy, questions[:1])[0])
