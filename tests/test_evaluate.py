"""evaluate.py: every published layout loads, every bad row is named, predictions score as
published, the CLI fails well."""
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import run_script
from PIL import Image

from evaluate import compare, evaluate_tasks, load_tasks, rescore, score
from model import load_policy
from rollout import Limits, Tools
from tools import CodeTool, SearchTool

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT.parent / "shared" / "golden"
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(),
                                  reason="the published test data is not beside the project")
SEARCH_ROW = {"id": 1, "question": "Which country?", "answer": "Italy", "image_path": "a.png"}
CODING_ROW = {"id": 1, "question": "What letter?", "answers": ["C", "c"],
              "ori_image_path": "ori.png",
              "processed_image_path": "proc.png", "type": ["dark"], "split": "hard"}


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(rows if isinstance(rows, str) else json.dumps(rows, ensure_ascii=False),
                    encoding="utf-8")
    return path


def picture(path, size=(30, 20)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.radial_gradient("L").resize(size).save(path)
    return str(path.resolve())


# ---------------------------------------------------------------- layouts

def test_mat_search(tmp_path):
    image = picture(tmp_path / "MAT-Search-image" / "a.png")
    assert load_tasks(write(tmp_path / "MAT-Search.json", [SEARCH_ROW])) == [
        {"id": 1, "family": "search", "question": "Which country?", "answers": ["Italy"],
         "image": image, "type": [], "split": "all", "solution": None}]


@pytest.mark.parametrize("kinds, name",
                         [(["dark"], "proc.png"), (["none"], "proc.png"), (["crop"], "ori.png"),
                          (["rotation90", "crop"], "proc.png")])
def test_mat_coding_shows_the_original_for_a_crop_only(tmp_path, kinds, name):
    for file in ("ori.png", "proc.png"):
        picture(tmp_path / "MAT-Coding-image" / file)
    assert load_tasks(write(tmp_path / "MAT-Coding.json", [{**CODING_ROW, "type": kinds}])) == [
        {"id": 1, "family": "coding", "question": "What letter?", "answers": ["C", "c"],
         "image": str((tmp_path / "MAT-Coding-image" / name).resolve()), "type": kinds,
         "split": "hard", "solution": None}]


def test_flashrag_jsonl_is_text_only(tmp_path):
    path = write(tmp_path / "dev.jsonl",
                 '{"id": "dev_0", "question": "Who?", "golden_answers": ["X", "Y"]}\n\n'
                 '{"id": "dev_1", "question": "Où?", "golden_answers": ["Z"]}\n')
    assert load_tasks(path, "2wiki") == [
        {"id": "dev_0", "family": "search", "question": "Who?", "answers": ["X", "Y"],
         "image": None, "type": [], "split": "all", "solution": None},
        {"id": "dev_1", "family": "search", "question": "Où?", "answers": ["Z"], "image": None,
         "type": [], "split": "all", "solution": None}]


def test_training_steps_of_mat(tmp_path):
    image = picture(tmp_path / "rft_images" / "a.png")
    path = write(tmp_path / "rft.json", [
        {"image_path": "a.png", "problem": "Which country?", "solution": "<think> a </think>"},
        {"image_path": "a.png", "problem": "Read it.", "context": "so far", "solution": "<answer>",
         "type": "pre_answer", "gt": "C"}])
    assert load_tasks(path) == [
        {"id": 1, "family": "search", "question": "Which country?", "answers": [], "image": image,
         "type": [], "split": "all", "solution": "<think> a </think>"},
        {"id": 2, "family": "coding", "question": "Read it.\nso far", "answers": ["C"],
         "image": image, "type": ["pre_answer"], "split": "all", "solution": "<answer>"}]


def test_a_chain_that_already_stands_in_the_problem_is_not_repeated(tmp_path):
    picture(tmp_path / "a.png")
    path = write(tmp_path / "t.json",
                 [{"image_path": "a.png", "problem": "Read it. so far", "context": "so far",
                   "solution": "<answer>"}])
    assert load_tasks(path)[0]["question"] == "Read it. so far"


def test_a_family_in_the_row_wins_and_extra_fields_are_ignored(tmp_path):
    picture(tmp_path / "a.png")
    path = write(tmp_path / "t.json",
                 [{**SEARCH_ROW, "family": "coding", "country": "Italy", "split": "heldout"}])
    assert [(t["family"], t["split"], sorted(t)) for t in load_tasks(path)] == [
        ("coding", "heldout",
         ["answers", "family", "id", "image", "question", "solution", "split", "type"])]


def test_the_offline_tasks_load():
    counts = {name: len(load_tasks(ROOT / "data" / "offline" / f"{name}.json"))
              for name in ("train", "heldout", "steps")}
    assert counts == {"train": 384, "heldout": 240, "steps": 928}


def test_the_benchmark_offline_splits_by_family():
    splits = [task["split"]
              for task in load_tasks(ROOT / "data" / "offline" / "heldout.json", "offline")]
    assert (splits.count("coding"), splits.count("search"), len(splits)) == (144, 96, 240)


@needs_golden
def test_published_items_load():
    tasks = load_tasks(GOLDEN / "mat_sample" / "MAT-Coding.json", "mat-coding")
    assert [(t["id"], t["family"], Path(t["image"]).name, t["type"], t["split"])
            for t in tasks] == [
        (12, "coding", "rotation180_1_proc.png", ["rotation180"], "simple"),
        (63, "coding", "none_2_proc.png", ["none"], "simple"),
        (71, "coding", "rotation90+dark_0_proc.png", ["rotation90", "dark"], "hard"),
        (119, "coding", "crop_8_ori.png", ["crop"], "hard")]
    task, = load_tasks(GOLDEN / "mat_sample" / "MAT-Search.json", "mat-search")
    assert (task["family"], task["answers"],
            Path(task["image"]).name) == ("search", ["Play well."], "annotation2.jpg")


def test_images_are_found_beside_the_file_or_in_the_folder_given(tmp_path):
    path = write(tmp_path / "t.json", [SEARCH_ROW])
    elsewhere = picture(tmp_path / "elsewhere" / "a.png")
    assert load_tasks(path, image_folder=tmp_path / "elsewhere")[0]["image"] == elsewhere
    beside = picture(tmp_path / "a.png")
    assert load_tasks(path)[0]["image"] == beside


@pytest.mark.parametrize("benchmark, num_tasks, expected", [
    ("mat-search", 150, {"simple": 75, "hard": 75}),
    ("mat-coding", 200, {"simple": 70, "hard": 130}),
    ("mat-search", 149, {"all": 149}), ("mat-coding", 150, {"all": 150}),
    ("bamboogle", 150, {"all": 150}), (None, 150, {"all": 150})])
def test_splits_go_by_order_in_a_complete_mat_file_only(tmp_path, benchmark, num_tasks, expected):
    picture(tmp_path / "a.png")
    path = write(tmp_path / "t.json", [{**SEARCH_ROW, "id": i} for i in range(num_tasks)])
    splits = [task["split"] for task in load_tasks(path, benchmark)]
    assert splits == [name for name, count in expected.items() for _ in range(count)]


def test_a_limit_keeps_the_first_tasks_and_their_splits(tmp_path):
    picture(tmp_path / "a.png")
    path = write(tmp_path / "t.json", [{**SEARCH_ROW, "id": i} for i in range(150)])
    assert [(task["id"], task["split"])
            for task in load_tasks(path, "mat-search", limit=76)][74:] == [
        (74, "simple"), (75, "hard")]
    with pytest.raises(ValueError, match="^--limit 0 leaves no task; give at least 1$"):
        load_tasks(path, limit=0)


def test_the_published_empty_gold_is_taken_with_a_benchmark_only(tmp_path):
    picture(tmp_path / "a.png")
    path = write(tmp_path / "t.json", [{**SEARCH_ROW, "answer": ""}])
    assert load_tasks(path, "mat-search")[0]["answers"] == [""]
    with pytest.raises(ValueError) as error:
        load_tasks(path)
    assert str(error.value) == (f"{path}, row 1: answer has an empty text, ['']; "
                                "fill it in or remove the row")


# ---------------------------------------------------------------- bad tasks

@pytest.mark.parametrize("bad, reason", [
    ("text", "is no object but str; write {\"id\": …}"),
    ({"id": 2, "answer": "x", "image_path": "a.png"},
     "question must be a text, got None; add \"question\": \"…\""),
    ({**SEARCH_ROW, "id": 2, "question": " "},
     "question must be a text, got ' '; add \"question\": \"…\""),
    ({"id": 2, "question": "q", "image_path": "a.png"},
     "answers must be one or more texts, got None; "
                                                        "add \"answers\": [\"…\"]"),
    ({**SEARCH_ROW, "id": 2, "answer": 29},
     "answer must be one or more texts, got 29; add \"answer\": [\"…\"]"),
    ({**CODING_ROW, "id": 2, "answers": []},
     "answers must be one or more texts, got []; add \"answers\": [\"…\"]"),
    ({**SEARCH_ROW, "id": 2, "family": "maths"}, "family is 'maths'; take one of search, coding"),
    ({"id": 2, "question": "q", "answer": "x"},
     'has no image_path; add "image_path": "…", or null for a task without an image'),
    ({**SEARCH_ROW, "id": 2, "image_path": "b.png"},
     "image_path 'b.png' is not in {folder}, {folder}/t-image, {folder}/t_images; "
     "put it there or give its folder"),
    ({"problem": "q", "solution": "", "image_path": "a.png"},
     "solution must be a text, got ''; add \"solution\": \"…\""),
    ({"solution": "s", "image_path": "a.png"},
     "problem must be a text, got None; add \"problem\": \"…\""),
    (SEARCH_ROW, "has the id 1 of row 1; give every row its own"),
])
def test_a_bad_row_is_named(tmp_path, bad, reason):
    picture(tmp_path / "a.png")
    path = write(tmp_path / "t.json", [SEARCH_ROW, bad])
    with pytest.raises(ValueError) as error:
        load_tasks(path)
    assert str(error.value) == f"{path}, row 2: " + reason.replace("{folder}", str(tmp_path))


@pytest.mark.parametrize("name, damage", [
    ("a.png", lambda data: b"no image"), ("a.png", lambda data: b""),
    ("a.png", lambda data: data[:len(data) // 2]),
    ("a.png", lambda data: data[:-40] + b"\x00" * 20 + data[-20:]),
    ("a.jpg", lambda data: data[:len(data) // 2])],
    ids=["text", "empty", "half a PNG", "flipped bytes", "half a JPEG"])
def test_a_broken_image_is_named(tmp_path, name, damage):
    picture(tmp_path / name, (300, 200))
    file = tmp_path / name
    file.write_bytes(damage(file.read_bytes()))
    path = write(tmp_path / "t.json", [{**SEARCH_ROW, "image_path": name}])
    with pytest.raises(ValueError) as error:
        load_tasks(path)
    assert str(error.value).startswith(f"{path}, row 1: image {file.resolve()} cannot be read (")
    assert str(error.value).endswith("); replace it or remove the row")


@pytest.mark.parametrize("name, text, reason", [
    ("t.json", "", ": must be a list of rows, got []; write [{…}], or one {…} a line in .jsonl"),
    ("t.json", "[]", ": must be a list of rows, got []; write [{…}], or one {…} a line in .jsonl"),
    ("t.jsonl", "\n \n",
     ": must be a list of rows, got []; write [{…}], or one {…} a line in .jsonl"),
    ("t.json", '{"id": 1}',
     ": must be a list of rows, got {'id': 1}; write [{…}], or one {…} a line in .jsonl"),
    ("t.json", '[\n{"id": 1},\n{"id": }]', ", line 3: not JSON (Expecting value); mend the line"),
    ("t.jsonl", '{"id": 1}\n{"id": }\n', ", line 2: not JSON (Expecting value); mend the line"),
    ("t.json", '[{"id": 1}', ", line 1: not JSON (Expecting ',' delimiter); mend the line"),
])
def test_a_bad_file_is_named(tmp_path, name, text, reason):
    path = write(tmp_path / name, text)
    with pytest.raises(ValueError) as error:
        load_tasks(path)
    assert str(error.value) == f"{path}{reason}"


@pytest.mark.parametrize("data", [b'["\xff"]', b"[" * 200_000],
                         ids=["not UTF-8", "nested too deep"])
def test_a_hostile_file_is_named(tmp_path, data):
    path = tmp_path / "t.json"
    path.write_bytes(data)
    with pytest.raises(ValueError) as error:
        load_tasks(path)
    assert str(error.value).startswith(f"{path}, line 1: not JSON (")


def test_a_byte_order_mark_is_no_error(tmp_path):
    picture(tmp_path / "a.png")
    path = tmp_path / "t.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps([SEARCH_ROW]).encode())
    assert len(load_tasks(path)) == 1


# ---------------------------------------------------------------- scores

def part(f1, em, n, f1_95, em_95):
    return {"f1": f1, "em": em, "n": n, "f1_95": f1_95, "em_95": em_95}


def means(scores):
    return {name: {key: figures[key] for key in ("f1", "em", "n")} for name,
            figures in scores.items() if name != "fair"}


def test_score_is_in_percent_over_all_rows_unanswered_ones_included():
    rows = [{"pred_answer": "red car", "gt": "blue car"},
            {"pred_answer": "dog", "gt": ["cat", "dog"]}, {"pred_answer": None, "gt": "cat"}]
    # all alike: 1 in 27 resamples
    assert score(rows, "hotpotqa") == {"all": part(50.0, 33.33, 3, [0.0, 100.0], [0.0, 100.0])}


def test_score_takes_the_splits_of_the_rows():
    rows = [{"pred_answer": "a1", "gt": "a1", "split": "simple"},
            {"pred_answer": "x", "gt": "y", "split": "hard"},
            {"pred_answer": "x", "gt": "x", "split": "heldout"}]
    assert score(rows) == {"all": part(66.67, 66.67, 3, [0.0, 100.0], [0.0, 100.0]),
                           "simple": part(100.0, 100.0, 1, [100.0, 100.0], [100.0, 100.0]),
                           "hard": part(0.0, 0.0, 1, [0.0, 0.0], [0.0, 0.0])}


def test_offline_tasks_score_by_family():
    rows = [{"pred_answer": "x", "gt": "x", "split": "coding"},
            {"pred_answer": "x", "gt": "y", "split": "search"}]
    assert {name: figures["em"] for name,
            figures in score(rows, "offline").items()} == {"all": 50.0, "coding": 100.0,
                                                           "search": 0.0}


def test_a_failed_task_counts_as_no_answer(tmp_path):
    rows = [{"pred_answer": "x", "gt": "x", "error": None},
            {"pred_answer": "x", "gt": "x", "error": "no connection"},
            {"gt": "x", "error": "no connection"}]
    assert means(score(rows)) == {"all": {"f1": 33.33, "em": 33.33, "n": 3}}
    assert rescore(write(tmp_path / "p.json", rows), "musique") == score(rows)


def test_fair_figures_stand_beside_the_published_ones_where_they_differ_only():
    broken = {"pred_answer": "FOOD DIRECTORY", "gt": [r"FOOD\nDIRECTORY"], "split": "hard"}
    sound = {"pred_answer": "x", "gt": ["x"], "split": "simple"}
    assert "fair" not in score([sound], "mat-coding")
    scores = score([broken, sound], "mat-coding")
    assert (scores["all"]["em"], scores["hard"]["em"],
            list(scores["fair"])) == (50.0, 0.0, ["all", "hard"])
    assert scores["fair"] == {"all": part(100.0, 100.0, 2, [100.0, 100.0], [100.0, 100.0]),
                              "hard": part(100.0, 100.0, 1, [100.0, 100.0], [100.0, 100.0])}


def test_only_mat_coding_counts_characters():
    rows = [{"pred_answer": "网吧", "gt": "网咖"}]
    assert score(rows, "mat-coding")["all"]["f1"] == 50.0
    assert score(rows, "mat-search")["all"]["f1"] == 0.0


@needs_golden
@pytest.mark.parametrize("name, benchmark, expected, fair", [
    ("mat_coding_3b", "mat-coding", {"all": {"f1": 35.9, "em": 22.5, "n": 200},
                                     "simple": {"f1": 49.78, "em": 40.0, "n": 70},
                                     "hard": {"f1": 28.42, "em": 13.08, "n": 130}},
     {"all": {"f1": 38.93, "em": 24.5, "n": 200}, "simple": {"f1": 49.87, "em": 40.0, "n": 70},
      "hard": {"f1": 33.03, "em": 16.15, "n": 130}}),
    ("mat_search_7b", "mat-search", {"all": {"f1": 63.77, "em": 55.33, "n": 150},
                                     "simple": {"f1": 71.78, "em": 66.67, "n": 75},
                                     "hard": {"f1": 55.77, "em": 44.0, "n": 75}}, {}),
])
def test_published_predictions_rescore_to_the_published_figures(name, benchmark, expected, fair):
    scores = rescore(GOLDEN / f"{name}.json", benchmark)
    assert means(scores) == expected
    assert means(scores.get("fair", {})) == fair
    em, n = expected["all"]["em"], expected["all"]["n"]
    half = 1.96 * (em * (100 - em) / n) ** 0.5  # of the normal interval
    assert scores["all"]["em_95"] == pytest.approx([em - half, em + half], abs=1)


@pytest.mark.parametrize("bad, reason", [
    (3, "is no object but int; write {\"id\": …}"),
    ({"gt": "x"}, "pred_answer must be a text, or null for no answer, got None; add it"),
    ({"gt": "x", "pred_answer": 29},
     "pred_answer must be a text, or null for no answer, got 29; add it"),
    ({"pred_answer": "x"}, "gt must be one or more texts, got None; add \"gt\": [\"…\"]"),
    ({"pred_answer": "x", "gt": []}, "gt must be one or more texts, got []; add \"gt\": [\"…\"]"),
    ({"pred_answer": "x", "gt": ["a", 1]},
     "gt must be one or more texts, got ['a', 1]; add \"gt\": [\"…\"]"),
    ({"id": "p", "pred_answer": "x", "gt": "x"}, "has the id 'p' of row 1; give every row its own"),
])
def test_a_bad_prediction_is_named(tmp_path, bad, reason):
    path = write(tmp_path / "p.json", [{"id": "p", "pred_answer": None, "gt": "x"}, bad])
    with pytest.raises(ValueError) as error:
        rescore(path, "mat-search")
    assert str(error.value) == f"{path}, row 2: {reason}"


# ---------------------------------------------------------------- intervals, comparisons

def coin_rows(hits):
    """One row an item, right where hits says so."""
    return [{"id": n, "pred_answer": "x" if hit else "z", "gt": ["x"]} for n,
            hit in enumerate(hits)]


def test_the_interval_of_a_share_is_the_analytic_one():
    figures = score(coin_rows(np.arange(1000) < 300))["all"]
    half = 100 * 1.96 * (0.3 * 0.7 / 1000) ** 0.5  # normal: 2.84
    # resampled shares are multiples of 0.1
    assert figures["em_95"] == pytest.approx([30 - half, 30 + half], abs=0.3)


def test_the_interval_of_ten_items_is_that_of_the_binomial():
    """The bootstrap of a share is Binomial(10, 0.5) / 10: at most 1 has 1.1 %, at most 2 has 5.5 %;
    so 2 and, mirrored, 8."""
    assert score(coin_rows([1, 0] * 5))["all"]["em_95"] == [20.0, 80.0]


def test_the_interval_of_f1_is_that_of_resampling_the_items_themselves():
    rng = np.random.default_rng(1)
    rows = [{"pred_answer": " ".join("abcdefgh"[:k]), "gt": ["b c"]}
            for k in rng.integers(1, 9, 60)]
    singles = np.array([score([row])["all"]["f1"] for row in rows])
    expected = np.percentile(singles[rng.integers(0, 60, (20_000, 60))].mean(axis=1), [2.5, 97.5])
    assert 5 < expected[1] - expected[0] < 40
    # a tenth of the standard error of 4, 4,000 draws
    assert score(rows)["all"]["f1_95"] == pytest.approx(expected, abs=0.5)


@pytest.mark.thorough
def test_intervals_cover_the_truth_95_times_in_100():
    rng = np.random.default_rng(2)
    intervals = [score(coin_rows(rng.random(100) < 0.4))["all"]["em_95"] for _ in range(400)]
    # 0.95 ± 3 · 0.011, a little less at n = 100
    assert 0.91 < np.mean([low <= 40 <= high for low, high in intervals]) < 0.98


def test_scores_repeat_and_do_not_depend_on_the_order_of_rows():
    rows = coin_rows(np.random.default_rng(3).random(50) < 0.5)
    assert score(rows) == score(rows) == score(rows[::-1])


def test_samples_of_an_item_are_not_counted_as_items():
    rows = coin_rows([1, 0] * 5)
    copies = score([row for row in rows for _ in range(8)])["all"]
    assert (copies["n"], copies["em"], copies["em_95"]) == (80, 50.0, [20.0, 80.0])


def test_rows_with_a_null_id_are_items_of_their_own():
    hits = [True, False] * 20
    assert score([{**row, "id": None} for row in coin_rows(hits)]) == score(coin_rows(hits))


def test_a_split_that_is_no_text_is_named(tmp_path):
    path = write(tmp_path / "p.json", [{"gt": "x", "pred_answer": "x", "split": 3}])
    with pytest.raises(ValueError, match=f"{path}, row 1: split must be a text, got 3"):
        rescore(path, "mat-search")


def test_a_comparison_pairs_the_items(tmp_path):
    """B is right where A is, and on 10 of 100 items more: unpaired intervals would overlap."""
    hits = np.arange(100) < 50
    a, b = (write(tmp_path / name, coin_rows(h)) for name,
            h in (("a.json", hits), ("b.json", hits | (np.arange(100) >= 90))))
    for first, second, sign in ((a, b, 1), (b, a, -1)):
        figures = compare(first, second, "2wiki")["all"]
        assert (figures["f1"], figures["em"], figures["n"]) == (sign * 10.0, sign * 10.0, 100)
        # quantiles of Binomial(100, 0.1)
        assert sorted(np.abs(figures["em_95"])) == pytest.approx([5, 16], abs=1.1)
    assert compare(a, a, "2wiki") == {"all": part(0.0, 0.0, 100, [0.0, 0.0], [0.0, 0.0])}


def test_a_comparison_goes_by_split_and_tells_what_fair_scoring_changes(tmp_path):
    a = [{"id": 1, "gt": [r"a1\nb"], "pred_answer": None}, {"id": 2, "gt": "c", "pred_answer": "c"}]
    b = [{"id": 1, "gt": r"a1\nb", "pred_answer": "a1 b", "split": "hard"},
         {"gt": ["c"], "pred_answer": "d", "split": "simple"}]
    scores = compare(write(tmp_path / "a.json", a), write(tmp_path / "b.json", b), "mat-coding")
    assert {name: figures["em"] for name, figures in scores.items() if name != "fair"} == {
        "all": -50.0, "simple": -100.0, "hard": 0.0}
    assert {name: figures["em"] for name,
            figures in scores["fair"].items()} == {"all": 0.0, "hard": 100.0}


@pytest.mark.parametrize("change, reason", [
    (lambda rows: rows[1].update(id=7), "row 2: id is 1 in {a} and 7 in {b}; "),
    (lambda rows: rows[1].update(gt=["y"]), "row 2: gt is ['x'] in {a} and ['y'] in {b}; "),
    (lambda rows: rows.reverse(), "row 1: id is 0 in {a} and 2 in {b}; "),
    (lambda rows: rows.pop(), "{a} has 3 rows and {b} 2; "),
    (lambda rows: rows[2].pop("gt"),
     "{b}, row 3: gt must be one or more texts, got None; add \"gt\": [\"…\"]"),
])
def test_predictions_of_other_items_are_not_compared(tmp_path, change, reason):
    rows = coin_rows([1, 0, 1])
    a = write(tmp_path / "a.json", rows)
    change(rows)
    b = write(tmp_path / "b.json", rows)
    with pytest.raises(ValueError) as error:
        compare(a, b, "2wiki")
    way_out = "compare predictions of the same items in one order" if reason.endswith("; ") else ""
    assert str(error.value) == reason.format(a=a, b=b) + way_out


# ---------------------------------------------------------------- rollouts

def test_evaluate_tasks_plays_all_tasks_in_order_with_live_tools(tmp_path):
    """The shipped model, greedily: the same answers for any batch size, and a file that rescores to
    the same figures."""
    policy = load_policy(str(ROOT / "data" / "model"))
    # one of each kind, 4 of search
    tasks = load_tasks(ROOT / "data" / "offline" / "heldout.json")[::25]
    with CodeTool(workers=1) as code:
        tools = Tools(code, SearchTool(f"sqlite:{ROOT}/data/offline/corpus.sqlite"))
        scores, answers = [], []
        for batch_size in (3, 10):
            out = tmp_path / str(batch_size)
            scores.append(evaluate_tasks(policy, tasks, tools, Limits(4, 96, 512),
                                         batch_size=batch_size, output_dir=out))
            answers.append(json.loads((out / "predictions.json").read_text()))
    assert answers[0] == answers[1] and scores[0]["all"] == scores[1]["all"]
    assert [(row["id"], row["gt"])
            for row in answers[0]] == [(task["id"], task["answers"]) for task in tasks]
    # imperfect, as it is meant to be
    assert 0 < scores[0]["all"]["em"] < 100 and scores[0]["all"]["n"] == 10
    assert rescore(tmp_path / "10" / "predictions.json", "mat-search")["all"] == scores[0]["all"]
    assert scores[0]["tools"]["calls"] >= 5 and scores[0]["failed"] == 0
    assert sum(scores[0]["stops"].values()) == 10


@pytest.mark.parametrize("benchmark, name, num_tasks", [
    pytest.param("mat-coding", "MAT-Coding.json", 4, marks=pytest.mark.thorough), ("mat-search", "MAT-Search.json", 1)])
def test_published_items_run_at_full_resolution(golden, tmp_path, benchmark, name, num_tasks):
    done = run_script("evaluate.py", "--model", ROOT / "data" / "model", "--tasks",
                      golden / "mat_sample" / name,
                      "--benchmark", benchmark, "--max_new_tokens", 96, "--max_tokens", 4096,
                      "--output_dir", tmp_path)
    assert done.returncode == 0, done.stderr
    # the figures themselves may be 0
    assert json.loads(done.stdout.splitlines()[-1])["all"]["n"] == num_tasks
    assert len(json.loads((tmp_path / "predictions.json").read_text())) == num_tasks


# ---------------------------------------------------------------- command line

def run(*args):
    return run_script("evaluate.py", *args)


@pytest.mark.thorough
def test_rescoring_20000_predictions_ends_with_one_json_object(tmp_path):
    words = "the president of a small republic in South America, elected 1999".split()
    rows = [{"id": i, "pred_answer": " ".join(words[i % 7:] + [str(i)]), "split": "all",
             "gt": [" ".join(words[i % 5:]), " ".join(words[i % 7:] + [str(i + i % 2)])]}
            for i in range(20_000)]
    path = write(tmp_path / "p.json", rows)
    start = time.perf_counter()
    result = subprocess.run([sys.executable, "evaluate.py", "--rescore", path, "--benchmark",
                             "2wiki"], cwd=ROOT,
                            capture_output=True, text=True)
    seconds = time.perf_counter() - start
    assert (result.returncode, result.stderr) == (0, "")
    scores = json.loads(result.stdout.splitlines()[-1])
    assert scores["all"]["em_95"][0] < scores["all"]["em"] == 50.0 < scores["all"]["em_95"][1]
    assert seconds < 10  # 1.3 s on a quiet core


def test_the_table_has_the_intervals_and_the_fair_rows(tmp_path):
    rows = [{"pred_answer": "FOOD DIRECTORY", "gt": [r"FOOD\nDIRECTORY"]}]
    a, b = write(tmp_path / "a.json",
                 [{**rows[0], "pred_answer": None}]), write(tmp_path / "b.json", rows)
    for args, sign in ((("--rescore", b), ""), (("--compare", a, b), "+")):
        *table, last = run(*args, "--benchmark", "mat-coding").stdout.splitlines()
        assert [line.replace(",", " ").split() for line in table] == [
            ["split", "F1", "%", "95", "%", "EM", "%", "95", "%", "n"],
            ["all", *[f"{sign}0.00"] * 6, "1"], ["fair", "all", *[f"{sign}100.00"] * 6, "1"]]
        assert list(json.loads(last)) == ["all", "fair"]


def test_rescoring_does_not_load_torch(tmp_path):
    path = write(tmp_path / "p.json", [{"pred_answer": "x", "gt": "x"}])
    code = ("import sys, evaluate; "
            f"evaluate.main(['--rescore', {str(path)!r}, '--benchmark', '2wiki']); "
            "print('torch' in sys.modules)")
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                            check=True)
    assert result.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize("args, message", [
    ([], "give --model and --tasks; or --rescore FILE --benchmark NAME"),
    (["--model", "m", "--tasks", "absent.json"],
     "absent.json: no such file; give the path of a .json or .jsonl file"),
    (["--rescore", "p.json"],
     "--rescore and --compare need --benchmark, as benchmarks score differently; "
     "add --benchmark NAME"),
    (["--compare", "a.json", "b.json"],
     "--rescore and --compare need --benchmark, as benchmarks score differently; "
     "add --benchmark NAME"),
    (["--compare", "a.json", "--benchmark", "2wiki"],
     "--compare takes two files, got 1; write --compare A.json B.json"),
    (["--rescore", "absent.json", "--benchmark", "2wiki"],
     "absent.json: no such file; give the path of a .json or .jsonl file"),
    (["--nonsense", "1"], "no such flag: --nonsense 1; --help lists them"),
    (["--model", "m", "--tasks", "t.json", "--max_turns", "0"],
     "--max_turns 0: must be at least 1"),
    (["--model", "m", "--tasks", "t.json", "--released_context", "True", "--code_reads", "newest"],
     "the released ways know the task's image alone; leave out --code_reads newest"),
    (["--model", "m", "--tasks", "t.json", "--released_crop", "True", "--code_reads", "newest"],
     "the released ways know the task's image alone; leave out --code_reads newest"),
    (["--model", "m", "--tasks", "t.json", "--temperature", "nan"],
     "--temperature nan: must be from 0 to 1e6"),
    (["--model", "m", "--tasks", "t.json", "--seed", "12345678901234567890"],
     "--seed 12345678901234567890: must be at least 0 and below 2^32"),
    (["--model", "m", "--tasks", "t.json", "--api_patience", "0"],
     "--api_patience 0.0: must be at least 1"),
])
def test_what_the_user_can_mend_is_one_line_and_exit_code_2(args, message):
    result = run(*args)
    assert (result.returncode, result.stdout, result.stderr) == (2, "", f"error: {message}\n")


def test_a_bad_prediction_ends_the_command_with_its_row(tmp_path):
    path = write(tmp_path / "p.jsonl", '{"pred_answer": "x", "gt": "x"}\n{"pred_answer": "x"}\n')
    result = run("--rescore", path, "--benchmark", "musique")
    assert (result.returncode, result.stderr) == (
        2, f"error: {path}, row 2: gt must be one or more texts, got None; add \"gt\": [\"…\"]\n")


def test_an_unknown_benchmark_is_refused():
    result = run("--rescore", "p.json", "--benchmark", "mat")
    assert result.returncode == 2
    assert "invalid choice: 'mat'" in result.stderr and "Traceback" not in result.stderr
