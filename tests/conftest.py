"""What the tests share: the laptop-size architecture with random weights, saved and loaded as any model is."""
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data")]
torch.set_num_threads(1)  # the tests' child processes and ranks need the other cores

from make_model import make_model, make_tokenizer  # noqa: E402
from model import Policy, load_policy  # noqa: E402
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil  # noqa: E402


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    """A folder in the hub's layout: random weights of the laptop-size architecture, its tokenizer and image processor."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = make_tokenizer(vocab_size=1024)
    for part in (make_model(tokenizer, seed=0), tokenizer, Qwen2VLImageProcessorPil()):
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def policy(model_folder) -> Policy:
    """The model of that folder, on the CPU, whole. Tests that change weights load one of their own."""
    return load_policy(str(model_folder))


@pytest.fixture
def image() -> Image.Image:
    """40 wide, 30 high; every pixel differs from its neighbours."""
    picture = Image.new("RGB", (40, 30))
    picture.putdata([(x * 6, y * 8, (x * y) % 256) for y in range(30) for x in range(40)])
    return picture


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of published items and predictions beside the project; not part of it."""
    folder = ROOT.parent / "shared" / "golden"
    if not folder.is_dir():
        pytest.skip(f"needs the published test data, absent here ({folder.name}/ beside the project)")
    return folder
