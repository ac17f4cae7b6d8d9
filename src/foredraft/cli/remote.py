"""A model behind `--server`, in the shape that `foredraft chat` talks to."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from foredraft.errors import ForedraftError, PromptTooLongError, RequestError, ServerError
from foredraft.structured import Structured

if TYPE_CHECKING:
    from foredraft.client import Client
    from foredraft.types import SamplingParams


@dataclass(frozen=True, slots=True)
class Name:
    name: str


@dataclass(frozen=True, slots=True)
class RemoteTokenizer:
    """All that a conversation asks of a tokenizer: whether there is a template."""

    chat_template: str


@dataclass(frozen=True, slots=True)
class RemoteChunk:
    """As `Chunk`, of which no result comes over the wire."""

    text: str
    from_draft: tuple[bool, ...]
    pieces: tuple[tuple[str, bool], ...]
    result: None = None


@dataclass(frozen=True, slots=True)
class RemoteLLM:
    """A model of a server."""

    client: "Client"
    uid: str
    drafter: Name
    tokenizer: RemoteTokenizer

    def stream_chat(
        self, messages: Sequence[Mapping[str, Any]], params: "SamplingParams", *, num_draft_tokens: int | None = None
    ) -> Iterator[RemoteChunk]:
        body = {**_fields(params), "model": self.uid, "messages": list(messages), "num_draft_tokens": num_draft_tokens}
        stream = self.client.stream("/v1/chat/completions", {**body, "stream": True, "return_draft_info": True})
        try:
            for payload in stream:
                for choice in payload["choices"]:
                    yield _chunk(choice)
        except ServerError as error:
            raise _as_local(error) from None


def open_remote(client: "Client", uid: str | None) -> RemoteLLM:
    """A model by uid, or the only one. Raises ForedraftError where there is none, or several."""
    from foredraft.client import USELESS

    models = client.list_models()
    if uid is None:
        models = {name: model for name, model in models.items() if model["state"] not in USELESS}
    if uid is None and len(models) == 1:
        uid = next(iter(models))
    if uid is None or uid not in models:
        raise RequestError(f"--model {uid!r}: the server has {', '.join(models) or 'no model'}; name one of them")
    model = models[uid]
    template = "the server's" if "chat" in model["model_ability"] else ""
    return RemoteLLM(client, uid, Name(model["draft"] or "none"), RemoteTokenizer(template))


def _fields(params: "SamplingParams") -> dict[str, Any]:
    fields: dict[str, Any] = {
        "temperature": params.temperature,
        "max_tokens": params.max_new_tokens,
        "stop": list(params.stop),
        "ignore_eos": params.ignore_eos,
        "verifier": params.verifier,
        "seed": params.seed,
    }
    if not params.greedy:
        fields |= {"top_k": params.top_k, "top_p": params.top_p, "min_p": params.min_p}
    if isinstance(params.structured, Structured):
        schema = {"schema": json.loads(params.structured.source)}
        fields["response_format"] = {"type": "json_schema", "json_schema": schema}
    return fields


def _chunk(choice: Mapping[str, Any]) -> RemoteChunk:
    tokens = choice.get("draft_info", {}).get("tokens", [])
    drafted = tuple(token["kind"] == "accepted" for token in tokens)
    pieces = tuple((token["text"], flag) for token, flag in zip(tokens, drafted, strict=True))
    return RemoteChunk(choice["delta"].get("content") or "", drafted, pieces)


def _as_local(error: ServerError) -> ForedraftError:
    """The error that a model in this process would have raised."""
    if error.code == "context_length_exceeded":
        return PromptTooLongError(str(error))
    return RequestError(str(error)) if error.status == 400 else error
