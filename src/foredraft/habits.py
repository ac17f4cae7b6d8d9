"""Names from other libraries that people try here, and what to write instead; other unknown names are refused too."""

import difflib
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from foredraft.errors import RequestError

Named = TypeVar("Named", bound=Callable[..., Any])

SAMPLING = {
    "max_tokens": "max_new_tokens=...",
    "max_completion_tokens": "max_new_tokens=...",
    "max_length": "max_new_tokens=..., which counts output alone",
    "do_sample": "temperature=0 for greedy decoding, more to sample",
    "n": "the prompt n times in a list, each with a seed of its own",
    "num_return_sequences": "the prompt several times in a list, each with a seed of its own",
    "best_of": "the prompt several times in a list, and choose among the results",
    "num_beams": "leave it out: there is no beam search here",
    "use_beam_search": "leave it out: there is no beam search here",
    "stop_strings": "stop=...",
    "stop_sequences": "stop=...",
    "eos_token_id": "stop_token_ids=...",
    "logits_processor": "processors=...",
    "logits_processors": "processors=...",
    "top_logprobs": "logprobs=...",
    "structured_outputs": "structured=...",
    "guided_decoding": "structured=...",
    "guided_json": "structured=...",
    "guided_regex": "structured=Structured.regex(...)",
    "guided_choice": "structured=Structured.choice(...)",
    "response_format": "structured=...",
    "skip_special_tokens": "leave it out: `text` leaves special tokens out, `token_ids` has them",
}
LOADING = {
    "model": "target=...",
    "model_id": "target=...",
    "model_name_or_path": "target=...",
    "pretrained_model_name_or_path": "target=...",
    "draft_model": "draft=...",
    "assistant_model": "draft=...",
    "speculative_model": "draft=...",
    "speculative_config": "draft=..., and num_draft_tokens=... of generate()",
    "num_speculative_tokens": "num_draft_tokens=... of generate(), or policy=Fixed(...)",
    "num_draft_tokens": "num_draft_tokens=... of generate(), or policy=Fixed(...)",
    "torch_dtype": "dtype=...",
    "quantization": "weight_format='int4' or 'int8'",
    "quantization_config": "weight_format='int4' or 'int8'",
    "load_in_4bit": "weight_format='int4'",
    "load_in_8bit": "weight_format='int8'",
    "max_num_seqs": "max_batch_size=...",
    "max_seq_len": "max_model_len=...",
    "max_length": "max_model_len=...",
    "tensor_parallel_size": "device_map=...",
    "gpu_memory_utilization": "cache_bytes=...",
    "enable_prefix_caching": "prefix_cache=...",
    "enforce_eager": "leave it out: there is nothing to compile",
    "seed": "SamplingParams(seed=...)",
}
CALLING = {
    "prompt": "the prompt as first argument",
    "prompt_token_ids": "token ids as first argument",
    "input_ids": "token ids as first argument",
    "inputs": "the prompt as first argument",
    "sampling_params": "params=...",
    "assistant_model": "LLM(draft=...)",
    "num_speculative_tokens": "num_draft_tokens=...",
    "use_tqdm": "leave it out: there is no progress bar",
    "stream": "stream() or stream_chat()",
    **{name: f"params=SamplingParams(...) with {ours}" if "=" in ours else ours for name, ours in SAMPLING.items()},
}


def by_our_names(habits: Mapping[str, str]) -> Callable[[Named], Named]:
    """A function, or a class, that refuses keywords which it has not with a RequestError that names ours."""

    def around(named: Named) -> Named:
        if isinstance(named, type):
            named.__init__ = by_our_names(habits)(named.__init__)  # type: ignore[misc]
            return named
        known = inspect.signature(named).parameters

        @functools.wraps(named)
        def called(*args: Any, **given: Any) -> Any:
            for name in given:
                if name not in known:
                    raise RequestError(_refusal(named.__qualname__, name, given[name], habits, list(known)))
            return named(*args, **given)

        return called  # type: ignore[return-value]  # called as `named` is

    return around


def _refusal(where: str, name: str, value: object, habits: Mapping[str, str], known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(it for it in known if it != 'self')}"
    ours = habits.get(name, "")
    advice = ours if ours.startswith("leave it out") else f"use {ours}" if ours else hint
    return f"{where.removesuffix('.__init__')}() takes no {name} (given {value!r}); {advice}"
