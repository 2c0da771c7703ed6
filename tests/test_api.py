"""A model behind an API: what it is sent is what a local model sees, every fault is ridden out or
named, the key stays secret.

The endpoint is a real server on the loopback interface, tests/chat_server.py.
"""
import json
import os
import random
import re
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate
from pathlib import Path

import pytest
from chat_server import FAULTS, QUICK, ChatServer, completion, parts, refuse, send, stand_in
from PIL import Image, ImageChops

import tools
from data import endpoint
from data.endpoint import (PROBE, ApiFailed, ApiRefused, ChatModel, chat_messages,
                           with_thought)
from data.tasks import load_tasks
from model import encode_text
from reward import turn_is_valid
from rollout import Limits, Rollout, Tools, Turn, instructions, roll_out
from tools import Action, CodeTool, SearchTool, ToolResult

ROOT = Path(__file__).parent.parent
SLACK = 2.0  # seconds that a busy machine may add
KEY = "sk-key-0123456789abcdef"
ANSWER = "<think> It is C. </think> <answer> C </answer>"
QUESTION = Rollout({"image": None}, [], [], [], opening="Which letter?")


@pytest.fixture(autouse=True)
def no_key_and_nothing_said(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    endpoint._say_once.cache_clear()  # an earlier test may have had the same port


def ask(faults=(), reply=ANSWER, rollout=QUESTION, **options):
    """(what `ChatModel.reply` returns or raises, the model, the server that had these faults)."""
    with ChatServer(lambda messages: reply, faults) as server:
        chat = ChatModel(server.url, "any",
                         **{"backoff": 0.01, "timeout": 10.0, "patience": 10.0, **options})
        try:
            return chat.reply(rollout), chat, server
        except (ApiFailed, ApiRefused) as error:
            return error, chat, server


def for_items(fault):
    """A fault of all prompts but the probe."""
    return lambda messages: None if messages == PROBE else fault


def always(fault):
    return lambda messages: fault


# ---- what is sent --------------------------------------------------------------------------------

CHAIN = ["<think> It is dark. </think> <problem> {'dark'} </problem>",
         "<think> I turn it. </think> "
         "<code>\nresult = image.transpose(2)  # by 90 degrees\n</code>",
         "<think> Now this fails. </think> <code> fail </code>",
         "<think> I look it up. </think> <search> seal of Italy </search>",
         "<think> I know it. </think> <answer> C </answer>"]


@pytest.mark.parametrize("prompt", ["short", "full"])
@pytest.mark.parametrize("has_image", [True, False])
def test_an_endpoint_is_shown_what_the_local_model_sees(policy, image, prompt, has_image):
    """Five turns with live tools; before each, the messages, put through the local model's
    template, are its tokens so far."""
    special = "<|im_end|> <|image_pad|> </think>"  # text of others that must stay text
    task = {"id": 1, "family": "coding", "question": f"Which letter? {special}",
            "image": image if has_image else None}
    seen_locally = []
    server = ChatServer(lambda messages: CHAIN[len(messages) // 2])
    with CodeTool(workers=1) as code, server:
        chat = ChatModel(server.url, "any", max_new_tokens=99)

        def sampler(live):
            seen_locally.append(list(live[0].ids))
            text, whole = chat.reply(live[0])
            assert whole
            return [(encode_text(policy, text) + [policy.end_id],
                     [0.0] * (len(encode_text(policy, text)) + 1))]
        search = SearchTool(f"sqlite:{ROOT}/data/offline/corpus.sqlite")
        (rollout,), _ = roll_out(policy, [task], Tools(code, search), Limits(5, 99, 8192),
                                 prompt=prompt, sampler=sampler)
    assert (rollout.stop, rollout.answer,
            [turn.text for turn in rollout.turns]) == ("answer", "C", CHAIN)
    assert rollout.opening == task["question"] + instructions(prompt, "coding")
    for request, ids in zip(server.seen, seen_locally, strict=True):
        sent, local = request.body["messages"], policy.tokenizer.decode(ids)
        assert sent == server.seen[-1].body["messages"][:len(sent)]
        assert rendered(policy,
                        sent) == re.sub(r"(<\|image_pad\|>)+(?=<\|vision_end\|>)", r"\1", local)

    messages = server.seen[-1].body["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"] * 4 + ["user"]
    assert [message["content"] for message in messages[1::2]] == CHAIN[:4]
    (opening, first), tip, (ready,
                            second), error, found = (parts(message) for message in messages[::2])
    assert opening == rollout.opening and (first is not None) == has_image
    assert (tip, ready) == (("Write the code.", None), "The processed image.")
    assert error == ("Error: line 1: NameError: name 'fail' is not defined", None)
    assert re.fullmatch(r"<information> .*wolf.* </information>", found[0]) and found[1] is None
    shown = [first, second] if has_image else [second]
    assert len(shown) == len(rollout.pictures)
    assert all(ImageChops.difference(*pair).getbbox() is None and pair[0].mode == "RGB"
               for pair in zip(shown, rollout.pictures, strict=True))
    assert second.size == ((30, 40) if has_image else (28, 28))


def rendered(policy, messages):
    """The text that a server with the local model's chat template makes of messages."""
    def content(message):
        if isinstance(message["content"], str):
            return message["content"]
        return [{"type": "image"} if part["type"] == "image_url" else part
                for part in message["content"]]
    shown = [{**message, "content": content(message)} for message in messages]
    return policy.tokenizer.apply_chat_template(shown, tokenize=False, add_generation_prompt=True)


def test_the_exact_json_of_a_request(image):
    rollout = Rollout({"image": "a.png"}, [], [], [], opening="Which letter?", pictures=[image],
                      turns=[
        Turn("I turn it.", Action("code", "…"), ToolResult(True, "", image.rotate(180), None, 0.1),
             "The processed image."),
        # had no room for an observation
        Turn("Again.", Action("code", "…"), ToolResult(True, "", image, None, 0.1), None)])
    _, _, server = ask(rollout=rollout, max_new_tokens=77, temperature=0.5)
    [request] = server.seen
    first, second = (message["content"][0]["image_url"]["url"]
                     for message in request.body["messages"][:3:2])
    assert (request.path,
            request.headers["content-type"]) == ("/v1/chat/completions", "application/json")
    assert request.body == {"model": "any", "max_tokens": 77, "temperature": 0.5, "messages": [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": first}},
                                     {"type": "text", "text": "Which letter?"}]},
        {"role": "assistant", "content": "I turn it."},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": second}},
                                     {"type": "text", "text": "The processed image."}]},
        {"role": "assistant", "content": "Again."}]}
    for message, picture in zip(request.body["messages"][:3:2], (image, image.rotate(180)),
                                strict=True):
        assert ImageChops.difference(parts(message)[1], picture).getbbox() is None


