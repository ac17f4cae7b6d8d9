"""Models of transformers and their accelerated twins, for the tests of the drop-in."""

from pathlib import Path

import pytest
from dropin import ARCHITECTURES, near, tokenizer
from models import tiny
from transformers import PreTrainedModel

import foredraft
from foredraft.integrations.transformers import SpeculativeModel


@pytest.fixture(scope="module", params=ARCHITECTURES)
def plain(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny(request.param)


@pytest.fixture(scope="module")
def fast(plain: PreTrainedModel) -> SpeculativeModel:
    return foredraft.accelerate(plain, draft=near(plain), policy="fixed")


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny("llama")


@pytest.fixture(scope="module")
def llama_fast(llama: PreTrainedModel) -> SpeculativeModel:
    return foredraft.accelerate(llama, draft=near(llama), policy="fixed")


@pytest.fixture
def checkpoint(llama: PreTrainedModel, tmp_path: Path) -> Path:
    llama.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    return tmp_path
