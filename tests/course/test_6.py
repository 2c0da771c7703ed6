"""Exercise 6: what a turn of the policy and a tool's answer add to the sequence, and when a rollout ends.

Rollouts are played by `roll_out` with the laptop model's tokenizer, recorded turns and a real code tool.
"""
import random
from pathlib import Path

import pytest
import torch
from PIL import Image

import rollout
from model import encode_image, encode_observation, encode_prompt, image_tokens, load_policy
from rollout import Limits, Rollout, roll_out
from tools import CodeTool, Tools

LIMITS = Limits(max_turns=4, max_new_tokens=96, max_tokens=2000, max_images=9)
PROBLEM, SEARCH, ANSWER = "<problem> dark </problem>", "<search> bear </search>", "<answer> 7 </answer>"
READ, WRITE = "from PIL import Image; Image.open('path_to_input_image.jpg')", "save('path_to_output_image.jpg', 'PNG')"
COPY, WIDEN = f"<code>{READ}.{WRITE}</code>", f"<code>{READ}.resize((112, 84)).{WRITE}</code>"
OFF = "<information> The tool is switched off. </information>"


@pytest.fixture(scope="module")
def policy():
    torch.set_num_threads(1)
    return load_policy(str(Path(rollout.__file__).parent / "data" / "model"))


@pytest.fixture(scope="module")
def tools():
    with CodeTool(workers=1, timeout=20.0) as code:
        yield Tools(code)


@pytest.fixture
def play(policy, student, monkeypatch):
    """Play recorded turns as one rollout; a turn is a text, behind which the end token is sampled, or a list of ids."""
    monkeypatch.setattr(rollout, "_append_action", student._append_action)
    monkeypatch.setattr(rollout, "_append_observation", student._append_observation)

    def play(turns, tools=Tools(), limits=LIMITS, picture=None) -> Rollout:
        def sampler(live):
            n = len(live[0].turns)
            assert n < len(turns), f"the rollout must end with turn {len(turns)}, and asked for another one; {limits}"
            ids = sampled(policy, turns[n])
            return [(ids, logps_of(ids, n))]
        [played], _ = roll_out(policy, [task(picture)], tools, limits, sampler=sampler)
        return played
    return play


def task(picture=None):
    return {"id": 1, "family": "search", "question": "Why?", "answers": ["7"], "image": picture, "type": []}


def noise(size=(56, 56)) -> Image.Image:
    return Image.effect_noise(size, 90).convert("RGB")


def plain(policy, text: str) -> list[int]:
    """The text's ids without an end token: a turn that was cut off."""
    return policy.tokenizer(text)["input_ids"]


def sampled(policy, turn: str | list[int]) -> list[int]:
    return plain(policy, turn) + [policy.end_id] if isinstance(turn, str) else list(turn)


def logps_of(ids: list[int], turn: int) -> list[float]:
    """Log-probs that differ from token to token and from turn to turn."""
    return [-(1 + k + 100 * turn) / 64 for k in range(len(ids))]


def spelled(policy, ids: list[int]) -> str:
    return policy.tokenizer.decode(ids)


def user_turn(text: str, image: str = "") -> str:
    """What stands between the end token of an action and the next action."""
    return f"\n<|im_start|>user\n{image}{text}<|im_end|>\n<|im_start|>assistant\n"


def check_in_step(played: Rollout):
    assert len(played.ids) == len(played.action_mask) == len(played.logps), (
        "ids, action_mask and logps stand side by side: they must be equally long")


