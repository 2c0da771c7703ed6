"""Exercise 2, the action and the form of a turn: examples by hand, and an oracle that reads one tag after another."""
import itertools
import random
import signal

import pytest

import tools

KINDS = ("search", "code", "problem", "answer")
THOUGHT = "<think> I look. </think>\n"
SECONDS = 1.0  # of user time; reading 200,000 characters once or twice takes a hundredth of it


# ---- the oracle: a list of pieces, each a tag or a text between tags

def pieces_of(text: str, names: tuple[str, ...]) -> list[tuple[str, str, str]]:
    """(what it is, its name, as it is written): "open" and "close" for tags of these names, else "text"."""
    pieces, start, place = [], 0, 0
    while place < len(text):
        for name, (what, mark) in itertools.product(names, (("open", "<{}>"), ("close", "</{}>"))):
            written = mark.format(name)
            if text[place:place + len(written)] == written:
                if place > start:
                    pieces.append(("text", "", text[start:place]))
                pieces.append((what, name, written))
                place += len(written)
                start = place
                break
        else:
            place += 1
    return pieces + [("text", "", text[start:])] * (start < len(text))


def expected_action(text: str, rule: str) -> tuple[str, str]:
    """Without code, whose fences are given."""
    thoughts = ("think", "thought") if rule == "two_names" else ("think",)
    pieces = pieces_of(text, thoughts)
    ends = [place for place, (what, _, _) in enumerate(pieces) if what == "close"]
    if ends:
        pieces = pieces[(ends[-1] if rule == "free_thought" else ends[0]) + 1:]
    turn = "".join(written for _, _, written in pieces)
    pieces = pieces_of(turn, KINDS)
    tags = [place for place, (what, _, _) in enumerate(pieces) if what != "text"]
    if len(tags) < 2 or len(tags) > 2 and rule != "first_action":
        return "invalid", text
    (first, kind, _), (second, closed, _) = pieces[tags[0]], pieces[tags[1]]
    if (first, second) != ("open", "close") or kind != closed:
        return "invalid", text
    return kind, "".join(written for _, _, written in pieces[tags[0] + 1:tags[1]]).strip()


