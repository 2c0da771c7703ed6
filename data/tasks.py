"""Tasks: every published layout, and ours, read into one form.

    load_tasks("data/offline/train.json")       -> [{"id", "family", "question", "answers", …}, …]

A bad row is refused before a model is loaded: no row may end a run that has started.
Left out on purpose: other files than JSON.
"""
import os
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Literal

from PIL import Image

from data.files import each_row, read_rows, row_id, shown
from data.steps import join_steps
from tools import MAX_ASPECT, open_picture, parse_action

Benchmark = Literal["mat-coding", "mat-search", "2wiki", "hotpotqa", "musique", "bamboogle",
                    "offline"]
SIMPLE_FIRST = {"mat-coding": (70, 200), "mat-search": (75, 150)}  # the first n of N are simple
FAMILIES = ("search", "coding")
# MAT's labels, and the types of its coding steps.
CODING_TYPES = {"rotation90", "rotation180", "dark", "overexposure", "blur", "noise", "crop",
                "none", "pre_problem", "pre_code", "pre_answer"}
# Of MAT-Coding, MAT-Search, FlashRAG and MAT's steps.
ANSWER_KEYS = ("answers", "answer", "golden_answers", "gt")


class MissingImage(ValueError):
    """An image that a row names is in none of the folders; `name` is the row's."""

    def __init__(self, key, name, folders):
        places = ", ".join(map(str, folders))
        super().__init__(f"{key} {shown(name)} is not in {places}; put it there or give its folder")
        self.name = name


