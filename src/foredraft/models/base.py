"""CausalModel: what the engine and the drafters need of a model, and nothing more."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, Self, runtime_checkable

import torch
from transformers import GenerationConfig, PreTrainedConfig

from foredraft.errors import ModelError
from foredraft.models.rows import RowBatch, RowInvariance, Span
from foredraft.native.choosing import Sampler
from foredraft.policy import StopRule

Convert = Callable[[Any], Any]
"""From a linear layer of any format to one that takes its place."""


@dataclass(frozen=True, slots=True)
class SkipSet:
    """Layers whose attention, and layers whose MLP, add nothing to the residual stream."""

    attention: tuple[int, ...] = ()
    mlp: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "attention", tuple(sorted(set(self.attention))))
        object.__setattr__(self, "mlp", tuple(sorted(set(self.mlp))))

    def __len__(self) -> int:
        return len(self.attention) + len(self.mlp)

    def check(self, num_layers: int) -> None:
        """Raises ModelError where the set names a layer that is not there, or leaves none of them anything to do."""
        outside = [i for i in (*self.attention, *self.mlp) if not 0 <= i < num_layers]
        if outside:
            raise ModelError(
                f"the skip set names layer {outside[0]}, and the model has layers 0 to {num_layers - 1}; use a set "
                "that was found for this model"
            )
        if len(self) == 2 * num_layers:
            raise ModelError(f"the skip set skips all {len(self)} sub-layers; leave at least one in")


NO_SKIP = SkipSet()


def unchanged(layer: Any) -> Any:
    return layer


class Cache(Protocol):
    """Keys and values of many texts, a slot each, written at positions; to rewind is to remember a shorter length."""

    max_slots: int
    max_length: int
    page: int  # tokens of which texts that begin alike may share memory; 0: they do not
    sharing: bool  # whether they shall
    key_multiple: int  # of the keys that a pass attends to

    @property
    def nbytes(self) -> int:
        """What running texts hold, and what is spare."""
        ...

    @property
    def kept_bytes(self) -> int:
        """What is kept of ended texts, beside that."""
        ...

    @property
    def bytes_per_token(self) -> int: ...

    @property
    def storage(self) -> list[torch.Tensor]:
        """All that is held, the same tensors until it grows."""
        ...

    def need(self, lengths: Sequence[int], slots: int = 0) -> int:
        """Bytes that texts of these lengths take together at most, in so many slots or one for each."""
        ...

    def reserve(self, slots: int, length: int) -> None:
        """Make room for `length` tokens in each of the first `slots` slots. Raises CacheMemoryError."""
        ...

    def shrink(self) -> None:
        """Give back what ended texts have left beside what running ones need."""
        ...

    def keep(self, nbytes: int) -> None:
        """Keep at most so many bytes of ended texts, from here on."""
        ...

    def adopt(self, slot: int, tokens: Sequence[int], name: str | None) -> int:
        """Take what others of this name have computed of a text's first tokens; returns how many tokens are shared."""
        ...

    def publish(self, slot: int, tokens: Sequence[int], length: int, name: str | None) -> None:
        """A slot holds the first `length` of its text's tokens: others of this name may take them. None: nobody."""
        ...

    def free(self, slot: int) -> None:
        """A slot's text has ended."""
        ...

    def clear(self, slot: int, start: int = 0) -> None:
        """Zero a slot from a position on; needed only after it held values that are not finite."""
        ...

    def release(self) -> None:
        """Give all memory back; what was cached is gone."""
        ...


class Guessing(NamedTuple):
    """How a text is to be guessed on from: see `Chains`."""

    sampler: Sampler
    seed: int  # of the noise, 64 bits: `noise.fold` of the request's and of the stream
    limit: int  # guesses at most


@runtime_checkable
class Chains(Protocol):
    """A model that guesses whole chains in one call."""

    def chain(
        self, spans: list[Span], guessing: list[Guessing], rule: StopRule, vocab_size: int
    ) -> list[tuple[list[int], list[float]]]:
        """Compute the spans, guess a token after each, compute it, and so on until its limit or the rule ends it.

        Returns tokens below `vocab_size` and the confidence in each, a list of each a span. A last confidence that is
        NaN says that the logits were no numbers; its token means nothing.
        """
        ...


class CausalModel(Protocol):
    """A causal language model with a cache that is written at positions. It may have `Chains`' method too."""

    config: PreTrainedConfig
    generation_config: GenerationConfig | None
    row_invariance: RowInvariance
    device: torch.device
    dtype: torch.dtype
    vocab_size: int
    max_positions: int
    num_layers: int

    @property
    def cache(self) -> Cache: ...

    @property
    def weight_bytes(self) -> int: ...

    def forward(self, rows: RowBatch) -> torch.Tensor:
        """Write the rows' keys and values into the cache; return logits [R, V] of the wanted rows."""
        ...

    def variant(self, convert: Convert = unchanged, skip: SkipSet = NO_SKIP) -> Self:
        """A draft of this model: over the same cache and weights, its linear layers converted, sub-layers left out.

        Raises:
            ModelError: the set does not fit this model, or its sub-layers cannot be left out.
        """
        ...

    def weight_sample(self) -> list[torch.Tensor]:
        """A few whole weights, early and late ones, that tell this model from its fine-tunes."""
        ...
