"""Every error foredraft raises on purpose, so that a caller can catch as widely or as narrowly as they like.

ForedraftError
├── ModelError                 a checkpoint cannot be loaded or cannot serve as it is
│   ├── UnsupportedModelError  the architecture's state cannot be rewound, or it is no causal language model
│   └── VocabularyMismatchError  draft and target do not share their tokens
├── RequestError               a prompt or a sampling parameter is not usable (also a ValueError)
│   └── PromptTooLongError     the prompt leaves no room in the context
├── ExactnessError             an option was asked for that cannot be kept exact
├── NumericsError              the target produced NaN or infinite logits
└── CacheMemoryError           keys and values do not fit the device (also a MemoryError)

A message says what is wrong, the value, and what to do about it.
"""


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


class ExactnessError(ForedraftError):
    """What was asked for cannot be kept exact."""


class NumericsError(ForedraftError):
    """The target produced logits that are not numbers."""


class CacheMemoryError(ForedraftError, MemoryError):
    """The cache could not be allocated."""
