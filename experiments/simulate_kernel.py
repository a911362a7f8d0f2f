"""Run a GPU kernel without a GPU: compile a case for one that is not there, and simulate what came out.

    python experiments/simulate_kernel.py matmul --format Q4_K --rows 20 --outputs 96 --inputs 512
    python experiments/simulate_kernel.py my_module:case --rows 2

A case is what `inspect_kernel` takes, with few programs: one takes a second. Its Pallas kernels are compiled one by
one, and their PTX is run, with all threads and shared memory (`ptx_machine` says what is not modelled); what is between
them JAX computes on the CPU. Arguments are random, weights as in `random_model`; int8 are, too; other integers are
zeros; arrays stay what they are. Pallas' interpreter runs the case, too: the last line says how far the results in
floating point are from its.

Found are races in memory, asynchronous copies that nobody waited for, and addresses that are misaligned or out
of bounds. Any of them makes the exit status 1. Reads of what was never written are named, but may be harmless.
"""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np

from inspect_cases import case_command, find_case, read_options
from inspect_kernel import read_launches
from offline_gpu import TARGETS, Target, as_if_on, compile_case, prepare
from ptx import Kernel, read_kernel
from ptx_machine import simulate
from ptx_races import Fault
from realm_jax.errors import RealmError

CALLS = "jit", "pjit", "custom_jvp_call", "custom_vjp_call", "custom_vmap_call"  # of one function, once
KERNEL = "pallas_call["  # what an equation with one is written with
MOST_SHOWN = 10
HARMLESS = "unwritten"  # the kind of a fault that may be none


class Run(NamedTuple):
    """A kernel that was simulated, and what was wrong with it, with an example each."""

    kernel: Kernel
    grid: tuple[int, ...]
    faults: dict[Fault, str]
    seconds: float


class Simulator:
    """Evaluates the equations of a traced case; Pallas kernels as the PTX that they are compiled to."""

    def __init__(self, target: Target, out: Path) -> None:
        self.target, self.out = target, out
        self.runs: list[Run] = []

    def evaluate(self, closed: Any, args: Sequence[Any]) -> list[Any]:
        """The results of a closed jaxpr."""
        from jax.extend.core import Literal

        jaxpr = closed.jaxpr
        values = dict(zip(jaxpr.constvars, closed.consts, strict=True)) | dict(zip(jaxpr.invars, args, strict=True))

        def value(name: Any) -> Any:
            return name.val if isinstance(name, Literal) else values[name]

        for equation in jaxpr.eqns:
            operands = [value(name) for name in equation.invars]
            if equation.primitive.name == "pallas_call":
                results = self._launch(equation, operands)
            elif KERNEL in str(equation):
                results = self.evaluate(_called(equation), operands)
            else:
                results = _on_cpu(equation, operands)
            values |= zip(equation.outvars, results, strict=True)
        return [value(name) for name in jaxpr.outvars]

    def _launch(self, equation: Any, operands: list[Any]) -> list[Any]:
        started = time.perf_counter()
        kernel, shared = self._compile(equation, operands)
        inputs = [np.asarray(operand).copy() for operand in operands]
        aliases = {result: operand for operand, result in equation.params["input_output_aliases"]}
        outputs = [
            inputs[aliases[i]] if i in aliases else _unwritten(v.aval.shape, v.aval.dtype)
            for i, v in enumerate(equation.outvars)
        ]
        grid = tuple(map(int, equation.params["grid_mapping"].grid))
        faults = simulate(kernel, [_bytes(array) for array in (*inputs, *outputs)], grid, shared)
        self.runs.append(Run(kernel, grid, faults, time.perf_counter() - started))
        return outputs

    def _compile(self, equation: Any, operands: list[Any]) -> tuple[Kernel, int]:
        """The kernel of a launch, and how many bytes of shared memory it gets beside its own."""
        folder = self.out / "xla"
        before, known = set(folder.glob("*.ptx")), len(read_launches(self.out))
        launch = functools.partial(equation.primitive.bind, **equation.params)
        compile_case(launch, tuple(operands), self.target)
        texts = [text for file in set(folder.glob("*.ptx")) - before if ".entry" in (text := file.read_text())]
        if len(texts) != 1:
            raise RealmError(f"a launch was compiled to {len(texts)} PTX files in {folder}; want 1")
        return read_kernel(texts[0]), max((one.shared for one in read_launches(self.out)[known:]), default=0)


def count_kernels(closed: Any) -> int:
    """Launches of a closed jaxpr. RealmError, where one cannot be simulated."""
    found = 0
    for equation in closed.jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            found += 1
        elif KERNEL in str(equation):
            found += count_kernels(_called(equation))
    return found


