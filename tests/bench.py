"""What a whole GRPO step costs beside the plain way, in one run: python tests/bench.py

    python tests/bench.py --quick                    # the laptop model only; a few minutes on 2 cores
    python tests/bench.py --only steps slice         # some of: evaluate, steps, mat, parts, scoring, slice, linear, launch
    python tests/bench.py --cpu                      # one thread, CPU seconds: on a machine that others use

The plain way: one `generate` of Hugging Face for the same rows and as many new tokens, every row with its own prompt and image,
left-padded; one forward and backward pass of the same sequences in micro-batches of 16 rows, right-padded, with the logits of
all tokens; a step of AdamW. No reference, no tools. Ours and the plain way alternate; seconds are medians, a ratio is the
median of the ratios of neighbours.

Random models do not end their turns as trained ones do, so lengths are forced: the end token comes with a constant hazard, or
never, or at the last token, and the plain way replays the lengths that ours had. What a turn says is scripted likewise; the
stub of a tool takes no time.
"""
import argparse
import contextlib
import copy
import random
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from types import MethodType, SimpleNamespace
from unittest.mock import patch

import torch
from PIL import Image
from torch.distributed.fsdp import (
    FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method)
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (AutoTokenizer, DynamicCache, GenerationConfig, LogitsProcessor,
                          Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils import logging as hf_logging

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "data")]

import model as model_module  # noqa: E402
import rollout as rollout_module  # noqa: E402
from cost import Shape, forward_operations, peak, step_bytes, step_operations  # noqa: E402
from data.tasks import load_tasks  # noqa: E402
from evaluate import evaluate_tasks  # noqa: E402
from grpo import group_advantages, token_logps  # noqa: E402
from model import (EncodedImage, Policy, action_logps, gathered, load_policy, model_inputs, pick_device,  # noqa: E402
                   start_ranks)
from rollout import Limits, Rollout, Tools, collate, roll_out  # noqa: E402
from tools import Action, ToolResult  # noqa: E402
from train import Config, even_micro_batches, reference_logps, update  # noqa: E402

TOY = dict(vocab_size=2048, hidden_size=128, intermediate_size=256, num_hidden_layers=3,
           num_attention_heads=4, num_key_value_heads=2, mrope=[4, 6, 6])
TOY_VISION = dict(depth=3, hidden_size=96, intermediate_size=192, num_heads=4, window_size=112,
                  fullatt_block_indexes=[2])
VISION = dict(depth=4, hidden_size=256, intermediate_size=768, num_heads=4, window_size=112,
              fullatt_block_indexes=[3])
MIDDLE = dict(vocab_size=32_000, hidden_size=512, intermediate_size=1792, num_hidden_layers=8,
              num_attention_heads=8, num_key_value_heads=2, mrope=[8, 12, 12])
SLICE_3B = dict(vocab_size=151_936, hidden_size=2048, intermediate_size=11_008, num_hidden_layers=2,
                num_attention_heads=16, num_key_value_heads=2, mrope=[16, 24, 24])
SHAPE_3B = SLICE_3B | {"num_hidden_layers": 36}
REWARDS = torch.tensor([1.0, 0.0, 2.0, 0.5])  # of the samples of every prompt, again and again


