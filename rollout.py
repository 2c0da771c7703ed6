"""Rollouts: a policy and its tools write one token sequence, turn by turn.

    prompt | action 1 | observation 1 | action 2 | observation 2 | action 3
      0    |    1     |      0        |    1     |      0        |    1        action_mask

The sequence is only ever appended to. The ids of an action are the ids that were sampled, end token
included; they are never decoded and tokenised again. An observation is a user turn with text, and
with a *new* image where the tool made one: the model thinks with a growing list of images, and none
is replaced.

Rollouts know nothing of rewards: the caller scores them. Evaluation uses them as training does.
Which tools there are stands in `tools.TOOLS`.

Legend: P prompts, G samples a prompt, B = P·G rollouts, T tokens, N tokens of a packed row.
"""
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence

from grpo import Segments
from model import (EncodedImage, Policy, encode_image, encode_observation, encode_prompt,
                   encode_text, image_inputs, prompt_of, sample, token_inputs)
from tools import (MAX_ASPECT, TOOLS, TOOLS_OFF, Action, Call, ToolResult, Tools, open_picture,
                   parse_action, to_rgb)

BEGINNINGS = {  # of the full instructions, by the family of the task
    "search": "Answer the question about the image (if there is one) step by step.",
    "coding": "The image may be degraded."}
PROBLEM = (
    "name what is wrong with the image, first of all: <problem> {'label', ...} </problem> with "
    "labels from rotation90, rotation180, dark, overexposure, blur, noise, crop, none (crop: the "
    "question is about a part of the image);")
ANSWER = "answer as briefly as possible, and end: <answer> answer </answer>"
NUMBERS = "no one two three four five six seven eight nine".split()
TIP_REPAIR = "Write the code."
TIP_NONE = "Answer the question."
IMAGE_READY = "The processed image."
MAX_KEPT = 4 << 30  # bytes of tasks' images, as pictures and as patches, that a rank keeps


@dataclass(frozen=True)
class Limits:
    """What a rollout may spend. At a limit it ends, and keeps what it has earned."""
    max_turns: int = 5
    max_new_tokens: int = 1024  # a turn
    max_tokens: int = 8192  # prompt, actions and observations together
    max_observation_tokens: int = 1024  # of a tool's text; a longer one is cut, with a mark
    max_images: int = 6  # in the context, the prompt's included
    batch_tokens: int = 16384  # rows played side by side × max_tokens: bounds keys and values
    released_context: bool = False  # evaluation only: see `_restart`


@dataclass
class Turn:
    """One action of the policy and what came back. `text` is for people and rewards."""
    text: str
    action: Action
    result: ToolResult | None = None  # of a tool's call
    observation: str | None = None  # None where the rollout ended with this turn


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
    """B rollouts in one row of N tokens without padding, as `collate` packs them.

    The (B, T) tensors begin behind each rollout's prompt and are padded on the right.
    """
    inputs: dict[str, torch.Tensor]  # input_ids (1, N), position_ids (3, 1, N), images in order
    segments: Segments  # tokens of each prompt, and of each of its samples
    targets: torch.Tensor  # (B, T) int64
    predictors: torch.Tensor  # (B, T) int64: the place in the row whose output predicts the token
    action_mask: torch.Tensor  # (B, T) bool
    sampled_logps: torch.Tensor  # (B, T) float32, nats
    advantages: torch.Tensor  # (B,) float32


Sampler = Callable[[list[Rollout]], list[tuple[list[int], list[float]]]]


def instructions(prompt: str, family: str) -> str:
    """What stands after the question of a task: with the prompt "full" what the model may do.

    "short", for the laptop model, is empty: it learnt the form from demonstrations.
    """
    if prompt == "short":
        return ""
    actions = [PROBLEM] if family == "coding" else []
    actions += [tool.instruction for tool in TOOLS.values() if family in tool.families]
    actions.append(ANSWER)
    return (f"\n\n{BEGINNINGS[family]} In every turn, first reason between <think> and </think>, "
            f"then do exactly one of {NUMBERS[len(actions)]} things:\n- " + "\n- ".join(actions))


