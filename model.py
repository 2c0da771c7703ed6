"""Qwen2.5-VL as a policy: load, encode, shard, generate, score, save.

One path for a hub name, a local folder in the hub's layout and the laptop-size model in data/model. It needs no torchvision:
`AutoProcessor` does, so the tokenizer and the PIL image processor are used by themselves and every `<|image_pad|>` is
expanded here. Four rules, each of them a bug that was seen elsewhere:

- Positions are M-RoPE (time, height, width). They are computed here and passed to every call, in sampling and in scoring:
  without `mm_token_type_ids` the model falls back to 1-D positions and says nothing.
- The law that is sampled is the law that is scored: tokens are drawn here (`Draw`), the hub's generation_config.json is put
  aside, and special tokens that a turn cannot hold are taken out of both softmaxes.
- Text of a task or a tool is tokenised with special tokens disabled: `<|im_end|>` in a search result is ten characters.
- Rollouts run without collectives, on parameters gathered once: ranks may take different numbers of turns.

What the G samples of a prompt share is computed once, in sampling (`Decoder`, which also keeps keys and values over turns) and
in scoring (packed rows, `rollout.collate`): by an attention function of our own, which both set up.

Left out on purpose: other model families, video, LoRA, quantisation, inference engines.

Legend: P prompts, G samples a prompt, B rollouts, T tokens, V vocabulary, H hidden size, N tokens of a packed row.
"""
import os
import types
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from PIL import Image
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from transformers import (AttentionInterface, AttentionMaskInterface, AutoTokenizer, DynamicCache, GenerationConfig,
                          LogitsProcessor, PreTrainedTokenizerBase, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration,
                          StoppingCriteria)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.processing_utils import ProcessorMixin

from grpo import Segments, SharedPrompts, packed_attention, prompt_attention, token_logps
from tools import to_rgb

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
    images: dict = field(default_factory=dict)  # path -> (picture, EncodedImage): read and cut into patches once a run

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
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


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
    """Raise ValueError, within milliseconds, if `name` is a local folder without a Qwen2.5-VL. Hub names pass."""
    folder = Path(name)
    if not folder.is_dir():
        if folder.is_absolute() or name.startswith((".", "data/")) or name.count("/") != 1:
            raise ValueError(f"--model {name}: no such folder (and not a hub name like Qwen/Qwen2.5-VL-3B-Instruct)")
        return
    suffixes = {path.suffix for path in folder.iterdir()}
    for what, is_there in {"config.json": (folder / "config.json").is_file(),
                           "weights (.safetensors or .bin)": suffixes & {".safetensors", ".bin"}}.items():
        if not is_there:
            raise ValueError(f"--model {name}: the folder has no {what}; give a folder written by save_pretrained, "
                             "as RUN/model is, or a hub name")


def _read(from_pretrained, name, **options):
    """`from_pretrained(name)`, whose errors, of many types, become a ValueError that names the model and the way out."""
    try:
        return from_pretrained(name, **options)
    except Exception as error:  # also those of parsers, of the hub and of its network
        why = " ".join(str(error).split())[:400]
        way_out = ("mend the folder, or give one written by save_pretrained" if Path(name).is_dir() else
                   "check the name on huggingface.co and the network; a gated or private model needs `hf auth login`")
        raise ValueError(f"--model {name} cannot be loaded: {type(error).__name__}: {why}; {way_out}") from None


def _read_model(name, dtype):
    """The whole model. `from_pretrained` alone would leave at random values what the files lack."""
    model, found = _read(Qwen2_5_VLForConditionalGeneration.from_pretrained, name, dtype=dtype,
                         ignore_mismatched_sizes=True, output_loading_info=True)
    if wrong := sorted([*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])]):
        raise ValueError(f"--model {name}: {len(wrong)} tensors are absent or of another shape, {wrong[0]} the first; "
                         "mend the folder")
    return model


