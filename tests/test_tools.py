"""What tools.py promises: actions, image code in real child processes, search. Nothing is mocked.

Attacks are harmless where a limit is missing: no loop forks, nothing sleeps longer than 30 s, no write is over 100 MB.
"""
import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools import OUTPUT, TOOLS_OFF, CodeTool, SearchTool, parse_action  # noqa: E402

GOLDEN = ROOT.parent / "shared" / "golden" / "transcripts.json"
COPY = "from PIL import Image\nImage.open('path_to_input_image.jpg').save('path_to_output_image.jpg', 'PNG')\n"
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="the guarantee is given on Linux only")


@pytest.fixture(scope="module")
def tool():
    with CodeTool(workers=1, timeout=5.0) as code_tool:
        yield code_tool


@pytest.fixture
def image():
    """40 wide, 30 high; every pixel differs from its neighbours."""
    picture = Image.new("RGB", (40, 30))
    picture.putdata([(x * 6, y * 8, (x * y) % 256) for y in range(30) for x in range(40)])
    return picture


def is_alive(pid):
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def wait_for(condition, seconds):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


# ---- actions
@pytest.mark.parametrize("text, kind, content", [
    ("<think> look </think>\n<problem> {'rotation180'} </problem>", "problem", "{'rotation180'}"),
    ("<think>a</think><search>\n who \n</search>", "search", "who"),
    ("<think>a</think> so: <answer> 1 Can\n(473mL) </answer> done", "answer", "1 Can\n(473mL)"),
    ("<answer></answer>", "answer", ""),
    ("<think>maybe <answer>no</answer></think><search>x</search>", "search", "x"),
    ("<code>\n```python\nx = 1\nif x:\n    y = 2\n```\n</code>", "code", "x = 1\nif x:\n    y = 2"),
    ("<code>```py\nx = 1```</code>", "code", "x = 1"),
    ("<code>\n```\nx = 1\n```\n</code>", "code", "x = 1"),
    ("<code>Here it is:\n```python\nx = 1\n```\nDone.</code>", "code", "x = 1"),
    ("<code> x = 1 </code>", "code", "x = 1"),
    ("<code>```python\nx = 1", "invalid", "<code>```python\nx = 1"),
    ("no tags at all", "invalid", "no tags at all"),
    ("", "invalid", ""),
    ("<answer>a</search>", "invalid", "<answer>a</search>"),
    ("</answer>a<answer>", "invalid", "</answer>a<answer>"),
    ("<ANSWER>a</ANSWER>", "invalid", "<ANSWER>a</ANSWER>"),
    ("<answer>a</answer><answer>b</answer>", "invalid", "<answer>a</answer><answer>b</answer>"),
    ("<search>a</search><answer>b</answer>", "invalid", "<search>a</search><answer>b</answer>"),
    ("<search>a</search><answer>", "invalid", "<search>a</search><answer>"),
])
def test_a_turn_has_one_action(text, kind, content):
    assert parse_action(text) == (kind, content)


