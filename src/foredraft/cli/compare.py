"""`--compare`: the same request plain and speculative, in turn, in one process.

Owns the measurement (one warm-up and three timed runs of each, in alternating order, medians) and its report.
"""

import statistics
import time
from dataclasses import asdict, dataclass, field, replace
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from foredraft.cli.console import stdout_console
from foredraft.cli.session import Question

if TYPE_CHECKING:
    from foredraft import GenerationResult, SamplingParams

ROUNDS = 3
SHOWN = 10  # differing positions
TELLING = 32  # tokens below which the prompt and the clock decide, not the drafts


@dataclass(slots=True)
class Side:
    """One way of decoding and what it gave."""

    name: str
    num_draft_tokens: int | None
    results: "list[GenerationResult]" = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def run(self, question: Question, params: "SamplingParams") -> None:
        begin = time.perf_counter()
        result = question.ask(params, self.num_draft_tokens)
        self.seconds.append(time.perf_counter() - begin)
        self.results.append(result)

    @property
    def median_seconds(self) -> float:
        return statistics.median(self.seconds)

    @property
    def median_tokens_per_second(self) -> float:
        return len(self.results[-1].token_ids) / self.median_seconds

    def as_dict(self) -> dict[str, Any]:
        return {
            "seconds": self.seconds,
            "median_seconds": self.median_seconds,
            "median_tokens_per_second": self.median_tokens_per_second,
            "token_ids": self.results[-1].token_ids,
            "stats": self.results[-1].stats.as_dict(),
        }


@dataclass(frozen=True, slots=True)
class Difference:
    """Where a run departs from the first plain one; `None` is a token that the shorter text does not have."""

    arm: str
    round: int
    position: int
    expected: int | None
    got: int | None


@dataclass(frozen=True, slots=True)
class Comparison:
    question: Question
    plain: Side
    speculative: Side

    @property
    def differences(self) -> list[Difference]:
        reference = self.plain.results[0].token_ids
        return [
            Difference(arm.name, index + 1, position, expected, got)
            for arm in (self.plain, self.speculative)
            for index, result in enumerate(arm.results)
            for position, (expected, got) in enumerate(zip_longest(reference, result.token_ids))
            if expected != got
        ]

    @property
    def equal(self) -> bool:
        return not self.differences

    @property
    def exact(self) -> bool:
        """Whether equal tokens were promised."""
        return self.plain.results[0].exact

    @property
    def speedup(self) -> float:
        return self.plain.median_seconds / self.speculative.median_seconds

    @property
    def telling(self) -> bool:
        """Whether the text is long enough for the speed-up to mean something."""
        return len(self.plain.results[0].token_ids) >= TELLING

    def as_dict(self) -> dict[str, Any]:
        return {
            "equal": self.equal,
            "exact": self.exact,
            "differences": [asdict(difference) for difference in self.differences],
            "speedup": self.speedup,
            "speedup_is_telling": self.telling,
            "rounds": len(self.plain.seconds),
            "plain": self.plain.as_dict(),
            "speculative": self.speculative.as_dict(),
        }

    def print(self) -> None:
        from rich.markup import escape

        console = stdout_console(highlight=False)
        text = self.plain.results[0].text
        console.print(escape(text.strip() if self.question.is_chat else text), soft_wrap=True)
        console.print(_table(self))
        count = len(self.plain.results[0].token_ids)
        if self.equal:
            console.print(
                f"tokens: [green]equal[/] ({count} of {count}, in all {len(self.plain.seconds)} runs of each)"
            )
        else:
            _print_differences(self)
        if not self.exact:
            console.print("exact: [yellow]no[/], equal tokens are not promised for this model here")
        if self.telling:
            console.print(f"speed-up: [bold]{self.speedup:.2f}[/]")
        else:
            console.print(
                f"speed-up: {self.speedup:.2f}, which says nothing: {count} tokens are too few, ask for {TELLING}"
            )


def compare(question: Question, params: "SamplingParams", num_draft_tokens: int | None) -> Comparison:
    """Both arms with one seed; the order alternates, so that a machine that warms up or throttles favours neither."""
    from foredraft.drafters.several import forget_outputs

    forget_outputs(question.llm.drafter)  # else all rounds but the first would draft from the answer itself
    plain, speculative = Side("plain", 0), Side("speculative", num_draft_tokens)
    seed = question.ask(params, 0).seed
    params = replace(params, seed=seed)
    question.ask(params, num_draft_tokens)
    for index in range(ROUNDS):
        for arm in (plain, speculative) if index % 2 == 0 else (speculative, plain):
            arm.run(question, params)
    return Comparison(question, plain, speculative)


def _table(comparison: Comparison) -> "Any":
    from rich.table import Column, Table

    table = Table(Column("", no_wrap=True), "tokens", "median s", "min", "max", "tok/s", "accepted", "per pass")
    for arm in (comparison.plain, comparison.speculative):
        stats = arm.results[-1].stats
        table.add_row(
            arm.name,
            str(len(arm.results[-1].token_ids)),
            f"{arm.median_seconds:.3f}",
            f"{min(arm.seconds):.3f}",
            f"{max(arm.seconds):.3f}",
            f"{arm.median_tokens_per_second:.1f}",
            f"{stats.draft_acceptance_rate:.1%}" if stats.drafted else "-",
            f"{stats.mean_acceptance_length:.2f}",
        )
    return table


def _print_differences(comparison: Comparison) -> None:
    console, tokenizer = stdout_console(highlight=False, markup=False), comparison.question.llm.tokenizer
    differences = comparison.differences
    console.print(f"tokens: DIFFERENT at {len(differences)} positions")

    def shown(token: int | None) -> str:
        return "nothing" if token is None else f"{token} {tokenizer.decode([token])!r}"

    for it in differences[:SHOWN]:
        line = f"  {it.arm} run {it.round}, position {it.position}: {shown(it.expected)} became {shown(it.got)}"
        console.print(line, soft_wrap=True)
    if len(differences) > SHOWN:
        console.print(f"  and {len(differences) - SHOWN} more (--json lists them all)")
