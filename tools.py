"""The tools of the agent: find the action in a turn, run image code, search a corpus.

    parse_action(text) -> Action                what the model asks for
    CodeTool().run_many([(code, image), …])     image code, each call in an isolated child process
    SearchTool("sqlite:corpus.jsonl")           text search
A tool that fails returns a result that the model reads. Broken machinery raises RuntimeError instead: it is never
scored as the model's fault. Left out: web search. The trainer has threads and a GPU, so it never forks: each worker is
a warm server, this file with `--serve`, that has numpy, Pillow and (if there) cv2 loaded and forks a child per call.

Covered by the code tool, each line with its test in tests/test_tools.py (L: on Linux only):
- the state of one call cannot reach the next                         test_state_does_not_leak
- loops and sleeps end at the time limit                              test_time_limit
- no process outlives its call, not even a daemon (L)                 test_daemon_dies_with_its_call
- limits on memory (L), size of a file, number of open files          test_resource_limits
- the trainer's environment is not there to be read                   test_no_secrets
- no network (L, where the kernel allows user namespaces)             test_no_network
- an output that is no plain file or image, or too large or small     test_bad_outputs
- a forged or malformed reply, a killed server                        test_forged_reply, test_killed_server
- the trainer dies: so do its servers and their calls                 test_trainer_killed
Not covered, on purpose; for these run the trainer in a container: other files that the user may read or write, signals
to the user's other processes (a daemon of code that also kills its server lives on), fork bombs, a disk filled with
many files, bugs of the kernel. Windows is not supported.
"""
import ctypes
import json
import os
import re
import resource
import shutil
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple
from urllib.parse import quote

from PIL import Image, ImageOps

INPUT, OUTPUT = "path_to_input_image.jpg", "path_to_output_image.jpg"  # the names that the released prompt gives
MIN_SIDE, MAX_ASPECT, MAX_PIXELS = 28, 200, 4096 * 4096  # the vision tower refuses a shorter side or a longer strip
MAX_TEXT = 2_000  # characters that the model reads of an error
GRACE = 15.0  # seconds; a server that is silent for so long past the time limit counts as dead


@dataclass(frozen=True)
class ToolResult:
    ok: bool
    text: str  # what the model reads
    image: Image.Image | None  # RGB
    error: str | None  # a short kind for the metrics, None when ok
    seconds: float


TOOLS_OFF = ToolResult(False, "The tool is switched off.", None, "off", 0.0)


# ---- the action of a turn
class Action(NamedTuple):
    kind: str  # "search", "problem", "code", "answer" or "invalid"
    content: str


TAG = re.compile(r"<(/?)(search|problem|code|answer)>")


def parse_action(text: str) -> Action:
    """The action of a turn: the only `<tag>…</tag>` behind the first `</think>` (in all of the text without it).

    The content is stripped, code also of its ``` fence. Anything but one opening tag and its closing tag (a third
    action tag inside the pair, or an unpaired one) is Action("invalid", text). Linear in the length of the text.
    """
    _, think, after = text.partition("</think>")
    turn = after if think else text
    tags = list(TAG.finditer(turn))
    if [tag[1] for tag in tags] != ["", "/"] or tags[0][2] != tags[1][2]:
        return Action("invalid", text)
    kind, content = tags[0][2], turn[tags[0].end():tags[1].start()].strip()
    if kind == "code" and "```" in content:
        content = re.sub(r"\A(python3?|py)?[ \t]*\n", "", content.split("```")[1]).strip()
    return Action(kind, content)


# ---- frames: all that passes between trainer, server and child
KINDS = ("ok", "timeout", "exception", "no_output", "bad_image", "memory", "crash")
FRAME = struct.Struct("!IIII")  # a number, bytes of text, width, height; then the text and raw RGB


def _send(sock: socket.socket, number: int, text: str, image: Image.Image | None) -> None:
    """`number` is the time limit in ms of a request and the index in KINDS of a reply."""
    data, (width, height) = text.encode("utf-8", "replace"), image.size if image else (0, 0)
    sock.settimeout(GRACE)
    sock.sendall(FRAME.pack(number, len(data), width, height) + data + (image.tobytes() if image else b""))


def _receive(sock: socket.socket, deadline: float = float("inf")) -> tuple[int, str, Image.Image | None]:
    """ValueError if too large, EOFError if nobody is there, TimeoutError past the deadline (seconds of `monotonic`)."""
    number, text_bytes, width, height = FRAME.unpack(_read(sock, FRAME.size, deadline))
    if text_bytes > 1 << 20 or width * height > MAX_PIXELS:
        raise ValueError(f"a frame of {text_bytes} bytes of text and {width}x{height} pixels")
    text, rgb = _read(sock, text_bytes, deadline).decode("utf-8", "replace"), _read(sock, width * height * 3, deadline)
    return number, text, Image.frombytes("RGB", (width, height), rgb) if rgb else None


