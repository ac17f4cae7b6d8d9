"""What handlers know of the models behind them: a small protocol, and the plain data that passes through it.

Knows nothing of the web, of engines or of threads.
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from foredraft.stats import SpecStats
from foredraft.structured.calls import ToolCall
from foredraft.types import FinishReason, SamplingParams, TokenLogprobs

TokenKind = Literal["accepted", "recovered", "bonus", "plain"]
Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Ask:
    """One text to generate. `messages` is a chat for the model's template; otherwise `prompt` is gone on from."""

    params: SamplingParams
    prompt: str | Sequence[int] = ""
    messages: Messages | None = None
    num_draft_tokens: int | None = None
    tools: Sequence[Mapping[str, Any]] = ()
    tool_choice: str | Mapping[str, Any] = "auto"
    parallel_tool_calls: bool = True  # False: one call at most
    template_arguments: Mapping[str, Any] | None = None
    draft: str | None = None  # which of the drafters alone; None: as the policy chooses
    memory: str | None = None  # whose outputs are drafted from, and whose keys and values are shared; None: nobody's


@dataclass(frozen=True, slots=True)
class TokenPiece:
    """A token of the answer: its text (empty while it waits for others), how it came about, and who guessed it."""

    id: int
    text: str
    kind: TokenKind
    drafter: str


@dataclass(frozen=True, slots=True)
class Delta:
    """What one step, or several, added to one of the texts asked for."""

    index: int
    text: str
    tokens: tuple[TokenPiece, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    drafted: int = 0
    accepted: int = 0
    finish_reason: FinishReason | None = None
    reasoning: str = ""
    calling: bool = False  # whether a tool call has been opened in this text


@dataclass(frozen=True, slots=True)
class Finished:
    """A whole text. `queued` is how many seconds it waited for its first step."""

    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    seed: int
    stats: SpecStats
    queued: float
    tokens: tuple[TokenPiece, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    tool_calls: tuple[ToolCall, ...] = ()
    reasoning: str = ""  # what a chat's model thought before its answer, which is `text`
    words: str | None = None  # of the answer before the special token that opens its calls; None: there is none


class Answer(Protocol):
    """The texts of one request while they are generated."""

    finished: list[Finished | None]  # in the order asked

    def deltas(self) -> AsyncIterator[Sequence[Delta]]:
        """All texts' deltas, those that are there at once, until each has ended; none where none came for some seconds.

        Raises:
            Exception: whatever made one of them fail; the others are cancelled.
        """
        ...

    async def wait(self) -> list[Finished]:
        """The texts, once all have ended. Raises as `deltas`."""
        ...

    def cancel(self) -> None:
        """End what has not ended; their slots are free after the running step."""
        ...


@dataclass(frozen=True, slots=True)
class Figures:
    """Of a model at this moment."""

    running: int
    waiting: int
    cache_usage: float  # share of the cache that holds tokens of running requests


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What a loaded model says of itself."""

    max_model_len: int
    max_batch_size: int
    drafter: str
    drafters: tuple[str, ...]  # whom a request may name
    chat: bool
    dtype: str
    device: str
    exact: bool  # what the probe found: equal texts however drafted and batched
    memory: dict[str, int]
    bytes: int  # that it may come to take


class Model(Protocol):
    """A loaded model. Calls come from the event loop's thread and return at once, but for `close`."""

    info: ModelInfo

    async def prepare(self, asks: Sequence[Ask]) -> Sequence[Any]:
        """Check, tokenise and compile, on another thread. To be submitted at once: `drained` waits for it till then.

        Raises:
            RequestError: one of them cannot be run.
        """
        ...

    def submit(self, prepared: Sequence[Any], *, stream: bool, details: bool) -> Answer:
        """Put texts into the engine's queue; `details` asks for tokens beside text.

        Raises:
            ApiError: the queue is full.
        """
        ...

    def encode(self, prompt: str | Messages) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str:
        """Raises RequestError for an id outside the vocabulary."""
        ...

    def token(self, token_id: int) -> tuple[str, list[int] | None]:
        """A token's text, and its bytes where the tokenizer tells."""
        ...

    def figures(self) -> Figures: ...

    def stop_all(self) -> None:
        """Fail every request that has not ended."""
        ...

    async def drained(self) -> None:
        """Returns once no request is left."""
        ...

    def close(self) -> None:
        """Stop the engine's thread and free its memory; blocks."""
        ...
