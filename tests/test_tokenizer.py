"""Tokenizers: round trips, streaming, special tokens, and refusal of metadata that contradicts itself."""

import json
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import models, trainers

from realm_jax.errors import GGUFError, RequestError
from realm_jax.gguf.bpe import BytePairEncoder
from realm_jax.gguf.pretokenizer import PreTokenizer, known_pretokenizers
from realm_jax.gguf.tokenizer import Tokenizer
from realm_jax.gguf.unicode import byte_characters, bytes_to_text, collapse, text_to_bytes, to_byte_characters

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
CORPUS = [
    "The capital of France is Paris. The capital of Peru is Lima, isn't it? They're 1234567 km apart.",
    "def f(x):\n    return  x + 1\n\n\nprint(f(41))\t# café naïve",
    "你好\uff0c世界\uff01こんにちは 안녕하세요 Привет, мир! नमस्ते \U0001f468\u200d\U0001f469\u200d\U0001f467",
]
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40) | st.text(
    st.sampled_from("aAbé '\n\r\t.,1٣中\u3000\u0301\U0001f468\u200d<|>s/_"), max_size=40
)
BYTES = st.binary(max_size=30) | st.lists(st.sampled_from(["é", "中", "\U0001f468", "a", " "])).map(
    lambda parts: "".join(parts).encode()[:-1]
)


def with_keys(values):
    return {f"tokenizer.ggml.{name}": value for name, value in values.items() if value is not None}


@cache
def trained(size=600):
    """Merges of a byte pair encoding over whole texts, so that tokens reach over words."""
    library = Library(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=size, min_frequency=1, show_progress=False, max_token_length=8)
    library.train_from_iterator([to_byte_characters(text) for text in CORPUS], trainer)
    return [tuple(pair) for pair in json.loads(library.to_str())["model"]["merges"]]


def bpe_metadata(pre="gpt-2", **changes):
    """A byte-level vocabulary with every kind of token. changes: other values, None to leave a key out."""
    special = {"<s>": CONTROL, "</s>": CONTROL, "<unk>": UNKNOWN, "<tool>": USER_DEFINED, "   ": USER_DEFINED}
    special |= {"<gone>": UNUSED, "<|im_end|>": CONTROL}
    tokens = [*special, *dict.fromkeys([*byte_characters(), *(left + right for left, right in trained())])]
    values = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": np.array([special.get(text, NORMAL) for text in tokens], np.int32),
        "merges": [f"{left} {right}" for left, right in trained()],
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    return with_keys(values | changes)


PIECES = ["▁", "▁▁", "a", "b", "c", "▁a", "ab", "▁ab", "bc", "abc", "aa", "é", "▁é", "!", "▁b", "▁▁▁"]


