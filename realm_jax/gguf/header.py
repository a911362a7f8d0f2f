"""The header of one GGUF file, read without trust: magic, version, metadata, tensor list. Called by `reader`.

Every count, length, size and offset is checked against a fixed bound and against the bytes left before memory is
taken for it. The rules are llama.cpp's where it has one: what it loads is read, what it refuses is refused.
Source: the GGUF specification (ggml/docs/gguf.md).
"""

import math
import mmap
import struct
from dataclasses import dataclass

from realm_jax.errors import GGUFError
from realm_jax.gguf.cursor import Cursor
from realm_jax.gguf.types import GGML_TYPES, REMOVED_TYPES, Field, GGMLType, TensorInfo, ValueType, shown
from realm_jax.gguf.values import read_field

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
ALIGNMENT_KEY = "general.alignment"
MAX_ALIGNMENT = 2**24
MAX_KEYS = 2**16
MAX_KEY_BYTES = 2**16 - 1
MAX_TENSORS = 2**18
MAX_TENSOR_NAME_BYTES = 63
MAX_DIMENSIONS = 4

# The fewest bytes an entry can take: a name of one byte, its length, and the fixed parts.
_KEY_ENTRY_BYTES = 8 + 1 + 4 + 1
_TENSOR_ENTRY_BYTES = 8 + 1 + 4 + 8 + 4 + 8

_U32 = struct.Struct("<I")
_COUNTS = struct.Struct("<QQ")
_DIMENSIONS = {n: struct.Struct(f"<{n}Q") for n in range(1, MAX_DIMENSIONS + 1)}
_TYPE_AND_OFFSET = struct.Struct("<IQ")

_OTHER_FILES = (
    (b"PK\x03\x04", "a zip archive, as PyTorch saves checkpoints"),
    (b"\x89HDF", "an HDF5 file"),
    (b"lmgg", "a GGML file, older than GGUF"),
    (b"fmgg", "a GGMF file, older than GGUF"),
    (b"tjgg", "a GGJT file, older than GGUF"),
    (b"algg", "a GGLA adapter, older than GGUF"),
    (b"version https://git-lfs", "a Git LFS pointer: run `git lfs pull` to get the file itself"),
    (b"<!DOCTYPE", "a web page, not the download"),
    (b"<html", "a web page, not the download"),
)


@dataclass(frozen=True)
class Header:
    """What the header of one file says; `tensors` in file order with absolute offsets."""

    version: int
    alignment: int
    fields: dict[str, Field]
    tensors: dict[str, TensorInfo]


def read_header(buffer: mmap.mmap | bytes, source: str, shard: int = 0) -> Header:
    """Reads and checks the header of the mapped file `buffer`; `source` is its name in messages.

    Raises GGUFError with one line that names the file, the key or tensor, and what would be right.
    """
    cursor = Cursor(buffer, source)
    version = _read_version(cursor)
    n_tensors, n_keys = cursor.unpack(_COUNTS, "the number of tensors and keys")
    _check_count(cursor, "metadata keys", n_keys, MAX_KEYS, _KEY_ENTRY_BYTES)
    _check_count(cursor, "tensors", n_tensors, MAX_TENSORS, _TENSOR_ENTRY_BYTES)
    fields = _read_fields(cursor, n_keys)
    alignment = _alignment(cursor, fields)
    entries = _read_entries(cursor, n_tensors)
    return Header(version, alignment, fields, _place(cursor, entries, alignment, shard))


def _read_version(cursor: Cursor) -> int:
    if not cursor.buffer:
        raise cursor.error("is empty: a GGUF file starts with the bytes 'GGUF'")
    start = bytes(cursor.buffer[:64])
    if not start.startswith(MAGIC):
        raise cursor.error(f"is not a GGUF file: it starts with {_describe(start)}, not with the bytes 'GGUF'")
    cursor.take(len(MAGIC), "the magic")
    version = cursor.unpack(_U32, "the version")[0]
    if version in VERSIONS:
        return version
    if version and version & 0xFFFF == 0:
        raise cursor.error("is a big-endian GGUF file: only little-endian files are supported, convert it")
    advice = "convert the model again with a current llama.cpp" if version < 2 else "this reader knows no newer one"
    raise cursor.error(f"is a GGUF file of version {version}: versions 2 and 3 are supported; {advice}")


def _describe(start: bytes) -> str:
    for magic, kind in _OTHER_FILES:
        if start.startswith(magic):
            return f"{start[:4]!r} ({kind})"
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 2**32:
        return f"{start[:4]!r} (it looks like a safetensors file)"
    return repr(start[:4])


def _check_count(cursor: Cursor, what: str, count: int, most: int, entry_bytes: int) -> None:
    if count > most:
        raise cursor.error(f"claims {count:,} {what}: at most {most:,} are allowed")
    cursor.need(count * entry_bytes, f"a list of {count:,} {what}")


