"""How long a device would wait for the host between two calls of the engine. Called by `batching_throughput`.

The host's work does not depend on the size of matrices, but on how many arrays a model has, and on the slots. So a
model with the layers of a large one and tiny matrices is served on the CPU, and the time that the engine reports
between the end of a call and the start of the next is set against the least time that the large model's steps take,
from the bytes that each must read. The engine starts a call in a thread, whose work on the model's arrays is measured
apart, on a function that computes nothing, and added.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from batching_systems import Continuous, Job, serve
from lora_overhead import LoraOverheadConfig, RandomConfig, random_model
from realm_jax.errors import RealmError
from realm_jax.model import Model, load


@dataclass(frozen=True)
class HostConfig:
    """layers: of the model, 0 for no measurement. slots, requests: what is served. weight_bytes, token_bytes: what a
    step of the large model reads, of weights and for each token in the cache. context: tokens in each slot. bandwidth:
    of the device, in bytes a second.
    """

    layers: int = 32
    slots: int = 32
    requests: int = 128
    weight_bytes: float = 4.62e9
    token_bytes: float = 131072.0
    context: int = 512
    bandwidth: float = 3.35e12

    def __post_init__(self):
        for name in ("slots", "requests", "weight_bytes", "bandwidth"):
            if getattr(self, name) < 1:
                raise RealmError(f"host.{name} is {getattr(self, name)}; want at least 1")

    @property
    def step_seconds(self) -> float:
        """The least time of a decoding step of all slots."""
        return (self.weight_bytes + self.slots * self.context * self.token_bytes) / self.bandwidth


def measure_host(config: HostConfig, steps: int, seed: int) -> dict[str, Any]:
    """The host's seconds before each call, and their share of a call of `steps` steps of the large model."""
    rng, max_len = np.random.default_rng([seed, 2]), 128
    tokenizer = load().tokenizer
    sizes = RandomConfig(
        layers=config.layers, width=256, ffn_width=256, heads=2, kv_heads=1, vocab_size=tokenizer.vocab_size
    )
    model = random_model(sizes, LoraOverheadConfig(context=max_len, steps=1)).replace(tokenizer=tokenizer)
    lengths = rng.integers(8, max_len - 16, config.requests).tolist()
    jobs = [Job(rng.integers(3, tokenizer.vocab_size, 12).tolist(), length) for length in lengths]
    system = Continuous(model, config.slots, max_len, warm_up=False, steps=steps, prefix_rows=0)
    for _ in range(2):  # the first compiles
        system.events.clear()
        serve(system, jobs, np.zeros(len(jobs)))
    # What the engine does for newcomers starts with work for the device: there the device does not wait all that time.
    calls, joined, newcomers = [], [], False
    for event in system.events:
        newcomers |= event["event"] == "admitted"
        if event["event"] == "call":
            (joined if newcomers else calls).append(event["host_seconds"])
            newcomers = False
    dispatch, call_seconds = dispatch_seconds(model), steps * config.step_seconds
    return {
        "layers": config.layers,
        "slots": config.slots,
        "arrays": len(jax.tree.leaves(model.params)),
        "calls": len(calls),
        "seconds": np.quantile(calls, [0.5, 0.95]).tolist(),
        "joined_calls": len(joined),
        "joined_seconds": np.quantile(joined, [0.5, 0.95]).tolist(),
        "dispatch_seconds": dispatch,
        "step_seconds": config.step_seconds,
        "steps": steps,
        "share": (float(np.median(calls)) + dispatch) / call_seconds,
        "joined_share": (float(np.median(joined)) + dispatch) / call_seconds,
    }


def dispatch_seconds(model: Model, repeats: int = 200) -> float:
    """The median time in which a compiled function that takes all arrays of a model, and does nothing, is started."""
    nothing = jax.jit(lambda params, x: x + 1, keep_unused=True)
    nothing(model.params, jnp.int32(0)).block_until_ready()
    times = []
    for repeat in range(repeats):
        x = jnp.int32(repeat)
        started = time.perf_counter()
        result = nothing(model.params, x)
        times.append(time.perf_counter() - started)
        result.block_until_ready()
    return float(np.median(times))
