"""From a name, a folder or a model in memory to a CausalModel: what transformers loads, in the runtime that suits it.

Owns the choice of dtype, device and runtime, and the errors of a checkpoint that is not what it should be.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from foredraft.errors import ForedraftError, ModelError, RequestError, UnsupportedModelError
from foredraft.models import decoder, native
from foredraft.models.base import CausalModel
from foredraft.models.hf import HFModel
from foredraft.models.invariance import confirm, probe
from foredraft.models.support import ADVICE, check_supported
from foredraft.native import library
from foredraft.upstream.kernels import computes_bf16
from foredraft.upstream.modules import is_prompt_tuned, left_behind, sharing_weights, unwrapped
from foredraft.versions import suspected
from foredraft.weights import lowbit
from foredraft.weights.checkpoint import check_source, explained, first_line, has_tokenizer
from foredraft.weights.choice import BITS, quantise
from foredraft.weights.stored import start

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
RUNTIMES = ("auto", "native", "torch")
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
        if name not in BITS:
            advice = f"use {' or '.join(BITS)}; dtype= is for 16 and 32 bits"
            raise RequestError(f"weight_format={name!r} is not known; {advice}")
        if self.device_map is not None:
            raise RequestError(f"device_map={self.device_map!r} cannot place low-bit weights; use device=")

    def check_object(self, model: PreTrainedModel, name: str = "") -> None:
        """Raises RequestError unless a model in memory is as these options ask; `name` leads those of a draft."""
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
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise RequestError(f"device={name!r}: this machine has {torch.cuda.device_count()} CUDA devices; use cpu")
    return device


def is_on(actual: torch.device, asked: torch.device) -> bool:
    """Whether something is where it is asked to be; cuda without an index is any."""
    return asked.type == actual.type and asked.index in (None, actual.index)


def model_or_name(source: object) -> str | Path | PreTrainedModel:
    """What can be loaded: a name, a folder, or the transformers model inside what torch.compile or PEFT made of it.

    Raises:
        RequestError: it is nothing of the kind.
        UnsupportedModelError: a PEFT model that is more than its modules.
    """
    source = unwrapped(source)
    if is_prompt_tuned(source):
        raise UnsupportedModelError(
            "this PEFT model cannot serve: it puts virtual tokens before the text (prompt or prefix tuning); decode it "
            "with transformers' generate()"
        )
    if not isinstance(source, str | Path | PreTrainedModel):
        raise RequestError(f"{type(source).__name__} is no model; give a folder, a hub name or a transformers model")
    return source


def load_target(source: str | Path | PreTrainedModel, options: LoadOptions) -> CausalModel:
    """A model fit to verify: loaded, packed, and probed for row invariance.

    Raises:
        ModelError: the checkpoint is missing, damaged, or no causal language model.
        UnsupportedModelError: its state cannot be rewound.
    """
    return probed(load_model(source, options))


def probed(model: CausalModel) -> CausalModel:
    """The model, told from which shapes on its rows are exact; a native one is exact by construction, and says so."""
    if isinstance(model, native.NativeModel):
        confirm(model)
        return model
    with _as_cause(model):
        model.row_invariance = probe(model)
    return model


def load_model(source: str | Path | PreTrainedModel, options: LoadOptions) -> CausalModel:
    """A model in the runtime that suits it: native, the lean decoder, or the adapter. Raises as `load_target`."""
    if isinstance(source, PreTrainedModel):
        if options.weight_format is not None:
            source = _copy(source)
            quantise(source, options.weight_format, low_bit_dtype(parse_dtype(options.dtype) or source.dtype))
        return wrap(source, runtime=options.runtime)
    return wrap(load_checkpoint(source, options), consume=True, runtime=options.runtime)


@suspected()
def wrap(model: PreTrainedModel, *, consume: bool = False, runtime: str = "auto") -> CausalModel:
    """A transformers model in our runtime. It stays as it is, unless it is ours to `consume`: then its own weights go
    as soon as ours are packed.

    Raises:
        ModelError: `runtime` is "native", and that cannot serve this model here.
    """
    with _as_cause(model):
        check_supported(model)
        if runtime != "torch" and _can_run_natively(model, needed=runtime == "native"):
            return native.NativeModel(model, library.load(), consume=consume)
        model = (model if consume else _copy(model)).eval()
        if decoder.supports(model):
            return decoder.Decoder(model, consume=consume)
        start(model)
        return HFModel(model)


def _can_run_natively(model: PreTrainedModel, *, needed: bool) -> bool:
    """Raises ModelError where it is needed and cannot."""
    reason = native.why_not(model)
    missing = "" if reason else library.why_not()
    if needed and (reason or missing):
        raise ModelError(f"runtime='native' cannot serve this model: {reason or missing}; use runtime='torch'")
    if missing:
        _say_once(missing)
    return not (reason or missing)


@cache
def _say_once(missing: str) -> None:
    logging.getLogger("foredraft").warning("models run on torch, several times slower: %s", missing)


def _copy(model: PreTrainedModel) -> PreTrainedModel:
    """Raises UnsupportedModelError where a copy would compute with the original's modules."""
    other = sharing_weights(model)
    name = left_behind(other)
    if name is not None:
        whose = f"{name}.forward" if name else "forward"
        raise UnsupportedModelError(
            f"this {model.config.model_type!r} cannot serve: its {whose} was replaced on the object by a function, "
            f"which stays bound to that object; take it away (del model.{whose}), or give the model's folder"
        )
    return other


