"""Evaluations that are asked in several ways, fail in part, are killed, shared among ranks, and end
as if nothing had been."""
import json
import os
import random
import signal
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest
from chat_server import ChatServer, completion, parts, refuse, stand_in
from conftest import CLEAN, environments_of_ranks, run_script
from data.files import append_rows, drop_cut_row
from data.tasks import load_tasks
from data.endpoint import PROBE, ChatModel
from evaluate import (ASKED, _answer, evaluate_tasks, main, read_items,
                      released_crop, summarize)
from model import encode_prompt, load_policy, sample
from PIL import Image, ImageOps
from rollout import Limits, Rollout, Tools, instructions, replay, roll_out
from tools import CodeTool, SearchTool, ToolResult

ROOT = Path(__file__).resolve().parent.parent
HELD_OUT = ROOT / "data" / "offline" / "heldout.json"
CORPUS = f"sqlite:{ROOT}/data/offline/corpus.sqlite"
LIMITS = Limits(4, 96, 512)


@cache
def shipped():
    return load_policy(str(ROOT / "data" / "model"))


@cache
def some_tasks():
    return load_tasks(HELD_OUT, "offline")[::20]  # 7 of coding, 5 of search


def evaluate(out, tasks=None, **options):
    """In this process, with live tools."""
    with CodeTool(workers=1) as code:
        return evaluate_tasks(shipped(), tasks or some_tasks(), Tools(code, SearchTool(CORPUS)),
                              LIMITS, output_dir=out,
                              **{"benchmark": "offline", "batch_size": 4, **options})


def run(*args, **environment):
    return run_script("evaluate.py", *args, **environment)


def items(out):
    """Rows of items.jsonl, timings apart."""
    rows = [json.loads(line) for line in (out / "items.jsonl").read_text().splitlines()]
    for turn in [turn for row in rows for turn in row["turns"]]:
        turn.pop("seconds", None)
    return rows


def files(out):
    """What an evaluation leaves, timings apart."""
    scores = json.loads((out / "scores.json").read_text())
    del scores["tools"]["seconds"]
    return {"items": items(out), "scores": scores,
            "predictions": (out / "predictions.json").read_bytes(),
            **{path.name: path.read_bytes() for path in (out / "items").glob("*.png")}}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """An evaluation that nobody disturbed, two samples an item."""
    out = tmp_path_factory.mktemp("alone")
    scores = evaluate(out, samples=2, temperature=1.0)
    assert json.loads((out / "scores.json").read_text()) == scores
    return out


# ---- what is left behind -------------------------------------------------------------------------

def test_rows_pictures_and_figures_are_those_of_the_episodes(alone):
    rows, scores = items(alone), json.loads((alone / "scores.json").read_text())
    keys = [(n, k) for n in range(12) for k in range(2)]
    assert [(row["number"], row["sample"]) for row in rows] == keys
    assert [row["id"] for row in rows[::2]] == [task["id"] for task in some_tasks()]
    # sampled, not copied
    assert any(a["turns"] != b["turns"] for a, b in zip(rows[::2], rows[1::2]))
    shown = [turn["image"] for row in rows for turn in row["turns"] if "image" in turn]
    assert shown and {path.name for path in (alone / "items").iterdir()} == set(shown)
    calls = [turn for row in rows for turn in row["turns"] if "ok" in turn]
    assert scores["tools"]["calls"] == len(calls) > 5
    turns = sum(len(row["turns"]) for row in rows)
    assert scores["tools"]["turns"] == pytest.approx(turns / 24, abs=0.01)
    assert sum(scores["stops"].values()) == scores["all"]["n"] == 24 and scores["failed"] == 0
    assert scores["all"]["em"] == pytest.approx(100 * sum(row["em"] for row in rows) / 24, abs=0.01)
    for key in ("f1", "em"):
        a, b = (100 * sum(row[key] for row in rows if row["sample"] == k) / 12 for k in range(2))
        expected = {"mean": pytest.approx((a + b) / 2, abs=0.01),
                    "std": pytest.approx(abs(a - b) / 2 ** 0.5, abs=0.01)}
        assert scores["samples"][key] == expected
    predictions = json.loads((alone / "predictions.json").read_text())
    assert predictions[3] == {"id": rows[3]["id"], "gt": rows[3]["gt"],
                              "pred_answer": rows[3]["pred_answer"],
                              "split": "coding", "sample": 1, "error": None}


