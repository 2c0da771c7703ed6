"""data/cost.py against real sizes: what the laptop-size model holds, keeps and multiplies."""
import pytest
import torch
from conftest import environments_of_ranks, start_script
from PIL import Image
from ranks_worker import LiveBytes
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLVisionBlock

import cost
import model as model_file
from cost import (ROOM, Shape, activation_bytes, cache_bytes, decoder_layer_weights, forward_operations, memory_table,
                  num_weights, operations_table, packed_bytes, peak, prefill_bytes, published, step_bytes, step_operations,
                  text_weights, update_bytes, vision_bytes)
from grpo import token_logps
from model import encode_image, encode_prompt, load_policy, model_inputs, sample
from rollout import Rollout

STEP = {"micro_batch_tokens": 8192, "batch_tokens": 131_072}


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


def saved_bytes(module, run):
    """What autograd keeps of a forward pass for the backward pass, parameters apart."""
    kept, held, known = {}, [], {p.untyped_storage().data_ptr() for p in module.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)  # or its storage would be used again, and counted once
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return sum(kept.values())


@pytest.mark.parametrize("dtype, size", [(torch.float32, 4), (torch.bfloat16, 2)])
def test_activations_are_what_autograd_saves(model_folder, dtype, size):
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(model_folder, dtype=dtype).train()
    embedded, positions = torch.randn(2, 256, 128, dtype=dtype, requires_grad=True), torch.arange(256).expand(3, 2, -1)
    saved = saved_bytes(model, lambda: model.model.language_model(
        inputs_embeds=embedded, position_ids=positions, use_cache=False))
    # Beyond the layers: the last norm, cosines and sines, logsumexp of the attention, 1 / rms of the norms.
    assert saved == pytest.approx(3 * activation_bytes(model.config, 512, size), rel=0.1)


def test_packed_groups_keep_the_prompt_beside_each_sample(policy):
    """The difference that the segments make to what autograd saves: two groups of 4 samples of 32 tokens, prompts of 128."""
    def saved(**options):
        embedded, positions = torch.randn(1, 512, 128, requires_grad=True), torch.arange(512).expand(3, 1, -1)
        return saved_bytes(policy.model, lambda: policy.model.model.language_model(
            inputs_embeds=embedded, position_ids=positions, use_cache=False, **options))

    segments = [(128, [32] * 4)] * 2
    more = saved(attention_mask={"full_attention": None}, segments=segments) - saved()
    shape = Shape(num_prompts=2, group_size=4, prompt_tokens=128, sample_tokens=32)
    assert more == pytest.approx(3 * packed_bytes(policy.model.config, shape, 512, 4), rel=0.1)


@pytest.mark.parametrize("windows", [[256], [64] * 4])
def test_a_block_of_the_published_vision_tower_keeps_and_holds_what_is_computed(windows):
    config = published("3B")  # as 7B's
    config.vision_config._attn_implementation = "sdpa"
    block = Qwen2_5_VLVisionBlock(config.vision_config).bfloat16()
    pixels = torch.randn(256, 1280, dtype=torch.bfloat16, requires_grad=True)
    ends, rotation = torch.tensor([0, *windows]).cumsum(0), (torch.randn(256, 80),) * 2
    saved = saved_bytes(block, lambda: block(pixels, cu_seqlens=ends, position_embeddings=rotation))
    assert saved == pytest.approx(vision_bytes(config, 256), rel=0.02)
    with torch.no_grad(), LiveBytes([pixels, *block.parameters()]) as live:
        live.peak = 0
        block(pixels, cu_seqlens=ends, position_embeddings=rotation)
    held = live.peak - num_bytes(block.parameters())
    assert prefill_bytes(config, 1, 0, 0, patches=256) == pytest.approx(held, rel=0.05)


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
    assert eight["cache"] == cache_bytes(published("7B"), 16, 8192) == 2 * 28 * 4 * 128 * 16 * 8192 * 2
    small = step_bytes(published("7B"), Shape(num_prompts=8), gpus=8, **STEP)  # a GPU has 8 samples to play
    assert small["cache"] == cache_bytes(published("7B"), 8, 8192)
    assert step_bytes(published("7B"), Shape(), gpus=8, **STEP)["reference"] == 0.0


