"""How one model is to be loaded: dtype, device, runtime and weight format, each checked before anything is read."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from foredraft.errors import RequestError
from foredraft.types import is_whole
from foredraft.weights.choice import BITS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
RUNTIMES = ("auto", "native", "torch")
LENGTH_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_target_positions")
ALIASES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16", "float": "float32"}


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How to load one model; target and drafter each have their own."""

    dtype: str | torch.dtype = "auto"
    device: str = "auto"
    device_map: str | dict[str, Any] | None = None
    trust_remote_code: bool = False
    runtime: str = "auto"  # native where the library and the model allow it; or native, torch
    weight_format: str | None = None  # int4 or int8: linear layers are rounded on loading
    max_model_len: int | None = None  # tokens that a text shall be able to have
    cache_bytes: int | None = None  # that all caches may take

    def __post_init__(self) -> None:
        if self.runtime not in RUNTIMES:
            raise RequestError(f"runtime={self.runtime!r} is not known; use {', '.join(RUNTIMES)}")
        if self.weight_format is not None:
            self._check_weight_format(self.weight_format)
        parse_dtype(self.dtype)
        parse_device(self.device)
        if self.device_map is not None and self.device != "auto":
            raise RequestError(f"device={self.device!r} contradicts device_map={self.device_map!r}; give one of them")

    def _check_weight_format(self, name: str) -> None:
        if not isinstance(name, str) or name not in BITS:
            advice = f"use {' or '.join(BITS)}; dtype= is for 16 and 32 bits"
            raise RequestError(f"weight_format={name!r} is not known; {advice}")
        if self.device_map is not None:
            raise RequestError(f"device_map={self.device_map!r} cannot place low-bit weights; use device=")

    def check_length(self, config: PreTrainedConfig) -> None:
        """Raises RequestError where the configuration says already that a text cannot become so long."""
        most = configured_length(config)
        if most is not None and self.max_model_len is not None:
            check_length(self.max_model_len, most)

    def check_object(self, model: PreTrainedModel, name: str = "") -> None:
        """Raises RequestError unless a model in memory is as these options ask; `name` leads those of a draft."""
        self.check_length(model.config)
        dtype, device = parse_dtype(self.dtype), parse_device(self.device)
        asks = (
            ("dtype", self.dtype, dtype in (None, model.dtype), model.dtype),
            ("device", self.device, self.device == "auto" or is_on(model.device, device), model.device),
            ("device_map", self.device_map, self.device_map is None, model.device),
        )
        for option, value, honoured, actual in asks:
            if not honoured:
                raise RequestError(
                    f"{name}{option}={value!r} cannot be honoured: the model object is in memory already ({actual}); "
                    "convert or move it first, or give its folder"
                )


def configured_length(config: PreTrainedConfig) -> int | None:
    """The longest text by the configuration, if it says."""
    text = config.get_text_config(decoder=True)
    lengths = (getattr(text, name, None) for name in LENGTH_NAMES)
    return next((length for length in lengths if isinstance(length, int)), None)


def check_length(asked: int, most: int) -> None:
    """Raises RequestError where `max_model_len` is not one that the model allows."""
    if not is_whole(asked, 2, most):
        raise RequestError(f"max_model_len={asked!r} is not usable; this model's context allows 2 to {most}")


def check_least(cache_bytes: int, least: int) -> None:
    """Raises RequestError where the caches could not hold even the shortest text."""
    if cache_bytes < least:
        raise RequestError(
            f"cache_bytes={cache_bytes} is not usable; keys and values of even the shortest text take at least {least} "
            f"({least / 2**20:.2g} MiB) here; give that or more"
        )


def parse_dtype(asked: str | torch.dtype) -> torch.dtype | None:
    """`None` for auto.

    Raises:
        RequestError: no such dtype.
    """
    name = str(asked).removeprefix("torch.")
    name = ALIASES.get(name, name)
    if name == "auto":
        return None
    if name not in DTYPES:
        raise RequestError(f"dtype={asked!r} is not known; use auto, {', '.join([*DTYPES, *ALIASES])}")
    return DTYPES[name]


def parse_device(name: str) -> torch.device:
    """Raises RequestError where the device is not known or not there."""
    if not isinstance(name, str | torch.device):
        raise RequestError(f"device={name!r} is not known; use auto, cpu, cuda or cuda:N")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RequestError(f"device={name!r} is not known; use auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise RequestError(f"device={name!r} is not known; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise RequestError(f"device={name!r}: this machine has {torch.cuda.device_count()} CUDA devices; use cpu")
    return device


def is_on(actual: torch.device, asked: torch.device) -> bool:
    """Whether something is where it is asked to be; cuda without an index is any."""
    return asked.type == actual.type and asked.index in (None, actual.index)
