"""The tools of the agent: find the action in a turn, run image code, search.

    TOOLS                                     what the model may call, one entry a tool
    parse_action(text) -> Action              what the model asks for
    CodeTool().run_many([(code, image), …])   image code; the kernel locks in each call's process
    SearchTool("sqlite:index.sqlite")         a local corpus, a retrieval server or the web

A tool that fails returns a result that the model reads. Broken machinery raises RuntimeError
instead: it is never scored as the model's fault.

How code runs: the trainer has threads, keys and a GPU, so it never forks. Each worker is a warm
server: this file, run with `--serve` in a fixed environment, with numpy, Pillow and (if there) cv2
loaded. It forks a child per call. Before the child runs a line of the code it gives up what it
could do harm with, by Linux's own means: resource limits, capabilities, Landlock (which files) and
a seccomp filter (which system calls). What is left computes, reads the libraries and its picture,
writes one file and sends one reply.

Covered, each line with its test in tests/test_sandbox.py:
- code ends at the time limit: loops, sleeps, code that holds the interpreter        test_time
- no second process or thread, so one SIGKILL ends a call                            test_processes
- memory, at once or page by page, memfd and shared memory                           test_memory
- disk: large, sparse and countless files, output without end on any descriptor      test_output
- outputs that are links, pipes, bombs or no images                              test_output_file
- secrets: the environment, /proc, the user's and the system's files                 test_reading
- files of others: written, truncated, changed, removed, also by odd open flags      test_writing
- every kind of socket, io_uring                                                     test_network
- other processes: signals, leases, ptrace, their memory                     test_other_processes
- the kernel: bpf, perf, keys, mounts, namespaces, 32-bit calls                      test_kernel
- forged, malformed, endless replies                                                test_replies
- a server or a trainer that is killed in a call                                      test_killed
- the state of one call, which cannot reach the next                                  test_state
Not covered: names, sizes and dates of files (stat works); what libraries hold; pixels and code that
earlier calls left in the memory of their server; time on the same cores; the trainer's memory for
results (48 MB each at most); bugs of the kernel.

The output file is there from the start, empty, and no other can be made. Without Landlock (old
kernels, gVisor) the code may open no file at all: it finds its picture as `image` and leaves a
Pillow image as `result`. Without seccomp, or on no Linux, CodeTool refuses to start unless
`unlocked=True`.
"""
import ctypes
import ipaddress
import json
import math
import os
import platform
import random
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
import textwrap
import threading
import time
import traceback
import warnings
import zlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import cache
from glob import escape, glob
from html import unescape
from itertools import count
from typing import TYPE_CHECKING, NamedTuple
from unicodedata import category, normalize
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from PIL import Image

if TYPE_CHECKING:  # it is imported where it is used, as servers of code do without
    import requests

INPUT, OUTPUT = "path_to_input_image.jpg", "path_to_output_image.jpg"  # the released prompt's names
MAX_ASPECT = 200  # of a picture's sides; Qwen's image processor refuses longer strips
MAX_PICTURE = 4096 * 4096  # of a picture; what code and model see at most
MIN_SIDE = 28  # pixels; code may make no smaller picture, unless its input was as small
MAX_TEXT = 8_000  # bytes that the model reads of an error
GRACE = 15.0  # seconds; a server that is silent for so long past the time limit counts as dead


@dataclass(frozen=True)
class ToolResult:
    ok: bool
    text: str  # what the model reads; may be empty where there is an image
    image: Image.Image | None  # RGB
    error: str | None  # a short kind for the metrics, None when ok
    seconds: float
    lost: bool = False  # failed through no fault of the model: server, network or budget


TOOLS_OFF = ToolResult(False, "The tool is switched off.", None, "off", 0.0)


# ---- the table of tools --------------------------------------------------------------------------
class Call(NamedTuple):
    content: str  # what stands between the tags
    pictures: list[Image.Image]  # that the model has seen, the task's own first
    task: dict


@dataclass(frozen=True)
class Tools:
    """The live tools; a call of one that is None is answered that it is switched off."""
    code: "CodeTool | None" = None
    search: "SearchTool | None" = None
    # (code, task, image size) -> the code that is run instead
    edit: Callable[[str, dict, tuple[int, int]], str] | None = None
    newest: bool = False  # code reads the newest picture, so that repairs add up

    def is_on(self, tag: str) -> bool:
        """Whether the tool of a tag runs. A tool that was added is on if code or search is."""
        live = {"code": self.code, "search": self.search}
        return live.get(tag, self.code or self.search) is not None


class Tool(NamedTuple):
    """What answers `<tag> content </tag>`; the tag is its key in TOOLS, of small letters.

    Every rollout may call it, also one whose prompt does not name it.
    """
    families: tuple[str, ...]  # of tasks whose full prompt names the tool
    instruction: str  # its line in that prompt
    # One result for each of at least one call, in their order. What it raises ends the run.
    run: Callable[[Tools, list[Call]], list[ToolResult]]
    observation: str = "{}"  # what the model reads; {} is the result's text


def _process(tools: Tools, calls: list[Call]) -> list[ToolResult]:
    """Code reads the task's image, as in the released chains, or the newest one."""
    pairs = []
    for call in calls:
        pictures = call.pictures
        if not pictures or (call.task["image"] is None and not tools.newest):
            pictures = [Image.new("RGB", (MIN_SIDE, MIN_SIDE))]
        image = pictures[-1 if tools.newest else 0]
        edited = tools.edit(call.content, call.task, image.size) if tools.edit else call.content
        pairs.append((edited, image))
    return tools.code.run_many(pairs)


TOOLS = {
    "search": Tool(
        families=("search",),
        instruction="look something up on the web with a text query: <search> query </search>. The "
                    "results come back between <information> and </information>. You may search "
                    "several times.",
        run=lambda tools, calls: tools.search.search_many([call.content for call in calls]),
        observation="<information> {} </information>"),
    "code": Tool(
        families=("coding",),
        instruction="repair it with Python between <code> and </code>, as a ```python block that "
                    f"reads '{INPUT}' and writes '{OUTPUT}' (Pillow, numpy or OpenCV). The "
                    "processed image comes back;",
        run=_process),
}


def action_tags() -> list[str]:
    """All tags of an action: those of TOOLS, and the two that no tool answers."""
    return [*TOOLS, "problem", "answer"]


# ---- the action of a turn ------------------------------------------------------------------------
class Action(NamedTuple):
    kind: str  # one of action_tags(), or "invalid"
    content: str


# A line that opens a fenced block: perhaps some prose, the marks, and what stands behind them.
FENCE = re.compile(r"""(?:[^`~'"#=(]*|.*[:.][ \t]*)(`{3,}|~{3,})(.*)""")
CODE_BEHIND_FENCE = re.compile(r"\bimport\b|;|\w\(|\s=\s|\A(?!lang)\w+=")  # not an info line
LANGUAGE = re.compile(r"\s*(?:python|py)?[\d.]*\b", re.IGNORECASE)
PYTHON_LINE = re.compile(r"\A\s*(?:python|py)[\d.]*(?: code)?[ \t]*:?[ \t]*\n", re.IGNORECASE)
STATEMENT = re.compile(r"[ \t]*[\w.]+(?:[ \t]*=|\()")  # a line of code: a call, an assignment
PRINTED = re.compile(r"\W*(?:output|stdout|console|result|te?xt)", re.IGNORECASE)  # an info line
ANNOUNCEMENT = re.compile(r"\n.*:[*\s]*\Z")  # a last line such as "Output:"


