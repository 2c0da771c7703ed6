"""Rewards and scores: text in, floats out.

    episode_reward(["<think>…</think><answer>…</answer>"], "Rome", ["Paris"])
                                               -> {"format": 1.0, "accuracy": 0.0, "exact": 0.0}
    weighted_sum({"format": 1.0, "accuracy": 0.5})  -> 1.5

A reward is a dict of named parts, each within 0..1; weights turn it into the number that the policy
is trained on. Sources: "paper" is Visual-ARFT, arXiv 2505.14246; "released code" is the code
published with it. Where the two differ, or we depart from both, the function says so. There is
nothing to run here: train.py and evaluate.py call it.

Left out on purpose: learned rewards; sentence embeddings (data/similarity.py); the released code's
maths verifier for search answers, which credits a matching number anywhere; eval (text is only
matched, never run).
"""
import re
import string
from collections.abc import Mapping, Sequence

# An episode is paid for its form and its answer, 1:1 (paper); its other parts are only logged.
WEIGHTS = {
    "format": 1.0,
    "accuracy": 1.0,
    "exact": 0.0,
    "problem": 0.0,
    "tools": 0.0,
    "search": 0.0,
}
# A step is paid for its form and for the part of its gold action, 1:1 (paper, released code).
STEP_PARTS = {
    "answer": "accuracy",
    "search": "search",
    "code": "code",
    "problem": "problem",
}
STEP_WEIGHTS = dict.fromkeys(["format", *STEP_PARTS.values()], 1.0)
TAGS = tuple(STEP_PARTS)  # of actions; with a tool added, callers pass `tools.action_tags()`
MIN_SIMILARITY = 0.5  # a query less like the gold one earns nothing (released code)

ARTICLES = re.compile(r"\b(?:a|an|the)\b")
HAN = re.compile(r"[\u4e00-\u9fff]")
FULL_WIDTH = "".join(chr(ord(mark) + 0xFEE0) for mark in string.punctuation)
CHINESE_PUNCTUATION = FULL_WIDTH + "。｡、“”‘’《》【】"  # released code
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
NO_CHINESE_PUNCTUATION = str.maketrans("", "", string.punctuation + CHINESE_PUNCTUATION)
NUMBER = re.compile(r"-?(?:[0-9]+\.?[0-9]*|\.[0-9]+)")


def normalize_answer(text: str, chinese: bool = False) -> str:
    """SQuAD normalisation: lower case, no ASCII punctuation, no articles a/an/the, single spaces.

    chinese=True (MAT-Coding) also strips Chinese punctuation, and in a text with Chinese removes
    the spaces instead of the articles. Line breaks then stay and count as characters, as in the
    released evaluation.
    """
    text = text.lower().translate(NO_CHINESE_PUNCTUATION if chinese else NO_PUNCTUATION)
    if chinese and HAN.search(text):
        return text.replace(" ", "")
    return " ".join(ARTICLES.sub(" ", text).split())


def grade(prediction: str | None, golds: Sequence[str], chinese: bool = False, fair: bool = True
          ) -> tuple[float, float]:
    """(F1, exact match) of an answer, each within 0..1 and the best over golds.

    No answer, None, gets (0.0, 0.0). Exact match: the normalised texts are equal; F1 is then 1, and
    otherwise 2·|S_p ∩ S_g| / (|L_p| + |L_g|), with S the sets and L the lists of words, so a
    repeated word costs. chinese=True counts characters where either side has Chinese. fair=False is
    the released evaluation to the letter, for published figures; fair=True mends two faults of it:
    - 15 golds of MAT-Coding hold a backslash and an n where a line break was meant, and line breaks
      in Chinese (2 golds) count as characters: a one-line answer can never match. Fair: both are
      white space.
    - Where normalising leaves nothing of a gold (the choice "A" is an article), the answers "the"
      and "" equal it. Fair: both sides keep their articles then, for F1 too, and an empty gold
      matches nothing, so that silence is not credited.
    Raises ValueError if golds is empty or a bare string.
    """
    if isinstance(golds, str) or not golds:
        raise ValueError(f"golds must be a list of at least one answer, got {golds!r}; "
                         f"write [{golds or 'answer'!r}]")
    if prediction is None:
        return 0.0, 0.0
    return max(_grade(prediction, gold, chinese, fair) for gold in golds)


