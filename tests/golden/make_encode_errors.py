"""Makes encode_errors.json: the errors that ggml's quantizers leave, with and without an importance matrix.

    pip install llama-cpp-python==0.3.36 && python tests/golden/make_encode_errors.py

Weights and importance are drawn by `draws` and `importance` here, which the tests call too. For each format and draw:
the sum of squared errors, and the sum weighted by the importance, of the blocks that ggml_quantize_chunk makes without
and with the importance matrix.
"""

import ctypes
import json
from pathlib import Path

import gguf
import numpy as np

PATH = Path(__file__).with_name("encode_errors.json")
FORMATS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")
ROWS, WIDTH = 64, 1024


def draws() -> dict[str, np.ndarray]:
    """Weights, float32 (ROWS, WIDTH): Gaussian, heavy-tailed, with outlier columns, off centre, bounded."""
    rng = np.random.default_rng(5)
    shape = (ROWS, WIDTH)
    kinds = {
        "normal": rng.standard_normal(shape),
        "laplace": rng.laplace(size=shape),
        "student_t3": rng.standard_t(3, shape),
        "outlier columns": rng.standard_normal(shape) * np.exp(rng.standard_normal(WIDTH)),
        "shifted": rng.standard_normal(shape) + 2,
        "uniform": rng.uniform(-1, 1, shape),
    }
    return {name: (0.02 * w).astype(np.float32) for name, w in kinds.items()}


def importance() -> np.ndarray:
    """Importance, float32 (WIDTH,), over three orders of magnitude."""
    return np.exp(1.5 * np.random.default_rng(9).standard_normal(WIDTH)).astype(np.float32)


def errors(w: np.ndarray, blocks: np.ndarray, name: str) -> dict[str, float]:
    """Sums over squared errors of blocks uint8 (ROWS, bytes), as `gguf` reads them."""
    off = np.square(np.float64(gguf.dequantize(blocks, gguf.GGMLQuantizationType[name])) - w)
    return {"plain": float(off.sum()), "weighted": float((off * importance()).sum())}


def main() -> None:
    import llama_cpp

    ggml = ctypes.CDLL(str(Path(llama_cpp.__file__).with_name("lib") / "libggml-base.so"))
    ggml.ggml_quantize_chunk.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]

    def quantize(w: np.ndarray, name: str, matrix: np.ndarray | None) -> np.ndarray:
        kind = gguf.GGMLQuantizationType[name]
        size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        blocks = np.zeros((ROWS, WIDTH // size * block_bytes), np.uint8)
        ggml.ggml_quantize_chunk(
            int(kind), w.ctypes.data, blocks.ctypes.data, 0, ROWS, WIDTH, None if matrix is None else matrix.ctypes.data
        )
        return blocks

    table = {
        name: {
            kind: {
                "without": errors(w, quantize(w, name, None), name),
                "with": errors(w, quantize(w, name, importance()), name),
            }
            for kind, w in draws().items()
        }
        for name in FORMATS
    }
    PATH.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
