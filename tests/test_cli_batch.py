"""`realm batch`: each answer is what its request gets alone, each line gets a result, no result is lost."""

import fcntl
import inspect
import io
import json
import os
import resource
import signal
import subprocess
import sys
import time

import click
import pytest
from lora_toys import random_adapter

import realm_jax as realm
from realm_jax import lora
from realm_jax.cli import batch
from realm_jax.cli.batch_view import Tally, View, numbers_text
from realm_jax.cli.main import run
from realm_jax.engine.batch import AHEAD
from realm_jax.engine.metrics import Metrics
from realm_jax.engine.request_lines import KEYS, make_request, open_requests, read_lines
from realm_jax.engine.results import ResultsFile
from realm_jax.engine.settings import EngineSettings
from realm_jax.gguf.chat import chat_text

SLOTS = 2
FEW = ["--slots", SLOTS, "--prefix-rows", 0]
PLAIN = [{"id": f"r{i}", "prompt": "the thin word"[i:], "max_new_tokens": 3 + 2 * i} for i in range(6)]


@pytest.fixture
def cli(capsys, monkeypatch):
    """Runs `realm batch` with few slots and returns status, stdout, stderr."""

    def call(*args, stdin=b""):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        status = run(["batch", *map(str, args)])
        return status, *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def model(model_file):
    return realm.load(model_file)


@pytest.fixture(scope="module")
def adapters(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("one", "two")):
        lora.save_adapter(random_adapter(model, seed, size=0.3), folder / name)
    return folder


@pytest.fixture
def files(tmp_path):
    """Where requests are, and where results go."""
    return tmp_path / "requests.jsonl", tmp_path / "results.jsonl"


def write(path, lines):
    path.write_bytes(b"".join((x if isinstance(x, bytes) else json.dumps(x).encode()) + b"\n" for x in lines))


def read(path):
    lines = path.read_bytes().split(b"\n")
    assert lines.pop() == b"", "every line ends"
    return [json.loads(line) for line in lines]


def by_id(path):
    results = {result["id"]: result for result in read(path)}
    assert len(results) == len(read(path))
    return results


def as_result(id, completion):
    asked = {"text": completion.text, "tokens": completion.tokens, "stop_reason": completion.stop_reason}
    return {"id": id, **asked, "error": None}


def one_error(done, status=1):
    assert done[0] == status and done[1] == "" and done[2].count("\n") == 1 and done[2].startswith("error: "), done
    return done[2]


# --- answers ---------------------------------------------------------------------------------------------------------


def test_answers_are_those_of_generate(cli, model, model_file, adapters, files):
    requests, out = files
    prompts, names = ["the word in", [5, 9, 200], "in", "thin"], ["one", None, "two", "one"]
    lines = [
        {"prompt": prompt, "adapter": name, "seed": 2**63 + i, "max_new_tokens": 9, "temperature": 0.9, "stop": "q"}
        for i, (prompt, name) in enumerate(zip(prompts, names, strict=True))
    ]
    write(requests, lines)
    named = [f"--adapter=one={adapters / 'one'}", f"--adapter=two={adapters / 'two'}:0.5"]
    status, printed, err = cli(model_file, requests, "--out", out, *named, *FEW)
    assert (status, printed) == (0, "") and "4: 0 done before, 4 now" in err and "one 2, none 1, two 1" in err, err
    stacked = lora.stack([adapters / "one", (adapters / "two", 0.5)], model)
    index = [["one", "two"].index(name) + 1 if name else 0 for name in names]
    asked = {"seed": 2**63, "max_new_tokens": 9, "temperature": 0.9, "stop": "q"}
    wanted = realm.generate(model, prompts, adapter=stacked, adapter_index=index, **asked)
    assert by_id(out) == {number: as_result(number, want) for number, want in enumerate(wanted, 1)}


def test_every_key_of_a_line_reaches_its_request(model, tmp_path):
    chat = [{"role": "user", "content": "thin?"}]
    line = {
        "id": 7, "max_new_tokens": 3, "temperature": 0.5, "top_k": 4, "top_p": 0.9, "min_p": 0.1, "seed": 8,
        "repetition_penalty": 1.5, "presence_penalty": 0.5, "frequency_penalty": 0.25, "stop": ["a", "b"],
        "adapter": "one", "priority": -2, "speculate": False, "add_special": False, "parse_special": True,
        "logit_bias": {"42": -5.5}, "prompt": "the",
    }  # fmt: skip
    assert {*line, "messages"} == set(KEYS)
    write(tmp_path / "lines", [line, {"messages": chat}])
    with open_requests(tmp_path / "lines") as file:
        first, second = (make_request(read, model) for read in read_lines(file, "lines"))
    assert first == realm.Request(**line | {"logit_bias": {42: -5.5}})
    assert second == realm.Request(chat_text(model.tokenizer, chat), id=2, parse_special=True)


