"""`realm batch`: a file of requests in, a file of results out, many at once and each as if it were alone."""

import contextlib
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from realm_jax.cli import output
from realm_jax.cli.adapters import load_adapters, parse_adapter, skip_option
from realm_jax.cli.batch_view import Tally, View, summary_table
from realm_jax.cli.decoding import arithmetic_option, cache_dtype_option, draft_options, model_text
from realm_jax.cli.options import common_options, pre_option
from realm_jax.cli.text import one_line
from realm_jax.errors import RealmError

if TYPE_CHECKING:
    from realm_jax.engine.results import ResultsFile
    from realm_jax.model import Model

Adapters = dict[str, tuple[Path, float]]


def _parse_adapters(_context: click.Context, _parameter: click.Parameter, values: tuple[str, ...]) -> Adapters:
    adapters: Adapters = {}
    for value in values:
        name, _, path = value.partition("=")
        if not name or not path:
            raise click.BadParameter(f"{value!r} is not NAME=PATH or NAME=PATH:SCALE")
        if name in adapters:
            raise click.BadParameter(f"{name!r} is given twice; one adapter has one name")
        adapters[name] = parse_adapter(path)
    return adapters


@click.command(name="batch")
@click.argument("files", nargs=-1, metavar="[MODEL] REQUESTS.jsonl", type=click.Path(path_type=Path))
@click.option("--out", required=True, metavar="RESULTS.jsonl", type=click.Path(path_type=Path), help="Results go here.")
@click.option("--overwrite", is_flag=True, help="Do all requests anew, whatever RESULTS.jsonl has.")
@click.option(
    "--slots",
    metavar="N",
    type=click.IntRange(min=0),
    default=32,
    show_default=True,
    help="Requests served at once, no more than there are (0: as many as fit in free memory).",
)
@click.option(
    "--max-len",
    metavar="N",
    type=click.IntRange(min=2),
    default=2048,
    show_default=True,
    help="Tokens of a slot, prompt and new ones; at most the model's context.",
)
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="NAME=PATH[:SCALE]",
    callback=_parse_adapters,
    help="LoRA adapter that requests ask for by name. May be repeated.",
)
@skip_option
@draft_options
@cache_dtype_option
@arithmetic_option
@click.option(
    "--steps",
    metavar="N",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    help="Steps of decoding (with a draft: rounds) in a call of the device.",
)
@click.option(
    "--prefill-tokens",
    metavar="N",
    type=click.IntRange(min=16),
    default=512,
    show_default=True,
    help="Prompt tokens between two such calls, about.",
)
@click.option(
    "--prefix-rows",
    metavar="N",
    type=click.IntRange(min=0),
    default=4,
    show_default=True,
    help="Prompts kept for others that begin alike.",
)
@click.option(
    "--metrics", metavar="FILE.jsonl", type=click.Path(path_type=Path), help="Write every event of the engine here."
)
@pre_option
@common_options
def command(
    files: tuple[Path, ...],
    out: Path,
    overwrite: bool,
    adapters: Adapters,
    skip_misfits: bool,
    arithmetic: str,
    metrics: Path | None,
    pre: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Serve a file of requests. MODEL left out means the bundled model; REQUESTS.jsonl may be "-": stdin.

    A request is a JSON object on one line with "prompt" (a text or a list of token ids) or "messages" (a chat), and
    what it wants of: id, max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty,
    frequency_penalty, logit_bias, stop, seed, adapter, priority, speculate, add_special, parse_special. An id left out
    is the number of the line. A result has id, text, tokens, stop_reason, error (null, or what was wrong), and
    speculative where a draft ran.

    Results are appended as requests end. Started again, a run does what has no result yet: an id that has one is done,
    even if its request has changed since. --overwrite does all anew.
    """
    if len(files) not in (1, 2):
        raise click.UsageError("want [MODEL] REQUESTS.jsonl: one file or two")
    *model, requests = files
    path = None if str(requests) == "-" else requests
    _check_apart(path, out, metrics, model)
    from realm_jax.engine.request_lines import open_requests
    from realm_jax.engine.results import ResultsFile

    with open_requests(path) as file, ResultsFile(out, overwrite) as results:
        job = _Job.of(file, str(path or "stdin"), results)
        _say_what_is_done(job, results)
        report: dict[str, Any] = dict.fromkeys(("metrics", "model", "device", "matmul", "arithmetic"))
        try:
            if job.total > job.done:
                with _event_log(metrics, overwrite) as log:
                    loaded, options["adapters"] = _load(model, pre, arithmetic, adapters, skip_misfits)
                    report = _serve(job, results, loaded, log, options)
        except KeyboardInterrupt:
            _say_how_to_go_on(job, results, overwrite)
            raise
        counts = {"requests": job.total, "done_before": job.done, "done_now": results.appended}
        _tell(counts | {"errors": job.errors + results.errors, "out": str(out)} | report, as_json)


def _tell(report: dict[str, Any], as_json: bool) -> None:
    if report["errors"]:
        said = f'{report["errors"]} of {report["requests"]} requests have errors: see "error" in {report["out"]}'
        click.echo(one_line(said), err=True)
    if as_json:
        output.print_json(report)
    elif report["metrics"]:
        output.console(sys.stderr).print(summary_table(report))


@dataclass(frozen=True)
class _Job:
    """total: requests of the file. done, errors: those that have results already, and that these are errors."""

    file: IO[bytes]
    name: str
    total: int
    done: int
    errors: int

    @classmethod
    def of(cls, file: IO[bytes], name: str, results: "ResultsFile") -> "_Job":
        from realm_jax.engine.request_lines import read_lines

        total = done = errors = 0
        with output.waiting("reading the requests"):
            for line in read_lines(file, name):
                total += 1
                done += line.key in results.done
                errors += results.done.get(line.key, False)
        if total == 0:
            raise RealmError(f"{name}: has no requests; want at least one line with a JSON object")
        return cls(file, name, total, done, errors)


def _check_apart(requests: Path | None, out: Path, metrics: Path | None, model: list[Path]) -> None:
    """Nothing that is read is written over, and nothing is written twice."""
    named = {"REQUESTS.jsonl": requests, "MODEL": model[0] if model else None, "--out": out, "--metrics": metrics}
    given = [(name, path) for name, path in named.items() if path is not None]
    for (one, path), (other, second) in itertools.combinations(given, 2):
        if path.resolve() == second.resolve():
            raise click.UsageError(f"{one} and {other} are the same file, {second}")


def _say_what_is_done(job: _Job, results: "ResultsFile") -> None:
    if job.done:
        click.echo(one_line(f"{job.done} of {job.total} done already, by their ids in {results.path}"), err=True)
    others = len(results.done) - job.done
    if others:
        said = f"{results.path} has {others} results of ids that {job.name} does not have; is it the file you meant?"
        click.echo(one_line(f"warning: {said}"), err=True)


def _say_how_to_go_on(job: _Job, results: "ResultsFile", overwrite: bool) -> None:
    done = f"{job.done + results.appended} of {job.total} requests have results in {results.path}"
    again = "the same command without --overwrite" if overwrite else "the same command"
    click.echo(one_line(f"interrupted: {done}; {again} goes on with the rest"), err=True)


@contextlib.contextmanager
def _event_log(path: Path | None, anew: bool) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """What writes an event as a line of the file; nothing without a file. anew: what the file has is dropped."""
    if path is None:
        yield lambda event: None
        return
    try:
        file = path.open("w" if anew else "a", encoding="utf-8", buffering=1)  # a line is handed over when it ends
    except OSError as error:
        raise RealmError(f"{path}: cannot be written: {error.strerror or error}") from None
    with file:
        yield lambda event: file.write(json.dumps(event) + "\n")


def _load(
    model: list[Path], pre: str | None, arithmetic: str, adapters: Adapters, skip_misfits: bool
) -> "tuple[Model, dict[str, Any]]":
    """The model, and its adapters with their scales by name."""
    from realm_jax.model import load

    with output.waiting("loading the model"):
        loaded = load(*model, pre=pre).with_arithmetic(arithmetic)
        fitted = load_adapters(loaded, list(adapters.values()), skip_misfits) or []
        return loaded, dict(zip(adapters, fitted, strict=True))


def _serve(
    job: _Job,
    results: "ResultsFile",
    model: "Model",
    log: Callable[[Mapping[str, Any]], None],
    options: dict[str, Any],
) -> dict[str, Any]:
    """Serve what has no result; returns what ran and how fast. options: those of an engine."""
    from realm_jax.decode.batch import ran_on
    from realm_jax.decode.buckets import power_of_two
    from realm_jax.engine import Engine
    from realm_jax.engine.batch import serve
    from realm_jax.engine.request_lines import read_lines

    tally, view = Tally(), View(job.total)
    # Few requests need few slots, and every slot is computed, empty or not.
    options["slots"] = min(options["slots"], power_of_two(job.total - job.done)) or None

    def on_event(event: Mapping[str, Any]) -> None:
        tally.take(event)
        log(event)

    with Engine(model, on_event=on_event, **options) as engine, view.running():
        lines = read_lines(job.file, job.name)
        serve(engine, lines, results, lambda: view.show(job.done + results.appended, tally, engine.metrics))
        device, matmul = ran_on(model, engine.slots)
        return {
            "metrics": engine.metrics.summary(),
            "device_tokens_per_second": tally.tokens_per_second,
            "adapters": dict(tally.adapters),
            "draft": options["draft"],
            "slots": engine.slots,
            "max_len": engine.max_len,
            "device": device,
            "matmul": matmul,
            "arithmetic": model.arithmetic,
            "model": model_text(model),
        }
