"""From a request's body to sampling parameters; what the schema alone cannot check is checked here.

Knows the defaults of OpenAI's interface and the limits of the operator. Knows nothing of engines.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from foredraft.server.errors import ApiError
from foredraft.server.schemas import ChatRequest, CompletionRequest, Generate
from foredraft.server.settings import Limits
from foredraft.structured import Structured
from foredraft.types import SamplingParams

COMPLETION_TOKENS = 16  # OpenAI's default for completions; a chat goes on until it ends
OFF = ("none", "off")  # no drafts
MOST_BIAS = 1e6  # far beyond any score, and far from where scores overflow
TEMPERATURE = 1.0  # as above, for both


def sampling_params(body: Generate, limits: Limits, *, longest: int) -> SamplingParams:
    """The parameters of a request's first choice; `longest` is the model's context.

    Raises:
        ApiError: a field is over a limit, or contradicts another.
        RequestError: a value is out of range.
    """
    _check(body, limits)
    temperature = TEMPERATURE if body.temperature is None else body.temperature
    greedy = temperature == 0  # then no filter can change which token is likeliest, and none needs to run
    return SamplingParams(
        temperature=temperature,
        top_k=0 if greedy else max(0, body.top_k or 0),
        top_p=1.0 if greedy or body.top_p is None else body.top_p,
        min_p=0.0 if greedy else body.min_p or 0.0,
        repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias=_bias(body.logit_bias or {}),
        seed=body.seed,
        max_new_tokens=_max_tokens(body, limits, longest),
        stop=tuple(body.stops),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        ignore_eos=bool(body.ignore_eos),
        logprobs=_logprobs(body),
        verifier=body.verifier or "coupled",
        structured=_form(body),
    )


def _form(body: Generate) -> Structured | None:
    schema = body.response_format.schema_asked if body.response_format else None
    asked = body.structured_outputs
    if asked is None:
        return None if schema is None else Structured.of_schema(schema)
    if schema is not None:
        raise ApiError(400, "structured_outputs contradicts response_format; drop one of them", "structured_outputs")
    if asked.json_schema is not None:
        return Structured.of_schema(asked.json_schema)
    if asked.regex is not None:
        return Structured.regex(asked.regex)
    if asked.choice is not None:
        return Structured.choice(asked.choice)
    assert asked.grammar is not None  # the schema saw to it that one of them is there
    return Structured.of_grammar(asked.grammar)


@dataclass(frozen=True, slots=True)
class Drafting:
    """What a request says of drafting: how far (None: as the policy decides), and who (None: as the policy chooses)."""

    length: int | None
    drafter: str | None

    @classmethod
    def of(cls, body: Generate, drafters: Sequence[str]) -> "Drafting":
        """Raises ApiError for fields that contradict each other, and for a drafter that this model has not."""
        if body.gamma is not None and body.num_draft_tokens not in (None, body.gamma):
            raise ApiError(400, "gamma contradicts num_draft_tokens; they mean the same, give one", "gamma")
        field, length = ("gamma", body.gamma) if body.gamma is not None else ("num_draft_tokens", body.num_draft_tokens)
        if length and tuple(drafters) == ("none",):
            raise ApiError(400, f"{field}={length}: this model was launched without a drafter; leave it out", field)
        if body.draft in OFF:
            if length:
                raise ApiError(400, f"draft={body.draft!r} contradicts {field}={length}; drop one of them", "draft")
            return cls(0, None)
        if body.draft in (None, "auto"):
            return cls(length, None)
        if body.draft not in drafters:
            known = ", ".join(map(repr, ("auto", "none", *(name for name in drafters if name != "none"))))
            advice = f"use one of {known}, or launch a model with another drafter"
            raise ApiError(400, f"draft={body.draft!r} is not available here; {advice}", "draft")
        return cls(length, body.draft)


def _check(body: Generate, limits: Limits) -> None:
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options needs stream=true", "stream_options")
    if len(body.stops) > limits.max_stop or len(body.stop_token_ids or ()) > limits.max_stop:
        raise ApiError(400, f"more than {limits.max_stop} stop strings or tokens", "stop")
    if len(body.logit_bias or ()) > limits.max_logit_bias:
        raise ApiError(400, f"logit_bias has more than {limits.max_logit_bias} tokens", "logit_bias")
    if isinstance(body, ChatRequest):
        _check_chat(body)


def _check_chat(body: ChatRequest) -> None:
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs=true", "top_logprobs")
    if body.tool_choice not in (None, "none", "auto") and not body.tools:
        message = f"tool_choice={body.tool_choice!r:.100} needs tools; give tools too, or leave it out"
        raise ApiError(400, message, "tool_choice")
    both = body.max_tokens is not None and body.max_completion_tokens is not None
    if both and body.max_tokens != body.max_completion_tokens:
        raise ApiError(400, "max_tokens contradicts max_completion_tokens; they mean the same, give one", "max_tokens")


def _max_tokens(body: Generate, limits: Limits, longest: int) -> int:
    asked = body.max_tokens
    if isinstance(body, ChatRequest) and body.max_completion_tokens is not None:
        asked = body.max_completion_tokens
    if limits.max_output_tokens is not None and asked is not None and asked > limits.max_output_tokens:
        raise ApiError(
            400, f"max_tokens={asked} is over this server's limit of {limits.max_output_tokens}", "max_tokens"
        )
    if asked is not None:
        return asked
    default = COMPLETION_TOKENS if isinstance(body, CompletionRequest) else longest
    return min(default, limits.max_output_tokens or default)


def _bias(biases: Mapping[str, float]) -> dict[int, float]:
    if not all(name.isascii() and name.isdecimal() and len(name) < 12 for name in biases):
        raise ApiError(400, "logit_bias must map token ids (as strings) to numbers", "logit_bias")
    beyond = next(
        (name for name, bias in biases.items() if not (abs(bias) <= MOST_BIAS or bias == float("-inf"))), None
    )
    if beyond is not None:
        message = f"logit_bias of token {beyond} is {biases[beyond]!r}; give -100 to ban it, 100 to force it"
        raise ApiError(400, message, "logit_bias")
    return {int(name): bias for name, bias in biases.items()}


def _logprobs(body: Generate) -> int | None:
    if isinstance(body, ChatRequest):
        return (body.top_logprobs or 0) if body.logprobs else None
    assert isinstance(body, CompletionRequest)
    return body.logprobs