def parse_action(text: str) -> Action:
    """The action of a turn: the only `<tag>…</tag>` of action_tags() behind the first `</think>`.

    Without `</think>` it is sought in all of the text. The content is stripped; of code, the first
    fenced block is taken if there is one. Anything but one opening tag and its closing tag (a third
    tag inside the pair, or an unpaired one) is Action("invalid", text). Linear in the length.
    """
    _, think, after = text.partition("</think>")
    turn = after if think else text
    tags = list(re.finditer(rf"<(/?)({'|'.join(action_tags())})>", turn))
    if [tag[1] for tag in tags] != ["", "/"] or tags[0][2] != tags[1][2]:
        return Action("invalid", text)
    kind, content = tags[0][2], turn[tags[0].end():tags[1].start()].strip()
    return Action(kind, _unfenced(content) if kind == "code" else content)


def _unfenced(text: str) -> str:
    """Code as a model wrote it: the first fenced block that is called Python, or the first block.

    Empty blocks do not count. Code without a fence wins over a block of what it printed. Without a
    block it is all of the text. A first line that only says python is left out.
    """
    before, blocks = _fenced_blocks(text)
    codes = [(info, textwrap.dedent(code)) for info, code in blocks if code.strip()]
    if codes and PRINTED.match(codes[0][0]) and any(map(STATEMENT.match, before)):
        codes[0] = "", ANNOUNCEMENT.sub("", "\n".join(before))
    named = [code for info, code in codes if re.search(r"\bpy", info, re.IGNORECASE)]
    plain = "\n".join(before).removesuffix("```")
    code = next(iter(named or [code for _, code in codes]), plain)
    return PYTHON_LINE.sub("", code).strip()


def _fenced_blocks(text: str) -> tuple[list[str], list[tuple[str, str]]]:
    """(lines before the first block, (info line, text) of each block). The last may be open."""
    before, blocks = [], []
    mark = None  # of the block that is open
    for line in re.split(r"\r\n?|\n", text.lstrip("\ufeff")):
        if mark and line.lstrip().startswith(mark):
            mark = None
            continue
        if mark is None:
            fence = FENCE.match(line)
            if not fence:
                before += [line] if not blocks else []  # prose between and behind blocks is dropped
                continue
            mark, info = fence.groups()
            blocks.append((info, []))
            if not CODE_BEHIND_FENCE.search(info):
                continue
            line = LANGUAGE.sub("", info, count=1)
        if line.rstrip().endswith(mark) and "#" not in line:  # closed behind the code
            line, mark = line.rstrip().rstrip(mark[0]), None
        blocks[-1][1].append(line)
    return before, [(info, "\n".join(lines)) for info, lines in blocks]


# ---- pictures: one way to read a file, one way to make RGB ---------------------------------------
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF",
                 "JPEG2000")  # those of Pillow's for which it starts no program
UPRIGHT = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
           4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
           6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
           8: Image.Transpose.ROTATE_90}  # by EXIF's orientation
ORIENTATION = 0x0112  # its number in EXIF


def open_picture(path: str | os.PathLike) -> Image.Image:
    """The picture in a file as `to_rgb` makes it, scaled down to MAX_PICTURE if it has more.

    So code may write a picture of the size of its input, however large the file was. Raises
    ValueError if the file is not one of IMAGE_FORMATS or cannot be read.
    """
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as file:
            picture = to_rgb(file)
        scale = math.sqrt(MAX_PICTURE / (picture.width * picture.height))
        if scale >= 1:
            return picture
        return picture.resize([max(1, int(side * scale)) for side in picture.size])
    except Exception as error:  # Pillow's decoders raise many kinds on broken files
        raise ValueError(f"image {path} cannot be read ({error})") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Any picture as RGB, as it is meant to be seen: upright by its EXIF, transparency on white.

    Of a moving picture it is the first frame. Grey of more than 8 bits is scaled: 16 bits by 1/256;
    whole numbers of 32 bits by the bytes that the brightest takes; floats by 255, unless one is
    above 1. A plain RGB picture is returned as it is.
    """
    image.load()  # here, not in the threads that share it
    turn = None
    with suppress(Exception):  # nonsense in the EXIF block, of which Pillow raises many kinds
        turn = UPRIGHT.get(image.getexif().get(ORIENTATION))
    if image.mode == "RGB" and turn is None and "transparency" not in image.info:
        return image
    shown = image
    if image.mode[0] in "IF":
        shown = _eight_bits(image)
    elif image.mode == "La":
        shown = image.convert("LA")
    if shown.has_transparency_data:
        white = Image.new("RGBA", shown.size, "white")
        shown = Image.alpha_composite(white, shown.convert("RGBA"))
    shown = shown.convert("RGB")  # a copy
    shown.info = {}  # or it would be turned again, the next time
    return shown if turn is None else shown.transpose(turn)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 or 32 bits as L, or LA with the one grey transparent that a 16-bit PNG names."""
    if image.mode == "F":
        import numpy
        values = numpy.nan_to_num(numpy.asarray(image), nan=0.0, posinf=0.0, neginf=0.0)
        image = Image.fromarray(values)
        scale = 255 if image.getextrema()[1] <= 1 else 1
        return image.point(lambda value: value * scale + 0.5).convert("L")
    wide = image.convert("I")  # Pillow would clip it to 8 bits
    low_bytes = 1  # below the byte that is kept
    if image.mode == "I":
        low_bytes = (max(wide.getextrema()[1], 1).bit_length() - 1) // 8
    grey = wide.point(lambda value: value * 256.0 ** -low_bytes).convert("L")
    if "transparency" in image.info:
        clear = image.info["transparency"]
        grey.putalpha(wide.point([255 * (value != clear) for value in range(1 << 16)], "L"))
    return grey


# ---- code: what passes between trainer, server and child -----------------------------------------
KINDS = ("ok", "timeout", "exception", "no_output", "bad_image", "memory", "crash")  # of a reply
HEADER = struct.Struct("!IIII")  # number, bytes of text, width, height; text and pixels follow
MAX_REPLY = 1 << 20  # bytes of text


class Frame(NamedTuple):
    """A request or a reply."""
    number: int  # of a request: the milliseconds that it may take; of a reply: its place in KINDS
    text: str
    size: tuple[int, int] = (0, 0)  # width and height of an image, if there is one
    rgb: bytes | bytearray = b""  # its pixels

    def packed(self) -> bytes:
        """As it is sent."""
        data = self.text.encode("utf-8", "replace")
        return HEADER.pack(self.number, len(data), *self.size) + data + self.rgb


def _request(timeout: float, code: str, image: Image.Image) -> Frame:
    return Frame(round(timeout * 1000), code, image.size, image.tobytes())


def _reply(kind: str, text: str, image: Image.Image | None = None) -> Frame:
    pixels = (image.size, image.tobytes()) if image else ()
    return Frame(KINDS.index(kind), text, *pixels)


def _send(sock: socket.socket, frame: Frame) -> None:
    sock.settimeout(GRACE)
    sock.sendall(frame.packed())


def _receive(sock: socket.socket, deadline: float = math.inf) -> Frame:
    """The next frame. The deadline is in seconds of `time.monotonic`; without one, sizes are
    trusted: it is a request of ours. ValueError if it is too large, EOFError if the other end is
    closed, TimeoutError past the deadline."""
    number, text_bytes, width, height = HEADER.unpack(_read(sock, HEADER.size, deadline))
    if deadline < math.inf and (text_bytes > MAX_REPLY or width * height > MAX_PICTURE):
        raise ValueError(f"a frame of {text_bytes} bytes of text and {width}x{height} pixels")
    text = _read(sock, text_bytes, deadline).decode("utf-8", "replace")
    return Frame(number, text, (width, height), _read(sock, width * height * 3, deadline))


