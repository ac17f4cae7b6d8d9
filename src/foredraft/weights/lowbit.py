"""Low-bit checkpoints: what their manifest says, and a transformers model made from one without its full weights.

Owns the manifest and its checks. Knows nothing of how a checkpoint is converted, or in which runtime it runs.
"""

import json
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, GenerationConfig, PreTrainedModel

from foredraft.errors import ModelError, RequestError
from foredraft.upstream.weights import empty_model, tied_weights
from foredraft.weights.rounding import GROUPS
from foredraft.weights.shards import FileRecord
from foredraft.weights.stored import TENSORS, StoredLinear

MANIFEST = "foredraft_quant.json"
VERSION = 1
FORMATS = {"int4": "bfloat16", "int8": "bfloat16", "bf16": "bfloat16", "fp16": "float16"}  # dtype of the rest
NO_FLOAT16 = (
    "dtype='float16' is not usable with weights in four or eight bits: their kernels compute in bfloat16, whose range "
    "float16 lacks; use dtype='bfloat16' or 'float32'"
)
CONVERT_AGAIN = "convert the model again with `foredraft convert`"


@dataclass(frozen=True, slots=True)
class LayerRecord:
    """How a linear layer of shape [out, in] is stored; `group_size` is of its inputs, None where there are none."""

    bits: int
    group_size: int | None
    shape: tuple[int, int]

    def __post_init__(self) -> None:
        usable = self.group_size is None if self.bits == 8 else self.group_size in GROUPS
        if self.bits not in TENSORS or not usable:
            raise ValueError(f"a layer of {self.bits!r} bits in groups of {self.group_size!r}")

    def fits(self, stored: StoredLinear) -> bool:
        """Whether the tensors that were read are as this record has it."""
        grouped = self.bits == 8 or self.group_size == 2 * stored.codes.shape[1] // stored.groups
        return stored.fits(self.shape) and grouped


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a checkpoint consists of. `files` has its shards and config.json, `tensors` the shard of each tensor."""

    weight_format: str
    dtype: str
    source: dict[str, Any]
    files: list[FileRecord]
    layers: dict[str, LayerRecord]
    tensors: dict[str, str]

    def __post_init__(self) -> None:
        if self.dtype != FORMATS.get(self.weight_format):
            raise ValueError(f"weights in {self.weight_format!r}, the rest in {self.dtype!r}")
        if not isinstance(self.tensors, dict):
            raise TypeError(f"its tensors are {self.tensors!r}")

    def write(self, folder: Path) -> None:
        content = {"format_version": VERSION, **asdict(self)}
        (folder / MANIFEST).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Raises ModelError where it is damaged, or of a version this release does not know."""
        path = folder / MANIFEST
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            version = content.pop("format_version")
            if version != VERSION:
                raise ModelError(
                    f"{path} has format version {version!r}, and this release reads {VERSION}; {CONVERT_AGAIN}, or "
                    "install the release that wrote it"
                )
            files = [FileRecord(**record) for record in content.pop("files")]
            layers = {name: LayerRecord(**record) for name, record in content.pop("layers").items()}
            return cls(files=files, layers=layers, **content)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{path} is damaged ({error}); copy it again, or {CONVERT_AGAIN}") from error

    def check_files(self, folder: Path) -> None:
        """Raises ModelError, naming the file, where one is missing, cut short or changed."""
        listed = {record.name for record in self.files}
        for name in sorted({"config.json", *self.tensors.values()} - listed):
            raise ModelError(f"{folder / MANIFEST} does not list {name}, which it needs; {CONVERT_AGAIN}")
        for record in self.files:
            record.check(folder)


def has_manifest(source: str | Path) -> bool:
    """Whether it is a folder that `foredraft convert` wrote, in whatever weight format."""
    return (Path(source).expanduser() / MANIFEST).is_file()


def is_low_bit(source: str | Path) -> bool:
    """Whether it is a folder with quantised weights. Raises ModelError where its manifest is damaged."""
    return has_manifest(source) and bool(Manifest.read(Path(source).expanduser()).layers)


def check(folder: Path) -> Manifest:
    """The manifest of a folder whose files are as it says. Raises ModelError where they are not."""
    manifest = Manifest.read(folder)
    manifest.check_files(folder)
    return manifest


def load(
    folder: Path, manifest: Manifest, dtype: torch.dtype | None, *, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The model on the CPU, its quantised layers as StoredLinear, everything else in `dtype` (None: bfloat16).

    Raises:
        ModelError: the checkpoint is damaged or incomplete.
        RequestError: a dtype that its kernels do not take.
    """
    if dtype == torch.float16:
        raise RequestError(NO_FLOAT16)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    model = empty_model(config, dtype or torch.bfloat16, trust_remote_code=trust_remote_code)
    with _Reader(folder, manifest) as reader:
        _fill(model, manifest, reader)
    model.tie_weights()
    if (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    model.eval()
    return model


class _Reader(ExitStack):
    """Tensors by name, from whichever shard has them."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        super().__init__()
        self.path = folder / MANIFEST
        self.tensors = manifest.tensors
        names = sorted(set(manifest.tensors.values()))
        self.shards: dict[str, Any] = {name: self.enter_context(safe_open(folder / name, "pt")) for name in names}

    def get(self, name: str) -> torch.Tensor:
        """Raises ModelError where the manifest does not list the tensor."""
        if name not in self.tensors:
            raise ModelError(f"{self.path} does not list the tensor {name}, which the model needs; {CONVERT_AGAIN}")
        tensor: torch.Tensor = self.shards[self.tensors[name]].get_tensor(name)
        return tensor


def _fill(model: PreTrainedModel, manifest: Manifest, reader: _Reader) -> None:
    """Put every tensor of the checkpoint in its place."""
    modules = dict(model.named_modules())
    for name, record in manifest.layers.items():
        if name not in modules:
            raise ModelError(f"{reader.path} lists the layer {name}, which the model lacks; {CONVERT_AGAIN}")
        parent, _, child = name.rpartition(".")
        tensors = {kind: reader.get(f"{name}.{kind}") for kind in TENSORS[record.bits]}
        stored = StoredLinear(tensors, record.shape[1], getattr(modules[name], "bias", None))
        if sorted(record.shape) != sorted(modules[name].weight.shape) or not record.fits(stored):
            how = f"{record.bits} bits of the shape {list(record.shape)} in groups of {record.group_size}"
            raise ModelError(f"{reader.path}: the layer {name} is not stored as {how}; {CONVERT_AGAIN}")
        setattr(modules[parent], child, stored)
    tied = tied_weights(model)
    for name, parameter in list(model.named_parameters()):
        if name not in tied or name in manifest.tensors:
            module, _, child = name.rpartition(".")
            value = reader.get(name).to(parameter.dtype)
            setattr(model.get_submodule(module), child, nn.Parameter(value, requires_grad=False))
    for name, buffer in model.named_buffers():
        if name in manifest.tensors and not name.endswith(tuple(TENSORS[4] + TENSORS[8])):
            buffer.copy_(reader.get(name))
