"""One distribution: log-probabilities do not depend on padding, batch, chunks or shared prompts.
They, their gradients, the positions and the hidden states are those of independent code."""
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from conftest import ROOT
from lib import policy as policy_module
from lib.policy import Policy, TokenLogprobs, Tokens, causal, log_softmax, mrope_positions
from tools import fit


def logprobs(policy, part, **options):
    return policy.logprobs([t.tokens for t in part], [t.mask for t in part], **options)


def by_trajectory(policy, part):
    """The agent's log-probabilities, a tensor a trajectory, computed in one padded batch."""
    with torch.no_grad():
        logp, _ = logprobs(policy, part)
    return [row[:len(t.mask) - 1][torch.tensor(t.mask[1:])] for row, t in zip(logp, part)]


# ---- log-probabilities ---------------------------------------------------------------------------

def test_padding_and_batch_order_change_nothing(policy, trajectories):
    """Alone, in a batch, or in the batch reversed: a trajectory keeps its log-probabilities."""
    together = by_trajectory(policy, trajectories)
    back = by_trajectory(policy, trajectories[::-1])[::-1]
    assert len({len(t.mask) for t in trajectories}) > 5
    for trajectory, first, second in zip(trajectories, together, back):
        alone = by_trajectory(policy, [trajectory])[0]
        assert (first - alone).abs().max() < 1e-4 and (second - alone).abs().max() < 1e-4


def test_chunks_change_nothing(policy, trajectories):
    with torch.no_grad():
        whole, entropy = logprobs(policy, trajectories)
        pieces, entropies = logprobs(policy, trajectories, chunk=7)
    assert torch.allclose(whole, pieces, atol=1e-5)
    assert torch.allclose(entropy, entropies, atol=1e-5)


def test_columns_speak_of_the_next_token(policy, trajectories):
    """Where the mask is true and nowhere else; by the model's own head on whole sequences."""
    part = trajectories[:3]
    with torch.no_grad():
        logp, entropy = logprobs(policy, part, temperature=.7)
        for row, t in enumerate(part):
            ours = policy.log_softmax(policy.hidden([t.tokens])[0][0], .7)
            for column, own in enumerate(t.mask[1:]):
                expected = ours[column, t.tokens.ids[column + 1]] if own else 0.
                assert logp[row, column] == pytest.approx(float(expected), abs=1e-4)
                assert (entropy[row, column] > 0) == own
            assert not logp[row, len(t.mask) - 1:].any()


def test_own_states_with_and_without_shared_prompts(policy, trajectories):
    """Row by row the states before the agent's tokens, and where they belong."""
    part = trajectories[2:7]                                   # two prompts
    tokens, masks = [t.tokens for t in part], [t.mask for t in part]
    with torch.no_grad():
        states, own = policy.own_states(tokens, masks)
        shared, own_too = policy.own_states(tokens, masks, [t.prompt for t in part])
    assert torch.equal(own, own_too) and own.tolist() == [
        t.mask[1:] + [False] * (own.shape[1] + 1 - len(t.mask)) for t in part]
    assert states.shape == (own.sum(), 128) and torch.allclose(states, shared, atol=1e-4)
    first = part[0].mask.index(True)
    with torch.no_grad():
        alone = policy.hidden([part[0].tokens])[0][0, first - 1]
    assert torch.allclose(states[0], alone, atol=1e-4)


def test_sharing_prompts_changes_neither_logps_nor_gradients(trajectories):
    """A group's prompt computed once, or with each row: equal log-probabilities, and equal
    gradients, which must flow back through the shared keys and values."""
    policy, part = Policy(ROOT / "tiny"), trajectories[:6]
    assert part[0].prompt is part[1].prompt and part[0].prompt is not part[4].prompt
    found = []
    for prompts in (None, [t.prompt for t in part]):
        logp, entropy = logprobs(policy, part, prompts=prompts)
        gradients = torch.autograd.grad(logp.sum(), list(policy.language.parameters()))
        found.append((logp, entropy, torch.cat([g.flatten() for g in gradients])))
    (logp, entropy, gradient), (logp_too, entropy_too, gradient_too) = found
    assert torch.allclose(logp, logp_too, atol=1e-4)
    assert torch.allclose(entropy, entropy_too, atol=1e-4)
    assert (gradient - gradient_too).norm() < 1e-4 * gradient.norm()


