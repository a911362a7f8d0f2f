"""Training the bundled models in small: exact resume after a kill, broken checkpoints, export, report, card."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import realm_jax as realm
import tiny_report
import train_tiny
from realm_jax.errors import RealmError
from realm_jax.experiment import Run, load_config, read_json

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
# Both models have one shape and one training, so that what one compiles serves the other.
MODEL = "context_length = 64\nlayers = 1\nwidth = 32\nffn_width = 64\nheads = 4\nkv_heads = 2\nhead_width = 8\n"
TRAINING = (
    "steps = 16\nbatch = 4\nlearning_rate = 5e-3\nwarmup = 2\nweight_decay = 0.1\nclip = 1.0\n"
    "steps_per_call = 2\nevaluate_every = 4\ncheckpoint_every = 4\n"
)
CONFIG = f"""
seed = 1
text = {{ held_out = 40, vocabulary = 320, row_tokens = 32, documents = {{ fact = 100, story = 100, chat = 30 }} }}
formats = {{ "blk.*" = "Q8_0", "*" = "F32" }}
[target]
file = "tiny.gguf"
name = "Target"
description = "a test"
{MODEL}
[target_training]
{TRAINING}
[draft]
file = "tiny-draft.gguf"
name = "Draft"
description = "a test"
{MODEL}
[draft_training]
{TRAINING}
"""

# Trains as the command does, and is killed without warning once step 10 of the target is in metrics.jsonl.
KILLED = f"""
import os, signal, sys
sys.path.insert(0, {str(EXPERIMENTS)!r})
import train_tiny
from realm_jax.experiment import Run

log = Run.log
def log_then_die(run, **values):
    log(run, **values)
    if values["step"] == 10:
        os.kill(os.getpid(), signal.SIGKILL)