@contextmanager
def _as_cause(model: PreTrainedModel | CausalModel) -> Iterator[None]:
    """An error within a model's own code becomes the reason why it cannot serve."""
    try:
        yield
    except ForedraftError:
        raise
    except Exception as error:  # anything: it is their code, perhaps not even transformers'
        raise UnsupportedModelError(
            f"{model.config.model_type!r} cannot serve: its own code fails over our cache ({type(error).__name__}: "
            f"{first_line(error)}); {ADVICE}"
        ) from error


def load_checkpoint(source: str | Path, options: LoadOptions) -> PreTrainedModel:
    """What transformers loads, with errors that say what is wrong. Raises as `load_target`."""
    check_source(source)
    device = parse_device(options.device)
    if lowbit.has_manifest(source):
        folder = Path(source).expanduser()
        manifest = lowbit.check(folder)
        if manifest.layers:
            return load_low_bit(folder, manifest, options, device)
    if options.weight_format is not None:
        return load_quantised(source, options, device)
    remote = {"trust_remote_code": options.trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(source, **remote)
        dtype = pick_dtype(parse_dtype(options.dtype), config, device)
        placement = {"device_map": options.device_map} if options.device_map else {}
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, config=config, **placement, **remote)
    except ModelError:
        raise
    except Exception as error:  # transformers, safetensors and pickle each have errors of their own for a bad file
        raise explained(source, error) from error
    if not options.device_map:
        model.to(device)  # type: ignore[arg-type]  # decorated in transformers without its types
    return model


def load_low_bit(
    folder: Path, manifest: lowbit.Manifest, options: LoadOptions, device: torch.device
) -> PreTrainedModel:
    """A folder that `foredraft convert` wrote in four or eight bits. Raises as `load_target`."""
    if options.device_map:
        raise RequestError(
            f"device_map={options.device_map!r} cannot place low-bit weights; use device={device.type!r}"
        )
    if options.weight_format not in (None, manifest.weight_format):
        raise RequestError(
            f"weight_format={options.weight_format!r} contradicts {folder}, which holds {manifest.weight_format} "
            "weights; leave it out, or give the original"
        )
    try:
        model = lowbit.load(folder, manifest, parse_dtype(options.dtype), trust_remote_code=options.trust_remote_code)
    except ForedraftError:
        raise
    except Exception as error:  # as above
        raise explained(folder, error) from error
    model.to(device)  # type: ignore[arg-type]  # as above
    return model


def load_quantised(source: str | Path, options: LoadOptions, device: torch.device) -> PreTrainedModel:
    """A checkpoint, its linear layers rounded: what `foredraft convert` and loading give, without a file.

    Raises as `load_target`.
    """
    assert options.weight_format is not None
    dtype = low_bit_dtype(parse_dtype(options.dtype) or torch.bfloat16)
    stored = replace(options, dtype="auto", device="cpu", weight_format=None)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "float16 weights run as")  # they are rounded at once
        model = load_checkpoint(source, stored)
    quantise(model, options.weight_format, dtype)
    model.to(device)  # type: ignore[arg-type]  # as above
    return model


def low_bit_dtype(dtype: torch.dtype) -> torch.dtype:
    """Raises RequestError for float16, in which the kernels do not compute."""
    if dtype == torch.float16:
        raise RequestError(lowbit.NO_FLOAT16)
    return dtype


def pick_dtype(asked: torch.dtype | None, config: Any, device: torch.device) -> torch.dtype:
    """The dtype asked for, or the checkpoint's; on a CPU fp16 is 15 times slower, so auto avoids it, aloud."""
    stored = getattr(config, "dtype", None) or torch.float32
    if asked is None and stored == torch.float16 and device.type == "cpu":
        asked = torch.bfloat16 if computes_bf16() else torch.float32
        warnings.warn(f"float16 weights run as {asked} on this CPU; pass dtype='float16' to keep them", stacklevel=2)
    elif asked == torch.float16 and device.type == "cpu":
        warnings.warn("float16 is about 15 times slower than bfloat16 on a CPU; use dtype='bfloat16'", stacklevel=2)
    return asked or stored


def find_tokenizer(source: str | Path, options: LoadOptions) -> PreTrainedTokenizerBase | None:
    """The checkpoint's tokenizer; None for a folder without any of its files. Raises ModelError where it is damaged."""
    return load_tokenizer(source, options) if has_tokenizer(source) else None


def load_tokenizer(source: str | Path, options: LoadOptions) -> PreTrainedTokenizerBase:
    """Raises ModelError where the checkpoint has no usable tokenizer."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=options.trust_remote_code)
    except Exception as error:
        text = first_line(error)
        raise ModelError(f"{source} has no tokenizer that loads ({text}); add its tokenizer files") from error
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer
