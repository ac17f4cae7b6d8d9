"""transformers' generate(), with a loop over tokens of ours where its own would begin."""

import abc
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import GenerationMixin, LogitsProcessorList, PrefixConstrainedLogitsProcessor, StoppingCriteriaList
from transformers.generation.utils import GenerateDecoderOnlyOutput


@dataclass(frozen=True, slots=True)
class Prepared:
    """A call as generate() prepared it: ids [B, L], and what it made of the configuration."""

    input_ids: torch.Tensor
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    do_sample: bool
    pad_token_id: int | None
    streamer: Any
    inputs: dict[str, Any]  # of the model's forward, by name


class PreparedCalls(GenerationMixin, abc.ABC):
    """A model with transformers' generate(), which prepares every call and hands it to `decode_prepared`."""

    main_input_name = "input_ids"
    _is_stateful = False

    @abc.abstractmethod
    def decode_prepared(self, call: Prepared) -> torch.Tensor:
        """Ids [B, L + new]."""

    def _sample(  # type: ignore[override]  # transformers' own types are aliases of these
        self,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        streamer: Any = None,
        **inputs: Any,
    ) -> Any:
        pad = generation_config._pad_token_tensor
        do_sample, pad_id = bool(generation_config.do_sample), None if pad is None else int(pad)
        call = Prepared(input_ids, logits_processor, stopping_criteria, do_sample, pad_id, streamer, inputs)
        ids = self.decode_prepared(call)
        return GenerateDecoderOnlyOutput(sequences=cast(Any, ids)) if generation_config.return_dict_in_generate else ids

    _assisted_decoding = cast(Any, _sample)  # a configuration that asks for lookup: our engine does that itself


def allowed_tokens(processor: PrefixConstrainedLogitsProcessor) -> Any:
    """The user's function in the processor: (row, ids) -> allowed tokens."""
    return processor._prefix_allowed_tokens_fn
