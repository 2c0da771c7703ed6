"""Search over the network: protocols, faults, budgets, caches and pages, against real servers on the loopback interface.

The servers are of this file and send every fault over a socket. Only waiting times are changed, and for pages, where a test
says so, the check that an address is public.
"""
import gzip
import html
import json
import os
import random
import re
import shutil
import socket
import sqlite3
import ssl
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import ExitStack, closing, suppress
from email.utils import formatdate
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import pytest
import requests
from chat_server import Loopback, send
from conftest import run_script

import tools
from model import encode_text
from rollout import Limits, Rollout, Tools, Turn, replay, roll_out
from tools import Action, SearchTool
from train import Config, prepare, reward_parts

pytestmark = pytest.mark.filterwarnings("ignore:the search")
ROOT = Path(__file__).parent.parent
OFFLINE = ROOT / "data" / "offline"
FETCH = 0.5  # seconds that a test gives a request that is to fail in time; others get 10
SLACK = 2.0  # seconds that a busy machine may add
PATIENCE = 5.0  # seconds after which a slow or endless server ends by itself, for the case that nobody hangs up
KEY = "key-0123456789abcdef"


class Request(NamedTuple):
    method: str
    path: str
    headers: dict[str, str]  # lower-case names
    body: object  # parsed JSON, None for none
    raw: bytes
    time: float


class Server(Loopback):
    """`reply(handler, request)` writes a reply; `seen` are the requests, `calls` the connections."""

    def __init__(self, reply, certificate=None):
        super().__init__()
        self.reply, self.calls = reply, 0
        self.url = f"{'https' if certificate else 'http'}://127.0.0.1:{self.server_port}/search"
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*certificate)
            self.socket = context.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)

    def process_request(self, *args):
        self.calls += 1
        super().process_request(*args)

    def answer(self, handler, raw):
        headers = {name.lower(): value for name, value in handler.headers.items()}
        body = json.loads(raw) if raw else None
        request = Request(handler.command, handler.path, headers, body, raw, time.monotonic())
        self.seen.append(request)
        self.reply(handler, request)


@pytest.fixture
def serve():
    """serve(answer) -> a running Server, closed after the test."""
    with ExitStack() as stack:
        yield lambda reply, certificate=None: stack.enter_context(Server(reply, certificate))


@pytest.fixture(autouse=True)
def waits(monkeypatch):
    """RETRY_SECONDS is too little for a second try, whose wait is 0.5 s at least."""
    monkeypatch.setattr(tools, "FETCH_SECONDS", 10.0)
    monkeypatch.setattr(tools, "RETRY_SECONDS", 0.45)
    monkeypatch.setenv("SERPER_API_KEY", KEY)


@pytest.fixture
def patient(monkeypatch):
    monkeypatch.setattr(tools, "RETRY_SECONDS", 60.0)


@pytest.fixture
def hasty(monkeypatch):
    monkeypatch.setattr(tools, "FETCH_SECONDS", FETCH)


def found(*contents):
    """A reply with these documents, in Search-R1's form with scores."""
    return {"result": [[{"document": {"id": str(i), "contents": text}, "score": 1.0 - i} for i, text in enumerate(contents)]]}


def about(handler, request):
    """The right reply: one document that names the query."""
    [query] = request.body["queries"]
    send(handler, found(f"This is about {query}."))


def replies(*scripted):
    """Answers with (status, body, headers) in turn; the last one again and again."""
    left = list(scripted)

    def answer(handler, request):
        status, body, headers = left.pop(0) if len(left) > 1 else left[0]
        send(handler, body, status, **headers)
    return answer


def ask(backend, query="owl", **options):
    return SearchTool(backend, **options).search_many([query])[0]


def check_failed(result, kind):
    """A failed result with a short text that says why."""
    assert (result.ok, result.error, result.image) == (False, kind, None)
    assert 0 < len(result.text) < 80 and result.text.isascii()


# ---- Search-R1's retrieval server ----------------------------------------------------------------------------------

def test_a_retrieval_server_is_asked_as_in_search_r1(serve):
    server = serve(about)
    result = ask(f"http://127.0.0.1:{server.server_port}/a/retrieve?index=b%20c", "who is  the owl", topk=4)
    [request] = server.seen
    assert (request.method, request.path) == ("POST", "/a/retrieve?index=b%20c")
    assert request.body == {"queries": ["who is the owl"], "topk": 4, "return_scores": True}
    assert request.headers["content-type"] == "application/json"
    assert (result.ok, result.error, result.text) == (True, None, "1. Content: This is about who is the owl.")
    assert 0 < result.seconds < SLACK


@pytest.mark.parametrize("reply, text", [
    (found('"Owl"\nIt flies.', "No title."), "1. Content: Owl: It flies. 2. Content: No title."),
    (found("Owl\nIt flies.\nAt night."), "1. Content: Owl: It flies. At night."),
    ({"result": [[{"contents": '"Owl"\nIt flies.'}]]}, "1. Content: Owl: It flies."),
    ({"result": [[{"id": "7", "contents": "Größe 猫"}]], "more": None}, "1. Content: Größe 猫"),
    (found("a", "b", "c", "d"), "1. Content: a 2. Content: b"),  # more than topk
    *[({"result": [[document]]}, text) for document, text in {
        "title and text": ({"title": "Owl", "text": "It flies."}, "1. Content: Owl: It flies."),
        "title and content": ({"title": '"Owl"', "content": "It flies."}, "1. Content: Owl: It flies."),
        "title and contents that begin with it": ({"title": "Owl", "contents": '"Owl"\nIt flies.', "text": "It flies."},
                                                  "1. Content: Owl: It flies."),
        "title and contents without it": ({"title": "Owl", "contents": "It flies.\nFar."}, "1. Content: It flies. Far."),
        "no title": ({"title": None, "text": "It flies."}, "1. Content: It flies."),
        "a number as title": ({"title": 1984, "text": "It flies."}, "1. Content: 1984: It flies."),
        "a title that is none": ({"title": ["Owl"], "text": "It flies."}, "1. Content: It flies."),
        "content": ({"content": "It flies."}, "1. Content: It flies."),
        "contents that are null": ({"contents": None, "text": "It flies."}, "1. Content: It flies."),
        "a bare text": ("Owl\nIt flies.", "1. Content: Owl: It flies."),
        "a bare text with a score": ({"document": "It flies.", "score": 1}, "1. Content: It flies."),
        "document and score in a list": ([{"contents": "It flies."}, 0.5], "1. Content: It flies.")}.values()],
])
def test_documents_are_shown_with_their_titles(serve, reply, text):
    assert ask(serve(replies((200, reply, {}))).url, topk=2).text == text


BAD = [None, 7, [], {}, "", " ", [None, 1.0], {"document": None}, {"contents": None}, {"contents": 1999}, {"contents": ["a"]},
       {"text": ""}, {"score": 1.0}]


@pytest.mark.parametrize("bad", BAD, ids=repr)
def test_a_bad_document_is_left_out_and_said(serve, bad):
    """Alone: those behind it move up, also from beyond topk."""
    url = serve(replies((200, {"result": [[{"contents": "a"}, bad, {"contents": "b"}, {"contents": "c"}]]}, {}))).url
    with pytest.warns(UserWarning, match="documents without a text"):
        assert ask(url, topk=2).text == "1. Content: a 2. Content: b"


@pytest.mark.filterwarnings("ignore:the retrieval server")
@pytest.mark.parametrize("documents", [*([bad] for bad in BAD), BAD], ids=repr)
def test_nothing_but_bad_documents_is_a_bad_reply(serve, documents):
    check_failed(ask(serve(replies((200, {"result": [documents]}, {}))).url), "bad_reply")


def test_no_document_is_no_result(serve):
    assert ask(serve(replies((200, {"result": [[]]}, {}))).url).error == "no_results"


def test_half_a_character_is_no_text_for_a_tokenizer(serve):
    """JSON can spell half of a surrogate pair, as where a server cuts a snippet inside of one."""
    raw = json.dumps(found("cut here: X")).replace("X", "\\ud83d").encode()
    result = ask(serve(replies((200, raw, {}))).url)
    assert result.ok and result.text.startswith("1. Content: cut here:")
    result.text.encode()


def test_long_passages_are_cut(serve):
    words = "word " * 1000
    result = ask(serve(replies((200, found(words, "short"), {}))).url)
    assert result.text == f"1. Content: {words[:tools.MAX_PASSAGE]} […] 2. Content: short"


# ---- serper --------------------------------------------------------------------------------------------------------

def test_serper_is_asked_with_the_key_of_the_environment(serve):
    hits = [{"title": f"Title {i}", "link": f"https://a.example/{i}", "snippet": f"Snippet {i}."} for i in range(5)]
    server = serve(replies((200, {"organic": hits, "credits": 1}, {})))
    result = ask(f"serper:{server.url}", "who is the owl", topk=2)
    [request] = server.seen
    assert (request.method, request.path, request.headers["x-api-key"]) == ("POST", "/search", KEY)
    assert request.body == {"q": "who is the owl", "num": 2}
    assert result.text == "1. Content: Snippet 0. 2. Content: Snippet 1."


