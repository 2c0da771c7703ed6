"""reward.py: scores against values computed by hand and published predictions, and every edge."""
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from reward import (STEP_WEIGHTS, WEIGHTS, episode_reward, exact_match, f1_score, grade,
                    normalize_answer, parse_weights, problem_labels, problem_score, step_reward,
                    turn_is_valid, weighted_sum)

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT.parent / "shared" / "golden"
THINK = "<think> I look. </think>\n"
VALID = THINK + "<answer> Paris </answer>"


# ---------------------------------------------------------------- normalisation, exact match, F1

@pytest.mark.parametrize("text, expected", [
    ("The Eiffel Tower.", "eiffel tower"),
    ("  a   cat\n an  apple\tthe END ", "cat apple end"),
    ("anthem theory", "anthem theory"),  # articles only as whole words
    ("U.S.A.", "usa"),
    ("the-end", "theend"),  # punctuation goes first, and takes the word boundary along
    ("A", ""),
    ("", ""),
    ("“Yes”。", "“yes”。"),
    ("金额: 5 元", "金额 5 元"),
])
def test_squad_normalisation(text, expected):
    assert normalize_answer(text) == expected


@pytest.mark.parametrize("text, expected", [
    ("金额: 5 元。", "金额5元"),
    ("“Yes”， the end！", "yes end"),  # no Chinese in it: articles go, single spaces stay
    ("the 金额 a", "the金额a"),  # Chinese in it: articles stay
    ("网\n咖", "网\n咖"),  # a line break is not a space
    ("５％＋～｡【网】", "５网"),  # full-width forms of ASCII punctuation go, digits stay
    ("「网」—…·", "「网」—…·"),  # not in the released list
])
def test_chinese_normalisation(text, expected):
    assert normalize_answer(text, chinese=True) == expected


@pytest.mark.parametrize("prediction, golds, f1, em", [
    ("Eiffel Tower", ["The Eiffel tower."], 1.0, 1.0),
    ("red car", ["blue car"], 0.5, 0.0),  # 2·1 / (2 + 2)
    ("car", ["red car"], 2 / 3, 0.0),  # 2·1 / (1 + 2)
    ("car car car", ["red car"], 0.4, 0.0),  # 2·1 / (3 + 2): sets meet, lists are counted
    # 2·2 / (4 + 4) = 0.5, were it not an exact match
    ("New York New York", ["New York, New York"], 1.0, 1.0),
    ("New York New York City", ["New York, New York"], 4 / 9, 0.0),
    ("dog", ["red car"], 0.0, 0.0),
    ("dog", ["cat", "dog house", "a dog and a cat"], 2 / 3, 0.0),  # the best gold counts
    ("dog", ["cat", "dog"], 1.0, 1.0),
    (None, ["dog"], 0.0, 0.0),
    (None, [""], 0.0, 0.0),
    ("", ["dog"], 0.0, 0.0),
    ("A", ["A"], 1.0, 1.0),  # normalises to nothing: the plain F1 of the paper is 0
    ("a.", ["A"], 1.0, 1.0),
    ("B", ["A"], 0.0, 0.0),
    ("the", ["A"], 0.0, 0.0),
    ("", ["A"], 0.0, 0.0),
    ("", [""], 0.0, 0.0),
    ("...", ["?!"], 0.0, 0.0),
    ("金额5元", ["金额 5 元"], 0.0, 0.0),  # words: one against three
])
def test_f1_and_exact_match(prediction, golds, f1, em):
    assert f1_score(prediction, golds) == f1
    assert exact_match(prediction, golds) == em


@pytest.mark.parametrize("prediction, golds, f1, em", [
    ("金额5元", ["金额 5 元。"], 1.0, 1.0),
    ("网吧", ["网咖"], 0.5, 0.0),
    ("网网", ["网咖"], 0.5, 0.0),  # 2·1 / (2 + 2)
    ("70%", ["70 元"], 2 * 2 / (2 + 3), 0.0),  # one side Chinese: characters on both
    ("a b", ["b 元"], 2 * 1 / (1 + 2), 0.0),  # no Chinese in "a b": its article goes
    ("x y", ["x元"], 2 * 1 / (3 + 2), 0.0),  # and its space stays, a character
    ("red car", ["blue car"], 0.5, 0.0),  # no Chinese at all: words
    ("A", ["A"], 1.0, 1.0),
    (None, ["网"], 0.0, 0.0),
])
def test_chinese_scores_characters(prediction, golds, f1, em):
    assert f1_score(prediction, golds, chinese=True) == f1
    assert exact_match(prediction, golds, chinese=True) == em


