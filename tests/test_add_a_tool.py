"""A third tool is one entry of tools.TOOLS: `zoom`, as the README adds it, in real rollouts."""
import json
from itertools import groupby
from pathlib import Path

import pytest
import torch
from PIL import Image

import tools as tools_module
from data.tasks import load_tasks
from model import action_logps, encode_observation
from reward import turn_is_valid
from rollout import Limits, collate, instructions, replay, roll_out, rollout_row
from tools import TOOLS, TOOLS_OFF, Call, CodeTool, SearchTool, ToolResult, Tools, action_tags, parse_action
from train import reward_parts, rollout_metrics

ROOT = Path(__file__).parent.parent
ADDED = '''\
def zoom(call: Call) -> ToolResult:
    box = [min(int(number), 1000) for number in re.findall(r"\\d{1,4}", call.content)]
    if len(box) != 4 or box[0] >= box[2] or box[1] >= box[3] or not call.pictures:
        return ToolResult(False, "Error: zoom takes four numbers", None, "bad_box", 0.0)
    picture = call.pictures[0]  # the task's own
    edges = [number * side / 1000 for number, side in zip(box, picture.size * 2)]
    return ToolResult(True, "", picture.resize(picture.size, box=edges), None, 0.0)


TOOLS["zoom"] = Tool(
    families=("coding",),
    instruction="enlarge a part of it: <zoom> left, top, right, bottom </zoom>, in thousandths of "
                "the image's width and height. The enlarged part comes back;",
    run=lambda tools, calls: [zoom(call) for call in calls])
'''
LIMITS = Limits(max_turns=3, max_new_tokens=96, max_tokens=1024)
RED, GREEN, BLUE, GREY = (200, 0, 0), (0, 200, 0), (0, 0, 200), (90, 90, 90)
THINK = "<think> It is small. </think>\n"
ZOOM = THINK + "<zoom> 500, 0, 1000, 500 </zoom>"  # the upper right quarter
ANSWER = "<think> I see. </think>\n<answer> 7 </answer>"


@pytest.fixture
def zoom():
    """These lines stand in tools.py for the time of a test."""
    exec(ADDED, vars(tools_module))
    yield
    del TOOLS["zoom"], tools_module.zoom


@pytest.fixture(scope="module")
def live():
    with CodeTool(workers=1, timeout=10.0) as code:
        yield Tools(code, SearchTool(f"sqlite:{ROOT}/data/offline/corpus.sqlite"))


def scene(size=(56, 56)):
    """Four quarters: red, green / blue, grey."""
    picture = Image.new("RGB", (2, 2))
    picture.putdata([RED, GREEN, BLUE, GREY])
    return picture.resize(size, Image.NEAREST)


def task(number=1, image=None):
    return {"id": number, "family": "coding", "question": "Read it.", "answers": ["7"],
            "image": image or scene(), "type": []}


def play(policy, tasks, chains, tools, **options):
    """Rollouts of tasks whose turns are recorded: chains[i] is what task number i says."""
    sampler = replay(policy, lambda t: chains[t["id"]])
    return roll_out(policy, tasks, tools, LIMITS, sampler=sampler, **options)[0]


def test_the_readme_adds_this_tool():
    section = (ROOT / "README.md").read_text().partition("## Add a tool")[2].partition("\n## ")[0]
    if not section:
        pytest.skip("the README has no section of this name")
    assert ADDED in section


def test_its_image_is_new_in_the_context_and_none_of_it_is_trained_on(policy, live, zoom):
    [rollout] = play(policy, [task()], {1: [ZOOM, ANSWER]}, live, prompt="full")
    call, answer = rollout.turns
    assert call.action == ("zoom", "500, 0, 1000, 500")
    assert (call.result.ok, call.observation, answer.result) == (True, "The processed image.", None)
    assert (rollout.stop, rollout.answer, len(rollout.images)) == ("answer", "7", 2)
    assert [p.size for p in rollout.pictures] == [(56, 56), (56, 56)]
    assert rollout.pictures[1].getpixel((40, 40)) == GREEN
    marked = zip(rollout.action_mask, rollout.ids)
    runs = [(mask, [i for _, i in run]) for mask, run in groupby(marked, lambda pair: pair[0])]
    (_, prompt), (_, first), (_, observation), (_, last) = runs
    assert [mask for mask, _ in runs] == [0, 1, 0, 1]
    assert "<zoom> left, top, right, bottom </zoom>" in policy.tokenizer.decode(prompt)
    assert policy.tokenizer.decode(first) == f"{ZOOM}<|im_end|>"
    assert policy.tokenizer.decode(last) == f"{ANSWER}<|im_end|>"
    assert observation == encode_observation(policy, "The processed image.", rollout.images[1])
    assert observation.count(policy.image_id) == 4  # 56 x 56: 2 x 2 tokens
    batch = collate(policy, [rollout], [1.0])
    assert int(batch.action_mask.sum()) == len(first) + len(last)
    assert batch.inputs["image_grid_thw"].tolist() == [[1, 4, 4], [1, 4, 4]]
    with torch.no_grad():
        assert action_logps(policy, batch, 1.0)[0].isfinite().all()


