"""`realm quantize` as its users meet it: what it writes, shows and refuses, and what an interrupt leaves behind."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import realm_jax as realm
from realm_jax.cli.main import run
from realm_jax.gguf.reader import open_gguf
from realm_jax.gguf.types import field
from realm_jax.gguf.writer import write_gguf
from realm_jax.model import bundled
from realm_jax.quantizer import calibrate, read_imatrix, write_imatrix
from realm_jax.quantizer.mixes import FILE_TYPES, UNIFORM, choose_formats

REALM = [sys.executable, "-m", "realm_jax.cli"]
CONTEXT = 48


@pytest.fixture
def cli(capsys):
    """A function (*args) -> (status, stdout, stderr)."""

    def call(*args: object) -> tuple[int, str, str]:
        return (run([str(arg) for arg in args]), *capsys.readouterr())

    return call


def error(result: tuple[int, str, str], status: int = 1) -> str:
    """The one line on stderr of a command that failed with that status."""
    assert result[:2] == (status, ""), result
    assert result[2].startswith("error: ") and result[2].count("\n") == 1
    return result[2]


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("In the beginning there was the word, and the word was thin.\n" * 8, encoding="utf-8")
    return path


def formats(path) -> dict[str, str]:
    with open_gguf(path) as file:
        return {name: info.format for name, info in file.tensors.items()}


def test_help_names_every_mix_and_format(cli):
    status, out, err = cli("quantize", "--help")
    words = set(out.replace(",", " ").replace(":", " ").split())
    assert (status, err) == (0, "")
    assert {*FILE_TYPES, *UNIFORM, "COPY"} <= words


def test_one_json_object(cli, tmp_path):
    """The bundled model, Q4_K and Q6_K, with a rule of one's own."""
    out = tmp_path / "out.gguf"
    keep = ["--keep", "blk.[01].*=q8_0", "--keep", "token_embd.weight=COPY"]
    status, shown, err = cli("quantize", bundled(), out, "--format", "q4_0", *keep, "--json")
    assert status == 0, err
    seen = json.loads(shown)
    with open_gguf(bundled()) as file:
        tensors = {name: (info.format, info.shape) for name, info in file.tensors.items()}
        rules = [("blk.[01].*", "Q8_0"), ("token_embd.weight", "COPY")]
        wanted = choose_formats("Q4_0", file.metadata, tensors, keep=rules)
    assert formats(out) == wanted == {t["name"]: t["to"] for t in seen["tensors"]}
    assert {name: format for name, (format, _) in tensors.items()} == {t["name"]: t["from"] for t in seen["tensors"]}
    assert (seen["source"], seen["target"], seen["format"]) == (str(bundled()), str(out), "Q4_0")
    assert seen["imatrix"] is None
    total = sum(t["bytes"] for t in seen["tensors"])
    assert seen["bytes"] == total == sum(group["bytes"] for group in seen["formats"].values())
    assert seen["bits_per_weight"] == pytest.approx(8 * total / seen["weights"])
    assert seen["formats"]["Q4_0"]["bits_per_weight"] == 4.5
    assert 0 < seen["formats"]["Q8_0"]["relative_error"] < 1e-4 < seen["formats"]["Q4_0"]["relative_error"] < 2e-2
    copied = next(t for t in seen["tensors"] if t["name"] == "token_embd.weight")
    assert copied["relative_error"] is None
    assert err.startswith("warning: ") and err.count("\n") == 1 and "quantized already" in err
    assert err == f"warning: {seen['warnings'][0]}\n"
    (completion,) = realm.generate(realm.load(out), "The capital of France is", max_new_tokens=4)
    assert completion.text.startswith(" Paris")


def test_tables(cli, model_file, tmp_path):
    status, out, err = cli("quantize", model_file, tmp_path / "out.gguf", "--format", "Q4_K")
    assert status == 0
    lines = [line.split() for line in out.splitlines()]
    (row,) = [line for line in lines if line[:1] == ["blk.0.attn_q.weight"]]
    assert row[1:7] == ["F32", "Q5_0", "(not", "Q4_K)", "5.5", row[6]] and 0 < float(row[6]) < 1e-2
    (row,) = [line for line in lines if line[:1] == ["all"]]
    assert row[1] == str(len(formats(model_file)))
    assert "warning: 15 tensors have rows that are not whole blocks: 15 Q5_0 for Q4_K" in err
    assert err.splitlines()[-1].startswith(str(tmp_path / "out.gguf"))


def test_pure(cli, model_file, tmp_path):
    mix, pure = tmp_path / "mix.gguf", tmp_path / "pure.gguf"
    assert cli("quantize", model_file, mix, "--format", "Q4_0")[0] == 0
    assert cli("quantize", model_file, pure, "--format", "Q4_0", "--pure")[0] == 0
    assert set(formats(mix).values()) == {"Q4_0", "Q8_0", "F32"}
    assert set(formats(pure).values()) == {"Q4_0", "F32"}


