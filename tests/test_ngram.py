"""The suffix automaton finds what brute force finds, and drafts what followed."""

import pytest
from fakes import Ask, TableModel, new_request, play
from hypothesis import example, given, settings
from hypothesis import strategies as st

from foredraft.drafters.ngram import NgramDrafter, SuffixIndex
from foredraft.engine import Engine
from foredraft.policy import Fixed
from foredraft.types import SamplingParams

PHRASES = st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=6), max_size=4)
TEXTS = st.one_of(
    st.lists(st.integers(0, 2), max_size=60),
    st.lists(st.integers(0, 9), max_size=60),
    PHRASES.map(lambda phrases: [token for phrase in phrases * 4 for token in phrase]),
)


def indexed(tokens: list[int]) -> SuffixIndex:
    index = SuffixIndex()
    for token in tokens:
        index.append(token)
    return index


def longest_match(tokens: list[int]) -> tuple[int, set[int]]:
    """By brute force: how long the longest suffix is that also ends earlier, and at which indices it does."""
    for length in range(len(tokens) - 1, 0, -1):
        suffix = tokens[-length:]
        ends = {end for end in range(length - 1, len(tokens) - 1) if tokens[end - length + 1 : end + 1] == suffix}
        if ends:
            return length, ends
    return 0, set()


@settings(deadline=None, max_examples=300)
@given(TEXTS)
@example([])
@example([1])
@example([1] * 9)
@example([1, 2, 1, 2, 1])
def test_the_longest_earlier_match_is_found_at_every_length_of_the_text(tokens):
    index = SuffixIndex()
    for i, token in enumerate(tokens):
        index.append(token)
        length, ends = longest_match(tokens[: i + 1])
        assert index.match_length == length
        if length:
            assert index.match_end in ends


@settings(deadline=None, max_examples=300)
@given(TEXTS, st.integers(0, 12))
def test_the_continuation_is_what_followed(tokens, count):
    index = indexed(tokens)
    drafted = index.continuation(count)
    if index.match_length == 0:
        assert drafted == []
        return
    text = list(tokens)
    for token in drafted:  # what followed the match, then what followed that: the text repeats itself
        assert token == text[index.match_end + 1 + len(text) - len(tokens)]
        text.append(token)
    assert len(drafted) == count


def test_a_run_drafts_its_own_repetition():
    assert indexed([7, 1, 2, 3, 1, 2, 3]).continuation(7) == [1, 2, 3, 1, 2, 3, 1]
    assert indexed([4, 4, 4]).continuation(4) == [4, 4, 4, 4]


def test_the_index_stays_small_and_is_built_step_by_step():
    """At most two states a token (Blumer et al.), however the text repeats."""
    for tokens in ([1, 2] * 500, list(range(1000)), [1] * 1000):
        assert len(indexed(tokens).edges) <= 2 * len(tokens)


def draft(tokens: list[int], limit: int, min_match: int = 2):
    request = new_request(Ask(tokens, SamplingParams()))
    request.draft_limit = limit
    (made,) = NgramDrafter(min_match).propose([request], Fixed(limit))
    return made


def test_short_matches_are_no_guess():
    assert draft([1, 2, 9, 1, 2], 2).tokens == (9, 1)
    assert draft([1, 2, 9, 3, 2], 2).tokens == ()
    assert draft([1, 2, 9, 3, 2], 2, min_match=1).tokens == (9, 3)
    assert draft([1, 2, 9, 1, 2], 0).tokens == ()


def test_a_longer_match_is_a_surer_one():
    short, long = draft([1, 2, 9, 1, 2], 1), draft([5, 1, 2, 9, 5, 1, 2], 1)
    assert short.confidences < long.confidences
    assert short.probs is None  # a lookup is one-hot


@pytest.mark.parametrize("gamma", [1, 4, 8])
def test_it_follows_the_text_through_accepted_and_refused_drafts_and_forgets_it(gamma):
    made = NgramDrafter(min_match=1)
    engine = Engine(TableModel(8), made, Fixed(gamma), max_batch_size=2, max_model_len=200)
    asks = [Ask([1, 2, 3 + i], SamplingParams(max_new_tokens=60), seed=i) for i in range(3)]
    seen: dict[int, list[int]] = {}
    original = made.forget

    def forget(request):
        seen[request.seed] = list(made.indices[request].tokens)
        original(request)

    made.forget = forget
    for request in play(engine, asks):
        assert seen[request.seed] == request.token_ids[: len(seen[request.seed])]
        assert len(seen[request.seed]) > 50
    assert made.indices == {}
    assert engine.stats.accepted > 50  # greedy text from a table soon turns in circles
