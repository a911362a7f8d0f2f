"""Checkpoints and the progress bar of training runs. Called by `realm_jax.finetune` and `experiments/train_tiny.py`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TypeVar

import orbax.checkpoint as ocp
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

State = TypeVar("State")


def open_checkpoints(folder: Path) -> ocp.CheckpointManager:
    """Two newest checkpoints are kept; each appears under its name only when it is complete."""
    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    return ocp.CheckpointManager(folder.absolute(), options=options)


def save_checkpoint(checkpoints: ocp.CheckpointManager, step: int, state: object) -> None:
    """Keeps a pytree of arrays as the checkpoint of a step, on disk when this returns."""
    checkpoints.save(step, args=ocp.args.StandardSave(state))


def restore_newest(checkpoints: ocp.CheckpointManager, state: State) -> State:
    """The newest checkpoint that can be read, or `state` where there is none; unreadable ones are removed."""
    for step in sorted(checkpoints.all_steps(), reverse=True):
        try:
            return checkpoints.restore(step, args=ocp.args.StandardRestore(state))
        except (OSError, ValueError, KeyError) as error:
            print(f"checkpoint {step} cannot be read ({type(error).__name__}), trying an older one", file=sys.stderr)
            checkpoints.delete(step)
    return state


def progress_bar(console: Console) -> Progress:
    """A bar of steps done, shown on terminals alone; its tasks have a field `loss`, text."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, TextColumn("{task.fields[loss]}"), console=console, disable=not console.is_terminal)