@pytest.mark.parametrize("kind", ["checkpointing", pytest.param("whole", marks=pytest.mark.thorough)])
def test_fsdp2_allocates_on_two_ranks_what_is_computed(policy, model_folder, tmp_path, kind):
    """Shards, gradients, moments and the gathered copy to the byte; and the peak of an update."""
    processes = [start_script("tests/ranks_worker.py", model_folder, f"--memory={kind}", tmp_path,
                              output=tmp_path / f"log-{rank}", **environment)
                 for rank, environment in enumerate(environments_of_ranks(2))]
    for process in processes:
        process.join(100)
        process.kill()
    for rank in range(2):
        assert (tmp_path / f"memory-2-{rank}.pt").exists(), (tmp_path / f"log-{rank}").read_text()[-3000:]
    ranks = [torch.load(tmp_path / f"memory-2-{rank}.pt") for rank in range(2)]
    prompt, new = ranks[0]["prompt"], ranks[0]["sample"]
    shape = Shape(num_prompts=2, group_size=4, prompt_tokens=prompt, sample_tokens=new, prompt_patches=12 * 16)
    parts = step_bytes(policy.model.config, shape, gpus=2, micro_batch_tokens=prompt + 4 * new, batch_tokens=4096,
                       max_tokens=prompt + new, checkpointing=kind == "checkpointing", dtype=4)
    for name in ("weights", "gradients", "moments"):
        assert sum(rank[name] for rank in ranks) == 2 * parts[name]
    text = policy.model.config.text_config
    padding = text.vocab_size % 2 * text.hidden_size * 4  # FSDP2 fills up rows that two ranks cannot share evenly
    for rank in ranks:
        assert rank["copy"] == parts["copy"] + padding
        assert rank["left"] == pytest.approx(rank["gradients"], rel=1e-3)  # the optimizer step left nothing else
        computed = parts["gradients"] + max(parts[name] for name in cost.UPDATE)
        assert computed == pytest.approx(rank["update"], rel=0.08)


# ---- at the sizes of 3B and 7B, with tensors that have shapes and no memory ----------------------

def fake_model(name, layers):
    """It and its config, with its first layers only: all are alike."""
    config = published(name)
    config.text_config.num_hidden_layers = layers
    config.text_config.layer_types = ["full_attention"] * layers
    model = Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
    return model_file._set_up(model), config


