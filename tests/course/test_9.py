"""Exercise 9: attention in a packed row against loops with a mask of N x N; collate against literal ids; both together
against a plain Hugging Face model that reads every sequence alone."""
import math
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import Qwen2_5_VLForConditionalGeneration

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT)]

import model  # noqa: E402
from model import action_logps, encode_image, encode_observation, encode_prompt, load_policy  # noqa: E402
from rollout import Rollout  # noqa: E402

SEGMENTS = [(3, [2, 4]), (2, [1]), (4, [3, 1, 2])]  # groups of two, one and three; samples of one token
N = sum(prompt + sum(samples) for prompt, samples in SEGMENTS)  # 22
SCALING = 0.4  # not 1/sqrt(d)


# ---- attention -----------------------------------------------------------------------------------


def kinds():
    """(group, sample or -1 for the prompt) of each place of the row."""
    places = []
    for group, (prompt, samples) in enumerate(SEGMENTS):
        places += [(group, -1)] * prompt
        for number, size in enumerate(samples):
            places += [(group, number)] * size
    return places


def mask(options):
    """[i][j]: whether place i sees place j."""
    places, window = kinds(), options.get("window") or N
    sees = [[False] * N for _ in range(N)]
    for i, (group, sample) in enumerate(places):
        for j in range(i + 1):
            other, owner = places[j]
            of_prompt = other == group and owner == -1
            of_itself = other == group and owner == sample
            sees[i][j] = of_prompt or of_itself and i - j < window
    return sees


