"""The requests of an audit: ragged prompts, settings that differ, and when each request comes and goes."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from random import Random

import torch
from transformers import LogitsProcessor

from foredraft.audit.options import AuditOptions
from foredraft.audit.recorded import Drafted
from foredraft.errors import ForedraftError
from foredraft.llm import LLM
from foredraft.results import Job
from foredraft.steering import Stateful
from foredraft.structured import Structured
from foredraft.types import SamplingParams

BLOCK = 5  # tokens of a step in which a control's draft is right, the target's own included
DERIVED = 50_000  # what seeds of requests begin at that are made of others' outputs
LENGTHS = (3, 17, 40, 130, 250, 257, 300, 420)  # of prompts, in tokens; those behind 256 cross a chunk's border
LONG = (507, 1100)  # of more, in a few settings only: whose output crosses position 512, and far behind it
SEEDS = (0, 2**33, 2**62)  # that seeds begin at, by turns: users' own have 63 bits
FAR = "long prompt"  # how the names of these settings end
TEXTS = (
    "User: I need a table for two in Oakland tonight.\nAssistant:",
    "def mean(values):\n    total = 0\n    for value in values:\n        total += value\n    return total",
    "Once upon a time there was a little fox. The fox lived in the forest with its mother, and the fox liked to play.",
    "The first item is red, the second item is blue, the third item is green, the fourth item is",
)


class EveryOther(LogitsProcessor):
    """A processor that looks at its prefix: after an even number of tokens only odd ids, and the other way round."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        scores[:, input_ids.shape[1] % 2 :: 2] = -torch.inf
        return scores


class Counting(LogitsProcessor):
    """A processor with a state: it counts its calls, and bans other ids in each."""

    def __init__(self, calls: int = 0) -> None:
        self.calls = calls

    def copy(self) -> "Counting":
        return Counting(self.calls)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        scores[:, self.calls % 3 :: 3] = -torch.inf
        self.calls += 1
        return scores


class Leaning(LogitsProcessor):
    """A processor that looks at its prefix and forbids nothing, so that a grammar always leaves a token."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        scores[:, input_ids.shape[1] % 2 :: 2] += 2.0
        return scores


class Descending(LogitsProcessor):
    """A processor that leaves no two tokens alike, so that one is the likeliest."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores - 1e-5 * torch.arange(scores.shape[1], device=scores.device)


# each with log-probabilities: what a bug writes into the logits of a pass may change no token of this request
SETTINGS: dict[str, SamplingParams] = {
    "greedy": SamplingParams(logprobs=2),
    "sampled": SamplingParams(temperature=0.8, top_p=0.95, logprobs=2),
    "sampled, filters": SamplingParams(temperature=2.0, top_k=12, min_p=0.05, logprobs=2),
    "greedy, penalties": SamplingParams(
        repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.3, logprobs=2
    ),
    "sampled, processor": SamplingParams(temperature=0.7, top_k=40, processors=(EveryOther(),), logprobs=2),
    "sampled, min_p, state": SamplingParams(temperature=1.5, min_p=0.2, processors=(Stateful(Counting),), logprobs=2),
}
# under rejection sampling, where filters leave but one token and drafts therefore change no text
DECIDED: dict[str, SamplingParams] = {
    "rejection, top_k": SamplingParams(
        verifier="rejection", temperature=1.0, top_k=1, repetition_penalty=1.2, processors=(Descending(),), logprobs=2
    ),
    "rejection, top_p": SamplingParams(
        verifier="rejection", temperature=0.7, top_p=1e-6, frequency_penalty=0.5, processors=(Descending(),), logprobs=2
    ),
    "rejection, min_p": SamplingParams(
        verifier="rejection",
        temperature=1.3,
        min_p=1.0,
        presence_penalty=0.5,
        logit_bias={token: -2.0 for token in range(0, 40, 3)},
        processors=(Descending(),),
        logprobs=2,
    ),
}
FORM = Structured.regex(r"([a-z]{1,8} ){2}(yes|no|perhaps), [0-9]{1,4}")
FORMS: dict[str, SamplingParams] = {  # the library draws under the first two, the last goes through the scores
    "greedy, grammar": SamplingParams(structured=FORM, logprobs=2),
    "sampled, grammar": SamplingParams(temperature=0.8, top_p=0.95, structured=FORM, logprobs=2),
    "sampled, grammar, all": SamplingParams(
        temperature=0.7,
        repetition_penalty=1.1,
        frequency_penalty=0.3,
        logit_bias={2: 1.5, 3: -1.5},
        processors=(Leaning(),),
        structured=FORM,
        logprobs=2,
    ),
}


