"""The key-value cache: its types, its window, parts of its rows, and what a row that fails leaves behind."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decode_toys import random_model

import cache_cost
import realm_jax as realm
from realm_jax import evaluate
from realm_jax.cli.main import run as realm_command
from realm_jax.decode import generate
from realm_jax.errors import RealmError, RequestError
from realm_jax.experiment import Run, load_config
from realm_jax.kernels.attention import attention
from realm_jax.model import KVCache, run
from realm_jax.model.cache import DTYPES, UNBROKEN, to_int8

SLOW = functools.partial(pytest.param, marks=pytest.mark.slow)
MODEL = random_model()
CONFIG = MODEL.config
BAD = 77
BROKEN = MODEL.params.replace(embedding=MODEL.params.embedding.at[BAD].set(jnp.nan), output=MODEL.params.embedding)
WHOLE = MODEL.params.replace(output=MODEL.params.embedding)
B, T, S = 3, 5, 16
TOKENS = jnp.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3], [5, 8, 9, 7, 9]], jnp.int32)
MORE = jnp.array([[6, 2, 6, 4, 3], [3, 8, 3, 2, 7], [9, 5, 0, 2, 8]], jnp.int32)
FULL = jnp.full(B, T, jnp.int32)


@jax.jit
def step(params, tokens_BT, cache, count_B, rows_B=None):
    return run(params, CONFIG, tokens_BT, cache, count_B, rows_B=rows_B)


def empty(dtype="float32"):
    return KVCache.create(CONFIG, B, S, dtype)


def same(one, other):
    """Bit for bit, in every leaf."""
    jax.tree.map(np.testing.assert_array_equal, one, other)


def with_bad(row: int, place: int):
    return TOKENS.at[row, place].set(BAD)


# --- int8 ------------------------------------------------------------------------------------------------------------


def test_int8_is_within_half_a_step_of_its_scale():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 50, 2, 16)).astype(np.float32) * 10.0 ** rng.integers(-20, 20, (4, 50, 2, 1))
    x[0, 0, 0], x[0, 1, 1], x[0, 2, 0, 1:] = 0, 3, 0
    x = x.astype(np.float32)
    q, scale = map(np.asarray, jax.jit(to_int8)(jnp.array(x)))
    assert q.dtype == np.int8 and q.min() >= -127
    np.testing.assert_array_equal(np.abs(q).max(-1), np.where(np.abs(x).max(-1) > 0, 127, 0))
    assert np.all(q[0, 0, 0] == 0) and scale[0, 0, 0] == 0 and np.all(q[0, 1, 1] == 127)
    error = np.abs(x.astype(np.float64) - q * scale[..., None].astype(np.float64))
    rounding = 127 * 2.0**-22  # of the scale, and of x over it: a bit each
    assert np.all(error <= scale[..., None] * (0.5 + rounding))


def test_attention_on_int8_is_attention_on_what_it_stands_for():
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (B, T, 4, 16))
    k, v = (to_int8(jax.random.normal(key, (B, S, 2, 16))) for key in keys[1:])
    place = jnp.arange(T) + jnp.array([0, 4, 11])[:, None]
    got = attention(q, k[0], v[0], place, scale=0.25, k_scale_BSK=k[1], v_scale_BSK=v[1])
    floats = [x.astype(jnp.float32) * scale[..., None] for x, scale in (k, v)]
    np.testing.assert_allclose(got, attention(q, *floats, place, scale=0.25), rtol=1e-5, atol=1e-6)


def test_an_int8_cache_holds_the_keys_and_values_of_a_float_one():
    """Of the first layer, whose inputs have not met the cache yet."""
    exact, stored = (step(MODEL.params, TOKENS, empty(dtype), FULL)[1] for dtype in ("float32", "int8"))
    for name in "kv":
        x, scale = getattr(exact, name)[0], getattr(stored, f"{name}_scale")[0]
        error = np.abs(x - getattr(stored, name)[0] * scale[..., None])
        assert np.all(error <= 0.501 * scale[..., None]) and np.all(scale[:, :T] > 0) and np.all(scale[:, T:] == 0)
    same(exact.length_B, stored.length_B)


def test_another_type_is_refused():
    for dtype in ("int4", jnp.int32):
        with pytest.raises(RequestError, match=r"a cache of 'int\d+' is not known; take one of float32, bfloat16"):
            KVCache.create(CONFIG, 1, 8, dtype)
    for name, dtype in DTYPES.items():
        cache = KVCache.create(CONFIG, 1, 8, dtype)
        assert cache.k.dtype == name and (cache.k_scale is None) == (name != "int8")


# --- windows, rows, padding ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", SLOW("int8")])
def test_a_window_over_all_tokens_changes_nothing(dtype):
    first = step(MODEL.params, TOKENS, empty(dtype), FULL)[1]
    hidden, cache = step(MODEL.params, MORE, first, FULL)
    narrow, after = step(MODEL.params, MORE, first.replace(window=2 * T), FULL)
    # Sums of other lengths, with more zeros, in another order: a few units in the last place of the largest.
    np.testing.assert_allclose(narrow, hidden, rtol=0, atol=1e-6 * np.abs(hidden).max())
    same(after.k[0], cache.k[0])
    same(after.length_B, cache.length_B)


@pytest.mark.parametrize("dtype", ["int8", SLOW("float32"), SLOW("bfloat16")])
def test_tokens_of_some_rows_are_those_of_all_rows(dtype):
    """Two of three rows, out of order, and padding; what is left out keeps every bit."""
    count = jnp.array([5, 3, 4], jnp.int32)
    start = step(MODEL.params, MORE, empty(dtype), jnp.array([2, 5, 1], jnp.int32))[1]
    hidden, whole = step(MODEL.params, TOKENS, start, count)
    rows = jnp.array([2, 0, B + 6], jnp.int32)
    part, cache = step(MODEL.params, TOKENS[jnp.array([2, 0, 1])], start, jnp.array([4, 5, 0], jnp.int32), rows)
    same(part[0, :4], hidden[2, :4])
    same(part[1], hidden[0])
    for name, x in vars(cache).items():
        if x is None:
            continue
        axis = x.ndim > 1
        for row, source in enumerate((whole, start, whole)):
            same(jnp.take(x, row, axis), jnp.take(getattr(source, name), row, axis))


@pytest.mark.parametrize("bad", [False, True])
def test_padding_is_not_written(bad):
    """Neither tokens behind the count of a row, nor a row of the batch that is none of the cache's."""
    tokens = with_bad(1, 2) if bad else TOKENS
    count = jnp.array([1, 2, 0], jnp.int32)
    cache = step(BROKEN, tokens, empty(), count)[1]
    assert np.all(cache.k[:, 0, 1:] == 0) and np.all(cache.v[:, 1, 2:] == 0) and np.all(cache.k[:, 2] == 0)
    assert np.all(np.any(np.asarray(cache.k[:, 0, :1]) != 0, axis=(2, 3)))
    assert cache.length_B.tolist() == [1, 2, 0] and np.all(cache.broken_B == UNBROKEN)
    nobody = jnp.array([B, B + 1, B + 9], jnp.int32)
    same(step(BROKEN, tokens, cache, jnp.zeros(B, jnp.int32), nobody)[1], cache)


