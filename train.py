"""Train a vision-language model to use tools, by GRPO on live multi-turn rollouts.

    torchrun --nproc_per_node=2 train.py       # a laptop: no GPU, no network, no argument
    torchrun --nproc_per_node=8 train.py --model Qwen/Qwen2.5-VL-7B-Instruct --tasks ... --lr 1e-6
    python train.py --help                     # every flag, with its unit

Read `main` first. Its loop shows the seven stages of a step: sample prompts, roll out, reward,
advantages, update, log, checkpoint. What it calls follows in that order, then the start.

All randomness of a step comes from (seed, step, rank). A run that is killed at any moment and
resumed leaves the same metrics and weights as one that is left alone, on CPUs bit for bit.

Left out on purpose: a trainer class, callbacks, batches that mix old and new rollouts, a warm start
(data/make_model.py).

Legend: P prompts a step, G samples a prompt, B = P·G rollouts, T tokens.
"""
import json
import math
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from itertools import chain, compress
from pathlib import Path
from statistics import fmean
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.elastic.multiprocessing.errors import record
from torch.optim import AdamW, Optimizer
from transformers.utils import logging as hf_logging

from data.checkpoints import load_checkpoint, newest_checkpoint, save_checkpoint
from data.files import (append_json_line, holds, nothing_left, publish, read_json_lines,
                        take_folder, write_json_lines, write_whole)
from data.flags import fail, flag, parse_flags
from data.model_files import check_model
from data.plan import show_plan
from data.similarity import Similarity, load_similarity
from data.tasks import describe, load_task_files
from grpo import LOSSES, group_advantages, policy_loss, token_weights
from model import (MAX_PIXELS, MIN_PIXELS, Policy, action_logps, all_reduce, clock,
                   copy_policy, export, gather, gathered, is_lead, load_policy,
                   share_of_rank, start_ranks)
from reward import (MIN_SIMILARITY, STEP_WEIGHTS, WEIGHTS, episode_reward, exact_match,
                    parse_weights, step_reward, weighted_sum)
from rollout import (Limits, Rollout, collate, micro_batches, opening_error, roll_out,
                     rollout_row)
from tools import CodeTool, SearchTool, Tools, action_tags, parse_action

# Numbers given as flags are above 0 and finite, but for these bounds.
LEAST = {"group_size": 2, "temperature": 1e-6, "lr_decay": 0, "seed": 0, "beta": 0,
         "search_pages": 0, "search_budget": 0, "code_workers": 0, "eval_every": 0,
         "eval_limit": 0, "eval_temperature": 0, "min_similarity": 0}
MOST = {"lr_decay": 1, "seed": 2**32 - 1, "temperature": 1e6, "eval_temperature": 1e6,
        "code_workers": 1024, "code_timeout": 1e6, "min_similarity": 1}


