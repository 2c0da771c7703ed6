"""Qwen2.5-VL as a policy: load, encode, shard, generate, log-probs, save.

One path for a hub name, a local folder in the hub's layout and the laptop-size model in data/model.
`AutoProcessor` needs torchvision, so it is not used: the tokenizer and the PIL image processor work
by themselves, and every `<|image_pad|>` is expanded here. Four rules, each from a bug seen
elsewhere:

- Positions are M-RoPE (time, height, width). They are computed here and passed to every call, in
  sampling and in scoring: without `mm_token_type_ids` the model silently uses 1-D positions.
- Tokens are scored under the distribution that they were sampled from. They are drawn here
  (`draw`), without the hub's generation_config.json, and special tokens that a turn cannot hold are
  taken out of both softmaxes.
- Text of a task or a tool is tokenised with special tokens disabled: `<|im_end|>` in a search
  result is ten characters.
- Rollouts run without collectives, on parameters gathered once, so ranks may take different numbers
  of turns.

What the G samples of a prompt share is computed once: in sampling (`sample` repeats the keys and
values of a prompt) and in scoring (packed rows, `rollout.collate`, with our own attention).

Left out on purpose: other model families, video, LoRA, quantisation, inference engines.

Legend: P prompts, G samples a prompt, B rollouts, T tokens, S tokens in the cache, V vocabulary,
H hidden size, N tokens of a packed row.
"""
import math
import os
import time
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions, get_model_state_dict, set_model_state_dict)
from torch.distributed.fsdp import (
    FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method)
from torch.nn.functional import pad
from transformers import (
    AttentionInterface, AttentionMaskInterface, DynamicCache, GenerationConfig, LogitsProcessor,
    PreTrainedTokenizerBase, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration,
    StoppingCriteria)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from data.model_files import read_config, read_image_processor, read_model, read_tokenizer
from grpo import Segments, packed_attention, token_logps
from tools import cores_of_rank, to_rgb

MIN_PIXELS, MAX_PIXELS = 56 * 56, 401_408  # of a resized image; the paper trains with 401,408
PATIENCE = timedelta(hours=4)  # of ranks with each other: one loads 16 GB or plays longer turns
PIECE = 16_384  # tokens fed in one pass, of all rows: 100,000 would take 15 GB at 7B
TEXT = "\x00"  # stands for the user's text while the chat template is rendered; in no template


class EncodedImage(NamedTuple):
    """What the vision tower reads of one image. Only the very same object is equal to it."""
    pixels: Tensor  # (patches, 3·2·14·14) float32, normalised
    grid: tuple[int, int, int]  # (time, height, width) in patches; height·width/4 image tokens

    __eq__ = object.__eq__


class TokenSequence(Protocol):
    """What the model reads: token ids, and one image for each run of `<|image_pad|>` in them."""
    ids: list[int]
    images: list[EncodedImage]
    action_mask: list[int]  # 1 where an id was sampled; only `prompt_of` reads it


class Prompt(NamedTuple):
    """The beginning of a sequence. Two are equal if they have equal ids and the same images."""
    ids: list[int]
    images: list[EncodedImage]


@dataclass
class Policy:
    """A Qwen2.5-VL and what turns text and pictures into its inputs. `load_policy` makes one."""
    model: Qwen2_5_VLForConditionalGeneration
    tokenizer: PreTrainedTokenizerBase
    image_processor: Qwen2VLImageProcessorPil
    device: torch.device
    export_dtype: torch.dtype = torch.float32  # that of the files it came from
    end_id: int = field(init=False)  # <|im_end|>: ends a turn; sampled and trained on
    image_id: int = field(init=False)  # <|image_pad|>: one for each image token
    suppressed: Tensor = field(init=False)  # int64 ids that are neither sampled nor scored
    images: dict = field(default_factory=dict)  # path -> (picture, EncodedImage), read once a run

    def __post_init__(self):
        self.end_id = self.tokenizer.convert_tokens_to_ids("<|im_end|>")
        self.image_id = self.model.config.image_token_id
        added = self.tokenizer.added_tokens_decoder
        suppressed = {i for i, token in added.items() if token.special} - {self.end_id}
        num_rows = self.model.config.text_config.vocab_size  # the hub pads V beyond the tokenizer
        suppressed |= set(range(len(self.tokenizer), num_rows))
        self.suppressed = torch.tensor(sorted(suppressed), device=self.device)


