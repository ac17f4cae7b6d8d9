"""Where the weights that are converted come from: a folder's safetensors, one tensor at a time, or what transformers
makes of anything else.

Owns finding a source and the names its tensors have in the model. Knows nothing of formats to convert to.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from foredraft.errors import ModelError
from foredraft.upstream.progress import no_loading_bars
from foredraft.upstream.weights import tied_weights
from foredraft.weights.checkpoint import ADAPTER, MERGE, check_source, explained, looks_like_path
from foredraft.weights.lowbit import MANIFEST, is_low_bit

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf")
DOWNLOADED = ("*.json", "*.txt", "*.model", "*.jinja", "*.py", "LICENSE*", "README.md", "*.safetensors")


class Tensors(Protocol):
    """Weights by the model's own names, one at a time."""

    sizes: dict[str, int]  # bytes, in the order to read them in

    def get(self, name: str) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class Origin:
    """A checkpoint to convert."""

    name: str
    folder: Path
    config: PreTrainedConfig
    gguf: str | None
    trust_remote_code: bool

    @property
    def weight_files(self) -> list[Path]:
        if self.gguf:
            return [self.folder / self.gguf]
        files = sorted(path for path in self.folder.iterdir() if path.suffix in WEIGHTS and path.is_file())
        return [path for path in files if path.suffix == ".safetensors"] or files

    def config_dict(self) -> dict[str, Any]:
        """config.json as it is written down, without its dtype."""
        path = self.folder / "config.json"
        written = self.config.to_diff_dict() if self.gguf else json.loads(path.read_text(encoding="utf-8"))
        return {name: value for name, value in written.items() if name not in ("dtype", "torch_dtype")}

    def copy_files(self, folder: Path) -> None:
        """Everything that is no weight: tokenizer, chat templates, generation settings, code, licence."""
        if self.gguf:
            AutoTokenizer.from_pretrained(self.folder, gguf_file=self.gguf).save_pretrained(folder)
            return
        for path in self.folder.iterdir():
            weights = path.suffix in WEIGHTS or path.name.endswith(".index.json")
            if path.name == "additional_chat_templates":
                shutil.copytree(path, folder / path.name)
            elif path.is_file() and not weights and path.name not in ("config.json", MANIFEST) and path.name[0] != ".":
                shutil.copyfile(path, folder / path.name)

    @contextmanager
    def open(self, model: PreTrainedModel) -> Iterator[Tensors]:
        """The weights of `model`, an empty model of this origin. Raises ModelError where they do not load."""
        with ExitStack() as stack:
            try:
                found = None if self.gguf else _Shards.open(self.weight_files, model, stack)
                tensors = found or _Loaded(self._load(), model)
            except ModelError:
                raise
            except Exception as error:  # as in load.py
                raise explained(self.name, error) from error
            yield tensors

    def _load(self) -> PreTrainedModel:
        gguf = {"gguf_file": self.gguf} if self.gguf else {}
        with no_loading_bars():
            loaded = AutoModelForCausalLM.from_pretrained(
                self.folder, dtype="auto", trust_remote_code=self.trust_remote_code, **gguf
            )
        assert isinstance(loaded, PreTrainedModel)
        return loaded


def find(source: str | Path, trust_remote_code: bool) -> Origin:
    """Raises ModelError: it is missing, damaged, or quantised already."""
    path = Path(source).expanduser()
    gguf = path.name if path.suffix == ".gguf" else None
    check_source(path.parent if gguf and path.exists() and (path.parent / "config.json").exists() else source)
    local = looks_like_path(source)
    try:
        folder = (path.parent if gguf else path) if local else _download(str(source))
        named = {"gguf_file": gguf} if gguf else {}
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, **named)
    except Exception as error:  # as in load.py
        raise explained(source, error) from error
    if is_low_bit(folder) or (getattr(config, "quantization_config", None) and not gguf):
        raise ModelError(f"{source} is quantised already; convert the original checkpoint")
    if (folder / ADAPTER).exists():
        raise ModelError(f"{source} holds an adapter beside its model; {MERGE}")
    return Origin(path.name if local else str(source), folder, config, gguf, trust_remote_code)


def _download(name: str) -> Path:
    """A hub model's files; pickles only where there is nothing better."""
    folder = Path(snapshot_download(name, allow_patterns=list(DOWNLOADED)))
    if not any(folder.glob("*.safetensors")):
        folder = Path(snapshot_download(name, allow_patterns=[*DOWNLOADED, "*.bin"]))
    return folder


class _Shards:
    """Safetensors files whose tensors are the model's, but for a prefix; read as they are asked for."""

    def __init__(self, shards: dict[str, Any], names: dict[str, str], sizes: dict[str, int]) -> None:
        self.shards = shards  # by stored name
        self.names = names  # model name -> stored name
        self.sizes = sizes

    @classmethod
    def open(cls, files: list[Path], model: PreTrainedModel, stack: ExitStack) -> "_Shards | None":
        """None where the files have other names or shapes than the model, which transformers then knows to convert."""
        shards: dict[str, Any] = {}
        for file in files:
            if file.suffix != ".safetensors":
                return None
            opened = stack.enter_context(safe_open(file, "pt"))
            shards |= dict.fromkeys(opened.keys(), opened)
        shapes = {name: tuple(shard.get_slice(name).get_shape()) for name, shard in shards.items()}
        names = _names(model, shapes)
        if names is None:
            return None
        found = cls(shards, names, {name: _bytes(shards[stored], stored) for name, stored in names.items()})
        found.check_tied(model)
        return found

    def get(self, name: str) -> torch.Tensor:
        stored = self.names[name]
        tensor: torch.Tensor = self.shards[stored].get_tensor(stored)
        return tensor

    def check_tied(self, model: PreTrainedModel) -> None:
        """Raises ModelError where two weights that the configuration calls one are two."""
        for name, other in tied_weights(model).items():
            if {name, other} <= self.shards.keys():
                one, two = (self.shards[key].get_tensor(key) for key in (name, other))
                if not torch.equal(one, two):
                    raise ModelError(
                        f"config.json ties {name} to {other}, but they differ; set tie_word_embeddings to false in it"
                    )


class _Loaded:
    """What transformers loaded: the whole model in memory."""

    def __init__(self, loaded: PreTrainedModel, model: PreTrainedModel) -> None:
        self.state = loaded.state_dict()
        self.sizes = {name: self.state[name].nbytes for name, _ in model.named_parameters()}

    def get(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self.state[name]
        return tensor


def _names(model: PreTrainedModel, shapes: dict[str, tuple[int, ...]]) -> dict[str, str] | None:
    """The stored name of each of the model's tensors; None unless all parameters are there in their shapes."""
    tied = tied_weights(model)
    twins = {other: name for name, other in tied.items()}
    names: dict[str, str] = {}
    for name, parameter in model.named_parameters():
        prefix = f"{model.base_model_prefix}."
        spellings = [name, name.removeprefix(prefix), prefix + name, twins.get(name, name)]
        stored = next((s for s in spellings if shapes.get(s) == tuple(parameter.shape)), None)
        if stored is None:
            return None
        names[name] = stored
    buffers = model.state_dict().keys() - names.keys()
    return names | {name: name for name in sorted(buffers) if name in shapes and name not in tied}


def _bytes(shard: Any, name: str) -> int:
    view = shard.get_slice(name)
    width = int("".join(filter(str.isdigit, view.get_dtype().split("_")[0])) or 8) // 8
    count = 1
    for size in view.get_shape():
        count *= size
    return count * max(1, width)
