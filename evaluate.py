"""Evaluate a policy, or any model behind an endpoint, on a benchmark; score and compare.

    python evaluate.py --model Qwen/Qwen2.5-VL-7B-Instruct --prompt full \
        --benchmark mat-search --data MAT-Search.json
    python evaluate.py --api http://HOST:PORT/v1 --model NAME ...   # OpenAI's protocol, same scores
    python evaluate.py --ask direct ...                    # or cot, rag: one turn without tools
    python evaluate.py --rescore predictions.json --benchmark mat-coding
    python evaluate.py --compare A/predictions.json B/predictions.json --benchmark mat-coding
    python evaluate.py --report runs/default               # one page, of a training run too

From top to bottom: scores over all items of a split, with 95 % intervals; ways of asking, and
playing every task; the command line. Standard output ends with a line of JSON: {"all": {"f1", "em",
"n", …}, "simple": …}. A model behind an endpoint (--api) is asked by data/endpoint.py.
Left out on purpose: votes over samples, models as judges, prices.
"""
import json
import os
import re
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Literal

import numpy as np
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from data.endpoint import ApiFailed, ApiRefused, ChatModel
from data.files import (append_json_line, append_rows, drop_cut_row, each_row, holds, nothing_left,
                        parse_json, read_json_lines, read_rows, take_folder, write_whole)
from data.flags import fail, flag, parse_flags
from data.report import write_report
from data.tasks import Benchmark, describe, load_tasks, read_golds, split_of
from reward import grade
from tools import CodeTool, SearchTool, Tools

if TYPE_CHECKING:  # these load torch, which takes seconds, and scoring does without
    from model import Policy
    from rollout import Limits, Rollout

# ---- scores --------------------------------------------------------------------------------------
SPLITS = ("all", "simple", "hard", "coding", "search")  # with figures of their own
RESAMPLES = 2_000  # of a bootstrap


def score(predictions: list[dict], benchmark: str | None = None) -> dict[str, dict]:
    """Average F1 and exact match in percent, to the paper's two decimals, and the number of rows.

    A prediction has `pred_answer` (str, or None for no answer), `gt` (str or list of str) and
    perhaps `split`, and `error` if its task failed, which counts as no answer. Returns {"all":
    {"f1", "em", "n", "f1_95", "em_95"}}, and the same for "simple" and "hard", or "coding" and
    "search", where rows say so or the file is a complete MAT benchmark in order. MAT-Coding counts
    Chinese by characters; all others count words.

    f1_95 and em_95 are [low, high], 95 % percentile bootstrap intervals over items. Rows with the
    same id are samples of one item. All this is the released rule. Where its defects, once mended
    (see `reward.grade`), change the figures of a split, the mended ones stand under "fair".
    """
    return _averages(_grades(predictions, benchmark), predictions, benchmark)


def rescore(path: str | Path, benchmark: str) -> dict[str, dict]:
    """`score` of a .json or .jsonl file of predictions. ValueError "file, row N: reason; …"."""
    return score(_read_predictions(path), benchmark)


def compare(path_a: str | Path, path_b: str | Path, benchmark: str) -> dict[str, dict]:
    """B - A of two files of predictions: as `score`, but each figure is a paired difference.

    An interval without 0 says that B is better, or worse, on such items. Raises ValueError as
    `rescore` does, and if the files differ in their number of rows, or in a row's gt or id.
    """
    rows_a, rows_b = _read_predictions(path_a), _read_predictions(path_b)
    way_out = "compare predictions of the same items in one order"
    for number, (a, b) in enumerate(zip(rows_a, rows_b), start=1):
        for key in a.keys() & b.keys() & {"id", "gt"}:
            if _as_list(a[key]) != _as_list(b[key]):
                raise ValueError(f"row {number}: {key} is {a[key]!r} in {path_a} "
                                 f"and {b[key]!r} in {path_b}; {way_out}")
    if len(rows_a) != len(rows_b):
        raise ValueError(f"{path_a} has {len(rows_a)} rows and {path_b} {len(rows_b)}; {way_out}")
    both = [b | a for a, b in zip(rows_a, rows_b)]  # the split may stand in one of them only
    return _averages(_grades(rows_b, benchmark) - _grades(rows_a, benchmark), both, benchmark)


