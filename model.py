"""Qwen2.5-VL as a policy: load, encode, shard, generate, score, save.

One path for a hub name, a local folder in the hub's layout and the laptop-size model in data/model. It needs no torchvision:
`AutoProcessor` does, so the tokenizer and the PIL image processor are used by themselves and every `<|image_pad|>` is
expanded here. Four rules, each of them a bug that was seen elsewhere:

- Positions are M-RoPE (time, height, width). They are computed here and passed to every call, in sampling and in scoring:
  without `mm_token_type_ids` the model falls back to 1-D positions and says nothing.
- The law that is sampled is the law that is scored: every sampling field is set, the hub's generation_config.json is put
  aside, and special tokens that a turn cannot hold are taken out of both softmaxes.
- Text of a task or a tool is tokenised with special tokens disabled: `<|im_end|>` in a search result is ten characters.
- Rollouts run without collectives, on parameters gathered once: ranks may take different numbers of turns.

Left out on purpose: other model families, video, LoRA, quantisation, inference engines.

Legend: B rollouts, T tokens, V vocabulary, N patches of all images of a batch.
"""
import os
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from PIL import Image
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from transformers import (AutoTokenizer, GenerationConfig, LogitsProcessor, PreTrainedTokenizerBase, Qwen2_5_VLConfig,
                          Qwen2_5_VLForConditionalGeneration)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from grpo import token_logps

MIN_PIXELS, MAX_PIXELS = 56 * 56, 401_408  # of an image, after resizing; the paper's training uses 401,408
TEXT = "\x00"  # stands for the user's text while the chat template is rendered; no template holds it


class EncodedImage(NamedTuple):
    pixels: torch.Tensor  # (patches, 3·2·14·14) float32, normalised
    grid: tuple[int, int, int]  # (time, height, width) in patches; the language model sees height·width/4 tokens


class Sequence(Protocol):
    """What the model reads: token ids, and one encoded image for each run of `<|image_pad|>` in them."""
    ids: list[int]
    images: list[EncodedImage]


@dataclass
class Policy:
    """A Qwen2.5-VL and what turns text and pictures into its inputs. `load_policy` makes one."""
    model: Qwen2_5_VLForConditionalGeneration
    tokenizer: PreTrainedTokenizerBase
    image_processor: Qwen2VLImageProcessorPil
    device: torch.device
    hub_generation_config: GenerationConfig  # written back on export, never used for sampling
    end_id: int = field(init=False)  # <|im_end|>: ends a turn; sampled and trained on
    image_id: int = field(init=False)  # <|image_pad|>: one for each image token
    suppressed: torch.Tensor = field(init=False)  # (S,) int64 ids that are neither sampled nor scored

    def __post_init__(self):
        self.end_id = self.tokenizer.convert_tokens_to_ids("<|im_end|>")
        self.image_id = self.model.config.image_token_id
        special = {i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        unused = range(len(self.tokenizer), self.model.config.text_config.vocab_size)  # rows the hub pads V with
        self.suppressed = torch.tensor(sorted((special | set(unused)) - {self.end_id}), device=self.device)


# ---------------------------------------------------------------------------------------------------------------- load


def pick_device() -> tuple[torch.device, str]:
    """(device of this process, process-group backend) from what the machine has: one GPU a rank and nccl, or CPU and gloo."""
    if torch.cuda.is_available():
        index = dist.get_node_local_rank(fallback_rank=0)
        torch.cuda.set_device(index)
        return torch.device("cuda", index), "nccl"
    return torch.device("cpu"), "gloo"


def start_ranks() -> None:
    """Join torchrun's process group, or make one of this process alone. CPU ranks share the cores evenly."""
    device, backend = pick_device()
    if "RANK" in os.environ:
        store, rank, size = next(dist.rendezvous("env://"))
        if os.environ.get("GROUP_WORLD_SIZE") == "1":  # torchrun's store outlives a restart, with dead ranks' addresses
            store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if device.type == "cpu":  # more threads than cores make both ranks crawl
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def gather(rows: list) -> list:
    """The rows of all ranks in the order of the ranks, on all of them."""
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, rows)
    return [row for part in parts for row in part]


def all_reduce(values: dict[str, float], op=dist.ReduceOp.SUM) -> dict[str, float]:
    """The same named numbers of all ranks, reduced."""
    tensor = torch.tensor(list(values.values()), dtype=torch.float64, device=pick_device()[0])
    dist.all_reduce(tensor, op)
    return dict(zip(values, tensor.tolist()))


