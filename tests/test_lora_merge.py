"""Merging: the same as the adapter beside the weights, in every format; what stays; taken out again; what it costs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lora_toys import random_adapter
from test_quant_formats import random_weights

import realm_jax as realm
from realm_jax import lora
from realm_jax.errors import AdapterError, RealmError
from realm_jax.evaluate import score
from realm_jax.gguf.reader import open_gguf
from realm_jax.gguf.types import field
from realm_jax.kernels.delta import Delta, add_deltas, dora_norms
from realm_jax.kernels.matmul import matmul
from realm_jax.lora.adapter import delta_paths, weight_of
from realm_jax.lora.merge import merged_rows
from realm_jax.model import Config, Model, Rope, init_params
from realm_jax.model.model import Origin
from realm_jax.model.params import get_weight
from realm_jax.quant import FORMATS, quantize, raw_bytes
from realm_jax.quantizer import Imatrix, merge, merge_report, quantize_model, sample_chunks, weight_errors
from realm_jax.quantizer.merge_report import requantize_through_f16
from realm_jax.quantizer.models import format_of

ENCODED = [name for name, kind in FORMATS.items() if kind.encode]
VOCAB = 48
TOKENS = np.random.default_rng(0).integers(0, VOCAB, (2, 9))


@pytest.fixture(autouse=True)
def small_stripes(monkeypatch):
    """Encoders pad to whole stripes; those of a matrix here are enough, and blocks come out the same."""
    monkeypatch.setattr("realm_jax.quant.encode.CPU_STRIPE", 1 << 16)


def toy_model(format="F32", architecture="llama", tied=True, seed=0) -> Model:
    """A small random model whose matrices have rows of 256 weights, all in one format; qwen2's has biases."""
    config = Config(
        architecture=architecture, vocab_size=VOCAB, context_length=64, layers=1, width=256, ffn_width=256, heads=4,
        kv_heads=2, head_width=64, norm_eps=1e-5, rope=Rope(dimensions=64, halves=architecture == "qwen2"),
    )  # fmt: skip
    params = init_params(config, jax.random.key(seed), tied=tied)
    if format in FORMATS:
        packed, used = random_weights(format, 8 * 256, 256, seed=seed), 0
        for path in delta_paths(1):
            weight = get_weight(params, path)
            if weight is not None:
                rows = slice(used, used := used + len(weight))
                params = with_weight(params, path, jax.tree.map(lambda plane, rows=rows: plane[rows], packed))
        # What is random here has a mean square of 1, not 1 / 256.
        params = jax.tree.map(lambda leaf: leaf / 16 if leaf.ndim == 1 and leaf.dtype == jnp.float32 else leaf, params)
    else:
        params = jax.tree.map(lambda leaf: quantize(leaf, format) if leaf.ndim == 2 else leaf, params)
    if architecture == "qwen2":
        for i, name in enumerate("qkv"):
            rows = get_weight(params, ("layers", 0, "attn", name)).shape[0]
            bias = jax.random.normal(jax.random.key(i), (rows,))
            params = with_weight(params, ("layers", 0, "attn", f"{name}_bias"), bias)
    return Model(params, config, None, Origin("toy.gguf", {k: field(v) for k, v in config.metadata().items()}))


def with_weight(node, path, weight):
    """A tree of weights with another one at a path."""
    if not path:
        return weight
    step, *rest = path
    if isinstance(step, int):
        return (*node[:step], with_weight(node[step], rest, weight), *node[step + 1 :])
    return node.replace(**{step: with_weight(getattr(node, step), rest, weight)})


def close(x, y, tolerance=1e-5):
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * np.abs(y).max())


def raw(weight) -> bytes:
    return raw_bytes(weight)[1].tobytes()


QUICK = ("Q4_0", "Q8_0", "Q4_K", "IQ2_XS", "TQ1_0", "MXFP4", "F16")


