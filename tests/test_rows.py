"""Rows of task files: what is accepted can be played, and nothing in a file ends a run that has
started.

    python -m pytest tests/test_rows.py
"""
import json
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import run_script
from data.report import write_report
from data.tasks import describe, load_tasks
from evaluate import evaluate_tasks, rescore
from PIL import Image
from rollout import Limits, Rollout, Tools, Turn, opening_error
from tools import parse_action
from train import Config, prompts_of_step, reward_parts, success

ROOT = Path(__file__).parent.parent
LAYOUTS = ROOT / "tests" / "layouts" / "MAT" / "MAT-Training"
TEXT = {"question": "q", "golden_answers": ["x"]}
STEP = {"problem": "p", "solution": "<think>t</think><answer>x</answer>", "image_path": None}


@pytest.fixture
def load(tmp_path):
    """load(*rows): their tasks. Rows are dicts, or JSON as it would stand in the file."""
    Image.new("RGB", (60, 60)).save(tmp_path / "a.png")

    def load(*rows, **options):
        text = "[" + ",".join(row if isinstance(row, str) else json.dumps(row)
                              for row in rows) + "]"
        (tmp_path / "t.json").write_text(text)
        return load_tasks(tmp_path / "t.json", **options)
    return load


# ---- odd values

@pytest.mark.parametrize("row, key, value", [
    ({**TEXT, "question": "half \ud83d pair"}, "question", "half ? pair"),
    ({**TEXT, "golden_answers": ["\udc00"]}, "answers", ["?"]),
    ({**STEP, "context": "\ud83d so far"}, "question", "p\n? so far"),
    ({**STEP, "context": None}, "question", "p"),
    ('{"problem": "p", "solution": "s", "image_path": null, "context": NaN}', "question", "p"),
    ('{"question": "q", "golden_answers": ["x"], "id": NaN}', "id", 1),
    ('{"question": "q", "golden_answers": ["x"], "id": 1e999}', "id", 1),
    ('{"question": "q", "golden_answers": ["x"], "id": null}', "id", 1),
    ({**TEXT, "id": 7.0}, "id", 7.0),
    ('{"question": "q", "golden_answers": ["x"], "type": NaN}', "type", []),
    ({**TEXT, "type": "bridge"}, "type", ["bridge"]),
    ('{"question": "q", "golden_answers": ["x"], "split": NaN}', "split", "all"),
    ('{"question": "q", "golden_answers": ["x"], "family": NaN}', "family", "search"),
    ({**STEP, "gt": ""}, "answers", []),
    ({**STEP, "gt": [" "]}, "answers", []),
    ({**STEP, "context": "  "}, "question", "p"),
    ({**TEXT, "answers": None}, "answers", ["x"]),
    ({"question": "q", "answer": "x", "solution": None, "image_path": None}, "solution", None),
    ({"question": "q", "answer": "x", "processed_image_path": None, "image_path": None}, "image",
     None),
    ({**STEP, "gt": None}, "answers", []),
    ({**STEP, "gt": "Rome"}, "answers", ["Rome"]),
    ({**STEP, "gt": "{'dark'}", "solution": "<think>t</think><problem>{'dark'}</problem>"},
     "answers", []),
    ({"question": "q\x00r", "answer": "x", "image_path": None}, "question", "q\x00r"),
])
def test_what_can_be_mended_is(load, row, key, value):
    assert load(row)[0][key] == value


