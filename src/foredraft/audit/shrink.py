"""The smallest case that still fails: fewer requests beside it, a shorter prompt, a shorter output, a shorter draft."""

from collections.abc import Iterator
from dataclasses import replace

from foredraft.audit.asks import Ask
from foredraft.audit.exact import Case, Difference, first_difference
from foredraft.audit.play import PLAIN, Subject, play
from foredraft.llm import LLM

TRIES = 60


def replay(llm: LLM, subject: Subject, case: Case) -> Difference | None:
    """Run one case, and its request alone without drafts."""
    (truth,) = play(llm, PLAIN, [case.ask.alone()], 1)
    outcome = play(llm, subject, case.asks, case.batch)[case.index]
    return first_difference(truth, outcome, case)


def smallest(llm: LLM, subject: Subject, found: Difference) -> Difference:
    """Make the case smaller, step by step, as long as it fails. Its own if it does not fail again."""
    best, tries = found, 0
    smaller = _smaller(best)
    while tries < TRIES:
        case = next(smaller, None)
        if case is None:
            break
        tries += 1
        again = replay(llm, subject, case)
        if again is not None:
            best, smaller = again, _smaller(again)
    return best


def _smaller(found: Difference) -> Iterator[Case]:
    """Cases that are smaller than this one, the smallest first."""
    case = found.case
    if len(case.asks) > 1:
        yield Case((replace(case.ask, arrives=0),), 1, 0)
    yield from (_only(case, kept) for kept in _fewer(len(case.asks), case.index))
    yield from (_with(case, ask) for ask in _shorter(case.ask, found.position))


def _fewer(count: int, index: int) -> Iterator[list[int]]:
    """Which of so many requests to keep, this one always: half of them, then all but one of a few."""
    half = count // 2
    for kept in ([*range(half)], [*range(half, count)]):
        if len({*kept, index}) < count:
            yield sorted({*kept, index})
    if count <= 8:
        yield from ([i for i in range(count) if i != gone] for gone in range(count) if gone != index)


def _only(case: Case, kept: list[int]) -> Case:
    asks = tuple(case.asks[i] for i in kept)
    return Case(asks, min(case.batch, len(asks)), kept.index(case.index))


def _shorter(ask: Ask, position: int) -> Iterator[Ask]:
    if ask.params.max_new_tokens > position + 1:
        yield replace(ask, params=replace(ask.params, max_new_tokens=position + 1))
    if len(ask.prompt) > 1:
        yield replace(ask, prompt=ask.prompt[len(ask.prompt) // 2 :])
    if ask.num_draft_tokens is None or ask.num_draft_tokens > 1:
        yield replace(ask, num_draft_tokens=1)


def _with(case: Case, ask: Ask) -> Case:
    return Case((*case.asks[: case.index], ask, *case.asks[case.index + 1 :]), case.batch, case.index)