# ---- replies -------------------------------------------------------------------------------------

@pytest.mark.parametrize("body, expected", [
    (completion("C"), ("C", True)), (completion("C", "length"), ("C", False)),
    (completion("", "length"), ("", False)),
    (completion(None, "tool_calls"), ("", True)), (completion("C", None), ("C", True)),
    ({"choices": [{"message": {"content": ["C", None]}}]}, ("C", True)),
    ({"choices": [{"message": {"content": "C"}}]}, ("C", True)),
    ({"choices": [{"message": {}}]}, ("", True)),
    (completion("\ud83d 猫 <|im_end|>\x1b[2J"), ("? 猫 <|im_end|>\x1b[2J", True))])
def test_a_reply_is_its_text_and_whether_it_is_whole(body, expected):
    assert ask(reply=body)[0] == expected


A = "<think>t</think><answer>Rome</answer>"


def words(text):
    return {"type": "text", "text": text}


@pytest.mark.parametrize("message, reason, expected", [
    # the thought apart, as servers with a reasoning parser send it: stripped, or as it was written
    ({"content": "<answer> C </answer>", "reasoning_content": "I see."}, "stop",
     "<think> I see. </think>\n<answer> C </answer>"),
    ({"content": "<answer> C </answer>", "reasoning": "I see."}, "stop",
     "<think> I see. </think>\n<answer> C </answer>"),
    ({"content": " <answer> C </answer>", "reasoning": "\nI see.\n"}, "stop",
     "<think>\nI see.\n</think> <answer> C </answer>"),
    ({"content": "<answer> C </answer>", "reasoning": "<think>I see.</think>"}, "stop",
     "<think> I see. </think>\n<answer> C </answer>"),
    # both names, or in the content too: once
    ({"content": "<answer> C </answer>", "reasoning_content": "a", "reasoning": "a"}, "stop",
     "<think> a </think>\n<answer> C </answer>"),
    ({"content": A, "reasoning_content": "t"}, "stop", A),
    ({"content": A, "reasoning": "<think>t</think>"}, "stop", A),
    ({"content": "<answer>t</answer>", "reasoning": "t"}, "stop",
     "<think> t </think>\n<answer>t</answer>"),
    # all of it taken for a thought
    ({"content": None, "reasoning_content": A}, "stop", A),
    ({"content": "", "reasoning": A}, "stop", A),
    ({"reasoning": "<answer>Rome</answer>"}, "stop", "<answer>Rome</answer>"),
    # nothing apart
    ({"content": A, "reasoning_content": None}, "stop", A),
    ({"content": A, "reasoning": " "}, "stop", A),
    ({"content": A, "reasoning": {"effort": "low"}}, "stop", A),
    ({"content": A, "reasoning_content": 7}, "stop", A),
    ({"content": "<answer>Rome</answer>", "reasoning_content": "", "reasoning": "t"}, "stop",
     "<think> t </think>\n<answer>Rome</answer>"),
    ({"content": "<answer>Rome</answer>", "reasoning": [{"type": "reasoning.text", "text": "t"}]},
     "stop", "<think> t </think>\n<answer>Rome</answer>"),
    # parts
    ({"content": [words(A)]}, "stop", A),
    ({"content": [words("<think>t</think>"), words("<answer>Rome</answer>")]}, "stop", A),
    ({"content": [{"type": "output_text", "text": A, "annotations": []}]}, "stop", A),
    ({"content": [{"text": A}]}, "stop", A),
    ({"content": [{"type": "thinking", "thinking": [words("t")]}, words("<answer>Rome</answer>")]},
     "stop", "<think> t </think>\n<answer>Rome</answer>"),
    ({"content": [{"type": "thinking", "thinking": "t", "signature": "x"},
                  words("<answer>Rome</answer>")]}, "stop",
     "<think> t </think>\n<answer>Rome</answer>"),
    ({"content": [{"type": "reasoning", "text": "t"}, {"type": "redacted_thinking", "data": "x"},
                  {"type": "image_url", "image_url": {"url": "x"}},
                  words("<answer>Rome</answer>")]}, "stop",
     "<think> t </think>\n<answer>Rome</answer>"),
    # cut off
    ({"content": None, "reasoning_content": "I see"}, "length", "<think> I see"),
    ({"content": "<answer> C", "reasoning": "I see."}, "length",
     "<think> I see. </think>\n<answer> C")])
