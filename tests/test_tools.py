"""The tool's contract: any text becomes a checked Call, an Answer or a short ToolError; boxes and
pixels agree; a second tool needs no other change."""
import dataclasses
import json
import time

import numpy as np
import pytest
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

import tools
from lib.labels import MAX_LABEL_CHARS, MAX_LABEL_WORDS, VAGUE
from tools import (MAX_ANSWER_CHARS, MAX_CALL_CHARS, MAX_TURN_CHARS, ZOOM, Answer, Call, Resolution,
                   Tool, ToolError, check_box, fit, parse, run_tool, system_prompt, to_original,
                   zoom_call)

SEEN = (96, 72)
GOOD_LABEL, GOOD_BOX = '"the red sign"', "[10, 20, 50, 60]"


def zoom(label: str, box: tuple) -> Call:
    return Call(ZOOM, label, {"bbox_2d": box})


GOOD = zoom("the red sign", (10, 20, 50, 60))


def body(label=GOOD_LABEL, box=GOOD_BOX, name=f'"{ZOOM}"', more="") -> str:
    """The JSON of a call; every part is raw text, so it can be broken at will."""
    return f'{{"name": {name}, "arguments": {{"label": {label}, "bbox_2d": {box}{more}}}}}'


def with_arguments(arguments: str) -> str:
    """The JSON of a zoom call with these arguments, raw."""
    return f'{{"name": "{ZOOM}", "arguments": {arguments}}}'


def tagged(text: str) -> str:
    return f"<tool_call>{text}</tool_call>"


def outcome(turn: str, seen=SEEN):
    """The Call or the Answer, or the kind of the ToolError."""
    try:
        return parse(turn, seen)
    except ToolError as error:
        assert 0 < len(str(error)) < 400 and str(error).startswith("Error: ")
        return error.kind


# ---- hand-worked tables --------------------------------------------------------------------------

