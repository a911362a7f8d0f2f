"""What the warps of a program read of x together, ahead of time, by asynchronous copies to shared memory. Called by
`triton_wide`.

A *stage* is what is read between two barriers: STAGE_INPUTS inputs of all columns of the program. While the warps are
at one, the next few are on their way. Where `mins` want them, the sums of a group come with its last stage. The
interpreter copies nothing, and reads where it would.
Source: PTX ISA, "cp.async".
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from realm_jax.kernels import fragments, operand, pallas
from realm_jax.kernels.fragments import Fragment, SubBlock
from realm_jax.kernels.lanes import Codes, Reader, halves_of
from realm_jax.kernels.ring import Token, address_after, asm, few, flat_index, shared_array

STAGE_INPUTS = 64
PIECES = STAGE_INPUTS  # of a tile, in a stage, as items of 16 bytes: 8 inputs of a column each
SUMS = 16  # likewise, of a group: 2 words for each lane, where a row has one piece
SUMS_PLACES = 2  # groups whose sums are there at a time
GROUP_STAGES = 4  # of a group of 256 inputs, which `mins` are of


class Columns(NamedTuple):
    """`tiles` tiles of x from `first` on, or as many as there are, for the warps of a program.

    pieces_ref, sums_ref: of an Operand. mins: whether sums are copied. pieces: columns of a row. warps: an even number.
    grouped: whether four warps multiply together, and how x lies (see `operand.Form`).
    """

    pieces_ref: jax.Array
    sums_ref: jax.Array
    first: jax.Array
    tiles: int
    mins: bool
    pieces: int
    stages: int
    warps: int
    grouped: bool

    def zero(self) -> Fragment:
        """See `fragments.zeros`."""
        thread, item = (lax.broadcasted_iota(jnp.int32, (32 * self.warps, 4), axis) for axis in (0, 1))
        at = jnp.zeros_like(item)
        return fragments.zeros(pallas.load(self.pieces_ref.at[at, at, thread % 32, item]))

    def begin(self) -> Token | None:
        """The address of the first stage."""
        if pallas.interpreting():
            return None
        return shared_array("columns", nbytes(self.tiles, self.stages, self.mins), 32 * self.warps)

    def put(
        self, token: Token | None, number: jax.Array, part: jax.Array, group: jax.Array | None, live: jax.Array
    ) -> Token | None:
        """Begin to copy stage `number`: the part-th STAGE_INPUTS inputs, and the sums of `group` (None: of none); or
        nothing, if it is not `live`. Scalars."""
        if token is None:
            return None
        start = self._start(number)
        tiles = jnp.where(live, jnp.minimum(self.tiles, self.pieces_ref.shape[0] - self.first), 0)
        thread = self._thread()
        tile, item = self.first + thread // PIECES, thread % PIECES
        at = tile, part * (STAGE_INPUTS // 32) + item // 32, item % 32, jnp.zeros_like(item)
        token = _copy(token, self.pieces_ref, at, PIECES, tiles, self.tiles, start)
        if group is None:
            return token
        items = SUMS // self.pieces
        tile, item = self.first + thread // items, thread % items
        at = tile, jnp.broadcast_to(group, item.shape), 32 // items * item, jnp.zeros_like(item)
        return _copy(token, self.sums_ref, at, items, tiles, self.tiles, self._sums(number))

    def wait(self, token: Token | None) -> Token | None:
        """For all warps, and until the stage before the newest is there.

        What multiplies for four warps together reads through another proxy. As in CUTLASS (its main loop for Hopper
        with cp.async) no fence stands between, which costs 3% of a product with 64 rows.
        """
        text = f"cp.async.wait_group {self.stages - 2}; bar.sync 0;"
        return None if token is None else asm(text, ["=r", "0"], token, pure=False)

    def at(self, token: Token | None, number: jax.Array, part: jax.Array, group: jax.Array) -> "Stage":
        """Stage `number`, after `wait`; part, group: what was put there."""
        if token is None:
            return Stage(self, None, None, part, group)
        lane = self._thread() % 32
        address = address_after(token, self._start(number) + (0 * lane if self.grouped else 16 * lane))
        return Stage(self, address, token + self._sums(number) + 16 * SUMS // self.pieces // 32 * lane, part, group)

    def _sums(self, number: jax.Array) -> jax.Array:
        """Where those of the group are that a stage is of: after the stages."""
        place = lax.rem(lax.div(number, jnp.int32(GROUP_STAGES)), jnp.int32(SUMS_PLACES))
        return 16 * self.tiles * (self.stages * PIECES + place * SUMS)

    def _start(self, number: jax.Array) -> jax.Array:
        return lax.rem(number, jnp.int32(self.stages)) * (16 * PIECES * self.tiles)

    def _thread(self) -> jax.Array:
        return lax.broadcasted_iota(jnp.int32, (32 * self.warps,), 0)


class Stage(NamedTuple):
    """A stage that is there. pieces, sums: addresses of a lane's own (pieces: of all, where warps multiply together);
    None in the interpreter. part, group: see `Columns.put`."""

    of: Columns
    pieces: Fragment | None
    sums: Token | None
    part: jax.Array
    group: jax.Array

    def add_products(
        self, totals: Sequence[Fragment], rows: Sequence[Codes], reader: Reader, inputs: range
    ) -> list[Fragment]:
        """totals of tiles, and the scaled products of the sub-blocks of some of the stage's inputs in rows g and g + 8
        by x; with factors, they are scaled no further. inputs: in a step."""
        found = []
        for start in inputs[:: reader.sub_block]:
            unit, place = divmod(start, reader.unit)
            found.append((unit, place // reader.sub_block, start % STAGE_INPUTS // 16))
        if self.pieces is None:
            for one in found:
                totals = self._add_interpreted(totals, rows, reader, *one)
            return list(totals)
        blocks = [self._sub_block(rows, reader, *one) for one in found]
        if self.of.grouped:
            return fragments.add_grouped_products(totals, blocks, reader.zero, self.pieces, 16 * PIECES)
        for block in blocks:
            totals = fragments.add_products(totals, block, reader.zero, self.pieces, 16 * PIECES)
        return list(totals)

    def _sub_block(self, rows: Sequence[Codes], reader: Reader, unit: int, sub: int, sixteen: int) -> SubBlock:
        """sub: of the unit. sixteen: which 16 inputs of the stage are its first."""
        count, either = reader.sub_block // 16, rows[0]
        own = slice(sub * count, (sub + 1) * count)
        words = list(zip(rows[0].words[own], rows[1].words[own], strict=True))
        raised = (either.raised or (0,) * len(either.words))[own]
        factors = (rows[0].factors, rows[1].factors) if reader.factors else None
        scales = None if reader.factors else (rows[0].scales[sub], rows[1].scales[sub])
        block, half = divmod(sixteen, 2)
        offset = 2 * fragments.MATRIX_BYTES * sixteen if self.of.grouped else 16 * 32 * block + 8 * half
        return SubBlock(words, raised, either.mask, factors, scales, unit, sub, offset)

    def _add_interpreted(
        self, totals: Sequence[Fragment], rows: Sequence[Codes], reader: Reader, unit: int, sub: int, sixteen: int
    ) -> list[Fragment]:
        (block, half), count = divmod(sixteen, 2), reader.sub_block // 16
        low, high = (halves_of(row, reader.zero)[sub * count : (sub + 1) * count] for row in rows)
        found = []
        for tile, total in enumerate(totals):
            lane, item = self._thread() % 32, lax.broadcasted_iota(jnp.int32, total.shape, 1)
            at = operand.place(lane // 4, lane % 4, item, self.of.grouped)
            pieces = self._load(self.of.pieces_ref, tile, self.part * (STAGE_INPUTS // 32) + block, *at)
            dot = total if reader.factors else jnp.zeros_like(total)
            for i in range(count):
                a = low[i][0], high[i][0], low[i][1], high[i][1]
                dot = fragments.mma(dot, a, pieces, unit, half + i)
            scales = rows[0].scales[sub], rows[1].scales[sub]
            found.append(dot if reader.factors else fragments.add_scaled(dot, *scales, total, unit, False))
        return found

    def pairs(self, tile: int) -> Fragment:
        """For `add_mins`, what a lane wants of the sums that are pairs."""
        span = 3 - self.of.pieces
        if self.sums is None:
            lane, item = self._thread() % 32, lax.broadcasted_iota(jnp.int32, self._thread().shape, 1)
            return self._load(self.of.sums_ref, tile, self.group, lane, item * span // 4)
        text = few("shared", span, f"[$4 + {16 * SUMS // self.of.pieces * tile}]")
        return asm(text, ["=&r"] * 4 + ["r"], self.sums, results=4, pure=False)

    def offsets(self, tile: int, sub: int) -> list[Fragment]:
        """Sums of a sub-block of four units, in columns 2 t and 2 t + 1 (of second pieces: zeros): float32. They are
        read when they are wanted."""
        thread = self._thread()
        t, item = thread % 4, lax.broadcasted_iota(jnp.int32, thread.shape, 1)
        columns = range(3 - self.of.pieces)
        read = [self._load(self.of.sums_ref, tile, 2 * t + i, sub, 4 * self.group + item) for i in columns]
        return [*read, jnp.zeros_like(read[0])][:2]

    def _load(self, ref, tile: int, *at: jax.Array | int) -> Fragment:
        tile = jnp.minimum(self.of.first + tile, ref.shape[0] - 1)
        return pallas.load(ref.at[tuple(jnp.broadcast_to(i, (32 * self.of.warps, 4)) for i in (tile, *at))])

    def _thread(self) -> jax.Array:
        return lax.broadcasted_iota(jnp.int32, (32 * self.of.warps, 4), 0)


def nbytes(tiles: int, stages: int, mins: bool) -> int:
    """Of shared memory."""
    return 16 * tiles * (stages * PIECES + (SUMS_PLACES * SUMS if mins else 0))


def _copy(token: Token, ref, at: tuple, items: int, tiles: jax.Array, most: int, start: jax.Array) -> Token:
    """Begin to copy so many items of 16 bytes of each of `tiles` tiles, `most` at most, to `start`. at: indices of a
    thread's first item in the ref, which has tiles first."""
    threads, index = len(token), flat_index(at, ref.shape)
    tile_bytes = ref.dtype.itemsize * ref.size // ref.shape[0]
    lines = [".reg .b32 to; .reg .pred p; add.u32 to, $0, $4;"]
    for k in range(-(-most * items // threads)):
        tile = k * threads // items
        lines.append(f"""setp.gt.s32 p, $3, {tile};
            @p cp.async.cg.shared.global [to + {16 * k * threads}], [$1 + {tile * tile_bytes}], 16;""")
    thread = lax.broadcasted_iota(jnp.int32, token.shape, 0)
    operands = token, tiles - thread // items, start + 16 * thread
    constraints = ["=&r", "l", "0", "r", "r"]
    return asm(f"{{ {' '.join(lines)} }}", constraints, *operands, addresses=[(ref, index)], pure=False)
