"""HFModel: what transformers generates, through our cache, masks and positions, with rejected drafts in between."""

import random
from collections.abc import Sequence
from functools import cache

import pytest
import torch
import transformers as t
from accelerate import dispatch_model
from models import CONFIGS, LENGTH, SLIDING, VOCAB, draws, mamba, tiny
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from foredraft.errors import ModelError, UnsupportedModelError
from foredraft.models.hf import HFModel, SlotView
from foredraft.models.invariance import probe
from foredraft.models.load import LoadOptions, load_target, wrap
from foredraft.models.rows import Span, plan
from foredraft.weights.quantize import Quantizer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NEW = 48
PROMPTS = [draws(1, seed=1), draws(7, seed=2), draws(40, seed=3)]
DTYPES = [torch.float32, torch.bfloat16]
every_architecture = pytest.mark.parametrize("name", list(CONFIGS))


@cache
def reference(name: str) -> PreTrainedModel:
    return tiny(name, device=DEVICE)


def generated(model: PreTrainedModel, prompt: list[int], count: int = NEW) -> list[int]:
    ids = torch.tensor([prompt], device=DEVICE)
    seen = torch.ones_like(ids)
    out = model.generate(ids, attention_mask=seen, max_new_tokens=count, do_sample=False, pad_token_id=0)
    return out[0].tolist()


def forward(model: HFModel, spans: Sequence[Span]) -> torch.Tensor:
    shapes = model.row_invariance
    return model.forward(plan(spans, shapes.min_rows, shapes.key_multiple, shapes.row_multiple))


def decode(model: HFModel, prompts: list[list[int]], hints: list[list[int]], chunk: int = 16) -> list[list[int]]:
    """Greedy decoding of all prompts in one batch: prefill in chunks, drafts that begin right and end wrong."""
    source = random.Random(0)
    texts = [list(prompt) for prompt in prompts]
    cached = [0] * len(texts)
    while any(len(text) < len(hint) for text, hint in zip(texts, hints, strict=True)):
        spans, drafts = [], []
        for slot, (text, hint) in enumerate(zip(texts, hints, strict=True)):
            pending = text[cached[slot] :][:chunk]
            draft = hint[len(text) :][: source.randrange(4)] + draws(source.randrange(4), seed=len(text))
            draft = draft if cached[slot] + len(pending) == len(text) else []
            spans.append(Span(slot, cached[slot], pending + draft, len(draft) + 1))
            drafts.append(draft)
        picks = forward(model, spans).argmax(-1).tolist()
        for span, draft, text in zip(spans, drafts, texts, strict=True):
            own, picks = picks[: span.wanted], picks[span.wanted :]
            cached[span.slot] += len(span.tokens) - len(draft)
            if cached[span.slot] < len(text):
                continue  # still in its prompt
            kept = next((i for i, token in enumerate(draft) if token != own[i]), len(draft))
            text.extend(own[: kept + 1])
            cached[span.slot] += kept
    return [text[: len(hint)] for text, hint in zip(texts, hints, strict=True)]


@every_architecture
def test_greedy_text_is_what_transformers_generates(name: str) -> None:
    hints = [generated(reference(name), prompt) for prompt in PROMPTS]
    assert len({token for hint in hints for token in hint}) > 20, "the text is degenerate and shows nothing"
    assert decode(HFModel(tiny(name, device=DEVICE)), PROMPTS, hints) == hints


# In fp32 the probe finds no exact shapes for this one on one Xeon, rows beyond 256 keys beside longer texts: its own
# code multiplies weights and values without a fused kernel, and MKL sums in an order that depends on the shape.
INEXACT_SOMEWHERE = {"bloom"}


@pytest.mark.skipif(DEVICE != "cpu", reason="elsewhere fused kernels take other masks")
def test_falcons_one_key_head_does_not_cost_it_the_fused_kernel() -> None:
    model = HFModel(tiny("falcon"))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        forward(model, [Span(0, 0, draws(9))])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_architecture
