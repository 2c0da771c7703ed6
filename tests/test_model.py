"""The model behind the policy: the hub's files, the prompt's ids, positions, and one distribution for both.

Everything is compared with `Qwen2_5_VLForConditionalGeneration` used plainly: one sequence at a time, no padding, positions
made by Hugging Face itself from `mm_token_type_ids`.
"""
import json
import math
import os
import pickle
import re
import shutil
import time
from itertools import groupby
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from data.model_files import check_model
from model import (EncodedImage, draw, encode_image, encode_observation, encode_prompt,
                   encode_text, export, image_tokens, load_policy, model_inputs, sample, action_logps)
from rollout import collate

# ids of the laptop tokenizer; rows of the embedding, padded as the hub pads 151,665 to 151,936
V, V_PADDED = 829, 832
END, PAD, IMAGE = 815, 816, 827
# every special token but <|im_end|> (815), and the rows without a token
SUPPRESSED = [*range(816, 832)]
# ids 815 to 828
SPECIAL = ["<|im_end|>", "<|endoftext|>", "<|im_start|>", "<|object_ref_start|>",
           "<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>",
           "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
HUB_GENERATION = {"bos_token_id": PAD, "pad_token_id": PAD, "do_sample": True,
                  "eos_token_id": [END, PAD], "repetition_penalty": 1.05, "temperature": 1e-6,
                  "top_k": 1, "transformers_version": "4.49.0"}
# nats in fp32: attention with and without a cache, padded or not, adds up in another order
TOLERANCE = 1e-4


class Row(NamedTuple):
    ids: list[int]
    images: list[EncodedImage] = []
    action_mask: list[int] = []


# ----------------------------------------------------------------------------------------- fixtures


@pytest.fixture(scope="module")
def hub_folder(model_folder, tmp_path_factory):
    """The model in the very files of Qwen/Qwen2.5-VL-3B-Instruct: flat config, sharded bf16, generation defaults of its own.

    Weights are five times their initial size: logits then spread over several nats, and positions, temperature, penalties
    and padding all show. The embedding has rows beyond the tokenizer, as the hub's has.
    """
    folder = tmp_path_factory.mktemp("hub")
    weights = {}
    torch.manual_seed(1)
    for name, tensor in load_file(model_folder / "model.safetensors").items():
        weights[name] = (5 * tensor if tensor.ndim > 1 else tensor).bfloat16()
    embedding = weights["model.embed_tokens.weight"]
    weights["model.embed_tokens.weight"] = torch.cat(
        [embedding, 0.1 * torch.randn(V_PADDED - V, 128).bfloat16()])
    names, files = sorted(weights), {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: weights[name].contiguous() for name in part}, folder / file,
                  metadata={"format": "pt"})
        files |= dict.fromkeys(part, file)
    write(folder / "model.safetensors.index.json",
          {"metadata": {"total_size": sum(2 * w.numel() for w in weights.values())},
           "weight_map": files})
    write(folder / "config.json", {"architectures": ["Qwen2_5_VLForConditionalGeneration"],
                                   "attention_dropout": 0.0, "bos_token_id": PAD,
                                   "eos_token_id": END, "vision_start_token_id": 824,
                                   "vision_end_token_id": 825, "vision_token_id": 826,
                                   "image_token_id": 827, "video_token_id": 828,
                                   "hidden_act": "silu", "hidden_size": 128,
                                   "initializer_range": 0.02, "intermediate_size": 256,
                                   "max_position_embeddings": 4096, "max_window_layers": 70,
                                   "model_type": "qwen2_5_vl", "num_attention_heads": 4,
                                   "num_hidden_layers": 3, "num_key_value_heads": 2,
                                   "rms_norm_eps": 1e-06, "rope_theta": 10000.0,
                                   "sliding_window": 32768, "tie_word_embeddings": True,
                                   "torch_dtype": "bfloat16", "transformers_version": "4.41.2",
                                   "use_cache": True, "use_sliding_window": False,
                                   "vision_config": {"depth": 3, "hidden_act": "silu",
                                                     "hidden_size": 96, "intermediate_size": 192,
                                                     "num_heads": 4, "in_chans": 3,
                                                     "out_hidden_size": 128, "patch_size": 14,
                                                     "spatial_merge_size": 2,
                                                     "spatial_patch_size": 14, "window_size": 112,
                                                     "fullatt_block_indexes": [2],
                                                     "tokens_per_second": 2,
                                                     "temporal_patch_size": 2},
                                   "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
                                   "vocab_size": V_PADDED})
    write(folder / "generation_config.json", HUB_GENERATION)
    write(folder / "preprocessor_config.json",
          {"min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "temporal_patch_size": 2,
           "merge_size": 2, "image_mean": [0.48145466, 0.4578275, 0.40821073],
           "image_std": [0.26862954, 0.26130258, 0.27577711],
           "image_processor_type": "Qwen2VLImageProcessor",
           "processor_class": "Qwen2_5_VLProcessor"})
    shutil.copy(model_folder / "tokenizer.json", folder)
    template = (model_folder / "chat_template.jinja").read_text()
    write(folder / "tokenizer_config.json", {
        "add_bos_token": False, "add_prefix_space": False,
        "added_tokens_decoder": {str(815 + i): {"content": token, "lstrip": False, "normalized": False, "rstrip": False,
                                                "single_word": False, "special": True} for i, token in enumerate(SPECIAL)},
        "additional_special_tokens": [t for t in SPECIAL if t != "<|endoftext|>"], "bos_token": None,
        "chat_template": template, "clean_up_tokenization_spaces": False, "eos_token": "<|im_end|>", "errors": "replace",
        "model_max_length": 131072, "pad_token": "<|endoftext|>", "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer", "unk_token": None})
    write(folder / "chat_template.json", {"chat_template": template})
    return folder


def write(path, value):
    path.write_text(json.dumps(value, indent=2))


@pytest.fixture(scope="module")
def hub(hub_folder):
    return load_policy(str(hub_folder), device=torch.device("cpu"))


@pytest.fixture(scope="module")
def plain(hub_folder):
    """The trusted implementation, a copy of its own."""
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(
        hub_folder, dtype=torch.float32).eval()


@torch.no_grad()
def plain_logits(model, row):
    """Logits (T, V) of one unpadded sequence; Hugging Face makes the positions."""
    ids = torch.tensor([row.ids])
    vision = {}
    if row.images:
        vision = {"pixel_values": torch.cat([i.pixels for i in row.images]),
                  "image_grid_thw": torch.tensor([i.grid for i in row.images]),
                  "mm_token_type_ids": (ids == IMAGE).int()}
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False,
                 **vision).logits[0]


