"""How fast a model takes in a prompt and decodes, and how far that is from the time in which its bytes can be read.

    python experiments/decode_speed.py [CONFIG] [--set 'mixes=["Q4_K_M"]' --set batches=[1] ...] [--name NAME]

A model of random weights in the shape of Llama 3.1 8B for each mix of formats, made on the device. The loops are those
of the package (`realm_jax.speed`); every number is a median over repeats in one process, after a warm-up. The floor of
a step is the bytes it must read at the least (packed weights; keys and values of the tokens in the cache), over what
the device reads a second, measured in the same run by a large sum and a large copy.

Compiling is timed twice: with an empty cache on disk, and again, with nothing in memory, from what is there by then.
Time by kernel comes from a profile of one more call; while a profiler runs XLA may launch kernels one by one that
otherwise stand in a CUDA graph (`--xla_enable_command_buffers_during_profiling` in XLA_FLAGS keeps the graphs).

Decoding is timed with each of `environments` in turn: what a variable that is read while kernels are traced
brings (REALM_TILES=tiles.json), on one card in one run.

results.md has the tables, results.json the numbers, decode_speed.png the plot.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import jax
from jax.experimental.compilation_cache import compilation_cache
from rich.console import Console

from decode_speed_report import named, plot_speed, results
from kernel_times import kernel_times
from random_model import model_formats, random_model, shape_config
from realm_jax import speed
from realm_jax.decode.batch import ran_on
from realm_jax.decode.loop import decode
from realm_jax.errors import RealmError
from realm_jax.experiment import Run, experiment_command, read_json
from realm_jax.kernels.attention import IMPLEMENTATIONS as ATTENTION
from realm_jax.kernels.matmul import IMPLEMENTATIONS as MATMUL
from realm_jax.model import Model, load


@dataclass(frozen=True)
class DecodeSpeedConfig:
    """See configs/decode_speed.toml for what each key is."""

    mixes: tuple[str, ...] = ("Q4_K_M", "Q8_0")
    shape: str = "llama-8b"
    layers: int = 0
    batches: tuple[int, ...] = (1, 8, 64)
    context: int = 512
    steps: int = 64
    prompt_tokens: int = 2048
    prompt_batch: int = 1
    chunk: int = 2048
    repeats: int = 5
    activations: Literal["float32", "bfloat16", "float16"] = "float32"
    cache: Literal["float32", "bfloat16", "float16", "int8"] = "bfloat16"
    arithmetic: Literal["float", "int8"] = "float"
    matmul: str = "auto"
    attention: str = "auto"
    environments: tuple[str, ...] = ("",)
    compile_twice: bool = True
    profile: bool = True
    seed: int = 0
    model: Path | None = None

    def __post_init__(self):
        for name in ("context", "steps", "prompt_batch", "chunk", "repeats"):
            if getattr(self, name) < 1:
                raise RealmError(f"{name} is {getattr(self, name)}; want at least 1")
        if self.prompt_tokens < 0 or min(self.batches, default=1) < 1:
            raise RealmError("prompt_tokens: want 0 or more; batches: want at least 1 each")
        if self.matmul != "auto" and self.matmul not in MATMUL:
            raise RealmError(f"matmul: {self.matmul!r} is none; one of auto, {', '.join(MATMUL)}")
        if self.attention not in ("auto", *ATTENTION):
            raise RealmError(f"attention: {self.attention!r} is none; one of auto, {', '.join(ATTENTION)}")
        for text in self.environments:
            variables(text)
        if self.model is None:
            sizes = shape_config(self.shape, self.layers)
            for mix in self.mixes:
                model_formats(sizes, mix)


def variables(text: str) -> dict[str, str]:
    """ "A=1 B=2" as a table. RealmError for anything else, and for names that this package does not read."""
    pairs = [part.partition("=") for part in text.split()]
    for name, equals, _ in pairs:
        if not equals or not name.startswith("REALM_"):
            raise RealmError(f'environments: {text!r}: want names that begin with REALM_, like "REALM_TILES=a.json"')
    return {name: value for name, _, value in pairs}


def main(config: DecodeSpeedConfig, run: Run) -> None:
    """Measure prefill and decoding of each mix at each batch size, beside the floor of memory."""
    console = Console(stderr=True, highlight=False)
    run.keep_metrics(lambda line: False)  # times of two runs are not to be mixed
    ceiling = speed.read_ceiling()
    console.print(f"{ceiling / 1e9:,.0f} GB/s read; run directory: {run.folder}")
    profiles = {}
    with only(config.matmul, config.attention):
        for mix in config.mixes if config.model is None else [config.model.name]:
            started = time.perf_counter()
            model = make_model(config, mix)
            console.print(f"{model!r}: ready in {time.perf_counter() - started:.1f} s")
            for line in measure(model, config, ceiling, profiles, run.folder / "profiles", mix):
                line = {"mix": mix, **line}
                run.log(**line)
                what = f"{named(line)} {line['kind']}, batch {line['batch']}"
                console.print(f"{what}: {line['tokens_per_second']:,.1f} tokens/s")
            del model
    about = describe(config, ceiling)
    run.save_json("results.json", {"about": about, "read_bytes_per_second": ceiling, "lines": run.metrics()})
    run.save_json("kernels.json", profiles)
    table = results(run.metrics(), profiles, about, read_json(run.folder / "environment.json"))
    run.save_text("results.md", table)
    plot_speed(run.folder / "decode_speed.png", run.metrics())
    console.print(table, soft_wrap=True)


def make_model(config: DecodeSpeedConfig, mix: str) -> Model:
    if config.model is not None:
        return load(config.model).with_arithmetic(config.arithmetic)
    made = jax.block_until_ready(random_model(shape_config(config.shape, config.layers), mix, config.seed))
    return made.with_arithmetic(config.arithmetic)


def measure(
    model: Model, config: DecodeSpeedConfig, ceiling: float, profiles: dict[str, Any], folder: Path, mix: str
) -> Iterator[dict[str, Any]]:
    """One line for the prefill and for each batch size; kernels' times go into `profiles`."""
    types = {"cache_dtype": config.cache, "dtype": config.activations}
    if config.prompt_tokens:
        tokens, rows = config.prompt_tokens, config.prompt_batch
        timing = speed.time_prefill(model, rows, tokens, config.repeats, chunk=config.chunk, **types)
        impl = ran_on(model, rows * min(config.chunk, tokens))[1]
        yield {"kind": "prefill", "batch": rows, "environment": "", "impl": impl, **as_line(timing)}
    for batch, environment in itertools.product(config.batches, config.environments):
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.dict(os.environ, variables(environment)))
            jax.clear_caches()  # variables are read while a product is traced
            if config.compile_twice:
                stack.enter_context(empty_cache())
            around = None
            if config.profile:
                name = ", ".join(filter(None, (mix, f"batch {batch}", environment)))
                around = profiler(folder / re.sub(r"\W+", "-", name), profiles, name, config.steps)
            timing = speed.time_decode(
                model, batch, config.context, config.steps, config.repeats, around=around, **types
            )
            warm = warm_start(model, batch, config, types) if config.compile_twice else None
        step_bytes = speed.step_bytes(model, batch, config.context, config.steps, config.cache)
        yield {"kind": "decode", "batch": batch, "environment": environment, "impl": ran_on(model, batch)[1],
               **as_line(timing), "step_seconds": timing.median / config.steps, "step_bytes": step_bytes,
               "weight_bytes": speed.weight_bytes(model.params, batch),
               "floor_tokens_per_second": batch * ceiling / step_bytes,
               "share_of_floor": step_bytes / ceiling * config.steps / timing.median,
               "warm_start_seconds": warm}  # fmt: skip


