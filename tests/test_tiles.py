"""Tile sizes as data: which entry serves, what a broken file says, and in small the experiment that writes the file."""

import json
from pathlib import Path

import jax
import pytest
from click.testing import CliRunner

import product_times
import tune_kernels
from realm_jax.errors import RealmError
from realm_jax.experiment import load_config
from realm_jax.kernels import pallas, tiles
from realm_jax.kernels.tiles import CLASSES, Tiles
from realm_jax.quant import FORMATS

CONFIG = Path(__file__).parents[1] / "configs" / "tune_kernels.toml"
FEW = {"warps": 16, "stages": 2, "most_rows": 128, "across": 4}
MANY = {"warps": 2, "stages": 6, "most_rows": 64, "across": 0}
SMALL, LARGE = CLASSES[0], CLASSES[3]


@pytest.fixture
def own_file(tmp_path, monkeypatch):
    """A function that makes what it is given (text, or a table) the file of REALM_TILES, and returns its path."""

    def write(content) -> Path:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        monkeypatch.setenv(tiles.VARIABLE, str(path))
        return path

    return write


def on(monkeypatch, kind: str) -> None:
    monkeypatch.setattr(tiles, "device_kind", lambda: kind)


# --- lookup ----------------------------------------------------------------------------------------------------------


def test_every_packaged_entry_is_allowed_and_the_file_is_as_the_experiment_writes_it():
    table = tiles.read(tiles.PACKAGED)  # raises for what is not
    assert tiles.to_text(table) == tiles.PACKAGED.read_text(encoding="utf-8")
    assert tiles.PACKAGED.suffix == ".json" and tiles.PACKAGED.parent.name == "kernels"  # what pyproject packs


def test_every_shape_has_a_class():
    sides = ((16, 8192, 8193, 10**6), (32, 6144, 6176, 10**6))
    found = [tiles.shape_class(n, k) for n in sides[0] for k in sides[1]]
    assert found == [CLASSES[i] for i in (0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3)]


@pytest.mark.parametrize("outputs", [1, 8192, 8193, 128256])
def test_what_no_file_names_has_the_rule(monkeypatch, outputs):
    on(monkeypatch, "a device that nobody measured")
    assert tiles.find("IQ1_M", outputs, 4096) == tiles.RULE


def test_the_device_comes_before_the_default_and_the_default_before_the_rule(own_file, monkeypatch):
    table = {"GPU": {"Q4_K": {SMALL: FEW}}, "default": {"Q4_K": {SMALL: MANY, LARGE: MANY}}}
    own_file(table)
    on(monkeypatch, "GPU")
    assert tiles.find("Q4_K", 64, 64) == Tiles(**FEW)
    assert tiles.find("Q4_K", 9000, 9000) == Tiles(**MANY)
    assert tiles.find("Q4_K", 64, 9000) == tiles.RULE
    assert tiles.find("Q5_K", 64, 64) == tiles.RULE
    on(monkeypatch, "another GPU")
    assert tiles.find("Q4_K", 64, 64) == Tiles(**MANY)


def test_an_own_file_stands_before_the_packaged_one_entry_by_entry(own_file, monkeypatch, tmp_path):
    packaged = own_file({"GPU": {"Q4_K": {SMALL: FEW, LARGE: FEW}}})
    monkeypatch.setattr(tiles, "PACKAGED", packaged)
    own_file({"GPU": {"Q4_K": {LARGE: MANY}, "Q8_0": {SMALL: MANY}}})
    on(monkeypatch, "GPU")
    assert [tiles.find("Q4_K", n, n) for n in (64, 9000)] == [Tiles(**FEW), Tiles(**MANY)]
    assert tiles.find("Q8_0", 64, 64) == Tiles(**MANY)


def test_in_the_interpreter_the_device_does_not_matter(monkeypatch):
    assert tiles.device_kind() == jax.devices()[0].device_kind
    monkeypatch.setattr(jax, "devices", lambda: pytest.fail("the interpreter asks for no device"))
    with pallas.interpreted():
        assert tiles.device_kind() == tiles.DEFAULT


# --- files -----------------------------------------------------------------------------------------------------------


