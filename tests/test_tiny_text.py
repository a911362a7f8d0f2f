"""The generated text, its vocabulary, and the rows that the bundled models are trained on."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from realm_jax.errors import RealmError
from tiny_corpus import TextConfig, make_corpus, pack_rows
from tiny_text import CHATML_TEMPLATE, COUNTRIES, KINDS, documents, is_held_out
from tiny_tokenizer import SPECIAL_TOKENS, train_vocabulary

TEXT = TextConfig(dict.fromkeys(KINDS, 300), held_out=50, vocabulary=400, row_tokens=64)


@pytest.fixture(scope="module")
def corpus():
    return make_corpus(TEXT, seed=3)


@pytest.mark.parametrize("kind", KINDS)
def test_documents_depend_on_the_seed_alone(kind):
    first = documents(kind, 50, 7)
    assert first == documents(kind, 50, 7)
    assert first[:20] == documents(kind, 20, 7)
    assert first != documents(kind, 50, 8)
    assert all(text and text == text.lstrip() and "{" not in text for text in first)


def test_unknown_kinds_are_refused():
    with pytest.raises(RealmError, match="unknown kind of document 'poem'; known kinds: fact,"):
        documents("poem", 1, 0)
    with pytest.raises(RealmError, match="unknown kind 'poem'"):
        TextConfig({"poem": 1}, 1, 1, 1)


def test_countries_are_distinct_and_facts_cover_them():
    assert len({country.name for country in COUNTRIES}) == len({c.capital for c in COUNTRIES}) == len(COUNTRIES) > 140
    text = "\n".join(documents("fact", 5000, 0))
    for country in COUNTRIES:
        assert f"The capital of {country.name} is {country.capital}." in text
    assert "The capital of France is Paris." in text


def test_every_equation_is_true():
    text = "\n".join(documents("arithmetic", 2000, 0) + documents("chat", 500, 0))
    words = {"plus": "+", "minus": "-", "times": "*"}
    found = re.findall(r"(\d+) (\+|-|\*|plus|minus|times) (\d+) (?:=|is) (\d+)", text)
    assert len(found) > 10_000
    for left, sign, right, result in found:
        sign = words.get(sign, sign)
        value = {"+": int(left) + int(right), "-": int(left) - int(right), "*": int(left) * int(right)}[sign]
        assert value == int(result) >= 0


def test_every_list_is_right():
    tasks = [line.split(" -> ") for line in "\n".join(documents("list", 1000, 0)).splitlines()]
    assert len(tasks) > 3000
    for task, result in tasks:
        name, items = task.split(": ")
        items = items.split()
        expected = {"Copy": items, "Backwards": items[::-1], "Sorted": sorted(items)}[name]
        assert result.split() == expected and 3 <= len(items) <= 8


def test_stories_have_choice_in_them_and_held_out_combinations_apart():
    train, held_out = documents("story", 3000, 0), documents("story", 3000, 0, held_out=True)
    assert len(set(train)) > 2990 and not set(train) & set(held_out)
    everything = [is_held_out(hero, place, "kite") for hero in map(str, range(50)) for place in map(str, range(50))]
    assert 0.03 < np.mean(everything) < 0.1


def test_chats_have_the_form_of_the_chat_template():
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    template = ImmutableSandboxedEnvironment().from_string(CHATML_TEMPLATE)
    for text in documents("chat", 100, 0):
        turns = re.findall(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>\n", text, re.DOTALL)
        messages = [{"role": role, "content": content} for role, content in turns]
        assert template.render(messages=messages) == text
        assert template.render(messages=messages[:-1], add_generation_prompt=True) + turns[-1][1] in text


def test_vocabulary_has_the_asked_size_and_is_the_same_every_time(corpus):
    vocabulary = corpus.vocabulary
    assert len(set(vocabulary.tokens)) == len(vocabulary.tokens) == 400
    assert vocabulary.tokens[:3] == SPECIAL_TOKENS
    assert make_corpus(TEXT, seed=3).vocabulary == vocabulary
    texts = documents("story", 100, 0)
    with pytest.raises(RealmError, match="at least 259"):
        train_vocabulary(texts, 258)
    with pytest.raises(RealmError, match="gives only"):
        train_vocabulary(texts, 50_000)


def test_numbers_are_one_token_a_digit(corpus):
    vocabulary = corpus.vocabulary
    assert not [token for token in vocabulary.tokens if sum(map(str.isdigit, token)) > 1 and token.isascii()]
    assert len(vocabulary.encode(["12345"])[0]) == 5


@given(st.text(st.characters(codec="utf-8")))
def test_any_text_survives_the_vocabulary(corpus, text):
    assert corpus.vocabulary.encoder().decode(corpus.vocabulary.encode([text])[0], skip_special_tokens=False) == text


def test_special_tokens_are_single_tokens(corpus):
    ids = corpus.vocabulary.encode(["<|im_start|>user\nHello<|im_end|>"])[0]
    assert (ids[0], ids[-1]) == (1, 2) and not {0, 1, 2} & set(ids[1:-1])


def test_gguf_metadata_says_what_the_vocabulary_is(corpus):
    fields = {key: field.value for key, field in corpus.vocabulary.gguf_fields().items()}
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    assert fields["tokenizer.ggml.tokens"] == list(corpus.vocabulary.tokens)
    assert fields["tokenizer.ggml.token_type"].tolist() == [3, 3, 3] + [1] * 397
    assert len(fields["tokenizer.ggml.merges"]) == 400 - 259
    assert fields["tokenizer.ggml.tokens"][fields["tokenizer.ggml.bos_token_id"]] == "<|endoftext|>"
    assert fields["tokenizer.ggml.tokens"][fields["tokenizer.ggml.eot_token_id"]] == "<|im_end|>"


def test_the_packages_tokenizer_reads_the_metadata_and_gives_the_same_ids(corpus):
    from realm_jax.gguf.tokenizer import Tokenizer

    metadata = {key: field.value for key, field in corpus.vocabulary.gguf_fields().items()}
    tokenizer = Tokenizer.from_metadata(metadata)
    texts = [text for kind in KINDS for text in documents(kind, 40, 9)] + ["", " ", "naïve  café\n\n\t12 345's"]
    for text, ids in zip(texts, corpus.vocabulary.encode(texts), strict=True):
        assert tokenizer.encode(text, special=False, parse_special=True) == ids
        assert tokenizer.encode(text, parse_special=True) == [0, *ids]


def test_corpus_rows_are_full_and_start_with_a_document(corpus):
    again = make_corpus(TEXT, seed=3)
    for rows, same in ((corpus.train_RT, again.train_RT), (corpus.held_out_RT, again.held_out_RT)):
        assert rows.dtype == np.int32 and rows.shape[1] == 65 and np.array_equal(rows, same)
        assert (rows[:, 0] == 0).all() and rows.min() == 0 and rows.max() < 400
    assert not np.array_equal(corpus.train_RT, make_corpus(TEXT, seed=4).train_RT[: len(corpus.train_RT)])


def test_packing_by_hand():
    rows = pack_rows([[1, 2], [3], [4, 5, 6, 7, 8], [9]], 5)
    assert rows.tolist() == [[0, 1, 2, 0, 3], [0, 4, 5, 6, 7]]
    with pytest.raises(RealmError, match="not one row of 5 tokens"):
        pack_rows([[1]], 5)
