"""Make offline tasks in two halves, simple and hard, as the paper's test set MAT has them.

    python data/make_hard_tasks.py --seed 0 --out data/offline/hard

    train_coding.json, heldout_coding.json    simple: one degradation; hard: a pair of them
    train_search.json, heldout_search.json    simple: one hop; hard: two, by way of an ally
    train_search_20.json                      20 questions of train_search.json, as in the paper
    heldout_text.json                         two hops without an image; nothing trains on them
    steps.json                                the right chains of training cut into single steps
    corpus.jsonl, corpus.sqlite               204 documents: one per fact, one per ally
    images/*.png                              as in data/make_tasks.py

Coding, hard: a sign is turned and too dark, or turned and too bright. Two pairs are in training,
the two others are held out. No demonstration of the warm start shows any pair: see `second_look`.

Search, hard: "Which animal is on the coin of the ally of this country?" takes two searches. Animals
have one to three words, so that F1 is not exact match.

Training and held-out tasks share no sign, no fact and no pair of degradations. That goes for allies
too: the countries whose allies are asked for in training are not those of held-out questions.
"""
import argparse
import random
from pathlib import Path

import make_tasks
from build_index import index_corpus, read_corpus
from make_tasks import (ANIMALS, ATTRIBUTES, FEELS_FAMILIAR, FLAGS, GLYPHS, KINDS, LOOKS,
                        MISTAKES, REPAIRS, coding_task, cut_chain, degrade, image_paths, make_flag,
                        programs, search_pairs, task_row, write_rows)

PAIRS = {"train": (("rotation90", "dark"), ("rotation180", "overexposure")),
         "heldout": (("rotation90", "overexposure"), ("rotation180", "dark"))}
ASKERS = {"train": tuple(FLAGS)[::2], "heldout": tuple(FLAGS)[1::2]}  # whose ally is asked for
COUNTS = {"train": {"coding": (96, 96), "search": (96, 96)},  # (simple, hard)
          "heldout": {"coding": (72, 96), "search": (64, 96), "text": (0, 32)}}
SIZES = ("small", "great", "young", "old")
COLOURS = ("red", "white", "black", "grey", "golden", "spotted")

# What a sign looks like after the first wrong program of its kind (make_tasks.REPAIRS).
MISSES = {"rotation90": "rotation180", "rotation180": "rotation90",
          "dark": "dark", "overexposure": "overexposure"}
# Probabilities of what only these tasks can get wrong, at noise = 1.
HARD_MISTAKES = {
    "hop": 0.80,  # two hops about an image: asks for the country's own animal
    "blind hop": 0.93,  # the same without an image
    "short": 0.3,  # names the animal without the words before it
}


def facts(seed):
    """{(country, attribute): animal of one to three words, (country, "ally"): another country},
    drawn anew from the seed."""
    rng = random.Random(f"hard-facts-{seed}")
    known = {}
    for country in FLAGS:
        for attribute in ATTRIBUTES:
            words = [rng.choice(SIZES), rng.choice(COLOURS)]
            known[country, attribute] = " ".join(
                # none, one or both words, in their order
                sorted(rng.sample(words, rng.randrange(3)), key=words.index)
                + [rng.choice(ANIMALS)])
    countries = list(FLAGS)
    rng.shuffle(countries)  # in a ring, so that nobody is an ally of itself
    known |= {(country, "ally"): ally
              for country, ally in zip(countries, countries[1:] + countries[:1])}
    return known


def fact_sentence(country, attribute, value):
    """The text of a corpus document."""
    if attribute == "ally":
        return f"The ally of {country} is {value}."
    return f"The animal on the {attribute} of {country} is the {value}."


def make_corpus(seed):
    """The corpus rows {"id", "title", "contents"}, one per fact."""
    return [{"id": f"{i:03d}", "title": f"{attribute} of {country}",
             "contents": fact_sentence(country, attribute, value)}
            for i, ((country, attribute), value) in enumerate(facts(seed).items())]


