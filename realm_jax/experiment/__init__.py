"""The ground every experiment stands on: a typed config, a run directory, metrics and plots.

A config is one frozen dataclass, read from one TOML file and changed by `--set key=value`; everything a run
produces lies in one folder under `runs/`.
"""

from realm_jax.experiment.command import experiment_command, run_options
from realm_jax.experiment.config import dump_toml, load_config
from realm_jax.experiment.report import describe_run, markdown_table, new_figure, plot_curves, save_figure
from realm_jax.experiment.run import Run, read_json

__all__ = [
    "Run",
    "describe_run",
    "dump_toml",
    "experiment_command",
    "load_config",
    "markdown_table",
    "new_figure",
    "plot_curves",
    "read_json",
    "run_options",
    "save_figure",
]