def load_policy(name: str, *, device: torch.device | None = None, shard: bool = False, gradient_checkpointing: bool = False,
                min_pixels: int = MIN_PIXELS, max_pixels: int = MAX_PIXELS) -> Policy:
    """Load `name`, a hub name or a local folder: all that `from_pretrained` accepts.

    shard=False: one whole copy, to sample and evaluate: bf16 on a GPU, fp32 on a CPU. shard=True (needs a process group):
    FSDP2 over all ranks, fp32 masters, bf16 compute on GPUs. min_pixels and max_pixels bound each image after resizing.
    Raises ValueError, on all ranks, for what is no Qwen2.5-VL or cannot be loaded.
    """
    check_model(name)
    device = device or pick_device()[0]
    config = _read(Qwen2_5_VLConfig.from_pretrained, name)
    model_type = Qwen2_5_VLConfig.get_config_dict(name)[0].get("model_type")  # as it is written; none would become ours
    if model_type != "qwen2_5_vl":
        raise ValueError(f"--model {name}: model_type is {model_type!r}, this code trains 'qwen2_5_vl'")
    tokenizer = _read(AutoTokenizer.from_pretrained, name)
    if tokenizer.chat_template is None:  # older processors keep it in chat_template.json
        tokenizer.chat_template = _read(ProcessorMixin.get_processor_dict, name)[0].get("chat_template")
    template = tokenizer.chat_template
    if template is None or isinstance(template, dict) and "default" not in template:
        raise ValueError(f"--model {name}: there is no chat template (chat_template.jinja, or in tokenizer_config.json)")
    if tokenizer.convert_tokens_to_ids("<|image_pad|>") != config.image_token_id:
        raise ValueError(f"--model {name}: <|image_pad|> is not {config.image_token_id}: the tokenizer is another model's")
    # Not by `size=`: the hub's preprocessor_config.json has min_pixels and max_pixels, which would win over it in silence.
    image_processor = _read(Qwen2VLImageProcessorPil.from_pretrained, name, min_pixels=min_pixels, max_pixels=max_pixels)
    if shard:
        model, hub_generation_config = _load_sharded(name, config, device)
    else:
        model = _read_model(name, torch.bfloat16 if device.type == "cuda" else torch.float32).to(device)
        hub_generation_config = model.generation_config
    if gradient_checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    return Policy(_set_up(model), tokenizer, image_processor, device, hub_generation_config)


def copy_policy(policy: Policy) -> Policy:
    """A second model with the weights that the sharded one has now: each rank copies its shards, nothing is read or sent."""
    model = _empty_shards(policy.model.config, policy.device)
    with torch.no_grad():
        for copy, original in zip(model.parameters(), policy.model.parameters(), strict=True):
            copy.to_local().copy_(original.to_local())
        for copy, original in zip(model.buffers(), policy.model.buffers(), strict=True):
            copy.copy_(original)
    return replace(policy, model=_set_up(model))


def _set_up(model):
    """What every copy needs: our attention, a clean law of sampling, scoring as a method, FSDP ready to generate."""
    AttentionInterface.register("group_attention", _group_attention)
    AttentionMaskInterface.register("group_attention", sdpa_mask)
    model.model.language_model.config._attn_implementation = "group_attention"
    model.generation_config = GenerationConfig()  # the hub's defaults (temperature 1e-6, penalty 1.05) must not leak
    model.action_logps = types.MethodType(_action_logps, model)
    if isinstance(model, FSDPModule):
        register_fsdp_forward_method(model, "action_logps")  # FSDP gathers the root's parameters around it as for forward
        with torch.no_grad():  # FSDP sets itself up in the root's first forward, but generate begins with the vision tower
            model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=model.device))
            model.reshard()  # the root stays whole after a forward; an optimizer must be given its shards
    return model.eval()


def shard_model(model: Qwen2_5_VLForConditionalGeneration, device: torch.device) -> None:
    """FSDP2 in place: each decoder layer, each vision block, then the root with what is left (embeddings, merger, head)."""
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    options = {"mp_policy": half} if device.type == "cuda" else {}
    for layer in [*model.model.language_model.layers, *model.model.visual.blocks]:
        fully_shard(layer, **options)
    fully_shard(model, **options)


def _empty_shards(config, device):
    """A sharded model without weights: no rank ever holds a whole one."""
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=torch.float32)
    shard_model(model, device)
    model.to_empty(device=device)
    model.tie_weights()  # to_empty gives tied parameters (3B: head = embedding) storages of their own
    return model