@pytest.mark.parametrize(
    "format",
    [
        name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
        for name in (*FORMATS, "F32", "F16", "BF16")
    ],
)
def test_merged_rows_are_the_adapters_applied(format):
    """A product by them is one by weights of any format with LoRA and DoRA beside it."""
    rng = np.random.default_rng(0)
    dense = jnp.asarray(rng.standard_normal((24, 256)), jnp.float32)
    w = random_weights(format, 24, 256) if format in FORMATS else quantize(dense, format)
    x = jnp.asarray(rng.standard_normal((5, 256)), jnp.float32)
    lora_delta, dora = (
        Delta(*(jnp.asarray(rng.standard_normal(shape) / 8, jnp.float32) for shape in ((3, 256), (24, 3))), scale)
        for scale in (jnp.float32(1.5), jnp.float32(-0.5))
    )
    dora = dora.replace(magnitude=jnp.asarray(rng.uniform(5, 20, 24), jnp.float32))
    deltas = (lora_delta, dora.replace(norms=dora_norms(w, dora)))
    _, plain, merged = merged_rows(w, deltas, 0, 24)
    close(np.asarray(x, np.float64) @ np.asarray(merged, np.float64).T, add_deltas(matmul(x, w), x, deltas))
    np.testing.assert_array_equal(plain, w.dequantize() if format in FORMATS else w.astype(jnp.float32))
    assert np.abs(merged - plain).max() > 0.1


@pytest.mark.parametrize("format", [pytest.param("Q4_K", marks=pytest.mark.slow), "IQ2_XS", "F16"])
def test_merged_into_float_is_the_adapter_applied(format):
    """In a whole model, all weights at once, with LoRA and DoRA acting together."""
    model = toy_model(format)
    both = [random_adapter(model, seed=1), (random_adapter(model, seed=2, dora=True), 0.5)]
    merged = realm.merge(model, both, format="F32")
    close(realm.forward(merged, TOKENS), realm.forward(model, TOKENS, adapter=both))
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(merged.params)} == {"float32"}


@pytest.mark.parametrize("doras", [pytest.param([False], marks=pytest.mark.slow), [True, False, True]])
@pytest.mark.parametrize(("architecture", "tied"), [("llama", True), ("qwen2", False)])
def test_architectures(architecture, tied, doras):
    model = toy_model("Q8_0", architecture, tied)
    acting = [(random_adapter(model, seed=i, dora=dora, size=0.3), 0.5 + i) for i, dora in enumerate(doras)]
    merged = merge(model, acting, scale=0.7, format="F32")
    want = realm.forward(model, TOKENS, adapter=[(adapter, 0.7 * scale) for adapter, scale in acting])
    close(realm.forward(merged, TOKENS), want)
    plain = realm.forward(model, TOKENS)
    assert np.abs(plain - want).max() > 1e-2 * np.abs(want).max()


@pytest.mark.parametrize("target", ["embedding", "output", "v"])
@pytest.mark.parametrize("dora", [False, True])
def test_each_target_of_a_tied_model(target, dora, tmp_path):
    """A change of the embedding is one of its lookup alone, a change of the head is one of the head alone."""
    model = toy_model("Q8_0")
    adapter = random_adapter(model, seed=4, targets=(target,), dora=dora)
    want = realm.forward(model, TOKENS, adapter=adapter)
    close(realm.forward(merge(model, adapter, format="F32"), TOKENS), want)
    merged = merge(model, adapter)
    assert (merged.params.output is not None) == (target in ("embedding", "output"))
    assert (merged.params.embedding is model.params.embedding) == (target != "embedding")
    if target == "embedding":
        assert merged.params.output is model.params.embedding
    realm.save(merged, tmp_path / "merged.gguf")
    again = realm.load(tmp_path / "merged.gguf")
    np.testing.assert_array_equal(realm.forward(again, TOKENS), realm.forward(merged, TOKENS))
    close(realm.forward(again, TOKENS), want, 2e-2)


