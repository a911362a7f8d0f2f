"""What can be wrong with one delta for a weight of a model, in words. Called where adapters are checked.

Shape suffixes: `N` output features, `K` input features, `R` rank.
"""

from collections.abc import Mapping

import jax
import numpy as np

from realm_jax.kernels.delta import Delta
from realm_jax.model.params import TensorSpec

Path = tuple[str | int, ...]


def misfit(delta: Delta, path: Path, targets: Mapping[Path, TensorSpec], check_values: bool) -> str | None:
    """What is wrong with a delta, as the rest of a line, or None."""
    if path not in targets:
        return f"tensor {gguf_name(path)} is for layer {path[1]}; the model has {_layers(targets)} layers"
    spec = targets[path]
    N, K = spec.shape
    a, b = delta.a.shape, delta.b.shape
    if len(a) != len(b) or len(a) not in (2, 3) or a[-2] != b[-1] or a[-2] < 1:
        return f"tensor {spec.name}: lora_a {a} and lora_b {b} are no pair (rank, {K}) and ({N}, rank)"
    if a[-1] != K or b[-2] != N:
        R = a[-2]
        return (
            f"tensor {spec.name}: lora_a {a} and lora_b {b} do not fit its shape {spec.shape}: want {(R, K)}, {(N, R)}"
        )
    lengths = K if path == ("embedding",) else N
    if delta.magnitude is not None and delta.magnitude.shape[-1] != lengths:
        return f"tensor {spec.name}: its magnitude has shape {delta.magnitude.shape}; want ({lengths},)"
    if check_values:
        for name, value in (
            ("lora_a", delta.a),
            ("lora_b", delta.b),
            ("scale", delta.scale),
            ("magnitude", delta.magnitude),
        ):
            if (
                value is not None
                and not isinstance(value, jax.core.Tracer)
                and not np.isfinite(np.asarray(value, np.float32)).all()
            ):
                return f"tensor {spec.name}: its {name} has a value that is NaN or infinite; every value must be finite"
    return None


def gguf_name(path: Path) -> str:
    """The name in a GGUF file of the weight at a path, whether or not a model has it."""
    return _GGUF_NAMES[path[-1]].format(path[1] if len(path) > 1 else "")


_GGUF_NAMES = {
    "embedding": "token_embd.weight",
    "output": "output.weight",
    "q": "blk.{}.attn_q.weight",
    "k": "blk.{}.attn_k.weight",
    "v": "blk.{}.attn_v.weight",
    "o": "blk.{}.attn_output.weight",
    "gate": "blk.{}.ffn_gate.weight",
    "up": "blk.{}.ffn_up.weight",
    "down": "blk.{}.ffn_down.weight",
}


def _layers(targets: Mapping[Path, TensorSpec]) -> int:
    return 1 + max(path[1] for path in targets if len(path) > 1)
