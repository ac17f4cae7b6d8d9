"""Models that think before they answer, from `<think>` to `</think>`: where that ends, and a form that begins there.

Knows prompts and outputs as token ids, and what a chat template says. What is thought stays free.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto

import numpy as np
from transformers import PreTrainedTokenizerBase

from foredraft.structured.constraint import Bits, Constraint, Ids

OPENING, CLOSING = "<think>", "</think>"


class Phase(Enum):
    """Where a model's turn is."""

    START = auto()  # it may think, or answer at once
    THINKING = auto()
    CLOSED = auto()  # right behind the closing mark: one empty line may come before the answer
    ANSWER = auto()


@dataclass(frozen=True, slots=True)
class Thinking:
    """The tokens that stand around a model's thoughts, and where its turn begins."""

    opening: int
    closing: int
    gaps: frozenset[int]  # tokens of newlines alone
    phase: Phase
    written: bool = True  # whether the marks are in texts, as tokens that are not special are

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, prompt_ids: Ids) -> "Thinking | None":
        """How a turn after this prompt thinks; None where its template knows no thoughts, or has closed them already.

        A template may open the block itself (DeepSeek R1), leave that to the model (Qwen 3), or write an empty one.
        """
        if CLOSING not in str(tokenizer.chat_template or ""):
            return None
        opening, closing = (_token(tokenizer, mark) for mark in (OPENING, CLOSING))
        if opening is None or closing is None:
            return None
        last = next((token for token in reversed(prompt_ids) if str(tokenizer.decode([token])).strip()), None)
        if last == closing:
            return None
        newlines = (tokenizer.encode(text, add_special_tokens=False) for text in ("\n", "\n\n"))
        gaps = frozenset(ids[0] for ids in newlines if len(ids) == 1)
        written = bool(tokenizer.decode([closing], skip_special_tokens=True))
        return cls(opening, closing, gaps, Phase.THINKING if last == opening else Phase.START, written)

    def enter(self, phase: Phase, tokens: Ids) -> tuple[Phase, int]:
        """The phase after these tokens, and how many of them stand before the answer."""
        at = 0
        while at < len(tokens) and phase is not Phase.ANSWER:
            token = tokens[at]
            if phase is Phase.START:
                phase = Phase.THINKING if token == self.opening else Phase.ANSWER
                at += phase is Phase.THINKING
            elif phase is Phase.THINKING:
                phase = Phase.CLOSED if token == self.closing else Phase.THINKING
                at += 1
            else:
                phase = Phase.ANSWER
                at += token in self.gaps
        return phase, at

    def answer_at(self, tokens: Ids) -> int:
        """How many tokens of an output stand before the answer; all where it never came to one."""
        return self.enter(self.phase, tokens)[1]


def warn_of_spelled(tokenizer: PreTrainedTokenizerBase, prompt_ids: Ids) -> None:
    """Before a form of a turn that may think between marks of several tokens each, where `of` finds no thinking."""
    marks = (OPENING, CLOSING)
    if CLOSING not in str(tokenizer.chat_template or "") or None not in (_token(tokenizer, mark) for mark in marks):
        return
    if str(tokenizer.decode(list(prompt_ids[-2 * len(CLOSING) :]))).rstrip().endswith(CLOSING):
        return
    warnings.warn(
        f"this model's chat template knows {OPENING} and {CLOSING}, which are no single tokens of its tokenizer: "
        "thoughts cannot be told from the answer, so the form (or tool call) holds from the first token of the turn; "
        "turn thinking off where the template can (template_arguments={'enable_thinking': False}), or ask for no form",
        RuntimeWarning,
        stacklevel=3,
    )


def _token(tokenizer: PreTrainedTokenizerBase, mark: str) -> int | None:
    ids = tokenizer.encode(mark, add_special_tokens=False)
    return ids[0] if len(ids) == 1 else None


class AfterThinking:
    """A `Constraint` on the answer alone. Thoughts may be anything but the end of the text."""

    def __init__(self, answer: Constraint, thinking: Thinking, ends: tuple[int, ...], vocab_size: int) -> None:
        self.answer = answer
        self.thinking = thinking
        self.ends = ends
        self.phase = thinking.phase
        free = np.full(8 * -(-vocab_size // 8), 1, np.uint8)
        free[list(ends)] = 0
        self.free = np.packbits(free, bitorder="little").tobytes()

    @property
    def dear(self) -> bool:
        return self.answer.dear

    def allowed_after(self, paths: Sequence[Ids]) -> list[Bits]:
        if self.phase is Phase.ANSWER:
            return self.answer.allowed_after(paths)
        return [self._row(path) for path in paths]

    def forced(self, limit: int) -> tuple[int, ...]:
        return self.answer.forced(limit) if self.phase is Phase.ANSWER else ()

    def allowed(self, tokens: Ids) -> int:
        _, at = self.thinking.enter(self.phase, tokens)
        ended = next((i for i, token in enumerate(tokens[:at]) if token in self.ends), None)
        return at + self.answer.allowed(tokens[at:]) if ended is None else ended

    def commit(self, tokens: Ids) -> None:
        self.phase, at = self.thinking.enter(self.phase, tokens)
        if at < len(tokens):
            self.answer.commit(tokens[at:])

    def _row(self, path: Ids) -> Bits:
        phase, at = self.thinking.enter(self.phase, path)
        if phase is Phase.THINKING:
            return self.free
        also = {Phase.START: {self.thinking.opening}, Phase.CLOSED: self.thinking.gaps}.get(phase, ())
        bits = bytearray(self.answer.allowed_after([path[at:]])[0])
        for token in also:
            bits[token // 8] |= 1 << token % 8
        return bytes(bits)


@dataclass(slots=True)
class Parting:
    """Parts a text that comes bit by bit into what is thought and the answer, without the marks and the space there."""

    phase: Phase
    held: str = ""  # may be the beginning of a mark, or space at an end
    begun: bool = False

    def take(self, text: str, *, last: bool = False) -> tuple[str, str]:
        """What of this is thought, and what is answer."""
        self.held += text
        if self.phase is Phase.START:
            if OPENING.startswith(self.held) and not last:
                return "", ""
            thinks = self.held.startswith(OPENING)
            self.phase = Phase.THINKING if thinks else Phase.ANSWER
            self.held = self.held.removeprefix(OPENING)
        thought = self._thought(last=last) if self.phase is Phase.THINKING else ""
        return thought, self._answer() if self.phase is not Phase.THINKING else ""

    def _thought(self, *, last: bool) -> str:
        before, mark, after = self.held.partition(CLOSING)
        if mark:
            self.phase = Phase.CLOSED
        elif not last:
            start = next((i for i in range(len(before)) if CLOSING.startswith(before[i:])), len(before))
            before, after = before[:start], before[start:]
        shown = before.rstrip()
        self.held = after if mark or last else before[len(shown) :] + after
        shown = shown if self.begun else shown.lstrip()
        self.begun |= bool(shown)
        return shown

    def _answer(self) -> str:
        text, self.held = self.held, ""
        if self.phase is Phase.CLOSED:
            text = text.lstrip("\n")
            if text:
                self.phase = Phase.ANSWER
        return text