@dataclass(frozen=True, slots=True)
class Ask:
    """One request: what it asks, and when it comes (after so many passes) or goes (after so many tokens)."""

    prompt: tuple[int, ...]
    params: SamplingParams  # with a seed, which no two requests of an audit share
    setting: str = ""
    num_draft_tokens: int | None = 0
    arrives: int = 0
    leaves: int | None = None
    memory: str | None = ""  # with whom it shares what was computed; None: with nobody
    drafts: tuple[Drafted, ...] = ()  # as recorded, to be repeated; none: as the policy decides

    @property
    def seed(self) -> int:
        return self.params.seed or 0

    def alone(self) -> "Ask":
        """The same request without drafts, from beginning to end, with nothing taken over from others."""
        return replace(self, num_draft_tokens=0, arrives=0, leaves=None, memory=None, drafts=())

    def job(self, llm: LLM) -> Job:
        """As the library makes it, with the model's ends of text, stop strings, grammar and the text that is read."""
        job = llm.job(self.prompt, self.params, self.num_draft_tokens)
        job.request.memory = self.memory
        return job


def prompts(llm: LLM, options: AuditOptions) -> list[tuple[int, ...]]:
    """Texts where there is a tokenizer, and random words that repeat, so that lookups find something."""
    room = llm.max_model_len - options.tokens
    if room < 2:
        raise ForedraftError(
            f"a context of {llm.max_model_len} tokens has no room for outputs of {options.tokens}; audit fewer tokens"
        )
    found = [tuple(llm.encode(text)[:room]) for text in TEXTS] if llm._tokenizer is not None else []
    drawn = [_words(length, llm.model.vocab_size, Random(f"{options.seed} {length}")) for length in LENGTHS]
    mixed = [prompt for pair in zip(found, drawn, strict=False) for prompt in pair] + drawn[len(found) :]
    return [prompt[:room] for prompt in mixed[: options.prompts]]


def _words(length: int, vocab: int, source: Random) -> tuple[int, ...]:
    words = [[source.randrange(vocab) for _ in range(source.randint(2, 6))] for _ in range(9)]
    return tuple([token for _ in range(length) for token in source.choice(words)][:length])


OWN = "yours"  # how the names of the user's settings begin


def forms(llm: LLM) -> dict[str, SamplingParams]:
    """Output under a grammar, as far as it can be had here."""
    found = {}
    for name, params in FORMS.items():
        with suppress(ForedraftError):  # no tokenizer, no compiler, a vocabulary that cannot spell it
            llm.job([0], params)
            found[name] = params
    return found


def asks(llm: LLM, options: AuditOptions) -> list[Ask]:
    """Every prompt in every setting and the user's own, each with a seed and a length of its own; then long ones.

    Where there are few prompts, each is asked under one grammar and one kind of rejection sampling, by turns.
    """
    under, decided = [*forms(llm).items()], [*DECIDED.items()]
    own = [(f"{OWN} {i}", params) for i, params in enumerate(options.own, 1)]
    pairs: list[tuple[tuple[int, ...], str, SamplingParams]] = []
    for place, prompt in enumerate(prompts(llm, options)):
        turns = [*under, *decided]
        if not options.whole:
            turns = [kinds[place % len(kinds)] for kinds in (under, decided) if kinds]
        pairs += [(prompt, name, params) for name, params in (*SETTINGS.items(), *turns, *own)]
    for prompt in far(llm, options):
        pairs += [(prompt, f"{name}, {FAR}", SETTINGS[name]) for name in ("greedy", "sampled")[: 1 + options.whole]]
    return [
        Ask(prompt, replace(params, seed=_seed(options, i), max_new_tokens=options.tokens - i % 4), name)
        for i, (prompt, name, params) in enumerate(pairs)
    ]


