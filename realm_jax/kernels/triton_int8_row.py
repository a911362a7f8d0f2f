"""Products of one row by packed weights in int8 arithmetic on tensor cores: a Pallas Triton kernel. Called by
`triton_int8`, which says what is common to it and to the kernel for more rows.

With one row the instruction has seven columns to spare. So x stands in them a sub-block a column (`int8_row`), and one
chain of products has the sums of eight sub-blocks apart: of four units, of which each lane of four scales one.

Shape key: `M` rows of x, `N` output features, `K` input features, `P` threads of a program.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from realm_jax.kernels import fragments, fragments_int8, int8_row, pallas
from realm_jax.kernels.ahead import Ahead, matrix_of, operands_of
from realm_jax.kernels.int8_row import Record, record_for, record_of
from realm_jax.kernels.lanes import SIGNS, coordinates
from realm_jax.kernels.operand import Prepared
from realm_jax.kernels.plan import Plan, grid_of, ring_bytes
from realm_jax.kernels.results import leave, shapes
from realm_jax.kernels.ring import Place
from realm_jax.quant.tensor import QuantizedTensor


def matmul_each(x: jax.Array | Prepared, weights: list[QuantizedTensor], own: Plan) -> list[jax.Array]:
    """Products of one row by weights of one format and one plan, but for their outputs."""
    format = weights[0].format
    form = record_of(weights[0], own)
    outputs = tuple(w.shape[0] for w in weights)
    results = pallas.call(
        functools.partial(_kernel, own=own, format=format, outputs=outputs, form=form),
        [record_for(x, form), *operands_of(weights)],
        shapes(own, outputs, x.dtype),
        grid=grid_of(own, outputs),
        num_warps=own.warps,
        num_stages=1,
        name=f"matmul_int8_{format}",
    )
    return [y.reshape(*x.shape[:-1], -1) for y in results]


def _kernel(*refs, own: Plan, format: str, outputs: tuple[int, ...], form: Record) -> None:
    """One program: ROWS rows of one of the weights, all of K."""
    record_ref, *plane_refs = refs[: -len(outputs)]
    matrix, which = matrix_of(plane_refs, own, format, outputs, own.group)
    shape = 32 * own.warps, 4
    thread, item = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    warp, _, t, _ = coordinates(lax.iota(jnp.int32, shape[0]))
    column = thread % 32 // 4
    masks = [jnp.where(column == 2 * item + q, -1, 0) for q in range(form.subs)]
    zero = fragments.zeros(pallas.load(record_ref.at[jnp.zeros_like(item), item]))

    def places(s: jax.Array) -> list[list[Place | None]]:
        return [*matrix.places(s), int8_row.places(record_ref, form, own.group(s, warp))]

    ahead = Ahead(places, own.warps, own.steps, own.stages, ring_bytes(own.warps, 1))

    def step(s: jax.Array, carry: tuple) -> tuple:
        token, totals, mins = carry
        token = ahead.wait(token, s)
        rows = matrix.read(s, ahead.take(token, s)[:2], form.signed)
        # Codes stay as far up in their bytes as they are, where a sub-block has one such distance.
        raised = rows[0].raised[:: form.halves] if form.plain else ()
        words = [row.raised_words() if raised else row.lowered() for row in rows]
        if form.signed and not rows[0].signed:
            words = [[word ^ SIGNS for word in row] for row in words]
        low, high = matrix.own(s, ahead.take_own(token, s, t)[:2])

        def both(numbers: list[list[jax.Array]], number: int) -> jax.Array:
            """Of rows g and g + 8 what two sub-blocks from `number` on have."""
            return fragments.joined(*(row[number + q % form.subs] for row in numbers for q in range(2)))

        scales = [row.scales for row in (low, high)]
        if raised:
            scales = [[own * 2.0**-up if up else own for own, up in zip(row, raised, strict=True)] for row in scales]

        for number in range(form.rounds):
            first, per = number * form.subs, form.subs * form.halves
            x, sizes, *sums = (ahead.take_words(token, s, *place) for place in form.places_of_round(number, own.warps))
            sizes, *sums = (lax.bitcast_convert_type(words, jnp.float32) for words in (sizes, *sums))
            products = fragments_int8.mma_units(
                list(zip(*(row[number * per : number * per + per] for row in words), strict=True)),
                x, masks, form.halves, form.signed,
            )  # fmt: skip
            totals = fragments_int8.add_units(
                totals, products, sums[0] if sums else None, both(scales, first), sizes,
                form.halves, form.subs, both([low.offsets, high.offsets], first) if form.offsets else None,
            )  # fmt: skip
        if form.mins:
            a = fragments_int8.own_mins(low.mins[0], high.mins[0])
            dots = fragments_int8.mma_mins(zero, a, ahead.take_words(token, s, *form.place_of_mins(own.warps)))
            factors = [fragments.joined(*[row.mins[1]] * 4) for row in (low, high)]
            mins = fragments.add_scaled(dots, *factors, mins, 0, True)
        return token, totals, mins

    _, totals, mins = lax.fori_loop(0, own.steps, step, (ahead.begin(), zero, zero))
    total = fragments.sum_over_warps(fragments.sum_over_t(totals) + mins, own.warps)
    leave(refs[-len(outputs) :], None, None, total, matrix.first, jnp.int32(0), own, which)
