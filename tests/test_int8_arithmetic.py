"""Products in int8 arithmetic: against float64, who gets it, that it stays with the weights, and what it costs."""

import functools
import json
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lora_toys import random_adapter
from test_matmul import nmse
from test_quant_formats import random_weights

import int8_cost
import realm_jax as realm
from realm_jax import evaluate, quant
from realm_jax.cli.main import run as realm_command
from realm_jax.decode.draft_models import prepare_draft, self_draft
from realm_jax.errors import RealmError, RequestError
from realm_jax.experiment import Run, load_config
from realm_jax.kernels import choose_impl, delta, matmul, pallas, reference, triton_int8
from realm_jax.kernels.matmul import MOST_ROWS
from realm_jax.model.params import arithmetic_of, for_any_rows
from realm_jax.quant import FORMATS, QuantizedTensor
from realm_jax.quantizer import quantize_model

QUICK = ("Q4_0",)  # the others are for test-all
KERNEL_QUICK = ("NVFP4",)
TEXT = "the tin in the thin tin, in the inn. " * 12


def product(name: str, rows: int, n: int = 7, k: int = 512, arithmetic: str = "int8"):
    x = jnp.asarray(np.random.default_rng(rows).standard_normal((rows, k)), jnp.float32)
    return x, random_weights(name, n, k, seed=1).replace(arithmetic=arithmetic)


def in_integers(x: jax.Array, w: QuantizedTensor) -> np.ndarray:
    """The definition, in float64: activations of 32 neighbours in 127 steps of the largest, to nearest, then a dot."""
    blocks = np.asarray(x, np.float64).reshape(len(x), -1, 32)
    size = np.abs(blocks).max(-1, keepdims=True) / 127
    rounded = np.rint(blocks / np.where(size == 0, 1, size)) * size
    return rounded.reshape(x.shape) @ np.asarray(w.dequantize(), np.float64).T


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FORMATS]
)
def test_products(name):
    """Near float64 as int8 can be, and as near its own definition as float32 can be."""
    x, w = product(name, 3)
    x, scale = np.array(x), np.float64([[1], [1], [1e20]])
    x[1, :64], x[2] = 100 * (np.arange(64) == 3), 1e-20 * x[2]
    y = np.asarray(matmul(jnp.asarray(x), w), np.float64)
    exact = np.asarray(x, np.float64) @ np.asarray(w.dequantize(), np.float64).T
    assert 1e-7 < nmse(y[[0, 2]] * scale[[0, 2]], exact[[0, 2]] * scale[[0, 2]]) < 5e-4
    assert nmse(y * scale, in_integers(x, w) * scale) < 1e-11
    assert not np.asarray(matmul(jnp.zeros((3, 512)), w)).any()


def test_steps():
    line, ties = np.linspace(-3, 3, 32), np.float64([127, 0.5, 1.5, 2.5, -0.5, -1.5, *[0] * 26])
    x = np.concatenate([line, np.zeros(32), np.full(32, 1e-42), np.arange(32) * 1e30 / 31, ties]).astype(np.float32)
    steps, size = jax.tree.map(np.asarray, jax.jit(reference.int8_steps)(x))
    assert steps.dtype == np.int8 and size.shape == (5,)
    assert steps[[0, 31, 127]].tolist() == [-127, 127, 127] and not steps[32:64].any()
    assert steps[128:134].tolist() == [127, 0, 2, 2, 0, -2]
    size = np.repeat(size, 32)
    assert (np.abs(size * steps - x) <= 0.5001 * size + 1e-41).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, pytest.param(jnp.float16, marks=pytest.mark.slow)])
def test_the_result_has_the_dtype_of_x(dtype):
    x, w = product("Q8_0", 2, k=64)
    y = matmul(x.astype(dtype), w)
    assert y.dtype == dtype
    np.testing.assert_array_equal(y, matmul(x.astype(dtype).astype(jnp.float32), w).astype(dtype))


