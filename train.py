"""Train a vision-language model to use tools, by GRPO on live multi-turn rollouts.

    torchrun --nproc_per_node=2 train.py                                   # a laptop: no GPU, no network, no argument
    torchrun --nproc_per_node=8 train.py --model Qwen/Qwen2.5-VL-7B-Instruct --tasks ... --lr 1e-6   # see the README
    python train.py --help                                                 # every flag, with its unit

Seven stages a step, in the order in which `main` shows them: sample prompts, roll out, score, advantages, update, log,
checkpoint. All randomness of a step comes from (seed, step, rank), so a resumed run replays what an uninterrupted one does:
killed at any moment, it leaves the same metrics and weights, on CPUs bit for bit.

Left out on purpose: a trainer class, callbacks, mixed batches of old and new rollouts, a warm start (data/make_model.py).

Legend: P prompts a step, G samples a prompt, B = P·G rollouts, T tokens.
"""
import hashlib
import json
import math
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from itertools import takewhile
from pathlib import Path
from statistics import fmean
from typing import Literal

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.elastic.multiprocessing.errors import record
from tqdm import tqdm
from transformers.utils import logging as hf_logging

from data.files import append_json_line, holds, nothing_left, publish, read_json_lines, take_folder, write_whole
from data.flags import fail, flag, parse_flags
from data.tasks import describe, load_tasks
from grpo import LOSSES, group_advantages, policy_loss, token_weights
from model import (MAX_PIXELS, MIN_PIXELS, Policy, all_reduce, check_model, copy_policy, export, gather, gathered, load_policy,
                   score, start_ranks)
from reward import STEP_WEIGHTS, WEIGHTS, episode_reward, exact_match, parse_weights, step_reward, weighted_sum
from rollout import Limits, Rollout, Tools, collate, micro_batches, opening_error, roll_out, rollout_row
from tools import CodeTool, SearchTool, action_tags, parse_action


def list_weights(weights: dict[str, float]) -> str:
    """As --rewards takes them."""
    return ",".join(f"{name}={weight:g}" for name, weight in weights.items())


