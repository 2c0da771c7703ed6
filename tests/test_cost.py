"""data/cost.py against real sizes: what the laptop-size model holds, keeps and multiplies."""
import pytest
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2_5_VLForConditionalGeneration

from cost import (Shape, activation_bytes, cache_bytes, forward_operations, num_weights, packed_bytes, peak, published,
                  step_bytes, step_operations, table, text_weights)
from model import encode_image, encode_prompt, load_policy, model_inputs
from rollout import Rollout

STEP = {"micro_batch_tokens": 8192, "batch_tokens": 16384}


@pytest.fixture(scope="module")
def rows(policy):
    """Two rows of equal length, each with an image of 12 x 16 patches: 48 image tokens, three windows and a part of one."""
    image = encode_image(policy, Image.effect_noise((224, 168), 60).convert("RGB"))
    assert image.grid == (1, 12, 16)
    ids = encode_prompt(policy, "What is on the sign? " * 10, image)
    return [Rollout({}, ids, [0] * len(ids), [0.0] * len(ids), [image])] * 2


@pytest.fixture(scope="module")
def inputs(policy, rows):
    return model_inputs(policy, rows, "right")


def num_bytes(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("name, weights", [("3B", 3_754_622_976), ("7B", 8_292_166_656)])
def test_the_published_shapes_have_the_published_number_of_weights(name, weights):
    assert num_weights(published(name)) == weights


def test_weights_gradients_and_moments_are_those_of_the_optimizer(model_folder, inputs):
    policy = load_policy(str(model_folder))
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=1e-6)
    policy.model(**inputs).logits.sum().backward()
    optimizer.step()
    parameters = list(policy.model.parameters())
    parts = step_bytes(policy.model.config, Shape(), gpus=1, **STEP)
    assert parts["weights"] == num_bytes(parameters) == 4 * num_weights(policy.model.config)
    assert parts["gradients"] == num_bytes(p.grad for p in parameters)
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert parts["moments"] == num_bytes(moments)
    assert parts["copy"] == num_bytes(policy.model.bfloat16().parameters())


@torch.no_grad()
def test_the_cache_holds_the_bytes_of_its_keys_and_values(policy, inputs):
    cache = policy.model(**inputs, use_cache=True).past_key_values
    real = num_bytes(tensor for layer in cache.layers for tensor in (layer.keys, layer.values))
    assert cache_bytes(policy.model.config, 2, inputs["input_ids"].shape[1], dtype=4) == real


@torch.no_grad()
def test_operations_are_those_that_torch_counts(policy, rows, inputs):
    length = inputs["input_ids"].shape[1]
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # the fused kernel of CPUs is not counted
        policy.model(**inputs, use_cache=False)
    counts = counter.get_flop_counts()
    spent = forward_operations(policy.model.config, tokens=2 * length, pairs=2 * length**2, head_tokens=2 * length, images=2,
                               patches=12 * 16)  # torch counts the whole square of an attention, masked or not
    tower, head = "Qwen2_5_VLForConditionalGeneration.model.visual", "Qwen2_5_VLForConditionalGeneration.lm_head"
    assert sum(counts[head].values()) == spent["head"]
    text = "Qwen2_5_VLForConditionalGeneration.model.language_model"
    assert sum(counts[text].values()) == pytest.approx(spent["layers"] + spent["attention"], rel=0.001)
    # Windows at the border hold fewer than 64 patches: the rule, for whole windows, counts a little too many.
    assert sum(counts[tower].values()) == pytest.approx(spent["vision"], rel=0.02)


@pytest.mark.parametrize("dtype, size", [(torch.float32, 4), (torch.bfloat16, 2)])
def test_activations_are_what_autograd_saves(model_folder, dtype, size):
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(model_folder, dtype=dtype).train()
    kept, known = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)  # or its storage would be used again, and counted once
        return tensor

    held, embedded = [], torch.randn(2, 256, 128, dtype=dtype, requires_grad=True)
    positions = torch.arange(256).expand(3, 2, -1)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.model.language_model(inputs_embeds=embedded, position_ids=positions, use_cache=False)
    # Beyond the layers: the last norm, cosines and sines, logsumexp of the attention, 1 / rms of the norms.
    assert sum(kept.values()) == pytest.approx(activation_bytes(model.config, 512, dtype=size), rel=0.1)


