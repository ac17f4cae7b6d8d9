"""A draft model with another tokenizer: how often it is right, and how fast that is, at several temperatures.

    python benchmarks/other_vocabulary.py TARGET DRAFT          # folders or hub names

Arms: plain decoding; drafts drawn with the target's noise, keyed by the target's ids (`coupled`); with noise of their
own (`uncoupled`); and the draft's likeliest token (`likeliest`). Arms take turns request by request. Fails unless every
text is plain decoding's.
"""

import statistics
import sys
from dataclasses import dataclass, field

import torch
from _timing import parser, report
from transformers.utils.logging import disable_progress_bar

from foredraft import LLM, GenerationResult, SamplingParams
from foredraft.drafters.translated import TranslatingDrafter
from foredraft.noise import fold
from foredraft.policy import DraftPolicy
from foredraft.tuning.driving import driven_by
from foredraft.types import Draft, Request, VerifierName

TEXTS = (
    "Once upon a time",
    "Lily and Tom went to the park.",
    "The little dog was sad because",
    "One day, a big bear",
    '"Can I help you?" said',
    "Mom and dad had a surprise for",
    "There was a small house in the forest.",
    "It was raining, so Ben",
)
TEMPERATURES = (0.0, 0.7, 1.0)
DRAFTED = 4


class Uncoupled(TranslatingDrafter):
    """Draws as if its requests had other seeds."""

    def propose(self, requests: list[Request], policy: DraftPolicy) -> list[Draft]:
        seeds = [request.seed for request in requests]
        for request in requests:
            request.seed = fold(request.seed, 1)
        try:
            return super().propose(requests, policy)
        finally:
            for request, seed in zip(requests, seeds, strict=True):
                request.seed = seed


@dataclass
class Arm:
    drafter: TranslatingDrafter
    argmax: tuple[VerifierName, ...] = ("rejection",)
    length: int = DRAFTED
    results: list[GenerationResult] = field(default_factory=list)

    def run(self, llm: LLM, text: str, params: SamplingParams) -> None:
        self.drafter.argmax = self.argmax
        with driven_by(llm, self.drafter):
            self.results.append(llm.generate(text, params, num_draft_tokens=self.length))

    def figures(self) -> dict[str, float]:
        drafted, accepted = (sum(getattr(it.stats, name) for it in self.results) for name in ("drafted", "accepted"))
        rates = [len(it.token_ids) / it.stats.seconds_total for it in self.results]
        return {"tokens/s": statistics.median(rates), "accepted": accepted / drafted if drafted else 0.0}


def measure(llm: LLM, temperature: float, rounds: int, tokens: int) -> dict[str, object]:
    drafter = llm.drafter
    assert isinstance(drafter, TranslatingDrafter)
    arms = {
        "plain": Arm(drafter, length=0),
        "coupled": Arm(drafter),
        "uncoupled": Arm(Uncoupled(drafter.model, drafter.by)),
        "likeliest": Arm(drafter, ("rejection", "coupled")),
    }
    for round in range(rounds):
        for i, text in enumerate(TEXTS):
            params = SamplingParams(
                temperature=temperature, seed=100 * round + i, max_new_tokens=tokens, ignore_eos=True
            )
            for arm in list(arms.values())[:: 1 if (round + i) % 2 == 0 else -1]:
                arm.run(llm, text, params)
    texts = [[result.token_ids for result in arm.results] for arm in arms.values()]
    if any(own != texts[0] for own in texts):
        sys.exit(f"temperature {temperature}: a text is not plain decoding's")
    compared = sum(map(len, texts[0])) * (len(arms) - 1)
    return {"tokens compared": compared} | {name: arm.figures() for name, arm in arms.items()}


def main() -> None:
    made = parser(__doc__, rounds=3)
    made.add_argument("target")
    made.add_argument("draft")
    made.add_argument("--max-new-tokens", type=int, default=100)
    args = made.parse_args()
    torch.set_num_threads(args.threads)
    disable_progress_bar()
    llm = LLM(args.target, args.draft, prefix_cache=False)
    if not isinstance(llm.drafter, TranslatingDrafter):
        sys.exit("these two have the same tokens; nothing is translated")
    results: dict[str, object] = {"vocabularies": llm.drafter.overlap.as_dict()}
    for temperature in TEMPERATURES:
        results[f"temperature {temperature}"] = measure(llm, temperature, args.rounds, args.max_new_tokens)
    report("other_vocabulary", results, args.out)


if __name__ == "__main__":
    main()
