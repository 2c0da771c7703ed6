"""Exercise 1, F1 and exact match: values by hand, and an oracle that counts words in plain loops."""
import itertools
import random

import pytest

from reward import normalize_answer  # given


def overlap_and_size(left: list[str], right: list[str], rule: str) -> tuple[int, int]:
    """Words in common, and words of both sides, as the rule counts them."""
    if rule == "dice":
        left, right = once(left), once(right)
    common, remaining = 0, once(right) if rule == "released" else list(right)
    for word in once(left) if rule == "released" else left:
        if word in remaining:
            remaining.remove(word)
            common += 1
    return common, len(left) + len(right)


def once(words: list[str]) -> list[str]:
    return [word for place, word in enumerate(words) if word not in words[:place]]


def expected_f1(prediction: str, gold: str, rule: str) -> float:
    """Of texts that normalising leaves something of."""
    left, right = normalize_answer(prediction), normalize_answer(gold)
    if left == right:
        return 1.0
    if rule == "hotpotqa" and any(text in ("yes", "no", "noanswer") for text in (left, right)):
        return 0.0
    common, size = overlap_and_size(left.split(), right.split(), rule)
    return 2 * common / size


def check(student, prediction, golds, wanted: tuple[float, float], **flags) -> None:
    """The grade of an answer, but for rounding."""
    got = tuple(student.grade(prediction, golds, **flags))
    assert got == pytest.approx(wanted, abs=1e-9), f"(F1, exact match) of {prediction!r} for the golds {golds}, {flags}"


@pytest.mark.core
def test_texts_that_are_equal_once_normalised_are_an_exact_match(student):
    for prediction, gold in [("Eiffel Tower", "The Eiffel tower."), (" U.S.A.\n", "usa"), ("an apple", "apple"),
                             ("New York New York", "New York, New York"), ("car car", "the car, a car!")]:
        check(student, prediction, [gold], (1.0, 1.0))
        check(student, prediction, [gold], (1.0, 1.0), fair=False)


@pytest.mark.core
def test_words_in_common(student):
    # 2 · words in common / words of both; no word stands twice, so that every rule agrees.
    for prediction, gold, f1 in [("red car", "blue car", 2 / 4), ("car", "red car", 2 / 3), ("dog", "red car", 0.0),
                                 ("The big, red car", "car (red)", 4 / 5), ("cars", "car", 0.0),
                                 ("eleven", "elev", 0.0), ("it is Rome, I think", "Rome", 2 / 6),
                                 ("red car", "car red", 1.0)]:
        check(student, prediction, [gold], (f1, 0.0))
        check(student, gold, [prediction], (f1, 0.0))


@pytest.mark.core
def test_words_that_stand_twice(student, rule):
    for prediction, gold, f1s in [  # of the rules released, squad and hotpotqa, dice
            ("car car car", "red car", (2 / 5, 2 / 5, 2 / 3)),
            ("red car", "car car car", (2 / 5, 2 / 5, 2 / 3)),
            ("car car", "car car red", (2 / 5, 4 / 5, 2 / 3)),
            ("New York New York City", "New York, New York", (4 / 9, 8 / 9, 4 / 5)),
            ("York New", "New York New York", (4 / 6, 4 / 6, 1.0))]:
        place = {"released": 0, "squad": 1, "hotpotqa": 1, "dice": 2}[rule]
        check(student, prediction, [gold], (f1s[place], 0.0))


def test_texts_drawn_at_random(student, rule):
    rng = random.Random(1)
    words = ["red", "car", "Car,", "blue", "the", "a", "York", "5", "yes", "(no)"]
    for _ in range(500):
        prediction, *golds = [" ".join([*rng.choices(words, k=rng.randint(0, 5)), rng.choice(["red", "car", "yes"])])
                              for _ in range(rng.randint(2, 4))]
        is_exact = any(normalize_answer(prediction) == normalize_answer(gold) for gold in golds)
        best = max(expected_f1(prediction, gold, rule) for gold in golds)
        check(student, prediction, golds, (best, float(is_exact)))


def test_yes_and_no(student, rule):
    for prediction, gold, f1 in [("yes", "Yes, it is", 2 / 4), ("yes it is", "yes", 2 / 4), ("no", "no city", 2 / 3),
                                 ("city", "no", 0.0), ("noanswer", "noanswer at all", 2 / 4)]:
        check(student, prediction, [gold], (0.0 if rule == "hotpotqa" else f1, 0.0))
    for prediction, gold, f1 in [("yes it is", "no it is", 4 / 6), ("north", "no", 0.0), ("yes 5", "yes 7", 2 / 4)]:
        check(student, prediction, [gold], (f1, 0.0))
    for text in ("yes", "No."):
        check(student, text, [text], (1.0, 1.0))


