"""Options that the drop-in refuses, each with what to do instead; and how loading options are read."""

from collections.abc import Iterable
from typing import Any

import torch
from transformers import SynthIDTextWatermarkLogitsProcessor, UnbatchedClassifierFreeGuidanceLogitsProcessor

from foredraft.errors import RequestError

LOOP = "decode with transformers' own model for that"
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {  # name: values that change nothing, what to do
    "num_beams": ((1,), "foredraft decodes one continuation a row: pass num_beams=1"),
    "num_beam_groups": ((1,), LOOP),
    "diversity_penalty": ((0.0,), LOOP),
    "constraints": ((), "use a logits_processor or prefix_allowed_tokens_fn"),
    "force_words_ids": ((), "use a logits_processor or prefix_allowed_tokens_fn"),
    "penalty_alpha": ((0.0,), LOOP),
    "dola_layers": ((), LOOP),
    "low_memory": ((False,), "leave it out"),
    "guidance_scale": ((1, 1.0), LOOP),
    "negative_prompt_ids": ((), LOOP),
    "negative_prompt_attention_mask": ((), LOOP),
    "token_healing": ((False,), "cut the prompt's last token yourself"),
    "encoder_repetition_penalty": ((1.0,), "use repetition_penalty"),
    "encoder_no_repeat_ngram_size": ((0,), "use no_repeat_ngram_size"),
    "decoder_start_token_id": ((), "the prompt's own tokens begin the text"),
    "output_scores": ((False,), "use foredraft.LLM with logprobs=..."),
    "output_logits": ((False,), "use foredraft.LLM with logprobs=..."),
    "output_attentions": ((False,), LOOP),
    "output_hidden_states": ((False,), LOOP),
    "assistant_early_exit": ((), "use draft='skip'"),
    "assistant_ensemble_weight": ((), "it changes the target's distribution; leave it out"),
    "assistant_tokenizer": ((), "use an assistant with the target's own tokenizer"),
    "speculation_type": ((), "name a drafter when loading: draft=..."),
    "use_mtp": ((False,), "name a drafter when loading: draft=..."),
    "is_assistant": ((False,), "pass this model as assistant_model to the target's generate"),
    "compile_config": ((), "leave it out: nothing is compiled"),
    "custom_generate": ((), LOOP),
    "synced_gpus": ((False,), "leave it out: every process decodes on its own"),
}
ONLY_CALLS: dict[str, tuple[tuple[Any, ...], str]] = {  # in a checkpoint's configuration they mean its own runtime
    "use_cache": ((True,), "the cache is always used, and the tokens are the same"),
    "cache_implementation": ((), "the cache is foredraft's own; leave it out"),
    "cache_config": ((), "the cache is foredraft's own; leave it out"),
    "max_cache_len": ((), "the cache is foredraft's own; leave it out"),
    "prefill_chunk_size": ((), "chunks are foredraft's own; leave it out"),
    "assistant_lookbehind": ((), "use an assistant with the target's own tokenizer"),
    "target_lookbehind": ((), "use an assistant with the target's own tokenizer"),
    "inputs_embeds": ((), "pass input_ids"),
    "cache": ((), "pass the whole text as input_ids"),
    "past_key_values": ((), "pass the whole text as input_ids"),
    "position_ids": ((), "pass attention_mask: positions follow from it"),
    "encoder_outputs": ((), "pass input_ids"),
    "logits_to_keep": ((), "leave it out"),
}
PREPARED = {"attention_mask", "position_ids", "cache", "past_key_values", "use_cache", "logits_to_keep", "synced_gpus"}
PREPARED |= {"tokenizer", "assistant_model", "inputs_tensor"}  # read before, or not there
LOW_BITS = {"bf16": "bfloat16", "fp16": "float16"}
LOW_BIT_TARGET = (
    f"a target is verified in {' or '.join(LOW_BITS)}; make a low-bit checkpoint with `foredraft convert` and load its "
    "folder"
)


def check_call(kwargs: dict[str, Any], *configs: Any) -> None:
    """Raise RequestError for the first option that asks for something generate() does not do here.

    A keyword counts before a configuration, the first configuration before the next; `None` asks for nothing.
    """
    for name, (neutral, advice) in REFUSED.items():
        sources = (kwargs.get(name), *(getattr(config, name, None) for config in configs))
        _refuse(name, next((value for value in sources if value is not None), None), neutral, advice)
    for name, (neutral, advice) in ONLY_CALLS.items():
        _refuse(name, kwargs.get(name), neutral, advice)


def _refuse(name: str, value: Any, neutral: tuple[Any, ...], advice: str) -> None:
    if value is None or (not isinstance(value, torch.Tensor) and value in neutral):
        return
    shown = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
    raise RequestError(f"{name}={shown} cannot be honoured; {advice}")


def check_processors(processors: Iterable[Any]) -> None:
    """Raise RequestError for a processor whose scores depend on how often it was called, not on the prefix alone."""
    for processor in processors:
        if isinstance(processor, SynthIDTextWatermarkLogitsProcessor):
            raise RequestError(
                "watermarking_config=SynthIDTextWatermarkingConfig(...) cannot be honoured: its processor has a state "
                f"that a refused draft would spoil; use WatermarkingConfig, or {LOOP}"
            )
        if isinstance(processor, UnbatchedClassifierFreeGuidanceLogitsProcessor):
            raise RequestError(
                f"{type(processor).__name__} cannot be honoured: a refused draft spoils its state; {LOOP}"
            )


def check_prepared(prepared: dict[str, Any]) -> None:
    """Raise RequestError for an input to the model's forward that is not token ids and their mask."""
    for name, value in prepared.items():
        if name not in PREPARED:
            _refuse(name, value, (False,), "this model takes input_ids and attention_mask")


def loading_dtype(dtype: Any, torch_dtype: Any, load_in_low_bit: str | None) -> str:
    """The one dtype that three options name, as LoadOptions has it.

    Raises:
        RequestError: they contradict each other, or name a format that is none of these.
    """
    if load_in_low_bit is not None and load_in_low_bit not in LOW_BITS:
        raise RequestError(f"load_in_low_bit={load_in_low_bit!r} cannot be honoured: {LOW_BIT_TARGET}")
    names = {"dtype": dtype, "torch_dtype": torch_dtype, "load_in_low_bit": LOW_BITS.get(load_in_low_bit or "")}
    given = {name: str(value).removeprefix("torch.") for name, value in names.items() if value is not None}
    exact = {value for value in given.values() if value != "auto"}
    if len(exact) > 1:
        raise RequestError(f"{', '.join(f'{n}={v}' for n, v in given.items())} contradict each other; give one")
    return exact.pop() if exact else "auto"


def loading_place(device_map: Any) -> tuple[str, Any]:
    """The device, and the device map where it spreads a model over several."""
    if isinstance(device_map, dict) and set(device_map) == {""}:
        device_map = device_map[""]
    if device_map is None:
        return "cpu", None
    if isinstance(device_map, dict) or str(device_map) in ("auto", "balanced", "balanced_low_0", "sequential"):
        return "auto", device_map
    return (f"cuda:{device_map}" if isinstance(device_map, int) else str(device_map)), None
