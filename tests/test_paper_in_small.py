"""data/paper_in_small.py: what its table says of what was measured; a small run of one row, stopped and gone on with.

    python -m pytest tests/test_paper_in_small.py
"""
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import ImageColor

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "data"))

import paper_in_small  # noqa: E402


def write_scores(out, run, seed, name, way="agent", **splits):
    """scores.json of one evaluation; splits: F1 in percent."""
    folder = paper_in_small.scores_of(out, run, seed, name, way)
    folder.mkdir(parents=True)
    (folder / "scores.json").write_text(json.dumps({split: {"f1": f1, "em": f1 / 2} for split, f1 in splits.items()}))


def test_the_interval_is_students():
    """Of 1, 2, 3: mean 2, standard deviation 1, and t = 4.303 with two degrees of freedom."""
    assert paper_in_small.shown([1.0, 2.0, 3.0]) == "2.0 ± 2.5"  # 4.303 / √3 = 2.48
    assert paper_in_small.shown([1.0, 3.0], "+") == "+2.0 ± 12.7"  # 12.71 · √2 / √2
    assert paper_in_small.shown([7.25]) == "7.2"
    assert paper_in_small.shown([]) == "–"


def test_gains_are_paired_by_seed(tmp_path):
    """Before and after rise together: the gain is +20 in each seed, and known exactly."""
    for seed, before in enumerate((10.0, 20.0, 30.0)):
        write_scores(tmp_path, "start", seed, "coding", simple=before, hard=1.0, all=5.0)
        write_scores(tmp_path, "main", seed, "coding", simple=before + 20, hard=2.0, all=6.0)
        write_scores(tmp_path, "main", seed, "coding", "off", simple=3.0, hard=0.0, all=2.0)
    [line] = [line for line in paper_in_small.table(tmp_path, [0, 1, 2]).splitlines() if "coding, simple" in line]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == ["coding, simple", "+4.9", "20.0 ± 24.8", "40.0 ± 24.8", "+20.0 ± 0.0", "–, 3.0 ± 0.0"]


def test_every_claim_and_every_run_is_a_row_before_anything_is_measured(tmp_path):
    table = paper_in_small.table(tmp_path, [0, 1, 2])
    for name in [claim for claim, *_ in paper_in_small.CLAIMS] + list(paper_in_small.RUNS) + list(paper_in_small.WAYS):
        assert f"| {name}" in table


@pytest.mark.parametrize("name, other", [("steps", 61), ("limit", 3), ("start", 0), ("tasks", 0), ("learning", [])])
def test_a_folder_of_other_runs_is_refused(tmp_path, name, other):
    plan = paper_in_small.Plan(tmp_path, steps=60, workers=1, limit=0, all_ways=False)
    paper_in_small.check_folder(plan)
    paper_in_small.check_folder(plan)  # the same runs go on
    settings = json.loads((tmp_path / "settings.json").read_text())
    assert name in settings
    (tmp_path / "settings.json").write_text(json.dumps({**settings, name: other}))
    with pytest.raises(ValueError, match="holds runs of .*; choose another --out"):
        paper_in_small.check_folder(plan)


def test_a_script_that_fails_is_named_with_the_end_of_its_log(tmp_path):
    with pytest.raises(RuntimeError, match=r"(?s)data/make_tasks.py --seed x: status 2.*argument --seed"):
        paper_in_small.call(["data/make_tasks.py", "--seed", "x"], tmp_path / "log")


def test_the_figure_has_a_curve_for_each_half_in_its_colour(tmp_path):
    types = {each: 0.5 for types in paper_in_small.CURVES.values() for each in types}
    for seed in (0, 1):
        types["two hops+text"] = (0.2, 0.7)[seed]  # its band covers the other curves, which stay above it
        (tmp_path / f"main-{seed}").mkdir()
        rows = [{"step": step, "tools": tools, "by_type": types} for step, tools in ((0, "on"), (10, "on"), (10, "off"))]
        (tmp_path / f"main-{seed}" / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    image = paper_in_small.draw(tmp_path, [0, 1])
    at_half, at_mean = (image.getpixel((400, round(510 - 440 * share))) for share in (0.5, 0.45))
    assert image.size == (760, 560) and at_half == ImageColor.getrgb(paper_in_small.COLOURS[3])  # drawn last of four
    assert at_mean == ImageColor.getrgb(paper_in_small.COLOURS[4])
    assert image.getpixel((400, 100)) == image.getpixel((400, 480)) == (255, 255, 255)
    assert image.getpixel((400, 510 - 110)) not in ((255, 255, 255), at_mean)  # 25 %, in the band


SMALL = [sys.executable, ROOT / "data" / "paper_in_small.py", "--seeds", "1", "--limit", "3", "--out", "paper",
         "--row", "coding_only"]


def test_what_is_not_there_cannot_be_shown(tmp_path):
    done = subprocess.run([*SMALL, "--show"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and f"nothing is measured in {tmp_path / 'paper'}" in done.stderr


@pytest.mark.parametrize("flags", [("--steps", "0"), ("--workers", "0"), ("--limit", "-1")])
def test_sizes_that_make_no_sense_are_refused_before_a_folder_is_made(tmp_path, flags):
    done = subprocess.run([*SMALL, *flags], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and flags[0] in done.stderr and not list(tmp_path.iterdir())


def test_a_run_that_fails_ends_the_others_and_is_named(tmp_path, monkeypatch):
    """One of two runs side by side fails at once; the other would take a minute."""
    code = {"no_kl": "raise SystemExit('this one fails')", "dapo": "import time; time.sleep(60)"}
    monkeypatch.setattr(paper_in_small, "train", lambda plan, run, seed: paper_in_small.call(["-c", code[run]], tmp_path / run))
    plan = paper_in_small.Plan(tmp_path, steps=2, workers=2, limit=0, all_ways=False)
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="status 1; .*no_kl ends with\n.*this one fails"):
        paper_in_small.run_all(plan, [("dapo", 0), ("no_kl", 0)])
    assert time.monotonic() - start < 30 and not paper_in_small.UNDER_WAY


@pytest.mark.thorough
def test_ended_by_a_signal_it_ends_its_runs_and_goes_on_with_the_same_command(tmp_path):
    log = tmp_path / "paper" / "coding_only-0.log"
    process = subprocess.Popen([*SMALL, "--steps", "400"], cwd=tmp_path)
    for _ in range(600):
        if log.exists() and "step   1/" in log.read_text():
            break
        time.sleep(0.1)
    process.terminate()
    assert process.wait(60) == 143
    again = subprocess.Popen([*SMALL, "--steps", "400"], cwd=tmp_path)
    for _ in range(600):
        if "resumes from" in log.read_text():
            break
        time.sleep(0.1)
    again.terminate()
    again.wait(60)
    assert "resumes from" in log.read_text() and "another process" not in log.read_text()


@pytest.mark.thorough
def test_a_row_is_measured_and_is_not_measured_again(tmp_path):
    command = [*SMALL, "--row", "main", "--row", "coding_only", "--steps", "2"]  # a row that is named twice is one
    once = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert once.returncode == 0, once.stderr
    assert "[3/3]" in once.stdout and (tmp_path / "paper" / "paper_in_small.png").exists()
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "paper").rglob("scores.json")}
    assert len(files) == 3 * 5 + 3 * 5 + 3  # sets x ways of asking of the start and of main; sets of coding_only
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert again.stdout.partition("| F1 ")[2] == once.stdout.partition("| F1 ")[2]
    assert files == {path: path.stat().st_mtime_ns for path in (tmp_path / "paper").rglob("scores.json")}
