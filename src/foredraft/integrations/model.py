"""SpeculativeModel: a model with transformers' `generate`, which our engine runs.

transformers' own `generate` prepares every call (configurations, masks, processors, criteria, validation) and hands
over where its loop over tokens would begin.
"""

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any, cast

import torch
from transformers import GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel

from foredraft.engine import Engine
from foredraft.errors import RequestError
from foredraft.integrations.choices import Choices
from foredraft.integrations.decoding import decode
from foredraft.integrations.drafting import Drafting
from foredraft.integrations.output import Benchmarks
from foredraft.integrations.recipe import Recipe
from foredraft.integrations.refusals import check_call, check_prepared, check_processors
from foredraft.integrations.rows import Call
from foredraft.models.base import NO_SKIP, SkipSet
from foredraft.models.invariance import check_exact
from foredraft.models.options import is_on
from foredraft.policy import make_policy
from foredraft.runner import Runner
from foredraft.stats import SpecStats
from foredraft.types import SamplingParams, VerifierName
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
        self.engine = Engine(
            target,
            recipe.own_drafter(target),
            make_policy(recipe.policy),
            max_batch_size=recipe.max_batch_size,
            max_model_len=target.max_positions,
        )
        self.runner = Runner(self.engine)
        self._choices = Choices(recipe, target)

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
        self._build(self.recipe.moved(device, dtype))
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
        SamplingParams(seed=seed, verifier=verifier)  # which checks them
        hooks = (logits_processor, stopping_criteria, prefix_allowed_tokens_fn)
        with self._alone(seed, verifier), self._choices.applied(self.engine, drafting):
            return cast(Any, GenerationMixin.generate)(self, inputs, generation_config, *hooks, **kwargs)

    @contextmanager
    def _alone(self, seed: int | None, verifier: VerifierName) -> Iterator[None]:
        """One call at a time; what `decode_prepared` needs of it is kept meanwhile."""
        if self._busy == threading.get_ident():
            raise RequestError("generate() was called from within generate(); call it from outside, or another model")
        with self._lock:
            self._busy, self._seed, self._verifier = threading.get_ident(), seed, verifier
            try:
                yield
            finally:
                self._busy = None

    def decode_prepared(self, call: Prepared) -> torch.Tensor:
        """Where transformers' loop over tokens would begin."""
        check_prepared(call.inputs)
        check_processors(call.processors)
        mask = call.inputs.get("attention_mask")
        seed: Any = self._seed
        if seed is None:
            seed = torch.randint(2**62, ()) if call.do_sample else 0
        rows = Call(
            call.input_ids,
            torch.ones_like(call.input_ids) if mask is None else mask,
            call.processors,
            call.criteria,
            call.do_sample,
            call.pad_token_id,
            int(seed),
            self._verifier,
            call.streamer,
        )
        ids, benchmarks = decode(self.runner, rows)
        self._publish(benchmarks)
        self.th_stop_draft = getattr(self.engine.policy.policy, "threshold", None)
        return ids

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

    def clear_benchmarks(self) -> None:
        """Forget the figures of the last call."""
        self._publish(Benchmarks())

    def _publish(self, benchmarks: Benchmarks) -> None:
        for spec in fields(benchmarks):
            setattr(self, spec.name, getattr(benchmarks, spec.name))
