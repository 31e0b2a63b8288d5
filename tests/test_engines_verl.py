"""docs/engines for verl: its loop and advantage are ours, and its questions come back whole.

Skipped where verl or datasets is not installed; docs/engines/verl_check.py names the packages."""
import asyncio
import io
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import mapo
from conftest import ROOT
from lib.data import DataError, read_jsonl, write_jsonl

sys.path.insert(0, str(ROOT / "docs/engines"))


# ---- the estimator, the tool, the reward ---------------------------------------------------------

@pytest.fixture(scope="module")
def check():
    pytest.importorskip("verl")
    pytest.importorskip("torchdata")
    pytest.importorskip("opentelemetry")
    import verl_check
    return verl_check


@pytest.fixture(scope="module")
def prepared(check, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check.verl_mapo, "ROOT", tmp_path_factory.mktemp("verl"))
        return check.prepare()


def test_same_tokens_and_advantages(check, prepared):
    """`compare` raises if a token, a mask or an outcome of verl's loop differs from ours."""
    found = check.compare(*prepared, count=2, group=4)
    assert set(found) == set(mapo.CREDITS)
    for difference, largest in found.values():
        assert difference < 1e-6 and largest > 1


def batch(check, turns: list, width: int) -> tuple:
    """Rows of (tokens of the turn, its score) with 2 tokens of the tool between, and r at the
    end -> rewards, mask (B, width), as `Output` and verl write them."""
    rewards, mask = torch.zeros(len(turns), width), torch.zeros(len(turns), width)
    for i, (r, *row) in enumerate(turns):
        own, scores = [], []
        for length, score in row:
            own += [1] * length + [0, 0]
            scores.append(score)
        output = check.verl_mapo.Output(
            prompt_ids=[1], response_ids=own[:-2], response_mask=own[:-2], reward_score=r,
            metrics={}, extra_fields={"tool_rewards": scores})
        fields = output.as_dict()
        rewards[i, :len(own) - 2] = fields["rm_scores"]
        mask[i, :len(own) - 2] = fields["response_mask"]
    return rewards, mask


def settings(credit: str, **more) -> dict:
    return {"mapo": {"beta": .4, "lam": .95, "credit": credit}, **more}


def test_advantages_of_mixed_groups(check):
    """Groups of 3 and 2, shuffled: an error in between, a last turn of one token, no look."""
    turns = [(1., (4, .9), (3, 0.)), (0., (3, .2)), (0., (4, 0.), (5, .3), (1, 0.)),
             (1., (2, .5), (1, 0.)), (1., (2, 0.))]
    rewards, mask = batch(check, turns, 18)
    groups = check.np.array(["b", "a", "b", "b", "a"], dtype=object)
    A, returns = check.verl_mapo.estimate(rewards, mask, groups, settings("aim"))
    assert A is returns and (A[mask == 0] == 0).all()
    r = torch.tensor([1., 0., 1.])
    s = torch.tensor([[.9, 0, 0], [0, .3, 0], [.5, 0, 0]])
    expected = mapo.advantages(r, s, s > 0, 3, .4, credit="aim")
    row = A[2]                                        # turns at 0..3, 6..10, and 13
    assert torch.equal(row[[0, 3, 6, 10, 13]], expected[1, [0, 0, 1, 1, 2]])
    assert torch.equal(A[3, [0, 1, 4]], expected[2, [0, 0, 1]])
    pair = mapo.advantages(torch.tensor([0., 1.]), torch.tensor([[.2], [0.]]),
                           torch.tensor([[True], [False]]), 2, .4, credit="aim")
    assert torch.equal(A[[1, 4], 0], pair[:, 0])


def test_estimator_is_grpo_without_scores(check):
    """With beta 0 it is verl's own GRPO, but for n - 1."""
    from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage, get_adv_estimator_fn
    rewards, mask = batch(check, [(1., (3, 0.)), (0., (4, 0.)), (0., (2, 0.))], 8)
    groups = check.np.array([7, 7, 7])
    config = {"mapo": {"beta": 0.}}
    ours = get_adv_estimator_fn("mapo")(rewards, mask, groups, config)[0]
    theirs = compute_grpo_outcome_advantage(rewards.clone(), mask, groups)[0]
    assert torch.allclose(ours, theirs * 1.5 ** .5, atol=1e-5)


