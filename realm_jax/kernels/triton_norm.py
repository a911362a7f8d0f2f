"""Residual addition and root-mean-square norm of few rows in one launch, where XLA needs two, and what products want of
the result. A Pallas Triton kernel; called by `model.layers`, which says in `jax.numpy` what it means.

A program norms one row, and writes a part of it. The order of its sum depends on the width alone, so the bits of a row
do not depend on the rows beside it; XLA's do, since it compiles one row otherwise than several.

Shape suffixes: `M` rows, `D` width.
"""

import functools
import math

import jax
import jax.numpy as jnp

from realm_jax.kernels import operand, pallas
from realm_jax.kernels.int8_row import Records
from realm_jax.kernels.operand import Columns, Form, Operand
from realm_jax.kernels.pallas import Shape

MOST_ROWS = 64
WIDEST = 32768


def refuses(x: jax.Array) -> str | None:
    """Why the kernel cannot serve rows x (..., D), or None if it can."""
    if not pallas.available():
        return "it needs an NVIDIA GPU from Ampere up"
    rows = math.prod(x.shape[:-1])
    if not 1 <= rows <= MOST_ROWS or not 1 <= x.shape[-1] <= WIDEST:
        return f"it takes 1 to {MOST_ROWS} rows of {WIDEST} numbers at most"
    return None


def add_norm(
    x: jax.Array, more: jax.Array | None, weight_D: jax.Array, *, eps: float, form: Form | Records | None = None
) -> tuple[jax.Array, jax.Array, Operand | tuple[jax.Array, ...] | None]:
    """x + more, and its norm, both (..., D) in the type of x: the sum is rounded to it first. more: None is zero.

    form: None, or in which the norm is wanted too.
    """
    parts = [part.reshape(-1, x.shape[-1]) for part in (x, more) if part is not None]
    shape = Shape(parts[0].shape, x.dtype)
    part = operand.choose_part(form) if form else 0
    outs = pallas.call(
        functools.partial(_add_norm, eps=eps, form=form, part=part),
        [weight_D, *parts],
        (shape,) * len(parts) + (form.shapes() if form else ()),
        grid=operand.grid(form, part) if form else shape.shape[:1],
        num_warps=operand.warps(x.shape[-1]),
        num_stages=1,
        name="add_norm",
    )
    normed, *total = (out.reshape(x.shape) for out in outs[: len(parts)])
    return (total[0] if total else x), normed, form.made(outs[len(parts) :]) if form else None


def _add_norm(weight_ref, *refs, eps: float, form: Form | Records | None, part: int) -> None:
    """A part of a row, or of none; without a form all of it: of x, or of x and what is added to it."""
    count = (len(refs) - (len(form.shapes()) if form else 0)) // 2
    x_refs, (out_ref, *total_ref), operand_refs = refs[:count], refs[count : 2 * count], refs[2 * count :]
    rows, width = out_ref.shape
    row = operand.own_row(rows)

    def read(columns: Columns) -> tuple[jax.Array, jax.Array]:
        """The sum in the type of x, and the weights: these are read first, lest they be read when x has come."""
        weight = columns.load(weight_ref, in_order=True).astype(jnp.float32)
        x, *more = (columns.load(ref, row, in_order=True) for ref in x_refs)
        for other in more:
            x = (x.astype(jnp.float32) + other.astype(jnp.float32)).astype(out_ref.dtype)
        return x, weight

    whole = operand.columns(0, width, width)
    own = operand.own_columns(form, part, width) if form else whole
    x_D, weight_D = read(whole)
    total, weight = read(own) if form else (x_D, weight_D)
    x_D = x_D.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.sum(x_D * x_D) * (1 / width) + eps)
    normed = (total.astype(jnp.float32) * scale * weight).astype(out_ref.dtype)
    for ref, values in zip((out_ref, *total_ref), (normed, total), strict=False):
        operand.store(ref, own, values)
    if form:
        form.write(normed, lambda: operand.largest_of([x_D * scale * weight_D]), operand_refs, rows)
