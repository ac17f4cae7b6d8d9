"""Streamed text equals decoded text, however it is cut into tokens; stop strings; chat templates."""

import copy
import logging
import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast, StopStringCriteria

from foredraft.errors import RequestError
from foredraft.text import TextStream, end_of_turn_ids, render_chat
from foredraft.text.detokenize import MAX_WAITING, ByteDetokenizer, WindowDetokenizer, detokenizer, special_ids
from foredraft.text.stream import StopString

SAMPLES = (
    "Once upon a time, there was a girl.",
    "emoji 😀👩‍👩‍👧 and 中文字符\uff0c很好。 ",
    "  two leading spaces\n\n\ttabs and\r\nlines  ",
    "naïve café ﷽ \U0001d518\U0001d52b\U0001d526 \u200d\ufeff",
    "a genuine \ufffd replacement character \ufffd",
    "",
)
TOKENIZERS = ("models/stories260K", "models/stories3M", "models/tinystories-656k", "data/tokenizer_gpt2")
USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}


# --- tokenizers made here, of each kind ---


def byte_level() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ã", "©"), ("Ġ", "t"), ("h", "e"), ("ð", "Ł"), ("ĺ", "Ģ"), ("Ģ", "ð")]  # some end inside a character
    vocab = {token: i for i, token in enumerate([*alphabet, *("".join(pair) for pair in merges)])}
    bpe = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>")


def byte_fallback() -> PreTrainedTokenizerFast:
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdehlnot.,é中", "▁t", "he", "▁the"]
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he")]
    bpe = Tokenizer(
        models.BPE({t: i for i, t in enumerate(tokens)}, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    bpe.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")


def word_piece() -> PreTrainedTokenizerFast:
    words = ["[UNK]", *"abcdefhlnot.,", *("##" + char for char in "abcdefhlnot"), "the", "##he"]
    piece = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    piece.pre_tokenizer = pre_tokenizers.Whitespace()
    piece.decoder = decoders.WordPiece(cleanup=False)
    return PreTrainedTokenizerFast(tokenizer_object=piece, eos_token="[SEP]")


MADE = {"byte_level": byte_level, "byte_fallback": byte_fallback, "word_piece": word_piece}


@cache
def made(kind: str) -> PreTrainedTokenizerFast:
    return MADE[kind]()


@cache
def load(folder: Path) -> PreTrainedTokenizerBase:
    if (folder / "tokenizer_config.json").exists():
        return AutoTokenizer.from_pretrained(folder)
    return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), eos_token="<|endoftext|>")


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def settled(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], prompt: Sequence[int] = ()) -> list[str]:
    """What each token settles, and the rest."""
    text = detokenizer(tokenizer, prompt)
    return [*(text.push(token) for token in ids), text.finish()]


# --- detokenising ---


@pytest.mark.parametrize("kind", MADE)
@given(text=st.text() | st.sampled_from(SAMPLES))
def test_streamed_text_is_decoded_text(kind: str, text: str) -> None:
    ids = encode(made(kind), text)
    assert "".join(settled(made(kind), ids)) == decode(made(kind), ids)


@pytest.mark.parametrize("folder", TOKENIZERS)
@pytest.mark.parametrize("text", SAMPLES)
def test_streamed_text_is_decoded_text_for_real_tokenizers(shared: Path, folder: str, text: str) -> None:
    tokenizer = load(shared / folder)
    ids = encode(tokenizer, text)
    assert "".join(settled(tokenizer, ids)) == decode(tokenizer, ids)


@pytest.mark.parametrize("folder", TOKENIZERS)
@pytest.mark.parametrize("text", SAMPLES[:4])
def test_output_continues_the_prompt(shared: Path, folder: str, text: str) -> None:
    """At every place where the text can be cut, inside a character too; the space between words stays."""
    tokenizer = load(shared / folder)
    ids = encode(tokenizer, text)
    for cut in range(len(ids) + 1):
        before = "".join(settled(tokenizer, ids[:cut])[:-1])  # without half a character, which the output completes
        assert before + "".join(settled(tokenizer, ids[cut:], ids[:cut])) == decode(tokenizer, ids)