@pytest.mark.parametrize("format", [*ENCODED, "F16", "BF16"])
def test_each_weight_goes_back_into_its_own_format(format, monkeypatch):
    """In stripes that leave a rest, as if it had been encoded as a whole."""
    monkeypatch.setattr("realm_jax.quantizer.merging.STRIPE_WEIGHTS", 100 * 256)
    model = toy_model(format)
    adapter = random_adapter(model, seed=1, targets=("q", "embedding"))
    ours, dense = merge(model, adapter), merge(model, adapter, format="F32")
    for path in (("embedding",), ("layers", 0, "attn", "q")):
        weight = get_weight(ours.params, path)
        assert format_of(weight) == format
        assert raw(weight) == raw(quantize(get_weight(dense.params, path), format))
    assert ours.params.layers[0].attn.k is model.params.layers[0].attn.k
    errors = weight_errors(model, adapter, ours)
    want = get_weight(dense.params, ("embedding",))
    got = ours.params.embedding
    got = got.dequantize() if format in FORMATS else got.astype(jnp.float32)
    relative = np.square(np.asarray(got - want, np.float64)).sum() / np.square(np.asarray(want, np.float64)).sum()
    assert errors["token_embd.weight"].relative == pytest.approx(relative, rel=1e-5)
    assert list(errors) == ["token_embd.weight", "blk.0.attn_q.weight"]


def test_what_does_not_change_stays(tmp_path):
    """Other tensors are the same bytes; so are rows that nothing is added to, and all with a zero adapter."""
    model = realm.load()
    zero = lora.init_adapter(model, jax.random.key(0), targets=("q", "down", "embedding", "output"), dora=True)
    same = merge(model, zero)
    assert all(a is b for a, b in zip(jax.tree.leaves(same.params), jax.tree.leaves(model.params), strict=True))
    adapter = random_adapter(model, targets=("down",))
    rows = jnp.arange(model.config.width)[:, None] % 3 == 0
    adapter = adapter.map(lambda delta: delta.replace(b=jnp.where(rows, delta.b, 0)))
    merged = merge(model, adapter)
    realm.save(merged, tmp_path / "merged.gguf")
    with open_gguf(realm.model.bundled()) as before, open_gguf(tmp_path / "merged.gguf") as after:
        assert list(before.tensors) == list(after.tensors) and repr(before.fields) == repr(after.fields)
        for name, info in before.tensors.items():
            assert after.tensors[name].format == info.format
            equal = (before.raw(name) == after.raw(name)).reshape(info.shape[0], -1).all(1)
            assert equal.tolist() == [not name.endswith("down.weight") or i % 3 != 0 for i in range(info.shape[0])]


def test_unmerge_gives_the_file_of_the_base(tmp_path):
    model = realm.load()
    adapter = random_adapter(model, seed=5, rank=2, dora=True, targets=("v", "down", "embedding"))
    before = realm.model.bundled().read_bytes()
    for format in (None, "F16"):
        realm.save(merge(model, adapter, format=format), tmp_path / "merged.gguf")
        merged = realm.load(tmp_path / "merged.gguf")
        assert (tmp_path / "merged.gguf").read_bytes() != before
        realm.save(lora.unmerge(merged, model, adapter), tmp_path / "again.gguf")
        assert (tmp_path / "again.gguf").read_bytes() == before
    norm = 2 * merged.params.norm
    edited = merged.replace(params=merged.params.replace(norm=norm))
    assert lora.unmerge(edited, model, adapter).params.norm is norm
    with pytest.raises(AdapterError, match=r"unmerge wants the base"):
        lora.unmerge(toy_model(), model, adapter)


