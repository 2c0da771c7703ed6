"""train.py as people run it: a real process, a real model, real tools."""
import ast
import itertools
import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import fields
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
import torch.distributed as dist
from conftest import run_script
from PIL import Image, ImageOps
from safetensors.torch import load_file

from data.files import holds, nothing_left, take_folder
from data.flags import parse_flags
from data.tasks import load_tasks
from reward import WEIGHTS
from rollout import Rollout, replay, roll_out
from train import Config, learning_rate, load, main, prepare, rollout_metrics, step_line

ROOT = Path(__file__).parent.parent
TIMINGS = re.compile(r"seconds|tokens_per_s")
QUICK = {"prompts_per_step": 2, "group_size": 4, "eval_limit": 4, "max_turns": 3}


def train(out: Path, *flags: str, check: bool = True, **settings) -> CompletedProcess:
    """`python train.py` on one process, with small settings that flags and settings add to."""
    settings = {**QUICK, "output_dir": out, **settings}
    done = run_script("train.py", *[x for name, value in settings.items()
                                    for x in (f"--{name}", value)], *flags)
    assert not check or done.returncode == 0, done.stderr
    return done


def rows(path: Path) -> list[dict]:
    """Rows of a .jsonl file without what the clock decides."""
    return [{key: value for key, value in json.loads(line).items() if not TIMINGS.search(key)}
            for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory) -> Path:
    """Four steps in one go, with a checkpoint after the second."""
    out = tmp_path_factory.mktemp("run") / "whole"
    train(out, steps=4, save_every=2, rollouts_every=2)
    return out


def test_a_run_leaves_what_the_readme_lists(whole_run):
    summary = json.loads((whole_run / "summary.json").read_text())
    assert {"success_before", "success_after", "success_tools_off", "by_family", "steps", "seconds",
            "seed"} <= set(summary)
    assert [row["step"] for row in rows(whole_run / "metrics.jsonl")] == [1, 2, 3, 4]
    written = sorted(path.name for path in (whole_run / "rollouts").glob("*.jsonl"))
    assert written == ["step_1.jsonl", "step_2.jsonl", "step_4.jsonl"]
    shown = rows(whole_run / "rollouts" / "step_1.jsonl")
    assert len(shown) == 8
    assert {"id", "question", "turns", "answer", "answers", "reward", "reward_parts",
            "advantage"} <= set(shown[0])
    images = [turn["image"] for row in shown for turn in row["turns"] if "image" in turn]
    assert images and all((whole_run / "rollouts" / image).is_file() for image in images)
    assert (whole_run / "model" / "config.json").is_file()


@pytest.mark.parametrize("kept", [("coding", "search"), ("search",), ()], ids=str)
def test_figures_can_be_drawn_of_a_run_that_learnt_little(whole_run, kept, tmp_path):
    """The families that are not kept have no right answer in the last step; the first step has
    wrong ones."""
    run = shutil.copytree(whole_run, tmp_path / "run")
    turn = {"text": "<search> x </search>", "observation": "y", "ok": True}
    offline = ROOT / "data" / "offline"
    image = str(offline / json.loads((offline / "train.json").read_text())[0]["ori_image_path"])
    for step in (1, 4):
        path = run / "rollouts" / f"step_{step}.jsonl"
        path.write_text("".join(json.dumps({
            "id": f"{family}-{i}", "question": "?", "image": image, "turns": [turn],
            "answers": ["x"], "reward": 1.0,
            "answer": "x" if step == 4 and family in kept else "z"}) + "\n"
            for i, family in enumerate(("coding", "search"))))
    done = run_script("data/make_figures.py", run, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "learning_curve.png").is_file()
    assert (tmp_path / "rollouts.png").is_file() == bool(kept)
    assert ("no rollouts.png" in done.stdout) == (not kept)


def test_sampled_and_scored_log_probs_agree(whole_run):
    assert all(row["gap"] < 1e-4 for row in rows(whole_run / "metrics.jsonl"))