@given(ids=st.lists(st.integers(0, 300), max_size=40))
def test_any_byte_level_tokens_decode_as_the_tokenizer_does(ids: list[int]) -> None:
    """Invalid UTF-8 included: U+FFFD where the tokenizer puts it, and ids beyond its vocabulary are nothing."""
    assert "".join(settled(made("byte_level"), ids)) == decode(made("byte_level"), ids)


@given(ids=st.lists(st.integers(1, 256), max_size=12))
def test_any_byte_tokens_decode_as_utf8(ids: list[int]) -> None:
    expected = bytes(token - 1 for token in ids).decode("utf-8", "replace").removeprefix(" ")
    assert "".join(settled(made("byte_fallback"), ids)) == expected


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
@given(text=st.text(st.sampled_from("é中😀a "), max_size=8))
def test_no_half_character_is_ever_shown(kind: str, text: str) -> None:
    assert "\ufffd" not in "".join(settled(made(kind), encode(made(kind), text)))


def test_characters_come_with_their_last_byte() -> None:
    """Tokens may end inside a character again and again; what is whole must not wait for the end."""
    tokenizer = made("byte_level")
    ids = encode(tokenizer, "😀😀😀")
    assert len(ids) < 8  # a token does hold the end of one character and the start of the next
    assert [piece for piece in settled(tokenizer, ids) if piece] == ["😀", "😀", "😀"]


def test_an_unfinished_character_is_one_replacement_at_the_end() -> None:
    ids = encode(made("byte_level"), "a😀")[:-1]
    assert settled(made("byte_level"), ids)[-1] == "\ufffd"
    assert "".join(settled(made("byte_level"), ids)) == decode(made("byte_level"), ids) == "a\ufffd"


def test_a_stream_ends_as_the_decoded_text_does() -> None:
    tokenizer = made("byte_level")
    stream, ids = TextStream(tokenizer), encode(tokenizer, "a😀")[:-1]
    flags = [stream.push(token) for token in ids]
    assert (stream.take(), stream.finish(), stream.text, any(flags)) == ("a", "\ufffd", "a\ufffd", False)
    assert stream.num_kept_tokens == len(ids)


def test_special_tokens_are_skipped_wherever_they_stand() -> None:
    tokenizer = made("byte_level")
    ids = encode(tokenizer, "a😀")
    for at in range(len(ids) + 1):
        with_special = [*ids[:at], tokenizer.eos_token_id, *ids[at:]]
        assert "".join(settled(tokenizer, with_special)) == "a😀"


def test_a_special_prompt_does_not_save_the_leading_space() -> None:
    tokenizer = made("byte_fallback")
    ids = encode(tokenizer, "the the")
    assert "".join(settled(tokenizer, ids, [tokenizer.bos_token_id])) == "the the"
    assert "".join(settled(tokenizer, ids, ids)) == " the the"


def test_known_decoders_take_the_byte_path_and_others_the_window(shared: Path) -> None:
    for folder in TOKENIZERS:
        assert isinstance(detokenizer(load(shared / folder)), ByteDetokenizer)
    assert isinstance(detokenizer(made("word_piece")), WindowDetokenizer)


@pytest.mark.parametrize("folder", TOKENIZERS)
@pytest.mark.parametrize("text", SAMPLES[:4])
def test_the_window_serves_every_tokenizer(shared: Path, folder: str, text: str) -> None:
    tokenizer = load(shared / folder)
    window = WindowDetokenizer(tokenizer, special_ids(tokenizer))
    ids = encode(tokenizer, text)
    assert "".join([*map(window.push, ids), window.finish()]) == decode(tokenizer, ids)


