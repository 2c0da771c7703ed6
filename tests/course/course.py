"""What the course's scripts share: its exercises, the rule of each in a term, the reference's code with a rule put in."""
import ast
import importlib
import json
import os
import random
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent.parent
HERE = Path("tests/course")
NUMBERS = range(1, 10)  # exercise 10 has no tests: it is read
POINTS_AN_HOUR = 10
# Of a copy of the project: what is large and never changed is linked to.
LINKED = ("data/model", "data/offline", "data/figures")
COPIED = ("data", "tests", "README.md", "LICENSE", "requirements.txt")  # and *.py: nothing that happens to lie beside them


class Rule(NamedTuple):
    """One way to ask an exercise. The first of an exercise is the reference's and has no edits."""
    says: str  # a sentence for the student
    edits: list[tuple[str, str, str]]  # (file, old, new): docstring and solution; each `old` stands once in the file


class Wrong(NamedTuple):
    """A mistake that students make, as a change of the reference."""
    name: str
    bug: str  # what its victims would say
    file: str
    old: str  # stands exactly once in the file
    new: str


class Exercise(NamedTuple):
    number: int
    title: str
    hours: float
    blanks: dict[str, list[str]]  # {file: functions whose body the student writes}
    drops: dict[str, list[str]]  # {file: private helpers that are the solution, and leave the starter}
    rules: dict[str, Rule]
    wrong: list[Wrong]

    @property
    def points(self) -> float:
        return POINTS_AN_HOUR * self.hours

    @property
    def functions(self) -> list[tuple[str, str]]:
        """(module, name) of what the student writes."""
        return [(file.removesuffix(".py"), name) for file, names in self.blanks.items() for name in names]


def load_exercises() -> list[Exercise]:
    """Exercises 1 to 9, in order. Only the instructor's copy has them: they hold the solutions."""
    sys.path.insert(0, str(ROOT / HERE))
    try:
        return [importlib.import_module(f"exercise_{number}").EXERCISE for number in NUMBERS]
    finally:
        sys.path.remove(str(ROOT / HERE))


def rules_of_term(exercises: list[Exercise], term: int | None) -> dict[int, str]:
    """{number: name of the rule}: the reference's without a term, else one of the others for each exercise."""
    return {each.number: list(each.rules)[0] if term is None else
            random.Random(f"term {term}, exercise {each.number}").choice(list(each.rules)[1:])
            for each in exercises}


def make_reference(folder: Path, exercises: list[Exercise], rules: dict[int, str], for_tests: bool = False) -> None:
    """Copy the project into a new folder, put the solutions of the exercises' rules in, and write for conftest.py which rules
    there are, and whose are not the reference's. for_tests: with a model of its own, and no other data. Raises ValueError for
    a folder inside the project."""
    if folder.resolve().is_relative_to(ROOT):
        raise ValueError(f"{folder} is inside the project; choose a folder outside, or another TMPDIR")
    shutil.copytree(ROOT, folder, ignore=left_out)
    if for_tests:  # what students' code runs in must not lead back into the project
        shutil.copytree(ROOT / "data" / "model", folder / "data" / "model")
    for name in () if for_tests else LINKED:
        os.symlink(ROOT / name, folder / name)
    for each in exercises:
        for edit in each.rules[rules[each.number]].edits:
            replace_once(folder, *edit)
    plain = rules_of_term(load_exercises(), None)
    in_force = plain | {each.number: rules[each.number] for each in exercises}
    changed = [number for number, rule in in_force.items() if rule != plain[number]]
    (folder / HERE / "rules.json").write_text(json.dumps({"rules": in_force, "changed": changed}) + "\n")


def left_out(place: str, names: list[str]) -> list[str]:
    """What is not the project's own in one of its folders, or is linked to."""
    if Path(place) == ROOT:
        return [name for name in names if name not in COPIED and not name.endswith(".py")]
    if Path(place) == ROOT / "data":
        return [name for name in names if (ROOT / "data" / name).is_dir()]
    return ["__pycache__"]


def replace_once(folder: Path, file: str, old: str, new: str) -> None:
    """Replace a text of a file. Raises ValueError unless it stands there once."""
    source = (folder / file).read_text(encoding="utf-8")
    if (count := source.count(old)) != 1:
        raise ValueError(f"{file} holds this text {count} times; it must stand there once:\n{old}")
    (folder / file).write_text(source.replace(old, new), encoding="utf-8")


def definitions(source: str, names: list[str]) -> list[ast.FunctionDef | ast.ClassDef]:
    """The definitions of these names at the top level of a file, in their order there."""
    found = [node for node in ast.parse(source).body if getattr(node, "name", None) in names]
    if missing := set(names) - {node.name for node in found}:
        raise ValueError(f"no definition of {', '.join(sorted(missing))}")
    return found


def lines_of(node: ast.FunctionDef | ast.ClassDef) -> tuple[int, int]:
    """(first, last) line of a definition, with its decorators, counted from 1."""
    return min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]), node.end_lineno


def blank(source: str, blanks: list[str], drops: list[str], number: int) -> str:
    """The source with the bodies of `blanks` gone but for their docstrings, and `drops` gone whole."""
    lines = source.splitlines(keepends=True)
    for node in reversed(definitions(source, [*blanks, *drops])):
        first, last = lines_of(node)
        if node.name in drops:
            while first > 1 and not lines[first - 2].strip():
                first -= 1  # with the empty lines before it
            del lines[first - 1:last]
            continue
        docstring = node.body[0]
        indent = " " * docstring.col_offset
        lines[docstring.end_lineno:last] = [f'{indent}raise NotImplementedError("exercise {number}")\n']
    return "".join(lines)
