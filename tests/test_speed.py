"""Measuring speed: what is timed is what decodes, floors against counts by hand, the experiment and `realm bench`."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decode_toys import random_model

import decode_speed
import kernel_times
import realm_jax as realm
from decode_speed_report import kernel_table
from realm_jax import speed
from realm_jax.cli.main import run as run_command
from realm_jax.decode.loop import decode, step
from realm_jax.errors import RealmError, RequestError
from realm_jax.experiment import Run, load_config, read_json
from realm_jax.kernels import reference
from realm_jax.kernels.matmul import IMPLEMENTATIONS

CONFIG = Path(__file__).parents[1] / "configs" / "decode_speed.toml"


@pytest.fixture(scope="module")
def model():
    return random_model()


@pytest.fixture(autouse=True)
def read_little(monkeypatch):
    monkeypatch.setitem(speed.READ_BYTES, "cpu", 2**22)


def test_rewinding_gives_the_same_tokens_again(model):
    start = speed.ready_state(model, 3, 10, 5)
    start_B = np.asarray(start.length_B)
    first = decode(model.params, model.config, start, jnp.int32(5))
    tokens = np.asarray(first.tokens_BS)
    again = decode(model.params, model.config, speed._rewound(first, start_B), jnp.int32(5))
    assert (np.asarray(again.length_B) == start_B + 5).all() and (start_B == 11).all()
    np.testing.assert_array_equal(again.tokens_BS, tokens)


def test_the_type_of_activations_reaches_the_step(model):
    def traced(dtype):
        state = speed.ready_state(model, 1, 4, 1, dtype=dtype)
        return str(jax.make_jaxpr(lambda params, state: step(params, model.config, state))(model.params, state))

    assert "bf16[" in traced("bfloat16") and "bf16[" not in traced("float32")


def test_times_are_of_so_many_tokens_and_floors_are_counts_by_hand(model):
    decoded = speed.time_decode(model, 2, 10, 5, repeats=2)
    filled = speed.time_prefill(model, 2, 10, repeats=3, chunk=4)
    assert (decoded.tokens, len(decoded.seconds)) == (10, 2) and (filled.tokens, len(filled.seconds)) == (20, 3)
    assert decoded.tokens_per_second == 10 / decoded.median > 0 and filled.compile_seconds > 0
    # 2 layers, 64 wide, 96 in between, 4 heads and 2 kv heads of 16, 128 tokens, the embedding is the output
    weights = 4 * (2 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 96 + 2 * 64) + 128 * 64 + 64)
    token = 2 * 2 * 2 * 16 * 2  # layers, keys and values, kv heads, width, bytes
    assert speed.step_bytes(model, 2, 10, 5, "bfloat16") == weights + 2 * (10 + 3) * token
    assert speed.step_bytes(model, 2, 10, 5, "int8") == weights + 2 * (10 + 3) * (token // 2 + 2 * 2 * 2 * 4)
    untied = model.params.replace(output=model.params.embedding)
    assert speed.weight_bytes(untied, 3) == weights + 4 * 3 * 64
    assert speed.formats(model.params) == {"float32": weights}


def test_the_read_ceiling_is_a_speed():
    assert 1e8 < speed.read_ceiling(2**24, repeats=2) < 1e14


def test_what_cannot_be_measured_is_said(model):
    with pytest.raises(RequestError, match=r"activations of 'int8': not known; take one of float32, bfloat16, float16"):
        speed.time_decode(model, 1, 10, 5, 1, dtype="int8")
    with pytest.raises(RequestError, match=r"a cache of 'Q8_0': not known; take one of float32"):
        speed.time_prefill(model, 1, 10, 1, cache_dtype="Q8_0")
    with pytest.raises(RequestError, match="200 tokens of context, one pending and 56 new ones make 257"):
        speed.ready_state(model, 1, 200, 56)
    broken = model.replace(params=model.params.replace(norm=jnp.full(64, jnp.nan)))
    with pytest.raises(RealmError, match="their logits are not finite"):
        speed.time_decode(broken, 1, 10, 5, 1)


def test_a_run_of_the_experiment(model_file, tmp_path, monkeypatch):
    small = ["batches=[2]", "context=10", "steps=3", "prompt_tokens=20", "chunk=8", "repeats=2", 'cache="float32"']
    own, traced, product = f"REALM_TILES={tmp_path}/own.json", [], reference.dense_matmul
    small.append(f'environments=["", "{own}"]')

    def traced_product(x, w):
        traced.append(os.environ.get("REALM_TILES", ""))
        return product(x, w)

    monkeypatch.setattr(reference, "dense_matmul", traced_product)
    config = load_config(decode_speed.DecodeSpeedConfig, CONFIG, [f"model={model_file}", 'matmul="reference"', *small])
    run = Run.create(config, "decode_speed", root=tmp_path, name="small")
    weights = speed.weight_bytes(realm.load(model_file).params)
    before = jax.config.jax_compilation_cache_dir, dict(IMPLEMENTATIONS)
    decode_speed.main(config, run)
    assert (jax.config.jax_compilation_cache_dir, IMPLEMENTATIONS) == before
    found = read_json(run.folder / "results.json")
    assert [(line["kind"], line["batch"], line["tokens"], line["environment"]) for line in found["lines"]] == [
        ("prefill", 1, 20, ""), ("decode", 2, 6, ""), ("decode", 2, 6, own),
    ]  # fmt: skip
    for line in found["lines"][1:]:
        assert line["weight_bytes"] == weights < line["step_bytes"] and line["compile_seconds"] > 0
        assert line["warm_start_seconds"] > 0 and line["impl"] == "reference"
        share = line["tokens_per_second"] / line["floor_tokens_per_second"]
        assert line["share_of_floor"] == pytest.approx(share)
    table = (run.folder / "results.md").read_text(encoding="utf-8")
    assert "| small.gguf | 2 |" in table and "small.gguf, batch 2: the profile has nothing of a GPU." in table
    assert f"| small.gguf {own} | 2 |" in table and "REALM_TILES" not in os.environ
    assert list(dict.fromkeys(traced)) == ["", f"{tmp_path}/own.json"]  # each is there while a loop is traced
    assert (run.folder / "decode_speed.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "change, message",
    [
        ('mixes=["Q9_K"]', "'Q9_K' is not a format that a file can be quantized to"),
        ('shape="llama-9b"', "shape 'llama-9b' is not known"),
        ('matmul="cublas"', "matmul: 'cublas' is none; one of auto"),
        ('attention="cudnn"', "attention: 'cudnn' is none; one of auto"),
        ("steps=0", "steps is 0; want at least 1"),
        ("batches=[0]", "batches: want at least 1 each"),
        ('environments=["PATH=0"]', "environments: 'PATH=0': want names that begin with REALM_"),
        ('environments=["REALM_TILES"]', "environments: 'REALM_TILES': want names that begin with REALM_"),
    ],
)
def test_a_config_that_cannot_be_run(change, message):
    with pytest.raises(RealmError, match=message):
        load_config(decode_speed.DecodeSpeedConfig, CONFIG, [change])


def test_kernels_are_added_up_over_the_streams_of_a_gpu(tmp_path):
    def line(name, *events):
        return SimpleNamespace(name=name, events=[SimpleNamespace(name=n, duration_ns=d) for n, d in events])

    gpu = SimpleNamespace(name="/device:GPU:0", lines=[
        line("Stream #13(Compute)", ("matvec", 3000.0), ("norm", 500.0), ("matvec", 1000.0)),
        line("XLA Modules", ("jit_decode", 9000.0)),
    ])  # fmt: skip
    host = SimpleNamespace(name="/host:CPU", lines=[line("Stream of words", ("python", 1e9))])
    rows = kernel_times.add_up(event for plane in (gpu, host) for event in kernel_times.device_events(plane))
    assert rows == [
        {"kernel": "matvec", "count": 2, "total_us": 4.0}, {"kernel": "norm", "count": 1, "total_us": 0.5},
    ]  # fmt: skip
    table = kernel_table("Q8_0, batch 1", {"steps": 2, "kernels": rows})
    assert "| matvec | 1.0 | 2.0 | 88.9% |" in table and "| all | 1.5 | 2.2 |  |" in table
    with pytest.raises(RealmError, match="has no trace"):
        kernel_times.kernel_times(tmp_path)


def test_bench(model_file, capsys):
    few = ["--prompt-tokens", "12", "--new-tokens", "4", "--repeats", "2", "--batch", "1", "--batch", "3"]
    assert run_command(["bench", str(model_file), *few, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {
        "model", "formats", "weight_bytes", "device", "backend", "versions", "cache_dtype", "dtype", "prompt_tokens",
        "new_tokens", "repeats", "read_bytes_per_second", "results", "arithmetic",
    }  # fmt: skip
    assert found["model"] == "small.gguf" and found["formats"] == {"float32": found["weight_bytes"]}
    assert [one["batch"] for one in found["results"]] == [1, 3]
    for one in found["results"]:
        assert set(one) == {"batch", "prefill", "decode", "step_bytes", "share_of_floor"}
        assert len(one["prefill"]["seconds"]) == len(one["decode"]["seconds"]) == 2
        assert one["step_bytes"] == found["weight_bytes"] + one["batch"] * (12 + 2.5) * 2 * 2 * 2 * 16 * 4
        floor = one["step_bytes"] / found["read_bytes_per_second"] * 4
        assert one["share_of_floor"] == pytest.approx(floor / np.median(one["decode"]["seconds"]))


def test_bench_shows_a_table_and_its_errors_are_one_line(model_file, capsys):
    few = ["--new-tokens", "4", "--repeats", "1"]  # the prompt: what the context of 96 leaves
    assert run_command(["bench", str(model_file), *few]) == 0
    shown = capsys.readouterr()
    assert "decode, tokens/s" in shown.out and "small.gguf: a step reads" in shown.err
    for wrong in (["--dtype", "int8"], ["--cache-dtype", "x"], ["--prompt-tokens", "92"]):
        assert run_command(["bench", str(model_file), *few, *wrong]) == 1
        shown = capsys.readouterr()
        assert shown.out == "" and shown.err.startswith("error: ") and shown.err.count("\n") == 1