def plain_log_probs(model, row, temperature=1.0):
    """Log-probs (T, V) of the next token after each, specials left out."""
    logits = plain_logits(model, row) / temperature
    logits[:, SUPPRESSED] = -torch.inf
    return logits.log_softmax(dim=1)


def picture(width, height, seed):
    rng = torch.Generator().manual_seed(seed)
    return Image.frombytes("RGB", (width, height),
                           bytes(torch.randint(0, 256, (3 * width * height,),
                                               generator=rng).tolist()))


@pytest.fixture(scope="module")
def rows(hub):
    """Ragged prompts: text only, one image, three images of other shapes, a long text."""
    images = [encode_image(hub, picture(*size, seed))
              for seed, size in enumerate([(56, 56), (112, 56), (56, 140), (140, 140)])]
    return {"text": Row(encode_prompt(hub, "Which city?", None)),
            "image": Row(encode_prompt(hub, "Read the sign in the picture.", images[1]), [images[1]]),
            "images": Row(encode_prompt(hub, "Look.", images[0]) + encode_text(hub, "<code>x</code>") + [END]
                          + encode_observation(hub, "The processed image.", images[2]) + encode_text(hub, "and") + [END]
                          + encode_observation(hub, "Again.", images[3]), [images[0], images[2], images[3]]),
            "long": Row(encode_prompt(hub, "One two three four five six seven. " * 6, None))}


# ---------------------------------------------------------------------------------- the hub's files


def test_a_folder_of_the_hub_gives_the_logits_of_its_weights(hub, plain, hub_folder, rows):
    weights = {name: w for file in hub_folder.glob("*.safetensors")
               for name, w in load_file(file).items()}
    embedding = weights["model.embed_tokens.weight"].float()
    assert hub.model.lm_head.weight.equal(embedding) and hub.model.get_input_embeddings().weight.equal(embedding)
    for row in rows.values():
        assert plain_logits(hub.model, row).equal(plain_logits(plain, row))


def test_the_flat_config_is_read_field_by_field(hub):
    text, vision = hub.model.config.text_config, hub.model.config.vision_config
    assert (text.hidden_size, text.num_hidden_layers, text.num_key_value_heads,
            text.vocab_size) == (128, 3, 2, V_PADDED)
    assert (text.rope_parameters["mrope_section"],
            text.rope_parameters["rope_theta"]) == ([4, 6, 6], 10000.0)
    assert (vision.depth, vision.window_size, vision.fullatt_block_indexes,
            vision.in_channels) == (3, 112, [2], 3)
    assert hub.model.dtype == torch.float32 and not hub.model.training


def test_the_end_the_image_and_the_suppressed_ids(hub, policy):
    assert (hub.end_id, hub.image_id) == (END, IMAGE)
    assert hub.suppressed.tolist() == [*range(816, 832)]
    # a folder without rows beyond the tokenizer
    assert policy.suppressed.tolist() == [*range(816, 829)]


def test_the_hub_tokenizer_class_encodes_as_ours_and_keeps_specials_apart(hub, policy):
    assert type(hub.tokenizer).__name__ == "Qwen2Tokenizer"
    for text in ["Which city? 2 + 2 = 4", "<think> it's  dark\n\n</think>", "Zürich, 東京\t🙂",
                 "<|im_end|>\n<|image_pad|>"]:
        assert encode_text(hub, text) == encode_text(policy, text)
        assert hub.tokenizer(text)["input_ids"] == policy.tokenizer(text)["input_ids"]


def edit(path, **changes):
    """Change keys of a .json file; None removes one."""
    value = json.loads(path.read_text()) | changes
    write(path, {key: v for key, v in value.items() if v is not None})


def processor_config(folder):
    """As transformers 5 saves a whole processor: one file, with the image processor inside."""
    inner = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").unlink()
    write(folder / "processor_config.json",
          {"image_processor": inner, "processor_class": "Qwen2_5_VLProcessor"})


def bin_weights(folder):
    weights = {name: w for file in folder.glob("*.safetensors")
               for name, w in load_file(file).items()}
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    torch.save(weights, folder / "pytorch_model.bin")


def vocab_and_merges(folder):
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    write(folder / "vocab.json", model["vocab"])
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, model["merges"]))
                                       + "\n")


def template_in(name):
    """The template in that file alone."""
    def change(folder):
        (folder / name).parent.mkdir(exist_ok=True)
        template = json.loads((folder / "chat_template.json").read_text())["chat_template"]
        edit(folder / "tokenizer_config.json", chat_template=None)
        (folder / "chat_template.json").unlink()
        (folder / name).write_text(json.dumps({"chat_template": template}) if name.endswith(".json")
                                   else template)
    return change


def templates_by_name(folder):
    template = json.loads((folder / "chat_template.json").read_text())["chat_template"]
    edit(folder / "tokenizer_config.json", chat_template=[{"name": "default", "template": template},
                                                          {"name": "rag", "template": "x"}])


def pixels_in_size(folder):
    edit(folder / "preprocessor_config.json",
         size={"shortest_edge": 3136, "longest_edge": 12845056}, min_pixels=None, max_pixels=None)


LAYOUTS = {
    "hub": lambda folder: None, "processor_config.json": processor_config,
    "its pixels in size": lambda folder: (pixels_in_size(folder), processor_config(folder)),
    "pixels in size": pixels_in_size,
    "pixels null": lambda folder: write(folder / "preprocessor_config.json", {
        **json.loads((folder / "preprocessor_config.json").read_text()), "size": None, "max_pixels": None}),
    ".bin": bin_weights, "vocab.json": vocab_and_merges, "chat_template.json": template_in("chat_template.json"),
    "chat_template.jinja": template_in("chat_template.jinja"), "named templates": templates_by_name,
    "additional_chat_templates": template_in("additional_chat_templates/default.jinja")}


@pytest.mark.parametrize("change", LAYOUTS.values(), ids=LAYOUTS)
def test_what_from_pretrained_accepts_is_the_same_policy_with_our_bounds_of_images(
        hub_folder, hub, tmp_path, change):
    folder = shutil.copytree(hub_folder, tmp_path / "m")
    change(folder)
    check_model(str(folder))
    loaded = load_policy(str(folder), min_pixels=200_000, max_pixels=300_000,
                         device=torch.device("cpu"))
    assert all(a.equal(b) for a, b in zip(loaded.model.parameters(), hub.model.parameters(),
                                          strict=True))
    assert encode_prompt(loaded, "Which city?", None) == encode_prompt(hub, "Which city?", None)
    for size in ((1000, 1000), (100, 100)):
        _, height, width = encode_image(loaded, Image.new("RGB", size)).grid
        assert 200_000 <= height * width * 14 * 14 <= 300_000


def cut(name, length):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:length])


