"""--adapter and --draft on the command line: they reach the model, say what they did, and fail in one line."""

import json

import numpy as np
import pytest
from lora_toys import random_adapter

import realm_jax as realm
from realm_jax import lora
from realm_jax.cli.adapters import parse_adapter
from realm_jax.cli.main import run

PROMPT = "the thin"


@pytest.fixture
def cli(capsys):
    def call(*args):
        status = run([str(arg) for arg in args])
        out, err = capsys.readouterr()
        return status, out, err

    return call


@pytest.fixture(scope="module")
def model(model_file):
    return realm.load(model_file)


@pytest.fixture(scope="module")
def files(model, tmp_path_factory):
    """Two adapters, one of each kind of file."""
    folder = tmp_path_factory.mktemp("adapters")
    lora.save_adapter(random_adapter(model, 1, size=0.3), folder / "peft")
    lora.save_adapter(random_adapter(model, 2, size=0.3), folder / "other.gguf")
    return folder


def error(result) -> str:
    status, out, err = result
    assert status == 1 and out == "" and err.startswith("error: ") and err.count("\n") == 1, result
    return err


def test_a_path_may_have_a_scale(tmp_path):
    (tmp_path / "v1:2").mkdir()
    for text, wanted in {
        "a/b": ("a/b", 1.0), "a/b:0.5": ("a/b", 0.5), "a.gguf:-2": ("a.gguf", -2.0), "c:/x": ("c:/x", 1.0),
        f"{tmp_path}/v1:2": (f"{tmp_path}/v1:2", 1.0), f"{tmp_path}/v1:2:3": (f"{tmp_path}/v1:2", 3.0),
    }.items():  # fmt: skip
        path, scale = parse_adapter(text)
        assert (str(path), scale) == wanted


@pytest.mark.parametrize("scale", [0.5, 1.0])
@pytest.mark.parametrize("name", ["peft", "other.gguf"])
def test_logits_with_an_adapter(cli, model, model_file, files, tmp_path, name, scale):
    out = tmp_path / "out.npy"
    suffix = "" if scale == 1 else f":{scale}"
    done = cli("logits", model_file, "--tokens", "5,9,200", "--out", out, "--adapter", f"{files / name}{suffix}")
    assert done[0] == 0, done
    adapter = realm.load_adapter(files / name)
    want = realm.forward(model, np.array([[5, 9, 200]]), adapter=[(adapter, scale)])[0]
    np.testing.assert_array_equal(np.load(out), want)
    assert np.abs(want - realm.forward(model, np.array([[5, 9, 200]]))[0]).max() > 0.1


def test_generate_with_two_adapters_says_so(cli, model, model_file, files):
    named = ["--adapter", files / "peft", "--adapter", f"{files / 'other.gguf'}:0.5"]
    status, out, _ = cli("generate", model_file, "--prompt", PROMPT, "--max-new-tokens", 6, *named, "--json")
    seen = json.loads(out)
    acting = [files / "peft", (files / "other.gguf", 0.5)]
    [want] = realm.generate(model, PROMPT, max_new_tokens=6, adapter=acting)
    assert status == 0 and seen["tokens"] == want.tokens
    assert [entry["scale"] for entry in seen["adapters"]] == [1.0, 0.5]
    status, out, err = cli("generate", model_file, "--prompt", PROMPT, "--max-new-tokens", 6, *named)
    assert status == 0 and out == seen["text"] + "\n" and "other.gguf (scale 0.5)" in err


def test_perplexity_with_an_adapter_is_measured_against_the_bare_model(cli, model_file, files, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the thin thing in the thicket " * 30)
    args = ["perplexity", model_file, text, "--context", 32, "--reference", model_file, "--json"]
    bare, changed = (json.loads(cli(*args, *more)[1]) for more in ([], ["--adapter", files / "peft"]))
    assert bare["kl_mean"] == pytest.approx(0, abs=1e-7) and changed["kl_mean"] > 1e-3
    assert changed["reference_perplexity"] == bare["perplexity"]


def test_adapters_that_do_not_fit(cli, model_file, files, make_model_file, tmp_path):
    assert "no-such" in error(cli("generate", model_file, "--prompt", PROMPT, "--adapter", tmp_path / "no-such"))
    wide = random_adapter(realm.load(), 1, targets=("q",))
    lora.save_adapter(wide, tmp_path / "wide.gguf")
    args = ["logits", model_file, "--tokens", 1, "--out", tmp_path / "out.npy", "--adapter", tmp_path / "wide.gguf"]
    assert "tensor blk.0.attn_q.weight" in error(cli(*args))
    status, _, err = cli(*args, "--skip-misfits")
    assert status == 0 and err.count("left out: tensor blk.") == 6 and (tmp_path / "out.npy").exists()
    status, _, err = cli("generate", model_file, "--prompt", PROMPT, "--adapter", f"{files / 'peft'}:nan")
    assert status == 2 and "must be a finite number" in err


def test_generate_with_a_draft(cli, model, model_file):
    args = ["generate", model_file, "--prompt", PROMPT, "--max-new-tokens", 12]
    [plain] = realm.generate(model, PROMPT, max_new_tokens=12)
    for draft in ("ngram", "self:Q8_0", model_file):
        status, out, err = cli(*args, "--draft", draft, "--draft-tokens", 3, "--json")
        seen = json.loads(out)
        ahead = seen["speculative"]
        assert status == 0 and seen["tokens"] == plain.tokens
        assert ahead["rounds"] + ahead["forwards_saved"] == 12 and len(ahead["by_position"]) == 3
        assert ahead["mean_accepted"] == ahead["accepted"] / ahead["rounds"] and ahead["accepted"] <= ahead["drafted"]
    status, out, err = cli(*args, "--draft", model_file, "--draft-tokens", 3)
    assert status == 0 and out == plain.text + "\n" and "draft tokens accepted" in err


def test_drafts_that_cannot_serve(cli, model_file, make_model_file):
    args = ["generate", model_file, "--prompt", PROMPT]
    assert "draft_tokens is 0; it must be a whole number from 1" in error(
        cli(*args, "--draft", "ngram", "--draft-tokens", 0)
    )
    assert "'nix' is no file; give a GGUF file, ngram, or self:FORMAT" in error(cli(*args, "--draft", "nix"))
    bundled = realm.model.bundled("tiny-draft.gguf")
    assert "the draft has 1024 tokens and the model 261" in error(cli(*args, "--draft", bundled))


def test_adapters_on_target_and_draft(cli, model_file, files):
    args = ["generate", model_file, "--prompt", PROMPT, "--max-new-tokens", 9, "--json"]
    bare = json.loads(cli(*args)[1])
    args += ["--adapter", files / "peft"]
    plain = json.loads(cli(*args)[1])
    both = json.loads(cli(*args, "--draft", model_file, "--draft-adapter", files / "peft")[1])
    assert both["tokens"] == plain["tokens"] != bare["tokens"]
    assert both["speculative"]["accepted"] == both["speculative"]["drafted"] > 0  # draft and target are one
