"""Attacks on the code tool: each is refused for real, leaves nothing behind, and the next call is fine. Nothing is mocked.

Servers of three kinds are attacked: one of the user of the tests; if that is root, one that went on as `nobody`; and one
whose kernel seems to have no Landlock. What must be refused is tried on all three; what ends, fills or kills a server, on the
others than the first only with `-m thorough`. An attack does no harm should a layer be missing: it looks first whether the lock
is on (GUARD), sends signal 0, forks once, takes bounded memory and disk, and writes, connects and signals only what the
test made. Each attempt must end in PermissionError, and the code must run to its end: a misspelt attack fails its test.
"""
import ast
import contextlib
import os
import platform
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import textwrap
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import tools  # noqa: E402
from tools import INPUT, MAX_TEXT, OUTPUT, CodeTool  # noqa: E402

if sys.platform != "linux" or platform.machine() not in tools.MACHINES:
    pytest.skip("code is locked in on Linux only", allow_module_level=True)

X86 = platform.machine() == "x86_64"
NOBODY = 65534
KINDS = ["own", *["nobody"] * (os.geteuid() == 0), "no Landlock"]
LATER = ["own", *[pytest.param(kind, marks=pytest.mark.thorough) for kind in KINDS[1:]]]  # the other kinds are thorough
COPY = f"from PIL import Image\nImage.open({INPUT!r}).save({OUTPUT!r}, 'PNG')\n"

# What nobody may let through, and numbers for attacks: "name x86_64 aarch64" of system calls, as in tools.SYSCALLS.
NUMBERS = """vfork 58 -, fork 57 -, clone 56 220, clone3 435 435, execve 59 221, execveat 322 281, setsid 112 157,
    getsid 124 156, setpgid 109 154, memfd_create 319 279, memfd_secret 447 447, shmget 29 194, msgget 68 186, semget 64 190,
    mq_open 240 180, mlock 149 228, open 2 -, creat 85 -, openat2 437 437, name_to_handle_at 303 264,
    open_by_handle_at 304 265, inotify_init1 294 26, fanotify_init 300 262, sendfile 40 71, copy_file_range 326 285,
    splice 275 76, fallocate 285 47, flock 73 32, ioctl 16 29, truncate 76 45, chmod 90 -, fchmod 91 52, fchmodat 268 53,
    fchmodat2 452 452, chown 92 -, fchown 93 55, fchownat 260 54, unlink 87 -, unlinkat 263 35, rmdir 84 -, rename 82 -,
    renameat 264 38, renameat2 316 276, link 86 -, linkat 265 37, symlink 88 -, symlinkat 266 36, mkdir 83 -, mkdirat 258 34,
    mknod 133 -, mknodat 259 33, utimensat 280 88, setxattr 188 5, fsetxattr 190 7, removexattr 197 14, chdir 80 49,
    fchdir 81 50, chroot 161 51, umask 95 166, socket 41 198, socketpair 53 199, connect 42 203, bind 49 200, listen 50 201,
    accept4 288 242, sendto 44 206, sendmsg 46 211, recvfrom 45 207, recvmsg 47 212, pipe2 293 59, eventfd2 290 19,
    io_uring_setup 425 425, io_setup 206 0, kill 62 129, tkill 200 130, tgkill 234 131, rt_sigqueueinfo 129 138,
    pidfd_open 434 434, pidfd_send_signal 424 424, pidfd_getfd 438 438, setitimer 38 103, timer_create 222 107,
    prlimit64 302 261, ptrace 101 117, process_vm_readv 310 270, process_vm_writev 311 271, process_madvise 440 440,
    kcmp 312 272, migrate_pages 256 238, ioprio_set 251 30, setpriority 141 140, sched_setaffinity 203 122,
    sched_setscheduler 144 119, bpf 321 280, perf_event_open 298 241, keyctl 250 219, add_key 248 217, request_key 249 218,
    mount 165 40, umount2 166 39, pivot_root 155 41, unshare 272 97, setns 308 268, fsopen 430 430, open_tree 428 428,
    move_mount 429 429, init_module 175 105, finit_module 313 273, delete_module 176 106, kexec_load 246 104,
    userfaultfd 323 282, personality 135 92, seccomp 317 277, prctl 157 167, capset 126 91, landlock_restrict_self 446 446,
    setuid 105 146, setresuid 117 147, setgroups 116 159, clock_settime 227 112, sethostname 170 161, swapon 167 224,
    acct 163 89, quotactl 179 60, syslog 103 116, reboot 169 142"""


def numbers(table):
    """{name: number on this machine}"""
    column = tools.MACHINES[platform.machine()][0]
    entries = [entry.split() for entry in table.split(",")]
    return {name: int(columns[column]) for name, *columns in entries if columns[column] != "-"}


HELPERS = f"""
import ctypes, errno, fcntl, mmap, os, pickle, re, signal, socket, struct, subprocess, sys, threading, time
import _thread, numpy
from PIL import Image

def refused(attempt, code=errno.EPERM, name=""):
    try:
        got = attempt()
    except OSError as error:
        if error.errno not in (code, code if LANDLOCK else errno.EPERM):  # without Landlock, seccomp refuses files too
            raise
    else:
        raise SystemError(f"BREACH: {{name}}: {{got!r}}")

def syscall(name, *arguments):
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    number = ctypes.c_long({numbers(NUMBERS)!r}.get(name, name))
    got = libc.syscall(number, *[ctypes.c_long(a) if isinstance(a, int) else a for a in arguments])
    if got == -1:
        raise OSError(ctypes.get_errno(), f"system call {{name}}")
    return got
"""
GUARD = """
import os, socket
for attempt in (socket.socket, lambda: os.getsid(0), lambda: os.listdir("/")):
    try:
        attempt()
    except PermissionError:
        continue
    raise SystemError(f"not locked: {attempt} works")
import numpy
try:
    numpy.empty(4 << 30, 'uint8')  # promised, not touched
except MemoryError:
    pass
else:
    raise SystemError("not locked: there are 4 GB")
"""


def variant(folder, *changes):
    """The path of a changed copy of tools.py; as `tools.__file__` it is what new servers run.

    A change is (old, new), or a piece of the line that is taken out.
    """
    source = Path(tools.__file__).read_text()
    for change in changes:
        if isinstance(change, str):
            [line] = [line for line in source.split("\n") if change in line]
            change = f"\n{line}\n", f"\n{line[:len(line) - len(line.lstrip())]}pass\n"
        assert source.count(change[0]) == 1, change
        source = source.replace(*change)
    path = folder / "tools.py"
    path.write_text(source)
    return str(path)


# Libraries that such a server can no longer read, for attacks that need them.
WARM = """    Image.init()
    import encodings.idna, fcntl, mmap, multiprocessing.popen_fork, multiprocessing.shared_memory, multiprocessing.synchronize
    import pickle, tarfile, zipfile
"""
GET_VERSION = 'return _libc("syscall", LANDLOCK_CREATE_RULESET, 0, 0, LANDLOCK_GET_VERSION)'
AS_NOBODY = "    Image.init()\n", f"""{WARM}
    os.chown(".", {NOBODY}, {NOBODY})
    os.setgroups([]), os.setresgid(*[{NOBODY}] * 3), os.setresuid(*[{NOBODY}] * 3)
    _libc("prctl", 4, 1, 0, 0, 0)  # PR_SET_DUMPABLE: a process of nobody like any other, its files in /proc are its own
"""
NO_LANDLOCK = (GET_VERSION, "return 0"), ("    Image.init()\n", WARM)
UNCHECKED = "LOCK_TEST * (lock is not None)", "\"\""  # a server with a layer less would not start
LAYERS = {"Landlock": "        _landlock(lock.landlock)", "seccomp": '_libc("prctl", PR_SET_SECCOMP',
          "limits": "resource.setrlimit(limit",
          "capabilities": '_libc("capset"'}


@pytest.fixture(scope="module", params=LATER[:-1])
def kind(request, tmp_path_factory):
    """What new servers are like."""
    if request.param != "no Landlock" and not tools._landlock_version():
        pytest.skip("this kernel has no Landlock")
    temporary = Path(tempfile.gettempdir()).resolve()
    if request.param == "nobody" and not all(path.stat().st_mode & 1 for path in (temporary, *temporary.parents)):
        pytest.skip("nobody cannot reach the folder for temporary files")
    changes = {"own": (), "nobody": (AS_NOBODY,), "no Landlock": NO_LANDLOCK}[request.param]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tools, "__file__", variant(tmp_path_factory.mktemp("servers"), *changes))
        yield request.param


all_kinds = pytest.mark.parametrize("kind", KINDS, indirect=True, scope="module")
later = pytest.mark.parametrize("kind", LATER, indirect=True, scope="module")
locked = pytest.mark.parametrize("kind", KINDS[:-1], indirect=True, scope="module")
others = pytest.mark.parametrize("kind", KINDS[1:], indirect=True, scope="module")
own = pytest.mark.parametrize("kind", ["own"], indirect=True, scope="module")


@pytest.fixture(scope="module")
def tool(kind):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # test_without_landlock reads it
        code_tool = CodeTool(workers=1, timeout=20.0)
    with code_tool:
        yield code_tool


