"""Drafter: the interface of everything that guesses tokens ahead.

A drafter may be wrong: that changes how many tokens a pass yields, never which.
"""

from typing import Protocol, runtime_checkable

from foredraft.errors import ExactnessError, VocabularyMismatchError
from foredraft.policy import DraftPolicy
from foredraft.types import Draft, Request, Verdict


@runtime_checkable
class Drafter(Protocol):
    """Proposes one draft for each request: at most `request.draft_limit` tokens, none if it has no guess.

    After each token it asks `policy.go_on` whether another one pays.
    """

    name: str

    def propose(self, requests: list[Request], policy: DraftPolicy) -> list[Draft]:
        """One draft for each request, in their order."""
        ...

    def observe(self, request: Request, verdict: Verdict) -> None:
        """What the target made of the draft that was asked for, if only of none; its tokens are committed.

        In steps that ask for none nothing is said: the text itself, `request.token_ids`, is always up to date.
        """
        ...

    def forget(self, request: Request) -> None:
        """The request has ended; drop what was kept for it."""
        ...


class NoDrafter:
    """Plain decoding: every draft is empty."""

    name = "none"

    def propose(self, requests: list[Request], policy: DraftPolicy) -> list[Draft]:
        return [Draft()] * len(requests)

    def observe(self, request: Request, verdict: Verdict) -> None:
        pass

    def forget(self, request: Request) -> None:
        pass


def check_draft(draft: Draft, limit: int, vocab_size: int) -> None:
    """Whether the target can verify this draft of at most `limit` tokens.

    Raises:
        ExactnessError: it is a tree, or too long.
        VocabularyMismatchError: the target has no such token.
    """
    if not draft.is_chain:
        raise ExactnessError(
            f"drafter {draft.source!r} proposed a tree (parents {draft.parents}); the engine verifies chains, as "
            "a branch's keys would lie elsewhere in the cache and change the bits: propose the likeliest path"
        )
    if len(draft) > limit:
        raise ExactnessError(
            f"drafter {draft.source!r} proposed {len(draft)} tokens where {limit} were allowed; "
            "stop at request.draft_limit"
        )
    outside = next((token for token in draft.tokens if not 0 <= token < vocab_size), None)
    if outside is not None:
        raise VocabularyMismatchError(
            f"drafter {draft.source!r} proposed token {outside}, outside the target's {vocab_size} tokens; "
            "draft in the target's tokens"
        )
