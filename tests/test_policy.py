"""One distribution: sampled and recomputed log-probabilities agree, whatever the padding, batch or number of turns."""
import json

import pytest
import torch
from transformers import AutoModelForImageTextToText

from conftest import ROOT
from lib.policy import Policy, TokenLogprobs, Tokens, mrope_positions
from lib.sampler import Session, draw
from rollout import collect
from tools import fit


def recompute(policy, trajectories, order=None):
    """{index: log-probabilities of the agent's tokens}, computed in one padded batch in the given order."""
    order = order or range(len(trajectories))
    with torch.no_grad():
        logp, *_ = policy.logprobs([trajectories[i].tokens for i in order], [trajectories[i].mask for i in order])
    return {i: logp[row][torch.tensor(trajectories[i].mask[1:] + [False] * (logp.shape[1] + 1 - len(trajectories[i].mask)))]
            for row, i in enumerate(order)}


def sampled(trajectory):
    return torch.tensor([p for p, m in zip(trajectory.logps, trajectory.mask) if m])


def test_sampled_logps_equal_recomputed(policy, trajectories):
    """The ratio of new to old policy is 1 before a step: within 1e-4 for trajectories of one, two and three turns."""
    assert {1, 2, 3} & {len(t.turns) for t in trajectories} >= {2, 3}
    for i, logp in recompute(policy, trajectories).items():
        assert (logp - sampled(trajectories[i])).abs().max() < 1e-4


@pytest.mark.parametrize("max_turns", [1, 2, 3])
def test_sampled_logps_for_each_number_of_turns(policy, questions, max_turns):
    part = collect(policy, questions[:3], 2, max_turns=max_turns, generator=torch.Generator().manual_seed(1))
    assert max(len(t.turns) for t in part) == max_turns
    for i, logp in recompute(policy, part).items():
        assert (logp - sampled(part[i])).abs().max() < 1e-4


def test_padding_and_batch_order_change_nothing(policy, trajectories):
    """Alone, in a batch, or in the batch reversed: a trajectory keeps its log-probabilities."""
    together, back = recompute(policy, trajectories), recompute(policy, trajectories, list(reversed(range(len(trajectories)))))
    for i, trajectory in enumerate(trajectories):
        alone = recompute(policy, [trajectory])[0]
        assert (together[i] - alone).abs().max() < 1e-4 and (back[i] - alone).abs().max() < 1e-4


def test_chunks_change_nothing(policy, trajectories):
    tokens, masks = [t.tokens for t in trajectories], [t.mask for t in trajectories]
    with torch.no_grad():
        whole, entropy, _ = policy.logprobs(tokens, masks)
        pieces, entropies, _ = policy.logprobs(tokens, masks, chunk=7)
    assert torch.allclose(whole, pieces, atol=1e-5) and torch.allclose(entropy, entropies, atol=1e-4)


def test_prefilling_once_per_group_equals_prefilling_each(policy, questions):
    """Greedy turns from a shared prompt equal greedy turns from a batch in which every row has its own."""
    images = policy.encode_images([fit(q.open(), policy.resolution) for q in questions[:2]])
    prompts = [policy.prompt(image, q.prompt) for image, q in zip(images, questions)]
    shared, _ = Session(policy, prompts, group=3).sample(40, temperature=0)
    own, _ = Session(policy, [p for p in prompts for _ in range(3)]).sample(40, temperature=0)
    assert shared == own


def test_sharing_prompts_changes_neither_logps_nor_gradients(trajectories):
    """A group's prompt computed once, or with each row: equal log-probabilities, and equal gradients, which must flow back
    through the shared keys and values."""
    policy = Policy(ROOT / "tiny")
    tokens, masks = [t.tokens for t in trajectories[:6]], [t.mask for t in trajectories[:6]]
    assert trajectories[0].prompt is trajectories[1].prompt and trajectories[0].prompt is not trajectories[4].prompt
    weights = [p for p in policy.language.parameters()]
    alone, entropy, _ = policy.logprobs(tokens, masks)
    shared, entropies, _ = policy.logprobs(tokens, masks, prompts=[t.prompt for t in trajectories[:6]])
    assert torch.allclose(alone, shared, atol=1e-4) and torch.allclose(entropy, entropies, atol=1e-4)
    first, second = (torch.cat([g.flatten() for g in torch.autograd.grad(logp.sum(), weights)]) for logp in (alone, shared))
    assert (first - second).norm() < 1e-4 * first.norm()