@pytest.mark.parametrize("reply, text, error", [
    ({}, "No results.", "no_results"),
    ({"organic": []}, "No results.", "no_results"),
    ({"organic": [{"title": "Title", "link": "x"}]}, "1. Content: Title", None),
    ({"organic": [{"title": "Title", "snippet": None}]}, "1. Content: Title", None),
    ({"organic": [{"link": "x"}, {"snippet": "Snippet"}]}, "1. Content: Snippet", None),
    ({"organic": [{"link": "x"}]}, "No results.", "no_results"),
])
def test_serper_results_lack_parts(serve, reply, text, error):
    result = ask(f"serper:{serve(replies((200, reply, {}))).url}")
    assert (result.text, result.error, result.ok) == (text, error, error is None)


@pytest.mark.parametrize("reply", [None, 7, "text", [], {"organic": None}, {"organic": 7}, {"organic": {"a": 1}},
                                   {"organic": ["text"]}, {"organic": [None]}, {"organic": [{"snippet": 7}]},
                                   {"organic": [{"snippet": ["a"]}]}, {"organic": [{"snippet": "a", "link": 7}]}], ids=repr)
@pytest.mark.parametrize("pages", [0, 1])
def test_serper_replies_of_another_shape(serve, reply, pages):
    result = ask(f"serper:{serve(replies((200, reply, {}))).url}", pages=pages)
    assert result.error == "bad_reply" or result.ok and result.text.startswith("1. Content: ")


@pytest.mark.parametrize("key", [None, "", "  ", f"{KEY}\n{KEY}", f"{KEY}é☃"])
def test_without_a_usable_key_serper_is_refused(monkeypatch, key):
    monkeypatch.delenv("SERPER_API_KEY")
    if key is not None:
        monkeypatch.setenv("SERPER_API_KEY", key)
    with pytest.raises(ValueError, match="SERPER_API_KEY") as error:
        SearchTool("serper")
    assert KEY not in str(error.value)


def test_the_key_is_shown_to_nobody(serve, tmp_path, capfd):
    """Neither in results, nor in the cache, nor printed, nor sent where a redirect points."""
    other = serve(about)
    for number, reply in enumerate([(200, {"organic": [{"snippet": "Snippet"}]}, {}), (401, {"message": "bad"}, {}),
                                    (307, {}, {"Location": other.url}), (302, {}, {"Location": other.url}), (200, b"{", {})]):
        server = serve(replies(reply))
        result = ask(f"serper:{server.url}", cache=str(tmp_path / "cache"))
        assert KEY not in repr(result) and server.seen[0].headers["x-api-key"] == KEY
        assert result.error == [None, "http_401", "http_307", "http_302", "bad_reply"][number]
    assert other.calls == 0
    assert all(KEY.encode() not in path.read_bytes() for path in tmp_path.iterdir()) and list(tmp_path.iterdir())
    assert KEY not in "".join(capfd.readouterr())


# ---- faults --------------------------------------------------------------------------------------------------------

def raw(data):
    """A server that writes these bytes and closes."""
    return lambda handler, request: handler.wfile.write(data)


def slow(first, again=b" ", pause=0.1):
    """Writes `first`, then `again` after every pause. Ends when the client hangs up, the server closes, or after PATIENCE."""
    def answer(handler, request):
        end = time.monotonic() + PATIENCE
        handler.wfile.write(first)
        while time.monotonic() < end and not handler.server.gone.wait(pause):
            handler.wfile.write(again)
    return answer


def reset(handler, request):
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()


def status(code):
    return lambda handler, request: send(handler, {}, code)


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json; charset=%s\r\n"
JSON = HEAD % b"utf-8"
CHUNKED = JSON + b"Transfer-Encoding: chunked\r\n\r\n"
BLOCK = b" " * 65_536
GOOD = json.dumps(found("owl")).encode()
FAULTS = {  # name: (answer, kind of the failure)
    "silent": (slow(b"", b""), "timeout"),
    "slow body": (slow(JSON + b"\r\n"), "timeout"),
    "slow body with its length": (slow(JSON + b"Content-Length: 1000\r\n\r\n"), "timeout"),
    "slow chunks": (slow(CHUNKED, b"1\r\n \r\n"), "timeout"),
    "slow headers": (slow(JSON + b"X-Slow: ", b"a"), "timeout"),
    "slow status line": (slow(b"HTTP/1.1 200 ", b"O"), "timeout"),
    "endless 100": (slow(b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0.001), "timeout"),
    "endless headers": (slow(JSON, b"X-Many: 1\r\n" * 100, 0), "bad_reply"),
    "endless header": (slow(JSON + b"X-Long: ", b"a" * 65_536, 0), "bad_reply"),
    "endless body": (slow(JSON + b"\r\n", BLOCK, 0), "bad_reply"),
    "endless chunks": (slow(CHUNKED, b"10000\r\n" + BLOCK + b"\r\n", 0), "bad_reply"),
    "endless chunk of length -1": (slow(CHUNKED + b"-1\r\n", BLOCK, 0), "bad_reply"),
    "cut body": (raw(JSON + b"Content-Length: 1000\r\n\r\n" + GOOD[:-5]), "bad_reply"),
    "cut chunks": (raw(CHUNKED + b"ff\r\n" + GOOD), "bad_reply"),
    "cut headers": (raw(JSON[:-9]), "bad_reply"),
    "reset": (reset, "unreachable"),
    "closed": (raw(b""), "unreachable"),
    "no HTTP": (raw(b"SSH-2.0-server\r\n"), "bad_reply"),
    "no JSON": (lambda handler, request: send(handler, b"<html>maintenance</html>", kind="text/html"), "bad_reply"),
    "empty": (lambda handler, request: send(handler, b""), "bad_reply"),
    "deep JSON": (lambda handler, request: send(handler, b"[" * 60_000), "bad_reply"),
    "long number": (lambda handler, request: send(handler, b"1" * 60_000), "bad_reply"),
    "unknown charset": (raw(HEAD % b"klingon" + b"\r\n" + GOOD), "bad_reply"),
    "charset that is no text": (raw(HEAD % b"zip" + b"\r\n" + GOOD), "bad_reply"),
    **{f"status {code}": (status(code), f"http_{code}")
       for code in (204, 302, 307, 400, 401, 403, 404, 408, 429, 500, 502, 503)},
}
SHAPES = [None, 7, "text", [], {}, {"result": None}, {"result": 7}, {"result": []}, {"result": {}}, {"result": [None]},
          {"result": [7]}, {"result": ["text"]}, {"result": "text"}, {"result": [{}]}, {"error": "no index"}]


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_a_failed_result(serve, monkeypatch, name):
    """In time, with its kind, after one request; and the next query of the same tool is answered."""
    monkeypatch.setattr(tools, "MAX_BODY", 1 << 18)
    answer, kind = FAULTS[name]
    server = serve(lambda handler, request: (answer if request.body["queries"] == ["bad"] else about)(handler, request))
    search = SearchTool(server.url)
    with monkeypatch.context() as patch:
        patch.setattr(tools, "FETCH_SECONDS", FETCH if kind == "timeout" else 10.0)
        [result] = search.search_many(["bad"])
    check_failed(result, kind)
    assert len(server.seen) == 1
    assert result.seconds < FETCH + SLACK and (result.seconds >= FETCH or kind != "timeout")
    assert search.search_many(["owl"])[0].ok


@pytest.mark.parametrize("shape", SHAPES, ids=repr)
def test_json_of_another_shape_is_a_bad_reply(serve, shape):
    check_failed(ask(serve(replies((200, shape, {}))).url), "bad_reply")


def test_no_server_is_unreachable(hasty):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    check_failed(ask(f"http://127.0.0.1:{port}/"), "unreachable")
    with socket.create_server(("127.0.0.1", 0), backlog=0) as deaf:  # it takes connections and never reads
        check_failed(ask(f"http://127.0.0.1:{deaf.getsockname()[1]}/", "owl " * 400_000), "timeout")


def test_slow_names_take_no_more_time_than_slow_servers(serve, monkeypatch, hasty):
    """A socket that is opened after the deadline is cut as well."""
    server, look_up = serve(slow(JSON + b"\r\n")), socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **more: time.sleep(FETCH + 0.1) or look_up(*args, **more))
    result = ask(server.url)
    check_failed(result, "timeout")
    assert result.seconds < FETCH + 0.1 + SLACK


@pytest.mark.parametrize("head", [JSON + b"\r\n", CHUNKED + b"-1\r\n", CHUNKED + b"fffffffffffffff\r\n"],
                         ids=["no length", "chunk of length -1", "endless chunk"])
def test_no_more_is_read_than_the_limit(serve, monkeypatch, head):
    """Of a body without end, whatever length its chunk claims; the sockets' buffers hold some MB more."""
    monkeypatch.setattr(tools, "MAX_BODY", 1 << 18)
    sent = []

    def answer(handler, request):
        handler.wfile.write(head)
        while len(sent) < 4096:  # 256 MB
            handler.wfile.write(BLOCK)
            sent.append(len(BLOCK))
    check_failed(ask(serve(answer).url), "bad_reply")
    time.sleep(0.1)
    assert sum(sent) < 32 << 20


