"""What takes too long for the tests: kill runs at random moments, train on two launchers, watch a long run.

    python tests/soak.py --kills 20 --ranks 1 2      # killed and resumed runs against one left alone, byte for byte
    python tests/soak.py --agents                    # two launchers of one rank each against one launcher of two ranks
    python tests/soak.py --minutes 60                # memory, open files, threads and processes of a run over time

Every part prints what it saw and ends with status 1 if something was wrong. Linux only: it reads /proc.
"""
import argparse
import ctypes
import faulthandler
import json
import os
import random
import re
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
TINY = {"steps": 6, "save_every": 2, "rollouts_every": 2, "eval_every": 4, "eval_limit": 4, "prompts_per_step": 2,
        "group_size": 4, "max_turns": 3, "code_timeout": 60}
ONE_THREAD = {"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": str(os.cpu_count())}  # or busy machines crawl
# Where a killed process was, by the first function of these that its stack holds.
PLACES = {"_observe": "tool call", "export": "export", "publish": "export", "save_checkpoint": "checkpoint", "update": "update",
          "reference_logps": "reference", "evaluate_policy": "evaluation", "roll_out": "rollout", "log_step": "log",
          "newest_checkpoint": "resume", "load_policy": "load"}


def start(ranks: int, out: Path, *flags: str, launcher: tuple[str, ...] = (), **settings) -> subprocess.Popen:
    """train.py under this file's own `--inside`, in a session of its own; what it prints goes to out.log."""
    arguments = [str(x) for name, value in {"output_dir": out, **settings}.items() for x in (f"--{name}", value)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", *(launcher or ("--standalone",)), f"--nproc_per_node={ranks}"]
    command = [*(torchrun if ranks > 1 or launcher else [sys.executable]), __file__, "--inside", *arguments, *flags]
    with open(f"{out}.log", "a") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, cwd=ROOT,
                                env=os.environ | ONE_THREAD)


def family(pid: int) -> list[int]:
    """A process and all that descend from it."""
    children = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        children.setdefault(int(fields[1]), []).append(int(path.parent.name))
    found = [pid]
    for parent in found:
        found += children.get(parent, [])
    return found


def ranks_of(pid: int) -> list[int]:
    """The processes of a run that train."""
    found = []
    for one in family(pid):
        try:
            command = Path(f"/proc/{one}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        found += [one] * (b"--inside" in command and b"torch.distributed.run" not in command)
    return found


def kill(process: subprocess.Popen, log: Path) -> str:
    """SIGKILL to all processes of a run at once; returns what its first rank was doing."""
    before = log.stat().st_size
    ranks = ranks_of(process.pid)
    for pid in ranks[:1]:
        catches = int(re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())[1], 16)
        if catches >> (signal.SIGUSR1 - 1) & 1:  # it is far enough to tell
            os.kill(pid, signal.SIGUSR1)
            time.sleep(0.02)
    for pid in family(process.pid):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    process.wait()
    stack = set(re.findall(r" in (\w+)", log.read_bytes()[before:].decode(errors="replace")))
    return next((place for name, place in PLACES.items() if name in stack), "start")


def left_by(out: Path) -> dict[str, object]:
    """All files of a run by name, without what the clock, the folder and the number of starts decide."""
    files = {}
    for path in sorted(p for p in out.rglob("*") if p.is_file() and p.name != ".metadata"):  # it holds the folder
        name, data = str(path.relative_to(out)), path.read_bytes()
        if path.suffix == ".jsonl":
            data = [timeless(json.loads(line)) for line in data.splitlines()]
        elif path.name in ("summary.json", "config.json", "manifest.json"):
            data = timeless(json.loads(data))
        files[name] = data
    return files


def timeless(value):
    """A JSON value without times, and without names and checksums of what holds them."""
    if isinstance(value, dict):
        return {key: timeless(v) for key, v in value.items()
                if not re.search("seconds|tokens_per_s|output_dir|resume|^config.json$|^.metadata$", key)}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def end_well(process: subprocess.Popen, out: Path) -> None:
    if process.wait(timeout=900) != 0:
        sys.exit(f"a run failed: {Path(f'{out}.log').read_text()[-4000:]}")


def kill_runs(ranks: int, kills: int, rng: random.Random, folder: Path) -> None:
    """Kill runs again and again, three times of four at a random moment, else while something is half written."""
    begin, alone = time.monotonic(), folder / f"alone-{ranks}"
    process = start(ranks, alone, **TINY)
    while not (alone / "config.json").exists() and process.poll() is None:
        time.sleep(0.05)
    loaded = time.monotonic() - begin
    end_well(process, alone)
    whole, expected, places, runs = time.monotonic() - begin, left_by(alone), Counter(), 0
    while places.total() < kills:
        out, runs = folder / f"killed-{ranks}-{runs}", runs + 1
        for attempt in range(6):
            begun, process = time.monotonic(), start(ranks, out, *["--resume"] * (attempt > 0), **TINY)
            moment = rng.uniform(0.5 * loaded, whole)
            half = rng.choice(["checkpoint-*.tmp", "model.tmp"]) if rng.random() < 0.25 else None
            while process.poll() is None and (not list(out.glob(half)) if half else time.monotonic() - begun < moment):
                time.sleep(0.002)
            if process.poll() is not None:
                break
            places[kill(process, Path(f"{out}.log"))] += 1
        else:
            process = start(ranks, out, "--resume", **TINY)
        end_well(process, out)
        found = left_by(out)
        wrong = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        if wrong:
            sys.exit(f"{out} differs from {alone} in {', '.join(wrong)}")
    print(f"{ranks} rank{'s' * (ranks > 1)}: {places.total()} kills in {runs} runs, all {len(expected)} files as in a run left "
          f"alone; killed in {', '.join(f'{place} {n}' for place, n in places.most_common())}; "
          f"{time.monotonic() - begin:.0f} s", flush=True)


