"""MAPO in another engine: TRL's GRPOTrainer, with two reward functions and no patch.

What it teaches: credit for whole trajectories is all in the rewards. TRL adds the values of its
reward functions with `reward_weights`, and normalises the sum within the group. With the outcome r
and the trajectory's score S as the two functions, and the weights 1 - beta and beta, that is eq. 2
and 3 of mapo.py, but for two constants: TRL's std divides by G - 1, ours by G, and TRL adds 1e-4
to it, we 1e-6.

The environment, one a rollout, carries out the calls and notes the looks; the frozen base model
scores them (reward.Scorer). docs/engines.md has the numbers, and says what was not run.

Needs an environment of its own:

    python -m venv /tmp/trl
    /tmp/trl/bin/pip install torch==2.13.0 transformers==5.23.0 trl==1.16.0 datasets accelerate \\
        pillow numpy tqdm jmespath

Run it:  /tmp/trl/bin/python docs/engines/trl_mapo.py            # two and a half minutes
         /tmp/trl/bin/torchrun --nproc-per-node 2 docs/engines/trl_mapo.py
"""
import argparse
import json
import os
import sys
import time
from functools import lru_cache, partial
from pathlib import Path

os.environ.update(TRL_EXPERIMENTAL_SILENCE="1", HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")
HERE = Path(__file__).parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(ROOT))

import torch
from transformers import (AutoTokenizer, PreTrainedTokenizerBase, PrinterCallback,
                          Qwen2_5_VLProcessor, TrainerCallback)
from transformers.processing_utils import ProcessorMixin

import mapo
from eval import evaluate, summary, table
from lib.policy import Policy, Tokens
from reward import Scorer, outcome, rewards, score_looks
from rollout import Trajectory, Turn
from tiny.world import World, world_question, world_questions
from tools import ZOOM, Answer, Resolution, ToolError, fit, parse, parse_call, run_tool


# ---- the environment -----------------------------------------------------------------------------

@lru_cache(64)
def scene(index: int, resolution: Resolution) -> tuple:
    """Training question number `index`, its image, and the overview of it."""
    question = world_question(World(), 0, "train", index)
    image = question.open()
    return question, image, fit(image, resolution)


class Environment:
    """One rollout's, as TRL asks for it: `reset`, and each other public method is a tool.

    It notes what the agent did in a trajectory of ours: only question, turns and answer."""

    def __init__(self, resolution: Resolution):
        self.resolution = resolution

    def reset(self, index: int, **_) -> list[dict]:
        question, self.image, overview = scene(index, self.resolution)
        nothing, seen = Tokens([]), overview.size
        self.trajectory = Trajectory(question, nothing, nothing, [], [], seen, space=seen)
        return [{"type": "image", "image": overview}, {"type": "text", "text": question.prompt}]

    def image_zoom_in_tool(self, label: str, bbox_2d: list[float]) -> list:
        """Zoom in on a region of the image.

        Args:
            label: What the region shows.
            bbox_2d: [x1, y1, x2, y2] in pixels of the image.
        """
        arguments = {"label": label, "bbox_2d": bbox_2d}
        turn = Turn(json.dumps({"name": ZOOM, "arguments": arguments}), slice(0, 0))
        self.trajectory.turns.append(turn)
        space = self.trajectory.space
        try:
            call = parse_call(turn.text, space)
            turn.crop, turn.box = run_tool(self.image, call, space, self.resolution)
        except ToolError as error:
            turn.error, turn.message = error.kind, str(error)
            return [{"type": "text", "text": turn.message}]
        turn.call = call
        return [{"type": "image", "image": turn.crop}]


def note_answers(environments: list[Environment], completion_ids: list[list[int]],
                 tokenizer: PreTrainedTokenizerBase) -> list[Trajectory]:
    """The environments' trajectories, with the answer of each one's last turn."""
    trajectories = [environment.trajectory for environment in environments]
    for trajectory, text in zip(trajectories, tokenizer.batch_decode(completion_ids)):
        try:
            action = parse(text.rsplit("<|im_start|>assistant\n", 1)[-1], trajectory.space)
        except ToolError:
            continue
        if isinstance(action, Answer):
            trajectory.answer = action.text
    return trajectories


# ---- the two reward functions --------------------------------------------------------------------

def make_rewards(tokenizer: PreTrainedTokenizerBase, scorer: Scorer, lam: float = .95) -> list:
    """r and S as TRL calls them: with the environments and ids of N rollouts -> N numbers each."""

    def r(environments: list[Environment], completion_ids: list[list[int]], **_) -> list[float]:
        trajectories = note_answers(environments, completion_ids, tokenizer)
        return [outcome(t.question, t.answer) for t in trajectories]

    def S(environments: list[Environment], **_) -> list[float]:
        trajectories = [environment.trajectory for environment in environments]
        looks = [turn for trajectory in trajectories for turn in trajectory.looks]
        crops = scorer.policy.encode_images([turn.crop for turn in looks])
        for turn, crop in zip(looks, crops):
            turn.crop_tokens = crop
        score_looks(trajectories, scorer)
        _, s, looked = rewards(trajectories)
        return mapo.trajectory_score(s, looked, lam).tolist()

    return [r, S]


# ---- what TRL needs to speak with our agent ------------------------------------------------------