# ---- actions -------------------------------------------------------------------------------------------------------
@pytest.mark.core
def test_sampled_ids_and_log_probs_are_kept_as_they_were_sampled(policy, play):
    letters = policy.tokenizer.convert_tokens_to_ids(list("<search>bear</search>")) + [policy.end_id]
    assert letters[:-1] != plain(policy, "<search>bear</search>")  # the tokenizer would choose longer pieces
    played = play([letters, letters, ANSWER])
    check_in_step(played)
    actions = [i for i, is_action in enumerate(played.action_mask) if is_action == 1]
    assert [played.ids[i] for i in actions] == letters + letters + sampled(policy, ANSWER), (
        "the tokens with mask 1 are not those that were sampled")
    expected = logps_of(letters, 0) + logps_of(letters, 1) + logps_of(sampled(policy, ANSWER), 2)
    assert [played.logps[i] for i in actions] == expected, "log-probs of action tokens are not those of the sampler"
    assert [turn.text for turn in played.turns] == ["<search>bear</search>"] * 2 + [ANSWER]


def test_the_end_token_is_trained_on_and_is_not_part_of_the_text(policy, play):
    played = play([PROBLEM, ANSWER])
    check_in_step(played)
    assert played.ids[-1] == policy.end_id, "the sequence must end with the end token of the last action"
    ends = [mask for i, mask in zip(played.ids, played.action_mask) if i == policy.end_id]
    # system message, question; action, observation; action
    assert ends == [0, 0, 1, 0, 1], "mask of the end tokens, in their order"
    assert [turn.text for turn in played.turns] == [PROBLEM, ANSWER], "texts of the turns"
    assert [tuple(turn.action) for turn in played.turns] == [("problem", "dark"), ("answer", "7")]


def test_a_turns_text_is_the_whole_of_what_was_sampled_before_its_end(policy, play):
    start = policy.tokenizer.convert_tokens_to_ids("<|im_start|>")
    inner = [*plain(policy, "Hm."), start, *plain(policy, ANSWER), policy.end_id]
    assert play([inner]).turns[0].text == f"Hm.<|im_start|>{ANSWER}", "a turn that has ended"
    cut = plain(policy, "Hm, it is 7")
    assert play([cut]).turns[0].text == "Hm, it is 7", "a turn that was cut off"


# ---- observations --------------------------------------------------------------------------------------------------
@pytest.mark.core
def test_an_observation_is_a_user_turn_behind_the_action_and_not_in_the_loss(policy, play):
    played = play([PROBLEM, SEARCH, ANSWER])
    check_in_step(played)
    prompt = encode_prompt(policy, "Why?", None)
    parts = [(prompt, 0), (sampled(policy, PROBLEM), 1), (encode_observation(policy, "Write the code.", None), 0),
             (sampled(policy, SEARCH), 1), (encode_observation(policy, OFF, None), 0), (sampled(policy, ANSWER), 1)]
    assert spelled(policy, played.ids) == spelled(policy, prompt) + (
        f"{PROBLEM}<|im_end|>{user_turn('Write the code.')}{SEARCH}<|im_end|>{user_turn(OFF)}{ANSWER}<|im_end|>")
    assert played.ids == [i for ids, _ in parts for i in ids], "ids of the sequence"
    assert played.action_mask == [mask for ids, mask in parts for _ in ids], "mask: 1 for sampled tokens alone"
    assert {logp for logp, mask in zip(played.logps, played.action_mask) if not mask} == {0.0}, (
        "what was not sampled has log-prob 0.0")
    assert [turn.observation for turn in played.turns] == ["Write the code.", OFF, None]
    assert [turn.result.error if turn.result else None for turn in played.turns] == [None, "off", None], (
        "a turn keeps the result of its call; a problem has none")


def test_a_picture_of_a_tool_joins_the_older_ones(policy, play, tools):
    original = noise()
    played = play([WIDEN, COPY, ANSWER], tools, picture=original)
    check_in_step(played)
    assert [p.size for p in played.pictures] == [(56, 56), (112, 84), (56, 56)], "pictures, the oldest first"
    assert [image.grid for image in played.images] == [(1, 4, 4), (1, 6, 8), (1, 4, 4)], "encoded images"
    for picture, image in zip(played.pictures, played.images):
        assert torch.equal(image.pixels, encode_image(policy, picture).pixels), "an image is not that of its picture"
    assert played.pictures[0].tobytes() == played.pictures[2].tobytes() == original.tobytes()
    behind = played.ids[played.action_mask.index(1):]
    pads = [f"<|vision_start|>{'<|image_pad|>' * n}<|vision_end|>" for n in (12, 4)]
    assert spelled(policy, behind) == (
        f"{WIDEN}<|im_end|>{user_turn('The processed image.', pads[0])}"
        f"{COPY}<|im_end|>{user_turn('The processed image.', pads[1])}{ANSWER}<|im_end|>"), "the turns, spelled out"
    assert sum(played.action_mask) == sum(len(sampled(policy, turn)) for turn in (WIDEN, COPY, ANSWER)), (
        "number of tokens with mask 1")


