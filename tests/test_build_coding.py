"""data/build_coding.py: every item needs its repair and is repaired by it; parts share no picture; bad input is named first.

    python -m pytest tests/test_build_coding.py

With `pip install scikit-image` (or PYTHONPATH) one test works on the photographs that it ships.
"""
import filecmp
import importlib.util
import json
import os
import random
import re
import signal
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import run_script, start_script
from PIL import Image, ImageDraw, ImageFilter

import build_coding
from build_coding import Source, assign, build, draw_parameters, error_of, look, objection, read_source, spoil
from data.tasks import load_tasks
from evaluate import BOX, released_crop
from tools import CodeTool, open_picture

ROOT = Path(__file__).resolve().parent.parent
SIZE = (96, 72)  # width, height
FLAGS = {"seed": 0, "heldout": 0.2, "max_pixels": 401_408, "code_unlocked": False}
PAIRS = ["rotation90+dark", "rotation90+overexposure", "rotation90+blur", "rotation90+noise",
         "rotation180+dark", "rotation180+overexposure", "rotation180+blur", "rotation180+noise"]
SINGLES = ["rotation90", "rotation180", "dark", "overexposure", "blur", "noise", "none"]


def scene(seed, size=SIZE):
    """A made-up picture: a slope of light, shapes of many colours, some letters."""
    rng = random.Random(seed)
    slope = np.linspace(60, 200, size[0])[None, :, None] + np.linspace(-40, 40, size[1])[:, None, None] + np.zeros(3)
    picture = Image.fromarray(slope.astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for _ in range(6):
        x, y = rng.randrange(size[0] - 30), rng.randrange(size[1] - 20)
        draw.rectangle((x, y, x + 30, y + 20), fill=tuple(rng.randrange(256) for _ in range(3)))
    draw.text((rng.randrange(size[0] // 2), rng.randrange(size[1] // 2)), f"No. {seed}", fill="white")
    return picture


def write_rows(folder, rows):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make_rows(folder, number, **more):
    """Rows of as many scenes, written beside them; every second one has a box."""
    rows = []
    for i in range(number):
        folder.mkdir(parents=True, exist_ok=True)
        scene(i).save(folder / f"{i}.png")
        rows.append({"id": f"scene {i}", "image": f"{i}.png", "question": "Which number?", "answers": [str(i), f"No. {i}"],
                     **({"box": [0, 100, 500, 750]} if i % 2 else {}), **more})
    return write_rows(folder, rows)


def written(out):
    """[(part, row)] of all items."""
    return [(part, row) for part in ("train", "heldout") for row in json.loads((out / f"{part}.json").read_text("utf-8"))]


def source(number, box=None, question="Which number?", digest=None, size=SIZE):
    return Source(number, number, Path(f"{number}.png"), question, ["1"], box, size, digest or f"digest {number}")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of 50 made-up scenes and 10 signs of data/offline; its summary; the rows; their folder."""
    folder = tmp_path_factory.mktemp("build")
    path = make_rows(folder / "scenes", 50)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for sign in sorted((ROOT / "data/offline/images").glob("heldout-coding-*-original.png"))[:10]:
        rows.append({"id": sign.stem, "image": str(sign), "question": "Which character?", "answers": ["?"]})
    summary = build(write_rows(folder / "scenes", rows), folder / "out", **FLAGS)
    return folder / "out", summary, {row["id"]: row for row in rows}, folder / "scenes"


# ---- what is written -----------------------------------------------------------------------------

def test_both_parts_load_as_tasks_and_as_mat_coding(made):
    out, _, rows, folder = made
    for part in ("train", "heldout"):
        tasks = load_tasks(out / f"{part}.json", mode="episode")
        assert load_tasks(out / f"{part}.json", "mat-coding") == tasks
        for task, (_, row) in zip(tasks, [pair for pair in written(out) if pair[0] == part], strict=True):
            assert (task["family"], task["answers"], task["id"]) == ("coding", rows[row["id"]]["answers"], row["id"])
            assert task["type"] == row["type"] and "+".join(row["type"]) in [*SINGLES, *PAIRS, "crop"]
            assert task["split"] == ("simple" if "+".join(row["type"]) in SINGLES else "hard")
            first = row["ori_image_path" if row["type"] == ["crop"] else "processed_image_path"]
            assert task["image"] == str((out / f"{part}-image" / first).resolve())
            original = open_picture(out / f"{part}-image" / row["ori_image_path"])
            assert error_of(original, open_picture(folder / rows[row["id"]]["image"])) == 0


def test_every_item_needs_its_repair_and_is_repaired_by_it(made):
    out, _, _, _ = made
    kinds = Counter()
    with CodeTool() as tool:
        for part, row in written(out):
            folder, kind = out / f"{part}-image", "+".join(row["type"])
            original = open_picture(folder / row["ori_image_path"])
            first = original if kind == "crop" else open_picture(folder / row["processed_image_path"])
            if kind == "crop":  # what is sought stands in the processed image
                original = open_picture(folder / row["processed_image_path"])
            result = tool.run(row["repair"], first)
            assert result.ok, result.text
            degraded, repaired = error_of(first, original), error_of(result.image, original)
            assert (row["error"]["degraded"], row["error"]["repaired"]) == (degraded, repaired)
            if kind == "none":
                assert (degraded, repaired) == (0, 0)
            elif {"blur", "noise"} & set(row["type"]):
                assert degraded >= 1 and repaired <= 0.95 * degraded
            else:
                assert degraded > 4 and repaired <= 4 and repaired <= degraded / 4
                assert repaired == 0 or {"dark", "overexposure"} & set(row["type"])
            kinds[kind] += 1
    assert set(kinds) == {*SINGLES, *PAIRS, "crop"}


def test_half_the_repair_of_a_pair_is_not_enough(made):
    """Turned back only, it is as dark, blurred or noisy as ever; the other half alone leaves it turned."""
    out, _, _, _ = made
    kinds = Counter()
    with CodeTool() as tool:
        for part, row in written(out):
            if len(row["type"]) == 2:
                folder = out / f"{part}-image"
                original, first = (open_picture(folder / row[f"{which}_image_path"]) for which in ("ori", "processed"))
                *start, turn, mend, end = row["repair"].split("\n")
                turned = error_of(tool.run("\n".join([*start, turn, end]), first).image, original)
                mended = error_of(tool.run("\n".join([*start, mend, end]), first).image, original)
                repaired, (rotation, other) = row["error"]["repaired"], row["type"]
                assert "rotate" in turn and row["error"]["alone"][other] == turned and row["error"]["alone"][rotation] > 4
                if other in ("blur", "noise"):
                    assert turned >= 1 and repaired <= 0.95 * turned and mended > 1.2 * repaired
                else:
                    assert turned > 4 and repaired <= turned / 4 and mended > 4
                kinds["+".join(row["type"])] += 1
    assert set(kinds) == set(PAIRS)


@pytest.mark.thorough
def test_the_parameters_of_an_item_are_those_of_its_degradation(made):
    out, _, _, _ = made
    for part, row in written(out):
        folder, given = out / f"{part}-image", row["parameters"]
        assert list(given) == [kind for kind in row["type"] if kind != "none"]
        original, first = (open_picture(folder / row[f"{which}_image_path"]) for which in ("ori", "processed"))
        expected = original
        for kind, value in given.items():
            if kind.startswith("rotation"):  # clockwise, by so many degrees
                turn = {90: Image.Transpose.ROTATE_270, 180: Image.Transpose.ROTATE_180}[value]
                expected = expected.transpose(turn)
            elif kind == "dark":
                assert 0.125 <= value <= 0.2
                expected = expected.point(lambda p: p * value)
            elif kind == "overexposure":
                assert 0.125 <= value <= 0.2
                expected = expected.point(lambda p: 255 - (255 - p) * value)
            elif kind == "blur":
                assert 0.003 <= value / min(original.size) <= 0.008
                expected = expected.filter(ImageFilter.GaussianBlur(value))
            elif kind == "crop":
                width, height = original.size
                expected = expected.crop((0, height // 10, width // 2, height * 3 // 4))
            else:
                assert kind == "noise" and 25 <= value <= 50
                clean, expected = expected, first  # what is drawn is drawn; of a Gaussian, |x| is 0.8 deviations, less clipped
                assert 0.4 * value < error_of(first, clean) < 0.82 * value and first.size == clean.size
        assert error_of(first, expected) == 0 and first.size == expected.size


@pytest.mark.thorough
def test_noise_has_the_deviation_that_is_said():
    grey = Image.new("RGB", (200, 200), (128, 128, 128))
    noise = np.asarray(spoil(grey, "noise", 25.0, 0), float) - 128  # no pixel is clipped: over five deviations
    assert abs(noise.std() - 25) < 0.25 and abs(noise.mean()) < 0.25  # 120,000 draws: 0.05 and 0.07 are one deviation
    assert abs(np.corrcoef(noise[..., 0].ravel(), noise[..., 1].ravel())[0, 1]) < 0.02  # each channel its own
    assert error_of(spoil(grey, "noise", 25.0, 0), spoil(grey, "noise", 25.0, 1)) > 10


@pytest.mark.thorough
def test_strengths_fill_their_bounds():
    item = build_coding.Item(source(1), "train", "rotation90+dark")
    drawn = [draw_parameters(item, SIZE, random.Random(seed)) for seed in range(300)]
    assert {parameters["rotation90"] for parameters in drawn} == {90}
    contrasts = [parameters["dark"] for parameters in drawn]
    assert 0.125 <= min(contrasts) < 0.127 and 0.198 < max(contrasts) <= 0.2
    for kind, low, high in (("blur", 3 * 0.072, 8 * 0.072), ("noise", 25, 50)):  # the shorter side has 72 pixels
        item = build_coding.Item(source(1), "train", f"rotation180+{kind}")
        drawn = [draw_parameters(item, SIZE, random.Random(seed))[kind] for seed in range(300)]
        assert low <= min(drawn) < low + (high - low) / 50 and high - (high - low) / 50 < max(drawn) <= high


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["dark", "overexposure"])
def test_contrast_always_comes_back(kind):
    """However flat a picture is, as pages of text are: no level is off by more than the bound of an item."""
    levels = Image.fromarray(np.arange(256, dtype=np.uint8).repeat(3 * 32).reshape(256, 32, 3))
    with CodeTool(1) as tool:
        for contrast in (0.125, 0.1337, 0.2):
            repaired = tool.run(build_coding.repair_of({kind: contrast}), spoil(levels, kind, contrast, 0)).image
            assert np.abs(np.asarray(repaired, int) - np.asarray(levels, int)).max() <= 4


@pytest.mark.thorough
def test_same_seed_same_bytes_whatever_the_machine_does_beside(made, tmp_path):
    out, _, rows, folder = made
    build(write_rows(folder, rows.values()), tmp_path / "again", **FLAGS)
    names = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    assert names == sorted(str(path.relative_to(tmp_path / "again")) for path in (tmp_path / "again").rglob("*")
                           if path.is_file())
    assert filecmp.cmpfiles(out, tmp_path / "again", names, shallow=False)[1:] == ([], [])


@pytest.mark.thorough
def test_another_seed_gives_other_parts_kinds_strengths_and_noise():
    sources = [source(i) for i in range(100)]
    items = [assign(sources, seed, heldout=0.2) for seed in (0, 1)]
    assert [sum(a[i] == b[i] for a, b in zip(*items)) < 80 for i in (1, 2)] == [True, True]
    noisy = build_coding.Item(source(1), "train", "rotation90+noise")
    assert draw_parameters(noisy, SIZE, random.Random("0-1")) != draw_parameters(noisy, SIZE, random.Random("1-1"))


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["noise", "rotation180+noise"])
def test_noise_is_drawn_anew_for_every_seed_and_row(tmp_path, monkeypatch, kind):
    monkeypatch.setitem(build_coding.STRENGTHS, "noise", (30.0, 30.0))
    scene(0).save(tmp_path / "0.png")
    (tmp_path / "train-image").mkdir()
    written = []
    with CodeTool(1) as tool:
        for seed, number in ((0, 1), (1, 1), (0, 2)):
            item = build_coding.Item(source(number)._replace(path=tmp_path / "0.png"), "train", kind)
            row = build_coding.make_item(item, tmp_path, tool, seed, max_pixels=401_408)
            written.append(open_picture(tmp_path / "train-image" / row["processed_image_path"]))
    assert error_of(written[0], written[1]) > 10 and error_of(written[0], written[2]) > 10


@pytest.mark.thorough
def test_the_summary_counts_what_is_there(made):
    out, summary, rows, _ = made
    assert json.loads((out / "summary.json").read_text("utf-8")) == summary
    counts = Counter((part, "+".join(row["type"])) for part, row in written(out))
    for kind, row in summary["kinds"].items():
        assert (row["train"], row["heldout"]) == (counts["train", kind], counts["heldout", kind])
    assert sum(counts.values()) + len(summary["left_out"]) == len(rows)
    assert len(summary["left_out"]) < 10


# ---- which picture gets which kind ---------------------------------------------------------------

def kinds_of(items, part="train"):
    return Counter(item.kind for item in items if item.part == part)


@pytest.mark.thorough
def test_with_boxes_the_proportions_are_mats():
    items = assign([source(i, box=[0, 0, 500, 500]) for i in range(200)], seed=0, heldout=0.0)
    assert kinds_of(items) == {**dict.fromkeys(SINGLES, 10), **dict.fromkeys(PAIRS, 5), "crop": 90}
    assert [item.source.number for item in items] == list(range(200))


@pytest.mark.thorough
def test_both_parts_have_the_proportions():
    items = assign([source(i, box=[0, 0, 500, 500]) for i in range(400)], seed=0, heldout=0.5)
    for part in ("train", "heldout"):
        assert kinds_of(items, part) == {**dict.fromkeys(SINGLES, 10), **dict.fromkeys(PAIRS, 5), "crop": 90}


@pytest.mark.thorough
def test_without_boxes_the_others_keep_their_proportions():
    items = assign([source(i) for i in range(110)], seed=0, heldout=0.0)
    assert kinds_of(items) == dict.fromkeys(SINGLES, 10) | dict.fromkeys(PAIRS, 5)


@pytest.mark.thorough
def test_a_small_part_has_every_kind():
    items = assign([source(i) for i in range(15)], seed=0, heldout=0.0)
    assert kinds_of(items) == dict.fromkeys(SINGLES + PAIRS, 1)


@pytest.mark.thorough
def test_few_boxes_are_all_cropped():
    items = assign([source(i, box=[0, 0, 500, 500] if i < 20 else None) for i in range(130)], seed=0, heldout=0.0)
    assert kinds_of(items) == {**dict.fromkeys(SINGLES, 10), **dict.fromkeys(PAIRS, 5), "crop": 20}
    assert {item.source.number for item in items if item.kind == "crop"} == set(range(20))


@pytest.mark.thorough
def test_a_box_too_small_for_the_code_tool_is_no_crop():
    wide, narrow = [0, 0, 292, 400], [0, 0, 291, 400]  # of 96 x 72: 28 x 28 and 27 x 28 pixels
    for box, is_crop in ((wide, True), (narrow, False)):
        kinds = kinds_of(assign([source(i, box=box) for i in range(10)], seed=0, heldout=0.0))
        assert ("crop" in kinds) == is_crop


@pytest.mark.thorough
def test_a_question_that_names_its_box_is_only_cropped():
    """Turned, its box would be elsewhere."""
    questions = ["Read [0, 0, 500, 500].", "Read [0,0,500,500]."] * 15
    sources = [source(i, [0, 0, 500, 500], question) for i, question in enumerate(questions)]
    sources += [source(i) for i in range(30, 45)]
    items = assign(sources, seed=0, heldout=0.0)
    assert {item.kind for item in items if item.source.number < 30} == {"crop"}
    assert kinds_of(items) == {**dict.fromkeys(SINGLES + PAIRS, 1), "crop": 30}


@pytest.mark.thorough
def test_kinds_do_not_depend_on_having_a_box():
    """Or a policy could tell from the kind of picture what is wrong with it."""
    sources = [source(i, [0, 0, 500, 500] if i % 3 else None) for i in range(660)]  # 440 boxes, of which 297 are crops
    items = [item for item in assign(sources, seed=0, heldout=0.0) if item.kind != "crop"]
    boxed = Counter(item.kind for item in items if item.source.box)
    assert sum(boxed.values()) == 143  # of 363: six and a half rounds of 22, where the last half has each single kind once
    assert boxed == dict.fromkeys(SINGLES, 13) | dict.fromkeys(PAIRS[:4], 7) | dict.fromkeys(PAIRS[4:], 6)


@pytest.mark.thorough
def test_parts_share_no_picture_by_content(tmp_path):
    """The same pixels under another name, in another format and another mode are one picture."""
    rows = []
    for i in range(6):
        picture = scene(i)
        picture.save(tmp_path / f"{i}.png")
        picture.save(tmp_path / f"copy of {i}.bmp")
        picture.convert("RGBA").save(tmp_path / f"again {i}.webp", lossless=True)
        rows += [{"image": name, "question": "?", "answers": ["1"]} for name in
                 (f"{i}.png", f"copy of {i}.bmp", f"again {i}.webp")]
    looked = [look(read_source(tmp_path, row, number)) for number, row in enumerate(rows, start=1)]
    assert len({each.digest for each in looked}) == 6
    for seed in range(10):
        parts = {}
        for item in assign(looked, seed, heldout=0.3):
            parts.setdefault(item.source.digest, set()).add(item.part)
        assert sorted(map(sorted, parts.values())) == [["heldout"]] * 2 + [["train"]] * 4


@pytest.mark.thorough
def test_pictures_of_the_same_bytes_and_another_shape_differ(tmp_path):
    for name, size in (("wide", (40, 30)), ("high", (30, 40))):
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
    digests = {look(source(1)._replace(path=tmp_path / f"{name}.png")).digest for name in ("wide", "high")}
    assert len(digests) == 2


# ---- what is left out ----------------------------------------------------------------------------

@pytest.mark.thorough
@pytest.mark.parametrize("kind, degraded, repaired, is_kept", [
    ("rotation90", 4.01, 1.0, True), ("rotation90", 4.0, 0.0, False), ("crop", 50.0, 0.0, True),
    ("dark", 60.0, 4.0, True), ("dark", 60.0, 4.01, False), ("dark", 12.0, 3.0, True), ("dark", 12.0, 3.01, False),
    ("blur", 1.0, 0.95, True), ("blur", 1.0, 0.96, False),
    ("blur", 0.99, 0.1, False), ("noise", 20.0, 19.0, True), ("noise", 20.0, 19.01, False)])
def test_what_is_kept(kind, degraded, repaired, is_kept):
    assert (objection({kind: degraded}, degraded, repaired) == "") == is_kept


@pytest.mark.thorough
def test_a_picture_without_a_degradation_is_kept_if_nothing_changes():
    assert objection({}, 0.0, 0.0) == "" and objection({}, 0.0, 0.01) != ""


@pytest.mark.thorough
@pytest.mark.parametrize("turn, other, degraded, repaired, is_kept", [
    (50.0, {"dark": 60.0}, 70.0, 4.0, True), (50.0, {"dark": 60.0}, 70.0, 4.01, False),  # the repair works
    (50.0, {"dark": 12.0}, 70.0, 3.0, True), (50.0, {"dark": 12.0}, 70.0, 3.01, False),
    (50.0, {"blur": 8.0}, 55.0, 7.6, True), (50.0, {"blur": 8.0}, 55.0, 7.61, False),  # the turn's 50 do not count
    (50.0, {"noise": 20.0}, 55.0, 19.0, True), (50.0, {"noise": 20.0}, 55.0, 19.01, False),
    (4.01, {"noise": 20.0}, 20.0, 9.0, True), (4.0, {"noise": 20.0}, 20.0, 9.0, False),  # the rotation is there
    (4.01, {"dark": 60.0}, 60.0, 2.0, True), (4.0, {"dark": 60.0}, 60.0, 2.0, False),
    (50.0, {"dark": 4.01}, 50.0, 1.0, True), (50.0, {"dark": 4.0}, 50.0, 1.0, False),  # the other half is there
    (50.0, {"blur": 1.0}, 50.0, 0.9, True), (50.0, {"blur": 0.99}, 50.0, 0.9, False),
    (9.0, {"noise": 20.0}, 19.01, 9.0, True), (9.0, {"noise": 20.0}, 19.0, 9.0, False)])  # it is not good enough as it is
def test_which_pairs_are_kept(turn, other, degraded, repaired, is_kept):
    assert (objection({"rotation90": turn, **other}, degraded, repaired) == "") == is_kept


@pytest.mark.thorough
def test_a_picture_that_shows_no_degradation_is_left_out(tmp_path):
    """A grey one is the same when it is turned or blurred; a black one cannot be darker."""
    rows = []
    for i in range(12):
        Image.new("RGB", SIZE, (100 + i,) * 3).save(tmp_path / f"{i}.png")
        Image.new("RGB", SIZE, (i, 0, 0)).save(tmp_path / f"black {i}.png")
        rows += [{"image": f"{name}{i}.png", "question": "?", "answers": ["1"]} for name in ("", "black ")]
    scene(0).save(tmp_path / "scene.png")
    summary = build(write_rows(tmp_path, rows), tmp_path / "out", **FLAGS | {"heldout": 0.0})
    for kind in ("rotation90", "rotation180", "blur", *PAIRS):
        reasons = [row["reason"] for row in summary["left_out"] if row["kind"] == kind]
        assert summary["kinds"][kind]["train"] == 0 and len(reasons) >= 1
        assert all(reason == f"the error of {kind.split('+')[0]} is only 0.0 without a repair" for reason in reasons)
    dark = [row["row"] for row in summary["left_out"] if row["kind"] == "dark"]
    assert all(number % 2 == 0 for number in dark)  # the black ones
    assert all(row["id"] % 2 for row in json.loads((tmp_path / "out" / "train.json").read_text()) if row["type"] == ["dark"])
    assert not (tmp_path / "out" / "heldout.json").exists()
    files = {path.name for path in (tmp_path / "out" / "train-image").iterdir()}
    assert files == {row[key] for row in json.loads((tmp_path / "out" / "train.json").read_text())
                     for key in ("ori_image_path", "processed_image_path")}  # nothing of what is left out


@pytest.mark.thorough
def test_a_pair_whose_blur_does_not_show_is_left_out(tmp_path):
    """A slope of light is another one when it is turned, and the same when it is blurred."""
    for i in range(22):
        picture = Image.fromarray(np.linspace(i, 200, 96 * 72).reshape(72, 96).astype(np.uint8)).convert("RGB")
        picture.save(tmp_path / f"{i}.png")
    rows = [{"image": f"{i}.png", "question": "?", "answers": ["1"]} for i in range(22)]
    summary = build(write_rows(tmp_path, rows), tmp_path / "out", **FLAGS | {"heldout": 0.0})
    assert {row["kind"] for row in summary["left_out"]} == {"blur", "rotation90+blur", "rotation180+blur"}
    assert all("the error of blur is only" in row["reason"] for row in summary["left_out"])
    assert summary["kinds"]["rotation90+noise"]["train"] == summary["kinds"]["rotation180+noise"]["train"] == 1


@pytest.mark.thorough
@pytest.mark.parametrize("repair, reason", [
    ("image = image.point(lambda p: p / {0} / 2)", "the error after the repair is"), ("image = image.rotate(", "SyntaxError"),
    ("image = image.resize((10, 10))", "too small")])
def test_an_item_whose_repair_does_not_work_is_left_out(tmp_path, monkeypatch, repair, reason):
    monkeypatch.setitem(build_coding.REPAIRS, "dark", repair)
    summary = build(make_rows(tmp_path, 22, box=None), tmp_path / "out", **FLAGS | {"heldout": 0.0})
    dark = [row for row in summary["left_out"] if "dark" in row["kind"]]
    assert len(dark) == 4 and all(reason in row["reason"] for row in dark)
    assert all(summary["kinds"][kind]["train"] == 0 for kind in ("dark", "rotation90+dark", "rotation180+dark"))
    assert summary["kinds"]["overexposure"]["train"] > 0


@pytest.mark.thorough
def test_a_part_without_items_is_an_error(tmp_path):
    rows = []
    for i in range(2):
        Image.new("RGB", SIZE, (100 + i,) * 3).save(tmp_path / f"{i}.png")
        rows.append({"image": f"{i}.png", "question": "?", "answers": ["1"]})
    with pytest.raises(ValueError, match=r"no item is left for train\.json; in row \d the error of rotation90 is only 0\.0"):
        build(write_rows(tmp_path, rows), tmp_path / "new" / "out", **FLAGS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.png", "1.png", "rows.jsonl"]


# ---- crops, turned and large pictures ------------------------------------------------------------

@pytest.mark.thorough
def test_the_box_of_a_crop_stands_in_the_question_as_the_released_code_reads_it(made):
    out, _, rows, _ = made
    crops = [(part, row) for part, row in written(out) if row["type"] == ["crop"]]
    assert len(crops) > 15
    for part, row in crops:
        given = rows[row["id"]]
        assert row["question"].startswith(f"{given['question']} This is about the part within {given['box']} of the image")
        assert [int(edge) for edge in BOX.search(row["question"]).groups()] == given["box"] == row["parameters"]["crop"]
        with Image.open(out / f"{part}-image" / row["ori_image_path"]) as original:
            code = released_crop("image[0:1, 0:1]", row, original.size)
            top, bottom, left, right = map(int, re.fullmatch(r"image\[(\d+):(\d+), (\d+):(\d+)\]", code).groups())
            cut = original.convert("RGB").crop((left, top, right, bottom))
        assert error_of(cut, open_picture(out / f"{part}-image" / row["processed_image_path"])) == 0


@pytest.mark.thorough
def test_a_question_that_names_its_box_stays_as_it_is(tmp_path):
    question = "Recognize the text within the [0, 100, 500, 750] of the image."
    build(make_rows(tmp_path, 12, question=question), tmp_path / "out", **FLAGS)
    assert {row["question"] for _, row in written(tmp_path / "out")} == {question}


@pytest.mark.thorough
def test_a_picture_that_lies_on_its_side_is_cropped_upright(tmp_path):
    """As cameras write it: the file's own orientation comes first."""
    upright = scene(3, (120, 80))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise to see it upright
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "camera.png", exif=exif)
    row = {"image": "camera.png", "question": "Read [500, 0, 1000, 500].", "answers": ["1"], "box": [500, 0, 1000, 500]}
    build(write_rows(tmp_path, [row]), tmp_path / "out", **FLAGS | {"heldout": 0.0})
    [item] = json.loads((tmp_path / "out" / "train.json").read_text())
    cut = open_picture(tmp_path / "out" / "train-image" / item["processed_image_path"])
    assert cut.size == (60, 40) and error_of(cut, upright.crop((60, 0, 120, 40))) == 0
    assert load_tasks(tmp_path / "out" / "train.json")[0]["image"].endswith("_ori.png")


@pytest.mark.thorough
def test_large_pictures_are_scaled_down_but_for_crops(tmp_path):
    rows = []
    for i in range(24):
        scene(i, (300, 200)).save(tmp_path / f"{i}.png")
        rows.append({"image": f"{i}.png", "question": "?", "answers": ["1"], "box": [0, 0, 500, 500]})
    build(write_rows(tmp_path, rows), tmp_path / "out", **FLAGS | {"max_pixels": 15_000})
    sizes = {}
    for part, row in written(tmp_path / "out"):
        with Image.open(tmp_path / "out" / f"{part}-image" / row["processed_image_path"]) as picture:
            sizes.setdefault("+".join(row["type"]), set()).add(picture.size)
    assert sizes["dark"] == {(150, 100)} and sizes["rotation90+dark"] == {(100, 150)}
    assert sizes["crop"] == {(150, 100)} and sizes["none"] == {(300, 200)}  # half of 300 x 200; as it was


# ---- bad input -----------------------------------------------------------------------------------

GOOD = {"image": "0.png", "question": "?", "answers": ["1"]}


@pytest.mark.thorough
@pytest.mark.parametrize("change, reason, way_out", [
    ({"image": None}, "image must be a text, got None", 'add "image"'),
    ({"image": 3}, "image must be a text, got 3", 'add "image"'),
    ({"image": "no.png"}, "image 'no.png' is not in ", "put it there"),
    ({"image": "."}, "image '.' is not in ", "put it there"),
    ({"image": "damaged.png"}, "damaged.png cannot be read", "replace it or remove the row"),
    ({"image": "strip.png"}, "strip.png has 2010x10 pixels", "crop or pad it, or remove the row"),
    ({"question": " "}, "question must be a text, got ' '", 'add "question"'),
    ({"answers": None}, "answers must be one or more texts, got None", 'add "answers"'),
    ({"answers": []}, "answers must be one or more texts, got []", 'add "answers"'),
    ({"answers": [""]}, "answers has an empty text", "fill it in or remove the row"),
    ({"box": [0, 0, 500]}, "box is [0, 0, 500], not [left, top, right, bottom]", "mend it or remove it"),
    ({"box": [0, 0, 500, 1001]}, "box is [0, 0, 500, 1001]", "mend it or remove it"),
    ({"box": [-1, 0, 500, 500]}, "box is [-1, 0, 500, 500]", "mend it or remove it"),
    ({"box": [500, 0, 500, 500]}, "box is [500, 0, 500, 500]", "mend it or remove it"),
    ({"box": [0, 600, 500, 500]}, "box is [0, 600, 500, 500]", "mend it or remove it"),
    ({"box": [0.0, 0.1, 0.5, 0.5]}, "box is [0.0, 0.1, 0.5, 0.5]", "whole numbers from 0 to 1000"),
    ({"box": [False, 0, True, 500]}, "box is [False, 0, True, 500]", "mend it or remove it"),
    ({"box": "0, 0, 500, 500"}, "box is '0, 0, 500, 500'", "mend it or remove it"),
    ({"id": "first"}, "has the id 'first' of row 1", "give every row its own"),
])
def test_a_bad_row_is_named_and_nothing_is_left(tmp_path, change, reason, way_out):
    scene(0).save(tmp_path / "0.png")
    (tmp_path / "damaged.png").write_bytes((tmp_path / "0.png").read_bytes()[:300])
    Image.new("RGB", (2010, 10)).save(tmp_path / "strip.png")
    path = write_rows(tmp_path, [{**GOOD, "id": "first"}, {**GOOD, **change}])
    with pytest.raises(ValueError) as error:
        build(path, tmp_path / "out", **FLAGS)
    assert str(error.value).startswith(f"{path}, row 2: ")
    assert reason in str(error.value) and way_out in str(error.value)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["0.png", "damaged.png", "rows.jsonl", "strip.png"]


@pytest.mark.thorough
def test_rows_are_checked_before_any_picture_is_read(tmp_path):
    (tmp_path / "0.png").write_bytes(b"no picture")
    path = write_rows(tmp_path, [GOOD, {**GOOD, "answers": []}])
    with pytest.raises(ValueError, match="row 2: answers"):
        build(path, tmp_path / "out", **FLAGS)


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["out", "out.tmp"])
def test_a_folder_that_is_there_is_left_alone(tmp_path, name):
    path = make_rows(tmp_path / "rows", 4)
    (tmp_path / name).mkdir()
    (tmp_path / name / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match=rf"{name} is there already; remove it, or give another -o"):
        build(path, tmp_path / "out", **FLAGS)
    assert [each.name for each in (tmp_path / name).iterdir()] == ["mine.txt"]


@pytest.mark.thorough
@pytest.mark.parametrize("flags, reason", [
    ({"heldout": 1.0}, "--heldout 1.0"), ({"heldout": -0.1}, "--heldout -0.1"), ({"heldout": float("nan")}, "--heldout nan"),
    ({"max_pixels": 783}, "--max_pixels 783: .* at least 784"), ({"heldout": 0.6}, "leaves none for training")])
def test_flags_that_cannot_work_are_refused(tmp_path, flags, reason):
    with pytest.raises(ValueError, match=reason):
        build(make_rows(tmp_path, 1), tmp_path / "out", **FLAGS | flags)


# ---- the command ---------------------------------------------------------------------------------

@pytest.mark.thorough
def test_the_command_says_what_it_made(tmp_path):
    done = run_script("data/build_coding.py", make_rows(tmp_path, 24), "-o", tmp_path / "deep" / "out", "--heldout", 0)
    assert done.returncode == 0, done.stderr
    assert "24/24" in done.stderr  # the progress bars
    assert len(done.stdout.splitlines()) == 17 and "deep/out: made in" in done.stdout.splitlines()[-1]
    assert sum(int(line.split()[2]) for line in done.stdout.splitlines()[:-1]) >= 20
    again = run_script("data/build_coding.py", tmp_path / "rows.jsonl", "-o", tmp_path / "deep" / "out")
    assert (again.returncode, again.stdout) == (2, "")
    assert again.stderr == f"error: {tmp_path / 'deep' / 'out'} is there already; remove it, or give another -o\n"


@pytest.mark.thorough
def test_ctrl_c_leaves_nothing(tmp_path):
    path = make_rows(tmp_path / "rows", 300)
    process = start_script("data/build_coding.py", path, "-o", tmp_path / "out", output=tmp_path / "said")
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("out.tmp/train-image/*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    process.join(30)
    assert process.exitcode == 130
    assert (tmp_path / "said").read_text().endswith(f"stopped; {tmp_path / 'out'} was not made\n")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["rows", "said"]


@pytest.mark.thorough
def test_train_takes_the_files_as_they_are(made, tmp_path):
    out, _, _, _ = made
    done = run_script("train.py", "--tasks", out / "train.json", "--eval_tasks", out / "heldout.json", "--eval_limit", 4,
                      "--steps", 1, "--prompts_per_step", 4, "--group_size", 2, "--max_turns", 2,
                      "--output_dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    [row] = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert row["tasks_failed"] == 0


@pytest.mark.thorough
def test_photographs(tmp_path):
    """Those that scikit-image ships, each often enough to get every kind."""
    found = importlib.util.find_spec("skimage")
    if found is None:
        pytest.skip("needs the photographs of scikit-image: pip install scikit-image")
    folder = Path(found.submodule_search_locations[0], "data")
    names = ["astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png", "grass.png", "gravel.png",
             "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png", "page.png", "retina.jpg", "rocket.jpg"]
    rows = [{"image": str(folder / name), "question": "?", "answers": ["1"], "box": [100, 200, 600, 700]}
            for name in names if (folder / name).exists()] * 14
    summary = build(write_rows(tmp_path, rows), tmp_path / "out", **FLAGS)
    assert len(rows) >= 140 and len(summary["left_out"]) <= len(rows) // 50
    for kind, row in summary["kinds"].items():
        assert row["train"] > 0 and row["heldout"] > 0, kind
        assert {"blur", "noise"} & set(kind.split("+")) or row["repaired"] < 3
    for kind in ("noise", "rotation90+noise", "rotation180+noise"):
        assert summary["kinds"][kind]["repaired"] < summary["kinds"][kind]["degraded"] / 2
    assert summary["kinds"]["blur"]["repaired"] < 0.9 * summary["kinds"]["blur"]["degraded"]
