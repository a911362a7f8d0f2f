"""Files of adapters: there and back bit for bit, scales, what is broken or hostile, what saving must not destroy."""

import json
import logging
import math
import os
import random
import signal
import struct
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lora_toys import random_adapter
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import realm_jax as realm
from realm_jax import lora, quant
from realm_jax.cli.main import run
from realm_jax.errors import AdapterError, RealmError
from realm_jax.gguf.reader import open_gguf
from realm_jax.gguf.types import Field, ValueType, field
from realm_jax.gguf.writer import write_gguf
from realm_jax.lora import scales
from realm_jax.lora.base import read_base

GOLDEN = Path(__file__).parent / "golden" / "lora"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def model(make_model_file):
    return realm.load(make_model_file("files.gguf", seed=5))


@pytest.fixture(scope="module")
def adapter(model):
    return random_adapter(model, seed=1)


@pytest.fixture
def peft(adapter, tmp_path) -> Path:
    realm.save_adapter(adapter, tmp_path / "peft")
    return tmp_path / "peft"


@pytest.fixture
def gguf(adapter, tmp_path) -> Path:
    realm.save_adapter(adapter, tmp_path / "adapter.gguf")
    return tmp_path / "adapter.gguf"


def refused(path, *words: str, **options) -> str:
    with pytest.raises(AdapterError) as info:
        realm.load_adapter(path, **options)
    message = str(info.value)
    assert message.isprintable() and len(message) < 1000
    for word in words:
        assert word in message, message
    return message


def same(ours, theirs) -> None:
    assert [path for path, _ in ours.items()] == [path for path, _ in theirs.items()]
    for (path, mine), (_, other) in zip(ours.items(), theirs.items(), strict=True):
        for name in ("a", "b", "scale", "magnitude"):
            x, y = getattr(mine, name), getattr(other, name)
            assert (x is None) == (y is None)
            if x is not None:
                assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), (path, name)


def change_config(folder: Path, **changes) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({k: v for k, v in (config | changes).items() if v is not ...}))


def change_tensors(folder: Path, **changes) -> None:
    """Tensors of layer 0's q by the end of their name; None takes one out."""
    tensors = load_file(folder / WEIGHTS)
    for kind, value in changes.items():
        name = f"{Q}.{kind}" if kind.startswith("lora") and "__" not in kind else kind
        name = name + ".weight" if kind in ("lora_A", "lora_B") else name
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value
    save_file(tensors, folder / WEIGHTS)


def change_gguf(path: Path, fields=(), tensors=()) -> None:
    """A GGUF written again with other fields and tensors (name -> float array, or (format, shape, raw)); None: out."""
    with open_gguf(path) as file:
        made = dict(file.fields) | dict(fields)
        kept = {n: (t.format, t.shape, np.array(file.raw(n))) for n, t in file.tensors.items()}
    for name, value in dict(tensors).items():
        kept[name] = ("F32", value.shape, value.astype(np.float32).view(np.uint8)) if hasattr(value, "view") else value
    made = {key: value for key, value in made.items() if value is not None}
    kept = {name: value for name, value in kept.items() if value is not None}
    write_gguf(path, made, [(n, f, s, lambda raw=raw: raw) for n, (f, s, raw) in kept.items()])


# There and back


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_round_trips_are_bit_exact(model, tmp_path, dtype, dora):
    """From one kind into the other and back; 16-bit numbers are rounded once, at the first save."""
    adapter = random_adapter(model, seed=2, rank=3, dora=dora)
    realm.save_adapter(adapter, tmp_path / "first", dtype=dtype)
    first = realm.load_adapter(tmp_path / "first")
    rounded = getattr(
        ml_dtypes if dtype == "BF16" else np, {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[dtype]
    )
    want = adapter.map(
        lambda d: d.replace(**{
            name: jnp.asarray(np.asarray(getattr(d, name)).astype(rounded).astype(np.float32))
            for name in ("a", "b", *(["magnitude"] if dora else []))
        })
    )  # fmt: skip
    same(lora.fit(first, model), want)
    names = ["again"] if dora else ["again", "again.gguf", "back", "back.gguf"]
    loaded = first
    for name in names:
        realm.save_adapter(loaded, tmp_path / name, dtype=dtype)
        loaded = realm.load_adapter(tmp_path / name)
        same(lora.fit(loaded, model), want)
    assert loaded.architecture == "llama" and loaded.heads == (4, 2)


def test_a_file_that_is_written_again_is_the_same_file(peft, gguf, tmp_path):
    realm.save_adapter(realm.load_adapter(gguf), tmp_path / "peft_too")
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / "peft_too" / name).read_bytes() == (peft / name).read_bytes()
    realm.save_adapter(realm.load_adapter(peft), tmp_path / "too.gguf")
    assert (tmp_path / "too.gguf").read_bytes() == gguf.read_bytes()


