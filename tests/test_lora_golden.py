"""Adapters of random weights against peft and llama.cpp: the same base, the same logits. See golden/make_lora.py."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import realm_jax as realm
from realm_jax.lora import fit

GOLDEN = Path(__file__).parent / "golden" / "lora"
TOKENS = jnp.asarray([np.random.default_rng(7).integers(0, 64, 12)], jnp.int32)  # as in golden/make_lora.py
FOLDERS = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())
GGUFS = sorted(path.name for path in GOLDEN.glob("*.gguf") if not path.name.startswith("base_"))


def nmse(ours, theirs) -> float:
    return float(np.sum((np.asarray(ours, np.float64) - theirs) ** 2) / np.sum(np.asarray(theirs, np.float64) ** 2))


def base_of(case: str) -> realm.Model:
    name = "llama_quantized" if case.startswith("llama_quantized") else case.partition("_")[0]
    return realm.load(GOLDEN / f"base_{name}.gguf")


def error(model, adapter, case: str, scale: float) -> float:
    logits = realm.forward(model, TOKENS, adapter=[(adapter, scale)])
    return nmse(logits[0], np.load(GOLDEN / f"{case}@{scale}.npy"))


def test_there_is_a_golden_case_of_every_kind():
    assert set(FOLDERS) == {
        "llama_dora", "llama_patterns", "llama_plain", "llama_quantized", "llama_rslora", "qwen2_dora", "qwen2_plain",
    }  # fmt: skip
    assert set(GGUFS) == {"llama_plain.gguf", "llama_quantized.gguf", "qwen2_plain.gguf"}


@pytest.mark.parametrize("scale", [0.5, 1.0])
@pytest.mark.parametrize("case", [*FOLDERS, *GGUFS])
def test_logits_equal_those_of_peft_and_llama_cpp(case, scale):
    """float32 on both sides; the quantized base stands against the same numbers in F32."""
    assert error(base_of(case), realm.load_adapter(GOLDEN / case), case, scale) < 1e-9


@pytest.mark.parametrize("case", ["llama_plain", "llama_plain.gguf", "llama_dora"])
def test_forgetting_the_order_of_rows_shows(case):
    adapter = realm.load_adapter(GOLDEN / case)
    wrong = adapter.replace(row_order={"hf": "ggml", "ggml": "hf"}[adapter.row_order])
    assert error(base_of(case), wrong, case, 1.0) > 1e-2


@pytest.mark.parametrize("case", [*FOLDERS, *GGUFS])
def test_saved_adapters_give_the_same_logits(case, tmp_path):
    """Through a file of each kind, and from that into one of the other."""
    model = base_of(case)
    adapter = realm.load_adapter(GOLDEN / case)
    names = ["peft"] if "dora" in case else ["peft", "adapter.gguf"]
    for name in names:
        realm.save_adapter(adapter, tmp_path / name, base=model)
        again = realm.load_adapter(tmp_path / name)
        assert error(model, again, case, 0.5) < 1e-9
        for other in names:
            realm.save_adapter(again, tmp_path / f"again_{other}")  # the first file says what the base is
            assert error(model, realm.load_adapter(tmp_path / f"again_{other}"), case, 0.5) < 1e-9


@pytest.mark.parametrize("case", ["llama_plain", "llama_quantized", "qwen2_plain"])
def test_our_gguf_equals_that_of_llama_cpp(case, tmp_path):
    """Number for number what convert_lora_to_gguf.py makes of the same directory."""
    model = base_of(case)
    realm.save_adapter(realm.load_adapter(GOLDEN / case), tmp_path / "ours.gguf", base=model)
    ours, theirs = realm.load_adapter(tmp_path / "ours.gguf"), realm.load_adapter(GOLDEN / f"{case}.gguf")
    assert [path for path, _ in ours.items()] == [path for path, _ in theirs.items()]
    for (_, mine), (_, other) in zip(ours.items(), theirs.items(), strict=True):
        for name in ("a", "b", "scale"):
            np.testing.assert_array_equal(getattr(mine, name), getattr(other, name))


def test_fitted_adapters_of_both_kinds_are_the_same():
    model = base_of("llama")
    peft, gguf = (fit(realm.load_adapter(GOLDEN / name), model) for name in ("llama_plain", "llama_plain.gguf"))
    for (path, mine), (other, theirs) in zip(peft.items(), gguf.items(), strict=True):
        assert path == other
        np.testing.assert_array_equal(mine.a, theirs.a)
        np.testing.assert_array_equal(mine.b, theirs.b)
