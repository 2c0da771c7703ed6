"""The local search index: what is found, in which order, at which cost; and that building one loses nothing.

    python -m pytest tests/test_build_index.py
"""
import json
import math
import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
import time
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import build_index
from conftest import start_script
from tools import SearchTool, open_sqlite

ROOT = Path(__file__).resolve().parents[1]
ROWS = [{"id": 0, "title": "Denmark", "contents": "The capital of Denmark is Copenhagen.\nIt lies on an island."},
        {"id": 1, "title": "Norway", "text": "The capital of Norway is Oslo."},
        {"id": 2, "title": "Sweden", "text": "Stockholm is large."},
        {"id": 3, "text": "A capital letter begins a sentence."}]


def write(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def indexed(folder, rows):
    """The address of an index of the rows."""
    build_index.index_corpus(folder / "index.sqlite", build_index.read_corpus(write(folder / "corpus.jsonl", rows)))
    return f"sqlite:{folder / 'index.sqlite'}"


def run(*args, **options):
    command = [sys.executable, ROOT / "data" / "build_index.py", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, **options)


def ask(address, query, topk=3):
    return SearchTool(address, topk).search_many([query])[0]


@pytest.fixture
def address(tmp_path):
    return indexed(tmp_path, ROWS)


# ---- what is found
def test_the_best_passages_come_first(address):
    result = ask(address, "What is the capital of Norway?", topk=2)
    assert (result.ok, result.error, result.image) == (True, None, None)
    assert result.text == ("1. Content: Norway: The capital of Norway is Oslo. "
                           "2. Content: The capital of Denmark is Copenhagen. It lies on an island.")


def test_a_title_of_its_own_is_searched_and_not_shown(address, tmp_path):
    assert ask(address, "denmark").text == "1. Content: The capital of Denmark is Copenhagen. It lies on an island."
    assert ask(indexed(tmp_path, [{"title": "Sweden", "contents": "Stockholm is large."}]), "SWEDEN").text == (
        "1. Content: Stockholm is large.")


def test_a_title_beside_a_text_is_shown(address):
    assert ask(address, "SWEDEN").text == ask(address, "stockholm").text == "1. Content: Sweden: Stockholm is large."


@pytest.mark.parametrize("title", ['"Oslo"', "Oslo"])
def test_a_first_line_is_the_title_and_shown(title, tmp_path):
    address = indexed(tmp_path, [{"id": 7, "contents": f"{title}\nIt is the capital."}])
    assert ask(address, "oslo").text == ask(address, "capital").text == "1. Content: Oslo: It is the capital."


@pytest.mark.parametrize("row, shown", [
    ({"title": "Oslo", "contents": '"Oslo"\nIt is the capital.', "text": "It is the capital."}, "Oslo: It is the capital."),
    ({"title": '"Oslo"', "text": "It is the capital."}, "Oslo: It is the capital."),
    ({"title": "Oslo", "content": "It is the capital."}, "Oslo: It is the capital."),
    ({"title": " ", "content": "Oslo is the capital."}, "Oslo is the capital."),
    ({"contents": None, "text": "Oslo is the capital."}, "Oslo is the capital."),
    ("Oslo\nIt is the capital.", "Oslo: It is the capital.")])
def test_documents_of_other_corpora_are_read_as_those_of_a_server(row, shown, tmp_path):
    address = indexed(tmp_path, [json.dumps(row)])
    assert ask(address, "oslo").text == ask(address, "capital").text == f"1. Content: {shown}"


def test_topk_limits_the_passages(address):
    assert [ask(address, "capital", topk).text.count("Content:") for topk in (1, 2, 3, 9)] == [1, 2, 3, 3]


def test_the_order_is_that_of_bm25(tmp_path):
    """Against the formula (k1 1.2, b 0.75, FTS5's idf), on random passages: the same scores, so the same passages."""
    rng = random.Random(0)
    texts = [" ".join(rng.choices("abcdefghij", weights=range(1, 11), k=rng.randint(3, 12))) for _ in range(60)]
    address = indexed(tmp_path, [{"id": i, "text": text} for i, text in enumerate(texts)])
    mean = sum(len(text.split()) for text in texts) / len(texts)

    def bm25(query, text):
        words, total = text.split(), 0.0
        for word in set(query.split()):
            n = sum(word in other.split() for other in texts)
            idf = max(math.log((len(texts) - n + 0.5) / (n + 0.5)), 1e-6)
            f = words.count(word)
            total += idf * f * 2.2 / (f + 1.2 * (0.25 + 0.75 * len(words) / mean))
        return total

    for query in ("a b", "a c e", "b", "d a a"):
        got = re.split(r" ?\d+\. Content: ", ask(address, query, topk=5).text)[1:]
        best = sorted((bm25(query, text) for text in texts), reverse=True)[:5]
        assert [bm25(query, text) for text in got] == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("query, found", [("中国的首都", "中国的首都是北京。"), ("首都", "中国的首都是北京。"), ("大阪", "大阪は日本の都市です。"),
                                          ("水", "水"), ("서울", "서울은 한국의 수도이다."), ("CAFE", "Café Zürich"),
                                          ("zurich", "Café Zürich"), ("ＡＢＣ１２", "abc12"),
                                          ("ประเทศ", "เมืองหลวงของประเทศไทย"), ("हिन्दी", "हिन्दी"), ("ガラス", "ガラス"),
                                          ("كتاب", "كِتَاب"), ("שלום", "שָׁלוֹם")])
def test_any_script_is_found(query, found, tmp_path):
    texts = ["中国的首都是北京。", "大阪は日本の都市です。", "水", "서울은 한국의 수도이다.", "Café Zürich", "abc12", "nothing here",
             "เมืองหลวงของประเทศไทย", "हाथी नदी", "हिन्दी", "カラス", "ガラス", "كِتَاب", "שָׁלוֹם"]
    address = indexed(tmp_path, [{"id": i, "text": text} for i, text in enumerate(texts)])
    assert ask(address, query, topk=1).text == f"1. Content: {found}"


@pytest.mark.parametrize("query", ['" OR NEAR( *', "title:oslo) AND", "-oslo^2 {x}", "'; DROP TABLE passages; --", "NOT",
                                   "and or not near", "\0\ud800 ü _", "words:*", "a " * 50_000, "中" * 10_000,
                                   " ".join(map(str, range(100_000)))])
def test_no_query_is_syntax(query, address):
    result = ask(address, query)
    assert result.error in (None, "no_results") and result.seconds < 1.0
    assert ask(address, "oslo").ok


def test_failures_are_results(address):
    nothing, empty, dots = SearchTool(address).search_many(["zebra", " \n", "?!"])
    assert (nothing.ok, nothing.error, nothing.text) == (False, "no_results", "No results.")
    assert (empty.ok, empty.error) == (False, "empty_query")
    assert (dots.ok, dots.error) == (False, "no_results")


def test_common_words_choose_no_passages_where_others_are_found(tmp_path):
    """"city" is common and "river" is not: a passage must hold "river". Alone, "city" is searched for."""
    texts = [f"city number{i}" for i in range(9_000)] + ["river stone", "river city", "river river"] + ["hill"] * 11_000
    address = indexed(tmp_path, [{"id": i, "text": text} for i, text in enumerate(texts)])
    with sqlite3.connect(tmp_path / "index.sqlite") as database:
        assert dict(database.execute("SELECT * FROM common")) == {"city": 9_001, "hill": 11_000}
    assert ask(address, "river").text == "1. Content: river river 2. Content: river stone 3. Content: river city"
    assert ask(address, "city river").text == "1. Content: river river 2. Content: river city 3. Content: river stone"
    assert ask(address, "the city", topk=1).text == "1. Content: city number0"


@pytest.mark.parametrize("passages, found", [(1_000, 1), (1_100, 9)])
def test_a_word_is_common_in_more_than_one_passage_of_fifty(passages, found, tmp_path, monkeypatch):
    """21 passages hold "city": more than 2 % of 1,000 and less than 2 % of 1,100."""
    monkeypatch.setattr(build_index, "COMMON", 15)  # of those that are counted at all
    texts = ["river city"] * 20 + ["the city is one of the"] + ["stone"] * (passages - 21)
    address = indexed(tmp_path, [{"text": text} for text in texts])
    result = ask(address, "the city", topk=9).text
    assert result.startswith("1. Content: the city is one") and result.count("Content: ") == found


# ---- building
def test_the_command_builds_what_the_tool_opens(tmp_path):
    done = run(write(tmp_path / "corpus.jsonl", ROWS), "-o", tmp_path / "a b.sqlite")
    assert done.returncode == 0 and "4 passages" in done.stdout
    os.chmod(tmp_path / "a b.sqlite", 0o444)
    assert ask(f"sqlite:{tmp_path / 'a b.sqlite'}", "oslo").text == "1. Content: Norway: The capital of Norway is Oslo."


@pytest.mark.parametrize("row, reason", [('{"id": 1,', "Expecting property name"), ("[1]", "no JSON object"),
                                         ('{"id": 1}', "contents"), ('{"text": 7}', "contents"), ('{"text": " "}', "contents"),
                                         ("x", "Expecting value"), ("[" * 100_000, "recursion"),
                                         ('{"title": "a", "text": 1}', "needs a text"),
                                         (r'{"text": "\ud800"}', "surrogates")])
def test_a_bad_row_is_named_and_no_index_is_left(row, reason, tmp_path):
    done = run(write(tmp_path / "corpus.jsonl", [ROWS[0], row]), "-o", tmp_path / "index.sqlite")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert re.search(rf"error: .*corpus\.jsonl, row 2: .*{reason}", done.stderr)
    assert not (tmp_path / "index.sqlite").exists()


def test_an_index_is_replaced_only_on_demand(tmp_path):
    corpus, index = write(tmp_path / "corpus.jsonl", ROWS), tmp_path / "index.sqlite"
    index.write_text("mine")
    done = run(corpus, "-o", index)
    assert done.returncode == 2 and "--force" in done.stderr and index.read_text() == "mine"
    assert run(corpus, "-o", index, "--force").returncode == 0 and ask(f"sqlite:{index}", "oslo").ok


def test_a_killed_build_leaves_no_index_and_the_next_one_works(tmp_path):
    corpus, index = tmp_path / "corpus.jsonl", tmp_path / "index.sqlite"
    write(corpus, [{"id": i, "contents": f"word{i} " * 50} for i in range(60_000)])
    command = [sys.executable, ROOT / "data" / "build_index.py", corpus, "-o", index]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 30
    while not list(tmp_path.glob("index.sqlite.tmp")) and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not index.exists()
    assert run(write(corpus, ROWS), "-o", index).returncode == 0
    assert ask(f"sqlite:{index}", "oslo").ok and sorted(p.name for p in tmp_path.iterdir()) == ["corpus.jsonl", "index.sqlite"]


@pytest.mark.thorough
def test_two_builds_do_not_mix(tmp_path):
    """The second one is refused while the first is at work, and leaves it alone."""
    corpus, index = tmp_path / "corpus.jsonl", tmp_path / "index.sqlite"
    write(corpus, [{"id": i, "contents": f"word{i} " * 50} for i in range(30_000)])
    first = subprocess.Popen([sys.executable, ROOT / "data" / "build_index.py", corpus, "-o", index], stderr=subprocess.DEVNULL)
    end = time.monotonic() + 30
    while not list(tmp_path.glob("index.sqlite.tmp")) and time.monotonic() < end:
        time.sleep(0.01)
    second = run(write(tmp_path / "other.jsonl", ROWS), "-o", index)
    assert second.returncode == 2 and "another index is being built" in second.stderr
    assert first.wait() == 0 and ask(f"sqlite:{index}", "word7").ok
    assert run(tmp_path / "other.jsonl", "-o", index, "--force").returncode == 0  # it may again


def test_an_interrupted_build_says_so(tmp_path):
    corpus, index = tmp_path / "corpus.jsonl", tmp_path / "index.sqlite"
    os.mkfifo(corpus)  # whose end does not come
    process = start_script("data/build_index.py", corpus, "-o", index, output=tmp_path / "said")
    with open(corpus, "w") as rows:
        rows.write('{"id": 1, "contents": "Oslo is large."}\n' * 10_000)
        rows.flush()
        end = time.monotonic() + 30
        while not list(tmp_path.glob("index.sqlite.tmp")) and time.monotonic() < end:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGINT)
        process.join(30)
    said = (tmp_path / "said").read_text()
    assert process.exitcode == 130 and said.splitlines()[-1] == f"stopped; {index} is as it was" and "Traceback" not in said
    assert {path.name for path in tmp_path.iterdir()} == {"corpus.jsonl", "said"}


