"""Write the course's starter: this project, in which the exercises' functions are to be written.

    python tests/course/make_starter.py OUT              # by the reference's rules
    python tests/course/make_starter.py OUT --term 7     # other rules: the public reference then fails the tests
    python tests/course/make_starter.py OUT --term 7 --solved    # the instructor's solution of that term

A function of an exercise keeps its signature and docstring; its body is `raise NotImplementedError("exercise N")`. All
else works as it is. OUT has the tests of the exercises, but neither their solutions nor the project's other tests.
"""
import argparse
import re
import shutil
import signal
import sys
import tempfile
from pathlib import Path

from course import HERE, LINKED, ROOT, Exercise, blank, load_exercises, make_reference, rules_of_term

# Of tests/course, what students get; the rest holds solutions or is the instructor's.
GIVEN = ("README.md", "notes", "adapters.py", "conftest.py", "rules.json", "rules.md", "test_*.py", "ranks.py")


def make_starter(out: Path, exercises: list[Exercise], rules: dict[int, str], solved: bool = False) -> None:
    """Write the starter into the folder `out`, which must not exist or be empty; solved: with the solutions."""
    if out.resolve().is_relative_to(ROOT):
        raise ValueError(f"{out} is inside the project; choose a folder outside")
    if out.is_symlink() or out.exists() and not out.is_dir():
        raise ValueError(f"{out} is there and is no folder; choose another name")
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is there and not empty; choose another folder")
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.absolute().parent) as beside:  # so that OUT is never there half done
        _write(Path(beside) / "starter", exercises, rules, solved)
        (Path(beside) / "starter").rename(out)


def _write(out: Path, exercises: list[Exercise], rules: dict[int, str], solved: bool) -> None:
    make_reference(out, exercises, rules)
    for name in LINKED:
        (out / name).unlink()
        shutil.copytree(ROOT / name, out / name)
    if not solved:
        for file in {file for each in exercises for file in each.blanks}:
            source = (out / file).read_text(encoding="utf-8")
            for each in exercises:
                source = blank(source, each.blanks.get(file, []), each.drops.get(file, []), each.number)
            (out / file).write_text(source, encoding="utf-8")
    keep_given(out)
    for page in out.rglob("*.md"):  # a link to what students do not get is its text alone
        text = re.sub(r"\[([^\]]+)\]\(([^)#\s]+)[^)]*\)",
                      lambda link: link[0 if "//" in link[2] or (page.parent / link[2]).exists() else 1],
                      page.read_text(encoding="utf-8"))
        page.write_text(text, encoding="utf-8")
    tell_rules(out / HERE / "README.md", exercises, rules)
    lines = [f"{each.number}. *{each.title}*: {each.rules[rules[each.number]].says}" for each in exercises]
    (out / HERE / "rules.md").write_text("# The rules of this term\n\n" + "\n".join(lines) + "\n", encoding="utf-8")


def tell_rules(path: Path, exercises: list[Exercise], rules: dict[int, str]) -> None:
    """In the starter's page: another rule stands under the heading of its exercise; what is for instructors is left out."""
    text = re.sub(r"## For instructors\n.*?(?=^## )", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for each in exercises:
        if rules[each.number] != list(each.rules)[0]:
            heading = re.search(rf"^### {each.number}\. .*\n", text, re.MULTILINE)[0]
            text = text.replace(heading, f"{heading}\n**This term:** {each.rules[rules[each.number]].says} What follows is of "
                                         "the public rule.\n")
    path.write_text(text, encoding="utf-8")


def keep_given(out: Path) -> None:
    """Remove the project's tests, and the course's solutions and scripts."""
    given = {path for pattern in GIVEN for path in (out / HERE).glob(pattern)}
    for path in [*(out / HERE).iterdir(), *(out / "tests").iterdir()]:
        if path not in given and path != out / HERE:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--term", type=int, help="any number; the same one goes to grade.py")
    parser.add_argument("--solved", action="store_true", help="with the solutions, for the instructor")
    args = parser.parse_args()
    exercises = load_exercises()
    rules = rules_of_term(exercises, args.term)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what is half done goes
    try:
        make_starter(args.out, exercises, rules, args.solved)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"{args.out} is ready; its tests: cd {args.out} && python -m pytest {HERE} -q")
    for each in exercises:
        print(f"  {each.number:>2}  {each.title:<42} rule: {rules[each.number]}")


if __name__ == "__main__":
    main()