# ---- ranks ---------------------------------------------------------------------------------------


def pick_device() -> tuple[torch.device, str]:
    """(device of this process, process-group backend): a GPU a rank and nccl, or CPU and gloo."""
    if torch.cuda.is_available():
        index = dist.get_node_local_rank(fallback_rank=0)
        torch.cuda.set_device(index)
        return torch.device("cuda", index), "nccl"
    return torch.device("cpu"), "gloo"


def start_ranks() -> None:
    """Join torchrun's process group, or make one of this process alone. CPU ranks share cores."""
    device, backend = pick_device()
    store, rank, size = dist.HashStore(), 0, 1
    if "RANK" in os.environ:
        wait = PATIENCE
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            wait = timedelta(seconds=15)  # torchrun's own store is there, or torchrun was killed
        store, rank, size = next(dist.rendezvous("env://", timeout=wait))
        store.set_timeout(PATIENCE)
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            # torchrun's store outlives a restart, with the addresses of dead ranks.
            store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
    if device.type == "cpu":  # more threads than cores slow all ranks down
        torch.set_num_threads(cores_of_rank())


def pass_dtype(device: torch.device) -> torch.dtype:
    """What forward passes compute in: bf16 on a GPU, fp32 on a CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def is_lead() -> bool:
    """Whether this is the first rank, which writes the files and speaks for all."""
    return dist.get_rank() == 0


def share_of_rank(items: list) -> list:
    """Every item is in the share of one rank."""
    return items[dist.get_rank()::dist.get_world_size()]


def clock() -> float:
    """Seconds, for durations, once the GPU has done all that it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def gather(rows: list) -> list:
    """The rows of all ranks, in the order of the ranks, on every rank."""
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, rows)
    return sum(parts, [])


def all_reduce(values: dict[str, float], op=dist.ReduceOp.SUM) -> dict[str, float]:
    """The same named numbers of all ranks, reduced."""
    numbers = torch.tensor([*values.values()], dtype=torch.float64, device=pick_device()[0])
    dist.all_reduce(numbers, op)
    return dict(zip(values, numbers.tolist()))


# ---- load ----------------------------------------------------------------------------------------


def load_policy(name: str, *, device: torch.device | None = None, shard: bool = False,
                gradient_checkpointing: bool = False, min_pixels: int = MIN_PIXELS,
                max_pixels: int = MAX_PIXELS) -> Policy:
    """Load `name`, a hub name or a local folder: all that `from_pretrained` accepts.

    shard=False: one whole copy, to sample and evaluate: bf16 on a GPU, fp32 on a CPU. shard=True
    (needs a process group): FSDP2 over all ranks, fp32 masters, bf16 compute on GPUs. min_pixels
    and max_pixels bound each image after resizing. Raises ValueError, on all ranks, for what is no
    Qwen2.5-VL or cannot be loaded.
    """
    device, config = device or pick_device()[0], read_config(name)
    export_dtype = config.dtype or torch.float32  # read here, as building a model changes it
    is_large = config.text_config.hidden_size >= 2048  # 3B and above
    if is_large and device.type == "cpu" and os.environ.get("RANK", "0") == "0":
        warnings.warn(f"no GPU was found: --model {name} runs on the CPU, which takes hours a step "
                      f"(torch {torch.__version__}; look at nvidia-smi and its driver)",
                      stacklevel=2)
    tokenizer = read_tokenizer(name, config)
    image_processor = read_image_processor(name, config, min_pixels, max_pixels)
    if shard:
        model = _load_sharded(name, config, device)
    else:
        model = read_model(name, pass_dtype(device)).to(device)
    if gradient_checkpointing:
        # Before transformers 5.23 it has an older name.
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    policy = Policy(_set_up(model), tokenizer, image_processor, device, export_dtype)
    _check_prompts(policy, name)
    return policy


