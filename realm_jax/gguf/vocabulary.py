"""The vocabulary and the tokenizer settings in a GGUF file's metadata, checked. Called by `tokenizer.py`.

Which tokens are special, which of them end a generation, and which defaults hold where a key is missing is
decided as in llama.cpp (`llama_vocab::impl::load`), by key or by the token's text.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np

from realm_jax.errors import GGUFError
from realm_jax.gguf.pretokenizer import PreTokenizer, known_pretokenizers

PREFIX = "tokenizer.ggml."
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
_NONE = 0xFFFFFFFF  # -1 as the file's uint32: llama.cpp then keeps its default


class TokenType(IntEnum):
    """Values of tokenizer.ggml.token_type."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class Attribute:
    """Bits of a token's attributes: its type, what its text made of it, and white space it swallows."""

    UNKNOWN, UNUSED, NORMAL, CONTROL, USER_DEFINED, BYTE, LSTRIP, RSTRIP = (1 << i for i in range(8))


_ATTRIBUTE_BY_TYPE = {kind: getattr(Attribute, kind.name) for kind in TokenType}


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
    reader = _Reader(metadata, source)
    model = _read_model(reader)
    pre_tokenizer = _choose_pre(reader, model, pre)
    tokens, ids = _read_tokens(reader)
    count = len(tokens)
    attributes = _read_attributes(reader, tokens)
    special_ids = _read_special_ids(reader, model, pre_tokenizer, count)
    eog_ids = _mark_special(tokens, ids, attributes, special_ids)
    _mark_stripping(reader, pre_tokenizer, ids, attributes)
    sentencepiece = model == "llama"
    add_bos = reader.flag("add_bos_token", sentencepiece or pre_tokenizer.add_bos)
    if pre_tokenizer is not None and pre_tokenizer.always_bos:
        add_bos = True
    add_eos = reader.flag("add_eos_token", False)
    for name, wanted in (("bos", add_bos), ("eos", add_eos)):
        if wanted and name not in special_ids:
            raise reader.error(f"add_{name}_token", f"is true, but no {PREFIX}{name}_token_id says which token that is")
    return Vocabulary(
        model=model,
        pre=pre_tokenizer,
        tokens=tokens,
        ids=ids,
        scores=_read_scores(reader, count),
        attributes=attributes,
        merges=[] if sentencepiece else _read_merges(reader, pre_tokenizer),
        special_ids=special_ids,
        eog_ids=eog_ids,
        add_bos=add_bos,
        add_eos=add_eos,
        add_space_prefix=reader.flag("add_space_prefix", sentencepiece),
    )


class _Reader:
    """Typed access to the tokenizer keys; every complaint names the file and the key."""

    def __init__(self, metadata: Mapping[str, Any], source: str):
        self.metadata = metadata
        self.source = source

    def error(self, key: str, problem: str) -> GGUFError:
        return GGUFError(f"{self.source}: {PREFIX}{key} {problem}")

    def text(self, key: str) -> str | None:
        value = self.metadata.get(PREFIX + key)
        if value is not None and not isinstance(value, str):
            raise self.error(key, f"must be a string, not {_kind(value)}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.metadata.get(PREFIX + key)
        if value is None:
            return default
        if not isinstance(value, bool | np.bool_):
            raise self.error(key, f"must be true or false, not {_kind(value)}")
        return bool(value)

    def integer(self, key: str) -> int | None:
        value = self.metadata.get(PREFIX + key)
        if value is None:
            return None
        if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer):
            raise self.error(key, f"must be a token id, not {_kind(value)}")
        return int(value)

    def strings(self, key: str) -> Sequence[str] | None:
        value = self.metadata.get(PREFIX + key)
        if value is None:
            return None
        if not isinstance(value, list | tuple) or set(map(type, value)) - {str}:
            raise self.error(key, f"must be an array of strings, not {_kind(value)}")
        return value

    def numbers(self, key: str, kinds: str, count: int) -> np.ndarray | None:
        value = self.metadata.get(PREFIX + key)
        if value is None:
            return None
        array = np.asarray(value) if isinstance(value, np.ndarray | list | tuple) else None
        if array is None or array.ndim != 1 or (array.size and array.dtype.kind not in kinds):
            wanted = "numbers" if "f" in kinds else "integers"
            raise self.error(key, f"must be an array of {wanted}, not {_kind(value)}")
        if len(array) != count:
            raise self.error(key, f"has {len(array)} entries for {count} tokens: one a token would be right")
        return array