def test_a_window_stays_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A constant price per token: no decode sees more than a few tokens, however long the text or its nonsense is."""
    tokenizer, longest = made("byte_level"), 0
    original = type(tokenizer).decode

    def watched(self: PreTrainedTokenizerBase, ids: list[int], **options: bool) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return original(self, ids, **options)

    monkeypatch.setattr(type(tokenizer), "decode", watched)
    window = WindowDetokenizer(tokenizer, special_ids(tokenizer))
    rng = random.Random(0)
    for _ in range(2000):
        window.push(rng.randrange(256))
    assert 0 < longest <= 2 * MAX_WAITING


# --- stop strings ---


def cut_at_first_stop(text: str, stops: Sequence[str]) -> str:
    """By the definition: read on until some stop string ends here; cut the longest such off."""
    for end in range(1, len(text) + 1):
        endings = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if endings:
            return text[: end - max(endings)]
    return text


ALPHABET = st.text(st.sampled_from("ab 😀é\n"), max_size=30)


@given(text=ALPHABET, stops=st.lists(st.text(st.sampled_from("ab 😀é\n"), min_size=1, max_size=5), max_size=3))
@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_the_stream_is_the_text_cut_at_the_first_stop_string(kind: str, text: str, stops: list[str]) -> None:
    tokenizer = made(kind)
    ids = encode(tokenizer, text)
    whole = decode(tokenizer, ids)
    expected = cut_at_first_stop(whole, stops)
    stream, shown = TextStream(tokenizer, stops), ""
    for token in ids:
        complete = stream.push(token)
        shown += stream.take()
        assert whole.startswith(shown) and expected.startswith(shown)  # never more than is safe
        if complete:
            break
    shown += stream.finish()
    assert shown == stream.text == expected
    assert stream.stopped == (expected != whole)


@given(text=ALPHABET, stop=st.text(st.sampled_from("ab 😀é\n"), min_size=1, max_size=4), data=st.data())
def test_where_the_text_ends_does_not_depend_on_the_tokens(text: str, stop: str, data: st.DataObject) -> None:
    """The same text cut into other tokens: one byte each here, or whatever the vocabulary merges."""
    tokenizer = made("byte_level")
    bounds = data.draw(st.lists(st.integers(0, len(text)), max_size=5).map(sorted))
    spans = zip([0, *bounds], [*bounds, len(text)], strict=True)
    tokens = [token for start, end in spans for token in encode(tokenizer, text[start:end])]
    stream = TextStream(tokenizer, (stop,))
    shown = ""
    for token in tokens:
        if stream.push(token):
            break
        if data.draw(st.booleans()):
            shown += stream.take()
    assert shown + stream.finish() == text.partition(stop)[0]


@given(text=st.text("ab", max_size=30), stop=st.text("ab", min_size=1, max_size=6))
def test_a_stop_string_is_found_where_find_finds_it(text: str, stop: str) -> None:
    search = StopString(stop)
    found = next((i + 1 for i, char in enumerate(text) if search.feed(char)), None)
    assert found == (text.find(stop) + len(stop) if stop in text else None)


def test_text_that_may_begin_a_stop_string_is_withheld_until_decided() -> None:
    tokenizer = made("byte_level")
    stream = TextStream(tokenizer, ("bab",))
    shown = []
    for token in encode(tokenizer, "abbaac"):
        assert not stream.push(token)
        shown.append(stream.take())
    assert shown == ["a", "", "b", "", "baa", "c"]


def test_the_end_releases_what_was_withheld() -> None:
    tokenizer = made("byte_level")
    stream = TextStream(tokenizer, ("bab",))
    for token in encode(tokenizer, "aba"):
        stream.push(token)
    assert (stream.take(), stream.finish(), stream.finish()) == ("a", "ba", "")


def test_the_stop_string_completed_first_wins_and_then_the_longest() -> None:
    tokenizer = made("byte_level")
    for stops, expected in ((("abcd", "bc"), "xa"), (("bc", "abc"), "x"), (("c",), "xab")):
        stream = TextStream(tokenizer, stops)
        assert any(stream.push(token) for token in encode(tokenizer, "xabcde"))
        assert stream.finish() == stream.text == expected


def test_nothing_after_the_stop_counts() -> None:
    tokenizer = made("byte_level")
    stream = TextStream(tokenizer, (" t",))
    ids = encode(tokenizer, "hello the")
    flags = [stream.push(token) for token in ids]
    assert flags == [False] * (flags.index(True)) + [True] * (len(ids) - flags.index(True))
    assert stream.finish() == "hello"
    assert stream.num_kept_tokens == flags.index(True) == len(encode(tokenizer, "hello"))


def test_a_token_partly_kept_is_kept() -> None:
    tokenizer = made("byte_level")
    stream = TextStream(tokenizer, ("e",))
    ids = encode(tokenizer, "ahe")
    assert len(ids) == 2  # "he" is one token
    assert [stream.push(token) for token in ids] == [False, True]
    assert (stream.finish(), stream.num_kept_tokens) == ("ah", 2)


def test_pieces_carry_the_flag_of_the_token_that_settled_them() -> None:
    tokenizer = made("byte_level")
    stream, ids = TextStream(tokenizer, ("zz",)), encode(tokenizer, "aé😀z")
    flags = [i % 2 == 0 for i in range(len(ids))]
    pieces: list[tuple[str, bool]] = []
    for i, token in enumerate(ids):
        stream.push(token)
        pieces += stream.take_pieces(flags[: i + 1])
    stream.close()
    pieces += stream.take_pieces(flags)
    assert "".join(text for text, _ in pieces) == "aé😀z"
    owners = [i for i, text in enumerate(settled(tokenizer, ids)) if text]
    assert [flag for _, flag in pieces] == [flags[i] for i in owners]


def test_a_tokenizer_that_fails_once_doubles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = TextStream(made("byte_fallback"))
    ids = encode(made("byte_fallback"), "the the the")
    pushes = iter([*"ab", None, *"cdefghijk"])

    def push(token_id: int) -> str:
        text = next(pushes)
        if text is None:
            raise ValueError("once")
        return text

    monkeypatch.setattr(stream._detokenizer, "push", push)
    for token in ids:
        stream.push(token)
    with pytest.raises(ValueError, match="once"):
        _ = stream.text
    assert stream.text == "abcdefghijk"[: len(ids) - 1]


def test_a_text_stream_is_a_stop_rule_and_continues_its_prompt() -> None:
    tokenizer = made("byte_fallback")
    ids = encode(tokenizer, "the the")
    stream = TextStream(tokenizer, (), prompt_ids=ids)
    assert [stream.push(token) for token in ids] == [False] * len(ids)
    assert stream.finish() == " the the"


SPECIAL_STOPS = (
    "{end}", "{end}{user}", "{end}a", "{user} a", "e{end}", "e {end}", " {user}", "{user}the",
    "the{end}{tool}", "{end} the", "{tool}{end} a", "{tool} {end} a",
)  # fmt: skip


def with_added_tokens(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    own = copy.deepcopy(tokenizer)
    own.add_special_tokens({"additional_special_tokens": ["<|stop|>", "<|user|>"]})
    own.add_tokens(["<tool>"])
    return own


def first_stop_of_transformers(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], stop: str) -> int | None:
    """How many tokens transformers' `generate` would emit."""
    try:
        criterion = StopStringCriteria(tokenizer, [stop])
    except ValueError:  # no tokens of this tokenizer spell it
        return None
    seen = (torch.tensor([ids[: i + 1]]) for i in range(len(ids)))
    return next((i + 1 for i, row in enumerate(seen) if bool(criterion(row, None))), None)


