"""What all tests share: one compute thread each, and the folder of models and data that lies beside a working copy."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def shared() -> Path:
    """`../shared` beside the repository: small real models, tokenizers, chat templates, prompts."""
    folder = Path(__file__).resolve().parents[1].parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"needs {folder.name}/ beside the repository (models and data), which is not there")
    return folder


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """torch computes on one thread, whatever the environment says."""
    yield from computing_on(1)


@pytest.fixture
def two_threads() -> Iterator[None]:
    yield from computing_on(2)


def computing_on(threads: int) -> Iterator[None]:
    import torch  # after the environment above

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    yield
    torch.set_num_threads(before)
