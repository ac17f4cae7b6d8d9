"""A client for `foredraft serve`: launch models, list them, talk to them, end them. Needs only httpx.

Its methods are those of Xinference's client, so that programs written for `launch_speculative_llm` go on working; for
generation any OpenAI client serves as well.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import httpx

from foredraft.errors import ServerError

Json = dict[str, Any]
Config = Mapping[str, Any]
USELESS = ("failed", "draining")  # states of a model that serves nothing, and never will
TIMEOUT = httpx.Timeout(30.0, read=None)  # loading and long texts take their time; the server has limits of its own


class Client:
    """A server, by address.

    Args:
        base_url: such as http://127.0.0.1:8000.
        api_key: where the server asks for one.
        transport: httpx's; for tests.
    """

    def __init__(
        self, base_url: str, api_key: str | None = None, *, transport: httpx.BaseTransport | None = None
    ) -> None:
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        url = base_url.rstrip("/").removesuffix("/v1")
        self._http = httpx.Client(base_url=url, headers=headers, timeout=TIMEOUT, transport=transport)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close its connections; leaving a `with` block does."""
        self._http.close()

    def launch_speculative_llm(
        self,
        model_name: str,
        model_size_in_billions: int | float | str | None,
        quantization: str | None,
        draft_model_name: str,
        draft_model_size_in_billions: int | float | str | None,
        draft_quantization: str | None,
        n_gpu: int | str | None = "auto",
    ) -> str:
        """Launch a target with its draft model by names and sizes of the server's registry; returns once it is ready.

        Returns:
            the uid of the model.

        Raises:
            ServerError: no such name, no room, or it does not load.
        """
        body = {
            "model_uid": None,
            "model_name": model_name,
            "model_size_in_billions": model_size_in_billions,
            "quantization": quantization,
            "draft_model_name": draft_model_name,
            "draft_model_size_in_billions": draft_model_size_in_billions,
            "draft_quantization": draft_quantization,
            "n_gpu": n_gpu,
        }
        return str(self.call("POST", "/experimental/speculative_llms", body)["model_uid"])

    def launch(self, spec: Config, *, wait: bool = True) -> Json:
        """Launch a model as `POST /v1/models` takes it: target, draft, uid, dtype, ... Raises as above."""
        return self.call("POST", "/v1/models", {**spec, "wait": wait})

    def list_models(self) -> dict[str, Json]:
        """Every model's description, by uid."""
        return {model["id"]: model for model in self.call("GET", "/v1/models")["data"]}

    def describe_model(self, model_uid: str) -> Json:
        """One model's description. Raises ServerError where there is none."""
        return self.call("GET", f"/v1/models/{model_uid}")

    def terminate_model(self, model_uid: str) -> None:
        """Let a model's requests finish, and free it. Raises ServerError where there is none."""
        self.call("DELETE", f"/v1/models/{model_uid}")

    def get_model(self, model_uid: str) -> "ModelHandle":
        """A model to generate and chat with. Raises ServerError where there is none."""
        self.describe_model(model_uid)
        return ModelHandle(self, model_uid)

    def call(self, method: str, path: str, body: Config | None = None) -> Json:
        """Any address of the server. Raises ServerError."""
        try:
            response = self._http.request(method, path, json=body)
        except httpx.HTTPError as error:
            raise self._unreachable(error) from None
        if response.is_error:
            raise _server_error(response)
        answer: Json = response.json()
        return answer

    def stream(self, path: str, body: Config) -> Iterator[Json]:
        """The payloads of a streamed answer. Raises ServerError."""
        try:
            with self._http.stream("POST", path, json=body) as response:
                if response.is_error:
                    response.read()
                    raise _server_error(response)
                yield from _events(response)
        except httpx.HTTPError as error:
            raise self._unreachable(error) from None

    def _unreachable(self, error: httpx.HTTPError) -> ServerError:
        return ServerError(f"{self._http.base_url} does not answer ({error}); is `foredraft serve` running there?", 0)


@dataclass(frozen=True, slots=True)
class ModelHandle:
    """One model of a server. `generate_config` holds any field of the requests, `stream` among them."""

    client: Client
    uid: str

    def generate(self, prompt: str, generate_config: Config | None = None) -> Json | Iterator[Json]:
        """A completion, or its chunks with `stream`. Raises ServerError."""
        return self._ask("/v1/completions", {**(generate_config or {}), "model": self.uid, "prompt": prompt})

    def chat(
        self,
        prompt: str,
        system_prompt: str | None = None,
        chat_history: Sequence[Mapping[str, Any]] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        generate_config: Config | None = None,
    ) -> Json | Iterator[Json]:
        """The next turn of a chat, or its chunks with `stream`. Raises ServerError."""
        opening = [{"role": "system", "content": system_prompt}] if system_prompt else []
        messages = [*opening, *(chat_history or ()), {"role": "user", "content": prompt}]
        body = {**(generate_config or {}), "model": self.uid, "messages": messages}
        return self._ask("/v1/chat/completions", body if tools is None else {**body, "tools": list(tools)})

    def _ask(self, path: str, body: Config) -> Json | Iterator[Json]:
        return self.client.stream(path, body) if body.get("stream") else self.client.call("POST", path, body)


def _events(response: httpx.Response) -> Iterator[Json]:
    """The payloads of server-sent events. Raises ServerError for one that is an error."""
    for line in response.iter_lines():
        if not line.startswith("data:"):
            continue
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            return
        payload: Json = json.loads(data)
        if "error" in payload:
            raise ServerError(payload["error"]["message"], response.status_code, payload["error"].get("code"))
        yield payload


def _server_error(response: httpx.Response) -> ServerError:
    try:
        error = response.json()["error"]
        return ServerError(str(error["message"]), response.status_code, error.get("code"))
    except (ValueError, KeyError, TypeError):
        return ServerError(f"the server answered {response.status_code} {response.reason_phrase}", response.status_code)