@pytest.mark.parametrize("query", ["", " \n\t", "\u3000"])
def test_an_empty_query_is_not_sent(serve, query):
    server = serve(about)
    check_failed(ask(server.url, query), "empty_query")
    assert server.calls == 0


@pytest.mark.parametrize("backend", ["bing", "", "ftp://a.example/", "http:", "http://", "https:/a", "http://a.example:port/",
                                     "serper:", "serper:file:///a", "serper:a.example"])
def test_addresses_that_cannot_work_are_refused(backend):
    with pytest.raises(ValueError):
        SearchTool(backend if backend != "serper:" else "serper:http://")


def test_only_serper_names_pages():
    with pytest.raises(ValueError, match="pages"):
        SearchTool("http://127.0.0.1:1/retrieve", pages=1)


# ---- retries -------------------------------------------------------------------------------------------------------

def gaps(server):
    return [after.time - before.time for before, after in zip(server.seen, server.seen[1:])]


def test_retry_after_is_honoured(serve, monkeypatch):
    monkeypatch.setattr(tools, "RETRY_SECONDS", 10.0)
    server = serve(replies((429, {}, {"Retry-After": 1}), (200, found("owl"), {})))
    result = ask(server.url)
    assert result.ok and len(server.seen) == 2
    assert 1.0 <= gaps(server)[0] < 1.5 + SLACK and result.seconds >= 1.0


@pytest.mark.thorough
def test_waits_grow(serve, monkeypatch):
    monkeypatch.setattr(tools, "RETRY_SECONDS", 10.0)
    server = serve(replies((500, {}, {}), (503, {}, {"Retry-After": formatdate(usegmt=True)}), (200, found("owl"), {})))
    assert ask(server.url).ok and len(server.seen) == 3
    first, second = gaps(server)
    assert 0.5 <= first < 0.75 + SLACK and 1.0 <= second < 1.5 + SLACK  # at random within a half, to part the ranks


def test_a_wait_of_nothing_is_not_a_storm(serve, monkeypatch):
    monkeypatch.setattr(tools, "RETRY_SECONDS", 1.5)
    server = serve(replies((429, {}, {"Retry-After": 0})))
    check_failed(ask(server.url), "http_429")
    assert 2 <= len(server.seen) <= 4


@pytest.mark.parametrize("code", [302, 400, 401, 403, 404])
def test_what_a_retry_cannot_mend_is_not_retried(serve, monkeypatch, code):
    monkeypatch.setattr(tools, "RETRY_SECONDS", 10.0)
    server = serve(status(code))
    result = ask(server.url)
    check_failed(result, f"http_{code}")
    assert len(server.seen) == 1 and result.seconds < SLACK


@pytest.mark.parametrize("wait", ["3600", "9" * 400])
def test_nobody_waits_longer_than_the_tries_may_take(serve, monkeypatch, wait):
    monkeypatch.setattr(tools, "RETRY_SECONDS", 10.0)
    result = ask(serve(replies((429, {}, {"Retry-After": wait}))).url)
    check_failed(result, "http_429")
    assert result.seconds < SLACK


@pytest.mark.parametrize("wait", ["²", "soon", "-1", ""])
def test_an_unreadable_wait_is_our_own(serve, wait):
    check_failed(ask(serve(replies((429, {}, {"Retry-After": wait}))).url), "http_429")


def test_a_dead_server_costs_all_queries_together_a_bounded_time(serve, monkeypatch, hasty):
    monkeypatch.setattr(tools, "RETRY_SECONDS", 1.0)
    start = time.monotonic()
    results = SearchTool(serve(slow(b"", b"")).url).search_many([f"query {n}" for n in range(80)])
    assert {result.error for result in results} == {"timeout"}
    assert time.monotonic() - start < 1.0 + FETCH + SLACK


# ---- many queries --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("number", [200, pytest.param(1000, marks=pytest.mark.thorough)])
def test_a_thousand_queries_with_faults(serve, monkeypatch, hasty, number):
    """30 % of all requests fail in some way. Each result is that of the last request of its query."""
    monkeypatch.setattr(tools, "RETRY_SECONDS", 14.0)
    monkeypatch.setattr(tools, "MAX_BODY", 1 << 17)
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(seconds / 20))  # between tries
    draw, lock, last, drawn = random.Random(0), threading.Lock(), {}, Counter()
    faults = cycle(draw.sample(list(FAULTS), len(FAULTS)))

    def answer(handler, request):
        with lock:
            name = next(faults) if draw.random() < 0.3 else None
            last[request.body["queries"][0]] = name
            drawn[name] += 1
        (FAULTS[name][0] if name else about)(handler, request)
    server = serve(answer)
    queries = [f"query {n}" for n in range(number)]
    start = time.monotonic()
    results = SearchTool(server.url).search_many(queries)
    assert time.monotonic() - start < 15.0
    assert [result.error for result in results] == [last[query] and FAULTS[last[query]][1] for query in queries]
    good = [(query, result) for query, result in zip(queries, results) if result.ok]
    assert all(result.text == f"1. Content: This is about {query}." for query, result in good)
    assert 0.8 < len(good) / number < 1 and len(server.seen) == drawn.total() > 1.1 * number  # many were asked again
    assert 0.25 < 1 - drawn[None] / drawn.total() < 0.35 and set(drawn) == {None, *FAULTS}


def test_queries_run_side_by_side(serve, patient):
    def answer(handler, request):
        time.sleep(0.2)
        about(handler, request)
    start = time.monotonic()
    results = SearchTool(serve(answer).url).search_many([f"query {n}" for n in range(16)])
    assert all(result.ok for result in results)
    assert 0.4 <= time.monotonic() - start < 0.4 + SLACK  # 3.2 s one by one


def test_equal_queries_are_asked_once(serve, patient):
    server = serve(about)
    results = SearchTool(server.url).search_many(["owl", "bear", "owl", " owl ", "", "bear\n", "big  owl", "big owl"])
    assert Counter(request.body["queries"][0] for request in server.seen) == {"owl": 1, "bear": 1, "big owl": 1}
    assert [result.text.removeprefix("1. Content: This is about ") for result in results] == [
        "owl.", "bear.", "owl.", "owl.", "The query is empty.", "bear.", "big owl.", "big owl."]
    assert SearchTool(server.url).search_many([]) == []


@pytest.mark.parametrize("query", [
    '"quoted" \\ \'single\'', "nul \0 bell \7", "half \ud83d of \udc00", "猫は何ですか", "é\u2028e\u0301", "word " * 100_000,
    "a\r\nX-Evil: 1\r\n\r\nGET / HTTP/1.1", '"], "topk": 9, "x": ["', "<script>&amp;%00{}$(ls);--",
], ids=lambda query: ascii(query[:12]))
@pytest.mark.parametrize("backend", ["", "serper:"])
def test_hostile_queries_arrive_as_json(serve, query, backend):
    server = serve(replies((200, found("owl") | {"organic": [{"snippet": "owl"}]}, {})))
    assert ask(backend + server.url, query, topk=2).text == "1. Content: owl"
    [request] = server.seen
    sent = " ".join(query.encode("utf-8", "replace").decode().split())
    assert request.body == ({"q": sent, "num": 2} if backend else {"queries": [sent], "topk": 2, "return_scores": True})
    assert "x-evil" not in request.headers and request.raw.isascii()


# ---- cache ---------------------------------------------------------------------------------------------------------

def test_what_is_cached_is_not_asked_again(serve, tmp_path, patient):
    server, cache = serve(about), str(tmp_path / "new" / "folder" / "cache.sqlite")
    queries = [f"query {n}" for n in range(50)]
    first = SearchTool(server.url, cache=cache).search_many(queries)
    again = SearchTool(server.url, cache=cache).search_many(queries)
    assert len(server.seen) == 50 and all(result.ok for result in first)
    assert [result.text for result in again] == [result.text for result in first]


def test_the_cache_knows_what_was_asked_of_whom(serve, tmp_path):
    reply = (200, found("owl", "bear") | {"organic": [{"snippet": "owl", "link": "x"}]}, {})
    server, other, cache = serve(replies(reply)), serve(replies(reply)), str(tmp_path / "cache.sqlite")
    ways = [(server.url, {}), (server.url, {"topk": 1}), (other.url, {}), (f"serper:{server.url}", {}),
            (f"serper:{server.url}", {"pages": 1}), (server.url + "?k=2", {})]
    for number, (backend, options) in enumerate(ways * 2, start=1):
        assert ask(backend, cache=cache, **options).ok
        assert len(server.seen) + len(other.seen) == min(number, len(ways))


def test_spelling_is_normalised(serve, tmp_path):
    server, cache = serve(about), str(tmp_path / "cache.sqlite")
    for query in ("Who is ÉMILE", " who  is\témile\n", "WHO IS émile"):
        assert ask(server.url, query, cache=cache).ok
    assert len(server.seen) == 1


