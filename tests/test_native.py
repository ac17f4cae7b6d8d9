"""The native runtime: what its kernels compute, and that a row's bits are those of its weights and text alone."""

import copy
import ctypes
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers as t
from children import in_a_child
from models import ROPE, VOCAB, biased, draws, tiny

from foredraft import LLM, SamplingParams
from foredraft.errors import ModelError, RequestError
from foredraft.models.base import SkipSet
from foredraft.models.invariance import confirm
from foredraft.models.load import LoadOptions, load_model
from foredraft.models.native import NativeModel
from foredraft.models.pages import PAGE, PageCache
from foredraft.models.rows import RowBatch, Span, plan
from foredraft.native import library
from foredraft.structured import mask
from foredraft.weights.choice import quantise
from foredraft.weights.memory import WeightMemory
from foredraft.weights.packed import Packed, Part, pack, quantized, stacked
from foredraft.weights.quantize import Quantizer

pytestmark = pytest.mark.skipif(bool(library.why_not()), reason=library.why_not())
FAMILY = ("llama", "mistral", "qwen2", "qwen3")
DTYPES = (torch.float32, torch.bfloat16)
FORMS = ("float32", "bfloat16", "int8", "int4-32", "int4-64")
SIZES = (
    (64, 64),
    (96, 384),
    (72, 100),
    (1, 33),
    (150, 40),
)  # outputs, inputs: whole blocks, tails, all widths of tiles
ODD = t.LlamaConfig(
    **{**ROPE, "vocab_size": 157, "hidden_size": 44, "intermediate_size": 90, "num_attention_heads": 2}
    | {"num_key_value_heads": 1, "num_hidden_layers": 3, "head_dim": 22, "attention_bias": True, "mlp_bias": True}
)


