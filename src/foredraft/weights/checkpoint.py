"""What a user names as a model: a folder or a hub name, checked before anything is loaded, and errors in our words."""

from importlib.util import find_spec
from pathlib import Path

from huggingface_hub import HfApi, try_to_load_from_cache

from foredraft.errors import ModelError, RequestError, UnsupportedModelError

TOKENIZERS = ("*token*", "vocab*", "merges*", "*.model", "*.bpe", "*.tiktoken", "tekken.json")  # names of their files
ADAPTER = "adapter_config.json"
MERGE = "merge it (peft's merge_and_unload), and give the folder where the merged model is saved"
LONGEST = 255  # characters that a hub name, or a name in a path, may have


def looks_like_path(source: str | Path) -> bool:
    text = str(source)
    if isinstance(source, Path) or text.startswith((".", "/", "~")) or text.count("/") > 1:
        return True
    return len(text) <= LONGEST and "\0" not in text and Path(text).exists()


def has_tokenizer(source: str | Path) -> bool:
    """Whether a tokenizer is to be expected: of a hub name always, of a folder where it has files of one."""
    folder = Path(source).expanduser()
    return not looks_like_path(source) or any(any(folder.glob(pattern)) for pattern in TOKENIZERS)


def check_source(source: str | Path) -> None:
    """Raises ModelError for a path that is not a checkpoint folder."""
    if not str(source).strip():
        raise RequestError(f"the model {source!r} is empty; give a folder or a hub name")
    text = str(source)
    if max(map(len, text.split("/"))) > LONGEST or "\0" in text:
        raise ModelError(f"{text[:40]!r}... ({len(text)} characters) is no model; give a folder or a hub name")
    if not looks_like_path(source):
        _check_hub(text)
        return
    path = Path(source).expanduser()
    if path.is_file():
        raise ModelError(f"{path} is a file; give the folder that holds it, with config.json and the weights")
    if not path.exists():
        raise ModelError(f"no model at {path}: the path does not exist; give a folder with config.json, or a hub name")
    adapter = (path / ADAPTER).exists()
    if adapter and not (path / "config.json").exists():
        raise ModelError(f"{path} holds an adapter without its model; {MERGE}")
    if adapter and find_spec("peft") is None:
        raise ModelError(f"{path} holds an adapter beside its model, which takes peft to load: install it, or {MERGE}")
    if path.is_dir() and not (path / "config.json").exists():
        raise ModelError(f"{path} has no config.json, so it is no model folder; give the folder of a checkpoint")


def _check_hub(name: str) -> None:
    """Raises ModelError where a name is no cached model and the hub does not have it, or does not answer."""
    try:
        if not isinstance(try_to_load_from_cache(name, "config.json"), str):
            HfApi().model_info(name, timeout=10)  # unlike a download, it does not try five times
    except Exception as error:  # of the hub's client, of its connection, of a name that cannot be one
        raise ModelError(
            f"{name} is no folder here, and the model hub does not give it ({first_line(error)}); check the name, the "
            "connection, or give the path of a folder"
        ) from error


def explained(source: str | Path, error: Exception) -> ModelError:
    """The error of a checkpoint that did not load, in our words."""
    text = first_line(error)
    if "Unrecognized configuration class" in str(error) or "Unrecognized model" in str(error):
        return UnsupportedModelError(f"{source} is not a causal language model transformers knows: {text}")
    if "no file named" in str(error):
        return ModelError(f"{source} has no weights ({text}); download or convert it again")
    if type(error).__name__ == "SafetensorError" or "safetensors" in str(error).lower():
        return ModelError(f"the weights of {source} are damaged ({text}); download or convert them again")
    return ModelError(f"{source} cannot be loaded: {text}")


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
