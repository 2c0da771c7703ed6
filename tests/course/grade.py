"""Grade a folder: run the tests of every exercise against its functions, and print points.

    python tests/course/grade.py FOLDER                      # all exercises, by the reference's rules
    python tests/course/grade.py FOLDER --term 7             # by the rules of that term
    python tests/course/grade.py FOLDER --exercise 3 --json points.json --junit points.xml

The tests find the functions by FOLDER/tests/course/adapters.py (or FOLDER/adapters.py). Every test is a process of its own,
with limits on time, memory and output, and runs from a fresh copy of this project, never from FOLDER. So a submission that
hangs, prints without end, leaves by sys.exit or os._exit, or edits tests, loses the points of the tests that do so. It is no
prison: who attacks the grader itself runs as the same user. Grade strangers' work in a container.

The exit status is 0 whatever the points, and another one if FOLDER cannot be graded.
"""
import argparse
import json
import multiprocessing
import os
import re
import resource
import secrets
import select
import shutil
import signal
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import pytest

from course import HERE, ROOT, Exercise, load_exercises, make_reference, rules_of_term

SECONDS = 30  # of the processor, for one test
PATIENCE = 4  # times as long by the clock, on a busy machine or in a sleep
MEMORY = 8 << 30  # bytes of addresses; torch takes three on its own
OUTPUT = 64 << 20  # bytes of one test's output, and of any file that it writes
FORK = multiprocessing.get_context("fork")


class Verdict(NamedTuple):
    """What became of one test."""
    test: str  # the name of its function, with its parameters
    passed: bool
    seconds: float
    why: str  # a line, empty if it passed
    log: str


Graded = list[tuple[Exercise, list[Verdict]]]


def import_packages() -> None:
    """Import what the project imports, once, so that each test starts at once; and forget our own modules again."""
    import torch
    places = [str(ROOT), str(ROOT / "data")]
    sys.path[:0] = places
    import evaluate  # noqa: F401
    import make_model  # noqa: F401
    import train  # noqa: F401
    import transformers.models.qwen2_5_vl.modeling_qwen2_5_vl  # noqa: F401
    torch.set_num_threads(1)
    for place in places:
        sys.path.remove(place)
    for name, module in list(sys.modules.items()):
        if Path(getattr(module, "__file__", None) or "/").parent in (ROOT, ROOT / "data", ROOT / HERE) and name != "__main__":
            del sys.modules[name]


NOT_PASSED = "not passed"


class Calls:
    """A plugin of pytest: whether each test that was called passed. One that is skipped, or may fail, did not."""

    def __init__(self):
        self.passed = []

    def pytest_runtest_logreport(self, report):
        if report.when == "call":
            self.passed.append(report.passed and not hasattr(report, "wasxfail"))


