"""`realm finetune`: train an adapter on a model's packed weights, as a config file says."""

import os
from pathlib import Path
from typing import Any

import click

from realm_jax.cli import output
from realm_jax.cli.options import common_options, file_argument
from realm_jax.cli.text import one_line
from realm_jax.experiment import Run, load_config, run_options

DETERMINISTIC = "--xla_gpu_deterministic_ops=true"


@click.command(name="finetune")
@file_argument("config", "CONFIG.toml")
@run_options
@common_options
def command(config: Path, overrides: tuple[str, ...], name: str | None, runs: str, resume: bool, as_json: bool) -> None:
    """Train a LoRA adapter on a GGUF model whose weights stay packed.

    CONFIG.toml says which model, what to learn from and how; configs/finetune.toml is an example with every key
    explained. The run directory gets the adapter as a PEFT folder and as GGUF, the losses and a plot. A run that was
    stopped goes on with --resume.
    """
    # On a GPU, scatter-adds and autotuned products differ from run to run unless told not to; XLA reads this once.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DETERMINISTIC}".strip()
    from realm_jax.finetune import FinetuneConfig, prepare, train_in

    loaded = load_config(FinetuneConfig, config, overrides)
    with output.waiting("loading the model and the data"):
        trainer = prepare(loaded, config.parent)  # before the run directory is made: a mistake leaves none behind
    results = train_in((Run.resume if resume else Run.create)(loaded, "finetune", root=runs, name=name), trainer)
    click.echo(_summary(results), err=True)
    if as_json:
        output.print_json(results)


def _summary(results: dict[str, Any]) -> str:
    """What came of it and what it took, for a person."""
    memory = {name: None if size is None else output.size_text(size) for name, size in results["memory"].items()}
    before, after = results["evaluation_loss_before"], results["evaluation_loss"]
    lines = {
        "loss": f"{results['loss']:.4f} nats a token on the last training rows",
        "held out": "no evaluation rows" if after is None else f"{before:.4f} before, {after:.4f} after",
        "speed": f"{results['steps']} steps in {results['seconds']:.1f} s: {results['tokens_per_second']:.0f} tokens/s",
        "memory": f"base weights {memory['base']} packed (dense: {memory['base_as_float32']} in float32, "
        f"{memory['base_as_bfloat16']} in bfloat16); adapter {memory['adapter']}, optimizer {memory['optimizer']}; "
        f"a step works in {memory['step_temporary']}"
        + (f"; peak of the device {memory['device_peak']}" if memory["device_peak"] else ""),
        "kept in": f"{results['run']}: {', '.join(results['files'])}",
    }
    return "\n".join(one_line(f"  {name:10}{value}") for name, value in lines.items())