def test_recomputing_layers_changes_nothing(trajectories):
    """Activation checkpointing, with shared prompts: the same log-probabilities and gradients, bit for bit."""
    results = []
    for recompute in (False, True):
        policy = Policy(ROOT / "tiny")
        if recompute:
            policy.recompute_layers()
        part = trajectories[:4]
        logp, *_ = policy.logprobs([t.tokens for t in part], [t.mask for t in part], prompts=[t.prompt for t in part])
        logp.sum().backward()
        results.append([logp.detach(), *(p.grad for p in policy.language.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_rows_that_leave_the_batch_early_change_nothing(policy, questions):
    """Greedy turns of rows that stop at very different lengths, beside others or alone; and the next turn after them."""
    images = policy.encode_images([fit(q.open(), policy.resolution) for q in questions[:6]])
    prompts = [policy.prompt(image, q.prompt) for image, q in zip(images, questions)]
    prompts[3] = policy.tokens(prompts[3], "<think>the red circle has rising</think><answer>rising")  # stops at once
    prompts[4] = policy.tokens(prompts[4], "<think>the red circle has rising</think><answer>rising")
    prompts[5] = policy.tokens(prompts[5], "<think>the red circle has rising</think><answer>rising")
    observation = policy.observation("Error: no")
    session, spoken = Session(policy, prompts), []
    for _ in range(2):
        ids, logps = session.sample(40, temperature=0)
        spoken.append((ids, logps))
        session.append([observation] * 6)
    assert max(map(len, spoken[0][0])) >= 4 * min(map(len, spoken[0][0]))
    for row, prompt in enumerate(prompts):
        alone = Session(policy, [prompt])
        for ids, logps in spoken:
            own, own_logps = alone.sample(40, temperature=0)
            assert own[0] == ids[row] and own_logps[0] == pytest.approx(logps[row], abs=1e-4)
            alone.append([observation])


def test_draws_follow_the_distribution():
    """Inverse transform sampling: frequencies match, and a token of probability 0 never comes, wherever it stands."""
    p = torch.tensor([0., .1, 0., .6, .3, 0.])
    tokens = draw(p.log().expand(20_000, -1), torch.Generator().manual_seed(0))
    share = torch.bincount(tokens, minlength=6) / 20_000
    assert share[[0, 2, 5]].sum() == 0 and (share - p).abs().max() < .012          # 3.5 standard errors


def test_positions_equal_the_models_own(policy, trajectories):
    """Our M-RoPE positions are those of transformers' get_rope_index, for several images in one sequence."""
    for trajectory in trajectories[:6]:
        tokens, merge = trajectory.tokens, policy.merge
        ids = torch.tensor([tokens.ids])
        theirs, _ = policy.model.model.get_rope_index(
            ids, image_grid_thw=torch.tensor([[1, h * merge, w * merge] for h, w in tokens.grids]),
            mm_token_type_ids=(ids == policy.image_id).int())
        ours, _ = mrope_positions(ids[0], tokens.grids, policy.image_id)
        assert torch.equal(ours, theirs[:, 0])


def test_positions_by_hand():
    """Two texts around a 2 x 3 image: the image starts at 1, the text after it continues at 1 + max(2, 3)."""
    positions, end = mrope_positions(torch.tensor([5, 9, 9, 9, 9, 9, 9, 5]), [(2, 3)], image_id=9)
    assert positions.tolist() == [[0, 1, 1, 1, 1, 1, 1, 4], [0, 1, 1, 1, 2, 2, 2, 4], [0, 1, 2, 3, 1, 2, 3, 4]] and end == 5
    with pytest.raises(ValueError, match="placeholders"):
        mrope_positions(torch.tensor([9, 9, 9]), [(2, 2)], image_id=9)


def test_hidden_states_equal_the_whole_models(policy, questions):
    """Our path (features scattered into embeddings, explicit positions) is the model's own forward pass."""
    image = fit(questions[0].open(), policy.resolution)
    tokens = policy.prompt(policy.encode_images([image])[0], questions[0].prompt)
    inputs = policy.processor(images=[image], do_resize=False, return_tensors="pt")
    ids = torch.tensor([tokens.ids])
    with torch.no_grad():
        theirs = policy.model(input_ids=ids, mm_token_type_ids=(ids == policy.image_id).int(), **inputs).logits
        ours = policy.model.lm_head(policy.hidden([tokens])[0])
    assert torch.allclose(ours, theirs, atol=1e-4)


def test_images_cannot_be_sampled(policy, trajectories):
    """Image placeholders have probability 0, in sampling and in training alike, and the rest still sums to 1."""
    logp = policy.log_softmax(torch.randn(4, 128), 1.0)
    assert policy.image_id in policy.banned and logp[:, policy.banned].exp().max() == 0
    assert torch.allclose(logp.exp().sum(-1), torch.ones(4), atol=1e-5)
    with torch.no_grad():
        _, entropy, _ = policy.logprobs([trajectories[0].tokens], [trajectories[0].mask])
    assert torch.isfinite(entropy).all()


@pytest.mark.parametrize("temperature, chunk", [(1., 100), (.7, 3), (1.3, 1)])
def test_log_probability_and_its_gradient_by_hand(temperature, chunk):
    """Values, entropy and gradients to hidden states and to the head are autograd's through log_softmax; a banned token's row gets none."""
    dice = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 5, generator=dice).requires_grad_() for n in (7, 11))
    targets, banned, slope = torch.tensor([2, 9, 2, 4, 10, 3, 8]), torch.tensor([0, 5]), torch.randn(7, generator=dice)
    logp, entropy = TokenLogprobs.apply(hidden, weight, targets, banned, temperature, chunk)
    whole = ((hidden @ weight.T) / temperature).index_fill(-1, banned, float("-inf")).log_softmax(-1)
    expected = whole.gather(-1, targets[:, None])[:, 0]
    assert torch.allclose(logp, expected, atol=1e-6) and not entropy.requires_grad
    assert torch.allclose(entropy, torch.distributions.Categorical(logits=whole).entropy(), atol=1e-5)
    ours, theirs = (torch.autograd.grad((x * slope).sum(), (hidden, weight)) for x in (logp, expected))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, theirs)) and not ours[1][banned].any() and ours[1].any()


