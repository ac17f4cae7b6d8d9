"""SlotCache: what was written at a position is read there, however often a sequence was cut back or the cache grew."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import tiny

from foredraft import LLM
from foredraft.errors import CacheMemoryError
from foredraft.models.cache import GRANULE, LEAST, LayerShape, SlotCache
from foredraft.models.load import LoadOptions, load_target
from foredraft.models.rows import Span, plan

SHAPES = [LayerShape(2, 4, 3), LayerShape(1, 2, 5)]
SLOTS, LENGTH = 5, 40


def make(max_slots: int = SLOTS, max_length: int = 8 * GRANULE) -> SlotCache:
    cpu = torch.device("cpu")
    return SlotCache(SHAPES, dtype=torch.float32, devices=[cpu, cpu], max_slots=max_slots, max_length=max_length)


def write(cache: SlotCache, slot: int, start: int, values: list[float]) -> None:
    cache.reserve(slot + 1, start + len(values))
    index = slot * cache.length + start + torch.arange(len(values))
    for layer, shape in enumerate(SHAPES):
        rows = torch.tensor(values)[:, None] * (layer + 1) + torch.arange(shape.width) / 64
        cache.write(layer, index, rows)


def read(cache: SlotCache, slot: int, length: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return cache.views(slot, 1, length)


def expected(values: list[float], layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys [1, heads, n, key_dim] and values, laid out by hand."""
    shape = SHAPES[layer]
    rows = torch.tensor(values)[:, None] * (layer + 1) + torch.arange(shape.width) / 64
    split = shape.heads * shape.key_dim
    keys = rows[:, :split].reshape(1, len(values), shape.heads, shape.key_dim).transpose(1, 2)
    return keys, rows[:, split:].reshape(1, len(values), shape.heads, shape.value_dim).transpose(1, 2)


def check(cache: SlotCache, texts: dict[int, list[float]]) -> None:
    for slot, values in texts.items():
        for layer, found in enumerate(read(cache, slot, len(values)) if values else ()):
            assert all(torch.equal(a, b) for a, b in zip(found, expected(values, layer), strict=True))


actions = st.lists(
    st.tuples(st.integers(0, SLOTS - 1), st.integers(0, 300), st.integers(0, 900)), min_size=1, max_size=12
)


@settings(deadline=None, max_examples=60)
@given(actions)
def test_random_append_and_truncate_equal_what_a_list_holds(steps):
    cache = make()
    texts: dict[int, list[float]] = {slot: [] for slot in range(SLOTS)}
    fresh = iter(range(10**6))
    for slot, cut, count in steps:
        kept = texts[slot][: max(0, len(texts[slot]) - cut)]
        added = [float(next(fresh)) for _ in range(count)]
        if added:
            write(cache, slot, len(kept), added)
        texts[slot] = kept + added
    check(cache, texts)


@settings(deadline=None, max_examples=12)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 8)), min_size=1, max_size=8), st.data())
def test_random_append_and_truncate_equal_recomputation(llama, steps, data):
    """A text that was written, cut back and rewritten gives the bits of the same text written once."""
    tokens: list[int] = []
    for appended, kept in steps:
        block = data.draw(st.lists(st.integers(0, llama.vocab_size - 1), min_size=appended, max_size=appended))
        kept = max(1, min(kept, appended))
        last = forward(llama, 1, len(tokens), block)[kept - 1]
        tokens += block[:kept]
    assert torch.equal(forward(llama, 0, 0, tokens)[-1], last)


def forward(model, slot: int, start: int, tokens: list[int]) -> torch.Tensor:
    r = model.row_invariance
    return model.forward(plan([Span(slot, start, tokens, len(tokens))], r.min_rows, r.key_multiple, r.row_multiple))


@pytest.fixture(scope="module")
def llama():
    model = load_target(tiny("llama"), LoadOptions("float32", "cpu"))
    model.cache.max_slots = 2
    return model


def test_growth_doubles_and_keeps_what_was_written():
    cache = make()
    values = [float(i) for i in range(LENGTH)]
    write(cache, 0, 0, values)
    assert (cache.slots, cache.length) == (1, LEAST)
    cache.reserve(1, GRANULE + 1)
    assert (cache.slots, cache.length) == (1, 2 * GRANULE)
    cache.reserve(2, 2 * GRANULE + 1)
    assert (cache.slots, cache.length) == (2, 4 * GRANULE)
    cache.reserve(3, 1)
    assert (cache.slots, cache.length) == (4, 4 * GRANULE)
    cache.reserve(5, 8 * GRANULE)
    assert (cache.slots, cache.length) == (5, 8 * GRANULE)  # not beyond the maxima
    check(cache, {0: values})
    assert cache.nbytes == 5 * 8 * GRANULE * cache.bytes_per_token == sum(t.nbytes for t in cache.storage)


def test_what_was_never_written_is_zero():
    cache = make()
    write(cache, 0, 0, [1.0])
    cache.reserve(4, 3 * GRANULE)
    keys, values = cache.views(0, 4, 3 * GRANULE)[0]
    assert keys[0, :, 0].any()
    assert not keys[0, :, 1:].any() and not keys[1:].any() and not values[1:].any()


def test_views_are_reused_and_forgotten_on_growth():
    cache = make()
    write(cache, 0, 0, [1.0, 2.0])
    before = cache.views(0, 1, 128)
    assert cache.views(0, 1, 128) is before
    write(cache, 0, 1, [5.0])
    assert before[0][0][0, 0, 1, 0] == 5.0  # a view, not a copy
    cache.reserve(2, 4 * GRANULE)
    after = cache.views(0, 1, 128)
    assert after is not before
    write(cache, 0, 1, [7.0])
    assert after[0][0][0, 0, 1, 0] == 7.0
    assert before[0][0][0, 0, 1, 0] == 5.0


def test_clear_zeroes_one_slot_also_after_inference_mode():
    cache = make()
    with torch.inference_mode():
        for slot in range(3):
            write(cache, slot, 0, [float("nan"), 2.0])
    cache.clear(1)
    assert not cache.storage[0][1].any()
    assert cache.storage[0][0].isnan().any() and cache.storage[0][2].isnan().any()


def test_the_library_lets_the_cache_double_up_to_its_context():
    llm = LLM(tiny("llama"), None, max_model_len=1000, max_batch_size=3)
    assert (llm.model.cache.max_slots, llm.model.cache.max_length) == (3, 1024)


def test_release_gives_everything_back():
    cache = make()
    write(cache, 2, 0, [3.0])
    cache.release()
    assert (cache.slots, cache.length, cache.nbytes, cache.storage) == (0, 0, 0, [])
    write(cache, 1, 0, [4.0])
    check(cache, {1: [4.0]})


def test_a_growth_that_does_not_fit_changes_nothing(monkeypatch):
    cache = make()
    write(cache, 0, 0, [1.0, 2.0])
    zeros = torch.zeros
    calls = []

    def second_fails(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return zeros(*args, **kwargs)

    monkeypatch.setattr(torch, "zeros", second_fails)
    with pytest.raises(CacheMemoryError, match=r"0\.00 GiB on cpu for 2 sequences of 128 tokens.*lower max_model"):
        cache.reserve(2, 10)
    assert (cache.slots, cache.length) == (1, LEAST)
    check(cache, {0: [1.0, 2.0]})
