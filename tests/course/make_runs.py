"""Exercise 10, find the silent bug: train with five bugs and without one, and write what students get to see.

    python tests/course/make_runs.py OUT --letters 7    # 18 runs of the laptop job, one a core: about 40 minutes on 2

--letters, any number, draws which folder gets which bug.

OUT/runs has a folder for each of `right`, a, b, c, d, e: three seeds, each with its metrics, rollouts and page (report.html).
OUT/answers.md, which stays with the instructor, has the bugs, their lines, and where to look. A run that is done is not done
again; stopped or killed, it goes on with the same command.
"""
import argparse
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from statistics import median
from typing import NamedTuple

from course import ROOT, Wrong, make_reference, replace_once

sys.path.insert(0, str(ROOT / "tests" / "mutants"))
from mutants import MUTANTS  # noqa: E402


class Clue(NamedTuple):
    """What the key says of a bug beside its lines."""
    stage: str  # of train.py's `main`
    tells: str
    rival: str  # another bug that fits at first, and what speaks against it
    experiment: str


# Bugs that a run survives, and that the course's page does not describe.
BUGS = {
    "kl_sign": Clue("update", "`loss` is -β·`kl`, where the right run's is β·`kl`: drift is rewarded",
        "only the logged number has the wrong sign: but at step 2, on equal rollouts, `grad_norm` differs, too",
        "`policy_loss` with advantages 0 and two different policies: the loss must be +β·`kl`; or a run with --beta 1"),
    "same_prompts_each_step": Clue(
        "sample prompts",
        "rollouts: the tasks of step 60 are those of step 1; success in training is as in the right run, and held-out success "
        "10 to 30 points below",
        "a learning rate that is too high: but the tasks' ids are those of step 1",
        "print the ids that `prompts_of_step` gives for two steps"),
    "picture_before_the_code": Clue(
        "roll out: the observation",
        "held-out success *before* training is 20 points lower, but not on search or on signs that need no repair; rollouts: "
        "the image that the code made is right, the answer a guess; later the policy runs its code twice",
        "the task's own image is shown again: but two calls solve the task, so it lags by one",
        "replay a chain; compare the pixels of `rollout.images[-1]` with `encode_image` of the tool's image"),
    "form_is_always_paid": Clue(
        "reward",
        "`reward_format` is exactly 1 from step 1 on, where the right run begins at 0.92, though rollouts show turns without a "
        "thought; those stay",
        "`turn_is_valid` is too lenient, or one valid turn suffices: but a turn without any tag is paid, too",
        "`episode_reward` of the one turn `?`: its format must be 0"),
    "advantages_of_the_neighbour": Clue(
        "advantages",
        "rollouts: of a group, wrong ones have positive advantages and right ones negative; success does not rise, though "
        "`loss` looks right",
        "the sign is turned round: but `grad_norm` differs at step 1, and many samples have the right sign",
        "`group_advantages` of the rewards 1, 0, 0, 0: the positive one must stand in the first place"),
}
OWN = [
    Wrong("same_prompts_each_step", "every step has the prompts of the first one", "train.py",
          "first = step * config.prompts_per_step + dist", "first = dist"),
    Wrong("picture_before_the_code", "the model is shown the picture that the code read, not the one it made", "rollout.py",
          "encode_image(policy, picture) if picture", "encode_image(policy, rollout.pictures[-1]) if picture"),
    Wrong("form_is_always_paid", "an episode's form is paid without a look at it", "reward.py",
          '{"format": float(is_valid),', '{"format": 1.0,'),
    Wrong("advantages_of_the_neighbour", "each sample gets the advantage of its neighbour in the group", "grpo.py",
          "return centred / (std + 1e-4)", "return (centred / (std + 1e-4)).roll(1, dims=1)"),
]
UNDER_WAY = []  # the processes of runs, which end with this one
KEPT = ("metrics.jsonl", "evaluations.jsonl", "summary.json", "config.json", "rollouts", "report.html")


def letters(seed: int) -> dict[str, str]:
    """{folder: bug}, in an order drawn from the seed; "right" has none."""
    names = list(BUGS)
    random.Random(seed).shuffle(names)
    return {"right": "", **dict(zip("abcde", names))}


def known_bugs() -> dict[str, Wrong]:
    """The bugs by their names."""
    return {bug.name: bug for bug in (*MUTANTS, *OWN) if bug.name in BUGS}


