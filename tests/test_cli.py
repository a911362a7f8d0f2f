"""The command line: what goes to stdout and stderr, exit statuses, and every kind of error in one line.

Most tests call `run` in this process; those about the process itself (encodings, pipes, imports) start one.
"""

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest

import realm_jax as realm
from realm_jax.cli import output, text
from realm_jax.cli.main import Commands, run
from realm_jax.gguf.types import Field, ValueType, field
from realm_jax.gguf.writer import write_gguf

PROMPT = "the word in"
REALM = [sys.executable, "-m", "realm_jax.cli"]


@dataclass(frozen=True)
class Result:
    status: int
    out: str
    err: str

    def json(self) -> dict:
        """The one JSON object that stdout must be."""
        assert self.status == 0, self.err
        assert self.out.count("\n") == 1
        value = json.loads(self.out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
        assert isinstance(value, dict)
        return value

    def error(self, status: int) -> str:
        """The one line on stderr, nothing on stdout."""
        assert self.status == status
        assert self.out == ""
        assert self.err.startswith("error: ")
        assert self.err.count("\n") == 1
        assert "Traceback" not in self.err
        return self.err.removeprefix("error: ").rstrip("\n")


@pytest.fixture
def cli(capsys, monkeypatch) -> Callable[..., Result]:
    def call(*args: object, stdin: bytes = b"") -> Result:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        status = run([str(arg) for arg in args])
        return Result(status, *capsys.readouterr())

    return call


@pytest.fixture
def odd_file(tmp_path):
    """A file that no model code takes: unknown architecture, unsupported format, hostile strings."""
    fields = {
        "general.architecture": field("no such\x1b[31m"),
        "general.name": field("[bold]name[/bold]\nsecond line :smile:"),
        "odd.nan": field(float("nan")),
        "odd.infinity": field(float("-inf")),
        "odd.bytes": Field(ValueType.STRING, "caf\udce9"),
        "odd.long": field(np.arange(1000, dtype=np.int32)),
        "odd.short": field([1, 2, 3]),
        "odd.strings": field(["\x1b]0;title\x07", "b"] * 50),
        "odd.empty": Field(ValueType.ARRAY, [], ValueType.STRING),
        "odd.nested": Field(ValueType.ARRAY, [field([1] * 100), field(["x"])], ValueType.ARRAY),
    }
    tensors = [
        ("[red]name[/red]", "IQ2_XXS", (4, 256), lambda: np.zeros((4, 66), np.uint8)),
        ("vector", "F32", (3,), lambda: np.zeros(12, np.uint8)),
    ]
    write_gguf(tmp_path / "odd.gguf", fields, tensors)
    return tmp_path / "odd.gguf"


@pytest.fixture
def vocabulary_file(tmp_path, byte_vocabulary):
    path = tmp_path / "vocabulary.gguf"
    write_gguf(path, {"general.architecture": field("llama")} | byte_vocabulary, [])
    return path


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("In the beginning there was the word, and the word was thin.\n" * 8, encoding="utf-8")
    return path


# --- the group -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("args", [["--help"], *([name, "--help"] for name in Commands.NAMES)], ids=" ".join)
def test_help(cli, args):
    result = cli(*args)
    assert result.status == 0
    assert "Usage: realm" in result.out
    assert result.err == ""


def test_no_arguments_shows_help(cli):
    result = cli()
    assert result.status == 2
    assert "Usage: realm" in result.err


def test_version_names_jax_and_device(cli):
    result = cli("--version")
    assert result.status == 0
    assert [line.split()[0] for line in result.out.splitlines()] == ["realm_jax", "jax", "device"]


@pytest.mark.parametrize(
    "args",
    [
        ["nonsense"],
        ["--nonsense"],
        ["generate"],
        ["generate", "--prompt"],
        ["generate", "--prompt", "x", "--nonsense"],
        ["generate", "--prompt", "x", "--temperature", "warm"],
        ["generate", "--prompt", "x", "--temperature", "-1"],
        ["generate", "--prompt", "x", "--top-p", "0"],
        ["generate", "--prompt", "x", "--max-new-tokens", "-1"],
        ["generate", "--prompt", "x", "--logit-bias", "5"],
        ["generate", "--prompt", "x", "--logit-bias", "a=5"],
        ["generate", "one.gguf", "two.gguf", "--prompt", "x"],
        ["inspect"],
        ["tokenize", "one.gguf"],
        ["tokenize", "one.gguf", "text", "more"],
        ["logits", "one.gguf", "--out", "x.npy"],
        ["logits", "one.gguf", "--tokens", "1", "--prompt", "x", "--out", "x.npy"],
        ["logits", "one.gguf", "--tokens", "1,x", "--out", "x.npy"],
        ["logits", "one.gguf", "--tokens", "", "--out", "x.npy"],
        ["logits", "one.gguf", "--tokens", "1"],
        ["bench", "--batch", "0"],
        ["bench", "one.gguf", "two.gguf"],
        ["perplexity", "one.gguf"],
        ["perplexity", "one.gguf", "text.txt", "--context", "2"],
    ],
    ids=" ".join,
)
def test_wrong_usage(cli, args):
    assert "--help" in cli(*args).error(2)


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "args",
    [
        ["inspect", "FILE"],
        ["tokenize", "FILE", "x"],
        ["generate", "FILE", "--prompt", "x"],
        ["logits", "FILE", "--tokens", "1", "--out", "x.npy"],
        ["perplexity", "FILE", "TEXT"],
        ["bench", "FILE"],
        ["quantize", "FILE", "x.gguf", "--format", "Q8_0"],
    ],
    ids=lambda args: args[0],
)
@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
def test_missing_and_broken_files(cli, tmp_path, text_file, args, as_json):
    args = [*args, "--json"] if as_json else args
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(7))
    for path in (tmp_path / "missing.gguf", broken, tmp_path):
        given = [str({"FILE": path, "TEXT": text_file}.get(arg, arg)) for arg in args]
        assert str(path.name) in cli(*given).error(1)


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (realm.RealmError("one\nline\x1b[0m"), r"one\nline\x1b[0m"),
        (MemoryError(), "MemoryError: not enough memory (--debug shows where)"),
        (ValueError("first\nsecond"), "ValueError: first (--debug shows where)"),
        (PermissionError(13, "Permission denied", "some.file"), "some.file: Permission denied"),
        (RecursionError("too deep"), "RecursionError: too deep (--debug shows where)"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_unexpected_errors_are_one_line(cli, monkeypatch, error, wanted):
    def fail(*_args):
        raise error

    monkeypatch.setattr("realm_jax.cli.inspect.open_gguf", fail)
    assert cli("inspect", "x.gguf").error(1) == wanted


@pytest.mark.parametrize("args", [["--debug", "inspect", "no.gguf"], ["inspect", "no.gguf", "--debug"]], ids=" ".join)
def test_debug_shows_the_traceback(cli, args):
    result = cli(*args)
    assert result.status == 1
    assert "Traceback" in result.err
    assert result.err.splitlines()[-1].startswith("error: no.gguf")


def test_interrupt_is_quiet(cli, monkeypatch):
    def interrupt(*_args):
        raise KeyboardInterrupt

    monkeypatch.setattr("realm_jax.cli.inspect.open_gguf", interrupt)
    assert cli("inspect", "x.gguf") == Result(130, "", "")


# --- inspect ---------------------------------------------------------------------------------------------------------


def test_inspect_json(cli, model_file):
    seen = cli("inspect", model_file, "--json").json()
    model = realm.load(model_file)
    assert seen["architecture"] == "llama"
    assert seen["metadata"]["llama.context_length"] == 96
    assert seen["metadata"]["tokenizer.ggml.tokens"]["length"] == 261
    embedding = next(t for t in seen["tensors"] if t["name"] == "token_embd.weight")
    assert embedding == {"name": "token_embd.weight", "format": "F32", "shape": [261, 64], "bytes": 261 * 64 * 4}
    weights = sum(np.size(leaf) for leaf in (model.params.embedding, model.params.norm))
    assert seen["parameters"] > weights
    assert seen["bits_per_weight"] == 32
    assert seen["formats"]["F32"]["tensors"] == len(seen["tensors"])


def test_inspect_needs_no_support_for_what_it_shows(cli, odd_file):
    seen = cli("inspect", odd_file, "--json").json()
    assert seen["architecture"] == "no such\x1b[31m"
    metadata = seen["metadata"]
    assert metadata["odd.nan"] == "NaN"
    assert metadata["odd.infinity"] == "-Infinity"
    assert metadata["odd.bytes"] == "caf\udce9"
    assert metadata["odd.long"] == {"type": "array of int32", "length": 1000, "head": list(range(8))}
    assert metadata["odd.short"] == [1, 2, 3]
    assert metadata["odd.empty"] == []
    assert metadata["odd.nested"] == [{"type": "array of int32", "length": 100, "head": [1] * 8}, ["x"]]
    assert [t["format"] for t in seen["tensors"]] == ["IQ2_XXS", "F32"]
    full = cli("inspect", odd_file, "--json", "--full").json()["metadata"]
    assert full["odd.long"] == list(range(1000))
    assert full["odd.nested"] == [[1] * 100, ["x"]]


@pytest.mark.parametrize("full", [[], ["--full"]], ids=["short", "full"])
def test_inspect_shows_control_characters_and_markup_as_they_are(cli, odd_file, full):
    result = cli("inspect", odd_file, *full)
    assert result.status == 0
    assert "\x1b" not in result.out and "\x07" not in result.out
    assert r"[red]name[/red]" in result.out
    assert r"[bold]name[/bold]\nsecond line :smile:" in result.out
    assert r"caf\xe9" in result.out


def test_inspect_vocabulary_alone(cli, vocabulary_file):
    assert "tokenizer.ggml.tokens" in cli("inspect", vocabulary_file).out
    seen = cli("inspect", vocabulary_file, "--json").json()
    assert seen["tensors"] == []
    assert seen["bits_per_weight"] is None


# --- tokenize --------------------------------------------------------------------------------------------------------


def test_tokenize(cli, vocabulary_file):
    the, end = 2 + 256 + 1, 1
    assert cli("tokenize", vocabulary_file, "the", "--json").json() == {"ids": [0, the], "pieces": ["<s>", "the"]}
    assert cli("tokenize", vocabulary_file, "the", "--no-special", "--json").json()["ids"] == [the]
    assert end not in cli("tokenize", vocabulary_file, "the</s>", "--json").json()["ids"]
    assert cli("tokenize", vocabulary_file, "the</s>", "--parse-special", "--json").json()["ids"] == [0, the, end]
    assert cli("tokenize", vocabulary_file, "", "--json").json()["ids"] == [0]
    shown = cli("tokenize", vocabulary_file, "the\x1b")
    assert r"\x1b" in shown.out and "\x1b" not in shown.out


def test_tokenize_takes_text_that_begins_with_a_dash(cli, vocabulary_file):
    for given in ("-the", "--the", "-5"):
        assert "".join(cli("tokenize", vocabulary_file, given, "--no-special", "--json").json()["pieces"]) == given
    assert (
        "".join(cli("tokenize", "--json", "--no-special", vocabulary_file, "--", "--json").json()["pieces"]) == "--json"
    )


def test_tokenize_reads_stdin_as_it_stands(cli, vocabulary_file):
    result = cli("tokenize", vocabulary_file, "-", "--json", "--no-special", stdin=b"a\r\n\xff\n")
    # llama.cpp takes a byte that is not UTF-8 as U+FFFD, here three byte tokens
    assert result.json()["ids"] == [2 + byte for byte in "a\r\n\ufffd\n".encode()]


def test_tokenize_with_another_pretokenizer(cli, vocabulary_file):
    assert cli("tokenize", vocabulary_file, "the", "--pre", "llama-bpe", "--json").json()["ids"]
    assert "nonsense" in cli("tokenize", vocabulary_file, "the", "--pre", "nonsense").error(1)


# --- logits ----------------------------------------------------------------------------------------------------------


def test_logits_of_tokens(cli, model_file, tmp_path):
    out = tmp_path / "logits.bin"  # exactly this name: nothing is added to it
    seen = cli("logits", model_file, "--tokens", "0, 5,7", "--out", out, "--json").json()
    assert seen == {"out": str(out), "tokens": [0, 5, 7], "shape": [3, 261], "arithmetic": "float"}
    logits = np.load(out)
    assert logits.dtype == np.float32
    np.testing.assert_array_equal(logits, realm.forward(realm.load(model_file), np.array([[0, 5, 7]]))[0])
    assert os.listdir(tmp_path) == ["logits.bin"]


def test_logits_of_a_prompt(cli, model_file, tmp_path):
    result = cli("logits", model_file, "--prompt", PROMPT, "--out", tmp_path / "logits.npy")
    assert (result.status, result.out) == (0, "")
    ids = realm.load(model_file).tokenizer.encode(PROMPT)
    assert np.load(tmp_path / "logits.npy").shape == (len(ids), 261)


def test_logits_refuses_ids_outside_the_vocabulary(cli, model_file, tmp_path):
    for tokens in ("0,261", "0,-1", "0,99999999999999999999"):
        assert "260" in cli("logits", model_file, "--tokens", tokens, "--out", tmp_path / "x.npy").error(1)
    assert os.listdir(tmp_path) == []


def test_logits_that_cannot_be_written(cli, model_file, tmp_path):
    for out in (tmp_path / "missing" / "x.npy", tmp_path):
        assert str(out) in cli("logits", model_file, "--tokens", "0", "--out", out).error(1)
    assert os.listdir(tmp_path) == []


def test_logits_through_a_pipe(model_file, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    command = [*REALM, "logits", str(model_file), "--tokens", "0,1", "--out", str(pipe)]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        data = pipe.read_bytes()
        assert process.wait() == 0, process.stderr.read()
        process.stderr.close()
    assert np.load(io.BytesIO(data)).shape == (2, 261)


# --- perplexity ------------------------------------------------------------------------------------------------------


def test_perplexity(cli, model_file, text_file):
    seen = cli("perplexity", model_file, text_file, "--context", "48", "--json").json()
    text = text_file.read_text(encoding="utf-8").removesuffix("\n")
    from realm_jax.evaluate import perplexity

    wanted = perplexity(realm.load(model_file), text, context=48)
    assert seen["perplexity"] == pytest.approx(wanted.perplexity)
    assert seen["perplexity_error"] == pytest.approx(wanted.error)
    assert seen["tokens"] == seen["chunks"] * (48 - 24 - 1)
    assert "kl_mean" not in seen
    assert "perplexity" in cli("perplexity", model_file, text_file).out


def test_perplexity_with_a_reference(cli, model_file, make_model_file, text_file):
    packed = make_model_file("packed.gguf", format="Q8_0")
    seen = cli("perplexity", packed, text_file, "--reference", model_file, "--json").json()
    assert seen["context"] == 96  # what the model has, where that is less than 512
    assert 0 < seen["kl_median"] < seen["kl_99"] <= seen["kl_max"]
    assert 0.5 < seen["top1_agreement"] <= 1
    assert seen["kl_mean_error"] > 0 and seen["kl_median_error"] > 0 and seen["kl_99_error"] > 0
    shown = cli("perplexity", packed, text_file, "--reference", model_file)
    assert "KL divergence" in shown.out


def test_perplexity_beyond_the_models_context_warns(cli, model_file, text_file):
    result = cli("perplexity", model_file, text_file, "--context", "100", "--json")
    assert result.status == 0
    assert result.err.startswith("warning: the model is made for 96 tokens")


def test_perplexity_of_a_short_text(cli, model_file, tmp_path):
    (tmp_path / "short.txt").write_text("the word")
    assert "needs at least 192" in cli("perplexity", model_file, tmp_path / "short.txt").error(1)
    assert "missing.txt" in cli("perplexity", model_file, tmp_path / "missing.txt").error(1)


# --- generate --------------------------------------------------------------------------------------------------------


def test_generate_json(cli, model_file):
    seen = cli("generate", model_file, "--prompt", PROMPT, "--max-new-tokens", "5", "--json").json()
    (wanted,) = realm.generate(realm.load(model_file), [PROMPT], max_new_tokens=5)
    assert seen["text"] == wanted.text
    assert seen["tokens"] == wanted.tokens
    assert seen["prompt_tokens"] == wanted.prompt_tokens
    assert seen["stop_reason"] == wanted.stop_reason
    assert seen["tokens_per_second"] > 0
    assert seen["speculative"] is None
    assert "logprobs" not in seen


def test_generate_streams_the_same_text(cli, model_file):
    args = ["--max-new-tokens", "9", "--temperature", "0.8", "--top-k", "50", "--seed", "3"]
    seen = cli("generate", model_file, "--prompt", PROMPT, *args, "--json").json()
    result = cli("generate", model_file, "--prompt", PROMPT, *args)
    assert result.status == 0
    assert result.out == seen["text"] + "\n"
    assert "tokens/s" in result.err
    assert "F32 100%" in result.err


def test_generate_reads_the_prompt_from_stdin(cli, model_file):
    wanted = cli("generate", model_file, "--prompt", PROMPT, "--max-new-tokens", "3", "--json").json()
    seen = cli(
        "generate", model_file, "--prompt", "-", "--max-new-tokens", "3", "--json", stdin=PROMPT.encode() + b"\n"
    )
    assert seen.json()["tokens"] == wanted["tokens"]


def test_generate_options_reach_the_model(cli, model_file):
    def tokens(*args: str) -> list[int]:
        return cli("generate", model_file, "--prompt", PROMPT, "--max-new-tokens", "4", "--json", *args).json()[
            "tokens"
        ]

    greedy = tokens()
    assert greedy[0] not in tokens("--logit-bias", f"{greedy[0]}=-inf")
    assert tokens("--logit-bias", "65=1000", "--logit-bias", "66=999") == [65] * 4
    assert len(set(tokens("--logit-bias", "65=1000", "--repetition-penalty", "1e6"))) > 1
    assert len(set(tokens("--logit-bias", "65=100", "--presence-penalty", "1000"))) > 1
    assert len(set(tokens("--logit-bias", "65=100", "--frequency-penalty", "1000"))) > 1
    assert tokens("--temperature", "5", "--top-k", "1") == greedy
    assert tokens("--temperature", "5", "--top-p", "1e-6") == greedy
    assert tokens("--temperature", "5", "--min-p", "1") == greedy
    assert tokens("--temperature", "5", "--seed", "1") != tokens("--temperature", "5", "--seed", "2")


def test_generate_stops_at_a_text(cli, model_file):
    args = ["--prompt", PROMPT, "--logit-bias", "67=1000", "--max-new-tokens", "8", "--json"]  # id 67: byte 65, "A"
    seen = cli("generate", model_file, *args, "--stop", "zz", "--stop", "AAA").json()
    assert (seen["text"], seen["stop_reason"]) == ("", "stop")


def test_generate_logprobs(cli, model_file):
    args = ["--prompt", PROMPT, "--max-new-tokens", "2", "--logprobs", "3"]
    entry = cli("generate", model_file, *args, "--json").json()["logprobs"][0]
    assert entry["token"] == entry["top"][0]["token"]
    assert entry["logprob"] == pytest.approx(entry["top"][0]["logprob"])
    assert len(entry["top"]) == 3
    assert "likeliest" in cli("generate", model_file, *args).err


def test_generate_chat_renders_the_template_with_special_tokens(cli, model_file):
    tokenizer = realm.load(model_file).tokenizer
    wanted = tokenizer.encode("[user] hi</s>[assistant]", parse_special=True)
    assert wanted[0] == tokenizer.bos_id and wanted.count(tokenizer.eos_id) == 1
    seen = cli("generate", model_file, "--prompt", "hi", "--chat", "--max-new-tokens", "2", "--json").json()
    assert seen["prompt_tokens"] == len(wanted)
    assert seen["tokens"] == realm.generate(realm.load(model_file), [wanted], max_new_tokens=2)[0].tokens


def test_generate_chat_needs_a_template(cli, make_model_file, byte_vocabulary):
    plain = {key: value for key, value in byte_vocabulary.items() if "chat" not in key}
    path = make_model_file("plain.gguf", vocabulary=plain)
    assert "has no chat template" in cli("generate", path, "--prompt", "x", "--chat").error(1)


def test_generate_refuses_what_cannot_be_served(cli, model_file):
    assert "prompt" in cli("generate", model_file, "--prompt", "x" * 500).error(1)
    assert "261" in cli("generate", model_file, "--prompt", "x", "--logit-bias", "261=1").error(1)


def test_generated_control_characters_reach_no_terminal(cli, model_file, monkeypatch):
    args = ["--prompt", PROMPT, "--logit-bias", "29=1000", "--max-new-tokens", "2"]  # id 29: byte 27, escape
    assert cli("generate", model_file, *args).out == "\x1b\x1b\n"
    monkeypatch.setattr("realm_jax.cli.generate.to_terminal", lambda: True)
    assert cli("generate", model_file, *args).out == "\\x1b\\x1b\n"


# --- helpers ---------------------------------------------------------------------------------------------------------


def test_visible_text():
    assert text.visible("a\tb\nc\x1b[0m\x9b\u202e\udcff\r") == "a\tb\nc\\x1b[0m\\x9b\\u202e\\xff\\r"
    assert text.one_line("a\tb\n\u2028é漢") == "a\\tb\\n\\u2028é漢"
    assert text.one_line("a" * 20, 10) == "a" * 7 + "..."


def test_sizes_for_people():
    assert output.size_text(999) == "999 B"
    assert output.size_text(1_234_567) == "1.23 MB"
    assert output.size_text(4_620_000_000) == "4.62 GB"
    assert output.count_text(8_030_000_000) == "8.03 G"


# --- the process -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["inspect", "tokenize", "help"])
def test_reading_a_file_loads_no_jax(command, vocabulary_file):
    args = {"inspect": ["inspect", vocabulary_file], "tokenize": ["tokenize", vocabulary_file, "x"], "help": ["--help"]}
    code = (
        "import sys; from realm_jax.cli.main import run; status = run(sys.argv[1:]);"
        "sys.exit('jax was loaded' if 'jax' in sys.modules else status)"
    )
    done = subprocess.run([sys.executable, "-c", code, *map(str, args[command])], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_poor_encoding_is_no_error(odd_file, encoding):
    done = subprocess.run(
        [*REALM, "inspect", str(odd_file)],
        capture_output=True,
        check=False,
        env=os.environ | {"PYTHONIOENCODING": encoding, "LC_ALL": "C"},
    )
    assert done.returncode == 0, done.stderr
    assert b"odd.long" in done.stdout


def test_a_closed_pipe_is_quiet(odd_file):
    read, write = os.pipe()
    os.close(read)
    for flag in ([], ["--json"]):
        done = subprocess.run(
            [*REALM, "inspect", str(odd_file), *flag], stdout=write, stderr=subprocess.PIPE, check=False
        )
        assert (done.returncode, done.stderr) == (1, b"")
    os.close(write)


def test_an_interrupt_ends_the_process_quietly(vocabulary_file):
    command = [*REALM, "tokenize", str(vocabulary_file), "-"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        with pytest.raises(subprocess.TimeoutExpired):  # until it waits for the text
            process.wait(2)
        process.send_signal(signal.SIGINT)
        assert (process.wait(10), process.stdout.read(), process.stderr.read()) == (130, b"", b"")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_one_line(odd_file):
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [*REALM, "inspect", str(odd_file), "--json"], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (done.returncode, done.stderr) == (1, "error: No space left on device\n")
