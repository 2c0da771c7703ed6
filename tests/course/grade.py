"""Grade a folder: run the tests of every exercise against its functions, and print points.

    python tests/course/grade.py FOLDER                      # all exercises, by the reference's rules
    python tests/course/grade.py FOLDER --term 7             # by the rules of that term
    python tests/course/grade.py FOLDER --exercise 3 --json points.json --junit points.xml

The tests find the functions by FOLDER/tests/course/adapters.py (or FOLDER/adapters.py). Every test is a process of its own,
with limits on time, memory and output, and runs from a fresh copy of this project, never from FOLDER. So a submission that
hangs, prints without end, leaves by sys.exit or os._exit, or edits tests, loses the points of the tests that do so. It is no
prison: who attacks the grader itself runs as the same user, and a process that leaves its group is not followed. Grade
strangers' work in a container.

The exit status is 0 whatever the points, and another one if FOLDER cannot be graded.
"""
import argparse
import gc
import json
import multiprocessing
import os
import re
import resource
import secrets
import select
import shutil
import signal
import subprocess
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
PATIENCE_EXERCISE = 20  # times as long for all tests of an exercise; a right solution takes two
MEMORY = 8 << 30  # bytes of addresses; torch takes three on its own
OUTPUT = 64 << 20  # bytes of one test's output, and of any file that it writes
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
FORK = multiprocessing.get_context("fork")


class Verdict(NamedTuple):
    """What became of one test."""
    test: str  # the name of its function, with its parameters
    core: bool
    passed: bool
    seconds: float
    why: str  # a line, empty if it passed
    log: str


Graded = list[tuple[Exercise, list[Verdict]]]


def import_packages() -> None:
    """Import what the project imports, once, so that each test starts soon; and forget our own modules again."""
    import torch
    places, before = [str(ROOT), str(ROOT / "data")], set(sys.modules)
    sys.path[:0] = places
    import evaluate  # noqa: F401
    import make_model  # noqa: F401
    import train  # noqa: F401
    import transformers.models.qwen2_5_vl.modeling_qwen2_5_vl  # noqa: F401
    torch.set_num_threads(1)
    for place in places:
        sys.path.remove(place)
    for name in set(sys.modules) - before:
        if name == "data" or Path(getattr(sys.modules[name], "__file__", None) or "/").parent in (ROOT, ROOT / "data"):
            del sys.modules[name]
    gc.freeze()  # pytest collects garbage twice a test, and would look at all of torch each time


NOT_PASSED = "not passed"


class Calls:
    """A plugin of pytest: whether each test that was called passed. One that is skipped, or may fail, did not."""

    def __init__(self):
        self.passed = []

    def pytest_runtest_logreport(self, report):
        if report.when == "call":
            self.passed.append(report.passed and not hasattr(report, "wasxfail"))


class Names:
    """A plugin of pytest: prints the ids of the tests, and which are core."""

    def pytest_collection_finish(self, session):
        for item in session.items:
            print("\ncore" if item.get_closest_marker("core") else "\ntest", item.nodeid, flush=True)