def test_a_batch_is_played_side_by_side(monkeypatch, tmp_path):
    """All its samples, however long an episode may get."""
    sizes = []

    def counted(policy, rows, **options):
        sizes.append(len(rows))
        return sample(policy, rows, **options)
    monkeypatch.setattr("rollout.sample", counted)
    limits = Limits(1, 4, 512, batch_tokens=512)
    evaluate_tasks(shipped(), some_tasks(), Tools(), limits, tmp_path, batch_size=5, samples=2,
                   temperature=1.0)
    assert sizes == [10, 10, 4]


# ---- killed, resumed, shared ---------------------------------------------------------------------

def _evaluate_elsewhere(out):
    import torch
    torch.set_num_threads(1)
    evaluate(out, samples=2, temperature=1.0)


@pytest.mark.parametrize("moments", [2, pytest.param(10, marks=pytest.mark.thorough)])
def test_killed_at_random_moments_it_leaves_what_one_left_alone_does(alone, tmp_path, moments):
    kills, rng, started = 0, random.Random(0), 0
    while kills < moments:
        process = CLEAN.Process(target=_evaluate_elsewhere, args=(tmp_path,))
        before = len(read_items(tmp_path))
        process.start()
        started += 1
        deadline = time.monotonic() + 60
        # in its start; the others after some items, at a random moment of a batch
        if kills % 3 == 0:
            process.join(rng.uniform(0.1, 0.8))
        else:
            while process.is_alive() and time.monotonic() < deadline:
                if len(read_items(tmp_path)) > before:
                    break
                time.sleep(0.01)
            process.join(rng.uniform(0.0, 0.1))
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        else:  # it came to its end: once more from the middle
            rows = (tmp_path / "items.jsonl").read_text().splitlines(keepends=True)
            (tmp_path / "items.jsonl").write_text("".join(rows[:8]) + rows[8][:50])
        process.join()
    process = CLEAN.Process(target=_evaluate_elsewhere, args=(tmp_path,))
    process.start()
    process.join(100)
    assert process.exitcode == 0 and started >= moments
    assert files(tmp_path) == files(alone)


@pytest.mark.thorough
def test_ranks_share_the_items_and_another_number_of_ranks_goes_on(alone, tmp_path):
    tasks = tmp_path / "tasks.json"
    keys = ("id", "family", "question", "answers", "type", "split")
    rows = [{"image_path": task["image"], **{key: task[key] for key in keys}}
            for task in some_tasks()]
    tasks.write_text(json.dumps(rows))
    flags = ["--model", "data/model", "--data", tasks, "--benchmark", "offline",
             "--batch_size", "4", "--samples", "2", "--temperature", "1.0", "--max_turns", "4",
             "--max_new_tokens", "96", "--max_tokens", "512", "--output_dir", tmp_path / "run"]
    with ThreadPoolExecutor(2) as pool:
        done, second = pool.map(lambda rank: run(*flags, **rank), environments_of_ranks(2))
    assert done.returncode == second.returncode == 0, done.stderr + second.stderr
    scores = json.loads((alone / "scores.json").read_text())
    assert json.loads(done.stdout.splitlines()[-1])["all"] == scores["all"]
    assert (done.stdout.count('"all"'), second.stdout) == (1, "")  # one rank speaks
    assert items(tmp_path / "run") == items(alone)
    rows = (tmp_path / "run" / "items.jsonl").read_text().splitlines(keepends=True)
    # as two ranks may leave it: less than a batch
    (tmp_path / "run" / "items.jsonl").write_text("".join(rows[:5]))
    done = run(*flags)
    assert done.returncode == 0, done.stderr
    assert items(tmp_path / "run") == items(alone)
    done = run(*flags, "--seed", "1")
    assert done.returncode == 2
    assert done.stderr == (
        f"error: --output_dir {tmp_path}/run holds an evaluation with other flags (seed); "
        "give the same ones to go on, or choose another folder\n")