@dataclass
class Config:
    """The flags. The defaults are the laptop run; the README has the ones of 3B and 7B."""
    model: str = flag("data/model", "hub name (Qwen/Qwen2.5-VL-3B-Instruct, -7B-) or local folder")
    tasks: str = flag(
        "data/offline/train.json", "training tasks: MAT's JSON, FlashRAG's jsonl, or step "
        "rows; several files with commas between")
    eval_tasks: str = flag(
        "data/offline/heldout.json", "held-out tasks, same formats, several files with commas "
        "between; empty: no evaluation")
    corpus: str = flag(
        "sqlite:data/offline/corpus.sqlite",
        "search backend: sqlite:INDEX, http://HOST:PORT/retrieve, serper")
    topk: int = flag(3, "passages a search returns")
    search_pages: int = flag(0, "pages of the first results that are read too (serper)")
    search_cache: str = flag(
        "runs/search_cache.sqlite", "answers from the network, kept for all runs; empty: none")
    search_budget: int = flag(
        0, "searches over the network, of all ranks, before the run saves and stops; 0: no limit")
    output_dir: str = flag(
        "runs/default", "where metrics, rollouts, checkpoints and the exported model go")
    mode: Literal["episode", "step"] = flag(
        "episode", "episode: live multi-turn; step: one action a row, as released")
    prompt: Literal["short", "full"] = flag(
        "short", "instructions: short for the laptop model, full for hub models")
    steps: int = flag(60, "updates")
    prompts_per_step: int = flag(8, "P, over all ranks together")
    group_size: int = flag(8, "G, samples a prompt, at least 2")
    max_turns: int = flag(4, "actions a rollout may take")
    max_new_tokens: int = flag(96, "tokens a turn may take")
    max_tokens: int = flag(512, "tokens of a whole rollout: prompt, actions, observations")
    max_observation_tokens: int = flag(
        256, "tokens of a tool's text; longer ones are cut, with a mark")
    max_images: int = flag(4, "images in the context of a rollout, the prompt's included")
    temperature: float = flag(1.0, "of the distribution that is sampled and scored")
    batch_tokens: int = flag(
        16384, "rows a rank plays side by side x max_tokens: bounds their keys and values")
    micro_batch_tokens: int = flag(
        8192, "packed tokens of one forward and backward pass; does not change the objective")
    lr: float = flag(
        1.5e-4, "learning rate of AdamW at the start; the released code for 3B and 7B: 1e-6")
    lr_decay: float = flag(
        0.8, "lr falls linearly to (1 - lr_decay) · lr, which is due after the last update; "
        "the released code: 1")
    max_grad_norm: float = flag(1.0, "gradients are scaled down to this norm")
    beta: float = flag(0.04, "weight of the KL to the starting model; 0 loads no reference")
    updates_per_batch: int = flag(
        1, "optimizer steps on the same rollouts; after the first, ratios leave 1 and are clipped")
    clip_low: float = flag(
        0.2, "ratios below 1 - clip_low gain nothing; needs updates_per_batch above 1")
    clip_high: float = flag(0.2, "ratios above 1 + clip_high gain nothing (dapo: 0.28)")
    loss: Literal[LOSSES] = flag("grpo", "how advantages and tokens are weighted, by paper")
    rewards: str = flag(
        "", "weights of reward parts, like accuracy=1,problem=0.5; others keep their default: "
        "in an episode format=1,accuracy=1, exact=0,problem=0,tools=0,search=0; "
        "in a step format=1,accuracy=1,search=1,code=1,problem=1")
    similarity: str = flag(
        "", "sentence model, hub name or folder (all-MiniLM-L6-v2), by whose cosine --mode step "
        "compares queries; empty: by the F1 of their words")
    min_similarity: float = flag(
        MIN_SIMILARITY, "a query less like the gold one earns nothing (--mode step)")
    gradient_checkpointing: bool = flag(
        False, "recompute activations in the backward pass to save memory")
    min_pixels: int = flag(MIN_PIXELS, "of an image after resizing")
    max_pixels: int = flag(MAX_PIXELS, "of an image after resizing; the paper: 401408")
    code_workers: int = flag(0, "code calls that run side by side on a rank; 0: its CPU cores")
    code_timeout: float = flag(5.0, "seconds a code call may take")
    code_reads: Literal["first", "newest"] = flag(
        "first", "the picture that code reads: the task's own, as released, or the newest one, so "
        "that repairs add up")
    code_unlocked: bool = flag(
        False, "run model-written code in plain child processes where the kernel cannot lock it in")
    seed: int = flag(0, "of prompts and sampling")
    eval_every: int = flag(0, "updates between evaluations; 0: only before and after")
    eval_limit: int = flag(0, "held-out tasks used, drawn once; 0: all")
    eval_temperature: float = flag(1.0, "of evaluation; 1: as in training, 0: greedy")
    save_every: int = flag(20, "steps between checkpoints")
    keep: int = flag(2, "newest checkpoints that are kept; older ones are removed")
    max_skipped: int = flag(
        3, "steps in a row with a loss or gradient that is not finite before the run stops; "
        "counted anew after a restart")
    rollouts_every: int = flag(
        10, "updates between written rollouts; the first and the last are always written")
    resume: bool = flag(
        False, "go on from the newest whole checkpoint in output_dir, or start if there is none")
    dry_run: bool = flag(False, "print what the run would be, and end: nothing is written")

    def __post_init__(self):
        for name, value in asdict(self).items():
            least = LEAST.get(name, 1e-9)
            most = MOST.get(name, 1e99 if type(value) is float else 2**40)
            if type(value) in (int, float) and not least <= value <= most:
                bounds = f"at least {LEAST[name]}" if name in LEAST else "above 0"
                raise ValueError(f"--{name} {value}: must be a finite number {bounds}"
                                 + (f" and at most {most}" if name in MOST else ""))
        if self.max_pixels < self.min_pixels:
            raise ValueError(f"--max_pixels {self.max_pixels}: must be at least --min_pixels")
        if self.similarity and self.mode == "episode":
            raise ValueError(f"--similarity {self.similarity}: only --mode step compares queries; "
                             "leave it out")
        self.reward_weights()

    def reward_weights(self) -> dict[str, float]:
        """The weight of every part of the reward."""
        return parse_weights(self.rewards, WEIGHTS if self.mode == "episode" else STEP_WEIGHTS)

    def limits(self) -> Limits:
        """What a rollout may spend; in mode "step" it is one turn."""
        return Limits(max_turns=1 if self.mode == "step" else self.max_turns,
                      max_new_tokens=self.max_new_tokens, max_tokens=self.max_tokens,
                      max_observation_tokens=self.max_observation_tokens,
                      max_images=self.max_images, batch_tokens=self.batch_tokens)

    @property
    def out(self) -> Path:
        """The output folder."""
        return Path(self.output_dir)

    def flags(self) -> dict:
        """The flags and the number of ranks, as config.json keeps them."""
        return {"ranks": dist.get_world_size(), **asdict(self)}