def _read_predictions(path: str | Path) -> list[dict]:
    def check(row: dict, number: int) -> dict:
        read_golds(row, "gt", blank_allowed=True)
        split_of(row, number, 0, None)
        answer = row.get("pred_answer", 0)
        if not row.get("error") and not isinstance(answer, str | None):
            raise ValueError("pred_answer must be a text, or null for no answer, "
                             f"got {row.get('pred_answer')!r}; add it")
        return row
    return each_row(path, read_rows(path), check)


def _as_list(value: object) -> list:
    return value if isinstance(value, list) else [value]


def _grades(predictions: list[dict], benchmark: str | None) -> np.ndarray:
    """(rows, 4) float: F1 and exact match by the released rule, then both by the fair one."""
    is_chinese, grades = benchmark == "mat-coding", []
    for row in predictions:
        answer, golds = None if row.get("error") else row["pred_answer"], _as_list(row["gt"])
        grades.append([*grade(answer, golds, is_chinese, fair=False),
                       *grade(answer, golds, is_chinese, fair=True)])
    return np.array(grades)


def _averages(grades: np.ndarray, rows: list[dict], benchmark: str | None) -> dict[str, dict]:
    """What `score` returns, of (rows, 4) grades or differences of grades."""
    splits, items = [], []
    for number, row in enumerate(rows, start=1):
        splits.append(split_of(row, number, len(rows), benchmark))
        items.append(f"row {number}" if row.get("id") is None else str(row["id"]))
    scores, fair_scores, items = {}, {}, np.array(items)
    for name in SPLITS:
        chosen = [name in ("all", split) for split in splits]
        if any(chosen):
            scores[name], fair = _average(grades[chosen], items[chosen])
            if fair != scores[name]:
                fair_scores[name] = fair
    return scores | ({"fair": fair_scores} if fair_scores else {})


def _average(grades: np.ndarray, items: np.ndarray) -> list[dict]:
    """[figures by the released rule, by the fair one]: means in percent, intervals over items."""
    names, item_of = np.unique(items, return_inverse=True)
    rng, means = np.random.default_rng(0), []
    for _ in range(RESAMPLES):
        drawn = rng.integers(len(names), size=len(names))
        weights = np.bincount(drawn, minlength=len(names))[item_of]  # times each row was drawn
        means.append(weights @ grades / weights.sum())
    intervals = np.percentile(means, [2.5, 97.5], axis=0)  # (2, 4)
    columns = np.round(100 * np.stack([grades.mean(axis=0), *intervals]), 2).T.tolist()
    return [{"f1": f1, "em": em, "n": len(grades), "f1_95": f1_95, "em_95": em_95}
            for (f1, *f1_95), (em, *em_95) in (columns[:2], columns[2:])]


# ---- ways of asking, and playing -----------------------------------------------------------------
ASKED = {  # behind the question where no tools are offered; "direct" has the paper's words
    "direct": "\nAnswer the question directly. The answer should be very brief.",
    "cot": "\nThink step by step between <think> and </think>. Then answer as briefly as possible: "
           "<answer> answer </answer>",
    "rag": "\nAnswer the question directly with the help of the information. "
           "The answer should be very brief."}
ANSWER_ONLY = " Only return the answer."  # the paper's words where there is no image
BOX = re.compile(r"\[\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*\]")  # in thousandths
SLICE = re.compile(r"\[[^\[\]:]*:[^\[\]:,]*,[^\[\]:]*:[^\[\]:,]*\]")  # of an array: rows, columns
Key = tuple[int, int]  # of an item: the place of its task, and of the sample


@dataclass(frozen=True)
class Settings:
    """How tasks are played, and where the results go."""
    policy: "Policy"  # with `chat` its tokenizer and image processor alone are used
    tools: Tools
    limits: "Limits"
    output_dir: Path
    benchmark: str | None = None  # sets scoring and splits, as in `score`
    batch_size: int = 8  # tasks side by side
    prompt: str = "short"  # the instructions, as in `rollout.roll_out`
    ask: str = "agent"  # with the tools; "direct", "cot", "rag": one turn without any
    samples: int = 1  # of each task
    temperature: float = 0.0  # 0: greedy
    seed: int = 0
    chat: ChatModel | None = None  # writes the turns in the policy's place