LABELS = {  # label, raw JSON -> cleaned label or kind
    "plain": ('"a red circle"', "a red circle"),
    "spaces are joined": ('"  red   circle "', "red circle"),
    "no-break space": ('"red\\u00a0circle"', "red circle"),
    "line separator": ('"red\\u2028circle"', "red circle"),
    "full-width letters": ('"ｒｅｄ ｃｉｒｃｌｅ"', "red circle"),
    "ligature": ('"ﬁreplace"', "fireplace"),
    "other scripts": ('"红色的标志"', "红色的标志"),
    "emoji from two escapes": ('"red \\ud83d\\ude00 face"', "red \U0001f600 face"),
    "vague words among others": ('"the small object with a logo"', "the small object with a logo"),
    "a number is a word like any other": ('"the 175"', "the 175"),     # and not "its"
    "vague words within a word": ('"the inbox"', "the inbox"),
    "words of other scripts": ('"красный знак"', "красный знак"),
    "quotation marks": ('"a «red» sign"', "a «red» sign"),
    "as many words as allowed": (json.dumps("w " * 11 + "w"), "w " * 11 + "w"),
    "as many characters as allowed": (json.dumps("w" * 80), "w" * 80),
    "one word too many": (json.dumps("w " * 12 + "w"), "long_label"),
    "one character too many": (json.dumps("w" * 81), "long_label"),
    "one letter that becomes eighteen": (json.dumps("\ufdfa" * 5), "long_label"),
    "empty": ('""', "empty_label"),
    "blank": ('"   "', "empty_label"),
    "punctuation": ('"... !? --"', "empty_label"),
    "underscores": ('"___"', "empty_label"),
    "vague": ('"the object"', "vague_label"),
    "vague in capitals": ('"THE WHOLE IMAGE!"', "vague_label"),
    "vague in full-width": ('"ｔｈｅ ｏｂｊｅｃｔ"', "vague_label"),
    "vague with underscore": ('"the_object"', "vague_label"),
    "vague list": ('"image, region; area (center)"', "vague_label"),
    "vague with Cyrillic letters": ('"the \u043ebject"', "vague_label"),
    "vague in Cyrillic capitals": ('"\u0422\u041d\u0415 image"', "vague_label"),
    "vague with Greek letters": ('"the im\u03b1ge"', "vague_label"),
    "vague with digits": ('"the 0bj3ct"', "vague_label"),
    "vague in pieces": ('"th e ob ject"', "vague_label"),
    "vague with a digit apart": ('"the 0 bject"', "vague_label"),
    "vague in one word": ('"theobject"', "vague_label"),
    "vague with accents": ('"the óbjéct"', "vague_label"),
    "vague, crossed out": ('"the o\u0335bject"', "vague_label"),
    "null": ("null", "no_label"),
    "number": ("7", "no_label"),
    "bool": ("true", "no_label"),
    "list": ('["red circle"]', "no_label"),
    "object": ('{"text": "red circle"}', "no_label"),
    "NaN": ("NaN", "no_label"),
    "markup": ('"red <b>circle</b>"', "label_markup"),
    "special token": ('"<|image_pad|>"', "label_markup"),
    "special token in full-width": ('"＜|im_end|＞"', "label_markup"),
    "special token in small forms": ('"red ﹤|im_end|﹥"', "label_markup"),
    "single quotation marks": ('"red \u2039|im_end|\u203a"', "label_markup"),
    "ornaments": ('"red \u276cb\u276d"', "label_markup"),
    "arrow heads": ('"red \u02c2b\u02c3"', "label_markup"),
    "mathematical brackets": ('"red \u27e8b\u27e9"', "label_markup"),
    "wide brackets": ('"red \u2329b\u232a"', "label_markup"),
    "syllables": ('"red \u1438b\u1433"', "label_markup"),
    "special token by escapes": ('"\\u003c|vision_start|\\u003e red"', "label_markup"),
    "tool response": ('"red</tool_response>"', "label_markup"),
    "newline": ('"red\\ncircle"', "label_characters"),
    "raw newline": ('"red\ncircle"', "bad_json"),
    "null byte": ('"red\\u0000circle"', "label_characters"),
    "raw null byte": ('"red\0circle"', "bad_json"),
    "escape sequence": ('"\\u001b[31mred"', "label_characters"),
    "C1 control": ('"red\\u0085circle"', "label_characters"),
    "zero-width space": ('"o\\u200bbject"', "label_characters"),
    "zero-width joiner": ('"red\u200dcircle"', "label_characters"),
    "soft hyphen": ('"ob\\u00adject"', "label_characters"),
    "byte-order mark": ('"\\ufeffred"', "label_characters"),
    "right-to-left override": ('"\\u202eelcric der"', "label_characters"),
    "bidi isolate": ('"red \\u2066circle"', "label_characters"),
    "tag characters": (json.dumps("red \U000e0041"), "label_characters"),
    "private use": ('"red \\ue000"', "label_characters"),
    "unassigned": ('"red \\uffff"', "label_characters"),
    "lone surrogate by escape": ('"red \\ud800"', "label_characters"),
    "lone surrogate": ('"red \udc80"', "label_characters"),
    "invisible letter": ('"\\u3164"', "label_characters"),  # Hangul filler
    "half a Hangul letter": ('"the ob\uffa0ject"', "label_characters"),
    "Braille blank": ('"the ob\u2800ject"', "label_characters"),
    "object replacement": ('"the ob\ufffcject"', "label_characters"),
    "empty note head": (json.dumps("red \U0001d159"), "label_characters"),
    "Khitan filler": (json.dumps("red \U00016fe4"), "label_characters"),
    "hieroglyphic blank": (json.dumps("red \U00013441"), "label_characters"),
    "Mongolian variation selector": ('"the ob\\u180bject"', "label_characters"),
    "variation selector": ('"the ob\\ufe0fject"', "label_characters"),
}

