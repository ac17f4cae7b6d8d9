"""Progress bars that libraries draw unasked."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging


class _Quiet:
    """How many threads want none at the moment, and what the user had before the first of them."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.wanted = 0
        self.before = True

    def enter(self) -> None:
        with self.lock:
            if not self.wanted:
                self.before, logging._tqdm_active = logging._tqdm_active, False
            self.wanted += 1

    def leave(self) -> None:
        with self.lock:
            self.wanted -= 1
            if not self.wanted:
                logging._tqdm_active = self.before


_quiet = _Quiet()


@contextmanager
def no_loading_bars() -> Iterator[None]:
    """transformers draws none ("Loading weights") within; then all is as the user had it.

    Its own `disable_progress_bar` would take away those of downloads, which may last for minutes.
    """
    _quiet.enter()
    try:
        yield
    finally:
        _quiet.leave()
