"""Benchmarks' answers are read as the references read them, and the page says so."""
import sys

import pytest

from conftest import ROOT
from lib.benchmarks import chosen, chosen_by_us, correct
from lib.question import Question

sys.path.insert(0, str(ROOT / "docs"))
import scoring

# Two letters an answer: what `can_infer` of ms-vlmeval 0.0.20 (PyPI) said to V*'s question, and
# what `extract_characters_regex` of the authors' eval_your_results.py (MME-Benchmarks/MME-RealWorld
# at commit bee58ed) said to MME-RealWorld's with its options. "-": nothing, or VLMEvalKit's "Z".
RECORDED = {
    "B": "BB", "b": "-A", " B ": "BB", "(B)": "BB", "(b)": "-B", "B.": "BB", "B)": "BB", "B:": "BB",
    "B,": "BB", "B?": "-B", "[B]": "BB", "{B}": "BB", "**B**": "BB",
    "`B`": "-B", "\"B\"": "-B", "<B>": "-B", "\\boxed{B}": "BB",
    "Ｂ": "--", "B/": "-B", "B B": "BB", "E": "-E", "F": "-E", "Z": "--",
    "B. green": "BB", "(B) green": "BB", "B) Green": "BB", "B: green": "BB", "B green": "BB",
    "B - green": "BB", "B-green": "BB", "green (B)": "BB", "B. red": "BB",
    "B. The collar is green.": "BB", "B\nThe collar is green.": "BB",
    "**B.** The dog's collar is green.": "BB",
    "B, because the collar that the dog wears is green.": "-B", "green": "BB", "Green": "BB",
    "GREEN": "BE", " green. ": "B-", "It is green.": "B-", "The collar is green.": "B-",
    "dark green": "B-", "gre": "-B", "e": "-B", "not green": "B-",
    "green or red": "--", "neither red nor green": "--", "blue": "--",
    "The dog in the middle of the picture wears a collar that is green.": "--",
    "the dog wears a green one": "B-", "The answer is B": "BB", "The answer is B.": "BB",
    "The answer is (B).": "BB", "the answer is B": "BB", "the answer is b": "--",
    "The answer: B": "BB", "The answer is green": "BB", "The best answer is B": "BB",
    "The correct answer is B.": "BB", "The correct option is (B).": "BB", "Best option: (B)": "BB",
    "Answer: B": "BA", "answer: B": "BB", "Answer: green": "BA",
    "option B": "BB", "Option B is correct.": "BB", "It is B.": "BB", "I think it is B": "BB",
    "My choice is B because I see a green collar there.": "-B",
    "Because the collar is green: B": "BB", "A or B": "-A", "A, B": "-A", "B, not A": "-B",
    "Not A but B": "-A", "A green collar": "AA", "It is a collar. A green one": "AA",
    "A. black B. green C. red D. white": "-A", "A dog with a collar, so B": "-A", "": "-A",
    "?": "--", "2": "--", "no": "-E", "none": "--", "None of the above": "--", "Unknown": "--",
    "Yes": "--", "I don't know.": "--", "It is not visible.": "--",
    "The image does not feature the color.": "-E", "Cannot determine the answer": "-C",
    "I'm sorry, but without the image provided I would say B": "-B",
    "Sorry, I can't help with images of people yet.": "--",
    "I can't process this file. green": "--", "Failed to obtain answer via API.": "-A",
    "Failed to obtain answer via API. B green": "-A", "<answer>B": "-B", "<answer>B</answer>": "-B",
    "<think>It may be red.</think> B": "BB", "<think>A collar, green or red.</think>": "-A",
    "<think>It is green.</think>\n\nThe answer is B.": "BB",
    '<tool_call>{"name": "image_zoom_in_tool", "arguments": {"label": "collar"}}</tool_call>': "--",
    "答案是B": "-B", "B。": "-B", "绿色 green": "B-",
}


