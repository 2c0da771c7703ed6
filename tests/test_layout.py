"""The shape of the code: which files there are, who may import whom, how much there is to read.

Only the project's own files are looked at: a virtual environment in its folder is somebody else's.
"""
import ast
import io
import re
import subprocess
import sys
import tokenize
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ORDER = ["tools", "reward", "grpo", "model", "rollout", "data", "evaluate", "train"]  # a file imports files before it
SCRIPTS = [name for name in ORDER if name != "data"]  # the seven; `data` is the package beside them
GROUND = {"tools", "reward", "grpo"}  # text, tensors, floats: none imports another
# Of data/: what each may import of ours.
PACKAGE = {"files": set(), "flags": set(), "tasks": {"data", "tools"}, "steps": {"data", "reward", "tools"},
           "similarity": set(), "plan": {"data", "model", "rollout", "tools"}, "report": {"data", "tools"},
           "endpoint": {"tools", "rollout"}, "model_files": set(), "checkpoints": {"data", "model"}}
BELOW = {"model": ["data.model_files"]}  # of data/, what stands below the file that imports it
FORBIDDEN = {("rollout", "reward"), ("tools", "torch")}  # (importer, imported), beyond the order
# What there is to read, however it is broken into lines: code tokens, without comments and docstrings.
CORE, CORE_TOKENS, ALL_TOKENS = ("train", "grpo", "reward", "rollout", "model"), 16_200, 29_950
TOKENS_A_LINE, README_WORDS = 11, 2_200
PACKAGES = {"torch", "transformers", "PIL", "requests", "numpy", "pytest", "tokenizers", "safetensors", "tqdm"}
OPTIONAL = {"cv2"}  # never needed to import a file
WIDTH, TEST_WIDTH = 100, 128
MODULES = [ROOT / f"{name}.py" for name in SCRIPTS] + [ROOT / "data" / f"{name}.py" for name in PACKAGE]
SOURCES = sorted([*ROOT.glob("*.py"), *ROOT.glob("data/*.py"), *ROOT.glob("tests/*.py"),
                  *ROOT.glob("tests/*/*.py")])
OURS = {path.stem for path in SOURCES} | {"data"}


def stem(path):
    return str(path.relative_to(ROOT).with_suffix(""))


def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(node):
    """Top-level names of all modules imported anywhere below a node."""
    names = set()
    for n in ast.walk(node):
        if isinstance(n, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in n.names}
        elif isinstance(n, ast.ImportFrom):
            names.add("." if n.level else n.module.partition(".")[0])
    return names


def calls(node):
    """[(line, dotted name)] of all calls below a node: eval, os.system, torch.no_grad ..."""
    return [(n.lineno, ast.unparse(n.func)) for n in ast.walk(node) if isinstance(n, ast.Call)]


def test_seven_files_stand_at_the_top():
    assert sorted(path.name for path in ROOT.glob("*.py")) == [
        "evaluate.py", "grpo.py", "model.py", "reward.py", "rollout.py", "tools.py", "train.py"]
    packages = [stem(path) for path in SOURCES if path.name == "__init__.py"]
    assert packages == ["data/__init__"]  # an installed package of that name would win otherwise
    assert (ROOT / "data" / "__init__.py").read_text() == ""


def code_lines(path):
    """The number of code tokens of each line that has some."""
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
               tokenize.ENDMARKER}
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docstrings = [node.body[0] for node in ast.walk(tree(path))
                  if isinstance(node, documented) and ast.get_docstring(node)]
    no_code = {line for text in docstrings for line in range(text.lineno, text.end_lineno + 1)}
    found = tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline)
    return Counter(token.start[0] for token in found
                   if token.type not in skipped and token.start[0] not in no_code)


def test_there_is_no_more_to_read_than_agreed():
    """Tokens, as squeezing code into fewer lines would gain nothing."""
    tokens = {name: code_lines(ROOT / f"{name}.py").total() for name in SCRIPTS}
    assert sum(tokens[name] for name in CORE) <= CORE_TOKENS
    assert sum(tokens.values()) <= ALL_TOKENS
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= README_WORDS


@pytest.mark.parametrize("name", SCRIPTS)
def test_lines_are_not_crowded(name):
    lines = code_lines(ROOT / f"{name}.py")
    assert lines.total() / len(lines) <= TOKENS_A_LINE


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_file_imports_only_files_above_it(name):
    names = imported(tree(ROOT / f"{name}.py"))
    parts = [n.module for n in ast.walk(tree(ROOT / f"{name}.py")) if isinstance(n, ast.ImportFrom) and "data." in n.module]
    if parts == BELOW.get(name):
        names -= {"data"}
    assert names & OURS <= set(ORDER[:ORDER.index(name)]) - (GROUND if name in GROUND else set())
    assert {(name, other) for other in names} & FORBIDDEN == set()


