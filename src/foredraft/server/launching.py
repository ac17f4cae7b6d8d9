"""From a launch request to a loaded model: what is to be loaded, what it will take, and loading it.

Knows checkpoints and LLM. Blocks; to be called off the event loop.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from foredraft.admission import CacheLimits
from foredraft.assembly import BUNDLED, bundled_draft
from foredraft.drafters import DRAFTERS
from foredraft.drafters.listed import check_place
from foredraft.errors import RequestError
from foredraft.llm import LLM
from foredraft.models.options import DTYPES, LoadOptions, parse_device, parse_dtype
from foredraft.models.pretrained import check_cache_bytes
from foredraft.server.errors import ApiError, check_room
from foredraft.server.registry import Registry, Size
from foredraft.server.schemas import LaunchRequest, SpeculativeLaunchRequest

DRAFT_SHARE = {"int8": 0.5, "int4": 0.28, "int4+skip": 0.28}  # of the target's bf16 weights
WEIGHT_SHARE = {"int8": 0.52, "int4": 0.3}  # of weights in bf16
QUANTIZATIONS = {"none": None, "int8": "int8", "8-bit": "int8", "int4": "int4", "4-bit": "int4"}
WEIGHTS = ("*.safetensors", "*.bin")


@dataclass(frozen=True, slots=True)
class LaunchSpec:
    """A model to load. `target` None is the bundled one."""

    name: str  # as the client called it
    target: str | Path | None = None
    draft: str | Path = "auto"
    dtype: str = "auto"
    device: str = "auto"
    draft_dtype: str | None = None
    draft_device: str | None = None
    draft_weight_format: str | None = None
    device_map: str | None = None
    policy: str | None = None
    max_model_len: int | None = None
    max_batch_size: int = 8
    weight_format: str | None = None
    runtime: str = "auto"
    trust_remote_code: bool = False  # an operator's word, never a client's
    chat_template: str | None = None  # its text, in place of the tokenizer's own
    cache_bytes: int | None = None  # None: what a batch of the longest texts takes, where there is room for that
    prefix_cache: bool | int = True
    draft_name: str = ""  # as the client called it

    def as_named(self, message: str) -> str:
        """A message with names for folders: those of the registry and of the operator are not every client's to see."""
        called = {str(self.draft): self.draft_name, str(self.target): self.name}
        names = {spelling: name for path, name in called.items() if name for spelling in _spellings(path)}
        for spelling in sorted(names, key=len, reverse=True):
            message = message.replace(spelling, names[spelling])
        return message


def _spellings(path: str) -> set[str]:
    """How messages may write a folder: as it was given, and as the libraries that open it make of it."""
    home = os.path.expanduser(path)
    ways = {path.rstrip("/"), home.rstrip("/"), str(Path(path)), str(Path(home)), os.path.realpath(home)}
    return {way for way in ways if len(way) > 1} if "/" in path else set()


def from_launch(body: LaunchRequest, registry: Registry) -> LaunchSpec:
    """Raises ApiError, RequestError."""
    weight_format = quantization(body.quantization)
    if body.target is None and body.size_in_billions is not None:
        raise ApiError(400, "size_in_billions says which size of a target; name the target too", "size_in_billions")
    target = None if body.target is None else registry.resolve(body.target, body.size_in_billions)
    draft = _draft(body.draft, body.draft_size_in_billions, registry)
    _check_draft(body, draft, target)
    check_cache(body.cache_bytes, target)
    LoadOptions(body.dtype, body.device)
    LoadOptions(body.draft_dtype or "auto", body.draft_device or "auto")
    device, device_map = _placement(body.n_gpu, body.device)
    return LaunchSpec(
        body.target or "foredraft-bundled",
        target,
        draft,
        body.dtype,
        device,
        body.draft_dtype,
        body.draft_device,
        draft_quantization(body.draft_quantization),
        device_map,
        body.policy,
        body.max_model_len,
        body.max_batch_size or 8,
        weight_format,
        cache_bytes=body.cache_bytes,
        prefix_cache=True if body.prefix_cache is None else body.prefix_cache,
        draft_name=body.draft,
    )