def test_loading_with_a_model_fits(peft, gguf, model, adapter):
    for path in (peft, gguf):
        fitted = realm.load_adapter(path, model)
        assert fitted.fitted
        same(fitted, adapter)


def test_adapters_of_part_of_a_model(model, tmp_path):
    """What some layers lack stays as it is, and is not named as a target."""
    adapter = random_adapter(model, targets=("q", "down", "output"))
    layers = adapter.deltas.layers
    one = layers[0].replace(attn=layers[0].attn.replace(q=None))
    adapter = adapter.replace(deltas=adapter.deltas.replace(layers=(one, layers[1])))
    for name in ("some", "some.gguf"):
        realm.save_adapter(adapter, tmp_path / name)
        same(realm.load_adapter(tmp_path / name, model), adapter)
    config = json.loads((tmp_path / "some" / CONFIG).read_text())
    assert config["target_modules"] == ["down_proj", "lm_head", "model.layers.1.self_attn.q_proj"]


def test_names_without_prefix_and_with_an_adapters_name(peft, model, adapter):
    tensors = load_file(peft / WEIGHTS)
    for change in (
        lambda name: name.removeprefix("base_model.model."),
        lambda name: name.removeprefix("base_model.model.model."),
        lambda name: name.replace(".weight", ".default.weight").replace("g_A", "g_A.default").replace("g_B", "g_B.x"),
    ):
        save_file({change(name): value for name, value in tensors.items()}, peft / WEIGHTS)
        same(realm.load_adapter(peft, model), adapter)


@pytest.mark.parametrize("format", ["F16", "BF16", "Q8_0", "Q4_0"])
def test_gguf_adapters_in_any_format(gguf, model, adapter, format):
    """A rank of 32, so that blocks divide the rows of b too."""
    adapter = random_adapter(model, rank=32, targets=("q", "up"))
    realm.save_adapter(adapter, gguf)
    raw, want = {}, {}
    with open_gguf(gguf) as file:
        for name, info in file.tensors.items():
            values = jnp.asarray(np.array(file.raw(name)).view(np.float32))
            packed = quant.quantize(values, format) if "Q" in format else values.astype(quant.DENSE_FORMATS[format])
            raw[name] = (format, info.shape, quant.raw_bytes(packed)[1])
            want[name] = np.asarray(quant.dequantize(raw[name][2], format, info.shape))
    change_gguf(gguf, tensors=raw)
    loaded = realm.load_adapter(gguf)
    np.testing.assert_array_equal(loaded.deltas.layers[1].attn.q.a, want["blk.1.attn_q.weight.lora_a"])
    np.testing.assert_array_equal(loaded.deltas.layers[1].ffn.up.b, want["blk.1.ffn_up.weight.lora_b"])


# Scales


@given(st.integers(1, 4096), st.integers(1, 512), st.booleans())
def test_alphas_give_back_the_scale(alpha, rank, rslora):
    scale = np.float32(alpha / (math.sqrt(rank) if rslora else rank))
    assert np.float32(scales.peft_alpha(float(scale), rank) / rank) == scale
    whole = scales.gguf_alpha([(float(scale), rank)])
    acts = np.float32(whole) / np.float32(rank) if whole else np.float32(1)
    if rslora:  # no float32 alpha may give it: then the last bit moves
        assert abs(acts - scale) <= np.spacing(scale)
    else:
        assert acts == scale and whole == alpha
    assert scales.gguf_factor(whole, float(scale), rank) == 1


@given(st.lists(st.tuples(st.floats(-100, 100, width=32), st.integers(1, 64)), min_size=1, max_size=6))
def test_one_alpha_and_factors_give_every_scale(given_scales):
    alpha = scales.gguf_alpha(given_scales)
    for scale, rank in given_scales:
        acts = np.float32(alpha) / np.float32(rank) if alpha else np.float32(1)
        got = float(acts) * scales.gguf_factor(alpha, scale, rank)
        assert math.isclose(got, scale, rel_tol=2.0**-21, abs_tol=1e-44)
    best = sum(scales.gguf_factor(alpha, scale, rank) == 1 for scale, rank in given_scales)
    assert best >= 1 or all(abs(scale) <= 1e-30 for scale, _ in given_scales)  # nearly nothing has no say


