"""What serves a model on this machine: torch's threads, kernels and devices; runtime, layers and memory of one LLM."""

import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from foredraft.drafters.base import Drafter
from foredraft.drafters.model import ModelDrafter
from foredraft.drafters.registry import split
from foredraft.drafters.several import Several, drafters_of
from foredraft.drafters.translated import TranslatingDrafter
from foredraft.llm import LLM
from foredraft.models.base import CausalModel
from foredraft.models.decoder import Decoder
from foredraft.models.decoder_layers import Attention
from foredraft.models.native import NativeModel
from foredraft.models.rows import RowInvariance
from foredraft.weights.linear import PackedLinear, PlainLinear, can_pack
from foredraft.weights.quantize import DynamicInt8Linear, Int4Linear, Int8Linear

BUNDLED = "the bundled pair"
KERNELS: dict[type, str] = {
    PackedLinear: "packed for oneDNN",
    PlainLinear: "plain",
    nn.Linear: "plain",
    Int4Linear: "int4",
    Int8Linear: "int8",
    DynamicInt8Linear: "int8, dynamic",
}


@dataclass(frozen=True, slots=True)
class Torch:
    """What torch makes of this machine."""

    threads: int
    omp_num_threads: str | None  # as the environment asks
    instructions: str  # that its own kernels use
    packing: dict[str, bool]  # by dtype: whether oneDNN packs weights of it
    devices: tuple[str, ...]  # besides the CPU


@dataclass(frozen=True, slots=True)
class Served:
    """A loaded model, and what computes it."""

    name: str
    type: str
    runtime: str
    modules: str
    instructions: str
    kernels: dict[str, int]  # linear layers by what computes them
    dtype: str
    device: str


@dataclass(frozen=True, slots=True)
class Serving:
    """One LLM: who verifies, who drafts, what the probe found, what it holds."""

    target: Served
    drafter: str  # or several
    reasons: dict[str, str]  # why each of several is there
    draft: Served | None  # the first drafter that is a model
    row_invariance: RowInvariance
    probe: str  # what that means
    context: int
    cache_bytes_per_token: int
    memory: dict[str, int]
    seconds_to_load: float
    vocabulary: str | None = None  # what a draft model with other tokens shares with the target


def look() -> Torch:
    """torch, on this machine."""
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    return Torch(
        torch.get_num_threads(),
        os.environ.get("OMP_NUM_THREADS"),
        torch.backends.cpu.get_cpu_capability(),
        {name: can_pack(torch.empty(1, 1, dtype=dtype)) for name, dtype in dtypes.items()},
        tuple(_cuda(i) for i in range(torch.cuda.device_count())),
    )


def _cuda(index: int) -> str:
    about = torch.cuda.get_device_properties(index)
    return f"cuda:{index} {about.name}, {about.total_memory / 2**30:.0f} GiB, {about.major}.{about.minor}"


def load(model: str | None, draft: str, **options: Any) -> tuple[LLM, Serving]:
    """An LLM and its description. Raises as LLM does."""
    begin = time.perf_counter()
    llm = LLM(model, split(draft), prefix_cache=False, **options)
    return llm, describe(llm, model, draft, time.perf_counter() - begin)


def describe(llm: LLM, model: str | None, draft: str, seconds: float) -> Serving:
    drafters = drafters_of(llm.drafter)
    drafting: CausalModel | None = next((it.model for it in drafters if isinstance(it, ModelDrafter)), None)
    whose = BUNDLED if model is None and draft == "auto" else label(draft)
    return Serving(
        served(llm.model, BUNDLED if model is None else label(model)),
        llm.drafter.name,
        llm.drafter.reasons if isinstance(llm.drafter, Several) else {},
        None if drafting is None else served(drafting, whose),
        llm.model.row_invariance,
        shapes(llm.model.row_invariance),
        llm.max_model_len,
        llm.model.cache.bytes_per_token,
        llm.memory,
        seconds,
        _vocabularies(drafters),
    )


def _vocabularies(drafters: Sequence[Drafter]) -> str | None:
    """What draft models with tokens of their own share with the target, by name where several could be meant."""
    found = {it.name: it.overlap for it in drafters if isinstance(it, TranslatingDrafter)}
    if len(drafters) == 1:
        return next(map(str, found.values()), None)
    return "; ".join(f"{name}: {overlap}" for name, overlap in found.items()) or None


def _modules(model: CausalModel) -> str:
    if isinstance(model, NativeModel):
        return "one call of the C library"
    return "lean decoder" if isinstance(model, Decoder) else "transformers' own"


def served(model: CausalModel, name: str) -> Served:
    """A model, and what computes it."""
    return Served(
        name,
        model.config.model_type,
        getattr(model, "runtime", "torch"),
        _modules(model),
        getattr(model, "instructions", torch.backends.cpu.get_cpu_capability() if model.device.type == "cpu" else ""),
        kernels(model),
        str(model.dtype).removeprefix("torch."),
        str(model.device),
    )


def kernels(model: CausalModel) -> dict[str, int]:
    """Its linear layers by what computes them: a model says so itself, where that is not torch."""
    return getattr(model, "kernels", None) or dict(Counter(map(_kernel, linears(model))))


def linears(model: CausalModel) -> Iterator[object]:
    """Its linear layers, of whichever runtime."""
    if isinstance(model, Decoder):
        for s in model.sublayers:
            yield from (s.qkv, s.out) if isinstance(s, Attention) else (s.gate_up, s.down)
        yield model.head
    elif isinstance(modules := getattr(model, "model", None), nn.Module):
        yield from _linear_modules(modules)


def _linear_modules(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost ones: a layer may hold another as one of its ways to compute."""
    for child in module.children():
        if type(child) in KERNELS:
            yield child
        else:
            yield from _linear_modules(child)


def _kernel(layer: object) -> str:
    return KERNELS.get(type(layer), type(layer).__name__)


def shapes(found: RowInvariance) -> str:
    """What the probe found, in words."""
    if not found.exact:
        return f"no exact shapes; every step runs {found.min_rows} rows wide"
    multiple = f" (multiples of {found.row_multiple})" if found.row_multiple > 1 else ""
    return f"exact from {found.min_rows} rows{multiple} and {found.key_multiple} keys on"


def label(source: str) -> str:
    """A model's name without the folders above it, which tell whose machine this is."""
    return Path(source).name if Path(source).expanduser().exists() else source
