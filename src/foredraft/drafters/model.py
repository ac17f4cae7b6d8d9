"""The model drafter: drafts with another causal model, which has its own cache, device and dtype.

All requests of a batch draft together, one token each a pass. The drafter finds out what was rejected by comparing the
tokens in its cache with the request's, so verification does not have to report it.
"""

import math
import warnings
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F

from foredraft import noise, sampling
from foredraft.models.base import Cache, CausalModel, Chains, Guessing
from foredraft.models.rows import PREFILL_CHUNK, Span, plan
from foredraft.noise import Stream
from foredraft.policy import DraftPolicy
from foredraft.sampling import Drawn
from foredraft.types import Draft, Request, Verdict


class Growing(Protocol):
    """A draft of one request while it is made."""

    open: bool
    request: Request

    def append(self, drawn: Drawn, policy: DraftPolicy) -> None: ...


class Chain:
    """The draft of one request while it is made, from the tokens that a grammar forces on."""

    __slots__ = ("confidences", "lead", "open", "probs", "request", "tokens")

    def __init__(self, request: Request) -> None:
        self.request = request
        self.lead = request.lead
        self.tokens: list[int] = list(request.lead)
        self.confidences: tuple[float, ...] = ()  # of the model's own tokens
        self.probs: list[torch.Tensor] = []
        self.open = len(self.tokens) < request.draft_limit

    def append(self, drawn: Drawn, policy: DraftPolicy) -> None:
        self.tokens.append(drawn.token)
        self.confidences += (drawn.confidence,)
        if drawn.probs is not None:
            self.probs.append(drawn.probs)
        self.open = len(self.tokens) < self.request.draft_limit and policy.go_on(self.request, self.confidences)

    def draft(self, source: str) -> Draft:
        if len(self.tokens) == len(self.lead):
            return Draft(self.lead, "forced" if self.lead else source, confidences=(1.0,) * len(self.lead))
        probs = torch.stack((*self._one_hot(), *self.probs)) if self.probs else None
        confidences = (1.0,) * len(self.lead) + self.confidences
        return Draft(tuple(self.tokens), f"forced+{source}" if self.lead else source, probs, confidences=confidences)

    def _one_hot(self) -> list[torch.Tensor]:
        """The distributions that the forced tokens are drawn from. # each [V]"""
        like = torch.zeros_like(self.probs[0])
        return [like.index_fill(0, torch.tensor(token, device=like.device), 1.0) for token in self.lead]


@dataclass(slots=True)
class Held:
    """What the drafter's cache holds of a request: its first `committed` tokens, then those of its last draft."""

    committed: int = 0
    drafted: list[int] = field(default_factory=list)

    def advance(self, tokens: list[int]) -> int:
        """How many of the request's `tokens` the cache holds; the next pass will add the others."""
        held = self.committed
        for token in self.drafted:
            if held >= len(tokens) or tokens[held] != token:
                break
            held += 1
        self.committed, self.drafted = len(tokens), []
        return held


def _guessing(request: Request) -> Guessing:
    return Guessing(sampling.sampler(request.params), noise.fold(request.seed, Stream.TOKEN), request.draft_limit)