@pytest.mark.parametrize("name", ["a?b#c%41.sqlite", "ü &mode=rwc.sqlite"])
def test_an_index_may_have_any_name(name, tmp_path):
    build_index.index_corpus(tmp_path / name, [("Oslo is large.", "Oslo is large.")])
    assert ask(f"sqlite:{tmp_path / name}", "oslo").ok and [path.name for path in tmp_path.iterdir()] == [name]


def test_blank_lines_are_no_rows(tmp_path):
    assert ask(indexed(tmp_path, ["", *ROWS, " ", ""]), "oslo").ok


def test_a_missing_folder_is_named(tmp_path):
    done = run(write(tmp_path / "corpus.jsonl", ROWS), "-o", tmp_path / "missing" / "index.sqlite")
    assert done.returncode == 2 and f"{tmp_path / 'missing'} is no folder" in done.stderr


@pytest.mark.parametrize("content", [None, b"", b"no database", "other tables"])
def test_what_is_no_index_is_refused_with_the_way_out(content, tmp_path):
    path = tmp_path / "index.sqlite"
    if content == "other tables":
        with sqlite3.connect(path) as database:
            database.execute("CREATE TABLE passages(id INTEGER)")
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"index\.sqlite .*build_index\.py"):
        SearchTool(f"sqlite:{path}")
    assert path.exists() == (content is not None)


