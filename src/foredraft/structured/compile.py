"""From a form to a constraint: grammars compiled by llguidance, apart from the engine, kept by content.

Whoever asks waits, and nothing of it is in a step. Threads of their own try each form in a process of its own and then
compile it here. What a form takes is counted from when its turn comes, so that a slow one makes no other fail; and who
is not done soon goes on elsewhere, so that quick ones wait for quick ones only.
"""

import json
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from copy import copy
from typing import Any

from transformers import PreTrainedTokenizerBase

from foredraft.errors import ForedraftError, GrammarError, LateError, RequestError, missing_extra
from foredraft.structured.constraint import members
from foredraft.structured.matcher import DeadEndError, GrammarConstraint
from foredraft.structured.source import limits, literals, said, source_of
from foredraft.structured.spec import Structured
from foredraft.structured.trial import SECONDS, Vocabulary, trials
from foredraft.structured.vocabulary import read_vocabulary

KEPT = 64
AT_ONCE = 2  # forms that compile side by side, and as many more of the slow ones
QUICK = 1.0  # seconds
SOME_SIZE = 300  # of a vocabulary, where there is none yet
LOOK_AHEAD = 20  # tokens of a text that are tried before anything runs
LITERAL = re.compile(r'"(?:\\.|[^"\\\n])*"|//.*|/(?:\\.|[^/\\\n])+/')  # and comments, of Lark
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
            GrammarError: the form does not compile (where and why), takes too long, no text can have it, or it names
                a token that ends the text.
            RequestError: llguidance is not installed, or there is no token that ends a text.
        """
        if not ends:
            raise RequestError(
                "structured output ends with an end-of-sequence token and this model names none; give one "
                "in stop_token_ids"
            )
        if form.kind == "grammar":
            self._check_ends(form.source, ends)
        return GrammarConstraint(self._matcher(form), ends, self._vocabulary(), self.vocab_size)

    def check(self, form: Structured) -> None:
        """Raises GrammarError where `constraint` would for this form; it is compiled and kept."""
        self._matcher(form)

    def _check_ends(self, grammar: str, ends: tuple[int, ...]) -> None:
        """Raises GrammarError where a grammar wants a token within the text that ends it."""
        written = LITERAL.sub(" ", grammar)
        for token in (self._vocabulary().eos_token, *ends):
            name = str(self.tokenizer.convert_ids_to_tokens(token))
            if any(mark in written for mark in (f"<[{token}]>", name if name.startswith("<") else f"<{name}>")):
                raise GrammarError(
                    f"the grammar names the token {name!r}, which ends the text; leave it out: a text ends by itself "
                    f"where the grammar is satisfied. As text, write it in quotes: {json.dumps(name)}"
                )

    def mark(self, text: str) -> str:
        """How a grammar writes a mark of a chat template: as a token of its own, or letter by letter."""
        token = self.tokenizer.convert_tokens_to_ids(text)
        alone = isinstance(token, int) and self.tokenizer.convert_ids_to_tokens(token) == text
        return f"<[{token}]>" if alone and self._vocabulary().is_special_token(token) else json.dumps(text)

    def _vocabulary(self) -> Any:
        if self._process != os.getpid():
            self._begin()
        with self._lock:
            self._tokens = self._tokens or read_vocabulary(self.tokenizer, self.vocab_size)
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
        error = future.exception()
        if error is None:
            return future.result()
        raise copy(error) from None if isinstance(error, ForedraftError) else error  # it would collect who asked

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


def check_form(form: Structured) -> None:
    """Before a vocabulary is there: what is wrong with a form in any. One that takes long is left for later.

    Raises:
        GrammarError: it does not compile, and where.
        RequestError: llguidance is not installed.
    """
    try:
        from llguidance import LLMatcher
    except ImportError as error:
        raise RequestError(missing_extra("structured output needs", "llguidance", "structured")) from error
    try:
        at = trials().run(form, Vocabulary(SOME_SIZE, ()), QUICK)
    except LateError:
        return
    wrong, told = LLMatcher.validate_grammar_with_warnings(source_of(form), limits=limits())
    if wrong:
        raise _refused(form, told[0], at)


def _refused(form: Structured, message: str, at: str | None) -> GrammarError:
    where = f" at {at}" if at else ""
    return GrammarError(f"the {form.name} cannot be compiled{where}: {said(form, message)}")


def compile_form(form: Structured, tokens: Any, at: str | None = None) -> Any:
    """A matcher at the start of the grammar. `at`: where the fault is, if it has one.

    Raises:
        GrammarError: it does not compile, or nothing that it matches can be spelled in this vocabulary.
    """
    from llguidance import LLMatcher

    matcher = LLMatcher(tokens, source_of(form), log_level=0, limits=limits())
    if matcher.is_error():
        raise _refused(form, matcher.get_error(), at)
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
            going_on = [token for token in members(follower.allowed_after([path])[0]) if token != follower.own_end]
            if not going_on:
                return
            path.append(going_on[0])
    except DeadEndError:
        return  # others may not be
    except GrammarError as error:
        raise GrammarError(f"the {form.name} cannot be followed beyond {len(path)} tokens: {error}") from error