@dataclass
class Config:
    """The flags. The defaults are the laptop run; the README has the ones of 3B and 7B on eight GPUs."""
    model: str = flag("data/model", "hub name (Qwen/Qwen2.5-VL-3B-Instruct, -7B-) or folder in the hub's layout")
    tasks: str = flag("data/offline/train.json", "training tasks: MAT's JSON, FlashRAG's jsonl, or step rows")
    eval_tasks: str = flag("data/offline/heldout.json", "held-out tasks, same formats; empty: no evaluation")
    corpus: str = flag("sqlite:data/offline/corpus.sqlite", "search backend: sqlite:INDEX, http://HOST:PORT/retrieve, serper")
    topk: int = flag(3, "passages a search returns")
    search_pages: int = flag(0, "pages of the first results that are read too (serper)")
    search_cache: str = flag("runs/search_cache.sqlite", "answers from the network, kept for all ranks and runs; empty: none")
    search_budget: int = flag(0, "searches over the network, of all ranks, before the run stops with a checkpoint; 0: no end")
    output_dir: str = flag("runs/default", "where metrics, rollouts, checkpoints and the exported model go")
    mode: Literal["episode", "step"] = flag("episode", "episode: live multi-turn; step: one action a row, as released")
    prompt: Literal["short", "full"] = flag("short", "instructions: short for the laptop model, full for hub models")
    steps: int = flag(60, "updates")
    prompts_per_step: int = flag(8, "P, over all ranks together")
    group_size: int = flag(8, "G, samples a prompt, at least 2")
    max_turns: int = flag(4, "actions a rollout may take")
    max_new_tokens: int = flag(96, "tokens a turn may take")
    max_tokens: int = flag(512, "tokens of a whole rollout: prompt, actions, observations")
    max_observation_tokens: int = flag(256, "tokens of a tool's text; longer ones are cut, with a mark")
    max_images: int = flag(4, "images in the context of a rollout, the prompt's included")
    temperature: float = flag(1.0, "of sampling, and of the scored law")
    batch_tokens: int = flag(16384, "rows that a rank plays side by side x max_tokens: bounds their keys and values")
    micro_batch_tokens: int = flag(8192, "packed tokens of one forward and backward pass of a rank; not part of the objective")
    lr: float = flag(1.5e-4, "learning rate of AdamW at the start; the released code for 3B and 7B: 1e-6")
    lr_decay: float = flag(0.8, "share of lr lost by the last update, on a line, 0 to 1; the released code: 1")
    max_grad_norm: float = flag(1.0, "gradients are scaled down to this norm")
    beta: float = flag(0.04, "weight of the KL to the starting model; 0 loads no reference")
    updates_per_batch: int = flag(1, "optimizer steps on the same rollouts; beyond the first, ratios leave 1 and are clipped")
    clip_low: float = flag(0.2, "ratios below 1 - clip_low gain nothing; needs updates_per_batch above 1")
    clip_high: float = flag(0.2, "ratios above 1 + clip_high gain nothing (dapo: 0.28)")
    loss: Literal[LOSSES] = flag("grpo", "how advantages and tokens are weighted, by paper")
    rewards: str = flag("", "weights of reward parts, like accuracy=1,problem=0.5; others keep their default: in an episode "
                        f"{list_weights(WEIGHTS)}; in a step {list_weights(STEP_WEIGHTS)}")
    gradient_checkpointing: bool = flag(False, "recompute activations in the backward pass to save memory")
    min_pixels: int = flag(MIN_PIXELS, "of an image after resizing")
    max_pixels: int = flag(MAX_PIXELS, "of an image after resizing; the paper: 401408")
    code_workers: int = flag(1, "code calls that run side by side on a rank")
    code_timeout: float = flag(5.0, "seconds a code call may take")
    code_unlocked: bool = flag(False, "run model-written code in plain child processes where the kernel cannot lock it in")
    seed: int = flag(0, "of prompts and sampling")
    eval_every: int = flag(0, "updates between evaluations; 0: only before and after")
    eval_limit: int = flag(0, "held-out tasks used, drawn once; 0: all")
    eval_temperature: float = flag(1.0, "of evaluation; 1: the law that is trained, 0: greedy")
    save_every: int = flag(20, "steps between checkpoints")
    keep: int = flag(2, "newest checkpoints that are kept; older ones are removed")
    max_skipped: int = flag(3, "steps in a row with a loss or gradient that is not finite before the run stops")
    rollouts_every: int = flag(10, "updates between written rollouts; the first and the last are always written")
    resume: bool = flag(False, "go on from the newest whole checkpoint in output_dir, or start there if there is none yet")

    def __post_init__(self):
        if self.group_size < 2:
            raise ValueError(f"--group_size {self.group_size}: a group of one has no advantage; give at least 2")
        positive = ("steps", "prompts_per_step", "max_turns", "max_new_tokens", "temperature", "lr", "save_every",
                    "rollouts_every", "micro_batch_tokens", "batch_tokens", "max_images", "topk", "code_workers",
                    "max_observation_tokens", "updates_per_batch", "clip_low", "clip_high", "keep", "max_skipped",
                    "max_grad_norm", "code_timeout", "min_pixels")
        for name in positive:
            if getattr(self, name) <= 0:
                raise ValueError(f"--{name} {getattr(self, name)}: must be above 0")
        for name, value in asdict(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"--{name} {value}: must be a finite number")
        for name in ("eval_temperature", "eval_every", "eval_limit"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name} {getattr(self, name)}: must be at least 0")
        if not 0 <= self.seed < 2**32 or self.max_pixels < self.min_pixels:
            raise ValueError(f"--seed {self.seed} is within 0 and 2^32, --max_pixels {self.max_pixels} at least --min_pixels")
        if self.beta < 0 or not 0 <= self.lr_decay <= 1:
            raise ValueError(f"--beta {self.beta} --lr_decay {self.lr_decay}: beta is at least 0, lr_decay within 0 and 1")
        self.reward_weights()

    def reward_weights(self) -> dict[str, float]:
        return parse_weights(self.rewards, WEIGHTS if self.mode == "episode" else STEP_WEIGHTS)

    def limits(self) -> Limits:
        return Limits(1 if self.mode == "step" else self.max_turns, self.max_new_tokens, self.max_tokens,
                      self.max_observation_tokens, self.max_images, self.batch_tokens)


# ------------------------------------------------------------------------------------------------------- stages of a step
def prompts_of_step(tasks: list[dict], step: int, config: Config,
                    usable: Callable[[dict], bool] = lambda task: True) -> list[dict]:
    """This rank's share of the P tasks of a step: each epoch is a shuffle of its own, a pure function of seed and step.

    The place of a task that is not `usable` is taken by the one at its place in the next step, on whichever rank it is.
    """
    share, chosen = config.prompts_per_step // dist.get_world_size(), []
    first = step * config.prompts_per_step + dist.get_rank() * share
    for position in range(first, first + share):
        candidates = (task_at(tasks, position + later * config.prompts_per_step, config) for later in range(len(tasks)))
        task = next(filter(usable, candidates), None)
        if task is None:
            raise ValueError(f"none of {len(tasks)} tasks could be opened; the reasons are above")
        chosen.append(task)
    return chosen


