"""Queries, keys and values of a few new tokens (decoding, verifying) in one launch: queries and keys are rotated, and
keys and values written into the whole cache in place. A Pallas Triton kernel; called by `model.layers`, which says in
`jax.numpy` what it means.

One program takes one kv head of one token, with the query heads that share it. Nothing is summed, so the bits of a
token depend on nothing beside it.

Shape suffixes: `L` layers, `B` rows, `S` places of a row of the cache, `T` new tokens, `H` query heads, `K` kv heads,
`G` = H / K, `C` head width, `R` rotated pairs.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import triton as plt

from realm_jax.kernels import attention_plan, pallas
from realm_jax.kernels.pallas import Shape, load, program_id, store

MOST_TOKENS = attention_plan.SHORT
NEVER = np.iinfo(np.int32).max  # the place of a row that is not broken
STEP = np.float32(1 / 127)


class Arrays(NamedTuple):
    """What a cache holds, as in `model.cache.KVCache`: k, v (L, B, S, K, C); broken_B int32; scales (L, B, S, K), or
    None."""

    k: jax.Array
    v: jax.Array
    broken_B: jax.Array
    k_scale: jax.Array | None = None
    v_scale: jax.Array | None = None


def refuses(q_BTHC: jax.Array, k_LBSKC: jax.Array) -> str | None:
    """Why the kernel cannot serve queries of that shape and type and such a cache, or None if it can."""
    if not pallas.available():
        return "it needs an NVIDIA GPU from Ampere up"
    if q_BTHC.shape[1] > MOST_TOKENS or 0 in q_BTHC.shape:
        return f"it takes 1 to {MOST_TOKENS} tokens of a row"
    return attention_plan.refuses(q_BTHC, k_LBSKC)


def write(
    cache: Arrays,
    layer: jax.Array,
    row_B: jax.Array,
    place_BT: jax.Array,
    q_BTHC: jax.Array,
    k_BTKC: jax.Array,
    v_BTKC: jax.Array,
    cos_BTR: jax.Array,
    sin_BTR: jax.Array,
    *,
    halves: bool,
) -> tuple[jax.Array, Arrays]:
    """Rotated queries, and the cache with the rotated keys and the values of new tokens in it, in the same buffers.

    Everything as in `model.rope.rotate` and `model.cache.KVCache.write`. layer: int32.
    """
    B, T, K, _ = k_BTKC.shape
    held = [x for x in cache if x is not None]
    operands = [jnp.reshape(layer, 1).astype(jnp.int32), row_B.astype(jnp.int32), place_BT, cos_BTR, sin_BTR]
    operands += [q_BTHC, k_BTKC, v_BTKC]
    q_BTHC, *held = pallas.call(
        functools.partial(_write, halves=halves),
        [*operands, *held],
        tuple(Shape(x.shape, x.dtype) for x in (q_BTHC, *held)),
        grid=(K, T, B),
        num_stages=1,
        aliases={len(operands) + i: 1 + i for i in range(len(held))},
        name="write_cache",
    )
    return q_BTHC, Arrays(*held)


def _write(layer_ref, row_ref, place_ref, cos_ref, sin_ref, q_ref, k_ref, v_ref, *refs, halves: bool) -> None:
    """One kv head of one token, and its G query heads."""
    turned_ref, *outs = refs[len(refs) // 2 :]  # the first half are the cache's arrays, of which the others are aliases
    cache = Arrays(*outs)
    h, t, b = program_id(0), program_id(1), program_id(2)
    G = q_ref.shape[2] // k_ref.shape[2]
    turn = _Turn.load(cos_ref, sin_ref, (b, t), k_ref.shape[3], halves)

    group_G = jnp.arange(1 << (G - 1).bit_length(), dtype=jnp.int32)
    heads_G1 = (h * G + group_G)[:, None]
    q_GC = turn.apply(q_ref, (b, t, heads_G1), (group_G < G)[:, None])
    store(turned_ref.at[b, t, heads_G1, turn.column_1C], q_GC, mask=(group_G < G)[:, None] & turn.real_1C)

    row, place = load(row_ref.at[b]), load(place_ref.at[b, t])
    rows, size = cache.k.shape[1:3]
    kept = (row < rows) & (place < size)
    at = load(layer_ref.at[jnp.int32(0)]), row, place, h
    head_11 = jnp.broadcast_to(h, (1, 1))
    k_1C = turn.apply(k_ref, (b, t, head_11), True)
    v_1C = load(v_ref.at[b, t, head_11, turn.column_1C], mask=turn.real_1C, other=0)
    bad = jnp.int32(0)
    for x_1C, ref, scale_ref in ((k_1C, cache.k, cache.k_scale), (v_1C, cache.v, cache.v_scale)):
        x_1C = x_1C.astype(jnp.float32)
        fits_1C = jnp.abs(x_1C) <= float(jnp.finfo(jnp.float32 if scale_ref is not None else ref.dtype).max)
        bad = jnp.maximum(bad, jnp.max(jnp.where(fits_1C, 0, 1)))
        x_1C = jnp.where(fits_1C, x_1C, 0)
        if scale_ref is not None:
            x_1C, scale = _to_int8(x_1C)
            store(scale_ref.at[at], scale, mask=kept)
        store(ref.at[(*at, turn.column_1C)], x_1C.astype(ref.dtype), mask=kept & turn.real_1C)
    first = jnp.where(kept & (bad > 0), place, NEVER)
    plt.atomic_min(cache.broken_B, (jnp.minimum(row, rows - 1),), first)


class _Turn(NamedTuple):
    """The rotation of one token, for every channel of a head.

    column_1C, real_1C: channels, padded to a power of two, and which of them there are. partner_1C: the other one of
    the pair. turns_1C: whether the channel is rotated. cos_1C, sin_1C: what it and its partner are multiplied by.
    """

    column_1C: jax.Array
    real_1C: jax.Array
    partner_1C: jax.Array
    turns_1C: jax.Array
    cos_1C: jax.Array
    sin_1C: jax.Array

    @classmethod
    def load(cls, cos_ref, sin_ref, at: tuple, width: int, halves: bool) -> "_Turn":
        R = cos_ref.shape[-1]
        column = jnp.arange(1 << (width - 1).bit_length(), dtype=jnp.int32)[None, :]
        first = column < R if halves else column % 2 == 0
        angle = jnp.where(first, column, column - R) if halves else column // 2
        partner = jnp.where(first, column + R, column - R) if halves else column ^ 1
        turns = column < 2 * R
        cos, sin = (load(ref.at[(*at, angle)], mask=turns, other=0.0) for ref in (cos_ref, sin_ref))
        return cls(column, column < width, partner, turns, cos, jnp.where(first, -sin, sin))

    def apply(self, ref, at: tuple, mask: jax.Array | bool) -> jax.Array:
        """Rotated heads of an array of heads, in its own type."""
        x = load(ref.at[(*at, self.column_1C)], mask=mask & self.real_1C, other=0)
        other = load(ref.at[(*at, self.partner_1C)], mask=mask & self.turns_1C, other=0)
        turned = x.astype(jnp.float32) * self.cos_1C + other.astype(jnp.float32) * self.sin_1C
        return jnp.where(self.turns_1C, turned.astype(x.dtype), x)


def _to_int8(x_1C: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`model.cache.to_int8` of one head: whole numbers, float32, and their scale."""
    scale = jnp.max(jnp.abs(x_1C)) * STEP
    steps_1C = x_1C / jnp.where(scale > 0, scale, 1)
    return jnp.clip(_round(steps_1C), -127, 127), scale


def _round(x: jax.Array) -> jax.Array:
    """float32 to whole numbers, halves to even; Pallas has no such operation for Triton."""
    if pallas.interpreting():
        return jnp.round(x)
    shape = [Shape(x.shape, x.dtype)]
    return plt.elementwise_inline_asm(
        "cvt.rni.f32.f32 $0, $1;", args=[x], constraints="=f,f", pack=1, result_shape_dtypes=shape
    )[0]
