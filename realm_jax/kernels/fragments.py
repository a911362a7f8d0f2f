"""The few warp instructions that `jax.numpy` cannot name, each with its meaning for the interpreter. Called by
`triton_matmul`.

A *fragment* is what the lanes of a warp hold of a small matrix. Here it is an array (P, 4): thread p = 32 warp + lane
holds the four items of row p. That is how Triton lays out arrays of this shape, because four 32-bit words are what a
thread loads at once; `tests/gpu` holds it. A lane is 4 g + t, g = 0..7 and t = 0..3. Layouts of the fragments: PTX ISA,
"Matrix fragments for mma.m16n8k16".
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import triton as plt

from realm_jax.kernels import pallas
from realm_jax.kernels.assembly import assembly

Fragment = jax.Array
MMA = "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
GROUPED_MMA = "wgmma.mma_async.sync.aligned.m64n{}k16.f32.f16.f16"


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
    text = f"{MMA} {{$0, $1, $2, $3}}, {left}, {right}, {{$4, $5, $6, $7}};"
    return asm(text, ["=f"] * 4 + ["f"] * 4 + ["r"] * 20, jnp.float32, sums, *a, b)


def mins(low: Fragment, high: Fragment, t: Fragment) -> Fragment:
    """Bytes 2 and 3 of four words of row g and of row g + 8, as A (16, 8) of `mma_mins`: of a lane its t-th word's, two
    subnormal float16. int32; items 0 and 1 are the rows', the others 0."""
    if pallas.interpreting():
        own = [jnp.take_along_axis(words, t[:, :1], 1)[:, 0] for words in (low, high)]
        pairs = [(word >> np.uint32(16) & np.uint32(0xFF)) | (word >> np.uint32(24)) << np.uint32(16) for word in own]
        return jnp.stack([*pairs, 0 * own[0], 0 * own[0]], 1).astype(jnp.int32)
    text = "{ .reg .pred p, q; .reg .b32 a, b; setp.lt.u32 p, $12, 2; and.b32 a, $12, 1; setp.eq.u32 q, a, 0; "
    for i, first in enumerate((4, 8)):
        w = [f"${first + item}" for item in range(4)]
        text += f"selp.b32 a, {w[0]}, {w[1]}, q; selp.b32 b, {w[2]}, {w[3]}, q; selp.b32 a, a, b, p; "
        text += f"prmt.b32 ${i}, a, 0, 0x4342; "
    operands = low.astype(jnp.int32), high.astype(jnp.int32), t
    return asm(text + "mov.b32 $2, 0; mov.b32 $3, 0; }", ["=&r"] * 4 + ["r"] * 12, jnp.int32, *operands)


def mma_mins(zero: Fragment, a: Fragment, b: Fragment, item: int) -> Fragment:
    """A B for A (16, 8) of `mins` and B (8, 8), pairs of sums of x as an `Operand` has them, in `item`; float32, as
    `mma`'s sums."""
    if pallas.interpreting():
        both = a[:, :2], b[:, item]
        halves_a, halves_b = (lax.bitcast_convert_type(x, jnp.float16).astype(jnp.float32) for x in both)
        a_wgtri, b_wnti = halves_a.reshape(-1, 8, 4, 2, 2), halves_b.reshape(-1, 8, 4, 2)
        sums_wrgn = jnp.einsum("wgtri,wnti->wrgn", a_wgtri, b_wnti, precision=lax.Precision.HIGHEST)
        return as_sums(sums_wrgn)
    text = f"""mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {{$0, $1, $2, $3}}, {{$8, $9}}, {{${12 + item}}},
        {{$4, $5, $6, $7}};"""
    return asm(text, ["=f"] * 4 + ["f"] * 4 + ["r"] * 8, jnp.float32, zero, a, b)


def zeros(anchor: Fragment) -> Fragment:
    """Zeros, float32, that stand as Triton puts what is loaded from memory, four items a thread, and with them all
    that is computed from them. anchor: anything that is loaded so, 32 bits wide; it is not looked at."""
    if pallas.interpreting():
        return jnp.zeros(anchor.shape, jnp.float32)
    text = " ".join(f"mov.b32 ${i}, 0;" for i in range(4))
    return asm(text, ["=f"] * 4 + ["r"] * 4, jnp.float32, anchor)


