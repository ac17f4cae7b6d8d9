"""Quantised linear layers: what they compute, what they cost, and what they refuse."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from foredraft.errors import ModelError
from foredraft.native import library
from foredraft.weights import rounding
from foredraft.weights.linear import PlainLinear, linear
from foredraft.weights.quantize import (
    FORMATS,
    DynamicInt8Linear,
    ForDrafting,
    Int4Linear,
    Int8Linear,
    Quantizer,
    dense,
    quant_linear,
)
from foredraft.weights.rounding import GROUPS, pick_group, round_int4, round_int8, values_int4

SHAPES = [(64, 64), (160, 96), (100, 40), (17, 33), (1, 7), (300, 256)]
DTYPES = [torch.float32, torch.bfloat16]


def weight(out: int, inputs: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return (torch.randn(out, inputs, generator=torch.Generator().manual_seed(seed)) * 0.05).to(dtype)


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_computes_what_its_weight_says(weight_format, shape, dtype):
    """Odd sizes too: ATen's int8 kernel leaves out inputs beyond a multiple of 32, its int4 kernel refuses them."""
    bias = weight(1, shape[0], dtype, seed=1)[0]
    layer = quant_linear(weight(*shape, dtype), bias, weight_format)
    x = weight(3, shape[1], dtype, seed=2) * 20
    wanted = x.float() @ layer.dense().T + bias.float()
    found = layer(x)
    assert found.dtype == dtype and found.shape == (3, shape[0])
    assert relative(found, wanted) < 0.02
    assert torch.equal(layer(x.view(3, 1, -1)), found.view(3, 1, -1))
    residual = weight(3, shape[0], dtype, seed=3)
    added = layer.add_to(residual, x)
    assert added.dtype == dtype and relative(added, residual.float() + wanted) < 0.02


@pytest.mark.parametrize(("weight_format", "most"), [("int4", 0.105), ("int8", 0.012), ("int8-dynamic", 0.012)])
def test_weight_error_is_bounded(weight_format, most):
    w = weight(128, 512)
    assert relative(quant_linear(w, None, weight_format).dense(), w) < most


@pytest.mark.parametrize("group", GROUPS)
def test_int4_dense_is_what_was_rounded(group):
    w = weight(48, 512)
    codes, grid = round_int4(w, group)
    assert codes.min() >= 0 and codes.max() <= 15
    assert torch.equal(Int4Linear(w, None, group).dense(), values_int4(codes, grid, group))
    assert torch.equal(Int4Linear.from_codes(codes, grid, 512).dense(), values_int4(codes, grid, group))


@pytest.mark.skipif(bool(library.why_not()), reason=library.why_not())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", GROUPS)
def test_the_library_rounds_as_torch_does(group, dtype, monkeypatch):
    """Sums in another order may prefer another clip where two err alike; nothing errs more."""
    w = weight(700, 768, dtype)
    w[3] = 0
    w[5] = 0.25
    codes, grid = round_int4(w, group)
    monkeypatch.setattr(rounding, "loaded", lambda: None)
    torchs = round_int4(w, group)
    assert (codes != torchs[0]).float().mean() < 1e-3
    mine, theirs = (values_int4(*found, group).unflatten(1, (-1, group)) for found in ((codes, grid), torchs))
    own = w.float().unflatten(1, (-1, group))
    assert ((mine - own).square().sum(-1) <= (theirs - own).square().sum(-1) * (1 + 1e-5) + 1e-12).all()


def test_int8_from_codes():
    w = weight(40, 40)
    codes, scale = round_int8(w, torch.bfloat16)
    assert torch.equal(Int8Linear.from_codes(codes, scale).dense(), Int8Linear(w).dense())


def test_groups_of_equal_values_keep_their_value():
    """A range of zero must not divide by zero, nor move the value by more than bf16 rounds it."""
    w = torch.zeros(16, 96)
    w[:, :32], w[:, 32:64] = 0.5, 0.3
    found = Int4Linear(w, None, 32).dense()
    assert torch.equal(found[:, :32], w[:, :32]) and found[:, 64:].abs().max() < 1e-6
    assert relative(found[:, 32:64], w[:, 32:64]) < 2**-8