def isas() -> tuple[str, ...]:
    return ("portable",) if library.why_not() else library.load().isas


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# --- masks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("count", [1, 15, 16, 40, 157])
def test_a_mask_leaves_what_is_allowed_and_what_is_no_number(isa, count):
    scores = torch.randn(3, count, generator=torch.Generator().manual_seed(count))
    scores[0, 0], scores[1, -1], scores[2, count // 2] = torch.nan, torch.inf, -torch.inf
    sets = np.random.default_rng(count).integers(0, 256, (3, -(-count // 8)), np.uint8)
    allowed = torch.from_numpy(np.unpackbits(sets, axis=1, bitorder="little"))[:, :count].bool()
    found = torch.full((3, count + 1), 7.0)  # one more: nothing is written behind the end
    before, loaded = scores.clone(), library.load()
    loaded.functions.foredraft_mask(
        loaded.isa(isa), scores.data_ptr(), sets.ctypes.data, 3, count, found.flatten().data_ptr()
    )
    found, behind = found.flatten()[: 3 * count].view(3, count), found.flatten()[3 * count :]
    wanted = torch.where(allowed | scores.isnan(), scores, -torch.inf)
    rows = [row.tobytes() for row in sets]
    others = mask.by_table(scores, sets.tobytes()), mask.only(scores, rows), mask.only(scores.T.contiguous().T, rows)
    for masked in (found, *others):
        assert torch.equal(masked.nan_to_num(nan=9), wanted.nan_to_num(nan=9))
    assert (behind == 7).all() and torch.equal(scores.nan_to_num(nan=9), before.nan_to_num(nan=9))


# --- products --------------------------------------------------------------------------------------------------------


def packed(form: str, weight: torch.Tensor, bias: torch.Tensor) -> Packed:
    rows = stacked([Part(weight.bfloat16() if form == "bfloat16" else weight, bias)])
    made = pack(library.load(), rows, weight.shape[1], WeightMemory())
    if form in ("float32", "bfloat16"):
        return made
    kind, _, group = form.partition("-")
    quantizer = Quantizer("int4", int(group)) if kind == "int4" else Quantizer("int8-dynamic")
    return quantized(library.load(), made, quantizer, WeightMemory())


def product(layer: Packed, x: torch.Tensor, isa: str, threads: int = 2) -> torch.Tensor:
    """y [rows, outputs], padding included."""
    rows, count = x.shape
    wide = F.pad(x.float(), (0, -count % 16)).contiguous()
    y = torch.empty(rows, layer.outputs)
    struct, lib = layer.struct(), library.load()
    address = ctypes.addressof(struct)
    arguments = (address, lib.isa(isa), wide.data_ptr(), rows, count, y.data_ptr(), layer.outputs, threads)
    assert lib.functions.foredraft_linear(*arguments) == 0
    return y


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_products_are_near_those_in_float64_and_rows_never_meet(form, size, isa):
    """The bounds are on the error's norm over the result's: inputs are rounded, weights too, and both to few bits."""
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(size, generator=generator), torch.randn(size[0], generator=generator)
    x = torch.randn(17, size[1], generator=generator)
    layer = packed(form, weight, bias)
    y = product(layer, x, isa)[:, : size[0]]
    wanted = x.double() @ weight.double().T + bias.double()
    bound = {"float32": 1e-6, "bfloat16": 6e-3, "int8": 2e-2}.get(form, 0.2)
    assert (y - wanted).norm() <= bound * wanted.norm()
    assert torch.equal(y, torch.cat([product(layer, row, isa)[:, : size[0]] for row in x.split(1)]))
    for count in range(1, 17):
        assert torch.equal(product(layer, x[:count], isa, threads=3)[:, : size[0]], y[:count])


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("form", ["float32", "bfloat16"])
def test_the_smallest_and_the_largest_numbers_count_alike_in_every_pass(form, isa):
    """Tiles of AMX take what is below the least normal number for zero, and so must what stands in for them."""
    generator = torch.Generator().manual_seed(1)
    sizes = torch.exp2(torch.randint(-140, 60, (9, 96), generator=generator).float())
    weight = torch.randn(160, 96, generator=generator) * torch.exp2(
        torch.randint(-30, 30, (160, 96), generator=generator)
    )
    x = torch.randn(9, 96, generator=generator) * sizes
    x[2] *= 1e-38 / x[2].abs().max()
    x[3, 5], x[4, 7] = torch.inf, torch.nan
    layer = packed(form, weight, torch.zeros(160))
    y = product(layer, x, isa)[:, :160]
    assert y[[0, 1, 2, 5, 6, 7, 8]].isfinite().all() and not y[3].isfinite().any() and y[4].isnan().all()
    for count in range(1, 9):
        found = product(layer, x[:count], isa)[:, :160]
        assert torch.equal(found.nan_to_num(7), y[:count].nan_to_num(7))


def test_planted_a_product_with_another_weight_is_noticed():
    """The control of the bounds above."""
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    layer = packed("int4-32", weight.roll(1, 0), torch.zeros(64))
    wanted = x.double() @ weight.double().T
    assert (product(layer, x, "portable") - wanted).norm() > 0.2 * wanted.norm()


# --- whole models ----------------------------------------------------------------------------------------------------


def native(model: t.PreTrainedModel) -> NativeModel:
    made = load_model(model, LoadOptions(runtime="native"))
    assert isinstance(made, NativeModel)
    return made


def odd(dtype: torch.dtype) -> t.PreTrainedModel:
    torch.manual_seed(3)
    return biased(t.AutoModelForCausalLM.from_config(ODD, dtype=dtype).eval())


def forward(model: NativeModel, *spans: Span) -> torch.Tensor:
    return model.forward(plan(spans, 1, 1))


def rounded(weight_format: str) -> Callable[[torch.dtype], t.PreTrainedModel]:
    def make(dtype: torch.dtype) -> t.PreTrainedModel:
        model = biased(tiny("qwen2", dtype))
        quantise(model, weight_format, dtype)
        return model

    return make


MAKERS = {name: (lambda dtype, name=name: biased(tiny(name, dtype))) for name in FAMILY} | {"odd": odd}
ROUNDED = {weight_format: rounded(weight_format) for weight_format in ("int4", "int8")}


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MAKERS | ROUNDED)
def test_a_rows_bits_do_not_depend_on_its_pass(name, dtype, isa):
    """One by one, in one pass, in uneven chunks, beside mates in every slot, and with one, two or three threads."""
    model = NativeModel((MAKERS | ROUNDED)[name](dtype), library.load(), isa=isa)
    tokens = [token % model.vocab_size for token in draws(150)]
    torch.set_num_threads(2)
    whole = forward(model, Span(0, 0, tokens, len(tokens)))
    assert whole.isfinite().all()
    source = Random(1)
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        model.cache.release()
        start, found = 0, []
        while start < len(tokens):
            width = min(source.choice((1, 1, 2, 5, 17)), len(tokens) - start)
            mates = [Span(slot, source.randrange(90), tokens[: source.randint(1, 9)], 1) for slot in (0, 2)]
            beside = source.sample(mates, source.randint(0, 2))
            made = forward(model, Span(1, start, tokens[start : start + width], width), *beside)
            found.append(made[:width])
            start += width
        assert torch.equal(torch.cat(found), whole)


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("name", MAKERS)
def test_in_fp32_it_computes_what_transformers_does(name, isa):
    source = MAKERS[name](torch.float32)
    model = NativeModel(source, library.load(), isa=isa)
    tokens = [token % model.vocab_size for token in draws(130)]
    with torch.inference_mode():
        wanted = source(input_ids=torch.tensor([tokens])).logits[0]
    found = forward(model, Span(0, 0, tokens, len(tokens)))
    assert (found - wanted).norm() <= 1e-4 * wanted.norm()


@pytest.mark.parametrize("name", MAKERS)
def test_in_fp32_its_text_is_that_of_transformers(name):
    source = MAKERS[name](torch.float32)
    tokens = [token % source.config.vocab_size for token in draws(40)]
    ids = torch.tensor([tokens])
    options = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0}
    text = source.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, 40:].tolist()
    llm = LLM(source, "ngram", runtime="native")
    assert llm.generate(tokens, SamplingParams(max_new_tokens=40)).token_ids == text


def test_a_long_text_beside_short_ones():
    """To 4,096 tokens, over more than one chunk of keys."""
    config = t.LlamaConfig(**ROPE | {"max_position_embeddings": 4200, "num_hidden_layers": 1})
    torch.manual_seed(0)
    model = native(t.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval())
    tokens = draws(4096)
    for start in range(0, 4080, 255):
        forward(model, Span(0, start, tokens[start : start + 255], 0))
        forward(model, Span(3, start, tokens[start : start + 255], 0))
    together = forward(model, Span(0, 4080, tokens[4080:], 16), Span(1, 0, tokens[:3], 1))[:16]
    alone = [forward(model, Span(3, 4080 + i, [token], 1)) for i, token in enumerate(tokens[4080:])]
    assert torch.equal(torch.cat(alone), together)


@pytest.mark.parametrize("convert", [Quantizer("int4"), Quantizer("int8-dynamic"), None], ids=["int4", "int8", "skip"])
def test_a_self_draft_leaves_the_targets_bits_alone(convert):
    model = native(tiny("llama", torch.bfloat16))
    tokens = draws(90)
    plain = forward(model, Span(0, 0, tokens, len(tokens)))
    draft = model.variant(*([convert] if convert else []), skip=SkipSet((1,), ()) if convert is None else SkipSet())
    model.cache.release()
    forward(model, Span(0, 0, tokens[:60], 0))
    for i in range(60, 66):
        assert forward(draft, Span(0, i, [tokens[i]], 1)).isfinite().all()
    assert torch.equal(forward(model, Span(0, 60, tokens[60:], 30)), plain[60:])


@pytest.mark.parametrize(("convert", "bound"), [(Quantizer("int8-dynamic"), 0.06), (Quantizer("int4"), 0.5)], ids=str)
@pytest.mark.parametrize("isa", isas())
def test_a_low_bit_draft_is_near_its_target(convert, bound, isa):
    """A draft that is not costs no token, only its use: nothing else would show it."""
    model = NativeModel(MAKERS["qwen3"](torch.bfloat16), library.load(), isa=isa)
    draft, tokens = model.variant(convert), draws(90)
    wanted = forward(model, Span(0, 0, tokens, 90))
    found = forward(draft, Span(1, 0, tokens, 90))
    assert 0 < (found - wanted).norm() <= bound * wanted.norm()
    assert torch.equal(torch.cat([forward(draft, Span(1, i, [token], 1)) for i, token in enumerate(tokens)]), found)


@pytest.mark.parametrize(
    ("skip", "left_out"), [(SkipSet((1,), ()), "self_attn.o_proj"), (SkipSet((), (1,)), "mlp.down_proj")]
)
def test_a_draft_that_skips_is_its_target_with_a_product_of_zeros(left_out, skip):
    source, tokens = tiny("llama"), draws(90)
    without = copy.deepcopy(source)
    without.get_decoder().layers[1].get_submodule(left_out).weight.data.zero_()
    found = forward(native(source).variant(skip=skip), Span(0, 0, tokens, 90))
    assert torch.equal(found, forward(native(without), Span(0, 0, tokens, 90)))
    assert not torch.equal(found, forward(native(source), Span(0, 0, tokens, 90)))


# --- memory ----------------------------------------------------------------------------------------------------------


def poison(cache: PageCache, slot: int, start: int) -> None:
    """What a model that overflowed leaves behind from a position on."""
    for number, page in enumerate(cache.pages[slot] if slot < len(cache.pages) else ()):
        gone = torch.arange(number * PAGE, (number + 1) * PAGE) >= start
        for tokens in cache.by_token(page):
            tokens.masked_fill_(gone.view(tokens.shape[2], 1, tokens.shape[4]), float("nan"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rewinding_clearing_and_reusing_slots_equals_computing_anew(dtype):
    model, fresh = native(tiny("qwen3", dtype)), native(tiny("qwen3", dtype))
    source, texts = Random(5), {slot: [] for slot in range(3)}
    for _ in range(80):
        slot = source.randrange(3)
        if source.random() < 0.2:
            model.cache.free(slot)
            texts[slot] = []
        keep = source.randint(0, len(texts[slot]))
        if source.random() < 0.4:
            poison(model.cache, slot, keep)
            model.cache.clear(slot, keep)
        added = [source.randrange(VOCAB) for _ in range(source.choice((1, 3, 70)))]
        texts[slot] = texts[slot][:keep] + added
        found = forward(model, Span(slot, keep, added, len(added)))
        fresh.cache.release()
        wanted = forward(fresh, Span(0, 0, texts[slot], len(added)))
        assert torch.equal(found, wanted)


def test_memory_follows_use():
    """After a text of 64 pages has ended, 16 of a page each hold what they need; and 50 requests leave nothing."""
    config = t.LlamaConfig(**ROPE | {"max_position_embeddings": 4200})
    llm = LLM(t.AutoModelForCausalLM.from_config(config).eval(), "none", runtime="native", max_batch_size=16)
    page = PAGE * llm.model.cache.bytes_per_token
    llm.generate(draws(4090), SamplingParams(max_new_tokens=6))
    streams = [llm.stream(draws(30, seed), SamplingParams(max_new_tokens=34)) for seed in range(16)]
    for stream in streams:
        next(stream)
    assert 16 * page <= llm.memory["target_cache"] <= 2 * 16 * page
    for stream in streams:
        list(stream)
    before = llm.memory["target_cache"]
    source = Random(2)
    llm.generate([draws(source.randint(1, 300), seed) for seed in range(50)], SamplingParams(max_new_tokens=5))
    assert llm.memory["target_cache"] <= before


# --- processes and threads -------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # forking with threads is what is tested
def test_a_process_forked_amid_a_pass_computes_the_same():
    """The child has none of the pool's threads, and the pass that held the pool never ends there."""
    torch.set_num_threads(2)
    busy, model, tokens = native(tiny("llama")), native(tiny("qwen3")), draws(250)
    wanted = forward(model, Span(0, 0, tokens, 9)).numpy().tobytes()
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            forward(busy, Span(0, 0, tokens, 250))

    other = threading.Thread(target=work)
    other.start()
    try:
        found = [in_a_child(lambda: forward(model, Span(1, 0, tokens, 9)).numpy().tobytes()) for _ in range(5)]
    finally:
        stop.set()
        other.join()
    assert found == [wanted] * 5


NARROWED = """
import os, torch
from models import draws, tiny
from test_native import forward, native
from foredraft.models.rows import Span

torch.set_num_threads(2)
mask, before = os.sched_getaffinity(0), set(os.listdir("/proc/self/task"))
model, tokens = native(tiny("llama")), draws(50)
forward(model, Span(0, 0, tokens))
made = map(int, set(os.listdir("/proc/self/task")) - before)
(worker,) = (task for task in made if os.sched_getaffinity(task) != mask)  # torch's own stand anywhere
left = mask - os.sched_getaffinity(worker)  # the caller stands there already
os.sched_setaffinity(0, left)
forward(model, Span(0, 0, tokens))
print(os.sched_getaffinity(worker) == left)
"""


@pytest.mark.skipif(len(getattr(os, "sched_getaffinity", lambda _: ())(0)) < 2, reason="there is one core, or no mask")
def test_workers_follow_a_mask_that_is_narrowed_later():
    """In a process of its own, whose threads are known."""
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    ran = subprocess.run(
        [sys.executable, "-c", NARROWED], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert ran.stdout.split() == ["True"], ran.stderr


def test_threads_with_models_of_their_own_share_the_pool():
    models = [native(tiny(name, torch.bfloat16)) for name in ("llama", "qwen2", "mistral")]
    tokens = draws(60)
    wanted = [forward(model, Span(0, 0, tokens, 60)) for model in models]
    wrong: list[int] = []

    def work(index: int) -> None:
        torch.set_num_threads(2)  # so that they meet in the pool
        for _ in range(20):
            if not torch.equal(forward(models[index], Span(1, 0, tokens, 60)), wanted[index]):
                wrong.append(index)

    workers = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []


def test_the_default_dtype_of_another_thread_changes_nothing():
    """transformers sets it for the whole process while it loads."""
    llm = LLM(tiny("llama"), "ngram", runtime="native")
    params = SamplingParams(max_new_tokens=12, temperature=0.8, seed=3)
    wanted = llm.generate(draws(20), params).token_ids
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert llm.generate(draws(20), params).token_ids == wanted
        assert (
            LLM(tiny("llama", torch.float32), "ngram", runtime="native").generate(draws(20), params).token_ids == wanted
        )
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_phase_of_more_chunks_than_a_ticket_holds_ends():
    config = t.LlamaConfig(
        **{**ROPE, "vocab_size": 64, "hidden_size": 256, "intermediate_size": 16, "num_hidden_layers": 1}
        | {"num_attention_heads": 256, "num_key_value_heads": 256, "head_dim": 2, "max_position_embeddings": 64}
    )
    torch.manual_seed(0)
    model = native(t.AutoModelForCausalLM.from_config(config).eval())
    spans = [Span(slot, 0, [slot % 60], 1) for slot in range(257)]  # of 256 heads: 65,792 chunks
    torch.set_num_threads(2)
    together = forward(model, *spans)
    model.cache.clear(0)
    assert torch.equal(forward(model, spans[0]), together[:1])


# --- what is refused -------------------------------------------------------------------------------------------------


def test_planted_a_library_whose_rows_depend_on_their_pass_is_refused():
    class Wide(NativeModel):
        def forward(self, rows: RowBatch) -> torch.Tensor:
            return super().forward(rows) + (len(rows.tokens) > 1) * 1e-3

    confirm(native(tiny("llama")))
    with pytest.raises(ModelError, match="computes a row differently"):
        confirm(Wide(tiny("llama"), library.load()))


def test_what_it_cannot_serve_runs_on_torch_or_is_refused_by_name():
    with pytest.raises(ModelError, match=r"runtime='native' cannot serve this model: .*gpt2"):
        LLM(tiny("gpt2"), "none", runtime="native")
    assert not isinstance(LLM(tiny("gpt2"), "none").model, NativeModel)
    with pytest.raises(RequestError, match="runtime='fast' is not known"):
        LLM(tiny("llama"), "none", runtime="fast")


def _set(name: str, value: object) -> Callable[[t.PreTrainedModel], None]:
    def change(model: t.PreTrainedModel) -> None:
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, value)

    return change


@pytest.mark.parametrize(
    "change",
    [
        _set("model.layers.0.mlp.act_fn", torch.nn.GELU()),
        _set("model.layers.1.self_attn.scaling", 0.7),
        _set("model.layers.0.input_layernorm.variance_epsilon", 0.5),
        _set("model.embed_tokens", torch.nn.Embedding(VOCAB, 64, max_norm=0.5)),
        lambda model: setattr(model.config, "sliding_window", 4),  # which llama does not look at
    ],
    ids=["activation", "scaling", "epsilon", "table", "window"],
)
def test_what_was_changed_on_the_object_is_computed(change):
    model = tiny("llama")
    change(model)
    prompt = draws(12)
    greedy = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    wanted = model.generate(torch.tensor([prompt]), max_new_tokens=12, use_cache=False, **greedy)
    found = LLM(model, "none").generate(prompt, SamplingParams(max_new_tokens=12, ignore_eos=True))
    assert found.token_ids == wanted[0, 12:].tolist()


def test_a_token_outside_the_vocabulary_is_an_error_and_no_crash():
    model = native(tiny("llama"))
    with pytest.raises(ModelError, match=f"token id {VOCAB} is outside"):
        forward(model, Span(0, 0, [1, VOCAB], 1))


def test_a_library_that_is_not_there_says_so(tmp_path):
    with pytest.raises(library.LibraryError, match="was not built"):
        library.load(tmp_path / "none.so")
    (tmp_path / "bad.so").write_bytes(b"not a library")
    with pytest.raises(library.LibraryError, match="does not load"):
        library.load(tmp_path / "bad.so")
