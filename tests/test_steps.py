"""MAT's training files: their steps train as they are, and joined to whole questions.

    python -m pytest tests/test_steps.py
"""
import json
import random
import re

import pytest
from conftest import ROOT, run_script
from mat_training import coding_rows, search_rows, write_training
from PIL import Image

from data.steps import split_chain
from data.tasks import load_tasks
from prepare import main

THINK = "<think> t </think>"


def row(chain, action, image="a.png", **more):
    """A step of one question."""
    return {"image_path": image, "problem": f"<query> Which town? </query>{chain}", "solution": THINK + action, **more}


FIRST = row("", "<search> towns </search>")
LAST = row("\n<think> t </think><search> towns </search>\n<information> x </information>", "<answer> Rome </answer>")


@pytest.fixture
def load(tmp_path):
    """load(*rows): the tasks of a live run."""
    for name in ("a.png", "b_proc.png", "b_ori.png", "c_proc.png"):
        Image.new("RGB", (56, 56)).save(tmp_path / name)

    def load(*rows, mode="episode"):
        (tmp_path / "t.json").write_text(json.dumps(rows))
        return load_tasks(tmp_path / "t.json", mode=mode)
    return load


# ---- joined to whole questions

def test_63_rows_are_20_questions(tmp_path):
    rows = search_rows()
    assert len(rows) == 63
    tasks = load_tasks(write_training(tmp_path, "rft_agent_search_20", rows), mode="episode")
    assert len(tasks) == 20
    assert tasks[19] == {
        "id": 60, "family": "search", "question": "In which year was the harbour of town 19 built?", "answers": ["1819"],
        "image": str(tmp_path / "rft_agent_search_20_images" / "19.png"), "type": [], "solution": None, "split": "all",
        "queries": ["harbour of town 19 part 0", "harbour of town 19 part 1", "harbour of town 19 part 2"]}


def test_gold_queries_are_in_the_order_of_their_chain(tmp_path):
    path = write_training(tmp_path, "rft_agent_search_20", search_rows()[::-1])
    assert load_tasks(path, mode="episode")[0]["queries"] == [f"harbour of town 19 part {part}" for part in range(3)]


@pytest.mark.parametrize("without_code, number", [(200, 3400), (100, 3500)])  # its README's count; somebody else's
def test_3400_rows_are_1200_questions(tmp_path, without_code, number):
    rows = coding_rows(without_code=without_code)
    assert len(rows) == number
    path = write_training(tmp_path, "rft_agent_code_1_2k", random.Random(0).sample(rows, number))  # in any order
    tasks = load_tasks(path, mode="episode")
    assert len(tasks) == 1200
    by_image = {task["image"].rpartition("/")[2]: task for task in tasks}
    assert {name for name in by_image if "ori" in name} == set()  # the answer's clean image is not given away
    pair = by_image["rotation90+dark_8_proc.png"]
    assert (pair["question"], pair["answers"], pair["type"], pair["family"], pair["queries"]) == (
        "What is the number on sign 1?", ["8"], ["dark", "rotation90"], "coding", [])
    assert by_image["none_99_proc.png"]["type"] == ["none"]


def test_the_offline_steps_are_the_offline_tasks_again():
    joined, whole = (load_tasks(ROOT / "data" / "offline" / name, mode="episode") for name in ("steps.json", "train.json"))
    keys = ("question", "image", "answers", "type", "family")
    assert [[task[key] for key in keys] for task in joined] == [[task[key] for key in keys] for task in whole]
    assert len(joined) == 384 and joined[-1]["queries"] == ["tower of Italy"]


@pytest.mark.parametrize("name, file, rows", [("mat-search-train", "rft_agent_search_20", search_rows()),
                                              ("mat-coding-train", "rft_agent_code_1_2k", coding_rows(4, 2, 8))])
def test_a_prepared_file_is_joined_as_the_published_one(tmp_path, name, file, rows):
    path = write_training(tmp_path / "MAT-Training", file, rows)
    assert main([name, str(path), "--any_count", "True", "-o", str(path.with_name("mine.json"))]) == 0
    tasks = load_tasks(path, mode="episode")
    assert load_tasks(path.with_name("mine.json"), mode="episode") == tasks and len(tasks) in (20, 48)


@pytest.mark.parametrize("text, question, chain", [
    ("Who?", "Who?", ""), ("<query> Who? </query>", "Who?", ""), ("<query> Who? <query>", "Who?", ""),
    ("<query> Who? </query>\n<think> t </think>", "Who?", "<think> t </think>"),
    ("Who?\n<search> q </search>\n", "Who?", "<search> q </search>"),
    ("Is 3 < 4 and <b>?", "Is 3 < 4 and <b>?", ""), ("<query> a <think> b </query> <code>", "a <think> b", "<code>")])
def test_a_step_shows_a_question_and_a_chain(text, question, chain):
    assert split_chain(text) == (question, chain)


