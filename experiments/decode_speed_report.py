"""What `decode_speed` found: tables and a plot. Plain numbers in, files out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from realm_jax.experiment import describe_run, markdown_table, new_figure, save_figure

Line = dict[str, Any]
MOST_KERNELS = 20


def results(lines: list[Line], profiles: dict[str, Any], about: str, environment: dict[str, Any]) -> str:
    """The tables, and what they were made with."""
    text = f"Made by {describe_run(environment)}.\n\n{about}. Medians, with the least and the most of the repeats.\n"
    prefill = [line for line in lines if line["kind"] == "prefill"]
    if prefill:
        header = ["mix", "rows", "prefill, tokens/s", "matmul", "compile, s"]
        rows = [[one["mix"], str(one["batch"]), spread(one), one["impl"], f"{one['compile_seconds']:.1f}"]
                for one in prefill]  # fmt: skip
        text += f"\n{markdown_table(header, rows)}"
    text += f"\n{decode_table([line for line in lines if line['kind'] == 'decode'])}"
    for name, profile in profiles.items():
        text += f"\n{kernel_table(name, profile)}"
    return text


def decode_table(lines: list[Line]) -> str:
    header = ["mix", "batch", "tokens/s", "step, ms", "GB a step", "floor, tokens/s", "of the floor", "matmul",
              "compile, s", "from the cache, s"]  # fmt: skip
    rows = [
        [
            named(one), str(one["batch"]), spread(one), f"{1e3 * one['step_seconds']:.3f}",
            f"{one['step_bytes'] / 1e9:.3f}", f"{one['floor_tokens_per_second']:,.0f}", f"{one['share_of_floor']:.1%}",
            one["impl"], f"{one['compile_seconds']:.1f}",
            "" if one["warm_start_seconds"] is None else f"{one['warm_start_seconds']:.1f}",
        ]
        for one in lines
    ]  # fmt: skip
    return markdown_table(header, rows)


def kernel_table(name: str, profile: dict[str, Any]) -> str:
    """Time by kernel, of one step."""
    steps, kernels = profile["steps"], profile["kernels"]
    if not kernels:
        return f"{name}: {profile.get('error', 'the profile has nothing of a GPU')}.\n"
    total = sum(one["total_us"] for one in kernels)
    rows = [
        [one["kernel"], *(f"{one[key] / steps:.1f}" for key in ("count", "total_us")), f"{one['total_us'] / total:.1%}"]
        for one in kernels[:MOST_KERNELS]
    ]
    rest = kernels[MOST_KERNELS:]
    if rest:
        us, count = sum(one["total_us"] for one in rest), sum(one["count"] for one in rest)
        rows.append([f"{len(rest)} others", f"{count / steps:.1f}", f"{us / steps:.1f}", f"{us / total:.1%}"])
    rows.append(["all", f"{sum(one['count'] for one in kernels) / steps:.1f}", f"{total / steps:.1f}", ""])
    return f"{name}, by kernel:\n\n{markdown_table(['kernel', 'launches a step', 'us a step', 'share'], rows)}"


def named(line: Line) -> str:
    """The mix, and the environment if it is a special one."""
    return f"{line['mix']} {line['environment']}".rstrip()


def spread(line: Line) -> str:
    """Tokens a second: the median, with those of the slowest and the quickest repeat."""
    slow, quick = (line["tokens"] / seconds for seconds in (max(line["seconds"]), min(line["seconds"])))
    return f"{line['tokens_per_second']:,.1f} ({slow:,.1f} to {quick:,.1f})"


def plot_speed(path: Path, lines: list[Line]) -> Path:
    """Decoded tokens a second by batch size, and the floor of each, dashed."""
    figure = new_figure()
    axes = figure.add_subplot()
    decoded = [line for line in lines if line["kind"] == "decode"]
    for i, mix in enumerate(dict.fromkeys(map(named, decoded))):
        own = [line for line in decoded if named(line) == mix]
        batches = [line["batch"] for line in own]
        axes.plot(batches, [line["tokens_per_second"] for line in own], "o-", color=f"C{i}", label=mix)
        axes.plot(batches, [line["floor_tokens_per_second"] for line in own], "--", color=f"C{i}", alpha=0.6)
    axes.set(xlabel="batch", ylabel="decoded tokens a second (dashed: floor)", xscale="log", yscale="log")
    if decoded:
        axes.legend(frameon=False)
    return save_figure(figure, path)
