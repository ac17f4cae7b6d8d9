"""foredraft against transformers in one run: plain decoding, the price of verification, drafting, engine overhead.

1. Plain greedy decoding of a random 1.1B Llama in bf16, batch 1: foredraft and transformers' eager `generate`.
2. One pass of that model over 4 and over 5 rows, and the speed it reads its weights at beside that of a sum over
   memory, which tells a slow machine from a slow pass.
3. The bundled pair: foredraft, and transformers' assisted generation with the same two models.
4. What the engine adds to a step beyond the models' forwards, on the bundled pair at batch 1.
"""

from time import perf_counter

import torch
from _timing import interleave, paired_ratio, parser, report, seconds, summary
from demo import OPENINGS
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from foredraft import LLM, SamplingParams
from foredraft.drafters.several import forget_outputs
from foredraft.llm import BUNDLED
from foredraft.models.base import CausalModel
from foredraft.models.rows import RowBatch, Span, plan

CONTEXT = 128


def random_llama(layers: int) -> PreTrainedModel:
    """The shape of TinyLlama 1.1B, random weights, bf16."""
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        max_position_embeddings=2048,
    )
    torch.manual_seed(0)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(previous)


@torch.inference_mode()
def plain_decoding(layers: int, tokens: int, rounds: int) -> dict[str, object]:
    model = random_llama(layers)
    llm = LLM(model, draft="none")
    ids = list(range(5, 5 + CONTEXT))
    params = SamplingParams(max_new_tokens=tokens, ignore_eos=True)
    batch = torch.tensor([ids])
    mask = torch.ones_like(batch)

    def transformers_arm() -> float:
        def run() -> None:
            model.generate(
                input_ids=batch,
                attention_mask=mask,
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                pad_token_id=0,
            )

        return tokens / seconds(run)

    buffer = torch.ones(2**28)
    weights = llm.model.weight_bytes - model.get_input_embeddings().weight.nbytes  # of the table a pass reads some rows

    arms = {
        "memory_gb_s": lambda: max(buffer.nbytes / seconds(buffer.sum) / 1e9 for _ in range(5)),
        "transformers": transformers_arm,
        "foredraft": lambda: tokens / seconds(lambda: llm.generate(ids, params)),
        "rows_4_ms": lambda: pass_ms(llm.model, 4),
        "rows_5_ms": lambda: pass_ms(llm.model, 5),
    }
    figures = interleave(arms, rounds)
    figures["pass_gb_s"] = [weights / milliseconds / 1e6 for milliseconds in figures["rows_4_ms"]]
    return {name: summary(values) for name, values in figures.items()} | {
        "pass_over_memory": paired_ratio(figures, "pass_gb_s", "memory_gb_s"),
        "speedup": paired_ratio(figures, "foredraft", "transformers"),
        "rows_5_over_4": paired_ratio(figures, "rows_5_ms", "rows_4_ms"),
    }


def pass_ms(model: CausalModel, width: int, repeats: int = 8) -> float:
    """Milliseconds of one pass over `width` rows after the context, the fastest of some."""
    rows = plan([Span(0, CONTEXT, list(range(width)), width)], 4, model.row_invariance.key_multiple)
    return 1e3 * min(seconds(lambda: model.forward(rows)) for _ in range(repeats))


def assisted_generation(tokens: int, rounds: int) -> dict[str, object]:
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED / "target")
    target, draft = (
        AutoModelForCausalLM.from_pretrained(BUNDLED / name, dtype=torch.bfloat16).eval()
        for name in ("target", "draft")
    )
    llm = LLM()
    forget_outputs(llm.drafter)  # every round asks the same
    prompts = [tokenizer(f"User: {text}\nAssistant:")["input_ids"] for text in OPENINGS]
    params = SamplingParams(max_new_tokens=tokens, ignore_eos=True)

    def transformers_arm(assistant: PreTrainedModel | None) -> float:
        began = perf_counter()
        for ids in prompts:
            batch = torch.tensor([ids])
            target.generate(
                input_ids=batch,
                attention_mask=torch.ones_like(batch),
                assistant_model=assistant,
                do_sample=False,
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                pad_token_id=0,
            )
        return tokens * len(prompts) / (perf_counter() - began)

    def ours(num_draft_tokens: int | None) -> float:
        began = perf_counter()
        for ids in prompts:
            llm.generate(ids, params, num_draft_tokens=num_draft_tokens)
        return tokens * len(prompts) / (perf_counter() - began)

    figures = interleave(
        {
            "transformers": lambda: transformers_arm(None),
            "transformers_assisted": lambda: transformers_arm(draft),
            "foredraft_plain": lambda: ours(0),
            "foredraft": lambda: ours(None),
        },
        rounds,
    )
    return {name: summary(values) for name, values in figures.items()} | {
        "speedup_over_assisted": paired_ratio(figures, "foredraft", "transformers_assisted"),
        "speedup_over_plain": paired_ratio(figures, "foredraft", "foredraft_plain"),
    }


class Stopwatch:
    """Adds up the seconds that a model's forward takes."""

    def __init__(self, model: CausalModel) -> None:
        self.total = 0.0
        forward = model.forward

        def timed(rows: RowBatch) -> torch.Tensor:
            began = perf_counter()
            logits = forward(rows)
            self.total += perf_counter() - began
            return logits

        model.forward = timed  # type: ignore[method-assign]


def engine_overhead(tokens: int, rounds: int) -> dict[str, object]:
    """Milliseconds a step outside of the models' forwards; plain, and with the draft model at a fixed length of 4."""
    llm = LLM()
    forget_outputs(llm.drafter)  # every round asks the same
    watches = [Stopwatch(llm.model), Stopwatch(llm.drafter.model)]  # type: ignore[attr-defined]
    params = SamplingParams(max_new_tokens=tokens, ignore_eos=True)

    def arm(num_draft_tokens: int) -> float:
        for watch in watches:
            watch.total = 0.0
        began = perf_counter()
        results = [llm.generate(f"User: {t}\nAssistant:", params, num_draft_tokens=num_draft_tokens) for t in OPENINGS]
        outside = perf_counter() - began - sum(watch.total for watch in watches)
        return 1e3 * outside / sum(result.stats.target_passes for result in results)

    figures = interleave({"plain_ms": lambda: arm(0), "draft_4_ms": lambda: arm(4)}, rounds)
    return {name: summary(values) for name, values in figures.items()}


def main() -> None:
    flags = parser(__doc__, rounds=5)
    flags.add_argument("--layers", type=int, default=22, help="of the random Llama; 22 is 1.1B")
    flags.add_argument("--tokens", type=int, default=48, help="new tokens of the random Llama")
    flags.add_argument("--only", choices=["plain", "assisted", "overhead"], help="one part alone")
    args = flags.parse_args()
    torch.set_num_threads(args.threads)
    parts = {
        "plain": lambda: plain_decoding(args.layers, args.tokens, args.rounds),
        "assisted": lambda: assisted_generation(128, args.rounds),
        "overhead": lambda: engine_overhead(128, args.rounds),
    }
    results = {name: part() for name, part in parts.items() if args.only in (None, name)}
    report("against_transformers", results, args.out)


if __name__ == "__main__":
    main()
