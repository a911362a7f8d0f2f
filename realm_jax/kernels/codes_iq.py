"""How a GPU thread reads the codes of the IQ formats from their planes: entries of grids. Called by `codes`.

What the bits mean is said in `quant.blocks_iq`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from realm_jax.kernels.lanes import BITS, SIGNS, Codes, Lane, eight_scale_bytes, scale, small, spread
from realm_jax.quant.codebooks import codebook
from realm_jax.quant.words import unpack_halves

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
