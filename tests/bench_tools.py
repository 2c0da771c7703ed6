"""What the tools cost: python tests/bench_tools.py --calls 10000 --passages 1000000

Prints one table: warm and cold code calls, what the lock itself takes, growth over many calls, and the local search index.
Medians; a locked and an unlocked call alternate, so that their difference is that of one moment.
"""
import argparse
import json
import os
import random
import sys
import tempfile
import time
from itertools import accumulate
from pathlib import Path
from statistics import median, quantiles

from PIL import Image
from tqdm import tqdm

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[1] / "data")]

from build_index import index_corpus, read_corpus  # noqa: E402
from tools import CodeTool, open_sqlite  # noqa: E402

TRIVIAL = "result = image"
CROP = """
from PIL import Image
image = Image.open('path_to_input_image.jpg')
image.crop((256, 192, 768, 576)).resize((1024, 768)).save('path_to_output_image.jpg')
"""


def milliseconds(call):
    start = time.perf_counter()
    assert call().ok
    return 1000 * (time.perf_counter() - start)


def photo():
    """1,024 x 768, neither flat nor noise."""
    random.seed(0)
    small = Image.new("RGB", (64, 48))
    small.putdata([tuple(random.choices(range(256), k=3)) for _ in range(64 * 48)])
    return small.resize((1024, 768), Image.Resampling.BICUBIC)


def code_calls():
    """Yields (what, milliseconds)."""
    small, large = Image.new("RGB", (56, 56)), photo()
    starts = []
    for _ in range(5):
        start = time.perf_counter()
        with CodeTool(1) as tool:
            started = time.perf_counter()
            assert tool.run(TRIVIAL, small).ok
            starts.append((1000 * (started - start), 1000 * (time.perf_counter() - start)))
    with CodeTool(1) as locked, CodeTool(1, unlocked=True) as unlocked:
        pairs = [(milliseconds(lambda: locked.run(TRIVIAL, small)), milliseconds(lambda: unlocked.run(TRIVIAL, small)))
                 for _ in range(200)]
        crops = [milliseconds(lambda: locked.run(CROP, large)) for _ in range(50)]
    warm, plain = (median(column) for column in zip(*pairs))
    cold = median(total for _, total in starts)
    yield "server start", median(first for first, _ in starts)
    yield "trivial call", warm
    yield "the lock itself (locked - unlocked)", warm - plain
    yield "crop + resize of 1,024 x 768", median(crops)
    with CodeTool(2) as tool:
        batches = []
        for _ in range(3):
            start = time.perf_counter()
            assert all(result.ok for result in tool.run_many([(CROP, large)] * 64))
            batches.append(1000 * (time.perf_counter() - start))
    yield "64 crops at once, 2 workers", median(batches)
    yield "cold: server start and one trivial call", cold
    yield "cold / warm (a ratio)", cold / warm


def footprint(tool):
    """Of this process and its servers: memory, open files, processes, files in their folders."""
    pids = [os.getpid(), *(server[0].pid for server in tool._idle)]
    return {"MiB": sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 for pid in pids) / 2 ** 20,
            "open files": sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids),
            "processes": sum(len(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()) for pid in pids),
            "files": sum(len(files) for server in tool._idle for _, _, files in os.walk(server[2]))}


def growth(calls):
    """The footprint before and after many calls, good ones and bad ones."""
    image, codes = Image.new("RGB", (56, 56)), [TRIVIAL, CROP, "1 / 0", "import os; os._exit(0)", "import os; os.fork()"]
    with CodeTool(2) as tool:
        tool.run_many([(code, image) for code in codes * 40])
        before = footprint(tool)
        for _ in tqdm(range(calls // 100), desc="calls", unit="00"):
            tool.run_many([(code, image) for code in codes * 20])
        return before, footprint(tool)


def made_up_corpus(path, passages):
    """Passages of 100 words, as frequent as in English by rank (Zipf), out of 500,000; returns some of them."""
    rng, syllables = random.Random(0), [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    lengths = [2 if n < 4_900 else 3 if n < 343_000 else 4 for n in range(500_000)]
    words = ["".join(syllables[n // 70 ** k % 70] for k in range(length)) for n, length in enumerate(lengths)]
    cumulative = list(accumulate(1 / rank for rank in range(1, len(words) + 1)))
    some = []
    with open(path, "w") as file:
        for i in tqdm(range(passages), desc="corpus", unit="passage"):
            text = " ".join(rng.choices(words, cum_weights=cumulative, k=100))
            print(json.dumps({"id": i, "contents": f"{words[-1 - i % 99_999]}\n{text}"}), file=file)
            some += [text] * (i % max(passages // 200, 1) == 0)
    return some


def local_search(passages):
    """Yields (what, value) of an index of made-up passages and of queries of 8 words of one of them."""
    with tempfile.TemporaryDirectory() as folder:
        corpus, index, rng = Path(folder, "corpus.jsonl"), Path(folder, "index.sqlite"), random.Random(1)
        some = made_up_corpus(corpus, passages)
        start = time.perf_counter()
        index_corpus(index, read_corpus(corpus))
        yield "passages indexed a second", passages / (time.perf_counter() - start)
        yield "index / corpus (a ratio)", index.stat().st_size / corpus.stat().st_size
        search, times = open_sqlite(f"sqlite:{index}"), []
        for text in some:
            start = time.perf_counter()
            assert search(" ".join(rng.sample(text.split(), 8)), 3)
            times.append(1000 * (time.perf_counter() - start))
        yield f"query of 8 words among {passages}, median in ms", median(times)
        yield f"query of 8 words among {passages}, 95th percentile", quantiles(times, n=20)[-1]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--passages", type=int, default=100_000)
    args = parser.parse_args()
    for what, value in code_calls():
        print(f"{what:<45}{value:>10.1f}" + ("" if "ratio" in what else " ms"), flush=True)
    before, after = growth(args.calls)
    for what in before:
        print(f"{what + f' before and after {args.calls} calls':<45}{before[what]:>10.1f}{after[what]:>10.1f}", flush=True)
    for what, value in local_search(args.passages):
        print(f"{what:<45}{value:>10.2f}", flush=True)


if __name__ == "__main__":
    main()