@pytest.fixture
def outside(kind):
    """A folder that everybody may read and write, of the user who is attacked: only the lock is in the way."""
    folder = Path(tempfile.mkdtemp(prefix="outside_"))
    for name in ("secret", ".ssh/id", ".git/config"):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("secret-4711")
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o777 if path.is_dir() else 0o666)
        if kind == "nobody":
            os.chown(path, NOBODY, NOBODY)
    yield folder
    shutil.rmtree(folder)


def state(folder):
    """All that an attack could change: a change of anything changes a file's ctime too."""
    found = {}
    for path in (folder, *folder.rglob("*")):
        status = path.lstat()
        found[path] = (*status[:7], status.st_mtime_ns, status.st_ctime_ns, path.read_bytes() if path.is_file() else b"")
    return found


def names(outside, kind, **more):
    """The names that attacks use."""
    known = {"FOLDER": str(outside), "FILE": str(outside / "secret"), "NEW": str(outside / "new"), "INPUT": INPUT,
             "OUTPUT": OUTPUT, "TRAINER": os.getpid(), "HOME": str(Path.home()), "LANDLOCK": kind != "no Landlock"}
    return "".join(f"{name} = {value!r}\n" for name, value in {**known, **more}.items())


def processes():
    """{pid: pid of its parent} of all that are alive."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            fields = (path / "stat").read_text().rpartition(")")[2].split()
            if fields[0] != "Z":
                found[int(path.name)] = int(fields[1])
    return found


def children(parent):
    return {child for child, its_parent in processes().items() if its_parent == parent}


def servers():
    """Those of this process."""
    return {pid for pid in children(os.getpid()) if b"\0--serve" in Path(f"/proc/{pid}/cmdline").read_bytes()}


def at_work(server):
    """The child that has our picture, not the one of a self-test."""
    with contextlib.suppress(OSError):
        return {pid for pid in children(server) if os.path.getsize(f"/proc/{pid}/cwd/{INPUT}") > 40 * 30 * 3}


def wait_for(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not (got := condition()) and time.monotonic() < end:
        time.sleep(0.01)
    return got


@pytest.fixture
def attack(tool, kind, outside, image):
    """Runs an attack. Outside nothing may change, its process and files must be gone and the next call be fine."""
    def run(code, timeout=None, **more):
        process, _, folder = server = tool._idle[0]
        before = state(outside)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tool, "timeout", timeout or tool.timeout)
            result = tool.run(names(outside, kind, **more) + GUARD + HELPERS + code, image)
        assert "BREACH" not in result.text and "not locked" not in result.text
        assert state(outside) == before
        assert tool._idle == [server] and process.poll() is None
        assert not children(process.pid) and os.listdir(folder) == []
        again = tool.run("result = image" if kind == "no Landlock" else COPY, image)
        assert (again.text, again.image and again.image.tobytes()) == ("", image.tobytes())
        return result
    return run


# Waits without a signal or a clock: files outside have no content for it, but it sees whether they are there.
WAIT = "import os, time\nwhile not os.path.exists('{go}'): time.sleep(0.01)\nresult = image"
END = "\nresult = image"  # whoever comes to it was refused everything before


def lines(text, refusal="EPERM"):
    """One attack per line, an expression. EPERM is seccomp's refusal, EACCES Landlock's."""
    found = [line.strip() for line in text.strip().splitlines()]
    return [pytest.param(f"refused(lambda: {line}, errno.{refusal}, {line!r})", id=line) for line in found]


def joined(attacks):
    """All of them in one call."""
    return "\n".join(attack.values[0] for attack in attacks)


def blocks(**codes):
    return [pytest.param(textwrap.dedent(code), id=name.replace("_", " ")) for name, code in codes.items()]


# ---- time
@pytest.mark.parametrize("code", blocks(
    endless_loop="while True: pass",
    endless_sleep="time.sleep(30)",
    a_power_that_holds_the_interpreter="9 ** 9 ** 9",
    a_pattern_that_holds_the_interpreter="re.match('(a+)+$', 'a' * 60 + 'b')",
    blocked_signals="signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\nwhile True: pass",
    ignored_signals="""
        for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
            signal.signal(number, signal.SIG_IGN)
        while True: pass""",
    caught_exceptions="""
        while True:
            try:
                while True: pass
            except BaseException: pass""",
    deadlock="lock = threading.Lock()\nlock.acquire()\nlock.acquire()",
    waits_for_an_answer="os.read(3, 1)",
    a_slow_reply="""
        os.write(3, struct.pack('!IIII', 2, 1_000, 0, 0))
        while True:
            os.write(3, b'x')
            time.sleep(0.05)""",
    a_promised_picture="os.write(3, struct.pack('!IIII', 0, 0, 4096, 4096))\ntime.sleep(30)",
    rewrites_its_output="file = open(OUTPUT, 'wb')\nwhile True:\n    file.seek(0)\n    file.write(bytes(1 << 20))",
    deep_recursion="sys.setrecursionlimit(10 ** 9)\ndef f(): f()\nf()",
    a_result_that_is_slow_to_look_at="class R: __class__ = property(lambda self: time.sleep(30))\nresult = R()",
))
def test_time(attack, code):
    started = time.monotonic()
    result = attack(code, timeout=0.2)
    assert (result.error, result.text) == ("timeout", "Error: the code ran longer than 0.2 s")
    assert 0.2 <= result.seconds and time.monotonic() - started < 10


# ---- processes and threads
PROCESSES = [*lines("""
    os.fork()
    syscall('clone', signal.SIGCHLD, 0, 0, 0, 0)
    syscall('clone3', ctypes.byref((ctypes.c_uint64 * 8)(0, 0, 0, 0, signal.SIGCHLD)), 64)
    os.execv('/bin/true', ['true'])
    os.execve('/bin/true', ['true'], {})
    syscall('execveat', -100, b'/bin/true', 0, 0, 0)
    os.posix_spawn('/bin/true', ['true'], {})
    subprocess.run(['true'])
    os.popen('true')
    __import__('multiprocessing').Process(target=int).start()
    os.setsid()
    os.setpgid(0, os.getppid())
    """), *lines("syscall('fork')\nsyscall('vfork')" * X86), *blocks(
    shell="assert os.system('exit 5') != 5 << 8, 'BREACH'",
    a_thread_of_the_C_library="""
        thread, start = ctypes.c_ulong(), ctypes.CDLL(None).sleep
        assert ctypes.CDLL(None).pthread_create(ctypes.byref(thread), None, start, None) == errno.EPERM, 'BREACH'""",
    threads_by_the_thousand="""
        for _ in range(3_000):
            try:
                _thread.start_new_thread(int, ())
            except RuntimeError as error:
                assert str(error) == "can't start new thread"
            else:
                raise SystemError("BREACH")""")]


@own
@pytest.mark.parametrize("code", PROCESSES)
def test_processes(attack, code):
    result = attack(code + END)
    assert (result.ok, result.text) == (True, "")


@locked
def test_the_process_seen_from_outside(tool, kind, outside, image):
    with ThreadPoolExecutor(1) as pool:
        server = tool._idle[0][0].pid
        call = pool.submit(tool.run, WAIT.format(go=outside / "go"), image)
        [child] = wait_for(lambda: children(server))
        try:
            assert wait_for(lambda: "Seccomp:\t2" in Path(f"/proc/{child}/status").read_text()
                            and os.readlink(f"/proc/{child}/fd/2") == os.devnull)  # the last step before the code
            status = dict(re.findall(r"(\w+):\t(.*)", Path(f"/proc/{child}/status").read_text()))
            limits = dict(re.findall(r"Max (.+?)  +\d+ +(\d+) +\w+ *\n", Path(f"/proc/{child}/limits").read_text()))
            files = {int(path.name): os.readlink(path) for path in Path(f"/proc/{child}/fd").iterdir()}
            session, first_to_go = os.getsid(child), Path(f"/proc/{child}/oom_score_adj").read_text()
        finally:
            (outside / "go").touch()
            assert call.result().ok
    assert (status["Seccomp"], status["NoNewPrivs"], status["Threads"], session) == ("2", "1", "1", child)
    assert {int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")} == {0}
    assert status["Uid"].split() == [str(NOBODY if kind == "nobody" else os.getuid())] * 4
    assert [files.pop(number) for number in (0, 1, 2)] == [os.devnull] * 3
    assert list(files) == [3] and files[3].startswith("socket:")
    assert (limits["file size"], limits["open files"], limits["cpu time"]) == (str(64 << 20), "64", "22")
    assert first_to_go == "1000\n"  # if memory runs out
    assert limits["core file size"] == "1"  # 0 would not stop a core that goes to a pipe
    assert 2 << 30 < int(limits["address space"]) < 16 << 30


# ---- memory
@pytest.mark.parametrize("code, error, text", [pytest.param(*row, id=name) for name, row in {
    "8 GB at once": ("bytes(8 << 30)", "memory", "MemoryError"),
    "8 GB by numpy": ("numpy.empty(8 << 30, 'uint8')", "memory", "Unable to allocate"),
    "page by page": ("blocks = []\nfor _ in range(64):\n    blocks.append(numpy.empty(64 << 20, 'uint8'))\n"
                     "    blocks[-1][::1 << 24] = 1\nraise SystemError('BREACH')", "memory", "Unable to allocate"),
    "anonymous pages": ("mmap.mmap(-1, 8 << 30)", "exception", "Cannot allocate memory"),
    "pages without reserve": ("mmap.mmap(-1, 8 << 30, flags=mmap.MAP_PRIVATE | 0x4000)", "exception", "Cannot allocate memory"),
    "a large picture": ("Image.new('RGB', (1 << 28, 4), None)", "memory", "MemoryError"),  # 4 GB, promised, not filled
    "a text that explodes": ("f'{1:{3 * 10 ** 9}}'", "memory", "MemoryError"),
}.items()])
def test_memory(attack, code, error, text):
    result = attack(code)
    assert result.error == error and text in result.text


LASTING_MEMORY = [*lines("""
    os.memfd_create('memory')
    syscall('memfd_secret', 0)
    syscall('shmget', 0, 4096, 0o1600)
    syscall('msgget', 0, 0o1600)
    syscall('semget', 0, 1, 0o1600)
    syscall('mq_open', b'/sandbox', 0o102, 0o600, 0)
    """), *lines("""
    __import__('multiprocessing.shared_memory').shared_memory.SharedMemory(create=True, size=4096)
    __import__('multiprocessing').Lock()
    open('/dev/shm/sandbox', 'wb')
    """, "EACCES")]


@own
@pytest.mark.parametrize("code", LASTING_MEMORY)
def test_memory_that_outlives_the_process(attack, code):
    assert attack(code + END).text == ""


# ---- output
@pytest.mark.parametrize("code, error, text", [pytest.param(*row, id=name) for name, row in {
    **{f"1 GB on descriptor {number}": (
        f"for _ in range(1 << 10): os.write({number}, bytes(1 << 20))" + END, None, "") for number in (0, 1, 2)},
    "1 GB of zeros as a reply": ("for _ in range(1 << 10): os.write(3, bytes(1 << 20))", "bad_image", "0x0 pixels"),
    "1 GB of ones as a reply": ("for _ in range(1 << 10): os.write(3, b'\\xff' * (1 << 20))", "crash", "died"),
    "1 GB printed": ("text = 'x' * (1 << 24)\nfor _ in range(32): print(text, file=sys.stderr), print(text)" + END, None, ""),
    "10 GB into the output": (
        "file = open(OUTPUT, 'wb', 0)\nfor _ in range(200): file.write(bytes(1 << 20))", "exception", "File too large"),
    "10 GB, to be killed for": (
        "signal.signal(signal.SIGXFSZ, signal.SIG_DFL)\nfile = open(OUTPUT, 'wb', 0)\n"
        "for _ in range(200): file.write(bytes(1 << 20))", "crash", "died"),
    "1 TB by ftruncate": ("os.ftruncate(os.open(OUTPUT, os.O_RDWR), 1 << 40)", "exception", "File too large"),
    "1 TB by pwrite": ("os.pwrite(os.open(OUTPUT, os.O_RDWR), b'x', 1 << 40)", "exception", "File too large"),
    "1 TB by fallocate": ("refused(lambda: os.posix_fallocate(os.open(OUTPUT, os.O_RDWR), 0, 1 << 40))" + END, None, ""),
    "a million files": ("for n in range(1_000): refused(lambda: open(str(n), 'w'), errno.EACCES)" + END, None, ""),
    "a million outside": ("for n in range(1_000): refused(lambda: open(NEW + str(n), 'w'), errno.EACCES)" + END, None, ""),
    "a million folders": ("for n in range(1_000): refused(lambda: os.mkdir(str(n)))" + END, None, ""),
    "a million handles": ("handles = [os.open(INPUT, os.O_RDONLY) for _ in range(1_000)]", "exception", "Too many open files"),
    "a million copies of a handle": ("for _ in range(1_000): os.dup(3)", "exception", "Too many open files"),
    "an endless error": ("raise ValueError('\u00e4' * 3_000_000)", "exception", "ValueError: \u00e4\u00e4"),
}.items()])
def test_output(attack, code, error, text):
    result = attack(code)
    assert result.error == error and text in result.text and len(result.text.encode()) <= MAX_TEXT


def test_nothing_is_printed(kind, image, capfd):
    code = "import os\nfor number in (0, 1, 2): os.write(number, b'forged log')\nprint(1 / 0)"
    with CodeTool(workers=1) as tool:  # a new server: its error output is what pytest reads now
        assert tool.run(code, image).error == "exception"
        assert tool.run("import os, sys\nsys.stderr.write('forged log')\nos._exit(1)", image).error == "crash"
    assert capfd.readouterr() == ("", "")


PNG = """
import struct, zlib
def chunk(kind, data):
    return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