def task_at(tasks: list[dict], position: int, config: Config) -> dict:
    """The task at a position, from 0, of the endless sequence of shuffled epochs."""
    epoch, index = divmod(position, len(tasks))
    order = torch.randperm(len(tasks), generator=torch.Generator().manual_seed(config.seed * 1_000_003 + epoch))
    return tasks[order[index]]


def opens(policy: Policy, task: dict, config: Config, failed: list[str]) -> bool:
    """Whether a rollout of the task can begin; if not, it is named on standard error, and its id added to `failed`."""
    error = opening_error(policy, task, config.limits(), config.prompt)
    if error is not None:
        failed.append(task["id"])
        print(f"task {task['id']!r} cannot be opened: {type(error).__name__}: {error}", file=sys.stderr)
    return error is None


def check_tasks(policy: Policy, tasks: list[dict], held_out: list[dict], config: Config) -> None:
    """Open every task once, shared among the ranks. Raises ValueError, on all ranks, if some cannot be played."""
    mine = [(path, task) for path, part in ((config.tasks, tasks), (config.eval_tasks, held_out)) for task in part]
    mine = mine[dist.get_rank()::dist.get_world_size()]
    found = ((path, task, opening_error(policy, task, config.limits(), config.prompt)) for path, task in
             tqdm(mine, desc="open the tasks", disable=dist.get_rank() > 0, delay=5, leave=False))
    bad = gather([f"{path}, task {task['id']!r}: " + str(error).removeprefix(f"task {task['id']}: ")
                  for path, task, error in found if error is not None])
    if bad:
        more = f"\n… and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise ValueError("\n".join(bad[:5]) + more)


def seed_step(seed: int, step: int) -> None:
    """All random numbers of a step on a rank: nothing has to be saved to resume, and ranks differ."""
    torch.manual_seed((seed * 100_003 + step) * 1_009 + dist.get_rank())


def success(rollout: Rollout, mode: str) -> float | None:
    """1.0 if the answer is an exact match, else 0.0; None for a step whose gold action is no answer."""
    golds = rollout.task["answers"]
    if mode == "step":
        gold = parse_action(rollout.task["solution"])
        if gold.kind != "answer":
            return None
        golds = golds or [gold.content]
    return exact_match(rollout.answer, golds)


def reward_parts(rollout: Rollout, mode: str) -> dict[str, float]:
    """The named parts of the reward of a `rollout.Rollout`, each within 0 and 1; mode: "episode" or "step"."""
    task, turns = rollout.task, rollout.turns
    if mode == "step":
        action, gold = turns[0].action, parse_action(task["solution"])
        return step_reward(turns[0].text, action.kind, action.content, gold.kind, gold.content, golds=task["answers"],
                           tags=action_tags())
    results = [(turn.action.kind, turn.result) for turn in turns if turn.result is not None and not turn.is_lost]
    return episode_reward(
        [turn.text for turn in turns], rollout.answer, task["answers"],
        problem=next((turn.action.content for turn in turns if turn.action.kind == "problem"), None),
        gold_labels=task["type"] or None if task["family"] == "coding" else None, tool_oks=[result.ok for _, result in results],
        evidence=[result.text for kind, result in results if kind == "search"] if task["family"] == "search" else None,
        tags=action_tags())


@torch.no_grad()
def reference_logps(reference: Policy | None, batches: list, temperature: float) -> list[torch.Tensor | None]:
    """Log-probs of the starting model for every micro-batch, (B, T) nats each, or None without a reference."""
    if reference is None:
        return [None] * len(batches)
    logps = [score(reference, batch, temperature)[0] for batch in batches]
    reference.model.reshard()  # the root stays whole after a forward
    return logps


def even_micro_batches(policy: Policy, rollouts: list[Rollout], advantages: list[float], tokens: int) -> tuple[list, int]:
    """(micro-batches, how many of them count): ranks run the same number, or the collectives of FSDP would mispair.

    The batches that fill up hold one rollout and are given zero weights by `update`.
    """
    batches = micro_batches(policy, rollouts, advantages, tokens)
    most = int(all_reduce({"n": len(batches)}, dist.ReduceOp.MAX)["n"])
    return batches + [collate(policy, rollouts[:1], advantages[:1])] * (most - len(batches)), len(batches)