def test_a_rank_plays_its_share_however_far_the_others_are(alone, tmp_path, monkeypatch):
    """Or a batch could be played by nobody, and the first rank would wait for it for ever."""
    rows = (alone / "items.jsonl").read_text().splitlines(keepends=True)
    # the first rank was quick: batch 0 of 3 is there
    (tmp_path / "items.jsonl").write_text("".join(rows[:8]))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert evaluate(tmp_path, samples=2, temperature=1.0) == {}
    keys = [(number, sample) for number in range(8) for sample in range(2)]
    assert sorted(read_items(tmp_path)) == keys


def test_a_folder_of_other_tasks_is_refused(alone):
    changed = "item 0 is 'heldout-coding-000' and not 'heldout-coding-020': the tasks have changed"
    with pytest.raises(ValueError, match=changed):
        evaluate(alone, some_tasks()[1:], samples=2, temperature=1.0)


@pytest.mark.parametrize("name, text, words", [
    ("metrics.jsonl", "",
     "holds a training run; choose another folder; "
     "to evaluate what it trained give --model {0}/model"),
    ("config.json", '{"prompts_per_step": 8, "model": "data/model"}', "holds a training run"),
    ("config.json", '{"model_type": "qwen2_5_vl"}', "holds files of others; choose another folder"),
    ("config.json", "5", "holds files of others"),
    ("predictions.json", "[]", "holds files of others"),
    ("items.jsonl", '{"number": 0, "sample": 0}\n', "holds an evaluation without its flags"),
    ("config.json", '{"benchmark": "offline"}',
     "holds an evaluation with other flags (ask, batch_size, ")])
def test_a_folder_in_use_is_named_for_what_it_is_and_left_alone(tmp_path, capsys, name, text,
                                                                words):
    (tmp_path / name).write_text(text)
    assert main(["--model", "data/model", "--data", str(HELD_OUT), "--output_dir",
                 str(tmp_path)]) == 2
    assert words.format(tmp_path) in capsys.readouterr().err
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {name: text}


def test_a_row_that_a_kill_cut_off_is_played_again(tmp_path):
    path, rest = tmp_path / "items.jsonl", {"sample": 0, "id": 1, "gt": ["x"], "pred_answer": None, "error": None}
    append_rows(path, [{"number": 0, **rest, "x": 1}])
    with open(path, "a") as file:
        file.write('{"number": 1, "sam')
    assert list(read_items(tmp_path)) == [(0, 0)]
    drop_cut_row(path)
    append_rows(path, [{"number": 1, **rest, "x": 2}, {"number": 2, **rest, "x": 3}])
    drop_cut_row(path)
    append_rows(path, [{"number": 3, **rest, "x": 4}])
    rows = {key: row["x"] for key, row in read_items(tmp_path).items()}
    assert rows == {(0, 0): 1, (1, 0): 2, (2, 0): 3, (3, 0): 4}


@pytest.mark.parametrize("row", ["[1]", '{"number": 0}', '{"number": 0, "sample": 0, "id": 1, "gt": []}', "x", ""])
def test_a_row_that_is_none_of_an_evaluation_is_named(tmp_path, row):
    (tmp_path / "items.jsonl").write_text(row + "\n")
    with pytest.raises(ValueError, match="items.jsonl, line 1: not (the row of an item; delete the line|JSON)"):
        read_items(tmp_path)


# ---- items that fail -----------------------------------------------------------------------------

def test_an_item_that_fails_is_recorded_and_the_others_of_its_batch_are_played(tmp_path):
    tasks = some_tasks()[:6]
    tasks[3] = {**tasks[3], "question": "What character is on the sign? " * 100}
    scores = evaluate(tmp_path / "run", tasks)
    whole = evaluate(tmp_path / "whole", some_tasks()[:6])
    rows = items(tmp_path / "run")
    assert [row["error"] is None for row in rows] == [True] * 3 + [False] + [True] * 2
    assert rows[3]["error"].startswith("ValueError: its prompt has ")
    assert (rows[3]["turns"], rows[3]["pred_answer"], rows[3]["em"]) == ([], None, 0.0)
    assert (scores["failed"], scores["all"]["n"], scores["stops"]["failed"]) == (1, 6, 1)
    assert whole["failed"] == 0 and 0 <= whole["all"]["em"] - scores["all"]["em"] <= 100 / 6 + 0.01
    predictions = json.loads((tmp_path / "run" / "predictions.json").read_text())
    assert predictions[3]["error"] == rows[3]["error"]


