"""What must hold on a GPU as it does on the CPU. Skipped unless REALM_TEST_GPU=1 (see tests/conftest.py)."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lora_toys import random_adapter
from test_model import TOKENS, nmse
from test_quant_encode import ERRORS, SCRIPT, error_of, reference_bytes, samples
from test_quant_formats import assert_same_bits, expected, random_blocks, random_weights

import realm_jax as realm
from realm_jax import lora, quant
from realm_jax.decode.loop import decode, init_state
from realm_jax.decode.settings import Settings
from realm_jax.kernels.matmul import matmul

GOLDEN = Path(__file__).parents[1] / "golden" / "logits"


def test_there_is_a_gpu():
    assert jax.default_backend() == "gpu"


@pytest.mark.parametrize("name", sorted(quant.FORMATS))
def test_dequantize_equals_gguf_bit_for_bit(name):
    raw = random_blocks(name, 64, 3)
    raw[:3] = 0
    want = expected(raw, name)
    assert_same_bits(realm.dequantize(raw, name, want.shape), want)


@pytest.mark.parametrize("name", sorted(quant.FORMATS))
@pytest.mark.parametrize("rows", [1, 5, 64])
def test_matmul_is_float32(name, rows):
    rng = np.random.default_rng(rows)
    w = random_weights(name, 96, 512, seed=rows)
    x = rng.standard_normal((rows, 512)).astype(np.float32)
    exact = x.astype(np.float64) @ np.asarray(w.dequantize(), np.float64).T
    assert nmse(matmul(jnp.array(x), w, impl="reference"), exact) < 1e-12  # kernels: test_matmul_on_gpu.py


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q8_1", "Q8_K"])
@pytest.mark.parametrize("kind", ["normal", "integers", "scaled columns", "small"])
def test_encoders_that_round_give_the_bytes_that_they_give_on_the_cpu(name, kind):
    w = samples()[kind].astype(np.float32)
    np.testing.assert_array_equal(realm.quantize(w, name).to_bytes(), reference_bytes(w, name))


@pytest.mark.parametrize("name", ["Q4_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q6_K", "IQ4_XS"])
def test_encoders_that_search_leave_at_most_ggmls_error(name):
    for kind, w in SCRIPT["draws"]().items():
        error = error_of(w, name, importance=SCRIPT["importance"]())["weighted"]
        assert error < 1.02 * ERRORS[name][kind]["with"]["weighted"], kind


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.gguf")), ids=lambda p: p.stem)
def test_logits_equal_llama_cpp(path):
    logits = realm.forward(realm.load(path), jnp.array([TOKENS], jnp.int32))
    assert nmse(logits[0], np.load(path.with_suffix(".npy"))) < 1e-8


def test_weights_stay_packed_in_the_decode_loop():
    """The scratch memory of the whole loop is far below what one dense copy of the weights would take."""
    model = realm.load()
    dense = 4 * sum(w.size for w in jax.tree.leaves(model.params, is_leaf=lambda w: hasattr(w, "planes")))
    state = init_state(model.config, [[1, 2, 3]], [Settings(max_new_tokens=8)], size=64)
    program = decode.lower(model.params, model.config, state, 8).compile()
    assert program.memory_analysis().temp_size_in_bytes < dense / 3


def test_generate_says_what_it_says_on_the_cpu():
    prompts = ["The capital of France is", "17 + 25 =", "Backwards: K A R Q E ->"]
    texts = [completion.text for completion in realm.generate(realm.load(), prompts, max_new_tokens=6)]
    assert [text.split("\n")[0].split(".")[0].strip() for text in texts] == ["Paris", "42", "E Q R A K"]
    alone = [realm.generate(realm.load(), prompt, max_new_tokens=6)[0].text for prompt in prompts]
    assert texts == alone


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_that_adds_zero_changes_no_bit(dora):
    """XLA would join the products by a weight and by an a, which share x, and add up in another order."""
    model, tokens = realm.load(), jnp.array([TOKENS], jnp.int32)
    zero = lora.init_adapter(model, jax.random.key(0), targets=lora.TARGETS, dora=dora)
    assert_same_bits(realm.forward(model, tokens, adapter=zero), realm.forward(model, tokens))


def test_rows_with_different_adapters_give_what_each_gives_alone():
    model = realm.load()
    adapters = [None, random_adapter(model, 1), random_adapter(model, 2, rank=7, dora=True)]
    tokens = jnp.array([TOKENS[:20]] * 3, jnp.int32)  # together and alone few enough rows for one kernel
    mixed = realm.forward(model, tokens, adapter=lora.stack(adapters[1:], model), adapter_index=[0, 1, 2])
    for row, adapter in zip(mixed, adapters, strict=True):
        assert nmse(row, realm.forward(model, tokens[:1], adapter=adapter)[0]) < 1e-10


def test_merged_into_float_is_the_adapter_applied():
    model, tokens = realm.load(), jnp.array([TOKENS], jnp.int32)
    adapter = random_adapter(model, 3, targets=lora.TARGETS)
    merged = realm.merge(model, adapter, format="F32")
    assert nmse(realm.forward(merged, tokens), realm.forward(model, tokens, adapter=adapter)) < 1e-10