def update(policy: Policy, optimizer: torch.optim.Optimizer, batches: list, num_real: int, ref_logps: list,
           config: Config) -> dict[str, float]:
    """The optimizer steps of a batch, on all micro-batches of all ranks; returns the metrics, the same on all ranks.

    They are those of the last step, `gap` apart, which is the first one's. Before it the policy is still the one that sampled:
    the log-probs of that pass are the old ones of the next.
    """
    real = batches[:num_real]
    counts = all_reduce({"rollouts": sum(len(b.advantages) for b in real),
                         "tokens": sum(int(b.action_mask.sum()) for b in real)})
    old_logps, gap = [None] * len(batches), 0.0
    policy.model.train()
    for _ in range(config.updates_per_batch):
        sums = {"loss": 0.0, "weight": 0.0, "kl": 0.0, "entropy": 0.0, "clipped": 0.0}
        for i, (batch, ref, old) in enumerate(zip(batches, ref_logps, old_logps, strict=True)):
            policy.model.set_requires_gradient_sync(i == len(batches) - 1)  # gradients meet once an update
            logps, entropy = score(policy, batch, config.temperature)  # (B, T)
            weights = token_weights(batch.action_mask, config.loss, num_rollouts=counts["rollouts"],
                                    num_tokens=counts["tokens"], max_tokens=config.limits().max_turns * config.max_new_tokens)
            weights = weights * (i < num_real)  # (B, T); 0 for a batch that only fills up
            loss, parts = policy_loss(logps, batch.advantages, weights, old_logps=old, ref_logps=ref, beta=config.beta,
                                      clip_low=config.clip_low, clip_high=config.clip_high)
            (loss * dist.get_world_size()).backward()  # FSDP averages over ranks, the loss is a sum over them
            for name, value in {"loss": loss, "weight": weights.sum(), **parts, "entropy": (weights * entropy).sum()}.items():
                sums[name] += value.item()
            if old is None:
                old_logps[i] = logps.detach()
                gap = max(gap, ((logps - batch.sampled_logps).abs() * batch.action_mask).max().item())
        grad_norm = torch.nn.utils.clip_grad_norm_(policy.model.parameters(), config.max_grad_norm)
        grad_norm = getattr(grad_norm, "full_tensor", lambda: grad_norm)().item()
        sums = all_reduce(sums)
        is_finite = math.isfinite(sums["loss"]) and math.isfinite(grad_norm)  # of all ranks: they skip together
        if is_finite:
            optimizer.step()
        optimizer.zero_grad()
        if not is_finite:
            break
    policy.model.eval()
    weight = sums.pop("weight") or 1.0  # below 1 with `dr_grpo`, which divides by a constant; 0 if nobody wrote anything
    sums |= {name: sums[name] / weight for name in ("kl", "entropy", "clipped")}  # means
    return {**sums, **all_reduce({"gap": gap}, dist.ReduceOp.MAX), "tokens": counts["tokens"], "grad_norm": grad_norm,
            "skipped": int(not is_finite)}


def learning_rate(step: int, config: Config) -> float:
    """A line from lr to (1 - lr_decay) · lr."""
    return config.lr * (1 - config.lr_decay * step / config.steps)


# ------------------------------------------------------------------------------------------------- what a run leaves behind
def log_step(step: int, rollouts: list[Rollout], parts: list[dict], rewards: list[float], advantages: list[float],
             metrics: dict[str, float], seconds: dict[str, float], failed: list[str], clock: float, config: Config) -> dict:
    """Write a row of metrics.jsonl and, now and then, the rollouts; returns the row. The README defines every metric."""
    out = Path(config.output_dir)
    shown = out / "rollouts" if step in (1, config.steps) or step % config.rollouts_every == 0 else None
    rows = gather([{**rollout_row(r, shown, f"step_{step}/{dist.get_rank()}-{i}"), "reward_parts": parts[i],
                    "reward": rewards[i], "advantage": advantages[i], "success": success(r, config.mode)}
                   for i, r in enumerate(rollouts)])
    spent = all_reduce({**seconds, "all": time.perf_counter() - clock}, dist.ReduceOp.MAX)
    num_failed = int(all_reduce({"tasks": len(failed)})["tasks"])
    row = {"step": step, **rollout_metrics(rows, config.reward_weights()), "tasks_failed": num_failed, **metrics,
           "lr": learning_rate(step - 1, config),
           "tokens_per_s": metrics["tokens"] / spent["all"], "padding": spent.pop("padding"), "seconds": spent.pop("all"),
           **{f"seconds_{name}": value for name, value in spent.items()}}
    if dist.get_rank() == 0:
        append_json_line(out / "metrics.jsonl", row)
        if shown:
            write_whole(shown / f"step_{step}.jsonl", "".join(json.dumps(r) + "\n" for r in rows))
    return row


def mean(values: Iterable[float | None]) -> float | None:
    """Of those that are not None; None where there is none."""
    values = [value for value in values if value is not None]
    return fmean(values) if values else None