def spm_metadata(**changes):
    """A SentencePiece vocabulary: three special tokens, 256 bytes, the pieces, one user-defined token."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES, "<tool>"]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(PIECES), USER_DEFINED]
    values = {
        "model": "llama",
        "tokens": tokens,
        "scores": np.array([-float(len(text) * 7 % 5) for text in tokens], np.float32),
        "token_type": np.array(types, np.int32),
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return with_keys(values | changes)


BPE = Tokenizer.from_metadata(bpe_metadata())
SPM = Tokenizer.from_metadata(spm_metadata())


# --- text -> ids -> text


@pytest.mark.parametrize("pre", known_pretokenizers())
def test_byte_level_texts_come_back_exactly(pre):
    tokenizer = Tokenizer.from_metadata(bpe_metadata(pre))
    for text in [
        *CORPUS,
        "",
        " ",
        "  a  ",
        "\r\n\t\x00\x85",
        "a , b . c 's ' x",
        "\ufffd\ufeff\U0010ffff",
        "   <tool> ",
    ]:
        if tokenizer._vocabulary.pre.byte_level:
            assert tokenizer.decode(tokenizer.encode(text, special=False)) == text


@given(TEXTS)
def test_any_byte_level_text_comes_back_exactly(text):
    assert BPE.decode(BPE.encode(text)) == text


@given(TEXTS)
def test_any_sentencepiece_text_comes_back_exactly(text):
    text = text.replace("▁", "_")  # the one character that stands for another
    assert SPM.decode(SPM.encode(text)) == text
    assert SPM.decode(SPM.encode(text, special=False)) == text


@given(BYTES)
def test_bytes_that_are_not_utf8_survive_sentencepiece(data):
    ids = SPM.encode(data.decode("utf-8", "surrogateescape"), special=False)
    shown, written = b"".join(SPM.token_bytes(id) for id in ids), "▁".encode()
    assert shown.replace(written, b" ").removeprefix(b" ") == data.replace(written, b" ")


@given(TEXTS)
def test_words_are_the_text(text):
    for name in known_pretokenizers():
        assert "".join(PreTokenizer(name).split(text)) == text


@given(TEXTS)
def test_the_library_and_the_plain_merge_loop_agree(text):
    slow = BytePairEncoder(BPE._vocabulary.ids, BPE._vocabulary.merges, BPE._vocabulary.pre)
    slow._library = None
    assert BPE._encoder._library is not None
    assert slow.encode(text) == BPE._encoder.encode(text)


@given(st.text("abcé! xy", max_size=24))
def test_sentencepiece_joins_the_best_pair_first(text):
    tokens, ids, scores = SPM._vocabulary.tokens, SPM._vocabulary.ids, SPM._vocabulary.scores
    parts = list("▁" + text.replace(" ", "▁")) if text else []
    while True:
        joinable = [(-scores[ids[a + b]], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ids]
        if not joinable:
            break
        i = min(joinable)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    expected = []
    for part in parts:
        expected += [ids[part]] if part in ids else [ids[f"<0x{byte:02X}>"] for byte in part.encode()]
    assert SPM.encode(text, special=False) == expected
    assert all(tokens[id] for id in expected)


# --- streaming


@given(st.lists(st.integers(0, BPE.vocab_size - 1), max_size=30), st.booleans())
def test_streamed_byte_level_text_is_the_whole_text(ids, skip_special):
    _check_stream(BPE, ids, skip_special)


@given(st.lists(st.integers(0, SPM.vocab_size - 1), max_size=30), st.booleans())
def test_streamed_sentencepiece_text_is_the_whole_text(ids, skip_special):
    _check_stream(SPM, ids, skip_special)


def _check_stream(tokenizer, ids, skip_special):
    stream = tokenizer.stream(skip_special=skip_special)
    pushed = [stream.push(id) for id in ids]
    whole = tokenizer.decode(ids, skip_special=skip_special)
    assert "".join(pushed) + stream.finish() == whole
    data = b"".join(tokenizer._render(id, False, skip_special=skip_special, continues=True)[0] for id in ids)
    assert data.decode("utf-8", "replace") in (whole, " " + whole)


def test_a_stream_never_shows_half_a_character():
    stream, shown = BPE.stream(), []
    for byte in "é中\U0001f468!".encode():
        shown.append(stream.push(BPE._vocabulary.ids[byte_characters()[byte]]))
    assert shown == ["", "é", "", "", "中", "", "", "", "\U0001f468", "!"]
    assert stream.finish() == ""
    assert stream.push(BPE._vocabulary.ids[byte_characters()[0xE4]]) == ""
    assert stream.finish() == "\ufffd"
    assert stream.push(BPE._vocabulary.ids["a"]) == "a"


def test_the_leading_space_goes_only_at_the_start_of_a_text():
    ids = SPM.encode("a b", special=False)
    assert SPM.pieces(ids) == [" a", " b"]
    assert SPM.decode(ids) == "a b"
    assert SPM.decode([SPM.bos_id, *ids]) == "a b"
    assert SPM.decode(ids, continues=True) == " a b"
    assert SPM.decode([SPM.bos_id, *ids], skip_special=False) == "<s> a b"
    assert Tokenizer.from_metadata(spm_metadata(add_space_prefix=False)).decode(ids) == " a b"


# --- special tokens


def test_control_tokens_count_only_when_asked():
    plain, parsed = (BPE.encode("a</s>b", special=False, parse_special=parse) for parse in (False, True))
    assert 1 not in plain and BPE.decode(plain) == "a</s>b"
    assert parsed[1:-1] == [1] and BPE.decode(parsed) == "ab" and BPE.decode(parsed, skip_special=False) == "a</s>b"


def test_user_defined_tokens_always_count():
    tool, spaces = BPE._vocabulary.ids["<tool>"], BPE._vocabulary.ids["   "]
    for parse in (False, True):
        ids = BPE.encode("a<tool>   b", special=False, parse_special=parse)
        assert ids[1:-1] == [tool, spaces]
    assert BPE.decode([tool]) == "<tool>"


def test_unused_tokens_show_nothing():
    assert BPE.token_bytes(BPE._vocabulary.ids["<gone>"]) == b""


def test_bos_and_eos_follow_the_file():
    both = Tokenizer.from_metadata(bpe_metadata(add_bos_token=True, add_eos_token=True))
    assert both.encode("") == [0, 1] and both.encode("", special=False) == []
    assert BPE.encode("") == []
    assert Tokenizer.from_metadata(bpe_metadata("llama-bpe")).encode("") == [0]
    assert Tokenizer.from_metadata(bpe_metadata("llama-bpe", add_bos_token=np.bool_(False))).encode("") == []
    assert SPM.encode("") == [1]
    assert Tokenizer.from_metadata(spm_metadata(add_eos_token=True)).encode("")[-1] == 2


def test_sentencepiece_puts_a_space_after_each_special_token():
    ids = SPM.encode("a</s>a<tool>a", special=False, parse_special=True)
    assert SPM.pieces(ids) == [" a", "</s>", " a", "<tool>", " a"]


def test_tokens_that_end_a_generation():
    assert BPE.eog_ids == {1, BPE._vocabulary.ids["<|im_end|>"]}
    assert Tokenizer.from_metadata(bpe_metadata(eot_token_id=3)).eog_ids == {1, 3, BPE._vocabulary.ids["<|im_end|>"]}


def test_the_file_or_the_caller_names_the_pretokenizer():
    assert Tokenizer.from_metadata(bpe_metadata(None)).pre == "default"
    assert Tokenizer.from_metadata(bpe_metadata("no-such"), pre="qwen2").pre == "qwen2"
    digits = {pre: Tokenizer.from_metadata(bpe_metadata(pre)).encode("1234567") for pre in ("gpt-2", "qwen2")}
    assert len(digits["qwen2"]) == 7 > len(digits["gpt-2"])


def test_chat_templates_by_name():
    metadata = {**bpe_metadata(), "tokenizer.chat_template": "x", "tokenizer.chat_template.rag": "y"}
    tokenizer = Tokenizer.from_metadata(metadata)
    assert tokenizer.chat_template == "x" and tokenizer.chat_templates == {"default": "x", "rag": "y"}
    assert BPE.chat_template is None


# --- unusual vocabularies


def test_bytes_without_a_token_are_left_out():
    metadata = with_keys({"model": "gpt2", "tokens": ["a", "b", "ab"], "merges": ["a b", "b a", "a b"]})
    tokenizer = Tokenizer.from_metadata(metadata)
    assert tokenizer.encode("ab aéb c") == [2, 0, 1]
    assert tokenizer.encode("ba") == [1, 0]  # the merge makes no token
    assert tokenizer.bos_id is None and tokenizer.eos_id is None


def test_characters_without_a_token_become_the_unknown_token():
    metadata = spm_metadata(tokens=["<unk>", "<s>", "</s>", "▁", "a"], token_type=None, scores=None, unknown_token_id=0)
    assert Tokenizer.from_metadata(metadata).encode("aéa", special=False) == [3, 4, 0, 4]


def test_token_texts_that_are_not_utf8():
    tokens = [*bpe_metadata()["tokenizer.ggml.tokens"], "\udcff\udce2", ""]
    types = np.array([*bpe_metadata()["tokenizer.ggml.token_type"], USER_DEFINED, NORMAL], np.int32)
    tokenizer = Tokenizer.from_metadata(bpe_metadata(tokens=tokens, token_type=types))
    id = len(tokens) - 2
    assert tokenizer.encode("a\udcff\udce2b", special=False)[1:-1] == [id]
    assert tokenizer.token_bytes(id) == b"\xff\xe2" and tokenizer.decode([id]) == "\ufffd\ufffd"
    assert tokenizer.token_bytes(id + 1) == f"[EMPTY_{id + 1}]".encode()


# --- refusals


def test_lone_surrogates_and_ids_outside_are_refused():
    with pytest.raises(RequestError, match=r"U\+D800 at character 1"):
        BPE.encode("a\ud800")
    for id in (-1, BPE.vocab_size):
        with pytest.raises(RequestError, match="outside the vocabulary"):
            BPE.decode([id])
    with pytest.raises(RequestError, match="not a character"):
        BPE.encode(b"\xf4\x90\x80\x80".decode("utf-8", "surrogateescape"))


def _types(count):
    return np.full(count, NORMAL, np.int32)


COUNT = BPE.vocab_size
BROKEN = [
    ({"model": None}, "model is missing"),
    ({"model": "none"}, "model is 'none'"),
    ({"model": "bert"}, r"model is 'bert' \(WordPiece"),
    ({"model": "frob"}, "model is 'frob', which is unknown"),
    ({"model": 3}, "model must be a string"),
    ({"pre": "no-such"}, "pre 'no-such' is unknown; choose one with pre=NAME .* --pre NAME .*llama-bpe"),
    ({"pre": 7}, "pre must be a string"),
    ({"tokens": None}, "tokens is missing"),
    ({"tokens": []}, "tokens is empty"),
    ({"tokens": np.arange(5)}, "tokens must be an array of strings, not an array of int"),
    ({"tokens": ["a", 1]}, "tokens must be an array of strings"),
    ({"tokens": "abc"}, "tokens must be an array of strings"),
    ({"tokens": ["a", "b", "a"], "token_type": None}, "tokens has 'a' twice, as 0 and 2"),
    ({"token_type": _types(COUNT - 1)}, f"token_type has {COUNT - 1} entries for {COUNT} tokens"),
    ({"token_type": np.ones(COUNT, np.float32)}, "token_type must be an array of integers"),
    ({"token_type": np.full(COUNT, BYTE, np.int32)}, "token_type says byte for token 0"),
    ({"scores": np.zeros(COUNT + 1, np.float32)}, "scores has"),
    ({"scores": "x"}, "scores must be an array of numbers"),
    ({"scores": np.full(COUNT, np.nan, np.float32)}, "scores has a NaN at 0"),
    ({"merges": None}, "merges is missing"),
    ({"merges": ["a b", "ab"]}, "merges entry 1 is 'ab'"),
    ({"merges": np.zeros(3)}, "merges must be an array of strings"),
    ({"bos_token_id": COUNT}, f"bos_token_id is {COUNT}, outside the vocabulary: 0 to {COUNT - 1}"),
    ({"eos_token_id": -5}, "eos_token_id is -5, outside"),
    ({"eos_token_id": "</s>"}, "eos_token_id must be a token id"),
    ({"eot_token_id": True}, "eot_token_id must be a token id"),
    ({"add_bos_token": 1}, "add_bos_token must be true or false"),
    ({"pre": "glm4", "bos_token_id": None, "add_bos_token": True}, "add_bos_token is true, but no"),
]


@pytest.mark.parametrize(("changes", "message"), BROKEN, ids=[message[:30] for _, message in BROKEN])
def test_broken_metadata_is_refused_in_one_line(changes, message):
    with pytest.raises(GGUFError, match=message) as caught:
        Tokenizer.from_metadata(bpe_metadata(**changes), source="some.gguf")
    assert str(caught.value).startswith("some.gguf: ") and "\n" not in str(caught.value)


def test_other_refusals():
    with pytest.raises(GGUFError, match="no pre-tokenizer"):
        Tokenizer.from_metadata(spm_metadata(), pre="gpt-2")
    with pytest.raises(GGUFError, match="chosen pre-tokenizer 'x' is unknown"):
        Tokenizer.from_metadata(bpe_metadata(), pre="x")
    with pytest.raises(GGUFError, match="chat_template' must be a string"):
        Tokenizer.from_metadata({**bpe_metadata(), "tokenizer.chat_template": 3})
    no_space = spm_metadata(tokens=["▁", "a", "b"], token_type=None, scores=None, bos_token_id=None, eos_token_id=None)
    assert Tokenizer.from_metadata(no_space).encode("é") == [1, 0, 0]  # <s> is 1 and the unknown token 0 by default


def test_an_id_of_minus_one_means_none_given():
    assert Tokenizer.from_metadata(bpe_metadata(bos_token_id=0xFFFFFFFF)).bos_id == 11


# --- characters


@given(BYTES)
def test_bytes_are_read_as_leniently_as_llama_cpp_reads_them(data):
    if any(byte >= 0xF4 for byte in data):
        return
    text = bytes_to_text(data)
    try:
        assert text == data.decode("utf-8")
    except UnicodeDecodeError:
        assert len(text) <= len(data)
    assert text_to_bytes(data.decode("utf-8", "surrogateescape")) == data


def test_lenient_forms():
    assert bytes_to_text(b"\xc0\x80\xed\xa0\x80\xe2\x82\xffa") == "\0\ud800\ufffd\ufffd\ufffda"


def test_classes_keep_the_length_and_ascii():
    text = "aé1٣ \u3000\u0301!¡$€中\U00020000\u0378\n"
    assert collapse(text) == "a\xd21\xd1 \x0b\xd4!\xd3$\xd5\xd6\xd6\xd0\n"
    assert collapse("plain") == "plain"