@pytest.mark.parametrize("name", ["no JSON", "status 500", "status 404", "reset", "silent"])
def test_failures_are_not_cached(serve, tmp_path, monkeypatch, name):
    cache, left = str(tmp_path / "cache.sqlite"), [FAULTS[name][0]]
    server = serve(lambda handler, request: (left.pop() if left else about)(handler, request))
    search = SearchTool(server.url, cache=cache)
    with monkeypatch.context() as patch:
        patch.setattr(tools, "FETCH_SECONDS", FETCH)
        assert not search.search_many(["owl"])[0].ok
    assert [search.search_many(["owl"])[0].ok for _ in range(2)] == [True, True]
    assert len(server.seen) == 2


def test_no_results_are_cached(serve, tmp_path):
    server = serve(replies((200, {"result": [[]]}, {})))
    for _ in range(2):
        check_failed(ask(server.url, cache=str(tmp_path / "cache.sqlite")), "no_results")
    assert len(server.seen) == 1


@pytest.mark.parametrize("content", [b"no database", b"SQLite format 3\0" + bytes(4096), bytes(4096)])
def test_an_unusable_cache_is_named(tmp_path, content):
    path = tmp_path / "cache.sqlite"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="cache.sqlite"):
        SearchTool("http://127.0.0.1:1/", cache=str(path))
    with pytest.raises((ValueError, OSError), match=re.escape(tmp_path.name)):
        SearchTool("http://127.0.0.1:1/", cache=str(tmp_path))
    assert path.read_bytes() == content  # it is the user's to delete


def test_a_cache_that_breaks_in_the_run_raises_nothing(serve, tmp_path):
    server, path = serve(about), tmp_path / "cache.sqlite"
    search = SearchTool(server.url, cache=str(path))
    assert search.search_many(["owl"])[0].ok
    path.write_bytes(b"no database" * 1000)
    assert [result.ok for result in search.search_many(["owl", "bear"])] == [True, True]


ASKER = """
import json, sys
sys.path.insert(0, sys.argv[1])
from tools import SearchTool
search = SearchTool(sys.argv[2], cache=sys.argv[3])
for line in sys.stdin:
    print(json.dumps([result.error for result in search.search_many(json.loads(line))]), flush=True)
"""


class Asker:
    """Another process with a search tool on the same cache."""

    def __init__(self, url, cache):
        command = [sys.executable, "-c", ASKER, str(ROOT), url, cache]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, queries):
        print(json.dumps(queries), file=self.process.stdin, flush=True)

    def errors(self):
        return json.loads(self.process.stdout.readline())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate()


@pytest.mark.thorough
def test_two_processes_share_a_cache_while_both_run(serve, tmp_path):
    server, cache = serve(about), str(tmp_path / "cache.sqlite")
    queries = [f"query {n}" for n in range(300)]
    with Asker(server.url, cache) as one, Asker(server.url, cache) as two:
        for asker, part in ((one, queries[:200]), (two, queries[100:])):  # both write at the same time
            asker.ask(part)
        assert one.errors() == two.errors() == [None] * 200
        asked = len(server.seen)
        assert 300 <= asked <= 400
        for asker in (one, two):
            asker.ask(queries)
        assert one.errors() == two.errors() == [None] * 300
        assert len(server.seen) == asked
        one.ask(["owl"])
        assert one.errors() == [None]
        two.ask(["Owl"])
        assert two.errors() == [None] and len(server.seen) == asked + 1


# ---- budget --------------------------------------------------------------------------------------------------------

def test_the_budget_is_kept_to_the_request(serve, tmp_path, patient):
    server, cache = serve(about), str(tmp_path / "cache.sqlite")
    search = SearchTool(server.url, cache=cache, budget=20)
    assert all(result.ok for result in search.search_many([f"query {n}" for n in range(20)]))
    assert not search.spent  # used up, but nobody was refused
    assert all(result.ok for result in search.search_many([f"query {n}" for n in range(20)])) and not search.spent
    results = search.search_many([f"query {n}" for n in range(100)])
    assert Counter(result.error for result in results) == {None: 20, "budget": 80} and search.spent
    assert [result.ok for result in results] == [True] * 20 + [False] * 80
    check_failed(results[20], "budget")
    assert len(server.seen) == 20
    assert search.search_many(["query 7"])[0].ok


def test_eight_threads_spend_the_whole_budget(serve, patient):
    server = serve(about)
    search = SearchTool(server.url, budget=11)
    spend = search._budget.acquire
    search._budget.acquire = lambda **how: (spend(**how), time.sleep(0.05))[0]  # other threads come first
    results = search.search_many([f"query {n}" for n in range(60)])
    assert Counter(result.error for result in results) == {None: 11, "budget": 49} and search.spent
    assert len(server.seen) == 11


def test_ranks_share_the_budget(serve, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    server = serve(about)
    results = SearchTool(server.url, budget=5).search_many(["a", "b", "c"])
    assert [result.error for result in results].count("budget") == 1 and len(server.seen) == 2


def test_retries_count(serve, monkeypatch):
    monkeypatch.setattr(tools, "RETRY_SECONDS", 10.0)
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(seconds / 20))
    server = serve(status(500))
    search = SearchTool(server.url, budget=2)
    check_failed(search.search_many(["owl"])[0], "budget")
    assert len(server.seen) == 2 and search.spent


# ---- pages ---------------------------------------------------------------------------------------------------------

SNIPPET = "A snippet."
FILLER = " ".join(f"filler{n}" for n in range(300))


def with_pages(serve, pages, links=("page",)):
    """A serper whose results link to its own pages, {path: (body, content type) or answer}; links with a scheme stay."""
    def answer(handler, request):
        if request.method == "POST":
            urls = [link if ":" in link else f"{root}/{link}" for link in links]
            send(handler, {"organic": [{"snippet": SNIPPET + " again" * i, "link": url} for i, url in enumerate(urls)]})
        elif callable(page := pages.get(request.path[1:], status(404))):
            page(handler, request)
        else:
            send(handler, page[0].encode() if isinstance(page[0], str) else page[0], kind=page[1])
    server = serve(answer)
    root = server.url.removesuffix("/search")
    return server


@pytest.fixture
def anywhere(monkeypatch):
    """Pages may be of the loopback interface."""
    monkeypatch.setattr(tools, "_public_address", lambda host: host)


def page_result(server, query="snowy owl", pages=1, topk=2, **options):
    return ask(f"serper:{server.url}", query, pages=pages, topk=topk, **options)


@pytest.mark.usefixtures("anywhere")
def test_pages_are_read_and_the_nearest_passages_returned(serve):
    page = f"""<!DOCTYPE html><html><head><title>Birds</title><STYLE>.owl {{ color: snowy }}</STYLE></head><body>
<script type="module">var snowy = "owl" < 3;</script ><p>{FILLER}</p><p>The <b>snowy</b>&nbsp;owl &amp; its caf&#233;
&lt;wings&gt;.</p><p>{FILLER}</p></body></html>"""
    server = with_pages(serve, {"page": (page, "text/html; charset=utf-8")})
    result = page_result(server)
    assert result.ok and result.text.startswith("1. Content: ") and " 3. Content" not in result.text
    first = result.text.partition(" 2. Content: ")[0]
    assert "The snowy owl & its café <wings>." in " ".join(first.split()) and "filler" in first
    assert "var" not in result.text and "color" not in result.text and "<p>" not in result.text
    assert [request.path for request in server.seen] == ["/search", "/page"]
    assert not any(KEY in request.headers.get("x-api-key", "") for request in server.seen[1:])
    assert page_result(server, "snippet", topk=1).text == f"1. Content: {SNIPPET}"


@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize("body, kind, text", [
    ("Snowy owls of Zürich.".encode("latin-1"), "text/html; charset=ISO-8859-1", "Snowy owls of Zürich."),
    ("Snowy owls of Zürich.".encode("utf-16"), "text/html; charset=utf-16", "Snowy owls of Zürich."),
    ("Snowy owls of Zürich.", "text/html", "Snowy owls of Zürich."),
    ("Snowy owl if a < b and c > d &amp; so on.", "text/plain", "Snowy owl if a < b and c > d &amp; so on."),
    ("Snowy owl &#" + "1" * 5000 + "; and &#xD800; more", "text/html", "Snowy owl"),
    ("Snowy owls of Zürich.".encode("latin-1"), "text/html; charset='latin1'", "Snowy owls of Zürich."),
    ("Snowy owls of Zürich.".encode("latin-1"), "text/html; charset = iso-8859-1", "Snowy owls of Zürich."),
    (b"Snowy owl \xff\xfe", "text/html; charset=utf-8", "Snowy owl \ufffd\ufffd"),
    (b"Snowy owl.", "text/html; charset*=utf-8''a; charset*0=b", "Snowy owl."),  # no charset that anyone knows
    (b"Snowy owl.", 'text/html; a="' + ";" * 30_000 + 3 * ("\r\n " + ";" * 60_000), "Snowy owl."),  # in time
])
def test_a_page_is_read_by_its_charset_and_type(serve, body, kind, text):
    result = page_result(with_pages(serve, {"page": (body, kind)}), "snowy owls owl", topk=1)
    assert result.text.startswith(f"1. Content: {text}")
    result.text.encode()