def _load_sharded(name, config, device):
    """Spread the weights that rank 0 reads."""
    weights, rest, failure = {}, [None, None], []
    if dist.get_rank() == 0:
        try:
            whole = _read_model(name, torch.float32)
            weights, rest = whole.state_dict(), [dict(whole.named_buffers()), whole.generation_config]
        except ValueError as error:
            failure = [str(error)]
    if failure := gather(failure):  # the others would wait for weights
        raise ValueError(failure[0])
    model = _empty_shards(config, device)
    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    dist.broadcast_object_list(rest, src=0)  # rotary frequencies are buffers outside the state dict
    for buffer_name, value in rest[0].items():
        model.get_buffer(buffer_name).copy_(value)
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
    """Token ids of text that is not ours. Special tokens in it are plain characters, so it cannot forge a turn or an image.

    Qwen's eight added tokens that are not special (`<tool_call>`, `<|fim_prefix|>` …) stay single tokens, as in the released
    pipeline; the model may sample them as any word, and no prompt of ours gives them a meaning.
    """
    return policy.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def encode_image(policy: Policy, image: Image.Image) -> EncodedImage:
    """Resize to a multiple of 28 pixels within the policy's bounds, normalise, cut into patches of 14 pixels."""
    encoded = policy.image_processor(images=[to_rgb(image)], return_tensors="pt")
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
    """`token_inputs` and `image_inputs` of sequences, in their order: all that the model reads."""
    return token_inputs(policy, sequences, side) | image_inputs(policy, [image for s in sequences for image in s.images])


def token_inputs(policy: Policy, sequences: list[Sequence], side: str) -> dict[str, torch.Tensor]:
    """Pad sequences on `side` ("left" to sample, "right" to score) and give every token its M-RoPE position.

    Returns input_ids, attention_mask (B, T) and position_ids (3, B, T), all int64.
    """
    length = max(len(s.ids) for s in sequences)
    pad = policy.tokenizer.pad_token_id
    rows, masks = [], []
    for s in sequences:
        filler, blank = [pad] * (length - len(s.ids)), [0] * (length - len(s.ids))
        rows.append(filler + s.ids if side == "left" else s.ids + filler)
        masks.append(blank + [1] * len(s.ids) if side == "left" else [1] * len(s.ids) + blank)
    ids, mask = torch.tensor(rows), torch.tensor(masks)  # (B, T)
    grids = [image.grid for s in sequences for image in s.images]
    positions, _ = policy.model.model.get_rope_index(ids, (ids == policy.image_id).int(), attention_mask=mask,
                                                     image_grid_thw=torch.tensor(grids) if grids else None)  # (3, B, T)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    return {name: tensor.to(policy.device) for name, tensor in inputs.items()}


def image_inputs(policy: Policy, images: list[EncodedImage]) -> dict[str, torch.Tensor]:
    """pixel_values (patches, 1176) and image_grid_thw (images, 3), one image behind the other; nothing if there is none."""
    if not images:
        return {}
    pixels, grids = torch.cat([image.pixels for image in images]), torch.tensor([image.grid for image in images])
    return {"pixel_values": pixels.to(policy.device), "image_grid_thw": grids.to(policy.device)}


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


class Draw(LogitsProcessor):
    """Draws the next token of every row and keeps its log-prob; `generate` takes the only one that it leaves.

    One law in one place: what is never sampled is taken out, then comes the temperature (0: the likeliest token, with its
    log-prob at 1). One uniform number a row is looked up in the cumulative law: exact, and on CPUs V times less work than
    `torch.multinomial`, which draws one for every token of the vocabulary.
    """

    def __init__(self, temperature: float, suppressed: torch.Tensor):
        self.temperature, self.suppressed, self.logps = temperature, suppressed, []  # of each step (B,)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.float().index_fill(1, self.suppressed, float("-inf"))
        logps = torch.log_softmax(scores / (self.temperature or 1.0), dim=1)  # (B, V)
        if self.temperature:
            law = logps.double().exp_().cumsum(dim=1)
            chance = torch.rand(len(law), 1, dtype=law.dtype, device=law.device) * law[:, -1:]
            ids = torch.searchsorted(law, chance, right=True)  # (B, 1), never one of probability 0
        else:
            ids = logps.argmax(dim=1, keepdim=True)
        self.logps.append(logps.gather(1, ids).squeeze(1))
        return torch.full_like(logps, float("-inf")).scatter_(1, ids, 0.0)


