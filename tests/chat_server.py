"""A chat endpoint of OpenAI's protocol that fails on purpose: for tests, and to watch an evaluation ride out faults.

    python tests/chat_server.py --port 8001 --tasks data/offline/heldout.json --faults 0.3
    python evaluate.py --api http://127.0.0.1:8001/v1 --model stand-in --tasks data/offline/heldout.json

    with ChatServer(lambda messages: "<answer> C </answer>", faults={"http_500": 0.2, "cut": 0.1}, seed=0) as server:
        ChatModel(server.url, "any")

The stand-in knows the gold answers of the tasks: it calls a tool, then answers right. So an evaluation that loses nothing
to faults scores 100 %. It looks tasks up by question and pixels, so a picture that arrives damaged scores 0.
"""
import argparse
import base64
import hashlib
import io
import json
import random
import socket
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

from PIL import Image

ROOT = Path(__file__).parent.parent
PATIENCE = 30.0  # seconds after which a slow or endless fault ends by itself, for the case that nobody hangs up


class Request(NamedTuple):
    path: str
    headers: dict[str, str]  # lower-case names
    body: dict
    time: float  # seconds of `time.monotonic`


def send(handler, body, status=200, kind="application/json", **headers):
    """A whole reply; body is bytes, or anything that JSON can say."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    handler.send_response(status)
    for name, value in {"Content-Type": kind, "Content-Length": len(data), **headers}.items():
        handler.send_header(name.replace("_", "-"), str(value))
    handler.end_headers()
    handler.wfile.write(data)


def refuse(status, message="Try again later.", **headers):
    """A fault: an error as OpenAI's endpoint words it."""
    return lambda handler, good: send(handler, {"error": {"message": message}}, status, **headers)


def _reset(handler, good):
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()


def _slow(first, again, pause):
    """Writes `first`, then `again` after every pause, for as long as the client is there."""
    def fault(handler, good):
        end = time.monotonic() + PATIENCE
        handler.wfile.write(first)
        while time.monotonic() < end and not handler.server.gone.wait(pause):
            handler.wfile.write(again)
    return fault


