"""The host's view of one row that is being decoded. Made by `decode.batch` and the engine."""

from collections.abc import Sequence

from realm_jax.decode.loop import Stop
from realm_jax.decode.settings import Settings
from realm_jax.decode.stop import RowText
from realm_jax.gguf.tokenizer import Tokenizer


class Row:
    """How far the host has read a row, its text, and why it ended.

    prompt_tokens: length of the prompt. read: tokens the host has seen, those of the prompt included. text: a
    `RowText`. reason: a `Stop`, None while the row goes on.
    """

    def __init__(self, prompt_tokens: int, settings: Settings, tokenizer: Tokenizer | None):
        self.prompt_tokens = self.read = prompt_tokens
        self.settings = settings
        self.text = RowText(tokenizer.stream(continues=True) if tokenizer else None, settings.stop)
        self.reason: Stop | None = None if settings.max_new_tokens else Stop.LENGTH

    def advance(self, tokens: Sequence[int], stop: int) -> str:
        """Read what the device has added; stop: why it ended the row, or RUNNING. Returns the new text."""
        pieces = [self.text.push(token) for token in tokens]
        self.read += len(tokens)
        if stop != Stop.RUNNING and not self.text.stopped:
            pieces.append(self.text.finish())
        if self.text.stopped:
            self.reason = Stop.STOP
        elif stop != Stop.RUNNING:
            self.reason = Stop(stop)
        return "".join(pieces)


def not_finite(name: str, tokens: int) -> str:
    """What is said of a row that ended as FAILED after so many tokens."""
    return f"{name}, after {tokens} tokens: the model's logits are not finite; its weights are broken, or overflow"