def test_the_file_says_what_most_of_it_is():
    model = realm.load()
    kept = model.origin.fields["general.file_type"]
    few, all_of_it = (random_adapter(model, targets=targets) for targets in (("k",), lora.TARGETS))
    assert merge(model, few, format="F16").origin.fields["general.file_type"] == kept
    assert merge(model, all_of_it).origin.fields["general.file_type"] == kept
    assert merge(model, all_of_it, format="f16").origin.fields["general.file_type"].value == 1
    assert merge(model, all_of_it, format="Q8_0").origin.fields["general.file_type"].value == 7


def test_importance_weighs_the_errors():
    model = toy_model("Q4_0")
    values = np.linspace(0, 1, 256, dtype=np.float32)
    imatrix = Imatrix({"blk.0.attn_q.weight": values[None]})
    adapter = random_adapter(model, targets=("q",))
    dense = merge(model, adapter, format="F32").params.layers[0].attn.q
    ours = merge(model, adapter, imatrix=imatrix, method="mse").params.layers[0].attn.q
    assert raw(ours) == raw(quantize(dense, "Q4_0", importance=values, method="mse"))
    assert raw(ours) != raw(merge(model, adapter, method="mse").params.layers[0].attn.q)


def test_refusals_name_the_tensor_and_come_before_the_work():
    model = toy_model("IQ2_XS")
    adapter = random_adapter(model, targets=("v", "up"))
    done = []
    with pytest.raises(RealmError, match=r"toy\.gguf: tensor blk\.0\.attn_v\.weight .*no encoder for IQ2_XS.*format="):
        merge(model, adapter, on_tensor=lambda *_: done.append(1))
    small = toy_model("Q8_0")
    adapter = random_adapter(small, targets=("v", "up"))
    for wanted, how in (
        (r"tensor blk\.0\.attn_v\.weight .*Q7_K", {"format": "Q7_K"}),
        (r"no method 'best'", {"method": "best"}),
        (r"its scale is nan", {"scale": float("nan")}),
    ):
        with pytest.raises(RealmError, match=wanted):
            merge(small, adapter, on_tensor=lambda *_: done.append(1), **how)
    assert not done
    with pytest.raises(RealmError, match=r"tensor blk\.0\.attn_v\.weight: .*too large"):
        merge(small, adapter, scale=1e9)
    with pytest.raises(RealmError, match=r"tensor blk\.0\.attn_v\.weight: .*too large"):
        merge(small, adapter, scale=1e9, format="F16")
    with pytest.raises(RealmError, match=r"tensor blk\.0\.attn_v\.weight: .*NaN or infinity"):
        merge(small, adapter.scaled(1e38), scale=1e30, format="F32")
    with pytest.raises(AdapterError, match=r"stack of adapters; merge takes one"):
        merge(small, lora.stack([adapter], small))
    with pytest.raises(AdapterError, match=r"attn_v\.weight"):
        merge(small, random_adapter(realm.load(), targets=("v",)))
    close(realm.forward(merge(small, adapter, format="F32"), TOKENS), realm.forward(small, TOKENS, adapter=adapter))


def test_rows_that_are_not_whole_blocks(make_model_file):
    model = realm.load(make_model_file("narrow.gguf"))  # rows of 64 and 96
    adapter = random_adapter(model, targets=("down",))
    with pytest.raises(RealmError, match=r"tensor blk\.0\.ffn_down\.weight .*96 weights.*multiple of 256"):
        merge(model, adapter, format="Q4_K")


