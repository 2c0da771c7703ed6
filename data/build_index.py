"""Index a corpus for the search tool.

    python data/build_index.py CORPUS.jsonl -o INDEX.sqlite
    torchrun ... train.py --corpus sqlite:INDEX.sqlite

CORPUS has a row {"id", "contents"} a line, like the corpora of FlashRAG and Search-R1, or one of
the other forms that `read_document` in tools.py takes, such as {"title", "text"}.

INDEX is one SQLite file for `open_sqlite` in tools.py. It holds the passages, compressed; FTS5's
index of their words, without a copy of the text; and how many passages have each common word. It is
written beside its place and renamed at the end, so a file with the final name is whole.
Left out on purpose: stemming and stop words.
"""
import argparse
import fcntl
import json
import os
import sqlite3
import sys
import time
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools import read_document, segment  # noqa: E402

COMMON = 5_000  # words in more passages than this are counted; a query may leave them out


def read_corpus(path: str | Path, bar: tqdm | None = None) -> Iterator[tuple[str, str]]:
    """(text as shown, text as indexed) of every row.

    bar: a progress bar that is told the bytes read. Raises ValueError "path, row N: reason".
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if bar is not None:
                bar.update(len(line))
            if not line.strip():
                continue
            try:
                document = read_document(json.loads(line))
                "".join(document).encode()  # half a surrogate pair, which no database takes, raises
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, row {number}: {error}") from error
            yield document


def _compress(text: str) -> bytes:
    """What zlib.decompress reads. zlib's default settings take twice as long for a passage."""
    packer = zlib.compressobj(wbits=9, memLevel=4, strategy=zlib.Z_HUFFMAN_ONLY)
    return packer.compress(text.encode()) + packer.flush()


def index_corpus(path: str | Path, rows: Iterable[tuple[str, str]]) -> int:
    """Write an index of rows, (text as shown, text as indexed) each, to `path`; returns how many.

    An older file is replaced in one step at the end, and left alone if anything fails.
    Raises ValueError if there are no rows, or another process builds an index in the same folder.
    """
    path, number = Path(path), 0
    temporary = path.with_name(path.name + ".tmp")
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(folder)
        raise ValueError(f"another index is being built in {path.parent}: "
                         "wait for it, or give another folder") from None
    try:
        temporary.unlink(missing_ok=True)
        database = sqlite3.connect(temporary, isolation_level=None)
        database.executescript("""
            PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;
            CREATE TABLE passages(id INTEGER PRIMARY KEY, text BLOB);  -- compressed by zlib
            CREATE VIRTUAL TABLE words USING fts5(segmented, content='');
            CREATE TABLE common(word TEXT PRIMARY KEY, passages INTEGER);
            -- hashsize in bytes; no merging on the way, but once at the end
            INSERT INTO words(words, rank) VALUES ('hashsize', 67108864), ('automerge', 0);
            BEGIN;""")
        for number, (shown, indexed) in enumerate(rows, start=1):
            database.execute("INSERT INTO passages VALUES (?, ?)", (number, _compress(shown)))
            database.execute("INSERT INTO words(rowid, segmented) VALUES (?, ?)",
                             (number, segment(indexed)))
        database.execute("COMMIT")
        database.executescript(f"""
            INSERT INTO words(words) VALUES ('optimize');
            CREATE VIRTUAL TABLE temp.vocabulary USING fts5vocab(main, words, row);
            INSERT INTO common SELECT term, doc FROM vocabulary WHERE doc > {COMMON};""")
        database.close()
        if not number:
            raise ValueError("no passages")
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
        os.close(folder)  # and with it the lock
    return number


def main() -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.splitlines()[0])
    parser.add_argument("corpus", type=Path, help=".jsonl")
    parser.add_argument("-o", "--out", type=Path, required=True, help="the index to write")
    parser.add_argument("--force", action="store_true", help="replace an index that is there")
    args = parser.parse_args()
    start = time.perf_counter()
    try:
        if args.out.is_dir() or args.out.exists() and args.out.samefile(args.corpus):
            raise ValueError(f"{args.out} is a folder, or the corpus itself: give another -o")
        if not args.out.parent.is_dir():
            raise ValueError(f"{args.out.parent} is no folder: make it, or give another -o")
        if args.out.exists() and not args.force:
            raise ValueError(f"{args.out} is there already; "
                             "give --force to replace it, or another -o")
        with tqdm(total=args.corpus.stat().st_size, unit="B", unit_scale=True, desc="index") as bar:
            number = index_corpus(args.out, read_corpus(args.corpus, bar))
    except (OSError, ValueError, sqlite3.Error) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"stopped; {args.out} is as it was", file=sys.stderr)
        return 130
    seconds, size = time.perf_counter() - start, args.out.stat().st_size
    print(f"{args.out}: {number} passages in {seconds:.1f} s ({number / seconds:.0f}/s), "
          f"{size / 2**20:.1f} MiB, {size / args.corpus.stat().st_size:.2f} of the corpus")
    return 0


if __name__ == "__main__":
    sys.exit(main())