class Grader:
    """Runs the tests of exercises, each in a copy of the project with the rule of that exercise alone."""

    def __init__(self, exercises: list[Exercise], rules: dict[int, str], folder: Path, seconds: float = SECONDS):
        self.folder, self.seconds = folder, seconds
        self.forking, self.running, self.stopped = threading.Lock(), set(), False
        self.files, self.tests = {}, {}
        for each in exercises:
            make_reference(self.place(each), [each], rules, for_tests=True)
            self.tests[each.number] = self._collect(each)  # which leaves compiled files behind, for the tests
            self.files[each.number] = files_of(self.place(each))

    def place(self, exercise: Exercise) -> Path:
        return self.folder / f"reference-{exercise.number}"

    def stop(self) -> None:
        """End the tests that run, and start no others."""
        with self.forking:
            self.stopped = True
            for process in list(self.running):
                kill(process)

    def grade(self, student: Path, exercise: Exercise) -> list[Verdict]:
        """The verdict on each test of one exercise."""
        start, limit, verdicts = time.perf_counter(), PATIENCE_EXERCISE * self.seconds, []
        for test, core in self.tests[exercise.number].items():
            if time.perf_counter() - start < limit:
                verdicts.append(self.run(student, exercise, test))
            else:
                why = f"was not run: the exercise had had {limit:g} s"
                verdicts.append(Verdict(test.partition("::")[2], core, False, 0.0, why, why))
        return verdicts

    def _collect(self, exercise: Exercise) -> dict[str, bool]:
        """{id: whether it is core} of an exercise's tests, in their order. Raises ValueError if there are none."""
        file = self.place(exercise) / HERE / f"test_{exercise.number}.py"
        log, _ = self._fork(ROOT, exercise, ["--collect-only", str(file)])
        tests = {test: kind == "core" for kind, test in re.findall(r"^(core|test) (test_\d+\.py::.*)$", log, re.MULTILINE)}
        if not any(tests.values()):
            raise ValueError(f"no core test of exercise {exercise.number} was found:\n{log}")
        return tests

    def run(self, student: Path, exercise: Exercise, test: str) -> Verdict:
        """The verdict on one test."""
        start = time.perf_counter()
        log, why = self._fork(student, exercise, [str(self.place(exercise) / HERE / test)])
        if self._mend(exercise):
            why = "a file of the tests was changed"
        elif why == NOT_PASSED:
            why = first_error(log)
        core = self.tests[exercise.number][test]
        return Verdict(test.partition("::")[2], core, not why, time.perf_counter() - start, why, log[:4000])

    def _fork(self, student: Path, exercise: Exercise, arguments: list[str]) -> tuple[str, str]:
        """Run pytest in a process of its own: (what it printed, why the test did not pass, or "" if it did)."""
        scratch = Path(tempfile.mkdtemp(dir=self.folder))
        word = secrets.token_bytes(16)  # what a test says that ends pytest's way; one that exits early does not
        with self.forking:  # or another test's process would hold this one's line open
            if self.stopped:
                return "", "stopped"
            line, end = os.pipe()
            process = FORK.Process(target=self._child, args=(scratch, student, exercise, arguments, end, word))
            process.start()
            self.running.add(process)
            os.close(end)
        try:
            ready, _, _ = select.select([line], [], [], PATIENCE * self.seconds)
            said = os.read(line, 100) if ready else b""
        finally:
            os.close(line)
            kill(process)
            process.join()
            self.running.discard(process)
            log = (scratch / "log").read_text(errors="replace") if (scratch / "log").is_file() else ""
            remove(scratch)
        if not ready or process.exitcode == -signal.SIGXCPU:
            return log, f"no end within {self.seconds:g} s of the processor, or {PATIENCE * self.seconds:g} s by the clock"
        if said[:-1] != word:
            return log, "the process ended by itself"
        return log, "" if said[-1] else NOT_PASSED

    def _child(self, scratch, student, exercise, arguments, end, word):
        os.setpgrp()  # what is killed together
        multiprocessing.set_start_method(None, force=True)  # it is the student's to choose
        output = os.open(scratch / "log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        for limit, value in ((resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_FSIZE, OUTPUT), (resource.RLIMIT_CORE, 0)):
            resource.setrlimit(limit, (value, value))
        seconds = round(self.seconds)
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))  # if they were equal, SIGKILL would come at once
        for name in ("PYTEST_ADDOPTS", "PYTEST_PLUGINS"):
            os.environ.pop(name, None)
        os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
        tempfile.tempdir = str(scratch)
        os.environ.update(COURSE_STUDENT=str(student), TMPDIR=str(scratch),
                          COURSE_GRADED=",".join(name for _, name in exercise.functions))
        os.chdir(student)
        collecting = "--collect-only" in arguments
        sys.dont_write_bytecode = not collecting
        sys.path[:] = [place for place in sys.path if Path(place or ".").resolve() not in (ROOT, ROOT / HERE)]
        tests, calls = self.place(exercise) / HERE, Calls()
        status = pytest.main(["-q", "--tb=short", "-o", "console_output_style=classic", "-p", "no:cacheprovider", "-m", "",
                              "-c", os.devnull, f"--rootdir={tests}", f"--confcutdir={tests}",
                              f"--basetemp={scratch / 'tmp'}", *arguments],
                             plugins=[Names() if collecting else calls])
        sys.stdout.flush()
        os.write(end, word + bytes([status == 0 and calls.passed == [True]]))
        os._exit(0)

    def _mend(self, exercise: Exercise) -> bool:
        """Whether files of an exercise's copy were changed. It is then as it was, without what was added, too."""
        files = self.files[exercise.number]
        try:
            there = files_of(self.place(exercise))
        except (OSError, RecursionError):  # what cannot be read was changed
            there = {}
        if there != files:
            remove(self.place(exercise))
            for path, content in files.items():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
        return any(there.get(path) != content for path, content in files.items())


def files_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def kill(process: multiprocessing.Process) -> None:
    """Kill a process with all of its group."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        process.kill()


def remove(folder: Path) -> None:
    """Remove a folder, however deep it is; what is still being written to may stay."""
    subprocess.run(["rm", "-rf", folder], stderr=subprocess.DEVNULL, start_new_session=True)  # Ctrl-C does not reach it


def first_error(log: str) -> str:
    """What a failed test says, in a line."""
    for pattern in (r"^E[ \t]+(\S.*)$", r"^(.* could not be loaded: .*)$"):
        if found := re.search(pattern, log, re.MULTILINE):
            return found[1][:200]
    return (log.strip().splitlines() or ["no output"])[-1][:200]


# ---- what is printed and written -----------------------------------------------------------------------------------
def points_of(exercise: Exercise, verdicts: list[Verdict]) -> float:
    """An exercise's points, shared evenly among its tests; at most half of them if a core test failed."""
    share = sum(verdict.passed for verdict in verdicts) / len(verdicts)
    most = 1.0 if all(verdict.passed for verdict in verdicts if verdict.core) else 0.5
    return round(exercise.points * min(share, most), 1)