# --- rows that break -------------------------------------------------------------------------------------------------

TYPES = ["float32", "int8", SLOW("bfloat16"), SLOW("float16")]


@pytest.mark.parametrize("dtype", TYPES)
def test_a_broken_token_breaks_its_own_row_from_its_place_on(dtype):
    whole, _ = step(WHOLE, TOKENS, empty(dtype), FULL)
    hidden, cache = step(BROKEN, with_bad(1, 2), empty(dtype), FULL)
    same(hidden[0], whole[0])
    same(hidden[2], whole[2])
    same(hidden[1, :2], whole[1, :2])
    assert np.all(np.isnan(hidden[1, 2:]))
    assert cache.broken_B.tolist() == [UNBROKEN, 2, UNBROKEN]
    assert all(np.all(np.isfinite(np.asarray(x, np.float32))) for x in (cache.k, cache.v))
    after, cache = step(BROKEN, MORE, cache, FULL)
    assert np.all(np.isnan(after[1])) and np.all(np.isfinite(after[jnp.array([0, 2])])) and cache.broken_B[1] == 2


@pytest.mark.parametrize("dtype", TYPES)
def test_a_row_that_broke_is_as_good_as_new_for_the_next(dtype):
    """Though it is shorter, so that leftovers stand behind it, of tokens that saw the broken one too."""
    cache = step(BROKEN, with_bad(1, 2), empty(dtype), FULL)[1]
    hidden, cache = step(BROKEN, MORE, cache.replace(length_B=jnp.zeros(B, jnp.int32)), FULL - 2)
    fresh, clean = step(BROKEN, MORE, empty(dtype), FULL - 2)
    same(hidden[:, : T - 2], fresh[:, : T - 2])
    same(
        cache.replace(k=cache.k[:, :, : T - 2], v=cache.v[:, :, : T - 2], k_scale=None, v_scale=None),
        clean.replace(k=clean.k[:, :, : T - 2], v=clean.v[:, :, : T - 2], k_scale=None, v_scale=None),
    )