def test_report(make_model_file):
    """KL against numpy; the other way is what F16 and then all formats give; in float there is none, and no KL."""
    model = realm.load(make_model_file("report.gguf", format="Q4_0"))
    adapter = random_adapter(model, targets=("q", "v", "embedding"))
    merged = merge(model, adapter, scale=0.5)
    chunks = np.random.default_rng(1).integers(0, 261, (3, 16), dtype=np.int32)
    report = merge_report(model, adapter, merged, chunks, scale=0.5)
    assert (report.chunks, report.context, report.tokens) == (3, 16, 21)
    theirs, ours = (
        np.asarray(jax.nn.log_softmax(realm.forward(m, chunks, adapter=a)), np.float64)[:, 8:15]
        for m, a in ((model, [(adapter, 0.5)]), (merged, None))
    )
    kl = (np.exp(theirs) * (theirs - ours)).sum(-1)
    assert report.merged.kl.mean == pytest.approx(kl.mean(), rel=1e-2) and report.merged.kl.mean > 1e-5
    assert report.merged.top1_agreement.mean == (theirs.argmax(-1) == ours.argmax(-1)).mean()
    assert report.gain.mean == pytest.approx(report.through_f16.kl.mean - report.merged.kl.mean)
    assert report.no_f16 is None and next(iter(report.tensors)) == "token_embd.weight"

    exact = merge_report(model, [(adapter, 0.5)], merge(model, adapter, scale=0.5, format="F32"), chunks)
    assert abs(exact.merged.kl.mean) < 1e-7 and exact.merged.top1_agreement.mean == 1
    assert exact.through_f16 is exact.gain is None and "floating point" in exact.no_f16


def test_through_f16_is_two_whole_quantizations():
    model = toy_model("Q4_K")
    adapter = random_adapter(model, targets=("q", "embedding"))
    merged = merge(model, adapter)
    dense = merge(model, adapter, format="F16")
    names = (
        "token_embd",
        "output",
        *(f"blk.0.{n}" for n in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")),
    )
    by_hand = dense
    for format in ("F16", "Q4_K"):
        by_hand = quantize_model(by_hand, {f"{name}.weight": format for name in names})
    ours = requantize_through_f16(model, adapter, merged)
    for path in delta_paths(1):
        assert raw(weight_of(ours.params, path)) == raw(weight_of(by_hand.params, path))


def test_a_format_that_cannot_be_made_anew_leaves_out_the_comparison():
    model = toy_model("Q8_0")
    layer = model.params.layers[0]
    layer = layer.replace(ffn=layer.ffn.replace(up=random_weights("IQ3_S", 256, 256)))
    model = model.replace(params=model.params.replace(layers=(layer,)))
    adapter = random_adapter(model, targets=("q",))
    report = merge_report(model, adapter, merge(model, adapter))
    assert report.through_f16 is None and "IQ3_S" in report.no_f16
    assert report.merged.kl.mean < 1e-2


def test_samples_are_the_models_own(model_file):
    """Documents of a fixed seed from the model with its adapter, cut into chunks; with and without a vocabulary."""
    model = realm.load(model_file)
    adapter = random_adapter(model, targets=("v",))
    chunks = sample_chunks(model, adapter, tokens=200, context=64)
    assert chunks.dtype == np.int32 and chunks.shape[1] == 64 and len(chunks) >= 2
    assert (chunks[:, 0] == model.tokenizer.bos_id).all()
    np.testing.assert_array_equal(chunks, sample_chunks(model, adapter, tokens=200, context=64))
    assert chunks.tolist() != sample_chunks(model, tokens=200, context=64).tolist()
    (document,) = realm.generate(model, [[model.tokenizer.bos_id]], max_new_tokens=63, temperature=1.0, adapter=adapter)
    assert chunks[0, 1 : 1 + len(document.tokens)].tolist() == document.tokens
    # What a model says of itself it finds as likely as its entropy says: within 5 standard errors of its mean.
    nameless = toy_model("Q8_0")
    rows = sample_chunks(nameless, tokens=32 * 64, context=64)
    assert rows.shape == (32, 64) and (rows[:, 0] == 0).all()
    nll = score(nameless, rows).nll
    log_p = np.asarray(jax.nn.log_softmax(realm.forward(nameless, rows)), np.float64)[:, 32:63]
    surprise = nll - -(np.exp(log_p) * log_p).sum(-1)
    assert abs(surprise.mean()) < 5 * surprise.std() / surprise.size**0.5
