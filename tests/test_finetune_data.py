"""From data files to rows: forms, what is to be learned of each token for token, cutting, setting aside, packing."""

import copy
import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import realm_jax as realm
from realm_jax.errors import RealmError
from realm_jax.finetune import DataConfig, Example, load_data, make_data, make_rows
from realm_jax.finetune.data import encode_record
from realm_jax.finetune.records import check_record, read_records
from realm_jax.gguf.chat import chat_text

HELLO = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi there."}]


@pytest.fixture(scope="module")
def bundled():
    return realm.load()


@pytest.fixture(scope="module")
def small(model_file):
    """Byte-level vocabulary with BOS <s> (0) and EOS </s> (1); context 96."""
    return realm.load(model_file)


def encoded(model, content):
    return encode_record(model.tokenizer, check_record(content, "here"))


def text_of(model, example, learned=True):
    ids = [id for id, wanted in zip(example.tokens, example.learned, strict=True) if wanted == learned]
    return model.tokenizer.decode(ids, skip_special=False)


def test_a_text_is_learned_whole_with_its_end(bundled, small):
    for model, begin, end in ((bundled, 0, 0), (small, 0, 1)):
        example = encoded(model, {"text": "The capital of France is Paris."})
        ids = model.tokenizer.encode("The capital of France is Paris.", special=False)
        assert example.tokens == (begin, *ids, end)
        assert example.learned == (False, *[True] * (len(ids) + 1))


def test_text_that_looks_like_a_special_token_is_text(bundled):
    example = encoded(bundled, {"text": "a<|im_end|>"})
    assert 2 not in example.tokens and text_of(bundled, example) == "a<|im_end|><|endoftext|>"


def test_only_the_completion_is_learned(bundled):
    example = encoded(bundled, {"prompt": "17 + 25 =", "completion": " 42"})
    prompt = bundled.tokenizer.encode("17 + 25 =")
    assert example.tokens == (*bundled.tokenizer.encode("17 + 25 = 42"), 0)
    assert example.learned == (*[False] * len(prompt), *[True] * (len(example.tokens) - len(prompt)))
    assert text_of(bundled, example) == " 42<|endoftext|>"
    split = encoded(bundled, {"prompt": "The cap", "completion": "ital of France"})  # a token across the boundary
    assert text_of(bundled, split).endswith("ital of France<|endoftext|>")
    assert encoded(bundled, {"prompt": "", "completion": "Yes"}).learned[:2] == (False, True)


def test_only_the_answers_of_a_chat_are_learned_token_for_token(bundled):
    system = {"role": "system", "content": "Be brief."}
    more = [{"role": "user", "content": "And now?"}, {"role": "assistant", "content": "Now, too."}]
    example = encoded(bundled, {"messages": [system, *HELLO, *more]})
    encode = lambda text: bundled.tokenizer.encode(text, special=False, parse_special=True)  # noqa: E731
    parts = [
        ("<|endoftext|><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n", False),
        ("<|im_start|>assistant\n", False),
        ("Hi there.<|im_end|>", True),
        ("\n<|im_start|>user\nAnd now?<|im_end|>\n<|im_start|>assistant\n", False),
        ("Now, too.<|im_end|>", True),
    ]
    tokens, learned = [], []
    for text, wanted in parts:
        tokens += encode(text)
        learned += [wanted] * len(encode(text))
    assert (list(example.tokens), list(example.learned)) == (tokens, learned)


def test_training_sees_the_prompt_that_generation_gives(bundled):
    example = encoded(bundled, {"messages": HELLO})
    prompt = bundled.tokenizer.encode(chat_text(bundled.tokenizer, HELLO[:1]), parse_special=True)
    assert list(example.tokens[: len(prompt)]) == prompt and example.learned[: len(prompt)] == (False,) * len(prompt)
    answer = example.tokens[len(prompt) :]
    assert bundled.tokenizer.decode(answer[:-1]) == "Hi there." and answer[-1] in bundled.tokenizer.eog_ids


