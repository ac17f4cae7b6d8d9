"""What earlier requests said, for drafts of later ones: texts by name, bounded, kept on disk if one likes.

A request sees and adds to the texts of one name. The oldest go first. One lock guards everything, so that engines on
several threads may share a memory.
"""

import hashlib
import json
import os
import sys
import tempfile
import threading
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from foredraft.drafters.occurrences import KEY_BYTES, NOTHING, TOKEN_BYTES, Guess, SuffixRule, Texts
from foredraft.errors import ModelError, RequestError, VocabularyMismatchError

FORMAT = "foredraft suffix memory 1"
WORST = TOKEN_BYTES + 2 * KEY_BYTES  # bytes that a token takes at most


class SuffixMemory:
    """Outputs of earlier requests, by name; drafters of several engines may share one.

    Args:
        vocab_size: of the target; a file of another vocabulary is refused.
        max_requests: outputs kept under each name.
        max_bytes: of all of them together; beyond it the oldest of the name that was used least recently go.

    Raises:
        RequestError: a bound is not positive.
    """

    def __init__(self, vocab_size: int, *, max_requests: int = 10_000, max_bytes: int = 64 * 2**20) -> None:
        for name, value in (("max_requests", max_requests), ("max_bytes", max_bytes)):
            if value < 1:
                raise RequestError(f"{name}={value!r} is not usable; it must be 1 or more, or use no memory at all")
        self.vocab_size, self.max_requests, self.max_bytes = vocab_size, max_requests, max_bytes
        self._texts: OrderedDict[str, Texts] = OrderedDict()  # the least recently used first
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        with self._lock:
            return self._nbytes()

    def _nbytes(self) -> int:
        return sum(texts.nbytes for texts in self._texts.values())

    def __len__(self) -> int:
        """Outputs that are kept."""
        with self._lock:
            return sum(len(texts.ended) for texts in self._texts.values())

    def add(self, tokens: Sequence[int], name: str = "") -> None:
        """Keep an output; of one that does not fit, its end."""
        kept = tokens[-max(1, self.max_bytes // WORST) :]
        with self._lock:
            texts = self._texts.setdefault(name, Texts())
            self._texts.move_to_end(name)
            texts.extend(kept)
            texts.end()
            self._trim(texts)

    def guess(self, tail: Sequence[int], limit: int, rule: SuffixRule, name: str = "") -> Guess:
        """The best draft after a text that ends with `tail`, from what is kept under this name."""
        with self._lock:
            texts = self._texts.get(name)
            if texts is None:
                return NOTHING
            self._texts.move_to_end(name)
            return texts.guess(tail, limit, rule)

    def clear(self, name: str | None = None) -> None:
        """Forget what is kept under a name; None: everything."""
        with self._lock:
            if name is None:
                self._texts.clear()
            else:
                self._texts.pop(name, None)

    def _trim(self, texts: Texts) -> None:
        while len(texts.ended) > self.max_requests:
            texts.drop_oldest()
        while self._nbytes() > self.max_bytes:
            name, oldest = next(iter(self._texts.items()))
            oldest.drop_oldest()
            if not oldest.ended:
                del self._texts[name]

    # --- on disk ----------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Write everything that is kept; whole or not at all."""
        path = Path(path).expanduser()
        with self._lock:
            outputs = [(name, output) for name, texts in self._texts.items() for output in _outputs(texts)]
        tokens = array("i", (token for _, output in outputs for token in output))
        data = _little_endian(tokens)
        header: dict[str, Any] = {
            "format": FORMAT,
            "vocab_size": self.vocab_size,
            "outputs": [[name, len(output)] for name, output in outputs],
            "sha256": hashlib.sha256(data).hexdigest(),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".partial")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(json.dumps(header).encode() + b"\n" + data)
            os.replace(partial, path)
        except BaseException:
            os.unlink(partial)
            raise
        return path

    def load(self, path: str | Path) -> None:
        """Add what a file keeps, in the order in which it was said; what is known already stays.

        Raises:
            ModelError: the file is missing, damaged, or no memory.
            VocabularyMismatchError: it is of another vocabulary.
        """
        path = Path(path).expanduser()
        header, tokens = _read(path)
        if header["vocab_size"] != self.vocab_size:
            raise VocabularyMismatchError(
                f"{path} keeps texts of a vocabulary of {header['vocab_size']} tokens, and this model has "
                f"{self.vocab_size}; use a memory of this model"
            )
        if len(tokens) and not (0 <= min(tokens) and max(tokens) < self.vocab_size):
            raise ModelError(f"{path} is no suffix memory: it has tokens outside its vocabulary; delete it")
        start = 0
        for name, length in header["outputs"]:
            self.add(tokens[start : start + length], name)
            start += length


def _outputs(texts: Texts) -> Iterator["array[int]"]:
    start = texts.begins - texts.base
    for length in texts.ended:
        yield texts.tokens[start : start + length - 1]
        start += length


def _little_endian(tokens: "array[int]") -> bytes:
    if sys.byteorder == "big":
        tokens = tokens[:]
        tokens.byteswap()
    return tokens.tobytes()


def _read(path: Path) -> tuple[dict[str, Any], "array[int]"]:
    """Header and tokens. Raises ModelError where the file is not what `save` wrote."""
    try:
        line, _, data = path.read_bytes().partition(b"\n")
    except OSError as error:
        raise ModelError(f"no suffix memory at {path} ({error.strerror}); save one first") from error
    try:
        header = json.loads(line)
        known = header["format"] == FORMAT
        whole = known and hashlib.sha256(data).hexdigest() == header["sha256"]
        lengths = sum(length for _, length in header["outputs"]) if whole else 0
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path} is no suffix memory ({type(error).__name__}: {error}); delete it") from error
    if not known:
        raise ModelError(f"{path} has format {header['format']!r}, and {FORMAT!r} is known here; delete it")
    if not whole or lengths * 4 != len(data):
        raise ModelError(f"{path} is damaged: its tokens are not those that were saved; delete it")
    tokens = array("i", data)
    if sys.byteorder == "big":
        tokens.byteswap()
    return header, tokens