def exact_match(prediction: str | None, golds: Sequence[str], chinese: bool = False) -> float:
    """The fair exact match of `grade`, 1.0 or 0.0."""
    return grade(prediction, golds, chinese)[1]


def f1_score(prediction: str | None, golds: Sequence[str], chinese: bool = False) -> float:
    """The fair F1 of `grade`.

    The released *training* reward does not force 1.0 on an exact match: "A" for "A" earns 0 there,
    "New York, New York" for itself 0.5; here both earn 1.
    """
    return grade(prediction, golds, chinese)[0]


def _grade(prediction: str, gold: str, chinese: bool, fair: bool) -> tuple[float, float]:
    """`grade` against one gold."""
    texts = [prediction, gold]
    if fair:
        texts = [" ".join(text.replace("\\n", " ").split()) for text in texts]
    left, right = (normalize_answer(text, chinese) for text in texts)
    if fair and not right:
        marks = NO_CHINESE_PUNCTUATION if chinese else NO_PUNCTUATION
        left, right = (text.lower().translate(marks).strip() for text in texts)
    if left == right and (right or not fair):
        return 1.0, 1.0
    by_character = chinese and HAN.search(left + right)
    left, right = (list(side) if by_character else side.split() for side in (left, right))
    overlap = len(set(left) & set(right))
    f1 = 2 * overlap / (len(left) + len(right)) if overlap else 0.0
    return f1, 0.0


def turn_is_valid(text: str, tags: Sequence[str] = TAGS) -> bool:
    """Whether a turn is `<think>…</think>` and then `<tag>…</tag>` with one of the tags.

    Only white space may stand around these, and no `<think>` or tag, opening or closing, inside;
    the released code forbids only the same tag twice, and so lets `<code>` stand in a thought.
    Linear in the length of the text.
    """
    pieces = re.split(rf"(</?(?:think|{'|'.join(tags)})>)", text)
    # outside, <think>, thought, </think>, outside, <tag>, content, </tag>, outside
    if len(pieces) != 9 or "".join(pieces[0::4]).strip():
        return False
    tag = pieces[5].strip("<>")
    return tag in tags and pieces[1::2] == ["<think>", "</think>", f"<{tag}>", f"</{tag}>"]


def problem_labels(text: str) -> list[str]:
    """The distinct labels of a problem action, sorted: "{'rotation90', 'dark'}" -> ["dark", …].

    Every word counts, known as a label or not: prose around the right label makes it wrong.
    """
    return sorted(set(re.findall(r"\w+", text.lower())))


def problem_score(predicted_labels: Sequence[str], gold_labels: Sequence[str]) -> float:
    """1.0 for equal labels; 0.5 if only the rotation is named of a rotation and one other label.

    From the released code; the paper defines no reward for this action. Anything else is 0.0.
    """
    predicted, gold = sorted(predicted_labels), sorted(gold_labels)
    if predicted == gold:
        return 1.0
    rotations = [label for label in gold if label.startswith("rotation")]
    is_half = len(gold) == 2 and len(rotations) == 1 and predicted == rotations
    return 0.5 if is_half else 0.0


def episode_reward(turns: Sequence[str], answer: str | None, golds: Sequence[str], *,
                   problem: str | None = None, gold_labels: Sequence[str] | None = None,
                   tool_oks: Sequence[bool] | None = None, evidence: Sequence[str] | None = None,
                   tags: Sequence[str] = TAGS) -> dict[str, float]:
    """Score a whole episode by named parts, each within 0..1.

        format    1 if there is a turn and all are valid              always
        accuracy  F1 of the final answer (paper)                      always
        exact     1 if it is an exact match (the paper's ablation)    always
        problem   problem_score of the first problem action           if gold_labels is given
        tools     share of the tool calls that ran without error      if there was a call
        search    1 if a search result holds a gold answer            if evidence is given

    `problem` is None where no problem was named, which earns 0; `evidence` has the texts of search
    results. The paper rewards single turns; whole episodes and the last two parts are ours. Raises
    ValueError as f1_score does.
    """
    is_valid = bool(turns) and all(turn_is_valid(text, tags) for text in turns)
    parts = {"format": float(is_valid), "accuracy": f1_score(answer, golds),
             "exact": exact_match(answer, golds)}
    if gold_labels is not None:
        labels = problem_labels(problem or "")  # none if no problem was named
        parts["problem"] = problem_score(labels, gold_labels) if labels else 0.0
    if tool_oks:
        parts["tools"] = sum(tool_oks) / len(tool_oks)
    if evidence is not None:
        parts["search"] = _found(golds, evidence)
    return parts


