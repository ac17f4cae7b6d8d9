"""The probe: it believes a model only where rows agree, and finds each way in which they can fail to."""

from collections.abc import Callable
from random import Random
from typing import Any

import pytest
import torch
from models import CONFIGS, LENGTH, draws, tiny
from transformers import AutoModelForCausalLM, PreTrainedConfig

from foredraft.models.cache import LayerShape, SlotCache
from foredraft.models.hf import HFModel
from foredraft.models.invariance import FIXED, probe
from foredraft.models.load import LoadOptions, load_target
from foredraft.models.rows import Group, RowBatch, RowInvariance, Span, plan, round_keys
from foredraft.weights.linear import PackedLinear, linear

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Flaw = Callable[[RowBatch, Group], float]


class Planted:
    """A model whose logits are a function of token and position, plus a flaw that looks at the shape of the pass."""

    config = PreTrainedConfig()
    generation_config = None
    device = torch.device("cpu")
    dtype = torch.float32
    vocab_size = 11
    weight_bytes = 0

    def __init__(self, flaw: Flaw, max_positions: int = LENGTH) -> None:
        self.flaw = flaw
        self.max_positions = max_positions
        self.row_invariance = RowInvariance()
        self.cache = SlotCache([LayerShape(1, 1, 1)], dtype=self.dtype, devices=[self.device])

    def forward(self, rows: RowBatch) -> torch.Tensor:
        self.cache.reserve(max(rows.slots) + 1, rows.max_position)
        assert all(rows.positions[row] < self.max_positions for row in rows.wanted), "only padding may go beyond"
        logits = torch.tensor([[t * 0.5 + p for t in rows.tokens] for p in range(self.vocab_size)]).T
        logits = logits + torch.tensor(rows.positions)[:, None]
        for group in rows.groups:
            logits[group.first_row : group.first_row + group.num_rows] += self.flaw(rows, group)
        return logits[rows.wanted]


def found(flaw: Flaw, **options: Any) -> RowInvariance:
    return probe(Planted(flaw, **options))


def test_rows_that_agree_are_believed() -> None:
    assert found(lambda _rows, _group: 0.0) == RowInvariance(4, 128, 1, 33, exact=True, prefill=True)


FLAWS: dict[str, Flaw] = {
    "the width of the pass": lambda _rows, group: group.width * 1e-3,
    "the rows of the whole pass": lambda rows, _group: len(rows.tokens) * 1e-3,
    "the size of the batch": lambda _rows, group: len(group.starts) * 1e-3,
    "the longest mate": lambda _rows, group: max(group.starts) * 1e-3,
    "the number of key blocks": lambda _rows, group: (group.key_length > 512) * 1e-3,
    "other slots": lambda rows, _group: len(set(rows.slots)) * 1e-3,
    "nothing, but it is not finite": lambda _rows, _group: float("nan"),
}


def test_a_flaw_of_the_narrowest_pass_under_longer_keys_is_found() -> None:
    """Seen on an Intel processor in fp32: 128 keys more or less, and 4 rows alone had other bits, a few of 33."""

    class Narrow(Planted):
        def forward(self, rows: RowBatch) -> torch.Tensor:
            logits = super().forward(rows)
            for place, row in enumerate(rows.wanted):
                group = next(g for g in rows.groups if g.first_row <= row < g.first_row + g.num_rows)
                odd = group.width == 4 and group.key_length % 512 and rows.positions[row] % 8 == 4
                logits[place] += 1e-3 * bool(odd)
            return logits

    assert probe(Narrow(lambda _rows, _group: 0.0)).key_multiple == 512


@pytest.mark.parametrize("name", list(FLAWS))
def test_rows_that_depend_on_the_pass_are_found(name: str) -> None:
    assert found(FLAWS[name]) == FIXED
    assert not FIXED.exact


def test_the_smallest_shape_that_holds_wins() -> None:
    assert found(lambda _rows, group: (group.width < 8) * 1e-3).min_rows == 8
    assert found(lambda _rows, group: (group.width % 4 in (1, 2, 3)) * 1e-3).row_multiple == 4
    assert found(lambda _rows, group: (group.key_length % 512 != 0) * 1e-3).key_multiple == 512


