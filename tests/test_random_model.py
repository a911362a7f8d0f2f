"""Random packed models: valid blocks in every format, sizes that stay ordinary, the same in memory and in a file."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner

import random_model
import realm_jax as realm
from random_model import SHAPES, model_formats, model_specs, random_weight, shape_config, write_model
from realm_jax.errors import RealmError
from realm_jax.model.transformer import run, unembed
from realm_jax.quant import FORMATS, QuantizedTensor, check_finite

CHEAP = ("Q4_K", "IQ1_M")
every_format = [name if name in CHEAP else pytest.param(name, marks=pytest.mark.slow) for name in FORMATS]


@pytest.mark.parametrize("name", every_format)
def test_blocks_of_every_format_are_whole_finite_and_of_the_size_asked_for(name):
    weight = random_weight(jax.random.key(3), name, (8, 1024), 0.03)
    raw = weight.to_bytes()
    again = QuantizedTensor.from_bytes(raw, name, (8, 1024))
    jax.tree.map(np.testing.assert_array_equal, again, weight)
    assert check_finite(raw, name) is None
    values = np.asarray(weight.dequantize())
    assert np.isfinite(values).all()
    size = np.sqrt((values**2).mean())
    assert 0.4 < size / 0.03 < 2.5  # the scales of FP4 and IQ1_M are coarse
    assert abs(values.mean()) < 0.2 * size
    assert len(np.unique(raw)) > 100  # random bits, not a pattern


def test_formats_are_llama_cpps():
    formats = model_formats(SHAPES["llama-8b"], "Q4_K_M")
    six = [i for i in range(32) if formats[f"blk.{i}.ffn_down.weight"] == "Q6_K"]
    assert six == [i for i in range(32) if formats[f"blk.{i}.attn_v.weight"] == "Q6_K"]
    assert len(six) == 16 and formats["output.weight"] == "Q6_K" and formats["token_embd.weight"] == "Q4_K"
    bytes_ = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(model_specs(SHAPES["llama-8b"], "Q4_K_M")))
    assert 4.9e9 < bytes_ < 5.1e9


def test_a_model_in_memory_is_the_one_in_the_file_and_its_activations_stay_of_ordinary_size(tmp_path):
    config = dataclasses.replace(shape_config("toy"), ffn_width=256, kv_heads=4)  # few shapes
    model = random_model.random_model(config, "Q4_K_M", seed=5)
    write_model(tmp_path / "toy.gguf", config, "Q4_K_M", seed=5)
    loaded = realm.load(tmp_path / "toy.gguf")
    assert dataclasses.replace(loaded.config, norm_eps=config.norm_eps, rope=config.rope) == config
    assert loaded.config.rope.base == config.rope.base
    jax.tree.map(np.testing.assert_array_equal, loaded.params, model.params)
    specs = model_specs(config, "Q4_K_M").params
    assert jax.tree.structure(specs) == jax.tree.structure(model.params)
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(specs)] == [
        (x.shape, x.dtype) for x in jax.tree.leaves(model.params)
    ]
    hidden_BTD, _ = jax.jit(run, static_argnums=1)(model.params, config, jnp.arange(12)[None])
    logits = np.asarray(unembed(model.params, config, hidden_BTD))
    assert np.isfinite(logits).all() and 0.2 < logits.std() < 5
    assert loaded.tokenizer.decode(loaded.tokenizer.encode("the end")[1:]) == "the end"


def test_what_cannot_be_made_is_said_in_one_line(tmp_path):
    with pytest.raises(RealmError, match="shape 'llama-9b' is not known; known: llama-8b"):
        shape_config("llama-9b")
    out = str(tmp_path / "x.gguf")
    result = CliRunner().invoke(random_model.command, [out, "--shape", "toy", "--mix", "Q9_K"])
    assert result.exit_code == 1 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