class Processor(Qwen2_5_VLProcessor):
    """Without the video part, which asks for torchvision: PIL prepares images, as in our policy."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **_):
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def make_processor(policy: Policy, path: Path) -> Processor:
    """TRL's reader of texts and images. Also tells `generate` where a turn of the policy ends."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "</tool_call>", "</answer>"])
    policy.model.generation_config.eos_token_id = ends
    tokenizer.eos_token, tokenizer.padding_side = "<|endoftext|>", "left"   # no template writes it
    chat = (HERE / "chat.jinja").read_text()
    return Processor(image_processor=policy.processor, tokenizer=tokenizer, chat_template=chat)


def make_trainer(policy: Policy, path: Path, options: dict, reward_funcs, callback, **more):
    """A GRPOTrainer whose step is one of train.py's with `--updates 1`; more: of its settings.

    reward_funcs(tokenizer) -> its reward functions."""
    from datasets import Dataset
    from trl import GRPOTrainer
    from trl.chat_template_utils import qwen3_template
    policy.freeze_vision()
    processor = make_processor(policy, path)
    processor.tokenizer.response_template = qwen3_template      # how TRL finds a tool call
    prompt = [{"role": "user", "content": ""}]                  # reset() adds image and question
    if policy.system_prompt:
        prompt.insert(0, {"role": "system", "content": policy.system_prompt})
    count = options["questions"] * options["steps"]
    trainer = GRPOTrainer(
        model=policy.model, reward_funcs=reward_funcs(processor.tokenizer),
        args=make_config(options, **more), processing_class=processor, callbacks=[callback],
        train_dataset=Dataset.from_list([{"prompt": prompt, "index": i} for i in range(count)]),
        environment_factory=partial(Environment, policy.resolution))
    trainer.remove_callback(PrinterCallback)                    # 25 numbers a step
    return trainer


def make_config(options: dict, **more):
    """TRL's settings. The processes of torchrun or accelerate share the rows of a step.

    Raises ValueError if the rows make no whole micro-batches: TRL would leave some out."""
    from trl import GRPOConfig
    whole, processes = options["questions"] * options["group"], int(os.environ.get("WORLD_SIZE", 1))
    most, rows, turns = options["micro_rows"], whole // processes, options["max_turns"]
    micro = min(most, rows)
    if rows * processes < whole or rows % micro:
        raise ValueError(f"--questions x --group: expected for each of {processes} processes at "
                         f"most {most} rows, or a multiple of {most}; found {whole} in all")
    return GRPOConfig(
        use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none",
        save_strategy="no", disable_tqdm=True, max_steps=options["steps"],
        per_device_train_batch_size=micro, gradient_accumulation_steps=rows // micro,
        num_generations=options["group"],
        max_completion_length=turns * (options["max_tokens"] + 24),
        generation_kwargs={"max_new_tokens": options["max_tokens"]},
        max_tool_calling_iterations=turns - 1, temperature=1.0, beta=0.0, loss_type="grpo",
        num_iterations=1, epsilon=.2, learning_rate=options["lr"], adam_beta2=.95,
        max_grad_norm=1., shuffle_dataset=False, dataloader_pin_memory=False, **more)


# ---- the run -------------------------------------------------------------------------------------

class Progress(TrainerCallback):
    """A line a step, of rank 0."""

    def on_log(self, args, state, control, logs, **_):
        if state.is_world_process_zero and "rewards/r/mean" in logs:
            r, S = logs["rewards/r/mean"], logs["rewards/S/mean"]
            print(f"step {state.global_step}/{state.max_steps}  accuracy {r:.2f}  S {S:.2f}  "
                  f"calls {logs['tools/call_frequency']:.2f}", flush=True)


def judge(policy: Policy, scorer: Scorer, count: int) -> None:
    """Held-out questions: those that train.py asks, asked in the same way."""
    questions = world_questions(World(), 0, "test", 0, count)
    for name, temperature in (("greedy", 0.), ("sampled", 1.)):
        answers = evaluate(policy, questions, scorer, temperature)
        print(f"\nafter training, {name}\n{table(summary(answers, questions))}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=str(ROOT / "tiny"))
    parser.add_argument("--out", default="runs/trl-mapo", help="where the trained agent goes")
    parser.add_argument("--beta", type=float, default=mapo.ALGORITHMS["mapo"].beta)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--questions", type=int, default=8, help="a step, of all processes")
    parser.add_argument("--group", type=int, default=8, help="trajectories a question")
    parser.add_argument("--lr", type=float, default=1.5e-4)
    parser.add_argument("--seed", type=int, default=0, help="of sampling")
    parser.add_argument("--eval_questions", type=int, default=200)
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    policy, scorer = Policy(args.model), Scorer(Policy(args.model))
    limits = {"max_turns": 4, "max_tokens": 64, "micro_rows": 32}
    trainer = make_trainer(policy, args.model, vars(args) | limits,
                           partial(make_rewards, scorer=scorer), Progress(), output_dir=args.out,
                           reward_weights=[1 - args.beta, args.beta], logging_steps=1,
                           lr_scheduler_type="constant_with_warmup", warmup_steps=5,
                           seed=args.seed)
    wall, cpu = time.perf_counter(), time.process_time()
    trainer.train()
    if trainer.is_world_process_zero():
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        print(f"training took {wall:.0f} s, {cpu:.0f} s of CPU")
        trained = Policy(args.model)              # only weights: TRL changed where texts end
        trained.model.load_state_dict(policy.model.state_dict())
        trained.save(args.out)
        judge(trained, scorer, args.eval_questions)


if __name__ == "__main__":
    main()
