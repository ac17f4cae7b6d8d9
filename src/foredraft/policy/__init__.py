"""How far to draft, for each request in each step. Works with numbers alone, no tensors and no models.

A policy changes when tokens arrive, never which. `base` says what a policy is asked and told, `rules` has fixed rules,
`gain` the default for one drafter, `choice` that for several: by `plan`, from the `costs` of steps and what is known of
each drafter (`source`, `candidates`).
"""

from collections.abc import Callable

from foredraft.errors import RequestError
from foredraft.policy.base import DraftPolicy, StepTimes, StopRule
from foredraft.policy.choice import Choice
from foredraft.policy.gain import Gain
from foredraft.policy.rules import DEFAULT_NUM_DRAFT_TOKENS, Fixed, Heuristic, Threshold
from foredraft.types import Draft, Request, Verdict

__all__ = [
    "DEFAULT_NUM_DRAFT_TOKENS",
    "POLICIES",
    "Choice",
    "DraftPolicy",
    "Fixed",
    "Gain",
    "Heuristic",
    "PerRequest",
    "StepTimes",
    "StopRule",
    "Threshold",
    "make_policy",
]


class PerRequest:
    """A request that asked for a draft length gets exactly that; a policy decides for all others."""

    def __init__(self, policy: DraftPolicy) -> None:
        self.policy = policy

    @property
    def rests(self) -> bool:
        """Whether nothing is drafted in this step but what requests ask for themselves."""
        return getattr(self.policy, "rests", False)

    def start(self, request: Request) -> int:
        return self.policy.start(request) if request.num_draft_tokens is None else request.num_draft_tokens

    def go_on(self, request: Request, confidences: tuple[float, ...]) -> bool:
        return request.num_draft_tokens is not None or self.policy.go_on(request, confidences)

    def rule(self, requests: list[Request], most: int) -> StopRule | None:
        """`go_on` in numbers, for chains of at most `most` tokens; None where only asking tells."""
        asking = [request for request in requests if request.num_draft_tokens is None]
        if not asking or type(self.policy).go_on is Fixed.go_on:
            return StopRule([None] * len(requests))
        rule = getattr(self.policy, "rule", None)
        found: StopRule | None = rule(asking, most) if rule else None
        if found is None or len(asking) == len(requests):
            return found
        own = iter(found.survivals)
        return found._replace(survivals=[next(own) if r.num_draft_tokens is None else None for r in requests])

    def observe(self, request: Request, draft: Draft, verdict: Verdict) -> None:
        if request.num_draft_tokens is None or isinstance(self.policy, Choice):  # it still has to know who is best
            self.policy.observe(request, draft, verdict)

    def observe_times(self, times: StepTimes) -> None:
        self.policy.observe_times(times)

    def rested(self, batch: int, seconds: float) -> bool:
        """A step of a rest in which nobody drafted and no prompt was read; False where the whole has to be told."""
        return self.policy.rested(batch, seconds)  # type: ignore[attr-defined, no-any-return]  # it has `rests`

    def forget(self, request: Request) -> None:
        self.policy.forget(request)


POLICIES: dict[str, Callable[[], DraftPolicy]] = {
    "gain": Gain,
    "fixed": Fixed,
    "heuristic": Heuristic,
    "threshold": Threshold,
}


def make_policy(policy: str | DraftPolicy | None, *, several: bool = False) -> DraftPolicy:
    """A policy by name, as given, or the default; `gain` among several drafters also chooses one.

    Raises:
        RequestError: no policy has that name.
    """
    if policy is None or policy == "gain":
        return Choice() if several else Gain()
    if not isinstance(policy, str):
        if not hasattr(policy, "observe_times"):
            raise RequestError(f"policy={policy!r} is not usable; pass a name, or a DraftPolicy")
        return policy
    if policy not in POLICIES:
        raise RequestError(f"policy={policy!r} is not known; use one of {', '.join(POLICIES)}")
    return POLICIES[policy]()