def _read(sock: socket.socket, size: int, deadline: float) -> bytes:
    data = bytearray()
    while len(data) < size:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        sock.settimeout(None if left == float("inf") else left)
        chunk = sock.recv(min(size - len(data), 1 << 20))
        if not chunk:
            raise EOFError
        data += chunk
    return bytes(data)


# ---- the child: one call
def _child(code: str, folder: str, timeout: float, reply: socket.socket) -> None:
    """Never returns: whatever goes wrong in here must not run on as a second server."""
    try:
        _limit(folder, timeout)
        kind, text, image = _run_code(code, os.path.join(folder, OUTPUT))
        _send(reply, KINDS.index(kind), text[:MAX_TEXT], image)
    finally:
        os._exit(0)


def _limit(folder: str, timeout: float) -> None:
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):  # 0 was the server's line to the trainer
        os.dup2(null, fd)
    os.chdir(folder)
    os.environ.update(HOME=folder, TMPDIR=folder)
    limits = {resource.RLIMIT_CPU: int(timeout) + 2, resource.RLIMIT_FSIZE: 64 << 20, resource.RLIMIT_NOFILE: 64,
              resource.RLIMIT_CORE: 0}
    if sys.platform == "linux":
        _libc("prctl", 1, signal.SIGKILL)  # PR_SET_PDEATHSIG: die with the server
        with open("/proc/self/statm") as file:
            limits[resource.RLIMIT_AS] = int(file.read().split()[0]) * resource.getpagesize() + (2 << 30)
    for limit, value in limits.items():
        hard = resource.getrlimit(limit)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))


def _run_code(code: str, output: str) -> tuple[str, str, Image.Image | None]:
    """(kind, text, image) of one call."""
    try:
        with suppress(SystemExit):  # a script may end so; what counts is its output
            # One dict for globals and locals, as in a script: functions and comprehensions see the imports.
            exec(compile(code, "<code>", "exec", dont_inherit=True), {"__name__": "__main__"})
    except BaseException as error:  # the model's code may raise anything
        return "memory" if isinstance(error, MemoryError) else "exception", f"Error: {_describe(error)}", None
    try:
        return "ok", "", _open_output(output)
    except FileNotFoundError:
        return "no_output", f"Error: the code wrote no '{OUTPUT}'", None
    except Exception as error:  # Pillow's decoders raise many kinds on broken files
        return "bad_image", f"Error: '{OUTPUT}' is unusable: {error}", None