@given(
    st.lists(st.floats(-8, 8, width=32).map(lambda x: x + 0.0), min_size=14, max_size=14),
    st.lists(st.integers(1, 5), min_size=14, max_size=14),
)
def test_every_weight_keeps_its_own_scale_and_rank(tmp_path_factory, model, own_scales, ranks):
    folder = tmp_path_factory.mktemp("scales")
    wanted = iter(zip(own_scales, ranks, strict=True))
    rng = np.random.default_rng(0)

    def changed(delta):
        scale, rank = next(wanted)
        (_, K), (N, _) = delta.a.shape, delta.b.shape
        a, b = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((rank, K), (N, rank)))
        return delta.replace(a=a, b=b, scale=jnp.float32(scale))

    adapter = random_adapter(model, targets=("q", "k", "v", "o", "gate", "up", "down")).map(changed)
    realm.save_adapter(adapter, folder / "peft")
    same(realm.load_adapter(folder / "peft", model), adapter)  # PEFT has an alpha for each
    realm.save_adapter(adapter, folder / "a.gguf")
    for (_, mine), (_, loaded) in zip(
        adapter.items(), realm.load_adapter(folder / "a.gguf", model).items(), strict=True
    ):
        assert np.array_equal(mine.a, loaded.a)
        product = np.asarray(mine.b, np.float64) * float(mine.scale)
        np.testing.assert_allclose(
            np.asarray(loaded.b, np.float64) * float(loaded.scale), product, rtol=5e-7, atol=1e-40
        )


@pytest.mark.parametrize("alpha", [None, 0.0])
def test_gguf_without_alpha_has_scale_one(gguf, alpha):
    change_gguf(gguf, {"adapter.lora.alpha": None if alpha is None else Field(ValueType.FLOAT32, alpha)})
    loaded = realm.load_adapter(gguf)
    assert all(float(delta.scale) == 1 for _, delta in loaded.items())
    realm.save_adapter(loaded, gguf)
    same(realm.load_adapter(gguf), loaded)


def test_patterns_match_as_peft_matches(peft):
    change_config(peft, alpha_pattern={"k_proj": 3, r".*\.1\.mlp\.(?:up|down)_proj": 5, "q": 7, "embed_tokens": 1.5})
    loaded = realm.load_adapter(peft)
    got = {path: float(delta.scale) * delta.rank for path, delta in loaded.items()}
    for path, alpha in got.items():
        want = {"k": 3, "embedding": 1.5}.get(path[-1], 8)
        assert alpha == (5 if path[1:] in ((1, "ffn", "up"), (1, "ffn", "down")) else want), path
    change_config(peft, use_rslora=True)
    assert float(realm.load_adapter(peft).deltas.layers[0].attn.k.scale) == np.float32(3 / 2)


# What is refused


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"peft_type": "IA3"}, "peft_type"),
        ({"peft_type": ...}, "peft_type"),
        ({"peft_type": ["LORA"]}, "peft_type"),
        ({"r": 0}, "r is 0"),
        ({"r": True}, "r is"),
        ({"r": "8"}, "r is"),
        ({"r": 5}, "rank 4"),
        ({"rank_pattern": {"q_proj": 2}}, "lora_A"),
        ({"rank_pattern": [1]}, "rank_pattern"),
        ({"rank_pattern": {"q_proj": 1.5}}, "rank_pattern"),
        ({"rank_pattern": {"(": 4}}, "regular expression"),
        ({"rank_pattern": {"(a+)+" * 10: 4}}, "repeats"),
        ({"rank_pattern": {"a{1,99999999999}": 4}}, "regular expression"),
        ({"alpha_pattern": {"q_proj": None}}, "alpha_pattern"),
        ({"lora_alpha": math.nan}, "lora_alpha"),
        ({"lora_alpha": math.inf}, "lora_alpha"),
        ({"lora_alpha": 10**400}, "lora_alpha"),
        ({"lora_alpha": "16"}, "lora_alpha"),
        ({"use_rslora": "yes"}, "use_rslora"),
        ({"use_dora": True}, "lora_magnitude_vector"),
        ({"base_model_name_or_path": 5}, "base_model_name_or_path"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"lora_bias": True}, "lora_bias"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
        ({"use_qalora": True}, "use_qalora"),
        ({"use_something_new": True}, "use_something_new"),
        ({"megatron_config": {"x": 1}}, "megatron_config"),
        ({"arrow_config": {"x": 1}}, "arrow_config"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights"),
    ],
)  # fmt: skip
def test_configs_that_are_refused(peft, changes, word):
    change_config(peft, **changes)
    refused(peft, word, str(peft))


