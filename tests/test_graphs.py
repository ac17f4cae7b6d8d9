"""GraphPool: replays read the static buffers and nothing else; a fake capture stands in where there is no GPU."""

from collections.abc import Callable

import pytest
import torch
from models import tiny

from foredraft import LLM, SamplingParams
from foredraft.models.decoder import Decoder
from foredraft.models.graphs import GraphPool


class Rerun:
    """Recomputes from the buffers it was captured with, into the tensor it first returned, as a CUDA graph does."""

    def __init__(self, work: Callable[[], torch.Tensor]) -> None:
        self.work = work
        self.output = work()

    def replay(self) -> None:
        self.output.copy_(self.work())


def test_a_replay_sees_new_inputs() -> None:
    pool = GraphPool(capture=Rerun)
    calls = [pool.run("double", lambda x: 2 * x, torch.tensor([float(i)])) for i in range(3)]
    assert [call.item() for call in calls] == [0.0, 2.0, 4.0]  # results stay the caller's own


def test_keys_are_kept_apart() -> None:
    pool = GraphPool(capture=Rerun)
    x = torch.ones(1)
    assert pool.run("double", lambda x: 2 * x, x).item() == 2
    assert pool.run("negate", lambda x: -x, x).item() == -1
    assert pool.run("double", lambda x: 7 * x, x).item() == 2  # captured is captured


def test_the_least_recently_used_graph_is_dropped() -> None:
    pool = GraphPool(capacity=2, capture=Rerun)
    for key in ("a", "b", "a", "c"):
        pool.run(key, lambda x: x + 1, torch.zeros(1))
    assert list(pool.captured) == ["a", "c"]


def test_a_decoder_computes_the_same_through_graphs() -> None:
    """Every input of a captured pass arrives through its buffers: texts grow, slots change, the cache moves."""
    plain, graphed = (LLM(tiny("llama"), draft="none", max_batch_size=3, runtime="torch") for _ in range(2))
    assert isinstance(graphed.model, Decoder)
    graphed.model.graphs = GraphPool(capture=Rerun)
    prompts = [[5, 9, 2], list(range(90)), [7] * 40]
    params = SamplingParams(max_new_tokens=60, ignore_eos=True)
    for batch in (prompts[:1], prompts, prompts[1:]):
        expected = [result.token_ids for result in plain.generate(batch, params)]
        assert [result.token_ids for result in graphed.generate(batch, params)] == expected
    assert graphed.model.graphs.captured


def test_no_graph_outlives_the_memory_it_was_captured_over() -> None:
    """The cache shrinks after a long text, and grows to the same size again, elsewhere."""
    llm = LLM(tiny("llama"), draft="none", max_batch_size=1, runtime="torch")
    cache, replayed = llm.model.cache, 0

    class Pinned(Rerun):
        def __init__(self, work: Callable[[], torch.Tensor]) -> None:
            super().__init__(work)
            self.storage = cache.storage

        def replay(self) -> None:
            nonlocal replayed
            replayed += 1
            assert cache.storage is self.storage
            super().replay()

    assert isinstance(llm.model, Decoder)
    llm.model.graphs = GraphPool(capture=Pinned)
    sizes = []
    for length in (5, 600, 5, 600):
        llm.generate([7] * length, SamplingParams(max_new_tokens=5, ignore_eos=True))
        sizes.append(cache.length)
    assert sizes == [512, 1024, 512, 1024] and replayed


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_cuda_graph_replays() -> None:
    pool = GraphPool()
    for i in range(3):
        x = torch.full((4,), float(i), device="cuda")
        assert torch.equal(pool.run("double", lambda x: 2 * x, x), 2 * x)