def seconds_now():
    """Of the clock on the wall, once the GPU has done all that it was given; with one thread and no
    GPU those that this process was given, whatever else runs.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


# --------------------------------------------------------------------------------- models and tasks
def make_config(tokenizer, shape, vision):
    """The config of a Qwen2.5-VL of this shape for this tokenizer, which may be smaller than its
    vocabulary.
    """
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in
           ("image_pad", "video_pad", "vision_start", "vision_end")}
    text = {name: value for name, value in shape.items() if name != "mrope"}
    return Qwen2_5_VLConfig(
        **{f"{name.replace('_pad', '')}_token_id": i for name, i in ids.items()}, tie_word_embeddings=True,
        text_config=dict(text, max_position_embeddings=8192, rms_norm_eps=1e-6, tie_word_embeddings=True,
                         bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
                         rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": shape["mrope"]}),
        vision_config=dict(vision, out_hidden_size=shape["hidden_size"]))


def make_folder(folder, shape, vision):
    """A Qwen2.5-VL with random weights in the hub's layout, with the tokenizer of data/model.

    Returns the folder's name.
    """
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data/model")
    config = make_config(tokenizer, shape, vision)
    torch.manual_seed(0)
    for part in (Qwen2_5_VLForConditionalGeneration(config), tokenizer, Qwen2VLImageProcessorPil()):
        part.save_pretrained(folder)
    return folder


def load(folder):
    """Sharded, as train.py loads it."""
    return with_large_vocabulary(load_policy(folder, shard=True))


def with_large_vocabulary(policy):
    """The rows beyond the small tokenizer stand for a large vocabulary: they are sampled too."""
    policy.suppressed = policy.suppressed[policy.suppressed < len(policy.tokenizer)]
    return policy


def random_policy(shape, vision):
    """Random weights without a folder, for large models: sharded as train.py does it, drawn on the
    device where they stay; with gradient checkpointing. On a CPU too it computes in bf16.
    """
    tokenizer, (device, _) = AutoTokenizer.from_pretrained(ROOT / "data/model"), pick_device()
    small = make_config(tokenizer, shape | {"num_hidden_layers": 1, "vocab_size": 1024},
                        vision | {"depth": 1, "fullatt_block_indexes": [0]})
    frequencies = dict(Qwen2_5_VLForConditionalGeneration(small).named_buffers())  # of all depths
    in_bf16 = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    options = {"mp_policy": in_bf16} if device.type == "cpu" else {}
    with patch("model.fully_shard", partial(fully_shard, **options)):
        model = model_module._empty_shards(make_config(tokenizer, shape, vision), device,
                                           frequencies)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        values = parameter.detach().to_local()
        if parameter.ndim == 1:
            values.normal_(float(name.endswith("weight")), 0.02)  # norms near 1, biases near 0
        else:  # keeps the scale of what goes through it, whatever the width; tokens attend unevenly
            values.normal_(0.0, values[0].numel() ** -0.5)
    enable = getattr(model, "activation_checkpointing_enable", None)  # its name in newer versions
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    policy = Policy(model_module._set_up(model), tokenizer, Qwen2VLImageProcessorPil(), device)
    return with_large_vocabulary(policy)


def plain_model(policy, dtype):
    """The weights of a sharded policy in plain transformers, whole, with nothing of ours."""
    config = copy.deepcopy(policy.model.config)
    with torch.device("meta"):
        plain = Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=dtype,
                                                                attn_implementation="sdpa")
    plain.to_empty(device=policy.device)
    plain.tie_weights()
    weights, buffers = policy.model.state_dict(), dict(policy.model.named_buffers())
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(weights[name].full_tensor())
        for name, buffer in plain.named_buffers():
            buffer.copy_(buffers[name])
    return plain


def make_tasks(num, image_size, words):
    """num questions of so many words, each about an image of noise of its own."""
    rng = random.Random(0)
    pictures = [Image.frombytes("RGB", image_size, rng.randbytes(3 * image_size[0] * image_size[1]))
                for _ in range(num)]
    known = ["What", "character", "is", "on", "the", "sign", "image", "of"]
    return [{"id": i, "family": "coding", "question": " ".join(rng.choices(known, k=words)),
             "answers": ["7"], "image": pictures[i], "type": []} for i in range(num)]


# ----------------------------------------------------------------------------------- forced lengths
class Ends(LogitsProcessor):
    """The end token by decree: due(step) -> (rows,) bool, True where it must come now; elsewhere it
    may not.
    """

    def __init__(self, end_id, due):
        self.end_id, self.due, self.step = end_id, due, 0

    def __call__(self, input_ids, scores):
        due = self.due(self.step, len(scores)).to(scores.device)  # (rows,)
        self.step += 1
        scores = scores.clone()
        scores[:, self.end_id] = float("-inf")
        only = torch.full_like(scores[0], float("-inf"))
        only[self.end_id] = 0.0
        return torch.where(due[:, None], only, scores)


def hazard(chance, seed=0):
    """Ends with a constant chance at each token: lengths are geometric."""
    generator = torch.Generator().manual_seed(seed)
    return lambda step, rows: torch.rand(rows, generator=generator) < chance


def every(length):
    """All rows end together, at the last token of each turn."""
    return lambda step, rows: torch.tensor((step + 1) % length == 0).expand(rows)


def at(lengths):
    """Row i ends at its token number lengths[i]; one number stands for all rows."""
    return lambda step, rows: torch.as_tensor(lengths).expand(rows) == step + 1


@contextlib.contextmanager
def scripted(policy, make_due, kinds, num_rollouts):
    """Inside, turns end as make_due() says, turn n of a rollout is an action of kind kinds[n];
    `seconds_now` is the clock.
    """
    draw, parse, clock = model_module.draw, rollout_module.parse_action, rollout_module.time
    script = iter([Action(kind, "7") for kind in kinds for _ in range(num_rollouts)])
    ends = Ends(policy.end_id, make_due())

    model_module.draw = lambda logits, *args: draw(ends(None, logits), *args)
    rollout_module.parse_action = lambda text: next(script)
    rollout_module.time = SimpleNamespace(perf_counter=seconds_now)
    try:
        yield
    finally:
        model_module.draw, rollout_module.parse_action, rollout_module.time = draw, parse, clock


class StubCode:
    """Gives every call an image of 112 x 112 at once."""

    def run_many(self, calls):
        return [ToolResult(True, "", picture.resize((112, 112)), None, 0.0) for _, picture in calls]


# ------------------------------------------------------------------------------ the two ways a step
@dataclass
class Scenario:
    name: str
    new_tokens: int  # of a turn, at most
    target: float | None
    kinds: tuple = ("answer",)  # of the actions of the turns
    chance: float | None = None  # of the end at each token; None: all turns are new_tokens long
    beta: float = 0.0
    lean: bool = False  # the plain way too takes logits of action tokens only
    group_size: int = 8

    def advantages(self, num_prompts):
        return group_advantages(REWARDS.repeat(num_prompts,
                                               self.group_size // len(REWARDS))).flatten()

    def due(self):
        if self.chance:
            return hazard(self.chance)
        return every(self.new_tokens) if len(self.kinds) > 1 else at(-1)


@dataclass
class Clock:
    """Seconds by stage."""
    stages: dict = field(default_factory=dict)
    last: float = field(default_factory=lambda: seconds_now())

    def lap(self, name):
        now = seconds_now()
        self.stages[name] = self.stages.get(name, 0.0) + now - self.last
        self.last = now

    @property
    def total(self):
        return sum(self.stages.values())


def our_step(policy, reference, optimizer, tasks, scenario):
    """Stages 2 to 5 of train.py. Returns (rollouts, clock)."""
    config = Config(group_size=scenario.group_size, max_turns=len(scenario.kinds),
                    max_new_tokens=scenario.new_tokens, max_tokens=8192, beta=scenario.beta,
                    micro_batch_tokens=8192, batch_tokens=64 * 8192)
    num = len(tasks) * config.group_size
    clock = Clock()
    with scripted(policy, scenario.due, scenario.kinds, num), gathered(policy):
        rollouts, spent = roll_out(policy, tasks, Tools(code=StubCode()), config.limits(),
                                   group_size=config.group_size)
    clock.lap("generate")
    # the stub, and cutting its images into patches, which the plain way gets
    clock.stages["generate"] -= spent["tools"]
    advantages = scenario.advantages(len(tasks)).tolist()
    batches, num_real = even_micro_batches(policy, rollouts, advantages, config.micro_batch_tokens)
    ref_logps = reference_logps(reference if scenario.beta else None, batches, config.temperature)
    clock.lap("reference")
    update(policy, optimizer, batches, num_real, ref_logps, config)
    clock.lap("update")
    assert len(rollouts) == num and all(len(r.turns) == len(scenario.kinds) for r in rollouts)
    return rollouts, clock


def distance(ours, expected):
    """‖ours - expected‖ / ‖expected‖ of tensors, each side taken as one vector."""
    ours, expected = list(ours), list(expected)
    off = sum((a - b).double().square().sum().item() for a, b in zip(ours, expected, strict=True))
    return (off / sum(b.double().square().sum().item() for b in expected)) ** 0.5


def plain_logps(model, inputs, targets, mask, suppressed):
    """Log-probs of the masked targets, (tokens,), from logits of these tokens only."""
    hidden = model.model(**inputs, use_cache=False).last_hidden_state[:, :-1]
    return token_logps(hidden[mask], model.lm_head.weight, targets[mask], temperature=1.0,
                       suppressed=suppressed)[0]


def logps_alone(model, policy, rollout):
    """Log-probs of a rollout's action tokens, (tokens,), computed alone, without padding, from all
    logits of a plain model.
    """
    inputs = model_inputs(policy, [rollout], "right")
    mask = torch.tensor(rollout.action_mask[1:], device=policy.device).bool()
    logits = model(**inputs, use_cache=False).logits[0, :-1][mask].float()  # (tokens, V)
    logits = logits.index_fill(1, policy.suppressed, float("-inf"))
    return logits.log_softmax(dim=1).gather(1, inputs["input_ids"][0, 1:][mask, None]).squeeze(1)


def plain_step(policy, optimizer, tasks, scenario, rollouts, micro_batch=16):
    """The plain way with the lengths of these rollouts, and as many rows in a micro-batch.

    policy: one of its own, unsharded; with a lean scenario it may be sharded. Returns its clock.
    """
    clock, model = Clock(), policy.model
    model.plain_logps = MethodType(plain_logps, model)
    if isinstance(model, FSDPModule):
        register_fsdp_forward_method(model, "plain_logps")
    limits = Limits(max_tokens=8192, max_new_tokens=1)
    prompts = [
        r for task in tasks
        for r in rollout_module._open(policy, task, limits, scenario.group_size, "short")]
    lengths = [sum(r.action_mask) for r in rollouts]
    settings = GenerationConfig(do_sample=True, top_k=0, top_p=1.0, max_new_tokens=max(lengths),
                                eos_token_id=policy.end_id,
                                pad_token_id=policy.tokenizer.pad_token_id)
    with torch.no_grad(), gathered(policy):
        output = model.generate(**model_inputs(policy, prompts, "left"), generation_config=settings,
                                logits_processor=[Ends(policy.end_id, at(lengths))])
    clock.lap("generate")
    assert output.shape[0] == len(rollouts)
    model.train()
    advantages = scenario.advantages(len(tasks)).to(policy.device)
    for rows in torch.arange(len(rollouts)).split(micro_batch):
        part = [rollouts[i] for i in rows]
        inputs = model_inputs(policy, part, "right")
        length = inputs["input_ids"].shape[1]
        # (B, T - 1)
        mask = torch.tensor(
            [r.action_mask + [0] * (length - len(r.ids)) for r in part],
            device=policy.device).float()[:, 1:]
        targets = inputs["input_ids"][:, 1:]
        weights = advantages[rows, None] * mask / mask.sum(dim=1, keepdim=True) / len(rollouts)
        if scenario.lean:
            logps = model.plain_logps(inputs, targets, mask.bool(), policy.suppressed)
            weights = weights[mask.bool()]
        else:
            logits = model(**inputs, use_cache=False).logits[:, :-1]
            logps = torch.log_softmax(logits, dim=2).gather(2, targets[:, :, None]).squeeze(2)
        (-(weights * logps).sum()).backward()
    optimizer.step()
    optimizer.zero_grad()
    model.eval()
    clock.lap("update")
    return clock


def adamw(policy):
    return torch.optim.AdamW(policy.model.parameters(), lr=1e-6, weight_decay=0.0)


def state_of(policy, optimizer):
    """Copies of all weights and moments of this rank."""
    moments = [kept[name] for kept in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    return [t.detach().to_local().clone() for t in (*policy.model.parameters(), *moments)]


def computed_peak(config, shape):
    """Bytes on one GPU, by data/cost.py, of a step whose rollouts are one packed row."""
    packed = shape.num_prompts * (shape.prompt_tokens + shape.group_size * shape.sample_tokens)
    images = 2 if shape.sample_patches else 1  # a rollout
    return peak(step_bytes(config, shape, gpus=1, micro_batch_tokens=packed, batch_tokens=1 << 20,
                           max_tokens=int(shape.prompt_tokens + shape.sample_tokens), max_images=images))


def shape_of(rollouts, num_prompts):
    """The mean shape of these rollouts, for the arithmetic."""
    prompt = sum(r.action_mask.index(1) for r in rollouts) / len(rollouts)
    patches = sum(r.images[0].pixels.shape[0] for r in rollouts) / len(rollouts)
    made = sum(sum(i.pixels.shape[0] for i in r.images[1:]) for r in rollouts) / len(rollouts)
    return Shape(num_prompts, len(rollouts) // num_prompts, prompt,
                 sum(len(r.ids) for r in rollouts) / len(rollouts) - prompt,
                 sum(sum(r.action_mask) for r in rollouts) / len(rollouts), patches, made)


def compare(name, folder, scenarios, repeats, *, num_prompts=8, image_size=(112, 112), words=20):
    """Yields a row of the table for each scenario."""
    policy, plain = load(folder), load_policy(folder)
    plain.suppressed = policy.suppressed
    plain.model.generation_config = GenerationConfig()  # without the folder's own defaults
    ours_optimizer, plain_optimizer = adamw(policy), adamw(plain)
    reference = load(folder) if any(s.beta for s in scenarios) else None
    tasks = make_tasks(num_prompts, image_size, words)
    for scenario in scenarios:
        ours, plains = [], []
        for repeat in range(repeats + 1):  # the first is a warm-up where there are several
            torch.manual_seed(repeat)
            rollouts, clock = our_step(policy, reference, ours_optimizer, tasks, scenario)
            ours.append(clock)
            other = replace(scenario, beta=0.0)
            if scenario.beta:  # beside the same step without a reference
                plains.append(our_step(policy, None, ours_optimizer, tasks, other)[1])
            else:
                plains.append(plain_step(plain, plain_optimizer, tasks, other, rollouts))
            print(f"  {name}, {scenario.name}: {plains[-1].total:.2f} and {clock.total:.2f} s",
                  file=sys.stderr, flush=True)
        kept = slice(1, None) if repeats > 1 else slice(-1, None)
        row = table_row(name, scenario, ours[kept], plains[kept])
        spent = step_operations(policy.model.config, shape_of(rollouts, num_prompts),
                                beta=scenario.beta)
        due = sum(spent.values()) / 1e9
        yield row + f" {due:,.0f} | {due / median_total(ours[kept]):.0f} |"


def median_total(clocks):
    return median(clock.total for clock in clocks)


def table_row(name, scenario, ours, plains):
    ratio = median(a.total / b.total for a, b in zip(ours, plains))
    goal = "" if scenario.target is None else f"{'met' if ratio <= scenario.target else 'missed'}: {scenario.target}"
    stages = " + ".join(
        f"{median(c.stages[s] for c in ours):.2f}" for s in ("generate", "reference", "update"))
    others = " + ".join(f"{median(c.stages[s] for c in plains):.2f}" for s in ours[0].stages
                        if s in plains[0].stages)
    return (f"| {name} | {scenario.name} | {median_total(plains):.2f} = {others} | {median_total(ours):.2f} = {stages} "
            f"| {ratio:.2f} | {goal} |")


HEADER = ("| model | scenario | the plain way, s = generate + update | ours, s = generate + reference + update | ratio "
          "| target | 10⁹ operations due | 10⁹ a second |\n|---|---|---|---|---|---|---|---|")


def bench_steps(args):
    """8 prompts x 8 samples: ours over the plain way."""
    print(HEADER, flush=True)
    scenarios = [Scenario("one turn, 48 tokens", 48, 0.85),
                 Scenario("ragged, 1 to 256 tokens", 256, 0.75, chance=1 / 60),
                 Scenario("two turns of 32, a tool between", 32, 1.0, kinds=("code", "answer")),
                 Scenario("one turn, beta 0.04 over beta 0", 48, 1.25, beta=0.04)]
    for row in compare("laptop", str(ROOT / "data/model"), scenarios, 2 if args.quick else 5,
                       image_size=(56, 56)):
        print(row, flush=True)
    if not args.quick:
        with tempfile.TemporaryDirectory() as folder:
            middle = [replace(s, new_tokens=min(s.new_tokens, 256)) for s in scenarios]
            for row in compare("middle", make_folder(folder, MIDDLE, VISION), middle, args.repeats):
                print(row, flush=True)


def bench_mat(args):
    """The shape of the paper's tasks: what sharing prompts gives, beside the plain way with logits
    of action tokens only.
    """
    print("\n" + HEADER, flush=True)
    scenario = Scenario("prompt of 880, samples of 160, G = 8; without sharing on the left",
                        32 if args.quick else 160, 0.4, lean=True)
    with tempfile.TemporaryDirectory() as folder:
        name = str(ROOT / "data/model") if args.quick else make_folder(folder, MIDDLE, VISION)
        for row in compare("laptop" if args.quick else "middle", name, [scenario], args.repeats,
                           num_prompts=2, image_size=(616, 616), words=340):
            print(row, flush=True)


# ------------------------------------------------------------------ what each thing helps by itself
@contextlib.contextmanager
def prompts_apart():
    """Inside, the samples of a prompt have images of their own, equal but not the same: nothing is
    shared among them.
    """
    open_rollouts = rollout_module._open

    def apart(*args):
        rollouts = open_rollouts(*args)
        for rollout in rollouts:
            rollout.images = [EncodedImage(*image) for image in rollout.images]
        return rollouts
    rollout_module._open = apart
    yield
    rollout_module._open = open_rollouts


def bench_parts(args):
    """The same steps with and without one of the things that make them fast."""
    print("\n| model, steps | without | generate, s with / without | update, s with / without | whole step, with over without |"
          "\n|---|---|---|---|---|", flush=True)
    one, two = Scenario("one turn of 48", 48, None), Scenario(
        "two turns of 32, a tool between", 32, None, kinds=("code", "answer"))
    mat = Scenario("prompt of 880, samples of 160", 32 if args.quick else 160, None)
    with tempfile.TemporaryDirectory() as folder:
        models = {"laptop": str(ROOT / "data/model")} | (
            {} if args.quick else {"middle": make_folder(folder, MIDDLE, VISION)})
        for model, name in models.items():
            policy = load(name)
            optimizer = adamw(policy)
            small, large = (8, (112, 112), 20), (2, (616, 616), 340)  # prompts, pixels, words
            for scenario, without, tasks in [(one, prompts_apart, small),
                                             (two, prompts_apart, small),
                                             (mat, prompts_apart, large)]:
                clocks, tasks = ([], []), make_tasks(*tasks)
                # the first is a warm-up
                for repeat in range(1 + (5 if model == "laptop" else args.repeats)):
                    for kept, block in zip(clocks, (contextlib.nullcontext, without)):
                        torch.manual_seed(repeat)
                        with block():
                            kept.append(our_step(policy, None, optimizer, tasks, scenario)[1])
                a, b = (kept[1:] or kept for kept in clocks)
                cells = [" / ".join(f"{median(c.stages[stage] for c in clock):.2f}"
                                    for clock in (a, b)) for stage in ("generate", "update")]
                ratio = median(x.total / y.total for x, y in zip(a, b))
                print(f"| {model}, {len(tasks)} x 8, {scenario.name} | {without.__name__} | {cells[0]} | {cells[1]} "
                      f"| {ratio:.2f} |", flush=True)


# ------------------------------------------------------------------------------------------ scoring
def straight_logps(hidden, lm_head, targets, *, temperature, suppressed):
    """All logits at once; no entropy."""
    logits = torch.nn.functional.linear(hidden, lm_head).float() / temperature
    logps = torch.log_softmax(logits.index_fill(1, suppressed, float("-inf")), dim=1)  # (N, V)
    return logps.gather(1, targets[:, None]).squeeze(1), None


def score_once(way, dtype, file, tokens, width, vocabulary, threads):
    """In a process of its own.

    Prints peak bytes beyond inputs and gradients, and seconds; leaves the values in a file.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    dtype = getattr(torch, dtype)
    hidden = torch.randn(tokens, width).to(dtype).requires_grad_()
    lm_head = (torch.randn(vocabulary, width) / width ** 0.5).to(dtype).requires_grad_()
    targets, suppressed = torch.randint(
        vocabulary - 300, (tokens,)), torch.arange(vocabulary - 293, vocabulary)
    upstream = torch.randn(tokens)
    before = memory("VmRSS")
    start = seconds_now()
    logps, _ = {"ours": token_logps, "straight": straight_logps}[way](
        hidden, lm_head, targets, temperature=0.9, suppressed=suppressed)
    (logps * upstream).sum().backward()
    seconds = seconds_now() - start
    gradients = sum(x.grad.numel() * x.grad.element_size() for x in (hidden, lm_head))
    print("RESULT", memory("VmHWM") - before - gradients, seconds)
    torch.save([logps.detach(), hidden.grad, lm_head.grad], file)