def test_harmless_configs_are_accepted(peft, model, adapter):
    change_config(
        peft, init_lora_weights="eva", bias="all", exclude_modules=["x"], layers_to_transform=[0], use_qalora=False,
        modules_to_save=None, rank_pattern=None, megatron_core="megatron.core", target_modules="all-linear", new_key=3,
    )  # fmt: skip
    same(realm.load_adapter(peft, model), adapter)


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", "5", "null", '"x"', "[" * 100_000, '{"r": ' + "9" * 5000 + "}", "\xff"]
)
def test_configs_that_are_no_json_object(peft, text):
    (peft / CONFIG).write_bytes(text.encode("latin-1"))
    refused(peft, CONFIG)


ZEROS = np.zeros((4, 64), np.float32)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora_A": None}, ("layers.0.self_attn.q_proj", "lora_A")),
        ({"lora_B": None}, ("layers.0.self_attn.q_proj", "lora_B")),
        ({"lora_A": np.zeros((3, 64), np.float32)}, ("ranks differ", Q)),
        ({"lora_A": np.zeros((4, 2, 32), np.float32)}, ("two dimensions", Q)),
        ({"lora_A": np.zeros(4, np.float32)}, ("two dimensions", Q)),
        ({"lora_A": ZEROS.astype(np.int32)}, ("I32", Q)),
        ({"lora_A": ZEROS + np.nan}, ("NaN", Q)),
        ({"lora_B": ZEROS.T - np.inf}, ("NaN", Q)),
        ({"lora_A": ZEROS.astype(np.float64) + 1e300}, ("NaN", Q)),
        ({"lora_A": ZEROS.astype(ml_dtypes.float8_e4m3fn)}, ("F8_E4M3", Q)),
        ({"lora_A": np.zeros((0, 64), np.float32), "lora_B": np.zeros((64, 0), np.float32)}, ("rank 0", Q)),
        ({"lora_magnitude_vector": np.ones(64, np.float32)}, ("use_dora", Q)),
        ({f"{Q}.lora_A.default.weight": ZEROS}, ("stands for the same", Q)),
        ({f"{Q}.bias": ZEROS}, (f"{Q}.bias",)),
        ({f"{Q}.lora_B.bias": ZEROS}, ("lora_B.bias",)),
        ({"base_model.model.model.norm.weight": ZEROS}, ("model.norm.weight",)),
        ({"base_model.model.model.layers.0.mlp.experts.lora_A.weight": ZEROS}, ("experts",)),
        ({"base_model.model.model.embed_tokens.lora_A.weight": ZEROS}, ("embed_tokens.lora_A",)),
        ({"base_model.model.model.layers.01.self_attn.q_proj.lora_A.weight": ZEROS}, ("layers.01",)),
        ({"base_model.model.model.layers.9999.self_attn.q_proj.lora_A.weight": ZEROS}, ("9999",)),
        ({"x\n\x1b[31m": ZEROS}, ("x\\n",)),
    ],
)
def test_tensors_that_are_refused(peft, changes, words):
    change_tensors(peft, **changes)
    refused(peft, str(peft), *words)


