"""Experiments on quantization: the off-grid twin, estimates from gradients, size budgets, and whole runs in small."""

import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quant_quality
import quant_sensitivity
import realm_jax as realm
from fisher import sample_fisher
from off_grid import off_grid, turning_matrix
from quant_setup import (
    Subject,
    SubjectConfig,
    TextConfig,
    dense,
    is_packed,
    known_formats,
    make_subject,
    metrics_of,
    replace_weights,
    score_model,
    with_error,
)
from realm_jax.errors import RealmError
from realm_jax.experiment import Run, load_config
from realm_jax.model import Config, Model, Rope, init_params
from realm_jax.model.model import Origin
from realm_jax.model.params import get_weight, tensor_specs
from realm_jax.quant import quantize
from sensitivity_report import kind_of, spearman
from size_budget import choose_within

CONFIGS = Path(__file__).parents[1] / "configs"
TEXT = ["text.context=32", "text.chunks=6", "text.calibration_chunks=6", "batch=6"]


@pytest.fixture(scope="module")
def untied():
    """A random model with gains, biases in all places, and an output matrix of its own."""
    config = Config(
        architecture="qwen2", vocab_size=48, context_length=64, layers=2, width=32, ffn_width=64, heads=4, kv_heads=2,
        head_width=8, norm_eps=1e-5, rope=Rope(dimensions=8, halves=True),
    )  # fmt: skip
    params = init_params(config, jax.random.key(0), tied=False)
    rng, changed = np.random.default_rng(0), {}
    for spec in tensor_specs(config):
        if len(spec.shape) == 1 and "rope" not in spec.name:
            changed[spec.path] = jnp.asarray(1 + rng.normal(size=spec.shape) / 2, jnp.float32)
    return Model(replace_weights(params, config, changed), config, None, Origin("random", {}))


# --- the twin --------------------------------------------------------------------------------------------------------


def relative_difference(ours, theirs) -> float:
    return float(jnp.abs(ours - theirs).max() / jnp.abs(theirs).max())


@pytest.mark.parametrize("turn", [0.0, 0.3, 2.0])
def test_the_twin_computes_the_same(untied, turn):
    tokens = np.random.default_rng(1).integers(0, 48, (2, 24))
    twin = off_grid(untied, turn=turn, seed=3)
    assert relative_difference(realm.forward(twin, tokens), realm.forward(untied, tokens)) < 1e-5
    moved = relative_difference(twin.params.layers[1].ffn.down, untied.params.layers[1].ffn.down)
    assert moved == 0 if turn == 0 else moved > 0.05


def test_the_bundled_models_twin_is_off_its_grid_and_the_same():
    model = realm.load()
    twin = off_grid(model, turn=0.3, seed=0)
    tokens = np.random.default_rng(1).integers(0, model.config.vocab_size, (1, 32))
    assert relative_difference(realm.forward(twin, tokens), realm.forward(dense(model), tokens)) < 1e-4
    assert is_packed(model) and not is_packed(twin) and twin.params.output is not None

    def error(weight, format):
        w = np.asarray(weight.dequantize() if is_packed(model) and hasattr(weight, "planes") else weight)
        return np.square(np.asarray(quantize(w, format).dequantize()) - w).sum() / np.square(w).sum()

    up, turned = model.params.layers[2].ffn.up, twin.params.layers[2].ffn.up
    normal = np.random.default_rng(0).normal(size=(256, 256)).astype(np.float32)
    assert error(up, "Q4_K") < 0.5 * error(normal, "Q4_K")  # it has been in Q4_K before
    assert error(turned, "Q4_K") == pytest.approx(error(normal, "Q4_K"), rel=0.1)


def test_turning_matrices():
    for turn in (0.1, 0.3, 1.0):
        matrix = turning_matrix(200, turn, seed=0)
        np.testing.assert_allclose(matrix @ matrix.T, np.eye(200), atol=1e-12)
        angles = np.arccos(np.diag(matrix))
        assert np.sqrt(np.mean(angles**2)) == pytest.approx(turn, rel=0.1)
    np.testing.assert_array_equal(turning_matrix(8, 0.0, seed=0), np.eye(8))
    with pytest.raises(RealmError, match="want at least 0 and less than pi"):
        turning_matrix(8, 4.0, seed=0)


# --- estimates -------------------------------------------------------------------------------------------------------


