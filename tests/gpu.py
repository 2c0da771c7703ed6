"""Whether training is right, whole and fast on a GPU: python tests/gpu.py

It needs one GPU of 80 GB and nothing from a hub, and is meant to take at most 6 minutes there. Weights are random, at the width
and vocabulary of Qwen2.5-VL-3B, with as many of its 36 layers as the GPU holds by data/cost.py. Without a GPU a toy model goes
through the same checks, in bf16 too; its times and bytes mean nothing. Rows of a table (value, bound, ok or FAIL) are printed
as they come. A part that raises is a row that fails, and the next part begins. The exit status is 0 only if nothing failed.
"""
import json
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from math import inf, isfinite, nan
from pathlib import Path

import torch
import transformers

from bench import (ROOT, SHAPE_3B, TOY, TOY_VISION, Scenario, computed_peak, distance, logps_alone, make_tasks, memory,
                   our_step, plain_model, plain_step, product_rate, prompts_apart, random_policy, shape_of, state_of)
from bench_tools import CROP
from cost import VISION, Shape, published, step_operations
from data.checkpoints import load_checkpoint, save_checkpoint
from model import export, gathered, load_policy, start_ranks
from rollout import collate
from tools import CodeTool, SearchTool


class Run:
    """The sizes for this machine, the models, and the table."""

    def __init__(self):
        self.failed, self.on_gpu = 0, torch.cuda.is_available()
        if self.on_gpu:  # a prompt of 880 tokens, 484 of its image; two turns of 64 and an observation are samples of 160
            self.shape, self.vision, picture, words, turn = SHAPE_3B, VISION, (616, 616), 340, 64
        else:
            self.shape, self.vision, picture, words, turn = TOY, TOY_VISION, (112, 112), 20, 6
        self.tasks = make_tasks(2, picture, words)
        self.scenario = Scenario("two turns, a processed image", turn, None, kinds=("code", "answer"), lean=True)

    def row(self, what, value, least=-inf, most=inf):
        """Print a row of the table. NaN meets no bound."""
        bounds = [f"{sign} {bound:g}" for sign, bound in ((">=", least), ("<=", most)) if isfinite(bound)]
        met = not bounds or least <= value <= most
        self.failed += not met
        print(f"{what:<84}{value:>12.4g}  {' '.join(bounds):<16}{('ok' if met else 'FAIL') * bool(bounds)}", flush=True)

    def part(self, check):
        """Run one part of the checks."""
        start = time.perf_counter()
        try:
            check(self)
        except Exception as error:  # of any kind: the other parts still have something to tell
            self.row(f"{check.__name__}: {type(error).__name__}: {' '.join(str(error).split())[:300]} ", nan, most=0)
        print(f"-- {check.__name__}: {time.perf_counter() - start:.0f} s", flush=True)
        torch.cuda.empty_cache()

    def model(self, layers, **vision):
        """(policy, optimizer) with so many decoder layers, sharded by FSDP2 over this one rank."""
        policy = random_policy(self.shape | {"num_hidden_layers": layers}, self.vision | vision)
        return policy, torch.optim.AdamW(policy.model.parameters(), lr=1e-6, weight_decay=0.0, fused=True)

    @cached_property
    def whole(self):
        """(policy, optimizer) with as many layers as the GPU holds, with 15 % to spare."""
        config, layers = published("3B"), self.shape["num_hidden_layers"]
        while self.on_gpu and computed_peak(config, Shape(2, 8)) > 0.85 * torch.cuda.mem_get_info()[1]:
            config.text_config.num_hidden_layers = layers = layers - 1
        self.row("decoder layers", layers)
        return self.model(layers)

    def step(self, policy, optimizer):
        """Stages 2 to 5 of train.py, 2 prompts x 8 samples, always with the same seed: (rollouts, seconds by stage)."""
        torch.manual_seed(0)
        return our_step(policy, None, optimizer, self.tasks, self.scenario)

    def rollouts(self, policy):
        """(rollouts, their packed row). The learning rate is 0, so the weights stay those that sampled."""
        rollouts, _ = self.step(policy, torch.optim.SGD(policy.model.parameters(), lr=0.0))
        return rollouts, collate(policy, rollouts, [0.0] * len(rollouts))


def gradients(run):
    """Two layers, in bf16, packed and sharded, against plain transformers in fp32."""
    policy, _ = run.model(2, depth=2, fullatt_block_indexes=[1])
    rollouts, row = run.rollouts(policy)
    plain = plain_model(policy, torch.float32)
    policy.model.train().action_logps(row, 1.0, policy.suppressed)[0].sum().backward()
    for rollout in rollouts:
        logps_alone(plain, policy, rollout).sum().backward()
    ours, exact = ([getattr(p.grad, "full_tensor", lambda: p.grad)() for p in m.parameters()] for m in (policy.model, plain))
    run.row("gradients of 2 layers, bf16 against fp32, relative", distance(ours, exact), most=0.04)
    worst, name = max((distance([a], [b]), name) for a, b, (name, _) in zip(ours, exact, plain.named_parameters()))
    run.row(f"the worst of them: {name}", worst, most=0.2)


