"""Makes the golden importance matrices: a small random model, a text, and what llama-imatrix measures with them.

    python tests/golden/make_imatrix.py PATH/TO/llama-imatrix [OUTPUT_FOLDER]

llama-imatrix is a program of llama.cpp, built from its source. One file is in GGUF, made as by default; the other is in
the older format and with `--process-output`. A batch is one chunk, because llama-imatrix passes over what is left of a
larger one, if that is less than 16 tokens; caches are F32 and flash attention is off. Not part of the test run: the
tests read what this wrote.
"""

import subprocess
import sys
from pathlib import Path

import jax
import numpy as np

from realm_jax.gguf.types import field
from realm_jax.gguf.unicode import byte_characters
from realm_jax.model import Config, Rope, init_params
from realm_jax.model.files import export

CONTEXT = 64
SEED = 3
TEXT = "the quick brown fox jumps over a lazy dog, and 12 others: in the end nothing was thin."


def make_model(path: Path) -> None:
    """One layer, grouped heads, an output matrix of its own, and a vocabulary of bytes."""
    tokens = ["<s>", "</s>", *byte_characters(), "th", "the", "in"]
    values = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "token_type": [3, 3] + [1] * (len(tokens) - 2),
        "merges": ["t h", "th e", "i n"],
        "bos_token_id": 0,
        "eos_token_id": 1,
        "add_bos_token": True,
    }
    config = Config(
        architecture="llama", vocab_size=len(tokens), context_length=256, layers=1, width=32, ffn_width=64, heads=4,
        kv_heads=2, head_width=8, norm_eps=1e-5, rope=Rope(dimensions=8),
    )  # fmt: skip
    params = init_params(config, jax.random.key(SEED), tied=False)
    fields = {f"tokenizer.ggml.{key}": field(value) for key, value in values.items()}
    export(path, config, params, fields, lambda *_: "F32")


def main(program: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    make_model(folder / "model.gguf")
    text = " ".join(np.random.default_rng(SEED).choice(TEXT.split(), 200))
    (folder / "text.txt").write_text(text, encoding="utf-8")
    options = (
        f"-m model.gguf -f text.txt -c {CONTEXT} -b {CONTEXT} -ub {CONTEXT} -ctk f32 -ctv f32 -fa off --no-ppl -t 1"
    )
    for name, more in (("imatrix.gguf", ""), ("imatrix.dat", "--output-format dat --process-output")):
        subprocess.run([program, *options.split(), "-o", name, *more.split()], cwd=folder, check=True)
        print(f"{name}: {(folder / name).stat().st_size} bytes")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]) if len(sys.argv) > 2 else Path(__file__).parent / "imatrix")