@pytest.mark.parametrize("weight_format", ["int4", "int8", "int8-dynamic"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_do_not_depend_on_each_other(weight_format, dtype):
    """What a quantised target needs, and what makes a draft's distribution its own request's alone."""
    layer = quant_linear(weight(544, 512, dtype), None, weight_format)
    assert isinstance(layer, DynamicInt8Linear) == (weight_format == "int8-dynamic")
    x = weight(33, 512, dtype, seed=4)
    x[20] *= 1000  # a scale over all rows would be this one's
    x[21] = x[21].abs()
    whole = layer(x)
    for rows in (1, 2, 4, 5, 8, 17):
        assert torch.equal(layer(x[:rows]), whole[:rows])
    assert torch.equal(layer(x[20:22]), whole[20:22])


def test_rows_are_rounded_one_by_one_where_the_kernel_takes_no_scale():
    layer = DynamicInt8Linear(weight(64, 96))
    x = weight(5, 96, seed=4) * torch.tensor([1, 10, 0, 1000, 1e-3])[:, None]
    given = layer(x)
    layer.takes_scale = False
    assert torch.equal(layer(x)[:1], layer(x[:1]))
    assert relative(layer(x[3:4]), given[3:4]) < 0.02
    assert not layer(x)[2].any() and not given[2].any()


def test_small_groups_only_where_large_ones_lose_too_much():
    flat = torch.sign(weight(64, 256)) * 0.1  # two values: any group holds them exactly
    assert pick_group(flat) == 256
    spiky = weight(64, 256)
    spiky[:, ::64] *= 20  # one large value in 64: a large group wastes its range on it
    assert pick_group(spiky) == 32
    assert pick_group(weight(64, 96)) == 32
    assert pick_group(weight(64, 40)) == 32  # divides nothing; inputs are padded


def test_int4_takes_at_most_five_bits_a_weight():
    w = weight(1024, 512)
    assert Int4Linear(w, None, 32).nbytes * 8 == 5 * w.numel()
    assert quant_linear(w, None, "int4").nbytes * 8 <= 5 * w.numel()
    assert quant_linear(w, None, "int8").nbytes * 8 <= 8.1 * w.numel()


def test_group_sizes_that_cannot_be_are_refused():
    with pytest.raises(ModelError, match="group size 48 is not usable; the kernels take 32, 64, 128, 256"):
        Int4Linear(weight(32, 96), None, 48)
    with pytest.raises(ModelError, match="group size 64 does not divide a layer's 96 inputs; sizes that do: 32"):
        Int4Linear(weight(32, 96), None, 64)
    with pytest.raises(ModelError, match=r"none \(leave it out"):
        Quantizer("int4", group=32)(PlainLinear(weight(32, 33)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_layers_of_any_kind_give_their_weight(dtype):
    w = weight(64, 96, dtype)
    plain, conv = nn.Linear(96, 64, dtype=dtype), Conv1D(64, 96).to(dtype)
    plain.weight = nn.Parameter(w)
    conv.weight = nn.Parameter(w.T.contiguous())
    for layer in (linear(w), PlainLinear(w), plain, conv):
        assert torch.equal(dense(layer), w)
        assert torch.equal(dense(Quantizer("int4")(layer)), Int4Linear(w).dense())


def test_quantizer_makes_each_layer_once_and_counts_it():
    quantizer = Quantizer("int4")
    first, second = linear(weight(64, 64)), linear(weight(64, 64, seed=1))
    made = quantizer(first)
    assert quantizer(first) is made and quantizer(second) is not made
    assert quantizer.nbytes == made.nbytes + quantizer(second).nbytes


def test_quantizer_leaves_narrower_layers_alone():
    four, eight = Int4Linear(weight(64, 64)), Int8Linear(weight(64, 64))
    assert Quantizer("int4")(four) is four and Quantizer("int8")(four) is four and Quantizer("int8")(eight) is eight
    quantizer = Quantizer("int4")
    assert isinstance(quantizer(eight), Int4Linear) and quantizer.nbytes > 0


def test_deterministic():
    w = weight(64, 256)
    x = weight(2, 256, seed=5)
    for weight_format in FORMATS:
        assert torch.equal(quant_linear(w, None, weight_format)(x), quant_linear(w, None, weight_format)(x))


def test_clipping_never_loses_to_the_whole_range():
    """Clips are chosen for each group by its squared error, and the whole range is among them."""
    w = weight(64, 512)
    for group in GROUPS:
        x = w.unflatten(1, (-1, group))
        high, low = x.amax(-1, keepdim=True), x.amin(-1, keepdim=True)
        scale = ((high - low) / 15).bfloat16().float()
        offset = ((high + low + scale) / 2).bfloat16().float()
        whole = ((x - offset) / scale).round().clamp(-8, 7) * scale + offset
        ours = values_int4(*round_int4(w, group), group).unflatten(1, (-1, group))
        errors = [F.mse_loss(found, x, reduction="none").sum(-1) for found in (ours, whole)]
        assert (errors[0] <= errors[1] * (1 + 1e-5)).all()


def test_layers_that_are_not_packed_stay_as_they_are():
    plain = PlainLinear(weight(16, 16))
    assert ForDrafting("int4")(plain) is plain


def test_drafts_take_the_kernel_that_is_fastest_for_the_size():
    small, large = linear(weight(512, 512)), linear(weight(544, 512))
    assert [type(ForDrafting("int4")(layer)) for layer in (small, large)] == [Int8Linear, DynamicInt8Linear]
    kinds = [type(quant_linear(dense(layer), None, "int8-dynamic")) for layer in (small, large)]
    assert kinds == [Int8Linear, DynamicInt8Linear]
