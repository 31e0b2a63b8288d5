"""TRL's side of docs/bench.py, part c: the same step with GRPOTrainer.

It takes one step for each line on standard input. TRL's own means are used throughout: multi-turn
generation with `environment_factory` (one environment a rollout, its tool returns an image as a
content block), `generate` on the CPU, GRPO's loss with beta 0, AdamW; the vision tower is frozen as
ours is. Tokens are ours: docs/engines/trl_mapo.py has the chat template and all settings. A turn
ends at </tool_call>, </answer> or <|im_end|>, and holds at most `max_tokens` tokens. The only
reward is the outcome: the semantic score is not computed.

Needs an environment of its own, that of docs/engines/trl_mapo.py. docs/bench_step.py starts it.
"""
import json
import os
import sys
import time
from pathlib import Path

from engines.trl_mapo import ROOT, make_trainer, note_answers     # first: it finds the project
import torch
import transformers
import trl
from transformers import TrainerCallback

from lib.policy import Policy
from reward import outcome


def status_mb(field: str) -> float:
    """VmRSS or VmHWM of this process (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 2**10 for line in lines if line.startswith(field))


def main() -> None:
    options = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    seen: dict = {}

    def make_rewards(tokenizer) -> list:
        def r(environments, completion_ids, **_):
            trajectories = note_answers(environments, completion_ids, tokenizer)
            outcomes = [outcome(t.question, t.answer) for t in trajectories]
            seen["tokens"] += sum(map(len, completion_ids))
            seen["calls"] += sum(len(t.turns) for t in trajectories)
            seen["accuracy"] += sum(outcomes) / len(outcomes)
            return outcomes
        return [r]

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

    path = ROOT / options["model"]
    trainer = make_trainer(Policy(path), path, options, make_rewards, OnDemand(),
                           output_dir="/tmp/bench_trl", lr_scheduler_type="constant",
                           logging_steps=10**6, seed=0)
    baseline = status_mb("VmRSS")
    versions = {"trl": trl.__version__, "transformers": transformers.__version__}
    print("RESULT " + json.dumps(versions | {"baseline_mb": baseline}), flush=True)
    trainer.train()


if __name__ == "__main__":
    main()