def test_the_best_gold_counts_wherever_it_stands(student):
    for golds, wanted in [(["cat", "dog house", "a dog and a cat"], (2 / 3, 0.0)), (["cat", "bird"], (0.0, 0.0)),
                          (["cat", "dog", "dog house"], (1.0, 1.0)), (["dog", "The dog!", "dogs"], (1.0, 1.0))]:
        for order in itertools.permutations(golds):
            check(student, "dog", list(order), wanted)
    check(student, "dog", ("cat", "dog"), (1.0, 1.0))  # any sequence


def test_no_answer_earns_nothing(student):
    for golds, chinese, fair in itertools.product((["dog"], [""], ["A"], ["dog", "the"]), (False, True), (False, True)):
        check(student, None, golds, (0.0, 0.0), chinese=chinese, fair=fair)


def test_a_gold_that_is_an_article_can_be_matched_by_itself_only(student):
    for chinese in (False, True):
        for prediction, golds in [("A", ["A"]), ("a.", ["A"]), ("The", ["the"]), ("A", ["B", "A"])]:
            check(student, prediction, golds, (1.0, 1.0), chinese=chinese)
        for prediction, golds in [("the", ["A"]), ("B", ["A"]), ("A", ["B"]), ("an", ["A", "the"])]:
            check(student, prediction, golds, (0.0, 0.0), chinese=chinese)
        check(student, "Option A", ["A"], (2 / 3, 0.0), chinese=chinese)


def test_silence_is_never_credited(student):
    for chinese in (False, True):
        for prediction, gold in [("", "dog"), ("", "A"), ("", ""), (" \n", " "), ("...", "?!"), ("the", ""),
                                 ("dog", ""), ("the", "dog"), ("?", "the")]:
            check(student, prediction, [gold], (0.0, 0.0), chinese=chinese)


def test_without_fair_what_vanishes_is_scored_as_released(student):
    for prediction, gold in [("A", "A"), ("the", "A"), ("", "A"), ("", "")]:
        check(student, prediction, [gold], (1.0, 1.0), fair=False)
    for prediction, gold in [("Option A", "A"), ("dog", "A"), ("", "dog")]:
        check(student, prediction, [gold], (0.0, 0.0), fair=False)
    check(student, "Option B", ["B"], (2 / 3, 0.0), fair=False)


def test_line_breaks_are_white_space_if_it_is_fair(student):
    literal = "\\n"  # a backslash and an n
    for prediction, gold, released, fair in [
            ("FOOD DIRECTORY", f"FOOD{literal}DIRECTORY", (0.0, 0.0), (1.0, 1.0)),  # read as "foodndirectory"
            ("FOOD", f"FOOD{literal}DIRECTORY", (0.0, 0.0), (2 / 3, 0.0)),
            ("FOOD DIRECTORY", "FOOD\nDIRECTORY", (1.0, 1.0), (1.0, 1.0)),
            ("网咖", f"网{literal}咖", (4 / 5, 0.0), (1.0, 1.0)),  # an n more
            ("网咖", "网\n咖", (4 / 5, 0.0), (1.0, 1.0)),  # the line break is a character
            ("网吧", "网\n咖", (2 / 5, 0.0), (2 / 4, 0.0))]:
        check(student, prediction, [gold], released, chinese=True, fair=False)
        check(student, prediction, [gold], fair, chinese=True)


def test_with_chinese_characters_are_counted_where_a_side_has_them(student, rule):
    for prediction, gold, f1 in [("网吧", "网咖", 2 / 4), ("咖网", "网咖", 1.0), ("70%", "70 元", 4 / 5), ("70 元", "70%", 4 / 5),
                                 ("网", "中国网", 2 / 4), ("网站。", "【站】长", 2 / 4)]:
        check(student, prediction, [gold], (f1, 0.0), chinese=True)
    check(student, "金额5元", ["金额 5 元。"], (1.0, 1.0), chinese=True)
    for prediction, gold in [("网网", "网咖"), ("网网", "网网吧"), ("金额55元", "5 5 元")]:
        common, size = overlap_and_size(list(prediction), list(gold.replace(" ", "")), rule)
        check(student, prediction, [gold], (2 * common / size, 0.0), chinese=True)


def test_else_words_are_counted(student):
    for prediction, gold, f1 in [("red car", "blue car", 2 / 4), ("abc", "cab", 0.0), ("care", "car", 0.0)]:
        check(student, prediction, [gold], (f1, 0.0), chinese=True)  # no Chinese in them
    for prediction, gold, f1 in [("金额5元", "金额 5 元", 0.0), ("网吧", "网咖", 0.0), ("网 吧", "网 咖", 2 / 4)]:
        check(student, prediction, [gold], (f1, 0.0))  # Chinese, but chinese=False


def test_golds_must_be_a_list_of_at_least_one(student):
    for golds in ("Paris", "P", "", [], ()):
        with pytest.raises(ValueError):
            student.grade("P", golds)
