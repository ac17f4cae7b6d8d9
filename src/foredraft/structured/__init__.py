"""Output under a grammar: what is asked for, how it is compiled, and how it follows a text token by token.

Knows tokenizers and grammars, and nothing of models, drafts or engines.
"""

from foredraft.structured.constraint import Constraint
from foredraft.structured.spec import Structured

__all__ = ["Constraint", "Structured"]
