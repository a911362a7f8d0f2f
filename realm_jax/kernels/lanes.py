"""What a thread of a kernel reads of a packed matrix, and where. Called by the readers of formats (`codes`, `codes_iq`)
and by the kernels that read with them.

A *unit* is what a thread's item stands for: the finest chunk of the format. Of every 16 weights of a unit, lane t of
four lanes holds weights 4 t to 4 t + 3 as the bytes of one uint32, each the code plus `zero`, which is never negative.
"""

from collections.abc import Callable, Iterator
from itertools import repeat
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from realm_jax.kernels import fragments, pallas
from realm_jax.kernels.ring import Place, Slots, can_copy
from realm_jax.quant.words import unpack_halves

NIBBLES, PAIRS, BITS, SIGNS = (np.uint32(0x01010101 * x) for x in (0x0F, 0x03, 0x01, 0x80))
EVEN = np.uint32(0x00FF00FF)


class Codes(NamedTuple):
    """One unit in one row, every item (P, 4).

    words: for each 16 weights, uint32. scales: float32, one for each sub-block of 16 or 32 weights. offsets: the same,
    or none. A weight is scale * (byte - zero) + offset, with `zero` of the format's `Reader`. mins: where offsets are
    whole numbers times one of the four units, instead of them: bytes 2 and 3 of a word, for the two sub-blocks of a
    unit, and what they are multiplied by. raised: how far up their bytes the words hold their codes, in bits. mask: the
    bits that a code has; other bits of its byte may be anything. signed: whether bytes are codes less `zero`, of 128,
    which a `Lane` may allow. whole, factors: where scales are whole numbers times one number of the four units, that
    number, and they: as uint32, see `fragments.factors`, for the two sub-blocks of a unit, divided by 2^raised.
    """

    words: list[jax.Array]
    scales: list[jax.Array]
    offsets: list[jax.Array] | None = None
    mins: tuple[jax.Array, jax.Array] | None = None
    raised: tuple[int, ...] = ()
    mask: int = 0xFF
    signed: bool = False
    whole: jax.Array | None = None
    factors: jax.Array | None = None

    def lowered(self) -> list[jax.Array]:
        """The words, where none is raised, with nothing but codes."""
        raised = self.raised or (0,) * len(self.words)
        words = [word >> np.uint32(up) if up else word for word, up in zip(self.words, raised, strict=True)]
        return words if self.mask == 0xFF else [word & np.uint32(0x01010101 * self.mask) for word in words]

    def raised_words(self) -> list[jax.Array]:
        """The words with nothing but codes, as far up as they are."""
        raised = self.raised or (0,) * len(self.words)
        masks = [np.uint32(0x01010101 * (self.mask << up & 0xFF)) for up in raised]
        return self.words if self.mask == 0xFF else [word & own for word, own in zip(self.words, masks, strict=True)]