def _set_up(model: Qwen2_5_VLForConditionalGeneration) -> Qwen2_5_VLForConditionalGeneration:
    """What every copy needs: our attention, scoring as a method, FSDP ready to generate."""
    AttentionInterface.register("group_attention", _group_attention)
    AttentionMaskInterface.register("group_attention", sdpa_mask)
    model.model.language_model.config._attn_implementation = "group_attention"
    model.action_logps = types.MethodType(_action_logps, model)
    # `generate` would fill in the hub's defaults, such as a repetition penalty of 1.05.
    model.hub_generation_config = model.generation_config
    model.generation_config = GenerationConfig()
    if isinstance(model, FSDPModule):
        # FSDP then gathers the root's parameters around it as it does around forward.
        register_fsdp_forward_method(model, "action_logps")
        # FSDP sets itself up in the root's first forward, but sampling begins inside the root.
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=model.device))
        model.reshard()  # the root stays whole after a forward; an optimizer needs its shards
    return model.eval()


def _check_prompts(policy: Policy, name: str) -> None:
    """ValueError if no prompt can be made, as of a chat template without text or image."""
    try:
        encode_prompt(policy, "?", None)
        encode_prompt(policy, "?", encode_image(policy, Image.new("RGB", (56, 56))))
    except Exception as error:  # of templates and processors, of any kind
        raise ValueError(
            f"--model {name}: its chat template or image processor cannot make a prompt with a "
            f"text and an image ({type(error).__name__}: {error}); take the files of the model it "
            "was made from") from error


# ---- encode --------------------------------------------------------------------------------------


def encode_text(policy: Policy, text: str) -> list[int]:
    """Token ids of text that is not ours: special tokens in it are plain characters.

    So it cannot forge a turn or an image. Qwen's eight added tokens that are not special
    (`<tool_call>`, `<|fim_prefix|>` …) stay single tokens, as in the released pipeline; the model
    may sample them as any word, and no prompt of ours gives them a meaning.
    """
    encoded = policy.tokenizer(text, add_special_tokens=False, split_special_tokens=True)
    return encoded["input_ids"]


def encode_image(policy: Policy, image: Image.Image) -> EncodedImage:
    """Resize to multiples of 28 pixels within the policy's bounds, normalise, cut into patches."""
    encoded = policy.image_processor(images=[to_rgb(image)], return_tensors="pt")
    return EncodedImage(encoded["pixel_values"], tuple(encoded["image_grid_thw"][0].tolist()))


def image_tokens(policy: Policy, image: EncodedImage) -> int:
    """Number of `<|image_pad|>` of an image: its patches over the merge size squared (4)."""
    return math.prod(image.grid) // policy.image_processor.merge_size**2


def encode_prompt(policy: Policy, text: str, image: EncodedImage | None) -> list[int]:
    """Ids of the opening: system message, user turn (image before text), assistant header."""
    content = [{"type": "text", "text": TEXT}]
    if image is not None:
        content.insert(0, {"type": "image"})
    rendered = policy.tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True)
    return _fill(policy, rendered, text, image)


def encode_observation(policy: Policy, text: str, image: EncodedImage | None) -> list[int]:
    """Ids behind an action: the newline after `<|im_end|>`, a user turn, assistant header."""
    vision = "<|vision_start|><|image_pad|><|vision_end|>" if image is not None else ""
    turn = f"\n<|im_start|>user\n{vision}{TEXT}<|im_end|>\n<|im_start|>assistant\n"
    return _fill(policy, turn, text, image)


def _fill(policy: Policy, rendered: str, text: str, image: EncodedImage | None) -> list[int]:
    """Tokenise a rendered template with `text` in place of TEXT, and expand `<|image_pad|>`."""
    before, after = (policy.tokenizer(part, add_special_tokens=False)["input_ids"]
                     for part in rendered.split(TEXT))
    ids = before + encode_text(policy, text) + after
    if image is None:
        return ids
    at = ids.index(policy.image_id)
    placeholders = [policy.image_id] * image_tokens(policy, image)
    return ids[:at] + placeholders + ids[at + 1:]


def prompt_of(policy: Policy, sequence: TokenSequence) -> Prompt:
    """The prompt of a sequence: all of it where nothing was sampled yet."""
    length = len(sequence.ids)
    if 1 in sequence.action_mask:
        length = sequence.action_mask.index(1)
    ids = sequence.ids[:length]
    vision_start = policy.model.config.vision_start_token_id
    num_images = ids.count(vision_start)
    return Prompt(ids, sequence.images[:num_images])


def model_inputs(policy: Policy, sequences: list[TokenSequence], side: str) -> dict[str, Tensor]:
    """All that the model reads: `token_inputs`, and `image_inputs` in the order of sequences."""
    images = [image for s in sequences for image in s.images]
    tokens = token_inputs(policy, sequences, side)
    return tokens | image_inputs(policy, images)