Run.log = log_then_die
train_tiny.command()
"""


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "train_tiny.toml"
    path.write_text(CONFIG)
    return path


@pytest.fixture(scope="module")
def config(config_file):
    return load_config(train_tiny.TrainTinyConfig, config_file)


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    """The folder of a run that nobody disturbed."""
    run = Run.create(config, "train_tiny", root=tmp_path_factory.mktemp("runs"), name="whole")
    train_tiny.main(config, run)
    return run.folder


def without_times(folder):
    return [{k: v for k, v in line.items() if k != "seconds"} for line in Run(folder).metrics()]


def final_checkpoint(folder, config, role="target"):
    with train_tiny.open_checkpoints(folder / "checkpoints" / role) as checkpoints:
        return jax.tree.leaves(checkpoints.restore(getattr(config, f"{role}_training").steps))


def test_loss_falls_and_every_file_is_there(finished):
    lines = [line for line in Run(finished).metrics() if line["model"] == "target"]
    assert [line["step"] for line in lines] == list(range(2, 17, 2))
    assert lines[-1]["loss"] < 0.95 * lines[0]["loss"]
    assert {"step", "loss", "seconds", "held_out_loss"} <= lines[-1].keys()
    names = {path.name for path in finished.iterdir()}
    assert {"tiny.gguf", "tiny-draft.gguf", "loss.png", "results.json", "card.md", "config.toml"} <= names


def test_killed_and_resumed_equals_undisturbed(finished, config, config_file, tmp_path, monkeypatch):
    arguments = [str(config_file), "--runs", str(tmp_path), "--name", "killed"]
    environment = os.environ | {"PYTHONPATH": str(EXPERIMENTS.parent)}
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, *arguments], env=environment, capture_output=True, timeout=300
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    folder = tmp_path / "killed"
    checkpoints = folder / "checkpoints" / "target"
    assert Run(folder).metrics()[-1]["step"] == 10 and (checkpoints / "8").is_dir()
    # What a kill or a power cut in the middle of a save leaves behind:
    shutil.copytree(checkpoints / "8", checkpoints / "12.orbax-checkpoint-tmp-1")
    shutil.copytree(checkpoints / "8", checkpoints / "12")
    for path in (checkpoints / "12").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    monkeypatch.setattr(train_tiny, "write_report", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["train_tiny.py", *arguments, "--resume"])
    train_tiny.command(standalone_mode=False)

    assert without_times(folder) == without_times(finished)
    for role in train_tiny.ROLES:
        pairs = zip(final_checkpoint(folder, config, role), final_checkpoint(finished, config, role), strict=True)
        assert all(np.array_equal(a, b) for a, b in pairs)
    for name in ("tiny.gguf", "tiny-draft.gguf"):
        assert (folder / name).read_bytes() == (finished / name).read_bytes()


def test_resuming_a_finished_run_trains_no_step(finished, config, monkeypatch):
    before = (Run(finished).metrics(), (finished / "tiny.gguf").read_bytes())
    monkeypatch.setattr(train_tiny, "write_report", lambda *_: None)
    monkeypatch.setattr(train_tiny, "train_steps", lambda *_: pytest.fail("trained again"))
    train_tiny.main(config, Run.resume(config, "train_tiny", root=finished.parent, name=finished.name))
    assert before == (Run(finished).metrics(), (finished / "tiny.gguf").read_bytes())


def test_steps_in_one_call_equal_steps_one_by_one(config):
    corpus = train_tiny.make_corpus(config.text, config.seed)
    sizes, data = config.target.sizes(320), jnp.asarray(corpus.train_RT)

    def trained(steps_per_call):
        training = dataclasses.replace(config.target_training, steps_per_call=steps_per_call)
        params = realm.model.init_params(sizes, jax.random.key(0))
        state = train_tiny.TrainState(params, train_tiny.make_optimizer(training).init(params), jnp.int32(0))
        for _ in range(4 // steps_per_call):
            state, _ = train_tiny.train_steps(state, data, jax.random.key(1), sizes, training)
        return state

    for one, four in zip(jax.tree.leaves(trained(1)), jax.tree.leaves(trained(4)), strict=True):
        np.testing.assert_allclose(one, four, rtol=1e-5, atol=1e-6)


def test_weight_decay_touches_matrices_alone(config):
    params = realm.model.init_params(config.target.sizes(320), jax.random.key(0))
    optimizer = train_tiny.make_optimizer(dataclasses.replace(config.target_training, warmup=0))
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zero, optimizer.init(params), params)
    assert not any(update.any() for update in jax.tree.leaves(updates) if update.ndim == 1)
    assert all(update.any() for update in jax.tree.leaves(updates) if update.ndim == 2)


def test_exported_file_is_the_trained_model(finished, config):
    model = realm.load(finished / "tiny.gguf")
    metadata = {key: field.value for key, field in model.origin.fields.items()}
    assert metadata["general.name"] == "Target" and metadata["general.license"] == "apache-2.0"
    assert model.config == config.target.sizes(320)
    assert model.params.layers[0].attn.q.format == "Q8_0" and model.params.output is None
    with train_tiny.open_checkpoints(finished / "checkpoints" / "target") as checkpoints:
        trained = checkpoints.restore(16)["params"]
    np.testing.assert_array_equal(model.params.embedding, trained["embedding"])
    np.testing.assert_allclose(
        model.params.layers[0].ffn.down.dequantize(), trained["layers"][0]["ffn"]["down"], atol=2e-3
    )
    held_out = jnp.asarray(train_tiny.make_corpus(config.text, config.seed).held_out_RT)
    results = read_json(finished / "results.json")["models"]["target"]
    score, _ = tiny_report.score(model.params, model.config, held_out)
    assert results["held_out_loss_exported"] == pytest.approx(float(score))
    assert results["held_out_loss_exported"] == pytest.approx(results["training"]["held_out_loss"], rel=0.01)


def test_the_card_gets_its_results_from_the_run(finished, tmp_path):
    card = tmp_path / "README.md"
    with pytest.raises(RealmError, match="cannot read"):
        tiny_report.install_models(tmp_path, tmp_path)
    card.write_text("# no place")
    with pytest.raises(RealmError, match="has no results section"):
        tiny_report.install_models(finished, tmp_path)
    card.write_text(f"before\n{tiny_report.BEGIN}\nold\n{tiny_report.END}\nafter\n")
    for _ in range(2):
        tiny_report.install_models(finished, tmp_path)
    text = card.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    results = json.loads((finished / "results.json").read_text())
    assert text.count(f"{results['models']['target']['held_out_loss_exported']:.4f}") >= 1
    assert (tmp_path / "tiny.gguf").read_bytes() == (finished / "tiny.gguf").read_bytes()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("target_training.steps=7", "steps is 7; want a multiple of steps_per_call, 2"),
        ("draft_training.warmup=16", "warmup is 16 steps; want fewer than the 16 steps of training"),
        ("text.documents.poem=1", "unknown kind 'poem'"),
    ],
)
def test_configs_that_cannot_work_are_refused(config_file, override, message):
    with pytest.raises(RealmError, match=message):
        load_config(train_tiny.TrainTinyConfig, config_file, [override])


def test_first_matching_pattern_chooses_the_format():
    formats = {"*.attn_v.weight": "Q6_K", "blk.*": "Q4_K"}
    assert train_tiny.choose_format(formats, "blk.0.attn_v.weight", (1, 1)) == "Q6_K"
    assert train_tiny.choose_format(formats, "blk.0.attn_k.weight", (1, 1)) == "Q4_K"
    with pytest.raises(RealmError, match=r"no pattern matches the tensor 'token_embd.weight'"):
        train_tiny.choose_format(formats, "token_embd.weight", (1, 1))


def test_the_shipped_config_is_valid_and_fits_every_format():
    config = load_config(train_tiny.TrainTinyConfig, EXPERIMENTS.parent / "configs" / "train_tiny.toml")
    for model in (config.target, config.draft):
        assert model.width % 256 == model.ffn_width % 256 == (model.heads * model.head_width) % 256 == 0