# ---- the end of a rollout ------------------------------------------------------------------------------------------
def test_an_answer_ends_the_rollout(policy, play):
    for turns, answer in (([ANSWER], "7"), ([PROBLEM, "<think> 7? </think><answer>\na b </answer>"], "a b"),
                          ([PROBLEM] * 3 + [ANSWER], "7"), (["<answer></answer>"], "")):
        played = play(turns)
        assert (played.stop, played.answer, len(played.turns)) == ("answer", answer, len(turns)), turns
        assert played.turns[-1].observation is None


@pytest.mark.core
@pytest.mark.needs_plain(2)
def test_an_invalid_turn(policy, play, rule):
    for first in ("I do not know.", "<answer> 1 </answer><answer> 2 </answer>"):
        if rule == "note":
            played = play([first, first, ANSWER])
            assert (played.stop, played.answer) == ("answer", "7"), "a rollout goes on behind an invalid turn"
            assert [turn.observation for turn in played.turns] == [rollout.TIP_INVALID] * 2 + [None]
            assert sum(played.action_mask) == sum(len(sampled(policy, turn)) for turn in (first, first, ANSWER))
        else:
            played = play([first])
            assert (played.stop, played.answer) == ("invalid", None), first
            assert (len(played.turns), played.turns[0].observation) == (1, None)
        last = play([PROBLEM] * 3 + [first])
        assert (last.stop, last.answer, len(last.turns)) == ("invalid", None, 4), "in the last turn"


def test_a_turn_that_was_cut_off_before_its_action(policy, play):
    for limits in (LIMITS, Limits(max_turns=1, max_new_tokens=96, max_tokens=2000)):
        for text in ("Hm, it is", "<answer> 7"):
            played = play([plain(policy, text)], limits=limits)
            check_in_step(played)
            assert (played.stop, played.answer, len(played.turns)) == ("length", None, 1), text
            assert played.ids[-3:] == plain(policy, text)[-3:] and played.action_mask[-3:] == [1, 1, 1]


@pytest.mark.core
def test_a_turn_that_was_cut_off_behind_its_action(policy, play, rule):
    if rule == "cut_turns":
        played = play([PROBLEM, plain(policy, ANSWER)])
        assert (played.stop, played.answer) == ("answer", "7"), "an answer of a turn that was cut off"
        goes_on = play([plain(policy, PROBLEM + " Hm"), ANSWER])
        check_in_step(goes_on)
        assert (goes_on.stop, goes_on.turns[0].observation) == ("answer", "Write the code.")
        first = goes_on.action_mask.index(1)
        observed = [policy.end_id, *encode_observation(policy, "Write the code.", None)]
        start = first + len(plain(policy, PROBLEM + " Hm"))
        assert goes_on.ids[start:start + len(observed)] == observed, "what stands behind a turn that was cut off"
        assert goes_on.action_mask[start:start + len(observed)] == [0] * len(observed)
        assert goes_on.logps[start:start + len(observed)] == [0.0] * len(observed)
    else:
        for turns in ([plain(policy, ANSWER)], [PROBLEM, plain(policy, ANSWER)], [plain(policy, PROBLEM)]):
            played = play(turns)
            assert (played.stop, played.answer) == ("length", None), spelled(policy, turns[-1])
            assert (len(played.turns), played.turns[-1].observation) == (len(turns), None)


