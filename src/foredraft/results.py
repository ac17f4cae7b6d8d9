"""What a user gets: results, chunks of a stream, and the job that makes them from a request's steps.

Owns how a step's tokens become text. Knows nothing of models or of who drives.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from foredraft.errors import GenerationError
from foredraft.runner import Sink
from foredraft.stats import SpecStats
from foredraft.structured.calls import ToolCall
from foredraft.structured.thinking import CLOSING, OPENING, Thinking
from foredraft.text import TextStream
from foredraft.types import FinishReason, Request, StepOutput, TokenLogprobs


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """A finished request. `text` leaves special tokens and stop strings out; `token_ids` has every token.

    Where `finish_reason` is "error", `error` says why, and text and tokens are those up to there.
    """

    text: str
    token_ids: list[int]
    from_draft: list[bool]  # one for each token: was it drafted and accepted?
    finish_reason: FinishReason
    prompt_token_ids: list[int]
    seed: int
    stats: SpecStats
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    exact: bool = True  # whether plain decoding is known to give the same tokens: see docs/lossless.md
    error: Exception | None = None
    tool_calls: tuple[ToolCall, ...] = ()  # of a chat with tools
    answer_start: int = 0  # where in `text` the answer begins, behind what a chat's model thought

    @property
    def reasoning(self) -> str:
        """What the model thought before its answer, without the marks around it; of a chat whose template has them."""
        thoughts = self.text[: self.answer_start].strip()
        return thoughts.removeprefix(OPENING).removesuffix(CLOSING).strip()

    @property
    def answer(self) -> str:
        """`text` without what the model thought before."""
        return self.text[self.answer_start :].lstrip("\n") if self.answer_start else self.text


@dataclass(frozen=True, slots=True)
class Chunk:
    """What one step added: its tokens, and the text they settle. `pieces` is that text by token, drafted or not."""

    text: str
    token_ids: tuple[int, ...]
    from_draft: tuple[bool, ...]
    pieces: tuple[tuple[str, bool], ...]
    finish_reason: FinishReason | None
    result: GenerationResult | None  # on the last chunk


@dataclass(frozen=True, slots=True)
class Job:
    """A checked request, and its text. A server hands `request` and `sink(...)` to `LLM.runner.submit`."""

    request: Request
    stream: TextStream | None
    rows_agree: bool = True  # whether the target's rows were found to be exact
    read_calls: Callable[[list[int]], tuple[ToolCall, ...]] | None = None
    call_mark: int | None = None  # the special token that opens a tool call
    thinking: Thinking | None = None

    def sink(self, take: Callable[[Chunk], object]) -> Sink:
        """Calls `take` with a chunk after each step, on the thread that drives; the last one has the result."""
        return lambda output: take(self.chunk(output))

    def chunk(self, output: StepOutput) -> Chunk:
        """To be made of every output as it comes, so that its text is its own tokens' text."""
        result = self.result() if output.finish_reason else None
        pieces = self._pieces()
        text = "".join(piece for piece, _ in pieces)
        reason = result.finish_reason if result else None
        return Chunk(text, output.token_ids, output.from_draft, pieces, reason, result)

    def _pieces(self) -> tuple[tuple[str, bool], ...]:
        if self.stream is None:
            return ()
        try:
            return self.stream.take_pieces(self.request.from_draft)
        except Exception:  # of the tokenizer
            if self.request.error is None:
                raise
            return ()

    def result(self) -> GenerationResult:
        """Once the request has ended. A tokenizer that fails on its tokens makes it one with an error."""
        r = self.request
        text = self._text()
        assert r.finish_reason is not None
        thought = self.thinking.answer_at(r.output_ids) if self.thinking else 0  # tokens
        return GenerationResult(
            text,
            r.output_ids,
            r.from_draft,
            "error" if r.error is not None else r.finish_reason,
            r.token_ids[: r.prompt_len],
            r.seed,
            r.stats,
            r.logprobs,
            self.rows_agree and (r.params.greedy or r.params.verifier == "coupled"),
            r.error,
            self.read_calls(r.output_ids[thought:]) if self.read_calls else (),
            self.stream.length_of(thought) if self.stream and thought else 0,
        )

    def _text(self) -> str:
        if self.stream is None:
            return ""
        try:
            self.stream.close()
            return self.stream.text
        except Exception as error:  # of the tokenizer
            self.request.error = self.request.error or error
            return ""


def raise_errors(results: list[GenerationResult], *, single: bool) -> None:
    """Raises the error of a single request; of several a GenerationError that has all results."""
    failed = [(i, result.error) for i, result in enumerate(results) if result.error is not None]
    if not failed:
        return
    first = failed[0][1]
    if single:
        raise first
    where = ", ".join(str(i) for i, _ in failed)
    raise GenerationError(
        f"{len(failed)} of {len(results)} requests failed (index {where}; the first: {type(first).__name__}: {first}); "
        "`results` of this error has all of them, and on_error='return' returns them instead",
        results,
    ) from first