@pytest.mark.parametrize("prediction, gold, chinese, published, fair", [
    # a backslash and an n, read as "foodndirectory"
    ("FOOD DIRECTORY", r"FOOD\nDIRECTORY", True, (0.0, 0.0), (1.0, 1.0)),
    (r"FOOD\nDIRECTORY", "FOOD DIRECTORY", True, (0.0, 0.0), (1.0, 1.0)),
    ("FOOD", r"FOOD\nDIRECTORY", True, (0.0, 0.0), (2 / 3, 0.0)),
    ("FOOD DIRECTORY", "FOOD\nDIRECTORY", True, (1.0, 1.0), (1.0, 1.0)),
    ("网 咖", "网\n咖", True, (2 * 2 / (2 + 3), 0.0), (1.0, 1.0)),  # the line break is a character
    ("网\n咖", r"网\n咖", True, (2 * 2 / (3 + 3), 0.0), (1.0, 1.0)),
    ("A", "A", True, (1.0, 1.0), (1.0, 1.0)),
    ("the", "A", True, (1.0, 1.0), (0.0, 0.0)),
    ("A。", "A", True, (1.0, 1.0), (1.0, 1.0)),
    ("。", "。", True, (1.0, 1.0), (0.0, 0.0)),  # silence, whatever the marks
    ("", "A", True, (1.0, 1.0), (0.0, 0.0)),
    ("Option A", "A", True, (0.0, 0.0), (2 / 3, 0.0)),  # as "Option B" for "B"
    ("Option B", "B", True, (2 / 3, 0.0), (2 / 3, 0.0)),
    ("", "", False, (1.0, 1.0), (0.0, 0.0)),
    ("the", "", False, (1.0, 1.0), (0.0, 0.0)),
    (None, "", False, (0.0, 0.0), (0.0, 0.0)),
    ("New York", "New York, New York", False, (2 * 2 / (2 + 4), 0.0), (2 * 2 / (2 + 4), 0.0)),
])
def test_the_released_rule_and_the_fair_one(prediction, gold, chinese, published, fair):
    assert grade(prediction, [gold], chinese, fair=False) == published
    assert grade(prediction, [gold], chinese) == fair == (f1_score(prediction, [gold], chinese),
                                                          exact_match(prediction, [gold], chinese))


@pytest.mark.parametrize("golds, message", [
    ("Paris", "golds must be a list of at least one answer, got 'Paris'; write ['Paris']"),
    ([], "golds must be a list of at least one answer, got []; write ['answer']"),
])
def test_golds_must_be_a_list(golds, message):
    for scorer in (f1_score, exact_match, grade):
        with pytest.raises(ValueError) as error:
            scorer("Paris", golds)
        assert str(error.value) == message


@pytest.mark.parametrize("name, num_simple, chinese, published", [
    ("mat_coding_3b", 70, True, [(49.78, 40.00), (28.42, 13.08), (35.90, 22.50)]),
    ("mat_search_7b", 75, False, [(71.78, 66.67), (55.77, 44.00), (63.77, 55.33)]),
])
def test_published_predictions_give_the_published_figures(name, num_simple, chinese, published):
    if not GOLDEN.exists():
        pytest.skip("the released predictions do not belong to the project and are not beside it")
    rows = json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))
    for part, expected in zip((rows[:num_simple], rows[num_simple:], rows), published, strict=True):
        golds = [[row["gt"]] if isinstance(row["gt"], str) else row["gt"] for row in part]
        grades = [grade(row["pred_answer"], gold, chinese, fair=False)
                  for row, gold in zip(part, golds, strict=True)]
        figures = [100 * sum(column) / len(part) for column in zip(*grades, strict=True)]
        assert figures == pytest.approx(expected, abs=0.005)  # the paper prints two decimals


def test_an_oracle_reaches_the_known_ceiling_of_mat_coding_and_all_of_it_when_scored_fairly():
    """15 golds with a literal backslash-n cap the released scores at 94.41/92.50.

    That holds even for the golds as they were meant.
    """
    if not GOLDEN.exists():
        pytest.skip("the released predictions do not belong to the project and are not beside it")
    rows = json.loads((GOLDEN / "mat_coding_3b.json").read_text(encoding="utf-8"))
    golds = [row["gt"] for row in rows]
    for fair, ceiling in ((False, (94.41, 92.50)), (True, (100.0, 100.0))):
        grades = [grade(gold[0].replace(r"\n", "\n"), gold, chinese=True, fair=fair)
                  for gold in golds]
        figures = [sum(column) / 2 for column in zip(*grades, strict=True)]
        assert figures == pytest.approx(ceiling, abs=0.005)


