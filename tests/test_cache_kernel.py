"""The kernels that take new tokens into the cache, in Pallas' interpreter: bit for bit what XLA does, or what two
launches do in place of one, and lowered for CUDA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cache_toys import LAYER, LONG, OPTIONS, ROWS, WAYS, attending, cache_of, new_tokens, numbers, same, taken
from decode_toys import random_model
from test_quant_formats import random_weights

from realm_jax.kernels import int8_row, pallas, triton_attention, triton_cache
from realm_jax.kernels.attention_plan import Cut
from realm_jax.kernels.int8_row import Records
from realm_jax.kernels.matmul import wanted_form
from realm_jax.model import KVCache, run
from realm_jax.model.cache import UNBROKEN
from realm_jax.model.layers import _arrays, _attend_in_one_launch, _write_and_attend, rotate_into

SLOW = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.fixture(autouse=True)
def interpreter():
    with pallas.interpreted():
        yield


# Cache, activations, T tokens, H and K heads, C head width, R pairs, halves.
CASES = [
    ("bfloat16", "bfloat16", 3, 6, 2, 20, 8, True),
    ("int8", "float32", 2, 4, 2, 16, 8, False),
    SLOW("float32", "float32", 1, 4, 1, 16, 8, True),
    SLOW("float16", "float32", 2, 2, 2, 32, 12, False),
    SLOW("int8", "bfloat16", 16, 8, 2, 64, 32, True),
    SLOW("float32", "float16", 5, 3, 3, 8, 4, False),
    SLOW("bfloat16", "float32", 4, 7, 1, 96, 48, True),
]


@pytest.mark.parametrize(("dtype", "activations", "T", "H", "K", "C", "R", "halves"), CASES)
def test_bits_are_those_of_xla(dtype, activations, T, H, K, C, R, halves):
    cache, new = cache_of(dtype, K, C), new_tokens(activations, T, H, K, C, R)
    assert triton_cache.refuses(new[1], cache.k) is None
    got, want = (taken(way, cache, halves, ROWS, new) for way in ("kernel", "xla"))
    same(got, want)
    q, written = got
    assert q.dtype == activations and written.k.dtype == dtype and not np.array_equal(q, new[1])
    assert written.broken_B.tolist() == [UNBROKEN, 5, UNBROKEN, 1 + T, UNBROKEN]
    alone = taken("kernel", cache, halves, ROWS[1:2], jax.tree.map(lambda x: x[1:2], new))  # beside nobody
    same((alone[0][0], alone[1].k[1, 0]), (q[1], written.k[1, 0]))


# As above, with a name of OPTIONS.
ATTENDED = [
    ("bfloat16", "bfloat16", 1, 8, 2, 20, 8, True, "capped"),
    ("int8", "float32", 3, 6, 2, 16, 8, False, "window"),
    *(
        SLOW(dtype, activations, T, G * K, K, C, R, halves, list(OPTIONS)[(i + j) % len(OPTIONS)])
        for i, (dtype, activations) in enumerate((
            ("float32", "float32"),
            ("bfloat16", "float32"),
            ("bfloat16", "bfloat16"),
            ("float16", "bfloat16"),
            ("int8", "bfloat16"),
        ))
        for j, (T, G, K, C, R, halves) in enumerate((
            (1, 4, 2, 128, 64, False),
            (3, 5, 2, 96, 24, True),
            (3, 1, 3, 8, 4, False),
            (16, 1, 2, 64, 32, True),
        ))
    ),
]  # fmt: skip


@pytest.mark.parametrize(("dtype", "activations", "T", "H", "K", "C", "R", "halves", "options"), ATTENDED)
def test_attention_in_the_same_launch_has_the_bits_of_two(dtype, activations, T, H, K, C, R, halves, options):
    cache, new = cache_of(dtype, K, C, LONG), numbers(activations, T, H, K, C, R)
    assert triton_attention.refuses_new(new[1], cache.k) is None
    one_launch, two = (attending(launches, halves, **OPTIONS[options]) for launches in (1, 2))
    got, want = (way(cache, ROWS, *new) for way in (one_launch, two))
    same(got, want)
    out, written = got
    place = int(new[0][0, -1])
    assert out.dtype == activations and written.broken_B[3] == place
    assert not np.array_equal(written.k[LAYER, 3, place], cache.k[LAYER, 3, place])
    untouched = np.asarray(written.k[:, 4], np.float32), np.asarray(written.k[0], np.float32)
    np.testing.assert_array_equal(untouched[0], np.asarray(cache.k[:, 4], np.float32))
    np.testing.assert_array_equal(untouched[1], np.asarray(cache.k[0], np.float32))
    alone = one_launch(cache, ROWS[1:2], *jax.tree.map(lambda x: x[1:2], new))
    count = max(1, T - 1)  # the last token of a last row is padding
    same(alone[0][0, :count], out[1, :count])


@pytest.mark.parametrize("launches", [1, 2])
def test_a_model_decodes_as_without_it(launches, monkeypatch):
    """Tokens, lengths and what breaks, in a loop of steps and rows that are a part of the cache's."""
    model, seen = random_model(), []
    rows, count = jnp.array([2, 0, 5]), jnp.array([2, 1, 0])
    module, name = {1: (triton_attention, "write_and_attend"), 2: (triton_cache, "write")}[launches]
    own = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *arrays, **options: seen.append(1) or own(*arrays, **options))

    def steps(cache):
        tokens = jnp.array([[3, 4], [5, 6], [7, 8]])
        for _ in range(2):
            hidden, cache = run(model.params, model.config, tokens, cache, count, rows_B=rows)
        return hidden, cache

    cache = KVCache.create(model.config, 4, 16, "float32")
    if launches == 2:
        monkeypatch.setattr(triton_attention, "refuses_new", lambda q, k: "not now")
    hidden, got = jax.jit(steps)(cache)
    assert len(seen) == 2 * model.config.layers
    monkeypatch.setattr(triton_cache, "refuses", lambda q, k: "not now")
    other, want = jax.jit(lambda cache: steps(cache))(cache)
    assert got.length_B.tolist() == want.length_B.tolist() == [2, 0, 4, 0]
    np.testing.assert_allclose(hidden[:2], other[:2], atol=1e-5 * np.abs(other[:2]).max())
    np.testing.assert_allclose(got.k, want.k, atol=1e-5)


