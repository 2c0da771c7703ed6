"""The paper's claims, measured at laptop size: runs, a table and a figure.

    python data/paper_in_small.py                         # all of it, three seeds
    python data/paper_in_small.py --row no_kl --seeds 1   # one row, one seed: some minutes
    python data/paper_in_small.py --show                  # the table of what is measured so far

It calls train.py and evaluate.py and reads what they write. The commands stand in --out/*.log, and
can be run alone. As many runs stand side by side as there are cores, one process each. What is done
stays in --out: killed, it goes on with the same command.

The start is data/model. Its warm start shows no pair of degradations, and few chains with two hops:
one in twenty about an image, one in forty without. Training is on the files train_* of
data/offline/hard, figures are on its heldout_*: F1 of one sample a task at temperature 1, three of
a task without an image.
"""
import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from zlib import crc32

from PIL import Image, ImageColor, ImageDraw

from make_figures import COLOURS, GREY, INK, PALE, draw_rollout, font, read_rows
from make_hard_tasks import PAIRS
from make_tasks import KINDS

ROOT = Path(__file__).parent.parent
HARD = "data/offline/hard"
CODING, SEARCH = f"{HARD}/train_coding.json", f"{HARD}/train_search.json"
SHARED = ["--corpus", f"sqlite:{HARD}/corpus.sqlite", "--code_reads", "newest"]
# At the default of 1.5e-4 all is learnt within twelve steps, and no two runs differ.
LEARNING = ["--lr", "8e-5"]
SETS = ("coding", "search", "text")
# What each run changes; "times": of the steps of `main`.
RUNS = {
    "main": {"title": "both families, F1, β 0.04, G = 8"},
    "exact": {"title": "reward by exact match", "flags": ["--rewards", "accuracy=0,exact=1"]},
    "single_step": {"title": "single steps, as released", "tasks": f"{HARD}/steps.json",
                    "times": 2.8, "flags": ["--mode", "step"]},  # as many sampled tokens
    "coding_only": {"title": "coding alone", "tasks": CODING, "times": 0.5},
    "search_only": {"title": "search alone", "tasks": SEARCH, "times": 0.5},
    "search_20": {"title": "search alone, 20 questions", "tasks": f"{HARD}/train_search_20.json",
                  "times": 0.5},
    "no_kl": {"title": "β = 0", "flags": ["--beta", "0"]},
    "dr_grpo": {"title": "dr_grpo", "flags": ["--loss", "dr_grpo"]},
    "dapo": {"title": "dapo", "flags": ["--loss", "dapo", "--clip_high", "0.28"]},
    "no_format": {"title": "no format reward", "flags": ["--rewards", "format=0"]},
    "group_4": {"title": "G = 4, 16 prompts",
                "flags": ["--group_size", "4", "--prompts_per_step", "16"]},
    "group_16": {"title": "G = 16, 4 prompts",
                 "flags": ["--group_size", "16", "--prompts_per_step", "4"]},
}
WAYS = {"agent": [], "off": ["--tools", "off"], "direct": ["--ask", "direct"],
        "cot": ["--ask", "cot"], "rag": ["--ask", "rag"]}
# Of Student's t with n - 1 degrees of freedom: the mean of n seeds is known to ± T95 · sd / √n.
T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}
UNDER_WAY = []  # the processes of runs, which end with this one


@dataclass
class Plan:
    """How much is done, and where it goes."""
    out: Path
    steps: int  # of `main`
    workers: int  # runs side by side
    limit: int  # held-out tasks of each set; 0: all
    all_ways: bool  # of asking, for the start and `main`; else with tools only


