"""What structured output gains by drafting, and what a mask costs.

Every schema of the tests on the bundled pair, greedy, plain and drafted in turn, one at a time; then the time of a mask
against a plain step, on the bundled vocabulary and on one of 150,000 tokens.
"""

import json
import random
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from _timing import parser, report
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from foredraft import LLM, SamplingParams, Structured
from foredraft.drafters.several import forget_outputs
from foredraft.steering import Steering

SCHEMAS = json.loads((Path(__file__).parents[1] / "tests" / "data" / "schemas.json").read_text())
PROMPT = "User: I need a table for two in Oakland tonight.\nAssistant: "


def speed(llm: LLM, rounds: int) -> dict[str, Any]:
    """Seconds of all schemas, plain and drafted, medians over rounds; aborts where a text differs."""
    asked = [SamplingParams(structured=schema, max_new_tokens=200) for schema in SCHEMAS.values()]
    seconds: dict[str, list[float]] = {"plain": [], "drafted": []}
    tokens = passes = 0
    for round_ in range(rounds + 1):  # the first warms up and compiles
        spent = dict.fromkeys(seconds, 0.0)
        tokens = passes = 0
        for params in asked:
            texts = []
            for arm, length in (("plain", 0), ("drafted", None)):
                began = perf_counter()
                result = llm.generate(PROMPT, params, num_draft_tokens=length)
                spent[arm] += perf_counter() - began
                texts.append(result.token_ids)
            if texts[0] != texts[1]:
                sys.exit(f"a text differs with drafting: {params.structured}")
            tokens, passes = tokens + len(texts[1]), passes + result.stats.target_passes
        for arm in seconds if round_ else ():
            seconds[arm].append(spent[arm])
    plain, drafted = (statistics.median(times) for times in seconds.values())
    return {"tokens": tokens, "tokens_per_pass": tokens / passes, "plain_s": plain, "drafted_s": drafted,
            "speedup": plain / drafted}  # fmt: skip


def mask_cost(llm: LLM, count: int = 100, pairs: int = 41) -> dict[str, float]:
    """Milliseconds of a plain step, and what a form adds to it: mask, its application, moving on.

    Texts of `count` tokens, without a form and with, in turn; `added` is the median over such pairs: the machine's
    speed changes from second to second.
    """
    schema = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
    form = SamplingParams(structured=schema, max_new_tokens=count)
    plain = SamplingParams(max_new_tokens=count, ignore_eos=True)
    steps: dict[str, list[float]] = {"free": [], "structured": []}
    for _ in range(pairs + 1):
        for name, params in (("free", plain), ("structured", form)):
            result = llm.generate([5, 6, 7, 8], params, num_draft_tokens=0)
            seconds = result.stats.seconds_total - result.stats.seconds_to_first_token
            steps[name].append(1e3 * seconds / max(1, len(result.token_ids) - 1))
    free, structured = (times[1:] for times in steps.values())
    return {
        "step_ms": statistics.median(free),
        "structured_step_ms": statistics.median(structured),
        "mask_ms": timed(llm, count),
        "added": statistics.median(with_form / alone - 1 for alone, with_form in zip(free, structured, strict=True)),
    }


def timed(llm: LLM, count: int) -> float:
    """Median milliseconds of one mask computed and applied, inside a string."""
    assert llm.grammars is not None
    constraint = llm.grammars.constraint(Structured.of({"type": "string"}), tuple(llm.eos_token_ids) or (0,))
    steering = Steering(constraint=constraint)
    scores, times = torch.randn(1, llm.model.vocab_size), []
    choose = random.Random(0)
    for _ in range(count):
        began = perf_counter()
        masked = steering.apply(scores, (), [()])
        times.append(perf_counter() - began)
        allowed = [token for token in masked[0].isfinite().nonzero().flatten().tolist() if token not in constraint.ends]
        constraint.commit([choose.choice(allowed)])
    return 1e3 * statistics.median(times)


def large(vocab_size: int = 150_000) -> LLM:
    """A model of the bundled target's shape with a large vocabulary, weights at random."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: i for i, char in enumerate(alphabet)}
    letters = [char for char in alphabet if char.isalnum() and char.isascii()]
    known, merges, source = [*letters, "\u0120"], [], random.Random(0)
    while len(vocab) < vocab_size - 1:
        left, right = source.choice(known), source.choice(known)
        if len(left + right) <= 10 and left + right not in vocab and "\u0120" not in right:
            vocab[left + right] = len(vocab)
            merges.append((left, right))
            known.append(left + right)
    vocab["<end>"] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    shape = LLM(draft="none").model.config.to_dict() | {"vocab_size": vocab_size, "eos_token_id": vocab_size - 1}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig.from_dict(shape)).bfloat16().eval()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    return LLM(model, "none", tokenizer=fast, prefix_cache=False)


def main() -> None:
    options = parser(__doc__, rounds=3).parse_args()
    torch.set_num_threads(options.threads)
    bundled = LLM(max_batch_size=1, prefix_cache=False)
    forget_outputs(bundled.drafter)  # every round asks the same
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "50 schemas, bundled pair": lambda: speed(bundled, options.rounds),
        "a mask, vocabulary 4,096": lambda: mask_cost(bundled),
        "a mask, vocabulary 150,000": lambda: mask_cost(large()),
    }
    found = {}
    for name, measure in parts.items():
        found[name] = measure()
        print(f"{name}: " + ", ".join(f"{key} {value:.3g}" for key, value in found[name].items()), flush=True)
    report("structured", found, options.out)


if __name__ == "__main__":
    main()