class ModelDrafter:
    """Drafts with a causal model that shares the target's vocabulary."""

    def __init__(self, model: CausalModel, vocab_size: int, name: str = "model") -> None:
        self.name = name
        self.model = model
        self.chains = model if isinstance(model, Chains) else None  # asked once: it takes microseconds
        self.key_multiple = min(128, model.row_invariance.key_multiple)  # rounding keeps views and masks alike
        self.vocab_size = vocab_size
        self.held: defaultdict[Request, Held] = defaultdict(Held)
        self.given_up: set[Request] = set()  # requests whose logits overflowed in the draft model

    @property
    def weight_bytes(self) -> int:
        """What drafting adds to the target's weights."""
        return self.model.weight_bytes

    @property
    def cache_bytes(self) -> int:
        """What drafting adds to the target's cache."""
        return self.model.cache.nbytes

    @property
    def caches(self) -> list[Cache]:
        """Those that drafting adds to the target's."""
        return [self.model.cache]

    def propose(self, requests: list[Request], policy: DraftPolicy) -> list[Draft]:
        chains = {s: Chain(s) for s in requests if s.draft_limit and self._can_draft(s)}
        active = [chain for chain in chains.values() if chain.open]
        spans = [self._catch_up(chain.request) for chain in active]
        if not self._at_once(active, spans, policy):
            self._one_by_one(active, spans, policy)
        return [chains[s].draft(self.name) if s in chains else Draft(source=self.name) for s in requests]

    def _at_once(self, active: list[Chain], spans: list[Span], policy: DraftPolicy) -> bool:
        """Draw whole chains in one call, where the model can, no scores are processed and the policy has a rule."""
        rule_of = getattr(policy, "rule", None)
        if self.chains is None or rule_of is None or not all(sampling.is_plain(c.request) for c in active):
            return False
        requests = [chain.request for chain in active]
        rule = rule_of(requests, max((request.draft_limit for request in requests), default=0)) if active else None
        if rule is None:
            return not active
        guessing = [_guessing(request) for request in requests]
        drawn = self.chains.chain(spans, guessing, rule, self.vocab_size)
        for chain, (tokens, confidences) in zip(active, drawn, strict=True):
            self._take(chain, tokens, confidences)
        return True

    def _take(self, chain: Chain, tokens: list[int], confidences: list[float]) -> None:
        self.held[chain.request].drafted += tokens[:-1]  # the last one was drawn and not computed
        if math.isnan(confidences[-1]):
            tokens, confidences = tokens[:-1], confidences[:-1]
            self._give_up(chain.request)
        chain.tokens += tokens
        chain.confidences = tuple(confidences)

    def _one_by_one(self, active: list[Chain], spans: list[Span], policy: DraftPolicy) -> None:
        while active:
            guesses = sampling.draw(self._logits(spans), [c.request for c in active], [c.tokens for c in active])
            for chain, drawn in zip(active, guesses, strict=True):
                self._extend(chain, drawn, policy)
            active = [chain for chain in active if chain.open]
            spans = [self._next(chain) for chain in active]

    def _extend(self, growing: Growing, drawn: Drawn | None, policy: DraftPolicy) -> None:
        """Add a guess; where there is none, or it came from no numbers, the draft ends."""
        if drawn is not None and not math.isnan(drawn.confidence):
            growing.append(drawn, policy)
            return
        growing.open = False
        if drawn is not None:
            self._give_up(growing.request)

    def _can_draft(self, request: Request) -> bool:
        tokens = request.token_ids
        has_room = len(tokens) + request.draft_limit <= self.model.max_positions
        knows_all = self.model.vocab_size >= self.vocab_size or max(tokens) < self.model.vocab_size
        return has_room and knows_all and request not in self.given_up

    def _give_up(self, request: Request) -> None:
        self.given_up.add(request)
        self._wipe(request)
        warnings.warn(
            f"drafter {self.name!r} gave logits that are no numbers after {len(request.token_ids)} tokens; this text "
            "goes on without drafts; load the draft in bfloat16 or float32",
            RuntimeWarning,
            stacklevel=2,
        )

    def _wipe(self, request: Request) -> None:
        """Clear the slot, which now holds NaN or infinity: its next request would read them."""
        self.model.cache.clear(request.slot)

    def _catch_up(self, request: Request) -> Span:
        """Compute the committed tokens that the cache lacks, but for the last chunk; it ends with the forced tokens."""
        tokens = request.token_ids
        start = min(self._held(request), len(tokens) - 1)
        self.held[request].drafted += request.lead
        span = self._feed(request.slot, start, tokens)
        return Span(span.slot, span.start, [*span.tokens, *request.lead])

    def _feed(self, slot: int, start: int, tokens: list[int]) -> Span:
        """Compute the tokens from `start` on, but for the last chunk, which the first pass computes."""
        while len(tokens) - start > PREFILL_CHUNK:
            chunk = tokens[start : start + PREFILL_CHUNK]
            self.model.forward(plan([Span(slot, start, chunk, 0)], 1, self.key_multiple))
            start += PREFILL_CHUNK
        return Span(slot, start, tokens[start:])

    def _held(self, request: Request) -> int:
        """How many of the request's tokens the cache holds, those of a new one that others have computed included."""
        return self._shared(request, request.token_ids, self.held[request].advance(request.token_ids))

    def _shared(self, request: Request, tokens: list[int], held: int) -> int:
        """Let others take the first `held` tokens; where a text is new and holds none, take theirs."""
        cache = self.model.cache
        if not held:
            return cache.adopt(request.slot, tokens[:-1], request.memory)
        cache.publish(request.slot, tokens, held, request.memory)
        return held

    def _next(self, chain: Chain) -> Span:
        self._hold(chain.request, chain.tokens[-1])
        position = len(chain.request.token_ids) + len(chain.tokens) - 1
        return Span(chain.request.slot, position, chain.tokens[-1:])

    def _hold(self, request: Request, token: int) -> None:
        """Note that the next pass writes this token's keys and values."""
        self.held[request].drafted.append(token)

    def _logits(self, spans: list[Span]) -> torch.Tensor:
        """Logits [B, V] over the target's vocabulary; if the draft's head has another size it is cut or filled up."""
        logits = self.model.forward(plan(spans, 1, self.key_multiple))
        missing = self.vocab_size - logits.shape[1]
        return F.pad(logits, (0, missing), value=-torch.inf) if missing else logits

    def observe(self, request: Request, verdict: Verdict) -> None:
        pass

    def forget(self, request: Request) -> None:
        if request in self.held:
            if request.error is None and request not in self.given_up:  # else what it computed may not be there
                self._held(request)  # the next text may begin like this one
            del self.held[request]
            self.model.cache.free(request.slot)
        self.given_up.discard(request)
