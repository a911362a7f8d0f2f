"""The model floor: logits against llama.cpp's, cached against uncached, files there and back, refusals."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import realm_jax as realm
from realm_jax.gguf.reader import open_gguf
from realm_jax.gguf.types import field
from realm_jax.gguf.writer import write_gguf
from realm_jax.model import Config, KVCache, Rope, init_params, run, unembed
from realm_jax.model.rope import frequencies

GOLDEN = Path(__file__).parent / "golden" / "logits"
TOKENS = [int(t) for t in np.random.default_rng(7).integers(0, 96, 40)]  # as in golden/make_logits.py
CONFIG = Config(
    architecture="llama", vocab_size=50, context_length=128, layers=2, width=32, ffn_width=48, heads=4, kv_heads=2,
    head_width=8, norm_eps=float(np.float32(1e-5)), rope=Rope(dimensions=8, original_context=128),
)  # fmt: skip
run_compiled = jax.jit(run, static_argnums=1)


def nmse(ours, theirs) -> float:
    return float(np.sum((np.asarray(ours, np.float64) - theirs) ** 2) / np.sum(np.asarray(theirs, np.float64) ** 2))


@pytest.fixture(scope="module")
def params():
    return init_params(CONFIG, jax.random.key(0), tied=False)


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.gguf")), ids=lambda p: p.stem)
def test_logits_equal_llama_cpp(path):
    model = realm.load(path)
    logits = realm.forward(model, jnp.array([TOKENS], jnp.int32))
    assert logits.dtype == jnp.float32
    # float32 on both sides; on F16 and BF16 weights llama.cpp rounds activations as well
    limit = 2e-5 if "f16" in path.stem else 1e-9
    assert nmse(logits[0], np.load(path.with_suffix(".npy"))) < limit


def test_the_comparison_with_llama_cpp_can_fail():
    """A wrong rope moves the logits by far more than the limit above."""
    model = realm.load(GOLDEN / "llama_gqa.gguf")
    wrong = model.replace(config=model.config.__class__(**(vars(model.config) | {"rope": Rope(16, halves=True)})))
    logits = realm.forward(wrong, jnp.array([TOKENS], jnp.int32))
    assert nmse(logits[0], np.load(GOLDEN / "llama_gqa.npy")) > 1e-2


def test_cached_equals_uncached(params):
    """A ragged batch fed in pieces of different sizes gives what each row gives alone and at once."""
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 50, n) for n in (13, 7, 1)]
    cache = KVCache.create(CONFIG, batch=3, size=16)
    seen = [[], [], []]
    for piece in (range(0, 5), range(5, 6), range(6, 13)):
        tokens, count = np.full((3, len(piece)), 49, np.int32), np.zeros(3, np.int32)
        for b, row in enumerate(rows):
            part = row[piece.start : piece.stop]
            tokens[b, : len(part)], count[b] = part, len(part)
        hidden, cache = run_compiled(params, CONFIG, jnp.array(tokens), cache, jnp.array(count))
        for b in range(3):
            seen[b].append(hidden[b, : count[b]])
    np.testing.assert_array_equal(cache.length_B, [13, 7, 1])
    for row, parts in zip(rows, seen, strict=True):
        alone, _ = run_compiled(params, CONFIG, jnp.array(row, jnp.int32)[None])
        np.testing.assert_allclose(np.concatenate(parts), alone[0], rtol=2e-4, atol=2e-6)


def test_rollback_is_arithmetic_on_lengths(params):
    """After taking tokens back, other tokens in their place give what they give without the detour."""
    tokens = jnp.array([[1, 2, 3, 4]], jnp.int32)
    _, straight = run_compiled(params, CONFIG, tokens[:, :2], KVCache.create(CONFIG, 1, 8))
    _, detour = run_compiled(params, CONFIG, tokens, KVCache.create(CONFIG, 1, 8))
    detour = detour.replace(length_B=detour.length_B - 2)
    new = jnp.array([[9, 8]], jnp.int32)
    expected, _ = run_compiled(params, CONFIG, new, straight)
    np.testing.assert_allclose(run_compiled(params, CONFIG, new, detour)[0], expected, rtol=1e-5, atol=1e-7)


def test_tokens_beyond_the_cache_are_dropped_not_wrapped(params):
    _, cache = run_compiled(params, CONFIG, jnp.arange(6, dtype=jnp.int32)[None], KVCache.create(CONFIG, 1, 8))
    _, after = run_compiled(params, CONFIG, jnp.full((1, 4), 7, jnp.int32), cache, jnp.array([1], jnp.int32))
    np.testing.assert_array_equal(after.k[:, :, :6], cache.k[:, :, :6])


def test_gradients_flow_through_the_whole_model(params):
    tokens = jnp.array([[3, 1, 4, 1, 5]], jnp.int32)

    def loss(p):
        hidden, _ = run(p, CONFIG, tokens)
        return -jax.nn.log_softmax(unembed(p, CONFIG, hidden))[0, -1, 9]

    gradient = jax.grad(loss)(params)
    leaves = jax.tree.leaves(gradient)
    assert all(np.isfinite(g).all() and np.any(g != 0) for g in leaves)
    direction = jax.tree.map(lambda g: g / jnp.sqrt(sum(jnp.sum(x * x) for x in leaves)), gradient)
    shifted = [loss(jax.tree.map(lambda p, d, e=e: p + e * d, params, direction)) for e in (1e-2, -1e-2)]
    slope = sum(jnp.sum(g * d) for g, d in zip(leaves, jax.tree.leaves(direction), strict=True))
    np.testing.assert_allclose((shifted[0] - shifted[1]) / 2e-2, slope, rtol=1e-2)


def test_rope_scalings():
    plain, one = frequencies(Rope(8, base=100.0))
    np.testing.assert_allclose(plain, [1, 10**-0.5, 0.1, 10**-1.5])
    assert one == 1.0
    linear, _ = frequencies(Rope(8, base=100.0, scaling="linear", factor=4.0))
    np.testing.assert_allclose(linear, plain / 4)
    yarn, magnitude = frequencies(Rope(64, base=1e4, scaling="yarn", factor=4.0, original_context=4096))
    full, _ = frequencies(Rope(64, base=1e4))
    assert magnitude == pytest.approx(1 + 0.1 * np.log(4))
    np.testing.assert_allclose(yarn[0], full[0])  # fast dimensions keep their frequency
    np.testing.assert_allclose(yarn[-1], full[-1] / 4)  # slow ones are interpolated


@pytest.mark.parametrize("name", ["llama_legacy_quants", "llama_k_quants", "llama_multi_head_f16", "qwen2"])
def test_save_gives_the_same_bytes(name, tmp_path):
    path = GOLDEN / f"{name}.gguf"
    realm.save(realm.load(path), tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == path.read_bytes()


def test_save_writes_what_was_changed(tmp_path):
    model = realm.load(GOLDEN / "llama_legacy_quants.gguf")
    dense = model.params.layers[0].attn.q.dequantize()
    layer = model.params.layers[0]
    layer = layer.replace(attn=layer.attn.replace(q=dense))
    changed = model.replace(params=model.params.replace(layers=(layer, *model.params.layers[1:])))
    realm.save(changed, tmp_path / "changed.gguf")
    with open_gguf(tmp_path / "changed.gguf") as new, open_gguf(GOLDEN / "llama_legacy_quants.gguf") as old:
        assert new.tensors["blk.0.attn_q.weight"].format == "F32"
        for name in old.tensors:
            if name != "blk.0.attn_q.weight":
                np.testing.assert_array_equal(new.raw(name), old.raw(name))
    tokens = jnp.array([TOKENS], jnp.int32)
    again = realm.forward(realm.load(tmp_path / "changed.gguf"), tokens)
    np.testing.assert_array_equal(again, realm.forward(changed, tokens))


def test_export_then_load_is_the_identity_on_dense_weights(params, tmp_path):
    realm.model.export(tmp_path / "dense.gguf", CONFIG, params, {}, lambda name, shape: "F32")
    model = realm.load(tmp_path / "dense.gguf")
    assert model.config == CONFIG
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b)), model.params, params))


def test_the_gradient_of_a_packed_model_is_that_of_its_dense_twin():
    model = realm.load(GOLDEN / "llama_k_quants.gguf")
    dense = jax.tree.map(lambda w: w.dequantize() if is_packed(w) else w, model.params, is_leaf=is_packed)
    x = jnp.linspace(-1, 1, 2 * 256, dtype=jnp.float32).reshape(2, 256)

    def score(x, p):
        return jnp.sum(unembed(p, model.config, x)[:, 5] ** 2)

    np.testing.assert_allclose(jax.grad(score)(x, model.params), jax.grad(score)(x, dense), rtol=1e-4, atol=1e-5)


def is_packed(node) -> bool:
    return isinstance(node, realm.QuantizedTensor)


# -- refusals -----------------------------------------------------------------------------------


def rewrite(tmp_path, change_fields=None, change_tensors=None) -> Path:
    """A copy of a golden model with changed metadata or tensors."""
    with open_gguf(GOLDEN / "llama_gqa.gguf") as file:
        fields = dict(file.fields)
        tensors = {n: (i.format, i.shape, np.array(file.raw(n))) for n, i in file.tensors.items()}
    for key, value in (change_fields or {}).items():
        if value is None:
            fields.pop(key)
        else:
            fields[key] = field(value)
    (change_tensors or (lambda t: None))(tensors)
    path = tmp_path / "broken.gguf"
    write_gguf(path, fields, [(n, f, s, lambda raw=raw: raw) for n, (f, s, raw) in tensors.items()])
    return path


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"general.architecture": "mamba"}, ["general.architecture", "mamba", "llama"]),
        ({"general.architecture": None}, ["general.architecture", "missing"]),
        ({"llama.block_count": None}, ["llama.block_count", "missing"]),
        ({"llama.block_count": 0}, ["llama.block_count", "between"]),
        ({"llama.block_count": 100000}, ["llama.block_count", "between"]),
        ({"llama.block_count": 3}, ["blk.2.", "missing"]),
        ({"llama.block_count": 1}, ["blk.1.", "no place"]),
        ({"llama.embedding_length": 72}, ["token_embd.weight", "(96, 64)", "(96, 72)"]),
        ({"llama.embedding_length": "wide"}, ["llama.embedding_length", "integer"]),
        ({"llama.embedding_length": True}, ["llama.embedding_length", "integer"]),
        ({"llama.attention.head_count": 0}, ["llama.attention.head_count", "between"]),
        ({"llama.attention.head_count": 7}, ["head_count"]),
        ({"llama.attention.head_count_kv": 3}, ["llama.attention.head_count_kv", "divide"]),
        ({"llama.attention.key_length": 15}, ["llama.attention."]),
        ({"llama.attention.key_length": 17, "llama.attention.value_length": 17}, ["key_length", "even"]),
        ({"llama.attention.head_count_kv": [2, 4]}, ["head_count_kv", "differs between layers"]),
        ({"llama.attention.layer_norm_rms_epsilon": None}, ["layer_norm_rms_epsilon", "missing"]),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, ["layer_norm_rms_epsilon", "finite"]),
        ({"llama.rope.freq_base": -1.0}, ["llama.rope.freq_base", "finite"]),
        ({"llama.rope.freq_base": float("inf")}, ["llama.rope.freq_base", "finite"]),
        ({"llama.rope.dimension_count": 8}, ["llama.rope.dimension_count", "head width"]),
        ({"llama.rope.scaling.type": "spiral"}, ["llama.rope.scaling.type", "yarn"]),
        ({"llama.rope.scaling.factor": float("nan")}, ["llama.rope.scaling.factor", "finite"]),
        ({"llama.vocab_size": 95}, ["llama.vocab_size", "96 rows"]),
        ({"tokenizer.ggml.tokens": ["a", "b"]}, ["tokenizer.ggml.tokens", "2 tokens", "96 rows"]),
        ({"llama.expert_count": 8}, ["llama.expert_count"]),
    ],
)
def test_bad_hyperparameters_are_refused(fields, words, tmp_path):
    with pytest.raises(realm.GGUFError) as error:
        realm.load(rewrite(tmp_path, fields))
    message = str(error.value)
    assert "\n" not in message and "broken.gguf" in message
    for word in words:
        assert word in message


def set_tensor(name, format, shape, raw):
    return lambda tensors: tensors.update({name: (format, shape, raw)})


def poison(tensors):
    format, shape, raw = tensors["blk.1.ffn_up.weight"]
    raw.view(np.float32)[3, 5] = np.inf
    tensors["blk.1.ffn_up.weight"] = (format, shape, raw)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("token_embd.weight"), ["token_embd.weight"]),
        (lambda t: t.pop("blk.0.attn_k.weight"), ["blk.0.attn_k.weight", "missing"]),
        (set_tensor("blk.0.attn_q_norm.weight", "F32", (16,), np.zeros(64, np.uint8)), ["attn_q_norm", "no place"]),
        (set_tensor("blk.0.attn_norm.weight", "F32", (63,), np.zeros(252, np.uint8)), ["(63,)", "(64,)"]),
        (set_tensor("blk.0.attn_q.weight", "Q2_0", (64, 64), np.zeros((64, 18), np.uint8)), ["attn_q", "Q2_0"]),
        (set_tensor("blk.0.attn_q.weight", "I8", (64, 64), np.zeros((64, 64), np.uint8)), ["attn_q.weight", "I8"]),
        (
            set_tensor("blk.0.attn_q.weight", "Q8_0", (64, 64), np.full((64, 68), 255, np.uint8)),
            ["attn_q.weight", "Q8_0", "not finite", "block 0"],
        ),
        (poison, ["blk.1.ffn_up.weight", "not finite"]),
    ],
)  # fmt: skip
def test_bad_tensors_are_refused(change, words, tmp_path):
    with pytest.raises(realm.GGUFError) as error:
        realm.load(rewrite(tmp_path, change_tensors=change))
    message = str(error.value)
    assert "\n" not in message and "broken.gguf" in message
    for word in words:
        assert word in message


def test_a_vocabulary_only_file_is_refused(tmp_path):
    write_gguf(tmp_path / "vocab.gguf", {"general.architecture": field("llama")}, [])
    with pytest.raises(realm.GGUFError, match="vocabulary only"):
        realm.load(tmp_path / "vocab.gguf")
