"""What tools.py promises: actions, image code in real child processes, search. Nothing is mocked.

What image code must not do is in test_sandbox.py.
"""
import gc
import json
import os
import signal
import sys
import textwrap
import time
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import tools  # noqa: E402
from tools import INPUT, OUTPUT, TOOLS_OFF, CodeTool, SearchTool, parse_action  # noqa: E402

GOLDEN = ROOT.parent / "shared" / "golden" / "transcripts.json"
COPY = "from PIL import Image\nImage.open('path_to_input_image.jpg').save('path_to_output_image.jpg', 'PNG')\n"
UNLOCKED = sys.platform != "linux"  # elsewhere image code works, but is not locked in


@pytest.fixture(scope="module")
def tool():
    with CodeTool(workers=1, timeout=5.0, unlocked=UNLOCKED) as code_tool:
        yield code_tool


# ---- actions
CODE = "import cv2\nx = f(1)"
FENCED = [
    *[f"\n```{info}\n{CODE}\n```\n" for info in (
        "Python", "PYTHON", "PYTHON3 ", " python", " Py", "python3.11", "tool_code", "{python}", "python {.numberLines}",
        'python title="a.py"', "python {cmd=true}", "python:a.py", "python showLineNumbers", "python # turn it", "\npython")],
    f"```python\n{CODE}\n```".replace("\n", "\r\n"), f"```python\n{CODE}\n```".replace("\n", "\r"),
    f"python\n{CODE}", f"Python3 \r\n{CODE}", f"py\n\n{CODE}", f"python\n```\n{CODE}\n```",
    f"~~~python\n{CODE}\n~~~", f"````md\n{CODE}\n````", f"```python\n{CODE}", f"{CODE}\n```", f"```python\n\n{CODE}\n\n```",
    f"Here's the code (turned): ```python\n{CODE}\n```\nDone.", f"1. ```py\n{CODE}\n```", f"**Code** ```python\n{CODE}\n```",
    f"Two:\n```python\n{CODE}\n```\nor\n```python\ny\n```",
    f"- first:\n  ```python\n  {CODE.replace(chr(10), chr(10) + '  ')}\n  ```", f"```python file=a.py (edited)\n{CODE}\n```",
    f"```{{.python .numberLines}}\n{CODE}\n```", f"```{{python, echo=FALSE}}\n{CODE}\n```", f"```python (3.10)\n{CODE}\n```",
    f"```lang=python\n{CODE}\n```", f"```python\n{CODE}\n``` done", f"```python\n{CODE}\n```\u200b",
    f"Python code:\n{CODE}", f"python:\n{CODE}", f"\ufeff{CODE}", f"```bash\npip install x\n```\n```python\n{CODE}\n```",
    f"```\n```\n```python\n{CODE}\n```",
    f"```{CODE}\n```", f"```python {CODE}\n```", f"```Python\t{CODE}```"]  # the code begins on the line of the fence
PLAIN = ["python = 3\nx", "pyx = 1", "import x\ny", "x\ny", "note = '```'\nx = 2", "# ```\nx = 1", "x = '''~~~'''\ny = 1",
         "print(f'```python')\nx = 1"]


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
    *[(f"<code>{block}</code>", "code", CODE) for block in FENCED],
    *[(f"<code>{code}</code>", "code", code) for code in PLAIN],
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


@pytest.mark.parametrize("block, code", [
    ("```python\nnote = '```'\nx = 2\n```", "note = '```'\nx = 2"), ("```\nx = 1  # ```\ny\n```", "x = 1  # ```\ny"),
    ('````\nx = """\n```\n"""\n````', 'x = """\n```\n"""'), ("```python x = f(1)```", "x = f(1)"),
    ("```import x; y()```", "import x; y()"),
    ("```x=1\ny\n```", "x=1\ny"), ("```python\nx = 1```\nDone.", "x = 1"),
    ("```python\n```", ""), ("```", "")])
def test_fences_in_and_around_code(block, code):
    assert parse_action(f"<code>{block}</code>").content == code


PRINTED = "```output\nsize = f(30)\n```"


