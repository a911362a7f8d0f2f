"""Configs from TOML and `--set`, run directories, and the shared command line."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Literal

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from realm_jax.errors import RealmError
from realm_jax.experiment import (
    Run,
    describe_run,
    dump_toml,
    experiment_command,
    load_config,
    markdown_table,
    plot_curves,
    read_json,
)


@dataclasses.dataclass(frozen=True)
class Inner:
    width: int
    rate: float = 0.1


@dataclasses.dataclass(frozen=True)
class Example:
    steps: int
    inner: Inner
    name: str = "run"
    flag: bool = False
    mode: Literal["fast", "exact"] = "exact"
    sizes: tuple[int, ...] = (1, 2)
    shares: dict[str, float] = dataclasses.field(default_factory=dict)
    path: Path | None = None
    other: Inner = dataclasses.field(default_factory=lambda: Inner(width=7, rate=0.7))

    def __post_init__(self):
        if self.steps < 0:
            raise RealmError(f"steps is {self.steps}; want 0 or more")


MINIMAL = "steps = 3\n[inner]\nwidth = 8\n"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "example.toml"
    path.write_text(MINIMAL)
    return path


def test_file_gives_the_values_and_defaults_the_rest(file):
    assert load_config(Example, file) == Example(steps=3, inner=Inner(width=8))


def test_overrides_reach_nested_keys_lists_and_tables(file):
    overrides = ["inner.rate=2", "sizes=[4, 5]", "shares.a=0.5", 'shares."b c"=1', "flag=true", "path=/tmp/x"]
    config = load_config(Example, file, [*overrides, "name=plain words", "mode=fast", "steps = 4"])
    assert config.inner == Inner(8, 2.0) and type(config.inner.rate) is float
    assert config.sizes == (4, 5) and config.shares == {"a": 0.5, "b c": 1.0}
    assert (config.flag, config.path, config.name, config.mode, config.steps) == (
        True,
        Path("/tmp/x"),
        "plain words",
        "fast",
        4,
    )


def test_override_of_one_key_keeps_the_other_defaults_of_a_nested_default(file):
    assert load_config(Example, file, ["other.width=9"]).other == Inner(width=9, rate=0.7)


def test_without_a_file_overrides_must_give_what_has_no_default():
    assert load_config(Example, None, ["steps=1", "inner.width=2"]).inner == Inner(2)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stepz=1", "unknown key 'stepz'; known keys here: steps, inner,"),
        ("inner.widht=1", "unknown key 'inner.widht'; known keys here: width, rate"),
        ("steps=1.5", "'steps' must be an integer, not 1.5"),
        ("steps=true", "'steps' must be an integer, not True"),
        ("flag=1", "'flag' must be true or false, not 1"),
        ("name=1", "'name' must be a string, not 1"),
        ("inner=3", "'inner' must be a table of width, rate, not 3"),
        ("inner.width.x=3", "'inner.width' must be an integer"),
        ("mode=slow", "'mode' must be one of \"fast\", \"exact\", not 'slow'"),
        ("sizes=[1, 'a']", "'sizes[1]' must be an integer, not 'a'"),
        ("shares.a='x'", "'shares.a' must be a number, not 'x'"),
        ("path=3", "'path' must be a path (a string), not 3"),
        ("steps=-1", "steps is -1; want 0 or more"),
        ("steps", "want key=value"),
        ("=3", "want key=value"),
        ("a b=3", "'a b' is not a config key"),
        ("steps=1\nflag=true", "'steps' must be an integer"),
    ],
)
def test_mistakes_are_one_line_that_names_the_key(file, override, message):
    with pytest.raises(RealmError) as error:
        load_config(Example, file, [override])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_missing_key_and_broken_files_are_named(tmp_path):
    path = tmp_path / "x.toml"
    path.write_text("steps = 1\n[inner]\n")
    with pytest.raises(RealmError, match=r"x\.toml: missing key 'inner.width' \(an integer\)"):
        load_config(Example, path)
    path.write_text("steps = = 1")
    with pytest.raises(RealmError, match=r"x\.toml: not a TOML file"):
        load_config(Example, path)
    with pytest.raises(RealmError, match=r"nowhere\.toml: cannot read the config"):
        load_config(Example, tmp_path / "nowhere.toml")


@given(
    name=st.text(st.characters(codec="utf-8")),
    shares=st.dictionaries(st.text(st.characters(codec="utf-8")), st.floats(allow_nan=False)),
    sizes=st.lists(st.integers(-(2**62), 2**62)),
    rate=st.floats(allow_nan=False),
)
def test_a_dumped_config_loads_equal(tmp_path_factory, name, shares, sizes, rate):
    config = Example(1, Inner(2, rate), name=name, shares=shares, sizes=tuple(sizes))
    path = tmp_path_factory.mktemp("dump") / "config.toml"
    path.write_text(dump_toml(config), encoding="utf-8")
    assert load_config(Example, path) == config


def test_run_keeps_config_environment_and_metrics(tmp_path):
    config = Example(1, Inner(2))
    run = Run.create(config, "example", root=tmp_path, name="one")
    assert load_config(Example, run.folder / "config.toml") == config
    environment = read_json(run.folder / "environment.json")
    assert environment["packages"]["jax"] and environment["devices"]
    run.log(step=1, loss=math.pi)
    run.log(step=2, loss=2.0)
    assert run.metrics() == [{"step": 1, "loss": math.pi}, {"step": 2, "loss": 2.0}]
    with pytest.raises(RealmError, match="exists already"):
        Run.create(config, "example", root=tmp_path, name="one")


def test_runs_without_a_name_never_collide(tmp_path):
    folders = {Run.create(Example(1, Inner(2)), "example", root=tmp_path).folder for _ in range(3)}
    assert len(folders) == 3 and all(folder.name.startswith("example-2") for folder in folders)


def test_resume_finds_the_newest_run_and_refuses_another_config(tmp_path):
    config = Example(1, Inner(2))
    with pytest.raises(RealmError, match="no run to resume"):
        Run.resume(config, "example", root=tmp_path)
    for name in ("example-20250101-000000", "example-20260101-000000", "other"):
        Run.create(config, "example", root=tmp_path, name=name)
    assert Run.resume(config, "example", root=tmp_path).folder.name == "example-20260101-000000"
    assert Run.resume(config, "example", root=tmp_path, name="other").folder.name == "other"
    with pytest.raises(RealmError, match=r"'inner.width' was 2, now 3 \(1 changed in all\)"):
        Run.resume(Example(1, Inner(3)), "example", root=tmp_path, name="other")


def test_a_line_cut_short_is_left_out_and_lines_can_be_dropped(tmp_path):
    run = Run.create(Example(1, Inner(2)), "example", root=tmp_path, name="one")
    for step in range(4):
        run.log(step=step)
    with (run.folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    run.keep_metrics(lambda line: line["step"] < 2)
    run.log(step=2)
    assert [line["step"] for line in run.metrics()] == [0, 1, 2]


def test_plot_writes_an_image_without_a_display(tmp_path, monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    path = plot_curves(tmp_path / "loss.png", {"train": ([1, 2, 3], [3.0, 2.0, 1.0]), "one": ([1], [2.0])}, log_y=True)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_table_in_markdown():
    table = markdown_table(("format", "KL"), [("Q4_K", "0.1"), ("Q8_0", "0.01")])
    assert table == "| format | KL |\n| --- | --: |\n| Q4_K | 0.1 |\n| Q8_0 | 0.01 |\n"


def test_a_run_can_be_described_in_one_line(tmp_path):
    run = Run.create(Example(1, Inner(2)), "example", root=tmp_path, name="one")
    environment = read_json(run.folder / "environment.json")
    line = describe_run(environment)
    assert line.startswith("`") and f"jax {environment['packages']['jax']}" in line and "\n" not in line


def test_command_runs_main_with_the_config_and_a_run_directory(file, tmp_path):
    seen = []
    command = experiment_command(lambda config, run: seen.append((config, run.folder)), Example, file)
    arguments = ["--set", "steps=9", "--runs", str(tmp_path), "--name", "a"]
    assert CliRunner().invoke(command, arguments).exit_code == 0
    assert CliRunner().invoke(command, [*arguments, "--resume"]).exit_code == 0
    assert seen == [(Example(9, Inner(8)), tmp_path / "a")] * 2
    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == 1 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert CliRunner().invoke(command, ["--nonsense"]).exit_code == 2


def test_save_json_writes_whole_files(tmp_path):
    run = Run.create(Example(1, Inner(2)), "example", root=tmp_path, name="one")
    path = run.save_json("x.json", {"a": [1, 2], "b": Path("p")})
    assert json.loads(path.read_text()) == {"a": [1, 2], "b": "p"} == read_json(path)
    with pytest.raises(RealmError, match="cannot read"):
        read_json(tmp_path / "none.json")
