"""What is asked of a run, checked where it is built."""

import re
from dataclasses import dataclass, field

from foredraft.errors import RequestError
from foredraft.policy import make_policy
from foredraft.types import SamplingParams

POLICY = "policy"  # the arm whose draft lengths the policy decides
DEFAULT_LENGTHS = f"1-10,{POLICY}"
MOST = 64  # tokens of a draft


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """Raises RequestError for values out of range."""

    lengths: tuple[int | None, ...] = (*range(1, 11), None)  # draft lengths; None: as the policy decides
    params: SamplingParams = field(default_factory=lambda: SamplingParams(max_new_tokens=128))
    policy: str | None = None
    rounds: int = 3
    samples: int = 1  # answers to each task, with seeds of their own
    limit: int | None = None  # tasks
    chat: bool | None = None
    run_code: bool = False
    predict: bool = True

    def __post_init__(self) -> None:
        for name in ("rounds", "samples", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RequestError(f"{name}={value} is not usable; it must be 1 or more")
        if self.samples > 1 and self.params.greedy:
            raise RequestError(
                f"samples={self.samples} at temperature 0 are {self.samples} times the same answer; set a temperature"
            )
        make_policy(self.policy)

    @property
    def comparable(self) -> bool:
        """Whether drafting must not change a token: the rejection verifier keeps the distribution instead."""
        return self.params.greedy or self.params.verifier == "coupled"


def read_lengths(text: str) -> tuple[int | None, ...]:
    """Draft lengths as `1-10,policy` says them, in that order, each once; `policy` is None.

    Raises:
        RequestError: a part is neither a length, nor a range, nor `policy`.
    """
    found: list[int | None] = []
    for part in text.split(","):
        word = part.strip()
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", word)
        if word == POLICY:
            found.append(None)
        elif match and 1 <= int(match[1]) <= int(match[2] or match[1]) <= MOST:
            found += range(int(match[1]), int(match[2] or match[1]) + 1)
        else:
            raise RequestError(
                f"--gamma {text!r}: {word!r} is not usable; give draft lengths of 1 to {MOST}, ranges, or {POLICY}, "
                f"with commas between them, such as {DEFAULT_LENGTHS}"
            )
    return tuple(dict.fromkeys(found))