def rollout_metrics(rows: list[dict], parts: Iterable[str]) -> dict[str, float | None]:
    """Means over the rows of a step; the caller has added to each its success, reward, reward_parts and advantage.

    The keys are the same in every step: each of `parts`, which a row may lack, has one, and a mean over nothing is None.
    """
    turns = [turn for row in rows for turn in row["turns"]]
    return {"reward": mean(r["reward"] for r in rows),
            **{f"reward_{name}": mean(r["reward_parts"].get(name) for r in rows) for name in sorted(parts)},
            "success": mean(r["success"] for r in rows), "turns": mean(len(r["turns"]) for r in rows),
            "valid_turns": mean(turn["action"] != "invalid" for turn in turns),
            "tool_errors": 1 - fmean([turn["ok"] for turn in turns if "ok" in turn and not turn["lost"]] or [1]),
            "searches_lost": sum(turn.get("lost", False) for turn in turns),
            "stop_length": mean(r["stop"] == "length" for r in rows),
            "stop_invalid": mean(r["stop"] == "invalid" for r in rows),
            "flat_groups": mean(r["advantage"] == 0 for r in rows)}


def step_line(row: dict, steps: int, left: float) -> str:
    """One readable line of a row of metrics; left: seconds to the end. What is wrong stands at its end."""
    parts = " ".join(f"{name[7:]} {row[name]:.2f}" for name in row if name.startswith("reward_") and row[name] is not None)
    success = "" if row["success"] is None else f"success {row['success']:.0%}  "
    seconds = " ".join(f"{name} {row[f'seconds_{name}']:.1f}" for name in ("generate", "tools", "score", "update"))
    notes = {f"{row['tasks_failed']} tasks failed": row["tasks_failed"] > 0,
             f"{row['searches_lost']} searches lost": row["searches_lost"] > 0,
             "SKIPPED: loss or gradient not finite": row["skipped"] > 0,
             "COLLAPSED: no turn is valid": row["valid_turns"] == 0,
             "NOTHING TO LEARN FROM: all rewards of every group are equal": row["flat_groups"] == 1}
    return (f"step {row['step']:>3}/{steps}  reward {row['reward']:.2f} ({parts})  {success}"
            f"kl {row['kl']:.4f}  gap {row['gap']:.0e}  {row['tokens_per_s']:.0f} tok/s  {row['seconds']:.1f} s ({seconds})  "
            f"padding {row['padding']:.0%}  left {int(left) // 60}:{int(left) % 60:02d}"
            + "".join(f"  {note}" for note, holds in notes.items() if holds))


def evaluate_policy(policy, tasks: list[dict], tools, step: int, config, reasons: Callable[[], list[str]]) -> bool:
    """Success on held-out tasks as a row of evaluations.jsonl, once a step with the tools on or off; ranks share the tasks.

    A row has shares of exact matches, 0 to 1: {"step", "tools", "success", "n", "by_family", "by_type"}. A task that cannot
    be opened is named on standard error and counts as not solved. If any rank has
    `reasons` to end the run, rollouts end early, no row is written, since none is known, and False is returned.
    """
    label, start = "on" if tools.code or tools.search else "off", time.perf_counter()
    path, limits = Path(config.output_dir) / "evaluations.jsonl", replace(config.limits(), max_turns=config.max_turns)
    if not tasks or any(row["step"] == step and row["tools"] == label for row in read_json_lines(path)):
        return True
    seed_step(config.seed, -1 - step)
    share, failed = tasks[dist.get_rank()::dist.get_world_size()], []
    with gathered(policy):
        rollouts, _ = roll_out(policy, [task for task in share if opens(policy, task, config, failed)], tools, limits,
                               prompt=config.prompt, temperature=config.eval_temperature,
                               interrupted=lambda: bool(reasons()))
    if gather(reasons()):
        return False
    hits = {id(r.task): exact_match(r.answer, r.task["answers"]) for r in rollouts}
    groups = {"success": {}, "by_family": {}, "by_type": {}}
    for family, kinds, hit in gather([(task["family"], task["type"], hits.get(id(task), 0.0)) for task in share]):
        for key, name in (("success", "all"), ("by_family", family), ("by_type", "+".join(kinds) or family)):
            groups[key].setdefault(name, []).append(hit)
    rates = {key: {name: round(fmean(hits), 4) for name, hits in sorted(by_name.items())}
             for key, by_name in groups.items()}
    if dist.get_rank() == 0:
        success, kinds = rates["success"]["all"], "  ".join(f"{kind} {rate:.0%}" for kind, rate in rates["by_type"].items())
        append_json_line(path, {"step": step, "tools": label, **rates, "success": success, "n": len(tasks)})
        print(f"held-out success, tools {label}: {success:.1%} of {len(tasks)}   ({kinds})   "
              f"{time.perf_counter() - start:.0f} s", flush=True)
    dist.barrier()  # the row is there before any rank looks for it
    return True


