"""Tokens and logits of drafted requests against the same requests alone and without drafts, bit for bit."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import product, zip_longest

from foredraft.audit.asks import Ask, ordered
from foredraft.audit.options import AuditOptions
from foredraft.audit.play import PLAIN, Outcome, Subject, play
from foredraft.drafters.several import Several
from foredraft.llm import LLM

Reference = dict[int, Outcome]  # by seed
FAILING = 0.1  # of a setting's requests: as many may fail with and without drafts before that says nothing of it


@dataclass(frozen=True, slots=True)
class Case:
    """Requests that run beside each other, and which of them is looked at."""

    asks: tuple[Ask, ...]
    batch: int
    index: int
    warm: bool = False  # whether the same requests ran before, alone and without drafts: drafters and caches know them

    @property
    def ask(self) -> Ask:
        return self.asks[self.index]


@dataclass(frozen=True, slots=True)
class Difference:
    """Where a request first departs from plain decoding."""

    what: str  # tokens, logits, logprobs, end, steps, text, error, counts
    position: int  # in the output
    expected: str
    got: str
    case: Case


@dataclass(slots=True)
class Compared:
    """What was compared for one drafter, and what differed.

    A request that fails in the same way with and without drafts has nothing more to compare: it is counted apart.
    """

    runs: int = 0
    requests: int = 0
    tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    differences: list[Difference] = field(default_factory=list)
    asked: Counter[str] = field(default_factory=Counter)  # requests by setting
    failing: Counter[str] = field(default_factory=Counter)  # of these, those that fail either way
    error: str = ""  # the first of theirs

    @property
    def uncompared(self) -> int:
        return self.failing.total()

    @property
    def unproven(self) -> list[str]:
        """Settings too many of whose requests fail either way."""
        return [name for name, count in self.failing.items() if count > FAILING * self.asked[name]]


def reference(llm: LLM, asks: Sequence[Ask]) -> Reference:
    """Every request alone, without drafts."""
    return {ask.seed: play(llm, PLAIN, [ask.alone()], 1)[0] for ask in asks}


def compare(
    llm: LLM,
    subject: Subject,
    asks: Sequence[Ask],
    truth: Reference,
    options: AuditOptions,
    tick: Callable[[str], None] = lambda text: None,
) -> Compared:
    """Play the requests at every draft length, in every batch size and order."""
    found = Compared()
    for length, batch, order in grid(options, llm.model.row_invariance.max_draft_tokens):
        compare_run(llm, subject, ordered(asks, order, length, options.seed), batch, truth, found)
        tick(f"{'policy' if length is None else length} drafted, {batch} at once, {order}")
    return found


def grid(options: AuditOptions, most: int) -> list[tuple[int | None, int, str]]:
    """Draft length, batch size, order. One request at a time has no order, and wide passes may not be exact here."""
    lengths = [length for length in options.lengths if length is None or length <= most]
    return [
        (length, batch, order)
        for length, batch, order in product(lengths, options.batches, options.orders)
        if batch > 1 or order == options.orders[0]
    ]


def compare_run(llm: LLM, subject: Subject, asks: Sequence[Ask], batch: int, truth: Reference, found: Compared) -> None:
    outcomes = play(llm, subject, asks, batch)
    found.runs += 1
    played = _recorded(subject, asks, outcomes)
    for index, (ask, outcome) in enumerate(zip(asks, outcomes, strict=True)):
        found.requests += 1
        found.tokens += len(outcome.tokens)
        found.drafted += outcome.drafted
        found.accepted += outcome.accepted
        found.asked[ask.setting] += 1
        difference = first_difference(truth[ask.seed], outcome, Case(played, batch, index))
        if difference is not None:
            found.differences.append(difference)
        elif outcome.error:
            found.failing[ask.setting] += 1
            found.error = found.error or outcome.error


def _recorded(subject: Subject, asks: Sequence[Ask], outcomes: Sequence[Outcome]) -> tuple[Ask, ...]:
    """The requests with the drafts they got, wherever measured times decided how long these were or who drafted."""
    several = isinstance(subject.drafter, Several)
    pairs = zip(asks, outcomes, strict=True)
    return tuple(replace(a, drafts=o.drafts) if several or a.num_draft_tokens is None else a for a, o in pairs)


def first_difference(expected: Outcome, got: Outcome, case: Case) -> Difference | None:
    """None where all that there is agrees. One that left early has to agree as far as it came."""
    left = case.ask.leaves is not None and got.reason == "abort"
    if got.error != expected.error and not (left and not got.error):
        return Difference("error", len(got.tokens), expected.error or "none", got.error or "none", case)
    count = len(got.tokens)
    for what, truth, found in (
        ("tokens", expected.tokens, got.tokens),
        ("logits", expected.notes, got.notes),
        ("logprobs", expected.logprobs, got.logprobs),
    ):
        for position, pair in enumerate(zip(truth, found, strict=False)):
            if pair[0] != pair[1]:
                return Difference(what, position, _shown(pair[0]), _shown(pair[1]), case)
    if count > len(expected.tokens) or (not left and (count, got.reason) != (len(expected.tokens), expected.reason)):
        whole = f"{len(expected.tokens)} tokens, {expected.reason}"
        return Difference("end", min(count, len(expected.tokens)), whole, f"{count} tokens, {got.reason}", case)
    told = _told(expected, got, case, left=left)
    if told is not None:
        return told
    return None if got.counted else Difference("counts", count, "as many as there are tokens", "others", case)


def _told(expected: Outcome, got: Outcome, case: Case, *, left: bool) -> Difference | None:
    """Whether the steps handed the user what was said: tokens, flags and text, to the end unless it left or failed."""
    kept = list(zip_longest(got.tokens, got.flags))
    for position, pair in enumerate(zip_longest(kept, got.handed)):
        if pair[0] != pair[1] and not (got.error and position >= len(got.handed)):
            return Difference("steps", position, _shown(pair[0]), _shown(pair[1]), case)
    for whole in (expected.text, got.result):
        if got.text != whole and not ((left or got.error) and whole.startswith(got.text)):
            start = next((i for i, (a, b) in enumerate(zip(got.text, whole, strict=False)) if a != b), 0)
            said, read = (repr(it[start : start + 20]) for it in (whole, got.text))
            return Difference("text", len(got.tokens), said, read, case)
    return None


def _shown(value: object) -> str:
    return value.hex() if isinstance(value, bytes) else str(value)