def _read(sock: socket.socket, size: int, deadline: float) -> bytearray:
    data, done = bytearray(size), 0
    while done < size:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        sock.settimeout(None if left == math.inf else left)
        received = sock.recv_into(memoryview(data)[done:])
        if received == 0:
            raise EOFError
        done += received
    return data


# ---- code: the trainer's side --------------------------------------------------------------------
# A server gets these variables and, of ours, those without which some interpreters do not start
# (those of a cluster's modules, for instance).
SERVER_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
                      "PYTHONHASHSEED": "0",  # sets in the same order each time
                      # A fresh child touches many pages: large ones save a fifth of its time.
                      "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
START = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "DYLD_FALLBACK_LIBRARY_PATH", "NIX_LD",
         "NIX_LD_LIBRARY_PATH", "PYTHONHOME")
NO_LOCK = 3  # exit status of a server that cannot lock code in


class Server(NamedTuple):
    process: subprocess.Popen
    sock: socket.socket
    folder: str


def cores_of_rank() -> int:
    """CPU cores that this process may use, shared among torchrun's ranks on this machine."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


class CodeTool:
    """Runs image code on `workers` warm servers, at most `timeout` seconds a call.

    A context manager. workers=0: one for each core of this rank. `unlocked` accepts plain child
    processes, which may do all that the user may, where there is no Linux with seccomp. Raises
    RuntimeError if no server can be started.
    """

    def __init__(self, workers: int = 0, timeout: float = 5.0, unlocked: bool = False):
        workers = workers or cores_of_rank()
        self.timeout, self._unlocked = timeout, unlocked
        self._pool = ThreadPoolExecutor(workers)  # a thread a server, so one is always idle
        self._idle = list(self._pool.map(lambda _: self._start(), range(workers)))

    def __enter__(self) -> "CodeTool":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """Wait for the calls under way and end the servers. Later calls raise RuntimeError."""
        self._pool.shutdown()
        while self._idle:
            self._stop(self._idle.pop())

    def run(self, code: str, image: Image.Image) -> ToolResult:
        """`run_many` of one call."""
        return self.run_many([(code, image)])[0]

    def run_many(self, calls: list[tuple[str, Image.Image]]) -> list[ToolResult]:
        """Results of calls that run side by side, in the order of the calls.

        RuntimeError if the machinery is broken.
        """
        # Made RGB before the threads start: two of them must not load the same file at once.
        return list(self._pool.map(self._call, [(code, to_rgb(image)) for code, image in calls]))

    def _call(self, call: tuple[str, Image.Image]) -> ToolResult:
        started, server = time.monotonic(), self._idle.pop()
        try:
            reply = self._ask(server, *call)
            if reply is None:  # its server was killed: once more, on a new one
                server = self._start()
                reply = self._ask(server, *call)
        finally:
            self._idle.append(server)  # a broken one too, for close()
        reply = reply or _reply("crash", "Error: the server of the code was killed")
        kind = KINDS[reply.number] if reply.number < len(KINDS) else "crash"
        text, image, (width, height) = reply.text, None, reply.size
        if kind == "ok" and (min(width, height) < min(MIN_SIDE, *call[1].size)
                             or max(width, height) > MAX_ASPECT * min(width, height)):
            kind = "bad_image"
            text = f"Error: '{OUTPUT}' has {width}x{height} pixels: too small or too narrow"
        elif kind == "ok":
            image = Image.frombytes("RGB", reply.size, reply.rgb)
        text = text.encode()[:MAX_TEXT].decode(errors="ignore")
        error = None if kind == "ok" else kind
        return ToolResult(kind == "ok", text, image, error, time.monotonic() - started)

    def _ask(self, server: Server, code: str, image: Image.Image) -> Frame | None:
        """The reply; None if a signal ended the server. RuntimeError if it failed by itself."""
        try:
            _send(server.sock, _request(self.timeout, code, image))
            return _receive(server.sock, time.monotonic() + self.timeout + 2 * GRACE)
        except (EOFError, OSError, ValueError) as error:
            if self._stop(server) < 0:
                return None
            raise RuntimeError("the code server failed by itself; its traceback is on stderr"
                               ) from error

    def _start(self, again: bool = True) -> Server:
        """A server that works. RuntimeError if it does not start."""
        ours, theirs = socket.socketpair()
        folder = tempfile.mkdtemp(prefix="code_tool_")
        # Isolated, but not by -I, which would ignore START; there are no other variables.
        command = [sys.executable, "-sP", os.path.abspath(__file__), "--serve"]
        if self._unlocked:
            command.append("--unlocked")
        with theirs:
            process = subprocess.Popen(
                command, stdin=theirs, stdout=subprocess.DEVNULL, cwd=folder,
                start_new_session=True, env=SERVER_ENVIRONMENT | _start_variables())
        server = Server(process, ours, folder)
        with suppress(EOFError, OSError):
            first = _receive(ours, time.monotonic() + 4 * GRACE)
            if first.number == KINDS.index("ok"):
                if first.text:
                    warnings.warn(first.text, stacklevel=2)
                return server
        status = self._stop(server)
        if status < 0 and again:  # killed
            return self._start(again=False)
        way_out = (f"{sys.executable} must find Python, Pillow and numpy with no other variables "
                   f"than {', '.join(START)}")
        if status == NO_LOCK:
            way_out = ("where the kernel cannot lock code in, unlocked=True (--code_unlocked True) "
                       "accepts plain child processes")
        raise RuntimeError(f"the code server does not start (exit status {status}, see its message "
                           f"on stderr); {way_out}")

    def _stop(self, server: Server) -> int:
        """End a server. Its exit status, negative if a signal of others ended it."""
        server.sock.close()  # a healthy server ends by itself at this
        try:
            return server.process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            server.process.kill()
            server.process.wait()
            return 1
        finally:
            shutil.rmtree(server.folder, ignore_errors=True)


def _start_variables() -> dict[str, str]:
    """Those of START that are set here, with the paths that exist."""
    def existing(value: str) -> str:
        paths = value.split(":")
        return ":".join(path for path in paths if os.path.isabs(path) and os.path.exists(path))
    return {name: existing(os.environ[name]) for name in START if name in os.environ}


# ---- code: the server, which forks one child after another ---------------------------------------
LINE = 3  # a child's file descriptor to its server
LOCKED = b"!"  # sent when the lock is on: what goes wrong before it is never the code's fault
LOCK_TEST = """
import os, socket
for attempt in (socket.socket, lambda: os.getsid(0), lambda: os.listdir("/")):
    try:
        attempt()
    except PermissionError:
        continue
    raise SystemError(f"{attempt} works: the lock does not hold")
