"""data/prepare.py: samples of every published layout are taken, wrong ones are named, task files read back alike."""
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import run_script
from PIL import Image

from data.tasks import load_tasks
from evaluate import score
from model import load_policy
from prepare import SOURCES, check, table, write_tasks
from rollout import Limits, Tools, roll_out

ROOT = Path(__file__).resolve().parent.parent
SAMPLES = ROOT / "tests" / "layouts"  # made up, in the published layouts
COUNTS = {"mat-search": 3, "mat-coding": 3, "mat-search-train": 2, "mat-coding-train": 3, "2wiki": 2, "hotpotqa": 2,
          "musique": 2, "bamboogle": 2}


def root_of(name):
    return SAMPLES / ("MAT" if name.startswith("mat") else "FlashRAG")


def benchmark_of(name):
    return None if name.endswith("-train") else name


@pytest.fixture
def mat(tmp_path):
    """A copy of the samples of MAT that a test may damage."""
    return Path(shutil.copytree(SAMPLES / "MAT", tmp_path / "MAT"))


def change(path, edit):
    rows = json.loads(path.read_text(encoding="utf-8"))
    edit(rows)
    path.write_text(json.dumps(rows), encoding="utf-8")


def prepare(*args):
    return run_script("data/prepare.py", *args)


# ---------------------------------------------------------------- layouts

def test_there_is_a_sample_of_every_published_layout():
    assert set(COUNTS) == set(SOURCES) - {"offline"}


@pytest.mark.parametrize("name", COUNTS)
def test_a_sample_is_found_by_its_root_its_folder_and_its_file(name):
    file = root_of(name) / SOURCES[name].file
    for place in (root_of(name), file.parent, file):
        tasks, found, wrong = check(name, place, any_count=True)
        assert (len(tasks), wrong) == (COUNTS[name], [])
        assert found[0] == f"{file}: {COUNTS[name]} rows"
        assert {task["family"] for task in tasks} == {"coding" if "coding" in name else "search"}


def test_what_a_model_is_shown_of_the_samples():
    images = {name: [task["image"] for task in check(name, root_of(name), True)[0]] for name in COUNTS}
    assert {name: [image and Path(image).name for image in shown] for name, shown in images.items()} == {
        "mat-search": ["shop.jpg", "shop.jpg", "sign.png"],
        "mat-coding": ["rotation90_0_proc.png", "rotation90+dark_0_proc.png", "crop_0_ori.png"],  # a crop: the original
        "mat-search-train": ["harbour.jpg"] * 2,
        "mat-coding-train": ["rotation90_1_proc.png", "rotation90_1_proc.png", "rotation90_1_ori.png"],
        **{name: [None, None] for name in ("2wiki", "hotpotqa", "musique", "bamboogle")}}


def test_the_offline_tasks_are_complete():
    for place in (ROOT, ROOT / "data" / "offline"):
        tasks, found, wrong = check("offline", place)
        assert (len(tasks), wrong) == (240, [])
        assert found[1] == f"{ROOT / 'data' / 'offline' / 'images'}: 240 images"


def test_published_items_are_taken(golden, tmp_path):
    for name, number in (("mat-coding", 4), ("mat-search", 1)):
        tasks, _, wrong = check(name, golden / "mat_sample", any_count=True)
        assert (len(tasks), wrong) == (number, [])
        write_tasks(tmp_path / "t.json", tasks)
        assert load_tasks(tmp_path / "t.json", name) == tasks


# ---------------------------------------------------------------- wrong layouts

def wrong_of(name, folder, any_count=True):
    """What is wrong, with the folder's name left out."""
    return [line.replace(f"{folder}/", "") for line in check(name, folder, any_count)[2]]


def test_missing_files_are_named_one_by_one(mat, tmp_path):
    assert check("mat-search", tmp_path) == ([], [], [
        f"MAT-Benchmark/MAT-Search.json: not in {tmp_path}", f"MAT-Benchmark/MAT-Search-image: not in {tmp_path}"])
    (mat / "MAT-Benchmark" / "MAT-Search.json").unlink()
    for place in (mat, mat / "MAT-Benchmark"):
        assert check("mat-search", place) == ([], ["MAT-Benchmark/MAT-Search-image"],
                                              [f"MAT-Benchmark/MAT-Search.json: not in {place}"])
    assert check("bamboogle", mat) == ([], [], [f"bamboogle/test.jsonl: not in {mat}"])