@pytest.mark.slow
def test_each_answer_of_a_mix_is_that_of_generate(cli, model, model_file, adapters, files):
    requests, out = files
    chat = [{"role": "user", "content": "thin?"}]
    lines = [
        {"id": "greedy", "prompt": "the word in", "max_new_tokens": 9},
        {"id": "one", "prompt": "the word in", "max_new_tokens": 9, "adapter": "one"},
        {"id": "two", "prompt": [5, 9, 200], "max_new_tokens": 7, "adapter": "two", "temperature": 0.8, "seed": 2**63},
        {"prompt": "the", "max_new_tokens": 20, "temperature": 1, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "seed": 4},
        {"id": 77, "messages": chat, "max_new_tokens": 5, "logit_bias": {"65": 3, "66": -1e31}, "priority": 2},
        {"id": "stop", "prompt": "in the", "max_new_tokens": 30, "adapter": "one", "stop": ["0", "e", "q"],
         "temperature": 1.2, "seed": 5, "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.2},
        {"id": "none", "prompt": "in", "max_new_tokens": 0},
    ]  # fmt: skip
    write(requests, lines)
    named = [f"--adapter=one={adapters / 'one'}", f"--adapter=two={adapters / 'two'}:0.5"]
    status, printed, err = cli(model_file, requests, "--out", out, *named, *FEW)
    assert (status, printed) == (0, "") and "7: 0 done before, 7 now" in err and "one 2, two 1" in err, err
    results = by_id(out)
    assert set(results) == {"greedy", "one", "two", 4, 77, "stop", "none"}
    acting = {"one": adapters / "one", "two": [(adapters / "two", 0.5)]}
    for number, line in enumerate(lines, 1):
        asked = {k: v for k, v in line.items() if k not in ("id", "prompt", "messages", "adapter", "priority")}
        asked["logit_bias"] = {int(k): v for k, v in line.get("logit_bias", {}).items()}
        prompt = line.get("prompt") or chat_text(model.tokenizer, chat)
        [want] = realm.generate(
            model, [prompt], adapter=acting.get(line.get("adapter")), parse_special="messages" in line, **asked
        )
        result = results[line.get("id", number)]
        assert result == as_result(line.get("id", number), want)


def test_a_draft_runs_ahead_of_those_who_want_it(cli, capsys, model_file, files):
    requests, out = files
    with_draft = {"prompt": "the thin the thin the", "max_new_tokens": 12}
    write(requests, [with_draft, with_draft | {"speculate": False}])
    status, printed, _ = cli(model_file, requests, "--out", out, *FEW, "--draft", "ngram", "--json")
    assert status == 0
    ahead, alone = by_id(out)[1], by_id(out)[2]
    args = ["generate", model_file, "--prompt", with_draft["prompt"], "--max-new-tokens", 12, "--draft", "ngram"]
    assert run([*map(str, args), "--json"]) == 0
    want = json.loads(capsys.readouterr()[0])
    assert ahead["speculative"] == want["speculative"] and ahead["tokens"] == alone["tokens"] == want["tokens"]
    assert "speculative" not in alone
    assert json.loads(printed)["draft"] == "ngram"
    assert json.loads(printed)["metrics"]["drafted"] == want["speculative"]["drafted"] > 0


# --- lines that are wrong --------------------------------------------------------------------------------------------

BAD = [
    (b"not json", "not JSON"),
    (b'{"prompt": "\xff"}', "not UTF-8: byte 13"),
    (b"[" * 100_000, "not JSON"),
    (b'["prompt"]', "a request is an object"),
    ({"prompt": "x", "max_tokens": 3}, "unknown key 'max_tokens'"),
    ({"prompt": "x", "logprobs": 3}, "unknown key 'logprobs'"),
    ({"id": "no prompt"}, 'want either "prompt" or "messages"'),
    ({"prompt": "x", "messages": []}, 'want either "prompt" or "messages"'),
    ({"messages": []}, "messages is empty"),
    ({"messages": "hi"}, "messages must be a list"),
    ({"prompt": None}, "it must be a string or a list of token ids"),
    ({"prompt": []}, "has no tokens"),
    ({"prompt": [1, 261]}, "has 261 at place 1"),
    ({"prompt": "\ud800"}, "lone surrogate"),
    ({"prompt": "x" * 200}, "at most 95 fit"),
    ({"prompt": "x", "id": 1.5}, "id is 1.5"),
    ({"prompt": "x", "id": "r0"}, "id 'r0' is that of line 1 already"),
    ({"prompt": "x", "adapter": "none"}, "adapter 'none' is not one"),
    ({"prompt": "x", "adapter": ["one"]}, "adapter ['one'] is not one"),
    ({"prompt": "x", "temperature": -1}, "temperature is -1"),
    ({"prompt": "x", "temperature": "warm"}, "temperature is 'warm'"),
    ({"prompt": "x", "top_p": 0}, "top_p is 0"),
    ({"prompt": "x", "seed": -1}, "seed is -1"),
    ({"prompt": "x", "max_new_tokens": None}, "max_new_tokens is None"),
    ({"prompt": "x", "stop": [""]}, "stop[0] has 0 characters"),
    ({"prompt": "x", "logit_bias": {"a": 1}}, "logit_bias has the key 'a'"),
    ({"prompt": "x", "logit_bias": [1]}, "logit_bias is a list"),
    ({"prompt": "x", "priority": 1e9}, "priority is 1000000000.0"),
    ({"prompt": "x", "speculate": 1}, "speculate is 1"),
]


def test_a_bad_line_gets_its_error_and_harms_no_other(cli, model_file, files):
    requests, out = files
    write(requests, [*PLAIN[:2], b"", *(line for line, _ in BAD), b"  ", *PLAIN[2:4]])
    status, printed, err = cli(model_file, requests, "--out", out, *FEW, "--json")
    report = json.loads(printed)
    assert status == 0 and report["requests"] == report["done_now"] == 4 + len(BAD)
    assert (
        report["errors"] == len(BAD)
        and err == f'{len(BAD)} of {4 + len(BAD)} requests have errors: see "error" in {out}\n'
    )
    results = by_id(out)
    for number, (line, message) in enumerate(BAD, 4):
        own = line.get("id", number) if isinstance(line, dict) else number
        result = results[{1.5: number, "r0": None}.get(own, own)]
        assert result["error"].startswith(f"{requests}:{number}: ") and message in result["error"], result
        assert (result["text"], result["tokens"], result["stop_reason"]) == ("", [], None)
        assert "\n" not in result["error"] and len(result["error"]) <= 2000
    assert results[None]["line"] == next(n for n, (_, m) in enumerate(BAD, 4) if "already" in m)
    alone = out.with_name("alone.jsonl")
    write(requests, PLAIN[:4])
    assert cli(model_file, requests, "--out", alone, *FEW)[0] == 0
    assert by_id(alone) == {key: value for key, value in results.items() if value["error"] is None}


# --- going on --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain_results(model_file, tmp_path_factory):
    """The results of PLAIN, in one go."""
    folder = tmp_path_factory.mktemp("plain")
    write(folder / "requests.jsonl", PLAIN)
    args = ["batch", model_file, folder / "requests.jsonl", "--out", folder / "results.jsonl", *FEW]
    assert run([str(arg) for arg in args]) == 0
    return folder / "results.jsonl"


@pytest.mark.parametrize("torn", [0, 1, 8, 30, -1])
def test_a_run_goes_on_where_it_was_cut_off(cli, model_file, files, plain_results, torn):
    """torn: bytes that are left of the third line."""
    requests, out = files
    write(requests, PLAIN)
    first, second, third, *_ = plain_results.read_bytes().splitlines(keepends=True)
    out.write_bytes(first + second + third[:torn])
    status, _, err = cli(model_file, requests, "--out", out, *FEW)
    assert status == 0 and err.startswith("2 of 6 done already") and "2 done before, 4 now" in err
    assert out.read_bytes().startswith(first + second) and by_id(out) == by_id(plain_results)


def test_what_is_done_needs_no_model_and_overwrite_begins_anew(cli, model_file, files, plain_results):
    requests, out = files
    write(requests, [*PLAIN[1:], PLAIN[0] | {"prompt": "changed"}])
    out.write_bytes(plain_results.read_bytes())
    status, printed, err = cli("no-such.gguf", requests, "--out", out, "--json")
    assert status == 0 and json.loads(printed)["done_before"] == 6 and err.startswith("6 of 6 done already")
    assert out.read_bytes() == plain_results.read_bytes()
    write(requests, PLAIN[3:])
    status, printed, err = cli(model_file, requests, "--out", out, "--json")
    assert status == 0 and "3 results of ids that" in err
    out.write_text("anything, as long as it is said to be overwritten")
    assert cli(model_file, requests, "--out", out, "--overwrite", *FEW)[0] == 0
    assert by_id(out) == {line["id"]: by_id(plain_results)[line["id"]] for line in PLAIN[3:]}


@pytest.mark.parametrize(
    "content",
    [b"notes\n", b"notes", b'{"id": 1, "prompt": "x"}', b'{"id": 1, "text": "', b"\n", b"{}\n", b"1"],
    ids=repr,
)
def test_a_file_of_something_else_is_left_alone(cli, model_file, files, plain_results, content):
    requests, out = files
    write(requests, PLAIN)
    if content.startswith(b'{"id": 1, "text'):
        content += b"\n"  # cut short, but not at the end of the file
    out.write_bytes(before := plain_results.read_bytes() + content)
    assert f"{out}:7: not a result" in one_error(cli(model_file, requests, "--out", out))
    assert out.read_bytes() == before


def test_two_runs_do_not_write_to_one_file(cli, model_file, files):
    requests, out = files
    write(requests, PLAIN)
    with out.open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        for more in ([], ["--overwrite"]):
            assert "another run writes to it" in one_error(cli(model_file, requests, "--out", out, *more))
    assert out.exists(), "who is refused takes nothing away"


def test_a_full_disk_is_said_and_takes_no_result_away(files):
    _, out = files
    result = {"id": 1, "text": "x", "tokens": [1], "stop_reason": "eos", "error": None}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with ResultsFile(out) as results:
        results.begin()
        results.append(1, result)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (out.stat().st_size + 10, limits[1]))
            with pytest.raises(realm.RealmError, match=r"results.jsonl: cannot be written: File too large"):
                results.append(2, result | {"id": 2})
            results.__exit__()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert out.read_bytes().endswith(b'{"id": 2, ')
    with ResultsFile(out) as results:
        assert results.done == {1: False}
        results.begin()
    assert read(out) == [result]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("the device is gone")], ids=repr)
