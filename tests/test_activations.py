"""Activation functions on several threads: a row's bits do not depend on how many rows there are."""

from contextlib import nullcontext
from threading import Thread

import pytest
import torch
import torch.nn.functional as F
import transformers as t
from models import CONFIGS, DIM, ROPE, draws, tiny
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP

from foredraft.models import hf
from foredraft.models.activations import all_by_rows, by_rows
from foredraft.models.hf import HFModel
from foredraft.models.rows import RowInvariance, Span, plan
from foredraft.upstream import elementwise
from foredraft.upstream.elementwise import ROUNDING, rerouted

FUNCTIONS = (F.silu, F.gelu, lambda x: F.gelu(x, approximate="tanh"), torch.tanh, torch.sigmoid)
WIDTHS = (1, 96, 100, 704, 3072)
COUNTS = (1, 2, 5, 17, 87, 88, 175, 261, 351, 523)


def differing(compute, x: torch.Tensor) -> int:
    """How many of the row counts give the first rows other bits than one row alone."""
    alone = torch.cat([compute(row) for row in x.split(1)])
    return sum(not torch.equal(compute(x[:count]), alone[:count]) for count in COUNTS)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_rows_never_meet(width, dtype, threads, two_threads):
    torch.set_num_threads(threads)
    both = torch.randn(max(COUNTS), 2 * width, generator=torch.Generator().manual_seed(0)).to(dtype)
    for function in FUNCTIONS:
        for x in (both[:, :width], both[:, :width].contiguous()):  # a part of wider rows, and rows one after another
            assert differing(lambda x, f=function: by_rows(f, x), x) == 0


def test_planted_torch_by_itself_lets_them_meet(two_threads):
    """The control. Where vectors are as wide as here, some count divides amid a row."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("on vectors of other widths these counts may happen to agree")
    both = torch.randn(max(COUNTS), 192, generator=torch.Generator().manual_seed(0))
    assert differing(F.silu, both[:, :96]) > 0


@pytest.mark.parametrize("width", [20000, 28672])
def test_a_row_is_the_same_on_any_number_of_threads(width, two_threads):
    x = torch.randn(3, width, generator=torch.Generator().manual_seed(0))
    for function in FUNCTIONS:
        found = []
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            found.append(by_rows(function, x))
        assert all(torch.equal(one, found[0]) for one in found)


@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (0, 5), (7,), (2, 3, 50)])
def test_shapes_stay(shape):
    x = torch.randn(shape)
    assert by_rows(F.gelu, x).shape == x.shape and torch.allclose(by_rows(F.gelu, x), F.gelu(x), atol=1e-6)


def test_whole_numbers_are_left_to_torch():
    assert torch.equal(by_rows(torch.sigmoid, torch.arange(5)), torch.sigmoid(torch.arange(5)))


# --- whoever calls them -----------------------------------------------------------------------------------------------

CALLS = {
    "torch.sigmoid": torch.sigmoid,
    "a method": torch.Tensor.sigmoid,
    "in place": lambda x: x.clone().sigmoid_(),
    "out": lambda x: torch.sigmoid(x, out=torch.empty(0)),
    "F.sigmoid": F.sigmoid,
    "torch.special": torch.special.expit,
    "a module": nn.Sigmoid(),
    "F.silu": F.silu,
    "F.silu in place": lambda x: F.silu(x.clone(), inplace=True),
    "F.gelu": lambda x: F.gelu(x, approximate="tanh"),
    "F.softplus": lambda x: F.softplus(x, 1.5, 10.0),
    "F.mish": F.mish,
    "F.elu in place": lambda x: F.elu(x.clone(), 0.7, inplace=True),
    "F.selu": F.selu,
    "F.celu": lambda x: F.celu(x, 1.3),
    "torch.logit": lambda x: torch.logit(x, 1e-3),
}


def in_pieces(function, x: torch.Tensor) -> torch.Tensor:
    """Pieces no whole vector fits in, and elements that do not lie side by side."""
    apart = torch.stack([x, x], 1)[:1000, 0]
    return torch.cat([function(apart), *(function(part) for part in x[1000:].split(13))])


@pytest.mark.parametrize("name", CALLS)
def test_under_every_name_an_element_has_the_bits_it_has_among_others(name):
    x = 3 * torch.randn(5000, generator=torch.Generator().manual_seed(0))
    before = x.clone()
    with all_by_rows():
        whole, pieces = CALLS[name](x), in_pieces(CALLS[name], x)
    assert torch.equal(whole, pieces) and torch.equal(x, before)
    assert torch.allclose(whole, CALLS[name](x), rtol=1e-5, atol=1e-6)


def one_tensor_functions():
    """The names of torch's elementwise operators that take one tensor, and need nothing else."""
    for name in torch._C._dispatch_get_all_op_names():
        namespace, _, rest = name.partition("::")
        if namespace == "aten" and "." not in rest and not rest.endswith("_"):
            operator = getattr(torch.ops.aten, rest).default
            types = [str(a.type) for a in operator._schema.arguments if not a.has_default_value()]
            if torch.Tag.pointwise in operator.tags and types == ["Tensor"]:
                yield rest, operator


