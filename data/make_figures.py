"""Draw the README's figures from finished runs, with Pillow alone.

    python data/make_figures.py runs/seed0 runs/seed1 runs/seed2 --out data/figures

writes learning_curve.png (success of the sampled rollouts at every step, a line a seed, and
held-out success before, after and with the tools switched off) and rollouts.png (a rollout of the
first step that failed and one of the last step that did not, turn by turn, with the images before
and after the tool). All of it is read from the runs' metrics.jsonl, evaluations.jsonl and
rollouts/.
"""
import argparse
import json
import textwrap
from pathlib import Path
from statistics import median

from PIL import Image, ImageDraw, ImageFont

INK, GREY, PALE, COLOURS = "#1f2328", "#8b949e", "#d0d7de", ("#0969da", "#bc4c00", "#1a7f37",
                                                             "#8250df", "#cf222e")
# Name, evaluation's place, tools
WHEN = (("before", 0, "on"), ("after", -1, "on"), ("tools off", -1, "off"))


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)  # comes with Pillow


def draw_curves(draw: ImageDraw.ImageDraw, runs: list[Path],
                box: tuple[int, int, int, int]) -> None:
    """Success of the sampled rollouts by step: thin lines the seeds, a thick one their median."""
    left, top, right, bottom = box
    series = [[row["success"] for row in read_rows(run / "metrics.jsonl")] for run in runs]
    steps = min(map(len, series))
    middle = [median(there) if (there := [each[i] for each in series if each[i] is not None])
              else None for i in range(steps)]

    def point(step: int, value: float) -> tuple[float, float]:
        return left + (right - left) * step / max(steps - 1, 1), bottom - (bottom - top) * value

    for percent in range(0, 101, 25):
        y = point(0, percent / 100)[1]
        draw.line((left, y, right, y), fill=PALE)
        draw.text((left - 8, y), f"{percent} %", fill=GREY, font=font(15), anchor="rm")
    for step in range(0, steps, 10):
        draw.text((point(step, 0)[0], bottom + 8), str(step + 1), fill=GREY, font=font(15),
                  anchor="mt")
    # A step may have no value
    for values, colour, width in [*zip(series, COLOURS, [2] * len(runs)), (middle, INK, 4)]:
        draw.line([point(i, v) for i, v in enumerate(values[:steps]) if v is not None], fill=colour,
                  width=width, joint="curve")
    draw.text((left, top - 56), "success of the sampled rollouts, by step", fill=INK, font=font(18))
    for i, (run, colour) in enumerate(zip([*[run.name for run in runs], "median"],
                                          [*COLOURS[:len(runs)], INK])):
        draw.text((right - 90, bottom - 26 * (len(runs) + 1 - i)), run, fill=colour, font=font(16))


def draw_bars(draw: ImageDraw.ImageDraw, runs: list[Path], box: tuple[int, int, int, int]) -> None:
    """Held-out success by type, median over the runs: before, after, tools off."""
    left, top, right, bottom = box
    rows = [read_rows(run / "evaluations.jsonl") for run in runs]
    picked = {name: [[r for r in each if r["tools"] == tools][place] for each in rows]
              for name, place, tools in WHEN}
    kinds = sorted(picked["after"][0]["by_type"])
    slot = (right - left) / len(kinds)
    for percent in range(0, 101, 25):
        y = bottom - (bottom - top) * percent / 100
        draw.line((left, y, right, y), fill=PALE)
    for k, kind in enumerate(kinds):
        for n, (name, _, _) in enumerate(WHEN):
            value = median(row["by_type"][kind] for row in picked[name])
            x = left + slot * k + slot * (0.14 + 0.24 * n)
            draw.rectangle((x, bottom - (bottom - top) * value, x + slot * 0.22, bottom),
                           fill=(PALE, COLOURS[0], GREY)[n])
        draw.text((left + slot * (k + 0.5), bottom + 8), kind.replace("overexposure", "overexp."),
                  fill=GREY, font=font(14),
                  anchor="mt")
    title = ", ".join(f"{name} {100 * median(row['success'] for row in picked[name]):.0f} %"
                      for name, _, _ in WHEN)
    draw.text((left, top - 56), f"held-out success: {title}", fill=INK, font=font(18))
    for n, (name, _, _) in enumerate(WHEN):
        draw.rectangle((left + 130 * n, top - 24, left + 130 * n + 12, top - 12),
                       fill=(PALE, COLOURS[0], GREY)[n])
        draw.text((left + 130 * n + 18, top - 26), name, fill=GREY, font=font(14))


