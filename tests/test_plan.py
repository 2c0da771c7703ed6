"""`train.py --dry_run`: the plan of a run, by hand; the recipes of data/README.md at the published sizes.

    python -m pytest tests/test_plan.py
"""
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, run_script
from mat_training import coding_rows, search_rows, write_training

from data.cost import PUBLISHED, VISION, num_weights, published
from data.flags import parse_flags
from data.plan import empty_policy, show_plan
from model import load_policy
from test_similarity import tiny  # noqa: F401: a fixture
from train import Config, prepare

RECIPES = (ROOT / "data" / "README.md").read_text(encoding="utf-8").split("## Recipes")[1].split("\n## ")[0]


def plan_of(output):
    """{"model": "…", "tasks": …} of what a dry run printed."""
    return dict(re.split(r"\s+", line, maxsplit=1) for line in output.splitlines())


# ---- the plan

@pytest.mark.thorough
def test_the_plan_of_the_laptop_run(tmp_path):
    done = run_script("train.py", "--dry_run", "--output_dir", tmp_path / "run", "--eval_every", 20)
    assert done.returncode == 0 and done.stderr == ""
    plan = plan_of(done.stdout)
    assert plan["model"] == "data/model: 1,139,904 weights; a checkpoint takes 0.0137 GB, and 2 are kept"
    assert plan["tasks"] == ("384 tasks (192 coding, 192 search), prompts of 32 to 58 tokens, 36 in the mean; "
                             "240 held out")
    assert plan["steps"] == "60 of 8 x 8 rollouts in mode episode: 3,840 rollouts, 1.25 epochs"  # 60 * 8 / 384
    assert plan["tokens"] == "at most 384 sampled by a rollout, 24,576 in a step, 1,474,560 in all"  # 4 * 96; * 64; * 60
    # 64 rollouts of 3 searches; evaluations before, after 20 and 40, and at the end
    assert plan["searches"] == "at most 192 in a step, 11,520 in all, 2,880 in evaluations"
    assert re.match(r"0\.\d GB a GPU on 1 at the peak, computed and not measured: weights 0\.0, ", plan["memory"])
    assert not (tmp_path / "run").exists()


@pytest.mark.thorough
def test_the_plan_of_single_steps_on_ranks(tmp_path, capsys, monkeypatch):
    flags = ["--mode", "step", "--tasks", "data/offline/steps.json", "--eval_tasks=", "--dry_run",
             "--output_dir", str(tmp_path / "run")]
    config = parse_flags(Config, "", flags)
    tasks, held_out, search = prepare(config)
    assert (len(tasks), held_out, search) == (928, [], None)
    monkeypatch.setenv("WORLD_SIZE", "8")
    said = []
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        show_plan(config, tasks, held_out)
        said.append(capsys.readouterr().out)
    assert said[1] == ""
    plan = plan_of(said[0])
    assert plan["tokens"].startswith("at most 96 sampled by a rollout, 6,144 in a step")
    assert plan["searches"].startswith("at most 0 in a step, 0 in all, 0 in evaluations")
    assert " GB a GPU on 8 at the peak" in plan["memory"]


def test_a_rollout_samples_no_more_than_fits_behind_its_prompt(tmp_path):
    done = run_script("train.py", "--dry_run", "--output_dir", tmp_path / "run", "--max_tokens", 200, "--eval_tasks=")
    assert plan_of(done.stdout)["tokens"].startswith("at most 168 sampled by a rollout")  # the shortest prompt has 32


def test_the_empty_policy_has_the_shapes_and_ids_of_the_whole_one(model_folder):
    empty = empty_policy(str(model_folder), 56 * 56, 401_408)
    assert {parameter.device.type for parameter in empty.model.parameters()} == {"meta"}
    whole = load_policy(str(model_folder))
    assert {name: p.shape for name, p in empty.model.named_parameters()} == {
        name: p.shape for name, p in whole.model.named_parameters()}
    assert (empty.end_id, empty.image_id, empty.suppressed.tolist()) == (
        whole.end_id, whole.image_id, whole.suppressed.tolist())


@pytest.mark.thorough
def test_what_a_run_would_refuse_a_dry_run_refuses(tmp_path):
    (tmp_path / "long.json").write_text(json.dumps([{"question": "why " * 600, "answers": ["x"], "image_path": None}]))
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "metrics.jsonl").write_text("")
    for flags, reason in ((["--tasks", tmp_path / "long.json"], "leaves no room for a turn of 96 within 512; raise"),
                          (["--eval_tasks", tmp_path / "long.json"], "task 1: its prompt has "),
                          (["--output_dir", tmp_path / "used"], "holds a training run"),
                          (["--tasks", tmp_path / "none.json"], "no such file"),
                          (["--model", tmp_path], "the folder has no config.json")):
        done = run_script("train.py", "--dry_run", "--output_dir", tmp_path / "run", *flags)
        assert done.returncode == 2 and reason in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "run").exists()