def dialogues(tokenizer: PreTrainedTokenizerBase, words: str) -> list[list[int]]:
    """Token lists with added tokens between words, side by side and at both ends."""
    end, user, tool = tokenizer.convert_tokens_to_ids(["<|stop|>", "<|user|>", "<tool>"])
    the, a = encode(tokenizer, words), encode(tokenizer, "a")
    return [
        [*the, end, user, *a, end],
        [end, *the, tool, end, *the, user, *the],
        [*the, user, end, tool, *a, end, *a, end, tool],
    ]


@pytest.mark.parametrize("kind", [*MADE, *TOKENIZERS])
def test_stop_strings_hold_special_and_added_tokens_as_in_transformers(
    request: pytest.FixtureRequest, kind: str
) -> None:
    """It ends after the same token, and shows what stands before the stop string without special tokens."""
    tokenizer = with_added_tokens(
        made(kind) if kind in MADE else load(request.getfixturevalue("shared") / kind)  # only these need it
    )
    found = 0
    for ids in dialogues(tokenizer, " the"):
        for template in SPECIAL_STOPS:
            stop = template.format(end="<|stop|>", user="<|user|>", tool="<tool>")
            stream, shown, ended = TextStream(tokenizer, (stop,), prompt_ids=encode(tokenizer, "the")), "", None
            for i, token in enumerate(ids):
                if stream.push(token):
                    ended = i + 1
                    break
                shown += stream.take()
            shown += stream.finish()
            assert ended == first_stop_of_transformers(tokenizer, ids, stop), (ids, stop)
            assert shown == stream.text
            assert "<|" not in shown
            kept = "".join(settled(tokenizer, ids[:ended], encode(tokenizer, "the")))
            assert kept.startswith(shown) if ended else shown == kept
            found += ended is not None
    assert found >= 6


