"""From a name, a folder or a model in memory to a CausalModel, in the runtime that suits it.

Owns the choice of the runtime, and the errors of models that none can serve.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from transformers import PreTrainedModel

from foredraft.errors import ForedraftError, ModelError, RequestError, UnsupportedModelError
from foredraft.models import native
from foredraft.models.base import CausalModel
from foredraft.models.decoder import Decoder
from foredraft.models.family import oddity, supports
from foredraft.models.hf import HFModel
from foredraft.models.invariance import confirm, probe
from foredraft.models.options import LoadOptions, parse_dtype
from foredraft.models.pretrained import load_checkpoint, low_bit_dtype
from foredraft.models.support import ADVICE, check_supported
from foredraft.native import library
from foredraft.upstream.modules import is_prompt_tuned, left_behind, sharing_weights, unwrapped
from foredraft.versions import suspected
from foredraft.weights.checkpoint import first_line
from foredraft.weights.choice import quantise
from foredraft.weights.stored import start

__all__ = ["LoadOptions", "load_model", "load_target", "model_or_name", "probed", "wrap"]


def model_or_name(source: object) -> str | Path | PreTrainedModel:
    """What can be loaded: a name, a folder, or the transformers model inside what torch.compile or PEFT made of it.

    Raises:
        RequestError: it is nothing of the kind.
        UnsupportedModelError: a PEFT model that is more than its modules.
    """
    source = unwrapped(source)
    if is_prompt_tuned(source):
        raise UnsupportedModelError(
            "this PEFT model cannot serve: it puts virtual tokens before the text (prompt or prefix tuning); decode it "
            "with transformers' generate()"
        )
    if not isinstance(source, str | Path | PreTrainedModel):
        raise RequestError(f"{type(source).__name__} is no model; give a folder, a hub name or a transformers model")
    return source


def load_target(source: str | Path | PreTrainedModel, options: LoadOptions) -> CausalModel:
    """A model fit to verify: loaded, packed, and probed for row invariance.

    Raises:
        ModelError: the checkpoint is missing, damaged, or no causal language model.
        UnsupportedModelError: its state cannot be rewound.
    """
    return probed(load_model(source, options))


def probed(model: CausalModel) -> CausalModel:
    """The model, told from which shapes on its rows are exact; a native one is exact by construction, and says so."""
    if isinstance(model, native.NativeModel):
        confirm(model)
        return model
    with _as_cause(model):
        model.row_invariance = probe(model)
    model.cache.key_multiple = model.row_invariance.key_multiple
    return model


def load_model(source: str | Path | PreTrainedModel, options: LoadOptions) -> CausalModel:
    """A model in the runtime that suits it: native, the lean decoder, or the adapter. Raises as `load_target`."""
    if isinstance(source, PreTrainedModel):
        if options.weight_format is not None:
            source = _copy(source)
            quantise(source, options.weight_format, low_bit_dtype(parse_dtype(options.dtype) or source.dtype))
        return wrap(source, runtime=options.runtime)
    return wrap(load_checkpoint(source, options), consume=True, runtime=options.runtime)


@suspected()
def wrap(model: PreTrainedModel, *, consume: bool = False, runtime: str = "auto") -> CausalModel:
    """A transformers model in our runtime. It stays as it is, unless it is ours to `consume`: then its own weights go
    as soon as ours are packed.

    Raises:
        ModelError: `runtime` is "native", and that cannot serve this model here.
    """
    with _as_cause(model):
        check_supported(model)
        if runtime != "torch" and _can_run_natively(model, needed=runtime == "native"):
            return native.NativeModel(model, library.load(), consume=consume)
        model = (model if consume else _copy(model)).eval()
        if supports(model) and not oddity(model):
            return Decoder(model, consume=consume)
        start(model)
        return HFModel(model)


def _can_run_natively(model: PreTrainedModel, *, needed: bool) -> bool:
    """Raises ModelError where it is needed and cannot."""
    reason = native.why_not(model)
    missing = "" if reason else library.why_not()
    if needed and (reason or missing):
        raise ModelError(f"runtime='native' cannot serve this model: {reason or missing}; use runtime='torch'")
    if missing:
        _say_once(missing)
    return not (reason or missing)


@cache
def _say_once(missing: str) -> None:
    logging.getLogger("foredraft").warning("models run on torch, several times slower: %s", missing)


def _copy(model: PreTrainedModel) -> PreTrainedModel:
    """Raises UnsupportedModelError where a copy would compute with the original's modules."""
    other = sharing_weights(model)
    name = left_behind(other)
    if name is not None:
        whose = f"{name}.forward" if name else "forward"
        raise UnsupportedModelError(
            f"this {model.config.model_type!r} cannot serve: its {whose} was replaced on the object by a function, "
            f"which stays bound to that object; take it away (del model.{whose}), or give the model's folder"
        )
    return other


@contextmanager
def _as_cause(model: PreTrainedModel | CausalModel) -> Iterator[None]:
    """An error within a model's own code becomes the reason why it cannot serve."""
    try:
        yield
    except ForedraftError:
        raise
    except Exception as error:  # anything: it is their code, perhaps not even transformers'
        raise UnsupportedModelError(
            f"{model.config.model_type!r} cannot serve: its own code fails over our cache ({type(error).__name__}: "
            f"{first_line(error)}); {ADVICE}"
        ) from error