def test_the_gold_answer_is_taken_out_of_its_turn(load):
    """MAT's gt is the whole turn, by which F1 would be near 0."""
    gold = {"solution": "<answer> Rome </answer>", "gt": f"{THINK}<answer> Rome </answer>"}
    [step] = load({**LAST, **gold}, mode="step")
    assert step["answers"] == ["Rome"]
    assert load(FIRST, {**LAST, **gold})[0]["answers"] == ["Rome"]
    assert load({**LAST, "gt": "<answer> a </answer><answer> b </answer>"}, mode="step")[0]["answers"] == [
        "<answer> a </answer><answer> b </answer>"]  # no turn


def test_whole_tasks_and_steps_may_share_a_file(load):
    whole = {"question": "Which town?", "answers": ["Oslo"], "image_path": "a.png"}
    tasks = load(LAST, whole, {**whole, "image_path": None}, FIRST)
    assert [(task["id"], task["answers"]) for task in tasks] == [(4, ["Rome"]), (2, ["Oslo"]), (3, ["Oslo"])]


def test_one_question_about_two_images_is_two_tasks(load):
    problem = {"type": "pre_problem", "problem": "Which town?", "solution": "<problem> {'dark'} </problem>"}
    answer = {"type": "pre_answer", "problem": "Which town?", "context": "<problem> {'dark'} </problem>"}
    tasks = load({**problem, "image_path": "b_proc.png"}, {**problem, "image_path": "c_proc.png"},
                 {**answer, "image_path": "b_ori.png", "solution": "<answer> Rome </answer>"},
                 {**answer, "image_path": "c_proc.png", "solution": "<answer> Oslo </answer>"})
    assert [(task["answers"], task["image"][-10:], task["type"]) for task in tasks] == [
        (["Rome"], "b_proc.png", ["dark"]), (["Oslo"], "c_proc.png", ["dark"])]


@pytest.mark.parametrize("rows, reason", [
    ([FIRST], "row 1: no step has the answer"),
    ([LAST], "row 1: no step shows the question without a chain"),
    ([FIRST, LAST, {**LAST, "solution": "<answer> Oslo </answer>"}],
     "rows 1, 2, 3: steps of one question have different answers, ['Rome'] and ['Oslo']"),
    ([FIRST, {**FIRST, "gt": ["x"]}, {**FIRST, "answers": ["Oslo"]}, LAST],
     "rows 1, 2, 3, 4: steps of one question have different answers, ['Oslo'] and ['Rome']"),
    ([row("", "<problem> {'dark'} </problem>"), row("", "<problem> {'blur'} </problem>"), LAST],
     "rows 1, 2, 3: steps of one question have different labels, ['dark'] and ['blur']"),
    ([row("", "<code> x </code>", "b_proc.png"), row("", "<answer> x </answer>", "b_ori.png")],
     "rows 1, 2: steps of one question have different images, "),
    ([FIRST, {**LAST, "family": "coding"}], "rows 1, 2: steps of one question have different families, 'search' and"),
])
def test_steps_that_do_not_make_one_question_are_refused_with_their_rows(load, tmp_path, rows, reason):
    with pytest.raises(ValueError) as error:
        load(*rows)
    assert str(error.value).startswith(f"{tmp_path / 't.json'}, {reason}")
    assert str(error.value).endswith("or train with --mode step")


def test_what_only_looks_different_is_no_contradiction(load):
    [task] = load(FIRST, FIRST, LAST, {**LAST, "solution": "<answer> the ROME. </answer>"},
                  row("", "<search> cities </search>"))
    assert (task["answers"], task["queries"]) == (["Rome"], ["towns", "cities"])


# ---- trained

def train(tmp_path, path, **flags):
    """The metrics and the rollouts of the last step of a run on the laptop model."""
    flags = {"tasks": path, "eval_tasks": "", "group_size": 2, "max_new_tokens": 8, "beta": 0, "max_tokens": 900,
             "output_dir": tmp_path / "run", **flags}
    done = run_script("train.py", *(part for key, value in flags.items() for part in (f"--{key}", value)))
    assert done.returncode == 0, done.stderr
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    shown = (tmp_path / "run" / "rollouts" / f"step_{len(metrics)}.jsonl").read_text().splitlines()
    return metrics, [json.loads(line) for line in shown], done.stdout


SETS = {"rft_agent_search_20": (search_rows, 63, 20, "search"), "rft_agent_code_1_2k": (coding_rows, 3400, 1200, "coding")}


@pytest.mark.parametrize("name", ["rft_agent_search_20", pytest.param("rft_agent_code_1_2k", marks=pytest.mark.thorough)])
@pytest.mark.parametrize("mode", [pytest.param("step", marks=pytest.mark.thorough), "episode"])
def test_the_published_files_train_in_both_modes(tmp_path, name, mode):
    make, num_rows, num_questions, family = SETS[name]
    path = write_training(tmp_path / "MAT-Training", name, make())
    metrics, shown, said = train(tmp_path, path, mode=mode, steps=2)
    number = num_rows if mode == "step" else num_questions
    assert f"{number} tasks ({number} {family}" in said
    assert [row["tasks_failed"] for row in metrics] == [0, 0]
    if mode == "step":
        assert all(len(row["turns"]) == 1 for row in shown)
    else:  # asked as a benchmark asks, with the answer alone as the gold
        assert not any(re.search(r"<\w+>", row["question"]) for row in shown)
        assert all(re.fullmatch(r"\d+", text) for row in shown for text in row["answers"])