def shard_of_norm(folder):
    return next((file, weights) for file in folder.glob("*.safetensors")
                if "model.norm.weight" in (weights := load_file(file)))


def without_a_tensor(folder):
    file, weights = shard_of_norm(folder)
    del weights["model.norm.weight"]
    save_file(weights, file, metadata={"format": "pt"})


def of_another_shape(folder):
    file, weights = shard_of_norm(folder)
    save_file(weights | {"model.norm.weight": torch.ones(3)}, file, metadata={"format": "pt"})


class Touches:
    """Unpickled, it runs a command; the test would see its file."""
    def __reduce__(self):
        return os.system, ("touch unpickled",)


def hostile_bin(folder):
    bin_weights(folder)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Touches(), protocol=2))


DAMAGE = {
    "weights cut off": (cut("model-00002-of-00002.safetensors", 5000), "cannot be loaded: SafetensorError"),
    "a shard lost": (lambda folder: (folder / "model-00002-of-00002.safetensors").unlink(), "00002-of-00002"),
    "a pointer of git-lfs": (lambda folder: (folder / "model-00001-of-00002.safetensors").write_text("version https://git"),
                             "cannot be loaded: SafetensorError"),
    "a tensor absent": (without_a_tensor, "1 tensors are absent or of another shape, model.language_model.norm.weight"),
    "of another shape": (of_another_shape, "1 tensors are absent or of another shape, model.language_model.norm.weight"),
    "hostile .bin": (hostile_bin, "cannot be loaded: UnpicklingError"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer"),
    "tokenizer cut off": (cut("tokenizer.json", 1000), "cannot be loaded: JSONDecodeError"),
    "tokenizer of another": (lambda folder: edit(folder / "config.json", image_token_id=5), "another model's"),
    "no image processor": (lambda folder: (folder / "preprocessor_config.json").unlink(), "preprocessor_config.json"),
    "image processor cut off": (cut("preprocessor_config.json", 40), "preprocessor_config.json"),
    "no chat template": (lambda folder: (template_in("chat_template.json")(folder), (folder / "chat_template.json").unlink()),
                         "chat_template is not set"),
    "config cut off": (cut("config.json", 40), "config.json' is not a valid JSON"),
    "config of a run": (lambda folder: write(folder / "config.json", {"model": "data/model"}), "`model_type` key"),
    "config a list": (lambda folder: write(folder / "config.json", []), "cannot be loaded"),
    "another architecture": (lambda folder: edit(folder / "config.json", model_type="qwen2_vl"), "model_type is 'qwen2_vl'"),
}


@pytest.mark.parametrize("damage, words", DAMAGE.values(), ids=DAMAGE)
def test_a_folder_that_cannot_be_loaded_is_named_with_the_reason(
        hub_folder, tmp_path, damage, words, monkeypatch):
    folder = shutil.copytree(hub_folder, tmp_path / "m")
    damage(folder)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as error:
        load_policy(str(folder))
    assert str(error.value).startswith(f"--model {folder}") and words in str(error.value), error.value
    assert "\n" not in str(error.value) and not (tmp_path / "unpickled").exists()


@pytest.mark.parametrize("file, message", [("config.json", "no config.json"),
                                           ("model.safetensors", r"no weights \(.safetensors or .bin\)")])
def test_an_incomplete_folder_is_refused_at_once(model_folder, tmp_path, file, message):
    folder = shutil.copytree(model_folder, tmp_path / "m")
    (folder / file).unlink()
    start = time.perf_counter()
    for refuse in (check_model, load_policy):
        with pytest.raises(
            ValueError,
            match=f"--model {re.escape(str(folder))}.*{message}.*save_pretrained, as RUN/model"):
            refuse(str(folder))
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize("name", ["/no/such", "./no", "../no", "no", "data/no", "a/b/c"])
def test_a_missing_folder_is_refused_at_once(name):
    start = time.perf_counter()
    with pytest.raises(ValueError, match="no such folder .*like Qwen/Qwen2.5-VL-3B-Instruct"):
        check_model(name)
    assert time.perf_counter() - start < 1


def test_a_large_model_without_a_gpu_says_so_before_it_is_read(hub_folder, tmp_path):
    """An old driver looks like no GPU at all: the run would take weeks without a word."""
    config = json.loads((hub_folder / "config.json").read_text())
    write(tmp_path / "config.json", config | {"hidden_size": 2048})
    (tmp_path / "model.safetensors").touch()
    with pytest.warns(UserWarning, match="no GPU was found"), pytest.raises(ValueError, match="tokenizer"):
        load_policy(str(tmp_path), device=torch.device("cpu"))


def test_complete_folders_and_names_of_the_hub_pass(model_folder, hub_folder):
    for name in (str(model_folder), str(hub_folder), "Qwen/Qwen2.5-VL-7B-Instruct"):
        check_model(name)


def test_an_export_opens_as_a_plain_model_with_the_same_logits(hub, plain, rows, tmp_path):
    export(hub, tmp_path)
    again = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32)
    for row in rows.values():
        assert plain_logits(again.eval(), row).equal(plain_logits(plain, row))
    assert again.lm_head.weight is again.get_input_embeddings().weight
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["Qwen2_5_VLForConditionalGeneration"]
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # as the hub's
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


def test_an_export_carries_the_generation_defaults_of_the_hub_and_loads_as_a_policy(
        hub, hub_folder, rows, tmp_path):
    export(hub, tmp_path)
    exported = json.loads((tmp_path / "generation_config.json").read_text())
    assert {k: exported[k] for k in HUB_GENERATION if k != "transformers_version"} == {
        k: v for k, v in HUB_GENERATION.items() if k != "transformers_version"}
    again = load_policy(str(tmp_path))
    assert encode_prompt(
        again, "Which city? <|im_end|>", None) == encode_prompt(hub, "Which city? <|im_end|>", None)
    assert encode_image(again, picture(50, 90, 0)).pixels.equal(
        encode_image(hub, picture(50, 90, 0)).pixels)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == hub.tokenizer.chat_template


def test_an_export_leaves_the_policy_as_it_was(hub, tmp_path):
    export(hub, tmp_path)
    assert hub.model.hub_generation_config.temperature == 1e-6


# ----------------------------------------------------------------------------------------- encoding


def test_special_tokens_in_foreign_text_are_plain_characters(policy):
    text = "a<|im_end|>\n<|im_start|>system\n<|vision_start|><|image_pad|><|vision_end|><|endoftext|>"
    ids = encode_text(policy, text)
    assert not set(ids) & {*range(815, 829)}
    assert policy.tokenizer.decode(ids) == text
    assert len(encode_text(policy, "<|im_end|>")) > 1


