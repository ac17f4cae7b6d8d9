"""Shared prefixes and memory that follows use: pages by reference, who fits, what is given back, and to whom."""

import shutil
from dataclasses import replace
from random import Random

import pytest
import torch
import transformers as t
from fakes import Ask, TableModel, new_request, play
from hypothesis import given, settings
from hypothesis import strategies as st
from models import ROPE, draws, tiny

from foredraft import LLM, SamplingParams
from foredraft.admission import CacheLimits
from foredraft.drafters.base import NoDrafter
from foredraft.engine import Engine
from foredraft.errors import CacheMemoryError, RequestError
from foredraft.llm import BUNDLED
from foredraft.models.pages import PAGE, PageCache, PageShape
from foredraft.native import library
from foredraft.policy import Gain
from foredraft.scheduler import Scheduler
from foredraft.types import StepOutput
from foredraft.waiting import run

needs_library = pytest.mark.skipif(bool(library.why_not()), reason=library.why_not())
RUNTIMES = ["torch", pytest.param("native", marks=needs_library)]
SLOTS, KEPT = 4, 5
FEW = SamplingParams(max_new_tokens=4)
SHAPE = PageShape(layers=1, kv_heads=1, dim=16, dtype=torch.float32)


# --- pages -----------------------------------------------------------------------------------------------------------


