"""Chat templates: the Jinja text in `tokenizer.chat_template` turns a list of messages into one prompt.

Called by the command line and by anyone who talks to an instruction-tuned model. The environment is the one
that Hugging Face `transformers` gives to templates. The text comes from a file that may not be trusted: it
runs in Jinja's immutable sandbox, and its loops, its strings and its output are bounded.
"""

import json
from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from realm_jax.errors import GGUFError, RealmError, RequestError
from realm_jax.gguf.tokenizer import Tokenizer

MAX_TEMPLATE = 1 << 20  # characters of a template
MAX_TEXT = 1 << 24  # characters of the output, and of any string made on the way
MAX_ITERATIONS = 1 << 20  # over all loops of one rendering


def render_chat(
    template: str | None,
    messages: list[dict[str, Any]],
    *,
    add_generation_prompt: bool = True,
    bos_token: str = "",
    eos_token: str = "",
    **extra: Any,
) -> str:
    """The prompt that a chat template makes of messages.

    messages: dicts with "role" and whatever the template asks for, mostly "content". add_generation_prompt:
    end with the opening of the assistant's turn. extra: more names for the template, such as tools.
    Encode the prompt with parse_special=True. Raises RequestError where the template refuses the messages,
    GGUFError where there is no template or it does not work.
    """
    if not template:
        raise GGUFError("the model has no chat template (tokenizer.chat_template): give it a plain prompt instead")
    if len(template) > MAX_TEMPLATE:
        raise GGUFError(f"tokenizer.chat_template has {len(template)} characters; up to {MAX_TEMPLATE} are accepted")
    _check_messages(messages)
    names = {
        "tools": None,
        "documents": None,
        "messages": messages,
        "add_generation_prompt": add_generation_prompt,
        "bos_token": bos_token,
        "eos_token": eos_token,
        **extra,
    }
    try:
        chunks = _Environment().from_string(template).generate(names)
        return "".join(_bounded(chunks))
    except RealmError:
        raise
    except jinja2.TemplateSyntaxError as error:
        raise GGUFError(f"tokenizer.chat_template, line {error.lineno}: {_one_line(error)}") from None
    except Exception as error:
        # Templates compute with the messages, so anything can go wrong in them.
        raise GGUFError(f"tokenizer.chat_template failed: {type(error).__name__}: {_one_line(error)}") from None


def chat_text(
    tokenizer: Tokenizer, messages: list[dict[str, Any]], *, add_generation_prompt: bool = True, **extra: Any
) -> str:
    """`render_chat` with a tokenizer's own template; its BOS, if any, is left to the tokenizer where that adds one."""
    bos, eos = ("" if i is None else tokenizer.pieces([i])[0] for i in (tokenizer.bos_id, tokenizer.eos_id))
    text = render_chat(
        tokenizer.chat_template,
        messages,
        add_generation_prompt=add_generation_prompt,
        bos_token=bos,
        eos_token=eos,
        **extra,
    )
    return text.removeprefix(bos) if tokenizer.add_bos else text


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, list | tuple):
        raise RequestError(f"messages must be a list of dicts, not {type(messages).__name__}")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise RequestError(f'message {i} must be a dict with a "role" such as "user" and its "content"')


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:500] or "no reason given"


class _Environment(ImmutableSandboxedEnvironment):
    """What a template may use, for one rendering: it counts the loops as they run."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self):
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        self.filters["tojson"] = _tojson
        self.filters["_counted"] = self._counted
        self.filters["_joined"] = _joined
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self._iterations = 0

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _Bounds().visit(super()._parse(source, name, filename))

    def _counted(self, items: Iterable) -> Iterator:
        for item in items:
            self._iterations += 1
            if self._iterations > MAX_ITERATIONS:
                raise GGUFError(f"tokenizer.chat_template loops more than {MAX_ITERATIONS} times")
            yield item

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and not (abs(left) <= 1 << 64 and abs(right) <= 64):
            raise GGUFError("tokenizer.chat_template computes a power beyond the largest accepted, (2 ** 64) ** 64")
        if operator == "*":
            items, times = (left, right) if hasattr(left, "__len__") else (right, left)
            if hasattr(items, "__len__") and len(items) * times > MAX_TEXT:
                raise _too_long()
        result = super().call_binop(context, operator, left, right)
        if hasattr(result, "__len__") and len(result) > MAX_TEXT:
            raise _too_long()
        return result


class _Bounds(NodeTransformer):
    """Routes every loop and every `~` of a template through the filters that bound them."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, "_counted", [], [], None, None, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        parts = nodes.List(node.nodes, lineno=node.lineno)
        return nodes.Filter(parts, "_joined", [], [], None, None, lineno=node.lineno)


class _Generation(Extension):
    """{% generation %}...{% endgeneration %} marks the assistant's words for training; here it shows them only."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's protocol)

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _bounded(chunks: Iterable[str]) -> Iterator[str]:
    length = 0
    for chunk in chunks:
        length += len(chunk)
        if length > MAX_TEXT:
            raise _too_long()
        yield chunk


def _joined(parts: list[Any]) -> str:
    return "".join(_bounded(str(part) for part in parts))


def _too_long() -> GGUFError:
    return GGUFError(f"tokenizer.chat_template makes a text of more than {MAX_TEXT} characters")


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise RequestError(f"the chat template refuses the messages: {_one_line(Exception(message))}")
