"""Request bodies as pydantic models: every field known, typed and bounded; nothing is ever ignored in silence.

A field that OpenAI knows and we cannot honour is refused by name, with the reason. Fields that ask for nothing which
would change the answer (`user`, `metadata`, ...) are accepted and stay without effect; docs/serve.md lists them.
"""

from typing import Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from foredraft.server.fields import Asked, Body, Name, Stop, Text, Uid

REFUSED = {
    "audio": "this server generates text only",
    "best_of": "use n, and choose yourself",
    "function_call": "use tool_choice",
    "functions": "use tools",
    "prediction": "drafts are made by the server; its guesses are never needed",
    "reasoning_effort": "models are run as they are",
    "suffix": "filling in the middle is not supported",
    "verbosity": "models are run as they are",
    "web_search_options": "this server searches nothing",
    "modalities": "this server generates text only",
    "logits_processor": "code from clients is not run",
    "processors": "code from clients is not run",
    "guided_json": "use structured_outputs={'json': ...}, or response_format",
    "guided_regex": "use structured_outputs={'regex': ...}",
    "guided_choice": "use structured_outputs={'choice': [...]}",
    "guided_grammar": "use structured_outputs={'grammar': ...}",
    "json_schema": "use structured_outputs={'json': ...}, or response_format",
    "regex": "use structured_outputs={'regex': ...}",
    "choice": "use structured_outputs={'choice': [...]}",
    "grammar": "use structured_outputs={'grammar': ...}",
}
HARMLESS_VALUES: dict[str, tuple[Any, ...]] = {"modalities": (["text"],), "best_of": (1,), "suffix": ("",)}


class TextPart(Body):
    type: Literal["text"]
    text: Text

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, body: Any) -> Any:
        """First of all: parts of other types have other fields."""
        kind = body.get("type", "text") if isinstance(body, dict) else "text"
        if kind != "text":
            about = {"name": "type", "was": f"{kind!r:.60}"}
            raise PydanticCustomError("field", "it must be 'text', the only kind that is read; it was {was}", about)
        return body


class CalledFunction(Body):
    name: Name
    arguments: Text | dict[str, Any] = Field("{}", description="JSON.")


class CallMade(Body):
    """A tool call of an earlier turn."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Body):
    """A turn of a conversation. `content` is text, or a list of text parts; other parts are refused."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[CallMade] | None = None
    tool_call_id: str | None = None
    refusal: None = None
    reasoning_content: Text | None = Field(None, description="What an earlier answer came with; for the template.")
    # what clients send back of an answer, empty
    annotations: list[Any] | None = Field(None, max_length=0)
    audio: None = None
    function_call: None = None

    @model_validator(mode="after")
    def _says_something(self) -> "Message":
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError("content may be left out only beside an assistant's tool_calls")
        return self

    def for_template(self) -> dict[str, Any]:
        parts = self.content if isinstance(self.content, list) else ()
        content = "".join(part.text for part in parts) if parts else self.content or ""
        calls = {"tool_calls": [call.model_dump(exclude_none=True) for call in self.tool_calls or ()]}
        others = {"name": self.name, "tool_call_id": self.tool_call_id, "reasoning_content": self.reasoning_content}
        given = {name: value for name, value in others.items() if value is not None}
        return {"role": self.role, "content": content, **given, **(calls if self.tool_calls else {})}


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class JsonSchema(Body):
    name: str | None = None
    description: str | None = None
    strict: bool | None = Field(None, description="Output is always as the schema says.")
    form: dict[str, Any] = Field(alias="schema")


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema belongs to type 'json_schema', and to no other")
        return self

    @property
    def schema_asked(self) -> dict[str, Any] | None:
        """What the answer must be; None is free text."""
        if self.json_schema is not None:
            return self.json_schema.form
        return {"type": "object"} if self.type == "json_object" else None


class StructuredOutputs(Body):
    """The form of the answer, by one of these; vLLM's name for it."""

    json_schema: dict[str, Any] | Text | None = Field(None, alias="json")
    regex: Text | None = None
    choice: list[str] | None = None
    grammar: Text | None = Field(None, description="In llguidance's dialect of Lark.")

    @model_validator(mode="after")
    def _one_of_them(self) -> "StructuredOutputs":
        if sum(form is not None for form in (self.json_schema, self.regex, self.choice, self.grammar)) != 1:
            raise ValueError("give exactly one of json, regex, choice and grammar")
        return self