@pytest.mark.parametrize("name", PACKAGE)
def test_what_the_package_may_import(name):
    assert imported(tree(ROOT / "data" / f"{name}.py")) & OURS <= PACKAGE[name]


def test_grpo_imports_nothing_of_ours():
    assert imported(tree(ROOT / "grpo.py")) & OURS == set()


def test_only_tests_import_train():
    others = [path for path in SOURCES if not path.is_relative_to(ROOT / "tests")]
    assert [stem(path) for path in others if "train" in imported(tree(path))] == []


def test_importing_tools_is_light():
    heavy = "import sys, tools; print(sorted({'torch', 'transformers', 'numpy', 'cv2'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", heavy], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("path", SOURCES, ids=stem)
def test_only_the_agreed_packages_are_imported(path):
    third_party = imported(tree(path)) - set(sys.stdlib_module_names) - OURS
    assert third_party <= PACKAGES | OPTIONAL
    for statement in tree(path).body:  # what every import of the file runs
        assert not isinstance(statement, ast.Import | ast.ImportFrom) or imported(statement) & OPTIONAL == set()


DANGEROUS = re.compile(r"(builtins\.)?(eval|exec|compile|__import__)|os\.(system|popen|exec\w*|spawn\w*)|(c?[pP]ickle|"
                       r"marshal|shelve|dill)\.\w+|subprocess\.getoutput|subprocess\.getstatusoutput")


@pytest.mark.parametrize("path", [p for p in SOURCES if p.parent.name != "tests"], ids=stem)
def test_text_is_never_run_but_in_the_child(path):
    assert imported(tree(path)) & {"pickle", "cPickle", "marshal", "shelve", "dill", "joblib"} == set()
    found = [(line, name) for line, name in calls(tree(path)) if DANGEROUS.fullmatch(name)]
    if path == ROOT / "tools.py":
        [child] = [node for node in tree(path).body if isinstance(node, ast.FunctionDef) and node.name == "_run_code"]
        found = [(line, name) for line, name in found if not child.lineno <= line <= child.end_lineno]
        assert {name for _, name in calls(child)} >= {"exec", "compile"}  # or the exception above is out of date
    assert found == []
    shells = [keyword.value for node in ast.walk(tree(path)) if isinstance(node, ast.Call)
              for keyword in node.keywords if keyword.arg == "shell"]
    assert shells == []


@pytest.mark.parametrize("path", SOURCES, ids=stem)
def test_flags_are_written_in_full(path):
    """Or `--step 3` would be `--steps 3`."""
    parsers = [node for node in ast.walk(tree(path)) if isinstance(node, ast.Call)
               and ast.unparse(node.func).rpartition(".")[2] in ("ArgumentParser", "HfArgumentParser")
               and not path.name.startswith("test_")]
    assert [node.lineno for node in parsers if "allow_abbrev=False" not in map(ast.unparse, node.keywords)] == []


@pytest.mark.parametrize("path", MODULES, ids=stem)
def test_files_public_functions_and_classes_say_what_they_do(path):
    module = tree(path)
    assert ast.get_docstring(module)
    silent = [node.name for node in module.body if isinstance(node, ast.FunctionDef | ast.ClassDef)
              and not node.name.startswith("_") and not says_what_it_is(node)]
    assert silent == []


def says_what_it_is(node):
    """A docstring; a record needs none, its fields have types and comments."""
    record = isinstance(node, ast.ClassDef) and all(isinstance(part, ast.AnnAssign) for part in node.body)
    return record or bool(ast.get_docstring(node))


@pytest.mark.parametrize("path", SOURCES, ids=stem)
def test_lines_are_short(path):
    width = TEST_WIDTH if path.is_relative_to(ROOT / "tests") else WIDTH
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [number for number, line in enumerate(lines, start=1) if len(line) > width] == []


@pytest.mark.parametrize("path", SOURCES, ids=stem)
def test_no_path_of_a_machine(path):
    machine = re.compile(r"(?<![\w.)}\]])/(" + "|".join(["home", "root", "work", "tmp", "Users", "mnt"]) + r")\b(?!\w)")
    text = path.read_text(encoding="utf-8")
    assert [text.count("\n", 0, match.start()) + 1 for match in machine.finditer(text)] == []


def test_functions_fit_on_a_page():
    """60 lines at most, docstring included; 90 for the loop, whose visible sequence is the lesson."""
    lines = {(stem(path), node.name): node.end_lineno - node.lineno + 1 for path in MODULES
             for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef)}
    assert lines.pop(("train", "main")) <= 90
    assert [name for name, number in lines.items() if number > 60] == []