def evaluate_tasks(policy: "Policy", tasks: list[dict], tools: Tools, limits: "Limits",
                   output_dir: str | Path, **options) -> dict[str, dict]:
    """Play every task, and return what `summarize` says of the items. options: see `Settings`.

    Into output_dir go items.jsonl (a row an item, as they come; with images in items/),
    predictions.json in the released format, and scores.json. Called again it goes on where it was
    stopped, and comes to the same files: random numbers come from the seed and a batch's place.
    Processes of torchrun share the batches; the first one waits for all, the others return nothing.
    An item that fails is a row with its error. Raises ApiRefused if the endpoint answers nothing;
    the items under way are left undone. Raises ValueError if every item has failed.
    """
    settings = Settings(policy, tools, limits, Path(output_dir), **options)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    done, places = _played_before(settings.output_dir, tasks), range(len(tasks))
    batches = [places[start:start + settings.batch_size] for start in places[::settings.batch_size]]
    for batch in tqdm(batches[rank::world], "evaluate", unit=" batches", disable=rank > 0):
        if not done.keys() >= set(_keys(batch, settings.samples)):
            _play_batch(settings, tasks, batch)
    return _finish(settings, _keys(places, settings.samples)) if rank == 0 else {}


def _keys(places: range, samples: int) -> list[Key]:
    return [(place, sample) for place in places for sample in range(samples)]


def read_items(out: Path) -> dict[Key, dict]:
    """The rows of items.jsonl. ValueError for a row of something else."""
    path, needed = out / "items.jsonl", {"number", "sample", "id", "gt", "pred_answer", "error"}
    rows = read_json_lines(path)
    for line, row in enumerate(rows, start=1):
        if not isinstance(row, dict) or not row.keys() >= needed:
            raise ValueError(f"{path}, line {line}: not the row of an item; delete the line")
    return {(row["number"], row["sample"]): row for row in rows}


def _played_before(out: Path, tasks: list[dict]) -> dict[Key, dict]:
    """The rows of an earlier start. ValueError if they are of other tasks."""
    drop_cut_row(out / "items.jsonl")
    done = read_items(out)
    for (place, _), row in done.items():
        if place >= len(tasks):  # of a start with a larger --limit
            continue
        task = tasks[place]
        if (row["id"], row["gt"]) != (task["id"], task["answers"]):
            raise ValueError(f"{out / 'items.jsonl'}: item {place} is {row['id']!r} and not "
                             f"{task['id']!r}: the tasks have changed; choose another --output_dir")
    return done


def _finish(settings: Settings, wanted: list[Key]) -> dict[str, dict]:
    """Wait for the other ranks, write what an evaluation leaves, and return the scores of the
    wanted rows. Others, of a start with a larger --limit, stay in items.jsonl."""
    out = settings.output_dir
    while not (done := read_items(out)).keys() >= set(wanted):
        time.sleep(2)
    write_whole(out / "items.jsonl", "".join(json.dumps(done[key]) + "\n" for key in sorted(done)))
    rows = [done[key] for key in wanted]
    if all(row["error"] for row in rows):
        raise ValueError("every item failed, so there are no scores; the first with: "
                         f"{rows[0]['error']}; to play items again, delete their rows in "
                         f"{out / 'items.jsonl'}")
    scores = summarize(rows, settings.benchmark)
    kept = ("id", "gt", "pred_answer", "split", "sample", "error")
    predictions = [{key: row[key] for key in kept} for row in rows]
    for name, value in {"predictions.json": predictions, "scores.json": scores}.items():
        write_whole(out / name, json.dumps(value, ensure_ascii=False, indent=1) + "\n")
    return scores


