"""The warp instructions of int8 arithmetic, each with its meaning for the interpreter; see `fragments`. Called by
`triton_int8`. Layouts: PTX ISA, "Matrix fragments for mma.m16n8k32" and "m16n8k16" of integers.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from realm_jax.kernels import pallas
from realm_jax.kernels.assembly import assembly
from realm_jax.kernels.fragments import Fragment, as_sums, asm, by_column, fma

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
    return asm(text, ["=f"] * 4 + ["r"] * 4 * (len(a) + 1), jnp.float32, *a, b)


def add_exact(
    sums: Fragment,
    levels: tuple[Fragment, Fragment] | None,
    scales: tuple[Fragment, Fragment],
    sizes: tuple[Fragment, Fragment],
    total: Fragment,
    items: tuple[int, int, int],
) -> Fragment:
    """total + (sums - level) scale size, where `sums` are of `mma_int8`: the difference is exact.

    levels: of columns 2 t and of columns 2 t + 1, or None for EXACT. scales: of rows g and of rows g + 8. sizes: of the
    columns. items: which item of levels, scales and sizes.
    """
    level, scale, size = items
    if pallas.interpreting():
        less = EXACT if levels is None else by_column(*levels, level)
        low, high = scales
        row = jnp.stack([low[:, scale], low[:, scale], high[:, scale], high[:, scale]], 1)
        times = by_column(*sizes, size)
        return jnp.where(times == times, fma((sums - less) * row, times, total), jnp.nan)
    lines = []
    if levels is None:  # factors have 17 bits at most, so EXACT factor is exact, and this the same to the bit
        lines += [f"mul.rn.f32 n{row}, ${(8, 12)[row] + scale}, {_hex(-EXACT)};" for row in range(2)]
    for i in range(4):
        row, factor, times = i // 2, f"${(8, 12)[i // 2] + scale}", f"${(16, 20)[i % 2] + size}"
        if levels is None:
            lines.append(f"fma.rn.f32 x, ${4 + i}, {factor}, n{row}; fma.rn.f32 ${i}, x, {times}, ${24 + i};")
        else:
            lines.append(f"sub.rn.f32 x, ${4 + i}, ${(24, 28)[i % 2] + level}; mul.rn.f32 x, x, {factor};")
            lines.append(f"fma.rn.f32 ${i}, x, {times}, ${32 + i};")
    operands = [sums, *scales, *sizes, *(levels or ()), total]
    text = f"{{ .reg .f32 x, n0, n1; {' '.join(lines)} }}"
    return asm(text, ["=&f"] * 4 + ["f"] * 4 * len(operands), jnp.float32, *operands)


def mma_units(
    words: Sequence[tuple[Fragment, Fragment]], x: Fragment, masks: Sequence[Fragment], halves: int, signed: bool
) -> Fragment:
    """EXACT + the sums of sub-blocks of four units, one or two of each, times a row of x: number q of unit u in column
    2 u + q. float32, as `mma`'s sums.

    words: for each 16 weights of the sub-blocks, of either row. x: of a lane its words of the sub-block of column g, as
    many as `halves`. masks: for each q, item u all ones in column 2 u + q, else 0. halves: a sub-block has 16 or 32
    weights. signed: whether codes are.
    """
    words = [tuple(own.astype(jnp.int32) for own in rows) for rows in words]
    subs, masked = len(masks), []  # of each product: unit, its words, and what of x meets them: word, mask
    for unit in range(4):
        if halves == 2:
            masked += [(unit, words[2 * q : 2 * q + 2], [(0, q), (1, q)]) for q in range(subs)]
        else:
            masked.append((unit, words, [(0, q) for q in range(subs)]))
    if pallas.interpreting():
        total = EXACT
        for unit, own, pairs in masked:
            met = [x[:, word] & masks[q][:, unit] for word, q in pairs]
            b = jnp.stack(met + [jnp.zeros_like(met[0])] * (4 - len(met)), 1)
            total = total + _product_int8([row for rows in own for row in rows], b, unit, 0, signed)
        return total
    flat = [row for rows in words for row in rows]
    first = 4 + 4 * len(flat)  # operand of x; then the masks

    def name(rows: tuple, row: int, unit: int) -> str:
        place = next(i for i, other in enumerate(flat) if other is rows[row])
        return f"${4 + 4 * place + unit}"

    kind = f"m16n8k{16 * len(masked[0][1])}.row.col.s32.{'s' if signed else 'u'}8.s8.s32"
    text = f"{{ .reg .b32 c<8>, x<2>; {' '.join(f'mov.b32 c{i}, 0;' for i in range(8))}\n"
    for unit, own, pairs in masked:
        sums = ", ".join(f"c{4 * (unit // 2) + i}" for i in range(4))  # two chains: they wait for each other less
        text += "".join(
            f"and.b32 x{i}, ${first + word}, ${first + 4 + 4 * q + unit}; " for i, (word, q) in enumerate(pairs)
        )
        left = ", ".join(name(rows, row, unit) for rows in own for row in range(2))
        right = ", ".join(f"x{i}" for i in range(len(pairs)))
        text += f"mma.sync.aligned.{kind} {{{sums}}}, {{{left}}}, {{{right}}}, {{{sums}}};\n"
    bits = np.float32(EXACT).view(np.int32)
    text += " ".join(f"add.s32 c{i}, c{i}, c{4 + i}; add.s32 c{i}, c{i}, {bits};" for i in range(4))
    text += " ".join(f"mov.b32 ${i}, c{i};" for i in range(4)) + "}"
    return asm(text, ["=&f"] * 4 + ["r"] * (first + 4 * subs), jnp.float32, *flat, x, *masks)


def add_units(
    totals: Fragment, sums: Fragment, levels: Fragment | None, scales: Fragment, sizes: Fragment, halves: int,
    subs: int, offsets: Fragment | None,
) -> Fragment:  # fmt: skip
    """totals, items 0 and 2 for rows g and g + 8, and what the sub-blocks of unit t add to them, one after the other.

    sums: of `mma_units`. levels: where their counting begins, or None for EXACT; with offsets the sums of x instead.
    scales, offsets: of row g, of either sub-block, then of row g + 8. sizes: of either sub-block, or one of both.
    """
    counted = [(row, q) for row in range(2) for q in range(subs)]
    if pallas.interpreting():
        own = [totals[:, 0], totals[:, 2]]
        for row, q in counted:
            i, level = 2 * row + q, EXACT if offsets is not None or levels is None else levels[:, q]
            times = sizes[:, q if halves == 2 else 0]
            own[row] = jnp.where(times == times, fma((sums[:, i] - level) * scales[:, i], times, own[row]), jnp.nan)
            if offsets is not None:
                own[row] = fma(levels[:, q], offsets[:, i], own[row])
        return jnp.stack([own[0], 0 * own[0], own[1], 0 * own[1]], 1)
    arrays = [totals, sums, scales, sizes, *[array for array in (levels, offsets) if array is not None]]
    at = [4 + 4 * i for i in range(len(arrays))]
    text = f"{{ .reg .f32 x; mov.b32 $1, 0; mov.b32 $3, 0; mov.b32 $0, ${at[0]}; mov.b32 $2, ${at[0] + 2}; "
    for row, q in counted:
        i, to = 2 * row + q, f"${2 * row}"
        level = _hex(EXACT) if offsets is not None or levels is None else f"${at[4] + q}"
        text += f"sub.rn.f32 x, ${at[1] + i}, {level}; mul.rn.f32 x, x, ${at[2] + i}; "
        text += f"fma.rn.f32 {to}, x, ${at[3] + (q if halves == 2 else 0)}, {to}; "
        text += f"fma.rn.f32 {to}, ${at[4] + q}, ${at[5] + i}, {to}; " if offsets is not None else ""
    return asm(text + "}", ["=&f"] * 4 + ["f"] * (4 * len(arrays)), jnp.float32, *arrays)


def own_mins(low: jax.Array, high: jax.Array) -> Fragment:
    """`mins` where a thread has its t-th word of either row (P,)."""
    if pallas.interpreting():
        pairs = jnp.stack(
            [jnp.stack([w >> np.uint32(8 * i) & np.uint32(0xFF) for i in (2, 3)], -1) for w in (low, high)], 1
        )
        return jnp.pad(lax.bitcast_convert_type(pairs.astype(jnp.bfloat16), jnp.int32), ((0, 0), (0, 2)))
    text = f"{{ .reg .b32 a, c, d; mov.b32 c, {0x3F803F80}; mov.b32 d, {0xC300C300}; "
    text += "".join(f"prmt.b32 a, ${4 + i}, 0x43434343, 0x4342; fma.rn.bf16x2 ${i}, a, c, d; " for i in range(2))
    shape, operands = pallas.Shape(low.shape, jnp.int32), (low.astype(jnp.int32), high.astype(jnp.int32))
    return assembly(text + "mov.b32 $2, 0; mov.b32 $3, 0; }", ["=&r"] * 4 + ["r"] * 2, shape, *operands, results=4)


def _hex(number: float) -> str:
    """A float32 as PTX writes it."""
    return f"0f{np.float32(number).view(np.uint32):08X}"


def mins(low: Fragment, high: Fragment, t: Fragment) -> Fragment:
    """Bytes 2 and 3 (below 128) of four words of row g and of row g + 8, as A (16, 8) of `mma_mins`: of a lane its t-th
    word's, two bfloat16 in an int32; items 0 and 1 are the rows', the others 0."""
    if pallas.interpreting():
        own = jnp.stack([jnp.take_along_axis(words, t[:, :1], 1)[:, 0] for words in (low, high)], 1)
        pairs = jnp.stack([own >> np.uint32(8 * i) & np.uint32(0xFF) for i in (2, 3)], -1).astype(jnp.bfloat16)
        return jnp.pad(lax.bitcast_convert_type(pairs, jnp.int32), ((0, 0), (0, 2)))
    # 0x4300 is 128 in bfloat16, and its last bit counts one.
    text = "{ .reg .pred p, q; .reg .b32 a, b, c, d; setp.lt.u32 p, $12, 2; and.b32 a, $12, 1; setp.eq.u32 q, a, 0; "
    text += f"mov.b32 c, {0x3F803F80}; mov.b32 d, {0xC300C300}; "
    for i, w in enumerate((4, 8)):
        text += f"selp.b32 a, ${w}, ${w + 1}, q; selp.b32 b, ${w + 2}, ${w + 3}, q; selp.b32 a, a, b, p; "
        text += f"prmt.b32 a, a, 0x43434343, 0x4342; fma.rn.bf16x2 ${i}, a, c, d; "
    operands = low.astype(jnp.int32), high.astype(jnp.int32), t
    return asm(text + "mov.b32 $2, 0; mov.b32 $3, 0; }", ["=&r"] * 4 + ["r"] * 12, jnp.int32, *operands)


def pieces_of_pairs(numbers: jax.Array) -> list[jax.Array]:
    """float32 (n, 2) as three int32 (n,) that each hold two bfloat16, which together are the numbers to the bit."""
    first = lax.broadcasted_iota(jnp.int32, numbers.shape, 1) == 0
    pieces = []
    for _ in range(3):
        bits = lax.bitcast_convert_type(numbers, jnp.int32) & -65536
        pieces.append(jnp.sum(jnp.where(first, bits >> 16 & 65535, bits), 1))
        numbers = numbers - lax.bitcast_convert_type(bits, jnp.float32)
    return pieces


def mma_mins(zero: Fragment, a: Fragment, b: Fragment) -> Fragment:
    """A B for A (16, 8) of `mins` and B (8, 8), whose `pieces_of_pairs` are items 0 to 2; float32, as `mma`'s sums."""
    if pallas.interpreting():
        halves_a, halves_b = (
            lax.bitcast_convert_type(x, jnp.bfloat16).astype(jnp.float32) for x in (a[:, :2], b[:, :3])
        )
        a_wgtri, b_wntpi = halves_a.reshape(-1, 8, 4, 2, 2), halves_b.reshape(-1, 8, 4, 3, 2)
        sums_wrgn = jnp.einsum("wgtri,wntpi->wrgn", a_wgtri, b_wntpi, precision=lax.Precision.HIGHEST)
        return as_sums(sums_wrgn)
    mma = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"  # A twice along its inner axis, against two pieces
    text = f"""{{ .reg .b32 n; .reg .f32 a, b, c, d; mov.b32 n, 0;
        {mma} {{a, b, c, d}}, {{$8, $9, $8, $9}}, {{$14, n}}, {{$4, $5, $6, $7}};
        {mma} {{$0, $1, $2, $3}}, {{$8, $9, $8, $9}}, {{$12, $13}}, {{a, b, c, d}}; }}"""
    return asm(text, ["=f"] * 4 + ["f"] * 4 + ["r"] * 8, jnp.float32, zero, a, b)