def pair_task(rng, pair, glyph=None, split="train", task_id=""):
    """A coding task whose sign has both degradations of the pair; as `coding_task` returns it."""
    task = coding_task(rng, "none", glyph, split, task_id)
    image = task["image"]
    for kind in pair:
        image = degrade(image, kind)
    return task | {"type": list(pair), "image": image}


def search_task(rng, known, country, attribute, *, hops=1, has_image=True, split="train",
                task_id=""):
    """A search task in memory about a fact of `country`, or, with two hops, of its ally."""
    owner = known[country, "ally"] if hops == 2 else country
    place = "this country" if has_image else country
    if hops == 2:
        place = f"the ally of {place}"
    return {"id": task_id, "family": "search", "split": split,
            "question": f"Which animal is on the {attribute} of {place}?",
            "answers": [known[owner, attribute]],
            "type": ["one hop" if hops == 1 else "two hops"] + ["text"] * (not has_image),
            "image": make_flag(rng, country) if has_image else None,
            "country": country, "attribute": attribute, "facts": known}


# ---- chains --------------------------------------------------------------------------------------
def second_look(task, rng):
    """The turns of an annotator whose first repair misses, who sees that and repairs again.

    The task has one degradation, and never a pair: a turn goes the wrong way, light changes too
    little, or a turned sign is taken for a dark or bright one. Code reads the newest picture.
    """
    kind, label = task["type"][0], task["type"][0]
    if kind.startswith("rotation") and rng.random() < 0.2:
        label = rng.choice(("dark", "overexposure"))
    left = MISSES[kind] if label == kind else kind
    # Light is then repaired in full once more: too much, but the sign can be read.
    missed, again = programs(label, None)[1], programs(left, None)[0]
    return [f"<think> {LOOKS[label]} </think>\n<problem> {{'{label}'}} </problem>",
            code_turn("I repair it.", missed), code_turn(LOOKS[left], again),
            f"<think> Now I can read it. </think>\n<answer> {task['answers'][0]} </answer>"]


def code_turn(thought, code):
    """A turn that runs code."""
    return f"<think> {thought} </think>\n<code>\n```python\n{code}\n```\n</code>"


def right_chain(task):
    """The texts of the assistant's turns that solve the task; a pair in one program, as in MAT."""
    if task["family"] == "search":
        return search_chain(task, random.Random(0), noise=0.0)
    if len(task["type"]) == 1:
        return make_tasks.right_chain(task)
    turn, light = (REPAIRS[kind][0] for kind in task["type"])
    both = programs(task["type"][0], None)[0].replace(turn, f"{turn}\n{light}")
    labels = ", ".join(f"'{kind}'" for kind in task["type"])
    return [f"<think> {LOOKS[task['type'][1]]} </think>\n<problem> {{{labels}}} </problem>",
            code_turn("I repair it.", both),
            f"<think> Now I can read it. </think>\n<answer> {task['answers'][0]} </answer>"]


def step_rows(task):
    """The right chain of a task as rows for --mode step, a pair as in MAT: one code for both."""
    found = []
    if task["family"] == "search":
        known, owner = task["facts"], task["country"]
        if task["type"][0] == "two hops":
            ally = known[owner, "ally"]
            found, owner = [fact_sentence(owner, "ally", ally)], ally
        found.append(fact_sentence(owner, task["attribute"], task["answers"][0]))
    return cut_chain(task, right_chain(task), found)