@pytest.mark.slow
def test_gradients_and_vmap_are_those_of_xla():
    cache, (place, *new, rotation) = cache_of("float32", 2, 8), new_tokens("float32", 2, 4, 2, 8, 4)
    new, rows = [jnp.where(jnp.isfinite(x), x, 1) for x in new], jnp.asarray(ROWS)

    def total(own, q, k, v):
        q, written = own((1, True), cache, rows, place, q, k, v, rotation)
        return jnp.sum(jnp.sin(q)) + jnp.sum(jnp.sin(written.k)) + jnp.sum(jnp.cos(written.v))

    got, want = (jax.grad(functools.partial(total, WAYS[way]), (0, 1, 2))(*new) for way in WAYS)
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
    taken_in = functools.partial(WAYS["kernel"], (1, True), cache, rows, place)
    both = jax.vmap(lambda *new: taken_in(*new, rotation))(*(jnp.stack([x, 2 * x]) for x in new))
    same(jax.tree.map(lambda x: x[1], both), taken_in(*(2 * x for x in new), rotation))


@pytest.mark.slow
def test_gradients_and_vmap_of_attention_in_the_same_launch():
    cache, (place, *new, rotation) = cache_of("float32", 2, 8), new_tokens("float32", 2, 4, 2, 8, 4)
    new, rows = [jnp.where(jnp.isfinite(x), x, 1) for x in new], jnp.asarray(ROWS)
    static, at = (1, True, None), (rows, place, jnp.minimum(place, 20))

    def total(own, q, k, v):
        out, written, *_ = own(static, cache, *at, q, k, v, rotation)
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.sin(written.k)) + jnp.sum(jnp.cos(written.v))

    ways = _attend_in_one_launch, _write_and_attend
    got, want = (jax.grad(functools.partial(total, way), (0, 1, 2))(*new) for way in ways)
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    attended_to = functools.partial(_attend_in_one_launch, static, cache, *at)
    both = jax.vmap(lambda *new: attended_to(*new, rotation))(*(jnp.stack([x, 2 * x]) for x in new))
    same(jax.tree.map(lambda x: x[1], both), attended_to(*(2 * x for x in new), rotation))


