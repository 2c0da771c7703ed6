"""Ranks for tests: processes that talk by gloo, forked from this one.

A fork inherits the student's functions, wherever they came from. So this process itself must never join a group: gloo's
threads would be missing in the forks. One rank is a process of its own, too.
"""
import multiprocessing
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

torch.set_num_threads(1)  # a fork does not have the threads of a pool, and would wait for them
LIMIT = 60  # seconds


def on_ranks(size: int, folder: Path, function, *args) -> list:
    """[what function(*args) returned on each rank]. Raises AssertionError with what the first rank that failed said."""
    folder.mkdir()
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=_work, args=(rank, size, folder, function, args)) for rank in range(size)]
    for rank in ranks:
        rank.start()
    ends = time.monotonic() + LIMIT
    while any(rank.exitcode is None for rank in ranks) and time.monotonic() < ends:
        if any(rank.exitcode for rank in ranks):  # the others may wait for it
            ends = min(ends, time.monotonic() + 2)
        time.sleep(0.02)
    for rank in ranks:
        rank.kill()
        rank.join()
    errors = sorted(folder.glob("*.error"), key=lambda path: path.stat().st_mtime)
    said = errors[0].read_text().strip() if errors else ""
    assert not errors, f"a rank of {size} failed: {said.splitlines()[-1]}\n{said}"
    results = [folder / f"{rank}.pt" for rank in range(size)]
    assert all(path.exists() for path in results), f"a rank of {size} did not come to an end within {LIMIT} seconds"
    return [torch.load(path, weights_only=False) for path in results]


def _work(rank, size, folder, function, args):
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=LIMIT))
    try:
        result = function(*args)
    except BaseException:
        (folder / f"{rank}.error").write_text(traceback.format_exc())
        raise SystemExit(1)
    torch.save(result, folder / f"{rank}.tmp")
    (folder / f"{rank}.tmp").rename(folder / f"{rank}.pt")
    dist.barrier()  # the store is here until all have done with it
    dist.destroy_process_group()
