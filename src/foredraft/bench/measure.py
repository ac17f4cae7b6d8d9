"""All requests in all arms, taken in turn, and where their tokens differ from plain decoding's.

The arms take turns within each request, every other time in reverse order, so that a machine whose speed drifts is
unfair to none. Owns what was measured so far, which an interrupt does not lose.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest

from foredraft.bench.asking import Prompt, Run, ask, conversation
from foredraft.bench.options import POLICY, BenchOptions
from foredraft.bench.tasks import Task
from foredraft.drafters.base import Drafter, NoDrafter
from foredraft.drafters.several import Several
from foredraft.errors import PromptTooLongError
from foredraft.llm import LLM
from foredraft.policy import DraftPolicy, make_policy
from foredraft.tuning.driving import driven_by

PLAIN = "plain"
WARM_UP = 32  # tokens


@dataclass(frozen=True, slots=True)
class Arm:
    """A way of decoding. Each has a policy of its own, which learns from this arm alone."""

    name: str
    num_draft_tokens: int | None
    drafter: Drafter
    policy: DraftPolicy

    def run(self, llm: LLM, prompt: Prompt, options: BenchOptions, seed: int, round: int) -> Run:
        params = replace(options.params, seed=seed)
        with driven_by(llm, self.drafter, self.policy):
            return ask(llm, prompt, params, self.num_draft_tokens, f"{self.name}, round {round}")


def make_arms(llm: LLM, options: BenchOptions) -> tuple[Arm, ...]:
    """Plain decoding, and one arm for each draft length."""
    plain = Arm(PLAIN, 0, NoDrafter(), make_policy("fixed"))
    several = isinstance(llm.drafter, Several)
    drafting = [
        Arm(
            POLICY if length is None else f"gamma {length}",
            length,
            llm.drafter,
            make_policy(options.policy, several=several),
        )
        for length in options.lengths
    ]
    return (plain, *drafting)


@dataclass(frozen=True, slots=True)
class Place:
    """Which request: of a task an answer, of that a turn."""

    task: Task
    index: int  # of the task
    sample: int
    turn: int
    seed: int


@dataclass(frozen=True, slots=True)
class Request:
    """One request in all arms; `rounds[r][arm]`."""

    place: Place
    prompt: Prompt
    rounds: list[dict[str, Run]] = field(default_factory=list)

    @property
    def reference(self) -> Run:
        """The first plain run."""
        return self.rounds[0][PLAIN]


@dataclass(frozen=True, slots=True)
class Difference:
    """Where a run departs from plain decoding; `None` is a token that the shorter text does not have."""

    arm: str
    round: int
    task: str
    line: int
    turn: int
    position: int
    expected: int | None
    got: int | None


@dataclass(slots=True)
class Measured:
    """What there is so far. Only requests that all arms have answered are in it."""

    arms: tuple[Arm, ...]
    requests: dict[tuple[int, int, int], Request] = field(default_factory=dict)
    left_out: list[Task] = field(default_factory=list)  # tasks, or later turns of them, without room in the context
    interrupted: bool = False

    def differences(self) -> list[Difference]:
        """The first of each run that has any."""
        found = []
        for request in self.requests.values():
            for number, runs in enumerate(request.rounds, 1):
                for name, run in runs.items():
                    found += _difference(request, number, name, run)
        return found


def _difference(request: Request, number: int, name: str, run: Run) -> list[Difference]:
    pairs = enumerate(zip_longest(request.reference.token_ids, run.token_ids))
    task, turn = request.place.task, request.place.turn
    return [
        Difference(name, number, task.name, task.line, turn + 1, position, expected, got)
        for position, (expected, got) in pairs
        if expected != got
    ][:1]


def measure(
    llm: LLM, tasks: Sequence[Task], options: BenchOptions, tick: Callable[[str], None] = lambda text: None
) -> Measured:
    """Run everything; Ctrl-C (KeyboardInterrupt) ends it early.

    Raises:
        ForedraftError: a request failed.
        KeyboardInterrupt: interrupted before there was anything to keep.
    """
    found = Measured(make_arms(llm, options))
    try:
        for round in range(options.rounds):
            for index, task in enumerate(tasks):
                for sample in range(options.samples):
                    for request in _turns(llm, found, options, Place(task, index, sample, 0, 0), round):
                        _ask_all(llm, found, options, request, round)
                tick(task.category)
    except KeyboardInterrupt:
        if not found.requests:
            raise
        found.interrupted = True
    return found


def _turns(llm: LLM, found: Measured, options: BenchOptions, place: Place, round: int) -> Iterator[Request]:
    """The requests of one answer to a task, turn by turn; plain decoding's words are what was said."""
    talk, answers = conversation(llm, place.task, options.chat), list[str]()
    for turn in range(len(place.task.turns)):
        key = (place.index, place.sample, turn)
        if key not in found.requests:
            prompt = prompt_with_room(llm, talk.prompt, answers, options)
            if prompt is None:
                found.left_out += [place.task] if round == 0 and place.sample == 0 else []
                return
            seed = (options.params.seed or 0) + place.index * options.samples + place.sample
            yield Request(replace(place, turn=turn, seed=seed), prompt)
        else:
            yield found.requests[key]
        answers.append(found.requests[key].reference.text)


def prompt_with_room(
    llm: LLM, render: Callable[[Sequence[str]], Prompt], answers: Sequence[str], options: BenchOptions
) -> Prompt | None:
    """The prompt, or None where the context has no room for it and the longest answer."""
    try:
        prompt = render(answers)
    except PromptTooLongError:
        return None
    return prompt if len(prompt.token_ids) + options.params.max_new_tokens <= llm.max_model_len else None


def _ask_all(llm: LLM, found: Measured, options: BenchOptions, request: Request, round: int) -> None:
    place, arms = request.place, found.arms
    if not found.requests:
        warm_up(llm, arms, request.prompt, options)
    order = arms if (round + place.index + place.turn) % 2 == 0 else arms[::-1]
    request.rounds.append({arm.name: arm.run(llm, request.prompt, options, place.seed, round) for arm in order})
    found.requests.setdefault((place.index, place.sample, place.turn), request)


def warm_up(llm: LLM, arms: Sequence[Arm], prompt: Prompt, options: BenchOptions) -> None:
    """What the first request would pay for all others."""
    brief = replace(options, params=replace(options.params, max_new_tokens=min(WARM_UP, options.params.max_new_tokens)))
    for arm in arms:
        arm.run(llm, prompt, brief, seed=0, round=-1)
