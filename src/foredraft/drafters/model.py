"""The model drafter: another causal model with a cache of its own, or the target's own weights in another form.

It drafts with one row a sequence and step, all sequences of a batch in lockstep, on its own device and in its own
dtype. What its cache holds of rejected drafts is found by comparing tokens, so nobody has to tell it what was kept.
"""

import torch
import torch.nn.functional as F

from foredraft import sampling
from foredraft.models.base import CausalModel
from foredraft.models.rows import Span, plan
from foredraft.policy import DraftPolicy
from foredraft.sampling import Drawn
from foredraft.types import Draft, Sequence, Verdict

PREFILL_CHUNK = 256
KEY_MULTIPLE = 128  # drafts need no row invariance; rounding keeps cache views and masks alike from step to step


class Chain:
    """One sequence's draft while it grows."""

    __slots__ = ("drawn", "open", "sequence", "tokens")

    def __init__(self, sequence: Sequence) -> None:
        self.sequence = sequence
        self.tokens: list[int] = []
        self.drawn: list[Drawn] = []
        self.open = True

    @property
    def confidences(self) -> tuple[float, ...]:
        return tuple(drawn.confidence for drawn in self.drawn)

    def append(self, drawn: Drawn, policy: DraftPolicy) -> None:
        self.drawn.append(drawn)
        self.tokens.append(drawn.token)
        room = len(self.tokens) < self.sequence.draft_limit
        self.open = room and policy.go_on(self.sequence, self.confidences)

    def draft(self, source: str) -> Draft:
        probs = [drawn.probs for drawn in self.drawn if drawn.probs is not None]
        return Draft(
            tuple(self.tokens), source, probs=torch.stack(probs) if probs else None, confidences=self.confidences
        )


class ModelDrafter:
    """Drafts with a causal model that shares the target's vocabulary."""

    def __init__(self, model: CausalModel, vocab_size: int, name: str = "model") -> None:
        self.name = name
        self.model = model
        self.vocab_size = vocab_size
        self.held: dict[Sequence, list[int]] = {}  # the tokens whose keys and values its cache holds

    @property
    def weight_bytes(self) -> int:
        """What drafting adds to the target's weights."""
        return self.model.weight_bytes

    @property
    def cache_bytes(self) -> int:
        """What drafting adds to the target's cache."""
        return self.model.cache.nbytes

    def propose(self, sequences: list[Sequence], policy: DraftPolicy) -> list[Draft]:
        chains = {s: Chain(s) for s in sequences if s.draft_limit and self._has_room(s)}
        spans = [self._catch_up(s) for s in chains]
        active = list(chains.values())
        while active:
            logits = self._logits(spans)
            for chain, drawn in zip(
                active,
                sampling.draw(logits, [c.sequence for c in active], [c.tokens for c in active]),
                strict=True,
            ):
                chain.append(drawn, policy)
            active = [chain for chain in active if chain.open]
            spans = [self._next(chain) for chain in active]
        return [chains[s].draft(self.name) if s in chains else Draft(source=self.name) for s in sequences]

    def _has_room(self, sequence: Sequence) -> bool:
        return len(sequence.token_ids) + sequence.draft_limit <= self.model.max_positions

    def _catch_up(self, sequence: Sequence) -> Span:
        """The committed tokens that the cache lacks, all but the last chunk of them already computed."""
        held = self.held.setdefault(sequence, [])
        tokens = sequence.token_ids
        start = min(_common(held, tokens), len(tokens) - 1)
        while len(tokens) - start > PREFILL_CHUNK:
            chunk = tokens[start : start + PREFILL_CHUNK]
            self.model.forward(plan([Span(sequence.slot, start, chunk, 0)], 1, KEY_MULTIPLE))
            start += PREFILL_CHUNK
        held[:] = tokens
        return Span(sequence.slot, start, tokens[start:])

    def _next(self, chain: Chain) -> Span:
        self._hold(chain.sequence, chain.tokens[-1])
        position = len(chain.sequence.token_ids) + len(chain.tokens) - 1
        return Span(chain.sequence.slot, position, chain.tokens[-1:])

    def _hold(self, sequence: Sequence, token: int) -> None:
        """The next pass writes this token's keys and values."""
        self.held[sequence].append(token)

    def _logits(self, spans: list[Span]) -> torch.Tensor:
        """Logits [B, V] over the target's vocabulary: a padded head is cut or filled."""
        logits = self.model.forward(plan(spans, 1, KEY_MULTIPLE))
        missing = self.vocab_size - logits.shape[1]
        return F.pad(logits, (0, missing), value=-torch.inf) if missing else logits

    def observe(self, sequence: Sequence, verdict: Verdict) -> None:
        pass

    def forget(self, sequence: Sequence) -> None:
        self.held.pop(sequence, None)


def _common(held: list[int], tokens: list[int]) -> int:
    """Length of the common prefix; only the tail can differ, so it is looked at from the end."""
    length = min(len(held), len(tokens))
    if held[:length] == tokens[:length]:
        return length
    while held[length - 1 : length] != tokens[length - 1 : length] or held[:length] != tokens[:length]:
        length -= 1
    return length
