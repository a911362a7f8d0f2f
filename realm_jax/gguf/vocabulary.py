"""The vocabulary and the tokenizer settings in a GGUF file's metadata, checked. Called by `tokenizer.py`.

The defaults where a key is missing are those of llama.cpp (`llama_vocab::impl::load`).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from realm_jax.errors import GGUFError
from realm_jax.gguf.pretokenizer import PreTokenizer, known_pretokenizers
from realm_jax.gguf.special_tokens import (
    ATTRIBUTE_BY_TYPE,
    Attribute,
    TokenType,
    mark_special,
    mark_stripping,
    read_special_ids,
)
from realm_jax.gguf.tokenizer_keys import PREFIX, TokenizerKeys

_BPE_MODELS = {"gpt2", "gemma4"}
_OTHER_MODELS = {
    "bert": "WordPiece",
    "t5": "Unigram",
    "rwkv": "RWKV",
    "plamo2": "PLaMo-2",
    "hybriddna": "DNA",
    "whitespace": "white space",
    "test": "test",
}


@dataclass(frozen=True)
class Vocabulary:
    """Tokens and settings of one file.

    tokens: texts as in the file, bytes that are not UTF-8 as surrogate escapes; empty ones become [EMPTY_id].
    ids: text -> id. scores: float, one a token. attributes: int, `Attribute` bits, one a token. merges: pairs.
    """

    model: str
    pre: PreTokenizer | None
    tokens: list[str]
    ids: dict[str, int]
    scores: list[float]
    attributes: list[int]
    merges: list[tuple[str, str]]
    special_ids: dict[str, int]
    eog_ids: frozenset[int]
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool


def read_vocabulary(metadata: Mapping[str, Any], pre: str | None, source: str) -> Vocabulary:
    """Check a file's tokenizer metadata and apply the defaults. Raises GGUFError naming the key that is wrong."""
    keys = TokenizerKeys(metadata, source)
    model = _read_model(keys)
    pre_tokenizer = _choose_pre(keys, model, pre)
    tokens, ids = _read_tokens(keys)
    count = len(tokens)
    attributes = _read_attributes(keys, tokens)
    special_ids = read_special_ids(keys, model, pre_tokenizer, count)
    eog_ids = mark_special(tokens, ids, attributes, special_ids)
    mark_stripping(keys, pre_tokenizer, ids, attributes)
    sentencepiece = model == "llama"
    add_bos = keys.flag("add_bos_token", sentencepiece or pre_tokenizer.add_bos)
    if pre_tokenizer is not None and pre_tokenizer.always_bos:
        add_bos = True
    add_eos = keys.flag("add_eos_token", False)
    for name, wanted in (("bos", add_bos), ("eos", add_eos)):
        if wanted and name not in special_ids:
            raise keys.error(f"add_{name}_token", f"is true, but no {PREFIX}{name}_token_id says which token that is")
    return Vocabulary(
        model=model,
        pre=pre_tokenizer,
        tokens=tokens,
        ids=ids,
        scores=_read_scores(keys, count),
        attributes=attributes,
        merges=[] if sentencepiece else _read_merges(keys, pre_tokenizer),
        special_ids=special_ids,
        eog_ids=eog_ids,
        add_bos=add_bos,
        add_eos=add_eos,
        add_space_prefix=keys.flag("add_space_prefix", sentencepiece),
    )


def _read_model(keys: TokenizerKeys) -> str:
    model = keys.text("model")
    supported = "'gpt2' (byte-level BPE) and 'llama' (SentencePiece type) are supported"
    if model is None or model in ("none", "no_vocab"):
        raise keys.error("model", f"is {'missing' if model is None else repr(model)}: no tokenizer here; {supported}")
    if model in _OTHER_MODELS:
        raise keys.error("model", f"is {model!r} ({_OTHER_MODELS[model]} tokenizer), not supported; {supported}")
    if model != "llama" and model not in _BPE_MODELS:
        raise keys.error("model", f"is {model[:80]!r}, which is unknown; {supported}")
    return model


def _choose_pre(keys: TokenizerKeys, model: str, chosen: str | None) -> PreTokenizer | None:
    """The pre-tokenizer that the caller chose or the file names; none for SentencePiece."""
    if model == "llama":
        if chosen is not None:
            raise keys.error("model", f"is 'llama', which has no pre-tokenizer: leave out pre={chosen!r}")
        return None
    in_file = "gemma4" if model == "gemma4" else keys.text("pre")
    name = chosen if chosen is not None else in_file or "default"
    known = known_pretokenizers()
    if name not in known:
        what = "the chosen pre-tokenizer" if chosen is not None else f"{PREFIX}pre"
        raise GGUFError(
            f"{keys.source}: {what} {name[:80]!r} is unknown; choose one with pre=NAME (Python) or --pre NAME "
            f"(command line). Known: {', '.join(known)}"
        )
    return PreTokenizer(name)


def _read_tokens(keys: TokenizerKeys) -> tuple[list[str], dict[str, int]]:
    tokens = keys.strings("tokens")
    if not tokens:
        raise keys.error("tokens", f"is {'missing' if tokens is None else 'empty'}: a tokenizer needs its token texts")
    tokens = [text or f"[EMPTY_{i}]" for i, text in enumerate(tokens)]
    ids = {text: i for i, text in enumerate(tokens)}
    if len(ids) != len(tokens):
        second = next(i for i, text in enumerate(tokens) if ids[text] != i)
        text = tokens[second]
        raise keys.error("tokens", f"has {text[:80]!r} twice, as {second} and {ids[text]}: each text must differ")
    return tokens, ids


def _read_scores(keys: TokenizerKeys, count: int) -> list[float]:
    scores = keys.numbers("scores", "fiu", count)
    if scores is None:
        return [0.0] * count
    scores = scores.astype(np.float32)
    if np.isnan(scores).any():
        raise keys.error("scores", f"has a NaN at {int(np.isnan(scores).argmax())}: every score must be a number")
    return scores.tolist()


def _read_attributes(keys: TokenizerKeys, tokens: list[str]) -> list[int]:
    types = keys.numbers("token_type", "iu", len(tokens))
    if types is None:
        return [Attribute.NORMAL] * len(tokens)
    attributes = [ATTRIBUTE_BY_TYPE.get(kind, 0) for kind in types.tolist()]
    for i in np.flatnonzero(types == TokenType.BYTE):
        if not re.fullmatch("<0x[0-9A-Fa-f]{2}>", tokens[i]):
            raise keys.error(
                "token_type", f"says byte for token {i}, {tokens[i][:80]!r}; byte tokens read <0x00>..<0xFF>"
            )
    return attributes


def _read_merges(keys: TokenizerKeys, pre: PreTokenizer) -> list[tuple[str, str]]:
    merges = keys.strings("merges")
    if merges is None:
        if pre.name == "kimi-k2":
            return []
        raise keys.error("merges", "is missing: byte pair encoding needs the array of its merges")
    pairs = []
    for i, line in enumerate(merges):
        middle = line.find(" ", 1)
        if middle < 0:
            raise keys.error("merges", f"entry {i} is {line[:80]!r}; two parts with a space between would be right")
        pairs.append((line[:middle], line[middle + 1 :]))
    return pairs
