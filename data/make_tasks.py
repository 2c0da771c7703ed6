"""Make the offline tasks in MAT's row format: signs to repair by code, and flags to search by.

    python data/make_tasks.py --seed 0 --out data/offline

    corpus.jsonl    192 documents for the search tool, one fact per (country, attribute)
    corpus.sqlite   their index (data/build_index.py)
    train.json      192 coding + 192 search tasks
    heldout.json    144 coding (24 of each kind) + 96 search tasks
    steps.json      the right chains of train.json cut into single steps, for --mode step
    images/*.png    RGB, width x height: signs 56x56, cropped signs 28x28, flags 84x56

Coding: read the character on a sign. First, code must undo a turn, darkness or over-exposure, or
cut the sign out of a scene of four. Search: a flag tells the country. The animal asked for is drawn
at random, so it can be found in the corpus but not be known.

Training and held-out tasks share no sign (glyph, panel, ink) and no fact (country, attribute). The
same seed gives the same bytes, except for the index, where SQLite writes its version. Pairs of
degradations and questions in two hops are in make_hard_tasks.py. Left out on purpose: MAT's blur
and noise.
"""
import argparse
import json
import random
from pathlib import Path

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

from build_index import index_corpus, read_corpus

# Signs. Boxes are [x_min, y_min, x_max, y_max] in thousandths of the image.
SIGN = 56  # pixels a side: four vision tokens of Qwen2.5-VL, 28x28 pixels each
GLYPHS = "CHKLPTUXZ457"
PANELS = {"white": (244, 244, 240), "cream": (248, 232, 190), "mint": (196, 240, 208),
          "sky": (190, 222, 250), "rose": (252, 208, 214), "lilac": (222, 208, 248)}
INKS = {"black": (20, 20, 20), "navy": (20, 28, 104), "maroon": (104, 16, 28),
        "green": (12, 72, 32)}
KINDS = ("none", "rotation90", "rotation180", "dark", "overexposure", "crop")
QUARTERS = ([0, 0, 500, 500], [500, 0, 1000, 500], [0, 500, 500, 1000], [500, 500, 1000, 1000])
LOOKS = {"none": "The sign is clear.", "rotation90": "The sign lies on its side.",
         "rotation180": "The sign is upside down.", "dark": "The sign is too dark.",
         "overexposure": "The sign is too bright.", "crop": "The scene has many signs."}
REPAIRS = {  # right, then wrong ones; rotate() turns counter-clockwise, the degradation clockwise
    "rotation90": ("image = image.rotate(90)", "image = image.rotate(-90)",
                   "image = image.rotate(180)"),
    "rotation180": ("image = image.rotate(180)", "image = image.rotate(90)"),
    "dark": ("image = image.point(lambda p: p * 8)", "image = image.point(lambda p: p * 2)"),
    "overexposure": ("image = image.point(lambda p: 255 - (255 - p) * 8)",
                     "image = image.point(lambda p: 255 - (255 - p) * 2)"),
}

# Flags: three stripes, as columns from left to right or as rows from top to bottom.
FLAG = (84, 56)  # width, height in pixels
FLAGS = {
    "France": ("columns", "#002654", "#ffffff", "#ce1126"),
    "Italy": ("columns", "#008c45", "#f4f9ff", "#cd212a"),
    "Belgium": ("columns", "#000000", "#fdda24", "#ef3340"),
    "Ireland": ("columns", "#169b62", "#ffffff", "#ff883e"),
    "Romania": ("columns", "#002b7f", "#fcd116", "#ce1126"),
    "Germany": ("rows", "#000000", "#dd0000", "#ffce00"),
    "Netherlands": ("rows", "#ae1c28", "#ffffff", "#21468b"),
    "Russia": ("rows", "#ffffff", "#0039a6", "#d52b1e"),
    "Hungary": ("rows", "#ce2939", "#ffffff", "#477050"),
    "Austria": ("rows", "#c8102e", "#ffffff", "#c8102e"),
    "Bulgaria": ("rows", "#ffffff", "#00966e", "#d62612"),
    "Estonia": ("rows", "#0072ce", "#000000", "#ffffff"),
}
ATTRIBUTES = ("coin", "stamp", "seal", "crest", "medal", "ship", "tower", "bridge",
              "gate", "crown", "shield", "bell", "clock", "ring", "drum", "mask")