def steps_of(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`reference.int8_steps` of x (blocks, 2, 4, 4) float32, a block of 32 inputs: steps, int32, sizes (blocks,)."""
    size = jnp.max(jnp.max(jnp.max(jnp.abs(x), 3), 2), 1) / 127
    steps = round_to_int(x / jnp.where(size == 0, jnp.inf, size)[:, None, None, None])
    size = size + jnp.sum(jnp.sum(jnp.sum(x * 0, 3), 2), 1)  # the largest may have lost a NaN
    return jnp.clip(steps, -127, 127), size


def round_to_int(x: jax.Array) -> jax.Array:
    """float32 to int32, halves to even; anything for NaN."""
    if pallas.interpreting():
        return jnp.round(x).astype(jnp.int32)
    return asm("cvt.rni.s32.f32 $0, $1;", ["=r", "f"], jnp.int32, x, pack=1)


def _product_int8(a: Sequence[Fragment], b: Fragment, unit: int, item: int, signed: bool = False) -> Fragment:
    """A B in float32 from fragments of bytes, for every warp; exact. signed: whether those of A are."""
    halves = len(a) // 2

    def bytes_of(words: jax.Array, dtype: jnp.dtype) -> jax.Array:
        return lax.bitcast_convert_type(words, dtype).astype(jnp.float32)

    a_wgthri = jnp.stack([bytes_of(part[:, unit], jnp.int8 if signed else jnp.uint8) for part in a], 1).reshape(
        -1, 8, 4, halves, 2, 4
    )
    b_wnthi = bytes_of(b[:, item : item + halves], jnp.int8).reshape(-1, 8, 4, halves, 4)
    sums_wrgn = jnp.einsum("wgthri,wnthi->wrgn", a_wgthri, b_wnthi, precision=lax.Precision.HIGHEST)
    return as_sums(sums_wrgn)
