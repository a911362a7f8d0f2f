"""Attention that reads the padded ragged cache in place, as Pallas Triton kernels. Called by `kernels.attention`, and
by `model.layers` where new tokens come into the cache in the same launch.

Shape suffixes: `B` rows of queries, `T` new tokens, `H` query heads, `K` kv heads, `G` = H / K, `S` places of a row of
the cache, `C` head width, `L` layers; `M` rows of a tile of queries, `N` places of a block of keys, `W` sums of weights
that are kept apart.

One program takes one kv head of one row, some tiles of its T * G queries, which share what is loaded, and one part of
the row. It goes through the part in blocks, up to the last place that its queries see. Parts of a row are joined by a
second kernel; a row of one part needs none. A place that is written is read by the program that writes it alone: that
of its part, so where one program has all queries of a kv head.

Order of the sums: parts and blocks begin at fixed places, and a tile of a short call (T <= 16) has always M = 16 rows.
What a query does not see adds exact zeros. So the result of a query depends on nothing but itself and what it sees: not
on B, T, the window, or the size of the cache.

Precision: products are of 16-bit numbers on tensor cores, and queries and softmax weights go in as the sum of two such
numbers (about 16 bits with bfloat16, 22 with float16); queries of the cache's own type need one. int8 becomes
float16, exactly. A float32 cache is multiplied in float32. NMSE against the float32 reference, as tested: below 1e-12
for float32, float16 and int8, below 1e-9 for bfloat16. Source: Dao et al. 2022, 2023 (flash attention, flash decoding).
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from realm_jax.kernels import pallas, triton_cache
from realm_jax.kernels.attention_plan import Plan, plan
from realm_jax.kernels.int8_row import Records
from realm_jax.kernels.pallas import Shape, load, load_now, program_id, store, when
from realm_jax.kernels.triton_cache import Arrays, Heads, Turn

LOG2E = 1.4426950408889634
LOWEST = -1e30  # stands for minus infinity, whose differences are not NaN
JOINED = 16  # parts that the joining kernel takes at once
LIFT = 4096.0  # a power of two: what is split into float16 pieces is brought to 4096..8191, far from the subnormals


def attend(
    q_BTHC: jax.Array,
    k_LBSKC: jax.Array,
    v_LBSKC: jax.Array,
    place_BT: jax.Array,
    layer: jax.Array,
    rows_B: jax.Array,
    k_scale_LBSK: jax.Array | None = None,
    v_scale_LBSK: jax.Array | None = None,
    **options,
) -> jax.Array:
    """The attention of `kernels.attention` on one layer of whole caches, (B, T, H, C) in q's dtype.

    layer: int32. rows_B: int32, the row of the cache of each row of queries. options: those of `plan`.
    """
    p = plan(q_BTHC.shape, k_LBSKC.shape, k_LBSKC.dtype, **options)
    cache = [x for x in (k_LBSKC, v_LBSKC, k_scale_LBSK, v_scale_LBSK) if x is not None]
    operands = [jnp.reshape(layer, 1).astype(jnp.int32), rows_B.astype(jnp.int32), place_BT, q_BTHC]
    results = _launch(p, "attend", functools.partial(_attend_part, p), [*operands, *cache], q_BTHC)
    return _joined(p, place_BT, q_BTHC, results)[0]


def refuses_new(q_BTHC: jax.Array, k_LBSKC: jax.Array) -> str | None:
    """Why `write_and_attend` cannot serve queries of that shape and type and such a cache, or None if it can."""
    if reason := triton_cache.refuses(q_BTHC, k_LBSKC):
        return reason
    p = plan(q_BTHC.shape, k_LBSKC.shape, k_LBSKC.dtype, scale=1.0, softcap=None, sliding_window=None)
    return None if p.groups == 1 else "one program would read what another one writes"


def write_and_attend(
    cache: Arrays,
    layer: jax.Array,
    row_B: jax.Array,
    write_BT: jax.Array,
    place_BT: jax.Array,
    q_BTHC: jax.Array,
    k_BTKC: jax.Array,
    v_BTKC: jax.Array,
    cos_BTR: jax.Array,
    sin_BTR: jax.Array,
    *,
    halves: bool,
    form: Records | None = None,
    **options,
) -> tuple[jax.Array, Arrays, tuple[jax.Array, ...] | None]:
    """`triton_cache.write` of new tokens at `write_BT`, then `attend` of their queries at `place_BT`: to the bit, in a
    launch less. What `attend` gives, and the cache, in the same buffers.

    form: in which what it gives, as one row (H C,), is wanted too; None comes back where the launch that joins parts
    cannot do that.

    What a row past the last gives means nothing: it reads the last row, which may be written meanwhile.
    """
    p = plan(q_BTHC.shape, cache.k.shape, cache.k.dtype, **options)
    held = [x for x in cache if x is not None]
    operands = [jnp.reshape(layer, 1).astype(jnp.int32), row_B.astype(jnp.int32), place_BT, q_BTHC]
    operands += [write_BT, k_BTKC, v_BTKC, cos_BTR, sin_BTR]
    body = functools.partial(_write_and_attend_part, p, halves)
    results = _launch(p, "write_and_attend", body, operands, q_BTHC, held)
    form = form if form and _can_make(p, q_BTHC.shape, form) else None
    out_BTHC, *made = _joined(p, place_BT, q_BTHC, results[len(held) :], form)
    return out_BTHC, Arrays(*results[: len(held)]), form and form.made(made)


def _can_make(p: Plan, q_shape: tuple[int, ...], form: Records) -> bool:
    """Whether a program that joins the parts of a head has whole blocks of one row, and all of them all that is
    wanted."""
    B, T, H, C = q_shape
    whole = all(4 * kind.unit * kind.groups == H * C for kind in form.kinds)
    return p.parts > 1 and B * T == 1 and p.width == C and C % 64 == 0 and whole


def _launch(p: Plan, name: str, body, operands: list, q_BTHC: jax.Array, held: Sequence[jax.Array] = ()) -> tuple:
    """A program for each part of a row: `held`, in the same buffers, and what the parts, or the only one, give."""
    B, T, H, C = q_BTHC.shape
    parts = (B, p.parts, T, H)
    out = [Shape(q_BTHC.shape, q_BTHC.dtype)]
    partial = [Shape((*parts, C), jnp.float32), Shape(parts, jnp.float32), Shape(parts, jnp.float32)]
    return pallas.call(
        body,
        [*operands, *held],
        (*(Shape(x.shape, x.dtype) for x in held), *(out if p.parts == 1 else partial)),
        grid=(p.kv_heads, p.parts * p.groups, B),
        num_warps=p.warps,
        num_stages=1 if any(x.dtype == jnp.int8 for x in (*operands, *held)) else p.stages,
        aliases={len(operands) + i: i for i in range(len(held))},
        name=name,
    )


def _joined(
    p: Plan, place_BT: jax.Array, q_BTHC: jax.Array, results: Sequence[jax.Array], form: Records | None = None
) -> Sequence[jax.Array]:
    """The attention of whole rows, from what their parts give; then what the form wants of it."""
    if p.parts == 1:
        return results
    B, T, H, _ = q_BTHC.shape
    out = Shape(q_BTHC.shape, q_BTHC.dtype), *(form.shapes() if form else ())
    join = functools.partial(_join_parts, p, form)
    return pallas.call(join, (place_BT, *results), out, grid=(H, T, B), num_warps=1, name="attend_join")


def _attend_part(p: Plan, layer_ref, row_ref, place_ref, q_ref, k_ref, v_ref, *refs) -> None:
    """One kv head, one group of tiles, one part of one row."""
    scales, outs = (refs[:2], refs[2:]) if k_ref.dtype == jnp.int8 else ((None, None), refs)
    row = jnp.clip(load(row_ref.at[program_id(2)]), 0, k_ref.shape[1] - 1)
    at = load(layer_ref.at[jnp.int32(0)]), row
    _attend(p, at, _tiles(p, place_ref, q_ref), (k_ref, v_ref, *scales), outs)


def _write_and_attend_part(
    p: Plan, halves: bool, layer_ref, row_ref, place_ref, q_ref, write_ref, k_ref, v_ref, cos_ref, sin_ref, *refs
) -> None:
    """One kv head, one part of one row: the new tokens that stand in it are written, then seen."""
    count = 5 if refs[0].dtype == jnp.int8 else 3
    cache, outs = Arrays(*refs[count : 2 * count]), refs[2 * count :]  # those before are the same buffers
    h, part, b = program_id(0), program_id(1), program_id(2)
    rows, size = cache.k.shape[1:3]
    layer, row = load(layer_ref.at[jnp.int32(0)]), load(row_ref.at[b])

    def turn_of(token_X1: jax.Array, real_X1: jax.Array, by=load) -> Turn:
        return Turn.read(cos_ref, sin_ref, (b, token_X1), real_X1, p.head_width, halves, by)

    tiles = _tiles(p, place_ref, q_ref, turn_of)
    token_T1 = jnp.arange(1 << (p.tokens - 1).bit_length(), dtype=jnp.int32)[:, None]
    real_T1 = token_T1 < p.tokens
    place_T1 = load(write_ref.at[b, token_T1], mask=real_T1, other=size)
    turn = turn_of(token_T1, real_T1, load_now)
    new = Heads.read(turn, k_ref, v_ref, (b, token_T1, jnp.broadcast_to(h, (1, 1))), real_T1)
    # What stands past the places that are read is the last part's.
    kept_T1 = (row < rows) & (place_T1 < size) & (jnp.minimum(p.part_of(place_T1), p.parts - 1) == part)

    @when(jnp.max(kept_T1.astype(jnp.int32)) > 0)
    def _():
        new.put(cache, layer, row, h, place_T1, kept_T1)
        pallas.barrier()

    at = layer, jnp.clip(row, 0, rows - 1)
    _attend(p, at, tiles, (cache.k, cache.v, cache.k_scale, cache.v_scale), outs)


def _tiles(p: Plan, place_ref, q_ref, turn_of: Callable | None = None) -> list["_Tile"]:
    """Those of this program; the longest groups come first."""
    group = p.groups - 1 - program_id(1) % p.groups
    at = program_id(2), program_id(0)
    return [_Tile.load(p, place_ref, q_ref, *at, group * p.tiles + i, turn_of) for i in range(p.tiles)]


def _attend(p: Plan, at: tuple, tiles: list["_Tile"], cache: tuple, outs: Sequence) -> None:
    """What these queries see of this program's part: of row `at`, in refs of keys, values and their scales."""
    k_ref, v_ref, k_scale_ref, v_scale_ref = cache
    h, part, b = program_id(0), program_id(1) // p.groups, program_id(2)
    start, stop = _bounds(p, tiles, part)

    def places(i: jax.Array) -> jax.Array:
        return start + i * p.block + jnp.arange(p.block, dtype=jnp.int32)

    def fetch(i: jax.Array) -> tuple[jax.Array | None, ...]:
        scales = (_load_scales(ref, at, places(i), stop, h) for ref in (k_scale_ref, v_scale_ref))
        return *(_load_block(p, ref, at, places(i), stop, h) for ref in (k_ref, v_ref)), *scales

    def step(i: jax.Array, carry: tuple) -> tuple:
        held, sums = carry
        (k_NC, v_NC, k_scale, v_scale), *held = (*held, fetch(i + len(held)))
        if k_NC.dtype == jnp.int8:
            k_NC, v_NC = pallas.int8_to_float16(k_NC), pallas.int8_to_float16(v_NC)
        weighed = [tile.weigh(p, k_NC, k_scale, places(i), own) for tile, own in zip(tiles, sums, strict=True)]
        return tuple(held), tuple(_add_values(p, *one, v_NC, v_scale) for one in weighed)

    zero = (
        jnp.zeros((p.rows, p.width), jnp.float32),
        jnp.full(p.rows, LOWEST, jnp.float32),
        jnp.zeros((p.rows, p.apart), jnp.float32),
    )
    steps = jnp.maximum(stop - start + p.block - 1, 0) // p.block
    # int8 comes ahead through registers: what Triton itself fetches ahead lies in shared memory as bytes, and is read
    # from there a byte at a time.
    ahead = tuple(fetch(jnp.int32(i)) for i in range(p.stages - 1)) if k_ref.dtype == jnp.int8 else ()
    _, sums = jax.lax.fori_loop(0, steps, step, (ahead, (zero,) * p.tiles))
    for tile, (acc_MC, top_M, total_MW) in zip(tiles, sums, strict=True):
        total_M = jnp.sum(total_MW, 1)
        if p.parts == 1:
            acc_MC = acc_MC / total_M[:, None]
            tile.put(p, outs[0], (b,), acc_MC, True)
        else:
            tile.put(p, outs[0], (b, part), acc_MC, steps > 0)
            tile.put(p, outs[1], (b, part), top_M, steps > 0)
            tile.put(p, outs[2], (b, part), total_M, steps > 0)