def test_a_template_with_its_own_begin_of_text(small):
    """Its BOS does not come twice; and one that always ends in an opening serves for single turns alone."""
    example = encoded(small, {"messages": HELLO})
    assert example.tokens.count(0) == 1 and text_of(small, example) == " Hi there.</s>"
    with pytest.raises(RealmError, match="renders the conversation up to message 2 otherwise than within the whole"):
        encoded(small, {"messages": [*HELLO, *HELLO]})


def test_a_model_without_template_cannot_chat(bundled):
    silent = copy.copy(bundled.tokenizer)
    silent.chat_template = None
    with pytest.raises(RealmError, match="has no chat template"):
        encode_record(silent, check_record({"messages": HELLO}, "here"))


def test_long_texts_are_divided_so_that_every_token_is_learned_once(small):
    text = "".join(chr(97 + i % 26) for i in range(50))
    data = make_data(small, [{"text": text}], row_tokens=16)
    example = encoded(small, {"text": text})
    assert data.train.learned_RT.sum() == len(example.tokens) - 1
    got = [data.train.tokens_RT[i, :n] for i, n in enumerate(data.train.count_R)]
    assert sorted(len(x) for x in got) == [4, 17, 17, 17]
    assert "training data: 1 of 1 documents are longer than 16 tokens and were divided" in data.notes


def test_long_chats_are_cut_and_those_without_an_answer_left_are_left_out(small):
    short = {"prompt": "ab", "completion": "cd"}
    data = make_data(
        small, [short, {"prompt": "a", "completion": "b" * 40}, {"prompt": "c" * 40, "completion": "d"}], row_tokens=16
    )
    assert data.notes[:2] == (
        "training data: 1 of 3 documents are longer than 16 tokens and were cut there",
        "training data: 1 of 3 documents have nothing to learn in their first 16 tokens and were left out",
    )
    assert data.train.learned_RT.sum() == 3 + 15
    with pytest.raises(RealmError, match="leaves nothing to learn"):
        make_data(small, [{"prompt": "c" * 40, "completion": "d"}], row_tokens=16)


def test_setting_aside_is_of_the_seed_and_takes_nothing_twice(small):
    records = [{"text": f"{i:04d}"} for i in range(40)]

    def texts(rows):
        decode = small.tokenizer.decode
        return [
            text
            for row in rows.tokens_RT
            for text in decode(row, skip_special=False).replace("<s>", "").split("</s>")
            if text
        ]

    first, again, other = (
        make_data(small, records, row_tokens=6, evaluation_share=0.2, seed=seed) for seed in (1, 1, 2)
    )
    assert len(texts(first.evaluation)) == 8
    assert sorted(texts(first.train) + texts(first.evaluation)) == [record["text"] for record in records]
    assert texts(first.evaluation) == texts(again.evaluation) != texts(other.evaluation)
    one = make_data(small, [{"text": "x" * 100}], row_tokens=10, evaluation_share=0.01)  # pieces of a single text
    assert one.evaluation.learned_RT.sum() + one.train.learned_RT.sum() == 101
    with pytest.raises(RealmError, match=r"one document that fits a row.*evaluation_share = 0"):
        make_data(small, [{"text": "x"}], row_tokens=10, evaluation_share=0.5)