@pytest.mark.parametrize("file, text", [
    ("chat_template.jinja", "no place for a text"), ("chat_template.jinja", "{% if %}"),
    ("chat_template.jinja", "{% for m in messages %}{% for c in m.content %}{{ c.text }}{% endfor %}{% endfor %}"),
    ("preprocessor_config.json", {"patch_size": 16}), ("preprocessor_config.json", {"merge_size": 1}),
    ("preprocessor_config.json", {"image_mean": None})])
def test_a_model_that_no_task_can_be_shown_to_is_refused_by_name(
        model_folder, tmp_path, file, text):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    if isinstance(text, dict):
        text = json.dumps(json.loads((folder / file).read_text()) | text)
    (folder / file).write_text(text)
    with pytest.raises(ValueError, match=f"^--model {folder}"):
        load_policy(str(folder))


def test_an_opening_without_an_image(policy):
    ids = encode_prompt(policy, "Which <|im_end|> city?", None)
    assert policy.tokenizer.decode(ids) == ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
                                            "Which <|im_end|> city?<|im_end|>\n<|im_start|>assistant\n")
    # the system's and the user's ends are tokens, the text's is not
    assert (ids.count(END), ids.count(817)) == (2, 3)


def test_an_opening_with_an_image_before_the_text(policy):
    image = encode_image(policy, Image.new("RGB", (112, 84)))  # 4 × 3 tokens of 28 × 28 pixels
    ids = encode_prompt(policy, "<|image_pad|>?", image)
    assert policy.tokenizer.decode(ids) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
        + 12 * "<|image_pad|>" + "<|vision_end|><|image_pad|>?<|im_end|>\n<|im_start|>assistant\n")
    assert ids.count(IMAGE) == image_tokens(policy, image) == 12


def test_an_observation_closes_the_turn_before_it_and_opens_the_next(policy):
    ids = encode_observation(policy, "<information> <|im_start|> </information>", None)
    assert policy.tokenizer.decode(ids) == ("\n<|im_start|>user\n<information> <|im_start|> </information><|im_end|>\n"
                                            "<|im_start|>assistant\n")
    assert (ids.count(817), ids.count(END)) == (2, 1)


def test_an_observation_with_an_image(policy):
    ids = encode_observation(policy, "Done.", encode_image(policy, Image.new("RGB", (56, 84))))
    assert policy.tokenizer.decode(ids) == (
        "\n<|im_start|>user\n<|vision_start|>" + 6 * "<|image_pad|>"
        + "<|vision_end|>Done.<|im_end|>\n<|im_start|>assistant\n")
    assert ids.count(IMAGE) == 6


def test_a_conversation_in_pieces_is_the_chat_template_of_the_whole(policy):
    template = policy.tokenizer.apply_chat_template([{"role": "user", "content": "Which?"},
                                                     {"role": "assistant",
                                                      "content": "<search> x </search>"},
                                                     {"role": "user", "content": "Found."}],
                                                    tokenize=False, add_generation_prompt=True)
    pieces = (encode_prompt(policy, "Which?", None) + encode_text(policy, "<search> x </search>")
              + [END] + encode_observation(policy, "Found.", None))
    assert policy.tokenizer.decode(pieces) == template


def test_a_white_picture_in_numbers(policy):
    image = encode_image(policy, Image.new("RGB", (56, 84), "white"))
    assert image.grid == (1, 6, 4)  # time, height, width in patches of 14 pixels
    assert image.pixels.shape == (24, 1176) and image.pixels.dtype == torch.float32
    # a channel holds 2 frames of 14 × 14; (1 - mean) / std of CLIP
    red, green, blue = image.pixels[0].reshape(3, 392)
    for channel, value in ((red, 1.930336), (green, 2.074884), (blue, 2.145897)):
        assert torch.allclose(channel, torch.tensor(value), atol=1e-5)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "LA", "CMYK"])
def test_pictures_of_any_mode_are_encoded_as_their_rgb(policy, mode):
    image = picture(60, 90, 3).convert(mode)
    assert encode_image(
        policy, image).pixels.equal(encode_image(policy, image.convert("RGB")).pixels)
    assert encode_image(policy, image).grid == (1, 6, 4)


@pytest.mark.parametrize("size, grid", [
    ((56, 56), (1, 4, 4)), ((1, 1), (1, 4, 4)), ((20, 100), (1, 8, 2)), ((69, 71), (1, 6, 4)),
    ((448, 896), (1, 64, 32)),  # 401,408 pixels, just within
    ((900, 900), (1, 44, 44)), ((4000, 1000), (1, 22, 90))])  # 616 × 616 and 1260 × 308
def test_pictures_are_resized_to_multiples_of_28_within_the_default_bounds(policy, size, grid):
    assert encode_image(policy, Image.new("RGB", size)).grid == grid


@pytest.mark.parametrize("layout", ["model_folder", "hub_folder"])
def test_the_bounds_on_pixels_hold_whatever_the_folder_says(layout, request):
    narrow = load_policy(str(request.getfixturevalue(layout)), min_pixels=80 * 80, max_pixels=120
                         * 120)
    assert encode_image(narrow, Image.new("RGB", (300, 300))).grid == (1, 8, 8)
    assert encode_image(narrow, Image.new("RGB", (30, 30))).grid == (1, 6, 6)


def test_the_default_bounds_hold_for_a_folder_of_the_hub(hub):
    assert encode_image(hub, Image.new("RGB", (900, 900))).grid == (1, 44, 44)


# ---------------------------------------------------------------------------------------- positions


@pytest.mark.parametrize("side, start", [("left", 3), ("right", 0)])
def test_positions_of_examples_worked_by_hand(policy, side, start):
    # Three words, an image of 2 × 2 tokens, two words. An image advances the clock by its longer
    # side.
    square = Row([1, 2, 3, IMAGE, IMAGE, IMAGE, IMAGE, 4, 5],
                 [EncodedImage(torch.zeros(16, 1176), (1, 4, 4))])
    # One word, an image one token high and three wide, a word, the same on end, a word. Twelve
    # tokens.
    twice = Row([1, IMAGE, IMAGE, IMAGE, 2, IMAGE, IMAGE, IMAGE, 3, 4, 5, 6],
                [EncodedImage(torch.zeros(12, 1176), (1, 2, 6)), EncodedImage(torch.zeros(12, 1176), (1, 6, 2))])
    inputs = model_inputs(policy, [square, twice], side)
    assert inputs["position_ids"].shape == (3, 2, 12)
    assert inputs["position_ids"][:, 0, start:start + 9].tolist() == [
        # 1  2  3  image...... 4  5
        [0, 1, 2, 3, 3, 3, 3, 5, 6],  # time
        [0, 1, 2, 3, 3, 4, 4, 5, 6],  # height
        [0, 1, 2, 3, 4, 3, 4, 5, 6]]  # width
    assert inputs["position_ids"][:, 1].tolist() == [
        [0, 1, 1, 1, 4, 5, 5, 5, 8, 9, 10, 11],
        [0, 1, 1, 1, 4, 5, 6, 7, 8, 9, 10, 11],
        [0, 1, 2, 3, 4, 5, 5, 5, 8, 9, 10, 11]]


