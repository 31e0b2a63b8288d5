"""docs/exercises.md: what a student is told to type can be typed, and what was worked out by hand
is right.

The runs take minutes, and are not repeated here."""
import re
import shlex

import pytest
import torch

import mapo
from conftest import ROOT
from test_extending import apply
from train import parse_config

PAGE = (ROOT / "docs/exercises.md").read_text()
EXERCISES = re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]
SHORT = re.search(r"short\(\) \{ python train.py (.*) \"\$@\"; \}", PAGE)[1]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("number", range(1, len(EXERCISES) + 1))
def test_every_exercise_is_whole(number):
    """A number, a time, what to observe, and an answer, folded."""
    exercise = EXERCISES[number - 1]
    question, answer = exercise.split("<details><summary>Answer</summary>\n\n")
    assert question.startswith(f"{number}. ")
    assert "**Observe.**" in question and re.search(r"about\s\d", question)
    assert answer.count("\n</details>\n") == 1


def test_every_command_parses():
    """`short ..` by train.py's own parser. A run of another script is a file that exists."""
    commands = re.findall(r"`(short\b[^`]*)`", PAGE)
    for command in commands:
        parse_config(shlex.split(SHORT) + shlex.split(command)[1:])
    assert len(commands) >= 8
    for script in re.findall(r"`python (\S+)`", PAGE):
        assert (ROOT / script).is_file(), script


def test_the_last_of_two_options_counts():
    config = parse_config(shlex.split(SHORT) + ["--steps", "3", "--eval_questions", "0"])
    assert (config.questions, config.steps, config.eval_questions) == (8, 3, 0)


@pytest.mark.parametrize("block", blocks("diff"), ids=lambda block: block.split("\n")[0])
def test_every_change_applies(block, tmp_path):
    """Each alone, to the files as they are. What comes out is Python, and no line is too long."""
    for name in apply(block, tmp_path):
        text = (tmp_path / name).read_text()
        compile(text, name, "exec")
        assert max(map(len, text.split("\n"))) <= 100


# ---- the answers that need no run ----------------------------------------------------------------

SCORES = torch.tensor([[.9], [.1], [.9], [.1]])
MIXED, RIGHT = torch.tensor([1., 1, 0, 0]), torch.ones(4)


@pytest.mark.parametrize("r, beta, expected", [(MIXED, 0, [1, 1, -1, -1]),
                                               (MIXED, .4, [1.35, .41, -.41, -1.35]),
                                               (RIGHT, 0, [0, 0, 0, 0]),
                                               (RIGHT, .4, [1, -1, 1, -1])])
def test_a_group_by_hand(r, beta, expected):
    A = mapo.advantages(r, SCORES, SCORES > 0, 4, beta)
    assert torch.allclose(A, torch.tensor(expected, dtype=A.dtype), atol=.005)


def test_the_lines_of_the_first_exercise(capsys):
    exec(blocks("python")[0], {})
    printed = capsys.readouterr().out
    assert [float(x) for x in re.findall(r"-?\d\.\d+", printed)] == [1.3529, .4118, -.4118, -1.3529]


def test_the_division_makes_any_difference_a_large_one():
    close = torch.tensor([[.51], [.49], [.51], [.49]])
    sign = torch.tensor([1., -1, 1, -1])
    assert torch.allclose(mapo.advantages(RIGHT, close, close > 0, 4, .4), sign, atol=1e-3)
    for scores, length in ((SCORES, .16), (close, .004)):
        A = mapo.advantages(RIGHT, scores, scores > 0, 4, .4, std=False)
        assert torch.allclose(A, length * sign, atol=1e-6)


def test_a_thousandth_is_everything_where_answers_are_alike():
    r = RIGHT + .001 * torch.tensor([1, 1, 1, 2])
    no_looks = torch.zeros(4, 1)
    A = mapo.advantages(r, no_looks, no_looks.bool(), 4, 0.)
    assert torch.allclose(A, torch.tensor([-.58, -.58, -.58, 1.73]), atol=.005)


@pytest.mark.parametrize("credit, expected", [("trajectory", [.09, -.09]),
                                              ("look", [[.09, 0], [-.09, -.27]]),
                                              ("aim", [[0, 0], [0, 0]])])
def test_who_pays_for_the_second_look(credit, expected):
    scores = torch.tensor([[.98, 0], [.98, .08]])
    A = mapo.advantages(torch.ones(2), scores, scores > 0, 2, .4, 1., credit, std=False)
    assert torch.allclose(A, torch.tensor(expected, dtype=A.dtype), atol=1e-6)


def test_weights_of_a_micro_batch_are_not_those_of_the_batch():
    """Three trajectories of 1, 1 and 2 tokens, cut as {1, 1} and {2}: the long one, alone in its
    micro-batch, weighs half instead of a third."""
    mask = torch.tensor([[1, 0], [1, 0], [1, 1]])
    whole = mapo.token_weights(mask)
    apart = torch.cat([part / part.sum() for part in (whole[:2], whole[2:])]) / 2
    assert torch.allclose(whole.sum(1), torch.full((3,), 1 / 3))
    assert torch.allclose(apart.sum(1), torch.tensor([1 / 4, 1 / 4, 1 / 2]))
