"""How fast is it, against the usual ways, against another library, and against the machine's own limit?

    a  rollouts: ours against Hugging Face `generate`, called once a turn on the whole conversation
    b  updates: ours against padded batches in order of arrival and log_softmax of all logits; and their memory
    c  a whole step: ours against TRL's GRPOTrainer (docs/bench_trl.py)
    d  the limit: the step's matrix products alone, timed as torch.matmul on the same shapes; and where the time goes
    e  growth: time a trajectory against turns, group and image size, and on two ranks

Every comparison alternates A, B, A, B in one run and takes the median of the pairs' ratios, so that whatever else the
machine does hits both. Seconds are CPU seconds of the process (all its threads): on an idle machine, with one thread, the
same as wall time, but a busy neighbour does not count; `--clock wall` for the other. Memory is the peak of a fresh process
over what it held before (VmHWM: ru_maxrss of a child begins at its parent's size). "Forced" rows make the work equal: the
tokens that would end a turn are banned on both sides, every turn has exactly --tokens tokens and every crop is the same.

Run it:  python docs/bench.py                                  # all but c; writes docs/bench.md and docs/bench.jsonl
         python docs/bench.py --parts a d                      # only these; the other parts' results stay
         python docs/bench.py --trl .venv-trl/bin/python       # with c
Part c needs a second environment (python -m venv .venv-trl; its pip install torch==2.13.0 transformers==5.23.0 pillow numpy tqdm
trl==1.16.0 datasets accelerate jmespath); the rest needs requirements.txt. Linux, for /proc.
"""
import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse
import contextlib
import dataclasses
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch
import torch.nn.functional as F
import transformers
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForImageTextToText

from lib import data
import mapo
import reward
import rollout
import train
from tiny.world import World, world_questions
from lib.policy import Policy, Tokens
from lib.sampler import Session
from reward import Scorer, score
from rollout import Trajectory, Turn, act, collect, extend
from lib.shard import ShardedAdamW
from tools import Resolution, fit

MICRO = train.Config.micro_tokens
TARGETS = {  # row of the results -> (target in words, whether larger is better, number)
    "a forced 3": (">= 4", True, 4), "a forced 6": (">= 6", True, 6),
    "b tiny": (">= 1.5", True, 1.5), "b vocabulary": (">= 1.5", True, 1.5),
    "b memory tiny": ("<= 0.6", False, .6), "b memory vocabulary": ("<= 0.6", False, .6),
    "c": (">= 5", True, 5), "c memory": ("< 1", False, 1), "d update": (">= 0.5", True, .5), "d rollouts": (">= 0.25", True, .25),
    "e turns": ("<= 7", False, 7), "e group": ("<= 0.7", False, .7)}


# ---- what the project gives: the only functions here that know how it is called ------------------------------------------

def load(path) -> tuple[Policy, ShardedAdamW]:
    """A policy whose vision tower is frozen, as train.py has it, and the optimiser that gathers its gradients."""
    policy = Policy(path)
    return policy, ShardedAdamW(policy.learners())


def our_update(policy: Policy, optimiser: ShardedAdamW, trajectories, advantage, micro_tokens: int = MICRO, algo: str = "grpo") -> None:
    config = train.parse_config(["--algo", algo, "--micro_tokens", str(micro_tokens)])
    train.accumulate(policy, [optimiser], trajectories, train.spread(advantage, trajectories), config, mapo.ALGORITHMS[algo])


def our_gradient(optimiser: ShardedAdamW) -> torch.Tensor:
    """Flat, in the order of the model's parameters: buckets have it backwards."""
    pieces = [b.gradient[span] for b in optimiser.buckets for span in b.spans]
    return torch.cat(pieces[::-1])


def empty(policy: Policy, question, prompt: Tokens, overview) -> Trajectory:
    n = len(prompt.ids)
    return Trajectory(question, prompt, prompt + Tokens([]), [False] * n, [0.] * n, overview.size, policy.space(overview.size))


def questions_of(count: int, start: int = 0) -> list:
    return world_questions(World(options=4), 0, "train", start, count)


def ending_ids(policy: Policy) -> list[int]:
    return [policy.end_id, *policy.tokenizer.convert_tokens_to_ids(["</tool_call>", "</answer>"])]