def test_dora_needs_a_magnitude_of_the_right_length(model, tmp_path):
    realm.save_adapter(random_adapter(model, dora=True), tmp_path / "dora")
    change_tensors(tmp_path / "dora", lora_magnitude_vector=np.ones(63, np.float32))
    refused(tmp_path / "dora", "lora_magnitude_vector", "(63,)", "(64,)")
    change_tensors(tmp_path / "dora", lora_magnitude_vector=None)
    refused(tmp_path / "dora", "q_proj has no lora_magnitude_vector")


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"general.type": field("model")}, "is this a model?"),
        ({"general.type": None}, "general.type"),
        ({"adapter.type": field("control")}, "adapter.type"),
        ({"adapter.type": None}, "adapter.type"),
        ({"general.architecture": None}, "general.architecture"),
        ({"general.architecture": field(5)}, "general.architecture"),
        ({"adapter.lora.alpha": Field(ValueType.FLOAT32, math.nan)}, "adapter.lora.alpha"),
        ({"adapter.lora.alpha": Field(ValueType.FLOAT32, math.inf)}, "adapter.lora.alpha"),
        ({"adapter.lora.alpha": field("16")}, "adapter.lora.alpha"),
        ({"adapter.alora.invocation_tokens": field([1, 2])}, "invocation_tokens"),
    ],
)
def test_gguf_metadata_that_is_refused(gguf, fields, word):
    change_gguf(gguf, fields)
    refused(gguf, word, str(gguf))


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"blk.0.attn_q.weight.lora_a": None}, ("blk.0.attn_q.weight.lora_a", "missing")),
        ({"blk.0.attn_q.weight.lora_b": None}, ("blk.0.attn_q.weight.lora_b", "missing")),
        ({"blk.0.attn_q.weight.lora_a": np.zeros((3, 64))}, ("blk.0.attn_q.weight", "rank")),
        ({"blk.0.attn_q.weight.lora_a": np.zeros(64)}, ("blk.0.attn_q.weight.lora_a", "two dimensions")),
        ({"blk.0.attn_q.weight.lora_a": np.full((4, 64), np.nan)}, ("blk.0.attn_q.weight.lora_a", "NaN")),
        ({"blk.0.attn_q.weight.lora_a": ("I8", (4, 64), np.zeros((4, 64), np.uint8))}, ("lora_a", "I8")),
        ({"blk.0.attn_norm.weight": np.zeros(64)}, ("blk.0.attn_norm.weight", "norm")),
        ({"blk.0.attn_q.bias": np.zeros(64)}, ("blk.0.attn_q.bias",)),
        ({"blk.00.attn_q.weight.lora_a": np.zeros((4, 64))}, ("blk.00.attn_q",)),
        ({"blk.0.ffn_gate_exps.weight.lora_a": np.zeros((4, 64))}, ("ffn_gate_exps",)),
    ],
)
def test_gguf_tensors_that_are_refused(gguf, tensors, words):
    change_gguf(gguf, tensors=tensors)
    refused(gguf, str(gguf), *words)


def test_pickles_are_never_opened(tmp_path, peft):
    (peft / WEIGHTS).rename(peft / "adapter_model.bin")
    refused(peft, "pickle", "safetensors")
    refused(peft / "adapter_model.bin", "pickle", "safetensors")
    (peft / "adapter_model.bin").unlink()
    refused(peft, WEIGHTS)
    (peft / CONFIG).unlink()
    refused(peft, CONFIG)


def test_paths_that_are_no_adapter(peft, model_file, tmp_path):
    refused(tmp_path / "nothing", "no such file")
    refused(peft / WEIGHTS, "folder")
    refused(peft / CONFIG, "folder")
    refused(model_file, "general.type")
    refused("a\0b", "cannot be read")


def test_a_model_that_it_does_not_fit(peft, gguf):
    other = realm.load(GOLDEN / "base_qwen2.gguf")
    refused(gguf, "llama", "qwen2", model=other)
    refused(peft, "llama", "qwen2", model=other, strict=False)  # nothing of it could be right
    small = realm.load(GOLDEN / "base_llama.gguf")
    refused(peft, "token_embd.weight", "lora_b (261, 4)", "its shape (64, 32)", model=small)
    assert not list(realm.load_adapter(peft, small, strict=False).items())


def test_a_lenient_load_says_what_it_leaves_out(peft, gguf, model, adapter, caplog):
    change_tensors(peft, **{"base_model.model.model.norm.weight": ZEROS})
    change_config(peft, modules_to_save=["norm"])
    change_gguf(gguf, tensors={"blk.0.attn_norm.weight": np.zeros(64)})
    for path, count, name in ((peft, 2, "model.norm.weight"), (gguf, 1, "blk.0.attn_norm.weight")):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="realm_jax"):
            loaded = realm.load_adapter(path, model, strict=False)
        same(loaded, adapter)
        assert len(loaded.skipped) == count and name in loaded.skipped[-1]
        assert [r.getMessage() for r in caplog.records] == [f"{path.name}: left out: {line}" for line in loaded.skipped]


def test_a_lenient_load_still_refuses_what_is_broken(peft):
    change_tensors(peft, lora_A=ZEROS + np.nan)
    refused(peft, "NaN", Q, strict=False)
    change_config(peft, layer_replication=[[0, 1]])
    refused(peft, "layer_replication", strict=False)


def test_copies_of_embeddings_that_peft_saves_are_ignored():
    with safe_open(GOLDEN / "llama_plain" / WEIGHTS, framework="np") as file:
        assert "base_model.model.model.embed_tokens.base_layer.weight" in set(file.keys())
    assert realm.load_adapter(GOLDEN / "llama_plain").skipped == ()


