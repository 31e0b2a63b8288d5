"""A question about an image: what one is, when its evidence is seen, what an answer names.

What it teaches: what a look and an answer are judged by.

- *Was the evidence seen?* A crop `holds` a box of evidence if two thirds of the box lie inside.
  It `shows` the box if it is also close enough to read it.
- *What does the answer name?* An option is named by its text, by its letter, or by both (`choose`).

Files of questions are read by lib/data.py and lib/benchmarks.py.

Run it:  python -m lib.question "(b)" "the red" blue red        # which option an answer names
"""
import re
import sys
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field

from PIL import Image

Box = tuple[float, float, float, float]  # x1, y1, x2, y2 in pixels of the original image


@dataclass
class Question:
    """One question about one image. `open()` loads the image; a list of questions holds none."""
    text: str
    answer: str
    open: Callable[..., Image.Image] = field(repr=False)
    choices: tuple[str, ...] = ()  # empty: an open question
    category: str = ""
    boxes: tuple[Box, ...] = ()    # all of them must be seen to know the answer; () = unknown
    objects: dict[str, Box] = field(default_factory=dict)  # by name, where; {} = unknown
    marks: dict[str, str] = field(default_factory=dict)    # what each carries (tiny/world.py)
    id: str = ""
    benchmark: str = ""            # the name of the benchmark that it is of
    cycle: str = ""                # HR-Bench asks it four times, the options in another order
    where: str = ""                # its file and line, for errors

    @property
    def prompt(self) -> str:
        """The text that the agent reads: the question, then lettered options. In a benchmark
        they stand one a line, as VLMEvalKit asks."""
        if not self.choices:
            return self.text
        lettered = list(zip("ABCDEFGHIJKLMNOPQRSTUVWXYZ", self.choices))
        if self.benchmark:
            lines = [f"{letter}. {choice}" for letter, choice in lettered]
            return "\n".join([self.text, "Options:", *lines])
        options = [f"({letter}) {choice}" for letter, choice in lettered]
        return f"{self.text}\nOptions: {' '.join(options)}"


# ---- when is evidence seen? ----------------------------------------------------------------------

def coverage(box: Box, target: Box) -> float:
    """Share of the target's area that lies inside the box."""
    width = min(box[2], target[2]) - max(box[0], target[0])
    height = min(box[3], target[3]) - max(box[1], target[1])
    area = (target[2] - target[0]) * (target[3] - target[1])
    return max(width, 0) * max(height, 0) / area


def holds(box: Box, target: Box) -> bool:
    """The crop contains the target: at least two thirds of it."""
    return coverage(box, target) >= 2 / 3


def shows(box: Box, target: Box) -> bool:
    """The crop contains the target and is close enough to read it.

    Close enough: its longest side is at most 2.5 times the target's. A crop keeps a bounded number
    of pixels, so a wide one is as blurred as the overview (tests/test_world.py). The 2.5 is that of
    the small crops of tiny/: a real model's crops have more pixels, and it may read more."""
    return holds(box, target) and longest_side(box) <= 2.5 * longest_side(target)


def longest_side(box: Box) -> float:
    return max(box[2] - box[0], box[3] - box[1])


# ---- what does an answer name? -------------------------------------------------------------------

def normalise(text: str) -> str:
    """Lower case, single spaces, without punctuation that is no part of a word.

    A text of signs alone stays as it is: "<5" is not ">5", and "+" is not "-"."""
    text = unicodedata.normalize("NFC", text.strip().lower()).replace("\N{MINUS SIGN}", "-")
    # accents and vowel signs are parts of words, in many scripts characters of their own
    letter = r"\w" + "".join({c for c in text if unicodedata.category(c) in ("Mn", "Mc")}
                             - {"\N{VARIATION SELECTOR-15}", "\N{VARIATION SELECTOR-16}"})
    words = []
    for word in re.findall(f"[{letter}.%<>≤≥+#$€£-]+", text):
        if end := re.match(rf".*\w[{letter}%+#€£]*", word):           # signs behind it go
            words.append(end[0])
    return " ".join(words) or text


def choose(answer: str, choices: tuple[str, ...]) -> int | None:
    """The index of the option that an answer names, or None.

    It may give the option's text, its letter ("B", "(b)", "B."), or its letter and its text. A
    letter somewhere in a sentence names nothing."""
    texts = [normalise(choice) for choice in choices]
    said = normalise(answer)
    if said in texts:
        return texts.index(said)
    match = re.fullmatch(r"\s*\(?([A-Za-z])[).:]?\s*(.*?)\s*", answer, re.DOTALL)
    if match:
        index = ord(match[1].upper()) - ord("A")
        rest = normalise(match[2])
        if index < len(choices) and rest in ("", texts[index]):
            return index
    return None


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit("expected an answer and the options, such as: b black brown")
    answer, *choices = sys.argv[1:]
    index = choose(answer, tuple(choices))
    print("none" if index is None else choices[index])
