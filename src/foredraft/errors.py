"""Every error foredraft raises on purpose, so that a caller can catch as widely or as narrowly as they like.

ForedraftError
├── ModelError                 a checkpoint cannot be loaded or cannot serve as it is
│   ├── UnsupportedModelError  the architecture's state cannot be rewound, or it is no causal language model
│   └── VocabularyMismatchError  draft and target do not share their tokens
├── RequestError               a prompt or a sampling parameter is not usable (also a ValueError)
│   ├── PromptTooLongError     the prompt leaves no room in the context
│   └── GrammarError           the form asked of the output cannot be compiled or followed
│       └── LateError          compiling it takes too long
├── ExactnessError             an option was asked for that cannot be kept exact
├── NumericsError              the target produced NaN or infinite logits
├── CacheMemoryError           keys and values do not fit the device (also a MemoryError)
├── GenerationError            some of many requests failed; has the results of the others
├── StoppedError               a request ended because what drove it was stopped or interrupted
└── ServerError                a server refuses a call, fails in it, or does not answer

ExactnessWarning               a loaded model whose passes do not agree bit for bit
SchemaWarning                  a JSON schema with keywords that mean nothing

A message says what is wrong, the value, and what to do about it.
"""

from collections.abc import Sequence
from typing import Any


def missing_extra(what: str, package: str, extra: str) -> str:
    """The message where a package of an extra is not installed; pip adds it to the foredraft that runs."""
    return f"{what} {package}, which is not installed; run: pip install 'foredraft[{extra}]'"


class ForedraftError(Exception):
    """Base class of all errors raised on purpose."""


class ModelError(ForedraftError):
    """A checkpoint cannot be loaded, or cannot serve in the role it was given."""


class UnsupportedModelError(ModelError):
    """The model is not causal, or its state cannot be rewound after a rejected draft."""


class VocabularyMismatchError(ModelError):
    """The draft model's tokens are not the target's tokens."""


class RequestError(ForedraftError, ValueError):
    """A prompt or a parameter of a request cannot be used."""


class PromptTooLongError(RequestError):
    """The prompt leaves no room for output in the model's context."""


class GrammarError(RequestError):
    """A schema, pattern or grammar cannot be compiled, or the output cannot follow it."""


class LateError(GrammarError):
    """A schema, pattern or grammar takes too long to compile."""


class ExactnessError(ForedraftError):
    """What was asked for cannot be kept exact."""


class NumericsError(ForedraftError):
    """The target produced logits that are not numbers."""


class MaskedError(NumericsError):
    """Biases, processors or a form leave no token at a place."""


class CacheMemoryError(ForedraftError, MemoryError):
    """The cache could not be allocated."""


class GenerationError(ForedraftError):
    """Some of the requests of one call failed; `results` has all of them in the order asked for, these with `error`."""

    def __init__(self, message: str, results: Sequence[Any]) -> None:
        super().__init__(message)
        self.results = list(results)


class StoppedError(ForedraftError):
    """What drove the request was stopped, or interrupted in a step that it took part in."""


class ExactnessWarning(UserWarning):
    """The model's logits depend on what else is in a pass, so that drafting may change its tokens."""


class SchemaWarning(UserWarning):
    """A JSON schema has keywords that JSON schema does not know, such as mistyped ones: they are ignored."""


class ServerError(ForedraftError):
    """What a server answered instead of a result; `status` is HTTP's, 0 where none came."""

    def __init__(self, message: str, status: int, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
