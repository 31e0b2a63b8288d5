"""Labels: what a description of a look must be, so that its score can mean something.

What it teaches: a reward is an invitation. If a vague label scored well, the agent would learn to
write vague labels; if hidden characters passed, it could hide words in them. So a label is a short,
visible text that names something. How vague labels are kept from paying by the *score* is eq. 9 of
reward.py; here they are refused outright. (So is "the box", although a picture may show one; "the
cardboard box" is not.)

Run it:  python -m lib.labels "the red sign" "the object" "th3 obj ect"      # fit, or why not
"""
import functools
import re
import sys
import unicodedata

MAX_LABEL_WORDS, MAX_LABEL_CHARS = 12, 80

# Words that fit any picture. A label of these alone says nothing that a crop could disagree with.
VAGUE = frozenset("""a an the this that these those it its he she they them there here of in on at
    to for with and or is are my some any other another one ones image images picture pictures photo
    photos photograph crop crops object objects thing things stuff item items something anything
    everything region regions area areas part parts section place spot location detail details view
    scene zoom zoomed look target label description content box bbox bounding visual whole entire
    full main interest relevant question answer left right top bottom upper lower center centre
    middle corner side small large big tiny""".split())

# Characters that show nothing, whatever their category: fillers, blanks, and variation selectors.
SELECTORS = [*range(0x180b, 0x1810), *range(0xfe00, 0xfe10), *range(0xe0100, 0xe01f0)]
BLANK = ("\u034f\u115f\u1160\u17b4\u17b5\u2800\ufffc\U00013441\U00013442\U00016fe4\U0001d159"
         + "".join(map(chr, SELECTORS)))
INVISIBLE = ("Cc", "Cf", "Co", "Cs", "Cn")   # control, format, private, surrogate, unassigned

# What looks like < or >, and the letters that other scripts' letters and digits look like.
ANGLES = ("<>\u02c2\u02c3\u1433\u1438\u16b2\u2039\u203a\u276c\u276d\u276e\u276f\u2770\u2771\u27e8"
          "\u27e9\u29fc\u29fd\u3008\u3009")
LOOK_ALIKES = (str.maketrans("аеорсухѕԁһкмнтвіјӏ", "aeopcyxsdhkmhtbiji")       # Cyrillic
               | str.maketrans("αορνιτκυχεημβ", "aopvitkuxehmb")                # Greek
               | str.maketrans("ıɑɡl0134579", "iagioieastg"))


def clean(label: str) -> str:
    """One line, single spaces; full-width letters and ligatures become plain ones."""
    return " ".join(unicodedata.normalize("NFKC", label).split())


def fault(label: str) -> tuple[str, str] | None:
    """(a short name, what the agent is told) of what is wrong with a label; None: nothing."""
    plain = unicodedata.normalize("NFKC", label)
    if any(unicodedata.category(c) in INVISIBLE or c in BLANK for c in plain):
        return "label_characters", "the label holds control, invisible or private characters."
    if any(c in ANGLES for c in plain):
        return "label_markup", "the label must be plain words, without < or >."
    label = clean(label)
    words = re.findall(r"[^\W_]+", label.lower())
    if not words:
        return "empty_label", "the label is empty. Say what you are looking for."
    if len(label) > MAX_LABEL_CHARS or len(label.split()) > MAX_LABEL_WORDS:
        return "long_label", (f"the label is too long: at most {MAX_LABEL_WORDS} words and "
                              f"{MAX_LABEL_CHARS} characters.")
    if is_vague(words):
        return "vague_label", ("the label fits any picture. Name the object that you are looking "
                               "for.")
    return None


def is_vague(words: list[str]) -> bool:
    """Does it hold only words of VAGUE, even disguised ("0bjéct") or in pieces ("the ob ject")?"""
    vague = {fold(word) for word in VAGUE}
    left = fold("".join(word for word in words if fold(word) not in vague))
    parts = "|".join(word for word in vague if len(word) > 2)   # else "inbox" were "in", "box"
    return re.fullmatch(f"({parts})*", left) is not None


@functools.lru_cache(maxsize=1000)
def fold(word: str) -> str:
    """Letters that look alike become one, and lose their accents. A number stays a number."""
    if word.isdigit():
        return word
    return re.sub(r"\W", "", unicodedata.normalize("NFD", word).translate(LOOK_ALIKES))


if __name__ == "__main__":
    for label in sys.argv[1:]:
        found = fault(label)
        print(f"{label!r}: " + (f"{found[0]}, {found[1]}" if found else f"{clean(label)!r}"))