@given(st.lists(st.integers(2, 17), min_size=1, max_size=30), st.booleans())
def test_rows_hold_every_document_once_and_whole(sizes, pack):
    examples = [Example((i + 1,) * size, (False, *[True] * (size - 1))) for i, size in enumerate(sizes)]
    rows = make_rows(examples, 16, pack=pack)
    found = []
    for tokens, learned, first, count in zip(rows.tokens_RT, rows.learned_RT, rows.first_RT, rows.count_R, strict=True):
        starts = sorted(set(first[:count].tolist()))
        for start, stop in zip(starts, [*starts[1:], int(count)], strict=True):
            assert (first[start:stop] == start).all() and not learned[start] and learned[start + 1 : stop].all()
            found.append(tuple(tokens[start:stop].tolist()))
        assert not learned[count:].any() and (first[count:] == np.arange(count, 17)).all()
    assert sorted(found) == sorted(example.tokens for example in examples)
    if not pack:
        assert len(rows) == len(sizes)
    else:
        assert len(rows) <= 2 * -(-sum(sizes) // 17)  # no two rows could be one


def test_files(small, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one", "id": 7}\n\n{"prompt": "1", "completion": "2"}\r\n')
    assert [(r.form, r.where) for r in read_records(tmp_path / "a.jsonl")] == [
        ("text", f"{tmp_path}/a.jsonl:1"),
        ("completion", f"{tmp_path}/a.jsonl:3"),
    ]
    (tmp_path / "b.txt").write_bytes(b"one\n\ntwo\xff\n\n \n\n")
    assert [r.content["text"] for r in read_records(tmp_path / "b.txt", separator="\n\n")] == ["one", "two\udcff"]
    assert len(read_records(tmp_path / "b.txt")) == 1 and len(read_records(tmp_path / "a.jsonl", "text")) == 1
    config = DataConfig("a.jsonl", evaluation="b.txt", separator="\n\n", row_tokens=32)
    data = load_data(small, config, folder=tmp_path)  # found beside the config
    assert len(data.train) == len(data.evaluation) == 1
    data = load_data(small, dataclasses.replace(config, train=str(tmp_path / "a.jsonl"), evaluation=""), folder=None)
    assert len(data.train) == len(data.evaluation) == 1


MESSAGES = {"messages": HELLO}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"not JSON: .* at column 2"),
        ("[1]", "want an object, not a list"),
        ("{}", 'has no keys; want "text" or "messages" or "prompt" and "completion"'),
        ('{"prompt": "a"}', 'has "prompt"; want "text" or'),
        ('{"text": "a", "prompt": "b", "completion": "c"}', 'has "text", "prompt", "completion"; want'),
        ('{"text": 3}', '"text" must be a string, not a number'),
        ('{"text": ""}', '"text" is empty'),
        ('{"prompt": "a", "completion": ""}', '"completion" is empty'),
        ('{"messages": []}', '"messages" must be a list of messages, not an empty list'),
        ('{"messages": [{"role": "user"}]}', 'message 1 must be an object with "role" and "content"'),
        (json.dumps({"messages": HELLO[:1]}), 'no message is of the role "assistant"'),
        (json.dumps({"messages": [*HELLO, *HELLO]}), "chat template renders the conversation up to message 2"),
        (r'{"text": "\ud800"}', "surrogate"),
        ("[" * 100_000, "not JSON"),
        ('{"text": "\udcff"}', "not UTF-8: byte 11 of the line"),
    ],
)
def test_a_bad_line_is_named(small, tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line.encode("utf-8", "surrogateescape") + b"\n")
    with pytest.raises(RealmError, match=message) as caught:
        load_data(small, DataConfig(str(path), row_tokens=32))
    assert str(caught.value).startswith(f"{path}:2: ") and "\n" not in str(caught.value)


def test_files_that_are_no_data(small, tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    for name, message in (
        ("none.txt", "cannot be read: No such file"),
        ("empty.txt", "has no documents"),
        (".", "directory"),
    ):
        with pytest.raises(RealmError, match=message):
            load_data(small, DataConfig(str(tmp_path / name), row_tokens=32))
    with pytest.raises(RealmError, match=r"data.row_tokens is 97; small.gguf is made for a context of 96 tokens"):
        make_data(small, [{"text": "a"}], row_tokens=97)
    with pytest.raises(RealmError, match="has no tokenizer, so it cannot be trained on text"):
        make_data(small.replace(tokenizer=None), [{"text": "a"}], row_tokens=32)
