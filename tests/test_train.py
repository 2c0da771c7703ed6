"""train.py as people run it: a real process, a real model, real tools."""
import ast
import json
import os
import re
import time
from dataclasses import fields
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
from conftest import run_script
from safetensors.torch import load_file
from transformers import HfArgumentParser

from train import Config, learning_rate, prepare

ROOT = Path(__file__).parent.parent
TIMINGS = re.compile(r"seconds|tokens_per_s")
QUICK = {"prompts_per_step": 2, "group_size": 4, "eval_limit": 4, "max_turns": 3}


def train(out: Path, *flags: str, check: bool = True, **settings) -> CompletedProcess:
    """`python train.py` on one process, with small settings that flags and settings add to."""
    settings = {**QUICK, "output_dir": out, **settings}
    done = run_script("train.py", *[x for name, value in settings.items() for x in (f"--{name}", value)], *flags)
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
    assert {"success_before", "success_after", "success_tools_off", "by_family", "steps", "seconds", "seed"} <= set(summary)
    assert [row["step"] for row in rows(whole_run / "metrics.jsonl")] == [1, 2, 3, 4]
    assert sorted(p.name for p in (whole_run / "rollouts").glob("*.jsonl")) == ["step_1.jsonl", "step_2.jsonl", "step_4.jsonl"]
    shown = rows(whole_run / "rollouts" / "step_1.jsonl")
    assert len(shown) == 8
    assert {"id", "question", "turns", "answer", "answers", "reward", "reward_parts", "advantage"} <= set(shown[0])
    images = [turn["image"] for row in shown for turn in row["turns"] if "image" in turn]
    assert images and all((whole_run / "rollouts" / image).is_file() for image in images)
    assert (whole_run / "model" / "config.json").is_file()


def test_sampled_and_scored_log_probs_agree(whole_run):
    assert all(row["gap"] < 1e-4 for row in rows(whole_run / "metrics.jsonl"))


def test_every_weight_is_trained(whole_run):
    """FSDP leaves the root's parameters whole after a forward: an optimizer made then would train copies."""
    before, after = (load_file(folder / "model.safetensors") for folder in (ROOT / "data" / "model", whole_run / "model"))
    assert before.keys() == after.keys()
    assert [name for name in before if torch.equal(before[name], after[name])] == []


def test_readme_defines_every_metric(whole_run):
    table = (ROOT / "README.md").read_text().split("## Metrics")[1].split("\n## ")[0]
    cells = [row.split("|")[1] for row in table.splitlines() if row.startswith("| `")]
    defined = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
    logged = set(json.loads((whole_run / "metrics.jsonl").read_text().splitlines()[0]))
    assert logged - defined == set() and defined - logged - {"reward_search", "reward_tools", "reward_problem"} == set()


def test_step_mode_trains_on_single_actions(tmp_path):
    train(tmp_path / "run", mode="step", tasks="data/offline/steps.json", steps=1, eval_tasks="")
    [row] = rows(tmp_path / "run" / "metrics.jsonl")
    shown = rows(tmp_path / "run" / "rollouts" / "step_1.jsonl")
    assert row["turns"] == 1.0 and row["reward_format"] == pytest.approx(sum(r["reward_parts"]["format"] for r in shown) / 8)
    part_of = {"problem": "problem", "code": "code", "search": "search", "answer": "accuracy"}  # by the gold action's kind
    for r in shown:
        assert set(r["reward_parts"]) == {"format", part_of[r["id"].rpartition("-")[2]]}
        assert r["reward"] == pytest.approx(sum(r["reward_parts"].values()))  # 1:1
    assert all("ok" not in turn for r in shown for turn in r["turns"])  # no tool runs


def write_tasks(folder: Path, **changes) -> str:
    """A file with one sound coding task, but for the changes; None leaves a field out."""
    row = {"id": "one", "family": "coding", "question": "?", "answers": ["K"], "type": ["none"],
           "ori_image_path": "a.png", "processed_image_path": "a.png"} | changes
    (folder / "tasks.json").write_text(json.dumps([{k: v for k, v in row.items() if v is not None}]))
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
], ids=["missing image", "broken image", "no answer", "malformed", "no weights", "held run", "group of one", "no number",
        "unknown reward", "unknown backend", "no solution"])
def test_bad_input_is_named_before_a_model_is_loaded(case, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    settings, words = case(tmp_path)
    with pytest.raises(ValueError) as error:
        prepare(Config(**{"output_dir": str(tmp_path / "out"), **settings}))  # what main does first, before any rank starts
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("settings, words", [({"tasks": "nowhere.json"}, ["error: nowhere.json"]),
                                             ({"no_such_flag": 1}, ["no_such_flag"]), ({"steps": "many"}, ["--steps", "many"])])
def test_bad_input_ends_the_process_with_a_line_and_a_status(settings, words, tmp_path):
    start = time.monotonic()
    done = train(tmp_path / "out", check=False, **settings)
    assert done.returncode == 2 and all(word in done.stderr for word in words), done.stderr
    assert "Traceback" not in done.stderr
    assert time.monotonic() - start < 30  # most of it is the import of torch and transformers


def test_every_flag_has_a_help_text():
    assert [f.name for f in fields(Config) if not f.metadata["help"]] == []


@pytest.mark.parametrize("name", [f.name for f in fields(Config) if isinstance(f.default, bool)])
def test_false_is_false(name):
    def parsed(*arguments):
        [config] = HfArgumentParser(Config).parse_args_into_dataclasses([f"--{name}", *arguments])
        return getattr(config, name)
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
