"""Drafters of the controls, which must not depend on how good the user's are: they know the truth."""

import torch

from foredraft import noise, sampling
from foredraft.audit.distribution import Tree
from foredraft.audit.exact import Reference
from foredraft.noise import Stream
from foredraft.policy import DraftPolicy
from foredraft.types import Draft, Request, Verdict


class Scripted:
    """A drafter without memory, for controls: they must not depend on how good the user's is."""

    name = "control"

    def draft(self, request: Request) -> Draft:
        raise NotImplementedError

    def propose(self, requests: list[Request], policy: DraftPolicy) -> list[Draft]:
        return [self.draft(request) for request in requests]

    def observe(self, request: Request, verdict: Verdict) -> None:
        pass

    def forget(self, request: Request) -> None:
        pass


class HalfRight(Scripted):
    """Right for none to two tokens, then wrong: what follows an acceptance and what follows a rejection is seen."""

    def __init__(self, truth: Reference, vocab_size: int) -> None:
        self.truth, self.vocab_size = truth, vocab_size

    def draft(self, request: Request) -> Draft:
        done = request.num_output
        ahead = [*self.truth[request.seed].tokens[done:], *[0] * request.draft_limit][: request.draft_limit]
        right = done % 3
        wrong = [(token + 1) % self.vocab_size for token in ahead[right:]]
        return Draft((*ahead[:right], *wrong), self.name)


class AllRight(HalfRight):
    """Right as far as the text goes, and past its end."""

    def draft(self, request: Request) -> Draft:
        ahead = self.truth[request.seed].tokens[request.num_output :]
        return Draft((*ahead, *[0] * request.draft_limit)[: request.draft_limit], self.name)


class Sketch(Scripted):
    """Draws from the tree's own candidates, the least likely most often: some are refused, and q is known."""

    peak = 0.7  # what the least likely candidate gets beyond its equal share

    def __init__(self, tree: Tree, vocab_size: int) -> None:
        self.tree, self.vocab_size = tree, vocab_size

    def q(self, path: tuple[int, ...]) -> torch.Tensor:
        chances = self.tree.following[path]
        q = torch.zeros(self.vocab_size, dtype=torch.float32)
        q[torch.tensor(list(chances))] = (1 - self.peak) / len(chances)
        q[min(chances, key=lambda token: chances[token])] += self.peak
        return q

    def draft(self, request: Request) -> Draft:
        tokens: tuple[int, ...] = ()
        rows = []
        while len(tokens) < request.draft_limit and (*request.output_ids, *tokens) in self.tree.following:
            q = self.q((*request.output_ids, *tokens))
            key = noise.fold(request.seed, len(request.token_ids))
            rows.append(q)
            tokens += (int(sampling.race(q[None], key, [len(request.token_ids) + len(tokens)], Stream.DRAFT)),)
        return Draft(tokens, self.name, torch.stack(rows) if rows else None)


class Likeliest(Sketch):
    """The likeliest token, and says that it is certain of it: every second one is refused or so."""

    def q(self, path: tuple[int, ...]) -> torch.Tensor:
        chances = self.tree.following[path]
        q = torch.zeros(self.vocab_size, dtype=torch.float32)
        q[max(chances, key=lambda token: chances[token])] = 1.0
        return q


class Argmaxed(Sketch):
    """Drafts the likeliest token and says that it was drawn."""

    peak = 0.25

    def draft(self, request: Request) -> Draft:
        drawn = super().draft(request)
        if drawn.probs is None:
            return drawn
        tokens: tuple[int, ...] = ()
        for _ in drawn.tokens:
            tokens += (int(self.q((*request.output_ids, *tokens)).argmax()),)
        probs = [self.q((*request.output_ids, *tokens[:i])) for i in range(len(tokens))]
        return Draft(tokens, self.name, torch.stack(probs))


class Choosy(Sketch):
    """Throws a token away where it was unsure of it, after it was drawn."""

    peak = 0.25

    def draft(self, request: Request) -> Draft:
        drawn = super().draft(request)
        if drawn.probs is None:
            return drawn
        sure = [float(row[token]) >= 0.4 for row, token in zip(drawn.probs, drawn.tokens, strict=True)]
        kept = sure.index(False) if False in sure else len(sure)
        return Draft(drawn.tokens[:kept], self.name, drawn.probs[:kept] if kept else None)