def test_text_reads_back_with_an_entry_a_line():
    table = {"GPU": {"Q8_0": {SMALL: Tiles(**FEW)}, "Q4_K": {LARGE: Tiles(**MANY), SMALL: Tiles(**FEW)}}, "default": {}}
    text = tiles.to_text(table)
    assert {
        d: {n: {s: Tiles(**e) for s, e in c.items()} for n, c in f.items()} for d, f in json.loads(text).items()
    } == table
    assert text.count("warps") == sum("warps" in line for line in text.splitlines()) == 3


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "not JSON: "),
        ([], "want a table, not []"),
        ({"GPU": 3}, "GPU: want a table, not 3"),
        ({"GPU": {"Q9": {}}}, "GPU: Q9: no block format; known: "),
        ({"GPU": {"Q4_K": {"tall": FEW}}}, "GPU: Q4_K: tall: no class of shape; known: few outputs"),
        ({"GPU": {"Q4_K": {SMALL: {"warps": 4}}}}, f"{SMALL}: want warps, stages, most_rows, across and nothing else"),
        ({"GPU": {"Q4_K": {SMALL: FEW | {"warps": 3}}}}, f"GPU: Q4_K: {SMALL}: warps is 3; want 1, 2, 4, 8 or 16"),
        ({"GPU": {"Q4_K": {SMALL: FEW | {"stages": True}}}}, "stages is True; want 2 to 6"),
        ({"GPU": {"Q4_K": {SMALL: FEW | {"most_rows": 512}}}}, "most_rows is 512; want 64 to 256"),
        ({"GPU": {"Q4_K": {SMALL: FEW | {"across": 16}}}}, "across is 16; want 0, 2, 4 or 8"),
    ],
)
def test_a_broken_file_gives_one_line_that_names_the_place(own_file, content, says):
    path = own_file(content)
    with pytest.raises(RealmError) as raised:
        tiles.find("Q4_K", 64, 64)
    assert str(raised.value).startswith(f"{path}: ") and says in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_file_that_is_not_there_gives_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv(tiles.VARIABLE, str(tmp_path / "none.json"))
    with pytest.raises(RealmError, match=r"none\.json: cannot read the tile sizes: No such file"):
        tiles.find("Q4_K", 64, 64)


# --- the experiment --------------------------------------------------------------------------------------------------


def test_its_config_covers_every_class_and_known_formats():
    config = load_config(tune_kernels.TuneKernelsConfig, CONFIG)
    assert sorted(tiles.shape_class(*shape) for shape in config.shapes) == sorted(CLASSES)
    assert set(config.formats) <= set(FORMATS)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ('formats=["Q9"]', "formats: 'Q9' is not known"),
        ("warps=[3]", r"warps: \[3\] has to be some of 1, 2, 4, 8 or 16"),
        ("shapes=[[64, 64], [96, 64]]", "shapes: want at least one, each of another class"),
        ("weights=[1.0]", "weights: want one for each of rows"),
        ("many_rows=[128, 64]", "many_rows: want them growing"),
    ],
)
def test_bad_settings_are_refused_in_one_line(override, says):
    with pytest.raises(RealmError, match=says):
        load_config(tune_kernels.TuneKernelsConfig, CONFIG, [override])


def test_without_a_gpu_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(pallas, "available", lambda: False)
    done = CliRunner().invoke(tune_kernels.command, ["--runs", str(tmp_path)])
    assert done.exit_code == 1 and "error: tune_kernels: the kernel needs an NVIDIA GPU" in done.output