def test_a_row_depends_on_no_other():
    x, w = product("Q8_0", 6)
    beside = np.array(x)
    beside[1] *= 1e9
    beside[2, 40], beside[3, 0], beside[4, 511] = np.nan, np.inf, -np.inf
    y, others = np.asarray(matmul(x, w)), np.asarray(matmul(jnp.asarray(beside), w))
    assert np.isnan(others[2:5]).all()
    np.testing.assert_array_equal(others[[0, 5]], y[[0, 5]])


def test_who_serves():
    x, w = product("Q4_0", MOST_ROWS + 1, k=32)
    floats = w.replace(arithmetic="float")
    assert choose_impl((MOST_ROWS, 32), w) == "reference_int8"
    assert choose_impl((0, 32), w) == choose_impl(x.shape, w) == choose_impl((1, 32), floats) == "reference"
    assert choose_impl(x.shape, w.replace(arithmetic="int8_any_rows")) == "reference_int8"
    assert choose_impl((1, 32), w.dequantize()) == "reference"
    np.testing.assert_array_equal(matmul(x, w), matmul(x, floats))
    np.testing.assert_array_equal(matmul(x[:9], w, impl="reference"), matmul(x[:9], floats))
    with pytest.raises(RealmError, match=r"x \(65, 32\) by Q4_0 weights \(7, 32\): int8 arithmetic takes 1 to 64 rows"):
        matmul(x, w, impl="reference_int8")
    with pytest.raises(RealmError, match='it is for weights in "int8" arithmetic'):
        matmul(x, floats, impl="reference_int8")


def test_gradients_are_those_of_floats():
    x, w = product("Q8_0", 3, k=64)
    floats, g = w.replace(arithmetic="float"), jnp.ones((3, 7)).at[1].set(-2)
    grads = [jax.vjp(lambda x, w=w: matmul(x, w), x)[1](g)[0] for w in (w, floats)]
    np.testing.assert_array_equal(*grads)
    assert np.abs(grads[0]).min() > 0


def test_vmap_is_more_rows():
    x, w = product("Q8_0", 6, k=64)
    np.testing.assert_array_equal(jax.vmap(matmul, (0, None))(x.reshape(3, 2, 64), w).reshape(6, 7), matmul(x, w))
    both = jax.tree.map(lambda plane: jnp.stack([plane, plane]), w)
    np.testing.assert_array_equal(jax.vmap(matmul, (None, 0))(x, both)[1], matmul(x, w))
    many = jnp.tile(x, (MOST_ROWS, 1, 1))
    whole = jax.vmap(matmul, (0, None))(many, w)
    np.testing.assert_array_equal(whole.reshape(-1, 7), matmul(many.reshape(-1, 64), w.replace(arithmetic="float")))


def test_it_is_static_and_travels_with_the_weight():
    x, w = product("Q8_0", 2, k=64)
    floats = w.replace(arithmetic="float")
    assert jax.tree.structure(w) != jax.tree.structure(floats)
    counted = jax.jit(chex.assert_max_traces(lambda x, w: matmul(x, w), n=2))
    results = [np.asarray(counted(x, weight)) for weight in (w, floats, w, floats)]
    np.testing.assert_array_equal(results[:2], results[2:])
    assert (results[0] != results[1]).any()
    kept = [
        jax.tree.map(lambda plane: plane[:3], w),
        jax.jit(lambda w: w)(w),
        quant.quantize(w, "Q4_0"),
        jax.jit(lambda w: quant.quantize(w, "Q4_0"))(w),
    ]
    assert {own.arithmetic for own in kept} == {"int8"}
    assert "int8" in repr(w) and "int8" not in repr(floats)
    np.testing.assert_array_equal(w.to_bytes(), floats.to_bytes())
    np.testing.assert_array_equal(w.take(jnp.arange(2)), floats.take(jnp.arange(2)))


def test_norms_of_dora_stay_floats():
    x, w = product("Q8_0", 2, k=64)
    change = delta.Delta(x, jnp.ones((7, 2)), jnp.float32(1))
    np.testing.assert_array_equal(*(delta.dora_norms(own, change) for own in (w, w.replace(arithmetic="float"))))