def slow_attention(query, key, value, options):
    """One token of one head after the other."""
    heads, share, sees = query.shape[1], query.shape[1] // key.shape[1], mask(options)
    rows = []
    for h in range(heads):
        row = []
        for i in range(N):
            seen = [j for j in range(N) if sees[i][j]]
            scores = [SCALING * (query[0, h, i] * key[0, h // share, j]).sum() for j in seen]
            if "sinks" in options:
                scores.append(options["sinks"][h])
            weights = torch.stack(scores).softmax(dim=0)
            row.append(sum(weights[n] * value[0, h // share, j] for n, j in enumerate(seen)))
        rows.append(torch.stack(row))
    return torch.stack(rows)[None]


def random_inputs(heads, key_heads, d=4):
    generator = torch.Generator().manual_seed(heads)
    return [torch.randn(1, n, N, d, generator=generator) for n in (heads, key_heads, key_heads)]


def options_of(rule, heads):
    """What the rule lets attention take, with a value that matters."""
    sinks = torch.linspace(-1.0, 1.5, heads)
    return {"window": {"window": 2}, "sinks": {"sinks": sinks}}.get(rule, {})


@pytest.fixture
def attend(student, rule):
    """attend(query, key, value): the student's, with the rule's option."""
    def call(query, key, value):
        return student.packed_attention(query, key, value, SEGMENTS, SCALING, **options_of(rule, query.shape[1]))
    return call


@pytest.mark.parametrize("heads, key_heads", [(2, 2), (4, 2), (6, 1)])
def test_attention_is_that_of_the_loops(attend, rule, heads, key_heads):
    """Also with fewer key heads than heads: head h reads key head h // (heads / key heads)."""
    inputs = random_inputs(heads, key_heads)
    output = attend(*inputs)
    assert output.shape == (1, heads, N, 4)
    expected = slow_attention(*inputs, options_of(rule, heads))
    off = (output - expected).abs().amax(dim=(0, 1, 3))  # (N,)
    wrong = [(i, *kinds()[i]) for i in range(N) if not off[i] < 1e-5]
    assert not wrong, f"(place, group, sample; -1: prompt) of outputs that are off: {wrong}"


def test_without_its_option_attention_is_plain_and_with_another_value_it_is_another(student, rule):
    others = {"window": [{"window": size} for size in (1, 3, 99)], "sinks": [{"sinks": torch.tensor([9.0, -9.0])}]}
    inputs = random_inputs(2, 2)
    for option in [{}, *others.get(rule, [])]:
        output = student.packed_attention(*inputs, SEGMENTS, SCALING, **option)
        torch.testing.assert_close(output, slow_attention(*inputs, option), atol=1e-5, rtol=0,
                                   msg=lambda m, option=option: f"with {option or 'no option'}: {m}")


def what_moves(attend, j):
    """Which outputs change with key and value of place j."""
    query, key, value = random_inputs(2, 2)
    before = attend(query, key, value)
    changed = torch.zeros(N, 1)
    changed[j] = 1.0
    after = attend(query, key + changed, value - 2 * changed)
    return [i for i in range(N) if (after - before)[0, :, i].abs().max() > 1e-6]


@pytest.mark.core
def test_nobody_sees_another_group_or_another_sample(attend):
    places = kinds()
    for j, (group, sample) in enumerate(places):
        foreign = [i for i in what_moves(attend, j)
                   if places[i][0] != group or sample != -1 and places[i][1] != sample]
        assert not foreign, f"place {j} {places[j]} is seen from {[(i, places[i]) for i in foreign]}"


@pytest.mark.core
def test_nobody_sees_its_future(attend):
    for j in range(N):
        early = [i for i in what_moves(attend, j) if i < j]
        assert not early, f"place {j} is seen from {early}, which stand before it"


def test_a_sample_sees_its_whole_prompt_and_itself(attend):
    places = kinds()
    for j, (group, sample) in enumerate(places):
        moved = what_moves(attend, j)
        assert j in moved, f"place {j} does not see itself"
        if sample == -1:
            blind = [i for i, (other, _) in enumerate(places) if other == group and i > j and i not in moved]
            assert not blind, f"place {j} of a prompt is not seen from {blind}"


def test_gradients_are_those_of_the_loops(attend, student, rule):
    ours, expected = ([x.requires_grad_() for x in random_inputs(4, 2)] for _ in range(2))
    up = torch.randn(1, 4, N, 4, generator=torch.Generator().manual_seed(9))
    (attend(*ours) * up).sum().backward()
    (slow_attention(*expected, options_of(rule, 4)) * up).sum().backward()
    for name, x, y in zip(("query", "key", "value"), ours, expected):
        torch.testing.assert_close(x.grad, y.grad, atol=1e-5, rtol=1e-4, msg=lambda m: f"gradient of {name}: {m}")
    if rule == "sinks":
        sinks = [options_of(rule, 4)["sinks"].requires_grad_() for _ in range(2)]
        inputs = random_inputs(4, 2)
        (student.packed_attention(*inputs, SEGMENTS, SCALING, sinks=sinks[0]) * up).sum().backward()
        (slow_attention(*inputs, {"sinks": sinks[1]}) * up).sum().backward()
        torch.testing.assert_close(sinks[0].grad, sinks[1].grad, atol=1e-5, rtol=1e-4)


# ---- collate -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def policy():
    return load_policy(str(ROOT / "data" / "model"))


def rollout(ids, mask, images=()):
    """Token t of the sequence was sampled with log-prob -t."""
    return Rollout({}, list(ids), list(mask), [-float(t) * is_action for t, is_action in enumerate(mask)], list(images))


def assert_batch(batch, ids, positions, segments, targets, predictors, mask, logps, advantages):
    assert batch.inputs["input_ids"].tolist() == [ids]
    assert batch.inputs["position_ids"].tolist() == [[positions]] * 3  # text: time = height = width
    assert [(prompt, list(samples)) for prompt, samples in batch.segments] == segments
    kept = torch.tensor(mask, dtype=torch.bool)
    assert batch.action_mask.dtype == torch.bool and torch.equal(batch.action_mask, kept)
    assert batch.targets.dtype == torch.int64 and batch.targets.tolist() == targets
    assert batch.predictors.dtype == torch.int64
    assert batch.predictors[kept].tolist() == torch.tensor(predictors)[kept].tolist(), "predictors of action tokens"
    assert batch.sampled_logps.dtype == torch.float32 and batch.sampled_logps.shape == kept.shape
    assert batch.sampled_logps[kept].tolist() == torch.tensor(logps, dtype=torch.float32)[kept].tolist(), "sampled_logps"
    assert batch.advantages.tolist() == advantages and batch.advantages.dtype == torch.float32


@pytest.mark.core
@torch.no_grad()
def test_a_group_of_two_in_literal_ids(student, rule, policy):
    """The example of the docstring; an observation stands in the first sample."""
    rows = [rollout([10, 11, 20, 21, 9], [0, 0, 1, 0, 1]), rollout([10, 11, 30, 9], [0, 0, 1, 1])]
    row = {"window": ([10, 11, 20, 21, 9, 11, 30, 9], [0, 1, 2, 3, 4, 1, 2, 3], [(1, [4, 3])])}.get(
        rule, ([10, 11, 20, 21, 9, 30, 9], [0, 1, 2, 3, 4, 2, 3], [(2, [3, 2])]))
    predictors = {"window": [[1, 2, 3], [5, 6, 0]]}.get(rule, [[1, 2, 3], [1, 5, 0]])
    assert_batch(student.collate(policy, rows, [0.5, -1.5]), *row, [[20, 21, 9], [30, 9, 0]], predictors,
                 [[1, 0, 1], [1, 1, 0]], [[-2, 0, -4], [-2, -3, 0]], [0.5, -1.5])


@torch.no_grad()
def test_groups_of_one_and_samples_of_one_token_in_literal_ids(student, rule, policy):
    rows = [rollout([10, 12, 20, 9], [0, 0, 1, 1]), rollout([11, 13, 14, 9], [0, 0, 0, 1]),
            rollout([11, 13, 14, 30], [0, 0, 0, 1])]
    if rule == "window":
        row = [10, 12, 20, 9, 11, 13, 14, 9, 14, 30], [0, 1, 2, 3, 0, 1, 2, 3, 2, 3], [(1, [3]), (2, [2, 2])]
        predictors = [[1, 2], [6, 0], [8, 0]]
    else:
        row = [10, 12, 20, 9, 11, 13, 14, 9, 30], [0, 1, 2, 3, 0, 1, 2, 3, 3], [(2, [2]), (3, [1, 1])]
        predictors = [[1, 2], [6, 0], [6, 0]]
    assert_batch(student.collate(policy, rows, [1.0, 2.0, 3.0]), *row, [[20, 9], [9, 0], [30, 0]], predictors,
                 [[1, 1], [1, 0], [1, 0]], [[-2, -3], [-3, 0], [-3, 0]], [1.0, 2.0, 3.0])


@torch.no_grad()
def test_equal_prompts_that_are_not_neighbours_in_literal_ids(student, rule, policy):
    rows = [rollout([10, 11, 20, 9], [0, 0, 1, 1]), rollout([10, 12, 40], [0, 0, 1]), rollout([10, 11, 30, 9], [0, 0, 1, 1])]
    row, predictors = {
        "neighbours": (([10, 11, 20, 9, 10, 12, 40, 10, 11, 30, 9], [0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3],
                        [(2, [2]), (2, [1]), (2, [2])]), [[1, 2], [5, 0], [8, 9]]),
        "window": (([10, 11, 20, 9, 10, 12, 40, 10, 11, 30, 9], [0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3],
                    [(1, [3]), (1, [2]), (1, [3])]), [[1, 2], [5, 0], [8, 9]]),
        "sinks": (([10, 11, 20, 9, 30, 9, 10, 12, 40], [0, 1, 2, 3, 2, 3, 0, 1, 2], [(2, [2, 2]), (2, [1])]),
                  [[1, 2], [7, 0], [1, 4]])}[rule]
    assert_batch(student.collate(policy, rows, [1.0, 2.0, 3.0]), *row, [[20, 9], [40, 0], [30, 9]], predictors,
                 [[1, 1], [1, 0], [1, 1]], [[-2, -3], [-2, 0], [-2, -3]], [1.0, 2.0, 3.0])


# ---- with images ---------------------------------------------------------------------------------


def noise(width, height, seed):
    generator = torch.Generator().manual_seed(seed)
    return Image.fromarray(torch.randint(256, (height, width, 3), dtype=torch.uint8, generator=generator).numpy())


@pytest.fixture(scope="module")
def pictured(policy):
    """Two images a and b of one size; rollouts of one question about a (two samples; a tool made an image in each), about
    b (two samples), without an image, and about a again."""
    a, b = (encode_image(policy, noise(84, 56, seed)) for seed in range(2))
    made = [encode_image(policy, noise(56 + 28 * i, 84, 2 + i)) for i in range(3)]
    generator, rows = torch.Generator().manual_seed(0), []
    for image, tool in [(a, made[0]), (a, made[1]), (b, None), (b, made[2]), (None, None), (a, None)]:
        prompt = encode_prompt(policy, "What is on the sign?", image)
        actions = [torch.randint(700, (n,), generator=generator).tolist() + [policy.end_id] for n in (2, 4)]
        seen = encode_observation(policy, "Look.", tool)
        ids = prompt + actions[0] + seen + actions[1]
        mask = [0] * len(prompt) + [1] * 3 + [0] * len(seen) + [1] * 5
        rows.append(rollout(ids, mask, [each for each in (image, tool) if each is not None]))
    return rows


def groups_of(batch):
    return [len(samples) for _, samples in batch.segments]


def test_prompts_with_equal_text_and_other_images_are_not_shared(student, rule, policy, pictured):
    assert pictured[0].ids[:30] == pictured[2].ids[:30]
    batch = student.collate(policy, pictured, [0.0] * 6)
    assert groups_of(batch) == ([3, 2, 1] if rule == "sinks" else [2, 2, 1, 1])


def test_images_stand_in_the_order_of_their_places_in_the_row(student, rule, policy, pictured):
    """A shared prompt brings its image once."""
    batch = student.collate(policy, pictured, [0.0] * 6)
    a, first = pictured[0].images
    _, second = pictured[1].images
    b, third = pictured[3].images
    images = [a, first, second, b, third] + ([] if rule == "sinks" else [a])
    assert batch.inputs["image_grid_thw"].tolist() == [list(image.grid) for image in images]
    assert torch.equal(batch.inputs["pixel_values"], torch.cat([image.pixels for image in images]))
    text = student.collate(policy, pictured[4:5], [0.0])
    assert "pixel_values" not in text.inputs and "image_grid_thw" not in text.inputs


def test_positions_are_those_of_each_sequence_alone(student, policy, pictured):
    """In time, height and width, as Hugging Face counts them."""
    batch = student.collate(policy, pictured, [0.0] * 6)
    row, mask = batch.inputs["position_ids"][:, 0], batch.action_mask  # (3, N)
    assert batch.inputs["position_ids"].shape == (3, 1, batch.inputs["input_ids"].shape[1])
    for b, each in enumerate(pictured):
        alone = positions_alone(policy, each)
        wanted = [alone[:, t - 1].tolist() for t, is_action in enumerate(each.action_mask) if is_action]
        assert row[:, batch.predictors[b][mask[b]]].T.tolist() == wanted, f"of the tokens that predict rollout {b}"


def positions_alone(policy, each):
    ids = torch.tensor([each.ids])
    grids = torch.tensor([image.grid for image in each.images]) if each.images else None
    positions, _ = policy.model.model.get_rope_index(
        ids, (ids == policy.image_id).int(), attention_mask=torch.ones_like(ids), image_grid_thw=grids)
    return positions[:, 0]  # (3, T)


# ---- both together -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain():
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(ROOT / "data" / "model", dtype=torch.float32).eval()


def plain_logps(plain, policy, each):
    """Log-probs of the tokens that were sampled, of one sequence alone, over the ids that can be sampled."""
    ids, vision = torch.tensor([each.ids]), {}
    if each.images:
        vision = {"pixel_values": torch.cat([image.pixels for image in each.images]),
                  "image_grid_thw": torch.tensor([image.grid for image in each.images]),
                  "mm_token_type_ids": (ids == policy.image_id).int()}
    logits = plain(input_ids=ids, use_cache=False, **vision).logits[0].index_fill(1, policy.suppressed, -math.inf)
    log_probs = logits.log_softmax(dim=1)
    return torch.stack([log_probs[t - 1, token] for t, (token, is_action) in enumerate(zip(each.ids, each.action_mask))
                        if is_action])


@pytest.fixture
def scored(student, policy, monkeypatch):
    """scored(rollouts): the (B, T) log-probs of a packed row and its mask, with the student's attention and collate."""
    monkeypatch.setattr(model, "packed_attention", student.packed_attention)

    def score(rollouts):
        batch = student.collate(policy, rollouts, [0.0] * len(rollouts))
        return action_logps(policy, batch, 1.0)[0], batch.action_mask
    return score


@torch.no_grad()
def test_log_probs_are_those_of_a_plain_model_on_each_sequence_alone(scored, policy, plain, pictured):
    logps, mask = scored(pictured)
    for b, each in enumerate(pictured):
        expected = plain_logps(plain, policy, each)
        assert int(mask[b].sum()) == len(expected), f"action tokens of rollout {b}"
        torch.testing.assert_close(logps[b][mask[b]], expected, atol=1e-4, rtol=0,
                                   msg=lambda m, b=b: f"log-probs of rollout {b}: {m}")


def test_gradients_are_those_of_a_plain_model_on_each_sequence_alone(scored, policy, plain, pictured):
    """Each rollout with a weight of its own, so that none can stand for another."""
    policy.model.zero_grad()
    plain.zero_grad()
    logps, _ = scored(pictured)
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0, -1.0, 2.5])
    (logps.sum(dim=1) * weights).sum().backward()
    for weight, each in zip(weights, pictured):
        (weight * plain_logps(plain, policy, each).sum()).backward()
    for (name, p), expected in zip(policy.model.named_parameters(), plain.parameters(), strict=True):
        off = (p.grad - expected.grad).norm() / expected.grad.norm()
        assert off < 1e-3, f"gradient of {name}: relative error {off:.1e}"
    policy.model.zero_grad()
