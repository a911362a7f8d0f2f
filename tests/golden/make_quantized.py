"""Makes quantized.npz: weights, and the blocks that ggml's quantizers make of them.

    pip install llama-cpp-python==0.3.36 && python tests/golden/make_quantized.py

`blocks_<format>` are those of `weights`; `powers` and `ties` are rows where MXFP4 and NVFP4 must round as ggml does;
`importance_<format>` are those of `heavy` under the importance matrix `importance`, `plain_<format>` without one.
"""

import ctypes
from pathlib import Path

import llama_cpp
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

PATH = Path(__file__).with_name("quantized.npz")
ggml = ctypes.CDLL(str(Path(llama_cpp.__file__).with_name("lib") / "libggml-base.so"))
ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
ggml.ggml_quantize_chunk.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]


def quantize(w: np.ndarray, name: str, importance: np.ndarray | None = None) -> np.ndarray:
    """Rows (N, K) in float32 as ggml quantizes them: uint8 (N, bytes)."""
    kind = GGMLQuantizationType[name]
    block_size, block_bytes = GGML_QUANT_SIZES[kind]
    blocks = np.zeros((len(w), w.shape[1] // block_size * block_bytes), np.uint8)
    matrix = None if importance is None else importance.ctypes.data
    ggml.ggml_quantize_chunk(int(kind), w.ctypes.data, blocks.ctypes.data, 0, *w.shape, matrix)
    return blocks


def weights(rng: np.random.Generator) -> np.ndarray:
    """Rows of 512 weights of many kinds."""
    normal = rng.standard_normal((10, 512))
    rows = [
        normal[:2],
        rng.standard_t(2.5, (2, 512)) * 0.02,
        normal[2:3] + 3,
        -rng.exponential(1, (1, 512)),
        normal[3:4] * np.exp(rng.standard_normal(512)),
        np.where(rng.random((1, 512)) < 0.05, normal[4:5], 0),
        rng.integers(-8, 8, (1, 512)),
        np.repeat(rng.standard_normal((1, 2)), 256, 1),
        np.zeros((1, 512)),
        normal[5:6] * 1e-30,
        normal[6:7] * 1e-6,
        normal[7:8] * 500,
    ]
    return np.concatenate(rows).astype(np.float32)


def powers(rng: np.random.Generator) -> np.ndarray:
    """Blocks of 32 whose largest weight is a power of two or a few float32 numbers below one."""
    exponents = np.array([-100, -64, -33, -16, -2, -1, 0, 1, 2, 3, 8, 17, 32, 64, 65, 126], np.float32)
    below = np.array([0, 1, 2, 3, 5, 11, 12, 22, 23, 44, 45, 100], np.uint32)
    top = (np.exp2(exponents).view(np.uint32)[None] - below[:, None]).view(np.float32).reshape(-1, 1)
    rest = rng.uniform(-1, 1, (len(top), 31)).astype(np.float32) * top
    return np.concatenate([top, rest], 1).reshape(len(below), 512)


def ties(rng: np.random.Generator) -> np.ndarray:
    """Blocks of 16 whose scales lie at and beside the places where UE4M3 rounds the other way, and at its ends."""
    values = (1 + np.arange(16) / 16) * np.exp2(np.arange(-8, 8))[:, None]
    middles = np.concatenate([values.ravel(), np.arange(0, 8.5, 0.5) / 512, [256, 448, 460]]).astype(np.float32)
    top = np.stack([np.nextafter(middles, np.float32(-np.inf)), middles, np.nextafter(middles, np.float32(np.inf))])
    top = np.abs(top[:, : top.shape[1] // 32 * 32]).reshape(-1, 1) * np.float32(6)
    steps = rng.integers(-14, 15, (len(top), 15)).astype(np.float32) / 14  # among them middles of neighbours
    return np.concatenate([top, steps * top], 1).reshape(-1, 512)


def main() -> None:
    rng = np.random.default_rng(0)
    arrays = {"weights": weights(rng), "powers": powers(rng), "ties": ties(rng)}
    for name in ("TQ1_0", "TQ2_0", "MXFP4", "NVFP4"):
        arrays[f"blocks_{name}"] = quantize(arrays["weights"], name)
    arrays["powers_MXFP4"] = quantize(arrays["powers"], "MXFP4")
    arrays["ties_NVFP4"] = quantize(arrays["ties"], "NVFP4")
    arrays["heavy"] = rng.standard_t(3, (16, 512)).astype(np.float32)
    arrays["importance"] = np.exp(2 * rng.standard_normal(512)).astype(np.float32)
    for name in ("IQ4_NL", "IQ4_XS"):
        arrays[f"plain_{name}"] = quantize(arrays["heavy"], name)
        arrays[f"importance_{name}"] = quantize(arrays["heavy"], name, arrays["importance"])
    np.savez_compressed(PATH, **arrays)


if __name__ == "__main__":
    main()