def png(width, height, *chunks):
    return b''.join([b'\\x89PNG\\r\\n\\x1a\\n', chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)), *chunks])
"""


@pytest.mark.parametrize("code, reason", [pytest.param(*row, id=name) for name, row in {
    "60,000 x 60,000": (PNG + "open(OUTPUT, 'wb').write(png(60_000, 60_000, chunk(b'IDAT', b'')))", "decompression bomb"),
    "4,097 x 4,096": ("Image.new('1', (4097, 4096)).save(OUTPUT, 'PNG')", "4097x4096 pixels, more than 16777216"),
    "4,096 x 4,096 in a few bytes": (
        PNG + "open(OUTPUT, 'wb').write(png(4_096, 4_096, chunk(b'IDAT', zlib.compress(bytes(99)))))", "truncated"),
    "a text of 100 MB in the picture": (
        PNG + "open(OUTPUT, 'wb').write(png(64, 64, chunk(b'zTXt', b'a\\0\\0' + zlib.compress(bytes(100 << 20), 1))))",
        "too large"),
    "1 x 1": ("Image.new('RGB', (1, 1)).save(OUTPUT)", "has 1x1 pixels"),
    "too narrow": ("Image.new('RGB', (28, 5601)).save(OUTPUT)", "has 28x5601 pixels"),
    "text": ("open(OUTPUT, 'w').write('no image')", "cannot identify image file"),
    "half a picture": ("open(OUTPUT, 'wb').write(open(INPUT, 'rb').read()[:2000])", "truncated"),
    "a picture of a format with code": ("Image.new('RGB', (64, 64)).save(OUTPUT, 'EPS')", "cannot identify image file"),
    "a pickle": ("pickle.dump(os.getcwd, open(OUTPUT, 'wb'))", "cannot identify image file"),
    "an array": ("numpy.save(open(OUTPUT, 'wb'), numpy.array([os.getcwd]))", "cannot identify image file"),
    "a tar": ("import tarfile\ntarfile.open(OUTPUT, 'w').add(INPUT, '../../new')", "cannot identify image file"),
    "a zip": ("import zipfile\nzipfile.ZipFile(OUTPUT, 'w').write(INPUT, '../../new')", "cannot identify image file"),
}.items()])
def test_output_file(attack, code, reason):
    result = attack(code)
    assert (result.error, result.image) == ("bad_image", None) and reason in result.text


OUTPUTS = lines("""
    os.symlink(FILE, OUTPUT)
    os.link(FILE, OUTPUT)
    os.rename(INPUT, OUTPUT)
    os.replace(FILE, OUTPUT)
    os.remove(OUTPUT)
    os.mkfifo(OUTPUT)
    os.mknod(OUTPUT)
    os.mkdir(OUTPUT)
    os.chmod(OUTPUT, 0o777)
    os.utime(OUTPUT)
    os.link(OUTPUT, NEW)
    os.rename(OUTPUT, NEW)
    """)


@own
@pytest.mark.parametrize("code", OUTPUTS)
def test_output_file_stays_itself(attack, code):
    assert attack(code + END).text == ""


@pytest.mark.parametrize("code, error", [pytest.param(*row, id=name) for name, row in {
    "a size that lies": (
        "class Other(Image.Image):\n    width = height = 30\n    size = (60_000, 60_000)\nimage.__class__ = Other", "crash"),
    "a large size": ("Image.Image.size = (60_000, 60_000)", "bad_image"),
    "too few pixels": ("Image.Image.tobytes = lambda self: b'few'", "crash"),
    "too many pixels": ("Image.Image.tobytes = lambda self: bytes(1 << 24)", None),
    "no pixels": ("Image.Image.tobytes = None", "crash"),
    "another class": ("class Other: size = mode = 'RGB'\nimage = Other()", "no_output"),
    "a class that lies": ("class Other: __class__ = Image.Image\nimage = Other()", "bad_image"),
}.items()])
def test_result(attack, code, error):
    assert attack(code + END).error == error


# ---- reading
SYSTEM = ["/etc/shadow", "/etc/passwd", "/proc/kcore", "/proc/kallsyms", "/dev/mem", "/dev/kmsg", "/dev/vda", "/dev/sda",
          "/dev/tty", "/sys/kernel/uevent_seqnum"]
HOMES = [name for name in (".", ".ssh", ".git", ".netrc", ".aws", ".kube", ".config", ".cache")
         if (Path.home() / name).exists()]


READING = [*lines("""
    open(FILE)
    os.open(FILE, os.O_RDONLY)
    os.open(FILE, os.O_RDWR)
    open('../' * 20 + FILE)
    open(os.open(os.path.basename(FILE), os.O_RDONLY, dir_fd=os.open(FOLDER, os.O_PATH)))
    open('/proc/self/fd/%d' % os.open(FILE, os.O_PATH))
    open('/proc/self/root' + FILE)
    os.listdir(FOLDER)
    os.listdir(os.open(FOLDER, os.O_RDONLY | os.O_DIRECTORY))
    os.listdir('..')
    open(FOLDER + '/.ssh/id')
    open(FOLDER + '/.git/config')
    Image.open(FILE)
    numpy.fromfile(FILE)
    os.listdir('/')
    os.listdir('/etc')
    os.listdir('/dev')
    os.listdir('/dev/shm')
    os.listdir('/proc')
    os.listdir('/sys')
    os.listdir('/proc/self/fd')
    os.listdir('/proc/self/task')
    os.listdir('/proc/%d/fd' % os.getppid())
    open('/proc/self/environ')
    open('/proc/self/cmdline')
    open('/proc/self/status')
    open('/proc/self/maps')
    open('/proc/self/mem', 'rb')
    open('/proc/self/root/etc/passwd')
    open('/proc/self/cwd/' + '../' * 20 + FILE)
    open('/proc/%d/environ' % os.getppid())
    open('/proc/%d/maps' % os.getppid())
    open('/proc/%d/mem' % os.getppid(), 'rb')
    open('/proc/%d/environ' % TRAINER)
    open('/proc/%d/cmdline' % TRAINER)
    open('/proc/%d/mem' % TRAINER, 'rb')
    open('/proc/1/environ')
    """, "EACCES"), *lines("\n".join(f"open({path!r}, 'rb')" for path in SYSTEM if os.path.exists(path)), "EACCES"),
    *lines("\n".join(f"os.open(HOME + {'/' + name!r}, os.O_RDONLY)" for name in HOMES), "EACCES"), *lines("""
    os.getxattr(FILE, 'user.secret')
    os.listxattr(FILE)
    os.chdir(FOLDER)
    os.fchdir(3)
    os.chroot(FOLDER)
    os.statvfs(FILE)
    os.sendfile(1, 0, 0, 10)
    syscall('copy_file_range', 0, 0, 1, 0, 10, 0)
    syscall('splice', 0, 0, 1, 0, 10, 0)
    syscall('openat2', -100, FILE.encode(), ctypes.byref((ctypes.c_uint64 * 3)()), 24)
    syscall('name_to_handle_at', -100, FILE.encode(), bytes(140), bytes(4), 0)
    syscall('open_by_handle_at', 0, bytes(140), 0)
    syscall('inotify_init1', 0)
    syscall('fanotify_init', 0, 0)
    syscall('syslog', 3, bytes(100), 100)
    """)]


@own
@pytest.mark.parametrize("code", READING)
def test_reading(attack, code):
    assert attack(code + END).text == ""


@own
def test_no_open_file_of_the_trainer_passes_to_a_server(kind, outside):
    with open(outside / "secret") as file:
        os.set_inheritable(file.fileno(), True)
        with CodeTool(workers=1) as tool:
            opened = [os.readlink(path) for path in Path(f"/proc/{tool._idle[0][0].pid}/fd").iterdir()]
    assert opened and file.name not in opened


@own
def test_other_systems_are_refused_clearly(kind, monkeypatch, tmp_path, capfd):
    monkeypatch.setattr(tools, "__file__", variant(tmp_path, ('sys.platform != "linux" or', "True or")))
    with pytest.raises(RuntimeError, match="--code_unlocked True"):
        CodeTool(workers=1)
    assert "image code can be locked in on Linux only" in capfd.readouterr().err


@all_kinds
def test_reading_the_environment(kind, image, monkeypatch):
    for name in ("API_KEY", "PATH", "PYTHONPATH", "LD_LIBRARY_PATH"):  # cv2 sets one of the last name for itself
        monkeypatch.setenv(name, "secret-4711")
    code = "import ctypes, os\nblock = ctypes.POINTER(ctypes.c_char_p).in_dll(ctypes.CDLL(None), 'environ')\n" \
           "below = []\nwhile block[len(below)]: below.append(block[len(below)])\nraise ValueError(sorted(os.environb), below)"
    with warnings.catch_warnings(action="ignore"), CodeTool(workers=1) as tool:
        text = tool.run(code, image).text
    assert "OMP_NUM_THREADS=1" in text and "API_KEY" not in text and "secret" not in text
    assert set(re.findall(r"b'(\w+)=", text)) <= {*tools.SERVER_ENVIRONMENT, "LC_CTYPE", "LD_LIBRARY_PATH"}


# ---- writing
WRITING = [*lines("""
    open(FILE, 'w')
    open(FILE, 'a')
    open(FILE, 'r+')
    os.open(FILE, os.O_WRONLY | os.O_TRUNC)
    os.open(FILE, os.O_WRONLY | os.O_APPEND)
    os.open(FILE, os.O_RDWR | os.O_TRUNC)
    open(NEW, 'w')
    open(NEW, 'x')
    os.open(FOLDER, os.O_TMPFILE | os.O_RDWR)
    open('new', 'w')
    os.open('.', os.O_TMPFILE | os.O_RDWR)
    open(INPUT, 'w')
    open(INPUT, 'a')
    open(INPUT, 'r+')
    mmap.mmap(os.open(INPUT, os.O_RDONLY), 0, access=mmap.ACCESS_WRITE)
    os.open('/proc/self/fd/%d' % os.open(INPUT, os.O_RDONLY), os.O_RDWR)
    os.open('/proc/self/mem', os.O_RDWR)
    Image.new('RGB', (9, 9)).save(NEW, 'PNG')
    """, "EACCES"), *lines("""
    os.open(FILE, os.O_RDONLY | os.O_TRUNC)
    os.open(FILE, 3)
    os.open(FILE, 3 | os.O_TRUNC)
    os.open(INPUT, os.O_RDONLY | os.O_TRUNC)
    os.open(INPUT, 3 | os.O_TRUNC)
    os.truncate(FILE, 0)
    syscall('truncate', FILE.encode(), 0)
    os.chmod(FILE, 0o600)
    os.chown(FILE, os.getuid(), os.getgid())
    os.lchown(FILE, os.getuid(), os.getgid())
    os.utime(FILE)
    os.setxattr(FILE, 'user.mark', b'1')
    os.removexattr(FILE, 'user.mark')
    os.rename(FILE, NEW)
    os.rename(FOLDER, FOLDER + '_moved')
    syscall('renameat2', -100, FILE.encode(), -100, NEW.encode(), 0)
    syscall('fchmodat', -100, FILE.encode(), 0o600)
    syscall('fchmodat2', -100, FILE.encode(), 0o600, 0)
    syscall('fchownat', -100, FILE.encode(), os.getuid(), os.getgid(), 0)
    syscall('unlinkat', -100, FILE.encode(), 0)
    syscall('linkat', -100, FILE.encode(), -100, NEW.encode(), 0)
    syscall('symlinkat', FILE.encode(), -100, NEW.encode())
    syscall('mkdirat', -100, NEW.encode(), 0o700)
    syscall('mknodat', -100, NEW.encode(), 0o600, 0)
    os.remove(FILE)
    os.rmdir(FOLDER + '/.ssh')
    os.link(FILE, NEW)
    os.link(INPUT, NEW)
    os.symlink(FILE, NEW)
    os.mkdir(NEW)
    os.mkfifo(NEW)
    os.mknod(NEW)
    os.mknod('new', 0o600 | 0o020000, os.makedev(1, 1))
    os.remove(INPUT)
    os.rename(INPUT, 'new')
    os.chmod(INPUT, 0o666)
    os.truncate(INPUT, 0)
    os.utime(INPUT)
    os.fchmod(3, 0o666)
    os.fchown(3, 0, 0)
    os.rmdir('.')
    fcntl.flock(3, fcntl.LOCK_EX | fcntl.LOCK_NB)
    fcntl.lockf(1, fcntl.LOCK_EX | fcntl.LOCK_NB)
    fcntl.ioctl(1, 0)
    """), *lines("syscall('open', FILE.encode(), 0o1002)\nsyscall('creat', FILE.encode(), 0o666)" * X86)]


@own
@pytest.mark.parametrize("code", WRITING)
def test_writing(attack, code):
    assert attack(code + END).text == ""


@own
@pytest.mark.parametrize("version", range(1, tools._landlock_version()))
def test_writing_under_an_older_landlock(kind, outside, image, monkeypatch, tmp_path, version):
    change = GET_VERSION, f"{GET_VERSION.replace('_libc(', f'min({version}, _libc(')})"
    monkeypatch.setattr(tools, "__file__", variant(tmp_path, change))
    before = state(outside)
    with CodeTool(workers=1) as tool:
        result = tool.run(names(outside, kind) + GUARD + HELPERS + joined(WRITING) + END, image)
    assert (result.text, state(outside)) == ("", before)


# ---- the network
@pytest.fixture
def listeners(outside):
    """Sockets that nobody may reach, with their addresses."""
    abstract = f"\0sandbox_{os.getpid()}"
    found = {"TCP": (socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 0)),
             "UDP": (socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 0)),
             "UNIX": (socket.AF_UNIX, socket.SOCK_STREAM, str(outside / "socket")),
             "ABSTRACT": (socket.AF_UNIX, socket.SOCK_STREAM, abstract)}
    with contextlib.ExitStack() as stack:
        opened = {}
        for name, (family, kind, address) in found.items():
            sock = opened[name] = stack.enter_context(socket.socket(family, kind))
            sock.bind(address)
            sock.setblocking(False)
            if kind == socket.SOCK_STREAM:
                sock.listen()
        (outside / "socket").chmod(0o777)
        yield opened


def reached(sock):
    with contextlib.suppress(BlockingIOError):
        if sock.type == socket.SOCK_DGRAM:
            return sock.recv(10)
        return sock.accept()[0].close() or True
    return False


NETWORK = {"TCP": "socket.create_connection(TCP, 2)", "UDP": "socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', UDP)",
           "UNIX": "socket.socket(socket.AF_UNIX).connect(UNIX)", "ABSTRACT": "socket.socket(socket.AF_UNIX).connect(ABSTRACT)"}


SOCKETS = lines("\n".join(NETWORK.values()) + """
    socket.socket(socket.AF_INET6)
    socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)
    socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)
    socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
    socket.socket(socket.AF_VSOCK)
    socket.socket(socket.AF_ALG, socket.SOCK_SEQPACKET)
    socket.socket(31, socket.SOCK_RAW)
    socket.socket(44, socket.SOCK_RAW)
    socket.socketpair()
    socket.socket(fileno=3)
    syscall('connect', 3, struct.pack('=H14s', 1, b''), 16)
    syscall('listen', 3, 1)
    syscall('accept4', 3, 0, 0, 0)
    syscall('sendto', 3, b'x', 1, 0, 0, 0)
    syscall('recvfrom', 3, bytes(9), 9, 0x40, 0, 0)
    syscall('sendmsg', 3, bytes(56), 0)
    syscall('io_uring_setup', 8, bytes(120))
    syscall('io_setup', 8, bytes(8))
    os.pipe()
    os.eventfd(0)
    """)


@own
@pytest.mark.parametrize("code", SOCKETS)
def test_network(attack, listeners, code):
    assert attack(code + END, **{name: sock.getsockname() for name, sock in listeners.items()}).text == ""
    assert not any(map(reached, listeners.values()))


# ---- other processes
READ_THE_SERVER = """
block = ctypes.create_string_buffer(b'secret', 6)  # after a fork the server has its pages where we have ours
vector = struct.pack('@PN', ctypes.addressof(block), 6)
"""


OTHERS = lines("""
    os.kill(os.getppid(), 0)
    os.kill(TRAINER, 0)
    os.kill(0, 0)
    os.kill(-1, 0)
    os.kill(os.getpid(), 0)
    os.killpg(0, 0)
    os.killpg(os.getppid(), 0)
    signal.raise_signal(signal.SIGURG)
    signal.setitimer(signal.ITIMER_REAL, 9)
    signal.pthread_kill(threading.get_ident(), 0)
    syscall('tkill', os.getppid(), 0)
    syscall('tgkill', os.getppid(), os.getppid(), 0)
    syscall('rt_sigqueueinfo', os.getppid(), 0, bytes(128))
    os.pidfd_open(os.getppid())
    signal.pidfd_send_signal(3, 0)
    syscall('pidfd_getfd', 3, 0, 0)
    fcntl.fcntl(os.open(INPUT, os.O_RDONLY), fcntl.F_SETLEASE, fcntl.F_RDLCK)
    fcntl.fcntl(3, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    fcntl.fcntl(3, fcntl.F_SETOWN, os.getppid())
    fcntl.fcntl(3, fcntl.F_SETSIG, 0)
    fcntl.fcntl(3, 15, struct.pack('@ii', 1, os.getppid()))
    fcntl.fcntl(3, fcntl.F_SETFL, os.O_ASYNC)
    fcntl.fcntl(3, fcntl.F_NOTIFY, 1)
    syscall('ptrace', 0x4206, os.getppid(), 0, 0)
    syscall('ptrace', 0x4206, TRAINER, 0, 0)
    syscall('process_vm_readv', os.getppid(), vector, 1, vector, 1, 0)
    syscall('process_vm_writev', os.getppid(), vector, 0, vector, 0, 0)
    syscall('process_madvise', 3, 0, 0, 0, 0)
    syscall('kcmp', os.getpid(), os.getppid(), 0, 0, 0)
    syscall('prlimit64', os.getppid(), 7, 0, bytes(16))
    syscall('prlimit64', TRAINER, 7, 0, bytes(16))
    syscall('migrate_pages', os.getppid(), 0, 0, 0)
    syscall('ioprio_set', 1, os.getppid(), 0)
    os.setpriority(os.PRIO_PROCESS, os.getppid(), os.getpriority(os.PRIO_PROCESS, os.getppid()))
    os.sched_setaffinity(os.getppid(), os.sched_getaffinity(0))
    os.nice(1)
    os.getsid(os.getppid())
    """)


@own
@pytest.mark.parametrize("code", OTHERS)
def test_other_processes(attack, code):
    assert attack(READ_THE_SERVER + code + END).text == ""


# ---- the kernel
MACHINE_CODE = """
def execute(code):
    page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(bytes.fromhex(code))
    return ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()
assert execute('b827000000 0f05 c3') == os.getpid()  # mov eax, 39; syscall; ret
"""


KERNEL = lines("""
    syscall('bpf', 0, bytes(72), 72)
    syscall('perf_event_open', bytes(128), 0, -1, -1, 0)
    syscall('keyctl', 0, -3, 0)
    syscall('add_key', b'user', b'sandbox', b'x', 1, -2)
    syscall('request_key', b'user', b'sandbox', 0, 0)
    syscall('mount', b'none', b'.', b'tmpfs', 0, 0)
    syscall('umount2', b'.', 0)
    syscall('pivot_root', b'.', b'.')
    syscall('fsopen', b'tmpfs', 0)
    syscall('open_tree', -100, b'.', 1)
    syscall('move_mount', 3, b'', -100, b'.', 4)
    syscall('unshare', 0x10000000)
    syscall('unshare', 0x40000000)
    syscall('setns', 3, 0)
    syscall('init_module', bytes(9), 9, b'')
    syscall('finit_module', 3, b'', 0)
    syscall('kexec_load', -1, -1, -1, -1)
    syscall('userfaultfd', 1)
    syscall('personality', 0x0040000)
    syscall('seccomp', 2, 0, 0)
    syscall('seccomp', 0, 0, 0)
    syscall('prctl', 38, 1, 0, 0, 0)
    syscall('prctl', 1, 0)
    syscall('capset', struct.pack('=Ii', 0x20080522, 0), bytes(24))
    syscall('landlock_restrict_self', 3, 0)
    syscall('setuid', 0)
    os.setgroups([])
    os.setresuid(0, 0, 0)
    syscall('clock_settime', 0, 0)
    syscall('swapon', b'x', 0)
    syscall('acct', b'x')
    syscall('quotactl', 0, 0, 0, 0)
    socket.sethostname('sandbox')
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    """)


@own
@pytest.mark.parametrize("code", KERNEL)
def test_kernel(attack, code):
    assert attack(code + END).text == ""


@all_kinds
def test_kernel_no_other_call(attack):
    """All that is not in the list, also with the bit of the x32 machine; with arguments that no call accepts."""
    allowed = {*numbers(tools.SYSCALLS).values(), 335, 336}  # two traps of probes, which the kernel shows to no filter
    attack_all = "for number in {numbers}: refused(lambda: syscall(number, -1, -1, -1, -1, -1, -1))" + END
    tried = [*{*range(620)} - allowed, *range(1 << 30, (1 << 30) + 620), -1, 1 << 31]
    assert attack(attack_all.format(numbers=tried)).text == ""


@pytest.mark.skipif(not X86, reason="32-bit calls on x86_64")
@all_kinds
def test_kernel_32_bit_call(attack):
    result = attack(MACHINE_CODE + "raise SystemError(f'BREACH: {execute(\"b814000000 cd80 c3\")}')")  # getpid; int 0x80
    assert result.error == "crash"


# ---- all of these attempts once more, on the servers of the other kinds
@others
@pytest.mark.parametrize("attacks", [PROCESSES, LASTING_MEMORY, OUTPUTS, READING, WRITING, SOCKETS, OTHERS, KERNEL],
                         ids=["processes", "memory", "outputs", "reading", "writing", "sockets", "others", "kernel"])
def test_the_same_elsewhere(attack, listeners, attacks):
    result = attack(READ_THE_SERVER + joined(attacks) + END, **{name: sock.getsockname() for name, sock in listeners.items()})
    assert result.text == "" and not any(map(reached, listeners.values()))


# ---- replies
def frame(number, text_bytes, width, height, tail="b''"):
    return f"struct.pack('!IIII', {number}, {text_bytes}, {width}, {height}) + {tail}"


@pytest.mark.parametrize("reply, error, text", [pytest.param(*row, id=name) for name, row in {
    "nothing": ("b''", "crash", "died"),
    "too short": ("b'short'", "crash", "died"),
    "a lock byte": ("b'!' + " + frame(0, 0, 40, 30, "bytes(3_600)"), "crash", ""),
    "a pickle": ("pickle.dumps(Bomb())", "crash", "died"),
    "a text of 4 GB": (frame(0, 4_000_000_000, 0, 0), "crash", "died"),
    "a text of 2 MB": (frame(2, 2 << 20, 0, 0, "bytes(2 << 20)"), "crash", "died"),
    "a text of 1 MB": (frame(2, 1 << 20, 0, 0, "bytes(1 << 20)"), "exception", "\0\0"),
    "half a text": (frame(2, 1 << 20, 0, 0, "bytes(99)"), "crash", "died"),
    "no UTF-8": (frame(2, 4, 0, 0, r"b'\xff\xed\xa0\x80'"), "exception", "\ufffd"),
    "a long text cut within a letter": (frame(2, 9_001, 0, 0, r"b'x' + b'\xc3\xa4' * 4_500"), "exception", "x\u00e4"),
    "a picture of 4e9 x 4e9": (frame(0, 0, 4_000_000_000, 4_000_000_000), "crash", "died"),
    "a picture of 4097 x 4096": (frame(0, 0, 4097, 4096, "bytes(4097 * 4096 * 3)"), "crash", "died"),
    "a picture without height": (frame(0, 0, 4_000_000_000, 0), "bad_image", "4000000000x0 pixels"),
    "no picture": (frame(0, 0, 0, 0), "bad_image", "0x0 pixels"),
    "a picture of 1 x 1": (frame(0, 0, 1, 1, "b'rgb'"), "bad_image", "1x1 pixels"),
    "half a picture": (frame(0, 0, 40, 30, "bytes(1_800)"), "crash", "died"),
    "an unknown number": (frame(77, 0, 0, 0), "crash", ""),
    "a huge number": (frame(4_000_000_000, 0, 0, 0), "crash", ""),
    "another kind": (frame(1, 4, 0, 0, "b'late'"), "timeout", "late"),
    "two replies": (frame(2, 1, 0, 0, "b'1'") + " + " + frame(2, 1, 0, 0, "b'2'"), "exception", "1"),
}.items()])
def test_replies(attack, reply, error, text):
    result = attack(BOMB + f"os.write(3, {reply})\nos._exit(0)")
    assert (result.error, result.image) == (error, None)
    assert text in result.text and len(result.text.encode()) <= MAX_TEXT


BOMB = """
class Bomb:
    def __reduce__(self):
        return os.mkdir, (NEW,)  # for whoever loads it
"""


@pytest.mark.parametrize("number", [0, 1, 2, 3])
def test_replies_that_are_pickles(attack, number):
    result = attack(f"{BOMB}os.write({number}, pickle.dumps(Bomb()) * 1_000)\nresult = Bomb()")
    assert result.error == ("crash" if number == 3 else "no_output")


@pytest.mark.parametrize("code, error, text", [pytest.param(*row, id=name) for name, row in {
    "a reply before the reply": (f"os.write(3, {frame(2, 3, 0, 0, 'b' + repr('lie'))})" + END, "exception", "lie"),
    "a byte before the reply": ("os.write(3, b'!')" + END, "crash", ""),
    "no output": ("os._exit(0)", "crash", "died"),
    "exit": ("sys.exit(3)", "no_output", "wrote no"),
    "closed descriptors": ("os.closerange(0, 64)" + END, "crash", "died"),
    "null pointer": ("ctypes.string_at(0)", "crash", "died"),
    "abort": ("os.abort()", "crash", "died"),
    "an exception that cannot be shown": (
        "class Odd(BaseException):\n    def __str__(self): os._exit(1)\nraise Odd", "crash", "died"),
    "an exception that fails to be shown": (
        "class Odd(Exception):\n    def __str__(self): raise self\nraise Odd", "exception", "Odd: <exception str() failed>"),
    "an exception that nobody can describe": (
        "import traceback\ntraceback.extract_tb = None\nraise ValueError", "crash", "died"),
    "surrogates": ("raise ValueError('a\\ud800\\udfffz')", "exception", "ValueError: a??z"),
    "escape codes": ("raise ValueError('a\\0\\x1b[2J\\r\\n\\u2028z')", "exception", "ValueError: a\0\x1b[2J z"),
    "a syntax error": ("def :", "exception", "SyntaxError: invalid syntax"),
    "a NUL in the code": ("a = '\0'", "exception", "null bytes"),
    "a surrogate in the code": ("raise ValueError('\ud800')", "exception", "ValueError: ?"),
}.items()])
def test_replies_of_odd_ends(attack, code, error, text):
    result = attack(code)
    assert result.error == error and text in result.text


@pytest.mark.parametrize("code", ["(" * 100_000, "-" * 100_000 + "1", "x" + ".y" * 100_000, "if 1:\n " * 100_000],
                         ids=["parentheses", "signs", "attributes", "blocks"])
def test_replies_to_code_that_no_compiler_likes(tool, image, code):
    assert tool.run(code, image).error in ("exception", "memory", "crash")  # that depends on the version of Python
    assert tool.run("result = image", image).ok


# ---- killed
@later
@pytest.mark.parametrize("kills, error", [(1, None), (2, "crash")], ids=["once", "twice"])
def test_killed(kind, outside, image, kills, error):
    with warnings.catch_warnings(action="ignore"), CodeTool(workers=1, timeout=60.0) as tool, ThreadPoolExecutor(1) as pool:
        others, folders = servers() - {tool._idle[0][0].pid}, []
        call = pool.submit(tool.run, WAIT.format(go=outside / "go"), image)
        try:
            for _ in range(kills):
                [server] = wait_for(lambda: servers() - others)
                [child] = wait_for(lambda: at_work(server))
                folders.append(os.readlink(f"/proc/{server}/cwd"))
                os.kill(server, signal.SIGKILL)
                others.add(server)
                assert wait_for(lambda: child not in processes(), 5.0)
        finally:
            (outside / "go").touch()
        assert call.result().error == error
        assert tool.run("result = image", image).image.tobytes() == image.tobytes()
        others |= {tool._idle[0][0].pid}
    assert not servers() - others and not any(map(os.path.exists, folders))


def test_killed_trainer(kind, outside):
    code = f"""
        import sys
        sys.path.insert(0, {str(ROOT)!r})
        import tools
        from PIL import Image
        tools.__file__ = {tools.__file__!r}
        tool = tools.CodeTool(workers=1, timeout=1.0)
        print(tool._idle[0][0].pid, tool._idle[0][2], flush=True)
        tool.run({WAIT.format(go=outside / "never")!r}, Image.new("RGB", (40, 30)))"""
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True) as trainer:
        server, folder = trainer.stdout.readline().split()
        [child] = wait_for(lambda: at_work(int(server)))
        assert os.path.basename(folder).startswith("code_tool_") and os.listdir(folder) != []
        trainer.kill()
    assert wait_for(lambda: not {int(server), child} & set(processes()))
    assert not os.path.exists(folder)


# ---- state
@pytest.mark.parametrize("code", blocks(
    builtins="import builtins\nbuiltins.open = builtins.len = builtins.isinstance = None\nraise ValueError",
    Pillow="Image.open = Image.Image.load = Image.Image.convert = Image.frombytes = lambda *_, **__: 1 / 0",
    modules="""
        import json
        json.loads = json.dumps = os.getcwd = None
        for name in ('numpy', 'os', 'PIL'): sys.modules[name] = None""",
    environment="os.environ['LEFT'] = 'behind'\nsys.path.insert(0, '.')\nsys.argv.append('behind')",
    interpreter="sys.setrecursionlimit(60)\nsys.settrace(lambda *_: None)\nsys.stdout = sys.stderr = None",
    numbers="import random\nrandom.seed(7)\nnumpy.random.seed(7)",
    frames="""
        frame = sys._getframe(1)
        while frame:
            frame.f_globals.update(KINDS=(), HEADER=None, MAX_PICTURE=9, LOCKED=b'?')
            frame = frame.f_back""",
    memory="""
        import gc
        for thing in gc.get_objects():
            if isinstance(thing, dict) and thing is not globals(): thing.clear()""",
))
def test_state(attack, code):
    attack(code)  # whatever becomes of it
    clean = """
        import json, os, random, sys
        from PIL import Image
        assert 'LEFT' not in os.environ and 'behind' not in sys.argv and '.' not in sys.path and sys.getrecursionlimit() >= 900
        assert sorted(os.listdir()) == sorted([INPUT, OUTPUT]) and os.path.getsize(OUTPUT) == 0
        assert json.loads(json.dumps([len(os.getcwd())])) == [len(os.getcwd())]
        Image.open(INPUT).transpose(Image.ROTATE_180).save(OUTPUT, 'PNG')"""
    result = attack(textwrap.dedent(clean))
    assert (result.text, result.ok) == ("", True)


def test_state_of_eight_calls_at_once(kind):
    """All of them read and write files of the same two names."""
    pictures = [Image.new("RGB", (40, 30 + n), (n * 30, 0, 0)) for n in range(8)]
    code = COPY.replace("Image.open", "import time\ntime.sleep(0.05)\nImage.open")
    with CodeTool(workers=4, timeout=20.0) as tool:
        results = tool.run_many([(code, picture) for picture in pictures])
        assert len({id(server[0]) for server in tool._idle}) == 4
    assert [result.image.tobytes() for result in results] == [picture.tobytes() for picture in pictures]


# ---- each layer by itself: without it the same attempts work, and the server does not start
TEETH = {
    "Landlock": """
        open(FILE)
        open(FILE, 'a')
        open(NEW, 'w')
        os.open('.', os.O_TMPFILE | os.O_RDWR)
        open(FOLDER + '/.ssh/id')
        os.listdir(FOLDER)
        """,
    "seccomp": f"""
        os.fork() or os._exit(0)
        _thread.start_new_thread(int, ())
        os.pipe()
        os.kill(os.getpid(), 0)
        os.memfd_create('memory')
        os.chmod(FILE, 0o640)
        os.utime(FILE)
        fcntl.fcntl(3, fcntl.F_SETFL, 0)
        os.chdir('.')
        {NETWORK["UDP"]} and UDP
        """,
    "Landlock seccomp": f"""
        subprocess.run(['true'])
        os.kill(os.getppid(), 0)
        os.truncate(FILE, 5)
        os.open(FILE, os.O_RDONLY | os.O_TRUNC)
        os.rename(FILE, NEW)
        {NETWORK["TCP"]}
        {NETWORK["UNIX"]} or UNIX
        {NETWORK["ABSTRACT"]} or ABSTRACT
        """,
    "Landlock seccomp capabilities": """
        open('/proc/%d/environ' % os.getppid())
        syscall('process_vm_readv', os.getppid(), vector, 1, vector, 1, 0)
        syscall('ptrace', 0x4206, os.getppid(), 0, 0)
        os.chown(FILE, os.getuid(), os.getgid())
        """,
    "limits": """
        numpy.empty(3 << 30, 'uint8')
        os.ftruncate(os.open(OUTPUT, os.O_RDWR), 1 << 40)
        [os.open(INPUT, os.O_RDONLY) for _ in range(100)]
        """}


@pytest.mark.parametrize("layers", TEETH)
def test_attacks_have_teeth(kind, outside, listeners, image, monkeypatch, tmp_path, layers):
    monkeypatch.setattr(tools, "__file__", variant(tmp_path, UNCHECKED, *[LAYERS[name] for name in re.findall(r"\w+", layers)]))
    prefix = names(outside, kind, **{name: sock.getsockname() for name, sock in listeners.items()}) + HELPERS + READ_THE_SERVER
    with CodeTool(workers=1) as tool:
        for attempt in lines(TEETH[layers]):
            assert "BREACH" in tool.run(prefix + attempt.values[0], image).text, attempt.id
    assert {name for name, sock in listeners.items() if reached(sock)} >= set(re.findall(r"\b(TCP|UDP|UNIX|ABSTRACT)$",
                                                                                         TEETH[layers], re.M))


def test_landlock_alone_refuses_too(kind, outside, listeners, image, monkeypatch, tmp_path):
    monkeypatch.setattr(tools, "__file__", variant(tmp_path, UNCHECKED, LAYERS["seccomp"]))
    version, attacks = tools._landlock_version(), lines("""
        open(FILE)
        open(FILE, 'w')
        os.listdir(FOLDER)
        os.remove(FILE)
        os.rename(FILE, NEW)
        os.rmdir(FOLDER + '/.ssh')
        os.symlink(FILE, NEW)
        os.mkdir(NEW)
        os.mkfifo('new')
        os.execv('/bin/true', ['true'])
        open('/proc/%d/environ' % os.getppid())
        """, "EACCES")
    attacks += lines("os.truncate(FILE, 0)\nos.open(FILE, os.O_RDONLY | os.O_TRUNC)", "EACCES") * (version >= 3)
    attacks += lines(f"{NETWORK['TCP']}\nsocket.create_server(('127.0.0.1', 0))", "EACCES") * (version >= 4)
    attacks += lines(f"{NETWORK['ABSTRACT']}\nos.kill(os.getppid(), 0)\nos.kill(TRAINER, 0)") * (version >= 6)
    prefix = names(outside, kind, **{name: sock.getsockname() for name, sock in listeners.items()}) + HELPERS
    before = state(outside)
    with CodeTool(workers=1) as tool:
        for attempt in attacks:
            assert tool.run(prefix + attempt.values[0] + END, image).text == "", attempt.id
    assert state(outside) == before and not any(map(reached, listeners.values()))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has capabilities to lose")
@own
@pytest.mark.parametrize("layers, text", [(["Landlock", "seccomp"], "[Errno 1]"),
                                          (["Landlock", "seccomp", "capabilities"], "BREACH")], ids=["", "without the layer"])
def test_root_has_lost_its_rights(kind, outside, image, monkeypatch, tmp_path, layers, text):
    monkeypatch.setattr(tools, "__file__", variant(tmp_path, UNCHECKED, *[LAYERS[name] for name in layers]))
    with CodeTool(workers=1) as tool:
        for attempt in ("os.chown(FILE, 1, 1)", "os.setgroups([])", "syscall('ptrace', 0x4206, os.getppid(), 0, 0)"):
            assert text in tool.run(names(outside, kind) + HELPERS + f"raise SystemError('BREACH', {attempt})", image).text


@own
@pytest.mark.parametrize("layer", ["Landlock", "seccomp"])
def test_a_missing_layer_is_noticed(kind, monkeypatch, tmp_path, capfd, layer):
    monkeypatch.setattr(tools, "__file__", variant(tmp_path, LAYERS[layer]))
    with pytest.raises(RuntimeError, match="does not start.*--code_unlocked True"):
        CodeTool(workers=1)
    assert "the lock does not hold" in capfd.readouterr().err


@own
@pytest.mark.parametrize("layer, change", {
    "Landlock": ('"syscall", LANDLOCK_RESTRICT_SELF', '"syscall", 448'),
    "seccomp": ("PR_SET_SECCOMP, SECCOMP_MODE_FILTER", "PR_SET_SECCOMP, 3"),
    "no new privileges": ('_libc("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)', "pass")}.items())
def test_a_layer_that_fails_is_noticed(kind, monkeypatch, tmp_path, capfd, layer, change):
    monkeypatch.setattr(tools, "__file__", variant(tmp_path, change))
    with pytest.raises(RuntimeError, match="does not start.*--code_unlocked True"):
        CodeTool(workers=1)
    assert "the child could not be locked in" in capfd.readouterr().err


@own
@pytest.mark.parametrize("change, unlocked, message", [
    (("    import numpy.random", "    import no_numpy, numpy.random"), False, "No module named 'no_numpy'"),
    (("    import numpy.random", "    import no_numpy, numpy.random"), True, "No module named 'no_numpy'"),
    (("    os.setsid()\n", "    os.setsid(1)\n"), True, "the child could not be locked in")])
def test_where_not_the_lock_fails_no_life_without_it_is_advised(kind, monkeypatch, tmp_path, capfd, change, unlocked, message):
    monkeypatch.setattr(tools, "__file__", variant(tmp_path, change))
    with pytest.raises(RuntimeError, match="does not start") as error:
        CodeTool(workers=1, unlocked=unlocked)
    assert "code_unlocked" not in str(error.value) and sys.executable in str(error.value)
    assert message in capfd.readouterr().err


def library(name):
    """The path of a shared library that this process has loaded."""
    found = re.search(rf"(/\S+/{name}[\w.-]*\.so[\w.]*)$", Path("/proc/self/maps").read_text(), re.M)
    return found and Path(found[1])


@pytest.fixture
def needy(tmp_path, monkeypatch):
    """The folder that LD_LIBRARY_PATH must name for this interpreter to start, as for those of a cluster's modules."""
    path, real = library("libpython3"), Path(sys.executable).resolve()
    if path is None or path.name.encode() not in real.read_bytes():
        pytest.skip("this Python has no library of its own")
    other = path.name.replace("python", "pyth0n")  # no run path leads to a file of this name
    for folder in ("home/bin", "lib", "venv/bin"):
        (tmp_path / folder).mkdir(parents=True)
    shutil.copy(path, tmp_path / "lib" / other)
    copy = tmp_path / "home" / "bin" / real.name
    copy.write_bytes(real.read_bytes().replace(path.name.encode() + b"\0", other.encode() + b"\0"))
    copy.chmod(0o755)
    (tmp_path / "venv/bin/python").symlink_to(copy)
    (tmp_path / "venv/lib").symlink_to(Path(sys.prefix) / "lib")
    settings = (Path(sys.prefix) / "pyvenv.cfg").read_text()
    (tmp_path / "venv/pyvenv.cfg").write_text(re.sub("(?m)^home = .*", f"home = {real.parent}", settings))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "venv/bin/python"))
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    return tmp_path / "lib"