def _describe(error: BaseException) -> str:
    """`line 3: NameError: name 'x' is not defined`; the line is the deepest one inside the model's code."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<code>"]
    line = lines[-1] if lines else getattr(error, "lineno", None)  # a SyntaxError has no frame
    message = " ".join(traceback.format_exception_only(error)[-1].split())
    return f"line {line}: {message}" if line else message


def _open_output(path: str) -> Image.Image:
    if os.path.lexists(path) and (os.path.islink(path) or not os.path.isfile(path)):
        raise ValueError("it is not a regular file")  # a fifo would never end
    with Image.open(path, formats=("JPEG", "PNG", "BMP", "WEBP", "TIFF")) as image:
        if image.width * image.height > MAX_PIXELS:  # the header claims so: nothing is decoded yet
            raise ValueError(f"it has {image.width}x{image.height} pixels, more than {MAX_PIXELS}")
        return ImageOps.exif_transpose(image).convert("RGB")


# ---- the server: one child after another
def _serve() -> None:
    """Answers the requests on file descriptor 0 until the trainer closes its end or dies."""
    if sys.platform == "linux":
        with suppress(OSError):  # many containers refuse it
            _libc("unshare", 0x10000000 | 0x40000000)  # CLONE_NEWUSER | CLONE_NEWNET
        _libc("prctl", 36, 1)  # PR_SET_CHILD_SUBREAPER: orphans of the child become ours, so that we can kill them
        _libc("prctl", 4, 0)  # PR_SET_DUMPABLE: no way for the child to our memory and our line through /proc
    import numpy, PIL.ImageDraw, PIL.ImageEnhance, PIL.ImageFilter  # noqa: E401, F401  warm for every child
    with suppress(ImportError):
        import cv2
        cv2.setNumThreads(0)  # threads do not survive a fork
    Image.init()
    copy = f"from PIL import Image; Image.open('{INPUT}').save('{OUTPUT}')"
    reply = _serve_call(copy, Image.new("RGB", (MIN_SIDE, MIN_SIDE)), timeout=GRACE)  # what fails here is our fault
    sock = socket.socket(fileno=0)
    with suppress(EOFError, ConnectionError):
        while True:
            _send(sock, *reply)
            timeout_ms, code, image = _receive(sock)
            reply = _serve_call(code, image, timeout_ms / 1000)


def _libc(function: str, *args: int) -> None:
    """A system call that Python has no name for."""
    if getattr(ctypes.CDLL(None, use_errno=True), function)(*map(ctypes.c_ulong, args)) != 0:
        raise OSError(ctypes.get_errno(), f"{function}{args}")


def _serve_call(code: str, image: Image.Image, timeout: float) -> tuple[int, str, Image.Image | None]:
    folder = tempfile.mkdtemp(dir=os.getcwd())
    image.save(os.path.join(folder, INPUT), "PNG", compress_level=0)  # lossless; Pillow and cv2 look at the content
    ours, theirs = socket.socketpair()
    deadline = time.monotonic() + timeout
    child = os.fork()
    if child == 0:
        ours.close()
        _child(code, folder, timeout, theirs)
    theirs.close()
    try:
        return _receive(ours, deadline)
    except TimeoutError:
        return KINDS.index("timeout"), f"Error: the code ran longer than {timeout:g} s", None
    except (EOFError, OSError, ValueError):
        return KINDS.index("crash"), "Error: the process of the code died", None
    finally:
        _kill_tree(child)
        ours.close()
        shutil.rmtree(folder, ignore_errors=True)


def _kill_tree(child: int) -> None:
    """Kills and reaps the child and all that it started; a process that dies hands its orphans to us (Linux)."""
    with suppress(ProcessLookupError, PermissionError):  # the group is not there yet, or only as zombies (macOS)
        os.killpg(child, signal.SIGKILL)
    os.kill(child, signal.SIGKILL)
    with suppress(ChildProcessError):  # nothing is left
        while True:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                if sys.platform == "linux":
                    with open(f"/proc/self/task/{os.getpid()}/children") as file:
                        for pid in file.read().split():
                            os.kill(int(pid), signal.SIGKILL)
                time.sleep(0.0005)


# ---- the code tool: the trainer's side
class CodeTool:
    """Runs image code on `workers` warm servers, at most `timeout` seconds a call. A context manager."""

    def __init__(self, workers: int = 2, timeout: float = 5.0):
        self.timeout = timeout
        self._folder = tempfile.TemporaryDirectory(prefix="code_tool_", ignore_cleanup_errors=True)
        self._pool = ThreadPoolExecutor(workers)  # as many threads as servers: `_idle` is never empty when one asks
        self._idle = list(self._pool.map(lambda _: self._start(), range(workers)))

    def __enter__(self) -> "CodeTool":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """Waits for the calls under way, ends the servers, removes their folder. Later calls raise RuntimeError."""
        self._pool.shutdown()
        while self._idle:
            self._stop(*self._idle.pop())
        self._folder.cleanup()

    def run(self, code: str, image: Image.Image) -> ToolResult:
        return self.run_many([(code, image)])[0]

    def run_many(self, calls: list[tuple[str, Image.Image]]) -> list[ToolResult]:
        """Side by side; the results stand in the order of the calls. RuntimeError if the machinery is broken."""
        # Converted before the threads start: loading a file image, which a group shares, in two of them is not safe.
        return list(self._pool.map(self._call, [(code, image.convert("RGB")) for code, image in calls]))

    def _call(self, call: tuple[str, Image.Image]) -> ToolResult:
        started, (process, sock) = time.monotonic(), self._idle.pop()
        try:
            _send(sock, round(self.timeout * 1000), *call)
            number, text, image = _receive(sock, time.monotonic() + self.timeout + GRACE)
            kind = KINDS[number] if number < len(KINDS) else "crash"
        except ValueError as error:
            self._stop(process, sock)
            raise RuntimeError(f"malformed reply of the code server: {error}") from error
        except (EOFError, OSError):
            if self._stop(process, sock) > 0:
                raise RuntimeError("the code server failed by itself; its traceback is on stderr")
            kind, text, image = "crash", "Error: the code killed its server", None
            process, sock = self._start()
        finally:
            self._idle.append((process, sock))  # a broken one too: the next call replaces it
        width, height = image.size if image else (0, 0)
        if kind == "ok" and (min(width, height) < MIN_SIDE or max(width, height) > MAX_ASPECT * min(width, height)):
            kind, image = "bad_image", None
            text = f"Error: '{OUTPUT}' has {width}x{height} pixels: too small or too narrow"
        error = None if kind == "ok" else kind
        return ToolResult(not error, text[:MAX_TEXT], image, error, time.monotonic() - started)

    def _start(self) -> tuple[subprocess.Popen, socket.socket]:
        """A server that works: neither environment nor open files pass to it. RuntimeError if it does not start."""
        ours, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen([sys.executable, "-I", os.path.abspath(__file__), "--serve"], stdin=theirs,
                                       stdout=subprocess.DEVNULL, cwd=self._folder.name, start_new_session=True,
                                       env={f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")})
        with suppress(EOFError, OSError):
            if _receive(ours, time.monotonic() + 4 * GRACE)[0] == KINDS.index("ok"):
                return process, ours
        raise RuntimeError(f"the code server does not start: exit status {self._stop(process, ours)}, see stderr")

    def _stop(self, process: subprocess.Popen, sock: socket.socket) -> int:
        """The exit status, negative if a signal ended it."""
        sock.close()  # a healthy server ends by itself at this
        with suppress(subprocess.TimeoutExpired):
            return process.wait(timeout=1.0)
        process.kill()
        return process.wait()


# ---- the search tool
def open_sqlite(path: str):
    """Full-text search over a `.jsonl` corpus, indexed in memory, or a `.db` with a table `docs(title, text)` of FTS5.

    The function (query, topk) -> [(text, score)], best first by BM25 (higher is better). ValueError for a bad corpus.
    """
    if path.endswith(".jsonl"):
        database = sqlite3.connect(":memory:")
        database.execute("CREATE VIRTUAL TABLE docs USING fts5(title, text)")
        database.executemany("INSERT INTO docs VALUES (?, ?)", _read_corpus(path))
    elif path.endswith(".db") and os.path.isfile(path):
        database = sqlite3.connect(f"file:{quote(os.path.abspath(path))}?mode=ro", uri=True)
    else:
        raise ValueError(f"a corpus is a .jsonl file or an existing .db file, not {path!r}")

    database.execute("SELECT title, text FROM docs LIMIT 1")  # a wrong database fails here, not in the middle of a run

    def search(query: str, topk: int) -> list[tuple[str, float]]:
        words = dict.fromkeys(re.findall(r"\w+", query.lower()))
        # Quoted words are never FTS5 syntax; 64 of them are plenty, and thousands would take seconds.
        match = " OR ".join(f'"{word}"' for word in list(words)[:64])
        order = "SELECT text, -bm25(docs) FROM docs WHERE docs MATCH ? ORDER BY bm25(docs), rowid LIMIT ?"
        return database.execute(order, (match, topk)).fetchall() if match else []
    return search


def _read_corpus(path: str):
    """(title, text) of every row {"id", "title"?, "contents" or "text"}."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError("no JSON object")
                title, text = row.get("title", ""), row.get("contents", row.get("text"))
                if not isinstance(title, str) or not isinstance(text, str) or not text.strip():
                    raise ValueError('needs a text under "contents" or "text"; "title" is a text too, if given')
            except ValueError as error:
                raise ValueError(f"{path}, row {number}: {error}") from error
            yield title, text


BACKENDS = {"sqlite": open_sqlite}  # scheme of the address -> a function that opens what follows the colon


class SearchTool:
    """Answers text queries with the `topk` best passages of `backend`, an address such as "sqlite:corpus.jsonl"."""

    def __init__(self, backend: str, topk: int = 3):
        scheme, _, address = backend.partition(":")
        if scheme not in BACKENDS:
            raise ValueError(f"unknown search backend {backend!r}; known schemes: {', '.join(BACKENDS)}")
        self._search, self.topk = BACKENDS[scheme](address), topk

    def search_many(self, queries: list[str]) -> list[ToolResult]:
        return [self._query(query) for query in queries]

    def _query(self, query: str) -> ToolResult:
        started = time.monotonic()
        if not query.strip():
            return ToolResult(False, "The query is empty.", None, "empty_query", 0.0)
        passages = [" ".join(text.split()) for text, _ in self._search(query, self.topk)]
        text = " ".join(f"{rank}. Content: {passage}" for rank, passage in enumerate(passages, start=1))
        error = None if passages else "no_results"
        return ToolResult(bool(passages), text or "No results.", None, error, time.monotonic() - started)


if __name__ == "__main__" and sys.argv[1:] == ["--serve"]:
    _serve()
