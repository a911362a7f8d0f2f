"""The formats whose codes are indices into a grid: IQ1_S, IQ1_M, IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS, IQ3_S.

Byte layouts: `block_iq2_xxs` and its neighbours in ggml-common.h. An index of 8 to 11 bits names 8 weights (4 in IQ3)
of a codebook. In IQ2 and IQ3 these are magnitudes, and each weight has a sign bit; XXS and XS store seven of every
eight signs, and the eighth makes the number of negative weights even. In IQ1 the weights are -1, 0 and 1, all of them
shifted up or down by an eighth. A chunk is 32 weights; what takes less than a word a chunk is read by the block.

Shapes: G blocks of a row; `n` numbers of a block, in the order of the weights that they are about.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from realm_jax.quant.blocks_k import times, words
from realm_jax.quant.blocks_legacy import HALF
from realm_jax.quant.codebooks import codebook, grid_values
from realm_jax.quant.layout import F16, Affine, Field, Format, Number

Planes = dict[str, jax.Array]


def by_block(plane: jax.Array, chunks: int = 1) -> jax.Array:
    """A plane (..., W, G * chunks) in the order of the file, (..., G, chunks * W)."""
    return jnp.swapaxes(plane, -1, -2).reshape(*plane.shape[:-2], plane.shape[-1] // chunks, chunks * plane.shape[-2])


def split(items: jax.Array, count: int, bits: int) -> jax.Array:
    """The lowest `count` fields of `bits` bits of every item, lowest first: uint32 (..., n) to (..., n * count)."""
    fields = items[..., None] >> lax.iota(jnp.uint32, count) * np.uint32(bits) & np.uint32((1 << bits) - 1)
    return fields.reshape(*items.shape[:-1], items.shape[-1] * count)


def eighth_sign(seven: jax.Array) -> jax.Array:
    """Seven sign bits and the one that makes the number of ones even."""
    return seven | (lax.population_count(seven) & np.uint32(1)) << np.uint32(7)


def signed_codes(grid: str, index: jax.Array, signs: jax.Array, size: int) -> jax.Array:
    """Codes (..., G, S, size) of indices (..., G, n) into a grid of magnitudes, and a sign byte for every 8 weights."""
    magnitudes = grid_values(index, codebook(grid))
    negative = split(signs, 8, 1).reshape(magnitudes.shape)
    return in_sub_blocks(jnp.where(negative != 0, -magnitudes, magnitudes), size)


def shifted_codes(index: jax.Array, down: jax.Array, size: int) -> jax.Array:
    """Codes (..., G, S, size) of IQ1 in eighths: indices (..., G, 32), and for each whether its weights move down."""
    return in_sub_blocks(8 * grid_values(index, codebook("IQ1_S")) + jnp.where(down != 0, -1, 1)[..., None], size)


def in_sub_blocks(codes: jax.Array, size: int) -> jax.Array:
    """(..., G, entries, digits) to (..., G, S, size)."""
    return codes.reshape(*codes.shape[:-2], 256 // size, size)


def odd_scale(planes: Planes, integers: jax.Array, unit: float = 1) -> jax.Array:
    """d * unit * (2 i + 1) for the integers i of the sub-blocks: float32 (..., G, S). unit: a power of two."""
    return times(planes["d"], 2 * integers + 1) * jnp.float32(unit)


def decode_iq2_xxs(planes: Planes) -> Affine:
    index, other = (by_block(planes["qs"][..., i : i + 1, :], 8) for i in (0, 1))
    codes = signed_codes("IQ2_XXS", split(index, 4, 8), eighth_sign(split(other, 4, 7)), 32)
    return Affine(codes, odd_scale(planes, other >> np.uint32(28), 1 / 8))


def decode_iq2_xs(planes: Planes) -> Affine:
    both = split(by_block(planes["qs"], 8), 2, 16)
    codes = signed_codes("IQ2_XS", both & np.uint32(511), eighth_sign(both >> np.uint32(9)), 16)
    return Affine(codes, odd_scale(planes, split(by_block(planes["scales"]), 8, 4), 1 / 8))


def decode_iq2_s(planes: Planes) -> Affine:
    low, signs = (split(by_block(planes[name][..., None, :], 8), 4, 8) for name in ("qs", "signs"))
    high = split(by_block(planes["qh"]), 16, 2)
    codes = signed_codes("IQ2_S", low | high << np.uint32(8), signs, 16)
    return Affine(codes, odd_scale(planes, split(by_block(planes["scales"]), 8, 4), 1 / 8))


def decode_iq3_xxs(planes: Planes) -> Affine:
    index, other = split(by_block(planes["qs"], 8), 4, 8), by_block(planes["scales"][..., None, :], 8)
    codes = signed_codes("IQ3_XXS", index, eighth_sign(split(other, 4, 7)), 32)
    return Affine(codes, odd_scale(planes, other >> np.uint32(28), 1 / 4))


def decode_iq3_s(planes: Planes) -> Affine:
    low, high = split(by_block(planes["qs"], 8), 4, 8), split(by_block(planes["qh"]), 32, 1)
    signs = split(by_block(planes["signs"][..., None, :], 8), 4, 8)
    codes = signed_codes("IQ3_S", low | high << np.uint32(8), signs, 32)
    return Affine(codes, odd_scale(planes, split(planes["scales"][..., None], 8, 4)))


def decode_iq1_s(planes: Planes) -> Affine:
    low, high = split(by_block(planes["qs"][..., None, :], 8), 4, 8), split(by_block(planes["qh"]), 2, 16)
    down = jnp.repeat(high >> np.uint32(15), 4, axis=-1)
    codes = shifted_codes(low | split(high, 4, 3) << np.uint32(8), down, 32)
    return Affine(codes, odd_scale(planes, high >> np.uint32(12) & np.uint32(7), 1 / 8))


def decode_iq1_m(planes: Planes) -> Affine:
    low, high = split(by_block(planes["qs"][..., None, :], 8), 4, 8), split(by_block(planes["qh"]), 8, 4)
    codes = shifted_codes(low | (high & np.uint32(7)) << np.uint32(8), high >> np.uint32(3), 16)
    scales = split(split(by_block(planes["scales"]), 2, 16), 4, 3)
    return Affine(codes, odd_scale({"d": scattered_half(planes["scales"])}, scales, 1 / 8))


def half_bits(words: np.ndarray | jax.Array) -> np.ndarray | jax.Array:
    """The 16 bits that stand in the top nibbles of the four halves of two words, lowest first: (..., 2) to (...)."""
    low, high = words[..., 0], words[..., 1]
    nibbles = ((low, 12, 0x000F), (low, 24, 0x00F0), (high, 4, 0x0F00), (high, 16, 0xF000))
    return sum(word >> np.uint32(shift) & np.uint32(mask) for word, shift, mask in nibbles).astype(np.uint16)


def scattered_half(scales: jax.Array) -> jax.Array:
    """`d` of IQ1_M, whose nibbles stand above the scales of the sub-blocks: float16 (..., G)."""
    return lax.bitcast_convert_type(half_bits(by_block(scales)), jnp.float16)


SCATTERED_F16 = Number(F16.special, lambda plane: (scattered_half(plane).astype(jnp.float32),), half_bits)


def by_chunk(name: str, offset: int) -> Field:
    """A field with one word for each 32 weights."""
    return Field(name, offset, np.uint32, chunks=8)


IQ1_S = Format("IQ1_S", 256, 50, (HALF, by_chunk("qs", 2), words("qh", 34, 1, 4)), decode_iq1_s)
IQ1_M = Format(
    "IQ1_M", 256, 56,
    (
        by_chunk("qs", 0), words("qh", 32, 1, 4),
        words("scales", 48, 1, 2)._replace(floats=("d",), number=SCATTERED_F16),
    ),
    decode_iq1_m,
)  # fmt: skip
IQ2_XXS = Format("IQ2_XXS", 256, 66, (HALF, words("qs", 2, 8, 2)), decode_iq2_xxs)
IQ2_XS = Format("IQ2_XS", 256, 74, (HALF, words("qs", 2, 8, 2), words("scales", 66, 1, 2)), decode_iq2_xs)
IQ2_S = Format(
    "IQ2_S", 256, 82,
    (HALF, by_chunk("qs", 2), by_chunk("signs", 34), words("qh", 66, 1, 2), words("scales", 74, 1, 2)),
    decode_iq2_s,
)  # fmt: skip
IQ3_XXS = Format("IQ3_XXS", 256, 98, (HALF, words("qs", 2, 8, 2), by_chunk("scales", 66)), decode_iq3_xxs)
IQ3_S = Format(
    "IQ3_S", 256, 110,
    (
        HALF, words("qs", 2, 8, 2), words("qh", 66, 1, 2), by_chunk("signs", 74),
        Field("scales", 106, np.uint32),
    ),
    decode_iq3_s,
)  # fmt: skip