def those_whose_bits_depend_on_the_place(dtype: torch.dtype) -> tuple[set[str], int]:
    """Of all functions of one tensor; and how many there were."""
    x = (3 * torch.randn(5000, generator=torch.Generator().manual_seed(0))).to(dtype)
    tried, found = set(), set()
    for name, operator in one_tensor_functions():
        for y in (x, x.abs() / 13):
            try:
                whole = operator(y)
            except (RuntimeError, NotImplementedError):
                continue  # of whole numbers, of complex ones
            if whole.is_floating_point() and whole.shape == y.shape:
                tried.add(name)
                same = torch.equal(whole.nan_to_num(7), in_pieces(operator, y).nan_to_num(7))
                found |= set() if same else {name}
    return found, len(tried)


def test_torch_has_no_others_of_one_tensor():
    """But two in bf16: norms call one of them, in float32."""
    with all_by_rows():
        found, tried = those_whose_bits_depend_on_the_place(torch.float32)
        assert not found and tried > 50
        assert those_whose_bits_depend_on_the_place(torch.bfloat16)[0] <= {"rsqrt", "special_i0e"}


def test_those_that_are_seen_to_are_found_where_nobody_does():
    """The control: the table is what is found, on these vectors."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("vectors of other widths leave over others")
    assert those_whose_bits_depend_on_the_place(torch.float32)[0] == {*ROUNDING, "celu", "selu"}


def test_it_ends_and_is_of_one_thread():
    x = torch.randn(5000, 2, generator=torch.Generator().manual_seed(0))[:, 0]
    plain = [torch.sigmoid(x)]

    def look() -> None:
        plain.append(torch.sigmoid(x))

    with rerouted(by_rows):
        inside = torch.sigmoid(x)
        with pytest.raises(ValueError), rerouted(by_rows):
            raise ValueError
        thread = Thread(target=look)
        thread.start()
        thread.join()
        assert torch.equal(torch.sigmoid(x), inside)
    look()
    assert len(plain) == 3 and all(torch.equal(one, plain[0]) for one in plain)
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        assert not torch.equal(inside, plain[0])


# --- models whose own code calls them ---------------------------------------------------------------------------------


class GatedMLP(GPT2MLP):
    """A user's own: a gate of five, by torch.sigmoid."""

    def forward(self, hidden_states):
        gates = torch.sigmoid(4 * hidden_states[..., :5]).repeat(1, 1, 13)
        return super().forward(hidden_states) * gates[..., : hidden_states.shape[-1]]


def gated() -> PreTrainedModel:
    model = tiny("gpt2")
    for block in model.transformer.h:
        block.mlp.__class__ = GatedMLP
    return model


def hooked() -> PreTrainedModel:
    model = tiny("phi3")  # 96 columns of 192: neither whole vectors nor side by side
    for layer in model.model.layers:
        layer.mlp.activation_fn.register_forward_hook(lambda *_: None)
    return model


MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 44, "intermediate_size": 100}
OWN_CODE = {
    "gpt_oss": lambda: built(CONFIGS["gpt_oss"], intermediate_size=100),
    "qwen2_moe": lambda: built(t.Qwen2MoeConfig(**ROPE), **MOE, num_experts=4, shared_expert_intermediate_size=100),
    "minimax_m2": lambda: built(t.MiniMaxM2Config(**ROPE, **DIM), num_local_experts=4, num_experts_per_tok=2),
    "a user's own": gated,
    "with hooks": hooked,
}
SHOWN = ("gpt_oss", "qwen2_moe", "minimax_m2", "a user's own")  # here, where nobody sees to it


def built(config: PreTrainedConfig, **changes) -> PreTrainedModel:
    torch.manual_seed(0)
    config = type(config).from_dict(config.to_dict() | changes)
    return t.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def rows_that_differ(model: HFModel) -> int:
    """Of passes of several widths on one to three threads, those unlike the same tokens one by one on one thread."""
    model.row_invariance = RowInvariance(4, 512, 4)
    tokens, found, wanted = draws(64), 0, None
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        alone = [model.forward(plan([Span(0, i, [token])], 4, 512, 4)) for i, token in enumerate(tokens)]
        wanted = torch.cat(alone) if wanted is None else wanted
        for width in (1, 2, 5, 8, 13, 24, 33, 47, 64):
            logits = model.forward(plan([Span(0, 0, tokens[:width], width)], 4, 512, 4))
            found += int((logits != wanted[:width]).any(-1).sum())
    return found


@pytest.mark.parametrize("name", OWN_CODE)
def test_rows_of_models_whose_own_code_calls_them_agree(name, two_threads):
    model = HFModel(OWN_CODE[name]())
    assert rows_that_differ(model) == 0


@pytest.mark.parametrize("name", SHOWN)
def test_planted_left_to_torch_they_differ(name, two_threads, monkeypatch):
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("on vectors of other widths these counts may happen to agree")
    monkeypatch.setattr(hf, "all_by_rows", nullcontext)
    assert rows_that_differ(HFModel(OWN_CODE[name]())) > 0


def test_a_torch_without_the_key_is_told(monkeypatch):
    monkeypatch.setattr(elementwise, "KEY", "NoSuchKey")
    with pytest.warns(RuntimeWarning, match="has no dispatch key NoSuchKey"):
        assert elementwise._key.__wrapped__() is None
