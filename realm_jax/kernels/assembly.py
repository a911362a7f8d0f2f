"""Inline assembly for Triton kernels with what `pallas.triton.elementwise_inline_asm` lacks: addresses of what a ref
holds, several results, and effects. Called by the kernel modules.

The one place that takes names from JAX's private modules: its Triton lowering has no other way in. Where a JAX has
moved them, kernels are not `available`, and the rest of the package goes on without.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Effect, Primitive
from jax.interpreters import mlir

try:
    from jax._src.lib.mlir import ir
    from jax._src.lib.mlir.dialects import arith
    from jax._src.lib.triton import dialect as triton
    from jax._src.pallas.triton import lowering
except ImportError:
    lowering = None

_assembly = Primitive("assembly")
_assembly.multiple_results = True


class Kept(Effect):
    """Of assembly that JAX must not leave out though nobody wants its result."""


class Chosen(NamedTuple):
    """One of several refs that differ in their first axis alone: number `which`, a scalar of the program."""

    refs: tuple[Any, ...]
    which: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.refs[0].shape

    @property
    def dtype(self) -> jnp.dtype:
        return self.refs[0].dtype


def chosen(refs: tuple[Any, ...], which: jax.Array) -> Any:
    """A ref, or the choice of one."""
    return refs[0] if len(refs) == 1 else Chosen(refs, which)


def assembly(
    text: str,
    constraints: Sequence[str],
    result: jax.ShapeDtypeStruct,
    *operands: jax.Array,
    addresses: Sequence[tuple[Any, jax.Array]] = (),
    results: int = 1,
    arrays: int = 1,
    pack: int = 1,
    pure: bool = True,
    kept: bool = False,
) -> Any:
    """What the text leaves in its results, for each element of the operands, all of one shape.

    addresses: pairs of a ref (or `Chosen`) and a flat place in it (int32, that shape): operands too, before the others,
    as the address of that item ("l"). results: 1, or 4: then they stand next to each other on a last axis, and all
    belong to one thread. arrays: with more than 1 the text has results of so many arrays, which come as a list. pack:
    neighbours on the last axis that one instance of the text takes, and gives. pure: False for what has effects; it
    keeps its place among others of the kind, but is left out if nobody wants its result, unless `kept` (not in a loop).
    """
    flat, choices = [], []
    for ref, place in addresses:
        many = isinstance(ref, Chosen)
        flat += [*ref.refs, ref.which, place] if many else [ref, place]
        choices.append(len(ref.refs) if many else 1)
    static = {"result": result, "choices": tuple(choices), "results": results, "arrays": arrays, "pack": pack}
    static |= {"pure": pure, "kept": kept, "text": text, "constraints": ",".join(constraints)}
    found = _assembly.bind(*flat, *operands, **static)
    return found[0] if arrays == 1 else found


@_assembly.def_effectful_abstract_eval
def _(*operands, result, results: int, arrays: int, kept: bool, **_static) -> tuple[list, set[Effect]]:
    shape = result.shape if results == 1 else (*result.shape, results)
    return [jax.core.ShapedArray(shape, result.dtype)] * arrays, {Kept()} if kept else set()


def available() -> bool:
    """Whether this JAX has what the assembly is lowered with."""
    return lowering is not None


def _lower(_context, *operands, text, constraints, result, choices, results, arrays, pack, pure, kept) -> list:
    dtype = jnp.dtype(result.dtype)
    signless = jnp.dtype(f"int{8 * dtype.itemsize}") if dtype.kind == "u" else dtype
    shape, element = list(result.shape), mlir.dtype_to_ir_type(signless)
    rest, values = list(operands), []
    for count in choices:
        refs, rest = rest[:count], rest[count:]
        pointer = refs[0]
        if count > 1:
            which, *rest = rest
            for number, other in enumerate(refs[1:], 1):
                same = arith.cmpi(arith.CmpIPredicate.eq, which, arith.constant(which.type, number))
                pointer = arith.select(same, other, pointer)
        place, *rest = rest
        type = ir.RankedTensorType.get(shape, pointer.type)
        values.append(triton.addptr(type, triton.splat(type, pointer), place))
    values += rest
    own = ir.RankedTensorType.get(shape, element)
    found = triton.elementwise_inline_asm(
        [own] * (results * arrays), text, constraints=constraints, pure=pure, packed_element=pack, args=values
    )
    if results == 1:
        return [found] if arrays == 1 else list(found)
    a, b, c, d = found

    def join(low: ir.Value, high: ir.Value, rank: int) -> ir.Value:
        return triton.join(ir.RankedTensorType.get(shape + [2] * rank, element), low, high)

    four = join(join(a, c, 1), join(b, d, 1), 2)
    return [triton.reshape(ir.RankedTensorType.get([*shape, 4], element), four, allow_reorder=False)]


if available():
    lowering.register_lowering(_assembly)(_lower)
