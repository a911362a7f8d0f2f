"""Makes the golden models and logits: small random models of the Llama family and what llama.cpp says of them.

    pip install llama-cpp-python gguf numpy
    python tests/golden/make_logits.py [OUTPUT_FOLDER]

Every case is one GGUF file with random weights and one `.npy` file with llama.cpp's float32 logits (T, V)
for `TOKENS`. On quantized weights llama.cpp quantizes activations too, so the logits of a quantized case are
those of the same file dequantized to F32 (with `gguf`), which is the exact reference. Both caches are F32 and
flash attention is off. Not part of the test run: the tests read what this wrote.
"""

import ctypes
import sys
import tempfile
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
from gguf import GGMLQuantizationType as Type

VOCAB = 96
TOKENS = [int(t) for t in np.random.default_rng(7).integers(0, VOCAB, 40)]
LEGACY = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_0", "Q4_1"]
K_QUANTS = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q4_K", "Q6_K"]
CASES = {
    # name: (architecture, sizes and metadata, tensor options)
    "llama_gqa": ("llama", {}, {}),
    "llama_separate_output": ("llama", {"rope.freq_base": 500000.0}, {"output": True}),
    "llama_rope_freqs": ("llama", {"rope.freq_base": 500000.0}, {"rope_freqs": True}),
    "llama_linear": ("llama", {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, {}),
    "llama_yarn": (
        "llama",
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 8.0, "rope.scaling.original_context_length": 64},
        {},
    ),
    "llama_yarn_attn_factor": (
        "llama",
        {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 128,
            "rope.scaling.attn_factor": 1.2,
        },
        {},
    ),
    "llama_biases_wide_heads": (
        "llama",
        {"attention.key_length": 24, "attention.value_length": 24, "rope.dimension_count": 24},
        {"biases": True},
    ),
    "llama_multi_head_f16": ("llama", {"attention.head_count_kv": 4}, {"formats": ["F16"]}),
    "llama_bf16": ("llama", {}, {"formats": ["BF16"]}),
    "llama_legacy_quants": ("llama", {}, {"formats": LEGACY}),
    "llama_k_quants": (
        "llama",
        {
            "embedding_length": 256,
            "feed_forward_length": 256,
            "block_count": 1,
            "attention.head_count": 4,
            "attention.head_count_kv": 1,
        },
        {"formats": K_QUANTS},
    ),
    "qwen2": ("qwen2", {"rope.freq_base": 1e6}, {"qkv_bias": True, "output": True}),
}
SIZES = {
    "context_length": 512,
    "embedding_length": 64,
    "feed_forward_length": 96,
    "block_count": 2,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "vocab_size": VOCAB,
}