def deflated(handler, request):
    send(handler, gzip.compress(b"snowy owl"), kind="text/html", Content_Encoding="gzip")


BAD_PAGES = {
    "image": (b"snowy owl", "image/png"), "pdf": (b"snowy owl", "application/pdf"), "deflated": deflated,
    "punycode": (b"snowy-" + b"b" * 400_000, "text/html; charset=punycode"),  # decoding it is quadratic
    **{name: FAULTS[name][0] for name in ("silent", "slow body", "slow headers", "endless body", "endless chunk of length -1",
                                          "reset", "no HTTP", "unknown charset", "status 404", "status 500")}}


@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize("name", BAD_PAGES)
def test_a_failing_page_leaves_the_snippets(serve, monkeypatch, name):
    monkeypatch.setattr(tools, "MAX_BODY", 1 << 19)
    monkeypatch.setattr(tools, "FETCH_SECONDS", FETCH if FAULTS.get(name, ("", ""))[1] == "timeout" else 10.0)
    good = ("The snowy owl.", "text/html")
    result = page_result(with_pages(serve, {"page": BAD_PAGES[name], "good": good}, ("page", "good")), pages=2, topk=5)
    assert result.text == f"1. Content: The snowy owl. 2. Content: {SNIPPET} 3. Content: {SNIPPET} again"
    assert result.seconds < FETCH + SLACK


@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize("link", ["", "a.example", "http://", "http://[", "http://127.0.0.1:port/", "http://127.0.0.1:99999/",
                                  "http://127.0.0.1:1/", "http://a b/", "http://\ud800/", "http://" + "a" * 300 + "/",
                                  "javascript:alert(1)", "file:///etc/hostname", "ftp://127.0.0.1/", "data:text/html,owl"])
def test_odd_links_leave_the_snippets(serve, link):
    def answer(handler, request):
        send(handler, {"organic": [{"snippet": SNIPPET, "link": link}]})
    assert page_result(serve(answer)).text == f"1. Content: {SNIPPET}"


@pytest.mark.usefixtures("anywhere")
def test_a_page_without_spaces_has_passages_too(serve):
    page = "".join(chr(0x4e00 + n % 5000) for n in range(20_000))
    server = with_pages(serve, {"page": (page[:9000] + "雪鴞住在北極" + page[9000:], "text/html; charset=utf-8")})
    result = page_result(server, "雪鴞住在哪裡", topk=1)
    assert "雪鴞住在北極" in result.text


@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize("page", ["a" + "\u0301\u0316" * 60_000, "\ufdfa" * 100_000, "owl" * 200_000, "owl " * 200_000],
                         ids=["accents", "ligatures", "one word", "words"])
def test_a_hostile_page_is_ranked_in_time(serve, page):
    """About 1 s on a quiet core. Accents in a row are sorted in the square of their number by whoever normalises them."""
    result = page_result(with_pages(serve, {"page": (page, "text/html; charset=utf-8")}))
    assert result.ok and result.seconds < 2.0 + SLACK


def redirect(target, code=302):
    return lambda handler, request: send(handler, {}, code, Location=target)


@pytest.mark.usefixtures("anywhere")
def test_pages_redirect(serve):
    hops = {f"hop{n}": redirect(f"/hop{n + 1}" if n < 3 else "end", 301 + n % 3) for n in range(4)}
    server = with_pages(serve, {**hops, "end": ("The snowy owl.", "text/html")}, ["hop0"])
    assert page_result(server, topk=1).text == "1. Content: The snowy owl."
    assert [request.path for request in server.seen] == ["/search", "/hop0", "/hop1", "/hop2", "/hop3", "/end"]
    server.seen.clear()
    hops |= {"hop3": redirect("/hop4"), "hop4": redirect("/end")}
    server = with_pages(serve, {**hops, "end": ("The snowy owl.", "text/html")}, ["hop0"])
    assert page_result(server, topk=1).text == f"1. Content: {SNIPPET}"  # one too many


@pytest.mark.usefixtures("anywhere")
def test_only_the_first_pages_are_read(serve):
    server = with_pages(serve, {name: (f"The snowy owl {name}.", "text/html") for name in "ab"}, ["a", "b"])
    assert page_result(server).text == f"1. Content: The snowy owl a. 2. Content: {SNIPPET}"
    assert [request.path for request in server.seen] == ["/search", "/a"]


@pytest.mark.parametrize("url", ["http://a" + "\u0301\u0316" * 20_000, "http://127.0.0.1/" + "a" * 9_000])
def test_a_link_that_takes_for_ever_to_read_is_not_read(url):
    started = time.thread_time()
    with pytest.raises(tools.RequestFailed):
        tools.fetch(url, public=True, seconds=1.0)
    assert time.thread_time() - started < 1.0


@pytest.mark.usefixtures("anywhere")
def test_a_redirect_to_a_long_address_ends(serve):
    server = with_pages(serve, {"page": redirect("/" + "a" * 60_000)})
    assert page_result(server).text == f"1. Content: {SNIPPET}" and len(server.seen) == 2


@pytest.mark.usefixtures("anywhere")
def test_an_address_without_a_path_has_one(serve):
    server = serve(about)
    tools.fetch(server.url.replace("/search", "?x=1"), {"queries": ["owl"]})
    assert [request.path for request in server.seen] == ["/?x=1"]


def test_a_name_with_many_addresses_takes_no_longer(serve, monkeypatch):
    """Addresses that never answer share the time; the first one that answers is taken."""
    with ExitStack() as stack:
        deaf = [stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0)) for _ in range(4)]
        for server in deaf:  # a queue that is full: further connections wait
            stack.enter_context(socket.create_connection(server.getsockname()))
        targets = [server.getsockname() for server in deaf]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", address) for address in targets])
        started = time.monotonic()
        with pytest.raises(tools.RequestFailed, match="timeout"):
            tools.fetch("http://many.example/", seconds=FETCH)
        assert FETCH <= time.monotonic() - started < FETCH + SLACK
    good = serve(about)
    targets = [("127.0.0.1", 1), ("127.0.0.1", good.server_port)]
    assert "about owl" in tools.fetch("http://many.example/", {"queries": ["owl"]})[0]


def test_an_error_without_a_wait_leaves_it_to_the_caller(serve):
    for status_, wait, seconds in ((429, "7", 7), (429, "soon", None), (503, None, None), (404, "7", float("inf")),
                                   (503, formatdate(time.time() + 100, usegmt=True), pytest.approx(100, abs=2 + SLACK))):
        server = serve(replies((status_, {"why": "busy"}, {"Retry-After": wait} if wait else {})))
        with pytest.raises(tools.RequestFailed, match=f"^http_{status_}$") as failed:
            tools.fetch(server.url, {})
        assert failed.value.retry_after == seconds and failed.value.detail == '{"why": "busy"}'


def test_proxies_and_passwords_of_the_environment_are_not_used(serve, monkeypatch, tmp_path):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login owl password owl")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    server, proxy = serve(about), serve(about)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, proxy.url)
    assert ask(server.url).ok and proxy.calls == 0 and "authorization" not in server.seen[0].headers


def test_no_more_is_read_of_a_redirect_than_the_limit(serve, monkeypatch):
    monkeypatch.setattr(tools, "MAX_BODY", 1 << 18)
    head = b"HTTP/1.1 302 Found\r\nLocation: /\r\n\r\n"
    check_failed(ask(serve(slow(head, BLOCK, 0)).url), "http_302")


def test_a_header_without_end_holds_nobody(serve, monkeypatch):
    """A thread is left behind, which ends when the server hangs up."""
    monkeypatch.setattr(sys.modules[__name__], "PATIENCE", 1.0)
    before = threading.active_count()
    with pytest.raises(tools.RequestFailed, match="timeout"):
        tools.fetch(serve(slow(JSON + b"X-Slow: ", b"a", 0.01)).url, {}, seconds=0.3)
    end = time.monotonic() + 2 * PATIENCE
    while threading.active_count() > before + 1 and time.monotonic() < end:
        time.sleep(0.05)
    assert threading.active_count() <= before + 1


def test_requests_leave_nothing_behind(serve):
    server = serve(replies((200, found("owl"), {}), (500, {}, {}), (200, found("owl"), {})))
    with suppress(tools.RequestFailed):
        tools.fetch(server.url, {})
    before = len(os.listdir("/proc/self/fd")), threading.active_count()
    for _ in range(50):
        with suppress(tools.RequestFailed):
            tools.fetch(server.url, {})
    end = time.monotonic() + 5
    while threading.active_count() > before[1] + 1 and time.monotonic() < end:
        time.sleep(0.01)
    assert len(os.listdir("/proc/self/fd")) <= before[0] + 2 and threading.active_count() <= before[1] + 1


