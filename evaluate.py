"""Evaluate a policy, or any model behind an endpoint, on a benchmark; score, compare and look at what came out.

    python evaluate.py --model Qwen/Qwen2.5-VL-7B-Instruct --prompt full --benchmark mat-search --data MAT-Search.json
    python evaluate.py --api http://HOST:PORT/v1 --model NAME --prompt full ...      # OpenAI's protocol; the same tools, scores
    python evaluate.py --ask direct ...                                              # or cot, rag: one turn without tools
    python evaluate.py --rescore predictions.json --benchmark mat-coding
    python evaluate.py --compare A/predictions.json B/predictions.json --benchmark mat-coding
    python evaluate.py --report runs/default                                         # one page, of a training run too

From top to bottom: `score` averages over all items of a split, unanswered ones included, with 95 % intervals; `ChatModel` is
a model behind an endpoint; `evaluate_tasks` plays every task and goes on where it was stopped; then the command line.
Standard output ends with a line of JSON: {"all": {"f1", "em", "n", …}, "simple": …}.
Left out on purpose: votes over samples, judges that are models.
"""
import fcntl
import json
import os
import random
import re
import sys
import threading
import time
from base64 import b64encode
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from io import BytesIO
from itertools import count
from pathlib import Path
from statistics import fmean, stdev
from typing import Literal

import numpy as np
from tqdm import tqdm

from data.files import append_json_line, each_row, holds, nothing_left, parse_json, read_rows, take_folder, write_whole
from data.flags import fail, flag, parse_flags
from data.report import write_report
from data.tasks import Benchmark, describe, load_tasks, read_golds, split_of
from reward import grade
from tools import CodeTool, RequestFailed, SearchTool, fetch, parse_action, split_address

SPLITS = ("all", "simple", "hard", "coding", "search")  # with figures of their own; the last two are those of offline tasks
RESAMPLES = 4_000  # of a bootstrap


def score(predictions: list[dict], benchmark: str | None = None) -> dict[str, dict]:
    """Average F1 and exact match in percent, to the two decimals that the paper prints, and the number of rows n.

    A prediction has `pred_answer` (str, or None for no answer), `gt` (str or list of str) and perhaps `split`, and `error`
    if its task failed, which is no answer. Returns {"all": {"f1", "em", "n", "f1_95", "em_95"}}, and the same for "simple"
    and "hard", or "coding" and "search", where rows say so or the file is a complete MAT benchmark in order. MAT-Coding
    counts Chinese by characters; all others count words. f1_95 and em_95 are [low, high], 95 % percentile bootstrap
    intervals over items, that is over ids where rows have one. All this is the released rule; what differs when its
    defects are mended (see `reward.grade`) stands under "fair": {"all": …, …}, which is absent where nothing does.
    """
    figures = (_grades(predictions, benchmark, fair) for fair in (False, True))
    return _averages(*figures, _splits(predictions, benchmark), _items(predictions))


def compare(path_a: str | Path, path_b: str | Path, benchmark: str) -> dict[str, dict]:
    """B - A of two files of predictions of the same items in one order: as `score`, but each figure is a paired difference.

    An interval without 0 says that B is better, or worse, on such items. Raises ValueError as `rescore` does, and if the
    files differ in their number of rows, or in a row's id (where both have one) or gt.
    """
    rows_a, rows_b = (each_row(path, read_rows(path), _prediction) for path in (path_a, path_b))
    way_out = "compare predictions of the same items in one order"
    for number, (a, b) in enumerate(zip(rows_a, rows_b), start=1):
        for key in ("id", "gt"):
            if key in a and key in b and _as_list(a[key]) != _as_list(b[key]):
                raise ValueError(f"row {number}: {key} is {a[key]!r} in {path_a} and {b[key]!r} in {path_b}; {way_out}")
    if len(rows_a) != len(rows_b):
        raise ValueError(f"{path_a} has {len(rows_a)} rows and {path_b} {len(rows_b)}; {way_out}")
    both = [{**b, **a} for a, b in zip(rows_a, rows_b, strict=True)]  # the split may stand in one of them only
    differences = (_grades(rows_b, benchmark, fair) - _grades(rows_a, benchmark, fair) for fair in (False, True))
    return _averages(*differences, _splits(both, benchmark), _items(both))


def _as_list(value):
    return value if isinstance(value, list) else [value]


def _grades(predictions, benchmark, fair):
    """(n, 2) float: F1 and exact match of every row."""
    answers = [None if row.get("error") else row["pred_answer"] for row in predictions]
    return np.array([grade(answer, _as_list(row["gt"]), benchmark == "mat-coding", fair)
                     for answer, row in zip(answers, predictions, strict=True)])


def _splits(predictions, benchmark):
    return [split_of(row, number, len(predictions), benchmark) for number, row in enumerate(predictions, start=1)]


def _items(predictions):
    """(n,) int: the item of each row, by its id or else its place."""
    places = {}
    ids = (f"row {n}" if row.get("id") is None else str(row["id"]) for n, row in enumerate(predictions))
    return np.array([places.setdefault(name, n) for n, name in enumerate(ids)])


def _averages(published, fair, splits, items):
    """What `score` returns, of (n, 2) figures by either rule."""
    chosen = {name: [name in ("all", split) for split in splits] for name in SPLITS}
    parts, fair_parts = ({name: _average(figures[rows], items[rows]) for name, rows in chosen.items() if any(rows)}
                         for figures in (published, fair))
    differing = {name: part for name, part in fair_parts.items() if part != parts[name]}
    return parts | ({"fair": differing} if differing else {})