@pytest.mark.usefixtures("interpreter")
def test_the_join_makes_the_record_of_a_launch_of_its_own():
    """For int8 arithmetic: of one row, where heads are whole parts of what is wanted."""
    heads, width = 4, 64
    cache, (_, *new, rotation) = cache_of("bfloat16", 2, width, 256), new_tokens("bfloat16", 1, heads, 2, width, 32)
    weights = [random_weights(name, 5, heads * width).replace(arithmetic="int8") for name in ("Q4_K", "Q5_1")]
    form = wanted_form(jnp.zeros(heads * width), weights)
    options = {"scale": 0.3, "softcap": None, "sliding_window": None, "window": None, "cut": Cut(32, 64, 2, 2)}

    def attended(form, rows=1):
        at, place = (_arrays(cache), jnp.int32(0), jnp.arange(rows)), jnp.full((rows, 1), 200)
        arrays = place, place, *(x[1 : 1 + rows] for x in (*new, *rotation))
        out, _, made = triton_attention.write_and_attend(*at, *arrays, halves=True, form=form, **options)
        return out, made

    out, made = attended(form)
    same(out, attended(None)[0])
    assert len(made) == 2 and attended(None)[1] is None and attended(form, 2)[1] is None
    for kind, record in zip(form.kinds, made, strict=True):
        same(record, int8_row.record_for(out.reshape(1, -1), kind))
    longer = Records((form.kinds[0]._replace(groups=form.kinds[0].groups + 1),))
    assert attended(longer)[1] is None


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.usefixtures("for_an_h200")
def test_it_lowers_for_cuda(dtype):
    place, *new, rotation = new_tokens("bfloat16", 2, 4, 2, 16, 8)
    take = jax.jit(lambda cache: rotate_into(cache, 1, jnp.asarray(ROWS), place, *new, rotation, True))
    assert "write_cache" in take.trace(cache_of(dtype, 2, 16)).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.usefixtures("for_an_h200")
def test_a_step_lowers_for_cuda_with_two_launches_of_attention(dtype):
    model = random_model()
    cache = KVCache.create(model.config, 2, 300, dtype)
    step = jax.jit(lambda cache: run(model.params, model.config, jnp.zeros((2, 1), jnp.int32), cache))
    text = step.trace(cache).lower(lowering_platforms=("cuda",)).as_text()
    assert "write_and_attend" in text and "attend_join" in text and "write_cache" not in text


def test_what_it_cannot_serve_is_refused():
    cache = cache_of("float32", 1, 16)
    assert triton_cache.refuses(jnp.zeros((4, 16, 2, 16)), cache.k) is None
    assert "16 tokens" in triton_cache.refuses(jnp.zeros((4, 17, 2, 16)), cache.k)
    assert "256 wide" in triton_cache.refuses(jnp.zeros((4, 1, 2, 257)), jnp.zeros((2, 5, 4, 1, 257)))
    refuses = triton_attention.refuses_new
    half = cache.k.astype(jnp.bfloat16)
    assert "16 tokens" in refuses(jnp.zeros((4, 17, 1, 16)), half)
    assert refuses(jnp.zeros((4, 8, 4, 16)), half) is refuses(jnp.zeros((4, 4, 4, 16)), cache.k) is None
    for T, k in ((9, half), (5, cache.k)):  # more queries of a head than a program takes
        assert "another one" in refuses(jnp.zeros((4, T, 4, 16)), k)
