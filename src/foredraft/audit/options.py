"""What an audit covers: how many prompts, which draft lengths, batches and orders, how many samples."""

from dataclasses import dataclass, field

from foredraft.errors import RequestError
from foredraft.types import SamplingParams

ORDERS = ("together", "staggered", "leaving")


@dataclass(frozen=True, slots=True)
class AuditOptions:
    """Raises RequestError for values out of range."""

    lengths: tuple[int | None, ...] = (1, 2, 4, 8, 16, 40, None)  # drafted each step; None: as the policy decides
    batches: tuple[int, ...] = (1, 3, 8)
    orders: tuple[str, ...] = ORDERS
    prompts: int = 8
    tokens: int = 64  # of each output, at most
    samples: int = 4000  # of each distribution
    alarm: float = 1e-3  # how often a sound installation fails the distribution tests, all of them together
    seed: int = 0
    own: tuple[SamplingParams, ...] = field(default=())  # settings of the user's, beside those that every audit has

    @classmethod
    def quick(cls, seed: int = 0, own: tuple[SamplingParams, ...] = ()) -> "AuditOptions":
        """Most of what goes wrong shows in about a minute with a small model."""
        return cls(
            lengths=(5, None),
            batches=(1, 4),
            orders=("leaving",),
            prompts=3,
            tokens=16,
            samples=500,
            seed=seed,
            own=own,
        )

    @property
    def whole(self) -> bool:
        """Whether every prompt is asked in every setting; else some take turns."""
        return self.prompts >= 6

    def __post_init__(self) -> None:
        for name, least in (("prompts", 2), ("tokens", 8), ("samples", 500), ("seed", 0)):
            if getattr(self, name) < least:
                raise RequestError(f"{name}={getattr(self, name)} is not usable; it must be {least} or more")
        if not 0 < self.alarm < 1:
            raise RequestError(f"alarm={self.alarm} is not usable; it must be between 0 and 1")
        if not self.lengths or any(length is not None and length < 1 for length in self.lengths):
            raise RequestError(f"lengths={self.lengths} is not usable; each must be 1 or more, or None for the policy")
        if not self.batches or min(self.batches) < 1:
            raise RequestError(f"batches={self.batches} is not usable; each must be 1 or more")
        unknown = [order for order in self.orders if order not in ORDERS]
        if unknown or not self.orders:
            raise RequestError(f"orders={self.orders} is not usable; choose from {', '.join(ORDERS)}")
        distributional = [own for own in self.own if own.verifier == "rejection" and not own.greedy]
        if distributional:
            raise RequestError(
                "verifier='rejection' keeps a distribution and not a text, so an audit cannot compare texts under it; "
                "every audit tests its distribution, leave it out"
            )
