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
from speculative_sweep import SpeculativeSweepConfig, count
from speculative_trace import Round, lookup, overlaps

CONFIG = Path(__file__).parents[1] / "configs" / "speculative_sweep.toml"


@pytest.fixture(scope="module")
def small_runs(make_model_file, tmp_path_factory):
    """Configs and run directories of finished runs on small random models: a draft model, sampled; n-grams, greedy."""
    target, draft = make_model_file("target.gguf"), make_model_file("draft.gguf", seed=1)
    root = tmp_path_factory.mktemp("runs")

    def small(name, draft, temperature):
        overrides = [
            f"model={target}", f'drafts=["{draft}"]', f"temperatures=[{temperature}]", "lengths=[3]", 'kinds=["list"]',
            "documents=2", "new_tokens=80", "context=8",
        ]  # fmt: skip
        config = load_config(SpeculativeSweepConfig, CONFIG, overrides)
        run = Run.create(config, "speculative_sweep", root=root, name=name)
        speculative_sweep.main(config, run)
        return config, run

    return {"sampled": small("sampled", draft, 1.0), "greedy": small("greedy", "ngram", 0)}


@pytest.mark.parametrize("name", ["sampled", "greedy"])
def test_every_cell_is_measured(small_runs, name):
    config, run = small_runs[name]
    (found,) = read_json(run.folder / "results.json")["cells"]
    assert [(found["draft"], found["length"], found["temperature"])] == list(speculative_sweep.cells(config))
    assert sum(found["histogram"]) == found["rounds"]
    assert sum(i * n for i, n in enumerate(found["histogram"])) == sum(found["accepted"])
    reached = zip(found["judged"][1:], found["accepted"], strict=False)
    assert all(judged <= before for judged, before in reached)  # who reaches a place was accepted before it
    assert found["tokens"] <= found["rounds"] + sum(found["accepted"]) and found["tokens"] <= 2 * 80
    assert found["cost"] == 0 if found["draft"] == "ngram" else found["cost"] > 0
    theory = float(expected_speedup(found["acceptance"], 3, found["cost"]))
    assert found["expected_speedup"] == pytest.approx(theory, rel=1e-5)
    table = (run.folder / "results.md").read_text(encoding="utf-8")
    assert table.count(f"\n| {found['draft']} | {found['temperature']:g} | 3 |") == 2 and "jax" in table
    for name in ("acceptance.png", "speed.png"):
        assert (run.folder / name).read_bytes().startswith(b"\x89PNG")


def test_greedy_counts_and_texts_are_exact(small_runs):
    """The n-grams that the device found are those found here, and every verdict on them is the one expected."""
    (found,) = read_json(small_runs["greedy"][1].folder / "results.json")["cells"]
    assert 0 < sum(found["accepted"]) < sum(found["judged"])
    assert sum(found["accepted"]) == found["expected_accepted"] and found["z"] is None
    assert found["same_as_plain"] == found["prompts"]


def test_sampled_acceptance_is_the_overlap_of_the_distributions(small_runs):
    """And it would be noticed if it were not: with half of the acceptances lost, the counts are far off."""
    line = next(line for line in small_runs["sampled"][1].metrics() if "draft" in line)
    assert sum(line["judged"]) > 50 and abs(summarize_cell(line)["z"]) < 3
    halved = line | {"accepted": [n // 2 for n in line["accepted"]]}
    assert summarize_cell(halved)["z"] < -3


def test_an_interrupted_run_goes_on(small_runs):
    config, run = small_runs["sampled"]
    before, forward = run.metrics()
    run.keep_metrics(lambda line: "forward" in line)
    speculative_sweep.main(config, Run.resume(config, "speculative_sweep", root=run.folder.parent, name="sampled"))
    kept, again = run.metrics()
    timed = {"seconds": 0, "runs": 0}
    assert kept == forward and again | timed == before | timed


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
    assert pooled_z([found, found | {"z": 1.0}, found | {"z": None}]) == (-1 / math.sqrt(2), 2)
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