@pytest.mark.parametrize("dtype", TYPES)
def test_a_broken_token_that_is_taken_back_never_was(dtype):
    cache = step(BROKEN, with_bad(1, 2), empty(dtype), FULL)[1]
    want = step(BROKEN, MORE, step(BROKEN, TOKENS, empty(dtype), FULL)[1].replace(length_B=FULL - 3), FULL)[0]
    same(step(BROKEN, MORE, cache.replace(length_B=FULL - 3), FULL)[0], want)
    kept = step(BROKEN, MORE, cache.replace(length_B=FULL - 2), FULL)[0]
    assert np.all(np.isnan(kept[1])) and np.all(np.isfinite(kept[0]))


def test_a_broken_row_that_others_are_computed_beside_stays_broken():
    cache = step(BROKEN, with_bad(1, 2), empty(), FULL)[1]
    rows, count = jnp.array([2, 0, B], jnp.int32), jnp.array([5, 5, 0], jnp.int32)
    hidden, cache = step(BROKEN, MORE, cache, count, rows)
    assert np.all(np.isfinite(hidden[:2])) and cache.broken_B.tolist() == [UNBROKEN, 2, UNBROKEN]
    assert np.all(np.isnan(step(BROKEN, MORE, cache, FULL)[0][1]))


@pytest.mark.parametrize(("dtype", "value"), [("float16", 1e5), ("int8", np.inf), ("float32", -np.inf)])
@pytest.mark.parametrize("name", ["k", "v"])
def test_what_the_type_cannot_hold_breaks_the_row_and_is_not_stored(name, dtype, value):
    parts = {"k": jnp.ones((B, 2, 2, 16)), "v": jnp.ones((B, 2, 2, 16))}
    parts[name] = parts[name].at[1, 1, 0, 3].set(value)
    place = jnp.array([[0, 1], [4, 5], [S - 1, S]], jnp.int32)
    cache = empty(dtype).write(0, jnp.arange(B), place, parts["k"], parts["v"])
    assert cache.broken_B.tolist() == [UNBROKEN, 5, UNBROKEN]
    stored = np.asarray(getattr(cache, name)[0], np.float32)
    assert stored[1, 5, 0, 3] == 0 and np.all(np.isfinite(stored)) and np.all(stored[1, 5, 0, 4:] > 0)


def test_what_a_dropped_place_would_have_held_breaks_nothing():
    x = jnp.full((B, 1, 2, 16), jnp.nan)
    cache = empty().write(0, jnp.arange(B), jnp.array([[S], [S + 3], [2]], jnp.int32), x, x)
    assert cache.broken_B.tolist() == [UNBROKEN, UNBROKEN, 2] and np.all(cache.k == 0)


def stubborn_draft():
    """A model that always says the token on which the target breaks."""
    layers = tuple(
        layer.replace(
            attn=layer.attn.replace(o=jnp.zeros_like(layer.attn.o)),
            ffn=layer.ffn.replace(down=jnp.zeros_like(layer.ffn.down)),
        )
        for layer in MODEL.params.layers
    )
    ones = jnp.ones_like(MODEL.params.embedding)
    output = jnp.zeros_like(ones).at[BAD].set(1.0)
    return MODEL.replace(params=MODEL.params.replace(embedding=ones, layers=layers, output=output))


@pytest.mark.parametrize("rules", [{}, SLOW({"repetition_penalty": 1.5})])
def test_a_draft_that_proposes_what_breaks_the_target_changes_nothing(rules):
    """Each round the target's cache meets the token, behind what counts; it is taken back with the proposal."""
    model = MODEL.replace(params=BROKEN)
    prompts, options = ["hello", "a", "abcabc"], {"max_new_tokens": 20, "logit_bias": {0: -1e9}} | rules
    want = generate(model, prompts, **options)
    assert not any(BAD in c.tokens for c in want) and [len(c.tokens) for c in want] == [20] * 3
    got = generate(model, prompts, draft=stubborn_draft(), draft_tokens=3, **options)
    assert [c.tokens for c in got] == [c.tokens for c in want]
    ahead = [c.stats.speculative for c in got]
    assert all(a.accepted == 0 and a.drafted >= 3 * 5 for a in ahead)


# --- what a type costs -----------------------------------------------------------------------------------------------

TEXT = "In the beginning there was the word, and the word was thin. " * 4


SEEN = {"bytes_per_token": 512, "kl": 0.25, "kl_chunk_error": 0.0, "kl_99": 1.0, "top1": 1.0, "top1_error": 0.0,
        "perplexity": 2.0, "perplexity_error": 0.0, "log_ratio": 0.0, "log_ratio_error": 0.0,
        "reference_perplexity": 2.0}  # fmt: skip


@pytest.fixture(scope="module")
def small(model_file):
    return realm.load(model_file)


