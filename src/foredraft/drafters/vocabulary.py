"""Whether a draft model's tokens are the target's tokens, and which of them they share."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from foredraft.errors import VocabularyMismatchError
from foredraft.text.spelling import Speller

ROLES = ("bos_token_id", "eos_token_id")


def first_difference(target: PreTrainedTokenizerBase, draft: PreTrainedTokenizerBase) -> str | None:
    """Compares two vocabularies id by id: the first id at which they differ, in words; None where they are equal."""
    ours, theirs = (_by_id(tokenizer) for tokenizer in (target, draft))
    for token_id in range(max(len(ours), len(theirs))):
        mine, other = ours.get(token_id), theirs.get(token_id)
        if mine != other:
            return (
                f"draft and target vocabularies differ ({len(theirs)} and {len(ours)} tokens): token {token_id} is "
                f"{other!r} in the draft and {mine!r} in the target"
            )
    return None


def _by_id(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    return {token_id: token for token, token_id in tokenizer.get_vocab().items()}


@dataclass(frozen=True, slots=True)
class Overlap:
    """How many tokens write the same text in two vocabularies, and how many texts the tokens of each write."""

    shared: int
    draft: int
    target: int

    @property
    def of_draft(self) -> float:
        return self.shared / max(1, self.draft)

    @property
    def of_target(self) -> float:
        return self.shared / max(1, self.target)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"of_draft": self.of_draft, "of_target": self.of_target}

    def __str__(self) -> str:
        return (
            f"{self.shared:,} tokens in common, {self.of_draft:.1%} of the draft's {self.draft:,} and "
            f"{self.of_target:.1%} of the target's {self.target:,}"
        )


class Translation:
    """From a target's tokens to a draft model's with another tokenizer, and back: by what they write.

    `columns` are the tokens that a draft is drawn from: the target's ids, of which the draft model knows those that it
    shares, and behind them its own others. So the noise of a shared token is keyed by the target's id.

    Raises:
        VocabularyMismatchError: one of the tokenizers does not work in bytes.
    """

    def __init__(
        self, target: PreTrainedTokenizerBase, target_size: int, draft: PreTrainedTokenizerBase, draft_size: int
    ) -> None:
        self.target, self.draft = _speller("target", target, target_size), _speller("draft", draft, draft_size)
        self.target_size, self.draft_size = target_size, draft_size
        self.specials = _shared_specials(self.target, target, self.draft, draft)  # by the target's id
        self.columns = self._columns()  # [target_size + others] the draft's token; draft_size where it has none
        self.start = _start(draft)

    def _columns(self) -> torch.Tensor:
        shared = {self.target.ids[piece]: token for piece, token in self.draft.ids.items() if piece in self.target.ids}
        known = set(shared.values())
        others = [token for token, piece in enumerate(self.draft.pieces) if piece and token not in known]
        columns = torch.full((self.target_size + len(others),), self.draft_size, dtype=torch.int64)
        for ours, theirs in (shared | self.specials).items():
            columns[ours] = theirs
        columns[self.target_size :] = torch.tensor(others, dtype=torch.int64)
        return columns

    @property
    def overlap(self) -> Overlap:
        shared = len(self.draft.ids.keys() & self.target.ids.keys())
        return Overlap(shared, len(self.draft.ids), len(self.target.ids))


def _speller(whose: str, tokenizer: PreTrainedTokenizerBase, size: int) -> Speller:
    try:
        return Speller(tokenizer, size)
    except VocabularyMismatchError as error:
        raise VocabularyMismatchError(f"the {whose}'s {error}") from error


def _shared_specials(
    ours: Speller, target: PreTrainedTokenizerBase, theirs: Speller, draft: PreTrainedTokenizerBase
) -> dict[int, int]:
    """Control tokens of the same name, and those that begin and end texts, whatever their names."""
    named = {str(draft.convert_ids_to_tokens(token)): token for token in theirs.special if token < len(theirs.pieces)}
    names = {token: str(target.convert_ids_to_tokens(token)) for token in ours.special if token < len(ours.pieces)}
    shared = {token: named[name] for token, name in names.items() if name in named}
    roles = {getattr(target, role): getattr(draft, role) for role in ROLES}
    return shared | {a: b for a, b in roles.items() if a in names and b in theirs.special}


def _start(draft: PreTrainedTokenizerBase) -> list[int]:
    """What the draft's tokenizer puts before a text."""
    bos = draft.bos_token_id
    return [bos] if bos is not None and bos in draft("a")["input_ids"] else []