def _found(golds: Sequence[str], evidence: Sequence[str]) -> float:
    """1.0 if a gold stands in the evidence as whole words: "no" is not found in "know"."""
    texts = [f" {normalize_answer(text)} " for text in evidence]
    normalized = filter(None, map(normalize_answer, golds))
    return float(any(f" {gold} " in text for gold in normalized for text in texts))


def step_reward(text: str, kind: str | None, content: str, gold_kind: str, gold_content: str, *,
                golds: Sequence[str] | None = None,
                similarity: float | None = None,
                min_similarity: float = MIN_SIMILARITY,
                tags: Sequence[str] = TAGS) -> dict[str, float]:
    """Score one action against the gold action of its step, as the released code does.

    The parts are "format" and the one of the gold action's kind:

        answer   -> accuracy  F1 against golds, or against gold_content without them
        search   -> search    how alike the two queries are, 0 below min_similarity
        problem  -> problem   problem_score
        code     -> code      1 for any code block: its content is not supervised (paper)
        a tool of your own    as code

    `text` is the whole turn, `kind` and `content` its action; an action of another kind than
    gold_kind earns 0. `similarity` is the cosine of the queries' sentence embeddings (paper,
    released code); without it, the F1 of their words is taken. The released code pays 0.9 for code,
    even to a turn without any. Raises ValueError for an unknown gold_kind.
    """
    if gold_kind not in tags:
        raise ValueError(f"gold_kind {gold_kind!r} is not an action; take one of {', '.join(tags)}")
    if kind != gold_kind:
        value = 0.0
    elif kind == "answer":
        value = f1_score(content, golds or [gold_content])
    elif kind == "search":
        likeness = f1_score(content, [gold_content]) if similarity is None else similarity
        value = likeness if likeness >= min_similarity else 0.0
    elif kind == "problem":
        value = problem_score(problem_labels(content), problem_labels(gold_content))
    else:
        value = 1.0
    part = STEP_PARTS.get(gold_kind, "code")
    return {"format": float(turn_is_valid(text, tags)), part: value}


def weighted_sum(parts: Mapping[str, float], weights: Mapping[str, float] = WEIGHTS) -> float:
    """The reward that the policy is trained on: Σ weight · part.

    Raises ValueError for a part without a weight.
    """
    if unknown := set(parts) - set(weights):
        raise ValueError(f"no weight for {', '.join(sorted(unknown))}; "
                         f"weights are given for {', '.join(weights)}")
    return sum(weights[name] * value for name, value in parts.items())


def parse_weights(text: str, defaults: Mapping[str, float] = WEIGHTS) -> dict[str, float]:
    """Weights out of "accuracy=2,problem=0.5"; parts that are not named keep their default.

    Raises ValueError for a part that is unknown or named twice, and for a weight that is no plain
    number.
    """
    named = {}
    for pair in filter(str.strip, text.split(",")):
        name, _, value = map(str.strip, pair.partition("="))
        if name not in defaults:
            raise ValueError(f"unknown reward part {name!r} in {text!r}; "
                             f"take some of {', '.join(defaults)}")
        if name in named:
            raise ValueError(f"reward part {name!r} stands twice in {text!r}; give it once")
        if not NUMBER.fullmatch(value):
            raise ValueError(f"weight of {name!r} must be a plain number, got {value!r}; "
                             f"write {name}=1.0")
        named[name] = float(value)
    return {**defaults, **named}
