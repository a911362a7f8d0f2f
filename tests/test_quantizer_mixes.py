"""The choice of formats against what llama.cpp's own quantizer chose, and the rules that go before it."""

import json
from pathlib import Path

import pytest

from realm_jax.errors import RealmError
from realm_jax.quantizer.mixes import (
    FILE_TYPES,
    choose_formats,
    file_type_id,
    may_quantize,
    plan_formats,
    wants_imatrix,
)

GOLDEN = json.loads((Path(__file__).parent / "golden" / "mixes.json").read_text(encoding="utf-8"))
LLAMA = {"general.architecture": "llama", "llama.block_count": 8, "llama.attention.head_count": 4}
WEIGHTS = {
    "token_embd.weight": ("F16", (32, 256)),
    "output_norm.weight": ("F32", (256,)),
    "blk.0.attn_q.weight": ("F16", (256, 256)),
    "blk.0.attn_v.weight": ("F16", (256, 256)),
    "blk.0.ffn_down.weight": ("F16", (256, 288)),
    "blk.0.ffn_gate_inp.weight": ("F32", (8, 256)),
    "blk.1.ffn_down.weight": ("IQ2_XXS", (256, 256)),
    "output.weight": ("F16", (32, 256)),
}


def golden_model(name: str) -> tuple[dict, dict]:
    model = GOLDEN["models"][name]
    return model["metadata"], {tensor: ("F32", tuple(shape)) for tensor, shape in model["tensors"]}


@pytest.mark.parametrize("name", GOLDEN["models"])
def test_every_mix_is_llama_cpps(name):
    metadata, tensors = golden_model(name)
    answers = GOLDEN["answers"][name]
    for mix in FILE_TYPES:
        for option in ("", " imatrix", " pure"):
            wanted = answers.get(mix + option, answers[mix])
            ours = choose_formats(mix, metadata, tensors, has_imatrix="im" in option, pure="pure" in option)
            refused = any(wants_imatrix(mix, tensor, format) for tensor, format in ours.items())
            if "imatrix" not in option and mix + option in answers:
                assert refused == (wanted is None), mix + option
            if wanted is not None and (option != " pure" or mix + option in answers):
                wanted = dict(zip(tensors, (GOLDEN["letters"][letter] for letter in wanted), strict=True))
                assert ours == wanted, mix + option


def test_the_golden_data_holds_every_mix():
    assert all(set(FILE_TYPES) <= set(runs) for runs in GOLDEN["answers"].values())


@pytest.mark.parametrize("name", ["Q3_K", "q4_k", "Q5_K", "MXFP4"])
def test_a_format_that_is_no_file_type_is_for_all_matrices(name):
    ours = choose_formats(name, LLAMA, WEIGHTS)
    substitute = {"Q3_K": "Q4_0", "q4_k": "Q5_0", "Q5_K": "Q5_1", "MXFP4": "MXFP4"}[name]
    assert ours == {
        **dict.fromkeys(WEIGHTS, name.upper()),
        "output_norm.weight": "F32",
        "blk.0.ffn_gate_inp.weight": "F32",
        "blk.0.ffn_down.weight": substitute,
    }


def test_rows_that_do_not_fit_are_told():
    plan = plan_formats("Q4_K", LLAMA, WEIGHTS)
    assert {n: c.instead_of for n, c in plan.items() if c.instead_of} == {"blk.0.ffn_down.weight": "Q4_K"}
    narrow = {"blk.0.attn_q.weight": ("F32", (4, 40))}
    assert choose_formats("Q4_K", LLAMA, narrow) == {"blk.0.attn_q.weight": "F16"}
    with pytest.raises(RealmError, match=r"'blk\.0\.attn_q\.weight' has rows of 40 .* NVFP4 has no substitute"):
        choose_formats("NVFP4", LLAMA, narrow)


def test_the_first_rule_that_fits_wins():
    keep = [("blk.0.*", "q8_0"), ("blk.*.ffn_down.weight", "Q6_K"), ("output.weight", "COPY")]
    ours = choose_formats("Q2_K", LLAMA, WEIGHTS, keep=keep)
    assert ours == {
        "token_embd.weight": "Q2_K",
        "output_norm.weight": "F32",
        "blk.0.attn_q.weight": "Q8_0",
        "blk.0.attn_v.weight": "Q8_0",
        "blk.0.ffn_down.weight": "Q8_0",
        "blk.0.ffn_gate_inp.weight": "F32",  # fits the pattern, but is a router
        "blk.1.ffn_down.weight": "Q6_K",
        "output.weight": "F16",
    }