def test_a_run_that_breaks_off_keeps_what_is_written(cli, monkeypatch, model_file, files, plain_results, error):
    requests, out = files
    write(requests, PLAIN)
    steps, decode = iter(range(4)), realm.Engine._decode

    def breaking(engine, idle_since):
        if next(steps, None) is None:
            raise error
        decode(engine, idle_since)

    with monkeypatch.context() as patch:
        patch.setattr(realm.Engine, "_decode", breaking)
        status, _, err = cli(model_file, requests, "--out", out, *FEW, "--steps", 2)
    kept = by_id(out)
    assert 0 < len(kept) < 6 and all(result == by_id(plain_results)[id] for id, result in kept.items())
    if isinstance(error, KeyboardInterrupt):
        assert status == 130 and err == (
            f"interrupted: {len(kept)} of 6 requests have results in {out}; the same command goes on with the rest\n"
        )
    else:
        assert status == 1 and err == "error: the engine broke off (RuntimeError: the device is gone)\n"
    assert cli(model_file, requests, "--out", out, *FEW)[0] == 0
    assert by_id(out) == by_id(plain_results)


@pytest.mark.slow
def test_a_killed_run_goes_on(tmp_path):
    """The bundled model with its adapter, in a process that is killed in the middle."""
    requests, out, whole = (tmp_path / name for name in ("requests.jsonl", "out.jsonl", "whole.jsonl"))
    pirate = f"pirate={realm.__path__[0]}/assets/tiny-pirate"
    write(requests, [{"prompt": f"{i} plus {i} is", "max_new_tokens": 200, "adapter": (None, "pirate")[i % 2],
                      "temperature": 0.9, "seed": i} for i in range(24)])  # fmt: skip
    command = [sys.executable, "-m", "realm_jax.cli", "batch", requests, "--slots", "2", "--adapter", pirate, "--out"]
    process = subprocess.Popen([*command, out], stderr=subprocess.PIPE)
    while not out.exists() or out.read_bytes().count(b"\n") < 3:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = out.read_bytes().count(b"\n")
    assert 3 <= done < 24
    again = subprocess.run([*command, out], capture_output=True, text=True, check=True)
    assert again.stderr.startswith(f"{done} of 24 done already")
    subprocess.run([*command, whole], capture_output=True, check=True)
    assert by_id(out) == by_id(whole) and len(by_id(out)) == 24


