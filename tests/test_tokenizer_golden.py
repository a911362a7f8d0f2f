"""Token ids equal to those that llama.cpp gave (tests/golden/make_tokens.py), for every pre-tokenizer name."""

import json
from pathlib import Path

import pytest

from realm_jax.gguf.pretokenizer import known_pretokenizers
from realm_jax.gguf.reader import open_gguf
from realm_jax.gguf.tokenizer import Tokenizer

GOLDEN = Path(__file__).parent / "golden"
TOKENS = json.loads((GOLDEN / "tokens.json").read_text("utf-8"))
FILES = list(TOKENS["vocabularies"])
FIXTURES = Path(__file__).parents[2] / "shared" / "fixtures" / "vocab"
FIXTURE_NAMES = ["gpt-2", "llama-bpe", "qwen2", "llama-spm"]


def metadata_of(path):
    with open_gguf(path) as file:
        return dict(file.metadata)


def cases_by_pre(file):
    """(pre or None) -> list of (text, special, parse_special, ids)."""
    by_pre = {}
    for text, special, parse_special, by_ids in TOKENS["vocabularies"][file]["cases"]:
        for ids, pres in by_ids.items():
            for pre in pres:
                name = None if pre < 0 else TOKENS["names"][pre]
                by_pre.setdefault(name, []).append((text, special, parse_special, [int(id) for id in ids.split()]))
    return by_pre


@pytest.mark.parametrize("file", FILES)
def test_ids_are_those_of_llama_cpp(file):
    metadata = metadata_of(GOLDEN / file)
    for pre, cases in cases_by_pre(file).items():
        tokenizer = Tokenizer.from_metadata(metadata, pre=pre)
        for text, special, parse_special, expected in cases:
            ids = tokenizer.encode(text, special=special, parse_special=parse_special)
            assert ids == expected, (pre, text, special, parse_special)


def test_golden_cases_cover_every_pretokenizer():
    assert set(TOKENS["names"]) == set(known_pretokenizers()) - {"whitespace"}
    assert set(cases_by_pre("tokens_bpe.gguf")) == set(TOKENS["names"])


@pytest.mark.parametrize("file", FILES)
def test_settings_and_token_bytes_are_those_of_llama_cpp(file):
    facts = TOKENS["vocabularies"][file]["facts"]
    pre = next(iter(cases_by_pre(file)))
    tokenizer = Tokenizer.from_metadata(metadata_of(GOLDEN / file), pre=pre)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (facts["bos"], facts["eos"])
    assert (tokenizer.add_bos, tokenizer.add_eos) == (facts["add_bos"], facts["add_eos"])
    assert sorted(tokenizer.eog_ids) == facts["eog"]
    pieces = [bytes.fromhex(piece) for piece in facts["pieces"].split(" ")]
    assert [tokenizer.token_bytes(id) for id in range(tokenizer.vocab_size)] == pieces


@pytest.mark.parametrize("name", FIXTURE_NAMES)
def test_ids_of_real_vocabularies(name):
    path = FIXTURES / f"ggml-vocab-{name}.gguf"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    tokenizer = Tokenizer.from_metadata(metadata_of(path), source=path.name)
    texts = Path(f"{path}.inp").read_bytes().decode("utf-8").split("\n__ggml_vocab_test__\n")[:-1]
    lines = Path(f"{path}.out").read_text().splitlines()
    assert len(texts) == len(lines)
    for text, line in zip(texts, lines, strict=True):
        ids = tokenizer.encode(text, special=False)
        assert ids == [int(id) for id in line.split()], text
        assert tokenizer.decode(ids) == text
