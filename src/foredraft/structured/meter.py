"""Meter: what following a grammar costs one request, so that it cannot hold up those beside it for long.

A credit of seconds: every call of the matcher draws on it, every token that is kept adds to it. Seconds are the calling
thread's own, so that a busy machine makes nothing dear. To read those takes longer than some calls, so what follows a
brief call is counted by the wall clock.
"""

import time
from collections.abc import Callable
from typing import TypeVar

from foredraft.errors import GrammarError

CREDIT = 1.0  # seconds that a request may run ahead
ALLOWANCE = 0.02  # seconds that each token adds: a mask takes well under 1 ms as a rule
BRIEF = 0.001  # seconds of a call
Result = TypeVar("Result")


class Meter:
    """The credit of one request."""

    def __init__(self, wall: Callable[[], float] = time.perf_counter, own: Callable[[], float] = time.thread_time):
        self.wall, self.own = wall, own
        self.credit = CREDIT
        self.brief = True  # was the last call?

    def timed(self, call: Callable[..., Result], *arguments: object) -> Result:
        """The call's result; its time is charged."""
        clock = self.wall if self.brief else self.own
        began = clock()
        result = call(*arguments)
        seconds = clock() - began
        self.credit -= seconds if seconds < BRIEF or not self.brief else BRIEF
        self.brief = seconds < BRIEF
        return result

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
