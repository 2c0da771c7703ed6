"""Break a copy of the project in one place at a time and see whether the tests that should notice it do.

    python tests/mutants/run.py             # all of mutants.py, as many at a time as there are cores
    python tests/mutants/run.py NAME ...    # some

First the same tests must pass as the code stands. Ends with a line "N killed, M survived"; the exit status is 1 if a mutant
survived or could not be tried. The heavy packages are imported once and inherited: each mutant is a fork of this process.
"""
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mutants import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parent.parent.parent
LIMIT = 150  # seconds; a mutant that does not come to an end is noticed too
IGNORED = shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", ".pytest_cache")


def import_packages() -> None:
    """Import what our code imports, and forget our own modules again: those are imported from the copies."""
    import torch
    own = [str(ROOT), str(ROOT / "data")]
    sys.path[:0] = own
    import make_model  # noqa: F401
    import train  # noqa: F401
    for folder in own:
        sys.path.remove(folder)
    for name in [name for name, module in sys.modules.items() if Path(getattr(module, "__file__", None) or "/").parent in
                 (ROOT, ROOT / "data")]:
        del sys.modules[name]
    torch.set_num_threads(1)


def copy_of(original: Path, name: str) -> Path:
    """A copy beside the original, of hard links: a file is changed by putting another in its place."""
    return shutil.copytree(original, original.parent / name, copy_function=os.link)


def run_tests(copy: Path, tests: list[str]) -> int | None:
    """pytest's exit status for these tests of a copy, or None if they took longer than LIMIT. Their output is in copy/log."""
    process = multiprocessing.get_context("fork").Process(target=_pytest, args=(copy, tests))
    process.start()
    process.join(LIMIT)
    ended = process.exitcode is not None
    if not ended:
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
    return process.exitcode if ended else None


def _pytest(copy, tests):
    os.setsid()
    os.chdir(copy)
    log = os.open("log", os.O_CREAT | os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.dont_write_bytecode = True
    status = pytest.main(["-q", "-x", "--tb=short", "-p", "no:cacheprovider", f"--basetemp={copy / 'temporary'}",
                          "-W", "ignore::pytest.PytestAssertRewriteWarning", *tests])
    sys.stdout.flush()
    os._exit(status)  # without the clean-up of threads that a fork does not have


def try_mutant(mutant: Mutant, original: Path) -> tuple[str, float, str]:
    """(killed | survived | broken, seconds, what the tests said) of one mutant, in a copy of its own."""
    start = time.perf_counter()
    copy = copy_of(original, mutant.name)
    source = (copy / mutant.file).read_text(encoding="utf-8")
    if (count := source.count(mutant.old)) != 1:
        return "broken", 0.0, f"{mutant.file} holds its old text {count} times; it must stand there once:\n{mutant.old}"
    (copy / mutant.file).unlink()
    (copy / mutant.file).write_text(source.replace(mutant.old, mutant.new), encoding="utf-8")
    status = run_tests(copy, mutant.tests)
    # 1: a test failed. Anything else (no such test, a file that does not import, a crash) proves nothing.
    verdict = {0: "survived", 1: "killed", None: "killed"}.get(status, "broken")
    log = (copy / "log").read_text(errors="replace")
    shutil.rmtree(copy)
    return verdict, time.perf_counter() - start, log


def check_unmutated(chosen: list[Mutant], original: Path, pool: ThreadPoolExecutor) -> None:
    """End with the tests' output if one fails as the code stands: then no mutant could be told from none."""
    files = {}
    for test in sorted({test for mutant in chosen for test in mutant.tests}):
        files.setdefault(Path(test.partition("::")[0]).stem, []).append(test)
    copies = [copy_of(original, f"unmutated-{name}") for name in files]
    for copy, status in zip(copies, pool.map(run_tests, copies, files.values())):
        if status != 0:
            log = (copy / "log").read_text(errors="replace")
            sys.exit(f"{log}\nwithout a mutant these tests must pass, and did not (status {status})")


def main(names: list[str]) -> int:
    """Try the named mutants, or all; returns the exit status."""
    if unknown := set(names) - {mutant.name for mutant in MUTANTS}:
        sys.exit(f"no mutant {', '.join(sorted(unknown))}; there are {', '.join(mutant.name for mutant in MUTANTS)}")
    chosen = [mutant for mutant in MUTANTS if not names or mutant.name in names]
    start, verdicts = time.perf_counter(), []
    import_packages()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        original = shutil.copytree(ROOT, Path(folder) / "original", ignore=IGNORED)  # the project may be edited meanwhile
        check_unmutated(chosen, original, pool)
        print(f"without a mutant the tests pass   {time.perf_counter() - start:.0f} s", flush=True)
        for mutant, (verdict, seconds, log) in zip(chosen, pool.map(lambda m: try_mutant(m, original), chosen)):
            verdicts.append(verdict)
            print(f"{verdict:<9}{seconds:>5.1f} s   {mutant.name:<28}{mutant.file:<12}{mutant.bug}", flush=True)
            if verdict != "killed":
                print("\n".join(log.splitlines()[-30:]), flush=True)
    counts = {verdict: verdicts.count(verdict) for verdict in ("killed", "survived", "broken")}
    print(f"{counts['killed']} killed, {counts['survived']} survived" + f", {counts['broken']} broken" * (counts["broken"] > 0)
          + f"   {time.perf_counter() - start:.0f} s")
    return int(counts["killed"] < len(chosen))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
