"""tests/gpu.py on a CPU: every part of it runs, and what is wrong ends it with status 1."""
import re

import pytest

from conftest import ROOT, run_script
from gpu import Run


def test_a_row_fails_beyond_its_bounds_and_a_part_that_raises_is_one(capsys):
    run = Run()
    run.row("no bound", float("nan"))
    run.row("within", 1.0, 1.0, 1.0)
    assert run.failed == 0
    run.row("above", 1.1, most=1.0)
    run.row("below", 0.8, 0.9, 1.1)
    run.row("not a number", float("nan"), most=1.0)

    def broken(run):
        raise ValueError("out of\nmemory")
    run.part(broken)
    assert run.failed == 4
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines[:5]] == ["nan", "ok", "FAIL", "FAIL", "FAIL"]
    assert re.fullmatch(r"broken: ValueError: out of memory +nan +<= 0 +FAIL", lines[5])


@pytest.mark.thorough
def test_all_checks_hold_for_a_toy_model():
    done = run_script("tests/gpu.py")
    assert done.returncode == 0, done.stdout + done.stderr
    parts = re.findall(r"^-- (\w+)", done.stdout, re.MULTILINE)
    assert parts == ["gradients", "checkpoint", "parity", "speed", "tools"]
    assert len(re.findall(r"  ok$", done.stdout, re.MULTILINE)) == 13  # rows with a bound; on a GPU memory is one more
    assert done.stdout.splitlines()[-1].startswith("0 failed")


def test_it_is_short_enough_to_read():
    assert len((ROOT / "tests/gpu.py").read_text(encoding="utf-8").splitlines()) <= 200