def write_summary(out: Path, steps: int, **facts) -> dict:
    """summary.json: held-out success before, after and with the tools off, in all and by family and type, and the facts."""
    rows = read_json_lines(out / "evaluations.jsonl")
    wanted = {"before": (0, "on"), "after": (steps, "on"), "tools_off": (steps, "off")}
    picked = {when: next((r for r in rows if (r["step"], r["tools"]) == key), {}) for when, key in wanted.items()}
    summary = {f"success_{when}": row.get("success") for when, row in picked.items()}
    for key in ("by_family", "by_type"):
        summary[key] = {name: {when: row.get(key, {}).get(name) for when, row in picked.items()}
                        for name in picked["after"].get(key, {})}
    summary |= {"steps": steps, **facts}
    write_whole(out / "summary.json", json.dumps(summary, indent=1) + "\n")
    return summary


def save_checkpoint(policy: Policy, optimizer: torch.optim.Optimizer, step: int, config: Config) -> None:
    """Write beside, with the checksum of every file, and rename: a checkpoint is whole or not there. Keeps the last --keep."""
    out, lead = Path(config.output_dir), dist.get_rank() == 0
    final, beside = out / f"checkpoint-{step}", out / f"checkpoint-{step}.tmp"
    weights, moments = get_state_dict(policy.model, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=beside)  # on the disk when it returns
    if lead:
        write_whole(beside / "config.json", json.dumps({"step": step, "ranks": dist.get_world_size(), **asdict(config)}))
    files = checksums(beside)
    if lead:
        write_whole(beside / "manifest.json", json.dumps(files, indent=1) + "\n")
        beside.rename(final)
        for _, old in checkpoints(out)[:-config.keep]:
            shutil.rmtree(old.rename(old.with_suffix(".tmp")))  # never in parts under its own name
    dist.barrier()


