"""Everything that is named by Pallas and its Triton backend, in one place. Called by the kernel modules.

Kernel bodies say what they compute in plain `jax.numpy`; what only the backend can name they take from here.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from realm_jax.kernels import assembly

load, store, program_id, when = plt.load, plt.store, pl.program_id, pl.when
load_now = functools.partial(plt.load, volatile=True)  # no compiler puts it off to a branch that wants what it loads
Shape = jax.ShapeDtypeStruct
OLDEST = "8.0"  # compute capability of Ampere
TANH_ERROR = 2.0**-11

_interpreting = False


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Within it, kernels that are traced run in Pallas' interpreter, on any device: for tests without a GPU.

    What was jitted and traced before keeps what it was traced with.
    """
    global _interpreting
    before, _interpreting = _interpreting, True
    try:
        yield
    finally:
        _interpreting = before


def interpreting() -> bool:
    """Whether kernels traced now are for the interpreter."""
    return _interpreting


def available() -> bool:
    """Whether a kernel traced now can run: on an NVIDIA GPU from Ampere up, or in the interpreter."""
    if _interpreting or jax.default_backend() != "gpu":
        return _interpreting
    return assembly.available() and serves(getattr(jax.devices()[0], "compute_capability", OLDEST))


def serves(capability: str) -> bool:
    """Whether GPUs of this compute capability ("9.0"; AMD's have names) have the instructions that kernels use."""
    major, point, _ = capability.partition(".")
    return bool(point) and major.isdigit() and int(major) >= int(OLDEST.partition(".")[0])


def capability() -> str:
    """Compute capability of the GPU that is traced for, be it here or not; of several the least, of none Ampere's."""
    devices = jax.config.jax_default_device, *jax.devices()
    known = [found for device in devices if (found := getattr(device, "compute_capability", None))]
    return min(known, key=lambda found: tuple(map(int, found.split("."))), default=OLDEST)


def is_hopper() -> bool:
    """Whether the GPU that is traced for is of compute capability 9: some of its instructions no other has."""
    return capability().partition(".")[0] == "9"


def shared_memory() -> int:
    """Bytes of shared memory that a program may have on the GPU that is traced for.

    Arrays of a fixed size, as kernels here have them, may only be larger than 48 KiB in code for one architecture, as
    XLA has it made from Hopper up; the interpreter is taken for one. Source: CUDA C++ programming guide, "Technical
    Specifications per Compute Capability".
    """
    large = _interpreting or 9 <= int(capability().partition(".")[0]) < 12
    return (227 if large else 48) * 1024


def call(
    body: Callable[..., None],
    operands: Sequence[jax.Array],
    out_shape: Any,
    *,
    grid: tuple[int, ...],
    num_warps: int = 4,
    num_stages: int = 2,
    aliases: dict[int, int] | None = None,
    name: str | None = None,
) -> Any:
    """`body(*operand refs, *output refs)` once for every point of the grid, as one launch; every ref is a whole array.

    body: a function, or a `functools.partial` of one with hashable arguments. out_shape: a `Shape` or a tuple of them;
    what comes back has its structure. grid: at most three axes, the first one varies fastest. aliases: which operand's
    buffer an output takes over, with what is in it.
    """
    own = body if isinstance(body, functools.partial) else functools.partial(body)
    launch = Launch(
        (own.func, own.args, tuple(own.keywords.items())),
        out_shape,
        grid,
        num_warps,
        num_stages,
        tuple((aliases or {}).items()),
        name,
        _interpreting,
    )
    return _traced_once(launch, *operands)


class Launch(NamedTuple):
    """All that is static of a call: equal ones are traced once for operands of the same types."""

    body: tuple[Callable[..., None], tuple, tuple]
    out_shape: Any
    grid: tuple[int, ...]
    num_warps: int
    num_stages: int
    aliases: tuple[tuple[int, int], ...]
    name: str | None
    interpret: bool


@functools.partial(jax.jit, static_argnums=0)
def _traced_once(launch: Launch, *operands: jax.Array) -> Any:
    func, args, keywords = launch.body

    return pl.pallas_call(
        functools.partial(func, *args, **dict(keywords)),
        out_shape=launch.out_shape,
        grid=launch.grid,
        in_specs=[pl.no_block_spec] * len(operands),
        out_specs=jax.tree.map(lambda _: pl.no_block_spec, launch.out_shape),
        input_output_aliases=dict(launch.aliases),
        # Without these parameters Pallas takes the Mosaic backend.
        compiler_params=plt.CompilerParams(num_warps=launch.num_warps, num_stages=launch.num_stages),
        interpret=launch.interpret,
        name=launch.name,
    )(*operands)


def find_range(number: jax.Array, lengths: Sequence[int], values: Sequence[int]) -> tuple[jax.Array, ...]:
    """Of ranges of these lengths one after the other: in which one a number is (past the last: in that), its place
    there, and that one's value."""
    which, place, value, start = jnp.zeros_like(number), number, jnp.full_like(number, values[0]), 0
    for i, length in enumerate(lengths[:-1], 1):
        start += length
        beyond = number >= start
        which, place = jnp.where(beyond, i, which), jnp.where(beyond, number - start, place)
        value = jnp.where(beyond, values[i], value)
    return which, place, value


def barrier() -> None:
    """No thread of a program goes on before all are here, and then sees what any of them stored in memory."""
    if not _interpreting:
        plt.debug_barrier()


def sum_of_two(x: jax.Array, axis: int) -> jax.Array:
    """Along an axis of two. Triton sums one such axis after the other; XLA would take all in an order of its own."""
    if not _interpreting:
        return jnp.sum(x, axis)
    first, second = (jax.lax.index_in_dim(x, i, axis, keepdims=False) for i in range(2))
    return first + second


def quick_tanh(x: jax.Array) -> jax.Array:
    """tanh of float32, wrong by no more than TANH_ERROR of itself, in one instruction (PTX ISA, "tanh")."""
    if _interpreting:
        return jnp.tanh(x)
    shape = [Shape(x.shape, x.dtype)]
    (y,) = plt.elementwise_inline_asm(
        "tanh.approx.f32 $0, $1;", args=[x], constraints="=f,f", pack=1, result_shape_dtypes=shape
    )
    return y


def int8_to_float16(x: jax.Array) -> jax.Array:
    """x in float16, exactly; in a kernel, of four neighbours at a time in three instructions, where a conversion would
    take longer than reading them."""
    if _interpreting:
        return x.astype(jnp.float16)
    # 0x6400 is 1024 in float16, and its last bit counts 1; xor by 128 adds 128 to a signed byte.
    asm = """{ .reg .b32 t;
        xor.b32 t, $2, 0x80808080;
        prmt.b32 $0, t, 0x64646464, 0x4140;
        prmt.b32 $1, t, 0x64646464, 0x4342; }"""
    shape = [Shape(x.shape, jnp.float16)]
    (y,) = plt.elementwise_inline_asm(asm, args=[x], constraints="=r,=r,r", pack=4, result_shape_dtypes=shape)
    return y - jnp.float16(1024 + 128)