# Damage


def loads(path) -> bool:
    """Whether it loads; what does not is refused in one line, and nothing else escapes."""
    try:
        adapter = realm.load_adapter(path)
    except AdapterError as error:
        assert str(error).isprintable() and len(str(error)) < 1000
        return False
    for _, delta in adapter.items():
        assert np.isfinite(delta.a).all() and np.isfinite(delta.b).all() and np.isfinite(delta.scale)
        assert delta.a.shape[0] == delta.b.shape[1] >= 1
    return True


def damaged(rng: random.Random, content: bytes, head: int) -> bytes:
    """One to three flipped bits, changed bytes, extreme numbers, cuts or repeats, most of them in the head."""
    content = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        if not content:
            break
        at = rng.randrange(min(len(content), head if rng.random() < 0.8 else len(content)))
        match rng.randrange(6):
            case 0:
                content[at] ^= 1 << rng.randrange(8)
            case 1:
                content[at] = rng.randrange(256)
            case 2:
                content[at : at + 8] = struct.pack("<Q", rng.choice([0, 1, 2**31, 2**32, 2**40, 2**63, 2**64 - 1]))
            case 3:
                del content[at : at + rng.randint(1, 40)]
            case 4:
                content[at:at] = content[at : at + rng.randint(1, 40)]
            case 5:
                del content[at:]
    return bytes(content)


@pytest.mark.parametrize("name", ["a.gguf", CONFIG, WEIGHTS])
def test_damaged_files(model, tmp_path, name):
    rng = random.Random(name)
    adapter = random_adapter(model, rank=1, targets=("q", "down"))
    path = tmp_path / ("a.gguf" if name == "a.gguf" else "peft")
    realm.save_adapter(adapter, path)
    file = path if path.is_file() else path / name
    content = file.read_bytes()
    head = {"a.gguf": 1100, CONFIG: len(content), WEIGHTS: 1000}[name]
    accepted = 0
    for _ in range(300):
        file.write_bytes(damaged(rng, content, head))
        accepted += loads(path)
    assert 0 < accepted < 200


def test_every_truncation(model, tmp_path):
    realm.save_adapter(random_adapter(model, rank=1, targets=("k",)), tmp_path / "peft")
    realm.save_adapter(random_adapter(model, rank=1, targets=("k",)), tmp_path / "a.gguf")
    for file, path in ((tmp_path / "a.gguf", tmp_path / "a.gguf"), (tmp_path / "peft" / WEIGHTS, tmp_path / "peft")):
        content = file.read_bytes()
        whole = len(content.rstrip(b"\0")) if file == path else len(content)
        for length in range(0, whole, 7):
            file.write_bytes(content[:length])
            assert not loads(path), length


# Saving


def test_saving_needs_to_know_the_heads(adapter, model, tmp_path):
    blind = adapter.replace(heads=None)
    for name, order in (("peft", "ggml"), ("a.gguf", "hf")):
        unknown = blind.replace(row_order=order, fitted=False)
        with pytest.raises(AdapterError, match=r"heads.*base model"):
            realm.save_adapter(unknown, tmp_path / name)
        realm.save_adapter(unknown, tmp_path / name, base=model)
        realm.save_adapter(unknown, tmp_path / name, base=model.config)
    with pytest.raises(AdapterError, match="architecture"):
        realm.save_adapter(blind.replace(architecture=None), tmp_path / "a.gguf")
    with pytest.raises(AdapterError, match="architecture"):
        realm.save_adapter(blind.replace(architecture="gemma2"), tmp_path / "peft")
    halves = blind.replace(architecture="qwen2")  # has the same rows in both
    realm.save_adapter(halves, tmp_path / "peft")
    same(realm.load_adapter(tmp_path / "peft"), halves)
    with pytest.raises(AdapterError, match=r"attn_q.weight: 64 rows"):
        realm.save_adapter(adapter.replace(heads=(5, 5)), tmp_path / "peft")


