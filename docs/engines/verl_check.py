"""docs/engines/verl_mapo.py beside our own code: one conversation, one advantage.

What it teaches: whether another engine does what ours does. verl's own loop of turns runs here on
the CPU. `Server` stands for vLLM, and answers with tiny/ and our sampler; `Processor` stands for
Qwen's. The same seed must give the same tokens as rollout.collect. Then verl's `compute_advantage`
must give what mapo.advantages gives.

Run it, in the environment of docs/references.py with these packages (14 s):

    pip install --no-deps cachetools torchdata uvicorn fastapi starlette peft
    pip install --no-deps opentelemetry-api opentelemetry-sdk opentelemetry-exporter-prometheus
    python docs/engines/verl_check.py                          # and tiny/'s weights
    python docs/engines/verl_check.py runs/mapo/step-000030    # those of a checkpoint
"""
import asyncio
import contextlib
import io
import sys
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import numpy as np
import torch
from hydra import compose, initialize_config_module
from verl import DataProto
from verl.experimental.agent_loop.agent_loop import DictConfigWrap, ToolListWrap
from verl.tools.tool_registry import initialize_tools_from_config
from verl.trainer.ppo.ray_trainer import compute_advantage
from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl.utils.config import omega_conf_to_dataclass, validate_config
from verl.utils.model import get_hf_auto_model_class
from verl.utils.tensordict_utils import list_of_dict_to_tensordict
from verl.workers.config import HFModelConfig
from verl.workers.rollout.replica import TokenOutput

import mapo
import verl_mapo
from lib.batches import spread
from lib.policy import Policy, Tokens
from lib.question import Question
from lib.sampler import Session
from reward import rewards, score_looks
from rollout import Trajectory, collect
from tiny.world import World, world_questions
from tools import fit, zoom_call


PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"


# ---- the configuration, and the tool as verl builds it from its file -----------------------------

def composed(overrides: list[str]):
    """The configuration as verl.trainer.main_ppo reads and checks it. It raises what that does."""
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", overrides)
    validate_config(config, need_reference_policy(config), need_critic(config))
    omega_conf_to_dataclass(config.actor_rollout_ref.rollout)
    return config


def prepare() -> tuple:
    words = verl_mapo.configure(str(ROOT / "tiny"), "train.parquet", "test.parquet")
    config = composed(words)
    file = config.actor_rollout_ref.rollout.multi_turn.tool_config_path
    with contextlib.redirect_stdout(io.StringIO()):              # verl prints the tool's schema
        tool, = initialize_tools_from_config(file)
    return config, tool


# ---- verl's loop on the CPU ----------------------------------------------------------------------

class Server:
    """What verl asks of vLLM, in one function: ids and pictures -> the next turn's ids."""

    def __init__(self, policy: Policy, generator: torch.Generator):
        self.policy, self.generator = policy, generator

    async def generate(self, prompt_ids: list[int], image_data: list, **unused) -> TokenOutput:
        overview = fit(image_data[0], self.policy.resolution)
        images = self.policy.encode_images([overview, *image_data[1:]])
        grids = [image.grids[0] for image in images]
        tokens = Tokens(prompt_ids, grids, [image.features[0] for image in images])
        ids, logps = Session(self.policy, [tokens], 1).sample(64, 1., self.generator)
        return TokenOutput(token_ids=ids[0], log_probs=logps[0])


class Processor:
    """Messages -> ids, as the policy writes them. Qwen's own processor asks for torchvision."""

    def __init__(self, policy: Policy):
        self.policy, self.image_processor = policy, policy.processor

    def apply_chat_template(self, messages: list[dict], add_generation_prompt: bool, **unused
                            ) -> str:
        """An agent of tiny/ ends a turn with its call, so the next message closes it."""
        text = ""
        for message in messages:
            role, content = message["role"], message["content"]
            if not isinstance(content, str):
                content = "".join(part.get("text", PICTURE) for part in content)
            if role == "tool":
                text += "<|im_end|>\n<|im_start|>user\n"
                content = f"<tool_response>{content}</tool_response>"
            else:
                text += f"<|im_start|>{role}\n"
            text += content if message.get("tool_calls") else f"{content}<|im_end|>\n"
        return text + "<|im_start|>assistant\n" * add_generation_prompt

    def __call__(self, text: list[str], images: list | None, **unused) -> dict:
        """The ids of one text, with a placeholder for each feature of its pictures."""
        parts = text[0].split("<|image_pad|>")
        fitted = [fit(image, self.policy.resolution) for image in images or []]
        tokens = self.policy.tokens(parts[0])
        for image, part in zip(self.policy.encode_images(fitted), parts[1:], strict=True):
            tokens = self.policy.tokens(tokens, image, part)
        return {"input_ids": tokens.ids}


class Pictures:
    """The pictures of a conversation as they are; verl's data set asks qwen_vl_utils for them."""

    @classmethod
    async def process_vision_info(cls, messages: list[dict], **unused) -> tuple:
        return [part["image"] for part in messages[-1]["content"] if "image" in part], None


def verl_loop(config, tool, generator: torch.Generator) -> verl_mapo.Loop:
    policy = tool.scorer.policy
    return verl_mapo.Loop(
        trainer_config=DictConfigWrap(config), server_manager=Server(policy, generator),
        tokenizer=policy.tokenizer, processor=Processor(policy), dataset_cls=Pictures,
        data_config=DictConfigWrap(config.data), hf_model_type="qwen2_5_vl",
        tools=ToolListWrap([tool]))


