"""MAPO inside verl 0.9.1: its advantage, the zoom tool, the reward, and the configuration.

What it teaches: what a large engine must be told so that it trains by mapo.py. It samples, shards
and steps by itself. What it asks for is here, and verl imports this file by its name:

    estimate      the advantage of each token, in verl's table of estimators under the name "mapo"
    Turns, Zoom   which turns go to the tool, and the tool: tools.parse, run_tool, and the score
    Loop, Output  verl's loop of turns, and its record of one, which carries the scores
    outcome_of    the reward r of eq. 2
    configure     the rest of verl's configuration; docs/engines/convert.py makes the data

verl gives an estimator of one's own only three things of a batch: token_level_rewards,
response_mask and the group. So the scores of looks travel in token_level_rewards:

    <think>.. <tool_call>..</tool_call> [crop] <think>.. <answer>B</answer>
    s of this look, at its first token                                     r, at the last token

A score is above 0, so 0 is no look. A turn of one token is none either: if the last turn is one,
r stands there. verl's curve of the score shows r plus all s; its curve of "acc" shows r alone.

docs/engines/verl_check.py runs all of it on the CPU, and names the packages. What needs GPUs was
not run; docs/engines.md says what that is, and what differs there.

Run it:  python docs/engines/verl_mapo.py MODEL TRAIN.parquet TEST.parquet [QUESTIONS.jsonl]

A last word, pixels or 1000, gives the units of boxes; else they are those of agent.json beside the
model, or of its family. docs/engines/convert.py must have written the data for the same units.

It writes runs/verl/tools.yaml and prints the command that trains; 8 s.
"""
import asyncio
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from verl.experimental.agent_loop.agent_loop import AgentLoopOutput, register
from verl.experimental.agent_loop.tool_agent_loop import ToolAgentLoop
from verl.experimental.agent_loop.tool_parser import FunctionCall, ToolParser
from verl.tools.base_tool import BaseTool
from verl.tools.schemas import OpenAIFunctionToolSchema, ToolResponse
from verl.trainer.ppo.core_algos import register_adv_est

import mapo
from lib.data import read_jsonl
from lib.labels import MAX_LABEL_WORDS
from lib.policy import Policy
from lib.question import Question
from reward import Scorer, outcome
from tools import TOOLS, ZOOM, Answer, ToolError, parse, run_tool

LEAST = 1e-6                     # of a look's score; 0 says that there was no look


# ---- the advantage -------------------------------------------------------------------------------

def turns_of(mask: Tensor) -> tuple[Tensor, Tensor]:
    """response_mask (B, L) -> the number of each token's turn (B, L), from 0; and places (B, L):
    the first token of a turn that may be a look, that is of two tokens or more."""
    own = mask.bool()
    before, after = F.pad(own[:, :-1], (1, 0)), F.pad(own[:, 1:], (0, 1))
    number = (own & ~before).cumsum(1) - 1
    return number.clamp(min=0), own & ~before & after


@register_adv_est("mapo")
def estimate(token_level_rewards: Tensor, response_mask: Tensor, index: np.ndarray, config,
             **unused) -> tuple[Tensor, Tensor]:
    """Eq. 1 to 3, 5 and 6: rewards and mask (B, L), index (B,) the group -> advantages (B, L),
    twice: verl asks for returns as well, which only a critic reads.

    Groups may have any order and any size. config.mapo: beta, lam and credit, as of train.py.
    Raises ValueError if verl has put its KL penalty into the rewards."""
    if config.get("use_kl_in_reward"):
        raise ValueError("algorithm.use_kl_in_reward: expected false, the rewards carry scores")
    number, places = turns_of(response_mask)
    r = (token_level_rewards * ~places).sum(1)                                  # (B,)
    shape = len(r), int(number.max()) + 1
    s = torch.zeros(shape).scatter_add(1, number, (token_level_rewards * places).float())
    A = torch.zeros_like(s)                                                     # (B, T)
    for group in np.unique(index):
        rows = torch.from_numpy(np.flatnonzero(index == group))
        part = mapo.advantages(r[rows].float(), s[rows], s[rows] > 0, len(rows), **config["mapo"],
                               std=config.get("norm_adv_by_std_in_grpo", True))
        A[rows] = part if part.ndim == 2 else part[:, None].expand(-1, shape[1])
    A = A.gather(1, number) * response_mask                                     # (B, L)
    return A, A


# ---- sampling ------------------------------------------------------------------------------------

class Output(AgentLoopOutput):
    """verl's record of a trajectory, whose rewards carry the scores of its looks as well."""

    def as_dict(self) -> dict:
        fields = super().as_dict()
        scores = self.extra_fields.get("tool_rewards", [])       # one for each turn but the last
        number, places = turns_of(fields["response_mask"][None])
        for place in places[0].nonzero()[:, 0].tolist():
            if number[0, place] < len(scores):
                fields["rm_scores"][place] = scores[number[0, place]]
        return fields


@register("mapo_agent")
class Loop(ToolAgentLoop):
    """verl's loop of turns and tools. It notes the last turn, for the reward."""

    async def run(self, *args, **kwargs) -> Output:
        output = await super().run(*args, **kwargs)
        mask, ids = torch.tensor(output.response_mask), torch.tensor(output.response_ids)
        number = turns_of(mask[None])[0][0]
        last = ids[mask.bool() & (number == number.max())]
        output.extra_fields["last_turn"] = self.tokenizer.decode(last, skip_special_tokens=False)
        return Output.model_construct(output.model_fields_set, **dict(output))