# --- the kernel for a GPU, in the interpreter ------------------------------------------------------------------------


@pytest.fixture
def interpreter():
    with pallas.interpreted():
        yield


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in KERNEL_QUICK else pytest.mark.slow) for name in FORMATS]
)
def test_the_kernel(name, interpreter):
    """Its definition, an odd number of outputs, and that a row has the same bits whatever is beside it."""
    x, w = product(name, 3, 21, max(256, FORMATS[name].block_size))
    assert choose_impl(x.shape, w) == "triton_int8"
    y = matmul(x, w)
    assert nmse(y, in_integers(x, w)) < 1e-12
    np.testing.assert_array_equal(matmul(x[2:], w), y[2:])


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_the_kernel_in_many_steps(name, interpreter):
    x, w = product(name, 10, 16, 5 * 1024 + FORMATS[name].block_size)
    assert nmse(matmul(x, w), in_integers(x, w)) < 1e-12


def test_rows_of_the_kernel(interpreter):
    """The same bits from 1 to 64 rows; rows of any size; not finite; zeros; 16 bits are rounded at the end alone."""
    x, w = product("Q4_0", 64, 16, 64)
    x = (x * jnp.ones((64, 1)).at[1].set(1e-30).at[2].set(1e30)).at[3].set(0).astype(jnp.bfloat16)
    floats = x.astype(jnp.float32)
    whole = np.asarray(matmul(floats.at[4, 40].set(jnp.nan).at[5, 9].set(-jnp.inf), w))
    assert np.isnan(whole[4:6]).all() and not whole[3].any()
    np.testing.assert_array_equal(matmul(floats[-1:], w), whole[-1:])
    rounded = matmul(x[-9:], w)
    assert rounded.dtype == jnp.bfloat16
    np.testing.assert_array_equal(rounded, whole[-9:].astype(jnp.bfloat16))
    scale = np.float64([[1e30], [1e-30]])
    want = np.asarray(reference.matmul_int8(floats[1:3], w), np.float64)
    assert nmse(whole[1:3] * scale, want * scale) < 1e-12


@pytest.mark.parametrize("zero", [None, 4])
def test_what_the_kernel_reads_of_x(zero, interpreter):
    """Steps and sizes are those of the reference, to the bit; sums are of them."""
    x = np.random.default_rng(0).standard_normal((3, 256)).astype(np.float32)
    steps, size = jax.tree.map(np.asarray, reference.int8_steps(x))
    form = triton_int8.Form(1, 16, 16, zero or 0, offsets=zero is None, mins=False)
    operand = jax.tree.map(np.asarray, triton_int8.prepare(jnp.asarray(x), form))
    words = operand.steps[0].reshape(8, 8, 4, 2, 2).transpose(1, 0, 3, 4, 2)  # column, 64, 32, 16, lane
    np.testing.assert_array_equal(words[:3, :4].copy().view(np.int8).reshape(3, 256), steps)
    np.testing.assert_array_equal(operand.sizes[0, :3, :8], size)
    sums = steps.reshape(3, 16, 16).sum(-1, dtype=np.int32)
    want = np.repeat(size, 2, -1) * sums if zero is None else 1.5 * 2**23 + zero * sums
    np.testing.assert_array_equal(operand.sums[0, :3, :16], want.astype(np.float32))
    assert not words[3:].any() and not words[:, 4:].any() and not operand.sizes[0, 3:].any()


def test_mins_take_all_bits_of_sums(interpreter):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 256)), jnp.float32)
    form = triton_int8.Form(1, 8, 32, 0, offsets=False, mins=True)
    words = np.asarray(triton_int8.prepare(x, form).sums)[0, 0].reshape(8, 4, 4)  # column, pair of sub-blocks, piece
    assert not words[3:, :, :3].any()
    words = words[:3, :, :3].copy()
    pieces = [(words << 16).view(np.float32), (words & -65536).view(np.float32)]
    sums = np.stack(pieces, 2).astype(np.float64).sum(-1).reshape(3, 8)
    steps, size = jax.tree.map(np.asarray, reference.int8_steps(x))
    np.testing.assert_array_equal(sums, size * steps.reshape(3, 8, 32).sum(-1).astype(np.float32))


