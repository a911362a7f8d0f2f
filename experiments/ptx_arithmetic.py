"""What the arithmetic of PTX computes, on arrays of all threads. Called by `ptx_machine`.

Source: NVIDIA, PTX ISA, "Instruction Set". Floating-point results are rounded to the nearest, `.approx` ones too,
and subnormal numbers stay what they are with `.ftz`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import ml_dtypes
import numpy as np

from realm_jax.errors import RealmError

Array = np.ndarray
# fmt: off
DTYPES = {
    "b8": np.uint8, "b16": np.uint16, "b32": np.uint32, "b64": np.uint64, "u8": np.uint8, "u16": np.uint16,
    "u32": np.uint32, "u64": np.uint64, "s8": np.int8, "s16": np.int16, "s32": np.int32, "s64": np.int64,
    "f16": np.float16, "bf16": ml_dtypes.bfloat16, "f32": np.float32, "f64": np.float64, "pred": np.bool_,
}
BINARY = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "min": np.minimum, "max": np.maximum,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "div": np.divide,
}
UNARY = {
    "abs": np.abs, "neg": np.negative, "not": np.invert, "mov": lambda a: a, "sqrt": np.sqrt,
    "rsqrt": lambda a: 1 / np.sqrt(a), "rcp": lambda a: 1 / a, "ex2": np.exp2, "lg2": np.log2, "tanh": np.tanh,
}
COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}
# fmt: on
INTEGER_ONLY, FLOAT_ONLY = {"and", "or", "xor", "not"}, {"div", "sqrt", "rsqrt", "rcp", "ex2", "lg2", "tanh"}
NUMBERS_FIRST = {"min": np.fmin, "max": np.fmax}
HARMLESS = {"rn", "approx", "full", "ftz"}  # modifiers of floating-point instructions
ROUND = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}


class Operation(NamedTuple):
    """sources: the types of the operands after the first, which takes the result. A type of two numbers in one register
    ("f16x2") comes and goes as an array with two columns."""

    sources: tuple[str, ...]
    compute: Callable[..., Array]


def dtype_of(kind: str) -> np.dtype:
    """Of a PTX type, or of each number of a pair ("f16x2")."""
    return np.dtype(DTYPES[kind.removesuffix("x2")])


def is_float(kind: str) -> bool:
    return kind.startswith(("f", "bf"))


@functools.cache
def operation(opcode: str) -> Operation:
    """What an opcode computes. RealmError for one that is not simulated."""
    name, *modifiers, kind = opcode.split(".")
    known = kind.removesuffix("x2") in DTYPES
    make = MAKERS.get(name)
    if make is None and known and name in UNARY | BINARY:
        make = _float if is_float(kind) else _integer
    found = make(name, modifiers, kind) if make and known else None
    if found is None:
        raise RealmError(f"{opcode} is not simulated")
    return found


def _float(name: str, modifiers: list[str], kind: str) -> Operation | None:
    kept = modifiers == ["NaN"] and name in NUMBERS_FIRST  # a NaN stays one
    if not (kept or set(modifiers) <= HARMLESS) or name in INTEGER_ONLY:
        return None
    if name in UNARY:
        return Operation((kind,), lambda a: UNARY[name](a).astype(a.dtype))
    function = BINARY[name] if kept else NUMBERS_FIRST.get(name, BINARY[name])
    return Operation((kind, kind), lambda a, b: function(a, b).astype(a.dtype))


def _integer(name: str, modifiers: list[str], kind: str) -> Operation | None:
    if modifiers not in ([], ["lo"] if name == "mul" else []) or name in FLOAT_ONLY:
        return _product(name, modifiers, kind) if name == "mul" else None
    return Operation((kind,), UNARY[name]) if name in UNARY else Operation((kind, kind), BINARY[name])


def _product(name: str, modifiers: list[str], kind: str) -> Operation | None:
    """mul and mad of integers: their low half, high half, or both."""
    size = 8 * dtype_of(kind).itemsize
    if modifiers not in (["lo"], ["hi"], ["wide"]) or (size == 64 and modifiers != ["lo"]) or is_float(kind):
        return None
    double = dtype_of(f"{kind[0]}{min(2 * size, 64)}")

    def product(a: Array, b: Array) -> Array:
        if modifiers == ["lo"]:
            return a * b
        whole = a.astype(double) * b.astype(double)
        return whole if modifiers == ["wide"] else (whole >> double.type(size)).astype(a.dtype)

    if name == "mul":
        return Operation((kind, kind), product)
    third = f"{kind[0]}{2 * size}" if modifiers == ["wide"] else kind
    return Operation((kind, kind, third), lambda a, b, c: product(a, b) + c)


def _fma(_name: str, modifiers: list[str], kind: str) -> Operation | None:
    down = modifiers == ["rm"] and kind == "f32"  # rounded down
    if not (down or set(modifiers) <= HARMLESS) or not is_float(kind):
        return None

    def fused(a: Array, b: Array, c: Array) -> Array:
        a_wide, b_wide, c_wide = (x.astype(np.longdouble) for x in (a, b, c))
        exact = a_wide * b_wide + c_wide
        nearest = exact.astype(a.dtype)
        return np.where(nearest > exact, np.nextafter(nearest, np.float32(-np.inf)), nearest) if down else nearest

    return Operation((kind,) * 3, fused)


def _shift(name: str, modifiers: list[str], kind: str) -> Operation | None:
    """By 32 and more: all bits go."""

    def shift(a: Array, by: Array) -> Array:
        size = 8 * a.dtype.itemsize
        sign = name == "shr" and a.dtype.kind == "i"
        inside = np.minimum(by, size - 1).astype(a.dtype)
        moved = a << inside if name == "shl" else a >> inside
        return np.where((by >= size) & (not sign), a.dtype.type(0), moved)

    return None if modifiers else Operation((kind, "u32"), shift)


def _funnel(_name: str, modifiers: list[str], kind: str) -> Operation | None:
    """shf: both words, the second above, shifted by the third modulo 32."""
    if kind != "b32" or modifiers not in (["l", "wrap"], ["r", "wrap"]):
        return None

    def shift(low: Array, high: Array, by: Array) -> Array:
        both, by = high.astype(np.uint64) << np.uint64(32) | low, (by & np.uint32(31)).astype(np.uint64)
        moved = both >> by if modifiers[0] == "r" else both << by >> np.uint64(32)
        return moved.astype(np.uint32)

    return Operation((kind,) * 3, shift)


def _extract(_name: str, modifiers: list[str], kind: str) -> Operation | None:
    if modifiers or kind not in ("u32", "s32"):
        return None

    def extract(a: Array, start: Array, count: Array) -> Array:
        start, count = ((x & np.uint32(255)).astype(np.int64) for x in (start, count))
        field = a.astype(np.int64) >> np.minimum(start, 63) & ((1 << np.minimum(count, 32)) - 1)
        if kind == "s32":
            negative = (a.astype(np.int64) >> np.minimum(start + count - 1, 31)) & 1
            field = np.where((negative == 1) & (count > 0), field | -1 << np.minimum(count, 32), field)
        return field.astype(a.dtype)

    return Operation((kind, "u32", "u32"), extract)


def _insert(_name: str, modifiers: list[str], kind: str) -> Operation | None:
    if modifiers or kind != "b32":
        return None

    def insert(a: Array, b: Array, start: Array, count: Array) -> Array:
        start, count = (np.minimum(x & np.uint32(255), 32).astype(np.uint64) for x in (start, count))
        mask = ((np.uint64(1) << count) - np.uint64(1)) << start
        return (b & ~mask | a.astype(np.uint64) << start & mask).astype(np.uint32)

    return Operation((kind, kind, "u32", "u32"), insert)


def _logic(_name: str, modifiers: list[str], kind: str) -> Operation | None:
    """lop3: for each bit, the entry of a table (the last operand) that the three bits are the number of."""

    def look_up(a: Array, b: Array, c: Array, table: Array) -> Array:
        found = np.zeros_like(a)
        for i in (i for i in range(8) if table[0] >> i & 1):
            found |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
        return found

    return None if modifiers or kind != "b32" else Operation((kind,) * 3 + ("u32",), look_up)


def _permute(_name: str, modifiers: list[str], kind: str) -> Operation | None:
    """prmt: four of the eight bytes of two words, each chosen by a hexadecimal digit; its top bit asks for the sign."""

    def permute(a: Array, b: Array, selector: Array) -> Array:
        both, found = b.astype(np.uint64) << np.uint64(32) | a, np.zeros_like(a)
        for i in range(4):
            digit = selector >> np.uint32(4 * i) & np.uint32(15)
            byte = (both >> (8 * (digit & np.uint32(7))).astype(np.uint64)).astype(np.uint8)
            sign = np.where(byte & 128, np.uint32(255), np.uint32(0))
            found |= np.where(digit & np.uint32(8), sign, byte) << np.uint32(8 * i)
        return found

    return None if modifiers or kind != "b32" else Operation((kind, kind, "u32"), permute)


def _compare(_name: str, modifiers: list[str], kind: str) -> Operation | None:
    """setp: `.lt`, or with a predicate that the comparison is joined with, `.lt.and`. Comparisons of floating-point
    numbers that end on u hold where one of them is NaN, too."""
    way, joined = (*modifiers, "")[:2]
    unordered = is_float(kind) and way.endswith("u")
    function = COMPARE.get(way.removesuffix("u") if unordered else way)
    if len(modifiers) > 2 or (function is None and way not in ("num", "nan")) or (joined and joined not in BINARY):
        return None

    def compare(a: Array, b: Array, other: Array | None = None) -> Array:
        if is_float(kind):
            broken = np.isnan(a) | np.isnan(b)
            found = {"nan": broken, "num": ~broken}.get(way)
            if found is None:
                found = function(a, b) & ~broken | (broken & unordered)
        else:
            found = function(a, b)
        return found if other is None else BINARY[joined](found, other)

    return Operation((kind, kind, "pred") if joined else (kind, kind), compare)


def _select(_name: str, modifiers: list[str], kind: str) -> Operation | None:
    return None if modifiers else Operation((kind, kind, "pred"), lambda a, b, first: np.where(first, a, b))


def _convert(_name: str, modifiers: list[str], source: str) -> Operation | None:
    """cvt.TO.FROM; to a pair from two numbers, of which the first goes above."""
    *modifiers, kind = modifiers or [""]
    if kind.removesuffix("x2") not in DTYPES or source.endswith("x2"):
        return None
    to, rounding = dtype_of(kind), next((ROUND[m] for m in modifiers if m in ROUND), None)
    if modifiers == ["sat"] and kind == source == "f32":
        return Operation((source,), lambda a: np.nan_to_num(np.clip(a, 0, 1)))
    if not set(modifiers) <= HARMLESS | set(ROUND):
        return None
    if kind.endswith("x2"):
        return None if rounding else Operation((source, source), lambda high, low: np.stack([low, high], -1).astype(to))
    if not is_float(source) or is_float(kind):
        return Operation((source,), lambda a: (rounding(a) if rounding else a).astype(to))
    return rounding and Operation((source,), lambda a: _whole(rounding(a.astype(np.longdouble)), to))


def _whole(a: Array, to: np.dtype) -> Array:
    """Whole numbers as integers: the nearest that there is; NaN is 0."""
    least, most = np.iinfo(to).min, np.iinfo(to).max
    return np.clip(np.nan_to_num(a, nan=0, posinf=most, neginf=least), least, most).astype(to)


MAKERS = {
    "fma": _fma, "mad": _product, "shl": _shift, "shr": _shift, "shf": _funnel, "bfe": _extract, "bfi": _insert,
    "lop3": _logic, "prmt": _permute, "setp": _compare, "selp": _select, "cvt": _convert,
}  # fmt: skip
