"""Random models and the measuring of speed on a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernel_times import kernel_times
from random_model import random_model, random_weight, shape_config
from realm_jax import speed
from realm_jax.quant import QuantizedTensor


@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "Q8_0"])
def test_random_weights_are_those_of_the_cpu(name):
    there = random_weight(jax.random.key(3), name, (64, 1024), 0.03)
    with jax.default_device(jax.devices("cpu")[0]):
        here = random_weight(jax.random.key(3), name, (64, 1024), 0.03)
    for plane, bits in there.planes.items():
        if plane != "d":  # scales are rounded products
            np.testing.assert_array_equal(bits, here.planes[plane])
    again = QuantizedTensor.from_bytes(there.to_bytes(), name, (64, 1024))
    jax.tree.map(np.testing.assert_array_equal, again, there)


def test_a_profile_names_kernels_and_the_ceiling_is_that_of_a_gpu(tmp_path):
    assert speed.read_ceiling() > 3e11
    model = random_model(shape_config("toy"), "Q4_K_M")

    def profiled(call):
        with jax.profiler.trace(str(tmp_path)):
            call()

    timing = speed.time_decode(model, 2, 64, 16, 2, cache_dtype="bfloat16", around=profiled)
    assert timing.median > 0
    found = kernel_times(tmp_path)
    assert sum(one["count"] for one in found) >= 16
    for dtype in ("float32", "bfloat16"):
        assert jnp.isfinite(speed.time_prefill(model, 1, 64, 1, dtype=dtype).median)
