import os
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


# ---- other models of the family: random ones that have learnt to speak, and nothing else -----------------------------

FAMILY = ("qwen2_5_vl", "qwen3_vl")


def random_model(folder: Path, name: str) -> None:
    """A directory as the real ones are, only small: grouped queries, M-RoPE's sections (Qwen3-VL: interleaved, and heads whose
    widths do not add up to the hidden size), patches of 14 or 16. Qwen2.5-VL: a vision tower that attends within windows of
    4 x 4 placeholders, where an image has 6 x 6; untied. Qwen3-VL: DeepStack; a vocabulary of 151,936, tied."""
    from transformers import (AutoTokenizer, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen3VLConfig,
                              Qwen3VLForConditionalGeneration)
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    tokenizer, third = AutoTokenizer.from_pretrained(ROOT / "tiny"), name == "qwen3_vl"
    token = tokenizer.convert_tokens_to_ids
    text = dict(vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                intermediate_size=128, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]})
    vision = dict(depth=2, hidden_size=32, num_heads=2, intermediate_size=64, out_hidden_size=64, temporal_patch_size=2,
                  spatial_merge_size=2)
    if third:
        text |= dict(head_dim=32, rope_parameters=text["rope_parameters"] | {"mrope_section": [6, 5, 5], "mrope_interleaved": True})
        vision |= dict(patch_size=16, num_position_embeddings=64, deepstack_visual_indexes=[0, 1])
    else:
        vision |= dict(patch_size=14, window_size=112, fullatt_block_indexes=[1])
    ids = {f"{name}_token_id": token(f"<|{word}|>") for name, word in (("image", "image_pad"), ("video", "video_pad"),
           ("vision_start", "vision_start"), ("vision_end", "vision_end"))}
    torch.manual_seed(0)
    make, kind = (Qwen3VLConfig, Qwen3VLForConditionalGeneration) if third else (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration)
    kind(make(text_config=text, vision_config=vision, tie_word_embeddings=third, **ids)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    side = 2 * vision["patch_size"]
    Qwen2VLImageProcessorPil(patch_size=side // 2, temporal_patch_size=2, merge_size=2,
                             size={"shortest_edge": (2 * side) ** 2, "longest_edge": (6 * side) ** 2}).save_pretrained(folder)
    (folder / "agent.json").write_text('{"system_prompt": ""}')
    learn_to_speak(folder, vocabulary=151_936 if third else 560)


def learn_to_speak(folder: Path, vocabulary: int, steps: int = 120) -> None:
    """Imitate conversations at random: none to two looks at random boxes, a random option. Otherwise no turn of a random model
    ends, looks or is right, and nothing that follows would be tested."""
    import random
    from tiny.world import World, world_questions
    from lib.policy import Policy
    from tools import fit
    from tiny.build import call_text
    policy, dice = Policy(folder), random.Random(0)
    qs = world_questions(World(), 0, "train", 0, 4)
    images = policy.encode_images([fit(q.open(), policy.resolution) for q in qs])
    crops = policy.encode_images([fit(q.open(), policy.resolution.crop()) for q in qs])
    boxes = [(0, 8, 40, 48), (16, 24, 64, 72), (0, 24, 64, 72), (16, 8, 40, 48)]  # a number tells its place: easily learnt

    def conversation():
        i = dice.randrange(4)
        parts = [(policy.prompt(images[i], qs[i].prompt), False)]
        for _ in range(dice.choice((0, 1, 2, 2))):
            parts += [(policy.tokens(call_text(f"the {dice.choice(list(qs[i].objects))}", dice.choice(boxes))), True),
                      (policy.observation(dice.choice(crops)), False)]
        parts.append((policy.tokens(f"<answer>{dice.choice('ABCD')}</answer>"), True))
        return sum((p for p, _ in parts[1:]), parts[0][0]), [own for p, own in parts for _ in p.ids]

    for p in policy.model.model.visual.parameters():
        p.requires_grad_(False)
    optimiser = torch.optim.AdamW([p for p in policy.model.parameters() if p.requires_grad], 1.5e-2, (.9, .95))
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = 1.5e-2 * (1 - step / steps)
        batch, masks = zip(*(conversation() for _ in range(6)))
        at = torch.tensor([[*mask[1:]] + [False] * (max(map(len, masks)) + 1 - len(mask)) for mask in masks])
        logits = policy.model.lm_head(policy.hidden(list(batch))[0][at])
        logits = torch.cat([logits, torch.full((len(logits), 1), 12.)], 1)  # log 151,936: the words that have no meaning yet
        target = torch.tensor([i for t, mask in zip(batch, masks) for i, own in zip(t.ids[1:], mask[1:]) if own])
        loss = torch.nn.functional.cross_entropy(logits, target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    policy.model.resize_token_embeddings(vocabulary, mean_resizing=False)
    policy.model.save_pretrained(folder)


@pytest.fixture(scope="session")
def directories(tmp_path_factory):
    """Model directories by the name of their architecture."""
    folders = {name: tmp_path_factory.mktemp("family") / name for name in FAMILY}
    for name, folder in folders.items():
        random_model(folder, name)
    return folders