def test_a_thought_that_the_server_split_off_is_put_back(message, reason, expected):
    choice = {"message": {"role": "assistant", **message}, "finish_reason": reason}
    reply, chat, _ = ask(reply={"choices": [choice]})
    assert reply == (expected, reason != "length") and chat.usage["empty"] == 0


@pytest.mark.parametrize("turn", CHAIN)
@pytest.mark.parametrize("strip", [True, False])
def test_a_turn_that_is_split_and_put_together_is_the_same(turn, strip):
    """Of servers that strip, as far as what stands around the tags is what our models write."""
    turn = turn.replace("</think> ", "</think>\n")
    thought, _, action = turn.removeprefix("<think>").partition("</think>")
    thought, action = (thought.strip(), action.strip()) if strip else (thought, action)
    assert with_thought(thought, action, True) == turn and turn_is_valid(turn)


@pytest.mark.parametrize("message, reason", [
    ({"content": None,
      "tool_calls": [{"id": "c", "type": "function",
                      "function": {"name": "search", "arguments": "{}"}}]},
     "tool_calls"),
    ({"content": None, "refusal": "I cannot."}, "stop"),
    ({"content": [{"type": "refusal", "refusal": "I cannot."}]}, "stop"),
    ({"content": None}, "content_filter"), ({"content": " \n"}, "stop"), ({"content": []}, "stop"),
    ({}, None), ({"content": None, "reasoning_content": "I may not."}, "stop")])
def test_a_reply_without_a_text_is_an_invalid_turn_that_is_counted_and_said_once(capfd, message,
                                                                                 reason):
    body = {"choices": [{"message": {"role": "assistant", **message}, "finish_reason": reason}]}
    with ChatServer(lambda messages: body) as server:
        chat = ChatModel(server.url, "any")
        chat.check()  # the probe is no turn
        replies = [chat.reply(QUESTION) for _ in range(3)]
    assert all(whole and tools.parse_action(text).kind == "invalid" for text, whole in replies)
    assert chat.usage["empty"] == 3 and chat.usage["requests"] == 4
    assert capfd.readouterr().err == (
        f"{server.url}: a reply without a text (finish_reason {reason}) counts as an invalid turn; "
        "`empty` in usage.jsonl counts them\n")


@pytest.mark.parametrize("status", [200, 201])
def test_a_created_reply_is_a_reply(status):
    assert ask(always(lambda handler, good: send(handler, good, status)))[0] == (ANSWER, True)


