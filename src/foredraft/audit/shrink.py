"""The smallest case that still fails: fewer requests beside it, a shorter prompt, a shorter output, a shorter draft."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from foredraft.audit.asks import Ask
from foredraft.audit.exact import Case, Difference, first_difference
from foredraft.audit.play import PLAIN, Subject, play
from foredraft.audit.recorded import Drafted
from foredraft.drafters.several import without_memory
from foredraft.llm import LLM

TRIES = 60


def replay(llm: LLM, subject: Subject, case: Case) -> Difference | None:
    """Run one case as a new process would, and its request alone without drafts."""
    (truth,) = play(llm, PLAIN, [case.ask.alone()], 1)
    with _anew(llm, subject):
        if case.warm:
            play(llm, subject, [replace(ask.alone(), memory=ask.memory) for ask in case.asks], 1)
        outcome = play(llm, subject, case.asks, case.batch)[case.index]
    return first_difference(truth, outcome, case)


@contextmanager
def _anew(llm: LLM, subject: Subject) -> Iterator[None]:
    """Nothing is kept of earlier texts, neither what they said nor what was computed of them."""
    for cache in (llm.model.cache, *getattr(subject.drafter, "caches", ())):
        cache.release()
    with without_memory(subject.drafter, anew=True):
        yield


def smallest(llm: LLM, subject: Subject, found: Difference) -> Difference | None:
    """Make the case smaller, step by step, as long as it fails. None where it does not fail again at all.

    What comes back has failed twice, with the same drafts.
    """
    cases = (replace(found.case, warm=warm) for warm in (False, True))
    first = next(filter(None, (replay(llm, subject, case) for case in cases)), None)
    if first is None:
        return None
    best, tries = first, 0
    smaller = _smaller(best)
    while tries < TRIES:
        case = next(smaller, None)
        if case is None:
            break
        tries += 1
        again = replay(llm, subject, case)
        if again is not None:
            best, smaller = again, _smaller(again)
    return replay(llm, subject, best.case) or replay(llm, subject, first.case)


def _smaller(found: Difference) -> Iterator[Case]:
    """Cases that are smaller than this one, the smallest first."""
    case = found.case
    if len(case.asks) > 1:
        yield Case((replace(case.ask, arrives=0),), 1, 0, case.warm)
    if case.warm:
        yield replace(case, warm=False)
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
    return Case(asks, min(case.batch, len(asks)), kept.index(case.index), case.warm)


def _shorter(ask: Ask, position: int) -> Iterator[Ask]:
    longest = max((it.length for it in ask.drafts), default=ask.num_draft_tokens or 0)
    for most in (position + 1, position + longest + 2):  # a draft is never longer than what is left of the output
        if ask.params.max_new_tokens > most:
            yield replace(ask, params=replace(ask.params, max_new_tokens=most))
    if len(ask.prompt) > 1:
        yield replace(ask, prompt=ask.prompt[len(ask.prompt) // 2 :])
    if ask.drafts:
        yield from (replace(ask, drafts=drafts) for drafts in _fewer_drafts(ask.drafts))
    elif ask.num_draft_tokens is None or ask.num_draft_tokens > 1:
        yield replace(ask, num_draft_tokens=1)


def _fewer_drafts(drafts: tuple[Drafted, ...]) -> Iterator[tuple[Drafted, ...]]:
    """Drafts of one token; half of the passes without any; only the passes that matter at the end."""
    if longest := max(it.length for it in drafts):
        if longest > 1:
            yield tuple(it._replace(length=min(it.length, 1)) for it in drafts)
        drafted = [i for i, it in enumerate(drafts) if it.length]
        half = len(drafted) // 2
        for gone in (drafted[:half], drafted[half:]) if half else ():
            yield tuple(it._replace(length=0) if i in gone else it for i, it in enumerate(drafts))
        if drafted[-1] + 1 < len(drafts):
            yield drafts[: drafted[-1] + 1]


def _with(case: Case, ask: Ask) -> Case:
    return replace(case, asks=(*case.asks[: case.index], ask, *case.asks[case.index + 1 :]))