@own
@pytest.mark.parametrize("unlocked", [False, True])
def test_an_interpreter_gets_the_library_path_that_it_needs(kind, needy, image, monkeypatch, unlocked):
    monkeypatch.setenv("LD_LIBRARY_PATH", f"missing:/nowhere::{needy}:.")
    with CodeTool(workers=1, unlocked=unlocked) as tool:
        assert tool.run("result = image", image).ok
        said = tool.run("import os\nraise ValueError(os.environ['LD_LIBRARY_PATH'])", image).text
        # No folder of another working directory; OpenCV, where it is installed, puts its own before them.
        assert re.fullmatch(rf"Error: line 2: ValueError: (\S*cv2\S*:)?{re.escape(str(needy))}", said), said


@own
@pytest.mark.parametrize("unlocked", [False, True])
def test_an_interpreter_that_does_not_start_is_named(kind, needy, capfd, unlocked):
    with pytest.raises(RuntimeError, match=f"exit status 127.*{sys.executable} must find.* LD_LIBRARY_PATH") as error:
        CodeTool(workers=1, unlocked=unlocked)
    assert "code_unlocked" not in str(error.value) and "error while loading shared libraries" in capfd.readouterr().err


@own
@pytest.mark.parametrize("name", ["LD_LIBRARY_PATH", "NIX_LD_LIBRARY_PATH"])
def test_of_a_library_path_code_may_read_libraries_only(kind, outside, image, monkeypatch, name):
    shutil.copy(library("libz") or library("libm"), outside / "libother.so.1")
    (outside / "broken.so").symlink_to(outside / "missing")
    monkeypatch.setenv(name, str(outside))
    with CodeTool(workers=1) as tool:
        code = f"import ctypes\nctypes.CDLL({str(outside / 'libother.so.1')!r})\nresult = image"
        assert tool.run(code, image).text == ""  # loaded after the lock
        for path in ("secret", ".ssh/id"):
            assert "PermissionError" in tool.run(f"open({str(outside / path)!r})", image).text
        assert "PermissionError" in tool.run(f"import os\nos.listdir({str(outside)!r})", image).text


