"""What stops a run, and how it goes on: real processes that are killed, real signals, real full
disks."""
import fcntl
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import time
from datetime import timedelta
from multiprocessing import Process
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import environments_of_ranks, start_script
from safetensors.torch import load_file

from data.checkpoints import checkpoints, damaged_files, newest_checkpoint
from data.files import append_json_line, read_json_lines, take_folder, write_whole
from model import export, load_policy, start_ranks
from train import Config, rollout_metrics, step_line

ROOT = Path(__file__).parent.parent
TINY = {"steps": 4, "save_every": 2, "rollouts_every": 2, "eval_limit": 2, "prompts_per_step": 2,
        "group_size": 2,
        "max_turns": 2, "beta": 0, "code_timeout": 60}
TIMINGS = re.compile(r"seconds|tokens_per_s")


def start(out: Path, *flags: str, launcher: tuple[str, ...] = (), environment: dict = {},
          **settings) -> Process:
    """train.py with small settings, its output at the end of log(out); launcher: arguments of
    torchrun."""
    arguments = [str(x) for name, value in {**TINY, "output_dir": out, **settings}.items()
                 for x in (f"--{name}", value)]
    command = ["torchrun", "--standalone", *launcher] if launcher else []
    return start_script(*command, "train.py", *arguments, *flags, output=log(out), **environment)


def log(out: Path) -> Path:
    return out.with_suffix(".log")


def wait_for(process: Process, out: Path, happened) -> None:
    deadline = time.monotonic() + 100
    while not happened():
        assert process.is_alive(), log(out).read_text()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def end(process: Process, out: Path) -> tuple[int, str]:
    """(exit status, output since this was asked for last)"""
    process.join(240)
    output = log(out).read_text()
    assert process.exitcode is not None, output
    log(out).write_bytes(b"")
    return process.exitcode, output


def left_by(out: Path) -> dict:
    """Every file of a run but what the clock decides, and what holds its folder or its flags."""
    files = {}
    for path in out.rglob("*"):
        if path.suffix == ".jsonl":
            files[str(path.relative_to(out))] = [timeless(json.loads(line))
                                                 for line in path.read_text().splitlines()]
        elif path.is_file() and path.name not in ("config.json", "summary.json", "manifest.json",
                                                  ".metadata"):
            files[str(path.relative_to(out))] = path.read_bytes()
    return files


def timeless(value):
    if isinstance(value, dict):
        return {key: timeless(v) for key, v in value.items() if not TIMINGS.search(key)}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """Four steps in one go, with checkpoints after the second and the fourth."""
    out = tmp_path_factory.mktemp("runs") / "alone"
    status, output = end(start(out), out)
    assert status == 0, output
    return out


# ---- resume is replay ----------------------------------------------------------------------------

@pytest.mark.thorough
def test_killed_and_damaged_a_run_leaves_what_one_left_alone_does(alone, tmp_path):
    """SIGKILL in mid-export, a torn row behind it, a flipped byte in the last checkpoint."""
    out = tmp_path / "run"
    process = start(out)
    wait_for(process, out, lambda: (out / "model.tmp").exists())
    process.kill()
    end(process, out)
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "rew')
    [weights] = (out / "checkpoint-4").glob("*.distcp")
    flip_a_byte(weights)

    status, output = end(start(out, "--resume"), out)
    assert status == 0 and "checkpoint-4 is damaged: __0_0.distcp\nresumes from" in output, output
    assert_left_as_alone(out, alone)


def assert_left_as_alone(out: Path, alone: Path) -> None:
    assert (out / "checkpoint-4.damaged").is_dir()  # set aside, not deleted
    shutil.rmtree(out / "checkpoint-4.damaged")
    assert [step for step, _ in checkpoints(alone)] == [2, 4]
    left, expected = left_by(out), left_by(alone)
    assert left.keys() - {"checkpoint-1", "checkpoint-3"} == expected.keys() and "model/model.safetensors" in expected
    assert [name for name in expected if left[name] != expected[name]] == []


