"""The drafting options of transformers and IPEX-LLM under their own names, and the drafters and policies they ask for.

These options change when tokens arrive, never which. Knows nothing of prompts, tensors or loading.
"""

from dataclasses import dataclass
from typing import Any, Literal, get_args

from foredraft.drafters.ngram import MIN_MATCH, NgramDrafter
from foredraft.errors import RequestError
from foredraft.policy import DraftPolicy, Fixed, Gain, Threshold
from foredraft.types import Draft, Request, Verdict

Schedule = Literal["constant", "heuristic", "heuristic_transient"]

ASSISTED = (
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "assistant_confidence_threshold",
    "prompt_lookup_num_tokens",
    "max_matching_ngram_size",
)
IPEX = ("max_step_draft", "th_stop_draft", "auto_th_stop_draft", "auto_parameters", "hf_adjust", "min_step_draft")
NAMES = (*ASSISTED, *IPEX, "assistant_model", "lookahead", "num_draft_tokens", "th_batch_num")
LENGTHS = ("num_assistant_tokens", "prompt_lookup_num_tokens", "lookahead", "max_step_draft", "num_draft_tokens")
IPEX_DEFAULTS: dict[str, Any] = {
    "max_step_draft": 8,
    "th_stop_draft": 0.8,
    "auto_th_stop_draft": True,
    "auto_parameters": (1, 0.5, 0.9, 1e-2, 0.9),
    "hf_adjust": False,
    "min_step_draft": 3,
}


class Assisted(Fixed):
    """transformers' assisted generation: a length, its schedule, and an exit at a fixed confidence.

    `heuristic` drafts 2 more after a draft that was accepted whole and 1 fewer otherwise, and the next request starts
    with the length that this one ended with; `heuristic_transient` starts every request with the same length. The token
    whose confidence was too low is still verified.
    """

    def __init__(self, num_draft_tokens: int, schedule: Schedule = "constant", threshold: float = 0.0) -> None:
        super().__init__(num_draft_tokens)
        self.schedule = schedule
        self.threshold = threshold

    def go_on(self, request: Request, confidences: tuple[float, ...]) -> bool:
        return confidences[-1] >= self.threshold

    def observe(self, request: Request, draft: Draft, verdict: Verdict) -> None:
        if draft.tokens and self.schedule != "constant":
            self.lengths[request] = max(1, self.start(request) + (2 if verdict.kind == "bonus" else -1))

    def forget(self, request: Request) -> None:
        if self.schedule == "heuristic":
            self.num_draft_tokens = self.start(request)
        super().forget(request)


class IpexPolicy(Threshold):
    """IPEX-LLM's draft exit: the adapting threshold, no exit before `least` tokens when sampling, `hf_adjust`.

    With `hf_adjust` the longest draft grows by 1 after a draft that was accepted whole, up to 5 above its first value,
    and shrinks by 1 otherwise.
    """

    def __init__(self, maximum: int, threshold: float, least: int, *, hf_adjust: bool, **rule: Any) -> None:
        super().__init__(maximum, threshold, **rule)
        self.least = least
        self.hf_adjust = hf_adjust

    def go_on(self, request: Request, confidences: tuple[float, ...]) -> bool:
        early = not request.params.greedy and len(confidences) < self.least
        return early or super().go_on(request, confidences)

    def observe(self, request: Request, draft: Draft, verdict: Verdict) -> None:
        super().observe(request, draft, verdict)
        if self.hf_adjust and draft.tokens:
            step = 1 if verdict.kind == "bonus" else -1
            most = self.num_draft_tokens + 5
            self.lengths[request] = min(most, max(1, self.start(request) + step))