def _average(figures, items):
    """Means of (n, 2) figures in percent, with the percentiles of their bootstrap over items.

    A resample's mean depends only on how often it draws each distinct pair of figures, and these numbers are multinomial:
    so they are drawn, not the items, which is the same law at a small part of the work.
    """
    _, item, samples = np.unique(items, return_inverse=True, return_counts=True)
    per_item = np.stack([np.bincount(item, column) for column in figures.T], axis=1) / samples[:, None]  # (items, 2)
    pairs, counts = np.unique(per_item, axis=0, return_counts=True)
    drawn = np.random.default_rng(0).multinomial(len(per_item), counts / len(per_item), RESAMPLES)  # (RESAMPLES, pairs)
    low_high = np.percentile(drawn @ pairs / len(per_item), [2.5, 97.5], axis=0)  # (2, 2)
    f1, em, *bounds = (round(100 * value, 2) for value in (*figures.mean(axis=0).tolist(), *low_high.T.ravel().tolist()))
    return {"f1": f1, "em": em, "n": len(figures), "f1_95": bounds[:2], "em_95": bounds[2:]}


def rescore(path: str | Path, benchmark: str) -> dict[str, dict]:
    """`score` of a file of predictions, .json or .jsonl. Raises ValueError "file, row N: reason; way out"."""
    return score(each_row(path, read_rows(path), _prediction), benchmark)


def _prediction(row, number):
    read_golds(row, "gt", blank_allowed=True)
    split_of(row, number, 0, None)  # refuses what is no text
    if not row.get("error") and not isinstance(row.get("pred_answer", 0), str | None):
        raise ValueError(f"pred_answer must be a text, or null for no answer, got {row.get('pred_answer')!r}; add it")
    return row


PROBE = [{"role": "user", "content": "Say hello."}]  # any endpoint that works answers this
OWN_SHARE = 0.8  # of the patience, for the tries of a reply itself; the rest is for the probe
TEXT_PARTS, THOUGHT_PARTS = ("text", "output_text"), ("thinking", "reasoning")  # of a content
TOKEN_COUNTS = {"prompt_tokens": ("prompt_tokens",), "completion_tokens": ("completion_tokens",),
                "cached_tokens": ("prompt_tokens_details", "cached_tokens"),  # these two are parts of those above
                "reasoning_tokens": ("completion_tokens_details", "reasoning_tokens")}


class ApiRefused(ValueError):
    """The endpoint answers nothing: wrong address, model or key, no credit, or dead. The message
    names the way out."""


class ApiFailed(Exception):
    """One reply could not be had, though the endpoint answers others. The message is its kind:
    timeout, unreachable, bad_reply, http_500, "http_400: …"."""


