"""Who could draft for a model: the drafters that build, why others do not, and the turns that price them all."""

from dataclasses import dataclass

from foredraft.drafters.base import Drafter
from foredraft.drafters.make import DraftContext, make_drafter
from foredraft.drafters.model import ModelDrafter
from foredraft.drafters.registry import DRAFTERS, drafting
from foredraft.drafters.self_draft import SelfDrafter
from foredraft.errors import ModelError
from foredraft.llm import LLM
from foredraft.models.base import CausalModel, SkipSet
from foredraft.models.load import LoadOptions
from foredraft.tuning.acceptance import Acceptance
from foredraft.tuning.carousel import Repeat
from foredraft.tuning.costs import DraftCost, Turn
from foredraft.tuning.fitting import REPEAT
from foredraft.tuning.forecast import MAX_GAMMA
from foredraft.tuning.options import TuneOptions

OWN = "own"  # the weights of a search that quantises nothing
SEARCHES = {name: DRAFTERS[name].weight_format or OWN for name in drafting() if DRAFTERS[name].needs_profile}
GAMMAS = (2, 6)  # draft lengths that are timed
MORE_GAMMAS = (1, 4, 10, MAX_GAMMA)  # of wider passes, on a drafter that costs nothing


@dataclass(frozen=True, slots=True)
class Scored:
    """A drafter with its acceptance and its price."""

    name: str
    drafter: Drafter
    acceptance: Acceptance
    cost: DraftCost
    skip: SkipSet | None = None


@dataclass(frozen=True, slots=True)
class Candidates:
    """Drafters that need no search, what each search runs on, and what the model refuses with the reason."""

    drafters: dict[str, Drafter]
    bases: dict[str, CausalModel]  # by search
    refused: dict[str, str]


def find_candidates(llm: LLM, options: TuneOptions, load: LoadOptions) -> Candidates:
    """Raises ModelError where a draft model of the options does not load."""
    context = DraftContext(
        llm.model,
        llm._tokenizer,
        load,
        remember=False,  # the same prompts come again and again
        weight_format=options.draft_weight_format,
    )
    wanted = [name for name in drafting() if name not in options.without]
    searches = [name for name in wanted if name in SEARCHES]
    found: dict[str, Drafter] = {}
    refused: dict[str, str] = {}
    hidden = [_of_weights(SEARCHES[name]) for name in searches]  # a search may run on a drafter that is left out
    for name in dict.fromkeys([*(it for it in wanted if it not in SEARCHES), *hidden]):
        try:
            if name:
                found[name] = make_drafter(name, context)
        except ModelError as error:
            refused[name] = str(error)
    found.update({draft: make_drafter(draft, context) for draft in options.drafts})
    refused.update(_refused_searches(llm.model))
    bases = {name: _base(llm.model, SEARCHES[name], found) for name in searches if name not in refused}
    return Candidates(found, {name: base for name, base in bases.items() if base is not None}, refused)


def _of_weights(weights: str) -> str:
    """The drafter that has these weights whole; empty for the target's own."""
    return next((k.name for k in DRAFTERS.values() if k.weight_format == weights and not k.needs_profile), "")


def _refused_searches(model: CausalModel) -> dict[str, str]:
    try:
        model.variant(skip=SkipSet((), (model.num_layers - 1,)))
    except ModelError as error:
        return dict.fromkeys(SEARCHES, str(error))
    return {}


def _base(model: CausalModel, weights: str, drafters: dict[str, Drafter]) -> CausalModel | None:
    if weights == OWN:
        return model
    found = drafters.get(_of_weights(weights))
    return found.model if isinstance(found, SelfDrafter) else None


def timed_turns(candidates: Candidates, most: int) -> list[Turn]:
    """What has to be timed to price every candidate; `most` is the longest draft that is exact."""
    drafters = candidates.drafters.items()
    turns = [Turn(name, drafter, min(gamma, most)) for name, drafter in drafters for gamma in GAMMAS]
    turns += wide_passes(most)
    for name, base in candidates.bases.items():
        turns += family(SEARCHES[name], base)
    return turns


def wide_passes(most: int = MAX_GAMMA) -> list[Turn]:
    return [Turn(REPEAT, Repeat(), min(gamma, most)) for gamma in MORE_GAMMAS]


def family(weights: str, base: CausalModel) -> list[Turn]:
    """Drafts with different shares of the sub-layers, to fit a sub-layer's price to."""
    layers = base.num_layers
    odd, most = range(1, layers, 2), [i for i in range(layers) if i % 4]
    sets = [SkipSet((), ()), SkipSet(tuple(odd), ()), SkipSet((), tuple(odd)), SkipSet(tuple(most), tuple(most))]
    drafters = [(skip, SelfDrafter(base, weights, None, skip)) for skip in sets if len(skip) < 2 * layers]
    return [
        Turn(f"{weights} {i}", drafter, gamma, weights, layers - len(skip.attention), layers - len(skip.mlp))
        for i, (skip, drafter) in enumerate(drafters)
        for gamma in GAMMAS
    ]


def added_memory(drafter: Drafter) -> int:
    """Bytes beside the target's own."""
    if isinstance(drafter, SelfDrafter):
        return drafter.weight_bytes
    if isinstance(drafter, ModelDrafter):
        return drafter.model.weight_bytes + drafter.model.cache.nbytes
    return 0