class HalfEnded(StoppingCriteria):
    """Breaks a `generate` off once half of its rows have ended their turns: those leave, the others go on in a smaller one."""

    def __init__(self, end_id: int, interrupted: Callable[[], bool]):
        self.end_id, self.interrupted, self.ended = end_id, interrupted, False

    def __call__(self, input_ids: torch.Tensor, scores, **kwargs) -> torch.Tensor:
        self.ended |= input_ids[:, -1] == self.end_id  # (B,)
        return (self.ended.float().mean() >= 0.5).expand(len(input_ids)) | self.interrupted()


@dataclass(eq=False)
class Stream:
    """A sequence that is being sampled, as the decoder knows it; `ids` and `images` make it a `Sequence` of its own."""
    row: Sequence  # the caller's, who appends to it between turns
    prompt: int  # which of the decoder's prompts it begins with
    seen: int  # number of ids that are encoded, in its prompt or beside its `Kept`
    num_images: int  # and of images
    turn: list[int] = field(default_factory=list)  # ids sampled in this turn
    logps: list[float] = field(default_factory=list)

    ids = property(lambda self: self.row.ids + self.turn)
    images = property(lambda self: self.row.images)


class Kept(NamedTuple):
    """Keys and values of B streams for what they hold beyond their prompts."""
    streams: list[Stream]
    filled: torch.Tensor  # (B, S) bool, False at holes
    layers: list[tuple[torch.Tensor, torch.Tensor]]  # (B, key heads, S, d) each

    def pick(self, streams: list[Stream]) -> "Kept":
        """Those of some streams, with the holes closed: tokens move to the right end."""
        rows = [self.streams.index(stream) for stream in streams]
        filled = self.filled[rows]
        order = filled.int().argsort(dim=1, stable=True)[:, filled.shape[1] - int(filled.sum(dim=1).max()):]
        layers = [tuple(x[rows].take_along_dim(order[:, None, :, None], dim=2) for x in layer) for layer in self.layers]
        return Kept(streams, filled.gather(1, order), layers)


def _join(parts: list[Kept]) -> Kept:
    """One below the other, with holes on the left of the shorter ones."""
    width = max(part.filled.shape[1] for part in parts)

    def stacked(tensors, dim):
        pad = torch.nn.functional.pad
        return torch.cat([pad(x, (0, 0) * (x.ndim - 1 - dim) + (width - x.shape[dim], 0)) for x in tensors])
    layers = [tuple(stacked(tensors, 2) for tensors in zip(*layer)) for layer in zip(*(part.layers for part in parts))]
    return Kept(sum((part.streams for part in parts), []), stacked([part.filled for part in parts], 1), layers)