"""


class Lock(NamedTuple):
    program: bytes  # the seccomp filter
    landlock: int  # the version of Landlock; 0: none


def _serve(unlocked: bool) -> None:
    """Answer the requests on file descriptor 0 until the trainer closes its end or dies."""
    import numpy.random  # noqa: F401  loaded here, once for all children
    import PIL.ImageDraw, PIL.ImageEnhance, PIL.ImageFilter, PIL.ImageShow  # noqa: E401, F401
    PIL.ImageShow._viewers.clear()  # much code ends by showing its picture: no viewer, no error
    with suppress(ImportError):
        import cv2
        cv2.setNumThreads(0)  # threads do not survive a fork
        cv2.imshow = cv2.namedWindow = cv2.waitKey = cv2.destroyAllWindows = lambda *_, **__: -1
    Image.init()
    sys.argv = ["code.py"]
    lock = None if unlocked else _make_lock()
    sock = socket.socket(fileno=0)
    try:
        _test_server(lock)
        reply = _reply("ok", "")
        if lock and not lock.landlock:
            reply = _reply("ok", "no Landlock in this kernel: image code may open no file, "
                           "only use `image` and `result`")
        with suppress(EOFError, ConnectionError):
            while True:
                _send(sock, reply)
                reply = None  # the code of the next call could find it in this frame
                reply = _serve_call(_receive(sock), lock)
    finally:
        shutil.rmtree(os.getcwd(), ignore_errors=True)  # the trainer may have been killed


def _make_lock() -> Lock:
    """Ends the server with NO_LOCK where the system has no such lock."""
    if sys.platform != "linux" or platform.machine() not in MACHINES:
        print(f"image code can be locked in on Linux only, on {' or '.join(MACHINES)}",
              file=sys.stderr)
        sys.exit(NO_LOCK)
    version = _landlock_version()
    _libraries()  # here, once for all children
    return Lock(_seccomp_filter(may_open=version > 0), version)


def _test_server(lock: Lock | None) -> None:
    """Run a call that must work, and see that the lock holds. Ends the server if not."""
    test = "result = image" + LOCK_TEST * (lock is not None)
    image = Image.new("RGB", (MIN_SIDE, MIN_SIDE))
    try:
        reply = _serve_call(_request(GRACE, test, image), lock)
        failure = None if reply.number == KINDS.index("ok") else reply.text
    except RuntimeError as error:
        failure = error
    if failure is not None:
        print(f"the self-test of the code server failed: {failure}", file=sys.stderr)
        sys.exit(NO_LOCK if lock else 1)


def _serve_call(request: Frame, lock: Lock | None) -> Frame:
    """The reply of a new child. RuntimeError if it cannot be locked in."""
    folder, seconds = tempfile.mkdtemp(dir=os.getcwd()), request.number / 1000
    picture = Image.frombytes("RGB", request.size, request.rgb)
    picture.save(os.path.join(folder, INPUT), "BMP")  # the fastest; readers look at the content
    open(os.path.join(folder, OUTPUT), "wb").close()  # a locked child can make no file
    ours, theirs = socket.socketpair()
    is_locked, child = False, os.fork()
    if child == 0:
        ours.close()
        _child(request.text, picture, seconds, folder, theirs.fileno(), lock)
    theirs.close()
    try:
        with suppress(EOFError, TimeoutError):
            is_locked = _read(ours, 1, time.monotonic() + GRACE) == LOCKED
        if not is_locked:
            raise RuntimeError("the child could not be locked in; its traceback is above")
        return _receive(ours, time.monotonic() + seconds)
    except TimeoutError:
        return _reply("timeout", f"Error: the code ran longer than {seconds:g} s")
    except (EOFError, OSError, ValueError):
        return _reply("crash", "Error: the process of the code died")
    finally:  # one process when locked; unlocked code may have started more
        for kill in (os.killpg, os.kill):
            with suppress(ProcessLookupError, PermissionError):
                kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        ours.close()
        shutil.rmtree(folder, ignore_errors=True)


# ---- code: the child, which runs one call --------------------------------------------------------
def _child(code: str, image: Image.Image, seconds: float, folder: str, line: int,
           lock: Lock | None) -> None:
    """Never returns: whatever goes wrong in here must not run on as a second server."""
    try:
        _confine(folder, seconds, line, lock)
        os.write(LINE, LOCKED)
        os.dup2(0, 2)  # from here on errors are the model's
        import numpy  # is loaded
        random.seed(0)  # the same call has the same result
        numpy.random.seed(0)
        kind, text, image = _run_code(code, image, os.path.join(folder, OUTPUT))
        text = text.replace(os.path.join(folder, ""), "").replace(folder, ".")  # a random name
        text = re.sub(r"\bat 0x[0-9a-f]{6,}", "at 0x…", text)  # addresses are random too
        with open(LINE, "wb") as file:
            file.write(_reply(kind, text[:MAX_TEXT], image).packed())
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


def _confine(folder: str, seconds: float, line: int, lock: Lock | None) -> None:
    """What fails in here is the machinery's fault: nothing of the code has run yet."""
    server = os.getppid()
    os.setsid()
    os.chdir(folder)
    limits = {resource.RLIMIT_CPU: int(seconds) + 2, resource.RLIMIT_FSIZE: 64 << 20,
              resource.RLIMIT_NOFILE: 64,
              resource.RLIMIT_CORE: 1}  # bytes: at 0 the kernel would still feed a crash reporter
    if sys.platform == "linux":
        # Where memory runs out, the kernel ends this process, not the trainer.
        with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")  # some containers have the file read-only
        with open("/proc/self/statm") as file:
            now = int(file.read().split()[0]) * resource.getpagesize()
        limits[resource.RLIMIT_AS] = now + (2 << 30)
        _libc("prctl", PR_SET_PDEATHSIG, signal.SIGKILL)  # die with the server, …
        if os.getppid() != server:  # … or now, if it died before
            os._exit(1)
    for limit, value in limits.items():
        hard = resource.getrlimit(limit)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)  # was the server's line to the trainer
    os.dup2(null, 1)
    os.dup2(line, LINE)
    if lock:
        _lock_in(lock)


def _run_code(code: str, image: Image.Image, output: str) -> tuple[str, str, Image.Image | None]:
    """(kind, text, image) of one call."""
    script, said = {"__name__": "__main__", "__file__": "code.py", "image": image}, ""
    try:
        # One dict for globals and locals, as in a script: functions must see the imports.
        exec(compile(code, "<code>", "exec", dont_inherit=True), script)
    except SystemExit as end:  # a script may end so; what counts is its output
        said = f": {end.code}" if isinstance(end.code, str) else ""
    except BaseException as error:  # the model's code may raise anything
        kind = "memory" if isinstance(error, MemoryError) else "exception"
        return kind, f"Error: {_describe(error)}", None
    try:
        made = result if isinstance(result := script.get("result"), Image.Image) else None
        script.clear()  # closes the files that it left open
        if os.path.exists(output) and os.path.getsize(output):
            made = Image.open(output, formats=IMAGE_FORMATS)
        elif made is None:
            return "no_output", f"Error: the code wrote no '{OUTPUT}'{said}", None
        if made.width * made.height > MAX_PICTURE:  # the header claims so: nothing is decoded yet
            raise ValueError(f"it has {made.width}x{made.height} pixels, more than {MAX_PICTURE}")
        return "ok", "", to_rgb(made)
    except Exception as error:  # Pillow's decoders raise many kinds on broken files
        return "bad_image", f"Error: '{OUTPUT}' is unusable: {error}", None


