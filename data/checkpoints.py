"""Checkpoints of a training run: whole or not there, checked before one is used.

    save_checkpoint(out, step, policy, optimizer, flags, keep)
    step, folder = newest_checkpoint(out, flags)
    load_checkpoint(folder, policy, optimizer)

OUT/checkpoint-STEP holds weights and moments, each rank's part in a file of its own, the flags of
the run, and the SHA-256 of every file. All ranks call these functions together.
Left out on purpose: random states. A step seeds its own (`train.seed_step`).
"""
import hashlib
import json
import math
import os
import re
import shutil
from itertools import count
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim import Optimizer

from data.files import parse_json, read_json_lines, write_json_lines, write_whole
from model import Policy, gather, is_lead, share_of_rank


def save_checkpoint(out: Path, step: int, policy: Policy, optimizer: Optimizer, flags: dict,
                    keep: int) -> None:
    """Keep the state after `step` updates, unless that is there or is the start.

    It is written beside and renamed. The newest `keep` checkpoints stay.
    """
    final = out / f"checkpoint-{step}"
    beside = final.with_suffix(".tmp")
    if step == 0 or final.exists():
        return
    dcp.save(_state(policy, optimizer), checkpoint_id=beside)  # on the disk when it returns
    if is_lead():
        write_whole(beside / "config.json", json.dumps(flags))
    files = _checksums(beside)
    if is_lead():
        write_whole(beside / "manifest.json", json.dumps(files, indent=1) + "\n")
        beside.rename(final)
        for _, old in checkpoints(out)[:-keep]:
            shutil.rmtree(old.rename(old.with_suffix(".tmp")))  # never in parts under its own name
    dist.barrier()


def load_checkpoint(folder: Path, policy: Policy, optimizer: Optimizer) -> None:
    """Put back what `save_checkpoint` kept, on any number of ranks."""
    state = _state(policy, optimizer)
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(policy.model, optimizer, model_state_dict=state["model"],
                   optim_state_dict=state["optimizer"])


def newest_checkpoint(out: Path, flags: dict) -> tuple[int, Path | None]:
    """(step, folder) of the newest whole checkpoint, or (0, None) if none was written yet.

    What the run wrote later is cut off, to be replayed. Damaged checkpoints are set aside, not
    deleted. Prints which flags have changed. Raises ValueError if all checkpoints are damaged, or
    if the run is one of another model.
    """
    found, damaged = checkpoints(out), []
    while found and (names := damaged_files(found[-1][1])):
        damaged.append(found.pop()[1])
        print(f"{damaged[-1]} is damaged: {', '.join(names)}")
    if damaged and not found:
        raise ValueError(f"no checkpoint in {out} is whole; bring one back, "
                         "or choose another --output_dir")
    step, folder = found[-1] if found else (0, None)
    path = (folder or out) / "config.json"
    before = parse_json(path.read_bytes(), path, 1) if path.exists() else flags
    if not isinstance(before, dict) or "model" not in before:
        raise ValueError(f"{path} holds no flags of a run; bring it back, "
                         "or choose another --output_dir")
    if before["model"] != flags["model"]:
        raise ValueError(f"{out} is a run of --model {before['model']}, where its KL "
                         "starts; give that one")
    said = f"resumes from {folder}" if folder else f"{out} has no checkpoint: starts anew"
    changed = [f"{name} {before.get(name)} -> {value}" for name, value in sorted(flags.items())
               if before.get(name) != value and name not in ("output_dir", "resume")]
    if changed:
        said += f"; changed, so it may be no replay: {', '.join(changed)}"
    print(said, flush=True)
    if is_lead() and path.exists():  # or no run has begun there
        for broken in damaged:
            aside = (broken.with_suffix(f".damaged{n or ''}") for n in count())
            broken.rename(next(path for path in aside if not path.exists()))
        _cut_back(out, step)
    dist.barrier()
    return step, folder


def checkpoints(out: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every checkpoint of a run, oldest first."""
    return sorted((int(path.name[11:]), path) for path in out.glob("checkpoint-*")
                  if re.fullmatch(r"checkpoint-\d+", path.name))


def damaged_files(folder: Path) -> list[str]:
    """Names of the files of a checkpoint that are not as they were written."""
    found = _checksums(folder)
    try:
        wanted = dict(json.loads((folder / "manifest.json").read_text()))
        return sorted({name for name, _ in wanted.items() ^ found.items()})
    except (OSError, ValueError, TypeError):  # no manifest, or one that is no table of names
        return ["manifest.json"]


def _state(policy: Policy, optimizer: Optimizer) -> dict[str, dict]:
    """Weights and moments by name, each rank's part of them."""
    weights, moments = get_state_dict(policy.model, optimizer)
    return {"model": weights, "optimizer": moments}


def _checksums(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file of a checkpoint but its manifest. Ranks share the work."""
    names = os.listdir(folder) if is_lead() and folder.is_dir() else []
    found = {}
    for name in share_of_rank(sorted(set(gather(names)) - {"manifest.json"})):
        try:
            with open(folder / name, "rb") as file:
                found[name] = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:  # a folder, or a disk that cannot read it
            found[name] = str(error)
    return dict(gather([*found.items()]))


def _cut_back(out: Path, step: int) -> None:
    """Bring the folder of a run back to what it was after `step` updates."""
    written = [path for path in (out / "rollouts").glob("step_*") if path.stem[5:].isdigit()]
    later = [path for path in written if int(path.stem[5:]) > step]
    for path in [*later, *out.glob("checkpoint-*.tmp"), *out.glob("model*.tmp")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in (out / "metrics.jsonl", out / "evaluations.jsonl"):
        rows = [row for row in read_json_lines(path) if isinstance(row, dict)]  # or it is not ours
        write_json_lines(path, [row for row in rows if row.get("step", math.inf) <= step])