def test_a_file_of_any_format_can_be_copied():
    assert choose_formats("copy", {}, WEIGHTS) == {name: format for name, (format, _) in WEIGHTS.items()}
    assert choose_formats("copy", {}, WEIGHTS, keep=[("output*", "Q8_0")])["output.weight"] == "Q8_0"


def test_rules_of_ones_own_are_not_counted_by_the_mix():
    """As with llama-quantize's --tensor-type: Q3_K_M gives Q5_K to the first two attn_v that it decides on."""
    metadata, tensors = golden_model("llama")
    ours = choose_formats("Q3_K_M", metadata, tensors, keep=[("blk.0.attn_v.weight", "Q8_0")])
    seen = [ours[f"blk.{i}.attn_v.weight"] for i in range(4)]
    assert seen == ["Q8_0", "Q5_K", "Q5_K", "Q4_K"]


@pytest.mark.parametrize(
    ("keep", "wanted"),
    [
        ([("attn_q", "Q8_0")], r"'attn_q=Q8_0' changes nothing: no tensor has such a name"),
        ([("*_norm.weight", "F16")], r"changes nothing: 'output_norm.weight' and the like are never quantized"),
        ([("blk.*", "Q8_0"), ("blk.0.*", "Q6_K")], r"'blk\.0\.\*=Q6_K' changes nothing: rules before it"),
        ([("blk.*", "Q4_K_M")], r"'Q4_K_M' is not a format for tensors 'blk\.\*' \(Q4_K_M is a mix"),
        ([("blk.*", "Q9")], r"'Q9' is not a format for tensors 'blk\.\*'; formats: F32, .*COPY"),
    ],
)
def test_rules_that_cannot_be_meant(keep, wanted):
    with pytest.raises(RealmError, match=wanted):
        choose_formats("Q2_K", LLAMA, WEIGHTS, keep=keep)


def test_unknown_names():
    with pytest.raises(RealmError, match=r"'Q7_K' is not a format that a file can be quantized to; mixes: F32, .*COPY"):
        choose_formats("Q7_K", LLAMA, WEIGHTS)


@pytest.mark.parametrize(
    ("name", "shape", "wanted"),
    [
        ("blk.0.attn_q.weight", (4, 256), True),
        ("blk.0.attn_q.weight", (256,), False),
        ("blk.0.attn_q.weight", (1, 256), False),  # one dimension for ggml, which drops leading ones
        ("blk.0.ffn_up_exps.weight", (8, 4, 256), True),
        ("blk.0.attn_q.bias", (4, 256), False),
        ("blk.0.attn_q_norm.weight", (4, 256), False),
        ("blk.0.ffn_gate_inp.weight", (8, 256), False),
        ("blk.0.ssm_conv1d.weight", (8, 4), False),
        ("position_embd.weight", (8, 256), False),
    ],
)
def test_what_is_never_quantized(name, shape, wanted):
    assert may_quantize(name, shape) == wanted


def test_layers_are_needed_where_experts_are():
    metadata = {"general.architecture": "llama", "llama.block_count": 1, "llama.expert_count": 8}
    tensors = {"blk.1.ffn_down_exps.weight": ("F32", (8, 2, 256))}
    with pytest.raises(RealmError, match=r"'blk\.1\.ffn_down_exps\.weight' is not in one of the 1 layers"):
        choose_formats("Q4_K_M", metadata, tensors)


@pytest.mark.parametrize("value", ["8", 8.0, [], ["8"]])
def test_metadata_that_is_no_number(value):
    with pytest.raises(RealmError, match=r"key 'llama\.block_count' is .*: it must be an integer"):
        choose_formats("Q4_K_M", LLAMA | {"llama.block_count": value}, WEIGHTS)
    assert choose_formats("copy", LLAMA | {"llama.block_count": value}, WEIGHTS)  # does not matter here


def test_file_types():
    assert {name: file_type_id(name) for name in ("F32", "Q2_K", "Q4_K", "Q4_K_M", "Q4_K_S", "Q8_K", "COPY")} == {
        **{"F32": 0, "Q2_K": 10, "Q4_K": 15, "Q4_K_M": 15, "Q4_K_S": 14, "Q8_K": None, "COPY": None}
    }
