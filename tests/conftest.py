"""What the tests share: the laptop-size architecture with random weights, saved and loaded as any model is; fast processes."""
import gc
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from multiprocessing import forkserver
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


collect_ignore = ["course"]  # has a conftest.py of its own; test_course.py runs its tests as students do
CLEAN = multiprocessing.get_context("forkserver")  # forks of this process would inherit gloo without its threads
CLEAN.set_forkserver_preload(["torch.distributed.fsdp", "torch.distributed.checkpoint.state_dict",
                              "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl", "transformers.hf_argparser",
                              "transformers.models.qwen2_vl.image_processing_pil_qwen2_vl",
                              "transformers.models.auto.tokenization_auto"])


def pytest_configure(config):
    """`-m thorough` runs what is long and rarely fails; without -m it is left out, unless a test is named by its id."""
    config.addinivalue_line("markers", "thorough: long and rarely fails; left out unless -m asks for it")
    if not config.option.markexpr and not any("::" in argument for argument in config.args):
        config.option.markexpr = "not thorough"


def pytest_collection_finish():
    """What is there by now stays: Python need not look through it for garbage again and again."""
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def fast_processes():
    """The process that the others are forked from imports the packages while the first tests run."""
    forkserver.ensure_running()
    yield
    for process in multiprocessing.active_children():  # of tests that failed; Python would wait for their end
        process.kill()


def start_script(script: str, *args, output: Path, errors: Path | None = None, **environment: str) -> multiprocessing.Process:
    """`python script *args` under way as a process of its own, on one thread; its errors go to the output or a file of their
    own. It is forked from one that has done nothing but import packages, which saves seconds each time; "torchrun" is not."""
    process = CLEAN.Process(target=_run_script, args=(script, list(map(str, args)), environment, output, errors or output))
    process.start()
    return process


def run_script(script: str, *args, timeout: float = 240, **environment: str) -> subprocess.CompletedProcess:
    """`python script *args` to its end."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("stdout", "stderr")]
        process = start_script(script, *args, output=files[0], errors=files[1], **environment)
        process.join(timeout)
        process.kill()
        assert process.exitcode is not None, f"{script} ran longer than {timeout} s"
        stdout, stderr = (file.read_text(encoding="utf-8") for file in files)
    return subprocess.CompletedProcess([script, *args], process.exitcode, stdout, stderr)


def environments_of_ranks(size: int) -> list[dict[str, str]]:
    """What torchrun tells each of its ranks, which then find each other."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    return [{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1",
             "MASTER_PORT": str(port)} for rank in range(size)]


def _run_script(script, args, environment, output, errors):
    for file, number in ((output, 1), (errors, 2)):
        os.dup2(os.open(file, os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore Ctrl-C
    os.chdir(ROOT)
    os.environ.update({"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": str(os.cpu_count()), **environment})
    torch.set_num_threads(1)
    if script == "torchrun":
        os.execv(sys.executable, [sys.executable, "-m", "torch.distributed.run", *args])
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