def token_inputs(policy: Policy, sequences: list[TokenSequence], side: str) -> dict[str, Tensor]:
    """Pad sequences on `side` ("left" to sample, "right" to score), with M-RoPE positions.

    Returns input_ids, attention_mask (B, T) and position_ids (3, B, T), all int64.
    """
    rows = {"input_ids": [s.ids for s in sequences]}
    inputs = policy.tokenizer.pad(rows, padding_side=side, return_tensors="pt")  # (B, T)
    is_image = inputs["input_ids"] == policy.image_id
    grids = [image.grid for s in sequences for image in s.images]
    inputs["position_ids"], _ = policy.model.model.get_rope_index(
        inputs["input_ids"], is_image.int(), attention_mask=inputs["attention_mask"],
        image_grid_thw=torch.tensor(grids) if grids else None)  # (3, B, T)
    return dict(inputs.to(policy.device))


def image_inputs(policy: Policy, images: list[EncodedImage]) -> dict[str, Tensor]:
    """pixel_values (patches, 1176) and image_grid_thw (images, 3), or nothing without images."""
    if not images:
        return {}
    pixels = torch.cat([image.pixels for image in images])
    grids = torch.tensor([image.grid for image in images])
    return {"pixel_values": pixels.to(policy.device),
            "image_grid_thw": grids.to(policy.device)}


# ---- shard ---------------------------------------------------------------------------------------


def _load_sharded(name: str, config: Qwen2_5_VLConfig,
                  device: torch.device) -> Qwen2_5_VLForConditionalGeneration:
    """Rank 0 reads the weights, and each rank gets its shards of them."""
    weights, rest = {}, [None]
    if dist.get_rank() == 0:
        try:
            whole = read_model(name, torch.float32)
            weights = whole.state_dict()
            buffers = dict(whole.named_buffers())
            rest = [(buffers, whole.generation_config)]
        except ValueError as error:  # the other ranks would wait for weights
            rest = [error]
    dist.broadcast_object_list(rest, src=0)
    if isinstance(rest[0], ValueError):
        raise rest[0]
    buffers, generation_config = rest[0]
    model = _empty_shards(config, device, buffers)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, weights, options=options)
    model.generation_config = generation_config
    return model


def _empty_shards(config: Qwen2_5_VLConfig, device: torch.device, buffers: dict[str, Tensor],
                  dtype: torch.dtype = torch.float32) -> Qwen2_5_VLForConditionalGeneration:
    """A model sharded by FSDP2, whose parameters have no values yet. No rank holds a whole one.

    Units: each decoder layer, each vision block, and the root: the model itself, with the rest of
    the parameters (embeddings, merger, head).
    """
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=dtype)
    options = {}
    if device.type == "cuda":
        options["mp_policy"] = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32,
            cast_forward_inputs=False)  # or cosines in the vision tower are rounded to bf16
    for unit in [*model.model.language_model.layers, *model.model.visual.blocks, model]:
        fully_shard(unit, **options)
    model.to_empty(device=device)
    model.tie_weights()  # to_empty separates tied parameters (3B: head = embedding)
    for name, value in buffers.items():  # rotary frequencies are not in a state dict
        model.get_buffer(name).copy_(value)
    return model


def copy_policy(policy: Policy) -> Policy:
    """A second model with the present weights of a sharded one, for forward passes only.

    Its weights are kept in the dtype of these, so they are not rounded twice. Nothing is read or
    sent.
    """
    buffers = dict(policy.model.named_buffers())
    model = _empty_shards(policy.model.config, policy.device, buffers, pass_dtype(policy.device))
    model.load_state_dict(policy.model.state_dict())
    return replace(policy, model=_set_up(model))


@contextmanager
def gathered(policy: Policy) -> Iterator[None]:
    """Inside, every rank holds all parameters and forward passes run no collectives.

    Otherwise each layer would be freed after its forward pass, and gathered again for the next
    token. All ranks enter together.
    """
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


# ---- generate ------------------------------------------------------------------------------------


