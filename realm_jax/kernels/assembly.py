"""Inline assembly for Triton kernels with what `pallas.triton.elementwise_inline_asm` lacks: addresses of what a ref
holds, several results, and effects. Called by the kernel modules.

The one place that takes names from JAX's private modules: its Triton lowering has no other way in.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax._src.lib.mlir import ir
from jax._src.lib.triton import dialect as triton
from jax._src.pallas.triton import lowering
from jax.extend.core import Primitive
from jax.interpreters import mlir

_assembly = Primitive("assembly")
_assembly.multiple_results = True


def assembly(
    text: str,
    constraints: Sequence[str],
    result: jax.ShapeDtypeStruct,
    *operands: jax.Array,
    addresses: Sequence[tuple[jax.Array, jax.Array]] = (),
    results: int = 1,
    pack: int = 1,
    pure: bool = True,
) -> jax.Array:
    """What the text leaves in its results, for each element of the operands, all of one shape.

    addresses: pairs of a ref and a flat place in it (int32, that shape): operands too, before the others, as the
    address of that item ("l"). results: 1, or 4: then they stand next to each other on a last axis, and all belong to
    one thread. pack: neighbours on the last axis that one instance of the text takes, and gives. pure: False for what
    has effects; it keeps its place among others of the kind, but is left out if nobody wants its result.
    """
    flat = [one for pair in addresses for one in pair] + list(operands)
    return _assembly.bind(
        *flat, text=text, constraints=",".join(constraints), result=result, addresses=len(addresses), results=results,
        pack=pack, pure=pure,
    )[0]  # fmt: skip


@_assembly.def_abstract_eval
def _(*operands, result: jax.ShapeDtypeStruct, results: int, **_static) -> list:
    return [jax.core.ShapedArray(result.shape if results == 1 else (*result.shape, results), result.dtype)]


@lowering.register_lowering(_assembly)
def _lower(_context, *operands, text, constraints, result, addresses, results, pack, pure) -> list:
    dtype = jnp.dtype(result.dtype)
    signless = jnp.dtype(f"int{8 * dtype.itemsize}") if dtype.kind == "u" else dtype
    shape, element = list(result.shape), mlir.dtype_to_ir_type(signless)
    values = []
    for ref, place in zip(operands[0 : 2 * addresses : 2], operands[1 : 2 * addresses : 2], strict=True):
        type = ir.RankedTensorType.get(shape, ref.type)
        values.append(triton.addptr(type, triton.splat(type, ref), place))
    values += operands[2 * addresses :]
    own = ir.RankedTensorType.get(shape, element)
    found = triton.elementwise_inline_asm(
        [own] * results, text, constraints=constraints, pure=pure, packed_element=pack, args=values
    )
    if results == 1:
        return [found]
    a, b, c, d = found

    def join(low: ir.Value, high: ir.Value, rank: int) -> ir.Value:
        return triton.join(ir.RankedTensorType.get(shape + [2] * rank, element), low, high)

    four = join(join(a, c, 1), join(b, d, 1), 2)
    return [triton.reshape(ir.RankedTensorType.get([*shape, 4], element), four, allow_reorder=False)]