def train(bug: Wrong | None, folder: Path, seed: int, flags: list[str]) -> None:
    """One run with a bug, in a copy of the project, and its page; unless it is done."""
    if (folder / "report.html").exists():
        return
    with tempfile.TemporaryDirectory() as place:
        copy, out = Path(place) / "project", Path(place) / folder.parent.name
        make_reference(copy, [], {})
        if bug:
            replace_once(copy, bug.file, bug.old, bug.new)
        # As many runs stand side by side as there are cores: each shares them as among so many ranks.
        environment = os.environ | {"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": str(os.cpu_count())}
        for command in (["train.py", "--seed", str(seed), "--rollouts_every", "10", "--output_dir", str(out), *flags],
                        ["evaluate.py", "--report", str(out)]):
            process = subprocess.Popen([sys.executable, *command], cwd=copy, env=environment, text=True,
                                       stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            UNDER_WAY.append(process)
            said = process.communicate()[1]
            UNDER_WAY.remove(process)
            if process.returncode:
                raise RuntimeError(f"{' '.join(command)}: status {process.returncode}\n{said[-2000:]}")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as beside:  # so that a run is there whole or not at all
            for path in filter(Path.exists, map(out.joinpath, KEPT)):
                target = Path(beside, "run", path.name)
                target.parent.mkdir(exist_ok=True)
                shutil.copytree(path, target) if path.is_dir() else shutil.copy(path, target)
            shutil.rmtree(folder, ignore_errors=True)
            Path(beside, "run").rename(folder)


def write_answers(out: Path, folders: dict[str, str], flags: str) -> None:
    """The key: which folder has which bug, where it stands, and what tells. Ends the script if another one is there."""
    bugs, lines = known_bugs(), ["# Answers", "", f"Flags of train.py beside the defaults: {flags or 'none'}.", ""]
    for folder, name in folders.items():
        if name:
            bug = bugs[name]
            place = (ROOT / bug.file).read_text(encoding="utf-8").partition(bug.old)[0].count("\n") + 1
            lines += [f"- **{folder}**: {name}. {bug.bug[0].upper()}{bug.bug[1:]}. {bug.file}, line {place}:", "", "  ```diff",
                      *(f"  - {line}" for line in bug.old.splitlines()), *(f"  + {line}" for line in bug.new.splitlines()),
                      "  ```", "", f"  Stage: {BUGS[name].stage}. What tells: {BUGS[name].tells}. "
                      f"It might be, too: {BUGS[name].rival}. Experiment, which need not be run: {BUGS[name].experiment}.", ""]
    path, text = out / "answers.md", "\n".join(lines)
    is_begun = (out / "runs").exists() and path.exists()
    if is_begun and not path.read_text(encoding="utf-8").startswith(text):
        sys.exit(f"error: {path} is of another order, other flags or another version of the code; choose another folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        sys.exit(f"error: {path} cannot be written: {error.strerror}")


def add_figures(out: Path, folders: dict[str, str]) -> None:
    """Append to the key what the runs' metrics say: the median over seeds, at the first and at the last step."""
    names = ["success", "success after", "format, first", "loss / (β kl), last", "grad_norm, first", "grad_norm, last"]
    lines = ["# Figures", "", "Medians over seeds. Success is held-out, before and after training.", "",
             "| " + " | ".join(["", *names]) + " |", "|---" * (len(names) + 1) + "|"]
    for folder in folders:
        rows = []
        for run in sorted((out / "runs" / folder).glob("seed*")):
            summary, config = (json.loads((run / name).read_text()) for name in ("summary.json", "config.json"))
            metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            first, last = metrics[0], metrics[-1]
            drift = config["beta"] * last["kl"]
            rows.append([summary.get("success_before"), summary.get("success_after"), first["reward_format"],
                         last["loss"] / drift if drift else None, first["grad_norm"], last["grad_norm"]])
        cells = [[value for value in column if value is not None] for column in zip(*rows)]
        lines.append(f"| {folder} | " + " | ".join(f"{median(cell):.3g}" if cell else "" for cell in cells) + " |")
    path = out / "answers.md"
    text = path.read_text(encoding="utf-8").partition("# Figures")[0]
    path.write_text(text + "\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--letters", type=int, required=True, help="seed of the order of the bugs")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each folder")
    parser.add_argument("--flags", default="", help="more flags of train.py, as one text; for a trial: --steps 2")
    args = parser.parse_args()
    if args.seeds < 1:
        parser.error("--seeds must be at least 1")
    if args.out.resolve().is_relative_to(ROOT):
        parser.error(f"{args.out} is inside the project, whose copies would hold the key; choose a folder outside")
    try:
        flags = shlex.split(args.flags)
    except ValueError as error:
        parser.error(f"--flags {args.flags}: {error}")
    folders, bugs = letters(args.letters), known_bugs()
    runs = [(folder, seed) for seed in range(args.seeds) for folder in folders]
    write_answers(args.out, folders, args.flags)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the runs end, too
    start = time.perf_counter()

    def one_run(folder: str, seed: int) -> str:
        train(bugs.get(folders[folder]), args.out / "runs" / folder / f"seed{seed}", seed, flags)
        return f"{folder}, seed {seed}"

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [pool.submit(one_run, *run) for run in runs]
        try:
            for n, job in enumerate(as_completed(jobs), 1):
                name, seconds = job.result(), time.perf_counter() - start
                print(f"[{n}/{len(runs)}] {name}: {seconds:.0f} s in all, about "
                      f"{seconds / n * (len(runs) - n) / 60:.0f} min left; see {args.out}", flush=True)
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            while not all(job.done() for job in jobs):  # one may be about to start its process
                for process in list(UNDER_WAY):
                    process.terminate()
                time.sleep(0.1)
            if isinstance(error, (OSError, RuntimeError)):
                sys.exit(f"error: {error}")
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                sys.exit("stopped; the same command goes on")
            raise
    add_figures(args.out, folders)


if __name__ == "__main__":
    main()
