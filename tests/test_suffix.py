"""The suffix drafter: its rule against brute force, its memory's bounds, who sees whose texts, damaged files."""

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from fakes import Ask, TableModel, new_request, play
from hypothesis import given, settings
from hypothesis import strategies as st
from models import draws, tiny

from foredraft import LLM, SamplingParams
from foredraft.drafters.memory import WORST, SuffixMemory
from foredraft.drafters.occurrences import LONG, NEWEST, SHORT, Guess, SuffixRule, Texts
from foredraft.drafters.suffix import SuffixDrafter
from foredraft.engine import Engine
from foredraft.errors import ModelError, RequestError, VocabularyMismatchError
from foredraft.policy import Fixed
from foredraft.types import Draft, Request

RULE = SuffixRule()
VOCAB = 50
PHRASES = st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=6), max_size=4)
TEXTS = st.one_of(
    st.lists(st.integers(0, 2), max_size=40),
    PHRASES.map(lambda phrases: [token for phrase in phrases * 3 for token in phrase]),
)


def indexed(*outputs: list[int], opened: list[int] | None = None) -> Texts:
    texts = Texts()
    for output in outputs:
        texts.extend(output)
        texts.end()
    texts.extend(opened or [])
    return texts


def score_of(shares: tuple[float, ...]) -> float:
    total, product = 0.0, 1.0
    for share in shares:
        product *= share
        total += product
    return total


def best_score(outputs: list[list[int]], tail: list[int], limit: int) -> float:
    """The rule as it is written, by brute force: for every match length, over all places in all outputs."""
    best = 0.0
    for match in range(SHORT, min(RULE.depth, len(tail)) + 1):
        ends = [
            (output, end)
            for output in reversed(outputs)  # of equally frequent tokens the one that was seen last
            for end in reversed(range(match, len(output) + 1))
            if output[end - match : end] == tail[-match:]
        ]
        best = max(best, follow(ends, RULE.longest(match, limit)))
    return best


def follow(ends: list[tuple[list[int], int]], longest: int) -> float:
    score, product = 0.0, 1.0
    for _ in range(longest):
        counts = Counter(output[end] for output, end in ends if end < len(output))
        if not counts:
            break
        token, count = counts.most_common(1)[0]
        product *= count / len(ends)
        if product <= RULE.least:
            break
        score += product
        ends = [(output, end + 1) for output, end in ends if end < len(output) and output[end] == token]
    return score


@settings(deadline=None, max_examples=300)
@given(st.lists(TEXTS, max_size=3), TEXTS, st.integers(1, 8))
def test_the_draft_is_the_rules(outputs: list[list[int]], tail: list[int], limit: int) -> None:
    guess = indexed(*outputs).guess(tail, limit, RULE)
    assert guess.score == pytest.approx(score_of(guess.shares))
    assert len(guess.tokens) == len(guess.shares) <= limit
    said = [output[i:] for output in outputs for i in range(len(output))]
    if guess.tokens:
        assert SHORT <= guess.match and len(guess.tokens) <= guess.match
        whole = [*tail[-guess.match :], *guess.tokens]
        assert any(text[: len(whole)] == whole for text in said)
    if sum(text[:SHORT] == tail[-SHORT:] for text in said) <= NEWEST:  # of more places only the newest count
        assert guess.score == pytest.approx(best_score(outputs, tail, limit))


def test_the_most_frequent_continuation_wins_and_shares_are_counted() -> None:
    texts = indexed([1, 2, 3, 4, 5], [1, 2, 3, 4, 6], [1, 2, 3, 4, 5], [9, 9])
    assert texts.guess([1, 2, 3, 4], 8, RULE) == Guess((5,), (2 / 3,), 2 / 3, 4)
    assert texts.guess([7, 7], 8, RULE) == Guess()
    many = indexed(*([1, 2, 10 + i] for i in range(12)))
    assert many.guess([1, 2], 8, RULE).tokens == ()  # a twelfth each: not likely enough


def test_a_match_of_m_tokens_drafts_m_tokens_at_most() -> None:
    texts = indexed([1, 2, 3, 4, 5, 6, 7, 8])
    assert texts.guess([1, 2], 8, RULE).tokens == (3, 4)
    assert texts.guess([1, 2, 3], 8, RULE).tokens == (4, 5, 6)
    assert texts.guess([1, 2, 3], 8, SuffixRule(factor=2.0, offset=1.0)).tokens == (4, 5, 6, 7, 8)
    assert texts.guess([1, 2, 3], 1, RULE).tokens == (4,)


