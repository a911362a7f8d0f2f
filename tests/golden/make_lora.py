"""Makes the golden adapters: random LoRA weights on small random models, and the logits that peft and llama.cpp give.

    pip install peft transformers torch gguf numpy llama-cpp-python
    python tests/golden/make_lora.py LLAMA_CPP_SOURCE [OUTPUT_FOLDER]

A base model is made by transformers, saved by hand as GGUF (q and k of llama permuted, as convert_hf_to_gguf.py does).
Adapters are made and applied by peft; where adapter GGUFs can say the same (one alpha, no DoRA), llama.cpp's
convert_lora_to_gguf.py makes one, which llama.cpp applies. `<case>@<scale>.npy`: peft's logits (T, V) of `TOKENS`,
float32; `<case>.gguf@<scale>.npy`: llama.cpp's. base_llama_quantized.gguf is a base in Q8_0 and Q4_0 blocks; its
logits are those of the same numbers in F32.

The `realm` command must be in PATH: what it converts, either way, is loaded and applied by llama.cpp and peft and must
give the same logits. Not part of the test run: the tests read what this wrote.
"""

import ctypes
import json
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

QUIET = llama_cpp.llama_log_callback(lambda _level, _text, _data: None)
VOCAB, HEADS, KV_HEADS = 64, 4, 2
TOKENS = [int(t) for t in np.random.default_rng(7).integers(0, VOCAB, 12)]
SCALES = (0.5, 1.0)
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ALL = [*LINEAR, "embed_tokens", "lm_head"]
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
CASES = {
    # name: (base, peft's config, also as GGUF)
    "llama_plain": ("llama", {"r": 4, "lora_alpha": 8, "target_modules": ALL}, True),
    "llama_rslora": ("llama", {"r": 4, "lora_alpha": 3, "use_rslora": True, "target_modules": ALL}, False),
    "llama_dora": ("llama", {"r": 3, "lora_alpha": 5, "use_dora": True, "target_modules": ALL}, False),
    "llama_patterns": (
        "llama",
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ["q_proj", "k_proj", "down_proj", "embed_tokens"],
            "rank_pattern": {r".*\.1\.self_attn\.(?:q|v)_proj": 2, "embed_tokens": 1},
            "alpha_pattern": {"k_proj": 3, "model.layers.0.mlp.down_proj": 20, "embed_tokens": 2},
        },
        False,
    ),
    "llama_quantized": ("llama_quantized", {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}, True),
    "qwen2_plain": ("qwen2", {"r": 4, "lora_alpha": 8, "target_modules": ALL}, True),
    "qwen2_dora": ("qwen2", {"r": 2, "lora_alpha": 3, "use_dora": True, "target_modules": LINEAR}, False),
}
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