def test_every_weight_is_trained(whole_run):
    """FSDP leaves the root's parameters whole after a forward: an optimizer made then would train
    copies."""
    before, after = (load_file(folder / "model.safetensors")
                     for folder in (ROOT / "data" / "model", whole_run / "model"))
    assert before.keys() == after.keys()
    assert [name for name in before if torch.equal(before[name], after[name])] == []


def test_readme_defines_every_metric(whole_run):
    table = (ROOT / "data" / "README.md").read_text().split("### Metrics\n")[1].split("\n### ")[0]
    cells = [row.split("|")[1] for row in table.splitlines() if row.startswith("| `")]
    defined = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
    steps = [json.loads(line) for line in (whole_run / "metrics.jsonl").read_text().splitlines()]
    assert [set(step) for step in steps] == [defined] * 4


def test_step_mode_trains_on_single_actions(tmp_path):
    train(tmp_path / "run", mode="step", tasks="data/offline/steps.json", steps=1, eval_tasks="")
    [row] = rows(tmp_path / "run" / "metrics.jsonl")
    shown = rows(tmp_path / "run" / "rollouts" / "step_1.jsonl")
    assert row["turns"] == 1.0
    formats = [r["reward_parts"]["format"] for r in shown]
    assert row["reward_format"] == pytest.approx(sum(formats) / 8)
    # By the gold action's kind
    part_of = {"problem": "problem", "code": "code", "search": "search", "answer": "accuracy"}
    for r in shown:
        assert set(r["reward_parts"]) == {"format", part_of[r["id"].rpartition("-")[2]]}
        assert r["reward"] == pytest.approx(sum(r["reward_parts"].values()))  # 1:1
    assert all("ok" not in turn for r in shown for turn in r["turns"])  # no tool runs
    # One key for each, null where no row has it
    names = {"format", "accuracy", "search", "code", "problem"}
    logged = {name for name in row if name.startswith("reward_")}
    assert logged == {f"reward_{name}" for name in names}
    seen = {name for r in shown for name in r["reward_parts"]}
    assert {name for name in names if row[f"reward_{name}"] is None} == names - seen


def test_every_row_of_metrics_has_the_same_keys():
    def row(parts, **rest):
        return {"turns": [{"action": "answer"}], "stop": "answer", "advantage": 1.0, "reward": 1.0,
                "success": 1.0,
                "reward_parts": parts} | rest
    rest = dict.fromkeys(["step", "kl", "gap", "tokens_per_s", "skipped", "seconds",
                          "seconds_generate",
                          "seconds_tools", "seconds_reference", "seconds_update", "tasks_failed"], 0)
    full, part, empty = steps = [rollout_metrics(rows, WEIGHTS) | rest for rows in (
        [row(dict.fromkeys(WEIGHTS, 1.0)), row({"search": 0.0})],
        [row({"format": 0.5}, success=None), row({"format": 1.0})],
        [row({}, turns=[], success=None)])]
    assert full.keys() == part.keys() == empty.keys()
    assert [s["reward_search"] for s in steps] == [0.5, None, None]
    assert [s["success"] for s in steps] == [1.0, 1.0, None] and empty["valid_turns"] is None
    lines = [step_line(s, 4) for s in steps]
    parts = "(accuracy 1.00 exact 1.00 format 1.00 problem 1.00 search 0.50 tools 1.00)"
    assert f"{parts}  success 100%" in lines[0]
    assert "reward 1.00 (format 0.75)  success 100%" in lines[1]
    assert "reward 1.00 ()  kl 0.0000" in lines[2]


# The same code twice: the picture is what it was, if the second one reads what the first one made.
INVERT_TWICE = ["<think> t </think> <code> ```python\nfrom PIL import Image, ImageOps\n"
                "image = ImageOps.invert(Image.open('path_to_input_image.jpg'))\n"
                "image.save('path_to_output_image.jpg', 'PNG')\n``` </code>"] * 2
INVERT_TWICE += ["<think> t </think> <answer> red heron </answer>"]


