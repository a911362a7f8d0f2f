"""What `inspect_kernel` found, as text for people."""

from __future__ import annotations

from typing import Any

import click

from machine_code import Launch

# fmt: off
SHOWN = (
    "LDG.128", "LDG.64", "LDG.32", "LDG.16", "LDG.8", "LDGSTS", "UTMALDG", "LDS", "LDSM", "STS", "LOP3", "SHF", "PRMT",
    "IMAD", "IADD3", "I2F", "FFMA", "FADD", "FMUL", "HFMA2", "HADD2", "HMUL2", "F2F", "IDP", "HMMA", "IMMA", "HGMMA",
    "SHFL", "BAR", "LDL", "STL",
)
# fmt: on
MOST_NAMES = 30


def show_kernels(kernels: list[dict[str, Any]]) -> None:
    """A paragraph for each kernel."""
    for one in kernels:
        loops = "".join(f", a loop of {loop['instructions']} x {loop['trips']}" for loop in one["loops"])
        click.echo(
            f"\n{one['kernel']}: grid {one['grid']} x {one['threads']} threads, {one['registers']} registers, "
            f"{one['spilled_bytes']} B spilled, {one['shared_bytes']} B shared, "
            f"{one['instructions']} instructions{loops}"
        )
        counts = one["histogram"]
        click.echo("  " + "  ".join(f"{name} {counts[name]}" for name in SHOWN if name in counts))
        click.echo("  other: " + "  ".join(f"{k} {n}" for k, n in counts.items() if k not in SHOWN and n > 2))
        if "floors_us" in one:
            most = f"; at most {one['at_most_gb_per_s']:.0f} GB/s" if "at_most_gb_per_s" in one else ""
            floors = "  ".join(f"{unit} {us:.1f}" for unit, us in one["floors_us"].items())
            click.echo(f"  {one['instructions_per_weight']:.2f} instructions a weight; floors in us: {floors}{most}")
            if not one["trips_known"]:
                click.echo("  (its loops are counted as run once: say with --trips how often they do)")


def show_launches(found: dict[str, Any], every: list[Launch]) -> None:
    """How many launches and where; `every`: those to list one by one."""
    click.echo(f"\noutside loops: {found['outside']} launches, {found['outside_in_graph']} of them in command buffers")
    for number, loop in enumerate(found["loops"]):
        inner = f"; {loop['in_inner_loops']} in loops within, counted once" if loop["in_inner_loops"] else ""
        click.echo(
            f"a turn of loop {number}: {loop['launches']} launches, {loop['in_graph']} of them in command buffers"
            + inner
        )
        names = list(loop["by_name"].items())
        for name, times in names[:MOST_NAMES]:
            click.echo(f"  {times:5} {name}")
        if len(names) > MOST_NAMES:
            click.echo(f"  {sum(times for _, times in names[MOST_NAMES:]):5} of {len(names) - MOST_NAMES} other names")
    for one in every:
        where = "outside" if one.loop is None else f"loop {one.loop} {one.part}"
        size = f"  {one.grid} x {one.threads} threads, {one.shared} B shared" if one.grid else ""
        click.echo(f"{where:18} {'graph' if one.graph else 'alone'}  {one.name}{size}")