def make_base(name: str, seed: int) -> torch.nn.Module:
    """A model of random weights that differ from each other enough for every mistake to show."""
    kind = (Qwen2ForCausalLM, Qwen2Config) if name == "qwen2" else (LlamaForCausalLM, LlamaConfig)
    model = kind[0](kind[1](**SIZES, attn_implementation="eager")).float().eval()
    generator = torch.Generator().manual_seed(seed)
    for key, weight in model.state_dict().items():
        noise = torch.randn(weight.shape, generator=generator)
        if weight.ndim == 1:
            weight.copy_(0.2 * noise + (0 if key.endswith("bias") else 1))
        else:
            gain = 3 if "q_proj" in key or "k_proj" in key else 4 if weight.shape[0] == VOCAB else 1
            weight.copy_(gain * noise / weight.shape[1] ** 0.5)
    return model


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def write_base(model: torch.nn.Module, path: Path, quantize: bool = False, tied: bool = False) -> None:
    """The model as GGUF. quantize: in blocks, whose numbers the model gets too."""
    architecture = model.config.model_type
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(SIZES["max_position_embeddings"])
    writer.add_embedding_length(SIZES["hidden_size"])
    writer.add_feed_forward_length(SIZES["intermediate_size"])
    writer.add_block_count(SIZES["num_hidden_layers"])
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(SIZES["rms_norm_eps"])
    writer.add_vocab_size(VOCAB)
    writer.add_string("tokenizer.ggml.model", "none")
    for index, (key, tensor) in enumerate(model.state_dict().items()):
        module, _, part = key.rpartition(".")
        layer = module.split(".")[2] if module.startswith("model.layers.") else None
        short = module.split(".", 3)[3] if layer else module
        weight, name = tensor.numpy(), (f"blk.{layer}." if layer else "") + f"{NAMES[short]}.{part}"
        if name == "output.weight" and tied:
            continue
        kind = Type.F32 if weight.ndim == 1 or not quantize else (Type.Q8_0, Type.Q4_0)[index % 2]
        turned = architecture == "llama" and short in ("self_attn.q_proj", "self_attn.k_proj")
        if kind != Type.F32:
            tensor.copy_(torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(weight, kind), kind)))
        weight = permuted(weight, HEADS if "q_proj" in short else KV_HEADS) if turned else weight
        writer.add_tensor(name, gguf.quants.quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def randomize(model: PeftModel, seed: int) -> None:
    """Random numbers into both halves; magnitudes are moved from where they begin."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if "lora_magnitude_vector" in name:
            weight.data *= 1 + 0.3 * torch.randn(weight.shape, generator=generator)
        elif "lora_" in name:
            weight.data = 0.4 * torch.randn(weight.shape, generator=generator)


def peft_logits(model: PeftModel, scale: float) -> np.ndarray:
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    own = [module.scaling["default"] for module in layers]
    for module, value in zip(layers, own, strict=True):
        module.scaling["default"] = value * scale
    with torch.inference_mode():
        logits = model(torch.tensor([TOKENS])).logits[0].numpy().astype(np.float32)
    for module, value in zip(layers, own, strict=True):
        module.scaling["default"] = value
    return logits


def llama_logits(base: Path, adapter: Path | None, scale: float) -> np.ndarray:
    """llama.cpp's logits after every token, float32 (T, V), with float32 caches and no flash attention."""
    m = llama_cpp
    model = m.llama_model_load_from_file(str(base).encode(), m.llama_model_default_params())
    params = m.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch, params.n_threads = 128, 128, 128, 1
    params.type_k = params.type_v = 0  # GGML_TYPE_F32
    params.flash_attn_type = 0  # disabled
    lora = m.llama_adapter_lora_init(model, str(adapter).encode()) if adapter else None
    if adapter and not lora:
        raise RuntimeError(f"llama.cpp refuses {adapter}")
    context = m.llama_init_from_model(model, params)
    if lora:
        loras = (type(lora) * 1)(lora)
        if m.llama_set_adapters_lora(context, loras, 1, (ctypes.c_float * 1)(scale)) != 0:
            raise RuntimeError(f"llama.cpp does not set {adapter}")
    batch = m.llama_batch_init(len(TOKENS), 0, 1)
    batch.n_tokens = len(TOKENS)
    for i, token in enumerate(TOKENS):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, i, 1, 0, 1
    if m.llama_decode(context, batch) != 0:
        raise RuntimeError(f"llama.cpp cannot decode {base}")
    out = np.ctypeslib.as_array(m.llama_get_logits(context), (len(TOKENS), VOCAB)).copy()
    m.llama_batch_free(batch)
    m.llama_free(context)
    m.llama_model_free(model)
    return out


def nmse(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.sum((ours.astype(np.float64) - theirs) ** 2) / np.sum(theirs.astype(np.float64) ** 2))


def agree(what: str, ours: np.ndarray, theirs: np.ndarray) -> None:
    error = nmse(ours, theirs)
    print(f"  {what}: NMSE {error:.1e}")
    if not error < 1e-9:
        raise AssertionError(f"{what}: NMSE {error}")


def convert(*args: object) -> None:
    subprocess.run(["realm", "convert-adapter", *map(str, args)], check=True)


def check_our_files(case: str, folder: Path, base: str, makers: dict, scratch: Path) -> None:
    """What `realm convert-adapter` writes is loaded by the other programs and gives the logits of what it was given."""
    peft_dir, dense = folder / case, scratch / f"{base}.gguf"
    if not json.loads((peft_dir / "adapter_config.json").read_text())["use_dora"]:
        convert(peft_dir, scratch / "ours.gguf", "--base", folder / f"base_{base}.gguf")
        for scale in SCALES:
            theirs = np.load(folder / f"{case}@{scale}.npy")
            agree(f"our GGUF in llama.cpp at {scale}", llama_logits(dense, scratch / "ours.gguf", scale), theirs)
    sources = [peft_dir] + [folder / f"{case}.gguf"] * (folder / f"{case}.gguf").exists()
    for source in sources:
        target = scratch / f"ours_{source.name.replace('.', '_')}"
        convert(source, target, "--base", folder / f"base_{base}.gguf")
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # missing or unexpected keys are such
            model = PeftModel.from_pretrained(makers[base](), target).eval()
        for scale in SCALES:
            ours = peft_logits(model, scale)
            agree(f"our PEFT from {source.name} at {scale}", ours, np.load(folder / f"{case}@{scale}.npy"))


def main(source: Path, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    llama_cpp.llama_backend_init()
    llama_cpp.llama_log_set(QUIET, None)
    with tempfile.TemporaryDirectory() as name:
        scratch, makers = Path(name), {}
        for seed, base in enumerate(("llama", "llama_quantized", "qwen2")):
            model = make_base(base, seed)
            write_base(model, folder / f"base_{base}.gguf", quantize=base == "llama_quantized")
            write_base(model, scratch / f"{base}.gguf")
            model.save_pretrained(scratch / base)
            numbers = {key: value.clone() for key, value in model.state_dict().items()}

            def make(base: str = base, seed: int = seed, numbers: dict = numbers) -> torch.nn.Module:
                made = make_base(base, seed)
                made.load_state_dict(numbers)
                return made

            makers[base] = make
        for seed, (case, (base, settings, also_gguf)) in enumerate(CASES.items()):
            print(case)
            model = get_peft_model(makers[base](), LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
            randomize(model, seed)
            model.save_pretrained(folder / case, save_embedding_layers=case == "llama_plain")
            (folder / case / "README.md").unlink(missing_ok=True)
            for scale in SCALES:
                np.save(folder / f"{case}@{scale}.npy", peft_logits(model, scale))
            if also_gguf:
                converter = [sys.executable, source / "convert_lora_to_gguf.py", folder / case]
                options = ["--base", scratch / base, "--outfile", folder / f"{case}.gguf", "--outtype", "f32"]
                subprocess.run([*converter, *options], check=True)
                for scale in SCALES:
                    logits = llama_logits(scratch / f"{base}.gguf", folder / f"{case}.gguf", scale)
                    np.save(folder / f"{case}.gguf@{scale}.npy", logits)
                    agree(f"llama.cpp and peft at {scale}", logits, np.load(folder / f"{case}@{scale}.npy"))
            check_our_files(case, folder, base, makers, scratch)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else Path(__file__).parent / "lora")