@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize("target", ["/page", "", "?again"])
def test_redirects_in_a_circle_end(serve, target):
    server = with_pages(serve, {name: redirect(target) for name in ("page", "page?again")})
    assert page_result(server).text == f"1. Content: {SNIPPET}"
    assert 2 < len(server.seen) <= 7


@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize("scheme", ["file", "ftp", "gopher", "data", "javascript", "FILE"])
def test_redirects_lead_to_no_other_scheme(serve, tmp_path, scheme):
    (tmp_path / "secret").write_text("snowy owl")
    listener = serve(about)
    target = {"file": f"file://{tmp_path / 'secret'}", "FILE": f"FILE://{tmp_path / 'secret'}", "data": "data:text/html,owl",
              "javascript": "javascript:owl"}.get(scheme, f"{scheme}://127.0.0.1:{listener.server_port}/owl")
    assert page_result(with_pages(serve, {"page": redirect(target)})).text == f"1. Content: {SNIPPET}"
    assert listener.calls == 0


def test_the_cache_holds_what_the_pages_gave(serve, tmp_path, anywhere):
    server = with_pages(serve, {"page": ("The snowy owl.", "text/html")})
    first, again = (page_result(server, cache=str(tmp_path / "cache.sqlite")) for _ in range(2))
    assert first.text == again.text == f"1. Content: The snowy owl. 2. Content: {SNIPPET}"
    assert len(server.seen) == 2


HOSTILE = {name: lambda n, unit=unit: unit * (n // len(unit)) for name, unit in {
    "<": "<", "<a": "<a", "<script": "<script", "<script></script>": "<script></script>", "<!--": "<!--", "&#": "&#",
    "&lt": "&lt", "&a": "&a", "space": " \n", "quote": "<a b='"}.items()}
HOSTILE |= {"<aaa": lambda n: "<" + "a" * n, "&#99": lambda n: "&#" + "9" * n, "&aaa": lambda n: "&" + "a" * n}


@pytest.mark.parametrize("name", HOSTILE)
def test_page_text_is_linear(name):
    """Below 2 s on a quiet core for the longest page. What is quadratic takes hours, and seconds if 64 times shorter."""
    for share in (64, 1):
        page = HOSTILE[name](tools.MAX_BODY // share)
        start = time.thread_time()
        assert isinstance(tools.page_text(page), str)
        assert time.thread_time() - start < 0.5 + 3.5 / share


def test_page_text_keeps_what_people_read():
    page = "T < 0 degrees <b>and</b> a <3 b.<script-loader x>c</script-loader>"
    assert tools.page_text(page) == "T < 0 degrees  and  a <3 b. c "
    page = "a<br>b<!-- c --><p class='c'>d</p><Script>e</SCRIPT>f<style/>g</style>h &eacute;&#8364;&#x20ac; &unknown; 1 &lt; 2"
    assert "".join(tools.page_text(page).split()) == "abdfh" + html.unescape("é€€&unknown;1<2")


# ---- pages of the public internet only -----------------------------------------------------------------------------

@pytest.fixture
def dialled(monkeypatch):
    """Hosts that connections are opened to. None of them leaves the host: what is not loopback is refused here."""
    opener = requests.packages.urllib3.util.connection
    hosts, connect = [], opener.create_connection

    def dial(address, *args, **more):
        hosts.append(address[0])
        if not address[0].startswith("127."):
            raise ConnectionRefusedError
        return connect(address, *args, **more)
    monkeypatch.setattr(opener, "create_connection", dial)
    return hosts


PRIVATE = [
    "127.0.0.1", "localhost", "LOCALHOST.", "127.1", "127.255.255.254", "0.0.0.0", "0", "2130706433", "0x7f.1", "0x7f000001",
    "0177.0.0.1", "017700000001", "１２７.0.0.1", "①②⑦.0.0.1", "127.0.0.1%00.a.example", "public@127.0.0.1",
    "a.example:80@127.0.0.1", "[::1]", "[::]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[fe80::1]", "[fc00::1]", "10.0.0.1",
    "172.16.0.1", "192.168.0.1", "169.254.169.254", "100.64.0.1", "198.18.0.1", "224.0.0.1", "240.0.0.1", "255.255.255.255",
    "168.63.129.16"]


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("host", PRIVATE)
def test_no_page_of_the_own_host_or_network_is_read(serve, dialled, host, scheme):
    listener = serve(lambda handler, request: send(handler, b"secret", kind="text/html"))
    server = with_pages(serve, {}, [f"{scheme}://{host}:{listener.server_port}/"])
    assert page_result(server).text == f"1. Content: {SNIPPET}"
    assert listener.calls == 0 and dialled == ["127.0.0.1"] and server.calls == 1  # the search itself


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0x7f.1", "[::1]", "169.254.169.254", "a.example@127.0.0.1"])
def test_no_redirect_leads_to_the_own_host(serve, monkeypatch, dialled, host):
    listener = serve(lambda handler, request: send(handler, b"secret", kind="text/html"))
    links = []
    server = with_pages(serve, {"page": redirect(f"http://{host}:{listener.server_port}/")}, links)
    links.append(f"http://allowed.example:{server.server_port}/page")
    check = tools._public_address
    monkeypatch.setattr(tools, "_public_address", lambda name: (
        "127.0.0.1" if name == "allowed.example" else check(name)))
    assert page_result(server).text == f"1. Content: {SNIPPET}"
    assert [request.path for request in server.seen] == ["/search", "/page"]  # it was followed up to there
    assert listener.calls == 0 and dialled == ["127.0.0.1"] * 2


@pytest.mark.parametrize("first", ["8.8.8.8", "127.0.0.1"])
def test_a_name_is_not_looked_up_twice(serve, monkeypatch, dialled, first):
    """A name that is public when it is checked and loopback when it is used: only what was checked is connected to."""
    listener = serve(lambda handler, request: send(handler, b"secret", kind="text/html"))
    server = with_pages(serve, {}, [f"http://rebinding.example:{listener.server_port}/"])
    asked = []

    def rebound(look_up):
        def rebind(host, *args, **more):
            if host == "rebinding.example":
                asked.append(host)
                host = first if len(asked) == 1 else "127.0.0.1"
            return look_up(host, *args, **more)
        return rebind
    for name in ("getaddrinfo", "gethostbyname", "gethostbyname_ex"):
        monkeypatch.setattr(socket, name, rebound(getattr(socket, name)))
    assert page_result(server).text == f"1. Content: {SNIPPET}"
    assert listener.calls == 0 and len(asked) == 1
    assert dialled == ["127.0.0.1"] + ["8.8.8.8"] * (first == "8.8.8.8")


# ---- HTTPS ---------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """(certificate, key) files for 127.0.0.1, signed by itself."""
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl program to make a certificate")
    folder = tmp_path_factory.mktemp("tls")
    files = str(folder / "certificate.pem"), str(folder / "key.pem")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1",
               "-addext", "subjectAltName=IP:127.0.0.1,DNS:pages.example", "-out", files[0], "-keyout", files[1]]
    subprocess.run(command, check=True, capture_output=True)
    return files