def _called(equation: Any) -> Any:
    """The closed jaxpr that a call runs, once. RealmError for loops and branches."""
    if equation.primitive.name not in CALLS:
        raise RealmError(f"a kernel inside of {equation.primitive.name} is not simulated")
    return next(equation.params[name] for name in ("jaxpr", "call_jaxpr", "call") if name in equation.params)


def _on_cpu(equation: Any, operands: list[Any]) -> list[Any]:
    """The results of one equation without kernels."""
    results = equation.primitive.bind(*operands, **equation.primitive.get_bind_params(equation.params))
    return results if equation.primitive.multiple_results else [results]


def _bytes(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1).view(np.uint8)


def _unwritten(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """NaN, in floating point."""
    return np.full(math.prod(shape) * dtype.itemsize, 0xFF, np.uint8).view(dtype).reshape(shape)


def random_args(args: Any) -> Any:
    """Arrays for the shapes in the arguments of a case."""
    import jax

    from random_model import random_weight
    from realm_jax.quant import QuantizedTensor

    keys = (jax.random.key(seed) for seed in itertools.count())

    def fill(leaf: Any) -> Any:
        if not isinstance(jax.tree.leaves(leaf)[0], jax.ShapeDtypeStruct):
            return leaf
        if isinstance(leaf, QuantizedTensor):
            weight = random_weight(next(keys), leaf.format, leaf.shape, leaf.shape[-1] ** -0.5)
            return leaf.replace(planes=weight.planes)
        if leaf.dtype == np.int8:
            return jax.random.randint(next(keys), leaf.shape, -127, 128, leaf.dtype)
        if np.issubdtype(leaf.dtype, np.integer):
            return jax.numpy.zeros(leaf.shape, leaf.dtype)
        return jax.random.normal(next(keys), leaf.shape).astype(leaf.dtype)

    return jax.tree.map(fill, args, is_leaf=lambda leaf: isinstance(leaf, QuantizedTensor))


def look(case: str, words: list[str], target: Target, out: Path) -> tuple[list[Run], list[float]]:
    """Every kernel of a case in the order of its launches, and the NMSE of each result of floating point."""
    prepare(out)  # first: a case may import JAX
    import jax

    function = find_case(case)
    fn, args, *_ = function(**read_options(function, words))
    specs = jax.tree.map(lambda a: jax.ShapeDtypeStruct(np.shape(a), a.dtype), args)
    with as_if_on(target):
        traced = jax.make_jaxpr(fn)(*specs)
    if not count_kernels(traced):
        raise RealmError(f"case {case!r} with these options launches no Pallas kernel")
    args, simulator = random_args(args), Simulator(target, out)
    results = simulator.evaluate(traced, jax.tree.leaves(args))
    return simulator.runs, errors(results, expected(fn, args))


def expected(fn: Callable, args: tuple) -> list[np.ndarray]:
    """What the interpreter makes of a case."""
    import jax

    from realm_jax.kernels import pallas

    jax.clear_caches()  # what was traced for a GPU
    with pallas.interpreted():
        return [np.asarray(leaf) for leaf in jax.tree.leaves(jax.jit(fn)(*args))]


def errors(results: Sequence[Any], wanted: Sequence[np.ndarray]) -> list[float]:
    """NMSE of each result in floating point: the mean square of what is wrong over that of what is wanted."""
    floats = [(a, b) for a, b in zip(results, wanted, strict=True) if b.dtype.kind not in "biu"]
    pairs = ((np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in floats)
    return [float(np.sum((a - b) ** 2) / max(np.sum(b**2), 1e-300)) for a, b in pairs]


def show(run: Run) -> None:
    """A line for a kernel, and the first of its faults with the instructions that are part of them."""
    kernel, faults = run.kernel, run.faults
    many = f"{len(faults) or 'no'} fault{'s' * (len(faults) != 1)}"
    click.echo(f"{kernel.name}: grid {run.grid} x {kernel.threads} threads, simulated in {run.seconds:.1f} s: {many}")
    for fault, example in itertools.islice(faults.items(), MOST_SHOWN):
        click.echo(f"  {fault.kind}: {fault.what} ({example})")
        for at in (fault.at, fault.other)[: 1 + (fault.other >= 0)]:
            click.echo(f"    line {kernel.body[at].line}: {kernel.body[at]}")
    if len(faults) > MOST_SHOWN:
        click.echo(f"  and {len(faults) - MOST_SHOWN} more")


@case_command(__doc__.split("\n")[0], "runs/simulate")
def command(case: str, options: tuple[str, ...], target: str, out: Path) -> None:
    runs, found = look(case, list(options), TARGETS[target], out)
    for run in runs:
        show(run)
    click.echo("NMSE, against the interpreter: " + ", ".join(f"{error:.1e}" for error in found))
    if any(fault.kind != HARMLESS for run in runs for fault in run.faults):
        raise SystemExit(1)


if __name__ == "__main__":
    command()
