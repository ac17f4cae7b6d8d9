"""Every causal model type of the installed transformers, tiny and random: the same greedy text, or a refusal?

    python scripts/model_sweep.py                        # all of them, into docs/models.md; four minutes
    python scripts/model_sweep.py --types llama gemma3   # some, on the screen

Two prompts in one batch, n-gram drafts, fp32, against transformers' generate on one prompt at a time. Ends with an
error where a text differs or an error is not ours.
"""

import argparse
import gc
import logging
import re
import sys
import textwrap
import warnings
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from foredraft import LLM, SamplingParams
from foredraft.errors import ForedraftError

OUT = Path(__file__).parent.parent / "docs" / "models.md"
VOCAB, LENGTH, NEW, WINDOW = 160, 256, 32, 24
PROMPTS = [[(7 * i + 3) % 150 + 5 for i in range(20)], [(11 * i + 1) % 150 + 5 for i in range(9)]]
LARGEST = 30_000_000  # parameters of a model that still counts as tiny
TIE = 1e-4  # of the largest logit: what two orders of summation may make of it in fp32

# What configurations call their sizes, and ours. A type takes those that its own configuration has.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "encoder_hash_byte_group_vocab"), VOCAB),
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "emb_dim", "word_embed_proj_dim"), 64
    ),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "max_target_positions"), LENGTH),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "n_inner", "dff", "dim_ff", "d_inner"), 96),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "ffn_hidden_size", "mlp_intermediate_size"), 96),
    **dict.fromkeys(("intermediate_size_mlp", "dense_intermediate_size"), 96),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "moe_ffn_hidden_size"), 48),
    **dict.fromkeys(("expert_ffn_hidden_size", "expert_dim"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_encoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "attention_head_size", "dim_head", "v_head_dim", "qk_head_dim"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_k", "moe_topk"), 2),
    **dict.fromkeys(("n_shared_experts", "n_group", "topk_group", "first_k_dense_replace"), 1),
    **dict.fromkeys(("initializer_range", "init_std"), 0.35),
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "sliding_window": WINDOW,
    "use_cache": True,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "decoder_start_token_id": 1,
    "is_decoder": True,
    "is_encoder_decoder": False,
}
OWN: dict[str, dict[str, Any]] = {  # where a type takes none of these; None: leave the size out
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            k: {"rope_type": "default", "rope_theta": 1e4} for k in ("sliding_attention", "full_attention")
        },
    },
    "dbrx": {
        "attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots3_note": {"num_key_value_heads": 4, "text_config": {"num_key_value_heads": 4, "per_layer_config": {}}},
    "dots3_note_text": {"num_key_value_heads": 4},
    "gemma3n_text": {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 16},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "reformer": {"axial_pos_embds_dim": (16, 48), "axial_pos_shape": (16, 16)},
    "zamba": {"num_hidden_layers": 4, "layer_types": None},
    "zamba2": {"layer_types": ["mamba", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}


@dataclass(frozen=True, slots=True)
class Outcome:
    kind: str  # the model type
    verdict: str  # one of VERDICTS
    why: str = ""


VERDICTS = {
    "equal": "the same text as transformers' `generate`",
    "uncached": "the same text as transformers' `generate(use_cache=False)`; with its cache transformers says another",
    "tie": "the same text up to two logits that are one within rounding",
    "refused": "refused with a reason",
    "not built": "no tiny random model of it can be built here",
    "different": "another text",
    "raw error": "an error that is not ours",
}
FAULTS = ("different", "raw error")


def tiny(kind: str, seed: int = 0) -> PreTrainedModel:
    """A seeded random model of a type, its norms disturbed, in evaluation mode."""
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(small_config(kind), dtype=torch.float32)
    count = model.num_parameters()
    if count > LARGEST:
        raise ValueError(f"its smallest configuration here has {count:,} parameters")
    for name, parameter in model.named_parameters():
        if "norm" in name or "ln_" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def small_config(kind: str) -> PreTrainedConfig:
    made: type[PreTrainedConfig] = CONFIG_MAPPING[kind]
    return made(**_sizes(made(), OWN.get(kind, {})))


def _sizes(config: PreTrainedConfig, own: dict[str, Any]) -> dict[str, Any]:
    known = config.to_dict()
    sizes = {name: size for name, size in SIZES.items() if name in known}
    if "qk_rope_head_dim" in known and "head_dim" in known:
        sizes["head_dim"] = sizes["qk_rope_head_dim"]
    for name in config.sub_configs:
        inner = getattr(config, name, None)
        if isinstance(inner, PreTrainedConfig):
            sizes[name] = _sizes(inner, {}) | own.get(name, {})
    sizes |= {name: value for name, value in own.items() if name not in config.sub_configs}
    return {name: value for name, value in sizes.items() if value is not None or name == "eos_token_id"}


def outcome(kind: str) -> Outcome:
    """What becomes of one type."""
    try:
        model = tiny(kind)
    except Exception as error:  # whatever its configuration demands
        return Outcome(kind, "not built", _line(error))
    try:
        llm = LLM(model, "ngram", max_batch_size=len(PROMPTS))
        params = SamplingParams(max_new_tokens=NEW, ignore_eos=True)
        texts = [result.token_ids for result in llm.generate(PROMPTS, params, num_draft_tokens=3)]
    except ForedraftError as error:
        return Outcome(kind, "refused", _line(error))
    except Exception as error:  # that is what this is to find
        return Outcome(kind, "raw error", f"{type(error).__name__}: {_line(error)}")
    verdicts = [_verdict(model, prompt, text) for prompt, text in zip(PROMPTS, texts, strict=True)]
    return Outcome(kind, max(verdicts, key=list(VERDICTS).index))


def _verdict(model: PreTrainedModel, prompt: list[int], text: list[int]) -> str:
    said, logits = _generated(model, prompt)
    if said == text:
        return "equal"
    if _generated(model, prompt, use_cache=False)[0] == text:
        return "uncached"
    first = next(i for i in range(NEW) if said[i] != text[i])
    high, low = logits[first][said[first]], logits[first][text[first]]
    return "tie" if (high - low).abs() <= TIE * high.abs() else "different"


def _generated(model: PreTrainedModel, prompt: list[int], **options: Any) -> tuple[list[int], list[torch.Tensor]]:
    """transformers' own greedy text, and the logits [V] of each of its tokens."""
    ids = torch.tensor([prompt])
    out: Any = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=None,
        forced_eos_token_id=None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )
    return out.sequences[0, len(prompt) :].tolist(), [row[0] for row in out.logits]


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def report(outcomes: Iterable[Outcome]) -> str:
    """docs/models.md"""
    made = list(outcomes)
    by_verdict = {verdict: [each for each in made if each.verdict == verdict] for verdict in VERDICTS}
    lines = [
        "# Which models",
        "",
        f"Every causal model type of transformers {transformers.__version__}, {len(made)} in all, as tiny random",
        f"models in fp32 (torch {torch.__version__.split('+')[0]}): two prompts in one batch, {NEW} tokens each,",
        "n-gram drafts, beside transformers' own greedy `generate`. Written by `python scripts/model_sweep.py`.",
        "",
        "| types | |",
        "| --- | --- |",
        *(f"| {len(by_verdict[v])} | {text} |" for v, text in VERDICTS.items() if by_verdict[v] or v in FAULTS),
    ]
    for verdict, found in ((verdict, found) for verdict, found in by_verdict.items() if found):
        lines += ["", f"## {VERDICTS[verdict][0].upper()}{VERDICTS[verdict][1:]}", ""]
        lines += _by_reason(found)
    return "\n".join(lines) + "\n"


def _by_reason(outcomes: list[Outcome]) -> list[str]:
    kinds: dict[str, list[str]] = defaultdict(list)
    for each in outcomes:
        why = each.why.split(" cannot serve: ")[-1].split("; decode it with")[0]
        why = re.sub(r" by \d+% from", " from", why)
        kinds[why].append(f"`{each.kind}`")
    if list(kinds) == [""]:
        return textwrap.wrap(", ".join(kinds[""]), 120)
    items = (f"- {', '.join(names)}: {why}" for why, names in kinds.items())
    return [line for item in items for line in textwrap.wrap(item, 120, subsequent_indent="  ")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", help="only these; nothing is written then")
    types = parser.parse_args().types
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    outcomes = []
    for kind in types or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        outcomes.append(outcome(kind))
        print(f"{kind}: {outcomes[-1].verdict} {outcomes[-1].why}", flush=True)
        gc.collect()
    if not types:
        OUT.write_text(report(outcomes), encoding="utf-8")
    faults = [each.kind for each in outcomes if each.verdict in FAULTS]
    if faults:
        print(f"{len(faults)} faults: {', '.join(faults)}", file=sys.stderr)
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
