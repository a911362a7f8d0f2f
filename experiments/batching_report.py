"""What `batching_throughput` found: medians, ratios, tables, the plot. Plain numbers in, files out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from realm_jax.experiment import describe_run, markdown_table, new_figure, save_figure

Line = dict[str, Any]
LATENCIES = ("first", "between", "pause", "total")
LABELS = {
    "sequential": "one after another", "static": "static batches", "engine": "engine",
    "llama.cpp sequential": "llama.cpp, one after another", "llama.cpp": "llama.cpp, continuous",
}  # fmt: skip


def summarize(lines: Sequence[Line]) -> Line:
    """offline: an entry for each way and number of slots; load: for each load and way; host: the line, or None."""
    offline, load = ([line for line in lines if line["kind"] == kind] for kind in ("offline", "load"))
    found = [_summarize(group) for group in _groups(offline, ("way", "slots"))]
    speeds = {(one["way"], one["slots"]): one["tokens_per_second"][1] for one in found}
    for one in found:
        family = "llama.cpp " if one["way"].startswith("llama.cpp") else ""
        for name, key in (("sequential", (f"{family}sequential", 1)), ("static", ("static", one["slots"]))):
            known = key in speeds and not (family and name == "static")  # its own were not measured
            one[f"over_{name}"] = one["tokens_per_second"][1] / speeds[key] if known else None
    return {
        "offline": sorted(found, key=lambda one: (list(LABELS).index(one["way"]), one["slots"])),
        "load": [_summarize(group) for group in _groups(load, ("load", "way"))],
        "host": next((line for line in lines if line["kind"] == "host"), None),
        "load_average": [float(np.max([line["load_average"] for line in (*offline, *load)]))] if offline else [],
    }


def _groups(lines: Sequence[Line], keys: tuple[str, ...]) -> list[list[Line]]:
    names = dict.fromkeys(tuple(line[key] for key in keys) for line in lines)
    return [[line for line in lines if tuple(line[key] for key in keys) == name] for name in names]


def _summarize(group: list[Line]) -> Line:
    """Runs of one thing: least, median and largest speed; latencies of the requests of all runs together."""
    speeds = [line["tokens"] / line["seconds"] for line in group]
    kept = ("way", "slots", "load", "rate")
    engine = ("calls", "occupied", "call_seconds", "host_seconds")
    return {
        **{key: group[0][key] for key in kept if key in group[0]},
        **{key: float(np.median([line[key] for line in group])) for key in engine if key in group[0]},
        "tokens_per_second": [min(speeds), float(np.median(speeds)), max(speeds)],
        **{name: quantiles([value for line in group for value in line["latency"][name]]) for name in LATENCIES},
    }


def quantiles(values: Sequence[float | None]) -> list[float] | None:
    """The median and the 95% quantile of those that are there."""
    there = [value for value in values if value is not None]
    return np.quantile(there, [0.5, 0.95]).tolist() if there else None


# --- tables ----------------------------------------------------------------------------------------------------------


def results(summary: Line, about: str, environment: Line) -> str:
    """Tables of throughput, of latency under load, and of the host's time, and what they were made with."""
    text = (
        f"Made by {describe_run(environment)}.\n\n{about}.\n\n"
        "All requests at once. Tokens/s: median of the runs (least to largest). Occupied: slots, on average over "
        "calls. Times, over requests: median / 95%. First: until the first tokens of a request. Between: from there to "
        f"its last, a token. Static and sequential `generate` hand out text at the end.\n\n{_offline_table(summary)}"
    )
    if summary["load"]:
        text += (
            "\nRequests arrive at random, at shares of what the engine could take, the same for all. Static batches "
            "hand out text as it comes. Pause: the longest in a request, between two pieces of text.\n\n"
            f"{_load_table(summary)}"
        )
    if summary["host"]:
        text += f"\n{_host_text(summary['host'])}\n"
    return text


