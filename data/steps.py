"""Join MAT's single training steps to whole questions, which live episodes can train on.

    join_steps("rft_agent_search_20.json", [...63 tasks...])       -> 20 tasks

A step shows the question with the gold chain so far and holds the gold turn that comes next; its
question has a row for each of its turns. They belong together by question and image: the step that
answers may show the clean image, NAME_ori.png, beside the NAME_proc.png of the others.
Left out on purpose: observations in the chains, as an episode asks its own tools.
"""
import re
from collections.abc import Callable
from pathlib import Path

from data.files import shown
from reward import normalize_answer, problem_labels
from tools import parse_action

# The released code writes `<query> question </query>`, or the second tag without its slash.
QUERY = re.compile(r"\s*<query>(.*?)</?query>(.*)", re.DOTALL)
CHAIN = re.compile(r"<(?:think|problem|tips|code|search|information|answer)>")
VARIANT = re.compile(r"[-_](?:proc|processed|ori|original)$")  # of the images of one question


def join_steps(path: str | Path, tasks: list[dict]) -> list[dict]:
    """The tasks of a file, row by row, with the steps of each question joined to one.

    Of the joined task,
        id, family, image, split  are those of its first step
        question                  is free of the chain and of <query> tags
        answers                   are the gold ones
        type                      has the labels of its gold problem action, if it has one
        queries                   are those of its gold search actions, in order
        solution                  is None
    Tasks without a solution stay as they are. Raises ValueError "file, rows N, M: reason; way out"
    for a question that lacks its first step or an answer, and for steps that contradict each other.
    """
    groups = {}
    for number, task in enumerate(tasks, start=1):
        is_whole = task["solution"] is None
        groups.setdefault(number if is_whole else _key(task), []).append((number, task))
    joined = []
    for rows in groups.values():
        numbers, steps = zip(*rows)
        try:
            joined.append(steps[0] if steps[0]["solution"] is None else _join(steps))
        except ValueError as error:
            where = "rows" if len(rows) > 1 else "row"
            raise ValueError(f"{path}, {where} {', '.join(map(str, numbers))}: {error}") from None
    return joined


def split_chain(text: str) -> tuple[str, str]:
    """(question, chain so far) of the text of a step; without a chain it is empty."""
    if match := QUERY.match(text):
        return match[1].strip(), match[2].strip()
    start = match.start() if (match := CHAIN.search(text)) else len(text)
    return text[:start].strip(), text[start:].strip()


def _key(task: dict) -> tuple[str, str | None]:
    """What the steps of one question share: its text, and the image whatever its variant."""
    image = task["image"] and Path(task["image"])
    name = image and str(image.with_name(VARIANT.sub("", image.stem)))
    return split_chain(task["question"])[0], name


def _join(steps: tuple[dict, ...]) -> dict:
    """One question out of its steps, which may stand in any order."""
    chains = {step["id"]: split_chain(step["question"])[1] for step in steps}
    steps = sorted(steps, key=lambda step: len(chains[step["id"]]))
    starts = [step for step in steps if not chains[step["id"]]]
    if not starts:
        raise ValueError("no step shows the question without a chain, as an episode begins; "
                         "add the first step, or train with --mode step")
    _one([step["image"] for step in starts], "images")
    _one([step["family"] for step in steps], "families")
    golds, labels, queries = [], [], {}
    for step in steps:
        action = parse_action(step["solution"])
        if action.kind == "problem":
            labels.append(problem_labels(action.content))
        elif action.kind == "search":
            queries[action.content] = None  # in order, once each
        if step["answers"] or action.kind == "answer":
            golds.append(step["answers"] or [action.content])
    if not any(golds):
        raise ValueError("no step has the answer, by which an episode is scored; add the step with "
                         "<answer>…</answer>, or train with --mode step")
    kinds = [kind for kind in starts[0]["type"] if not kind.startswith("pre_")]
    return {**starts[0], "question": split_chain(starts[0]["question"])[0], "solution": None,
            "answers": _one(golds, "answers", key=lambda texts: {*map(normalize_answer, texts)}),
            "type": _one(labels, "labels") or kinds, "queries": list(queries)}


def _one(values: list, what: str, key: Callable = lambda value: value):
    """The first of values that are alike by their keys; None of none. ValueError if any differ."""
    for value in values[1:]:
        if key(value) != key(values[0]):
            raise ValueError(f"steps of one question have different {what}, {shown(values[0])} and "
                             f"{shown(value)}; make them agree, give one question another text or "
                             "image, or train with --mode step")
    return values[0] if values else None