ANIMALS = ("heron", "lion", "wolf", "bear", "fox", "deer", "hare", "owl", "eagle", "swan", "goose",
           "duck", "goat", "horse", "bull", "sheep", "camel", "tiger", "otter", "whale", "snake",
           "frog", "crab", "turtle")

MISTAKES = {  # probability of each mistake of the weak annotator at noise = 1
    "label": 0.25,      # coding: names a wrong problem, and repairs that one
    "code": 0.25,       # coding, the problem named rightly: a wrong angle, factor or scale
    "crash": 0.05,      # coding: a quote is left open, so the code does not run
    "country": 0.25,    # search: takes the flag for another country's
    "attribute": 0.15,  # search: the query leaves the attribute out, or has another one
    "skip": 0.20,       # search: answers without a search
    "format": 0.08,     # both: one turn has no <think> block; the answer stays right
    "haste": 0.60,      # both: answers at once where it feels sure, see below
}
# Habits make the policy's likeliest action wrong as often as right: signs that look readable enough
# are called clear, and questions about familiar countries are answered without a search.
LOOKS_READABLE = ("rotation90", "dark", "overexposure")
FEELS_FAMILIAR = ("France", "Italy", "Belgium", "Germany", "Netherlands", "Austria")
COUNTS = {"train": {"coding": 192, "search": 192}, "heldout": {"coding": 144, "search": 96}}


def split_of(*indices):
    """The split of a combination. A Latin square holds out one third; every single value occurs in
    both splits."""
    return "heldout" if sum(indices) % 3 == 0 else "train"


def sign_triples(split):
    """All (glyph, panel, ink) of "train" (192) or "heldout" (96)."""
    return [(glyph, panel, ink)
            for i, glyph in enumerate(GLYPHS)
            for j, panel in enumerate(PANELS)
            for k, ink in enumerate(INKS)
            if split_of(i, j, k) == split]


def search_pairs(split):
    """All (country, attribute) of "train" (128) or "heldout" (64)."""
    return [(country, attribute)
            for i, country in enumerate(FLAGS)
            for j, attribute in enumerate(ATTRIBUTES)
            if split_of(i, j) == split]


def add_noise(rng, image, amplitude=12, share=0.06):
    """A copy in which about `share` of the pixels are lighter or darker by up to `amplitude` of 255
    levels."""
    # A few noisy pixels: faint noise everywhere would make the PNGs several times larger.
    draws = np.random.default_rng(rng.getrandbits(64))
    shift = draws.integers(-amplitude, amplitude + 1, (image.height, image.width, 1))
    hit = draws.random((image.height, image.width, 1)) < share
    pixels = np.asarray(image, dtype=np.int64) + shift * hit  # (height, width, 3)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def make_sign(rng, glyph, panel, ink):
    """A clean upright 56x56 sign. glyph, panel, ink: names in GLYPHS, PANELS, INKS."""
    image = Image.new("RGB", (SIGN, SIGN), PANELS[panel])
    draw, bar_top = ImageDraw.Draw(image), SIGN - 6
    draw.rectangle((0, 0, SIGN - 1, SIGN - 1), outline=INKS[ink])
    # The bar tells which side is down, as H and X cannot. The font comes with Pillow, so the glyphs
    # are the same on every machine.
    draw.rectangle((0, bar_top, SIGN - 1, SIGN - 1), fill=INKS[ink])
    font = ImageFont.load_default(rng.randint(34, 38))
    left, top, right, bottom = font.getbbox(glyph)
    x = (SIGN - left - right) // 2 + rng.randint(-3, 3)
    y = (bar_top - top - bottom) // 2 + rng.randint(-3, 3)
    draw.text((x, y), glyph, fill=INKS[ink], font=font)
    return add_noise(rng, image)


