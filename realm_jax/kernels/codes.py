"""How a GPU thread reads the codes of each format from its planes. Called by `triton_matmul`.

A *unit* is what a thread's item stands for: the finest chunk of the format. Of every 16 weights of a unit, lane t of
four lanes holds weights 4 t to 4 t + 3 as the bytes of one uint32, each the code plus `zero`, which is never negative.
What the bits mean is said in `quant.blocks_*`, in the same order; here they are read for these four weights alone.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from realm_jax.kernels import fragments, pallas
from realm_jax.kernels.ring import Place, Slots, can_copy
from realm_jax.quant.codebooks import codebook
from realm_jax.quant.formats import FORMATS
from realm_jax.quant.layout import Format
from realm_jax.quant.small_floats import e8m0, ue4m3
from realm_jax.quant.words import unpack_halves

NIBBLES, PAIRS, BITS, SIGNS = (np.uint32(0x01010101 * x) for x in (0x0F, 0x03, 0x01, 0x80))
EVEN = np.uint32(0x00FF00FF)


class Codes(NamedTuple):
    """One unit in one row, every item (P, 4).

    words: for each 16 weights, uint32. scales: float32, one for each sub-block of 16 or 32 weights. offsets: the same,
    or none. A weight is scale * (byte - zero) + offset, with `zero` of the format's `Reader`. mins: where offsets are
    whole numbers times one of the four units, instead of them: bytes 2 and 3 of a word, for the two sub-blocks of a
    unit, and what they are multiplied by. raised: how far up their bytes the words hold their codes, in bits.
    """

    words: list[jax.Array]
    scales: list[jax.Array]
    offsets: list[jax.Array] | None = None
    mins: tuple[jax.Array, jax.Array] | None = None
    raised: tuple[int, ...] = ()

    def lowered(self) -> list[jax.Array]:
        """The words, where none is raised."""
        return (
            [word >> np.uint32(up) if up else word for word, up in zip(self.words, self.raised, strict=True)]
            if self.raised
            else self.words
        )


class Lane(NamedTuple):
    """Where a thread reads: planes of a matrix, its row (P, 4), the group of four units (P, 4) that it is at, which of
    the four each item is, t (P, 4), and how many units a row has. grid: the table that the format needs. places: takes
    in where it would read, with arrays (P,) for the first of four items, in place of reading. taken: gives what was
    read there, in the same order (None: not yet).
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

    @property
    def unit(self) -> jax.Array:
        unit = 4 * self.group + self.item
        return unit if self.units % 4 == 0 else jnp.minimum(unit, self.units - 1)

    def chunk(self, ratio: int) -> jax.Array:
        """The chunk of `ratio` units that each item is in; four items in the same one are seen to be."""
        if ratio == 1:
            return self.unit
        return self.group // (ratio // 4) if ratio % 4 == 0 else self.unit // ratio

    def read(self, name: str, word: jax.Array | int | None = None, apart: bool = False) -> jax.Array:
        """The items of a plane for these units: of one word of them, where a chunk has several. apart: the items want
        different words."""
        if self.taken is not None and (items := next(self.taken)) is not None:
            return items
        plane = self.planes[name]
        at, span = self._place(plane, word)
        if self.places is not None:
            simple = not apart and self.units % 4 == 0 and can_copy(plane.dtype, span)
            self.places.append(Place(plane, at, span, self._slots(word)) if simple else None)
            return jnp.zeros(self.row.shape, plane.dtype)
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
    offsets, mins: whether there are any. copied: whether all that is read can be copied ahead of time. grid: the table
    that it needs, uint32 (1 or 2 words, entries), or None.
    """

    read: Callable[[Lane], Codes]
    unit: int
    sub_block: int
    zero: int
    offsets: bool = False
    mins: bool = False
    copied: bool = True
    grid: Callable[[], np.ndarray] | None = None

    def units(self, width: int) -> int:
        return width // self.unit


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


def four_bits(lane: Lane) -> list[jax.Array]:
    word = lane.read("qs", lane.t)
    return [low(word), high(word)]


def five_bits(lane: Lane) -> list[jax.Array]:
    bits = lane.read("qh") >> (lane.t * 4).astype(jnp.uint32)
    fifth = (spread(bits) << np.uint32(4), spread(bits >> np.uint32(16)) << np.uint32(4))
    return [word | bit for word, bit in zip(four_bits(lane), fifth, strict=True)]


def eight_bits(lane: Lane) -> list[jax.Array]:
    return [lane.read("qs", lane.t + 4 * k) ^ SIGNS for k in range(2)]


def read_q4_0(lane: Lane) -> Codes:
    word = lane.read("qs", lane.t)
    return Codes([word & NIBBLES, word & ~NIBBLES], [scale(lane)], raised=(0, 4))


def read_q4_1(lane: Lane) -> Codes:
    d, m = halves(lane)
    return Codes(four_bits(lane), [d], [m])


def read_q5_0(lane: Lane) -> Codes:
    return Codes(five_bits(lane), [scale(lane)])


def read_q5_1(lane: Lane) -> Codes:
    d, m = halves(lane)
    return Codes(five_bits(lane), [d], [m])


def read_q8_0(lane: Lane) -> Codes:
    return Codes(eight_bits(lane), [scale(lane)])


def read_q8_1(lane: Lane) -> Codes:
    return Codes(eight_bits(lane), [halves(lane)[0]])


def two_bits(lane: Lane) -> list[jax.Array]:
    words = [lane.read("qs", lane.t + 4 * k) for k in range(2)]
    return [word >> np.uint32(2 * part) & PAIRS for part in range(4) for word in words]


def eight_scale_bytes(lane: Lane) -> list[jax.Array]:
    """The words of the scale bytes of a chunk of 128 weights."""
    return [lane.read("scales", i) for i in range(2)]


def read_q2_k(lane: Lane) -> Codes:
    d, dmin = halves(lane)
    words = eight_scale_bytes(lane)
    scales, mins = [low(word) for word in words], [high(word) for word in words]
    return Codes(two_bits(lane), times_bytes(d, scales, range(8)), times_bytes(-dmin, mins, range(8)))


def read_q3_k(lane: Lane) -> Codes:
    first = lane.place(2) * np.uint32(4)
    masks = [lane.read("hmask", lane.t + 4 * k) >> first for k in range(2)]
    third = [(mask >> np.uint32(part) & BITS) << np.uint32(2) for part in range(4) for mask in masks]
    d, words = scale(lane), eight_scale_bytes(lane)
    codes = [code | bit for code, bit in zip(two_bits(lane), third, strict=True)]
    return Codes(codes, [d * (byte(words[i // 4], i % 4) - 32) for i in range(8)])


def scales_and_mins(lane: Lane) -> tuple[list[jax.Array], tuple[jax.Array, jax.Array]]:
    d, dmin = halves(lane)
    both = lane.read("scales")
    return times_bytes(d, [both], range(2)), (both, -dmin)


def nibbles_of_64(lane: Lane) -> list[jax.Array]:
    words = [lane.read("qs", lane.t + 4 * k) for k in range(2)]
    return [low(word) for word in words] + [high(word) for word in words]


def read_q4_k(lane: Lane) -> Codes:
    words = [lane.read("qs", lane.t + 4 * k) for k in range(2)]
    (first, second), mins = scales_and_mins(lane)
    # High nibbles stay where they are, as sixteen times what they say.
    codes = [word & mask for mask in (NIBBLES, ~NIBBLES) for word in words]
    return Codes(codes, [first, second * np.float32(1 / 16)], mins=mins)


def read_q5_k(lane: Lane) -> Codes:
    first = lane.place(4) * np.uint32(2)
    bits = [lane.read("qh", lane.t + 4 * k) >> first for k in range(2)]
    fifth = [(word >> np.uint32(part) & BITS) << np.uint32(4) for part in range(2) for word in bits]
    scales, mins = scales_and_mins(lane)
    return Codes([code | bit for code, bit in zip(nibbles_of_64(lane), fifth, strict=True)], scales, mins=mins)


def read_q6_k(lane: Lane) -> Codes:
    lows = [lane.read("ql", lane.t + 4 * k) for k in range(4)]
    highs = [lane.read("qh", lane.t + 4 * k) for k in range(2)]
    codes = []
    for part in range(4):
        for k in range(2):
            four = (low, low, high, high)[part](lows[2 * (part % 2) + k])
            codes.append(four | (highs[k] >> np.uint32(2 * part) & PAIRS) << np.uint32(4))
    d, words = scale(lane), eight_scale_bytes(lane)
    return Codes(codes, [d * byte(words[i // 4], i % 4, signed=True) for i in range(8)])


def values_plus_128(book: str) -> np.ndarray:
    values = codebook(book).values.astype(np.int16)
    return (np.concatenate([values, np.zeros(16 - len(values), np.int16)]) + 128).astype(np.uint8)


def named(lane: Lane, book: str) -> list[jax.Array]:
    word = lane.read("qs", lane.t)
    return [fragments.look_up(values_plus_128(book), word, part) for part in (False, True)]


def read_iq4_nl(lane: Lane) -> Codes:
    return Codes(named(lane, "IQ4_NL"), [scale(lane)])


def read_iq4_xs(lane: Lane) -> Codes:
    place = lane.place(8)
    word = lane.read("scales", (place // 4).astype(jnp.int32))
    return Codes(named(lane, "IQ4_NL"), [scale(lane) * (byte(word, place % 4) - 32)])


def read_mxfp4(lane: Lane) -> Codes:
    return Codes(named(lane, "MXFP4"), [e8m0(lane.read("e"))])


def read_nvfp4(lane: Lane) -> Codes:
    word = lane.read("qs", lane.t % 2)
    parts = [fragments.look_up(values_plus_128("MXFP4"), word, part) for part in (False, True)]
    bits = lane.read("d") >> (lane.place(4) * np.uint32(8)) & np.uint32(0xFF)
    return Codes([jnp.where(lane.t < 2, *parts)], [ue4m3(bits)])


def digit(word: jax.Array, power: jax.Array | int) -> jax.Array:
    """A digit in base 3 of each byte; power: 3 to the number of digits before it."""
    halves = [word & EVEN, word >> np.uint32(8) & EVEN]
    even, odd = (((half * power) & EVEN) * np.uint32(3) >> np.uint32(8) & EVEN for half in halves)
    return even | odd << np.uint32(8)


def read_tq1_0(lane: Lane) -> Codes:
    first, second, third = (lane.read("qs", lane.t + 4 * k) for k in range(3))
    powers = [np.uint32(3**i) for i in range(5)]
    codes = [digit(word, power) for power in powers for word in (first, second)]
    codes += [digit(third, power) for power in powers]
    own = jnp.where(
        lane.t < 2, jnp.where(lane.t < 1, powers[0], powers[1]), jnp.where(lane.t < 3, powers[2], powers[3])
    )
    return Codes([*codes, digit(lane.read("qh"), own)], [scale(lane)] * 8)


def read_tq2_0(lane: Lane) -> Codes:
    words = [lane.read("qs", lane.t + 4 * k) for k in range(2)]
    raised = tuple(2 * part for part in range(4) for _ in words)
    return Codes(
        [word & PAIRS << np.uint32(up) for up, word in zip(raised, 4 * words, strict=True)],
        [scale(lane)] * 4,
        raised=raised,
    )


# The IQ formats. A chunk of 32 weights has four entries of 8: lane t has a half of entry t // 2 and of 2 + t // 2.


def entries(lane: Lane) -> list[jax.Array]:
    return [(2 * k + lane.t // 2).astype(jnp.uint32) for k in range(2)]


def field(word: jax.Array, index: jax.Array, bits: int) -> jax.Array:
    return word >> (index * np.uint32(bits)) & np.uint32((1 << bits) - 1)


def own_signs(lane: Lane, signs: jax.Array) -> jax.Array:
    """Of eight sign bits the four that are this lane's."""
    return signs >> ((lane.t % 2) * 4).astype(jnp.uint32)