def check_model(name: str) -> None:
    """Raise ValueError, within milliseconds, if `name` is a local folder that cannot be loaded. Hub names pass."""
    folder = Path(name)
    if not folder.is_dir():
        if folder.is_absolute() or name.startswith((".", "data/")) or name.count("/") != 1:
            raise ValueError(f"--model {name}: no such folder (and not a hub name like Qwen/Qwen2.5-VL-3B-Instruct)")
        return
    needed = {"config.json": ["config.json"], "weights": ["model.safetensors", "model.safetensors.index.json"],
              "tokenizer": ["tokenizer.json", "vocab.json"], "image processor": ["preprocessor_config.json"]}
    for what, names in needed.items():
        if not any((folder / n).is_file() for n in names):
            raise ValueError(f"--model {name}: the folder has no {what} ({' or '.join(names)}); "
                             "give a folder written by save_pretrained, or a hub name")


def load_policy(name: str, *, device: torch.device | None = None, shard: bool = False, gradient_checkpointing: bool = False,
                min_pixels: int = MIN_PIXELS, max_pixels: int = MAX_PIXELS) -> Policy:
    """Load `name`, a hub name or a local folder in the hub's layout.

    shard=False: one whole copy, to sample and evaluate: bf16 on a GPU, fp32 on a CPU. shard=True (needs a process group):
    FSDP2 over all ranks, fp32 masters, bf16 compute on GPUs. min_pixels and max_pixels bound each image after resizing.
    Raises ValueError for a folder that is not a Qwen2.5-VL.
    """
    check_model(name)
    device = device or pick_device()[0]
    config = Qwen2_5_VLConfig.from_pretrained(name)
    if config.model_type != "qwen2_5_vl":
        raise ValueError(f"--model {name}: model_type is {config.model_type!r}, this code trains 'qwen2_5_vl'")
    tokenizer = AutoTokenizer.from_pretrained(name)
    if tokenizer.chat_template is None:
        raise ValueError(f"--model {name}: the tokenizer has no chat template (tokenizer_config.json or chat_template.jinja)")
    # Not by `size=`: the hub's preprocessor_config.json has min_pixels and max_pixels, which would win over it in silence.
    image_processor = Qwen2VLImageProcessorPil.from_pretrained(name, min_pixels=min_pixels, max_pixels=max_pixels)
    if shard:
        model, hub_generation_config = _load_sharded(name, config, device)
    else:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(name, dtype=dtype).to(device)
        hub_generation_config = model.generation_config
    if gradient_checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    model.generation_config = GenerationConfig()  # the hub's defaults (temperature 1e-6, penalty 1.05) must not leak
    model.action_logps = types.MethodType(_action_logps, model)
    if shard:
        register_fsdp_forward_method(model, "action_logps")  # FSDP gathers the root's parameters around it as for forward
    return Policy(model.eval(), tokenizer, image_processor, device, hub_generation_config)


def shard_model(model: Qwen2_5_VLForConditionalGeneration, device: torch.device) -> None:
    """FSDP2 in place: each decoder layer, each vision block, then the root with what is left (embeddings, merger, head)."""
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    options = {"mp_policy": half} if device.type == "cuda" else {}
    for layer in [*model.model.language_model.layers, *model.model.visual.blocks]:
        fully_shard(layer, **options)
    fully_shard(model, **options)


def _load_sharded(name, config, device):
    """Build on the meta device, shard, then spread rank 0's weights: no rank but 0 ever holds the whole model."""
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=torch.float32)
    shard_model(model, device)
    model.to_empty(device=device)
    model.tie_weights()  # to_empty gives tied parameters (3B: head = embedding) storages of their own
    weights, rest = {}, [None, None]
    if dist.get_rank() == 0:
        whole = Qwen2_5_VLForConditionalGeneration.from_pretrained(name, dtype=torch.float32)
        weights, rest = whole.state_dict(), [dict(whole.named_buffers()), whole.generation_config]
    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    dist.broadcast_object_list(rest, src=0)  # rotary frequencies are buffers outside the state dict
    for buffer_name, value in rest[0].items():
        model.get_buffer(buffer_name).copy_(value)
    with torch.no_grad():  # FSDP sets itself up in the root's first forward, but generate begins with the vision tower
        model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=device))
        model.reshard()  # the root stays whole after a forward; an optimizer must be given its shards
    return model, rest[1]


