"""How good the answers are: ROUGE-2 of summaries, pass@k of programs, as Draft & Verify's tables have them.

Both are figures of the tokens alone, so equal tokens have equal figures: that these agree between arms proves nothing
that the comparison of tokens does not.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import comb
from statistics import fmean

from foredraft.bench import programs
from foredraft.bench.measure import Request
from foredraft.bench.sandbox import Outcome, run_program
from foredraft.bench.tasks import Task
from foredraft.errors import ForedraftError, missing_extra

SUMMARIES = ("summ", "cnn", "xsum")  # how such a category begins
NEXT_ARTICLE = "\nArticle:"  # where a one-shot answer goes on with an example of its own
PASSES = (1, 10, 100)


@dataclass(frozen=True, slots=True)
class Rouge:
    """Mean F-measure of bigrams, stemmed; of several references the best counts."""

    tasks: int
    by_arm: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class PassRates:
    """`by_arm[arm][k]`: the chance that of k answers one passes (Chen et al. 2021, eq. 1)."""

    tasks: int
    samples: int
    by_arm: Mapping[str, Mapping[int, float]]
    unsound: tuple[str, ...]  # tasks left out, since their own reference does not pass their test
    network: str  # how it was cut off


def is_summary(task: Task) -> bool:
    return bool(task.references) and task.category.casefold().startswith(SUMMARIES)


def check_rouge() -> None:
    """Raises ForedraftError where rouge-score is not installed."""
    try:
        import rouge_score.rouge_scorer  # noqa: F401
    except ImportError as error:
        raise ForedraftError(
            missing_extra("these tasks have reference summaries, and ROUGE-2 needs", "rouge-score", "bench")
        ) from error


def rouge(requests: Sequence[Request], arms: Sequence[str]) -> Rouge | None:
    """None where no task is a summary with a reference."""
    own = [it for it in _last_turns(requests) if is_summary(it.place.task)]
    if not own:
        return None
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rouge2"], use_stemmer=True)

    def score(request: Request, arm: str) -> float:
        answer = request.rounds[0][arm].text.split(NEXT_ARTICLE)[0]
        return float(scorer.score_multi(list(request.place.task.references), answer)["rouge2"].fmeasure)

    return Rouge(len(own), {arm: fmean(score(it, arm) for it in own) for arm in arms})


class Judge:
    """Runs programs, each once."""

    def __init__(self) -> None:
        self.known: dict[str, Outcome] = {}

    def passes(self, task: Task, answer: str, *, reference: bool = False) -> bool:
        text = programs.program(task, answer, reference=reference)
        if text not in self.known:
            self.known[text] = run_program(text)
        return self.known[text].passed

    def sound(self, task: Task) -> bool:
        """Whether the task's own reference passes its test; a task without one is taken at its word."""
        return not task.references or any(self.passes(task, it, reference=True) for it in task.references)


def pass_rates(requests: Sequence[Request], arms: Sequence[str]) -> PassRates | None:
    """None where no task has a test."""
    judge, by_task = Judge(), dict[int, list[Request]]()
    for request in _last_turns(requests):
        if programs.has_test(request.place.task):
            by_task.setdefault(request.place.index, []).append(request)
    if not by_task:
        return None
    sound = {index: judge.sound(own[0].place.task) for index, own in by_task.items()}
    fair = [own for index, own in by_task.items() if sound[index]]
    unsound = tuple(own[0].place.task.name for index, own in by_task.items() if not sound[index])
    samples = min(map(len, fair), default=0)
    counts = {arm: [_passed(judge, own, arm) for own in fair] for arm in arms}
    rates = {
        arm: {k: fmean(pass_at(n, c, k) for n, c in found) for k in PASSES if k <= samples}
        for arm, found in counts.items()
    }
    return PassRates(len(fair), samples, rates, unsound, run_program("").network)


def _passed(judge: Judge, answers: Sequence[Request], arm: str) -> tuple[int, int]:
    """How many answers there are, and how many of them pass."""
    return len(answers), sum(judge.passes(it.place.task, it.rounds[0][arm].text) for it in answers)


def pass_at(n: int, passed: int, k: int) -> float:
    """1 - C(n - passed, k) / C(n, k): the chance that k of the n answers, all different, hold one that passes."""
    return 1.0 - comb(n - passed, k) / comb(n, k)


def _last_turns(requests: Sequence[Request]) -> Iterable[Request]:
    """What a reference is about: the answer to a task's last turn."""
    return (it for it in requests if it.place.turn == len(it.place.task.turns) - 1)
