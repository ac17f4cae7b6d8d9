"""What rejection sampling draws, against the exact probabilities of every continuation.

Three candidates a place and four places make 81 continuations, whose probabilities the target alone gives. Counts of
many draws are held against them by Pearson's chi-square test. All seeds are fixed: an audit repeated is the same audit.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from foredraft.audit.asks import Ask
from foredraft.audit.options import AuditOptions
from foredraft.audit.play import PLAIN, Subject, play
from foredraft.errors import ForedraftError
from foredraft.llm import LLM
from foredraft.scores import process
from foredraft.types import SamplingParams

PARAMS = SamplingParams(temperature=1.0, top_k=3, ignore_eos=True, verifier="rejection")
PLACES = 4  # tokens; the first is the prompt's, the others are drafted or follow a draft
DRAFTED = 3
TEMPERATURES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
CERTAIN = 0.55  # of the likeliest of three
TOGETHER = 16  # draws that run at once
TREES = 4  # prompts, of which each drafter is tested on one that tells something
PILOT = 64  # draws that tell which that is
STEM = 6  # tokens of a prompt before each continuation, where it repeats itself
REPEATS = 2
FEW = 20  # accepted or refused tokens: with fewer the test says nothing of one kind
EXPECTED = 5.0  # counts below this share a cell, as the test's approximation asks for

Path = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Tree:
    """The target's distributions after a prompt and each continuation that its own filters allow."""

    prompt: Path
    temperature: float
    following: Mapping[Path, Mapping[int, float]]  # by continuation: probability of each token

    @property
    def params(self) -> SamplingParams:
        return replace(PARAMS, temperature=self.temperature)

    @property
    def certainty(self) -> float:
        """The mean probability of the likeliest token."""
        return sum(max(chances.values()) for chances in self.following.values()) / len(self.following)

    @property
    def continuations(self) -> dict[Path, float]:
        """The probability of each of whole length."""
        found: dict[Path, float] = {(): 1.0}
        for _ in range(PLACES):
            found = {(*path, t): chance * p for path, chance in found.items() for t, p in self.following[path].items()}
        return found


@dataclass(frozen=True, slots=True)
class Tested:
    """One test. It fails where `p_value` is below `threshold`."""

    samples: int
    cells: int
    p_value: float
    threshold: float
    drafted: int
    accepted: int
    error: str = ""

    @property
    def passed(self) -> bool:
        return not self.error and self.p_value >= self.threshold

    @property
    def telling(self) -> bool:
        """Whether tokens were drafted, and accepted as well as refused; else this passes without being evidence."""
        return min(self.accepted, self.drafted - self.accepted) >= FEW

    @property
    def lacking(self) -> str:
        """Why it says nothing of rejection sampling; empty where it does."""
        if self.telling:
            return ""
        if not self.drafted:
            return "no drafts"
        return "all refused" if self.accepted < self.drafted - self.accepted else "all accepted"


def make_tree(llm: LLM, prompt: Path) -> Tree:
    """At a temperature that leaves the candidates a choice: there a wrong distribution shows soonest."""
    for temperature in TEMPERATURES:
        tree = tree_at(llm, prompt, temperature)
        if tree.certainty <= CERTAIN:
            break
    return tree


def tree_at(llm: LLM, prompt: Path, temperature: float) -> Tree:
    """By plain decoding of one token after each continuation."""
    following: dict[Path, dict[int, float]] = {}
    level: list[Path] = [()]
    for _ in range(PLACES):
        following.update(zip(level, _next(llm, prompt, level, temperature), strict=True))
        level = [(*path, token) for path in level for token in following[path]]
    return Tree(prompt, temperature, following)


def _next(llm: LLM, prompt: Path, paths: Sequence[Path], temperature: float) -> list[dict[int, float]]:
    params = replace(PARAMS, temperature=temperature, max_new_tokens=1, seed=0)
    asks = [Ask((*prompt, *path), params) for path in paths]
    outcomes = play(llm, PLAIN, asks, 1, torch.Tensor.clone)
    if failed := next((it.error for it in outcomes if it.error), ""):
        raise ForedraftError(f"plain decoding of {len(prompt)} tokens fails ({failed}), so there is nothing to compare")
    return [_chances(outcome.notes[0], params) for outcome in outcomes]


