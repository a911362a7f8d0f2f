"""The bundled models' vocabulary: a byte-level BPE trained on the generated text, and its GGUF metadata.

Used by `train_tiny.py`. The pre-tokenizer is GPT-2's, so `tokenizer.ggml.pre` is truthfully "gpt-2".
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from realm_jax.errors import RealmError
from realm_jax.gguf.types import Field, ValueType
from tiny_text import CHATML_TEMPLATE

END_OF_TEXT, TURN_START, TURN_END = SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_NORMAL, _CONTROL = 1, 3  # token types of the GGUF vocabulary


@dataclass(frozen=True)
class Vocabulary:
    """Tokens in id order (bytes written in GPT-2's byte-to-character alphabet) and merges in rank order.

    The special tokens come first: `<|endoftext|>` is id 0 and stands before every document.
    """

    tokens: tuple[str, ...]
    merges: tuple[tuple[str, str], ...]

    def encoder(self) -> Tokenizer:
        """The `tokenizers` object that encodes with this vocabulary, special tokens recognised in the text."""
        ids = {token: i for i, token in enumerate(self.tokens)}
        return _byte_level(models.BPE(vocab=ids, merges=list(self.merges)))

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without the leading `<|endoftext|>`."""
        return [encoding.ids for encoding in self.encoder().encode_batch(list(texts))]

    def gguf_fields(self) -> dict[str, Field]:
        """The `tokenizer.*` metadata of a GGUF file."""
        types = [_CONTROL if token in SPECIAL_TOKENS else _NORMAL for token in self.tokens]
        ids = {token: self.tokens.index(token) for token in SPECIAL_TOKENS}
        return {
            "tokenizer.ggml.model": Field(ValueType.STRING, "gpt2"),
            "tokenizer.ggml.pre": Field(ValueType.STRING, "gpt-2"),
            "tokenizer.ggml.tokens": Field(ValueType.ARRAY, list(self.tokens), ValueType.STRING),
            "tokenizer.ggml.token_type": Field(ValueType.ARRAY, np.array(types, np.int32), ValueType.INT32),
            "tokenizer.ggml.merges": Field(ValueType.ARRAY, [" ".join(pair) for pair in self.merges], ValueType.STRING),
            "tokenizer.ggml.bos_token_id": Field(ValueType.UINT32, ids[END_OF_TEXT]),
            "tokenizer.ggml.eos_token_id": Field(ValueType.UINT32, ids[END_OF_TEXT]),
            "tokenizer.ggml.eot_token_id": Field(ValueType.UINT32, ids[TURN_END]),
            "tokenizer.ggml.padding_token_id": Field(ValueType.UINT32, ids[END_OF_TEXT]),
            "tokenizer.ggml.add_bos_token": Field(ValueType.BOOL, True),
            "tokenizer.ggml.add_eos_token": Field(ValueType.BOOL, False),
            "tokenizer.chat_template": Field(ValueType.STRING, CHATML_TEMPLATE),
        }


def train_vocabulary(texts: Sequence[str], size: int) -> Vocabulary:
    """A vocabulary of exactly `size` tokens from `texts`; equal arguments give an equal vocabulary.

    Numbers of several digits stay one token a digit, so that arithmetic can be learnt digit by digit.
    Raises RealmError where `size` is too small for 256 bytes and the special tokens, or too large for the text.
    """
    smallest = 256 + len(SPECIAL_TOKENS)
    if size < smallest:
        raise RealmError(f"vocabulary of {size} tokens: want at least {smallest}, the bytes and the special tokens")
    tokenizer = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        min_frequency=2,
        show_progress=False,
    )
    separators = re.compile("|".join(map(re.escape, SPECIAL_TOKENS)))
    pieces = (piece for text in texts for piece in separators.split(re.sub(r"(\d)\d+", r"\1", text)))
    tokenizer.train_from_iterator(pieces, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = tuple(sorted(model["vocab"], key=model["vocab"].get))
    if len(tokens) != size:
        raise RealmError(f"vocabulary of {size} tokens: the text gives only {len(tokens)}; ask for fewer")
    return Vocabulary(tokens, tuple((left, right) for left, right in model["merges"]))


def _byte_level(model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer
