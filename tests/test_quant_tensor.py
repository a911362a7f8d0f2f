"""QuantizedTensor as a JAX value: bytes in and out, rows by index, and jit, vmap, scan, sharding over it."""

import os
import subprocess
import sys
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_quant_formats import random_weights as packed

from realm_jax.errors import RealmError
from realm_jax.quant import (
    DENSE_FORMATS,
    FORMATS,
    QuantizedTensor,
    dequantize,
    load_weight,
    raw_bytes,
    row_bytes,
)

every_format = pytest.mark.parametrize("name", FORMATS)
QUICK = ("Q4_0", "Q8_0", "Q3_K", "Q4_K", "IQ2_XXS", "IQ1_S", "IQ4_XS", "TQ1_0", "MXFP4")
one_of_each_kind = pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FORMATS]
)


def stack(tensors: list[QuantizedTensor]) -> QuantizedTensor:
    return jax.tree.map(lambda *planes: jnp.stack(planes), *tensors)


@every_format
@pytest.mark.parametrize("shape", [(256,), (3, 256), (1, 512), (2, 3, 512), (2, 1, 5, 256)])
def test_bytes_and_shapes(name, shape):
    kind = FORMATS[name]
    rows = (*shape[:-1], shape[-1] // kind.block_size * kind.block_bytes)
    raw = np.random.default_rng(0).integers(0, 256, rows, dtype=np.uint8)
    w = QuantizedTensor.from_bytes(raw, name, shape)
    assert (w.shape, w.ndim, w.size, w.dequantize().shape) == (shape, len(shape), np.prod(shape), shape)
    assert abs(w.nbytes / raw.nbytes - 1) < 0.05
    np.testing.assert_array_equal(w.to_bytes(), raw)
    same = QuantizedTensor.from_bytes(raw.reshape(-1), name, shape)
    np.testing.assert_array_equal(same.to_bytes(), raw)
    assert all(plane.shape[: len(shape) - 1] == shape[:-1] for plane in w.planes.values())


def test_wrong_bytes_are_refused():
    raw = np.zeros((4, 144), np.uint8)
    with pytest.raises(RealmError, match=r"Q4_K weights of shape \(5, 256\) are 720 bytes .*not 576"):
        QuantizedTensor.from_bytes(raw, "Q4_K", (5, 256))
    with pytest.raises(RealmError, match="not 576 of int8"):
        load_weight(raw.view(np.int8), "Q4_K", (4, 256))
    with pytest.raises(RealmError, match="multiple of 256"):
        load_weight(raw, "Q4_K", (4, 255))
    with pytest.raises(RealmError, match="F16 weights of shape"):
        load_weight(raw, "F16", (4, 256))


@pytest.mark.parametrize("name", [*DENSE_FORMATS, *FORMATS])
def test_load_weight_and_raw_bytes_are_inverse(name):
    size, count = (1, DENSE_FORMATS[name].itemsize) if name in DENSE_FORMATS else (256, 0)
    row = 512 * count or 512 // FORMATS[name].block_size * FORMATS[name].block_bytes
    raw = np.random.default_rng(0).integers(0, 256, (6, row), dtype=np.uint8)
    weight = load_weight(raw, name, (6, 512))
    before = raw.copy()
    raw[:] = 0  # the weight keeps nothing of the caller's memory
    assert isinstance(weight, QuantizedTensor if size > 1 else jax.Array)
    format, out = raw_bytes(weight)
    assert format == name
    np.testing.assert_array_equal(out, before)


def test_an_array_of_another_dtype_has_no_bytes():
    with pytest.raises(RealmError, match="int32 has no ggml format"):
        raw_bytes(jnp.zeros((2, 2), jnp.int32))


def test_loading_on_cpu_copies_once():
    """Planes live in the aligned memory that they were split into."""
    planes = FORMATS["Q4_K"].split(np.zeros((64, 144), np.uint8))
    for plane in planes.values():
        assert jax.device_put(plane).unsafe_buffer_pointer() == plane.ctypes.data


@pytest.mark.parametrize("name", ["F32", *FORMATS])
def test_loading_needs_the_memory_of_one_tensor(name):
    size = row_bytes(name, 4096) * 2048
    raw = np.zeros(size, np.uint8)
    tracemalloc.start()
    weight = load_weight(raw, name, (2048, 4096))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.1 * size
    assert weight.shape == (2048, 4096)


def test_donating_a_loaded_weight_leaves_others_alone():
    raw = np.zeros((64, 4 * 256), np.uint8)
    first, second = (load_weight(raw, "F32", (64, 256)) for _ in range(2))
    out = jax.jit(lambda w: w + 1, donate_argnums=0)(first)
    assert float(out.sum()) == 64 * 256
    assert float(second.sum()) == 0 and not raw.any()


def test_repr_and_scales():
    w = packed("Q4_K", 512, 512)
    assert repr(w) == "QuantizedTensor(Q4_K, (512, 512), 151.6 kB)"
    assert repr(packed("Q8_0", 4, 32)) == "QuantizedTensor(Q8_0, (4, 32), 0.1 kB)"
    assert "None" in repr(jax.tree.map(lambda _: None, w))
    scales = w.block_scales()
    assert {name: plane.shape for name, plane in scales.items()} == {"d": (512, 2), "dmin": (512, 2)}
    codes, scale, offset = w.decode()
    assert codes.shape == (512, 2, 8, 32) and codes.min() == 0 and codes.max() == 15
    np.testing.assert_array_equal((scale[..., None] * codes + offset[..., None]).reshape(w.shape), w.dequantize())


@every_format
def test_take_is_dequantize_then_index(name):
    w = packed(name, 7, 256)
    rows = w.dequantize()
    ids = jnp.array([[0, 6, 3], [3, 3, 1]])
    np.testing.assert_array_equal(w.take(ids), rows[ids])
    beyond = jnp.array([[-4, 99, 5], [7, -1, 2]])
    np.testing.assert_array_equal(w.take(beyond), rows[jnp.array([[0, 6, 5], [6, 0, 2]])])


@one_of_each_kind
def test_take_of_any_shape_in_jit_and_vmap(name):
    w = packed(name, 7, 256)
    rows = w.dequantize()
    ids = jnp.array([[0, 6, 3], [3, 3, 1]])
    np.testing.assert_array_equal(jax.jit(QuantizedTensor.take)(w, ids), rows[ids])
    np.testing.assert_array_equal(w.take(jnp.array(5)), rows[5])
    assert w.take(jnp.zeros(0, int)).shape == (0, 256)
    stacked = stack([w, w])
    np.testing.assert_array_equal(jax.vmap(lambda w, i: w.take(i))(stacked, ids), rows[ids])
    with pytest.raises(RealmError, match=r"take wants a tensor \(N, K\)"):
        stacked.take(ids)


@every_format
def test_dequantize_casts(name):
    w = packed(name, 2, 256)
    assert w.dequantize(jnp.bfloat16).dtype == jnp.bfloat16
    np.testing.assert_array_equal(w.dequantize(jnp.bfloat16), w.dequantize().astype(jnp.bfloat16))


@one_of_each_kind
def test_is_an_ordinary_pytree(name):
    """jit, vmap, scan, tree.map over leading axes, and gradients of other things beside it."""
    layers = [packed(name, 3, 256, seed=i) for i in range(4)]
    stacked = stack(layers)
    assert stacked.shape == (4, 3, 256)
    dense = jnp.stack([w.dequantize() for w in layers])
    np.testing.assert_array_equal(stacked.dequantize(), dense)
    np.testing.assert_array_equal(jax.vmap(lambda w: w.dequantize())(stacked), dense)
    _, scanned = jax.lax.scan(lambda carry, w: (carry, w.take(jnp.array([w.shape[0] - 1]))), 0, stacked)
    np.testing.assert_array_equal(scanned[:, 0], dense[:, -1])
    third = jax.tree.map(lambda plane: plane[2], stacked)
    assert third.shape == (3, 256) and third.format == name
    np.testing.assert_array_equal(third.to_bytes(), layers[2].to_bytes())
    closed = jax.jit(lambda x: x @ layers[0].dequantize().T)
    assert closed(jnp.ones((2, 256))).shape == (2, 3)
    spec = jax.eval_shape(lambda w: w, stacked)
    assert spec.shape == (4, 3, 256)


def test_is_frozen():
    w = packed("Q8_0", 1, 32)
    with pytest.raises(AttributeError):
        w.format = "Q4_0"


def test_dequantize_refuses_what_it_does_not_know():
    with pytest.raises(RealmError, match="Q1_0 is a ggml format that is not supported"):
        dequantize(np.zeros(18, np.uint8), "Q1_0", (1, 128))


SHARDED = """
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from realm_jax.kernels import matmul
from realm_jax.quant import quantize
mesh = Mesh(np.array(jax.devices()), ("n",))
w_NK = np.random.default_rng(0).standard_normal((8, 256)).astype(np.float32)
x = np.random.default_rng(1).standard_normal((3, 256)).astype(np.float32)
for name in ('Q5_1', 'Q8_0', 'Q3_K', 'Q4_K', 'Q6_K', 'IQ4_XS', 'NVFP4'):
    whole = quantize(w_NK, name)
    parts = jax.device_put(whole, NamedSharding(mesh, PartitionSpec("n")))
    for plane in parts.planes.values():
        assert plane.addressable_shards[0].data.shape[0] == 2, name
    weights = parts.dequantize()
    assert weights.sharding.spec == PartitionSpec("n"), (name, weights.sharding)
    np.testing.assert_array_equal(weights, whole.dequantize())
    y = jax.jit(matmul)(x, parts)
    assert y.sharding.spec == PartitionSpec(None, "n"), (name, y.sharding)
    np.testing.assert_allclose(y, matmul(x, whole), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(parts.to_bytes(), whole.to_bytes())
print("sharded", len(jax.devices()))
"""


def test_planes_shard_over_output_features():
    """In a process of its own, which sees four CPU devices."""
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", SHARDED], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "sharded 4"