@pytest.mark.parametrize("usage, expected", [
    ({"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12}, (7, 5, 0)),
    ({"prompt_tokens": 7, "completion_tokens": 5, "prompt_tokens_details": None}, (7, 5, 0)),
    ({"prompt_tokens": None, "completion_tokens": "5"}, (0, 0, 1)),
    ({"prompt_tokens": 1e9, "completion_tokens": float("nan")}, (0, 0, 1)),
    ({}, (0, 0, 1)), (None, (0, 0, 1)), ([], (0, 0, 1)),
    ([1], (0, 0, 1)), ("n/a", (0, 0, 1))], ids=repr)
def test_tokens_are_counted_where_the_endpoint_counts_them(usage, expected):
    reply, chat, _ = ask(reply={**completion("C"), "usage": usage})
    assert reply == ("C", True)
    names = ("prompt_tokens", "completion_tokens", "uncounted")
    assert chat.usage == {"requests": 1, "retries": 0, "empty": 0,
                          **dict(zip(names, expected, strict=True))}


# ---- faults --------------------------------------------------------------------------------------

SLOW = {"hang", "drip", "drip_head"}
KINDS = {"reset": "unreachable", "closed": "unreachable", "cut": "bad_reply",
         "garbage": "bad_reply", "no_choices": "bad_reply",
         "other_shape": "bad_reply", "huge": "bad_reply", **dict.fromkeys(SLOW, "timeout"),
         **{name: name for name in FAULTS if name.startswith("http_")}}
SHAPES = [b"", b"data: {}\n\ndata: [DONE]\n\n", b"[" * 60_000, b"1" * 60_000,
          *(json.dumps(shape).encode() for shape in (
    None, 7, "text", [], {}, {"choices": None}, {"choices": {}}, {"choices": [None]},
    {"choices": [{}]}, {"choices": [{"message": None}]}, {"choices": [{"message": {"content": 7}}]},
    {"choices": [{"message": {"content": [["a"]]}}]},
    {"choices": [{"message": {"content": [{"text": 7}]}}]},
    {"choices": [{"message": {"content": {}}}]}, {"error": {"message": "engine dead", "code": 500}},
    {"error": {"message": "slow down", "code": 429}},
    {"error": {"message": "no", "code": "rate_limit"}}, {"error": "no"},
    {"choices": [{"message": {"content": "C"}, "finish_reason": "error"}]}))]


@pytest.mark.parametrize("name", FAULTS)
def test_what_may_pass_is_asked_again(name):
    """Faults in a row, then a reply; and where there is no time for another try, the kind of the
    failure."""
    num_faults, options = (1, {"timeout": 0.3}) if name in SLOW else (3, {})
    reply, chat, server = ask([name] * num_faults, **options)
    assert reply == (ANSWER, True)
    assert len(server.seen) == chat.usage["requests"] == chat.usage["retries"] + 1
    # on a busy machine the reply may be late, too
    assert chat.usage["retries"] == num_faults or name in SLOW
    assert all(request.body == server.seen[0].body for request in server.seen)
    failure, chat, server = ask([name], **options, backoff=10.0)
    assert isinstance(failure, ApiFailed)
    assert str(failure) == KINDS[name] and chat.usage["retries"] == 0
    assert [request.body["messages"] == PROBE for request in server.seen] == [False, True]


@pytest.mark.parametrize("body", SHAPES, ids=lambda body: repr(body[:30]))
def test_json_of_another_shape_is_a_bad_reply(body):
    def fault(handler, good):
        send(handler, body)
    reply, chat, _ = ask([fault])
    assert reply == (ANSWER, True) and chat.usage["retries"] == 1
    assert str(ask([fault], backoff=10.0)[0]) == "bad_reply"


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[pytest.mark.thorough] * (place > 0))
    for place, name in enumerate(sorted(SLOW))])
def test_a_slow_server_is_left_at_the_deadline(name):
    start = time.monotonic()
    failure, chat, _ = ask(always(name), timeout=60.0, patience=0.5)
    assert isinstance(failure, ApiRefused)
    assert "gives no reply for model any: timeout" in str(failure)
    assert 0.5 <= time.monotonic() - start < 0.5 + SLACK and chat.usage["requests"] == 2
    failure, _, _ = ask(for_items(name), timeout=60.0, patience=0.5)
    # it has left time for the probe
    assert isinstance(failure, ApiFailed) and str(failure) == "timeout"


def test_no_more_is_read_of_a_body_than_its_limit(monkeypatch):
    sent = []

    def endless(handler, good):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
        while len(sent) < 4096:  # 256 MB
            handler.wfile.write(b" " * 65_536)
            sent.append(1)
    monkeypatch.setattr(tools, "MAX_BODY", 1 << 18)
    assert ask([endless])[0] == (ANSWER, True)
    assert len(sent) * 65_536 < 32 << 20  # the sockets' buffers hold some


def test_no_server_is_unreachable(capfd):
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    chat = ChatModel(url, "any", patience=2.0, backoff=0.3)  # it waits 0.3 to 0.45 s, then twice that
    for _ in range(2):
        with pytest.raises(ApiRefused, match=r"unreachable \(\[Errno 111\] Connection refused\); "):
            chat.reply(QUESTION)
    # once
    assert capfd.readouterr().err == (f"{url}: unreachable; asks again, for up to 2 s a reply\n")


