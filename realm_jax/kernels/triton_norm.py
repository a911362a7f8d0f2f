"""Residual addition and root-mean-square norm of few rows in one launch, where XLA needs two, and what products want of
the result. A Pallas Triton kernel; called by `model.layers`, which says in `jax.numpy` what it means.

One program takes one row. The order of its sum depends on the width alone, so the bits of a row do not depend on the
rows beside it; XLA's do, since it compiles one row otherwise than several.

Shape suffixes: `M` rows, `D` width.
"""

import functools
import math

import jax
import jax.numpy as jnp

from realm_jax.kernels import operand, pallas
from realm_jax.kernels.operand import Form, Operand
from realm_jax.kernels.pallas import Shape, load, program_id, store

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
    x: jax.Array, more: jax.Array | None, weight_D: jax.Array, *, eps: float, form: Form | None = None
) -> tuple[jax.Array, jax.Array, Operand | None]:
    """x + more, and its norm, both (..., D) in the type of x: the sum is rounded to it first. more: None is zero.

    form: None, or in which the norm is wanted too.
    """
    parts = [part.reshape(-1, x.shape[-1]) for part in (x, more) if part is not None]
    shape = Shape(parts[0].shape, x.dtype)
    outs = pallas.call(
        functools.partial(_add_norm, eps=eps, form=form),
        [weight_D, *parts],
        (shape,) * len(parts) + (operand.shapes(form) if form else ()),
        grid=(form.programs if form else shape.shape[0],),
        num_warps=operand.warps(x.shape[-1]),
        num_stages=1,
        name="add_norm",
    )
    normed, *total = (out.reshape(x.shape) for out in outs[: len(parts)])
    return (total[0] if total else x), normed, Operand(*outs[len(parts) :]) if form else None


def _add_norm(weight_ref, *refs, eps: float, form: Form | None) -> None:
    """One row: of x, or of x and what is added to it; or none."""
    count = (len(refs) - 3) // 2 if form else len(refs) // 2
    parts, (out_ref, *total_ref), operand_refs = refs[:count], refs[count : 2 * count], refs[2 * count :]
    row, (rows, width) = program_id(0), out_ref.shape
    column_D = jnp.arange(1 << (width - 1).bit_length(), dtype=jnp.int32)
    real_D = (column_D < width) & (row < rows)
    weight_D = load(weight_ref.at[column_D], mask=real_D, other=0).astype(jnp.float32)
    x_D, *more = (load(ref.at[row, column_D], mask=real_D, other=0).astype(jnp.float32) for ref in parts)
    if more:
        total_D = (x_D + more[0]).astype(out_ref.dtype)
        store(total_ref[0].at[row, column_D], total_D, mask=real_D)
        x_D = total_D.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.sum(x_D * x_D) * (1 / width) + eps)
    store(out_ref.at[row, column_D], (x_D * scale * weight_D).astype(out_ref.dtype), mask=real_D)
    if form:
        pallas.barrier()
        operand.write(out_ref, *operand_refs, form=form)