def test_the_full_prompt_of_its_family_names_it(zoom):
    coding, search = instructions("full", "coding"), instructions("full", "search")
    assert "then do exactly one of four things:\n- name what is wrong" in coding
    assert "back;\n- enlarge a part of it: <zoom> left, top, right, bottom </zoom>, in" in coding
    assert coding.endswith("comes back;\n- answer as briefly as possible, and end: "
                           "<answer> answer </answer>")
    assert "zoom" not in search and "exactly one of two things" in search
    assert instructions("short", "coding") == instructions("short", "search") == ""


def test_the_prompts_without_it_name_two_and_three_things():
    search, coding = instructions("full", "search"), instructions("full", "coding")
    assert "exactly one of two things" in search and search.count("\n- ") == 2
    assert "exactly one of three things" in coding and coding.count("\n- ") == 3


@pytest.mark.parametrize("text, kind", [
    ("<zoom> 1, 2, 3, 4 </zoom>", "zoom"),
    ("<think> <pan> </think> <zoom> 1 </zoom>", "zoom"),
    ("<code> 1 </code>", "code"),
    ("<pan> 1, 2, 3, 4 </pan>", "invalid"),
    ("<zooms> 1 </zooms>", "invalid"),
    ("<zoom> 1 </zoom><answer> 7 </answer>", "invalid"),
    ("<zoom> <code> 1 </zoom>", "invalid"),
    ("<zoom> 1 </pan>", "invalid"),
    ("<zoom> 1", "invalid"),
])
def test_its_tag_is_an_action_and_unknown_tags_are_not(zoom, text, kind):
    assert parse_action(text).kind == kind


def test_without_the_entry_its_tag_is_unknown(policy, live):
    assert sorted(action_tags()) == ["answer", "code", "problem", "search"]
    [rollout] = play(policy, [task()], {1: [ZOOM, ANSWER]}, live)
    assert (rollout.stop, rollout.answer, len(rollout.turns)) == ("invalid", None, 1)
    assert reward_parts(rollout, "episode") == {"format": 0.0, "accuracy": 0.0, "exact": 0.0}


@pytest.mark.parametrize("content", ["", "1, 2, 3", "500, 0, 500, 500", "0, 900, 1000, 100",
                                     "a, b, c, d", "0 0 0 0", "9" * 40])
def test_what_it_cannot_do_is_an_error_that_the_model_reads(policy, live, zoom, content):
    chain = [f"{THINK}<zoom> {content} </zoom>", ANSWER]
    [rollout] = play(policy, [task()], {1: chain}, live)
    call = rollout.turns[0]
    assert call.observation == "Error: zoom takes four numbers"
    assert (call.result.error, call.result.lost, len(rollout.images)) == ("bad_box", False, 1)
    assert reward_parts(rollout, "episode") == {"format": 1.0, "accuracy": 1.0, "exact": 1.0, "tools": 0.0}


@pytest.mark.parametrize("size", [(56, 56), (28, 28), (1000, 30)])
@pytest.mark.parametrize("box", ["0, 0, 1, 1", "999 999 1000 1000", "0, 0, 9999, 9999",
                                 "(400, 0), (401, 1000)"])
def test_any_box_gives_an_image_of_the_size_of_its_input(zoom, size, box):
    [result] = TOOLS["zoom"].run(Tools(), [Call(box, [scene(size)], {})])
    assert result.ok and result.image.size == size


def test_it_is_off_where_all_tools_are(policy, live, zoom):
    for tools in (Tools(code=live.code), Tools(search=live.search)):
        [rollout] = play(policy, [task()], {1: [ZOOM, ANSWER]}, tools)
        assert rollout.turns[0].observation == "The processed image."
    [rollout] = play(policy, [task()], {1: [ZOOM, ANSWER]}, Tools())
    assert rollout.turns[0].observation == "The tool is switched off."
    assert (rollout.answer, len(rollout.images)) == ("7", 1)


