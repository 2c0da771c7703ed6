"""Exercise 2: which action a turn asks for, and whether the turn has the form of one."""
from course import Exercise, Rule, Wrong

TOOLS, REWARD = "tools.py", "reward.py"
# parse_action: what its docstring and body say; each stands in the file once.
BEHIND = "    turn = after if think else text\n"
FIRST = '''\
    """The action of a turn: the only `<tag>…</tag>` of action_tags() behind the first `</think>`.

    Without `</think>` it is sought in all of the text. The content is stripped; of code, the first
    fenced block is taken if there is one. Anything but one opening tag and its closing tag (a third
    tag inside the pair, or an unpaired one) is Action("invalid", text). Linear in the length.
'''
PARTITION = '    _, think, after = text.partition("</think>")\n' + BEHIND
TAGS_FOUND = '''    tags = list(re.finditer(rf"<(/?)({'|'.join(action_tags())})>", turn))\n'''
PAIRED = '''    if [tag[1] for tag in tags] != ["", "/"] or tags[0][2] != tags[1][2]:\n'''
# turn_is_valid, likewise.
FORM = '''\
    """Whether a turn is `<think>…</think>` and then `<tag>…</tag>` with one of the tags.

    Only white space may stand around these, and no `<think>` or tag, opening or closing, inside;
    the released code forbids only the same tag twice, and so lets `<code>` stand in a thought.
    Linear in the length of the text.
    """
'''
SPLIT = '''    pieces = re.split(rf"(</?(?:think|{'|'.join(tags)})>)", text)\n'''
SHAPE = "    # outside, <think>, thought, </think>, outside, <tag>, content, </tag>, outside\n"
OUTSIDE = '    if len(pieces) != 9 or "".join(pieces[0::4]).strip():\n'
NAMED = '    tag = pieces[5].strip("<>")\n'
VALID = ('    return tag in tags and pieces[1::2] == '
         '["<think>", "</think>", f"<{tag}>", f"</{tag}>"]\n')

