"""Evaluate a policy on a benchmark, or score a file of predictions again.

    python evaluate.py --model Qwen/Qwen2.5-VL-7B-Instruct --prompt full --tasks MAT-Search.json --benchmark mat-search
    python evaluate.py --rescore runs/evaluate/predictions.json --benchmark mat-coding
    python evaluate.py --report runs/default

`load_tasks` reads every published layout, and ours, into one form and refuses bad rows before a model is loaded;
`evaluate_tasks` plays each task once, greedily, with live tools; `score` averages over all tasks of a split, unanswered
ones included. Standard output ends with a line of JSON: {"all": {"f1", "em", "n"}, "simple": …, "hard": …}.
Left out on purpose: sampling and votes (greedy decoding draws no random numbers: there is no seed), several GPUs on the
command line (`evaluate_policy`, which training calls, shares its tasks among ranks), and the released evaluation's habit of
replacing the crop box in the model's code by the one in the question.
"""
import fcntl
import json
import math
import os
import re
import shutil
import sys
import tempfile
import time
from base64 import b64encode
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cache, partial
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from statistics import fmean
from typing import Literal

from PIL import Image, ImageOps
from tqdm import tqdm
from transformers import HfArgumentParser

from reward import exact_match, f1_score
from tools import CodeTool, SearchTool

Benchmark = Literal["mat-coding", "mat-search", "2wiki", "hotpotqa", "musique", "bamboogle"]
SIMPLE_FIRST = {"mat-coding": (70, 200), "mat-search": (75, 150)}  # the first n of N tasks are simple, the rest hard
FAMILIES = ("search", "coding")
ANSWER_KEYS = ("answers", "answer", "golden_answers", "gt")  # MAT-Coding, MAT-Search, FlashRAG, MAT's training steps


def load_tasks(path: str | Path, benchmark: str | None = None, image_folder: str | Path | None = None,
               limit: int | None = None) -> list[dict]:
    """Read tasks of any layout: MAT-Search, MAT-Coding, FlashRAG jsonl, MAT's training steps, and ours.

    A task has the keys id, family ("search" or "coding"), question, answers (list of str), image (absolute path, None
    for text only), type (list of str), split (the row's own; or "simple", "hard" by the order of a complete MAT file;
    or "all") and solution (the gold turn of a step, else None). The question of a step is its `problem` with the chain
    so far. Images lie in image_folder, or else beside the file, in its `<stem>-image` or its `<stem>_images`. With a
    benchmark, rows are taken as published: one of MAT-Search has an empty gold, which is refused otherwise. limit keeps
    the first tasks. Raises ValueError "file, row N: reason; way out", with N from 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"--limit {limit} leaves no task; give at least 1")
    rows, near = _read_rows(path), Path(path).with_suffix("")
    folders = [Path(image_folder)] if image_folder else [near.parent, Path(f"{near}-image"), Path(f"{near}_images")]
    check_image = cache(_check_image)  # steps share their images

    def read(row, number):
        task = _task(row, number, folders, blank_allowed=benchmark is not None)
        if task["image"] is not None:
            check_image(task["image"])
        return {**task, "split": _split(row, number, len(rows), benchmark)}

    return _each(path, rows[:limit], read)


def _read_rows(path):
    """The rows of a JSON list, or of a .jsonl file with one object a line."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file; give the path of a .json or .jsonl file")
    data, is_jsonl = Path(path).read_bytes(), Path(path).suffix == ".jsonl"
    parts = data.split(b"\n") if is_jsonl else [data]
    values = [_parse(part, path, line) for line, part in enumerate(parts, start=1) if part.strip()]
    rows = values if is_jsonl or not values else values[0]
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{path}: must be a list of rows, got {str(rows)[:40]}; write [{{…}}], "
                         "or one {…} a line in .jsonl")
    return rows


def _parse(data, path, line):
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, nested too deep
        line += getattr(error, "lineno", 1) - 1
        raise ValueError(f"{path}, line {line}: not JSON ({getattr(error, 'msg', error)}); mend the line") from None


def _each(path, rows, read):
    """[read(row, number)], with the place of a bad row in its error. Ids (or else numbers) must be distinct."""
    results, row_of = [], {}
    for number, row in enumerate(rows, start=1):
        try:
            if not isinstance(row, dict):
                raise ValueError(f"is no object but {type(row).__name__}; write {{\"id\": …}}")
            results.append(read(row, number))
            first = row_of.setdefault(str(row.get("id", number)), number)
            if first != number:
                raise ValueError(f"has the id {row.get('id', number)!r} of row {first}; give every row its own")
        except ValueError as error:
            raise ValueError(f"{path}, row {number}: {error}") from None
    return results


