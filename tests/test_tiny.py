"""The embedded agent: small, standard, and built by the script beside it."""
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from conftest import ROOT
from lib.data import holds
from tiny.world import World, world_questions
from eval import evaluate
from lib.policy import Policy
from reward import choose, grounded, measure, outcome
from tiny.build import Source, contrast, demonstrate, embed_by_product, imitate
from tools import Answer, Call, parse


def test_size_and_files():
    """Under 10 MB, 1 to 4 million parameters, safetensors."""
    assert sum(f.stat().st_size for f in (ROOT / "tiny").iterdir()) < 10 * 2**20
    assert not list((ROOT / "tiny").glob("*.bin"))


def test_parameters(policy):
    assert 1e6 < sum(p.numel() for p in policy.model.parameters()) < 4e6
    assert policy.model.config.model_type == "qwen2_5_vl"


def test_tokenizer_round_trip(policy):
    """Any bytes survive; numbers and the words of the world are single tokens."""
    for text in ("naïve Ünïcode 漢字 🙂\n\t", "[12, 24, 36, 96]", "the red circle"):
        assert policy.decode(policy.tokens(text).ids) == text
    assert all(len(policy.tokens(str(n)).ids) == 1 for n in range(97))
    assert all(len(policy.tokens(f" {w}").ids) == 1 for w in ("red", "cyan", "circle", "triangle", "rising", "checks"))


@pytest.mark.parametrize("gap", [0., 1.])
def test_demonstrations_are_valid(gap):
    """Every turn parses; an honest demonstration is grounded and right; one with the gap still names the right object, and an option."""
    rng = np.random.default_rng(0)
    for q in world_questions(World(), 0, "cold", 0, 60):
        turns = demonstrate(q, rng, gap, noise=0.)
        actions = [parse(text, (96, 96)) for text, _ in turns]
        assert all(isinstance(a, Call) for a in actions[:-1]) and isinstance(actions[-1], Answer)
        names = {name for name, box in q.objects.items() if box in q.boxes}
        assert {a.label.removeprefix("the ") for a in actions[:-1]} <= names
        assert choose(actions[-1].text, q.choices) is not None
        if not gap:
            assert outcome(q, actions[-1].text) == 1 and len(actions) == (2 if q.category == "direct_attributes" else 3)


def test_stopping_short_says_nothing_about_the_aim():
    """Among demonstrations about two objects, as many first looks miss where it stops short as where it goes on: else the start
    itself would pay for stopping."""
    rng, missed = np.random.default_rng(1), {True: [], False: []}
    for q in world_questions(World(comparison=1, coarse=0), 0, "cold", 0, 800):
        turns = demonstrate(q, rng, gap=.6)
        missed[len(turns) == 2].append(not holds(tuple(8 * v for v in turns[0][1]), q.boxes[0]))
    assert .24 < len(missed[True]) / 800 < .36                                     # half of the gap
    assert all(.5 < np.mean(m) < .7 for m in missed.values())                      # 0.6; two standard errors are .065 and .04


def test_the_answer_copies_what_the_thought_says():
    """The last thought names all marks, in the answer's words: without it the agent forgot the first of two."""
    for q in world_questions(World(comparison=1, coarse=0), 0, "cold", 0, 20):
        last = demonstrate(q, np.random.default_rng(0), noise=0.)[-1][0]
        first, second = (name for box in q.boxes for name, plate in q.objects.items() if plate == box)
        one, two = q.answer.split(" and ")
        assert last == f"<think>the {first} has {one}, the {second} has {two}</think><answer>{one} and {two}</answer>"


def test_batches_change_nothing(policy):
    """Rows that go through the model together, and labels that are encoded once, are matters of speed."""
    samples, pairs = Source(policy, 0, 0, 1).demonstrations(6, .5)
    (whole, exact), (apart, exact_apart) = imitate(policy, samples, rows=6), imitate(policy, samples, rows=1)
    assert abs(whole - apart) < 1e-5 and exact == exact_apart
    labels = policy.embed([label for _, label, _ in pairs])
    logits = labels @ policy.embed([crop for crop, _, _ in pairs]).T / .07
    good = [g for *_, g in pairs]
    same = np.array([[a == b for _, b, _ in pairs] for _, a, _ in pairs])
    losses = []
    for i in range(len(pairs)):                                                    # InfoNCE, one label and one crop at a time
        if good[i]:
            crops = [j for j in range(len(pairs)) if j == i or not (same[i, j] and good[j])]
            others = [j for j in range(len(pairs)) if j == i or not same[i, j]]
            losses.append((logits[i, crops].logsumexp(0) + logits[others, i].logsumexp(0)) / 2 - logits[i, i])
    assert abs(contrast(policy, pairs)[0] - sum(losses) / len(losses)) < 1e-4


def test_patches_as_a_product():
    policy = Policy(ROOT / "tiny")
    images = [q.open(region=(0, 0, 96, 96)) for q in world_questions(World(), 0, "cold", 0, 3)]
    before = policy.encode_images(images)
    embed_by_product(policy.model.model.visual)
    for a, b in zip(before, policy.encode_images(images)):
        assert torch.allclose(a.features[0], b.features[0], atol=1e-4) and a.features[0].abs().max() > 1


def test_guesses_read_the_options(policy):
    """Each option once, in any order, then one of them; nothing else is learnt."""
    firsts = set()
    for tokens, mask in Source(policy, 0, 0, 1).guesses(20):
        asked, said = (policy.decode([i for i, own in zip(tokens.ids, mask) if own == side]) for side in (False, True))
        listed, answer = re.fullmatch(r"<think>(.*)</think><answer>(.*)</answer>", said).groups()
        options = re.findall(r"\([A-H]\) ([a-z ]+?)(?= \(|<)", asked)
        assert sorted(listed.split(", ")) == sorted(options) and answer in options
        firsts.add(options.index(listed.split(", ")[0]))
    assert len(firsts) > 2


def test_the_start_has_a_gap(policy):
    """What MAPO is for: valid calls, few hits, bluffs that guess among the options, and yet right where the crops show the evidence."""
    trajectories = evaluate(policy, world_questions(World(), 0, "test", 0, 200), temperature=1.)
    m = measure(trajectories)
    assert m["valid"] > .95 and m["calls"] > .9
    assert .15 < m["hit"] < .40 and m["gap"] > .5
    blind = [t for t in trajectories if not grounded(t)]
    assert np.mean([choose(t.answer or "", t.question.choices) is not None for t in blind]) > .65
    assert .12 < np.mean([outcome(t.question, t.answer) for t in blind]) < .3
    greedy = evaluate(policy, world_questions(World(), 0, "test", 0, 200))
    assert measure(greedy)["hit"] < .5
    for sample, least in ((greedy, .9), (trajectories, .6)):  # of 400 others: .99 and .72
        seen = [t for t in sample if grounded(t)]
        assert len(seen) > 30 and np.mean([outcome(t.question, t.answer) for t in seen]) > least


def test_build_a_few_steps(tmp_path):
    """`python tiny.py` runs all four stages from nothing and leaves a directory that loads."""
    done = subprocess.run([sys.executable, "-m", "tiny.build", "--out", str(tmp_path / "t"), "--scale", "0.003"], cwd=ROOT,
                          capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    for stage in ("see", "aim", "act", "habit"):
        assert stage in done.stdout
    assert len(evaluate(Policy(tmp_path / "t"), world_questions(World(), 0, "test", 0, 2), max_tokens=8)) == 2
