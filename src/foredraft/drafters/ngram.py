"""The n-gram drafter: drafts what followed the longest suffix of the text when it last occurred (prompt lookup).

Needs no model. A suffix automaton (Blumer et al. 1985) finds the longest match, in amortised constant time a token.
"""

from collections import defaultdict
from dataclasses import dataclass, field

from foredraft.policy import DraftPolicy
from foredraft.types import Draft, Request, Verdict

MIN_MATCH = 2  # shorter suffixes recur by chance


@dataclass(slots=True)
class SuffixIndex:
    """A growing list of tokens that knows its longest suffix that occurred before, and where that occurrence ended."""

    tokens: list[int] = field(default_factory=list)
    edges: list[dict[int, int]] = field(default_factory=lambda: [{}])
    link: list[int] = field(default_factory=lambda: [-1])
    depth: list[int] = field(default_factory=lambda: [0])
    end: list[int] = field(default_factory=lambda: [-1])  # index of the last token of the newest known occurrence
    last: int = 0
    match_length: int = 0
    match_end: int = -1

    def append(self, token: int) -> None:
        position = len(self.tokens)
        self.tokens.append(token)
        state = self._extend(token, position)
        matched = self.link[state]
        self.match_length, self.match_end = self.depth[matched], self.end[matched]
        self.end[matched] = position

    def _extend(self, token: int, position: int) -> int:
        """One step of the online construction; returns the state of the whole text."""
        edges, link, depth = self.edges, self.link, self.depth
        state = self._state({}, depth[self.last] + 1, position)
        p = self.last
        while p != -1 and token not in edges[p]:
            edges[p][token] = state
            p = link[p]
        self.last = state
        if p == -1:
            link[state] = 0
            return state
        q = edges[p][token]
        if depth[q] == depth[p] + 1:
            link[state] = q
            return state
        clone = self._state(dict(edges[q]), depth[p] + 1, self.end[q])
        link[clone] = link[q]
        while p != -1 and edges[p].get(token) == q:
            edges[p][token] = clone
            p = link[p]
        link[q] = link[state] = clone
        return state

    def _state(self, edges: dict[int, int], depth: int, end: int) -> int:
        self.edges.append(edges)
        self.link.append(0)
        self.depth.append(depth)
        self.end.append(end)
        return len(self.edges) - 1

    def continuation(self, count: int) -> list[int]:
        """Up to `count` tokens that followed the match; if the text ends before that, it is taken to repeat itself."""
        if self.match_length == 0:
            return []
        start = self.match_end + 1
        period = len(self.tokens) - start
        return [self.tokens[start + i % period] for i in range(count)]


class NgramDrafter:
    """Drafts what followed the longest suffix of prompt and output that occurred before."""

    name = "ngram"
    looks_up = True

    def __init__(self, min_match: int = MIN_MATCH) -> None:
        self.min_match = min_match
        self.indices: defaultdict[Request, SuffixIndex] = defaultdict(SuffixIndex)

    def propose(self, requests: list[Request], policy: DraftPolicy) -> list[Draft]:
        return [self._draft(request, policy) for request in requests]

    def _draft(self, request: Request, policy: DraftPolicy) -> Draft:
        index = self.indices[request]
        for token in request.token_ids[len(index.tokens) :]:
            index.append(token)
        if not request.draft_limit or index.match_length < self.min_match:
            return Draft(source=self.name)
        confidence = 1 - 1 / (1 + index.match_length)
        tokens = index.continuation(request.draft_limit)
        confidences: tuple[float, ...] = (confidence,)
        while len(confidences) < len(tokens) and policy.go_on(request, confidences):
            confidences += (confidence,)
        return Draft(tuple(tokens[: len(confidences)]), self.name, confidences=confidences)

    def observe(self, request: Request, verdict: Verdict) -> None:
        pass

    def forget(self, request: Request) -> None:
        self.indices.pop(request, None)
