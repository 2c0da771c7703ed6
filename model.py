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

What the G samples of a prompt share is computed once: in sampling (`sample` repeats the keys and values of a prompt) and in
scoring (packed rows, `rollout.collate`, by an attention function of our own).

Left out on purpose: other model families, video, LoRA, quantisation, inference engines.

Legend: P prompts, G samples a prompt, B rollouts, T tokens, V vocabulary, H hidden size, N tokens of a packed row.
"""
import os
import types
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import groupby
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

from grpo import Segments, packed_attention, token_logps
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
    action_mask: list[int]  # 1 where an id was sampled: all before the first 1 is the prompt


class Prompt(NamedTuple):
    """What a sequence begins with. Two are equal if their ids are, and their images are the very same objects."""
    ids: list[int]
    images: list[EncodedImage]

    def __eq__(self, other) -> bool:
        return other is not None and self.ids == other.ids and [*map(id, self.images)] == [*map(id, other.images)]


def prompt_of(policy: "Policy", sequence: Sequence) -> Prompt:
    """The prompt of a sequence: all of it where nothing was sampled yet."""
    length = sequence.action_mask.index(1) if 1 in sequence.action_mask else len(sequence.ids)
    ids = sequence.ids[:length]
    return Prompt(ids, sequence.images[:ids.count(policy.model.config.vision_start_token_id)])


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
        if folder.is_absolute() or name.startswith(".") or name.count("/") != 1 or folder.parent.is_dir():
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
    policy = Policy(_set_up(model), tokenizer, image_processor, device, hub_generation_config)
    _check_prompts(policy, name)
    return policy


def _check_prompts(policy: Policy, name: str) -> None:
    """ValueError if no task could be shown to the model: a chat template that drops text or image, another patch size."""
    vision, processor = policy.model.config.vision_config, policy.image_processor
    cut = (processor.patch_size, processor.merge_size, processor.temporal_patch_size)
    if cut != (vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size):
        raise ValueError(f"--model {name}: its image processor cuts patches, merges and frames by {cut}, the model otherwise")
    try:
        encode_prompt(policy, "?", None)
        encode_prompt(policy, "?", encode_image(policy, Image.new("RGB", (56, 56))))
    except Exception as error:  # of templates and processors, of any kind
        raise ValueError(f"--model {name}: its chat template or image processor cannot make a prompt with a text and an "
                         f"image ({type(error).__name__}: {error}); take the files of the model it was made from") from error


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
    """Stops a `generate` once half of its rows have ended their turns: those leave, the others go on in a smaller batch."""

    def __init__(self, end_id: int, interrupted: Callable[[], bool]):
        self.end_id, self.interrupted, self.ended = end_id, interrupted, False

    def __call__(self, input_ids: torch.Tensor, scores, **kwargs) -> torch.Tensor:
        self.ended |= input_ids[:, -1] == self.end_id  # (B,)
        return (self.ended.float().mean() >= 0.5).expand(len(input_ids)) | self.interrupted()


@torch.no_grad()
def sample(policy: Policy, sequences: list[Sequence], max_new_tokens: int, temperature: float,
           interrupted: Callable[[], bool] = lambda: False, fed: Counter | None = None
           ) -> list[tuple[list[int], list[float]]]:
    """One turn for each of B sequences: [(ids with `<|im_end|>` if it was reached, log-probs in nats), ...].

    A prompt is encoded once for all neighbours that begin with it; its keys and values are then repeated. temperature 0 is
    greedy (log-probs are then those at temperature 1). Random numbers come from torch's global generator. Once
    `interrupted` says True turns end where they are. `fed` counts the tokens that the model is fed, as "all", and those of
    them that are not padding, as "real".
    """
    fed = Counter() if fed is None else fed
    prompts = [prompt_of(policy, sequence) for sequence in sequences]
    cache, mask = _encode_prompts(policy, prompts, fed)  # mask (B, S): 0 at padding
    inputs = _unseen_inputs(policy, sequences, prompts)
    turns, rows = [([], []) for _ in sequences], list(range(len(sequences)))  # rows: the sequences that still write
    while rows:
        new_mask = inputs.pop("attention_mask")  # (B, T), B: rows
        mask = torch.cat([mask, new_mask], dim=1)  # (B, S)
        steps_left = max_new_tokens - len(turns[rows[0]][0])
        ids, logps = _generate(policy, cache, inputs | {"attention_mask": mask}, steps_left, temperature, interrupted)
        for row, row_ids, row_logps in zip(rows, ids.tolist(), logps.tolist(), strict=True):
            length = row_ids.index(policy.end_id) + 1 if policy.end_id in row_ids else len(row_ids)
            turns[row] = turns[row][0] + row_ids[:length], turns[row][1] + row_logps[:length]
            fed["real"] += length - 1  # the last one is sampled, not fed
        steps = ids.shape[1]
        fed["real"] += int(new_mask.sum())
        fed["all"] += new_mask.numel() + len(rows) * (steps - 1)
        going = [i for i, row in enumerate(rows) if turns[row][0][-1] != policy.end_id]
        if steps == steps_left or interrupted():
            break
        cache.batch_select_indices(torch.tensor(going, device=policy.device, dtype=torch.long))
        rows, mask = [rows[i] for i in going], torch.nn.functional.pad(mask[going], (0, steps - 1), value=1)
        inputs = {"input_ids": ids[going, -1:], "attention_mask": torch.ones_like(mask[:, :1]),  # sampled, not yet fed
                  "position_ids": inputs["position_ids"][:, going, -1:] + steps}
    return turns


def _encode_prompts(policy: Policy, prompts: list[Prompt], fed: Counter) -> tuple[DynamicCache, torch.Tensor]:
    """Keys and values of B prompts, up to each one's last token, and their mask, (B, S) int64. Equal neighbours are
    encoded once."""
    groups = [(prompt, len(list(group))) for prompt, group in groupby(prompts)]
    inputs = model_inputs(policy, [prompt for prompt, _ in groups], "left")
    inputs |= {name: inputs[name][..., :-1] for name in ("input_ids", "attention_mask", "position_ids")}
    cache = DynamicCache(config=policy.model.config)
    policy.model.model(**inputs, past_key_values=cache)
    fed.update(real=int(inputs["attention_mask"].sum()), all=inputs["attention_mask"].numel())
    sizes = torch.tensor([size for _, size in groups], device=policy.device)
    cache.batch_select_indices(torch.arange(len(groups), device=policy.device).repeat_interleave(sizes))
    return cache, inputs["attention_mask"].repeat_interleave(sizes, dim=0)


def _unseen_inputs(policy: Policy, sequences: list[Sequence], prompts: list[Prompt]) -> dict[str, torch.Tensor]:
    """What each sequence holds from the last token of its prompt on, padded on the left: input_ids, attention_mask (B, T),
    position_ids (3, B, T), and its images behind the prompt."""
    inputs = token_inputs(policy, sequences, "left")
    unseen = torch.tensor([len(s.ids) - len(p.ids) + 1 for s, p in zip(sequences, prompts)], device=policy.device)
    width = int(unseen.max())
    mask = torch.arange(width, device=policy.device) >= width - unseen[:, None]  # (B, T)
    ids = inputs["input_ids"][:, -width:].masked_fill(~mask, policy.tokenizer.pad_token_id)  # no placeholder twice
    images = [image for s, p in zip(sequences, prompts) for image in s.images[len(p.images):]]
    return {"input_ids": ids, "attention_mask": mask.long(), "position_ids": inputs["position_ids"][:, :, -width:],
            **image_inputs(policy, images)}


def _generate(policy: Policy, cache: DynamicCache, inputs: dict[str, torch.Tensor], max_new_tokens: int,
              temperature: float, interrupted: Callable[[], bool]) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, log-probs), (B, steps) each, until half of the rows have ended their turns; what follows an end is padding."""
    draw = Draw(temperature, policy.suppressed)
    config = GenerationConfig(do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=policy.end_id,
                              pad_token_id=policy.tokenizer.pad_token_id)
    # synced_gpus would make ranks wait for the longest: parameters are gathered, so no rank has to.
    output = policy.model.generate(**inputs, past_key_values=cache, generation_config=config, synced_gpus=False,
                                   logits_processor=[draw], stopping_criteria=[HalfEnded(policy.end_id, interrupted)])
    return output[:, inputs["input_ids"].shape[1]:], torch.stack(draw.logps, dim=1)


def _group_attention(module, query, key, value, attention_mask, scaling, segments=None, **kwargs):
    """Attention of a layer, as transformers calls it: packed where `segments` are given, plain otherwise."""
    if segments is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    output = packed_attention(query, key, value, segments, scaling)
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