@pytest.mark.parametrize("block, code", [
    (f"{CODE}\n{PRINTED}", CODE),
    (f"{CODE}\n\nOutput:\n\n{PRINTED}", CODE),
    (f"{CODE}\n**Output:**\n{PRINTED} Done.", CODE),
    (f"python\n{CODE}\nIt prints:\n{PRINTED}\n{PRINTED}", CODE),
    (f"result = image.rotate(90)\n{PRINTED}", "result = image.rotate(90)"),
    *[(f"{CODE}\n```{info}\n30 x 40\n```", CODE)
      for info in ("Output", " stdout", "console", "text", "txt", "{output}", "results")],
    (f"```python\n{CODE}\n```\n{PRINTED}", CODE),
    (f"{PRINTED}\n```python\n{CODE}\n```", CODE),
    (f"y = f(2)\n{PRINTED}\n```python\n{CODE}\n```", CODE),  # the block that says so is the code
    (f"I turn it:\n```text\n{CODE}\n```", CODE),  # nothing else can be the code
    (f"```output\n{CODE}\n```", CODE),
])
def test_what_code_printed_is_not_the_code(block, code):
    assert parse_action(f"<code>{block}</code>") == ("code", code)


@pytest.mark.parametrize("piece", ["<answer>", "</answer>", "<code>```", "</think>", "<code> ", "<", "```python\n ", "```",
                                   "~~~", ":~~~py ", ":```py ", " ", "\n", "\r", ": ", " ```x", "`", "python ",
                                   "\n```py (", "~~~x\n", "x=\n:*", "a.", "x(:\n```text\ny\n"])