def _chances(logits: torch.Tensor, params: SamplingParams) -> dict[int, float]:
    chances = process(logits.cpu()[None], [], [()], 0, params).double().softmax(-1)[0]
    return {int(token): float(chances[token]) for token in chances.nonzero().flatten()}


def draws(llm: LLM, subject: Subject, tree: Tree, samples: int, seed: int) -> tuple[Counter[Path], int, int, str]:
    """Continuations counted, tokens drafted and accepted, and the first error."""
    params = replace(tree.params, max_new_tokens=PLACES)
    first = 1_000_000 * (seed + 1)
    asks = [Ask(tree.prompt, replace(params, seed=first + i), num_draft_tokens=DRAFTED) for i in range(samples)]
    outcomes = play(llm, subject, asks, TOGETHER, lambda logits: None)
    error = next((outcome.error for outcome in outcomes if outcome.error), "")
    drafted, accepted = (sum(getattr(it, name) for it in outcomes) for name in ("drafted", "accepted"))
    return Counter(outcome.tokens for outcome in outcomes), drafted, accepted, error


def telling_tree(llm: LLM, subject: Subject, seed: int, *sources: Iterable[Tree]) -> Tree:
    """The first whose drafts are often accepted as well as refused, else the one where they are most often.

    Only behind an accepted token is the next one tried. Where there are no drafts on a tree, the others of its source
    are left for the next source's: prompts on which lookups find something.
    """
    best, most = None, (0, 0)
    for left, source in zip(reversed(range(len(sources))), sources, strict=True):
        for tree in source:
            found = _pilot(llm, subject, tree, seed)
            if best is None or found > most:
                best, most = tree, found
            if most[0] >= FEW:
                return best
            if left and not found[1]:
                break
        if most[1]:
            break
    assert best is not None, "the first source has a tree"
    return best


def _pilot(llm: LLM, subject: Subject, tree: Tree, seed: int) -> tuple[int, int]:
    """Of a few draws: what is rarer of tokens accepted and refused, and how many were drafted."""
    _, drafted, accepted, _ = draws(llm, subject, tree, PILOT, seed + PILOT)
    return min(accepted, drafted - accepted), drafted


def repeating(llm: LLM, tree: Tree) -> Tree:
    """One whose prompt has this tree's likeliest continuation behind each first token, so that lookups draft them."""
    for _ in range(REPEATS):
        chances = tree.continuations
        likeliest = [
            max((p for p in chances if p[0] == first), key=chances.__getitem__) for first in tree.following[()]
        ]
        start = tree.prompt[-STEM:]
        tree = make_tree(llm, (*(token for path in likeliest for token in (*start, *path)), *start))
    return tree


def test(llm: LLM, subject: Subject, tree: Tree, options: AuditOptions, threshold: float) -> Tested:
    """Draw as often as the options say, and compare. An impossible continuation has probability 0."""
    seen, drafted, accepted, error = draws(llm, subject, tree, options.samples, options.seed)
    p_value, cells = chi_square(seen, tree.continuations)
    return Tested(options.samples, cells, p_value, threshold, drafted, accepted, error)


def chi_square(seen: Mapping[Path, int], chances: Mapping[Path, float]) -> tuple[float, int]:
    """The probability of counts at least as far from expectation, and over how many cells."""
    total = sum(seen.values())
    if any(path not in chances for path in seen):
        return 0.0, len(chances)
    common = [path for path, chance in chances.items() if chance * total >= EXPECTED]
    pairs = [(seen.get(path, 0), chances[path] * total) for path in common]
    rest = total - sum(expected for _, expected in pairs)
    if len(common) < len(chances):
        pairs.append((total - sum(count for count, _ in pairs), max(rest, 1e-9)))
    statistic = sum((count - expected) ** 2 / expected for count, expected in pairs)
    freedom = torch.tensor((len(pairs) - 1) / 2, dtype=torch.float64)
    tail = torch.special.gammaincc(freedom, torch.tensor(statistic / 2, dtype=torch.float64))
    return (float(tail) if len(pairs) > 1 else 1.0), len(pairs)