BOXES = {  # box, raw JSON -> box or kind, for an image of 96 x 72
    "floats": ("[10.5, 20.25, 50.75, 60]", (10.5, 20.25, 50.75, 60)),
    "exponents": ("[1e1, 2E+1, 50e0, 600e-1]", (10, 20, 50, 60)),
    "minus zero": ("[-0.0, 0, 50, 60]", (0, 0, 50, 60)),
    "whole image": ("[0, 0, 96, 72]", (0, 0, 96, 72)),
    "clamped on all sides": ("[-5, -5.5, 500, 1000000000]", (0, 0, 96, 72)),
    "clamped from the largest number": ("[-1e9, 0, 1000000000, 60]", (0, 0, 96, 60)),
    "a number too large": ("[0, 0, 1000000001, 60]", "not_finite"),
    "a float too large": ("[-1e308, 0, 50, 60]", "not_finite"),
    "smallest, in the corner": ("[92, 68, 96, 72]", (92, 68, 96, 72)),
    "a hair too small": ("[10, 10, 13.999, 40]", "small_box"),
    "too small after clamping": ("[93, 10, 200, 40]", "small_box"),
    "tiny": ("[10, 10, 10.0000001, 10.0000001]", "small_box"),
    "inverted x": ("[50, 20, 10, 60]", "inverted_box"),
    "inverted y": ("[10, 60, 50, 20]", "inverted_box"),
    "empty": ("[10, 20, 10, 60]", "inverted_box"),
    "all zero": ("[0, 0, 0, 0]", "inverted_box"),
    "outside on the right, touching": ("[96, 20, 120, 60]", "outside_box"),
    "outside on the left, touching": ("[-50, 20, 0, 60]", "outside_box"),
    "outside below": ("[10, 100, 50, 160]", "outside_box"),
    "overflow": ("[0, 0, 1e400, 60]", "not_finite"),
    "negative overflow": ("[-1e400, 0, 50, 60]", "not_finite"),
    "NaN": ("[NaN, 20, 50, 60]", "not_finite"),
    "Infinity": ("[10, 20, Infinity, 60]", "not_finite"),
    "-Infinity": ("[-Infinity, 20, 50, 60]", "not_finite"),
    "integer beyond float": (f"[0, 0, 1{'0' * 400}, 60]", "not_finite"),
    "integer of 1,500 digits": (f"[0, 0, {'9' * 1500}, 60]", "not_finite"),
    "integer of 10,000 digits": (f"[0, 0, {'9' * 10_000}, 60]", "too_long"),
    "bools": ("[false, false, 50, 60]", "bad_box"),
    "strings": ('["10", "20", "50", "60"]', "bad_box"),
    "one string": ('"[10, 20, 50, 60]"', "bad_box"),
    "nulls": ("[null, null, null, null]", "bad_box"),
    "null": ("null", "bad_box"),
    "number": ("10", "bad_box"),
    "object": ('{"x1": 10, "y1": 20, "x2": 50, "y2": 60}', "bad_box"),
    "no number": ("[]", "bad_box"),
    "three numbers": ("[10, 20, 50]", "bad_box"),
    "five numbers": ("[10, 20, 50, 60, 70]", "bad_box"),
    "two corners": ("[[10, 20], [50, 60]]", "bad_box"),
    "list in a list": ("[[10, 20, 50, 60]]", "bad_box"),
    "deep brackets": ("[" * 400 + "]" * 400, "bad_box"),
    "trailing comma": ("[10, 20, 50, 60,]", "bad_json"),
    "missing commas": ("[10 20 50 60]", "bad_json"),
    "round brackets": ("(10, 20, 50, 60)", "bad_json"),
    "open bracket": ("[10, 20, 50, 60", "bad_json"),
    "plus sign": ("[+10, 20, 50, 60]", "bad_json"),
    "leading zeros": ("[010, 20, 50, 60]", "bad_json"),
    "hexadecimal": ("[0x0A, 20, 50, 60]", "bad_json"),
    "underscore in a number": ("[1_0, 20, 50, 60]", "bad_json"),
    "full-width digits": ("[１０, 20, 50, 60]", "bad_json"),
    "arithmetic": ("[10, 20, 50, 10**9**9]", "bad_json"),
    "code": ("[exit(), 20, 50, 60]", "bad_json"),
}