def test_a_wrong_number_of_rows_is_named_and_can_be_accepted():
    for name in COUNTS:
        number = " or ".join(map(str, SOURCES[name].counts))
        assert wrong_of(name, root_of(name), any_count=False) == [
            f"{SOURCES[name].file}: {COUNTS[name]} rows, must be {number}; download it again, or accept what is there "
            "with --any_count True"]
        assert wrong_of(name, root_of(name)) == []


def test_a_folder_of_images_that_is_missing(mat):
    shutil.rmtree(mat / "MAT-Benchmark" / "MAT-Search-image")
    assert wrong_of("mat-search", mat) == ["MAT-Benchmark/MAT-Search-image: 2 images missing: shop.jpg, sign.png"]


def test_missing_images_are_all_counted_and_the_first_ten_named(mat):
    file = mat / "MAT-Benchmark" / "MAT-Search.json"
    change(file, lambda rows: rows.extend({**rows[0], "id": n, "image_path": f"{n // 2}.png"} for n in range(10, 34)))
    assert wrong_of("mat-search", mat) == [
        "MAT-Benchmark/MAT-Search-image: 12 images missing: " + ", ".join(f"{n}.png" for n in range(5, 15)) + ", …"]
    assert check("mat-search", mat, True)[1] == [f"{file}: 27 rows", f"{file.parent}/MAT-Search-image: 2 images"]


def test_every_bad_row_is_named(mat):
    def damage(rows):
        rows[0]["answers"] = 5
        rows[1]["id"] = 3
        del rows[2]["question"]
        rows.append("text")

    change(mat / "MAT-Benchmark" / "MAT-Coding.json", damage)
    assert wrong_of("mat-coding", mat) == [
        'MAT-Benchmark/MAT-Coding.json, row 1: answers must be one or more texts, got 5; add "answers": ["…"]',
        'MAT-Benchmark/MAT-Coding.json, row 3: question must be a text, got None; add "question": "…"',
        'MAT-Benchmark/MAT-Coding.json, row 4: is no object but str; write {"id": …}']
    change(mat / "MAT-Benchmark" / "MAT-Coding.json", lambda rows: rows[2].update(question="again"))
    assert wrong_of("mat-coding", mat)[1] == ("MAT-Benchmark/MAT-Coding.json, row 3: has the id 3 of row 2; "
                                              "give every row its own")


def test_a_broken_image_is_a_bad_row(mat):
    (mat / "MAT-Benchmark" / "MAT-Coding-image" / "crop_0_ori.png").write_bytes(b"no image")
    [line] = wrong_of("mat-coding", mat)
    assert re.fullmatch(r"MAT-Benchmark/MAT-Coding.json, row 3: image MAT-Benchmark/MAT-Coding-image/crop_0_ori.png cannot be "
                        r"read \(.*\); replace it or remove the row", line)


@pytest.mark.parametrize("data, reason", [(b"[\n{]", ", line 2: not JSON ("), (b"[]", ": must be a list of rows, got []; ")])
def test_a_file_that_cannot_be_read_is_named(mat, data, reason):
    (mat / "MAT-Benchmark" / "MAT-Search.json").write_bytes(data)
    [line] = wrong_of("mat-search", mat)
    assert line.startswith(f"MAT-Benchmark/MAT-Search.json{reason}")


@pytest.mark.parametrize("name, other", [("mat-search", "mat-coding"), ("mat-coding", "mat-search"), ("2wiki", "mat-search"),
                                         ("mat-search", "mat-search-train"), ("mat-coding", "mat-coding-train")])
def test_the_rows_of_another_set_are_refused(tmp_path, name, other):
    shutil.copytree(root_of(other), tmp_path / "other")
    tasks, _, wrong = check(name, tmp_path / "other" / SOURCES[other].file, any_count=True)
    assert len(tasks) == len(wrong) == COUNTS[other]
    assert wrong[0].endswith(f"id 1: no row of {name}, whose fields are {SOURCES[name].fields}")


# ---------------------------------------------------------------- task files

@pytest.mark.parametrize("name", [*COUNTS, "offline"])
def test_a_task_file_reads_back_as_the_tasks_it_was_written_from(tmp_path, name):
    tasks, _, _ = check(name, ROOT if name == "offline" else root_of(name), any_count=True)
    write_tasks(tmp_path / "t.json", tasks)
    assert load_tasks(tmp_path / "t.json", benchmark_of(name)) == tasks


