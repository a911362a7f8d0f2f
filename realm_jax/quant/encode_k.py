"""Encoders that search: Q2_K to Q6_K. float32 weights to planes, in jnp, all blocks of an array at once.

Three steps. Every sub-block finds its own scale (and low end) among about the candidates that ggml's quantizers try.
The super-block finds `d` (and `dmin`), of which these are small integer multiples. Then everything is fitted to
everything else in turn, in the numbers that a reader will see: `d` and `dmin` to the codes by least squares, integers
to the best of their neighbours, codes to scales. ggml has the first two steps and a last rounding of the codes; the
bytes need not be the same. Which error is made small: see `methods`. Source: `quantize_row_q4_K_ref`,
`quantize_row_q4_K_impl` and their neighbours in ggml-quants.c.

Shapes: `S` sub-blocks of `n` weights in a super-block, `L` lanes (see `lanes`).
"""

from itertools import product
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from realm_jax.quant.fit import (
    SINGULAR,
    Sums,
    error_after,
    fit_scale,
    fit_scale_and_low,
    inverse,
    mean_square,
    normalized,
    quotient,
    round_to_codes,
)
from realm_jax.quant.lanes import Columns, columns, pack_words, to_lanes, total
from realm_jax.quant.methods import DEFAULT_METHOD, METHODS, importance_lanes, steps
from realm_jax.quant.opaque import settle
from realm_jax.quant.words import pack_halves

Planes = dict[str, jax.Array]


class Kind(NamedTuple):
    """What an encoder must know of a format, and how ggml weighs squared errors there.

    size: weights of a sub-block. codes, scales: lowest and highest code, and integer scale. mins: whether there are
    integer mins too, of the same range as the scales. tried: candidate scales of a sub-block, as codes beyond the last,
    without and with importance. spread: with importance i the weight of a squared error is
    i sqrt(spread mean(x^2) + x^2), the mean over the super-block; 0: just i. Without importance it is rms(x) + |x|, the
    root mean square over the sub-block, in all formats.
    """

    size: int
    codes: tuple[int, int]
    scales: tuple[int, int]
    mins: bool
    tried: tuple[np.ndarray, np.ndarray]
    spread: float


class Fit(NamedTuple):
    """A super-block as it will be read, but for a common factor; integers are held as float32.

    d, dmin: (L). scales, mins: (S, L). codes: (S, n, L). dmin and mins are 0 where the format has none.
    """

    d: jax.Array
    scales: jax.Array
    dmin: jax.Array
    mins: jax.Array
    codes: jax.Array


def fit_blocks(w: jax.Array, importance: jax.Array | None, method: str, kind: Kind) -> Fit:
    """Rows (..., K) as super-blocks: d and dmin float16 (L), scales and mins int32 (S, L), codes int32 (256, L)."""
    x, unit = normalized(to_lanes(w, 256))
    x = x.reshape(-1, kind.size, *unit.shape)
    weights = _weights(x, importance_lanes(importance, w, 256), kind, METHODS[method].plain)
    x_n, w_n = columns(x, 1), columns(weights, 1)
    tried = kind.tried[importance is not None]
    sum_w = settle(total(w_n))
    if kind.mins:
        scale, low = fit_scale_and_low(x_n, w_n, kind.codes[1] + tried, kind.codes[1])
        dmin, mins = _integers(low, sum_w, unit, kind)
    else:
        scale = fit_scale(x_n, w_n, kind.codes[0] - tried, *kind.codes)
        dmin, mins = jnp.zeros_like(unit), jnp.zeros_like(scale)
    d, scales = _integers(scale, sum_w, unit, kind)
    fit = _with_codes(x, d, scales, dmin, mins, kind)
    fit = lax.fori_loop(0, METHODS[method].rounds, lambda _, fit: _refit(x, w_n, unit, fit, kind), fit)
    d, dmin = ((number * unit).astype(jnp.float16) for number in (fit.d, fit.dmin))
    scales, mins, codes = (n.astype(jnp.int32) for n in (fit.scales, fit.mins, fit.codes))
    return Fit(d, scales, dmin, mins, codes.reshape(256, *unit.shape))


