"""Draft & Verify's functions (Zhang et al., ACL 2024) over this library: the names, arguments and results of its code.

    from foredraft.integrations.draft_and_verify import LlamaForCausalLM, infer

The draft is the target without the sub-layers of `model.set_skip_layers(attention, mlp)`, or of the profile that is
kept for the model. Unlike its code, sampling follows the target's distribution whatever `do_sample_draft` says.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from foredraft import profile
from foredraft.errors import RequestError
from foredraft.integrations.model import SpeculativeModel
from foredraft.integrations.transformers import AutoModelForCausalLM
from foredraft.types import VerifierName

__all__ = [
    "LlamaForCausalLM",
    "base_generate",
    "exact_self_speculative_generate",
    "infer",
    "infer_input_ids",
    "self_speculative_sample",
]
AUTO_PARAMETERS = (1, 0.5, 0.9, 1e-2, 0.9)
Result = dict[str, Any]


class LlamaForCausalLM:
    """Takes the place of Draft & Verify's model class; works with every architecture that has a skip draft."""

    @classmethod
    def from_pretrained(cls, path: str | Path, **options: Any) -> SpeculativeModel:
        """As `AutoModelForCausalLM.from_pretrained`; the skip set is the one that is kept for this model, if any."""
        model = AutoModelForCausalLM.from_pretrained(path, speculative=False, **options)
        known = profile.find(model.engine.target)
        if known is not None:
            model.set_skip_layers(known.skip.attention, known.skip.mlp)
        return model


def base_generate(
    model: SpeculativeModel,
    tokenizer: PreTrainedTokenizerBase,
    input_ids: torch.Tensor,
    max_new_tokens: int = 10,
    do_sample: bool = False,
    top_k: int = 0,
    top_p: float = 0.85,
    temperature: float = 0.2,
    early_stop: bool = False,
) -> Result:
    """Plain decoding. `generate_ids` [1, n] are the new tokens; `early_stop` ends them at the end of sequence."""
    sampling = _sampling(do_sample, top_k, top_p, temperature)
    ids = _generate(model, tokenizer, input_ids, max_new_tokens, early_stop, num_draft_tokens=0, **sampling)
    return {"generate_ids": ids}


def exact_self_speculative_generate(
    model: SpeculativeModel,
    tokenizer: PreTrainedTokenizerBase,
    input_ids: torch.Tensor,
    max_new_tokens: int = 10,
    early_stop: bool = False,
    max_step_draft: int = 8,
    th_stop_draft: float = 0.8,
    auto_th_stop_draft: bool = True,
    auto_parameters: Sequence[float] = AUTO_PARAMETERS,
    do_sample: bool = False,
    do_sample_draft: bool = False,
    top_k: int = 0,
    top_p: float = 0.85,
    temperature: float = 0.2,
    *,
    verifier: VerifierName = "coupled",
) -> Result:
    """What `base_generate` returns, sooner, with the figures of the draft.

    `do_sample_draft` changes nothing: a draft is drawn as the target draws. `th_stop_draft` in the result is where the
    threshold ended; hand it to the next call to carry it on.
    """
    ids = _generate(
        model,
        tokenizer,
        input_ids,
        max_new_tokens,
        early_stop,
        max_step_draft=max_step_draft,
        th_stop_draft=th_stop_draft,
        auto_th_stop_draft=auto_th_stop_draft,
        auto_parameters=auto_parameters,
        min_step_draft=0,
        verifier=verifier,
        **_sampling(do_sample, top_k, top_p, temperature),
    )
    return {
        "generate_ids": ids,
        "matchness": model.n_matched / model.n_drafted if model.n_drafted else 0.0,
        "num_drafted_tokens": model.n_drafted,
        "th_stop_draft": model.th_stop_draft,
    }


def self_speculative_sample(
    model: SpeculativeModel,
    tokenizer: PreTrainedTokenizerBase,
    input_ids: torch.Tensor,
    max_new_tokens: int = 10,
    early_stop: bool = False,
    max_step_draft: int = 8,
    th_stop_draft: float = 0.5,
    th_random_draft: float = 1.0,
    *args: Any,
    **options: Any,
) -> Result:
    """Rejection sampling: the target's distribution, though not `base_generate`'s very tokens.

    Raises:
        RequestError: th_random_draft is not 1, its default.
    """
    if th_random_draft != 1:
        raise RequestError(f"th_random_draft={th_random_draft!r} cannot be honoured; leave it at 1.0")
    lengths = (max_new_tokens, early_stop, max_step_draft, th_stop_draft)
    options["verifier"] = "rejection"
    return exact_self_speculative_generate(model, tokenizer, input_ids, *lengths, *args, **options)


GENERATE_FNS: dict[str, Callable[..., Result]] = {
    "base": base_generate,
    "exact_self_speculative_generate": exact_self_speculative_generate,
    "essg": exact_self_speculative_generate,
    "self_speculative_sample": self_speculative_sample,
    "sss": self_speculative_sample,
}


def infer(
    model: SpeculativeModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    generate_fn: str | Callable[..., Result] = "base",
    decode_timing: bool = True,
    seed: int | None = 42,
    *args: Any,
    **options: Any,
) -> Result:
    """Complete a text by "base", "essg", "sss" or a function of that kind; adds `completion` and `time` in seconds."""
    input_ids = tokenizer(prompt, return_tensors="pt").input_ids
    return infer_input_ids(model, tokenizer, input_ids, generate_fn, decode_timing, seed, *args, **options)


def infer_input_ids(
    model: SpeculativeModel,
    tokenizer: PreTrainedTokenizerBase,
    input_ids: torch.Tensor,
    generate_fn: str | Callable[..., Result] = "base",
    decode_timing: bool = True,
    seed: int | None = 42,
    *args: Any,
    **options: Any,
) -> Result:
    """`infer` on token ids [1, n]."""
    if isinstance(generate_fn, str):
        if generate_fn not in GENERATE_FNS:
            raise RequestError(f"generate_fn={generate_fn!r} is not known; use one of {', '.join(GENERATE_FNS)}")
        generate_fn = GENERATE_FNS[generate_fn]
    if seed is not None:
        torch.manual_seed(seed)
    began = time.perf_counter()
    result = generate_fn(model, tokenizer, input_ids.to(model.device), *args, **options)
    result["time"] = time.perf_counter() - began if decode_timing else None
    result["completion"] = tokenizer.decode(result["generate_ids"][0], skip_special_tokens=True)
    return result


def _sampling(do_sample: bool, top_k: int, top_p: float, temperature: float) -> dict[str, Any]:
    """Draft & Verify decodes greedily where any of these leaves one token."""
    if not do_sample or top_k == 1 or top_p == 0 or temperature == 0:
        return {"do_sample": False}
    return {"do_sample": True, "top_k": top_k, "top_p": top_p, "temperature": temperature}


def _generate(
    model: SpeculativeModel,
    tokenizer: PreTrainedTokenizerBase,
    input_ids: torch.Tensor,
    max_new_tokens: int,
    early_stop: bool,
    **options: Any,
) -> torch.Tensor:
    """The new tokens [1, n]; without `early_stop` the end of sequence is a token like any other."""
    eos = tokenizer.eos_token_id if early_stop else None
    mask = torch.ones_like(input_ids)
    ids = model.generate(input_ids, attention_mask=mask, max_new_tokens=max_new_tokens, eos_token_id=eos, **options)
    new: torch.Tensor = ids[:, input_ids.shape[1] :]
    return new
