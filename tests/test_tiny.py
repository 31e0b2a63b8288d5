"""The embedded agent: small, standard, with a gap to close, and built by the script beside it."""
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from conftest import ROOT
from eval import evaluate
from lib.policy import Policy
from lib.question import choose, holds
from reward import hit, measure, outcome
from tiny.world import COLOURS, MARKS, SHAPES, World, world_questions
from tools import Answer, Call, fit, parse

sys.path.insert(0, str(ROOT / "docs"))
from build import (SIDE, Source, around, build_tokenizer, clip_loss, demonstration, draw_overview,
                   imitate, in_original, see_batch, tokenizer_corpus)


# ---- the committed agent -------------------------------------------------------------------------

def test_size_and_files(policy):
    """A standard directory under 10 MB, with safetensors; 1 to 4 million parameters."""
    assert sum(file.stat().st_size for file in (ROOT / "tiny").iterdir() if file.is_file()) < 10e6
    assert (ROOT / "tiny/model.safetensors").is_file() and not list((ROOT / "tiny").glob("*.bin"))
    assert 1e6 < sum(p.numel() for p in policy.model.parameters()) < 4e6
    assert policy.model.config.model_type == "qwen2_5_vl"


def test_tokenizer_round_trip(policy):
    """Any text survives. Numbers, and the words of the world, are one token each."""
    for text in ("naïve Ünïcode 漢字 🙂\n\t", "[12, 24, 36, 96]", "the red circle"):
        assert policy.decode(policy.tokens(text).ids) == text
    numbers = [str(n) for n in range(SIDE + 1)]
    words = [f" {word}" for word in (*COLOURS, *SHAPES, *MARKS)]
    assert all(len(policy.tokens(text).ids) == 1 for text in numbers + words)


def test_the_tokenizer_is_the_one_that_is_built():
    """From nothing but the world's questions and demonstrations."""
    built = build_tokenizer(tokenizer_corpus(seed=0)).backend_tokenizer.to_str()
    assert json.loads(built) == json.loads((ROOT / "tiny/tokenizer.json").read_text())


def test_the_fast_overview(policy):
    """Within one grey level of the scene, reduced."""
    for question in world_questions(World(coarse=.5, comparison=0), 0, "cold", 0, 6):
        fast = np.asarray(draw_overview(*question.open.args)).astype(int)
        assert abs(fast - np.asarray(fit(question.open(), policy.resolution))).max() <= 1


@pytest.fixture(scope="module")
def start(policy) -> dict:
    """What the agent does on 200 held-out questions, sampled and greedy."""
    questions = world_questions(World(), 0, "test", 0, 200)
    return {"sampled": evaluate(policy, questions, temperature=1.),
            "greedy": evaluate(policy, questions)}


def test_the_start_looks_badly(start):
    """What MAPO is for: valid calls, few hits, crops that do not hold what the label names."""
    m = measure(start["sampled"])
    assert m["valid"] > .95 and m["calls"] > .9
    assert .15 < m["hit"] < .40 and m["gap"] > .5
    assert measure(start["greedy"])["hit"] < .5


def test_the_start_guesses_what_it_has_not_seen(start):
    """Without a hit an answer names an option, and is right about as often as luck, one in four."""
    blind = [t for t in start["sampled"] if not hit(t)]
    named = [choose(t.answer or "", t.question.choices) is not None for t in blind]
    right = [outcome(t.question, t.answer) for t in blind]
    assert np.mean(named) > .65 and .12 < np.mean(right) < .3


@pytest.mark.parametrize("kind, least", [("greedy", .9), ("sampled", .6)])
def test_the_start_reads_what_it_sees(start, kind, least):
    """With a hit it is right: it could look well. (Of 400 other questions: .99 and .72.)"""
    seen = [t for t in start[kind] if hit(t)]
    assert len(seen) > 30
    assert np.mean([outcome(t.question, t.answer) for t in seen]) > least


# ---- the demonstrator ----------------------------------------------------------------------------

@pytest.mark.parametrize("miss", [0., 1.])
def test_demonstrations_are_valid(miss):
    """Every turn parses, names an object of the question, and at last an option. An honest
    demonstration looks at what it names, as often as it must, and is right."""
    rng = np.random.default_rng(0)
    for question in world_questions(World(), 0, "cold", 0, 60):
        turns = demonstration(question, rng, miss, noise=0.)
        *calls, answer = [parse(text, (SIDE, SIDE)) for text, _ in turns]
        assert all(isinstance(call, Call) for call in calls) and isinstance(answer, Answer)
        assert choose(answer.text, question.choices) is not None
        for call, (_, box) in zip(calls, turns):
            plate = question.objects[call.label.removeprefix("the ")]
            assert plate in question.boxes and call.arguments["bbox_2d"] == box
            assert holds(in_original(box), plate) == (not miss)
        if not miss:
            assert outcome(question, answer.text) == 1
            assert len(calls) == (1 if question.category == "direct_attributes" else 2)


