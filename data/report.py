"""The page of a run: what a training run or an evaluation left, as one file to open in a browser.

    python evaluate.py --report runs/default
"""
import json
import re
from base64 import b64encode
from collections.abc import Callable
from functools import cache, partial
from hashlib import sha256
from io import BytesIO
from pathlib import Path

from data.files import parse_json, write_whole
from tools import open_picture

IMAGE_SIDE = 320  # pixels, at most, of an image in the page


def write_report(folder: str | Path) -> Path:
    """Write one page about a training run or an evaluation into its folder; returns its path.

    The page, report.html, needs no network. Texts of a model are hostile: they stand in it as JSON
    that cannot leave its element, are only ever shown as text, and the page's policy forbids every
    request and every script but its own. Raises ValueError for a folder of neither kind, and
    "file, line N: reason; way out" for a damaged file.
    """
    folder, images = Path(folder), {}
    if (folder / "items.jsonl").is_file():
        kind, parts = "evaluation", [("items", folder / "items")]
    elif (folder / "metrics.jsonl").is_file():
        steps = [path.stem.removeprefix("step_") for path in folder.glob("rollouts/step_*.jsonl")]
        steps = sorted(map(int, filter(str.isdecimal, steps)))
        kind, parts = "training", [(step, folder / f"rollouts/step_{step}") for step in steps]
    else:
        raise ValueError(f"{folder} has neither metrics.jsonl, as a training run does, nor "
                         "items.jsonl, as an evaluation does; give the --output_dir of one")
    embed = cache(partial(_embed, images))
    data = {"name": folder.resolve().name, "kind": kind}
    for name in ("config", "summary", "scores"):
        data[name] = next(iter(read_objects(folder / f"{name}.json")), {})
    for name in ("metrics", "evaluations"):
        data[name] = read_objects(folder / f"{name}.jsonl")
    data["sets"] = [{"name": name, "rows": _read_rollouts(folder, part, embed)}
                    for name, part in parts]
    data["images"] = list(images)
    page = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    for tag, text in re.findall(r"<(style|script)>(.*?)</\1>", page, re.DOTALL):
        digest = b64encode(sha256(text.encode()).digest()).decode()
        page = page.replace(f"{{{{{tag}}}}}", f"'sha256-{digest}'")
    text = json.dumps(data, allow_nan=False)  # ASCII alone: no U+2028
    text = text.replace("<", "\\u003c")  # no tag, no comment
    page = page.replace("{{data}}", text)  # last, since the data may hold anything
    write_whole(folder / "report.html", page)
    return folder / "report.html"


def _read_rollouts(run: Path, folder: Path, embed: Callable[[Path | None], int]) -> list[dict]:
    """Rows of `rollout.rollout_row`, from folder.jsonl. Each image is a number: its place in the
    page's list of images."""
    path = folder.with_suffix(".jsonl")
    rows = read_objects(path)
    for number, row in enumerate(rows, start=1):
        turns = row.get("turns")
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            raise ValueError(f"{path}, line {number}: turns must be a list of objects; "
                             "mend the line")
        has_image = row.get("image") not in (None, "None")
        row["image"] = embed(Path(str(row["image"]))) if has_image else None
        for turn in turns:
            if turn.get("image") is not None:
                turn["image"] = embed(_own_image(run, folder, str(turn["image"])))
    return rows


def read_objects(path: Path) -> list[dict]:
    """The objects of a .json or .jsonl file of a run, none if it is missing. A last line without
    its end is left out, as it is being written."""
    if not path.is_file():
        return []
    data = path.read_bytes()
    lines = data.split(b"\n")[:-1] if path.suffix == ".jsonl" else [data]
    objects = [parse_json(line, path, number) for number, line in enumerate(lines, start=1)]
    for number, value in enumerate(objects, start=1):
        if not isinstance(value, dict):
            raise ValueError(f"{path}, line {number}: is no object but {type(value).__name__}; "
                             "mend the line")
    return objects


def _own_image(run: Path, folder: Path, name: str) -> Path | None:
    """The path of an image that a tool made; None if it leads out of the run, also by links.

    It is a plain name in the folder of its rows. train.py writes it behind the folder's name.
    """
    name = name.removeprefix(f"{folder.name}/")
    try:
        path = (folder / name).resolve()
        is_own = name == Path(name).name and path.is_relative_to(run.resolve())
        return path if is_own else None
    except (OSError, RuntimeError, ValueError):  # a name too long, a loop of links, a zero byte
        return None


def _embed(images: dict[tuple[str, int, int], int], path: Path | None) -> int:
    """The place in `images` of the picture at a path, as (data URI, width, height as the model's);
    -1 if there is none."""
    try:
        if path is None or not path.is_file():  # reading a pipe would not end
            return -1
        picture = open_picture(path)
    except (OSError, ValueError):
        return -1
    size, uris = picture.size, []
    picture.thumbnail((IMAGE_SIDE, IMAGE_SIDE))
    for kind in ("png", "jpeg"):
        picture.save(file := BytesIO(), kind, quality=90, compress_level=3)
        uris.append(f"data:image/{kind};base64,{b64encode(file.getvalue()).decode()}")
    return images.setdefault((min(uris, key=len), *size), len(images))
