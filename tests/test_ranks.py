"""model.py and train.py over ranks: two processes do what one does.

Real ones, on the CPU, talking by gloo.
"""
import json
import time

import pytest
import torch
from conftest import environments_of_ranks, start_script
from safetensors.torch import load_file
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from make_model import make_model
from model import load_policy

TIMEOUT = 150  # seconds; the ranks themselves give up after a minute without an answer


@pytest.fixture(scope="module")
def reference_folder(tmp_path_factory, policy):
    """Another model with the same tokenizer, so that the KL is not 0; its head is not tied."""
    folder = tmp_path_factory.mktemp("reference")
    tied = make_model(policy.tokenizer, seed=1)
    config = tied.config
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = False
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.load_state_dict(tied.state_dict())
    for part in (model, policy.tokenizer, Qwen2VLImageProcessorPil()):
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, model_folder, reference_folder):
    """ranks(part, world_size, rank): what that rank wrote down.

    All parts run once, on one rank and on two.
    """
    out, end = tmp_path_factory.mktemp("ranks"), time.monotonic() + TIMEOUT
    processes = [start_script("tests/ranks_worker.py", model_folder, reference_folder, out,
                              output=out / f"log-{size}-{rank}", **environment) for size in (1, 2)
                 for rank, environment in enumerate(environments_of_ranks(size))]
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
        process.kill()

    def read(part, size, rank):
        path = out / f"{part}-{size}-{rank}.pt"
        if not path.exists():
            log = (out / f"log-{size}-{rank}").read_text()
            pytest.fail(f"rank {rank} of {size} did not get as far as {part!r}:\n{log[-6000:]}")
        return torch.load(path)
    read.out = out
    return read


def assert_same(left, right, **tolerance):
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name],
                                   msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def without_dtype(config):
    """A config.json without the dtypes, which save_pretrained repeats in every part."""
    return {name: without_dtype(value) if isinstance(value, dict) else value
            for name, value in config.items() if name != "dtype"}


# ---- load and save -------------------------------------------------------------------------------

@pytest.mark.parametrize("size, rank", [(1, 0), (2, 0), (2, 1)])
def test_sharded_load_is_the_whole_model(ranks, policy, size, rank):
    loaded = ranks("load", size, rank)
    assert_same(loaded["weights"],
                {name: p.detach() for name, p in policy.model.named_parameters()}, atol=0, rtol=0)
    assert_same(loaded["buffers"], dict(policy.model.named_buffers()), atol=0, rtol=0)
    assert loaded["tied"]


def test_two_ranks_share_the_weights(ranks, policy):
    total = sum(p.numel() for p in policy.model.parameters())
    first, second = (ranks("load", 2, rank)["here"] for rank in range(2))
    assert ranks("load", 1, 0)["here"] == first + second == total
    assert 0.45 * total < first < 0.55 * total


@pytest.mark.parametrize("size", [1, 2])
def test_export_is_a_plain_hugging_face_folder_of_the_trained_weights(ranks, model_folder, size):
    trained, folder = ranks("adamw", size, 0)["weights"], ranks.out / f"exported-{size}"
    config, original = (json.loads((f / "config.json").read_text()) for f in (folder, model_folder))
    assert config["architectures"] == ["Qwen2_5_VLForConditionalGeneration"]
    assert without_dtype(config) == without_dtype(original)
    assert json.loads((folder / "generation_config.json").read_text()) == json.loads(
        (model_folder / "generation_config.json").read_text())
    exported = load_policy(str(folder))
    assert_same({name: p.detach() for name, p in exported.model.named_parameters()}, trained,
                atol=0, rtol=0)
    assert exported.model.lm_head.weight is exported.model.model.language_model.embed_tokens.weight
    assert len(exported.tokenizer) == len(load_policy(str(model_folder)).tokenizer)


@pytest.mark.parametrize("size", [1, 2])
def test_export_writes_tied_weights_once(ranks, model_folder, size):
    assert (load_file(ranks.out / f"exported-{size}" / "model.safetensors").keys()
            == load_file(model_folder / "model.safetensors").keys())


@pytest.mark.parametrize("size, rank", [(1, 0), (2, 0), (2, 1)])
def test_a_copy_has_the_weights_of_the_moment_each_rank_its_share(ranks, size, rank):
    copy, trained = ranks("copy", size, rank), ranks("adamw", size, rank)
    assert_same(copy["weights"], trained["weights"], atol=0, rtol=0)
    assert copy["here"] == ranks("load", size, rank)["here"]
    assert torch.equal(*copy["logps"])


# ---- rollouts ------------------------------------------------------------------------------------

def test_ranks_take_different_numbers_of_turns_and_sample_what_a_whole_model_samples(ranks):
    first, second = ranks("sample", 2, 0), ranks("sample", 2, 1)
    assert (first["sharded"]["turns"], first["sharded"]["images"]) == ([3, 3, 3], [3, 3, 3])
    assert (second["sharded"]["turns"], second["sharded"]["images"]) == ([1, 1, 1], [0, 0, 0])
    for seen in (first, second):
        assert seen["sharded"]["ids"] == seen["whole"]["ids"]
        assert len({tuple(ids) for ids in seen["sharded"]["ids"]}) == 3
        for sharded, whole in zip(seen["sharded"]["logps"], seen["whole"]["logps"]):
            assert sharded == pytest.approx(whole, abs=1e-5)
    assert second["left"] < first["left"]  # it did not wait for the other's turns


