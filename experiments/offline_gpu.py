"""Compile for a GPU that is not there, with the compilers in JAX's CUDA plugin. Called by `inspect_kernel`."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from realm_jax.errors import RealmError


class Target(NamedTuple):
    """A GPU: its name as the driver has it, what `target_config` must say of it, and its clock under load in GHz."""

    name: str
    arch: str
    cores: int
    ghz: float
    bandwidth: int
    memory: int
    cache: int
    shared_a_core: int
    shared_a_block: int
    float_clocks: int


TARGETS = {
    "h200": Target("NVIDIA H200", "90a", 132, 1.755, 4800 * 10**9, 151397597184, 52428800, 233472, 232448, 1),
    "h100": Target("NVIDIA H100 80GB HBM3", "90a", 132, 1.755, 3352 * 10**9, 85520809984, 52428800, 233472, 232448, 1),
    "a100": Target("NVIDIA A100-SXM4-80GB", "80", 108, 1.41, 2039 * 10**9, 85198045184, 41943040, 167936, 166912, 2),
}
# Without driver_version XLA leaves loops out of CUDA graphs.
CONFIG = """
gpu_device_info {{
  name: "{0.name}" core_count: {0.cores} fpus_per_core: 128 clock_rate_ghz: {0.ghz} threads_per_warp: 32
  threads_per_block_limit: 1024 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: {0.shared_a_core}
  shared_memory_per_block_optin: {0.shared_a_block}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {0.bandwidth} l2_cache_size: {0.cache} device_memory_size: {0.memory}
  cuda_compute_capability {{ major: {1} minor: 0 {2} }}
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 13 minor: 0 }}
device_description_str: "{0.name}"
"""
NEEDED = (
    "in an environment of its own, beside jax=={v} and what realm_jax needs: pip install --no-deps "
    "jax-cuda13-plugin=={v} jax-cuda13-pjrt=={v} nvidia-cuda-nvcc nvidia-cuda-nvdisasm absl-py"
)


def prepare(out: Path) -> None:
    """Empty the folder and set what must be set before JAX is imported. RealmError without a compiler for the GPU."""
    out = out.resolve()
    if out.exists() and any(out.iterdir()) and not (out / "xla").is_dir():
        raise RealmError(f"{out}: holds files that this tool did not write; name an empty folder with --out")
    require_plugin()
    shutil.rmtree(out, ignore_errors=True)
    (out / "mosaic").mkdir(parents=True)
    (out / "xla").mkdir()
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "0"  # what is fetched is not dumped
    # JAX 0.11 writes PTX only if asked; ".*" would write every pass of Triton too, which takes 40 times as long.
    flags = f"--xla_dump_to={out}/xla --xla_dump_hlo_as_text --xla_dump_emitter_re=ptx --xla_gpu_autotune_level=0"
    os.environ["XLA_FLAGS"] = f"{flags} {os.environ.get('XLA_FLAGS', '')}"
    os.environ["MOSAIC_GPU_DUMP_TO"] = str(out / "mosaic")
    for what in ("PTX", "PTXAS", "SASS_CTRL"):
        os.environ[f"MOSAIC_GPU_DUMP_{what}"] = "1"


def require_plugin() -> None:
    """RealmError, saying what to install, unless JAX's CUDA plugin and the disassembler are here."""
    plugins = importlib.util.find_spec("jax_plugins")
    found = plugins and any(importlib.util.find_spec(f"jax_plugins.xla_cuda{v}") for v in (12, 13))
    missing = "JAX's CUDA plugin" if not found else next((t for t in ("ptxas", "nvdisasm") if not tool(t)), None)
    if missing:
        raise RealmError(f"{missing} is not installed here; {needed()}")


def needed() -> str:
    """What to install, and where."""
    return NEEDED.format(v=version("jax"))


def tool(name: str) -> str | None:
    """Path of a CUDA tool, from the packages of NVIDIA or the system."""
    for folder in sys.path:
        for place in ("nvidia/cu13/bin", "nvidia/cuda_nvcc/bin"):
            if (path := Path(folder) / place / name).exists():
                return str(path)
    return shutil.which(name)


@contextlib.contextmanager
def as_if_on(target: Target) -> Iterator[Any]:
    """The device of a GPU that is not there: good for lowering and compiling, not for arrays."""
    import jax
    from jax.experimental import topologies

    major, extension = int(target.arch[0]), "feature_extension: ACCELERATED_FEATURES" if target.arch[-1] == "a" else ""
    config = CONFIG.format(target, major, extension)
    try:
        device = topologies.get_topology_desc(platform="cuda", target_config=config, topology="1x1x1").devices[0]
    except Exception as error:  # whatever a plugin of another version says
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise RealmError(f"JAX's CUDA plugin does not work here ({reason}); {needed()}") from error
    # What chooses before tracing asks for the backend; kernels learn the architecture from the default device.
    with mock.patch.object(jax, "default_backend", lambda: "gpu"), jax.default_device(device):
        yield device


def compile_case(fn: Callable, args: tuple, target: Target, donate: tuple[int, ...] = ()) -> Any:
    """The compiled program of jit(fn) for that GPU."""
    import jax
    import numpy as np

    specs = jax.tree.map(lambda a: jax.ShapeDtypeStruct(np.shape(a), a.dtype), args)
    with as_if_on(target) as device:
        here = jax.sharding.SingleDeviceSharding(device)
        jitted = jax.jit(fn, in_shardings=here, out_shardings=here, donate_argnums=donate)
        return jitted.trace(*specs).lower(lowering_platforms=("cuda",)).compile()
