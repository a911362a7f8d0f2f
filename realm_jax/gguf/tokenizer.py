"""Text to token ids and back, by the rules in a GGUF file's metadata. Called by models, evaluation and the CLI.

The ids are those of llama.cpp on any text. What belongs to one kind of tokenizer is in `bpe.py` and
`sentencepiece.py`, the file's tables in `vocabulary.py`.
"""

import operator
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from realm_jax.errors import GGUFError, RequestError
from realm_jax.gguf.bpe import BytePairEncoder
from realm_jax.gguf.incremental import IncrementalDecoder
from realm_jax.gguf.partition import SpecialTokens
from realm_jax.gguf.sentencepiece import SPACE, SentencePieceEncoder
from realm_jax.gguf.special_tokens import Attribute
from realm_jax.gguf.unicode import bytes_to_text, character_bytes, text_to_bytes
from realm_jax.gguf.vocabulary import Vocabulary, read_vocabulary

_HIDDEN = Attribute.CONTROL | Attribute.UNKNOWN


class Tokenizer:
    """The tokenizer of one GGUF file.

    vocab_size; bos_id and eos_id (None where there is none); eog_ids, the tokens that end a generation;
    add_bos and add_eos, what `encode` adds; model ("gpt2" or "llama"); pre, the pre-tokenizer's name ("" for
    SentencePiece); chat_template, the file's default template or None; chat_templates, all of them by name.
    """

    def __init__(self, vocabulary: Vocabulary, chat_templates: Mapping[str, str], source: str):
        self._vocabulary = vocabulary
        self._special = SpecialTokens(vocabulary)
        self._sentencepiece = vocabulary.model == "llama"
        if self._sentencepiece:
            unknown = vocabulary.special_ids.get("unk")
            self._encoder = SentencePieceEncoder(vocabulary.ids, vocabulary.scores, unknown, source)
        else:
            self._encoder = BytePairEncoder(vocabulary.ids, vocabulary.merges, vocabulary.pre)
        self.model = vocabulary.model
        self.pre = "" if vocabulary.pre is None else vocabulary.pre.name
        self.vocab_size = len(vocabulary.tokens)
        self.bos_id = vocabulary.special_ids.get("bos")
        self.eos_id = vocabulary.special_ids.get("eos")
        self.eog_ids = vocabulary.eog_ids
        self.add_bos = vocabulary.add_bos
        self.add_eos = vocabulary.add_eos
        self.chat_templates = dict(chat_templates)
        self.chat_template = self.chat_templates.get("default")

    @classmethod
    def from_metadata(
        cls, metadata: Mapping[str, Any], *, pre: str | None = None, source: str = "metadata"
    ) -> "Tokenizer":
        """Build the tokenizer that a file's metadata describes.

        metadata: key -> str, int, bool, numpy array or list of str. pre: use this pre-tokenizer instead of the
        one that `tokenizer.ggml.pre` names. source: the file, for messages. Raises GGUFError naming the key.
        """
        return cls(read_vocabulary(metadata, pre, source), _read_templates(metadata, source), source)

    def __repr__(self) -> str:
        kind = f"pre={self.pre!r}" if self.pre else "SentencePiece"
        return f"Tokenizer({self.model!r}, {kind}, vocab_size={self.vocab_size})"

    def encode(self, text: str, *, special: bool = True, parse_special: bool = False) -> list[int]:
        """Token ids of a text.

        special: add BOS and EOS where the file says so. parse_special: text that looks like a control token
        becomes that token. User-defined tokens are matched in either case. Raises RequestError for a text
        with a lone surrogate other than the U+DC80..U+DCFF that stand for bytes.
        """
        output = [self.bos_id] if special and self.add_bos else []
        prefix = self._vocabulary.add_space_prefix
        for piece in self._special.partition(text_to_bytes(text), parse_special):
            if isinstance(piece, int):
                output.append(piece)
            elif self._sentencepiece:
                output += self._encoder.encode(b" " + piece if prefix else piece)
            else:
                output += self._encoder.encode(bytes_to_text(piece))
            prefix = self._vocabulary.add_space_prefix and isinstance(piece, int)
        if special and self.add_eos:
            output.append(self.eos_id)
        return output

    def decode(self, ids: Iterable[int], *, skip_special: bool = True, continues: bool = False) -> str:
        """Text of token ids; bytes that are no UTF-8 become U+FFFD.

        skip_special: control and unknown tokens show nothing. continues: the ids go on from earlier text, so
        the space that a SentencePiece tokenizer puts before a text, taken off otherwise, stays. Nothing else
        is cleaned up: a byte-level text comes back as it was. Raises RequestError for an id that is no token.
        """
        stream = self.stream(skip_special=skip_special, continues=continues)
        return "".join([*map(stream.push, ids), stream.finish()])

    def stream(self, *, skip_special: bool = True, continues: bool = False) -> IncrementalDecoder:
        """A decoder that takes one id at a time; the arguments are those of `decode`."""
        return IncrementalDecoder(partial(self._render, skip_special=skip_special, continues=continues))

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """How each token looks by itself, special ones included; part of a character shows as U+FFFD."""
        return [self.token_bytes(id).decode("utf-8", "replace") for id in ids]

    def token_bytes(self, id: int) -> bytes:
        """The bytes that a token stands for; a special token's are its text, an unused one's none."""
        id = self._check(id)
        text, attributes = self._vocabulary.tokens[id], self._vocabulary.attributes[id]
        if attributes & (_HIDDEN | Attribute.USER_DEFINED):
            return text.encode("utf-8", "surrogateescape")
        if attributes & Attribute.NORMAL:
            return self._normal_bytes(text)
        if attributes & Attribute.BYTE:
            return bytes([int(text[3:5], 16)])
        return b""

    def _normal_bytes(self, text: str) -> bytes:
        if self._sentencepiece or self._vocabulary.pre.escape_spaces:
            return text.replace(SPACE, " ").encode("utf-8", "surrogateescape")
        table = character_bytes()
        try:
            return bytes(map(table.__getitem__, text))
        except KeyError:
            pass
        data = text.encode("utf-8", "surrogateescape")
        output = b""
        for character in bytes_to_text(data):
            shown = character.encode("utf-8", "surrogatepass")
            known = table.get(character)
            output += b"[UNK_BYTE_0x" + shown.hex().encode() + data + b"]" if known is None else bytes([known])
        return output

    def _render(self, id: int, at_start: bool, *, skip_special: bool, continues: bool) -> tuple[bytes, bool]:
        """A token's bytes within a text, and whether the text has not begun yet after it."""
        id = self._check(id)
        attributes = self._vocabulary.attributes[id]
        if skip_special and attributes & _HIDDEN:
            return b"", at_start
        data = self.token_bytes(id)
        added = at_start and self._sentencepiece and self._vocabulary.add_space_prefix and not continues
        if added and not attributes & (_HIDDEN | Attribute.USER_DEFINED):
            data = data.removeprefix(b" ")
        return data, False

    def _check(self, id: int) -> int:
        id = operator.index(id)
        if not 0 <= id < self.vocab_size:
            raise RequestError(f"token id {id} is outside the vocabulary: 0 to {self.vocab_size - 1} would be right")
        return id


def _read_templates(metadata: Mapping[str, Any], source: str) -> dict[str, str]:
    """Chat templates by name: `tokenizer.chat_template` is "default", `tokenizer.chat_template.NAME` is NAME."""
    key = "tokenizer.chat_template"
    templates = {}
    for name, value in metadata.items():
        if name == key or name.startswith(key + "."):
            if not isinstance(value, str):
                raise GGUFError(f"{source}: {name!r} must be a string, not {type(value).__name__}")
            templates[name[len(key) + 1 :] or "default"] = value
    return templates