def test_gradients_and_vmap_of_the_kernel(interpreter):
    x, w = product("Q8_0", 3, 5, 64)
    floats = w.replace(arithmetic="float")
    g = jnp.ones((3, 5)).at[1].set(-2)
    y, pull = jax.vjp(lambda x: matmul(x, w), x)
    np.testing.assert_array_equal(pull(g)[0], reference.matmul_transposed(g, floats))
    np.testing.assert_array_equal(jax.vmap(lambda x: matmul(x, w))(x), y)


def test_who_serves_on_a_gpu(interpreter):
    x, w = product("Q4_0", MOST_ROWS + 1, k=32)
    assert choose_impl((MOST_ROWS, 32), w) == "triton_int8"
    assert choose_impl((1, 32), w.replace(arithmetic="float")) == "triton"
    assert choose_impl(x.shape, w.replace(arithmetic="int8_any_rows")) == "reference_int8"
    with pytest.raises(RealmError, match=r"x \(65, 32\) by Q4_0 weights \(7, 32\): int8 arithmetic takes 1 to 64 rows"):
        matmul(x, w, impl="triton_int8")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "Q8_0" else pytest.mark.slow) for name in FORMATS]
)
@pytest.mark.usefixtures("for_an_h200")
def test_the_kernel_lowers_for_cuda(name):
    x, w = product(name, 1, 16, 512)
    lowered = jax.jit(functools.partial(matmul, impl="triton_int8")).trace(x, w).lower(lowering_platforms=("cuda",))
    assert f"matmul_int8_{name}" in lowered.as_text() and "prepare_int8" in lowered.as_text()


# --- models ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def packed_file(make_model_file) -> Path:
    return make_model_file("small-q4_0.gguf", format="Q4_0")


@pytest.fixture(scope="module")
def small(packed_file):
    return realm.load(packed_file)


def packed(model) -> dict[str, QuantizedTensor]:
    found = jax.tree_util.tree_leaves_with_path(model.params, is_leaf=lambda w: isinstance(w, QuantizedTensor))
    return {jax.tree_util.keystr(path): w for path, w in found if isinstance(w, QuantizedTensor)}


def test_a_model(small, tmp_path):
    model = small.with_arithmetic("int8")
    assert (small.arithmetic, model.arithmetic) == ("float", "int8")
    assert {w.arithmetic for w in packed(model).values()} == {"int8"}  # its embedding is its output matrix too
    apart = small.replace(params=small.params.replace(output=small.params.embedding)).with_arithmetic("int8")
    assert {name for name, w in packed(apart).items() if w.arithmetic == "float"} == {".embedding"}
    assert jax.tree.structure(model.with_arithmetic("float")) == jax.tree.structure(small)
    measured = small.replace(params=for_any_rows(apart.params))
    assert [w.arithmetic for w in packed(measured).values()].count("int8_any_rows") == len(packed(apart)) - 1
    assert measured.arithmetic == "int8"
    with pytest.raises(RequestError, match="arithmetic of 'int4' is not known; take one of float, int8"):
        small.with_arithmetic("int4")
    for name, own in (("a", small), ("b", model)):
        realm.save(own, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_what_is_made_of_a_model_computes_as_it_does(small, packed_file):
    model = small.with_arithmetic("int8")
    assert self_draft(model, "Q8_0", 1).arithmetic == quantize_model(model, "Q8_0").arithmetic == "int8"
    assert arithmetic_of(prepare_draft(model, str(packed_file), 4).draft.params) == "int8"
    merged = packed(realm.merge(model, random_adapter(model, rank=2, targets=("q",))))
    assert {w.arithmetic for w in merged.values()} == {"int8"}
    changed = [name for name, w in packed(small).items() if (w.to_bytes() != merged[name].to_bytes()).any()]
    assert changed == [".layers[0].attn.q", ".layers[1].attn.q"]


# --- command line and cost -------------------------------------------------------------------------------------------


@pytest.fixture
def command(packed_file, tmp_path):
    """A function: name of a command -> its arguments. What it writes goes to `out` in `tmp_path`."""
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "requests.jsonl").write_text('{"prompt": "the", "max_new_tokens": 2}\n')
    file, text, requests, out = (str(tmp_path / name) for name in ("m.gguf", "text.txt", "requests.jsonl", "out"))
    Path(file).symlink_to(packed_file)
    return {
        "generate": ["generate", file, "--prompt", "the", "--max-new-tokens", "2"],
        "perplexity": ["perplexity", file, text, "--context", "24", "--reference", file],
        "bench": ["bench", file, "--prompt-tokens", "3", "--new-tokens", "2", "--repeats", "1"],
        "batch": ["batch", file, requests, "--out", out, "--slots", "1", "--max-len", "16"],
        "logits": ["logits", file, "--tokens", "1,2,3", "--out", out],
    }.__getitem__


