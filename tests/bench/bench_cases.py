"""What the bench's tests share: a tiny model that speaks in words, tasks for it, and one whole run."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

from models import VOCAB, tiny
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from foredraft import LLM, SamplingParams
from foredraft.bench import measure
from foredraft.bench.asking import Run
from foredraft.bench.options import BenchOptions
from foredraft.bench.tasks import Task

TOKENS = 12


def words() -> PreTrainedTokenizerFast:
    model = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    model.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=model, unk_token="w0")


def task(index: int, *turns: str, **values: Any) -> Task:
    return Task(
        str(index), values.pop("category", "a" if index % 2 else "b"), turns or (f"w{index} w{index + 1}",), **values
    )


TASKS = (*tuple(task(i) for i in range(3)), task(3, "w5 w6", "w7"))
OPTIONS = BenchOptions((1, 3, None), SamplingParams(max_new_tokens=TOKENS), rounds=2, predict=False)


@cache
def small_llm() -> LLM:
    return LLM(tiny("llama"), "ngram", tokenizer=words(), max_batch_size=1)


def interrupted(*args: object) -> None:
    raise KeyboardInterrupt


def other_tokens(arm: str) -> Callable[..., Run]:
    """`measure.ask`, with the fourth token of an arm's answers changed."""
    ask = measure.ask

    def changed(llm: LLM, prompt: Any, params: Any, length: int | None, memory: str) -> Run:
        run = ask(llm, prompt, params, length, memory)
        tokens = (*run.token_ids[:3], run.token_ids[3] + 1, *run.token_ids[4:])
        return replace(run, token_ids=tokens) if memory.startswith(arm) else run

    return changed


def interrupted_after(count: int) -> Callable[..., Run]:
    """`measure.ask`, which so many calls later is where Ctrl-C comes."""
    ask, left = measure.ask, [count]

    def counted(*args: Any) -> Run:
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        return ask(*args)

    return counted