def _play_batch(settings: Settings, tasks: list[dict], batch: range) -> None:
    """Play the tasks in these places, and add their rows to items.jsonl."""
    from rollout import rollout_row
    out, tools, chat = settings.output_dir, settings.tools, settings.chat
    played = _play(settings, _asked(settings, [tasks[place] for place in batch]),
                   seed=settings.seed * 1_000_003 + batch[0])
    if tools.search and tools.search.spent:
        raise ValueError("--search_budget is spent; the same command goes on, with the items that "
                         "were under way")
    rows, keys = [], _keys(batch, settings.samples)
    for (place, sample), (rollout, error) in zip(keys, played, strict=True):
        task, answer = tasks[place], None if error else _answer(rollout, settings.ask)
        f1, em = grade(answer, task["answers"], settings.benchmark == "mat-coding", fair=False)
        row = rollout_row(rollout, out / "items", f"{place}-{sample}")
        row |= {name: task[name] for name in ("question", "family", "type", "split")}
        row |= {"number": place, "sample": sample, "gt": task["answers"], "pred_answer": answer,
                "f1": f1, "em": em, "error": error}
        if found := rollout.task.get("found"):
            row["retrieved"] = {"ok": found.ok, "error": found.error,
                                "seconds": round(found.seconds, 4)}
        rows.append(row)
    append_rows(out / "items.jsonl", rows)
    if chat and chat.unanswered > 1 and all(row["error"] for row in rows):
        raise ApiRefused(f"{chat.url} answers a short prompt, but no item in time "
                         f"({rows[-1]['error']}); check the server and --api_timeout; "
                         "the same command goes on behind these items")


def _asked(settings: Settings, tasks: list[dict]) -> list[dict]:
    """The tasks with all that the prompt says in their question; a search's result as "found"."""
    if settings.ask == "agent":
        return tasks
    found = [None] * len(tasks)
    if settings.ask == "rag":
        found = settings.tools.search.search_many([task["question"] for task in tasks])
    items = []
    for task, result in zip(tasks, found, strict=True):
        question = task["question"] + ASKED[settings.ask]
        if task["image"] is None:
            question += ANSWER_ONLY
        if result:
            question = f"<information> {result.text} </information>\n{question}"
        items.append({**task, "question": question, "found": result})
    return items


def _play(settings: Settings, items: list[dict], seed: int) -> list[tuple["Rollout", str | None]]:
    """(rollout, error or None) of every sample of every item. If the items fail as a whole, they
    are played one by one."""
    import torch  # not at the top, where it would cost scoring some seconds

    from rollout import Rollout, roll_out
    limits, prompt = settings.limits, settings.prompt
    if settings.ask != "agent":
        limits, prompt = replace(limits, max_turns=1), "short"  # a tool call ends the only turn
    rows = settings.batch_size * settings.samples
    limits = replace(limits, batch_tokens=rows * limits.max_tokens)
    waiting, played = [items], []
    while waiting:
        group, errors = waiting.pop(0), {}
        torch.manual_seed(seed)
        try:
            rollouts, _ = roll_out(settings.policy, group, settings.tools, limits, prompt=prompt,
                                   group_size=settings.samples, temperature=settings.temperature,
                                   sampler=settings.chat and partial(_ask, settings, errors))
            played += [(rollout, errors.get(id(rollout))) for rollout in rollouts]
        except ApiRefused:
            raise
        except Exception as error:  # of any kind: one item must not end a run of thousands
            if len(group) > 1:
                waiting = [[item] for item in group]
            else:
                failed = Rollout(group[0], [], [], [])
                played += [(failed, f"{type(error).__name__}: {error}")] * settings.samples
    return played


def _ask(settings: Settings, errors: dict[int, str], live: list["Rollout"]
         ) -> list[tuple[list[int], list[float]]]:
    """A `rollout.Sampler` whose turns the endpoint writes, for all live rollouts at a time. One
    that fails ends; `errors` gets the reason under the id() of the object."""
    from model import encode_text
    with ThreadPoolExecutor(len(live)) as pool:
        replies = [pool.submit(settings.chat.reply, rollout) for rollout in live]
    turns = []
    for rollout, reply in zip(live, replies, strict=True):
        try:
            text, is_whole = reply.result()
        except ApiFailed as error:
            text, is_whole, errors[id(rollout)] = "", False, str(error)
        ids = encode_text(settings.policy, text) + [settings.policy.end_id] * is_whole
        turns.append((ids, [0.0] * len(ids)))
    return turns


def _answer(rollout: "Rollout", ask: str) -> str | None:
    """The answer in its tags. Without tools the tags are optional, and the answer may be all that
    stands after the thought. A turn that was cut off gives none."""
    if ask == "agent" or rollout.answer is not None or rollout.stop == "length":
        return rollout.answer
    return rollout.turns[0].text.rpartition("</think>")[2].strip() or None


