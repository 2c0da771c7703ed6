"""Rollouts: a policy and its tools write one token sequence, turn by turn.

    prompt | action 1 | observation 1 | action 2 | observation 2 | action 3
      0    |    1     |      0        |    1     |      0        |    1        action_mask

The sequence is only ever appended to. The ids of an action are the ids that were sampled, end token included; they are never
decoded and tokenised again. An observation is a user turn with text, and with a *new* image where the tool made one: the
model thinks with a growing list of images, none is replaced.

Rollouts know nothing of rewards: the caller scores them, and evaluation uses them as training does.

Legend: P prompts, G samples a prompt, B = P·G rollouts, T tokens, N tokens of a packed row.
"""
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path

import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence

from grpo import Segments
from model import (EncodedImage, Policy, encode_image, encode_observation, encode_prompt, encode_text, image_inputs,
                   prompt_of, sample, token_inputs)
from tools import TOOLS_OFF, Action, CodeTool, SearchTool, ToolResult, open_picture, parse_action, to_rgb

# What stands after the question. `short` is for the laptop model, which learnt the form from demonstrations.
PROMPTS = {
    "short": {"search": "", "coding": ""},
    "full": {
        "search": """

Answer the question about the image (if there is one) step by step. In every turn, first reason between <think> and \
</think>, then do exactly one of two things:
- look something up on the web with a text query: <search> query </search>. The results come back between <information> \
and </information>. You may search several times.
- answer as briefly as possible, and end: <answer> answer </answer>""",
        "coding": """

The image may be degraded. In every turn, first reason between <think> and </think>, then do exactly one of three things:
- name what is wrong with the image, first of all: <problem> {'label', ...} </problem> with labels from rotation90, \
rotation180, dark, overexposure, blur, noise, crop, none (crop: the question is about a part of the image);
- repair it with Python between <code> and </code>, as a ```python block that reads 'path_to_input_image.jpg' and writes \
'path_to_output_image.jpg' (Pillow, numpy or OpenCV). The processed image comes back;
- answer as briefly as possible, and end: <answer> answer </answer>"""},
}
TIP_REPAIR = "Write the code."
TIP_NONE = "Answer the question."
IMAGE_READY = "The processed image."
MAX_KEPT = 4 << 30  # bytes of tasks' images, as pictures and as patches, that a rank keeps


@dataclass(frozen=True)
class Limits:
    """What a rollout may spend. A rollout that would exceed one ends there and keeps what it earned."""
    max_turns: int = 5
    max_new_tokens: int = 1024  # a turn
    max_tokens: int = 8192  # prompt, actions and observations together
    max_observation_tokens: int = 1024  # of a tool's text; a longer one is cut, with a mark
    max_images: int = 6  # in the context, the prompt's included
    batch_tokens: int = 16384  # rows played side by side × max_tokens: bounds their keys and values
    released_context: bool = False  # evaluation only: see `_restart`


@dataclass(frozen=True)
class Tools:
    """The live tools; None answers every call with "switched off"."""
    code: CodeTool | None = None
    search: SearchTool | None = None
    edit: Callable[[str, dict, tuple[int, int]], str] | None = None  # (code, task, image size) -> the code that is run instead


@dataclass
class Turn:
    """One action of the policy and what came back. `text` is for people and rewards; the ids are in the rollout."""
    text: str
    action: Action
    result: ToolResult | None = None  # of a search or a code call
    observation: str | None = None  # None where the rollout ended with this turn

    @property
    def is_lost(self) -> bool:
        """Whether its tool call was a search that failed through no fault of the policy: server, network or budget."""
        known = (None, "empty_query", "no_results", "off")
        return self.action.kind == "search" and self.result is not None and self.result.error not in known


@dataclass
class Rollout:
    """One episode. All lists of length T run side by side."""
    task: dict
    ids: list[int]  # (T,)
    action_mask: list[int]  # (T,) 1 where the policy sampled the token
    logps: list[float]  # (T,) nats, as sampled; 0.0 where action_mask is 0
    images: list[EncodedImage] = field(default_factory=list)  # in the order of their placeholders
    pictures: list[Image.Image] = field(default_factory=list)  # the same as people see them
    turns: list[Turn] = field(default_factory=list)
    stop: str | None = None  # answer | turns | length | images | invalid; None while it lives
    answer: str | None = None  # of the last turn, None if none was given
    opening: str = ""  # the text of the prompt: question and instructions