EXERCISE = Exercise(
    number=2, title="The action and the form of a turn", hours=0.75,
    blanks={TOOLS: ["parse_action"], REWARD: ["turn_is_valid"]},
    drops={TOOLS: [], REWARD: []},
    rules={
        "one_action": Rule(
            "A turn holds one action and no other tag of an action; a thought ends with the first "
            "`</think>`, and a tag in it costs the form, but not the action.", []),
        "two_names": Rule(
            "A thought may stand in `<think>` or in `<thought>`, and ends with the first of their "
            "closing tags.", [
                (TOOLS, FIRST, '''\
    """The action of a turn: the only `<tag>…</tag>` of action_tags() behind the first `</think>` or
    `</thought>`.

    Without either it is sought in all of the text. The content is stripped; of code, the first
    fenced block is taken if there is one. Anything but one opening tag and its closing tag (a third
    tag inside the pair, or an unpaired one) is Action("invalid", text). Linear in the length.
'''),
                (TOOLS, PARTITION,
                 '    turn = re.split("</(?:think|thought)>", text, maxsplit=1)[-1]\n'),
                (REWARD, FORM, '''\
    """Whether a turn is a thought and then `<tag>…</tag>` with one of the tags.

    A thought is `<think>…</think>` or `<thought>…</thought>`. Only white space may stand around
    thought and action, and no tag, nor those of either kind of thought, opening or closing, inside.
    Linear in the length of the text.
    """
'''),
                (REWARD, SPLIT, SPLIT.replace("think|", "think|thought|")),
                (REWARD, NAMED, '''\
    thought, tag = pieces[1].strip("<>"), pieces[5].strip("<>")
'''),
                (REWARD, VALID, '''\
    closed = pieces[1::2] == [f"<{thought}>", f"</{thought}>", f"<{tag}>", f"</{tag}>"]
    return thought in ("think", "thought") and tag in tags and closed
''')]),
        "free_thought": Rule(
            "A thought may hold any text, tags as well, and ends with the last `</think>`.", [
                (TOOLS, FIRST, FIRST.replace("the first `</think>`", "the last `</think>`")),
                (TOOLS, PARTITION, '    turn = text.rpartition("</think>")[2]\n'),
                (REWARD, FORM, '''\
    """Whether a turn is `<think>…</think>` and then `<tag>…</tag>` with one of the tags.

    The thought ends with the last `</think>` and may hold any text, tags as well, so that a policy
    may weigh its tools. Only white space may stand around thought and action, and no `<think>` or
    tag, opening or closing, inside the action. Linear in the length of the text.
    """
'''),
                (REWARD, SPLIT, '''\
    thought, _, action = text.rpartition("</think>")
    # outside, <tag>, content, </tag>, outside
''' + SPLIT.replace(", text)", ", action)")),
                (REWARD, SHAPE, ""),
                (REWARD, OUTSIDE, '''\
    opens = thought.lstrip().startswith("<think>")
    if not opens or len(pieces) != 5 or "".join(pieces[0::4]).strip():
'''),
                (REWARD, NAMED, NAMED.replace("5", "1")),
                (REWARD, VALID,
                 '    return tag in tags and pieces[1::2] == [f"<{tag}>", f"</{tag}>"]\n')]),
        "first_action": Rule(
            "Of several actions the first one counts, and whatever stands behind it is ignored.", [
                (TOOLS, FIRST, '''\
    """The action of a turn: the first `<tag>…</tag>` of action_tags() behind the first `</think>`.

    Whatever stands behind the action is ignored, further actions as well (as in Search-R1, arXiv
    2503.09516). Without `</think>` it is sought in all of the text. The content is stripped; of
    code, the first fenced block is taken if there is one. If the first two tags are not an opening
    tag and its closing tag, or there are none, it is Action("invalid", text). Linear in the length.
'''),
                (TOOLS, PAIRED, PAIRED.replace("tag in tags]", "tag in tags[:2]]")),
                (REWARD, FORM, '''\
    """Whether a turn begins with `<think>…</think>` and then `<tag>…</tag>` with one of the tags.

    Only white space may stand before and between these, and no `<think>` or tag, opening or
    closing, inside. Anything may follow, as `parse_action` ignores it. Linear in the length of the
    text.
    """
'''),
                (REWARD, OUTSIDE, '''\
    if len(pieces) < 9 or (pieces[0] + pieces[4]).strip():
'''),
                (REWARD, VALID, VALID.replace("1::2", "1:8:2"))]),
    },
    wrong=[
        Wrong("last_end_of_a_thought", "a model that writes </think> into its answer loses it",
              TOOLS, 'text.partition("</think>")', 'text.rpartition("</think>")'),
        Wrong("first_of_two", "of two actions the first is played: guessing twice is free", TOOLS,
              "[tag[1] for tag in tags] !=", "[tag[1] for tag in tags[:2]] !="),
        Wrong("last_of_two", "of two actions the last is played", TOOLS, TAGS_FOUND,
              TAGS_FOUND.replace("turn))", "turn))[-2:]")),
        Wrong("outermost_pair", "what stands between the first and the last tag is the action",
              TOOLS, TAGS_FOUND, TAGS_FOUND + "    tags = tags[:1] + tags[1:][-1:]\n"),
        Wrong("any_closing_tag", "an action may end with the tag of another", TOOLS,
              " or tags[0][2] != tags[1][2]:", ":"),
        Wrong("open_end", "an action that was cut off counts", TOOLS, TAGS_FOUND, TAGS_FOUND + '''\
    if len(tags) == 1 and not tags[0][1]:
        return Action(tags[0][2], turn[tags[0].end():].strip())
'''),
        Wrong("any_case", "<ANSWER> counts as <answer>", TOOLS,
              '})>", turn))', '})>", turn, re.IGNORECASE))'),
        Wrong("tags_of_today", "the tags are written out: a tool that is added is never called",
              TOOLS, "{'|'.join(action_tags())}", "search|code|problem|answer"),
        Wrong("not_stripped", "the white space around a content stays: no query hits the cache",
              TOOLS, "tags[1].start()].strip()", "tags[1].start()]"),
        Wrong("fence_stays", "the marks of a fenced block are run as Python", TOOLS,
              '_unfenced(content) if kind == "code" else content', "content"),
        Wrong("all_unfenced", "a search for ```x``` loses its marks, too", TOOLS,
              '_unfenced(content) if kind == "code" else content', "_unfenced(content)"),
        Wrong("invalid_without_thought", "an invalid turn loses its thought", TOOLS,
              'return Action("invalid", text)', 'return Action("invalid", turn)'),
        Wrong("quadratic_action", "a search to the end of the text from each opening tag", TOOLS,
              PAIRED, '''\
    pairs = re.findall(rf"<({'|'.join(action_tags())})>.*?</\\1>", turn, re.DOTALL)
    if len(tags) != 2 or len(pairs) != 1:
'''),
        Wrong("prose_around", "a turn may chat around its thought and its action", REWARD,
              OUTSIDE, "    if len(pieces) != 9:\n"),
        Wrong("prose_between", "a turn may chat between its thought and its action", REWARD,
              "pieces[0::4]", "pieces[0::8]"),
        Wrong("no_white_space", "a line break between thought and action is refused", REWARD,
              '"".join(pieces[0::4]).strip()', '"".join(pieces[0::4])'),
        Wrong("tags_in_a_thought", "the released rule: other tags may stand in a thought", REWARD,
              SPLIT, '''\
    start, _, action = text.partition("</think>")
    start = re.sub(rf"</?(?:{'|'.join(tags)})>", "", start)
    text = start + "</think>" + action
''' + SPLIT),
        Wrong("tags_in_an_action", "an action may hold a thought", REWARD, SPLIT, '''\
    start, end, action = text.partition("</think>")
    text = start + end + re.sub("</?think>", "", action)
''' + SPLIT),
        Wrong("unlike_pair", "an action may be closed by the tag of another", REWARD,
              'f"<{tag}>", f"</{tag}>"]', 'f"<{tag}>", pieces[7]]'),
        Wrong("order", "the action may stand before the thought", REWARD,
              VALID, '''\
    kinds = sorted(piece.strip("</>") for piece in pieces[1::2])
    names = {kinds[0], kinds[-1]} - {"think"}
    return len(names) == 1 and kinds.count("think") == 2 and names <= set(tags)
'''),
        Wrong("own_tags", "the caller's tags are ignored: turns that use an added tool are invalid",
              REWARD, "|{'|'.join(tags)})>)", "|{'|'.join(TAGS)})>)"),
        Wrong("any_tag", "a tag counts as an action, listed or not", REWARD,
              "return tag in tags and", "return"),
        Wrong("quadratic_form", "for each </think> a search to the end of the text", REWARD,
              OUTSIDE, '''\
    form = rf"\\s*<think>.*?</think>\\s*<({'|'.join(tags)})>.*?</\\1>\\s*"
    if not re.fullmatch(form, text, re.DOTALL) or len(pieces) != 9:
'''),
    ],
)
