"""The binding of the C library: where it is, what it takes, and why it is not there. See native.h for the meaning."""

import ctypes
from ctypes import POINTER, Structure, c_bool, c_double, c_float, c_int, c_int32, c_uint64, c_void_p
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from pathlib import Path
from typing import Any

from foredraft.errors import ForedraftError
from foredraft.native.build import NAME

ABI = 6
BLOCK = 32  # outputs that are packed together
PAGE = 64  # tokens of a page of the cache
MOST_DIM = 256  # of a head
ISAS = ("portable", "avx2", "avx512", "avx512_bf16", "amx")  # as the library numbers them


class Format(IntEnum):
    """How weights are stored; inputs of a 32-bit lane are 2**format."""

    F32, BF16, INT8, INT4 = range(4)

    @property
    def inputs_per_lane(self) -> int:
        return 1 << self


class Linear(Structure):
    _fields_ = (
        ("weights", c_void_p),
        ("grid", c_void_p),
        ("bias", c_void_p),
        ("format", c_int32),
        ("outputs", c_int32),
        ("inputs", c_int32),
        ("group", c_int32),
    )


class Layer(Structure):
    _fields_ = (
        ("attention_norm", c_void_p),
        ("mlp_norm", c_void_p),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        ("qkv", Linear),
        ("out", Linear),
        ("gate_up", Linear),
        ("down", Linear),
        ("window", c_int32),
        ("skip_attention", c_int32),
        ("skip_mlp", c_int32),
        ("index", c_int32),
    )


class Model(Structure):
    _fields_ = (
        ("layers", c_int32),
        ("hidden", c_int32),
        ("vocab", c_int32),
        ("heads", c_int32),
        ("kv_heads", c_int32),
        ("head_dim", c_int32),
        ("dim", c_int32),
        ("format", c_int32),
        ("isa", c_int32),
        ("eps", c_float),
        ("embedding", c_void_p),
        ("layer", POINTER(Layer)),
        ("norm", c_void_p),
        ("head", Linear),
        ("cos", c_void_p),
        ("sin", c_void_p),
    )


class Filters(Structure):
    _fields_ = (
        ("top_p", c_double),
        ("temperature", c_float),
        ("least", c_float),
        ("top_k", c_int32),
    )


class Chain(Structure):
    _fields_ = (
        ("survival", c_double),
        ("seed", c_uint64),
        ("filters", Filters),
        ("slot", c_int32),
        ("position", c_int32),
        ("limit", c_int32),
    )


class StopRule(Structure):
    _fields_ = (
        ("chances", c_void_p),
        ("shared", c_void_p),
        ("own", c_void_p),
        ("bins", c_int32),
        ("sharing", c_int32),
    )


SIGNATURES: dict[str, tuple[Any, ...]] = {
    "foredraft_pass": (c_void_p, c_void_p, c_int, c_int, c_int, c_void_p, c_int, c_void_p, c_int),
    "foredraft_chain": (
        c_void_p,
        c_void_p,
        c_int,
        c_int,
        c_void_p,
        c_int,
        POINTER(Chain),
        POINTER(StopRule),
        c_void_p,
        c_int,
        c_int,
        c_void_p,
        c_void_p,
        c_void_p,
        c_int,
    ),
    "foredraft_choose": (
        c_int,
        c_void_p,
        c_int,
        c_int,
        POINTER(Filters),
        c_void_p,
        c_void_p,
        c_int,
        c_void_p,
        c_void_p,
        c_void_p,
    ),
    "foredraft_follow": (
        c_int,
        c_void_p,
        c_uint64,
        c_int,
        c_void_p,
        c_int,
        c_int,
        c_int,
        c_void_p,
        c_void_p,
        c_void_p,
        c_void_p,
    ),
    "foredraft_linear": (c_void_p, c_int, c_void_p, c_int, c_int, c_void_p, c_int, c_int),
    "foredraft_mask": (c_int, c_void_p, c_void_p, c_int, c_int, c_void_p),
    "foredraft_round": (c_int, c_void_p, c_int, c_int, c_void_p, c_void_p, c_int),
    "foredraft_pack": (c_int, c_void_p, c_int, c_int, c_int, c_void_p, c_int),
}


class LibraryError(ForedraftError):
    """The native library is not there, or not ours; says why."""


@dataclass(frozen=True, slots=True)
class Library:
    """The loaded library and the instruction sets that this processor has."""

    functions: ctypes.CDLL
    isas: tuple[str, ...]
    fastest: str

    def isa(self, name: str | None = None) -> int:
        """The number of an instruction set; None is the fastest there is.

        Raises:
            LibraryError: this processor does not have it.
        """
        name = self.fastest if name is None else name
        if name not in self.isas:
            raise LibraryError(f"instruction set {name!r} is not here; this processor has {', '.join(self.isas)}")
        return ISAS.index(name)

    def pack(self, form: Format, rows: Any, inputs: int, padded: int, out: int, threads: int) -> None:
        """Reorder the weights of `rows`, an array of addresses (0 is a row of zeros), to what is at address `out`."""
        self.functions.foredraft_pack(form, rows.ctypes.data, len(rows), inputs, padded, out, threads)


@cache
def load(path: Path | None = None) -> Library:
    """The library that was built with the package, or the one at `path`; loaded once.

    Raises:
        LibraryError: it is not there, does not load, or is of another version.
    """
    path = path or Path(__file__).with_name(NAME)
    if not path.is_file():
        raise LibraryError(f"the native library was not built ({path} is not there); run `make native`, or reinstall")
    try:
        functions = ctypes.CDLL(str(path))
        found = functions.foredraft_abi()
    except (OSError, AttributeError) as error:
        raise LibraryError(f"{path} does not load ({error}); rebuild it with `make native`") from error
    if found != ABI:
        raise LibraryError(f"{path} has interface {found}, and this version needs {ABI}; rebuild it with `make native`")
    for name, arguments in SIGNATURES.items():
        getattr(functions, name).argtypes = arguments
    for name in ("pack", "mask", "round"):
        getattr(functions, f"foredraft_{name}").restype = None
    functions.foredraft_choose.restype = c_bool
    return Library(functions, _present(functions.foredraft_isas()), ISAS[functions.foredraft_fastest_isa()])


def loaded() -> Library | None:
    """`load`, or None where there is no library."""
    try:
        return load()
    except LibraryError:
        return None


def _present(bits: int) -> tuple[str, ...]:
    return tuple(name for number, name in enumerate(ISAS) if bits >> number & 1)


def why_not() -> str:
    """Why there is no library, empty where there is one."""
    try:
        load()
    except LibraryError as error:
        return str(error)
    return ""