@own
def test_without_landlock(kind, outside, image, monkeypatch, tmp_path):
    monkeypatch.setattr(tools, "__file__", variant(tmp_path, *NO_LANDLOCK))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        tool = CodeTool(workers=2)
    assert [str(warning.message) for warning in caught] == [
        "no Landlock in this kernel: image code may open no file, only use `image` and `result`"]
    with tool:
        assert tool.run("result = image.transpose(2)", image).image.tobytes() == image.transpose(2).tobytes()
        for name in (INPUT, OUTPUT, "/etc/passwd", os.devnull, outside / "secret"):
            assert "PermissionError: [Errno 1]" in tool.run(f"open({str(name)!r}, 'rb')", image).text
        assert tool.run("x = 1", image).error == "no_output"


@own
def test_unlocked(kind, outside, image):
    """Plain child processes, for systems without a lock: the call's group dies with it."""
    code = names(outside, kind) + HELPERS + """
assert subprocess.run(['sh', '-c', 'exit 5']).returncode == 5 and open(FILE).read() == 'secret-4711'
if os.fork() == 0:
    open(NEW, 'w').write(str(os.getpid()))
    time.sleep(30)
    os._exit(0)
while not os.path.exists(NEW) or not os.path.getsize(NEW): time.sleep(0.01)
"""
    with CodeTool(workers=1, timeout=1.0, unlocked=True) as tool:
        for ending, error in ((END, None), ("\ntime.sleep(30)", "timeout"), ("\nos._exit(0)", "timeout")):  # it keeps the line
            assert tool.run(code + ending, image).error == error
            daemon = int((outside / "new").read_text())
            assert wait_for(lambda: daemon not in processes())  # noqa: B023
            (outside / "new").unlink()
        assert tool.run(COPY, image).ok
        assert tool.run("bytes(8 << 30)", image).error == "memory"


