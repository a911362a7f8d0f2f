"""Encoders: the bytes of `gguf` and of the definitions where only rounding decides, the error of ggml elsewhere."""

import json
import runpy
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realm_jax.cli.quantize import METHOD_NAMES
from realm_jax.errors import RealmError
from realm_jax.quant import DEFAULT_METHOD, DENSE_FORMATS, FORMATS, METHODS, QuantizedTensor, encode, quantize

every_format = pytest.mark.parametrize("name", [name for name in FORMATS if name[0] == "Q"])  # others: test_quant_iq
SEARCHING = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
ROUNDING = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q8_1", "Q8_K")
GOLDEN = Path(__file__).parent / "golden"
ERRORS = json.loads((GOLDEN / "encode_errors.json").read_text(encoding="utf-8"))
SCRIPT = runpy.run_path(str(GOLDEN / "make_encode_errors.py"))

# Mean square error over mean square weight of ggml's quantizers (llama.cpp, ggml_quantize_chunk without an importance
# matrix) on a million standard normal and a million standard Laplace numbers: the same to three digits for any seed.
GGML_ERROR = {
    "Q4_0": (7.365e-03, 1.141e-02),
    "Q4_1": (6.105e-03, 8.444e-03),
    "Q5_0": (1.816e-03, 2.863e-03),
    "Q5_1": (1.430e-03, 1.978e-03),
    "Q8_0": (2.853e-05, 4.541e-05),
    "Q8_1": (2.853e-05, 4.541e-05),
    "Q2_K": (8.773e-02, 1.182e-01),
    "Q3_K": (2.273e-02, 3.105e-02),
    "Q4_K": (5.081e-03, 7.176e-03),
    "Q5_K": (1.301e-03, 1.834e-03),
    "Q6_K": (3.138e-04, 4.703e-04),
    "Q8_K": (4.849e-05, 1.010e-04),
}


def samples() -> dict[str, np.ndarray]:
    """Float32 weights of many kinds, with rows of 512."""
    rng = np.random.default_rng(0)
    normal = rng.standard_normal((64, 512))
    return {
        "normal": normal,
        "heavy tails": rng.standard_t(2.5, (64, 512)) * 0.02,
        "shifted": normal + 3,
        "positive": rng.exponential(1, (64, 512)),
        "negative": -rng.exponential(1, (64, 512)),
        "scaled columns": normal * np.exp(rng.standard_normal(512)),
        "sparse": np.where(rng.random((64, 512)) < 0.05, normal, 0),
        "integers": rng.integers(-8, 8, (64, 512)),
        "constant": np.repeat(rng.standard_normal((64, 2)), 256, 1),
        "zero": np.zeros((4, 512)),
        "tiny": normal * 1e-30,
        "small": normal * 1e-6,
        "large": normal * 500,
    }


def reference_bytes(w: np.ndarray, name: str) -> np.ndarray:
    """What ggml's reference quantizers make of weights (rows, K): uint8 (rows, bytes)."""
    with np.errstate(all="ignore"):
        if name in ("Q8_1", "Q8_K"):
            return by_definition(w, name)
        return gguf.quants.quantize(w, gguf.GGMLQuantizationType[name])


def by_definition(w: np.ndarray, name: str) -> np.ndarray:
    """quantize_row_q8_1_ref and quantize_row_q8_K_ref of ggml, in numpy. uint8 (rows, bytes)."""
    size = FORMATS[name].block_size
    x = w.reshape(-1, size)
    if name == "Q8_1":
        d = np.abs(x).max(-1, keepdims=True) / np.float32(127)
        inverse = np.divide(1, d, where=d != 0, out=np.zeros_like(d))
        scaled = x * inverse
        codes = (np.sign(scaled) * np.floor(np.abs(scaled.astype(np.float64)) + 0.5)).astype(np.int8)
        total = codes.sum(-1, dtype=np.int32, keepdims=True).astype(np.float32) * d
        fields = [d.astype(np.float16), total.astype(np.float16), codes]
    else:
        top = np.take_along_axis(x, np.abs(x).argmax(-1)[:, None], -1)
        scale = np.divide(np.float32(-127), top, where=top != 0, out=np.zeros_like(top))
        codes = np.minimum(127, np.rint(scale * x)).astype(np.int8)
        sums = codes.reshape(-1, 16, 16).sum(-1, dtype=np.int16)
        d = np.divide(np.float32(1), scale, where=scale != 0, out=np.zeros_like(scale))
        fields = [d, codes, sums]
    blocks = np.concatenate([np.ascontiguousarray(field).view(np.uint8) for field in fields], -1)
    return blocks.reshape(len(w), -1)


