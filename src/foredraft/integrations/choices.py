"""The drafters and policies that calls of one model ask for: each made once, and kept for the next call that asks."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from foredraft.drafters.base import Drafter
from foredraft.engine import Engine
from foredraft.integrations.drafting import Drafting
from foredraft.integrations.recipe import Recipe
from foredraft.models.base import CausalModel
from foredraft.policy import DraftPolicy


class Choices:
    """Of one target, by what was asked for."""

    def __init__(self, recipe: Recipe, target: CausalModel) -> None:
        self.recipe = recipe
        self.target = target
        self._drafters: dict[Any, Drafter] = {}
        self._policies: dict[Any, DraftPolicy] = {}

    def applied(self, engine: Engine, drafting: Drafting) -> AbstractContextManager[None]:
        """What a call asks for, until it ends."""
        return engine.using(self.drafter(drafting), self.policy(drafting))

    def policy(self, drafting: Drafting) -> DraftPolicy | None:
        """The policy asked for, if any; one that learns on is kept."""
        policy = drafting.policy(self.target.row_invariance.max_draft_tokens)
        if policy is None or not drafting.learns_on:
            return policy
        return self._policies.setdefault(drafting.options, policy)

    def drafter(self, drafting: Drafting) -> Drafter | None:
        """The drafter asked for, if any."""
        if drafting.lookup:
            return self._kept(("ngram", drafting.drafter().min_match), drafting.drafter)
        if drafting.assistant is None:
            return None
        spec = _source_of(drafting.assistant)
        return self._kept(spec, lambda: self.recipe.drafter(spec, self.target))

    def _kept(self, key: Any, make: Callable[[], Drafter]) -> Drafter:
        if key not in self._drafters:
            self._drafters[key] = make()
        return self._drafters[key]


def _source_of(assistant: Any) -> Any:
    """What a drafter is made from. For a model of ours: what that was made from, as its cache cannot be shared."""
    recipe = getattr(assistant, "recipe", None)
    return recipe.source if isinstance(recipe, Recipe) else assistant