def main(config: Config, tasks: list[dict], held_out: list[dict], search: SearchTool,
         policy: Policy, reference: Policy | None, optimizer: Optimizer, first: int,
         similarity: Similarity | None) -> str | None:
    """Train from step `first`, counted from 0, to the last; then export the model.

    The arguments are what `prepare` and `load` return.

    Returns None, or where and why it stopped early. Raises FloatingPointError after --max_skipped
    updates in a row that were not finite.
    """
    start_of_run, skipped, stop = time.perf_counter(), 0, Stop(config, search)
    with CodeTool(config.code_workers, config.code_timeout, config.code_unlocked) as code:
        tools = Tools(code, search, newest=config.code_reads == "newest")
        for step in range(first, config.steps):
            if step == 0 or config.eval_every and step % config.eval_every == 0:
                evaluate_policy(policy, held_out, tools, step, config, stop)
            start = time.perf_counter()

            # 1. sample prompts; a task that cannot be opened is replaced
            failed = set()
            prompts = prompts_of_step(tasks, step, config,
                                      lambda task: opens(policy, task, config, failed))
            seed_step(config.seed, step)

            # 2. roll out, with live tools and without collectives
            with gathered(policy):
                rollouts, seconds = roll_out(
                    policy, prompts, tools, config.limits(), group_size=config.group_size,
                    temperature=config.temperature, prompt=config.prompt, interrupted=stop.is_due)
            if reason := stop.agreed():  # all rollouts are thrown away, and played again on resume
                save_checkpoint(config.out, step, policy, optimizer, config.flags(), config.keep)
                return f"before step {step + 1}: {reason}"

            # 3. reward
            parts = all_reward_parts(rollouts, config, similarity)
            rewards = [weighted_sum(each, config.reward_weights()) for each in parts]

            # 4. advantages, among the G samples of a prompt, which stand side by side
            rewards_by_prompt = torch.tensor(rewards).view(-1, config.group_size)  # (P, G)
            advantages = group_advantages(rewards_by_prompt, config.loss).flatten().tolist()  # (B,)

            # 5. update
            start_of_reference = clock()
            batches, num_real = even_micro_batches(policy, rollouts, advantages,
                                                   config.micro_batch_tokens)
            ref_logps = reference_logps(reference, batches, config.temperature)
            start_of_update = clock()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, config)
            metrics = update(policy, optimizer, batches, num_real, ref_logps, config)
            seconds["reference"] = start_of_update - start_of_reference
            seconds["update"] = clock() - start_of_update

            # 6. log
            rewarded = list(zip(rollouts, parts, rewards, advantages))
            log_step(step + 1, rewarded, metrics, seconds, failed, start, config)
            skipped = skipped + 1 if metrics["skipped"] else 0

            # 7. checkpoint
            is_last = step + 1 == config.steps or skipped == config.max_skipped
            if is_last or (step + 1) % config.save_every == 0:
                save_checkpoint(config.out, step + 1, policy, optimizer, config.flags(),
                                config.keep)
            if skipped == config.max_skipped:
                raise FloatingPointError(f"before step {step + 2}: {skipped} steps in a row had a "
                                         "loss or gradient that is not finite")
        for each in (tools, Tools()):  # on, then off
            evaluate_policy(policy, held_out, each, config.steps, config, stop)
    if reason := stop.agreed():
        return f"in its evaluation: {reason}"
    finish(policy, config, time.perf_counter() - start_of_run)


class Stop:
    """Why a run ends before its last step: SIGTERM, Ctrl-C or a spent search budget, on any rank.

    A signal is only noted. All ranks end at the same point, where they compare their reasons.
    """

    def __init__(self, config: Config, search: SearchTool):
        self.config, self.search, self.signal = config, search, ""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.note)

    def note(self, number: int, _) -> None:
        """The handler of signals. It cannot print, as it may have interrupted a print."""
        if is_lead() and not self.signal:
            os.write(2, b"stopping: the rollouts end at their next turn, then the run saves\n")
        self.signal = signal.Signals(number).name

    def reason(self) -> str:
        """Why this rank wants to stop; empty if it does not."""
        if self.search.spent:
            return f"--search_budget {self.config.search_budget} is spent (each rank has its share)"
        return self.signal

    def is_due(self) -> bool:
        """Whether this rank wants to stop."""
        return bool(self.reason())

    def agreed(self) -> str:
        """The reason of the first rank that has one. All ranks call it together."""
        return next(filter(None, gather([self.reason()])), "")


