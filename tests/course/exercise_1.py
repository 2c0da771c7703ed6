"""Exercise 1: how alike an answer and the gold answers are."""
from course import Exercise, Rule, Wrong

FILE = "reward.py"
# What docstring and bodies say; each stands in the file once.
IMPORTS = "import string\nfrom collections.abc import"
FORMULA = """\
    otherwise 2·|S_p ∩ S_g| / (|L_p| + |L_g|), with S the sets and L the lists of words, so a
    repeated word costs. chinese=True counts characters where either side has Chinese. fair=False is
    the released evaluation to the letter, for published figures; fair=True mends two faults of it:
"""
BEST = "    return max(_grade(prediction, gold, chinese, fair) for gold in golds)\n"
REFUSED = "isinstance(golds, str) or not golds"
LINE_BREAKS = '        texts = [" ".join(text.replace("\\\\n", " ").split()) for text in texts]\n'
VANISHED = "    if fair and not right:\n"
KEPT = VANISHED + """\
        marks = NO_CHINESE_PUNCTUATION if chinese else NO_PUNCTUATION
        left, right = (text.lower().translate(marks).strip() for text in texts)
"""
EQUAL = "    if left == right and (right or not fair):\n        return 1.0, 1.0\n"
BY_CHARACTER = "by_character = chinese and HAN.search(left + right)"
OVERLAP = "    overlap = len(set(left) & set(right))\n"
F1 = "    f1 = 2 * overlap / (len(left) + len(right)) if overlap else 0.0\n"

COUNTER = (FILE, IMPORTS, "import string\nfrom collections import Counter\n"
                          "from collections.abc import")
MULTISETS = (FILE, OVERLAP, "    overlap = (Counter(left) & Counter(right)).total()\n")