def _seed(options: AuditOptions, place: int) -> int:
    return options.seed * 100_000 + place + SEEDS[place % len(SEEDS)]


def is_far(ask: Ask) -> bool:
    return ask.setting.endswith(FAR)


def far(llm: LLM, options: AuditOptions) -> list[tuple[int, ...]]:
    """Prompts whose texts end far behind: as many as the context has room for, one where there are few prompts."""
    near, most = LONG
    room = llm.max_model_len - options.tokens
    lengths = [near] * (near <= room) + [min(most, room)] * (options.whole and room >= near + options.tokens)
    return [_words(length, llm.model.vocab_size, Random(f"{options.seed} {length}")) for length in lengths]


def derived(llm: LLM, asks: Sequence[Ask], outputs: Mapping[int, Sequence[int]]) -> list[Ask]:
    """Greedy and sampled requests again, each with a stop token, a stop text or biases that change what it said."""
    kinds: list[tuple[str, Callable[[LLM, Sequence[int], SamplingParams], SamplingParams]]] = [
        ("stop", _stop_token),
        ("stop text", _stop_text),
        ("bias", _biased),
    ]
    found = []
    for first, setting in enumerate(("greedy", "sampled")):
        for place, ask in enumerate(ask for ask in asks if ask.setting == setting and len(outputs[ask.seed]) > 3):
            kind, change = kinds[(first + place) % len(kinds)]
            params = change(llm, outputs[ask.seed], replace(ask.params, seed=DERIVED + ask.seed))
            found.append(replace(ask, params=params, setting=f"{setting}, {kind}"))
    return found


def _stop_token(llm: LLM, output: Sequence[int], params: SamplingParams) -> SamplingParams:
    """Ends in the middle, at a token that the same request has there and not before; within a draft, and not at the end
    of one, where drafts of `BLOCK - 1` tokens are right.
    """
    middle = 2 * len(output) // 3
    places = (i for i in range(middle, 0, -1) if i % BLOCK and output.index(output[i]) == i)
    return replace(params, stop_token_ids=(output[next(places, middle)],))


def _stop_text(llm: LLM, output: Sequence[int], params: SamplingParams) -> SamplingParams:
    """Ends in the middle of what it said, within a token or across two; at a token where there is no text."""
    text = "" if llm._tokenizer is None else str(llm.tokenizer.decode(list(output), skip_special_tokens=True))
    if len(text) < 6:
        return _stop_token(llm, output, params)
    middle = len(text) // 2
    return replace(params, stop=(text[middle : middle + 3],))


def _biased(llm: LLM, output: Sequence[int], params: SamplingParams) -> SamplingParams:
    """What it said is unlikely; its first token is out of the question, and its last is likelier."""
    unlikely: dict[int, float] = dict.fromkeys(output, -4.0)
    return replace(params, logit_bias=unlikely | {output[-1]: 2.0, output[0]: -torch.inf})


def ordered(asks: Sequence[Ask], order: str, length: int | None, seed: int) -> list[Ask]:
    """These requests as one crowd: shuffled, with drafts of this length, and arrivals as the order says."""
    source = Random(f"{seed} {order} {length}")
    crowd = [replace(ask, num_draft_tokens=length) for ask in source.sample(asks, len(asks))]
    if order == "together":
        return crowd
    crowd = [replace(ask, arrives=source.randint(0, 2 * len(crowd))) for ask in crowd]
    if order == "leaving":
        return [replace(ask, leaves=source.randint(1, 12) if i % 4 == 0 else None) for i, ask in enumerate(crowd)]
    return crowd
