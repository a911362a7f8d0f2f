"""What a GGUF file is made of: tensor types, metadata values, tensor entries. Used by everything in `gguf`.

Sources: the GGUF specification (ggml/docs/gguf.md) and ggml's `ggml-common.h` for block sizes.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.constants import GGUFValueType as ValueType

from realm_jax.errors import GGUFError

__all__ = [
    "GGML_TYPES",
    "REMOVED_TYPES",
    "TYPE_BY_NAME",
    "Field",
    "GGMLType",
    "TensorInfo",
    "ValueType",
    "field",
    "file_error",
    "shown",
    "shown_path",
]


@dataclass(frozen=True)
class GGMLType:
    """A ggml tensor type: `block_size` values of a row are stored in `block_bytes` bytes."""

    name: str
    id: int
    block_size: int
    block_bytes: int

    def row_bytes(self, width: int) -> int:
        """Bytes of a row of `width` values; `width` must be a multiple of `block_size`."""
        return width // self.block_size * self.block_bytes


def _ggml_types() -> list[GGMLType]:
    layouts = {t.name: (int(t), *GGML_QUANT_SIZES[t]) for t in GGMLQuantizationType}
    # Newer than the oldest `gguf` package in use; and Q8_1, whose d and s are float16 in ggml, not float32.
    layouts |= {
        "Q8_1": (9, 32, 2 + 2 + 32),
        "NVFP4": (40, 64, 4 + 32),
        "Q1_0": (41, 128, 2 + 16),
        "Q2_0": (42, 64, 2 + 16),
    }
    return [GGMLType(name, *layout) for name, layout in layouts.items()]


TYPE_BY_NAME: dict[str, GGMLType] = {t.name: t for t in _ggml_types()}
GGML_TYPES: dict[int, GGMLType] = {t.id: t for t in TYPE_BY_NAME.values()}
REMOVED_TYPES: dict[int, str] = {
    4: "Q4_2",
    5: "Q4_3",
    31: "Q4_0_4_4",
    32: "Q4_0_4_8",
    33: "Q4_0_8_8",
    36: "IQ4_NL_4_4",
    37: "IQ4_NL_4_8",
    38: "IQ4_NL_8_8",
}


@dataclass(frozen=True, eq=False)
class Field:
    """A metadata value with its exact GGUF type, so that it is written back as it was read.

    value: int, float, bool or str for a scalar. For an array: a read-only 1-D `np.ndarray` of numbers or
        bools, `list[str]`, or, for an array of arrays, a list of `Field`. Bytes of a string that are not
        UTF-8 are kept as lone surrogates (`surrogateescape`).
    item_type: the type of an array's items; None for scalars.
    """

    type: ValueType
    value: Any
    item_type: ValueType | None = None

    @property
    def plain(self) -> Any:
        """The value without types: nested arrays become lists of lists and arrays."""
        if self.item_type is ValueType.ARRAY:
            return [item.plain for item in self.value]
        return self.value


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor stands and what it is.

    format: the name of its `GGMLType`. shape: row-major like numpy, (N, K) for a linear weight, K the row that
    blocks divide. nbytes: without padding. offset: absolute, in the file of shard number `shard`.
    """

    name: str
    format: str
    shape: tuple[int, ...]
    nbytes: int
    offset: int
    shard: int


def shown(text: str | bytes, limit: int = 80) -> str:
    """Text out of a file as it may stand in a message: quoted, control characters escaped, long text cut."""
    return repr(text) if len(text) <= limit else f"{text[:limit]!r}... ({len(text):,} long)"


def shown_path(path: object) -> str:
    """A path as it may stand in a message: itself, or quoted if it would break the line."""
    text = str(path)
    return text if text.isprintable() else repr(text)


def file_error(path: object, message: str) -> GGUFError:
    """The error to raise about the file at `path`."""
    return GGUFError(f"{shown_path(path)}: {message}")