def _weights(x: jax.Array, importance: jax.Array | None, kind: Kind, plain: bool) -> jax.Array:
    """The weight of each squared error, (S, n, L)."""
    if importance is None:
        return settle(jnp.ones_like(x) if plain else rms_and_magnitude(x))
    importance = importance.reshape(x.shape)
    if not plain and kind.spread:
        importance *= jnp.sqrt(kind.spread * mean_square(x.reshape(256, *x.shape[2:])) + x**2)
    return settle(importance)


def _as_read(d: jax.Array, unit: jax.Array) -> jax.Array:
    """What d becomes when d * unit is stored as float16 and read again."""
    return settle(settle((d * unit).astype(jnp.float16)).astype(jnp.float32) / unit)


def _integers(scale: jax.Array, weights: jax.Array, unit: jax.Array, kind: Kind) -> tuple[jax.Array, jax.Array]:
    """Scales of sub-blocks (S, L) as d (L) times integers (S, L), the squared errors weighted (S, L)."""
    bottom, top = kind.scales
    end = steps(-0.9, 0.9, 0.1) + (bottom or top)
    d = _as_read(fit_scale(columns(scale), columns(weights), end, bottom, top), unit)
    return d, settle(round_to_codes(scale, settle(inverse(d)), bottom, top))


def _with_codes(x: jax.Array, d: jax.Array, scales: jax.Array, dmin: jax.Array, mins: jax.Array, kind: Kind) -> Fit:
    by, low = settle((inverse(d * scales), dmin * mins))
    codes = round_to_codes(x + low[:, None], by[:, None], *kind.codes)
    return Fit(d, scales, dmin, mins, settle(codes))


def _refit(x: jax.Array, w_n: Columns, unit: jax.Array, fit: Fit, kind: Kind) -> Fit:
    """d and dmin to the codes, then integers to d, dmin and the codes, then codes to all: no error grows."""
    d, scales, dmin, mins, codes = fit
    residuals = x - settle(d * scales)[:, None] * codes + settle(dmin * mins)[:, None]
    sums = Sums.of(w_n, columns(codes, 1), columns(residuals, 1))
    none = jnp.zeros_like(scales)
    sums = settle(sums._replace(ee=none) if kind.mins else Sums(none, none, sums.cc, none, sums.ce, none))
    new_d, new_dmin = _refit_d(d, scales, dmin, mins, sums, unit)
    grown, sunk = (new_d - d) * scales, (new_dmin - dmin) * mins  # the residuals lose so much a code, and gain so much
    e, ce = sums.e - grown * sums.c + sunk * sums.w, sums.ce - grown * sums.cc + sunk * sums.c
    sums = settle(sums._replace(e=e, ce=ce))

    best, chosen = none, (scales, mins)
    for steps_ in product((0, 1, -1), (0, 1, -1) if kind.mins else (0,)):
        pair = tuple(jnp.clip(n + step, *kind.scales) for n, step in zip((scales, mins), steps_, strict=True))
        found = error_after(sums, new_d * (pair[0] - scales), new_dmin * (pair[1] - mins))
        chosen = tuple(jnp.where(found < best, new, old) for new, old in zip(pair, chosen, strict=True))
        best = jnp.minimum(found, best)
    scales, mins = settle(chosen)
    return _with_codes(x, new_d, scales, new_dmin, mins, kind)


