"""What the tools cost: python tests/bench_tools.py --calls 10000 --passages 100000 1000000

Prints one table: warm and cold code calls, what the lock itself takes, growth over many calls, the local search index, and
for a language without spaces its pairs of characters beside SQLite's trigrams. Medians; a locked and an unlocked call
alternate, so that their difference is that of one moment.
"""
import argparse
import json
import os
import random
import sqlite3
import sys
import tempfile
import time
from itertools import accumulate
from pathlib import Path
from statistics import mean, median, quantiles

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


def without_spaces(passages):
    """Yields (what, value): made-up Chinese, words of 1 to 4 characters as frequent as by Zipf, in our index and in FTS5's own
    of trigrams. A query is the rarest words of a passage, written together; found: the first passage holds them all."""
    rng, characters = random.Random(0), [chr(0x4E00 + n) for n in range(3_500)]
    lengths = rng.choices((1, 2, 3, 4), (5, 70, 15, 10), k=50_000)
    words = ["".join(rng.choices(characters, k=length)) for length in lengths]
    cumulative = list(accumulate(1 / rank for rank in range(1, len(words) + 1)))
    texts = [rng.choices(range(len(words)), cum_weights=cumulative, k=100) for _ in range(passages)]
    shown = ["".join(words[n] for n in text) for text in texts]
    size = sum(len(text.encode()) for text in shown)
    with tempfile.TemporaryDirectory() as folder:
        ours, trigrams = Path(folder, "ours.sqlite"), Path(folder, "trigrams.sqlite")
        index_corpus(ours, ((text, text) for text in shown))
        database = sqlite3.connect(trigrams)
        database.execute("CREATE VIRTUAL TABLE words USING fts5(text, tokenize='trigram')")
        database.executemany("INSERT INTO words(rowid, text) VALUES (?, ?)", enumerate(shown))
        database.commit()

        def by_trigrams(query, topk):
            match = " OR ".join(f'"{query[i:i + 3]}"' for i in range(max(len(query) - 2, 1)))
            sql = "SELECT text FROM words WHERE words MATCH ? ORDER BY bm25(words) LIMIT ?"
            return database.execute(sql, (match, topk)).fetchall()
        for name, path, search in (("pairs", ours, open_sqlite(f"sqlite:{ours}")), ("trigrams", trigrams, by_trigrams)):
            yield f"Chinese, {name}: index / text (a ratio)", path.stat().st_size / size
            for number in (1, 3):
                found, times = [], []
                for at in range(0, passages, max(passages // 200, 1)):
                    wanted = [words[n] for n in sorted(set(texts[at]))[-number:]]
                    query = "".join(wanted)
                    start = time.perf_counter()
                    best = search(query, 1)
                    times.append(1000 * (time.perf_counter() - start))
                    found.append(bool(best) and all(word in best[0][0] for word in wanted))
                yield f"Chinese, {name}: {number} of the rare words, found (a share)", mean(found)
                yield f"Chinese, {name}: {number} of the rare words, median in ms", median(times)


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--passages", type=int, nargs="+", default=[100_000])
    args = parser.parse_args()
    for what, value in code_calls():
        print(f"{what:<60}{value:>10.1f}" + ("" if "ratio" in what else " ms"), flush=True)
    before, after = growth(args.calls)
    for what in before:
        print(f"{what + f' before and after {args.calls} calls':<60}{before[what]:>10.1f}{after[what]:>10.1f}", flush=True)
    for passages in args.passages:
        for what, value in local_search(passages):
            print(f"{what:<60}{value:>10.2f}", flush=True)
    for what, value in without_spaces(args.passages[0] // 2):
        print(f"{what:<60}{value:>10.2f}", flush=True)


if __name__ == "__main__":
    main()