@pytest.mark.parametrize("row, reason", [
    ({**TEXT, "id": ["a"]}, "id must be a text or a number, got ['a']"),
    ({**TEXT, "id": True}, "id must be a text or a number, got True"),
    ({**TEXT, "type": [1]}, "type must be one or more texts, got [1]"),
    ('{"question": "q", "golden_answers": ["x"], "type": [NaN]}',
     "type must be one or more texts, got [None]"),
    ({**TEXT, "type": {"a": 1}}, "type must be one or more texts, got {'a': 1}"),
    ({**TEXT, "split": ["dev"]}, "split must be a text, got ['dev']"),
    ({**TEXT, "split": 3}, "split must be a text, got 3"),
    ({**TEXT, "family": ["search"]}, "family is ['search']"),
    ('{"question": NaN, "golden_answers": ["x"]}', "question must be a text, got None"),
    ('{"question": "q", "golden_answers": NaN}', "answers must be one or more texts, got None"),
    ({**STEP, "context": ["c"]}, "context must be a text, got ['c']"),
    ({**STEP, "gt": 3}, "gt must be one or more texts, got 3"),
    ({**STEP, "gt": 0}, "gt must be one or more texts, got 0"),
    ({"question": "q", "answer": "x", "image_path": "a" * 5000}, "image_path 'aaaa"),
    ({"question": "q", "answer": "x", "image_path": "a\0.png"},
     "image_path 'a\\x00.png' is not in"),
    ({"question": "q", "answer": "x", "image_path": "."}, "image_path '.' is not in"),
    ({"question": "q", "answer": "x", "image_path": ["a.png"]},
     "image_path must be a text, got ['a.png']"),
    ({"question": "q", "answer": "x"}, "has no image_path"),
])
def test_what_cannot_is_refused_with_its_row(load, tmp_path, row, reason):
    with pytest.raises(ValueError) as error:
        load({**TEXT, "id": "first"}, row)
    assert str(error.value).startswith(f"{tmp_path / 't.json'}, row 2: {reason}")
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("row, family", [
    ({"answer": "x", "image_path": "a.png"}, "search"),
    ({"answer": "x", "image_path": None}, "search"),
    ({"answer": "x", "image_path": "a.png", "type": ["dark"]}, "coding"),
    ({"answer": "x", "image_path": "a.png", "type": "rotation90"}, "coding"),
    ({"answer": "x", "image_path": "a.png", "type": ["rotation180", "noise"]}, "coding"),
    ({"answer": "x", "processed_image_path": "a.png"}, "coding"),
    ({"answer": "x", "image_path": "a.png", "type": "bridge"}, "search"),  # HotpotQA's
    ({"answer": "x", "image_path": None, "type": "none"}, "search"),
    ({"answer": "x", "image_path": "a.png", "type": ["dark"], "family": "search"}, "search"),
])
def test_the_family_of_a_row_is_inferred(load, row, family):
    assert load({"question": "q", **row})[0]["family"] == family


def test_what_rows_were_taken_for_is_said_in_a_line(load):
    tasks = load({"question": "q", "answer": "x", "image_path": "a.png", "type": "dark"},
                 TEXT | {"id": 2},
                 {"question": "q", "answer": "x", "image_path": "a.png", "id": 3})
    assert describe(tasks) == "3 tasks (1 coding, 2 search; 1 without an image)"


def test_a_page_can_be_made_of_what_odd_ids_left(load, tmp_path, policy):
    tasks = load('{"question": "q", "golden_answers": ["x"], "id": NaN}',
                 {**TEXT, "id": "\ud83d", "question": "\ud83d"})
    (tmp_path / "out").mkdir()
    evaluate_tasks(policy, tasks, Tools(), Limits(1, 4, 512), output_dir=tmp_path / "out")
    assert write_report(tmp_path / "out").is_file()
    (tmp_path / "out" / "predictions.json").write_text(
        '[{"id": 1, "gt": "x", "pred_answer": NaN, "error": NaN}]')
    assert rescore(tmp_path / "out" / "predictions.json", "2wiki")["all"]["n"] == 1


def test_an_image_beside_a_null_column_is_not_lost(load, tmp_path):
    for extra in ({"golden_answers": None}, {"golden_answers": ["x"]},
                  {"processed_image_path": None}):
        [task] = load({"question": "q", "answers": ["x"], "image_path": "a.png", **extra})
        assert task["image"] == str((tmp_path / "a.png").resolve()) and task["family"] == "search"


def test_a_smaller_limit_scores_fewer_items_and_loses_none(load, tmp_path, policy):
    tasks, out = load(*({**TEXT, "id": n} for n in range(4))), tmp_path / "out"
    out.mkdir()
    evaluate_tasks(policy, tasks, Tools(), Limits(1, 4, 512), output_dir=out)
    before = (out / "items.jsonl").read_text()
    assert evaluate_tasks(policy, tasks[:2], Tools(), Limits(1, 4, 512),
                          output_dir=out)["all"]["n"] == 2
    assert (out / "items.jsonl").read_text() == before


# ---- modes

