"""The page of `evaluate.py --report`: what stands in the file, and what a real browser makes of it,
hostile texts included."""
import fcntl
import html.parser
import http.server
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from base64 import b64decode, b64encode
from hashlib import sha256
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from data.report import read_objects, write_report
from reward import WEIGHTS
from tools import Action, ToolResult

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
                None)
needs_browser = pytest.mark.skipif(CHROMIUM is None,
                                   reason="needs chromium (Debian: apt-get install chromium)")
HOSTILE = ("</script><script>document.title='hacked'</script><!--<script><img src=x onerror=\"document.title='hacked'\">"
           "\u2028]]>{{data}}{{script}}&lt;b&gt;\u202e\ud800 \x00")


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def picture(path, colour="red", size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return str(path)


def search(query="coin of Italy", **changes):
    return {"text": f"<think> Italy's flag. </think>\n<search> {query} </search>",
            "action": "search",
            "observation": "<information> 1. Content: A crab. 2. Content: An owl. </information>",
            "ok": True, "error": None, "lost": False, "seconds": 0.002, **changes}


def code(**changes):
    return {"text": "<think> Turn it. </think>\n<code>\n```python\nimage.rotate(90)\n```\n</code>",
            "action": "code",
            "observation": "The processed image.", "ok": True, "error": None, "lost": False,
            "seconds": 0.01, **changes}


def answer(text="crab"):
    return {"text": f"<think> I see. </think>\n<answer> {text} </answer>", "action": "answer",
            "observation": None}


def row(number, *turns, image=None, **changes):
    return {"id": f"task-{number}", "question": f"Question {number}?", "image": str(image),
            "turns": [*turns, answer()],
            "answer": "crab", "answers": ["crab"], "stop": "answer", "tokens": 100, **changes}


def scored(number, *turns, right=True, **changes):
    parts = {"format": 1.0, "accuracy": float(right)}
    return row(number, *turns,
               **{"reward_parts": parts, "reward": 1.0 + right, "advantage": right - 0.5,
                  "success": float(right)} | changes)


def training_run(folder, steps, group_size=2, **config):
    """A finished run as train.py leaves it; steps: {step: rows}."""
    folder.mkdir(exist_ok=True)
    last = max(steps)
    (folder / "config.json").write_text(json.dumps({
        "model": "data/model", "tasks": "train.json", "steps": last, "prompts_per_step": 1,
        "group_size": group_size} | config))
    (folder / "summary.json").write_text(json.dumps({"seconds": 12.0}))
    write_rows(folder / "metrics.jsonl", [
        {"step": n, "success": n / last, "reward": 1.0 + n / last, "reward_format": 1.0,
         "reward_accuracy": n / last,
         "loss": 0.0004 * n, "kl": 0.01 * n, "gap": 3e-7 * n, "entropy": 0.3, "grad_norm": None if n == 2 else 1.5,
         "tool_errors": 0.1,
         "stop_length": 0.0, "stop_invalid": 0.0, "seconds": 2.0,
         "seconds_generate": 1.0, "seconds_tools": 0.2, "seconds_reference": 0.1, "seconds_update": 0.7}
        for n in range(1, last + 1)])
    held_out = {"by_family": {"search": 0.25}, "by_type": {"search": 0.25}, "n": 4}
    write_rows(folder / "evaluations.jsonl", [
        {"step": step, "tools": tools, "success": success, **held_out}
        for step, tools, success in ((0, "on", 0.25), (last, "on", 0.75), (last, "off", 0.0))])
    for step, rows in steps.items():
        write_rows(folder / "rollouts" / f"step_{step}.jsonl", rows)
    return folder


def item(number, *turns, right=True, sample=0, **changes):
    return row(number, *turns) | {
        "number": number, "sample": sample, "family": "coding", "type": ["dark"], "split": "simple",
        "gt": ["crab"],
        "pred_answer": "crab" if right else "owl", "f1": float(right), "em": float(right),
        "error": None} | changes


def evaluation(folder, items):
    folder.mkdir(exist_ok=True)
    config = {"model": "data/model", "benchmark": "mat-coding", "tasks": "MAT-Coding.json"}
    (folder / "config.json").write_text(json.dumps(config))
    figures = {"f1": 35.9, "em": 22.5, "n": 200, "f1_95": [29.8, 42.1], "em_95": [17.0, 28.5]}
    (folder / "scores.json").write_text(json.dumps({
        "all": figures, "simple": {**figures, "n": 70}, "fair": {"all": {**figures, "f1": 36.25}},
        "tools": {"turns": 2.5, "calls": 31, "errors": {"timeout": 3}, "seconds": 4.2},
        "failed": 1}))
    write_rows(folder / "items.jsonl", items)
    return folder


class Page(html.parser.HTMLParser):
    """What a parser sees: (tag, attributes) of all elements, and the texts of the style, the data
    and the script."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.texts, self.inside = [], [], False
        self.feed(Path(path).read_text(encoding="utf-8"))
        self.close()
        [self.policy] = [a["content"] for tag,
                         a in self.elements if a.get("http-equiv") == "Content-Security-Policy"]
        self.style, data, self.script = self.texts
        self.data = json.loads(data)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.inside = tag in ("style", "script")
        self.texts += [""] * self.inside

    def handle_data(self, data):
        if self.inside:
            self.texts[-1] += data

    def handle_endtag(self, tag):
        self.inside = False

    def images(self):
        return [Image.open(BytesIO(b64decode(uri.partition(",")[2]))) for uri, _,
                _ in self.data["images"]]


# ---------------------------------------------------------------- the file

def test_a_page_holds_the_run_and_asks_for_nothing(tmp_path):
    path = write_report(training_run(tmp_path / "run", {10: [scored(1)], 2: [scored(2)]}))
    page = Page(path)
    assert path == tmp_path / "run" / "report.html"
    assert (page.data["name"], page.data["kind"]) == ("run", "training")
    assert (len(page.data["metrics"]), len(page.data["evaluations"])) == (10, 3)
    assert [(part["name"], [r["id"] for r in part["rows"]]) for part in page.data["sets"]] == [
        (2, ["task-2"]), (10, ["task-1"])]
    asks = {"src", "srcset", "data", "action", "background", "poster"}
    assert [tag for tag,
            a in page.elements if asks & a.keys() or not a.get("href", "#").startswith("#")] == []
    style, script = (b64encode(sha256(text.encode()).digest()).decode()
                     for text in (page.style, page.script))
    assert page.policy.split() == ("default-src 'none'; base-uri 'none'; form-action 'none'; img-src data:; "
                                   f"style-src 'sha256-{style}'; script-src 'sha256-{script}'").split()


def test_no_text_leaves_its_element(tmp_path):
    rows = [scored(1, search(HOSTILE), id=HOSTILE, question=HOSTILE, image=HOSTILE,
                   answers=[HOSTILE])]
    path = write_report(training_run(tmp_path / "run", {1: rows}, model=HOSTILE))
    page, benign = Page(path), Page(write_report(training_run(tmp_path / "other", {1: [scored(1)]})))
    assert page.elements == benign.elements
    assert page.data["sets"][0]["rows"][0]["question"] == page.data["config"]["model"] == HOSTILE.replace("\ud800", "?")
    assert "\u2028" not in path.read_text(encoding="utf-8")


def test_the_rows_of_train_and_evaluate_are_understood(tmp_path):
    """Written by rollout_row itself, once as train.py calls it and once as an evaluation does."""
    from rollout import Rollout, Turn, rollout_row
    red, blue = picture(tmp_path / "task.png", "red"), Image.new("RGB", (50, 20), "blue")
    turn = Turn("<code>…</code>", Action("code", "…"), ToolResult(True, "", blue, None, 0.1),
                "The processed image.")
    rollout = Rollout({"id": 1, "question": "q", "image": red, "answers": ["a"]}, [], [], [],
                      turns=[turn], stop="turns")
    run, tested = tmp_path / "run", tmp_path / "evaluation"
    training_run(run,
                 {3: [{**rollout_row(rollout, run / "rollouts", "step_3/0-0"), "reward": 0.0}]})
    evaluation(tested, [{**rollout_row(rollout, tested / "items", "0-0"), "number": 0}])
    for folder in (run, tested):
        page = Page(write_report(folder))
        [made] = page.data["sets"][0]["rows"]
        assert (made["image"], made["turns"][0]["image"]) == (0, 1)
        assert [(image.size, image.convert("RGB").getpixel((5, 5))) for image in page.images()] == [
            ((40, 30), (255, 0, 0)), ((50, 20), (0, 0, 255))]


def test_images_are_small_and_stand_in_the_page_once(tmp_path):
    Image.effect_noise((1200, 600), 50).save(tmp_path / "noise.jpg")
    flat = [picture(tmp_path / f"{name}.png") for name in "ab"]  # two files, one image
    rows = [scored(i, image=image) for i,
            image in enumerate([tmp_path / "noise.jpg", *flat, flat[0]])]
    page = Page(write_report(training_run(tmp_path / "run", {1: rows, 2: rows})))
    assert [r["image"] for part in page.data["sets"] for r in part["rows"]] == [0, 1, 1, 1] * 2
    assert [(image.size, image.format)
            for image in page.images()] == [((320, 160), "JPEG"), ((40, 30), "PNG")]
    assert [size for _, *size in page.data["images"]] == [[1200, 600], [40, 30]]


@pytest.mark.parametrize("make", [training_run, evaluation], ids=["training", "evaluation"])
def test_a_row_cannot_make_us_read_another_file(tmp_path, make):
    run = tmp_path / "run"
    own = run / "rollouts" / "step_1" if make is training_run else run / "items"
    secret = Path(picture(tmp_path / "secret.png", "green"))
    for beside in (run / "secret.png", own.parent / "secret.png", own / "deep" / "secret.png",
                   own / "fine.png"):
        picture(beside, "green" if beside.name == "secret.png" else "blue")
    (own / "link.png").symlink_to(secret)
    (own / "out").symlink_to(tmp_path)
    (own / "loop.png").symlink_to(own / "loop.png")
    names = ["../secret.png", "../../secret.png", f"{own.name}/../secret.png",
             f"{own.name}/../../secret.png", str(secret),
             "link.png", "out/secret.png", "deep/secret.png", "loop.png", "..", ".", "", "x" * 5000,
             "a\0b", "\ud800", 7, {"a": 1}, "absent.png"]
    rows = [row(i, code(image=name)) for i, name in enumerate(names)]
    rows.append(row(99, code(image="fine.png"), code(image=f"{own.name}/fine.png")))
    page = Page(write_report(make(run, {1: rows} if make is training_run else rows)))
    *bad, good = page.data["sets"][0]["rows"]
    assert [r["turns"][0]["image"] for r in bad] == [-1] * len(names)
    assert [turn.get("image") for turn in good["turns"]] == [0, 0, None]
    assert [image.convert("RGB").getpixel((0, 0)) for image in page.images()] == [(0, 0, 255)]


def test_a_task_image_is_shown_if_it_is_one(tmp_path, monkeypatch):
    ghostscript = tmp_path / "bin" / "gs"  # what Pillow starts for a PostScript file
    ghostscript.parent.mkdir()
    ghostscript.write_text(f"#!/bin/sh\ntouch '{tmp_path}/started'\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", f"{ghostscript.parent}:{os.environ['PATH']}")
    os.mkfifo(tmp_path / "pipe.png")  # opening it would wait for ever
    (tmp_path / "text.png").write_text("password")
    Image.new("RGB", (9, 9)).save(tmp_path / "program.eps")
    whole = Path(picture(tmp_path / "whole.png", size=(300, 200)))
    (tmp_path / "half.png").write_bytes(whole.read_bytes()[:200])
    names = ["pipe.png", "text.png", "program.eps", "half.png", "absent.png", ".", "x" * 5000,
             "a\0b", "\ud800", "whole.png"]
    rows = [scored(i, image=tmp_path / name) for i,
            name in enumerate(names)] + [scored(98, image=None), scored(99, image=12)]
    page = Page(write_report(training_run(tmp_path / "run", {1: rows})))
    assert [r["image"] for r in page.data["sets"][0]["rows"]] == [-1] * 9 + [0, None, -1]
    assert not (tmp_path / "started").exists()


def test_a_row_that_is_being_written_is_left_out(tmp_path):
    run = training_run(tmp_path / "run", {1: [scored(1)]})
    for name in ("metrics.jsonl", "rollouts/step_1.jsonl"):
        with open(run / name, "a") as file:
            file.write('{"step": 2, "succ')
    (run / "rollouts" / "step_2.jsonl.tmp").write_text("half")
    page = Page(write_report(run))
    assert (len(page.data["metrics"]),
            [len(part["rows"]) for part in page.data["sets"]]) == (1, [1])


@pytest.mark.parametrize("name, line, reason", [
    ("items.jsonl", "{",
     "not JSON (Expecting property name enclosed in double quotes); mend the line"),
    ("items.jsonl", "[]", "is no object but list; mend the line"),
    ("items.jsonl", '{"id": 1}', "turns must be a list of objects; mend the line"),
    ("items.jsonl", '{"id": 1, "turns": [3]}', "turns must be a list of objects; mend the line"),
    ("scores.json", "3", "is no object but int; mend the line")])
def test_a_damaged_file_is_named(tmp_path, name, line, reason):
    folder = evaluation(tmp_path / "run", [item(1)])
    (folder / name).write_text(line + "\n")
    with pytest.raises(ValueError) as error:
        write_report(folder)
    assert str(error.value) == f"{folder / name}, line 1: {reason}"


def test_the_command_prints_the_path_and_loads_no_torch(tmp_path):
    run = evaluation(tmp_path / "run", [item(1)])
    command = f"import sys, evaluate; print(evaluate.main(['--report', {str(run)!r}])); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == (f"{run / 'report.html'}\n0\nFalse\n", "")


def test_a_folder_of_neither_kind_is_an_error(tmp_path):
    done = subprocess.run([sys.executable, "evaluate.py", "--report", str(tmp_path)], cwd=ROOT,
                          capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (
        2, "", f"error: {tmp_path} has neither metrics.jsonl, as a training run does, nor items.jsonl, as an evaluation does; "
               "give the --output_dir of one\n")


# ---------------------------------------------------------------- the page in a browser

class Browser:
    """Headless Chromium, spoken to in the DevTools protocol over its pipe: JSON that ends with a
    zero byte."""

    def __init__(self, folder):
        (commands, send), (self.replies, events) = os.pipe(), os.pipe()
        # clear of 3 and 4, where it looks
        high = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (commands, events)]
        self.pid = os.posix_spawn(CHROMIUM, [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
            "--no-first-run", "--disable-sync",
            "--disable-background-networking", "--disable-component-update",
            "--remote-debugging-pipe", f"--user-data-dir={folder}"], os.environ, file_actions=[
                (os.POSIX_SPAWN_DUP2, high[0], 3), (os.POSIX_SPAWN_DUP2, high[1], 4),
                (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0)])
        for end in (commands, events, *high):
            os.close(end)
        self.commands, self.rest, self.number, self.session, self.events = os.fdopen(send, "wb"), b"", 0, {}, []

    def message(self):
        while b"\0" not in self.rest:
            part = os.read(self.replies, 1 << 20)
            assert part, "the browser has ended"
            self.rest += part
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)

    def call(self, method, **params):
        self.number += 1
        command = {"id": self.number, "method": method, "params": params, **self.session}
        self.commands.write(json.dumps(command).encode() + b"\0")
        self.commands.flush()
        while (message := self.message()).get("id") != self.number:
            self.events.append(message)
        assert "error" not in message, message
        return message["result"]

    def open(self, path, width=1280, scheme="light"):
        """A fresh tab of that width; returns the seconds until the page was loaded and had been
        laid out."""
        self.session, self.events = {}, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = {"sessionId": self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900,
                  deviceScaleFactor=1, mobile=width < 600)
        self.call("Emulation.setEmulatedMedia",
                  features=[{"name": "prefers-color-scheme", "value": scheme}])
        start = time.perf_counter()
        self.call("Page.navigate", url=path.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self.message())
        self.run("document.body.offsetHeight")
        return time.perf_counter() - start

    def run(self, script):
        """The value of an expression; a promise is waited for."""
        done = self.call("Runtime.evaluate", expression=script, returnByValue=True,
                         awaitPromise=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def texts(self, selector):
        return self.run(f"[...document.querySelectorAll({json.dumps(selector)})].filter((e) => e.checkVisibility())"
                        ".map((e) => e.innerText.replaceAll('\\u00a0', ' '))")

    def press(self, key):
        number = {"Enter": 13, "Tab": 9, "ArrowLeft": 37, "ArrowRight": 39, "Home": 36}[key]
        text = "\r" if key == "Enter" else ""
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, code=key, text=text,
                  windowsVirtualKeyCode=number)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key)

    def focused(self):
        return self.run("`${document.activeElement.tagName} ${document.activeElement.innerText?.split('\\n')[0] ?? ''}`")

    def choose(self, label, value):
        """Set the control with that label, as a hand would."""
        self.run(f"""(() => {{
            const labels = [...document.querySelectorAll("label")];
            const label = labels.find((each) => each.firstChild.textContent === {json.dumps(label)});
            const control = label.querySelector("select, input");
            control.value = {json.dumps(value)};
            control.dispatchEvent(new Event(control.tagName === "SELECT" ? "change" : "input"));
        }})()""")

    def open_all(self):
        """Open all details, the ones inside too, and wait until they are drawn."""
        self.run("(async () => { for (const each of document.querySelectorAll('details')) each.open = true; "
                 "await new Promise((done) => setTimeout(done, 50)); })()")

    def complaints(self):
        """Errors of the page's script and of its policy."""
        return [event["params"]
                for event in self.events
                if event["method"] in ("Log.entryAdded", "Runtime.exceptionThrown")]

    def close(self):
        self.session = {}
        self.call("Browser.close")
        os.waitpid(self.pid, 0)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    one = Browser(tmp_path_factory.mktemp("chromium"))
    yield one
    one.close()


def coding_run(tmp_path):
    """Two steps of two tasks, two samples each."""
    task, made = picture(tmp_path / "task.png", size=(200, 100)), "step_9/0-0-0.png"
    picture(tmp_path / "run" / "rollouts" / made, "blue", (50, 25))
    rows = [scored(1, code(image=made), image=task),
            scored(1, code(ok=False, error="timeout", observation="Error: time is up."),
                   right=False, image=task),
            scored(2, search(), image=None),
            scored(2, search(ok=False, error="http", lost=True), right=False, image=None)]
    return training_run(tmp_path / "run", {1: rows[2:], 9: rows})


@needs_browser
def test_a_training_run_is_shown(tmp_path, browser):
    browser.open(write_report(coding_run(tmp_path)))
    assert browser.run("document.title") == browser.texts("h1")[0] == "Training run run"
    assert browser.texts(".lead") == ["data/model on train.json: 9 steps of 1 × 2 rollouts. Held-out success: 25.0 % before, "
                                      "75.0 % after step 9, 0.0 % with the tools off. Took 12 s."]
    assert browser.texts(".chart h3") == ["Success", "Reward and its parts", "Loss", "KL", "Gap", "Entropy",
                                          "Gradient norm",
                                          "What goes wrong", "Seconds a step"]
    assert browser.texts(".chart:first-child .legend li") == [
        "step 9", "rollouts 100.0 %", "held out, tools on 75.0 %", "held out, tools off 0.0 %"]
    assert browser.texts("tbody tr:first-child")[0].split("\t") == ["all", "25.0 %", "75.0 %", "0.0 %"]
    assert browser.texts(".task h3") == ["task-1", "task-2"]
    assert [text.split("\n") for text in browser.texts(".rollout > summary")][:2] == [
        ["sample 1", "✓ right", "crab", "code → answer", "reward 2.00", "advantage +0.50"],
        ["sample 2", "✗ wrong", "crab", "code → answer", "tool error: timeout", "reward 1.00",
         "advantage −0.50"]]
    # the first is open: what the policy wrote is plain, all else shaded
    assert browser.texts(".turns .masked > .label") == ["prompt", "observation 1: code ran, 0.01 s"]
    assert browser.texts(".turns .sampled > .label") == ["turn 1: code", "turn 2: answer"]
    assert browser.texts(".turns pre.code") == ["```python\nimage.rotate(90)\n```"]
    assert browser.texts(".turns figcaption") == ["the task's image, 200 × 100", "before: the task's image, 200 × 100",
                                                  "after the code, 50 × 25"]
    assert browser.run("[...document.querySelectorAll('.turns img')].map((e) => e.naturalWidth)") == [200, 200, 50]
    assert browser.texts(".turns .facts div") == [
        "ended:\nit answered", "answer\ncrab", "right:\ncrab", "format\n1.00", "accuracy\n1.00",
        "reward\n2.00", "advantage\n+0.50", "tokens\n100"]
    masked, sampled = browser.run("['.masked', '.sampled'].map((name) => "
                                  "getComputedStyle(document.querySelector(`.turns ${name}`)).backgroundColor)")
    assert (masked, sampled) == ("rgb(240, 236, 226)", "rgba(0, 0, 0, 0)")
    browser.choose("written steps", "0")
    assert browser.texts(".task h3") == ["task-2"]
    assert browser.complaints() == []


@needs_browser
def test_an_evaluation_is_shown_and_filtered(tmp_path, browser):
    items = [item(0, code()), item(0, code(ok=False, error="timeout"), right=False, sample=1),
             item(1, code(ok=False, error="crash"), code(), split="hard",
                  type=["dark", "rotation90"]),
             item(2, search(), split="hard", type=["crop"], right=False, question="Which owl?"),
             item(3, split="hard", type=[], right=False, error="ConnectionError: refused", turns=[],
                  pred_answer=None, answer=None, stop=None)]
    browser.open(write_report(evaluation(tmp_path / "run", items)))
    assert browser.texts(".lead") == ["data/model on mat-coding (MAT-Coding.json): 4 tasks, 5 items. F1 35.9 %, "
                                      "exact match 22.5 %; 1 item failed."]
    assert [text.split() for text in browser.texts("tbody tr")] == [
        ["all", "200", "35.90", "(29.8–42.1)", "22.50", "(17.0–28.5)", "36.25", "(29.8–42.1)",
         "22.50", "(17.0–28.5)"],
        ["simple", "70", "35.90", "(29.8–42.1)", "22.50", "(17.0–28.5)", "–", "–"]]
    assert browser.texts("section .facts")[0].split("\n") == [
        "failed items", "1", "turns an item", "2.5", "tool calls", "31", "tool errors", "timeout 3",
        "seconds in tools", "4.2"]

    def chosen(**filters):
        for name, value in filters.items():
            browser.choose(name.replace("_", " "), value)
        titles = [text.split(" · ")[0] for text in browser.texts(".task h3")]
        for name in filters:
            browser.choose(name.replace("_", " "), "")
        return titles
    assert chosen() == ["task-0", "task-1", "task-2", "task-3"]
    assert chosen(split="simple") == ["task-0"]
    assert chosen(type="dark") == ["task-0", "task-1"]
    assert chosen(type="(none)") == ["task-3"]
    assert chosen(outcome="right") == ["task-0", "task-1"]
    assert chosen(outcome="wrong") == ["task-0", "task-2"]
    assert chosen(outcome="failed") == ["task-3"]
    assert chosen(tool_error="any") == ["task-0", "task-1"]
    assert chosen(tool_error="crash") == ["task-1"]
    assert chosen(outcome="wrong", split="hard") == ["task-2"]
    assert chosen(**{"text in question, answer or id": "OWL"}) == ["task-0", "task-2"]
    browser.choose("tool error", "timeout")
    assert browser.texts("[role=status]") == ["1 of 5 items, of 1 task"]
    assert browser.texts(".task .note")[0] == "right: crab · 1 of 2 samples chosen"
    browser.choose("tool error", "")
    browser.choose("outcome", "failed")
    browser.open_all()
    assert browser.texts(".turns pre") == ["ConnectionError: refused"]
    assert browser.complaints() == []


@needs_browser
def test_an_evaluation_under_way_has_no_scores_yet(tmp_path, browser):
    folder = evaluation(tmp_path / "run", [item(0)])
    (folder / "scores.json").unlink()
    browser.open(write_report(folder))
    assert browser.texts("main section p")[0] == "There is no scores.json yet: the evaluation is under way, or was stopped."
    assert browser.texts(".task h3") == ["task-0 · coding · dark · simple"]


@needs_browser
@pytest.mark.parametrize("kind", ["training", "evaluation"])
def test_hostile_text_is_shown_and_does_nothing(tmp_path, browser, kind):
    texts = dict.fromkeys(["id", "question", "answer", "stop", "family", "split", "error",
                           "pred_answer", "image"], HOSTILE)
    turns = [{**search(HOSTILE), "action": HOSTILE, "observation": HOSTILE, "error": HOSTILE,
              "ok": False},
             {"text": HOSTILE, "action": "code", "ok": True, "observation": HOSTILE,
              "image": HOSTILE},
             {"text": f"<code>{HOSTILE}</code><think>", "action": "invalid", "observation": None}]
    lists = {"answers": [HOSTILE], "gt": [HOSTILE], "type": [HOSTILE]}
    if kind == "training":
        rows = [scored(1, **texts, **lists, turns=turns, reward_parts={HOSTILE: 1.0})]
        folder = training_run(tmp_path / "run", {1: rows}, model=HOSTILE)
    else:
        folder = evaluation(tmp_path / "run", [item(1, **texts, **lists, turns=turns)])
        (folder / "scores.json").write_text(json.dumps({
            HOSTILE: {"f1": 1.0, "em": 1.0, "n": 1}, "tools": {"errors": {HOSTILE: 1}}}))
    browser.open(write_report(folder))
    browser.open_all()
    assert browser.run("document.title") == ("Training run run" if kind == "training" else "Evaluation run")
    assert browser.run("[document.scripts.length, document.querySelectorAll('[onerror], main b:empty').length]") == [2, 0]
    assert browser.run("document.querySelectorAll('.turns img').length") == 0
    shown = browser.run("document.querySelector('main').textContent")
    # shown in all of its places, to the last character of the tag
    assert shown.count("document.title='hacked'\"") >= 10
    assert browser.complaints() == []  # not even an attempt that the policy had to stop


@needs_browser
def test_odd_values_do_not_break_the_page(tmp_path, browser):
    odd = [scored(1, answers="crab", answer=3, question=None, stop=None, reward=None, advantage="x",
                  reward_parts=None, success=None),
           {"turns": [{}, {"text": None, "action": 4, "ok": False, "observation": 3,
                           "seconds": "x"}]}]
    folder = training_run(tmp_path / "run", {1: odd})
    write_rows(folder / "metrics.jsonl",
               [{"step": 1, "success": None, "reward": 1.0, "gap": 0.0, "kl": "x"}])
    (folder / "evaluations.jsonl").unlink()
    (folder / "config.json").unlink()
    browser.open(write_report(folder))
    browser.open_all()
    # of the others there is nothing to draw
    assert browser.texts(".chart h3") == ["Reward and its parts"]
    assert len(browser.texts(".turns")) == 2 and browser.complaints() == []


@needs_browser
def test_a_run_that_is_on_its_way_has_no_figure_after_it(tmp_path, browser):
    folder = training_run(tmp_path / "run", {10: [scored(1)]})
    (folder / "summary.json").unlink()
    (folder / "evaluations.jsonl").write_text((folder / "evaluations.jsonl").read_text().splitlines(keepends=True)[0])
    browser.open(write_report(folder))
    assert browser.texts("thead th") == ["", "before"] and browser.texts("tbody td")[0].split() == ["25.0", "%"]


@needs_browser
def test_every_part_of_the_reward_has_a_line_of_its_own(tmp_path, browser):
    folder = training_run(tmp_path / "run", {3: [scored(1)]})
    names = [f"reward_{part}" for part in WEIGHTS]
    write_rows(folder / "metrics.jsonl", [{"step": n, "reward": 1.0, **dict.fromkeys(names, n / 4)} for n in (1, 2, 3)])
    browser.open(write_report(folder))
    looks = browser.run("""[...document.querySelectorAll(".chart path.series[d*=L]")].map((e) =>
        getComputedStyle(e).stroke + getComputedStyle(e).strokeDasharray)""")
    assert len(looks) == len(set(looks)) >= len(names) and not any(look.startswith("none") for look in looks)


@needs_browser
def test_the_policy_stops_what_the_script_would_let_through(tmp_path, browser):
    """The second line: HTML put in by force runs nothing and asks a live server for nothing."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    browser.open(write_report(evaluation(tmp_path / "run", [item(0)])))
    url = f"http://127.0.0.1:{server.server_port}"
    browser.run(f"""(async () => {{
        const range = document.createRange();  // its scripts would run, unlike innerHTML's
        document.body.append(range.createContextualFragment(`<script>document.title = "hacked"</script>
            <img src="data:," onerror="document.title = 'hacked'"><img src="{url}/image"><iframe src="{url}/frame"></iframe>
            <script src="{url}/script"></script><link rel="stylesheet" href="{url}/style"><form action="{url}/form"></form>`));
        await fetch("{url}/fetch").catch(() => 0);
        document.querySelector("form").submit();
        await new Promise((done) => setTimeout(done, 300));
    }})()""")
    server.shutdown()
    server.server_close()
    assert (browser.run("document.title"), asked) == ("Evaluation run", [])


@needs_browser
def test_the_keyboard_reaches_and_works_everything(tmp_path, browser):
    browser.open(write_report(coding_run(tmp_path)))
    stops = []
    for _ in range(40):
        browser.press("Tab")
        stops.append(browser.focused())
        if stops[-1].startswith("SUMMARY sample 1"):
            break
    assert [stop for stop in stops if not stop.startswith("svg")] == [
        "A Skip to the rollouts", "SUMMARY All flags", "SUMMARY The same numbers as a table",
        "DIV share of exact matches, 4 tasks, last evaluation at step 9", "SELECT step 1",
        "BUTTON ← Earlier", "SELECT all", "SELECT all", "INPUT ", "SUMMARY sample 1"]
    assert sum(stop.startswith("svg") for stop in stops) == 9
    assert browser.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    assert browser.run("document.activeElement.parentElement.open") is True
    browser.press("Enter")
    assert browser.run("document.activeElement.parentElement.open") is False
    browser.press("ArrowLeft")  # the step before; the one after; there is none after that
    assert browser.texts(".task h3") == ["task-2"]
    browser.run("document.querySelector('.rollout > summary').focus()")
    browser.press("ArrowRight")
    browser.press("ArrowRight")
    assert browser.texts(".task h3") == ["task-1", "task-2"]
    browser.run("document.querySelector('input').focus()")
    browser.press("ArrowLeft")  # moves in the text
    assert browser.texts(".task h3") == ["task-1", "task-2"]
    browser.run("document.querySelector('.chart svg').focus()")
    browser.press("ArrowLeft")
    assert browser.run("document.activeElement.getAttribute('aria-valuetext')") == (
        "step 8: rollouts 88.9\u00a0%, held out, tools on –, held out, tools off –")
    browser.press("Home")
    assert browser.texts(".chart:first-child .legend li") == [
        "step 0", "rollouts –", "held out, tools on 25.0 %", "held out, tools off –"]
    assert browser.texts(".task h3") == ["task-1", "task-2"]  # the chart's arrows are the chart's


@needs_browser
@pytest.mark.parametrize("title, scale, expected", [
    ("Success", lambda text: float(text.removesuffix("\u00a0%")) / 100,
     [n / 9 for n in range(1, 10)]),
    ("KL", float, [n / 100 for n in range(1, 10)]),
    ("Gap", lambda text: math.log10(float(text)), [math.log10(3e-7 * n) for n in range(1, 10)])])
def test_a_curve_stands_where_its_axis_says(tmp_path, browser, title, scale, expected):
    browser.open(write_report(coding_run(tmp_path)))
    axis, path = browser.run(f"""(() => {{
        const chart = [...document.querySelectorAll(".chart")].find((each) => each.innerText.startsWith("{title}"));
        const texts = [...chart.querySelectorAll("text[text-anchor=end]")].filter((each) => each.textContent !== "step");
        return [texts.map((each) => [each.textContent, each.getAttribute("y") - 4]),
                chart.querySelector("path.series").getAttribute("d")];
    }})()""")
    (low, bottom), (high, top) = [(scale(text), y) for text, y in (axis[0], axis[-1])]
    per_pixel = (high - low) / (bottom - top)
    points = [tuple(map(float, point.split())) for point in re.split("[ML]", path)[1:]]
    assert [low + (bottom - y) * per_pixel for _,
            y in points] == pytest.approx(expected, abs=0.06 * per_pixel)
    gaps = [b - a for (a, _), (b, _) in itertools.pairwise(points)]
    # the path is rounded to tenths of a pixel
    assert gaps == pytest.approx([gaps[0]] * 8, abs=0.11)


@needs_browser
def test_a_number_that_is_not_finite_leaves_a_gap(tmp_path, browser):
    browser.open(write_report(coding_run(tmp_path)))
    path = browser.run("document.querySelectorAll('.chart')[6].querySelector('path.series').getAttribute('d')")
    assert re.sub("[^ML]", "", path) == "MMLLLLLL"  # 1, 3 to 9
    # alone, so a dot
    assert browser.run("document.querySelectorAll('.chart')[6].querySelectorAll('svg > .dot').length") == 1


@needs_browser
def test_a_pointer_reads_a_curve(tmp_path, browser):
    browser.open(write_report(coding_run(tmp_path)))
    x, y = browser.run("(() => { const box = document.querySelector('.chart svg').getBoundingClientRect(); "
                       "return [box.left + box.width * (52 + 336 * 3.2 / 9) / 400, box.top + 40]; })()")
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    assert browser.texts(".chart:first-child .legend li")[:2] == ["step 3", "rollouts 33.3 %"]


@needs_browser
def test_what_can_be_focused_has_a_name(tmp_path, browser):
    browser.open(write_report(coding_run(tmp_path)))
    browser.open_all()
    nodes = [node
             for node in browser.call("Accessibility.getFullAXTree")["nodes"]
             if not node["ignored"]]

    def is_focusable(node):
        return any(p["name"] == "focusable" and p["value"]["value"]
                   for p in node.get("properties", []))
    named = [node
             for node in nodes if is_focusable(node) and node["role"]["value"] != "RootWebArea"]
    named += [node for node in nodes if node["role"]["value"] == "image"]
    assert len(named) > 30
    assert [node["role"] for node in named if not node["name"].get("value", "").strip()] == []


CONTRAST = """(() => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const linear = (c) => (c / 255 <= 0.03928 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4);
  const light = (colour) => [0.2126, 0.7152, 0.0722].reduce((sum, weight, i) => sum + weight * linear(colour[i]), 0);
  const behind = (node) => {
    const colour = parse(getComputedStyle(node).backgroundColor);
    return colour[3] === 0 ? behind(node.parentElement) : colour;
  };
  const found = [], walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const node = walk.currentNode.parentElement;
    if (!walk.currentNode.textContent.trim() || !node.checkVisibility()) continue;
    if (node.closest("script, noscript, :disabled")) continue;
    const style = getComputedStyle(node), isDrawn = node.namespaceURI.endsWith("svg");
    const [a, b] = [light(parse(isDrawn ? style.fill : style.color)), light(behind(node))].sort((x, y) => y - x);
    found.push([(a + 0.05) / (b + 0.05), node.outerHTML.slice(0, 80)]);
  }
  return found;
})()"""


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_is_that_of_wcag_aa(tmp_path, browser, scheme):
    backgrounds = []
    items = [item(0, code(image="no.png")), item(1, error="x")]
    for folder in (coding_run(tmp_path), evaluation(tmp_path / "evaluation", items)):
        browser.open(write_report(folder), scheme=scheme)
        browser.open_all()
        ratios = browser.run(CONTRAST)
        assert len(ratios) > 60 and [(ratio, where) for ratio, where in ratios if ratio < 4.5] == []
        backgrounds.append(browser.run("getComputedStyle(document.body).backgroundColor"))
    assert backgrounds == [{"light": "rgb(252, 251, 248)", "dark": "rgb(21, 24, 27)"}[scheme]] * 2


@needs_browser
def test_a_phone_needs_no_sideways_scrolling(tmp_path, browser):
    long = "W" * 400
    wide = picture(tmp_path / "wide.png", size=(2000, 100))
    turns = [search(long, ok=False, error=long),
             code(text=f"<code>{long}</code>", observation=long)]
    texts = dict.fromkeys(["id", "question", "answer", "pred_answer", "split"], long)
    rows = [scored(1, *turns, **texts, image=wide, answers=[long], reward_parts={long: 1.0})
            for _ in range(2)]
    items = [item(i, *turns, **texts, error=long) for i in range(2)]
    for folder in (training_run(tmp_path / "run", {1: rows}, model=long),
                   evaluation(tmp_path / "evaluation", items)):
        browser.open(write_report(folder), width=390)
        browser.open_all()
        assert len(browser.texts(".turns")) == 2
        beyond = browser.run("""[...document.querySelectorAll("body *:not(.skip)")].filter((e) => e.checkVisibility()
            && !e.closest(".scroll, pre.code, select") && (e.getBoundingClientRect().right > 390 || e.clientWidth &&
            e.scrollWidth > e.clientWidth)).map((e) => e.outerHTML.slice(0, 60))""")  # beyond the page, or cut off
        assert (beyond, browser.run("document.documentElement.scrollWidth")) == ([], 390)


@needs_browser
def test_a_phone_shows_every_column_of_figures(tmp_path, browser):
    wide = {"f1": 100.0, "em": 100.0, "n": 12576, "f1_95": [100.0, 100.0], "em_95": [100.0, 100.0]}
    splits = dict.fromkeys(["all", "simple", "hard", "coding", "search"], wide)
    folder = evaluation(tmp_path / "evaluation", [item(0, search())])
    (folder / "scores.json").write_text(json.dumps({**splits, "fair": splits, "failed": 0}))
    run = coding_run(tmp_path)
    held_out = {"success": 1.0, "n": 240, "by_family": {"search": 1.0},
                "by_type": {"overexposure+rotation180": 1.0}}
    write_rows(run / "evaluations.jsonl", [{"step": step, "tools": tools, **held_out}
                                           for step, tools in ((0, "on"), (9, "on"), (9, "off"))])
    for page, heads in ((folder, ["split", "n", "F1", "EM", "fair F1", "fair EM"]),
                        (run, ["", "before", "after", "tools off"])):
        browser.open(write_report(page), width=390)
        assert browser.texts("thead th") == heads
        assert browser.run("Math.max(...[...document.querySelectorAll('th, td')].filter((e) => e.checkVisibility())"
                           # the page's margin
                           ".map((e) => e.getBoundingClientRect().right))") <= 390 - 16
        lines = browser.run("""[...document.querySelectorAll("tbody th")].map((e) => {
            const range = document.createRange();
            range.selectNodeContents(e);
            return range.getClientRects().length;
        })""")  # of each name; only the long one is broken
        assert lines == ([1] * 5 if page == folder else [1, 1, 2])


@needs_browser
def test_a_title_says_each_thing_once(tmp_path, browser):
    items = [item(0, code(), split="coding", type=["none"]),
             item(1, search(), family="search", split="search", type=[])]
    browser.open(write_report(evaluation(tmp_path / "evaluation", items)))
    assert browser.texts(".task h3") == ["task-0 · coding · none", "task-1 · search"]


@needs_browser
def test_parts_without_a_value_have_no_curve_and_those_without_one_in_a_step_a_gap(tmp_path, browser):
    run = coding_run(tmp_path)
    write_rows(run / "metrics.jsonl",
               [{**row, "success": None, "reward_search": [0.25, None][row["step"] % 2],
                 "reward_code": None} for row in read_objects(run / "metrics.jsonl")])
    browser.open(write_report(run))
    legends = [text.split(" ")[0] for text in browser.texts(".chart:nth-child(2) .legend li")]
    assert legends == ["step", "reward", "format", "accuracy", "search"]
    assert "search –" in browser.texts(".chart:nth-child(2) .legend li")  # of the last step
    assert not any("rollouts" in text for text in browser.texts(".chart:first-child .legend li"))
    assert browser.complaints() == []


@needs_browser
@pytest.mark.thorough
def test_2000_rollouts_open_within_two_seconds(tmp_path, browser):
    """With 400 images and 400 steps of metrics; only the first tasks are drawn, and the turns of
    opened rollouts."""
    run = tmp_path / "run"
    for i in range(400):
        picture(run / "rollouts" / "step_400" / f"{i}.png", (i % 256, i // 256, 90), (64, 64))
    rows = [scored(i // 8, search(),
                   code(observation="word " * 100, image=f"step_400/{i % 400}.png"),
                   right=i % 3 == 0)
            for i in range(2000)]
    training_run(run, {400: rows}, group_size=8)
    path = write_report(run)
    assert len(Page(path).data["images"]) == 400
    seconds = browser.open(path)
    assert browser.texts("[role=status]") == ["2,000 of 2,000 rollouts, of 250 tasks; the first 20 tasks are shown"]
    assert browser.run("['.rollout', '.turns'].map((each) => document.querySelectorAll(each).length)") == [160, 1]
    browser.run("[...document.querySelectorAll('button')].at(-1).focus()")
    browser.press("Enter")
    assert len(browser.texts(".rollout")) == 320
    assert browser.run("document.activeElement === document.querySelectorAll('.task')[20].querySelector('summary')") is True
    assert seconds < 2
