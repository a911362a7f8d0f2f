"""Adapters beside the weights: what they add, that they add nothing where they should not, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lora_toys import changed_model, changed_weight, random_adapter
from test_matmul import temporary_bytes
from test_quant_formats import random_weights

import realm_jax as realm
from realm_jax import lora
from realm_jax.compilation import compile_seconds
from realm_jax.errors import AdapterError
from realm_jax.kernels.delta import Delta, add_deltas, add_embedding_deltas, dora_norms
from realm_jax.kernels.matmul import matmul
from realm_jax.lora.row_order import to_ggml_rows, to_hf_rows
from realm_jax.quant import FORMATS

QUICK = ("Q4_0", "Q8_0", "Q4_K", "Q5_K", "IQ2_XXS", "IQ1_M", "TQ2_0", "MXFP4", "float32", "bfloat16")
LINEAR = ("q", "k", "v", "o", "gate", "up", "down")


@pytest.fixture(scope="module")
def model(make_model_file):
    """A tied model in Q8_0."""
    return realm.load(make_model_file("lora.gguf", seed=3, format="Q8_0"))


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, 261, (3, 12))


def same_bits(x, y) -> bool:
    x, y = np.asarray(x), np.asarray(y)
    return x.dtype == y.dtype and x.tobytes() == y.tobytes()


def close(x, y, tolerance=1e-5):
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * np.abs(y).max())


def toy_delta(rng, N, K, R=3, dora=False, w=None):
    a, b = rng.standard_normal((R, K)) / K**0.5, rng.standard_normal((N, R))
    delta = Delta(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32), jnp.float32(0.7))
    if not dora:
        return delta
    delta = delta.replace(magnitude=jnp.asarray(rng.uniform(0.5, 2, N), jnp.float32))
    return delta.replace(norms=dora_norms(w, delta))


@pytest.mark.parametrize(
    ("name", "dora"),
    [  # DoRA's takes in what LoRA's does
        (name, True) if name in QUICK else pytest.param(name, True, marks=pytest.mark.slow)
        for name in (*sorted(FORMATS), "float32", "bfloat16")
    ]
    + [("Q8_0", False), ("float32", False)],
)
def test_a_delta_over_every_format_is_what_the_sum_of_both_gives(name, dora):
    rng = np.random.default_rng(1)
    N, K = 24, 512
    if name in FORMATS:
        w = random_weights(name, N, K, seed=2)
        w = w if np.abs(np.asarray(w.dequantize())).max() < 1e4 else jnp.asarray(rng.standard_normal((N, K)), "float32")
    else:
        w = jnp.asarray(rng.standard_normal((N, K)), name)
    x = jnp.asarray(rng.standard_normal((2, 5, K)), jnp.float32)
    delta = toy_delta(rng, N, K, dora=dora, w=w)
    want = np.asarray(x, np.float64) @ changed_weight(w, delta).T
    close(add_deltas(matmul(x, w), x, delta), want, 2e-6)
    if not dora:  # several add up
        doubled = changed_weight(w, delta.replace(scale=3 * delta.scale))
        close(
            add_deltas(matmul(x, w), x, (delta, delta.replace(scale=2 * delta.scale))), np.asarray(x) @ doubled.T, 2e-6
        )


@pytest.mark.parametrize("name", ["Q4_K", "Q8_0", "IQ2_XS", "float16"])
def test_an_embedding_is_looked_up_with_its_delta(name):
    rng = np.random.default_rng(2)
    V, D = 40, 256
    w = random_weights(name, V, D, seed=1) if name in FORMATS else jnp.asarray(rng.standard_normal((V, D)), name)
    rows = jnp.asarray(w.dequantize() if name in FORMATS else w, jnp.float32)
    ids = jnp.asarray(rng.integers(0, V, (2, 7)))
    delta = toy_delta(rng, V, D)
    close(add_embedding_deltas(rows[ids], ids, delta), changed_weight(w, delta)[np.asarray(ids)], 2e-6)
    delta = delta.replace(magnitude=jnp.asarray(rng.uniform(0.5, 2, D), jnp.float32))
    delta = delta.replace(norms=dora_norms(w, delta, embedding=True))
    close(add_embedding_deltas(rows[ids], ids, delta), changed_weight(w, delta, columns=True)[np.asarray(ids)], 2e-6)


@pytest.mark.parametrize(
    ("targets", "dora"),
    [(LINEAR, True), (("embedding",), True), (("output",), True), (lora.TARGETS, False), (lora.TARGETS, True)],
)
def test_a_model_with_an_adapter_is_the_model_with_its_weights_changed(model, tokens, targets, dora):
    adapter = random_adapter(model, targets=targets, dora=dora)
    with_adapter = realm.forward(model, tokens, adapter=adapter)
    close(with_adapter, realm.forward(changed_model(model, adapter), tokens))
    assert np.abs(np.asarray(with_adapter - realm.forward(model, tokens))).max() > 0.1  # it does something


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_that_adds_zero_changes_no_bit(model, tokens, dora):
    zero = lora.init_adapter(model, jax.random.key(0), targets=lora.TARGETS, dora=dora)
    assert sum(1 for _ in zero.items()) == 2 + 7 * model.config.layers
    assert same_bits(realm.forward(model, tokens, adapter=zero), realm.forward(model, tokens))
    delta = toy_delta(np.random.default_rng(0), 4, 8).replace(b=jnp.zeros((4, 3)))
    y = jnp.array([[-0.0, 0.0, 1.5, -3.0]])
    assert same_bits(add_deltas(y, jnp.ones((1, 8)), delta), y)
    assert same_bits(add_deltas(y.astype(jnp.bfloat16), jnp.ones((1, 8), jnp.bfloat16), delta), y.astype(jnp.bfloat16))


def test_scales_and_several_adapters(model, tokens):
    one, two = random_adapter(model, 1), random_adapter(model, 2, rank=6, targets=("q", "down"))
    halved = realm.forward(model, tokens, adapter=[(one, 0.5)])
    close(halved, realm.forward(model, tokens, adapter=one.scaled(0.5)), 0)
    both = changed_model(model, one)
    both = both.replace(params=changed_model(both, two).params)  # plain deltas add up in any order
    close(realm.forward(model, tokens, adapter=[one, two]), realm.forward(both, tokens))
    close(realm.forward(model, tokens, adapter=[two, one]), realm.forward(both, tokens))
    assert same_bits(realm.forward(model, tokens, adapter=[(one, 0.0), (two, 0.0)]), realm.forward(model, tokens))


def test_another_scale_or_adapter_compiles_nothing(model, tokens):
    one, two = random_adapter(model, 1), random_adapter(model, 2)
    first = realm.forward(model, tokens, adapter=[(one, 0.25)])
    said = realm.generate(model, [[1, 2, 3]], max_new_tokens=4, adapter=[(one, 0.25)])
    before = compile_seconds()
    for adapter, scale in ((one, 0.5), (two, 2.0), (one, 3)):
        assert not same_bits(realm.forward(model, tokens, adapter=[(adapter, scale)]), first)
        [completion] = realm.generate(model, [[1, 2, 3]], max_new_tokens=4, adapter=[(adapter, scale)])
        assert completion.stats.compile_seconds == 0
    assert said and compile_seconds() == before


@pytest.fixture(scope="module")
def three(model):
    """Adapters of different ranks, targets and kinds."""
    return [
        random_adapter(model, 1, rank=4, targets=LINEAR),
        random_adapter(model, 2, rank=7, targets=("q", "embedding", "output"), dora=True),
        random_adapter(model, 3, rank=1, targets=("down", "k", "embedding")),
    ]


def test_each_row_of_a_batch_gets_its_own_adapter(model, tokens, three):
    stacked = lora.stack(three, model)
    index = [2, 0, 1, 3, 1]
    rows = np.resize(tokens, (5, 12))
    mixed = realm.forward(model, rows, adapter=stacked, adapter_index=index)
    for b, i in enumerate(index):
        alone = realm.forward(model, rows, adapter=None if i == 0 else three[i - 1])
        close(mixed[b], alone[b], 1e-6)
    none = realm.forward(model, rows, adapter=stacked, adapter_index=[0] * 5)
    assert same_bits(none, realm.forward(model, rows))


def test_mixed_adapters_generate_what_each_does_alone(model, three):
    stacked = lora.stack(three, model)
    rng = np.random.default_rng(4)
    prompts = [rng.integers(1, 261, n).tolist() for n in (3, 9, 1, 5)]
    index = [1, 0, 3, 2]
    mixed = realm.generate(
        model, prompts, max_new_tokens=12, temperature=0.8, adapter=stacked, adapter_index=index, batch_size=3
    )
    for i, (prompt, which) in enumerate(zip(prompts, index, strict=True)):
        [alone] = realm.generate(
            model, prompt, max_new_tokens=12, temperature=0.8, seed=i, adapter=stacked, adapter_index=[which]
        )
        assert mixed[i].tokens == alone.tokens
    [unstacked] = realm.generate(model, prompts[3], max_new_tokens=12, temperature=0.8, seed=3, adapter=three[1])
    assert mixed[3].tokens == unstacked.tokens


def test_vmap_over_adapters(model, tokens, three):
    stacked = lora.stack(three, model)
    every = jax.vmap(lambda one: realm.forward(model, tokens, adapter=one))(stacked)
    assert every.shape == (4, 3, 12, 261)
    for i, adapter in enumerate([None, *three]):
        close(every[i], realm.forward(model, tokens, adapter=adapter), 1e-6)


def test_gradients_reach_an_adapter_that_adds_nothing_yet(model, tokens):
    """b is zero in the beginning: what it adds is skipped, its gradient is not. a and packed weights: see finetune."""
    adapter = lora.init_adapter(model, jax.random.key(0), targets=lora.TARGETS, dora=True)
    gradient = jax.grad(lambda one: realm.forward(model, tokens, adapter=one)[..., 5].sum())(adapter)
    for path, delta in gradient.items():
        assert np.abs(delta.b).max() > 0 and np.abs(delta.magnitude).max() > 0, path
        assert not np.abs(delta.a).any(), path


@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "Q8_0"])
@pytest.mark.parametrize("dora", [False, True])
def test_applying_makes_no_dense_copy(name, dora):
    weights = [random_weights(name, 256, 256, seed=i) for i in range(4)]
    deltas = [toy_delta(np.random.default_rng(i), 256, 256, dora=dora, w=w) for i, w in enumerate(weights)]

    def apply(x, weights, deltas):
        for w, delta in zip(weights, deltas, strict=True):
            x = jnp.tanh(add_deltas(matmul(x, w), x, delta))
        return x

    one, x = 4 * 256 * 256, jnp.ones((4, 256))
    assert temporary_bytes(apply, x, weights, deltas) < 2 * one
    gradient = jax.grad(lambda deltas, x, weights: apply(x, weights, deltas).sum())
    assert temporary_bytes(gradient, deltas, x, weights) < 4 * one


@pytest.mark.parametrize("heads,width", [(4, 16), (1, 2), (3, 10)])
def test_row_order_is_llama_cpps_and_back(heads, width):
    rng = np.random.default_rng(0)
    delta = Delta(jnp.ones((2, 4)), jnp.asarray(rng.standard_normal((heads * width, 2))), jnp.float32(1))
    delta = delta.replace(magnitude=jnp.arange(heads * width, dtype=jnp.float32))
    there = to_ggml_rows(delta, heads)
    rows = np.asarray(delta.b)  # LlamaModel.permute of convert_hf_to_gguf.py
    want = rows.reshape(heads, 2, width // 2, 2).swapaxes(1, 2).reshape(rows.shape)
    np.testing.assert_array_equal(there.b, want)
    back = to_hf_rows(there, heads)
    np.testing.assert_array_equal(back.b, delta.b)
    np.testing.assert_array_equal(back.magnitude, delta.magnitude)


def unfitted(adapter, **changes):
    return adapter.replace(fitted=False, **changes)


def test_what_does_not_fit_is_refused_by_name_or_left_out(model, tokens):
    good = random_adapter(model, 5)
    layer = good.deltas.layers[1]
    delta = layer.ffn.down

    def with_down(new):
        layers = (good.deltas.layers[0], layer.replace(ffn=layer.ffn.replace(down=new)))
        return unfitted(good, deltas=good.deltas.replace(layers=layers))

    wrong = {
        r"blk\.1\.ffn_down\.weight.*\(4, 95\).*want \(4, 96\), \(64, 4\)": with_down(delta.replace(a=delta.a[:, 1:])),
        r"blk\.1\.ffn_down\.weight.*\(63, 4\)": with_down(delta.replace(b=delta.b[1:])),
        r"blk\.1\.ffn_down\.weight.*no pair": with_down(delta.replace(b=delta.b[:, 1:])),
        r"blk\.1\.ffn_down\.weight.*lora_b.*NaN or infinite": with_down(delta.replace(b=delta.b.at[3, 1].set(jnp.nan))),
        r"blk\.1\.ffn_down\.weight.*scale.*NaN or infinite": with_down(delta.replace(scale=jnp.float32(jnp.inf))),
        r"blk\.1\.ffn_down\.weight.*magnitude.*\(65,\)": with_down(delta.replace(magnitude=jnp.ones(65))),
    }
    for message, adapter in wrong.items():
        with pytest.raises(AdapterError, match=f"^adapter 5: tensor {message}") as caught:
            realm.forward(model, tokens, adapter=adapter)
        assert "\n" not in str(caught.value)
        lenient = lora.fit(adapter, model, strict=False)
        assert len(lenient.skipped) == 1 and lenient.skipped[0].startswith("tensor blk.1.ffn_down.weight")
        assert len(list(lenient.items())) == len(list(good.items())) - 1
    deeper = unfitted(good, deltas=good.deltas.replace(layers=(*good.deltas.layers, layer)))
    with pytest.raises(AdapterError, match=r"blk\.2\.attn_q\.weight is for layer 2; the model has 2 layers"):
        lora.fit(deeper, model)
    assert len(lora.fit(deeper, model, strict=False).skipped) == 7
    with pytest.raises(AdapterError, match=r"made for 'qwen2' models; lora\.gguf is llama"):
        lora.fit(unfitted(good, architecture="qwen2"), model)
    close(realm.forward(model, tokens, adapter=good), realm.forward(changed_model(model, good), tokens))


def test_wrong_use_is_one_line(model, tokens, three):
    stacked = lora.stack(three, model)
    for message, options in {
        "say by index which": {"adapter": stacked},
        "takes no index": {"adapter": three[0], "adapter_index": [0, 0, 0]},
        "no stack of adapters": {"adapter_index": [0, 0, 0]},
        r"row 1 asks for adapter 4; the stack has 1 to 3, and 0 for none": {
            "adapter": stacked,
            "adapter_index": [0, 4, 0],
        },
        "one whole number a row": {"adapter": stacked, "adapter_index": [0.5, 1, 0]},
        "cannot act together": {"adapter": [stacked]},
        "is of type int": {"adapter": 7},
        "its scale is nan; it must be finite": {"adapter": [(three[0], float("nan"))]},
    }.items():
        with pytest.raises(AdapterError, match=message):
            realm.forward(model, tokens, **options)
    with pytest.raises(realm.RequestError, match="adapter_index has 2 entries for 1 prompts"):
        realm.generate(model, [[1, 2]], adapter=stacked, adapter_index=[1, 2])
    with pytest.raises(AdapterError, match="a rank of at least 1"):
        lora.init_adapter(model, jax.random.key(0), rank=0)
    with pytest.raises(AdapterError, match="target 'attn' is not known; targets are q, k"):
        lora.init_adapter(model, jax.random.key(0), targets=("attn",))


def test_reading_the_tree(model):
    adapter = random_adapter(model, 8, rank=5, targets=("q", "down"))
    assert repr(adapter) == "Adapter(adapter 8: LoRA, rank 5, 4 weights: q, down)"
    assert adapter.size == 2 * 5 * (64 + 64 + 96 + 64)
    assert adapter.deltas.layers[0].attn.q.a.shape == (5, 64) and adapter.deltas.layers[0].attn.k is None
    assert float(adapter.scaled(3).deltas.layers[1].ffn.down.scale) == 6.0