def test_rows_have_the_same_bits_however_they_are_passed(name: str, dtype: torch.dtype) -> None:
    """One by one, in blocks of random widths, and in batches whose mates raise the key length."""
    model = HFModel(tiny(name, dtype, DEVICE))
    model.row_invariance = probe(model)
    if not model.row_invariance.exact:
        assert DEVICE != "cpu" or (name in INEXACT_SOMEWHERE and dtype == torch.float32)
        pytest.skip("no shape makes this model row invariant here")
    text, source = draws(300, seed=4), random.Random(5)
    for start, end in ((110, 145), (240, 275)):  # across the ends of key blocks
        forward(model, [Span(0, 0, text[:start]), Span(2, 0, text[:start])])
        singles = torch.cat([forward(model, [Span(0, at, text[at : at + 1])]) for at in range(start, end)])
        at = start
        while at < end:
            width = min(source.randrange(1, model.row_invariance.max_rows + 1), end - at)
            mates = [Span(slot, source.randrange(600), draws(source.randrange(1, 5))) for slot in (0, 1, 3)]
            spans = [Span(2, at, text[at : at + width], width), *source.sample(mates, source.randrange(4))]
            assert torch.equal(forward(model, spans)[:width], singles[at - start : at - start + width]), (at, width)
            at += width


@every_architecture
def test_random_appends_and_rewinds_equal_recomputation(name: str) -> None:
    model, source, text = HFModel(tiny(name, device=DEVICE)), random.Random(6), draws(3, seed=7)
    forward(model, [Span(1, 0, text)])
    for _ in range(12):
        text = text[: source.randrange(1, len(text) + 1)]
        more = draws(source.randrange(1, 30), seed=source.randrange(1000))
        found = forward(model, [Span(1, len(text), more, len(more)), Span(2, 0, text[:5])])[: len(more)]
        text = text + more
        with torch.no_grad():
            wanted = reference(name)(torch.tensor([text], device=DEVICE)).logits[0, -len(more) :]
        torch.testing.assert_close(found, wanted, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("name", list(SLIDING))
def test_a_sliding_layer_forgets_what_left_its_window(name: str) -> None:
    """With every layer sliding, a token some windows back cannot matter; through a mask of full attention it would."""
    config = t.AutoConfig.for_model(**CONFIGS[name].to_dict())
    layers = config.num_hidden_layers
    if hasattr(config, "layer_types"):
        config.layer_types = ["sliding_attention"] * layers
    torch.manual_seed(0)
    model = HFModel(t.AutoModelForCausalLM.from_config(config).eval().to(DEVICE))
    text = draws(SLIDING[name] * layers + 10, seed=8)
    same, near = [text[0] ^ 1, *text[1:]], [*text[:-5], text[-5] ^ 1, *text[-4:]]
    logits = [forward(model, [Span(slot, 0, tokens)]) for slot, tokens in enumerate((text, same, near))]
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2])


def test_a_learned_position_table_can_be_filled_to_its_end() -> None:
    """Padding rows of the last passes lie beyond the table."""
    config = t.GPT2Config(**{**CONFIGS["gpt2"].to_dict(), "n_positions": 64})
    torch.manual_seed(0)
    model = t.GPT2LMHeadModel(config).eval().to(DEVICE)
    hint = generated(model, PROMPTS[1], 64 - len(PROMPTS[1]))
    adapter = HFModel(model)
    assert adapter.max_positions == 64
    assert decode(adapter, [PROMPTS[1]], [hint]) == [hint]


def test_their_modules_read_the_cache_itself() -> None:
    """No copy: what `update` returns is the cache's memory, and only the rows of the pass were written there."""
    model = HFModel(tiny("gpt2", device=DEVICE))
    rows = plan([Span(1, 3, [1, 2]), Span(2, 9, [1, 2])], 4, 128)
    model.cache.reserve(3, rows.max_position)
    index = torch.tensor(rows.slots) * model.cache.length + torch.tensor(rows.positions)
    view = SlotView(model.cache, rows.groups[0], 0, index.to(DEVICE))
    new = torch.ones(2, 4, 4, 16, device=DEVICE)  # [B, H, W, D]
    keys, values = view.update(new, 2 * new, 1)
    storage = model.cache.storage[1]
    assert len({tensor.untyped_storage().data_ptr() for tensor in (keys, values, storage)}) == 1
    assert keys.shape == values.shape == (2, 4, 128, 16)
    assert torch.equal(keys[0, 0, :, 0].nonzero().flatten().cpu(), torch.arange(3, 7))
    assert torch.equal(values[1, 0, :, 0].nonzero().flatten().cpu(), torch.arange(9, 13))
    assert keys.sum() * 2 == values.sum() == storage.sum() * 2 / 3


def test_rope_frequencies_do_not_follow_the_longest_text() -> None:
    """longrope switches its frequencies when any row of the batch passes the original length."""
    scaling = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 128,
               "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}  # fmt: skip
    config = t.Phi3Config(**{**CONFIGS["phi3"].to_dict(), "max_position_embeddings": 1024, "rope_parameters": scaling,
                             "original_max_position_embeddings": 128})  # fmt: skip
    torch.manual_seed(0)
    model = HFModel(t.AutoModelForCausalLM.from_config(config).eval().to(DEVICE))
    assert model.max_positions == 128
    alone = forward(model, [Span(0, 0, draws(20))])
    assert torch.equal(alone, forward(model, [Span(0, 0, draws(20)), Span(1, 500, draws(3))])[:1])