class ChatModel:
    """A model behind an endpoint of OpenAI's protocol at `url`, "http://HOST:PORT/v1". Threads may share it.

    max_new_tokens bounds a turn, what a reasoning model thinks included; temperature 0 is greedy. `timeout` is for one
    request, `patience` for all tries of one reply, waits included; `backoff` is the first wait; all in seconds. A key is read
    from OPENAI_API_KEY, sent to `url` and nowhere else (no redirect is followed), and never shown. Proxies are not used.

    What may pass is asked again, with doubled waits or as Retry-After says: timeouts, connections
    that fail, replies that are cut or of another shape, and the statuses 408, 409, 429 and 5xx.
    Where a reply still cannot be had, a short prompt is sent. If that is answered, the fault is the
    item's (ApiFailed), and else the endpoint's (ApiRefused).

    Reasoning models refuse max_tokens and temperature: where status 400 says that one is unsupported,
    the run goes on with max_completion_tokens, or without a temperature; `parameters` are those in
    use. `unanswered` counts the items in a row that had no reply in time. Raises ValueError for what
    cannot work.
    """

    def __init__(self, url: str, model: str, *, max_new_tokens: int = 1024, temperature: float = 0.0,
                 timeout: float = 300.0, patience: float = 600.0, backoff: float = 0.5):
        try:
            parts = split_address(url)
        except ValueError as error:
            raise ValueError(f"--api: {error}; give http://HOST:PORT/v1") from None
        self._key = os.environ.get("OPENAI_API_KEY", "").strip()
        if parts.username is not None or parts.query:
            raise ValueError("--api takes no user, key or query in its address; a key belongs in OPENAI_API_KEY")
        if not self._key.isascii() or not self._key.isprintable():
            raise ValueError("OPENAI_API_KEY has characters that no key has; set it again")
        if not self._key and parts.hostname == "api.openai.com":
            raise ValueError(f"{url} needs a key; set the environment variable OPENAI_API_KEY")
        if not model or min(max_new_tokens, timeout, patience) <= 0:
            raise ValueError("--api needs the name of a --model, and tokens and seconds above 0")
        self.url, self.model, self._timeout, self._patience, self._backoff = url, model, timeout, patience, backoff
        self.parameters = {"max_tokens": max_new_tokens, "temperature": temperature}
        self._headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        self._usage = Counter(dict.fromkeys(("requests", "retries", "uncounted", "empty", *TOKEN_COUNTS), 0))
        self._lock, self._said, self.unanswered = threading.Lock(), set(), 0

    @property
    def usage(self) -> Counter:
        """Totals so far: requests, of them retries and uncounted (replies without a count of tokens),
        TOKEN_COUNTS, and empty (turns without a text: a refusal, a call of a tool not offered)."""
        with self._lock:
            return Counter(self._usage)

    def cost(self, prices: tuple[float, float] | None) -> float | None:
        """Dollars so far, by the prices of a million prompt and completion tokens; None without prices.

        Cached tokens are taken at the full price; what an endpoint charges for requests that failed is not known here.
        """
        usage = self.usage
        return prices and (usage["prompt_tokens"] * prices[0] + usage["completion_tokens"] * prices[1]) / 1e6

    def check(self, seconds: float | None = None) -> None:
        """Send a short prompt with the parameters of a turn, so that what they cannot do shows here.
        ApiRefused if no reply comes within `seconds`, by default the patience."""
        seconds = self._patience if seconds is None else seconds
        try:
            self._ask_patiently(PROBE, time.monotonic() + seconds)
        except RequestFailed as failure:
            kind, why = str(failure), self._message(str(failure.__cause__ or failure.detail))
            if failure.retry_after == float("inf"):
                raise ApiRefused(f"{self.url} answers {kind} for model {self.model} ({why}); check --api "
                                 "(it ends in /v1 as a rule), --model and OPENAI_API_KEY") from None
            raise ApiRefused(f"{self.url} gives no reply: {kind} ({why}); check --api and the server; "
                             "the same command goes on") from None

    def reply(self, rollout) -> tuple[str, bool]:
        """The next turn of a `rollout.Rollout`, and whether it is whole: False where max_new_tokens cut it off.

        A refusal is an empty text. Raises ApiFailed for this reply, ApiRefused for the whole run.
        """
        messages, started = chat_messages(rollout), time.monotonic()
        try:
            thought, text, reason = self._ask_patiently(messages, started + OWN_SHARE * self._patience)
        except RequestFailed as failure:
            self.check(started + self._patience - time.monotonic())
            kind, why = str(failure), self._message(failure.detail)
            refused = failure.retry_after == float("inf")
            with self._lock:
                self.unanswered += not refused
            raise ApiFailed(f"{kind}: {why}" if refused and why else kind) from failure
        self.unanswered, whole = 0, reason != "length"
        if whole and not text.strip():
            self._count(empty=1)
            self._say_once("empty", f"a reply without a text (finish_reason {reason}) counts as an "
                                    "invalid turn; `empty` in usage.jsonl counts them")
        return self._clean(with_thought(thought, text, whole)), whole

    def _ask_patiently(self, messages, give_up):
        """What `_ask` returns. RequestFailed once another try would be too late, or could not help."""
        for attempt in count():
            parameters, left = self.parameters, give_up - time.monotonic()
            self._count(requests=1, retries=int(attempt > 0))
            try:
                return self._ask({"model": self.model, "messages": messages, **parameters}, min(self._timeout, left))
            except RequestFailed as error:
                failure = error
            kind, why = str(failure), self._message(failure.detail)
            if "insufficient_quota" in failure.detail:
                failure.retry_after = float("inf")
            wait = max(failure.retry_after or 0.0, self._backoff * 2 ** min(attempt, 6))
            wait *= random.SystemRandom().uniform(1.0, 1.5)  # threads that fail together do not come back together
            if kind in ("http_400", "http_422") and self._adapt(parameters, why):
                wait = 0.0
            if time.monotonic() + wait >= give_up:
                raise failure
            if wait:
                cause = self._message(str(failure.__cause__ or why))
                self._say_once("again", f"{kind} ({cause}); asks again, for up to "
                                        f"{self._patience:g} s a reply")
            time.sleep(wait)

    def _ask(self, payload, seconds):
        """(thought, text, finish_reason) of one request; a thought is what the server has split off."""
        body, _ = fetch(self.url.rstrip("/") + "/chat/completions", payload, self._headers, seconds=seconds)
        reply = None
        try:
            reply = json.loads(body)
            counts = {name: _token_count(reply, path) for name, path in TOKEN_COUNTS.items()}
            self._count(uncounted=counts["prompt_tokens"] == 0, **counts)
            choice = reply["choices"][0]
            message, reason = choice["message"], choice.get("finish_reason")
            if reason == "error":
                raise ValueError("the server gave up in mid-turn")
            content, text = message.get("content"), _joined(message.get("content"), TEXT_PARTS)
            found = [message.get(name) for name in ("reasoning_content", "reasoning", "reasoning_details")]
            thoughts = [_joined(each, TEXT_PARTS + THOUGHT_PARTS) for each in found if isinstance(each, str | list)]
            thoughts.append(_joined(content, THOUGHT_PARTS) if isinstance(content, list) else "")
            thought = next(filter(str.strip, thoughts), "")
            if not text.strip() and parse_action(thought).kind != "invalid":
                thought, text = "", thought  # the server took all for a thought
            return thought, text, reason
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):  # no JSON, or of another shape
            if status := _status_of(reply):
                raise RequestFailed(f"http_{status}", detail=body) from None
            raise RequestFailed("bad_reply", None, body) from None

    def _say_once(self, topic, line):
        with self._lock:
            if topic not in self._said:
                self._said.add(topic)
                print(f"{self.url}: {line}", file=sys.stderr)

    def _count(self, **counts):
        with self._lock:
            self._usage.update(counts)

    def _clean(self, text):
        """No half surrogate pairs, and not our key, should a server send it back; a short one is a placeholder like EMPTY."""
        text = text.encode("utf-8", "replace").decode()
        return text.replace(self._key, "[key]") if len(self._key) >= 16 else text

    def _message(self, body):
        """What the body of an error says, as one line of at most 300 characters that a terminal can show."""
        with suppress(ValueError, LookupError, AttributeError, RecursionError):  # no JSON, or of another shape: taken as it is
            reply = json.loads(body)
            reply = reply[0] if isinstance(reply, list) else reply  # Gemini
            error = reply.get("error") or reply.get("detail") or reply  # OpenAI; FastAPI; vLLM
            body = error if isinstance(error, str) else str(error.get("message") or body)
        text = self._clean(body)[:1000]
        return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:300]

    def _adapt(self, sent, why):
        """Whether the parameters have changed since `sent`: because of `why`, or of what another thread was told."""
        with self._lock:
            known, unsupported = dict(self.parameters), re.search("unsupported|not support", why, re.IGNORECASE)
            if unsupported and "max_tokens" in known and "max_tokens" in why:
                known["max_completion_tokens"] = known.pop("max_tokens")
            if unsupported and "temperature" in known and "temperature" in why:
                del known["temperature"]
            if known != self.parameters:
                print(f"{self.url}: {why}; going on with {known}", file=sys.stderr)
            self.parameters = known
            return known != sent


