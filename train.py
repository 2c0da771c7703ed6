"""Train a vision-language model to use tools, by GRPO on live multi-turn rollouts.

    torchrun --nproc_per_node=2 train.py                                   # a laptop: no GPU, no network, no argument
    torchrun --nproc_per_node=8 train.py --model Qwen/Qwen2.5-VL-7B-Instruct --tasks ... --lr 1e-6   # see the README
    python train.py --help                                                 # every flag, with its unit

Seven stages a step, in the order in which `main` shows them: sample prompts, roll out, score, advantages, update, log,
checkpoint. All randomness of a step comes from (seed, step, rank), so a resumed run replays what an uninterrupted one does.

Left out on purpose: a trainer class, callbacks, mixed batches of old and new rollouts, a warm start (data/make_model.py).

Legend: P prompts a step, G samples a prompt, B = P·G rollouts, T tokens.
"""
import json
import os
import random
import shutil
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from transformers import HfArgumentParser
from transformers.utils import logging as hf_logging

from evaluate import load_tasks, success_rates
from grpo import LOSSES, group_advantages, policy_loss, token_weights
from model import (MAX_PIXELS, MIN_PIXELS, Policy, all_reduce, check_model, copy_policy, export, gather, gathered, load_policy,
                   pick_device, score, start_ranks)
from reward import STEP_WEIGHTS, WEIGHTS, episode_reward, exact_match, parse_weights, step_reward, weighted_sum
from rollout import PROMPTS, Limits, Rollout, Tools, collate, is_lost, micro_batches, roll_out, rollout_row
from tools import CodeTool, SearchTool, parse_action


def flag(default, text):
    """A field of `Config` with its help text."""
    return field(default=default, metadata={"help": text})


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
    mode: str = flag("episode", "episode: live multi-turn; step: one action a row, the released way")
    prompt: str = flag("short", "instructions after the question: short (none: the laptop model) or full (the hub's models)")
    steps: int = flag(60, "updates")
    prompts_per_step: int = flag(8, "P, over all ranks together")
    group_size: int = flag(8, "G, samples a prompt, at least 2")
    max_turns: int = flag(4, "actions a rollout may take")
    max_new_tokens: int = flag(96, "tokens a turn may take")
    max_tokens: int = flag(512, "tokens of a whole rollout: prompt, actions, observations")
    max_observation_tokens: int = flag(256, "tokens of a tool's text; longer ones are cut, with a mark")
    max_images: int = flag(4, "images in the context of a rollout, the prompt's included")
    temperature: float = flag(1.0, "of sampling, and of the scored law")
    batch_tokens: int = flag(16384, "rows x length of one generate call of a rank")
    micro_batch_tokens: int = flag(8192, "rows x length of one forward and backward pass of a rank; not part of the objective")
    lr: float = flag(1.5e-4, "learning rate of AdamW at the start; the released code for 3B and 7B: 1e-6")
    lr_decay: float = flag(0.8, "share of lr lost by the last update, on a line, 0 to 1; the released code: 1")
    max_grad_norm: float = flag(1.0, "gradients are scaled down to this norm")
    beta: float = flag(0.04, "weight of the KL to the starting model; 0 loads no reference")
    updates_per_batch: int = flag(1, "optimizer steps on the same rollouts; beyond the first, ratios leave 1 and are clipped")
    clip_low: float = flag(0.2, "ratios below 1 - clip_low gain nothing; needs updates_per_batch above 1")
    clip_high: float = flag(0.2, "ratios above 1 + clip_high gain nothing (dapo: 0.28)")
    loss: str = flag("grpo", f"one of {', '.join(LOSSES)}")
    rewards: str = flag("", "weights of reward parts, like accuracy=1,problem=0.5; others keep their default")
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
    save_every: int = flag(20, "updates between checkpoints")
    rollouts_every: int = flag(10, "updates between written rollouts; the first and the last are always written")
    resume: bool = flag(False, "go on from the newest checkpoint in output_dir")

    def __post_init__(self):
        for name, allowed in {"mode": ("episode", "step"), "prompt": tuple(PROMPTS), "loss": LOSSES}.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"--{name} {getattr(self, name)}: choose from {', '.join(allowed)}")
        if self.group_size < 2:
            raise ValueError(f"--group_size {self.group_size}: a group of one has no advantage; give at least 2")
        positive = ("steps", "prompts_per_step", "max_turns", "max_new_tokens", "temperature", "lr", "save_every",
                    "rollouts_every", "micro_batch_tokens", "batch_tokens", "max_images", "topk", "code_workers",
                    "max_observation_tokens", "updates_per_batch", "clip_low", "clip_high")
        for name in positive:
            if getattr(self, name) <= 0:
                raise ValueError(f"--{name} {getattr(self, name)}: must be above 0")
        if self.beta < 0 or not 0 <= self.lr_decay <= 1:
            raise ValueError(f"--beta {self.beta} --lr_decay {self.lr_decay}: beta is at least 0, lr_decay within 0 and 1")
        self.reward_weights()

    def reward_weights(self) -> dict[str, float]:
        return parse_weights(self.rewards, WEIGHTS if self.mode == "episode" else STEP_WEIGHTS)

    def limits(self) -> Limits:
        return Limits(1 if self.mode == "step" else self.max_turns, self.max_new_tokens, self.max_tokens,
                      self.max_observation_tokens, self.max_images, self.batch_tokens)