def test_packed_groups_keep_the_prompt_beside_each_sample(policy):
    """The difference that the segments make to what autograd saves: two groups of 4 samples of 32 tokens, prompts of 128."""
    model, held = policy.model, []

    def saved(**options):
        kept = {}

        def keep(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            held.append(tensor)  # or its storage would be used again, and counted once
            return tensor

        embedded, positions = torch.randn(1, 512, 128, requires_grad=True), torch.arange(512).expand(3, 1, -1)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model.model.language_model(inputs_embeds=embedded, position_ids=positions, use_cache=False, **options)
        return sum(kept.values())

    segments = [(128, [32] * 4)] * 2
    more = saved(attention_mask={"full_attention": None}, segments=segments) - saved()
    shape = Shape(num_prompts=2, group_size=4, prompt_tokens=128, sample_tokens=32)
    assert more == pytest.approx(3 * packed_bytes(model.config, shape, 512, 4), rel=0.1)


def test_a_step_costs_p_plus_g_c_tokens_instead_of_g_times_p_plus_c():
    config, shape = published("3B"), Shape(num_prompts=1, group_size=8, prompt_patches=0)
    head = 4 * 2 * 8 * 160 * 2048 * 151_936  # nothing to share there
    shared, apart = (step_operations(config, shape, shared=s)["update"] - head for s in (True, False))
    assert apart / shared == pytest.approx(8320 / 2160, rel=0.02)  # 8 · (880 + 160) over 880 + 8 · 160


def test_the_update_is_three_passes_and_one_more_of_the_head_and_one_more_with_checkpointing():
    config = published("3B")
    plain = step_operations(config, Shape(), beta=0.04)
    head = 2 * 16 * 8 * 160 * 2048 * 151_936
    assert plain["update"] == pytest.approx(3 * plain["score"] + head)
    assert step_operations(config, Shape(), checkpointing=True)["update"] == pytest.approx(4 * plain["score"])
    assert step_operations(config, Shape())["score"] == 0.0
    assert plain["score"] == pytest.approx(plain["prefill"] + plain["decode"], rel=0.01)  # the prompts' last logits apart


def test_a_forward_pass_of_3b_spends_two_operations_a_weight_and_token():
    config = published("3B")
    spent = forward_operations(config, tokens=1, pairs=0, head_tokens=1)
    assert sum(spent.values()) == pytest.approx(2 * text_weights(config.text_config), rel=1e-3)


def test_gpus_share_what_stays_and_not_the_copy():
    one, eight = (step_bytes(published("7B"), Shape(), gpus=n, beta=0.04, **STEP) for n in (1, 8))
    for name in ("weights", "gradients", "moments", "reference"):
        assert one[name] == 8 * eight[name] > 0
    assert one["copy"] == eight["copy"] == 2 * 8_292_166_656
    roomy = step_bytes(published("7B"), Shape(), gpus=8, **STEP | {"batch_tokens": 10**6})
    assert roomy["cache"] == cache_bytes(published("7B"), 16, 880 + 160)  # a prompt's keys are repeated for its samples
    assert step_bytes(published("7B"), Shape(), gpus=8, **STEP)["reference"] == 0.0


def test_the_peak_takes_the_larger_phase():
    parts = {"weights": 1.0, "gradients": 2.0, "copy": 10.0, "cache": 5.0, "layer": 3.0, "activations": 20.0, "logits": 1.0}
    assert peak(parts) == 1 + 2 + 24
    assert peak(parts | {"activations": 0.0}) == 1 + 2 + 15


def test_the_tables_name_every_model_and_say_that_they_are_computed():
    text = table(Shape(), beta=0.04, checkpointing=True, **STEP)
    assert text.count("computed") == 2 and text.count("\n") == 12
    assert all(f"| {name} on {n} |" in text for name in ("3B", "7B") for n in (1, 8))
