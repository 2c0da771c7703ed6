"""A model behind an endpoint of OpenAI's chat protocol, for evaluate.py --api.

`ChatModel.reply` gives the next turn of a rollout: it sends the turns so far as messages, images
included, asks again what may pass, and puts a thought that the server split off back into the turn.
"""
import json
import os
import random
import re
import sys
import threading
import time
from base64 import b64encode
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from itertools import count
from math import inf
from typing import TYPE_CHECKING

from PIL import Image

from tools import RequestFailed, fetch, parse_action, split_address

if TYPE_CHECKING:  # it loads torch
    from rollout import Rollout

PROBE = [{"role": "user", "content": "Say hello."}]  # any endpoint that works answers this
OWN_SHARE = 0.8  # of the patience, for the tries of a reply itself; the rest is for the probe
TEXT_PARTS, THOUGHT_PARTS = ("text", "output_text"), ("thinking", "reasoning")  # of a content
OTHER_SHAPE = (ValueError, LookupError, TypeError, AttributeError, RecursionError)  # of some JSON


class ApiRefused(ValueError):
    """The endpoint answers nothing: wrong address, model or key, no credit, or dead. The message
    names the way out."""


class ApiFailed(Exception):
    """One reply could not be had, though the endpoint answers others. The message is its kind:
    timeout, unreachable, bad_reply, http_500, "http_400: …"."""


