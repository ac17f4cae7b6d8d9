"""Another drafter in a loaded LLM for a while, so that all candidates share one target."""

from collections.abc import Iterator
from contextlib import contextmanager

from foredraft.drafters.base import Drafter
from foredraft.llm import LLM
from foredraft.policy import DraftPolicy


@contextmanager
def driven_by(llm: LLM, drafter: Drafter, policy: DraftPolicy | None = None) -> Iterator[LLM]:
    """The same LLM with another drafter, and another policy where one is given, until the block ends."""
    with llm.engine.using(drafter, policy):
        yield llm