def test_the_inputs_of_a_padded_batch(policy):
    image = EncodedImage(torch.ones(16, 1176), (1, 4, 4))
    rows = [Row([7]), Row([8, IMAGE, IMAGE, IMAGE, IMAGE], [image])]
    left, right = model_inputs(policy, rows, "left"), model_inputs(policy, rows, "right")
    assert left["input_ids"].tolist() == [[PAD, PAD, PAD, PAD, 7], [8, IMAGE, IMAGE, IMAGE, IMAGE]]
    assert right["input_ids"].tolist() == [[7, PAD, PAD, PAD, PAD], [8, IMAGE, IMAGE, IMAGE, IMAGE]]
    assert left["attention_mask"].tolist() == [[0, 0, 0, 0, 1], [1, 1, 1, 1, 1]]
    assert right["attention_mask"].tolist() == [[1, 0, 0, 0, 0], [1, 1, 1, 1, 1]]
    assert left["image_grid_thw"].tolist() == [
        [1, 4, 4]] and left["pixel_values"].shape == (16, 1176)


def test_images_follow_the_order_of_the_sequences(policy):
    images = [EncodedImage(torch.full((4 * n, 1176), float(n)), (1, 2, 2 * n)) for n in (1, 2, 3)]
    rows = [Row([IMAGE] * 3 + [5] + [IMAGE], [images[2], images[0]]), Row([5]),
            Row([IMAGE] * 2, [images[1]])]
    inputs = model_inputs(policy, rows, "right")
    assert inputs["image_grid_thw"].tolist() == [[1, 2, 6], [1, 2, 2], [1, 2, 4]]
    assert inputs["pixel_values"][:, 0].tolist() == [3.0] * 12 + [1.0] * 4 + [2.0] * 8


def test_a_batch_without_images_has_no_pixels_and_counts_its_positions(policy):
    inputs = model_inputs(policy, [Row([5, 6, 7]), Row([5])], "left")
    assert set(inputs) == {"input_ids", "attention_mask", "position_ids"}
    assert inputs["position_ids"][:, 0].tolist() == [[0, 1, 2]] * 3
    assert inputs["position_ids"][:, 1, 2].tolist() == [0] * 3


@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_in_a_batch_are_those_of_the_sequence_alone(hub, plain, rows, side):
    inputs = model_inputs(hub, [*rows.values()], side)
    for b, row in enumerate(rows.values()):
        ids = torch.tensor([row.ids])
        grids = torch.tensor([i.grid for i in row.images]) if row.images else None
        alone, _ = plain.model.get_rope_index(ids, (ids == IMAGE).int(), image_grid_thw=grids)
        assert inputs["position_ids"][:, b, inputs["attention_mask"][b].bool()].equal(alone[:, 0])


# ----------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("names",
                         [["text"], ["image"], ["images"], ["long", "image", "text", "images",
                                                            "text"]], ids="+".join)
def test_tokens_are_sampled_from_the_distribution_of_the_plain_model(hub, plain, rows, names, temperature):
    torch.manual_seed(0)
    batch = [rows[name] for name in names]
    for row, (ids, logps) in zip(batch, sample(hub, batch, 8, temperature),
                                 strict=True):
        log_probs = plain_log_probs(plain, Row(row.ids + ids, row.images), temperature)
        expected = log_probs[torch.arange(len(ids)) + len(row.ids) - 1, torch.tensor(ids)]
        assert len(ids) == len(logps) == 8 or ids[-1] == END
        assert torch.allclose(torch.tensor(logps), expected, atol=TOLERANCE)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_samples_are_as_frequent_as_they_are_probable(hub, plain, rows, temperature):
    # The defaults of the hub would draw one token 1,000 times; top-k and top-p would never draw
    # from the last twentieth.
    torch.manual_seed(0)
    row, count = rows["text"], 1000
    drawn = [ids[0] for ids, _ in sample(hub, [row] * count, 1, temperature)]
    chances, order = plain_log_probs(plain, row, temperature)[-1].exp().sort(descending=True)
    # the likeliest first
    group_of = torch.bucketize(chances.cumsum(0), torch.tensor([0.25, 0.5, 0.75, 0.95]))
    for group in range(5):
        chance = chances[group_of == group].sum().item()
        ids = set(order[group_of == group].tolist())
        spread = math.sqrt(count * chance * (1 - chance))
        # 4 sigma: 1 in 16,000
        assert abs(sum(i in ids for i in drawn) - count * chance) < 4 * spread


def test_samples_of_one_prompt_differ_and_a_seed_repeats_them(hub, rows):
    def seeded(seed):
        torch.manual_seed(seed)
        return sample(hub, [rows["image"]] * 8, 8, 1.0)
    first = seeded(0)
    assert len({tuple(ids) for ids, _ in first}) == 8
    assert seeded(0) == first
    assert seeded(1) != first


def test_a_temperature_too_small_to_divide_by_is_greedy(hub, rows):
    greedy, nearly = (sample(hub, [rows["text"], rows["image"]], 6, t) for t in (0.0, 1e-46))
    assert greedy == nearly


def test_temperature_zero_takes_the_likeliest_token_and_reports_log_probs_at_one(hub, plain, rows):
    for row, (ids, logps) in zip(rows.values(), sample(hub, [*rows.values()], 6, 0.0)):
        log_probs = plain_log_probs(plain, Row(row.ids + ids, row.images))[len(row.ids) - 1:-1]
        assert log_probs.argmax(dim=1).tolist() == ids
        assert torch.allclose(torch.tensor(logps), log_probs.max(dim=1).values, atol=TOLERANCE)


def test_a_row_is_sampled_among_others_as_alone(hub, rows):
    batch = [rows[name] for name in ("long", "text", "images", "text", "image")]
    together, alone = sample(hub, batch, 4, 0.0), [sample(hub, [row], 4, 0.0)[0] for row in batch]
    assert [ids for ids, _ in together] == [ids for ids, _ in alone]
    assert torch.allclose(torch.tensor([p for _, p in together]),
                          torch.tensor([p for _, p in alone]), atol=TOLERANCE)


@pytest.fixture
def biased(hub_folder):
    """A policy of one's own whose head has a bias, zero so far."""
    policy = load_policy(str(hub_folder))
    policy.model.lm_head.bias = torch.nn.Parameter(torch.zeros(V_PADDED))
    return policy