class Grader:
    """Runs the tests of exercises, each in a copy of the project with the rule of that exercise alone."""

    def __init__(self, exercises: list[Exercise], rules: dict[int, str], folder: Path, seconds: float = SECONDS):
        self.exercises, self.folder, self.seconds, self.forking = exercises, folder, seconds, threading.Lock()
        for each in exercises:
            make_reference(self.place(each), [each], rules)
        self.files = {path: path.read_bytes() for path in folder.glob("reference-*/**/*.py")}
        self.tests = {each.number: self._collect(each) for each in exercises}

    def place(self, exercise: Exercise) -> Path:
        return self.folder / f"reference-{exercise.number}"

    def grade(self, student: Path, exercise: Exercise) -> list[Verdict]:
        """The verdict on each test of one exercise."""
        return [self.run(student, exercise, test) for test in self.tests[exercise.number]]

    def _collect(self, exercise: Exercise) -> list[str]:
        """The ids of an exercise's tests, in their order. Raises ValueError if they cannot be collected."""
        with tempfile.TemporaryDirectory(dir=self.folder) as scratch:
            log = Path(scratch, "log")
            self._fork(Path(scratch), ROOT, exercise, ["--collect-only", f"test_{exercise.number}.py"])
            ids = re.findall(r"^(?:.*/)?(test_\d+\.py::\S.*)$", log.read_text(), re.MULTILINE)
            if not ids:
                raise ValueError(f"no test of exercise {exercise.number} was found:\n{log.read_text()}")
        return ids

    def run(self, student: Path, exercise: Exercise, test: str) -> Verdict:
        """The verdict on one test."""
        start = time.perf_counter()
        with tempfile.TemporaryDirectory(dir=self.folder, ignore_cleanup_errors=True) as scratch:
            why = self._fork(Path(scratch), student, exercise, [test])
            log = Path(scratch, "log").read_text(errors="replace")
        if self._mend():
            why = "a file of the tests was changed"
        elif why == NOT_PASSED:
            why = first_error(log)
        return Verdict(test.partition("::")[2], not why, time.perf_counter() - start, why, log[:4000])

    def _fork(self, scratch: Path, student: Path, exercise: Exercise, arguments: list[str]) -> str:
        """Run pytest in a process of its own. Returns why the test did not pass, or "" if it did."""
        word = secrets.token_bytes(16)  # what a test says that ends pytest's way; one that exits early does not
        with self.forking:  # or another test's process would hold this one's line open
            line, end = os.pipe()
            process = FORK.Process(target=self._child, args=(scratch, student, exercise, arguments, end, word))
            process.start()
            os.close(end)
        try:
            ready, _, _ = select.select([line], [], [], PATIENCE * self.seconds)
            said = os.read(line, 100) if ready else b""
        finally:
            os.close(line)
            try:
                os.killpg(process.pid, signal.SIGKILL)  # with all that it has started
            except ProcessLookupError:
                process.kill()
            process.join()
        if not ready or process.exitcode == -signal.SIGXCPU:
            return f"no end within {self.seconds:g} s of the processor, or {PATIENCE * self.seconds:g} s by the clock"
        if said[:-1] != word:
            return "the process ended by itself"
        return "" if said[-1] else NOT_PASSED

    def _child(self, scratch, student, exercise, arguments, end, word):
        os.setpgrp()  # what is killed together
        output = os.open(scratch / "log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        for limit, value in ((resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_FSIZE, OUTPUT), (resource.RLIMIT_CORE, 0)):
            resource.setrlimit(limit, (value, value))
        seconds = round(self.seconds)
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))  # if they were equal, SIGKILL would come at once
        for name in ("PYTEST_ADDOPTS", "PYTEST_PLUGINS"):
            os.environ.pop(name, None)
        os.environ.update(COURSE_STUDENT=str(student), TMPDIR=str(scratch),
                          COURSE_GRADED=",".join(name for _, name in exercise.functions))
        os.chdir(self.place(exercise) / HERE)
        sys.dont_write_bytecode = True
        sys.path[:] = [place for place in sys.path if Path(place or ".").resolve() not in (ROOT, ROOT / HERE)]
        calls = Calls()
        status = pytest.main(["-q", "--tb=short", "-o", "console_output_style=classic", "-p", "no:cacheprovider", "-m", "",
                              "-c", os.devnull, f"--rootdir={os.getcwd()}", f"--confcutdir={os.getcwd()}",
                              f"--basetemp={scratch / 'tmp'}", *arguments], plugins=[calls])
        sys.stdout.flush()
        os.write(end, word + bytes([status == 0 and calls.passed == [True]]))
        os._exit(0)

    def _mend(self) -> bool:
        """Whether files of the reference were changed; they are then as they were."""
        changed = [path for path, content in self.files.items() if not path.is_file() or path.read_bytes() != content]
        for path in changed:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self.files[path])
        return bool(changed)


def first_error(log: str) -> str:
    """What a failed test says, in a line."""
    for pattern in (r"^E[ \t]+(\S.*)$", r"^(.* could not be loaded: .*)$"):
        if found := re.search(pattern, log, re.MULTILINE):
            return found[1][:200]
    return (log.strip().splitlines() or ["no output"])[-1][:200]


# ---- what is printed and written -----------------------------------------------------------------------------------
def points_of(exercise: Exercise, verdicts: list[Verdict]) -> float:
    """An exercise's points, shared evenly among its tests."""
    return round(exercise.points * sum(verdict.passed for verdict in verdicts) / len(verdicts), 1)


