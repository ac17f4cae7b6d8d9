"""Meter: what following a grammar costs one request, so that it cannot hold up those beside it for long.

A credit of seconds: every call of the matcher draws on it, every token that is kept adds to it. Seconds are the calling
thread's own, so that a busy machine makes nothing dear. To read those takes longer than some calls, so as long as all
are brief they are counted by the wall clock.
"""

import time
from collections.abc import Callable
from typing import TypeVar

from foredraft.errors import GrammarError

CREDIT = 1.0  # seconds that a request may run ahead
ALLOWANCE = 0.02  # seconds that each token adds: a mask takes well under 1 ms as a rule
BRIEF = 0.001  # seconds of a call
CALM = 16  # brief calls in a row: those that take long may alternate with others
Result = TypeVar("Result")


class Meter:
    """The credit of one request."""

    def __init__(self, wall: Callable[[], float] = time.perf_counter, own: Callable[[], float] = time.thread_time):
        self.wall, self.own = wall, own
        self.credit = CREDIT
        self.watched = 0  # calls to be counted by the thread's own time

    def timed(self, call: Callable[..., Result], *arguments: object) -> Result:
        """The call's result; its time is charged."""
        if self.watched:
            return self._watch(call, arguments)
        began = self.wall()
        try:
            return call(*arguments)
        finally:
            seconds = self.wall() - began
            if seconds >= BRIEF:
                self.watched, seconds = CALM, BRIEF
            self.credit -= seconds

    def _watch(self, call: Callable[..., Result], arguments: tuple[object, ...]) -> Result:
        """`timed` by the thread's own time."""
        began = self.own()
        try:
            return call(*arguments)
        finally:
            seconds = self.own() - began
            self.watched = CALM if seconds >= BRIEF else self.watched - 1
            self.credit -= seconds

    def allow(self, tokens: int) -> None:
        """So many tokens were kept."""
        self.credit = min(CREDIT, self.credit + tokens * ALLOWANCE)

    @property
    def low(self) -> bool:
        """Whether looking ahead should stop: plain decoding asks for one mask a token."""
        return self.credit < CREDIT / 2

    def check(self) -> None:
        """Raises GrammarError where the credit is used up."""
        if self.credit < 0:
            raise GrammarError(
                f"the grammar costs too much to follow: more than {ALLOWANCE * 1e3:g} ms a token for too long; make it "
                "simpler, with shorter texts and fewer ways to read the same text"
            )