# ------------------------------------------------------------------------------------------------------- stages of a step
def prompts_of_step(tasks: list[dict], step: int, config: Config) -> list[dict]:
    """This rank's share of the P tasks of a step: each epoch is a shuffle of its own, a pure function of seed and step."""
    chosen = []
    for position in range(step * config.prompts_per_step, (step + 1) * config.prompts_per_step):
        epoch, index = divmod(position, len(tasks))
        order = torch.randperm(len(tasks), generator=torch.Generator().manual_seed(config.seed * 1_000_003 + epoch))
        chosen.append(tasks[order[index]])
    share = len(chosen) // dist.get_world_size()
    return chosen[dist.get_rank() * share:(dist.get_rank() + 1) * share]


def seed_step(config: Config, step: int) -> None:
    """All random numbers of a step on a rank: nothing has to be saved to resume, and ranks differ."""
    torch.manual_seed((config.seed * 100_003 + step) * 1_009 + dist.get_rank())


def reward_parts(rollout: Rollout, mode: str) -> dict[str, float]:
    """The named parts of a rollout's reward, each within 0 and 1."""
    task, turns = rollout.task, rollout.turns
    if mode == "step":
        action, gold = turns[0].action, parse_action(task["solution"])
        return step_reward(turns[0].text, action.kind, action.content, gold.kind, gold.content, golds=task["answers"])
    results = [(turn.action.kind, turn.result) for turn in turns if turn.result is not None and not is_lost(turn)]
    return episode_reward(
        [turn.text for turn in turns], rollout.answer, task["answers"],
        problem=next((turn.action.content for turn in turns if turn.action.kind == "problem"), None),
        gold_labels=task["type"] or None, tool_oks=[result.ok for _, result in results],
        evidence=[result.text for kind, result in results if kind == "search"] if task["family"] == "search" else None)


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
        sums = {"loss": 0.0, "kl": 0.0, "entropy": 0.0, "clipped": 0.0}
        for i, (batch, ref, old) in enumerate(zip(batches, ref_logps, old_logps, strict=True)):
            policy.model.set_requires_gradient_sync(i == len(batches) - 1)  # gradients meet once an update
            logps, entropy = score(policy, batch, config.temperature)  # (B, T)
            weights = token_weights(batch.action_mask, config.loss, num_rollouts=counts["rollouts"],
                                    num_tokens=counts["tokens"], max_tokens=config.max_turns * config.max_new_tokens)
            weights = weights * (i < num_real)  # (B, T); 0 for a batch that only fills up
            loss, parts = policy_loss(logps, batch.advantages, weights, old_logps=old, ref_logps=ref, beta=config.beta,
                                      clip_low=config.clip_low, clip_high=config.clip_high)
            (loss * dist.get_world_size()).backward()  # FSDP averages over ranks, the loss is a sum over them
            for name, value in {"loss": loss, **parts, "entropy": (weights * entropy).sum()}.items():
                sums[name] += value.item()
            if old is None:
                old_logps[i] = logps.detach()
                gap = max(gap, ((logps - batch.sampled_logps).abs() * batch.action_mask).max().item())
        grad_norm = torch.nn.utils.clip_grad_norm_(policy.model.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    policy.model.eval()
    return {**all_reduce(sums), **all_reduce({"gap": gap}, dist.ReduceOp.MAX), "tokens": counts["tokens"],
            "grad_norm": getattr(grad_norm, "full_tensor", lambda: grad_norm)().item()}


def learning_rate(step: int, config: Config) -> float:
    """A line from lr to (1 - lr_decay) · lr."""
    return config.lr * (1 - config.lr_decay * step / config.steps)


# ------------------------------------------------------------------------------------------------- what a run leaves behind
def log_step(step: int, rollouts: list[Rollout], parts: list[dict], rewards: list[float], advantages: list[float],
             metrics: dict[str, float], seconds: dict[str, float], clock: float, config: Config) -> dict:
    """Write a row of metrics.jsonl and, now and then, the rollouts; returns the row. The README defines every metric."""
    out = Path(config.output_dir)
    shown = out / "rollouts" if step in (1, config.steps) or step % config.rollouts_every == 0 else None
    rows = gather([{**rollout_row(r, shown, f"step_{step}/{dist.get_rank()}-{i}"), "reward_parts": parts[i],
                    "reward": rewards[i], "advantage": advantages[i]} for i, r in enumerate(rollouts)])
    oks = [turn["ok"] for row in rows for turn in row["turns"] if "ok" in turn]
    names = sorted({name for row in rows for name in row["reward_parts"]})
    spent = all_reduce({**seconds, "all": time.perf_counter() - clock}, dist.ReduceOp.MAX)
    row = {"step": step, "reward": fmean(r["reward"] for r in rows),
           **{f"reward_{name}": fmean(r["reward_parts"][name] for r in rows if name in r["reward_parts"]) for name in names},
           "success": fmean(exact_match(r["answer"], r["answers"]) for r in rows),
           "turns": fmean(len(r["turns"]) for r in rows), "tool_errors": 1 - fmean(oks or [1]),
           "searches_lost": sum(turn.get("lost", False) for row in rows for turn in row["turns"]),
           "stop_length": fmean(r["stop"] == "length" for r in rows),
           "stop_invalid": fmean(r["stop"] == "invalid" for r in rows),
           "flat_groups": fmean(r["advantage"] == 0 for r in rows), **metrics, "lr": learning_rate(step - 1, config),
           "tokens_per_s": metrics["tokens"] / spent["all"], "seconds": spent.pop("all"),
           **{f"seconds_{name}": value for name, value in spent.items()}}
    if dist.get_rank() == 0:
        with open(out / "metrics.jsonl", "a") as file:
            print(json.dumps(row), file=file)
        if shown:
            (shown / f"step_{step}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return row


def read_json_lines(path: Path) -> list[dict]:
    """The whole rows of a file; a last one without its line end was cut off by a kill."""
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []


def save_checkpoint(policy: Policy, optimizer: torch.optim.Optimizer, step: int, config: Config) -> None:
    """Write beside and rename: a checkpoint that has its final name is whole. All but the last two are then removed."""
    out = Path(config.output_dir)
    final, temporary = out / f"checkpoint-{step}", out / f"checkpoint-{step}.tmp"
    if dist.get_rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(final, ignore_errors=True)
    dist.barrier()
    weights, moments = get_state_dict(policy.model, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=temporary)
    if dist.get_rank() == 0:
        (temporary / "config.json").write_text(json.dumps({"step": step, **asdict(config)}, indent=1))
        temporary.rename(final)
        for _, old in checkpoints(out)[:-2]:
            shutil.rmtree(old)
    dist.barrier()


def checkpoints(out: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every whole checkpoint, oldest first."""
    return sorted((int(path.name[11:]), path) for path in out.glob("checkpoint-*[0-9]"))


def resume(policy: Policy, optimizer: torch.optim.Optimizer, config: Config) -> int:
    """Load the newest whole checkpoint; returns the step to go on with. Later metrics are cut: they will be replayed."""
    out = Path(config.output_dir)
    step, folder = (checkpoints(out) or [(0, None)])[-1]
    if folder:
        state = dict(zip(("model", "optimizer"), get_state_dict(policy.model, optimizer)))
        dcp.load(state, checkpoint_id=folder)
        set_state_dict(policy.model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    if dist.get_rank() == 0:
        for name in ("metrics.jsonl", "evaluations.jsonl"):
            kept = [row for row in read_json_lines(out / name) if row["step"] <= step]
            (out / name).write_text("".join(json.dumps(row) + "\n" for row in kept))
    dist.barrier()
    return step


def evaluate_policy(policy: Policy, tasks: list[dict], tools: Tools, step: int, config: Config) -> None:
    """Success on held-out tasks as a row of evaluations.jsonl, once for each step with the tools on or off."""
    path = Path(config.output_dir) / "evaluations.jsonl"
    label = "on" if tools.code or tools.search else "off"
    if not tasks or any(row["step"] == step and row["tools"] == label for row in read_json_lines(path)):
        return
    start = time.perf_counter()
    seed_step(config, -1 - step)
    rates = success_rates(policy, tasks, tools, replace(config.limits(), max_turns=config.max_turns),
                          temperature=config.eval_temperature, prompt=config.prompt)
    if tools.search and search_is_spent(tools.search):
        return  # no row: it is not known what the policy can do; --resume evaluates again
    if dist.get_rank() == 0:
        with open(path, "a") as file:
            print(json.dumps({"step": step, "tools": label, **rates}), file=file)
        kinds = "  ".join(f"{kind} {value:.0%}" for kind, value in rates["by_type"].items())
        print(f"held-out success, tools {label}: {rates['success']:.1%} of {rates['n']}   ({kinds})   "
              f"{time.perf_counter() - start:.0f} s", flush=True)
    dist.barrier()  # the row is there before any rank looks for it


def search_is_spent(search: SearchTool) -> bool:
    """Whether the search budget of any rank is used up. All ranks call it."""
    return all_reduce({"spent": search.spent}, dist.ReduceOp.MAX)["spent"] > 0


def write_summary(config: Config, seconds: float) -> dict:
    """summary.json: held-out success before, after and with the tools switched off, in all and by family and type."""
    out = Path(config.output_dir)
    rows = read_json_lines(out / "evaluations.jsonl")
    wanted = {"before": (0, "on"), "after": (config.steps, "on"), "tools_off": (config.steps, "off")}
    picked = {when: next((r for r in rows if (r["step"], r["tools"]) == key), {}) for when, key in wanted.items()}
    summary = {f"success_{when}": row.get("success") for when, row in picked.items()}
    for key in ("by_family", "by_type"):
        summary[key] = {name: {when: row.get(key, {}).get(name) for when, row in picked.items()}
                        for name in picked["after"].get(key, {})}
    summary |= {"steps": config.steps, "seconds": round(seconds, 1), "seed": config.seed, "ranks": dist.get_world_size()}
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    return summary


def step_line(row: dict, config: Config, left: float) -> str:
    """One readable line a step."""
    parts = " ".join(f"{name[7:]} {row[name]:.2f}" for name in row if name.startswith("reward_"))
    seconds = " ".join(f"{name} {row[f'seconds_{name}']:.1f}" for name in ("generate", "tools", "score", "update"))
    return (f"step {row['step']:>3}/{config.steps}  reward {row['reward']:.2f} ({parts})  success {row['success']:.0%}  "
            f"kl {row['kl']:.4f}  gap {row['gap']:.0e}  {row['tokens_per_s']:.0f} tok/s  {row['seconds']:.1f} s ({seconds})  "
            f"left {int(left) // 60}:{int(left) % 60:02d}"
            + f"  {row['searches_lost']} searches lost" * (row["searches_lost"] > 0))


# ----------------------------------------------------------------------------------------------------------------- the run
def prepare(config: Config) -> tuple[list[dict], list[dict], SearchTool]:
    """Check what can be checked before a model is loaded; returns (training tasks, held-out tasks, search tool)."""
    check_model(config.model)
    if Path(config.output_dir, "metrics.jsonl").exists() and not config.resume:
        raise ValueError(f"--output_dir {config.output_dir} holds a run; add --resume to go on, or choose another folder")
    world = int(os.environ.get("WORLD_SIZE", 1))
    if config.prompts_per_step % world:
        raise ValueError(f"--prompts_per_step {config.prompts_per_step} does not divide among {world} ranks")
    tasks = load_tasks(config.tasks)
    if config.mode == "step" and (missing := [task["id"] for task in tasks if not task["solution"]]):
        raise ValueError(f"{config.tasks}: --mode step needs a solution in every row; {missing[0]} has none")
    held_out = load_tasks(config.eval_tasks) if config.eval_tasks else []
    if 0 < config.eval_limit < len(held_out):
        held_out = random.Random(0).sample(held_out, config.eval_limit)  # in file order the first ones are of one family
    if 0 < config.search_budget < world:
        raise ValueError(f"--search_budget {config.search_budget} does not divide among {world} ranks; give at least {world}")
    return tasks, held_out, SearchTool(config.corpus, config.topk, pages=config.search_pages, cache=config.search_cache,
                                       budget=config.search_budget // world if config.search_budget else None)


def main(config: Config, tasks: list[dict], held_out: list[dict], search: SearchTool) -> None:
    """The whole run, from the model to its export, on what `prepare` returned."""
    begin = time.perf_counter()
    start_ranks()
    out, lead = Path(config.output_dir), dist.get_rank() == 0
    options = {"shard": True, "min_pixels": config.min_pixels, "max_pixels": config.max_pixels}
    policy = load_policy(config.model, gradient_checkpointing=config.gradient_checkpointing, **options)
    reference = copy_policy(policy) if config.beta > 0 else None
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=config.lr, weight_decay=0.0)
    if lead:
        (out / "rollouts").mkdir(parents=True, exist_ok=True)
        (out / "config.json").write_text(json.dumps(asdict(config), indent=1) + "\n")
        print(f"{config.model} on {dist.get_world_size()} x {policy.device.type}: {len(tasks)} tasks, {len(held_out)} held "
              f"out, {config.steps} steps of {config.prompts_per_step} x {config.group_size} rollouts; see {out}", flush=True)
    first = resume(policy, optimizer, config) if config.resume else 0
    with CodeTool(config.code_workers, config.code_timeout, config.code_unlocked) as code_tool:
        tools = Tools(code_tool, search)
        if first == 0 or config.eval_every and first % config.eval_every == 0:  # unless its row is there
            evaluate_policy(policy, held_out, tools, first, config)
        training = time.perf_counter()
        for step in range(first, config.steps):
            clock = time.perf_counter()
            # 1. sample prompts
            prompts = prompts_of_step(tasks, step, config)
            seed_step(config, step)
            # 2. roll out, with live tools and no collectives
            with gathered(policy):
                rollouts, seconds = roll_out(policy, prompts, tools, config.limits(), group_size=config.group_size,
                                             temperature=config.temperature, prompt=config.prompt)
            if search_is_spent(search):  # what was just rolled out was told so: it is thrown away
                if step > first:  # otherwise its checkpoint is there, or nothing has been learnt
                    save_checkpoint(policy, optimizer, step, config)
                sys.exit(f"stopped before step {step + 1}: --search_budget {config.search_budget} is spent; --resume goes on")
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
            row = log_step(step + 1, rollouts, parts, rewards, advantages, metrics, seconds, clock, config)
            if lead:
                left = (time.perf_counter() - training) / (step + 1 - first) * (config.steps - step - 1)
                print(step_line(row, config, left), flush=True)
            # 7. checkpoint
            if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
                save_checkpoint(policy, optimizer, step + 1, config)
            if config.eval_every and (step + 1) % config.eval_every == 0:
                evaluate_policy(policy, held_out, tools, step + 1, config)
        evaluate_policy(policy, held_out, tools, config.steps, config)
        if search_is_spent(search):
            sys.exit(f"stopped in its evaluation: --search_budget {config.search_budget} is spent; --resume goes on")
    evaluate_policy(policy, held_out, Tools(), config.steps, config)
    export(policy, out / "model")
    if lead:
        summary = write_summary(config, time.perf_counter() - begin)
        print(f"done in {summary['seconds']:.0f} s; the model is in {out / 'model'}\n{json.dumps(summary)}")
    dist.destroy_process_group()


if __name__ == "__main__":
    try:
        [arguments] = HfArgumentParser(Config, description=__doc__.splitlines()[0]).parse_args_into_dataclasses()
        prepared = prepare(arguments)
    except (OSError, ValueError) as error:  # what a user can mend; whatever is raised later keeps its traceback
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    main(arguments, *prepared)