TURNS = {  # a whole turn -> Call, Answer or kind
    "thought, then call": (f"<think>look</think>\n{tagged(body())}", GOOD),
    "two calls: the last counts": (tagged(body('"a blue car"')) + tagged(body()), GOOD),
    "three calls, the first two broken": (tagged("?") * 2 + tagged(body()), GOOD),
    "two calls, the last broken": (tagged(body()) + tagged("?"), "bad_json"),
    "a call, then an open one": (tagged(body()) + "<tool_call>{", GOOD),
    "answer": ("<answer> (B) </answer>", Answer("(B)")),
    "answer over lines": ("<answer>\nB\nC\n</answer>", Answer("B\nC")),
    "two answers: the last counts": ("<answer>A</answer><answer>B</answer>", Answer("B")),
    "call and answer": (tagged(body()) + "<answer>B</answer>", Answer("B")),
    "answer and call": ("<answer>B</answer>" + tagged(body()), Answer("B")),
    "answer and broken call": (tagged("?") + "<answer>B</answer>", Answer("B")),
    "call as an answer": (f"<answer>{tagged(body())}</answer>", Answer(tagged(body()))),
    "code as an answer is text": ("<answer>__import__('os')</answer>", Answer("__import__('os')")),
    "lone surrogate outside the tags": ("\ud800<answer>B</answer>\udfff", Answer("B")),
    "empty answer": ("<answer></answer>", "empty_answer"),
    "blank answer": ("<answer> \n\t\u3000</answer>", "empty_answer"),
    "an answer, then an empty one": ("<answer>B</answer><answer></answer>", "empty_answer"),
    "call in a thought": (f"<think>{tagged(body())}</think>", "no_action"),
    "answer in a thought": ("<think><answer>A</answer></think>hm", "no_action"),
    "answer in a thought, then call": (f"<think><answer>A</answer></think>{tagged(body())}", GOOD),
    "thought without its opening tag": (f"<answer>A</answer></think>{tagged(body())}", GOOD),
    "thought without its closing tag": (f"<think>look{tagged(body())}", GOOD),
    "nothing": ("", "no_action"),
    "white space": (" \n\t\0", "no_action"),
    "prose": ("The answer is B.", "no_action"),
    "bare JSON": (body(), "no_action"),
    "JSON in a Markdown block": (f"```json\n{body()}\n```", "no_action"),
    "only closing tags": ("</tool_call></answer>", "no_action"),
    "tags in capitals": (f"<TOOL_CALL>{body()}</TOOL_CALL>", "no_action"),
    "tags with a space": (f"<tool_call >{body()}</tool_call >", "no_action"),
    "full-width tags": (f"＜tool_call＞{body()}＜/tool_call＞", "no_action"),
    "closing tag first": (f"</tool_call>{body()}<tool_call>", "unterminated_tool_call"),
    "open call": (f"<tool_call>{body()}", "unterminated_tool_call"),
    "half a closing tag": (f"<tool_call>{body()}</tool_cal", "unterminated_tool_call"),
    "open answer": ("<answer>B", "unterminated_answer"),
    "both open": ("<answer><tool_call>", "unterminated_tool_call"),
    "endless answer": ("<answer>" + "." * 10_000 + "</answer>", Answer("." * MAX_ANSWER_CHARS)),
    "closing tag beyond the limit": ("<answer>" + "B" * MAX_TURN_CHARS + "</answer>",
                                     "unterminated_answer"),
    "a million characters": ("B" * 1_000_000, "no_action"),
    "nested tags": (f"<tool_call>{tagged(body())}</tool_call>", "bad_json"),
    "closed by the wrong tag": (f"<tool_call>{body()}</answer></tool_call>", "bad_json"),
}

CALLS = {  # what stands between the tags of a call -> Call or kind
    "call": (body(), GOOD),
    "white space in the tags": (f"\n\t {body()} \n", GOOD),
    "the box first": (f'{{"arguments": {{"bbox_2d": {GOOD_BOX}, "label": {GOOD_LABEL}}}, '
                      f'"name": "{ZOOM}"}}', GOOD),
    "answer within a call": ("<answer>B</answer>", Answer("B")),
    "empty call": ("", "bad_json"),
    "call of white space": (" \n ", "bad_json"),
    "too long a call": (body() + " " * MAX_CALL_CHARS, "too_long"),
    "too long by its label": (body(json.dumps("w" * MAX_CALL_CHARS)), "too_long"),
    "two objects": (body() + body(), "bad_json"),
    "two objects, one a line": (body() + "\n" + body(), "bad_json"),
    "single quotes": (body().replace('"', "'"), "bad_json"),
    "typographic quotes": (body().replace('"', "\u201d"), "bad_json"),
    "trailing comma": (body()[:-1] + ",}", "bad_json"),
    "comment": (body() + " // zoom", "bad_json"),
    "block comment": ("/* zoom */" + body(), "bad_json"),
    "missing brace": (body()[:-1], "bad_json"),
    "one brace too many": (body() + "}", "bad_json"),
    "byte-order mark": ("\ufeff" + body(), "bad_json"),
    "null byte": ("\0" + body(), "bad_json"),
    "lone surrogate": ("\ud800" + body(), "bad_json"),
    "Python": ('__import__("os").system("ls")', "bad_json"),
    "Python call": (f'{ZOOM}(label="the red sign", bbox_2d=[10, 20, 50, 60])', "bad_json"),
    "YAML": (f"name: {ZOOM}", "bad_json"),
    "brackets deeper than the stack": ("[" * 1900, "bad_json"),
    "objects deeper than the stack": ('{"a":' * 390 + "1" + "}" * 390, "too_long"),
    "deep objects": ('{"a":' * 300 + "1" + "}" * 300, "bad_call"),
    "list of calls": (f"[{body()}]", "bad_call"),
    "string": (json.dumps(body()), "bad_call"),
    "number": ("1", "bad_call"),
    "null": ("null", "bad_call"),
    "empty object": ("{}", "bad_call"),
    "NaN": ("NaN", "bad_call"),
    "flat arguments": (f'{{"name": "{ZOOM}", "label": "a sign"}}', "bad_call"),
    "key in capitals": (body().replace('"name"', '"Name"'), "bad_call"),
    "a third key": (body()[:-1] + ', "id": 1}', "bad_call"),
    "no name": (f'{{"arguments": {{"label": {GOOD_LABEL}, "bbox_2d": {GOOD_BOX}}}}}', "bad_call"),
    "other tool": (body(name='"os.system"'), "unknown_tool"),
    "tool in capitals": (body(name=f'"{ZOOM.upper()}"'), "unknown_tool"),
    "tool with a space": (body(name=f'"{ZOOM} "'), "unknown_tool"),
    "tool null": (body(name="null"), "unknown_tool"),
    "tool as a list": (body(name=f'["{ZOOM}"]'), "unknown_tool"),
    "repeated name": (body(name=f'"x", "name": "{ZOOM}"'), "repeated_key"),
    "repeated label": (body(more=', "label": "a car"'), "repeated_key"),
    "repeated label, spelled by escape": (body(more=', "l\\u0061bel": "a car"'), "repeated_key"),
    "extra argument": (body(more=', "path": "/etc/passwd"'), "bad_arguments"),
    "extra argument with a huge name": (body(more=f', "{"k" * 1700}": 1'), "bad_arguments"),
    "dunder argument": (body(more=', "__class__": {}'), "bad_arguments"),
    "arguments as a string": (with_arguments(json.dumps('{"label": "a sign"}')), "bad_arguments"),
    "arguments as a list": (with_arguments(f'["a sign", {GOOD_BOX}]'), "bad_arguments"),
    "arguments null": (with_arguments("null"), "bad_arguments"),
    "no argument": (with_arguments("{}"), "no_label"),
    "no label": (with_arguments(f'{{"bbox_2d": {GOOD_BOX}}}'), "no_label"),
    "no box": (with_arguments(f'{{"label": {GOOD_LABEL}}}'), "bad_box"),
}


