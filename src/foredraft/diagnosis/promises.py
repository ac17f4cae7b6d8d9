"""Which promises hold here: what the load-time probe found, and a short text decoded in every way that must agree."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from foredraft.errors import RequestError
from foredraft.llm import LLM
from foredraft.results import GenerationResult
from foredraft.types import SamplingParams

State = Literal["holds", "broken", "unclear"]
PROMPT = "User: I need a table for two in Oakland tonight.\nAssistant:"
NEW_TOKENS, ROUNDS, LENGTHS = 32, 3, (1, 4)
ENOUGH = 0.95  # of plain decoding's speed, measured on so short a text


@dataclass(frozen=True, slots=True)
class Promise:
    name: str
    state: State
    why: str


def check(llm: LLM) -> list[Promise]:
    """Decodes a few hundred tokens; nothing but "never slower" depends on time."""
    prompt = _prompt(llm)[: max(1, llm.max_model_len // 2)]
    new_tokens = min(NEW_TOKENS, llm.max_model_len - len(prompt) - 1)
    greedy = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
    sampled = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True, temperature=1.0, seed=1)
    return [exact(llm, prompt, greedy), same_seed(llm, prompt, sampled), never_slower(llm, prompt, greedy), device(llm)]


def exact(llm: LLM, prompt: list[int], params: SamplingParams) -> Promise:
    found = llm.model.row_invariance
    differ = _differing(llm, prompt, params)
    if not found.exact:
        why = (
            "the probe found no shapes from which on rows agree bit for bit; every step runs "
            f"{found.min_rows} rows wide, and a text may change with the draft length or the batch"
        )
        return Promise("exact", "broken", why)
    if differ:
        return Promise("exact", "broken", f"probed to be, but another text came of {differ}: please report this")
    return Promise("exact", "holds", f"so the probe found, and a text of {_size(params)} is the same in every way")


def same_seed(llm: LLM, prompt: list[int], params: SamplingParams) -> Promise:
    differ = _differing(llm, prompt, params)
    if differ:
        return Promise("same seed", "broken", f"with one seed, another text came of {differ}")
    return Promise("same seed", "holds", f"a sampled text of {_size(params)} is the same with and without drafts")


def never_slower(llm: LLM, prompt: list[int], params: SamplingParams) -> Promise:
    """Seen, not proved: the policy is right in the long run, and other work on the machine is wrong in a short one."""
    name = "never slower"
    if llm.drafter.name == "none":
        return Promise(name, "holds", "nothing is drafted")
    rounds = []
    for _ in range(ROUNDS):
        plain, drafted = (_decode(llm, prompt, params, n).stats.tokens_per_second for n in (0, None))
        rounds.append((drafted / plain, drafted, plain))
    ratio, drafted, plain = sorted(rounds)[ROUNDS // 2]
    figures = f"{drafted:.0f} tokens a second, {plain:.0f} without drafts: {ratio:.2f} times as fast"
    if ratio >= ENOUGH:
        return Promise(name, "holds", figures)
    return Promise(name, "unclear", f"{figures}; a busy machine, or a text too short to tell: try foredraft tune")


def device(llm: LLM) -> Promise:
    kind = llm.model.device.type
    if kind == "cpu":
        return Promise("device", "holds", "the tests run on CPUs")
    return Promise("device", "unclear", f"{kind} is not what the tests usually run on; see docs/gpu.md")


def _differing(llm: LLM, prompt: list[int], params: SamplingParams) -> str:
    """What gives another text than plain decoding alone does; empty where nothing does."""
    truth = _decode(llm, prompt, params, 0).token_ids
    found = [name for name, texts in _ways(llm, prompt, params) if any(text != truth for text in texts)]
    return ", ".join(found)


def _ways(llm: LLM, prompt: list[int], params: SamplingParams) -> Iterator[tuple[str, list[list[int]]]]:
    """Every way to decode the same text."""
    for length in (None, *LENGTHS):
        if length is None or length <= llm.model.row_invariance.max_draft_tokens:
            name = "drafting" if length is None else f"drafting {length}"
            yield name, [_decode(llm, prompt, params, length).token_ids]
    others = [prompt[:-1] or prompt, prompt]
    results = llm.generate([prompt, *others], params)
    yield "a batch of three", [results[0].token_ids, results[2].token_ids]


def _decode(llm: LLM, prompt: list[int], params: SamplingParams, length: int | None) -> GenerationResult:
    return llm.generate(prompt, params, num_draft_tokens=length)


def _prompt(llm: LLM) -> list[int]:
    """A sentence, or random tokens where the model has no words for it."""
    try:
        return llm.encode(PROMPT)
    except RequestError:
        source = random.Random(0)
        return [source.randrange(llm.model.vocab_size) for _ in range(16)]


def _size(params: SamplingParams) -> str:
    return f"{params.max_new_tokens} tokens"