# ---- ways of asking ------------------------------------------------------------------------------

def asked(monkeypatch, out, ask, tasks, tools=None, text="<think> I see. </think> Paris"):
    """(openings of the prompts, rows) where every turn says `text`."""
    openings = []

    def playing(policy, tasks, tools, limits, **options):
        def sampler(live):
            openings.extend(rollout.opening for rollout in live)
            return replay(policy, lambda task: [text] * 9)(live)
        return roll_out(policy, tasks, tools, limits, **{**options, "sampler": sampler})
    monkeypatch.setattr("rollout.roll_out", playing)
    rows = []
    monkeypatch.setattr("evaluate.summarize", lambda items, benchmark: rows.extend(items) or {})
    evaluate_tasks(shipped(), tasks, tools or Tools(), LIMITS, out, ask=ask, prompt="full")
    return openings, rows


QUESTION = {"id": 1, "family": "search", "question": "Which city?", "answers": ["Paris"],
            "image": None, "type": [], "split": "all", "solution": None}


@pytest.mark.parametrize("ask", ["direct", "cot"])
@pytest.mark.parametrize("image", [None, Image.new("RGB", (56, 56))], ids=["text", "image"])
def test_without_tools_one_turn_says_the_answer(monkeypatch, tmp_path, ask, image):
    image and image.save(tmp_path / "a.png")
    picture = str(tmp_path / "a.png")
    openings, [row] = asked(monkeypatch, tmp_path, ask, [{**QUESTION, "image": image and picture}])
    assert openings == ["Which city?" + ASKED[ask]
                        + (" Only return the answer." if image is None else "")]
    assert (row["question"], row["pred_answer"], row["em"],
            len(row["turns"])) == ("Which city?", "Paris", 1.0, 1)


def test_the_bounds_of_an_image_are_those_of_the_flags(tmp_path):
    """56 x 56 pixels are 2 x 2 tokens; enlarged to 224 x 224 they are 8 x 8."""
    lengths = []
    for least in (56 * 56, 224 * 224):
        out = tmp_path / str(least)
        done = run("--model", "data/model", "--data", HELD_OUT, "--benchmark", "offline", "--limit",
                   "1", "--max_new_tokens", "1", "--min_pixels", least, "--output_dir", out)
        assert done.returncode == 0, done.stderr
        lengths.append(items(out)[0]["tokens"])
    assert lengths[1] - lengths[0] == 64 - 4


def test_without_tools_a_search_ends_the_one_turn(monkeypatch, tmp_path):
    _, [row] = asked(monkeypatch, tmp_path, "direct", [QUESTION],
                     text="<think> I must know. </think> <search> city </search>")
    assert (len(row["turns"]), row["stop"], row["em"]) == (1, "turns", 0.0)


def test_with_tools_the_instructions_are_those_of_training(monkeypatch, tmp_path):
    openings, [row] = asked(monkeypatch, tmp_path, "agent", [QUESTION])
    assert openings == ["Which city?" + instructions("full", "search")]
    assert (row["pred_answer"], row["stop"]) == (None, "invalid")  # no tag, no answer


def test_rag_searches_once_for_the_question(monkeypatch, tmp_path):
    class Search:
        queries, spent = [], False

        def search_many(self, queries):
            self.queries.append(queries)
            return [ToolResult("city" in query, f"1. Content: about {query}", None,
                               None if "city" in query else "timeout", 0.5)
                    for query in queries]
    other = {**QUESTION, "id": 2, "question": "Which river?"}
    openings, rows = asked(monkeypatch, tmp_path, "rag", [QUESTION, other], Tools(search=Search()))
    assert Search.queries == [["Which city?", "Which river?"]]
    found = "<information> 1. Content: about Which river? </information>\n"
    assert openings[1] == found + "Which river?" + ASKED["rag"] + " Only return the answer."
    assert [row["question"] for row in rows] == ["Which city?", "Which river?"]
    assert rows[1]["prompt"] == openings[1]
    assert summarize(rows, None)["tools"] == {
        "turns": 1.0, "calls": 2, "errors": {"timeout": 1}, "seconds": 1.0}