def _read_fields(cursor: Cursor, count: int) -> dict[str, Field]:
    fields: dict[str, Field] = {}
    for index in range(count):
        key = cursor.name(f"the name of metadata key {index}", MAX_KEY_BYTES)
        if key in fields:
            raise cursor.error(f"key {shown(key)} stands twice in the metadata: each key must stand once")
        fields[key] = read_field(cursor, key)
    return fields


def _alignment(cursor: Cursor, fields: dict[str, Field]) -> int:
    try:
        return alignment_of(fields)
    except GGUFError as error:
        raise cursor.error(str(error)) from None


def alignment_of(fields: dict[str, Field]) -> int:
    """The alignment of tensor data that the metadata asks for. Raises GGUFError without a file name."""
    if ALIGNMENT_KEY not in fields:
        return DEFAULT_ALIGNMENT
    field = fields[ALIGNMENT_KEY]
    if field.type is not ValueType.UINT32:
        raise GGUFError(f"key '{ALIGNMENT_KEY}' is of type {field.type.name}: it must be UINT32")
    return check_alignment(field.value)


def check_alignment(alignment: int) -> int:
    """`alignment` if it is one. Raises GGUFError without a file name."""
    if not 1 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise GGUFError(f"key '{ALIGNMENT_KEY}' is {alignment}: it must be a power of two from 1 to {MAX_ALIGNMENT:,}")
    return alignment


_Entry = tuple[str, GGMLType, tuple[int, ...], int, int]  # name, type, shape, bytes, offset in the data


def _read_entries(cursor: Cursor, count: int) -> list[_Entry]:
    entries, names = [], set()
    for index in range(count):
        name = cursor.name(f"the name of tensor {index}", MAX_TENSOR_NAME_BYTES)
        what = f"tensor {shown(name)}"
        if name in names:
            raise cursor.error(f"{what} stands twice in the tensor list: each name must stand once")
        names.add(name)
        n_dims = cursor.unpack(_U32, f"the dimensions of {what}")[0]
        if not 1 <= n_dims <= MAX_DIMENSIONS:
            raise cursor.error(f"{what} has {n_dims:,} dimensions: 1 to {MAX_DIMENSIONS} are allowed")
        shape = cursor.unpack(_DIMENSIONS[n_dims], f"the dimensions of {what}")[::-1]
        type_id, offset = cursor.unpack(_TYPE_AND_OFFSET, f"the type of {what}")
        ggml_type = _ggml_type(cursor, what, type_id)
        try:
            nbytes = tensor_bytes(what, ggml_type, shape)
        except GGUFError as error:
            raise cursor.error(str(error)) from None
        if nbytes > len(cursor.buffer):
            raise cursor.error(
                f"{what} of shape {shape} in {ggml_type.name} takes {nbytes:,} bytes, "
                f"more than the whole file has ({len(cursor.buffer):,}): the file is cut short or broken, get it again"
            )
        entries.append((name, ggml_type, shape, nbytes, offset))
    return entries


def _ggml_type(cursor: Cursor, what: str, type_id: int) -> GGMLType:
    if type_id in GGML_TYPES:
        return GGML_TYPES[type_id]
    if type_id in REMOVED_TYPES:
        raise cursor.error(
            f"{what} has ggml type {type_id} ({REMOVED_TYPES[type_id]}), which GGUF no longer has: "
            "quantize the original model again"
        )
    raise cursor.error(f"{what} has ggml type {type_id}, which is unknown: known types go from 0 to {max(GGML_TYPES)}")


def tensor_bytes(what: str, ggml_type: GGMLType, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor's data without padding. Raises GGUFError without a file name if shape or type forbid it."""
    if min(shape) < 1:
        raise GGUFError(f"{what} has shape {shape}: every dimension must be at least 1")
    if shape[-1] % ggml_type.block_size:
        raise GGUFError(
            f"{what} has rows of {shape[-1]:,} values, which blocks of {ggml_type.name} do not divide: "
            f"a row must be a multiple of {ggml_type.block_size}"
        )
    return math.prod(shape[:-1]) * ggml_type.row_bytes(shape[-1])


def padded(count: int, alignment: int) -> int:
    """`count` rounded up to a multiple of `alignment`."""
    return -(-count // alignment) * alignment


def _place(cursor: Cursor, entries: list[_Entry], alignment: int, shard: int) -> dict[str, TensorInfo]:
    """Absolute offsets. Tensors must follow each other without gaps, each padded to the alignment."""
    start, size = padded(cursor.position, alignment), len(cursor.buffer)
    due, tensors = 0, {}
    for name, ggml_type, shape, nbytes, offset in entries:
        if offset != due:
            raise cursor.error(
                f"tensor {shown(name)} has data offset {offset:,}, but {due:,} is due: tensors must follow each "
                f"other in the order of the list, each padded to {alignment:,} bytes"
            )
        if start + offset + nbytes > size:
            raise cursor.error(
                f"the data of tensor {shown(name)} ends at byte {start + offset + nbytes:,}, but the file has only "
                f"{size:,} bytes: it is cut short, get it again"
            )
        tensors[name] = TensorInfo(name, ggml_type.name, shape, nbytes, start + offset, shard)
        due += padded(nbytes, alignment)
    return tensors