@pytest.mark.thorough
def test_ended_killed_and_damaged_a_run_leaves_what_one_left_alone_does(alone, tmp_path):
    """SIGTERM in the first step; SIGKILL in mid-checkpoint, then in mid-export; a flipped byte in
    the last checkpoint."""
    out = tmp_path / "run"
    process = start(out)
    wait_for(process, out, lambda: read_json_lines(out / "metrics.jsonl"))
    process.terminate()
    status, output = end(process, out)
    assert status == 0 and re.search(r"stopped before step \d: SIGTERM; --resume goes on",
                                     output), output
    saved = checkpoints(out)[-1][0]
    # Nothing that was learnt is lost
    assert saved == len(read_json_lines(out / "metrics.jsonl")) < 4

    process = start(out, "--resume")
    wait_for(process, out, lambda: list(out.glob("checkpoint-*.tmp")))
    process.kill()
    end(process, out)
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "rew')

    process = start(out, "--resume")
    wait_for(process, out, lambda: (out / "model.tmp").exists())
    process.kill()
    end(process, out)
    assert not (out / "model").exists()
    [weights] = (out / "checkpoint-4").glob("*.distcp")
    flip_a_byte(weights)

    status, output = end(start(out, "--resume"), out)
    assert status == 0 and "checkpoint-4 is damaged: __0_0.distcp\nresumes from" in output, output
    assert_left_as_alone(out, alone)


@pytest.mark.parametrize("when", ["loading", "running"])
def test_ctrl_c_is_answered_in_a_line_and_leaves_what_can_go_on(when, tmp_path):
    out = tmp_path / "run"
    process = start(out)
    happened = {"loading": out.exists, "running": lambda: read_json_lines(out / "metrics.jsonl")}
    wait_for(process, out, happened[when])
    os.kill(process.pid, signal.SIGINT)
    status, output = end(process, out)
    assert "Traceback" not in output, output
    if when == "loading":
        assert status == 130 and output.count("\n") == 1, output
        assert "stopped before the first step" in output and not out.exists()
    else:
        assert status == 0, output
        assert re.search(r"stopping: the rollouts end .*\n(.*\n)*stopped before step \d: SIGINT;",
                         output), output
        assert checkpoints(out)


@pytest.fixture
def one_rank(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(os.cpu_count()))  # one thread, as all tests
    start_ranks()
    yield
    dist.destroy_process_group()


def test_ranks_wait_for_slower_ones_for_hours(one_rank):
    """nccl's own limit of ten minutes would end runs whose first rank downloads a large model."""
    backend = dist.group.WORLD._get_backend(torch.device("cpu"))
    assert backend.options._timeout >= timedelta(hours=1)


@pytest.fixture
def run_folder(alone, tmp_path) -> Path:
    """A copy of the finished run, to be damaged."""
    return shutil.copytree(alone, tmp_path / "run")


DAMAGES = {
    "flipped byte": (lambda folder: flip_a_byte(folder / ".metadata"), [".metadata"]),
    "missing file": (lambda folder: (folder / "__0_0.distcp").unlink(), ["__0_0.distcp"]),
    "cut file": (lambda folder: os.truncate(folder / "__0_0.distcp", 1000), ["__0_0.distcp"]),
    "other flags": (lambda folder: flip_a_byte(folder / "config.json"), ["config.json"]),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), ["manifest.json"]),
    "manifest that is no JSON": (lambda folder: (folder / "manifest.json").write_text('{"'),
                                 ["manifest.json"]),
    "manifest of another kind": (lambda folder: (folder / "manifest.json").write_text("[1]"),
                                 ["manifest.json"]),
    "a folder among the files": (lambda folder: (folder / "more").mkdir(), ["more"]),
    "a file in its place": (lambda folder: (shutil.rmtree(folder), folder.touch()), ["manifest.json"]),
    "nothing": (lambda folder: None, [])}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_seen(damage, run_folder, one_rank):
    do, files = DAMAGES[damage]
    do(run_folder / "checkpoint-4")
    assert damaged_files(run_folder / "checkpoint-4") == files


def config(out: Path, **changes) -> Config:
    return Config(**{**TINY, "eval_limit": 2, "output_dir": str(out), "resume": True, **changes})


def test_without_a_whole_checkpoint_the_run_is_refused_and_left_as_it_is(run_folder, one_rank):
    for _, folder in checkpoints(run_folder):
        flip_a_byte(folder / "config.json")
    before = left_by(run_folder)
    with pytest.raises(ValueError, match=r"no checkpoint in .*run is whole; bring one back"):
        newest_checkpoint(run_folder, config(run_folder).flags())
    assert left_by(run_folder) == before


