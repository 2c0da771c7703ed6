"""What the exercises' tests are given: the student's functions, and the rules of the term.

In a starter (`python -m pytest tests/course`) the tests look at the code they stand beside. grade.py has them look at
another folder, by COURSE_STUDENT, and grades each exercise alone: what it calls of other exercises is the reference's.
"""
import importlib
import json
import os
import sys
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data"), str(HERE)]


class Missing:
    """Stands for a function that could not be loaded: calling it fails with the reason."""

    def __init__(self, name: str, reason: BaseException):
        self.name, self.reason = name, reason

    def __call__(self, *args, **kwargs):
        pytest.fail(f"{self.name} could not be loaded: {type(self.reason).__name__}: {self.reason}", pytrace=False)


class Student:
    """The functions of all exercises under their names; one that is missing fails where it is called."""

    def __init__(self, functions: dict[str, object]):
        self.__dict__.update(functions)


def load_functions(folder: Path) -> tuple[dict[str, object], list[ModuleType]]:
    """({name: function}, the modules) that adapters.py of a folder names."""
    with only_modules_of(folder) as modules:
        table = importlib.import_module("adapters").FUNCTIONS
        functions = {}
        for name, (module, attribute) in table.items():
            try:
                loaded = importlib.import_module(module)
                if folder not in file_of(loaded).parents:  # what was not handed in would be the reference's
                    raise ImportError(f"there is no {module}.py in the folder")
                functions[name] = getattr(loaded, attribute)
            except Exception as error:  # of whatever kind: it is the student's file that is run
                functions[name] = Missing(name, error)
    return functions, modules


@contextmanager
def only_modules_of(folder: Path):
    """Inside, imports find the folder's modules in place of ours; the list that is given has them afterwards."""
    ours = {name: module for name, module in sys.modules.items() if file_of(module).parent in (ROOT, ROOT / "data", HERE)}
    for name in ours:
        del sys.modules[name]
    places, modules = [str(folder / name) for name in (".", "data", "tests/course")], []
    sys.path[:0] = places
    importlib.invalidate_caches()
    try:
        yield modules
    finally:
        theirs = {name: module for name, module in sys.modules.items()
                  if folder in file_of(module).parents and "site-packages" not in file_of(module).parts}
        modules += theirs.values()
        for name in theirs:
            del sys.modules[name]
        for place in places:
            sys.path.remove(place)
        sys.modules.update(ours)


def file_of(module: ModuleType) -> Path:
    return Path(getattr(module, "__file__", None) or "/")


def functions_here() -> dict[str, object]:
    """{name: function} of the code that the tests stand beside, by its adapters.py."""
    table = importlib.import_module("adapters").FUNCTIONS
    return {name: getattr(importlib.import_module(module), attribute) for name, (module, attribute) in table.items()}


@pytest.fixture(scope="session")
def student() -> Student:
    reference, folder = functions_here(), Path(os.environ.get("COURSE_STUDENT", ROOT)).resolve()
    if folder == ROOT:
        return Student(reference)
    functions, modules = load_functions(folder)
    graded = os.environ["COURSE_GRADED"].split(",")  # the functions of one exercise
    others = {id(function): reference[name] for name, function in functions.items() if name not in graded}
    for module in modules:
        for name, value in list(vars(module).items()):
            if id(value) in others:
                setattr(module, name, others[id(value)])
    absent = {name: Missing(name, KeyError("it is not in adapters.py")) for name in graded}
    return Student(reference | absent | {name: functions[name] for name in graded if name in functions})


@pytest.fixture
def rule(request) -> str:
    """The name of the rule in force for the exercise that this file tests."""
    return in_force()["rules"][request.path.stem.removeprefix("test_")]


def in_force() -> dict:
    """{"rules": {number: name}, "changed": numbers of those that are not the reference's}, as the course's scripts write it."""
    return json.loads((HERE / "rules.json").read_text())


@pytest.fixture(autouse=True)
def plain_functions_beside_it(request) -> None:
    """Skip a test marked `needs_plain(4, ...)` where these exercises have another rule: grade.py puts in one at a time."""
    marker = request.node.get_closest_marker("needs_plain")
    if marker and (changed := set(marker.args) & set(in_force()["changed"])):
        pytest.skip(f"exercise {min(changed)} has another rule this term: grade.py runs this test beside the plain one")


def pytest_configure(config):
    config.addinivalue_line("markers", "needs_plain(numbers): what a test expects holds with the reference's rule of these")
