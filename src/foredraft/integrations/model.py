"""SpeculativeModel: a model with transformers' `generate`, which our engine runs.

transformers' own `generate` prepares every call (configurations, masks, processors, criteria, validation) and hands
over where its loop over tokens would begin.
"""

import threading
from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, cast

import torch
from transformers import GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel

from foredraft.drafters.base import Drafter
from foredraft.engine import Engine
from foredraft.errors import RequestError
from foredraft.integrations.decoding import Benchmarks, Call, decode
from foredraft.integrations.drafting import Drafting
from foredraft.integrations.recipe import Recipe
from foredraft.integrations.refusals import check_call, check_prepared, check_processors
from foredraft.models.base import NO_SKIP, SkipSet
from foredraft.models.invariance import check_exact
from foredraft.models.load import is_on
from foredraft.policy import DraftPolicy, make_policy
from foredraft.runner import Runner
from foredraft.stats import SpecStats
from foredraft.types import VerifierName
from foredraft.upstream.generation import Prepared, PreparedCalls
from foredraft.upstream.modules import parse_to


class SpeculativeModel(PreparedCalls):
    """A model with transformers' `generate`, decoded speculatively: the same tokens, sooner.

    After a call its statistics are here under IPEX-LLM's names (see `Benchmarks`), and `stats` has ours of all calls.
    """

    config: PreTrainedConfig
    generation_config: GenerationConfig
    first_token_time: float
    generate_time: list[float]
    draft_time: list[float]
    verify_time: list[float]
    draft_num: list[int]
    accept_num: list[int]
    n_drafted: int
    n_matched: int
    n_token_generated: int
    e2e_time_without_first: float
    th_stop_draft: float | None = None  # where the last call's confidence threshold ended, if it had one

    def __init__(self, recipe: Recipe) -> None:
        self._lock = threading.Lock()
        self._busy: int | None = None  # the thread that generates
        self._seed: int | None = None  # of the call that runs, as is
        self._verifier: VerifierName = "coupled"
        self._build(recipe)
        original = recipe.source if isinstance(recipe.source, PreTrainedModel) else None
        target = self.engine.target
        self.config = original.config if original else target.config
        config = original.generation_config if original else target.generation_config
        self.generation_config = config or GenerationConfig()
        self.clear_benchmarks()

    def _build(self, recipe: Recipe) -> None:
        target = recipe.target()
        check_exact(target)
        target.cache.max_slots = recipe.max_batch_size
        self.recipe = recipe
        self._drafters: dict[Any, Drafter] = {}  # those that calls have asked for, by what was asked for
        self._policies: dict[Any, DraftPolicy] = {}
        self.engine = Engine(
            target,
            recipe.own_drafter(target),
            make_policy(recipe.policy),
            max_batch_size=recipe.max_batch_size,
            max_model_len=target.max_positions,
        )
        self.runner = Runner(self.engine)

    # --- what a transformers model offers besides ---------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return self.engine.target.device

    @property
    def dtype(self) -> torch.dtype:
        return self.engine.target.dtype

    @property
    def stats(self) -> SpecStats:
        """Counters of all calls."""
        return self.engine.stats

    @property
    def exact(self) -> bool:
        """Whether drafting is known to change no token here: what was found of the target when it was loaded."""
        return self.engine.target.row_invariance.exact

    @property
    def name_or_path(self) -> str:
        source = self.recipe.source
        return str(source.name_or_path if isinstance(source, PreTrainedModel) else source)

    def can_generate(self) -> bool:
        return True

    def eval(self) -> "SpeculativeModel":
        return self

    def to(self, *args: Any, **kwargs: Any) -> "SpeculativeModel":
        """Move to another device or dtype, by loading the checkpoint again.

        Raises:
            RequestError: this model was made from an object in memory; move that first.
        """
        device, dtype = parse_to(*args, **kwargs)
        device = self.device if device is None else device
        dtype = self.dtype if dtype is None else dtype
        if is_on(self.device, device) and dtype == self.dtype:
            return self
        recipe = self.recipe
        if isinstance(recipe.source, PreTrainedModel) or not isinstance(recipe.draft, (str, Path, type(None))):
            raise RequestError(
                f"to({device}, {dtype}): this model or its drafter was made from an object in memory, on {self.device} "
                f"in {self.dtype}; move the object first, and make this one from it"
            )
        name = str(dtype).removeprefix("torch.")
        options = replace(recipe.options, device=str(device), dtype=name, device_map=None)
        self._build(replace(recipe, options=options))
        return self

    def cpu(self) -> "SpeculativeModel":
        return self.to("cpu")

    def cuda(self, device: int = 0) -> "SpeculativeModel":
        return self.to(f"cuda:{device}")

    def half(self) -> "SpeculativeModel":
        return self.to(torch.float16)

    def bfloat16(self) -> "SpeculativeModel":
        return self.to(torch.bfloat16)

    def float(self) -> "SpeculativeModel":
        return self.to(torch.float32)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The model's own forward where it was accelerated in memory.

        Raises:
            RequestError: the model was loaded by foredraft, which keeps nothing but packed weights.
        """
        if not isinstance(self.recipe.source, PreTrainedModel):
            raise RequestError(
                "forward() is not there: this model keeps packed weights for generate() alone; load it with "
                "transformers and use foredraft.accelerate(model), whose forward is the model's own"
            )
        given = dict(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        return self.recipe.source(**{name: value for name, value in given.items() if value is not None})

    __call__ = forward

    def __getattr__(self, name: str) -> Any:
        """Whatever else the accelerated model has."""
        recipe = self.__dict__.get("recipe")
        if recipe is not None and isinstance(recipe.source, PreTrainedModel) and not name.startswith("_"):
            return getattr(recipe.source, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}; it offers generate()")

    # --- generate ---------------------------------------------------------------------------------------------------

    def generate(
        self,
        inputs: Any = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        prefix_allowed_tokens_fn: Any = None,
        *,
        seed: int | None = None,
        verifier: VerifierName = "coupled",
        **kwargs: Any,
    ) -> Any:
        """As transformers' `generate`: ids [B, L + new], prompts included.

        Args:
            inputs: ids [B, L]; also as `input_ids`.
            generation_config: the base of this call's configuration; keywords come before it.
            logits_processor, stopping_criteria, prefix_allowed_tokens_fn: called for one row at a time.
            seed: of row 0; row i has seed + i. None takes it from torch's generator, so that `set_seed` holds.
            verifier: "coupled": the same tokens with and without drafting; "rejection": the same distribution.
            kwargs: `num_draft_tokens` (0 decodes plainly), and the options of transformers and IPEX-LLM.

        Raises:
            RequestError: an option cannot be honoured, or its value is not usable (a ValueError, as in transformers).
        """
        check_call(kwargs, generation_config, self.generation_config)
        drafting = Drafting.take(kwargs, generation_config, self.generation_config)
        if seed is not None and not (isinstance(seed, int) and 0 <= seed < 2**63):
            raise RequestError(f"seed={seed!r} is not usable; it must be in [0, 2**63)")
        if self._busy == threading.get_ident():
            raise RequestError("generate() was called from within generate(); call it from outside, or another model")
        with self._lock:
            self._busy, self._seed, self._verifier = threading.get_ident(), seed, verifier
            try:
                with self.engine.using(policy=self._policy(drafting), drafter=self._drafter(drafting)):
                    return cast(Any, GenerationMixin.generate)(
                        self,
                        inputs,
                        generation_config,
                        logits_processor,
                        stopping_criteria,
                        prefix_allowed_tokens_fn,
                        **kwargs,
                    )
            finally:
                self._busy = None

    def decode_prepared(self, call: Prepared) -> torch.Tensor:
        """Where transformers' loop over tokens would begin."""
        check_prepared(call.inputs)
        check_processors(call.processors)
        mask = call.inputs.get("attention_mask")
        seed = self._seed
        if seed is None:
            seed = int(torch.randint(2**62, ())) if call.do_sample else 0
        rows = Call(
            call.input_ids,
            torch.ones_like(call.input_ids) if mask is None else mask,
            call.processors,
            call.criteria,
            call.do_sample,
            call.pad_token_id,
            seed,
            self._verifier,
            call.streamer,
        )
        ids, benchmarks = decode(self.runner, rows)
        self._publish(benchmarks)
        self.th_stop_draft = getattr(self.engine.policy.policy, "threshold", None)
        return ids

    def _policy(self, drafting: Drafting) -> DraftPolicy | None:
        """The policy that this call asks for, if any; one that learns on is kept for the next call that asks for it."""
        policy = drafting.policy(self.engine.target.row_invariance.max_draft_tokens)
        if policy is None or not drafting.learns_on:
            return policy
        return self._policies.setdefault(drafting.options, policy)

    def _drafter(self, drafting: Drafting) -> Drafter | None:
        """The drafter that this call asks for, if any; made once, and kept for the next one that asks."""
        if drafting.lookup:
            return self._kept(("ngram", drafting.drafter().min_match), drafting.drafter)
        if drafting.assistant is None:
            return None
        spec = _draft_source(drafting.assistant)
        return self._kept(spec, lambda: self.recipe.drafter(spec, self.engine.target))

    def set_skip_layers(self, attn_skip_layer_ids: Iterable[int], mlp_skip_layer_ids: Iterable[int]) -> None:
        """From here on draft with this model less these layers' attention and MLP (Draft & Verify's name).

        Raises:
            ModelError: the model has no such layer, or nothing would be left.
        """
        skip = SkipSet(tuple(attn_skip_layer_ids), tuple(mlp_skip_layer_ids))
        recipe = replace(self.recipe, skip=skip)
        self.engine.use(recipe.own_drafter(self.engine.target))
        self.recipe = recipe

    def get_skip_layers(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The layers whose attention, and those whose MLP, the draft goes without."""
        skip = getattr(self.engine.drafter, "skip", NO_SKIP)
        return skip.attention, skip.mlp

    def _kept(self, key: Any, make: Callable[[], Drafter]) -> Drafter:
        if key not in self._drafters:
            self._drafters[key] = make()
        return self._drafters[key]

    def clear_benchmarks(self) -> None:
        """Forget the figures of the last call."""
        self._publish(Benchmarks())

    def _publish(self, benchmarks: Benchmarks) -> None:
        for spec in fields(benchmarks):
            setattr(self, spec.name, getattr(benchmarks, spec.name))


def _draft_source(assistant: Any) -> Any:
    """What a drafter is made from. For a model of ours: what that was made from, as its cache cannot be shared."""
    return assistant.recipe.source if isinstance(assistant, SpeculativeModel) else assistant
