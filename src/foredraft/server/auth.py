"""API keys: from a file or fixed ones, compared in constant time, revocable while the server runs.

A key file has a line for each key: `KEY`, `NAME KEY` or `NAME KEY use`. A key with `use` generates and reads; any other
may launch and delete models too. Lines with # are comments. A line taken out of the file ends its key at once.
"""

import hashlib
import hmac
from dataclasses import dataclass, field
from pathlib import Path

from foredraft.errors import RequestError
from foredraft.server.errors import ApiError

LEAST = 16  # characters of a key


@dataclass(frozen=True, slots=True)
class Key:
    name: str
    digest: bytes
    admin: bool = True


ANYBODY = Key("anybody", b"")


def parse_keys(lines: list[str], source: str) -> tuple[Key, ...]:
    """Raises RequestError with the line that is none; never with the key."""
    keys = []
    for number, line in enumerate(lines, 1):
        words = line.split("#")[0].split()
        if not words:
            continue
        name, secret = (f"key{number}", words[0]) if len(words) == 1 else (words[0], words[1])
        rights = words[2] if len(words) == 3 else "admin"
        if len(words) > 3 or rights not in ("admin", "use") or len(secret) < LEAST:
            wanted = f"`KEY`, `NAME KEY` or `NAME KEY use`, each key of {LEAST} characters or more"
            raise RequestError(f"{source}, line {number} is no key; write {wanted}")
        keys.append(Key(name, _digest(secret), rights == "admin"))
    return tuple(keys)


@dataclass(slots=True)
class Keys:
    """Who may do what. Without a file and without fixed keys everybody may do everything."""

    fixed: tuple[Key, ...] = ()
    file: Path | None = None
    _from_file: tuple[Key, ...] = ()
    _stamp: tuple[int, int, int] | None = field(default=None)

    def __post_init__(self) -> None:
        if self.file is not None:
            self._read()
            if not self._from_file:
                raise RequestError(f"{self.file} has no keys; write one on a line, or leave the option out")

    @property
    def asked(self) -> bool:
        return self.file is not None or bool(self.fixed)

    def check(self, authorization: str | None) -> Key:
        """The key of a request. Raises ApiError 401."""
        if not self.asked:
            return ANYBODY
        scheme, _, secret = (authorization or "").partition(" ")
        digest = _digest(secret.strip())
        found = None
        for key in self._current():  # all of them, so that time tells nothing
            if hmac.compare_digest(key.digest, digest):
                found = key
        if found is None or scheme.lower() != "bearer":
            message = "no API key, or a wrong one; send it as 'Authorization: Bearer KEY'"
            raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        return found

    def _current(self) -> tuple[Key, ...]:
        if self.file is not None:
            try:
                if self._stamp != _stamp(self.file):
                    self._read()
            except (OSError, RequestError):  # a file that is gone or spoilt lets nobody in
                self._from_file, self._stamp = (), None
        return (*self.fixed, *self._from_file)

    def _read(self) -> None:
        assert self.file is not None
        try:
            stamp = _stamp(self.file)
            lines = self.file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise RequestError(f"the key file {self.file} cannot be read: {error}") from None
        self._from_file, self._stamp = parse_keys(lines, str(self.file)), stamp


def require_admin(key: Key) -> None:
    """Raises ApiError 403."""
    if not key.admin:
        raise ApiError(403, f"key {key.name!r} may use models, not launch or delete them", code="not_allowed")


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()


def _stamp(file: Path) -> tuple[int, int, int]:
    status = file.stat()
    return status.st_mtime_ns, status.st_size, status.st_ino