@pytest.mark.parametrize("text, answer", [
    ("Paris", "Paris"), ("<think> a </think> Paris ", "Paris"),
    ("<think> a </think> <answer> Paris </answer>", "Paris"),
    ("", None), ("<think> Paris </think>", None)])
def test_the_answer_of_one_turn(text, answer):
    [rollout], _ = roll_out(shipped(), [QUESTION], Tools(), Limits(1, 96, 512),
                            sampler=replay(shipped(), lambda task: [text]))
    assert _answer(rollout, "direct") == answer


def test_a_turn_that_was_cut_off_is_no_answer():
    [rollout], _ = roll_out(shipped(), [QUESTION], Tools(), Limits(1, 2, 512), temperature=0.0)
    assert rollout.stop == "length" and rollout.turns[0].text and _answer(rollout, "direct") is None


@pytest.mark.parametrize("ask", [
    "agent", "direct", *[pytest.param(ask, marks=pytest.mark.thorough) for ask in ("cot", "rag")]])
def test_published_items_are_asked_in_every_way(golden, tmp_path, ask):
    for benchmark, name in (("mat-search", "MAT-Search.json"), ("mat-coding", "MAT-Coding.json")):
        tasks = load_tasks(golden / "mat_sample" / name, benchmark)
        with CodeTool(workers=1) as code:
            tools, limits = Tools(code, SearchTool(CORPUS)), Limits(2, 8, 4096)
            scores = evaluate_tasks(shipped(), tasks, tools, limits, tmp_path / benchmark,
                                    benchmark=benchmark, ask=ask, prompt="full")
        # the figures themselves may be 0
        assert (scores["all"]["n"], scores["failed"]) == (len(tasks), 0)


# ---- an endpoint ---------------------------------------------------------------------------------

FAULTS = {"http_500": 0.1, "http_429": 0.1, "cut": 0.1, "reset": 0.1}


@pytest.mark.thorough
def test_fifty_items_of_an_endpoint_with_faults_are_all_answered(tmp_path):
    tasks = load_tasks(HELD_OUT, "offline")[::4][:50]
    with ChatServer(stand_in(HELD_OUT), faults=FAULTS, seed=1) as server:
        chat = ChatModel(server.url, "stand-in", patience=60, backoff=0.01)
        scores = evaluate(tmp_path, tasks, chat=chat, batch_size=16, prompt="full")
        assert (scores["all"]["n"], scores["all"]["em"], scores["failed"]) == (50, 100.0, 0)
        assert chat.usage["retries"] > 10 and scores["tools"]["calls"] == 50
        before = chat.usage["requests"]
        assert evaluate(tmp_path, tasks, chat=chat, batch_size=16, prompt="full") == scores
        assert chat.usage["requests"] == before  # what was answered is not asked again


def ask(server, out, *flags):
    """The command line, asking for the first 12 items, four at a time."""
    return run("--api", server.url, "--model", "m", "--data", HELD_OUT, "--benchmark", "offline",
               "--limit", "12",
               "--batch_size", "4", "--output_dir", out, "--search_cache", "", "--prompt", "full",
               *flags)


def delete_failed(out):
    """Delete the rows of the items that failed, as a user does who wants them to be played
    again."""
    lines = (out / "items.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if not json.loads(line)["error"]]
    (out / "items.jsonl").write_text("".join(kept))


def is_of(messages, numbers):
    """Whether messages are of one of these of the 12 items: their questions are alike, their
    pictures are not."""
    picture = parts(messages[0])[1]
    return picture is not None and any(picture.convert("RGB").tobytes() == pictures()[n]
                                       for n in numbers)


@cache
def pictures():
    return [ImageOps.exif_transpose(Image.open(task["image"])).convert("RGB").tobytes()
            for task in load_tasks(HELD_OUT, "offline", limit=12)]


@pytest.mark.parametrize("status", [403, *[pytest.param(status, marks=pytest.mark.thorough) for status in (400, 413, 422)]])
def test_a_prompt_that_is_refused_fails_its_item_alone(tmp_path, status):
    """Also where it is the first; items whose rows are deleted are asked for again."""
    def faults(messages):
        return refuse(status, "input flagged") if is_of(messages, {0, 1, 7}) else None
    with ChatServer(stand_in(HELD_OUT), faults) as server:
        done = ask(server, tmp_path)
    assert done.returncode == 0, done.stderr
    rows, scores = items(tmp_path), json.loads((tmp_path / "scores.json").read_text())
    assert [row["number"]
            for row in rows if row["error"] == f"http_{status}: input flagged"] == [0, 1, 7]
    assert (scores["failed"], scores["all"]["em"], len(rows)) == (3, 75.0, 12)
    assert all(row["pred_answer"] is None for row in rows if row["error"])
    delete_failed(tmp_path)
    with ChatServer(stand_in(HELD_OUT)) as server:
        done = ask(server, tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "scores.json").read_text())["all"]["em"] == 100.0