class Decoder:
    """Samples turn after turn for B sequences, those of a prompt side by side. Lives as long as their rollouts.

    Each prompt is encoded once for all sequences that begin with it, up to its last token. What a sequence holds beyond
    that is fed once, and its keys and values are `kept`.
    """

    def __init__(self, policy: Policy, sequences: list[Sequence]):
        """The sequences are prompts, of at least two tokens. Runs the vision tower and one forward pass."""
        self.policy, self.streams, numbers, prompts = policy, [], {}, []
        for s in sequences:
            start = (*s.ids, *map(id, s.images))
            if start not in numbers:
                numbers[start] = len(prompts)
                prompts.append(s)
            self.streams.append(Stream(s, numbers[start], len(s.ids) - 1, len(s.images)))
        inputs = model_inputs(policy, prompts, "left")
        inputs |= {name: inputs[name][..., :-1] for name in ("input_ids", "attention_mask", "position_ids")}
        with torch.no_grad():
            encoded = policy.model.model(**inputs, past_key_values=DynamicCache(config=policy.model.config)).past_key_values
        self.prompts = [(layer.keys, layer.values) for layer in encoded.layers]  # (P, key heads, L, d) each
        self.computed, self.needed = inputs["input_ids"].numel(), int(inputs["attention_mask"].sum())  # tokens, so far
        self.prompt_padding = inputs["attention_mask"][:, None, None] == 0  # (P, 1, 1, L)
        nothing = [tuple(x.new_zeros(len(sequences), x.shape[1], 0, x.shape[3]) for x in layer) for layer in self.prompts]
        self.kept = [Kept(self.streams, torch.zeros(len(sequences), 0, dtype=torch.bool, device=policy.device), nothing)]

    @torch.no_grad()
    def sample(self, live: list[Sequence], max_new_tokens: int, temperature: float,
               interrupted: Callable[[], bool] = lambda: False) -> list[tuple[list[int], list[float]]]:
        """One turn for each of `live`: [(ids with `<|im_end|>` if it was reached, log-probs in nats), ...].

        `live` are sequences of the constructor, in their order, that the caller has appended to; those that are missing
        are dropped for good. temperature 0 is greedy (log-probs are then those at temperature 1). Random numbers come from
        torch's global generator. Once `interrupted` says True turns end where they are.
        """
        wanted = set(map(id, live))
        self.streams = [stream for stream in self.streams if id(stream.row) in wanted]
        alive = sorted({stream.prompt for stream in self.streams})
        if len(alive) < len(self.prompts[0][0]):
            self.prompts = [(key[alive], value[alive]) for key, value in self.prompts]
            self.prompt_padding = self.prompt_padding[alive]
        for stream in self.streams:
            stream.prompt, stream.turn, stream.logps = alive.index(stream.prompt), [], []
        kept, self.kept = _join(self.kept).pick(self.streams), []
        while kept.streams:
            kept = self._generate(kept, max_new_tokens, temperature, interrupted)
            going = [s for s in kept.streams if s.turn[-1] != self.policy.end_id and len(s.turn) < max_new_tokens]
            if not going or interrupted():
                break
            self.kept.append(kept.pick([s for s in kept.streams if s not in going]))
            kept = kept.pick(going)
        self.kept.append(kept)
        return [(stream.turn, stream.logps) for stream in self.streams]

    def _generate(self, kept, max_new_tokens, temperature, interrupted):
        """Continue the turns of some streams until half of them have ended theirs; returns what is then kept."""
        inputs = self._unseen_inputs(kept)
        cache = DynamicCache(config=self.policy.model.config)
        for layer, (keys, values) in enumerate(kept.layers):
            cache.update(keys, values, layer)
        draw = Draw(temperature, self.policy.suppressed)
        config = GenerationConfig(do_sample=False, max_new_tokens=max_new_tokens - len(kept.streams[0].turn),
                                  eos_token_id=self.policy.end_id, pad_token_id=self.policy.tokenizer.pad_token_id)
        with self._prompts_shared(kept.streams):
            # synced_gpus would make ranks wait for the longest: parameters are gathered, so nobody has to.
            output = self.policy.model.generate(**inputs, past_key_values=cache, generation_config=config, synced_gpus=False,
                                                logits_processor=[draw],
                                                stopping_criteria=[HalfEnded(self.policy.end_id, interrupted)])
        new = output[:, inputs["input_ids"].shape[1]:]  # (B, steps)
        logps = torch.stack(draw.logps, dim=1).tolist()
        lengths = [ids.index(self.policy.end_id) + 1 if self.policy.end_id in ids else len(ids) for ids in new.tolist()]
        fed = torch.arange(new.shape[1] - 1, device=new.device) < torch.tensor(lengths, device=new.device)[:, None]
        filled = torch.cat([inputs["attention_mask"].bool(), fed], dim=1)  # the last token was sampled, not fed
        self.needed += int(filled.sum()) - int(kept.filled.sum())
        self.computed += inputs["input_ids"].numel() + fed.numel()
        for stream, ids, row_logps, length in zip(kept.streams, new.tolist(), logps, lengths, strict=True):
            stream.seen = len(stream.ids) + min(length, fed.shape[1])
            stream.num_images = len(stream.images)
            stream.turn, stream.logps = stream.turn + ids[:length], stream.logps + row_logps[:length]
        return Kept(kept.streams, filled, [(layer.keys, layer.values) for layer in cache.layers])

    def _unseen_inputs(self, kept):
        """Inputs of `generate`: of each stream what neither its prompt nor what is kept holds, padded on the left."""
        inputs = token_inputs(self.policy, kept.streams, "left")
        unseen = torch.tensor([len(s.ids) - s.seen for s in kept.streams], device=self.policy.device)
        width = int(unseen.max())
        mask = torch.arange(width, device=unseen.device) >= width - unseen[:, None]  # (B, width)
        ids = inputs["input_ids"][:, -width:].masked_fill(~mask, self.policy.tokenizer.pad_token_id)  # no placeholder twice
        images = [image for s in kept.streams for image in s.images[s.num_images:]]
        return {"input_ids": ids, "attention_mask": torch.cat([kept.filled, mask], dim=1).long(),
                "position_ids": inputs["position_ids"][:, :, -width:], **image_inputs(self.policy, images)}

    @contextmanager
    def _prompts_shared(self, streams):
        """Inside, the attention layers of the language model see the prompts of the streams before the cache."""
        group_size = max(Counter(stream.prompt for stream in streams).values())
        taken, slots = Counter(), []
        for stream in streams:
            slots.append(stream.prompt * group_size + taken[stream.prompt])
            taken[stream.prompt] += 1
        dense = slots == [*range(len(self.prompts[0][0]) * group_size)]  # all groups are whole, and stand in order
        slots = None if dense else torch.tensor(slots, device=self.policy.device)
        padding = self.prompt_padding if self.prompt_padding.any() else None
        layers = [layer.self_attn for layer in self.policy.model.model.language_model.layers]
        for layer, (key, value) in zip(layers, self.prompts, strict=True):
            layer.prompts = SharedPrompts(key, value, padding, slots, group_size)
        try:
            yield
        finally:
            for layer in layers:
                layer.prompts = None