def test_around_by_hand():
    """At the object; one cell to the right of it, from the last cell back to the first; never
    outside of the overview; with noise, off by 0, 2 or 4 pixels each way."""
    rng = np.random.default_rng(0)
    centre, corner = (352, 352, 416, 416), (704, 0, 768, 64)   # (48, 48) and (92, 4) seen
    assert around(centre, 16, rng) == (40, 40, 56, 56)
    assert around(centre, 16, rng, beside=True) == (64, 40, 80, 56)
    assert around(corner, 16, rng) == (80, 0, 96, 16)
    assert around(corner, 16, rng, beside=True) == (12, 0, 28, 16)
    noisy = {around(centre, 16, rng, noise=1.) for _ in range(500)}
    offsets = {(x1 - 40, y1 - 40) for x1, y1, _, _ in noisy}
    assert offsets == {(x, y) for x in range(-4, 5, 2) for y in range(-4, 5, 2)}


def test_stopping_short_says_nothing_about_the_aim():
    """Of two objects the second is left out as often after a true first look as after a false one.
    Else the start itself would pay for stopping. (0.6; two standard errors are .065 and .04.)"""
    rng, missed = np.random.default_rng(1), {True: [], False: []}
    for question in world_questions(World(comparison=1, coarse=0), 0, "cold", 0, 800):
        turns = demonstration(question, rng, miss=.6)
        short = len(turns) == 2
        missed[short].append(not holds(in_original(turns[0][1]), question.boxes[0]))
    assert .24 < len(missed[True]) / 800 < .36                 # half of the miss
    assert all(.5 < np.mean(misses) < .7 for misses in missed.values())


def test_the_answer_copies_what_the_thought_says():
    """The last thought names all marks, in the answer's words: without it the agent forgot the
    first of two."""
    rng = np.random.default_rng(0)
    for question in world_questions(World(comparison=1, coarse=0), 0, "cold", 0, 20):
        last = demonstration(question, rng, noise=0.)[-1][0]
        names = {plate: name for name, plate in question.objects.items()}
        first, second = (names[box] for box in question.boxes)
        one, two = question.answer.split(" and ")
        assert last == (f"<think>the {first} has {one}, the {second} has {two}</think>"
                        f"<answer>{one} and {two}</answer>")


# ---- what is learnt ------------------------------------------------------------------------------

def learnt(policy: Policy, tokens, mask: list[bool]) -> tuple[str, str]:
    """The text that is given, and the text that is learnt."""
    return tuple(policy.decode([i for i, own in zip(tokens.ids, mask) if own == side])
                 for side in (False, True))


def test_only_the_demonstrator_is_learnt(policy):
    """Its turns, from <think> to the end of the call or answer; prompt and crops are given."""
    for tokens, mask in Source(policy, 3).demonstrations(4, .6)[0]:
        given, said = learnt(policy, tokens, mask)
        turn = r"<think>[^<]*</think>(<tool_call>[^<]*</tool_call>|<answer>[^<]*</answer>)"
        assert re.fullmatch(f"({turn})+", said)
        assert "<think>" not in given
        assert given.count("<tool_response>") == said.count("<tool_call>")
        assert given.count("<|image_pad|>") == sum(h * w for h, w in tokens.grids)


def test_only_boxes_are_learnt_of_a_list(policy):
    """Every object once, each followed by its box."""
    for tokens, mask in Source(policy, 3).listings(3):
        given, said = learnt(policy, tokens, mask)
        names = re.findall(r"the (\w+ \w+)", given.split("assistant\n")[1])
        numbers = re.findall(r"\d+", policy.decode(tokens.ids).split("assistant\n")[1])
        assert len(set(names)) == len(names) and 4 <= len(names) <= 8
        assert len(numbers) == 4 * len(names) and "the" not in said


