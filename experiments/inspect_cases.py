"""What `inspect_kernel` and `simulate_kernel` can compile: their own cases by name, and those of any module."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import click

from offline_gpu import TARGETS
from realm_jax.errors import RealmError


def step(
    shape: str = "toy", layers: int = 0, mix: str = "Q4_K_M", model: str = "", batch: int = 1, context: int = 512,
    cache: str = "bfloat16", activations: str = "float32", arithmetic: str = "float",
) -> tuple:  # fmt: skip
    """The loop of plain decoding. model: a GGUF file in place of a shape of `random_model` with a mix of formats."""
    import jax
    import jax.numpy as jnp

    from random_model import model_specs, shape_config
    from realm_jax.decode.loop import decode
    from realm_jax.model import load
    from realm_jax.speed import ready_state

    found = load(model) if model else model_specs(shape_config(shape, layers), mix)
    found = found.with_arithmetic(arithmetic)
    state = jax.eval_shape(lambda: ready_state(found, batch, context, 64, cache_dtype=cache, dtype=activations))

    def loop(params: Any, state: Any, steps: Any) -> Any:
        return decode(params, found.config, state, steps)

    args = found.params, state, jax.ShapeDtypeStruct((), jnp.int32)
    return loop, args, {"donate": (1,), "thunks": True}


def matmul(
    format: str = "Q4_K",
    outputs: int = 28672,
    inputs: int = 4096,
    rows: int = 1,
    impl: str = "auto",
    activations: str = "float32",
    arithmetic: str = "float",
) -> tuple:
    """The product of x (rows, inputs) of type `activations` and packed weights (outputs, inputs), in an arithmetic."""
    import jax

    from random_model import weight_spec
    from realm_jax.kernels.matmul import choose_impl, matmul
    from realm_jax.kernels.plan import cut
    from realm_jax.kernels.triton_int8 import plan_of

    weight = weight_spec(format, (outputs, inputs)).replace(arithmetic=arithmetic)
    packed = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(weight))
    x = jax.ShapeDtypeStruct((rows, inputs), activations)
    facts = {"weights": outputs * inputs, "bytes": packed}
    with mock.patch.object(jax, "default_backend", lambda: "gpu"):
        chosen = choose_impl(x.shape, weight) if impl == "auto" else impl
    if chosen in ("triton", "triton_int8"):
        facts["trips"] = lambda: (
            (cut(rows, x.dtype, weight) if chosen == "triton" else plan_of(x.shape, weight)).trips
        )  # which the target decides
    return lambda x, w: matmul(x, w, impl=impl), (x, weight), facts


def attention(
    rows: int = 64, tokens: int = 1, places: int = 4096, cache: str = "bfloat16", heads: int = 32, kv_heads: int = 8,
    width: int = 128, query: str = "bfloat16", layers: int = 32, cut: tuple[int, ...] = (), write: bool = False,
) -> tuple:  # fmt: skip
    """Attention of queries of type `query` to one layer of a cache. cut: of `attention_plan.Cut`, else the chosen.
    write: as in decoding, new keys and values come into the cache in the same launch."""
    import jax
    import jax.numpy as jnp

    from realm_jax.kernels.attention_plan import Cut, plan
    from realm_jax.kernels.triton_attention import attend, write_and_attend
    from realm_jax.kernels.triton_cache import Arrays

    own = Cut(*cut) if cut else None
    q = jax.ShapeDtypeStruct((rows, tokens, heads, width), query)
    stored = jax.ShapeDtypeStruct((layers, rows, places, kv_heads, width), cache)
    scales = (jax.ShapeDtypeStruct(stored.shape[:-1], jnp.float32),) * 2 if cache == "int8" else ()
    place, row = jax.ShapeDtypeStruct((rows, tokens), jnp.int32), jax.ShapeDtypeStruct((rows,), jnp.int32)
    p = plan(q.shape, stored.shape, stored.dtype, cut=own, scale=1.0, softcap=None, sliding_window=None)
    read = sum(x.size // layers * x.dtype.itemsize for x in (stored, stored, *scales))
    facts = {"weights": 2 * stored.size // layers, "bytes": read, "trips": (-(-min(p.part, p.size) // p.block),)}
    options, layer = {"scale": width**-0.5, "softcap": None, "sliding_window": None, "cut": own}, place.update(shape=())
    if not write:
        return functools.partial(attend, **options), (q, stored, stored, place, layer, row, *scales), facts
    new = jax.ShapeDtypeStruct((rows, tokens, kv_heads, width), query)
    angle = jax.ShapeDtypeStruct((rows, tokens, width // 2), jnp.float32)
    facts["donate"] = (0,)
    run = functools.partial(write_and_attend, halves=False, **options)
    return run, (Arrays(stored, stored, row, *scales), layer, row, place, place, q, new, new, angle, angle), facts


CASES = {"step": step, "matmul": matmul, "attention": attention}


def find_case(name: str) -> Callable[..., tuple]:
    """A built-in case, or `module:function` from the folder one is in. RealmError where there is none."""
    if name in CASES:
        return CASES[name]
    module, _, function = name.partition(":")
    if not function:
        raise RealmError(f"case {name!r} is not known; take {', '.join(CASES)}, or module:function")
    sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise RealmError(f"case {name!r}: {error}") from error


def case_command(help: str, folder: str) -> Callable[[Callable], click.Command]:
    """Makes a command of a function of a case, words of options for it, the name of a target and a folder (`folder`, if
    none is named), and of what options it has beside. A RealmError ends it with one line and status 1."""

    def command(function: Callable) -> click.Command:
        @functools.wraps(function)
        def run(**arguments: Any) -> None:
            try:
                function(**arguments)
            except RealmError as error:
                click.echo(f"error: {error}", err=True)
                raise SystemExit(1) from error

        for parameter in reversed((
            click.argument("case"),
            click.argument("options", nargs=-1, type=click.UNPROCESSED),
            click.option("--target", type=click.Choice(list(TARGETS)), default="h200", show_default=True),
            click.option("--out", type=click.Path(path_type=Path), default=Path(folder), show_default=True,
                         help="Folder for what the compilers write; emptied first."),
        )):  # fmt: skip
            run = parameter(run)
        settings = {"help_option_names": ["-h", "--help"], "ignore_unknown_options": True}
        return click.command(help=help, context_settings=settings)(run)

    return command


def read_options(case: Callable[..., tuple], words: list[str]) -> dict[str, Any]:
    """`--layers 4 --mix Q8_0` as arguments of a case. RealmError for what it does not take."""
    known = [p.name for p in inspect.signature(case).parameters.values() if p.kind is not p.VAR_KEYWORD]
    open_ended = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(case).parameters.values())
    options = {}
    for name, value in zip(words[::2], [*words[1::2], None], strict=False):
        key = name.removeprefix("--").replace("-", "_")
        if not name.startswith("--") or value is None or (key not in known and not open_ended):
            takes = ", ".join(f"--{one}" for one in known)
            raise RealmError(f"option {name!r}: want --name value with a name that the case takes: {takes or 'none'}")
        try:
            options[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[key] = value
    return options
