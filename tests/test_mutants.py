"""The table of mutants fits the code as it stands; `python tests/mutants/run.py` tries them."""
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "tests" / "mutants"))

from mutants import MUTANTS  # noqa: E402


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_changes_one_place_and_names_tests_that_exist(mutant):
    source = (ROOT / mutant.file).read_text(encoding="utf-8")
    assert source.count(mutant.old) == 1
    assert mutant.old != mutant.new
    compile(source.replace(mutant.old, mutant.new), mutant.file, "exec")  # or any test would seem to notice it
    assert mutant.tests
    for test in mutant.tests:
        file, name = re.fullmatch(r"(tests/test_\w+\.py)::(test_\w+)(?:\[.+\])?", test).groups()
        assert re.search(rf"^def {name}\(", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE), test


def test_names_differ():
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)


def test_an_unknown_mutant_is_refused():
    done = subprocess.run([sys.executable, "tests/mutants/run.py", "nosuch"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("no mutant nosuch; there are loss_per_micro_batch")
