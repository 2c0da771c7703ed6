"""What a GRPO step costs on GPUs, computed from shapes alone: python data/cost.py

Operations: multiplications and additions of matrix products, attention included; 2 for each pair
of numbers. Bytes: of one GPU. Nothing is measured here. The rules are those of FSDP2 with fp32
master weights and bf16 compute, and of the layers of Qwen2.5-VL in transformers;
tests/test_cost.py checks them against real sizes of the laptop-size model.

Left out on purpose: the kernels' workspaces, fragmentation, collectives, and whatever is not a
matrix product.
"""
import argparse
from dataclasses import dataclass

from transformers import Qwen2_5_VLConfig

FP32, BF16 = 4, 2
PIECE = 16_384  # tokens that are fed at once while sampling, of all rows: model.PIECE
PATCHES = 401_408 // 14**2  # of an image of --max_pixels 401408
VISION = dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, patch_size=14,
              in_channels=3, spatial_merge_size=2, temporal_patch_size=2, window_size=112,
              fullatt_block_indexes=[7, 15, 23, 31])
PUBLISHED = {  # name -> text config, as on the hub
    "3B": dict(hidden_size=2048, intermediate_size=11008, num_hidden_layers=36,
               num_attention_heads=16, num_key_value_heads=2, vocab_size=151936,
               tie_word_embeddings=True),
    "7B": dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
               num_attention_heads=28, num_key_value_heads=4, vocab_size=152064,
               tie_word_embeddings=False)}


@dataclass(frozen=True)
class Shape:
    """One step; lengths are means over samples. The defaults are the paper's: a prompt of 880
    tokens, 484 of them its image's."""
    num_prompts: int = 16
    group_size: int = 8
    prompt_tokens: float = 880
    sample_tokens: float = 160  # actions and observations
    action_tokens: float = 160
    prompt_patches: float = 1936  # of the prompt's image: four an image token
    sample_patches: float = 0  # of the images that tools made


def published(name: str) -> Qwen2_5_VLConfig:
    """The config of Qwen/Qwen2.5-VL-3B-Instruct or -7B-."""
    text = PUBLISHED[name]
    return Qwen2_5_VLConfig(tie_word_embeddings=text["tie_word_embeddings"], text_config=text,
                            vision_config=VISION | {"out_hidden_size": text["hidden_size"]})


# ----------------------------------------------------------------------------------------- weights
def _head_size(text):
    return text.hidden_size // text.num_attention_heads


def layer_weights(text) -> int:
    """Numbers in the matrices of one decoder layer."""
    key_value = text.num_key_value_heads * _head_size(text)
    attention = 2 * text.hidden_size * (text.hidden_size + key_value)
    return attention + 3 * text.hidden_size * text.intermediate_size


def decoder_layer_weights(text) -> int:
    """Parameters of one decoder layer: its matrices, the biases of q, k and v, two norms."""
    key_value = text.num_key_value_heads * _head_size(text)
    return layer_weights(text) + text.hidden_size + 2 * key_value + 2 * text.hidden_size


def text_weights(text) -> int:
    """Parameters of the language model: its layers, its embedding, and its head where that is not
    the embedding."""
    tables = (1 if text.tie_word_embeddings else 2) * text.vocab_size * text.hidden_size
    return text.num_hidden_layers * decoder_layer_weights(text) + tables + text.hidden_size


def vision_weights(vision) -> int:
    """Parameters of the vision tower and its merger."""
    width, merged = vision.hidden_size, vision.hidden_size * vision.spatial_merge_size**2
    merger = width + merged * (merged + 1) + (merged + 1) * vision.out_hidden_size
    return vision.depth * _block_weights(vision) + _patch_size(vision) * width + merger


def _block_weights(vision):
    width = vision.hidden_size
    attention, mlp = 4 * width**2 + 4 * width, 3 * width * vision.intermediate_size
    return attention + mlp + 2 * vision.intermediate_size + width + 2 * width  # biases; two norms


def _patch_size(vision):
    return vision.in_channels * vision.temporal_patch_size * vision.patch_size**2


def num_weights(config: Qwen2_5_VLConfig) -> int:
    """All parameters."""
    return text_weights(config.text_config) + vision_weights(config.vision_config)


