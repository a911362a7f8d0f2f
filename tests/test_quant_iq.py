"""IQ, ternary and FP4 formats: their codebooks are those of `gguf`, their encoders give ggml's bytes or its error."""

import runpy
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realm_jax.errors import RealmError
from realm_jax.quant import FORMATS, QuantizedTensor, quantize
from realm_jax.quant.codebooks import codebook, grid_values, table_values

GOLDEN = Path(__file__).parent / "golden"
ROUNDING = ("TQ1_0", "TQ2_0", "MXFP4", "NVFP4")
SEARCHING = ("IQ4_NL", "IQ4_XS")
every_encoder = pytest.mark.parametrize("name", [*ROUNDING, *SEARCHING])

# Mean square error over mean square weight of ggml's quantizers (ggml_quantize_chunk without an importance matrix) on
# a million standard normal and a million standard Laplace numbers: the same to three digits for any seed.
GGML_ERROR = {"IQ4_NL": (5.796e-03, 7.767e-03), "IQ4_XS": (5.886e-03, 7.887e-03)}


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "quantized.npz") as file:
        return dict(file)


def blocks_of(w: np.ndarray, name: str, importance: np.ndarray | None = None, method: str = "refine") -> np.ndarray:
    """The bytes that the encoder gives, without the checks of `quantize`."""
    planes = jax.jit(FORMATS[name].encode, static_argnums=2)(w, importance, method)
    return QuantizedTensor(planes, name).to_bytes()


@pytest.mark.parametrize("name", ["IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"])
def test_grids_are_those_of_gguf(name):
    kind = getattr(gguf.quants, name)
    kind.init_grid()
    book = codebook("IQ1_S" if name == "IQ1_M" else name)
    got = jax.jit(lambda index: grid_values(index, book))(jnp.arange(kind.grid_shape[0]))
    assert got.shape == kind.grid_shape
    np.testing.assert_array_equal(got, kind.grid.reshape(kind.grid_shape))


@pytest.mark.parametrize("name", ["IQ4_NL", "MXFP4", "NVFP4"])
def test_values_are_those_of_gguf(name):
    book = codebook("IQ4_NL" if name == "IQ4_NL" else "MXFP4")
    np.testing.assert_array_equal(table_values(jnp.arange(16), book), getattr(gguf.quants, name).kvalues)


def test_the_file_of_codebooks_is_what_its_script_writes():
    script = runpy.run_path(str(GOLDEN / "make_codebooks.py"))
    assert script["PATH"].read_text(encoding="utf-8") == script["make_text"]()


def test_grids_are_looked_up_by_the_index():
    """One word of the grid for 8 weights, whatever surrounds the call."""
    book, index = codebook("IQ2_S"), jnp.arange(24).reshape(2, 3, 4) * 41
    want = grid_values(index, book)
    np.testing.assert_array_equal(jax.vmap(jax.vmap(lambda i: grid_values(i, book)))(index), want)
    program = str(jax.make_jaxpr(lambda i: grid_values(i, book))(index))
    assert program.count("gather[") == 1 and "u32[2,3,4] = gather[" in program
    slope = jax.grad(lambda x: (x * grid_values(index, book)).sum())(1.0)
    assert slope == want.sum()


@pytest.mark.parametrize("name", ROUNDING)
def test_bytes_are_those_of_ggml(name, golden):
    np.testing.assert_array_equal(blocks_of(golden["weights"], name), golden[f"blocks_{name}"])


@pytest.mark.parametrize("name", ["TQ1_0", "TQ2_0", "MXFP4"])
def test_bytes_are_those_of_gguf(name, golden):
    w = np.concatenate([golden["weights"], golden["heavy"] * 1e3, golden["ties"]])
    with np.errstate(all="ignore"):
        want = gguf.quants.quantize(w, gguf.GGMLQuantizationType[name])
    np.testing.assert_array_equal(blocks_of(w, name), want)


@pytest.mark.parametrize(("rows", "name"), [("powers", "MXFP4"), ("ties", "NVFP4")])
def test_scales_round_as_in_ggml(rows, name, golden):
    np.testing.assert_array_equal(blocks_of(golden[rows], name), golden[f"{rows}_{name}"])


@pytest.mark.parametrize("name", ROUNDING)
def test_importance_changes_nothing_where_nothing_is_searched(name, golden):
    importance = golden["importance"]
    want = blocks_of(golden["heavy"], name)
    np.testing.assert_array_equal(blocks_of(golden["heavy"], name, importance, "mse"), want)