def _describe(error: BaseException) -> str:
    """`line 3: NameError: name 'x' is not defined`; the deepest line inside the model's code."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == "<code>"]
    line = lines[-1] if lines else getattr(error, "lineno", None)  # a SyntaxError has no frame
    message = " ".join(traceback.format_exception_only(error)[-1].split())
    return f"line {line}: {message}" if line else message


# ---- code: the lock, which is what the kernel lets the child do ----------------------------------
# System calls as "name x86_64 aarch64", "-" where a machine has none. All others are refused.
SYSCALLS = """read 0 63, write 1 64, readv 19 65, writev 20 66, pread64 17 67, pwrite64 18 68,
    lseek 8 62, openat 257 56, close 3 57, dup 32 23, dup2 33 -, dup3 292 24, fcntl 72 25,
    fsync 74 82, fdatasync 75 83, ftruncate 77 46, fadvise64 221 223, stat 4 -, lstat 6 -,
    fstat 5 80, newfstatat 262 79, statx 332 291, access 21 -, faccessat 269 48,
    faccessat2 439 439, readlink 89 -, readlinkat 267 78, getcwd 79 17, getdents64 217 61,
    mmap 9 222, mprotect 10 226, munmap 11 215, mremap 25 216, madvise 28 233, msync 26 227,
    mincore 27 232, brk 12 214, futex 202 98, sched_yield 24 124, sched_getaffinity 204 123,
    getcpu 309 168, getrandom 318 278, uname 63 160, sysinfo 99 179, clock_gettime 228 113,
    clock_getres 229 114, clock_nanosleep 230 115, nanosleep 35 101, gettimeofday 96 169,
    time 201 -, times 100 153, getrusage 98 165, getpid 39 172, gettid 186 178, getppid 110 173,
    getuid 102 174, geteuid 107 175, getgid 104 176, getegid 108 177, rt_sigaction 13 134,
    rt_sigprocmask 14 135, rt_sigreturn 15 139, sigaltstack 131 132, restart_syscall 219 128,
    exit 60 93, exit_group 231 94"""
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above, AUDIT_ARCH
CHECKED = {  # (which argument, mask, values that are allowed)
    # O_TRUNC (0x200) only together with writing, and never the access mode 3: until Landlock's
    # third version either emptied any file that the user may write.
    "openat": (2, 0x203, (0, 1, 2, 0x201, 0x202)),
    # Only to duplicate and for flags: a lease or an owner would send signals to others.
    "fcntl": (1, 0xFFFFFFFF, (0, 1, 2, 3, 1030)),
}
# A seccomp filter is a program in classic BPF. Its operations, where it reads, and what it returns:
BPF_LOAD, BPF_MASK, BPF_JUMP_IF_EQUAL, BPF_RETURN = 0x20, 0x54, 0x15, 0x06
AT_CALL, AT_MACHINE, AT_ARGUMENTS = 0, 4, 16  # bytes in struct seccomp_data; 8 an argument
ALLOW, REFUSE, KILL = 0x7FFF0000, 0x00050001, 0x80000000  # REFUSE: with EPERM
# Numbers of <linux/prctl.h>, <linux/seccomp.h>, <linux/capability.h> and <linux/landlock.h>.
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38
SECCOMP_MODE_FILTER, CAPABILITY_VERSION_3 = 2, 0x20080522
LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446  # system calls
LANDLOCK_GET_VERSION, LANDLOCK_RULE_PATH_BENEATH = 1, 1
WRITE_FILE, READ_FILE, READ_FOLDER, TRUNCATE = 1 << 1, 1 << 2, 1 << 3, 1 << 14
FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}  # how many each version knows; later ones know 16


def _lock_in(lock: Lock) -> None:
    """From here on this process can do only what the lock allows. OSError if it does not close."""
    _libc("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    header = struct.pack("=Ii", CAPABILITY_VERSION_3, 0)  # 0: of this process
    _libc("capset", header, bytes(24))  # no capabilities, for root neither
    if lock.landlock:
        _landlock(lock.landlock)
    os.closerange(LINE + 1, 1 << 16)
    buffer = ctypes.create_string_buffer(lock.program, len(lock.program))
    program = struct.pack("@HP", len(lock.program) // 8, ctypes.addressof(buffer))
    _libc("prctl", PR_SET_SECCOMP, SECCOMP_MODE_FILTER, program)


def _seccomp_filter(may_open: bool) -> bytes:
    """The filter, instructions of (operation, jump if equal, jump if not, value)."""
    column, machine = MACHINES[platform.machine()]
    program = [(BPF_LOAD, 0, 0, AT_MACHINE), (BPF_JUMP_IF_EQUAL, 1, 0, machine),
               (BPF_RETURN, 0, 0, KILL),  # a call as another machine numbers them: int 0x80
               (BPF_LOAD, 0, 0, AT_CALL)]
    for entry in SYSCALLS.split(","):
        name, *numbers = entry.split()
        if numbers[column] == "-" or (name == "openat" and not may_open):
            continue
        body = [(BPF_RETURN, 0, 0, ALLOW)]
        if name in CHECKED:
            argument, mask, values = CHECKED[name]
            tests = [(BPF_JUMP_IF_EQUAL, len(values) - i, 0, value)
                     for i, value in enumerate(values)]
            body = [(BPF_LOAD, 0, 0, AT_ARGUMENTS + 8 * argument), (BPF_MASK, 0, 0, mask), *tests,
                    (BPF_RETURN, 0, 0, REFUSE), *body]
        program += [(BPF_JUMP_IF_EQUAL, 0, len(body), int(numbers[column])), *body]
    program.append((BPF_RETURN, 0, 0, REFUSE))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


def _landlock(version: int) -> None:
    """From here on this process reads the libraries and its folder, and writes the output file."""
    all_rights = (1 << FILE_RIGHTS.get(version, 16)) - 1  # to files, as far as this kernel knows
    refused = [all_rights]
    if version >= 4:
        refused.append(3)  # to listen and to connect by TCP
    if version >= 6:
        refused.append(3)  # to reach sockets and processes outside
    attributes = struct.pack(f"={len(refused)}Q", *refused)
    ruleset = _libc("syscall", LANDLOCK_CREATE_RULESET, attributes, len(attributes), 0)
    files = "/etc/ld.so.cache", "/usr/share/fonts", "/usr/share/zoneinfo", "/dev/urandom"
    rights_to = dict.fromkeys([*_libraries(), *files, os.getcwd()], READ_FILE)
    rights_to |= {os.devnull: READ_FILE | WRITE_FILE, OUTPUT: READ_FILE | WRITE_FILE | TRUNCATE}
    for path, rights in rights_to.items():
        if not os.path.exists(path):
            continue
        if os.path.isdir(path):
            rights |= READ_FOLDER
        beneath = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = struct.pack("=Qi", rights & all_rights, beneath)
        _libc("syscall", LANDLOCK_ADD_RULE, ruleset, LANDLOCK_RULE_PATH_BENEATH, rule, 0)
        os.close(beneath)
    _libc("syscall", LANDLOCK_RESTRICT_SELF, ruleset, 0)


def _landlock_version() -> int:
    """0 where the kernel has none."""
    with suppress(OSError):
        return _libc("syscall", LANDLOCK_CREATE_RULESET, 0, 0, LANDLOCK_GET_VERSION)
    return 0


@cache
def _libraries() -> list[str]:
    """Folders of libraries. Of the loader's own variables only the libraries, as files: such a
    folder may hold anything."""
    prefixes = {sys.prefix, sys.base_prefix, "/usr", "/usr/local", "/"}
    folders = {os.path.realpath(os.path.join(prefix, lib))
               for prefix in prefixes for lib in ("lib", "lib64")}
    named = [folder for name in START if name.endswith("_PATH")
             for folder in os.environ.get(name, "").split(":") if folder]
    files = {os.path.realpath(file) for folder in named for file in glob(f"{escape(folder)}/*.so*")}
    inside = tuple(f"{folder}/" for folder in folders)
    return [*folders, *(file for file in files if not file.startswith(inside))]


def _libc(function: str, *args: int | bytes) -> int:
    """A call that Python has no name for. OSError if it fails."""
    passed = [arg if isinstance(arg, bytes) else ctypes.c_ulong(arg) for arg in args]
    result = getattr(ctypes.CDLL(None, use_errno=True), function)(*passed)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{os.strerror(number)}: {function}{args}")
    return result


# ---- the search tool -----------------------------------------------------------------------------
Passages = list[tuple[str, str]]  # [(text, address of its page or "")], best first
FETCH_SECONDS, RETRY_SECONDS = 20.0, 60.0  # of one request; of all tries without a success between
MAX_BODY, MAX_ADDRESS = 4 << 20, 8_000  # bytes of a reply; characters
MAX_PASSAGE = 1_200  # characters of a passage that the model reads
PAGE_PASSAGE = 600  # characters of a passage of a page
MAX_RANKED = 50_000  # passages that are ranked for a query of nothing but common words


class RequestFailed(Exception):
    """A request without a usable reply. The message is a short kind for the metrics.

    retry_after  seconds to wait for the next try; None: as the caller likes; inf: never
    detail       how the body of an error begins, hostile text
    """

    def __init__(self, kind: str, retry_after: float | None = math.inf, detail: str = ""):
        super().__init__(kind)
        self.retry_after, self.detail = retry_after, detail


# Accents and vowel signs, but not those of kana, which make other letters.
MARKS = [mark for mark in map(chr, range(0x300, 0x2e00)) if category(mark) in ("Mn", "Mc")]
MARKS = re.compile(f"[{''.join(MARKS)}]+")
# Scripts without spaces: Thai, Lao, Burmese, Khmer, kana, Han; and Hangul, for its endings.
UNSPACED = re.compile("[\u0e01-\u0eff\u1000-\u109f\u1780-\u17ff\u3005\u3041-\u30ff\u3400-\u9fff"
                      "\uac00-\ud7a3\U00020000-\U0003ffff]+")


def segment(text: str) -> str:
    """Text as it is indexed and searched: lower case, without MARKS, UNSPACED runs as pairs.

    The pairs of characters overlap: "東京都" becomes "東京 京都".
    """
    if text.isascii():
        return text.lower()
    text = normalize("NFKC", MARKS.sub("", normalize("NFKD", text))).casefold()
    return UNSPACED.sub(
        lambda run: f" {' '.join(map(''.join, zip(run[0], run[0][1:]))) or run[0]} ", text)


def distinct_words(text: str) -> list[str]:
    """In the order of the text. Lower-case letters and digits only, so none is syntax to FTS5."""
    return list(dict.fromkeys(re.findall(r"[^\W_]+", segment(text))))


def open_sqlite(address: str) -> Callable[[str, int], Passages]:
    """A local corpus at `sqlite:INDEX`, made by data/build_index.py. (query, topk) -> passages.

    A passage must hold a rare word of the query, one in at most 2 % of all passages (or in at most
    COMMON of build_index.py); ranking all that hold "the" would take seconds. BM25 ranks them by
    all words in at most half of the passages; the rare ones count twice, as FTS5 scores each word
    of a match and they stand in both of its brackets. If nothing is found, the first MAX_RANKED
    passages with any word are ranked. Raises RuntimeError where the index is damaged.
    """
    path = address.partition(":")[2]
    try:
        database = sqlite3.connect(f"file:{quote(os.path.abspath(path))}?mode=ro", uri=True,
                                   check_same_thread=False)
        size = database.execute("SELECT max(id) FROM passages").fetchone()[0] or 0
        database.execute("SELECT * FROM words, common LIMIT 1")  # what is no index fails here
        for (text,) in database.execute("SELECT text FROM passages LIMIT 1"):
            zlib.decompress(text)
    except (sqlite3.Error, zlib.error, TypeError) as error:
        raise ValueError(f"{path} is no index of a corpus ({error}); make one: "
                         "python data/build_index.py CORPUS.jsonl -o INDEX.sqlite") from error

    def best(match: str, limit: int, topk: int) -> Passages:
        sql = """SELECT text FROM passages JOIN
            (SELECT id, score FROM
                (SELECT rowid AS id, bm25(words) AS score FROM words WHERE words MATCH ? LIMIT ?)
            ORDER BY score, id LIMIT ?)
            USING (id) ORDER BY score, id"""
        rows = database.execute(sql, (match, limit, topk)) if match else []
        return [(zlib.decompress(text).decode(), "") for (text,) in rows]

    def search(query: str, topk: int) -> Passages:
        try:
            return find(query, topk)
        except (sqlite3.Error, zlib.error) as error:
            raise RuntimeError(f"{path} is damaged ({error}); build the index again") from error

    def find(query: str, topk: int) -> Passages:
        words = distinct_words(query)[:64]  # plenty; thousands would take seconds
        sql = f"SELECT word, passages FROM common WHERE word IN ({', '.join('?' * len(words))})"
        passages_with = dict(database.execute(sql, words))  # only of words in more than COMMON
        rare = [word for word in words if passages_with.get(word, 0) <= size // 50]
        ranking = [word for word in words if passages_with.get(word, 0) <= size // 2]
        match = f"({' OR '.join(rare)}) AND ({' OR '.join(ranking)})" if rare else ""
        return best(match, -1, topk) or best(" OR ".join(words), MAX_RANKED, topk)
    return search


def open_retrieval(url: str) -> Callable[[str, int], Passages]:
    """A server with Search-R1's protocol at `http(s)://…/retrieve`. (query, topk) -> passages."""
    split_address(url)

    def search(query: str, topk: int) -> Passages:
        asked = {"queries": [query], "topk": topk, "return_scores": True}
        found, passages = json.loads(fetch(url, asked)[0])["result"][0], []
        if not isinstance(found, list):
            raise ValueError("no list of documents")
        for item in found:
            match item:
                case [document, *_] | {"document": document} | document:  # with a score or bare
                    with suppress(ValueError):  # one bad document is no reason to lose the others
                        passages.append((read_document(document)[0], ""))
        if found and not passages:
            raise ValueError("no document has a text")
        if len(passages) < len(found):
            warnings.warn("the retrieval server sends documents without a text; they are left out",
                          stacklevel=2)
        return passages[:topk]
    return search