class Slots:
    """A PageCache whose texts are known: what a position should hold is a number of all tokens up to there."""

    def __init__(self, keep: int = KEPT) -> None:
        self.cache = PageCache(SHAPE, max_slots=SLOTS)
        self.cache.sharing = True
        self.cache.keep(keep * SHAPE.nbytes)
        self.texts: dict[int, list[int]] = {}
        self.names: dict[int, str] = {}

    def begin(self, slot: int, tokens: list[int], name: str = "") -> int:
        """The slot's next text; returns how much of it was there."""
        self.cache.free(slot)
        self.names[slot] = name
        held = self.cache.adopt(slot, tokens[:-1], name)
        self.texts[slot] = tokens[:held]
        self.write(slot, tokens[held:])
        return held

    def write(self, slot: int, tokens: list[int]) -> None:
        text = self.texts[slot]
        self.cache.extend(slot, len(text), len(text) + len(tokens))
        for token in tokens:
            text.append(token)
            self.row(slot, len(text) - 1).fill_(hash(tuple(text)))
        self.cache.publish(slot, text, len(text), self.names[slot])

    def rewind(self, slot: int, length: int) -> None:
        del self.texts[slot][length:]

    def row(self, slot: int, position: int) -> torch.Tensor:
        number, place = divmod(position, PAGE)
        return self.cache.pages[slot][number].memory.view(torch.int64).view(PAGE, -1)[place]

    def check(self) -> None:
        for slot, text in self.texts.items():
            for position in {0, len(text) - 1, *range(PAGE - 1, len(text), PAGE // 2)} if text else ():
                assert (self.row(slot, position) == hash(tuple(text[: position + 1]))).all()
        held = {page for pages in self.cache.pages for page in pages}
        assert self.cache.used == len(held)
        assert len(self.cache.prefixes.idle) <= KEPT and held.isdisjoint(self.cache.prefixes.idle)
        numbers = {page.number for page in (*held, *self.cache.prefixes.idle)}
        parents = {parent for parent, _ in self.cache.prefixes._pages if isinstance(parent, int)}
        assert parents <= numbers  # nothing is kept that nobody could find


actions = st.lists(
    st.tuples(
        st.integers(0, SLOTS - 1), st.sampled_from(["begin", "begin", "write", "rewind", "free"]), st.integers(0, 9)
    ),
    min_size=4,
    max_size=25,
)


@settings(deadline=None, max_examples=120)
@given(actions, st.integers(0, 99))
def test_texts_that_share_pages_read_what_they_would_have_written(steps, seed):
    slots, source = Slots(), Random(seed)
    for slot, action, size in steps:
        text = slots.texts.get(slot)
        if action == "begin" or text is None:
            start = [token for _ in range(size // 2) for token in [source.randrange(2)] * PAGE]
            slots.begin(slot, start + draws(source.randrange(1, 90), size), source.choice(("", "", "other")))
        elif action == "write":
            slots.write(slot, [source.randrange(2)] * (size * 15))
        elif action == "rewind":
            slots.rewind(slot, len(text) * size // 10)
        else:
            slots.cache.free(slot)
            slots.texts.pop(slot)
        slots.check()
    for slot in range(SLOTS):
        slots.cache.free(slot)
    assert slots.cache.used == 0 and slots.cache.kept_bytes <= KEPT * SHAPE.nbytes


def test_whole_pages_are_taken_and_the_last_token_never():
    slots = Slots()
    text = draws(3 * PAGE)
    assert slots.begin(0, text) == 0
    assert slots.begin(1, text) == 2 * PAGE
    assert slots.begin(2, [*text, 5]) == 3 * PAGE
    assert slots.begin(3, text[: PAGE + 1]) == PAGE
    assert slots.cache.used == 3 + 2  # slot 1's last page is slot 0's, found when it was computed again
    slots.check()


def test_another_name_or_none_finds_nothing():
    slots = Slots()
    slots.begin(0, draws(200), "a")
    assert slots.begin(1, draws(200), "b") == 0
    assert slots.cache.adopt(2, draws(200), None) == 0
    assert slots.begin(2, draws(200), "a") == 3 * PAGE


def test_the_same_tokens_after_other_ones_are_another_page():
    slots = Slots()
    slots.begin(0, [*draws(PAGE, 1), *draws(PAGE, 2), 1])
    assert slots.begin(1, [*draws(PAGE, 3), *draws(PAGE, 2), 1]) == 0
    assert slots.begin(2, [*draws(PAGE, 2), 1]) == 0


def test_of_what_ended_texts_leave_the_end_of_the_least_recently_used_goes_first():
    slots = Slots()
    old, new = draws(4 * PAGE, 1), draws(3 * PAGE, 2)
    slots.begin(0, old)
    slots.cache.free(0)
    slots.begin(0, new)
    slots.cache.free(0)
    assert slots.cache.kept_bytes == KEPT * SHAPE.nbytes
    assert slots.begin(0, [*new, 1]) == 3 * PAGE
    assert slots.begin(1, [*old, 1]) == 2 * PAGE


def test_where_memory_is_short_what_ended_texts_left_goes(monkeypatch):
    slots = Slots()
    slots.begin(0, draws(4 * PAGE))
    slots.cache.free(0)
    slots.cache.spare.clear()

    def full(*args, **kwargs):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(torch, "empty", full)
    slots.texts[1], slots.names[1] = [], ""
    slots.write(1, draws(PAGE, 9))
    assert slots.cache.kept_bytes == 0
    with pytest.raises(CacheMemoryError):
        slots.write(1, draws(4 * PAGE, 9))


# --- the library -----------------------------------------------------------------------------------------------------


def llm(draft: object = "none", **options) -> LLM:
    options = {"runtime": "native", "max_batch_size": 4} | options
    return LLM(tiny("llama", torch.bfloat16), draft, **options)  # type: ignore[arg-type]


def rows_of(model, monkeypatch) -> list[int]:
    """Rows of each pass from here on."""
    rows: list[int] = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda batch: (rows.append(len(batch.tokens)), forward(batch))[1])
    return rows


@needs_library
def test_a_second_turn_computes_only_what_is_new(monkeypatch):
    made, prompt = llm(), draws(200)
    first = made.generate(prompt, SamplingParams(max_new_tokens=90))
    assert (first.stats.prefix_queries, first.stats.prefix_tokens) == (200, 0)
    rows = rows_of(made.model, monkeypatch)
    again = prompt + first.token_ids + draws(20, 3)
    second = made.generate(again, FEW)
    assert second.stats.prefix_tokens == 289 // PAGE * PAGE == 4 * PAGE
    assert rows[0] == len(again) - 4 * PAGE
    assert second.token_ids == llm(prefix_cache=False).generate(again, FEW).token_ids
    assert made.engine.stats.prefix_queries == 200 + len(again) and made.engine.stats.prefix_tokens == 4 * PAGE
    assert (
        made.memory["target_cache"] <= 16 * PAGE * made.model.cache.bytes_per_token < made.memory["prefix_cache"] * 99
    )


@needs_library
def test_it_can_be_switched_off():
    made = llm(prefix_cache=False)
    results = [made.generate(draws(200), FEW) for _ in range(2)]
    assert all(result.stats.prefix_queries == result.stats.prefix_tokens == 0 for result in results)
    assert made.memory["prefix_cache"] == 0


@needs_library
def test_requests_of_one_name_share_and_others_do_not():
    made = llm()
    taken = []
    for name in ("a", "b", None, "a"):
        job = made.job(draws(200), FEW)
        job.request.memory = name
        run(made.runner, [job])
        taken.append(job.request.stats.prefix_tokens)
    assert taken == [0, 0, 0, 3 * PAGE]


@needs_library
def test_equal_prompts_that_come_together_are_computed_once(monkeypatch):
    made = llm()
    rows = rows_of(made.model, monkeypatch)
    prompt = draws(600)
    results = made.generate([prompt] * 4, SamplingParams(max_new_tokens=1))
    assert sum(rows) == 600 + 3 * (600 % PAGE)
    assert len({tuple(result.token_ids) for result in results}) == 1


@needs_library
def test_a_draft_models_cache_shares_too(monkeypatch):
    made = llm(tiny("llama", torch.float32))
    draft = made.drafter.model  # type: ignore[attr-defined]
    made.generate(draws(300), FEW, num_draft_tokens=2)
    assert draft.cache.kept_bytes and not draft.cache.used
    starts = []
    extend = draft.cache.extend
    monkeypatch.setattr(
        draft.cache, "extend", lambda slot, start, end: (starts.append(start), extend(slot, start, end))
    )
    made.generate(draws(300), FEW, num_draft_tokens=2)
    assert starts[0] == 4 * PAGE


@needs_library
def test_a_draft_model_that_failed_leaves_nothing_behind(monkeypatch):
    made = llm(tiny("llama", torch.float32))
    draft = made.drafter.model  # type: ignore[attr-defined]

    def fails(*args):
        raise CacheMemoryError("no memory")

    monkeypatch.setattr(draft, "chain", fails)
    monkeypatch.setattr(draft, "forward", fails)
    result = made.generate([draws(300)], FEW, num_draft_tokens=2, on_error="return")[0]
    assert isinstance(result.error, CacheMemoryError)
    assert len(draft.cache.prefixes) == 0 and len(made.model.cache.prefixes) == 4


# --- who fits --------------------------------------------------------------------------------------------------------


def engine(limits: CacheLimits, batch: int = 4) -> Engine:
    return Engine(TableModel(), NoDrafter(), Gain(), max_batch_size=batch, max_model_len=512, limits=limits)


class OneByte:
    """A cache that takes a byte a token, beside one that takes none."""

    page, nbytes, kept_bytes, bytes_per_token, sharing = 0, 0, 0, 1, False

    def __init__(self) -> None:
        self.kept: list[int] = []

    def need(self, lengths, slots=0) -> int:
        return sum(lengths)

    def keep(self, nbytes: int) -> None:
        self.kept.append(nbytes)

    def shrink(self) -> None:
        pass


def test_what_does_not_fit_waits_and_comes_in_turn():
    made = engine(CacheLimits(100))
    made.admission.caches = lambda: [OneByte()]
    most: list[int] = []
    step = made.step
    made.step = lambda: (step(), most.append(sum(len(r.token_ids) for r in made.scheduler.running)))[0]  # type: ignore
    asks = [Ask([1] * 20, SamplingParams(max_new_tokens=20, ignore_eos=True), seed=i) for i in range(5)]
    asks.insert(2, replace(asks[0], prompt=[1] * 80))  # it needs all of it, and is not overtaken
    requests = play(made, asks)
    assert [request.num_output for request in requests] == [20] * 6
    assert max(most) <= 100
    started = [request.started for request in requests]
    assert started == sorted(started) and started[2] < started[3]


def test_what_can_never_fit_is_refused_with_both_figures():
    made = engine(CacheLimits(3 * 2**20))
    made.admission.caches = lambda: [OneByte()]
    made.admission.max_model_len = 2**30
    request = new_request(Ask([1], SamplingParams(max_new_tokens=4 * 2**20 - 1)))
    with pytest.raises(RequestError, match=r"4194304 tokens.* take 4\.0 MiB.*cache_bytes allows 3\.0 MiB; shorten"):
        made.add(request)
    assert not made.has_work


def test_ended_texts_keep_what_running_ones_leave():
    made = engine(CacheLimits(100, 50))
    cache = OneByte()
    made.admission.caches = lambda: [cache, cache]  # two that have what there is between them
    play(made, [Ask([1] * 20, SamplingParams(max_new_tokens=10))])
    assert cache.sharing and cache.kept == [20, 20, 25, 25]


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_limit_holds_target_and_draft_and_changes_no_token(runtime):
    prompts = [draws(length, length) for length in (100, 30, 300, 5, 60)]
    free = llm(tiny("llama", torch.float32), runtime=runtime)
    wanted = [result.token_ids for result in free.generate(prompts, FEW)]
    need = sum(cache.need([304]) for cache in free.engine.caches())
    made = llm(tiny("llama", torch.float32), runtime=runtime, cache_bytes=need)
    assert [result.token_ids for result in made.generate(prompts, FEW)] == wanted
    assert made.memory["target_cache"] + made.memory["draft_cache"] + made.memory["prefix_cache"] <= need + spare(made)
    with pytest.raises(RequestError, match="cache_bytes allows"):
        made.generate(draws(600), FEW)
    result = made.generate([draws(600), draws(9)], FEW, on_error="return")
    assert isinstance(result[0].error, RequestError) and result[1].error is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("total", [20, 190, 256, 512])
def test_no_pass_takes_more_than_a_request_was_admitted_with(total, dtype):
    """A block that doubles with the keys of padding rows took twice the limit at 512 tokens, and four times at 20."""
    model = tiny("llama", dtype)
    few = SamplingParams(max_new_tokens=8)
    need = LLM(model, draft="none", runtime="torch").engine.caches()[0].need([total])
    made = LLM(model, draft="none", runtime="torch", cache_bytes=need)
    peaks = Peaks(made)
    made.generate([draws(total - 8, seed) for seed in range(3)], few)
    assert 0 < peaks.most <= need


def test_what_an_ended_text_left_in_a_cache_that_rests_goes_where_others_need_it():
    """A draft model on torch kept its block while requests without drafts filled the target's native pages."""
    target, draft = tiny("llama", torch.bfloat16), tiny("gpt2", torch.bfloat16)
    few = SamplingParams(max_new_tokens=8, ignore_eos=True)
    long, short = [draws(400), *[draws(5, seed) for seed in range(3)]], [draws(300, seed) for seed in range(3)]
    probe = LLM(target, draft)
    need = max(
        probe.engine.admission.need([probe.job(prompt, few).request for prompt in prompts]) for prompts in (long, short)
    )
    made = LLM(target, draft, cache_bytes=need, prefix_cache=False)
    peaks = Peaks(made, "target_cache", "draft_cache")
    made.generate(long, few, num_draft_tokens=4)
    made.generate(short, few, draft="none")
    assert 0 < peaks.most <= need


def test_slots_that_others_left_count():
    """Two texts, of which one has the fourth slot, take a block of four."""
    model = tiny("llama", torch.float32)
    need = LLM(model, draft="none", runtime="torch").engine.caches()[0].need([100] * 4)
    made = LLM(model, draft="none", runtime="torch", cache_bytes=need)
    peaks = Peaks(made)
    short, long = SamplingParams(max_new_tokens=2), SamplingParams(max_new_tokens=60)
    made.generate([draws(10), draws(11), draws(12), draws(13), draws(400)], [short, short, short, long, short])
    assert 0 < peaks.most <= need


class Peaks:
    """The most bytes that these caches held after any step."""

    def __init__(self, made: LLM, *names: str) -> None:
        self.most, self.made, self.step, self.names = 0, made, made.engine.step, names or ("target_cache",)
        made.engine.step = self.watch  # type: ignore[method-assign]

    def watch(self) -> list[StepOutput]:
        outputs = self.step()
        self.most = max(self.most, sum(self.made.memory[name] for name in self.names))
        return outputs


def spare(made: LLM) -> int:
    return sum(
        getattr(cache, "shape", SHAPE).nbytes * len(getattr(cache, "spare", ())) for cache in made.engine.caches()
    )


@pytest.mark.parametrize(("option", "value"), [("cache_bytes", 0), ("cache_bytes", 1.5), ("prefix_cache", -1)])
def test_limits_that_make_no_sense_are_refused(option, value):
    with pytest.raises(RequestError, match=f"{option}={value} is not usable"):
        CacheLimits.of(**{"cache_bytes": None, "prefix_cache": True} | {option: value}, device=torch.device("cpu"))


def test_by_default_most_of_what_is_free_may_be_used(monkeypatch):
    monkeypatch.setattr("foredraft.admission.free_memory", lambda device: 1000)
    cpu = torch.device("cpu")
    assert CacheLimits.of(None, True, cpu) == CacheLimits(900, 225)
    assert CacheLimits.of(400, False, cpu) == CacheLimits(400, 0)
    assert CacheLimits.of(400, 10**9, cpu) == CacheLimits(400, 400)


# --- what is given back ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=RUNTIMES)
def long_llm(request) -> LLM:
    config = t.LlamaConfig(**ROPE | {"max_position_embeddings": 4200, "dtype": torch.bfloat16})
    model = t.AutoModelForCausalLM.from_config(config).bfloat16().eval()
    return LLM(model, "none", runtime=request.param, max_batch_size=16)


def held(made: LLM) -> int:
    """Bytes of 16 texts of 100 tokens, after the first steps of all."""
    streams = [made.stream(draws(100, seed), SamplingParams(max_new_tokens=28)) for seed in range(16)]
    for stream in streams:
        next(stream)
    assert len(made.engine.scheduler.running) == 16
    taken = made.memory["target_cache"]
    for stream in streams:
        list(stream)
    return taken


def test_after_a_long_text_short_ones_hold_what_they_need(long_llm):
    long_llm.generate(draws(4090), SamplingParams(max_new_tokens=6))
    assert held(long_llm) <= 2 * 16 * 128 * long_llm.model.cache.bytes_per_token


def test_200_requests_of_mixed_length_leave_memory_where_it_was(long_llm):
    before = held(long_llm)
    source = Random(2)
    prompts = [draws(source.choice((5, 40, 150, 400)), seed) for seed in range(200)]
    long_llm.generate(prompts, SamplingParams(max_new_tokens=3))
    assert held(long_llm) == before
    assert long_llm.memory["prefix_cache"] <= long_llm.engine.admission.limits.kept


def test_the_scheduler_lets_nobody_overtake():
    small, large = new_request(Ask([1])), new_request(Ask([1] * 9))
    scheduler = Scheduler(4, fits=lambda running, request: len(request.token_ids) < 5)
    for request in (large, small):
        scheduler.add(request)
    assert not scheduler.admit()
    assert scheduler.next_batch() == [] and list(scheduler.waiting) == [large, small]


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_caches_that_hold_no_text_at_all_are_refused_at_once(runtime):
    made = llm(tiny("llama", torch.float32), runtime=runtime)
    least = sum(cache.need([2]) for cache in made.engine.caches())
    with pytest.raises(
        RequestError, match=rf"cache_bytes={least - 1} is not usable; .* take at least {least} \(.*give"
    ):
        llm(tiny("llama", torch.float32), runtime=runtime, cache_bytes=least - 1)
    one = llm(tiny("llama", torch.float32), runtime=runtime, cache_bytes=least)
    assert one.generate([7], SamplingParams(max_new_tokens=1)).token_ids


def test_and_where_the_configuration_says_so_before_a_weight_is_read(tmp_path):
    shutil.copy(BUNDLED / "target" / "config.json", tmp_path)
    with pytest.raises(RequestError, match=r"cache_bytes=3 is not usable; .*take at least"):
        LLM(str(tmp_path), "none", cache_bytes=3)