def test_what_is_damaged_twice_is_set_aside_twice(run_folder, one_rank):
    whole = run_folder / "checkpoint-4.whole"
    shutil.copytree(run_folder / "checkpoint-4", whole)
    for aside in ("checkpoint-4.damaged", "checkpoint-4.damaged1"):
        flip_a_byte(run_folder / "checkpoint-4" / "config.json")
        assert newest_checkpoint(run_folder, config(run_folder).flags())[0] == 2
        assert (run_folder / aside).is_dir()
        shutil.copytree(whole, run_folder / "checkpoint-4")
    assert newest_checkpoint(run_folder, config(run_folder).flags())[0] == 4


def test_what_others_left_in_the_folder_is_no_part_of_the_run(run_folder, one_rank):
    for name in ("checkpoint-abc1", "checkpoint-7x", "rollouts/step_notes"):
        (run_folder / name).mkdir()
    assert newest_checkpoint(run_folder, config(run_folder).flags())[0] == 4
    assert (run_folder / "rollouts/step_notes").exists()


@pytest.mark.parametrize("text, words", [("[1]", "holds no flags of a run"), ('{"a": 1}', "holds no flags of a run"),
                                         ('{"model": ', "line 1: not JSON")])
def test_flags_that_cannot_be_read_are_named(run_folder, one_rank, text, words):
    for _, folder in checkpoints(run_folder):
        shutil.rmtree(folder)
    (run_folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=f"config.json.* {words}|config.json, {words}"):
        newest_checkpoint(run_folder, config(run_folder).flags())


def test_a_bad_row_of_metrics_is_named(run_folder, one_rank):
    (run_folder / "metrics.jsonl").write_text('{"step": 1}\n{"step" 2}\n')
    with pytest.raises(ValueError, match="metrics.jsonl, line 2: not JSON"):
        newest_checkpoint(run_folder, config(run_folder).flags())


def test_rows_that_are_none_of_the_run_are_cut(run_folder, one_rank):
    rows = (run_folder / "metrics.jsonl").read_text()
    (run_folder / "metrics.jsonl").write_text(rows + '[1]\n{"a": 1}\n')
    assert newest_checkpoint(run_folder, config(run_folder).flags())[0] == 4
    assert (run_folder / "metrics.jsonl").read_text() == rows


@pytest.mark.parametrize("flag, value", [("temperature", 1e39), ("temperature", 1e-7), ("eval_temperature", 1e39),
                                         ("code_timeout", 1e98), ("code_workers", 10**8), ("steps", 10**30)])
def test_numbers_that_nothing_can_hold_are_refused(flag, value):
    with pytest.raises(ValueError, match=f"--{flag} .*must be a finite number"):
        Config(**{flag: value})


def test_fewer_steps_than_were_done_are_refused(run_folder):
    """Or the weights of step 4 would be evaluated and exported as those of step 3."""
    status, output = end(start(run_folder, "--resume", steps=3), run_folder)
    assert status == 2 and "has done 4 steps; give --steps 4 or more" in output, output


def test_other_flags_are_said_aloud_and_another_model_is_refused(run_folder, one_rank, capsys):
    assert newest_checkpoint(run_folder, config(run_folder).flags()) == (4, run_folder / "checkpoint-4")
    assert capsys.readouterr().out == f"resumes from {run_folder / 'checkpoint-4'}\n"
    newest_checkpoint(run_folder, config(run_folder, lr=0.5, steps=9).flags())
    said = capsys.readouterr().out
    assert "; changed, so it may be no replay: lr 0.00015 -> 0.5, steps 4 -> 9\n" in said
    with pytest.raises(ValueError, match="is a run of --model data/model, where its KL starts"):
        newest_checkpoint(run_folder, config(run_folder, model="other/model").flags())


def test_what_is_later_than_the_checkpoint_is_cut(run_folder, one_rank):
    shutil.rmtree(run_folder / "checkpoint-4")
    (run_folder / "checkpoint-3.tmp").mkdir()
    assert newest_checkpoint(run_folder, config(run_folder).flags()) == (2, run_folder / "checkpoint-2")
    assert [row["step"] for row in read_json_lines(run_folder / "metrics.jsonl")] == [1, 2]
    assert [row["step"] for row in read_json_lines(run_folder / "evaluations.jsonl")] == [0]
    assert {path.stem for path in (run_folder / "rollouts").iterdir()} == {"step_1", "step_2"}
    assert not (run_folder / "checkpoint-3.tmp").exists()


# ---- a disk that is full, a folder that cannot be used -------------------------------------------

