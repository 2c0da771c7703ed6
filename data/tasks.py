"""Tasks: every published layout, and ours, read into one form; a bad row is refused before a model is loaded.

    load_tasks("data/offline/train.json")       -> [{"id", "family", "question", "answers", "image", "type", …}, …]
"""
from functools import cache
from pathlib import Path
from typing import Literal

from data.files import each_row, read_rows
from tools import MAX_ASPECT, open_picture

Benchmark = Literal["mat-coding", "mat-search", "2wiki", "hotpotqa", "musique", "bamboogle", "offline"]
SIMPLE_FIRST = {"mat-coding": (70, 200), "mat-search": (75, 150)}  # the first n of N tasks are simple, the rest hard
FAMILIES = ("search", "coding")
ANSWER_KEYS = ("answers", "answer", "golden_answers", "gt")  # MAT-Coding, MAT-Search, FlashRAG, MAT's training steps


class MissingImage(ValueError):
    """An image that a row names is in none of the folders; `name` is the row's."""

    def __init__(self, key, name, folders):
        super().__init__(f"{key} {name!r} is not in {', '.join(map(str, folders))}; put it there or give its folder")
        self.name = name


def load_tasks(path: str | Path, benchmark: str | None = None, image_folder: str | Path | None = None,
               limit: int | None = None, problems: dict[int, ValueError] | None = None) -> list[dict]:
    """Read tasks of any layout: MAT-Search, MAT-Coding, FlashRAG jsonl, MAT's training steps, and ours.

    A task has the keys id, family ("search" or "coding"), question, answers (list of str), image (absolute path, None
    for text only: FlashRAG, or a row's own null), type (list of str), split (the row's own; or "simple", "hard" by the
    order of a complete MAT file; or the family, for the benchmark "offline"; or "all") and solution (the gold turn of a
    step, else None). The question of a step is its `problem` with the chain so far. Images lie in image_folder, or else
    beside the file, in its `<stem>-image` or its `<stem>_images`. With a benchmark, rows are taken as published: one of
    MAT-Search has an empty gold, which is refused otherwise. limit keeps the first tasks.
    Raises ValueError "file, row N: reason; way out", with N from 1; or, given a dict of problems, puts the error of each
    bad row into it under N and leaves the row out.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"--limit {limit} leaves no task; give at least 1")
    rows, near = read_rows(path), Path(path).with_suffix("")
    folders = [Path(image_folder)] if image_folder else [near.parent, Path(f"{near}-image"), Path(f"{near}_images")]
    check_image = cache(_check_image)  # steps share their images

    def read(row, number):
        task = _task(row, number, folders, blank_allowed=benchmark is not None)
        if task["image"] is not None:
            check_image(task["image"])
        return {**task, "split": task["family"] if benchmark == "offline" else split_of(row, number, len(rows), benchmark)}

    return each_row(path, rows[:limit], read, problems)


def split_of(row: dict, number: int, num_rows: int, benchmark: str | None) -> str:
    """The split of row `number` (from 1) of num_rows: its own, or by its place in a complete MAT file, or "all"."""
    num_simple, num_tasks = SIMPLE_FIRST.get(benchmark, (0, 0))
    by_order = "simple" if number <= num_simple else "hard"
    return row.get("split") or (by_order if num_rows == num_tasks else "all")


def _task(row, number, folders, blank_allowed):
    is_step, kinds = "solution" in row, row.get("type") or []
    kinds = [kinds] if isinstance(kinds, str) else kinds
    # MAT's rows do not name their family: those of coding have two images, or, as steps, a type.
    is_coding = "processed_image_path" in row or (is_step and "type" in row)
    family = row.get("family") or FAMILIES[is_coding]
    if family not in FAMILIES:
        raise ValueError(f"family is {family!r}; take one of {', '.join(FAMILIES)}")
    question = _text(row, "problem" if is_step else "question")
    if is_step and row.get("context") and row["context"] not in question:
        question = f"{question}\n{row['context']}"  # MAT's coding steps keep the chain so far apart
    key = next((key for key in ANSWER_KEYS if key in row), "answers")
    answers = [] if is_step and not row.get(key) else read_golds(row, key, blank_allowed)
    return {"id": row.get("id", number), "family": family, "question": question, "answers": answers,
            "image": _find_image(row, kinds, folders), "type": kinds,
            "solution": _text(row, "solution") if is_step else None}


def _text(row, key):
    if not isinstance(row.get(key), str) or not row[key].strip():
        raise ValueError(f"{key} must be a text, got {row.get(key)!r}; add \"{key}\": \"…\"")
    return row[key]


def read_golds(row: dict, key: str, blank_allowed: bool) -> list[str]:
    """The gold answers under a key, one or more texts. Raises ValueError for anything else."""
    golds = [row[key]] if isinstance(row.get(key), str) else row.get(key)
    if not isinstance(golds, list) or not golds or not all(isinstance(gold, str) for gold in golds):
        raise ValueError(f"{key} must be one or more texts, got {golds!r}; add \"{key}\": [\"…\"]")
    if not blank_allowed and not all(map(str.strip, golds)):
        raise ValueError(f"{key} has an empty text, {golds!r}; fill it in or remove the row")
    return golds


def _find_image(row, kinds, folders):
    """The path of the input image; MAT-Coding shows the original for a crop, the processed one otherwise."""
    if "golden_answers" in row or row.get("image_path", "") is None:
        return None
    key = "ori_image_path" if kinds == ["crop"] else "processed_image_path"
    key = key if key in row else "image_path"
    name = _text(row, key)
    found = [folder / name for folder in folders if (folder / name).is_file()]
    if not found:
        raise MissingImage(key, name, folders)
    return str(found[0].resolve())


def _check_image(path):
    """Read an image as the run will: one that code or model cannot use must not stop it after hours."""
    try:
        width, height = open_picture(path).size
    except ValueError as error:
        raise ValueError(f"{error}; replace it or remove the row") from None
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ValueError(f"image {path} has {width}x{height} pixels: one side is over {MAX_ASPECT} times the other, which "
                         "no model reads; crop or pad it, or remove the row")