def _split(row, number, num_rows, benchmark):
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
    answers = [] if is_step and not row.get(key) else _golds(row, key, blank_allowed)
    return {"id": row.get("id", number), "family": family, "question": question, "answers": answers,
            "image": _find_image(row, kinds, folders), "type": kinds,
            "solution": _text(row, "solution") if is_step else None}


def _text(row, key):
    if not isinstance(row.get(key), str) or not row[key].strip():
        raise ValueError(f"{key} must be a text, got {row.get(key)!r}; add \"{key}\": \"…\"")
    return row[key]


def _golds(row, key, blank_allowed):
    golds = [row[key]] if isinstance(row.get(key), str) else row.get(key)
    if not isinstance(golds, list) or not golds or not all(isinstance(gold, str) for gold in golds):
        raise ValueError(f"{key} must be one or more texts, got {golds!r}; add \"{key}\": [\"…\"]")
    if not blank_allowed and not all(map(str.strip, golds)):
        raise ValueError(f"{key} has an empty text, {golds!r}; fill it in or remove the row")
    return golds


def _find_image(row, kinds, folders):
    """The path of the input image; MAT-Coding shows the original for a crop, the processed one otherwise."""
    if "golden_answers" in row:
        return None
    key = "ori_image_path" if kinds == ["crop"] else "processed_image_path"
    key = key if key in row else "image_path"
    name = _text(row, key)
    found = [folder / name for folder in folders if (folder / name).is_file()]
    if not found:
        raise ValueError(f"{key} {name!r} is not in {', '.join(map(str, folders))}; put it there or give its folder")
    return str(found[0].resolve())


def _check_image(path):
    """Read an image to its end: a damaged one must not stop a run after hours."""
    try:
        with Image.open(path) as image:
            image.draft(None, (1, 1))  # a JPEG is decoded at an eighth of its size, still to its end
            image.load()
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(f"image {path} cannot be read ({error}); replace it or remove the row") from None


def score(predictions: list[dict], benchmark: str | None = None) -> dict[str, dict[str, float]]:
    """Average F1 and exact match in percent, to the two decimals that the paper prints, and the number of rows n.

    A prediction has `pred_answer` (str, or None for no answer), `gt` (str or list of str) and perhaps `split`. Returns
    {"all": {"f1", "em", "n"}}, and the same for "simple" and "hard" where rows say so or the file is a complete MAT
    benchmark in order. MAT-Coding counts Chinese by characters; all others count words.
    """
    rows = {"all": [], "simple": [], "hard": []}
    for number, row in enumerate(predictions, start=1):
        golds = [row["gt"]] if isinstance(row["gt"], str) else row["gt"]
        figures = [measure(row["pred_answer"], golds, benchmark == "mat-coding") for measure in (f1_score, exact_match)]
        for name in {"all", _split(row, number, len(predictions), benchmark)} & set(rows):
            rows[name].append(figures)
    percent = {name: [round(100 * sum(column) / len(part), 2) for column in zip(*part, strict=True)]
               for name, part in rows.items() if part}
    return {name: {"f1": f1, "em": em, "n": len(rows[name])} for name, (f1, em) in percent.items()}


def rescore(path: str | Path, benchmark: str) -> dict[str, dict[str, float]]:
    """`score` of a file of predictions, .json or .jsonl. Raises ValueError "file, row N: reason; way out"."""
    return score(_each(path, _read_rows(path), _prediction), benchmark)


def _prediction(row, number):
    _golds(row, "gt", blank_allowed=True)
    if not isinstance(row.get("pred_answer", 0), str | None):
        raise ValueError(f"pred_answer must be a text, or null for no answer, got {row.get('pred_answer')!r}; add it")
    return row