def open_serper(address: str) -> Callable[[str, int], Passages]:
    """Web search by serper.dev, or by what speaks like it at `serper:URL`.

    (query, topk) -> passages. ValueError without a key in the environment variable SERPER_API_KEY.
    """
    url = address.partition(":")[2] or "https://google.serper.dev/search"
    split_address(url)
    key = os.environ.get("SERPER_API_KEY", "").strip()
    if not re.fullmatch("[!-~]+", key):
        raise ValueError("the search backend serper needs a key in the environment variable "
                         "SERPER_API_KEY")

    def search(query: str, topk: int) -> Passages:
        reply = json.loads(fetch(url, {"q": query, "num": topk}, {"X-API-KEY": key})[0])
        passages = [(str(item.get("snippet") or item.get("title") or ""), str(item.get("link", "")))
                    for item in reply.get("organic", [])[:topk]]
        return [(text, link) for text, link in passages if text]
    return search


BACKENDS = {"sqlite": open_sqlite, "http": open_retrieval, "https": open_retrieval,
            "serper": open_serper}  # by scheme


def read_document(document: dict | str) -> tuple[str, str]:
    """(text as shown, text as indexed) of a document of a corpus or a retrieval server.

    The text stands under "contents", "content" or "text", or is the document. A title of its own
    is shown before it. A title beside "contents" is only indexed, as Search-R1's corpora repeat it
    in the first line of these, in quotes. ValueError if there is no text.
    """
    row = {"contents": document} if isinstance(document, str) else document
    if not isinstance(row, dict):
        raise ValueError("no JSON object")
    texts = {key: row[key].strip() for key in ("contents", "content", "text")
             if isinstance(row.get(key), str)}
    key = next(filter(texts.get, texts), None)
    if not key:
        raise ValueError('needs a text under "contents", "content" or "text"')
    title = str(row["title"]) if isinstance(row.get("title"), str | int) else ""  # any other: none
    title, shown = title.strip('" '), texts[key]
    first, newline, rest = shown.partition("\n")
    heading = first.strip('" ')
    if title and key != "contents":
        shown = f"{title}: {shown}"
    elif newline and title in ("", heading):
        shown = f"{heading}: {rest}"
    return shown, shown if shown.startswith(title) else f"{title} {shown}"


