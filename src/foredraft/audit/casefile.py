"""A case as text, to be replayed by a command: what `foredraft audit --case` reads."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from itertools import starmap
from typing import Any

from foredraft.audit.asks import DECIDED, FORMS, OWN, SETTINGS, Ask
from foredraft.audit.exact import Case
from foredraft.audit.recorded import Drafted
from foredraft.errors import RequestError
from foredraft.steering import Processor, Stateful
from foredraft.structured import Structured
from foredraft.types import SamplingParams

FORMAT = 1
ASK = ("setting", "num_draft_tokens", "arrives", "leaves", "drafts")
DEFAULTS = SamplingParams()


def dumps(case: Case) -> str:
    """One line of JSON. Processors are not in it: the audit's own come back by the name of their setting, the user's
    are given to `loads`.
    """
    asks = [{"prompt": list(ask.prompt), "params": _params(ask.params)} | _timing(ask) for ask in case.asks]
    found = {"format": FORMAT, "batch": case.batch, "index": case.index, "asks": asks}
    if case.warm:
        found["warm"] = True
    return json.dumps(found, separators=(",", ":"))


def _timing(ask: Ask) -> dict[str, Any]:
    return {name: getattr(ask, name) for name in ASK if getattr(ask, name) != getattr(Ask((), DEFAULTS), name)}


def _params(params: SamplingParams) -> dict[str, Any]:
    names = [spec.name for spec in fields(params) if spec.name not in ("processors", "structured")]
    found = {name: getattr(params, name) for name in names if getattr(params, name) != getattr(DEFAULTS, name)}
    if isinstance(params.structured, Structured):
        found["structured"] = {"kind": params.structured.kind, "source": params.structured.source}
    return found


def loads(text: str, processors: Sequence[Processor | Stateful] = ()) -> Case:
    """`processors` are the user's own, for requests in settings of his. Raises RequestError where this is no case."""
    try:
        found = json.loads(text)
        if found["format"] != FORMAT:
            raise ValueError(f"format {found['format']}, and this release reads format {FORMAT}")
        asks = tuple(_ask(it, tuple(processors)) for it in found["asks"])
        case = Case(asks, int(found["batch"]), int(found["index"]), bool(found.get("warm")))
        if case.batch < 1 or not 0 <= case.index < len(asks):
            raise ValueError(f"batch {case.batch} and index {case.index} of {len(asks)} requests")
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        problem = f"{type(error).__name__}: {error}"
        raise RequestError(f"the case is not usable ({problem}); copy the whole line that the audit printed") from error
    return case


def _ask(found: Mapping[str, Any], own: tuple[Processor | Stateful, ...]) -> Ask:
    params = dict(found["params"])
    if "structured" in params:
        params["structured"] = Structured(params["structured"]["kind"], params["structured"]["source"])
    if "logit_bias" in params:
        params["logit_bias"] = {int(token): bias for token, bias in params["logit_bias"].items()}
    setting = found.get("setting", "")
    params["processors"] = (
        own if setting.startswith(OWN) else (SETTINGS | DECIDED | FORMS).get(setting, DEFAULTS).processors
    )
    timing = {name: found[name] for name in ASK if name in found}
    if "drafts" in timing:
        made = [(int(limit), int(length), str(source)) for limit, length, source in timing["drafts"]]
        timing["drafts"] = tuple(starmap(Drafted, made))
    return Ask(tuple(map(int, found["prompt"])), SamplingParams(**params), **timing)
