"""The bench's model and one whole run, with a short prediction, for its tests."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
from bench_cases import OPTIONS, TASKS, small_llm

from foredraft import LLM
from foredraft.bench import prediction
from foredraft.bench.pipeline import bench
from foredraft.bench.result import Bench


@pytest.fixture
def llm() -> LLM:
    return small_llm()


@pytest.fixture(scope="module", autouse=True)
def brief() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prediction, "COST_LAPS", 1)
        yield


@pytest.fixture(scope="module")
def found() -> Bench:
    return bench(small_llm(), TASKS, replace(OPTIONS, predict=True), name="tiny & <small>")
