"""Is every exercise fit to be released? Its tests must tell right from wrong.

    python tests/course/check.py             # all exercises: some minutes
    python tests/course/check.py 3 4         # these

For each rule of an exercise its solution must pass all tests, and the reference's body must fail a core test of another rule.
All tests must fail in the starter, and at least one for every bug of tests/mutants that lies in the functions of the exercise
and every mistake of its own list. The exit status is 1 if that does not hold.
"""
import argparse
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from os import cpu_count
from pathlib import Path

from course import (NUMBERS, ROOT, Exercise, Wrong, definitions, lines_of, load_exercises, make_reference, replace_once,
                    rules_of_term)
from grade import Grader, import_packages
from make_starter import make_starter

sys.path.insert(0, str(ROOT / "tests" / "mutants"))
from mutants import MUTANTS  # noqa: E402


def mistakes(exercise: Exercise) -> list[Wrong]:
    """The exercise's own list, and the bugs of tests/mutants within its functions."""
    found = list(exercise.wrong)
    for file, names in exercise.blanks.items():
        source = (ROOT / file).read_text(encoding="utf-8")
        spans = [lines_of(node) for node in definitions(source, names + exercise.drops.get(file, []))]
        for mutant in MUTANTS:
            line = source[:source.find(mutant.old)].count("\n") + 1 + mutant.old[:1].count("\n")
            if mutant.file == file and any(first <= line <= last for first, last in spans):
                found.append(Wrong(mutant.name, mutant.bug, file, mutant.old, mutant.new))
    return found


def first_failure(grader: Grader, student: Path, exercise: Exercise, only_core: bool = False) -> str | None:
    """The first test that fails, with its reason; None if all pass."""
    for test, is_core in grader.tests[exercise.number].items():
        if only_core and not is_core:
            continue
        verdict = grader.run(student, exercise, test)
        if not verdict.passed:
            return f"{verdict.test}: {verdict.why}"
    return None


def check(exercise: Exercise, exercises: list[Exercise], folder: Path) -> bool:
    """Print a line for each trial of an exercise; whether all came out as they must."""
    folders, fine = (folder / f"{exercise.number}-{number}" for number in count()), True

    def report(name: str, failure: str | None, must_fail: bool, start: float) -> None:
        nonlocal fine
        right = (failure is not None) == must_fail
        fine &= right
        word = {(True, True): "caught", (True, False): "NOT CAUGHT", (False, False): "FAILS", (False, True): "passes"}
        print(f"{word[must_fail, right]:<11}{exercise.number:>2}  {name:<44}{time.perf_counter() - start:>6.1f} s   "
              f"{(failure or '')[:110]}", flush=True)

    plain = rules_of_term(exercises, None)
    for rule in exercise.rules:
        rules, start = plain | {exercise.number: rule}, time.perf_counter()
        work = next(folders)
        work.mkdir()
        grader = Grader([exercise], rules, work)
        make_reference(work / "solved", exercises, rules)
        report(f"the solution of rule {rule}", first_failure(grader, work / "solved", exercise), False, start)
        if rule != list(exercise.rules)[0]:
            start = time.perf_counter()
            report(f"the reference under rule {rule}", first_failure(grader, ROOT, exercise, only_core=True), True, start)
            continue
        make_starter(work / "starter", exercises, rules)
        start = time.perf_counter()
        passed = [verdict.test for verdict in grader.grade(work / "starter", exercise) if verdict.passed]
        report("the starter, each test", None if passed else "all fail", True, start)
        for wrong in mistakes(exercise):
            start = time.perf_counter()
            make_reference(work / wrong.name, exercises, rules)
            replace_once(work / wrong.name, wrong.file, wrong.old, wrong.new)
            report(wrong.name, first_failure(grader, work / wrong.name, exercise), True, start)
    return fine


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.splitlines()[0])
    parser.add_argument("numbers", type=int, nargs="*", help="of exercises; none: all")
    numbers = parser.parse_args().numbers or list(NUMBERS)
    if unknown := set(numbers) - set(NUMBERS):
        parser.error(f"there are no tests of exercise {min(unknown)}" + (": it is marked by hand" if 10 in unknown else ""))
    exercises = load_exercises()
    import_packages()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(cpu_count()) as pool:
        chosen = [each for each in exercises if each.number in numbers]
        fine = list(pool.map(lambda each: check(each, exercises, Path(folder)), chosen))
    print("every exercise tells right from wrong" if all(fine) else "NOT READY")
    sys.exit(not all(fine))


if __name__ == "__main__":
    main()
