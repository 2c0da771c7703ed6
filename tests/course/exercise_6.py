"""Exercise 6: what an action and an observation add to the sequence, and when a rollout ends."""
from course import Exercise, Rule, Wrong

ACTION_DOC = '''\
    ids keep it. A turn without it was cut off: `stop` becomes "length", and there is no answer,
    even if one can be read; else "answer", "invalid", or "turns" if is_last.
'''
OBSERVATION_DOC = '''\
    """Append a user turn, or end the rollout where that and a whole turn after it have no room.
'''
STOPS = '''\
    if not has_ended:
        rollout.stop = "length"  # cut off in mid-turn: no answer, even if one can be read in it
    elif action.kind == "answer":
        rollout.stop, rollout.answer = "answer", action.content
    elif action.kind == "invalid":
        rollout.stop = "invalid"
    elif is_last:
        rollout.stop = "turns"
'''
IMAGES = '''\
    picture = result.image if result else None
    if picture and len(rollout.images) >= limits.max_images:
        rollout.stop = "images"
        return
'''
ENCODED = '''\
    image = encode_image(policy, picture) if picture else None
    ids = encode_observation(policy, text, image)
'''
ROOM = '''\
    if len(rollout.ids) + len(ids) + limits.max_new_tokens > limits.max_tokens:
        rollout.stop = "length"
        return
    turn.observation = text
'''
RESTARTED = '''\
    if limits.released_context:
        _restart(policy, rollout, image)
        return
'''
APPENDED = '''\
    rollout.ids += ids
    rollout.action_mask += [0] * len(ids)
    rollout.logps += [0.0] * len(ids)
    if image is not None:
        rollout.images.append(image)
        rollout.pictures.append(picture)
'''

BEHIND_PROMPT = [
    ("rollout.py", "max_tokens: int = 8192  # prompt, actions and observations together",
     "max_tokens: int = 8192  # of actions and observations; of a prompt and one turn"),
    ("rollout.py", "max_images: int = 6  # in the context, the prompt's included",
     "max_images: int = 6  # that tools made; the prompt's own does not count"),
    ("rollout.py", OBSERVATION_DOC, OBSERVATION_DOC + '''
    Budgets count what stands behind the prompt, as verl's response_length does: max_tokens bounds
    actions and observations together, max_images the images that tools made in this rollout.
'''),
    ("rollout.py", IMAGES, '''\
    picture = result.image if result else None
    made = sum(bool(each.result and each.result.image) for each in rollout.turns)  # this one too
    if picture and made > limits.max_images:
        rollout.stop = "images"
        return
'''),
    ("rollout.py", ROOM, '''\
    used = len(rollout.ids) - len(prompt_of(policy, rollout).ids)
    if used + len(ids) + limits.max_new_tokens > limits.max_tokens:
        rollout.stop = "length"
        return
    turn.observation = text
'''),
]
NOTE = [
    ("rollout.py", 'TIP_NONE = "Answer the question."',
     'TIP_NONE = "Answer the question."\nTIP_INVALID = "That was not one action. Try again."'),
    ("rollout.py", '(None, _tip(action.content)) if action.kind == "problem" else None',
     '(None, _tip(action)) if action.kind in ("problem", "invalid") else None'),
    ("rollout.py", "    A problem is answered with a tip, and with no result.",
     "    A problem and an invalid turn are answered with a tip, and with no result."),
    ("rollout.py", '''\
def _tip(labels: str) -> str:
    return TIP_NONE if "none" in re.findall(r"\\w+", labels.lower()) else TIP_REPAIR
''', '''\
def _tip(action: Action) -> str:
    if action.kind == "invalid":
        return TIP_INVALID
    return TIP_NONE if "none" in re.findall(r"\\w+", action.content.lower()) else TIP_REPAIR
'''),
    ("rollout.py", ACTION_DOC, '''\
    ids keep it. A turn without it was cut off: `stop` becomes "length", and there is no answer,
    even if one can be read; else "answer", or, if is_last, "invalid" or "turns". An invalid turn
    that is not the last one ends nothing: the policy is told and tries again, as in Search-R1
    (arXiv 2503.09516, algorithm 1).
'''),
    ("rollout.py", STOPS, '''\
    if not has_ended:
        rollout.stop = "length"  # cut off in mid-turn: no answer, even if one can be read in it
    elif action.kind == "answer":
        rollout.stop, rollout.answer = "answer", action.content
    elif is_last:
        rollout.stop = "invalid" if action.kind == "invalid" else "turns"
'''),
]
CUT_TURNS = [
    ("rollout.py", ACTION_DOC, '''\
    ids keep it. A turn that was cut off, without it, is read like any other:
    what counts is the pair of tags, as in Search-R1 (arXiv 2503.09516). `stop` becomes "answer",
    "invalid" ("length" where the turn was cut off), or "turns" if is_last.
'''),
    ("rollout.py", STOPS, '''\
    if action.kind == "answer":
        rollout.stop, rollout.answer = "answer", action.content
    elif action.kind == "invalid":
        rollout.stop = "invalid" if has_ended else "length"
    elif is_last:
        rollout.stop = "turns"
'''),
    ("rollout.py", OBSERVATION_DOC, OBSERVATION_DOC + '''
    Behind a turn that was cut off, the end token that it lacks comes first. It was not sampled, so
    it is part of the observation: of its room, and of its mask.
'''),
    ("rollout.py", ENCODED, ENCODED + '''\
    if rollout.ids[-1] != policy.end_id:
        ids = [policy.end_id] + ids
'''),
]