def test_recomputing_layers_changes_nothing(trajectories):
    """Activation checkpointing, with shared prompts: the same log-probabilities and gradients, bit
    for bit, although no layer keeps what it computed."""
    part, results, kept = trajectories[:4], [], []
    for recompute in (False, True):
        policy = Policy(ROOT / "tiny")
        if recompute:
            policy.recompute_layers()
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x,
                                                      lambda x: x):
            logp, _ = logprobs(policy, part, prompts=[t.prompt for t in part])
        logp.sum().backward()
        results.append([logp.detach(), *(p.grad for p in policy.language.parameters())])
        results[-1].append(sum(kept))
        kept.clear()
    plain, recomputed = results
    assert all(torch.equal(a, b) for a, b in zip(plain[:-1], recomputed[:-1]))
    assert recomputed[-1] < .5 * plain[-1]


@pytest.mark.parametrize("temperature, chunk", [(1., 100), (.7, 3), (1.3, 1)])
def test_log_probability_and_its_gradient_by_hand(temperature, chunk):
    """Values, entropy and gradients to hidden states and to the head are autograd's through
    log_softmax; a banned token's row gets none."""
    dice = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 5, generator=dice).requires_grad_()
    weight = torch.randn(11, 5, generator=dice).requires_grad_()
    slope = torch.randn(7, generator=dice)
    targets, banned = torch.tensor([2, 9, 2, 4, 10, 3, 8]), torch.tensor([0, 5])
    logp, entropy = TokenLogprobs.apply(hidden, weight, targets, banned, temperature, chunk)

    logits = (hidden @ weight.T / temperature).index_fill(-1, banned, float("-inf"))
    whole = logits.log_softmax(-1)
    expected = whole.gather(-1, targets[:, None])[:, 0]
    of_torch = torch.distributions.Categorical(logits=whole).entropy()
    assert torch.allclose(logp, expected, atol=1e-6)
    assert torch.allclose(entropy, of_torch, atol=1e-5) and not entropy.requires_grad
    ours = torch.autograd.grad((logp * slope).sum(), (hidden, weight))
    theirs = torch.autograd.grad((expected * slope).sum(), (hidden, weight))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, theirs))
    assert ours[1].any() and not ours[1][banned].any()


@pytest.mark.parametrize("scale", [.1, 1., 4.])
def test_a_large_vocabulary(scale):
    """Over 151,936 words, flat or peaked: entropy and log-probability within 1e-5 of float64's, in
    training and in sampling alike."""
    dice = torch.Generator().manual_seed(0)
    hidden = torch.randn(6, 16, generator=dice)
    weight = torch.randn(151_936, 16, generator=dice) * scale / 4
    targets, banned = torch.arange(6) + 7, torch.tensor([0, 5])
    logp, entropy = TokenLogprobs.apply(hidden, weight, targets, banned, 1., 4)
    logits = (hidden @ weight.T).index_fill(-1, banned, -1e30)
    exact = logits.double().log_softmax(-1)
    assert (entropy - -(exact.exp() * exact).sum(-1)).abs().max() < 1e-5
    assert (logp - exact.gather(-1, targets[:, None])[:, 0]).abs().max() < 1e-5
    sampled_from = log_softmax(hidden, weight, banned, 1.)
    assert (sampled_from - exact).abs()[:, 6:].max() < 1e-5


def test_images_cannot_be_said(policy, trajectories):
    """Image placeholders have probability 0, in sampling and in training alike, and the rest still
    sums to 1."""
    logp = policy.log_softmax(torch.randn(4, 128), 1.)
    assert policy.image_id in policy.banned and logp[:, policy.banned].exp().max() == 0
    assert torch.allclose(logp.exp().sum(-1), torch.ones(4), atol=1e-5)
    with torch.no_grad():
        _, entropy = logprobs(policy, trajectories[:1])
    assert torch.isfinite(entropy).all()


# ---- positions, masks, hidden states -------------------------------------------------------------

def test_positions_equal_the_models_own(policy, trajectories):
    """Ours are those of transformers' get_rope_index, for several images in one sequence."""
    assert max(len(t.tokens.grids) for t in trajectories[:6]) > 1
    for trajectory in trajectories[:6]:
        tokens, merge = trajectory.tokens, policy.merge
        ids = torch.tensor([tokens.ids])
        theirs, _ = policy.model.model.get_rope_index(
            ids, image_grid_thw=torch.tensor([[1, h * merge, w * merge] for h, w in tokens.grids]),
            mm_token_type_ids=(ids == policy.image_id).int())
        ours, _ = mrope_positions(tokens.ids, tokens.grids, policy.image_id)
        assert torch.equal(torch.tensor(ours).T, theirs[:, 0])