def _kind(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype}"
    if isinstance(value, list | tuple):
        kinds = sorted({type(item).__name__ for item in value})
        return f"an array of {', '.join(kinds) or 'nothing'}"
    return f"{type(value).__name__} {str(value)[:40]!r}"


def _read_model(reader: _Reader) -> str:
    model = reader.text("model")
    supported = "'gpt2' (byte-level BPE) and 'llama' (SentencePiece type) are supported"
    if model is None or model in ("none", "no_vocab"):
        raise reader.error("model", f"is {'missing' if model is None else repr(model)}: no tokenizer here; {supported}")
    if model in _OTHER_MODELS:
        raise reader.error("model", f"is {model!r} ({_OTHER_MODELS[model]} tokenizer), not supported; {supported}")
    if model != "llama" and model not in _BPE_MODELS:
        raise reader.error("model", f"is {model[:80]!r}, which is unknown; {supported}")
    return model


def _choose_pre(reader: _Reader, model: str, chosen: str | None) -> PreTokenizer | None:
    """The pre-tokenizer that the caller chose or the file names; none for SentencePiece."""
    if model == "llama":
        if chosen is not None:
            raise reader.error("model", f"is 'llama', which has no pre-tokenizer: leave out pre={chosen!r}")
        return None
    in_file = "gemma4" if model == "gemma4" else reader.text("pre")
    name = chosen if chosen is not None else in_file or "default"
    known = known_pretokenizers()
    if name not in known:
        what = "the chosen pre-tokenizer" if chosen is not None else f"{PREFIX}pre"
        raise GGUFError(
            f"{reader.source}: {what} {name[:80]!r} is unknown; choose one with pre=NAME (Python) or --pre NAME "
            f"(command line). Known: {', '.join(known)}"
        )
    return PreTokenizer(name)


def _read_tokens(reader: _Reader) -> tuple[list[str], dict[str, int]]:
    tokens = reader.strings("tokens")
    if not tokens:
        raise reader.error(
            "tokens", f"is {'missing' if tokens is None else 'empty'}: a tokenizer needs its token texts"
        )
    tokens = [text or f"[EMPTY_{i}]" for i, text in enumerate(tokens)]
    ids = {text: i for i, text in enumerate(tokens)}
    if len(ids) != len(tokens):
        second = next(i for i, text in enumerate(tokens) if ids[text] != i)
        text = tokens[second]
        raise reader.error("tokens", f"has {text[:80]!r} twice, as {second} and {ids[text]}: each text must differ")
    return tokens, ids


def _read_scores(reader: _Reader, count: int) -> list[float]:
    scores = reader.numbers("scores", "fiu", count)
    if scores is None:
        return [0.0] * count
    scores = scores.astype(np.float32)
    if np.isnan(scores).any():
        raise reader.error("scores", f"has a NaN at {int(np.isnan(scores).argmax())}: every score must be a number")
    return scores.tolist()


def _read_attributes(reader: _Reader, tokens: list[str]) -> list[int]:
    types = reader.numbers("token_type", "iu", len(tokens))
    if types is None:
        return [Attribute.NORMAL] * len(tokens)
    attributes = [_ATTRIBUTE_BY_TYPE.get(kind, 0) for kind in types.tolist()]
    for i in np.flatnonzero(types == TokenType.BYTE):
        if not re.fullmatch("<0x[0-9A-Fa-f]{2}>", tokens[i]):
            raise reader.error(
                "token_type", f"says byte for token {i}, {tokens[i][:80]!r}; byte tokens read <0x00>..<0xFF>"
            )
    return attributes


def _read_merges(reader: _Reader, pre: PreTokenizer) -> list[tuple[str, str]]:
    merges = reader.strings("merges")
    if merges is None:
        if pre.name == "kimi-k2":
            return []
        raise reader.error("merges", "is missing: byte pair encoding needs the array of its merges")
    pairs = []
    for i, line in enumerate(merges):
        middle = line.find(" ", 1)
        if middle < 0:
            raise reader.error("merges", f"entry {i} is {line[:80]!r}; two parts with a space between would be right")
        pairs.append((line[:middle], line[middle + 1 :]))
    return pairs


@cache
def _special_texts() -> dict:
    return json.loads((files(__package__) / "special_tokens.json").read_text("utf-8"))