def read_prices(text: str | None) -> tuple[float, float] | None:
    """"2.5,10": dollars for a million prompt and completion tokens. Raises ValueError for anything else."""
    if not text:
        return None
    if not re.fullmatch(r"[0-9]+(\.[0-9]+)?,[0-9]+(\.[0-9]+)?", text):
        raise ValueError(f"--api_prices {text!r} are no prices; give those of a million prompt and completion tokens: 2.5,10")
    prompt, completion = map(float, text.split(","))
    return prompt, completion


def _token_count(reply, path):
    """A count of a reply's usage; 0 where there is none, or no sane one."""
    for key in ("usage", *path):
        reply = reply.get(key) if isinstance(reply, dict) else None
    return reply if type(reply) is int and 0 <= reply < 1 << 31 else 0


def _status_of(reply):
    """The status that an error names in a reply of status 200 (as OpenRouter's do), where asking
    again cannot help; None for all else."""
    error = reply.get("error") if isinstance(reply, dict) else None
    code = error.get("code") if isinstance(error, dict) else None
    code = int(code) if isinstance(code, str) and re.fullmatch("[0-9]{3}", code) else code
    return code if type(code) is int and 400 <= code < 500 and code not in (408, 409, 429) else None


def _joined(content, kinds):
    """The text of a content: null, a text, or a list of parts, of which those of `kinds` count."""
    if not isinstance(content, list):
        return "" if content is None else content
    parts = [{"text": part} if isinstance(part, str) else part for part in content if part is not None]
    chosen = [(kind, part) for part in parts if (kind := part.get("type", "text").removeprefix("reasoning.")) in kinds]
    return "".join(_joined(part.get(kind, part.get("text", part.get("summary"))), TEXT_PARTS) for kind, part in chosen)


def with_thought(thought: str, text: str, whole: bool) -> str:
    """A turn as the model wrote it, `<think> … </think>` and the action, whose thought a server has
    split off.

    Servers that strip both parts lose the white space around the tags. What our models write there
    stands for it: with a space for the line break, the laptop model answers otherwise.
    """
    thought = re.sub(r"\A\s*<think>|</think>\s*\Z", "", thought)
    inside, tag, _ = text.partition("</think>")
    if not thought.strip() or tag and thought.strip() in inside:  # none, or it stands in the text too
        return text
    if not whole and not text.strip():
        return f"<think> {thought.strip()}"
    if thought == thought.strip():
        thought, text = f" {thought} ", f"\n{text}"
    return f"<think>{thought}</think>{text}"


def chat_messages(rollout) -> list[dict]:
    """A rollout as messages of OpenAI's chat protocol, turn for turn what a local model sees; images are PNG data URLs.

    There is no system message: the paper's models are asked without one, so that the chat template puts in its own, for a
    local model as for the same one behind vLLM. Images go in full size; the server fits them to its model.
    """
    shown = rollout.pictures[0] if rollout.task["image"] is not None else None
    messages = [_user_message(rollout.opening, shown)]
    for turn in rollout.turns:
        messages.append({"role": "assistant", "content": turn.text})
        if turn.observation is not None:
            messages.append(_user_message(turn.observation, turn.result and turn.result.image))
    return messages


def _user_message(text, image):
    if image is None:
        return {"role": "user", "content": text}
    data = BytesIO()
    image.save(data, "PNG", compress_level=1)
    url = f"data:image/png;base64,{b64encode(data.getvalue()).decode()}"
    return {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]}


# --------------------------------------------------------------------------------------------------------- playing tasks
ASKED = {  # stands behind the question where no tools are offered; "direct" has the paper's words, the others are ours
    "direct": "\nAnswer the question directly. The answer should be very brief.",
    "cot": "\nThink step by step between <think> and </think>. Then answer as briefly as possible: <answer> answer </answer>",
    "rag": "\nAnswer the question directly with the help of the information. The answer should be very brief."}