# ---- the filter, read as the kernel reads it
def verdict(program, machine, call, arguments=()):
    data = struct.pack("=IIQ6Q", call & 0xFFFFFFFF, machine, 0, *[a & (1 << 64) - 1 for a in (*arguments, *[0] * 6)[:6]])
    code, at, value = list(struct.iter_unpack("=HBBI", program)), 0, 0
    while True:
        operation, yes, no, operand = code[at]
        at += 1
        if operation == 0x20:
            [value] = struct.unpack_from("=I", data, operand)
        elif operation == 0x54:
            value &= operand
        elif operation == 0x15:
            at += yes if value == operand else no
        elif operation == 0x06:
            return {0x7FFF0000: "allow", 0x00050001: "EPERM", 0x80000000: "kill"}[operand]
        else:
            raise AssertionError(f"unknown operation {operation:#x}")


@pytest.fixture(params=["x86_64", "aarch64"])
def machine(request, monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: request.param)
    return {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}[request.param]


def test_filter_is_a_valid_program(machine):
    program = list(struct.iter_unpack("=HBBI", tools._seccomp_filter(True)))
    assert len(program) < 4096 and program[-1] == (0x06, 0, 0, 0x00050001)
    assert all(at + 1 + max(yes, no) < len(program) for at, (code, yes, no, _) in enumerate(program) if code == 0x15)
    assert all(operand % 4 == 0 and operand < 64 for code, _, _, operand in program if code == 0x20)