def joined(*items: jax.Array) -> Fragment:
    """Four arrays (P,) of 32 bits as the items of one (P, 4)."""
    if pallas.interpreting():
        return jnp.stack(items, 1)
    text = " ".join(f"mov.b32 ${i}, ${4 + i};" for i in range(4))
    kind = "f" if items[0].dtype == jnp.float32 else "r"
    return assembly(
        text, [f"=&{kind}"] * 4 + [kind] * 4, pallas.Shape(items[0].shape, items[0].dtype), *items, results=4
    )


def add_scaled(sums: Fragment, low: Fragment, high: Fragment, total: Fragment, unit: int, one: bool) -> Fragment:
    """total + sums times a number of each row: item `unit` of `low` for row g, of `high` for row g + 8; rounded once.

    one: only column 0 counts; the others come out as anything.
    """
    if pallas.interpreting():
        return fma(sums, jnp.stack([low[:, unit], low[:, unit], high[:, unit], high[:, unit]], 1), total)
    counted = (0, 2) if one else range(4)
    text = " ".join(
        f"fma.rn.f32 ${i}, ${4 + i}, ${(8, 12)[i // 2] + unit}, ${16 + i};" if i in counted else f"mov.b32 ${i}, 0;"
        for i in range(4)
    )
    return asm(text, ["=&f"] * 4 + ["f"] * 16, jnp.float32, sums, low, high, total)


MATRIX_BYTES = 128  # eight columns by eight inputs of float16
TOGETHER = 4  # tiles whose instructions alternate, so that none waits for the one before it


class SubBlock(NamedTuple):
    """Sub-block `sub` of a unit in rows g and g + 8. Item `unit` of all arrays counts.

    words: for one or two 16 of weights, of either row. raised, mask, factors: see `lanes.Codes`; factors of either row,
    or None. scales: of either row; None: products are added as they are. offset: bytes to its first 16 inputs of the
    first tile of x.
    """

    words: Sequence[tuple[Fragment, Fragment]]
    raised: Sequence[int]
    mask: int
    factors: tuple[Fragment, Fragment] | None
    scales: tuple[Fragment, Fragment] | None
    unit: int
    sub: int
    offset: int


def add_products(
    totals: Sequence[Fragment], block: SubBlock, zero: int, address: Fragment, apart: int
) -> list[Fragment]:
    """totals and, scaled, the products of a sub-block by tiles of x in shared memory, `apart` bytes from one to the
    next. Not for the interpreter.

    zero: of the format. This is one assembly so that codes are unpacked where they are wanted, not all of a step
    before.
    """
    many, first = len(totals), 4 * len(totals)
    operands = _Operands(totals, address, [block])
    text = f"{{ .reg .f32 c<{4 * TOGETHER}>; .reg .b32 b<{4 * TOGETHER}>, {UNPACKING}, {_names(len(block.words))};\n"
    text += operands.unpack(block, zero, 0)
    for start in range(0, many, TOGETHER):
        tiles = range(start, min(many, start + TOGETHER))
        sums = [
            [f"c{4 * j + i}" if block.scales else f"${4 * tile + i}" for i in range(4)] for j, tile in enumerate(tiles)
        ]
        for j, tile in enumerate(tiles):
            read = ", ".join(f"b{4 * j + i}" for i in range(2 * len(block.words)))
            text += f"ld.shared.v{2 * len(block.words)}.b32 {{{read}}}, [${first} + {block.offset + apart * tile}];"
            text += "".join(f"mov.f32 {name}, 0f00000000;" for name in sums[j] if block.scales)
        for i in range(len(block.words)):
            for j in range(len(tiles)):
                right, own = f"b{4 * j + 2 * i}, b{4 * j + 2 * i + 1}", ", ".join(sums[j])
                text += f"{MMA} {{{own}}}, {{{_left(i)}}}, {{{right}}}, {{{own}}};\n"
        for j, tile in enumerate(tiles):
            text += operands.scaled(block, 4 * tile, sums[j])
    return operands.run(text + " }")