@torch.no_grad()
def sample(policy: Policy, sequences: list[TokenSequence], max_new_tokens: int, temperature: float,
           interrupted: Callable[[], bool] = lambda: False
           ) -> list[tuple[list[int], list[float]]]:
    """One turn for each of B sequences: [(ids, with `<|im_end|>` if it came, log-probs), ...].

    Each call reads its sequences anew: while tools run, no cache takes memory. A prompt is encoded
    once for all neighbours that begin with it; its keys and values are then repeated. `generate`
    runs until half of the rows have ended their turns. These leave the batch, and the rest go on
    with their part of the cache. temperature 0 is greedy (log-probs are then those at temperature
    1). Random numbers come from torch's global generator. Once `interrupted` says True, turns end
    where they are.
    """
    prompts = [prompt_of(policy, sequence) for sequence in sequences]
    cache, mask = _encode_prompts(policy, prompts)
    inputs = _unseen_inputs(policy, sequences, prompts)
    if inputs["input_ids"].numel() > PIECE:
        mask, inputs = _feed(policy, cache, mask, inputs)
    turns = [([], []) for _ in sequences]
    # rows: the turns that are still written, the very same lists, one for each row of the batch.
    rows, steps_left = turns, max_new_tokens
    while rows:
        mask = torch.cat([mask, inputs.pop("attention_mask")], dim=1)  # (B, S)
        ids, logps = _generate(policy, cache, inputs | {"attention_mask": mask}, steps_left,
                               temperature, interrupted)
        steps = ids.shape[1]
        for turn, row_ids, row_logps in zip(rows, ids.tolist(), logps.tolist(), strict=True):
            length = steps
            if policy.end_id in row_ids:
                length = row_ids.index(policy.end_id) + 1
            turn[0].extend(row_ids[:length])
            turn[1].extend(row_logps[:length])
        steps_left -= steps
        going = [i for i, (turn_ids, _) in enumerate(rows) if turn_ids[-1] != policy.end_id]
        if not going or not steps_left or interrupted():
            break
        kept = torch.tensor(going, device=policy.device)
        cache.batch_select_indices(kept)
        rows = [rows[i] for i in going]
        # The last token drawn is not in the cache yet: it is the next input.
        mask = pad(mask[kept], (0, steps - 1), value=1)
        inputs = {"input_ids": ids[kept, -1:],  # (B, 1)
                  "attention_mask": mask.new_ones(len(rows), 1),
                  "position_ids": inputs["position_ids"][:, kept, -1:] + steps}  # (3, B, 1)
    return turns


def _generate(policy: Policy, cache: DynamicCache, inputs: dict[str, Tensor], max_new_tokens: int,
              temperature: float, interrupted: Callable[[], bool]) -> tuple[Tensor, Tensor]:
    """(ids, log-probs), (B, steps) each, until half of the rows have ended their turns.

    What stands behind the end of a row is padding.
    """
    draw_one = Draw(temperature, policy.suppressed)
    config = GenerationConfig(do_sample=False, max_new_tokens=max_new_tokens,
                              eos_token_id=policy.end_id,
                              pad_token_id=policy.tokenizer.pad_token_id)
    # synced_gpus would make ranks wait for the longest: parameters are gathered, so none has to.
    output = policy.model.generate(
        **inputs, past_key_values=cache, generation_config=config, synced_gpus=False,
        logits_processor=[draw_one], stopping_criteria=[HalfEnded(policy.end_id, interrupted)])
    num_fed = inputs["input_ids"].shape[1]
    return output[:, num_fed:], torch.stack(draw_one.logps, dim=1)


class Draw(LogitsProcessor):
    """Draws the next token of every row and keeps its log-prob; leaves `generate` no other one."""

    def __init__(self, temperature: float, suppressed: Tensor):
        self.temperature, self.suppressed = temperature, suppressed
        self.logps = []  # of each step (B,)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        ids, logps = draw(scores, self.temperature, self.suppressed)  # (B,)
        self.logps.append(logps)
        return torch.full_like(scores, float("-inf")).scatter_(1, ids[:, None], 0.0)


class HalfEnded(StoppingCriteria):
    """Stops `generate` once half of its rows have ended: these leave, the others go on."""

    def __init__(self, end_id: int, interrupted: Callable[[], bool]):
        self.end_id, self.interrupted, self.ended = end_id, interrupted, False

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs) -> Tensor:
        self.ended |= input_ids[:, -1] == self.end_id  # (B,)
        stops = self.interrupted() or self.ended.float().mean() >= 0.5
        return torch.full_like(self.ended, bool(stops))


