"""Safetensors files written as the tensors come, and checked when they are read: sizes and hashes.

Owns bytes and names of files; knows nothing of models. A shard's header is kept free in front and filled in at the
end, so that no more than one tensor is in memory.
"""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch

from foredraft.errors import ModelError, RequestError

DTYPES = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.bool: "BOOL",
}
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
ENTRY = 120  # bytes of a header's entry, its name apart: at most
BLOCK = 2**22


def parse_size(text: str | int) -> int:
    """Bytes of "2GB", "500MB" or a number. Raises RequestError."""
    number = str(text).upper().strip().rstrip("BIKMG")
    unit = str(text).upper().strip()[len(number) :]
    try:
        size = int(float(number) * UNITS[unit if unit != "B" else ""])
    except (ValueError, KeyError, OverflowError):
        size = 0
    if size <= 0:
        raise RequestError(f"size {text!r} is not usable; write it as 2GB, 500MB or a number of bytes")
    return size


@dataclass(frozen=True, slots=True)
class FileRecord:
    """What a file must be."""

    name: str
    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> "FileRecord":
        return cls(path.name, path.stat().st_size, sha256(path))

    def check(self, folder: Path) -> None:
        """Raises ModelError where the file is missing, cut short or changed. Its size is compared first."""
        path = folder / self.name
        advice = "copy it again from where it was made, or convert the model again"
        if not path.is_file():
            raise ModelError(f"{folder} lacks {self.name}; {advice}")
        size = path.stat().st_size
        if size != self.bytes:
            raise ModelError(f"{path} has {size} bytes and should have {self.bytes}: it is damaged; {advice}")
        if sha256(path) != self.sha256:
            raise ModelError(f"{path} was changed since it was written: its SHA-256 differs; {advice}")


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(slots=True)
class ShardWriter:
    """Writes tensors into safetensors files of at most `max_bytes` (one larger tensor fills a file of its own)."""

    folder: Path
    names: list[str]  # of all the tensors there may be, for the room their headers take
    max_bytes: int
    index: dict[str, str] = field(default_factory=dict)  # tensor -> file
    shards: list[Path] = field(default_factory=list)
    total: int = 0
    _header: dict[str, Any] = field(default_factory=dict)
    _offset: int = 0
    _file: BinaryIO | None = None

    @property
    def _room(self) -> int:
        """Bytes kept for a header: a multiple of 8, so that the tensors behind it are aligned."""
        return 8 * (sum(ENTRY + 2 * len(name.encode()) for name in self.names) // 8 + 16)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        tensor = tensor.detach().cpu().contiguous()
        size = tensor.numel() * tensor.element_size()
        unaligned = self._offset % tensor.element_size()
        if self._file is None or unaligned or (self._offset and self._offset + size > self.max_bytes):
            self._next()
        assert self._file is not None
        flat = tensor.flatten().view(torch.uint8).numpy()
        for begin in range(0, size, BLOCK):
            self._file.write(flat[begin : begin + BLOCK].data)
        offsets = [self._offset, self._offset + size]
        self._header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        self._offset += size
        self.total += size
        self.index[name] = self.shards[-1].name

    def close(self) -> None:
        """Fill in the header of the shard that is open."""
        if self._file is None:
            return
        header = json.dumps({"__metadata__": {"format": "pt"}, **self._header}, separators=(",", ":")).encode()
        assert len(header) <= self._room, "a header larger than what was kept for it"
        self._file.seek(0)
        self._file.write(self._room.to_bytes(8, "little") + header.ljust(self._room))
        self._file.close()
        self._file = None

    def finish(self, stem: str) -> None:
        """Close, and give the shards their final names: STEM.safetensors, or STEM-00001-of-00003.safetensors."""
        self.close()
        final = {shard.name: shard_name(stem, i, len(self.shards)) for i, shard in enumerate(self.shards)}
        self.shards = [shard.rename(self.folder / final[shard.name]) for shard in self.shards]
        self.index = {name: final[shard] for name, shard in self.index.items()}

    def _next(self) -> None:
        self.close()
        self.shards.append(self.folder / f"{len(self.shards):05}.part")
        self._file = self.shards[-1].open("wb")
        self._file.seek(8 + self._room)
        self._header, self._offset = {}, 0


def shard_name(stem: str, index: int, count: int) -> str:
    return f"{stem}.safetensors" if count == 1 else f"{stem}-{index + 1:05}-of-{count:05}.safetensors"