ANSWER_ONLY = " Only return the answer."  # the paper's words where there is no image
BOX = re.compile(r"\[\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*\]")  # x_min, y_min, x_max, y_max in thousandths
SLICE = re.compile(r"\[[^\[\]:]*:[^\[\]:,]*,[^\[\]:]*:[^\[\]:,]*\]")  # of an array: rows, columns


def evaluate_tasks(policy, tasks: list[dict], tools, limits, *, benchmark: str | None = None, batch_size: int = 8,
                   prompt: str = "short", ask: str = "agent", samples: int = 1, temperature: float = 0.0, seed: int = 0,
                   chat: ChatModel | None = None, output_dir: str | Path | None = None) -> dict[str, dict]:
    """Play every task `samples` times, batch_size tasks side by side; returns what `summarize` does of the items.

    policy, tools, limits and prompt are those of `rollout.roll_out`. ask: "agent" (with the tools); "direct", "cot", "rag":
    one turn without any, for "rag" with what one search for the question finds. With `chat` an endpoint writes the turns, and
    the policy is there for its tokenizer only. temperature 0 is greedy; random numbers come from the seed and a batch's place.

    Into output_dir go items.jsonl (a row an item, as they come; with images in items/), predictions.json in the released
    format, and scores.json. Called again it goes on where it was stopped, and comes to the same files. Processes of torchrun
    share the batches; the first one waits for all, the others return nothing. An item that fails is a row with its error.
    Raises ApiRefused if the endpoint answers nothing; the items under way are left undone. Raises
    ValueError if every item has failed.
    """
    out, limits = output_dir and Path(output_dir), replace(limits, batch_tokens=batch_size * samples * limits.max_tokens)
    rank = int(os.environ.get("RANK", 0)) if out else 0
    world = int(os.environ.get("WORLD_SIZE", 1)) if out else 1
    done = _done_before(out, tasks)
    wanted = [(number, sample) for number in range(len(tasks)) for sample in range(samples)]
    batches = [range(len(tasks))[start:start + batch_size] for start in range(0, len(tasks), batch_size)]
    todo = [batch for batch in batches if any((number, k) not in done for number in batch for k in range(samples))]
    with tqdm(total=len(wanted), initial=len(wanted) - samples * sum(map(len, todo)), desc="evaluate", unit=" items",
              disable=rank > 0) as bar:
        for batch in (b for b in batches[rank::world] if b in todo):  # not todo[…]: other ranks may have found less done
            played, found = _play_batch(policy, [tasks[number] for number in batch], tools, limits, chat, ask,
                                        seed=seed * 1_000_003 + batch[0], group_size=samples, temperature=temperature,
                                        prompt=prompt)
            keys = [(number, sample) for number in batch for sample in range(samples)]
            rows = [_item_row(tasks[key[0]], key, *parts, benchmark, out) for key, parts in zip(keys, played, strict=True)]
            for row in rows if found else ():
                result = found[row["number"] - batch[0]]
                row["retrieved"] = {"ok": result.ok, "error": result.error, "seconds": round(result.seconds, 4)}
            done |= zip(keys, rows, strict=True)
            if out:
                _append_items(out / "items.jsonl", rows)
            bar.update(len(rows))
            if chat and chat.unanswered > 1 and all(row["error"] for row in rows):
                raise ApiRefused(f"{chat.url} answers a short prompt, but no item in time "
                                 f"({rows[-1]['error']}); check the server and --api_timeout; the same "
                                 "command goes on, --retry True asks for the failed items again")
        if rank == 0:
            done = _wait_for_ranks(out, set(wanted), done, bar)
    return _write(done, wanted, benchmark, out) if rank == 0 else {}


def _done_before(out, tasks):
    """The rows of an earlier start. ValueError if they are of other tasks."""
    done = read_items(out)
    for (number, _), row in done.items():
        if number < len(tasks) and (row["id"], row["gt"]) != (tasks[number]["id"], tasks[number]["answers"]):
            raise ValueError(f"{out / 'items.jsonl'}: item {number} is {row['id']!r} and not {tasks[number]['id']!r}: the "
                             "tasks have changed; choose another --output_dir")
    return done


def _wait_for_ranks(out, wanted, done, bar):
    """All rows, as soon as the other ranks have played theirs."""
    while not done.keys() >= wanted:
        time.sleep(0.5)
        done = read_items(out)
        bar.update(len(done.keys() & wanted) - bar.n)
    return done


def _write(done, wanted, benchmark, out):
    """Write what a finished evaluation leaves; returns the scores of the wanted rows. Others, of a start with a larger
    --limit, stay in items.jsonl. ValueError if every item failed."""
    rows = [done[key] for key in wanted]
    if out:
        write_whole(out / "items.jsonl", "".join(json.dumps(done[key]) + "\n" for key in sorted(done)))
    if all(row["error"] for row in rows):
        raise ValueError(f"every item failed, so there are no scores; the first with: {rows[0]['error']}; "
                         "when that is mended, --retry True plays them again")
    scores = summarize(rows, benchmark)
    if out:
        kept = ("id", "gt", "pred_answer", "split") + ("sample",) * (rows[-1]["sample"] > 0)
        predictions = [{key: row[key] for key in kept + ("error",) * bool(row["error"])} for row in rows]
        for name, value in {"predictions.json": predictions, "scores.json": scores}.items():
            write_whole(out / name, json.dumps(value, ensure_ascii=False, indent=1) + "\n")
    return scores