def degrade(image, kind, contrast=0.12):
    """The picture as the model first sees it. kind: one of KINDS except "crop" (see `make_scene`).

    contrast: what is left of it in the dark and in too much light.
    """
    if kind in ("rotation90", "rotation180"):  # negative is clockwise
        return image.rotate(-90 if kind == "rotation90" else 180, expand=True)
    if kind == "dark":
        return image.point(lambda p: p * contrast)
    if kind == "overexposure":
        return image.point(lambda p: 255 - (255 - p) * contrast)
    if kind == "none":
        return image
    raise ValueError(f"cannot degrade a sign by {kind!r}; choose from {KINDS[:-1]}")


def make_scene(signs):
    """A 56x56 scene of four signs, each shrunk to 28x28, in the order of QUARTERS."""
    scene = Image.new("RGB", (SIGN, SIGN))
    for sign, (x, y, _, _) in zip(signs, QUARTERS):
        scene.paste(sign.resize((SIGN // 2, SIGN // 2), Image.Resampling.BOX),
                    (x * SIGN // 1000, y * SIGN // 1000))
    return scene


def make_flag(rng, country):
    """An 84x56 flag of three stripes; each channel of a stripe is off by up to 10 levels."""
    direction, *colours = FLAGS[country]
    shades = [[channel + rng.randint(-10, 10) for channel in ImageColor.getrgb(colour)]
              for colour in colours]
    stripes = np.array(shades).clip(0, 255).astype(np.uint8)  # (3 stripes, 3 channels)
    pixels = stripes[None] if direction == "columns" else stripes[:, None]
    image = Image.fromarray(pixels)  # 3x1 or 1x3 pixels
    return add_noise(rng, image.resize(FLAG, Image.Resampling.NEAREST))


def facts(seed):
    """{(country, attribute): animal}, every animal drawn anew from the seed."""
    rng = random.Random(f"facts-{seed}")
    return {(country, attribute): rng.choice(ANIMALS)
            for country in FLAGS for attribute in ATTRIBUTES}


def fact_sentence(country, attribute, animal):
    """The text of a corpus document."""
    return f"The animal on the {attribute} of {country} is the {animal}."


def make_corpus(seed):
    """The corpus rows {"id", "title", "contents"}, one per fact."""
    return [{"id": f"{i:03d}", "title": f"{attribute} of {country}",
             "contents": fact_sentence(country, attribute, animal)}
            for i, ((country, attribute), animal) in enumerate(facts(seed).items())]


def coding_task(rng, kind, glyph=None, split="train", task_id=""):
    """One coding task in memory. A glyph of None is drawn at random.

    It has the fields of the row without the paths, and
        image  what the model sees first: the scene for crop, else the degraded sign
        clean  the sign as the right code shows it
        box    the quarter that the question names, or None
        signs  the triples in the image
    """
    glyph, box, question = glyph or rng.choice(GLYPHS), None, "What character is on the sign?"
    shown = [glyph]
    if kind == "crop":
        quarter = rng.randrange(4)
        shown = rng.sample([other for other in GLYPHS if other != glyph], 3)
        shown.insert(quarter, glyph)
        box = QUARTERS[quarter]
        question = f"What character is on the sign within {box} of the image?"
    triples = [[triple for triple in sign_triples(split) if triple[0] == each] for each in shown]
    signs = [rng.choice(choices) for choices in triples]
    drawn = [make_sign(rng, *triple) for triple in signs]
    image = make_scene(drawn) if kind == "crop" else degrade(drawn[0], kind)
    clean = image.crop([v * SIGN // 1000 for v in box]) if kind == "crop" else drawn[0]
    return {"id": task_id, "family": "coding", "question": question, "answers": [glyph],
            "type": [kind], "split": split, "image": image, "clean": clean, "box": box,
            "signs": signs}


def search_task(rng, facts, country, attribute, split="train", task_id=""):
    """One search task in memory, with a fresh "image" of the flag. facts: see `facts`."""
    return {"id": task_id, "family": "search",
            "question": f"Which animal is on the {attribute} of this country?",
            "answers": [facts[country, attribute]], "split": split,
            "image": make_flag(rng, country), "country": country, "attribute": attribute}


def programs(kind, box):
    """The programs that undo a kind of degradation: the right one first, then wrong ones.

    box: the quarter to cut out, for crop only.
    """
    crops = [f"box = {box}\nimage = image.crop([v * image.width // {thousand} for v in box])"
             for thousand in (1000, 500)]
    return [f"from PIL import Image\nimage = Image.open('path_to_input_image.jpg')\n{repair}\n"
            "image.save('path_to_output_image.jpg')"
            for repair in (crops if kind == "crop" else REPAIRS[kind])]


def right_chain(task):
    """The texts of the assistant's turns (a list of two or three) that solve the task."""
    return noisy_chain(task, random.Random(0), noise=0.0)


def noisy_chain(task, rng, noise=1.0):
    """The turns of a weak annotator: each of MISTAKES is made with its probability times noise."""
    def slips(mistake):
        return rng.random() < MISTAKES[mistake] * noise

    turns = (search_chain if task["family"] == "search" else coding_chain)(task, rng, slips)
    if slips("format"):
        i = rng.randrange(len(turns))
        turns[i] = turns[i].split("</think>\n", 1)[1]
    return turns


def coding_chain(task, rng, slips):
    """The turns problem, code (if there is a problem) and answer. slips(mistake): is it made?"""
    kind, box = task["type"][0], task["box"]
    label, spoiled = kind, slips("label")
    if kind in LOOKS_READABLE and slips("haste"):
        label, spoiled = "none", True
    elif spoiled:
        # Nothing is taken for a scene: a box that no question names would unlearn copying.
        label = rng.choice([other for other in KINDS if other not in (kind, "crop")])
    turns = [f"<think> {LOOKS[label]} </think>\n<problem> {{'{label}'}} </problem>"]
    if label != "none":
        right, *wrong = programs(label, box)
        bad, crash = label == kind and slips("code"), slips("crash")
        code = rng.choice(wrong) if bad else right
        if crash:
            code = code.replace("input_image.jpg'", "input_image.jpg")
        turns.append(f"<think> I repair it. </think>\n<code>\n```python\n{code}\n```\n</code>")
        spoiled = spoiled or bad or crash
    # Without the evidence only a guess is left.
    answer = rng.choice(GLYPHS) if spoiled else task["answers"][0]
    return turns + [f"<think> Now I can read it. </think>\n<answer> {answer} </answer>"]


def search_chain(task, rng, slips):
    """The turns search (unless skipped) and answer. slips(mistake): is it made?"""
    country, attribute = task["country"], task["attribute"]
    wrong_country, wrong_attribute = slips("country"), slips("attribute")
    skip = slips("haste" if country in FEELS_FAMILIAR else "skip")
    if wrong_country:
        country = rng.choice([other for other in FLAGS if other != country])
    query = f"{attribute} of {country}"
    if wrong_attribute:
        other = rng.choice([other for other in ATTRIBUTES if other != attribute])
        query = rng.choice((country, f"{other} of {country}"))
    answer = rng.choice(ANIMALS) if wrong_country or wrong_attribute or skip else task["answers"][0]
    look = f"<think> This is the flag of {country}. </think>\n"
    if skip:
        return [f"{look}<answer> {answer} </answer>"]
    return [f"{look}<search> {query} </search>",
            f"<think> I found it. </think>\n<answer> {answer} </answer>"]


def make_split(seed, split):
    """All tasks of a split in memory. Each has a generator of its own: no task changes another."""
    tasks = []
    for i in range(COUNTS[split]["coding"]):
        task_id = f"{split}-coding-{i:03d}"
        # as even as the count allows
        kind, glyph = KINDS[i % len(KINDS)], GLYPHS[i // len(KINDS) % len(GLYPHS)]
        tasks.append(coding_task(random.Random(f"{seed}-{task_id}"), kind, glyph, split, task_id))
    pairs, known = search_pairs(split), facts(seed)
    random.Random(f"{seed}-{split}-pairs").shuffle(pairs)
    for i in range(COUNTS[split]["search"]):
        # a repeated pair gets a fresh image
        task_id, pair = f"{split}-search-{i:03d}", pairs[i % len(pairs)]
        tasks.append(search_task(random.Random(f"{seed}-{task_id}"), known, *pair, split, task_id))
    return tasks


def image_paths(task):
    """Where task["image"] and (coding only) task["clean"] are written: one file for kind none."""
    name = f"images/{task['id']}"
    if task["family"] == "search":
        return [f"{name}.png"]
    original = f"{name}-original.png"
    processed = original if task["type"] == ["none"] else f"{name}-processed.png"
    return [original, processed] if task["type"] == ["crop"] else [processed, original]


def task_row(task):
    """The task as a JSON row of MAT's schema."""
    paths, row = image_paths(task), {key: task[key] for key in ("id", "family", "question")}
    if task["family"] == "search":
        return row | {"answer": task["answers"][0], "image_path": paths[0], "split": task["split"],
                      "country": task["country"], "attribute": task["attribute"]}
    original, processed = paths if task["type"] == ["crop"] else reversed(paths)
    return row | {"answers": task["answers"], "ori_image_path": original,
                  "processed_image_path": processed, "type": task["type"], "split": task["split"]}


def step_rows(task):
    """The right chain of a task as rows for --mode step."""
    found = []
    if task["family"] == "search":
        found = [fact_sentence(task["country"], task["attribute"], task["answers"][0])]
    return cut_chain(task, right_chain(task), found)


def cut_chain(task, turns, found):
    """One row a turn: the question with the turns so far; the turn as solution.

    found: the document that each search of the chain finds.
    """
    paths, rows, context = image_paths(task), [], task["question"]
    for n, turn in enumerate(turns):
        action = next(tag for tag in ("problem", "code", "search", "answer") if f"<{tag}>" in turn)
        # No tool runs in step mode: the row before the answer has what the tool would have given.
        again = "-again" * any(f"<{action}>" in earlier for earlier in turns[:n])
        rows.append({"id": f"{task['id']}-{action}{again}", "family": task["family"],
                     "image_path": paths[-1] if action == "answer" else paths[0],
                     "problem": context, "solution": turn, "type": f"pre_{action}",
                     "answers": task["answers"]})
        context += f"\n{turn}"
        if action == "search":
            # Searches come first, so that the n-th turn is the n-th search.
            context += f"\n<information> 1. Content: {found[n]} </information>"
    return rows


def write_rows(path, rows):
    """One row a line: a JSON list, or JSON lines if the name ends in .jsonl."""
    lines = [json.dumps(row) for row in rows]
    if path.suffix == ".jsonl":
        text = "\n".join(lines) + "\n"
    else:
        text = "[\n" + ",\n".join(lines) + "\n]\n"
    path.write_bytes(text.encode())  # write_text would write other line ends on Windows


def write_tasks(seed, out):
    """Write all files into the folder `out` (a Path); files of the same name are replaced."""
    (out / "images").mkdir(parents=True, exist_ok=True)
    splits = {split: make_split(seed, split) for split in COUNTS}
    for split, tasks in splits.items():
        write_rows(out / f"{split}.json", [task_row(task) for task in tasks])
        for task in tasks:
            for path, image in zip(image_paths(task), (task["image"], task.get("clean"))):
                image.save(out / path, optimize=True)
    write_rows(out / "steps.json", [row for task in splits["train"] for row in step_rows(task)])
    write_rows(out / "corpus.jsonl", make_corpus(seed))
    index_corpus(out / "corpus.sqlite", read_corpus(out / "corpus.jsonl"))


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("data/offline"))
    write_tasks(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