def checkpoint(run):
    """Saved and loaded, all numbers are back, and a step after it is the same. An export is the model."""
    policy, optimizer = run.model(2, depth=2, fullatt_block_indexes=[1])

    def state_after_a_step():
        run.step(policy, optimizer)
        return state_of(policy, optimizer)
    with tempfile.TemporaryDirectory() as folder:
        out, first = Path(folder), state_after_a_step()
        save_checkpoint(out, 1, policy, optimizer, {}, keep=1)
        second = state_after_a_step()
        load_checkpoint(out / "checkpoint-1", policy, optimizer)
        run.row("loaded from a checkpoint: relative error", distance(state_of(policy, optimizer), first), most=0)
        error = distance(state_after_a_step(), second) / distance(first, second)
        run.row("the next step replayed: its error over what it moved", error, most=0.05 if run.on_gpu else 0)
        export(policy, out / "model")
        exported = load_policy(str(out / "model")).model
        error = distance(exported.parameters(), plain_model(policy, exported.dtype).parameters())
        run.row(f"exported, and read again as {exported.dtype}: relative error", error, most=0)


def parity(run):
    """bf16 against plain transformers: our distance from fp32 may be that of plain bf16, and half as much again."""
    policy, _ = run.whole
    rollouts, row = run.rollouts(policy)
    plain, image, mask = plain_model(policy, torch.bfloat16), rollouts[0].images[0], row.action_mask
    pixels, grid = image.pixels.to(policy.device, torch.bfloat16), torch.tensor([image.grid], device=policy.device)
    with torch.no_grad():
        with gathered(policy):
            ours, theirs = (m.model.visual(pixels, grid_thw=grid).pooler_output for m in (policy.model, plain))
        run.row("image features, sharded against plain bf16, relative", distance([ours], [theirs]), most=0.003)
        half = torch.cat([logps_alone(plain, policy, rollout) for rollout in rollouts])
        plain = plain_model(policy, torch.float32)
        exact = torch.cat([logps_alone(plain, policy, rollout) for rollout in rollouts])
        scored = policy.model.action_logps(row, 1.0, policy.suppressed)[0][mask]
    drawn = row.targets[mask] != policy.end_id  # the ends of turns are forced
    half, exact, scored, sampled = (x[drawn] for x in (half, exact, scored, row.sampled_logps[mask]))
    error = (half - exact).abs().mean().item()
    run.row("log-probs, plain bf16 against plain fp32: mean, nats", error)
    for what, logps in {"scored in the packed row": scored, "as sampled": sampled}.items():
        run.row(f"log-probs {what}, the same over that", (logps - exact).abs().mean().item() / error, most=1.5)
    run.row("gap: the largest |sampled - scored|, nats", (sampled - scored).abs().max().item(), most=0.3)


def speed(run):
    """A whole step after a first one: seconds, bytes, and beside the same without what is shared."""
    policy, optimizer = run.whole
    run.step(policy, optimizer)
    if run.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    rollouts, ours = run.step(policy, optimizer)
    used = torch.cuda.max_memory_allocated() if run.on_gpu else memory("VmHWM")
    shape, config = shape_of(rollouts, 2), policy.model.config
    generate, update = ours.stages["generate"], ours.stages["update"]
    rate = product_rate([(8192 if run.on_gpu else 512,) * 3], policy.device, torch.bfloat16)
    due = step_operations(config, shape, checkpointing=True)["update"]
    for what, value in {
            "tokens of a prompt": shape.prompt_tokens, "tokens of a sample": shape.sample_tokens, "seconds": ours.total,
            **{f"seconds, {name}": seconds for name, seconds in ours.stages.items()},
            "action tokens a second while sampling": len(rollouts) * shape.action_tokens / generate,
            "milliseconds for the next token of all rows": 1000 * generate / shape.action_tokens,
            "product of large bf16 matrices, 10¹² operations a second": rate / 1e12,
            "share of that in the update, counting what checkpointing computes again": due / update / rate,
            "peak memory, GB": used / 1e9}.items():
        run.row(what, value)
    run.row("peak memory over what data/cost.py computes", used / computed_peak(config, shape), *run.on_gpu * (0.9, 1.1))
    plain = plain_step(policy, optimizer, run.tasks, run.scenario, rollouts, micro_batch=4)
    run.row("whole step over the plain way, where each row has its own prompt", ours.total / plain.total, most=1)
    with prompts_apart():
        apart = run.step(policy, optimizer)[1].stages
    run.row("sampling over sampling without sharing", generate / apart["generate"])
    run.row("update over an update without sharing", update / apart["update"], most=1)


def tools(run):
    """200 code calls and 200 searches in other threads while a step runs."""
    titles = [json.loads(line)["title"] for line in open(ROOT / "data/offline/corpus.jsonl", encoding="utf-8")]
    queries, calls = [*titles, *map("animal {}".format, titles)][:200], [(CROP, run.tasks[0]["image"])] * 200
    search = SearchTool(f"sqlite:{ROOT / 'data/offline/corpus.sqlite'}")
    with CodeTool(4) as code, ThreadPoolExecutor() as beside:
        made, found = beside.submit(code.run_many, calls), beside.submit(search.search_many, queries)
        run.step(*run.whole)
        for what, results in {"code calls": made.result(), "searches": found.result()}.items():
            run.row(f"{what} that failed, of {len(results)}", sum(not result.ok for result in results), most=0)


def main():
    start_ranks()
    torch.backends.cudnn.allow_tf32 = False  # the patches go through a convolution, and fp32 is to be fp32
    run, start = Run(), time.perf_counter()
    name = torch.cuda.get_device_name() if run.on_gpu else "a CPU and a toy model"
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    print(f"{name}; torch {torch.__version__}, transformers {transformers.__version__}", flush=True)
    for check in (gradients, checkpoint, parity, speed, tools):
        run.part(check)
    print(f"{run.failed} failed; {time.perf_counter() - start:.0f} s", flush=True)
    torch.distributed.destroy_process_group()
    return int(run.failed > 0)


if __name__ == "__main__":
    sys.exit(main())