def add_grouped_products(
    totals: Sequence[Fragment], blocks: Sequence[SubBlock], zero: int, address: Fragment, apart: int
) -> list[Fragment]:
    """`add_products` of several sub-blocks, one after the other, by four warps together (on Hopper): they read x where
    it lies, as a grouped `operand.Form` has it. Either all have scales or none. Not for the interpreter.

    With scales, tiles are two halves: while the sums of one are scaled, those of the other are on their way: the next
    sub-block's, then. Source: PTX ISA, "wgmma.mma_async".
    """
    many, first, scaled = len(totals), 4 * len(totals), blocks[0].scales is not None
    halves = [range(0, many // 2), range(many // 2, many)] if many > 1 and scaled else [range(many)]
    operands = _Operands(totals, address, blocks)
    own = max(len(block.words) for block in blocks)  # registers of this sub-block, and of the next
    names = [f"c{i}" if scaled else f"${i}" for i in range(first)]
    text = f"""{{ .reg .f32 c<{first}>; .reg .b64 at, x; .reg .pred more; .reg .b32 {UNPACKING}, {_names(2 * own)};
        shr.u32 t, ${first}, 4; cvt.u64.u32 at, t;
        add.u64 at, at, {(MATRIX_BYTES >> 4) << 16 | (apart >> 4) << 32};\n"""

    def unpack(number: int) -> str:
        return operands.unpack(blocks[number], zero, number % 2 * own)

    def begin(number: int, tiles: range) -> str:
        sums = ", ".join(names[4 * tiles.start : 4 * tiles.stop])
        lines = ["wgmma.fence.sync.aligned;"]
        for i in range(len(blocks[number].words)):
            offset = blocks[number].offset + apart * tiles.start + 2 * MATRIX_BYTES * i
            left = _left(i + number % 2 * own)
            lines.append(f"add.u64 x, at, {offset >> 4}; setp.ne.b32 more, {0 if scaled and not i else 1}, 0;")
            lines.append(f"{GROUPED_MMA.format(8 * len(tiles))} {{{sums}}}, {{{left}}}, x, more, 1, 1, 0;\n")
        return "".join([*lines, "wgmma.commit_group.sync.aligned;\n"])

    text += unpack(0) + "".join(begin(0, tiles) for tiles in halves)
    for number, block in enumerate(blocks):
        last = number == len(blocks) - 1
        text += "" if last else unpack(number + 1)
        if not scaled:
            text += "" if last else begin(number + 1, halves[0])
            text += f"wgmma.wait_group.sync.aligned {0 if last else 1};\n"
            continue
        for i, tiles in enumerate(halves):
            text += f"wgmma.wait_group.sync.aligned {len(halves) - 1 - (i if last else 0)};\n"
            text += operands.scaled(block, 4 * tiles.start, names[4 * tiles.start : 4 * tiles.stop])
            text += "" if last else begin(number + 1, tiles)
    return operands.run(text + " }")


class _Operands:
    """Of an assembly of sub-blocks: the totals, which are its results, then an address, then what the blocks have."""

    def __init__(self, totals: Sequence[Fragment], address: Fragment, blocks: Sequence[SubBlock]) -> None:
        self.totals, self.address = totals, address
        bits = [array for block in blocks for pair in (*block.words, block.factors or ()) for array in pair]
        self.bits = list({id(array): array for array in bits}.values())
        self.scales = list({id(array): array for block in blocks for array in block.scales or ()}.values())

    def name(self, array: Fragment, unit: int) -> str:
        """The operand that is that item of a word, a factor or a scale."""
        place = next(i for i, other in enumerate([*self.bits, *self.scales]) if other is array)
        return f"${8 * len(self.totals) + 4 + 4 * place + unit}"

    def unpack(self, block: SubBlock, zero: int, first: int) -> str:
        """What its words hold, in `_left(first)` and those after it."""
        text = ""
        for i, (words, raised) in enumerate(zip(block.words, block.raised, strict=True), first):
            names = [self.name(word, block.unit) for word in words]
            if block.factors:
                factors = [self.name(factor, block.unit) for factor in block.factors]
                text += _multiplied(i, names, raised, block.mask, factors, block.sub)
            else:
                text += _unpacked(i, names, zero, raised)
        return text

    def scaled(self, block: SubBlock, first: int, sums: Sequence[str]) -> str:
        """Adds sums, scaled, to the totals from number `first` on; sums that are totals already need nothing."""
        scales = [self.name(scale, block.unit) for scale in block.scales or ()]
        lines = [
            f"fma.rn.f32 ${i}, {name}, {scales[i % 4 // 2]}, ${i};" for i, name in enumerate(sums, first) if scales
        ]
        return "".join(lines)

    def run(self, text: str) -> list[Fragment]:
        """What the text leaves in its results, as arrays like the totals."""
        many, bits = 4 * len(self.totals), [array.astype(jnp.int32) for array in self.bits]
        constraints = ["=f"] * many + ["r"] * 4 + [f"{i}" for i in range(many)]
        constraints += ["r"] * (4 * len(bits)) + ["f"] * (4 * len(self.scales))
        shape = pallas.Shape(self.totals[0].shape, jnp.float32)
        options = {"pack": 4, "pure": False, "arrays": len(self.totals)}
        found = assembly(text, constraints, shape, self.address, *self.totals, *bits, *self.scales, **options)
        return [found] if len(self.totals) == 1 else found


UNPACKING = "t, f, z"  # registers of `_unpacked` and `_multiplied`


def _names(count: int) -> str:
    """Registers for so many 16 of weights."""
    return ", ".join(_left(i) for i in range(count))


def _left(number: int) -> str:
    return ", ".join(f"a{4 * number + j}" for j in range(4))


def _unpacked(number: int, words: Sequence[str], zero: int, raised: int) -> str:
    """What words of rows g and g + 8 hold, in `_left(number)`."""
    text = _constants(zero, raised) if zero else ""
    for row, word in enumerate(words):
        low, high = f"a{4 * number + row}", f"a{4 * number + 2 + row}"
        text += f"and.b32 {low}, {word}, 0x00FF00FF; shr.u32 t, {word}, 8; and.b32 {high}, t, 0x00FF00FF;\n"
        text += "".join(_subtracted(half, half, raised) for half in (low, high)) if zero else ""
    return text


def _multiplied(number: int, words: Sequence[str], raised: int, mask: int, factors: Sequence[str], sub: int) -> str:
    """The same, times a factor of either row: see `lanes.halves_of`."""
    text, mask = "", 0x00010001 * (mask << raised)
    for row, (word, factor) in enumerate(zip(words, factors, strict=True)):
        low, high = f"a{4 * number + row}", f"a{4 * number + 2 + row}"
        text += f"and.b32 {low}, {word}, {mask}; shr.u32 t, {word}, 8; and.b32 {high}, t, {mask};\n"
        text += "".join(_times_factor(half, half, factor, sub) for half in (low, high))
    return text


def by_column(even: Fragment, odd: Fragment, unit: int) -> Fragment:
    """Numbers of column 2 t and of column 2 t + 1, as they meet `mma`'s sums: item `unit` of each, for either row."""
    if pallas.interpreting():
        return jnp.stack([even[:, unit], odd[:, unit], even[:, unit], odd[:, unit]], 1)
    moves = [f"mov.b32 ${i}, ${(4, 8)[i % 2] + unit};" for i in range(4)]
    return asm(" ".join(moves), ["=&f"] * 4 + ["f"] * 8, jnp.float32, even, odd)


def fma(a: jax.Array, b: jax.Array, c: jax.Array) -> jax.Array:
    """a * b + c, rounded once; Triton contracts nothing by itself. In the interpreter rounded twice, whatever XLA would
    do where."""
    if pallas.interpreting():
        product = a * b
        return jnp.where(product == product, product, jnp.inf) + c  # what stands between keeps LLVM from joining them
    return asm("fma.rn.f32 $0, $1, $2, $3;", ["=f", "f", "f", "f"], jnp.float32, a, b, c, pack=1)


def subtract_halves(pairs: jax.Array, number: int, raised: int = 0) -> jax.Array:
    """int32 that are two float16, divided by 2^raised, less a float16 whose bits are `number`; exact for codes."""
    if pallas.interpreting():
        halves = lax.bitcast_convert_type(pairs >> raised, jnp.float16)
        return lax.bitcast_convert_type(halves - lax.bitcast_convert_type(jnp.uint16(number), jnp.float16), jnp.int32)
    text = f"{{ .reg .b32 f, z; {_constants(number, raised)} {_subtracted('$0', '$1', raised)} }}"
    return asm(text, ["=r", "r"], jnp.int32, pairs, pack=1)


def _constants(number: int, raised: int) -> str:
    """What `_subtracted` needs, in registers z and f."""
    down, less = (15 - raised) << 10, number | 0x8000
    return f"mov.b32 z, {less | less << 16}; mov.b32 f, {down | down << 16};"


def _subtracted(to: str, pairs: str, raised: int) -> str:
    return f"fma.rn.f16x2 {to}, {pairs}, f, z;" if raised else f"add.rn.f16x2 {to}, {pairs}, z;"


def factors(words: jax.Array, raised: tuple[int, int], t: jax.Array) -> jax.Array:
    """Bytes 0 and 1 of each uint32 as two float16, each divided by 2 to the power of its `raised`; uint32."""
    if pallas.interpreting():
        found = [(words >> np.uint32(8 * i) & np.uint32(0xFF)).astype(jnp.float32) / 2 ** raised[i] for i in range(2)]
        return lax.bitcast_convert_type(jnp.stack(found, -1).astype(jnp.float16), jnp.uint32)
    low, high = (0x64 - 4 * up for up in raised)  # with a byte below, the bits of 1024 + byte, divided
    text = f"""{{ .reg .b32 z; mov.b32 z, {low << 8 | high << 24 | 0x80008000};
        prmt.b32 $0, $1, {low | high << 8}, $2; add.rn.f16x2 $0, $0, z; }}"""
    choice = t << 16 | 0x5140  # prmt takes the low half; t is there so that ptxas does not move a constant for each
    return asm(text, ["=r", "r", "r"], jnp.int32, words.astype(jnp.int32), choice, pack=1).astype(jnp.uint32)


def times_factor(pairs: jax.Array, factors: jax.Array, sub: int) -> jax.Array:
    """int32 that are two float16, subnormal ones, times float16 number `sub` of `factors`; exact for codes."""
    if pallas.interpreting():  # as whole numbers times 2^-24: XLA takes subnormal numbers for zeros
        codes = lax.bitcast_convert_type(pairs, jnp.uint16).astype(jnp.float32)
        factor = lax.bitcast_convert_type(factors, jnp.float16)[..., sub, None].astype(jnp.float32)
        return lax.bitcast_convert_type((codes * factor).astype(jnp.uint16), jnp.int32)
    text = f"{{ .reg .b32 f; {_times_factor('$0', '$1', '$2', sub)} }}"
    return asm(text, ["=r", "r", "r"], jnp.int32, pairs, factors.astype(jnp.int32), pack=1)


def _times_factor(to: str, pairs: str, factors: str, sub: int) -> str:
    """ptxas has the moves in the product, which can take either half of an operand for both."""
    own = f"{{ .reg .b16 f<2>; mov.b32 {{f0, f1}}, {factors}; mov.b32 f, {{f{sub}, f{sub}}}; }}"
    return f"{own} mul.rn.f16x2 {to}, {pairs}, f;\n"


def byte_after_two_to_23(word: jax.Array, which: int) -> jax.Array:
    """2^23 + a byte of each uint32, float32."""
    if pallas.interpreting():
        bits = word >> np.uint32(8 * which) & np.uint32(0xFF) | np.uint32(0x4B000000)
        return lax.bitcast_convert_type(bits, jnp.float32)
    text = f"prmt.b32 $0, $1, 0x4B000000, {0x7440 | which};"
    return asm(text, ["=f", "r"], jnp.float32, word.astype(jnp.int32), pack=1)


def merge(mask: np.uint32, ones: jax.Array, zeros: jax.Array) -> jax.Array:
    """Bits of `ones` where the mask has ones, of `zeros` elsewhere; uint32."""
    if pallas.interpreting():
        return ones & mask | zeros & ~mask
    text = f"lop3.b32 $0, $1, $2, {mask}, 0xE4;"  # LLVM and ptxas would take two instructions
    operands = ones.astype(jnp.int32), zeros.astype(jnp.int32)
    return asm(text, ["=r", "r", "r"], jnp.int32, *operands, pack=1).astype(jnp.uint32)


def sum_over_warps(sums: Fragment, warps: int) -> Fragment:
    """The sum of what the warps have in each of their lanes, one after the other: the first warp has it; in the
    interpreter there is nobody else, (32, 4)."""
    if warps == 1:
        return sums
    if pallas.interpreting():
        return functools.reduce(jnp.add, sums.reshape(warps, 32, 4))
    thread = lax.broadcasted_iota(jnp.int32, sums.shape, 0)
    text = f"""{{ .shared .align 16 .b8 sums[{512 * warps}]; .reg .b32 to; .reg .f32 a, b, c, d; .reg .pred p;
        mov.u32 to, sums; add.u32 to, to, $4; setp.ne.b32 p, $8, 0;
        st.shared.v4.f32 [to], {{$12, $13, $14, $15}}; bar.sync 0;
        mov.f32 $0, $12; mov.f32 $1, $13; mov.f32 $2, $14; mov.f32 $3, $15; """
    for warp in range(1, warps):
        text += f"@p ld.shared.v4.f32 {{a, b, c, d}}, [to + {512 * warp}]; "
        text += "".join(f"@p add.rn.f32 ${i}, ${i}, {'abcd'[i]}; " for i in range(4))
    operands = 16 * thread, (thread < 32).astype(jnp.int32), sums
    shape = pallas.Shape(sums.shape, jnp.float32)
    return assembly(text + "}", ["=&f"] * 4 + ["r"] * 8 + ["f"] * 4, shape, *operands, pack=4, pure=False)


def sum_over_t(sums: Fragment) -> Fragment:
    """Items 0 and 2 summed over the four lanes that have the same g, which all have it then; zeros for the others. Of t
    0 and 1, and of 2 and 3, first."""
    if pallas.interpreting():
        item = lax.broadcasted_iota(jnp.int32, sums.shape, 1)
        sums_wgti = jnp.where(item % 2 == 0, sums, 0).reshape(-1, 8, 4, 4)
        total = sums_wgti[:, :, 0] + sums_wgti[:, :, 1] + (sums_wgti[:, :, 2] + sums_wgti[:, :, 3])
        return jnp.broadcast_to(total[:, :, None], sums_wgti.shape).reshape(sums.shape)
    text = "{ .reg .f32 x, y; mov.b32 $1, 0; mov.b32 $3, 0; "
    for i in (0, 2):
        text += f"mov.b32 x, ${4 + i}; "
        for apart in (1, 2):
            text += f"shfl.sync.bfly.b32 y, x, {apart}, 31, 0xffffffff; add.rn.f32 x, x, y; "
        text += f"mov.b32 ${i}, x; "
    return asm(text + "}", ["=&f"] * 4 + ["f"] * 4, jnp.float32, sums)


def look_up(table: np.ndarray, nibbles: jax.Array) -> list[jax.Array]:
    """Bytes of a table of 16 that the low nibbles of the four bytes of each uint32 name, and those that the high ones
    do, as uint32."""
    if pallas.interpreting():
        found = []
        for first in (0, 4):
            out = jnp.zeros_like(nibbles)
            for bit in range(first, 32, 8):
                index = nibbles >> np.uint32(bit) & np.uint32(15)
                value = sum(jnp.where(index == i, np.uint32(entry), np.uint32(0)) for i, entry in enumerate(table))
                out = out | value << np.uint32(bit - first)
            found.append(out)
        return found
    # prmt takes 3 bits of each of 4 nibbles; the fourth bit chooses between two results.
    lines = [".reg .b32 s, m, a, b, n<2>, w<4>;"]
    lines += [f"mov.b32 w{i}, {word};" for i, word in enumerate(table.astype(np.uint8).view(np.uint32))]
    lines += ["and.b32 s, $2, 0x77777777; shr.u32 m, $2, 1; lop3.b32 m, m, 0x44444444, 0x32103210, 0xEA;"]
    for half in range(2):
        lines += ["shr.u32 s, s, 16; shr.u32 m, m, 16;"] * half
        lines += [f"prmt.b32 a, w0, w1, s; prmt.b32 b, w2, w3, s; prmt.b32 n{half}, a, b, m;"]
    lines += ["prmt.b32 $0, n0, n1, 0x6420; prmt.b32 $1, n0, n1, 0x7531;"]
    shape = pallas.Shape(nibbles.shape, jnp.int32)
    found = assembly(f"{{ {' '.join(lines)} }}", ["=&r", "=&r", "r"], shape, nibbles.astype(jnp.int32), arrays=2)
    return [half.astype(jnp.uint32) for half in found]


def as_sums(sums_wrgn: jax.Array) -> Fragment:
    """For the interpreter: sums of every warp, rows g and g + 8 (16 as 2, 8) by columns, as `mma` leaves them."""
    return sums_wrgn.reshape(-1, 2, 8, 4, 2).transpose(0, 2, 3, 1, 4).reshape(-1, 4)


def asm(text: str, constraints: list[str], dtype: jnp.dtype, *operands: jax.Array, pack: int = 4) -> jax.Array:
    """What the text leaves for every `pack` neighbours of the operands, in their shape."""
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
    return as_sums(sums_wrgn)