def test_what_cannot_be_saved(adapter, model, tmp_path):
    with pytest.raises(AdapterError, match="stack"):
        realm.save_adapter(lora.stack([adapter], model), tmp_path / "peft")
    with pytest.raises(AdapterError, match="DoRA"):
        realm.save_adapter(random_adapter(model, dora=True), tmp_path / "a.gguf")
    with pytest.raises(AdapterError, match="dtype"):
        realm.save_adapter(adapter, tmp_path / "peft", dtype="Q8_0")
    large = adapter.map(lambda delta: delta.replace(b=delta.b * 1e8))
    for name in ("peft", "a.gguf"):
        with pytest.raises(AdapterError, match=r"token_embd.weight.*float16"):
            realm.save_adapter(large, tmp_path / name, dtype="F16")
    with pytest.raises(AdapterError, match="nothing to save"):
        realm.save_adapter(lora.Adapter(lora.adapter.build_deltas({}, 2)), tmp_path / "peft")
    with pytest.raises(AdapterError, match="do not fit"):
        realm.save_adapter(adapter, tmp_path / "peft", base=realm.load(GOLDEN / "base_llama.gguf"))
    assert list(tmp_path.iterdir()) == []


def test_saving_destroys_nothing_else(adapter, tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.txt").write_text("years")
    (tmp_path / "file").write_text("x")
    for name in ("work", "file", "none/peft", "none/a.gguf", "work.gguf/x.gguf"):
        with pytest.raises(RealmError) as info:
            realm.save_adapter(adapter, tmp_path / name)
        assert str(tmp_path) in str(info.value)
    assert (tmp_path / "work" / "thesis.txt").read_text() == "years"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "work"]
    (tmp_path / "empty").mkdir()
    realm.save_adapter(adapter, tmp_path / "empty")
    (tmp_path / "empty" / "README.md").write_text("about it")
    realm.save_adapter(adapter.scaled(2.0), tmp_path / "empty")
    assert (tmp_path / "empty" / "README.md").read_text() == "about it"
    assert float(realm.load_adapter(tmp_path / "empty").deltas.layers[0].attn.q.scale) == 4
    (tmp_path / "empty" / "checkpoint-5").mkdir()
    with pytest.raises(AdapterError, match="checkpoint-5"):
        realm.save_adapter(adapter, tmp_path / "empty")


def test_a_failed_save_leaves_the_old_adapter(peft, adapter, monkeypatch):
    before = {path.name: path.read_bytes() for path in peft.iterdir()}

    def full(*_args, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("realm_jax.lora.peft._write_safetensors", full)
    with pytest.raises(AdapterError, match="No space left"):
        realm.save_adapter(adapter.scaled(3.0), peft)
    assert {path.name: path.read_bytes() for path in peft.iterdir()} == before
    assert [path.name for path in peft.parent.iterdir()] == ["peft"]


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_directory_is_replaced_with_and_without_the_systems_help(peft, adapter, monkeypatch, can_exchange):
    if not can_exchange:
        monkeypatch.setattr("realm_jax.lora.files._exchange", lambda _new, _old: False)
    realm.save_adapter(adapter.scaled(2.0), peft)
    same(realm.load_adapter(peft), realm.load_adapter(peft))
    assert float(realm.load_adapter(peft).deltas.layers[0].attn.q.scale) == 4
    assert [path.name for path in peft.parent.iterdir()] == ["peft"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere two renames take the place of one exchange")
def test_a_killed_process_leaves_a_whole_adapter(peft, tmp_path):
    """One process saves adapter after adapter, another kills it: the directory is one of them, config and weights."""
    code = """
        import sys, realm_jax as realm
        adapter = realm.load_adapter(sys.argv[1])
        print("begin", flush=True)
        for i in range(1, 10_000):
            fresh = adapter.map(lambda d: d.replace(a=d.a * 0 + i, scale=d.scale * 0 + i))
            realm.save_adapter(fresh, sys.argv[1])
    """
    child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), peft], stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"begin\n"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:  # until it has saved a few, and then some
        delta = realm.load_adapter(peft).deltas.layers[0].attn.q
        if float(delta.scale) > 3:
            break
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.stdout.close()
    delta = realm.load_adapter(peft).deltas.layers[0].attn.q
    assert float(delta.scale) >= 3 and (np.asarray(delta.a) == float(delta.scale)).all()


# Base models


def test_base_models_are_read_from_their_heads(tmp_path, model_file, model):
    assert read_base(model_file) == model.config
    values = {
        "model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 261, "head_dim": None,
    }  # fmt: skip
    file = tmp_path / "config.json"
    file.write_text(json.dumps(values))
    for path in (file, tmp_path):
        config = read_base(path)
        for name in ("architecture", "layers", "width", "ffn_width", "heads", "kv_heads", "head_width", "vocab_size"):
            assert getattr(config, name) == getattr(model.config, name)
    for change, word in (
        ({"model_type": "bert"}, "bert"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"num_attention_heads": 0}, "head_count"),
        ({"num_key_value_heads": 3}, "head_count_kv"),
    ):
        file.write_text(json.dumps(values | change))
        with pytest.raises(RealmError, match=word):
            read_base(tmp_path)


