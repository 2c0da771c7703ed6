"""Check a benchmark that was downloaded, and write it as one task file.

    python data/prepare.py                          # what to download, and the layout it must have
    python data/prepare.py NAME FOLDER [-o FILE]    # check it, and write one task file

FOLDER is the download, the folder in it that holds the benchmark's file, or that file itself. Rows
and images are read by `load_tasks` of data/tasks.py. What is missing or wrong is named by file,
image and row, and the exit status is 2.

FILE is for `evaluate.py --benchmark NAME --data FILE`, or `train.py --tasks FILE`, where --mode
step takes training steps as they are and --mode episode joins them to whole questions. Its rows
have the keys id, family, question (of a training step: problem and solution), answers, image_path,
type and split. Image paths are relative to FILE where the images lie below its folder, so that the
folder can be moved. Left out on purpose: downloading.
"""
import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from transformers.hf_argparser import string_to_bool

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.files import write_whole  # noqa: E402
from data.tasks import Benchmark, MissingImage, load_tasks  # noqa: E402

MAT, FLASHRAG, OURS = "laolao77/MAT", "RUC-NLPIR/FlashRAG_datasets", "this repository"
MAX_NAMED = 10  # missing images; all are counted


@dataclass(frozen=True)
class Source:
    """Where a set of tasks is published, and in which layout."""
    place: str  # data set on the Hugging Face hub
    file: str
    images: str | None  # folder; None: text only
    counts: tuple[int, ...]  # rows it may have
    families: tuple[str, ...]
    fields: str


SOURCES = {
    "mat-search": Source(MAT, "MAT-Benchmark/MAT-Search.json", "MAT-Benchmark/MAT-Search-image",
                         (150,), ("search",), "id, question, answer, image_path"),
    "mat-coding": Source(MAT, "MAT-Benchmark/MAT-Coding.json", "MAT-Benchmark/MAT-Coding-image",
                         (200,), ("coding",), "id, question, answers, ori_image_path, "
                         "processed_image_path, type, split"),
    "mat-search-train": Source(MAT, "MAT-Training/rft_agent_search_20.json",
                               "MAT-Training/rft_agent_search_20_images", (63,), ("search",),
                               "image_path, problem, solution"),
    "mat-coding-train": Source(MAT, "MAT-Training/rft_agent_code_1_2k.json",
                               "MAT-Training/rft_agent_code_1_2k_images",
                               (3400, 3500),  # by its own README; by a count of someone else's
                               ("coding",), "image_path, problem, context, solution, type, gt"),
    "2wiki": Source(FLASHRAG, "2wikimultihopqa/dev.jsonl", None, (12576,), ("search",),
                    "id, question, golden_answers"),
    "hotpotqa": Source(FLASHRAG, "hotpotqa/dev.jsonl", None, (7405,), ("search",),
                       "id, question, golden_answers"),
    "musique": Source(FLASHRAG, "musique/dev.jsonl", None, (2417,), ("search",),
                      "id, question, golden_answers"),
    "bamboogle": Source(FLASHRAG, "bamboogle/test.jsonl", None, (125,), ("search",),
                        "id, question, golden_answers"),
    "offline": Source(OURS, "data/offline/heldout.json", "data/offline/images", (240,),
                      ("search", "coding"),
                      "id, family, question, answers, image_path or as mat-coding"),
}
NOTES = f"""
    hf download {MAT} --repo-type dataset --local-dir MAT
    hf download {FLASHRAG} {" ".join(s.file for s in SOURCES.values() if s.place == FLASHRAG)} \\
        --repo-type dataset --local-dir FlashRAG
    python data/prepare.py mat-search MAT
    python data/prepare.py 2wiki FlashRAG

Licences: of {MAT}, README badge CC BY-NC 4.0, hub page Apache-2.0: treat as the stricter.
Of {FLASHRAG}, see its hub page and those of the sets in it.
Nothing of either is redistributed here.
"""


def find(folder: str | Path, name: str) -> Path | None:
    """The file or folder `name` of a download; None if it is not there.

    folder: the root of the download, the folder in it that holds `name`, or a file: that one.
    """
    folder = Path(folder)
    places = [folder] if folder.is_file() else [folder / name, folder / Path(name).name]
    return next((place for place in places if place.exists()), None)