# ---- 1. sample prompts ---------------------------------------------------------------------------
def prompts_of_step(tasks: list[dict], step: int, config: Config,
                    usable: Callable[[dict], bool] = lambda task: True) -> list[dict]:
    """This rank's share of the P tasks of a step. Every epoch has an order of its own.

    A task that is not `usable` is replaced by the one at its place in the next step, or the one
    after it, and so on: whatever the number of ranks. Raises ValueError if no task is usable.
    """
    share, chosen = config.prompts_per_step // dist.get_world_size(), []
    first = step * config.prompts_per_step + dist.get_rank() * share
    for position in range(first, first + share):
        later = (task_at(tasks, position + n * config.prompts_per_step, config)
                 for n in range(len(tasks)))
        chosen.append(next(filter(usable, chain(later, tasks)), None))
    if None in chosen:
        raise ValueError(f"none of {len(tasks)} tasks could be opened; the reasons are above")
    return chosen


def task_at(tasks: list[dict], position: int, config: Config) -> dict:
    """The task at a position, from 0, of the endless sequence of shuffled epochs."""
    epoch, index = divmod(position, len(tasks))
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
    return tasks[torch.randperm(len(tasks), generator=generator)[index]]


def opens(policy: Policy, task: dict, config: Config, failed: set) -> bool:
    """Whether a rollout of the task can begin. If not: says why, and adds its id to `failed`."""
    error = opening_error(policy, task, config.limits(), config.prompt)
    if error is None:
        return True
    failed.add(task["id"])
    print(f"task {task['id']!r} cannot be opened: {type(error).__name__}: {error}", file=sys.stderr)
    return False


def seed_step(seed: int, step: int) -> None:
    """Seed a step on this rank. Ranks differ, and nothing has to be saved to resume."""
    torch.manual_seed((seed * 100_003 + step) * 1_009 + dist.get_rank())


# ---- 3. reward -----------------------------------------------------------------------------------
def all_reward_parts(rollouts: list[Rollout], config: Config, similarity: Similarity | None
                     ) -> list[dict[str, float]]:
    """`reward_parts` of each rollout; a sentence model, if any, compares all queries at once."""
    alike = [None] * len(rollouts)
    if similarity is not None:
        alike = query_similarities(rollouts, similarity)
    return [reward_parts(rollout, config.mode, each, config.min_similarity)
            for rollout, each in zip(rollouts, alike, strict=True)]


def query_similarities(rollouts: list[Rollout], similarity: Similarity) -> list[float]:
    """The cosine, -1 to 1, of each rollout's query and the gold query of its step.

    Without meaning where one of the two is no query.
    """
    pairs = []
    for rollout in rollouts:
        action, gold = rollout.turns[0].action, parse_action(rollout.task["solution"])
        are_queries = action.kind == gold.kind == "search"
        pairs.append((action.content, gold.content) if are_queries else ("", ""))
    return similarity(pairs)


def reward_parts(rollout: Rollout, mode: str, similarity: float | None = None,
                 min_similarity: float = MIN_SIMILARITY) -> dict[str, float]:
    """The named parts of the reward, each within 0 and 1; mode: "episode" or "step".

    similarity: of the step's query and its gold one, where they were compared.
    """
    task, turns = rollout.task, rollout.turns
    if mode == "step":
        action, gold = turns[0].action, parse_action(task["solution"])
        kind = None if rollout.stop == "length" else action.kind  # a turn cut off is no action
        return step_reward(turns[0].text, kind, action.content, gold.kind, gold.content,
                           golds=task["answers"], similarity=similarity,
                           min_similarity=min_similarity, tags=action_tags())
    is_coding = task["family"] == "coding"
    problems = [turn.action.content for turn in turns if turn.action.kind == "problem"]
    calls = [turn for turn in turns if turn.result is not None and not turn.result.lost]
    evidence = [turn.result.text for turn in calls if turn.action.kind == "search"]
    return episode_reward(
        [turn.text for turn in turns], rollout.answer, task["answers"],
        problem=problems[0] if problems else None,
        gold_labels=(task["type"] or None) if is_coding else None,
        tool_oks=[turn.result.ok for turn in calls], evidence=None if is_coding else evidence,
        tags=action_tags())


def success(rollout: Rollout, mode: str) -> float | None:
    """1.0 if the answer is an exact match, else 0.0; None for a step whose gold is no answer."""
    golds = rollout.task["answers"]
    if mode == "step":
        gold = parse_action(rollout.task["solution"])
        if gold.kind != "answer":
            return None
        golds = golds or [gold.content]
    return exact_match(rollout.answer, golds)