@pytest.mark.parametrize("kind", samples())
@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q8_1", "Q8_K"])
def test_bytes_equal_gguf_and_the_definitions(name, kind):
    w = samples()[kind].astype(np.float32)
    np.testing.assert_array_equal(quantize(w, name).to_bytes(), reference_bytes(w, name))


@every_format
@pytest.mark.parametrize("draw", ["standard_normal", pytest.param("laplace", marks=pytest.mark.slow)])
def test_error_is_that_of_ggml(name, draw):
    w = getattr(np.random.default_rng(7), draw)(size=(512, 1024)).astype(np.float32)
    error = (
        np.square(np.asarray(quantize(w, name).dequantize(), np.float64) - w).sum() / np.square(w, dtype=float).sum()
    )
    assert error < 1.02 * GGML_ERROR[name][draw == "laplace"]


def error_of(w: np.ndarray, name: str, **options: object) -> dict[str, float]:
    return SCRIPT["errors"](w, quantize(w, name, **options).to_bytes(), name)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        *((name, DEFAULT_METHOD) for name in ERRORS),
        ("Q4_0", "mse"),
        pytest.param("Q3_K", "mse", marks=pytest.mark.slow),
        pytest.param("Q3_K", "search", marks=pytest.mark.slow),
    ],
)
def test_error_is_at_most_that_of_ggml(name, method):
    """On the same weights: squared error without importance, error weighted with it where it was given."""
    for kind, w in SCRIPT["draws"]().items():
        plain = error_of(w, name, method=method)["plain"] / ERRORS[name][kind]["without"]["plain"]
        weighted = error_of(w, name, importance=SCRIPT["importance"](), method=method)["weighted"]
        assert plain < 1.01 and weighted / ERRORS[name][kind]["with"]["weighted"] < 1.02, kind


@pytest.mark.parametrize("name", ["Q4_0", "Q3_K"])
def test_methods_make_the_error_small_that_they_say(name):
    w, importance = SCRIPT["draws"]()["student_t3"], SCRIPT["importance"]()
    plain = {method: error_of(w, name, method=method)["plain"] for method in METHODS}
    weighted = {method: error_of(w, name, importance=importance, method=method)["weighted"] for method in METHODS}
    assert plain["mse"] < 0.99 * plain["refine"]
    assert weighted["mse"] < 0.99 * weighted["refine"]
    assert weighted["refine"] < 0.9 * error_of(w, name)["weighted"], "importance must pay where it matters"
    if name in SEARCHING:
        assert weighted["refine"] < weighted["search"]


@pytest.mark.parametrize("name", ERRORS)
def test_importance_broadcasts_and_its_unit_does_not_matter(name):
    w, importance = SCRIPT["draws"]()["normal"][:6], SCRIPT["importance"]()
    want = quantize(w, name, importance=importance).to_bytes()
    whole = np.broadcast_to(importance, w.shape)
    for same in (jnp.asarray(importance), whole, importance[None], importance * 2.0**40, list(importance)):
        np.testing.assert_array_equal(quantize(w, name, importance=same).to_bytes(), want)
    by_row = quantize(w, name, importance=whole * np.arange(1, 7)[:, None] ** 8).to_bytes()
    errors = [SCRIPT["errors"](w, blocks, name)["weighted"] for blocks in (by_row, want)]
    assert abs(errors[0] / errors[1] - 1) < 1e-3
    stacked = quantize(w.reshape(2, 3, -1), name, importance=np.stack([importance, importance[::-1]])[:, None])
    np.testing.assert_array_equal(stacked.to_bytes()[0], want[:3])
    np.testing.assert_array_equal(
        stacked.to_bytes()[1], quantize(w[3:], name, importance=importance[::-1].copy()).to_bytes()
    )
    nowhere = quantize(w, name, importance=np.zeros_like(importance))
    assert SCRIPT["errors"](w, nowhere.to_bytes(), name)["plain"] < 1.1 * error_of(w, name)["plain"]


