"""Compile for a GPU that is not there, and read what came out: registers, spills, instructions a weight, launches.

    python experiments/inspect_kernel.py matmul --format Q4_K --rows 1          machine code of a product
    python experiments/inspect_kernel.py step --layers 4 --batch 1              launches of a decoding step
    python experiments/inspect_kernel.py my_module:my_case --only matvec        a case of your own

A case is a function that returns (fn, args) or (fn, args, facts); options after its name are its arguments. args are
arrays or `jax.ShapeDtypeStruct`s; nothing is run. facts may hold weights= and bytes= of one call, trips=(n, ...), how
often each loop of the kernel runs, in code order (or a function that says so for the target), donate=, the numbers of
the arguments whose buffers are reused, and grid= and threads= (needed for Mosaic GPU only).

Instruction counts are for one thread over the whole kernel; all branches count as taken. Floors are what each unit
needs at the least if it never waits (`machine_code.clocks`): a kernel is slower than its worst one. Nothing is
autotuned here, so products that XLA itself compiles may come out otherwise on a GPU.
"""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

import click

import machine_code
from inspect_cases import case_command, find_case, read_options
from inspect_report import show_kernels, show_launches
from offline_gpu import TARGETS, Target, as_if_on, compile_case, prepare, tool
from realm_jax.errors import RealmError


def read_launches(out: Path) -> list[machine_code.Launch]:
    """What the compiled programs launch, as XLA leaves it: with its CUDA graphs."""
    launches = []
    for file in sorted(out.glob("xla/*.thunk_sequence.txt")):
        changed = file.with_name(file.name.replace("sequence", "sequence_after_thunk_passes"))
        launches += machine_code.read_launches((changed if changed.exists() else file).read_text())
    return launches


def read_kernels(out: Path, facts: dict[str, Any], target: Target, only: str) -> list[dict[str, Any]]:
    """Every kernel whose name has `only` (an expression) in it."""
    launches = {launch.name: launch for launch in read_launches(out)}
    kernels, done = [], set()
    for ptx in sorted(out.glob("xla/*.ptx")) + sorted(out.glob("mosaic/*.ptx")):
        names = set(re.findall(r"\.entry\s+(\w+)", ptx.read_text()))
        if not any(re.search(only, name) for name in names - done):
            continue
        resources, codes = assemble(out, ptx, target)
        for name in sorted(names & codes.keys() - done):
            if re.search(only, name):
                kernels.append(describe(name, resources[name], codes[name], launches.get(name), facts, target))
        done |= names
    return kernels


def assemble(out: Path, ptx: Path, target: Target) -> tuple[dict, dict]:
    """Assembled and disassembled: kernel -> resources, kernel -> code."""
    cubin = out / f"{ptx.name}.cubin"
    command = [tool("ptxas"), "-v", f"-arch=sm_{target.arch}", str(ptx), "-o", str(cubin)]
    done = subprocess.run(command, text=True, capture_output=True)
    if done.returncode:
        raise RealmError(f"{ptx}: ptxas: {done.stderr.strip().splitlines()[0]}")
    text = subprocess.run([tool("nvdisasm"), "-c", str(cubin)], text=True, capture_output=True).stdout
    (out / f"{ptx.name}.sass").write_text(text)
    return machine_code.read_ptxas(done.stderr), machine_code.read_sass(text)


