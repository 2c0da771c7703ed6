"""Files of tasks and of runs: JSON rows with their place in every error, files that are whole or
not there, the folder of a run.

What a row of a task file means is known to `data/tasks.py`. Left out on purpose: other formats than
JSON.
"""
import ctypes
import fcntl
import json
import math
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def read_rows(path: str | Path) -> list:
    """The rows of a JSON list, or of a .jsonl file with one object a line."""
    if not Path(path).is_file():
        what = "is a folder" if Path(path).is_dir() else "no such file"
        raise ValueError(f"{path}: {what}; give the path of a .json or .jsonl file")
    data, is_jsonl = Path(path).read_bytes(), Path(path).suffix == ".jsonl"
    parts = data.split(b"\n") if is_jsonl else [data]
    values = [parse_json(part, path, line) for line, part in enumerate(parts, start=1)
              if part.strip()]
    rows = values if is_jsonl or not values else values[0]
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{path}: must be a list of rows, got {shown(rows)}; write [{{…}}], "
                         "or one {…} a line in .jsonl")
    return rows


def parse_json(data: bytes, path: str | Path, line: int):
    """The value of some JSON that begins at a line of a file.

    NaN and infinities, which tables write where a value is missing, count as null. Half of a
    surrogate pair, which neither a tokenizer nor a file takes, becomes "?". Raises ValueError
    "file, line N: not JSON (reason); …".
    """
    try:
        return _cleaned(json.loads(data))
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, nested too deep
        line += getattr(error, "lineno", 1) - 1
        reason = getattr(error, "msg", error)
        raise ValueError(f"{path}, line {line}: not JSON ({reason}); mend the line") from None


def _cleaned(value):
    """A value of JSON as `parse_json` returns it."""
    if isinstance(value, list):
        return [_cleaned(item) for item in value]
    if isinstance(value, dict):
        return {_cleaned(key): _cleaned(item) for key, item in value.items()}
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def shown(value) -> str:
    """A value in an error message: its repr, cut after 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


def row_id(row: dict, number: int) -> str | int | float:
    """The id of a row, or its number where it has none.

    Raises ValueError if it is neither a text nor a number.
    """
    found = number if row.get("id") is None else row["id"]
    if isinstance(found, bool) or not isinstance(found, str | int | float):
        raise ValueError(f"id must be a text or a number, got {shown(found)}; "
                         "give every row its own")
    return found


def each_row(path: str | Path, rows: list, read: Callable[[dict, int], object],
             problems: dict[int, ValueError] | None = None) -> list:
    """[read(row, number)], with the place of a bad row in its error. Ids must be distinct.

    Given a dict of problems, bad rows are noted there and left out.
    """
    results, row_of = [], {}
    for number, row in enumerate(rows, start=1):
        try:
            if not isinstance(row, dict):
                raise ValueError(f"is no object but {type(row).__name__}; write {{\"id\": …}}")
            result = read(row, number)
            name = row_id(row, number)
            first = row_of.setdefault((str(name), str(row.get("sample"))), number)
            if first != number:
                raise ValueError(f"has the id {shown(name)} of row {first}; give every row its own")
            results.append(result)
        except ValueError as error:
            if problems is None:
                raise ValueError(f"{path}, row {number}: {error}") from None
            problems[number] = error
    return results


def read_json_lines(path: Path) -> list[dict]:
    """The whole rows of a file; a last one without its line end was cut off by a kill.

    Raises ValueError "file, line N: …".
    """
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [parse_json(line, path, number) for number, line in enumerate(lines, start=1)]


def append_json_line(path: Path, row: dict) -> None:
    """Add a row, on the disk when this returns. NaN and infinities become null."""
    with open(path, "a") as file:
        print(json.dumps(_cleaned(row), allow_nan=False), file=file, flush=True)
        os.fsync(file.fileno())


def append_rows(path: Path, rows: list[dict]) -> None:
    """Add rows, on the disk when this returns. Processes that write to one file take turns."""
    with open(path, "a", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed
        file.write("".join(json.dumps(row) + "\n" for row in rows))
        file.flush()
        os.fsync(file.fileno())


def drop_cut_row(path: Path) -> None:
    """Remove a last row without its line end, which a kill cut off. Makes a missing file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # another process may be in the middle of a row
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)


def write_whole(path: Path, text: str) -> None:
    """Write beside and rename: a reader sees the old text or the new one, never a part."""
    beside = path.with_name(path.name + ".tmp")
    with open(beside, "w", encoding="utf-8") as file:
        print(text, end="", file=file, flush=True)
        os.fsync(file.fileno())
    beside.rename(path)


def write_json_lines(path: Path, rows: list[dict]) -> None:
    """The file anew, whole or not at all, with a row a line."""
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))


def publish(beside: Path, final: Path) -> None:
    """Give a folder its final name once all its files are on the disk, in place of an older one.

    An older one is renamed before it is removed: it is never there in parts under its own name.
    """
    for path in beside.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    if final.exists():
        old = final.rename(final.with_name(f"{final.name}.old.tmp"))
        shutil.rmtree(old)
    beside.rename(final)


PR_SET_PDEATHSIG = 1  # of Linux's prctl
# What runs write to an --output_dir, beside checkpoints and what `holds` looks for.
WRITTEN = {"config.json", "evaluations.jsonl", "items", "model", "predictions.json", "rollouts",
           "scores.json", "summary.json", "usage.jsonl"}


def holds(folder: Path) -> str:
    """What a run would find there, and partly overwrite.

    "a training run", "an evaluation", "files of others", or "" for nothing.
    """
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    try:
        flags = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        flags = None
    flags = flags if isinstance(flags, dict) else {}
    for what, file, name in (("a training run", "metrics.jsonl", "prompts_per_step"),
                             ("an evaluation", "items.jsonl", "benchmark")):
        if file in names or name in flags:
            return what
    has_checkpoint = any(name.startswith("checkpoint-") for name in names)
    return "files of others" if names & WRITTEN or has_checkpoint else ""


@contextmanager
def nothing_left(out: Path) -> Iterator[None]:
    """If the block ends in an error, remove the folders down to `out` that are new and empty."""
    missing = [path for path in (out, *out.parents) if not path.exists()]
    try:
        yield
    except BaseException:
        with suppress(OSError):  # one that is not empty stays, and those above it
            for path in missing:
                path.rmdir()
        raise


def take_folder(out: Path) -> None:
    """Raise ValueError if the folder cannot be written, or another process is at work there.

    The first rank makes it and keeps it locked. The others only see whether they could write there.
    """
    if "RANK" in os.environ and sys.platform == "linux":
        # If torchrun is killed its ranks end too, or the folder would stay taken.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        lead = os.environ.get("RANK", "0") == "0"
        if lead:
            out.mkdir(parents=True, exist_ok=True)
        there = next(path for path in (out, *out.parents) if path.exists())
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"x" * 4096)
        if lead:
            fcntl.flock(os.open(out, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        why = f"it cannot be written ({error})"
        if isinstance(error, BlockingIOError):
            why = "another process is at work there"
        raise ValueError(f"--output_dir {out}: {why}; choose another folder") from None
