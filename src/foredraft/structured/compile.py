"""From a form to a constraint: grammars compiled by llguidance, apart from the engine, kept by content.

Compilers take time and may come upon a stranger's grammar: work runs in two threads of its own, whoever asked waits up
to a limit, and nothing of it is in a step.
"""

import json
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, TimeoutError
from itertools import islice
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from foredraft.errors import GrammarError, RequestError, missing_extra
from foredraft.structured.matcher import GrammarConstraint, first_line, too_complex
from foredraft.structured.spec import Structured

SECONDS = 10.0
KEPT = 64
MOST_PARTS = 200  # of a schema, looked at one by one to find the fault
LOOK_AHEAD = 20  # tokens of a text that are tried before anything runs
BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "minLength", "maxLength")
MOST_NUMBER = 2**53  # what JSON's readers agree on
JSON_FORM = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}  # as json.dumps writes


class Grammars:
    """The compiled grammars of one tokenizer; the least recently used beyond `kept` are forgotten."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, vocab_size: int, *, seconds: float = SECONDS, kept: int = KEPT
    ) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.seconds = seconds
        self.kept = kept
        self.compiled: OrderedDict[Structured, Future[Any]] = OrderedDict()
        self._tokens: Any = None
        self._begin()

    def _begin(self) -> None:
        """Nothing is being compiled: so it is in a forked child too, which has none of its parent's threads."""
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="foredraft-grammar")
        for form in [form for form, future in self.compiled.items() if not future.done()]:
            del self.compiled[form]

    def constraint(self, form: Structured, ends: tuple[int, ...]) -> GrammarConstraint:
        """A fresh constraint; `ends` are the tokens that end a text, the likeliest first.

        Raises:
            GrammarError: the form does not compile (where and why), takes too long, or no text can have it.
            RequestError: llguidance is not installed, or there is no token that ends a text.
        """
        if not ends:
            raise RequestError(
                "structured output ends with an end-of-sequence token and this model names none; give one "
                "in stop_token_ids"
            )
        matcher = self._matcher(form).deep_copy()
        return GrammarConstraint(matcher, ends, self._vocabulary(), self.vocab_size)

    def mark(self, text: str) -> str:
        """How a grammar writes a mark of a chat template: as a token of its own, or letter by letter."""
        token = self.tokenizer.convert_tokens_to_ids(text)
        alone = isinstance(token, int) and self.tokenizer.convert_ids_to_tokens(token) == text
        return f"<[{token}]>" if alone and self._vocabulary().is_special_token(token) else json.dumps(text)

    def _vocabulary(self) -> Any:
        if self._process != os.getpid():
            self._begin()
        with self._lock:
            self._tokens = self._tokens or _llg_tokenizer(self.tokenizer, self.vocab_size)
            return self._tokens

    def _matcher(self, form: Structured) -> Any:
        tokens = self._vocabulary()
        with self._lock:
            future = self.compiled.get(form)
            if future is None:
                future = self.compiled[form] = self._pool.submit(compile_form, form, tokens)
            self.compiled.move_to_end(form)
            while len(self.compiled) > self.kept:
                self.compiled.popitem(last=False)
        try:
            return future.result(self.seconds)
        except TimeoutError:
            raise GrammarError(
                f"the {form.name} takes longer than {self.seconds:g} s to compile; make it simpler"
            ) from None