def table(graded: Graded) -> str:
    """One line an exercise, the tests that failed under it, and the sum."""
    lines = [f"{'exercise':<44}{'points':>12}{'tests':>10}{'seconds':>9}"]
    for exercise, verdicts in graded:
        passed = sum(verdict.passed for verdict in verdicts)
        points = f"{points_of(exercise, verdicts):g} of {exercise.points:g}"
        tests, seconds = f"{passed} of {len(verdicts)}", sum(verdict.seconds for verdict in verdicts)
        lines.append(f"{exercise.number:>2}  {exercise.title:<40}{points:>12}{tests:>10}{seconds:>9.1f}")
        lines += [f"      {verdict.test}: {verdict.why}" for verdict in verdicts if not verdict.passed]
    points = sum(points_of(exercise, verdicts) for exercise, verdicts in graded)
    of = sum(exercise.points for exercise, _ in graded)
    seconds = sum(verdict.seconds for _, verdicts in graded for verdict in verdicts)
    lines.append(f"{'all':<44}{f'{points:g} of {of:g}':>12}{'':>10}{seconds:>9.1f}")
    return "\n".join(lines)


def as_json(graded: Graded, rules: dict[int, str]) -> dict:
    return {"points": sum(points_of(exercise, verdicts) for exercise, verdicts in graded),
            "of": sum(exercise.points for exercise, _ in graded),
            "exercises": [{"number": exercise.number, "title": exercise.title, "rule": rules[exercise.number],
                           "points": points_of(exercise, verdicts), "of": exercise.points,
                           "tests": [{"name": v.test, "passed": v.passed, "seconds": round(v.seconds, 2), "why": v.why}
                                     for v in verdicts]} for exercise, verdicts in graded]}


def as_junit(graded: Graded) -> bytes:
    """JUnit's XML, which Gradescope's, GitLab's and Jenkins' readers take."""
    suites = ElementTree.Element("testsuites")
    for exercise, verdicts in graded:
        suite = ElementTree.SubElement(suites, "testsuite", name=f"exercise {exercise.number}: {exercise.title}",
                                       tests=str(len(verdicts)), failures=str(sum(not v.passed for v in verdicts)))
        for verdict in verdicts:
            case = ElementTree.SubElement(suite, "testcase", classname=f"exercise_{exercise.number}", name=verdict.test,
                                          time=f"{verdict.seconds:.2f}")
            if not verdict.passed:
                failure = ElementTree.SubElement(case, "failure", message=printable(verdict.why))
                failure.text = printable(verdict.log)
    ElementTree.indent(suites)
    return ElementTree.tostring(suites, encoding="utf-8", xml_declaration=True)


def printable(text: str) -> str:
    """The text without what XML cannot hold."""
    return "".join(mark for mark in text if mark in "\t\n" or 0x20 <= ord(mark) < 0xD800 or 0xE000 <= ord(mark) < 0xFFFE)


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--exercise", type=int, action="append", choices=range(1, 10), help="only these")
    parser.add_argument("--term", type=int, help="the number that the starter was made with")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of the processor, for one test")
    parser.add_argument("--json", type=Path, help="write the points to this file")
    parser.add_argument("--junit", type=Path, help="write JUnit's XML to this file")
    args = parser.parse_args()
    for path in filter(None, (args.json, args.junit)):  # fails now, not behind the grading
        try:
            path.touch()
        except OSError as error:
            parser.error(f"{path} cannot be written: {error.strerror}")
    if not args.seconds >= 1:
        parser.error("--seconds must be at least 1")
    student = args.folder.resolve()
    if not any((student / place / "adapters.py").is_file() for place in (HERE, ".")):
        sys.exit(f"error: {args.folder} has no {HERE / 'adapters.py'}; it says where the functions are")
    exercises = load_exercises()
    rules = rules_of_term(exercises, args.term)
    chosen = [each for each in exercises if not args.exercise or each.number in args.exercise]
    import_packages()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        copy = shutil.copytree(student, Path(folder) / "student", symlinks=True, ignore=shutil.ignore_patterns(
            ".git", ".venv", "runs", "__pycache__"))
        grader = Grader(chosen, rules, Path(folder), args.seconds)
        jobs, graded = [pool.submit(grader.grade, copy, each) for each in chosen], []
        for each, job in zip(chosen, jobs):
            graded.append((each, job.result()))
            print(f"exercise {each.number} is graded", file=sys.stderr, flush=True)
    print(table(graded))
    for path, content in ((args.json, json.dumps(as_json(graded, rules), indent=1).encode()),
                          (args.junit, as_junit(graded))):
        if path:
            path.write_bytes(content)


if __name__ == "__main__":
    main()
