"""The attention kernels in Pallas' interpreter, against the reference, and lowered for CUDA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_toys import BOUNDS, cache_of, float32_reference, nmse, queries, same_bits_whatever_is_beside
from decode_toys import random_model

from realm_jax.errors import RealmError
from realm_jax.kernels import attention_plan, pallas, triton_attention
from realm_jax.kernels.attention import attention, choose_attention
from realm_jax.model import KVCache, run

SLOW = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.fixture(autouse=True)
def in_the_interpreter():
    with pallas.interpreted():
        yield


# T tokens a row, G query heads a kv head, C head width; S = 520: two whole parts of a row and a rest.
CASES = [
    ("float32", 3, 4, 20),
    ("int8", 16, 4, 32),
    ("bfloat16", 40, 1, 16),
    *(
        SLOW(dtype, T, G, C)
        for dtype in BOUNDS
        for T in (1, 3, 16, 40)
        for G, C in ((1, 64), (4, 96), (7, 128), (2, 256))
    ),
]


@pytest.mark.parametrize(("dtype", "T", "G", "C"), CASES)
def test_kernel_is_the_reference(dtype, T, G, C):
    cache, q = cache_of(dtype, B=4, S=520, K=2, C=C), queries(B=4, T=T, H=2 * G, C=C)
    ends = np.array([T, 256, 257, 520])  # the shortest, a part's edge, one more, all of it
    place = jnp.array(ends[:, None] - T + np.arange(T), jnp.int32)
    got = attention(q, place_BT=place, **cache, scale=C**-0.5, layer=1, impl="triton")
    assert got.shape == q.shape and got.dtype == q.dtype
    assert nmse(got, float32_reference(q, cache, place, scale=C**-0.5)) < BOUNDS[dtype]


@pytest.mark.parametrize("dtype", ["bfloat16", SLOW("float16"), SLOW("float32"), SLOW("int8")])
@pytest.mark.parametrize("T", [1, SLOW(16), SLOW(40)])
def test_softcap_sliding_window_rows_and_window(dtype, T):
    cache, q = cache_of(dtype, B=4, S=520, K=2, C=16), queries(B=3, T=T, H=4, C=16)
    place = jnp.array([[299], [399], [99]], jnp.int32) - T + 1 + jnp.arange(T)
    rows = jnp.array([2, 9, 0])  # the second is past the last: it is clipped to it
    options = {"scale": 2.0, "softcap": 1.5, "sliding_window": 70, "rows_B": rows, "window": 400}
    got = attention(q, place_BT=place, **cache, layer=jnp.int32(1), impl="triton", **options)
    want = float32_reference(q, cache, place, **options)
    assert nmse(got, want) < BOUNDS[dtype]
    for name in ("softcap", "sliding_window"):  # each of them matters
        assert nmse(want, float32_reference(q, cache, place, **{**options, name: None})) > 1e-4


@pytest.mark.parametrize("q_dtype", ["bfloat16", SLOW("float16")])
def test_queries_of_16_bits_are_rounded_once_at_the_end(q_dtype):
    cache, q = cache_of(q_dtype, B=2, S=48, K=1, C=16), queries(B=2, T=3, H=2, C=16).astype(q_dtype)
    place = jnp.array([[3, 4, 5], [45, 46, 47]], jnp.int32)
    got = attention(q, place_BT=place, **cache, scale=0.25, layer=1, impl="triton")
    want = float32_reference(q, cache, place, scale=0.25)
    assert got.dtype == q.dtype
    assert np.all(np.abs(got.astype(np.float32) - want) <= 0.502 * jnp.finfo(q_dtype).eps * 2 * np.abs(want) + 1e-6)


@pytest.mark.parametrize("sliding_window", [None, SLOW(70)])
@pytest.mark.parametrize("dtype", ["int8", SLOW("bfloat16"), SLOW("float16"), SLOW("float32")])
def test_a_query_gets_the_same_bits_whatever_is_beside_it(dtype, sliding_window):
    same_bits_whatever_is_beside(dtype, tokens=(1, 8), sliding_window=sliding_window)


@pytest.mark.parametrize(("dtype", "cut"), [SLOW("int8", (16, 32, 3, 1)), ("bfloat16", (32, 64, 4, 2))])
def test_any_cut_is_right_and_knows_nothing_of_the_window(dtype, cut, monkeypatch):
    monkeypatch.setattr(attention_plan, "choose_cut", lambda *_: attention_plan.Cut(*cut))
    cache, q = cache_of(dtype, B=2, S=100, K=1, C=16), queries(B=2, T=2, H=4, C=16)
    place = jnp.array([[0, 1], [69, 70]], jnp.int32)
    attend = functools.partial(attention, scale=0.25, layer=1, impl="triton")
    attend = jax.jit(attend, static_argnames="window", compiler_options={"xla_backend_optimization_level": 0})
    got = attend(q, place_BT=place, **cache)
    assert nmse(got, float32_reference(q, cache, place, scale=0.25)) < BOUNDS[dtype]
    one = attend(q[1:], place_BT=place[1:], rows_B=jnp.array([1]), window=71, **cache)
    np.testing.assert_array_equal(one, got[1:])


def test_leftovers_do_not_count():
    """Places that no query sees may hold anything, and a rest that is not read may even be infinite."""
    cache = cache_of("float32", B=2, S=300, K=1, C=16)
    q, place = queries(B=2, T=2, H=2, C=16), jnp.array([[4, 5], [264, 265]], jnp.int32)
    at = jnp.arange(300)[:, None, None] > place[:, -1, None, None, None]
    wild = {name: jnp.where(at, jnp.where(x > 0, 3e38, jnp.inf), x) for name, x in cache.items()}
    attend = jax.jit(functools.partial(attention, scale=1.0, layer=0, impl="triton"))
    one, other = (attend(q, place_BT=place, **x) for x in (cache, wild))
    np.testing.assert_array_equal(one, other)
    assert np.isfinite(one).all()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["int8", "float16"])  # both are multiplied in float16, which has a small range
def test_queries_of_any_size(dtype):
    cache, place = cache_of(dtype, B=1, S=40, K=1, C=16), jnp.array([[39]], jnp.int32)
    attend = jax.jit(functools.partial(attention, scale=1.0, layer=1, impl="triton"))
    for size in (1e-20, 1.0, 1e6):
        q = queries(B=1, T=1, H=1, C=16) * size
        assert nmse(attend(q, place_BT=place, **cache), float32_reference(q, cache, place, scale=1.0)) < BOUNDS[dtype]


def test_gradients_are_the_references():
    (k, v), q = cache_of("float32", B=2, S=24, K=1, C=16).values(), queries(B=2, T=2, H=2, C=16)
    place = jnp.array([[0, 1], [20, 21]], jnp.int32)

    def loss(q, k, v, impl):
        return jnp.sum(jnp.sin(attention(q, k, v, place, scale=0.25, layer=1, impl=impl)))

    gradients = jax.jit(jax.grad(loss, (0, 1, 2)), static_argnums=3)
    got, want = (gradients(q, k, v, impl) for impl in ("triton", "reference"))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), got, want)


def test_vmap_is_a_loop():
    (k, v), q = cache_of("float32", B=2, S=24, K=1, C=16).values(), queries(B=3, T=2, H=1, C=16)[:, None]
    place = jnp.array([[20, 21]], jnp.int32)
    one = jax.jit(functools.partial(attention, scale=0.25, layer=1, impl="triton"))
    got = jax.vmap(lambda q: one(q, k, v, place))(q)
    np.testing.assert_array_equal(got, jnp.stack([one(x, k, v, place) for x in q]))


def test_the_model_runs_on_it(monkeypatch):
    """Prompts for a part of the rows, then a step of all of them: as with the reference."""
    model = random_model()
    tokens = jnp.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]], jnp.int32)

    def hidden():
        cache = KVCache.create(model.config, 3, 32).replace(window=16)
        _, cache = run(model.params, model.config, tokens, cache, rows_B=jnp.array([2, 0]))
        return run(model.params, model.config, tokens[:1, :1].repeat(3, 0), cache)[0]

    got = jax.jit(lambda: hidden())()
    monkeypatch.setattr(pallas, "_interpreting", False)
    want = jax.jit(lambda: hidden())()
    assert nmse(got, want) < 1e-11 and not np.array_equal(got, want)


def test_auto_says_what_it_takes(monkeypatch):
    (k, v), q = cache_of("float32", B=2, S=24, K=1, C=16).values(), queries(B=2, T=3, H=2, C=16)
    place = jnp.zeros((2, 3), jnp.int32)
    assert choose_attention(q, k, 0) == "triton"
    assert choose_attention(q, k[0]) == choose_attention(q, k, 0, place) == "reference"
    monkeypatch.setattr(pallas, "_interpreting", False)
    assert choose_attention(q, k, 0) == "reference"
    for impl, q_width, first, message in (
        (
            "triton",
            16,
            None,
            "impl='triton' cannot attend queries (2, 3, 2, 16) of float32 to keys (2, 2, 24, 1, 16) of ",
        ),
        ("cuda", 16, None, "no such implementation; one of auto, triton, reference"),
    ):
        with pytest.raises(RealmError) as caught:
            attention(q[..., :q_width], k, v, place, first, scale=1.0, layer=0, impl=impl)
        assert message in str(caught.value) and "\n" not in str(caught.value)
    monkeypatch.setattr(pallas, "_interpreting", True)
    with pytest.raises(RealmError, match="packed end to end"):
        attention(q, k, v, place, place, scale=1.0, layer=0, impl="triton")
    wide = jnp.zeros((1, 1, 1, 264))
    with pytest.raises(RealmError, match="heads may be 256 wide at most"):
        attention(wide, wide[None], wide[None], place[:1, :1], scale=1.0, layer=0, impl="triton")
    huge = jax.ShapeDtypeStruct((32, 128, 1024, 8, 96), jnp.int8)  # 3 GiB
    assert "2 to 4 GiB" in attention_plan.refuses(q, huge)


@pytest.mark.parametrize(
    ("dtype", "q_dtype", "T"),
    [
        ("int8", "float32", 1),
        SLOW("int8", "float32", 100),
        ("bfloat16", "bfloat16", 100),
        SLOW("float32", "float32", 8),
    ],
)
@pytest.mark.usefixtures("for_an_h200")
def test_it_lowers_for_cuda(dtype, q_dtype, T):
    B, S, K, G, C, L = 2, 600, 2, 4, 128, 3
    shape = jax.ShapeDtypeStruct
    kv, scales = shape((L, B, S, K, C), dtype), (shape((L, B, S, K), jnp.float32),) * 2
    f = functools.partial(triton_attention.attend, scale=1.0, softcap=5.0, sliding_window=100)
    args = (
        shape((B, T, K * G, C), q_dtype),
        kv,
        kv,
        shape((B, T), jnp.int32),
        shape((), jnp.int32),
        shape((B,), jnp.int32),
    )
    lowered = jax.jit(f).trace(*args, *(scales if dtype == "int8" else ())).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("__gpu$xla.gpu.triton") == (2 if T <= attention_plan.SHORT else 1)