def evaluate_tasks(policy, tasks: list[dict], tools, limits, *, benchmark: str | None = None, batch_size: int = 8,
                   prompt: str = "short", output_dir: str | Path | None = None) -> dict[str, dict[str, float]]:
    """Play every task once, greedily, batch_size tasks side by side; returns their `score`.

    policy, tools, limits and prompt are those of `rollout.roll_out`. Into output_dir go predictions.json (a row a task:
    id, gt, pred_answer, split) and scores.json; on standard error it says how episodes ended and how tools fared.
    """
    from rollout import roll_out  # not at the top: torch takes seconds to load, and rescoring does without
    if output_dir:
        Path(output_dir).mkdir(parents=True, exist_ok=True)  # first, so that it fails now and not after hours
    rollouts = []
    for start in tqdm(range(0, len(tasks), batch_size), desc="evaluate", unit="batch"):
        rollouts += roll_out(policy, tasks[start:start + batch_size], tools, limits, temperature=0.0, prompt=prompt)[0]
    rows = [{"id": r.task["id"], "gt": r.task["answers"], "pred_answer": r.answer, "split": r.task["split"]}
            for r in rollouts]
    scores = score(rows, benchmark)
    for name, value in {"predictions.json": rows, "scores.json": scores}.items() if output_dir else ():
        write_whole(Path(output_dir, name), json.dumps(value, ensure_ascii=False, indent=1) + "\n")
    oks = [turn.result.ok for r in rollouts for turn in r.turns if turn.result is not None]
    print(f"episodes ended by {dict(Counter(r.stop for r in rollouts))}; tool calls: {len(oks)}, "
          f"of them failed: {oks.count(False)}", file=sys.stderr)
    return scores


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


def seed_step(seed: int, step: int) -> None:
    """All random numbers of a step on a rank: nothing has to be saved to resume, and ranks differ."""
    import torch
    torch.manual_seed((seed * 100_003 + step) * 1_009 + torch.distributed.get_rank())


def evaluate_policy(policy, tasks: list[dict], tools, step: int, config, reasons: Callable[[], list[str]]) -> bool:
    """Success on held-out tasks as a row of evaluations.jsonl, once a step with the tools on or off; ranks share the tasks.

    A row has shares of exact matches, 0 to 1: {"step", "tools", "success", "n", "by_family", "by_type"}. If any rank has
    `reasons` to end the run, rollouts end early, no row is written, since none is known, and False is returned.
    """
    import torch.distributed as dist

    from model import gather, gathered
    from rollout import roll_out
    label, start = "on" if tools.code or tools.search else "off", time.perf_counter()
    path, limits = Path(config.output_dir) / "evaluations.jsonl", replace(config.limits(), max_turns=config.max_turns)
    if not tasks or any(row["step"] == step and row["tools"] == label for row in read_json_lines(path)):
        return True
    seed_step(config.seed, -1 - step)
    with gathered(policy):
        rollouts, _ = roll_out(policy, tasks[dist.get_rank()::dist.get_world_size()], tools, limits, prompt=config.prompt,
                               temperature=config.eval_temperature, interrupted=lambda: bool(reasons()))
    if gather(reasons()):
        return False
    groups = {"success": {}, "by_family": {}, "by_type": {}}
    for family, kinds, hit in gather([(r.task["family"], r.task["type"], exact_match(r.answer, r.task["answers"]))
                                      for r in rollouts]):
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


def read_json_lines(path: Path) -> list[dict]:
    """The whole rows of a file; a last one without its line end was cut off by a kill."""
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []


def append_json_line(path: Path, row: dict) -> None:
    """Add a row, on the disk when this returns. A number that is not finite becomes null: JSON has no NaN."""
    finite = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in row.items()}
    with open(path, "a") as file:
        print(json.dumps(finite, allow_nan=False), file=file, flush=True)
        os.fsync(file.fileno())


def write_whole(path: Path, text: str) -> None:
    """Write beside and rename: whoever reads the file sees the old text or the new one, never a part."""
    beside = path.with_name(path.name + ".tmp")
    with open(beside, "w", encoding="utf-8") as file:
        print(text, end="", file=file, flush=True)
        os.fsync(file.fileno())
    beside.rename(path)


def publish(beside: Path, final: Path) -> None:
    """Give a folder its final name once all its files are on the disk; one of that name makes way."""
    for path in beside.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    if final.exists():
        shutil.rmtree(final.rename(final.with_name(f"{final.name}.old.tmp")))  # never in parts under its own name
    beside.rename(final)