@every_format
def test_what_a_format_holds_exactly_stays_so(name):
    """Weights that were quantized once are found again, but for roundings of scales."""
    once = quantize(np.random.default_rng(8).standard_normal((8, 512)), name).dequantize()
    twice = quantize(once, name).dequantize()
    off = np.square(np.asarray(twice, float) - once).sum() / np.square(np.asarray(once, float)).sum()
    assert off < {"Q2_K": 2e-3, "Q3_K": 1e-4}.get(name, 1e-5)


def test_what_is_wrong_with_options():
    w = np.ones((2, 256), np.float32)
    with pytest.raises(RealmError, match="no method 'best' to quantize by; these are known: refine, mse, search"):
        quantize(w, "Q4_K", method="best")
    for shape in ((2,), (255,), (3, 256), (2, 1), (1, 2, 256)):
        with pytest.raises(RealmError, match=r"importance \(.*\) does not fit weights \(2, 256\): give \(256,\)"):
            quantize(w, "Q4_K", importance=np.ones(shape))
    for value in (-1, np.nan, np.inf):
        with pytest.raises(RealmError, match="importance has a value that is negative, infinite or NaN"):
            quantize(w, "Q8_0", importance=np.where(np.arange(256) == 9, value, 1))


def test_the_command_knows_the_methods():
    assert list(METHOD_NAMES) == list(METHODS) and METHOD_NAMES[0] == DEFAULT_METHOD


def test_gradients_and_maps_pass_through():
    w = jnp.asarray(np.random.default_rng(9).standard_normal((3, 2, 256)), jnp.float32)
    one_by_one = jnp.stack([quantize(part, "Q4_0", method="mse").dequantize() for part in w])
    mapped = jax.jit(jax.vmap(lambda part: quantize(part, "Q4_0", method="mse").dequantize()))(w)
    assert jnp.square(mapped - one_by_one).sum() < 1e-3 * jnp.square(w - one_by_one).sum()
    assert not jax.grad(lambda w: quantize(w, "Q4_0", method="mse").dequantize().sum())(w[0]).any()


@every_format
@pytest.mark.parametrize("kind", samples())
def test_every_kind_of_weights(name, kind):
    """No NaN, and no weight further off than the coarsest step its block can need."""
    w = samples()[kind].astype(np.float32)
    packed = quantize(w, name)
    out = np.asarray(packed.dequantize())
    assert np.isfinite(out).all()
    span = np.abs(w).reshape(-1, FORMATS[name].block_size).max(-1)
    off = np.abs(out - w).reshape(-1, FORMATS[name].block_size).max(-1)
    coarse = {"Q2_K": 0.6, "Q3_K": 0.5}.get(name, 0.3)
    assert (off <= coarse * span + 1e-5).all()
    if kind == "zero":
        assert not out.any()


@every_format
def test_a_block_is_encoded_alike_wherever_it_stands(name):
    """Rows, padding and leading axes change nothing."""
    w = np.random.default_rng(3).standard_normal((3, 5, 512), np.float32)
    whole = quantize(w, name)
    assert whole.shape == w.shape
    rows = [quantize(row, name).to_bytes() for row in w.reshape(-1, 512)]
    np.testing.assert_array_equal(whole.to_bytes().reshape(15, -1), rows)