def test_kl_in_the_rewards_is_refused(check):
    rewards, mask = batch(check, [(1., (3, .5)), (0., (4, 0.))], 8)
    with pytest.raises(ValueError, match="use_kl_in_reward"):
        check.verl_mapo.estimate(rewards, mask, check.np.array([0, 0]),
                                 settings("look", use_kl_in_reward=True))


@pytest.mark.parametrize("turn, calls", [
    ('<tool_call>{"name": "image_zoom_in_tool"}</tool_call>', 1), ("<tool_call>{", 1),
    ("<tool_call>{</tool_call><answer>B</answer>", 0), ("<answer> </answer>", 0), ("hm", 0)])
def test_which_turns_go_to_the_tool(check, prepared, turn, calls):
    """An agent reads our errors, but for those that end a trajectory here as well."""
    policy = prepared[1].scorer.policy
    parser = check.verl_mapo.ToolParser.get_tool_parser("mapo", policy.tokenizer)
    _, found = asyncio.run(parser.extract_tool_calls(policy.tokens(turn).ids))
    assert len(found) == calls
    data = SimpleNamespace(image_data=[Image.new("RGB", (768, 768))])
    for call in found:
        arguments = json.loads(call.arguments)
        shown, score, notes = asyncio.run(prepared[1].execute("", arguments, agent_data=data))
        assert shown.text.startswith("Error: ") and score == 0 and notes["error"]


def test_reward(check):
    def r(turn: str, choices: list, truth: str = "vee") -> float:
        extra = {"last_turn": turn, "choices": choices}
        return check.verl_mapo.outcome_of("mapo", "<answer>vee</answer>", truth, extra)["score"]

    assert r("<think>x</think><answer>(B)</answer>", ["cross", "vee"]) == 1
    assert r("<answer>A</answer>", ["cross", "vee"]) == 0
    assert r("<answer>Vee.</answer>", []) == 1
    assert r("<tool_call>{}</tool_call>", []) == 0 and r("vee", []) == 0


# ---- files ---------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def convert():
    pytest.importorskip("datasets")
    import convert
    return convert


@pytest.fixture(scope="module")
def source(questions, tmp_path_factory):
    """Questions of the world; and an open one, of a JPEG, with nothing but the need."""
    path = write_jsonl(questions, tmp_path_factory.mktemp("questions"))
    jpeg = path.with_name("gradient.jpg")
    Image.linear_gradient("L").save(jpeg)
    record = {"image": str(jpeg), "answer": "<5", "question": 'Was heißt "42"?\n  Zeile 2'}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    return path


@pytest.mark.parametrize("name", ["train.parquet", "train"])
def test_nothing_is_lost_on_the_way(convert, source, tmp_path, name):
    convert.convert(source, tmp_path / name)
    again = convert.back(tmp_path / name, tmp_path / "again")
    first, second = list(read_jsonl(source)), list(read_jsonl(again))
    assert list(map(convert.contents, first)) == list(map(convert.contents, second))
    assert len(second) == 7 and second[-1].choices == () and second[-1].boxes == ()


def test_a_question_that_verl_would_misread(convert, source, tmp_path):
    record = json.loads(source.read_text().splitlines()[-1]) | {"question": "Is <image> a tag?"}
    path = tmp_path / "tag.jsonl"
    path.write_text(json.dumps(record))
    convert.convert(path, tmp_path / "train")
    with pytest.raises(DataError, match="tag.jsonl:1: field 'question'"):
        convert.convert(path, tmp_path / "train.parquet")


def test_verl_reads_the_file(convert, check, source, tmp_path):
    """verl's own data set: the picture stands before the text, and the reward finds its fields."""
    from omegaconf import OmegaConf
    from verl.utils.dataset.rl_dataset import RLHFDataset
    convert.convert(source, tmp_path / "train.parquet")
    config = OmegaConf.create({"filter_overlong_prompts": False, "cache_dir": str(tmp_path)})
    data = RLHFDataset(str(tmp_path / "train.parquet"), None, config, processor=object())
    for question, row in zip(read_jsonl(source), data, strict=True):
        system, user = row["raw_prompt"]
        image, text = user["content"]
        assert system["role"] == "system" and text["text"] == question.prompt
        assert image["image"].tobytes() == question.open().tobytes()
        given = check.verl_mapo.outcome_of(
            row["data_source"], f"<answer>{question.answer}</answer>",
            row["reward_model"]["ground_truth"], row["extra_info"])
        assert given["score"] == 1
