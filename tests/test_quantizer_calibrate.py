"""The calibration pass against llama.cpp's, against a forward pass written out in NumPy, and against itself."""

import importlib
from pathlib import Path

import chex
import jax
import numpy as np
import pytest

import realm_jax as realm
from realm_jax.errors import RequestError
from realm_jax.evaluate import text_chunks
from realm_jax.model.params import tensor_specs
from realm_jax.quantizer.calibrate import calibrate, measure_inputs
from realm_jax.quantizer.imatrix import read_imatrix

TEXT = "In the beginning there was the word, and the word was thin. " * 8
CONTEXT = 48
GOLDEN = Path(__file__).parent / "golden" / "imatrix"
module = importlib.import_module("realm_jax.quantizer.calibrate")  # the package hands on the function of that name


@pytest.fixture(scope="module")
def model(model_file):
    return realm.load(model_file)


def norm(x, weight, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def rotate(x_THC):
    """Interleaved rope of base 10000 at positions 0, 1, ..."""
    T, _, C = x_THC.shape
    angle_TR = np.arange(T)[:, None] * 10000.0 ** (-np.arange(C // 2) / (C // 2))
    turned = (x_THC[..., 0::2] + 1j * x_THC[..., 1::2]) * np.exp(1j * angle_TR)[:, None, :]
    return np.stack([turned.real, turned.imag], -1).reshape(x_THC.shape)


def inputs_of_weights(model, tokens) -> dict[str, np.ndarray]:
    """Tensor name -> float64 (T, K), what each linear weight gets for one chunk."""
    c = model.config
    w = jax.tree.map(lambda a: np.asarray(a, np.float64), model.params)
    x, T, seen = w.embedding[tokens], len(tokens), {}
    for i, layer in enumerate(w.layers):
        p = f"blk.{i}."
        h = norm(x, layer.attn.norm, c.norm_eps)
        seen |= {p + f"attn_{n}.weight": h for n in "qkv"}
        q, k, v = ((h @ layer.attn.__dict__[n].T).reshape(T, -1, c.head_width) for n in "qkv")
        k, v = (np.repeat(a, c.heads // c.kv_heads, axis=1) for a in (rotate(k), v))
        scores = np.einsum("thc,shc->hts", rotate(q), k) / np.sqrt(c.head_width)
        scores[:, np.triu(np.ones((T, T), bool), 1)] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        o = np.einsum("hts,shc->thc", weights / weights.sum(-1, keepdims=True), v).reshape(T, -1)
        seen[p + "attn_output.weight"] = o
        x = x + o @ layer.attn.o.T
        h = norm(x, layer.ffn.norm, c.norm_eps)
        gate = h @ layer.ffn.gate.T
        inner = gate / (1 + np.exp(-gate)) * (h @ layer.ffn.up.T)
        seen |= {p + "ffn_gate.weight": h, p + "ffn_up.weight": h, p + "ffn_down.weight": inner}
        x = x + inner @ layer.ffn.down.T
    return seen | {"token_embd.weight": norm(x, w.norm, c.norm_eps)}


def test_importance_equals_a_forward_pass_written_out(model):
    chunks = text_chunks(model, TEXT, CONTEXT)
    assert len(chunks) > 5
    seen = [inputs_of_weights(model, chunk) for chunk in chunks]
    ours = calibrate(model, TEXT, context=CONTEXT, output=True)
    assert ours.values.keys() == seen[0].keys()
    for name, values in ours.values.items():
        wanted = np.mean([chunk[name] ** 2 for chunk in seen], axis=(0, 1))
        np.testing.assert_allclose(values, wanted, rtol=1e-5, err_msg=name)
        assert ours.counts[name].tolist() == [chunks.size]
    assert (ours.chunks, ours.chunk_size) == chunks.shape


@pytest.mark.parametrize("name", ["imatrix.gguf", "imatrix.dat"])
def test_importance_equals_what_llama_imatrix_measures(name):
    """On the same model and text, with llama.cpp's default tensors and with the output matrix."""
    wanted = read_imatrix(GOLDEN / name)
    text = (GOLDEN / "text.txt").read_text(encoding="utf-8")
    ours = calibrate(realm.load(GOLDEN / "model.gguf"), text, context=64, output=name.endswith(".dat"))
    assert ours.values.keys() == wanted.values.keys()
    assert ("output.weight" in wanted.values) == name.endswith(".dat")
    assert ours.chunks == wanted.chunks > 3
    assert wanted.datasets == ("text.txt",)
    for tensor, values in wanted.values.items():
        np.testing.assert_allclose(ours.values[tensor], values, rtol=1e-4, err_msg=tensor)
    if name.endswith(".gguf"):
        assert (ours.chunk_size, ours.counts) == (wanted.chunk_size, wanted.counts)


def test_what_llama_cpp_leaves_out_is_left_out(model):
    """By default nothing but the matrices of the layers: an embedding is looked up, an output matrix not asked for."""
    linear = {s.name for s in tensor_specs(model.config) if len(s.shape) == 2 and s.name.startswith("blk.")}
    assert calibrate(model, TEXT, context=CONTEXT).values.keys() == linear


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_the_batch_changes_nothing(model, batch):
    """Nor do the rows that fill up the last step."""
    chunks, done = text_chunks(model, TEXT, CONTEXT), []
    alone = [measure_inputs(model, chunks[i : i + 1]) for i in range(len(chunks))]
    ours = measure_inputs(model, chunks, batch=batch, on_chunks=done.append)
    assert sum(done) == len(chunks) and len(done) == -(-len(chunks) // batch)
    for name, values in ours.values.items():
        np.testing.assert_allclose(values, np.mean([a.values[name] for a in alone], axis=0), rtol=2e-6)


def test_one_compilation_for_all_chunks(model, monkeypatch):
    traced = chex.assert_max_traces(module._sum_squares.__wrapped__, n=1)
    monkeypatch.setattr(module, "_sum_squares", jax.jit(traced, static_argnames=("config", "output")))
    chunks = text_chunks(model, TEXT, CONTEXT)
    measure_inputs(model, chunks, batch=3)
    measure_inputs(model, chunks[:3], batch=3)


def test_a_broken_model_is_named(model):
    embedding = model.params.embedding.at[:].set(np.nan)
    broken = model.replace(params=model.params.replace(embedding=embedding))
    with pytest.raises(RequestError, match=r"small\.gguf: the input of blk\.0\.attn_k\.weight is not finite"):
        calibrate(broken, TEXT, context=CONTEXT)


def test_a_short_text_is_refused(model):
    with pytest.raises(RequestError, match="needs at least 192"):
        calibrate(model, "the word", context=96)
