"""The suffix drafter: what most often followed the end of the text, in this text or in outputs of earlier requests.

Needs no model. Of both the better guess wins, by suffix decoding's score. Without a memory no request leaves a trace.
"""

from collections import defaultdict

from foredraft.drafters.memory import SuffixMemory
from foredraft.drafters.occurrences import NOTHING, Guess, SuffixRule, Texts
from foredraft.policy import DraftPolicy
from foredraft.types import Draft, Request, Verdict

PAPER = SuffixRule()


class SuffixDrafter:
    """Drafts from the request's own text, and from a memory of others' outputs where one is given.

    A request sees and feeds the texts of its `memory` name; one whose name is None does neither.
    """

    name = "suffix"
    looks_up = True

    def __init__(self, memory: SuffixMemory | None = None, rule: SuffixRule = PAPER) -> None:
        self.memory = memory
        self.rule = rule
        self.texts: defaultdict[Request, Texts] = defaultdict(Texts)

    @property
    def cache_bytes(self) -> int:
        """What is kept for drafting: the memory, and indices of the texts that run."""
        own = sum(texts.nbytes for texts in self.texts.values())
        return own + (self.memory.nbytes if self.memory else 0)

    def propose(self, requests: list[Request], policy: DraftPolicy) -> list[Draft]:
        return [self._draft(request, policy) for request in requests]

    def _draft(self, request: Request, policy: DraftPolicy) -> Draft:
        if not request.draft_limit:
            return Draft(source=self.name)
        guess = self._guess(request)
        sure = 1 - 1 / (1 + guess.match)
        confidences: tuple[float, ...] = ()
        for share in guess.shares:
            confidences += (share * sure,)
            if not policy.go_on(request, confidences):
                break
        return Draft(guess.tokens[: len(confidences)], self.name, confidences=confidences)

    def _guess(self, request: Request) -> Guess:
        """The better one; of equal scores that of the longer match, then that of the request's own text."""
        own = self._read(request)
        tail, limit = request.token_ids[-self.rule.depth :], request.draft_limit
        mine, others = own.guess(tail, limit, self.rule), NOTHING
        if self.memory is not None and request.memory is not None:
            others = self.memory.guess(tail, limit, self.rule, request.memory)
        return max(mine, others, key=lambda guess: (guess.score, guess.match))

    def _read(self, request: Request) -> Texts:
        """The request's text, indexed up to its end; from its beginning where it is not the one that was read."""
        texts, tokens = self.texts[request], request.token_ids
        known = len(texts.tokens)
        if known > len(tokens) or (known and texts.tokens[-1] != tokens[known - 1]):
            texts, known = Texts(), 0
            self.texts[request] = texts
        texts.extend(tokens[known:])
        return texts

    def observe(self, request: Request, verdict: Verdict) -> None:
        pass

    def forget(self, request: Request) -> None:
        self.texts.pop(request, None)
        if self.memory is not None and request.memory is not None and request.num_output:
            self.memory.add(request.output_ids, request.memory)
