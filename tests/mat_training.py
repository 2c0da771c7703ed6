"""MAT's two training files as published, but made up: every field, 63 rows of 20 questions, 3,400 (or 3,500) of 1,200.

What a row holds is read off the released training code and its scripts: the chain so far in `problem` (search) or in `context`
(coding), the gold turn in `gt` with its thought and in `solution` without, the clean image in the row that answers.
"""
import json
import os
from pathlib import Path

from PIL import Image

SINGLE = ["rotation90", "rotation180", "dark", "overexposure", "blur", "noise", "crop", "none"]
PAIRS = [f"{rotation}+{other}" for rotation in SINGLE[:2] for other in SINGLE[2:6]]
THINK = "<think> I look closely. </think>\n"
CODE = "<code>\n```python\nimport cv2\n\nimage = cv2.imread('path_to_input_image.jpg')\n```\n</code>"


def search_rows(questions: int = 20) -> list[dict]:
    """Two searches and an answer for each question, three for the last three: 63 rows of 20 questions."""
    rows = []
    for n in range(questions):
        problem = f"<query> In which year was the harbour of town {n} built? </query>"
        searches = [f"harbour of town {n} part {part}" for part in range(3 if n >= questions - 3 else 2)]
        for query in [*searches, None]:
            action = f"<search> {query} </search>" if query else f"<answer> {1800 + n} </answer>"
            rows.append({"image_path": f"{n}.png", "problem": problem, "solution": f"{THINK}{action}"})
            problem += f"\n{THINK}{action}\n<information> 1. Content: Nothing is known of it. </information> "
    return rows


def coding_rows(singles: int = 100, pairs: int = 50, without_code: int = 200) -> list[dict]:
    """2 or 3 rows for each of 8 * singles + 8 * pairs questions, the last of them without code: 3,400 rows of 1,200."""
    names = [(kind, n) for kind in PAIRS for n in range(pairs)] + [(kind, n) for kind in SINGLE for n in range(singles)]
    rows = []
    for place, (kind, n) in enumerate(names):
        labels = "{" + ", ".join(f"'{label}'" for label in kind.split("+")) + "}"
        turns = [("pre_problem", "proc", f"<problem> {labels} </problem>"), ("pre_code", "proc", CODE),
                 ("pre_answer", "ori", f"<answer> {n} </answer>")]
        chain = ""
        for step, variant, action in turns[::2] if place >= len(names) - without_code else turns:
            rows.append({"type": step, "image_path": f"{kind}_{n}_{variant}.png", "context": chain, "gt": THINK + action,
                         "problem": f"<query> What is the number on sign {n % 7}? </query>", "solution": action})
            chain += f"{THINK}{action}\n"
    return rows


def write_training(folder: Path, name: str, rows: list[dict]) -> Path:
    """The file NAME.json and its NAME_images, as on the hub. The images are small, and the same."""
    images = folder / f"{name}_images"
    images.mkdir(parents=True)
    first, *others = sorted({row["image_path"] for row in rows})
    Image.new("RGB", (56, 56), (90, 120, 30)).save(images / first)
    for image in others:
        os.link(images / first, images / image)
    (folder / f"{name}.json").write_text(json.dumps(rows))
    return folder / f"{name}.json"
