"""Models quantized in memory: the same weights as `quantize`, the same formats as a file would get."""

import jax
import numpy as np
import pytest

import realm_jax as realm
from realm_jax.errors import RealmError
from realm_jax.quant import QuantizedTensor, quantize
from realm_jax.quantizer.models import formats_of_model, quantize_model


@pytest.fixture(scope="module")
def model():
    return realm.load()  # the bundled one: Q4_K and Q6_K, rows of 256


def formats(model) -> dict[str, str]:
    return {n: f for n, f in formats_of_model(model, "COPY").items() if "norm" not in n}


def test_single_tensors(model):
    ours = quantize_model(model, {"blk.1.ffn_up.weight": "Q8_0", "blk.0.attn_q.weight": "F16"})
    wanted = quantize(model.params.layers[1].ffn.up, "Q8_0")
    np.testing.assert_array_equal(ours.params.layers[1].ffn.up.to_bytes(), wanted.to_bytes())
    assert ours.params.layers[0].attn.q.dtype == np.float16
    assert ours.params.layers[1].attn.q is model.params.layers[1].attn.q
    assert ours.origin is model.origin


def test_a_mix_gives_what_it_gives_to_a_file(model):
    ours = quantize_model(model, "q2_k")
    assert formats(ours) == {n: f for n, f in formats_of_model(model, "Q2_K").items() if "norm" not in n}
    assert set(formats(ours).values()) == {"Q2_K", "Q3_K", "Q6_K"}
    assert ours.origin.fields["general.file_type"].value == 10


def test_one_format_for_all(model):
    assert set(formats(quantize_model(model, "Q3_K")).values()) == {"Q3_K"}


def test_weights_in_their_format_are_left_alone(model):
    ours = quantize_model(model, formats(model))
    assert all(a is b for a, b in zip(jax.tree.leaves(ours.params), jax.tree.leaves(model.params), strict=True))


def test_a_quantized_model_can_be_saved(model, tmp_path):
    ours = quantize_model(model, "Q4_0")
    realm.save(ours, tmp_path / "q4_0.gguf")
    again = realm.load(tmp_path / "q4_0.gguf")
    assert formats(again) == formats(ours)
    assert isinstance(again.params.layers[0].attn.q, QuantizedTensor)


def test_errors_name_the_tensor(model):
    with pytest.raises(RealmError, match=r"tiny\.gguf: has no tensor 'blk\.0\.attn_x\.weight'"):
        quantize_model(model, {"blk.0.attn_x.weight": "Q8_0"})
    with pytest.raises(RealmError, match=r"tiny\.gguf: tensor blk\.0\.attn_q\.weight: .*nonsense"):
        quantize_model(model, {"blk.0.attn_q.weight": "nonsense"})
    with pytest.raises(RealmError, match=r"'nonsense' is not a format that a file can be quantized to"):
        quantize_model(model, "nonsense")
