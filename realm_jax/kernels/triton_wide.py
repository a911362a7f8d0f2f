"""Products by packed weights for more rows of x than one tile has: warps have rows of w of their own, and read x
together.

As `triton_matmul`, to the bit: a result is summed in the same turns, one after the other. There every warp of a program
takes a turn, so each reads another part of x, and all of x is read anew for every 16 rows of w. With 64 rows that is
half a megabyte, far more than the rows of w. Here a program reads x once for all its rows of w, by way of shared
memory; on Hopper its four warps multiply together, and by x where it lies there. Where w has few rows each turn is a
program, which keeps its sums; they are added up in a launch of their own (`turns`).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from realm_jax.kernels import fragments, pallas
from realm_jax.kernels.ahead import Ahead, matrix_of
from realm_jax.kernels.columns import STAGE_INPUTS, Columns, Stage
from realm_jax.kernels.fragments import Fragment
from realm_jax.kernels.lanes import Codes
from realm_jax.kernels.mins import add_mins, add_wholes
from realm_jax.kernels.plan import Plan
from realm_jax.kernels.results import backs_of, keep, leave
from realm_jax.kernels.ring import commit, together
from realm_jax.kernels.turns import Held, InMemory, InShared, Waiting, shared

Tokens = tuple[jax.Array | None, jax.Array | None]  # of what is read ahead of w and of x
Totals = tuple[Fragment, ...]  # of tiles


def kernel(*refs, own: Plan, format: str, outputs: tuple[int, ...]) -> None:
    """One program: `own.program_rows` rows of one of the weights, one turn of K or all, `own.program_tiles` tiles of
    eight columns."""
    count = len(outputs) + (own.waits and not shared(own))
    (pieces_ref, sums_ref, back_ref, *plane_refs), left_refs = refs[:-count], refs[-count:]
    turn, turns = (pallas.program_id(2), 1) if own.split else (jnp.int32(0), own.turns)
    first_tile, tiles = pallas.program_id(1) * own.program_tiles, own.program_tiles
    steps = turns * own.steps

    def group(step: jax.Array, _warp: Any = None) -> jax.Array:
        return own.group(lax.rem(step, jnp.int32(own.steps)), turn + lax.div(step, jnp.int32(own.steps)))

    matrix, which = matrix_of(plane_refs, own, format, outputs, group)
    reader = matrix.reader
    x = Columns(pieces_ref, sums_ref, first_tile, tiles, reader.mins, own.pieces, own.x_stages, own.warps, own.grouped)
    weights = Ahead(matrix.places, own.warps, steps, own.stages, pallas.shared_memory())  # the plan has seen to it
    parts = 4 * reader.unit // STAGE_INPUTS  # stages of x in a step
    zero = x.zero()

    def put_x(token: jax.Array | None, step: jax.Array, part: int) -> jax.Array | None:
        """Begin to copy the part of x that is so many after the first of a step."""
        step, part = step + part // parts, part % parts
        sums_of = group(step) if reader.mins and part == parts - 1 else None
        return commit(x.put(token, step * parts + part, group(step) * parts + part, sums_of, step < steps))

    def begin() -> Tokens:
        of_w, of_x = weights.start(), x.begin()
        for stage in range(own.stages):
            of_w = weights.put(of_w, jnp.int32(stage))
        for part in range(own.x_stages - 1):
            of_x = put_x(of_x, jnp.int32(0), part)
        return of_w, of_x

    def take_step(step: jax.Array, carry: tuple[Tokens, Totals]) -> tuple[Tokens, Totals]:
        (of_w, of_x), totals = carry
        sums = (zero,) * tiles if reader.factors else totals
        for part in range(parts):
            of_x = x.wait(of_x)
            if part == 0:
                rows = matrix.read(step, weights.take(of_w, step))
                of_w = weights.put(together(of_w), step + own.stages)
            of_x = put_x(of_x, step, part + own.x_stages - 1)
            there = x.at(of_x, step * parts + part, group(step) * parts + part, group(step))
            sums = add_part(sums, rows, there, part)
        if reader.factors:
            sums = tuple(add_wholes(totals, sums, rows))
        return (of_w, of_x), tuple(add_mins(sums, rows, there.pairs, own.pieces, zero)) if reader.mins else sums

    def add_part(totals: Totals, rows: list[Codes], there: Stage, part: int) -> Totals:
        size = reader.sub_block if reader.offsets else STAGE_INPUTS  # offsets come after their own sub-block
        for first in range(part * STAGE_INPUTS, (part + 1) * STAGE_INPUTS, size):
            totals = tuple(there.add_products(totals, rows, reader, range(first, first + size)))
            if reader.offsets:
                unit, place = divmod(first, reader.unit)
                at = place // reader.sub_block, unit
                totals = tuple(add_offsets(y, rows, there, tile, *at) for tile, y in enumerate(totals))
        return totals

    def add_offsets(total: Fragment, rows: list[Codes], there: Stage, tile: int, sub: int, unit: int) -> Fragment:
        sums = fragments.by_column(*there.offsets(tile, sub), unit)
        return fragments.add_scaled(sums, *(row.offsets[sub] for row in rows), total, unit, False)

    def take_turn(number: jax.Array, carry: tuple[Tokens, Held]) -> tuple[Tokens, Held]:
        tokens, held = carry
        begun = number * own.steps
        tokens, sums = lax.fori_loop(begun, begun + own.steps, take_step, (tokens, (zero,) * tiles))
        return tokens, waiting.add(held, sums, number)

    if own.waits:
        waiting: Waiting = InShared(own)
        if not shared(own):
            waiting = InMemory(left_refs[-1], pallas.program_id(0), first_tile, own)
        _, held = lax.fori_loop(0, turns, take_turn, (begin(), waiting.begin()))
        totals = waiting.take(held)
    else:
        _, totals = lax.fori_loop(0, own.steps, take_step, (begin(), (zero,) * tiles))
    backs = [None if own.split else backs_of(back_ref, first_tile + tile, own) for tile in range(tiles)]
    for tile, total in enumerate(totals):
        at = matrix.first, first_tile + tile, own, which
        if own.split:
            keep(left_refs[: len(outputs)], total, turn, *at)
        else:
            leave(left_refs[: len(outputs)], back_ref, backs[tile], total, *at)