NO_PASSAGES = {"empty_query": "The query is empty.", "no_results": "No results."}  # by error


class SearchTool:
    """Search by a backend: "sqlite:INDEX", the http(s) address of a retrieval server, or "serper".

    pages   the pages of so many results are read too, and the passages nearest to the query taken
            from all of them
    cache   a file that keeps answers from the network, for all ranks and runs
    budget  requests over the network, retries included, that all ranks of torchrun may send; 0: no
            end. When a rank has used its share, its new queries fail and `spent` is True.

    ValueError for what cannot work.
    """

    def __init__(self, backend: str, topk: int = 3, *, pages: int = 0, cache: str | None = None,
                 budget: int = 0):
        scheme, ranks = backend.partition(":")[0], int(os.environ.get("WORLD_SIZE", 1))
        if scheme not in BACKENDS:
            raise ValueError(f"unknown search backend {backend!r}; known schemes: "
                             f"{', '.join(BACKENDS)}")
        if topk < 1 or pages < 0 or budget < 0:
            raise ValueError(f"a search needs a topk ({topk}) from 1, pages ({pages}) and a budget "
                             f"({budget}) from 0")
        if 0 < budget < ranks:
            raise ValueError(f"--search_budget {budget} does not divide among {ranks} ranks; "
                             f"give at least {ranks}")
        if pages and scheme != "serper":
            raise ValueError(f"the search backend {backend!r} names no pages to read: "
                             "this needs serper")
        self.spent, self._asked = False, [backend, topk, pages]
        self._topk, self._pages = topk, pages
        self._backend, self._threads = BACKENDS[scheme](backend), ThreadPoolExecutor(8)
        if scheme == "sqlite":
            cache, budget = None, 0
        self._budget = threading.Semaphore(budget // ranks) if budget else None
        self._cache, self._cache_lock = _open_cache(cache) if cache else None, threading.Lock()

    def search_many(self, queries: list[str]) -> list[ToolResult]:
        """Side by side; the results stand in the order of the queries.

        Queries that differ only in case and spaces are asked once. Failures are results.
        """
        self._give_up, self._cache_works = time.monotonic() + RETRY_SECONDS, bool(self._cache)
        queries = [_one_line(query) for query in queries]
        distinct = {query.lower(): query for query in queries}
        results = dict(zip(distinct, self._threads.map(self._search, distinct.values())))
        return [results[query.lower()] for query in queries]

    def check(self) -> None:
        """Ask once, without cache and budget. ValueError if the backend does not answer."""
        budget, self._budget = self._budget, None
        self._give_up = time.monotonic() + RETRY_SECONDS
        try:
            self._ask("test")
        except RequestFailed as failure:
            raise ValueError(f"the search backend {self._asked[0]!r} does not answer: "
                             f"{failure}") from failure
        finally:
            self._budget = budget

    def _search(self, query: str) -> ToolResult:
        started, passages, lost = time.monotonic(), [], False
        try:
            passages = self._look_up(query) if query else []
            error = None if passages else "no_results" if query else "empty_query"
        except RequestFailed as failure:
            error, lost = str(failure), True
        text = " ".join(f"{rank}. Content: {_shortened(passage)}"
                        for rank, passage in enumerate(passages, start=1))
        text = text or NO_PASSAGES.get(error, f"The search failed: {error}.")
        return ToolResult(not error, text, None, error, time.monotonic() - started, lost)

    def _look_up(self, query: str) -> list[str]:
        """The passages that the cache has, or else those of the backend, which are put there.

        They are kept also where a page could not be read, or each run would try it again.
        """
        key = json.dumps([*self._asked, query.lower()])
        for (known,) in self._cached("SELECT passages FROM answers WHERE key = ?", key):
            with suppress(ValueError, TypeError):  # damaged
                passages = json.loads(known)
                if isinstance(passages, list) and all(isinstance(each, str) for each in passages):
                    return passages
        found = self._ask(query)
        passages = self._read_pages(query, found) if self._pages else [text for text, _ in found]
        self._cached("INSERT OR REPLACE INTO answers VALUES (?, ?)", key, json.dumps(passages))
        return passages

    def _cached(self, sql: str, *values: str) -> list[tuple]:
        """The rows, fetched whole: an open query holds off the writes of other ranks.

        Where the cache is broken, full or locked for long, the other queries of this
        `search_many` go on without it.
        """
        with self._cache_lock:
            try:
                return self._cache.execute(sql, values).fetchall() if self._cache_works else []
            except sqlite3.Error as error:
                self._cache_works = False
                warnings.warn(f"the search cache fails: {error}", stacklevel=2)
                return []

    def _ask(self, query: str) -> Passages:
        """The backend's answer. After a failure it is asked again, with growing pauses.

        All queries share one deadline, `_give_up`, which each answer puts off: a server that
        answers slowly is not dead.
        """
        wait, failure = 0.0, RequestFailed("timeout")  # of a query whose turn comes too late
        for attempt in count():
            if time.monotonic() + wait > self._give_up:
                raise failure
            time.sleep(wait)
            if self._budget and not self._budget.acquire(blocking=False):
                self.spent = True
                raise RequestFailed("budget")
            try:
                found = self._backend(query, self._topk)
                self._give_up = time.monotonic() + RETRY_SECONDS
                return found
            except RequestFailed as error:
                failure = error
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
                failure = RequestFailed("bad_reply", None)  # no JSON, or of another shape
            warnings.warn(f"the search backend fails: {failure}", stacklevel=2)  # once a kind
            # At random, so that ranks which fail together do not come back together; not from
            # `random` itself, whose state belongs to the run.
            pause = random.SystemRandom().uniform(1.0, 1.5)
            wait = pause * max(failure.retry_after or 0.0, 0.5 * 2 ** attempt)

    def _read_pages(self, query: str, found: Passages) -> list[str]:
        """The snippets and the passages of the first pages, nearest to the query first.

        Each word that a passage shares with the query counts, the rarer the more.
        """
        rows = [text for text, _ in found]
        for _, link in found[:self._pages]:
            with suppress(RequestFailed):  # its snippet is there in any case
                text, kind = fetch(link, public=True)
                text = _one_line(page_text(text) if "html" in kind else text)
                # At spaces; some scripts have none.
                rows += re.findall(rf".{{1,{PAGE_PASSAGE}}}(?!\S)|.{{{PAGE_PASSAGE}}}", text)
        wanted = set(distinct_words(query))
        shared = {row: wanted.intersection(distinct_words(row)) for row in rows}
        counts = Counter(word for words in shared.values() for word in words)

        def nearness(row: str) -> float:
            return math.fsum(math.log(1 + len(rows) / counts[word]) for word in shared[row])
        return sorted(shared, key=nearness, reverse=True)[:self._topk]


def _open_cache(path: str) -> sqlite3.Connection:
    """ValueError for a file that is no cache."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    try:
        cache = sqlite3.connect(path, timeout=10.0, isolation_level=None, check_same_thread=False)
        cache.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, passages TEXT)")
        cache.execute("SELECT key, passages FROM answers LIMIT 1")  # a foreign table fails here
    except sqlite3.Error as error:
        raise ValueError(f"the search cache {path} is unusable ({error}): "
                         "delete it or name another file") from error
    return cache


def _one_line(text: str) -> str:
    """With single spaces, and without half surrogate pairs, which JSON can spell."""
    return " ".join(text.encode("utf-8", "replace").decode().split())


def _shortened(passage: str) -> str:
    text = _one_line(passage)
    return text if len(text) <= MAX_PASSAGE else text[:MAX_PASSAGE] + " […]"


# ---- the network, where everything may be slow, endless, broken or hostile -----------------------
REDIRECTS = 4  # that are followed to a public page
# Of texts: Python knows others too, some of which take hours to decode.
CHARSETS = re.compile("utf-?(8|16|32)|iso|windows|cp|gb|big5|euc|shift|koi8|(us-)?ascii|latin")


def fetch(url: str, payload: dict | None = None, headers: dict | None = None,
          public: bool = False, seconds: float | None = None) -> tuple[str, str]:
    """GET, or POST of a payload as JSON -> (text, content type such as "text/html; charset=…").

    RequestFailed if no text of at most MAX_BODY bytes has come after `seconds` (default:
    FETCH_SECONDS), whatever the server does; the kinds are timeout, unreachable, bad_reply and
    http_NNN. No redirect is followed, as the headers may hold a key.

    `public` is for addresses that search results name: only texts are taken, redirects are
    followed, and every host that is connected to must be of the public internet.

    The request has a thread of its own, which is left to itself at the deadline. It ends with the
    next part of the body, or after `seconds` without a byte; a server that sends a header without
    end keeps it until the connection ends.
    """
    seconds = FETCH_SECONDS if seconds is None else seconds
    reply = Future()

    def run() -> None:
        try:
            reply.set_result(_exchange(url, payload, headers or {}, public, seconds))
        except Exception as error:
            while error.__context__:  # requests wraps what has happened, up to three times
                error = error.__context__
            reply.set_exception(error.with_traceback(None))  # its frames hold the connection open
    threading.Thread(target=run, daemon=True).start()
    try:
        return reply.result(timeout=seconds)
    except RequestFailed:
        raise
    except Exception as error:  # of requests, urllib3, http.client, ssl, idna
        kind = "unreachable" if isinstance(error, OSError) else "bad_reply"
        kind = "timeout" if isinstance(error, TimeoutError) else kind
        raise RequestFailed(kind, None) from error


def _exchange(url: str, payload: dict | None, headers: dict, public: bool,
              seconds: float) -> tuple[str, str]:
    """What `fetch` returns, but every wait may take `seconds`; raises whatever went wrong."""
    import ssl  # here, as code servers start from this file too and send nothing: saves 60 ms

    import requests
    headers, deadline = {"User-Agent": "visual-arft", **headers}, time.monotonic() + seconds
    verify = ssl.get_default_verify_paths().cafile or True  # SSL_CERT_FILE, the system's or certifi
    for _ in range(1 + REDIRECTS):
        split_address(url)
        method = "GET" if payload is None else "POST"
        request = requests.Request(method, url, headers, json=payload).prepare()
        # No session, which would use proxies and a .netrc, and read the whole body of a redirect.
        with closing(requests.adapters.HTTPAdapter()) as adapter:
            if public:
                _pin(request, adapter)
            body = bytearray()
            with adapter.send(request, stream=True, timeout=seconds, verify=verify) as reply:
                # Not read(), which takes as much at once as a chunk claims to have.
                while len(body) <= MAX_BODY and (part := reply.raw.read1(1 << 16)):
                    body += part
                    if time.monotonic() > deadline:
                        raise TimeoutError
        if not public or not reply.is_redirect:
            break
        url = urljoin(url, reply.headers["Location"])
    if reply.status_code not in (200, 201):
        wait = math.inf
        if reply.status_code in (408, 409, 429) or reply.status_code >= 500:  # these may pass
            wait = None
            with suppress(Exception):  # neither seconds nor a date
                wait = adapter.max_retries.get_retry_after(reply.raw)
        detail = body[:MAX_TEXT].decode("utf-8", "replace")
        raise RequestFailed(f"http_{reply.status_code}", wait, detail)
    kind = reply.headers.get("Content-Type", "text/plain").lower()
    charset = (re.findall(r"""charset\s*=\s*["']?([\w-]+)""", kind) or ["utf-8"])[0]
    if not CHARSETS.match(charset) or public and not kind.startswith("text/"):
        raise ValueError(f"no text that can be read but {kind[:99]}")
    if len(body) > MAX_BODY or reply.headers.get("Content-Encoding", "identity") != "identity":
        raise ValueError("too long or compressed")
    return body.decode(charset, "replace"), kind