def take_folder(out: Path) -> None:
    """Raise ValueError if the folder cannot be written, or another run is at it; the first rank's process keeps it locked."""
    try:
        (out / "rollouts").mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out) as file:
            file.write(b"x" * 4096)
        if os.environ.get("RANK", "0") == "0":
            fcntl.flock(os.open(out, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        why = "another process trains there" if isinstance(error, BlockingIOError) else f"it cannot be written ({error})"
        raise ValueError(f"--output_dir {out}: {why}; choose another folder") from None


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


# ---------------------------------------------------------------------------------------------------- a page to look at
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # of all Pillow reads: none that starts a program
IMAGE_SIDE = 320  # pixels, at most, of an image in the page


def write_report(folder: str | Path) -> Path:
    """Write one page about a training run or an evaluation into its folder, as report.html, and return its path.

    The page needs no network. Texts of a model are hostile: they stand in it as JSON that cannot leave its element, are
    only ever shown as text, and the page's policy forbids every request and every script but its own. Raises ValueError
    for a folder of neither kind, and "file, line N: reason; way out" for a damaged file.
    """
    folder, images = Path(folder), {}
    single = {name: next(iter(_read_objects(folder / f"{name}.json")), {}) for name in ("config", "summary", "scores")}
    if (folder / "items.jsonl").is_file():
        kind, parts = "evaluation", [("items", folder / "items")]
    elif (folder / "metrics.jsonl").is_file():
        steps = [path.stem[5:] for path in folder.glob("rollouts/step_*.jsonl")]
        steps = sorted(filter(str.isdecimal, steps), key=int)
        kind, parts = "training", [(int(step), folder / f"rollouts/step_{step}") for step in steps]
    else:
        raise ValueError(f"{folder} has neither metrics.jsonl, as a training run does, nor items.jsonl, as an evaluation does; "
                         "give the --output_dir of one")
    embed = cache(partial(_embed, images))
    data = {"name": folder.resolve().name, "kind": kind, **single,
            "metrics": _read_objects(folder / "metrics.jsonl"), "evaluations": _read_objects(folder / "evaluations.jsonl"),
            "sets": [{"name": name, "rows": _read_rollouts(folder, part, embed)} for name, part in parts],
            "images": list(images)}
    page = (Path(__file__).parent / "data" / "report.html").read_text(encoding="utf-8")
    for tag, text in re.findall(r"<(style|script)>(.*?)</\1>", page, re.DOTALL):
        page = page.replace(f"{{{{{tag}}}}}", f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'")
    text = json.dumps(data, allow_nan=False).replace("<", "\\u003c")  # no tag, no comment; ASCII only: no U+2028
    write_whole(folder / "report.html", page.replace("{{data}}", text))  # last, since the data may hold anything
    return folder / "report.html"


def _read_rollouts(run, folder, embed):
    """Rows of `rollout.rollout_row`, from folder.jsonl, with the places of their images instead of their paths."""
    path = folder.with_suffix(".jsonl")
    rows = _read_objects(path)
    for number, row in enumerate(rows, start=1):
        if not isinstance(row.get("turns"), list) or not all(isinstance(turn, dict) for turn in row["turns"]):
            raise ValueError(f"{path}, line {number}: turns must be a list of objects; mend the line")
        row["image"] = None if row.get("image") in (None, "None") else embed(Path(str(row["image"])))
        for turn in row["turns"]:
            if turn.get("image") is not None:
                turn["image"] = embed(_own_image(run, folder, str(turn["image"])))
    return rows


def _read_objects(path):
    """The objects of a .json or .jsonl file of a run, none without it; a last line without its end is being written."""
    data = path.read_bytes() if path.is_file() else b""
    lines = data.split(b"\n")[:-1] if path.suffix == ".jsonl" else [data] if data else []
    objects = [_parse(line, path, number) for number, line in enumerate(lines, start=1)]
    for number, value in enumerate(objects, start=1):
        if not isinstance(value, dict):
            raise ValueError(f"{path}, line {number}: is no object but {type(value).__name__}; mend the line")
    return objects


def _own_image(run, folder, name):
    """The path of an image that a tool made: a plain name in the folder of its rows (train.py writes the folder's before it).

    None for a name that leads out of the run, by itself or by links.
    """
    name = name.removeprefix(f"{folder.name}/")
    try:
        path = (folder / name).resolve()
        return path if name == Path(name).name and path.is_relative_to(run.resolve()) else None
    except (OSError, RuntimeError, ValueError):  # a name too long, a loop of links, a zero byte
        return None


def _embed(images, path):
    """The place in `images` of the picture at a path, as (data URI, width, height as it was); -1 if there is none to see."""
    try:
        if path is None or not path.is_file():  # reading a pipe would not end
            return -1
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            picture = ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError):
        return -1
    size, uris = picture.size, []
    picture.thumbnail((IMAGE_SIDE, IMAGE_SIDE))
    for kind in ("png", "jpeg"):
        picture.save(file := BytesIO(), kind, quality=90, compress_level=3)
        uris.append(f"data:image/{kind};base64,{b64encode(file.getvalue()).decode()}")
    return images.setdefault((min(uris, key=len), *size), len(images))


def _option(default, text):
    return field(default=default, metadata={"help": text})


@dataclass
class Arguments:
    """The command line."""
    model: str | None = _option(None, "hub name or folder of a Qwen2.5-VL")
    tasks: str | None = _option(None, "tasks to evaluate on, .json or .jsonl")
    benchmark: Benchmark | None = _option(None, "the published benchmark that the file is; sets splits and scoring")
    image_folder: str | None = _option(None, "folder of the images, if not beside the tasks")
    output_dir: str = _option("runs/evaluate", "folder for predictions.json and scores.json")
    rescore: str | None = _option(None, "only score this file of predictions; needs --benchmark, no model")
    report: str | None = _option(None, "only write RUN/report.html for the folder of a training run or an evaluation; no model")
    limit: int | None = _option(None, "number of tasks to take from the start of the file")
    max_turns: int = _option(5, "turns an episode")
    max_new_tokens: int = _option(1024, "new tokens a turn; the paper's search evaluation takes 2048")
    max_tokens: int = _option(8192, "tokens an episode: prompt, actions and observations")
    batch_size: int = _option(8, "tasks played side by side")
    prompt: Literal["short", "full"] = _option("short", "instructions: short for the laptop model, full for hub models")
    corpus: str = _option("sqlite:data/offline/corpus.sqlite", "search: sqlite:INDEX, http://HOST:PORT/retrieve or serper")
    topk: int = _option(3, "passages a search returns")
    search_pages: int = _option(0, "pages of the first results that are read too (serper)")
    search_cache: str = _option("runs/search_cache.sqlite", "answers from the network, kept for all runs; empty: none")
    search_budget: int = _option(0, "searches sent over the network, after which the tool fails; 0: no end")
    code_unlocked: bool = _option(False, "run model-written code in plain child processes where the kernel cannot lock it in")
    tools: Literal["on", "off"] = _option("on", "off: every call is answered that the tool is switched off")


def _run(args):
    """Read the tasks, which fails early, then load the rest and play them."""
    if not args.model or not args.tasks or args.batch_size < 1:
        raise ValueError("give --model, --tasks and a --batch_size of at least 1; or --rescore FILE --benchmark NAME")
    tasks = load_tasks(args.tasks, args.benchmark, args.image_folder, args.limit)
    from model import load_policy  # here for the reason given in evaluate_tasks
    from rollout import Limits, Tools
    limits = Limits(max_turns=args.max_turns, max_new_tokens=args.max_new_tokens, max_tokens=args.max_tokens)
    search = SearchTool(args.corpus, args.topk, pages=args.search_pages, cache=args.search_cache,
                        budget=args.search_budget or None) if args.tools == "on" else None
    with CodeTool(unlocked=args.code_unlocked) if args.tools == "on" else nullcontext() as code:
        return evaluate_tasks(load_policy(args.model), tasks, Tools(code, search), limits, benchmark=args.benchmark,
                              batch_size=args.batch_size, prompt=args.prompt, output_dir=args.output_dir)


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns 0, or 2 after a line "error: …" on standard error for what the user can mend."""
    parser = HfArgumentParser(Arguments, description=__doc__.partition("\n")[0])
    try:
        args, = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
        if args.report:
            print(write_report(args.report))
            return 0
        if args.rescore and not args.benchmark:
            raise ValueError("--rescore needs --benchmark, as benchmarks score differently; add --benchmark NAME")
        scores = rescore(args.rescore, args.benchmark) if args.rescore else _run(args)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{'split':<7}{'F1 %':>8}{'EM %':>8}{'n':>7}")
    for name, part in scores.items():
        print(f"{name:<7}{part['f1']:>8.2f}{part['em']:>8.2f}{part['n']:>7}")
    print(json.dumps(scores))
    return 0


if __name__ == "__main__":
    sys.exit(main())
