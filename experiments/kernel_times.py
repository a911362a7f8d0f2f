"""The time that a GPU spent in each kernel, from a folder that `jax.profiler.trace` wrote. Called by `decode_speed`.

python experiments/kernel_times.py FOLDER         print the table
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click
from jax.profiler import ProfileData

from realm_jax.errors import RealmError


def kernel_times(folder: str | Path) -> list[dict[str, Any]]:
    """Name, count and total microseconds of everything that ran on a GPU, the longest first.

    Empty where the trace has nothing of a device (on a CPU, or where the profiler may not look). RealmError where the
    folder has no trace.
    """
    files = sorted(Path(folder).rglob("*.xplane.pb"))
    if not files:
        raise RealmError(f"{folder}: has no trace (*.xplane.pb) of jax.profiler")
    return add_up(event for plane in ProfileData.from_file(str(files[-1])).planes for event in device_events(plane))


def device_events(plane: Any) -> Iterable[tuple[str, float]]:
    """(name, nanoseconds) of what ran on the streams of a GPU; lines that sum streams up are left out."""
    if not plane.name.startswith("/device:GPU"):
        return
    for line in plane.lines:
        if line.name.startswith("Stream"):
            yield from ((event.name, event.duration_ns) for event in line.events)


def add_up(events: Iterable[tuple[str, float]]) -> list[dict[str, Any]]:
    found: dict[str, list[float]] = {}
    for name, nanoseconds in events:
        found.setdefault(name, []).append(nanoseconds / 1e3)
    rows = [{"kernel": name, "count": len(times), "total_us": sum(times)} for name, times in found.items()]
    return sorted(rows, key=lambda row: -row["total_us"])


@click.command(help=__doc__.split("\n")[0])
@click.argument("folder", type=click.Path(path_type=Path))
def command(folder: Path) -> None:
    try:
        rows = kernel_times(folder)
    except RealmError as error:
        click.echo(f"error: {error}", err=True)
        raise SystemExit(1) from error
    for row in rows:
        click.echo(f"{row['total_us']:12.1f} us {row['count']:7}  {row['kernel']}")
    if not rows:
        click.echo("the trace has nothing of a GPU", err=True)


if __name__ == "__main__":
    command()