def table(rows: dict):
    cases = [pytest.param(*row, id=name) for name, row in rows.items()]
    return pytest.mark.parametrize("given, expected", cases)


@table(LABELS)
def test_label(given, expected):
    """A label is cleaned or refused for the right reason; its meaning is never changed."""
    result = outcome(tagged(body(label=given)))
    assert result in (expected, zoom(expected, GOOD.arguments["bbox_2d"]))


@table(BOXES)
def test_box(given, expected):
    """A box is clamped or refused for the right reason; numbers of any size stay numbers."""
    result = outcome(tagged(body(box=given)))
    assert result in (expected, zoom(GOOD.label, expected))


@table(TURNS)
def test_turn(given, expected):
    """Any turn ends in the Call, the Answer or the error that is named."""
    assert outcome(given) == expected


@table(CALLS)
def test_call(given, expected):
    assert outcome(tagged(given)) == expected


@pytest.mark.parametrize("seen, box, expected", [
    ((1000, 72), [0, 0, 400, 4], (0, 0, 400, 4)), ((1000, 72), [0, 0, 401, 4], "thin_box"),
    ((72, 1000), [10, 0, 14, 400], (10, 0, 14, 400)), ((72, 1000), [10, 0, 14, 401], "thin_box"),
    ((400, 72), [0, 0, 9999, 4], (0, 0, 400, 4)), ((1000, 72), [0, 0, 9999, 4], "thin_box"),
    ((1000, 72), [0, 0, 999, 1], "small_box")])
def test_thin_box(seen, box, expected):
    """Aspect is judged after clamping, in both directions; 100:1 is still allowed."""
    result = outcome(tagged(body(box=json.dumps(box))), seen)
    assert result in (expected, zoom(GOOD.label, expected))


@pytest.mark.parametrize("turn, final", [
    ("", True), ("<answer> </answer>", True), ("<answer>B", False), ("<tool_call>", False),
    (tagged("?"), False), (tagged(body(box="[]")), False)])
def test_final(turn, final):
    """Only a turn that neither tried to call nor gave an answer ends the episode."""
    with pytest.raises(ToolError) as error:
        parse(turn, SEEN)
    assert error.value.final is final


