"""The experiment on continuous batching: a whole run in small, and its parts against counts by hand."""

from pathlib import Path

import numpy as np
import pytest

import batching_throughput
from batching_host import HostConfig, measure_host
from batching_report import quantiles, summarize
from batching_systems import Job, Record, clock, serve
from batching_throughput import Answers, BatchingThroughputConfig, LengthConfig, latencies, poisson_arrivals
from realm_jax.errors import RealmError
from realm_jax.experiment import Run, load_config, read_json

CONFIG = Path(__file__).parents[1] / "configs" / "batching_throughput.toml"
SMALL = [
    "slots=[2]", "static_slots=[2]", "load_slots=2", "requests=5", "loads=[0.8]", "repeats=1", "steps=4", 'peer="off"',
    "host.layers=0", "prompts.median=6", "prompts.most=16", "outputs.median=8", "outputs.least=2", "outputs.most=14",
]  # fmt: skip


def test_a_run_serves_every_request_in_every_way(model_file, tmp_path):
    config = load_config(BatchingThroughputConfig, CONFIG, [f"model={model_file}", *SMALL])
    run = Run.create(config, "batching_throughput", root=tmp_path, name="small")
    batching_throughput.main(config, run)
    lines, found = run.metrics(), read_json(run.folder / "results.json")
    assert [(line["kind"], line["way"], line["slots"]) for line in lines if line["kind"] == "load"] == [
        ("load", "engine", 2), ("load", "static", 2),
    ]  # fmt: skip
    assert {(one["way"], one["slots"]) for one in found["offline"]} == {("sequential", 1), ("static", 2), ("engine", 2)}
    for line in lines:
        assert line["tokens"] == lines[0]["tokens"] and line["seconds"] > 0
        first, total = (np.array(line["latency"][name]) for name in ("first", "total"))
        assert len(first) == 5 and (first >= 0).all() and (first <= total).all()
        assert max(total) <= line["seconds"] + 1e-9
    table = (run.folder / "results.md").read_text(encoding="utf-8")
    assert "| engine | 2 |" in table and "llama.cpp: left out" in table
    assert (run.folder / "throughput.png").read_bytes().startswith(b"\x89PNG")


class Scripted:
    """Answers a job with its prompt, over as many turns as tokens are asked for, one job after another."""

    def __init__(self, lose=None, cut=None):
        self.queue, self.lose, self.cut = [], lose, cut

    def submit(self, index, job, record):
        if index != self.lose:
            self.queue.append((index, job, record))

    def step(self):
        if self.queue:
            index, job, record = self.queue[0]
            record.came(index)
            if len(record.times[index]) == job.tokens:
                record.finish(index, job.prompt[: job.tokens - (index == self.cut)])
                self.queue.pop(0)
        return bool(self.queue)


JOBS = [Job([1, 2, 3], 3), Job([4], 1)]


def test_requests_are_given_at_their_time_and_all_must_be_answered():
    arrivals = np.array([0.0, 0.05])
    record, start = serve(Scripted(), JOBS, arrivals)
    assert record.answers == [[1, 2, 3], [4]] and [len(times) for times in record.times] == [3, 1]
    assert record.times[0][-1] < start + 0.05 <= record.times[1][0] <= clock()
    with pytest.raises(RealmError, match="Scripted: request 1: no tokens came, 1 were asked for"):
        serve(Scripted(lose=1), JOBS, arrivals)
    with pytest.raises(RealmError, match="Scripted: request 0: 2 tokens came, 3 were asked for"):
        serve(Scripted(cut=0), JOBS, arrivals)
    with pytest.raises(RealmError, match="request 1 was answered twice"):
        record.finish(1, [4])


def test_another_answer_is_an_error_unless_it_is_the_peers():
    record, answers = Record(2), Answers()
    record.answers = [[1, 2], [3]]
    answers.check(("sequential", 1), record)
    record.answers = [[1, 2], [4]]
    answers.check(("llama.cpp", 2), record)
    assert answers.equal == {"sequential": 2, "llama.cpp": 1}
    with pytest.raises(RealmError, match="engine, 2 slots: request 1: its answer is not that of the request alone"):
        answers.check(("engine", 2), record)


