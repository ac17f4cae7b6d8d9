"""Small tokenizers made on the spot: trained BPEs of two kinds, and one with as many tokens as a model has."""

import json
from itertools import product

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from foredraft.text.detokenize import BYTE_OF

CHARACTER = {byte: character for character, byte in BYTE_OF.items()}  # as byte-level BPE writes each byte
TEXT = [
    "the cat sat on the mat and the dog sat on the log",
    "a small café in Zürich sells naïve 寿司 and 😀 cakes",
    "she said: “hello there”, and then they went home together",
    "numbers such as 1, 22 and 333 are not words; words are words",
] * 4


def byte_level(merges: int = 60) -> PreTrainedTokenizerFast:
    """As GPT-2 has it: every byte, words with the space before them, and an end of text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=257 + merges, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def byte_fallback(merges: int = 40) -> PreTrainedTokenizerFast:
    """As sentencepiece has it: a space put before the text, characters it has not seen as bytes, <s> in front."""
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    prepared = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    trained.normalizer = prepared
    trained.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trainer = trainers.BpeTrainer(
        vocab_size=len(special) + 45 + merges, special_tokens=special, limit_alphabet=45, show_progress=False
    )
    trained.train_from_iterator(TEXT, trainer)
    trained.pre_tokenizer = None
    state = json.loads(trained.to_str())
    state["added_tokens"] = state["added_tokens"][:3]  # bytes are tokens like any, not control tokens
    fresh = Tokenizer.from_str(json.dumps(state))
    fresh.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fresh.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made = PreTrainedTokenizerFast(tokenizer_object=fresh, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    return made


def of_size(size: int, order: list[int] | None = None) -> PreTrainedTokenizerFast:
    """`size` tokens of one or two bytes, and no special ones; `order` says which id each of them has."""
    letters = [CHARACTER[byte] for byte in range(min(size, 256))]
    pairs = list(product(letters, letters))[: size - len(letters)]
    ids = order or list(range(size))
    vocabulary = dict(zip([*letters, *map("".join, pairs)], ids, strict=True))
    tokenizer = Tokenizer(models.BPE(vocabulary, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)