@pytest.mark.parametrize("name", ["Q4_0", "Q5_1", "Q8_K", "Q3_K", "Q4_K"])
def test_works_in_stripes_and_when_traced(name, monkeypatch):
    """Where the encoder searches, sums in another order may end in another code: then the error must be the same."""
    w = np.random.default_rng(3).standard_normal((3, 5, 512), np.float32)
    whole = quantize(w, name)
    traced = jax.jit(lambda w: quantize(w, name))(w)
    assert (traced.format, traced.shape) == (name, w.shape)
    monkeypatch.setattr(encode, "CPU_STRIPE", 2048)
    for other in (traced, quantize(w, name)):
        errors = [np.square(np.asarray(packed.dequantize()) - w).sum() for packed in (whole, other)]
        assert abs(errors[0] / errors[1] - 1) < (1e-3 if name in SEARCHING else 1e-6)
        if name not in SEARCHING:
            np.testing.assert_array_equal(other.to_bytes(), whole.to_bytes())


@every_format
def test_takes_any_float_dtype_and_packed_weights(name):
    w = jnp.asarray(np.random.default_rng(4).standard_normal((2, 256)), jnp.bfloat16)
    want = quantize(np.asarray(w, np.float32), name).to_bytes()
    np.testing.assert_array_equal(quantize(w, name).to_bytes(), want)
    np.testing.assert_array_equal(quantize(np.asarray(w, np.float64), name).to_bytes(), want)
    again = quantize(quantize(w, "Q8_0"), name)
    np.testing.assert_array_equal(again.to_bytes(), quantize(quantize(w, "Q8_0").dequantize(), name).to_bytes())
    assert isinstance(quantize(np.zeros((0, 256)), name), QuantizedTensor)


@pytest.mark.parametrize("name", DENSE_FORMATS)
def test_dense_formats_round_as_gguf_does(name):
    w = np.random.default_rng(5).standard_normal((4, 96), np.float32)
    out = quantize(w, name)
    assert out.dtype == DENSE_FORMATS[name] and not isinstance(out, QuantizedTensor)
    want = gguf.quants.quantize(w, gguf.GGMLQuantizationType[name])
    np.testing.assert_array_equal(np.asarray(out).view(np.uint8), want.view(np.uint8))


@pytest.mark.parametrize("name", ["F16", "BF16", *(name for name in FORMATS if FORMATS[name].encode)])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(name, value):
    """Among few weights and among many: XLA's CPU backend loses NaN in the maximum of a large array."""
    w = np.zeros((300, 256), np.float32)
    w[1, 77] = value
    for part in (w[:2], w):
        shape = rf"\({len(part)}, 256\)"
        with pytest.raises(RealmError, match=rf"cannot quantize to {name}: the weights {shape} hold NaN or infinity"):
            quantize(part, name)


@pytest.mark.parametrize("name", ["F16", *(name for name in (*ROUNDING, *SEARCHING) if name != "Q8_K")])
def test_what_is_too_large_is_refused(name):
    w = np.random.default_rng(6).standard_normal((2, 256)) * 1e30
    with pytest.raises(RealmError, match=rf"cannot quantize to {name}: weights up to .*e\+30 are too large"):
        quantize(w, name)


def test_what_does_not_fit_is_refused():
    with pytest.raises(RealmError, match=r"Q4_K: a row of 300 weights .* multiple of 256"):
        quantize(np.zeros((2, 300)), "Q4_K")
    with pytest.raises(RealmError, match="cannot quantize a scalar to Q8_0"):
        quantize(1.0, "Q8_0")
    with pytest.raises(RealmError, match="Q1_0 is a ggml format that is not supported"):
        quantize(np.zeros((2, 32)), "Q1_0")


def test_a_format_without_encoder_says_which_have_one(monkeypatch):
    from dataclasses import replace

    monkeypatch.setitem(FORMATS, "Q5_K", replace(FORMATS["Q5_K"], write_words=None))
    with pytest.raises(RealmError, match=r"no encoder for Q5_K yet; these have one: Q4_0, .*Q4_K, Q6_K, Q8_K"):
        quantize(np.zeros((1, 256)), "Q5_K")