# --- what is said ----------------------------------------------------------------------------------------------------


def test_stdin_metrics_and_few_who_wait(cli, model_file, files):
    _, out = files
    metrics = out.with_name("metrics.jsonl")
    lines = [PLAIN[i % 6] | {"id": i, "max_new_tokens": 2} for i in range(16)]
    stdin = b"\xef\xbb\xbf" + b"\n".join(json.dumps(line).encode() for line in lines)
    status, printed, err = cli(model_file, "-", "--out", out, "--metrics", metrics, "--json", *FEW, stdin=stdin)
    report, events = json.loads(printed), read(metrics)
    assert (status, err) == (0, "") and set(by_id(out)) == set(range(16))
    assert report["requests"] == report["done_now"] == report["metrics"]["ended"] == 16 and report["errors"] == 0
    assert report["out"] == str(out) and report["device"] == "cpu" and report["matmul"] == "reference"
    tokens = sum(len(result["tokens"]) for result in read(out))
    assert report["metrics"]["generated_tokens"] == tokens > 0
    assert sum(event["tokens"] for event in events if event["event"] == "ended") == tokens
    for kind in ("submitted", "admitted", "ended"):
        assert sorted(event["id"] for event in events if event["event"] == kind) == list(range(16))
    calls = [event for event in events if event["event"] == "call"]
    assert 0 < max(call["waiting"] for call in calls) <= (AHEAD - 1) * SLOTS
    assert report["metrics"]["calls"] == len(calls)