@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_no_special_token_is_sampled_even_where_it_is_the_likeliest(biased, hub, rows, temperature):
    with torch.no_grad():
        biased.model.lm_head.bias[SUPPRESSED] = 100.0  # 100 nats ahead of every other
        biased.model.lm_head.bias[IMAGE] = 200.0
    results = []
    for policy in (biased, hub):
        torch.manual_seed(0)
        results.append(sample(policy, [rows["text"], rows["image"]] * 4, 8, temperature))
    assert not {i for ids, _ in results[0] for i in ids} & {*range(816, 832)}
    # nor do they draw chance away from the others
    assert [ids for ids, _ in results[0]] == [ids for ids, _ in results[1]]
    for (_, logps), (_, expected) in zip(*results):
        assert logps == pytest.approx(expected, abs=TOLERANCE)


def test_a_row_ends_with_its_end_token_while_others_go_on(biased, rows):
    torch.manual_seed(0)
    with torch.no_grad():
        biased.model.lm_head.bias[END] = 5.0
    results = sample(biased, [rows["text"], rows["image"]] * 8, 10, 1.0)
    lengths = {len(ids) for ids, _ in results}
    # some end soon, some never
    assert min(lengths) <= 4 and max(lengths) == 10 and len(lengths) > 3
    for row, (ids, logps) in zip([rows["text"], rows["image"]] * 8, results):
        assert END not in ids[:-1] and PAD not in ids
        assert ids[-1] == END or len(ids) == 10
        log_probs = plain_log_probs(biased.model, Row(row.ids + ids, row.images))
        expected = log_probs[torch.arange(len(ids)) + len(row.ids) - 1, torch.tensor(ids)]
        # the end token's own among them
        assert torch.allclose(torch.tensor(logps), expected, atol=TOLERANCE)


class Growing(SimpleNamespace):
    """A sequence that is appended to between turns."""

    def __init__(self, row):
        super().__init__(ids=list(row.ids), images=list(row.images), action_mask=[0] * len(row.ids))

    def append(self, ids, images=()):
        self.ids, self.images, self.action_mask = self.ids + ids, self.images + [*images], self.action_mask + [1] * len(ids)


@pytest.mark.parametrize("end_bias", [0.0, 5.0])  # the same length for all, or ragged
def test_turns_are_sampled_as_from_the_whole_sequence(biased, rows, end_bias, monkeypatch):
    """Three turns of two groups with observations of unlike lengths, new images, rows that leave for good, and rows that
    leave until their next turn: sampled from the distribution that a full encoding gives. Logits to 1e-4."""
    policy, plain, sizes = biased, biased.model, []
    monkeypatch.setattr("model.draw", lambda logits, *args: sizes.append(len(logits))
                        or draw(logits, *args))
    with torch.no_grad():
        policy.model.lm_head.bias[END] = end_bias
    torch.manual_seed(0)
    live = [Growing(rows[name]) for name in ["image"] * 3 + ["text"] * 3]
    checked = 0
    new_images = [encode_image(policy, picture(56 + 28 * i, 56, 10 + i)) for i in range(3)]
    for turn in range(3):
        for i, (row, (ids, logps)) in enumerate(zip(live, sample(policy, live, 9, 1.0),
                                                    strict=True)):
            log_probs = plain_log_probs(plain, Row(row.ids + ids, row.images))
            expected = log_probs[torch.arange(len(ids)) + len(row.ids) - 1, torch.tensor(ids)]
            assert torch.allclose(torch.tensor(logps), expected, atol=TOLERANCE)
            checked += len(ids)
            image = new_images[i % 3] if (i + turn) % 2 else None
            row.append(ids)
            row.append(encode_observation(policy, "Look. " * i, image), [image]
                       * (image is not None))
        live = live[:1] + live[2:] if turn == 0 else live[1:3]  # then a whole group leaves
    changes = [size for size, _ in groupby(sizes)]
    if end_bias:  # half of the rows left in mid-turn, and came back
        assert changes[:3] == [6, 3, 5] and checked < 9 * (6 + 5 + 2)
    else:
        assert sizes == [6] * 9 + [5] * 9 + [2] * 9 and checked == 9 * (6 + 5 + 2)


def test_prompts_of_equal_text_but_other_images_are_sampled_apart(hub, plain):
    images = [encode_image(hub, picture(56, 56, seed)) for seed in (1, 2)]
    live = [Row(encode_prompt(hub, "Which?", image), [image]) for image in images]
    assert live[0].ids == live[1].ids
    torch.manual_seed(0)
    for row, (ids, logps) in zip(live, sample(hub, live, 5, 1.0), strict=True):
        log_probs = plain_log_probs(plain, Row(row.ids + ids, row.images))
        expected = log_probs[torch.arange(len(ids)) + len(row.ids) - 1, torch.tensor(ids)]
        assert torch.allclose(torch.tensor(logps), expected, atol=TOLERANCE)


def test_an_interrupted_turn_ends_at_its_next_token(hub, rows):
    asked = iter([False, False, True, True])
    [(ids, logps)] = sample(hub, [rows["text"]], 50, 1.0, lambda: next(asked))
    assert len(ids) == len(logps) == 3


def test_a_prompt_is_encoded_once_a_group_and_rows_that_ended_leave_the_cache(
        biased, rows, monkeypatch):
    with torch.no_grad():
        biased.model.lm_head.bias[END] = 5.0
    torch.manual_seed(0)
    live = [Growing(rows[name]) for name in ["image"] * 4 + ["text"] * 4]
    encoded, kept, forward = [], [], biased.model.model.forward

    def counted(*args, **inputs):
        encoded.append(tuple(inputs["input_ids"].shape))
        output = forward(*args, **inputs)
        cache = inputs.get("past_key_values") or inputs["cache"]  # its name from transformers 5.24 on
        kept.append((len(inputs["input_ids"]), len(cache.layers[0].keys)))
        return output
    monkeypatch.setattr(biased.model.model, "forward", counted)
    sample(biased, live, 40, 1.0)
    longest = max(len(rows["image"].ids), len(rows["text"].ids)) - 1
    assert encoded[0] == (2, longest)
    assert all(ids == cached for ids, cached in kept)
    sizes = [size for size, _ in groupby(ids for ids, _ in kept[1:])]
    assert len(sizes) > 1 and sizes[0] == 8
    assert all(2 * after <= before for before, after in zip(sizes, sizes[1:]))


# ------------------------------------------------------------------------------------------ scoring


def packed(policy, batch, masks=None):
    """Rows as a batch. Without masks those that are scored have gaps, as of several turns: every token whose place in its
    own row is 2 to 5 modulo 7."""
    masks = masks or [[int(i % 7 in (2, 3, 4, 5) and row.ids[i] < 816) for i in range(len(row.ids))]
                      for row in batch]
    rollouts = [SimpleNamespace(ids=row.ids, images=row.images, action_mask=mask, logps=[0.0]
                                * len(mask)) for row, mask in zip(batch, masks, strict=True)]
    return collate(policy, rollouts, [0.0] * len(batch))


