"""`plan`: every span gets its rows, enough of them, in an order that `wanted` undoes."""

from hypothesis import given, settings
from hypothesis import strategies as st

from foredraft.models.rows import SHORT_SPAN, RowInvariance, Span, plan, round_keys, round_up

LENGTHS = st.one_of(st.integers(1, 12), st.integers(1, 2 * SHORT_SPAN), st.just(256))


@st.composite
def spans(draw) -> list[Span]:
    slots = draw(st.lists(st.integers(0, 12), min_size=1, max_size=8, unique=True))
    made = []
    for slot in slots:
        count = draw(LENGTHS)
        tokens = [1000 * (slot + 1) + i for i in range(count)]
        made.append(Span(slot, draw(st.integers(0, 2000)), tokens, draw(st.integers(0, min(count, 33)))))
    return made


shapes = st.tuples(st.sampled_from([(1, 1), (4, 1), (4, 4), (8, 8)]), st.sampled_from([1, 128, 512]))


def rows_of(batch) -> dict[tuple[int, int], int]:
    """Row by slot and position."""
    return {pair: row for row, pair in enumerate(zip(batch.slots, batch.positions, strict=True))}


@settings(deadline=None)
@given(spans(), shapes)
def test_every_token_has_one_row_at_its_position(given_spans, shape):
    (least, multiple), keys = shape
    batch = plan(given_spans, least, keys, multiple)
    where = rows_of(batch)
    assert len(where) == len(batch.tokens) == len(batch.positions) == len(batch.slots)  # no position twice
    for span in given_spans:
        for i, token in enumerate(span.tokens):
            assert batch.tokens[where[span.slot, span.start + i]] == token


@settings(deadline=None)
@given(spans(), shapes)
def test_wanted_rows_are_the_last_of_each_span_in_the_order_given(given_spans, shape):
    (least, multiple), keys = shape
    batch = plan(given_spans, least, keys, multiple)
    asked = [token for span in given_spans for token in list(span.tokens)[len(span.tokens) - span.wanted :]]
    assert [batch.tokens[row] for row in batch.wanted] == asked


@settings(deadline=None)
@given(spans(), shapes)
def test_groups_tile_the_rows_and_obey_the_shapes(given_spans, shape):
    (least, multiple), keys = shape
    batch = plan(given_spans, least, keys, multiple)
    by_slot = {span.slot: span for span in given_spans}
    row, seen = 0, []
    for group in batch.groups:
        assert group.first_row == row
        assert group.width >= least and group.width % multiple == 0
        assert group.key_length % keys == 0
        for i, start in enumerate(group.starts):
            slot = group.first_slot + i
            seen.append(slot)
            assert start == by_slot[slot].start
            assert len(by_slot[slot].tokens) <= group.width
            assert batch.slots[row : row + group.width] == [slot] * group.width
            assert batch.positions[row : row + group.width] == list(range(start, start + group.width))
            assert start + group.width <= group.key_length  # every row's own key is within reach
            row += group.width
        if len(group.starts) > 1:
            assert group.width <= round_up(SHORT_SPAN, multiple)
    assert row == len(batch.tokens)
    assert sorted(seen) == sorted(by_slot)
    assert batch.max_position == max(group.key_length for group in batch.groups)


@settings(deadline=None)
@given(spans(), shapes)
def test_a_long_span_is_alone_and_padding_comes_after_the_tokens(given_spans, shape):
    (least, multiple), keys = shape
    batch = plan(given_spans, least, keys, multiple)
    lengths = {span.slot: len(span.tokens) for span in given_spans}
    for group in batch.groups:
        if any(lengths[group.first_slot + i] > SHORT_SPAN for i in range(len(group.starts))):
            assert len(group.starts) == 1
    for span in given_spans:
        rows = sorted(row for (slot, _), row in rows_of(batch).items() if slot == span.slot)
        assert {batch.tokens[row] for row in rows[len(span.tokens) :]} <= {span.tokens[-1]}  # one the text has anyway


@given(spans(), shapes)
@settings(deadline=None)
def test_the_order_of_the_spans_changes_nothing_but_the_order_of_logits(given_spans, shape):
    (least, multiple), keys = shape
    batch = plan(given_spans, least, keys, multiple)
    turned = plan(given_spans[::-1], least, keys, multiple)
    assert (batch.tokens, batch.positions, batch.slots, batch.groups) == (
        turned.tokens,
        turned.positions,
        turned.slots,
        turned.groups,
    )
    assert sorted(batch.wanted) == sorted(turned.wanted)


@given(st.integers(1, 10**6), st.sampled_from([1, 128, 512]))
def test_key_lengths_reach_far_enough_and_end_where_no_kernel_treats_them_apart(length, multiple):
    rounded = round_keys(length, multiple)
    assert length <= rounded <= length + max(multiple, 128) + multiple
    assert rounded % multiple == 0
    assert rounded % 512 != 256


def test_the_widest_probed_pass_bounds_the_draft():
    assert RowInvariance(max_rows=33).max_draft_tokens == 32
    assert RowInvariance(max_rows=1).max_draft_tokens == 0