def test_a_server_that_comes_up_late_is_found():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    chat = ChatModel(f"http://127.0.0.1:{port}/v1", "any", patience=10.0, backoff=0.05)
    with ThreadPoolExecutor(1) as pool:
        reply = pool.submit(chat.reply, QUESTION)
        time.sleep(0.2)
        with ChatServer(lambda messages: ANSWER, port=port):
            assert reply.result() == (ANSWER, True)
    assert chat.usage["retries"] >= 1


def test_waits_double():
    _, _, server = ask(["http_500"] * 3, backoff=0.1)
    gaps = [after.time - before.time for before, after in zip(server.seen, server.seen[1:])]
    assert all(wait <= gap < 1.5 * wait + SLACK for wait,
               gap in zip((0.1, 0.2, 0.4), gaps, strict=True))


@pytest.mark.parametrize("status, wait", [
    pytest.param(429, lambda: 1, id="seconds"),
    pytest.param(503, lambda: formatdate(time.time() + 2, usegmt=True), id="date", marks=pytest.mark.thorough)])
def test_retry_after_is_honoured_as_seconds_and_as_a_date(status, wait):
    reply, _, server = ask([lambda handler,
                            good: refuse(status, Retry_After=wait())(handler, good)])
    first, second = server.seen
    assert reply == (ANSWER, True) and 1.0 <= second.time - first.time < 3.0 + SLACK


@pytest.mark.parametrize("wait", ["0", "-1", "soon", "²", "", "Thu, 01 Jan 1970 00:00:00 GMT",
                                  "Thu, 99 Foo 99999 99:99:99 GMT", "9" * 3 + " " * 60_000 + "1",
                                  "1,2"])
def test_a_wait_that_is_past_or_unreadable_is_our_own(wait):
    start = time.monotonic()
    assert ask([refuse(429, Retry_After=wait)])[0] == (ANSWER, True)
    assert time.monotonic() - start < SLACK


@pytest.mark.parametrize("wait", ["3600", "9" * 400, "Fri, 31 Dec 9999 23:59:59 GMT"])
def test_nobody_waits_past_the_patience(wait):
    start = time.monotonic()
    failure, _, server = ask(always(refuse(429, Retry_After=wait)))
    assert isinstance(failure, ApiRefused)
    assert "gives no reply for model any: http_429 (Try again later.)" in str(failure)
    assert time.monotonic() - start < SLACK and len(server.seen) == 2  # the second is the probe


# ---- errors that stay ----------------------------------------------------------------------------

@pytest.mark.parametrize("body, message", [
    ({"error": {"message": "too long", "code": 1}}, "too long"),
    ({"object": "error", "message": "too long"}, "too long"),
    ({"detail": "too long"}, "too long"), ({"error": "too long"}, "too long"),
    ([{"error": {"message": "too long"}}], "too long"),
    ({"detail": [{"msg": "too long"}]}, '{"detail": [{"msg": "too long"}]}'), ([], "[]"),
    ({"error": {"message": 7}}, "7"), ([7], "[7]"), (b"<b>too</b>\n long", "<b>too</b> long"),
    (b"a\x1b[31m\x00\xff\r\nb", "a [31m \ufffd b"), ({"error": {"message": "x" * 9000}}, None),
    (b"[" * 9000, None), (b"", None)])
@pytest.mark.parametrize("status", [400, 403, 413, 422])
def test_what_a_request_did_wrong_is_said_in_the_words_of_the_server(status, body, message):
    failure, chat, _ = ask(for_items(lambda handler, good: send(handler, body, status)))
    assert isinstance(failure, ApiFailed) and chat.usage["requests"] == 2 and chat.unanswered == 0
    if message is not None:
        assert str(failure) == f"http_{status}: {message}"
    assert str(failure).startswith(f"http_{status}") and str(failure).isprintable()
    assert len(str(failure)) <= 310


@pytest.mark.parametrize("status, message", [
    (400, "Invalid model name passed in model=any"), (401, "Incorrect API key"), (402, "No credit"),
    (403, "Not from here"),
    (404, "No such model"), (413, "Too large"), (422, "No such field"),
    (429, "insufficient_quota: no credit left")])
def test_what_would_fail_every_item_is_refused_at_once(status, message):
    failure, chat, server = ask(always(refuse(status, message)))
    assert isinstance(failure, ApiRefused) and chat.usage["requests"] == 2
    # and the probe alone finds it
    with ChatServer(lambda messages: ANSWER, always(refuse(status, message))) as server:
        with pytest.raises(ApiRefused) as failure:
            ChatModel(server.url, "any").check()
    assert str(failure.value) == (
        f"{server.url} gives no reply for model any: http_{status} ({message}); check --api (it "
        "ends in /v1 as a rule), --model, OPENAI_API_KEY and the server; the same command goes on")