def test_positions_by_hand():
    """Text, an image of 2 x 3, one of 1 x 2 at once after it, text. The first image starts at 1,
    the second one at 1 + max(2, 3), the text at 4 + max(1, 2)."""
    positions, end = mrope_positions([5, 9, 9, 9, 9, 9, 9, 9, 9, 5], [(2, 3), (1, 2)], image_id=9)
    assert positions == [(0, 0, 0), (1, 1, 1), (1, 1, 2), (1, 1, 3), (1, 2, 1), (1, 2, 2),
                         (1, 2, 3), (4, 4, 4), (4, 4, 5), (6, 6, 6)] and end == 7
    later, _ = mrope_positions([5, 9, 9], [(1, 2)], image_id=9, start=10)
    assert later == [(10, 10, 10), (11, 11, 11), (11, 11, 12)]


def test_who_attends_to_whom_by_hand():
    """Two new columns after three: never to padding (column 1, and 3), always to oneself."""
    found = causal(torch.tensor([[True, False, True, False, True]]), new=2)[0, 0]
    assert found.int().tolist() == [[1, 0, 1, 1, 0], [1, 0, 1, 0, 1]]


def test_hidden_states_equal_the_whole_models(policy, questions):
    """Our path (features scattered into embeddings, explicit positions) is the model's own."""
    image = fit(questions[0].open(), policy.resolution)
    tokens = policy.prompt(policy.encode_images([image])[0], questions[0].prompt)
    inputs = policy.processor(images=[image], do_resize=False, return_tensors="pt")
    ids = torch.tensor([tokens.ids])
    with torch.no_grad():
        theirs = policy.model(input_ids=ids, mm_token_type_ids=(ids == policy.image_id).int(),
                              **inputs).logits
        ours = policy.model.lm_head(policy.hidden([tokens])[0])
    assert torch.allclose(ours, theirs, atol=1e-4)


def test_only_the_language_model_learns():
    policy = Policy(ROOT / "tiny")
    trained = {id(p) for p in policy.freeze_vision()}
    for name, p in policy.model.named_parameters():
        assert p.requires_grad == (id(p) in trained) == ("visual" not in name)


# ---- texts and images ----------------------------------------------------------------------------

def test_text_from_outside_cannot_smuggle_special_tokens(policy):
    """One image in, one image's placeholders out; so in a question, and in what is embedded."""
    image = Tokens([policy.image_id] * 4, [(2, 2)], [torch.zeros(4, 128)])
    text = "<|image_pad|><|im_end|> hi"
    tokens = policy.prompt(image, text)
    assert tokens.ids.count(policy.image_id) == 4 and tokens.ids.count(policy.end_id) == 1
    assert policy.embed([text]).isfinite().all()


def test_prompt_equals_the_chat_template(policy, questions):
    """What we build around the image is what the tokenizer's own template gives."""
    content = [{"type": "image"}, {"type": "text", "text": questions[0].prompt}]
    text = policy.tokenizer.apply_chat_template([{"role": "user", "content": content}],
                                                tokenize=False, add_generation_prompt=True)
    one = Tokens([policy.image_id], [(1, 1)], [torch.zeros(1, 128)])
    assert policy.decode(policy.prompt(one, questions[0].prompt).ids) == text


# Of Qwen2.5-VL-Instruct's own template (tokenizer_config.json), the parts without a tool's schema.
QWEN = """{%- if messages[0]['role'] != 'system' -%}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{%- if message['role'] == 'tool' -%}
{{- '<|im_start|>user\\n<tool_response>\\n' + message['content'] + '\\n</tool_response>' -}}
{{- '<|im_end|>\\n' -}}
{%- else -%}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""


@pytest.fixture(scope="module")
def like_qwen(tmp_path_factory) -> Path:
    """tiny/ with Qwen's template and two ends of a text in generation_config.json."""
    folder = tmp_path_factory.mktemp("like-qwen")
    for file in (ROOT / "tiny").iterdir():
        if file.suffix in (".json", ".safetensors") and file.name != "agent.json":
            shutil.copy(file, folder)
    (folder / "chat_template.jinja").write_text(QWEN)
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": [2, 7]}))
    return folder


