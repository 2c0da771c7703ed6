"""The course: its starter is the project with holes, its grader gives what is due, to submissions of every kind.

    python -m pytest tests/test_course.py
"""
import ast
import json
import os
import re
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COURSE = ROOT / "tests" / "course"
TERM = 7


def run(script, *args, cwd=ROOT):
    """A script of the course, to its end."""
    return subprocess.run([sys.executable, COURSE / script, *map(str, args)], cwd=cwd, capture_output=True, text=True)


@pytest.fixture(scope="module")
def starter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("course") / "starter"
    done = run("make_starter.py", folder)
    assert done.returncode == 0, done.stderr
    return folder


def graded(folder, tmp_path, *args):
    """{number: the exercise's row} of points.json, and what was printed."""
    done = run("grade.py", folder, "--json", tmp_path / "points.json", *args)
    assert done.returncode == 0, done.stderr
    return {row["number"]: row for row in json.loads((tmp_path / "points.json").read_text())["exercises"]}, done.stdout


def submission(starter, tmp_path, body, imports=""):
    """A folder in which exercise 3 is written in a file of the student's own: a body of lines."""
    folder = tmp_path / "submission"
    subprocess.run(["cp", "-r", starter, folder], check=True)
    text = "".join(f"    {line}\n" for line in body.splitlines())
    (folder / "mine.py").write_text(f"import torch\n{imports}\ndef advantages(rewards, loss='grpo'):\n{text}")
    adapters = folder / "tests" / "course" / "adapters.py"
    adapters.write_text(adapters.read_text().replace('("grpo", "group_advantages")', '("mine", "advantages")'))
    return folder


RIGHT = """\
rewards = rewards.float()
if rewards.ndim != 2 or rewards.shape[1] < 2:
    raise ValueError
centred = rewards - rewards.mean(1, keepdim=True)
centred = torch.where((rewards == rewards[:, :1]).all(1, keepdim=True), torch.zeros_like(centred), centred)
return centred if loss == "dr_grpo" else centred / (rewards.std(1, keepdim=True) + 1e-4)
"""


# ---- the starter ---------------------------------------------------------------------------------------------------
def test_a_starter_has_holes_where_the_exercises_are_and_nothing_of_the_solutions(starter, monkeypatch):
    with monkeypatch.context() as patch:  # for this import alone: the folder has a conftest.py, too
        patch.syspath_prepend(str(COURSE))
        from course import load_exercises
    for exercise in load_exercises():
        for file, names in exercise.blanks.items():
            here, there = (ast.parse((folder / file).read_text()) for folder in (ROOT, starter))
            for name in names:
                ours, theirs = (next(node for node in tree.body if getattr(node, "name", None) == name)
                                for tree in (here, there))
                assert ast.unparse(ours.args) == ast.unparse(theirs.args)
                assert ast.get_docstring(ours) == ast.get_docstring(theirs) and len(theirs.body) == 2
                assert ast.unparse(theirs.body[1]) == f"raise NotImplementedError('exercise {exercise.number}')"
            gone = exercise.drops.get(file, [])
            assert not set(gone) & {getattr(node, "name", None) for node in there.body}
    left = {path.name for path in (starter / "tests" / "course").iterdir()}
    assert not [name for name in left if name.startswith("exercise_")] and not left & {"grade.py", "check.py", "course.py"}
    assert [path.name for path in (starter / "tests").iterdir()] == ["course"]
    for page in starter.rglob("*.md"):
        for link in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
            assert "//" in link or (page.parent / link).exists(), f"{page} links to {link}"


