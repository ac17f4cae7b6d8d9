"""`foredraft serve`: an OpenAI-compatible server."""

import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_type_hints

from foredraft.cli.console import busy, note
from foredraft.cli.options import (
    DRAFTING,
    MODEL,
    ChatTemplateFlag,
    DeviceFlag,
    DraftWeightFormatFlag,
    RuntimeFlag,
    WeightFormatFlag,
    flag,
    takes,
)
from foredraft.drafters.registry import split
from foredraft.errors import RequestError, missing_extra
from foredraft.memory import memory

if TYPE_CHECKING:
    from foredraft.server.app import Launch
    from foredraft.server.settings import Limits, Settings

NETWORK, LIMITS, ACCESS = "Network", "Limits", "Access"
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """What is served, to whom, within which limits."""

    model: Annotated[
        str | None,
        flag("--model", help="A folder or a hub name. Default: the bundled pair.", panel=MODEL),
    ] = None
    draft: Annotated[
        str, flag("--draft", "--draft-model", help="Who drafts, as for `foredraft generate`; one.", panel=MODEL)
    ] = "auto"
    uid: Annotated[
        str | None, flag("--uid", help="What clients call the model. Default: the folder's name.", panel=MODEL)
    ] = None
    no_model: Annotated[bool, flag("--no-model", help="Start empty; clients launch models.", panel=MODEL)] = False
    dtype: Annotated[str, flag("--dtype", help="fp32, bf16, fp16, or auto.", panel=MODEL)] = "auto"
    weight_format: WeightFormatFlag = None
    runtime: RuntimeFlag = "auto"
    device: DeviceFlag = "auto"
    draft_device: Annotated[str | None, flag("--draft-device", help="The draft model's device.", panel=MODEL)] = None
    draft_weight_format: DraftWeightFormatFlag = None
    chat_template: ChatTemplateFlag = None
    trust_remote_code: Annotated[
        bool, flag("--trust-remote-code", help="Run Python code that comes with --model.", panel=MODEL)
    ] = False
    max_model_len: Annotated[
        int | None, flag("--max-model-len", help="Tokens of prompt and output. Default: the model's.", panel=MODEL)
    ] = None
    max_batch_size: Annotated[int, flag("--max-batch-size", help="Texts that run at once.", panel=MODEL)] = 8
    cache_bytes: Annotated[
        str | None,
        flag("--cache-bytes", help="Of all caches: 2GiB. Default: what a batch of longest texts takes.", panel=MODEL),
    ] = None
    no_prefix_cache: Annotated[
        bool, flag("--no-prefix-cache", help="Compute each prompt anew, whatever was computed before.", panel=MODEL)
    ] = False
    policy: Annotated[
        str | None, flag("--policy", help="How far to draft: gain, fixed, heuristic, threshold.", panel=DRAFTING)
    ] = None
    host: Annotated[str, flag("--host", help="Address to listen on; 0.0.0.0 for all.", panel=NETWORK)] = "127.0.0.1"
    port: Annotated[int, flag("--port", help="Port to listen on; 0 takes a free one.", panel=NETWORK)] = 8000
    allowed_host: Annotated[
        list[str] | None, flag("--allowed-host", help="A name that clients may use for this server.", panel=NETWORK)
    ] = None
    cors_origin: Annotated[
        list[str] | None, flag("--cors-origin", help="A site whose pages may call. Default: none.", panel=NETWORK)
    ] = None
    no_playground: Annotated[bool, flag("--no-playground", help="Serve no page at /.", panel=NETWORK)] = False
    api_key_file: Annotated[
        Path | None, flag("--api-key-file", help="A line for each key; see docs/serve.md.", panel=ACCESS)
    ] = None
    allow_folder: Annotated[
        list[Path] | None, flag("--allow-folder", help="Clients may launch models below it.", panel=ACCESS)
    ] = None
    allow_hub: Annotated[bool, flag("--allow-hub", help="Clients may launch models by hub name.", panel=ACCESS)] = False
    registry: Annotated[
        Path | None, flag("--registry", help="Names and sizes of models, TOML or JSON.", panel=ACCESS)
    ] = None
    memory_budget: Annotated[
        str | None, flag("--memory-budget", help="All models together: 8GiB, 512M. Default: 90 % of RAM.", panel=LIMITS)
    ] = None
    max_queue: Annotated[int, flag("--max-queue", help="Texts that wait; more get 429.", panel=LIMITS)] = 64
    max_output_tokens: Annotated[
        int | None, flag("--max-output-tokens", help="The most that a request may ask for.", panel=LIMITS)
    ] = None
    max_body: Annotated[str, flag("--max-body", help="Size of a request.", panel=LIMITS)] = "4M"
    request_timeout: Annotated[float, flag("--request-timeout", help="Seconds, queue included.", panel=LIMITS)] = 600.0
    shutdown_timeout: Annotated[
        float, flag("--shutdown-timeout", help="Seconds that requests may go on after SIGTERM.", panel=LIMITS)
    ] = 30.0
    stream_interval: Annotated[
        float,
        flag("--stream-interval", help="Seconds between the chunks of streams; 0: one each step.", panel=LIMITS),
    ] = 0.02
    log_level: Annotated[str, flag("--log-level", help="debug, info, warning, error.", panel=NETWORK)] = "info"