_INTEGER_TYPES = (ValueType.UINT32, ValueType.INT32, ValueType.UINT64, ValueType.INT64)
_LIST_INTEGER_TYPES = (ValueType.INT32, ValueType.UINT32, ValueType.INT64, ValueType.UINT64)
DTYPES: dict[ValueType, np.dtype] = {
    ValueType.UINT8: np.dtype("u1"),
    ValueType.INT8: np.dtype("i1"),
    ValueType.UINT16: np.dtype("<u2"),
    ValueType.INT16: np.dtype("<i2"),
    ValueType.UINT32: np.dtype("<u4"),
    ValueType.INT32: np.dtype("<i4"),
    ValueType.FLOAT32: np.dtype("<f4"),
    ValueType.BOOL: np.dtype("?"),
    ValueType.UINT64: np.dtype("<u8"),
    ValueType.INT64: np.dtype("<i8"),
    ValueType.FLOAT64: np.dtype("<f8"),
}


def field(value: Any) -> Field:
    """The `Field` that GGUF files usually hold for a Python value.

    int: UINT32, or the first of INT32, UINT64, INT64 that holds it. float: FLOAT32. bool, str: as they are.
    np.ndarray (1-D): its own dtype. list or tuple: strings, bools, floats, or integers (INT32 where it holds
    them all). Raises GGUFError for anything else, for an empty list and for numbers too large.
    """
    if isinstance(value, Field):
        return value
    if isinstance(value, np.ndarray):
        return _array_field(value)
    if isinstance(value, list | tuple):
        return _list_field(list(value))
    if isinstance(value, bool | np.bool_):
        return Field(ValueType.BOOL, bool(value))
    if isinstance(value, int | np.integer):
        return Field(_integer_type([int(value)], _INTEGER_TYPES), int(value))
    if isinstance(value, float | np.floating):
        return Field(ValueType.FLOAT32, float(value))
    if isinstance(value, str):
        return Field(ValueType.STRING, value)
    raise GGUFError(
        f"a value of type {type(value).__name__} cannot be GGUF metadata: use int, float, bool, str or lists"
    )


def _array_field(value: np.ndarray) -> Field:
    dtype = value.dtype.newbyteorder("<")
    item_type = next((t for t, d in DTYPES.items() if d == dtype), None)
    if item_type is None or value.ndim != 1:
        raise GGUFError(
            f"an array of {value.dtype} with {value.ndim} dimensions cannot be GGUF metadata: use 1-D numbers"
        )
    return Field(ValueType.ARRAY, value, item_type)


def _list_field(items: list) -> Field:
    if not items:
        raise GGUFError("an empty list says no item type: use Field(ValueType.ARRAY, [], item_type)")
    if all(isinstance(i, str) for i in items):
        return Field(ValueType.ARRAY, items, ValueType.STRING)
    if all(isinstance(i, bool | np.bool_) for i in items):
        return _array_field(np.array(items, bool))
    if all(isinstance(i, int | np.integer) and not isinstance(i, bool) for i in items):
        item_type = _integer_type([int(i) for i in items], _LIST_INTEGER_TYPES)
        return Field(ValueType.ARRAY, np.array(items, DTYPES[item_type]), item_type)
    if all(isinstance(i, int | float | np.integer | np.floating) and not isinstance(i, bool) for i in items):
        return _array_field(np.array(items, np.float32))
    if all(isinstance(i, list | tuple | np.ndarray) for i in items):
        return Field(ValueType.ARRAY, [field(i) for i in items], ValueType.ARRAY)
    kinds = sorted({type(i).__name__ for i in items})
    raise GGUFError(f"a list of {', '.join(kinds)} cannot be GGUF metadata: all items must be of one kind")


def _integer_type(values: list[int], candidates: tuple[ValueType, ...]) -> ValueType:
    low, high = min(values), max(values)
    for candidate in candidates:
        limits = np.iinfo(DTYPES[candidate])
        if limits.min <= low and high <= limits.max:
            return candidate
    raise GGUFError(f"integers from {low} to {high} do not fit into 64 bits, the most that GGUF metadata holds")