def test_what_may_begin_a_stop_string_with_a_special_token_is_withheld() -> None:
    tokenizer = made("byte_level")
    end = tokenizer.eos_token_id
    b, c, a = (encode(tokenizer, char)[0] for char in "bca")
    stream, shown = TextStream(tokenizer, ("b<|end|>a",)), []
    for token in (b, end, c, b, end, end, b, end):
        assert not stream.push(token)
        shown.append(stream.take())
    assert shown == ["", "", "bc", "", "", "b", "", ""]  # the second <|end|> in a row decides it
    assert stream.push(a)
    assert (stream.finish(), stream.text, stream.num_kept_tokens) == ("", "bcb", 6)


def test_a_stop_string_of_special_tokens_that_never_comes_releases_the_text() -> None:
    tokenizer = made("byte_level")
    stream = TextStream(tokenizer, ("b<|end|>a",))
    for token in (*encode(tokenizer, "ab"), tokenizer.eos_token_id):
        stream.push(token)
    assert (stream.take(), stream.finish(), stream.num_kept_tokens) == ("a", "b", 3)


# --- chat templates ---


def with_template(name: str, shared: Path, specials: Sequence[str]) -> PreTrainedTokenizerBase:
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(shared / "data/tokenizer_gpt2/tokenizer.json"))
    tokenizer.add_special_tokens({"additional_special_tokens": list(specials), "bos_token": specials[0]})
    tokenizer.chat_template = (shared / "data/chat_templates" / name).read_text()
    return tokenizer


def simple(template: str) -> PreTrainedTokenizerFast:
    tokenizer = byte_level()
    tokenizer.chat_template = template
    return tokenizer


PLAIN = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}"
    "{% if m['role'] == 'assistant' %} <|end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def test_qwen_chat_and_its_end_of_turn(shared: Path) -> None:
    tokenizer = with_template("Qwen-Qwen2.5-7B-Instruct.jinja", shared, ["<|im_start|>", "<|im_end|>"])
    text = tokenizer.decode(render_chat(tokenizer, [USER, ANSWER, USER]))
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert end_of_turn_ids(tokenizer) == (tokenizer.convert_tokens_to_ids("<|im_end|>"),)


def test_llama_chat_and_its_end_of_turn(shared: Path) -> None:
    specials = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer = with_template("meta-llama-Llama-3.1-8B-Instruct.jinja", shared, specials)
    ids = render_chat(tokenizer, [{"role": "system", "content": "Be brief."}, USER])
    assert ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(ids).endswith("<|start_header_id|>assistant<|end_header_id|>\n\n")
    assert end_of_turn_ids(tokenizer) == (tokenizer.convert_tokens_to_ids("<|eot_id|>"),)


def test_end_of_turn_after_a_space_or_at_the_next_turn_or_not_at_all() -> None:
    spaced = simple(PLAIN)
    assert end_of_turn_ids(spaced) == (spaced.eos_token_id,)
    opening = simple(
        "{% for m in messages %}{% if m['role'] == 'user' %}<|end|>{% endif %}{{ m['content'] }}{% endfor %}"
    )
    assert end_of_turn_ids(opening) == (opening.eos_token_id,)
    assert end_of_turn_ids(simple("{% for m in messages %}{{ m['content'] }} {% endfor %}")) == ()
    assert end_of_turn_ids(byte_level()) == ()
    assert end_of_turn_ids(simple("{{ raise_exception('no') }}")) == ()


