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


def text_weights(text) -> int:
    """Parameters of the language model: its layers, its embedding, and its head where that is not
    the embedding."""
    key_value = text.num_key_value_heads * _head_size(text)
    biases, norms = text.hidden_size + 2 * key_value, 2 * text.hidden_size  # of q, k, v; two norms
    layer = layer_weights(text) + biases + norms
    tables = (1 if text.tie_word_embeddings else 2) * text.vocab_size * text.hidden_size
    return text.num_hidden_layers * layer + tables + text.hidden_size


def vision_weights(vision) -> int:
    """Parameters of the vision tower and its merger."""
    width, merged = vision.hidden_size, vision.hidden_size * vision.spatial_merge_size**2
    attention, mlp = 4 * width**2 + 4 * width, 3 * width * vision.intermediate_size
    block = attention + mlp + 2 * vision.intermediate_size + width + 2 * width  # biases; two norms
    merger = width + merged * (merged + 1) + (merged + 1) * vision.out_hidden_size
    return vision.depth * block + _patch_size(vision) * width + merger


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


def activation_bytes(config: Qwen2_5_VLConfig, tokens: float, *, checkpointing: bool = False,
                     dtype: int = BF16) -> float:
    """What the decoder layers keep of `tokens` tokens for the backward pass, with PyTorch's fused
    attention.

    A norm keeps its input in fp32, the normalised input and its output. Attention keeps q, k, v and
    its output. The MLP keeps gate, silu(gate), up and their product. With checkpointing: the input
    of every layer, and all of one layer.
    """
    text = config.text_config
    width, key_value = text.hidden_size, text.num_key_value_heads * _head_size(text)
    norms = 2 * width * (FP32 + 2 * dtype)
    layer = norms + dtype * (2 * width + 2 * key_value + 4 * text.intermediate_size)
    if checkpointing:
        return tokens * (text.num_hidden_layers * width * dtype + layer)
    return tokens * text.num_hidden_layers * layer


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


def step_bytes(config: Qwen2_5_VLConfig, shape: Shape, *, gpus: int, micro_batch_tokens: int,
               batch_tokens: int, beta: float = 0.0, checkpointing: bool = True,
               chunk: int = 256) -> dict[str, float]:
    """Bytes of one GPU, by what holds them.

    `copy` and `cache` live during rollouts only; `layer`, `activations` and `logits` live in the
    update only; the rest stays. batch_tokens bounds the tokens whose keys and values are kept, with
    the prompt counted for each of its samples.
    """
    text, weights = config.text_config, num_weights(config)
    tables = (1 if text.tie_word_embeddings else 2) * text.vocab_size * text.hidden_size
    kept = shape.num_prompts / gpus * shape.group_size * (shape.prompt_tokens + shape.sample_tokens)
    activations = activation_bytes(config, micro_batch_tokens, checkpointing=checkpointing)
    layers = 1 if checkpointing else text.num_hidden_layers  # that are whole in memory
    shard = FP32 * weights / gpus
    return {"weights": shard, "gradients": shard, "moments": 2 * shard,
            "reference": shard if beta else 0.0, "copy": BF16 * weights,
            "cache": cache_bytes(config, 1, min(kept, batch_tokens)),
            # two layers (one is prefetched) and the tables, with their gradients
            "layer": 2 * BF16 * (2 * layer_weights(text) + tables),
            "activations": activations + layers * packed_bytes(config, shape, micro_batch_tokens),
            # Of a chunk, with the gradient of the head: a sum in fp32 of products in bf16.
            "logits": (chunk + text.hidden_size) * text.vocab_size * (FP32 + BF16)}


ROLLOUT, UPDATE = ("copy", "cache"), ("layer", "activations", "logits")


def peak(parts: dict[str, float]) -> float:
    """The larger of the two phases, with what always stays."""
    stays = sum(value for name, value in parts.items() if name not in ROLLOUT + UPDATE)
    return stays + max(sum(parts[name] for name in ROLLOUT), sum(parts[name] for name in UPDATE))


def table(shape: Shape, **options) -> str:
    """Two Markdown tables: bytes of a GPU and operations of a step."""
    lines = []
    for name in PUBLISHED:
        for gpus in (1, 8):
            parts = step_bytes(published(name), shape, gpus=gpus, **options)
            if not lines:
                lines += ["| computed, GB a GPU | " + " | ".join(parts) + " | peak | fits 80 GB |",
                          "|---" * (len(parts) + 3) + "|"]
            gigabytes = " | ".join(f"{value / 1e9:.1f}" for value in parts.values())
            fits = "yes" if peak(parts) < 80e9 else "no"
            lines.append(f"| {name} on {gpus} | {gigabytes} | {peak(parts) / 1e9:.0f} | {fits} |")
    lines.append("")
    for name in PUBLISHED:
        for shared in (True, False):
            spent = step_operations(published(name), shape, beta=options["beta"], shared=shared,
                                    checkpointing=options["checkpointing"])
            if len(lines) == 7:
                lines += ["| computed, 10¹² operations a step | " + " | ".join(spent) + " | all |",
                          "|---" * (len(spent) + 2) + "|"]
            lines.append(f"| {name}, prompts encoded once a {'group' if shared else 'sample'} | "
                         + " | ".join(f"{value / 1e12:,.0f}" for value in spent.values())
                         + f" | {sum(spent.values()) / 1e12:,.0f} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--beta", type=float, default=0.04)
    parser.add_argument("--micro_batch_tokens", type=int, default=8192)
    parser.add_argument("--batch_tokens", type=int, default=131_072)
    parser.add_argument("--no_checkpointing", action="store_true")
    args = parser.parse_args()
    print(table(Shape(num_prompts=args.prompts), micro_batch_tokens=args.micro_batch_tokens,
                batch_tokens=args.batch_tokens, beta=args.beta,
                checkpointing=not args.no_checkpointing))


if __name__ == "__main__":
    main()