def test_a_flaw_of_the_last_row_alone_is_found() -> None:
    """Kernels take rows in blocks of 32; row 33 is alone in the second."""

    class LastRow(Planted):
        def forward(self, rows: RowBatch) -> torch.Tensor:
            logits = super().forward(rows)
            if rows.groups[0].width == 33:
                logits[-1] += 1e-3
            return logits

    assert probe(LastRow(lambda _rows, _group: 0.0)).row_multiple == 4


def test_a_flaw_of_rows_beyond_256_keys_beside_longer_texts_is_found() -> None:
    """fp32 attention on Intel's processors: those rows keep their bits only for whole blocks of 512 keys."""

    class LateRows(Planted):
        def forward(self, rows: RowBatch) -> torch.Tensor:
            late = torch.tensor(rows.positions)[rows.wanted] > 256
            return super().forward(rows) + (late * 1e-3 * (rows.max_position % 512))[:, None]

    assert probe(LateRows(lambda _rows, _group: 0.0)).key_multiple == 512


def test_prefill_is_judged_apart() -> None:
    """Wide chunks that differ do not make drafting inexact; they only forbid to share what they computed."""
    assert found(lambda _rows, group: (group.width > 200) * 1e-3) == RowInvariance(4, 128, 1, 33, prefill=False)


@pytest.mark.parametrize("max_positions", [8, 40, 200, 400])
def test_it_fits_models_of_few_positions(max_positions: int) -> None:
    result = found(lambda _rows, _group: 0.0, max_positions=max_positions)
    assert result.exact
    assert result.max_rows == min(33, max_positions // 2)


def test_it_leaves_nothing_behind() -> None:
    model = Planted(lambda _rows, _group: 0.0)
    before = model.row_invariance
    probe(model)
    assert model.row_invariance is before
    assert model.cache.nbytes == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "mixtral", "falcon_alibi"])
def test_real_kernels_keep_what_the_probe_says_of_them(name: str, dtype: torch.dtype) -> None:
    """On any device: passes drawn at random, which the probe did not look at, agree where it says so."""
    model = HFModel(tiny(name, dtype, DEVICE))
    result = model.row_invariance = probe(model)
    if DEVICE == "cpu":  # see INEXACT_SOMEWHERE in tests/test_adapter.py
        assert result.exact or (name == "gemma2" and dtype == torch.float32)
    if result.exact:
        disagreeing = [case for case in range(24) if not agrees(model, Random(case))]
        assert disagreeing == []
    else:
        assert result == FIXED
        spans = [span(0, 0, FIXED.max_rows), span(1, 0, FIXED.max_rows)]
        assert torch.equal(logits(model, spans), logits(model, spans))  # equal passes give equal bits


TEXTS = [draws(400, seed=slot) for slot in range(3)]


def span(slot: int, start: int, count: int) -> Span:
    return Span(slot, start, TEXTS[slot][start : start + count], count)


def logits(model: HFModel, spans: list[Span]) -> torch.Tensor:
    shape = model.row_invariance
    return model.forward(plan(spans, shape.min_rows, shape.key_multiple, shape.row_multiple))


def agrees(model: HFModel, source: Random) -> bool:
    """Rows of one text, one at a time and alone, against a wide pass beside others at places of their own."""
    start, count = source.randrange(1, 250), source.randint(2, model.row_invariance.max_rows)
    mates = [(slot, source.randrange(1, 350), source.randint(1, 16)) for slot in (1, 2)]
    for slot, end in ((0, start), *((slot, end) for slot, end, _ in mates)):
        logits(model, [span(slot, 0, end)])
    alone = torch.cat([logits(model, [span(0, start + i, 1)]) for i in range(count)])
    beside = logits(model, [span(0, start, count), *(span(*mate) for mate in mates)])
    return torch.equal(alone, beside[:count])


def test_planted_a_pass_that_depends_on_its_width_is_noticed_by_random_passes() -> None:
    """The control of the test above."""

    class Wide(HFModel):
        def forward(self, rows: RowBatch) -> torch.Tensor:
            return super().forward(rows) + (len(rows.tokens) > 16) * 1e-3

    model = Wide(tiny("llama", device=DEVICE))
    model.row_invariance = RowInvariance(4, 512, 4, 33)
    assert not all(agrees(model, Random(case)) for case in range(24))


