"""Metadata values from bytes and to bytes: the two directions of one encoding. Called by `header` and `writer`."""

import struct

import numpy as np

from realm_jax.errors import GGUFError
from realm_jax.gguf.cursor import MAX_STRINGS, Cursor
from realm_jax.gguf.types import DTYPES, Field, ValueType, shown

MAX_ARRAY_DEPTH = 4

_SCALARS = {
    ValueType.UINT8: struct.Struct("<B"),
    ValueType.INT8: struct.Struct("<b"),
    ValueType.UINT16: struct.Struct("<H"),
    ValueType.INT16: struct.Struct("<h"),
    ValueType.UINT32: struct.Struct("<I"),
    ValueType.INT32: struct.Struct("<i"),
    ValueType.FLOAT32: struct.Struct("<f"),
    ValueType.BOOL: struct.Struct("<B"),
    ValueType.UINT64: struct.Struct("<Q"),
    ValueType.INT64: struct.Struct("<q"),
    ValueType.FLOAT64: struct.Struct("<d"),
}
_TYPE = struct.Struct("<I")
_ARRAY_HEAD = struct.Struct("<IQ")
_LENGTH = struct.Struct("<Q")


def read_field(cursor: Cursor, key: str) -> Field:
    """The typed value of `key` at the cursor. Raises GGUFError, naming the key, for whatever does not fit."""
    what = f"key {shown(key)}"
    value_type = _value_type(cursor, cursor.unpack(_TYPE, f"the type of {what}")[0], what)
    if value_type is ValueType.ARRAY:
        return _read_array(cursor, what, depth=1)
    if value_type is ValueType.STRING:
        return Field(value_type, cursor.string(what))
    value = cursor.unpack(_SCALARS[value_type], what)[0]
    if value_type is ValueType.BOOL:
        if value > 1:
            raise cursor.error(f"{what} is a bool of value {value}: a bool is 0 or 1")
        value = bool(value)
    return Field(value_type, value)


def _value_type(cursor: Cursor, number: int, what: str) -> ValueType:
    try:
        return ValueType(number)
    except ValueError:
        known = f"0 ({ValueType(0).name}) to {max(ValueType)} ({max(ValueType).name})"
        raise cursor.error(f"{what} has value type {number}: GGUF knows {known}") from None


def _read_array(cursor: Cursor, what: str, depth: int) -> Field:
    number, count = cursor.unpack(_ARRAY_HEAD, f"the array of {what}")
    item_type = _value_type(cursor, number, what)
    if item_type is ValueType.STRING:
        return Field(ValueType.ARRAY, cursor.strings(count, what), item_type)
    if item_type is ValueType.ARRAY:
        return Field(ValueType.ARRAY, _read_nested(cursor, what, count, depth), item_type)
    return Field(ValueType.ARRAY, _read_numbers(cursor, what, count, item_type), item_type)


def _read_nested(cursor: Cursor, what: str, count: int, depth: int) -> list[Field]:
    if depth == MAX_ARRAY_DEPTH:
        raise cursor.error(f"{what} nests arrays more than {MAX_ARRAY_DEPTH} deep, which is the most allowed")
    cursor.nested_arrays(count, _ARRAY_HEAD.size, what)
    return [_read_array(cursor, what, depth + 1) for _ in range(count)]


def _read_numbers(cursor: Cursor, what: str, count: int, item_type: ValueType) -> np.ndarray:
    dtype = DTYPES[item_type]
    values = np.frombuffer(cursor.take(count * dtype.itemsize, f"the array of {what}"), np.uint8)
    if item_type is ValueType.BOOL and count and values.max() > 1:
        raise cursor.error(f"{what} is an array of bools with the value {values.max()}: a bool is 0 or 1")
    return values.view(dtype)


def encode_field(key: str, field: Field) -> list[bytes]:
    """The bytes of a typed value, in pieces. Raises GGUFError, naming the key, if the value does not fit its type."""
    return [_TYPE.pack(field.type), *_encode_value(f"key {shown(key)}", field, depth=0)]


def _encode_value(what: str, field: Field, depth: int) -> list[bytes]:
    if field.type is ValueType.ARRAY:
        return _encode_array(what, field, depth + 1)
    if field.item_type is not None:
        raise GGUFError(f"{what} is a {field.type.name} with an item type: only an ARRAY has one")
    if field.type is ValueType.STRING:
        return encode_string(what, field.value)
    return [_encode_scalar(what, field)]


def encode_string(what: str, text: str) -> list[bytes]:
    """Length and bytes of a string; lone surrogates that stand for bytes become those bytes again."""
    if not isinstance(text, str):
        raise GGUFError(f"{what} holds {shown(repr(text))}: a STRING value must be a str")
    try:
        raw = text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise GGUFError(
            f"{what} holds {shown(text)}, which UTF-8 cannot express: take out its lone surrogates"
        ) from None
    return [_LENGTH.pack(len(raw)), raw]


def _encode_scalar(what: str, field: Field) -> bytes:
    value = field.value
    if field.type is ValueType.BOOL and value not in (0, 1):
        raise GGUFError(f"{what} holds {shown(repr(value))}: a BOOL value must be True or False")
    try:
        return _SCALARS[field.type].pack(value)
    except (struct.error, OverflowError, TypeError):
        raise GGUFError(f"{what} holds {shown(repr(value))}, which is no {field.type.name} value") from None


def _encode_array(what: str, field: Field, depth: int) -> list[bytes]:
    item_type, items = field.item_type, field.value
    if item_type is None:
        raise GGUFError(f"{what} is an ARRAY without an item type: give one")
    if depth > MAX_ARRAY_DEPTH:
        raise GGUFError(f"{what} nests arrays more than {MAX_ARRAY_DEPTH} deep, which is the most allowed")
    pieces = [_ARRAY_HEAD.pack(item_type, len(items))]
    if item_type is ValueType.STRING:
        if len(items) > MAX_STRINGS:
            raise GGUFError(f"{what} has {len(items):,} strings: at most {MAX_STRINGS:,} are allowed")
        for text in items:
            pieces += encode_string(what, text)
    elif item_type is ValueType.ARRAY:
        for item in items:
            if not isinstance(item, Field) or item.type is not ValueType.ARRAY:
                raise GGUFError(f"{what} is an ARRAY of ARRAY: its items must be Fields of type ARRAY")
            pieces += _encode_array(what, item, depth + 1)
    else:
        pieces.append(_encode_numbers(what, items, item_type))
    return pieces


def _encode_numbers(what: str, items, item_type: ValueType) -> bytes:
    array, dtype = np.asarray(items), DTYPES[item_type]
    if (array.size and not _fits(array, dtype)) or array.ndim != 1:
        raise GGUFError(f"{what} holds {array.dtype} values that an array of {item_type.name} cannot hold exactly")
    return array.astype(dtype).tobytes()


def _fits(array: np.ndarray, dtype: np.dtype) -> bool:
    if dtype.kind == "f":
        return array.dtype.kind in "iuf"
    if dtype.kind == "b" or array.dtype.kind not in "iu":
        return dtype.kind == array.dtype.kind
    limits = np.iinfo(dtype)
    return limits.min <= int(array.min()) and int(array.max()) <= limits.max