@pytest.mark.parametrize("status, message",
                         [(400, "Invalid model name passed in model=m"), (401, "Invalid key"),
                          (404, "No such path")])
def test_a_wrong_model_key_or_address_ends_the_evaluation_before_it_begins(tmp_path, status,
                                                                           message):
    with ChatServer(stand_in(HELD_OUT), lambda messages: refuse(status, message)) as server:
        done = ask(server, tmp_path / "run")
    assert (done.returncode, done.stdout, len(server.seen)) == (2, "", 1)
    assert done.stderr == (
        f"error: {server.url} gives no reply for model m: http_{status} ({message}); check --api "
        "(it ends in /v1 as a rule), --model, OPENAI_API_KEY and the server; "
        "the same command goes on\n")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("fault, message", [
    ("closed", "gives no reply for model m: unreachable"),
    *[pytest.param(*case, marks=pytest.mark.thorough) for case in (
        (refuse(401, "revoked"), "for model m: http_401 (revoked)"),
        (refuse(403, "revoked"), "for model m: http_403 (revoked)"),
        (refuse(429, "insufficient_quota"), "for model m: http_429 (insufficient_quota)"),
        ("http_500", "gives no reply for model m: http_500 (Try again later.)"))]])
def test_an_endpoint_that_dies_in_mid_run_ends_it_and_the_same_command_goes_on(tmp_path, fault,
                                                                                message):
    """It ends within the patience."""
    faults = [None] * 12 + [fault] * 999  # the probe, the first four items, and half of a turn
    with ChatServer(stand_in(HELD_OUT), faults) as server:
        done = ask(server, tmp_path, "--api_patience", "2")
    assert (done.returncode,
            done.stdout) == (2, "") and message in done.stderr and "Traceback" not in done.stderr
    # the patience, and a busy machine
    assert server.seen[-1].time - server.seen[11].time < 2.0 + 2.0
    assert [(row["number"], row["error"])
            for row in items(tmp_path)] == [(n, None) for n in range(4)]
    with ChatServer(stand_in(HELD_OUT)) as server:
        done = ask(server, tmp_path, "--api_patience", "2")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "scores.json").read_text())["all"]["em"] == 100.0
    # what was answered is not asked again
    assert not any(is_of(request.body["messages"], range(4)) for request in server.seen)
    assert len((tmp_path / "usage.jsonl").read_text().splitlines()) == 2


@pytest.mark.thorough
def test_an_endpoint_that_answers_no_item_in_time_ends_the_run_and_one_item_does_not(tmp_path):
    """Each start goes on behind the items that failed, so none is stuck."""
    def no_item(messages):
        return "http_500" if messages != PROBE else None
    with ChatServer(stand_in(HELD_OUT), no_item) as server:
        done = ask(server, tmp_path / "none", "--api_patience", "2")
    assert (done.returncode,
            done.stdout) == (2, "") and server.seen[-1].time - server.seen[0].time < 2.0 + 2.0
    assert "answers a short prompt, but no item in time (http_500); check the" in done.stderr
    assert [row["error"] for row in items(tmp_path / "none")] == ["http_500"] * 4
    with ChatServer(stand_in(HELD_OUT)) as server:
        done = ask(server, tmp_path / "none", "--api_patience", "2")
    assert done.returncode == 0, done.stderr
    assert [row["error"] for row in items(tmp_path / "none")] == ["http_500"] * 4 + [None] * 8
    with ChatServer(stand_in(HELD_OUT),
                    lambda messages: "http_500" if is_of(messages, {11}) else None) as server:
        # the last, alone in its batch
        done = ask(server, tmp_path / "one", "--api_patience", "2", "--batch_size", "1")
    assert done.returncode == 0, done.stderr
    assert [row["error"] for row in items(tmp_path / "one")] == [None] * 11 + ["http_500"]