def test_estimates_are_the_divergence_of_small_changes(untied):
    """To second order KL = 1/2 d' F d: the directional estimate within its sampling error, for each tensor and all."""
    chunks = np.random.default_rng(2).integers(0, 48, (8, 16)).astype(np.int32)
    subject = Subject(untied, chunks, chunks, "random")
    matrices = {spec.name: spec.path for spec in tensor_specs(untied.config) if len(spec.shape) == 2}
    weights = {name: np.asarray(get_weight(untied.params, path)) for name, path in matrices.items()}
    rng = np.random.default_rng(3)
    changes = {name: 3e-3 * rng.normal(size=(1, *w.shape)).astype(np.float32) for name, w in weights.items()}
    fisher = sample_fisher(untied, chunks, changes, draws=256, seed=0)

    def measured(names) -> float:
        changed = {matrices[name]: jnp.asarray(weights[name] + changes[name][0]) for name in names}
        model = untied.replace(params=replace_weights(untied.params, untied.config, changed))
        return float(score_model(subject, model).kl.mean())

    for name in ("token_embd.weight", "output.weight", "blk.0.attn_k.weight", "blk.1.ffn_down.weight"):
        estimate = fisher.directional_kl(name)[0].mean
        spread = estimate * np.sqrt(2 / 256 / 8)  # of the mean of 2048 squared normal numbers
        assert measured([name]) == pytest.approx(estimate, abs=4 * spread)
        # Errors at random, of one variance, add up without regard to direction: then the diagonal is enough.
        assert fisher.diagonal_kl(name)[0] == pytest.approx(estimate, rel=0.4)
    joint = fisher.joint_kl(dict.fromkeys(matrices, 0)).mean
    assert measured(matrices) == pytest.approx(joint, abs=4 * joint * np.sqrt(2 / 256 / 8))


def test_the_diagonal_estimate_misses_what_weights_do_together(untied):
    """A change along the gain of the final norm only scales logits; along one logit's row it acts as one direction."""
    chunks = np.random.default_rng(2).integers(0, 48, (8, 16)).astype(np.int32)
    # The same number added to all logits changes no prediction, though every weight in it matters.
    change = np.broadcast_to(np.random.default_rng(0).normal(size=32).astype(np.float32) * 1e-2, (1, 48, 32))
    fisher = sample_fisher(untied, chunks, {"output.weight": change}, draws=8, seed=0)
    assert fisher.directional_kl("output.weight")[0].mean < 1e-6 * fisher.diagonal_kl("output.weight")[0]


def test_ranks_and_names():
    x = np.array([3.0, 1.0, 2.0, 10.0])
    assert spearman(x, np.exp(x)) == pytest.approx(1) and spearman(x, -x) == pytest.approx(-1)
    assert (kind_of("blk.3.attn_q.weight"), kind_of("output.weight")) == ("attn_q", "output")
    assert with_error(0.0123456, 0.00056) == "0.01235 ± 0.00056" and with_error(2.0, 0.0) == "2"


# --- budgets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_no_choice_within_the_budget_costs_less(seed):
    rng = np.random.default_rng(seed)
    sizes = {f"t{i}": (2 * rng.integers(1, 40, size=3)).tolist() for i in range(5)}
    costs = {name: rng.exponential(size=3).tolist() for name in sizes}
    everything = [dict(zip(sizes, choice, strict=True)) for choice in itertools.product(range(3), repeat=5)]
    totals = [tuple(sum(t[n][i] for n, i in c.items()) for t in (sizes, costs)) for c in everything]
    budget = int(np.median([size for size, _ in totals]))
    chosen = choose_within(budget, sizes, costs)
    assert list(chosen) == list(sizes) and sum(sizes[n][i] for n, i in chosen.items()) <= budget
    least = min(cost for size, cost in totals if size <= budget)
    assert sum(costs[n][i] for n, i in chosen.items()) == pytest.approx(least)


def test_large_sizes_are_rounded_but_the_budget_holds():
    rng = np.random.default_rng(0)
    sizes = {f"t{i}": rng.integers(10**9, 5 * 10**9, size=4).tolist() for i in range(20)}
    costs = {name: [1 / size for size in sizes[name]] for name in sizes}
    budget = 50 * 10**9
    used = sum(sizes[name][i] for name, i in choose_within(budget, sizes, costs).items())
    assert 0.99 * budget < used <= budget
    with pytest.raises(RealmError, match="is too small: the smallest candidates take"):
        choose_within(10**9, sizes, costs)


# --- whole runs ------------------------------------------------------------------------------------------------------


def test_quality_run_is_complete_and_resumes(model_file, tmp_path):
    overrides = [f"subject.model={model_file}", *TEXT, 'formats=["Q4_0", "Q8_0", "BF16", "TQ2_0"]', 'mixes=["Q4_0"]']
    config = load_config(
        quant_quality.QuantQualityConfig, CONFIGS / "quant_quality.toml", [*overrides, 'methods=["refine"]']
    )
    run = Run.create(config, "quant_quality", root=tmp_path, name="a")
    quant_quality.main(config, run)
    lines = run.metrics()
    cells = [(line["name"], line["is_mix"], line["imatrix"]) for line in lines]
    assert len(set(cells)) == len(cells)
    assert {("BF16", False, False), ("Q8_0", False, False), ("Q4_0", False, True), ("Q4_0", True, True)} <= set(cells)
    assert ("BF16", False, True) not in cells and ("Q8_0", False, True) not in cells
    wanted = {"bytes", "bits_per_weight", "kl", "kl_error", "kl_median", "kl_99", "perplexity", "perplexity_error",
              "top1", "top1_error", "method", "seconds"}  # fmt: skip
    assert all(wanted <= line.keys() and line["kl"] >= 0 for line in lines)
    kl = {cell: line["kl"] for cell, line in zip(cells, lines, strict=True)}
    assert kl["BF16", False, False] < kl["Q8_0", False, False] < kl["Q4_0", False, False]
    bits = {line["name"]: line["bits_per_weight"] for line in lines if not line["is_mix"]}
    assert bits["Q8_0"] - bits["Q4_0"] == pytest.approx(4, abs=0.02)
    assert bits["TQ2_0"] == bits["Q4_0"]  # rows of 64 are no whole blocks of TQ2_0: the substitute is llama.cpp's
    table = (run.folder / "results.md").read_text(encoding="utf-8")
    assert table.count("\n| ") == 5 + len(lines) + 4 and "jax" in table and "off" not in table.split("\n")[2]
    assert (run.folder / "pareto.png").read_bytes().startswith(b"\x89PNG")
    run.keep_metrics(lambda line: line["name"] != "BF16")
    quant_quality.main(config, Run.resume(config, "quant_quality", root=tmp_path, name="a"))
    again = {(line["name"], line["is_mix"], line["imatrix"]): line["kl"] for line in run.metrics()}
    assert again == pytest.approx(kl) and len(run.metrics()) == len(lines)