def from_speculative_launch(body: SpeculativeLaunchRequest, registry: Registry) -> LaunchSpec:
    """Xinference's request. Raises ApiError, RequestError."""
    weight_format = quantization(body.quantization)
    target = registry.resolve(body.model_name, body.model_size_in_billions, "model_name")
    draft = registry.resolve(body.draft_model_name, body.draft_model_size_in_billions, "draft_model_name")
    device, device_map = _placement(body.n_gpu, "auto")
    return LaunchSpec(
        body.model_name,
        target,
        draft,
        device=device,
        draft_weight_format=draft_quantization(body.draft_quantization),
        device_map=device_map,
        weight_format=weight_format,
        draft_name=body.draft_model_name,
    )


def quantization(name: str | None, field: str = "quantization") -> str | None:
    """The weight format of a name as Xinference has it, or ours. Raises ApiError."""
    if name is None or name in QUANTIZATIONS:
        return QUANTIZATIONS[name or "none"]
    raise ApiError(400, f"{field}={name!r} is not known; use {', '.join(QUANTIZATIONS)}", field)


def draft_quantization(name: str | None) -> str | None:
    """The same of a draft model, where saying nothing leaves the choice to us."""
    return None if name is None else quantization(name, "draft_quantization") or "none"


def _check_draft(body: LaunchRequest, draft: str | Path, target: str | Path | None) -> None:
    """Raises ApiError where something is asked of a draft model and none is loaded."""
    place = {name: getattr(body, name) for name in ("draft_quantization", "draft_dtype", "draft_device")}
    try:
        check_place([draft], bundled_draft(target), **place)
    except RequestError as error:
        raise ApiError(400, str(error), next(name for name in place if place[name] is not None)) from None


def check_cache(cache_bytes: int | None, target: str | Path | None) -> None:
    """Raises RequestError where the target's configuration, if it is here, says that these caches hold no text."""
    check_cache_bytes(cache_bytes, _config(BUNDLED / "target" if target is None else Path(target)))


def _draft(name: str, size: Size, registry: Registry) -> str | Path:
    if name == "auto" or name in DRAFTERS:
        if size is not None:
            raise ApiError(400, f"draft={name!r} has no sizes; drop draft_size_in_billions", "draft_size_in_billions")
        return name
    return registry.resolve(name, size, "draft")


def _placement(n_gpu: int | str | None, device: str) -> tuple[str, str | None]:
    """`n_gpu` as Xinference means it: None or 0 is the CPU, "auto" what is there."""
    if n_gpu in (None, 0) and device == "auto":
        return "cpu", None
    if n_gpu in (None, 0, 1, "auto"):
        wanted = "cuda" if n_gpu == 1 and device == "auto" else device
        parse_device(wanted)
        return wanted, None
    assert isinstance(n_gpu, int)
    if n_gpu < 0 or device != "auto":
        raise ApiError(400, f"n_gpu={n_gpu} contradicts device={device!r}, or is no number of GPUs", "n_gpu")
    try:
        parse_device(f"cuda:{n_gpu - 1}")
    except RequestError as error:
        raise ApiError(400, f"n_gpu={n_gpu} is more than there are: {error}", "n_gpu") from None
    return "auto", "auto"


def footprint(spec: LaunchSpec) -> int:
    """Bytes without which it cannot serve, weights and one longest text; an estimate, nothing is loaded.

    From files and configurations: hub models that are not in the cache yet count as nothing, and `load` checks again.
    """
    target = Path(spec.target) if spec.target is not None else BUNDLED / "target"
    weights = _weights(target, "bfloat16" if spec.weight_format else spec.dtype)
    weights = int(weights * WEIGHT_SHARE.get(spec.weight_format or "", 1.0))
    draft = bundled_draft(spec.target) if spec.draft == "auto" else spec.draft
    if isinstance(draft, str) and draft in DRAFTERS:
        return weights + int(weights * DRAFT_SHARE.get(draft, 0.0)) + _caches(spec, target)
    if draft is None:
        return weights + _caches(spec, target)
    return weights + _weights(Path(draft), spec.draft_dtype or spec.dtype) + _caches(spec, target, Path(draft))