@dataclass
class ChatModel:
    """A model behind an endpoint of OpenAI's protocol. Threads may share it.

    A key is read from OPENAI_API_KEY, sent to `url` and nowhere else (no redirect is followed), and
    never shown. Proxies are not used.

    What may pass is asked again, with doubled waits or as Retry-After says: timeouts, connections
    that fail, replies that are cut or of another shape, and the statuses 408, 409, 429 and 5xx.
    Where a reply still cannot be had, a short prompt is sent, the probe. If that is answered, the
    fault is the item's (ApiFailed), and else the endpoint's (ApiRefused).

    Reasoning models refuse max_tokens and temperature: where status 400 says that one is
    unsupported, the run goes on with max_completion_tokens, or without a temperature.

    Attributes beside the fields: `parameters` of the requests; `unanswered`, the number of items in
    a row without a reply in time; `usage`, totals of requests, of them retries and uncounted
    (replies without a count of tokens), prompt_tokens, completion_tokens, and empty (turns without
    a text, such as refusals). Raises ValueError for an address or a key that cannot work.
    """
    url: str  # "http://HOST:PORT/v1"
    model: str
    max_new_tokens: int = 1024  # of a turn, what a reasoning model thinks included
    temperature: float = 0.0  # 0: greedy
    timeout: float = 300.0  # seconds, of one request
    patience: float = 600.0  # seconds, for all tries of one reply, waits included
    backoff: float = 0.5  # seconds, the first wait

    def __post_init__(self):
        try:
            address = split_address(self.url)
        except ValueError as error:
            raise ValueError(f"--api: {error}; give http://HOST:PORT/v1") from None
        if address.username is not None or address.query:
            raise ValueError("--api takes no user, key or query in its address; "
                             "a key belongs in OPENAI_API_KEY")
        self._key = os.environ.get("OPENAI_API_KEY", "").strip()
        if not self._key.isascii() or not self._key.isprintable():
            raise ValueError("OPENAI_API_KEY has characters that no key has; set it again")
        self.parameters = {"max_tokens": self.max_new_tokens, "temperature": self.temperature}
        self.unanswered = 0
        self.usage = Counter(requests=0, retries=0, uncounted=0, empty=0,
                             prompt_tokens=0, completion_tokens=0)
        self._lock = threading.Lock()

    def check(self, share: float = 1.0) -> None:
        """Send the probe with the parameters of a turn, so that what they cannot do shows here.
        ApiRefused if no reply comes within this share of the patience."""
        try:
            self._ask_patiently(PROBE, share)
        except RequestFailed as failure:
            raise ApiRefused(f"{self.url} gives no reply for model {self.model}: {failure} "
                             f"({self._reason(failure)}); check --api (it ends in /v1 as a rule), "
                             "--model, OPENAI_API_KEY and the server; the same command goes on"
                             ) from None

    def reply(self, rollout: "Rollout") -> tuple[str, bool]:
        """The next turn, and whether it is whole: False where max_new_tokens cut it off.

        A refusal is an empty text. Raises ApiFailed for this reply, ApiRefused for the whole run.
        """
        try:
            thought, text, finish_reason = self._ask_patiently(chat_messages(rollout), OWN_SHARE)
        except RequestFailed as failure:
            self.check(1 - OWN_SHARE)
            if failure.retry_after == inf:
                raise ApiFailed(f"{failure}: {self._reason(failure)}") from failure
            with self._lock:
                self.unanswered += 1
            raise ApiFailed(str(failure)) from failure
        self.unanswered = 0
        is_whole = finish_reason != "length"
        if is_whole and not text.strip():
            self._count(empty=1)
            _say_once(f"{self.url}: a reply without a text (finish_reason {finish_reason}) counts "
                      "as an invalid turn; `empty` in usage.jsonl counts them")
        return self._clean(with_thought(thought, text, is_whole)), is_whole

    def _ask_patiently(self, messages: list[dict], share: float) -> tuple[str, str, str | None]:
        """What `_ask` returns. RequestFailed once another try would be too late, or cannot help."""
        give_up, failure = time.monotonic() + share * self.patience, None
        for attempt in count():
            sent, left = self.parameters, give_up - time.monotonic()
            if failure and left <= 0:  # a busy machine woke us late
                raise failure
            self._count(requests=1, retries=int(attempt > 0))
            try:
                return self._ask({"model": self.model, "messages": messages, **sent},
                                 min(self.timeout, left))
            except RequestFailed as error:
                # A try that the end of the patience cut short says less than the one before.
                was_cut = str(error) == "timeout" and left < self.timeout
                failure = failure if failure and was_cut else error
            if str(failure) in ("http_400", "http_422") and self._adapt(sent, failure):
                continue
            if "insufficient_quota" in failure.detail:
                failure.retry_after = inf
            wait = max(failure.retry_after or 0.0, self.backoff * 2 ** min(attempt, 6))
            wait *= random.uniform(1.0, 1.5)  # threads that fail together do not return together
            if time.monotonic() + wait >= give_up:
                raise failure
            _say_once(f"{self.url}: {failure}; asks again, for up to {self.patience:g} s a reply")
            time.sleep(wait)

    def _ask(self, payload: dict, seconds: float) -> tuple[str, str, str | None]:
        """(thought, text, finish_reason) of one request; a thought is what the server split off."""
        address = self.url.rstrip("/") + "/chat/completions"
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        body, _ = fetch(address, payload, headers, seconds=seconds)
        try:
            reply = json.loads(body)
            usage = reply.get("usage")
            usage = usage if isinstance(usage, dict) else {}
            tokens = {name: usage[name] for name in ("prompt_tokens", "completion_tokens")
                      if isinstance(usage.get(name), int)}
            self._count(uncounted=not tokens, **tokens)
            choice = reply["choices"][0]
            if choice.get("finish_reason") == "error":
                raise ValueError("the server gave up in mid-turn")
            return *_thought_and_text(choice["message"]), choice.get("finish_reason")
        except OTHER_SHAPE:
            raise RequestFailed("bad_reply", None, body) from None

    def _adapt(self, sent: dict, failure: RequestFailed) -> bool:
        """Whether the server says that it does not know a parameter, and others are used now."""
        why, changed = self._reason(failure), dict(sent)
        if re.search("unsupported|not support", why, re.IGNORECASE):
            if "max_tokens" in why and "max_tokens" in sent:
                changed["max_completion_tokens"] = changed.pop("max_tokens")
            if "temperature" in why:
                changed.pop("temperature", None)
        if changed == sent:
            return False
        self.parameters = changed
        _say_once(f"{self.url}: {why}; going on with {changed}")
        return True

    def _reason(self, failure: RequestFailed) -> str:
        """The cause of a failure, or what the server said, as a line of at most 300 characters."""
        text = str(failure.__cause__ or failure.detail)
        with suppress(*OTHER_SHAPE):  # then the text is taken as it is
            reply = json.loads(text)
            reply = reply[0] if isinstance(reply, list) else reply  # Gemini
            error = reply.get("error") or reply.get("detail") or reply  # OpenAI; FastAPI; vLLM
            text = error if isinstance(error, str) else str(error.get("message") or text)
        text = self._clean(text)[:1000]
        return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:300]

    def _clean(self, text: str) -> str:
        """Without half surrogate pairs, and without our key, should a server send it back; a short
        key is a placeholder like EMPTY."""
        text = text.encode("utf-8", "replace").decode()
        return text.replace(self._key, "[key]") if len(self._key) >= 16 else text

    def _count(self, **counts: int) -> None:
        with self._lock:
            self.usage.update(counts)


