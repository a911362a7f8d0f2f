"""GGUF files, written: header, then tensors one after another in pieces. Saving, merging and quantizing call this.

The file appears under its name only when it is complete and on disk. Reading a canonical version 3 file and writing
its fields and tensors gives the same bytes. Source: the GGUF specification (ggml/docs/gguf.md).
"""

import contextlib
import os
import secrets
import stat
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from realm_jax.errors import GGUFError
from realm_jax.gguf.cursor import MAX_HEADER_BYTES
from realm_jax.gguf.header import (
    ALIGNMENT_KEY,
    MAGIC,
    MAX_DIMENSIONS,
    MAX_KEY_BYTES,
    MAX_KEYS,
    MAX_TENSOR_NAME_BYTES,
    MAX_TENSORS,
    alignment_of,
    check_alignment,
    padded,
    tensor_bytes,
)
from realm_jax.gguf.types import TYPE_BY_NAME, Field, GGMLType, ValueType, file_error, shown, shown_path
from realm_jax.gguf.values import encode_field, encode_string

VERSION = 3

Chunks = np.ndarray | Iterable[np.ndarray]


class _Tensor(NamedTuple):
    name: str
    type: GGMLType
    shape: tuple[int, ...]
    nbytes: int
    produce: Callable[[], Chunks]