def our_forced(policy: Policy, scenes, group: int, turns: int, tokens: int, generator) -> list[Trajectory]:
    """rollout.collect with `tokens` tokens in each of `turns` turns, and the same crop after each but the last."""
    banned = policy.banned
    policy.banned = torch.cat([banned, torch.tensor(ending_ids(policy))])
    try:
        overviews = [fit(image, policy.resolution) for _, image in scenes]
        prompts = [policy.prompt(image, q.prompt) for image, (q, _) in zip(policy.encode_images(overviews), scenes)]
        trajectories = [empty(policy, question, prompt, overview) for prompt, (question, _), overview in zip(prompts, scenes, overviews)
                        for _ in range(group)]
        session = Session(policy, prompts, group)
        for turn in range(turns):
            for trajectory, ids, logps in zip(trajectories, *session.sample(tokens, 1.0, generator)):
                assert len(ids) == tokens, f"a forced turn ended after {len(ids)} tokens"
                start = len(trajectory.mask)
                extend(trajectory, Tokens(ids), logps)
                trajectory.turns.append(Turn(policy.decode(ids), slice(start, start + len(ids))))
            if turn + 1 < turns:
                crops = policy.encode_images([fixed_crop(image) for _, image in scenes])  # equal crops once, as collect does
                observations = [policy.observation(crops[i // group]) for i in range(len(trajectories))]
                for trajectory, observation in zip(trajectories, observations):
                    extend(trajectory, observation)
                session.append(observations)
        return trajectories
    finally:
        policy.banned = banned


def fixed_crop(image):
    return fit(image.crop((192, 192, 288, 288)), Resolution(24, 48 * 48, 48 * 48))


# ---- the usual ways ------------------------------------------------------------------------------------------------------

def pixels_of(policy: Policy, images) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(pixel_values, image_grid_thw) of each image, as the processor makes them."""
    if not images:
        return []
    batch = policy.processor(images=images, do_resize=False, return_tensors="pt")
    return list(zip(batch["pixel_values"].split(batch["image_grid_thw"].prod(-1).tolist()), batch["image_grid_thw"].split(1)))


def placeholders(policy: Policy, grid: torch.Tensor) -> Tokens:
    h, w = grid[0, 1].item() // policy.merge, grid[0, 2].item() // policy.merge
    return Tokens([policy.image_id] * (h * w), [(h, w)])


def padded(policy: Policy, rows: list[list[int]], pixels: list[list], left: bool) -> dict[str, torch.Tensor]:
    """The model's inputs for a batch of conversations with all their images."""
    longest = max(map(len, rows))
    fill = lambda row, value: [value] * (longest - len(row)) + row if left else row + [value] * (longest - len(row))
    ids = torch.tensor([fill(row, 0) for row in rows])
    mask = torch.tensor([fill([1] * len(row), 0) for row in rows])
    flat = [image for row in pixels for image in row]
    return {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": (ids == policy.image_id).long(),
            "pixel_values": torch.cat([p for p, _ in flat]), "image_grid_thw": torch.cat([g for _, g in flat])}


@torch.no_grad()
def usual_rollouts(model, policy: Policy, scenes, group: int, turns: int, tokens: int, forced: bool) -> list[Trajectory]:
    """A conversation loop around `generate`: left-padded batch of all unfinished conversations, prefilled anew each turn
    with its pixels. Images are turned into pixels once, ids are never encoded again, finished rows leave the batch, and
    no log-probabilities are returned: what a careful user would write. Tools and parsing are this project's."""
    ends, banned = ending_ids(policy), policy.banned.tolist()
    limit = {"min_new_tokens": tokens, "suppress_tokens": banned + ends} if forced else {"suppress_tokens": banned, "eos_token_id": ends}
    overviews = [fit(image, policy.resolution) for _, image in scenes]
    first = pixels_of(policy, overviews)
    trajectories, pixels = [], []
    for (question, _), overview, image in zip(scenes, overviews, first):
        prompt = policy.prompt(placeholders(policy, image[1]), question.prompt)
        for _ in range(group):
            trajectories.append(empty(policy, question, prompt, overview))
            pixels.append([image])
    active = list(range(len(trajectories)))
    for number in range(1, turns + 1):
        inputs = padded(policy, [trajectories[i].tokens.ids for i in active], [pixels[i] for i in active], left=True)
        output = model.generate(**inputs, max_new_tokens=tokens, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=0, **limit)
        for i, ids in zip(active, output[:, inputs["input_ids"].shape[1]:].tolist()):
            stop = next((k + 1 for k, token in enumerate(ids) if token in ends), len(ids))
            trajectory, start = trajectories[i], len(trajectories[i].mask)
            extend(trajectory, Tokens(ids[:stop]), [0.] * stop)
            turn = Turn(policy.decode(ids[:stop]).removesuffix("<|im_end|>"), slice(start, start + stop))
            if forced:
                trajectory.turns.append(turn)
                trajectory.end = "max_turns" if number == turns else ""
                turn.crop = fixed_crop(scenes[i // group][1]) if number < turns else None
            else:
                act(policy, trajectory, turn, scenes[i // group][1], last=number == turns)
        active = [i for i in active if not trajectories[i].end]
        if not active:
            break
        latest = [trajectories[i].turns[-1] for i in active]
        crops = iter(pixels_of(policy, [turn.crop for turn in latest if turn.crop]))
        for i, turn in zip(active, latest):
            if turn.crop:
                pixels[i].append(next(crops))
            content = placeholders(policy, pixels[i][-1][1]) if turn.crop else turn.message
            observation = policy.observation(content)
            if trajectories[i].tokens.ids[-1] == policy.end_id:
                observation.ids = observation.ids[1:]
            extend(trajectories[i], observation)
    return trajectories


def usual_update(model, policy: Policy, parameters, trajectories, pixels, advantage, micro_tokens: int = MICRO) -> None:
    """Padded batches in order of arrival, pixels through the (frozen) vision tower, logits of all tokens in float32,
    log_softmax, mapo.loss, backward. No entropy (ours computes it)."""
    longest = max(len(t.mask) for t in trajectories)
    pad = lambda rows, fill: torch.tensor([r[1:] + [fill] * (longest - len(r)) for r in rows])
    mask, old = pad([t.mask for t in trajectories], False), pad([t.logps for t in trajectories], 0.)
    weight = mapo.token_weights(mask)
    for p in parameters:
        p.grad = None
    start = 0
    while start < len(trajectories):
        stop = start + 1  # as many rows as keep the padded batch within micro_tokens, as train.py counts them
        while stop < len(trajectories) and (stop + 1 - start) * max(len(t.mask) for t in trajectories[start:stop + 1]) <= micro_tokens:
            stop += 1
        part, start = slice(start, stop), stop
        inputs = padded(policy, [t.tokens.ids for t in trajectories[part]], pixels[part], left=False)
        logits = model(**inputs, use_cache=False).logits[:, :-1].float()                      # (B, L - 1, V)
        logp = F.log_softmax(logits, -1).gather(-1, inputs["input_ids"][:, 1:, None])[..., 0]
        n = logp.shape[1]
        mapo.loss(logp, old[part, :n], advantage[part, None].expand(-1, n), weight[part, :n])[0].backward()


def usual_model(path):
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
    model.model.visual.requires_grad_(False)
    return model, [p for p in model.parameters() if p.requires_grad]


# ---- measuring -----------------------------------------------------------------------------------------------------------

CLOCKS = {"cpu": time.process_time, "wall": time.perf_counter}
now = CLOCKS["cpu"]


def seconds(function) -> float:
    start = now()
    function()
    return now() - start


def pairs(ours, other, count: int) -> tuple[list[float], list[float]]:
    """Seconds of both, alternating, after one run of each that does not count."""
    ours(), other()
    times = [(seconds(ours), seconds(other)) for _ in range(count)]
    return [t[0] for t in times], [t[1] for t in times]


def status_mb(field: str) -> float:
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith(field))


def compare(part: str, row: str, ours: list[float], other: list[float], **more) -> dict:
    ratios = [b / a for a, b in zip(ours, other)]
    print(f"{part} {row}: ratio {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})", flush=True)
    return {"part": part, "row": row, "ours_s": ours, "other_s": other, "ratio": median(ratios), "low": min(ratios), "high": max(ratios), **more}


def opened(count: int) -> list:
    return [(q, q.open()) for q in questions_of(count)]


# ---- a: rollouts ---------------------------------------------------------------------------------------------------------

def part_a(args) -> list[dict]:
    policy, _ = load("tiny")
    model, _ = usual_model("tiny")
    generator, scenes, records = torch.Generator().manual_seed(0), opened(args.questions), []
    rows = args.questions * args.group
    for turns in (1, 3, 6):
        a, b = pairs(lambda: our_forced(policy, scenes, args.group, turns, args.tokens, generator),
                     lambda: usual_rollouts(model, policy, scenes, args.group, turns, args.tokens, True), args.pairs)
        records.append(compare("a", f"forced {turns}", a, b, trajectories=rows, tokens=args.tokens))
    counts = {"ours": [], "other": []}

    def natural(side, function):
        trajectories = function()
        counts[side].append(sum(sum(t.mask) for t in trajectories) / rows)

    questions = [q for q, _ in scenes]
    a, b = pairs(lambda: natural("ours", lambda: collect(policy, questions, args.group, 4, 64, 1.0, generator)),
                 lambda: natural("other", lambda: usual_rollouts(model, policy, [(q, q.open()) for q in questions], args.group, 4, 64, False)), args.pairs)
    records.append(compare("a", "natural 4", a, b, trajectories=rows, own_tokens={k: sum(v) / len(v) for k, v in counts.items()}))
    return records


# ---- b: updates ----------------------------------------------------------------------------------------------------------

def large_vocabulary(folder: Path) -> Path:
    """A random Qwen2.5-VL of hidden 64, 2 layers and Qwen's 151,936 words, with tiny/'s tokenizer and processor."""
    if not (folder / "config.json").is_file():
        torch.manual_seed(0)
        config = AutoConfig.from_pretrained("tiny")
        text = config.text_config
        text.hidden_size, text.num_hidden_layers, text.vocab_size, text.intermediate_size = 64, 2, 151_936, 192
        text.num_attention_heads, text.num_key_value_heads, text.initializer_range = 2, 1, .02
        text.layer_types = text.layer_types[:2]
        config.vision_config.out_hidden_size = 64
        policy = Policy("tiny")
        policy.model = AutoModelForImageTextToText.from_config(config)
        policy.save(folder)
    return folder


def update_case(name: str, folder: Path) -> dict:
    """Trajectories as tiny/ samples them, of mixed length, and what either side needs to learn from them."""
    tiny, path = Policy("tiny"), "tiny" if name == "tiny" else large_vocabulary(folder)
    generator = torch.Generator().manual_seed(0)
    trajectories = collect(tiny, questions_of(8 if name == "tiny" else 1), 8, 4, 64, 1.0, generator)
    policy, optimiser = load(path)
    pixels, prompts = [], {}
    for t in trajectories:
        images = [fit(t.question.open(), policy.resolution)] + [turn.crop for turn in t.turns if turn.crop]
        pixels.append(pixels_of(policy, images))
        if name != "tiny":
            features = [f for e in policy.encode_images(images) for f in e.features]
            t.tokens = dataclasses.replace(t.tokens, features=features)
            t.prompt = prompts.setdefault(id(t.prompt), dataclasses.replace(t.prompt, features=features[:1]))
    if name != "tiny":  # the old log-probabilities are this policy's own
        with torch.no_grad():
            for t in trajectories:
                t.logps = [0.] + policy.logprobs([t.tokens], [t.mask])[0][0].tolist()
    return {"path": path, "policy": policy, "optimiser": optimiser, "trajectories": trajectories, "pixels": pixels,
            "advantage": torch.randn(len(trajectories), generator=generator), "micro": MICRO if name == "tiny" else 1024}


def sides(case: dict) -> dict:
    """The three ways to update, each ready to be called, and the parameters of the last two."""
    model, parameters = usual_model(case["path"])
    usual = lambda micro: usual_update(model, case["policy"], parameters, case["trajectories"], case["pixels"], case["advantage"], micro)
    return {"ours": lambda: our_update(case["policy"], case["optimiser"], case["trajectories"], case["advantage"], case["micro"]),
            "usual": lambda: usual(case["micro"]), "whole": lambda: usual(10**9), "usual parameters": parameters}


def memory_child(name: str, side: str, folder: str) -> None:
    """In a fresh process: what two updates need over what was there before."""
    case = update_case(name, Path(folder))
    run = sides(case)[side]
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = status_mb("VmRSS")
    run(), run()
    print("RESULT " + json.dumps(status_mb("VmHWM") - before))


def child(*arguments: str) -> object:
    output = subprocess.run([sys.executable, __file__, "--child", *arguments], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.split("RESULT ")[-1])


def part_b(args) -> list[dict]:
    records = []
    with tempfile.TemporaryDirectory() as folder:
        for name in ("tiny", "vocabulary"):
            case = update_case(name, Path(folder))
            run, tokens = sides(case), sum(len(t.mask) for t in case["trajectories"])
            a, b = pairs(run["ours"], run["usual"], args.pairs)
            ours, usual = our_gradient(case["optimiser"]), torch.cat([p.grad.flatten() for p in run["usual parameters"]])
            records.append(compare("b", name, a, b, tokens=tokens, trajectories=len(case["trajectories"]), micro=case["micro"],
                                   difference=((ours - usual).norm() / usual.norm()).item()))
            del ours, usual
            if name == "tiny":
                a, b = pairs(run["ours"], run["whole"], args.pairs)
                records.append(compare("b", "tiny, one batch", a, b, tokens=tokens, trajectories=len(case["trajectories"]), micro=0))
            del case, run
            used = {side: child(name, side, folder) for side in ("ours", "usual") + (("whole",) if name == "tiny" else ())}
            print(f"b memory {name}: {used}", flush=True)
            records.append({"part": "b", "row": f"memory {name}", "mb": used, "ratio": used["ours"] / used["usual"]})
    return records


# ---- c: the whole step, and TRL ------------------------------------------------------------------------------------------

STEP = {"model": "tiny", "questions": 16, "group": 8, "max_turns": 4, "max_tokens": 64, "micro_rows": 32, "lr": 1e-6}


def step_child(settings: str) -> None:
    """Our side: one step of train.py, with the semantic score, for each line on standard input."""
    s = json.loads(settings)
    config = train.parse_config(["--lr", str(s["lr"]), "--questions", str(s["questions"]), "--group", str(s["group"]),
                                 "--max_turns", str(s["max_turns"]), "--max_tokens", str(s["max_tokens"])])
    row, base, (policy, optimiser) = mapo.ALGORITHMS["mapo"], Policy(s["model"]), load(s["model"])
    scorer = Scorer(base, questions_of(64, 10**6))
    generator, step, before = torch.Generator().manual_seed(0), 0, status_mb("VmRSS")
    print("RESULT " + json.dumps({"baseline_mb": before}), flush=True)
    while sys.stdin.readline().strip():
        start, cpu = time.perf_counter(), time.process_time()
        trajectories = collect(policy, questions_of(s["questions"], step * s["questions"]), s["group"], s["max_turns"], s["max_tokens"], 1.0, generator)
        r, *_ = score(trajectories, scorer)
        train.accumulate(policy, [optimiser], trajectories, train.advantages(policy, trajectories, config, row)[0], config, row)
        optimiser.clip(1.)
        optimiser.step(s["lr"])
        step += 1
        print("RESULT " + json.dumps({
            "wall": time.perf_counter() - start, "cpu": time.process_time() - cpu, "peak_mb": status_mb("VmHWM") - before, "calls": sum(len(t.looks) for t in trajectories),
            "tokens": sum(len(t.mask) - t.mask.index(True) for t in trajectories), "accuracy": r.mean().item()}), flush=True)


def part_c(args) -> list[dict]:
    if not args.trl:
        print("c: skipped; give --trl the python of an environment with TRL (see the docstring)")
        return []
    steps = args.pairs + 1
    start = lambda *command: subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    ours = start(sys.executable, __file__, "--child", "step", json.dumps(STEP))
    other = start(args.trl, "docs/bench_trl.py", json.dumps(STEP | {"steps": steps + 1}))

    def answer(process) -> dict:
        for line in process.stdout:
            if line.startswith("RESULT "):
                return json.loads(line.removeprefix("RESULT "))
        raise RuntimeError(f"{process.args[1]} ended early; run it by hand to see why")

    def step(process) -> dict:
        process.stdin.write("go\n")
        process.stdin.flush()
        return answer(process)

    _, about = answer(ours), answer(other)
    results = [(step(ours), step(other)) for _ in range(steps)][1:]  # the first step of each warms up
    for process in (ours, other):
        process.stdin.close()
        process.kill()
        process.wait()
    mean = lambda side, key: sum(r[side][key] for r in results) / len(results)
    detail = {name: {key: mean(side, key) for key in ("tokens", "calls", "accuracy")} | {"peak_mb": results[-1][side]["peak_mb"]}
              for side, name in enumerate(("ours", "other"))}
    record = compare("c", "step", [a[args.clock] for a, _ in results], [b[args.clock] for _, b in results], detail=detail, settings=STEP, about=about)
    return [record, {"part": "c", "row": "memory", "ratio": detail["ours"]["peak_mb"] / detail["other"]["peak_mb"]}]


# ---- d: the limit --------------------------------------------------------------------------------------------------------

def product_seconds(m: int, k: int, n: int, layout: str = "nt", batch: int = 0, known: dict = {}) -> float:
    """Seconds of one product (m, k) x (k, n), `batch` of them if not 0. layout: nt is x W^T, nn x W, tn x^T y."""
    if (m, k, n, layout, batch) not in known:
        lead = (batch,) if batch else ()
        x = torch.randn(*lead, *((k, m) if layout == "tn" else (m, k)))
        y = torch.randn(*lead, *((n, k) if layout == "nt" else (k, n)))
        x, y = x.mT if layout == "tn" else x, y.mT if layout == "nt" else y
        repeat = max(1, round(.01 / max(min(seconds(lambda: torch.matmul(x, y)) for _ in range(3)), 1e-6)))
        times = [seconds(lambda: [torch.matmul(x, y) for _ in range(repeat)]) / repeat for _ in range(5)]
        known[m, k, n, layout, batch] = median(times)
    return known[m, k, n, layout, batch]


class Work:
    """Adds up products: floating-point operations, and the seconds that torch.matmul takes for them."""

    def __init__(self):
        self.flop, self.seconds = 0., 0.

    def linear(self, m: int, k: int, n: int, times: float = 1, backward: bool = False) -> None:
        if not m or not times:
            return
        for shape in [(m, k, n, "nt")] + ([(m, n, k, "nn"), (n, m, k, "tn")] if backward else []):
            self.flop += times * 2 * m * k * n
            self.seconds += times * product_seconds(*shape)

    def attention(self, heads: int, queries: int, keys: int, width: int, pairs_: float, times: float = 1) -> None:
        """Scores and values for `pairs_` (query, key) pairs of each head, at the speed of batched queries x keys products."""
        flop = 2 * heads * width * pairs_ * 2 * times
        both = product_seconds(queries, width, keys, "nt", heads) + product_seconds(queries, keys, width, "nn", heads)
        self.flop += flop
        self.seconds += flop / (2 * 2 * heads * queries * keys * width) * both


def linears(c) -> list[tuple[int, int]]:
    """(in, out) of a decoder layer's seven projections."""
    d, head = c.hidden_size, c.hidden_size // c.num_attention_heads
    kv = c.num_key_value_heads * head
    return [(d, d), (d, kv), (d, kv), (d, d), (d, c.intermediate_size), (d, c.intermediate_size), (c.intermediate_size, d)]


def vision_work(work: Work, c, grids: list[tuple[int, int]], merge: int) -> None:
    """Forward of the vision tower over images of the given grids (in placeholders)."""
    patches, d = sum(h * w for h, w in grids) * merge ** 2, c.hidden_size
    work.linear(patches, c.in_channels * c.temporal_patch_size * c.patch_size ** 2, d)
    for k, n in [(d, 3 * d), (d, d), (d, c.intermediate_size), (d, c.intermediate_size), (c.intermediate_size, d)]:
        work.linear(patches, k, n, c.depth)
    for n in {h * w * merge ** 2 for h, w in grids}:
        count = sum(h * w * merge ** 2 == n for h, w in grids)
        work.attention(c.num_heads, n, n, d // c.num_heads, n * n, c.depth * count)
    work.linear(patches // merge ** 2, d * merge ** 2, d * merge ** 2)
    work.linear(patches // merge ** 2, d * merge ** 2, c.out_hidden_size)


def rollout_work(policy: Policy, trajectories, group: int) -> Work:
    """What sampling forced trajectories needs: prompts once a group, observations, one row a token, own tokens' logits."""
    work, c, rows = Work(), policy.model.config.text_config, len(trajectories)
    head, t = c.hidden_size // c.num_attention_heads, trajectories[0]
    prompts = [trajectories[i].mask.index(True) for i in range(0, rows, group)]
    spans = [(turn.tokens.start, turn.tokens.stop) for turn in t.turns]
    gaps = [b[0] - a[1] for a, b in zip(spans, spans[1:])]
    for k, n in linears(c):
        work.linear(sum(prompts), k, n, c.num_hidden_layers)
        for gap in gaps:
            work.linear(rows * (gap + 1), k, n, c.num_hidden_layers)  # and the last sampled token
        work.linear(rows, k, n, c.num_hidden_layers * sum(stop - start - 1 for start, stop in spans))
    for p in prompts:
        work.attention(c.num_attention_heads, p, p, head, p * (p + 1) / 2, c.num_hidden_layers)
    for (start, stop), gap in zip(spans, gaps + [0]):
        middle = (start + stop) // 2
        work.attention(rows * c.num_attention_heads, 1, middle, head, middle, c.num_hidden_layers * (stop - start - 1))
        if gap:
            work.attention(rows * c.num_attention_heads, gap + 1, stop + gap, head, (gap + 1) * (stop + gap / 2), c.num_hidden_layers)
    work.linear(rows, c.hidden_size, c.vocab_size, sum(stop - start for start, stop in spans))
    vision_work(work, policy.model.config.vision_config, [g for i in range(0, rows, group) for g in trajectories[i].tokens.grids[:1]]
                + [g for t in trajectories for g in t.tokens.grids[1:]], policy.merge)
    return work


def update_work(policy: Policy, trajectories, group: int, micro_tokens: int, shared: bool) -> Work:
    """What the gradient needs: forward and both backward products; logits of own tokens; prompts once a group if shared."""
    work, c = Work(), policy.model.config.text_config
    head, layers = c.hidden_size // c.num_attention_heads, c.num_hidden_layers
    tokens, own, longest = 0, sum(sum(t.mask) for t in trajectories), max(len(t.mask) for t in trajectories)
    pairs_ = 0.
    for i, t in enumerate(trajectories):
        prompt, length = t.mask.index(True), len(t.mask)
        skip = prompt if shared and i % group else 0
        tokens += length - skip
        pairs_ += (length * (length + 1) - skip * (skip + 1)) / 2
    parts = max(1, round(tokens / micro_tokens))
    for k, n in linears(c):
        work.linear(tokens // parts, k, n, layers * parts, backward=True)
    work.attention(c.num_attention_heads, longest, longest, head, pairs_, layers * 3)
    work.linear(own // parts, c.hidden_size, c.vocab_size, parts, backward=True)
    return work


KINDS = {"matrix products": ("mm", "addmm", "bmm", "baddbmm", "linear", "convolution"), "attention": ("scaled_dot", "flash_attention"),
         "softmax and sampling": ("softmax", "exponential", "multinomial", "argmax", "gather", "sort", "cumsum", "searchsorted"),
         "copies": ("cat", "copy_", "index", "clone", "slice_backward", "masked_scatter", "fill_", "zero_", "stack", "embedding", "repeat")}


def operations(function) -> tuple[dict[str, float], object]:
    """Seconds by kind of operation, under torch.profiler (which slows Python, not the operations)."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        wall = seconds(function)
    spent = dict.fromkeys([*KINDS, "elementwise and the rest"], 0.)
    averages = profiler.key_averages()
    for event in averages:
        name = event.key.removeprefix("aten::")
        kind = next((k for k, words in KINDS.items() if any(w in name for w in words)), "elementwise and the rest")
        spent[kind] += event.self_cpu_time_total / 1e6
    spent["Python between operations"] = max(0., wall - sum(spent.values()))
    return spent, averages.table(sort_by="self_cpu_time_total", row_limit=15, max_name_column_width=45)


@contextlib.contextmanager
def timers(places: dict[str, list[tuple[object, str]]]):
    """Seconds in each phase, without the phases called inside it; `places` names the functions of each phase."""
    spent, stack, saved = dict.fromkeys(places, 0.), [], []

    def timed(phase, function):
        def wrapper(*args, **kwargs):
            stack.append(0.)
            start = now()
            try:
                return function(*args, **kwargs)
            finally:
                whole = now() - start
                spent[phase] += whole - stack.pop()
                if stack:
                    stack[-1] += whole
        return wrapper
    for phase, targets in places.items():
        for owner, name in targets:
            if hasattr(owner, name):
                saved.append((owner, name, getattr(owner, name)))
                setattr(owner, name, timed(phase, getattr(owner, name)))
    try:
        yield spent
    finally:
        for owner, name, function in saved:
            setattr(owner, name, function)


PHASES = {"decode and sample": [(Session, "sample")], "prefill": [(Session, "__init__"), (Session, "append")],
          "cache rows": [(Session, "keep")], "vision": [(Policy, "encode_images")],
          "tools: parse, crop": [(rollout, "act")], "drawing the scenes": [(data.Question, "open"), (rollout, "fit")],
          "semantic score": [(reward.Scorer, "__call__")], "forward": [(train, "accumulate")],
          "backward": [(torch.Tensor, "backward")], "optimiser": [(ShardedAdamW, "step")]}


def part_d(args) -> list[dict]:
    policy, optimiser = load("tiny")
    generator, scenes, turns = torch.Generator().manual_seed(0), opened(args.questions), 3
    trajectories = our_forced(policy, scenes, args.group, turns, args.tokens, generator)
    advantage = torch.randn(len(trajectories), generator=generator)
    rollouts = lambda: our_forced(policy, scenes, args.group, turns, args.tokens, generator)
    update = lambda: our_update(policy, optimiser, trajectories, advantage)
    update()
    taken = {"rollouts": [], "update": []}
    limits = {"rollouts": [], "update": [], "update, nothing shared": []}
    for _ in range(args.pairs):
        product_seconds.__defaults__[-1].clear()  # time the products anew, next to what they are compared with
        for name, work in (("rollouts", lambda: rollout_work(policy, trajectories, args.group)),
                           ("update", lambda: update_work(policy, trajectories, args.group, MICRO, True)),
                           ("update, nothing shared", lambda: update_work(policy, trajectories, args.group, MICRO, False))):
            limits[name].append(work())
        taken["rollouts"].append(seconds(rollouts))
        taken["update"].append(seconds(update))
    records = []
    for name, works in limits.items():
        measured = taken[name.split(",")[0]]
        shares = [w.seconds / s for w, s in zip(works, measured)]
        records.append({"part": "d", "row": name, "gflop": works[0].flop / 1e9, "limit_s": [w.seconds for w in works], "ours_s": measured,
                        "ratio": median(shares), "low": min(shares), "high": max(shares)})
        print(f"d {name}: {works[0].flop / 1e9:.1f} GFLOP, share of the limit {median(shares):.2f}", flush=True)

    questions, scorer = [q for q, _ in scenes], Scorer(policy, questions_of(64, 10**6))
    config, row = train.parse_config(["--group", str(args.group)]), mapo.ALGORITHMS["mapo"]

    def step():
        trajectories = collect(policy, questions, args.group, 4, 64, 1.0, generator)
        score(trajectories, scorer)
        train.accumulate(policy, [optimiser], trajectories, train.advantages(policy, trajectories, config, row)[0], config, row)
        optimiser.step(1e-9)
    step()
    phases = []
    for _ in range(3):
        with timers(PHASES) as spent:
            whole = seconds(step)
        phases.append(spent | {"the rest": whole - sum(spent.values()), "whole step": whole})
    records.append({"part": "d", "row": "phases", "seconds": {k: median(p[k] for p in phases) for k in phases[0]}})
    for name, function in (("rollouts", lambda: collect(policy, questions, args.group, 4, 64, 1.0, generator)), ("update", update)):
        spent, listing = operations(function)
        print(f"\n{name}: operations by their own time\n{listing}")
        records.append({"part": "d", "row": f"operations, {name}", "seconds": spent})
    return records


# ---- e: growth -----------------------------------------------------------------------------------------------------------

def on_ranks(ranks: int) -> float:
    """Wall seconds a step of `torchrun train.py`, one thread a rank; the first step does not count."""
    with tempfile.TemporaryDirectory() as out:
        subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "train.py",
                        "--steps", "4", "--eval_questions", "2", "--out", out], check=True, capture_output=True)
        return median(json.loads(line)["seconds"] for line in list(Path(out, "metrics.jsonl").open())[1:])


def part_e(args) -> list[dict]:
    policy, optimiser = load("tiny")
    generator, scenes, rows = torch.Generator().manual_seed(0), opened(32), 64
    usual = policy.resolution
    points = [("turns", n, 8, n, 16) for n in range(1, 7)] + [("group", g, g, 3, 16) for g in (2, 4, 8, 16, 32)] + \
             [("image tokens", v, 8, 3, v) for v in (16, 64, 144, 256)]
    spent = {point[:2]: ([], []) for point in points}
    for trial in range(args.pairs + 1):
        for axis, value, group, turns, image in points:
            policy.resolution = Resolution(usual.factor, usual.min_pixels, image * usual.factor ** 2)
            trajectories: list = []
            rolled = seconds(lambda: trajectories.extend(our_forced(policy, scenes[:rows // group], group, turns, args.tokens, generator)))
            updated = seconds(lambda: our_update(policy, optimiser, trajectories, torch.randn(rows, generator=generator)))
            if trial:  # the first round warms up
                spent[axis, value][0].append(rolled / rows)
                spent[axis, value][1].append(updated / rows)
    policy.resolution = usual
    both = {key: median(a + b for a, b in zip(*times)) for key, times in spent.items()}
    records = [{"part": "e", "row": "points", "points": [[axis, value, median(a), median(b), both[axis, value]] for (axis, value), (a, b) in spent.items()]}]
    for row, high, low in (("turns", 6, 1), ("group", 16, 2)):
        ratios = [(a + b) / (c + d) for a, b, c, d in zip(*spent[row, high], *spent[row, low])]
        records.append({"part": "e", "row": row, "ratio": median(ratios), "low": min(ratios), "high": max(ratios)})
        print(f"e {row}: {high} against {low}: {median(ratios):.2f}", flush=True)
    alone, shared = zip(*((on_ranks(1), on_ranks(2)) for _ in range(2)))
    return [*records, compare("e", "ranks", list(shared), list(alone))]


# ---- the page ------------------------------------------------------------------------------------------------------------

def verdict(record: dict) -> str:
    key = " ".join([record["part"], record["row"]]).replace("c step", "c")
    if key not in TARGETS:
        return "| |"
    words, larger, number = TARGETS[key]
    met = record["ratio"] >= number if larger else record["ratio"] < number if "=" not in words else record["ratio"] <= number
    return f"{words} | {'met' if met else 'not met'} |"


def spread(record: dict) -> str:
    return f"{record['ratio']:.2f} ({record['low']:.2f} to {record['high']:.2f})"


def page(records: list[dict]) -> str:
    of = lambda part: {r["row"]: r for r in records if r["part"] == part}
    lines = ["# Speed and memory", "", "`python docs/bench.py` made this page; `docs/bench.jsonl` has every single time. Ratios are medians over alternating pairs, with "
             "their smallest and largest. Seconds are CPU seconds unless the command says `--clock wall`; other jobs may have "
             "run on the machine, so read ratios.", ""]
    for r in records:
        if r["row"] == "machine":
            lines.append(f"- part {r['part']}: {r['text']}")
    if a := of("a"):
        lines += ["", "## a. Rollouts against `generate`", "",
                  "*Forced*: every turn has the same number of tokens on both sides, and the same crop follows. *Natural*: "
                  "`collect`, turns of at most 64 tokens that end when "
                  "the agent ends them, at most 4. The other side is a careful user's loop: `model.generate` once a turn over "
                  "the left-padded conversations of all unfinished "
                  "rows with all their pixels; pixels are prepared once, ids never encoded again. It returns no "
                  "log-probabilities; ours does.", "",
                  "| | trajectories/s, ours | generate | ratio | target | |", "|---|---|---|---|---|---|"]
        for row, r in a.items():
            if "ours_s" in r:
                what = f"{row.replace('forced ', 'forced, turns: ').replace('natural ', 'natural, turns: at most ')}"
                rate = lambda s: f"{r['trajectories'] / median(s):.1f}"
                lines.append(f"| {what} | {rate(r['ours_s'])} | {rate(r['other_s'])} | {spread(r)} | {verdict(r)}")
        if n := a.get("natural 4"):
            lines += ["", f"Agent's tokens a trajectory, natural: {n['own_tokens']['ours']:.1f} ours, {n['own_tokens']['other']:.1f} generate."]
    if b := of("b"):
        lines += ["", "## b. Updates against padded batches and full logits", "",
                  "Trajectories as `tiny/` samples them (8 questions x 8, micro-batches of " + f"{b['tiny']['micro']:,} padded tokens; 1 x 8 and "
                  f"{b['vocabulary']['micro']:,} for the large vocabulary). The other side: padded batches in order of arrival, of as many padded "
                  "tokens as ours, pixels through the frozen vision tower, float32 logits of *all* tokens, `log_softmax`, the "
                  "same loss. `vocabulary`: a random Qwen2.5-VL of "
                  "hidden 64, 2 layers and 151,936 words, where the logits are nearly everything.", "",
                  "| | tokens/s, ours | usual | ratio | target | |", "|---|---|---|---|---|---|"]
        for row, r in b.items():
            if "ours_s" in r:
                lines.append(f"| {row} | {r['tokens'] / median(r['ours_s']):.0f} | {r['tokens'] / median(r['other_s']):.0f} | {spread(r)} | {verdict(r)}")
        lines += ["", "Both sides' gradients differ by " + " and ".join(f"{r['difference']:.0e}" for r in b.values() if "difference" in r) +
                  " of their norm. (Ours bans image placeholders in the softmax and sums in another order; which of the two it is was not tested.)"]
        lines += ["", "| peak memory over the start, MB | ours | usual | one batch | ours / usual | target | |", "|---|---|---|---|---|---|---|"]
        for row, r in b.items():
            if "mb" in r:
                lines.append(f"| {row} | {r['mb']['ours']:.0f} | {r['mb']['usual']:.0f} | {r['mb'].get('whole', float('nan')):.0f} | {r['ratio']:.2f} | {verdict(r)}".replace("nan", ""))
    if c := of("c"):
        r, d, s = c["step"], c["step"]["detail"], c["step"]["settings"]
        lines += ["", "## c. A whole step against TRL", "",
                  f"TRL {r['about']['trl']} with transformers {r['about']['transformers']}: `GRPOTrainer` with "
                  f"`environment_factory`, whose tool returns the crop as an image; `generate`, float32, one "
                  f"thread, no gradient checkpointing. {s['questions']} questions x {s['group']}, at most {s['max_turns']} "
                  f"turns of {s['max_tokens']} tokens, one update, beta 0, in micro-batches of "
                  f"{s['micro_rows']} rows; same start, same questions. The first step of each does not count. Ours computes "
                  f"the semantic score as well, TRL does not. What differs "
                  "on TRL's side: it keeps trajectories without advantage in the update, runs the vision tower again in each "
                  "turn and in the update, and a call that is not JSON ends a trajectory.", "",
                  "| | seconds a step | peak MB over the start | tokens after the prompt | looks | accuracy |", "|---|---|---|---|---|---|"]
        for name, side, times in (("ours", "ours", r["ours_s"]), ("TRL", "other", r["other_s"])):
            lines.append(f"| {name} | {median(times):.2f} | {d[side]['peak_mb']:.0f} | {d[side]['tokens']:.0f} | {d[side]['calls']:.0f} | {d[side]['accuracy']:.2f} |")
        lines += ["", "| | ratio | target | |", "|---|---|---|---|", f"| TRL's time / ours | {spread(r)} | {verdict(r)}",
                  f"| our memory / TRL's | {c['memory']['ratio']:.2f} | {verdict(c['memory'])}"]
    if d := of("d"):
        lines += ["", "## d. Against the machine's limit", "",
                  "The limit is the time that `torch.matmul` takes, in the same run, for the matrix products that the work "
                  "needs and for nothing else: unpadded tokens, each prompt once a "
                  "group, causal attention, logits of the agent's own tokens, forward and both backward products. Forced "
                  "rollouts of 3 turns, and the update on them. *Nothing "
                  "shared* counts each trajectory's prompt by itself.", "",
                  "| | GFLOP | limit, s | ours, s | share of the limit | target | |", "|---|---|---|---|---|---|---|"]
        for row, r in d.items():
            if "gflop" in r:
                lines.append(f"| {row} | {r['gflop']:.1f} | {median(r['limit_s']):.2f} | {median(r['ours_s']):.2f} | {spread(r)} | {verdict(r)}")
        if "phases" in d:
            spent = d["phases"]["seconds"]
            lines += ["", "Where a natural step (4 turns, semantic score) spends its time, and which operations that is:", "", "| phase | s | share |", "|---|---|---|"]
            lines += [f"| {k} | {v:.3f} | {v / spent['whole step']:.0%} |" for k, v in spent.items()]
            columns = [d["operations, rollouts"]["seconds"], d["operations, update"]["seconds"]]
            lines += ["", "| operations (torch.profiler) | rollouts | update |", "|---|---|---|"]
            lines += [f"| {k} | " + " | ".join(f"{c[k] / sum(c.values()):.0%}" for c in columns) + " |" for k in columns[0]]
    if e := of("e"):
        lines += ["", "## e. Growth", "", "Forced turns, 64 trajectories a point, milliseconds a trajectory. Turns and image size: groups of 8. Group and image size: 3 turns.", "",
                  "| | | rollout | update | both |", "|---|---|---|---|---|"]
        lines += [f"| {axis} | {value} | {1e3 * a:.1f} | {1e3 * b:.1f} | {1e3 * both:.1f} |" for axis, value, a, b, both in e["points"]["points"]]
        lines += ["", "| | ratio | target | |", "|---|---|---|---|", f"| 6 turns / 1 turn | {spread(e['turns'])} | {verdict(e['turns'])}",
                  f"| group 16 / group 2 | {spread(e['group'])} | {verdict(e['group'])}"]
        if "ranks" in e:
            lines += ["", f"A default step (16 questions x 8) takes {median(e['ranks']['other_s']):.1f} s of wall time on one rank and "
                      f"{median(e['ranks']['ours_s']):.1f} s on two of one thread each: {spread(e['ranks'])} times as fast, on the two cores of this machine."]
    if all(of(part) for part in "acde"):
        lines += ["", *why(*map(of, "acde"))]
    return "\n".join(lines) + "\n"


def why(a: dict, c: dict, d: dict, e: dict) -> list[str]:
    """What the targets that are missed would take, from the numbers above."""
    share = lambda *rows: sum(median(d[row]["limit_s"]) for row in rows) / sum(median(d[row]["ours_s"]) for row in rows)
    rollouts, step = share("rollouts"), share("rollouts", "update")
    target = lambda key: TARGETS[key][2]
    need = lambda record, key, now: f"{target(key)} / {record['ratio']:.2f} x {now:.2f} = {now * target(key) / record['ratio']:.2f}"
    work = d["operations, rollouts"]["seconds"]
    bare = (work["elementwise and the rest"] + work["Python between operations"] + work["copies"]) / sum(work.values())
    turns = {value: both for axis, value, *_, both in e["points"]["points"] if axis == "turns"}
    prompt = lambda ratio: (1 - ratio) / (ratio / 2 - 1 / 16)     # x in (1 + x / 16) / (1 + x / 2) = ratio
    return ["## What the missed targets would take", "",
            f"- **a.** `generate` decodes as we do, one token a row through the same layers; what we share and save is the rest. Rollouts reach {rollouts:.2f} of what `torch.matmul` needs; "
            f"the targets mean {need(a['forced 3'], 'a forced 3', rollouts)} at 3 turns and {need(a['forced 6'], 'a forced 6', rollouts)} at 6. But {bare:.0%} of the time is no product and no attention: "
            "norms, rotations and activations of 64 rows, copies, and Python between operations too small to hide it. Larger models have less of all three.",
            f"- **c.** The step reaches {step:.2f} of the limit in rollouts and update together; five times TRL means {need(c['step'], 'c', step)}, every layer included.",
            f"- **e, turns.** Time grows evenly, but the first turn is the cheapest: {1e3 * turns[1]:.1f} ms a trajectory with one turn, and {1e3 * (turns[6] - turns[1]) / 5:.1f} for each "
            "further one, which also has an observation to read (a crop and its tags) and more keys to attend to.",
            f"- **e, group.** With a prompt that costs x times what follows it, a trajectory in a group of g costs 1 + x / g. The measured {e['group']['ratio']:.2f} says x = "
            f"{prompt(e['group']['ratio']):.2f}; the target says x = {prompt(target('e group')):.2f}, a prompt as expensive as three turns. Ours has 16 image tokens and a question."]


def machine(args) -> str:
    model = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), platform.machine())
    return (f"{model}, {os.cpu_count()} cores, {args.threads} thread(s), load {os.getloadavg()[0]:.1f} at the start; Python {platform.python_version()}, torch "
            f"{torch.__version__}, transformers {transformers.__version__}; {time.strftime('%Y-%m-%d')}; `python "
            f"{' '.join(sys.argv)}`")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list("abcde"), choices=list("abcde"))
    parser.add_argument("--pairs", type=int, default=5, help="alternating pairs of each comparison")
    parser.add_argument("--questions", type=int, default=8, help="of parts a and d")
    parser.add_argument("--group", type=int, default=8, help="trajectories a question, parts a and d")
    parser.add_argument("--tokens", type=int, default=20, help="tokens of a forced turn; tiny/'s own turns have about 20")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", default="cpu", choices=list(CLOCKS))
    parser.add_argument("--trl", default="", help="python of an environment with TRL; without it part c is skipped")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.chdir(ROOT)
    global now
    now = CLOCKS[args.clock]
    torch.set_num_threads(args.threads)
    if args.child:
        return step_child(args.child[1]) if args.child[0] == "step" else memory_child(*args.child)
    raw = ROOT / "docs/bench.jsonl"
    records = [json.loads(line) for line in raw.open()] if raw.is_file() else []
    for part in args.parts:
        start, about = time.time(), machine(args)
        if new := globals()[f"part_{part}"](args):
            note = {"part": part, "row": "machine", "text": f"{about}; {time.time() - start:.0f} s"}
            records = sorted([r for r in records if r["part"] != part] + [note] + new, key=lambda r: r["part"])
            raw.write_text("".join(json.dumps(r) + "\n" for r in records))
            (ROOT / "docs/bench.md").write_text(page(records))
    print((ROOT / "docs/bench.md").read_text() if records else "nothing was measured")


if __name__ == "__main__":
    main()