def test_prompt_example_parses():
    """The system prompt teaches a format that the parser accepts, in the units that are asked."""
    example = system_prompt().split("Think first, then either call the function:\n")[1]
    call, answer = example.split("\nor finish with the letter or the text of your answer:\n")
    assert parse(call, (640, 480)) == zoom("the red sign", (10, 40, 90, 120))
    assert parse(answer, (640, 480)) == Answer("42")
    assert "in pixels of the image" in system_prompt("pixels")
    assert "in thousandths of the image" in system_prompt("1000")
    assert "{unit}" not in system_prompt()


def test_a_written_call_is_read_again():
    call = zoom_call('a "quoted" sign', (10, 20.5, 50, 60))
    assert parse(call, SEEN) == zoom('a "quoted" sign', (10, 20.5, 50, 60))


# ---- time (random hostility: test_reliability.py) ------------------------------------------------

LONG = {"answer": "<answer>" * 2500, "tool_call": "<tool_call>" * 1800, "think": "</think>" * 2500,
        "empty calls": "<tool_call></tool_call>" * 800, "bracket": "<" * 20_000,
        "nested": tagged("[" * 1900), "backslash": tagged('"' + "\\" * 1900),
        "long": "x" * 10_000_000}


@pytest.mark.parametrize("turn", LONG.values(), ids=LONG)
def test_time_of_one_turn(turn):
    """A tenth of a second: repeated openings must not make the parser quadratic."""
    start = time.process_time()
    assert isinstance(outcome(turn), str)
    assert time.process_time() - start < .1


# ---- coordinates and pixels ----------------------------------------------------------------------

SMALL = Resolution(24, 48 * 48, 14_000, Image.BOX)      # tiny/'s
LARGE = Resolution(28, 56 * 56, 1280 * 28 * 28)
SIZES = [(768, 768), (768, 384), (333, 777), (1920, 1080), (50, 50), (83, 28), (4000, 40),
         (1, 200), (1, 1), (59, 61), (200_000, 1000)]


def zoomed(image: Image.Image | np.ndarray, box: tuple, seen: tuple, resolution=SMALL) -> tuple:
    """(pixels of the crop, its box in the original)"""
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    crop, cut = run_tool(image, zoom("x", box), seen, resolution)
    return np.asarray(crop), cut


@pytest.mark.parametrize("original", SIZES)
def test_to_original_round_trip(original):
    """Coordinates map to the original and back; the full box to the full image; no axis swaps."""
    seen, box = SMALL.size(*original), (3.5, 7.25, 19.0, 21.75)
    there = to_original(box, seen, original)
    assert to_original(there, original, seen) == pytest.approx(box)
    assert to_original((0, 0, *seen), seen, original) == pytest.approx((0, 0, *original))
    assert there[0] == pytest.approx(3.5 * original[0] / seen[0])
    assert there[3] == pytest.approx(21.75 * original[1] / seen[1])