def describe(
    name: str,
    resources: machine_code.Resources,
    code: machine_code.Code,
    launch: machine_code.Launch | None,
    facts: dict[str, Any],
    target: Target,
) -> dict[str, Any]:
    """The facts of one kernel, for the table and for --json."""
    grid, threads = (launch.grid, launch.threads) if launch else (facts.get("grid", 0), facts.get("threads", 0))
    trips = (*facts.get("trips", ()), *(1,) * len(code.loops))[: len(code.loops)]
    histogram, small = code.histogram(trips), Counter()
    for instruction, times in histogram.items():
        small[machine_code.short_name(instruction)] += times
    found = {
        "kernel": name, "grid": grid, "threads": threads, "registers": resources.registers,
        "spilled_bytes": resources.spilled, "shared_bytes": max(resources.shared, launch.shared if launch else 0),
        "trips_known": len(facts.get("trips", ())) >= len(code.loops),
        "instructions": len(code.body), "histogram": dict(small.most_common()),
        "loops": [{"instructions": b - a + 1, "trips": n} for (a, b), n in zip(code.loops, trips, strict=True)],
    }  # fmt: skip
    if grid and facts.get("weights"):
        warps = grid * threads / 32
        busy = machine_code.clocks(histogram, target.float_clocks)
        found["instructions_per_weight"] = busy["issue"] * grid * threads / facts["weights"]
        found["floors_us"] = {unit: n * warps / (target.cores * 4 * target.ghz * 1e3) for unit, n in busy.items()}
        if "bytes" in facts:
            found["at_most_gb_per_s"] = facts["bytes"] / max(found["floors_us"].values()) / 1e3
    return found


def summarize_launches(launches: list[machine_code.Launch]) -> dict[str, Any]:
    """How many launches, by where they stand; for each outermost loop, those of one turn by name."""
    loops = []
    for number in sorted({one.loop for one in launches if one.loop is not None}):
        turn = [one for one in launches if one.loop == number]
        names = Counter(re.sub(r"(__\d+|(?<=[a-z])_\d+)$", "", one.name) for one in turn)
        loops.append({
            "launches": len(turn), "in_graph": sum(one.graph for one in turn),
            "in_inner_loops": sum(one.depth > 1 for one in turn), "by_name": dict(names.most_common()),
        })  # fmt: skip
    outside = [one for one in launches if one.loop is None]
    return {"outside": len(outside), "outside_in_graph": sum(one.graph for one in outside), "loops": loops}


@case_command(__doc__.split("\n")[0], "runs/inspect")
@click.option("--only", metavar="REGEX", help="Only kernels whose name matches; with `step`, their machine code too.")
@click.option("--trips", metavar="N,...", help="How often each loop of the kernel runs, in place of the case's facts.")
@click.option("--thunks", is_flag=True, help="List every launch.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def command(
    case: str, options: tuple[str, ...], target: str, out: Path, only: str | None, trips: str | None, thunks: bool,
    as_json: bool,
) -> None:  # fmt: skip
    found = look(case, list(options), TARGETS[target], out, only, trips)
    launches = found.pop("list")
    if as_json:
        click.echo(json.dumps(found | ({"launch_list": [one._asdict() for one in launches]} if thunks else {})))
        return
    click.echo(f"{case} for {found['target']}: compiled in {found['compile_seconds']:.1f} s; files in {out}")
    show_kernels(found["kernels"])
    show_launches(found["launches"], launches if thunks else [])


def look(case: str, words: list[str], target: Target, out: Path, only: str | None, trips: str | None) -> dict[str, Any]:
    """Compile a case and read everything about it."""
    if trips is not None and not re.fullmatch(r"\d+(,\d+)*", trips):
        raise RealmError(f"--trips {trips!r}: want whole numbers, as in 16 or 4,8")
    prepare(out)  # first: a case may import JAX
    function = find_case(case)
    options = read_options(function, words)
    fn, args, *rest = function(**options)
    facts = dict(rest[0]) if rest else {}
    if trips:
        facts["trips"] = tuple(map(int, trips.split(",")))
    started = time.perf_counter()
    compiled = compile_case(fn, args, target, facts.get("donate", ()))
    seconds = time.perf_counter() - started
    if callable(facts.get("trips")):
        with as_if_on(target):
            facts["trips"] = facts["trips"]()
    (out / "optimized_hlo.txt").write_text(compiled.as_text())
    launches = read_launches(out)
    read_code = only is not None or not facts.get("thunks")
    return {
        "case": case, "options": options, "target": target.name, "compile_seconds": seconds,
        "kernels": read_kernels(out, facts, target, only or "") if read_code else [],
        "launches": summarize_launches(launches), "list": launches,
    }  # fmt: skip


if __name__ == "__main__":
    command()
