"""What is read next, fetched into the GPU's second-level cache while a product ends. Called by `triton_matmul` and
`triton_wide`.

Weights do not depend on activations. So the last programs of a launch, once they have read their own, ask for the first
rows of the weights that are read next; else memory would idle while this launch ends, small kernels run, and the next
product begins. Nothing waits for what is asked for, and no result depends on it. Source: PTX ISA,
"cp.async.bulk.prefetch", "prefetch".
"""

import math
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
LEAST, MOST = 2**13, 2**19  # bytes that a warp asks for: no fewer, if there are as many; one instruction takes 2^20


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
    if not (found := first_rows(weights, most_bytes())):
        return [], Request()
    return [plane for plane, _ in found], Request(tuple(count for _, count in found), bulk=pallas.from_hopper())


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
    """How the first `counts` bytes of planes are cut: into parts of `size` bytes, the last of each may have fewer."""

    counts: tuple[int, ...]
    size: int

    def of(self, number: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Part `number`: of which plane, from which byte on, and how many bytes; none past the last or below 0."""
        which, first, count = pallas.find_range(number, [-(-n // self.size) for n in self.counts], self.counts)
        first = first * self.size
        return which, first, jnp.where(number < 0, 0, jnp.clip(count - first, 0, self.size))


def cut(counts: tuple[int, ...], warps: int) -> Parts:
    """Parts of planes, one for a warp at most; where there are very few warps, the last parts are for none."""
    size = -(-sum(counts) // (max(1, warps - len(counts)) * ALIGNMENT)) * ALIGNMENT
    return Parts(counts, min(max(LEAST, size), MOST))


def fetch(refs: Sequence[Any], asked: Request, grid: tuple[int, int, int], warps: int) -> None:
    """In a program of `grid`, of so many warps: each asks for its part of the planes, if it is one of the last."""
    if not refs:
        return
    programs = math.prod(grid)
    asking = min(programs, PROGRAMS)
    program = pallas.program_id(0) + grid[0] * (pallas.program_id(1) + grid[1] * pallas.program_id(2))
    program = program - (programs - asking)
    thread = lax.broadcasted_iota(jnp.int32, (32 * warps,), 0)
    # Neighbouring parts are of different programs: so all have as much to do.
    number = jnp.where(program < 0, -1, thread // 32 * asking + program)
    operands = *cut(asked.counts, asking * warps).of(number), thread % 32 * 128
    addresses = [(ref, jnp.zeros_like(thread)) for ref in refs]
    constraints = ["=&r", *["l"] * len(refs), *["r"] * len(operands)]
    result = pallas.Shape(thread.shape, jnp.int32)
    text = _text(len(refs), asked.bulk)
    assembly(text, constraints, result, *operands, addresses=addresses, pure=False, kept=True)


def _text(planes: int, bulk: bool) -> str:
    """Operands: the addresses of planes; which of them, the first byte, and how many; 128 times the lane."""
    which, first, count, own = (f"${planes + i}" for i in range(1, 5))
    chosen = " ".join(f"setp.eq.s32 p, {which}, {i}; @p mov.b64 at, ${i + 1};" for i in range(1, planes))
    begin = f"""{{ .reg .pred p; .reg .b32 done; .reg .b64 at, more; mov.b32 $0, 0; mov.b64 at, $1; {chosen}
        cvt.s64.s32 more, {first}; add.s64 at, at, more;"""
    if bulk:
        return f"""{begin} setp.eq.s32 p, {own}, 0; setp.gt.and.s32 p, {count}, 0, p; @!p bra end;
            cp.async.bulk.prefetch.L2.global [at], {count}; end: }}"""
    return f"""{begin} mov.b32 done, {own}; cvt.s64.s32 more, done; add.s64 at, at, more;
        next: setp.ge.s32 p, done, {count}; @p bra end; prefetch.global.L2 [at];
        add.s32 done, done, 4096; add.s64 at, at, 4096; bra next; end: }}"""