def test_an_empty_system_prompt_is_the_templates(like_qwen):
    model, image = Policy(like_qwen), Tokens([])
    model.system_prompt = ""
    assert model.decode(model.prompt(image, "Which?").ids) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "<|vision_start|><|vision_end|>Which?<|im_end|>\n<|im_start|>assistant\n")
    model.system_prompt = "Look."
    said = model.decode(model.prompt(image, "Which? {slot}").ids)
    assert said.startswith("<|im_start|>system\nLook.<|im_end|>\n<|im_start|>user\n<|vis")
    assert said.endswith("Which? {slot}<|im_end|>\n<|im_start|>assistant\n")


def test_tool_response_has_the_line_breaks_of_the_template(policy, like_qwen):
    qwen = Policy(like_qwen)
    text = "<tool_response>{0}Error: no{0}</tool_response>"
    assert text.format("\n") in qwen.decode(qwen.observation("Error: no").ids)
    assert text.format("") in policy.decode(policy.observation("Error: no").ids)
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"},
             {"role": "tool", "content": "Error: no"}]
    whole = qwen.chat(turns)
    assert whole.endswith("ho" + qwen.decode(qwen.observation("Error: no").ids))


def test_all_that_ends_a_text_is_known(policy, like_qwen):
    """<|im_end|> is 2 and <|endoftext|> 0 in tiny/'s tokenizer; 7 is of generation_config.json."""
    assert policy.end_ids == {0, 2} and Policy(like_qwen).end_ids == {0, 2, 7}


def test_embeddings_do_not_depend_on_the_batch(policy, trajectories):
    crops = [turn.crop_tokens for t in trajectories for turn in t.looks][:5]
    items = ["the red circle", *crops, "the blue square"]
    together = policy.embed(items)
    assert torch.allclose(together[2], policy.embed([crops[1]])[0], atol=1e-5)
    assert torch.allclose(together, policy.embed(items, chunk=2), atol=1e-5)
    assert torch.allclose(together.norm(dim=-1), torch.ones(7), atol=1e-5)


# ---- folders -------------------------------------------------------------------------------------

def test_saved_model_loads_in_transformers(policy, tmp_path, questions):
    """A checkpoint is a standard directory: transformers loads it, and so do we, with equal
    weights, the same tokens and the same notes about the agent."""
    policy.save(tmp_path)
    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path).state_dict()
    for name, weight in policy.model.state_dict().items():
        assert torch.equal(theirs[name], weight)
    again = Policy(tmp_path)
    text = questions[0].prompt
    assert again.tokenizer.encode(text) == policy.tokenizer.encode(text)
    assert again.coordinates == policy.coordinates and again.system_prompt == policy.system_prompt


def test_a_directory_that_is_no_model_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json"):
        Policy(tmp_path)
    for other in ("qwen2", "qwen2_vl", "gemma3"):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": other}))
        with pytest.raises(ValueError, match=f"expected one of qwen2_5_vl, .*, found {other}$"):
            Policy(tmp_path)


WEIGHT, BIAS = "model.layers.0.mlp.down_proj.weight", "visual.blocks.0.attn.proj.bias"


@pytest.mark.parametrize("name, value, found", [
    (WEIGHT, None, "1 missing: .*down_proj"), (BIAS, None, "1 missing: .*proj.bias"),
    ("more", torch.zeros(3), "1 unknown: more"), (WEIGHT, torch.zeros(3, 3), "1 of another shape"),
    (BIAS, torch.full((96,), torch.nan), "1 not finite: .*proj.bias")])
def test_a_wrong_weight_is_named(like_qwen, tmp_path, name, value, found):
    """transformers would go on: with a random layer, without the bias, or to NaN."""
    folder = shutil.copytree(like_qwen, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights[name] = value
    kept = {key: weight for key, weight in weights.items() if weight is not None}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"model: expected all weights .* found {found}"):
        Policy(folder)


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "config.json",
                                  "preprocessor_config.json"])
def test_a_truncated_file_is_an_error_of_one_line(like_qwen, tmp_path, file):
    folder = shutil.copytree(like_qwen, tmp_path / "model")
    whole = (folder / file).read_bytes()
    (folder / file).write_bytes(whole[:len(whole) // 2])
    with pytest.raises(ValueError, match=str(folder)):
        Policy(folder)


def test_no_code_of_a_directory_is_run(tmp_path, monkeypatch):
    """A model type that transformers does not know is an error, not a question on the terminal."""
    config = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text("open('ran', 'w')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    with pytest.raises(ValueError, match="cannot be used"):
        Policy(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_the_demonstration(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    policy_module.demonstrate()
    said = capsys.readouterr().out
    assert "(4, 5, 6)                    '<|image_pad|>'" in said
    assert float(said.splitlines()[-1].split()[-2]) > -1
