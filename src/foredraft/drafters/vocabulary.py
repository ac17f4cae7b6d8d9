"""Whether a draft model's tokens are the target's tokens."""

from transformers import PreTrainedTokenizerBase

from foredraft.errors import VocabularyMismatchError


def check_same_vocabulary(target: PreTrainedTokenizerBase, draft: PreTrainedTokenizerBase) -> None:
    """Compare two vocabularies id by id.

    Raises:
        VocabularyMismatchError: with the first id at which they differ.
    """
    ours, theirs = (_by_id(tokenizer) for tokenizer in (target, draft))
    for token_id in range(max(len(ours), len(theirs))):
        mine, other = ours.get(token_id), theirs.get(token_id)
        if mine != other:
            raise VocabularyMismatchError(
                f"draft and target vocabularies differ ({len(theirs)} and {len(ours)} tokens): token {token_id} is "
                f"{other!r} in the draft and {mine!r} in the target; use a draft with the target's tokenizer"
            )


def _by_id(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    return {token_id: token for token, token_id in tokenizer.get_vocab().items()}
