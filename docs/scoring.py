"""What each rule reads in an answer: the table of docs/scoring.md.

What it teaches: a benchmark's number depends on how answers are read. A question like V*'s and one
like MME-RealWorld-Lite's get the same answers. `chosen` reads them by the reference's rule,
`chosen_by_us` by ours (lib/benchmarks.py).

Run it:  python docs/scoring.py      # fills in the table again; 2 s
"""
import importlib.util
import re
import sys
from pathlib import Path
from unittest.mock import MagicMock

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from lib.benchmarks import chosen, chosen_by_us
from lib.question import Question

PAGE = ROOT / "docs/scoring.md"
COLOURS = ("black", "green", "red", "white")
VSTAR = Question("What is the color of the dog's collar?", "B", None, COLOURS,
                 benchmark="V*")
MME = Question(VSTAR.text, "B", None, (*COLOURS, "The image does not feature the color."),
               benchmark="MME-RealWorld-Lite")

ANSWERS = (
    # a letter
    "B", "b", " B ", "(B)", "(b)", "B.", "B)", "B:", "B,", "B?", "[B]", "{B}", "**B**",
    "`B`", '"B"', "<B>", "\\boxed{B}", "Ｂ", "B/", "B B", "E", "F", "Z",
    # a letter and a text
    "B. green", "(B) green", "B) Green", "B: green", "B green", "B - green", "B-green",
    "green (B)", "B. red", "B. The collar is green.", "B\nThe collar is green.",
    "**B.** The dog's collar is green.", "B, because the collar that the dog wears is green.",
    # a text
    "green", "Green", "GREEN", " green. ", "It is green.", "The collar is green.", "dark green",
    "gre", "e", "not green", "green or red", "neither red nor green", "blue",
    "The dog in the middle of the picture wears a collar that is green.",
    "the dog wears a green one",
    # a sentence about it
    "The answer is B", "The answer is B.", "The answer is (B).", "the answer is B",
    "the answer is b", "The answer: B", "The answer is green", "The best answer is B",
    "The correct answer is B.", "The correct option is (B).",
    "Best option: (B)", "Answer: B", "answer: B", "Answer: green",
    "option B", "Option B is correct.", "It is B.", "I think it is B",
    "My choice is B because I see a green collar there.", "Because the collar is green: B",
    # several letters
    "A or B", "A, B", "B, not A", "Not A but B", "A green collar", "It is a collar. A green one",
    "A. black B. green C. red D. white", "A dog with a collar, so B",
    # no answer
    "", "?", "2", "no", "none", "None of the above", "Unknown", "Yes", "I don't know.",
    "It is not visible.", "The image does not feature the color.", "Cannot determine the answer",
    "I'm sorry, but without the image provided I would say B",
    "Sorry, I can't help with images of people yet.", "I can't process this file. green",
    "Failed to obtain answer via API.", "Failed to obtain answer via API. B green",
    # a turn without a closed <answer>
    "<answer>B", "<answer>B</answer>", "<think>It may be red.</think> B",
    "<think>A collar, green or red.</think>", "<think>It is green.</think>\n\nThe answer is B.",
    '<tool_call>{"name": "image_zoom_in_tool", "arguments": {"label": "collar"}}</tool_call>',
    "答案是B", "B。", "绿色 green",
)


def letter(index: int | None) -> str:
    return "-" if index is None else chr(ord("A") + index)


def table() -> str:
    """The table in Markdown: a row for each answer; ours is bold where it differs."""
    columns = ("answer", "V*, HR-Bench: VLMEvalKit", "ours", "MME-RealWorld-Lite: its authors",
               "ours")
    lines = [f"| {' | '.join(columns)} |", "|---|---|---|---|---|"]
    differ = {"V*": 0, "MME-RealWorld-Lite": 0}
    for answer in ANSWERS:
        cells = []
        for question in (VSTAR, MME):
            reference = letter(chosen(question, answer))
            ours = letter(chosen_by_us(question, answer))
            if ours != reference:
                differ[question.benchmark] += 1
                ours = f"**{ours}**"
            cells += [reference, ours]
        lines.append(f"| {code(answer)} | {' | '.join(cells)} |")
    vstar, mme = differ.values()
    lines.append(f"| {len(ANSWERS)} answers | | {vstar} differ | | {mme} differ |")
    return "\n".join(lines)


def code(answer: str) -> str:
    """An answer as it was written, in Markdown: a line break shows as \\n."""
    fence = "``" if "`" in answer else "`"
    shown = answer.replace("\n", "\\n")
    if not answer or answer != answer.strip() or fence == "``":
        shown = f" {shown} "
    return f"{fence}{shown}{fence}" if answer else "(empty)"


def filled(page: str) -> str:
    """The page with its table made anew."""
    rows = re.compile(r"^\| answer \|.*?(?=\n\n|\n?\Z)", re.DOTALL | re.MULTILINE)
    return rows.sub(lambda _: table(), page)


# ---- the references' own code, for docs/references.py --------------------------------------------

def without_init(*packages: str) -> None:
    """Their files can then be imported alone. What a package itself imports (torchvision, judges
    of other benchmarks) is not needed here."""
    for name in packages:
        spec = importlib.util.find_spec(name)
        places = list(spec.submodule_search_locations)
        sys.modules[name] = MagicMock(__spec__=spec, __path__=places)


def compare():
    """Yields what, whose, and the letters that we and they read in all answers, and why."""
    without_init("vlmeval", "lmms_eval")
    without_init("vlmeval.smp", "vlmeval.utils", "vlmeval.dataset", "lmms_eval.tasks")
    without_init("vlmeval.dataset.utils", "lmms_eval.tasks.hrbench")
    from lmms_eval.tasks.hrbench.hrbench_evals import HRBenchEval
    from lmms_eval.tasks.mme_realworld.utils import extract_characters_regex as lmms_mme
    from lmms_eval.tasks.vstar_bench.utils import extract_answer_letter as lmms_vstar
    from vlmeval.dataset.utils.multiple_choice import extract_characters_regex as authors
    from vlmeval.utils.matching_util import can_infer

    def options() -> dict[str, str]:       # theirs change the texts in place
        return dict(zip("ABCD", COLOURS))

    def kit_mme(answer: str) -> str:       # as MMERealWorld.evaluate does with an <answer>
        return authors(answer.upper())

    def read(rule) -> list[str]:
        said = [rule(answer) for answer in ANSWERS]
        return [x if x and x != "Z" else "-" for x in said]

    vstar = [letter(chosen(VSTAR, answer)) for answer in ANSWERS]
    mme = [letter(chosen(MME, answer)) for answer in ANSWERS]
    texts = [f"({x}) {choice}" for x, choice in zip("ABCDE", MME.choices)]
    yield "V*, HR-Bench", "ms-vlmeval", vstar, read(lambda a: can_infer(a, options())), ""
    yield "MME", "authors' rule, in ms-vlmeval", mme, read(lambda a: authors(a, texts)), ""
    yield ("MME", "ms-vlmeval's evaluate", mme, read(kit_mme),
           "it writes the <answer> in capitals first, and compares no option's text")
    yield "V*", "lmms-eval", vstar, read(lmms_vstar), "a rule of its own; no option's text"
    yield ("HR-Bench", "lmms-eval", vstar,
           read(lambda a: HRBenchEval("").can_infer(a, options())),
           "an older can_infer: a letter anywhere, a text of any length")
    yield "MME", "lmms-eval", mme, read(lmms_mme), "four more prefixes; no option's text"


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(table())
