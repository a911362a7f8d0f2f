"""The few warp instructions that `jax.numpy` cannot name, each with its meaning for the interpreter. Called by
`triton_matmul`.

A *fragment* is what the lanes of a warp hold of a small matrix. Here it is an array (P, 4): thread p = 32 warp + lane
holds the four items of row p. That is how Triton lays out arrays of this shape, because four 32-bit words are what a
thread loads at once; `tests/gpu` holds it. A lane is 4 g + t, g = 0..7 and t = 0..3. Layouts of the fragments: PTX ISA,
"Matrix fragments for mma.m16n8k16".
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import triton as plt

from realm_jax.kernels import pallas

Fragment = jax.Array


def mma(
    sums: Fragment, a: tuple[Fragment, Fragment, Fragment, Fragment], b: Fragment, unit: int, step: int
) -> Fragment:
    """sums + A B on the tensor cores: A (16, 16) and B (16, 8) of float16 pairs, sums (16, 8) float32.

    sums: a lane holds row g, columns 2 t and 2 t + 1, then row g + 8. a: item `unit` of each of four, int32: pairs of
    row g, of row g + 8, again of row g and of row g + 8. b: items 2 step and 2 step + 1, the pairs of column g that
    meet them.
    """
    if pallas.interpreting():
        return sums + _product(a, b, unit, step)
    registers = [f"${8 + 4 * i + unit}" for i in range(4)], [f"${24 + 2 * step}", f"${25 + 2 * step}"]
    left, right = (f"{{{', '.join(names)}}}" for names in registers)
    text = f"mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {{$0, $1, $2, $3}}, {left}, {right}, {{$4, $5, $6, $7}};"
    return _asm(text, ["=f"] * 4 + ["f"] * 4 + ["r"] * 20, jnp.float32, sums, *a, b)


def by_row(low: Fragment, high: Fragment, unit: int) -> Fragment:
    """Numbers of row g and of row g + 8, float32, as they meet `mma`'s sums: item `unit` of each, twice."""
    return _arranged(low, high, unit, (0, 0, 1, 1))


def by_column(even: Fragment, odd: Fragment, unit: int) -> Fragment:
    """Numbers of column 2 t and of column 2 t + 1, as they meet `mma`'s sums: item `unit` of each, for either row."""
    return _arranged(even, odd, unit, (0, 1, 0, 1))


def _arranged(first: Fragment, second: Fragment, unit: int, order: tuple[int, ...]) -> Fragment:
    if pallas.interpreting():
        return jnp.stack([(first, second)[which][:, unit] for which in order], 1)
    moves = [f"mov.b32 ${i}, ${4 + 4 * which + unit};" for i, which in enumerate(order)]
    return _asm(" ".join(moves), ["=f"] * 4 + ["f"] * 8, jnp.float32, first, second)


def fma(a: jax.Array, b: jax.Array, c: jax.Array) -> jax.Array:
    """a * b + c, rounded once; Triton contracts nothing by itself."""
    if pallas.interpreting():
        return a * b + c
    return _asm("fma.rn.f32 $0, $1, $2, $3;", ["=f", "f", "f", "f"], jnp.float32, a, b, c, pack=1)


def subtract_halves(pairs: jax.Array, number: int) -> jax.Array:
    """int32 that are two float16, less a float16 whose bits are `number` from both."""
    if pallas.interpreting():
        halves = lax.bitcast_convert_type(pairs, jnp.float16) - lax.bitcast_convert_type(
            jnp.uint16(number), jnp.float16
        )
        return lax.bitcast_convert_type(halves, jnp.int32)
    text = f"{{ .reg .b32 z; mov.b32 z, {number | number << 16}; sub.rn.f16x2 $0, $1, z; }}"
    return _asm(text, ["=r", "r"], jnp.int32, pairs, pack=1)


def look_up(table: np.ndarray, nibbles: jax.Array, high: bool) -> jax.Array:
    """Bytes of a table of 16 that the low (or high) nibbles of the four bytes of each uint32 name, as uint32."""
    if pallas.interpreting():
        out = jnp.zeros_like(nibbles)
        for byte in range(4):
            index = nibbles >> np.uint32(8 * byte + 4 * high) & np.uint32(15)
            value = sum(jnp.where(index == i, np.uint32(entry), np.uint32(0)) for i, entry in enumerate(table))
            out = out | value << np.uint32(8 * byte)
        return out
    words = table.astype(np.uint8).view(np.uint32)
    lines = [".reg .b32 " + ", ".join(["n0", "n1", "s", "m", "a", "b", *(f"w{i}" for i in range(4))]) + ";"]
    lines += [f"mov.b32 w{i}, {word};" for i, word in enumerate(words)]
    for half in range(2):  # prmt takes 3 bits of 4 nibbles; the fourth bit chooses between two results
        lines += [f"shr.u32 s, $1, {16 * half};", "shr.u32 m, s, 1;", "and.b32 m, m, 0x4444;", "or.b32 m, m, 0x3210;"]
        lines += [
            "and.b32 s, s, 0x7777;",
            "prmt.b32 a, w0, w1, s;",
            "prmt.b32 b, w2, w3, s;",
            f"prmt.b32 n{half}, a, b, m;",
        ]
    lines.append(f"prmt.b32 $0, n0, n1, {'0x7531' if high else '0x6420'};")
    return _asm(f"{{ {' '.join(lines)} }}", ["=r", "r"], jnp.int32, nibbles.astype(jnp.int32), pack=1).astype(
        jnp.uint32
    )


def _asm(text: str, constraints: list[str], dtype: jnp.dtype, *operands: jax.Array, pack: int = 4) -> jax.Array:
    shape = [pallas.Shape(operands[0].shape, dtype)]
    return plt.elementwise_inline_asm(
        text, args=list(operands), constraints=",".join(constraints), pack=pack, result_shape_dtypes=shape
    )[0]


def _product(a: tuple[Fragment, ...], b: Fragment, unit: int, step: int) -> Fragment:
    """A B in float32 from fragments, for every warp."""

    def halves(words: jax.Array) -> jax.Array:
        return lax.bitcast_convert_type(words, jnp.float16).astype(jnp.float32)

    a_wgtri = jnp.stack([halves(part[:, unit]) for part in a], 1).reshape(-1, 8, 4, 2, 2, 2)  # which pair, row, item
    b_wntr = halves(b[:, 2 * step : 2 * step + 2]).reshape(-1, 8, 4, 2, 2)
    sums_wrgn = jnp.einsum("wgtpri,wntpi->wrgn", a_wgtri, b_wntr, precision=lax.Precision.HIGHEST)
    return sums_wrgn.reshape(-1, 2, 8, 4, 2).transpose(0, 2, 3, 1, 4).reshape(-1, 4)