def make_weights(sizes: dict, options: dict, rng: np.random.Generator) -> dict[str, np.ndarray]:
    D, F, H, K = (
        sizes[k] for k in ("embedding_length", "feed_forward_length", "attention.head_count", "attention.head_count_kv")
    )
    C = sizes.get("attention.key_length", D // H)

    def matrix(n, k):
        return (rng.standard_normal((n, k)) / np.sqrt(k)).astype(np.float32)

    def vector(n, around=0.0):
        return (around + 0.2 * rng.standard_normal(n)).astype(np.float32)

    weights = {"token_embd.weight": matrix(VOCAB, D) * 4, "output_norm.weight": vector(D, 1.0)}
    if options.get("output"):
        weights["output.weight"] = matrix(VOCAB, D) * 4
    if options.get("rope_freqs"):
        weights["rope_freqs.weight"] = np.linspace(1, 8, C // 2, dtype=np.float32)
    for i in range(sizes["block_count"]):
        p = f"blk.{i}."
        shapes = {"attn_q": (H * C, D), "attn_k": (K * C, D), "attn_v": (K * C, D), "attn_output": (D, H * C)}
        shapes |= {"ffn_gate": (F, D), "ffn_up": (F, D), "ffn_down": (D, F)}
        weights[p + "attn_norm.weight"] = vector(D, 1.0)
        weights[p + "ffn_norm.weight"] = vector(D, 1.0)
        for name, shape in shapes.items():
            weights[p + name + ".weight"] = matrix(*shape) * (3 if name in ("attn_q", "attn_k") else 1)
            if options.get("biases") or (options.get("qkv_bias") and name in ("attn_q", "attn_k", "attn_v")):
                weights[p + name + ".bias"] = vector(shape[0])
    return weights


def quantize(weight: np.ndarray, kind: Type) -> np.ndarray:
    """ggml's own quantizer, through the library that llama-cpp-python brings."""
    library = next((Path(llama_cpp.__file__).parent / "lib").glob("libggml-base.so*"))
    call = ctypes.CDLL(str(library)).ggml_quantize_chunk
    call.restype = ctypes.c_size_t
    call.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    weight = np.ascontiguousarray(weight, np.float32)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    out = np.zeros((weight.shape[0], weight.shape[1] // block * size), np.uint8)
    call(int(kind), weight.ctypes.data, out.ctypes.data, 0, *weight.shape, None)
    return out


def write(path: Path, architecture: str, sizes: dict, weights: dict, formats: list[str]) -> None:
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in sizes.items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(f"{architecture}.{key}", value)
    writer.add_string("tokenizer.ggml.model", "none")
    at = 0
    for name, weight in weights.items():
        if weight.ndim == 1:
            writer.add_tensor(name, weight)
            continue
        kind = Type[formats[at % len(formats)]]
        at += 1
        if kind == Type.F32:
            writer.add_tensor(name, weight)
        elif kind in (Type.F16, Type.BF16):
            writer.add_tensor(name, gguf.quants.quantize(weight, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def dequantized(path: Path, to: Path, architecture: str, sizes: dict) -> None:
    reader = gguf.GGUFReader(path)
    weights = {}
    for t in reader.tensors:
        shape = tuple(int(n) for n in reversed(t.shape))
        weights[t.name] = np.array(gguf.quants.dequantize(t.data, t.tensor_type), np.float32).reshape(shape)
    write(to, architecture, sizes, weights, ["F32"])


def logits(path: Path, tokens: list[int]) -> np.ndarray:
    """llama.cpp's logits after every token, float32 (T, V), with float32 caches and no flash attention."""
    m = llama_cpp
    model_params = m.llama_model_default_params()
    model = m.llama_model_load_from_file(str(path).encode(), model_params)
    params = m.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch, params.n_threads = 512, 512, 512, 1
    params.type_k = params.type_v = 0  # GGML_TYPE_F32
    params.flash_attn_type = 0  # disabled
    context = m.llama_init_from_model(model, params)
    batch = m.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for i, token in enumerate(tokens):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, i, 1, 0, 1
    if m.llama_decode(context, batch) != 0:
        raise RuntimeError(f"llama.cpp cannot decode {path}")
    vocab = m.llama_vocab_n_tokens(m.llama_model_get_vocab(model))
    out = np.ctypeslib.as_array(m.llama_get_logits(context), (len(tokens), vocab)).copy()
    m.llama_batch_free(batch)
    m.llama_free(context)
    m.llama_model_free(model)
    return out


def main(folder: Path) -> None:
    llama_cpp.llama_backend_init()
    for seed, (name, (architecture, extra, options)) in enumerate(CASES.items()):
        rng = np.random.default_rng(seed)
        sizes = SIZES | extra
        formats = options.get("formats", ["F32"])
        path = folder / f"{name}.gguf"
        write(path, architecture, sizes, make_weights(sizes, options, rng), formats)
        with tempfile.TemporaryDirectory() as scratch:
            reference = path
            if formats != ["F32"]:
                reference = Path(scratch) / "dequantized.gguf"
                dequantized(path, reference, architecture, sizes)
            np.save(folder / f"{name}.npy", logits(reference, TOKENS))
        print(f"{name}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "logits")
