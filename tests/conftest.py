"""What the tests share: the committed agent, and small random models of both families."""
import os
import random
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def policy():
    """The committed agent. Tests that change weights load their own."""
    from lib.policy import Policy
    return Policy(ROOT / "tiny")


@pytest.fixture(scope="session")
def questions():
    from tiny.world import World, world_questions
    return world_questions(World(), seed=0, split="test", start=0, count=6)


@pytest.fixture(scope="session")
def trajectories(policy, questions):
    """24 sampled trajectories of 1 to 4 turns."""
    from rollout import collect
    return collect(policy, questions, group=4, generator=torch.Generator().manual_seed(0))


# ---- other models of the family: random ones that have learnt to speak, and nothing else ---------

FAMILY = ("qwen2_5_vl", "qwen3_vl")


@pytest.fixture(scope="session")
def directories(tmp_path_factory):
    """Model directories by the name of their architecture."""
    folders = {}
    for name in FAMILY:
        folders[name] = tmp_path_factory.mktemp("family") / name
        random_model(folders[name], name)
        learn_to_speak(folders[name], vocabulary=8192 if name == "qwen3_vl" else 560)
    return folders


def random_model(folder: Path, name: str) -> None:
    """A directory as the real ones are, only small.

    Both: grouped queries, and sections of M-RoPE. Qwen2.5-VL: a vision tower that attends within
    windows of 4 x 4 placeholders, where an image has 6 x 6; untied. Qwen3-VL: DeepStack; tied;
    interleaved sections; heads whose widths do not add up to the hidden size."""
    from transformers import (AutoTokenizer, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration,
                              Qwen3VLConfig, Qwen3VLForConditionalGeneration)
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny")
    rope = dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 3, 3])
    text = dict(vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, intermediate_size=128,
                rope_parameters=rope)
    vision = dict(depth=2, hidden_size=32, num_heads=2, intermediate_size=64, out_hidden_size=64,
                  temporal_patch_size=2, spatial_merge_size=2)
    if name == "qwen3_vl":
        rope.update(mrope_section=[6, 5, 5], mrope_interleaved=True)
        text.update(head_dim=32)
        vision.update(patch_size=16, num_position_embeddings=64, deepstack_visual_indexes=[0, 1])
        make_config, make_model = Qwen3VLConfig, Qwen3VLForConditionalGeneration
    else:
        vision.update(patch_size=14, window_size=112, fullatt_block_indexes=[1])
        make_config, make_model = Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    special = {}
    for key, word in (("image", "image_pad"), ("video", "video_pad"),
                      ("vision_start", "vision_start"), ("vision_end", "vision_end")):
        special[f"{key}_token_id"] = tokenizer.convert_tokens_to_ids(f"<|{word}|>")
    config = make_config(text_config=text, vision_config=vision,
                         tie_word_embeddings=name == "qwen3_vl", **special)
    torch.manual_seed(0)
    make_model(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    side = 2 * vision["patch_size"]
    size = {"shortest_edge": (2 * side) ** 2, "longest_edge": (6 * side) ** 2}
    Qwen2VLImageProcessorPil(patch_size=vision["patch_size"], temporal_patch_size=2, merge_size=2,
                             size=size).save_pretrained(folder)
    (folder / "agent.json").write_text('{"system_prompt": ""}')


def learn_to_speak(folder: Path, vocabulary: int, steps: int = 120) -> None:
    """Imitate conversations at random: none to two looks at random boxes, a random option. Else no
    turn of a random model ends, looks or is right, and nothing that follows would be tested.

    Then the vocabulary grows, with words that no conversation has."""
    from lib.policy import Policy
    from tiny.world import World, world_questions
    from tools import fit, zoom_call
    policy, dice = Policy(folder), random.Random(0)
    questions = world_questions(World(), 0, "train", 0, 4)
    pictures = [question.open() for question in questions]
    images = policy.encode_images([fit(p, policy.resolution) for p in pictures])
    crops = policy.encode_images([fit(p, policy.resolution.crop()) for p in pictures])
    # a number tells its place in the box: that is easily learnt
    boxes = [(0, 8, 40, 48), (16, 24, 64, 72), (0, 24, 64, 72), (16, 8, 40, 48)]

    def conversation():
        i = dice.randrange(4)
        whole = policy.prompt(images[i], questions[i].prompt)
        mask = [False] * len(whole.ids)
        for _ in range(dice.choice((0, 1, 2, 2))):
            label = f"the {dice.choice(list(questions[i].objects))}"
            call = policy.tokens(zoom_call(label, dice.choice(boxes)))
            crop = policy.observation(dice.choice(crops))
            whole = whole + call + crop
            mask += [True] * len(call.ids) + [False] * len(crop.ids)
        answer = policy.tokens(f"<answer>{dice.choice('ABCD')}</answer>")
        return whole + answer, mask + [True] * len(answer.ids)

    optimiser = torch.optim.AdamW(policy.freeze_vision(), 1.5e-2, (.9, .95))
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = 1.5e-2 * (1 - step / steps)
        batch, masks = zip(*(conversation() for _ in range(6)))
        states, _ = policy.own_states(list(batch), list(masks))
        logits = policy.model.lm_head(states)
        later = torch.full((len(logits), 1), 12.)   # above log 8192: the words still to come
        targets = [i for tokens, mask in zip(batch, masks)
                   for i, own in zip(tokens.ids, mask) if own]
        loss = torch.nn.functional.cross_entropy(torch.cat([logits, later], 1),
                                                 torch.tensor(targets))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    policy.model.resize_token_embeddings(vocabulary, mean_resizing=False)
    policy.model.save_pretrained(folder)