@takes(ServeOptions)
def serve(options: ServeOptions) -> None:
    """Serve models to OpenAI clients, with a playground at /. Keys in --api-key-file or FOREDRAFT_API_KEYS."""
    check_installed()
    with busy("importing torch and transformers"):
        from foredraft.server.app import create_app
        from foredraft.server.logs import configure
        from foredraft.server.process import listen
        from foredraft.server.process import serve as run
    if options.log_level not in ("debug", "info", "warning", "error"):
        raise RequestError(f"--log-level {options.log_level!r} is not known; use debug, info, warning or error")
    settings = read_settings(options)
    app = create_app(settings, launches=read_launches(options))
    sock = listen(options.host, options.port)
    warn_if_open(options.host, settings)
    configure(options.log_level)
    address = options.host if ":" not in options.host else f"[{options.host}]"
    run(app, sock, settings.limits, lambda: note(f"foredraft serves on http://{address}:{sock.getsockname()[1]}"))


def check_installed() -> None:
    """Raises RequestError where the extra is missing."""
    missing = [name for name in ("fastapi", "prometheus_client", "uvicorn") if find_spec(name) is None]
    if missing:
        raise RequestError(missing_extra("serving needs", missing[0], "serve"))


def read_settings(options: ServeOptions) -> "Settings":
    """Raises RequestError for values that are not usable."""
    from foredraft.server.settings import Settings

    keys = tuple(key for key in os.environ.get("FOREDRAFT_API_KEYS", "").split(",") if key.strip())
    hosts = tuple(name.lower() for name in options.allowed_host or ())
    if not hosts and options.host in LOOPBACK:
        hosts = ("127.0.0.1", "localhost", "[::1]")
    return Settings(
        limits=read_limits(options),
        key_file=options.api_key_file,
        keys=keys,
        allowed_hosts=hosts,
        cors_origins=tuple(options.cors_origin or ()),
        allowed_folders=tuple(map(_folder, options.allow_folder or ())),
        allow_hub=options.allow_hub,
        registry=options.registry,
        memory_budget=memory_budget(options.memory_budget),
        playground=not options.no_playground,
    )


def _folder(path: Path) -> Path:
    if not path.expanduser().is_dir():
        raise RequestError(f"--allow-folder {path} is no folder; give one that is there")
    return path


def _uid(name: str) -> str:
    from foredraft.server.fields import check_uid

    try:
        return check_uid(name)
    except ValueError as error:
        raise RequestError(f"--uid {error}") from error


