"""The warp instructions of int8 arithmetic, each with its meaning for the interpreter; see `fragments`. Called by
`triton_int8`. Layouts: PTX ISA, "Matrix fragments for mma.m16n8k32" and "m16n8k16" of integers.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import triton as plt

from realm_jax.kernels import pallas
from realm_jax.kernels.fragments import Fragment, by_column, fma

EXACT = 1.5 * 2.0**23  # float32 from 2^23 to 2^24 are the whole numbers, in the order of their bits


def mma_int8(a: tuple[Fragment, ...], b: Fragment, unit: int, item: int) -> Fragment:
    """EXACT + A B in integers, as float32: A (16, 32 or 16) unsigned bytes and B (32 or 16, 8) signed ones.

    a: item `unit` of each, int32: of four or two, by sixteen of the inner axis row g, then row g + 8: bytes 4 t to
    4 t + 3 of it. b: item `item` and, where A has four, the next. Layout of the sums: `mma`. The sum is put on the bits
    of EXACT, a float32 whose last bit counts one; so it must stay within 2^22.
    """
    if pallas.interpreting():
        return EXACT + _product_int8(a, b, unit, item)
    halves = len(a) // 2
    left = ", ".join(f"${4 + 4 * i + unit}" for i in range(len(a)))
    right = ", ".join(f"${4 + 4 * len(a) + item + i}" for i in range(halves))
    kind, bits = f"m16n8k{16 * halves}.row.col.s32.u8.s8.s32", np.float32(EXACT).view(np.int32)
    text = f"""{{ .reg .b32 z, a, b, c, d; mov.b32 z, {bits};
        mma.sync.aligned.{kind} {{a, b, c, d}}, {{{left}}}, {{{right}}}, {{z, z, z, z}};
        mov.b32 $0, a; mov.b32 $1, b; mov.b32 $2, c; mov.b32 $3, d; }}"""
    return _asm(text, ["=f"] * 4 + ["r"] * 4 * (len(a) + 1), jnp.float32, *a, b)


def add_exact(
    sums: Fragment,
    levels: tuple[Fragment, Fragment] | None,
    scales: tuple[Fragment, Fragment],
    sizes: tuple[Fragment, Fragment],
    total: Fragment,
    items: tuple[int, int, int],
    one: bool,
) -> Fragment:
    """total + (sums - level) scale size, where `sums` are of `mma_int8`: the difference is exact.

    levels: of columns 2 t and of columns 2 t + 1, or None for EXACT. scales: of rows g and of rows g + 8. sizes: of the
    columns. items: which item of levels, scales and sizes. one: only column 0 counts; the others come out as anything.
    """
    level, scale, size = items
    if pallas.interpreting():
        less = EXACT if levels is None else by_column(*levels, level)
        low, high = scales
        row = jnp.stack([low[:, scale], low[:, scale], high[:, scale], high[:, scale]], 1)
        return fma((sums - less) * row, by_column(*sizes, size), total)
    counted = (0, 2) if one else range(4)
    lines = []
    for i in range(4):
        if i not in counted:
            lines.append(f"mov.b32 ${i}, 0;")
            continue
        less = f"0f{np.float32(EXACT).view(np.int32):08X}" if levels is None else f"${(24, 28)[i % 2] + level}"
        lines += [f"sub.rn.f32 x, ${4 + i}, {less};", f"mul.rn.f32 x, x, ${(8, 12)[i // 2] + scale};"]
        lines.append(f"fma.rn.f32 ${i}, x, ${(16, 20)[i % 2] + size}, ${(24 if levels is None else 32) + i};")
    operands = [sums, *scales, *sizes, *(levels or ()), total]
    text = f"{{ .reg .f32 x; {' '.join(lines)} }}"
    return _asm(text, ["=&f"] * 4 + ["f"] * 4 * len(operands), jnp.float32, *operands)


def round_to_int(x: jax.Array) -> jax.Array:
    """float32 to int32, halves to even; anything for NaN."""
    if pallas.interpreting():
        return jnp.round(x).astype(jnp.int32)
    return _asm("cvt.rni.s32.f32 $0, $1;", ["=r", "f"], jnp.int32, x, pack=1)


def _asm(text: str, constraints: list[str], dtype: jnp.dtype, *operands: jax.Array, pack: int = 4) -> jax.Array:
    shape = [pallas.Shape(operands[0].shape, dtype)]
    return plt.elementwise_inline_asm(
        text, args=list(operands), constraints=",".join(constraints), pack=pack, result_shape_dtypes=shape
    )[0]


def _product_int8(a: tuple[Fragment, ...], b: Fragment, unit: int, item: int) -> Fragment:
    """A B in float32 from fragments of bytes, for every warp; exact."""
    halves = len(a) // 2

    def bytes_of(words: jax.Array, dtype: jnp.dtype) -> jax.Array:
        return lax.bitcast_convert_type(words, dtype).astype(jnp.float32)

    a_wgthri = jnp.stack([bytes_of(part[:, unit], jnp.uint8) for part in a], 1).reshape(-1, 8, 4, halves, 2, 4)
    b_wnthi = bytes_of(b[:, item : item + halves], jnp.int8).reshape(-1, 8, 4, halves, 4)
    sums_wrgn = jnp.einsum("wgthri,wnthi->wrgn", a_wgthri, b_wnthi, precision=lax.Precision.HIGHEST)
    return sums_wrgn.reshape(-1, 2, 8, 4, 2).transpose(0, 2, 3, 1, 4).reshape(-1, 4)