@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_other_models_of_the_same_configuration_stay_as_they_were(name: str) -> None:
    model = tiny(name, device=DEVICE)
    config, ids = model.config, torch.tensor([draws(5)], device=DEVICE)
    other = t.AutoModelForCausalLM.from_config(config).eval().to(DEVICE)
    before = other(ids).logits
    assert HFModel(model).config is not config
    assert torch.equal(other(ids).logits, before)
    assert "foredraft" not in (config._attn_implementation, config._experts_implementation)


def test_a_model_can_be_wrapped_twice() -> None:
    model = tiny("mixtral", device=DEVICE)
    spans = [Span(0, 0, draws(9), 9)]
    assert torch.equal(forward(HFModel(model), spans), forward(HFModel(model), spans))


def test_weight_bytes_count_packed_weights() -> None:
    plain = tiny("llama")
    before = sum(p.numel() * p.element_size() for p in plain.parameters())
    assert HFModel(plain).weight_bytes == before


REFUSALS = {
    "mamba": (mamba, "recurrent state"),
    "t5": (lambda: t.T5ForConditionalGeneration(t.T5Config(d_model=16, d_ff=16, num_layers=1, d_kv=8, num_heads=2,
                                                           vocab_size=VOCAB)), "encoder-decoder"),
    "bert": (lambda: t.BertForMaskedLM(bert()), "no causal language model"),
    "bert_head": (lambda: t.BertLMHeadModel(bert()), "no causal language model"),
    "lfm2": (lambda: t.Lfm2ForCausalLM(t.Lfm2Config(vocab_size=VOCAB, hidden_size=32, intermediate_size=32,
             num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, layer_types=["conv", "full_attention"],
             block_auto_adjust_ff_dim=False)), "cannot be rewound"),
    "gpt_neo": (lambda: t.GPTNeoForCausalLM(t.GPTNeoConfig(vocab_size=VOCAB, hidden_size=32, num_layers=2, num_heads=2,
                attention_types=[[["global", "local"], 1]])), "local attention"),
}  # fmt: skip


def bert() -> t.BertConfig:
    return t.BertConfig(vocab_size=VOCAB, hidden_size=48, intermediate_size=32, num_hidden_layers=1)


@pytest.mark.parametrize("name", list(REFUSALS))
def test_what_cannot_serve_is_refused_by_name(name: str) -> None:
    make, reason = REFUSALS[name]
    model = make()
    with pytest.raises(UnsupportedModelError, match=reason) as caught:
        wrap(model)
    assert f"'{model.config.model_type}' cannot serve" in str(caught.value)
    assert "generate()" in str(caught.value), "it says what to do"


def test_a_model_that_computes_something_else_through_us_is_refused() -> None:
    """The planted model looks at what stands before its rows in the call, not in the cache."""
    model = tiny("llama")
    embedding = model.model.embed_tokens
    embedding.register_forward_hook(lambda _module, _inputs, out: out.cumsum(1))
    with pytest.raises(UnsupportedModelError, match="logits differ"):
        HFModel(model)


def test_limits_come_from_the_configuration() -> None:
    model = HFModel(tiny("opt"))
    assert (model.max_positions, model.vocab_size, model.dtype) == (LENGTH, VOCAB, torch.float32)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_model_spread_over_devices_by_hooks(name: str) -> None:
    """device_map's machinery without the devices: every module's weights come through a hook of accelerate's."""
    want = [generated(reference(name), prompt) for prompt in PROMPTS]
    model = tiny(name)
    layers = [f"{prefix}.{layer}" for prefix in ("model.layers", "transformer.h") for layer in (0, 1)]
    parts = {".".join(n.split(".")[:-1]) for n in model.state_dict()}
    placed = dict.fromkeys((next((x for x in layers if part.startswith(x)), part) for part in parts), DEVICE)
    spread = dispatch_model(model, placed, main_device=DEVICE, force_hooks=True)
    target = load_target(spread, LoadOptions())
    assert isinstance(target, HFModel)
    assert decode(target, PROMPTS, want) == want
    with pytest.raises(ModelError, match=f"this {name} is spread over devices .* use draft='ngram'"):
        target.variant(Quantizer("int4"))
