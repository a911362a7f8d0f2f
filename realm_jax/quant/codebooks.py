"""The tables of numbers that the codes of the IQ and FP4 formats point into: `codebooks.json`.

They are ggml's (`iq2xxs_grid` and its neighbours in ggml-common.h), written by tests/golden/make_codebooks.py.

A *value table* says what each digit stands for (16 values: digits are the 4-bit codes of IQ4_NL, MXFP4, ...). A *grid*
has entries of 4 or 8 digits on top of it: one index of a few bits names that many weights at once. An entry is stored
as one integer, first digit lowest, so that a decoder looks up one word for all its weights.
"""

import functools
import json
from importlib import resources
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


class Codebook(NamedTuple):
    """A value table and, for a grid, its entries.

    values: int8 (V,). digits: weights of an entry, 0 where there are no entries. entries: uint32 (E,).
    """

    values: np.ndarray
    digits: int
    entries: np.ndarray

    @property
    def bits(self) -> int:
        """The width of a digit."""
        return int(len(self.values) - 1).bit_length()


@functools.cache
def codebook(name: str) -> Codebook:
    """A codebook by the name of the format that has it; IQ1_M has that of IQ1_S, IQ4_XS of IQ4_NL, NVFP4 of MXFP4."""
    book = _file()[name]
    return Codebook(np.array(book["values"], np.int8), book["digits"], np.array(book["entries"], np.uint32))


@functools.cache
def _file() -> dict:
    return json.loads(resources.files("realm_jax.quant").joinpath("codebooks.json").read_text(encoding="utf-8"))


def grid_values(index: jax.Array, book: Codebook) -> jax.Array:
    """The weights that indices into a grid name: integers (...) below E to int32 (..., digits)."""
    words = jnp.asarray(book.entries).at[index].get(mode="promise_in_bounds")
    shifts = lax.iota(jnp.uint32, book.digits) * np.uint32(book.bits)
    return table_values(words[..., None] >> shifts & np.uint32((1 << book.bits) - 1), book)


def table_values(digits: jax.Array, book: Codebook) -> jax.Array:
    """What digits stand for: integers (...) below V to int32 (...).

    Four values are the bytes of one word that is shifted, and words are chosen by comparison: XLA's CPU backend does
    not vectorize look-ups in memory.
    """
    padded = np.zeros(-len(book.values) % 4, np.int8)
    words = np.concatenate([book.values, padded]).view(np.uint32)
    digits = digits.astype(jnp.uint32)
    word = jnp.full_like(digits, words[0])
    for i in range(1, len(words)):
        word = jnp.where(digits >= np.uint32(4 * i), words[i], word)
    byte = word >> ((digits & np.uint32(3)) << np.uint32(3))
    return lax.bitcast_convert_type(byte << np.uint32(24), jnp.int32) >> 24
