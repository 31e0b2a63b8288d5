"""docs/engines/trl_mapo.py: MAPO by TRL's means is MAPO. What needs TRL is skipped without it."""
import importlib
import math
import sys

import pytest
import torch

import mapo
from conftest import ROOT
from lib.policy import Policy, Tokens
from reward import Scorer, rewards, score_looks
from rollout import Trajectory, act, write
from tiny.world import World, world_question
from tools import fit, zoom_call


# ---- two reward functions and their weights are eq. 2 and 3 --------------------------------------

def trl_advantages(r, S, beta: float, group: int, eps=1e-4):
    """What GRPOTrainer (1.16) does with reward_weights (1 - beta, beta) and its other defaults."""
    columns = torch.stack([r, S], 1)                                          # (N, 2)
    R = (columns * torch.tensor([1 - beta, beta])).nansum(1)                  # (N,)
    mean = R.view(-1, group).nanmean(1).repeat_interleave(group)
    std = R.view(-1, group).std(1).repeat_interleave(group)                   # divides by G - 1
    return (R - mean) / (std + eps)


def test_by_hand():
    """R = .8, .4: the mean is .6, TRL's deviation .2 sqrt 2, ours .2."""
    r, s, looked = torch.tensor([1., 0.]), torch.tensor([[.5], [1.]]), torch.ones(2, 1).bool()
    ours = mapo.advantages(r, s, looked, 2, .4)
    assert torch.allclose(ours, torch.tensor([1., -1.]), atol=1e-4)
    theirs = trl_advantages(r, s[:, 0], .4, 2)
    assert torch.allclose(theirs, torch.tensor([1., -1.]) / math.sqrt(2), atol=1e-3)


@pytest.mark.parametrize("beta", [0., .4, 1.])
@pytest.mark.parametrize("group", [2, 4, 8])
def test_whole_trajectories_differ_by_a_constant(beta, group):
    """sqrt((G - 1) / G). TRL adds 1e-4 to the deviation, not 1e-6, which only tiny ones notice."""
    g = torch.Generator().manual_seed(0)
    r = torch.randint(0, 2, (24,), generator=g).float()
    s, looked = torch.rand(24, 3, generator=g), torch.rand(24, 3, generator=g) < .7
    theirs = trl_advantages(r, mapo.trajectory_score(s, looked, .95), beta, group, eps=1e-6)
    ours = mapo.advantages(r, s, looked, group, beta)
    assert torch.allclose(theirs, math.sqrt((group - 1) / group) * ours, rtol=1e-3, atol=1e-6)


def test_equal_returns_teach_nothing_there_either():
    r, S = torch.full((8,), 1 / 3), torch.full((8,), .1)
    assert trl_advantages(r, S, .4, 8).abs().max() < 1e-3


# ---- docs/engines/trl_mapo.py --------------------------------------------------------------------

@pytest.fixture(scope="module")
def engine():
    """Only its trainer needs TRL."""
    sys.path.insert(0, str(ROOT / "docs/engines"))
    return importlib.import_module("trl_mapo")


@pytest.fixture(scope="module")
def agent(engine):
    """A policy of its own, and TRL's reader of its texts: the latter changes where turns end."""
    policy = Policy(ROOT / "tiny")
    return policy, engine.make_processor(policy, ROOT / "tiny")


GOOD, OTHER = (60, 20, 76, 36), (8, 8, 40, 40)
# the boxes of a rollout's looks, and what it says at last; {} is the right answer
ROLLOUTS = [([GOOD], "<answer>{}</answer>"), ([GOOD, OTHER], "<answer>{}</answer>"),
            ([OTHER, GOOD], "<answer>nothing</answer>"), ([], "<answer>{}</answer>"),
            ([(50, 50, 10, 90), GOOD], "<answer>{}"), ([(50, 50, 10, 90)], zoom_call("it", GOOD))]


def question_named():
    question = world_question(World(), 0, "train", 0)
    return question, f"the {next(iter(question.objects))}"


def ours(policy, boxes, last) -> Trajectory:
    """The same rollout by rollout.py."""
    question, label = question_named()
    seen = fit(question.open(), policy.resolution).size
    trajectory = Trajectory(question, Tokens([]), Tokens([]), [], [], seen, seen)
    texts = [zoom_call(label, box) for box in boxes] + [last.replace("{}", question.answer)]
    for text in texts:
        ids = policy.tokens(text).ids
        turn = write(policy, trajectory, ids, [0.] * len(ids))
        act(policy, trajectory, turn, None, last=text is texts[-1])
        if turn.call:
            turn.crop_tokens = policy.encode_images([turn.crop])[0]
    return trajectory


def theirs(engine, policy, boxes):
    """An environment in which the tool was called by TRL."""
    _, label = question_named()
    environment = engine.Environment(policy.resolution)
    environment.reset(index=0, prompt=[])
    for box in boxes:
        environment.image_zoom_in_tool(label=label, bbox_2d=list(box))
    return environment


