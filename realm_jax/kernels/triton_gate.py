"""The gated product of a feed-forward network, silu(gate) * up, of few rows, and what the next product wants of it, in
one launch. A Pallas Triton kernel; called by `model.layers`, which says in `jax.numpy` what it means.

A program writes a part of one row, for which it has to know the largest number of the whole row (not so for int8
arithmetic).
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from realm_jax.kernels import operand, pallas
from realm_jax.kernels.int8_row import PREPARED, Records
from realm_jax.kernels.operand import Form, Operand
from realm_jax.kernels.pallas import Shape


def gated(gate: jax.Array, up: jax.Array, *, form: Form | Records) -> tuple[jax.Array, Operand | tuple[jax.Array, ...]]:
    """silu(gate) * up (..., F), computed in float32, in the type of gate; and the same in that form."""
    operands = [x.reshape(-1, gate.shape[-1]) for x in (gate, up)]
    int8 = isinstance(form, Records)
    part, warps = (PREPARED, 1) if int8 else (operand.choose_part(form), operand.warps(gate.shape[-1]))
    out, *outs = pallas.call(
        functools.partial(_gated, form=form, part=part),
        operands,
        (Shape(operands[0].shape, gate.dtype), *form.shapes()),
        grid=operand.grid(form, part),
        num_warps=warps,
        num_stages=1,
        name="gated",
    )
    return out.reshape(gate.shape), form.made(outs)


def _gated(gate_ref, up_ref, out_ref, *operand_refs, form: Form | Records, part: int) -> None:
    """A part of a row, or of none; of the whole row only how large it gets, if the form wants that."""
    rows, width = out_ref.shape
    row, own = operand.own_row(rows), operand.own_columns(form, part, width)
    others = operand.chunks(width) if isinstance(form, Form) else []
    own_parts, *parts = ([columns.load(ref, row) for ref in (gate_ref, up_ref)] for columns in (own, *others))
    product = _product(*own_parts).astype(out_ref.dtype)
    operand.store(out_ref, own, product)
    form.write(product, lambda: _largest(parts, out_ref.dtype), operand_refs, rows)


def _product(gate: jax.Array, up: jax.Array) -> jax.Array:
    gate, up = gate.astype(jnp.float32), up.astype(jnp.float32)
    return gate / (1 + jnp.exp(-gate)) * up


def _largest(parts: list[list[jax.Array]], dtype: jnp.dtype) -> jax.Array:
    """A number that rounds to the power of two, and something, that the largest |product| of gates and ups does; NaN or
    infinite, if that is.

    Every program of a row needs it, so it is computed the short way, silu(x) = (1 + tanh(x / 2)) x / 2 with the tanh of
    the hardware, and as it should be only where the error of that could lead to another power of two.
    """
    quick, bound = [], []
    for gate, up in parts:
        half = gate.astype(jnp.float32) * 0.5
        most = half * up.astype(jnp.float32)
        quick.append(most * pallas.quick_tanh(half) + most)
        bound.append(most)
    middle, error = operand.largest_of(quick), operand.largest_of(bound) * (2 * pallas.TANH_ERROR)
    least, most = (operand.exponent(limit, dtype) for limit in (middle - error, middle + error))
    return lax.cond(
        (least == most) & (most < 255),
        lambda: middle + error,
        lambda: operand.largest_of([_product(*part) for part in parts]),
    )