EXERCISE = Exercise(
    number=6, title="Action and observation join the sequence", hours=1.5,
    blanks={"rollout.py": ["_append_action", "_append_observation"]},
    drops={"rollout.py": []},
    rules={
        "whole_turn": Rule(
            "An observation needs room for itself and a whole turn within max_tokens; the prompt "
            "counts, its image too. A turn that is cut off or invalid ends the rollout.", []),
        "behind_prompt": Rule(
            "max_tokens and max_images count what stands behind the prompt: actions and "
            "observations, and images that tools made.", BEHIND_PROMPT),
        "note": Rule(
            "An invalid turn does not end the rollout unless it is the last one: the policy reads "
            "a note and tries again.", NOTE),
        "cut_turns": Rule(
            "A turn that was cut off is read like any other; the end token that it lacks begins "
            "the observation behind it.", CUT_TURNS),
    },
    wrong=[
        Wrong("end_dropped", "the end token is left out of the sequence: nothing ever ends a turn",
              "rollout.py", '''\
    rollout.ids += ids
    rollout.action_mask += [1] * len(ids)
    rollout.logps += logps
    has_ended = ids[-1:] == [policy.end_id]
''', '''\
    has_ended = ids[-1:] == [policy.end_id]
    rollout.ids += ids[:len(ids) - has_ended]
    rollout.action_mask += [1] * (len(ids) - has_ended)
    rollout.logps += logps[:len(ids) - has_ended]
'''),
        Wrong("end_in_text", "rewards and pages read <|im_end|> behind every turn", "rollout.py",
              "policy.tokenizer.decode(ids[:-1] if has_ended else ids)",
              "policy.tokenizer.decode(ids)"),
        Wrong("last_token_lost", "a turn that was cut off loses its last token in its text",
              "rollout.py", "policy.tokenizer.decode(ids[:-1] if has_ended else ids)",
              "policy.tokenizer.decode(ids[:-1])"),
        Wrong("special_tokens_skipped", "a turn's text hides special tokens in its middle",
              "rollout.py", "policy.tokenizer.decode(ids[:-1] if has_ended else ids)",
              "policy.tokenizer.decode(ids, skip_special_tokens=True).strip()"),
        Wrong("action_logps_lost", "the sampled log-probs are not those that were sampled",
              "rollout.py", "    rollout.logps += logps\n",
              "    rollout.logps += [0.0] * len(ids)\n"),
        Wrong("answer_of_a_cut_turn", "a turn that was cut off gives an answer", "rollout.py",
              '''\
    if not has_ended:
        rollout.stop = "length"  # cut off in mid-turn: no answer, even if one can be read in it
    elif action.kind == "answer":
        rollout.stop, rollout.answer = "answer", action.content
''', '''\
    if action.kind == "answer":
        rollout.stop, rollout.answer = "answer", action.content
    elif not has_ended:
        rollout.stop = "length"
'''),
        Wrong("answer_kept_of_a_cut_turn", "the stop is length, and yet there is an answer",
              "rollout.py", '''\
        rollout.stop = "length"  # cut off in mid-turn: no answer, even if one can be read in it
''', '''\
        rollout.stop = "length"
        rollout.answer = action.content if action.kind == "answer" else None
'''),
        Wrong("cut_turns_are_invalid", "a turn that was cut off is counted as invalid",
              "rollout.py", STOPS, '''\
    if action.kind == "invalid":
        rollout.stop = "invalid"
    elif not has_ended:
        rollout.stop = "length"
    elif action.kind == "answer":
        rollout.stop, rollout.answer = "answer", action.content
    elif is_last:
        rollout.stop = "turns"
'''),
        Wrong("empty_answer_goes_on", "an empty answer is taken for none", "rollout.py",
              '    elif action.kind == "answer":\n',
              '    elif action.kind == "answer" and action.content:\n'),
        Wrong("invalid_goes_on", "an invalid turn does not end the rollout", "rollout.py",
              '    elif action.kind == "invalid":\n        rollout.stop = "invalid"\n', ""),
        Wrong("turns_first", "an answer in the last turn is lost", "rollout.py", STOPS, '''\
    if not has_ended:
        rollout.stop = "length"
    elif is_last:
        rollout.stop = "turns"
    elif action.kind == "answer":
        rollout.stop, rollout.answer = "answer", action.content
    elif action.kind == "invalid":
        rollout.stop = "invalid"
'''),
        Wrong("last_turn_goes_on", "the tools answer the last turn, and nothing reads it",
              "rollout.py", '    elif is_last:\n        rollout.stop = "turns"\n', ""),
        Wrong("text_of_the_answer", "the answer keeps its tags", "rollout.py",
              'rollout.stop, rollout.answer = "answer", action.content',
              'rollout.stop, rollout.answer = "answer", text'),
        Wrong("observation_logps_missing", "log-probs no longer stand beside their tokens",
              "rollout.py", "    rollout.logps += [0.0] * len(ids)\n", ""),
        Wrong("observation_logps_not_zero", "an observation has log-probs", "rollout.py",
              "    rollout.logps += [0.0] * len(ids)\n",
              "    rollout.logps += [-1.0] * len(ids)\n"),
        Wrong("header_in_the_loss", "the header of the next turn is trained on", "rollout.py",
              "    rollout.action_mask += [0] * len(ids)\n",
              "    rollout.action_mask += [0] * (len(ids) - 3) + [1] * 3\n"),
        Wrong("tokens_after", "the budget is checked once the observation is in the sequence",
              "rollout.py", ROOM + RESTARTED + APPENDED,
              "    turn.observation = text\n" + RESTARTED + APPENDED + '''\
    if len(rollout.ids) + limits.max_new_tokens > limits.max_tokens:
        rollout.stop = "length"
'''),
        Wrong("no_room_for_a_turn", "an observation leaves no room for the turn behind it",
              "rollout.py", "len(rollout.ids) + len(ids) + limits.max_new_tokens > ",
              "len(rollout.ids) + len(ids) > "),
        Wrong("observation_not_counted", "the observation's own length is not counted",
              "rollout.py", "len(rollout.ids) + len(ids) + limits.max_new_tokens > ",
              "len(rollout.ids) + limits.max_new_tokens > "),
        Wrong("one_token_less", "an observation that just fits is refused", "rollout.py",
              "len(rollout.ids) + len(ids) + limits.max_new_tokens > ",
              "len(rollout.ids) + len(ids) + limits.max_new_tokens >= "),
        Wrong("images_after", "one image too many is let in", "rollout.py",
              "if picture and len(rollout.images) >= limits.max_images:",
              "if picture and len(rollout.images) > limits.max_images:"),
        Wrong("images_checked_later", "an image too many is in the sequence before it is noticed",
              "rollout.py", IMAGES + ENCODED + ROOM + RESTARTED + APPENDED,
              "    picture = result.image if result else None\n" + ENCODED + ROOM + RESTARTED
              + APPENDED + '''\
    if picture and len(rollout.images) > limits.max_images:
        rollout.stop = "images"
'''),
        Wrong("images_unbounded", "images are not counted", "rollout.py", IMAGES,
              "    picture = result.image if result else None\n"),
        Wrong("images_end_every_call", "a full list of images ends rollouts that ask for text",
              "rollout.py", "if picture and len(rollout.images) >= limits.max_images:",
              "if len(rollout.images) >= limits.max_images:"),
        Wrong("image_replaced", "the newest image replaces the others", "rollout.py",
              "        rollout.images.append(image)\n        rollout.pictures.append(picture)\n",
              "        rollout.images[:] = [image]\n        rollout.pictures[:] = [picture]\n"),
        Wrong("image_not_shown", "the image has placeholders, but its pixels are missing",
              "rollout.py", "        rollout.images.append(image)\n", ""),
        Wrong("picture_not_kept", "pictures and images no longer stand side by side", "rollout.py",
              "        rollout.pictures.append(picture)\n", ""),
        Wrong("image_without_placeholders", "the observation has no placeholders for its image",
              "rollout.py", "encode_observation(policy, text, image)\n",
              "encode_observation(policy, text, None)\n"),
        Wrong("result_forgotten", "a call that ends the rollout is not among its calls",
              "rollout.py", "    turn.result = result\n" + IMAGES + ENCODED + ROOM,
              IMAGES + ENCODED + ROOM + "    turn.result = result\n"),
        Wrong("observation_of_the_end", "a turn that ended the rollout has an observation",
              "rollout.py", IMAGES, "    turn.observation = text\n" + IMAGES),
        Wrong("context_not_restarted", "--released_context True does nothing", "rollout.py",
              RESTARTED, ""),
    ],
)