def _group_attention(module, query, key, value, attention_mask, scaling, segments=None, **kwargs):
    """Attention of a layer, as transformers calls it: packed with `segments`, sampling inside `_prompts_shared`, or plain."""
    prompts = getattr(module, "prompts", None)
    if segments is not None:
        output = packed_attention(query, key, value, segments, scaling)
    elif prompts is not None:
        output = prompt_attention(query, key, value, attention_mask, prompts, scaling)
    else:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    return output.transpose(1, 2).contiguous(), None  # (B, T, heads, d)


# --------------------------------------------------------------------------------------------------------------- score


class PackedRow(Protocol):
    """B sequences in one row of N tokens without padding, `prompt | sample | … | sample | prompt`; `rollout.Batch` is one.

    T is the longest sample: entry [b, t] of a (B, T) tensor belongs to token t behind the prompt of sequence b.
    """
    inputs: dict[str, torch.Tensor]  # input_ids (1, N), position_ids (3, 1, N) int64, images as `image_inputs` has them
    segments: Segments
    targets: torch.Tensor  # (B, T) int64: the tokens
    predictors: torch.Tensor  # (B, T) int64: where in the row each is predicted, that is, at the token before it
    action_mask: torch.Tensor  # (B, T) bool: which are scored


def score(policy: Policy, row: PackedRow, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-prob of every action token given all tokens before it, and the entropy there. Two (B, T) float32, 0 elsewhere."""
    return policy.model.action_logps(row, temperature, policy.suppressed)


def _action_logps(model, row, temperature, suppressed):
    mask = row.action_mask
    unused = 0.0 if "pixel_values" in row.inputs else 0 * _blank_features(model.model.visual, mask.device)
    # Who sees whom is said by the segments; given a dict, transformers makes no mask of its own.
    hidden = model.model(**row.inputs, attention_mask={"full_attention": None}, segments=row.segments,
                         use_cache=False).last_hidden_state[0] + unused  # (N, H)
    # Not hidden[…]: samples of a group share their first predictor, and threads would add up its gradient in any order.
    hidden = hidden.index_select(0, row.predictors[mask])
    values = token_logps(hidden, model.lm_head.weight, row.targets[mask], temperature=temperature, suppressed=suppressed)
    empty = torch.zeros(mask.shape, dtype=torch.float32, device=hidden.device)
    return tuple(empty.masked_scatter(mask, v) for v in values)


def _blank_features(visual, device):
    """A pass over one blank image: the other ranks gather the vision blocks, so a batch without images does it too, and in
    the same order (before the language model, and so after it in the backward pass), or the collectives mispair."""
    embed = visual.patch_embed
    patches = torch.zeros(4, embed.in_channels * embed.temporal_patch_size * embed.patch_size**2, device=device)
    return visual(patches.to(visual.dtype), grid_thw=torch.tensor([[1, 2, 2]], device=device)).pooler_output.sum()
