"""What a training run would be, before it is one: the plan that `train.py … --dry_run` prints.

    torchrun --nproc_per_node=8 train.py --model Qwen/Qwen2.5-VL-7B-Instruct … --dry_run

Tasks, tokenizer and image processor are the real ones, and every prompt is made once. The model is
built on the meta device: its shapes without its weights. "At most" is what the flags allow; most
rollouts end earlier. Left out on purpose: times, as nothing was measured.
"""
import copy
import os
from statistics import fmean

import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from data.cost import Shape, peak, step_bytes
from data.model_files import read_config, read_image_processor, read_tokenizer
from data.similarity import load_similarity
from data.tasks import describe
from model import Policy, encode_image, encode_prompt
from rollout import instructions
from tools import open_picture


def show_plan(config, tasks: list[dict], held_out: list[dict]) -> None:
    """Print the plan of a run, on the first rank; `config` has the flags of train.py.

    Raises ValueError for a model that cannot be loaded, and for a task that has no room for a turn.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    if config.similarity:
        load_similarity(config.similarity)  # or what is wrong with it
    policy = empty_policy(config.model, config.min_pixels, config.max_pixels)
    lengths, patches = prompt_sizes(policy, tasks, config)
    prompt_sizes(policy, held_out, config)
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    shape = Shape(config.prompts_per_step, config.group_size, prompt_tokens=fmean(lengths),
                  sample_tokens=most_sampled(config, lengths), prompt_patches=fmean(patches))
    lines = {"model": model_line(config, policy), "tasks": tasks_line(tasks, held_out, lengths),
             "steps": steps_line(config, len(tasks)), "tokens": tokens_line(config, lengths),
             "searches": searches_line(config, tasks, held_out),
             "memory": memory_line(config, policy, shape, ranks)}
    print("\n".join(f"{name:<10}{line}" for name, line in lines.items()))


def empty_policy(name: str, min_pixels: int, max_pixels: int) -> Policy:
    """The policy of `--model name` without weights. Raises ValueError if it cannot be loaded."""
    config = read_config(name)
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config)
    return Policy(model, read_tokenizer(name, config),
                  read_image_processor(name, config, min_pixels, max_pixels), torch.device("cpu"))


def prompt_sizes(policy: Policy, tasks: list[dict], config) -> tuple[list[int], list[int]]:
    """(tokens of each prompt, patches of its image). Raises ValueError if one leaves no room."""
    lengths, patches, encoded = [], [], {}
    for task in tasks:
        path = task["image"]
        if path is not None and path not in encoded:
            image = encode_image(policy, open_picture(path))
            encoded[path] = image._replace(pixels=None)  # a run has thousands
        text = task["question"] + instructions(config.prompt, task["family"])
        lengths.append(len(encode_prompt(policy, text, encoded.get(path))))
        patches.append(encoded[path].grid[1] * encoded[path].grid[2] if path else 0)
        if lengths[-1] + config.max_new_tokens > config.max_tokens:
            raise ValueError(f"task {task['id']!r}: its prompt has {lengths[-1]} tokens and leaves "
                             f"no room for a turn of {config.max_new_tokens} within "
                             f"{config.max_tokens}; raise --max_tokens or lower --max_pixels")
    return lengths, patches


def most_sampled(config, lengths: list[int]) -> int:
    """Tokens that a rollout behind the shortest prompt may sample."""
    return min(config.limits().max_turns * config.max_new_tokens, config.max_tokens - min(lengths))


def model_line(config, policy: Policy) -> str:
    """Weights of the model, and the size of its checkpoints: weights and two moments in fp32."""
    weights = sum(parameter.numel() for parameter in policy.model.parameters())
    return (f"{config.model}: {weights:,} weights; a checkpoint takes {12 * weights / 1e9:.3g} GB, "
            f"and {config.keep} are kept")


def tasks_line(tasks: list[dict], held_out: list[dict], lengths: list[int]) -> str:
    """What the tasks are, and the lengths of their prompts."""
    return (f"{describe(tasks)}, prompts of {min(lengths)} to {max(lengths)} tokens, "
            f"{fmean(lengths):.0f} in the mean; {len(held_out)} held out")


def steps_line(config, num_tasks: int) -> str:
    """How often a task is seen."""
    prompts = config.steps * config.prompts_per_step
    return (f"{config.steps:,} of {config.prompts_per_step} x {config.group_size} rollouts in mode "
            f"{config.mode}: {prompts * config.group_size:,} rollouts, "
            f"{prompts / num_tasks:.3g} epochs")


def tokens_line(config, lengths: list[int]) -> str:
    """Tokens that are sampled at most."""
    each, rollouts = most_sampled(config, lengths), config.prompts_per_step * config.group_size
    return (f"at most {each:,} sampled by a rollout, {each * rollouts:,} in a step, "
            f"{each * rollouts * config.steps:,} in all")


def searches_line(config, tasks: list[dict], held_out: list[dict]) -> str:
    """Searches at most: in every turn but the last, which is answered by no tool.

    Where all tasks are of the family coding, which is offered none, they are taken to be 0.
    """
    rollouts = config.prompts_per_step * config.group_size
    step = rollouts * (config.limits().max_turns - 1) * _any_search(tasks)
    evaluations = 2 + (config.steps - 1) // config.eval_every if config.eval_every else 2
    held_out = evaluations * len(held_out) * (config.max_turns - 1) * _any_search(held_out)
    budget = f"; --search_budget {config.search_budget:,}" if config.search_budget else ""
    return (f"at most {step:,} in a step, {step * config.steps:,} in all, {held_out:,} in "
            f"evaluations{budget}")


def _any_search(tasks: list[dict]) -> bool:
    return any(task["family"] == "search" for task in tasks)


def memory_line(config, policy: Policy, shape: Shape, ranks: int) -> str:
    """The parts of a GPU's memory and their peak, computed by data/cost.py."""
    shapes = copy.deepcopy(policy.model.config)
    shapes.text_config.tie_word_embeddings = shapes.tie_word_embeddings  # the hub has it on top
    parts = step_bytes(shapes, shape, gpus=ranks,
                       micro_batch_tokens=config.micro_batch_tokens,
                       batch_tokens=config.batch_tokens, max_tokens=config.max_tokens,
                       max_images=config.max_images, beta=config.beta,
                       checkpointing=config.gradient_checkpointing)
    numbers = ", ".join(f"{name} {value / 1e9:.1f}" for name, value in parts.items())
    return (f"{peak(parts) / 1e9:.1f} GB a GPU on {ranks} at the peak, computed and not measured: "
            f"{numbers}")