@pytest.mark.thorough
def test_a_run_of_which_every_item_failed_has_no_scores(tmp_path):
    def no_image(messages):
        return refuse(400, "images are not supported") if messages != PROBE else None
    with ChatServer(stand_in(HELD_OUT), no_image) as server:
        for _ in range(2):  # nor has it when it is called again
            done = ask(server, tmp_path)
            assert (done.returncode, done.stdout) == (2, "")
            assert done.stderr.endswith(
                "error: every item failed, so there are no scores; the first with: http_400: "
                "images are not supported; to play items again, delete their rows in "
                f"{tmp_path / 'items.jsonl'}\n")
    assert len(items(tmp_path)) == 12 and not (tmp_path / "scores.json").exists()
    delete_failed(tmp_path)
    with ChatServer(stand_in(HELD_OUT)) as server:
        done = ask(server, tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "scores.json").read_text())["all"]["em"] == 100.0


def test_replies_without_a_text_are_invalid_turns_that_usage_counts(tmp_path):
    replies = stand_in(HELD_OUT)

    def filtered(messages):
        return completion(None, "content_filter") if is_of(messages, {2, 5}) else replies(messages)
    with ChatServer(filtered) as server:
        done = ask(server, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("a reply without a text (finish_reason content_filter)") == 1
    assert [row["number"] for row in items(tmp_path) if row["stop"] == "invalid"] == [2, 5]
    assert json.loads((tmp_path / "usage.jsonl").read_text())["empty"] == 2
    assert json.loads((tmp_path / "scores.json").read_text())["failed"] == 0


# ---- a real server -------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def transformers_serve(tmp_path_factory):
    """The address of a `transformers serve`, which splits thoughts off."""
    python = os.environ.get("SERVE_PYTHON")
    if not python:
        pytest.skip("set SERVE_PYTHON to a Python with torchvision and transformers[serving]")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [python, "-m", "transformers.cli.transformers", "serve", ROOT / "data" / "model",
               "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    with open(tmp_path_factory.mktemp("serve") / "log", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={
            "PATH": os.environ["PATH"], "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"})
    try:
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()
        process.wait()


def test_the_model_behind_transformers_serve_plays_as_it_does_here(transformers_serve, tmp_path):
    """40 items of both families, word for word: greedy on the CPU, the same preprocessing and
    template."""
    tasks = load_tasks(HELD_OUT, "offline")[::6]
    chat = ChatModel(transformers_serve, str(ROOT / "data" / "model"),
                     max_new_tokens=LIMITS.max_new_tokens, patience=120)
    chat.check()  # waits until it is there
    local, remote = tmp_path / "local", tmp_path / "remote"
    for out, options in ((local, {}), (remote, {"chat": chat})):
        out.mkdir()
        evaluate(out, tasks, **options)
    turns = [[[(turn["text"], turn["observation"]) for turn in row["turns"]] for row in items(out)]
             for out in (local, remote)]
    assert turns[0] == turns[1]
    assert [row["stop"] for row in items(local)] == [row["stop"] for row in items(remote)]
    assert (local / "predictions.json").read_bytes() == (remote / "predictions.json").read_bytes()
    assert any("<think>" in text for row in turns[0] for text,
               _ in row) and chat.usage["empty"] == 0


# ---- the released evaluation's ways --------------------------------------------------------------

CROP = {**QUESTION, "type": ["crop"],
        "question": "Read the text within the [100, 250, 500, 750] of the image."}


@pytest.mark.parametrize("code, run_instead", [
    ("part = image[10:20, 30:40]", "part = image[50:150, 40:200]"),
    ("part = image[y1 : y2, int(x[0]):x2, :]", "part = image[y1 : y2, int(x[0]):x2, :]"),
    ("a[1:2, 3:4]; b[:, 5:]", "a[50:150, 40:200]; b[50:150, 40:200]"),
    ("image.crop((1, 2, 3, 4))", "image.crop((1, 2, 3, 4))")])