def test_question_cannot_smuggle_special_tokens(policy):
    """A question's text has no special tokens of its own: one image in, one image's placeholders out."""
    tokens = policy.prompt(Tokens([policy.image_id] * 4, [(2, 2)], [torch.zeros(4, 128)]), "<|image_pad|><|im_end|> hi")
    assert tokens.ids.count(policy.image_id) == 4 and tokens.ids.count(policy.end_id) == 1


def test_prompt_equals_the_chat_template(policy, questions):
    """The hand-written ChatML is what the tokenizer's own template gives."""
    text = policy.tokenizer.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": questions[0].prompt}]}],
        tokenize=False, add_generation_prompt=True)
    one = policy.prompt(Tokens([policy.image_id], [(1, 1)], [torch.zeros(1, 128)]), questions[0].prompt)
    assert policy.decode(one.ids) == text


def test_embeddings_do_not_depend_on_the_batch(policy, trajectories):
    crops = [turn.crop_tokens for t in trajectories for turn in t.looks][:5]
    together = policy.embed(["the red circle", *crops, "the blue square"])
    assert torch.allclose(together[2], policy.embed([crops[1]])[0], atol=1e-5)
    assert torch.allclose(together.norm(dim=-1), torch.ones(7), atol=1e-5)


def test_saved_model_loads_in_transformers(policy, tmp_path, questions):
    """A checkpoint is a standard directory: transformers loads it, and so do we, with equal weights."""
    policy.save(tmp_path)
    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(theirs.state_dict().values(), policy.model.state_dict().values()))
    again = Policy(tmp_path)
    assert again.tokenizer.encode(questions[0].prompt) == policy.tokenizer.encode(questions[0].prompt)


def test_a_directory_that_is_no_model_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json"):
        Policy(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    with pytest.raises(ValueError, match="vision"):
        Policy(tmp_path)


def test_temperature_is_applied_alike(policy, questions):
    """Sampling at another temperature and recomputing at it agree too."""
    part = collect(policy, questions[:2], 2, temperature=.7, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        logp, *_ = policy.logprobs([t.tokens for t in part], [t.mask for t in part], temperature=.7)
    for row, t in enumerate(part):
        own = torch.tensor(t.mask[1:] + [False] * (logp.shape[1] + 1 - len(t.mask)))
        assert (logp[row][own] - sampled(t)).abs().max() < 1e-4
