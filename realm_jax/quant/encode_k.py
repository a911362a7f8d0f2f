"""Encoders that search: Q2_K to Q6_K. float32 weights to planes, in jnp, all blocks of an array at once.

Each sub-block tries a row of candidate scales; every candidate rounds the weights to codes, refits the scale (and
min) to these codes by weighted least squares, and the best stays. The super-block then rounds the scales of its
sub-blocks to 4, 6 or 8 bits, and the weights are rounded once more with the scales that the reader will see. Search
ranges and weights are those of ggml's quantizers without an importance matrix (ggml-quants.c), whose error this
matches to within a per cent or two; the bytes need not be the same.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from realm_jax.quant.encode_legacy import Planes, blocks_of, largest
from realm_jax.quant.words import pack, pack_bytes, pack_halves

NEGLIGIBLE = 1e-15  # smaller scales round to zero in float16 anyway, and must not be divided by


class Search(NamedTuple):
    """Candidate scales: the span of the weights over `top + step`, for `count` steps of 0.1 from `first` on.

    top: the largest code. absolute: compare candidates by their absolute instead of their squared error.
    """

    top: int
    first: float
    count: int
    absolute: bool = False

    def steps(self) -> jax.Array:
        return self.first + 0.1 * jnp.arange(self.count, dtype=jnp.float32)


def safe(x: jax.Array) -> jax.Array:
    """x where it can be divided by, else 1."""
    return jnp.where(jnp.abs(x) < NEGLIGIBLE, 1, x)


def fit_scale_and_min(x: jax.Array, weights: jax.Array, search: Search) -> tuple[jax.Array, jax.Array]:
    """For x ~ scale * code - low with codes 0..top and low >= 0: scale and low, (..., n) to (..., 1) each."""

    def total(values: jax.Array) -> jax.Array:
        return (weights * values).sum(-1, keepdims=True)

    def error(codes: jax.Array, scale: jax.Array, low: jax.Array) -> jax.Array:
        difference = scale * codes - low - x
        return total(jnp.abs(difference) if search.absolute else difference**2)

    def codes_for(step: jax.Array | float, low: jax.Array) -> jax.Array:
        return jnp.clip(jnp.round((search.top + step) / safe(high + low) * (x + low)), 0, search.top)

    def attempt(best: tuple[jax.Array, ...], step: jax.Array) -> tuple[tuple[jax.Array, ...], None]:
        codes = codes_for(step, best[2])
        sum_c, sum_cc, sum_cx = total(codes), total(codes**2), total(codes * x)
        determinant = sum_w * sum_cc - sum_c**2
        scale = (sum_w * sum_cx - sum_x * sum_c) / jnp.where(determinant > 0, determinant, 1)
        new_low = (sum_c * sum_cx - sum_cc * sum_x) / jnp.where(determinant > 0, determinant, 1)
        alone = sum_cx / jnp.where(sum_cc > 0, sum_cc, 1)  # the best scale if low may not go below 0
        scale, new_low = jnp.where(new_low < 0, alone, scale), jnp.maximum(new_low, 0)
        candidate = error(codes, scale, new_low), scale, new_low
        better = (determinant > 0) & (candidate[0] < best[0])
        return tuple(jnp.where(better, new, old) for new, old in zip(candidate, best, strict=True)), None

    high, low = x.max(-1, keepdims=True), jnp.maximum(-x.min(-1, keepdims=True), 0)
    sum_w, sum_x = total(jnp.ones_like(x)), total(x)
    first = (high + low) / search.top
    start = error(codes_for(0.0, low), first, low), first, low
    (_, scale, best_low), _ = lax.scan(attempt, start, search.steps())
    flat = high + low < NEGLIGIBLE
    return jnp.where(flat, 0, scale), jnp.where(flat, low, best_low)


def fit_scale(x: jax.Array, low: int) -> jax.Array:
    """For x ~ scale * code with codes low..-low - 1: the scale, either sign, (..., n) to (..., 1). Weights are x**2."""
    weights = x**2
    extreme = largest(x)

    def attempt(best: tuple[jax.Array, jax.Array], step: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
        codes = jnp.clip(jnp.round((low - step) / safe(extreme) * x), low, -low - 1)
        sum_cx, sum_cc = (weights * codes * x).sum(-1, keepdims=True), (weights * codes**2).sum(-1, keepdims=True)
        scale = sum_cx / jnp.where(sum_cc > 0, sum_cc, 1)
        candidate = scale * sum_cx, scale  # what the fit takes off the squared error
        better = (sum_cc > 0) & (candidate[0] > best[0])
        return tuple(jnp.where(better, new, old) for new, old in zip(candidate, best, strict=True)), None

    steps = 0.1 * jnp.concatenate([jnp.zeros(1), jnp.arange(-9, 10)]).astype(jnp.float32)
    (_, scale), _ = lax.scan(attempt, (jnp.zeros_like(extreme), extreme / low), steps)
    return jnp.where(jnp.abs(extreme) < NEGLIGIBLE, 0, scale)


def descend_scale(x: jax.Array, low: int, rounds: int = 5) -> jax.Array:
    """As `fit_scale`, by coordinate descent: each code in turn moves to where the scale of all the others wants it."""
    weights = x**2
    extreme = largest(x)
    codes = jnp.clip(jnp.round(low / safe(extreme) * x), low, -low - 1)
    start = codes, (weights * codes * x).sum(-1), (weights * codes**2).sum(-1)

    def move(step: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        codes, sum_cx, sum_cc = state
        at = step % x.shape[-1]
        x_i, w_i, c_i = (lax.dynamic_index_in_dim(a, at, -1, keepdims=False) for a in (x, weights, codes))
        others_cx, others_cc = sum_cx - w_i * x_i * c_i, sum_cc - w_i * c_i**2
        wanted = x_i * others_cc / jnp.where(others_cx > 0, others_cx, 1)
        new = jnp.clip(jnp.round(wanted), low, -low - 1)
        new_cx, new_cc = others_cx + w_i * x_i * new, others_cc + w_i * new**2
        better = (others_cx > 0) & (new_cc > 0) & (new_cx**2 * sum_cc > sum_cx**2 * new_cc)
        new, sum_cx, sum_cc = (jnp.where(better, a, b) for a, b in ((new, c_i), (new_cx, sum_cx), (new_cc, sum_cc)))
        return lax.dynamic_update_index_in_dim(codes, new, at, -1), sum_cx, sum_cc

    _, sum_cx, sum_cc = lax.fori_loop(0, rounds * x.shape[-1], move, start)
    return jnp.where(sum_cc > 0, sum_cx / jnp.where(sum_cc > 0, sum_cc, 1), 0)[..., None]


def round_scales(scales: jax.Array, top: int) -> tuple[jax.Array, jax.Array]:
    """Scales >= 0 of the sub-blocks (..., G, S) to d, float16 (..., G), and integers 0..top."""
    largest_scale = scales.max(-1, keepdims=True)
    integers = jnp.clip(jnp.round(top / safe(largest_scale) * scales), 0, top).astype(jnp.int32)
    return (largest_scale[..., 0] / top).astype(jnp.float16), integers


def round_signed_scales(scales: jax.Array, low: int) -> tuple[jax.Array, jax.Array]:
    """Scales of either sign (..., G, S) to d, float16 (..., G), and integers low..-low - 1."""
    extreme = largest(scales)
    integers = jnp.clip(jnp.round(low / safe(extreme) * scales), low, -low - 1).astype(jnp.int32)
    return (extreme[..., 0] / low).astype(jnp.float16), integers


def final_codes(x: jax.Array, scale: jax.Array, low: int, top: int) -> jax.Array:
    """Weights (..., G, S, n) over the scales (..., G, S) as read, as codes low..top (0 under a scale of 0)."""
    scale = scale[..., None]
    return jnp.where(scale == 0, 0, jnp.clip(jnp.round(x / jnp.where(scale == 0, 1, scale)), low, top)).astype(
        jnp.int32
    )


def sub_blocks(w: jax.Array, size: int) -> jax.Array:
    """Rows (..., K) as (..., G, 256 / size, size)."""
    x = blocks_of(w, 256)
    return x.reshape(*x.shape[:-1], 256 // size, size)


def times(d: jax.Array, integers: jax.Array) -> jax.Array:
    return d.astype(jnp.float32)[..., None] * integers


def pack_codes(codes: jax.Array, bits: int, words: int) -> jax.Array:
    """Codes (..., G, S, n) to word-major planes of `words` words a chunk."""
    parts = 8 // bits
    chunks = codes.shape[-3] * 256 // (parts * words * 4)
    return pack(codes.reshape(*codes.shape[:-3], chunks, parts, words, 4), bits)


def encode_scales_and_mins(x: jax.Array, search: Search, weights: jax.Array, bits: int) -> tuple[jax.Array, ...]:
    """What Q2_K, Q4_K and Q5_K share: the `d` plane, the integer scales and mins (..., G, S), and the codes."""
    scale, low = (fit[..., 0] for fit in fit_scale_and_min(x, weights, search))
    (d, scales), (dmin, mins) = (round_scales(fit, (1 << bits) - 1) for fit in (scale, low))
    codes = final_codes(x + times(dmin, mins)[..., None], times(d, scales), 0, search.top)
    return pack_halves(d, dmin), scales, mins, codes


def rms_and_magnitude(x: jax.Array) -> jax.Array:
    return jnp.sqrt((x**2).mean(-1, keepdims=True)) + jnp.abs(x)


def encode_q2_k(w: jax.Array) -> Planes:
    x = sub_blocks(w, 16)
    d, scales, mins, codes = encode_scales_and_mins(x, Search(3, -0.5, 16, absolute=True), jnp.abs(x), 4)
    both = scales | mins << 4
    return {
        "d": d,
        "scales": pack_bytes(both.reshape(*w.shape[:-1], -1, 8)),
        "qs": pack_codes(codes, 2, 8),
    }


def encode_q3_k(w: jax.Array) -> Planes:
    x = sub_blocks(w, 16)
    d, scales = round_signed_scales(descend_scale(x, -4)[..., 0], -32)
    codes = final_codes(x, times(d, scales), -4, 3) + 4
    return {
        "d": d,
        "scales": pack_bytes((scales + 32).reshape(*w.shape[:-1], -1, 8)),
        "hmask": pack_codes(codes >> 2, 1, 8),
        "qs": pack_codes(codes & 3, 2, 8),
    }


def six_bit_plane(scales: jax.Array, mins: jax.Array) -> jax.Array:
    """Integers (..., G, 8) to one word a chunk of 64 weights: scale, scale, min, min. (..., G * 4)"""
    lead = (*scales.shape[:-2], scales.shape[-2] * 4)
    values = jnp.concatenate([scales.reshape(*lead, 2), mins.reshape(*lead, 2)], -1)
    return pack_bytes(values)[..., 0, :]


def encode_q4_k(w: jax.Array) -> Planes:
    x = sub_blocks(w, 32)
    d, scales, mins, codes = encode_scales_and_mins(x, Search(15, -1.0, 21), rms_and_magnitude(x), 6)
    return {"d": d, "scales": six_bit_plane(scales, mins), "qs": pack_codes(codes, 4, 8)}


def encode_q5_k(w: jax.Array) -> Planes:
    x = sub_blocks(w, 32)
    d, scales, mins, codes = encode_scales_and_mins(x, Search(31, -0.5, 16), rms_and_magnitude(x), 6)
    return {
        "d": d,
        "scales": six_bit_plane(scales, mins),
        "qh": pack_codes(codes >> 4, 1, 8),
        "qs": pack_codes(codes & 0xF, 4, 8),
    }


def encode_q6_k(w: jax.Array) -> Planes:
    x = sub_blocks(w, 16)
    d, scales = round_signed_scales(fit_scale(x, -32)[..., 0], -128)
    codes = final_codes(x, times(d, scales), -32, 31) + 32
    return {
        "d": d,
        "scales": pack_bytes(scales.reshape(*w.shape[:-1], -1, 8)),
        "ql": pack_codes(codes & 0xF, 4, 16),
        "qh": pack_codes(codes >> 4, 2, 8),
    }