def test_latencies_by_hand():
    record = Record(2)
    record.times = [[1.0, 1.5, 4.0], [3.0]]
    found = latencies(record, [Job([1], 7), Job([1], 1)], np.array([0.5, 1.0]))
    assert found == {"first": [0.5, 2.0], "between": [0.5, 0.0], "pause": [2.5, None], "total": [3.5, 2.0]}
    assert quantiles([*range(21), None]) == [10, 19] and quantiles([None]) is None


def test_arrivals_are_poisson():
    """Gaps are exponential: mean 1, variance 1, and as many below the median log 2 as above, within 4 errors."""
    times = poisson_arrivals(10_000, 0)
    gaps = np.diff(times, prepend=0.0)
    assert (gaps > 0).all() and (times == poisson_arrivals(10_000, 0)).all() and times[0] != poisson_arrivals(1, 1)[0]
    assert abs(gaps.mean() - 1) < 4 / 100 and abs(gaps.var() - 1) < 4 * 8**0.5 / 100
    assert abs((gaps < np.log(2)).mean() - 0.5) < 4 * 0.5 / 100


def test_lengths_are_as_asked_for():
    lengths = LengthConfig(40.0, 0.9, 8, 200).draw(10_000, np.random.default_rng(0))
    assert lengths.min() == 8 and lengths.max() == 200
    # the error of a median is sqrt(pi / 2) of that of a mean
    assert abs(np.log(np.median(lengths) / 40)) < 4 * 0.9 * (np.pi / 2) ** 0.5 / 100 + 0.5 / 40
    assert (LengthConfig(7.0, 0.0, 1, 9).draw(3, np.random.default_rng(0)) == 7).all()


def test_a_summary_by_hand():
    def line(way, slots, seconds, first):
        latency = {"first": first, "between": [0.0], "pause": [None], "total": [1.0]}
        return {
            "kind": "offline", "way": way, "slots": slots, "tokens": 12, "seconds": seconds, "latency": latency,
            "load_average": 0.5,
        }  # fmt: skip

    lines = [line("engine", 4, 1.0, [1.0]), line("engine", 4, 3.0, [2.0]), line("engine", 4, 2.0, [3.0])]
    found = summarize([*lines, line("static", 4, 4.0, [4.0]), line("sequential", 1, 12.0, [5.0])])
    sequential, static, engine = found["offline"]
    assert engine["tokens_per_second"] == [4, 6, 12] and engine["first"] == pytest.approx([2, 2.9])
    assert engine["over_sequential"] == 6 and engine["over_static"] == 2 and engine["pause"] is None
    assert static["over_sequential"] == 3 and sequential["over_static"] is None and found["host"] is None


def test_the_least_time_of_a_step():
    host = HostConfig(slots=2, weight_bytes=1e9, token_bytes=1e6, context=500, bandwidth=1e12)
    assert host.step_seconds == pytest.approx(2e-3)


def test_the_share_of_the_host():
    """A model of one layer has 7 matrices of 3 planes and 2 norms in it, and a norm and the tied embedding outside."""
    host = HostConfig(layers=1, slots=2, requests=3, bandwidth=1e15)
    found = measure_host(host, 4, 0)
    assert found["arrays"] == 7 * 3 + 2 + 1 + 3 and 0 < found["seconds"][0] <= found["seconds"][1]
    waits = found["seconds"][0] + found["dispatch_seconds"]
    assert found["share"] == pytest.approx(waits / (4 * host.step_seconds)) and found["dispatch_seconds"] > 0


@pytest.mark.parametrize(
    "override, message",
    [
        ("repeats=0", "repeats is 0; want at least 1"),
        ("static_slots=[0]", "slots, static_slots: 0; want 1 or more"),
        ("load_slots=3", "load_slots: 3 is not one of slots"),
        ("loads=[0.0]", "loads: 0.0; want more than 0"),
        ("outputs.least=50", "least 50, median 40, most 200"),
        ("host.slots=0", "host.slots is 0; want at least 1"),
    ],
)
def test_mistakes_in_the_config_are_named(override, message):
    assert load_config(BatchingThroughputConfig, CONFIG) == BatchingThroughputConfig()
    with pytest.raises(RealmError, match=message):
        load_config(BatchingThroughputConfig, CONFIG, [override])
