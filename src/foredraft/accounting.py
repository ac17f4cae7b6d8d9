"""What a step took, and whose it was: seconds shared among requests, and the prices that the policy learns."""

from dataclasses import dataclass, field
from time import perf_counter

from foredraft.drafters.base import Drafter
from foredraft.models.rows import Span
from foredraft.policy import PerRequest, StepTimes
from foredraft.policy.costs import Average
from foredraft.types import Request, StepOutput


@dataclass(slots=True)
class Clock:
    """When a step began, when its drafts and its pass of the target were there, and when it was done."""

    began: float = field(default_factory=perf_counter)
    drafted: float = 0.0
    verified: float = 0.0
    ended: float = 0.0

    @property
    def drafting(self) -> float:
        return self.drafted - self.began

    @property
    def verifying(self) -> float:
        return self.verified - self.drafted

    def stop(self) -> None:
        self.ended = perf_counter()


RECENT = 3  # steps that a pace goes by


@dataclass(slots=True)
class Pace:
    """How many tokens of prompts a step may compute beside those that decode, and take about twice its time at most."""

    step: Average = field(default_factory=lambda: Average(memory=RECENT))  # seconds of one without prompts
    token: Average = field(default_factory=lambda: Average(memory=RECENT))  # that each token of a prompt adds

    def took(self, seconds: float, read: int) -> None:
        """A step took so long and computed so many tokens of prompts."""
        if read:
            self.token.add_cost(max(seconds - self.step.value, seconds / 2) / read)
        else:
            self.step.add_cost(seconds)

    def budget(self, most: int) -> int:
        return min(most, int(self.step.value / self.token.value)) if self.token.value else most


def account(requests: list[Request], outputs: list[StepOutput], drafter: Drafter, clock: Clock) -> None:
    """Share the step's seconds among all that took part."""
    count, drafting, verifying, other = len(requests), clock.drafting, clock.verifying, clock.ended - clock.verified
    for request in requests:
        stats = request.stats
        stats.seconds_drafting += drafting / count
        stats.seconds_verifying += verifying / count
        stats.seconds_other += other / count
    asked = [request for request in requests if request.draft_limit > 0]
    if asked:
        _charge(asked, drafter, drafting)
    for output in outputs:
        if output.token_ids and not output.request.stats.seconds_to_first_token:
            output.request.stats.seconds_to_first_token = clock.ended - output.request.arrived


def _charge(requests: list[Request], drafter: Drafter, drafting: float) -> None:
    """Share the seconds of each drafter among the requests that asked for drafts."""
    spent: dict[str, float] = getattr(drafter, "spent", {drafter.name: drafting})
    for request in requests:
        for name, seconds in spent.items():
            request.stats.source(name).seconds += seconds / len(requests)


def teach(
    policy: PerRequest, outputs: list[StepOutput], spans: list[Span], rows: int, drafted: int, clock: Clock
) -> None:
    """Tell the policy what a step costs; forced tokens cost no drafting, so theirs is not typical."""
    if any([output.request.lead for output in outputs]):
        return
    emitted = sum([len(output.token_ids) for output in outputs])
    read = sum([len(span.tokens) for span in spans]) - drafted - len(outputs)
    total = clock.ended - clock.began
    policy.observe_times(StepTimes(len(outputs), drafted, rows, emitted, clock.drafting, clock.verifying, total, read))
