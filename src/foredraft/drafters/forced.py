"""Forced tokens: what a grammar leaves no choice about is guessed for nothing, before any other drafter goes on.

They are a draft like any other, verified like any other: the text could be spelled in other tokens, and whether the
target spells it so is for the target to say.
"""

from foredraft.drafters.base import Drafter
from foredraft.errors import GrammarError
from foredraft.policy import DraftPolicy
from foredraft.types import Draft, Request, Verdict

NAME = "forced"


def lead(request: Request, room: int) -> tuple[int, ...]:
    """The tokens with which every draft of this step begins."""
    constraint = request.steering.constraint
    if constraint is None:
        return ()
    asked = request.num_draft_tokens
    try:
        return constraint.forced(room if asked is None else min(room, asked))
    except GrammarError:  # an error only if the text gets there
        return ()


def propose(drafter: Drafter, requests: list[Request], policy: DraftPolicy) -> list[Draft]:
    """The drafter's proposals, each cut where its request's grammar would refuse it, or else the forced tokens."""
    drafts = drafter.propose(requests, policy)
    return [_under_grammar(request, draft) for request, draft in zip(requests, drafts, strict=True)]


def _under_grammar(request: Request, draft: Draft) -> Draft:
    constraint, forced = request.steering.constraint, request.lead
    if constraint is None:
        return draft
    if forced and not _begins_with(draft, forced):
        return Draft(forced, NAME, confidences=(1.0,) * len(forced))
    if draft.probs is not None or not draft.is_chain:  # drawn from a masked distribution, and not to be chosen among
        return draft
    try:
        kept = constraint.allowed(draft.tokens)
    except GrammarError:
        kept = 0
    if kept == len(draft):
        return draft
    return Draft(draft.tokens[:kept], draft.source, confidences=draft.confidences[:kept])


def _begins_with(draft: Draft, forced: tuple[int, ...]) -> bool:
    """Whether a draft begins with these tokens, and could not have begun otherwise.

    Keeping those that happened to be drawn so would favour them: what is drawn is verified by what it is drawn from.
    """
    if draft.tokens[: len(forced)] != forced:
        return False
    return draft.probs is None or all(float(row[token]) == 1 for row, token in zip(draft.probs, forced, strict=False))


def count(request: Request, draft: Draft, tested: int, accepted: int) -> None:
    """Note who guessed the tokens that were verified, one or more: first the forced ones, then the drafter's own."""
    given = min(len(request.lead), tested)
    parts = [(draft.source.removeprefix(f"{NAME}+"), tested - given, max(0, accepted - given))]
    if given:
        parts.append((NAME, given, min(given, accepted)))
    for source, drafted, right in parts:
        if drafted:
            counters = request.stats.source(source)
            counters.drafts += 1
            counters.drafted += drafted
            counters.accepted += right


def beyond(request: Request, draft: Draft, verdict: Verdict) -> tuple[Draft, Verdict]:
    """What came after the forced tokens, and what became of it: what a policy may learn from."""
    given = len(request.lead)
    if not given:
        return draft, verdict
    if len(verdict.accepted) < given:
        return Draft(source=draft.source), Verdict((), verdict.next_token, "bonus")
    rest = Draft(draft.tokens[given:], draft.source, confidences=draft.confidences[given:])
    return rest, Verdict(tuple(i - given for i in verdict.accepted[given:]), verdict.next_token, verdict.kind)
