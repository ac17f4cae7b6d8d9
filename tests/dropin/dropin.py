"""What the tests of the drop-in share: a draft near its target, prompts, and the comparison with transformers."""

import copy
from typing import Any

import torch
from models import VOCAB
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedModel, PreTrainedTokenizerFast, StoppingCriteria

from foredraft.integrations.transformers import SpeculativeModel

NEW = 32
ARCHITECTURES = ("llama", "gpt2")


def near(model: PreTrainedModel, noise: float = 0.03) -> PreTrainedModel:
    """A draft model that is right often, and wrong often enough."""
    torch.manual_seed(1)
    draft = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.add_(noise * parameter.std(correction=0) * torch.randn_like(parameter))
    return draft


def prompts(rows: int = 1, length: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randint(4, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def padded(pad: int = 3) -> dict[str, torch.Tensor]:
    ids, mask = prompts(3, seed=2), torch.ones(3, 12, dtype=torch.long)
    for row, width in enumerate((5, 0, 2)):
        ids[row, :width], mask[row, :width] = pad, 0
    return {"input_ids": ids, "attention_mask": mask}


def same(plain: PreTrainedModel, fast: SpeculativeModel, inputs: Any, **options: Any) -> torch.Tensor:
    """Both decode `inputs`; the ids must be equal."""
    inputs = inputs if isinstance(inputs, dict) else {"input_ids": inputs}
    expected = plain.generate(**inputs, **options)
    found = fast.generate(**inputs, **options)
    assert found.dtype == expected.dtype
    assert found.tolist() == expected.tolist()
    return found


def continuation(model: PreTrainedModel, ids: torch.Tensor, count: int = NEW) -> list[int]:
    return model.generate(ids, max_new_tokens=count, do_sample=False)[0, ids.shape[1] :].tolist()


def tokenizer() -> PreTrainedTokenizerFast:
    """Every id is a character; the space is one of them."""
    characters = [" ", *map(chr, range(33, 127)), *map(chr, range(0xA1, 0xA1 + VOCAB - 95))]
    inner = Tokenizer(models.BPE({character: i for i, character in enumerate(characters)}, []))
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, clean_up_tokenization_spaces=False)


class Seen(StoppingCriteria):
    """Remembers every prefix, and ends the text at one of some tokens."""

    def __init__(self, *stops: int, scalar: bool = False) -> None:
        self.stops, self.scalar = stops, scalar
        self.prefixes: list[list[list[int]]] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        self.prefixes.append(input_ids.tolist())
        assert scores is None
        if self.scalar:
            return input_ids[0][-1].item() in self.stops
        return torch.isin(input_ids[:, -1], torch.tensor(self.stops))
