"""One row of x in int8 arithmetic, arranged so that what a step reads of it lies together. Called by `triton_int8`.

Eight sub-blocks of a step, two of each of its four units, are columns of the tensor cores' instruction: column 2 u + q
is number q of unit u. So their sums come out apart, and each of the lanes 4 g + t scales those of unit t.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from realm_jax.kernels import codes, fragments_int8, operand, pallas
from realm_jax.kernels.lanes import coordinates
from realm_jax.kernels.operand import Prepared, plain
from realm_jax.kernels.plan import Plan
from realm_jax.kernels.reference import INT8_BLOCK
from realm_jax.kernels.ring import Place, Slots
from realm_jax.quant.tensor import QuantizedTensor

LINE = 128  # words that a warp copies at once
PREPARED = 128  # inputs of a program that does nothing but make them or read them, and round them


class Record(NamedTuple):
    """Where in the words of a step everything stands; static.

    A step takes its sub-blocks in `rounds`, `subs` (1 or 2) of each unit in each. Of a round there are the words of its
    sub-blocks, four bytes of inputs each, `halves` for a lane (1 or 2: a sub-block has 16 inputs or 32), the sizes of
    the steps that its inputs are whole numbers of, and `sums`, one for each sub-block, unless a format needs none.
    mins: at the end, what `mma_mins` takes. groups: steps, of all turns.
    """

    unit: int
    sub_block: int
    zero: int
    offsets: bool
    mins: bool
    groups: int

    @property
    def halves(self) -> int:
        return self.sub_block // 16

    @property
    def subs(self) -> int:
        return min(2, self.unit // self.sub_block)

    @property
    def rounds(self) -> int:
        return max(1, self.unit // self.sub_block // 2)

    @property
    def signed(self) -> bool:
        """Whether codes less `zero` are bytes themselves."""
        return self.zero == 128

    @property
    def plain(self) -> bool:
        """Whether codes are multiplied as they are, and nothing is taken off them."""
        return self.zero == 0 and self.sub_block == INT8_BLOCK

    @property
    def has_sums(self) -> bool:
        return self.offsets or (self.zero > 0 and not self.signed)

    @property
    def round_sizes(self) -> int:
        """Sizes of a round: of each sub-block, or of two of 16, or, where a unit is one of 16, of two units."""
        return 4 * self.subs * self.sub_block // INT8_BLOCK

    @property
    def sizes_at(self) -> int:
        return self.unit  # words of four inputs, of four units

    @property
    def sums_at(self) -> int:
        return self.sizes_at + self.rounds * self.round_sizes

    @property
    def mins_at(self) -> int:
        end = self.sums_at + self.has_sums * 4 * self.subs * self.rounds
        return -(-end // 4) * 4

    @property
    def words(self) -> int:
        """Of a step, a multiple of four."""
        return self.mins_at + 16 * self.mins

    def places_of_round(self, number: int, warps: int) -> list[tuple[int, jax.Array, int]]:
        """Where a lane finds its words of x of a round, sizes, and sums (if any): line, word there (P,), how many."""
        _, g, t, _ = coordinates(lax.iota(jnp.int32, 32 * warps))
        q, nothing = (g % 2 if self.subs == 2 else jnp.zeros_like(g)), jnp.zeros_like(g)
        starts = (
            16 * self.subs * self.halves * number,
            self.sizes_at + self.round_sizes * number,
            self.sums_at + 4 * self.subs * number,
        )
        words = (
            (self.word(g // 2, q, t, nothing), self.halves),
            (self.size(t, nothing) - self.sizes_at, self.subs if self.halves == 2 else 1),
            (self.sum(t, nothing) - self.sums_at, self.subs),
        )
        found = [
            (start // LINE, start % LINE + word, count) for start, (word, count) in zip(starts, words, strict=True)
        ]
        return found if self.has_sums else found[:2]

    def place_of_mins(self, warps: int) -> tuple[int, jax.Array, int]:
        _, _, t, _ = coordinates(lax.iota(jnp.int32, 32 * warps))
        return 0, self.mins_at + 4 * t, 4

    def word(self, unit: jax.Array, sub: jax.Array, t: jax.Array, half: jax.Array) -> jax.Array:
        """Where a lane's inputs of a sub-block stand: of one sub-block beside each other, then those of the lanes."""
        if self.halves == 2:
            return (self._number(unit, sub) * 4 + t) * 2 + half
        return self._number(unit, sub - sub % self.subs) * 4 + t * self.subs + sub % self.subs

    def _number(self, unit: jax.Array, sub: jax.Array) -> jax.Array:
        """Of a sub-block, as rounds have them."""
        return (sub // self.subs * 4 + unit) * self.subs + sub % self.subs

    def sum(self, unit: jax.Array, sub: jax.Array) -> jax.Array:
        """Where the sum of a sub-block stands."""
        return self.sums_at + self._number(unit, sub)

    def size(self, unit: jax.Array, sub: jax.Array) -> jax.Array:
        """Where the size of a sub-block stands."""
        if self.halves == 2:
            return self.sizes_at + self._number(unit, sub)
        return self.sizes_at + (sub // 2 * 4 + unit if self.subs == 2 else unit // 2)

    def write(self, steps: jax.Array, size: jax.Array, start: jax.Array, ref) -> None:
        """Some blocks of 32 inputs from number `start` on: whole steps (blocks, 2, 4, 4) int32, and their sizes."""
        blocks = size.size

        def places(*shape: int) -> tuple[jax.Array, ...]:
            """Of what is of blocks, halves of them, and more: group, unit, sub-block of it, and half of that."""
            block, half = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in range(2))
            sixteen, per = 2 * (start + block) + half, self.unit // 16
            unit, inner = sixteen // per, sixteen % per
            return unit // 4, unit % 4, inner // self.halves, inner % self.halves

        t, i = (lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1) for shape in ((blocks, 2, 4), steps.shape))
        group, unit, sub, half = places(blocks, 2, 4)
        word = jnp.sum((steps & 255) << 8 * i, 3)
        pallas.store(ref.at[group, self.word(unit, sub, t, half)], word, mask=group < self.groups)

        group, unit, sub, _ = places(blocks, 2)
        sizes = jnp.broadcast_to(size[:, None], group.shape)
        pallas.store(ref.at[group, self.size(unit, sub)], _bits(sizes), mask=group < self.groups)
        totals = jnp.sum(jnp.sum(steps, 3), 2).astype(jnp.float32)
        whole = jnp.sum(totals, 1)  # of each block
        if self.has_sums:
            totals = jnp.broadcast_to(whole[:, None], totals.shape) if self.halves == 2 else totals
            sums = sizes * totals if self.offsets else fragments_int8.EXACT + self.zero * totals
            pallas.store(ref.at[group, self.sum(unit, sub)], _bits(sums), mask=group < self.groups)
        if self.mins:
            pair = start // 2 + lax.iota(jnp.int32, blocks // 2)
            for piece, words in enumerate(fragments_int8.pieces_of_pairs((size * whole).reshape(blocks // 2, 2))):
                at = ref.at[pair // 4, self.mins_at + 4 * (pair % 4) + piece]
                pallas.store(at, words, mask=pair // 4 < self.groups)


def record_of(w: QuantizedTensor, own: Plan) -> Record:
    """What a product by w takes."""
    reader = codes.READERS[w.format]
    return Record(reader.unit, reader.sub_block, reader.zero, reader.offsets, reader.mins, own.steps * own.turns)


class Records(NamedTuple):
    """A form in which kernels that make x write it: its records of these kinds, each (groups, words) int32."""

    kinds: tuple[Record, ...]

    @property
    def programs(self) -> int:
        return 1

    @property
    def inputs(self) -> int:
        return max(4 * kind.unit * kind.groups for kind in self.kinds)

    def shapes(self) -> tuple[pallas.Shape, ...]:
        """See `operand.Form`, here and below."""
        return tuple(pallas.Shape((kind.groups, kind.words), jnp.int32) for kind in self.kinds)

    def made(self, arrays: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
        return tuple(arrays)

    def write(self, x: jax.Array, largest: Callable[[], jax.Array], refs: Sequence, rows: int) -> None:
        self.write_part(x, pallas.program_id(1), refs)

    def write_part(self, x: jax.Array, part: jax.Array, refs: Sequence) -> None:
        """Inputs part * x.size and those after it, a multiple of 64."""
        blocks = x.size // INT8_BLOCK
        steps, size = fragments_int8.steps_of(x.astype(jnp.float32).reshape(blocks, 2, 4, 4))
        for kind, ref in zip(self.kinds, refs, strict=True):
            kind.write(steps, size, part * blocks, ref)


# --- rounding --------------------------------------------------------------------------------------------------------


def record_for(x: jax.Array | Prepared, kind: Record) -> jax.Array:
    """The record of x (..., K), which is one row of any floating point: what comes with it, or made in a launch."""
    if isinstance(x, Prepared) and isinstance(x.form, Records) and kind in x.form.kinds:
        return x.operand[x.form.kinds.index(kind)]
    form = Records((kind,))
    body, grid = functools.partial(_prepare, form=form), operand.grid(form, PREPARED)
    options = {"grid": grid, "num_warps": 1, "num_stages": 1, "name": "prepare_int8"}
    return pallas.call(body, [plain(x).reshape(1, -1)], form.shapes(), **options)[0]


def _prepare(x_ref, *refs, form: Records) -> None:
    columns = operand.own_columns(form, PREPARED, x_ref.shape[1])
    form.write(columns.load(x_ref, jnp.int32(0)), None, refs, 1)


def _bits(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, jnp.int32)


# --- reading ---------------------------------------------------------------------------------------------------------


def places(record_ref, form: Record, group: jax.Array) -> list[Place]:
    """What each warp copies of its step, LINE words at a time. group: which step that is, of each thread (P,)."""
    warp, _, _, lane = coordinates(lax.iota(jnp.int32, group.size))
    found = []
    for start in range(0, form.words, LINE):
        count = min(LINE, form.words - start) // 4
        slots = Slots(count, warp * count + lane % count, copies=lane < count, name=f"{count} lanes")
        found.append(Place(record_ref, (group, 4 * (lane % count)), 4, slots, start))
    return found