def test_the_box_of_the_question_replaces_slices(code, run_instead):
    assert released_crop(code, CROP, (400, 200)) == run_instead
    assert released_crop(code, {**CROP, "type": ["dark"]}, (400, 200)) == code
    assert released_crop(code, {**CROP, "question": "Read it."}, (400, 200)) == code


def test_the_edited_code_is_what_runs():
    code = ("<code> ```python\nimport numpy as np\nfrom PIL import Image\n"
            "a = np.asarray(Image.open('path_to_input_image.jpg'))\n"
            "Image.fromarray(a[0:1, 0:1]).save('path_to_output_image.jpg')\n``` </code>")
    chain = [code, "<answer> a </answer>"]
    task = {**CROP, "family": "coding", "image": Image.new("RGB", (400, 200))}
    for edit, size in ((None, None), (released_crop, (160, 100))):
        with CodeTool(workers=1) as tool:
            [rollout], _ = roll_out(shipped(), [task], Tools(tool, edit=edit), Limits(2, 300, 4096),
                                    sampler=replay(shipped(), lambda task: chain))
        result = rollout.turns[0].result
        # a picture of one pixel is refused
        assert (result.image.size == size) if size else result.error


@pytest.mark.parametrize("code_reads", ["first", "newest"])
def test_code_reads_the_picture_that_the_flag_of_the_command_names(tmp_path, code_reads):
    """The same code twice, from an endpoint: the picture is what it was, if the second one reads what the first one made."""
    original = Image.effect_noise((56, 56), 90).convert("RGB")
    original.save(tmp_path / "sign.png")
    (tmp_path / "t.json").write_text(json.dumps([
        {"question": "q", "answers": ["7"], "image_path": "sign.png", "family": "coding"}]))
    invert = ("<code> ```python\nfrom PIL import Image, ImageOps\n"
              "image = ImageOps.invert(Image.open('path_to_input_image.jpg'))\n"
              "image.save('path_to_output_image.jpg', 'PNG')\n``` </code>")

    def reply(messages):
        turn = sum(message["role"] == "assistant" for message in messages)
        return invert if turn < 2 else "<answer> 7 </answer>"
    with ChatServer(reply) as server:
        status = main(["--api", server.url, "--model", "m", "--data", str(tmp_path / "t.json"), "--corpus", CORPUS,
                       "--output_dir", str(tmp_path / "out"), "--code_reads", code_reads])
    assert status == 0
    [row], inverted = items(tmp_path / "out"), ImageOps.invert(original)
    assert row["em"] == 1.0
    made = [Image.open(tmp_path / "out" / "items" / turn["image"]).convert("RGB") for turn in row["turns"][:2]]
    second = original if code_reads == "newest" else inverted
    assert [picture.tobytes() for picture in made] == [inverted.tobytes(), second.tobytes()]


def test_the_released_context_is_one_user_turn_with_the_newest_image():
    policy, picture = shipped(), Image.new("RGB", (112, 56), "red")
    task = {**QUESTION, "family": "coding", "image": picture}
    chain = ["<problem> {'rotation90'} </problem>",
             "<code> ```python\nresult = image.rotate(90, expand=True)\n``` </code>",
             "<answer> 7 </answer>"]
    seen = []

    def sampler(live):
        seen.append([(list(r.ids), list(r.images), sum(r.action_mask)) for r in live][0])
        return replay(policy, lambda task: chain)(live)
    with CodeTool(workers=1) as tool:
        [rollout], _ = roll_out(policy, [task], Tools(tool),
                                Limits(3, 96, 2048, released_context=True), sampler=sampler)
    assert rollout.answer == "7" and [len(images) for _, images, _ in seen] == [1, 1, 1]
    # the turned one alone
    assert seen[1][1][0] is seen[0][1][0] and seen[2][1][0].grid == (1, 8, 4)
    text = f"Which city?\n{chain[0]}\nWrite the code.\n{chain[1]}\nThe processed image."
    assert seen[2][0] == encode_prompt(policy, text, seen[2][1][0]) and seen[2][2] == 0
    limits = Limits(3, 24, 2048, released_context=True)
    # the policy itself
    assert isinstance(roll_out(policy, [task] * 2, Tools(), limits, temperature=0.0)[0][0], Rollout)