def test_a_longer_match_beats_a_shorter_one_of_equal_score() -> None:
    texts = indexed([8, 1, 2, 3, 5, 5], [7, 1, 2, 3, 6, 6])
    assert texts.guess([8, 1, 2, 3], 2, RULE).tokens == (5, 5)
    assert texts.guess([7, 1, 2, 3], 2, RULE).tokens == (6, 6)


def test_old_places_give_way_to_new_ones() -> None:
    """What was said often long ago does not outvote what is said now."""
    texts = indexed(*([[1, 2, 3]] * 100), *([[1, 2, 4]] * NEWEST))
    assert texts.guess([1, 2], 1, RULE) == Guess((4,), (1.0,), 1.0, 2)


def test_the_running_text_repeats_itself() -> None:
    text = [7, 1, 2, 3, 1, 2, 3]
    assert indexed(opened=text).guess(text, 8, RULE).tokens == (1, 2, 3)
    same = [4] * 12
    assert indexed(opened=same).guess(same, 8, RULE).tokens == (4,) * 8


@settings(deadline=None, max_examples=100)
@given(st.lists(TEXTS, min_size=1, max_size=6), st.integers(0, 6), TEXTS)
def test_what_was_dropped_leaves_no_trace(outputs: list[list[int]], dropped: int, tail: list[int]) -> None:
    texts, dropped = indexed(*outputs), min(dropped, len(outputs))
    for _ in range(dropped):
        texts.drop_oldest()
    left = indexed(*outputs[dropped:])
    assert texts.guess(tail, 8, RULE) == left.guess(tail, 8, RULE)
    assert set(texts.heads) == set(left.heads)
    if dropped == len(outputs):
        assert not texts.heads and not texts.tokens


# --- the memory ---


def output(seed: int, length: int = 40) -> list[int]:
    return [token % VOCAB for token in draws(length, seed)]


def remembers(memory: SuffixMemory, tokens: list[int], name: str = "") -> bool:
    """By a place in it that no other output has."""
    return memory.guess(tokens[:LONG], 4, RULE, name).tokens == tuple(tokens[LONG : LONG + 4])


def test_the_oldest_requests_go_first() -> None:
    memory = SuffixMemory(VOCAB, max_requests=3)
    for seed in range(5):
        memory.add(output(seed))
    assert len(memory) == 3
    assert [remembers(memory, output(seed)) for seed in range(5)] == [False, False, True, True, True]


def test_bytes_are_bounded_over_all_names() -> None:
    memory = SuffixMemory(VOCAB, max_bytes=100_000)
    for seed in range(300):
        memory.add(output(seed), f"user {seed % 7}")
        assert memory.nbytes <= 100_000
    assert 3 < len(memory) < 300
    assert remembers(memory, output(299), f"user {299 % 7}")
    memory.clear("user 5")
    assert not remembers(memory, output(299), f"user {299 % 7}")
    memory.clear()
    assert (len(memory), memory.nbytes) == (0, 0)


def test_of_an_output_that_does_not_fit_the_end_is_kept() -> None:
    memory = SuffixMemory(10**6, max_bytes=20 * WORST)
    memory.add(range(5000))
    assert memory.nbytes <= 20 * WORST and len(memory) == 1
    assert memory.guess([4990, 4991], 2, RULE).tokens == (4992, 4993)


def test_memory_is_freed_as_texts_go() -> None:
    """The arrays are cut as well, not only what is counted."""
    memory = SuffixMemory(VOCAB, max_requests=10)
    for seed in range(500):
        memory.add(output(seed))
    texts = memory._texts[""]
    assert len(texts.tokens) <= 2 * 10 * 41 + 41
    assert len(texts.heads) <= 2 * 10 * 41


@pytest.mark.parametrize("bounds", [{"max_requests": 0}, {"max_bytes": -1}])
def test_bounds_that_keep_nothing_are_named(bounds: dict[str, int]) -> None:
    (name, value), *_ = bounds.items()
    with pytest.raises(RequestError, match=f"{name}={value}"):
        SuffixMemory(VOCAB, **bounds)


