"""What the exercises' tests are given: the student's functions, and the rules of the term.

In a starter (`python -m pytest tests/course`) the tests look at the code they stand beside. grade.py has them look at
another folder, by COURSE_STUDENT, and grades each exercise alone: what it calls of other exercises is the reference's.
"""
import functools
import importlib
import json
import os
import re
import sys
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
    """The functions of all exercises under their names, and the modules they came from."""

    def __init__(self, functions: dict[str, object], modules: list[ModuleType]):
        self.__dict__.update(functions)
        self.modules = modules


class World:
    """Inside it (`with world:`), imports find the modules of a folder in place of ours, and nothing of ours.

    The folder's functions run inside it, as they may import in their bodies; the tests run outside.
    """

    def __init__(self, folder: Path):
        self.folder, self.modules, self.inside = folder, {}, False  # modules: what the folder's imports have loaded
        self.path = [str(folder / name) for name in (".", "data", "tests/course")]
        self.path += [place for place in sys.path if Path(place or ".").resolve() not in OUR_FOLDERS]

    def __enter__(self) -> None:
        self.inside, self.our_path = True, sys.path[:]
        self.ours = {name: sys.modules.pop(name) for name in OUR_NAMES if name in sys.modules}
        sys.modules.update(self.modules)
        sys.path[:], self.before = self.path, len(sys.modules)

    def __exit__(self, *_) -> None:
        if len(sys.modules) != self.before:  # looked at only then: there are thousands, and many calls
            self.modules |= {name: module for name, module in list(sys.modules.items()) if self.has(module)}
        for name in self.modules:
            sys.modules.pop(name, None)
        sys.modules.update(self.ours)
        self.path, sys.path[:], self.inside = sys.path[:], self.our_path, False

    def has(self, module: ModuleType) -> bool:
        """Whether its file, or the folder of a package without one, is in the world's folder, and not in an environment's."""
        file = getattr(module, "__file__", None) or next(iter(getattr(module, "__path__", ())), "")
        return str(file).startswith(f"{self.folder}/") and "/site-packages/" not in str(file)

    def wrap(self, function):
        """The function, which runs inside."""
        @functools.wraps(function)
        def call(*args, **kwargs):
            if self.inside:
                return function(*args, **kwargs)
            with self:
                return function(*args, **kwargs)
        return call


OUR_FOLDERS = (ROOT, ROOT / "data", HERE)
OUR_NAMES = {path.stem for folder in OUR_FOLDERS for path in folder.glob("*.py")}
OUR_NAMES |= {"data"} | {f"data.{name}" for name in OUR_NAMES}


def functions_here() -> dict[str, object]:
    """{name: function} of the code that the tests stand beside, by its adapters.py."""
    table = importlib.import_module("adapters").FUNCTIONS
    return {name: getattr(importlib.import_module(module), attribute) for name, (module, attribute) in table.items()}


def load_functions(world: World, graded: list[str]) -> dict[str, object]:
    """{name: function} that adapters.py of the world's folder names for an exercise; Missing where it could not be loaded.

    If a file of another exercise is in the way, ours stands in for it: that mistake is not of this exercise.
    """
    importlib.invalidate_caches()
    with world:
        table = importlib.import_module("adapters").FUNCTIONS
    functions = {name: load(world, table, name) for name in graded}
    if any(isinstance(function, Missing) for function in functions.values()):
        modules_graded = [table[name][0] for name in graded if name in table]
        for name in table.keys() - set(graded):
            if isinstance(tried := load(world, table, name), Missing) and not is_absent(tried.reason, table[name][0]) and (
                    table[name][0] not in modules_graded):
                stand_in(world, table[name][0], graded)
        functions = {name: load(world, table, name) for name in graded}
    return functions


def load(world: World, table: dict, name: str) -> object:
    """The function that adapters.py names, or Missing."""
    if name not in table:
        return Missing(name, KeyError("it is not in adapters.py"))
    try:
        with world:
            loaded = importlib.import_module(table[name][0])
            if not world.has(loaded):
                raise ImportError(f"{loaded.__name__} is {getattr(loaded, '__file__', 'built in')}, not a file of the folder")
            return getattr(loaded, table[name][1])
    except BaseException as error:  # of whatever kind, sys.exit included: it is the student's file that is run
        return Missing(name, error)


def is_absent(error: BaseException, module: str) -> bool:
    """Whether the module was not handed in."""
    return isinstance(error, ModuleNotFoundError) and error.name == module


def stand_in(world: World, name: str, graded: list[str]) -> None:
    """Put our module into the world, without what is graded."""
    if ours := sys.modules.get(name):
        copy = ModuleType(name)
        copy.__dict__.update({key: value for key, value in vars(ours).items() if key not in graded})
        world.modules[name] = copy


def same_as_ours(world: World, names: set[str]) -> dict[int, object]:
    """{id of something in the world: ours}: the functions of other exercises, and records whose text is as in ours, so that
    the student's `isinstance` holds for what our code has made."""
    with world:
        table = importlib.import_module("adapters").FUNCTIONS
    same = {}
    for name in names & table.keys():
        module = world.modules.get(table[name][0])
        same[id(getattr(module, table[name][1], None))] = functions_here()[name]
    for name, module in world.modules.items():
        ours, theirs = records_of(sys.modules.get(name)), records_of(module)
        same |= {id(getattr(module, key, None)): getattr(sys.modules[name], key)
                 for key in ours.keys() & theirs.keys() if ours[key] == theirs[key]}
    return same


def records_of(module: ModuleType | None) -> dict[str, str]:
    """{name: text} of the classes without a method at the top level of a module's file. (A method may call what is graded.)"""
    file = Path(getattr(module, "__file__", None) or "/")
    text = file.read_text(encoding="utf-8", errors="replace") if file.suffix == ".py" else ""
    found = re.finditer(r"^(?:@.*\n)*class (\w+).*\n(?:(?:[ \t].*)?\n)*", text + "\n", re.MULTILINE)
    return {match[1]: match[0].rstrip() for match in found if not re.search(r"^\s+def ", match[0], re.MULTILINE)}


@pytest.fixture(scope="session")
def student() -> Student:
    reference, folder = functions_here(), Path(os.environ.get("COURSE_STUDENT", ROOT)).resolve()
    if folder == ROOT:
        return Student(reference, [])
    graded = os.environ["COURSE_GRADED"].split(",")  # the functions of one exercise
    world = World(folder)
    functions = load_functions(world, graded)
    same = same_as_ours(world, reference.keys() - set(graded))
    for module in world.modules.values():
        for name, value in list(vars(module).items()):
            if callable(value) and id(value) in same:
                setattr(module, name, same[id(value)])
    sys.path += world.path[:3]  # behind ours: what runs later, in a backward pass, may import
    return Student(reference | {name: world.wrap(functions[name]) for name in graded}, list(world.modules.values()))


@pytest.fixture
def rules() -> dict[str, str]:
    """{number of an exercise: name of its rule in force}."""
    return in_force()["rules"]


@pytest.fixture
def rule(request, rules) -> str:
    """The name of the rule in force for the exercise that this file tests."""
    return rules[request.path.stem.removeprefix("test_")]


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
    config.addinivalue_line("markers", "core: what the exercise is about; if it fails, half of its points at most")