@pytest.mark.thorough
def test_no_room_in_mid_checkpoint_ends_the_run_and_leaves_the_older_ones(run_folder):
    """A limit on the size of files stands for the full disk: the write fails just so, in the middle
    of a file."""
    process = start(run_folder, "--resume", steps=5, eval_tasks="")
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (8 << 20, 8 << 20))
    status, output = end(process, run_folder)
    assert status == 1 and [step for step, _ in checkpoints(run_folder)] == [2, 4], output
    line = output.splitlines()[-1]
    words = rf"error: .*; {run_folder} \(.* GB free\) keeps what is whole: make room .*"
    assert re.fullmatch(words, line), line
    assert not {path.name for path in run_folder.iterdir()} & {"checkpoint-5"}


def test_a_folder_that_cannot_be_used_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    words = "--output_dir .*file/run: it cannot be written .*; choose another folder"
    with pytest.raises(ValueError, match=words):
        take_folder(tmp_path / "file" / "run")
    number = os.open(tmp_path, os.O_RDONLY)  # as another process would
    fcntl.flock(number, fcntl.LOCK_EX)
    with pytest.raises(ValueError, match="another process is at work there"):
        take_folder(tmp_path)
    os.close(number)
    take_folder(tmp_path)


# ---- ranks ---------------------------------------------------------------------------------------

def ranks_of(process: Process) -> list[int]:
    """Process ids of the ranks that a torchrun has started, in their order."""
    table = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True,
                           check=True).stdout
    return sorted(int(pid) for pid, parent in map(str.split, table.splitlines()) if int(parent)
                  == process.pid)


def start_two(out: Path, store: dist.TCPStore, count: int) -> list[Process]:
    """Two ranks as torchrun starts them for the count-th time again, on its store; then the second
    is late."""
    processes = []
    for environment in environments_of_ranks(2):
        time.sleep(count * len(processes))
        environment |= {"MASTER_PORT": str(store.port), "GROUP_WORLD_SIZE": "1",
                        "TORCHELASTIC_USE_AGENT_STORE": "True",
                        "TORCHELASTIC_RESTART_COUNT": str(count)}
        processes.append(start(out, environment=environment, steps=400, save_every=1,
                               eval_tasks=""))
    return processes


@pytest.mark.thorough
def test_ranks_end_with_their_launcher_so_that_the_next_start_resumes(tmp_path):
    out = tmp_path / "run"
    launcher = start(out, launcher=("--nproc_per_node=2",), steps=400, save_every=1, eval_tasks="")
    wait_for(launcher, out, lambda: checkpoints(out))
    launcher.kill()  # torchrun alone
    launcher.join()
    step = checkpoints(out)[-1][0] + 1
    log(out).write_bytes(b"")
    status, output = end(start(out, "--resume", steps=step, eval_tasks=""), out)
    assert status == 0 and "resumes from" in output, output


@pytest.mark.thorough
def test_ranks_wait_until_the_first_has_exported(tmp_path):
    """A rank that leaves the group early may take it down for the one that is at work."""
    out, script = tmp_path / "run", tmp_path / "slow.py"
    script.write_text("""
import sys
import time
sys.path[:0] = ["."]
import train
publish = train.publish
train.publish = lambda *paths: (time.sleep(4), publish(*paths))
sys.exit(train.run())
""")
    arguments = [str(x) for name, value in {**TINY, "output_dir": out, "steps": 1, "eval_tasks": ""}.items()
                 for x in (f"--{name}", value)]
    first, second = (start_script(str(script), *arguments, output=log(out), **environment)
                     for environment in environments_of_ranks(2))
    second.join(240)
    assert second.exitcode == 0 and (out / "summary.json").exists(), log(out).read_text()
    assert end(first, out)[0] == 0


@pytest.mark.thorough
def test_a_dead_rank_a_restart_a_signal_and_another_number_of_ranks(tmp_path):
    """Two ranks; one is killed, which ends the other. Both are started again, and resume, though
    the store still holds the addresses of the dead ones. A SIGTERM to one ends both; one rank goes
    on."""
    out, store = tmp_path / "run", dist.TCPStore("127.0.0.1", 0, is_master=True,
                                                 wait_for_workers=False)
    first = start_two(out, store, 0)
    wait_for(first[0], out, lambda: checkpoints(out))
    first[1].kill()
    first[0].join(15)
    assert first[0].exitcode == 1 and "Connection" in end(first[0], out)[1]
    reached, steps = checkpoints(out)[-1][0], lambda: len(read_json_lines(out / "metrics.jsonl"))
    second = start_two(out, store, 1)
    wait_for(second[0], out, lambda: steps() > reached + 1)
    second[1].terminate()
    second[1].join(60)
    status, output = end(second[0], out)
    assert (status, second[1].exitcode) == (0, 0), output
    assert output.count("resumes from") == 1 and "stopped before step" in output, output
    step = checkpoints(out)[-1][0]
    assert step == steps()
    status, output = end(start(out, "--resume", steps=step + 1, eval_tasks=""), out)
    assert status == 0 and re.search("resumes from .*ranks 2 -> 1",
                                     output) and steps() == step + 1, output


