"""`realm merge` as its users meet it: what it writes, shows and refuses."""

import json
import os

import numpy as np
import pytest
from lora_toys import random_adapter
from test_cli_quantize import cli as cli
from test_cli_quantize import error, formats

import realm_jax as realm
from realm_jax import lora
from realm_jax.evaluate import Divergence, score, text_chunks
from realm_jax.gguf.reader import open_gguf
from realm_jax.quantizer import merge


@pytest.fixture(scope="module")
def base(make_model_file):
    return make_model_file("merge-base.gguf", seed=7, format="Q8_0")


@pytest.fixture(scope="module")
def adapter_file(base, tmp_path_factory):
    """The file of an adapter for q and v of the base."""
    path = tmp_path_factory.mktemp("adapters") / "adapter.gguf"
    lora.save_adapter(random_adapter(realm.load(base), targets=("q", "v")), path)
    return path


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("In the beginning there was the word, and the word was thin.\n" * 8, encoding="utf-8")
    return path


def test_one_json_object(cli, base, adapter_file, text_file, tmp_path):
    """The file is that of `merge`, and the report says what `score` says."""
    out, same = tmp_path / "out.gguf", tmp_path / "same.gguf"
    status, shown, err = cli("merge", base, adapter_file, out, "--scale", 0.5, "--text", text_file, "--json")
    assert (status, err) == (0, "")
    seen = json.loads(shown)
    assert (seen["model"], seen["adapter"], seen["out"]) == (str(base), str(adapter_file), str(out))
    assert seen["scale"] == 0.5 and seen["skipped"] == []
    assert [t["name"] for t in seen["tensors"]] == [f"blk.{i}.attn_{n}.weight" for i in (0, 1) for n in "qv"]
    assert all(t["from"] == t["to"] == "Q8_0" and 0 < t["relative_error"] < 1e-4 for t in seen["tensors"])
    model = realm.load(base)
    acting = [(lora.load_adapter(adapter_file, model), 0.5)]
    merged = merge(model, acting)
    realm.save(merged, same)
    assert out.read_bytes() == same.read_bytes() != base.read_bytes()
    report = seen["report"]
    chunks = text_chunks(model, text_file.read_text().removesuffix("\n"), model.config.context_length)
    want = Divergence.of(score(merged, chunks, reference=model, reference_adapter=acting))
    assert report["merged"]["kl_mean"] == pytest.approx(want.kl.mean, rel=1e-3)
    assert report["merged"]["top1_agreement"] == want.top1_agreement.mean
    assert report["text"] == str(text_file) and report["context"] == 96 and report["chunks"] == len(chunks)
    assert report["gain"] == pytest.approx(report["through_f16"]["kl_mean"] - report["merged"]["kl_mean"])
    assert report["no_f16"] is None


def test_other_tensors_are_copied(cli, base, adapter_file, tmp_path):
    out = tmp_path / "out.gguf"
    status, shown, err = cli("merge", base, adapter_file, out, "--format", "f16", "--no-report", "--json")
    assert status == 0, err
    seen = json.loads(shown)
    assert seen["report"] is None and {t["to"] for t in seen["tensors"]} == {"F16"}
    changed = {t["name"] for t in seen["tensors"]}
    assert {name for name, format in formats(out).items() if format == "F16"} == changed
    with open_gguf(base) as before, open_gguf(out) as after:
        for name in before.tensors.keys() - changed:
            np.testing.assert_array_equal(before.raw(name), after.raw(name))


def test_tables(cli, base, adapter_file, tmp_path):
    """Over the model's own samples; in float there is nothing to compare with, and that is said."""
    status, out, err = cli("merge", base, adapter_file, tmp_path / "out.gguf")
    assert status == 0, err
    lines = [line.split() for line in out.splitlines()]
    (row,) = [line for line in lines if line[:1] == ["blk.0.attn_q.weight"]]
    assert row[1:3] == ["Q8_0", "Q8_0"] and 0 < float(row[3]) < 1e-4
    (row,) = [line for line in lines if line[:3] == ["KL", "divergence,", "mean"]]
    assert len(row) == 8 and all(0 <= float(cell) < 1e-2 for cell in row[4:])
    assert "tokens scored in" in err and "4 tensors merged" in err
    status, out, err = cli("merge", base, adapter_file, tmp_path / "out.gguf", "--format", "F32")
    assert status == 0 and "through F16" not in out
    assert "not compared with merging through F16: what the adapter changes is in floating point" in err


def test_misfits_are_left_out_when_asked(cli, base, make_model_file, tmp_path):
    model = realm.load(base)
    layers = [random_adapter(model, targets=("q",)), random_adapter(realm.load(), targets=("v",))]
    path = tmp_path / "adapter.gguf"
    deltas = layers[0].deltas
    wrong = layers[1].deltas.layers[0].attn.v
    first = deltas.layers[0]
    first = first.replace(attn=first.attn.replace(v=wrong))
    adapter = layers[0].replace(deltas=deltas.replace(layers=(first, *deltas.layers[1:])))
    lora.save_adapter(adapter, path)
    assert "blk.0.attn_v.weight" in error(cli("merge", base, path, tmp_path / "out.gguf"))
    assert not (tmp_path / "out.gguf").exists()
    options = ["--skip-misfits", "--no-report", "--json"]
    status, shown, err = cli("merge", base, path, tmp_path / "out.gguf", *options)
    assert status == 0 and "blk.0.attn_v.weight" in err
    seen = json.loads(shown)
    assert len(seen["skipped"]) == 1 and "blk.0.attn_v.weight" in seen["skipped"][0]
    assert {t["name"] for t in seen["tensors"]} == {"blk.0.attn_q.weight", "blk.1.attn_q.weight"}


def test_errors(cli, base, adapter_file, text_file, tmp_path):
    out = tmp_path / "out.gguf"
    (tmp_path / "short.txt").write_text("the word")
    before = sorted(os.listdir(tmp_path))
    for wanted, *args in (
        ("is the file to be merged", base, adapter_file, base),
        ("none.gguf: no such file", tmp_path / "none.gguf", adapter_file, out),
        ("none.gguf", base, tmp_path / "none.gguf", out),
        ("does not exist", base, adapter_file, tmp_path / "none" / "out.gguf"),
        ("is a folder", base, adapter_file, tmp_path),
        ("Q7_K is not a ggml format", base, adapter_file, out, "--format", "Q7_K"),
        ("blk.0.attn_q.weight cannot be merged into Q4_K", base, adapter_file, out, "--format", "Q4_K"),
        ("no encoder for IQ2_S", base, adapter_file, out, "--format", "IQ2_S"),
        ("too large", base, adapter_file, out, "--scale", "1e9"),
        ("its scale is nan", base, adapter_file, out, "--scale", "nan"),
        ("none.txt: cannot be read", base, adapter_file, out, "--text", tmp_path / "none.txt"),
        ("give a longer text", base, adapter_file, out, "--text", tmp_path / "short.txt"),
    ):
        assert wanted in error(cli("merge", *args))
    assert sorted(os.listdir(tmp_path)) == before
    assert "--no-report" in error(cli("merge", base, adapter_file, out, "--text", text_file, "--no-report"), 2)