def table(graded: Graded) -> str:
    """One line an exercise, the tests that failed under it, and the sum."""
    lines = [f"{'exercise':<44}{'points':>12}{'tests':>10}{'seconds':>9}"]
    for exercise, verdicts in graded:
        passed = sum(verdict.passed for verdict in verdicts)
        points = f"{points_of(exercise, verdicts):g} of {exercise.points:g}"
        tests, seconds = f"{passed} of {len(verdicts)}", sum(verdict.seconds for verdict in verdicts)
        lines.append(f"{exercise.number:>2}  {exercise.title:<40}{points:>12}{tests:>10}{seconds:>9.1f}")
        if points_of(exercise, verdicts) < round(exercise.points * passed / len(verdicts), 1):
            lines.append("      at most half of the points, as a core test failed")
        lines += [f"      {v.test}{' (core)' if v.core else ''}: {v.why}" for v in verdicts if not v.passed]
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
                           "tests": [{"name": v.test, "core": v.core, "passed": v.passed, "seconds": round(v.seconds, 2),
                                      "why": v.why} for v in verdicts]} for exercise, verdicts in graded]}


def as_junit(graded: Graded) -> bytes:
    """JUnit's XML, which GitLab and Jenkins read. It has no points."""
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
        if path.is_dir() or not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
            parser.error(f"{path} cannot be written")
    if not 1 <= args.seconds <= 3600:
        parser.error("--seconds must be from 1 to 3600")
    student = args.folder.resolve()
    if not student.is_dir():
        sys.exit(f"error: there is no folder {args.folder}")
    if not any((student / place / "adapters.py").is_file() for place in (HERE, ".")):
        sys.exit(f"error: {args.folder} has no {HERE / 'adapters.py'}; it says where the functions are")
    if student == ROOT / HERE:
        sys.exit(f"error: {args.folder} holds the tests; the folder to be graded is {ROOT}")
    exercises = load_exercises()
    rules = rules_of_term(exercises, args.term)
    warn_of_other_rules(student / HERE / "rules.json", rules)
    chosen = [each for each in exercises if not args.exercise or each.number in args.exercise]
    for number in SIGNALS:
        signal.signal(number, stopped)
    folder = Path(tempfile.mkdtemp(prefix="grade_"))
    try:
        graded = grade(student, chosen, rules, folder, args.seconds)
        print(table(graded))
        for path, content in ((args.json, json.dumps({"folder": str(student), "term": args.term} | as_json(graded, rules),
                                                           indent=1).encode()),
                              (args.junit, as_junit(graded))):
            if path:
                path.write_bytes(content)
    finally:
        remove(folder)


def stopped(*_) -> None:
    """Leave, once: tests end and files go on the way."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    sys.exit("stopped; nothing was graded")


def grade(student: Path, chosen: list[Exercise], rules: dict[int, str], folder: Path, seconds: float) -> Graded:
    """The verdicts on the tests of all chosen exercises; each core takes an exercise at a time."""
    import_packages()

    def left_out(place: str, names: list[str]) -> set[str]:
        return {"__pycache__", *((".git", ".venv", "runs") if Path(place) == student else ())}
    try:
        copy = shutil.copytree(student, folder / "student", symlinks=True, ignore=left_out)
        grader, graded = Grader(chosen, rules, folder, seconds), []
    except shutil.Error as error:
        name, _, why = error.args[0][0]
        sys.exit(f"error: {name} cannot be copied: {why}")
    except RecursionError:
        sys.exit(f"error: {student} cannot be copied: its folders are nested too deep")
    except ValueError as error:
        sys.exit(f"error: {error}")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [pool.submit(grader.grade, copy, each) for each in chosen]
        try:
            for n, (each, job) in enumerate(zip(chosen, jobs), 1):
                graded.append((each, job.result()))
                print(f"[{n}/{len(chosen)}] exercise {each.number} is graded", file=sys.stderr, flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            grader.stop()
            raise
    return graded


def warn_of_other_rules(path: Path, rules: dict[int, str]) -> None:
    """Say on stderr if a folder's own rules, which its starter was made with, are others: --term may be forgotten."""
    try:
        own = json.loads(path.read_text(encoding="utf-8"))["rules"] if path.is_file() else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return
    if own is not None and own != {str(number): name for number, name in rules.items()}:
        print(f"warning: {path} has other rules than these tests; is --term the one that its starter was made with?",
              file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