# ---------------------------------------------------------------- format

@pytest.mark.parametrize("text", [
    VALID,
    "<think></think><search></search>",
    "<think> a\nb </think>\n\n \t<code>\n```python\nx = 1 < 2 > 0\n```\n</code>",
    THINK + "<problem> {'dark'} </problem>",
    "\n" + VALID + " \n",
    "<think> <b>bold</b> </think><answer> <i>x</i> </answer>",  # other tags are only text
])
def test_valid_turns(text):
    assert turn_is_valid(text)


@pytest.mark.parametrize("text", [
    "",
    "Paris",
    "<answer> Paris </answer>",  # no thought
    "<think> only a thought </think>",
    "<think> open <answer> Paris </answer>",
    "thought </think><answer> Paris </answer>",
    THINK + "<answer> Paris",
    THINK + "Paris </answer>",
    THINK + "<answer> Paris </search>",
    THINK + "</answer> Paris <answer>",
    "</think> a <think><answer> Paris </answer>",
    "so " + VALID,
    VALID + " done",
    THINK + "so <answer> Paris </answer>",
    THINK + THINK,
    THINK + "<think> a </think><answer> Paris </answer>",
    THINK + "<search> a </search><answer> Paris </answer>",
    THINK + "<answer> a </answer><answer> Paris </answer>",
    THINK + "<answer> <answer> Paris </answer>",
    THINK + "<answer> <search> Paris </answer>",
    # the released code lets this pass
    "<think> shall I <search>? </think><answer> Paris </answer>",
    "<think> a <answer> Paris </answer></think>",
    "<answer> a </answer>\n<think> Paris </think>",
    "<Think> a </Think><answer> Paris </answer>",
])
def test_invalid_turns(text):
    assert not turn_is_valid(text)


@pytest.mark.parametrize("tag", ["think", "search", "problem", "code", "answer"])
@pytest.mark.parametrize("slash", ["", "/"])
def test_no_tag_may_stand_in_a_thought_or_an_action(tag, slash):
    assert not turn_is_valid(f"<think> <{slash}{tag}> </think><answer> x </answer>")
    assert not turn_is_valid(f"<think> x </think><answer> <{slash}{tag}> </answer>")


@pytest.mark.parametrize("text", [
    "<think>" * 14_000, "<think></think>" + " " * 100_000,
    "<think>" + "</think> " * 11_000 + "<answer>", "<" * 100_000,
    "<think></think><answer>" + "</" * 50_000, "<think>" + "a " * 50_000,
    "\n" * 100_000 + "<think></think>",
    "<think></think>" + " <answer>" * 11_000, "<think></think><code>" + "</code" * 16_000,
], ids=range(9))
def test_hostile_turns_of_100_kb_take_less_than_a_second(text):
    start = time.perf_counter()
    assert not turn_is_valid(text)
    problem_labels(text)
    f1_score(text, ["Paris"], chinese=True)
    assert time.perf_counter() - start < 1.0


# ---------------------------------------------------------------- problem

@pytest.mark.parametrize("text, expected", [
    ("{'rotation90', 'dark'}", ["dark", "rotation90"]),
    (' ["Dark"] ', ["dark"]),
    ("none", ["none"]),
    ("{'dark', 'dark'}", ["dark"]),
    ("{}", []),
    ("{'dark', 'foggy'}", ["dark", "foggy"]),
    ("__import__('os')", ["__import__", "os"]),  # read, not run
    ("95**97**98", ["95", "97", "98"]),  # evaluated, it would not come to an end
])
def test_problem_labels(text, expected):
    assert problem_labels(text) == expected


@pytest.mark.parametrize("predicted, gold, expected", [
    (["dark"], ["dark"], 1.0),
    (["rotation90", "dark"], ["dark", "rotation90"], 1.0),
    (["rotation90"], ["rotation90", "dark"], 0.5),
    (["rotation180"], ["blur", "rotation180"], 0.5),
    (["dark"], ["rotation90", "dark"], 0.0),  # only the rotation earns half
    (["rotation180"], ["rotation90", "dark"], 0.0),
    (["rotation90", "blur"], ["rotation90", "dark"], 0.0),
    (["rotation90", "dark"], ["rotation90"], 0.0),
    ([], ["rotation90", "dark"], 0.0),
    ([], ["none"], 0.0),
    ([], ["dark", "blur"], 0.0),
    (["rotation90"], ["rotation90", "dark", "blur"], 0.0),
    (["none"], ["none"], 1.0),
])
def test_problem_score(predicted, gold, expected):
    assert problem_score(predicted, gold) == expected


