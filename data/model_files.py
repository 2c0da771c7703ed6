"""The files of a Qwen2.5-VL, by hub name or folder: config, tokenizer, image processor, weights.

Errors of transformers, of many types and words, become a ValueError that names the model and the
way out. Left out on purpose: other model families.
"""
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import (
    AutoConfig, AutoTokenizer, PreTrainedTokenizerBase, Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.processing_utils import ProcessorMixin


def check_model(name: str) -> None:
    """ValueError, within milliseconds, if `name` is a folder without a model. Hub names pass."""
    folder = Path(name)
    if not folder.is_dir():
        if name.startswith((".", "/")) or name.count("/") != 1 or folder.parent.is_dir():
            raise ValueError(f"--model {name}: no such folder (and not a hub name like "
                             "Qwen/Qwen2.5-VL-3B-Instruct)")
        return
    missing = None
    if not {path.suffix for path in folder.iterdir()} & {".safetensors", ".bin"}:
        missing = "weights (.safetensors or .bin)"
    if not (folder / "config.json").is_file():
        missing = "config.json"
    if missing:
        raise ValueError(f"--model {name}: the folder has no {missing}; give a folder written by "
                         "save_pretrained, as RUN/model is, or a hub name")


def read_config(name: str) -> Qwen2_5_VLConfig:
    """The config. ValueError if it is another family's."""
    check_model(name)
    config = _read(AutoConfig.from_pretrained, name, trust_remote_code=False)
    if config.model_type != "qwen2_5_vl":
        raise ValueError(f"--model {name}: model_type is {config.model_type!r}, "
                         "this code trains 'qwen2_5_vl'")
    return config


def read_tokenizer(name: str, config: Qwen2_5_VLConfig) -> PreTrainedTokenizerBase:
    """The tokenizer with its chat template. ValueError if it is another model's."""
    tokenizer = _read(AutoTokenizer.from_pretrained, name)
    if tokenizer.chat_template is None:  # older processors keep it in chat_template.json
        processor, _ = _read(ProcessorMixin.get_processor_dict, name)
        tokenizer.chat_template = processor.get("chat_template")
    if tokenizer.convert_tokens_to_ids("<|image_pad|>") != config.image_token_id:
        raise ValueError(f"--model {name}: <|image_pad|> is not {config.image_token_id}: "
                         "the tokenizer is another model's")
    return tokenizer


def read_image_processor(name: str, config: Qwen2_5_VLConfig, min_pixels: int, max_pixels: int
                         ) -> Qwen2VLImageProcessorPil:
    """The image processor with these bounds. ValueError if its patches are not the model's."""
    # Not `size=`: min_pixels and max_pixels of the hub's preprocessor_config.json would win.
    processor = _read(Qwen2VLImageProcessorPil.from_pretrained, name,
                      min_pixels=min_pixels, max_pixels=max_pixels)
    vision = config.vision_config
    sizes = (processor.patch_size, processor.merge_size, processor.temporal_patch_size)
    if sizes != (vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size):
        raise ValueError(f"--model {name}: its image processor cuts patches, merges and frames by "
                         f"{sizes}, the model otherwise")
    return processor


def read_model(name: str, dtype: torch.dtype) -> Qwen2_5_VLForConditionalGeneration:
    """The whole model. `from_pretrained` alone leaves random values where the files lack some."""
    model, found = _read(Qwen2_5_VLForConditionalGeneration.from_pretrained, name, dtype=dtype,
                         ignore_mismatched_sizes=True, output_loading_info=True)
    wrong = sorted([*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])])
    if wrong:
        raise ValueError(f"--model {name}: {len(wrong)} tensors are absent or of another shape, "
                         f"{wrong[0]} the first; mend the folder")
    return model


def _read(from_pretrained: Callable, name: str, **options):
    """`from_pretrained(name)`; its errors become a ValueError with a way out."""
    try:
        return from_pretrained(name, **options)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # also those of parsers, of the hub and of its network
        reason = " ".join(str(error).split())[:400]
        raise ValueError(
            f"--model {name} cannot be loaded: {type(error).__name__}: {reason}; give a folder "
            "written by save_pretrained, or check the name on huggingface.co and the network; "
            "a gated or private model needs `hf auth login`") from None