def memory(name):
    """Bytes of this process: VmRSS now, VmHWM at most.

    Not getrusage's: a child begins with the peak of its parent there.
    """
    return 1024 * int(re.search(rf"{name}:\s*(\d+)", Path("/proc/self/status").read_text())[1])


def bench_scoring(args):
    """Forward and backward of token_logps and of all logits at once, each in a fresh process."""
    print("\n| log-probs of 4,096 tokens, V = 151,936 | all at once, GB | ours, GB | ratio (at most 0.125) | all at once, s "
          "| ours, s | ratio (at most 1.15) | values and gradients differ by, relative |\n|---|---|---|---|---|---|---|---|",
          flush=True)
    for dtype, width in {"float32": 64 if args.quick else args.width, "bfloat16": 8}.items():
        with tempfile.TemporaryDirectory() as folder:
            runs, values = [], []
            for way in ("straight", "ours"):
                numbers = ["4096", str(width), "151936", str(torch.get_num_threads())]
                runs.append(in_a_process("--score_once", way, dtype, f"{folder}/{way}", *numbers))
                values.append(torch.load(f"{folder}/{way}"))
        worst = max((a - b).abs().max().item() / a.abs().max().item() for a, b in zip(*values))
        (all_bytes, all_seconds), (num_bytes, seconds) = runs
        print(f"| {dtype}, H = {width} | {all_bytes / 1e9:.2f} | {num_bytes / 1e9:.2f} | {num_bytes / all_bytes:.3f} "
              f"| {all_seconds:.1f} | {seconds:.1f} | {seconds / all_seconds:.2f} | {worst:.0e} |", flush=True)