def test_each_call_of_a_turn_goes_to_its_tool(policy, live, zoom):
    says = {1: ZOOM, 2: THINK + "<search> zebra </search>",
            3: THINK + "<code>result = image.transpose(3)</code>",  # by 180 degrees
            4: THINK + "<problem> dark </problem>", 5: THINK + "<zoom> 0, 0, 500, 500 </zoom>"}
    chains = {number: [turn, ANSWER] for number, turn in says.items()}
    rollouts = play(policy, [task(number) for number in says], chains, live)
    assert [r.turns[0].observation for r in rollouts] == [
        "The processed image.", "<information> No results. </information>", "The processed image.",
        "Write the code.", "The processed image."]
    made = [r.pictures[1].getpixel((3, 3)) for r in rollouts if len(r.pictures) == 2]
    assert made == [GREEN, GREY, RED]


def test_rewards_and_metrics_count_it_as_a_tool(policy, live, zoom, tmp_path):
    [rollout] = play(policy, [task()], {1: [ZOOM, THINK + "<zoom> 7 </zoom>", ANSWER]}, live)
    parts = reward_parts(rollout, "episode")
    assert parts == {"format": 1.0, "accuracy": 1.0, "exact": 1.0, "tools": 0.5}
    row = rollout_row(rollout, tmp_path, "0")
    assert [turn["action"] for turn in row["turns"]] == ["zoom", "zoom", "answer"]
    assert Image.open(tmp_path / row["turns"][0]["image"]).getpixel((3, 3)) == GREEN
    row |= {"reward_parts": parts, "reward": 2.0, "advantage": 0.0, "success": 1.0}
    metrics = rollout_metrics([row], parts)
    assert (metrics["valid_turns"], metrics["searches_lost"]) == (1.0, 0)
    assert (metrics["tool_errors"], metrics["reward_tools"]) == (0.5, 0.5)


def test_a_step_may_have_it_as_its_gold_action(policy, live, zoom, tmp_path):
    scene().save(tmp_path / "scene.png")
    row = {"id": 1, "problem": "Read it.", "solution": ZOOM, "gt": "500, 0, 1000, 500",
           "image_path": "scene.png", "type": "crop"}
    (tmp_path / "steps.json").write_text(json.dumps([row]))
    [step] = load_tasks(tmp_path / "steps.json", mode="step")
    assert (step["solution"], step["answers"], step["family"]) == (ZOOM, [], "coding")
    for turn, parts in ((THINK + "<zoom> 1 </zoom>", {"format": 1.0, "code": 1.0}),
                        ("<zoom> 1 </zoom>", {"format": 0.0, "code": 1.0}),
                        (ANSWER, {"format": 1.0, "code": 0.0})):
        [rollout] = play(policy, [step], {1: [turn, ANSWER]}, live)
        assert reward_parts(rollout, "step") == parts


def test_the_format_of_a_turn_knows_the_tags_that_it_is_given():
    asked = "<think> <zoom> </think><answer> 7 </answer>"
    assert turn_is_valid(ZOOM, ["zoom", "answer"]) and not turn_is_valid(ZOOM)
    assert turn_is_valid(asked) and not turn_is_valid(asked, ["zoom", "answer"])
    assert not turn_is_valid("<think> a </think><zoom> 1 </answer>", ["zoom", "answer"])


@pytest.mark.parametrize("made, shown", [
    (Image.new("F", (56, 40)), (56, 40)), (Image.new("CMYK", (56, 40)), (56, 40)), (Image.new("RGB", (6000, 4)), None),
    (Image.new("RGB", (0, 9)), None)], ids=["floats", "CMYK", "a strip", "nothing"])
def test_the_model_is_shown_any_image_in_rgb_or_told_why_not(policy, live, tmp_path, monkeypatch, made, shown):
    """What a tool makes depends on what the model wrote: it must not end a run."""
    made_by_tool = ToolResult(True, "", made, None, 0.0)
    monkeypatch.setitem(TOOLS, "zoom", TOOLS["code"]._replace(run=lambda tools, calls: [made_by_tool] * len(calls)))
    [rollout] = play(policy, [task()], {1: [ZOOM, ANSWER]}, live)
    result = rollout.turns[0].result
    assert rollout_row(rollout, tmp_path, "0")["turns"][0]["ok"] is (shown is not None)
    if shown:
        assert (result.image.size, result.image.mode, len(rollout.images)) == (shown, "RGB", 2)
    else:
        assert (result.error, len(rollout.images)) == ("bad_image", 1)
        assert f"{made.width}x{made.height} pixels" in rollout.turns[0].observation


@pytest.mark.parametrize("results", [None, [], [TOOLS_OFF] * 2])
def test_a_tool_that_does_not_answer_each_call_is_named(policy, live, monkeypatch, results):
    monkeypatch.setitem(TOOLS, "zoom", TOOLS["code"]._replace(run=lambda tools, calls: results))
    with pytest.raises(RuntimeError, match="the tool 'zoom' must return a list of 1 results"):
        play(policy, [task()], {1: [ZOOM, ANSWER]}, live)