def expected_form(text: str, rule: str, names: tuple[str, ...] = KINDS) -> bool:
    thoughts = ("think", "thought") if rule == "two_names" else ("think",)
    pieces = [piece for piece in pieces_of(text, thoughts + names) if piece[0] != "text" or piece[2].strip()]
    if rule == "free_thought":
        ends = [place for place, piece in enumerate(pieces) if piece[:2] == ("close", "think")]
        if not ends or pieces[0][:2] != ("open", "think"):
            return False
        pieces = pieces[:1] + pieces[ends[-1]:]
    tags = []  # of what is read so far: thought and action, each opened and closed
    for what, name, _ in pieces:
        if len(tags) == 4 and rule == "first_action":
            return True
        if what == "text":
            if len(tags) % 2 == 0:
                return False
        elif len(tags) == 4 or what != ("open", "close")[len(tags) % 2]:
            return False
        elif what == "close" and name != tags[-1] or what == "open" and name not in (thoughts, names)[len(tags) // 2]:
            return False
        else:
            tags.append(name)
    return len(tags) == 4


def texts_near_a_turn(rule: str) -> list[str]:
    """Valid turns in which up to two pieces were taken out, put in or replaced; and pieces in any order."""
    rng = random.Random(2)
    pieces = ["<think>", "</think>", "<answer>", "</answer>", "<search>", "</search>", " ", "\n", "a", "b c"]
    pieces += ["<thought>", "</thought>"] * 2 if rule == "two_names" else []
    names = ["think", "thought"] if rule == "two_names" else ["think"]
    texts = ["".join(rng.choices(pieces, k=rng.randint(0, 9))) for _ in range(400)]
    for _ in range(1200):
        name, kind = rng.choice(names), rng.choice(["answer", "search"])
        turn = [f"<{name}>", "a", f"</{name}>", "\n", f"<{kind}>", " b ", f"</{kind}>"]
        for _ in range(rng.randint(0, 2)):
            place = rng.randrange(len(turn))
            turn[place:place + rng.randint(0, 1)] = rng.choices(pieces, k=rng.randint(0, 1))
        texts.append("".join(turn))
    return texts


# ---- parse_action

@pytest.mark.core
def test_each_kind_of_action_with_its_content_stripped(student):
    for kind in KINDS:
        action = student.parse_action(f"<think> I look. </think>\n<{kind}>\n  1 Can\n(473 mL)\t</{kind}>\n")
        assert tuple(action) == (kind, "1 Can\n(473 mL)")
        assert tuple(student.parse_action(f"<{kind}></{kind}>")) == (kind, ""), "an empty content is one"
        assert tuple(student.parse_action(f"So: <{kind}> x <b> </{kind}>. Right?")) == (kind, "x <b>"), "text around it"


def test_of_code_the_fenced_block_is_taken(student):
    for block in ("```python\nx = 1\n```", "Here it is:\n```python\nx = 1\n```\nDone.", "x = 1", "```\nx = 1"):
        assert tuple(student.parse_action(f"{THOUGHT}<code>\n{block}\n</code>")) == ("code", "x = 1"), block
    for kind in ("search", "answer", "problem"):
        fenced = "```python\nx = 1\n```"
        assert tuple(student.parse_action(f"<{kind}>{fenced}</{kind}>")) == (kind, fenced), "only code loses its fence"


def test_an_action_is_sought_behind_the_thought_and_else_in_all_of_the_text(student):
    text = "<think> Perhaps <answer> Rome </answer> </think>"
    assert tuple(student.parse_action(text)) == ("invalid", text)
    text = "<think> <answer> Rome </answer>, or not? </think> <search> capital of Italy </search>"
    assert tuple(student.parse_action(text)) == ("search", "capital of Italy")
    text = "Is <code> needed? No. </think> <answer> Rome </answer>"
    assert tuple(student.parse_action(text)) == ("answer", "Rome"), "where the thought was opened does not matter"
    assert tuple(student.parse_action("<answer> Rome </answer>")) == ("answer", "Rome")
    assert tuple(student.parse_action("<think> I know. <answer> Rome </answer>")) == ("answer", "Rome")


@pytest.mark.core
def test_where_a_thought_ends(student, rule):
    for text in ("<think> a </think> <search> b </search> </think> <answer> c </answer>",
                 "<think> a </think> <answer> b </think> c </answer>",
                 "<think> a </think> <answer> b </answer> </think>",
                 "<thought> <answer> a </answer> </thought> <search> b </search>",
                 "<think> <answer> a </answer> </thought> <search> b </search> </think>"):
        assert tuple(student.parse_action(text)) == expected_action(text, rule), text


def test_two_actions(student, rule):
    for text in ("<answer> a </answer><answer> b </answer>", "<search> a </search>\n<answer> b </answer>",
                 "<search> a </search><answer> b", "<answer> a </answer></answer>", "<answer> a </answer> <search>",
                 "<answer> a </answer> <answer> a </answer>", "<answer> a <search> b </search> c </answer>"):
        assert tuple(student.parse_action(THOUGHT + text)) == expected_action(THOUGHT + text, rule), text


def test_tags_that_are_no_pair_are_invalid_and_the_whole_text_is_kept(student):
    for action in ("", "Rome", "<answer> Rome", "Rome </answer>", "<answer> Rome </search>", "</answer> Rome <answer>",
                   "<answer> Rome <answer>", "</answer> Rome </answer>", "<ANSWER> Rome </ANSWER>",
                   "<reply> Rome </reply>", "< answer> Rome </answer>", "<answer> <search> Rome </answer>",
                   "<answer> <answer> Rome </answer>", "<answer> </search> Rome </answer>",
                   "</search> <answer> Rome </answer>"):
        for text in (action, THOUGHT + action):
            assert tuple(student.parse_action(text)) == ("invalid", text), text


def test_the_tag_of_a_tool_that_is_added_is_an_action(student, monkeypatch):
    text = THOUGHT + "<zoom> 1, 2 </zoom>"
    assert student.parse_action(text)[0] == "invalid", "no tool has this tag yet"
    for module in [tools, *student.modules]:  # in a folder that is graded the code has a table of its own
        table = getattr(module, "TOOLS", None)
        if isinstance(table, dict) and "search" in table:
            monkeypatch.setitem(table, "zoom", tools.TOOLS["search"])
    assert tuple(student.parse_action(text)) == ("zoom", "1, 2")
    assert student.parse_action(text + "<answer> x </zoom>")[0] in ("invalid", "zoom")


# ---- turn_is_valid

@pytest.mark.core
def test_turns_of_the_right_form(student):
    for kind in KINDS:
        for text in (f"<think> I look. </think>\n<{kind}> x </{kind}>", f"<think></think><{kind}></{kind}>",
                     f"\n<think> a\nb </think>\n\n \t<{kind}>\n1 < 2 > 0\n</{kind}> \n",
                     f"<think> <b>bold</b> </think><{kind}> <i>x</i> <{kind} > </{kind}>"):
            assert student.turn_is_valid(text), text


def test_prose_around_thought_and_action(student, rule):
    action = "<answer> Rome </answer>"
    for text in ("So: " + THOUGHT + action, THOUGHT + "so " + action, THOUGHT + action + " Done.",
                 THOUGHT + "." + action, "<b>" + THOUGHT + action):
        assert bool(student.turn_is_valid(text)) == expected_form(text, rule), text


def test_thought_and_action_each_once_and_in_this_order(student, rule):
    for text in ("", "Rome", "<answer> Rome </answer>", "<think> I look. </think>", "<think> a <answer> Rome </answer>",
                 "I look. </think><answer> Rome </answer>", THOUGHT + "<answer> Rome", THOUGHT + "Rome </answer>",
                 THOUGHT + "<answer> Rome </search>", THOUGHT + "</answer> Rome <answer>", THOUGHT + THOUGHT,
                 "</think> a <think><answer> Rome </answer>", "<answer> Rome </answer>" + THOUGHT,
                 THOUGHT + "<search> a </search><answer> Rome </answer>", THOUGHT + "<answer> a </answer>" * 2,
                 THOUGHT + "<answer> a </answer></answer>", THOUGHT + THOUGHT + "<answer> Rome </answer>",
                 "<Think> a </Think><answer> Rome </answer>", "<thought> a </thought><answer> Rome </answer>",
                 "<think> a </thought><answer> Rome </answer>", "<think> <answer> Rome </answer> </think>"):
        assert bool(student.turn_is_valid(text)) == expected_form(text, rule), text


def test_tags_inside_a_thought_or_an_action(student, rule):
    for kind, slash in itertools.product(("think", "thought", *KINDS), ("", "/")):
        for text in (f"<think> <{slash}{kind}> </think><answer> x </answer>",
                     f"<think> x </think><answer> <{slash}{kind}> </answer>",
                     f"<think> <{kind}> </{kind}> </think><answer> x </answer>"):
            assert bool(student.turn_is_valid(text)) == expected_form(text, rule), text


def test_the_callers_tags_are_the_tags(student):
    tags = ["zoom", "answer"]
    assert student.turn_is_valid(THOUGHT + "<zoom> 1 </zoom>", tags)
    assert not student.turn_is_valid(THOUGHT + "<zoom> 1 </zoom>")
    assert not student.turn_is_valid(THOUGHT + "<search> x </search>", tags), "search is only text there"
    assert student.turn_is_valid("<think> <search> </think><answer> </search> </answer>", tags)
    assert not student.turn_is_valid(THOUGHT + "<answer> <zoom> </answer>", tags)


# ---- both

def test_texts_near_a_turn_have_the_action_and_the_form_of_the_rule(student, rule):
    for text in texts_near_a_turn(rule):
        assert tuple(student.parse_action(text)) == expected_action(text, rule), f"action of {text!r}"
        assert bool(student.turn_is_valid(text)) == expected_form(text, rule), f"form of {text!r}"


def test_hostile_texts_of_200_000_characters_take_no_time(student):
    def stop(*_):
        raise TimeoutError

    starts = {"": ["<answer>", "</think><answer>", "<think><answer>", "</answer>", "<"],
              "<think>": ["</think>", "</think><answer>", "a ", "<think>"],
              "<think> </think>": [" ", "\n", "<search></answer>", " <answer>"],
              "<think> </think><answer>": ["</", "</answer", "</answer> "]}
    before = signal.signal(signal.SIGVTALRM, stop)
    try:
        for name in ("parse_action", "turn_is_valid"):
            function = getattr(student, name)
            for text in [start + piece * (200_000 // len(piece)) for start in starts for piece in starts[start]]:
                signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
                function(text)
            for content in ("x " * 50_000 + "x", "<b>" * 30_000):
                text = f"<think>{content}</think><answer>{content}</answer>"
                signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
                assert function(text) in (True, ("answer", content)), f"{name}: a long turn is a turn"
    except TimeoutError:
        pytest.fail(f"{name} takes over {SECONDS} s for {text[:60]!r} and so on: how often is each character read?")
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
