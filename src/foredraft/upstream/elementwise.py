"""torch's elementwise functions whose rounding depends on an element's place, computed by a function of ours instead.

While a context lasts, on its thread, whoever calls them by whatever name: a model's own code, a module, torch itself.
They get kernels under a dispatch key of torch's own tests, which all other operators fall through: that costs these
nothing, where Python code that sees every operator (TorchFunctionMode) cost a step a fifth to a half.
"""

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch

KEY = "TESTING_ONLY_GenericMode"
# Those that tests/test_activations.py finds among all of torch's; CELU and SELU are made of ELU.
ROUNDING = ("atanh", "cosh", "elu", "exp2", "gelu", "logit", "mish", "sigmoid", "silu", "sinh", "softplus")

Function = Callable[[torch.Tensor], torch.Tensor]
Compute = Callable[[Function, torch.Tensor], torch.Tensor]


def rerouted(compute: Compute) -> AbstractContextManager[None]:
    """Within it `function(x)` is `compute(function, x)`. Once a process has used one `compute`, it has no other.

    Where torch has this key no longer, nothing is rerouted, and a warning says so once.
    """
    key = _key()
    if key is None:
        return nullcontext()
    _register(compute, key)
    guard: AbstractContextManager[None] = torch._C._IncludeDispatchKeyGuard(key)
    return guard


@cache
def _key() -> torch._C.DispatchKey | None:
    parse = getattr(torch._C, "_parse_dispatch_key", None)
    key: torch._C.DispatchKey | None = None if parse is None else parse(KEY)
    if key is None:
        warnings.warn(
            f"torch {torch.__version__} has no dispatch key {KEY}: in fp32 a model's sigmoids and the like may give "
            "a text other last bits beside others; use a torch that foredraft is tested with",
            RuntimeWarning,
            stacklevel=2,
        )
    return key


@cache
def _register(compute: Compute, key: torch._C.DispatchKey) -> tuple[torch.library.Library, ...]:
    """The libraries that hold the kernels, which last as long as these objects."""
    every, theirs = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    every.fallback(torch.library.fallthrough_kernel, KEY)
    for name in ROUNDING:
        theirs.impl(name, _kernel(name, compute, key), KEY)
        theirs.impl(f"{name}.out", _kernel(name, compute, key), KEY)
        if hasattr(torch.ops.aten, f"{name}_"):
            theirs.impl(f"{name}_", _kernel(name, compute, key, in_place=True), KEY)
    return every, theirs


def _kernel(
    name: str, compute: Compute, key: torch._C.DispatchKey, *, in_place: bool = False
) -> Callable[..., torch.Tensor]:
    theirs = getattr(torch, name, None) or getattr(torch._C._nn, name)  # called in half the time of torch.ops
    ours = torch._C.DispatchKeySet(key)

    def kernel(x: torch.Tensor, *args: Any, out: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
        with torch._C._ExcludeDispatchKeyGuard(ours):
            result = compute(lambda part: theirs(part, *args, **kwargs), x)
            if out is not None:
                return out.resize_(result.shape).copy_(result)
            return x.copy_(result) if in_place else result

    return kernel
