"""`foredraft launch`, `list` and `terminate`: the models of a running server."""

import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foredraft.cli.console import busy, interruptible, note, only_result, printing, write_result
from foredraft.cli.options import MODEL, DeviceFlag, JsonFlag, flag, takes
from foredraft.errors import RequestError, missing_extra

if TYPE_CHECKING:
    from foredraft.client import Client

SERVER = "Server"
DEFAULT_SERVER = "http://127.0.0.1:8000"


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """Which server."""

    server: Annotated[str, flag("--server", help="Address of a `foredraft serve`.", panel=SERVER)] = DEFAULT_SERVER
    api_key: Annotated[
        str | None, flag("--api-key", help="Where it asks for one. Default: FOREDRAFT_API_KEY.", panel=SERVER)
    ] = None


@dataclass(frozen=True, slots=True)
class LaunchOptions(ServerOptions):
    target: Annotated[
        str | None,
        typer.Argument(
            help="A name of the server's registry, or a path or hub name that it allows. Default: the bundled pair."
        ),
    ] = None
    size: Annotated[
        str | None, flag("--size", help="Billions of parameters; a name may have several.", panel=MODEL)
    ] = None
    draft: Annotated[
        str, flag("--draft", "--draft-model", help="A name, a path, ngram, int4, int8, skip, none, auto.", panel=MODEL)
    ] = "auto"
    draft_size: Annotated[str | None, flag("--draft-size", help="As --size, of the draft.", panel=MODEL)] = None
    uid: Annotated[str | None, flag("--uid", help="What clients will call it.", panel=MODEL)] = None
    quantization: Annotated[
        str | None, flag("--quantization", help="int4 or int8: round the target's weights.", panel=MODEL)
    ] = None
    draft_quantization: Annotated[
        str | None, flag("--draft-quantization", help="int4, int8 or none: of the draft model.", panel=MODEL)
    ] = None
    dtype: Annotated[str, flag("--dtype", help="fp32, bf16, fp16, or auto.", panel=MODEL)] = "auto"
    device: DeviceFlag = "auto"
    max_model_len: Annotated[int | None, flag("--max-model-len", help="Tokens in all.", panel=MODEL)] = None
    max_batch_size: Annotated[int | None, flag("--max-batch-size", help="Texts at once.", panel=MODEL)] = None
    cache_bytes: Annotated[str | None, flag("--cache-bytes", help="Of all its caches: 2GiB.", panel=MODEL)] = None


@dataclass(frozen=True, slots=True)
class ListOptions(ServerOptions):
    json: JsonFlag = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TerminateOptions(ServerOptions):
    uid: Annotated[str, typer.Argument(help="The model's uid, as `foredraft list` shows it.")]


@takes(LaunchOptions)
def launch(options: LaunchOptions) -> None:
    """Launch a model on a running server; print its uid once it is ready."""
    from foredraft.server.settings import parse_bytes

    interruptible()
    spec: dict[str, Any] = {
        "target": options.target,
        "size_in_billions": options.size,
        "draft": options.draft,
        "draft_size_in_billions": options.draft_size,
        "uid": options.uid,
        "quantization": options.quantization,
        "draft_quantization": options.draft_quantization,
        "dtype": options.dtype,
        "device": options.device,
        "max_model_len": options.max_model_len,
        "max_batch_size": options.max_batch_size,
        "cache_bytes": None if options.cache_bytes is None else parse_bytes(options.cache_bytes),
    }
    with connect(options) as client, busy(f"loading {options.target or 'the bundled pair'}"):
        model = client.launch({name: value for name, value in spec.items() if value is not None})
    print(model["id"])


@takes(ListOptions)
def list_models(options: ListOptions) -> None:
    """The models of a running server, and their states."""
    interruptible()
    with only_result() as stdout, connect(options) as client:
        models = client.list_models()
        if options.json:
            write_result(stdout, json.dumps(models))
            return
    show(list(models.values()))


@takes(TerminateOptions)
def terminate(options: TerminateOptions) -> None:
    """Let a model's requests finish, and free it."""
    interruptible()
    if not options.uid:
        raise RequestError("no uid; give one as `foredraft list` shows it")
    with connect(options) as client, busy(f"waiting for the requests of {options.uid}"):
        client.terminate_model(options.uid)
    note(f"{options.uid} is gone")


def connect(options: ServerOptions) -> "Client":
    """Raises RequestError where httpx is missing."""
    try:
        from foredraft.client import Client
    except ImportError as error:
        raise RequestError(missing_extra("this needs", str(error.name), "serve")) from None
    if not options.server.startswith(("http://", "https://")):
        raise RequestError(f"--server {options.server!r} is no address; write it as {DEFAULT_SERVER}")
    return Client(options.server, options.api_key or os.environ.get("FOREDRAFT_API_KEY"))


HEADINGS = ("uid", "state", "context", "batch", "dtype", "device", "memory")


def show(models: list[dict[str, Any]]) -> None:
    """A line for each model's figures, which fits 80 columns, and one for what may be longer."""
    rows = [HEADINGS, *map(_cells, models)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    with printing():
        print(lines[0])
        for line, model in zip(lines[1:], models, strict=True):
            print(f"{line}\n    {_about(model)}")


def _cells(model: dict[str, Any]) -> tuple[str, ...]:
    memory = sum((model["memory"] or {}).values()) or model["progress"]["bytes"]
    keys = ("id", "state", "max_model_len", "max_batch_size", "dtype", "device")
    return (*("-" if model[key] is None else str(model[key]) for key in keys), f"{memory / 2**20:,.0f} MiB")


def _about(model: dict[str, Any]) -> str:
    """What it is and who drafts, or why it failed. A client may have called it anything."""
    more = f"failed: {model['error']}" if model["error"] else f"draft: {model['draft']}" if model["draft"] else ""
    text = f"{model['model_name']}, {more}" if more else str(model["model_name"])
    return "".join(char if char.isprintable() else "\ufffd" for char in text)