@dataclass
class Batch:
    """B rollouts in one row of N tokens without padding; a prompt that neighbours share stands in it once (`model.PackedRow`).

    The (B, T) tensors begin behind each rollout's prompt and are padded on the right.
    """
    inputs: dict[str, torch.Tensor]  # input_ids (1, N), position_ids (3, 1, N), images in the order of the row
    segments: Segments  # tokens of each prompt, and of each of its samples
    targets: torch.Tensor  # (B, T) int64
    predictors: torch.Tensor  # (B, T) int64: the place in the row whose output predicts the token
    action_mask: torch.Tensor  # (B, T) bool
    sampled_logps: torch.Tensor  # (B, T) float32, nats
    advantages: torch.Tensor  # (B,) float32


Sampler = Callable[[list[Rollout]], list[tuple[list[int], list[float]]]]


def roll_out(policy: Policy, tasks: list[dict], tools: Tools, limits: Limits, *, group_size: int = 1,
             temperature: float = 1.0, prompt: str = "short", sampler: Sampler | None = None,
             interrupted: Callable[[], bool] = lambda: False) -> tuple[list[Rollout], dict[str, float]]:
    """Play group_size episodes of each task with live tools. Returns B = P·G rollouts, those of a task side by side,
    and what was spent: seconds as "generate" and "tools", and "padding", the share of the tokens fed to the policy that is.

    temperature 0 is greedy. Random numbers come from torch's global generator. `sampler` replaces the policy by any other
    source of actions (a recorded chain, a demonstrator); it gets the live rollouts and returns (ids, log-probs) for each.
    `interrupted` is asked before each turn; once it says True, rollouts come back as they are, and are to be thrown away.
    Raises ValueError, naming the task, if a prompt leaves no room for one turn.
    """
    rollouts = [r for task in tasks for r in _open(policy, task, limits, group_size, prompt)]
    seconds, fed = {"generate": 0.0, "tools": 0.0}, Counter()
    if sampler is None:
        sampler = partial(sample, policy, max_new_tokens=limits.max_new_tokens, temperature=temperature,
                          interrupted=interrupted, fed=fed)
    rows = max(1, limits.batch_tokens // limits.max_tokens)
    for start in range(0, len(rollouts), rows):
        if interrupted():
            break
        _play(policy, rollouts[start:start + rows], tools, limits, sampler, interrupted, seconds)
    return rollouts, seconds | {"padding": 1 - fed["real"] / fed["all"] if fed else 0.0}


def _play(policy, rollouts, tools, limits, sampler, interrupted, seconds):
    """Turn by turn until all have ended; adds to the seconds."""
    for turn in range(limits.max_turns):
        live = [r for r in rollouts if r.stop is None]
        if not live or interrupted():
            break
        start = time.perf_counter()
        for rollout, (ids, logps) in zip(live, sampler(live), strict=True):
            _append_action(policy, rollout, ids, logps, last=turn == limits.max_turns - 1)
        seconds["generate"] += time.perf_counter() - start
        start = time.perf_counter()
        acting = [r for r in live if r.stop is None]
        for rollout, (result, text, picture) in zip(acting, _observe(policy, acting, tools, limits), strict=True):
            _append_observation(policy, rollout, result, text, picture, limits)
        seconds["tools"] += time.perf_counter() - start


def _open(policy, task, limits, group_size, prompt):
    """group_size fresh rollouts of one task."""
    picture, image = (None, None) if task["image"] is None else _load_image(policy, task["image"])
    opening = task["question"] + PROMPTS[prompt][task["family"]]
    ids = encode_prompt(policy, opening, image)
    if len(ids) + limits.max_new_tokens > limits.max_tokens:
        raise ValueError(f"task {task['id']}: its prompt has {len(ids)} tokens and leaves no room for a turn of "
                         f"{limits.max_new_tokens} within {limits.max_tokens}; raise --max_tokens or lower --max_pixels")
    pictures, images = ([], []) if image is None else ([picture], [image])
    return [Rollout(task, list(ids), [0] * len(ids), [0.0] * len(ids), list(images), list(pictures), opening=opening)
            for _ in range(group_size)]


def opening_error(policy: Policy, task: dict, limits: Limits, prompt: str) -> Exception | None:
    """Why no rollout of a task can begin: an image that is gone or damaged, a prompt that leaves no room for a turn."""
    try:
        _open(policy, task, limits, 1, prompt)
    except Exception as error:  # of whatever kind: one task must not end a run of many
        return error
    return None


def _load_image(policy, image):
    """(picture, encoded) of a picture, or of a path: kept for the next time as long as memory is cheap."""
    is_path = not isinstance(image, Image.Image)
    if is_path and image in policy.images:
        return policy.images[image]
    picture = open_picture(image) if is_path else to_rgb(image)
    encoded = encode_image(policy, picture)
    if is_path and sum(known.pixels.nbytes + 3 * p.width * p.height for p, known in policy.images.values()) < MAX_KEPT:
        policy.images[image] = picture, encoded
    return picture, encoded


def _append_action(policy, rollout, ids, logps, last):
    """Append sampled ids as they are, parse their text, and end the rollout if nothing can follow."""
    rollout.ids += ids
    rollout.action_mask += [1] * len(ids)
    rollout.logps += logps
    ended = bool(ids) and ids[-1] == policy.end_id
    text = policy.tokenizer.decode(ids[:-1] if ended else ids)
    action = parse_action(text)
    rollout.turns.append(Turn(text, action))
    if not ended:
        rollout.stop = "length"  # cut off in mid-turn: not an answer, even if one can be read in it
    elif action.kind == "answer":
        rollout.stop, rollout.answer = "answer", action.content
    elif action.kind == "invalid":
        rollout.stop = "invalid"
    elif last:
        rollout.stop = "turns"


def _observe(policy, rollouts, tools, limits):
    """[(tool result or None, text, new picture or None)] for rollouts whose last action is search, code or problem."""
    actions = [r.turns[-1].action for r in rollouts]
    results = dict.fromkeys(range(len(rollouts)), None)
    searches = [i for i, a in enumerate(actions) if a.kind == "search"]
    codes = [i for i, a in enumerate(actions) if a.kind == "code"]
    if searches:
        queries = [actions[i].content for i in searches]
        found = tools.search.search_many(queries) if tools.search else [TOOLS_OFF] * len(queries)
        results.update(zip(searches, found, strict=True))
    if codes:
        calls = [(actions[i].content, _code_input(rollouts[i])) for i in codes]
        if tools.edit:
            calls = [(tools.edit(code, rollouts[i].task, image.size), image) for i, (code, image) in zip(codes, calls)]
        done = tools.code.run_many(calls) if tools.code else [TOOLS_OFF] * len(calls)
        results.update(zip(codes, done, strict=True))
    texts = [_shorten(policy, results[i].text, limits.max_observation_tokens) if results[i] else "" for i in results]
    return [_observation(actions[i], results[i], texts[i]) for i in results]


def _shorten(policy, text, tokens):
    ids = encode_text(policy, text)
    return text if len(ids) <= tokens else policy.tokenizer.decode(ids[:tokens]).rstrip("\ufffd") + " […]"


def _code_input(rollout):
    """Code reads the prompt's image: repairs do not pile up, as in the released chains. A blank stands in for none."""
    return rollout.pictures[0] if rollout.pictures else Image.new("RGB", (28, 28))


def _observation(action, result, text):
    if action.kind == "problem":
        labels = re.findall(r"\w+", action.content.lower())
        return None, TIP_NONE if "none" in labels else TIP_REPAIR, None
    if action.kind == "search":
        return result, f"<information> {text} </information>", None
    return result, IMAGE_READY if result.ok else text, result.image


def _append_observation(policy, rollout, result, text, picture, limits):
    """Append a user turn, or end the rollout where the budget has no room for it and a whole turn after it."""
    turn = rollout.turns[-1]
    turn.result = result
    image = encode_image(policy, picture) if picture is not None else None
    if image is not None and len(rollout.images) >= limits.max_images:
        rollout.stop = "images"
        return
    ids = encode_observation(policy, text, image)
    if len(rollout.ids) + len(ids) + limits.max_new_tokens > limits.max_tokens:
        rollout.stop = "length"
        return
    turn.observation = text
    if limits.released_context:
        return _restart(policy, rollout, image)
    rollout.ids += ids
    rollout.action_mask += [0] * len(ids)
    rollout.logps += [0.0] * len(ids)
    if image is not None:
        rollout.images.append(image)
        rollout.pictures.append(picture)


def _restart(policy, rollout, image):
    """The context of the released evaluation: a first user turn anew, with the chain so far pasted behind the question as
    text, and with the newest image instead of all others."""
    rollout.images = rollout.images[:1] if image is None else [image]
    chain = "".join(f"\n{turn.text}\n{turn.observation}" for turn in rollout.turns)
    rollout.ids = encode_prompt(policy, rollout.opening + chain, rollout.images[0] if rollout.images else None)
    rollout.action_mask, rollout.logps = [0] * len(rollout.ids), [0.0] * len(rollout.ids)


def rollout_row(rollout: Rollout, folder: Path | None, name: str) -> dict:
    """A rollout as a JSON row for people. With a folder, the images that its tools made are written to folder/name-TURN.png."""
    turns = []
    for n, turn in enumerate(rollout.turns):
        row = {"text": turn.text, "action": turn.action.kind, "observation": turn.observation}
        if turn.result is not None:
            row |= {"ok": turn.result.ok, "error": turn.result.error, "lost": turn.is_lost,
                    "seconds": round(turn.result.seconds, 4)}
            if folder is not None and turn.result.image is not None:
                row["image"] = f"{name}-{n}.png"
                (folder / row["image"]).parent.mkdir(parents=True, exist_ok=True)
                turn.result.image.save(folder / row["image"])
        turns.append(row)
    task = rollout.task
    return {"id": task["id"], "question": task["question"], "prompt": rollout.opening,
            "image": None if task["image"] is None else str(task["image"]), "turns": turns, "answer": rollout.answer,
            "answers": task["answers"], "stop": rollout.stop, "tokens": len(rollout.ids)}


def replay(policy: Policy, chain_of: Callable[[dict], list[str]]) -> Sampler:
    """A sampler that plays recorded chains: chain_of(task) is the text of its turns. Log-probs are 0.0."""
    def sample(live: list[Rollout]) -> list[tuple[list[int], list[float]]]:
        chains = [chain_of(r.task) for r in live]
        texts = [chain[len(r.turns)] for r, chain in zip(live, chains)]
        actions = [encode_text(policy, text) + [policy.end_id] for text in texts]
        return [(ids, [0.0] * len(ids)) for ids in actions]
    return sample


def collate(policy: Policy, rollouts: list[Rollout], advantages: list[float]) -> Batch:
    """Pack B rollouts into one batch; advantages are in their order. Every rollout has sampled at least one token.

    Neighbours of the same prompt share it, so that G of them cost P + G·C tokens instead of G·(P + C).
    """
    positions = token_inputs(policy, rollouts, "right")["position_ids"]  # (3, B, longest)
    ids, places, images, segments, targets, predictors = [], [], [], [], [], []
    for prompt, group in groupby(enumerate(rollouts), key=lambda row: prompt_of(policy, row[1])):
        group, length, shown = list(group), len(prompt.ids), len(prompt.images)
        places.append(positions[:, group[0][0], :length])
        images += prompt.images
        ids += prompt.ids
        last = len(ids) - 1  # predicts the first token of every sample
        for b, rollout in group:
            sample = rollout.ids[length:]
            predictors.append(torch.tensor([last, *range(len(ids), len(ids) + len(sample) - 1)]))
            targets.append(torch.tensor(sample))
            places.append(positions[:, b, length:len(rollout.ids)])
            images += rollout.images[shown:]
            ids += sample
        segments.append((length, [len(rollout.ids) - length for _, rollout in group]))
    inputs = {"input_ids": torch.tensor([ids], device=policy.device), "position_ids": torch.cat(places, dim=1)[:, None]}
    lengths = [len(ids) for ids in targets]
    masks = [torch.tensor(r.action_mask[-n:]) for r, n in zip(rollouts, lengths)]
    logps = [torch.tensor(r.logps[-n:]) for r, n in zip(rollouts, lengths)]
    targets, predictors, mask, logps = (pad_sequence(rows, batch_first=True).to(policy.device)  # (B, T)
                                        for rows in (targets, predictors, masks, logps))
    return Batch(inputs | image_inputs(policy, images), segments, targets, predictors, mask.bool(), logps,
                 torch.tensor(advantages, dtype=torch.float32, device=policy.device))


def micro_batches(policy: Policy, rollouts: list[Rollout], advantages: list[float], tokens: int) -> list[Batch]:
    """Cut rollouts, in their order, into batches of at most `tokens` packed tokens; one that is longer stands alone."""
    cuts, packed, prompt = [0], 0, None
    for i, rollout in enumerate(rollouts):
        before, prompt = prompt, prompt_of(policy, rollout)
        new = len(rollout.ids) - (len(prompt.ids) if prompt == before else 0)
        if i > cuts[-1] and packed + new > tokens:
            cuts.append(i)
            packed, new = 0, len(rollout.ids)
        packed += new
    return [collate(policy, rollouts[a:b], advantages[a:b]) for a, b in zip(cuts, [*cuts[1:], len(rollouts)])]
