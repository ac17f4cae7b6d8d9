"""Another drafter in a loaded LLM for a while, so that all candidates share one target."""

from collections.abc import Iterator
from contextlib import contextmanager

from foredraft.drafters.base import Drafter
from foredraft.llm import LLM
from foredraft.policy import DraftPolicy, PerRequest


@contextmanager
def driven_by(llm: LLM, drafter: Drafter, policy: DraftPolicy | None = None) -> Iterator[LLM]:
    """The same LLM with another drafter, and another policy where one is given, until the block ends."""
    assert not llm.engine.has_work, "a drafter cannot change while requests run"
    before, policy_before = llm.engine.drafter, llm.engine.policy
    llm.engine.drafter = drafter
    if policy is not None:
        llm.engine.policy = PerRequest(policy)
    try:
        yield llm
    finally:
        llm.engine.drafter, llm.engine.policy = before, policy_before