def run_of_a_chain(*flags: str, chain_of: Callable[[dict], list[str]], monkeypatch) -> list[Rollout]:
    """A whole run in this process, whose rollouts say recorded chains. Returns the rollouts in their order."""
    played, threads = [], torch.get_num_threads()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def recorded(policy, *args, **options):
        rollouts, seconds = roll_out(policy, *args, **options, sampler=replay(policy, chain_of))
        played.extend(rollouts)
        return rollouts, seconds
    monkeypatch.setattr("train.roll_out", recorded)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(os.cpu_count()))  # one thread, as `run_script` has
    config = parse_flags(Config, "", [f"--{name}={value}" for name, value in QUICK.items()] + list(flags))
    tasks, held_out, search = prepare(config)
    try:
        main(config, tasks, held_out, search, *load(config, tasks, held_out))
    finally:
        dist.destroy_process_group()
        torch.set_num_threads(threads)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return played


@pytest.mark.parametrize("code_reads", ["newest", pytest.param("first", marks=pytest.mark.thorough)])
def test_flags_reach_the_code_tool_the_reward_and_the_held_out_files(code_reads, tmp_path, monkeypatch):
    original = Image.effect_noise((56, 56), 90).convert("RGB")
    original.save(tmp_path / "sign.png")
    for name, kind in (("a", "dark"), ("b", "rotation90")):
        (tmp_path / f"{name}.json").write_text(json.dumps([
            {"id": 1, "question": "q", "answers": ["small red heron"], "image_path": "sign.png", "type": [kind]}]))
    both = f"{tmp_path / 'a.json'},{tmp_path / 'b.json'}"
    played = run_of_a_chain(
        "--model", str(ROOT / "data/model"), "--corpus", f"sqlite:{ROOT}/data/offline/corpus.sqlite", "--steps=1",
        "--prompts_per_step=1", "--group_size=2", "--beta=0", "--tasks", str(tmp_path / "a.json"),
        "--eval_tasks", both, "--code_reads", code_reads, "--rewards=accuracy=0,exact=1", "--output_dir", str(tmp_path / "run"),
        chain_of=lambda task: INVERT_TWICE, monkeypatch=monkeypatch)
    inverted = ImageOps.invert(original)
    seen = [original, inverted, original if code_reads == "newest" else inverted]
    # Held out before, training, held out after; then without tools
    assert [rollout.task["id"] for rollout in played] == ["a: 1", "b: 1"] + [1] * 2 + ["a: 1", "b: 1"] * 2
    for rollout in played[:-2]:
        assert [picture.tobytes() for picture in rollout.pictures] == [picture.tobytes() for picture in seen]
    assert [len(rollout.pictures) for rollout in played[-2:]] == [1, 1]
    held_out = rows(tmp_path / "run" / "evaluations.jsonl")
    assert [(row["n"], sorted(row["by_type"])) for row in held_out] == [(2, ["dark", "rotation90"])] * 3
    shown = rows(tmp_path / "run" / "rollouts" / "step_1.jsonl")
    assert [(row["reward_parts"]["accuracy"], row["reward"]) for row in shown] == [(0.8, 1.0)] * 2
    pictures = [Image.open(tmp_path / "run" / "rollouts" / turn["image"]) for turn in shown[0]["turns"][:2]]
    assert [picture.tobytes() for picture in pictures] == [picture.tobytes() for picture in seen[1:]]


def test_a_held_out_file_that_is_named_twice_is_scored_sample_by_sample(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"id": 1, "question": "q", "answers": ["red heron"], "image_path": None}]))
    answers = itertools.cycle(["owl", "red heron"])
    run_of_a_chain(
        "--model", str(ROOT / "data/model"), "--corpus", f"sqlite:{ROOT}/data/offline/corpus.sqlite", "--steps=1",
        "--prompts_per_step=1", "--group_size=2", "--beta=0", "--tasks", str(path), "--eval_tasks", f"{path},{path}",
        "--output_dir", str(tmp_path / "run"), monkeypatch=monkeypatch,
        chain_of=lambda task: [f"<think> t </think> <answer> {next(answers)} </answer>"])
    assert [(row["n"], row["success"]) for row in rows(tmp_path / "run" / "evaluations.jsonl")] == [(2, 0.5)] * 3


