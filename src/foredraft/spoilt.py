"""Texts whose logits were no numbers after a draft: computed once more without one, which tells what was to blame."""

import warnings

from foredraft.errors import MaskedError, NumericsError
from foredraft.models.base import Cache
from foredraft.types import Request, StepOutput


class Spoilt:
    """The requests whose next pass tells whether drafts spoilt the last one."""

    def __init__(self) -> None:
        self._requests: set[Request] = set()

    def again(self, request: Request, cache: Cache, error: NumericsError) -> StepOutput:
        """Compute the place again, alone, and draft no more for this text.

        A guess may have left NaN in the cache beyond the committed tokens, and there even a masked key counts: 0 times
        NaN is NaN.
        """
        cache.clear(request.slot, request.cached)
        request.may_draft = False
        if not isinstance(error, MaskedError):  # which is nobody's fault but the request's own
            self._requests.add(request)
        return StepOutput(request, (), (), None)

    def settle(self, request: Request, drafter: str) -> None:
        """The place has numbers; where that took a pass without drafts, a draft was the cause."""
        if request not in self._requests:
            return
        self._requests.discard(request)
        warnings.warn(
            f"a guess of drafter {drafter!r} made the target's logits no numbers after {len(request.token_ids)} "
            "tokens; this text goes on without drafts",
            RuntimeWarning,
            stacklevel=3,
        )

    def forget(self, request: Request) -> None:
        self._requests.discard(request)
