"""Prefixes: pages by the tokens that they hold and all those before them, those of ended texts among them.

A page is found by its own tokens and the page before it, compared as they are: no hash decides what is equal. Knows
nothing of slots, models or requests.
"""

from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import count

import torch

Key = tuple[int | str, bytes]
"""The number of the page before (of a text's first page: the name under which texts share), and the page's tokens."""


class Page:
    """Keys and values of one page's tokens, and how many texts hold it."""

    __slots__ = ("key", "memory", "number", "users")

    def __init__(self, memory: torch.Tensor) -> None:
        self.memory = memory
        self.users = 1
        self.key: Key | None = None  # once it is shared; from then on nobody writes it
        self.number = 0  # no other page ever has this one


class Prefixes:
    """Pages that others may take, whether a running text holds them or they are idle.

    A text gives its pages back last page first, and takes them first page first. So a page is never less recently used
    than one that follows it, and the first to go is always one that nothing follows.
    """

    def __init__(self, size: int) -> None:
        self.size = size  # tokens in a page
        self.idle: OrderedDict[Page, None] = OrderedDict()  # that no text holds, the least recently used first
        self._pages: dict[Key, Page] = {}
        self._numbers = count(1)

    def __len__(self) -> int:
        return len(self._pages)

    def take(self, before: int | str, tokens: Sequence[int]) -> Iterator[Page]:
        """Pages that hold these tokens after that page, one after the other; whoever asked holds them from now on."""
        for start in range(0, len(tokens) - self.size + 1, self.size):
            page = self._pages.get(self._key(before, tokens[start : start + self.size]))
            if page is None:
                return
            self._hold(page)
            before = page.number
            yield page

    def share(self, page: Page, before: int | str, tokens: Sequence[int]) -> Page:
        """Let others find a page that holds these tokens; returns the one to hold: this, or an equal one there is."""
        key = self._key(before, tokens)
        found = self._pages.get(key)
        if found is not None:
            self._hold(found)
            return found
        page.key, page.number = key, next(self._numbers)
        self._pages[key] = page
        return page

    def drop(self, page: Page) -> bool:
        """One text less holds a page; whether nobody ever will, so that its memory is free."""
        page.users -= 1
        if page.users or page.key is None:
            return not page.users
        self.idle[page] = None
        return False

    def trim(self, keep: int) -> list[Page]:
        """Forget idle pages until `keep` are left; returns them."""
        gone = []
        while len(self.idle) > keep:
            page, _ = self.idle.popitem(last=False)
            assert page.key is not None
            del self._pages[page.key]
            gone.append(page)
        return gone

    def _hold(self, page: Page) -> None:
        page.users += 1
        self.idle.pop(page, None)

    def _key(self, before: int | str, tokens: Sequence[int]) -> Key:
        return before, array("i", tokens).tobytes()