# -------------------------------------------------------------------------------------- operations
def forward_operations(config: Qwen2_5_VLConfig, *, tokens: float, pairs: float, head_tokens: float,
                       images: float = 0, patches: float = 0) -> dict[str, float]:
    """Of one forward pass: {"vision", "layers", "attention", "head"}.

    pairs: (query, key) pairs of tokens that attend; head_tokens: positions whose logits are
    computed; patches: of one image.
    """
    text, vision = config.text_config, config.vision_config
    width, merged = vision.hidden_size, vision.hidden_size * vision.spatial_merge_size**2
    window = (vision.window_size // vision.patch_size)**2
    full = len(vision.fullatt_block_indexes)
    seen = (vision.depth - full) * min(window, patches) + full * patches  # keys, over all blocks
    blocks = vision.depth * (4 * width**2 + 3 * width * vision.intermediate_size)
    merger = merged * (merged + vision.out_hidden_size) / vision.spatial_merge_size**2
    patch = blocks + _patch_size(vision) * width + 2 * width * seen + merger
    heads = text.num_attention_heads * _head_size(text)
    return {"vision": 2 * images * patches * patch,
            "layers": 2 * tokens * text.num_hidden_layers * layer_weights(text),
            "attention": 4 * pairs * text.num_hidden_layers * heads,
            "head": 2 * head_tokens * text.hidden_size * text.vocab_size}


def step_operations(config: Qwen2_5_VLConfig, shape: Shape, *, beta: float = 0.0,
                    shared: bool = True, checkpointing: bool = False) -> dict[str, float]:
    """Of a whole step, on all GPUs together: {"prefill", "decode", "score", "update"}.

    shared: prompts and their images are encoded once a group, in the rollout and in the update;
    otherwise once a sample. Only pairs that the causal mask allows are counted. The update costs
    three forward passes, four of the head (its logits are computed twice), and one more with
    checkpointing.
    """
    samples = shape.num_prompts * shape.group_size
    prompts = shape.num_prompts if shared else samples
    long, new = shape.prompt_tokens, shape.sample_tokens
    opening = {"tokens": prompts * long, "pairs": prompts * long * (long + 1) / 2,
               "images": prompts, "patches": shape.prompt_patches}
    later = {"tokens": samples * new, "pairs": samples * (new * long + new * (new + 1) / 2),
             "images": samples, "patches": shape.sample_patches}
    actions = samples * shape.action_tokens
    prefill = forward_operations(config, **opening, head_tokens=prompts)
    decode = forward_operations(config, **later, head_tokens=actions)
    whole = {name: value + decode[name] for name, value in
             forward_operations(config, **opening, head_tokens=0).items()}
    once = sum(whole.values())
    update = 3 * once + whole["head"] + checkpointing * (once - whole["head"])
    return {"prefill": sum(prefill.values()), "decode": sum(decode.values()),
            "score": once if beta else 0.0, "update": update}


# ------------------------------------------------------------------------------------------- bytes
def cache_bytes(config: Qwen2_5_VLConfig, rows: float, tokens: float, dtype: int = BF16) -> float:
    """Keys and values of all layers."""
    text = config.text_config
    numbers = 2 * text.num_hidden_layers * text.num_key_value_heads * _head_size(text)
    return numbers * rows * tokens * dtype


def prefill_bytes(config: Qwen2_5_VLConfig, rows: float, new: float, context: float,
                  patches: float = 0, dtype: int = BF16) -> float:
    """What a layer holds at once while `new` tokens of each row join the cache, up to `context`.

    Beyond the cache. The most of three: the MLP with gate, up and their product; the attention with
    keys and values repeated for every head, and its mask as bool, as numbers, and those padded to
    full lines for the kernel (PyTorch's memory-efficient one: new x context scores are never
    built); the vision tower, before, with all patches of new images, its rotations in fp32.
    """
    text, tokens = config.text_config, rows * new
    hidden, mask = tokens * text.hidden_size * dtype, tokens * context
    mlp = 3 * tokens * text.intermediate_size * dtype + 4 * hidden + mask
    repeated = 2 * rows * context * text.hidden_size * dtype
    tower = patches * config.vision_config.hidden_size * (5 * dtype + 6 * FP32)
    return max(mlp, repeated + 5 * hidden + mask * (1 + 2 * dtype), tower)


def activation_bytes(config: Qwen2_5_VLConfig, tokens: float, dtype: int = BF16) -> float:
    """What one decoder layer keeps of `tokens` tokens for the backward pass, with PyTorch's fused
    attention.

    A norm keeps its input in fp32, the normalised input and its output. Attention keeps q, k, v and
    its output. The MLP keeps gate, silu(gate), up and their product.
    """
    text = config.text_config
    width, key_value = text.hidden_size, text.num_key_value_heads * _head_size(text)
    norms = 2 * width * (FP32 + 2 * dtype)
    return tokens * (norms + dtype * (2 * width + 2 * key_value + 4 * text.intermediate_size))


def packed_bytes(config: Qwen2_5_VLConfig, shape: Shape, tokens: float, dtype: int = BF16) -> float:
    """What the attention of one layer keeps beyond that, where groups are packed into a row of
    `tokens` tokens.

    Keys and values are kept for every head instead of every key head, and the prompt's beside each
    sample's own; outputs are kept twice.
    """
    width = config.text_config.hidden_size
    group = shape.prompt_tokens + shape.group_size * shape.sample_tokens
    beside = tokens / group * shape.group_size * (shape.prompt_tokens + shape.sample_tokens)
    return dtype * width * (2 * (tokens + beside) + tokens)


def vision_bytes(config: Qwen2_5_VLConfig, patches: float, dtype: int = BF16) -> float:
    """What one block of the vision tower keeps for the backward pass.

    As a decoder layer, but q, k and v come from one matrix, and windows' outputs are joined.
    """
    width, mlp = config.vision_config.hidden_size, config.vision_config.intermediate_size
    return patches * (2 * width * (FP32 + 2 * dtype) + dtype * (7 * width + 4 * mlp))


def update_bytes(config: Qwen2_5_VLConfig, shape: Shape, tokens: float, *, gpus: int,
                 checkpointing: bool = True, chunk: int = 256,
                 dtype: int = BF16) -> dict[str, float]:
    """What a micro-batch of `tokens` tokens holds at its three high points, beyond all shards.

    "head": activations, logits of a chunk and the gradient of the head, a sum in fp32 of products
    in bf16. "layer": the backward pass of the last layer. "root": all of FSDP2's root unit, which
    is reduced last: embedding, head and merger. With checkpointing, layers and vision blocks keep
    their inputs only.
    """
    text, vision = config.text_config, config.vision_config
    unit = decoder_layer_weights(text)
    root = num_weights(config) - text.num_hidden_layers * unit
    root -= vision.depth * _block_weights(vision)
    head = text.vocab_size * text.hidden_size
    groups = tokens / (shape.prompt_tokens + shape.group_size * shape.sample_tokens)
    patches = groups * (shape.prompt_patches + shape.group_size * shape.sample_patches)
    layer = activation_bytes(config, tokens, dtype) + packed_bytes(config, shape, tokens, dtype)
    hidden = tokens * text.hidden_size
    kept = hidden * (FP32 + 3 * dtype)  # embedded, and around the last norm
    kept += text.num_hidden_layers * (hidden * dtype if checkpointing else layer)
    kept += vision.depth * (patches * vision.hidden_size * dtype if checkpointing
                            else vision_bytes(config, patches, dtype))
    logits = 3 * chunk * text.vocab_size * FP32
    reduced = FP32 * (1 + 1 / gpus)  # gradients of a unit when they are reduced, and this GPU's
    # Weights of the layer and of the next, which are prefetched; gradients of the one before. The
    # layer's own gradients come as its activations go.
    gathered = unit * (2 * dtype + reduced) + head * dtype
    backward = 2 * tokens * text.intermediate_size * dtype  # of the MLP, beyond what was kept
    return {"head": root * dtype + kept + logits + head * (FP32 + dtype),
            "layer": root * dtype + kept + gathered + backward + checkpointing * layer,
            "root": root * (2 * dtype + reduced)}


def step_bytes(config: Qwen2_5_VLConfig, shape: Shape, *, gpus: int, micro_batch_tokens: int,
               batch_tokens: int, max_tokens: int = 8192, max_images: int = 6,
               beta: float = 0.0, checkpointing: bool = True,
               dtype: int = BF16) -> dict[str, float]:
    """Bytes of one GPU, by what holds them; ROLLOUT and UPDATE say when. The flags are train.py's.

    Rollouts are taken to be as long as they may be, and to hold as many images, as large as may be;
    such a rollout may be a micro-batch by itself. dtype: of what is computed.
    """
    weights = num_weights(config)
    rows = min(shape.num_prompts / gpus * shape.group_size, batch_tokens // max_tokens)
    piece = min(PIECE / rows, max_tokens)
    patches = rows * (max_images - 1) * PATCHES  # of all images that tools made
    shard = FP32 * weights / gpus
    return {"weights": shard, "moments": 2 * shard,
            "reference": dtype * weights / gpus if beta else 0.0,
            "copy": dtype * weights, "cache": cache_bytes(config, rows, max_tokens, dtype),
            "prefill": prefill_bytes(config, rows, piece, max_tokens, patches, dtype),
            "gradients": shard,
            **update_bytes(config, shape, max(micro_batch_tokens, max_tokens), gpus=gpus,
                           checkpointing=checkpointing, dtype=dtype)}


STAYS = ("weights", "moments", "reference")
ROLLOUT = ("copy", "cache", "prefill")
UPDATE = ("head", "layer", "root")  # one after the other, each beside the gradients


def peak(parts: dict[str, float]) -> float:
    """The larger of the two phases, with what always stays."""
    rollout = sum(parts[name] for name in ROLLOUT)
    update = parts["gradients"] + max(parts[name] for name in UPDATE)
    return sum(parts[name] for name in STAYS) + max(rollout, update)


# ------------------------------------------------------------------------------------------ tables
ROWS = [("3B", 1, {}), ("3B", 1, {"beta": 0.0}),
        ("3B", 1, {"beta": 0.0, "max_tokens": 4096, "micro_batch_tokens": 4096,
                   "batch_tokens": 65_536}),
        ("3B", 4, {}), ("3B", 8, {}), ("7B", 1, {}), ("7B", 4, {}), ("7B", 8, {})]
ROOM = 0.85 * 80e9  # of a GPU of 80 GB, the rest for kernels' workspaces and fragmentation


def memory_table(shape: Shape, **options) -> str:
    """Markdown: the bytes of a GPU. options: those of `step_bytes`."""
    lines = []
    for name, gpus, changed in ROWS:
        parts = step_bytes(published(name), shape, gpus=gpus, **options | changed)
        if not lines:
            lines += ["| computed, GB a GPU | " + " | ".join(parts) + " | peak | fits 80 GB |",
                      "|---" * (len(parts) + 3) + "|"]
        flags = "".join(f", `--{flag} {value:g}`" for flag, value in changed.items())
        numbers = " | ".join(f"{value / 1e9:.1f}" for value in [*parts.values(), peak(parts)])
        fits = "yes" if peak(parts) <= ROOM else "no"
        lines.append(f"| {name} on {gpus}{flags} | {numbers} | {fits} |")
    return "\n".join(lines)


def operations_table(shape: Shape, *, beta: float, checkpointing: bool) -> str:
    """Markdown: the operations of a step."""
    lines = []
    for name in PUBLISHED:
        for shared in (True, False):
            spent = step_operations(published(name), shape, beta=beta, shared=shared,
                                    checkpointing=checkpointing)
            if not lines:
                lines += ["| computed, 10¹² operations a step | " + " | ".join(spent) + " | all |",
                          "|---" * (len(spent) + 2) + "|"]
            lines.append(f"| {name}, prompts encoded once a {'group' if shared else 'sample'} | "
                         + " | ".join(f"{value / 1e12:,.0f}" for value in spent.values())
                         + f" | {sum(spent.values()) / 1e12:,.0f} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.splitlines()[0])
    parser.add_argument("--prompts_per_step", type=int, default=16)
    parser.add_argument("--beta", type=float, default=0.04)
    parser.add_argument("--micro_batch_tokens", type=int, default=8192)
    parser.add_argument("--batch_tokens", type=int, default=131_072)
    parser.add_argument("--max_tokens", type=int, default=8192)
    parser.add_argument("--max_images", type=int, default=6)
    parser.add_argument("--no_checkpointing", action="store_true")
    args = parser.parse_args()
    shape, checkpointing = Shape(num_prompts=args.prompts_per_step), not args.no_checkpointing
    print(memory_table(shape, micro_batch_tokens=args.micro_batch_tokens, beta=args.beta,
                       batch_tokens=args.batch_tokens, max_tokens=args.max_tokens,
                       max_images=args.max_images, checkpointing=checkpointing), end="\n\n")
    print(operations_table(shape, beta=args.beta, checkpointing=checkpointing))


if __name__ == "__main__":
    main()