def test_our_rule_reads_what_the_references_read():
    """All kinds of answers in the table of docs/scoring.md, and no other."""
    assert tuple(RECORDED) == scoring.ANSWERS and len(RECORDED) >= 60
    for answer, letters in RECORDED.items():
        said = [scoring.letter(chosen(q, answer)) for q in (scoring.VSTAR, scoring.MME)]
        assert "".join(said) == letters, answer


def test_the_page_is_made_by_the_code():
    page = scoring.PAGE.read_text(encoding="utf-8")
    assert scoring.filled(page) == page and scoring.table() in page


def ask(benchmark: str, *choices: str, answer="A") -> Question:
    return Question("Which?", answer, None, choices, benchmark=benchmark)


@pytest.mark.parametrize("choices, answer, letter", [
    # can_infer of ms-vlmeval 0.0.20: a letter counts only if the question has it
    (("left", "right"), "C", None), (("left", "right"), "C or A", 0), (("red", "blue"), "Z A", 0),
    # .. among the last four words, where it stands *first*
    (("x1", "x2"), "A b c d", 0), (("x1", "x2"), "A b c d e", None),
    (("x1", "x2"), "A b c d A", None),
    # .. a text in any case, of one option only, in an answer of at most twice all options
    (("light red", "red"), "Red it is", 1), (("light red", "red"), "light red", None),
    (("ab", "cd"), "xxxxxxAB", 0), (("ab", "cd"), "xxxxxxxAB", None), (("A", "B"), ": b", 1),
    # .. a refusal is none of them, even with a text; a failure of the API names no letter
    (("red", "blue"), "I can't process this file. red", None), (("red", "blue"), "red Z", None),
    (("Failed to obtain answer via API", "red"), "Failed to obtain answer via API", 0)])
def test_edges_of_vlmevalkit(choices, answer, letter):
    for benchmark in ("V*", "HR-Bench"):
        assert chosen(ask(benchmark, *choices), answer) == letter


@pytest.mark.parametrize("answer, letter", [
    ("the best answer is b", None), ("The best answer isC", 2), ("The answer", 0), ("(c", 2),
    ("one two three four five six seven eight nine ten", None), ("two", 1), (") two", 1),
    ("o", 0), ("x" * 50 + " y" * 10 + " D", 3), ("The best option is B", 1)])
def test_edges_of_the_authors_script(answer, letter):
    """eval_your_results.py at commit bee58ed."""
    assert chosen(ask("MME-RealWorld-Lite", "one", "two", "three", "four", "x"), answer) == letter


def test_no_answer_and_other_questions():
    """Nothing said is wrong everywhere; a question of your own has one rule, ours."""
    for benchmark in ("V*", "HR-Bench", "MME-RealWorld-Lite"):
        question = ask(benchmark, "red", "blue", "green", "white", "none")
        assert chosen(question, None) is chosen_by_us(question, None) is None
        assert not correct(question, None) and not correct(question, None, ours=True)
    own = Question("Which?", "red", None, ("red", "blue"))
    assert chosen(own, "b") == chosen_by_us(own, "b") == 1 and chosen(own, "It is B.") is None


def test_the_two_rules_of_right():
    """The reference compares letters; ours takes an option with the same text for right, too."""
    twins = ask("HR-Bench", "3", "4", "5", "5", answer="C")
    assert correct(twins, "C") and correct(twins, "C", ours=True)
    assert not correct(twins, "D") and correct(twins, "D", ours=True)
    assert correct(ask("V*", "red", "blue"), "It is red.")
    assert not correct(ask("V*", "red", "blue"), "It is red.", ours=True)


def test_options_are_asked_as_vlmevalkit_asks():
    """Its build_prompt, without the word "Question: " and its closing sentence."""
    assert ask("V*", "red", "blue").prompt == "Which?\nOptions:\nA. red\nB. blue"
    own = Question("Which?", "red", None, ("red", "blue"))
    assert own.prompt == "Which?\nOptions: (A) red (B) blue"