def search_chain(task, rng, noise=1.0):
    """The turns of an annotator who makes each mistake with its probability times noise."""
    def slips(mistake):
        return rng.random() < {**MISTAKES, **HARD_MISTAKES}[mistake] * noise

    known, country, attribute = task["facts"], task["country"], task["attribute"]
    two_hops = task["type"][0] == "two hops"
    shown = country
    if slips("country"):
        shown = rng.choice([other for other in FLAGS if other != country])
    skip = slips("haste" if country in FEELS_FAMILIAR else "skip")
    if slips("attribute"):
        attribute = rng.choice([other for other in ATTRIBUTES if other != attribute])
    owner = shown
    if two_hops and not slips("hop" if task["image"] else "blind hop"):
        owner = known[shown, "ally"]
    answer = known[owner, attribute]  # what the annotator reads there, right or wrong
    if skip:
        answer = rng.choice(ANIMALS)
    elif slips("short"):
        answer = answer.split()[-1]
    subject = "This is the flag of" if task["image"] else "The question is about"
    look = f"<think> {subject} {shown}. </think>\n"
    turns = [f"{look}<search> {attribute} of {owner} </search>"]
    if owner != shown:
        turns = [f"{look}<search> ally of {shown} </search>",
                 f"<think> The ally is {owner}. </think>\n<search> {attribute} of {owner} "
                 "</search>"]
    turns.append(f"<think> I found it. </think>\n<answer> {answer} </answer>")
    if skip:
        turns = [f"{look}<answer> {answer} </answer>"]
    if slips("format"):
        i = rng.randrange(len(turns))
        turns[i] = turns[i].split("</think>\n", 1)[1]
    return turns


# ---- files ---------------------------------------------------------------------------------------
def make_coding(seed, split):
    """The coding tasks of a split (train, heldout), the simple ones first; "split" of a row: its
    half, as in MAT."""
    tasks = []
    for half, count, kinds in zip(("simple", "hard"), COUNTS[split]["coding"],
                                  (KINDS, PAIRS[split])):
        for i in range(count):
            task_id = f"{split}-coding-{half}-{i:03d}"
            rng, kind = random.Random(f"{seed}-{task_id}"), kinds[i % len(kinds)]
            glyph = GLYPHS[i // len(kinds) % len(GLYPHS)]
            make = coding_task if half == "simple" else pair_task
            tasks.append(make(rng, kind, glyph, split, task_id) | {"split": half})
    return tasks


def make_search(seed, split, family):
    """The search tasks of a split, the simple ones first; family "text" has no images."""
    known, tasks = facts(seed), []
    askers = {known[country, "ally"]: country for country in FLAGS}
    for half, count in zip(("simple", "hard"), COUNTS[split][family]):
        pairs = [(owner, attribute) for owner, attribute in search_pairs(split)
                 if half == "simple" or askers[owner] in ASKERS[split]]
        random.Random(f"{seed}-{split}-{family}-{half}").shuffle(pairs)
        for i in range(count):
            owner, attribute = pairs[i % len(pairs)]
            task_id = f"{split}-{family}-{half}-{i:03d}"
            tasks.append(search_task(
                random.Random(f"{seed}-{task_id}"), known,
                askers[owner] if half == "hard" else owner, attribute,
                hops=2 if half == "hard" else 1, has_image=family == "search", split=half,
                task_id=task_id))
    return tasks


def row_of(task):
    """The task as a JSON row of MAT's schema."""
    if task["image"] is not None:
        return task_row(task) | {"type": task["type"]}
    return {key: task[key] for key in ("id", "family", "question", "type", "split", "country",
                                       "attribute")} | {"answer": task["answers"][0],
                                                        "image_path": None}


def write_tasks(seed, out):
    """Write all files into the folder `out` (a Path); files of the same name are replaced."""
    (out / "images").mkdir(parents=True, exist_ok=True)
    files = {f"{split}_{family}": (make_coding(seed, split) if family == "coding"
                                   else make_search(seed, split, family))
             for split in COUNTS for family in COUNTS[split]}
    for name, tasks in files.items():
        write_rows(out / f"{name}.json", [row_of(task) for task in tasks])
        for task in tasks:
            if task["image"] is not None:
                for path, image in zip(image_paths(task), (task["image"], task.get("clean"))):
                    image.save(out / path, optimize=True)
    write_rows(out / "steps.json", [row for family in COUNTS["train"]
                                    for task in files[f"train_{family}"]
                                    for row in step_rows(task)])
    search = files["train_search"]
    few = search[:10] + search[COUNTS["train"]["search"][0]:][:10]
    write_rows(out / "train_search_20.json", [row_of(task) for task in few])
    write_rows(out / "corpus.jsonl", make_corpus(seed))
    index_corpus(out / "corpus.sqlite", read_corpus(out / "corpus.jsonl"))


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("data/offline/hard"))
    write_tasks(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