def test_guesses_read_the_options(policy):
    """Each option once, in any order, then one of them; nothing else is learnt."""
    firsts = set()
    for tokens, mask in Source(policy, 0).guesses(20):
        asked, said = learnt(policy, tokens, mask)
        listed, answer = re.fullmatch(r"<think>(.*)</think><answer>(.*)</answer>", said).groups()
        options = re.findall(r"\([A-H]\) ([a-z ]+?)(?= \(|<)", asked)
        assert sorted(listed.split(", ")) == sorted(options) and answer in options
        firsts.add(options.index(listed.split(", ")[0]))
    assert len(firsts) > 2


def test_what_the_eye_is_taught(policy):
    """A cell's classes are those of the object in it: the list of a scene's objects comes back."""
    overviews, cells, crops, goals = see_batch(Source(policy, 5), 4)
    source = Source(policy, 5)
    assert cells.shape == (4 * 16, 4) and goals.shape == (4 * 2, 3)
    assert len(overviews) == 4 and len(crops) == 8
    question = source.question()                             # the first scene of the same stream
    found = {}
    for place, (colour, shape, x, y) in enumerate(cells[:16].tolist()):
        if x < 0:
            assert (colour, shape, y) == (len(COLOURS), len(SHAPES), -1)
            continue
        found[f"{list(COLOURS)[colour]} {SHAPES[shape]}"] = (2 * x, 2 * y)
        assert place == 2 * y // 24 * 4 + 2 * x // 24
    centres = {name: ((x1 + x2) // 16, (y1 + y2) // 16)
               for name, (x1, y1, x2, y2) in question.objects.items()}
    assert found == centres
    assert ((goals[:, 2] >= -1) & (goals[:, 2] < len(MARKS))).all() and (goals[:, 2] >= 0).any()


def test_imitation_ignores_padding(policy):
    """The mean over all tokens that are learnt, whether conversations go together or alone."""
    samples, _ = Source(policy, 0).demonstrations(6, .5)
    whole, exact = imitate(policy, samples)
    counts, losses, exacts = [], [], []
    for sample in samples:
        loss, share = imitate(policy, [sample])
        counts.append(sum(sample[1]))
        losses.append(loss.item())
        exacts.append(share)
    assert whole.item() == pytest.approx(np.average(losses, weights=counts), abs=1e-5)
    assert exact == pytest.approx(np.average(exacts, weights=counts), abs=1e-6)


def test_info_nce_one_pair_at_a_time(policy):
    """Each good pair's label seeks its crop among the others, and the crop its label. Left out is
    what would be as right: another good crop of the same label, and the same label once more."""
    _, pairs = Source(policy, 0).demonstrations(6, .5)
    pairs.append((pairs[0][0], pairs[2][1], True))           # one label twice, both crops good
    labels = policy.embed([label for _, label, _ in pairs])
    crops = policy.embed([crop for crop, _, _ in pairs])
    logits = labels @ crops.T / .07
    losses, found = [], []
    for i, (_, label, good) in enumerate(pairs):
        if good:
            alike = [j for j, pair in enumerate(pairs) if j != i and pair[1] == label]
            as_right = [j for j in alike if pairs[j][2]]
            to_crop = [j for j in range(len(pairs)) if j not in as_right]
            to_label = [j for j in range(len(pairs)) if j not in alike]
            losses.append(logits[i, to_crop].logsumexp(0) - logits[i, i])
            losses.append(logits[to_label, i].logsumexp(0) - logits[i, i])
            found.append((logits[i, to_crop] <= logits[i, i]).all().item())
    assert any(not good for _, _, good in pairs) and len(losses) >= 12
    nce, match = clip_loss(policy, pairs)
    assert nce.item() == pytest.approx(torch.stack(losses).mean().item(), abs=1e-4)
    assert match == pytest.approx(np.mean(found))


# ---- the build -----------------------------------------------------------------------------------

def test_build_a_few_steps(tmp_path):
    """`python docs/build.py` runs all four stages from nothing, in two processes, and leaves a
    directory that loads. Each stage moved what it trains, and nothing else."""
    command = [sys.executable, "docs/build.py", "--out", str(tmp_path / "t"), "--scale", "0.001"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    before = Policy(tmp_path / "t-empty").model.state_dict()
    for stage in ("see", "aim", "act", "habit"):
        assert f"\n{stage}\n" in done.stdout
        folder = "t" if stage == "habit" else f"t-{stage}"
        after = Policy(tmp_path / folder).model.state_dict()
        moved = {"visual" in name for name in after if not torch.equal(before[name], after[name])}
        assert moved == {stage == "see"}
        before = after
    questions = world_questions(World(), 0, "test", 0, 2)
    assert len(evaluate(Policy(tmp_path / "t"), questions, max_tokens=8)) == 2
