"""Which tokens are special, which end a generation, and which swallow white space. Called by `vocabulary.py`.

llama.cpp decides so by key or by the token's text (`llama_vocab::impl::load`); the texts are in
special_tokens.json.
"""

import json
from enum import IntEnum
from functools import cache
from importlib.resources import files

from realm_jax.gguf.pretokenizer import PreTokenizer
from realm_jax.gguf.tokenizer_keys import TokenizerKeys

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


ATTRIBUTE_BY_TYPE = {kind: getattr(Attribute, kind.name) for kind in TokenType}


@cache
def _special_texts() -> dict:
    return json.loads((files(__package__) / "special_tokens.json").read_text("utf-8"))


def read_special_ids(keys: TokenizerKeys, model: str, pre: PreTokenizer | None, count: int) -> dict[str, int]:
    """Ids by role (bos, eos, unk, fim_pad, ...) from the keys, else llama.cpp's defaults where these are tokens."""
    defaults = {"llama": {"bos": 1, "eos": 2, "unk": 0}, "gpt2": {"bos": 11, "eos": 11}}.get(model, {})
    ids = {role: id for role, id in defaults.items() if id < count}
    if pre is not None and not pre.default_bos:
        ids.pop("bos", None)
    roles = [(role, f"{role}_token_id") for role in ("bos", "eos", *_special_texts()["roles"])]
    roles += [("unk", "unknown_token_id"), ("pad", "padding_token_id")]
    roles += [("fim_pre", "prefix_token_id"), ("fim_suf", "suffix_token_id"), ("fim_mid", "middle_token_id")]
    for role, key in roles:
        id = keys.integer(key)
        if id is None or id in (-1, _NONE):
            continue
        if not 0 <= id < count:
            raise keys.error(key, f"is {id}, outside the vocabulary: 0 to {count - 1} would be right")
        ids[role] = id
    return ids


def mark_special(
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
    ending = ("fim_pad", "fim_rep", "fim_sep", "eos", "eot", "eom")
    end.update(special_ids[role] for role in ending if role in special_ids)
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


def mark_stripping(
    keys: TokenizerKeys, pre_tokenizer: PreTokenizer | None, ids: dict[str, int], attributes: list[int]
) -> None:
    """Mark the special tokens that swallow white space beside them; the file's names say which."""
    pre = pre_tokenizer.name if pre_tokenizer is not None else keys.text("pre") or ""
    name, architecture = (keys.metadata.get(f"general.{key}") for key in ("name", "architecture"))
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