@pytest.mark.parametrize("name", ["generate", "perplexity", "bench", "batch", "logits"])
def test_a_bad_name_is_one_line(name, command, capsys):
    assert realm_command([*command(name), "--arithmetic", "int4", "--json"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "arithmetic of 'int4' is not known" in err


@pytest.mark.parametrize(
    "name", ["generate", pytest.param("bench", marks=pytest.mark.slow), pytest.param("batch", marks=pytest.mark.slow)]
)
def test_commands_that_decode(name, command, capsys):
    assert realm_command([*command(name), "--arithmetic", "int8", "--json"]) == 0
    seen = json.loads(capsys.readouterr().out)
    assert (seen["arithmetic"], seen.get("matmul", "reference_int8")) == ("int8", "reference_int8")


def test_realm_perplexity(small, command, capsys):
    assert realm_command([*command("perplexity"), "--arithmetic", "int8", "--json"]) == 0
    seen = json.loads(capsys.readouterr().out)
    own, divergence = evaluate.compare(small.with_arithmetic("int8"), small, TEXT, context=24)
    assert seen["arithmetic"] == "int8" and divergence.kl.mean > 0
    assert (seen["perplexity"], seen["kl_mean"]) == (own.perplexity, divergence.kl.mean)


def test_realm_logits_of_more_tokens_than_few(small, command, tmp_path, capsys):
    tokens = np.random.default_rng(0).integers(0, 261, MOST_ROWS + 20)
    args = [*command("logits"), "--tokens", ",".join(map(str, tokens)), "--arithmetic", "int8", "--json"]
    assert realm_command(args) == 0
    assert json.loads(capsys.readouterr().out)["arithmetic"] == "int8"
    found, floats = np.load(tmp_path / "out"), realm.forward(small, tokens[None])[0]
    np.testing.assert_array_equal(found, realm.forward(small.with_arithmetic("int8"), tokens[None])[0])
    assert 1e-6 < nmse(found, np.asarray(floats, np.float64)) < 1e-2


@pytest.mark.slow
def test_the_experiment_measures_every_format(tmp_path, packed_file, capsys):
    sizes = [
        "text.context=32",
        "text.chunks=2",
        f"subject.model='{packed_file}'",
        "subject.turn=0.0",
        'formats=["Q8_0"]',
    ]
    path = Path(__file__).parents[1] / "configs" / "int8_cost.toml"
    config = load_config(int8_cost.Int8CostConfig, path, sizes)
    run = Run.create(config, "int8_cost", root=tmp_path)
    int8_cost.main(config, run)
    lines = run.metrics()
    assert [line["format"] for line in lines] == ["Q8_0"] and 0 < lines[0]["kl"] < 0.01
    assert "| Q8_0 |" in capsys.readouterr().out
    int8_cost.main(config, run)
    assert run.metrics() == lines
    with pytest.raises(RealmError, match="formats: 'Q9' is not known"):
        load_config(int8_cost.Int8CostConfig, path, ['formats=["Q9"]'])