def load(spec: LaunchSpec, room: int | None = None) -> LLM:
    """With caches that take what a batch of the longest texts can, and no more than `room` leaves beside the weights.

    Raises:
        ApiError: weights and one longest text take more than `room`.
        ModelError, RequestError, or whatever a checkpoint makes of itself.
    """
    llm = LLM(
        spec.target,
        spec.draft,
        dtype=spec.dtype,
        device=spec.device,
        draft_dtype=spec.draft_dtype,
        draft_device=spec.draft_device,
        draft_weight_format=spec.draft_weight_format,
        device_map=spec.device_map,
        trust_remote_code=spec.trust_remote_code,
        chat_template=spec.chat_template,
        max_model_len=spec.max_model_len,
        max_batch_size=spec.max_batch_size,
        policy=spec.policy,
        weight_format=spec.weight_format,
        runtime=spec.runtime,
        cache_bytes=spec.cache_bytes,
        prefix_cache=spec.prefix_cache,
    )
    admission = llm.engine.admission
    admission.limits = _limits(llm, spec, room)
    return llm


def taken(llm: LLM) -> int:
    """Bytes that it may come to take."""
    return llm.memory["target_weights"] + llm.memory["draft_weights"] + llm.engine.admission.limits.total


def _limits(llm: LLM, spec: LaunchSpec, room: int | None) -> CacheLimits:
    """Raises ApiError."""
    limits = llm.engine.admission.limits
    total = min(limits.total, spec.cache_bytes or _longest(llm, spec.max_batch_size))
    if room is not None:
        weights = taken(llm) - limits.total
        check_room(spec.name, weights + min(_longest(llm, 1), total), room)
        total = min(total, room - weights)
    return CacheLimits(total, min(limits.kept, total))


def _longest(llm: LLM, texts: int) -> int:
    """Bytes that so many of the longest texts take in all caches."""
    return sum(cache.need([llm.max_model_len] * texts) for cache in llm.engine.caches())


def _weights(folder: Path, dtype: str) -> int:
    local = _local(folder)
    files = [path for pattern in WEIGHTS for path in local.glob(pattern)] if os.path.isdir(local) else []
    stored = parse_dtype(str(_config(folder).get("dtype") or _config(folder).get("torch_dtype") or "float32"))
    wanted = parse_dtype(dtype) or stored
    scale = (wanted.itemsize / stored.itemsize) if wanted is not None and stored is not None else 1.0
    return int(sum(path.stat().st_size for path in files) * scale)


def _caches(spec: LaunchSpec, *folders: Path) -> int:
    """Of one longest text."""
    needed = sum(_cache(folder, spec) for folder in folders)
    return needed if spec.cache_bytes is None else min(needed, spec.cache_bytes)


def _cache(folder: Path, spec: LaunchSpec) -> int:
    config = _config(folder)
    config = config.get("text_config") or config
    heads = config.get("num_attention_heads") or config.get("n_head") or 0
    width = config.get("hidden_size") or config.get("n_embd") or 0
    size = config.get("head_dim") or (width // heads if heads else 0)
    layers = config.get("num_hidden_layers") or config.get("n_layer") or 0
    positions = config.get("max_position_embeddings") or config.get("n_positions") or 0
    length = min(spec.max_model_len or positions, positions)
    dtype = parse_dtype(spec.dtype) or DTYPES.get(str(config.get("dtype")), DTYPES["bfloat16"])
    return int(2 * layers * (config.get("num_key_value_heads") or heads) * size * dtype.itemsize * length)


def _local(folder: Path) -> Path:
    """The folder itself, or where the hub's cache has it."""
    try:
        cached = None if os.path.exists(folder) else try_to_load_from_cache(str(folder), "config.json")
    except ValueError:  # neither a path nor a hub name; loading it will say so
        return folder
    return Path(cached).parent if isinstance(cached, str) else folder


def _config(folder: Path) -> dict[str, Any]:
    path = _local(folder) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # loading it will say what is wrong
        return {}
    return config if isinstance(config, dict) else {}
