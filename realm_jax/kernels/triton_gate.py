"""The gated product of a feed-forward network, silu(gate) * up, of few rows, and what the next product wants of it, in
one launch. A Pallas Triton kernel; called by `model.layers`, which says in `jax.numpy` what it means.

A program writes a part of one row, and computes all of it: see `operand.largest`. Shape suffixes: `M` rows, `F` width.
"""

import functools

import jax
import jax.numpy as jnp

from realm_jax.kernels import operand, pallas
from realm_jax.kernels.operand import Form, Operand
from realm_jax.kernels.pallas import Shape, load, program_id, store


def gated(gate: jax.Array, up: jax.Array, *, form: Form) -> tuple[jax.Array, Operand]:
    """silu(gate) * up (..., F), computed in float32, in the type of gate; and the same in that form."""
    operands = [x.reshape(-1, gate.shape[-1]) for x in (gate, up)]
    part = operand.choose_part(form)
    out, *outs = pallas.call(
        functools.partial(_gated, form=form, part=part),
        operands,
        (Shape(operands[0].shape, gate.dtype), *operand.shapes(form)),
        grid=operand.grid(form, part),
        num_warps=operand.warps(gate.shape[-1]),
        num_stages=1,
        name="gated",
    )
    return out.reshape(gate.shape), Operand(*outs)


def _gated(gate_ref, up_ref, out_ref, *operand_refs, form: Form, part: int) -> None:
    """A part of a row, or of none; of the whole row only how large it gets."""
    row, (rows, width) = program_id(0), out_ref.shape

    def read(column: jax.Array) -> list[jax.Array]:
        real = (column < width) & (row < rows)
        return [load(ref.at[row, column], mask=real, other=0) for ref in (gate_ref, up_ref)]

    own = operand.columns(part)
    own_parts, parts = read(own), [read(column) for column in operand.chunks(width)]
    product = _product(*own_parts).astype(out_ref.dtype)
    store(out_ref.at[row, own], product, mask=(own < width) & (row < rows))
    largest = operand.largest([_product(*part) for part in parts])
    operand.write(product.astype(jnp.float32), largest, *operand_refs, dtype=product.dtype, form=form)


def _product(gate: jax.Array, up: jax.Array) -> jax.Array:
    gate, up = gate.astype(jnp.float32), up.astype(jnp.float32)
    return gate / (1 + jnp.exp(-gate)) * up