def as_line(timing: speed.Timing) -> dict[str, Any]:
    return {
        "tokens": timing.tokens, "seconds": timing.seconds, "tokens_per_second": timing.tokens_per_second,
        "compile_seconds": timing.compile_seconds,
    }  # fmt: skip


def warm_start(model: Model, batch: int, config: DecodeSpeedConfig, types: dict[str, str]) -> float:
    """Seconds to have the decoding loop ready again when only the cache on disk holds it."""
    state = speed.ready_state(model, batch, config.context, config.steps, **types)
    jax.clear_caches()
    started = time.perf_counter()
    decode.lower(model.params, model.config, state, jax.numpy.int32(config.steps)).compile()
    return time.perf_counter() - started


@contextlib.contextmanager
def empty_cache() -> Iterator[None]:
    """A new folder as JAX's cache of compiled programs, and nothing compiled in memory."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = [getattr(jax.config, name) for name in names]
    with tempfile.TemporaryDirectory(prefix="realm-cold-") as folder:
        try:
            for name, value in zip(names, (folder, 0.0), strict=True):
                jax.config.update(name, value)
            compilation_cache.reset_cache()
            jax.clear_caches()
            yield
        finally:
            for name, value in zip(names, before, strict=True):
                jax.config.update(name, value)
            compilation_cache.reset_cache()


def profiler(folder: Path, profiles: dict[str, Any], name: str, steps: int) -> Callable[[Callable[[], None]], None]:
    """What profiles one more call of the loop, and adds its kernels' times to `profiles`."""

    def around(call: Callable[[], None]) -> None:
        try:
            with jax.profiler.trace(str(folder)):
                call()
            profiles[name] = {"steps": steps, "kernels": kernel_times(folder)}
        except (RealmError, RuntimeError) as error:  # a profiler that does not work takes no other numbers with it
            profiles[name] = {"steps": steps, "kernels": [], "error": str(error).split("\n")[0]}

    return around


@contextlib.contextmanager
def only(product: str, attending: str) -> Iterator[None]:
    """With that implementation of products (and the reference) and of attention alone, unless it is "auto"."""
    with contextlib.ExitStack() as stack:
        if product != "auto":
            rows = {name: MATMUL[name] for name in dict.fromkeys((product, "reference"))}
            stack.enter_context(mock.patch.dict(MATMUL, rows, clear=True))
        if attending != "auto":
            module = sys.modules["realm_jax.kernels.attention"]  # the package has a function of that name
            stack.enter_context(mock.patch.object(module, "choose_attention", lambda *_: attending))
        jax.clear_caches()  # what was traced before chose otherwise
        yield
    jax.clear_caches()


def describe(config: DecodeSpeedConfig, ceiling: float) -> str:
    """What was timed, in one line."""
    what = config.model.name if config.model else f"random weights in the shape {config.shape}"
    layers = f" of {config.layers} layers" if config.layers and not config.model else ""
    return (
        f"{what}{layers}; {config.context} tokens in the cache, {config.steps} steps in one call, {config.repeats} "
        f"repeats; prompts of {config.prompt_tokens} tokens in chunks of {config.chunk}; activations "
        f"{config.activations}, cache {config.cache}, arithmetic {config.arithmetic}, matmul {config.matmul}, "
        f"attention {config.attention}; the device reads {ceiling / 1e9:,.0f} GB/s"
    )


command = experiment_command(main, DecodeSpeedConfig, Path(__file__).parents[1] / "configs" / "decode_speed.toml")

if __name__ == "__main__":
    command()