@pytest.mark.parametrize("piece", ["<answer>", "</answer>", "<code>```", "</think>", "<code> ", "<", "```python\n "])
def test_parsing_is_linear_on_hostile_text(piece):
    started = time.monotonic()
    parse_action(piece * (1_000_000 // len(piece)))
    parse_action("<code>" + piece.replace("<", "") * (1_000_000 // len(piece)) + "</code>")
    assert time.monotonic() - started < 1.0


@pytest.mark.skipif(not GOLDEN.exists(), reason="the released transcripts are not beside this checkout")
def test_released_chains_parse():
    turns = [[parse_action(turn) for turn in row["turns"]] for row in json.loads(GOLDEN.read_text())]
    assert [[action.kind for action in chain] for chain in turns] == [
        ["problem", "code", "answer"], ["problem", "code", "answer"], ["search", "search", "answer"]]
    assert turns[0][0].content == "{'rotation180'}"
    assert turns[0][1].content.startswith("import cv2\n") and turns[0][1].content.endswith("rotated_image)")


# ---- image code
def test_code_gets_the_exact_pixels_and_gives_them_back(tool, image):
    result = tool.run(COPY.replace(".save(", ".transpose(Image.ROTATE_90).save("), image)
    assert (result.ok, result.text, result.error, result.image.size) == (True, "", None, (30, 40))
    assert result.image.tobytes() == image.transpose(Image.ROTATE_90).tobytes()
    assert 0 < result.seconds < 5


def test_numpy_and_jpeg_work(tool):
    code = """
        import numpy
        from PIL import Image
        pixels = numpy.asarray(Image.open('path_to_input_image.jpg'))
        Image.fromarray(255 - pixels).save('path_to_output_image.jpg', quality=95)"""
    result = tool.run(textwrap.dedent(code), Image.new("RGB", (32, 32), (250, 20, 0)))
    # JPEG is lossy: a flat colour comes back within rounding of its colour space.
    assert all(abs(got - want) <= 2 for got, want in zip(result.image.getpixel((9, 9)), (5, 235, 255)))


def test_opencv_works(tool, image):
    pytest.importorskip("cv2", reason="OpenCV is optional")
    result = tool.run("import cv2\nimage = cv2.imread('path_to_input_image.jpg')\n"
                      "cv2.imwrite('path_to_output_image.jpg', cv2.rotate(image, cv2.ROTATE_180))", image)
    assert (result.ok, result.image.size) == (True, (40, 30))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P"])
def test_input_of_any_mode_arrives_as_rgb(tool, mode):
    check = "assert Image.open('path_to_input_image.jpg').mode == 'RGB'"
    result = tool.run(COPY + check, Image.new(mode, (32, 32)))
    assert (result.text, result.image.mode) == ("", "RGB")


def test_functions_imports_and_comprehensions_see_each_other(tool, image):
    code = COPY + """
import math
scale = 2
def double(values):
    return [scale * math.floor(value) for value in values]
if __name__ == '__main__':
    assert double([1.5, 2.5]) == [2, 4]
"""
    assert tool.run(code, image).text == ""


def test_exif_orientation_is_applied(tool):
    code = """
        from PIL import Image
        exif = Image.Exif()
        exif[0x0112] = 6  # to be shown rotated by 90 degrees
        Image.new('RGB', (60, 30)).save('path_to_output_image.jpg', exif=exif)"""
    assert tool.run(textwrap.dedent(code), Image.new("RGB", (32, 32))).image.size == (30, 60)


@pytest.mark.parametrize("code, error, text", [
    ("a = 1\n\nprint(x)", "exception", "Error: line 3: NameError: name 'x' is not defined"),
    ("def f():\n    return 1 / 0\nf()", "exception", "Error: line 2: ZeroDivisionError: division by zero"),
    ("a = 1\nb = )", "exception", "Error: line 2: SyntaxError: unmatched ')'"),
    ("raise KeyboardInterrupt", "exception", "Error: line 1: KeyboardInterrupt"),
    ("open('missing.png')", "exception",
     "Error: line 1: FileNotFoundError: [Errno 2] No such file or directory: 'missing.png'"),
    ("x = 1", "no_output", "Error: the code wrote no 'path_to_output_image.jpg'"),
    ("", "no_output", "Error: the code wrote no 'path_to_output_image.jpg'"),
    ("import sys; sys.exit(3)", "no_output", "Error: the code wrote no 'path_to_output_image.jpg'"),
    ("import os; os._exit(0)", "crash", "Error: the process of the code died"),
    ("import os; os.kill(os.getpid(), 11)", "crash", "Error: the process of the code died"),
])
def test_errors_are_told_to_the_model(tool, image, code, error, text):
    result = tool.run(code, image)
    assert (result.ok, result.image, result.error, result.text) == (False, None, error, text)


def test_long_error_text_is_cut(tool, image):
    assert len(tool.run("raise ValueError('ä' * 3_000_000 + '\\ud800')", image).text) == 2_000


def test_exit_after_the_output_is_fine(tool, image):
    assert tool.run(COPY + "exit(1)", image).ok


def test_state_does_not_leak(tool, image):
    poison = "import builtins, os, sys\nfrom PIL import Image\nImage.open = builtins.open = None\n" \
             "sys.modules['numpy'] = None\nos.environ['LEFT'] = 'behind'\nopen_file = 1\n"
    assert tool.run(poison, image).error == "bad_image"  # it poisoned itself
    clean = "import numpy, os\nassert 'LEFT' not in os.environ and os.listdir() == ['path_to_input_image.jpg']\n"
    assert tool.run(clean + COPY, image).text == ""


@pytest.mark.parametrize("code", ["while True: pass", "import time; time.sleep(30)", "9 ** 9 ** 9",
                                  "import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\n"
                                  "while True: pass"])
def test_time_limit(code, image):
    with CodeTool(workers=1, timeout=0.5) as tool:
        started = time.monotonic()
        result = tool.run(code, image)
        assert (result.error, result.text) == ("timeout", "Error: the code ran longer than 0.5 s")
        assert 0.5 <= time.monotonic() - started < 2.0
        assert tool.run(COPY, image).ok


DAEMON = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        with open({pid_file!r}, 'w') as file:
            file.write(str(os.getpid()))
        time.sleep(30)
    os._exit(0)
while not os.path.exists({pid_file!r}) or not os.path.getsize({pid_file!r}):
    time.sleep(0.01)
"""


@on_linux
@pytest.mark.parametrize("ending", ["", "time.sleep(30)", "os._exit(0)"])
def test_daemon_dies_with_its_call(ending, image, tmp_path):
    pid_file = tmp_path / "pid"
    with CodeTool(workers=1, timeout=1.0) as tool:
        tool.run(DAEMON.format(pid_file=str(pid_file)) + ending, image)
        assert not is_alive(int(pid_file.read_text()))


@pytest.mark.parametrize("code, error, text", [
    pytest.param("block = bytearray(3 << 30)", "memory", "MemoryError", marks=on_linux),
    pytest.param("import numpy; numpy.empty(3 << 30, 'uint8')", "memory", "Unable to allocate", marks=on_linux),
    ("open('big', 'wb').write(bytes(100 << 20))", "exception", "File too large"),
    ("files = [open(f'{i}', 'w') for i in range(100)]", "exception", "Too many open files"),
])
def test_resource_limits(tool, image, code, error, text):
    result = tool.run(code, image)
    assert result.error == error and text in result.text


def test_no_secrets(monkeypatch, image):
    monkeypatch.setenv("API_KEY", "secret-4711")
    with CodeTool(workers=1) as tool:
        text = tool.run("import os; raise ValueError(sorted(os.environ))", image).text
        assert "HOME" in text and "API_KEY" not in text
        if sys.platform == "linux":
            assert "secret-4711" not in tool.run("raise ValueError(open('/proc/self/environ').read())", image).text


@on_linux
@pytest.mark.skipif(subprocess.run(["unshare", "-Un", "true"], capture_output=True).returncode != 0
                    if sys.platform == "linux" else True, reason="this kernel allows no user namespaces")
def test_no_network(tool, image):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        text = tool.run(f"import socket; socket.create_connection(('127.0.0.1', {port}), 2)", image).text
    assert "Network is unreachable" in text


@pytest.mark.parametrize("code, reason", [
    ("from PIL import Image; Image.new('RGB', (1, 1)).save(OUT)", "has 1x1 pixels"),
    ("from PIL import Image; Image.new('RGB', (27, 90)).save(OUT)", "has 27x90 pixels"),
    ("from PIL import Image; Image.new('RGB', (28, 5601)).save(OUT)", "has 28x5601 pixels"),
    ("from PIL import Image; Image.new('1', (4097, 4096)).save(OUT, 'PNG')", "4097x4096 pixels, more than 16777216"),
    ("import os; os.symlink('path_to_input_image.jpg', OUT)", "not a regular file"),
    ("import os; os.symlink('nowhere', OUT)", "not a regular file"),
    ("import os; os.mkfifo(OUT)", "not a regular file"),
    ("import os; os.mkdir(OUT)", "not a regular file"),
    ("open(OUT, 'w').write('no image')", "cannot identify image file"),
    ("open(OUT, 'wb')", "cannot identify image file"),
    ("open(OUT, 'wb').write(open('path_to_input_image.jpg', 'rb').read()[:200])", "truncated"),
])
def test_bad_outputs(tool, image, code, reason):
    result = tool.run(f"OUT = {OUTPUT!r}\n{code}", image)
    assert (result.ok, result.image, result.error) == (False, None, "bad_image")
    assert reason in result.text


def test_a_claimed_size_is_refused_before_decoding(tool, image):
    code = """
        import struct, zlib
        header = b'IHDR' + struct.pack('>IIBBBBB', 50_000, 50_000, 8, 2, 0, 0, 0)
        start = b'\\x89PNG\\r\\n\\x1a\\n' + struct.pack('>I', 13)
        open('path_to_output_image.jpg', 'wb').write(start + header + struct.pack('>I', zlib.crc32(header)))"""
    result = tool.run(textwrap.dedent(code), image)
    assert result.error == "bad_image" and result.seconds < 1.0


def test_a_shape_at_the_limits_is_accepted(tool, image):
    result = tool.run(f"from PIL import Image; Image.new('RGB', (28, 5600)).save({OUTPUT!r})", image)
    assert result.image.size == (28, 5600)


# The child's line to the server is the only socket above its three standard files.
FORGE = """
import os, stat, struct
line = next(fd for fd in map(int, os.listdir('/dev/fd')) if fd > 2 and stat.S_ISSOCK(os.fstat(fd).st_mode))
os.write(line, {frame})
os._exit(0)
"""


@pytest.mark.parametrize("frame, error", [
    ("b'short'", "crash"),
    ("struct.pack('!IIII', 0, 4_000_000_000, 0, 0)", "crash"),
    ("struct.pack('!IIII', 0, 0, 4_000_000_000, 4_000_000_000)", "crash"),
    ("struct.pack('!IIII', 77, 0, 0, 0)", "crash"),
    ("struct.pack('!IIII', 0, 0, 0, 0)", "bad_image"),
    ("struct.pack('!IIII', 0, 0, 1, 1) + b'rgb'", "bad_image"),
    ("struct.pack('!IIII', 0, 0, 40, 30) + b'too little'", "crash"),
    ("struct.pack('!IIII', 2, 9_000, 0, 0) + bytes(9_000)", "exception"),
    ("struct.pack('!IIII', 2, 2 << 20, 0, 0) + bytes(2 << 20)", "crash"),
])
def test_forged_reply(tool, image, frame, error):
    result = tool.run(FORGE.replace("{frame}", frame), image)
    assert (result.ok, result.image, result.error) == (False, None, error)
    assert len(result.text) <= 2_000
    assert tool.run(COPY, image).ok


def test_killed_server(image):
    with CodeTool(workers=1) as tool:
        result = tool.run("import os, time; os.kill(os.getppid(), 9); time.sleep(30)", image)
        assert (result.error, result.text) == ("crash", "Error: the code killed its server")
        assert tool.run(COPY, image).ok


@on_linux
def test_trainer_killed(tmp_path):
    pid_file, known = tmp_path / "pid", servers_beyond(set())
    code = DAEMON.format(pid_file=str(pid_file)) + "time.sleep(30)"
    trainer = subprocess.Popen([sys.executable, "-c", "from PIL import Image; from tools import CodeTool\n"
                                f"CodeTool(1, 1.0).run({code!r}, Image.new('RGB', (30, 30)))"], cwd=ROOT)
    assert wait_for(lambda: pid_file.exists() and pid_file.read_text(), 10)
    daemon = int(pid_file.read_text())
    trainer.kill()
    trainer.wait()
    assert wait_for(lambda: not is_alive(daemon), 5)
    assert wait_for(lambda: not servers_beyond(known), 5)


def servers_beyond(known):
    """The code servers whose parent died or is this process."""
    found = set()
    for status in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            parent = int(re.search(r"PPid:\s(\d+)", (status.parent / "status").read_text())[1])
            if b"tools.py\0--serve" in status.read_bytes() and parent in (1, os.getpid()):
                found.add(int(status.parent.name))
        except OSError:
            pass
    return found - known


def test_results_stand_in_the_order_of_the_calls(image):
    codes = [f"from PIL import Image; import time; time.sleep({0.3 if side == 30 else 0})\n"
             f"Image.new('RGB', ({side}, {side})).save({OUTPUT!r})" for side in (30, 31, 32, 33, 34)]
    with CodeTool(workers=2) as tool:
        results = tool.run_many([(code, image) for code in codes])
        assert [result.image.width for result in results] == [30, 31, 32, 33, 34]
        assert tool.run_many([]) == []


def test_calls_run_side_by_side(image):
    with CodeTool(workers=4) as tool:
        started = time.monotonic()
        results = tool.run_many([(COPY + "import time; time.sleep(0.5)", image)] * 4)
        assert all(result.ok for result in results) and time.monotonic() - started < 1.5


@on_linux
def test_close_leaves_nothing_behind(image):
    known = servers_beyond(set())
    tool = CodeTool(workers=2)
    folder = Path(tool._folder.name)
    assert tool.run(COPY, image).ok and len(servers_beyond(known)) == 2
    assert list(folder.iterdir()) == []  # the folder of a call goes with it
    tool.close()
    assert servers_beyond(known) == set() and not folder.exists()
    tool.close()
    with pytest.raises(RuntimeError):
        tool.run(COPY, image)


def test_a_server_that_cannot_start_is_no_fault_of_the_model(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="does not start"):
        CodeTool(workers=1)


@on_linux
def test_a_server_that_fails_by_itself_is_no_fault_of_the_model(image):
    with CodeTool(workers=1) as tool:
        os.rmdir(tool._folder.name)
        with pytest.raises(RuntimeError, match="failed by itself"):
            tool.run(COPY, image)


# ---- search
ROWS = [{"id": 0, "title": "Denmark", "contents": "The capital of Denmark is Copenhagen.\nIt lies on an island."},
        {"id": 1, "title": "Norway", "text": "The capital of Norway is Oslo."},
        {"id": 2, "title": "Sweden", "text": "Stockholm is large."},
        {"id": 3, "text": "A capital letter begins a sentence."}]


def corpus(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"sqlite:{path}"


@pytest.fixture
def search(tmp_path):
    return SearchTool(corpus(tmp_path / "corpus.jsonl", ROWS), topk=2)


def test_the_best_passages_come_first(search):
    (result,) = search.search_many(["What is the capital of Norway?"])
    assert (result.ok, result.error, result.image) == (True, None, None)
    assert result.text == ("1. Content: The capital of Norway is Oslo. "
                           "2. Content: The capital of Denmark is Copenhagen. It lies on an island.")


def test_a_title_is_searched_too(search):
    assert search.search_many(["SWEDEN"])[0].text == "1. Content: Stockholm is large."


def test_topk_limits_the_passages(tmp_path):
    address = corpus(tmp_path / "corpus.jsonl", ROWS)
    counts = [SearchTool(address, topk).search_many(["capital"])[0].text.count("Content:") for topk in (1, 2, 3, 9)]
    assert counts == [1, 2, 3, 3]


@pytest.mark.parametrize("query", ['" OR NEAR( *', "title:oslo) AND", "-oslo^2 {x}", "'; DROP TABLE docs; --", "NOT",
                                   "\0\ud800 ü _", "a " * 50_000, " ".join(map(str, range(100_000)))])
def test_no_query_is_syntax(search, query):
    result = search.search_many([query])[0]
    assert result.error in (None, "no_results") and result.seconds < 1.0
    assert search.search_many(["oslo"])[0].ok


def test_failures_are_results(search):
    nothing, empty, dots = search.search_many(["zebra", " \n", "?!"])
    assert (nothing.ok, nothing.error, nothing.text) == (False, "no_results", "No results.")
    assert (empty.ok, empty.error) == (False, "empty_query")
    assert (dots.ok, dots.error) == (False, "no_results")


@pytest.mark.parametrize("row, reason", [('{"id": 1,', "Expecting property name"), ("[1]", "no JSON object"),
                                         ('{"id": 1}', "contents"), ('{"text": 7}', "contents"),
                                         ("", "Expecting value"), ('{"text": "a", "title": 1}', "title")])
def test_a_bad_row_is_named(tmp_path, row, reason):
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"id": 0, "text": "fine"}\n' + row + "\n")
    with pytest.raises(ValueError, match=rf"corpus\.jsonl, row 2: .*{reason}"):
        SearchTool(f"sqlite:{path}")


def test_a_ready_database_is_read_only(tmp_path):
    import sqlite3
    path = tmp_path / "a b.db"
    with sqlite3.connect(path) as database:
        database.execute("CREATE VIRTUAL TABLE docs USING fts5(title, text)")
        database.execute("INSERT INTO docs VALUES ('Norway', 'Oslo is its capital.')")
    database.close()
    os.chmod(path, 0o444)
    assert SearchTool(f"sqlite:{path}").search_many(["norway"])[0].text == "1. Content: Oslo is its capital."


@pytest.mark.parametrize("backend, reason", [("bing:key", "known schemes: sqlite"), ("sqlite:none.db", "existing"),
                                             ("sqlite:table.csv", "existing")])
def test_an_unknown_backend_is_refused(backend, reason):
    with pytest.raises(ValueError, match=reason):
        SearchTool(backend)


def test_switched_off_tools_are_a_failed_result():
    assert (TOOLS_OFF.ok, TOOLS_OFF.text, TOOLS_OFF.error) == (False, "The tool is switched off.", "off")
