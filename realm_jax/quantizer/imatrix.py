"""Importance matrices: how strongly each input channel of a weight is used, as `calibrate` measures it.

Read and written in llama.cpp's own formats, so that either program can use the other's files: GGUF
(tools/imatrix/imatrix.cpp, `save_imatrix`) is read and written, the older binary format (`.dat`) is read.
"""

import functools
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from realm_jax.errors import RealmError
from realm_jax.gguf import types
from realm_jax.gguf.cursor import Cursor
from realm_jax.gguf.header import MAGIC, MAX_TENSOR_NAME_BYTES
from realm_jax.gguf.reader import GGUFFile, open_gguf
from realm_jax.gguf.types import Field, ValueType, file_error, shown, shown_path
from realm_jax.gguf.writer import write_gguf

DATASETS, CHUNK_COUNT, CHUNK_SIZE = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"
SUMS, COUNTS = ".in_sum2", ".counts"
LOOKED_UP = ("token_embd.weight", "per_layer_token_embd.weight")  # rows are looked up: entries that misfit are ignored

_I32 = struct.Struct("<i")


@dataclass(frozen=True, eq=False)
class Imatrix:
    """Mean squared activations by weight: `values[name][k]` is the mean of x_k^2 over the inputs x of that weight.

    values: tensor name -> float32 (K,), or (experts, K) for a stack of matrices; finite and not negative.
    counts: tensor name -> int64 (1,) or (experts,), the inputs that each mean was taken over; may lack names.
    chunks, chunk_size: how many chunks of text of how many tokens were run. datasets: names of the texts.
    source: the file that it came from, "" for none.
    """

    values: Mapping[str, np.ndarray]
    counts: Mapping[str, np.ndarray] = field(default_factory=dict)
    chunks: int = 0
    chunk_size: int = 0
    datasets: tuple[str, ...] = ()
    source: str = ""

    def importance(self, name: str, shape: tuple[int, ...]) -> np.ndarray | None:
        """For a tensor (..., N, K): float32 (matrices, K), one row for each of its matrices; None without an entry.

        Raises RealmError where the entry has another length, except for embeddings, whose entry is then passed over.
        """
        values = self.values.get(name)
        if values is None:
            return None
        matrices = int(np.prod(shape[:-2]))
        if values.size == matrices * shape[-1]:
            return np.asarray(values, np.float32).reshape(matrices, shape[-1])
        if name in LOOKED_UP:
            return None
        want = f"{matrices} x {shape[-1]:,}" if matrices > 1 else f"{shape[-1]:,}"
        source = f"{shown_path(self.source)}: " if self.source else ""
        raise RealmError(
            f"{source}the importance matrix has {values.size:,} values for tensor {shown(name)} of shape {shape}: "
            f"it must have {want}; was it made with another model?"
        )


def from_sums(
    sums: Mapping[str, np.ndarray], counts: Mapping[str, np.ndarray], chunks: int, chunk_size: int, **about: object
) -> Imatrix:
    """An `Imatrix` from sums of squares, name -> (matrices, K), and counts, name -> (matrices,) integers.

    A matrix without a single input (an expert that was never chosen) counts all its channels alike, as in llama.cpp.
    """
    values = {}
    for name, sums_MK in sums.items():
        count_M1 = counts[name].astype(np.float32)[:, None]
        mean_MK = np.where(count_M1 > 0, sums_MK.astype(np.float32) / np.maximum(count_M1, 1), np.float32(1))
        values[name] = mean_MK[0] if len(mean_MK) == 1 else mean_MK
    return Imatrix(values, dict(counts), chunks, chunk_size, **about)


def write_imatrix(path: str | os.PathLike[str], imatrix: Imatrix) -> None:
    """Writes an importance matrix as GGUF, for this program and for llama.cpp. Errors as `write_gguf`.

    An entry without a count is written as the mean over `chunks * chunk_size` inputs, or over one.
    """
    fields = {
        "general.type": types.field("imatrix"),
        DATASETS: Field(ValueType.ARRAY, list(imatrix.datasets), ValueType.STRING),
        CHUNK_COUNT: Field(ValueType.UINT32, imatrix.chunks),
        CHUNK_SIZE: Field(ValueType.UINT32, imatrix.chunk_size),
    }
    tensors = []
    for name in sorted(imatrix.values):
        count_M = imatrix.counts.get(name)
        if count_M is None:
            count_M = np.array([max(1, imatrix.chunks * imatrix.chunk_size)])
        mean_MK = np.asarray(imatrix.values[name], np.float32).reshape(len(count_M), -1)
        sums_MK = mean_MK * count_M.astype(np.float32)[:, None]
        for suffix, array in ((SUMS, sums_MK), (COUNTS, count_M.astype(np.float32)[:, None])):
            shape = array.shape if len(count_M) > 1 else array.shape[1:]
            tensors.append((name + suffix, "F32", shape, functools.partial(_bytes, array)))
    write_gguf(path, fields, tensors)


