"""Makes mixes.json: which format llama.cpp's own quantizer gives to every tensor of small made-up models.

    pip install llama-cpp-python gguf numpy
    python tests/golden/make_mixes.py [OUTPUT_FILE]

A model here is a GGUF file with the metadata and the tensor names of a real one, but only a few rows in each matrix:
llama.cpp looks at names, widths and metadata. It quantizes each file to every file type, with and without an
importance matrix, and the types in the file that it writes are the answer. Not part of the test run: the tests read
what this wrote.

In the file: `models` holds for each model its metadata and its tensors, [name, shape (row-major)]; `answers` holds for
each model and run ("Q4_K_M", "Q4_K_M imatrix", "Q4_K_M pure") one letter a tensor, which `letters` explains, or null
where llama.cpp refused. A run with imatrix or pure is left out where it gives what the plain run gives.
"""

import ctypes
import json
import string
import sys
import tempfile
from pathlib import Path

import gguf
import llama_cpp
import numpy as np

FILE_TYPES = {
    **{"F32": 0, "F16": 1, "BF16": 32, "Q4_0": 2, "Q4_1": 3, "Q5_0": 8, "Q5_1": 9, "Q8_0": 7},
    **{"Q2_K": 10, "Q2_K_S": 21, "Q3_K_S": 11, "Q3_K_M": 12, "Q3_K_L": 13, "Q4_K_S": 14, "Q4_K_M": 15, "Q5_K_S": 16},
    **{"Q5_K_M": 17, "Q6_K": 18, "IQ1_S": 24, "IQ1_M": 31, "IQ2_XXS": 19, "IQ2_XS": 20, "IQ2_S": 28, "IQ2_M": 29},
    **{"IQ3_XXS": 23, "IQ3_XS": 22, "IQ3_S": 26, "IQ3_M": 27, "IQ4_NL": 25, "IQ4_XS": 30, "TQ1_0": 36, "TQ2_0": 37},
}
PURE = ("Q2_K", "Q4_0", "Q4_K_M", "Q6_K", "IQ4_XS", "F16")
ROWS = 2


def metadata(architecture: str, layers: int, heads: int, kv_heads: int, width: int = 256, **more) -> dict:
    sizes = {
        "block_count": layers,
        "context_length": 64,
        "embedding_length": width,
        "feed_forward_length": 256,
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "attention.layer_norm_epsilon": 1e-5,
        "rope.dimension_count": width // heads,
        "vocab_size": 32,
    }
    return {"general.architecture": architecture} | {f"{architecture}.{k}": v for k, v in (sizes | more).items()}


def tensors(
    layers: int, width: int = 256, ffn: int = 256, *, output: bool, attention=("q", "k", "v"), feed=None, extra=None
) -> dict[str, tuple[int, ...]]:
    """Names and shapes as a real model has them: attention, feed-forward network, norms; `extra` in every layer."""
    shapes = {"token_embd.weight": (ROWS, width), "output_norm.weight": (width,)}
    if output:
        shapes["output.weight"] = (ROWS, width)
    feed = {"gate": (ROWS, width), "up": (ROWS, width), "down": (ROWS, ffn)} if feed is None else feed
    for i in range(layers):
        layer = {f"attn_{name}.weight": (ROWS, width) for name in (*attention, "output")}
        layer |= {f"ffn_{name}.weight": shape for name, shape in feed.items()} | (extra or {})
        if i == 0:
            layer |= {"attn_norm.weight": (width,), "ffn_norm.weight": (width,)}
        shapes |= {f"blk.{i}.{name}": shape for name, shape in layer.items()}
    return shapes


def experts(count: int) -> dict[str, tuple[int, ...]]:
    stacks = {f"{name}_exps": (count, ROWS, 256) for name in ("gate", "up", "down")}
    return stacks | {"gate_inp": (count, 256)}