def test_parsing_is_linear_on_hostile_text(piece):
    gc.freeze()  # what other tests have left in memory is not gone through again for every match
    started = time.process_time()
    parse_action(piece * (400_000 // len(piece)))
    for start, end in (("", ""), ("", "\nx"), ("```\n", ""), ("```python ", ""), ("x=1\n", "\n```output\nx")):
        parse_action(f"<code>{start}{piece.replace('<', '') * (400_000 // len(piece))}{end}</code>")
    spent = time.process_time() - started
    gc.unfreeze()
    assert spent < 1.0  # a search to the end from each of 57,000 tags takes 6


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


def test_code_may_use_names_instead_of_files(tool, image):
    result = tool.run("result = image.transpose(0)", image)
    assert (result.ok, result.image.tobytes()) == (True, image.transpose(0).tobytes())
    assert tool.run(COPY + "result = None", image).image.tobytes() == image.tobytes()
    assert tool.run(COPY + "result = image.resize((99, 99))", image).image.size == (40, 30)  # a file that is written wins


def test_libraries_are_there(tool, image):
    code = """
        import colorsys, wave, xml.dom.minidom  # no server has loaded these before
        from PIL import Image, ImageDraw, ImageFont
        ImageDraw.Draw(image).text((2, 2), "a", font=ImageFont.load_default())
        open('/dev/null', 'w').write('nowhere')
        open('/dev/urandom', 'rb').read(4)
        result = image"""
    result = tool.run(textwrap.dedent(code), image)
    assert (result.text, result.image == image) == ("", False)


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


MODES = {"RGB": (10, 200, 30), "RGBA": (10, 200, 30, 128), "L": 77, "P": 5, "CMYK": (200, 100, 50, 0), "I;16": 0x8000,
         "I;16B": 0x8000}
SHOWN = {"RGB": (10, 200, 30), "RGBA": (132, 227, 142), "P": (9, 8, 7), "L": (77,) * 3, "CMYK": (55, 155, 205),
         "I;16": (128,) * 3, "I;16B": (128,) * 3}


def of_mode(mode):
    picture = Image.new(mode, (32, 32), MODES[mode])
    if mode == "P":
        picture.putpalette([0, 0, 0] * 5 + [9, 8, 7])
    return picture


@pytest.mark.parametrize("mode", MODES)
def test_input_of_any_mode_arrives_as_rgb(tool, mode):
    check = "assert Image.open('path_to_input_image.jpg').mode == 'RGB'"
    result = tool.run(COPY + check, of_mode(mode))
    assert (result.text, result.image.mode) == ("", "RGB")
    assert result.image.getpixel((3, 4)) == SHOWN[mode]


@pytest.mark.parametrize("way", ["made.save('path_to_output_image.jpg', 'TIFF')", "result = made"])
@pytest.mark.parametrize("mode", MODES)
def test_output_of_any_mode_comes_back_as_rgb(tool, image, mode, way):
    code = f"from PIL import Image\nmade = Image.new({mode!r}, (32, 32), {MODES[mode]})\n"
    palette = "made.putpalette([0, 0, 0] * 5 + [9, 8, 7])\n" * (mode == "P")
    result = tool.run(code + palette + way, image)
    assert (result.text, result.image.mode) == ("", "RGB")
    assert result.image.getpixel((3, 4)) == SHOWN[mode]


@pytest.mark.parametrize("spell", ["str", "'./'.__add__", "os.path.abspath", "pathlib.Path",
                                   "(pathlib.Path.cwd() / 'x').with_name"])
def test_the_paths_of_the_prompt_work_however_they_are_spelt(tool, image, spell):
    code = f"import os, pathlib\nfrom PIL import Image\nImage.open({spell}({INPUT!r})).save({spell}({OUTPUT!r}), 'PNG')"
    assert tool.run(code, image).image.tobytes() == image.tobytes()


@pytest.fixture(scope="module")
def two_starts():
    with CodeTool(workers=1) as one, CodeTool(workers=1) as other:
        yield one, other


@pytest.mark.parametrize("code", [
    f"open({OUTPUT!r}, 'w').write('no image')",  # its message names the file
    "import io\nfrom PIL import Image\nImage.open(io.BytesIO(b'x'))",  # and this one an address
    "import os\nraise ValueError(os.path.abspath('x'), os.getcwd())",
    "raise ValueError({'cat', 'dog', 'owl', 'fox', 'cow'})",
    "import random\nraise ValueError(random.random())",
    "import numpy\nraise ValueError(numpy.random.normal())"])
def test_the_same_call_has_the_same_result(two_starts, image, code):
    """On any server of any start: a resumed run is a replay."""
    texts = [tool.run(code, image).text for tool in two_starts for _ in range(2)]
    assert len(set(texts)) == 1 and "Error: " in texts[0]


@pytest.mark.parametrize("ending", ["import PIL.ImageShow\nassert not PIL.ImageShow._viewers\nmade.show()", "exit('done')",
                                    "quit()", "import sys; assert sys.argv == ['code.py']",
                                    "import argparse; argparse.ArgumentParser().parse_args()"])
def test_what_scripts_end_with_does_no_harm(tool, image, ending):
    code = COPY + f"made = Image.open('path_to_output_image.jpg')\n{ending}"
    result = tool.run(code, image)
    assert (result.text, result.image and result.image.tobytes()) == ("", image.tobytes())


@pytest.mark.parametrize("call", ["imshow('x', made)", "waitKey(0)", "destroyAllWindows()", "namedWindow('x')"])
def test_windows_of_opencv_do_no_harm(tool, image, call):
    pytest.importorskip("cv2", reason="OpenCV is optional")
    code = f"import cv2\nmade = cv2.imread({INPUT!r})\ncv2.imwrite({OUTPUT!r}, made)\ncv2.{call}"
    assert tool.run(code, image).text == ""


def test_a_file_that_the_code_leaves_open_is_written_whole(tool, image):
    code = f"file = open({OUTPUT!r}, 'wb')\nfile.write(open({INPUT!r}, 'rb').read())"
    assert tool.run(code, image).image.tobytes() == image.tobytes()


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
    ("exit('no such sign')", "no_output", "Error: the code wrote no 'path_to_output_image.jpg': no such sign"),
    ("import os; os._exit(0)", "crash", "Error: the process of the code died"),
    ("import ctypes; ctypes.string_at(0)", "crash", "Error: the process of the code died"),
])
def test_errors_are_told_to_the_model(tool, image, code, error, text):
    result = tool.run(code, image)
    assert (result.ok, result.image, result.error, result.text) == (False, None, error, text)


def test_long_error_text_is_cut(tool, image):
    text = tool.run("raise ValueError('ä' * 3_000_000 + '\\ud800')", image).text
    assert text.startswith("Error: line 1: ValueError: ää") and 7_990 < len(text.encode()) <= 8_000


def test_exit_after_the_output_is_fine(tool, image):
    assert tool.run(COPY + "exit(1)", image).ok


def test_time_limit(tool, image, monkeypatch):
    monkeypatch.setattr(tool, "timeout", 0.5)
    result = tool.run("while True: pass", image)
    assert (result.error, result.text) == ("timeout", "Error: the code ran longer than 0.5 s")
    assert 0.5 <= result.seconds