# ---------------------------------------------------------------- episode and step

def test_an_episode_has_format_and_accuracy_only_unless_more_can_be_checked():
    assert episode_reward([VALID], "Paris", ["Paris"]) == {"format": 1.0, "accuracy": 1.0, "exact": 1.0}
    parts = episode_reward([VALID, "oops"], "red car", ["blue car"])
    assert parts == {"format": 0.0, "accuracy": 0.5, "exact": 0.0}
    assert episode_reward([], None, ["Paris"]) == {"format": 0.0, "accuracy": 0.0, "exact": 0.0}
    nothing = {"format": 1.0, "accuracy": 0.0, "exact": 0.0}
    assert episode_reward([VALID], None, ["Paris"], tool_oks=[]) == nothing
    assert episode_reward([VALID], None, ["Paris"], problem="{'dark'}") == nothing


@pytest.mark.parametrize("problem, expected", [("{'rotation90', 'dark'}", 1.0),
                                               ("{'rotation90'}", 0.5), ("{}", 0.0),
                                               (None, 0.0)])
def test_the_problem_part_of_an_episode(problem, expected):
    parts = episode_reward([VALID], "C", ["C"], problem=problem, gold_labels=["rotation90", "dark"])
    assert parts == {"format": 1.0, "accuracy": 1.0, "exact": 1.0, "problem": expected}


@pytest.mark.parametrize("tool_oks, expected", [([True], 1.0), ([False], 0.0),
                                                ([True, False, True, True], 0.75)])
def test_the_tools_part_of_an_episode_is_the_share_that_ran(tool_oks, expected):
    assert episode_reward([VALID], "C", ["C"], tool_oks=tool_oks)["tools"] == expected


@pytest.mark.parametrize("evidence, golds, expected", [
    (["1. Content: It is in PARIS, France."], ["Paris"], 1.0),
    (["nothing", "the new York city."], ["x", "New York"], 1.0),
    (["I know"], ["no"], 0.0),  # whole words
    (["Parisian"], ["Paris"], 0.0),
    ([], ["Paris"], 0.0),
    (["a"], ["A"], 0.0),  # a gold that normalises to nothing is found nowhere
])
def test_the_search_part_of_an_episode_needs_a_gold_in_the_evidence(evidence, golds, expected):
    assert episode_reward([VALID], None, golds, evidence=evidence)["search"] == expected


@pytest.mark.parametrize("kind, content, gold_kind, gold_content, part, expected", [
    ("answer", "red car", "answer", "blue car", "accuracy", 0.5),
    ("answer", "dog", "answer", "red car", "accuracy", 0.0),
    ("search", "capital of France", "search", "France capital of", "search", 1.0),
    ("search", "red car", "search", "blue car", "search", 0.5),
    ("search", "red fast car", "search", "blue car", "search", 0.0),  # 0.4 is below the threshold
    ("code", "anything", "code", "x = 1", "code", 1.0),
    ("problem", "{'rotation90'}", "problem", "{'rotation90', 'dark'}", "problem", 0.5),
    ("problem", "{'dark'}", "problem", "{'dark'}", "problem", 1.0),
    ("answer", "x", "code", "x", "code", 0.0),
    ("code", "x", "answer", "x", "accuracy", 0.0),
    ("search", "dark", "problem", "dark", "problem", 0.0),
    ("answer", "x", "search", "x", "search", 0.0),
    (None, "", "answer", "x", "accuracy", 0.0),
    ("invalid", "x", "search", "x", "search", 0.0),
])
def test_a_step_scores_the_part_of_its_gold_action(kind, content, gold_kind, gold_content, part,
                                                   expected):
    action = (kind, content, gold_kind, gold_content)
    assert step_reward(VALID, *action) == {"format": 1.0, part: expected}
    assert step_reward("x", *action) == {"format": 0.0, part: expected}


def test_golds_replace_the_gold_content_of_an_answer_only():
    for kind, part, expected in (("answer", "accuracy", 1.0), ("search", "search", 0.0)):
        parts = step_reward(VALID, kind, "dog", kind, "cat", golds=["cat", "dog"])
        assert parts[part] == expected