def test_threads_give_the_same_gradient_each_time(policy, image):
    """16 samples of a prompt meet at its last token, where the gradients of their first ones are
    added up.
    """
    shown, generator = encode_image(policy, image), torch.Generator().manual_seed(0)
    prompt = encode_prompt(policy, "What is on the sign?", shown)
    samples = torch.randint(0, 700, (16, 40), generator=generator).tolist()
    rollouts = [SimpleNamespace(ids=prompt + ids, images=[shown], action_mask=[0] * len(prompt)
                                + [1] * 40, logps=[0.0] * (len(prompt) + 40)) for ids in samples]
    batch, gradients = collate(policy, rollouts, [0.0] * 16), []
    torch.set_num_threads(4)
    for _ in range(8):
        policy.model.zero_grad()
        action_logps(policy, batch, 1.0)[0].sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in policy.model.parameters()]))
    torch.set_num_threads(1)
    policy.model.zero_grad()
    assert all(torch.equal(gradients[0], other) for other in gradients[1:])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("names", [["text"], ["images"], ["image", "long", "text", "images"],
                                   ["long", "text"], ["images", "images", "text", "text"]],
                         ids="+".join)
@torch.no_grad()
def test_scores_are_the_log_probs_of_the_plain_model(hub, plain, rows, names, temperature):
    batch = [rows[name] for name in names]
    row = packed(hub, batch)
    logps, entropy = action_logps(hub, row, temperature)
    mask = row.action_mask
    assert (logps.shape, entropy.shape, logps.dtype, entropy.dtype) == (
        mask.shape, mask.shape, torch.float32, torch.float32)
    assert logps[~mask].count_nonzero() == entropy[~mask].count_nonzero() == 0
    for b, each in enumerate(batch):
        log_probs = plain_log_probs(plain, each, temperature)[:-1]
        chosen = mask[b, :len(each.ids) - 2]  # the first token that is scored is the third
        assert chosen.sum() > 5
        expected = log_probs.gather(1, torch.tensor(each.ids)[1:, None])[1:, 0][chosen]
        surprise = -(log_probs.exp() * log_probs.clamp(min=-1e9)).sum(dim=1)[1:][chosen]
        # fp32; down to -30
        assert torch.allclose(logps[b, :len(each.ids) - 2][chosen], expected, atol=1e-5, rtol=1e-5)
        assert torch.allclose(entropy[b, :len(each.ids) - 2][chosen], surprise, atol=1e-5,
                              rtol=1e-5)


def test_what_was_sampled_is_scored_the_same(hub, rows):
    torch.manual_seed(0)
    batch = [*rows.values()]
    sampled = sample(hub, batch, 12, 0.9)
    whole = [Row(row.ids + ids, row.images) for row, (ids, _) in zip(batch, sampled)]
    with torch.no_grad():
        row = packed(hub, whole,
                     [[0] * len(row.ids) + [1] * len(ids) for row, (ids, _) in zip(batch, sampled)])
        logps, _ = action_logps(hub, row, 0.9)
    for b, (_, expected) in enumerate(sampled):
        assert torch.allclose(logps[b][row.action_mask[b]], torch.tensor(expected), atol=TOLERANCE)


def test_a_score_does_not_depend_on_what_comes_later(hub, rows):
    short = rows["image"]
    long = Row(short.ids + [5, 6, 7, 8], short.images)
    results = []
    for row in (short, long):
        mask = [int(len(short.ids) - 5 <= i < len(short.ids)) for i in range(len(row.ids))]
        with torch.no_grad():
            results.append(action_logps(hub, packed(hub, [row], [mask]), 1.0)[0][0, :5])
    assert torch.allclose(*results, atol=1e-5)


def plain_gradient(model, batch, masks):
    """Gradients of the sum of the masked tokens' log-probs, row by row, by the plain model."""
    kept = [i for i in range(V_PADDED) if i not in SUPPRESSED]
    for row, mask in zip(batch, masks):
        ids = torch.tensor([row.ids])
        vision = {} if not row.images else {
            "pixel_values": torch.cat([i.pixels for i in row.images]),
            "image_grid_thw": torch.tensor([i.grid for i in row.images]),
            "mm_token_type_ids": (ids == IMAGE).int()}
        # 0 to 815: an id is its own place
        log_probs = model(input_ids=ids, **vision).logits[0, :-1, kept].log_softmax(dim=1)
        chosen = torch.tensor(mask[1:]).bool()
        log_probs[chosen].gather(1, ids[0, 1:][chosen, None]).sum().backward()
    return {name: p.grad for name, p in model.named_parameters()}


def test_the_gradient_of_a_packed_group_is_that_of_the_plain_model_on_each_sample(hub_folder, rows):
    """Two prompts, four samples of the first (one has images of its own, in a second turn), one of
    the other.
    """
    policy, model = load_policy(str(hub_folder)), Qwen2_5_VLForConditionalGeneration.from_pretrained(
        hub_folder, dtype=torch.float32).eval()
    image, text = rows["image"], rows["text"]
    new = encode_image(policy, picture(84, 56, 7))
    observation = encode_observation(policy, "The processed image.", new)
    batch = [
        Row(image.ids + [5, 6, END], image.images), Row(image.ids + [7] * 9 + [END], image.images),
        Row(image.ids + [8, 9, END] + observation + [11, 12, END], image.images + [new]),
        Row(image.ids + [END], image.images), Row(text.ids + [5, 6, END])]
    masks = [[0] * len(image.ids) + [1] * 3, [0] * len(image.ids) + [1] * 10, [0] * len(image.ids)
             + [1] * 3 + [0] * len(observation) + [1] * 3, [0] * len(image.ids) + [1],
             [0] * len(text.ids) + [1] * 3]
    row = packed(policy, batch, masks)
    assert row.segments == [(len(image.ids), [3, 10, 6 + len(observation), 1]),
                            (len(text.ids), [3])]
    assert row.inputs["input_ids"].shape[1] == len(image.ids) + 20 + len(observation) + len(text.ids) + 3
    action_logps(policy, row, 1.0)[0].sum().backward()
    expected = plain_gradient(model, batch, masks)
    for name, mine in policy.model.named_parameters():
        assert expected[name].norm() > 0, name
        # fp32
        assert (mine.grad - expected[name]).norm() <= 1e-5 * expected[name].norm() + 1e-6, name


