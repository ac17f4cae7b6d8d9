"""What ran where, for a report or a certificate: nothing in it names the machine, its user or a path."""

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version

import torch

from foredraft.diagnosis import machine
from foredraft.llm import LLM

PACKAGES = ("foredraft", "torch", "transformers")


@dataclass(frozen=True, slots=True)
class Setting:
    """A target, and what it runs on."""

    model: str
    dtype: str
    device: str
    runtime: str
    processor: str
    threads: int
    system: str
    versions: Mapping[str, str]


def setting(llm: LLM, name: str) -> Setting:
    """`name` is what the report calls the target."""
    model, about = llm.model, machine.look()
    return Setting(
        name,
        str(model.dtype).removeprefix("torch."),
        torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else model.device.type,
        getattr(model, "runtime", "torch"),
        about.processor,
        torch.get_num_threads(),
        about.system,
        {package: version(package) for package in PACKAGES} | {"python": platform.python_version()},
    )