@pytest.mark.parametrize("row, mode, reason", [
    ({**STEP, "solution": "<think>t</think><code>x</code>", "gt": "y"}, "episode",
     "no step has the answer"),
    (TEXT, "step", "--mode step needs a solution in every row"),
    ({**STEP, "solution": "<think>t</think>"}, "step", "solution must hold one action"),
    ({**STEP, "solution": "<answer> </answer>"}, "step", "solution must hold one action"),
    ({**STEP, "solution": "<answer>a</answer><search>b</search>"}, "step",
     "solution must hold one action"),
])
def test_rows_that_a_mode_cannot_train_on_are_refused(load, tmp_path, row, mode, reason):
    with pytest.raises(ValueError) as error:
        load(row, mode=mode)
    assert str(error.value).startswith(f"{tmp_path / 't.json'}, row 1: {reason}")


@pytest.mark.parametrize("solution, answers, given, expected", [
    ("<answer>Rome</answer>", [], "rome", 1.0), ("<answer>Rome</answer>", [], "Paris", 0.0),
    ("<answer>Rome</answer>", [], None, 0.0), ("<answer>Rome</answer>", ["Roma"], "Rome", 0.0),
    ("<search>Rome</search>", ["Rome"], "Rome", None), ("<code>x</code>", [], None, None),
    ("<problem>{'dark'}</problem>", ["Rome"], None, None)])
def test_success_of_a_step_is_an_exact_match_where_its_gold_is_an_answer(solution, answers, given,
                                                                         expected):
    task = {"solution": solution, "answers": answers}
    assert success(Rollout(task, [], [], [], answer=given), "step") == expected
    if answers:
        assert success(Rollout(task, [], [], [], answer=given),
                       "episode") == float(given in answers)


@pytest.mark.parametrize("text, part", [
    ("<think>t</think><answer>x</answer>", "accuracy"),
    ("<think>t</think><search>q</search>", "search"),
    ("<think>t</think><code>c</code>", "code"),
    ("<think>t</think><problem>dark</problem>", "problem")])
def test_a_step_is_not_paid_for_an_action_that_was_cut_off(text, part):
    task = {"solution": text, "answers": [], "family": "search"}
    turn = Turn(text, parse_action(text))
    whole = Rollout(task, [], [], [], turns=[turn], stop="turns")
    cut = Rollout(task, [], [], [], turns=[turn], stop="length")
    assert [reward_parts(rollout, "step")[part] for rollout in (whole, cut)] == [1.0, 0.0]


@pytest.mark.thorough
@pytest.mark.parametrize("name, num_rows", [("rft_agent_search_20", 2), ("rft_agent_code_1_2k", 3)])
def test_the_released_training_rows_train_as_steps(tmp_path, name, num_rows):
    out = tmp_path / "run"
    flags = {"mode": "step", "tasks": LAYOUTS / f"{name}.json", "eval_tasks": "", "steps": 2,
             "prompts_per_step": num_rows,
             "group_size": 2, "max_new_tokens": 8, "beta": 0, "max_tokens": 1500, "output_dir": out}
    done = run_script("train.py",
                      *[part for key, value in flags.items() for part in (f"--{key}", value)])
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["success"] for row in rows] == [0.0, 0.0]
    assert [row["tasks_failed"] for row in rows] == [0, 0]
    shown = [json.loads(line)
             for line in (out / "rollouts" / "step_1.jsonl").read_text().splitlines()]
    is_answer = {"rft_agent_search_20": {2}, "rft_agent_code_1_2k": {3}}[name]
    assert {row["id"]: row["success"] for row in shown} == {
        number: 0.0 if number in is_answer else None for number in range(1, num_rows + 1)}


# ---- before the first step, and in the run

def test_prompts_that_are_too_long_end_a_run_before_its_first_step(tmp_path):
    rows = [{"id": f"row-{n}", "family": "search", "question": "why " * n, "answers": ["x"],
             "image_path": None}
            for n in (1, 2, 600)]
    (tmp_path / "t.json").write_text(json.dumps(rows))
    done = run_script("train.py", "--tasks", tmp_path / "t.json", "--eval_tasks", "",
                      "--output_dir", tmp_path / "run",
                      "--prompts_per_step", 1)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert f"{tmp_path / 't.json'}, task 'row-600': " in done.stderr
    assert "raise --max_tokens" in done.stderr
    assert not (tmp_path / "run").exists()