def test_the_text_counts_once(tmp_path):
    """An index of English-like text is smaller than one and a half times the text (measured at scale by bench_tools.py)."""
    rng = random.Random(0)
    words = [f"{a}{b}{c}" for a in "bdfgklmn" for b in ("an", "or", "ist", "el") for c in ("", "ing", "ers", "ation")]
    rows = [{"id": i, "text": " ".join(rng.choices(words, k=100))} for i in range(3_000)]
    indexed(tmp_path, rows)
    assert (tmp_path / "index.sqlite").stat().st_size < 1.5 * sum(len(row["text"]) for row in rows)
    assert Counter(path.suffix for path in tmp_path.iterdir()) == {".jsonl": 1, ".sqlite": 1}


@pytest.mark.parametrize("query", ["city zzyzx", "city zzyzx xyzzy", "zzyzx city"])
def test_a_word_of_no_passage_takes_nothing_away(query, tmp_path):
    address = indexed(tmp_path, [{"text": f"city number{i}"} for i in range(6_000)] + [{"text": "hill"}] * 7_000)
    assert ask(address, query, topk=1).text == ask(address, "city", topk=1).text == "1. Content: city number0"


def test_passages_are_ranked_by_bm25(tmp_path):
    """Against the formula, in a corpus with common words. Passages hold a word that is in at most 5,000; those words count
    twice, and words in at most half of the passages once."""
    rng, names = random.Random(1), [f"w{n}" for n in range(400)]
    weights = [1 / (n + 3) for n in range(400)]
    texts = [" ".join(rng.choices(names, weights, k=rng.randint(5, 20))) for _ in range(20_000)]
    address = indexed(tmp_path, [{"text": text} for text in texts])
    split = [text.split() for text in texts]
    counts, mean = Counter(word for words in split for word in set(words)), sum(map(len, split)) / len(split)
    assert counts["w3"] > 5_000 > counts["w8"]

    def bm25(words, query):
        score = 0.0
        for word in query:
            idf = max(math.log((len(split) - counts[word] + 0.5) / (counts[word] + 0.5)), 1e-6)
            f = words.count(word)
            score += idf * f * 2.2 / (f + 1.2 * (0.25 + 0.75 * len(words) / mean))
        return score

    for _ in range(12):
        query = rng.sample(names[:4], 2) + rng.sample(names[4:30], 2) + [rng.choice(names[200:])]
        rare = [word for word in query if counts[word] <= 5_000]
        kept = rare + [word for word in query if counts[word] <= 10_000]
        best = sorted((bm25(words, kept) for words in split if bm25(words, rare) > 0), reverse=True)[:3]
        got = re.split(r" ?\d+\. Content: ", ask(address, " ".join(query)).text)[1:]
        assert [bm25(text.split(), kept) for text in got] == pytest.approx(best, rel=1e-6)