# ---- 5. update -----------------------------------------------------------------------------------
def even_micro_batches(policy: Policy, rollouts: list[Rollout], advantages: list[float],
                       tokens: int) -> tuple[list, int]:
    """(micro-batches, how many of them count). `tokens`: of a micro-batch, at most.

    All ranks get the same number, as each pass runs collectives. The batches that fill up hold one
    rollout; `update` gives them zero weights.
    """
    batches = micro_batches(policy, rollouts, advantages, tokens)
    most = int(all_reduce({"n": len(batches)}, dist.ReduceOp.MAX)["n"])
    filler = [collate(policy, rollouts[:1], advantages[:1])] * (most - len(batches))
    return batches + filler, len(batches)


@torch.no_grad()
def reference_logps(reference: Policy | None, batches: list,
                    temperature: float) -> list[torch.Tensor | None]:
    """Log-probs of the starting model, (B, T) nats each micro-batch; None without a reference."""
    if reference is None:
        return [None] * len(batches)
    logps = [action_logps(reference, batch, temperature)[0] for batch in batches]
    reference.model.reshard()  # the root stays whole after a forward
    return logps


def learning_rate(step: int, config: Config) -> float:
    """Linear from lr to (1 - lr_decay) · lr."""
    return config.lr * (1 - config.lr_decay * step / config.steps)


def update(policy: Policy, optimizer: Optimizer, batches: list, num_real: int,
           ref_logps: list, config: Config) -> dict[str, float]:
    """Take --updates_per_batch optimizer steps on the micro-batches of all ranks, all together.

    Returns the metrics loss, kl, entropy, clipped, gap, tokens, grad_norm and skipped, the same on
    all ranks: those of the last optimizer step, but `gap` of the first, when the policy is still
    the one that sampled. The log-probs of the first pass are the old ones of the later passes.
    Where loss or gradient is not finite, that step and those after it on the same batch are left
    out: the metrics are those of that step, and `skipped` is 1 in place of 0.

    batches: this rank's; those behind the first num_real only keep ranks in step and weigh 0.
    ref_logps: of each, (B, T) or None. The loss is a sum over ranks, and FSDP leaves their mean
    gradient in each rank's shard (a DTensor). `grad_norm` is the norm of all shards, before it is
    cut. The other metrics are defined in data/README.md. All gradients are zero at the end.
    """
    real = batches[:num_real]
    counts = all_reduce({"rollouts": sum(len(batch.advantages) for batch in real),
                         "tokens": sum(int(batch.action_mask.sum()) for batch in real)})
    max_action_tokens = config.limits().max_turns * config.max_new_tokens
    old_logps, gaps = [None] * len(batches), []
    policy.model.train()
    for _ in range(config.updates_per_batch):
        sums = Counter()
        for i, (batch, ref, old) in enumerate(zip(batches, ref_logps, old_logps, strict=True)):
            logps, entropy = action_logps(policy, batch, config.temperature)  # (B, T)
            weights = token_weights(
                batch.action_mask, config.loss, num_rollouts=counts["rollouts"],
                num_tokens=counts["tokens"], max_action_tokens=max_action_tokens)
            weights = weights * (i < num_real)  # (B, T); 0 for a batch that only fills up
            loss, parts = policy_loss(
                logps, batch.advantages, weights, old_logps=old, ref_logps=ref, beta=config.beta,
                clip_low=config.clip_low, clip_high=config.clip_high)
            # Each pass leaves each rank its shard of the gradient. FSDP averages over ranks; the
            # loss is a sum over them.
            (loss * dist.get_world_size()).backward()
            parts |= {"loss": loss, "weight": weights.sum(), "entropy": (weights * entropy).sum()}
            for name, value in parts.items():
                sums[name] += value.item()
            if old is None:
                old_logps[i] = logps.detach()
                gaps.append((logps - batch.sampled_logps)[batch.action_mask].abs().max().item())
        grad_norm = torch.nn.utils.clip_grad_norm_(policy.model.parameters(), config.max_grad_norm)
        grad_norm = grad_norm.full_tensor().item()
        sums = all_reduce(sums)
        is_finite = math.isfinite(sums["loss"]) and math.isfinite(grad_norm)  # on all ranks alike
        if is_finite:
            optimizer.step()
        optimizer.zero_grad()
        if not is_finite:
            break
    policy.model.eval()
    weight = sums["weight"] or 1.0  # below 1 with `dr_grpo`; 0 if no token was sampled
    means = {name: sums[name] / weight for name in ("kl", "entropy", "clipped")}
    gap = torch.tensor(gather(gaps)).max().item()  # NaN if one of them is, unlike Python's max
    return {"loss": sums["loss"], **means, "gap": gap, "tokens": counts["tokens"],
            "grad_norm": grad_norm, "skipped": int(not is_finite)}


