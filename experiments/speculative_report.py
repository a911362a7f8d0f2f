"""What `speculative_sweep` found: rates, errors, theory, tables, plots. Plain numbers in, files out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from realm_jax.decode.speedup import break_even, expected_speedup, expected_tokens
from realm_jax.experiment import describe_run, markdown_table, new_figure, save_figure

Line = dict[str, Any]


def summarize(lines: list[Line]) -> list[Line]:
    """One entry a cell: what was counted and timed, and what the theory says of its acceptance and cost ratio."""
    return [summarize_cell(line) for line in lines]


def summarize_cell(line: Line) -> Line:
    """acceptance: accepted over judged, which the theory takes to be the same at each place."""
    g, judged, accepted = line["length"], sum(line["judged"]), sum(line["accepted"])
    acceptance = accepted / judged if judged else 0.0
    seconds = {way: by_prompt(line["runs"], way, "steps") for way in ("plain", "speculative", "draft")}
    tokens = {way: by_prompt(line["runs"], way, "tokens") for way in ("plain", "speculative")}
    step = float(np.median([*seconds["plain"].values()]))
    cost = float(np.median([*seconds["draft"].values()])) / step if seconds["draft"] else 0.0
    speedups = [
        tokens["plain"][key] / tokens["speculative"][key] for key in tokens["plain"] if key in tokens["speculative"]
    ]
    variance, excess = line["variance"], accepted - line["expected_accepted"]
    as_drafted = np.dot(line["proposed"], expected_tokens(acceptance, np.arange(g + 1))) / line["rounds"]
    return {
        **{key: line[key] for key in ("draft", "length", "temperature", "rounds", "tokens", "drafted", "histogram")},
        **{key: line[key] for key in ("judged", "accepted", "expected_accepted", "prompts", "same_as_plain")},
        "acceptance": acceptance,
        "by_position": [yes / of if of else None for yes, of in zip(line["accepted"], line["judged"], strict=True)],
        "expected_acceptance": line["expected_accepted"] / judged if judged else 0.0,
        "acceptance_error": math.sqrt(variance) / judged if judged else 0.0,
        # rounding aside, greedy counts have no variance: there they are equal or wrong
        "z": excess / math.sqrt(variance) if variance > 1e-6 else None,
        "mean_accepted": accepted / line["rounds"],
        "tokens_a_round": line["tokens"] / line["rounds"],
        "expected_tokens": float(expected_tokens(acceptance, g)),
        "expected_as_drafted": float(as_drafted),
        "forwards_saved": 1 - line["rounds"] / line["tokens"] if line["tokens"] else 0.0,
        "step_seconds": step,
        "cost": cost,
        "round_steps": float(np.median([*seconds["speculative"].values()])) / step,
        "plain_tokens_per_second": quartiles([1 / value for value in tokens["plain"].values()]),
        "tokens_per_second": quartiles([1 / value for value in tokens["speculative"].values()]),
        "speedup": quartiles(speedups),
        "expected_speedup": float(expected_speedup(acceptance, g, cost)),
        "break_even": break_even(g, cost),
    }  # fmt: skip


def by_prompt(runs: list[Line], way: str, unit: str) -> dict[tuple[int, int], float]:
    """Seconds for one `unit` of each run of this way that had any, by prompt and repeat."""
    own = [run for run in runs if run["way"] == way and run[unit]]
    return {(run["prompt"], run["repeat"]): run["seconds"] / run[unit] for run in own}


def quartiles(values: list[float]) -> list[float]:
    return np.quantile(values, [0.25, 0.5, 0.75]).tolist() if values else [math.nan] * 3


def pooled_z(summary: list[Line]) -> tuple[float, int]:
    """The z-score of all cells together, each counted by its z, and how many had one; they are independent."""
    z = [found["z"] for found in summary if found["z"] is not None]
    return (sum(z) / math.sqrt(len(z)) if z else math.nan), len(z)


# --- tables ----------------------------------------------------------------------------------------------------------


def results(summary: list[Line], forward: list[Line], about: str, environment: dict[str, Any]) -> str:
    """Tables of acceptance, of speed, and of a forward pass, and what they were made with."""
    z, cells = pooled_z(summary)
    together = f" All {cells} cells with a z-score together: {z:.2f}." if cells else ""
    greedy = [found for found in summary if found["temperature"] == 0]
    same, prompts = (sum(found[key] for found in greedy) for key in ("same_as_plain", "prompts"))
    identical = f" Greedy texts equal to those of plain decoding: {same} of {prompts}." if greedy else ""
    return (
        f"Made by {describe_run(environment)}.\n\n{about}.\n\n"
        'Acceptance: draft tokens accepted, of those judged. "min(p, q)": what it must be over the contexts visited, '
        "with its standard error; z: the difference in standard errors (greedy: the counts are equal, or not)."
        f"{together}{identical}\n\n{acceptance_table(summary)}\n"
        "Speed over plain decoding: medians with quartiles over prompts. c: a step of the draft alone over one of the "
        "target alone (n-grams: taken as 0). As drafted: theory with as many draft tokens as each round had (n-grams "
        "often find none, and the last round of a text has room for fewer). Round: its time in target steps, and what "
        "the theory takes it to be.\n\n"
        f"{speed_table(summary)}\nOne forward pass of the target, one row.\n\n{forward_table(forward)}"
    )


def acceptance_table(summary: list[Line]) -> str:
    header = ["draft", "T", "g", "judged", "accepted", "min(p, q)", "z", "by position"]
    return markdown_table(
        header,
        [
            [
                *cell_name(found),
                str(sum(found["judged"])),
                f"{found['acceptance']:.3f}",
                f"{found['expected_acceptance']:.3f} ± {found['acceptance_error']:.3f}",
                z_text(found),
                " ".join("-" if share is None else f"{share:.2f}" for share in found["by_position"]),
            ]
            for found in summary
        ],
    )


def z_text(found: Line) -> str:
    if found["z"] is not None:
        return f"{found['z']:+.2f}"
    apart = abs(sum(found["accepted"]) - found["expected_accepted"])
    return "equal" if apart < 1e-3 else f"{apart:.0f} apart"


def speed_table(summary: list[Line]) -> str:
    header = [
        "draft", "T", "g", "accepted a round", "tokens a round", "theory", "as drafted", "forwards saved", "c", "round",
        "1 + g c", "tokens/s", "plain", "speedup", "theory", "break-even",
    ]  # fmt: skip
    return markdown_table(
        header,
        [
            [
                *cell_name(found),
                f"{found['mean_accepted']:.2f}",
                f"{found['tokens_a_round']:.2f}",
                f"{found['expected_tokens']:.2f}",
                f"{found['expected_as_drafted']:.2f}",
                f"{found['forwards_saved']:.0%}",
                f"{found['cost']:.2f}",
                f"{found['round_steps']:.2f}",
                f"{1 + found['length'] * found['cost']:.2f}",
                f"{found['tokens_per_second'][1]:.0f}",
                f"{found['plain_tokens_per_second'][1]:.0f}",
                f"{found['speedup'][1]:.2f} ({found['speedup'][0]:.2f} to {found['speedup'][2]:.2f})",
                f"{found['expected_speedup']:.2f}",
                f"{found['break_even']:.2f}" if found["break_even"] <= 1 else "none",
            ]
            for found in summary
        ],
    )


def forward_table(forward: list[Line]) -> str:
    one = forward[0]["seconds"][1]
    rows = []
    for line in forward:
        low, middle, high = (1e3 * value for value in line["seconds"])
        rows.append([str(line["tokens"]), f"{middle:.2f} ({low:.2f} to {high:.2f})", f"{middle / 1e3 / one:.2f}"])
    return markdown_table(["tokens", "ms", "over one token"], rows)


def cell_name(found: Line) -> list[str]:
    return [found["draft"], f"{found['temperature']:g}", str(found["length"])]


# --- plots -----------------------------------------------------------------------------------------------------------


def plot_acceptance(path: Path, summary: list[Line]) -> Path:
    """Acceptance by position in the longest draft above, by length below, with standard errors."""
    temperatures, drafts = axes_of(summary)
    longest = max(found["length"] for found in summary)
    figure = new_figure(4.2 * len(temperatures) + 1.5, 7)
    grid = figure.subplots(2, len(temperatures), sharey=True, squeeze=False)
    for (above, below), temperature in zip(grid.T, temperatures, strict=True):
        for color, draft in enumerate(drafts):
            own = [found for found in summary if (found["draft"], found["temperature"]) == (draft, temperature)]
            for found in own:
                if found["length"] == longest:
                    places = [i for i, of in enumerate(found["judged"]) if of]
                    shares = [found["by_position"][i] for i in places]
                    errors = [binomial_error(found["accepted"][i], found["judged"][i]) for i in places]
                    above.errorbar([i + 1 for i in places], shares, errors, fmt="o-", color=f"C{color}", capsize=2)
            lengths, shares = ([found[key] for found in own] for key in ("length", "acceptance"))
            errors = [binomial_error(sum(found["accepted"]), sum(found["judged"])) for found in own]
            below.errorbar(lengths, shares, errors, fmt="o", color=f"C{color}", capsize=2, label=draft)
            expected = [found["expected_acceptance"] for found in own]
            below.plot(lengths, expected, "-", color=f"C{color}", linewidth=1)
        above.set(title=f"temperature {temperature:g}", xlabel=f"position in a draft of {longest}", ylim=(0, 1.05))
        below.plot([], [], "-", color="grey", linewidth=1, label="mean of sum min(p, q)")
        below.set(xlabel="draft length")
    for axes, text in zip(grid[:, 0], ("accepted, if reached", "accepted, all positions"), strict=True):
        axes.set_ylabel(text)
    figure.legend(*grid[1, 0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8)
    return save_figure(figure, path)


def plot_speed(path: Path, summary: list[Line]) -> Path:
    """Tokens a round above, speedup with quartiles below: measured as points, theory as lines."""
    temperatures, drafts = axes_of(summary)
    figure = new_figure(4.2 * len(temperatures) + 1.5, 7)
    grid = figure.subplots(2, len(temperatures), sharey="row", squeeze=False)
    for (above, below), temperature in zip(grid.T, temperatures, strict=True):
        for color, draft in enumerate(drafts):
            own = [found for found in summary if (found["draft"], found["temperature"]) == (draft, temperature)]
            lengths = [found["length"] for found in own]
            above.plot(lengths, [found["tokens_a_round"] for found in own], "o", color=f"C{color}")
            above.plot(lengths, [found["expected_tokens"] for found in own], "-", color=f"C{color}", linewidth=1)
            low, middle, high = np.array([found["speedup"] for found in own]).reshape(-1, 3).T
            bars = [middle - low, high - middle]
            below.errorbar(lengths, middle, bars, fmt="o", color=f"C{color}", capsize=2, label=draft)
            theory = [found["expected_speedup"] for found in own]
            below.plot(lengths, theory, "-", color=f"C{color}", linewidth=1)
        below.plot([], [], "-", color="grey", linewidth=1, label="theory")
        below.axhline(1, color="black", linewidth=1, linestyle=":", label="break-even")
        above.set_title(f"temperature {temperature:g}")
        below.set_xlabel("draft length")
    for axes, text in zip(grid[:, 0], ("tokens a round", "tokens/s over plain decoding"), strict=True):
        axes.set_ylabel(text)
    figure.legend(*grid[1, 0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8)
    return save_figure(figure, path)


def axes_of(summary: list[Line]) -> tuple[list[float], list[str]]:
    """Temperatures and drafts, in the order in which they were measured."""
    return tuple(list(dict.fromkeys(found[key] for found in summary)) for key in ("temperature", "draft"))


def binomial_error(yes: int, of: int) -> float:
    share = yes / of if of else 0.0
    return math.sqrt(share * (1 - share) / of) if of else 0.0