def roll_out(policy: Policy, tasks: list[dict], tools: Tools, limits: Limits, *,
             group_size: int = 1, temperature: float = 1.0, prompt: str = "short",
             sampler: Sampler | None = None, interrupted: Callable[[], bool] = lambda: False
             ) -> tuple[list[Rollout], dict[str, float]]:
    """Play group_size episodes of each task with live tools.

    Returns B = P·G rollouts, those of a task side by side, and the seconds spent on "generate" and
    "tools".

    temperature 0 is greedy. Random numbers come from torch's global generator. `sampler` replaces
    the policy by any other source of actions (a recorded chain, a demonstrator); it gets the live
    rollouts and returns (ids, log-probs) for each. `interrupted` is asked before each turn; once it
    says True, rollouts come back as they are, and are to be thrown away. Raises ValueError if a
    prompt leaves no room for one turn (see `opening_error`).
    """
    rollouts = [r for task in tasks for r in _open(policy, task, limits, group_size, prompt)]
    seconds = {"generate": 0.0, "tools": 0.0}
    if sampler is None:
        sampler = partial(sample, policy, max_new_tokens=limits.max_new_tokens,
                          temperature=temperature, interrupted=interrupted)
    rows = max(1, limits.batch_tokens // limits.max_tokens)
    for first in range(0, len(rollouts), rows):
        batch = rollouts[first:first + rows]
        for turn in range(1, limits.max_turns + 1):
            live = [r for r in batch if r.stop is None]
            if not live or interrupted():
                break
            start = time.perf_counter()
            for rollout, (ids, logps) in zip(live, sampler(live), strict=True):
                _append_action(policy, rollout, ids, logps, is_last=turn == limits.max_turns)
            sampled = time.perf_counter()
            acting = [r for r in live if r.stop is None]
            observations = _observe(policy, acting, tools, limits)
            for rollout, (result, text) in zip(acting, observations):
                _append_observation(policy, rollout, result, text, limits)
            seconds["generate"] += sampled - start
            seconds["tools"] += time.perf_counter() - sampled
    return rollouts, seconds


def _open(policy: Policy, task: dict, limits: Limits, group_size: int, prompt: str
          ) -> list[Rollout]:
    """group_size fresh rollouts of one task."""
    opening = task["question"] + instructions(prompt, task["family"])
    pictures, images = [], []
    if task["image"] is not None:
        picture, image = _load_image(policy, task["image"])
        pictures, images = [picture], [image]
    ids = encode_prompt(policy, opening, images[0] if images else None)
    if len(ids) + limits.max_new_tokens > limits.max_tokens:
        raise ValueError(f"its prompt has {len(ids)} tokens and leaves no room "
                         f"for a turn of {limits.max_new_tokens} within {limits.max_tokens}; "
                         "raise --max_tokens or lower --max_pixels")
    return [Rollout(task, list(ids), [0] * len(ids), [0.0] * len(ids), list(images),
                    list(pictures), opening=opening) for _ in range(group_size)]


def opening_error(policy: Policy, task: dict, limits: Limits, prompt: str) -> Exception | None:
    """Why no rollout of a task can begin: an image that is gone or damaged, a prompt too long."""
    try:
        _open(policy, task, limits, 1, prompt)
    except Exception as error:  # of whatever kind: one task must not end a run of many
        return error
    return None


def _load_image(policy: Policy, image: str | Image.Image) -> tuple[Image.Image, EncodedImage]:
    """(picture, encoded) of a picture, or of a path, which is kept for the next time."""
    if isinstance(image, Image.Image):
        picture = to_rgb(image)
        return picture, encode_image(policy, picture)
    if image in policy.images:
        return policy.images[image]
    picture = open_picture(image)
    encoded = encode_image(policy, picture)
    kept = policy.images.values()
    if sum(known.pixels.nbytes + 3 * p.width * p.height for p, known in kept) < MAX_KEPT:
        policy.images[image] = picture, encoded
    return picture, encoded


def _append_action(policy: Policy, rollout: Rollout, ids: list[int], logps: list[float],
                   is_last: bool) -> None:
    """Append sampled ids as they are, and a `Turn`; end the rollout if nothing can follow.

    logps: of each id, in nats. The turn's text keeps special tokens, but for the end token; the
    ids keep it. A turn without it was cut off: `stop` becomes "length", and there is no answer,
    even if one can be read; else "answer", "invalid", or "turns" if is_last.
    """
    rollout.ids += ids
    rollout.action_mask += [1] * len(ids)
    rollout.logps += logps
    has_ended = ids[-1:] == [policy.end_id]
    text = policy.tokenizer.decode(ids[:-1] if has_ended else ids)
    action = parse_action(text)
    rollout.turns.append(Turn(text, action))
    if not has_ended:
        rollout.stop = "length"  # cut off in mid-turn: no answer, even if one can be read in it
    elif action.kind == "answer":
        rollout.stop, rollout.answer = "answer", action.content
    elif action.kind == "invalid":
        rollout.stop = "invalid"
    elif is_last:
        rollout.stop = "turns"


def _observe(policy: Policy, rollouts: list[Rollout], tools: Tools, limits: Limits
             ) -> list[tuple[ToolResult | None, str]]:
    """What follows each rollout's last action: the result of a tool, and what the model reads.

    A problem is answered with a tip, and with no result.
    """
    actions = [r.turns[-1].action for r in rollouts]
    observations = [(None, _tip(action.content)) if action.kind == "problem" else None
                    for action in actions]
    for tag, tool in TOOLS.items():
        rows = [i for i, action in enumerate(actions) if action.kind == tag]
        calls = [Call(actions[i].content, rollouts[i].pictures, rollouts[i].task) for i in rows]
        if not calls:
            continue
        results = tool.run(tools, calls) if tools.is_on(tag) else [TOOLS_OFF] * len(calls)
        if not isinstance(results, list) or len(results) != len(calls):
            raise RuntimeError(f"the tool {tag!r} must return a list of {len(calls)} results")
        for i, result in zip(rows, map(_with_plain_image, results)):
            text = _shorten(policy, result.text, limits.max_observation_tokens)
            if result.image and not text:
                text = IMAGE_READY
            observations[i] = result, tool.observation.format(text)
    return observations


def _with_plain_image(result: ToolResult) -> ToolResult:
    """The result with its image in RGB, or as a failure if the model cannot be shown the image."""
    if result.image is None:
        return result
    width, height = result.image.size
    if not 0 < max(width, height) <= MAX_ASPECT * min(width, height):
        return ToolResult(False, f"Error: the image has {width}x{height} pixels", None, "bad_image",
                          result.seconds)
    return replace(result, image=to_rgb(result.image))


def _tip(labels: str) -> str:
    return TIP_NONE if "none" in re.findall(r"\w+", labels.lower()) else TIP_REPAIR


def _shorten(policy: Policy, text: str, num_tokens: int) -> str:
    ids = encode_text(policy, text)
    if len(ids) <= num_tokens:
        return text
    return policy.tokenizer.decode(ids[:num_tokens]).rstrip("\ufffd") + " […]"


def _append_observation(policy: Policy, rollout: Rollout, result: ToolResult | None, text: str,
                        limits: Limits) -> None:
    """Append a user turn, or end the rollout where that and a whole turn after it have no room.

    The turn keeps its result in any case, its observation only where the policy can read it. `stop`
    becomes "images" where the result's image would be one too many, else "length" where the text
    and max_new_tokens do not fit. With released_context, `_restart` then makes the
    context, from the turns' observations, and `pictures` stays as it is.
    """
    turn = rollout.turns[-1]
    turn.result = result
    picture = result.image if result else None
    if picture and len(rollout.images) >= limits.max_images:
        rollout.stop = "images"
        return
    image = encode_image(policy, picture) if picture else None
    ids = encode_observation(policy, text, image)
    if len(rollout.ids) + len(ids) + limits.max_new_tokens > limits.max_tokens:
        rollout.stop = "length"
        return
    turn.observation = text
    if limits.released_context:
        _restart(policy, rollout, image)
        return
    rollout.ids += ids
    rollout.action_mask += [0] * len(ids)
    rollout.logps += [0.0] * len(ids)
    if image is not None:
        rollout.images.append(image)
        rollout.pictures.append(picture)


def _restart(policy: Policy, rollout: Rollout, image: EncodedImage | None) -> None:
    """The context of the released evaluation: one user turn with the newest image alone.

    The chain so far is pasted behind the question as text.
    """
    rollout.images = rollout.images[:1] if image is None else [image]
    chain = "".join(f"\n{turn.text}\n{turn.observation}" for turn in rollout.turns)
    rollout.ids = encode_prompt(policy, rollout.opening + chain,
                                rollout.images[0] if rollout.images else None)
    rollout.action_mask, rollout.logps = [0] * len(rollout.ids), [0.0] * len(rollout.ids)


def rollout_row(rollout: Rollout, folder: Path | None, name: str) -> dict:
    """A rollout as a JSON row for people.

    With a folder, the images that its tools made are written to folder/name-TURN.png.
    """
    turns = []
    for n, turn in enumerate(rollout.turns):
        row = {"text": turn.text, "action": turn.action.kind, "observation": turn.observation}
        if result := turn.result:
            row |= {"ok": result.ok, "error": result.error, "lost": result.lost,
                    "seconds": round(result.seconds, 4)}
            if folder and result.image:
                row["image"] = f"{name}-{n}.png"
                (folder / row["image"]).parent.mkdir(parents=True, exist_ok=True)
                result.image.save(folder / row["image"])
        turns.append(row)
    task = rollout.task
    return {"id": task["id"], "question": task["question"], "prompt": rollout.opening,
            "image": None if task["image"] is None else str(task["image"]), "turns": turns,
            "answer": rollout.answer, "answers": task["answers"], "stop": rollout.stop,
            "tokens": len(rollout.ids)}


def replay(policy: Policy, chain_of: Callable[[dict], list[str]]) -> Sampler:
    """A sampler that plays recorded chains, the texts of the turns of a task. Log-probs are 0.0."""
    def sampler(live: list[Rollout]) -> list[tuple[list[int], list[float]]]:
        texts = [chain_of(r.task)[len(r.turns)] for r in live]
        actions = [encode_text(policy, text) + [policy.end_id] for text in texts]
        return [(ids, [0.0] * len(ids)) for ids in actions]
    return sampler


def collate(policy: Policy, rollouts: list[Rollout], advantages: list[float]) -> Batch:
    """Pack B rollouts into one row; advantages are in their order. Each has sampled a token.

    Neighbours with the same prompt share it: G of them cost P + G·C tokens, not G·(P + C). With
    G = 2, the prompt [10, 11] and the samples [20, 21, 9] and [30, 9]:

        place in the row    0  1 |  2  3  4 |  5  6
        input_ids          10 11 | 20 21  9 | 30  9
        position_ids        0  1 |  2  3  4 |  2  3     each sample goes on where the prompt ends
        targets            [[20, 21, 9], [30, 9, 0]]
        predictors         [[ 1,  2, 3], [ 1, 5, 0]]    the prompt's last place predicts 20 and 30
        segments           [(2, [3, 2])]                one prompt of 2 tokens, samples of 3 and 2

    Rows are padded with 0. A prompt is the same if its ids and its images are.
    """
    positions = token_inputs(policy, rollouts, "right")["position_ids"]  # (3, B, longest)
    ids, places, images, segments = [], [], [], []  # of the row
    targets, predictors, masks, logps = [], [], [], []  # of each rollout, behind its prompt
    prompt = None
    for b, rollout in enumerate(rollouts):
        before, prompt = prompt, prompt_of(policy, rollout)
        length, is_shared = len(prompt.ids), prompt == before
        if not is_shared:
            ids += prompt.ids
            places.append(positions[:, b, :length])
            images += prompt.images
            segments.append((length, []))
            prompt_end = len(ids) - 1  # predicts the first token of every sample
        sample_ids, start = rollout.ids[length:], len(ids)
        ids += sample_ids
        places.append(positions[:, b, length:len(rollout.ids)])
        images += rollout.images[len(prompt.images):]
        segments[-1][1].append(len(sample_ids))
        targets.append(sample_ids)
        predictors.append([prompt_end, *range(start, len(ids) - 1)])
        masks.append(rollout.action_mask[length:])
        logps.append(rollout.logps[length:])
    inputs = {"input_ids": torch.tensor([ids], device=policy.device),  # (1, N)
              "position_ids": torch.cat(places, dim=1)[:, None]}  # (3, 1, N)
    targets, predictors, mask, logps = (
        pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(policy.device)
        for rows in (targets, predictors, masks, logps))  # (B, T) each
    return Batch(inputs | image_inputs(policy, images), segments, targets, predictors,
                 mask.bool(), logps, torch.tensor(advantages, device=policy.device))


def micro_batches(policy: Policy, rollouts: list[Rollout], advantages: list[float], tokens: int
                  ) -> list[Batch]:
    """Cut rollouts, in their order, into batches of at most `tokens` packed tokens.

    A rollout that is longer stands alone.
    """
    cuts, packed, prompt = [0], 0, None
    for i, rollout in enumerate(rollouts):
        before, prompt = prompt, prompt_of(policy, rollout)
        new = len(rollout.ids) - (len(prompt.ids) if prompt == before else 0)
        if i > cuts[-1] and packed + new > tokens:
            cuts.append(i)
            packed, new = 0, len(rollout.ids)
        packed += new
    cuts.append(len(rollouts))
    return [collate(policy, rollouts[a:b], advantages[a:b]) for a, b in pairwise(cuts)]