def test_the_probe_has_the_parameters_of_a_turn_and_learns_which_are_refused():
    with ChatServer(lambda messages: ANSWER, [refuse(400, NO_MAX_TOKENS)]) as server:
        chat = ChatModel(server.url, "o3", max_new_tokens=99)
        chat.check()
    assert [request.body for request in server.seen] == [
        {"model": "o3", "messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 99,
         "temperature": 0.0},
        {"model": "o3", "messages": [{"role": "user", "content": "Say hello."}],
         "max_completion_tokens": 99, "temperature": 0.0}]


@pytest.mark.parametrize("name", [
    "http_500", "closed", "hang",
    *[pytest.param(name, marks=pytest.mark.thorough)
      for name in ("http_429", "garbage", "no_choices")]])
def test_what_fails_for_long_is_the_items_fault_only_if_the_probe_is_answered(name):
    start = time.monotonic()
    options = {"patience": 0.6, "timeout": 0.3 if name == "hang" else 9.0, "backoff": 0.05}
    failure, chat, _ = ask(for_items(name), **options)
    assert isinstance(failure, ApiFailed)
    assert str(failure) == KINDS.get(name, "timeout") and chat.unanswered == 1
    failure, chat, _ = ask(always(name), **options)
    assert isinstance(failure, ApiRefused)
    assert f"gives no reply for model any: {KINDS.get(name, 'timeout')} (" in str(failure)
    assert time.monotonic() - start < 2 * 0.6 + SLACK


def test_a_last_try_that_the_end_cut_short_does_not_hide_the_reason():
    failure, chat, server = ask(["http_500", "hang"], patience=1.0, backoff=0.05)
    assert isinstance(failure, ApiFailed) and str(failure) == "http_500"
    assert [request.body["messages"] == PROBE for request in server.seen] == [False, False, True]


def test_woken_after_its_patience_it_gives_the_reason_it_had(monkeypatch):
    sleep = time.sleep
    monkeypatch.setattr("data.endpoint.time.sleep", lambda seconds: sleep(seconds + 0.6))
    failure, chat, _ = ask(always("http_500"), patience=0.5, backoff=0.05)
    assert isinstance(failure, ApiRefused) and "for model any: http_500 (" in str(failure)


def test_an_answered_item_ends_a_row_of_unanswered_ones():
    def faults(messages):
        return "http_500" if messages[0]["content"] == "bad" else None
    with ChatServer(lambda messages: ANSWER, faults) as server:
        chat = ChatModel(server.url, "any", patience=0.2, backoff=0.05)
        bad, counts = Rollout({"image": None}, [], [], [], opening="bad"), []
        for rollout in (bad, bad, QUESTION, bad):
            try:
                chat.reply(rollout)
            except ApiFailed:
                pass
            counts.append(chat.unanswered)
    assert counts == [1, 2, 0, 1]


def test_an_address_without_v1_is_refused():
    with ChatServer(lambda messages: ANSWER) as server:
        with pytest.raises(ApiRefused, match="it ends in /v1"):
            ChatModel(server.url.removesuffix("/v1"), "any").reply(QUESTION)
        assert ChatModel(server.url + "/", "any").reply(QUESTION) == (ANSWER, True)


@pytest.mark.parametrize("drain", [True, False])
def test_a_payload_that_is_refused_before_its_end_is_no_lost_connection(drain):
    """As proxies do: 413 in the middle of the upload. Without draining, the connection is reset
    under the client's hands."""
    noise = Image.frombytes("RGB", (2000, 1000), random.Random(0).randbytes(6_000_000))
    rollout = Rollout({"image": "a.png"}, [], [], [], opening="Which letter?", pictures=[noise])
    with socket.create_server(("127.0.0.1", 0)) as server:
        def refuse_early():
            client, _ = server.accept()
            client.recv(1000)
            client.sendall(b"HTTP/1.1 413 Too Large\r\nContent-Length: 9\r\n\r\ntoo large")
            client.shutdown(socket.SHUT_WR)
            while drain and client.recv(1 << 16):
                pass
            time.sleep(0.1)
            client.close()
            client, _ = server.accept()  # the probe
            good = json.dumps(completion("Hello.")).encode()
            client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(good), good))
            client.recv(1000)
            client.close()
        thread = threading.Thread(target=refuse_early)
        thread.start()
        with pytest.raises(ApiFailed, match="^http_413: too large$"):
            ChatModel(f"http://127.0.0.1:{server.getsockname()[1]}/v1", "any",
                      patience=5.0).reply(rollout)
        thread.join()


NO_MAX_TOKENS = ("Unsupported parameter: 'max_tokens' is not supported with this model. "
                 "Use 'max_completion_tokens' instead.")