def _read_special_ids(reader: _Reader, model: str, pre: PreTokenizer | None, count: int) -> dict[str, int]:
    """Ids by role (bos, eos, unk, fim_pad, ...) from the keys, else llama.cpp's defaults where these are tokens."""
    defaults = {"llama": {"bos": 1, "eos": 2, "unk": 0}, "gpt2": {"bos": 11, "eos": 11}}.get(model, {})
    ids = {role: id for role, id in defaults.items() if id < count}
    if pre is not None and not pre.default_bos:
        ids.pop("bos", None)
    keys = [(role, f"{role}_token_id") for role in ("bos", "eos", *_special_texts()["roles"])]
    keys += [("unk", "unknown_token_id"), ("pad", "padding_token_id")]
    keys += [("fim_pre", "prefix_token_id"), ("fim_suf", "suffix_token_id"), ("fim_mid", "middle_token_id")]
    for role, key in keys:
        id = reader.integer(key)
        if id is None or id in (-1, _NONE):
            continue
        if not 0 <= id < count:
            raise reader.error(key, f"is {id}, outside the vocabulary: 0 to {count - 1} would be right")
        ids[role] = id
    return ids


def _mark_special(
    tokens: list[str], ids: dict[str, int], attributes: list[int], special_ids: dict[str, int]
) -> frozenset[int]:
    """Find special tokens by their text, as llama.cpp does, and return the ids that end a generation.

    Adds to `special_ids` the roles that no key gave and sets attribute bits. Where several texts could fill
    one role, the lowest id does (llama.cpp takes the first of its hash table).
    """
    texts = _special_texts()
    for role, candidates in texts["roles"].items():
        found = [ids[text] for text in candidates if text in ids]
        if role not in special_ids and found:
            special_ids[role] = min(found)
            attributes[min(found)] |= Attribute.CONTROL
    for id, text in enumerate(tokens):
        if attributes[id] & Attribute.CONTROL and "unused" in text.partition("\0")[0]:
            attributes[id] |= Attribute.UNUSED
    end = {ids[text] for text in texts["end"] if text in ids}
    for id in end:
        attributes[id] |= Attribute.CONTROL
    for text in texts["shown"]:
        if text in ids:
            attributes[ids[text]] = Attribute.USER_DEFINED
    roles = ("fim_pad", "fim_rep", "fim_sep", "eos", "eot", "eom")
    end.update(special_ids[role] for role in roles if role in special_ids)
    _keep_turn_marks(tokens, attributes, end)
    return frozenset(end)


def _keep_turn_marks(tokens: list[str], attributes: list[int], end: set[int]) -> None:
    """Take back "<|end|>" and "</s>" from `end` where the tokens beside them tell that they end no generation."""
    by_text = {tokens[id]: id for id in end}
    calls, closes = by_text.keys() & {"<|call|>", "<|calls|>"}, by_text.keys() & {"<|return|>", "<|flush|>"}
    if "<|end|>" in by_text and calls and closes:
        end.discard(by_text["<|end|>"])
        attributes[by_text["<|end|>"]] = Attribute.USER_DEFINED
    if "</s>" in by_text and by_text.keys() & {"<|tool_response>", "<|plamo:eos|>"}:
        end.discard(by_text["</s>"])
        attributes[by_text["</s>"]] = Attribute.NORMAL


def _mark_stripping(
    reader: _Reader, pre_tokenizer: PreTokenizer | None, ids: dict[str, int], attributes: list[int]
) -> None:
    """Mark the special tokens that swallow white space beside them; the file's names say which."""
    pre = pre_tokenizer.name if pre_tokenizer is not None else reader.text("pre") or ""
    name, architecture = (reader.metadata.get(f"general.{key}") for key in ("name", "architecture"))
    name = name.lower() if isinstance(name, str) else ""
    architecture = architecture if isinstance(architecture, str) else ""
    swallow_left = None
    masks_by_pre = any(part in pre for part in ("jina-v2-de", "jina-v2-es", "jina-v2-code"))
    if masks_by_pre or any(part in architecture for part in ("nomic-bert-moe", "jina-bert-v3")):
        swallow_left = "<mask>"
    elif "phi-3" in name or "phi3" in name:
        special = Attribute.CONTROL | Attribute.USER_DEFINED | Attribute.UNKNOWN
        for text, id in ids.items():
            if text == "</s>" or (attributes[id] & special and text not in ("<unk>", "<s>", "<|endoftext|>")):
                attributes[id] |= Attribute.RSTRIP
    elif "modern-bert" in name:
        swallow_left = "[MASK]"
    if swallow_left in ids:
        attributes[ids[swallow_left]] |= Attribute.LSTRIP