def eighth_sign(seven: jax.Array) -> jax.Array:
    """Seven sign bits and the one that makes the number of ones even."""
    nibble = (seven ^ seven >> np.uint32(4)) & np.uint32(15)
    return seven | (np.uint32(0x6996) >> nibble & np.uint32(1)) << np.uint32(7)


def signed(magnitudes: jax.Array, signs: jax.Array) -> jax.Array:
    """Magnitudes above 0, negative where a sign is set, plus 128."""
    negative = spread(signs)
    return ((magnitudes ^ negative * np.uint32(0xFF)) + negative) ^ SIGNS


def odd(lane: Lane, integer: jax.Array, unit: float, d: jax.Array | None = None) -> jax.Array:
    """d * unit * (2 i + 1)."""
    d = scale(lane) if d is None else d
    return d * (2 * small(integer) + 1) * np.float32(unit)


def two_nibble_scales(lane: Lane) -> list[jax.Array]:
    """The scales of IQ2_XS and IQ2_S: two nibbles of a chunk."""
    place = lane.place(8)
    word = lane.read("scales", (place // 4).astype(jnp.int32))
    return [odd(lane, field(word, place % 4 * 2 + np.uint32(k), 4), 1 / 8) for k in range(2)]


def read_iq2_xxs(lane: Lane) -> Codes:
    index, other = lane.read("qs", 0), lane.read("qs", 1)
    codes = [
        signed(lane.entry(field(index, i, 8)), own_signs(lane, eighth_sign(field(other, i, 7)))) for i in entries(lane)
    ]
    return Codes(codes, [odd(lane, other >> np.uint32(28), 1 / 8)])


def read_iq2_xs(lane: Lane) -> Codes:
    half = (lane.t // 2).astype(jnp.uint32)
    both = [field(lane.read("qs", k), half, 16) for k in range(2)]
    codes = [signed(lane.entry(x & np.uint32(511)), own_signs(lane, eighth_sign(x >> np.uint32(9)))) for x in both]
    return Codes(codes, two_nibble_scales(lane))


def read_iq2_s(lane: Lane) -> Codes:
    place, index, signs = lane.place(8), lane.read("qs"), lane.read("signs")
    more = lane.read("qh", (place // 4).astype(jnp.int32))
    codes = []
    for i in entries(lane):
        full = field(index, i, 8) | field(more, place % 4 * 4 + i, 2) << np.uint32(8)
        codes.append(signed(lane.entry(full), own_signs(lane, field(signs, i, 8))))
    return Codes(codes, two_nibble_scales(lane))


def read_iq3_xxs(lane: Lane) -> Codes:
    other, t = lane.read("scales"), lane.t.astype(jnp.uint32)
    codes = []
    for k, i in enumerate(entries(lane)):
        magnitudes = lane.entry(field(lane.read("qs", k), t, 8))
        codes.append(signed(magnitudes, own_signs(lane, eighth_sign(field(other, i, 7)))))
    return Codes(codes, [odd(lane, other >> np.uint32(28), 1 / 4)])


def read_iq3_s(lane: Lane) -> Codes:
    place, signs, t = lane.place(8), lane.read("signs"), lane.t.astype(jnp.uint32)
    more = lane.read("qh", (place // 4).astype(jnp.int32)) >> (place % 4 * 8)
    codes = []
    for k, i in enumerate(entries(lane)):
        full = field(lane.read("qs", k), t, 8) | field(more, t + np.uint32(4 * k), 1) << np.uint32(8)
        codes.append(signed(lane.entry(full), own_signs(lane, field(signs, i, 8))))
    return Codes(codes, [odd(lane, field(lane.read("scales"), place, 4), 1)])


def shifted(lane: Lane, index: jax.Array, down: jax.Array) -> jax.Array:
    """Codes of IQ1, plus 128: eight times -1, 0 or 1, and one more or less."""
    return jnp.where(down != 0, lane.entry(index) - BITS, lane.entry(index) + BITS)


def read_iq1_s(lane: Lane) -> Codes:
    place, index = lane.place(8), lane.read("qs")
    more = field(lane.read("qh", (place // 2).astype(jnp.int32), apart=True), place % 2, 16)
    full = [field(index, i, 8) | field(more, i, 3) << np.uint32(8) for i in entries(lane)]
    codes = [shifted(lane, index, more >> np.uint32(15)) for index in full]
    return Codes(codes, [odd(lane, more >> np.uint32(12) & np.uint32(7), 1 / 8)])


def read_iq1_m(lane: Lane) -> Codes:
    place, index = lane.place(8), lane.read("qs")
    more = lane.read("qh", (place // 2).astype(jnp.int32), apart=True)
    codes = []
    for i in entries(lane):
        nibble = field(more, place % 2 * 4 + i, 4)
        codes.append(
            shifted(lane, field(index, i, 8) | (nibble & np.uint32(7)) << np.uint32(8), nibble >> np.uint32(3))
        )
    first, second = eight_scale_bytes(lane)
    nibbles = ((first, 12, 0x000F), (first, 24, 0x00F0), (second, 4, 0x0F00), (second, 16, 0xF000))
    bits = sum(word >> np.uint32(shift) & np.uint32(mask) for word, shift, mask in nibbles)
    d = unpack_halves(bits)[0]
    own = field(jnp.where(place < 4, first, second), place // 2 % 2, 16)
    return Codes(codes, [odd(lane, field(own, place % 2 * 2 + np.uint32(k), 3), 1 / 8, d) for k in range(2)])


def grid(name: str, factor: int = 1, zero: int = 0) -> Callable[[], np.ndarray]:
    """A grid as bytes `factor * weight + zero`, four to a word: uint32 (words of an entry, entries)."""

    def make() -> np.ndarray:
        book = codebook(name)
        digits = book.entries[:, None] >> np.arange(book.digits, dtype=np.uint32) * np.uint32(book.bits)
        values = book.values[digits & np.uint32((1 << book.bits) - 1)].astype(np.int32)
        words = (factor * values + zero).astype(np.uint8).view(np.uint32)
        return np.ascontiguousarray(words.T)

    return make


READERS: dict[str, Reader] = {
    "Q4_0": Reader(read_q4_0, 32, 32, 8),
    "Q4_1": Reader(read_q4_1, 32, 32, 0, True),
    "Q5_0": Reader(read_q5_0, 32, 32, 16),
    "Q5_1": Reader(read_q5_1, 32, 32, 0, True),
    "Q8_0": Reader(read_q8_0, 32, 32, 128),
    "Q8_1": Reader(read_q8_1, 32, 32, 128),
    "Q2_K": Reader(read_q2_k, 128, 16, 0, True),
    "Q3_K": Reader(read_q3_k, 128, 16, 4),
    "Q4_K": Reader(read_q4_k, 64, 32, 0, mins=True),
    "Q5_K": Reader(read_q5_k, 64, 32, 0, mins=True),
    "Q6_K": Reader(read_q6_k, 128, 16, 32),
    "Q8_K": Reader(read_q8_0, 32, 32, 128),
    "IQ4_NL": Reader(read_iq4_nl, 32, 32, 128),
    "IQ4_XS": Reader(read_iq4_xs, 32, 32, 128),
    "MXFP4": Reader(read_mxfp4, 32, 32, 128),
    "NVFP4": Reader(read_nvfp4, 16, 16, 128),
    "TQ1_0": Reader(read_tq1_0, 256, 32, 1),
    "TQ2_0": Reader(read_tq2_0, 128, 32, 1),
    "IQ1_S": Reader(read_iq1_s, 32, 32, 128, copied=False, grid=grid("IQ1_S", 8, 128)),
    "IQ1_M": Reader(read_iq1_m, 32, 16, 128, copied=False, grid=grid("IQ1_S", 8, 128)),
    "IQ2_XXS": Reader(read_iq2_xxs, 32, 32, 128, grid=grid("IQ2_XXS")),
    "IQ2_XS": Reader(read_iq2_xs, 32, 16, 128, grid=grid("IQ2_XS")),
    "IQ2_S": Reader(read_iq2_s, 32, 16, 128, grid=grid("IQ2_S")),
    "IQ3_XXS": Reader(read_iq3_xxs, 32, 32, 128, grid=grid("IQ3_XXS")),
    "IQ3_S": Reader(read_iq3_s, 32, 32, 128, grid=grid("IQ3_S")),
}


def fields(name: str) -> list[str]:
    """The planes that a reader wants: all but sums that are no part of the weights."""
    kind: Format = FORMATS[name]
    return [field.name for field in kind.fields if field.name != "bsums"]
