"""Part d of docs/bench.py: how near is our code to the matrix products that it is made of?

What it teaches: a program's own limit. torch.profiler lists the operations of one run with the
shapes of their operands. The matrix products among them are then timed alone. What a run takes
longer is norms, activations, copies, and Python between operations too small to hide it. Padding
counts as work here.

Run it:  python docs/bench_limit.py             # 2 minutes -> bench.jsonl, bench.md
"""
import argparse
import os

import bench                                    # first: it finds the project
import torch
from torch.profiler import ProfilerActivity, profile

from lib.policy import Policy
from lib.shard import ShardedAdamW
from rollout import collect

KINDS = {"matrix products": ("mm", "linear", "conv"), "attention": ("scaled_dot_product",),
         "copies": ("copy_", "cat", "index", "clone", "fill_", "zero_", "scatter", "embedding")}


def profiled(function) -> tuple[dict[str, float], list[tuple]]:
    """Seconds by kind of operation, and (batch, m, k, n, how often) of each matrix product."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        whole = bench.seconds(function)
    spent, products = dict.fromkeys([*KINDS, "elementwise and the rest"], 0.), []
    for event in profiler.key_averages(group_by_input_shape=True):
        spent[kind_of(event.key)] += event.self_cpu_time_total / 1e6
        products += products_of(event.key, event.input_shapes, event.count)
    spent["Python between operations"] = max(0., whole - sum(spent.values()))
    return spent, products


def kind_of(name: str) -> str:
    for kind, words in KINDS.items():
        if any(word in name for word in words):
            return kind
    return "elementwise and the rest"


def products_of(name: str, shapes: list, count: int) -> list[tuple]:
    """Of one operation, called `count` times with these shapes. Attention is two products, queries
    x keys and weights x values, and twice as many backward; a causal one needs half of each."""
    if name in ("aten::mm", "aten::addmm", "aten::bmm"):
        left, right = shapes[1:3] if name == "aten::addmm" else shapes[:2]
        batch = left[0] if len(left) == 3 else 1
        return [(batch, left[-2], left[-1], right[-1], count)]
    if not name.startswith("aten::_scaled_dot_product_flash_attention_for_cpu"):
        return []
    if name.endswith("backward"):
        shapes, count = shapes[1:], 2 * count               # the first is the output's gradient
    (batch, heads, queries, width), keys = shapes[0], shapes[1][2]
    if queries == keys:
        count = count / 2
    return [(batch * heads, queries, width, keys, count),
            (batch * heads, queries, keys, width, count)]


def limit(products: list[tuple]) -> float:
    """Seconds that torch.matmul takes for these products alone."""
    total = 0.
    for batch, m, k, n, count in products:
        x, y = torch.randn(batch, m, k), torch.randn(batch, k, n)
        once = min(bench.seconds(lambda: torch.matmul(x, y)) for _ in range(3))
        repeat = max(1, round(.003 / max(once, 1e-6)))
        spent = bench.seconds(lambda: [torch.matmul(x, y) for _ in range(repeat)])
        total += count * spent / repeat
    return total


def part_d(pairs: int) -> list[dict]:
    policy, questions = Policy("tiny"), bench.training_questions(bench.QUESTIONS)
    optimiser, generator = ShardedAdamW(policy.freeze_vision()), torch.Generator().manual_seed(0)

    def rollouts():
        with bench.forced(policy):
            return collect(policy, questions, bench.GROUP, 3, bench.TOKENS, 1., generator)

    def update():
        bench.our_update(policy, optimiser, trajectories, advantage)

    trajectories, records = rollouts(), []
    advantage = torch.randn(len(trajectories), generator=generator)
    for name, function in (("rollouts", rollouts), ("update", update)):
        function()
        spent, products = profiled(function)
        limits, ours = bench.alternate(lambda: limit(products), function, pairs)
        flop = sum(2 * batch * m * k * n * count for batch, m, k, n, count in products)
        shares = bench.ratios([a / b for a, b in zip(limits, ours)])
        print(f"d {name}: {flop / 1e9:.1f} GFLOP, share of the limit {shares['ratio']:.2f}")
        records.append({"part": "d", "row": name, "gflop": flop / 1e9, "limit_s": limits,
                        "ours_s": ours, **shares})
        records.append({"part": "d", "row": f"operations, {name}", "seconds": spent})
    return records


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=5, help="of each comparison; default: 5")
    args = parser.parse_args()
    os.chdir(bench.ROOT)
    torch.set_num_threads(1)
    bench.measure("d", part_d, args.pairs)
