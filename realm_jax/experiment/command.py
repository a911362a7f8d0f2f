"""The command line that every script in `experiments/` shares."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click

from realm_jax.errors import RealmError
from realm_jax.experiment.config import load_config
from realm_jax.experiment.run import Run


def run_options(command: Callable[..., None]) -> Callable[..., None]:
    """Adds what names a run and changes its config: arguments `overrides`, `name`, `runs`, `resume`."""
    for option in (
        click.option("--resume", is_flag=True, help="Go on with the run NAME, or the newest one."),
        click.option("--runs", default="runs", show_default=True, help="Folder that holds the run directories."),
        click.option("--name", help="Name of the run directory (default: the experiment's name and the time)."),
        click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change one config value (TOML)."),
    ):
        command = option(command)
    return command


def experiment_command(main: Callable[..., None], cls: type, default_config: str | Path) -> click.Command:
    """The command line of one experiment: `[CONFIG] --set key=value --name NAME --runs FOLDER --resume`.

    Calls `main(config, run)` with the config and its run directory. A RealmError ends in one line on stderr
    and exit status 1.
    """
    stem = Path(default_config).stem

    @click.command(help=main.__doc__, context_settings={"help_option_names": ["-h", "--help"]})
    @click.argument("config", type=click.Path(path_type=Path), default=Path(default_config))
    @run_options
    def command(config: Path, overrides: tuple[str, ...], name: str | None, runs: str, resume: bool) -> None:
        try:
            loaded = load_config(cls, config, overrides)
            open_run = Run.resume if resume else Run.create
            main(loaded, open_run(loaded, stem, root=runs, name=name))
        except RealmError as error:
            click.echo(f"error: {error}", err=True)
            raise SystemExit(1) from error

    return command
