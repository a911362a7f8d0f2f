"""What `realm batch` shows: a live view on stderr while it runs, where that is a terminal, and a table at the end."""

import contextlib
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from realm_jax.cli import output

if TYPE_CHECKING:
    from rich.table import Table

REFRESH = 0.25  # seconds between two looks
NO_ADAPTER = "none"
ENDINGS = {"eos": "end of text", "stop": "stop string", "length": "length reached", "failed": "failed"}


class Tally:
    """Counts events of an engine as they come. tokens, seconds: of the calls so far. adapters: requests of each."""

    def __init__(self):
        self.tokens, self.seconds = 0, 0.0
        self.adapters: Counter[str] = Counter()

    def take(self, event: Mapping[str, Any]) -> None:
        if event["event"] == "call":
            self.tokens += event["tokens"]
            self.seconds += event["seconds"]
        elif event["event"] == "admitted":
            self.adapters[event["adapter"] or NO_ADAPTER] += 1

    @property
    def tokens_per_second(self) -> float:
        """While the device worked."""
        return self.tokens / self.seconds if self.seconds else 0.0


class View:
    """A bar and a line of numbers; `show` brings them up to date, and does nothing where there is no terminal."""

    def __init__(self, total: int):
        from rich.progress import Progress
        from rich.text import Text

        self._bar: Progress = output.progress()
        self._task = self._bar.add_task("requests", total=total)
        self._text = Text("compiling")
        self._live, self._next = None, 0.0

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """On the screen as long as the block runs."""
        if not sys.stderr.isatty():
            yield
            return
        from rich.console import Group
        from rich.live import Live

        group = Group(self._bar, self._text)
        with Live(group, console=output.console(sys.stderr), transient=True, auto_refresh=False) as self._live:
            yield

    def show(self, done: int, tally: Tally, metrics: Any) -> None:
        """done: requests with a result. metrics: `Engine.metrics`."""
        if self._live is None or time.monotonic() < self._next:
            return
        self._next = time.monotonic() + REFRESH
        self._bar.update(self._task, completed=done)
        self._text.plain = numbers_text(tally, metrics.slots, metrics.summary())
        self._live.refresh()


def numbers_text(tally: Tally, slots: int, summary: Mapping[str, Any]) -> str:
    """How it goes, in one line."""
    parts = [
        f"{tally.tokens_per_second:,.0f} tokens/s",
        f"{summary['occupied']}/{slots} slots",
        f"{summary['waiting']} waiting",
        f"first token {_median(summary['first_token_seconds'])}",
        f"between tokens {_median(summary['between_tokens_seconds'])}",
        f"{summary['prefix_hits']} prefix hits",
    ]
    if summary["acceptance"] is not None:
        parts.append(f"{summary['acceptance']:.0%} of draft tokens accepted")
    return ", ".join(parts)


def summary_table(report: Mapping[str, Any]) -> "Table":
    """What ran and how fast. report: what --json prints, of a run that had anything to do."""
    numbers = report["metrics"]
    made = output.table("measure", "value")
    for name, value in {
        "requests": _requests(report),
        "endings": _counted({text: numbers[name] for name, text in ENDINGS.items()}),
        "adapters": _counted(report["adapters"]) if set(report["adapters"]) - {NO_ADAPTER} else "",
        "tokens": f"{numbers['generated_tokens']:,} new ones for prompts of {numbers['prompt_tokens']:,}",
        "prefix cache": f"{numbers['prefix_hits']} hits: {numbers['cached_tokens']:,} prompt tokens not computed again"
        if numbers["prefix_hits"]
        else "",
        "speed": f"{numbers['tokens_per_second']:,.1f} tokens/s over {numbers['seconds']:.2f} s with compiling; "
        f"{report['device_tokens_per_second']:,.1f} while the device worked",
        "first token": _both(numbers["first_token_seconds"]),
        "between tokens": _both(numbers["between_tokens_seconds"]),
        "slots": f"{report['slots']} of {report['max_len']:,} tokens, {numbers['occupancy']:.0%} occupied",
        "draft": report["draft"]
        and f"{report['draft']}: {numbers['accepted']:,} of {numbers['drafted']:,} draft tokens accepted",
        "model": report["model"],
        "ran on": f"{report['device']}, matmul: {report['matmul']}",
        "results": report["out"],
    }.items():
        if value:
            output.add_row(made, name, value)
    return made


def _requests(report: Mapping[str, Any]) -> str:
    text = f"{report['requests']:,}: {report['done_before']:,} done before, {report['done_now']:,} now"
    return text + (f"; {report['errors']:,} have errors" if report["errors"] else "")


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items() if count)


def _both(quantiles: Mapping[str, float] | None) -> str:
    return quantiles and f"{_median(quantiles)} median, {_seconds(quantiles['p95'])} for the slowest 5%"


def _median(quantiles: Mapping[str, float] | None) -> str:
    return "-" if quantiles is None else _seconds(quantiles["median"])


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.1f} ms"