def test_measured_bytes_are_near_those_counted() -> None:
    import tracemalloc

    tracemalloc.start()
    try:
        texts = Texts()
        before = tracemalloc.get_traced_memory()[0]
        for seed in range(40):
            texts.extend([token + 200 * seed for token in draws(500, seed)])
            texts.end()
        used = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert 0.6 < texts.nbytes / used < 1.6


# --- files ---


def test_a_memory_is_saved_and_loaded(tmp_path: Path) -> None:
    memory = SuffixMemory(VOCAB)
    for seed in range(6):
        memory.add(output(seed), f"user {seed % 2}")
    path = memory.save(tmp_path / "deep" / "memory.bin")
    other = SuffixMemory(VOCAB, max_requests=2)
    other.load(path)
    assert len(other) == 4  # within its own bounds
    assert [remembers(other, output(seed), f"user {seed % 2}") for seed in range(6)] == [False] * 2 + [True] * 4
    assert not list(tmp_path.rglob("*.partial"))


def damaged(path: Path, how: str) -> None:
    line, _, data = path.read_bytes().partition(b"\n")
    header: dict[str, Any] = json.loads(line)
    if how == "cut":
        data = data[:-8]
    elif how == "changed":
        data = data[:40] + b"\x01" + data[41:]
    elif how == "text":
        path.write_text("not a memory")
        return
    elif how == "tokens":
        data = b"\xff\xff\xff\x7f" + data[4:]
        header["sha256"] = hashlib.sha256(data).hexdigest()
    elif how == "lengths":
        header["outputs"][0][1] += 1
    elif how == "format":
        header["format"] = "foredraft suffix memory 9"
    elif how == "keys":
        del header["outputs"]
    path.write_bytes(json.dumps(header).encode() + b"\n" + data)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("cut", "damaged"),
        ("changed", "damaged"),
        ("lengths", "damaged"),
        ("tokens", "outside its vocabulary"),
        ("text", "is no suffix memory"),
        ("keys", "is no suffix memory"),
        ("format", "has format 'foredraft suffix memory 9'"),
    ],
)
def test_damage_is_named_and_nothing_is_taken_in(tmp_path: Path, how: str, message: str) -> None:
    memory = SuffixMemory(VOCAB)
    memory.add(output(0))
    path = memory.save(tmp_path / "memory.bin")
    damaged(path, how)
    fresh = SuffixMemory(VOCAB)
    with pytest.raises(ModelError, match=message):
        fresh.load(path)
    assert len(fresh) == 0


def test_a_file_of_another_vocabulary_or_none_at_all_is_refused(tmp_path: Path) -> None:
    path = SuffixMemory(VOCAB).save(tmp_path / "memory.bin")
    with pytest.raises(VocabularyMismatchError, match="50 tokens, and this model has 60"):
        SuffixMemory(60).load(path)
    with pytest.raises(ModelError, match="no suffix memory at"):
        SuffixMemory(VOCAB).load(tmp_path / "none")


# --- the drafter ---


def request(tokens: list[int], limit: int = 8, memory: str | None = "") -> Request:
    made = new_request(Ask(tokens, SamplingParams(max_new_tokens=100)))
    made.draft_limit, made.memory = limit, memory
    return made


def draft(drafter: SuffixDrafter, tokens: list[int], memory: str | None = "") -> Draft:
    made = request(tokens, memory=memory)
    (found,) = drafter.propose([made], Fixed(8))
    drafter.texts.pop(made)
    return found


def finish(drafter: SuffixDrafter, tokens: list[int], memory: str | None = "") -> None:
    """A request that said these tokens and has ended."""
    made = request([VOCAB - 1], memory=memory)
    made.token_ids += tokens
    drafter.forget(made)


def test_a_request_drafts_from_what_others_of_its_name_said() -> None:
    drafter = SuffixDrafter(SuffixMemory(VOCAB))
    said = output(1)
    finish(drafter, said, "alice")
    assert draft(drafter, said[:6], "alice").tokens == tuple(said[6:12])
    assert draft(drafter, said[:6], "bob").tokens == ()
    assert draft(drafter, said[:6]).tokens == ()
    assert draft(drafter, said[:6], None).tokens == ()
    finish(drafter, output(2), None)
    assert len(drafter.memory or ()) == 1


