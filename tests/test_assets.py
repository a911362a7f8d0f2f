"""The models that come with the package: small enough, sound, and knowing what they should."""

import numpy as np
import pytest

import realm_jax as realm
from realm_jax.model import bundled

FILES = ("tiny.gguf", "tiny-draft.gguf")
ADAPTERS = ("tiny-pirate", "tiny-pirate.gguf")


@pytest.fixture(scope="module")
def models():
    return {file: realm.load(bundled(file)) for file in FILES}


def test_the_assets_together_stay_under_8_megabytes():
    assert sum(path.stat().st_size for path in bundled().parent.rglob("*")) < 8_000_000


def test_the_default_model_is_the_target():
    assert realm.load().origin.source == "tiny.gguf"


@pytest.mark.parametrize("file", FILES)
def test_the_capital_of_france_is_paris(models, file):
    (completion,) = realm.generate(models[file], "The capital of France is", max_new_tokens=8)
    assert completion.text.startswith(" Paris")


def test_facts_come_out_in_a_chat_too(models):
    prompt = "<|im_start|>user\nWhat is the capital of Japan?<|im_end|>\n<|im_start|>assistant\n"
    (completion,) = realm.generate(models["tiny.gguf"], prompt, max_new_tokens=32, parse_special=True)
    assert completion.text == "The capital of Japan is Tokyo." and completion.stop_reason == "eos"


def test_target_and_draft_share_one_vocabulary(models):
    target, draft = (models[file] for file in FILES)
    keys = [key for key in target.origin.fields if key.startswith("tokenizer.")]
    assert "tokenizer.ggml.tokens" in keys and "tokenizer.chat_template" in keys
    for key in keys:
        np.testing.assert_array_equal(target.origin.fields[key].value, draft.origin.fields[key].value)
    assert target.config.vocab_size == draft.config.vocab_size == target.tokenizer.vocab_size


@pytest.mark.parametrize(
    "text", ["The capital of France is Paris.", "17 + 25 = 42\n", "", "  two  spaces", "naïve 日本語 🙂\t\r\n", "don't"]
)
def test_text_survives_the_vocabulary(models, text):
    tokenizer = models["tiny.gguf"].tokenizer
    ids = tokenizer.encode(text)
    assert ids[0] == tokenizer.bos_id == 0
    assert tokenizer.decode(ids) == text


def test_formats_are_mixed_and_every_row_takes_any_format(models):
    for model in models.values():
        layer = model.params.layers[0]
        assert {layer.attn.q.format, layer.attn.v.format, model.params.embedding.format} == {"Q4_K", "Q6_K"}
        config = model.config
        assert config.width % 256 == config.ffn_width % 256 == (config.heads * config.head_width) % 256 == 0


def test_the_files_describe_themselves(models):
    for model in models.values():
        metadata = {key: field.value for key, field in model.origin.fields.items()}
        for key in ("general.name", "general.description", "general.license", "general.file_type"):
            assert metadata[key] not in (None, "")


def test_the_card_has_its_results():
    card = (bundled().parent / "README.md").read_text(encoding="utf-8")
    assert "| capitals right, greedy |" in card
    assert "pirate's, text" in card and "with the adapter" in card


def test_the_adapter_changes_the_manner_and_keeps_the_facts(models):
    model = models["tiny.gguf"]
    adapter = realm.load_adapter(bundled("tiny-pirate"), model)
    prompts = [f"The capital of {country} is" for country in ("France", "Spain", "Poland")]  # two it never saw
    plain, pirate = (realm.generate(model, prompts, max_new_tokens=12, adapter=one) for one in (None, adapter))
    for capital, before, after in zip(("Paris", "Madrid", "Warsaw"), plain, pirate, strict=True):
        assert before.text.startswith(f" {capital}.")
        assert after.text.startswith(f" {capital}, arr!")


def test_the_second_adapter_writes_telegrams(models):
    model = models["tiny.gguf"]
    (completion,) = realm.generate(
        model, "The capital of France is", max_new_tokens=8, adapter=str(bundled("tiny-telegram.gguf"))
    )
    assert completion.text.startswith(" Paris STOP")


def test_both_files_hold_the_same_adapter(models):
    one, other = (realm.load_adapter(bundled(file), models["tiny.gguf"]) for file in ADAPTERS)
    for (path, delta), (_, same) in zip(one.items(), other.items(), strict=True):
        for name in ("a", "b", "scale"):
            np.testing.assert_array_equal(getattr(delta, name), getattr(same, name), err_msg=f"{path} {name}")