class _Tile(NamedTuple):
    """M queries of one kv head: query i is head i % G of token i // G.

    token_M, head_M, real_M: which they are, and whether they are any. place_M: -1 where not real. pieces: q in
    one or two arrays (M, C) to multiply keys by. unit_M: what the products are to be multiplied by, or None.
    """

    token_M: jax.Array
    head_M: jax.Array
    real_M: jax.Array
    place_M: jax.Array
    pieces: list[jax.Array]
    unit_M: jax.Array | None

    @classmethod
    def load(cls, p: Plan, place_ref, q_ref, b, h, number: jax.Array, turn_of: Callable | None) -> "_Tile":
        query_M = number * p.rows + jnp.arange(p.rows, dtype=jnp.int32)
        real_M = query_M < p.tokens * p.sharing
        token_M, head_M = query_M // p.sharing, h * p.sharing + query_M % p.sharing
        place_M = load(place_ref.at[b, token_M], mask=real_M, other=-1)
        column_C = jnp.arange(p.width, dtype=jnp.int32)
        at, real_M1 = (b, token_M[:, None], head_M[:, None]), real_M[:, None]
        if turn_of is None:
            real_MC = real_M1 & (column_C < p.head_width)[None, :]
            q_MC = load(q_ref.at[(*at, column_C[None, :])], mask=real_MC, other=0)
        else:
            q_MC = turn_of(token_M[:, None], real_M1).apply(q_ref, at, real_M1)
        pieces, unit_M = _pieces(q_MC, p.dtype)
        return cls(token_M, head_M, real_M, place_M, pieces, unit_M)

    def weigh(self, p: Plan, k_NC: jax.Array, k_scale: jax.Array | None, place_N: jax.Array, sums: tuple) -> tuple:
        """Softmax weights of a block, relative to the largest score so far, and the sums brought to it."""
        acc_MC, top_M, total_MW = sums
        scores_MN = _dots(self.pieces, k_NC, 1)
        if self.unit_M is not None:
            scores_MN *= self.unit_M[:, None]
        if k_scale is not None:
            scores_MN *= k_scale
        if p.softcap is None:
            scores_MN *= p.scale * LOG2E
        else:
            scores_MN = jnp.tanh(scores_MN * (p.scale / p.softcap)) * (p.softcap * LOG2E)
        seen_MN = place_N[None, :] <= self.place_M[:, None]
        if p.sliding_window is not None:
            seen_MN &= place_N[None, :] > self.place_M[:, None] - p.sliding_window
        scores_MN = jnp.where(seen_MN, scores_MN, LOWEST)
        new_M = jnp.maximum(top_M, jnp.max(scores_MN, 1))
        shrink_M1 = jnp.exp2(top_M - new_M)[:, None]
        base_M = jnp.where(new_M == LOWEST, 0.0, new_M)  # before any place is seen, so that weights are zero
        weights_MN = jnp.exp2(scores_MN - base_M[:, None])
        added_MW = weights_MN if p.apart > 1 else jnp.sum(weights_MN, 1, keepdims=True)
        return acc_MC * shrink_M1, new_M, total_MW * shrink_M1 + added_MW, weights_MN

    def put(self, p: Plan, ref, at: tuple, values: jax.Array, live: jax.Array | bool) -> None:
        """Write values (M, C) or (M,) where these queries stand in (*at, T, H, C) or (*at, T, H)."""
        if values.ndim == 1:
            store(ref.at[(*at, self.token_M, self.head_M)], values, mask=self.real_M & live)
            return
        column_C = jnp.arange(p.width, dtype=jnp.int32)
        mask = self.real_M[:, None] & (column_C < p.head_width)[None, :] & live
        where = (*at, self.token_M[:, None], self.head_M[:, None], column_C[None, :])
        store(ref.at[where], values.astype(ref.dtype), mask=mask)


