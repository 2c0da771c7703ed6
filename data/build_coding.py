"""Make coding tasks like MAT-Coding's from pictures and questions of your own.

    python data/build_coding.py ROWS.jsonl -o DIR
    torchrun ... train.py --tasks DIR/train.json --eval_tasks DIR/heldout.json

ROWS has a row {"image", "question", "answers"} a task; images lie beside it. A row may have a
"box", [left, top, right, bottom] in thousandths of the picture: the part that is asked about.

    DIR/train.json, DIR/train-image/      tasks in MAT-Coding's layout, as data/tasks.py reads them
    DIR/heldout.json, DIR/heldout-image/  tasks of other pictures
    DIR/summary.json                      by kind: items and mean errors; what was left out, and why

An item is written only if it needs a repair, and the one beside it works in the code tool. A pair
must need the repair of each half. The error of a picture is the mean absolute difference to the
original in levels of 255. The same seed gives the same bytes.

Kinds and shares are those of MAT-Coding, as far as known. Its 200 items are 70 simple and 130 hard
ones in file order, and a few ids and image names tell where kinds begin: they fit 10 of each single
kind, 40 pairs, 90 crops. The paper names the pairs: a rotation with dark, overexposure, blur or
noise. Not known: how many of each pair (here all alike), how strong its degradations are, and the
shares of the training set. Left out on purpose: pictures that are alike but not equal, which may
fall into both parts.
"""
import argparse
import hashlib
import json
import math
import os
import random
import shutil
import sys
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter
from tqdm import tqdm
from transformers.hf_argparser import string_to_bool

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.files import (each_row, nothing_left, read_rows, row_id, shown,  # noqa: E402
                        write_whole)
from data.tasks import read_golds, read_image  # noqa: E402
from make_tasks import degrade  # noqa: E402
from tools import INPUT, MIN_SIDE, OUTPUT, CodeTool, open_picture  # noqa: E402

SINGLES = ("rotation90", "rotation180", "dark", "overexposure", "blur", "noise", "none")
PAIRS = tuple(f"{turn}+{other}" for turn in SINGLES[:2] for other in SINGLES[2:6])
CROPS = 90 / 200  # share of all items; the others are dealt in turn
DEALT = SINGLES + PAIRS + SINGLES  # 10 of each single kind to 5 of each pair
STRENGTHS = {  # drawn evenly between two bounds
    # Contrast that is left. At 1/8 rounding costs 4 levels at most, which is RESTORED.
    "dark": (0.125, 0.2), "overexposure": (0.125, 0.2),
    "blur": (3.0, 8.0),  # radius of the Gaussian in thousandths of the shorter side
    "noise": (25.0, 50.0),  # standard deviation of the Gaussian in levels
}
REPAIRS = {  # {0} is the parameter of the degradation
    "rotation90": "image = image.rotate({0}, expand=True)",  # counter-clockwise
    "rotation180": "image = image.rotate({0})",
    "dark": "image = image.point(lambda p: p / {0})",
    "overexposure": "image = image.point(lambda p: 255 - (255 - p) / {0})",
    "blur": "image = image.filter(ImageFilter.UnsharpMask({0}, percent=150, threshold=0))",
    "noise": "image = image.filter(ImageFilter.GaussianBlur(1))",
    "crop": "box = {0}\n"
            "image = image.crop([v * side // 1000 for v, side in zip(box, image.size * 2)])",
}
# A repair works if it leaves an error of at most RESTORED, and of at most SHARE of the error
# without it, which must be above RESTORED.
RESTORED, SHARE = 4.0, 0.25
# Nothing undoes blur or noise: of an error of at least FELT, at most LOWERED of it may be left.
LOSSY, FELT, LOWERED = ("blur", "noise"), 1.0, 0.95