def train(plan: Plan, run: str, seed: int) -> None:
    """Train one run, unless it is done."""
    spec, folder = RUNS[run], plan.out / f"{run}-{seed}"
    if (folder / "summary.json").exists():
        return
    held_out = ",".join(f"{HARD}/heldout_{name}.json" for name in SETS) if run == "main" else ""
    command = ["train.py", *SHARED, *LEARNING, "--tasks", spec.get("tasks", f"{CODING},{SEARCH}"),
               "--steps", str(max(1, round(plan.steps * spec.get("times", 1)))),
               *spec.get("flags", []),
               "--eval_tasks", held_out, "--eval_every", str(max(1, plan.steps // 5)),
               "--eval_limit", str(plan.limit), "--seed", str(seed), "--output_dir", str(folder),
               "--resume"]
    log = plan.out / f"{run}-{seed}.log"
    call(command, log)
    if not (folder / "summary.json").exists():
        raise RuntimeError(f"{folder} was stopped before its end; see {log}")


def measure(plan: Plan, run: str, seed: int) -> None:
    """Play the held-out tasks; `main` and the start in all ways of asking."""
    model = "data/model" if run == "start" else str(plan.out / f"{run}-{seed}" / "model")
    for way in WAYS if plan.all_ways and run in ("start", "main") else ["agent"]:
        for name in SETS:
            folder = scores_of(plan.out, run, seed, name, way)
            if not (folder / "scores.json").exists():
                call(["evaluate.py", "--model", model, "--data", f"{HARD}/heldout_{name}.json",
                      *SHARED, *WAYS[way], "--temperature", "1", "--seed", str(seed),
                      "--max_turns", "4", "--max_new_tokens", "96", "--max_tokens", "512",
                      "--batch_size", "32", "--output_dir", str(folder),
                      *(["--samples", "3"] if name == "text" else []),  # its tasks are few
                      *(["--limit", str(plan.limit)] if plan.limit else [])],
                     plan.out / f"{run}-{seed}.log")


def scores_of(out: Path, run: str, seed: int, name: str, way: str) -> Path:
    """The folder of one evaluation."""
    return out / "scores" / f"{run}-{seed}" / f"{name}-{way}"


def call(command: list[str], log: Path) -> None:
    """Run a script of ours on one core. Raises RuntimeError with the end of its log."""
    cores = str(os.cpu_count())  # train.py shares the cores as among so many ranks
    environment = os.environ | {"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": cores,
                                "TQDM_DISABLE": "1"}
    with open(log, "a") as file:
        file.write(f"$ python {shlex.join(command)}\n")
        file.flush()
        process = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment,
                                   stdout=file, stderr=subprocess.STDOUT)
        UNDER_WAY.append(process)
        status = process.wait()
        UNDER_WAY.remove(process)
    if status:
        tail = "\n".join(log.read_text().splitlines()[-5:])
        raise RuntimeError(f"python {shlex.join(command)}: status {status}; {log} ends "
                           f"with\n{tail}")


def check_folder(plan: Plan) -> None:
    """Make the folder. Raises ValueError if it holds runs of another length, start, learning rate
    or tasks: one table must not mix them."""
    tasks = b"".join(path.read_bytes() for path in sorted((ROOT / HARD).glob("*.json")))
    settings = {"steps": plan.steps, "limit": plan.limit, "learning": LEARNING,
                "start": crc32((ROOT / "data/model/model.safetensors").read_bytes()),
                "tasks": crc32(tasks)}
    path = plan.out / "settings.json"
    plan.out.mkdir(parents=True, exist_ok=True)
    before = json.loads(path.read_text()) if path.exists() else settings
    if before != settings:
        raise ValueError(f"{plan.out} holds runs of {before}, and these are of {settings}; "
                         "choose another --out")
    path.write_text(json.dumps(settings) + "\n")


def run_all(plan: Plan, jobs: list[tuple[str, int]]) -> None:
    """Train and measure every (run, seed), `plan.workers` of them side by side."""
    began = time.perf_counter()

    def job(run, seed):
        job_began = time.perf_counter()
        if run != "start":
            train(plan, run, seed)
        measure(plan, run, seed)
        return time.perf_counter() - job_began

    with ThreadPoolExecutor(plan.workers) as pool:
        job_of = {pool.submit(job, run, seed): f"{run}, seed {seed}" for run, seed in jobs}
        try:
            for done, future in enumerate(as_completed(job_of), start=1):
                left = (time.perf_counter() - began) / done * (len(jobs) - done)
                print(f"[{done}/{len(jobs)}] {job_of[future]}: {future.result():.0f} s; about "
                      f"{left / 60:.0f} min left; see {plan.out}", flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            while not all(job.done() for job in job_of):  # one may be about to start its process
                for process in list(UNDER_WAY):
                    process.terminate()
                time.sleep(0.1)
            raise


# ---- the table -----------------------------------------------------------------------------------
def figures(out: Path, seeds: list[int], run: str, name: str, split: str, way: str = "agent",
            key: str = "f1") -> list[float]:
    """One figure in percent for each seed that is measured."""
    found = []
    for seed in seeds:
        path = scores_of(out, run, seed, name, way) / "scores.json"
        scores = json.loads(path.read_text()) if path.exists() else {}
        if split in scores:  # with --limit there may be no hard task
            found.append(scores[split][key])
    return found


def shown(values: list[float], sign: str = "") -> str:
    """The mean of the seeds with its 95 % interval, as "61.2 ± 3.4"."""
    if not values:
        return "–"
    text = f"{fmean(values):{sign}.1f}"
    if len(values) > 1:
        text += f" ± {T95[len(values)] * stdev(values) / len(values) ** 0.5:.1f}"
    return text


# (claim, the paper's gain with 7B, set, split). Text: the mean of its four multi-hop benchmarks,
# where its 7B before was asked without tools.
CLAIMS = (
    ("coding, simple", "+4.9", "coding", "simple"),
    ("coding, hard: pairs", "+25.9", "coding", "hard"),
    ("coding, all", "+18.6", "coding", "all"),
    ("search, simple", "+4.4", "search", "simple"),
    ("search, hard: two hops", "+16.2", "search", "hard"),
    ("search, all", "+10.3", "search", "all"),
    ("text, two hops: not trained on", "+29.3", "text", "all"),
)


def table(out: Path, seeds: list[int]) -> str:
    """All rows as markdown."""
    lines = ["| F1 | paper's gain, 7B | before | after | gain | tools off: before, after |",
             "|---|---|---|---|---|---|"]
    for claim, paper, name, split in CLAIMS:
        before, after = (figures(out, seeds, run, name, split) for run in ("start", "main"))
        off = ", ".join(shown(figures(out, seeds, run, name, split, "off"))
                        for run in ("start", "main"))
        gains = [b - a for seed in seeds
                 for a, b in zip(*(figures(out, [seed], run, name, split)
                                   for run in ("start", "main")))]
        lines.append(f"| {claim} | {paper} | {shown(before)} | {shown(after)} | "
                     f"{shown(gains, '+')} | {off} |")
    lines += ["", "| F1 | coding before | after | search before | after | text before | after |",
              "|---|---|---|---|---|---|---|"]
    for way in WAYS:
        cells = [shown(figures(out, seeds, run, name, "all", way))
                 for name in SETS for run in ("start", "main")]
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    lines += ["", "| run | coding F1 | coding hard | search F1 | search hard | search EM | text F1 "
              "| tokens |",
              "|---|---|---|---|---|---|---|---|"]
    for run, spec in RUNS.items():
        cells = [shown(figures(out, seeds, run, *of)) for of in
                 (("coding", "all"), ("coding", "hard"), ("search", "all"), ("search", "hard"))]
        cells.append(shown(figures(out, seeds, run, "search", "all", key="em")))
        cells.append(shown(figures(out, seeds, run, "text", "all")))
        cells.append(sampled_tokens(out, seeds, run))
        lines.append(f"| {run}: {spec['title']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def sampled_tokens(out: Path, seeds: list[int], run: str) -> str:
    """Tokens that a run sampled in training, in thousands."""
    sums = []
    for seed in seeds:
        path = out / f"{run}-{seed}" / "metrics.jsonl"
        if (path.parent / "summary.json").exists():
            sums.append(sum(json.loads(line)["tokens"] for line in path.open()))
    return f"{fmean(sums) / 1000:.0f} k" if sums else "–"


# ---- the figure ----------------------------------------------------------------------------------
CURVES = {  # held-out tasks by their type, as evaluations.jsonl has them
    "coding, simple": KINDS,
    "coding, hard": ["+".join(pair) for pair in PAIRS["heldout"]],
    "search, simple": ["one hop"],
    "search, hard": ["two hops"],
    "text, two hops (not trained on)": ["two hops+text"],
}


def curves(out: Path, seeds: list[int]) -> Image.Image:
    """Held-out exact match of `main` by step: the mean of the seeds, in the band of their range."""
    image = Image.new("RGB", (760, 560), "white")
    left, top, right, bottom = 70, 70, 740, 510
    draw, lines = ImageDraw.Draw(image), []
    runs = [[row for row in read_rows(out / f"main-{seed}" / "evaluations.jsonl")
             if row["tools"] == "on"] for seed in seeds]
    steps = [row["step"] for row in runs[0]]
    last = steps[-1]

    def point(step: int, share: float) -> tuple[float, float]:
        return left + (right - left) * step / last, bottom - (bottom - top) * share

    for percent in range(0, 101, 25):
        draw.line((point(0, percent / 100), point(last, percent / 100)), fill=PALE)
        draw.text((left - 8, point(0, percent / 100)[1]), f"{percent} %", fill=GREY, font=font(15),
                  anchor="rm")
    for (name, types), colour in zip(CURVES.items(), COLOURS):
        types = [each for each in types if each in runs[0][0]["by_type"]]
        if not types:  # with --limit some are missing
            continue
        shares = [[fmean(row["by_type"][each] for each in types) for row in run] for run in runs]
        at_step = list(zip(*shares))
        edges = [point(s, max(v)) for s, v in zip(steps, at_step)]
        edges += reversed([point(s, min(v)) for s, v in zip(steps, at_step)])
        band = Image.new("RGBA", image.size)
        ImageDraw.Draw(band).polygon(edges, fill=ImageColor.getrgb(colour) + (40,))
        image.paste(band, mask=band)
        lines.append(([point(s, fmean(v)) for s, v in zip(steps, at_step)], colour))
        y = 330 + 26 * list(CURVES).index(name)
        draw.text((right - 250, y), name, fill=colour, font=font(16))
    for middle, colour in lines:  # above all bands
        draw.line(middle, fill=colour, width=4, joint="curve")
    for step in steps:
        draw.text((point(step, 0)[0], bottom + 8), str(step), fill=GREY, font=font(15), anchor="mt")
    draw.text((left, 24), f"held-out exact match by step, mean and range of {len(seeds)} seeds",
              fill=INK, font=font(18))
    return image


def composed(out: Path, seed: int) -> tuple[dict, Path] | None:
    """A held-out pair that two programs in a row repaired, and the folder of its images."""
    folder = scores_of(out, "main", seed, "coding", "agent")
    rows = read_rows(folder / "items.jsonl") if folder.exists() else []
    for row in rows:
        codes = [turn for turn in row["turns"] if turn["action"] == "code" and turn.get("ok")]
        if row["split"] == "hard" and row["em"] and len(codes) == 2:
            return row, folder / "items"
    return None


def draw(out: Path, seeds: list[int]) -> Image.Image:
    """The curves, and beside them one rollout of a composed repair."""
    left, found = curves(out, seeds), composed(out, seeds[0])
    parts = [left]
    if found:
        row, folder = found
        parts.append(draw_rollout(row, " + ".join(row["type"]) + ": two repairs in a row", folder,
                                  560))
    sheet = Image.new("RGB", (sum(part.width for part in parts),
                              max(part.height for part in parts)), "white")
    for i, part in enumerate(parts):
        sheet.paste(part, (sum(earlier.width for earlier in parts[:i]), 0))
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.splitlines()[0])
    parser.add_argument("--row", choices=RUNS, action="append", help="only these runs")
    parser.add_argument("--seeds", type=int, default=3, choices=range(1, 6))
    parser.add_argument("--out", type=Path, default=Path("runs/paper"), help="where all goes")
    parser.add_argument("--workers", type=int, default=os.cpu_count(),
                        help="runs side by side; default: the cores")
    parser.add_argument("--steps", type=int, default=60, help="of the run main, to try things out")
    parser.add_argument("--limit", type=int, default=0,
                        help="held-out tasks of each set, to try things out; 0: all")
    parser.add_argument("--show", action="store_true", help="only print the table")
    args = parser.parse_args()
    out, rows = args.out.resolve(), list(dict.fromkeys(args.row or RUNS))  # runs have another cwd
    if args.steps < 1 or args.limit < 0 or args.workers < 1:
        parser.error("--steps and --workers must be at least 1, --limit at least 0")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the runs end, too
    seeds = list(range(args.seeds))
    if not args.show:
        plan = Plan(out, args.steps, args.workers, args.limit, all_ways="main" in rows)
        jobs = [(run, seed) for seed in seeds for run in ("start", *rows)]
        jobs.sort(key=lambda job: job[0] not in ("start", "main"))  # these first, for all seeds
        try:
            check_folder(plan)
            run_all(plan, jobs)
        except (OSError, RuntimeError, ValueError) as error:
            sys.exit(f"error: {error}")
        except KeyboardInterrupt:
            sys.exit("stopped; the same command goes on")
    if args.show and not (out / "settings.json").exists():
        sys.exit(f"error: nothing is measured in {out}; --out says where")
    text = table(out, seeds)
    print(text)
    if not args.show:
        (out / "table.md").write_text(text)
        if "main" in rows:
            draw(out, seeds).save(out / "paper_in_small.png", optimize=True)


if __name__ == "__main__":
    main()
