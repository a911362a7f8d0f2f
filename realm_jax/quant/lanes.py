"""Blocks side by side: how the encoders lay out weights, so that every operation runs over many blocks at once.

An encoder needs sums over the weights of a block. XLA reduces an axis one number after the other, but fuses a chain of
additions of whole arrays into one vectorised loop. So blocks stand in the minor axis, in *lanes*; weight i of all
blocks is one array, a *column*; and a sum over a block is a sum of columns. A fused loop computes what it needs anew
for every number it writes: so a sum is `settle`d, made an array in memory, before it is spread over columns again.
Used by `fit` and the encoders.

Shapes: `L` lanes, the axes (..., G) of rows and their blocks.
"""

import functools
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from realm_jax.quant.opaque import settle

Columns = Sequence[jax.Array]

EXPONENT = np.uint32(0x7F800000)


def blocks_of(w: jax.Array, size: int) -> jax.Array:
    """Rows (..., K) as blocks where they stand, float32 (..., G, size): quicker than lanes for what needs no sums."""
    return w.astype(jnp.float32).reshape(*w.shape[:-1], w.shape[-1] // size, size)


def to_lanes(w: jax.Array, size: int) -> jax.Array:
    """Rows (..., K) in blocks of `size`: float32 (size, L)."""
    blocks = w.astype(jnp.float32).reshape(-1, size)  # XLA's CPU backend is quick with a plain transpose, and no other
    return settle(blocks.T).reshape(size, *w.shape[:-1], w.shape[-1] // size)


def columns(x: jax.Array, axis: int = 0) -> list[jax.Array]:
    """The arrays along an axis, one for each weight of a block."""
    return [lax.index_in_dim(x, i, axis, keepdims=False) for i in range(x.shape[axis])]


def total(terms: Iterable[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.add, terms)


def highest(terms: Iterable[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.maximum, terms)


def over_block(reduce: Callable[[Iterable[jax.Array]], jax.Array], x: jax.Array) -> jax.Array:
    """`total` or `highest` of x (n, L), n a multiple of 16, in two steps: one chain over 256 is slow to compile."""
    return settle(reduce(columns(settle(reduce(columns(x.reshape(-1, 16, *x.shape[1:]), 1))))))


def largest(terms: Iterable[jax.Array]) -> jax.Array:
    """The (first) number of greatest magnitude, sign and all."""
    return functools.reduce(lambda best, x: jnp.where(jnp.abs(x) > jnp.abs(best), x, best), terms)


def power_of_two(x: jax.Array) -> jax.Array:
    """The power of two at or below x >= 0, so that dividing by it rounds nothing; 1 where x is 0 or subnormal."""
    bits = lax.bitcast_convert_type(x, jnp.uint32) & EXPONENT
    return jnp.where(bits == 0, 1, lax.bitcast_convert_type(bits, jnp.float32))


def pack_words(codes: jax.Array, bits: int, words: int) -> jax.Array:
    """Unsigned codes (n, L), in the order of the weights, to a plane (..., words, G * chunks) of uint32.

    A chunk is `words` words, whose bytes hold fields of `bits` bits: first the lowest field of every byte, then the
    next. words=1 gives a plane without an axis of words.
    """
    parts = 8 // bits
    codes = codes.astype(jnp.uint32).reshape(-1, parts, words, 4, *codes.shape[1:])
    fields = [codes[:, p, :, b] << np.uint32(p * bits + 8 * b) for p in range(parts) for b in range(4)]
    return to_plane(settle(functools.reduce(jnp.bitwise_or, fields)))  # else written word by word, across the lanes


def to_plane(items: jax.Array) -> jax.Array:
    """Items (chunks, words, ..., G) as the plane (..., words, G * chunks); one word a chunk: (..., G * chunks)."""
    chunks, words, *rows, blocks = items.shape
    plane = jnp.moveaxis(items, (1, -1, 0), (-3, -2, -1)).reshape(*rows, words, blocks * chunks)
    return plane if words > 1 else plane[..., 0, :]
