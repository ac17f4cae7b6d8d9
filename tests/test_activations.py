"""Activation functions on several threads: a row's bits do not depend on how many rows there are."""

import pytest
import torch
import torch.nn.functional as F
from models import tiny
from torch import nn

from foredraft.models.activations import ByRows, by_rows, wrap_activations

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


@pytest.mark.parametrize("name", ["gpt2", "phi3", "falcon", "bloom"])
def test_models_of_transformers_compute_theirs_so(name):
    model = tiny(name)
    wrap_activations(model)
    found = [module for module in model.modules() if isinstance(module, ByRows)]
    assert len(found) >= model.config.num_hidden_layers and not any(isinstance(m.function, ByRows) for m in found)


@pytest.mark.parametrize("width", [20000, 28672])
def test_a_row_is_the_same_on_any_number_of_threads(width, two_threads):
    x = torch.randn(3, width, generator=torch.Generator().manual_seed(0))
    for function in FUNCTIONS:
        found = []
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            found.append(by_rows(function, x))
        assert all(torch.equal(one, found[0]) for one in found)


def test_what_somebody_hooks_is_left_alone():
    model = tiny("gpt2")
    hooked = model.transformer.h[0].mlp.act
    hooked.register_forward_hook(lambda *_: None)
    wrap_activations(model)
    assert model.transformer.h[0].mlp.act is hooked and isinstance(model.transformer.h[1].mlp.act, ByRows)


@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (0, 5), (7,), (2, 3, 50)])
def test_shapes_stay(shape):
    x = torch.randn(shape)
    assert ByRows(nn.GELU())(x).shape == x.shape and torch.allclose(by_rows(F.gelu, x), F.gelu(x), atol=1e-6)