@pytest.mark.parametrize("name", SEARCHING)
@pytest.mark.parametrize("draw", ["standard_normal", "laplace"])
def test_error_is_that_of_ggml(name, draw):
    w = getattr(np.random.default_rng(7), draw)(size=(512, 1024)).astype(np.float32)
    off = np.asarray(quantize(w, name).dequantize(), np.float64) - w
    assert np.square(off).sum() / np.square(w, dtype=float).sum() < 1.005 * GGML_ERROR[name][draw == "laplace"]


@pytest.mark.parametrize("name", SEARCHING)
@pytest.mark.parametrize("kind", ["plain", "importance"])
def test_error_is_that_of_ggml_on_the_same_weights(name, kind, golden):
    """Heavy tails, and an importance that spans three orders of magnitude; the error is weighted with it."""
    w, importance = golden["heavy"], golden["importance"]
    weight = importance if kind == "importance" else np.ones_like(importance)

    def error(blocks: np.ndarray) -> float:
        return float(
            (weight * np.square(np.float64(gguf.dequantize(blocks, gguf.GGMLQuantizationType[name])) - w)).sum()
        )

    given = importance if kind == "importance" else None
    ours = error(blocks_of(w, name, given))
    assert ours < 1.001 * error(golden[f"{kind}_{name}"])
    assert error(blocks_of(w, name, given, "mse")) < ours
    if kind == "importance":
        assert ours < 0.95 * error(golden[f"plain_{name}"])


@pytest.mark.parametrize("name", SEARCHING)
def test_importance_broadcasts_and_scales(name, golden):
    w, importance = golden["heavy"], golden["importance"]
    want = blocks_of(w, name, importance)
    np.testing.assert_array_equal(blocks_of(w, name, np.broadcast_to(importance, w.shape)), want)
    np.testing.assert_array_equal(blocks_of(w, name, importance * 2.0**60), want)
    nowhere = blocks_of(w, name, np.zeros_like(importance))
    assert np.isfinite(gguf.dequantize(nowhere, gguf.GGMLQuantizationType[name])).all()


@every_encoder
def test_every_kind_of_weights(name, golden):
    """No NaN, and no weight further off than the coarsest step its block can need."""
    w = golden["weights"]
    packed = QuantizedTensor(jax.jit(FORMATS[name].encode)(w), name)
    out = np.asarray(packed.dequantize())
    assert np.isfinite(out).all()
    size = FORMATS[name].block_size
    span, off = np.abs(w).reshape(-1, size).max(-1), np.abs(out - w).reshape(-1, size).max(-1)
    assert (off <= {"TQ1_0": 0.51, "TQ2_0": 0.51}.get(name, 0.3) * span + 1e-3).all()
    assert not out[~w.any(-1)].any() and (~w.any(-1)).sum() == 1


@every_encoder
def test_a_block_is_encoded_alike_wherever_it_stands(name):
    """Rows, padding and leading axes change nothing; nor does tracing, but for the order of sums in a search."""
    w = np.random.default_rng(3).standard_normal((3, 5, 512), np.float32)
    whole = quantize(w, name)
    assert whole.shape == w.shape
    rows = [quantize(row, name).to_bytes() for row in w.reshape(-1, 512)]
    np.testing.assert_array_equal(whole.to_bytes().reshape(15, -1), rows)
    traced = jax.jit(lambda w: quantize(w, name))(w)
    assert (traced.format, traced.shape) == (name, w.shape)
    if name in ROUNDING:
        np.testing.assert_array_equal(traced.to_bytes(), whole.to_bytes())
    errors = [np.square(np.asarray(packed.dequantize()) - w).sum() for packed in (whole, traced)]
    assert abs(errors[0] / errors[1] - 1) < 1e-3


@every_encoder
def test_what_cannot_be_encoded_is_refused(name):
    w = np.zeros((2, 256), np.float32)
    w[1, 77] = np.nan
    with pytest.raises(RealmError, match=rf"cannot quantize to {name}: the weights \(2, 256\) hold NaN or infinity"):
        quantize(w, name)
    w[1, 77] = 3e38
    if name == "MXFP4":  # its scales reach as far as float32
        assert np.isfinite(quantize(w, name).dequantize()).all()
    else:
        with pytest.raises(RealmError, match=rf"cannot quantize to {name}: weights up to 3e\+38 are too large"):
            quantize(w, name)


def test_a_format_without_encoder_says_which_have_one():
    with pytest.raises(RealmError, match=r"no encoder for IQ2_XS yet; these have one: .*Q4_0, .*IQ4_NL, .*NVFP4"):
        quantize(np.zeros((1, 256)), "IQ2_XS")