def test_filter_lets_through_what_is_listed_and_no_more(machine):
    program, allowed = tools._seccomp_filter(True), numbers(tools.SYSCALLS)
    for call in (*range(1_000), *range(1 << 30, (1 << 30) + 1_000), 1 << 31, -1):
        assert verdict(program, machine, call) == ("allow" if call in allowed.values() else "EPERM")
    for other in {0xC000003E, 0xC00000B7, 0x40000003, 0x40000028, 0} - {machine}:
        assert {verdict(program, other, call) for call in range(-1, 500)} == {"kill"}
    assert set(numbers(NUMBERS).values()).isdisjoint(allowed.values())


def test_filter_looks_at_arguments(machine):
    program, without, call = tools._seccomp_filter(True), tools._seccomp_filter(False), numbers(tools.SYSCALLS)
    others = [0, os.O_CREAT, os.O_EXCL, os.O_APPEND, os.O_CLOEXEC, os.O_DIRECTORY, os.O_NOFOLLOW, os.O_PATH, 1 << 32, -1 << 32]
    for access in (0, 1, 2, 3):
        for truncate in (0, 0o1000):
            refused = access == 3 or (truncate and access == 0)
            for other in others:
                flags = -100, 0, access | truncate | other, access ^ 3
                assert verdict(program, machine, call["openat"], flags) == ("EPERM" if refused else "allow")
                assert verdict(without, machine, call["openat"], flags) == "EPERM"
    for command in (*range(2_000), 1 << 31, -1):
        for upper in (0, 1 << 32):
            assert verdict(program, machine, call["fcntl"], (3, command | upper, 8)) == (
                "allow" if command in (0, 1, 2, 3, 1030) else "EPERM")  # F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_DUPFD_CLOEXEC