def test_a_folder_with_its_task_file_can_be_moved(mat):
    assert prepare("mat-coding", mat, "--any_count", True, "-o", mat / "t.json").returncode == 0
    before = load_tasks(mat / "t.json", "mat-coding")
    moved = mat.rename(mat.with_name("moved"))
    after = load_tasks(moved / "t.json", "mat-coding")
    assert [task["image"].replace("/MAT/", "/moved/", 1) for task in before] == [task["image"] for task in after]
    assert Path(after[0]["image"]).parent == moved / "MAT-Benchmark" / "MAT-Coding-image"


def test_the_order_of_a_complete_mat_search_gives_splits_that_survive(tmp_path):
    (tmp_path / "MAT-Search-image").mkdir()
    Image.new("RGB", (28, 28)).save(tmp_path / "MAT-Search-image" / "a.png")
    rows = [{"id": n, "question": "Which?", "answer": "x", "image_path": "a.png"} for n in range(150)]
    (tmp_path / "MAT-Search.json").write_text(json.dumps(rows))
    assert prepare("mat-search", tmp_path).returncode == 0  # as many rows as published: no flag is needed
    for kept, expected in ((150, {"simple": 75, "hard": 75}), (80, {"simple": 75, "hard": 5})):
        tasks = load_tasks(tmp_path / "mat-search.tasks.json", "mat-search", limit=kept)
        scores = score([{"gt": task["answers"], "pred_answer": "x", "split": task["split"]} for task in tasks], "mat-search")
        assert {name: part["n"] for name, part in scores.items()} == {"all": kept, **expected}


def test_prepared_questions_without_an_image_are_played(tmp_path):
    assert prepare("bamboogle", SAMPLES / "FlashRAG", "--any_count", True, "-o", tmp_path / "t.json").returncode == 0
    tasks = load_tasks(tmp_path / "t.json", "bamboogle")
    rollouts, _ = roll_out(load_policy(str(ROOT / "data" / "model")), tasks, Tools(), Limits(2, 16, 256), temperature=0.0)
    assert [(len(r.turns) > 0, r.images) for r in rollouts] == [(True, [])] * 2


# ---------------------------------------------------------------- command line

def test_without_arguments_it_says_what_to_download():
    done = subprocess.run([sys.executable, str(ROOT / "data" / "prepare.py")], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, table())
    for name, source in SOURCES.items():
        line, = re.findall(rf"^{name} .*$", done.stdout, re.MULTILINE)
        assert line.split() == [name, *" or ".join(map(str, source.counts)).split(), *source.place.split(), source.file]
    assert "README badge CC BY-NC 4.0, hub page Apache-2.0: treat as the stricter" in done.stdout


def test_a_good_folder_ends_with_the_file_that_was_written(mat):
    done = prepare("mat-search", mat, "--any_count", "True")
    folder = mat / "MAT-Benchmark"
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (f"found  {folder}/MAT-Search.json: 3 rows\nfound  {folder}/MAT-Search-image: 2 images\n"
                           f"wrote  {folder}/mat-search.tasks.json: 3 tasks\n")
    rows = json.loads((folder / "mat-search.tasks.json").read_text(encoding="utf-8"))
    assert rows[2] == {"id": 3, "family": "search", "question": "Who painted the sign in the picture?", "answers": [""],
                       "image_path": "MAT-Search-image/sign.png", "type": [], "split": "all"}


def test_a_wrong_folder_ends_with_status_2_and_writes_nothing(mat):
    (mat / "MAT-Benchmark" / "MAT-Search-image" / "sign.png").unlink()
    done = prepare("mat-search", mat, "--any_count", "False")
    assert (done.returncode, done.stderr) == (2, (
        f"error: {mat} is not mat-search as published\n"
        f"wrong  {mat}/MAT-Benchmark/MAT-Search.json: 3 rows, must be 150; download it again, or accept what is there with "
        f"--any_count True\nwrong  {mat}/MAT-Benchmark/MAT-Search-image: 1 images missing: sign.png\n"))
    assert not (mat / "MAT-Benchmark" / "mat-search.tasks.json").exists()


def test_other_mistakes_end_with_status_2(mat, tmp_path):
    file = mat / "MAT-Benchmark" / "MAT-Search.json"
    before = file.read_bytes()
    for args, message in (((mat, "-o", file), f"error: -o {file} is the benchmark's own file; choose another\n"),
                          ((mat, "-o", tmp_path / "no" / "t.json"), "No such file or directory"),
                          ((), "give the folder of mat-search")):
        done = prepare("mat-search", *args, "--any_count", "True")
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert file.read_bytes() == before
    assert prepare("mat", mat).returncode == 2