def test_sensitivity_run_is_complete_and_keeps_to_the_budget(model_file, tmp_path):
    overrides = [f"subject.model={model_file}", *TEXT, 'swap_formats=["Q4_0"]', 'formats=["Q4_0", "Q5_0", "Q8_0"]',
                 'budgets=["Q5_0"]', 'mixes=["Q4_0"]', "draws=2"]  # fmt: skip
    config = load_config(quant_sensitivity.QuantSensitivityConfig, CONFIGS / "quant_sensitivity.toml", overrides)
    run = Run.create(config, "quant_sensitivity", root=tmp_path, name="a")
    quant_sensitivity.main(config, run)
    lines = {kind: [line for line in run.metrics() if line["kind"] == kind] for kind in ("swap", "estimate", "mix")}
    assert [len(lines[kind]) for kind in lines] == [15, 45, 6]  # 2 layers of 7 matrices and the embedding
    mixes = {(mix["by"], mix["name"]): mix for mix in lines["mix"]}
    for by in ("diagonal", "directional"):
        assert mixes[by, "Q5_0"]["bytes"] <= mixes["uniform", "Q5_0"]["bytes"]
        assert mixes[by, "Q5_0"]["formats"].keys() == {line["tensor"] for line in lines["swap"]}
    assert mixes["uniform", "Q8_0"]["kl"] < mixes["uniform", "Q5_0"]["kl"] < mixes["uniform", "Q4_0"]["kl"]
    table = (run.folder / "results.md").read_text(encoding="utf-8")
    assert "Spearman" in table and "chosen by directional Fisher" in table
    for name in ("sensitivity.png", "estimates.png", "mixes.png"):
        assert (run.folder / name).read_bytes().startswith(b"\x89PNG")


def test_shipped_configs_load_and_mistakes_are_named():
    quality = load_config(quant_quality.QuantQualityConfig, CONFIGS / "quant_quality.toml")
    assert not quality.formats and "Q4_K_M" in quality.mixes
    assert {"Q2_K", "Q8_0", "F16", "MXFP4"} <= set(known_formats()) and not {"Q8_1", "Q8_K"} & set(known_formats())
    path = CONFIGS / "quant_sensitivity.toml"
    load_config(quant_sensitivity.QuantSensitivityConfig, path)
    with pytest.raises(RealmError, match="budgets: 'Q9' is none; known here: Q2_K, "):
        load_config(quant_sensitivity.QuantSensitivityConfig, path, ['budgets=["Q9"]'])
    with pytest.raises(RealmError, match="formats: 'Q8_K' is none"):
        load_config(quant_quality.QuantQualityConfig, CONFIGS / "quant_quality.toml", ['formats=["Q8_K"]'])


def test_texts_of_ones_own_must_be_long_enough(model_file, tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("the " * 100, encoding="utf-8")
    config = TextConfig(held_out=text, calibration=text, context=16, chunks=2, calibration_chunks=3)
    subject = make_subject(SubjectConfig(model_file), config)
    assert subject.held_out_NT.shape == (2, 16) and subject.calibration_NT.shape == (3, 16)
    assert subject.about == "small.gguf" and dense(subject.reference).params.norm.dtype == np.float32
    with pytest.raises(RealmError, match=r"a\.txt: has .* chunks of 16 tokens; 1000 are wanted"):
        make_subject(SubjectConfig(model_file), TextConfig(held_out=text, context=16, chunks=1000))


def test_metrics_of_few_tokens_are_still_json(untied):
    chunks = np.random.default_rng(2).integers(0, 48, (2, 8)).astype(np.int32)
    twin = off_grid(untied, turn=0.3, seed=0)
    metrics = metrics_of(score_model(Subject(untied, chunks, chunks, "random"), twin))
    assert metrics["kl_99_error"] is None and metrics["kl_error"] > 0 and abs(metrics["kl"]) < 1e-6  # rounding
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics
    with pytest.raises(RealmError, match=r"text.chunks is 1; want at least 2"):
        TextConfig(chunks=1)