def _refit_d(
    d: jax.Array, scales: jax.Array, dmin: jax.Array, mins: jax.Array, sums: Sums, unit: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """d and dmin (L), rounded, that leave the least error for these integers and codes; the old where they do."""
    terms = scales**2 * sums.cc, scales * mins * sums.c, mins**2 * sums.w, scales * sums.ce, mins * sums.e
    cc, cm, mm, ce, me = settle(tuple(total(columns(term)) for term in terms))
    over = quotient(jnp.ones_like(cc), jnp.where(cc * mm - cm**2 > SINGULAR * cc * mm, cc * mm - cm**2, 0))
    whole = Sums(mm, cm, cc, me, ce, jnp.zeros_like(cc))
    best, chosen = jnp.zeros_like(d), (d, dmin)
    for more_d, more_dmin in (
        ((ce * mm - cm * me) * over, (cm * ce - cc * me) * over),
        (quotient(ce, cc), jnp.zeros_like(d)),
    ):
        pair = _as_read(d + more_d, unit), _as_read(jnp.maximum(dmin + more_dmin, 0), unit)
        found = error_after(whole, pair[0] - d, pair[1] - dmin)
        chosen = tuple(jnp.where(found < best, new, old) for new, old in zip(pair, chosen, strict=True))
        best = jnp.minimum(found, best)
    return settle(chosen)


def rms_and_magnitude(x: jax.Array) -> jax.Array:
    return jnp.sqrt(mean_square(jnp.moveaxis(x, 1, 0)))[:, None] + jnp.abs(x)


WITH_IMPORTANCE, SIGNED = steps(-0.9, 0.9, 0.05), steps(-0.9, 0.9, 0.1)
NIBBLE, SIX_BITS = (0, 15), (0, 63)
Q2_K = Kind(16, (0, 3), NIBBLE, True, (steps(-0.9, 1, 0.1), WITH_IMPORTANCE), 1)
Q3_K = Kind(16, (-4, 3), (-32, 31), False, (SIGNED, SIGNED), 2)
Q4_K = Kind(32, (0, 15), SIX_BITS, True, (steps(-1, 1, 0.1), WITH_IMPORTANCE), 2)
Q5_K = Kind(32, (0, 31), SIX_BITS, True, (steps(-0.5, 1, 0.1), WITH_IMPORTANCE), 2)
Q6_K = Kind(16, (-32, 31), (-128, 127), False, (SIGNED, SIGNED), 0)


def encode_q2_k(w: jax.Array, importance: jax.Array | None = None, method: str = DEFAULT_METHOD) -> Planes:
    d, scales, dmin, mins, codes = fit_blocks(w, importance, method, Q2_K)
    return {
        "d": pack_halves(d, dmin),
        "scales": pack_words(scales | mins << 4, 8, 2),
        "qs": pack_words(codes, 2, 8),
    }


def encode_q3_k(w: jax.Array, importance: jax.Array | None = None, method: str = DEFAULT_METHOD) -> Planes:
    d, scales, _, _, codes = fit_blocks(w, importance, method, Q3_K)
    codes = codes + 4
    return {
        "d": d,
        "scales": pack_words(scales + 32, 8, 2),
        "hmask": pack_words(codes >> 2, 1, 8),
        "qs": pack_words(codes & 3, 2, 8),
    }


def scales_of_chunks(scales: jax.Array, mins: jax.Array) -> jax.Array:
    """Integers (8, L) as one word a chunk of 64 weights: scale, scale, min, min."""
    bytes_ = jnp.concatenate([n.reshape(4, 2, *n.shape[1:]) for n in (scales, mins)], 1)
    return pack_words(bytes_.reshape(16, *scales.shape[1:]), 8, 1)


def encode_q4_k(w: jax.Array, importance: jax.Array | None = None, method: str = DEFAULT_METHOD) -> Planes:
    d, scales, dmin, mins, codes = fit_blocks(w, importance, method, Q4_K)
    return {"d": pack_halves(d, dmin), "scales": scales_of_chunks(scales, mins), "qs": pack_words(codes, 4, 8)}


def encode_q5_k(w: jax.Array, importance: jax.Array | None = None, method: str = DEFAULT_METHOD) -> Planes:
    d, scales, dmin, mins, codes = fit_blocks(w, importance, method, Q5_K)
    return {
        "d": pack_halves(d, dmin),
        "scales": scales_of_chunks(scales, mins),
        "qh": pack_words(codes >> 4, 1, 8),
        "qs": pack_words(codes & 0xF, 4, 8),
    }


def encode_q6_k(w: jax.Array, importance: jax.Array | None = None, method: str = DEFAULT_METHOD) -> Planes:
    d, scales, _, _, codes = fit_blocks(w, importance, method, Q6_K)
    codes = codes + 32
    return {
        "d": d,
        "scales": pack_words(scales & 0xFF, 8, 2),
        "ql": pack_words(codes & 0xF, 4, 16),
        "qh": pack_words(codes >> 4, 2, 8),
    }