def direct(model, chunks_NT, dtype):
    """The nll of every scored token, token after token through a cache, as decoding runs them."""
    N, T = chunks_NT.shape
    one = jax.jit(lambda tokens_B1, cache: run(model.params, model.config, tokens_B1, cache))
    cache, hidden = KVCache.create(model.config, N, T, dtype), []
    for t in range(T):
        now, cache = one(jnp.array(chunks_NT[:, t : t + 1]), cache)
        hidden.append(now)
    logits = realm.model.unembed(model.params, model.config, jnp.concatenate(hidden, axis=1))
    log_p = np.asarray(jax.nn.log_softmax(logits, axis=-1))
    nll = -np.take_along_axis(log_p[:, :-1], chunks_NT[:, 1:, None], axis=2)[..., 0]
    return nll[:, T // 2 :]


@pytest.mark.parametrize("dtype", ["int8", SLOW("float32"), SLOW("bfloat16")])
def test_a_text_through_a_cache_is_what_decoding_sees(small, dtype):
    chunks = evaluate.text_chunks(small, TEXT, 24)
    bare = evaluate.score(small, chunks)
    scores = evaluate.score(small, chunks, reference=small, cache_dtype=dtype)
    same(scores.reference_nll, bare.nll)  # the reference has no cache
    want = direct(small, chunks, dtype)
    np.testing.assert_allclose(scores.nll, want, rtol=1e-5, atol=1e-5)
    cost = np.abs(want - bare.nll).max()
    assert cost < 1e-5 if dtype == "float32" else cost > 1e-4
    assert scores.kl.mean() < 1e-9 if dtype == "float32" else scores.kl.mean() > 1e-8


def test_the_cost_of_a_cache_by_the_functions_for_a_text(small):
    options = {"context": 24, "cache_dtype": "int8"}
    own, divergence = evaluate.compare(small, small, TEXT, **options)
    assert own == evaluate.perplexity(small, TEXT, **options) != divergence.reference
    assert divergence.kl.mean > 0
    with pytest.raises(RequestError, match="a cache of 'int4' is not known; take one of float32, bfloat16, float16"):
        evaluate.perplexity(small, TEXT, context=24, cache_dtype="int4")


def test_realm_perplexity_with_a_cache(small, model_file, tmp_path, capsys):
    (tmp_path / "text.txt").write_text(TEXT)
    args = ["perplexity", str(model_file), str(tmp_path / "text.txt"), "--context", "24", "--json"]
    assert realm_command([*args, "--cache-dtype", "int8", "--reference", str(model_file)]) == 0
    seen = json.loads(capsys.readouterr().out)
    own, divergence = evaluate.compare(small, small, TEXT, context=24, cache_dtype="int8")
    assert seen["cache_dtype"] == "int8"
    assert (seen["perplexity"], seen["kl_mean"]) == (own.perplexity, divergence.kl.mean)
    assert realm_command([*args, "--cache-dtype", "int4"]) == 1
    seen = capsys.readouterr()
    assert seen.out == "" and seen.err.count("\n") == 1 and "a cache of 'int4' is not known" in seen.err


def test_the_experiment_measures_every_type_and_goes_on_where_it_stopped(tmp_path, model_file, capsys):
    small = ["text.context=32", "text.chunks=4", f"subject.model='{model_file}'"]
    path = Path(__file__).parents[1] / "configs" / "cache_cost.toml"
    config = load_config(cache_cost.CacheCostConfig, path, [*small, 'dtypes=["float32", "int8"]'])
    run = Run.create(config, "cache_cost", root=tmp_path)
    run.log(cache="float32", **SEEN)
    cache_cost.main(config, run)
    lines = run.metrics()
    assert [line["cache"] for line in lines] == ["float32", "int8"] and lines[0]["kl"] == SEEN["kl"]
    heads, layers, width = 2, 2, 16
    assert lines[1]["bytes_per_token"] == 2 * layers * heads * (width + 4)
    assert 0 < lines[1]["kl"] < 1e-3 and lines[1]["kl_chunk_error"] > 0
    table = capsys.readouterr().out
    assert "| float32 | 512 | 0.25" in table and "| int8 | 160 |" in table
    with pytest.raises(RealmError, match="a cache of 'int4' is not known"):
        load_config(cache_cost.CacheCostConfig, path, ['dtypes=["int4"]'])


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_writing_touches_no_more_than_it_writes(dtype):
    cache = KVCache.create(CONFIG, 64, 256, dtype)
    new = jnp.ones((64, 1, CONFIG.kv_heads, CONFIG.head_width))
    write = jax.jit(lambda cache, row, place: cache.write(0, row, place, new, new), donate_argnums=0)
    compiled = write.lower(cache, jnp.arange(64), jnp.zeros((64, 1), jnp.int32)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < cache.k.nbytes / 4