def draw(size):
    """The prompts of three steps of 4 out of 9 tasks, of which two cannot be opened, on each of
    `size` ranks."""
    config = Config(prompts_per_step=4)
    return [prompts_of_step(list(range(9)), step, config, lambda task: task not in (2, 5))
            for step in range(3)]


def test_a_task_that_fails_is_replaced_by_the_same_one_on_any_number_of_ranks(tmp_path):
    from test_update import group, on_ranks
    with group(dist.HashStore()):
        alone, usual = draw(1), [prompts_of_step(list(range(9)), step, Config(prompts_per_step=4))
                                 for step in range(4)]
    assert not {2, 5} & set(sum(alone, [])) and {2, 5} <= set(sum(usual[:3], []))
    for step in range(3):
        for place in range(4):
            later = [usual[s][place] for s in range(step, 4) if usual[s][place] not in (2, 5)]
            assert not later or alone[step][place] == later[0]
    left, right = on_ranks(2, tmp_path / "two", draw, 2)
    assert [a + b for a, b in zip(left, right)] == alone


def test_a_run_of_which_no_task_opens_ends(tmp_path):
    from test_update import group
    with group(dist.HashStore()), pytest.raises(ValueError,
                                                match="none of 9 tasks could be opened"):
        prompts_of_step(list(range(9)), 0, Config(prompts_per_step=4), lambda task: False)


def test_why_a_task_cannot_be_opened(policy, load, tmp_path):
    [task] = load({"question": "q", "answer": "x", "image_path": "a.png"})
    assert opening_error(policy, task, Limits(1, 8, 512), "short") is None
    assert "no room for a turn" in str(opening_error(policy, task, Limits(1, 8, 20), "short"))
    policy.images.clear()
    os.remove(tmp_path / "a.png")
    assert "a.png cannot be read" in str(opening_error(policy, task, Limits(1, 8, 512), "short"))


@pytest.mark.thorough
def test_an_image_that_goes_while_a_run_goes_on_costs_its_task_only(tmp_path, monkeypatch, capsys):
    """The real loop on one rank, with a cache of no size: images are read again when their task is
    drawn."""
    import rollout
    import train
    rows = []
    for n in range(4):
        Image.new("RGB", (56, 56), (60 * n, 0, 0)).save(tmp_path / f"{n}.png")
        rows.append({"id": n, "family": "search", "question": "q", "answers": ["x"],
                     "image_path": f"{n}.png"})
    (tmp_path / "t.json").write_text(json.dumps(rows))
    config = Config(tasks=str(tmp_path / "t.json"), eval_tasks=str(tmp_path / "t.json"), steps=2,
                    prompts_per_step=8,
                    group_size=2, max_turns=1, max_new_tokens=4, beta=0.0,
                    output_dir=str(tmp_path / "run"),
                    corpus=f"sqlite:{ROOT}/data/offline/corpus.sqlite",
                    model=str(ROOT / "data" / "model"))
    monkeypatch.setattr(rollout, "MAX_KEPT", 0)
    check = train.check_tasks

    def check_then_remove(*args):
        check(*args)
        os.remove(tmp_path / "2.png")
    monkeypatch.setattr(train, "check_tasks", check_then_remove)
    threads = torch.get_num_threads()
    tasks, held_out, search = train.prepare(config)
    train.main(config, tasks, held_out, search, *train.load(config, tasks, held_out))
    dist.destroy_process_group()
    torch.set_num_threads(threads)
    rows = [json.loads(line)
            for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["tasks_failed"] for row in rows] == [1, 1]  # drawn twice or more in each step
    shown = [json.loads(line)
             for line in (tmp_path / "run" / "rollouts" / "step_1.jsonl").read_text().splitlines()]
    assert len(shown) == 16 and {row["id"] for row in shown} <= {0, 1, 3}
    held_out = [json.loads(line)
                for line in (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()]
    assert [row["n"] for row in held_out] == [4, 4, 4]
    said = capsys.readouterr()
    assert "task 2 cannot be opened: " in said.err and "2.png cannot be read" in said.err
    assert "tasks failed" in said.out