def test_the_plan_avoids_the_key_lengths_that_kernels_treat_apart() -> None:
    """A last key block of 256 sums in another order than one of 128, 384 or 512."""
    lengths = [round_keys(length, 128) for length in range(1, 2049)]
    assert all(rounded % 128 == 0 and rounded % 512 != 256 for rounded in lengths)
    assert all(0 <= rounded - length < 256 for length, rounded in enumerate(lengths, 1))
    assert [round_keys(n, 512) for n in (1, 512, 513)] == [512, 512, 1024]


@pytest.mark.skipif(DEVICE != "cpu", reason="a fact about CPU kernels")
def test_why_a_key_length_of_256_is_avoided() -> None:
    """The control: at the operator, keys beyond the mask change a row's bits from 256 on, and from nowhere else."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, 1024, 64) for _ in range(3))
    rows = torch.arange(128, 192)

    def attend(keys: int) -> torch.Tensor:
        mask = torch.zeros(64, keys).masked_fill_(torch.arange(keys) > rows[:, None], -torch.inf)[None, None]
        out = torch.nn.functional.scaled_dot_product_attention
        return out(query[:, :, rows], key[:, :, :keys], value[:, :, :keys], attn_mask=mask)

    agree = {keys for keys in (256, 384, 512, 640, 768, 896) if torch.equal(attend(keys), attend(1024))}
    assert {384, 512, 640, 896} <= agree


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(
    ("name", "heads", "kv_heads", "seed"), [("qwen3", 4, 2, 0), ("llama", 7, 1, 2), ("glm", 7, 1, 2)]
)
def test_few_query_rows_left_over_or_alone_give_the_bits_of_many(name, heads, kv_heads, seed):
    """Seen in bf16 on AMD and Intel, in one row of a hundred: see `attention.query_rows`."""
    shape = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": 16, "hidden_size": 16 * heads}
    torch.manual_seed(seed)
    config = type(CONFIGS[name]).from_dict(CONFIGS[name].to_dict() | shape)
    made = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).to(DEVICE)
    model = load_target(made.eval(), LoadOptions("bfloat16", DEVICE, runtime="torch"))
    tokens = draws(900, seed)

    def logits(width: int) -> torch.Tensor:
        """Of every token from the 100th on, each as the last of a pass of so many."""
        spans = [Span(0, end - width, tokens[end - width : end]) for end in range(100, len(tokens))]
        return torch.cat([model.forward(plan([span], 4, 128)) for span in spans])

    model.forward(plan([Span(0, 0, tokens)], 4, 128))
    wide = logits(8)
    fold = heads // kv_heads
    for width in (1, 4, *(width for width in range(5, 34) if width * fold % 32 in (1, 2, 3))):
        assert torch.equal(logits(width), wide), width


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("inputs", "outputs"), [(512, 192), (704, 256), (2048, 512)])
def test_packed_products_of_terms_that_cancel_agree_from_two_rows_up(inputs, outputs, dtype):
    """Where large terms cancel, what is left tells in which order they were summed; random ones seldom do in bf16."""
    generator = torch.Generator().manual_seed(0)
    pairs = torch.randn(outputs, inputs // 2, generator=generator).repeat_interleave(2, 1)
    pairs[:, 1::2] *= -1
    order = torch.randperm(inputs, generator=generator)
    x = torch.randn(300, inputs // 2, generator=generator).repeat_interleave(2, 1)
    x += 0.004 * torch.randn(300, inputs, generator=generator)
    layer = linear(pairs[:, order].to(dtype))
    if not isinstance(layer, PackedLinear):
        pytest.skip(f"{dtype} is not packed on this processor")
    x = x[:, order].to(dtype)
    wanted = layer.forward(x[:16])
    for rows in (2, 3, 5, 8, 15, 17, 24, 31, 32, 33, 36, 37, 48, 64, 65, 128, 255, 300):
        found = layer.forward(x[:rows])
        assert torch.equal(found[:16], wanted[:rows])
        assert torch.equal(layer.add_to(found, x[:rows])[:16], layer.add_to(wanted, x[:16])[:rows])
