"""What an operator decides about a server; checked when it is built.

Plain data. Knows nothing of the web or of models.
"""

from dataclasses import dataclass, field
from pathlib import Path

from foredraft.errors import RequestError

MIB, GIB = 2**20, 2**30
UNITS = {"": 1, "K": 2**10, "M": MIB, "G": GIB, "T": 2**40}


@dataclass(frozen=True, slots=True)
class Limits:
    """The most that one client, or all together, may take. Seconds and bytes."""

    max_queue: int = 64  # requests that wait for a model beside those that run
    request_timeout: float = 600.0
    shutdown_timeout: float = 30.0
    drain_timeout: float = 60.0
    body_timeout: float = 30.0
    max_body: int = 4 * MIB
    max_output_tokens: int | None = None
    max_choices: int = 16  # prompts times n of one request
    max_stop: int = 16
    max_logit_bias: int = 1024
    stream_interval: float = 0.02  # between the beats on which streams speak; a first and a last word go at once

    def __post_init__(self) -> None:
        for name in ("request_timeout", "shutdown_timeout", "drain_timeout", "body_timeout"):
            if not 0 < getattr(self, name) <= 86400:
                raise RequestError(f"{name}={getattr(self, name)!r} is not usable; give seconds, up to 86400")
        if not 0 <= self.stream_interval <= 10:
            raise RequestError(f"stream_interval={self.stream_interval!r} is not usable; give seconds, 0 to 10")
        for name, least in (("max_queue", 0), ("max_body", 1024), ("max_choices", 1), ("max_output_tokens", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise RequestError(f"{name}={value!r} is not usable; it must be {least} or more")


@dataclass(frozen=True, slots=True)
class Settings:
    """A server's rules.

    Args:
        limits: see there.
        key_file: a file of API keys, read again when it changes; `keys` are fixed ones. None at all: no keys asked.
        allowed_hosts: what the Host header may say; empty allows any. Keeps other sites' pages out of a local server.
        cors_origins: pages of these origins may call; none by default.
        allowed_folders: models below these may be launched by path.
        allow_hub: models may be launched by hub name.
        registry: names and sizes of models, beside those built in.
        memory_budget: bytes that all models may take; None is what the machine has.
        playground: serve the page at /.
    """

    limits: Limits = field(default_factory=Limits)
    key_file: Path | None = None
    keys: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    allowed_folders: tuple[Path, ...] = ()
    allow_hub: bool = False
    registry: Path | None = None
    memory_budget: int | None = None
    playground: bool = True


def parse_bytes(text: str) -> int:
    """`8GiB`, `512M`, `1000000` as bytes.

    Raises:
        RequestError: it is no size.
    """
    digits = text.strip().upper().removesuffix("B").removesuffix("I")
    unit = digits[-1:] if digits[-1:] in UNITS else ""
    try:
        size = float(digits.removesuffix(unit)) * UNITS[unit]
    except ValueError:
        size = 0
    if not 0 < size < 2**63:
        raise RequestError(f"{text!r} is no size; write it as 512M, 8GiB or in bytes")
    return int(size)


def show_bytes(size: float) -> str:
    """A size in the unit that suits it: `3.10 GiB`."""
    name, unit = next(((n, u) for n, u in (("GiB", GIB), ("MiB", MIB), ("KiB", 2**10)) if abs(size) >= u), ("bytes", 1))
    return f"{size / unit:.2f} {name}" if unit > 1 else f"{size:.0f} {name}"