def _encode_prompts(policy: Policy, prompts: list[Prompt]) -> tuple[DynamicCache, Tensor]:
    """Keys and values of B prompts, up to each one's last token, and their mask, (B, S) int64.

    Equal neighbours are encoded once.
    """
    groups, group_of = [], []  # group_of: the group of each prompt
    for prompt in prompts:
        beginning = Prompt(prompt.ids[:-1], prompt.images)
        if not groups or beginning != groups[-1]:
            groups.append(beginning)
        group_of.append(len(groups) - 1)
    inputs = model_inputs(policy, groups, "left")
    cache = DynamicCache(config=policy.model.config)
    policy.model.model(**inputs, past_key_values=cache)
    rows = torch.tensor(group_of, device=policy.device)  # (B,)
    cache.batch_select_indices(rows)
    return cache, inputs["attention_mask"][rows]


def _unseen_inputs(policy: Policy, sequences: list[TokenSequence],
                   prompts: list[Prompt]) -> dict[str, Tensor]:
    """`model_inputs` of what each sequence holds from the last token of its prompt on."""
    rests = []
    for sequence, prompt in zip(sequences, prompts):
        ids = sequence.ids[len(prompt.ids) - 1:]
        rests.append(Prompt(ids, sequence.images[len(prompt.images):]))
    inputs = model_inputs(policy, rests, "left")
    width = inputs["input_ids"].shape[1]
    positions = token_inputs(policy, sequences, "left")["position_ids"]  # they count from the start
    return inputs | {"position_ids": positions[:, :, -width:]}