@cache
def _say_once(line: str) -> None:
    print(line, file=sys.stderr)


def _thought_and_text(message: dict) -> tuple[str, str]:
    """What a message says. Servers put a thought into a field of its own, or into parts."""
    content = message.get("content")
    if not isinstance(content, str | list | None):
        raise TypeError("a content of another shape")
    field = message.get("reasoning_content") or message.get("reasoning")
    thought = _joined(field, TEXT_PARTS + THOUGHT_PARTS) or _joined(content, THOUGHT_PARTS)
    text = _joined(content, TEXT_PARTS)
    if not text.strip() and parse_action(thought).kind != "invalid":
        return "", thought  # the server took all of the turn for a thought
    return thought, text


def _joined(content: object, kinds: tuple[str, ...]) -> str:
    """The texts of these kinds in a content: a text, or a list of texts and parts."""
    if not isinstance(content, list):
        return content if isinstance(content, str) and "text" in kinds else ""
    texts = []
    for part in filter(None, content):
        part = {"text": part} if isinstance(part, str) else part
        kind = part.get("type", "text").removeprefix("reasoning.")
        if kind in kinds:
            inner = part.get(kind) or part.get("text") or ""
            texts.append(_joined(inner, TEXT_PARTS) if isinstance(inner, list) else inner)
    return "".join(texts)


def with_thought(thought: str, text: str, is_whole: bool) -> str:
    """A turn as the model wrote it: `<think> … </think>`, which a server has split off, and the
    action.

    Servers that strip both parts lose the white space around the tags. What our models write there
    stands for it: with a space for the line break, the laptop model answers otherwise.
    """
    thought = re.sub(r"\A\s*<think>|</think>\s*\Z", "", thought)
    inside, tag, _ = text.partition("</think>")
    if not thought.strip() or tag and thought.strip() in inside:  # none, or in the text too
        return text
    if not is_whole and not text.strip():
        return f"<think> {thought.strip()}"
    if thought == thought.strip():
        thought, text = f" {thought} ", f"\n{text}"
    return f"<think>{thought}</think>{text}"


def chat_messages(rollout: "Rollout") -> list[dict]:
    """A rollout as messages of OpenAI's chat protocol, turn for turn what a local model sees.

    Images are PNG data URLs in full size; the server fits them to its model. There is no system
    message: the paper's models are asked without one, and the chat template puts in its own.
    """
    shown = rollout.pictures[0] if rollout.task["image"] is not None else None
    messages = [_user_message(rollout.opening, shown)]
    for turn in rollout.turns:
        messages.append({"role": "assistant", "content": turn.text})
        if turn.observation is not None:
            made = turn.result.image if turn.result else None
            messages.append(_user_message(turn.observation, made))
    return messages


def _user_message(text: str, image: Image.Image | None) -> dict:
    if image is None:
        return {"role": "user", "content": text}
    file = BytesIO()
    image.save(file, "PNG", compress_level=1)
    url = f"data:image/png;base64,{b64encode(file.getvalue()).decode()}"
    return {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}},
                                        {"type": "text", "text": text}]}