def _offline_table(summary: Line) -> str:
    header = [
        "way", "slots", "tokens/s", "over sequential", "over static", "occupied", "first, s", "between, ms", "total, s",
    ]  # fmt: skip
    return markdown_table(
        header,
        [
            [
                LABELS[one["way"]],
                str(one["slots"]),
                "{1:.0f} ({0:.0f} to {2:.0f})".format(*one["tokens_per_second"]),
                *("-" if one[key] is None else f"{one[key]:.2f}" for key in ("over_sequential", "over_static")),
                f"{one['occupied']:.1f}" if "occupied" in one else "-",
                _pair(one["first"]),
                "-" if one["way"] in ("sequential", "static") else _pair(one["between"], 1e3, 1),
                _pair(one["total"]),
            ]
            for one in summary["offline"]
        ],
    )


def _load_table(summary: Line) -> str:
    header = ["load", "way", "slots", "requests/s", "tokens/s", "first, s", "between, ms", "pause, ms", "total, s"]
    return markdown_table(
        header,
        [
            [
                f"{one['load']:.0%}",
                LABELS[one["way"]],
                str(one["slots"]),
                f"{one['rate']:.1f}",
                f"{one['tokens_per_second'][1]:.0f}",
                _pair(one["first"]),
                _pair(one["between"], 1e3, 1),
                _pair(one["pause"], 1e3, 0),
                _pair(one["total"]),
            ]
            for one in summary["load"]
        ],
    )


def _pair(values: list[float] | None, scale: float = 1.0, digits: int = 2) -> str:
    return "-" if values is None else " / ".join(f"{value * scale:.{digits}f}" for value in values)


def _host_text(host: Line) -> str:
    median, high = (1e3 * value for value in host["seconds"])
    return (
        f"Host time between two calls: {median:.2f} ms (95%: {high:.2f} ms; "
        f"{host['calls']} calls, {host['slots']} slots, a model of {host['layers']} layers and {host['arrays']} "
        f"arrays), and {1e3 * host['dispatch_seconds']:.2f} ms to start a call. A step of the large model takes "
        f"{1e3 * host['step_seconds']:.2f} ms at least, {host['steps']} in a call: the device would "
        f"wait {host['share']:.1%} of that time. Where newcomers are let in, that "
        f"and starting on their prompts is {1e3 * host['joined_seconds'][0]:.2f} ms ({host['joined_calls']} calls), or "
        f"{host['joined_share']:.1%}, in part of which the device is at work."
    )


# --- plot ------------------------------------------------------------------------------------------------------------


def plot_throughput(path: Path, summary: Line) -> Path:
    """Tokens/s over slots, and latency over load: median drawn through, 95% dashed."""
    figure = new_figure(11 if summary["load"] else 5, 3.4)
    left, *others = figure.subplots(1, 3 if summary["load"] else 1, squeeze=False)[0]
    ways = list(dict.fromkeys(one["way"] for one in summary["offline"]))
    colors = {way: f"C{i}" for i, way in enumerate(LABELS)}
    for way in ways:
        own = [one for one in summary["offline"] if one["way"] == way]
        low, middle, high = np.array([one["tokens_per_second"] for one in own]).T
        slots = [one["slots"] for one in own]
        style = "s" if "sequential" in way else "o-"
        left.errorbar(slots, middle, [middle - low, high - middle], fmt=style, color=colors[way], capsize=2)
        left.plot([], [], style, color=colors[way], label=LABELS[way])
    left.set_xscale("log", base=2)
    ticks = sorted({one["slots"] for one in summary["offline"]})
    left.set_xticks(ticks, [str(slots) for slots in ticks])
    left.set(xlabel="slots", ylabel="tokens/s, all requests at once", ylim=(0, None))
    for axes, (name, text) in zip(
        others, (("first", "to the first token"), ("total", "to the last token")), strict=False
    ):
        for way in ways:
            own = [one for one in summary["load"] if one["way"] == way]
            loads = [one["load"] for one in own]
            for quantile, line in enumerate(("o-", "o--")):
                axes.plot(loads, [one[name][quantile] for one in own], line, color=colors[way], markersize=4)
        axes.set(xlabel="load", ylabel=f"seconds {text}", yscale="log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    figure.legend(loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    return save_figure(figure, path)
