"""`convert`: any checkpoint into a smaller one, tensor by tensor.

Owns what is quantised and what is not, and that a folder either is whole or is not there. Knows nothing of running
models.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, get_args

import torch

from foredraft.errors import ModelError, RequestError
from foredraft.upstream.weights import empty_model
from foredraft.weights.choice import BITS, Layer, chosen_layers
from foredraft.weights.lowbit import FORMATS, LayerRecord, Manifest
from foredraft.weights.rounding import GROUPS
from foredraft.weights.shards import FileRecord, ShardWriter, parse_size
from foredraft.weights.source import Origin, Tensors, find
from foredraft.weights.stored import quantize_weight

WeightFormat = Literal["int4", "int8", "bf16", "fp16"]
Progress = Callable[[int, int], None]  # bytes of the source that are done, and all


@dataclass(frozen=True, slots=True)
class Conversion:
    """What was written."""

    folder: Path
    source_bytes: int
    bytes: int
    quantised: int  # layers
    shards: int


def convert(
    source: str | Path,
    out: str | Path,
    weight_format: WeightFormat = "int4",
    *,
    group_size: int | None = None,
    max_shard_size: str | int = "2GB",
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Conversion:
    """Write `source` (a folder, a hub name, a .gguf file) to the folder `out` in another weight format.

    int4 and int8 quantise the linear layers of the decoder and an untied head; bf16 and fp16 give an ordinary
    transformers checkpoint. `out` appears when it is complete.

    Args:
        group_size: inputs that share a scale, for int4; None chooses for each layer.
        overwrite: replace `out`, if it is a checkpoint.

    Raises:
        RequestError: an argument is not usable, or `out` exists.
        ModelError: the source cannot be read or is quantised already, the group size does not divide a layer, a weight
            is not finite in the new format, or `out` cannot be written.
    """
    _check_format(weight_format, group_size)
    shard_bytes = parse_size(max_shard_size)
    out = Path(out).expanduser().absolute()
    _check_out(source, out, overwrite)
    origin = find(source, trust_remote_code)
    dtype: torch.dtype = getattr(torch, FORMATS[weight_format])
    model = empty_model(origin.config, dtype, trust_remote_code=trust_remote_code)
    layers = chosen_layers(model, BITS[weight_format]) if weight_format in BITS else {}
    _check_group(layers, group_size)
    job = _Job(weight_format, dtype, layers, group_size)
    with origin.open(model) as tensors, _atomically(out, overwrite) as partial:
        with closing(ShardWriter(partial, 2 * list(tensors.sizes), shard_bytes)) as writer:
            job.write_tensors(tensors, writer, progress or _quiet)
            writer.finish("lowbit" if weight_format in BITS else "model")
        job.write_files(origin, writer)
    return Conversion(out, sum(tensors.sizes.values()), writer.total, len(job.records), len(writer.shards))


@dataclass(slots=True)
class _Job:
    weight_format: WeightFormat
    dtype: torch.dtype  # of what is not quantised
    layers: dict[str, Layer]
    group: int | None
    records: dict[str, LayerRecord] = field(default_factory=dict)

    def write_tensors(self, tensors: Tensors, writer: ShardWriter, progress: Progress) -> None:
        done, total = 0, sum(tensors.sizes.values())
        for name, size in tensors.sizes.items():
            self._write(name, tensors.get(name), writer)
            done += size
            progress(done, total)

    def _write(self, name: str, tensor: torch.Tensor, writer: ShardWriter) -> None:
        owner, _, kind = name.rpartition(".")
        layer = self.layers.get(owner) if kind == "weight" else None
        if layer is None:
            kept = tensor.to(self.dtype) if tensor.is_floating_point() else tensor
            _check_finite(name, kept, tensor)
            writer.add(name, kept)
            return
        _check_finite(name, tensor, tensor)
        stored = quantize_weight(tensor.T if layer.turned else tensor, layer.bits, self.group)
        for suffix, part in stored.items():
            writer.add(f"{owner}.{suffix}", part)
        group = 2 * stored["codes"].shape[1] // stored["grid"].shape[1] if layer.bits == 4 else None
        self.records[owner] = LayerRecord(layer.bits, group, layer.shape)

    def write_files(self, origin: Origin, writer: ShardWriter) -> None:
        """Everything but the shards; the configuration, without which nothing loads, comes last."""
        folder, dtype = writer.folder, str(self.dtype).removeprefix("torch.")
        origin.copy_files(folder)
        if self.weight_format not in BITS and len(writer.shards) > 1:
            index = {"metadata": {"total_size": writer.total}, "weight_map": writer.index}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
        config = json.dumps({**origin.config_dict(), "dtype": dtype}, indent=2).encode()
        files = [FileRecord.of(shard) for shard in writer.shards]
        files.append(FileRecord("config.json", len(config), hashlib.sha256(config).hexdigest()))
        source = {"name": origin.name, "files": [asdict(FileRecord.of(path)) for path in origin.weight_files]}
        Manifest(self.weight_format, dtype, source, files, self.records, writer.index).write(folder)
        (folder / "config.json").write_bytes(config)


def _check_format(weight_format: str, group_size: int | None) -> None:
    if weight_format not in get_args(WeightFormat):
        known = ", ".join(get_args(WeightFormat))
        raise RequestError(f"weight format {weight_format!r} is not known; use one of {known}")
    if group_size is None:
        return
    if weight_format != "int4":
        raise RequestError(f"group size {group_size} is for int4; leave it out with {weight_format}")
    if group_size not in GROUPS:
        raise RequestError(f"group size {group_size} is not usable; use one of {', '.join(map(str, sorted(GROUPS)))}")


def _check_group(layers: dict[str, Layer], group_size: int | None) -> None:
    """Raises ModelError, naming the first layer that the group size does not divide and the sizes that fit all."""
    inputs = {name: layer.shape[1] for name, layer in layers.items() if layer.bits == 4}
    if group_size is None or all(width % group_size == 0 for width in inputs.values()):
        return
    name, width = next((name, width) for name, width in inputs.items() if width % group_size)
    fits = [str(g) for g in sorted(GROUPS) if all(width % g == 0 for width in inputs.values())]
    advice = f"use {' or '.join(fits)}, or leave it out" if fits else "leave it out: inputs are padded then"
    raise ModelError(f"group size {group_size} does not divide the {width} inputs of {name}; {advice}")


def _check_finite(name: str, kept: torch.Tensor, original: torch.Tensor) -> None:
    if (
        not kept.is_floating_point()
        or not kept.numel()
        or kept.aminmax().max.isfinite() & kept.aminmax().min.isfinite()
    ):
        return
    if original.isfinite().all():
        largest = original.abs().max().item()
        raise ModelError(f"{name} reaches {largest:.3g}, which {kept.dtype} cannot hold; use bf16")
    raise ModelError(f"{name} has values that are not numbers or infinite: the source is damaged; download it again")


def _check_out(source: str | Path, out: Path, overwrite: bool) -> None:
    """Raises RequestError where `out` is not free, or not ours to replace."""
    place = Path(source).expanduser().absolute()
    if place.exists() and (out == place or out in place.parents or place in out.parents):
        raise RequestError(f"{out} and the source {place} lie in each other; give a folder of its own")
    if not out.exists():
        return
    if not overwrite:
        raise RequestError(f"{out} exists; give another folder, or overwrite it with --overwrite (overwrite=True)")
    if not out.is_dir() or (any(out.iterdir()) and not (out / "config.json").exists()):
        raise RequestError(f"{out} is no checkpoint (it has no config.json), so it is not overwritten; remove it first")


@contextmanager
def _atomically(out: Path, overwrite: bool) -> Iterator[Path]:
    """A folder beside `out` that takes its name when all went well, and else is removed.

    What a killed run left behind has no config.json, so that it does not load; the next run clears it away.
    """
    partial, old = (out.with_name(f".{out.name}.{state}") for state in ("partial", "old"))
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        if overwrite and out.exists():
            shutil.rmtree(old, ignore_errors=True)
            out.rename(old)
        partial.rename(out)
    except OSError as error:
        raise ModelError(f"{out} cannot be written: {error}; nothing was left behind") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if old.exists() and not out.exists():
            old.rename(out)
        shutil.rmtree(old, ignore_errors=True)


def _quiet(done: int, total: int) -> None:
    pass