def test_nothing_is_observed_behind_the_last_turn(policy, play):
    for turns in ([PROBLEM], [PROBLEM, SEARCH]):
        played = play(turns, limits=Limits(max_turns=len(turns), max_new_tokens=96, max_tokens=2000))
        assert (played.stop, played.answer, len(played.turns)) == ("turns", None, len(turns))
        assert played.turns[-1].observation is None and played.turns[-1].result is None
        assert played.ids[-1] == policy.end_id, "something stands behind the last turn"


@pytest.mark.core
def test_an_observation_needs_room_for_itself_and_a_turn(policy, play, tools, rule):
    for calls, picture in (([PROBLEM, SEARCH], None), ([WIDEN], noise())):
        whole = play([*calls, ANSWER], tools, picture=picture)
        end = len(whole.ids) - len(sampled(policy, ANSWER))  # of the last observation
        needed = end - whole.action_mask.index(1) if rule == "behind_prompt" else end
        start = [i for i in range(end) if whole.ids[i] == policy.end_id][-2] + 1  # of it: it has one end token itself
        fits, tight = (Limits(max_new_tokens=60, max_tokens=needed + 60 - missing) for missing in (0, 1))
        played = play([*calls, ANSWER], tools, fits, picture)
        assert (played.stop, played.ids) == ("answer", whole.ids), "an observation that just fits"
        played = play(calls, tools, tight, picture)
        check_in_step(played)
        assert (played.stop, played.answer) == ("length", None), "an observation with a token too many"
        assert played.ids == whole.ids[:start], "what has no room is not appended"
        assert played.turns[-1].observation is None, "it was not read"
        assert len(played.images) == len(played.pictures) == (picture is not None)
        assert played.turns[-1].result is not None, "the turn keeps the result of its call"


def test_an_image_too_many_ends_the_rollout(policy, play, tools, rule):
    own = 0 if rule == "behind_prompt" else 1
    limits = Limits(max_turns=5, max_new_tokens=96, max_tokens=2000, max_images=1 + own)
    played = play([COPY, PROBLEM, COPY], tools, limits, noise())
    check_in_step(played)
    assert (played.stop, played.answer, len(played.turns)) == ("images", None, 3)
    assert len(played.images) == len(played.pictures) == 2, "the last image is not let in"
    assert played.turns[1].observation == "Write the code.", "what brings no image goes on"
    assert played.turns[2].observation is None and played.turns[2].result.ok, "the call is kept, and was not read"
    assert played.ids[-1] == policy.end_id, "something stands behind the last turn"
    without = play([COPY, COPY], tools, Limits(max_turns=5, max_new_tokens=96, max_tokens=2000, max_images=1))
    assert (without.stop, len(without.images)) == ("images", 1), "a task without an image"


def test_the_released_context_begins_anew(policy, play, tools):
    limits = Limits(max_turns=4, max_new_tokens=96, max_tokens=2000, released_context=True)
    played = play([PROBLEM, WIDEN, ANSWER], tools, limits, noise())
    check_in_step(played)
    assert [p.grid for p in played.images] == [(1, 6, 8)], "the newest image alone (see _restart)"
    chain = f"Why?\n{PROBLEM}\nWrite the code.\n{WIDEN}\nThe processed image."
    prompt = encode_prompt(policy, chain, played.images[0])
    assert played.ids == prompt + sampled(policy, ANSWER), "the chain so far stands in one user turn (see _restart)"
    assert sum(played.action_mask) == len(sampled(policy, ANSWER)), "number of tokens with mask 1"


# ---- many rollouts -------------------------------------------------------------------------------------------------
OBSERVED = {  # of each turn: what the policy reads, and the size of the picture that comes with it
    PROBLEM: ("Write the code.", None), "<problem> none </problem>": ("Answer the question.", None),
    SEARCH: (OFF, None), COPY: ("The processed image.", "same"), WIDEN: ("The processed image.", (112, 84))}


