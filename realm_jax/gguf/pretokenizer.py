"""Cutting a text into words before byte pair encoding, by the rules that `tokenizer.ggml.pre` names.

The rules are data (pretokenizers.json); this module runs them. Called by `bpe.py`. The words are those of
llama.cpp, which matches regular expressions with \\p{...} on a text where each character above ASCII is
replaced by one that stands for its class; so does this module, with its own tables and Python's `re`.
"""

import json
import re
from collections.abc import Callable
from functools import cache
from importlib.resources import files
from itertools import pairwise

from realm_jax.gguf.unicode import CLASS_CHARACTERS, ascii_spaces, collapse

Step = Callable[[str, str, str, list[int]], list[int]]  # (text, classes, spaced, cuts) -> finer cuts
_SPACES = " \t\n\v\f\r"


@cache
def _data() -> dict:
    return json.loads((files(__package__) / "pretokenizers.json").read_text("utf-8"))


def known_pretokenizers() -> list[str]:
    """Every name that `tokenizer.ggml.pre` may have."""
    return sorted(_data()["names"])


class PreTokenizer:
    """One way of cutting text into words, and the tokenizer settings that come with its name.

    add_bos, ignore_merges, default_bos, escape_spaces, byte_level, whole_newlines: see pretokenizers.json.
    """

    def __init__(self, name: str):
        settings = _data()["names"][name]
        self.name = name
        self.ignore_merges: bool = settings.get("ignore_merges", False)
        self.add_bos: bool = bool(settings.get("add_bos", False))
        self.always_bos: bool = settings.get("add_bos") == "always"
        self.default_bos: bool = settings.get("default_bos", True)
        self.escape_spaces: bool = settings.get("escape_spaces", False)
        self.byte_level: bool = settings.get("byte_level", True)
        self.whole_newlines: bool = settings.get("whole_newlines", False)
        self._steps = _steps(settings["split"])

    def split(self, text: str) -> list[str]:
        """The words of a text, in order; together they are the text."""
        classes, spaced = collapse(text), ascii_spaces(text)
        cuts = [0, len(text)]
        for step in self._steps:
            cuts = step(text, classes, spaced, cuts)
        return [text[start:end] for start, end in pairwise(cuts)]


@cache
def _steps(split: str) -> tuple[Step, ...]:
    rules = {"digit_groups": _digit_groups, "digit_cuts": _digit_cuts, "trailing_space": _trailing_space}
    return tuple(
        _regex_step(step) if isinstance(step, str) else rules[step["custom"]] for step in _data()["splits"][split]
    )


def _regex_step(expression: str) -> Step:
    """Cut before and after each match. Text between matches stays whole."""
    on_classes = "\\p{" in expression
    pattern = re.compile(_expand_classes(expression), re.ASCII)

    def step(text: str, classes: str, spaced: str, cuts: list[int]) -> list[int]:
        view = classes if on_classes else spaced
        finer = [0]
        for start, end in pairwise(cuts):
            for match in pattern.finditer(view, start, end):
                for cut in match.span():
                    if cut > finer[-1]:
                        finer.append(cut)
            if end > finer[-1]:
                finer.append(end)
        return finer

    return step


def _expand_classes(expression: str) -> str:
    """Replace \\p{X} by the characters that stand for X, in brackets unless it stands inside some."""
    parts = re.split(r"\\p\{(\w+)\}", expression)
    inside = False
    for i, part in enumerate(parts):
        if i % 2:
            characters = CLASS_CHARACTERS[part]
            parts[i] = characters if inside else f"[{characters}]"
        else:
            for bracket in re.findall(r"\\.|[\[\]]", part, re.DOTALL):
                inside = {"[": True, "]": False}.get(bracket, inside)
    return "".join(parts)


def _digit_groups(text: str, classes: str, spaced: str, cuts: list[int]) -> list[int]:
    """Cut runs of numbers into threes counted from their end; what stands before a run stays with its first group."""
    inner = set(cuts)
    for start, end in pairwise(cuts):
        for run in _NUMBERS.finditer(classes, start, end):
            inner.update(range(run.end(), run.start(), -3))
    return sorted(inner)


def _digit_cuts(text: str, classes: str, spaced: str, cuts: list[int]) -> list[int]:
    """Cut wherever a positive multiple of three digits 0-9 is left to the end of their run."""
    inner = set(cuts)
    for start, end in pairwise(cuts):
        for run in _DIGITS.finditer(text, start, end):
            inner.update(range(run.end() - 3, run.start() - 1, -3))
    return sorted(inner)


def _trailing_space(text: str, classes: str, spaced: str, cuts: list[int]) -> list[int]:
    """Cut off the white space at the end of each piece."""
    inner = set(cuts)
    for start, end in pairwise(cuts):
        inner.add(start + len(spaced[start:end].rstrip(_SPACES)))
    return sorted(inner)


_DIGITS = re.compile("[0-9]+")
_NUMBERS = re.compile(f"[{CLASS_CHARACTERS['N']}]+")
