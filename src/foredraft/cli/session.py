"""From flags to a loaded model, and from a prompt to printed text: what `generate` and `chat` have in common."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from foredraft.cli.console import Printer, busy, interruptible, note
from foredraft.cli.options import RunOptions
from foredraft.drafters.registry import split
from foredraft.errors import ForedraftError, GrammarError, RequestError
from foredraft.reading import read_up_to

if TYPE_CHECKING:
    from foredraft import LLM, Chunk, GenerationResult, SamplingParams, Structured

    Messages = list[dict[str, str]]


def sampling_params(options: RunOptions) -> "SamplingParams":
    """Raises RequestError where values are out of range or contradict each other."""
    from foredraft import SamplingParams

    return SamplingParams(
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        seed=options.seed,
        max_new_tokens=options.max_new_tokens,
        stop=tuple(options.stop or ()),
        ignore_eos=options.ignore_eos,
        verifier=options.verifier,  # type: ignore[arg-type]  # checked there
        structured=structured(options),
    )


def checked_params(options: RunOptions) -> "SamplingParams":
    """As `sampling_params`; raises GrammarError where a form does not compile, which takes no model to find out."""
    from foredraft import Structured

    params = sampling_params(options)
    if isinstance(params.structured, Structured):
        from foredraft.structured.compile import check_form

        with naming_file(options):
            check_form(params.structured)
    return params


def structured(options: RunOptions) -> "Structured | None":
    """The form of the answer. Raises RequestError where two are given, or a file cannot be read."""
    from foredraft import Structured

    given = {"--json-schema": options.json_schema, "--regex": options.regex, "--grammar": options.grammar}
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise RequestError(f"{' and '.join(names)} contradict each other; give one of them")
    with naming_file(options):
        if options.json_schema is not None:
            return Structured.json_schema(read_text(options.json_schema, "--json-schema"))
        if options.grammar is not None:
            return Structured.grammar(read_text(options.grammar, "--grammar"))
    return None if options.regex is None else Structured.regex(options.regex)


@contextmanager
def naming_file(options: RunOptions) -> Iterator[None]:
    """An error about a form that is in a file says in which."""
    path = options.json_schema or options.grammar
    try:
        yield
    except GrammarError as error:
        if path is None:
            raise
        raise type(error)(f"{path}: {error}") from error


MOST_BYTES = 10 * 2**20  # of a schema or a grammar


def read_text(path: Path, flag: str) -> str:
    """A file's text. Raises RequestError where it is none, or too long."""
    try:
        text = read_up_to(path, MOST_BYTES)
    except (OSError, UnicodeDecodeError) as error:
        if str(path).lstrip().startswith("{"):
            raise RequestError(f"{flag} takes the name of a file; write {str(path)!r:.200} into one") from error
        why = error.strerror if isinstance(error, OSError) else error
        raise RequestError(f"{flag} {path} cannot be read as text: {why}; give the name of a file") from error
    if text is None:
        raise RequestError(f"{path} has more than {MOST_BYTES / 2**20:g} MiB; give a smaller schema or grammar")
    return text


def open_llm(options: RunOptions, *, repeats: bool = False) -> "LLM":
    """Load target and drafter, for one request at a time; `repeats`: to measure the same prompts again and again."""
    from foredraft import LLM

    return LLM(
        options.model,
        split(options.draft),
        dtype=options.dtype,
        weight_format=options.weight_format,
        runtime=options.runtime,
        device=options.target_device,
        draft_device=options.draft_device,
        draft_weight_format=options.draft_weight_format,
        draft_profile=options.draft_profile,
        chat_template=options.chat_template,
        trust_remote_code=options.trust_remote_code,
        policy=options.policy,
        max_batch_size=1,
        prefix_cache=not repeats,
    )


def start(options: RunOptions, *, repeats: bool = False) -> "tuple[LLM, SamplingParams]":
    """Check the flags, then load, so that a typing error is told at once."""
    device = options.target_device
    options.check()
    with busy("importing torch and transformers"):
        params = checked_params(options)
    with busy(f"loading {options.model or 'the bundled pair'} ({device})"):
        llm = open_llm(options, repeats=repeats)
    interruptible()
    _check_spelling(options, llm, params)
    return llm, params


def _check_spelling(options: RunOptions, llm: "LLM", params: "SamplingParams") -> None:
    """Raises GrammarError where the form is none in this model's vocabulary: told once, not in every turn of a chat."""
    from foredraft import Structured

    if isinstance(params.structured, Structured) and llm.grammars is not None:
        with naming_file(options):
            llm.grammars.check(params.structured)


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt, or a conversation for the model's chat template; asked as often as one likes."""

    llm: "LLM"
    prompt: "str | Messages"

    def ask(self, params: "SamplingParams", num_draft_tokens: int | None) -> "GenerationResult":
        if isinstance(self.prompt, str):
            return self.llm.generate(self.prompt, params, num_draft_tokens=num_draft_tokens)
        return self.llm.chat(self.prompt, params, num_draft_tokens=num_draft_tokens)

    def stream(self, params: "SamplingParams", num_draft_tokens: int | None) -> "Iterator[Chunk]":
        if isinstance(self.prompt, str):
            return self.llm.stream(self.prompt, params, num_draft_tokens=num_draft_tokens)
        return self.llm.stream_chat(self.prompt, params, num_draft_tokens=num_draft_tokens)

    @property
    def is_chat(self) -> bool:
        return not isinstance(self.prompt, str)


@dataclass(slots=True)
class Answer:
    """What has been printed so far; complete enough for a summary where it was interrupted."""

    text: str = ""
    from_draft: list[bool] = field(default_factory=list)
    seconds: float = 0.0
    result: "GenerationResult | None" = None
    interrupted: bool = False

    def summary(self, drafter: str) -> str:
        count = len(self.from_draft)
        rate = count / self.seconds if self.seconds else 0.0
        parts = [f"{count} tokens in {self.seconds:.2f} s, {rate:.1f} tok/s"]
        stats = self.result.stats if self.result else None
        if stats and stats.drafted:
            parts.append(f"{stats.draft_acceptance_rate:.1%} of {stats.drafted} drafted tokens accepted")
            parts.append(f"{stats.mean_acceptance_length:.2f} tokens a pass")
        elif stats is None and count:
            parts.append(f"{sum(self.from_draft)} of them drafted")
        parts.append(f"draft: {drafter}")
        return ("interrupted; " if self.interrupted else "") + " | ".join(parts)


def print_answer(question: Question, params: "SamplingParams", num_draft_tokens: int | None) -> Answer:
    """Stream an answer to stdout and its summary to stderr; Ctrl-C ends it, what was printed stays."""
    printer, answer, begin = Printer(skip_space=question.is_chat), Answer(), time.perf_counter()
    chunks = question.stream(params, num_draft_tokens)
    try:
        for chunk in chunks:
            printer.write(chunk.pieces)
            answer.text += chunk.text
            answer.from_draft += chunk.from_draft
            answer.seconds = time.perf_counter() - begin
            answer.result = chunk.result
    except KeyboardInterrupt:
        answer.interrupted = True
    except ForedraftError:
        if not printer.at_start:
            printer.end()
        raise
    printer.end()
    drafter = question.llm.drafter.name if num_draft_tokens != 0 else "none"
    note(answer.summary(drafter) + (" (drafted tokens in green)" if printer.colour and drafter != "none" else ""))
    return answer


def interactive() -> bool:
    """Whether somebody types: there is no stdin to read, or it is a terminal."""
    return sys.stdin is None or sys.stdin.isatty()