def export(policy: Policy, folder: str | Path) -> None:
    """Write a Hugging Face folder that `from_pretrained` opens with nothing of ours. Called by all ranks, rank 0 writes."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(policy.model, options=options)  # a collective; empty but on rank 0
    if dist.is_initialized() and dist.get_rank() != 0:
        return
    if policy.model.config.tie_word_embeddings:  # gathered from shards it has a storage of its own, and would be written twice
        weights.pop("lm_head.weight")
    with torch.device("meta"):  # save_pretrained of an FSDP module would write the name of FSDP's class into config.json
        shell = Qwen2_5_VLForConditionalGeneration._from_config(policy.model.config)
    shell.generation_config = policy.hub_generation_config
    shell.save_pretrained(folder, state_dict=weights)
    policy.tokenizer.save_pretrained(folder)
    policy.image_processor.save_pretrained(folder)


# -------------------------------------------------------------------------------------------------------------- encode


def encode_text(policy: Policy, text: str) -> list[int]:
    """Token ids of text that is not ours: special tokens in it are plain characters, so it cannot forge a turn or an image."""
    return policy.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def encode_image(policy: Policy, image: Image.Image) -> EncodedImage:
    """Resize to a multiple of 28 pixels within the policy's bounds, normalise, cut into patches of 14 pixels."""
    encoded = policy.image_processor(images=[image.convert("RGB")], return_tensors="pt")
    return EncodedImage(encoded["pixel_values"], tuple(encoded["image_grid_thw"][0].tolist()))


def image_tokens(policy: Policy, image: EncodedImage) -> int:
    """Number of `<|image_pad|>` tokens of an image: its patches over the merge size squared (4)."""
    return image.grid[0] * image.grid[1] * image.grid[2] // policy.image_processor.merge_size**2


def encode_prompt(policy: Policy, text: str, image: EncodedImage | None) -> list[int]:
    """Ids of the opening: system message, user turn with the image (if any) before the text, header of the assistant."""
    content = [{"type": "image"}] * (image is not None) + [{"type": "text", "text": TEXT}]
    rendered = policy.tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False,
                                                    add_generation_prompt=True)
    return _fill(policy, rendered, text, image)


def encode_observation(policy: Policy, text: str, image: EncodedImage | None) -> list[int]:
    """Ids of a user turn after an action: the newline that follows `<|im_end|>`, the turn, the next assistant header."""
    vision = "<|vision_start|><|image_pad|><|vision_end|>" if image is not None else ""
    return _fill(policy, f"\n<|im_start|>user\n{vision}{TEXT}<|im_end|>\n<|im_start|>assistant\n", text, image)


def _fill(policy, rendered, text, image):
    """Tokenise a rendered template whose only foreign part is TEXT, and expand its `<|image_pad|>`."""
    before, after = (policy.tokenizer(part, add_special_tokens=False)["input_ids"] for part in rendered.split(TEXT))
    ids = before + encode_text(policy, text) + after
    if image is None:
        return ids
    at = ids.index(policy.image_id)
    return ids[:at] + [policy.image_id] * image_tokens(policy, image) + ids[at + 1:]


def model_inputs(policy: Policy, sequences: list[Sequence], side: str) -> dict[str, torch.Tensor]:
    """Pad sequences on `side` ("left" to sample, "right" to score) and give every token its M-RoPE position.

    Returns input_ids, attention_mask (B, T), position_ids (3, B, T) int64, and, if there is any image, pixel_values
    (N, 1176) and image_grid_thw (images, 3), in the order of the sequences.
    """
    length = max(len(s.ids) for s in sequences)
    pad = policy.tokenizer.pad_token_id
    rows, masks = [], []
    for s in sequences:
        filler, blank = [pad] * (length - len(s.ids)), [0] * (length - len(s.ids))
        rows.append(filler + s.ids if side == "left" else s.ids + filler)
        masks.append(blank + [1] * len(s.ids) if side == "left" else [1] * len(s.ids) + blank)
    ids, mask = torch.tensor(rows), torch.tensor(masks)  # (B, T)
    images = [image for s in sequences for image in s.images]
    grids = torch.tensor([image.grid for image in images]) if images else None  # (images, 3)
    positions, _ = policy.model.model.get_rope_index(ids, (ids == policy.image_id).int(), image_grid_thw=grids,
                                                     attention_mask=mask)  # (3, B, T)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    if images:
        inputs |= {"pixel_values": torch.cat([image.pixels for image in images]), "image_grid_thw": grids}
    return {name: tensor.to(policy.device) for name, tensor in inputs.items()}


# ------------------------------------------------------------------------------------------------------------ generate


@contextmanager
def gathered(policy: Policy) -> Iterator[None]:
    """Inside, every rank holds all parameters and forward passes run no collectives. Entered by all ranks together."""
    modules = [m for m in policy.model.modules() if isinstance(m, FSDPModule)]
    for m in modules:
        m.set_reshard_after_forward(False, recurse=False)
        m.unshard()
    try:
        yield
    finally:
        for m in modules:
            m.set_reshard_after_forward(m is not policy.model, recurse=False)
            m.reshard()


