"""Lend a loaded LLM another drafter, so that all candidates share one target."""

from collections.abc import Iterator
from contextlib import contextmanager

from foredraft.drafters.base import Drafter
from foredraft.llm import LLM
from foredraft.policy import DraftPolicy, PerRequest


@contextmanager
def driven_by(llm: LLM, drafter: Drafter, policy: DraftPolicy | None = None) -> Iterator[LLM]:
    """Until the block ends the LLM drafts with this drafter, and with this policy if one is given."""
    assert not llm.engine.has_work, "a drafter cannot change while requests run"
    before, policy_before = llm.engine.drafter, llm.engine.policy
    llm.engine.drafter = drafter
    if policy is not None:
        llm.engine.policy = PerRequest(policy)
    try:
        yield llm
    finally:
        llm.engine.drafter, llm.engine.policy = before, policy_before