# The command


def call(capsys, *args) -> tuple[int, str, str]:
    status = run(["convert-adapter", *map(str, args)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_convert_adapter(capsys, peft, gguf, tmp_path, model_file):
    status, out, err = call(capsys, peft, tmp_path / "out.gguf", "--base", model_file, "--json")
    assert status == 0 and err.count("\n") == 1
    assert json.loads(out) == {
        "in": str(peft), "out": str(tmp_path / "out.gguf"), "kind": "GGUF", "base": str(model_file),
        "architecture": "llama", "rank": 4, "alpha": 8.0, "tensors": 16, "dora": False, "skipped": [],
    }  # fmt: skip
    assert (tmp_path / "out.gguf").read_bytes() == gguf.read_bytes()
    assert call(capsys, gguf, tmp_path / "back")[0] == 0
    assert (tmp_path / "back" / WEIGHTS).read_bytes() == (peft / WEIGHTS).read_bytes()
    status, out, err = call(capsys, peft, tmp_path / "half", "--dtype", "F16")
    assert status == 0 and out == "" and "F16" in err
    assert load_file(tmp_path / "half" / WEIGHTS)[f"{Q}.lora_A.weight"].dtype == np.float16


def test_convert_adapter_finds_the_base(capsys, tmp_path):
    """Named by the adapter, or the bundled model where the adapter fits; else it asks."""
    golden = GOLDEN / "llama_plain"
    status, out, err = call(capsys, golden, tmp_path / "a.gguf")
    assert status == 1 and out == "" and err.count("\n") == 1 and "--base" in err and "llama_plain" in err
    named = tmp_path / "named"
    named.mkdir()
    (named / WEIGHTS).write_bytes((golden / WEIGHTS).read_bytes())
    config = json.loads((golden / CONFIG).read_text())
    (named / CONFIG).write_text(json.dumps(config | {"base_model_name_or_path": str(GOLDEN / "base_llama.gguf")}))
    status, out, _ = call(capsys, named, tmp_path / "a.gguf", "--json")
    assert status == 0 and json.loads(out)["base"] == str(GOLDEN / "base_llama.gguf")
    assert realm.load_adapter(tmp_path / "a.gguf").base == str(GOLDEN / "base_llama.gguf")
    bundled = realm.load()
    own = random_adapter(bundled, rank=1, targets=("q",)).replace(architecture=None, heads=None, row_order="hf")
    realm.save_adapter(own, tmp_path / "own")
    status, out, _ = call(capsys, tmp_path / "own", tmp_path / "own.gguf", "--json")
    assert status == 0 and json.loads(out)["base"].endswith("tiny.gguf")


def test_convert_adapter_refuses_in_one_line(capsys, peft, tmp_path):
    small = GOLDEN / "base_llama.gguf"
    for args, word in (
        ((tmp_path / "none", tmp_path / "a.gguf"), "no such file"),
        ((peft, tmp_path / "a.gguf", "--base", tmp_path / "none"), "no such file"),
        ((peft, tmp_path / "a.gguf", "--base", GOLDEN / "llama_plain.gguf"), "token_embd.weight"),
        ((peft, tmp_path / "a.gguf", "--base", GOLDEN / "base_qwen2.gguf"), "qwen2"),
        ((peft, tmp_path / "a.gguf", "--base", small), "token_embd.weight"),
        ((peft, tmp_path / "no" / "a.gguf"), "does not exist"),
        ((GOLDEN / "llama_dora", tmp_path / "a.gguf", "--base", small), "DoRA"),
    ):
        status, out, err = call(capsys, *args)
        assert (status, out, err.count("\n")) == (1, "", 1) and word in err, err
    assert not list(tmp_path.glob("*.gguf"))
    assert call(capsys, peft, tmp_path / "a.gguf", "--dtype", "Q8_0")[0] == 2


def test_convert_adapter_skips_on_demand(capsys, peft, tmp_path, model_file):
    change_tensors(peft, **{"base_model.model.model.norm.weight": ZEROS})
    assert call(capsys, peft, tmp_path / "a.gguf")[0] == 1
    status, out, err = call(capsys, peft, tmp_path / "a.gguf", "--skip-misfits", "--base", model_file, "--json")
    [line] = json.loads(out)["skipped"]
    assert status == 0 and "model.norm.weight" in line and err.startswith("warning: ") and line in err
    assert err.count("\n") == 2
