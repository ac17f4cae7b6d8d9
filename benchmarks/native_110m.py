"""The native runtime on a random 110M Llama in bf16: transformers, long texts, memory, a busy neighbour.

1. Plain tokens a second over transformers' batched `generate`, batch 1, 4, 8 and 16.
2. Seconds of a prompt of 64 to 4,096 tokens, transformers over ours.
3. Milliseconds of one token after 4,096 tokens over that after 64.
4. Bytes that 16 texts of 100 tokens hold after one of 4,096, over what they need; and the process's growth over 200
   requests of mixed lengths, in MiB.
5. Milliseconds of a pass of five rows beside a process that keeps one core busy, over that of an idle machine.
"""

import subprocess
import sys
from pathlib import Path
from random import Random

import torch
from _timing import interleave, paired_ratio, parser, report, seconds, summary
from native import pass_ms
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from foredraft import LLM, SamplingParams

BATCHES = (1, 4, 8, 16)
PROMPTS = (64, 512, 2048, 4096)
CONFIG = LlamaConfig(
    hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12, vocab_size=32000,
    max_position_embeddings=8192,
)  # fmt: skip
CONTEXT, NEW = 64, 24  # tokens of each text of a batch


def random_llama(config: LlamaConfig = CONFIG) -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def ids(count: int, seed: int) -> list[int]:
    source = Random(seed)
    return [source.randrange(5, 32000) for _ in range(count)]


def theirs(model: PreTrainedModel, prompts: list[list[int]], new: int) -> None:
    batch = torch.tensor(prompts)
    model.generate(
        input_ids=batch, attention_mask=torch.ones_like(batch), max_new_tokens=new, min_new_tokens=new,
        do_sample=False, pad_token_id=0,
    )  # fmt: skip


def ours(llm: LLM, prompts: list[list[int]], new: int) -> None:
    llm.generate(prompts, SamplingParams(max_new_tokens=new, ignore_eos=True))


def beside_transformers(llm: LLM, model: PreTrainedModel, rounds: int) -> dict[str, object]:
    asked = {f"batch {size}, {NEW} tokens": ([ids(CONTEXT, i) for i in range(size)], NEW) for size in BATCHES}
    asked |= {f"prompt of {length}": ([ids(length, length)], 1) for length in PROMPTS}
    arms = {
        f"{name}, transformers": lambda p=p, n=n: seconds(lambda: theirs(model, p, n)) for name, (p, n) in asked.items()
    }
    arms |= {f"{name}, ours": lambda p=p, n=n: seconds(lambda: ours(llm, p, n)) for name, (p, n) in asked.items()}
    with torch.inference_mode():
        figures = interleave(arms, rounds)
    return {
        name: summary(figures[f"{name}, ours"])
        | {"times_as_fast": paired_ratio(figures, f"{name}, transformers", f"{name}, ours")["median"]}
        for name in asked
    }


def long_over_short(llm: LLM, rounds: int) -> dict[str, float]:
    arms = {str(start): lambda start=start: pass_ms(llm.model, 1, 1, start) for start in (4095, 64)}
    return paired_ratio(interleave(arms, rounds), "4095", "64")


def memory(llm: LLM) -> dict[str, float]:
    cache = llm.model.cache
    cache.extend(0, 0, 4096)  # type: ignore[attr-defined]
    cache.free(0)
    for slot in range(16):
        cache.extend(slot, 0, 100)  # type: ignore[attr-defined]
    held = cache.nbytes / cache.need([100] * 16)
    cache.release()
    source, before = Random(1), 0.0
    for index in range(220):
        ours(llm, [ids(source.randrange(1, 120), index)], source.randrange(1, 6))
        before = resident() if index == 19 else before
    return {"held_over_needed": held, "growth_mib": resident() - before}


def resident() -> float:
    """MiB of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) / 256


def beside_a_busy_process(llm: LLM, rounds: int) -> dict[str, float]:
    def busy() -> float:
        with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as neighbour:
            try:
                return pass_ms(llm.model, 1, 5, repeats=60)
            finally:
                neighbour.kill()

    figures = interleave({"busy": busy, "idle": lambda: pass_ms(llm.model, 1, 5, repeats=60)}, rounds)
    return paired_ratio(figures, "busy", "idle")


def main() -> None:
    args = parser(__doc__, rounds=2).parse_args()
    torch.set_num_threads(args.threads)
    model = random_llama()
    llm = LLM(model, draft="none", runtime="native", prefix_cache=False, max_batch_size=16)
    results = {
        "times as fast as transformers": beside_transformers(llm, model, args.rounds),
        "a token after 4,096 over one after 64": long_over_short(llm, args.rounds),
        "memory": memory(llm),
        "beside a busy process over idle": beside_a_busy_process(llm, args.rounds),
    }
    report("native_110m", results, args.out)


if __name__ == "__main__":
    main()
