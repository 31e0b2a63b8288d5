"""TRL's side of docs/bench.py, part c: the same step with GRPOTrainer.

It takes one step for each line on standard input. TRL's own means are used throughout: multi-turn
generation with `environment_factory` (one environment a rollout, its tool returns an image as a
content block), `generate` on the CPU, GRPO's loss with beta 0, AdamW; the vision tower is frozen as
ours is. Tokens are ours: the chat template below writes what lib/policy.py writes. A turn ends at
</tool_call>, </answer> or <|im_end|>, and holds at most `max_tokens` tokens.

Needs, in an environment of its own: torch transformers trl datasets accelerate pillow numpy
jmespath. docs/bench_step.py starts it.
"""
import json
import os
import sys
import time
from functools import lru_cache
from pathlib import Path

os.environ.update(TRL_EXPERIMENTAL_SILENCE="1", HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch
import transformers
import trl
from datasets import Dataset
from transformers import (AutoTokenizer, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor,
                          TrainerCallback)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.processing_utils import ProcessorMixin
from trl import GRPOConfig, GRPOTrainer
from trl.chat_template_utils import qwen3_template

from tiny.world import World, world_questions
from reward import outcome
from tools import Answer, Resolution, ToolError, fit, parse, parse_call, run_tool

# Jinja: `{%-` and `-%}` swallow the line breaks beside them, so that lines can be cut here.
CHAT = """{%- for message in messages %}
{%- if message['role'] == 'tool' %}
{{- '<|im_end|>\\n<|im_start|>user\\n<tool_response>' }}
{%- else %}
{{- '<|im_start|>' + message['role'] + '\\n' }}
{%- endif %}
{%- if message['content'] is string %}
{{- message['content'] }}
{%- else %}
{%- for part in message['content'] %}
{%- if part['type'] == 'image' %}
{{- '<|vision_start|><|image_pad|><|vision_end|>' }}
{%- else %}
{{- part['text'] }}
{%- endif %}
{%- endfor %}
{%- endif %}
{%- for call in message.tool_calls or [] %}
{%- set call = call.function or call %}
{{- '<tool_call>{"name": "' + call.name + '", "arguments": ' }}
{{- (call.arguments | tojson) + '}</tool_call>' }}
{%- endfor %}
{%- if message['role'] == 'tool' %}
{{- '</tool_response>' }}
{%- endif %}
{%- if not message.tool_calls %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}"""


class Processor(Qwen2_5_VLProcessor):
    """Without the video part, which asks for torchvision: PIL prepares images, as in our policy."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **_):
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def status_mb(field: str) -> float:
    """VmRSS or VmHWM of this process (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 2**10 for line in lines if line.startswith(field))


def main() -> None:
    options = json.loads(sys.argv[1])
    model_path = ROOT / options["model"]
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "</tool_call>", "</answer>"])
    tokenizer.eos_token, tokenizer.padding_side = "<|endoftext|>", "left"   # no template writes it
    tokenizer.response_template = qwen3_template
    images = Qwen2VLImageProcessorPil.from_pretrained(model_path)
    processor = Processor(image_processor=images, tokenizer=tokenizer, chat_template=CHAT)
    resolution = Resolution(images.patch_size * images.merge_size, images.size["shortest_edge"],
                            images.size["longest_edge"], int(images.resample))
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(model_path, dtype=torch.float32)
    model.generation_config.eos_token_id = ends
    model.model.visual.requires_grad_(False)

    @lru_cache(2 * options["questions"])
    def scene(index: int):
        question = world_questions(World(options=4), 0, "train", index, 1)[0]
        image = question.open()
        return question, image, fit(image, resolution)

    class Environment:
        def reset(self, index: int, **_):
            self.question, self.image, self.overview = scene(index)
            return [{"type": "image", "image": self.overview},
                    {"type": "text", "text": self.question.prompt}]

        def image_zoom_in_tool(self, label: str, bbox_2d: list[float]) -> list:
            """Zoom in on a region of the image.

            Args:
                label: What the region shows.
                bbox_2d: [x1, y1, x2, y2] in pixels of the image.
            """
            arguments = {"label": label, "bbox_2d": bbox_2d}
            text = json.dumps({"name": "image_zoom_in_tool", "arguments": arguments})
            call = parse_call(text, self.overview.size)
            crop, _ = run_tool(self.image, call, self.overview.size, resolution)
            return [{"type": "image", "image": crop}]

    def reward(completion_ids, index, **_):
        scores = []
        texts = tokenizer.batch_decode(completion_ids)
        for text, i in zip(texts, index):
            question, _, overview = scene(i)
            try:
                action = parse(text.rsplit("<|im_start|>assistant\n", 1)[-1], overview.size)
            except ToolError:
                action = None
            answer = action.text if isinstance(action, Answer) else None
            scores.append(outcome(question, answer))
        seen["tokens"] += sum(map(len, completion_ids))
        seen["calls"] += sum(text.count("<tool_response>") for text in texts)
        seen["accuracy"] += sum(scores) / len(scores)
        return scores

    class OnDemand(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            if not sys.stdin.readline().strip():
                os._exit(0)
            seen.update(tokens=0, calls=0, accuracy=0.)
            self.start = time.perf_counter(), time.process_time()

        def on_step_end(self, args, state, control, **_):
            wall, cpu = self.start
            result = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu,
                      "peak_mb": status_mb("VmHWM") - baseline, **seen}
            print("RESULT " + json.dumps(result), flush=True)

    seen: dict = {}
    agent = json.loads((model_path / "agent.json").read_text(encoding="utf-8"))
    opening = [{"role": "user", "content": ""}]
    if agent["system_prompt"]:
        opening.insert(0, {"role": "system", "content": agent["system_prompt"]})
    rows, turns = options["questions"] * options["group"], options["max_turns"]
    micro = min(options["micro_rows"], rows)
    arguments = GRPOConfig(
        output_dir="/tmp/bench_trl", use_cpu=True, bf16=False, gradient_checkpointing=False,
        report_to="none", save_strategy="no", disable_tqdm=True, logging_steps=10**6,
        max_steps=options["steps"], per_device_train_batch_size=micro,
        gradient_accumulation_steps=rows // micro, num_generations=options["group"],
        max_completion_length=turns * (options["max_tokens"] + 24),
        generation_kwargs={"max_new_tokens": options["max_tokens"]},
        max_tool_calling_iterations=turns - 1, temperature=1.0, beta=0.0, loss_type="grpo",
        num_iterations=1, epsilon=.2, learning_rate=options["lr"], lr_scheduler_type="constant",
        adam_beta2=.95, max_grad_norm=1., shuffle_dataset=False, dataloader_pin_memory=False,
        seed=0)
    count = options["questions"] * options["steps"]
    data = Dataset.from_list([{"prompt": opening, "index": i} for i in range(count)])
    trainer = GRPOTrainer(model=model, reward_funcs=[reward], args=arguments, train_dataset=data,
                          processing_class=processor, environment_factory=Environment,
                          callbacks=[OnDemand()])
    baseline = status_mb("VmRSS")
    versions = {"trl": trl.__version__, "transformers": transformers.__version__}
    print("RESULT " + json.dumps(versions | {"baseline_mb": baseline}), flush=True)
    trainer.train()


if __name__ == "__main__":
    main()