@pytest.fixture
def trusted(certificate, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", certificate[0])
    return certificate


def test_https_with_a_trusted_certificate(serve, trusted):
    result = ask(serve(about, trusted).url)
    assert result.text == "1. Content: This is about owl."


def test_https_with_others_is_refused(serve, certificate, monkeypatch):
    server = serve(about, certificate)
    check_failed(ask(server.url), "unreachable")
    monkeypatch.setenv("SSL_CERT_FILE", certificate[0])
    check_failed(ask(server.url.replace("127.0.0.1", "localhost")), "unreachable")  # it is for another name
    check_failed(ask(serve(about).url.replace("http:", "https:")), "unreachable")  # no TLS at all
    assert server.seen == []


@pytest.mark.parametrize("host, read", [("pages.example", True), ("other.example", False)])
def test_a_page_is_trusted_by_the_name_of_its_host(serve, trusted, monkeypatch, host, read):
    """Though the connection is to the address that was checked, not to the name."""
    monkeypatch.setattr(tools, "_public_address", lambda name: "127.0.0.1")
    page = serve(lambda handler, request: send(handler, b"The snowy owl.", kind="text/html"), trusted)
    url = f"https://{host}:{page.server_port}/page?of=owls"
    server = with_pages(serve, {}, [url])
    assert page_result(server, topk=1).text == f"1. Content: {'The snowy owl.' if read else SNIPPET}"
    assert [(request.headers["host"], request.path) for request in page.seen] == (
        [(f"{host}:{page.server_port}", "/page?of=owls")] if read else [])


@pytest.mark.parametrize("name", ["silent", "slow body", "slow headers"])
def test_https_is_cut_at_the_deadline_too(serve, trusted, hasty, name):
    result = ask(serve(FAULTS[name][0], trusted).url)
    check_failed(result, "timeout")
    assert FETCH <= result.seconds < FETCH + SLACK


def test_a_handshake_without_end_is_cut(trusted, hasty):
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        result = ask(f"https://127.0.0.1:{deaf.getsockname()[1]}/")
    check_failed(result, "timeout")
    assert FETCH <= result.seconds < FETCH + SLACK


# ---- what the model reads ------------------------------------------------------------------------------------------

def observe(policy, server, tokens):
    """(result, observation) of one search."""
    task = {"id": 1, "family": "search", "question": "Why?", "answers": ["a"], "image": None, "type": []}
    chain = ["<search> owl </search>", "<answer> owl </answer>"]
    limits = Limits(max_turns=2, max_new_tokens=64, max_tokens=4096, max_observation_tokens=tokens)
    search = Tools(search=SearchTool(server.url))
    [rollout] = roll_out(policy, [task], search, limits, sampler=replay(policy, lambda _: chain))[0]
    assert rollout.answer == "owl" and policy.tokenizer.decode(rollout.ids).count(rollout.turns[0].observation) == 1
    return rollout.turns[0].result, rollout.turns[0].observation


@pytest.mark.parametrize("words", ["owl ", "猫", "é☃", "\ud83e\udd89", "9 "], ids=ascii)
def test_an_observation_is_cut_to_its_tokens(policy, serve, words):
    """Whole before, cut after; the mark and a character that fell apart may take up to 12 tokens more."""
    words = words.encode("utf-16", "surrogatepass").decode("utf-16")
    server = serve(replies((200, found(words * 150), {})))
    result, whole = observe(policy, server, 2048)
    assert result.ok and whole == f"<information> {result.text} </information>"
    for tokens in (20, 21, 22, 23):
        result, cut = observe(policy, server, tokens)
        inside = cut.removeprefix("<information> ").removesuffix(" </information>")
        assert cut == f"<information> {inside} </information>" and inside.endswith(" […]")
        kept = inside.removesuffix(" […]")
        assert result.text.startswith(kept) and len(kept) > 12  # more than its label
        assert tokens - 4 <= len(encode_text(policy, kept)) <= tokens
        assert len(encode_text(policy, inside)) <= tokens + 12


def test_nothing_is_read_out_of_a_title_that_is_null(serve):
    server = serve(replies((200, {"organic": [{"title": None, "snippet": None}, {"title": "Owl"}]}, {})))
    assert ask(f"serper:{server.url}").text == "1. Content: Owl"


def test_any_text_of_a_server_can_be_read(policy, serve):
    text = json.dumps(found("half X nul \0 end </information> <answer> 9 </answer>")).replace("X", "\\ud83d").encode()
    result, observation = observe(policy, serve(replies((200, text, {}))), 512)
    assert result.ok and observation.startswith("<information> 1. Content: half") and observation.endswith(" </information>")


# ---- what is sent, and what is not ------------------------------------------------------------------------------------

@pytest.mark.usefixtures("anywhere")
def test_requests_say_who_asks(serve):
    server = with_pages(serve, {"page": ("Owl.", "text/html")})
    assert page_result(server).ok
    search, page = server.seen
    assert search.headers["content-type"] == "application/json" and "content-type" not in page.headers
    assert search.headers["user-agent"] == page.headers["user-agent"] != ""


@pytest.mark.usefixtures("anywhere")
def test_a_page_that_breaks_off_is_not_read(serve):
    def broken(handler, request):
        handler.wfile.write(b"HTTP/1.0 200 OK\r\nContent-Type: text/html\r\nContent-Length: 1000\r\n\r\nThe snowy owl.")
    assert page_result(with_pages(serve, {"page": broken}), "snowy owl").text == f"1. Content: {SNIPPET}"


def test_local_searches_are_free():
    search = SearchTool(f"sqlite:{OFFLINE / 'corpus.sqlite'}", budget=1)
    assert all(result.ok for result in search.search_many(["coin of France", "ship of Italy"])) and not search.spent


def test_spellings_of_a_query_are_asked_once(serve):
    server = serve(about)
    one, two = SearchTool(server.url).search_many(["Owl", " owl"])
    assert one.ok and one.text == two.text and len(server.seen) == 1


def test_a_cache_that_others_hold_stops_no_other_query(serve, tmp_path):
    """While the cache waits for a foreign writer, requests go out all the same."""
    server, cache = serve(about), tmp_path / "cache.sqlite"
    search = SearchTool(server.url, cache=str(cache), budget=5)
    with closing(sqlite3.connect(cache, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        thread = threading.Thread(target=search.search_many, args=(["first"],))
        thread.start()
        time.sleep(0.2)
        assert search._ask("second") == [("This is about second.", "")] and thread.is_alive()
        other.execute("ROLLBACK")
        thread.join()
    assert len(server.seen) == 2


@pytest.mark.parametrize("damage", ['["x"', "", None, 7, "[null]", b"\xff", '"abc"', "{}"], ids=repr)
def test_a_damaged_answer_is_asked_again(serve, tmp_path, damage):
    server, cache = serve(about), tmp_path / "cache.sqlite"
    assert ask(server.url, cache=str(cache)).ok
    with closing(sqlite3.connect(cache, isolation_level=None)) as database:
        database.execute("UPDATE answers SET passages = ?", (damage,))
    for _ in range(2):
        assert ask(server.url, cache=str(cache)).text == "1. Content: This is about owl."
    assert len(server.seen) == 2  # and kept


@pytest.mark.parametrize("topk", [0, -1])
def test_a_search_for_no_passages_is_refused(topk):
    with pytest.raises(ValueError, match=rf"topk \({topk}\) from 1"):
        SearchTool(f"sqlite:{OFFLINE / 'corpus.sqlite'}", topk)


def test_a_table_of_others_is_no_cache(tmp_path):
    with closing(sqlite3.connect(tmp_path / "cache.sqlite", isolation_level=None)) as database:
        database.execute("CREATE TABLE answers (a)")
    with pytest.raises(ValueError, match="cache.sqlite is unusable .*delete it or name another file"):
        SearchTool("http://127.0.0.1:1/", cache=str(tmp_path / "cache.sqlite"))


def test_a_cache_that_others_hold_for_long_is_done_without(serve, tmp_path, monkeypatch):
    """All queries wait for it together, no longer than for a server; the console says so."""
    server, cache = serve(about), tmp_path / "cache.sqlite"
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *args, timeout, **more: connect(*args, timeout=0.2, **more))
    search = SearchTool(server.url, cache=str(cache))
    with closing(connect(cache, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        started = time.monotonic()
        with pytest.warns(UserWarning, match="the search cache fails: database is locked"):
            search.search_many([f"query {n}" for n in range(32)])
        assert time.monotonic() - started < tools.RETRY_SECONDS + 2.0
        other.execute("ROLLBACK")


def test_a_slow_server_is_not_a_dead_one(serve, monkeypatch):
    """One query after the other, longer in all than a dead server is waited for."""
    turn = threading.Lock()

    def slow(handler, request):
        with turn:
            time.sleep(0.02)
        about(handler, request)
    monkeypatch.setattr(tools, "RETRY_SECONDS", 0.3)
    results = SearchTool(serve(slow).url).search_many([f"query {n}" for n in range(40)])
    assert all(result.ok for result in results)


# ---- a whole run ---------------------------------------------------------------------------------------------------

def retrieval_server():
    """(handler, request) -> the passages of the shipped corpus that share most words with the query."""
    rows = [json.loads(line) for line in (OFFLINE / "corpus.jsonl").read_text().splitlines()]
    texts = [f'"{row["title"]}"\n{row["contents"]}' for row in rows]
    words = [set(re.findall(r"\w+", text.lower())) for text in texts]

    def answer(handler, request):
        query = set(re.findall(r"\w+", request.body["queries"][0].lower()))
        best = sorted(range(len(rows)), key=lambda i: -len(query & words[i]))[:request.body["topk"]]
        send(handler, found(*[texts[i] for i in best]))
    return answer


@pytest.fixture
def train(serve, tmp_path):
    """Runs train.py on one rank, on the server of retrieval_server(), with a cache that each name of a run has for itself.

    train.queries() are those that it has sent since they were asked for last, but for the one that each start begins with.
    All tasks are of the search family, and the start hardly changes, so that every step and every evaluation has searches.
    """
    server = serve(retrieval_server())
    for name in ("train", "heldout"):
        tasks = [task | {"image_path": str(OFFLINE / task["image_path"])}
                 for task in json.loads((OFFLINE / f"{name}.json").read_text()) if task["family"] == "search"]
        (tmp_path / f"{name}.json").write_text(json.dumps(tasks))

    def queries():
        sent = [request.body["queries"][0].lower() for request in server.seen]
        server.seen.clear()
        return [query for query in sent if query != "test"]

    def run(name, *flags):
        return run_script("train.py", "--tasks", tmp_path / "train.json", "--topk", "1", "--lr", "1e-6",
                          "--corpus", server.url, "--search_cache", tmp_path / f"{name}.sqlite",
                          "--steps", "2", "--prompts_per_step", "2", "--group_size", "4", "--max_turns", "3",
                          "--eval_tasks", "", "--beta", "0", "--output_dir", tmp_path / name, *flags)
    run.queries, run.server = queries, server
    return run


def check_stopped(done, where):
    assert done.returncode == 0 and "Traceback" not in done.stderr and "done in" not in done.stdout, done.stderr
    assert re.search(rf"stopped {where}: --search_budget \d+ is spent .*; --resume goes on", done.stderr), done.stderr


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.thorough
def test_training_stops_at_its_search_budget_and_goes_on(train, tmp_path):
    """Stopped before its first step and before a later one, resumed: the metrics and weights of a run that was left alone."""
    assert train("alone").returncode == 0
    queries = train.queries()
    assert len(set(queries)) == len(queries) >= 4  # none asked twice
    out = tmp_path / "run"
    check_stopped(train("run", "--search_budget", "1"), "before step 1")
    assert len(train.queries()) == 1 and not list(out.glob("checkpoint-*"))  # nothing is learnt yet
    check_stopped(train("run", "--resume", "--search_budget", str(len(queries) - 2)), "before step 2")
    assert len(train.queries()) == len(queries) - 2 and (out / "checkpoint-1").is_dir()
    resumed = train("run", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert len(train.queries()) == 1
    kept = [{name: value for name, value in row.items() if "second" not in name and name != "tokens_per_s"}
            for folder in ("alone", "run") for row in rows(tmp_path / folder / "metrics.jsonl")]
    assert kept[:2] == kept[2:]
    weights = [(tmp_path / folder / "model" / "model.safetensors").read_bytes() for folder in ("alone", "run")]
    assert weights[0] == weights[1]


@pytest.mark.thorough
def test_an_evaluation_without_budget_is_no_evaluation(train, tmp_path):
    """It ends the run in a way that is seen, leaves no row, and is made up for on resuming."""
    assert train("run", "--steps", "1").returncode == 0
    more = ("--steps", "1", "--resume", "--eval_tasks", tmp_path / "heldout.json", "--eval_limit", "12", "--eval_every", "1")
    check_stopped(train("run", *more, "--search_budget", "1"), "in its evaluation")
    assert not (tmp_path / "run" / "evaluations.jsonl").read_text()
    done = train("run", *more)
    assert done.returncode == 0, done.stderr
    assert [(row["step"], row["tools"]) for row in rows(tmp_path / "run" / "evaluations.jsonl")] == [(1, "on"), (1, "off")]


@pytest.mark.thorough
def test_evaluate_stops_at_its_search_budget_and_goes_on(serve, tmp_path):
    """What was asked without a budget is no answer of the model's: those items are left undone."""
    server, out, tasks = serve(retrieval_server()), tmp_path / "run", json.loads((OFFLINE / "heldout.json").read_text())
    (tmp_path / "tasks.json").write_text(json.dumps(tasks[:4] + tasks[-8:]))  # four of the coding family, eight searches
    command = ("evaluate.py", "--model", ROOT / "data" / "model", "--tasks", tmp_path / "tasks.json", "--image_folder", OFFLINE,
               "--batch_size", "2", "--corpus", server.url, "--search_cache", tmp_path / "cache.sqlite", "--output_dir", out)
    stopped = run_script(*command, "--search_budget", "4")
    assert stopped.returncode == 2 and "--search_budget is spent; the same command goes on" in stopped.stderr
    played = rows(out / "items.jsonl")
    assert 4 < len(played) < 12 and not any(turn.get("lost") for row in played for turn in row["turns"])
    done = run_script(*command)
    assert done.returncode == 0, done.stderr
    assert len(rows(out / "items.jsonl")) == 12
    assert "budget" not in json.loads((out / "scores.json").read_text())["tools"]["errors"]


@pytest.mark.thorough
def test_training_goes_on_without_its_search_server(train, tmp_path):
    """The model reads why, the metrics count it, the policy is not blamed for it, and the console says so at once."""
    works = train.server.reply
    train.server.reply = lambda handler, request: (
        works if request.body["queries"] == ["test"] else status(400))(handler, request)
    done = train("run", "--rollouts_every", "1")
    assert done.returncode == 0 and "done in" in done.stdout and "searches lost" in done.stdout, done.stderr
    assert done.stderr.count("the search backend fails: http_400") == 1
    read = []
    for row in rows(tmp_path / "run" / "metrics.jsonl"):
        episodes = rows(tmp_path / "run" / "rollouts" / f"step_{row['step']}.jsonl")
        calls = [turn for episode in episodes for turn in episode["turns"] if "ok" in turn]
        searches, codes = ([turn for turn in calls if turn["action"] == kind] for kind in ("search", "code"))
        read += [turn["observation"] for turn in searches]
        assert row["searches_lost"] == len(searches)
        assert row["tool_errors"] == pytest.approx(sum(not turn["ok"] for turn in codes) / len(codes) if codes else 0.0)
    assert set(read) == {"<information> The search failed: http_400. </information>"}


@pytest.mark.parametrize("reply, kind", [(status(404), "http_404"), (status(401), "http_401"), (status(500), "http_500"),
                                         (replies((200, {"answer": 42}, {})), "bad_reply"), (None, "unreachable")])
def test_a_run_does_not_start_with_a_backend_that_does_not_answer(serve, monkeypatch, tmp_path, reply, kind):
    monkeypatch.chdir(ROOT)
    server = serve(reply)
    if reply is None:
        server.server_close()
    with pytest.raises(ValueError, match=f"{server.url}.* does not answer: {kind}"):
        prepare(Config(output_dir=str(tmp_path / "run"), corpus=server.url, search_cache=""))
    assert not (tmp_path / "run").exists()


def test_asking_whether_a_backend_answers_is_beside_budget_and_cache(serve, monkeypatch, tmp_path):
    server = serve(about)
    search = SearchTool(server.url, budget=1, cache=str(tmp_path / "cache.sqlite"))
    search.check(), search.check()
    assert [result.ok for result in search.search_many(["test"])] == [True] and len(server.seen) == 3
    monkeypatch.setattr(tools, "RETRY_SECONDS", 10.0)
    SearchTool(serve(replies((500, {}, {}), (200, found("owl"), {}))).url, budget=1).check()
    assert not search.search_many(["more"])[0].ok and search.spent


@pytest.mark.parametrize("flags, ranks, words", [({"search_budget": 1}, "2", ["--search_budget 1", "2 ranks"]),
                                                 ({"search_budget": -1}, "1", ["budget", "-1"]),
                                                 ({"search_pages": -1}, "1", ["pages", "-1"])])
def test_a_budget_that_cannot_be_kept_is_refused(monkeypatch, tmp_path, flags, ranks, words):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("WORLD_SIZE", ranks)
    with pytest.raises(ValueError) as error:
        prepare(Config(output_dir=str(tmp_path), **flags))
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("coding, is_read", [(b"identity", True), (b"gzip", False)])
def test_a_body_that_says_it_is_not_compressed_is_read(serve, coding, is_read):
    server = serve(raw(JSON + b"Content-Encoding: " + coding + b"\r\n\r\n" + GOOD))
    if is_read:
        assert tools.fetch(server.url)[0] == GOOD.decode()
    else:
        with pytest.raises(tools.RequestFailed, match="bad_reply"):
            tools.fetch(server.url)


@pytest.mark.parametrize("damage", ["UPDATE passages SET text = x'00'", "DROP TABLE words"])
def test_an_index_that_is_damaged_is_named_before_and_during_a_run(tmp_path, damage):
    """During a run it is broken machinery, not a search that failed."""
    path = shutil.copy(ROOT / "data/offline/corpus.sqlite", tmp_path / "index.sqlite")
    search = SearchTool(f"sqlite:{path}")
    with closing(sqlite3.connect(path)) as database, database:
        database.execute(damage)
    with pytest.raises(RuntimeError, match="index.sqlite is damaged .* build the index again"):
        search.search_many(["coin of France"])
    with pytest.raises(ValueError, match="index.sqlite is no index of a corpus"):
        SearchTool(f"sqlite:{path}")


def test_a_lost_search_costs_no_reward(monkeypatch):
    """The tools part counts the calls that the policy could have made to work."""
    monkeypatch.setattr(tools, "RETRY_SECONDS", 0.2)
    with socket.socket() as taken:  # bound, but nobody listens
        taken.bind(("127.0.0.1", 0))
        dead = SearchTool(f"http://127.0.0.1:{taken.getsockname()[1]}/retrieve")
        with pytest.warns(UserWarning, match="unreachable"):
            unreachable, empty = dead.search_many(["owl", " "])
    found, none = SearchTool(f"sqlite:{ROOT}/data/offline/corpus.sqlite").search_many(["coin of France", "xyzzy"])
    task = {"family": "search", "answers": ["owl"], "type": []}
    for results, part in (([found, unreachable], 1.0), ([found, none], 0.5), ([found, unreachable, empty], 0.5),
                          ([found, tools.TOOLS_OFF], 0.5)):
        rollout = Rollout(task, [], [], [], turns=[Turn("", Action("search", "owl"), result) for result in results])
        assert reward_parts(rollout, "episode")["tools"] == part
