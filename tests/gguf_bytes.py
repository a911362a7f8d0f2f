"""GGUF files built byte by byte, right or wrong on purpose. Used by the tests of the reader and the writer."""

import struct

from realm_jax.gguf.types import ValueType

ARRAY, STRING, UINT32 = ValueType.ARRAY, ValueType.STRING, ValueType.UINT32
F32, Q4_0, Q4_K = 0, 2, 12


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def key(name: str | bytes, value_type: int, payload: bytes) -> bytes:
    return string(name) + struct.pack("<I", value_type) + payload


def array(name: str | bytes, item_type: int, count: int, payload: bytes = b"") -> bytes:
    return key(name, ARRAY, struct.pack("<IQ", item_type, count) + payload)


def alignment(value: int) -> bytes:
    return key("general.alignment", UINT32, struct.pack("<I", value))


def tensor(name: str | bytes, dims: tuple[int, ...], type_id: int = F32, offset: int = 0) -> bytes:
    """An entry of the tensor list; `dims` as the file has them, the row first."""
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, type_id, offset)


def header(keys=(), tensors=(), *, version: int = 3, n_keys: int | None = None, n_tensors: int | None = None) -> bytes:
    counts = [len(given) if claimed is None else claimed for given, claimed in ((tensors, n_tensors), (keys, n_keys))]
    return b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join([*keys, *tensors])


def gguf(keys=(), tensors=(), data: bytes = b"", *, pad_to: int = 32, **claims: int) -> bytes:
    """A whole file: header, padding up to the data, data."""
    head = header(keys, tensors, **claims)
    return head + bytes(-len(head) % pad_to) + data


def split_keys(number: int, count: int, tensors: int) -> list[bytes]:
    """The keys of file `number` of a split model, with the types that llama.cpp gives them."""
    return [
        key("split.no", ValueType.UINT16, struct.pack("<H", number)),
        key("split.count", ValueType.UINT16, struct.pack("<H", count)),
        key("split.tensors.count", ValueType.INT32, struct.pack("<i", tensors)),
    ]