def _asked(task, ask):
    """The task with all that its prompt says in its question."""
    instructions = "" if ask == "agent" else ASKED[ask] + ANSWER_ONLY * (task["image"] is None)
    return {**task, "question": task["question"] + instructions}


def _play_batch(policy, tasks, tools, limits, chat, ask, **options):
    """(what `_play` returns of these tasks, for "rag" the search results that they are shown)."""
    items, found = [_asked(task, ask) for task in tasks], []
    if ask == "rag":
        found = tools.search.search_many([task["question"] for task in tasks])
        items = [{**item, "question": f"<information> {result.text} </information>\n{item['question']}"}
                 for item, result in zip(items, found, strict=True)]
    played = _play(policy, items, tools, limits, chat, is_agent=ask == "agent", **options)
    if tools.search and tools.search.spent:
        raise ValueError("--search_budget is spent; the same command goes on, with the items that were under way")
    return played, found


def _play(policy, items, tools, limits, chat, *, seed, is_agent, **options):
    """[(rollout or None, answer, error or None)] of a batch. If it fails as a whole, its items are played one by one."""
    import torch  # not at the top: it takes seconds to load, and rescoring does without

    from rollout import Tools, roll_out
    errors = {}
    if not is_agent:
        tools, limits, options = Tools(), replace(limits, max_turns=1), {**options, "prompt": "short"}
    torch.manual_seed(seed)
    try:
        rollouts, _ = roll_out(policy, items, tools, limits, **options, sampler=chat and partial(_ask, policy, chat, errors))
    except ApiRefused:
        raise
    except Exception as error:  # of whatever kind: thousands of other items must not be lost for it
        if len(items) > 1:
            return [played for item in items for played in
                    _play(policy, [item], tools, limits, chat, seed=seed, is_agent=is_agent, **options)]
        return [(None, None, f"{type(error).__name__}: {error}")] * options["group_size"]
    return [(r, r.answer if is_agent else _one_turn_answer(r), errors.get(id(r))) for r in rollouts]


def _ask(policy, chat, errors, live):
    """A sampler (see `rollout.roll_out`) whose turns an endpoint writes, for all live rollouts at a time."""
    from model import encode_text

    def turn(rollout):
        try:
            return chat.reply(rollout)
        except ApiFailed as error:
            errors[id(rollout)] = str(error)
            return "", False  # ends the rollout
    with ThreadPoolExecutor(len(live)) as pool:
        replies = list(pool.map(turn, live))
    turns = [encode_text(policy, text) + [policy.end_id] * whole for text, whole in replies]
    return [(ids, [0.0] * len(ids)) for ids in turns]


def _one_turn_answer(rollout):
    """The answer of someone who was not told of tools: in its tags if it has any, else all that is said after the thought."""
    if rollout.answer is not None or rollout.stop == "length":  # what was cut off is no answer
        return rollout.answer
    return rollout.turns[0].text.rpartition("</think>")[2].strip() or None


def _item_row(task, key, rollout, answer, error, benchmark, out):
    """A row of items.jsonl."""
    from rollout import Rollout, rollout_row
    number, sample = key
    row = rollout_row(rollout or Rollout(task, [], [], []), out and out / "items", f"{number}-{sample}")
    f1, em = grade(answer, task["answers"], benchmark == "mat-coding", fair=False)
    task = {name: task[name] for name in ("question", "family", "type", "split")}
    return row | task | {"number": number, "sample": sample, "gt": row["answers"], "pred_answer": answer, "f1": f1, "em": em,
                         "error": error}


def read_items(out: Path | None) -> dict[tuple[int, int], dict]:
    """{(number, sample): row} of items.jsonl. Lines that a kill cut off are not there: they are played again."""
    rows = {}
    if out and (out / "items.jsonl").exists():
        for line in (out / "items.jsonl").read_text(encoding="utf-8").split("\n"):
            with suppress(ValueError):
                row = json.loads(line)
                rows[row["number"], row["sample"]] = row
    return rows


