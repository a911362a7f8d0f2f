"""Scales and offsets by weighted least squares: the searches that the encoders share.

A fit tries a row of candidate scales at once. For the codes of a candidate, five sums over the block say how scale and
offset should change to fit these codes best, and what error that leaves; the candidate with the least error wins. Then
codes and scale are fitted to each other in turn, which can only lower the error. All sums are of *residuals*, what the
candidate leaves of the weights: so small errors are told apart, and weights that a format holds exactly stay so.

All in columns (see `lanes`). Weights and their importance must be about 1 (`normalized`): products of five are summed.
Shapes: a column is (S, L): the S sub-blocks of a super-block, L lanes. `C` candidates.
"""

from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from realm_jax.quant.lanes import Columns, highest, largest, over_block, power_of_two, total
from realm_jax.quant.opaque import settle

ROUNDS = 2  # how often scale and codes are fitted to each other after a search
SINGULAR = 1e-6  # a determinant below this part of its largest is rounding noise


def quotient(x: jax.Array, y: jax.Array) -> jax.Array:
    """x / y, and 0 where y is not positive."""
    return jnp.where(y > 0, x / jnp.where(y > 0, y, 1), 0)


def inverse(x: jax.Array) -> jax.Array:
    """1 / x, and 0 where x is 0."""
    return jnp.where(x == 0, 0, 1 / jnp.where(x == 0, 1, x))


def normalized(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Numbers (n, L) over the power of two at or below their largest magnitude, and that power, (L)."""
    unit = settle(power_of_two(over_block(highest, jnp.abs(x))))
    return settle(x / unit), unit


def mean_square(x: jax.Array) -> jax.Array:
    """Of numbers (n, L): (L)."""
    return over_block(total, x**2) / len(x)


def round_to_codes(x: jax.Array, by: jax.Array, bottom: int, top: int) -> jax.Array:
    """round(x * by), kept in bottom..top, as float32."""
    return jnp.clip(jnp.round(x * by), bottom, top)


class Sums(NamedTuple):
    """Weighted sums over a block: of 1, c, c c, e, c e and e e, for codes c and residuals e."""

    w: jax.Array
    c: jax.Array
    cc: jax.Array
    e: jax.Array
    ce: jax.Array
    ee: jax.Array

    @classmethod
    def of(cls, w: Columns, codes: Iterable[jax.Array], residuals: Iterable[jax.Array]) -> "Sums":
        sums = [jnp.zeros((), jnp.float32)] * 6
        for w_i, c, e in zip(w, codes, residuals, strict=True):
            terms = w_i, w_i * c, w_i * c * c, w_i * e, w_i * c * e, w_i * e * e
            sums = [old + term for old, term in zip(sums, terms, strict=True)]
        return cls(*sums)


def fit_scale(x: Columns, w: Columns, steps: jax.Array, bottom: int, top: int) -> jax.Array:
    """For x ~ scale * code, codes bottom..top: the scale, of either sign, (S, L).

    steps: (C,), the candidates as codes (with fractions) for the weight of greatest magnitude.
    """
    extreme = settle(largest(x))
    candidates = settle(extreme / _spread(steps, extreme))
    sums = _scale_sums(_one_more_axis(x), _one_more_axis(w), candidates, bottom, top)
    scale = settle(_best(settle(sums.ee - sums.ce * quotient(sums.ce, sums.cc)), candidates))

    def refit(_: int, scale: jax.Array) -> jax.Array:
        sums = _scale_sums(x, w, scale, bottom, top)
        return scale + quotient(sums.ce, sums.cc)

    return settle(lax.fori_loop(0, 1 + ROUNDS, refit, scale))


def fit_scale_and_low(
    x: Columns, w: Columns, steps: jax.Array, top: int, *, negative_low: bool = False
) -> tuple[jax.Array, jax.Array]:
    """For x ~ scale * code - low, codes 0..top and scale >= 0: scale and low, each (S, L).

    steps: (C,), the candidates as numbers of codes for the span of the weights. negative_low: whether low may be < 0.
    """
    low, high = highest(-column for column in x), highest(x)
    low = low if negative_low else jnp.maximum(low, 0)
    low, span = settle((low, high + low))

    def changed(sums: Sums, low: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """By how much the best scale and low for these codes are greater, and the error that they leave."""
        determinant = sums.w * sums.cc - sums.c * sums.c
        regular = determinant > SINGULAR * sums.w * sums.cc  # else the codes cannot tell scale and low apart
        over = jnp.where(regular, 1 / jnp.where(regular, determinant, 1), 0)
        scale, new_low = (sums.w * sums.ce - sums.c * sums.e) * over, (sums.c * sums.ce - sums.cc * sums.e) * over
        bound = regular & (low + new_low < 0) & (not negative_low)
        new_low = jnp.where(bound, -low, new_low)
        scale = jnp.where(bound | ~regular, quotient(sums.ce + new_low * sums.c, sums.cc), scale)  # fitted alone
        return scale, new_low, error_after(sums, scale, new_low)

    candidates = settle(span / _spread(steps, span))
    sums = _affine_sums(_one_more_axis(x), _one_more_axis(w), candidates, low, top)
    scale = settle(_best(settle(changed(sums, low)[2]), candidates))

    def refit(_: int, fit: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        scale, low = fit
        more_scale, more_low, _ = changed(_affine_sums(x, w, scale, low, top), low)
        return jnp.maximum(scale + more_scale, 0), low + more_low

    return settle(lax.fori_loop(0, 1 + ROUNDS, refit, (scale, low)))


def error_after(sums: Sums, scale: jax.Array, low: jax.Array) -> jax.Array:
    """The sum of w e e when scale and low grow by so much, and the codes stay."""
    return sums.ee + scale * (scale * sums.cc - 2 * (sums.ce + low * sums.c)) + low * (low * sums.w + 2 * sums.e)


def _scale_sums(x: Columns, w: Columns, scale: jax.Array, bottom: int, top: int) -> Sums:
    by = inverse(scale)
    codes = [round_to_codes(x_i, by, bottom, top) for x_i in x]
    return Sums.of(w, codes, (x_i - scale * code for x_i, code in zip(x, codes, strict=True)))


def _affine_sums(x: Columns, w: Columns, scale: jax.Array, low: jax.Array, top: int) -> Sums:
    by = inverse(scale)
    codes = [round_to_codes(x_i + low, by, 0, top) for x_i in x]
    return Sums.of(w, codes, (x_i + low - scale * code for x_i, code in zip(x, codes, strict=True)))


def _best(errors: jax.Array, candidates: jax.Array) -> jax.Array:
    """The candidate with the (first) least error: both (C, ...), to (...)."""
    best, chosen = errors[0], candidates[0]
    for error, candidate in zip(errors[1:], candidates[1:], strict=True):
        chosen, best = jnp.where(error < best, candidate, chosen), jnp.minimum(error, best)
    return chosen


def _spread(steps: jax.Array, like: jax.Array) -> jax.Array:
    return steps.reshape(-1, *[1] * like.ndim)


def _one_more_axis(x: Columns) -> list[jax.Array]:
    return [column[None] for column in x]
