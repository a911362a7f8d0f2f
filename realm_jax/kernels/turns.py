"""Sums of turns, added up one after the other: where a program takes all turns of its rows, by the thread that has
them, which wait in memory or, where that is large enough, in shared memory; where each turn is a program, by a launch
of its own. Called by `triton_wide` and `triton_matmul`.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from realm_jax.kernels import pallas
from realm_jax.kernels.assembly import assembly
from realm_jax.kernels.fragments import Fragment
from realm_jax.kernels.operand import LOW
from realm_jax.kernels.plan import Plan
from realm_jax.kernels.ring import address_after, shared_array

ADDED = 256  # outputs of a program that adds up
Held = Any  # what the place of the sums is known by, from turn to turn


class Waiting(Protocol):
    def begin(self) -> Held:
        """Before the first turn."""

    def add(self, held: Held, sums: Sequence[Fragment], number: jax.Array) -> Held:
        """Adds the sums of turn `number`, of all tiles, to those of the turns before."""

    def take(self, held: Held) -> list[Fragment]:
        """The sums of all turns."""


def shared(own: Plan) -> bool:
    """Whether they wait in shared memory: where four warps multiply together, which may have so much of it."""
    return own.grouped and not pallas.interpreting()


class InMemory(NamedTuple):
    """ref: (programs, tiles, threads, 4) float32. program, first_tile: of a kernel, which the interpreter does not know
    inside of loops."""

    ref: Any
    program: jax.Array
    first_tile: jax.Array
    own: Plan

    def begin(self) -> None:
        return None

    def _at(self, tile: int) -> Any:
        shape = 32 * self.own.warps, 4
        thread, item = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
        place = (jnp.broadcast_to(i, shape) for i in (self.program, self.first_tile + tile))
        return self.ref.at[(*place, thread, item)]

    def add(self, held: None, sums: Sequence[Fragment], number: jax.Array) -> None:
        for tile, own_sums in enumerate(sums):
            mask = jnp.broadcast_to(number > 0, own_sums.shape)
            before = pallas.load(self._at(tile), mask=mask, other=-0.0)
            pallas.store(self._at(tile), before + own_sums)
        return held

    def take(self, held: None) -> list[Fragment]:
        return [pallas.load(self._at(tile)) for tile in range(self.own.program_tiles)]


class InShared(NamedTuple):
    """What is held is the address of a thread's first tile, four times."""

    own: Plan

    def begin(self) -> Fragment:
        threads = 32 * self.own.warps
        start = shared_array("turns", self.own.program_tiles * self._apart, threads)
        return address_after(start, 16 * lax.iota(jnp.int32, threads))

    @property
    def _apart(self) -> int:
        """Bytes from a tile to the next: threads that follow each other have neighbouring places."""
        return 16 * 32 * self.own.warps

    def add(self, held: Fragment, sums: Sequence[Fragment], number: jax.Array) -> Fragment:
        lines = [".reg .pred later; .reg .f32 c<4>; setp.gt.s32 later, $8, 0;"]
        for tile in range(len(sums)):
            address, first = f"[$4 + {tile * self._apart}]", 12 + 4 * tile
            lines += [f"mov.b32 c{i}, 0x80000000;" for i in range(4)]
            lines += [f"@later ld.shared.v4.f32 {{c0, c1, c2, c3}}, {address};"]
            lines += [f"add.rn.f32 c{i}, c{i}, ${first + i};" for i in range(4)]
            lines += [f"st.shared.v4.f32 {address}, {{c0, c1, c2, c3}};"]
        constraints = ["=r"] * 4 + [f"{i}" for i in range(4)] + ["r"] * 4 + ["f"] * (4 * len(sums))
        operands, shape = (held, jnp.broadcast_to(number, held.shape), *sums), pallas.Shape(held.shape, jnp.int32)
        text = f"{{ {' '.join(lines)} mov.b32 $0, $4; mov.b32 $1, $5; mov.b32 $2, $6; mov.b32 $3, $7; }}"
        return assembly(text, constraints, shape, *operands, pack=4, pure=False)

    def take(self, held: Fragment) -> list[Fragment]:
        shape = pallas.Shape(held.shape, jnp.float32)
        return [
            assembly(
                f"ld.shared.v4.f32 {{$0, $1, $2, $3}}, [$4 + {tile * self._apart}];",
                ["=&f"] * 4 + ["r"] * 4, shape, held, pack=4, pure=False,
            )
            for tile in range(self.own.program_tiles)
        ]  # fmt: skip


def add_up(kept: Sequence[jax.Array], back: jax.Array, own: Plan, dtype: jnp.dtype) -> list[jax.Array]:
    """Products (M, N) by each of the weights of a launch: what `results.keep` left of them, added up, and the scaling
    undone."""
    outputs = tuple(sums.shape[2] for sums in kept)
    return pallas.call(
        functools.partial(_add_up, own=own, outputs=outputs),
        [back, *kept],
        tuple(pallas.Shape((own.rows, count), dtype) for count in outputs),
        grid=(sum(-(-count // ADDED) for count in outputs), own.tiles),
        num_stages=1,
        name="add_turns",
    )


def _add_up(back_ref, *refs, own: Plan, outputs: tuple[int, ...]) -> None:
    """One program: a tile of columns and ADDED outputs of one of the weights."""
    which, first, _ = pallas.find_range(pallas.program_id(0), [-(-count // ADDED) for count in outputs], outputs)
    own_row, n = (lax.iota(jnp.int32, count) for count in (8 // own.pieces, ADDED))
    row, n = pallas.program_id(1) * len(own_row) + own_row, first * ADDED + n
    back = pallas.load(back_ref.at[row])
    for number, (kept_ref, out_ref, count) in enumerate(zip(refs, refs[len(outputs) :], outputs, strict=False)):

        @pallas.when(which == number)
        def _(kept_ref=kept_ref, out_ref=out_ref, inside=(n < count)[None, :]) -> None:
            def turn(number: int, piece: int) -> jax.Array:
                at = jnp.full_like(row, number)[:, None], (own.pieces * row + piece)[:, None], n[None, :]
                return pallas.load(kept_ref.at[at], mask=jnp.broadcast_to(inside, (len(row), len(n))), other=0.0)

            total, *second = (
                functools.reduce(jnp.add, [turn(number, piece) for number in range(own.turns)])
                for piece in range(own.pieces)
            )
            if second:
                total = total + second[0] * LOW
            at = row[:, None], n[None, :]
            pallas.store(
                out_ref.at[at], (total * back[:, None]).astype(out_ref.dtype), mask=(row < own.rows)[:, None] & inside
            )