def summarize(items: list[dict], benchmark: str | None) -> dict[str, dict]:
    """`score` of rows of items.jsonl, and beside it

    failed   the number of items that failed
    stops    how the episodes ended
    tools    turns an item, calls, errors by kind, seconds
    samples  with several samples an item, mean and standard deviation over the samples' figures
    """
    calls = [call for row in items for call in (*row["turns"], row.get("retrieved", {}))
             if "ok" in call]
    tools = {"turns": round(fmean(len(row["turns"]) for row in items), 2), "calls": len(calls),
             "errors": dict(Counter(call["error"] for call in calls if not call["ok"])),
             "seconds": round(sum(call["seconds"] for call in calls), 1)}
    stops = Counter("failed" if row["error"] else row["stop"] for row in items)
    scores = score(items, benchmark)
    scores |= {"tools": tools, "stops": dict(stops), "failed": stops["failed"]}
    if last := max(row["sample"] for row in items):
        scores["samples"] = {}
        for key in ("f1", "em"):
            means = [100 * fmean(row[key] for row in items if row["sample"] == k)
                     for k in range(last + 1)]
            scores["samples"][key] = {"mean": round(fmean(means), 2), "std": round(stdev(means), 2)}
    return scores


def released_crop(code: str, task: dict, size: tuple[int, int]) -> str:
    """The model's code as the released evaluation runs it, to compare figures with its.

    Where the question is about a part of the image, every slice of an array gives way to the box of
    the question, [x_min, y_min, x_max, y_max] in thousandths of the (width, height).
    """
    if task["type"] != ["crop"] or not (box := BOX.search(task["question"])):
        return code
    corners = zip(box.groups(), size * 2, strict=True)
    x_min, y_min, x_max, y_max = (int(value) * side // 1000 for value, side in corners)
    return SLICE.sub(f"[{y_min}:{y_max}, {x_min}:{x_max}]", code)


# ---- command line --------------------------------------------------------------------------------
@dataclass
class Arguments:
    """The command line."""
    model: str | None = flag(None, "hub name or folder of a Qwen2.5-VL; with --api its name there")
    api: str | None = flag(None, "address of an OpenAI-compatible endpoint, as "
                                 "http://HOST:PORT/v1; key in OPENAI_API_KEY")
    tasks: str | None = flag(None, "tasks to evaluate on, .json or .jsonl; data/prepare.py "
                                   "writes them", aliases=["--data"])
    benchmark: Benchmark | None = flag(None, "the published benchmark that the file is; sets "
                                             "splits and scoring")
    image_folder: str | None = flag(None, "folder of the images, if not beside the tasks")
    ask: Literal["agent", "direct", "cot", "rag"] = flag(
        "agent", "agent: with tools; others: one turn, rag after a search")
    output_dir: str = flag("runs/evaluate", "folder for items, predictions and scores; what was "
                                            "begun there goes on")
    rescore: str | None = flag(None, "only score this file of predictions; needs --benchmark")
    compare: list[str] | None = flag(None, "only compare two files of predictions, A and B: "
                                           "B - A; needs --benchmark")
    report: str | None = flag(None, "only write RUN/report.html for the folder of a training run "
                                    "or an evaluation")
    limit: int | None = flag(None, "number of tasks to take from the start of the file")
    samples: int = flag(1, "of each task; above 1 give a --temperature")
    temperature: float = flag(0.0, "of sampling; 0: greedy")
    seed: int = flag(0, "of sampling")
    max_turns: int = flag(5, "turns an episode")
    max_new_tokens: int = flag(1024, "new tokens a turn; the paper's search evaluation takes 2048")
    max_tokens: int = flag(8192, "tokens an episode: prompt, actions, observations; with --api its "
                                 "own limit holds")
    max_observation_tokens: int = flag(1024, "of a tool's text; longer ones are cut")
    max_images: int = flag(6, "images in the context of an episode")
    min_pixels: int = flag(56 * 56, "of an image after resizing; best as in training")
    max_pixels: int = flag(401_408, "of an image after resizing; best as in training")
    batch_size: int = flag(8, "tasks played side by side; with --api requests at a time")
    prompt: Literal["short", "full"] = flag(
        "short", "instructions: short for the laptop model, full for hub models")
    api_timeout: float = flag(300.0, "seconds a request may take")
    api_patience: float = flag(600.0, "seconds a turn may take, asking again included")
    corpus: str = flag("sqlite:data/offline/corpus.sqlite",
                       "search: sqlite:INDEX, http://HOST:PORT/retrieve or serper")
    topk: int = flag(3, "passages a search returns")
    search_pages: int = flag(0, "pages of the first results that are read too (serper)")
    search_cache: str = flag("runs/search_cache.sqlite",
                             "answers from the network, kept for all runs; empty: none")
    search_budget: int = flag(0, "searches sent over the network, after which the evaluation "
                                 "stops; 0: no end")
    code_timeout: float = flag(5.0, "seconds a code call may take; best as in training")
    code_reads: Literal["first", "newest"] = flag(
        "first", "the picture that code reads: the task's own, or the newest; best as in training")
    code_unlocked: bool = flag(False, "run model-written code in plain child processes where the "
                                      "kernel cannot lock it in")
    tools: Literal["on", "off"] = flag(
        "on", "off: every call is answered that the tool is switched off")
    released_crop: bool = flag(False, "as the released code: the question's crop box replaces the "
                                      "one in the model's code")
    released_context: bool = flag(False, "as the released code: one user turn, the chain pasted "
                                         "as text, the image replaced")


MAY_CHANGE = {"output_dir", "limit", "api", "api_timeout", "api_patience", "search_cache",
              "search_budget"}  # from one start to the next of an evaluation


def _check_flags(args: Arguments) -> None:
    """ValueError for flags that cannot work, alone or together."""
    if not args.model or not args.tasks:
        raise ValueError("give --model and --tasks; or --rescore FILE --benchmark NAME")
    for name in ("batch_size", "max_turns", "max_new_tokens", "max_tokens", "samples",
                 "max_observation_tokens", "max_images", "min_pixels", "api_timeout",
                 "api_patience", "code_timeout"):
        if not getattr(args, name) >= 1:  # NaN too
            raise ValueError(f"--{name} {getattr(args, name)}: must be at least 1")
    if not 0 <= args.temperature <= 1e6:
        raise ValueError(f"--temperature {args.temperature}: must be from 0 to 1e6")
    if not 0 <= args.seed < 2**32:
        raise ValueError(f"--seed {args.seed}: must be at least 0 and below 2^32")
    if args.samples > 1 and args.temperature == 0:
        raise ValueError(f"--samples {args.samples} --temperature {args.temperature}: samples of a "
                         "greedy policy are all the same; give --temperature 1")
    if (args.released_context or args.released_crop) and args.code_reads == "newest":
        raise ValueError("the released ways know the task's image alone; leave out --code_reads "
                         "newest")
    if args.api and (args.released_context or int(os.environ.get("WORLD_SIZE", 1)) > 1):
        raise ValueError("--api takes one process, with a larger --batch_size, and no "
                         "--released_context")


def _check_folder(out: Path, flags: dict) -> None:
    """ValueError if a folder holds anything but an evaluation with the same flags."""
    what = holds(out)
    if what == "a training run":
        raise ValueError(f"--output_dir {out} holds {what}; choose another folder; to evaluate "
                         f"what it trained give --model {out / 'model'}")
    if what not in ("", "an evaluation"):
        raise ValueError(f"--output_dir {out} holds {what}; choose another folder")
    path, before = out / "config.json", flags
    if what:
        before = parse_json(path.read_bytes(), path, 1) if path.exists() else None
    if not isinstance(before, dict):
        raise ValueError(f"--output_dir {out} holds an evaluation without its flags (config.json); "
                         "choose another folder")
    changed = [name for name in sorted(flags.keys() - MAY_CHANGE)
               if before.get(name) != flags[name]]
    if changed:
        raise ValueError(f"--output_dir {out} holds an evaluation with other flags "
                         f"({', '.join(changed)}); give the same ones to go on, or choose another "
                         "folder")


def _run(args: Arguments) -> dict[str, dict]:
    """Check the flags and all that they name, which fails early; then load the model and play."""
    _check_flags(args)
    out, is_first = Path(args.output_dir), os.environ.get("RANK", "0") == "0"
    tasks = load_tasks(args.tasks, args.benchmark, args.image_folder, args.limit, mode="episode")
    chat = search = None
    if args.api:
        chat = ChatModel(args.api, args.model, args.max_new_tokens, args.temperature,
                         timeout=args.api_timeout, patience=args.api_patience)
    if args.tools == "on" or args.ask == "rag":
        search = SearchTool(args.corpus, args.topk, pages=args.search_pages,
                            cache=args.search_cache, budget=args.search_budget)
    if search and is_first:
        search.check()
    _check_folder(out, asdict(args))
    try:
        code = nullcontext()
        if args.tools == "on":
            code = CodeTool(timeout=args.code_timeout, unlocked=args.code_unlocked)
    except RuntimeError as error:  # this kernel cannot lock the tool's processes in
        raise ValueError(error) from error
    with code as code:
        if chat:
            chat.check()
        take_folder(out)
        if is_first:
            print(f"{args.tasks}: {describe(tasks)}", file=sys.stderr)
        scores = _load_and_play(args, tasks, code, search, chat)
    if scores:
        print(f"episodes ended by {scores['stops']}; items that failed: {scores['failed']}; "
              f"tools: {scores['tools']}; see {out}", file=sys.stderr)
    return scores


def _load_and_play(args: Arguments, tasks: list[dict], code: CodeTool | None,
                   search: SearchTool | None, chat: ChatModel | None) -> dict[str, dict]:
    from model import load_policy
    from rollout import Limits
    out, model = Path(args.output_dir), args.model
    limits = Limits(max_turns=args.max_turns, max_new_tokens=args.max_new_tokens,
                    max_tokens=args.max_tokens, max_observation_tokens=args.max_observation_tokens,
                    max_images=args.max_images, released_context=args.released_context)
    if chat:  # the laptop model's tokenizer splits texts; the endpoint counts its own tokens
        limits = replace(limits, max_tokens=10 ** 9, max_observation_tokens=10 ** 9)
        model = str(Path(__file__).parent / "data/model")
        disable_progress_bar()  # of weights that are not used
    policy = load_policy(model, min_pixels=args.min_pixels, max_pixels=args.max_pixels)
    if os.environ.get("RANK", "0") == "0":
        write_whole(out / "config.json", json.dumps(asdict(args), indent=1) + "\n")
    tools = Tools(code, search, released_crop if args.released_crop else None,
                  newest=args.code_reads == "newest")
    try:
        return evaluate_tasks(policy, tasks, tools, limits, out, benchmark=args.benchmark,
                              batch_size=args.batch_size, prompt=args.prompt, ask=args.ask,
                              samples=args.samples, temperature=args.temperature, seed=args.seed,
                              chat=chat)
    finally:
        if chat:
            usage = {**chat.usage, **chat.parameters}
            append_json_line(out / "usage.jsonl", usage)  # a row a start, as each is paid for
            print(f"used by this start: {usage}", file=sys.stderr)


def _table(scores: dict[str, dict], sign: str) -> str:
    """A line a split, those of the fair rule last. sign: "+" for differences."""
    fair = {f"fair {name}": part for name, part in scores.get("fair", {}).items()}
    lines = [f"{'split':<12}{'F1 %':>9}{'95 %':>18}{'EM %':>9}{'95 %':>18}{'n':>8}"]
    for name, part in {**scores, **fair}.items():
        if name.removeprefix("fair ") in SPLITS:
            line = f"{name:<12}"
            for key in ("f1", "em"):
                low, high = part[f"{key}_95"]
                line += f"{part[key]:{sign}9.2f}{low:{sign}9.2f},{high:{sign}8.2f}"
            lines.append(f"{line}{part['n']:>8}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns 0, or 2 after a line "error: …" on standard error for what the user
    can mend. It returns 2 and prints no scores where every item failed."""
    try:
        args = parse_flags(Arguments, __doc__.partition("\n")[0], argv)
        if args.report:
            print(write_report(args.report))
            return 0
        if (args.rescore or args.compare) and not args.benchmark:
            raise ValueError("--rescore and --compare need --benchmark, as benchmarks score "
                             "differently; add --benchmark NAME")
        if args.compare and len(args.compare) != 2:
            raise ValueError(f"--compare takes two files, got {len(args.compare)}; "
                             "write --compare A.json B.json")
        if args.compare:
            scores = compare(*args.compare, args.benchmark)
        elif args.rescore:
            scores = rescore(args.rescore, args.benchmark)
        else:
            with nothing_left(Path(args.output_dir)):
                scores = _run(args)
    except (OSError, ValueError) as error:
        return fail(error)
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    if scores:  # the first rank's
        print(_table(scores, "+" if args.compare else ""))
        print(json.dumps(scores))
    return 0


if __name__ == "__main__":
    sys.exit(main())