NO_TEMPERATURE = ("Unsupported value: 'temperature' does not support 0 with this model. "
                  "Only the default (1) value is supported.")


def test_a_reasoning_models_parameters_are_learnt_once(capfd):
    """As OpenAI's o1, o3 and gpt-5 word it, one after the other; all later requests are right at
    once."""
    def strict(handler, good):
        sent = server.seen[-1].body
        wrong = NO_TEMPERATURE if "temperature" in sent else None
        wrong = NO_MAX_TOKENS if "max_tokens" in sent else wrong
        return refuse(400, wrong)(handler, good) if wrong else send(handler, good)
    with ChatServer(lambda messages: ANSWER, [strict] * 5) as server:
        # it does not wait
        chat = ChatModel(server.url, "o3", max_new_tokens=99, backoff=60.0, patience=10.0)
        assert [chat.reply(QUESTION) for _ in range(3)] == [(ANSWER, True)] * 3
    names = [sorted(set(request.body) - {"model", "messages"}) for request in server.seen]
    assert names == [["max_tokens", "temperature"], ["max_completion_tokens", "temperature"],
                     *[["max_completion_tokens"]] * 3]
    assert chat.parameters == {"max_completion_tokens": 99} and chat.usage["retries"] == 2
    assert capfd.readouterr().err == (
        f"{server.url}: {NO_MAX_TOKENS}; going on with "
        "{'temperature': 0.0, 'max_completion_tokens': 99}\n"
        f"{server.url}: {NO_TEMPERATURE}; going on with {{'max_completion_tokens': 99}}\n")


def test_threads_learn_parameters_together():
    together = threading.Barrier(8)

    def strict(handler, good):
        is_old = len(server.seen) <= 8
        if is_old:
            together.wait(60)  # all have asked with the old ones before any is answered
        refuse(400,
               NO_MAX_TOKENS + NO_TEMPERATURE)(handler, good) if is_old else send(handler, good)
    with ChatServer(lambda messages: ANSWER,
                    [strict] * 99) as server, ThreadPoolExecutor(8) as pool:
        chat = ChatModel(server.url, "o3", max_new_tokens=99)
        assert list(pool.map(lambda _: chat.reply(QUESTION), range(8))) == [(ANSWER, True)] * 8
    assert chat.parameters == {"max_completion_tokens": 99} and len(server.seen) == 16
    assert all(set(request.body) == {"model", "messages", "max_completion_tokens"}
               for request in server.seen[8:])


@pytest.mark.parametrize("message, asked", [
    (NO_MAX_TOKENS + NO_TEMPERATURE, 2),
    ("'max_tokens' is too large: 99; this model has 64 tokens", 1),
    ("temperature must be at most 2", 1), ("images are not supported", 1)])
def test_an_endpoint_that_refuses_for_ever_is_not_asked_for_ever(message, asked):
    failure, chat, _ = ask(for_items(refuse(400, message)))
    assert str(failure) == f"http_400: {message}" and chat.usage["requests"] == asked + 1


# ---- the key, the address ------------------------------------------------------------------------

def test_without_a_key_none_is_sent(monkeypatch, tmp_path):
    (tmp_path / "netrc").write_text(f"machine 127.0.0.1 login a password {KEY}\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for key in (None, " "):
        if key:
            monkeypatch.setenv("OPENAI_API_KEY", key)
        assert "authorization" not in ask()[2].seen[0].headers


def test_the_key_is_sent_as_a_bearer_and_shown_to_nobody(monkeypatch, capfd):
    """Also not where the server sends it back, in a reply or an error."""
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}\n")
    escaped = b'{"error": {"message": "%s \\u0073%s is wrong"}}' % (b"x" * 285, KEY[1:].encode())
    texts, hidden = [], [lambda handler, good: send(handler, escaped, 400)]
    for faults, reply in ([], f"You are {KEY}."), (hidden, ANSWER), *(
            ([refuse(status, f"{KEY} is wrong")] * 9, ANSWER)
            for status in (400, 401, 404, 422, 429, 500, 503)):
        outcome, chat, server = ask(faults, reply, backoff=0.01 if faults == ["http_500"] else 10.0)
        assert {request.headers["authorization"] for request in server.seen} == {f"Bearer {KEY}"}
        while outcome:  # an error with its causes
            texts.append(repr(outcome))
            outcome = isinstance(outcome, Exception) and (outcome.__cause__ or outcome.__context__)
        texts += [repr(chat), str(chat.usage), str(chat.parameters)]
    assert "('You are [key].', True)" in texts and any("[key] is wrong" in text for text in texts)
    assert KEY[:8] not in "".join([*texts, *capfd.readouterr()])  # neither whole nor cut


