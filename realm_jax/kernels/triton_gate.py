"""The gated product of a feed-forward network, silu(gate) * up, of few rows, and what the next product wants of it, in
one launch. A Pallas Triton kernel; called by `model.layers`, which says in `jax.numpy` what it means.

One program takes one row. Shape suffixes: `M` rows, `F` width.
"""

import functools

import jax
import jax.numpy as jnp

from realm_jax.kernels import operand, pallas
from realm_jax.kernels.operand import Form, Operand
from realm_jax.kernels.pallas import Shape, load, program_id, store


def gated(gate: jax.Array, up: jax.Array, *, form: Form) -> tuple[jax.Array, Operand]:
    """silu(gate) * up (..., F), computed in float32, in the type of gate; and the same in that form."""
    parts = [part.reshape(-1, gate.shape[-1]) for part in (gate, up)]
    out, *outs = pallas.call(
        functools.partial(_gated, form=form),
        parts,
        (Shape(parts[0].shape, gate.dtype), *operand.shapes(form)),
        grid=(form.programs,),
        num_warps=operand.warps(gate.shape[-1]),
        num_stages=1,
        name="gated",
    )
    return out.reshape(gate.shape), Operand(*outs)


def _gated(gate_ref, up_ref, out_ref, *operand_refs, form: Form) -> None:
    """One row, or none."""
    row, (rows, width) = program_id(0), out_ref.shape
    column_F = jnp.arange(1 << (width - 1).bit_length(), dtype=jnp.int32)
    real_F = (column_F < width) & (row < rows)
    gate_F, up_F = (load(ref.at[row, column_F], mask=real_F, other=0).astype(jnp.float32) for ref in (gate_ref, up_ref))
    product_F = gate_F / (1 + jnp.exp(-gate_F)) * up_F
    store(out_ref.at[row, column_F], product_F.astype(out_ref.dtype), mask=real_F)
    pallas.barrier()
    operand.write(out_ref, *operand_refs, form=form)
