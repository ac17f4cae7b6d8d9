"""Self-drafting: the target's own weights, in fewer bits, without some sub-layers, or both, over the target's cache.

No prompt has to be computed for drafting: the target has already written the keys and values of every committed token
but the newest, in the same slot and at the same positions. What a draft writes there, verification overwrites in every
layer before the target reads it. A skipped attention layer neither writes nor reads anything while drafting.
"""

from dataclasses import replace
from pathlib import Path

from foredraft import profile
from foredraft.drafters.model import ModelDrafter
from foredraft.errors import ModelError
from foredraft.models.base import NO_SKIP, Cache, CausalModel, SkipSet, unchanged
from foredraft.models.rows import Span
from foredraft.types import Request
from foredraft.weights.quantize import Quantizer, WeightFormat


class SelfDrafter(ModelDrafter):
    """Drafts with a variant of the target, which shares its cache."""

    def __init__(
        self, target: CausalModel, name: str, weight_format: WeightFormat | None = None, skip: SkipSet = NO_SKIP
    ) -> None:
        quantizer = None if weight_format is None else Quantizer(weight_format)
        draft = target.variant(quantizer or unchanged, skip)
        draft.row_invariance = replace(target.row_invariance, min_rows=1, row_multiple=1)
        super().__init__(draft, target.vocab_size, name)
        self.skip = skip
        self.added_bytes = 0 if quantizer is None else quantizer.nbytes

    @property
    def weight_bytes(self) -> int:
        return self.added_bytes

    @property
    def cache_bytes(self) -> int:
        return 0

    @property
    def caches(self) -> list[Cache]:
        return []

    def _catch_up(self, request: Request) -> Span:
        return Span(request.slot, request.cached, [*request.token_ids[request.cached :], *request.lead])

    def _hold(self, request: Request, token: int) -> None:
        pass

    def _wipe(self, request: Request) -> None:
        """Nothing to do: verification overwrites all that a draft wrote."""


def skip_set(target: CausalModel, path: str | Path | None = None, *, force: bool = False) -> SkipSet:
    """The set of the profile at `path`, or of the one that is kept for this model.

    Raises:
        ModelError: there is none, or it was found for another model (`force`: only if it cannot fit).
    """
    found = profile.find(target) if path is None else profile.load(path)
    if found is None:
        raise ModelError(
            f"no skip profile is known for this {target.config.model_type} model (hash {profile.model_hash(target)}); "
            "run foredraft tune to find one, name one with draft_profile=PATH, or use draft='int4'"
        )
    found.check(target, force=force)
    return found.skip
