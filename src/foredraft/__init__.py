"""foredraft: the same tokens, sooner. Speculative decoding for Hugging Face causal language models, kept exact."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foredraft.integrations.transformers import accelerate
    from foredraft.llm import LLM
    from foredraft.results import Chunk, GenerationResult
    from foredraft.stats import SpecStats
    from foredraft.types import Draft, Request, SamplingParams, Verdict
    from foredraft.weights.convert import convert

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "Chunk",
    "Draft",
    "GenerationResult",
    "Request",
    "SamplingParams",
    "SpecStats",
    "Verdict",
    "__version__",
    "accelerate",
    "convert",
]

_HOMES = {
    "accelerate": "integrations.transformers",
    "convert": "weights.convert",
    "LLM": "llm",
    "Chunk": "results",
    "GenerationResult": "results",
    "SpecStats": "stats",
    "Draft": "types",
    "SamplingParams": "types",
    "Request": "types",
    "Verdict": "types",
}


def __getattr__(name: str) -> Any:
    """Import torch and transformers only when something of ours is first used: `foredraft --help` stays instant."""
    if name not in _HOMES:
        raise AttributeError(f"module 'foredraft' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"foredraft.{_HOMES[name]}"), name)