def check(name: str, folder: str | Path,
          any_count: bool = False) -> tuple[list[dict], list[str], list[str]]:
    """Read a set from a folder and compare it with what is published.

    Returns its tasks, lines on what was found, and lines on what is wrong (none if all is right).
    """
    source, problems, found, wrong = SOURCES[name], {}, [], []
    path = find(folder, source.file)
    if path is None:
        for part in filter(None, (source.file, source.images)):
            (found if find(folder, part) else wrong).append(
                part + ("" if find(folder, part) else f": not in {folder}"))
        return [], found, wrong
    try:
        tasks = load_tasks(path, name if name in get_args(Benchmark) else None, problems=problems)
    except ValueError as error:  # of the whole file
        return [], found, [str(error)]
    count = len(tasks) + len(problems)
    if any_count or count in source.counts:
        found.append(f"{path}: {count} rows")
    else:
        wrong.append(f"{path}: {count} rows, must be {' or '.join(map(str, source.counts))}; "
                     "download it again, or accept what is there with --any_count True")
    missing = {error.name: None for error in problems.values()
               if isinstance(error, MissingImage)}  # in order, once each
    images = {task["image"] for task in tasks} - {None}
    if images:
        found.append(f"{Path(min(images)).parent}: {len(images)} images")
    if missing:
        wrong.append(f"{path.parent / Path(source.images or source.file).name}: "
                     f"{len(missing)} images missing: "
                     f"{', '.join([*missing][:MAX_NAMED])}"
                     f"{', …' if len(missing) > MAX_NAMED else ''}")
    wrong += [f"{path}, row {row}: {error}" for row, error in problems.items()
              if not isinstance(error, MissingImage)]
    wrong += [f"{path}, id {task['id']!r}: no row of {name}, whose fields are {source.fields}"
              for task in tasks
              if task["family"] not in source.families
              or (task["image"] is None) == bool(source.images)
              or (task["solution"] is None) == name.endswith("-train")]
    return tasks, found, wrong


def write_tasks(path: str | Path, tasks: list[dict]) -> None:
    """Write the tasks to a file; `load_tasks` reads the same tasks back."""
    folder, lines = Path(path).resolve().parent, []
    for task in tasks:
        image = task["image"]
        if image is not None and Path(image).is_relative_to(folder):
            image = str(Path(image).relative_to(folder))
        text = {"question": task["question"]} if task["solution"] is None else {
            "problem": task["question"], "solution": task["solution"]}
        row = {"id": task["id"], "family": task["family"], **text, "answers": task["answers"],
               "image_path": image, "type": task["type"], "split": task["split"]}
        lines.append(json.dumps(row, ensure_ascii=False))
    write_whole(Path(path), "[\n" + ",\n".join(lines) + "\n]\n")


def table() -> str:
    """What to download: the text that is printed without any argument."""
    lines = [f"{'NAME':<18}{'rows':<14}{'from':<30}file; folder of images; fields"]
    for name, source in SOURCES.items():
        counts = " or ".join(map(str, source.counts))
        lines.append(f"{name:<18}{counts:<14}{source.place:<30}{source.file}")
        lines += [f"{'':<62}{text}"
                  for text in (source.images and f"{source.images}/", source.fields) if text]
    return "\n".join(lines) + f"\n{NOTES}"


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns 0, or 2 if the layout is wrong; standard error then says how."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.partition("\n")[0])
    parser.add_argument("name", nargs="?", choices=SOURCES,
                        help="without any argument: print what to download")
    parser.add_argument("folder", nargs="?", help="the download, the folder in it with the "
                        "benchmark's file, or that file")
    parser.add_argument("-o", "--output", help="the task file; by default NAME.tasks.json beside "
                        "the benchmark's file")
    parser.add_argument("--any_count", type=string_to_bool, default=False,
                        help="True: accept any number of rows")
    args = parser.parse_args(argv)
    if args.name is None:
        print(table(), end="")
        return 0
    if args.folder is None:
        parser.error(f"give the folder of {args.name}; "
                     "without any argument this prints what to download")
    try:
        tasks, found, wrong = check(args.name, args.folder, args.any_count)
        for line in found:
            print(f"found  {line}")
        if wrong:
            raise ValueError("\nwrong  ".join([f"{args.folder} is not {args.name} as published",
                                               *wrong]))
        source = find(args.folder, SOURCES[args.name].file)
        output = Path(args.output or source.with_name(f"{args.name}.tasks.json"))
        if output.resolve() == source.resolve():
            raise ValueError(f"-o {output} is the benchmark's own file; choose another")
        write_tasks(output, tasks)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote  {output}: {len(tasks)} tasks")
    return 0


if __name__ == "__main__":
    sys.exit(main())