def write_gguf(
    path: str | os.PathLike[str],
    fields: Mapping[str, Field],
    tensors: Iterable[tuple[str, str, tuple[int, ...], Callable[[], Chunks]]],
    *,
    alignment: int | None = None,
) -> None:
    """Writes a GGUF file of version 3, keys and tensors in the order given.

    fields: metadata key -> `Field`. tensors: (name, format, shape, produce), the shape row-major; `produce()` gives
    the tensor's bytes as one uint8 array or as uint8 arrays in order, and is called when their turn comes, so that
    one piece at a time need be in memory. alignment of tensor data: what `general.alignment` in fields says, else
    32; another one given here is added to the fields.

    The bytes go to a temporary file in the same folder, which takes the final name once it is complete (and the
    place of a link of that name); whatever goes wrong before leaves the folder, and a file already there, as they
    were. Raises GGUFError, one line, for names, shapes, values or byte counts that do not fit and if the disk refuses.
    """
    path = Path(path)
    try:
        fields, alignment = _with_alignment(fields, alignment)
        checked = _check_tensors(tensors)
        head = _encode_header(fields, checked, alignment)
    except GGUFError as error:
        raise file_error(path, str(error)) from None
    check_target(path)
    temporary = path.with_name(f".{secrets.token_hex(8)}.gguf.part")
    try:
        _write(temporary, path, head, checked, alignment)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise file_error(path, f"could not be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def check_target(path: Path) -> None:
    """Refuses, before the work begins, a path that no file can take."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        if not path.parent.is_dir():
            raise file_error(path, f"the folder {shown_path(path.parent)} does not exist: make it first") from None
        return
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise file_error(path, f"cannot be written: {getattr(error, 'strerror', None) or error}") from None
    if stat.S_ISDIR(mode):
        raise file_error(path, "is a folder: give the name of the file to write")
    if not stat.S_ISREG(mode):
        raise file_error(path, "is not a regular file: only such a file can be replaced")


def _with_alignment(fields: Mapping[str, Field], alignment: int | None) -> tuple[dict[str, Field], int]:
    fields = dict(fields)
    stated = alignment_of(fields)
    if alignment is None or alignment == stated:
        return fields, stated
    check_alignment(alignment)
    if ALIGNMENT_KEY in fields:
        raise GGUFError(f"key '{ALIGNMENT_KEY}' is {stated}, but alignment {alignment} is asked for: they must agree")
    return fields | {ALIGNMENT_KEY: Field(ValueType.UINT32, alignment)}, alignment


def _check_tensors(tensors: Iterable[tuple[str, str, tuple[int, ...], Callable[[], Chunks]]]) -> list[_Tensor]:
    checked: dict[str, _Tensor] = {}
    for name, format_name, shape, produce in tensors:
        what = f"tensor {shown(name)}"
        if name in checked:
            raise GGUFError(f"{what} is given twice: each name must be given once")
        if format_name not in TYPE_BY_NAME:
            raise GGUFError(f"{what} has the unknown format {shown(format_name)}: use one of {', '.join(TYPE_BY_NAME)}")
        if not 1 <= len(shape) <= MAX_DIMENSIONS:
            raise GGUFError(f"{what} has {len(shape)} dimensions: 1 to {MAX_DIMENSIONS} are allowed")
        shape, ggml_type = tuple(int(n) for n in shape), TYPE_BY_NAME[format_name]
        checked[name] = _Tensor(name, ggml_type, shape, tensor_bytes(what, ggml_type, shape), produce)
    return list(checked.values())


def _encode_header(fields: Mapping[str, Field], tensors: list[_Tensor], alignment: int) -> bytes:
    pieces = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(fields))]
    for key, field in fields.items():
        pieces += _encode_name("key", key, MAX_KEY_BYTES)
        pieces += encode_field(key, field)
    offset = 0
    for tensor in tensors:
        pieces += _encode_name("tensor", tensor.name, MAX_TENSOR_NAME_BYTES)
        dims = len(tensor.shape)
        pieces.append(struct.pack(f"<I{dims}QIQ", dims, *tensor.shape[::-1], tensor.type.id, offset))
        offset += padded(tensor.nbytes, alignment)
    head = b"".join(pieces)
    for what, count, most in (
        ("keys", len(fields), MAX_KEYS),
        ("tensors", len(tensors), MAX_TENSORS),
        ("bytes of metadata and tensor list", len(head), MAX_HEADER_BYTES),
    ):
        if count > most:
            raise GGUFError(f"{count:,} {what} are too many: at most {most:,} are allowed")
    return head.ljust(padded(len(head), alignment), b"\0")


def _encode_name(what: str, name: str, max_bytes: int) -> list[bytes]:
    pieces = encode_string(f"the name of {what} {shown(name)}", name)
    if not 1 <= len(pieces[1]) <= max_bytes:
        raise GGUFError(f"{what} {shown(name)} has a name of {len(pieces[1]):,} bytes: 1 to {max_bytes:,} are allowed")
    if not name.isprintable():
        raise GGUFError(f"{what} {shown(name)} has control characters in its name: take them out")
    return pieces


def _write(temporary: Path, path: Path, head: bytes, tensors: list[_Tensor], alignment: int) -> None:
    with open(temporary, "xb") as file:
        file.write(head)
        for tensor in tensors:
            written = _write_tensor(file, path, tensor)
            file.write(bytes(padded(written, alignment) - written))
        file.flush()
        os.fsync(file.fileno())


def _write_tensor(file: BinaryIO, path: Path, tensor: _Tensor) -> int:
    produced = tensor.produce()
    written = 0
    for chunk in [produced] if isinstance(produced, np.ndarray) else produced:
        chunk = np.asarray(chunk)
        if chunk.dtype != np.uint8:
            raise file_error(path, f"tensor {shown(tensor.name)} came as {chunk.dtype}: its bytes must come as uint8")
        written += chunk.nbytes
        if written > tensor.nbytes:
            break
        file.write(np.ascontiguousarray(chunk).data)
    if written != tensor.nbytes:
        amount = "more than" if written > tensor.nbytes else f"{written:,} of"
        raise file_error(
            path,
            f"tensor {shown(tensor.name)} came with {amount} the {tensor.nbytes:,} bytes "
            f"that shape {tensor.shape} in {tensor.type.name} takes",
        )
    return written


def _sync_folder(folder: Path) -> None:
    """Makes the new name itself survive a power cut, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