def learning_curve(runs: list[Path]) -> Image.Image:
    image = Image.new("RGB", (1500, 460), "white")
    draw = ImageDraw.Draw(image)
    draw_curves(draw, runs, (80, 80, 700, 410))
    draw_bars(draw, runs, (790, 80, 1480, 410))
    return image


def draw_rollout(row: dict, title: str, folder: Path, width: int) -> Image.Image:
    """One rollout as a column: the task's image, then each turn with what the tool gave back."""
    image = Image.new("RGB", (width, 1200), "white")
    draw, y = ImageDraw.Draw(image), 16
    draw.text((16, y), title, fill=INK, font=font(20))
    y = paste(image, Image.open(row["image"]), y + 36, row["question"])
    for turn in row["turns"]:
        for line in turn["text"].splitlines():
            for piece in textwrap.wrap(line, 62, subsequent_indent="    ") or [""]:
                draw.text((16, y), piece, fill=COLOURS[0], font=font(15))
                y += 20
        y += 6
        if turn.get("image"):
            y = paste(image, Image.open(folder / turn["image"]), y, turn["observation"] or "")
        elif turn["observation"]:
            for piece in textwrap.wrap(turn["observation"], 62):
                draw.text((16, y), piece, fill=GREY, font=font(15))
                y += 20
            y += 6
    verdict = "right" if row["answer"] in row["answers"] else "wrong"
    reward = f"   reward {row['reward']:.2f}" if "reward" in row else ""
    draw.text((16, y + 4),
              f"gold: {row['answers'][0]}   answer: {row['answer']}   ({verdict}){reward}",
              fill=COLOURS[2] if verdict == "right" else COLOURS[4], font=font(16))
    return image.crop((0, 0, width, y + 40))


def paste(image: Image.Image, picture: Image.Image, y: int, text: str) -> int:
    """Put a picture, twice its size and at least 112 pixels high, with text beside it; returns the
    next y."""
    scale = max(2, 112 // picture.height)
    shown = picture.convert("RGB").resize((picture.width * scale, picture.height * scale),
                                          Image.Resampling.NEAREST)
    image.paste(shown, (16, y))
    draw = ImageDraw.Draw(image)
    for i, piece in enumerate(textwrap.wrap(text, 42)):
        draw.text((32 + shown.width, y + 20 * i), piece, fill=GREY, font=font(15))
    return y + shown.height + 12


def find_pair(first: list[dict], last: list[dict], family: str) -> tuple[dict, dict] | None:
    """A wrong answer, after a tool worked if there is one, and a right one after a tool worked; of
    as many turns where possible."""
    def answers(rows: list[dict], is_right: bool) -> list[dict]:
        return [row for row in rows if family in str(row["id"]) and row["answer"] is not None
                and (row["answer"] in row["answers"]) == is_right]

    def worked(rows: list[dict]) -> list[dict]:
        return [row for row in rows if any(turn.get("ok") for turn in row["turns"])]

    wrong, after = answers(first, False), worked(answers(last, True))
    if not wrong or not after:
        return None
    before = (worked(wrong) or wrong)[0]
    alike = [row for row in after if len(row["turns"]) == len(before["turns"])]
    return before, (alike or after)[0]


def rollout_pairs(run: Path) -> Image.Image | None:
    """A row for each family: a failed rollout of the first step beside a right one of the last.

    None if the run has no such rollouts.
    """
    folder, columns = run / "rollouts", []
    steps = sorted(folder.glob("step_*.jsonl"), key=lambda path: int(path.stem[5:]))
    shown = steps[0], steps[-1]
    for family in ("coding", "search"):
        pair = find_pair(*map(read_rows, shown), family)
        for row, step in zip(pair or (), shown):
            title = f"{family}: {step.stem.replace('_', ' ')}"
            columns.append(draw_rollout(row, title, folder, 560))
    if not columns:
        return None
    heights = [max(a.height, b.height) for a, b in zip(columns[::2], columns[1::2])]
    sheet = Image.new("RGB", (560 * 2, sum(heights)), "white")
    for i, column in enumerate(columns):
        sheet.paste(column, (560 * (i % 2), sum(heights[:i // 2])))
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="output folders of train.py, one a seed")
    parser.add_argument("--out", type=Path, default=Path("data/figures"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    learning_curve(args.runs).save(args.out / "learning_curve.png", optimize=True)
    pairs = rollout_pairs(args.runs[0])
    if pairs is None:
        print(f"no rollouts.png: {args.runs[0]} has no wrong rollout in its first step and right "
              "one in its last, of one family")
    else:
        pairs.save(args.out / "rollouts.png", optimize=True)


if __name__ == "__main__":
    main()