class Source(NamedTuple):
    """A row of the input."""
    number: int  # from 1
    id: str | int | float
    path: Path
    question: str
    answers: list[str]
    box: list[int] | None
    size: tuple[int, int] = (0, 0)  # of the picture: width, height in pixels
    digest: str = ""  # of its pixels, whatever the name and format of the file

    @property
    def names_its_box(self) -> bool:
        """Whether the question holds the box, which would be wrong in a picture that is turned."""
        if self.box is None:
            return False
        return str(self.box).replace(" ", "") in self.question.replace(" ", "")

    @property
    def box_in_pixels(self) -> list[int]:
        return [edge * side // 1000 for edge, side in zip(self.box, self.size * 2, strict=True)]

    @property
    def can_be_cropped(self) -> bool:
        """Whether there is a box, and large enough for the code tool."""
        if self.box is None:
            return False
        left, top, right, bottom = self.box_in_pixels
        return min(right - left, bottom - top) >= MIN_SIDE


class Item(NamedTuple):
    """A task to be made."""
    source: Source
    part: str  # "train" or "heldout"
    kind: str  # one of SINGLES or PAIRS, or "crop"


# ---- reading -------------------------------------------------------------------------------------
def read_source(folder: Path, row: dict, number: int) -> Source:
    """A row, before its picture is read. Raises ValueError for what is wrong in it."""
    for key in ("image", "question"):
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise ValueError(f"{key} must be a text, got {shown(row.get(key))}; "
                             f"add \"{key}\": \"…\"")
    if not os.path.isfile(folder / row["image"]):
        raise ValueError(f"image {shown(row['image'])} is not in {folder}; put it there, mend the "
                         "name or remove the row")
    box = row.get("box")
    is_box = isinstance(box, list) and len(box) == 4 and all(type(edge) is int for edge in box)
    if box is not None and not (is_box and 0 <= box[0] < box[2] <= 1000
                                and 0 <= box[1] < box[3] <= 1000):
        raise ValueError(f"box is {shown(box)}, not [left, top, right, bottom] in whole numbers "
                         "from 0 to 1000, left < right and top < bottom; mend it or remove it")
    return Source(number, row_id(row, number), folder / row["image"], row["question"],
                  read_golds(row, "answers", blank_allowed=False), box)


def look(source: Source) -> Source:
    """The source with size and digest of its picture. ValueError for one that is of no use."""
    picture = read_image(source.path)
    digest = hashlib.sha256(f"{picture.size}".encode() + picture.tobytes()).hexdigest()
    return source._replace(size=picture.size, digest=digest)


def read_sources(path: Path, pool: ThreadPoolExecutor) -> list[Source]:
    """All rows with their pictures looked at. Raises ValueError "file, row N: reason; way out"."""
    rows = read_rows(path)
    sources = each_row(path, rows, partial(read_source, path.parent))
    looks = [pool.submit(look, source) for source in sources]
    try:
        return each_row(path, tqdm(rows, "read", unit=" pictures"),
                        lambda row, number: looks[number - 1].result())
    finally:
        for future in looks:  # if one is bad, the others are of no use
            future.cancel()


def assign(sources: list[Source], seed: int, heldout: float) -> list[Item]:
    """An item for each source, in their order.

    heldout: the share of different pictures that are held out, rounded up. Each part has
    MAT-Coding's proportions as far as boxes allow. Raises ValueError if none is left for training.
    """
    rng, items = random.Random(seed), []
    digests = sorted({source.digest for source in sources})
    rng.shuffle(digests)
    held = set(digests[:math.ceil(heldout * len(digests))])
    if len(held) == len(digests):
        raise ValueError(f"--heldout {heldout} of {len(digests)} different pictures leaves none "
                         "for training; give more, or --heldout 0")
    for part in ("train", "heldout"):
        mine = [source for source in sources if (source.digest in held) == (part == "heldout")]
        rng.shuffle(mine)
        mine.sort(key=lambda source: (not source.names_its_box, not source.can_be_cropped))
        possible = sum(source.can_be_cropped for source in mine)
        num_crops = max(sum(source.names_its_box for source in mine),
                        min(round(CROPS * len(mine)), possible))
        items += [Item(source, part, "crop") for source in mine[:num_crops]]
        items += [Item(source, part, DEALT[i % len(DEALT)])
                  for i, source in enumerate(mine[num_crops:])]
    return sorted(items, key=lambda item: item.source.number)


# ---- one item ------------------------------------------------------------------------------------
def draw_parameters(item: Item, size: tuple[int, int], rng: random.Random) -> dict:
    """{kind: parameter}: degrees clockwise, a number as in `STRENGTHS`, or the box.

    size: of the picture that is degraded; a blur's radius comes in pixels of it.
    """
    parameters = {"rotation90": 90, "rotation180": 180, "crop": item.source.box}
    for kind, bounds in STRENGTHS.items():
        unit = min(size) / 1000 if kind == "blur" else 1.0
        parameters[kind] = round(unit * rng.uniform(*bounds), 4)
    return {kind: parameters[kind] for kind in item.kind.split("+") if kind != "none"}


def spoil(picture: Image.Image, kind: str, value: float | list[int], seed: int) -> Image.Image:
    """The picture with one degradation. value: as in `draw_parameters`. seed: of the noise."""
    if kind == "crop":
        return picture
    if kind == "blur":
        return picture.filter(ImageFilter.GaussianBlur(value))
    if kind == "noise":
        pixels = np.asarray(picture, np.float32)  # (height, width, 3)
        draws = np.random.default_rng(seed).standard_normal(pixels.shape, np.float32)
        pixels = (pixels + value * draws).round().clip(0, 255)
        return Image.fromarray(pixels.astype(np.uint8))
    return degrade(picture, kind, value)  # a turn takes no value


def repair_of(parameters: dict) -> str:
    """The program that undoes the degradations, or lowers the error where nothing undoes them."""
    lines = [REPAIRS[kind].format(value) for kind, value in parameters.items()]
    # A BMP, whatever its name, is exact and fast to write; readers look at the content.
    return "\n".join(["from PIL import Image, ImageFilter", f"image = Image.open('{INPUT}')",
                      *lines, f"image.save('{OUTPUT}', 'BMP')"])


def error_of(picture: Image.Image, original: Image.Image) -> float:
    """Mean absolute difference in levels of 255. A picture of another size is scaled first."""
    if picture.size != original.size:
        picture = picture.resize(original.size)
    difference = np.asarray(picture, np.int16) - np.asarray(original, np.int16)
    return round(float(np.abs(difference).mean()), 2)


def errors_of(kinds: list[str], pictures: list[Image.Image], repaired: Image.Image) -> dict:
    """{"alone", "degraded", "repaired"} of an item, as `objection` takes them.

    pictures: the original, and what it is after each kind of degradation.
    """
    degraded = error_of(pictures[-1], pictures[0])
    alone = dict.fromkeys(kinds, degraded)
    if len(kinds) > 1:
        alone = {kind: error_of(after, before)
                 for kind, (before, after) in zip(kinds, pairwise(pictures), strict=True)}
    return {"alone": alone, "degraded": degraded, "repaired": error_of(repaired, pictures[0])}


def objection(alone: dict[str, float], degraded: float, repaired: float) -> str:
    """Why an item must not be written; "" if it may.

    alone: {kind: error that this degradation makes by itself}, in their order; empty for "none".
    degraded, repaired: the error without and with the repair.
    """
    limit = 0.0  # of what the repair may leave; of a pair the last kind's, as turning back is exact
    for kind, error in alone.items():
        is_felt, limit = error > RESTORED, min(RESTORED, SHARE * error)
        if kind in LOSSY:
            is_felt, limit = error >= FELT, LOWERED * error
        if not is_felt:
            return f"the error of {kind} is only {error} without a repair"
    if alone and degraded <= limit:
        return f"the error is only {degraded} without a repair"
    return "" if repaired <= limit else f"the error after the repair is {repaired} of {degraded}"


def make_item(item: Item, folder: Path, tool: CodeTool, seed: int, max_pixels: int) -> dict:
    """Write the images of an item into the folder of its part, and return its row.

    A row of MAT's schema and "parameters", "repair", "error". {"row", "kind", "reason"} if the
    item is left out. max_pixels: of a degraded picture; crops are cut from all pixels.
    """
    source, is_crop = item.source, item.kind == "crop"
    rng, original = random.Random(f"{seed}-{source.number}"), open_picture(source.path)
    scale = math.sqrt(max_pixels / math.prod(source.size))
    if scale < 1 and not is_crop:
        original = original.resize([max(1, int(scale * side)) for side in source.size])
    parameters = draw_parameters(item, original.size, rng)
    pictures, noise_seed = [original], rng.getrandbits(32)  # as it was, and after each degradation
    for kind, value in parameters.items():
        pictures.append(spoil(pictures[-1], kind, value, noise_seed))
    if is_crop:
        pictures[0] = original.crop(source.box_in_pixels)
    first, repair = pictures[-1], repair_of(parameters)
    result, errors = tool.run(repair, first), {}
    if result.ok:
        errors = errors_of(list(parameters), pictures, result.image)
    reason = objection(**errors) if result.ok else result.text
    if reason:
        return {"row": source.number, "kind": item.kind, "reason": reason}
    place, question = folder / f"{item.part}-image", source.question
    ori = processed = f"{item.kind}_{source.number}_ori{source.path.suffix}"
    shutil.copyfile(source.path, place / ori)
    if item.kind != "none":
        processed = f"{item.kind}_{source.number}_proc.png"
        picture = pictures[0] if is_crop else first  # the part sought, or what is shown first
        picture.save(place / processed, compress_type=zlib.Z_RLE)  # for photographs smaller, faster
    if is_crop and not source.names_its_box:
        question += (f" This is about the part within {source.box} of the image: left, top, right "
                     "and bottom edge in thousandths of its width and height.")
    return {"id": source.id, "question": question, "answers": source.answers,
            "ori_image_path": ori, "processed_image_path": processed,
            "type": item.kind.split("+"), "split": "simple" if item.kind in SINGLES else "hard",
            "parameters": parameters, "repair": repair, "error": errors}


# ---- all items -----------------------------------------------------------------------------------
def write_parts(folder: Path, items: list[Item], make: Callable[[Item], dict],
                pool: ThreadPoolExecutor) -> dict:
    """Make all items, write the files of both parts, and return the summary that is written too.

    make: `make_item` of an item. Raises ValueError if all items of a part are left out.
    """
    parts = sorted({item.part for item in items}, reverse=True)  # train first
    for part in parts:
        (folder / f"{part}-image").mkdir()
    made = list(tqdm(pool.map(make, items), "make", len(items), unit=" items"))
    kept = [(item, row) for item, row in zip(items, made, strict=True) if "reason" not in row]
    left_out, kinds = [row for row in made if "reason" in row], {}
    for part in parts:
        lines = [json.dumps(row, ensure_ascii=False) for item, row in kept if item.part == part]
        if not lines:
            first = next(row for item, row in zip(items, made) if item.part == part)
            raise ValueError(f"no item is left for {part}.json; in row {first['row']} "
                             f"{first['reason']}; give more rows")
        write_whole(folder / f"{part}.json", "[\n" + ",\n".join(lines) + "\n]\n")
    for kind in (*SINGLES, *PAIRS, "crop"):
        rows = [(item.part, row["error"]) for item, row in kept if item.kind == kind]
        kinds[kind] = {part: sum(row[0] == part for row in rows) for part in parts}
        kinds[kind]["left_out"] = sum(row["kind"] == kind for row in left_out)
        for key in ("degraded", "repaired"):
            kinds[kind][key] = round(fmean(row[1][key] for row in rows), 2) if rows else None
    summary = {"kinds": kinds, "left_out": left_out}
    write_whole(folder / "summary.json", json.dumps(summary, ensure_ascii=False, indent=1) + "\n")
    return summary


def build(rows: Path, out: Path, seed: int, heldout: float, max_pixels: int,
          code_unlocked: bool) -> dict:
    """Read, check and make everything, and return the summary; the flags are those of `main`.

    The folder gets its name when all of it is there. Raises ValueError for what the user can mend.
    """
    beside = Path(f"{out}.tmp")
    for path in (out, beside):
        if path.exists():
            raise ValueError(f"{path} is there already; remove it, or give another -o")
    if not 0 <= heldout < 1 or max_pixels < MIN_SIDE ** 2:
        raise ValueError(f"--heldout {heldout} --max_pixels {max_pixels}: must be from 0 to below "
                         f"1, and at least {MIN_SIDE ** 2}")
    cores = os.cpu_count() or 1
    # Half of the threads wait for the code tool. Its limit is long: what is written must not depend
    # on how busy the machine is.
    with (nothing_left(out.parent), CodeTool(cores, timeout=60.0, unlocked=code_unlocked) as tool,
          ThreadPoolExecutor(2 * cores) as pool):
        beside.mkdir(parents=True)
        try:
            items = assign(read_sources(rows, pool), seed, heldout)
            make = partial(make_item, folder=beside, tool=tool, seed=seed, max_pixels=max_pixels)
            summary = write_parts(beside, items, make, pool)
            beside.rename(out)
        finally:
            pool.shutdown(cancel_futures=True)  # of a build that ends early
            shutil.rmtree(beside, ignore_errors=True)
    return summary


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns 0, or 2 after a line "error: …" for what the user can mend."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.partition("\n")[0])
    parser.add_argument("rows", type=Path, help=".jsonl or .json; images lie beside it")
    parser.add_argument("-o", "--out", type=Path, required=True, help="the folder to make")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn")
    parser.add_argument("--heldout", type=float, default=0.1,
                        help="share of the different pictures that are held out")
    parser.add_argument("--max_pixels", type=int, default=401_408,
                        help="of a degraded picture, as in train.py; crops keep all")
    parser.add_argument("--code_unlocked", type=string_to_bool, default=False,
                        help="True: run the repairs where the kernel cannot lock them in")
    args, start = parser.parse_args(argv), time.perf_counter()
    try:
        summary = build(**vars(args))
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: of the code tool
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"stopped; {args.out} was not made", file=sys.stderr)
        return 130
    for kind, row in summary["kinds"].items():
        print(f"{kind:<26}" + "".join(f"{name} {value!s:<8}" for name, value in row.items()))
    print(f"{args.out}: made in {time.perf_counter() - start:.1f} s; "
          f"{len(summary['left_out'])} rows left out, see summary.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