def test_the_reward_functions_give_our_r_and_S(engine, agent):
    policy, processor = agent
    scorer = Scorer(policy)
    environments, ids, trajectories = [], [], []
    for boxes, last in ROLLOUTS:
        environments.append(theirs(engine, policy, boxes))
        trajectories.append(ours(policy, boxes, last))
        said = last.replace("{}", question_named()[0].answer)
        text = f"a call<|im_end|>\n<|im_start|>assistant\n{said}" if boxes else said
        ids.append(policy.tokens(text).ids)
    outcomes, scores = engine.make_rewards(processor.tokenizer, scorer, lam=.5)
    arguments = dict(environments=environments, completion_ids=ids, trainer_state=None)
    found = outcomes(**arguments), scores(**arguments)

    score_looks(trajectories, scorer)
    r, s, looked = rewards(trajectories)
    assert found[0] == r.tolist() == [1., 1., 0., 1., 0., 0.]
    assert looked.sum(1).tolist() == [1, 2, 2, 0, 1, 0]
    assert torch.allclose(torch.tensor(found[1]), mapo.trajectory_score(s, looked, .5), atol=1e-5)
    # by hand: the later of two looks weighs twice as much as the first with lam 1/2
    first, later = s[1, :2].tolist()
    assert found[1][1] == pytest.approx((first + 2 * later) / 3, abs=1e-5)
    assert found[1][3] == found[1][5] == 0


def test_a_rollout_starts_empty(engine, agent):
    """TRL uses environments again in the next step."""
    environment = theirs(engine, agent[0], [GOOD])
    assert len(environment.trajectory.looks) == 1
    environment.reset(index=1)
    assert environment.trajectory.turns == [] and environment.trajectory.answer is None
    assert environment.trajectory.question.id == world_question(World(), 0, "train", 1).id


@pytest.mark.parametrize("bad", [dict(label=""), dict(label="the object"), dict(label=3),
                                 dict(label="<answer>A</answer>"), dict(bbox_2d="abcd"),
                                 dict(bbox_2d=None), dict(bbox_2d=[0, 0, math.inf, 9]),
                                 dict(bbox_2d=[1, 2, 3]), dict(bbox_2d=[90, 9, 10, 20])], ids=str)
def test_a_bad_call_is_told_to_the_agent(engine, agent, bad):
    environment = theirs(engine, agent[0], [])
    good = dict(label=question_named()[1], bbox_2d=list(GOOD))
    shown = environment.image_zoom_in_tool(**good | bad)
    assert [part["type"] for part in shown] == ["text"] and shown[0]["text"].startswith("Error: ")
    assert environment.trajectory.looks == [] and environment.trajectory.turns[0].error


def test_the_chat_template_writes_our_tokens(engine, agent):
    """Prompt, call, crop: the ids that lib/policy.py writes."""
    policy, processor = agent
    environment = theirs(engine, policy, [])
    call = dict(label=question_named()[1], bbox_2d=list(GOOD))
    overview, question = environment.reset(index=0)
    opening = [{"role": "user", "content": [overview, question]}]
    crop = environment.image_zoom_in_tool(**call)
    whole = opening + [
        {"role": "assistant", "content": "", "tool_calls": [
            {"type": "function", "function": {"name": "image_zoom_in_tool", "arguments": call}}]},
        {"role": "tool", "content": crop}]
    image, small = policy.encode_images([overview["image"], crop[0]["image"]])
    prompt = policy.prompt(image, question["text"])
    expected = prompt + policy.tokens(zoom_call(call["label"], GOOD))
    expected = expected + policy.observation(small)
    for messages, tokens in ((opening, prompt), (whole, expected)):
        ids = processor.apply_chat_template(messages, tokenize=True, add_generation_prompt=True,
                                            return_dict=True)["input_ids"]
        assert list(ids[0]) == tokens.ids


def test_the_trainer_sums_first_and_normalises_in_the_group(engine, tmp_path):
    """Eq. 3 needs these defaults of TRL's. The rows of a step make one update."""
    pytest.importorskip("trl")
    options = dict(questions=8, group=8, max_turns=4, max_tokens=64, micro_rows=32, steps=1, lr=1.)
    trainer = engine.make_trainer(Policy(ROOT / "tiny"), ROOT / "tiny", options,
                                  lambda tokenizer: engine.make_rewards(tokenizer, None),
                                  engine.Progress(), output_dir=str(tmp_path),
                                  reward_weights=[.6, .4])
    config = trainer.args
    assert config.multi_objective_aggregation == "sum_then_normalize"
    assert config.scale_rewards == "group" and config.reward_weights == [.6, .4]
    assert trainer.reward_func_names == ["r", "S"]
    assert config.per_device_train_batch_size * config.gradient_accumulation_steps == 64
