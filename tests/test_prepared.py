"""What makes x and prepares it for the tensor cores in one launch, in Pallas' interpreter: the bits are those of two.

tests/gpu/test_step_on_gpu.py has the same on a GPU.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_quant_formats import random_weights

from realm_jax.kernels import int8_row, matmul, operand, pallas, triton_gate, triton_norm
from realm_jax.kernels.matmul import wanted_form
from realm_jax.kernels.operand import Form, Prepared, operand_of, plain
from realm_jax.model import Config, Rope, init_params, layers
from realm_jax.model.params import FeedForward
from realm_jax.model.transformer import run
from realm_jax.quant import quantize

EPS = 1e-5


@pytest.fixture
def interpreter():
    with pallas.interpreted():
        yield


def same(got, want) -> None:
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(np.asarray(one, np.float64), np.asarray(other, np.float64))


def rows_of(dtype: str, *shape: int) -> list[jax.Array]:
    return [jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype) for seed in range(2)]


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
def test_one_launch_has_the_bits_of_two(dtype):
    x, more = rows_of(dtype, 3, 2, 96)
    form = Form(2 if dtype == "float32" else 1, 2 if dtype == "float32" else 1, 4)
    *sums, prepared = triton_norm.add_norm(x, more, jnp.ones(96), eps=EPS, form=form)
    *want, nothing = triton_norm.add_norm(x, more, jnp.ones(96), eps=EPS)
    same(sums, want)
    assert nothing is None
    prepare = jax.jit(operand_of, static_argnums=1)
    same(prepared, prepare(sums[1], form))
    product, prepared = triton_gate.gated(x, more, form=form)
    same(prepared, prepare(product, form))
    exact = np.asarray(x, np.float64) / (1 + np.exp(-np.asarray(x, np.float64))) * np.asarray(more, np.float64)
    np.testing.assert_allclose(product.astype(jnp.float32), exact, rtol=1.01 * jnp.finfo(dtype).eps, atol=1e-7)


WIDE = 2304  # three parts, of which the last one is a quarter full


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize(
    ("dtype", "sums"),
    [("bfloat16", (0, 0)), ("float32", (256, 16)), pytest.param("float16", (256, 32), marks=pytest.mark.slow),
     pytest.param("float32", (0, 0), marks=pytest.mark.slow)],
)  # fmt: skip
def test_the_parts_of_a_row_have_the_bits_of_a_whole(monkeypatch, dtype, sums):
    x, more = rows_of(dtype, 3, WIDE)
    form = Form(2 if dtype == "float32" else 1, 1, WIDE // 32, *sums)
    assert operand.grid(form, operand.choose_part(form)) == (form.programs, 3)
    weight = jnp.linspace(0.5, 2, WIDE)

    def found():
        norm = triton_norm.add_norm(x, more, weight, eps=EPS, form=form)
        return jax.jit(operand_of, static_argnums=1)(x, form), *norm, triton_gate.gated(x, more, form=form)

    parts = found()
    monkeypatch.setattr(operand, "choose_part", lambda form: 4096)
    jax.clear_caches()
    same(parts, found())


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize(
    "names", [("Q4_K", "Q6_K"), pytest.param(("Q4_1", "NVFP4", "TQ1_0", "IQ2_XS"), marks=pytest.mark.slow)]
)
def test_records_of_a_row_are_those_of_a_launch_of_their_own(names):
    x, more = rows_of("bfloat16", 1, 1, WIDE)
    weights = [random_weights(name, 5, WIDE).replace(arithmetic="int8") for name in names]
    form = wanted_form(x, [*weights, weights[0]])
    assert len(form.kinds) == len(names) and wanted_form(jnp.zeros((2, WIDE)), weights) is None
    _, normed, found = triton_norm.add_norm(x, more, jnp.linspace(0.5, 2, WIDE), eps=EPS, form=form)
    record = jax.jit(int8_row.record_for, static_argnums=1)
    same(found, [record(normed, kind) for kind in form.kinds])
    product, found = triton_gate.gated(x, more, form=form)
    same(found, [record(product, kind) for kind in form.kinds])
    prepared = Prepared(product, found, form)
    others = [*weights[:2], random_weights("Q8_0", 5, WIDE).replace(arithmetic="int8")]
    assert [launches("prepare_int8", lambda w=w: matmul(prepared, w)) for w in others] == [0, 0, 1]
    same(jax.jit(matmul)(prepared, weights[0]), matmul(product, weights[0]))


def test_a_row_is_cut_while_there_are_multiprocessors():
    def cut(rows: int, width: int) -> tuple[int, int]:
        form = Form(1, -(-rows // 8), -(-width // 32))
        part = operand.choose_part(form)
        return part, operand.grid(form, part)[1]

    assert [cut(1, width) for width in (20, 1000, 4096, 14336, 32768)] == [
        (256, 1), (1024, 1), (1024, 4), (2048, 7), (2048, 16),
    ]  # fmt: skip
    assert [cut(rows, 14336) for rows in (9, 32, 64)] == [(2048, 7), (4096, 4), (8192, 2)]
    assert [cut(rows, 4096) for rows in (33, 64)] == [(2048, 2), (2048, 2)]


@pytest.mark.usefixtures("interpreter")
def test_the_largest_product_is_found_where_a_quick_look_would_not_do():
    """A power of two, what is rounded to one, what is far below its factors, and what is not finite."""
    gates = [32, 8.0625, -20, jnp.inf, jnp.nan, 2**100, 0]
    ups = [2, 7.9375, 3, 1, 1, 2**100, 1]
    gate, up = (jnp.zeros((7, 96)).at[:, 5].set(jnp.asarray(column)) for column in (gates, ups))
    for dtype, tiles in (("bfloat16", 1), ("float32", 2)):
        form = Form(tiles, tiles, 3)
        product, found = triton_gate.gated(gate.astype(dtype), up.astype(dtype), form=form)
        same(found, jax.jit(operand_of, static_argnums=1)(product, form))
        assert np.isnan(found.back[:7]).tolist() == [False] * 3 + [True] * 3 + [False]
        assert found.back[0] == 2.0 ** (6 - 14)


def launches(name: str, function) -> int:
    """How often it launches a kernel of that name."""

    def count(jaxpr) -> int:
        own = (1 for eqn in jaxpr.eqns if eqn.primitive.name == "pallas_call" and eqn.params["name"] == name)
        inner = (getattr(x, "jaxpr", x) for eqn in jaxpr.eqns for x in jax.tree.leaves(list(eqn.params.values())))
        return sum(own) + sum(count(x) for x in inner if hasattr(x, "eqns"))

    return count(jax.make_jaxpr(lambda: function())().jaxpr)


@pytest.mark.usefixtures("interpreter")
def test_a_product_takes_it_where_the_form_fits():
    x, _ = rows_of("bfloat16", 1, 64)
    most, few = (random_weights(name, 5, 64) for name in ("Q8_0", "Q4_1"))
    form = wanted_form(x, [most, few, most, jnp.ones((5, 64))])
    assert form == wanted_form(x, [most]) != wanted_form(x, [few])
    assert wanted_form(x, [most.replace(arithmetic="int8"), jnp.ones((5, 64))]) is None
    prepared = Prepared(x, operand_of(x, form), form)
    assert [launches("prepare", lambda w=w: matmul(prepared, w)) for w in (most, few)] == [0, 1]
    product = jax.jit(matmul)
    same(product(prepared, most), product(x, most))
    broken = prepared.replace(operand=jax.tree.map(jnp.zeros_like, prepared.operand))
    same(product(broken, most), jnp.zeros((1, 5)))  # what was prepared is what is read,
    same(matmul(broken, most, impl="reference"), matmul(x, most, impl="reference"))  # but not here


def served(w, x, more):
    """The sum, and products by the norm and by a gated product that came prepared."""
    total, normed = layers.add_norm(x, more, jnp.ones(64), EPS, [w])
    product = layers.gated(normed.x, more, w)
    assert isinstance(normed, Prepared) and isinstance(product, Prepared)
    return total, matmul(normed, w), matmul(product, w)


def plainly(w, x, more):
    total, normed = layers._add_norm((EPS, None), x, more, jnp.ones(64))
    return total, matmul(normed, w), matmul(*layers._gated(None, normed, more), w)


@pytest.mark.usefixtures("interpreter")
def test_gradients_are_those_of_xla():
    rows, w = rows_of("float32", 3, 64), random_weights("Q8_0", 5, 64)

    def gradient(own):
        def loss(*rows):  # linear in what comes out, so that no product has to be computed
            return sum(jnp.sum(y * jnp.arange(y.size).reshape(y.shape)) for y in own(w, *rows))

        return jax.jit(jax.grad(loss, (0, 1)))(*rows)

    for one, other in zip(gradient(served), gradient(plainly), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("interpreter")
def test_a_vmap_is_more_rows():
    rows, w = rows_of("float32", 3, 64), random_weights("Q8_0", 5, 64)
    same(jax.vmap(lambda *rows: served(w, *rows))(*rows), served(w, *rows))


def small_model() -> tuple:
    config = Config(
        architecture="llama", vocab_size=32, context_length=16, layers=1, width=64, ffn_width=96, heads=4, kv_heads=2,
        head_width=16, norm_eps=EPS, rope=Rope(dimensions=16),
    )  # fmt: skip
    params = init_params(config, jax.random.key(0))
    packed = jax.tree.map(lambda w: quantize(np.asarray(w), "Q8_0") if w.ndim == 2 else w, params.layers)
    return params.replace(layers=packed), config, jnp.ones((1, 1), jnp.int32)


@pytest.mark.usefixtures("interpreter")
def test_a_layer_prepares_the_output_of_attention_alone():
    params, config, tokens = small_model()
    assert [launches(name, lambda: run(params, config, tokens)) for name in ("prepare", "matmul_Q8_0")] == [1, 7]


@pytest.mark.slow
@pytest.mark.usefixtures("interpreter")
def test_a_layer_has_the_same_bits_without(monkeypatch):
    params, config, tokens = small_model()
    fused = run(params, config, tokens)[0]
    monkeypatch.setattr(layers, "with_operand", lambda x, operand, form: x)
    assert launches("prepare", lambda: run(params, config, tokens)) == 7
    same(run(params, config, tokens)[0], fused)


def test_without_the_kernels_it_is_what_xla_does():
    x, more = rows_of("float32", 2, 64)
    w = random_weights("Q8_0", 64, 64)
    ffn = FeedForward(norm=jnp.ones(64), gate=w, up=w, down=w)
    total, normed = layers.add_norm(x, more, ffn.norm, EPS, (ffn.gate, ffn.up))
    same((total, plain(normed)), (x + more, layers.rms_norm(x + more, ffn.norm, EPS)))
    gate = matmul(normed, w)
    same(layers.feed_forward(ffn, normed), matmul(jax.nn.silu(gate) * gate, w))
    assert isinstance(normed, jax.Array) and isinstance(layers.gated(x, more, w), jax.Array)


@pytest.mark.usefixtures("for_an_h200")
def test_it_lowers_for_cuda():
    x, more = rows_of("bfloat16", 3, 96)
    form = Form(1, 1, 3)
    lowered = jax.jit(lambda *rows: triton_gate.gated(*rows, form=form)).trace(x, more)
    assert "gated" in lowered.lower(lowering_platforms=("cuda",)).as_text()