# ---- 6. log --------------------------------------------------------------------------------------
def log_step(step: int, rewarded: list[tuple[Rollout, dict, float, float]],
             metrics: dict[str, float], seconds: dict[str, float], failed: set, start: float,
             config: Config) -> None:
    """Write the step's row of metrics.jsonl and, now and then, its rollouts; print the row.

    rewarded: (rollout, reward parts, reward, advantage) of this rank; failed: ids of tasks that
    could not be opened; start: time.perf_counter() at the start. Metrics: data/README.md.
    """
    is_written = step in (1, config.steps) or step % config.rollouts_every == 0
    folder, rows = config.out / "rollouts" if is_written else None, []
    for i, (rollout, parts, reward, advantage) in enumerate(rewarded):
        row = rollout_row(rollout, folder, f"step_{step}/{dist.get_rank()}-{i}")
        rows.append({**row, "reward_parts": parts, "reward": reward, "advantage": advantage,
                     "success": success(rollout, config.mode)})
    rows = gather(rows)
    num_failed = len(set(gather(list(failed))))
    seconds = all_reduce(seconds, dist.ReduceOp.MAX)
    total = all_reduce({"all": time.perf_counter() - start}, dist.ReduceOp.MAX)["all"]
    row = {"step": step, **rollout_metrics(rows, config.reward_weights()),
           "tasks_failed": num_failed, **metrics, "lr": learning_rate(step - 1, config),
           "tokens_per_s": metrics["tokens"] / total, "seconds": total,
           **{f"seconds_{name}": value for name, value in seconds.items()}}
    if is_lead():
        append_json_line(config.out / "metrics.jsonl", row)
        if folder:
            write_json_lines(folder / f"step_{step}.jsonl", rows)
    print(step_line(row, config.steps), flush=True)


def mean(values: Iterable[float | None]) -> float | None:
    """Of those that are not None; None if there is none."""
    values = [value for value in values if value is not None]
    return fmean(values) if values else None


def rollout_metrics(rows: list[dict], parts: Iterable[str]) -> dict[str, float | None]:
    """Means over the rollouts of a step, as `log_step` writes them.

    The keys are the same in every step: each of `parts` has one, even where no row has that part.
    """
    turns = [turn for row in rows for turn in row["turns"]]
    calls = [turn for turn in turns if "ok" in turn and not turn["lost"]]
    of_parts = {f"reward_{name}": mean(row["reward_parts"].get(name) for row in rows)
                for name in sorted(parts)}
    return {"reward": mean(row["reward"] for row in rows), **of_parts,
            "success": mean(row["success"] for row in rows),
            "turns": mean(len(row["turns"]) for row in rows),
            "valid_turns": mean(turn["action"] != "invalid" for turn in turns),
            "tool_errors": mean(not turn["ok"] for turn in calls) or 0.0,
            "searches_lost": sum(turn.get("lost", False) for turn in turns),
            "stop_length": mean(row["stop"] == "length" for row in rows),
            "stop_invalid": mean(row["stop"] == "invalid" for row in rows),
            "zero_advantage": mean(row["advantage"] == 0 for row in rows)}


def step_line(row: dict, steps: int) -> str:
    """One readable line of a row of metrics. What is wrong stands at its end."""
    parts = " ".join(f"{name[7:]} {value:.2f}" for name, value in row.items()
                     if name.startswith("reward_") and value is not None)
    rate = "" if row["success"] is None else f"success {row['success']:.0%}  "
    seconds = " ".join(f"{name} {row[f'seconds_{name}']:.1f}"
                       for name in ("generate", "tools", "reference", "update"))
    left = int(row["seconds"] * (steps - row["step"]))
    notes = {f"{row['tasks_failed']} tasks failed": row["tasks_failed"] > 0,
             f"{row['searches_lost']} searches lost": row["searches_lost"] > 0,
             "SKIPPED: loss or gradient not finite": row["skipped"] > 0,
             "COLLAPSED: no turn is valid": row["valid_turns"] == 0,
             "NOTHING TO LEARN FROM: all advantages are 0": row["zero_advantage"] == 1}
    return (f"step {row['step']:>3}/{steps}  reward {row['reward']:.2f} ({parts})  {rate}"
            f"kl {row['kl']:.4f}  gap {row['gap']:.0e}  {row['tokens_per_s']:.0f} tok/s  "
            f"{row['seconds']:.1f} s ({seconds})  "
            f"left {left // 60}:{left % 60:02d}"
            + "".join(f"  {note}" for note, is_so in notes.items() if is_so))