README = (ROOT / "README.md").read_text() + (ROOT / "data" / "README.md").read_text()


def test_the_readmes_own_tasks_load_and_train(tmp_path):
    section = README.split("## Tasks of your own")[1].split("\n## ")[0]
    rows_of_readme = json.loads(section.split("```json\n")[1].split("```")[0])
    command = shlex.split(section.split("```bash\n")[1].split("```")[0])
    assert command[:3] == ["torchrun", "--nproc_per_node=2", "train.py"]
    (tmp_path / "mine").mkdir()
    for row in rows_of_readme:
        if row["image_path"]:
            Image.new("RGB", (56, 56), "navy").save(tmp_path / "mine" / row["image_path"])
    path = tmp_path / "mine" / "tasks.json"
    path.write_text(json.dumps(rows_of_readme))
    tasks = load_tasks(path)
    assert [task["family"] for task in tasks] == ["coding", "search", "search"]
    assert [bool(task["image"]) for task in tasks] == [True, True, False]
    explained = set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE))
    assert explained == {name for row in rows_of_readme for name in row} | {"split"}
    flags = [str(path) if flag == "mine/tasks.json" else flag for flag in command[3:]]
    assert str(path) in flags
    for key in ("id", "type", "family"):  # not required
        path.write_text(json.dumps([{name: value for name, value in row.items() if name != key}
                                    for row in rows_of_readme]))
        assert len(load_tasks(path)) == 3
    done = run_script("train.py", *flags, "--output_dir", tmp_path / "run", "--steps", 1,
                      "--group_size", 2)
    assert done.returncode == 0, done.stderr
    assert {row["id"] for row in rows(tmp_path / "run" / "rollouts" / "step_1.jsonl")} == {1, 2, 3}


@pytest.mark.parametrize("package, environment",
                         [("tensorboard", {}), ("wandb", {"WANDB_MODE": "offline"})])
def test_the_readmes_lines_send_metrics_on(package, environment, tmp_path):
    pytest.importorskip(package)
    [code] = [block.split("```")[0] for block in README.split("```python\n")[1:]
              if package in block.split("```")[0]]
    (tmp_path / "runs" / "default").mkdir(parents=True)
    (tmp_path / "runs" / "default" / "metrics.jsonl").write_text(
        '{"step": 1, "kl": null, "reward": 0.5}\n{"step": 2, "kl": 0.1, "reward": 0.75}\n')
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True,
                   env=os.environ | environment)
    assert [path for path in tmp_path.rglob("*") if package[:5] in path.name
            or "tfevents" in path.name]


def write_tasks(folder: Path, **changes) -> str:
    """A file with one sound coding task, but for the changes; None leaves a field out."""
    row = {"id": "one", "family": "coding", "question": "?", "answers": ["K"], "type": ["none"],
           "ori_image_path": "a.png", "processed_image_path": "a.png"} | changes
    row = {key: value for key, value in row.items() if value is not None}
    (folder / "tasks.json").write_text(json.dumps([row]))
    return str(folder / "tasks.json")


