"""How alike search queries are: the cosine of sentence embeddings, as in the paper.

    similarity = load_similarity("sentence-transformers/all-MiniLM-L6-v2")    # or a local folder
    similarity([("capital of France", "Which city is France's capital?")])    -> [0.8…]

The embedding of a text is the mean over its tokens of the encoder's last hidden states. Reward
models are small, and a step has a few queries: the CPU is enough.
Left out on purpose: other poolings; a memory from one step to the next, as a batch of other texts
rounds otherwise, and a resumed run would not be a replay.
"""
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

MAX_TOKENS = 256  # of a text, with its two special tokens; what is longer is cut (all-MiniLM-L6-v2)
Similarity = Callable[[list[tuple[str, str]]], list[float]]


def load_similarity(name: str) -> Similarity:
    """The cosines, each within -1 and 1, of pairs of texts; `name`: a hub name or a local folder.

    fp32, on the CPU, without gradients. Raises ValueError if no encoder can be loaded.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModel.from_pretrained(name, dtype=torch.float32).eval()
    except Exception as error:  # also those of parsers, of the hub and of its network
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"--similarity {name} cannot be loaded: {type(error).__name__}: {reason}; "
                         "give the folder or hub name of sentence-transformers/all-MiniLM-L6-v2, "
                         "or leave it out to compare words") from None

    def similarity(pairs: list[tuple[str, str]]) -> list[float]:
        texts = sorted({text for pair in pairs for text in pair})  # each is read once
        rows = dict(zip(texts, embed(model, tokenizer, texts))) if texts else {}
        return [(rows[left] @ rows[right]).clamp(-1, 1).item() for left, right in pairs]
    return similarity


@torch.inference_mode()
def embed(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> Tensor:
    """(texts, H) float32, rows of length 1, from one batch that is padded on the right."""
    inputs = tokenizer(texts, padding=True, truncation=True, max_length=MAX_TOKENS,
                       return_tensors="pt")  # (texts, T)
    hidden = model(**inputs).last_hidden_state  # (texts, T, H)
    mask = inputs["attention_mask"][:, :, None].float()  # (texts, T, 1)
    return normalize((hidden * mask).sum(dim=1) / mask.sum(dim=1), dim=1)  # (texts, H)
