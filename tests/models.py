"""Tiny random models of every architecture, built from configurations; nothing is downloaded."""

import random
from typing import Any

import pytest
import torch
import transformers as t
from packaging.version import Version
from transformers import PreTrainedModel

from foredraft.native import library

# Kernels of these releases agree at no widths for some models in fp32, on one Intel Xeon at least; loading says so.
SOMETIMES_INEXACT = Version(torch.__version__) < Version("2.13")
VOCAB = 160
LENGTH = 1024
ROPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": LENGTH,
    "initializer_range": 0.35,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
HEADS: dict[str, Any] = {name: value for name, value in ROPE.items() if name != "num_key_value_heads"}
DIM: dict[str, Any] = {"head_dim": 16}
GPT2: dict[str, Any] = {
    "vocab_size": VOCAB,
    "n_positions": LENGTH,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "initializer_range": 0.35,
    "bos_token_id": None,
    "eos_token_id": None,
}
FALCON: dict[str, Any] = {k: v for k, v in HEADS.items() if k != "intermediate_size"}

CONFIGS: dict[str, t.PreTrainedConfig] = {
    "llama": t.LlamaConfig(**ROPE),
    "mistral": t.MistralConfig(**ROPE, sliding_window=24),
    "qwen2": t.Qwen2Config(**ROPE),
    "qwen3": t.Qwen3Config(**ROPE, **DIM),
    "gpt2": t.GPT2Config(**GPT2),
    "gpt_neox": t.GPTNeoXConfig(**HEADS),
    "gpt_bigcode": t.GPTBigCodeConfig(**GPT2),
    "glm": t.GlmConfig(**ROPE, **DIM),
    "glm4": t.Glm4Config(**ROPE, **DIM),
    "phi3": t.Phi3Config(**ROPE),
    "gemma2": t.Gemma2Config(**ROPE, **DIM, sliding_window=24, query_pre_attn_scalar=16),
    "gemma3_text": t.Gemma3TextConfig(
        **ROPE,
        **DIM,
        sliding_window=24,
        query_pre_attn_scalar=16,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "falcon": t.FalconConfig(**FALCON, alibi=False, new_decoder_architecture=False, multi_query=True),
    "falcon_alibi": t.FalconConfig(**FALCON, alibi=True, multi_query=False, new_decoder_architecture=False),
    "bloom": t.BloomConfig(
        vocab_size=VOCAB, hidden_size=64, n_layer=2, n_head=4, initializer_range=0.35, bos_token_id=None,
        eos_token_id=None, pad_token_id=None,
    ),
    "opt": t.OPTConfig(
        vocab_size=VOCAB, hidden_size=64, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=LENGTH, word_embed_proj_dim=64, init_std=0.35, bos_token_id=None, eos_token_id=None,
    ),
    "gptj": t.GPTJConfig(**GPT2, rotary_dim=8),
    "olmo2": t.Olmo2Config(**ROPE),
    "stablelm": t.StableLmConfig(**ROPE),
    "mixtral": t.MixtralConfig(**ROPE, num_local_experts=4, num_experts_per_tok=2),
    "gpt_oss": t.GptOssConfig(
        **ROPE, **DIM, num_local_experts=4, num_experts_per_tok=2, sliding_window=24,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    ),
}  # fmt: skip
SLIDING = {"mistral": 24, "gemma2": 24, "gemma3_text": 24, "gpt_oss": 24}


def tiny(name: str, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> PreTrainedModel:
    """A seeded random model in evaluation mode."""
    torch.manual_seed(seed)
    config = type(CONFIGS[name]).from_dict(CONFIGS[name].to_dict())
    model: PreTrainedModel = t.AutoModelForCausalLM.from_config(config, dtype=dtype)
    for parameter_name, parameter in model.named_parameters():
        if "norm" in parameter_name or "ln_" in parameter_name:  # freshly made norms do nothing; these do
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval().to(device)


def biased(model: PreTrainedModel) -> PreTrainedModel:
    """Freshly made biases are zeros; these are not."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def draws(length: int, seed: int = 0) -> list[int]:
    """Pseudo-random tokens."""
    source = random.Random(seed)
    return [source.randrange(VOCAB) for _ in range(length)]


def mamba() -> PreTrainedModel:
    """A recurrent model, to be refused."""
    return t.MambaForCausalLM(t.MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2))


def runtimes() -> list[object]:
    """The runtimes of a CPU, as parameters of a test; the native one is skipped where it was not built."""
    missing = library.why_not()
    return ["torch", pytest.param("native", marks=pytest.mark.skipif(bool(missing), reason=missing))]
