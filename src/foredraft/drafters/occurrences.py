"""Where the end of a text occurred before, and which draft follows from what came after those places.

The rule is suffix decoding's (Oliaro et al. 2024, arXiv 2411.04975): for every match length a draft that follows the
most frequent next token while it stays likely enough; the draft with the best score wins. Instead of a tree over all
suffixes, which takes kilobytes a token in Python, positions that end in the same two, or the same five, tokens are
linked from the newest to older ones. What would be the counts of a tree's nodes is counted among the newest of these
positions when a draft is made, so that what was said lately counts most.
"""

from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

SHORT, LONG = GRAMS = (2, 5)  # tokens in common by which places are linked; shorter ones recur by chance
NEWEST = 16  # places that a draft is made from, at most
END = -1  # stands after each text
TOKEN_BYTES = 4 + 8 * len(GRAMS)
KEY_BYTES = 150  # of an entry of `heads`: measured with Python 3.11 to 3.13


@dataclass(frozen=True, slots=True)
class SuffixRule:
    """How a draft follows from matches; the defaults are the paper's."""

    depth: int = 32  # longest match that is told apart
    factor: float = 1.0  # a match of m tokens gives a draft of at most m * factor + offset
    offset: float = 0.0
    least: float = 0.1  # of the product of child.count / node.count; a draft ends before it falls to this

    def longest(self, match: int, limit: int) -> int:
        return min(limit, int(match * self.factor + self.offset))


@dataclass(frozen=True, slots=True)
class Guess:
    """A draft, each token's share of the places it was seen to follow at, and the sum of the products of these."""

    tokens: tuple[int, ...] = ()
    shares: tuple[float, ...] = ()
    score: float = 0.0
    match: int = 0


NOTHING = Guess()


class Texts:
    """Texts one after another, of which the oldest can be dropped. Positions count from the first token ever added."""

    def __init__(self) -> None:
        self.tokens = array("i")
        self.base = 0  # position of tokens[0]
        self.begins = 0  # position of the first token that is not dropped
        self.open = 0  # tokens since the last END
        self.ended: deque[int] = deque()  # tokens of each text, END included
        self.heads: dict[bytes, int] = {}  # by gram: the newest position that ends with it
        self.links = tuple(array("q") for _ in GRAMS)  # by position: the one before that ends with the same gram

    @property
    def nbytes(self) -> int:
        return TOKEN_BYTES * len(self.tokens) + KEY_BYTES * len(self.heads)

    def extend(self, new: Iterable[int]) -> None:
        """Add tokens to the text at hand."""
        known, heads = min(self.open, LONG - 1), self.heads  # tokens before, of the first grams
        first = len(self.tokens)
        self.tokens.extend(new)
        count, size = len(self.tokens) - first, self.tokens.itemsize
        data = self.tokens[first - known :].tobytes()
        for gram, links in zip(GRAMS, self.links, strict=True):
            short = min(count, max(0, gram - 1 - known))  # tokens that end no gram yet
            at, width = size * (known + short + 1 - gram), size * gram
            befores = [-1] * short
            for place in range(self.base + first + short, self.base + first + count):
                key = data[at : at + width]
                befores.append(heads.get(key, -1))
                heads[key] = place
                at += size
            links.extend(befores)
        self.open += count

    def end(self) -> None:
        """The text at hand is complete; what is added from here on is another one."""
        self.ended.append(self.open + 1)
        self.tokens.append(END)
        for links in self.links:
            links.append(-1)
        self.open = 0

    def drop_oldest(self) -> None:
        """Forget the oldest complete text, every trace of it."""
        length, first = self.ended.popleft(), self.begins - self.base
        for gram in GRAMS:
            for i in range(first + gram - 1, first + length - 1):
                key = self.tokens[i - gram + 1 : i + 1].tobytes()
                if self.heads.get(key) == self.base + i:
                    del self.heads[key]
        self.begins += length
        dead = self.begins - self.base
        if 2 * dead >= len(self.tokens):
            del self.tokens[:dead]
            for links in self.links:
                del links[:dead]
            self.base = self.begins

    def guess(self, tail: Sequence[int], limit: int, rule: SuffixRule) -> Guess:
        """The best draft after a text that ends with `tail`, its last `rule.depth` tokens or all of it.

        Where `tail` is the end of the text at hand, that end itself is no match.
        """
        ending = array("i", tail)
        best = NOTHING
        for gram in (LONG, SHORT):
            if best.score < rule.longest(LONG - 1, limit):  # else no match shorter than LONG can do better
                best = _best([*self._matches(ending, gram, limit)], limit, rule, best)
        return best

    def _matches(self, ending: "array[int]", gram: int, limit: int) -> Iterator[tuple[int, Sequence[int]]]:
        """Match length and what followed, for each of the newest places that end with the last `gram` tokens."""
        place = self.heads.get(ending[-gram:].tobytes(), -1) if len(ending) >= gram else -1
        links, last = self.links[GRAMS.index(gram)], self.base + len(self.tokens) - 1
        number = int.from_bytes(ending.tobytes(), "little")
        if place == last >= self.begins:
            place = links[place - self.base]
        for _ in range(NEWEST):
            if place < self.begins:
                break
            yield self._match(place, number, len(ending)), self._after(place, limit)
            place = links[place - self.base]

    def _match(self, place: int, ending: int, length: int) -> int:
        """How many tokens before and at this place are the ending's: by the highest bit in which both differ."""
        stop = place - self.base + 1
        room = min(length, stop)
        mine = int.from_bytes(self.tokens[stop - room : stop].tobytes(), "little")
        differ = mine ^ (ending >> (32 * (length - room)))
        return room - (differ.bit_length() + 31) // 32

    def _after(self, place: int, count: int) -> Sequence[int]:
        """Up to `count` tokens that followed. Where the text at hand ends it is taken to repeat itself."""
        start = place - self.base + 1
        path = self.tokens[start : start + count]
        if END in path:
            return path[: path.index(END)]
        if len(path) < count:
            path = (path * (count // len(path) + 1))[:count]
        return path


def _best(matches: list[tuple[int, Sequence[int]]], limit: int, rule: SuffixRule, best: Guess) -> Guess:
    """Over all match lengths; of equal scores that of the longer match."""
    for match in sorted({match for match, _ in matches}, reverse=True):
        longest = rule.longest(match, limit)
        if longest <= best.score:
            break
        found = _follow([path for length, path in matches if length >= match], longest, match, rule)
        best = max(best, found, key=lambda guess: guess.score)
    return best


def _follow(paths: list[Sequence[int]], longest: int, match: int, rule: SuffixRule) -> Guess:
    """The most frequent next token, again and again; of equally frequent ones the one that was seen last."""
    tokens: list[int] = []
    shares: list[float] = []
    score, product = 0.0, 1.0
    for i in range(longest):
        if all(path == paths[0] for path in paths):
            rest = paths[0][i:longest]
            return Guess((*tokens, *rest), (*shares, *[1.0] * len(rest)), score + product * len(rest), match)
        counts: dict[int, int] = {}
        for path in paths:
            if len(path) > i:
                counts[path[i]] = counts.get(path[i], 0) + 1
        token = max(counts, key=counts.__getitem__)
        share = counts[token] / len(paths)
        product *= share
        if product <= rule.least:
            break
        tokens.append(token)
        shares.append(share)
        score += product
        paths = [path for path in paths if len(path) > i and path[i] == token]
    return Guess(tuple(tokens), tuple(shares), score, match)
