"""The Triton kernel behind `kernels.matmul`, in Pallas' interpreter on the CPU.

Every format against float64, odd shapes, that a row's bits do not depend on its neighbours, gradients, vmap, and that
it lowers for CUDA. tests/gpu has the rest.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_matmul import nmse
from test_quant_formats import random_blocks, random_weights

from random_model import weight_spec
from realm_jax.errors import RealmError
from realm_jax.kernels import ahead, assembly, choose_impl, codes, lanes, matmul, pallas, plan, reference
from realm_jax.kernels.matmul import matmul_each
from realm_jax.kernels.operand import shapes
from realm_jax.kernels.ring import Ring, read_now
from realm_jax.quant import FORMATS, QuantizedTensor


@pytest.fixture(autouse=True)
def interpreter():
    with pallas.interpreted():
        yield


def product(name: str, rows: int, n: int, k: int, dtype=jnp.float32):
    x = jnp.asarray(np.random.default_rng(rows).standard_normal((rows, k)), dtype)
    w = random_weights(name, n, k, seed=1)
    return x, w, np.asarray(x, np.float64) @ np.asarray(w.dequantize(), np.float64).T


def test_every_format_has_a_reader():
    assert set(codes.READERS) == set(FORMATS)


QUICK = ("Q5_1", "Q8_0", "IQ4_XS", "IQ2_XS", "NVFP4")  # the others are for test-all
every_format = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in codes.READERS]
)


@every_format
def test_one_block_and_an_odd_number_of_outputs(name):
    x, w, want = product(name, 1, 5, FORMATS[name].block_size)
    assert choose_impl(x.shape, w) == "triton"
    assert nmse(matmul(x, w), want) < 1e-12


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "Q4_K" else pytest.mark.slow) for name in codes.READERS]
)
@pytest.mark.parametrize(("rows", "n", "k"), [(5, 37, 1280), pytest.param(33, 16, 4096, marks=pytest.mark.slow)])
def test_rows_and_shapes(name, rows, n, k):
    x, w, want = product(name, rows, n, k)
    assert nmse(matmul(x, w, impl="triton"), want) < 1e-12


@pytest.mark.parametrize("dtype", [jnp.bfloat16, pytest.param(jnp.float16, marks=pytest.mark.slow)])
def test_sixteen_bits_are_rounded_at_the_end_alone(dtype):
    x, w, want = product("Q4_0", 9, 16, 256, dtype)
    y = matmul(x, w, impl="triton")
    assert y.dtype == dtype
    assert nmse(y, np.asarray(jnp.asarray(want, jnp.float32).astype(dtype), np.float64)) < 1e-7


def test_a_row_has_the_same_bits_whatever_is_beside_it():
    x, w, _ = product("Q4_1", 64, 16, 256)
    whole = np.asarray(matmul(x, w))
    for rows in (1, 5):
        np.testing.assert_array_equal(np.asarray(matmul(x[-rows:], w)), whole[-rows:])


@pytest.mark.parametrize(
    ("name", "few_outputs", "dtype", "capability"),
    [
        ("Q8_0", 0, jnp.bfloat16, "8.0"),
        ("Q8_0", 8192, jnp.bfloat16, "9.0"),
        pytest.param("Q4_K", 0, jnp.bfloat16, "9.0", marks=pytest.mark.slow),
        pytest.param("NVFP4", 8192, jnp.bfloat16, "9.0", marks=pytest.mark.slow),
        pytest.param("Q6_K", 8192, jnp.float32, "8.0", marks=pytest.mark.slow),
        pytest.param("Q6_K", 8192, jnp.float32, "9.0", marks=pytest.mark.slow),
        pytest.param("Q2_K", 0, jnp.float32, "8.0", marks=pytest.mark.slow),
    ],
)
def test_turns_of_one_warp_or_of_a_program_each_give_the_bits_of_a_warp_each(
    name, few_outputs, dtype, capability, monkeypatch
):
    monkeypatch.setattr(plan, "FEW_OUTPUTS", few_outputs)
    monkeypatch.setattr(pallas, "capability", lambda: capability)
    x, w, _ = product(name, 17, 150, 512 if name == "Q8_0" else 1024, dtype)
    own = plan.cut(17, dtype, w)
    assert own.across and own.turns > 1 and own.split == (few_outputs > 0) and own.grouped == (capability == "9.0")
    x = x.at[16].multiply(2.0**119)
    quickly_compiled = {"xla_backend_optimization_level": 0}
    product_of = jax.jit(functools.partial(matmul, impl="triton"), compiler_options=quickly_compiled)
    whole = np.asarray(product_of(x, w))
    for row in (0, 16):
        alone = np.asarray(product_of(x[row : row + 1], w))
        np.testing.assert_array_equal(alone, whole[row : row + 1])
        assert np.isfinite(alone.astype(np.float32)).any()


@pytest.mark.usefixtures("for_an_h200")
@pytest.mark.parametrize(("capability", "warps"), [("8.0", [2, 2]), ("8.9", [2, 2]), ("9.0", [2, 4])])
def test_the_fewer_rows_of_weights_the_more_warps_a_program_has_if_they_fit(capability, warps, monkeypatch):
    monkeypatch.setattr(pallas, "capability", lambda: capability)
    weights = [weight_spec("Q6_K", (outputs, 14336)) for outputs in (14336, 8192)]
    plans = [plan.plan(1, jnp.bfloat16, w) for w in weights]
    assert [own.turns for own in plans] == warps
    for own, w in zip(plans, weights, strict=True):
        assert 2 * own.turns * plan.step_bytes(w) < plan.ring_bytes(own.turns, 1)


def test_rows_of_any_size_and_rows_that_are_not_finite():
    x, w, want = product("Q4_0", 6, 16, 256)
    scales = np.float32([1e-30, 1e-3, 1, 1e30, 1, 1])
    x = (x * scales[:, None]).at[4, 7].set(jnp.nan).at[5, 9].set(jnp.inf)
    y = np.asarray(matmul(x, w, impl="triton"), np.float64)
    assert np.isnan(y[4:]).all()
    assert nmse(y[:4] / scales[:4, None], want[:4]) < 1e-12


def test_a_jax_without_the_names_that_kernels_need_has_no_kernels(monkeypatch):
    monkeypatch.setattr(pallas, "_interpreting", False)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert pallas.available()
    monkeypatch.setattr(assembly, "lowering", None)
    assert not pallas.available()


@pytest.mark.parametrize(
    ("capability", "serves"), [("7.5", False), ("8.0", True), ("9.0", True), ("12.0", True), ("gfx942", False)]
)
def test_kernels_are_for_gpus_from_ampere_up(capability, serves):
    assert pallas.serves(capability) == serves


@pytest.mark.parametrize(("capability", "grouped"), [("8.9", False), ("9.0", True), ("10.0", False), ("12.0", False)])
def test_warps_multiply_together_where_there_is_such_an_instruction(capability, grouped, monkeypatch):
    monkeypatch.setattr(pallas, "capability", lambda: capability)
    x, w = jnp.zeros((64, 1024), jnp.bfloat16), random_weights("Q4_K", 64, 1024, seed=1)
    own = plan.cut(64, x.dtype, w)
    assert own.grouped == grouped and own.across >= 4 and plan.form_of(x, w).grouped == grouped


@pytest.mark.parametrize("name", codes.READERS)
def test_four_warps_multiply_together_for_every_format_and_shape(name, monkeypatch):
    monkeypatch.setattr(pallas, "capability", lambda: "9.0")
    for shape, dtype in itertools.product([(28672, 4096), (4096, 14336)], [jnp.bfloat16, jnp.float32]):
        own = plan.cut(64, dtype, weight_spec(name, shape))
        assert own.grouped and own.warps == 4


def test_zeros_give_zeros():
    _, w, _ = product("Q4_K", 1, 5, 256)
    np.testing.assert_array_equal(np.asarray(matmul(jnp.zeros((2, 256)), w, impl="triton")), 0)


def test_gradient_and_vmap():
    x, w, want = product("Q8_0", 3, 5, 64)
    grad = jax.grad(lambda x: (matmul(x, w) ** 2).sum())(x)
    assert nmse(grad, np.asarray(reference.matmul_transposed(2 * reference.matmul(x, w), w), np.float64)) < 1e-12
    np.testing.assert_array_equal(np.asarray(jax.vmap(lambda x: matmul(x, w))(x)), np.asarray(matmul(x, w)))
    both = jax.tree.map(lambda plane: jnp.stack([plane, plane]), w)
    for y in jax.vmap(matmul, in_axes=(None, 0))(x, both):
        assert nmse(y, want) < 1e-12


def test_more_rows_than_it_takes_are_refused_in_one_line():
    x, w, _ = product("Q4_0", 65, 5, 32)
    with pytest.raises(
        RealmError, match=r"cannot multiply x \(65, 32\) by Q4_0 weights \(5, 32\): it takes 1 to 64 rows"
    ):
        matmul(x, w, impl="triton")
    assert choose_impl(x.shape, w) == "reference"


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in ("Q8_0", "IQ2_XS") else pytest.mark.slow) for name in codes.READERS]
)
@pytest.mark.parametrize("rows", [1, pytest.param(33, marks=pytest.mark.slow)])
@pytest.mark.usefixtures("for_an_h200")
def test_it_lowers_for_cuda(name, rows):
    x, w = jnp.zeros((rows, 512)), weight_spec(name, (16, 512))
    lowered = jax.jit(functools.partial(matmul, impl="triton")).trace(x, w).lower(lowering_platforms=("cuda",))
    assert f"matmul_{name}" in lowered.as_text() and "cp.async" in lowered.as_text()


@pytest.mark.usefixtures("for_an_h200")
def test_it_lowers_where_nothing_can_be_copied_ahead():
    x, w = jnp.zeros((3, 1280)), weight_spec("Q6_K", (16, 1280))  # ten units, and too many columns of x
    lowered = jax.jit(functools.partial(matmul, impl="triton")).trace(x, w).lower(lowering_platforms=("cuda",))
    assert "cp.async" not in lowered.as_text()


def several(name: str, k: int) -> list:
    return [random_weights(name, n, k, seed=n) for n in (20, 5, 16)]


def test_several_weights_of_one_x_are_multiplied_as_each_is():
    x, weights = jnp.asarray(np.random.default_rng(0).standard_normal((3, 64)), jnp.float32), several("Q8_0", 64)

    def loss(each, x):
        return sum((y**2).sum() for y in each(x))

    def alone(x):
        return [matmul(x, w) for w in weights]

    def together(x):
        return matmul_each(x, weights)

    for y, own in zip(together(x), alone(x), strict=True):
        np.testing.assert_array_equal(np.asarray(y), np.asarray(own))
    grads = (np.asarray(jax.grad(functools.partial(loss, each))(x), np.float64) for each in (together, alone))
    assert nmse(*grads) < 1e-12
    for y, own in zip(jax.vmap(together)(x), alone(x), strict=True):
        np.testing.assert_array_equal(np.asarray(y), np.asarray(own))


@pytest.mark.usefixtures("for_an_h200")
@pytest.mark.parametrize(
    ("names", "count"),
    [
        ("IQ2_XS IQ2_XS IQ3_S", 1),
        ("IQ2_XS IQ2_XS IQ2_XS", 1),
        ("IQ2_XS IQ3_S IQ2_XS", 2),
    ],
)
def test_weights_of_one_format_share_a_launch(names, count):
    weights = [weight_spec(name, (n, 512)) for name, n in zip(names.split(), (20, 5, 16), strict=True)]
    x = jnp.zeros((1, 512))
    lowered = jax.jit(matmul_each).trace(x, weights).lower(lowering_platforms=("cuda",)).as_text()
    assert lowered.count('name = "matmul_IQ2_XS"') == count


def bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))


def lane_of(name: str, refs: dict, width: int, outputs: int, shape: tuple[int, ...]) -> lanes.Lane:
    """Threads (P,) or (P, 4) of a program (step, eight rows), as `triton_matmul` has them."""
    thread = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    item = jax.lax.broadcasted_iota(jnp.int32, shape, 1) if len(shape) == 2 else jnp.zeros_like(thread)
    row = jnp.minimum(8 * pallas.program_id(1) + thread % 32 // 4, outputs - 1)
    group = pallas.program_id(0) * (shape[0] // 32) + thread // 32
    own, units = {key: refs[key] for key in codes.fields(name)}, codes.READERS[name].units(width)
    return lanes.Lane(own, row, group, item, thread % 4, units, refs.get("grid"))


@pytest.mark.parametrize("name", codes.READERS)
def test_what_is_copied_ahead_is_what_readers_read(name, monkeypatch):
    """For each place that the ring copies: the items from there, of the thread that copies them, are those that the
    reader of the format reads itself, bit for bit. Two warps, two steps; rows past the last are clipped."""
    reader, outputs, shape, copied, seen = codes.READERS[name], 11, (2, 2, 64, 4), [], []
    width, read = 16 * reader.unit, lanes.Lane.read
    raw = random_blocks(name, outputs, width // FORMATS[name].block_size)
    planes = QuantizedTensor.from_bytes(raw, name, (outputs, width)).planes
    monkeypatch.setattr(lanes.Lane, "read", lambda *args, **kwargs: seen.append(read(*args, **kwargs)) or seen[-1])

    def body(*refs) -> None:
        *refs, out_ref = refs
        refs = dict(zip(operands, refs, strict=True))
        places = lanes.places(reader, lane_of(name, refs, width, outputs, shape[2:3]))
        seen.clear()
        reader.read(lane_of(name, refs, width, outputs, shape[2:]))
        thread, different = jnp.arange(shape[2], dtype=jnp.int32), jnp.zeros(shape[2:], bool)
        for place, items in zip(places, seen, strict=True):
            if place is not None:
                own = thread // (32 // place.slots.count)
                there = bits(read_now(place))[own * (32 // place.slots.count)]
                different |= (there != bits(items)) | (place.slots.own != own)[:, None]
        copied.append(sum(place is not None for place in places))
        out_ref[pallas.program_id(0), pallas.program_id(1)] = different.astype(jnp.int32)

    operands = dict(planes) | ({} if reader.grid is None else {"grid": jnp.asarray(reader.grid())})
    kernel = functools.partial(pallas.call, body, out_shape=pallas.Shape(shape, jnp.int32), grid=shape[:2])
    quickly_compiled = jax.jit(kernel, compiler_options={"xla_backend_optimization_level": 0})
    np.testing.assert_array_equal(quickly_compiled(list(operands.values())), 0)
    assert copied[0] >= 2


@pytest.mark.parametrize(
    ("name", "rows", "dtype"),
    [
        ("Q4_K", 1, jnp.float32),
        ("Q4_1", 2, jnp.bfloat16),
        pytest.param("Q6_K", 1, jnp.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_lanes_that_copy_together_fill_every_slot(name, rows, dtype):
    """Of w, and of x where it has one or two columns: places of a group are copied by the same lanes, and those reach
    all slots."""
    reader, x, w = codes.READERS[name], jnp.zeros((rows, 1024), dtype), random_weights(name, 16, 1024, seed=1)
    own = plan.plan(rows, dtype, w)
    pieces, sums, _ = (jnp.zeros(shape.shape, shape.dtype) for shape in shapes(plan.form_of(x, w)))
    thread = jnp.arange(32 * own.warps, dtype=jnp.int32)
    lane = lanes.Lane(dict(w.planes), 0 * thread, 0 * thread, 0 * thread, thread % 4, reader.units(1024))
    places = [place for place in lanes.places(reader, lane) if place is not None]
    step, live = jnp.int32(0), rows * own.pieces
    places += ahead.places_of_pieces(pieces, step, 4 * reader.unit // 32, live, own.warps)
    if reader.mins:
        places.append(ahead.place_of_pairs(sums, 0, step, live, own.warps))
    elif reader.offsets:
        places += [place for place in ahead.places_of_sums(sums, step, live, own.pieces, own.warps) if place]
    groups = Ring(places, own.warps, 2, 2**16)._groups(places)
    assert len(groups) >= 2
    for group in groups:
        conditions = [place.slots.copies for place, _ in group]
        for (place, _), copies in zip(group, conditions, strict=True):
            assert (copies is None) == (conditions[0] is None)
            if copies is not None:
                np.testing.assert_array_equal(copies, conditions[0])
            reached = place.slots.own if copies is None else place.slots.own[np.asarray(copies)]
            assert set(reached.tolist()) == set(range(own.warps * place.slots.count))