async def converse(config, tool, questions: list[Question], generator: torch.Generator
                   ) -> list[verl_mapo.Output]:
    """A trajectory of each question by verl's loop, with its reward; one after the other."""
    loop, outputs = verl_loop(config, tool, generator), []
    for question in questions:
        content = [{"type": "image", "image": question.open()},
                   {"type": "text", "text": question.prompt}]
        output = await loop.run({}, raw_prompt=[{"role": "user", "content": content}])
        extra = {"choices": question.choices, **output.extra_fields}
        output.reward_score = verl_mapo.outcome_of("mapo", "", question.answer, extra)["score"]
        outputs.append(output)
    return outputs


# ---- one conversation, one advantage -------------------------------------------------------------

def ours(trajectories: list[Trajectory], settings) -> list[torch.Tensor]:
    """The advantage of each token of each response, 0 where the token is not the agent's."""
    group = sum(t.question is trajectories[0].question for t in trajectories)
    A = spread(mapo.advantages(*rewards(trajectories), group, **settings), trajectories)
    rows = []
    for row, trajectory in zip(A, trajectories):
        own = torch.tensor(trajectory.mask)
        row = row[:len(own) - 1] * own[1:]                     # column j speaks of token j + 1
        rows.append(row[len(trajectory.prompt.ids) - 1:])
    return rows


def theirs(outputs: list[verl_mapo.Output], groups: list[str], algorithm) -> torch.Tensor:
    """The same by verl: the batch as its trainer makes it, and its compute_advantage."""
    rows = []
    for output in outputs:
        fields = output.as_dict()
        rows.append({name: fields[name] for name in ("response_mask", "rm_scores")})
    data = DataProto(batch=list_of_dict_to_tensordict(rows).to_padded_tensor())
    data.batch["token_level_rewards"] = data.batch["rm_scores"]
    data.non_tensor_batch["uid"] = np.array(groups, dtype=object)
    data = compute_advantage(data, algorithm.adv_estimator, config=algorithm)
    return data.batch["advantages"]


def compare(config, tool, count: int = 2, group: int = 4) -> dict[str, tuple[float, float]]:
    """Both engines on `group` trajectories of `count` questions of the world.

    Raises AssertionError if a token, a mask or an outcome differs. Returns for each credit the
    largest difference of two advantages, and the largest advantage."""
    questions = world_questions(World(), 0, "train", 0, count)
    asked = [question for question in questions for _ in range(group)]
    outputs = asyncio.run(converse(config, tool, asked, torch.Generator().manual_seed(0)))
    generator, trajectories = torch.Generator().manual_seed(0), []
    for question in asked:
        trajectories += collect(tool.scorer.policy, [question], generator=generator)
    score_looks(trajectories, tool.scorer)
    for output, trajectory, r in zip(outputs, trajectories, rewards(trajectories)[0]):
        start = len(trajectory.prompt.ids)
        assert output.prompt_ids + output.response_ids == trajectory.tokens.ids
        assert output.response_mask == [int(own) for own in trajectory.mask[start:]]
        assert output.reward_score == r
    found = {}
    for credit in mapo.CREDITS:
        config.algorithm.mapo.credit = credit
        A = theirs(outputs, [question.id for question in asked], config.algorithm)
        rows = ours(trajectories, config.algorithm.mapo)
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        found[credit] = (A - padded).abs().max().item(), A.abs().max().item()
    return found


def load(folder: Path) -> int:
    """Our model directory, read as verl's workers read it. Returns the number of its tensors.

    Raises AssertionError if one of them is not ours."""
    found = HFModelConfig(path=str(folder))
    kind = get_hf_auto_model_class(found.hf_config)
    model = kind.from_pretrained(folder, config=found.hf_config, dtype=torch.float32,
                                 attn_implementation="sdpa")       # verl's own choice needs a GPU
    theirs, ours = model.state_dict(), Policy(folder).model.state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)
    return len(ours)


def demonstrate() -> None:
    (config, tool), count, group = prepare(), 4, 4
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "tiny"
    print(f"{folder}: verl reads its {load(folder)} tensors unchanged")
    print("verl's parser took the configuration: algorithm.mapo =", config.algorithm.mapo)
    found = compare(config, tool, count, group)
    print(f"{count} questions x {group}: verl's loop and rollout.collect wrote the same tokens")
    for credit, (difference, largest) in found.items():
        print(f"credit {credit:10} largest difference {difference:.1e}, "
              f"largest advantage {largest:.2f}")
    question = world_questions(World(), 0, "train", 0, 1)[0]
    name, plate = next(iter(question.objects.items()))
    box = [round(plate[0] / 8) - 4, round(plate[1] / 8) - 4,     # the overview is 8 times smaller
           round(plate[2] / 8) + 4, round(plate[3] / 8) + 4]
    data = SimpleNamespace(image_data=[question.open()])
    for turn in (zoom_call(f"the {name}", box), zoom_call("the object", box), "<tool_call>{"):
        answer, score, _ = asyncio.run(tool.execute("", {"turn": turn}, agent_data=data))
        shown = answer.text or f"a crop of {answer.image[0].size}"
        print(f"{turn}\n    -> {shown}, score {score:.3f}")
    extra = {"last_turn": f"<answer>{question.answer}</answer>", "choices": question.choices}
    print("reward of the right answer:", verl_mapo.outcome_of("", "", question.answer, extra))


if __name__ == "__main__":
    torch.set_num_threads(1)
    demonstrate()