class Lane(NamedTuple):
    """Where a thread reads: planes of a matrix, its row (P, 4), the group of four units (P, 4) that it is at, which of
    the four each item is, t (P, 4), and how many units a row has. grid: the table that the format needs. places: takes
    in where it would read, with arrays (P,) for the first of four items, in place of reading. taken: gives what was
    read there, in the same order (None: not yet). signed: whether codes may come without `zero`.
    """

    planes: dict[str, jax.Array]
    row: jax.Array
    group: jax.Array
    item: jax.Array
    t: jax.Array
    units: int
    grid: jax.Array | None = None
    places: list[Place | None] | None = None
    taken: Iterator[jax.Array | None] | None = None
    signed: bool = False

    @property
    def unit(self) -> jax.Array:
        unit = 4 * self.group + self.item
        return unit if self.units % 4 == 0 else jnp.minimum(unit, self.units - 1)

    def chunk(self, ratio: int) -> jax.Array:
        """The chunk of `ratio` units that each item is in; four items in the same one are seen to be."""
        if ratio == 1:
            return self.unit
        return self.group // (ratio // 4) if ratio % 4 == 0 else self.unit // ratio

    def read(self, name: str, word: jax.Array | int | None = None, apart: bool = False, further: int = 0) -> jax.Array:
        """The items of a plane for these units: of one word of them, where a chunk has several. apart: the items want
        different words. further: so many words after that one: places that differ in it alone share an address."""
        if self.taken is not None and (items := next(self.taken)) is not None:
            return items
        plane = self.planes[name]
        if self.places is not None:
            at, span = self._place(plane, word)
            simple = not apart and self.units % 4 == 0 and can_copy(plane.dtype, span)
            beyond = further * plane.shape[-1]
            self.places.append(Place(plane, at, span, self._slots(word), beyond) if simple else None)
            return jnp.zeros(self.row.shape, plane.dtype)
        at, _ = self._place(plane, word + further if further else word)
        return pallas.load(plane.at[at])

    def _place(self, plane: jax.Array, word: jax.Array | int | None) -> tuple[tuple[jax.Array, ...], int]:
        """Indices of the items, and how many different ones four in a row are."""
        if word is None:
            ratio = self.units // plane.shape[-1]
            return (self.row, self.chunk(ratio)), max(1, 4 // ratio)
        groups, _, n = plane.shape[1:]
        ratio = self.units // (groups * n)
        word = jnp.broadcast_to(jnp.int32(word), self.row.shape)
        if ratio == 1 and n == 4:
            return (self.row, self.group, word, self.item), 4
        chunk = self.chunk(ratio)
        return (self.row, chunk // n, word, chunk % n), max(1, 4 // ratio)

    def _slots(self, word: jax.Array | int | None) -> Slots:
        """Four lanes read the same, unless the word that they read is their own."""
        thread = lax.broadcasted_iota(jnp.int32, self.row.shape, 0)
        if isinstance(word, jax.Array):
            return Slots(32, thread)
        return Slots(8, thread // 4, copies=self.t == 0, name="t is 0")

    def place(self, count: int) -> jax.Array:
        """The place of each unit in its block of `count`, uint32."""
        return (self.unit % count).astype(jnp.uint32)

    def entry(self, index: jax.Array) -> jax.Array:
        """Four bytes of the grid for entries (P, 4): of entries of eight, the half that is this lane's."""
        if self.places is not None:  # what was looked up is not wanted yet
            return index
        index = index.astype(jnp.int32)
        wide = self.grid.shape[0] > 1
        return pallas.load(self.grid.at[self.t % 2 if wide else jnp.zeros_like(index), index])


class Reader(NamedTuple):
    """read: a `Lane` -> `Codes`. unit: weights. sub_block: 16 or 32 weights that share a scale. zero: see `Codes`.
    offsets, mins, factors: whether there are any. copied: whether all that is read can be copied ahead of time. grid:
    the table that it needs, uint32 (1 or 2 words, entries), or None.
    """

    read: Callable[[Lane], Codes]
    unit: int
    sub_block: int
    zero: int
    offsets: bool = False
    mins: bool = False
    factors: bool = False
    copied: bool = True
    grid: Callable[[], np.ndarray] | None = None

    def units(self, width: int) -> int:
        return width // self.unit


def halves_of(row: Codes, zero: int) -> list[tuple[jax.Array, jax.Array]]:
    """Of each of the words, bytes 0 and 2, and 1 and 3, as pairs of float16, code * 2^-24; int32. zero: see `Codes`.

    With factors, code * factor * 2^-24: exact, as code * factor is below 2048.
    """
    found = []
    for i, (word, raised) in enumerate(zip(row.words, row.raised or repeat(0), strict=False)):
        if row.factors is not None:
            mask, sub = np.uint32(0x00010001 * (row.mask << raised)), 2 * i // len(row.words)
            pairs = ((word >> np.uint32(up) & mask).astype(jnp.int32) for up in (0, 8))
            low, high = (fragments.times_factor(pair, row.factors, sub) for pair in pairs)
        else:
            low, high = ((half & EVEN).astype(jnp.int32) for half in (word, word >> np.uint32(8)))
        if zero:
            low, high = (fragments.subtract_halves(pair, zero, raised) for pair in (low, high))
        found.append((low, high))
    return found


def places(reader: Reader, lane: Lane) -> list[Place | None]:
    """Where the reader reads, in its order, for a lane of arrays (P,); None for what cannot be copied ahead of time."""
    found: list[Place | None] = []
    reader.read(lane._replace(places=found))
    return found


def byte(word: jax.Array, which: jax.Array | int, signed: bool = False) -> jax.Array:
    """A byte of each uint32 as float32; through the bits of 2^23 + byte, quicker than a conversion."""
    word = word ^ SIGNS if signed else word
    if isinstance(which, int):
        return fragments.byte_after_two_to_23(word, which) - np.float32((1 << 23) + (128 if signed else 0))
    return small(word >> (which.astype(jnp.uint32) * np.uint32(8)) & np.uint32(0xFF)) - (128 if signed else 0)


def times_bytes(factor: jax.Array, words: list[jax.Array], which: range) -> list[jax.Array]:
    """factor * byte, float32, for some of the bytes of these words; factor has no more than 15 bits."""
    if pallas.interpreting():
        return [factor * byte(words[i // 4], i % 4) for i in which]
    less = factor * np.float32(-(1 << 23))  # exact, and so is what the product is before it is rounded
    return [fragments.fma(fragments.byte_after_two_to_23(words[i // 4], i % 4), factor, less) for i in which]


def small(integers: jax.Array) -> jax.Array:
    """uint32 below 2^23 as float32."""
    return lax.bitcast_convert_type(integers | np.uint32(0x4B000000), jnp.float32) - np.float32(1 << 23)


def spread(bits: jax.Array) -> jax.Array:
    """The low four bits of each uint32, one to each byte."""
    return (bits & np.uint32(15)) * np.uint32(0x00204081) & BITS


def low(word: jax.Array) -> jax.Array:
    return word & NIBBLES


def high(word: jax.Array) -> jax.Array:
    return word >> np.uint32(4) & NIBBLES


def scale(lane: Lane) -> jax.Array:
    return lane.read("d").astype(jnp.float32)


def halves(lane: Lane) -> tuple[jax.Array, jax.Array]:
    return unpack_halves(lane.read("d"))


def eight_scale_bytes(lane: Lane) -> list[jax.Array]:
    """The words of the scale bytes of a chunk of 128 weights."""
    return [lane.read("scales", 0, further=i) for i in range(2)]


def coordinates(thread: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Warp, g, t, and lane (4 g + t) of threads."""
    return thread // 32, thread % 32 // 4, thread % 4, thread % 32
