"""From a form to a constraint: grammars compiled by llguidance, apart from the engine, kept by content.

Whoever asks waits, and nothing of it is in a step. Threads of their own try each form in a process of its own and then
compile it here. What a form takes is counted from when its turn comes, so that a slow one makes no other fail; and who
is not done soon goes on elsewhere, so that quick ones wait for quick ones only.
"""

import json
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from foredraft.errors import GrammarError, RequestError, missing_extra
from foredraft.structured.matcher import DeadEndError, GrammarConstraint
from foredraft.structured.source import limits, literals, said, source_of
from foredraft.structured.spec import Structured
from foredraft.structured.trial import SECONDS, LateError, Vocabulary, trials

KEPT = 64
AT_ONCE = 2  # forms that compile side by side, and as many more of the slow ones
QUICK = 1.0  # seconds
LOOK_AHEAD = 20  # tokens of a text that are tried before anything runs
STACK = 64 << 20  # bytes of a thread that compiles
STACKS = threading.Lock()  # of the size with which threads start, which is the whole process's


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
        self._quick = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="foredraft-grammar")
        self._slow = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="foredraft-slow-grammar")
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
        return GrammarConstraint(self._matcher(form), ends, self._vocabulary(), self.vocab_size)

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
                future = self.compiled[form] = Future()
                with _deep_stack():
                    self._quick.submit(self._compile, form, tokens, future, min(QUICK, self.seconds))
            self.compiled.move_to_end(form)
            while len(self.compiled) > self.kept:
                self.compiled.popitem(last=False)
        return future.result()

    def _compile(self, form: Structured, tokens: Any, future: Future[Any], seconds: float) -> None:
        """Try it for so long, then again for as long as it may take."""
        marks = tuple(str(token) for token in self.tokenizer.added_tokens_decoder.values())
        try:
            at = trials().run(form, Vocabulary(tokens.vocab_size, marks), seconds)
            future.set_result(compile_form(form, tokens, at))
        except LateError as error:
            if seconds >= self.seconds:
                future.set_exception(error)
                return
            with _deep_stack():
                self._slow.submit(self._compile, form, tokens, future, self.seconds)
        except BaseException as error:
            future.set_exception(error)


@contextmanager
def _deep_stack() -> Iterator[None]:
    """Threads that are started meanwhile have room for what a trial has had room for."""
    with STACKS:
        before = threading.stack_size(STACK)
        try:
            yield
        finally:
            threading.stack_size(before)


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


def compile_form(form: Structured, tokens: Any, at: str | None = None) -> Any:
    """A matcher at the start of the grammar. `at`: where the fault is, if it has one.

    Raises:
        GrammarError: it does not compile, or nothing that it matches can be spelled in this vocabulary.
    """
    from llguidance import LLMatcher

    matcher = LLMatcher(tokens, source_of(form), log_level=0, limits=limits())
    if matcher.is_error():
        where = f" at {at}" if at else ""
        raise GrammarError(f"the {form.name} cannot be compiled{where}: {said(form, matcher.get_error())}")
    follower = GrammarConstraint(matcher, (tokens.eos_token,), tokens, tokens.vocab_size)
    _check_start(form, follower, tokens)
    _check_ahead(form, follower)
    return matcher


def _check_start(form: Structured, follower: GrammarConstraint, tokens: Any) -> None:
    """Raises GrammarError where no text can begin, or a text that must come has no tokens."""
    try:
        follower.allowed_after([()])
    except GrammarError as error:
        raise GrammarError(f"the {form.name} matches nothing that this vocabulary can spell: {error}") from error
    forced = bytes(follower.matcher.deep_copy().compute_ff_bytes()).decode(errors="ignore")
    for text in (forced, *literals(form)):
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
    except DeadEndError:
        return  # others may not be
    except GrammarError as error:
        raise GrammarError(f"the {form.name} cannot be followed beyond {len(path)} tokens: {error}") from error