def test_a_step_of_an_unknown_kind_is_refused():
    with pytest.raises(ValueError) as error:
        step_reward(VALID, "answer", "x", "think", "x")
    assert str(error.value) == ("gold_kind 'think' is not an action; "
                                "take one of answer, search, code, problem")


# ---------------------------------------------------------------- weights

def test_an_episode_weighs_format_and_accuracy_alike_and_only_logs_the_rest():
    assert weighted_sum({"format": 1.0, "accuracy": 0.25}) == 1.25
    logged = {"exact": 1.0, "problem": 1.0, "tools": 1.0, "search": 1.0}
    assert weighted_sum({"format": 1.0, "accuracy": 0.5} | logged) == 1.5
    assert weighted_sum({}) == 0.0


def test_a_step_weighs_its_own_part_as_the_format():
    assert [weighted_sum({"format": 1.0, part: 0.5}, STEP_WEIGHTS)
            for part in ("accuracy", "search", "code", "problem")
            ] == [1.5, 1.5, 1.5, 1.5]


@pytest.mark.parametrize("answer, f1, paid", [("small red heron", 1.0, 1.0), ("The small, red heron!", 1.0, 1.0),
                                              ("red heron", 0.8, 0.0), ("heron", 0.5, 0.0), ("owl", 0.0, 0.0),
                                              (None, 0.0, 0.0)])
def test_exact_match_as_the_reward_pays_nothing_for_a_part_of_the_answer(answer, f1, paid):
    parts = episode_reward([VALID], answer, ["small red heron"])
    assert (parts["accuracy"], parts["exact"]) == (f1, paid)
    assert weighted_sum(parts, parse_weights("format=0,accuracy=0,exact=1")) == paid
    assert weighted_sum(parts, parse_weights("accuracy=0,exact=1")) == 1.0 + paid
    assert weighted_sum(parts) == 1.0 + f1  # it is only logged otherwise


def test_a_part_without_a_weight_is_refused():
    with pytest.raises(ValueError) as error:
        weighted_sum({"format": 1.0, "speed": 1.0}, {"format": 1.0, "accuracy": 1.0})
    assert str(error.value) == "no weight for speed; weights are given for format, accuracy"


def test_parse_weights():
    assert parse_weights("format=1,accuracy=2,problem=0.5") == {
        "format": 1.0, "accuracy": 2.0, "exact": 0.0, "problem": 0.5, "tools": 0.0, "search": 0.0}
    assert parse_weights(" accuracy = .5 , tools=-1, ") == {
        "format": 1.0, "accuracy": 0.5, "exact": 0.0, "problem": 0.0, "tools": -1.0, "search": 0.0}
    assert parse_weights("code=0", STEP_WEIGHTS) == {
        "format": 1.0, "accuracy": 1.0, "search": 1.0, "code": 0.0, "problem": 1.0}
    assert parse_weights("") == WEIGHTS == {
        "format": 1.0, "accuracy": 1.0, "exact": 0.0, "problem": 0.0, "tools": 0.0, "search": 0.0}


@pytest.mark.parametrize("text, message", [
    ("speed=1", "unknown reward part 'speed' in 'speed=1'; "
                "take some of format, accuracy, exact, problem, tools, search"),
    ("code=1", "unknown reward part 'code' in 'code=1'; "
               "take some of format, accuracy, exact, problem, tools, search"),
    ("format=1,format=2", "reward part 'format' stands twice in 'format=1,format=2'; give it once"),
    ("format", "weight of 'format' must be a plain number, got ''; write format=1.0"),
    ("format=", "weight of 'format' must be a plain number, got ''; write format=1.0"),
    ("format=nan", "weight of 'format' must be a plain number, got 'nan'; write format=1.0"),
    ("format=1e999", "weight of 'format' must be a plain number, got '1e999'; write format=1.0"),
    ("format=1=2", "weight of 'format' must be a plain number, got '1=2'; write format=1.0"),
])
def test_bad_weights_are_refused(text, message):
    with pytest.raises(ValueError) as error:
        parse_weights(text)
    assert str(error.value) == message


def test_the_module_loads_neither_torch_nor_anything_of_ours():
    names = {"torch", "numpy", "tools", "grpo", "model", "rollout", "evaluate"}
    code = f"import sys, reward; print(sorted({names} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                            check=True)
    assert result.stdout == "[]\n"