def two_agents(folder: Path) -> None:
    """Two launchers that meet at an address, with a core each, train as one: the metrics and weights of one with two ranks."""
    from safetensors.torch import load_file
    one, two = folder / "one-agent", folder / "two-agents"
    end_well(start(2, one, **TINY), one)
    address = f"127.0.0.1:{random.randint(20_000, 60_000)}"
    meet = ("--nnodes=2", "--rdzv_backend=c10d", f"--rdzv_endpoint={address}", "--rdzv_id=soak")
    agents = [start(1, two, launcher=meet, **TINY) for _ in range(2)]
    for core, process in enumerate(agents):  # so that a rank has one thread, as those of the one launcher
        os.sched_setaffinity(process.pid, {core})
    for process in agents:
        end_well(process, two)
    rows = [[timeless(json.loads(line)) for line in (out / "metrics.jsonl").read_text().splitlines()] for out in (one, two)]
    weights = [load_file(out / "model" / "model.safetensors") for out in (one, two)]
    apart = max((weights[0][name] - weights[1][name]).abs().max().item() for name in weights[0])
    print(f"two agents against one, {len(rows[0])} steps: weights at most {apart:.1e} apart, "
          f"metrics {'equal' if rows[0] == rows[1] else 'not equal'}")
    if apart > 0 or rows[0] != rows[1]:
        sys.exit("two agents trained something else than one")


def of_each(pids: list[int], name: str, unit: int) -> list[int]:
    """A number of the status of processes."""
    status = [Path(f"/proc/{pid}/status").read_text() for pid in pids]
    return [int(re.search(rf"{name}:\s*(\d+)", text)[1]) // unit for text in status]


def watch(minutes: float, ranks: int, folder: Path) -> None:
    """Print what the processes of a run hold, twelve times in all."""
    out = folder / "long"
    process = start(ranks, out, steps=1_000_000, eval_tasks="", save_every=50, rollouts_every=50, lr=1e-12)  # no learning
    print("minutes  steps  MiB of each rank  less what malloc keeps free  open files  threads  processes  files of the run",
          flush=True)
    for n in range(12):
        time.sleep(minutes * 60 / 12)
        if process.poll() is not None:
            sys.exit(f"the run ended by itself: {Path(f'{out}.log').read_text()[-4000:]}")
        mine, everybody = ranks_of(process.pid), family(process.pid)
        memory, threads = of_each(mine, "VmRSS", 1024), of_each(mine, "Threads", 1)
        for pid in mine:
            os.kill(pid, signal.SIGUSR2)
        time.sleep(5)
        trimmed = of_each(mine, "VmRSS", 1024)
        opened = [len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in mine]
        steps = len((out / "metrics.jsonl").read_text().splitlines()) if (out / "metrics.jsonl").exists() else 0
        files = sum(1 for path in out.rglob("*") if "rollouts" not in path.parts)
        print(f"{minutes * (n + 1) / 12:7.1f}  {steps:5}  {memory!s:>16}  {trimmed!s:>27}  {opened!s:>10}  {threads!s:>7}  "
              f"{len(everybody):9}  {files:16}", flush=True)
    os.kill(process.pid, signal.SIGTERM)
    process.wait()
    print(Path(f"{out}.log").read_text().split("stopped ")[-1].splitlines()[0])


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--agents", action="store_true")
    parser.add_argument("--minutes", type=float, default=0)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="soak_"))
    print(f"runs and logs are in {folder}", flush=True)
    for ranks in args.ranks if args.kills else ():
        kill_runs(ranks, args.kills, random.Random(args.seed), folder)
    if args.agents:
        two_agents(folder)
    if args.minutes:
        watch(args.minutes, max(args.ranks), folder)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:
        faulthandler.register(signal.SIGUSR1, all_threads=False)
        if hasattr(ctypes.CDLL(None), "malloc_trim"):  # of glibc, which keeps what was freed between pieces in use
            signal.signal(signal.SIGUSR2, lambda *_: ctypes.CDLL(None).malloc_trim(0))
        sys.argv[:2] = [str(ROOT / "train.py")]
        sys.path[0] = str(ROOT)
        runpy.run_path(sys.argv[0], run_name="__main__")
    else:
        main()