def test_render_chat_asks_for_the_assistants_turn() -> None:
    tokenizer = simple(PLAIN)
    assert tokenizer.decode(render_chat(tokenizer, [USER])) == "user: Hi\nassistant:"


@pytest.mark.parametrize(
    ("template", "messages", "complaint"),
    [
        ("", [USER], "no chat template"),
        (PLAIN, [], "at least one"),
        (PLAIN, "Hi", "at least one"),
        (PLAIN, USER, "at least one"),
        (PLAIN, [{"content": "Hi"}], r"messages\[0\]"),
        (PLAIN, [USER, {"role": "bot", "content": "Hi"}], r"messages\[1\] has role 'bot'; it must be one of"),
        (PLAIN, [{"role": "user", "content": None}], "must be text"),
        (PLAIN, [{"role": "user"}], "must be text"),
        (
            PLAIN,
            [{"role": "user", "content": "a \ud83d"}],
            r"messages\[0\] has a lone surrogate, '\\ud83d' at character 2",
        ),
        (PLAIN, [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "part of type 'image_url'"),
        (PLAIN, [{"role": "user", "content": [{"type": "text"}]}], "has the part {'type': 'text'}"),
        (PLAIN, [{"role": "user", "content": ["Hi"]}], "has the part 'Hi'"),
        (PLAIN, [{"role": "assistant", "content": None, "tool_calls": []}], "must be text"),
        (PLAIN, [{"role": "assistant", "tool_calls": [{"function": "f"}]}], r"messages\[0\] has tool_calls"),
        (PLAIN, [{"role": "assistant", "tool_calls": "f()"}], r"messages\[0\] has tool_calls 'f\(\)'; they must be"),
        ("{{ raise_exception('roles must alternate') }}", [USER], "roles must alternate"),
        ("{% for %}", [USER], "refuses"),
        ("{{ messages[0]['content'] + 1 }}", [USER], "refuses"),
        ("{# silence #}", [USER], "to nothing"),
    ],
)
def test_a_chat_that_cannot_be_rendered_says_why(template: str, messages: object, complaint: str) -> None:
    with pytest.raises(RequestError, match=complaint):
        render_chat(simple(template), messages)  # type: ignore[arg-type]


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
ASKED = {"role": "user", "content": "How is Oslo?"}
RESULT = {"role": "tool", "tool_call_id": "1", "name": "weather", "content": "rain"}


def called(arguments: object) -> dict[str, object]:
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


def weather(city: str) -> str:
    """The weather of a city.

    Args:
        city: its name
    """
    return city


def qwen(shared: Path) -> PreTrainedTokenizerBase:
    return with_template("Qwen-Qwen2.5-7B-Instruct.jinja", shared, ["<|im_start|>", "<|im_end|>"])


def llama(shared: Path) -> PreTrainedTokenizerBase:
    specials = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"]
    return with_template("meta-llama-Llama-3.1-8B-Instruct.jinja", shared, specials)


def by_transformers(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, object]], **variables: object) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **variables)


@pytest.mark.parametrize("family", [qwen, llama])
def test_tools_calls_and_results_are_rendered_as_the_template_does(family, shared: Path) -> None:
    tokenizer = family(shared)
    for chat in ([ASKED], [ASKED, called({"city": "Oslo"}), RESULT], [ASKED, called({"city": "Oslo"}), RESULT, ANSWER]):
        expected = by_transformers(tokenizer, chat, tools=[WEATHER])
        assert tokenizer.decode(render_chat(tokenizer, chat, [WEATHER])) == expected
        assert "weather" in expected
    assert '"city"' in tokenizer.decode(render_chat(tokenizer, [ASKED], [weather]))