@ToolParser.register("mapo")
class Turns(ToolParser):
    """Every turn goes to the tool, as a whole, unless tools.parse ends the trajectory with it. So
    an agent reads our errors also where its call is no JSON: verl's own parser would end there."""

    async def extract_tool_calls(self, responses_ids: list[int], tools: list | None = None):
        text = self.tokenizer.decode(responses_ids, skip_special_tokens=False)
        try:
            over = isinstance(parse(text, (1000, 1000)), Answer)
        except ToolError as error:
            over = error.final
        call = FunctionCall(name=ZOOM, arguments=json.dumps({"turn": text}))
        return text, [] if over else [call]


class Zoom(BaseTool):
    """config: see `configure`. The encoder's resolution is the agent's, too."""

    def __init__(self, config: dict, tool_schema: OpenAIFunctionToolSchema | None = None):
        super().__init__(config, tool_schema)
        questions = list(read_jsonl(config["questions"]))[:64] if config["questions"] else None
        policy = Policy(config["model"], coordinates=config["coordinates"] or None)
        self.scorer = Scorer(policy, questions)

    def get_openai_tool_schema(self) -> OpenAIFunctionToolSchema:
        label = {"type": "string", "description": f"at most {MAX_LABEL_WORDS} words"}
        box = {"type": "array", "description": "[x1, y1, x2, y2]"}
        parameters = {"type": "object", "properties": {"label": label, "bbox_2d": box},
                      "required": ["label", "bbox_2d"]}
        function = {"name": ZOOM, "description": TOOLS[ZOOM].description, "parameters": parameters}
        return OpenAIFunctionToolSchema.model_validate({"type": "function", "function": function})

    async def execute(self, instance_id: str, parameters: dict, **kwargs):
        """The crop and its semantic score; or what is wrong, and 0."""
        image = kwargs["agent_data"].image_data[0]
        return await asyncio.to_thread(self.look, image, parameters["turn"])

    @torch.no_grad()
    def look(self, image: Image.Image, text: str) -> tuple[ToolResponse, float, dict]:
        policy = self.scorer.policy
        space = policy.space(policy.resolution.size(*image.size))
        try:
            call = parse(text, space)
            crop, _ = run_tool(image, call, space, policy.resolution)
        except ToolError as error:
            return ToolResponse(text=str(error)), 0., {"error": error.kind}
        score = self.scorer([call.label], policy.encode_images([crop])).item()
        return ToolResponse(image=[crop]), max(score, LEAST), {}


def outcome_of(data_source: str, solution_str: str, ground_truth: str, extra_info: dict,
               **unused) -> dict:
    """verl's reward function: r, by the last turn alone. docs/engines/convert.py wrote the rest."""
    text = extra_info.get("last_turn", solution_str)
    try:
        action = parse(text, (1000, 1000))
    except ToolError:
        action = None
    answer = action.text if isinstance(action, Answer) else None
    choices = tuple(extra_info.get("choices", ()))
    r = outcome(Question("", ground_truth, None, choices), answer)
    return {"score": r, "acc": r}


# ---- configuration -------------------------------------------------------------------------------

OVERRIDES = """
algorithm.adv_estimator=mapo +algorithm.mapo={beta:0.4,lam:0.95,credit:aim}
actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean
actor_rollout_ref.actor.ppo_mini_batch_size=64
actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4
actor_rollout_ref.model.external_lib=verl_mapo
actor_rollout_ref.rollout.name=vllm actor_rollout_ref.rollout.n=8
actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=4
actor_rollout_ref.rollout.agent.default_agent_loop=mapo_agent
actor_rollout_ref.rollout.multi_turn.enable=true actor_rollout_ref.rollout.multi_turn.format=mapo
actor_rollout_ref.rollout.multi_turn.max_assistant_turns=4
reward.custom_reward_function.path=pkg://verl_mapo reward.custom_reward_function.name=outcome_of
data.train_batch_size=64 data.max_prompt_length=4096 data.max_response_length=4096
trainer.logger=[console] trainer.n_gpus_per_node=8
"""


def configure(model: str, train: str, test: str, questions: str = "", coordinates: str = ""
              ) -> list[str]:
    """Write the tool's file; returns the overrides of verl's ppo_trainer configuration.

    model: a directory, the agent's at first and the frozen encoder's. questions: a .jsonl from
    whose pictures reference crops are cut; "": the embedded world. coordinates: of boxes, as of
    train.py. All paths are absolute: verl's workers run elsewhere."""
    file = ROOT / "runs/verl/tools.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    settings = {"type": "native", "model": model, "questions": questions,
                "coordinates": coordinates}
    tool = {"class_name": "verl_mapo.Zoom", "config": settings}
    file.write_text(json.dumps({"tools": [tool]}, indent=1))              # JSON is YAML, too
    return OVERRIDES.split() + [
        f"actor_rollout_ref.model.path={model}", f"data.train_files={train}",
        f"data.val_files={test}",
        f"actor_rollout_ref.rollout.multi_turn.tool_config_path={file}"]


if __name__ == "__main__":
    given = sys.argv[1:]
    units = given.pop() if given[-1:] in (["pixels"], ["1000"]) else ""
    if len(given) not in (3, 4):
        sys.exit("expected MODEL TRAIN.parquet TEST.parquet, and perhaps QUESTIONS.jsonl, and "
                 "pixels or 1000 as the units of boxes")
    overrides = configure(*map(os.path.abspath, given), coordinates=units)
    words = [f"'{word}'" for word in overrides]
    print("PYTHONPATH=docs/engines python -m verl.trainer.main_ppo", *words, sep=" \\\n    ")