def test_common_words_alone_rank_the_first_passages(tmp_path):
    """50,000: the best of all stands behind them."""
    address = indexed(tmp_path, [{"text": f"city number {i}"} for i in range(51_000)] + [{"text": "city"}])
    assert ask(address, "city", topk=1).text == "1. Content: city number 0"


@pytest.mark.thorough
def test_a_rare_word_is_found_behind_many_passages_with_a_common_one(tmp_path):
    address = indexed(tmp_path, [{"text": f"city {i}"} for i in range(150_000)])
    with sqlite3.connect(tmp_path / "index.sqlite") as database:  # as with 21 million: "city" is in fewer than 2 %
        database.execute("INSERT INTO passages VALUES (20999999, ?)", (zlib.compress(b"a river"),))
        database.execute("INSERT INTO words(rowid, segmented) VALUES (20999999, 'a river')")
    assert ask(address, "city river", topk=1).text == "1. Content: a river"


@pytest.mark.thorough
def test_threads_share_a_search(tmp_path):
    rng = random.Random(0)
    rows = [{"text": " ".join(f"w{int(2000 ** rng.random())}" for _ in range(30))} for _ in range(500)]
    search, queries = open_sqlite(indexed(tmp_path, rows)), [row["text"] for row in rows[:100]] * 4
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda query: search(query, 3), queries))
    assert found == [search(query, 3) for query in queries]


@pytest.mark.parametrize("text, out, reason", [("", "index.sqlite", "no passages"), ("[1]\n", "index.sqlite", "row 1"),
                                               (None, "index.sqlite", "No such file"), ('{"text": "a"}\n', ".", "a folder"),
                                               ('{"text": "a"}\n', "corpus.jsonl", "the corpus itself")])
def test_a_failed_build_leaves_nothing_and_takes_nothing(text, out, reason, tmp_path):
    corpus = tmp_path / "corpus.jsonl"
    if text is not None:
        corpus.write_text(text)
    done = run(corpus, "-o", tmp_path / out, "--force")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ") and reason in done.stderr
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == ({} if text is None else {"corpus.jsonl": text})