def test_a_terminal_sees_how_it_goes(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    metrics, tally, view = Metrics(4), Tally(), View(12)
    tally.take({"event": "call", "tokens": 50, "seconds": 0.5})
    metrics.call(seconds=0.5, host_seconds=0.0, waiting=7, occupied=3)
    text = numbers_text(tally, metrics.slots, metrics.summary())
    assert text.startswith("100 tokens/s, 3/4 slots, 7 waiting, first token -")
    with view.running():
        view.show(5, tally, metrics)
    assert "5/12" in sys.stderr.getvalue() and "7 waiting" in sys.stderr.getvalue()


# --- wrong usage -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "args",
    [
        ["--out", "o"],
        ["r"],
        ["m", "r", "x", "--out", "o"],
        ["m", "r", "--out", "./r"],
        ["m", "r", "--out", "m", "--overwrite"],
        ["r", "--out", "o", "--metrics", "o"],
        ["r", "--out", "o", "--adapter", "path"],
        ["r", "--out", "o", "--adapter", "=path"],
        ["r", "--out", "o", "--adapter", "a=p", "--adapter", "a=q"],
        ["r", "--out", "o", "--adapter", "a=p:nan"],
        ["r", "--out", "o", "--slots", "-1"],
        ["r", "--out", "o", "--steps", "0"],
    ],
    ids=" ".join,
)
def test_wrong_usage(cli, monkeypatch, tmp_path, args):
    monkeypatch.chdir(tmp_path)
    one_error(cli(*args), status=2)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_done_is_one_line_and_leaves_nothing_behind(cli, model_file, adapters, files):
    requests, out = files
    assert f"{requests}: cannot be read" in one_error(cli(model_file, requests, "--out", out))
    write(requests, [b"", b" "])
    assert "has no requests" in one_error(cli(model_file, requests, "--out", out))
    write(requests, PLAIN)
    for args, message in [
        (["no-such.gguf", requests], "no-such.gguf"),
        ([model_file, requests, "--adapter", "a=no-such"], "no-such"),
        ([model_file, requests, "--cache-dtype", "int3"], "cache_dtype is 'int3'"),
        ([model_file, requests, "--draft", "no-such"], "no-such"),
        ([model_file, requests, "--draft-adapter", adapters / "one"], "draft_adapter"),
        ([model_file, requests, "--metrics", out.parent / "no" / "m"], "cannot be written"),
    ]:
        assert message in one_error(cli(*args, "--out", out))
    assert not out.exists()
    for bad in (out.parent / "no" / "o", out.parent, os.devnull):
        assert str(bad) in one_error(cli(model_file, requests, "--out", bad))


def test_defaults_are_the_engines():
    options = {parameter.name: parameter.default for parameter in batch.command.params}
    engine = {name: p.default for name, p in inspect.signature(realm.Engine.__init__).parameters.items()}
    for name in ("slots", "max_len", "draft_tokens"):
        assert options[name] == engine[name]
    for name in ("cache_dtype", "steps", "prefill_tokens", "prefix_rows"):
        assert options[name] == getattr(EngineSettings(), name)
    assert isinstance(batch.command, click.Command)
