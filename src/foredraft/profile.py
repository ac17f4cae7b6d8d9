"""Skip profiles: which sub-layers a model can draft without, and what that gave when it was measured.

A profile is a JSON file that names its model by a hash of a few of its weights, so that it is found again wherever the
checkpoint lies and whatever dtype it runs in. Knows nothing of drafting or of how a set is found.
"""

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from foredraft.errors import ModelError
from foredraft.models.base import CausalModel, SkipSet

FORMAT = 1
BUNDLED = Path(__file__).parent / "bundled" / "profiles"
SAMPLED = 2048  # values of each weight that enter the hash


@dataclass(frozen=True, slots=True)
class ProfileFigures:
    """What a drafter with this set gave: per-position acceptance, draft token over target pass, and their sum."""

    alpha: float
    cost_ratio: float
    num_draft_tokens: int
    speedup: float


@dataclass(frozen=True, slots=True)
class HowFound:
    """The search that led to the set, in words and numbers that repeat it."""

    method: str = "by hand"
    trials: int = 0
    seed: int = 0
    calibration: str = ""


@dataclass(frozen=True, slots=True)
class Profile:
    """Sub-layers to skip in one model. `measured` is keyed by drafter: "skip", "int4+skip"."""

    model_type: str
    model_hash: str
    num_layers: int
    skip: SkipSet
    measured: Mapping[str, ProfileFigures] = field(default_factory=dict)
    found: HowFound = HowFound()

    def check(self, model: CausalModel, *, force: bool = False) -> None:
        """Raises ModelError where it was found for another model (`force`: only if it cannot fit), or does not fit."""
        own = model_hash(model)
        if self.model_hash != own and not force:
            raise ModelError(
                f"the profile was found for another model ({self.model_type}, {self.num_layers} layers, hash "
                f"{self.model_hash}), not for this {model.config.model_type} with hash {own}; run foredraft tune for "
                "this model, or force the profile"
            )
        self.skip.check(model.num_layers)


@torch.inference_mode()
def model_hash(model: CausalModel) -> str:
    """16 hexadecimal digits of the type, the sizes and a sample of the weights; fp32 and bf16 loads agree."""
    text = model.config.get_text_config(decoder=True)
    digest = hashlib.sha256(f"{text.model_type} {model.num_layers} {model.vocab_size}".encode())
    for weight in model.weight_sample():
        values = weight.reshape(-1)
        spread = values[:: max(1, len(values) // SAMPLED)][:SAMPLED].to(torch.bfloat16)
        digest.update(str(tuple(weight.shape)).encode())
        digest.update(spread.cpu().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def profile_for(model: CausalModel, skip: SkipSet, measured: Mapping[str, ProfileFigures], found: HowFound) -> Profile:
    """A profile of this model. Raises ModelError where the set does not fit it."""
    skip.check(model.num_layers)
    return Profile(model.config.model_type, model_hash(model), model.num_layers, skip, measured, found)


def folder() -> Path:
    """Where profiles are kept: $FOREDRAFT_CACHE, or foredraft in the platform's cache folder; then profiles."""
    own = os.environ.get("FOREDRAFT_CACHE")
    return (Path(own).expanduser() if own else _platform_cache() / "foredraft") / "profiles"


def _platform_cache() -> Path:
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def save(profile: Profile, path: Path | None = None) -> Path:
    """Write a profile, by default where `find` looks; whole or not at all."""
    path = path or folder() / f"{profile.model_hash}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".partial")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(json.dumps({"format": FORMAT, **asdict(profile)}, indent=2) + "\n")
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise
    return path


def load(path: str | Path) -> Profile:
    """Read a profile.

    Raises:
        ModelError: the file is missing, or is no profile of a format known here.
    """
    path = Path(path).expanduser()
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"no skip profile at {path} ({error.strerror}); run foredraft tune to make one") from error
    except ValueError as error:
        raise ModelError(f"{path} is no skip profile: it is not JSON ({error}); run foredraft tune again") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        known = data.get("format") if isinstance(data, dict) else None
        raise ModelError(f"{path} has profile format {known!r}, and {FORMAT} is known here; run foredraft tune again")
    try:
        return _profile(data)
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(
            f"{path} is no skip profile ({type(error).__name__}: {error}); run foredraft tune again"
        ) from error


def find(model: CausalModel) -> Profile | None:
    """The profile of this model in the user's cache folder, else among the bundled ones."""
    name = f"{model_hash(model)}.json"
    path = next((own for own in (folder() / name, BUNDLED / name) if own.is_file()), None)
    return None if path is None else load(path)


def _profile(data: dict[str, Any]) -> Profile:
    return Profile(
        str(data["model_type"]),
        str(data["model_hash"]),
        int(data["num_layers"]),
        SkipSet(_layers(data["skip"]["attention"]), _layers(data["skip"]["mlp"])),
        {str(name): ProfileFigures(**values) for name, values in data.get("measured", {}).items()},
        HowFound(**data.get("found", {})),
    )


def _layers(values: list[Any]) -> tuple[int, ...]:
    if not isinstance(values, list) or any(type(value) is not int for value in values):
        raise ValueError(f"layers must be a list of numbers, not {values!r}")
    return tuple(values)