def checkpoints(out: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every checkpoint of a run, oldest first."""
    return sorted((int(path.name[11:]), path) for path in out.glob("checkpoint-*[0-9]"))


def clean(out: Path, step: int) -> None:
    """Bring the folder of a run back to what it was after `step`: what is later, or half written, is removed."""
    for path in [*out.glob("checkpoint-*.tmp"), *out.glob("model*.tmp"), *(out / "rollouts").glob("step_*")]:
        if path.suffix == ".tmp" or int(path.stem[5:]) > step:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in (out / "metrics.jsonl", out / "evaluations.jsonl"):
        write_whole(path, "".join(json.dumps(row) + "\n" for row in read_json_lines(path) if row["step"] <= step))


def checksums(folder: Path) -> dict[str, list]:
    """{name: [bytes, SHA-256]} of the files of a checkpoint, its manifest apart. All ranks call it and share the work."""
    names = gather([path.name for path in folder.iterdir()] if dist.get_rank() == 0 else [])
    found = []
    for name in sorted(set(names) - {"manifest.json"})[dist.get_rank()::dist.get_world_size()]:
        with open(folder / name, "rb") as file:
            found.append((name, [os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()]))
    return dict(gather(found))


def damaged_files(folder: Path) -> list[str]:
    """Names of the files of a checkpoint that are not as they were written; none if it is whole. All ranks call it."""
    found = checksums(folder)
    try:
        wanted = json.loads((folder / "manifest.json").read_text())
        return sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    except (OSError, ValueError, AttributeError):
        return ["manifest.json"]


def find_checkpoint(config: Config) -> tuple[int, Path | None]:
    """(step, folder) of the newest whole checkpoint, or (0, None) where none was written yet. Later rows are cut, to be
    replayed; damaged checkpoints are set aside, not deleted. Raises ValueError if all are damaged or the model is another."""
    out, lead, damaged = Path(config.output_dir), dist.get_rank() == 0, []
    found = checkpoints(out)
    while found and (names := damaged_files(found[-1][1])):
        damaged.append(found.pop()[1])
        print(f"{damaged[-1]} is damaged: {', '.join(names)}")
    if damaged and not found:
        raise ValueError(f"no checkpoint in {out} is whole; bring one back, or choose another --output_dir")
    step, folder = found[-1] if found else (0, None)
    path, now = (folder or out) / "config.json", {"ranks": dist.get_world_size(), **asdict(config)}
    before = json.loads(path.read_text()) if path.exists() else now  # a run can be killed before it is there
    changed = [f"{name} {before.get(name)} -> {now[name]}" for name in now.keys() - {"output_dir", "resume"}
               if before.get(name) != now[name]]
    if before["model"] != config.model:
        raise ValueError(f"{out} is a run of --model {before['model']}, where its KL starts; give that one")
    print(f"resumes from {folder}" if folder else f"{out} has no checkpoint yet: starts at the first step",
          f"; changed, so it may be no replay: {', '.join(sorted(changed))}" * bool(changed), sep="", flush=True)
    if lead and path.exists():  # or no run has begun there
        for broken in damaged:
            broken.rename(broken.with_suffix(".damaged"))
        clean(out, step)
    dist.barrier()
    return step, folder


# ----------------------------------------------------------------------------------------------------------------- the run
def prepare(config: Config) -> tuple[list[dict], list[dict], SearchTool]:
    """Check what can be checked before a model is loaded; returns (training tasks, held-out tasks, search tool)."""
    check_model(config.model)
    out, world = Path(config.output_dir), int(os.environ.get("WORLD_SIZE", 1))
    what = holds(out)
    if what and not (config.resume and what == "a training run"):
        go_on = "add --resume to go on, or " * (what == "a training run")
        raise ValueError(f"--output_dir {out} holds {what}; {go_on}choose another folder")
    if config.prompts_per_step % world:
        raise ValueError(f"--prompts_per_step {config.prompts_per_step} does not divide among {world} ranks")
    tasks = load_tasks(config.tasks, mode=config.mode)
    held_out = load_tasks(config.eval_tasks, mode="episode") if config.eval_tasks else []
    if 0 < config.eval_limit < len(held_out):
        held_out = random.Random(0).sample(held_out, config.eval_limit)  # in file order the first ones are of one family
    search = SearchTool(config.corpus, config.topk, pages=config.search_pages, cache=config.search_cache,
                        budget=config.search_budget)
    if os.environ.get("RANK", "0") == "0":
        search.check()
        try:
            CodeTool(1, config.code_timeout, config.code_unlocked).close()
        except RuntimeError as error:
            raise ValueError(error) from error
    take_folder(out)  # at the end: a run that is refused leaves none
    return tasks, held_out, search


def load(config: Config, tasks: list[dict], held_out: list[dict]
         ) -> tuple[Policy, Policy | None, torch.optim.Optimizer, int]:
    """Join the other ranks and see that all tasks can be opened; returns (policy, reference if there is a KL, optimizer,
    steps done).

    The last thing before the first step that can fail for what a user can mend: raises ValueError then, and OSError.
    """
    start_ranks()
    out, lead = Path(config.output_dir), dist.get_rank() == 0
    if not lead:
        sys.stdout = open(os.devnull, "w")  # the first rank speaks for all
    first, folder = find_checkpoint(config) if config.resume else (0, None)
    options = {"shard": True, "min_pixels": config.min_pixels, "max_pixels": config.max_pixels}
    policy = load_policy(config.model, gradient_checkpointing=config.gradient_checkpointing, **options)
    check_tasks(policy, tasks, held_out, config)
    reference = copy_policy(policy) if config.beta > 0 else None
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=config.lr, weight_decay=0.0)
    if folder:
        state = dict(zip(("model", "optimizer"), get_state_dict(policy.model, optimizer)))
        dcp.load(state, checkpoint_id=folder)
        set_state_dict(policy.model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    elif (needed := 12 * sum(p.numel() for p in policy.model.parameters())) > shutil.disk_usage(out).free:
        raise ValueError(f"a checkpoint takes {needed / 1e9:.2g} GB, --output_dir {out} has less room; make some")
    if lead:
        write_whole(out / "config.json", json.dumps({"ranks": dist.get_world_size(), **asdict(config)}, indent=1) + "\n")
        (out / "rollouts").mkdir(exist_ok=True)
    return policy, reference, optimizer, first


def main(config: Config, tasks: list[dict], held_out: list[dict], search: SearchTool, policy: Policy,
         reference: Policy | None, optimizer: torch.optim.Optimizer, first: int) -> None:
    """The whole run, from the first step to the export, on what `prepare` and `load` returned."""
    begin = time.perf_counter()
    out, lead = Path(config.output_dir), dist.get_rank() == 0
    print(f"{config.model} on {dist.get_world_size()} x {policy.device.type}: {describe(tasks)}, {len(held_out)} held "
        f"out, {config.steps} steps of {config.prompts_per_step} x {config.group_size} rollouts; see {out}")
    rows = read_json_lines(out / "metrics.jsonl")
    skipped = len(list(takewhile(lambda row: row["skipped"], reversed(rows)))) % config.max_skipped  # in a row, of this start
    signals, saved = [], first
    for number in (signal.SIGTERM, signal.SIGINT):  # noted only: the run ends where all ranks agree to
        signal.signal(number, lambda number, _: signals.append(signal.Signals(number).name))

    def reasons() -> list[str]:  # of this rank to end the run
        return (signals[:1] + [f"--search_budget {config.search_budget} is spent (each rank has its share)"] * search.spent
                + [f"{skipped} steps in a row had a loss or gradient that is not finite"] * (skipped >= config.max_skipped))

    def stop(where: str, why: str) -> None:
        said = f"stopped {where}: {why}; --resume goes on"
        if "not finite" in why:
            raise FloatingPointError(said)  # a failure is what torchrun --max-restarts starts again
        if lead:
            print(said, file=sys.stderr)
        sys.exit(0)
    with CodeTool(config.code_workers, config.code_timeout, config.code_unlocked) as code_tool:
        tools = Tools(code_tool, search)
        if first == 0 or config.eval_every and first % config.eval_every == 0:  # unless its row is there
            evaluate_policy(policy, held_out, tools, first, config, reasons)
        training = time.perf_counter()
        for step in range(first, config.steps):
            clock = time.perf_counter()
            # 1. sample prompts
            failed = []  # ids of tasks that cannot be opened: others take their places
            prompts = prompts_of_step(tasks, step, config, lambda task: opens(policy, task, config, failed))
            seed_step(config.seed, step)
            # 2. roll out, with live tools and no collectives
            with gathered(policy):
                rollouts, seconds = roll_out(policy, prompts, tools, config.limits(), group_size=config.group_size,
                                             temperature=config.temperature, prompt=config.prompt,
                                             interrupted=lambda: bool(reasons()))
            if why := gather(reasons()):  # on any rank: what was just rolled out is thrown away
                if step > saved:
                    save_checkpoint(policy, optimizer, step, config)
                stop(f"before step {step + 1}", why[0])
            # 3. score: rewards by part
            parts = [reward_parts(r, config.mode) for r in rollouts]
            rewards = [weighted_sum(p, config.reward_weights()) for p in parts]
            # 4. advantages: within the G samples of a prompt, which stand side by side
            advantages = group_advantages(torch.tensor(rewards).view(-1, config.group_size), config.loss)  # (P, G)
            advantages = advantages.flatten().tolist()
            # 5. update
            mark = time.perf_counter()
            batches, num_real = even_micro_batches(policy, rollouts, advantages, config.micro_batch_tokens)
            ref_logps = reference_logps(reference, batches, config.temperature)
            seconds["score"] = time.perf_counter() - mark
            mark = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, config)
            metrics = update(policy, optimizer, batches, num_real, ref_logps, config)
            seconds["update"] = time.perf_counter() - mark
            # 6. log
            row = log_step(step + 1, rollouts, parts, rewards, advantages, metrics, seconds, failed, clock, config)
            left = (time.perf_counter() - training) / (step + 1 - first) * (config.steps - step - 1)
            print(step_line(row, config.steps, left), flush=True)
            skipped = skipped + 1 if row["skipped"] else 0
            # 7. checkpoint
            if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
                save_checkpoint(policy, optimizer, step + 1, config)
                saved = step + 1
            if config.eval_every and (step + 1) % config.eval_every == 0:
                evaluate_policy(policy, held_out, tools, step + 1, config, reasons)
        if not all(evaluate_policy(policy, held_out, t, config.steps, config, reasons) for t in (tools, Tools())):
            stop("in its evaluation", gather(reasons())[0])
    export(policy, out / "model.tmp")
    if lead:
        publish(out / "model.tmp", out / "model")
        summary = write_summary(out, config.steps, seconds=round(time.perf_counter() - begin, 1), seed=config.seed,
                                ranks=dist.get_world_size())
        print(f"done in {summary['seconds']:.0f} s; the model is in {out / 'model'}\n{json.dumps(summary)}")
    dist.destroy_process_group()


if __name__ == "__main__":
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        flags = parse_flags(Config, __doc__.splitlines()[0])
        flags.resume |= os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"  # torchrun --max-restarts
        with nothing_left(Path(flags.output_dir)):
            tasks, held_out, search = prepare(flags)
            begun = tasks, held_out, search, *load(flags, tasks, held_out)
    except (OSError, ValueError) as error:  # what a user can mend; whatever is raised later keeps its traceback
        sys.exit(fail(error))
    try:
        record(main)(flags, *begun)  # torchrun's last words are the error of the rank that failed first
    except FloatingPointError as error:
        sys.exit(f"error: {error}")
    except (OSError, CheckpointException) as error:
        cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        free, out = shutil.disk_usage(flags.output_dir).free / 1e9, flags.output_dir
        sys.exit(f"error: {cause}; {out} ({free:.2f} GB free) keeps what is whole: make room or mend it, --resume goes on")
