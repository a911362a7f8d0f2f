"""The experiments on adapters: whole runs in small."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_on_quantized
import lora_overhead
import realm_jax as realm
from lora_report import WAYS, summarize
from realm_jax.errors import RealmError
from realm_jax.experiment import Run, load_config, read_json
from realm_jax.gguf.types import field
from realm_jax.model import run

CONFIGS = Path(__file__).parents[1] / "configs"


# --- where an adapter is trained, and where it ends ------------------------------------------------------------------


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


@pytest.fixture(scope="module")
def run_small(make_model_file, byte_vocabulary, tmp_path_factory):
    """A function (name, *overrides) -> config and run directory of a finished run on a small random model."""
    vocabulary = byte_vocabulary | {"tokenizer.chat_template": field(TEMPLATE)}
    model_file = make_model_file("chat.gguf", vocabulary=vocabulary)
    root = tmp_path_factory.mktemp("runs")
    small = [
        f"subject.model={model_file}", 'formats=["Q4_0"]', "seeds=[0, 1]", "text.documents=60", "text.evaluation=12",
        "text.row_tokens=64", "training.steps=6", "training.batch=4", "training.warmup=1",
    ]  # fmt: skip

    def run(name, *overrides):
        path = CONFIGS / "lora_on_quantized.toml"
        config = load_config(lora_on_quantized.LoraOnQuantizedConfig, path, [*small, *overrides])
        folder = Run.create(config, "lora_on_quantized", root=root, name=name)
        lora_on_quantized.main(config, folder)
        return config, folder

    return run


@pytest.fixture(scope="module")
def small_run(run_small):
    return run_small("small")


def test_an_adapter_that_learned_nothing_leaves_every_way_where_it_was(run_small):
    _, run = run_small("nothing", "training.learning_rate=0")
    lines = {(line["format"], line["seed"]): line for line in run.metrics()}
    for seed in (0, 1):
        assert lines["F32", seed]["apart"] == lines["F32", None]["alone"]
        for way in WAYS:
            assert lines["Q4_0", seed][way] == lines["Q4_0", None]["alone"], way


def test_every_way_is_measured(small_run):
    _, run = small_run
    lines = run.metrics()
    cells = [(line["format"], line["seed"]) for line in lines]
    assert cells == [(format, seed) for seed in (None, 0, 1) for format in ("F32", "Q4_0")]
    by_cell = dict(zip(cells, lines, strict=True))
    for seed in (0, 1):
        assert by_cell["F32", seed]["apart"] < by_cell["F32", None]["alone"] - 0.2
        found, alone = by_cell["Q4_0", seed], by_cell["Q4_0", None]["alone"]
        assert len({alone, *(found[way] for way in WAYS)}) == 5
        assert max(found[way] for way in WAYS if way != "requantized") < alone - 0.2
    table = (run.folder / "results.md").read_text(encoding="utf-8")
    assert table.count("\n| Q4_0 | 4.6") == 2 and "2 seeds" in table and "jax" in table
    assert (run.folder / "losses.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((run.folder / "results.json").read_text(encoding="utf-8")) == summarize(lines)


def test_an_interrupted_run_goes_on(small_run):
    config, run = small_run
    whole = run.metrics()
    run.keep_metrics(lambda line: (line["format"], line["seed"]) != ("Q4_0", 1))
    lora_on_quantized.main(config, Run.resume(config, "lora_on_quantized", root=run.folder.parent, name="small"))
    timeless = [[line | {"seconds": 0} for line in lines] for lines in (whole, run.metrics())]
    assert timeless[0] == timeless[1]


def test_errors_are_those_of_the_mean_and_differences_are_paired():
    def line(seed, apart, other):
        return {"format": "Q4_K", "seed": seed, **dict.fromkeys(WAYS, other), "apart": apart}

    bases = [{"format": f, "seed": None, "alone": 3.0, "bits_per_weight": 4.5, "bytes": 1} for f in ("F32", "Q4_K")]
    floats = [{"format": "F32", "seed": seed, "apart": 0.5} for seed in range(3)]
    summary = summarize([*bases, *floats, line(0, 1.0, 1.5), line(1, 2.0, 2.5), line(2, 3.0, 3.5)])
    ways = summary["Q4_K"]["ways"]
    assert ways["apart"]["mean"] == 2.0 and ways["apart"]["error"] == pytest.approx((1 / 3) ** 0.5)
    assert ways["float_merged"]["minus_apart"] == {"mean": 0.5, "error": 0.0}  # the spread of seeds cancels
    assert summary["F32"]["ways"].keys() == {"apart"} and summary["F32"]["alone"] == 3.0


def test_shipped_configs_load_and_mistakes_are_named():
    path = CONFIGS / "lora_on_quantized.toml"
    config = load_config(lora_on_quantized.LoraOnQuantizedConfig, path)
    assert "Q4_K" in config.formats and len(config.seeds) >= 5 and config.subject.turn > 0
    for override, message in (
        ('formats=["F16"]', "formats: 'F16' is none to train on"),
        ("seeds=[1, 1]", "want at least two different ones"),
        ("method=fast", "method: 'fast' is none"),
    ):
        with pytest.raises(RealmError, match=message):
            load_config(lora_on_quantized.LoraOnQuantizedConfig, path, [override])


# --- what an adapter costs a step ------------------------------------------------------------------------------------


SIZES = ["random.layers=1", "random.width=256", "random.ffn_width=512", "random.heads=4", "random.kv_heads=2"]


def test_overhead_of_every_way_is_measured(tmp_path):
    overrides = [
        *SIZES, "random.vocab_size=70", "random.format=Q4_0", "adapters=[0, 1, 4]", "batch=4", "rank=2", "context=5",
        "steps=2", "repeats=3",
    ]  # fmt: skip
    config = load_config(lora_overhead.LoraOverheadConfig, CONFIGS / "lora_overhead.toml", overrides)
    run = Run.create(config, "lora_overhead", root=tmp_path, name="a")
    lora_overhead.main(config, run)
    names = ["none", "one for all rows", "stack, 0 in use", "stack, 1 in use", "stack, 4 in use"]
    assert sorted((line["repeat"], line["way"]) for line in run.metrics()) == [(i, n) for i in range(3) for n in names]
    ways = read_json(run.folder / "results.json")["ways"]
    assert list(ways) == names and ways["none"]["ratio"] == [1, 1, 1]
    numbers = 2 * (2 * (256 + 256) + 2 * (256 + 128) + 3 * (256 + 512)) + 7  # rank 2, and a scale for each weight
    assert [ways[name]["delta_bytes"] / numbers for name in names] == [0, 4, 16, 16, 16]
    assert [ways[name]["least_delta_bytes"] / numbers for name in names] == [0, 4, 0, 4, 16]
    weights, cache = (ways["none"][key] for key in ("weight_bytes", "cache_bytes"))
    assert cache == 4 * 2 * 4 * 64 * 2 * 64  # keys and values of 4 rows of 64 places, 2 heads of 64
    matrices = 70 * 256 + 2 * 256 * 256 + 2 * 128 * 256 + 3 * 512 * 256
    assert weights == matrices / 32 * 18 + 4 * 3 * 256
    assert ways[names[-1]]["byte_ratio"] == pytest.approx(1 + 16 * numbers / (weights + cache))
    table = (run.folder / "results.md").read_text(encoding="utf-8")
    assert table.count("\n| ") == 2 + len(names) and "jax" in table and "reference" in table
    assert (run.folder / "overhead.png").read_bytes().startswith(b"\x89PNG")


def test_ways_do_what_their_adapters_do(make_model_file):
    """What is timed is what was meant: rows of a stack that is not in use go on as without, others as with theirs."""
    overrides = [f"model={make_model_file('packed.gguf', format='Q4_0')}", "adapters=[0, 1]", "batch=2", "steps=1"]
    config = load_config(lora_overhead.LoraOverheadConfig, CONFIGS / "lora_overhead.toml", [*overrides, "context=5"])
    model = realm.load(config.model)
    state = lora_overhead.start_state(model, config)
    assert bool(state.ready_B.all())
    hidden_of = jax.jit(lambda deltas: run(model.params, model.config, state.tokens_BS[:, :6], deltas=deltas)[0])
    none, one, unused, used = (hidden_of(way.deltas()) for way in lora_overhead.make_ways(model, config))
    np.testing.assert_array_equal(unused, none)
    np.testing.assert_allclose(used, one, rtol=1e-5, atol=1e-6)
    assert float(jnp.abs(one - none).max()) > 1e-4


@pytest.mark.parametrize(
    "override, message",
    [
        ("adapters=[65]", "adapters: 65 different ones in a batch of 64 rows"),
        ("steps=0", "steps is 0; want at least 1"),
        ("random.format=Q8_K", "random.format: 'Q8_K' is none"),
    ],
)
def test_mistakes_in_the_overhead_config_are_named(override, message):
    path = CONFIGS / "lora_overhead.toml"
    assert load_config(lora_overhead.LoraOverheadConfig, path).adapters == (0, 1, 8, 64)
    with pytest.raises(RealmError, match=message):
        load_config(lora_overhead.LoraOverheadConfig, path, [override])
