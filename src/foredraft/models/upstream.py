"""What we need of transformers and torch beyond their public interfaces, each behind a function that says why.

Their next release changes names like these without notice; this is the file to mend then.
"""

import inspect

from torch import nn

CACHE_ARGUMENTS = ("cache", "past_key_values")  # transformers renamed it in 5.24


def cache_argument(model: nn.Module) -> str | None:
    """The name under which the model's forward takes a cache; None where it takes none."""
    parameters = inspect.signature(model.forward).parameters
    return next((name for name in CACHE_ARGUMENTS if name in parameters), None)