def test_a_placeholder_for_a_key_is_no_secret(monkeypatch):
    """As is usual for vLLM; the word may occur in answers."""
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    reply, _, server = ask(reply="<problem> {'none'} </problem>")
    assert reply == ("<problem> {'none'} </problem>",
                     True) and server.seen[0].headers["authorization"] == "Bearer none"


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_refused_and_does_not_get_the_key(monkeypatch, status):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with ChatServer(lambda messages: ANSWER) as other:
        moved = refuse(status, "moved", Location=f"{other.url}/chat/completions")
        failure, _, server = ask(always(moved))
        assert isinstance(failure, ApiRefused) and "check --api" in str(failure)
        assert len(server.seen) == 2 and other.seen == []


@pytest.mark.parametrize("url",
                         ["", "localhost:8000/v1", "ftp://a.example/v1", "http://",
                          "http://a.example:port/v1", "http://[::1/v1"])
def test_an_address_that_cannot_work_is_refused(url):
    with pytest.raises(ValueError, match="^--api: .*; give http://HOST:PORT/v1$"):
        ChatModel(url, "any")


@pytest.mark.parametrize("url", [f"http://{KEY}@a.example/v1", f"http://a:{KEY}@a.example/v1",
                                 f"https://a.example/v1?key={KEY}"])
def test_an_address_with_a_key_in_it_is_refused_unseen(url):
    with pytest.raises(ValueError, match="OPENAI_API_KEY") as error:
        ChatModel(url, "any")
    assert KEY not in str(error.value)


@pytest.mark.parametrize("key", [f"{KEY}\n{KEY}", f"{KEY}é☃"])
def test_an_impossible_key_is_refused_unseen(monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(ValueError, match="OPENAI_API_KEY") as error:
        ChatModel("http://127.0.0.1:1/v1", "any")
    assert KEY not in str(error.value)


# ---- many threads, and the server itself ---------------------------------------------------------

@pytest.mark.thorough
def test_sixteen_threads_under_faults_lose_and_miscount_nothing():
    """400 replies, each to its own question, while 30 % of the requests fail in some way."""
    faults = dict.fromkeys(sorted(set(QUICK) - {"huge"}), 0.3 / (len(QUICK) - 1))
    questions = [Rollout({"image": None}, [], [], [], opening=f"Which is {n}?") for n in range(400)]
    with ChatServer(lambda messages: f"It is {messages[0]['content']}",
                    faults) as server, ThreadPoolExecutor(16) as pool:
        chat = ChatModel(server.url, "any", backoff=0.01)
        replies = list(pool.map(chat.reply, questions))
    assert replies == [(f"It is Which is {n}?", True) for n in range(400)]
    failed = server.failed.total()
    assert 100 < failed < 250 and len(server.failed) > 8
    assert chat.usage == {"requests": 400 + failed, "retries": failed, "prompt_tokens": 4000,
                          "completion_tokens": 2000, "empty": 0,
                          "uncounted": server.failed["no_choices"] + server.failed["other_shape"]}


def test_the_faults_of_a_seed_do_not_hang_on_the_order():
    def failed(order, seed):
        with ChatServer(lambda messages: ANSWER, {"http_500": 0.5}, seed=seed) as server:
            chat = ChatModel(server.url, "any", backoff=0.001)
            for n in order:
                chat.reply(Rollout({"image": None}, [], [], [], opening=str(n)))
            return sorted(request.body["messages"][0]["content"] for request in server.seen)
    assert failed(range(8),
                  seed=1) == failed(reversed(range(8)), seed=1) != failed(range(8), seed=2)


def test_the_server_as_a_command_knows_tasks_by_their_pixels():
    """Every kind of task, two turns each, through the command that the README shows."""
    command = [sys.executable, str(ROOT / "tests" / "chat_server.py"), "--port", "0", "--faults",
               "0.3"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}) as process:
        try:
            url = re.match(r"(http://127.0.0.1:\d+/v1), 30% of the requests fail",
                           process.stdout.readline())[1]
            chat = ChatModel(url, "stand-in", backoff=0.01)
            for task in load_tasks(ROOT / "data" / "offline" / "heldout.json")[::25]:
                picture = tools.open_picture(task["image"])
                opening = task["question"] + instructions("full", task["family"])
                rollout = Rollout(task, [], [], [], pictures=[picture], opening=opening)
                text, _ = chat.reply(rollout)
                rollout.turns.append(Turn(text, tools.parse_action(text), None, "What now?"))
                kinds = {"search": "search", "coding": "code"}
                assert rollout.turns[0].action.kind == kinds[task["family"]]
                answer = tools.parse_action(chat.reply(rollout)[0])
                assert answer == Action("answer", task["answers"][0])
            rollout.pictures[0] = ImageChops.offset(picture, 1)
            assert "unknown" in chat.reply(rollout)[0]
        finally:
            process.terminate()