def in_a_process(*arguments):
    """The numbers that this script prints when called so, in a fresh process."""
    done = subprocess.run([sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True,
                          check=True)
    return [float(x) for x in done.stdout.split("RESULT")[1].split()]


# ------------------------------------------------------------------------ a slice of 3B, and growth
def product_rate(shapes, device="cpu", dtype=torch.float32):
    """Operations a second of plain products (m, k) x (k, n), the best of three each, all together.
    """
    operations = seconds = 0.0
    for m, k, n in shapes:
        a, b = (torch.randn(*size, device=device, dtype=dtype) for size in ((m, k), (k, n)))
        times = []
        for _ in range(3):
            start = seconds_now()
            torch.mm(a, b)
            times.append(seconds_now() - start)
        operations, seconds = operations + 2 * m * k * n, seconds + min(times)
    return operations / seconds


def bench_slice(args):
    """Two layers at the width of 3B: operations a second over those of plain products of its own
    shapes.
    """
    tokens, actions = (256, 64) if args.quick else (1024, 160)
    with tempfile.TemporaryDirectory() as folder:
        shape = SLICE_3B | ({"vocab_size": 8192} if args.quick else {})
        policy = load_policy(make_folder(folder, shape, VISION
                                         | {"depth": 1, "fullatt_block_indexes": [0]}))
    policy = with_large_vocabulary(policy)
    ids = torch.randint(0, 700, (tokens,)).tolist()
    row = Rollout({}, ids, [0] * (tokens - actions) + [1] * actions, [0.0] * tokens)
    batch = collate(policy, [row], [0.0])
    operations = 3 * sum(forward_operations(policy.model.config, tokens=tokens, pairs=tokens
                                            * (tokens + 1) / 2, head_tokens=actions).values())
    rates, products = [], []
    for _ in range(2 if args.quick else 5):
        policy.model.zero_grad()  # as in an update: gradients begin with nothing
        products.append(
            product_rate([(tokens, 2048, 11_008), (tokens, 11_008, 2048), (2048, tokens, 11_008)]))
        start = seconds_now()
        action_logps(policy, batch, 1.0)[0].sum().backward()
        rates.append(operations / (seconds_now() - start))
    share = median(a / b for a, b in zip(rates, products))
    print(f"\nTwo layers of 3B, {tokens} tokens, forward and backward: {operations / 1e9:,.0f} · 10⁹ operations, "
          f"{median(rates) / 1e9:.0f} · 10⁹ a second, {share:.0%} of plain products (at least 70 %: "
          f"{'met' if share >= 0.7 else 'missed'})", flush=True)


def bench_linear(args):
    """Seconds of a step at 1, 2 and 4 times the prompts, samples, tokens; memory of roll_out by the
    number of rollouts.
    """
    print("\n| laptop model, seconds of a step | 1 x | 2 x | 4 x |\n|---|---|---|---|", flush=True)
    policy = load(str(ROOT / "data/model"))
    optimizer = adamw(policy)
    for what, sizes in {"prompts": [(p, 4, 32) for p in (4, 8, 16)],
                        "samples": [(4, g, 32) for g in (4, 8, 16)],
                        "tokens": [(4, 4, t) for t in (32, 64, 128)]}.items():
        cells = []
        for prompts, samples, tokens in sizes:
            tasks = make_tasks(prompts, (56, 56), 20)
            scenario = Scenario("", tokens, None, group_size=samples)
            times = [our_step(policy, None, optimizer, tasks, scenario)[1].total
                     for _ in range(2 if args.quick else 4)]
            cells.append(median(times[1:]))
        print(f"| {what}, from {sizes[0]} | " + " | ".join(f"{c:.2f}" for c in cells) + " |",
              flush=True)
    peaks = [in_a_process("--rollout_once", str(n))[0] for n in (8, 16, 32)]
    print("\nPeak memory of roll_out in calls of 64 rows, for 64, 128 and 256 rollouts: "
          + ", ".join(f"{p / 1e6:.0f} MB" for p in peaks), flush=True)


def rollout_once(prompts):
    """In a process of its own: peak bytes beyond the model after roll_out of 8 rollouts a prompt,
    64 rows at a time.
    """
    policy = load_policy(str(ROOT / "data/model"))
    tasks = make_tasks(prompts, (112, 112), 20)
    scenario = Scenario("", 64, None)
    limits = Limits(1, 64, 2048, batch_tokens=64 * 2048)
    before = memory("VmRSS")
    with scripted(policy, scenario.due, scenario.kinds, 8 * prompts):
        roll_out(policy, tasks, Tools(), limits, group_size=8)
    print("RESULT", memory("VmHWM") - before)


def bench_evaluate(args):
    """Greedy evaluation of one turn, files and scores included, over one bare `generate` of the
    same rows; tokens a second.
    """
    policy = load_policy(str(ROOT / "data/model"))
    policy.model.generation_config = GenerationConfig()  # without the folder's own defaults
    tasks = load_tasks(ROOT / "data/offline/heldout.json")
    limits, rates, bare = Limits(1, 96, 512), [], []
    for _ in range(3 if args.quick else 6):  # the first is a warm-up
        with tempfile.TemporaryDirectory() as folder:
            start = seconds_now()
            evaluate_tasks(policy, tasks, Tools(), limits, batch_size=len(tasks), output_dir=folder)
            seconds = seconds_now() - start
        start = seconds_now()
        prompts = [rollout_module._open(policy, task, limits, 1, "short")[0] for task in tasks]
        settings = GenerationConfig(do_sample=False, max_new_tokens=96, eos_token_id=policy.end_id,
                                    pad_token_id=policy.tokenizer.pad_token_id,
                                    suppress_tokens=policy.suppressed.tolist())
        with torch.no_grad():
            inputs = model_inputs(policy, prompts, "left")
            new = policy.model.generate(**inputs, generation_config=settings)[
                :, inputs["input_ids"].shape[1]:].tolist()
        tokens = sum(ids.index(policy.end_id) + 1 if policy.end_id in ids else len(ids)
                     for ids in new)
        rates.append(tokens / seconds)
        bare.append(tokens / (seconds_now() - start))
    share = median(a / b for a, b in zip(rates[1:], bare[1:]))
    print(f"\nGreedy evaluation of {len(tasks)} items, laptop model: {median(rates[1:]):.0f} tokens a second, bare generate "
          f"{median(bare[1:]):.0f}: {share:.2f} of it (at least 0.85: {'met' if share >= 0.85 else 'missed'})", flush=True)


class CountOperations(TorchDispatchMode):
    """Counts operations that compute, each at least one kernel of a GPU; views are none."""

    num = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        self.num += not (func.is_view or "unsafe_view" in str(func) or "empty" in str(func))
        return out


@torch.no_grad()
def next_token(model, num_tokens):
    """Median milliseconds, and the operations, of a forward pass of the next token of one row."""
    cache, places = DynamicCache(config=model.config), torch.arange(num_tokens).expand(3, 1, -1)
    times = []
    for i in range(num_tokens):
        start = time.perf_counter()
        with CountOperations() if i == num_tokens - 1 else contextlib.nullcontext() as counted:
            model(input_ids=torch.zeros(1, 1, dtype=torch.long), position_ids=places[:, :, i:i + 1],
                  past_key_values=cache, attention_mask=torch.ones(1, i + 1, dtype=torch.long))
        times.append(1000 * (time.perf_counter() - start))
    return median(times), counted.num


def bench_launch(args):
    """What it takes to issue the operations of a token, where the products cost nothing."""
    policy, one_less = (random_policy(TOY | {"num_hidden_layers": n}, TOY_VISION) for n in (36, 35))
    plain, shorter = (plain_model(p, torch.bfloat16) for p in (policy, one_less))
    with gathered(policy):
        rows = [(next_token(plain, 50), next_token(policy.model, 50)) for _ in range(7)]
    times = [median(row[way][0] for row in rows) for way in (0, 1)]
    num = rows[0][0][1]
    print(f"\nThe next token through 36 narrow layers: {times[0]:.1f} ms plain, {times[1]:.1f} ms with FSDP's hooks; "
          f"{num} operations, {num - next_token(shorter, 2)[1]} a layer", flush=True)


PARTS = {"evaluate": bench_evaluate, "steps": bench_steps, "mat": bench_mat, "parts": bench_parts,
         "scoring": bench_scoring, "slice": bench_slice, "linear": bench_linear,
         "launch": bench_launch}


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--quick", action="store_true", help="small models and few repetitions")
    parser.add_argument("--cpu", action="store_true", help="one thread, CPU seconds")
    parser.add_argument("--repeats", type=int, default=1,
                        help="of the middle model's steps, after a first one")
    parser.add_argument("--width", type=int, default=256, help="H of the scoring; 3B has 2048")
    parser.add_argument("--score_once", nargs=7, help=argparse.SUPPRESS)
    parser.add_argument("--rollout_once", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    if args.score_once:
        return score_once(*args.score_once[:3], *map(int, args.score_once[3:]))
    if args.rollout_once:
        return rollout_once(args.rollout_once)
    start_ranks()
    if args.cpu:
        torch.set_num_threads(1)
    start = time.perf_counter()
    for name in args.only:
        PARTS[name](args)
    print(f"\n{time.perf_counter() - start:.0f} s on {torch.get_num_threads()} threads, torch {torch.__version__}")


if __name__ == "__main__":
    main()
