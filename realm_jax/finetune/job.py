"""`finetune`: from a config to an adapter on disk, with a run directory that an interrupted run goes on from.

The run directory holds what every experiment's does (config.toml, environment.json, metrics.jsonl) and checkpoints/,
adapter/ (PEFT), adapter.gguf, loss.png and results.json.
"""

import hashlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from realm_jax.errors import RealmError
from realm_jax.experiment import Run, plot_curves, read_json
from realm_jax.experiment.checkpoints import open_checkpoints, progress_bar
from realm_jax.finetune.config import AdapterConfig, FinetuneConfig
from realm_jax.finetune.data import find_path, load_data
from realm_jax.finetune.memory import memory_report
from realm_jax.finetune.train import Trainer, run_steps
from realm_jax.lora import Adapter, init_adapter
from realm_jax.lora.files import load_adapter, save_adapter
from realm_jax.model import load
from realm_jax.model.model import Model


def finetune(config: FinetuneConfig, run: Run, folder: Path | None = None) -> dict[str, Any]:
    """Trains an adapter as the config says: what results.json holds. See `prepare` and `train_in`."""
    return train_in(run, prepare(config, folder))


def prepare(config: FinetuneConfig, folder: Path | None = None) -> Trainer:
    """The model, the rows and the adapter of a config, ready to train: whatever is wrong with them shows here.

    folder: of the config file, see `FinetuneConfig`. Raises RealmError for what cannot serve.
    """
    model = load(find_path(config.model, folder) if config.model else None)
    data = load_data(model, config.data, config.seed, folder)
    adapter = start_adapter(model, config.adapter, config.seed, folder)
    return Trainer(model, data, config.training, adapter, config.seed)


def train_in(run: Run, trainer: Trainer) -> dict[str, Any]:
    """Trains in a run directory: what results.json holds. Tells what it does on stderr.

    Where the run has checkpoints, training goes on from the newest, and ends with the same bytes as a run that was not
    interrupted. Raises RealmError where it was begun with another model, other data or another starting adapter.
    """
    console = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
    _check_inputs(run, trainer)
    adapter = trainer.start
    for note in (f"{trainer.model!r}", *trainer.data.notes, f"{adapter!r}, {adapter.size:,} numbers to train"):
        console.print(note)
    compiled = trainer.compile()
    _train(trainer, run, console)
    results = _results(trainer, run) | {"memory": memory_report(trainer.model.params, trainer.state, compiled)}
    results["files"] = _save(trainer.adapter(), trainer.model, run, console)
    _plot(run)
    run.save_json("results.json", results)
    return results


def start_adapter(model: Model, config: AdapterConfig, seed: int, folder: Path | None = None) -> Adapter:
    """The adapter that training begins with: a new one, or the one of `config.start`."""
    if config.start:
        return load_adapter(find_path(config.start, folder), model)
    return init_adapter(
        model,
        jax.random.fold_in(jax.random.key(seed), 0),
        rank=config.rank,
        alpha=config.alpha,
        targets=config.targets,
        rslora=config.rslora,
        dora=config.dora,
    )


def _train(trainer: Trainer, run: Run, console: Console) -> None:
    """To the last step, from the newest checkpoint where the run has one."""

    def log(values: dict[str, Any]) -> None:
        run.log(**values)
        if "evaluation_loss" in values:
            loss = f"loss {values['loss']:.4f}, " if "loss" in values else ""
            console.print(f"step {values['step']}: {loss}evaluation {values['evaluation_loss']:.4f}")
        progress.update(task, loss=f"loss {values['loss']:.3f}" if "loss" in values else "")

    with open_checkpoints(run.folder / "checkpoints") as checkpoints, progress_bar(console) as progress:
        trainer.restore(checkpoints)
        run.keep_metrics(lambda line: trainer.step > 0 and line["step"] <= trainer.step)
        task = progress.add_task("steps", total=trainer.training.steps, completed=trainer.step, loss="")
        run_steps(trainer, log=log, on_step=lambda step: progress.update(task, completed=step), checkpoints=checkpoints)


def _check_inputs(run: Run, trainer: Trainer) -> None:
    """Keeps digests of what the run is made from; RealmError where it was begun with something else."""
    rows = [x for x in (trainer.data.train, trainer.data.evaluation) if x is not None]
    arrays = {
        "base model": trainer.model.params,
        "data": [(x.tokens_RT, x.learned_RT, x.first_RT) for x in rows],
        "starting adapter": trainer.start.deltas,
    }
    digests = {name: _digest(tree) for name, tree in arrays.items()}
    path = run.folder / "inputs.json"
    if not path.exists():
        run.save_json(path.name, digests)
        return
    begun = read_json(path)
    for name, digest in digests.items():
        if begun.get(name) != digest:
            raise RealmError(f"{run.folder}: was begun with another {name}; resume with the same or start a new run")


def _digest(tree: Any) -> str:
    digest = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(tree):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(array.view(np.uint8).data if array.size else b"")
    return digest.hexdigest()


def _results(trainer: Trainer, run: Run) -> dict[str, Any]:
    lines = run.metrics()
    steps = [line for line in lines if "loss" in line]
    evaluated = [line["evaluation_loss"] for line in lines if "evaluation_loss" in line]
    seconds = sum(line["seconds"] for line in steps)
    tokens = sum(line["tokens_per_second"] * line["seconds"] for line in steps)
    return {
        "run": str(run.folder),
        "model": trainer.model.origin.source,
        "adapter": repr(trainer.start),
        "trained_numbers": trainer.start.size,
        "data": list(trainer.data.notes),
        "steps": trainer.step,
        "loss": steps[-1]["loss"],
        "evaluation_loss_before": evaluated[0] if evaluated else None,
        "evaluation_loss": evaluated[-1] if evaluated else None,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
    }


def _save(adapter: Adapter, model: Model, run: Run, console: Console) -> list[str]:
    """Writes the adapter as PEFT, and as GGUF where that can hold it; the names of the files."""
    save_adapter(adapter, run.folder / "adapter", base=model)
    if any(delta.magnitude is not None for _, delta in adapter.items()):
        console.print("a DoRA adapter has no GGUF form: it is kept as PEFT alone")
        return ["adapter"]
    save_adapter(adapter, run.folder / "adapter.gguf", base=model)
    return ["adapter", "adapter.gguf"]


def _plot(run: Run) -> None:
    curves = {}
    for key, label in (("loss", "training"), ("evaluation_loss", "evaluation")):
        points = [(line["step"], line[key]) for line in run.metrics() if key in line]
        if points:
            curves[label] = tuple(zip(*points, strict=True))
    plot_curves(run.folder / "loss.png", curves, title="Finetuning", y_label="loss (nats a token)")