@pytest.mark.parametrize("code, reason", [
    ("from PIL import Image; Image.new('RGB', (1, 1)).save(OUT)", "has 1x1 pixels"),
    ("from PIL import Image; Image.new('RGB', (27, 90)).save(OUT)", "has 27x90 pixels"),
    ("from PIL import Image; Image.new('RGB', (28, 5601)).save(OUT)", "has 28x5601 pixels"),
    ("from PIL import Image; Image.new('1', (4097, 4096)).save(OUT, 'PNG')", "4097x4096 pixels, more than 16777216"),
    ("open(OUT, 'w').write('no image')", "cannot identify image file"),
    ("from PIL import Image; result = Image.new('RGB', (27, 90))", "has 27x90 pixels"),
    ("from PIL import Image; result = Image.new('1', (4097, 4096))", "4097x4096 pixels, more than 16777216"),
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


def test_results_stand_in_the_order_of_the_calls(image):
    codes = [f"from PIL import Image; import time; time.sleep({0.3 if side == 30 else 0})\n"
             f"Image.new('RGB', ({side}, {side})).save({OUTPUT!r})" for side in (30, 31, 32, 33, 34)]
    with CodeTool(workers=2, unlocked=UNLOCKED) as tool:
        results = tool.run_many([(code, image) for code in codes])
        assert [result.image.width for result in results] == [30, 31, 32, 33, 34]
        assert tool.run_many([]) == []


def test_calls_run_side_by_side(image):
    with CodeTool(workers=4, unlocked=UNLOCKED) as tool:
        started = time.monotonic()
        results = tool.run_many([(COPY + "import time; time.sleep(0.5)", image)] * 4)
        assert all(result.ok for result in results) and time.monotonic() - started < 1.9  # 2 s one after another


def test_close_leaves_nothing_behind(image):
    tool = CodeTool(workers=2, unlocked=UNLOCKED)
    servers = list(tool._idle)
    assert tool.run(COPY, image).ok
    assert [os.listdir(folder) for _, _, folder in servers] == [[], []]  # the folder of a call goes with it
    tool.close()
    assert [process.poll() for process, _, _ in servers] == [0, 0]
    assert not any(os.path.exists(folder) for _, _, folder in servers)
    tool.close()
    with pytest.raises(RuntimeError):
        tool.run(COPY, image)


def test_a_server_that_cannot_start_is_no_fault_of_the_model(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="does not start"):
        CodeTool(workers=1)


def test_a_server_that_fails_by_itself_is_no_fault_of_the_model(image):
    with CodeTool(workers=1, unlocked=UNLOCKED) as tool:
        os.rmdir(tool._idle[0][2])
        with pytest.raises(RuntimeError, match="failed by itself"):
            tool.run(COPY, image)


def test_a_server_that_is_killed_at_its_start_is_started_again(image, monkeypatch, tmp_path):
    source, flag = Path(tools.__file__).read_text(), tmp_path / "flag"
    dies = f"\n    if not os.path.exists({str(flag)!r}): open({str(flag)!r}, 'w').close(), os.kill(os.getpid(), 9)\n"
    assert source.count("    Image.init()\n") == 1
    (tmp_path / "tools.py").write_text(source.replace("    Image.init()\n", f"    Image.init(){dies}"))
    monkeypatch.setattr(tools, "__file__", str(tmp_path / "tools.py"))
    with CodeTool(workers=1, unlocked=UNLOCKED) as tool:
        assert flag.exists() and tool.run(COPY, image).ok


@pytest.mark.thorough
def test_a_server_that_hangs_is_no_fault_of_the_model(image, monkeypatch):
    """It is ended, and the next call has a new one."""
    monkeypatch.setattr(tools, "GRACE", 0.5)
    with CodeTool(workers=1, timeout=0.5, unlocked=UNLOCKED) as tool:
        process = tool._idle[0][0]
        os.kill(process.pid, signal.SIGSTOP)
        started = time.monotonic()
        with pytest.raises(RuntimeError, match="failed by itself"):
            tool.run(COPY, image)
        assert process.poll() is not None and time.monotonic() - started < 10.0
        assert tool.run(COPY, image).ok


# ---- search: the local index in tests/test_build_index.py, the network in tests/test_search.py
@pytest.mark.parametrize("backend, reason", [("bing:key", "known schemes: sqlite"),
                                             ("sqlite:none.db", "none.db .*build_index")])
def test_an_unknown_backend_is_refused(backend, reason):
    with pytest.raises(ValueError, match=reason):
        SearchTool(backend)


def test_switched_off_tools_are_a_failed_result():
    assert (TOOLS_OFF.ok, TOOLS_OFF.text, TOOLS_OFF.error) == (False, "The tool is switched off.", "off")