def test_without_a_memory_no_request_leaves_a_trace() -> None:
    off, fresh = SuffixDrafter(), SuffixDrafter()
    said = output(1)
    for _ in range(3):
        draft(off, said)
        finish(off, said)
    assert off.cache_bytes == 0 and not off.texts
    for cut in range(2, len(said)):
        assert draft(off, said[:cut]).tokens == draft(fresh, said[:cut]).tokens == ()


def test_prompts_are_not_remembered() -> None:
    drafter = SuffixDrafter(SuffixMemory(VOCAB))
    made = request(output(3))
    made.token_ids += output(4)
    drafter.forget(made)
    assert draft(drafter, output(4)[:6]).tokens == tuple(output(4)[6:12])
    assert draft(drafter, output(3)[:6]).tokens == ()


def test_the_better_score_wins_and_then_the_own_text() -> None:
    drafter = SuffixDrafter(SuffixMemory(VOCAB))
    finish(drafter, [1, 2, 3, 30, 31, 32])
    assert draft(drafter, [1, 2, 3, 20, 21, 22, 1, 2, 3]).tokens == (20, 21, 22)
    finish(drafter, [9, 1, 2, 3, 40, 41, 42, 43])
    assert draft(drafter, [1, 2, 3, 20, 21, 22, 9, 1, 2, 3]).tokens == (40, 41, 42, 43)


def test_a_text_that_is_not_the_one_that_was_read_is_read_anew() -> None:
    """A reset that kept the position up to which a text was read would draft from a text that is gone."""
    drafter = SuffixDrafter()
    made = request([1, 2, 3, 4, 1, 2])
    assert drafter.propose([made], Fixed(8))[0].tokens == (3, 4)
    made.token_ids[:] = [5, 6, 7, 5, 6]
    assert drafter.propose([made], Fixed(8))[0].tokens == (7, 5)
    made.token_ids[:] = [5, 6, 7, 5, 9]
    assert drafter.propose([made], Fixed(8))[0].tokens == ()


def test_confidence_grows_with_the_match_and_the_share() -> None:
    drafter = SuffixDrafter(SuffixMemory(VOCAB))
    finish(drafter, [1, 2, 3, 4, 5, 6])
    short, long = draft(drafter, [1, 2]), draft(drafter, [1, 2, 3, 4])
    assert short.confidences[0] < long.confidences[0]
    finish(drafter, [1, 2, 9, 9])
    assert draft(drafter, [1, 2]).confidences[0] < short.confidences[0]
    assert short.probs is None  # a lookup is one-hot


@pytest.mark.parametrize("gamma", [1, 4, 8])
def test_it_follows_the_text_through_accepted_and_refused_drafts(gamma: int) -> None:
    drafter = SuffixDrafter(SuffixMemory(8))
    engine = Engine(TableModel(8), drafter, Fixed(gamma), max_batch_size=2, max_model_len=200)
    asks = [Ask([1, 2, 3 + i], SamplingParams(max_new_tokens=60), seed=i) for i in range(3)]
    plain = Engine(TableModel(8), SuffixDrafter(), Fixed(0), max_batch_size=2, max_model_len=200)
    for made, alone in zip(play(engine, asks), play(plain, asks), strict=True):
        assert made.token_ids == alone.token_ids
    assert not drafter.texts and len(drafter.memory or ()) == 3
    assert engine.stats.accepted > 50  # greedy text from a table soon turns in circles


def test_memory_counts_in_llm_memory_and_changes_no_text() -> None:
    llm = LLM(tiny("llama"), "suffix")
    before = llm.memory["draft_cache"]
    params = SamplingParams(max_new_tokens=30)
    first = llm.generate([1, 2, 3], params)
    assert llm.memory["draft_cache"] > before == 0
    again = llm.generate([1, 2, 3], params)
    plain = LLM(tiny("llama"), "none").generate([1, 2, 3], params)
    assert first.token_ids == again.token_ids == plain.token_ids
    assert again.stats.accepted > first.stats.accepted
    assert llm.model.vocab_size == getattr(llm.drafter, "memory").vocab_size  # noqa: B009