def _cut(handler, good):
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(good)))
    handler.end_headers()
    handler.wfile.write(good[:len(good) // 2])


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
FAULTS = {  # name: fault(handler, the right reply as bytes)
    **{f"http_{status}": refuse(status) for status in (408, 409, 500, 502, 503)},
    "http_429": refuse(429, Retry_After=0),
    "reset": _reset,
    "closed": lambda handler, good: None,
    "cut": _cut,
    "garbage": lambda handler, good: send(handler, b"<html>maintenance</html>"),
    "no_choices": lambda handler, good: send(handler, {"choices": []}),
    "other_shape": lambda handler, good: send(handler, {"error": {"message": "with status 200"}}),
    "huge": _slow(HEAD + b"\r\n", b" " * 65_536, 0),
    "hang": _slow(b"", b"", 0.05),
    "drip": _slow(HEAD + b"Content-Length: 1000\r\n\r\n", b" ", 0.05),
    "drip_head": _slow(HEAD + b"X-Slow: ", b"a", 0.05),
}
QUICK = sorted(set(FAULTS) - {"hang", "drip", "drip_head"})  # the others last as long as the client's timeout
FOR_GOOD = {"http_400": refuse(400), "http_404": refuse(404)}  # these do not pass when asked again


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        raw = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        with suppress(OSError):  # the client hung up
            self.server.answer(self, raw)

    do_GET = do_POST

    def log_message(self, *_):
        pass


class Loopback(ThreadingHTTPServer):
    """A server on this machine alone, in a thread of its own inside `with`. Subclasses answer(handler, body of the request)."""
    daemon_threads, block_on_close, request_queue_size = True, False, 128

    def __init__(self, port: int = 0):
        super().__init__(("127.0.0.1", port), _Handler)
        self.seen, self.gone = [], threading.Event()

    def handle_error(self, *_):
        pass  # a client that left, or sent no HTTP

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.002,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.gone.set()
        self.shutdown()
        self.server_close()


class ChatServer(Loopback):
    """An endpoint on loopback at `url`. reply(messages) is the text of the assistant, or the whole body as a dict.

    faults  a plan: {name in FAULTS or FOR_GOOD: probability}, drawn anew for each try of a request, by its content and the
            seed alone, so that the order in which threads ask does not matter; or a list, a name, a fault of one's own or
            None (none) for one request after the other, and none after its end; or a function of the messages that
            returns one of these
    seen    the requests, in order; `failed` counts the faults by name
    """
    def __init__(self, reply: Callable[[list[dict]], str | dict], faults: dict | list | Callable = (), *,
                 seed: int = 0, port: int = 0):
        super().__init__(port)
        self.reply, self.seed = reply, seed
        self.faults = faults if isinstance(faults, dict) or callable(faults) else list(faults)
        self.failed = Counter()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self._tries, self._lock = Counter(), threading.Lock()

    def answer(self, handler, raw):
        body, headers = json.loads(raw), {name.lower(): value for name, value in handler.headers.items()}
        with self._lock:
            self.seen.append(Request(handler.path, headers, body, time.monotonic()))
            fault = self.faults(body["messages"]) if callable(self.faults) else self._draw(hashlib.sha256(raw).hexdigest())
            self.failed.update([fault] if fault else [])
        if handler.path != "/v1/chat/completions":
            return send(handler, {"error": {"message": f"no such path: {handler.path}"}}, 404)
        text = self.reply(body["messages"])
        good = text if isinstance(text, dict) else completion(text, prompt_tokens=10 * len(body["messages"]))
        ((FAULTS | FOR_GOOD).get(fault, fault) or send)(handler, json.dumps(good).encode())

    def _draw(self, content):
        if isinstance(self.faults, list):
            return self.faults.pop(0) if self.faults else None
        self._tries[content] += 1
        draw = random.Random(f"{self.seed} {content} {self._tries[content]}")
        names = [*self.faults, None]
        return draw.choices(names, [*self.faults.values(), 1 - sum(self.faults.values())])[0]


def completion(text: str | None, finish_reason: str = "stop", **usage) -> dict:
    """The body of a right reply; its tokens are words."""
    usage = {"completion_tokens": len((text or "").split()), **usage}
    return {"object": "chat.completion", "usage": usage, "choices": [
        {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}]}


def parts(message: dict) -> tuple[str, Image.Image | None]:
    """The text and the image of a user message."""
    content = message["content"]
    if isinstance(content, str):
        return content, None
    image, text = content
    head, data = image["image_url"]["url"].split(",")
    assert (head, image["type"], text["type"]) == ("data:image/png;base64", "image_url", "text")
    return text["text"], Image.open(io.BytesIO(base64.b64decode(data, validate=True)))


def stand_in(path: str | Path) -> Callable[[list[dict]], str]:
    """reply(messages) that calls a tool once, then gives the gold answer of a task of the file; None of them: "unknown"."""
    sys.path.insert(0, str(ROOT))
    from data.tasks import load_tasks
    from tools import open_picture
    known: dict[str | None, list[dict]] = {}
    for task in load_tasks(path):
        picture = task["image"] and open_picture(task["image"])
        known.setdefault(_digest(picture), []).append(task)

    def reply(messages):
        text, picture = parts(messages[0])
        task = next((task for task in known.get(_digest(picture), []) if text.startswith(task["question"])), None)
        if task is None or len(messages) > 1:
            return f"<think> I know it. </think> <answer> {task['answers'][0] if task else 'unknown'} </answer>"
        if task["family"] == "search":
            return f"<think> I look it up. </think> <search> {task['question']} </search>"
        return ("<think> I turn it. </think> <code>\nfrom PIL import Image\nImage.open('path_to_input_image.jpg').rotate(180)"
                ".save('path_to_output_image.jpg', 'PNG')\n</code>")
    return reply


def _digest(picture):
    return picture and hashlib.sha256(picture.convert("RGB").tobytes()).hexdigest()


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.partition("\n")[0])
    parser.add_argument("--port", type=int, default=8001)
    parser.add_argument("--tasks", default=str(ROOT / "data" / "offline" / "heldout.json"), help="whose answers it knows")
    parser.add_argument("--faults", type=float, default=0.0, help="share of the requests that fail, in one of many ways")
    parser.add_argument("--seed", type=int, default=0, help="of the faults")
    args = parser.parse_args()
    server = ChatServer(stand_in(args.tasks), dict.fromkeys(QUICK, args.faults / len(QUICK)), seed=args.seed, port=args.port)
    print(f"{server.url}, {args.faults:.0%} of the requests fail; Ctrl-C ends it", flush=True)
    with suppress(KeyboardInterrupt):
        server.serve_forever()
    print(f"{len(server.seen)} requests; failed: {dict(server.failed)}")


if __name__ == "__main__":
    main()