@pytest.mark.parametrize("family", [qwen, llama])
def test_arguments_as_json_text_are_what_the_object_is(family, shared: Path) -> None:
    """OpenAI's clients send text; the template would quote it once more."""
    tokenizer = family(shared)
    chats = [[ASKED, called(arguments), RESULT] for arguments in ('{"city": "Oslo"}', {"city": "Oslo"})]
    first, second = (render_chat(tokenizer, chat) for chat in chats)
    assert first == second


def test_a_template_that_wants_arguments_as_text_gets_them_as_they_came() -> None:
    tokenizer = simple(
        "{% for m in messages %}{{ m['content'] or '' }}"
        "{% for c in m['tool_calls'] or [] %}{{ c['function']['name'] + c['function']['arguments'] }}{% endfor %}"
        "{% endfor %}"
    )
    text = tokenizer.decode(render_chat(tokenizer, [ASKED, called('{"city": "Oslo"}')]))
    assert text == 'How is Oslo?weather{"city": "Oslo"}'


@pytest.mark.parametrize("family", [qwen, llama])
def test_text_parts_are_one_text_to_a_template_that_knows_no_parts(family, shared: Path) -> None:
    """Llama's would print the list, Qwen's raise."""
    tokenizer = family(shared)
    parts = [{"type": "text", "text": "How is"}, {"type": "text", "text": "Oslo?"}]
    whole = {"role": "user", "content": "How is\nOslo?"}
    assert render_chat(tokenizer, [{"role": "user", "content": parts}]) == render_chat(tokenizer, [whole])


def test_text_parts_stay_parts_to_a_template_that_reads_them() -> None:
    tokenizer = simple(
        "{% for m in messages %}{% if m['content'] is string %}{{ m['content'] }}{% else %}"
        "{% for part in m['content'] %}{{ part['text'] }}{% if not loop.last %}|{% endif %}{% endfor %}"
        "{% endif %}{% endfor %}"
    )
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert tokenizer.decode(render_chat(tokenizer, [{"role": "user", "content": parts}])) == "a|b"


def test_keys_that_are_none_are_left_out() -> None:
    tokenizer = simple("{% for m in messages %}{{ m['name'] is defined }}{{ m['content'] }}{% endfor %}")
    assert tokenizer.decode(render_chat(tokenizer, [{"role": "user", "content": "a", "name": None}])) == "Falsea"


def test_template_arguments_reach_the_template() -> None:
    tokenizer = simple("{{ messages[0]['content'] }} {{ documents[0]['title'] }} {{ mood }}")
    ids = render_chat(tokenizer, [USER], arguments={"documents": [{"title": "A"}], "mood": "calm"})
    assert tokenizer.decode(ids) == "Hi A calm"


@pytest.mark.parametrize(
    ("tools", "arguments", "complaint"),
    [
        ([WEATHER], {}, "knows no 'tools'"),
        ((), {"enable_thinking": False}, "knows no 'enable_thinking'"),
        ((), {"tokenize": False}, "tokenize are not the template's own"),
        ((), {"messages": []}, "messages are not the template's own"),
        ("weather", {}, "tools='weather' is not usable"),
        ([7], {}, r"tools=\[7\] is not usable"),
        (WEATHER, {}, "is not usable; give a list"),
    ],
)
def test_what_the_template_cannot_honour_is_refused(
    tools: object, arguments: dict[str, object], complaint: str
) -> None:
    with pytest.raises(RequestError, match=complaint):
        render_chat(simple(PLAIN), [USER], tools, arguments)  # type: ignore[arg-type]


def test_a_text_beyond_the_context_is_not_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    """Whether it fits is ours to say; transformers said "Token indices sequence length is longer than ..."."""
    tokenizer = byte_level()
    tokenizer.model_max_length = 4
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<|end|>{% endfor %}"
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        assert len(render_chat(tokenizer, [{"role": "user", "content": "a long text"}])) > 4
        end_of_turn_ids(tokenizer)
    finally:
        logger.removeHandler(caplog.handler)
    assert "longer than the specified maximum" not in caplog.text
    assert not tokenizer.deprecation_warnings