def read_limits(options: ServeOptions) -> "Limits":
    from foredraft.server.settings import Limits, parse_bytes

    return Limits(
        max_queue=options.max_queue,
        request_timeout=options.request_timeout,
        shutdown_timeout=options.shutdown_timeout,
        max_body=parse_bytes(options.max_body),
        max_output_tokens=options.max_output_tokens,
        stream_interval=options.stream_interval,
    )


def read_launches(options: ServeOptions) -> "tuple[Launch, ...]":
    """What the operator wants from the start; no registry stands between them and their own disk."""
    from foredraft.assembly import DraftWishes, bundled_draft
    from foredraft.models.load import LoadOptions
    from foredraft.server.app import Launch
    from foredraft.server.launching import LaunchSpec, check_cache
    from foredraft.server.settings import parse_bytes
    from foredraft.text import read_template
    from foredraft.weights.checkpoint import check_source

    if options.no_model:
        _check_empty(options)
        return ()
    if options.model:
        check_source(options.model)
    if options.max_batch_size < 1:
        raise RequestError(f"--max-batch-size {options.max_batch_size} is not usable; it must be 1 or more")
    if options.max_model_len is not None and options.max_model_len < 2:
        raise RequestError(f"--max-model-len {options.max_model_len} is not usable; it must be 2 or more")
    loading = LoadOptions(options.dtype, options.device, weight_format=options.weight_format, runtime=options.runtime)
    if not isinstance(split(options.draft), str):
        raise RequestError(f"--draft {options.draft} names several; a served model has one drafter, or auto")
    wishes = DraftWishes(
        options.draft,
        device=options.draft_device,
        policy=options.policy,
        weight_format=options.draft_weight_format,
    )
    wishes.options(loading)
    wishes.check(bundled_draft(options.model))
    cache_bytes = None if options.cache_bytes is None else parse_bytes(options.cache_bytes)
    check_cache(cache_bytes, options.model)
    name = Path(options.model).name if options.model else "bundled"
    spec = LaunchSpec(
        name,
        options.model,
        options.draft,
        options.dtype,
        options.device,
        draft_device=options.draft_device,
        draft_weight_format=options.draft_weight_format,
        policy=options.policy,
        max_model_len=options.max_model_len,
        max_batch_size=options.max_batch_size,
        weight_format=options.weight_format,
        runtime=options.runtime,
        trust_remote_code=options.trust_remote_code,
        chat_template=None if options.chat_template is None else read_template(options.chat_template),
        cache_bytes=cache_bytes,
        prefix_cache=not options.no_prefix_cache,
        draft_name=Path(options.draft).name,
    )
    return (Launch(spec, name if options.uid is None else _uid(options.uid)),)


def _check_empty(options: ServeOptions) -> None:
    """Raises RequestError where something is said of the model that is not to be there."""
    values = {name: getattr(options, name) for name in _of_the_model()}
    said = {name: value for name, value in values.items() if value != getattr(ServeOptions(), name)}
    if said:
        words = (f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}") for name, value in said.items())
        flags = ", ".join(words)
        raise RequestError(f"--no-model contradicts {flags}; leave one out: clients say it of the models they launch")


def _of_the_model() -> list[str]:
    """The flags that are listed with the model and its drafting, but for the one that there is none."""
    hints = get_type_hints(ServeOptions, include_extras=True)
    panels = {name: hint.__metadata__[0].rich_help_panel for name, hint in hints.items()}
    return [name for name, panel in panels.items() if panel in (MODEL, DRAFTING) and name != "no_model"]


def warn_if_open(host: str, settings: "Settings") -> None:
    if host not in LOOPBACK and not settings.keys and settings.key_file is None:
        note(f"foredraft: warning: {host} is reachable from other machines and no API key is asked; use --api-key-file")


def memory_budget(asked: str | None) -> int | None:
    """Bytes for all models together: by default most of RAM, and of GPUs, where weights go first."""
    import torch

    from foredraft.server.settings import parse_bytes

    if asked:
        return parse_bytes(asked)
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    total = memory().total
    return total and int(0.9 * (total + sum(torch.cuda.get_device_properties(i).total_memory for i in devices)))
