"""`realm finetune`: the run directory, going on after a kill to the very same bytes, what is said, what is refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import realm_jax as realm
from realm_jax.cli.main import run as run_command
from realm_jax.experiment import Run, load_config, read_json
from realm_jax.finetune import FinetuneConfig, finetune, job, load_data, mean_loss

ROOT = Path(__file__).parents[1]
CONFIG = """
model = "small.gguf"
seed = 3
[adapter]
rank = 4
alpha = 8.0
dora = {dora}
[data]
train = "data.jsonl"
evaluation_share = 0.2
row_tokens = 24
[training]
steps = 12
batch = 4
accumulate = 2
learning_rate = 1e-2
warmup = 2
log_every = 2
evaluate_every = 4
checkpoint_every = 4
"""

# Trains as the command does, and is killed without warning once step 10 is in metrics.jsonl.
KILLED = """
import os, signal, sys
from realm_jax.cli.main import main
from realm_jax.experiment import Run

log = Run.log
def log_then_die(run, **values):
    log(run, **values)
    if values["step"] == 10:
        os.kill(os.getpid(), signal.SIGKILL)

Run.log = log_then_die
main(["finetune", *sys.argv[1:]])
"""


@pytest.fixture(scope="module")
def folder(make_model_file, tmp_path_factory):
    """A folder with a model, data, and configs with and without DoRA."""
    path = tmp_path_factory.mktemp("finetune")
    shutil.copy(make_model_file("small-q8.gguf", format="Q8_0"), path / "small.gguf")
    lines = [
        {"prompt": f"the {word} in", "completion": f" {word * 2}"} for word in ("cat", "dog", "hen", "fox", "owl") * 3
    ]
    (path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path / "plain.toml").write_text(CONFIG.format(dora="false"))
    (path / "dora.toml").write_text(CONFIG.format(dora="true"))
    return path


@pytest.fixture(scope="module")
def finished(folder):
    """The folder of a run that nobody disturbed."""
    config = load_config(FinetuneConfig, folder / "plain.toml")
    finetune(config, Run.create(config, "finetune", root=folder / "runs", name="whole"), folder)
    return folder / "runs" / "whole"


@pytest.fixture
def cli(capsys, monkeypatch):
    """Runs `realm finetune`: exit status, stdout, stderr."""
    monkeypatch.setenv("XLA_FLAGS", "")

    def call(*args):
        status = run_command(["finetune", *map(str, args)])
        return status, *capsys.readouterr()

    return call


def without_times(folder):
    timed = ("seconds", "tokens_per_second")
    return [{k: v for k, v in line.items() if k not in timed} for line in Run(folder).metrics()]


def adapter_bytes(folder):
    files = [*sorted((folder / "adapter").iterdir()), *folder.glob("adapter.gguf")]
    return {file.name: file.read_bytes() for file in files}


def test_everything_is_there_and_true(finished, folder):
    names = {path.name for path in finished.iterdir()}
    wanted = {"config.toml", "environment.json", "inputs.json", "metrics.jsonl", "results.json", "loss.png"}
    assert names == wanted | {"checkpoints", "adapter", "adapter.gguf"}
    lines, results = Run(finished).metrics(), read_json(finished / "results.json")
    assert [line["step"] for line in lines] == [0, 2, 4, 6, 8, 10, 12]
    assert [line["step"] for line in lines if "evaluation_loss" in line] == [0, 4, 8, 12]
    assert lines[1].keys() == {"step", "loss", "learning_rate", "gradient_norm", "tokens_per_second", "seconds"}
    assert results["evaluation_loss"] < 0.8 * results["evaluation_loss_before"]
    model, config = realm.load(folder / "small.gguf"), load_config(FinetuneConfig, folder / "plain.toml")
    rows = load_data(model, config.data, config.seed, folder).evaluation
    assert mean_loss(model, rows, config.training) == pytest.approx(results["evaluation_loss_before"], rel=1e-6)
    for name in results["files"]:  # both files are the adapter that was measured
        adapter = realm.load_adapter(finished / name, model)
        assert mean_loss(model, rows, config.training, adapter) == pytest.approx(results["evaluation_loss"], rel=1e-6)
    memory = results["memory"]
    assert (
        memory["base"] < 0.4 * memory["base_as_float32"] and memory["base_as_float32"] == 2 * memory["base_as_bfloat16"]
    )
    assert memory["adapter"] == 4 * results["trained_numbers"] and memory["optimizer"] > 2 * memory["adapter"]
    assert memory["step_temporary"] > 0


def killed_and_resumed(cli, folder, config, runs):
    arguments = [str(folder / config), "--runs", str(runs), "--name", "killed"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, *arguments], env=environment, capture_output=True, timeout=600
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert Run(runs / "killed").metrics()[-1]["step"] == 10
    checkpoints = runs / "killed" / "checkpoints"
    # What a kill or a power cut in the middle of a save leaves behind:
    shutil.copytree(checkpoints / "8", checkpoints / "12")
    for path in (checkpoints / "12").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    status, _, err = cli(*arguments, "--resume")
    assert status == 0, err
    return runs / "killed"


def test_killed_and_resumed_ends_with_the_same_bytes(finished, folder, cli, tmp_path):
    killed = killed_and_resumed(cli, folder, "plain.toml", tmp_path)
    assert without_times(killed) == without_times(finished)
    assert adapter_bytes(killed) == adapter_bytes(finished)


@pytest.mark.slow
def test_dora_killed_and_resumed(folder, cli, tmp_path):
    status, out, err = cli(folder / "dora.toml", "--runs", tmp_path, "--name", "whole", "--json")
    assert status == 0, err
    assert json.loads(out)["files"] == ["adapter"] and "no GGUF form" in err
    killed = killed_and_resumed(cli, folder, "dora.toml", tmp_path)
    assert without_times(killed) == without_times(tmp_path / "whole")
    assert adapter_bytes(killed) == adapter_bytes(tmp_path / "whole")


def test_resuming_a_finished_run_trains_no_step(finished, folder, cli, monkeypatch):
    before = without_times(finished), adapter_bytes(finished)
    monkeypatch.setattr(job.Trainer, "advance", lambda *_: pytest.fail("trained again"))
    status, out, err = cli(folder / "plain.toml", "--runs", finished.parent, "--name", "whole", "--resume", "--json")
    assert status == 0, err
    assert before == (without_times(finished), adapter_bytes(finished))
    assert json.loads(out) == read_json(finished / "results.json")
    assert "packed (dense:" in err and "kept in" in err and "Traceback" not in err


def test_resume_refuses_what_has_changed(finished, folder, cli, tmp_path):
    arguments = [folder / "plain.toml", "--runs", tmp_path, "--name", "whole", "--resume"]
    shutil.copytree(finished, tmp_path / "whole")
    status, out, err = cli(*arguments, "--set", "training.learning_rate=1e-3")
    assert (status, out) == (1, "") and "made with another config: 'training.learning_rate'" in err
    for name, there in (("data.jsonl", '{"text": "other"}\n' * 3), ("small.gguf", None)):
        kept = (folder / name).read_bytes()
        try:
            if there is None:
                model = realm.load(folder / name)
                norm = model.params.norm.at[0].add(1e-3)
                realm.save(model.replace(params=model.params.replace(norm=norm)), folder / name)
            else:
                (folder / name).write_text(there)
            status, out, err = cli(*arguments)
        finally:
            (folder / name).write_bytes(kept)
        assert (status, out) == (1, "") and err.count("\n") == 1
        assert f"was begun with another {'data' if there else 'base model'}; resume with the same" in err


def test_an_adapter_goes_on_from_another(finished, folder, cli, tmp_path):
    changes = (
        "training.steps=2",
        "training.warmup=0",
        f"adapter.start={finished / 'adapter'}",
        "training.learning_rate=1e-9",
    )
    arguments = [word for change in changes for word in ("--set", change)]
    status, out, err = cli(folder / "plain.toml", "--runs", tmp_path, *arguments, "--json")
    assert status == 0, err
    wanted = read_json(finished / "results.json")["evaluation_loss"]
    assert json.loads(out)["evaluation_loss_before"] == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["training.step=3"], "unknown key 'training.step'"),
        (["adapter.rank=0"], "rank is 0"),
        (['adapter.targets=["q", "x"]'], "target 'x' is not known"),
        (["adapter.start=none"], "none"),
        (["model=none.gguf"], "none.gguf"),
        (["data.train=none.jsonl"], "none.jsonl: cannot be read: No such file or directory"),
        (["data.train=bad.jsonl"], "bad.jsonl:2: not JSON"),
        (["data.row_tokens=97"], "data.row_tokens is 97; small.gguf is made for a context of 96"),
        (["training.warmup=12"], "training.warmup is 12 steps; want fewer than the 12 steps"),
        (["training.optimizer=adam"], "'training.optimizer' must be one of"),
        (["model=silent.gguf"], "silent.gguf: has no tokenizer"),
    ],
)
def test_mistakes_are_one_line(folder, cli, tmp_path, changes, message):
    (folder / "bad.jsonl").write_text('{"text": "good"}\n{"text": \n')
    if not (folder / "silent.gguf").exists():
        model = realm.load(folder / "small.gguf")
        fields = {k: v for k, v in model.origin.fields.items() if not k.startswith("tokenizer.")}
        silent = model.replace(origin=type(model.origin)("silent.gguf", fields, model.origin.names))
        realm.save(silent, folder / "silent.gguf")
    arguments = [word for change in changes for word in ("--set", change)]
    status, out, err = cli(folder / "plain.toml", "--runs", tmp_path, *arguments)
    assert (status, out, err.count("\n")) == (1, "", 1), err
    assert err.startswith("error: ") and message in err
    assert not list(tmp_path.iterdir()), "a run directory is left of what was never begun"


def test_missing_files_and_runs(folder, cli, tmp_path):
    status, out, err = cli(tmp_path / "none.toml")
    assert (status, out) == (1, "") and "none.toml: cannot read the config" in err
    status, out, err = cli(folder / "plain.toml", "--runs", tmp_path, "--resume")
    assert (status, out) == (1, "") and "no run to resume" in err


def test_the_shipped_example_has_every_key_and_its_data_can_be_read():
    path = ROOT / "configs" / "finetune.toml"
    config = load_config(FinetuneConfig, path)
    text = path.read_text()
    for part in (config.adapter, config.data, config.training):
        assert all(f"\n{key} = " in text for key in vars(part) if key != "epochs"), part
    data = load_data(realm.load(), config.data, config.seed, path.parent)
    assert len(data.evaluation) > 0 and np.mean(data.train.count_R) > 0.7 * config.data.row_tokens
