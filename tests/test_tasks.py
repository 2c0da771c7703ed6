"""The offline tasks: same seed, same bytes; the splits share nothing; the right code repairs the
signs.

    python -m pytest tests/test_tasks.py
"""
import collections
import filecmp
import importlib.util
import json
import math
import random
import sqlite3
import zlib
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

DATA = Path(__file__).parent.parent / "data"
JSON_FILES = ["corpus.jsonl", "heldout.json", "steps.json", "train.json"]
NUM_DRAWS = 4000

spec = importlib.util.spec_from_file_location("make_tasks", DATA / "make_tasks.py")
make_tasks = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_tasks)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder that the script writes with seed 0."""
    out = tmp_path_factory.mktemp("made")
    make_tasks.write_tasks(0, out)
    return out


def read(folder, name):
    return json.loads((folder / name).read_text(encoding="utf-8"))


def contents(index):
    """The rows of a search index: passages, and every word with the passages and places where it
    stands."""
    with closing(sqlite3.connect(index)) as database:
        database.execute("CREATE VIRTUAL TABLE temp.places USING fts5vocab(main, words, instance)")
        rows = [database.execute(f"SELECT * FROM {table}").fetchall()
                for table in ("common", "temp.places")]
        return rows, [zlib.decompress(text)
                      for text, in database.execute("SELECT text FROM passages ORDER BY id")]


def pixels(image):
    return np.asarray(image.convert("RGB"), dtype=np.float64)  # (height, width, 3)


def error(image, other):
    """Mean absolute difference in levels of 255."""
    return np.abs(pixels(image) - pixels(other)).mean()


def files_of(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def sign(kind, seed=0, **options):
    return make_tasks.coding_task(random.Random(seed), kind, **options)


def flag(seed=0, country="France", attribute="stamp"):
    return make_tasks.search_task(random.Random(seed), {(country, attribute): "heron"}, country,
                                  attribute)


# ---- the files -----------------------------------------------------------------------------------

@pytest.mark.thorough
def test_same_seed_gives_the_same_bytes(made, tmp_path):
    make_tasks.write_tasks(0, tmp_path)
    assert files_of(tmp_path) == files_of(made)
    _, differ, failed = filecmp.cmpfiles(made, tmp_path, files_of(made), shallow=False)
    assert differ == failed == []


def test_another_seed_gives_other_facts_and_other_images():
    facts, others = make_tasks.facts(0), make_tasks.facts(1)
    assert sum(facts[pair] == others[pair] for pair in facts) < 24  # 8 of 192 agree by chance
    assert error(make_tasks.make_split(0, "train")[0]["image"],
                 make_tasks.make_split(1, "train")[0]["image"]) > 1


@pytest.mark.thorough
def test_shipped_files_are_what_the_script_makes(made):
    shipped = DATA / "offline"
    assert set(files_of(made)) <= set(files_of(shipped))
    for name in JSON_FILES:
        assert (shipped / name).read_bytes() == (made / name).read_bytes(), name
    assert files_of(made / "images") == files_of(shipped / "images")
    for name in files_of(made / "images"):
        assert error(Image.open(made / "images" / name),
                     Image.open(shipped / "images" / name)) == 0, name


def test_counts(made):
    train, heldout = read(made, "train.json"), read(made, "heldout.json")
    assert collections.Counter(row["family"] for row in train) == {"coding": 192, "search": 192}
    assert collections.Counter(row["family"] for row in heldout) == {"coding": 144, "search": 96}
    kinds = collections.Counter(row["type"][0] for row in heldout if row["family"] == "coding")
    assert kinds == dict.fromkeys(make_tasks.KINDS, 24)
    glyphs = collections.Counter(row["answers"][0] for row in heldout if row["family"] == "coding")
    assert glyphs == dict.fromkeys(make_tasks.GLYPHS, 12)
    assert len({row["id"] for row in train + heldout}) == 624
    assert len((made / "corpus.jsonl").read_text().splitlines()) == 192
    assert contents(made / "corpus.sqlite") == contents(DATA / "offline" / "corpus.sqlite")
    types = collections.Counter(row["type"] for row in read(made, "steps.json"))
    # 192 coding chains, 32 of them of kind none, which need no code; 192 search chains
    assert types == {"pre_problem": 192, "pre_code": 160, "pre_search": 192, "pre_answer": 384}


def test_rows_are_in_the_schema_of_mat(made):
    assert read(made, "train.json")[3] == {
        "id": "train-coding-003", "family": "coding", "question": "What character is on the sign?",
        "answers": ["C"],
        "ori_image_path": "images/train-coding-003-original.png",
        "processed_image_path": "images/train-coding-003-processed.png", "type": ["dark"],
        "split": "train"}
    row = read(made, "heldout.json")[144]
    assert row["image_path"] == "images/heldout-search-000.png"
    assert row["question"] == f"Which animal is on the {row['attribute']} of this country?"
    assert row["answer"] == make_tasks.facts(0)[row["country"], row["attribute"]]
    assert list(row) == ["id", "family", "question", "answer", "image_path", "split", "country",
                         "attribute"]


def test_every_named_image_exists_in_its_size_and_no_other_image_does(made):
    seen = {}
    for row in read(made, "train.json") + read(made, "heldout.json"):
        if row["family"] == "search":
            seen[row["image_path"]] = (84, 56)
        else:
            seen[row["ori_image_path"]] = (56, 56)
            seen[row["processed_image_path"]] = (28, 28) if row["type"] == ["crop"] else (56, 56)
            is_same = row["ori_image_path"] == row["processed_image_path"]
            assert is_same == (row["type"] == ["none"])
    for path, size in seen.items():
        with Image.open(made / path) as image:
            assert (image.size, image.mode) == (size, "RGB"), path
    assert set(seen) == {f"images/{name}" for name in files_of(made / "images")}
    assert {row["image_path"] for row in read(made, "steps.json")} <= set(seen)


def test_the_splits_share_no_sign_and_no_fact():
    for members, sizes in ((make_tasks.sign_triples, (192, 96)),
                           (make_tasks.search_pairs, (128, 64))):
        train, heldout = set(members("train")), set(members("heldout"))
        assert (len(train), len(heldout)) == sizes and not train & heldout
    used = {split: make_tasks.make_split(0, split) for split in ("train", "heldout")}
    for split, tasks in used.items():
        triples = {triple for task in tasks if task["family"] == "coding"
                   for triple in task["signs"]}
        pairs = {(task["country"], task["attribute"]) for task in tasks if task["family"]
                 == "search"}
        assert triples <= set(make_tasks.sign_triples(split))
        assert pairs == set(make_tasks.search_pairs(split))


def test_every_fact_is_one_document():
    facts, corpus = make_tasks.facts(0), make_tasks.make_corpus(0)
    titles = {row["title"]: row["contents"] for row in corpus}
    assert len(titles) == len({row["id"] for row in corpus}) == 192
    animal = facts["France", "stamp"]
    assert titles["stamp of France"] == f"The animal on the stamp of France is the {animal}."
    words = [*make_tasks.ATTRIBUTES, *make_tasks.ANIMALS, *map(str.lower, make_tasks.FLAGS)]
    assert len(set(words)) == 16 + 24 + 12  # no word has two meanings


# ---- the images ----------------------------------------------------------------------------------

# What the right code does, in Pillow, and how far from clean it may end, in levels of 255.
REPAIRS = {
    "none": (lambda image: image, 0),
    "rotation90": (lambda image: image.rotate(90), 0),
    "rotation180": (lambda image: image.rotate(180), 0),
    # 0.12 * 8 = 0.96, and rounding to 1/8
    "dark": (lambda image: image.point(lambda p: p * 8), 12),
    "overexposure": (lambda image: image.point(lambda p: 255 - (255 - p) * 8), 12),
}


@pytest.mark.parametrize("kind", REPAIRS)
def test_the_right_code_makes_the_sign_readable(kind):
    repair, tolerance = REPAIRS[kind]
    for seed in range(20):
        task = sign(kind, seed)
        assert error(repair(task["image"]), task["clean"]) <= tolerance
        if kind != "none":
            assert error(task["image"], task["clean"]) > 20


@pytest.mark.parametrize("box, corner", [([0, 0, 500, 500], (0, 0)), ([500, 0, 1000, 500], (28, 0)),
                                         ([0, 500, 500, 1000], (0, 28)),
                                         ([500, 500, 1000, 1000], (28, 28))])
def test_the_box_cuts_the_named_sign_out_of_the_scene(box, corner):
    task = next(task for task in (sign("crop", seed) for seed in range(100)) if task["box"] == box)
    x, y = corner
    crop = task["image"].crop([v * task["image"].width // 1000 for v in box])
    assert task["question"] == f"What character is on the sign within {box} of the image?"
    assert crop.size == (28, 28) and error(crop, task["clean"]) == 0
    assert error(task["image"].crop((x, y, x + 28, y + 28)), task["clean"]) == 0
    quarter = make_tasks.QUARTERS.index(box)
    assert task["signs"][quarter][0] == task["answers"][0]
    assert len({glyph for glyph, _, _ in task["signs"]}) == 4  # only one of the four is the answer


def test_rotation_is_clockwise_and_the_bar_shows_it():
    clean = pixels(sign("none")["image"])
    assert clean[-6:].mean() < 100 < clean[:6].mean()  # a dark bar along the bottom
    assert pixels(sign("rotation90")["image"])[:, :6].mean() < 100  # the bottom has become the left
    assert pixels(sign("rotation180")["image"])[:6].mean() < 100


def test_a_crop_is_no_degradation_of_one_sign():
    with pytest.raises(ValueError, match="crop"):
        make_tasks.degrade(sign("none")["image"], "crop")


def test_flags_have_their_stripes_in_order():
    italy = pixels(flag(country="Italy")["image"])
    assert italy.shape == (56, 84, 3)
    green, white, red = italy[:, :28], italy[:, 28:56], italy[:, 56:]
    assert green.mean((0, 1)).argmax() == 1 and white.mean() > 230
    assert red.mean((0, 1)).argmax() == 0
    germany = pixels(flag(country="Germany")["image"])
    assert germany[:18].mean() < 20 and germany[20:36].mean((0, 1)).argmax() == 0
    # Gold: red and green, no blue
    assert germany[39:, :, 2].mean() < 20 < 190 < germany[39:, :, 1].mean()


def test_flags_of_two_countries_differ_more_than_two_of_one():
    flags = {country: [flag(seed, country)["image"] for seed in range(5)]
             for country in make_tasks.FLAGS}
    within = max(error(images[0], image) for images in flags.values() for image in images)
    between = min(error(a, b) for country in flags for other in flags if country != other
                  for a in flags[country] for b in flags[other])
    assert within < between


# ---- the chains ----------------------------------------------------------------------------------

DARK_CHAIN = [
    "<think> The sign is too dark. </think>\n<problem> {'dark'} </problem>",
    "<think> I repair it. </think>\n<code>\n```python\n"
    "from PIL import Image\n"
    "image = Image.open('path_to_input_image.jpg')\n"
    "image = image.point(lambda p: p * 8)\n"
    "image.save('path_to_output_image.jpg')\n"
    "```\n</code>",
    "<think> Now I can read it. </think>\n<answer> K </answer>",
]


def test_right_chain_of_a_dark_sign():
    assert make_tasks.right_chain(sign("dark", glyph="K")) == DARK_CHAIN


@pytest.mark.parametrize("kind, look, line", [
    ("rotation90", "The sign lies on its side.", "image = image.rotate(90)"),
    ("rotation180", "The sign is upside down.", "image = image.rotate(180)"),
    ("overexposure", "The sign is too bright.",
     "image = image.point(lambda p: 255 - (255 - p) * 8)"),
])
def test_right_chain_of_the_other_degradations(kind, look, line):
    expected = [DARK_CHAIN[0].replace("The sign is too dark.", look).replace("dark", kind),
                DARK_CHAIN[1].replace("image = image.point(lambda p: p * 8)", line), DARK_CHAIN[2]]
    assert make_tasks.right_chain(sign(kind, glyph="K")) == expected


def test_right_chain_of_a_clear_sign_has_no_code():
    assert make_tasks.right_chain(sign("none", glyph="4")) == [
        "<think> The sign is clear. </think>\n<problem> {'none'} </problem>",
        "<think> Now I can read it. </think>\n<answer> 4 </answer>"]


def test_right_chain_of_a_scene():
    task = next(task for task in (sign("crop", seed) for seed in range(100)) if task["box"]
                == [500, 0, 1000, 500])
    problem, code, answer = make_tasks.right_chain(task)
    assert problem == "<think> The scene has many signs. </think>\n<problem> {'crop'} </problem>"
    assert ("\nbox = [500, 0, 1000, 500]\n"
            "image = image.crop([v * image.width // 1000 for v in box])\nimage.save(") in code
    assert answer.endswith(f"<answer> {task['answers'][0]} </answer>")


def test_right_chain_of_a_search():
    assert make_tasks.right_chain(flag()) == [
        "<think> This is the flag of France. </think>\n<search> stamp of France </search>",
        "<think> I found it. </think>\n<answer> heron </answer>"]


def test_steps_are_the_right_chain_with_its_past_pasted():
    task = sign("dark", glyph="K", task_id="t")
    problem, code, answer = make_tasks.step_rows(task)
    assert [row["solution"] for row in (problem, code, answer)] == DARK_CHAIN
    assert problem["problem"] == "What character is on the sign?"
    assert answer == {
        # The clean sign
        "id": "t-answer", "family": "coding", "image_path": "images/t-original.png",
        "problem": f"What character is on the sign?\n{DARK_CHAIN[0]}\n{DARK_CHAIN[1]}",
        "solution": DARK_CHAIN[2], "type": "pre_answer", "answers": ["K"]}
    assert problem["image_path"] == code["image_path"] == "images/t-processed.png"
    crop_rows = make_tasks.step_rows(sign("crop", task_id="t"))
    assert [row["image_path"]
            for row in crop_rows] == 2 * ["images/t-original.png"] + ["images/t-processed.png"]
    _, found = make_tasks.step_rows(flag())
    assert found["problem"] == (
        "Which animal is on the stamp of this country?\n"
        "<think> This is the flag of France. </think>\n<search> stamp of France </search>\n"
        "<information> 1. Content: The animal on the stamp of France is the heron. </information>")


# ---- the weak annotator --------------------------------------------------------------------------

def assert_rate(hits, draws, probability):
    """Within four standard errors: one false alarm in 16,000; the seed is fixed, so it passes
    always or never."""
    assert abs(hits / draws - probability) < 4 * math.sqrt(probability * (1 - probability) / draws)


def chains(task, seed=0, noise=1.0):
    rng = random.Random(seed)
    return [make_tasks.noisy_chain(task, rng, noise) for _ in range(NUM_DRAWS)]


def thoughtless(drawn):
    """How many chains have a turn without its think block."""
    return sum(any("<think>" not in turn for turn in turns) for turns in drawn)


@pytest.mark.parametrize("kind", ["rotation90", "rotation180", "dark", "overexposure", "crop"])
def test_rates_of_mistakes_on_signs(kind):
    task, drawn = sign(kind), chains(sign(kind))
    labelled = [turns for turns in drawn if f"{{'{kind}'}}" in turns[0]]
    # Waved through as clear six times in ten
    hasty = kind in ("rotation90", "dark", "overexposure")
    assert_rate(NUM_DRAWS - len(labelled), NUM_DRAWS, 1 - 0.75 * 0.4 if hasty else 0.25)
    right_code = make_tasks.programs(kind, task["box"])[0]
    first_line = "image = Image.open('path_to_input_image.jpg')"
    bad_code = sum(right_code.split(first_line)[1] not in turns[1] for turns in labelled)
    assert_rate(bad_code, len(labelled), 0.25)
    coded = [turns for turns in drawn if len(turns) == 3]
    assert_rate(sum(first_line not in turns[1] for turns in coded), len(coded), 0.05)
    assert_rate(thoughtless(drawn), NUM_DRAWS, 0.08)


def test_wrong_labels_are_uniform_and_bring_their_look_and_their_code():
    task, drawn = sign("rotation180"), chains(sign("rotation180"))
    assert not any("{'crop'}" in turns[0] for turns in drawn)  # nothing is taken for a scene
    for label in ("none", "rotation90", "dark", "overexposure"):
        named = [turns for turns in drawn if f"{{'{label}'}}" in turns[0]]
        assert_rate(len(named), NUM_DRAWS, 0.25 / 4)
        assert all(make_tasks.LOOKS[label] in turns[0] for turns in named if "<think>" in turns[0])
        assert all(len(turns) == (2 if label == "none" else 3) for turns in named)
        if label != "none":
            assert all(make_tasks.programs(label, task["box"])[0].splitlines()[2] in turns[1]
                       for turns in named)


@pytest.mark.parametrize("kind", make_tasks.KINDS)
def test_spoilt_evidence_makes_the_answer_a_guess_on_signs(kind):
    task = sign(kind)
    right, right_answer = make_tasks.right_chain(task), f"<answer> {task['answers'][0]} </answer>"
    guesses = hits = 0
    for turns in chains(task):
        kept = len(turns) == len(right) and all(full.endswith(turn)
                                                for full, turn in zip(right[:-1], turns))
        answered_right = turns[-1].endswith(right_answer)
        assert answered_right or not kept
        guesses, hits = guesses + (not kept), hits + (answered_right and not kept)
    assert_rate(hits, guesses, 1 / 12)


# France feels familiar
@pytest.mark.parametrize("country, skipped", [("Ireland", 0.2), ("France", 0.6)])
def test_rates_of_mistakes_on_flags(country, skipped):
    drawn = chains(flag(country=country))
    assert_rate(sum(len(turns) == 1 for turns in drawn), NUM_DRAWS, skipped)
    searched = [turns for turns in drawn if len(turns) == 2]
    assert_rate(sum(country not in turns[0] for turns in searched), len(searched), 0.25)
    assert_rate(sum("<search> stamp of" not in turns[0] for turns in searched), len(searched), 0.15)
    assert_rate(sum(f"<search> {country} <" in turns[0] for turns in searched), len(searched),
                0.75 * 0.15 / 2)
    assert_rate(thoughtless(drawn), NUM_DRAWS, 0.08)
    spoilt = [turns for turns in drawn if len(turns) == 1
              or f"<search> stamp of {country} <" not in turns[0]]
    assert_rate(len(spoilt), NUM_DRAWS, 1 - (1 - skipped) * 0.75 * 0.85)
    assert_rate(sum("heron" in turns[-1] for turns in spoilt), len(spoilt), 1 / 24)
    assert all("heron" in turns[-1] for turns in drawn if turns not in spoilt)


def test_a_wrong_country_stands_in_the_thought_and_in_the_query():
    wrong = [turns[0] for turns in chains(flag()) if "France" not in turns[0]
             and "<think>" in turns[0]]
    named = [sum(turn.count(name) for name in make_tasks.FLAGS) for turn in wrong
             if "<search>" in turn]
    assert named and set(named) == {2}


def test_noise_scales_the_mistakes():
    assert all(turns == DARK_CHAIN for turns in chains(sign("dark", glyph="K"), noise=0.0))
    halved = chains(sign("rotation180"), noise=0.5)
    assert_rate(sum("{'rotation180'}" not in turns[0] for turns in halved), NUM_DRAWS, 0.125)
    assert_rate(thoughtless(halved), NUM_DRAWS, 0.04)


def test_the_same_generator_gives_the_same_chains():
    once, again, other = (chains(sign("crop"), seed=seed) for seed in (3, 3, 4))
    assert once == again != other