# ---- held-out evaluation -------------------------------------------------------------------------
def evaluate_policy(policy: Policy, tasks: list[dict], tools: Tools, step: int, config: Config,
                    stop: Stop) -> None:
    """Write success on held-out tasks as a row of evaluations.jsonl, unless it is there.

    Ranks share the tasks. A row: {"step", "tools": "on" or "off", "success", "n", "by_family",
    "by_type"}, with shares of exact matches, 0 to 1. A task that cannot be opened counts as not
    solved. No row is written if the run is to `stop`: some rollouts were cut short then.
    """
    start, path = time.perf_counter(), config.out / "evaluations.jsonl"
    label = "on" if tools.code or tools.search else "off"
    # The first rank's view, as others may see the file later where folders are shared.
    known = gather([(row["step"], row["tools"]) for row in read_json_lines(path)] * is_lead())
    if not tasks or (step, label) in known:
        return
    seed_step(config.seed, -1 - step)
    share = share_of_rank(tasks)
    opened = [opens(policy, task, config, set()) for task in share]
    playable = list(compress(share, opened))
    limits = replace(config.limits(), max_turns=config.max_turns)  # episodes, in mode "step" too
    with gathered(policy):
        rollouts, _ = roll_out(policy, playable, tools, limits, prompt=config.prompt,
                               temperature=config.eval_temperature, interrupted=stop.is_due)
    if stop.agreed():
        return
    played = iter(rollouts)
    answers = [next(played).answer if is_open else None for is_open in opened]
    solved = gather([(task["family"], "+".join(task["type"]) or task["family"],
                      exact_match(answer, task["answers"]))
                     for task, answer in zip(share, answers)])
    families, types, hits = zip(*solved)
    row = {"step": step, "tools": label, "success": round(fmean(hits), 4), "n": len(hits),
           "by_family": rates(families, hits), "by_type": rates(types, hits)}
    if is_lead():
        append_json_line(path, row)
    by_type = "  ".join(f"{name} {rate:.0%}" for name, rate in row["by_type"].items())
    print(f"held-out success, tools {label}: {row['success']:.1%} of {row['n']}   ({by_type})   "
          f"{time.perf_counter() - start:.0f} s", flush=True)
    dist.barrier()  # the row is there before any rank looks for it


def rates(names: Iterable[str], hits: Iterable[float]) -> dict[str, float]:
    """The mean hit for every name."""
    hits_of = {}
    for name, hit in zip(names, hits):
        hits_of.setdefault(name, []).append(hit)
    return {name: round(fmean(hits_of[name]), 4) for name in sorted(hits_of)}


def finish(policy: Policy, config: Config, seconds: float) -> None:
    """Export the model; write summary.json: held-out success before, after and with tools off."""
    out = config.out
    export(policy, out / "model.tmp")
    if not is_lead():
        return
    publish(out / "model.tmp", out / "model")
    rows = {(row["step"], row["tools"]): row for row in read_json_lines(out / "evaluations.jsonl")}
    last = config.steps
    wanted = {"before": (0, "on"), "after": (last, "on"), "tools_off": (last, "off")}
    picked = {when: rows.get(key, {}) for when, key in wanted.items()}
    summary = {f"success_{when}": row.get("success") for when, row in picked.items()}
    for key in ("by_family", "by_type"):
        summary[key] = {name: {when: row.get(key, {}).get(name) for when, row in picked.items()}
                        for name in picked["after"].get(key, {})}
    summary |= {"steps": last, "seconds": round(seconds, 1), "seed": config.seed,
                "ranks": dist.get_world_size()}
    write_whole(out / "summary.json", json.dumps(summary, indent=1) + "\n")
    print(f"done in {seconds:.0f} s; the model is in {out / 'model'}\n{json.dumps(summary)}")


# ---- start ---------------------------------------------------------------------------------------
def prepare(config: Config) -> tuple[list[dict], list[dict], SearchTool | None]:
    """Check what can be checked before a model is loaded, and take the output folder.

    Returns (training tasks, held-out tasks, search tool); a dry run needs no tool and takes no
    folder. Raises ValueError, before ranks meet.
    """
    check_model(config.model)
    what, world = holds(config.out), int(os.environ.get("WORLD_SIZE", 1))
    is_run = what == "a training run"
    if what and not (is_run and config.resume):
        way_out = "add --resume to go on, or choose" if is_run else "choose"
        raise ValueError(f"--output_dir {config.out} holds {what}; {way_out} another folder")
    if config.prompts_per_step % world:
        raise ValueError(f"--prompts_per_step {config.prompts_per_step} does not divide "
                         f"among {world} ranks")
    tasks = load_task_files(config.tasks, config.mode)
    held_out = load_task_files(config.eval_tasks, "episode") if config.eval_tasks else []
    if 0 < config.eval_limit < len(held_out):  # drawn: the first ones in a file are of one family
        held_out = random.Random(0).sample(held_out, config.eval_limit)
    if config.dry_run:
        return tasks, held_out, None
    search = SearchTool(config.corpus, config.topk, pages=config.search_pages,
                        cache=config.search_cache, budget=config.search_budget)
    if os.environ.get("RANK", "0") == "0":
        search.check()
        try:
            CodeTool(1, config.code_timeout, config.code_unlocked).close()
        except RuntimeError as error:
            raise ValueError(error) from error
    take_folder(config.out)  # at the end: a run that is refused leaves none
    return tasks, held_out, search


