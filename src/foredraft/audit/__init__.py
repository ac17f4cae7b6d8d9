"""Audit: evidence, made on the user's own machine, that drafting changes nothing; and that the evidence would show it.

`exact` compares tokens and logits with plain decoding's bit for bit, `distribution` tests what rejection sampling draws
against exact probabilities. `controls` plants known bugs, each of which these same checks must catch.
"""

from foredraft.audit.options import AuditOptions
from foredraft.audit.pipeline import audit
from foredraft.audit.result import Audit

__all__ = ["Audit", "AuditOptions", "audit"]