def _append_items(path, rows):
    """Add rows, on the disk when this returns. What another process left half written is closed by a line end first."""
    with open(path, "ab+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            file.write(b"" if file.read(1) == b"\n" else b"\n")
        file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
        file.flush()
        os.fsync(file.fileno())


def summarize(items: list[dict], benchmark: str | None) -> dict[str, dict]:
    """`score` of rows of items.jsonl, and beside it "failed" (items), "stops" (how episodes ended) and "tools" (turns an item,
    calls, errors by kind, seconds). With several samples an item, "samples" has mean and deviation of each one's figures."""
    calls = [call for row in items for call in (*row["turns"], row.get("retrieved", {})) if "ok" in call]
    tools = {"turns": round(fmean(len(row["turns"]) for row in items), 2), "calls": len(calls),
             "errors": dict(Counter(call["error"] for call in calls if not call["ok"])),
             "seconds": round(sum(call["seconds"] for call in calls), 1)}
    stops = Counter("failed" if row["error"] else row["stop"] for row in items)
    scores = score(items, benchmark) | {"tools": tools, "stops": dict(stops), "failed": stops["failed"]}
    if samples := max(row["sample"] for row in items):
        by_sample = {key: [100 * fmean(row[key] for row in items if row["sample"] == k) for k in range(samples + 1)]
                     for key in ("f1", "em")}
        scores["samples"] = {key: {"mean": round(fmean(m), 2), "std": round(stdev(m), 2)} for key, m in by_sample.items()}
    return scores


def released_crop(code: str, task: dict, size: tuple[int, int]) -> str:
    """The model's code as the released evaluation runs it where the question is about a part of the image: every slice of an
    array gives way to the box of the question, in thousandths of (width, height). Only to compare figures with its."""
    if task["type"] != ["crop"] or not (box := BOX.search(task["question"])):
        return code
    x_min, y_min, x_max, y_max = (int(value) * side // 1000 for value, side in zip(box.groups(), size * 2, strict=True))
    return SLICE.sub(f"[{y_min}:{y_max}, {x_min}:{x_max}]", code)


@dataclass
class Arguments:
    """The command line."""
    model: str | None = flag(None, "hub name or folder of a Qwen2.5-VL; with --api its name there")
    api: str | None = flag(None, "address of an OpenAI-compatible endpoint, as http://HOST:PORT/v1; key in OPENAI_API_KEY")
    tasks: str | None = flag(None, "tasks to evaluate on, .json or .jsonl; data/prepare.py writes them", aliases=["--data"])
    benchmark: Benchmark | None = flag(None, "the published benchmark that the file is; sets splits and scoring")
    image_folder: str | None = flag(None, "folder of the images, if not beside the tasks")
    ask: Literal["agent", "direct", "cot", "rag"] = flag("agent", "agent: with tools; others: one turn, rag after a search")
    output_dir: str = flag("runs/evaluate", "folder for items, predictions and scores; what was begun there goes on")
    rescore: str | None = flag(None, "only score this file of predictions; needs --benchmark, no model")
    compare: list[str] | None = flag(None, "only compare two files of predictions, A and B: B - A; needs --benchmark")
    report: str | None = flag(None, "only write RUN/report.html for the folder of a training run or an evaluation; no model")
    limit: int | None = flag(None, "number of tasks to take from the start of the file")
    samples: int = flag(1, "of each task; above 1 give a --temperature")
    temperature: float = flag(0.0, "of sampling; 0: greedy")
    seed: int = flag(0, "of sampling")
    retry: bool = flag(False, "play the items again that failed")
    max_turns: int = flag(5, "turns an episode")
    max_new_tokens: int = flag(1024, "new tokens a turn; the paper's search evaluation takes 2048")
    max_tokens: int = flag(8192, "tokens an episode: prompt, actions, observations; with --api its own limit holds")
    batch_size: int = flag(8, "tasks played side by side; with --api requests at a time")
    prompt: Literal["short", "full"] = flag("short", "instructions: short for the laptop model, full for hub models")
    api_prices: str | None = flag(None, "dollars for a million prompt and completion tokens, as 2.5,10: the cost is shown")
    api_timeout: float = flag(300.0, "seconds a request may take")
    api_patience: float = flag(600.0, "seconds a turn may take, asking again included")
    corpus: str = flag("sqlite:data/offline/corpus.sqlite", "search: sqlite:INDEX, http://HOST:PORT/retrieve or serper")
    topk: int = flag(3, "passages a search returns")
    search_pages: int = flag(0, "pages of the first results that are read too (serper)")
    search_cache: str = flag("runs/search_cache.sqlite", "answers from the network, kept for all runs; empty: none")
    search_budget: int = flag(0, "searches sent over the network, after which the evaluation stops; 0: no end")
    code_unlocked: bool = flag(False, "run model-written code in plain child processes where the kernel cannot lock it in")
    tools: Literal["on", "off"] = flag("on", "off: every call is answered that the tool is switched off")
    released_crop: bool = flag(False, "as the released code: the question's crop box replaces the one in the model's code")
    released_context: bool = flag(False, "as the released code: one user turn, the chain pasted as text, the image replaced")


MAY_CHANGE = {"output_dir", "limit", "retry", "api", "api_prices", "api_timeout", "api_patience", "search_cache",
              "search_budget"}  # from one start to the next of an evaluation


def _run(args):
    """Read the tasks and check all flags, which fails early; then load the rest and play them."""
    if not args.model or not args.tasks:
        raise ValueError("give --model and --tasks; or --rescore FILE --benchmark NAME")
    for name in ("batch_size", "max_turns", "max_new_tokens", "max_tokens", "samples"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}: must be at least 1")
    if not 0 <= args.temperature < float("inf") or not 0 <= args.seed < 2**32:
        raise ValueError(f"--temperature {args.temperature} is at least 0, --seed {args.seed} within 0 and 2^32")
    if args.samples > 1 and args.temperature == 0:
        raise ValueError(f"--samples {args.samples} --temperature {args.temperature}: samples of a greedy policy are all the "
                         "same; give --temperature 1")
    if args.retry and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("--retry takes one process: another one may have read the items before those that failed are dropped")
    if args.ask == "rag" and args.tools == "off":
        raise ValueError("--ask rag searches once for every question; leave out --tools off")
    tasks = load_tasks(args.tasks, args.benchmark, args.image_folder, args.limit, mode="episode")
    prices, world, out = read_prices(args.api_prices), int(os.environ.get("WORLD_SIZE", 1)), Path(args.output_dir)
    if args.api and (world > 1 or args.released_context):
        raise ValueError("--api takes one process, with a larger --batch_size, and no --released_context")
    chat = args.api and ChatModel(args.api, args.model, max_new_tokens=args.max_new_tokens, temperature=args.temperature,
                                  timeout=args.api_timeout, patience=args.api_patience)
    search = None if args.tools == "off" else SearchTool(
        args.corpus, args.topk, pages=args.search_pages, cache=args.search_cache, budget=args.search_budget)
    if search and os.environ.get("RANK", "0") == "0":
        search.check()
    _check_folder(out, args)
    if args.tools == "on":
        try:
            CodeTool(1, unlocked=args.code_unlocked).close()
        except RuntimeError as error:
            raise ValueError(error) from error
    if chat:
        chat.check()
    take_folder(out)
    if os.environ.get("RANK", "0") == "0":
        print(f"{args.tasks}: {describe(tasks)}", file=sys.stderr)
    from model import load_policy  # here for the reason given in _play
    from rollout import Limits, Tools
    limits = Limits(args.max_turns, args.max_new_tokens, args.max_tokens, released_context=args.released_context)
    if chat:  # the laptop model's tokenizer splits texts for the rollouts; tokens are the endpoint's to count
        limits = replace(limits, max_tokens=10 ** 9, max_observation_tokens=10 ** 9)
    policy = load_policy(str(Path(__file__).parent / "data/model") if chat else args.model)
    _take_up(out, args)
    with CodeTool(unlocked=args.code_unlocked) if args.tools == "on" else nullcontext() as code:
        tools = Tools(code, search, released_crop if args.released_crop else None)
        try:
            scores = evaluate_tasks(policy, tasks, tools, limits, benchmark=args.benchmark, batch_size=args.batch_size,
                                    prompt=args.prompt, ask=args.ask, samples=args.samples, temperature=args.temperature,
                                    seed=args.seed, chat=chat, output_dir=args.output_dir)
        finally:
            if chat:  # a row for each start, as each costs
                append_json_line(out / "usage.jsonl", usage := {**chat.usage, "dollars": chat.cost(prices), **chat.parameters})
                print(f"used by this start: {usage}", file=sys.stderr)
    if scores:
        print(f"episodes ended by {scores['stops']}; items that failed: {scores['failed']}; tools: {scores['tools']}; "
              f"see {out}", file=sys.stderr)
    return scores


def _check_folder(out, args):
    """See that a folder that holds something holds an evaluation with the same flags."""
    if (what := holds(out)) not in ("", "an evaluation"):
        its_model = f"; to evaluate what it trained give --model {out / 'model'}" * (what == "a training run")
        raise ValueError(f"--output_dir {out} holds {what}; choose another folder{its_model}")
    path, flags = out / "config.json", asdict(args)
    before = parse_json(path.read_bytes(), path, 1) if path.exists() else flags
    changed = sorted(name for name in flags.keys() - MAY_CHANGE if before.get(name) != flags[name])
    if changed:
        raise ValueError(f"--output_dir {out} holds an evaluation with other flags ({', '.join(changed)}); "
                         "give the same ones to go on, or choose another folder")


def _take_up(out, args):
    """Note the flags in the folder, and drop failed items for --retry."""
    out.mkdir(parents=True, exist_ok=True)
    if os.environ.get("RANK", "0") == "0":
        if args.retry:
            kept = [row for row in read_items(out).values() if not row["error"]]
            write_whole(out / "items.jsonl", "".join(json.dumps(row) + "\n" for row in kept))
        write_whole(out / "config.json", json.dumps(asdict(args), indent=1) + "\n")


def _table(scores, sign):
    """A line a split, those of the fair rule last. sign: "+" for differences."""
    rows = {**scores, **{f"fair {name}": part for name, part in scores.get("fair", {}).items()}}
    lines = [f"{'split':<12}{'F1 %':>9}{'95 %':>18}{'EM %':>9}{'95 %':>18}{'n':>8}"]
    for name, part in rows.items():
        if name.removeprefix("fair ") in SPLITS:
            figures = (f"{part[key]:{sign}9.2f}{part[key + '_95'][0]:{sign}9.2f},{part[key + '_95'][1]:{sign}8.2f}"
                       for key in ("f1", "em"))
            lines.append(f"{name:<12}{''.join(figures)}{part['n']:>8}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns 0, or 2 after a line "error: …" on standard error for what the user
    can mend. It returns 2 and prints no scores where every item failed."""
    try:
        args = parse_flags(Arguments, __doc__.partition("\n")[0], argv)
        if args.report:
            print(write_report(args.report))
            return 0
        for name in ("rescore", "compare"):
            if getattr(args, name) and not args.benchmark:
                raise ValueError(f"--{name} needs --benchmark, as benchmarks score differently; add --benchmark NAME")
        if args.compare and len(args.compare) != 2:
            raise ValueError(f"--compare takes two files, got {len(args.compare)}; write --compare A.json B.json")
        with nothing_left(Path(args.output_dir)):
            scores = (compare(*args.compare, args.benchmark) if args.compare else
                      rescore(args.rescore, args.benchmark) if args.rescore else _run(args))
    except (OSError, ValueError) as error:
        return fail(error)
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    if scores:  # of the first rank
        print(_table(scores, "+" if args.compare else ""))
        print(json.dumps(scores))
    return 0


if __name__ == "__main__":
    sys.exit(main())