def _bytes(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(np.uint8)


def read_imatrix(path: str | os.PathLike[str]) -> Imatrix:
    """Reads an importance matrix that this program or llama.cpp wrote, in GGUF or in the older binary format.

    Raises GGUFError, one line that names file and entry, for a file that is cut short, is something else, or holds
    values that no mean of squares can be.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            is_gguf = file.read(len(MAGIC)) == MAGIC
        if not is_gguf:
            return _read_legacy(path)
    except OSError as error:
        raise file_error(path, f"cannot be read: {error.strerror or error}") from None
    with open_gguf(path) as file:
        return _read_gguf(file)


def _read_gguf(file: GGUFFile) -> Imatrix:
    path, metadata = file.path, file.metadata
    names = [name.removesuffix(SUMS) for name in file.tensors if name.endswith(SUMS)]
    if not names:
        kind = metadata.get("general.type", metadata.get("general.architecture", "unknown"))
        raise file_error(
            path,
            f"is no importance matrix but a GGUF file of type {shown(str(kind))}: it has no tensor NAME{SUMS}; "
            "llama-imatrix and --save-imatrix write such files",
        )
    sums, counts = {}, {}
    for name in names:
        if name + COUNTS not in file.tensors:
            raise file_error(path, f"tensor {shown(name + SUMS)} has no {shown(name + COUNTS)}: both must be there")
        sums_MK, count_M = (_floats(file, name + suffix) for suffix in (SUMS, COUNTS))
        if sums_MK.size % count_M.size:
            raise file_error(
                path,
                f"tensor {shown(name + SUMS)} has {sums_MK.size:,} values for {count_M.size:,} counts: "
                "there must be a whole number of values for each count",
            )
        sums[name], counts[name] = sums_MK.reshape(count_M.size, -1), np.rint(count_M).astype(np.int64)
    return from_sums(
        sums,
        counts,
        _count(file, CHUNK_COUNT),
        _count(file, CHUNK_SIZE),
        datasets=tuple(str(text) for text in metadata.get(DATASETS, ())),
        source=str(path),
    )


def _count(file: GGUFFile, key: str) -> int:
    value = file.metadata.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        is_now = "is missing" if value is None else f"is {shown(repr(value))}"
        raise file_error(file.path, f"key '{key}' {is_now}: an importance matrix needs a count there")
    return value


def _floats(file: GGUFFile, name: str) -> np.ndarray:
    info = file.tensors[name]
    if info.format != "F32":
        raise file_error(file.path, f"tensor {shown(name)} is {info.format}: an importance matrix holds F32")
    return _checked(file.path, name, np.array(file.raw(name)).reshape(-1).view(np.float32))


def _checked(path: Path, name: str, values: np.ndarray) -> np.ndarray:
    """`values`, which must be finite and not negative."""
    bad = ~(np.isfinite(values) & (values >= 0))
    if bad.any():
        at = int(bad.argmax())
        raise file_error(
            path, f"value {at:,} of {shown(name)} is {values[at]}: sums of squares and counts are finite and at least 0"
        )
    return values


def _read_legacy(path: Path) -> Imatrix:
    """The format of `save_imatrix_legacy`: means times the number of calls; then the chunks and the text's name."""
    data = path.read_bytes()
    cursor = Cursor(data, shown_path(path))
    cursor.limit = len(data)  # all of the file is read, not only a header

    def integer(what: str, least: int, most: int) -> int:
        value = cursor.unpack(_I32, what)[0]
        if not least <= value <= most:
            raise cursor.error(
                f"{what} is {value:,}, not {least:,} to {most:,}: this is no importance matrix of llama.cpp, "
                "or it is broken"
            )
        return value

    values = {}
    for index in range(integer("the number of entries", 1, len(data) // 13)):
        length = integer(f"the length of name {index}", 1, MAX_TENSOR_NAME_BYTES)
        name = cursor.take(length, f"name {index}").decode("utf-8", "surrogateescape")
        calls = integer(f"the number of calls of {shown(name)}", 0, 2**31 - 1)
        size = integer(f"the number of values of {shown(name)}", 1, len(data) // 4)
        raw = cursor.take(4 * size, f"the values of {shown(name)}")
        values[name] = _checked(path, name, np.frombuffer(raw, "<f4")) / np.float32(calls or 1)
    chunks, datasets = 0, ()
    if cursor.position < len(data):  # older files end here
        chunks = max(0, cursor.unpack(_I32, "the number of chunks")[0])
        length = integer("the length of the text's name", 0, len(data))
        text = cursor.take(length, "the text's name").decode("utf-8", "surrogateescape")
        datasets = (text,) if text else ()
    return Imatrix(values, chunks=chunks, datasets=datasets, source=str(path))