def run(folder: Path, *overrides: str, resume: bool = False) -> str:
    """The experiment in a run called `run`; what it prints."""
    arguments = ["--runs", str(folder), "--name", "run", *(["--resume"] if resume else [])]
    for override in overrides:
        arguments += ["--set", override]
    with pallas.interpreted():
        done = CliRunner().invoke(tune_kernels.command, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_it_runs_in_small(tmp_path):
    small = ['formats=["Q8_0"]', "shapes=[[16, 64]]", "warps=[1]", "stages=[2]", "rows=[1]", "weights=[1.0]"]
    small.append("across=[8]")
    run(tmp_path, *small, "finalists=1", "many_rows=[64]", "gigabytes=0.0", "rounds=2", "repeats=1")
    (found,) = tiles.read(tmp_path / "run" / "tiles.json")[jax.devices()[0].device_kind]["Q8_0"].items()
    assert found == (SMALL, Tiles(1, 2, 64, 8))
    text = (tmp_path / "run" / "results.md").read_text(encoding="utf-8")
    assert text.count("| Q8_0 | 16 | 64 |") == 3  # the choice, the candidate, the comparison


def test_int8_arithmetic_has_entries_of_its_own(tmp_path, own_file, monkeypatch):
    small = ['formats=["Q8_0"]', "arithmetic=int8", "shapes=[[16, 64]]", "warps=[2]", "stages=[3]", "rows=[1]"]
    run(tmp_path, *small, "weights=[1.0]", "finalists=1", "gigabytes=0.0", "rounds=2", "repeats=1")
    table = tiles.read(tmp_path / "run" / "tiles.json")
    assert list(table.values()) == [{"Q8_0 int8": {SMALL: Tiles(2, 3, 64, 0)}}]
    own_file(tiles.to_text(table))
    on(monkeypatch, *table)
    assert tiles.find("Q8_0", 16, 64, "int8") == Tiles(2, 3, 64, 0) != tiles.find("Q8_0", 16, 64)
    assert tiles.find("Q4_0", 16, 64, "int8") == tiles.INT8_RULE


def _searched(own: Tiles) -> tuple:
    return own.warps, own.stages, own.across


@pytest.fixture
def clock(monkeypatch):
    """Times by (warps, stages, across), or "dense", and rows, in place of measured ones; returns the formats asked
    for."""
    spent = {
        (2, 2, 8, 1): 5.0, (2, 3, 8, 1): 3.0, (4, 2, 8, 1): 2.9, (4, 3, 8, 1): tune_kernels.NEVER,
        (2, 3, 4, 1): 3.0, (4, 2, 4, 1): 2.9, (2, 3, 8, 8): 5.0, (2, 3, 4, 8): 4.0, (4, 2, 8, 8): 8.0,
        (4, 2, 4, 8): 8.0, (2, 3, 4, 64): 20.0, (2, 3, 4, 128): 50.0, (2, 3, 4, 256): 51.0,
        ("dense", 32): 30.0, ("dense", 64): 30.0, ("dense", 128): 31.0, ("dense", 256): 60.0,
    }  # fmt: skip
    asked = []

    def times(config, cases):
        asked.append(cases[0].weights[0].format)
        sizes = [
            _searched(case.product.keywords["tiles"]) if hasattr(case.product, "keywords") else ("dense",)
            for case in cases
        ]
        return [spent[*size, case.rows] for size, case in zip(sizes, cases, strict=True)]

    monkeypatch.setattr(tune_kernels, "time_cases", times)
    return asked


def test_the_least_weighted_time_is_taken_and_merged_into_the_file(tmp_path, clock):
    out = tmp_path / "own.json"
    out.write_text(
        tiles.to_text({jax.devices()[0].device_kind: {"Q4_0": {SMALL: Tiles(**MANY), LARGE: Tiles(**MANY)}}}),
        encoding="utf-8",
    )
    settings = [
        'formats=["Q4_0", "Q8_0"]', "shapes=[[16, 64]]", "warps=[2, 4]", "stages=[2, 3]", "across=[8, 4]",
        "rows=[1, 8]", "weights=[0.5, 0.5]", "finalists=2", "gigabytes=0.0", f"out={out}",
    ]  # fmt: skip
    run(tmp_path, *settings)
    # 4 warps are quicker at one row by 3%, half as quick at eight, where 4 across are better than 8; at 128 rows dense
    # is quicker, whatever 256 says.
    best = Tiles(2, 3, 64, 4)
    assert tiles.read(out) == {
        jax.devices()[0].device_kind: {"Q4_0": {SMALL: best, LARGE: Tiles(**MANY)}, "Q8_0": {SMALL: best}}
    }
    text = (tmp_path / "run" / "results.md").read_text(encoding="utf-8")
    assert "| Q8_0 | 16 | 64 | 2 | 3 | 64 | 4 |\n" in text and "| Q8_0 | 16 | 64 | 128 | 50.0 | 31.0 |\n" in text
    assert text.count("| x |") == 2 and "| Q8_0 | 16 | 64 | 4 | 3 |" not in text  # what does not run has no time

    metrics = tmp_path / "run" / "metrics.jsonl"
    lines, written = metrics.read_text(encoding="utf-8").splitlines(), out.read_text(encoding="utf-8")
    metrics.write_text("\n".join(lines[:-1]) + "\n", encoding="utf-8")  # killed before the last line
    clock.clear()
    run(tmp_path, *settings, resume=True)
    assert set(clock) == {"Q8_0"}
    assert metrics.read_text(encoding="utf-8").splitlines() == lines and out.read_text(encoding="utf-8") == written


def test_what_a_device_cannot_run_is_left_out(monkeypatch, capsys):
    def too_much(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: shared memory\nand more")

    def compiled(product, x, weights, rounds):  # "run" is what compiles and does not run
        program = too_much if product == "run" else lambda x, weights: x
        return too_much() if product == "compile" else product_times.Loop(program, x, weights, rounds)

    monkeypatch.setattr(tune_kernels, "compile_loop", compiled)
    weights = tune_kernels.random_weights("Q8_0", (16, 64), 0.0)
    config = tune_kernels.TuneKernelsConfig(rounds=1, repeats=1)
    cases = [tune_kernels.Case(way, 1, weights) for way in ("compile", "quick", "run")]
    first, quick, last = tune_kernels.time_cases(config, cases)
    assert first == last == tune_kernels.NEVER and 0 < quick < tune_kernels.NEVER
    assert capsys.readouterr().err == "left out: RESOURCE_EXHAUSTED: shared memory\n" * 2