def test_the_rest_of_a_starter_imports_and_answers(starter):
    scripts = [path.stem for path in ROOT.glob("*.py")]
    done = subprocess.run([sys.executable, "-c", f"import {', '.join(scripts)}"], cwd=starter, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    done = subprocess.run([sys.executable, "train.py", "--help"], cwd=starter, capture_output=True, text=True)
    assert done.returncode == 0 and "--group_size" in done.stdout


def test_a_folder_that_is_not_empty_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("kept")
    done = run("make_starter.py", tmp_path)
    assert done.returncode == 1 and "not empty" in done.stderr and "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_term_changes_docstring_and_solution_and_says_so(tmp_path):
    for name, flags in (("starter", []), ("solved", ["--solved"])):
        assert run("make_starter.py", tmp_path / name, "--term", TERM, *flags).returncode == 0
    assert (tmp_path / "starter" / "tests" / "course" / "README.md").read_text().count("**This term:**") == 9
    page = (tmp_path / "starter" / "tests" / "course" / "rules.md").read_text()
    assert page.count("\n") >= 9 and "NotImplementedError" not in (tmp_path / "solved" / "grpo.py").read_text()
    doc = {folder: ast.get_docstring(next(node for node in ast.parse((folder / "grpo.py").read_text()).body
                                          if getattr(node, "name", None) == "group_advantages"))
           for folder in (ROOT, tmp_path / "starter", tmp_path / "solved")}
    assert doc[ROOT] != doc[tmp_path / "starter"] == doc[tmp_path / "solved"]


# ---- grading -------------------------------------------------------------------------------------------------------
def test_a_folder_without_adapters_is_refused(tmp_path):
    done = run("grade.py", tmp_path)
    assert done.returncode == 1 and "adapters.py" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.thorough
@pytest.mark.parametrize("place", [".", "no/such/folder/points.json"])
def test_what_cannot_be_written_is_refused_before_the_grading(starter, tmp_path, place):
    done = run("grade.py", starter, "--json", tmp_path / place)
    assert done.returncode == 2 and "cannot be written" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.thorough
def test_a_right_solution_in_a_file_of_its_own_gets_all_points_of_its_exercise(starter, tmp_path):
    rows, text = graded(submission(starter, tmp_path, RIGHT), tmp_path, "--exercise", "3", "--junit", tmp_path / "points.xml")
    assert rows[3]["points"] == rows[3]["of"] == 5 and "5 of 5" in text
    [suite] = ElementTree.parse(tmp_path / "points.xml").getroot()
    assert suite.get("failures") == "0" and int(suite.get("tests")) == len(rows[3]["tests"])


@pytest.mark.thorough
def test_a_body_that_imports_finds_the_files_of_its_own_folder(starter, tmp_path):
    """Or wrong code would be paid for the reference's, and right code would not find its helpers."""
    folder = submission(starter, tmp_path, "from helper import right\nreturn right(rewards, loss)")
    text = "".join(f"    {line}\n" for line in RIGHT.splitlines())
    (folder / "helper.py").write_text(f"import torch\ndef right(rewards, loss):\n{text}")
    rows, text = graded(folder, tmp_path, "--exercise", "3")
    assert rows[3]["points"] == 5, text
    other = tmp_path / "other"
    other.mkdir()
    rows, text = graded(submission(starter, other, "import grpo\nreturn grpo.group_advantages(rewards, loss)"),
                        tmp_path, "--exercise", "3")
    assert rows[3]["points"] == 0 and "NotImplementedError: exercise 3" in text, text


@pytest.mark.thorough
@pytest.mark.parametrize("mistake", ["def broken(:\n", "raise SystemExit(0)\n", "import no_such_package\n"])
def test_a_file_of_another_exercise_that_cannot_be_imported_costs_nothing_here(tmp_path, mistake):
    """rollout.py, with exercise 6, imports tools.py, with exercise 2."""
    folder = tmp_path / "solved"
    assert run("make_starter.py", folder, "--solved").returncode == 0
    (folder / "tools.py").write_text(mistake)
    rows, text = graded(folder, tmp_path, "--exercise", "2", "--exercise", "6")
    assert rows[6]["points"] == rows[6]["of"] and 0 < rows[2]["points"] < rows[2]["of"], text
    assert any("parse_action could not be loaded" in test["why"] for test in rows[2]["tests"]), text


@pytest.mark.thorough
def test_a_helper_that_a_class_calls_is_the_students(tmp_path):
    """_TokenLogps stands in the folder as in the project; what it calls is wrong."""
    folder = tmp_path / "solved"
    assert run("make_starter.py", folder, "--solved").returncode == 0
    text = (folder / "grpo.py").read_text()
    assert text.count("logits.div_(temperature)") == 1
    (folder / "grpo.py").write_text(text.replace("logits.div_(temperature)", "pass"))
    rows, text = graded(folder, tmp_path, "--exercise", "5")
    assert 0 < rows[5]["points"] < rows[5]["of"], text


ODD = {  # name: (number, file, what is written behind its end): honest code that must get all points
    "a type is checked": (6, "rollout.py", """
_parse = parse_action
def parse_action(text):
    action = _parse(text)
    if not isinstance(action, Action):
        raise ValueError(text)
    return action
"""),
    "a slow file of another exercise": (3, "rollout.py", "\nimport time\ntime.sleep(60)\n"),
    "an exit in a file of another exercise": (3, "rollout.py", "\nimport os\nos._exit(0)\n"),
    "another start of processes": (3, "grpo.py", "\nimport multiprocessing\nmultiprocessing.set_start_method('spawn')\n"),
    "a file of its own": (3, "grpo.py", "\nopen('requirements.txt').close()\n"),
    "a file is written": (3, "grpo.py", """
_advantages = group_advantages
def group_advantages(rewards, loss="grpo"):
    open("__init__.py", "a").write(str(rewards))
    return _advantages(rewards, loss)
"""),
    "an import in a backward pass": (5, "grpo.py", """
class _Checked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logps):
        return logps.clone()
    @staticmethod
    def backward(ctx, gradient):
        import helper
        return helper.same(gradient)
_logps = token_logps
def token_logps(*args, **kwargs):
    logps, entropy = _logps(*args, **kwargs)
    return _Checked.apply(logps), entropy
"""),
}


@pytest.mark.thorough
@pytest.mark.parametrize("name", ODD)
def test_odd_but_honest_code_passes(verdicts, name):
    assert verdicts[name] and all(verdict["passed"] for verdict in verdicts[name]), verdicts[name]


@pytest.mark.thorough
def test_with_a_failed_core_test_half_of_the_points_are_left_at_most(starter, tmp_path):
    wrong = RIGHT.replace("keepdim=True) + 1e-4)", "keepdim=True) + 1.0)")
    rows, text = graded(submission(starter, tmp_path, wrong), tmp_path, "--exercise", "3")
    passed = [test["passed"] for test in rows[3]["tests"]]
    assert sum(passed) > len(passed) / 2 and any(test["core"] and not test["passed"] for test in rows[3]["tests"]), text
    assert rows[3]["points"] == 2.5 and "at most half of the points" in text, text


@pytest.mark.thorough
def test_a_term_that_was_forgotten_is_noticed(tmp_path):
    assert run("make_starter.py", tmp_path / "starter", "--term", TERM).returncode == 0
    for term, warned in (([], True), (["--term", TERM], False)):
        done = run("grade.py", tmp_path / "starter", "--exercise", "3", *term)
        assert ("has other rules" in done.stderr) == warned and done.returncode == 0


@pytest.mark.thorough
def test_what_cannot_be_copied_is_named(starter, tmp_path):
    folder = submission(starter, tmp_path, RIGHT)
    os.mkfifo(folder / "odd")
    done = run("grade.py", folder, "--exercise", "3")
    assert done.returncode == 1 and "odd cannot be copied" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.thorough
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_grading_that_is_stopped_leaves_no_process_and_no_file(starter, tmp_path, number):
    begun, temporary = tmp_path / "begun", tmp_path / "tmp"
    temporary.mkdir()
    body = f"open({str(begun)!r}, 'w').write(f'{{os.getpid()}}')\nwhile True: pass"
    folder = submission(starter, tmp_path, body, "import os")
    process = subprocess.Popen([sys.executable, COURSE / "grade.py", folder, "--exercise", "3"], stderr=subprocess.PIPE,
                               text=True, env=os.environ | {"TMPDIR": str(temporary)})
    for _ in range(600):  # until a test calls the student's function
        if begun.exists() and begun.read_text():
            break
        time.sleep(0.1)
    process.send_signal(number)
    assert process.communicate(timeout=30)[1] == "stopped; nothing was graded\n" and process.returncode == 1
    assert list(temporary.iterdir()) == []
    with pytest.raises(ProcessLookupError):
        os.kill(int(begun.read_text()), 0)


BY_ITSELF = "the process ended by itself"
HOSTILE = {  # name: (body, what is imported first, why no test passes)
    "a hang": ("while True: pass", "", "no end within"),
    "sys.exit": ("import sys; sys.exit(0)", "", "SystemExit"),
    "os._exit": ("import os; os._exit(0)", "", BY_ITSELF),
    "an exit when it is imported": ("return rewards", "import os; os._exit(0)", BY_ITSELF),
    "a file that does not parse": ("return (", "", "SyntaxError"),
    "a signal": ("import os, signal; os.killpg(0, signal.SIGKILL)", "", BY_ITSELF),
    "much memory": ("return torch.zeros(4 << 30)", "", "DefaultCPUAllocator"),
    "a skip": ("import pytest; pytest.skip('x')", "", ""),
    "an expected failure": ("import pytest; pytest.xfail('x')", "", ""),
    "an end of pytest": ("import pytest; pytest.exit('x', 0)", "", ""),
    "a million lines": ("print('line\\n' * 1_000_000)", "", ""),
    "edited tests": (
        "import inspect, pathlib\nfor frame in inspect.stack():\n    path = pathlib.Path(frame.filename)\n"
        "    if path.name == 'test_3.py': path.write_text('def test_all(): pass\\n')\nreturn rewards", "",
        "a file of the tests was changed"),
}


# Grades many folders in one process, which imports torch once: {name: verdicts} of the first tests of an exercise.
TOGETHER = """
import json, sys, tempfile
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import grade
from course import load_exercises, rules_of_term
exercises, verdicts = load_exercises(), {}
grade.import_packages()
with tempfile.TemporaryDirectory() as place:
    chosen = [each for each in exercises if each.number in (3, 5, 6)]
    grader = grade.Grader(chosen, rules_of_term(exercises, None), Path(place), seconds=2)
    for name, (folder, number) in json.load(sys.stdin).items():
        grade.PATIENCE_EXERCISE = 5 if name == "a hang" else 60
        tests = list(grader.tests[number].items())
        grader.tests[number] = dict(tests[:{3: 8, 5: 9, 6: 4}[number]])
        verdicts[name] = [verdict._asdict() for verdict in grader.grade(Path(folder), exercises[number - 1])]
print(json.dumps(verdicts))
"""


@pytest.fixture(scope="module")
def verdicts(starter, tmp_path_factory):
    """{name: verdicts on the first tests} of all HOSTILE and ODD folders."""
    place, jobs = tmp_path_factory.mktemp("verdicts"), {}
    assert run("make_starter.py", place / "solved", "--solved").returncode == 0
    for name, (body, imports, _) in HOSTILE.items():
        (place / name).mkdir()
        jobs[name] = str(submission(starter, place / name, body, imports)), 3
    for name, (number, file, text) in ODD.items():
        folder = place / name
        subprocess.run(["cp", "-r", place / "solved", folder], check=True)
        (folder / "helper.py").write_text("def same(x):\n    return x\n")
        (folder / file).write_text((folder / file).read_text() + text)
        jobs[name] = str(folder), number
    before = {path: path.read_bytes() for path in COURSE.iterdir() if path.is_file()}
    done = subprocess.run([sys.executable, "-c", TOGETHER, COURSE], input=json.dumps(jobs), capture_output=True, text=True)
    assert before == {path: path.read_bytes() for path in COURSE.iterdir() if path.is_file()}
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.thorough
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_submission_loses_what_it_touches_and_no_more(verdicts, name):
    why = HOSTILE[name][2]
    reasons = [verdict["why"] for verdict in verdicts[name]]
    if name == "a hang":  # a limit for the exercise, too
        assert reasons[-1] == "was not run: the exercise had had 10 s"
        reasons = [reason for reason in reasons if reason != reasons[-1]]
    assert not any(verdict["passed"] for verdict in verdicts[name])
    assert reasons and all(why in reason for reason in reasons), reasons


def reasons_of(folder):
    """{test: why it failed or was skipped, else ""} of the exercises' tests, run in a folder as a student runs them."""
    report = folder.parent / "report.xml"
    subprocess.run([sys.executable, "-m", "pytest", "-q", "tests/course", f"--junitxml={report}"], cwd=folder,
                   capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    cases = ElementTree.parse(report).getroot().iter("testcase")
    return {case.get("name"): "".join(f"{child.get('message')} {child.text}" for child in case
                                      if child.tag in ("failure", "error", "skipped")) for case in cases}


@pytest.mark.thorough
def test_the_runs_of_exercise_10_end_with_their_script_and_are_not_mixed(tmp_path):
    command = [sys.executable, COURSE / "make_runs.py", tmp_path / "out", "--letters", "3", "--seeds", "1"]
    process = subprocess.Popen([*command, "--flags", "--steps 400 --eval_tasks ''"], stderr=subprocess.PIPE, text=True,
                               env=os.environ | {"TMPDIR": str(tmp_path)})
    for _ in range(600):  # until runs write their metrics
        if list(tmp_path.glob("tmp*/*/metrics.jsonl")):
            break
        time.sleep(0.1)
    process.terminate()
    assert process.communicate(timeout=60)[1].endswith("stopped; the same command goes on\n")
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and not (tmp_path / "out" / "runs").exists()
    (tmp_path / "out" / "runs").mkdir()
    done = run("make_runs.py", tmp_path / "out", "--letters", "3", "--seeds", "1", "--flags", "--steps 2")
    assert done.returncode == 1 and "other flags" in done.stderr


@pytest.mark.thorough
def test_the_key_of_exercise_10_cannot_get_into_a_starter(tmp_path):
    done = run("make_runs.py", ROOT / "RUNS", "--letters", "3")
    assert done.returncode == 2 and "inside the project" in done.stderr and not (ROOT / "RUNS").exists()
    stray = ROOT / "stray-answers.md"
    try:
        stray.touch()
        assert run("make_starter.py", tmp_path / "starter").returncode == 0
    finally:
        stray.unlink()
    there = {path.name for path in (tmp_path / "starter").iterdir()}
    assert there == {path.name for path in ROOT.glob("*.py")} | {"data", "tests", "README.md", "LICENSE", "requirements.txt"}
    assert "make_starter.py --solved" not in (tmp_path / "starter" / "tests" / "course" / "README.md").read_text()


@pytest.mark.thorough
def test_a_file_that_is_not_handed_in_earns_nothing(starter, tmp_path):
    """Or an empty folder would be graded with the reference's functions."""
    (tmp_path / "empty").mkdir()
    subprocess.run(["cp", starter / "tests" / "course" / "adapters.py", tmp_path / "empty"], check=True)
    rows, text = graded(tmp_path / "empty", tmp_path, "--exercise", "3")
    assert rows[3]["points"] == 0 and "No module named 'grpo'" in text, text


@pytest.mark.thorough
def test_every_test_fails_in_the_starter_for_want_of_a_body(starter):
    why = reasons_of(starter)
    assert len(why) > 100 and [name for name in why if "NotImplementedError: exercise" not in why[name]] == []


@pytest.mark.thorough
@pytest.mark.parametrize("term", [None, 1, TERM])
def test_every_test_passes_with_the_solutions_of_a_term_or_says_where_it_runs(tmp_path, term):
    flags = [] if term is None else ["--term", term]
    assert run("make_starter.py", tmp_path / "solved", "--solved", *flags).returncode == 0
    why = reasons_of(tmp_path / "solved")
    left = {name: reason for name, reason in why.items() if reason}
    assert len(why) > 100 and {name: reason for name, reason in left.items() if "another rule this term" not in reason} == {}
    assert not left if term is None else len(left) < 5


@pytest.mark.thorough
def test_a_terms_solution_gets_all_points_and_the_reference_does_not(tmp_path):
    """Exercise 7, too: its tests are run beside the plain loss, whatever rule exercise 4 has."""
    assert run("make_starter.py", tmp_path / "solved", "--term", TERM, "--solved").returncode == 0
    rows, text = graded(tmp_path / "solved", tmp_path, "--term", TERM, "--exercise", "3", "--exercise", "7")
    assert all(row["points"] == row["of"] for row in rows.values()), text
    rows, text = graded(ROOT, tmp_path, "--term", TERM, "--exercise", "3")
    assert rows[3]["points"] < rows[3]["of"], text


@pytest.mark.parametrize("note", sorted((COURSE / "notes").glob("*.md")), ids=lambda path: path.stem)
def test_a_note_links_to_what_is_there_and_quotes_lines_of_the_code(note):
    text = note.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#]+)", text):
        assert link.startswith("https://") or (note.parent / link).exists(), link
    code = {line.strip() for path in ROOT.glob("*.py") for line in path.read_text(encoding="utf-8").splitlines()}
    quoted = "".join(re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)).splitlines()
    quoted += re.findall(r"`((?!python )\w[^`\n]{40,})`", text)
    assert quoted and [line for line in map(str.strip, quoted) if line and line not in code] == []
