"""The drop-in: a user's processors, stopping criteria and streamers see what they would see in transformers."""

import io
import threading
from contextlib import redirect_stdout
from typing import Any

import pytest
import torch
from dropin import NEW, Seen, continuation, padded, prompts, same, tokenizer
from models import VOCAB
from transformers import (
    LogitsProcessor,
    PreTrainedModel,
    TextIteratorStreamer,
    TextStreamer,
)

from foredraft.integrations.transformers import SpeculativeModel


class Forbid(LogitsProcessor):
    """Depends on the whole prefix and its length: wrong prefixes change the text."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, (input_ids.sum(-1) + input_ids.shape[1]) % VOCAB] = -torch.inf  # in place, as many do
        scores[:, : VOCAB // 2 : 1 + input_ids.shape[1] % 3] -= 2.0
        return scores


class Puts:
    """A streamer that remembers what it was given."""

    def __init__(self) -> None:
        self.values: list[Any] = []

    def put(self, value: torch.Tensor) -> None:
        self.values.append(value.tolist())

    def end(self) -> None:
        self.values.append("end")


def test_a_custom_processor(plain: PreTrainedModel, fast: SpeculativeModel) -> None:
    unprocessed = plain.generate(prompts(), max_new_tokens=NEW)
    found = same(plain, fast, prompts(), max_new_tokens=NEW, logits_processor=[Forbid()])
    assert found.tolist() != unprocessed.tolist()


def test_a_custom_processor_sees_the_padding(llama: PreTrainedModel, llama_fast: SpeculativeModel) -> None:
    """Forbid takes one token from all rows; here each row has its own."""

    class Own(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            out = scores.clone()
            rows = torch.arange(len(scores))
            out[rows, (input_ids[:, 0] + input_ids.sum(-1) + input_ids.shape[1]) % VOCAB] += 6.0
            return out

    same(llama, llama_fast, padded(), max_new_tokens=NEW, logits_processor=[Own()], pad_token_id=3)


def test_allowed_tokens_know_their_row(llama: PreTrainedModel, llama_fast: SpeculativeModel) -> None:
    def allowed(row: int, ids: torch.Tensor) -> list[int]:
        return list(range(10 + 40 * row, 50 + 40 * row - len(ids) % 5))

    same(llama, llama_fast, padded(), max_new_tokens=NEW, prefix_allowed_tokens_fn=allowed, pad_token_id=3)


@pytest.mark.parametrize("scalar", [False, True])
def test_stopping_criteria_see_every_prefix(plain: PreTrainedModel, fast: SpeculativeModel, scalar: bool) -> None:
    ids = prompts(seed=3)
    text = continuation(plain, ids)
    for position in range(0, 12, 3):
        theirs, ours = Seen(text[position], scalar=scalar), Seen(text[position], scalar=scalar)
        expected = plain.generate(ids, max_new_tokens=NEW, stopping_criteria=[theirs])
        found = fast.generate(ids, max_new_tokens=NEW, stopping_criteria=[ours])
        assert found.tolist() == expected.tolist()
        assert ours.prefixes == theirs.prefixes


@pytest.mark.parametrize("eos", [None, 9])
def test_stopping_criteria_in_a_batch(llama: PreTrainedModel, llama_fast: SpeculativeModel, eos: int | None) -> None:
    """Without an end-of-sequence token transformers lets the rows that have ended go on until all have."""
    text = llama.generate(**padded(), max_new_tokens=NEW, pad_token_id=3)[:, 12:]
    for position in ((3, 9, 6), (0, 0, 0), (12, 1, 2)):
        stops = [int(text[row, at]) for row, at in enumerate(position)]
        same(
            llama,
            llama_fast,
            padded(),
            max_new_tokens=NEW,
            stopping_criteria=[Seen(*stops)],
            eos_token_id=eos,
            pad_token_id=3,
        )


def test_max_time_ends_the_text(llama_fast: SpeculativeModel) -> None:
    assert llama_fast.generate(prompts(), max_new_tokens=500, max_time=0.0).shape == (1, 13)


@pytest.mark.parametrize("rows", [1, 3])
def test_streamers_get_the_same(llama: PreTrainedModel, llama_fast: SpeculativeModel, rows: int) -> None:
    theirs, ours = Puts(), Puts()
    inputs = {name: value[:rows] for name, value in padded().items()}
    options: dict[str, Any] = {"max_new_tokens": NEW, "eos_token_id": list(range(8, 24)), "pad_token_id": 3}
    llama.generate(**inputs, **options, streamer=theirs)
    llama_fast.generate(**inputs, **options, streamer=ours)
    assert ours.values == theirs.values


def test_a_streamer_that_fails_leaves_nothing_behind(llama: PreTrainedModel, llama_fast: SpeculativeModel) -> None:
    class Full(Puts):
        def put(self, value: torch.Tensor) -> None:
            super().put(value)
            if len(self.values) > 5:
                raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        llama_fast.generate(prompts(), max_new_tokens=NEW, streamer=Full())
    assert not llama_fast.engine.has_work
    same(llama, llama_fast, prompts(), max_new_tokens=NEW)


def test_text_streamers(llama: PreTrainedModel, llama_fast: SpeculativeModel) -> None:
    printed = []
    for model in (llama, llama_fast):
        with redirect_stdout(io.StringIO()) as out:
            model.generate(prompts(), max_new_tokens=NEW, streamer=TextStreamer(tokenizer()))
        printed.append(out.getvalue())
    assert printed[0] == printed[1] != ""


def test_a_text_iterator_in_a_thread(llama: PreTrainedModel, llama_fast: SpeculativeModel) -> None:
    streamer = TextIteratorStreamer(tokenizer(), skip_prompt=True, timeout=30)
    options: dict[str, Any] = {"inputs": prompts(), "max_new_tokens": NEW, "streamer": streamer}
    thread = threading.Thread(target=llama_fast.generate, kwargs=options)
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == tokenizer().decode(continuation(llama, prompts()))


def test_stop_strings(llama: PreTrainedModel, llama_fast: SpeculativeModel) -> None:
    words = tokenizer()
    stop = words.decode(continuation(llama, prompts())[6:8])
    options: dict[str, Any] = {"stop_strings": [stop], "tokenizer": words, "max_new_tokens": NEW}
    same(llama, llama_fast, prompts(), **options)
    with pytest.raises(ValueError, match="tokenizer"):
        llama_fast.generate(prompts(), stop_strings=[stop], max_new_tokens=NEW)
