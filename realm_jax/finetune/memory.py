"""What training takes in memory: counted from the arrays, from the compiled step, and by the device."""

from typing import Any

import jax

from realm_jax.finetune.step import TrainState
from realm_jax.model.params import Params
from realm_jax.quant.tensor import QuantizedTensor


def memory_report(params: Params, state: TrainState, compiled: Any) -> dict[str, int | None]:
    """Bytes: base weights as they are, and what they would be dense; the adapter and the optimizer's state; what the
    compiled step needs beyond its arguments; and the device's own peak, None where it does not say (CPU).
    """
    weights = jax.tree.leaves(params, is_leaf=lambda node: isinstance(node, QuantizedTensor))
    count = sum(weight.size for weight in weights)
    analysis, stats = compiled.memory_analysis(), jax.local_devices()[0].memory_stats() or {}
    return {
        "base": _bytes(params),
        "base_as_float32": 4 * count,
        "base_as_bfloat16": 2 * count,
        "adapter": _bytes(state.trained),
        "optimizer": _bytes(state.optimizer),
        "step_temporary": None if analysis is None else analysis.temp_size_in_bytes,
        "device_peak": stats.get("peak_bytes_in_use"),
    }


def _bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
