"""Checkpoints and tokenizers as transformers loads them, in any weight format, with errors that say what is wrong.

Knows nothing of runtimes.
"""

import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from foredraft.errors import ForedraftError, ModelError, RequestError
from foredraft.models.family import FAMILY
from foredraft.models.options import LoadOptions, check_least, parse_device, parse_dtype
from foredraft.models.pages import PageShape
from foredraft.upstream.kernels import computes_bf16
from foredraft.upstream.progress import no_loading_bars
from foredraft.weights import lowbit
from foredraft.weights.checkpoint import check_source, explained, first_line, has_tokenizer
from foredraft.weights.choice import quantise


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
        check_config(config, options)
        dtype = pick_dtype(parse_dtype(options.dtype), config, device)
        placement = {"device_map": options.device_map} if options.device_map else {}
        with no_loading_bars():
            model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, config=config, **placement, **remote)
    except ForedraftError:
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
        check_config(AutoConfig.from_pretrained(folder, trust_remote_code=options.trust_remote_code), options)
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


def check_config(config: PreTrainedConfig, options: LoadOptions) -> None:
    """Raises RequestError where a configuration says already that what is asked for cannot be had."""
    options.check_length(config)
    check_cache_bytes(options.cache_bytes, config.to_dict())


def check_cache_bytes(asked: int | None, config: Mapping[str, Any]) -> None:
    """Raises RequestError where caches of so many bytes do not hold one page of 16 bits; told of the Llama family."""
    if asked is not None and config.get("model_type") in FAMILY:
        check_least(asked, _page(config))


def _page(config: Mapping[str, Any]) -> int:
    """Its bytes; 0 where the configuration does not say, or what is none."""
    try:
        layers, heads = int(config["num_hidden_layers"]), int(config["num_attention_heads"])
        kv_heads = int(config.get("num_key_value_heads") or heads)
        dim = int(config.get("head_dim") or config["hidden_size"] // heads)
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return 0
    return PageShape(layers, kv_heads, dim, torch.bfloat16).nbytes


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
