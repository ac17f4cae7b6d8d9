"""From what a client calls a model to what is loaded: names and sizes, and which paths and hub names are allowed.

Owns the registry's file form (TOML or JSON) and the rule that nothing a client names is opened unless the operator
allowed it.
"""

import json
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foredraft.errors import RequestError
from foredraft.llm import BUNDLED
from foredraft.server.errors import ApiError
from foredraft.server.settings import Settings

BUILT_IN = Path(__file__).parent / "registry.toml"
FIELDS = {"name", "size_in_billions", "path"}
Size = int | float | str | None
SIZES = {  # the fields that say which size, by those that name the model
    "target": "size_in_billions",
    "draft": "draft_size_in_billions",
    "model_name": "model_size_in_billions",
    "draft_model_name": "draft_model_size_in_billions",
}


@dataclass(frozen=True, slots=True)
class Entry:
    """A model of the registry; `trusted` entries are the operator's own and may be folders anywhere."""

    name: str
    size: float | None
    path: str
    trusted: bool


@dataclass(frozen=True, slots=True)
class Registry:
    entries: tuple[Entry, ...]
    folders: tuple[Path, ...]
    allow_hub: bool

    def resolve(self, name: str, size: Size = None, field: str = "target") -> str | Path:
        """What to load. Raises ApiError: no such name or size, or not allowed."""
        entries = [entry for entry in self.entries if entry.name == name]
        if not entries:
            if size is not None:
                raise ApiError(400, f"{field}={name!r} is no name in the registry ({self._names()})", field)
            return self._allowed(name, field)
        entry = self._sized(entries, size, field)
        if entry.path.startswith("bundled:"):
            return BUNDLED / entry.path.removeprefix("bundled:")
        return entry.path if entry.trusted else self._allowed(entry.path, field)

    def _sized(self, entries: list[Entry], size: Size, field: str) -> Entry:
        known = ", ".join(f"{entry.size:g}" for entry in entries if entry.size is not None) or "none"
        if size is None:
            if len(entries) > 1:
                message = f"{field}={entries[0].name!r} has several sizes ({known}); say which in {SIZES[field]!r}"
                raise ApiError(400, message, SIZES[field])
            return entries[0]
        wanted = parse_size(size)
        found = next((entry for entry in entries if entry.size == wanted), None)
        if found is None:
            raise ApiError(400, f"{field}={entries[0].name!r} has no size {size!r}; there is {known}", field)
        return found

    def _allowed(self, name: str, field: str) -> str | Path:
        """A path below an allowed folder, or a hub name where those are allowed. Raises ApiError."""
        if name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1 or os.path.exists(name):
            return self._allowed_path(name, field)
        if self.allow_hub and name.count("/") == 1:
            return name
        hub = "" if self.allow_hub else "; hub names need the server's --allow-hub"
        raise ApiError(400, f"{field}={name!r} is no name in the registry ({self._names()}){hub}", field)

    def _allowed_path(self, name: str, field: str) -> Path:
        try:
            real = Path(name).expanduser().resolve()
        except (OSError, RuntimeError, ValueError):
            real = None
        if real is None or not any(real.is_relative_to(folder) for folder in self.folders):
            message = "that folder is not one this server may open; its operator can allow it with --allow-folder"
            raise ApiError(403, f"{field}: {message}", field, "folder_not_allowed")
        return real

    def describe(self) -> list[dict[str, Any]]:
        """Every name and its sizes, in the form of Xinference's registrations."""
        names = dict.fromkeys(entry.name for entry in self.entries)
        of = {name: [entry for entry in self.entries if entry.name == name] for name in names}
        return [
            {
                "model_name": name,
                "is_builtin": not any(entry.trusted for entry in entries),
                "sizes_in_billions": [entry.size for entry in entries if entry.size is not None],
            }
            for name, entries in of.items()
        ]

    def _names(self) -> str:
        return ", ".join(sorted({entry.name for entry in self.entries}))


def load_registry(settings: Settings) -> Registry:
    """Built-in names, the operator's before them. Raises RequestError where a file is not as it should be."""
    own = read_entries(settings.registry, trusted=True) if settings.registry else ()
    folders = tuple(folder.expanduser().resolve() for folder in settings.allowed_folders)
    return Registry((*own, *read_entries(BUILT_IN, trusted=False)), folders, settings.allow_hub)


def read_entries(path: Path, *, trusted: bool) -> tuple[Entry, ...]:
    """Raises RequestError with the entry that is wrong."""
    try:
        text = path.read_text(encoding="utf-8")
        data = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (OSError, ValueError) as error:
        raise RequestError(f"the registry {path} cannot be read: {error}") from None
    models = data.get("model") if isinstance(data, dict) else None
    if not isinstance(models, list):
        raise RequestError(f"the registry {path} has no list of [[model]] entries")
    return tuple(_entry(path, number, model, trusted) for number, model in enumerate(models, 1))


def _entry(path: Path, number: int, model: Any, trusted: bool) -> Entry:
    texts = isinstance(model, Mapping) and all(isinstance(model.get(name), str) for name in ("name", "path"))
    if not texts or not set(model) <= FIELDS:
        wanted = "name and path as text, and size_in_billions where it has several sizes"
        raise RequestError(f"the registry {path}, model {number}: give {wanted}; found {sorted(map(str, model))}")
    size = model.get("size_in_billions")
    try:
        parsed = None if size is None else parse_size(size)
    except ApiError as error:
        raise RequestError(f"the registry {path}, model {number}: {error.message}") from None
    return Entry(model["name"], parsed, model["path"], trusted)


def parse_size(size: int | float | str) -> float:
    """Billions of parameters; Xinference's client writes 1.8 as "1_8". Raises ApiError."""
    try:
        value = float(str(size).replace("_", "."))
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise ApiError(400, f"size_in_billions={size!r} is no size; give billions of parameters, such as 7 or 1.8")
    return value
