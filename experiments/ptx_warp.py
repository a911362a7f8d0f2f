"""What the lanes of warps compute together in PTX: products of small matrices, shuffles, reductions. Called by
`ptx_machine`.

Registers of all threads are (threads,) uint32, lane after lane, warp after warp. Source: NVIDIA, PTX ISA, "Warp Level
Matrix Multiply-Accumulate Instructions", "Asynchronous Warpgroup Level Matrix Instructions", "shfl.sync" and
"redux.sync".
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from ptx_arithmetic import dtype_of, is_float
from realm_jax.errors import RealmError

Array = np.ndarray
MMA = re.compile(r"mma\.sync\.aligned\.m16n8k(\d+)\.row\.col\.(f32|s32)\.(f16|bf16|s8|u8)\.(f16|bf16|s8|u8)\.\2")
GROUPED = re.compile(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k16\.f32\.f16\.f16")
REDUCE = {"add": np.add, "min": np.minimum, "max": np.maximum}
WAYS = {"up": np.subtract, "down": np.add, "bfly": np.bitwise_xor}


def multiply(opcode: str, a: Sequence[Array], b: Sequence[Array], c: Sequence[Array]) -> list[Array]:
    """mma: A (16, k) B (k, 8) + C (16, 8) of every warp, from the fragments of its lanes; the fragments of the result.
    Summed exactly, and rounded once."""
    found = MMA.fullmatch(opcode)
    if not found or is_float(found[2]) != is_float(found[3]):
        raise RealmError("this product is not simulated")
    depth, result, (of_a, of_b) = int(found[1]), found[2], found.groups()[2:]
    width = 16 // dtype_of(of_a).itemsize  # columns of A that one register of each lane has
    if len(a) != 2 * depth // width or len(b) != depth // width or len(c) != 4:
        raise RealmError("it has other numbers of registers than the ISA says")
    right = np.concatenate([_matrix(register, of_b) for register in b], 2)  # a register has columns g
    return _add_product(_left(a, of_a), right, c, result)


def multiply_grouped(a: Sequence[Array], b: Array, c: Sequence[Array]) -> list[Array]:
    """wgmma: A (64, 16) B (16, columns) + C of every four warps; A and C from the fragments of their lanes, b: (warps,
    columns, 16) float16, as each warp has read it. Summed as `multiply` does."""
    left, right = _left(a, "f16"), b.astype(np.float64)
    tiles = [_add_product(left, right[:, 2 * i : 2 * i + 8], c[i : i + 4], "f32") for i in range(0, len(c), 4)]
    return [register for tile in tiles for register in tile]


def matrix_rows(descriptors: Array, columns: int) -> list[Array]:
    """Where the lanes of warps read the rows of eight inputs of B (16, columns) that a `wgmma` finds in shared memory:
    a column's first eight, its last, then the next column's; as many for each lane as there must be, from the first on
    again past the last. descriptors: without swizzling, (threads,) uint64."""
    if (descriptors >> np.uint64(46)).any() or (
        descriptors.reshape(-1, 128) != descriptors.reshape(-1, 128)[:, :1]
    ).any():
        raise RealmError("this descriptor of a matrix is not simulated")
    start, inner, outer = (
        (descriptors >> np.uint64(bit) & np.uint64(0x3FFF)).astype(np.int64) << 4 for bit in (0, 16, 32)
    )
    lane = np.arange(len(descriptors)) % 32
    rows = [(lane + first) % (2 * columns) for first in range(0, 2 * columns, 32)]
    return [start + row // 16 * outer + row % 2 * inner + row // 2 % 8 * 16 for row in rows]


def _left(a: Sequence[Array], kind: str) -> Array:
    """A (warps, 16, k): register i has rows g + 8 (i % 2)."""
    parts = [[_matrix(a[i], kind) for i in range(half, len(a), 2)] for half in range(2)]
    return np.concatenate([np.concatenate(row, 2) for row in parts], 1)


def _add_product(left: Array, right: Array, c: Sequence[Array], result: str) -> list[Array]:
    """The fragments of A B + C, from B's columns (warps, 8, k)."""
    halves = [_matrix(np.stack(c[i : i + 2], -1), result) for i in (0, 2)]
    total = (left @ right.transpose(0, 2, 1) + np.concatenate(halves, 1)).astype(dtype_of(result))
    rows = total.reshape(len(total), 2, 32, 2)  # of a warp: g or g + 8, lane, column 2 t or 2 t + 1
    return [np.ascontiguousarray(rows[:, i // 2, :, i % 2]).reshape(-1) for i in range(4)]


def _matrix(register: Array, kind: str) -> Array:
    """What lanes 4 g + t hold of 8 rows g: (warps, 8, columns) float64 or int64."""
    numbers = np.ascontiguousarray(register).view(dtype_of(kind))
    return numbers.astype(np.float64 if is_float(kind) else np.int64).reshape(len(register) // 32, 8, -1)


def item_addresses(addresses: Array, number: int, half: int, transposed: bool) -> Array:
    """ldmatrix and stmatrix: where lane 4 g + t has the low or the high half of its word of matrix `number`, of 16-bit
    items: of row g, column 2 t or 2 t + 1, or `transposed`. Lane 8 number + r has the address of row r."""
    lane = np.arange(len(addresses)) % 32
    row, column = lane // 4, 2 * (lane % 4) + half
    if transposed:
        row, column = column, row
    return addresses[np.arange(len(addresses)) - lane + 8 * number + row] + 2 * column


def shuffle(way: str, a: Array, by: Array, limits: Array) -> tuple[Array, Array]:
    """shfl.sync: what each lane gets of another's `a`, and whether there is one: its own, where not."""
    lane = np.arange(len(a)) % 32
    segment, most = (limits >> 8 & 31).astype(int), (limits & 31).astype(int)
    by, most = (by & 31).astype(int), lane & segment | most & ~segment
    source = lane & segment | by & ~segment if way == "idx" else WAYS[way](lane, by)
    there = source >= most if way == "up" else source <= most
    return a[np.arange(len(a)) - lane + np.where(there, source, lane)], there


def reduce(way: str, a: Array) -> Array:
    """redux.sync: the sum, least or largest `a` of each warp, for all of its lanes."""
    lanes = a.reshape(-1, 32)
    return np.broadcast_to(REDUCE[way].reduce(lanes, 1, keepdims=True, dtype=a.dtype), lanes.shape).reshape(-1)
