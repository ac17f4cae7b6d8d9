"""Negative controls: bugs that speculative decoders have shipped, planted on purpose. The audit's own checks must catch
each; otherwise they prove nothing.

Each is an engine, a drafter or a target that is handed to the same checks as the sound ones; nothing else is touched.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from foredraft.audit import faulty_rejection as rejection
from foredraft.audit import faulty_state as state
from foredraft.audit import faulty_verification as verification
from foredraft.audit.distribution import Tree
from foredraft.audit.exact import Reference
from foredraft.audit.play import Subject
from foredraft.audit.scripted import AllRight, Argmaxed, Choosy, HalfRight, Likeliest, Scripted, Sketch
from foredraft.engine import Engine
from foredraft.models.base import CausalModel

Kind = Literal["exact", "distribution"]
Need = Literal["grammar", "tokenizer"]


@dataclass(frozen=True, slots=True)
class Control:
    """A planted bug, and by which check it has to be caught."""

    name: str
    kind: Kind
    engine: type[Engine] = Engine
    target: Callable[[CausalModel], CausalModel] = lambda model: model
    drafter: type[Scripted] | None = None  # None: HalfRight, or Sketch
    needs: Need | None = None  # what has to be there for the bug to show
    far: bool = False  # shows behind a long prompt only

    def exact_subject(self, truth: Reference, vocab_size: int) -> Subject:
        made = self.drafter or HalfRight
        return Subject(made(truth, vocab_size), "fixed", self.engine, self.target)  # type: ignore[call-arg]

    def drawing_subject(self, tree: Tree, vocab_size: int) -> Subject:
        made = self.drafter or Sketch
        return Subject(made(tree, vocab_size), "fixed", self.engine, self.target)  # type: ignore[call-arg]


CONTROLS = (
    Control("all drafted tokens are kept", "exact", verification.KeepsAll),
    Control("one token too many is kept at a draft's end", "exact", verification.KeepsOneTooMany),
    Control("noise is keyed by the row, not the position", "exact", verification.KeysNoiseByRow),
    Control(
        "the bonus token is drawn from raw logits",
        "exact",
        verification.DrawsBonusFromRawLogits,
        drafter=AllRight,
    ),
    Control("temperature is ignored in verification", "exact", verification.IgnoresTemperature),
    Control("logits are divided by the temperature twice", "exact", verification.ScalesTwice),
    Control("verification writes into the logits", "exact", verification.WritesIntoTheLogits),
    Control(
        "penalties see no draft token before a row",
        "exact",
        verification.PenalisesWithOnePrefix,
        drafter=AllRight,
    ),
    Control("penalties see the token that is judged", "exact", verification.PenalisesWithTheJudgedToken),
    Control("biases are dropped", "exact", verification.DropsBiases),
    Control("min_p is ignored in verification", "exact", verification.IgnoresMinP),
    Control("processors are dropped", "exact", verification.DropsProcessors),
    Control("a processor remembers tokens that were refused", "exact", state.RemembersRefusedTokens),
    Control("greedy is decided by p over q", "exact", verification.DecidesGreedyByRatio),
    Control("the cache keeps rejected tokens", "exact", state.KeepsTheCacheOfRejectedTokens),
    Control("positions are one off after a rejection", "exact", state.IsOneOffAfterARejection),
    Control("positions are one off behind position 512", "exact", state.IsOneOffFarBehind, far=True),
    Control("a rejected token's keys are left behind", "exact", target=state.LeavesStaleKeys),
    Control("a row depends on the rows beside it", "exact", target=state.DependsOnItsNeighbours),
    Control("two requests of a batch get each other's logits", "exact", target=state.SwapsRows),
    Control("an end within a draft is seen late", "exact", state.EndsLate, drafter=AllRight),
    Control("a refused token's text is shown", "exact", state.TellsRefusedTokens, needs="tokenizer"),
    Control("the last token of a long step is not handed over", "exact", state.HandsOverOneTooFew, drafter=AllRight),
    Control("accepted tokens are counted twice", "exact", state.CountsTwice),
    Control("drafted tokens have a log-probability of 0", "exact", state.ForgetsLogprobs),
    Control(
        "the grammar forgets the draft before a row",
        "exact",
        state.ForgetsTheGrammar,
        drafter=AllRight,
        needs="grammar",
    ),
    Control(
        "the grammar masks a row late beside penalties",
        "exact",
        state.MasksARowLate,
        drafter=AllRight,
        needs="grammar",
    ),
    Control("the ratio of acceptance is inverted", "distribution", rejection.InvertsTheRatio),
    Control("every drafted token is accepted", "distribution", rejection.AcceptsEverything),
    Control("the residual's likeliest token is taken", "distribution", rejection.TakesTheLikeliestOfTheRest),
    Control(
        "the residual's probabilities are taken for logits",
        "distribution",
        rejection.TakesProbabilitiesForLogits,
    ),
    Control("a refused token is drawn again from p", "distribution", rejection.DrawsAgainFromTheTarget),
    Control(
        "one number decides over all tokens of a draft",
        "distribution",
        rejection.ThrowsOneDie,
        drafter=Likeliest,
    ),
    Control("a refused token is emitted, the one after it dropped", "distribution", rejection.RefusesOneLate),
    Control("an argmax is said to be drawn", "distribution", drafter=Argmaxed),
    Control("an unsure token is thrown away after it was drawn", "distribution", drafter=Choosy),
)