def story(policy, rule, limits, prompt, picture, turns):
    """(ids, mask, log-probs, stop, answer, observations, sizes of the pictures) of recorded turns, token by token."""
    row, observations, sizes = [(i, 0, 0.0) for i in prompt], [], [picture.size] if picture else []
    made, note = 0, getattr(rollout, "TIP_INVALID", "")
    for n, ids in enumerate(turns, 1):
        row += [(i, 1, logp) for i, logp in zip(ids, logps_of(ids, n - 1))]
        cut = ids[-1] != policy.end_id
        text = spelled(policy, ids if cut else ids[:-1])
        observations.append(None)
        stop, is_answer, is_call = None, text == ANSWER, text in OBSERVED
        if cut and (rule != "cut_turns" or not is_answer and not is_call):
            stop = "length"
        elif is_answer:
            stop = "answer"
        elif not is_call and (rule != "note" or n == limits.max_turns):
            stop = "invalid"
        elif n == limits.max_turns:
            stop = "turns"
        if stop:
            break
        observed, size = OBSERVED.get(text, (note, None))
        size = (picture.size if picture else (28, 28)) if size == "same" else size
        if size and (made if rule == "behind_prompt" else len(sizes)) == limits.max_images:
            stop = "images"
            break
        image = encode_image(policy, Image.new("RGB", size)) if size else None
        new = [policy.end_id] * cut + encode_observation(policy, observed, image)
        left = limits.max_tokens - len(row) + (len(prompt) if rule == "behind_prompt" else 0)
        if left < len(new) + limits.max_new_tokens:
            stop = "length"
            break
        observations[-1] = observed
        row += [(i, 0, 0.0) for i in new]
        if size:
            made += 1
            sizes.append(size)
    ids, mask, logps = map(list, zip(*row))
    return ids, mask, logps, stop, "7" if stop == "answer" else None, observations, sizes


def test_random_rollouts_are_what_their_turns_say(policy, student, tools, rule, monkeypatch):
    monkeypatch.setattr(rollout, "_append_action", student._append_action)
    monkeypatch.setattr(rollout, "_append_observation", student._append_observation)
    rng, stops = random.Random(0), []
    for _ in range(12):
        limits = Limits(max_turns=rng.randint(1, 5), max_new_tokens=rng.randint(40, 90),
                        max_tokens=rng.randint(180, 450), max_images=rng.randint(1, 3))
        tasks, said = [task(None), task(noise()), task(noise((84, 112)))], {}

        def sampler(live):
            rows = []
            for r in live:
                text = rng.choices([*OBSERVED, ANSWER, "Hm."], [3, 1, 2, 4, 2, 1, 2])[0]
                ids = sampled(policy, text)
                if rng.random() < 0.15:
                    ids.pop()
                said.setdefault(id(r), []).append(ids)
                rows.append((list(ids), logps_of(ids, len(r.turns))))
            return rows
        played, _ = roll_out(policy, tasks, tools, limits, group_size=2, sampler=sampler)
        for r in played:
            image = encode_image(policy, r.task["image"]) if r.task["image"] else None
            prompt = encode_prompt(policy, "Why?", image)
            ids, mask, logps, stop, answer, observations, sizes = story(
                policy, rule, limits, prompt, r.task["image"], said[id(r)])
            told = [spelled(policy, ids) for ids in said[id(r)]]
            assert (r.stop, r.answer) == (stop, answer), f"{limits}: {told}"
            assert [turn.observation for turn in r.turns] == observations, f"{limits}: {told}"
            assert r.ids == ids, f"ids; {limits}: {told}"
            assert r.action_mask == mask, f"action_mask; {limits}: {told}"
            assert r.logps == logps, f"logps; {limits}: {told}"
            assert [p.size for p in r.pictures] == sizes and len(r.images) == len(sizes), f"{limits}: {told}"
            assert r.ids.count(policy.image_id) == sum(image_tokens(policy, image) for image in r.images)
            stops.append(stop)
    assert len(set(stops)) > 3  # of five: the test has met them
