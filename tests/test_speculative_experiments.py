"""The experiment on speculative decoding: a whole run in small, and its parts against counts by hand."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

import realm_jax as realm
import speculative_sweep
from realm_jax.decode.speedup import break_even, expected_speedup
from realm_jax.errors import RealmError
from realm_jax.experiment import Run, load_config, read_json
from speculative_report import pooled_z, summarize_cell
from speculative_sweep import Cell, SpeculativeSweepConfig, count
from speculative_trace import Round, lookup, overlaps

CONFIG = Path(__file__).parents[1] / "configs" / "speculative_sweep.toml"


@pytest.fixture(scope="module")
def small_run(make_model_file, tmp_path_factory):
    """Config and run directory of a finished run on two small random models."""
    target, draft = make_model_file("target.gguf"), make_model_file("draft.gguf", seed=1)
    overrides = [
        f"model={target}", f'drafts=["{draft}", "ngram"]', "lengths=[3]", "temperatures=[0, 1.0]", 'kinds=["list"]',
        "documents=2", "new_tokens=40", "context=8",
    ]  # fmt: skip
    config = load_config(SpeculativeSweepConfig, CONFIG, overrides)
    run = Run.create(config, "speculative_sweep", root=tmp_path_factory.mktemp("runs"), name="small")
    speculative_sweep.main(config, run)
    return config, run


def test_every_cell_is_measured(small_run):
    config, run = small_run
    summary = read_json(run.folder / "results.json")["cells"]
    assert [(x["draft"], x["length"], x["temperature"]) for x in summary] == list(speculative_sweep.cells(config))
    for found in summary:
        assert sum(found["histogram"]) == found["rounds"]
        assert sum(i * n for i, n in enumerate(found["histogram"])) == sum(found["accepted"])
        assert found["judged"][1:] <= found["accepted"][:-1]  # who reaches a place was accepted before it
        assert found["rounds"] <= found["tokens"] + 2 <= 2 * 40 + 2  # two prompts; the round of an EOS may give nothing
        assert found["tokens_a_round"] <= found["mean_accepted"] + 1
        assert found["cost"] == 0 if found["draft"] == "ngram" else found["cost"] > 0
        assert found["expected_speedup"] == pytest.approx(
            float(expected_speedup(found["acceptance"], 3, found["cost"])), rel=1e-5
        )
    table = (run.folder / "results.md").read_text(encoding="utf-8")
    assert table.count("\n| ngram | 1 | 3 |") == 2 and "jax" in table and "reference" in table
    for name in ("acceptance.png", "speed.png"):
        assert (run.folder / name).read_bytes().startswith(b"\x89PNG")


def test_greedy_counts_and_texts_are_exact(small_run):
    for found in read_json(small_run[1].folder / "results.json")["cells"]:
        if found["temperature"] == 0:
            assert sum(found["accepted"]) == pytest.approx(found["expected_accepted"], abs=1e-6) and found["z"] is None
            assert found["same_as_plain"] == found["prompts"]


def test_sampled_acceptance_is_the_overlap_of_the_distributions(small_run):
    """And it would be noticed if it were not: with half of the acceptances lost, the counts are far off."""
    sampled = [line for line in small_run[1].metrics() if line.get("temperature") == 1.0]
    z, cells = pooled_z([summarize_cell(line) for line in sampled])
    assert cells == 2 and abs(z) < 3
    by_model = sampled[0]
    halved = by_model | {"accepted": [n // 2 for n in by_model["accepted"]]}
    assert summarize_cell(halved)["z"] < -3


def test_an_interrupted_run_goes_on(small_run):
    config, run = small_run
    whole = run.metrics()
    run.keep_metrics(lambda line: line.get("draft") != "ngram" or line["temperature"] == 0)
    kept = len(run.metrics())
    assert kept == len(whole) - 1
    speculative_sweep.main(config, Run.resume(config, "speculative_sweep", root=run.folder.parent, name="small"))
    lines = run.metrics()
    timed = {"seconds": 0, "runs": 0}
    assert lines[:kept] == [line for line in whole if Cell.of(line) != Cell("ngram", 3, 1.0)]
    (again,) = lines[kept:]
    (before,) = [line for line in whole if Cell.of(line) == Cell("ngram", 3, 1.0)]
    assert again | timed == before | timed


def test_overlap_by_hand(model_file):
    """A model overlaps with itself; n-grams with what the target gives to the one token that they propose."""
    model = realm.load(model_file)
    tokens, rounds = [5, 6, 7, 5, 6, 8, 9], [Round(3, 2, 2, 1, 2), Round(5, 2, 1, 0, 2)]
    np.testing.assert_allclose(overlaps(model, model, tokens, rounds, 1.0, 8), [1, 1, 1], atol=1e-12)
    logits = np.asarray(realm.forward(model, np.array([tokens])), np.float64)[0] / 0.5
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    # behind 5 6 7 5 6 stands what followed the first 5 6, which is 7
    by_ngram = overlaps(model, None, tokens, [Round(5, 1, 1, 0, 2)], 0.5, 8)
    np.testing.assert_allclose(by_ngram, [p[4, 7]], rtol=1e-4)


@pytest.mark.parametrize(
    "tokens, most, want",
    [
        ([1, 2, 3], 4, []),
        ([1, 2, 1], 4, [2, 1]),
        ([1, 2, 9, 1, 2, 8, 1, 2], 2, [8, 1]),  # the latest of two
        ([4, 1, 2, 7, 5, 1, 2, 8, 4, 1, 2], 1, [7]),  # a longer match beats a later one
        ([3, 3], 4, [3]),
    ],
)
def test_lookup(tokens, most, want):
    assert lookup(tokens, most) == want


def test_rounds_are_counted_by_place():
    counted = count([Round(3, 2, 2, 1, 2), Round(5, 2, 2, 2, 3), Round(8, 1, 1, 0, 1)], 2)
    assert counted == {
        "rounds": 3, "tokens": 6, "drafted": 5, "judged": [3, 2], "accepted": [2, 1], "histogram": [1, 1, 1],
        "proposed": [0, 1, 2],
    }  # fmt: skip


def test_a_summary_by_hand():
    def runs(way, steps, tokens, *seconds):
        shape = {"way": way, "repeat": 0, "steps": steps, "tokens": tokens}
        return [shape | {"prompt": i, "seconds": value} for i, value in enumerate(seconds)]

    line = {
        "draft": "d", "length": 1, "temperature": 1.0, "rounds": 8, "tokens": 12, "drafted": 8, "judged": [8],
        "accepted": [4], "histogram": [4, 4], "proposed": [0, 8], "expected_accepted": 5.0, "variance": 0.25,
        "prompts": 2, "same_as_plain": 0,
        "runs": [*runs("plain", 6, 6, 6.0, 12.0), *runs("speculative", 4, 6, 3.0, 6.0), *runs("draft", 6, 6, 0.9, 1.8)],
    }  # fmt: skip
    found = summarize_cell(line)
    assert found["acceptance"] == 0.5 and found["z"] == -2 and found["acceptance_error"] == 0.5 / 8
    assert found["speedup"] == [2, 2, 2] and found["tokens_a_round"] == found["expected_tokens"] == 1.5
    assert found["step_seconds"] == 1.5 and found["cost"] == pytest.approx(0.15) and found["round_steps"] == 0.75
    assert found["expected_speedup"] == pytest.approx(1.5 / 1.15) and found["break_even"] == break_even(1, 0.15)
    assert math.isclose(found["forwards_saved"], 1 / 3) and found["expected_as_drafted"] == 1.5
    json.dumps(found)


@pytest.mark.parametrize(
    "override, message",
    [
        ("lengths=[0]", "lengths: 0 draft tokens; want 1 to 64"),
        ("drafts=[]", "drafts: is empty"),
        ("temperatures=[-1.0]", "temperatures: -1.0; want 0 or more"),
        ('kinds=["poem"]', "kinds: 'poem' is none; known: fact"),
        ("repeats=0", "repeats is 0; want at least 1"),
    ],
)
def test_mistakes_in_the_config_are_named(override, message):
    assert load_config(SpeculativeSweepConfig, CONFIG).lengths == (1, 2, 4, 8)
    with pytest.raises(RealmError, match=message):
        load_config(SpeculativeSweepConfig, CONFIG, [override])
