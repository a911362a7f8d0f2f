"""Queries, keys and values of a few new tokens (verifying) in one launch: queries and keys are rotated, and keys and
values written into the whole cache in place. A Pallas Triton kernel; called by `model.layers`, which says what it means
in `jax.numpy`. Where it can, `triton_attention` does the same in the launch that attends, with what is here.

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
from realm_jax.kernels.pallas import Shape, load, load_now, program_id, store, when

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
    turn = Turn.read(cos_ref, sin_ref, (b, t), True, k_ref.shape[3], halves)

    group_G = jnp.arange(1 << (G - 1).bit_length(), dtype=jnp.int32)
    heads_G1 = (h * G + group_G)[:, None]
    q_GC = turn.apply(q_ref, (b, t, heads_G1), (group_G < G)[:, None])
    store(turned_ref.at[b, t, heads_G1, turn.column_1C], q_GC, mask=(group_G < G)[:, None] & turn.real_1C)

    new = Heads.read(turn, k_ref, v_ref, (b, t, jnp.broadcast_to(h, (1, 1))), True)
    row, place = load(row_ref.at[b]), load(place_ref.at[b, t])
    rows, size = cache.k.shape[1:3]
    kept = (row < rows) & (place < size)
    new.put(cache, load(layer_ref.at[jnp.int32(0)]), row, h, *(jnp.broadcast_to(x, (1, 1)) for x in (place, kept)))


class Heads(NamedTuple):
    """The rotated key and the value of a kv head for each of a few tokens: (T, C), padded as a `Turn`'s."""

    k_TC: jax.Array
    v_TC: jax.Array
    column_1C: jax.Array
    real_1C: jax.Array

    @classmethod
    def read(cls, turn: "Turn", k_ref, v_ref, at: tuple, mask: jax.Array | bool) -> "Heads":
        v_TC = load_now(v_ref.at[(*at, turn.column_1C)], mask=mask & turn.real_1C, other=0)
        return cls(turn.apply(k_ref, at, mask, load_now), v_TC, turn.column_1C, turn.real_1C)

    def put(self, cache: Arrays, layer, row, h, place_T1: jax.Array, kept_T1: jax.Array) -> None:
        """Write them into a cache of refs, each at its place where it is kept; see `model.cache.KVCache.write`."""
        at = layer, row, place_T1, h
        fine_TC = True
        for x_TC, ref, scale_ref in ((self.k_TC, cache.k, cache.k_scale), (self.v_TC, cache.v, cache.v_scale)):
            x_TC = x_TC.astype(jnp.float32)
            fits_TC = jnp.abs(x_TC) <= float(jnp.finfo(jnp.float32 if scale_ref is not None else ref.dtype).max)
            fine_TC &= fits_TC
            x_TC = jnp.where(fits_TC, x_TC, 0)
            if scale_ref is not None:
                x_TC, scale_T1 = _to_int8(x_TC)
                store(scale_ref.at[at], scale_T1, mask=kept_T1)
            store(ref.at[(*at, self.column_1C)], x_TC.astype(ref.dtype), mask=kept_T1 & self.real_1C)
        first = jnp.min(jnp.where(kept_T1 & ~fine_TC, place_T1, NEVER))

        @when(first < NEVER)  # it waits for all that is stored
        def _():
            plt.atomic_min(cache.broken_B, (row,), first)


class Turn(NamedTuple):
    """The rotation of tokens, for every channel of a head.

    column_1C, real_1C: channels, padded to a power of two, and which of them there are. partner_1C: the other one of
    the pair, None for a neighbour. turns_1C: whether the channel is rotated. cos_XC, sin_XC: what it and its partner
    are multiplied by, of one token or of each.
    """

    column_1C: jax.Array
    real_1C: jax.Array
    partner_1C: jax.Array | None
    turns_1C: jax.Array
    cos_XC: jax.Array
    sin_XC: jax.Array

    @classmethod
    def read(cls, cos_ref, sin_ref, at: tuple, mask: jax.Array | bool, width: int, halves: bool, by=load) -> "Turn":
        """The rotation that stands at `at` in (B, T, R), where `mask` is true; loaded by `load` or `load_now`."""
        R, padded = cos_ref.shape[-1], attention_plan.padded(width)
        column = jnp.arange(padded, dtype=jnp.int32)[None, :]
        first = column < R
        partner = jnp.where(first, column + R, column - R) if halves else None
        angle = jnp.where(first, column, column - R) if halves else jnp.arange(padded // 2, dtype=jnp.int32)[None, :]
        turns = column < 2 * R
        there = mask & (turns if halves else angle < R)
        cos, sin = (by(ref.at[(*at, angle)], mask=there, other=0.0) for ref in (cos_ref, sin_ref))
        cos, sin = (cos, jnp.where(first, -sin, sin)) if halves else (_pairs(cos, cos), _pairs(-sin, sin))
        return cls(column, column < width, partner, turns, cos, sin)

    def apply(self, ref, at: tuple, mask: jax.Array | bool, by=load) -> jax.Array:
        """Rotated heads of an array of heads, in its own type; loaded by `load` or `load_now`."""
        x = by(ref.at[(*at, self.column_1C)], mask=mask & self.real_1C, other=0)
        if self.partner_1C is None:
            other = _pairs(*reversed(jax.lax.split(x.reshape(*x.shape[:-1], -1, 2), (1, 1), x.ndim)))
        else:
            other = by(ref.at[(*at, self.partner_1C)], mask=mask & self.turns_1C, other=0)
        turned = x.astype(jnp.float32) * self.cos_XC + other.astype(jnp.float32) * self.sin_XC
        return jnp.where(self.turns_1C, turned.astype(x.dtype), x)


def _pairs(first: jax.Array, second: jax.Array) -> jax.Array:
    """One of each in turn, on the last axis. No join of two: next to one, Triton puts what it multiplies otherwise."""
    number = jnp.arange(2, dtype=jnp.int32)[None, None, :]
    first, second = (x.reshape(*x.shape[:2], 1) for x in (first, second))
    return jnp.where(number == 0, first, second).reshape(first.shape[0], -1)


def _to_int8(x_TC: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`model.cache.to_int8` of heads: whole numbers, float32, and their scales (T, 1)."""
    scale_T1 = jnp.max(jnp.abs(x_TC), 1, keepdims=True) * STEP
    steps_TC = x_TC / jnp.where(scale_T1 > 0, scale_T1, 1)
    return jnp.clip(_round(steps_TC), -127, 127), scale_T1


def _round(x: jax.Array) -> jax.Array:
    """float32 to whole numbers, halves to even; Pallas has no such operation for Triton."""
    if pallas.interpreting():
        return jnp.round(x)
    shape = [Shape(x.shape, x.dtype)]
    return plt.elementwise_inline_asm(
        "cvt.rni.f32.f32 $0, $1;", args=[x], constraints="=f,f", pack=1, result_shape_dtypes=shape
    )[0]