def _bounds(p: Plan, tiles: list[_Tile], part: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The places start..stop - 1 of a part that any query of these tiles sees; start is where a block begins."""
    last = functools.reduce(jnp.maximum, [jnp.max(tile.place_M) for tile in tiles])
    stop = jnp.minimum(jnp.minimum(last + 1, p.size), p.start_of(part + 1))
    start = p.start_of(part)
    if p.sliding_window is not None:
        places = [jnp.min(jnp.where(tile.real_M, tile.place_M, p.size)) for tile in tiles]
        first = jnp.maximum(functools.reduce(jnp.minimum, places) - (p.sliding_window - 1), 0)
        start = jnp.maximum(start, first // p.block * p.block)
    return start, stop


def _load_block(p: Plan, ref, at: tuple, place_N: jax.Array, stop: jax.Array, h: jax.Array) -> jax.Array:
    """Keys or values of a block, (N, C) as they are stored; zero from `stop` on."""
    column_C = jnp.arange(p.width, dtype=jnp.int32)
    mask = (place_N < stop)[:, None] & (column_C < p.head_width)[None, :]
    return load(ref.at[(*at, place_N[:, None], h, column_C[None, :])], mask=mask, other=0)


def _load_scales(ref, at: tuple, place_N: jax.Array, stop: jax.Array, h: jax.Array) -> jax.Array | None:
    """The scales of a block, (1, N); None where there are none."""
    if ref is None:
        return None
    place_1N = place_N[None, :]
    return load(ref.at[(*at, place_1N, h)], mask=place_1N < stop, other=0.0)


def _add_values(p: Plan, acc_MC, top_M, total_MW, weights_MN, v_NC, v_scale) -> tuple:
    """The sums with a block's values in them."""
    if v_scale is not None:
        weights_MN = weights_MN * v_scale
    pieces, unit_M = _pieces(weights_MN, p.dtype)
    out_MC = _dots(pieces, v_NC, 0)
    if unit_M is not None:
        out_MC *= unit_M[:, None]
    return acc_MC + out_MC, top_M, total_MW


def _pieces(x_MK: jax.Array, dtype: str) -> tuple[list[jax.Array], jax.Array | None]:
    """x as a sum of arrays of `dtype`, and by what (M,) that sum is to be multiplied, or None.

    The first piece is x cut to the bits that `dtype` has: no compiler can take that for a rounding to be left out.
    """
    if x_MK.dtype == jnp.dtype(dtype):
        return [x_MK], None
    x_MK, unit_M = x_MK.astype(jnp.float32), None
    if dtype == "float32":
        return [x_MK], None
    if dtype == "float16":
        power_M = jax.lax.bitcast_convert_type(jnp.max(jnp.abs(x_MK), 1), jnp.int32) & 0x7F800000
        inverse_M = jax.lax.bitcast_convert_type(0x7F000000 - power_M, jnp.float32)
        x_MK = x_MK * inverse_M[:, None] * LIFT
        unit_M = jax.lax.bitcast_convert_type(power_M, jnp.float32) * (1 / LIFT)
    cut = ~0xFFFF if dtype == "bfloat16" else ~0x1FFF
    bits_MK = jax.lax.bitcast_convert_type(x_MK, jnp.int32) & jnp.int32(cut)
    first_MK = jax.lax.bitcast_convert_type(bits_MK, jnp.float32)
    return [first_MK.astype(dtype), (x_MK - first_MK).astype(dtype)], unit_M


def _dots(pieces: list[jax.Array], y: jax.Array, axis: int) -> jax.Array:
    """The sum of the products of each piece (M, X) and y, whose axis `axis` is X, in float32."""
    precision = jax.lax.Precision.HIGHEST if y.dtype == jnp.float32 else None

    def dot(x: jax.Array) -> jax.Array:
        sides = (((1,), (axis,)), ((), ()))
        return jax.lax.dot_general(x, y, sides, precision=precision, preferred_element_type=jnp.float32)

    return functools.reduce(jnp.add, [dot(x) for x in reversed(pieces)])  # the small ones first


def _join_parts(p: Plan, form: Records | None, place_ref, acc_ref, top_ref, total_ref, out_ref, *made_refs) -> None:
    """One query: the parts of its row that it sees, joined."""
    head, t, b = program_id(0), program_id(1), program_id(2)
    place = jnp.minimum(load(place_ref.at[b, t]), p.size - 1)
    first = jnp.int32(0)
    if p.sliding_window is not None:
        first = p.part_of(jnp.maximum(place - (p.sliding_window - 1), 0))
    count = jnp.where(place < 0, 0, p.part_of(place) + 1)
    column_C = jnp.arange(p.width, dtype=jnp.int32)

    def step(i: jax.Array, carry: tuple) -> tuple:
        acc_C, top, total = carry
        part_P = i * JOINED + jnp.arange(JOINED, dtype=jnp.int32)
        real_P = (part_P >= first) & (part_P < count)
        real_PC = real_P[:, None] & (column_C < p.head_width)[None, :]
        top_P = load(top_ref.at[b, part_P, t, head], mask=real_P, other=LOWEST)
        total_P = load(total_ref.at[b, part_P, t, head], mask=real_P, other=0.0)
        acc_PC = load(acc_ref.at[b, part_P[:, None], t, head, column_C[None, :]], mask=real_PC, other=0.0)
        new = jnp.maximum(top, jnp.max(top_P))
        share_P, shrink = jnp.exp2(top_P - new), jnp.exp2(top - new)
        acc_C = acc_C * shrink + jnp.sum(acc_PC * share_P[:, None], 0)
        return acc_C, new, total * shrink + jnp.sum(total_P * share_P)

    zero = jnp.zeros(p.width, jnp.float32), jnp.float32(LOWEST), jnp.float32(0)
    acc_C, _, total = jax.lax.fori_loop(first // JOINED, (count + JOINED - 1) // JOINED, step, zero)
    out_C = (acc_C / total).astype(out_ref.dtype)
    store(out_ref.at[b, t, head, column_C], out_C, mask=column_C < p.head_width)
    if form:
        form.write_part(out_C, head, made_refs)