def test_several_files_are_one_set_of_tasks(tmp_path):
    paths = [write_training(tmp_path, "search", search_rows()), write_training(tmp_path, "coding", coding_rows(1, 1, 4))]
    flags = {"eval_tasks": "", "dry_run": True, "output_dir": str(tmp_path / "run")}
    tasks = prepare(Config(tasks=",".join(map(str, [*paths, paths[0]])), **flags))[0]
    assert [task["id"] for task in tasks[::20]] == ["search: 1", "coding: 1", "search: 13"]
    assert len(tasks) == 20 + 16 + 20
    held_out = prepare(Config(**flags | {"eval_tasks": f"{paths[0]},{paths[1]}"}))[1]
    assert [task["id"] for task in held_out[::20]] == ["search: 1", "coding: 1"] and len(held_out) == 20 + 16
    (tmp_path / "other").mkdir()
    same = write_training(tmp_path / "other", "search", search_rows())
    twins = prepare(Config(**flags | {"eval_tasks": f"{paths[0]},{same}"}))[1]
    assert [task["id"] for task in twins[::20]] == [f"{paths[0]}: 1", f"{same}: 1"]
    assert len({task["id"] for task in twins}) == 40  # answers are kept by id
    (tmp_path / "a,b.json").write_bytes(paths[1].read_bytes())
    (tmp_path / "a,b_images").symlink_to(tmp_path / "coding_images")
    assert len(prepare(Config(tasks=str(tmp_path / "a,b.json"), **flags))[0]) == 16


# ---- the recipes

def recipes():
    """[(ranks, arguments)] of the commands, as the shell reads them."""
    [block] = re.findall(r"^```bash\n(.*?)^```$", RECIPES, re.DOTALL | re.MULTILINE)
    said = subprocess.run(["bash", "-euc", 'show() { printf "%s\\x1f" "$@"; echo; }; torchrun() { show torchrun "$@"; }\n'
                           f'python() {{ show python "$@"; }}\n{block}'], capture_output=True, text=True, check=True).stdout
    commands = [line.split("\x1f")[:-1] for line in said.splitlines()]
    ranks = [int(words[1].removeprefix("--nproc_per_node=")) if words[0] == "torchrun" else 1 for words in commands]
    return [(number, words[words.index("train.py") + 1:]) for number, words in zip(ranks, commands)]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Folders named 3B and 7B with Qwen's tokenizer and the published sizes; no weights are needed."""
    script = ROOT.parent / "shared" / "tools" / "hub_folder.py"
    if not script.is_file():
        pytest.skip("needs Qwen's tokenizer (tools/hub_folder.py beside the project)")
    folder = tmp_path_factory.mktemp("hub")
    for name in PUBLISHED:
        if name == "3B":
            subprocess.run([sys.executable, script, folder / name], cwd=ROOT, check=True)
        else:
            (folder / name).mkdir()
            for file in (folder / "3B").iterdir():
                (folder / name / file.name).symlink_to(file)
        config = json.loads((folder / "3B" / "config.json").read_text())
        config |= PUBLISHED[name] | {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}
        config["vision_config"] |= VISION | {"out_hidden_size": config["hidden_size"]}
        (folder / name / "config.json").unlink()
        (folder / name / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def mat(tmp_path_factory):
    """The two training files, the larger one with 112 of its 3,400 rows."""
    folder = tmp_path_factory.mktemp("hub") / "MAT" / "MAT-Training"
    write_training(folder, "rft_agent_search_20", search_rows())
    write_training(folder, "rft_agent_code_1_2k", coding_rows(3, 2, 8))
    return folder.parent


def test_there_is_a_recipe_for_each_set_and_size():
    found = {(ranks, words[words.index("--model") + 1][16:18], words[words.index("--tasks") + 1].count(",")) for ranks, words
             in recipes()}
    assert {(ranks, size) for ranks, size, _ in found} == {(8, "3B"), (8, "7B"), (1, "3B")}
    assert len(recipes()) == 12


@pytest.mark.thorough
@pytest.mark.parametrize("number", range(12))
def test_a_recipe_is_a_run_that_fits_its_gpus(hub, mat, tiny, tmp_path, capsys, monkeypatch, number):  # noqa: F811
    ranks, words = recipes()[number]
    size = words[words.index("--model") + 1][16:18]
    places = {"Qwen/Qwen2.5-VL-3B-Instruct": f"{hub}/3B", "Qwen/Qwen2.5-VL-7B-Instruct": f"{hub}/7B", "MAT/": f"{mat}/",
              "sentence-transformers/all-MiniLM-L6-v2": str(tiny), "runs/": f"{tmp_path}/"}
    for name, place in places.items():
        words = [word.replace(name, place) for word in words]
    config = parse_flags(Config, "", [*words, "--dry_run"])
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    tasks, held_out, search = prepare(config)
    show_plan(config, tasks, held_out)
    plan = plan_of(capsys.readouterr().out)
    assert f"{num_weights(published(size)):,} weights" in plan["model"]
    names = [name for name in ("search", "code") if f"rft_agent_{name}" in config.tasks]
    counts = {"search": (63, 20), "code": (112, 40)}
    assert plan["tasks"].startswith(f"{sum(counts[name][config.mode == 'episode'] for name in names)} tasks")
    gigabytes = float(re.match(rf"([\d.]+) GB a GPU on {ranks} at the peak", plan["memory"])[1])
    assert gigabytes <= 0.9 * 80  # the rest for what data/cost.py leaves out
    assert list(Path(tmp_path).iterdir()) == []