def _feed(policy: Policy, cache: DynamicCache, mask: Tensor, inputs: dict[str, Tensor]
          ) -> tuple[Tensor, dict[str, Tensor]]:
    """Add all inputs but the last token of each row to the cache, PIECE tokens at a time.

    mask (B, S): of the cache. Returns that of the larger cache, and the inputs that are left.
    """
    model, ids = policy.model.model, inputs["input_ids"]
    mask = torch.cat([mask, inputs["attention_mask"][:, :-1]], dim=1)
    embeddings = model.get_input_embeddings()(ids[:, :-1])  # (B, T - 1, H)
    if "pixel_values" in inputs:
        pixels = inputs["pixel_values"].to(embeddings.dtype)
        grids = inputs["image_grid_thw"]
        features = model.visual(pixels, grid_thw=grids).pooler_output
        is_image = ids[:, :-1, None] == policy.image_id
        embeddings = embeddings.masked_scatter(is_image, features.to(embeddings.dtype))
    width = max(1, PIECE // len(ids))
    parts = embeddings.split(width, dim=1)
    positions = inputs["position_ids"][:, :, :-1].split(width, dim=2)
    for part, places in zip(parts, positions):
        seen = cache.get_seq_length() + part.shape[1]
        model(inputs_embeds=part, position_ids=places, attention_mask=mask[:, :seen],
              past_key_values=cache)
    names = ("input_ids", "attention_mask", "position_ids")
    return mask, {name: inputs[name][..., -1:] for name in names}


def draw(logits: Tensor, temperature: float, suppressed: Tensor) -> tuple[Tensor, Tensor]:
    """Draw a token from each row of logits (B, V), with torch's global generator.

    Returns the ids, (B,) int64, and their log-probs, (B,) float32 in nats.

    One distribution for both: suppressed ids are taken out, then comes the temperature (below 1e-6:
    the likeliest token, with its log-prob at 1). A uniform number is looked up in the cumulative
    distribution, both float64, so that rare ids can be drawn. (On a CPU `torch.multinomial` is
    slow: it draws a number for each token of the vocabulary.)
    """
    logits = logits.float().index_fill(1, suppressed, float("-inf"))
    is_greedy = temperature < 1e-6
    logps = torch.log_softmax(logits / (1.0 if is_greedy else temperature), dim=1)
    if is_greedy:
        ids = logps.argmax(dim=1, keepdim=True)  # (B, 1)
    else:
        cumulative = logps.double().exp_().cumsum(dim=1)  # (B, V)
        total = cumulative[:, -1:]  # 1, but for rounding
        uniform = torch.rand(len(logps), 1, dtype=torch.float64, device=logps.device)
        # right=True: never an id of probability 0
        ids = torch.searchsorted(cumulative, uniform * total, right=True)  # (B, 1)
    return ids.squeeze(1), logps.gather(1, ids).squeeze(1)


# ---- log-probs -----------------------------------------------------------------------------------


class PackedRow(Protocol):
    """B sequences in one row of N tokens, without padding; `rollout.Batch` is one.

    The row is `prompt | sample | … | sample | prompt | …`. T is the longest sample: entry [b, t]
    of a (B, T) tensor belongs to token t behind the prompt of sequence b.
    """
    inputs: dict[str, Tensor]  # input_ids (1, N), position_ids (3, 1, N), images
    segments: Segments
    targets: Tensor  # (B, T) int64: the tokens
    predictors: Tensor  # (B, T) int64: where in the row the token before each stands
    action_mask: Tensor  # (B, T) bool: which are scored


def action_logps(policy: Policy, row: PackedRow, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-prob of every action token given all tokens before it, and the entropy there, in nats.

    Two (B, T) float32, 0 where action_mask is False.
    """
    return policy.model.action_logps(row, temperature, policy.suppressed)


def _action_logps(model: Qwen2_5_VLForConditionalGeneration, row: PackedRow, temperature: float,
                  suppressed: Tensor) -> tuple[Tensor, Tensor]:
    """`action_logps`, as a method of the model: log-probs have gradients, entropies have not."""
    mask = row.action_mask
    unused = 0.0
    if "pixel_values" not in row.inputs:
        unused = 0 * _blank_features(model.model.visual)
    # The segments say who sees whom; given a dict, transformers makes no mask of its own.
    output = model.model(**row.inputs, attention_mask={"full_attention": None},
                         segments=row.segments, use_cache=False)
    hidden = output.last_hidden_state[0] + unused  # (N, H)
    # Not hidden[…]: the samples of a group share their first predictor, and threads would add up
    # its gradient in any order.
    hidden = hidden.index_select(0, row.predictors[mask])
    values = token_logps(hidden, model.lm_head.weight, row.targets[mask],
                         temperature=temperature, suppressed=suppressed)
    empty = torch.zeros(mask.shape, dtype=torch.float32, device=hidden.device)
    return tuple(empty.masked_scatter(mask, v) for v in values)  # (B, T)


def _blank_features(visual: torch.nn.Module) -> Tensor:
    """A pass over one blank image, for a batch without images.

    The vision blocks are gathered by all ranks, so each must run them, and in the same order:
    before the language model (and so after it in the backward pass), or the collectives mispair.
    """
    embed = visual.patch_embed
    size = embed.in_channels * embed.temporal_patch_size * embed.patch_size**2
    patches = torch.zeros(4, size, dtype=visual.dtype, device=visual.device)
    grid = torch.tensor([[1, 2, 2]], device=visual.device)
    return visual(patches, grid_thw=grid).pooler_output.sum()


def _group_attention(module, query, key, value, attention_mask, scaling, segments=None, **kwargs):
    """Attention of a layer, as transformers calls it: packed with `segments`, plain without."""
    if segments is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling,
                                      **kwargs)
    output = packed_attention(query, key, value, segments, scaling)
    return output.transpose(1, 2).contiguous(), None  # (B, T, heads, d)


# ---- save ----------------------------------------------------------------------------------------


def export(policy: Policy, folder: str | Path) -> None:
    """Write a Hugging Face folder that `from_pretrained` opens with nothing of ours.

    Weights get the dtype of the files that training began with (the hub's are bf16); checkpoints
    keep them in fp32. Called by all ranks; rank 0 writes.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(policy.model, options=options)  # a collective; for rank 0 only
    if dist.is_initialized() and dist.get_rank() != 0:
        return
    if policy.model.config.tie_word_embeddings:
        weights.pop("lm_head.weight")  # gathered by itself, it would be written a second time
    # save_pretrained of an FSDP module would write the name of FSDP's class into config.json.
    with torch.device("meta"):
        shell = Qwen2_5_VLForConditionalGeneration._from_config(
            policy.model.config, dtype=policy.export_dtype)
    weights = {name: value.to(policy.export_dtype) for name, value in weights.items()}
    shell.generation_config = policy.model.hub_generation_config
    shell.save_pretrained(folder, state_dict=weights)
    policy.tokenizer.save_pretrained(folder)
    policy.image_processor.save_pretrained(folder)