def test_calibration(cli, model_file, text_file, tmp_path):
    """What is measured is what `calibrate` measures, is kept as a file, and that file does the same again."""
    saved, out, again = (tmp_path / name for name in ("imatrix.gguf", "out.gguf", "again.gguf"))
    options = ["--calibrate", text_file, "--context", CONTEXT, "--save-imatrix", saved, "--json"]
    status, shown, err = cli("quantize", model_file, out, "--format", "Q4_0", *options)
    assert status == 0, err
    seen, kept = json.loads(shown), read_imatrix(saved)
    wanted = calibrate(realm.load(model_file), text_file.read_text(encoding="utf-8"), context=CONTEXT)
    assert kept.values.keys() == wanted.values.keys()
    for name, values in wanted.values.items():
        np.testing.assert_allclose(kept.values[name], values, rtol=1e-6)
    about = {"file": str(saved), "entries": 14, "chunks": wanted.chunks, "chunk_size": CONTEXT}
    assert seen["imatrix"] == about | {"datasets": [str(text_file)]}
    assert 0 < seen["weighted_error"] < 2e-2
    weighted = {t["name"] for t in seen["tensors"] if t["weighted_error"] is not None}
    assert weighted == wanted.values.keys()
    assert "1 tensors have no entry in the importance matrix: token_embd.weight" in err
    assert cli("quantize", model_file, again, "--format", "Q4_0", "--imatrix", saved)[0] == 0
    assert again.read_bytes() == out.read_bytes()


def test_the_output_matrix_only_when_asked(cli, model_file, text_file, tmp_path):
    saved = tmp_path / "imatrix.gguf"
    options = ["--calibrate", text_file, "--context", CONTEXT, "--save-imatrix", saved, "--process-output"]
    assert cli("quantize", model_file, tmp_path / "out.gguf", "--format", "Q8_0", *options)[0] == 0
    assert "token_embd.weight" in read_imatrix(saved).values


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["--format"],
        ["--format", "Q8_0", "--keep", "attn_q"],
        ["--format", "Q8_0", "--keep", "=Q8_0"],
        ["--format", "Q8_0", "--keep", "attn_q="],
        ["--format", "Q8_0", "--imatrix", "a", "--calibrate", "b"],
        ["--format", "Q8_0", "--context", "64"],
        ["--format", "Q8_0", "--save-imatrix", "a"],
        ["--format", "Q8_0", "--process-output", "--imatrix", "a"],
        ["--format", "Q8_0", "--calibrate", "b", "--context", "2"],
    ],
    ids=" ".join,
)
def test_wrong_usage(cli, args):
    assert "--help" in error(cli("quantize", "in.gguf", "out.gguf", *args), 2)


def test_errors(cli, model_file, text_file, tmp_path):
    out = tmp_path / "out.gguf"
    broken = tmp_path / "broken.dat"
    broken.write_bytes(b"nonsense" * 9)
    write_imatrix(tmp_path / "other.gguf", calibrate(realm.load(), "The capital of France is Paris. " * 9, context=16))
    before = sorted(os.listdir(tmp_path))
    for wanted, *args in (
        ("'Q7_K' is not a format", model_file, out, "--format", "Q7_K"),
        ("'Q9' is not a format for tensors 'blk.*'", model_file, out, "--format", "Q8_0", "--keep", "blk.*=Q9"),
        ("no tensor has such a name", model_file, out, "--format", "Q8_0", "--keep", "attn_q=Q8_0"),
        ("none.gguf: no such file", tmp_path / "none.gguf", out, "--format", "Q8_0"),
        ("is the file to be quantized", model_file, model_file, "--format", "Q8_0"),
        ("does not exist", model_file, tmp_path / "none" / "out.gguf", "--format", "Q8_0"),
        ("is a folder", model_file, tmp_path, "--format", "Q8_0"),
        ("none.txt: cannot be read", model_file, out, "--format", "Q8_0", "--calibrate", tmp_path / "none.txt"),
        ("needs at least 2000", model_file, out, "--format", "Q8_0", "--calibrate", text_file, "--context", 1000),
        ("broken.dat: ", model_file, out, "--format", "Q8_0", "--imatrix", broken),
        ("GGUF file of type", model_file, out, "--format", "Q8_0", "--imatrix", model_file),
        ("it must have 64", model_file, out, "--format", "Q8_0", "--imatrix", tmp_path / "other.gguf"),
    ):
        assert wanted in error(cli("quantize", *args))
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize(
    ("wanted", "args"),
    [
        ("'Q7_K' is not a format", ["--format", "Q7_K"]),
        ("changes nothing", ["--format", "Q8_0", "--keep", "attn_q=Q8_0"]),
    ],
)
def test_what_is_wrong_shows_before_a_calibration(cli, model_file, tmp_path, wanted, args):
    """Before its text is even read: that does not exist here."""
    none = tmp_path / "none.txt"
    assert "none.txt" in error(
        cli("quantize", model_file, tmp_path / "out.gguf", "--format", "Q8_0", "--calibrate", none)
    )
    assert wanted in error(cli("quantize", model_file, tmp_path / "out.gguf", *args, "--calibrate", none))


def test_an_interrupt_leaves_nothing_behind(tmp_path):
    """SIGINT in the middle of the work: status 130, no traceback, the folder as it was."""
    rows = np.random.default_rng(0).standard_normal((4096, 1024)).astype(np.float16).view(np.uint8)
    tensors = [(f"blk.{i}.ffn_up.weight", "F16", (4096, 1024), lambda: rows) for i in range(12)]
    write_gguf(tmp_path / "in.gguf", {"general.architecture": field("llama")}, tensors)
    (tmp_path / "out.gguf").write_bytes(b"old")
    command = [*REALM, "quantize", "in.gguf", "out.gguf", "--format", "Q8_0"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 120
        while not any(path.stat().st_size > 2**22 for path in tmp_path.glob(".*.part")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, b"", b"")
    assert sorted(os.listdir(tmp_path)) == ["in.gguf", "out.gguf"]
    assert (tmp_path / "out.gguf").read_bytes() == b"old"
