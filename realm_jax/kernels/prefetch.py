"""What is read next, fetched into the GPU's second-level cache while a product ends. Called by `triton_matmul`.

Weights do not depend on activations. So the last programs of a launch, once they have read their own, ask for the first
rows of the weights that are read next; else memory would idle while this launch ends, small kernels run, and the next
product begins. Nothing waits for what is asked for, and no result depends on it. Source: PTX ISA,
"cp.async.bulk.prefetch", "prefetch".
"""

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from realm_jax.errors import RealmError
from realm_jax.kernels import pallas
from realm_jax.kernels.assembly import assembly
from realm_jax.quant import QuantizedTensor

VARIABLE = "REALM_PREFETCH"  # MiB, in place of MOST_BYTES
MOST_BYTES = 16 * 2**20  # of a launch: a third of the cache of an H100, which has other things to hold
SMALL_CACHES = ("8.6", "8.7")  # compute capabilities of GPUs whose cache has 6 MB or less
PROGRAMS = 264  # that ask, at most: what earlier ones ask for would be gone before it is read
ALIGNMENT = 16  # bytes
LEAST = 8192  # bytes that a warp asks for, if there are as many: each time takes it some instructions
# Operands: the address of a warp's part, how many bytes that has, and 128 times the lane.
BULK = """{ .reg .pred p; mov.b32 $0, 0; setp.eq.s32 p, $3, 0; setp.gt.and.s32 p, $2, 0, p; @!p bra end;
    cp.async.bulk.prefetch.L2.global [$1], $2; end: }"""
LINES = """{ .reg .pred p; .reg .b32 at; .reg .b64 line; mov.b32 $0, 0; mov.b32 at, $3; cvt.s64.s32 line, at;
    add.s64 line, line, $1; next: setp.ge.s32 p, at, $2; @p bra end; prefetch.global.L2 [line];
    add.s32 at, at, 4096; add.s64 line, line, 4096; bra next; end: }"""


class Request(NamedTuple):
    """The static part of what a launch asks for: `counts`, bytes of each plane, from its first on; bulk: whether the
    GPU takes many at once (from Hopper on), or else lines of 128."""

    counts: tuple[int, ...] = ()
    bulk: bool = False


def request(weights: Sequence[jax.Array | QuantizedTensor]) -> tuple[list[jax.Array], Request]:
    """Planes to ask for, and how much of each, where these weights are read next, one after the other.

    Nothing in the interpreter. RealmError if REALM_PREFETCH is no number of MiB.
    """
    if pallas.interpreting() or not weights:
        return [], Request()
    found = first_rows(weights, most_bytes())
    bulk = int(pallas.capability().partition(".")[0]) >= 9
    return [plane for plane, _ in found], Request(tuple(count for _, count in found), bulk)


def most_bytes() -> int:
    """How many bytes a launch asks for, at most. RealmError if REALM_PREFETCH is no number of MiB."""
    text = os.environ.get(VARIABLE, "")
    if not text:
        return 0 if pallas.capability() in SMALL_CACHES else MOST_BYTES
    if not text.isdecimal() or int(text) > 1024:
        raise RealmError(f"{VARIABLE} is {text!r:.20}; want whole MiB, 0 to 1024")
    return int(text) * 2**20


def first_rows(weights: Sequence[jax.Array | QuantizedTensor], budget: int) -> list[tuple[jax.Array, int]]:
    """Planes of weights (N, K) that are read one after the other, and how many bytes of each belong to as many of the
    first rows as have `budget` bytes in all, rounded down to what is aligned."""
    found = []
    for w in weights:
        planes, outputs = jax.tree.leaves(w), max(1, w.shape[0])
        sizes = [plane.size * plane.dtype.itemsize // outputs for plane in planes]  # bytes of a row
        rows = min(outputs, budget // max(1, sum(sizes)))
        budget -= rows * sum(sizes)
        counts = [rows * size // ALIGNMENT * ALIGNMENT for size in sizes]
        found += [(plane, count) for plane, count in zip(planes, counts, strict=True) if count]
    return found


class Parts(NamedTuple):
    """How the first `count` bytes of a plane are cut for so many warps that ask for a part each: into `many` of `size`
    bytes, the last may have fewer. Part 0 is for warp `first`."""

    count: int
    size: int
    first: int
    warps: int

    @property
    def many(self) -> int:
        return -(-self.count // self.size)

    def of(self, warp: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Which part is for a warp, and how many bytes it has: 0, if there is none for it."""
        number = warp - self.first
        number = jnp.where(number < 0, number + self.warps, number)
        return number, jnp.clip(self.count - number * self.size, 0, self.size)


def cut(counts: Sequence[int], warps: int) -> list[Parts]:
    """Parts of planes for so many warps, which get nearly the same number of them."""
    found, first = [], 0
    for count in counts:
        size = max(LEAST, -(-count // (warps * ALIGNMENT)) * ALIGNMENT)
        found.append(Parts(count, size, first, warps))
        first = (first + found[-1].many) % warps
    return found


def fetch(refs: Sequence[Any], asked: Request, grid: tuple[int, int], warps: int) -> None:
    """In a program of `grid`, of so many warps: asks for its parts of the planes, if it is one of the last."""
    if not refs:
        return
    programs = grid[0] * grid[1]
    asking = min(programs, PROGRAMS)
    program = pallas.program_id(1) * grid[0] + pallas.program_id(0) - (programs - asking)
    thread = lax.broadcasted_iota(jnp.int32, (32 * warps,), 0)
    warp = thread // 32 * asking + program  # so that neighbouring parts are of different programs
    for ref, parts in zip(refs, cut(asked.counts, asking * warps), strict=True):
        number, count = parts.of(warp)
        operands = jnp.where(program < 0, 0, count), thread % 32 * 128
        address = [(ref, number * (parts.size // ref.dtype.itemsize))]
        text, result = BULK if asked.bulk else LINES, pallas.Shape(thread.shape, jnp.int32)
        assembly(text, ["=&r", "l", "r", "r"], result, *operands, addresses=address, pure=False, kept=True)
