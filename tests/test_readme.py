"""The three README.md: no longer than agreed, every link leads somewhere, every flag of a command exists."""
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

from evaluate import Arguments
from train import Config

ROOT = Path(__file__).parent.parent
PAGES = {name: (ROOT / name).read_text(encoding="utf-8")
         for name in ("README.md", "tests/README.md", "data/README.md", "tests/course/README.md")}
FENCED = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)


def anchors(text):
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(text):
    """The shell commands of a page, each as a list of words; environment and redirections included."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines]


def flags_of(script):
    """The flags that a script takes."""
    known = {"train.py": Config, "evaluate.py": Arguments}.get(script)
    if known:
        aliases = {alias for field in fields(known) for alias in field.metadata.get("aliases", ())}
        return {f"--{field.name}" for field in fields(known)} | aliases
    source = (ROOT / script).read_text(encoding="utf-8")
    return set(re.findall(r"add_argument\((?:\"-\w\", )?\"(--?\w+)\"", source)) | {"-o"}


def test_the_readme_is_short():
    assert len(PAGES["README.md"].split()) <= 2_200


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    for link in re.findall(r"\]\(([^)]+)\)", PAGES[page]):
        if not link.startswith("https://"):
            file, _, anchor = link.partition("#")
            target = (ROOT / page).parent / file if file else ROOT / page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link


@pytest.mark.parametrize("page", PAGES)
def test_every_flag_of_a_command_exists(page):
    checked = 0
    for words in commands(PAGES[page]):
        script = next((word for word in words if re.fullmatch(r"(\w+/)*\w+\.py", word)), None)
        if script and "pytest" not in words:
            given = {word for word in words[words.index(script):] if re.fullmatch(r"--?[a-z]\w*", word)}
            assert given <= flags_of(script), words
            checked += 1
    assert checked > 2