class Generate(Asked):
    """What chats and completions have in common."""

    model: Name | None = Field(None, description="A uid; may be left out where one model is usable.")
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    n: int | None = Field(None, ge=1)
    seed: int | None = Field(None, ge=0, lt=2**63, description="Choice i of n uses seed + i.")
    stop: Stop | list[Stop] | None = None
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, float] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    # accepted, without effect
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    # beyond OpenAI
    top_k: int | None = Field(None, ge=-1, description="0 or -1: off.")
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=1e-6, le=1e6)
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    num_draft_tokens: int | None = Field(None, ge=0, description="Draft exactly so many; 0 is plain decoding.")
    gamma: int | None = Field(None, ge=0, description="num_draft_tokens, as Xinference calls it.")
    draft: str | None = Field(
        None,
        max_length=100,
        description="auto, none (or off), or one of the model's drafters: GET /v1/models has them.",
    )
    verifier: Literal["coupled", "rejection"] | None = None
    return_draft_info: bool | None = Field(None, description="Tell which tokens were drafted, and by whom.")

    @model_validator(mode="before")
    @classmethod
    def _refuse_by_name(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        kept = {}
        for name, value in body.items():
            if name in REFUSED and name not in cls.model_fields:
                if value is not None and value not in HARMLESS_VALUES.get(name, ()):
                    about = {"name": name, "why": REFUSED[name]}
                    raise PydanticCustomError("refused", "{name} is not supported: {why}", about)
            else:
                kept[name] = value
        return kept

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatRequest(Generate):
    """`POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = Field(None, description="False: one call at most.")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="Further variables of the chat template.")


class CompletionRequest(Generate):
    """`POST /v1/completions`."""

    prompt: Text | list[str] | list[int] | list[list[int]]
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool | None = None

    @field_validator("prompt")
    @classmethod
    def _says_something(cls, prompt: Any) -> Any:
        if not prompt:
            raise ValueError("it is empty; give at least one token")
        return prompt

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item, unused-ignore]  # token ids
        return list(self.prompt)  # type: ignore[arg-type]


class TokenizeRequest(Asked):
    """`POST /tokenize`: text, or a chat as the model's template renders it."""

    model: Name | None = None
    prompt: Text | None = None
    messages: list[Message] | None = None
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _one_of_them(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class DetokenizeRequest(Asked):
    """`POST /detokenize`."""

    model: Name | None = None
    tokens: list[int]


class LaunchRequest(Asked):
    """`POST /v1/models`. Names come from the registry; paths and hub names only as the operator allows."""

    target: Name | None = Field(None, description="A registry name, or an allowed path or hub name. None: the bundled.")
    draft: Name = Field("auto", description="As target, or a drafter by name: ngram, int4, none, ...")
    uid: Uid | None = None
    size_in_billions: int | float | str | None = Field(None, description="Which size of a registry name.")
    draft_size_in_billions: int | float | str | None = None
    dtype: str = Field("auto", max_length=20)
    device: str = Field("auto", max_length=20)
    draft_dtype: str | None = Field(None, max_length=20)
    draft_device: str | None = Field(None, max_length=20)
    quantization: str | None = Field(None, max_length=20)
    draft_quantization: str | None = Field(None, max_length=20, description="None: what suits the draft's size.")
    n_gpu: int | Literal["auto"] | None = "auto"
    policy: Literal["gain", "fixed", "heuristic", "threshold"] | None = None
    max_model_len: int | None = Field(None, ge=2)
    max_batch_size: int | None = Field(None, ge=1, le=1024)
    cache_bytes: int | None = Field(None, ge=1, description="Of all caches. None: what a batch of longest texts takes.")
    prefix_cache: bool | None = Field(None, description="Whether texts that begin alike share that; true where it can.")
    wait: bool = Field(False, description="Answer once it is ready or has failed.")


class SpeculativeLaunchRequest(Asked):
    """`POST /experimental/speculative_llms`, with the fields of Xinference's client."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, protected_namespaces=())

    model_uid: Uid | None = None
    model_name: Name
    model_size_in_billions: int | float | str | None = None
    quantization: str | None = Field(None, max_length=20)
    draft_model_name: Name
    draft_model_size_in_billions: int | float | str | None = None
    draft_quantization: str | None = Field(None, max_length=20)
    n_gpu: int | Literal["auto"] | None = "auto"