class LogpRecorder(LogitsProcessor):
    """Keeps the log-prob of every sampled token, one step of logits at a time (never steps × B × V)."""

    def __init__(self, temperature: float):
        self.temperature, self.previous, self.steps = temperature, None, []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.take(input_ids[:, -1])
        self.previous = torch.log_softmax(scores.float() / self.temperature, dim=-1)  # (B, V)
        return scores

    def take(self, sampled: torch.Tensor) -> None:
        """Note the log-prob of the ids sampled (B,) from the last logits."""
        if self.previous is not None:
            self.steps.append(self.previous.gather(1, sampled[:, None]).squeeze(1))  # (B,)


@torch.no_grad()
def generate(policy: Policy, sequences: list[Sequence], *, max_new_tokens: int, temperature: float,
             batch_tokens: int) -> list[tuple[list[int], list[float]]]:
    """Sample one turn for every sequence: [(ids with `<|im_end|>` if it was reached, log-probs in nats), ...].

    temperature 0 is greedy (log-probs are then those at temperature 1). One `generate` call for as many rows as
    batch_tokens (rows × (longest + max_new_tokens)) allows. Random numbers come from torch's global generator.
    """
    results = []
    for rows in split_by_tokens(sequences, batch_tokens, extra=max_new_tokens):
        inputs = model_inputs(policy, rows, "left")
        recorder = LogpRecorder(temperature or 1.0)
        law = dict(do_sample=True, temperature=temperature, top_k=0, top_p=1.0) if temperature else dict(do_sample=False)
        config = GenerationConfig(**law, repetition_penalty=1.0, max_new_tokens=max_new_tokens, eos_token_id=policy.end_id,
                                  pad_token_id=policy.tokenizer.pad_token_id, suppress_tokens=policy.suppressed.tolist())
        # synced_gpus would make ranks wait for the longest: parameters are gathered, so nobody has to.
        output = policy.model.generate(**inputs, generation_config=config, logits_processor=[recorder],
                                       synced_gpus=False)  # (B, T + new)
        recorder.take(output[:, -1])
        new = output[:, inputs["input_ids"].shape[1]:].tolist()
        logps = torch.stack(recorder.steps, dim=1).tolist()  # (B, new)
        for ids, row_logps in zip(new, logps):
            length = ids.index(policy.end_id) + 1 if policy.end_id in ids else len(ids)
            results.append((ids[:length], row_logps[:length]))
    return results


def split_by_tokens(sequences: list[Sequence], budget: int, extra: int = 0) -> Iterator[list[Sequence]]:
    """Cut into consecutive runs with rows × (longest + extra) <= budget; a run has at least one row."""
    rows, longest = [], 0
    for s in sequences:
        longest = max(longest, len(s.ids) + extra)
        if rows and longest * (len(rows) + 1) > budget:
            yield rows
            rows, longest = [], len(s.ids) + extra
        rows.append(s)
    if rows:
        yield rows


# --------------------------------------------------------------------------------------------------------------- score


def score(policy: Policy, inputs: dict[str, torch.Tensor], action_mask: torch.Tensor,
          temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-prob of every action token given all tokens before it, and the entropy there. Two (B, T) float32, 0 elsewhere.

    inputs: as from `model_inputs`; action_mask (B, T) bool, False in the first column, which nothing predicts. Entry
    [b, t] belongs to token t and is predicted at position t - 1.
    """
    return policy.model.action_logps(inputs, action_mask, temperature, policy.suppressed)


def _action_logps(model, inputs, action_mask, temperature, suppressed):
    unused = 0.0 if "pixel_values" in inputs else 0 * _blank_features(model.model.visual, inputs["input_ids"].device)
    hidden = model.model(**inputs, use_cache=False).last_hidden_state + unused  # (B, T, H)
    predicts = action_mask[:, 1:]  # (B, T - 1): position t - 1 predicts token t
    values = token_logps(hidden[:, :-1][predicts], model.lm_head.weight, inputs["input_ids"][:, 1:][predicts],
                         temperature=temperature, suppressed=suppressed)
    empty = torch.zeros(action_mask.shape, dtype=torch.float32, device=hidden.device)
    return tuple(empty.masked_scatter(action_mask, v) for v in values)


def _blank_features(visual, device):
    """A pass over one blank image: the other ranks gather the vision blocks, so a batch without images does it too, and in
    the same order (before the language model, and so after it in the backward pass), or the collectives mispair."""
    embed = visual.patch_embed
    patches = torch.zeros(4, embed.in_channels * embed.temporal_patch_size * embed.patch_size**2, device=device)
    return visual(patches.to(visual.dtype), grid_thw=torch.tensor([[1, 2, 2]], device=device)).pooler_output.sum()