@pytest.mark.parametrize("original", [(768, 768), (768, 384), (384, 768), (1000, 700)])
def test_zoom_cuts_exactly_the_box(original):
    """A rectangle painted under the box fills the crop, whatever the scale and aspect; one pixel
    more would show."""
    seen, red = SMALL.size(*original), (214, 46, 90)
    box = (seen[0] // 4, seen[1] // 3, seen[0] // 4 + 24, seen[1] // 3 + 15)
    x1, y1, x2, y2 = to_original(box, seen, original)
    rows = slice(int(np.floor(y1 + 1e-6)), int(np.ceil(y2 - 1e-6)))
    columns = slice(int(np.floor(x1 + 1e-6)), int(np.ceil(x2 - 1e-6)))
    pixels = np.zeros((original[1], original[0], 3), np.uint8)
    pixels[rows, columns] = red
    crop, cut = zoomed(pixels, box, seen)
    assert cut == pytest.approx((x1, y1, x2, y2)) and (crop == red).all()
    for side, step in enumerate((-1, -1, 1, 1)):
        wider = list(box)
        wider[side] += step
        assert not (zoomed(pixels, tuple(wider), seen)[0] == red).all()


def test_zoom_in_thousandths():
    """The box [250, 500, 500, 1000] of a 768 x 384 image is its second quarter, lower half."""
    pixels = np.zeros((384, 768, 3), np.uint8)
    pixels[192:, 192:384] = 255
    crop, cut = zoomed(pixels, (250, 500, 500, 1000), (1000, 1000))
    assert cut == (192, 192, 384, 384) and (crop == 255).all()


def test_zoom_pixel_for_pixel():
    """Without any resizing the crop is the original's own pixels, at the edge of the image too."""
    pixels = np.random.default_rng(0).integers(0, 256, (80, 120, 3), dtype=np.uint8)
    free = Resolution(1, 1, 4 * 10**9)
    for box in ((10, 20, 50, 60), (0, 0, 120, 80), (116, 76, 120, 80)):
        crop, _ = zoomed(pixels, box, (120, 80), free)
        assert (crop == pixels[box[1]:box[3], box[0]:box[2]]).all()


@pytest.mark.parametrize("original", SIZES[:10])
def test_zoom_never_empty(original):
    """The smallest boxes that check_box lets through give a crop, even of one original pixel."""
    seen, image = SMALL.size(*original), Image.new("RGB", original, "red")
    corner = (seen[0] - 4, seen[1] - 4, *seen)
    for box in ((0, 0, 4, 4), corner, (7.3, 9.1, 11.3, 13.1), (0, 0, *seen)):
        crop, _ = zoomed(image, check_box(list(box), seen), seen)
        assert crop.size and (crop == (255, 0, 0)).all()


@pytest.mark.parametrize("resolution", [
    SMALL, LARGE, Resolution(28, 3136, 12_845_056), Resolution(28, 3136, 1_003_520),
    Resolution(32, 65_536, 16_777_216)], ids=str)
def test_sizes_are_those_of_smart_resize(resolution):
    """Qwen's own function, of transformers 5.23, for 500 sizes: small, large, long."""
    least, most = resolution.min_pixels, resolution.max_pixels
    random_sizes = (2 ** np.random.default_rng(0).uniform(0, 12, (500, 2))).astype(int).tolist()
    for width, height in [*SIZES, *random_sizes]:
        if max(width, height) <= 200 * min(width, height):
            h, w = smart_resize(height, width, resolution.factor, least, most)
            assert resolution.size(width, height) == (w, h)
            assert w % resolution.factor == h % resolution.factor == 0


def test_sizes_by_hand():
    """28 x 28 patches: 83 x 30 -> nearest 84 x 28, too small for 3,136 pixels, so both times
    sqrt(3136 / 2490) = 1.122 and rounded up: 112 x 56."""
    assert LARGE.size(280, 560) == (280, 560) and LARGE.size(83, 30) == (112, 56)
    assert SMALL.size(768, 768) == (96, 96) and SMALL.size(768, 384) == (144, 72)
    for size in ((201, 1), (1, 5000)):
        with pytest.raises(ValueError, match=f"at most 200:1, found {size[0]} x {size[1]}"):
            LARGE.size(*size)


def test_square_crops_of_tiny_have_one_size():
    """2 x 2 placeholders, whatever the square, and if it is nearly one: no rounding halves them."""
    for side in range(4, 97):
        assert SMALL.crop().size(8 * side, 8 * side) == (48, 48)
        if side >= 8:
            assert SMALL.crop().size(8 * side, 10 * side) == (48, 48)


def test_a_crop_that_is_too_long_is_refused():
    """A box of the right shape in a long image: 390 pixels wide and one high."""
    seen = LARGE.size(390, 2)
    assert seen == (784, 28)                 # a box of 784 x 14 is 56:1 here, and 390:1 there
    image, box = Image.new("RGB", (390, 2)), check_box([0, 0, 784, 14], seen)
    with pytest.raises(ToolError, match="longer than 200:1"):
        run_tool(image, zoom("x", box), seen, LARGE)
    shown, _ = run_tool(image, zoom("x", check_box([0, 0, 784, 28], seen)), seen, LARGE)
    assert shown.size == LARGE.crop().size(390, 2)


def test_crop_costs_a_quarter():
    """A crop's bound is a quarter of the image's, and never below the least the model takes."""
    assert SMALL.crop() == Resolution(24, 48 * 48, 3500, Image.BOX)
    assert Resolution(28, 100, 4000).crop() == Resolution(28, 100, 1000)
    assert Resolution(28, 3000, 4000).crop() == Resolution(28, 3000, 3000)


def test_fit():
    """`fit` gives the size that `size` names, by the filter that is named; BOX is the average."""
    pixels = np.random.default_rng(0).integers(0, 32, (192, 192, 3)).astype(np.uint8) * 8
    pixels = pixels.repeat(4, 0).repeat(4, 1)
    reduced = np.asarray(fit(Image.fromarray(pixels), SMALL)).astype(float)
    exact = pixels.reshape(96, 8, 96, 8, 3).mean((1, 3))
    assert reduced.shape == (96, 96, 3) and abs(reduced - exact).max() <= 1
    picture = Image.fromarray(pixels)
    smooth = fit(picture, Resolution(24, 48 * 48, 14_000))
    assert smooth.tobytes() == picture.resize((96, 96), Image.BICUBIC).tobytes()
    assert fit(Image.new("RGB", (20, 20)), SMALL).size == SMALL.size(20, 20) == (48, 48)


# ---- a second tool -------------------------------------------------------------------------------

ROTATE, MIRROR = "image_rotate_tool", "image_mirror_tool"


def check_angle(arguments: dict, space: tuple) -> dict:
    if arguments.get("angle") not in (90, 180, 270):
        raise ToolError("bad_angle", "angle must be 90, 180 or 270.")
    return {"angle": arguments["angle"]}


def rotate(image: Image.Image, arguments: dict, space: tuple) -> tuple:
    return image.rotate(arguments["angle"], expand=True), (0., 0., *map(float, image.size))


def mirror(image: Image.Image, arguments: dict, space: tuple) -> tuple:
    crop, box = tools.zoom(image, arguments, space)
    return crop.transpose(Image.FLIP_LEFT_RIGHT), box


def add_tools(monkeypatch) -> None:
    """Two more tools: one with an argument of its own, one with the arguments of the zoom tool."""
    angle = {"angle": {"type": "integer", "description": "degrees, to the left"}}
    monkeypatch.setitem(tools.TOOLS, ROTATE, Tool("Turn it.", angle, check_angle, rotate))
    mirrored = dataclasses.replace(tools.TOOLS[ZOOM], description="Mirror it.", run=mirror)
    monkeypatch.setitem(tools.TOOLS, MIRROR, mirrored)


def rotate_call(angle: object, label: str = "the red sign") -> str:
    arguments = {"label": label, "angle": angle}
    return tagged(json.dumps({"name": ROTATE, "arguments": arguments}))


def test_a_second_tool_is_read(monkeypatch):
    """Its own arguments are checked by its own function; the label is mandatory as for the zoom."""
    assert outcome(rotate_call(90)) == "unknown_tool"
    add_tools(monkeypatch)
    call = outcome(rotate_call(90))
    assert call == Call(ROTATE, "the red sign", {"angle": 90})
    assert outcome(rotate_call(45)) == "bad_angle"
    assert outcome(rotate_call(90, label="the object")) == "vague_label"
    assert outcome(rotate_call(90).replace("angle", "bbox_2d")) == "bad_arguments"
    assert outcome(tagged(body(name=f'"{ROTATE}"'))) == "bad_arguments"
    assert outcome(tagged(body(name=f'"{MIRROR}"'))) == dataclasses.replace(GOOD, tool=MIRROR)
    assert outcome(tagged(body())) == GOOD
    with pytest.raises(ToolError, match=f"expected {ZOOM} or {ROTATE} or {MIRROR}"):
        parse(tagged(body(name='"other"')), SEEN)


def test_a_second_tool_is_carried_out(monkeypatch):
    """The left half is red: after a quarter turn to the left, the lower half."""
    add_tools(monkeypatch)
    image = Image.new("RGB", (400, 200))
    image.paste("red", (0, 0, 200, 200))
    shown, box = run_tool(image, parse(rotate_call(90), SEEN), SEEN, SMALL)
    assert shown.size == SMALL.crop().size(200, 400) and box == (0, 0, 400, 200)
    assert shown.getpixel((0, 0)) == (0, 0, 0)
    assert shown.getpixel((shown.width - 1, shown.height - 1)) == (255, 0, 0)


def test_a_second_tool_is_announced(monkeypatch):
    add_tools(monkeypatch)
    prompt = system_prompt()
    signatures = prompt.split("<tools>\n")[1].split("\n</tools>")[0].splitlines()
    found = [json.loads(line)["function"] for line in signatures]
    assert [tool["name"] for tool in found] == [ZOOM, ROTATE, MIRROR]
    arguments = [tool["parameters"]["required"] for tool in found]
    assert arguments == [["label", "bbox_2d"], ["label", "angle"], ["label", "bbox_2d"]]
    for tool in found:
        assert list(tool["parameters"]["properties"]) == tool["parameters"]["required"]


def test_the_demonstration(capsys):
    tools.demonstrate()
    said = capsys.readouterr().out
    for kind in ("vague_label", "inverted_box", "unterminated_tool_call", "bad_json", "Answer("):
        assert f"-> {kind}" in said
    assert "-> (480.0, 160.0, 608.0, 256.0) of the original" in said