def _pin(request: "requests.PreparedRequest", adapter: "requests.adapters.HTTPAdapter") -> None:
    """Connect to an address of the host that is checked here, under the name of the host."""
    parts = split_address(request.url)
    port = f":{parts.port}" if parts.port else ""
    request.url = parts._replace(netloc=_public_address(parts.hostname) + port).geturl()
    request.headers["Host"] = parts.netloc.rpartition("@")[2]
    adapter.poolmanager.connection_pool_kw["server_hostname"] = parts.hostname  # of TLS


def _public_address(host: str) -> str:
    """The IPv4 address of a host. ValueError if it is not of the public internet."""
    address = socket.gethostbyname(host)
    parsed = ipaddress.ip_address(address)
    azure = "168.63.129.16"  # looks public, but is the host of Azure's virtual machines
    if not parsed.is_global or parsed.is_multicast or address == azure:
        raise ValueError(f"{host} is not of the public internet")
    return address


def split_address(url: str) -> SplitResult:
    """The parts of an address of a web server. ValueError if it is none."""
    if len(url) > MAX_ADDRESS:  # urlsplit takes minutes to read some
        raise ValueError("no address of a web server: too long")
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:  # or raises
        raise ValueError(f"no address of a web server: {url!r}")
    return parts


def page_text(html: str) -> str:
    """The text of a page without tags, scripts and styles. Linear in its length, always."""
    first, *rest = re.split(r"<(/?(?:script|style))(?![\w-])[^<>]*>", html, flags=re.IGNORECASE)
    shown = [first, *(text for tag, text in zip(rest[::2], rest[1::2]) if tag[0] == "/")]
    text = re.sub("<(?=[a-zA-Z/!?])[^<>]*>?", " ", " ".join(shown))
    with suppress(ValueError):  # a reference of more than 4,300 digits
        text = unescape(text)
    return text


if __name__ == "__main__" and sys.argv[1:2] == ["--serve"]:
    _serve(unlocked="--unlocked" in sys.argv)