def load(config: Config, tasks: list[dict], held_out: list[dict]
         ) -> tuple[Policy, Policy | None, Optimizer, int, Similarity | None]:
    """Join the other ranks; returns (policy, reference if there is a KL, optimizer, updates done,
    sentence model if there is one).

    Whatever a user can mend fails here at the latest, with ValueError or OSError.
    """
    start_ranks()
    if not is_lead():
        sys.stdout = open(os.devnull, "w")  # the first rank speaks for all
    first, folder = 0, None
    if config.resume:
        first, folder = newest_checkpoint(config.out, config.flags())
    if first > config.steps:
        raise ValueError(f"{config.out} has done {first} steps; give --steps {first} or more")
    similarity = load_similarity(config.similarity) if config.similarity else None
    policy = load_policy(
        config.model, shard=True, gradient_checkpointing=config.gradient_checkpointing,
        min_pixels=config.min_pixels, max_pixels=config.max_pixels)
    check_tasks(policy, tasks, held_out, config)
    # Before a checkpoint is read: the reference is the starting model, after a resume too.
    reference = copy_policy(policy) if config.beta > 0 else None
    optimizer = AdamW(policy.model.parameters(), lr=config.lr, weight_decay=0.0, fused=True)
    size = 12 * sum(p.numel() for p in policy.model.parameters())  # weights, two moments: fp32
    size *= 1 + min(config.keep, config.steps // config.save_every)  # one more is being written
    if folder:
        load_checkpoint(folder, policy, optimizer)
    elif size > shutil.disk_usage(config.out).free:
        raise ValueError(f"checkpoints take {size / 1e9:.2g} GB, --output_dir {config.out} has "
                         "less room; make some, or lower --keep")
    if is_lead():
        write_whole(config.out / "config.json", json.dumps(config.flags(), indent=1) + "\n")
        (config.out / "rollouts").mkdir(exist_ok=True)
    print(f"{config.model} on {dist.get_world_size()} x {policy.device.type}: {describe(tasks)}, "
          f"{len(held_out)} held out, {config.steps} steps of {config.prompts_per_step} x "
          f"{config.group_size} rollouts; see {config.out}")
    return policy, reference, optimizer, first, similarity


def check_tasks(policy: Policy, tasks: list[dict], held_out: list[dict], config: Config) -> None:
    """Open every task once; ranks share the work. Raises ValueError, on all ranks, if one fails."""
    for path, part in ((config.tasks, tasks), (config.eval_tasks, held_out)):
        errors = []
        for task in share_of_rank(part):
            error = opening_error(policy, task, config.limits(), config.prompt)
            if error is not None:
                errors.append(f"{path}, task {task['id']!r}: {error}")
        if errors := gather(errors):
            errors[5:] = [f"{len(errors)} of {len(part)} tasks cannot be opened"]
            raise ValueError("\n".join(errors))


def run() -> int | str:
    """The command line. Returns what sys.exit takes: 0 also for a run that was stopped and can go
    on, a message (status 1) for what torchrun --max-restarts should start again, 2 for what a user
    must mend, 130 for Ctrl-C before the first step."""
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        config = parse_flags(Config, __doc__.partition("\n")[0])
        if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":  # torchrun --max-restarts
            config.resume = True
        with nothing_left(config.out):
            tasks, held_out, search = prepare(config)
            if config.dry_run:
                show_plan(config, tasks, held_out)
                return 0
            loaded = load(config, tasks, held_out)
    except (OSError, ValueError) as error:  # whatever is raised later keeps its traceback
        return fail(error)
    except KeyboardInterrupt:
        print("stopped before the first step; the same command starts again", file=sys.stderr)
        return 130
    try:
        stopped = record(main)(config, tasks, held_out, search, *loaded)
        if stopped and is_lead():
            print(f"stopped {stopped}; --resume goes on", file=sys.stderr)
    except FloatingPointError as error:
        return f"error: stopped {error}; --resume goes on"
    except (OSError, CheckpointException) as error:
        if isinstance(error, CheckpointException):
            error = next(iter(error.failures.values()))[0]
        free = shutil.disk_usage(config.out).free / 1e9
        return (f"error: {error}; {config.out} ({free:.2f} GB free) keeps what is whole: "
                "make room or mend it, --resume goes on")
    dist.barrier()  # the first rank may still export
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(run())
