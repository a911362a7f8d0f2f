"""One row of x in int8 arithmetic, arranged so that what a step reads of it lies together. Called by `triton_int8`.

Eight sub-blocks of a step, two of each of its four units, are columns of the tensor cores' instruction: column 2 u + q
is number q of unit u. So their sums come out apart, and each of the lanes 4 g + t scales those of unit t.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from realm_jax.kernels import fragments_int8, pallas
from realm_jax.kernels.lanes import Reader, coordinates
from realm_jax.kernels.plan import Plan
from realm_jax.kernels.reference import INT8_BLOCK
from realm_jax.kernels.ring import Place, Slots

LINE = 128  # words that a warp copies at once
PREPARED = 4  # blocks of 32 inputs that a program rounds


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
        first = (sub // self.subs * 4 + unit) * self.subs
        if self.halves == 2:
            return ((first + sub % self.subs) * 4 + t) * 2 + half
        return first * 4 + t * self.subs + sub % self.subs

    def sum(self, unit: jax.Array, sub: jax.Array) -> jax.Array:
        return self.sums_at + (sub // self.subs * 4 + unit) * self.subs + sub % self.subs

    def size(self, unit: jax.Array, sub: jax.Array) -> jax.Array:
        """Where the size of a sub-block stands."""
        if self.halves == 2:
            return self.sizes_at + (sub // self.subs * 4 + unit) * self.subs + sub % self.subs
        return self.sizes_at + (sub // 2 * 4 + unit if self.subs == 2 else unit // 2)


def record_of(reader: Reader, own: Plan) -> Record:
    return Record(reader.unit, reader.sub_block, reader.zero, reader.offsets, reader.mins, own.steps * own.turns)


# --- rounding --------------------------------------------------------------------------------------------------------


def prepare(x_K: jax.Array, form: Record) -> jax.Array:
    """x (K,), any floating point, rounded: (groups, words) int32. Zeros beyond the last input."""
    shape, blocks = pallas.Shape((form.groups, form.words), jnp.int32), form.groups * 4 * form.unit // INT8_BLOCK
    body, grid = functools.partial(_prepare, form=form), (-(-blocks // PREPARED),)
    return pallas.call(body, [x_K], shape, grid=grid, num_warps=1, num_stages=1, name="prepare_int8")


def _prepare(x_ref, record_ref, *, form: Record) -> None:
    """PREPARED blocks, as (block, half, lane, byte)."""
    first = pallas.program_id(0) * PREPARED
    block, half, t, i = (lax.broadcasted_iota(jnp.int32, (PREPARED, 2, 4, 4), axis) for axis in range(4))
    k = INT8_BLOCK * (first + block) + 16 * half + 4 * t + i
    x = pallas.load(x_ref.at[k], mask=k < x_ref.shape[0], other=0.0).astype(jnp.float32)
    steps, size = fragments_int8.steps_of(x)

    def place(sixteen: jax.Array) -> tuple[jax.Array, ...]:
        """Group, unit, sub-block of the unit and half of it, of every 16 inputs."""
        unit, inner = sixteen // (form.unit // 16), sixteen % (form.unit // 16)
        return unit // 4, unit % 4, inner // form.halves, inner % form.halves

    def places(shape: tuple[int, ...]) -> tuple[jax.Array, ...]:
        block, half, *rest = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in range(len(shape)))
        return *place(2 * (first + block) + half), half, *rest

    group, unit, sub, half, _, t = places((PREPARED, 2, 4))
    word = form.word(unit, sub, t, half)
    pallas.store(record_ref.at[group, word], jnp.sum((steps & 255) << 8 * i, 3), mask=group < form.groups)

    group, unit, sub, half, which = places((PREPARED, 2))
    sizes = jnp.broadcast_to(size[:, None], which.shape)
    pallas.store(record_ref.at[group, form.size(unit, sub)], _bits(sizes), mask=group < form.groups)
    totals = jnp.sum(jnp.sum(steps, 3), 2).astype(jnp.float32)
    whole = jnp.sum(totals, 1)  # of each block
    if form.has_sums:
        totals = jnp.broadcast_to(whole[:, None], totals.shape) if form.halves == 2 else totals
        sums = sizes * totals if form.offsets else fragments_int8.EXACT + form.zero * totals
        pallas.store(record_ref.at[group, form.sum(unit, sub)], _bits(sums), mask=group < form.groups)
    if form.mins:
        pair = first // 2 + lax.iota(jnp.int32, PREPARED // 2)
        for i, piece in enumerate(fragments_int8.pieces_of_pairs((size * whole).reshape(PREPARED // 2, 2))):
            pallas.store(record_ref.at[pair // 4, form.mins_at + 4 * (pair % 4) + i], piece)


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
