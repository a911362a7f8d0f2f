"""What a ggml block format is made of, and how raw blocks become planes and planes raw blocks (numpy, on the host).

A *plane* holds one field of all blocks of a tensor. Rows stay rows: a tensor of shape (..., N, K) has planes
(..., N, *tail). A *chunk* is the unit in which the bit layout of a format repeats (64 weights for Q4_K), C = G * chunks
of them in a row of G blocks. Fields of several 32-bit words a chunk are laid out in *groups* of n neighbouring chunks,
(..., N, C / n, W, n), n = 4 where C is a multiple of 4, else 2 or 1: word i of the chunks of a group stands together.
So a thread of a kernel loads a word of four chunks as one vector, and threads that take neighbouring words read whole
lines.

The modules `blocks_*` read and write *word-major* planes, (..., N, W, C), which `ungroup` gives and `group` takes.
`formats` collects the formats; `tensor` uses them.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from realm_jax.errors import RealmError
from realm_jax.quant.words import unpack_halves

GROUP = 4  # chunks; four 32-bit words are the widest load of a GPU thread
STRIPE_BYTES = 1 << 18  # rows are moved in stripes of about this size, to stay in cache
ALIGNMENT = 64  # what XLA's CPU backend wants of a buffer that it uses without a copy


class Number(NamedTuple):
    """A kind of floating-point number that blocks hold as scales.

    special: the mask of the bits that are all ones in a NaN or infinity and in no other number.
    read: a plane of such numbers -> float32 arrays, one for each name in the field's `floats`.
    gather: for a number whose bits are scattered over its field, (..., items of the field) -> (...) bits (numpy).
    """

    special: np.generic
    read: Callable[[jax.Array], tuple[jax.Array, ...]]
    gather: Callable[[np.ndarray], np.ndarray] | None = None


def read_halves(plane: jax.Array) -> tuple[jax.Array, ...]:
    return (plane.astype(jnp.float32),) if plane.dtype == jnp.float16 else unpack_halves(plane)


F16 = Number(np.uint16(0x7C00), read_halves)
F32 = Number(np.uint32(0x7F800000), lambda plane: (plane,))


class Field(NamedTuple):
    """One field of a block and the plane it becomes.

    name: of the plane. offset: of the field in the block, in bytes. dtype: of the plane's items.
    chunks: chunks of a block. words: items of a chunk; 0 says one item a chunk and no word axis.
    floats: the names of the floating-point scales in the field; two float16 share a uint32 word, low half first.
    number: what kind of numbers they are.
    raw_words, raw_dtype, unpack, pack: for a field whose bits are re-arranged: how many items of which dtype it takes
    in the block, and the two functions (..., raw_words) -> (..., chunks, max(words, 1)) and back.
    """

    name: str
    offset: int
    dtype: type
    chunks: int = 1
    words: int = 0
    floats: tuple[str, ...] = ()
    number: Number = F16
    raw_words: int = 0
    raw_dtype: type = np.uint32
    unpack: Callable[[np.ndarray], np.ndarray] | None = None
    pack: Callable[[np.ndarray], np.ndarray] | None = None

    @property
    def raw_bytes(self) -> int:
        """How many bytes of the block it takes."""
        if self.raw_words:
            return self.raw_words * np.dtype(self.raw_dtype).itemsize
        return self.chunks * max(self.words, 1) * np.dtype(self.dtype).itemsize

    def tail(self, blocks: int) -> tuple[int, ...]:
        """The shape of the plane after the row axes, for rows of so many blocks."""
        chunks = blocks * self.chunks
        n = group_size(chunks)
        return (chunks // n, self.words, n) if self.words else (chunks,)


def group_size(chunks: int) -> int:
    """How many neighbouring chunks of a row stand together in a plane of words."""
    return math.gcd(chunks, GROUP)


def cut_of_group(blocks: int, chunks: int) -> tuple[int, int]:
    """q and p: a group of a row of so many blocks of `chunks` chunks is p chunks of each of q blocks."""
    n = group_size(blocks * chunks)
    p = min(n, chunks)
    return n // p, p


def group(plane: jax.Array) -> jax.Array:
    """A word-major plane (..., W, C) as it is kept: (..., C / n, W, n). numpy or jnp."""
    *rows, words, chunks = plane.shape
    n = group_size(chunks)
    return plane.reshape(*rows, words, chunks // n, n).swapaxes(-3, -2)


def ungroup(plane: jax.Array) -> jax.Array:
    """The inverse of `group`."""
    *rows, groups, words, n = plane.shape
    return plane.swapaxes(-3, -2).reshape(*rows, words, groups * n)


class Affine(NamedTuple):
    """Blocks in a common form: weight = scale * code + offset, in each of `S` sub-blocks of `n` weights.

    codes: int32 (..., G, S, n). scale: float32 (..., G, S). offset: the same, or None where a format has none.
    """

    codes: jax.Array
    scale: jax.Array
    offset: jax.Array | None = None


def plain_product(scale: jax.Array, codes: jax.Array) -> jax.Array:
    return scale * codes.astype(jnp.float32)


@dataclass(frozen=True)
class Format:
    """A ggml block format: data, and what its bits mean.

    fields: cover every byte of a block once. read_words: word-major planes -> Affine. write_words: float32 (..., K),
    importance that broadcasts to it or None, name of a method -> word-major planes; None where there is no encoder yet.
    product: scale times code in float32.
    """

    name: str
    block_size: int
    block_bytes: int
    fields: tuple[Field, ...]
    read_words: Callable[[dict[str, jax.Array]], Affine]
    write_words: Callable[[jax.Array, jax.Array | None, str], dict[str, jax.Array]] | None = None
    product: Callable[[jax.Array, jax.Array], jax.Array] = plain_product

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.block_bytes / self.block_size

    @property
    def encode(self) -> Callable[..., dict[str, jax.Array]] | None:
        """`write_words`, with planes as they are kept; None where there is no encoder yet."""
        return None if self.write_words is None else lambda *what: self.group(self.write_words(*what))

    def group(self, planes: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Word-major planes as they are kept."""
        return {f.name: group(planes[f.name]) if f.words else planes[f.name] for f in self.fields}

    def ungroup(self, planes: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Planes as they are kept, word-major."""
        return {f.name: ungroup(planes[f.name]) if f.words else planes[f.name] for f in self.fields}

    def decode(self, planes: dict[str, jax.Array]) -> Affine:
        """Planes in the common form scale * code + offset."""
        return self.read_words(self.ungroup(planes))

    def dequantize(self, planes: dict[str, jax.Array]) -> jax.Array:
        """Planes to float32 (..., K), bit for bit what ggml's reference gives.

        All products but Q8_K's are exact in float32 (11 bits of a float16 scale, at most 13 of a sub-block scale and
        a code), so it does not matter whether a compiler fuses the product with the addition.
        """
        codes, scale, offset = self.decode(planes)
        weights = self.product(scale[..., None], codes)
        if offset is not None:
            weights = weights + offset[..., None]
        return weights.reshape(*weights.shape[:-3], weights.shape[-3] * self.block_size)

    def blocks_in_row(self, width: int) -> int:
        """How many blocks a row of `width` weights has; RealmError unless it is a whole number."""
        if width % self.block_size:
            raise RealmError(
                f"{self.name}: a row of {width} weights is not a whole number of blocks; "
                f"it must be a multiple of {self.block_size}"
            )
        return width // self.block_size

    def split(self, raw: np.ndarray) -> dict[str, np.ndarray]:
        """Raw blocks, uint8 (..., G * block_bytes), to planes; the inverse of `join` for any bytes."""
        raw = np.ascontiguousarray(raw)
        blocks, rest = divmod(raw.shape[-1], self.block_bytes)
        if rest:
            raise RealmError(f"{self.name}: a row of {raw.shape[-1]} bytes is not whole blocks of {self.block_bytes}")
        rows = raw.reshape(-1, raw.shape[-1])
        planes = {f.name: aligned_empty((len(rows), *f.tail(blocks)), f.dtype) for f in self.fields}
        for stripe in stripes(rows):
            for field in self.fields:
                plane = chunk_view(field, planes[field.name][stripe], blocks)
                items = self._items(field, rows[stripe], blocks)
                items = field.unpack(items) if field.unpack else items
                plane[...] = items.reshape(plane.shape)
        return {name: plane.reshape(*raw.shape[:-1], *plane.shape[1:]) for name, plane in planes.items()}

    def join(self, planes: dict[str, np.ndarray]) -> np.ndarray:
        """Planes to raw blocks, uint8 (..., G * block_bytes)."""
        lead, blocks = self.rows_and_blocks(planes)
        raw = np.empty((*lead, blocks * self.block_bytes), np.uint8)
        rows = raw.reshape(-1, raw.shape[-1])
        flat = {f.name: np.asarray(planes[f.name]).reshape(len(rows), *f.tail(blocks)) for f in self.fields}
        for stripe in stripes(rows):
            for field in self.fields:
                plane = chunk_view(field, flat[field.name][stripe], blocks)
                items = self._items(field, rows[stripe], blocks)
                plane = plane.reshape(len(plane), blocks, field.chunks, -1)
                items[...] = field.pack(plane) if field.pack else plane
        return raw

    def rows_and_blocks(self, planes: dict[str, jax.Array]) -> tuple[tuple[int, ...], int]:
        """The shape of the rows that planes hold, and how many blocks a row has."""
        first = self.fields[0]
        shape = planes[first.name].shape
        return shape[: -len(first.tail(1))], shape[-1] // first.chunks

    def block_scales(self, planes: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """The floating-point scales by their ggml names, float32 (..., G); (..., G, n) if a block has n of one name."""
        planes = self.ungroup(planes)
        fields = (field for field in self.fields if field.floats)
        return {k: v for f in fields for k, v in zip(f.floats, f.number.read(planes[f.name]), strict=True)}

    def _items(self, field: Field, rows: np.ndarray, blocks: int) -> np.ndarray:
        """A view of the field in rows of raw bytes: (rows, G, chunks, words), or (rows, G, raw_words)."""
        tail = (field.raw_words,) if field.raw_words else (field.chunks, max(field.words, 1))
        dtype = field.raw_dtype if field.raw_words else field.dtype
        return block_view(rows, self.block_bytes, field.offset, dtype, tail)

    def scale_bits(self, raw: np.ndarray) -> Iterator[tuple[np.ndarray, np.generic]]:
        """For each floating-point scale of blocks uint8 (bytes,): its bits (blocks,) and the mask of special ones."""
        for field in self.fields:
            special, _, gather = field.number
            blocks = len(raw) // self.block_bytes
            if gather:
                yield gather(self._items(field, raw[None], blocks)[0, :, 0]), special
            elif field.floats:
                count = field.raw_bytes // special.itemsize
                bits = block_view(raw[None], self.block_bytes, field.offset, special.dtype, (count,))[0]
                yield from ((bits[:, i], special) for i in range(count))


def block_view(rows: np.ndarray, block_bytes: int, offset: int, dtype: type, tail: tuple[int, ...]) -> np.ndarray:
    """Items at one offset of every block, without a copy: rows uint8 (R, G * block_bytes) to (R, G, *tail)."""
    count, row_bytes = rows.shape
    shape = (count, row_bytes // block_bytes, *tail)
    if 0 in shape:
        return np.empty(shape, dtype)
    inner = [np.dtype(dtype).itemsize]
    for size in reversed(tail[1:]):
        inner.insert(0, inner[0] * size)
    strides = (rows.strides[0], block_bytes, *(inner if tail else ()))
    return np.ndarray(shape, dtype, rows, offset, strides)


def chunk_view(field: Field, plane: np.ndarray, blocks: int) -> np.ndarray:
    """A plane (R, ...) seen in the order of the file, (R, G, chunks, max(W, 1)), cut as groups cut G and chunks.

    (R, G / q, q, chunks / p, p, max(W, 1)), where p chunks of each of q blocks are a group.
    """
    if not field.words:
        return plane.reshape(len(plane), blocks, 1, field.chunks, 1, 1)
    q, p = cut_of_group(blocks, field.chunks)
    cut = plane.reshape(len(plane), blocks // q, field.chunks // p, field.words, q, p)
    return cut.transpose(0, 1, 4, 2, 5, 3)


def stripes(rows: np.ndarray) -> Iterator[slice]:
    """Slices over the rows of a 2-D array, each of about STRIPE_BYTES."""
    step = max(1, STRIPE_BYTES // max(1, rows[:1].nbytes))
    return (slice(start, start + step) for start in range(0, len(rows), step))


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialized array at a 64-byte boundary, which XLA's CPU backend can use in place."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)
