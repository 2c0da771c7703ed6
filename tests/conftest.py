"""What the tests share: the laptop-size architecture with random weights, saved and loaded as any model is; fast processes."""
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
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


CLEAN = multiprocessing.get_context("forkserver")  # forks of this process would inherit gloo without its threads
CLEAN.set_forkserver_preload(["torch.distributed.fsdp", "torch.distributed.checkpoint.state_dict",
                              "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl", "transformers.hf_argparser",
                              "transformers.models.qwen2_vl.image_processing_pil_qwen2_vl",
                              "transformers.models.auto.tokenization_auto"])


def run_script(script: str, *args, timeout: float = 240, **environment: str) -> subprocess.CompletedProcess:
    """`python script *args` as a process of its own, on one thread. It is forked from one that has done nothing but import
    packages, which saves seconds each time."""
    with tempfile.TemporaryDirectory() as folder:
        process = CLEAN.Process(target=_run_script, args=(script, list(map(str, args)), environment, folder))
        process.start()
        process.join(timeout)
        process.kill()
        assert process.exitcode is not None, f"{script} ran longer than {timeout} s"
        stdout, stderr = (Path(folder, name).read_text(encoding="utf-8") for name in ("stdout", "stderr"))
    return subprocess.CompletedProcess([script, *args], process.exitcode, stdout, stderr)


def _run_script(script, args, environment, folder):
    for name, number in (("stdout", 1), ("stderr", 2)):
        os.dup2(os.open(f"{folder}/{name}", os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
    os.chdir(ROOT)
    os.environ.update({"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": str(os.cpu_count()), **environment})
    torch.set_num_threads(1)
    sys.argv = [script, *args]
    runpy.run_path(str(ROOT / script), run_name="__main__")


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
