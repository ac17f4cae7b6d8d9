"""Admission: what the caches of a target and its drafters may take together, and who fits beside those that run.

The one place that limits them. A request comes in once all that it may grow to fits, so that nobody who runs is ever
out of memory; what ended texts left for others that begin alike takes what remains. Knows nothing of slots or steps.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from foredraft.errors import RequestError
from foredraft.memory import memory
from foredraft.models.base import Cache
from foredraft.types import Request, is_whole

SHARE = 0.9  # of the memory that is free once the models are loaded
KEPT = 0.25, 2**30  # for what ended texts leave: a share of that, and the most


@dataclass(frozen=True, slots=True)
class CacheLimits:
    """Bytes of all caches together, and how many of these may hold what ended texts left; 0: texts share nothing."""

    total: int = sys.maxsize
    kept: int = 0

    @classmethod
    def of(cls, cache_bytes: int | None, prefix_cache: bool | int, device: torch.device) -> "CacheLimits":
        """Of what a user says; None: most of what is free, True: a part of that. Raises as `check_limits`."""
        check_limits(cache_bytes, prefix_cache)
        total = int(SHARE * free_memory(device)) if cache_bytes is None else cache_bytes
        share, most = KEPT
        kept = int(min(share * total, most)) if prefix_cache is True else int(prefix_cache)
        return cls(total, min(kept, total))


def check_limits(cache_bytes: int | None, prefix_cache: bool | int) -> None:
    """Raises RequestError where one is no number of bytes."""
    checks = (
        ("cache_bytes", cache_bytes, 1, cache_bytes is None or is_whole(cache_bytes, 1)),
        ("prefix_cache", prefix_cache, 0, isinstance(prefix_cache, bool) or is_whole(prefix_cache, 0)),
    )
    for name, value, least, usable in checks:
        if not usable:
            raise RequestError(f"{name}={value!r} is not usable; it must be a number of bytes, {least} or more")


class Admission:
    """Who fits, by what each request may grow to at most."""

    def __init__(self, limits: CacheLimits, max_model_len: int, caches: Callable[[], list[Cache]]) -> None:
        self.limits = limits
        self.max_model_len = max_model_len
        self.caches = caches  # a function, for drafters change

    def need(self, requests: Sequence[Request]) -> int:
        """Bytes that they may come to hold together."""
        return sum(self._needs(requests))

    def _needs(self, requests: Sequence[Request]) -> list[int]:
        """The same of each cache."""
        lengths = [self._length(request) for request in requests]
        slots = max([request.slot + 1 for request in requests], default=0)  # a newcomer takes the lowest that is free
        return [cache.need(lengths, slots) for cache in self.caches()]

    def _held(self, running: Sequence[Request]) -> int:
        """Bytes that they may come to hold, or that ended texts have left too large."""
        return sum(max(need, cache.nbytes) for need, cache in zip(self._needs(running), self.caches(), strict=True))

    def _length(self, request: Request) -> int:
        return min(request.prompt_len + request.params.max_new_tokens, self.max_model_len)

    def check(self, request: Request) -> None:
        """Raises RequestError where it could never come in."""
        needed = self.need([request])
        if needed > self.limits.total:
            raise RequestError(
                f"this request may come to {self._length(request)} tokens, whose keys and values take "
                f"{needed / 2**20:.1f} MiB, and cache_bytes allows {self.limits.total / 2**20:.1f} MiB; shorten the "
                "prompt, lower max_new_tokens, or raise cache_bytes"
            )

    def fits(self, running: Sequence[Request], request: Request) -> bool:
        """Whether it fits beside those that run; alone it was checked before."""
        return not running or self.need([*running, request]) <= self.limits.total

    def settle(self, running: Sequence[Request]) -> None:
        """Let the caches keep of ended texts what those that run leave room for."""
        caches = self.caches()
        held = self._held(running)
        if held > self.limits.total:
            for cache in caches:
                cache.shrink()
            held = self._held(running)
        room = max(0, min(self.limits.kept, self.limits.total - held))
        a_token = max(1, sum(cache.bytes_per_token for cache in caches))
        for cache in caches:
            cache.sharing = self.limits.kept > 0
            cache.keep(room * cache.bytes_per_token // a_token)


def take_over(cache: Cache, request: Request) -> None:
    """Begin a prompt, or go on with it, from what others have computed of it; its last token is left to compute."""
    stats = request.stats
    if not request.cached and cache.page and cache.sharing and request.memory is not None:
        stats.prefix_queries = request.prompt_len
    held = cache.adopt(request.slot, request.token_ids[:-1], request.memory)
    if held > request.cached:
        stats.prefix_tokens += held - request.cached
        request.cached = held


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = memory()
    return next((it for it in (found.available, found.total) if it is not None), sys.maxsize // 2)