@dataclass(frozen=True, slots=True)
class Drafting:
    """The drafting options that one call was given. For what it does not say, the model drafts in its usual way."""

    assistant: Any = None
    options: tuple[tuple[str, Any], ...] = ()  # sorted by name

    @classmethod
    def take(cls, kwargs: dict[str, Any], *configs: Any) -> "Drafting":
        """Take the options out of a call's keywords; transformers' own may also stand in a generation configuration.

        Raises:
            RequestError: an option has a value that is not usable, or two contradict each other.
        """
        given = {name: kwargs.pop(name, None) for name in NAMES}
        for name in ASSISTED:
            found = (getattr(config, name, None) for config in configs)
            given[name] = next((v for v in (given[name], *found) if v is not None), None)
        assistant = given.pop("assistant_model")
        given = {name: _hashable(value) for name, value in given.items() if value is not None}
        _check(given, assistant)
        return cls(assistant, tuple(sorted(given.items())))

    @property
    def learns_on(self) -> bool:
        """Whether the policy is kept for the next call with the same options, with what it has learned."""
        given = dict(self.options)
        return "lookahead" in given or given.get("num_assistant_tokens_schedule") == "heuristic"

    @property
    def lookup(self) -> bool:
        return any(name in ("prompt_lookup_num_tokens", "lookahead") for name, _ in self.options)

    def drafter(self) -> NgramDrafter:
        """The n-gram drafter that `prompt_lookup_num_tokens` and `lookahead` ask for.

        It takes the longest match whatever its length, so `max_matching_ngram_size` can only allow matches of 1 token.
        """
        return NgramDrafter(min(MIN_MATCH, dict(self.options).get("max_matching_ngram_size", MIN_MATCH)))

    def policy(self, most: int) -> DraftPolicy | None:
        """How far to draft; None leaves it to the model's policy. `most` is the longest draft that was probed exact.

        Raises:
            RequestError: a draft longer than that was asked for.
        """
        given = dict(self.options)
        for name in LENGTHS:
            if given.get(name, 0) > most:
                raise RequestError(
                    f"{name}={given[name]} is not usable; it must be at most {most}, since wider passes are not known "
                    "to be exact"
                )
        if "num_draft_tokens" in given:
            return Fixed(given["num_draft_tokens"])
        if any(name in given for name in IPEX):
            return _ipex_policy(given)
        if "lookahead" in given:
            return Gain(maximum=given["lookahead"])
        default = given.get("prompt_lookup_num_tokens", min(20, most))
        if "prompt_lookup_num_tokens" in given or any(name in given for name in ASSISTED[:3]):
            return Assisted(
                given.get("num_assistant_tokens", default),
                given.get("num_assistant_tokens_schedule", "constant"),
                given.get("assistant_confidence_threshold", 0.0),
            )
        return None


def _ipex_policy(given: dict[str, Any]) -> IpexPolicy:
    given = IPEX_DEFAULTS | given
    _, b1, alpha, eps, b2 = given["auto_parameters"]
    return IpexPolicy(
        given["max_step_draft"],
        given["th_stop_draft"],
        given["min_step_draft"],
        hf_adjust=given["hf_adjust"],
        adaptive=given["auto_th_stop_draft"],
        alpha=alpha,
        eps=eps,
        b1=b1,
        b2=b2,
    )


def _check(given: dict[str, Any], assistant: Any) -> None:
    if "th_batch_num" in given:
        raise RequestError(f"th_batch_num={given['th_batch_num']!r} has no effect in IPEX-LLM, and none here; drop it")
    for name in ("num_assistant_tokens", "prompt_lookup_num_tokens", "max_matching_ngram_size", "lookahead"):
        _require(given, name, lambda v: _is_int(v) and v >= 1, "an integer, 1 or more")
    _require(given, "max_step_draft", lambda v: _is_int(v) and v >= 1, "an integer, 1 or more")
    _require(given, "num_draft_tokens", lambda v: _is_int(v) and v >= 0, "an integer, 0 (plain decoding) or more")
    _require(given, "min_step_draft", lambda v: _is_int(v) and v >= 0, "an integer, 0 or more")
    for name in ("assistant_confidence_threshold", "th_stop_draft"):
        _require(given, name, lambda v: isinstance(v, (int, float)) and 0 <= v <= 1, "in [0, 1]")
    schedules = get_args(Schedule)
    _require(given, "num_assistant_tokens_schedule", lambda v: v in schedules, f"one of {', '.join(schedules)}")
    wanted = "(1, beta1, alpha, eps, beta2): the threshold is updated after every verification"
    _require(given, "auto_parameters", lambda v: isinstance(v, tuple) and len(v) == 5 and v[0] == 1, wanted)
    _check_together(given, assistant)


def _check_together(given: dict[str, Any], assistant: Any) -> None:
    drafters: list[str] = [name for name in ("prompt_lookup_num_tokens", "lookahead") if name in given]
    drafters += ["assistant_model"] if assistant is not None else []
    if len(drafters) > 1:
        raise RequestError(f"{' and '.join(drafters)} contradict each other: they are different drafters; give one")
    rules = [[name for name in names if name in given] for names in (ASSISTED[:3], IPEX, ("num_draft_tokens",))]
    rules.append(["lookahead"] if "lookahead" in given else [])
    if sum(map(bool, rules)) > 1:
        names = ", ".join(name for rule in rules for name in rule)
        raise RequestError(f"{names} are different rules of how far to draft; give those of one library")
    if "max_matching_ngram_size" in given and not drafters:
        size = given["max_matching_ngram_size"]
        raise RequestError(f"max_matching_ngram_size={size} needs prompt_lookup_num_tokens=... or lookahead=...")


def _require(given: dict[str, Any], name: str, valid: Any, wanted: str) -> None:
    if name in given and not valid(given[name]):
        raise RequestError(f"{name}={given[name]!r} is not usable; it must be {wanted}")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