def _llg_tokenizer(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> Any:
    """llguidance's view of the vocabulary; seconds for large ones, so made once."""
    try:
        from llguidance.hf import from_tokenizer
    except ImportError as error:
        raise RequestError(missing_extra("structured output needs", "llguidance", "structured")) from error
    try:
        return from_tokenizer(tokenizer, n_vocab=max(vocab_size, len(tokenizer)), eos_token=_any_end(tokenizer))  # type: ignore[arg-type]  # checked there
    except ValueError as error:
        raise RequestError(
            f"structured output cannot read this tokenizer ({type(tokenizer).__name__}): {error}"
        ) from error


def _any_end(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token by which llguidance says that a grammar is satisfied: a special one, so that it is no text."""
    known = (tokenizer.eos_token_id, *tokenizer.all_special_ids)
    found = next((token for token in known if isinstance(token, int)), None)
    if found is None:
        raise RequestError("structured output needs a tokenizer with a special token, such as its end of sequence")
    return found


def compile_form(form: Structured, tokens: Any) -> Any:
    """A matcher at the start of the grammar.

    Raises:
        GrammarError: it does not compile, or nothing that it matches can be spelled in this vocabulary.
    """
    from llguidance import LLMatcher

    _check_numbers(form)
    try:
        source = _source(form)
    except ValueError as error:  # llguidance's reader of JSON
        raise GrammarError(f"the {form.name} cannot be compiled: {first_line(str(error))}") from error
    matcher = LLMatcher(tokens, source, log_level=0)
    if matcher.is_error():
        raise GrammarError(_explain(form, first_line(matcher.get_error())))
    follower = GrammarConstraint(matcher.deep_copy(), (tokens.eos_token,), tokens, tokens.vocab_size)
    _check_start(form, follower, tokens)
    _check_ahead(form, follower)
    return matcher


def _check_numbers(form: Structured) -> None:
    """Raises GrammarError for a bound that the compiler would round to another in silence."""
    for pointer, part in _parts(json.loads(form.source), "#") if form.kind == "json_schema" else ():
        for name in BOUNDS:
            if type(part.get(name)) is int and abs(part[name]) > MOST_NUMBER:
                raise GrammarError(f"the {form.name} cannot be compiled at {pointer}/{name}: {part[name]} is too large")


def _source(form: Structured) -> str:
    from llguidance import LLMatcher

    if form.kind == "json_schema":
        return str(LLMatcher.grammar_from_json_schema(form.source, defaults=JSON_FORM))  # type: ignore[arg-type]  # a TypedDict
    if form.kind == "regex":
        return str(LLMatcher.grammar_from_regex(form.source))
    if form.kind == "choice":
        return "start: OPTION\nOPTION: " + " | ".join(
            json.dumps(option, ensure_ascii=False) for option in json.loads(form.source)
        )
    return str(LLMatcher.grammar_from_lark(form.source))


def _check_start(form: Structured, follower: GrammarConstraint, tokens: Any) -> None:
    """Raises GrammarError where no text can begin, or a text that must come has no tokens."""
    try:
        follower.allowed_after([()])
    except GrammarError as error:
        raise GrammarError(f"the {form.name} matches nothing that this vocabulary can spell: {error}") from error
    forced = bytes(follower.matcher.deep_copy().compute_ff_bytes()).decode(errors="ignore")
    for text in (forced, *_literals(form)):
        if tokens.decode_bytes(tokens.greedy_tokenize(text)) != text.encode():
            raise GrammarError(f"the {form.name} wants {text!r:.200}, which this model's vocabulary cannot spell")


def _check_ahead(form: Structured, follower: GrammarConstraint) -> None:
    """Raises GrammarError where a text of some tokens already is more than the matcher can follow."""
    path: list[int] = []
    try:
        for _ in range(LOOK_AHEAD):
            allowed = np.unpackbits(follower.allowed_after([path])[0], bitorder="little")
            allowed[follower.own_end] = 0
            if not allowed.any():
                return
            path.append(int(allowed.argmax()))
    except GrammarError as error:
        if not too_complex(follower.matcher):
            return  # a way that ends for want of tokens; others may not
        raise GrammarError(f"the {form.name} cannot be followed beyond {len(path)} tokens: {error}") from error


def _literals(form: Structured) -> Iterator[str]:
    """Texts that a form names letter by letter."""
    if form.kind == "choice":
        yield from json.loads(form.source)
    elif form.kind == "json_schema":
        for _, part in islice(_parts(json.loads(form.source), "#"), MOST_PARTS):
            named = [*part.get("properties", ()), *part.get("enum", ()), part.get("const")]
            yield from (name for name in named if isinstance(name, str) and name.isprintable())


def _explain(form: Structured, message: str) -> str:
    where = ""
    if form.kind == "json_schema":
        where = f" at {_guilty(json.loads(form.source)) or '#'}"
    return f"the {form.name} cannot be compiled{where}: {message}"


def _guilty(root: Mapping[str, Any]) -> str | None:
    """The JSON pointer of the innermost part that does not compile by itself."""
    from llguidance import LLMatcher

    definitions = {name: root[name] for name in ("$defs", "definitions") if name in root}
    guilty = None
    for pointer, part in islice(_parts(root, "#"), MOST_PARTS):
        source = LLMatcher.grammar_from_json_schema({**definitions, **part}, defaults=JSON_FORM)  # type: ignore[arg-type]
        if LLMatcher.validate_grammar(source) and (guilty is None or pointer.startswith(guilty)):
            guilty = pointer
    return guilty


def _parts(schema: Any, pointer: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every schema within a schema with its pointer, the outer before the inner."""
    if not isinstance(schema, Mapping):
        return
    yield pointer, schema
    for name in ("properties", "patternProperties", "$defs", "definitions"):
        inner = schema.get(name)
        for key, part in inner.items() if isinstance(inner, Mapping) else ():
            yield from _parts(part, f"{pointer}/{name}/{key}")
    for name in ("items", "additionalProperties", "contains", "propertyNames", "not"):
        yield from _parts(schema.get(name), f"{pointer}/{name}")
    for name in ("anyOf", "oneOf", "allOf", "prefixItems"):
        inner = schema.get(name)
        for i, part in enumerate(inner if isinstance(inner, list) else ()):
            yield from _parts(part, f"{pointer}/{name}/{i}")