@torch.no_grad()
def prefill_peak(name, layers, rows, new, context):
    """Bytes beyond the weights and the whole cache, on a CPU: where attention copies no mask to pad its lines."""
    with FakeTensorMode():
        model, config = fake_model(name, layers)
        text, cache = config.text_config, DynamicCache(config=config)
        size = rows, text.num_key_value_heads, context - new, 128
        for layer in range(layers):
            cache.update(*(torch.empty(size, dtype=torch.bfloat16) for _ in "kv"), layer)
        ids, positions = torch.zeros(rows, new, dtype=torch.long), torch.zeros(3, rows, new, dtype=torch.long)
        with LiveBytes(model.parameters(), "meta") as live:
            live.peak = 0
            model(input_ids=ids, position_ids=positions, attention_mask=torch.ones(rows, context), past_key_values=cache,
                  logits_to_keep=1)
        cached = [x for layer in cache.layers for x in (layer.keys, layer.values)]
        assert num_bytes(cached) == cache_bytes(config, rows, context)
        return live.peak - num_bytes(model.parameters()) - num_bytes(cached)


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["3B", "7B"])
@pytest.mark.parametrize("new, context", [(1060, 8160), (model_file.PIECE // 16, 8192), (880, 880)])
def test_what_a_prefill_holds_at_real_size(name, new, context):
    """An observation of 1,060 tokens behind 7,100; the largest piece; 16 prompts of their own."""
    held = prefill_peak(name, 2, 16, new, context)
    assert prefill_peak(name, 3, 16, new, context) == pytest.approx(held, rel=0.02)  # whatever the number of layers
    padded = 16 * new * context * 2  # a GPU's
    computed = prefill_bytes(published(name), 16, new, context)
    assert 0.95 * held < computed < 1.1 * (held + padded)
    assert held + padded < 8e9


def test_the_largest_transient_of_sampling_is_8_gb():
    """16 rows of 8,192 tokens with 5 processed images each, at 7B. Without images it is 3.1."""
    assert step_bytes(published("7B"), Shape(), gpus=8, **STEP)["prefill"] < 8e9
    assert step_bytes(published("7B"), Shape(), gpus=8, **STEP, max_images=1)["prefill"] < 3.2e9


def test_a_whole_chain_at_once_would_hold_twice_what_is_allowed():
    assert prefill_peak("7B", 1, 16, 8192 - 879, 8192) > 16e9


@torch.no_grad()
def test_no_pass_of_sampling_is_longer_than_a_piece(policy, rows, monkeypatch):
    """However long the chain behind the prompt; images too are cut. The head sees the last token of a row only."""
    image = rows[0].images[0]
    prompt = encode_prompt(policy, "Why?", image)
    chains = []
    for length in (3, 40, 97):
        ids = prompt + [301 + length] * length + encode_prompt(policy, "And?", image)
        mask = [0] * len(prompt) + [1] * length + [0] * (len(ids) - len(prompt) - length)
        chains.append(Rollout({}, ids, mask, [0.0] * len(ids), [image, image]))
    whole = sample(policy, chains, 6, 0.0)
    passes, heads, model = [], [], policy.model
    hooks = [model.model.language_model.register_forward_pre_hook(
        lambda _, args, inputs: passes.append(inputs["inputs_embeds"].shape[:2].numel()), with_kwargs=True),
        model.lm_head.register_forward_pre_hook(lambda _, args: heads.append(args[0].shape[1]))]
    monkeypatch.setattr(model_file, "PIECE", 60)
    pieces = sample(policy, chains, 6, 0.0)
    for hook in hooks:
        hook.remove()
    assert max(passes[1:]) == 60 and passes.count(60) == 8  # the first is the prompts'
    assert set(heads) == {1}
    assert [ids for ids, _ in pieces] == [ids for ids, _ in whole]
    for (_, ours), (_, theirs) in zip(pieces, whole):
        assert ours == pytest.approx(theirs, abs=1e-5)


def test_the_pieces_are_those_of_the_model():
    assert cost.PIECE == model_file.PIECE


SEGMENTS = [(880, [160] * 8)] * 3 + [(880, [160] * 5)]
TOKENS, ACTIONS = 8160, 29 * 160


def update_peak(name, layers, checkpointing):
    """Bytes of one micro-batch beyond the weights: what the forward pass leaves, and the peak of the backward pass."""
    with FakeTensorMode():
        model, config = fake_model(name, layers)
        if checkpointing:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        positions, places = torch.zeros(3, 1, TOKENS, dtype=torch.long), torch.zeros(ACTIONS, dtype=torch.long)
        with LiveBytes(model.parameters(), "meta") as live:
            output = model.model.language_model(
                input_ids=torch.zeros(1, TOKENS, dtype=torch.long), position_ids=positions, segments=SEGMENTS,
                attention_mask={"full_attention": None}, use_cache=False)
            left, live.peak = live.now(), 0
            hidden = output.last_hidden_state[0].index_select(0, places)
            logps, _ = token_logps(hidden, model.lm_head.weight, places, temperature=1.0,
                                   suppressed=torch.zeros(300, dtype=torch.long))
            logps.sum().backward()
        weights = num_bytes(model.parameters())
        return config, left - weights, live.peak - weights


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["3B", "7B"])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_what_a_micro_batch_holds_at_real_size(name, checkpointing):
    """Without FSDP2, whose part the two ranks above measure. Each further layer adds the same."""
    (_, one, _), (config, two, peak_of_two) = (update_peak(name, n, checkpointing) for n in (1, 2))
    text, shape = config.text_config, Shape(prompt_patches=0)
    layer = activation_bytes(config, TOKENS) + packed_bytes(config, shape, TOKENS)
    if checkpointing:
        assert two - one == TOKENS * text.hidden_size * 2
    else:
        assert two - one == pytest.approx(layer, rel=0.02)
    parts = update_bytes(config, shape, TOKENS, gpus=1, checkpointing=checkpointing)
    unit = decoder_layer_weights(text)
    of_root = 2 * (num_weights(config) - 2 * unit - 32 * cost._block_weights(config.vision_config))
    sharded = unit * (2 * 2 + 4 + 4)
    computed = max(parts["head"] - of_root, parts["layer"] - of_root - sharded)
    assert computed == pytest.approx(peak_of_two, rel=0.08)


def test_the_peak_takes_the_larger_phase():
    parts = {"weights": 1.0, "moments": 2.0, "reference": 0.0, "copy": 10.0, "cache": 5.0, "prefill": 1.0, "gradients": 3.0,
             "head": 1.0, "layer": 20.0, "root": 4.0}
    assert peak(parts) == 1 + 2 + 3 + 20
    assert peak(parts | {"layer": 0.0}) == 1 + 2 + 16


def test_a_rollout_longer_than_a_micro_batch_is_one_by_itself():
    small, large = (step_bytes(published("3B"), Shape(), gpus=1, batch_tokens=131_072, micro_batch_tokens=n)
                    for n in (1024, 8192))
    assert small["layer"] == large["layer"]


@pytest.mark.parametrize("name, gpus, beta", [("3B", 1, 0.0), ("7B", 8, 0.04)])
def test_the_commands_of_the_readme_leave_15_percent_of_80_gb(name, gpus, beta):
    prompts = 8 if name == "3B" else 16  # the default, and the one given
    assert peak(step_bytes(published(name), Shape(num_prompts=prompts), gpus=gpus, beta=beta, **STEP)) < ROOM == 68e9


def test_the_tables_name_every_model_and_say_that_they_are_computed():
    memory = memory_table(Shape(), beta=0.04, **STEP)
    assert memory.count("computed") == 1 and memory.count("\n") == 1 + len(cost.ROWS)
    assert all(f"| {name} on {n} |" in memory for name in ("3B", "7B") for n in (1, 4, 8))
    operations = operations_table(Shape(), beta=0.04, checkpointing=True)
    assert operations.count("computed") == 1 and operations.count("\n") == 5