def test_a_batch_without_images_gives_the_vision_tower_a_gradient_of_zero(model_folder):
    policy = load_policy(str(model_folder))
    action_logps(policy, packed(policy, [Row([5, 6, 7, 8])], [[0, 0, 1, 1]]), 1.0)[0].sum().backward()
    for parameter in policy.model.model.visual.parameters():
        # there is one, for FSDP to reduce
        assert parameter.grad is not None and parameter.grad.count_nonzero() == 0
    assert policy.model.model.language_model.embed_tokens.weight.grad.norm() > 0


def test_gradient_checkpointing_changes_no_score_and_no_gradient(hub_folder, rows):
    results = []
    for checkpointing in (False, True):
        policy = load_policy(str(hub_folder), gradient_checkpointing=checkpointing)
        policy.model.train()
        logps, _ = action_logps(policy, packed(policy, [rows["images"]]), 1.0)
        logps.sum().backward()
        results.append((logps.detach(),
                        torch.cat([p.grad.flatten() for p in policy.model.parameters()])))
    (logps, gradient), (again_logps, again_gradient) = results
    assert torch.allclose(logps, again_logps, atol=1e-6)
    assert (gradient - again_gradient).norm() <= 1e-5 * gradient.norm()


# --------------------------------------------------------------------------------- published shapes

VISION = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
          "patch_size": 14, "in_chans": 3, "spatial_merge_size": 2, "temporal_patch_size": 2,
          "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31]}
TEXT = {"model_type": "qwen2_5_vl", "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "max_position_embeddings": 128000, "rms_norm_eps": 1e-6, "vision_start_token_id": 151652,
        "vision_end_token_id": 151653, "image_token_id": 151655, "video_token_id": 151656}
PUBLISHED = {"3B": TEXT | {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
                           "num_attention_heads": 16, "num_key_value_heads": 2,
                           "vocab_size": 151936, "tie_word_embeddings": True,
                           "vision_config": VISION | {"out_hidden_size": 2048}}, "7B": TEXT
             | {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
                "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
                "tie_word_embeddings": False, "vision_config": VISION | {"out_hidden_size": 3584}}}


@pytest.mark.parametrize("name, parameters", [("3B", 3_754_622_976), ("7B", 8_292_166_656)])
def test_the_published_shapes_have_the_published_number_of_weights(name, parameters):
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig.from_dict(json.loads(json.dumps(PUBLISHED[name]))))
    assert sum(p.numel() for p in model.parameters()) == parameters  # a tied head counts once
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == (name == "3B")
    # What the code reaches into: the layers and blocks that are sharded, the head that scores, the
    # blank image's shape.
    assert len(model.model.language_model.layers) == PUBLISHED[name]["num_hidden_layers"]
    assert len(model.model.visual.blocks) == 32
    assert model.lm_head.weight.shape == (PUBLISHED[name]["vocab_size"],
                                          PUBLISHED[name]["hidden_size"])
    embed = model.model.visual.patch_embed
    assert embed.in_channels * embed.temporal_patch_size * embed.patch_size**2 == 1176


def memory_available():
    """Bytes, or none where the system does not say."""
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return 0


needs_memory = pytest.mark.skipif(
    memory_available() < 10e9,
    reason="needs 10 GB of free memory: two layers of 3B with their " "gradients")


@pytest.mark.thorough
@pytest.mark.parametrize("share", [4, pytest.param(1, marks=needs_memory)])
def test_two_layers_of_3b_learn_from_an_image_of_401_408_pixels(model_folder, tmp_path, share):
    """Layers as wide as published, and a fourth of it with all of the vocabulary."""
    # the tokenizer's
    config = json.loads(json.dumps(PUBLISHED["3B"])) | {"num_hidden_layers": 2,
                                                        "image_token_id": IMAGE}
    config["vision_config"] |= {"depth": 2, "fullatt_block_indexes": [1]}
    for part, names in ((config, ("hidden_size", "intermediate_size", "num_attention_heads")),
                        (config["vision_config"], ("hidden_size", "intermediate_size", "num_heads",
                                                   "out_hidden_size"))):
        part |= {name: part[name] // share for name in names}
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration._from_config(
            Qwen2_5_VLConfig.from_dict(config), dtype=torch.bfloat16)
    torch.manual_seed(0)
    # repeated: half a billion draws would take longer than the test
    noise = (0.02 * torch.randn(1_000_003)).bfloat16()
    def values(name, like):
        if like.ndim == 1:
            return torch.full(like.shape, 0.0 if name.endswith("bias") else 1.0,
                              dtype=torch.bfloat16)
        return noise.repeat(like.numel() // len(noise) + 1)[:like.numel()].reshape(like.shape)
    model.save_pretrained(tmp_path,
                          state_dict={name: values(name,
                                                   p) for name, p in model.named_parameters()})
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
                 "preprocessor_config.json"):
        shutil.copy(model_folder / file, tmp_path)
    policy = load_policy(str(tmp_path), device=torch.device("cpu"))
    shutil.rmtree(tmp_path)  # a gigabyte
    # the hub's
    policy.suppressed = torch.tensor(
        [*range(151643, 151645), *range(151646, 151657), *range(151665, 151936)])

    image = encode_image(policy, picture(896, 448, 0))
    assert (image.grid, image_tokens(policy, image)) == ((1, 32, 64), 512)
    ids = [151644, 872, 198, 151652, *[IMAGE] * 512, 151653, 3838, 30, 151645, 198, 151644, 77091,
           198, 785, 4226, 151645]
    row = packed(policy, [Row(ids, [image])], [[0] * (len(ids) - 3) + [1] * 3])
    logps, entropy = action_logps(policy, row, 1.0)
    logps.sum().backward()
    # With random weights the 151,652 ids left are about equally likely. ln 151,652 = 11.93; logits
    # have a std of 0.9 (0.45 at a fourth) and so take half of its square off the entropy; one log-
    # prob may be off by a few std.
    taken = config["hidden_size"] * 0.02 ** 2 / 2
    assert entropy[0].tolist() == pytest.approx([11.93 - taken] * 3, abs=0.1 / share)
    assert logps[0].tolist() == pytest.approx([-11.93 - taken] * 3, abs=4)
    embedding = policy.model.get_input_embeddings().weight.grad  # embedding and head in one
    for gradient in (embedding, policy.model.model.visual.patch_embed.proj.weight.grad,
                     policy.model.model.visual.blocks[1].mlp.down_proj.weight.grad,
                     policy.model.model.language_model.layers[0].self_attn.q_proj.weight.grad):
        assert 0 < gradient.norm() < math.inf
    assert embedding[100].norm() > 0  # not in the text: the head's share
    assert embedding[151652].norm() > 0  # suppressed in the head, so this is the embedding's share
    # suppressed and not in the text
    assert embedding[151656].norm() == embedding[151900].norm() == 0
