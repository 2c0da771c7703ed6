"""The offline tasks with MAT's two halves: same seed, same bytes; training and held-out share nothing
that is asked for; the right chains solve the tasks through the real tools.

    python -m pytest tests/test_hard_tasks.py
"""
import filecmp
import importlib.util
import json
import random
import re
import sqlite3
import zlib
from collections import Counter
from contextlib import closing
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_tasks import assert_rate

from data.tasks import load_tasks
from reward import exact_match, f1_score
from rollout import Limits, Tools, replay, roll_out
from tools import CodeTool, SearchTool, parse_action

DATA = Path(__file__).parent.parent / "data"
SHIPPED = DATA / "offline" / "hard"
TASK_FILES = ["heldout_coding", "heldout_search", "heldout_text", "train_coding", "train_search"]
LIMITS = Limits(max_turns=4, max_new_tokens=96, max_tokens=512)  # as the laptop model is trained
NUM_DRAWS = 4000
HOP = {True: 0.80, False: 0.93}  # how often two hops are taken for one, with an image and without

spec = importlib.util.spec_from_file_location("make_hard_tasks", DATA / "make_hard_tasks.py")
make_hard_tasks = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_hard_tasks)
make_tasks = make_hard_tasks.make_tasks
PAIRS = [(split, pair) for split, pairs in make_hard_tasks.PAIRS.items() for pair in pairs]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder that the script writes with seed 0."""
    out = tmp_path_factory.mktemp("made")
    make_hard_tasks.write_tasks(0, out)
    return out


@pytest.fixture(scope="module")
def code():
    with CodeTool(workers=2, timeout=10.0) as tool:
        yield tool


@cache
def in_memory(name):
    """The tasks of a file, as the script makes them with seed 0."""
    split, family = name.split("_")
    if family == "coding":
        return make_hard_tasks.make_coding(0, split)
    return make_hard_tasks.make_search(0, split, family)


def read(name, folder=SHIPPED):
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def contents(index):
    """What a search index finds: passages, and every word with the passages and places where it stands."""
    with closing(sqlite3.connect(index)) as database:
        database.execute("CREATE VIRTUAL TABLE temp.places USING fts5vocab(main, words, instance)")
        rows = [database.execute(f"SELECT * FROM {table}").fetchall() for table in ("common", "temp.places")]
        return rows, [zlib.decompress(text)
                      for text, in database.execute("SELECT text FROM passages ORDER BY id")]


def files_of(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def pixels(image):
    return np.asarray(image.convert("RGB"), dtype=np.float64)  # (height, width, 3)


def error(image, other):
    """Mean absolute difference in levels of 255."""
    return np.abs(pixels(image) - pixels(other)).mean()


def is_readable(image, clean):
    """Upright, and with the contrast of a clean sign, whatever its colours.

    In grey levels an upright sign correlates with the clean one at 0.96 or more, a turned one at 0.46 or less. A repaired
    one has 0.78 or more of its contrast, a dark or bright one, or one repaired too little, 0.25 or less.
    """
    seen, wanted = (np.asarray(each.convert("L"), dtype=np.float64) for each in (image, clean))
    correlation = np.corrcoef(seen.ravel(), wanted.ravel())[0, 1]
    return bool(correlation > 0.9 and seen.std() > 0.6 * wanted.std())


def pair_of(pair, seed=0, **options):
    return make_hard_tasks.pair_task(random.Random(seed), pair, **options)


# Two words for the ally's animal, one for the country's own.
KNOWN = {("France", "ally"): "Italy", ("France", "stamp"): "owl", ("Italy", "stamp"): "small red heron"}


def question(hops=1, has_image=True, known=KNOWN, country="France", **options):
    return make_hard_tasks.search_task(random.Random(0), known, country, "stamp", hops=hops,
                                       has_image=has_image, **options)


def play(policy, tasks, chains, tools):
    """Rollouts of the tasks whose turns are recorded: chains[i] is what is said about tasks[i]."""
    tasks = [task | {"id": i} for i, task in enumerate(tasks)]
    return roll_out(policy, tasks, tools, LIMITS, sampler=replay(policy, lambda task: chains[task["id"]]))[0]


def assert_within_limits(rollouts):
    """Every chain came to its answer, and no turn was longer than the policy may sample."""
    for rollout in rollouts:
        assert rollout.stop == "answer", rollout.stop
        runs = re.findall("1+", "".join(map(str, rollout.action_mask)))
        assert len(runs) == len(rollout.turns) and max(map(len, runs)) <= LIMITS.max_new_tokens


# ---- the files -----------------------------------------------------------------------------------

@pytest.mark.thorough
def test_same_seed_gives_the_same_bytes(made, tmp_path):
    make_hard_tasks.write_tasks(0, tmp_path)
    assert files_of(tmp_path) == files_of(made)
    _, differ, failed = filecmp.cmpfiles(made, tmp_path, files_of(made), shallow=False)
    assert differ == failed == []


@pytest.mark.thorough
def test_shipped_files_are_what_the_script_makes(made):
    assert files_of(SHIPPED) == files_of(made)
    for name in files_of(made):
        if name.endswith((".json", ".jsonl")):
            assert (SHIPPED / name).read_bytes() == (made / name).read_bytes(), name
        elif name.endswith(".png"):  # another zlib may pack the same pixels otherwise
            assert error(Image.open(made / name), Image.open(SHIPPED / name)) == 0, name
    assert contents(SHIPPED / "corpus.sqlite") == contents(made / "corpus.sqlite")


@pytest.mark.parametrize("name", TASK_FILES)
def test_shipped_rows_and_images_are_of_seed_0(name):
    tasks, rows = in_memory(name), read(name)
    assert rows == [make_hard_tasks.row_of(task) for task in tasks]
    for task, row in list(zip(tasks, rows))[::8]:
        if row.get("image_path"):
            assert error(Image.open(SHIPPED / row["image_path"]), task["image"]) == 0
        elif "image_path" not in row:
            shown = row["ori_image_path" if task["type"] == ["crop"] else "processed_image_path"]
            assert error(Image.open(SHIPPED / shown), task["image"]) == 0
            clean = row["processed_image_path" if task["type"] == ["crop"] else "ori_image_path"]
            assert error(Image.open(SHIPPED / clean), task["clean"]) == 0


def test_another_seed_gives_other_facts_and_other_images():
    facts, others = make_hard_tasks.facts(0), make_hard_tasks.facts(1)
    assert sum(facts[key] == others[key] for key in facts) < 24  # some of 204 agree by chance
    assert [facts[country, "ally"] for country in make_tasks.FLAGS] != \
        [others[country, "ally"] for country in make_tasks.FLAGS]
    other = make_hard_tasks.make_coding(1, "heldout")[0]
    assert error(in_memory("heldout_coding")[0]["image"], other["image"]) > 1


def test_counts():
    halves = {name: Counter(row["split"] for row in read(name)) for name in TASK_FILES}
    assert halves == {"train_coding": {"simple": 96, "hard": 96}, "train_search": {"simple": 96, "hard": 96},
                      "heldout_coding": {"simple": 72, "hard": 96},
                      "heldout_search": {"simple": 64, "hard": 96}, "heldout_text": {"hard": 32}}
    assert len({row["id"] for name in TASK_FILES for row in read(name)}) == 192 + 192 + 168 + 160 + 32
    types = Counter("+".join(row["type"]) for row in read("heldout_coding"))
    assert types == {**dict.fromkeys(make_tasks.KINDS, 12),
                     "rotation90+overexposure": 48, "rotation180+dark": 48}
    glyphs = Counter(row["answers"][0] for row in read("heldout_coding") if row["split"] == "hard")
    assert glyphs == dict.fromkeys(make_tasks.GLYPHS, 8)
    steps = Counter(row["type"] for row in read("steps"))
    # 192 signs, 16 of them of kind none, which need no code; 96 questions of one hop and 96 of two
    assert steps == {"pre_problem": 192, "pre_code": 176, "pre_search": 96 + 2 * 96, "pre_answer": 384}


def test_twenty_questions_are_the_first_ten_of_each_half():
    few, rows = read("train_search_20"), read("train_search")
    assert len(few) == len({row["id"] for row in few}) == 20 and all(row in rows for row in few)
    assert Counter(row["split"] for row in few) == {"simple": 10, "hard": 10}
    assert few[::10] == [rows[0], rows[96]]
    assert len({(row["country"], row["question"]) for row in few}) == 20


def test_every_named_image_exists_in_its_size_and_no_other_image_does():
    seen = {}
    for row in sum(map(read, TASK_FILES), []):
        if row["family"] == "search":
            seen[row["image_path"]] = (84, 56)
        else:
            seen[row["ori_image_path"]] = (56, 56)
            seen[row["processed_image_path"]] = (28, 28) if row["type"] == ["crop"] else (56, 56)
    del seen[None]  # text only
    for path, size in seen.items():
        with Image.open(SHIPPED / path) as image:
            assert (image.size, image.mode) == (size, "RGB"), path
    assert set(seen) == {f"images/{name}" for name in files_of(SHIPPED / "images")}
    assert {row["image_path"] for row in read("steps")} <= set(seen)


@pytest.mark.parametrize("name", [*TASK_FILES, "train_search_20"])
def test_rows_load_as_episodes(name):
    tasks, rows = load_tasks(SHIPPED / f"{name}.json", mode="episode"), read(name)
    family = "coding" if "coding" in name else "search"
    assert {task["family"] for task in tasks} == {family}
    for key in ("id", "split", "type", "question"):
        assert [task[key] for task in tasks] == [row[key] for row in rows]
    assert [task["answers"] for task in tasks] == [row.get("answers") or [row["answer"]] for row in rows]
    for task, row in zip(tasks, rows):
        if family == "search":
            hops = "one hop" if task["split"] == "simple" else "two hops"
            assert task["type"] == ([hops, "text"] if "text" in name else [hops])
            assert (task["image"] is None) == ("text" in name)
        else:  # the degraded sign, or the scene
            shown = row["ori_image_path" if row["type"] == ["crop"] else "processed_image_path"]
            assert Path(task["image"]) == SHIPPED / shown
            assert len(task["type"]) == (1 if task["split"] == "simple" else 2)


def test_rows_load_as_steps():
    tasks = load_tasks(SHIPPED / "steps.json", mode="step")
    assert Counter(task["family"] for task in tasks) == {"coding": 192 + 176 + 192, "search": 288 + 192}
    kinds = Counter((task["type"][0], parse_action(task["solution"]).kind) for task in tasks)
    assert all(name == f"pre_{kind}" for name, kind in kinds) and len(kinds) == 4
    assert all(task["answers"] and task["image"] for task in tasks)


# ---- nothing held out is trained on --------------------------------------------------------------

def test_training_and_held_out_share_no_sign_and_no_pair_of_degradations():
    signs = [{triple for task in in_memory(f"{split}_coding") for triple in task["signs"]}
             for split in ("train", "heldout")]
    assert len(signs[0]) > 100 and len(signs[1]) > 80 and not signs[0] & signs[1]
    pairs = [{tuple(row["type"]) for row in read(f"{split}_coding") if row["split"] == "hard"}
             for split in ("train", "heldout")]
    assert pairs == [{("rotation90", "dark"), ("rotation180", "overexposure")},
                     {("rotation90", "overexposure"), ("rotation180", "dark")}]
    singles = {kind for row in read("train_coding") if row["split"] == "simple" for kind in row["type"]}
    assert singles == set(make_tasks.KINDS)  # each half of a pair that is held out is in training


def test_training_and_held_out_share_no_fact_that_is_asked_for():
    known, asked = make_hard_tasks.facts(0), {}
    for name in ("train_search", "heldout_search", "heldout_text"):
        owners = [known[row["country"], "ally"] if "two hops" in row["type"] else row["country"]
                  for row in read(name)]
        asked[name] = {(owner, row["attribute"]) for owner, row in zip(owners, read(name))}
        assert asked[name] <= set(make_tasks.search_pairs(name.split("_")[0]))
    assert not asked["train_search"] & (asked["heldout_search"] | asked["heldout_text"])
    assert len(asked["train_search"]) > 96 and len(asked["heldout_search"]) == 64
    assert len(asked["heldout_text"]) == 32  # each once, as there is no image to tell two apart


def test_whose_ally_is_asked_for_in_training_is_not_in_held_out():
    """Who learns the allies of training by heart, and leaves out the first search, gains nothing."""
    train, heldout, text = [{row["country"] for row in read(name) if row["split"] == "hard"}
                            for name in ("train_search", "heldout_search", "heldout_text")]
    assert heldout == text == set(make_tasks.FLAGS) - train and len(train) == 6


# ---- the facts -----------------------------------------------------------------------------------

def test_allies_are_a_permutation_without_fixed_points():
    for seed in range(200):
        known = make_hard_tasks.facts(seed)
        allies = {country: known[country, "ally"] for country in make_tasks.FLAGS}
        assert set(allies.values()) == set(make_tasks.FLAGS)
        assert all(country != ally for country, ally in allies.items())


def test_every_fact_is_one_document():
    known, corpus = make_hard_tasks.facts(0), make_hard_tasks.make_corpus(0)
    assert [json.loads(line) for line in (SHIPPED / "corpus.jsonl").read_text().splitlines()] == corpus
    titles = {row["title"]: row["contents"] for row in corpus}
    assert len(titles) == len({row["id"] for row in corpus}) == len(known) == 192 + 12
    assert titles["stamp of France"] == f"The animal on the stamp of France is the {known['France', 'stamp']}."
    assert titles["ally of France"] == f"The ally of France is {known['France', 'ally']}."


def test_the_answer_to_two_hops_is_the_fact_of_the_ally():
    known = make_hard_tasks.facts(0)
    for row in read("heldout_search") + read("heldout_text") + read("train_search"):
        place = row["country"] if row["image_path"] is None else "this country"
        owner = row["country"]
        if row["split"] == "hard":
            place, owner = f"the ally of {place}", known[owner, "ally"]
        assert row["question"] == f"Which animal is on the {row['attribute']} of {place}?"
        assert row["answer"] == known[owner, row["attribute"]]


def test_animals_have_one_to_three_words_so_that_f1_is_not_exact_match():
    animals = [animal for (_, attribute), animal in make_hard_tasks.facts(0).items() if attribute != "ally"]
    shape = re.compile(f"(({'|'.join(make_hard_tasks.SIZES)}) )?(({'|'.join(make_hard_tasks.COLOURS)}) )?"
                       f"({'|'.join(make_tasks.ANIMALS)})")
    assert all(map(shape.fullmatch, animals))
    words = Counter(len(animal.split()) for animal in animals)
    assert sorted(words) == [1, 2, 3] and min(words.values()) > len(animals) / 4
    for name in ("train_search", "heldout_search", "heldout_text"):
        for half in {row["split"] for row in read(name)}:
            lengths = Counter(len(row["answer"].split()) for row in read(name) if row["split"] == half)
            assert sorted(lengths) == [1, 2, 3] and min(lengths.values()) > lengths.total() / 5
    # The noun alone: 2 · 1 / (1 + n)
    scores = {len(gold.split()): (f1_score(gold.split()[-1], [gold]), exact_match(gold.split()[-1], [gold]))
              for gold in animals}
    assert scores == {1: (1.0, 1.0), 2: (pytest.approx(2 / 3), 0.0), 3: (0.5, 0.0)}


# ---- pairs ---------------------------------------------------------------------------------------

PAIR_CHAIN = [
    "<think> The sign is too dark. </think>\n<problem> {'rotation90', 'dark'} </problem>",
    "<think> I repair it. </think>\n<code>\n```python\n"
    "from PIL import Image\n"
    "image = Image.open('path_to_input_image.jpg')\n"
    "image = image.rotate(90)\n"
    "image = image.point(lambda p: p * 8)\n"
    "image.save('path_to_output_image.jpg')\n"
    "```\n</code>",
    "<think> Now I can read it. </think>\n<answer> K </answer>",
]


def test_right_chain_of_a_pair_repairs_both_in_one_program_as_in_mat():
    assert make_hard_tasks.right_chain(pair_of(("rotation90", "dark"), glyph="K")) == PAIR_CHAIN
    bright = make_hard_tasks.right_chain(pair_of(("rotation180", "overexposure"), glyph="K"))
    assert bright[0] == ("<think> The sign is too bright. </think>\n"
                         "<problem> {'rotation180', 'overexposure'} </problem>")
    assert "\nimage = image.rotate(180)\nimage = image.point(lambda p: 255 - (255 - p) * 8)\n" in bright[1]


def test_right_chain_of_one_degradation_is_that_of_the_simple_tasks():
    for kind in make_tasks.KINDS:
        task = make_tasks.coding_task(random.Random(0), kind)
        assert make_hard_tasks.right_chain(task) == make_tasks.right_chain(task)


@pytest.mark.parametrize("split, pair", PAIRS, ids=str)
def test_a_pair_task_has_both_degradations(split, pair):
    for seed in range(20):
        task = pair_of(pair, seed, split=split)
        image = task["clean"]
        for kind in pair:
            image = make_tasks.degrade(image, kind)
            alone = make_tasks.degrade(task["clean"], kind)
            assert not is_readable(alone, task["clean"]) and error(task["image"], alone) > 3
        assert error(task["image"], image) == 0 and not is_readable(task["image"], task["clean"])
        assert task["type"] == list(pair) and set(task["signs"]) <= set(make_tasks.sign_triples(split))


@pytest.mark.parametrize("split, pair", PAIRS, ids=str)
def test_the_right_chain_of_a_pair_makes_the_sign_readable(code, split, pair):
    tasks = [pair_of(pair, seed, split=split) for seed in range(5)]
    repairs = [parse_action(make_hard_tasks.right_chain(task)[1]).content for task in tasks]
    for task, result in zip(tasks, code.run_many([(text, task["image"]) for text, task in zip(repairs, tasks)])):
        # 12 as for one degradation (tests/test_tasks.py), and 2 for the JPEG that the code writes
        assert result.ok and error(result.image, task["clean"]) <= 14
        assert is_readable(result.image, task["clean"])


def two_repairs(task, order):
    """The turns of a policy that repairs one degradation, looks again, and repairs the other."""
    label, *_, answer = make_hard_tasks.right_chain(task)
    return [label] + [make_hard_tasks.code_turn("I repair it.", make_tasks.programs(kind, None)[0])
                      for kind in order] + [answer]


@pytest.mark.parametrize("split, pair", PAIRS, ids=str)
def test_two_repairs_add_up_where_code_reads_the_newest_picture_only(policy, code, split, pair):
    tasks = [pair_of(pair, seed, split=split) for seed in range(3) for _ in range(2)]
    chains = [two_repairs(task, order) for task, order in zip(tasks, [pair, pair[::-1]] * 3)]
    added = play(policy, tasks, chains, Tools(code, newest=True))
    apart = play(policy, tasks, chains, Tools(code))
    assert_within_limits(added)
    for task, newest, first in zip(tasks, added, apart):
        clean = task["clean"]
        assert len(newest.pictures) == len(first.pictures) == 3  # the task's, and two that code made
        assert not is_readable(newest.pictures[1], clean)  # one repair is not enough
        # Two JPEGs, of which the first may be of a dark or bright sign: its errors are repaired times 8
        assert is_readable(newest.pictures[2], clean) and error(newest.pictures[2], clean) <= 22
        assert newest.pictures[1].tobytes() == first.pictures[1].tobytes()
        assert not is_readable(first.pictures[2], clean) and error(first.pictures[2], clean) > 35
        assert exact_match(newest.answer, task["answers"]) == 1


# ---- second looks --------------------------------------------------------------------------------

@pytest.mark.parametrize("draws", [12, pytest.param(150, marks=pytest.mark.thorough)])
@pytest.mark.parametrize("kind", ["rotation90", "rotation180", "dark", "overexposure"])
def test_a_second_look_ends_with_a_readable_sign(policy, code, kind, draws):
    tasks = [make_tasks.coding_task(random.Random(seed), kind) for seed in range(draws)]
    chains = [make_hard_tasks.second_look(task, random.Random(seed)) for seed, task in enumerate(tasks)]
    rollouts = play(policy, tasks, chains, Tools(code, newest=True))
    assert_within_limits(rollouts)
    labels = Counter()
    for task, rollout in zip(tasks, rollouts):
        assert [turn.action.kind for turn in rollout.turns] == ["problem", "code", "code", "answer"]
        _, missed, repaired = rollout.pictures
        # Colours may be off by a mean of up to 50 levels: light that was changed twice is changed too much
        assert not is_readable(missed, task["clean"]) and is_readable(repaired, task["clean"])
        assert error(repaired, task["clean"]) < 50
        assert rollout.answer == task["answers"][0]
        # No pair: one degradation, one label
        assert task["type"] == [kind] and error(task["image"], make_tasks.degrade(task["clean"], kind)) == 0
        labels[parse_action(rollout.turns[0].text).content.strip("{'}")] += 1
    assert set(labels) <= {kind, "dark", "overexposure"}
    if draws > 100 and kind.startswith("rotation"):  # one in five is taken for a fault of light
        assert_rate(labels["dark"], draws, 0.1)
        assert_rate(labels["overexposure"], draws, 0.1)
    elif not kind.startswith("rotation"):
        assert set(labels) == {kind}


def test_a_second_look_says_what_is_left_to_repair():
    task = make_tasks.coding_task(random.Random(0), "rotation90", "K")
    chains = [make_hard_tasks.second_look(task, random.Random(seed)) for seed in range(20)]
    wrong_way = next(turns for turns in chains if "{'rotation90'}" in turns[0])
    assert wrong_way[0] == "<think> The sign lies on its side. </think>\n<problem> {'rotation90'} </problem>"
    assert "image.rotate(-90)" in wrong_way[1]
    assert wrong_way[2].startswith("<think> The sign is upside down. </think>\n<code>")
    assert "image.rotate(180)" in wrong_way[2] and wrong_way[3] == PAIR_CHAIN[2]
    taken_for_dark = next(turns for turns in chains if "{'dark'}" in turns[0])
    assert "lambda p: p * 2" in taken_for_dark[1] and "image.rotate(90)" in taken_for_dark[2]
    assert taken_for_dark[2].startswith("<think> The sign lies on its side. </think>")


# ---- searches ------------------------------------------------------------------------------------

TWO_HOPS = ["<think> This is the flag of France. </think>\n<search> ally of France </search>",
            "<think> The ally is Italy. </think>\n<search> stamp of Italy </search>",
            "<think> I found it. </think>\n<answer> small red heron </answer>"]


def test_questions_name_the_country_where_there_is_no_flag():
    assert question()["question"] == "Which animal is on the stamp of this country?"
    assert question(has_image=False)["question"] == "Which animal is on the stamp of France?"
    assert question(2)["question"] == "Which animal is on the stamp of the ally of this country?"
    assert question(2, False)["question"] == "Which animal is on the stamp of the ally of France?"
    assert question(2)["answers"] == ["small red heron"] and question()["answers"] == ["owl"]
    assert question(2, False)["image"] is None and question()["image"].size == (84, 56)


@pytest.mark.parametrize("hops, has_image", [*product((1, 2), (True, False))])
def test_right_chain_of_a_question_is_that_of_no_noise(hops, has_image):
    task, expected = question(hops, has_image), TWO_HOPS
    if hops == 1:
        expected = ["<think> This is the flag of France. </think>\n<search> stamp of France </search>",
                    "<think> I found it. </think>\n<answer> owl </answer>"]
    if not has_image:
        expected = [turn.replace("This is the flag of", "The question is about") for turn in expected]
    assert make_hard_tasks.right_chain(task) == expected
    assert all(make_hard_tasks.search_chain(task, random.Random(seed), noise=0.0) == expected for seed in range(50))


@pytest.mark.parametrize("stride", [6, pytest.param(1, marks=pytest.mark.thorough)])
@pytest.mark.parametrize("name", ["train_search", "heldout_search", "heldout_text"])
def test_right_chains_find_the_gold_in_the_shipped_corpus(policy, name, stride):
    tasks = in_memory(name)[::stride]
    search = SearchTool(f"sqlite:{SHIPPED / 'corpus.sqlite'}", topk=3)
    rollouts = play(policy, tasks, list(map(make_hard_tasks.right_chain, tasks)), Tools(search=search))
    assert_within_limits(rollouts)
    for task, rollout in zip(tasks, rollouts):
        hops = 1 if task["split"] == "simple" else 2
        found = [turn.result.text for turn in rollout.turns[:-1]]
        assert len(found) == hops and len(rollout.images) == (name != "heldout_text")
        assert f" is the {task['answers'][0]}. 2. Content" in found[-1]  # the first of three passages
        if hops == 2:
            ally = task["facts"][task["country"], "ally"]
            assert found[0].startswith(f"1. Content: The ally of {task['country']} is {ally}. ")
        assert exact_match(rollout.answer, task["answers"]) == 1


# ---- the weak annotator --------------------------------------------------------------------------

def draws_of(task, noise=1.0):
    rng = random.Random(0)
    return [make_hard_tasks.search_chain(task, rng, noise) for _ in range(NUM_DRAWS)]


def queries(turns):
    return [query for turn in turns for query in re.findall("<search> (.*) </search>", turn)]


def answer_of(turns):
    return re.search("<answer> (.*) </answer>", turns[-1])[1]


# France feels familiar, Ireland does not
@pytest.mark.parametrize("country, skipped", [("Ireland", 0.2), ("France", 0.6)])
@pytest.mark.parametrize("hops, has_image", [*product((1, 2), (True, False))])
def test_rates_of_mistakes(country, skipped, hops, has_image):
    known = {(owner, attribute): value if attribute == "ally" else f"red {value.split()[-1]}"
             for (owner, attribute), value in make_hard_tasks.facts(0).items()}
    drawn = draws_of(question(hops, has_image, known, country))
    searched = [turns for turns in drawn if len(turns) > 1]
    assert_rate(NUM_DRAWS - len(searched), NUM_DRAWS, skipped)

    # hop: asks for the country's own animal
    asked = [queries(turns) for turns in searched]
    direct = sum(len(each) == 1 for each in asked)
    if hops == 1:
        assert direct == len(asked)
    else:
        assert_rate(direct, len(asked), HOP[has_image])
        assert all(first.startswith("ally of ") for first, *more in asked if more)

    # country, attribute
    countries = Counter(each[0].partition(" of ")[2] for each in asked)
    assert_rate(len(asked) - countries[country], len(asked), 0.25)
    assert countries.keys() == set(make_tasks.FLAGS)
    attributes = Counter(each[-1].partition(" of ")[0] for each in asked)
    assert_rate(len(asked) - attributes["stamp"], len(asked), 0.15)
    assert attributes.keys() == set(make_tasks.ATTRIBUTES)

    # short: the noun alone of what was read, which is otherwise copied
    shortened = 0
    for turns, each in zip(searched, asked):
        attribute, owner = each[-1].split(" of ")
        if len(each) == 2:
            assert owner == known[each[0].removeprefix("ally of "), "ally"]
        fact, answer = known[owner, attribute], answer_of(turns)
        assert answer in (fact, fact.split()[-1])
        shortened += answer != fact
    assert_rate(shortened, len(asked), 0.3)

    # format: one turn without a thought
    thoughts = [sum("<think>" in turn for turn in turns) for turns in searched]
    bare = sum(count < len(turns) for count, turns in zip(thoughts, searched))
    assert_rate(bare, len(searched), 0.08)
    hasty = [turns for turns in drawn if len(turns) == 1]
    assert_rate(sum("<think>" not in turns[0] for turns in hasty), len(hasty), 0.08)
    assert all(count >= len(turns) - 1 for count, turns in zip(thoughts, searched))


def test_without_a_search_the_answer_is_a_guess():
    task = question(known=make_hard_tasks.facts(0) | {("France", "stamp"): "heron"})
    hasty = [turns for turns in draws_of(task) if len(turns) == 1]
    answers = Counter(map(answer_of, hasty))
    assert answers.keys() == set(make_tasks.ANIMALS)
    assert_rate(answers["heron"], len(hasty), 1 / 24)


def test_a_wrong_country_stands_in_the_thought_and_in_the_query():
    known = make_hard_tasks.facts(0)
    for turns in draws_of(question(2, known=known))[:500]:
        named = re.search("This is the flag of (.*). </think>", turns[0])
        if named and len(turns) > 1:
            assert queries(turns)[0].endswith(f" of {named[1]}")


def test_noise_scales_the_mistakes():
    halved = draws_of(question(2, known=make_hard_tasks.facts(0), country="Ireland"), noise=0.5)
    searched = [turns for turns in halved if len(turns) > 1]
    assert_rate(NUM_DRAWS - len(searched), NUM_DRAWS, 0.1)
    assert_rate(sum(len(queries(turns)) == 1 for turns in searched), len(searched), HOP[True] / 2)


# ---- steps ---------------------------------------------------------------------------------------

def test_ids_of_steps_are_distinct_and_their_solutions_are_the_right_chains():
    rows = read("steps")
    assert len({row["id"] for row in rows}) == len(rows) == 1040
    turns = [turn for name in ("train_coding", "train_search") for task in in_memory(name)
             for turn in make_hard_tasks.right_chain(task)]
    assert [row["solution"] for row in rows] == turns


def test_the_second_search_reads_what_the_first_one_found():
    first, second, answer = make_hard_tasks.step_rows(question(2, task_id="t"))
    assert [row["solution"] for row in (first, second, answer)] == TWO_HOPS
    assert [row["id"] for row in (first, second, answer)] == ["t-search", "t-search-again", "t-answer"]
    asked = "Which animal is on the stamp of the ally of this country?"
    found = "<information> 1. Content: The ally of France is Italy. </information>"
    assert first["problem"] == asked
    assert second["problem"] == f"{asked}\n{TWO_HOPS[0]}\n{found}"
    assert answer["problem"] == (
        f"{second['problem']}\n{TWO_HOPS[1]}\n"
        "<information> 1. Content: The animal on the stamp of Italy is the small red heron. </information>")
    assert {row["image_path"] for row in (first, second, answer)} == {"images/t.png"}


def test_the_step_of_a_pair_has_both_repairs_in_one_code():
    problem, code, answer = make_hard_tasks.step_rows(pair_of(("rotation90", "dark"), glyph="K", task_id="t"))
    assert [row["solution"] for row in (problem, code, answer)] == PAIR_CHAIN
    assert problem["image_path"] == code["image_path"] == "images/t-processed.png"
    assert answer["image_path"] == "images/t-original.png"  # the clean sign
    assert answer["problem"] == f"What character is on the sign?\n{PAIR_CHAIN[0]}\n{PAIR_CHAIN[1]}"
