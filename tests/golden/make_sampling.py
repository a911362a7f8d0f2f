"""Makes sampling.json: what llama.cpp's sampler chain makes of random logits under random settings.

    pip install llama-cpp-python==0.3.36 && python tests/golden/make_sampling.py

The chain is its default one: logit bias, penalties, top-k, top-p, min-p, temperature. Penalties there look at one
history, so every case's tokens count as generated.
"""

import ctypes
import json
from pathlib import Path

import llama_cpp as lc
import numpy as np

CASES = 60


def chain(case: dict) -> "lc.llama_sampler_p":
    """A sampler chain that has accepted the case's tokens."""
    bias = case["logit_bias"]
    entries = [lc.llama_logit_bias(token, value) for token, value in bias]
    size = len(case["logits"])
    sampler = lc.llama_sampler_chain_init(lc.llama_sampler_chain_default_params())
    for link in (
        lc.llama_sampler_init_logit_bias(size, len(bias), (lc.llama_logit_bias * len(bias))(*entries)),
        lc.llama_sampler_init_penalties(
            size, 64, case["repetition_penalty"], case["frequency_penalty"], case["presence_penalty"]
        ),
        lc.llama_sampler_init_top_k(case["top_k"]),
        lc.llama_sampler_init_top_p(case["top_p"], 1),
        lc.llama_sampler_init_min_p(case["min_p"], 1),
        lc.llama_sampler_init_temp(case["temperature"]),
    ):
        lc.llama_sampler_chain_add(sampler, link)
    for token in case["tokens"]:
        lc.llama_sampler_accept(sampler, token)
    return sampler


def distribution(case: dict) -> list[float]:
    """Probabilities after the chain; 0 for tokens that it removed."""
    candidates = [lc.llama_token_data(i, x, 0.0) for i, x in enumerate(case["logits"])]
    array = lc.llama_token_data_array((lc.llama_token_data * len(candidates))(*candidates), len(candidates), -1, False)
    sampler = chain(case)
    lc.llama_sampler_apply(sampler, ctypes.byref(array))
    logits = np.full(len(candidates), -np.inf)
    for i in range(array.size):
        logits[array.data[i].id] = array.data[i].logit
    lc.llama_sampler_free(sampler)
    weights = np.exp(logits - logits.max())
    return [float(f"{p:.8g}") for p in weights / weights.sum()]


def random_case(rng: np.random.Generator) -> dict:
    size = 40
    return {
        "logits": [float(np.float32(f"{x:.5g}")) for x in rng.normal(0, 2.5, size)],
        "tokens": rng.integers(0, size, 8).tolist(),
        "temperature": float(rng.choice([0.2, 0.7, 1.0, 1.5, 3.0])),
        "top_k": int(rng.choice([0, 0, 1, 3, 20, 1000])),
        "top_p": float(rng.choice([1.0, 0.99, 0.9, 0.5, 0.1, 0.01])),
        "min_p": float(rng.choice([0.0, 0.01, 0.05, 0.3])),
        "repetition_penalty": float(rng.choice([1.0, 1.1, 1.5])),
        "frequency_penalty": float(rng.choice([0.0, 0.3])),
        "presence_penalty": float(rng.choice([0.0, 0.4])),
        "logit_bias": [[int(t), float(rng.normal(0, 3))] for t in rng.choice(size, 3, replace=False)],
    }


def main() -> None:
    rng = np.random.default_rng(0)
    cases = [random_case(rng) for _ in range(CASES)]
    lines = [json.dumps(case | {"probabilities": distribution(case)}) for case in cases]
    Path(__file__).with_name("sampling.json").write_text("[\n" + ",\n".join(lines) + "\n]\n")


if __name__ == "__main__":
    main()