@pytest.mark.parametrize("header, name", [("x86_64-linux-gnu/asm/unistd_64.h", "x86_64"), ("asm-generic/unistd.h", "aarch64")])
def test_numbers_are_the_kernels(monkeypatch, header, name):
    path = Path("/usr/include", header)
    if not path.exists():
        pytest.skip(f"no kernel headers: {path}")
    text, column = path.read_text(), tools.MACHINES[name][0]
    known = {call: int(number) for call, number in re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", text)}
    known |= {call: known[alias] for call, alias in re.findall(r"#define __NR_(\w+)\s+__NR3264_(\w+)", text) if alias in known}
    entries = [entry.split() for table in (tools.SYSCALLS, NUMBERS) for entry in table.split(",")]
    stated = {call: int(numbers[column]) for call, *numbers in entries if numbers[column] != "-"}
    older = {call: number for call, number in stated.items() if number <= max(known.values())}  # the headers may be old
    assert older == {call: known.get(call) for call in older}
    assert known.keys().isdisjoint({call for call, *numbers in entries if numbers[column] == "-"})


# ---- the promise
def test_every_line_of_the_promise_has_its_test():
    named = set(re.findall(r"\btest_\w+\b(?!\.py)", tools.__doc__))
    defined = {node.name for path in (ROOT / "tests").glob("test_*.py") for node in ast.walk(ast.parse(path.read_text()))
               if isinstance(node, ast.FunctionDef)}
    assert len(named) >= 13 and named <= defined
    covered = tools.__doc__.partition("Covered")[2].partition("Not covered")[0].split("\n- ")[1:]
    assert len(covered) == 13 and all(re.search(r"\btest_\w+\s*$", line) for line in covered)


def test_state_of_the_call_before(tool, image):
    """The frames below the code hold nothing of it."""
    tool.run("raise ValueError('secret-' + '4711')", image)
    code = "import sys\nframe, seen = sys._getframe(), ''\n" \
           "while frame: seen, frame = seen + str(frame.f_locals), frame.f_back\n" \
           "assert 'secret-' + '4711' not in seen\nresult = image"
    assert tool.run(code, image).text == ""


def test_large_requests_are_no_fault_of_the_machinery(tool):
    large = Image.new("RGB", (5_000, 4_000))  # larger than an output may be
    result = tool.run("#" * (2 << 20) + "\nresult = image.crop((0, 0, 90, 90))", large)
    assert (result.text, result.ok) == ("", True)