MODELS = {
    "llama": (metadata("llama", 16, 4, 4), tensors(16, output=True)),
    "llama_tied_grouped": (metadata("llama", 9, 8, 2), tensors(9, output=False)),
    "llama_33_layers": (metadata("llama", 33, 8, 4), tensors(33, output=True)),
    "llama_rows_of_32": (metadata("llama", 4, 4, 4, 288), tensors(4, 288, 320, output=True)),
    "llama_rows_of_32_tied": (metadata("llama", 4, 4, 4, 288), tensors(4, 288, 256, output=False)),
    "llama_odd_rows": (metadata("llama", 4, 4, 4, 72), tensors(4, 72, 256, output=True)),
    "llama_70b": (metadata("llama", 80, 8, 1), tensors(80, output=True, attention=("v",), feed={"down": (ROWS, 256)})),
    "llama_65b": (metadata("llama", 80, 8, 8), tensors(80, output=True, attention=("v",), feed={})),
    "qwen2_72b": (metadata("qwen2", 80, 8, 4), tensors(80, output=True, attention=("v",), feed={})),
    "mixtral": (
        metadata("llama", 8, 8, 2, expert_count=8, expert_used_count=2),
        tensors(8, output=True, feed=experts(8)),
    ),
    "qwen3moe": (
        metadata("qwen3moe", 10, 8, 4, expert_count=4, expert_used_count=2, expert_feed_forward_length=256),
        tensors(10, output=True, feed=experts(4), extra={"attn_q_norm.weight": (32,), "attn_k_norm.weight": (32,)}),
    ),
    "qwen2_biases": (
        metadata("qwen2", 7, 4, 2),
        tensors(7, output=False, extra={f"attn_{n}.bias": (256,) for n in "qkv"}) | {"rope_freqs.weight": (16,)},
    ),
    "falcon": (
        metadata("falcon", 32, 8, 1),
        tensors(32, output=True, attention=("qkv",), feed={"up": (ROWS, 256), "down": (ROWS, 256)}),
    ),
    "phi3": (
        metadata("phi3", 17, 8, 8),
        tensors(17, output=True, attention=("qkv",), feed={"up": (ROWS, 256), "down": (ROWS, 256)}),
    ),
}


def write(path: Path, keys: dict, shapes: dict[str, tuple[int, ...]], rng: np.random.Generator) -> None:
    writer = gguf.GGUFWriter(path, keys["general.architecture"])
    for key, value in keys.items():
        if key != "general.architecture":
            {int: writer.add_uint32, float: writer.add_float32}[type(value)](key, value)
    for name, shape in shapes.items():
        writer.add_tensor(name, rng.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def importance(shapes: dict[str, tuple[int, ...]]) -> tuple[ctypes.Array, list]:
    """llama.cpp's list of entries, ended by an empty one, and what must stay alive as long as it."""
    alive, entries = [], []
    for name, shape in shapes.items():
        if len(shape) > 1:
            values = np.ones(int(np.prod(shape[:-2])) * shape[-1], np.float32)
            alive.append(values)
            data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            entries.append(llama_cpp.llama_model_imatrix_data(name.encode(), data, values.size))
    entries.append(llama_cpp.llama_model_imatrix_data(None, None, 0))
    return (llama_cpp.llama_model_imatrix_data * len(entries))(*entries), alive


def formats(source: Path, shapes: dict, file_type: str, *, imatrix: bool, pure: bool) -> list[str] | None:
    """What each tensor became, in the order of `shapes`; None where llama.cpp refuses."""
    target = source.with_name("out.gguf")
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread, params.pure = FILE_TYPES[file_type], 1, pure
    entries, alive = importance(shapes)
    if imatrix:
        params.imatrix = entries
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params)):
        return None
    del alive
    found = {t.name: t.tensor_type.name for t in gguf.GGUFReader(target).tensors}
    return [found[name] for name in shapes]


def main(path: Path) -> None:
    llama_cpp.llama_backend_init()
    quiet = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(quiet, None)
    letters: dict[str, str] = {}
    models, answers = {}, {}
    for seed, (name, (keys, shapes)) in enumerate(MODELS.items()):
        models[name] = {"metadata": keys, "tensors": [[n, list(s)] for n, s in shapes.items()]}
        answers[name] = {}
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "model.gguf"
            write(source, keys, shapes, np.random.default_rng(seed))
            for file_type in FILE_TYPES:
                plain = formats(source, shapes, file_type, imatrix=False, pure=False)
                runs = {file_type: plain}
                runs[f"{file_type} imatrix"] = formats(source, shapes, file_type, imatrix=True, pure=False)
                if file_type in PURE:
                    runs[f"{file_type} pure"] = formats(source, shapes, file_type, imatrix=False, pure=True)
                for run, found in runs.items():
                    if run != file_type and found == plain:
                        continue
                    for kind in found or ():
                        letters.setdefault(kind, string.ascii_letters[len(letters)])
                    answers[name][run] = found and "".join(letters[kind] for kind in found)
        print(f"{name}: {len(shapes)} tensors, {len(answers[name])} runs", flush=True)
    data = {"letters": {v: k for k, v in letters.items()}, "models": models, "answers": answers}
    path.write_text(compact(data), encoding="utf-8")


def compact(data: dict) -> str:
    """JSON with one model and one run a line."""
    answers = {name: lines(runs) for name, runs in data["answers"].items()}
    inner = ",\n".join(f"{json.dumps(name)}: {text}" for name, text in answers.items())
    parts = {"letters": json.dumps(data["letters"]), "models": lines(data["models"]), "answers": f"{{\n{inner}\n}}"}
    return "{" + ",\n".join(f'"{key}": {text}' for key, text in parts.items()) + "}\n"


def lines(items: dict) -> str:
    parts = [f"{json.dumps(key)}: {json.dumps(value, separators=(',', ':'))}" for key, value in items.items()]
    return "{\n" + ",\n".join(parts) + "\n}"


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "mixes.json")