EXERCISE = Exercise(
    number=1, title="F1 and exact match", hours=0.75,
    blanks={FILE: ["grade"]},
    drops={FILE: ["_grade"]},
    rules={
        "released": Rule(
            "The rule of the released code: words in common are counted once, the words of both "
            "sides as often as they stand there.", []),
        "squad": Rule(
            "The F1 of SQuAD's own script: a word in common counts as often as both sides have it.",
            [(FILE, FORMULA, """\
    otherwise 2·|M_p ∩ M_g| / (|M_p| + |M_g|), with M the multisets of words: a word in common
    counts as often as both sides have it, as in SQuAD's own script (arXiv 1606.05250).
    chinese=True counts characters where either side has Chinese. fair=False leaves two faults of
    the released evaluation as they are; fair=True mends them:
"""), COUNTER, MULTISETS]),
        "hotpotqa": Rule(
            "The F1 of HotpotQA's own script: that of SQuAD, but a yes or no is right or wrong.",
            [(FILE, FORMULA, """\
    otherwise 2·|M_p ∩ M_g| / (|M_p| + |M_g|), with M the multisets of words: a word in common
    counts as often as both sides have it. Where one of the normalised texts is "yes", "no" or
    "noanswer" and the other is not the same, F1 is 0. So does HotpotQA's own script (arXiv
    1809.09600). chinese=True counts characters where either side has Chinese. fair=False leaves two
    faults of the released evaluation as they are; fair=True mends them:
"""), COUNTER, MULTISETS, (FILE, EQUAL, EQUAL + """\
    if {left, right} & {"yes", "no", "noanswer"}:
        return 0.0, 0.0
""")]),
        "dice": Rule(
            "Dice's coefficient of two sets: how often a word stands on a side does not matter.",
            [(FILE, FORMULA, """\
    otherwise Dice's coefficient 2·|S_p ∩ S_g| / (|S_p| + |S_g|), with S the sets of words, so that
    a repeated word costs nothing. chinese=True counts characters where either side has Chinese.
    fair=False leaves two faults of the released evaluation as they are; fair=True mends them:
"""), (FILE, OVERLAP, "    left, right = set(left), set(right)\n"
                      "    overlap = len(left & right)\n")]),
    },
    wrong=[
        Wrong("common_words_as_often_as_they_stand_there",
              "the F1 of SQuAD is taken for the released one: figures are not comparable", FILE,
              OVERLAP, "    overlap = sum(min(left.count(word), right.count(word)) "
                       "for word in set(left))\n"),
        Wrong("repeated_words_are_free", "an answer may say every word twice", FILE,
              F1, F1.replace("(len(left) + len(right))", "(len(set(left)) + len(set(right)))")),
        Wrong("precision", "what an answer leaves out costs nothing", FILE,
              F1, F1.replace("2 * overlap / (len(left) + len(right))", "overlap / len(left)")),
        Wrong("recall", "an answer that lists every candidate earns 1", FILE,
              F1, F1.replace("2 * overlap / (len(left) + len(right))", "overlap / len(right)")),
        Wrong("without_normalising", "F1 counts words before they are normalised", FILE,
              BY_CHARACTER, BY_CHARACTER + "\n    left, right = texts"),
        Wrong("exact_is_not_1", 'F1 of "New York, New York" for itself is 0.5', FILE,
              EQUAL + f"    {BY_CHARACTER}\n" + """\
    left, right = (list(side) if by_character else side.split() for side in (left, right))
""" + OVERLAP + F1 + "    return f1, 0.0\n", f"""\
    em = float(left == right and bool(right or not fair))
    {BY_CHARACTER}
    left, right = (list(side) if by_character else side.split() for side in (left, right))
""" + OVERLAP + F1 + "    return f1, em\n"),
        Wrong("gold_inside", "an answer that holds the gold is exact: listing candidates wins",
              FILE, "    if left == right and (right or not fair):\n",
              "    if right in left and (right or not fair):\n"),
        Wrong("first_gold", "only the first spelling of the gold counts", FILE, BEST,
              "    return _grade(prediction, golds[0], chinese, fair)\n"),
        Wrong("mean_over_golds", "more spellings of the gold make an answer worse", FILE, BEST, """\
    grades = [_grade(prediction, gold, chinese, fair) for gold in golds]
    return sum(f1 for f1, _ in grades) / len(golds), max(em for _, em in grades)
"""),
        Wrong("best_exact_match_only", "the F1 is that of the first of the golds with the best "
              "exact match, often the worse one", FILE, BEST, """\
    return max((_grade(prediction, gold, chinese, fair) for gold in golds), key=lambda g: g[1])
"""),
        Wrong("joined_golds", "all golds are one long gold", FILE, BEST,
              '    return _grade(prediction, " ".join(golds), chinese, fair)\n'),
        Wrong("letters_as_golds", "golds of one string are its letters: answers of one letter win",
              FILE, REFUSED, "not golds"),
        Wrong("no_gold_is_wrong", "a task without a gold answer is never noticed", FILE,
              f"    if {REFUSED}:\n", "    if not golds:\n        return 0.0, 0.0\n"
                                       "    if isinstance(golds, str):\n"),
        Wrong("none_is_silence", "no answer is scored as an empty one", FILE,
              "    if prediction is None:\n        return 0.0, 0.0\n",
              '    prediction = prediction or ""\n'),
        Wrong("choice_a_vanishes", 'the choice "A" is an article: nothing can match it', FILE,
              VANISHED, "    if False:\n"),
        Wrong("the_equals_a", 'the answer "the" and silence match the choice "A"', FILE,
              KEPT + EQUAL,
              "    if left == right:\n        return 1.0, 1.0\n"),
        Wrong("silence_for_an_empty_gold", "silence matches an empty gold", FILE,
              "    if left == right and (right or not fair):\n", "    if left == right:\n"),
        Wrong("always_fair", "published figures are not met: fair=False mends the gold A, too",
              FILE, VANISHED, "    if not right:\n"),
        Wrong("never_silent", "published figures are not met: fair=False credits no silence", FILE,
              "    if left == right and (right or not fair):\n",
              "    if left == right and right:\n"),
        Wrong("breaks_always_mended", "fair=False reads the literal line breaks, too", FILE,
              "    if fair:\n", "    if True:\n"),
        Wrong("literal_breaks_stay", "a backslash and an n stay: a gold is out of reach", FILE,
              LINE_BREAKS, LINE_BREAKS.replace('.replace("\\\\n", " ")', "")),
        Wrong("breaks_are_characters", "line breaks within Chinese cost an answer of one line",
              FILE, LINE_BREAKS,
              '        texts = [text.replace("\\\\n", "\\n") for text in texts]\n'),
        Wrong("chinese_by_words", "a Chinese answer is one word: right or wrong", FILE,
              BY_CHARACTER, "by_character = False"),
        Wrong("chinese_gold_only", "characters count only where the gold is Chinese", FILE,
              BY_CHARACTER, "by_character = chinese and HAN.search(right)"),
        Wrong("all_by_characters", "English answers to Chinese tasks are compared by letters",
              FILE, BY_CHARACTER, "by_character = chinese"),
        Wrong("chinese_by_itself", "characters count wherever a text has Chinese", FILE,
              BY_CHARACTER, "by_character = HAN.search(left + right)"),
        Wrong("chinese_flag_lost", "normalising does not know of Chinese: its marks stay", FILE,
              "(normalize_answer(text, chinese) for", "(normalize_answer(text) for"),
    ],
)