@pytest.mark.thorough
def test_torchrun_restarts_the_ranks_and_passes_a_signal_on(tmp_path):
    """Two ranks; one is killed: torchrun starts both again, which resume. A SIGTERM ends them."""
    out = tmp_path / "run"
    process = start(out, launcher=("--nproc_per_node=2", "--max-restarts=1"), steps=400,
                    save_every=1, eval_tasks="")
    wait_for(process, out, lambda: checkpoints(out))
    first = ranks_of(process)
    os.kill(first[1], signal.SIGKILL)
    killed, steps = time.monotonic(), lambda: len(read_json_lines(out / "metrics.jsonl"))
    wait_for(process, out, lambda: not set(first) & set(ranks_of(process)))
    assert time.monotonic() - killed < 15
    wait_for(process, out, lambda: len(ranks_of(process)) == 2)
    reached = steps()
    wait_for(process, out, lambda: steps() > reached + 1)
    process.terminate()
    _, output = end(process, out)
    assert "failed (exitcode: -9) local_rank: 1" in output and "Connection" in output, output
    assert output.count("resumes from") == 1 and "stopped before step" in output, output
    assert checkpoints(out)[-1][0] == steps()


# ---- updates that are no good --------------------------------------------------------------------

@pytest.mark.thorough
def test_steps_that_are_not_finite_change_nothing_and_end_the_run(tmp_path):
    """beta times a KL of 0 is not a number here, as 1e39 is infinite in float32."""
    out = tmp_path / "run"
    status, output = end(start(out, beta="1e39", max_skipped=2, save_every=1, eval_tasks=""), out)
    words = "stopped before step 3: 2 steps in a row had a loss or gradient that is not finite"
    assert status == 1 and words in output, output
    assert output.count("SKIPPED") == 2
    rows = [json.loads(line, parse_constant=pytest.fail)
            for line in (out / "metrics.jsonl").read_text().splitlines()]
    shown = [(row["step"], row["skipped"], row["loss"]) for row in rows]
    assert shown == [(1, 1, None), (2, 1, None)]
    assert [step for step, _ in checkpoints(out)] == [1, 2]


def row(action="answer", advantage=0.0):
    return {"turns": [{"action": action}], "stop": action, "advantage": advantage, "reward": 1.0,
            "success": False,
            "reward_parts": {"format": 1.0}}


@pytest.mark.parametrize("rows, note", [([row("invalid", 1.0)] * 2, "COLLAPSED"),
                                        ([row()] * 2, "NOTHING TO LEARN FROM"),
                                        ([row(), row("invalid", 1.0)], "")])
def test_a_collapsed_run_says_so_in_its_line(rows, note):
    rest = dict.fromkeys(["step", "kl", "gap", "tokens_per_s", "skipped", "seconds",
                          "seconds_generate",
                          "seconds_tools", "seconds_reference", "seconds_update", "tasks_failed"], 0)
    line = step_line(rollout_metrics(rows, ["format"]) | rest, 4)
    assert re.findall("COLLAPSED|NOTHING TO LEARN FROM", line) == [note] * bool(note)


def test_rows_are_json_and_files_are_whole(tmp_path):
    append_json_line(tmp_path / "rows.jsonl",
                     {"loss": float("nan"), "norm": float("inf"), "step": 1})
    assert (tmp_path / "rows.jsonl").read_text() == '{"loss": null, "norm": null, "step": 1}\n'
    write_whole(tmp_path / "rows.jsonl", "new\n")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["new\n"]


def test_a_sharded_model_is_exported_in_the_dtype_of_its_files(model_folder, one_rank, tmp_path):
    """Masters are fp32, and building the sharded model changes the dtype that its config names."""
    folder = shutil.copytree(model_folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    export(load_policy(str(folder), shard=True), tmp_path / "out")
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
