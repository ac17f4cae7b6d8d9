"""A language model that is not there, and the `foredraft` command with it: `python tests/fake_llm.py ARGUMENTS`.

Imports no torch, so that a test may start it as a process of its own.
"""

import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from foredraft import cli
from foredraft.cli import session
from foredraft.cli.options import RunOptions
from foredraft.errors import ModelError, PromptTooLongError
from foredraft.stats import SpecStats

WORDS = ["It", " is", " a", " table", " for", " two"]
HARD = ["é", " 中文", " 😀", "\x1b[2J", " end"]


class FakeLLM:
    """Answers by the last word of the prompt: see `words`. Every other token counts as drafted."""

    def __init__(self, template: str = "") -> None:
        self.tokenizer = SimpleNamespace(chat_template=template, decode=lambda ids: f"<{ids[0]}>")
        self.drafter = SimpleNamespace(name="fake")
        self.exact = True
        self.asked: list[tuple[Any, Any, int | None]] = []

    def words(self, prompt: str, plain: bool) -> Iterator[str]:
        if prompt.endswith("too long"):
            raise PromptTooLongError("the prompt has 9 tokens, and the context has 8")
        if prompt.endswith("noise"):
            print("a library prints")
        if prompt.endswith("differ") and not plain:
            yield from [*WORDS[:2], " no", *WORDS[3:5]]
        elif prompt.endswith("forever"):
            while True:
                yield "again and again\n"
                time.sleep(0.01)
        else:
            yield from WORDS * 6 if prompt.endswith("at length") else HARD if prompt.endswith("hard") else WORDS
        if prompt.endswith("fail"):
            raise ModelError("the weights\nare damaged")

    def stream(self, prompt: Any, params: Any, *, num_draft_tokens: int | None = None) -> Iterator[SimpleNamespace]:
        self.asked.append((prompt, params, num_draft_tokens))
        text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        words = list(self.words(text, num_draft_tokens == 0)) if text.endswith("too long") else None
        return self._chunks(words or self.words(text, num_draft_tokens == 0), params, num_draft_tokens)

    def _chunks(self, words: Any, params: Any, gamma: int | None) -> Iterator[SimpleNamespace]:
        ids, flags, text = [], [], ""
        for word in words:
            token, drafted = sum(map(ord, word)), gamma != 0 and len(ids) % 2 == 1
            ids.append(token)
            flags.append(drafted)
            text += word
            yield chunk(word, (token,), (drafted,), ((word, drafted),), None, None)
        stats = SpecStats(prompt_tokens=3, seconds_total=0.1)
        for _ in flags[::2]:
            stats.count_pass(2 * (gamma != 0), int(gamma != 0), 1 + (gamma != 0))
        seed = 7 if params.seed is None else params.seed
        result = SimpleNamespace(
            text=text, token_ids=ids, from_draft=flags, finish_reason="stop", prompt_token_ids=[1, 2, 3], seed=seed,
            stats=stats, exact=self.exact, error=None, tool_calls=(), answer_start=0,
        )  # fmt: skip
        yield chunk("", (), (), (), "stop", result)

    def generate(self, prompt: Any, params: Any, *, num_draft_tokens: int | None = None) -> SimpleNamespace:
        *_, last = self.stream(prompt, params, num_draft_tokens=num_draft_tokens)
        assert last.result
        return last.result

    stream_chat = stream
    chat = generate


def chunk(
    text: str, token_ids: Any, from_draft: Any, pieces: Any, finish_reason: str | None, result: Any
) -> SimpleNamespace:
    return SimpleNamespace(
        text=text, token_ids=token_ids, from_draft=from_draft, pieces=pieces, finish_reason=finish_reason, result=result
    )


@dataclass(frozen=True)
class Params:
    seed: int | None = None
    structured: None = None


def main() -> None:
    """The command line with this model; FAKE_READY=1 tells when it has loaded."""
    llm = FakeLLM(os.environ.get("FAKE_TEMPLATE", ""))

    def opened(options: RunOptions, *, repeats: bool = False) -> FakeLLM:
        if os.environ.get("FAKE_READY"):
            print("ready", file=sys.stderr, flush=True)
        return llm

    session.open_llm = opened  # type: ignore[assignment]
    session.sampling_params = lambda options: Params(options.seed)  # type: ignore[assignment, return-value]
    cli.main()


if __name__ == "__main__":
    main()