def test_weights_are_spread_again_after_the_rollouts(ranks):
    for rank in range(2):
        assert ranks("sample", 2, rank)["here"] == ranks("load", 2, rank)["here"]
        sharded, whole = ranks("sample", 2, rank)["logps"]
        torch.testing.assert_close(sharded, whole, atol=1e-5, rtol=0)


# ---- updates -------------------------------------------------------------------------------------

def test_ranks_and_budgets_cut_the_same_rollouts_unlike(ranks):
    """What the tests below compare: 5 rollouts of text on rank 0, 3 with images on rank 1, and all
    8 on one rank.
    """
    seen = {(budget, size, rank): ranks(f"gradient_{budget}", size, rank)
            for budget in ("small", "large") for size, rank in [(1, 0), (2, 0), (2, 1)]}
    assert {key: (value["num_real"], value["num"]) for key, value in seen.items()} == {
        # two only fill up
        ("small", 1, 0): (8, 8), ("small", 2, 0): (5, 5), ("small", 2, 1): (3, 5),
        ("large", 1, 0): (1, 1), ("large", 2, 0): (1, 1), ("large", 2, 1): (1, 1)}
    assert not any(seen["small", 2, 0]["images"]) and all(seen["small", 2, 1]["images"])
    assert not any(seen["large", 2, 0]["images"]) and all(seen["large", 2, 1]["images"])


OTHERS = [("gradient_large", 1, 0), ("gradient_small", 2, 0), ("gradient_small", 2, 1),
          ("gradient_large", 2, 0)]


@pytest.mark.parametrize("part, size, rank", OTHERS)
def test_metrics_do_not_depend_on_ranks_or_micro_batches(ranks, part, size, rank):
    expected, metrics = ranks("gradient_small", 1, 0)["metrics"], ranks(part, size, rank)["metrics"]
    assert expected["kl"] > 0 and expected["grad_norm"] > 0.1
    assert metrics == {name: pytest.approx(value, rel=1e-5) for name, value in expected.items()}


@pytest.mark.parametrize("part, size, rank", OTHERS)
def test_the_gradient_does_not_depend_on_ranks_or_micro_batches(ranks, part, size, rank):
    expected, gradient = ranks("gradient_small", 1, 0)["moved"], ranks(part, size, rank)["moved"]
    assert all(expected[name].any() for name in expected)  # the vision tower learns too
    # moved = after - before: float32 weights of about 0.1 round it by 1e-8
    for name, wanted in expected.items():
        tolerance = 1e-5 * wanted.abs().max().item() + 1e-7
        torch.testing.assert_close(gradient[name], wanted, rtol=0, atol=tolerance,
                                   msg=f"{part}: {name}")


@pytest.mark.parametrize("loss", ["dr_grpo", "dapo"])
def test_other_losses_do_not_depend_on_ranks(ranks, loss):
    one, two = ranks(f"gradient_{loss}", 1, 0), ranks(f"gradient_{loss}", 2, 1)
    assert two["metrics"] == {name: pytest.approx(value, rel=1e-5)
                              for name, value in one["metrics"].items()}
    assert_same(two["moved"], one["moved"], atol=1e-6, rtol=0)
    assert one["metrics"]["loss"] != pytest.approx(ranks("gradient_small", 1, 0)["metrics"]["loss"],
                                                   rel=1e-2)


def test_weights_after_a_step_of_adamw_do_not_depend_on_ranks(ranks):
    one, two, other = ranks("adamw", 1, 0), ranks("adamw", 2, 0), ranks("adamw", 2, 1)
    assert_same(two["weights"], other["weights"], atol=0, rtol=0)
    # The first step of AdamW moves a weight by 1e-4, however little its gradient: a wrong sign
    # would be 2e-4.
    assert_same(two["weights"], one["weights"], atol=1e-5, rtol=0)
    assert max(moved.abs().max().item() for moved in one["moved"].values()) > 0.9e-4


@pytest.mark.parametrize("size, rank", [(1, 0), (2, 0), (2, 1)])
def test_an_update_that_is_not_finite_on_one_rank_is_skipped_on_all(ranks, size, rank):
    seen = ranks("not_finite", size, rank)
    assert (seen["metrics"]["skipped"], seen["state"]) == (1, 0) and ranks(
        "adamw", size, rank)["metrics"]["skipped"] == 0
    assert not any(moved.any() for moved in seen["moved"].values())


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("head", ["tied", "untied", "frozen_head"])
def test_shards_that_compute_in_bfloat16_score_and_learn_as_a_whole_model_does(ranks, size, head):
    seen = ranks(f"bfloat16_{head}", size, size - 1)
    sharded, whole, *_ = seen["logps"]
    torch.testing.assert_close(sharded, whole, atol=0.1, rtol=0)  # bf16 keeps 8 bits
    assert seen["dtypes"] == {torch.float32}
    assert ("lm_head.weight" in seen["off"]) == (head == "untied")
    assert all(off < 0.03 for name, off in seen["off"].items() if "head" in name or "embed" in name)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("head", ["tied", "untied"])
def test_shards_that_compute_in_bfloat16_are_the_plain_model_in_bfloat16(ranks, size, head):
    """Bit for bit. FSDP could round what a module is given: the cosines of the vision tower."""
    seen = ranks(f"bfloat16_{head}", size, size - 1)
    for sharded, _, plain, *copy in (seen["features"][:3], seen["logps"]):
        assert sharded.any() and torch.equal(sharded, plain)
    assert torch.equal(sharded, *copy)  # the reference, whose shards are bf16 themselves