def load_tasks(path: str | Path, benchmark: str | None = None,
               image_folder: str | Path | None = None, limit: int | None = None,
               problems: dict[int, ValueError] | None = None,
               mode: Literal["episode", "step"] | None = None) -> list[dict]:
    """Read tasks of any layout: MAT-Search, MAT-Coding, FlashRAG jsonl, MAT's steps, and ours.

    A task has the keys
        id        the row's, or its number
        family    "search" or "coding": the row's, or coding where it has a processed image or a
                  type of CODING_TYPES
        question  of a step its `problem`, with the chain so far
        answers   list of str; none for a step without
        image     absolute path; None for text only: FlashRAG, or a row's own null
        type      list of str
        split     the row's; or "simple", "hard" by the order of a complete MAT file; or the family,
                  for the benchmark "offline"; or "all"
        solution  the gold turn of a step, else None
    Images lie in image_folder, or else beside the file, in its `<stem>-image` or `<stem>_images`.
    With a benchmark, rows are taken as published: one of MAT-Search has an empty gold, which is
    refused otherwise. limit keeps the first rows. mode refuses what cannot be trained on in it:
    "episode" a row without an answer, "step" a row without a gold action. "episode" joins the steps
    of one question to one task (data/steps.py).
    Raises ValueError "file, row N: reason; way out", with N from 1; or, given a dict of problems,
    puts the error of each bad row into it under N and leaves the row out.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"--limit {limit} leaves no task; give at least 1")
    rows, near = read_rows(path), Path(path).with_suffix("")
    beside = [near.parent, Path(f"{near}-image"), Path(f"{near}_images")]
    folders = [Path(image_folder)] if image_folder else beside
    check_image = cache(lambda path: read_image(path).size)  # steps share their images

    def read(row, number):
        row = {key: value for key, value in row.items()
               if value is not None or key == "image_path"}  # a null counts as not there
        task = _task(row, number, folders, blank_allowed=benchmark is not None)
        _check_mode(task, mode)
        if task["image"] is not None:
            check_image(task["image"])
        split = split_of(row, number, len(rows), benchmark)
        return {**task, "split": task["family"] if benchmark == "offline" else split}

    tasks = each_row(path, rows[:limit], read, problems)
    return join_steps(path, tasks) if mode == "episode" else tasks


def load_task_files(paths: str, mode: Literal["episode", "step"]) -> list[dict]:
    """The tasks of one file, or of several with commas between, whose names then begin the ids.

    Files of one name in two folders begin them with their paths. A file that is named twice is seen
    twice as often. Raises ValueError as `load_tasks` does.
    """
    if "," not in paths or Path(paths).is_file():
        return load_tasks(paths, mode=mode)
    names = {path: Path(path).stem for path in paths.split(",")}
    if len(set(names.values())) < len(names):
        names = {path: path for path in names}
    return [{**task, "id": f"{names[path]}: {task['id']}"} for path in paths.split(",")
            for task in load_tasks(path, mode=mode)]


def describe(tasks: list[dict]) -> str:
    """What rows were taken for, as "3 tasks (1 coding, 2 search; 1 without an image)"."""
    families = Counter(task["family"] for task in tasks)
    blind = sum(task["image"] is None for task in tasks)
    kinds = ", ".join(f"{families[name]} {name}" for name in sorted(families))
    return f"{len(tasks)} tasks ({kinds}{f'; {blind} without an image' if blind else ''})"


def split_of(row: dict, number: int, num_rows: int, benchmark: str | None) -> str:
    """The split of row `number` (from 1) of num_rows.

    Its own, or that of its place in a whole MAT file, or "all".
    """
    if row.get("split"):
        return _text(row, "split")
    num_simple, num_tasks = SIMPLE_FIRST.get(benchmark, (0, 0))
    by_order = "simple" if number <= num_simple else "hard"
    return by_order if num_rows == num_tasks else "all"


def _task(row: dict, number: int, folders: list[Path], blank_allowed: bool) -> dict:
    is_step = "solution" in row
    kinds = _texts(row, "type") if row.get("type") else []
    question = _text(row, "problem" if is_step else "question")
    if is_step and not _is_blank(row.get("context")) and _text(row, "context") not in question:
        question = f"{question}\n{row['context']}"  # MAT's coding steps keep the chain so far apart
    solution = _text(row, "solution") if is_step else None
    key = next((key for key in ANSWER_KEYS if key in row), "answers")
    is_early = is_step and parse_action(solution).kind not in ("answer", "invalid")
    if (is_step and _is_blank(row.get(key))) or (is_early and key == "gt"):
        answers = []  # the gt of one of MAT's early steps is not the answer to the question
    else:
        answers = read_golds(row, key, blank_allowed)
        if is_step:  # MAT's gt is the whole gold turn
            answers = [_unwrapped(text) for text in answers]
    image = _find_image(row, kinds, folders)
    is_coding = row.get("processed_image_path") or (image and CODING_TYPES.intersection(kinds))
    family = row.get("family") or FAMILIES[bool(is_coding)]
    if family not in FAMILIES:
        raise ValueError(f"family is {shown(family)}; take one of {', '.join(FAMILIES)}")
    return {"id": row_id(row, number), "family": family, "question": question, "answers": answers,
            "image": image, "type": kinds, "solution": solution}


def _unwrapped(text: str) -> str:
    """The answer in a text that is a whole turn; any other text as it is."""
    action = parse_action(text)
    return action.content if action.kind == "answer" and action.content else text


def _check_mode(task: dict, mode: str | None) -> None:
    """ValueError for a row that cannot be trained on in this mode."""
    if mode == "step" and task["solution"] is None:
        raise ValueError("--mode step needs a solution in every row; "
                         'add "solution": "<think>…</think><answer>…</answer>"')
    action = parse_action(task["solution"] or "")
    if mode == "step" and (action.kind == "invalid" or not action.content):
        raise ValueError("solution must hold one action and its content, got "
                         f"{shown(task['solution'])}; write <think>…</think> "
                         "and one of <search>, <problem>, <code>, <answer>")


def _is_blank(value) -> bool:
    """Whether nothing is said: null, an empty text, or a list of such texts."""
    texts = value if isinstance(value, list) else [value]
    return all(text is None or isinstance(text, str) and not text.strip() for text in texts)


def _text(row: dict, key: str) -> str:
    if not isinstance(row.get(key), str) or not row[key].strip():
        raise ValueError(f"{key} must be a text, got {shown(row.get(key))}; add \"{key}\": \"…\"")
    return row[key]


def _texts(row: dict, key: str) -> list[str]:
    """One or more texts."""
    texts = [row[key]] if isinstance(row.get(key), str) else row.get(key)
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{key} must be one or more texts, got {shown(texts)}; "
                         f"add \"{key}\": [\"…\"]")
    return texts


def read_golds(row: dict, key: str, blank_allowed: bool) -> list[str]:
    """The gold answers under a key, one or more texts. Raises ValueError for anything else."""
    golds = _texts(row, key)
    if not blank_allowed and not all(map(str.strip, golds)):
        raise ValueError(f"{key} has an empty text, {shown(golds)}; fill it in or remove the row")
    return golds


def _find_image(row: dict, kinds: list[str], folders: list[Path]) -> str | None:
    """The path of the input image; for a crop of MAT-Coding the original, else the processed."""
    if row.get("image_path") is None and ("image_path" in row or "golden_answers" in row):
        return None
    key = "ori_image_path" if kinds == ["crop"] else "processed_image_path"
    key = key if key in row else "image_path"
    if key not in row:
        raise ValueError('has no image_path; add "image_path": "…", or null for a task '
                         "without an image")
    name = _text(row, key)
    # Not Path.is_file, which raises for some odd names.
    found = [folder / name for folder in folders if os.path.isfile(folder / name)]
    if not found:
        raise MissingImage(key, name, folders)
    return str(found[0].resolve())


def read_image(path: str | Path) -> Image.Image:
    """An image as the run will read it. Raises ValueError for one that code or model cannot use."""
    try:
        picture = open_picture(path)
    except ValueError as error:
        raise ValueError(f"{error}; replace it or remove the row") from None
    width, height = picture.size
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ValueError(f"image {path} has {width}x{height} pixels: one side is over {MAX_ASPECT} "
                         "times the other, which no model reads; crop or pad it, or remove the row")
    return picture