def broken_image(folder):
    (folder / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n but not really")
    return {"tasks": write_tasks(folder)}, ["tasks.json, row 1", "a.png"]


def malformed(folder):
    (folder / "tasks.json").write_text('[{"id": 1,\n "question": }]')
    return {"tasks": str(folder / "tasks.json")}, ["tasks.json", "line 2"]


def no_weights(folder):
    (folder / "config.json").write_text("{}")
    return {"model": str(folder)}, ["--model", "no weights", ".safetensors"]


def held_run(folder):
    (folder / "metrics.jsonl").write_text("")
    return {"output_dir": str(folder)}, ["--resume"]


@pytest.mark.parametrize("case", [
    lambda folder: ({"tasks": write_tasks(folder)}, ["tasks.json, row 1", "a.png"]),
    broken_image,
    lambda folder: ({"tasks": write_tasks(folder, answers=None)}, ["tasks.json, row 1", "answer"]),
    malformed,
    no_weights,
    held_run,
    lambda folder: ({"group_size": 1}, ["--group_size 1", "at least 2"]),
    lambda folder: ({"beta": float("nan")}, ["--beta nan", "finite"]),
    lambda folder: ({"rewards": "beauty=1"}, ["beauty", "format"]),
    lambda folder: ({"corpus": "gopher:x"}, ["gopher", "sqlite"]),
    lambda folder: ({"mode": "step"}, ["--mode step", "solution"]),
], ids=["missing image", "broken image", "no answer", "malformed", "no weights", "held run",
        "group of one", "no number",
        "unknown reward", "unknown backend", "no solution"])
def test_bad_input_is_named_before_a_model_is_loaded(case, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    settings, words = case(tmp_path)
    with pytest.raises(ValueError) as error:
        # What main does first, before any rank starts
        prepare(Config(**{"output_dir": str(tmp_path / "out"), **settings}))
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("flags", [{"max_grad_norm": -1.0}, {"max_grad_norm": 0.0},
                                   {"eval_temperature": -1.0},
                                   {"eval_every": -1}, {"eval_limit": -1}, {"code_timeout": -1.0},
                                   {"seed": -1},
                                   {"seed": 2**32}, {"min_pixels": 0},
                                   {"max_pixels": 1000, "min_pixels": 500_000}], ids=str)
def test_a_number_that_cannot_work_is_refused(flags):
    with pytest.raises(ValueError, match=f"--{next(iter(flags))} "):
        Config(**flags)


def test_a_run_does_not_begin_where_code_cannot_run(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(ValueError, match="the code server does not start"):
        prepare(Config(output_dir=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("settings, words", [
    ({"tasks": "nowhere.json"}, "nowhere.json: no such file"),
    ({"no_such_flag": 1}, "no such flag: --no_such_flag 1"),
    ({"step": 3}, "no such flag: --step 3"),
    ({"steps": "many"}, "--steps: invalid int value: 'many'"),
    ({"loss": "ppo"}, "--loss: invalid choice: 'ppo' (choose from 'grpo', 'dr_grpo', 'dapo')"),
    ({"mode": "Step"}, "--mode: invalid choice: 'Step' (choose from 'episode', 'step')"),
    ({"prompt": "long"}, "--prompt: invalid choice: 'long' (choose from 'short', 'full')")])
def test_bad_input_ends_the_process_with_a_line_and_a_status(settings, words, tmp_path):
    start = time.monotonic()
    done = train(tmp_path / "out", check=False, **settings)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ") and words in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1 and not (tmp_path / "out").exists()
    assert time.monotonic() - start < 30  # most of it is the import of torch and transformers


def test_help_lists_choices_and_the_parts_of_rewards():
    said = " ".join(run_script("train.py", "--help").stdout.split())
    for words in ("--mode {episode,step}", "--prompt {short,full}", "--loss {grpo,dr_grpo,dapo}",
                  "in an episode format=1,accuracy=1, exact=0,problem=0,tools=0,search=0; "
                  "in a step format=1,accuracy=1,search=1,code=1,problem=1"):
        assert words in said, said


# ---- a run that does not begin -------------------------------------------------------------------

class Hub(BaseHTTPRequestHandler):
    """Answers as the hub does for a model that is gated, or not there."""
    def do_GET(self):
        missing = "typo" in self.path
        self.send_response(404 if missing else 401)
        self.send_header("X-Error-Code", "RepoNotFound" if missing else "GatedRepo")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def hub_address():
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def truncated(folder: Path) -> Path:
    """The laptop model with a half of its weights."""
    shutil.copytree(ROOT / "data" / "model", folder)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:len(weights) // 2])
    return folder


def assert_refused(done: CompletedProcess, model, words: str) -> None:
    """One line that names the model, the reason and the way out."""
    line = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and words in line, done.stderr
    assert line.startswith(f"error: --model {model} cannot be loaded"), done.stderr
    assert "Traceback" not in done.stderr and "room" not in done.stderr


TASKS = ("--tasks", "data/offline/heldout.json")


@pytest.mark.parametrize("script", ["train.py", "evaluate.py"])
def test_a_failed_load_leaves_nothing(script, tmp_path):
    model = truncated(tmp_path / "model")
    (tmp_path / "there").mkdir()
    more = ("--resume", "True") if script == "train.py" else ()
    for out in (tmp_path / "there", tmp_path / "new" / "deep"):
        assert_refused(run_script(script, "--model", model, *TASKS, "--output_dir", out, *more),
                       model, "SafetensorError")
    assert list((tmp_path / "there").iterdir()) == [] and not (tmp_path / "new").exists()


@pytest.mark.thorough
@pytest.mark.parametrize("script, name, words", [
    ("train.py", "Qwen/typo", "is not a valid model identifier.*check the name on huggingface.co"),
    ("evaluate.py", "Qwen/gated", "gated repo.*a gated or private model needs `hf auth login`"),
    ("train.py", "Qwen/offline", "couldn't connect.*the network")])
def test_a_model_that_the_hub_does_not_give_is_named_with_the_way_out(script, name, words, tmp_path,
                                                                      hub_address):
    """In fresh processes, since the hub's library reads its settings when it is imported."""
    hub = {"HF_ENDPOINT": hub_address, "HF_HUB_OFFLINE": str(int(name == "Qwen/offline")),
           "HF_HOME": str(tmp_path / "hub")}
    start = time.monotonic()
    done = subprocess.run([sys.executable, script, "--model", name, *TASKS, "--output_dir",
                           str(tmp_path / "out")], cwd=ROOT,
                          capture_output=True, text=True, timeout=200,
                          env=os.environ | hub | {"OMP_NUM_THREADS": "1"})
    assert_refused(done, name, "")
    assert re.search(words, done.stderr.splitlines()[-1]), done.stderr
    assert not (tmp_path / "out").exists() and time.monotonic() - start < 60


def test_a_full_disk_at_the_start_leaves_nothing(tmp_path):
    """A limit on the size of files stands for the full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with (pytest.raises(ValueError, match="cannot be written .*File too large"),
              nothing_left(tmp_path / "a" / "b")):
            take_folder(tmp_path / "a" / "b")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_only_new_and_empty_folders_are_removed(tmp_path):
    (tmp_path / "old").mkdir()
    with pytest.raises(KeyboardInterrupt), nothing_left(tmp_path / "old" / "new" / "out"):
        (tmp_path / "old" / "new" / "out").mkdir(parents=True)
        (tmp_path / "old" / "new" / "log").write_text("of somebody else")
        raise KeyboardInterrupt
    assert [path.name for path in (tmp_path / "old").rglob("*")] == ["new", "log"]
    with nothing_left(tmp_path / "done"):
        (tmp_path / "done").mkdir()
    assert (tmp_path / "done").is_dir()


@pytest.mark.parametrize("files, resume, words", [
    ({"metrics.jsonl": ""}, False,
     "holds a training run; add --resume to go on, or choose another folder"),
    ({"config.json": '{"prompts_per_step": 8}'}, False, "holds a training run"),
    ({"items.jsonl": ""}, False, "holds an evaluation; choose another folder"),
    ({"config.json": '{"benchmark": null}', "scores.json": "{}"}, True,
     "holds an evaluation; choose another folder"),
    ({"predictions.json": "[]"}, True, "holds files of others; choose another folder"),
    ({"config.json": "[]"}, True, "holds files of others"),
    ({"config.json": "no json"}, False, "holds files of others"),
    ({"model/weights": ""}, False, "holds files of others"),
    ({"checkpoint-500/optimizer.pt": ""}, True, "files of others")])
def test_a_folder_in_use_is_named_for_what_it_is_and_left_alone(files, resume, words, tmp_path):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f"--output_dir {tmp_path} .*{words}"):
        prepare(Config(output_dir=str(tmp_path), resume=resume))
    assert {str(path.relative_to(tmp_path)): path.read_text() for path in tmp_path.rglob("*")
            if path.is_file()} == files


def test_a_log_file_in_the_folder_is_no_obstacle(tmp_path):
    (tmp_path / "train.log").write_text("")
    assert holds(tmp_path) == holds(tmp_path / "absent") == ""


def torchrun(ranks: int, *command) -> tuple[int, list[str]]:
    """(status, lines) of a real torchrun."""
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                           f"--nproc_per_node={ranks}",
                           "--max-restarts=0", *map(str, command)], cwd=ROOT, capture_output=True,
                          text=True, timeout=90,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    return done.returncode, done.stderr.splitlines()


ONE_RANK_FAILS = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
from data.flags import fail
if os.environ["RANK"] == "0":
    time.sleep(100)
try:
    raise ValueError("the reason")
except ValueError as error:
    sys.exit(fail(error))
"""


@pytest.mark.thorough
@pytest.mark.parametrize("case", [
    lambda folder: (3, ("train.py", "--output_dir", folder / "out"),
                    "--prompts_per_step 8 does not divide among 3 ranks"),
    lambda folder: (2, ("train.py", "--output_dir", folder / "out", "--model",
                        truncated(folder / "m")), "SafetensorError"),
    lambda folder: (2, ("evaluate.py", "--output_dir", folder / "out", "--ask", "me"),
                    "--ask: invalid choice: 'me'"),
    lambda folder: (2, (folder / "one.py", ROOT), "the reason"),
], ids=["no share for a rank", "one rank reads the weights", "a flag", "the second rank alone"])
def test_the_last_lines_of_torchrun_hold_the_message(case, tmp_path):
    (tmp_path / "one.py").write_text(ONE_RANK_FAILS)
    ranks, command, message = case(tmp_path)
    status, lines = torchrun(ranks, *command)
    assert status == 1 and message in " ".join(lines[-4:]), "\n".join(lines)
    assert not (tmp_path / "out").exists()


LOADS = """
import sys
import torch
sys.path.insert(0, sys.argv[1])
from model import load_policy, start_ranks
start_ranks()
try:
    load_policy(sys.argv[2], shard=True)
except ValueError as error:
    print(error, file=sys.stderr, flush=True)
torch.distributed.barrier()  # no rank leaves while the other one still talks to it
torch.distributed.destroy_process_group()
"""


@pytest.mark.thorough
def test_a_model_that_the_first_rank_cannot_read_is_an_error_on_all(tmp_path):
    (tmp_path / "loads.py").write_text(LOADS)
    status, lines = torchrun(2, tmp_path / "loads.py", ROOT, truncated(tmp_path / "m"))
    output = "\n".join(lines)
    assert status == 0 and output.count("cannot be loaded: SafetensorError") == 2, output


def test_only_the_first_rank_makes_the_folder(tmp_path, monkeypatch):
    """Or it could not tell whether it was there before."""
    monkeypatch.setenv("RANK", "1")
    take_folder(tmp_path / "new" / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        take_folder(tmp_path / "file" / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_every_flag_has_a_help_text():
    assert [f.name for f in fields(Config) if not f.metadata["help"]] == []


@pytest.mark.parametrize("name", [f.name for f in fields(Config) if isinstance(f.default, bool)])
def test_false_is_false(name):
    def parsed(*arguments):
        return getattr(parse_flags(Config, "", [f"--{name}", *arguments]), name)
    assert parsed("False") is parsed("false") is parsed("0") is False
    assert parsed() is parsed("True") is True


def test_every_flag_is_read():
    code = "".join((ROOT / name).read_text() for name in ("train.py", "evaluate.py"))
    read = {node.attr for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Attribute)
            and ast.unparse(node.value) in ("config", "self")}
    assert {f.name for f in fields(Config)} - read == set()


def test_learning_rate_is_a_line():
    config = Config(lr=1.0, lr_decay=0.5, steps=10)
    assert [learning_rate(step, config) for step in (0, 5, 10)] == [1.0, 0.75, 0.5]
