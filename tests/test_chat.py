"""Chat templates: what well-known ones render, and what a template may not do."""

import re

import pytest

from realm_jax.errors import GGUFError, RequestError
from realm_jax.gguf import chat
from realm_jax.gguf.chat import render_chat

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set system = messages[0]['content'] %}"
    "{% else %}{% set rest = messages %}{% set system = false %}{% endif %}{% for message in rest %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system != false %}"
    "{% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = """{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim }}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
MISTRAL = """{{ bos_token }}{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '[INST] ' + message['content'] + ' [/INST]' }}
{%- elif message['role'] == 'assistant' %}
{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}
{% else %}
{{ raise_exception('Only user and assistant roles are supported!') }}
{% endif %}
{% endfor %}"""
ZEPHYR = """{% for message in messages %}
    {% if message.role not in ['user', 'system', 'assistant'] %}{% continue %}{% endif %}
<|{{ message.role }}|>
{{ message.content }}{{ eos_token }}
{% if loop.last and add_generation_prompt %}
<|assistant|>
{% endif %}
{% endfor %}"""
TALK = [
    {"role": "user", "content": "Hi "},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "<b>&é"},
]
SYSTEM = {"role": "system", "content": "Be brief."}
MARKS = {"bos_token": "<s>", "eos_token": "</s>"}


def test_chatml():
    assert render_chat(CHATML, [SYSTEM, TALK[0]]) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi <|im_end|>\n<|im_start|>assistant\n"
    )
    assert render_chat(CHATML, TALK[:1], add_generation_prompt=False) == "<|im_start|>user\nHi <|im_end|>\n"


def test_llama_2():
    assert render_chat(LLAMA2, [SYSTEM, *TALK], **MARKS) == (
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] Hello! </s><s>[INST] <b>&é [/INST]"
    )
    with pytest.raises(RequestError, match="Conversation roles must alternate"):
        render_chat(LLAMA2, [SYSTEM, SYSTEM], **MARKS)


def test_llama_3():
    assert render_chat(LLAMA3, TALK[:2], **MARKS) == (
        "<s><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        "Hello!<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_mistral_with_generation_marks_and_trimmed_blocks():
    assert render_chat(MISTRAL, TALK, **MARKS) == "<s>[INST] Hi  [/INST] Hello!</s>[INST] <b>&é [/INST]"
    with pytest.raises(RequestError, match="Only user and assistant roles are supported!"):
        render_chat(MISTRAL, [SYSTEM], **MARKS)


def test_zephyr_with_loop_controls_and_stripped_indentation():
    talk = [SYSTEM, {"role": "tool", "content": "x"}, TALK[0]]
    assert render_chat(ZEPHYR, talk, **MARKS) == "<|system|>\nBe brief.</s>\n<|user|>\nHi </s>\n<|assistant|>\n"


def test_tojson_writes_plain_json():
    tool = {"b": "<é & 'x'>", "a": [1, True, None]}
    assert render_chat("{{ tools | tojson }}", [], tools=tool) == '{"b": "<é & \'x\'>", "a": [1, true, null]}'
    indented = render_chat("{{ tools | tojson(indent=1, sort_keys=true, ensure_ascii=true) }}", [], tools={"é": 1})
    assert indented == '{\n "\\u00e9": 1\n}'


def test_dates_and_absent_tools():
    template = "{% if tools is none and documents is none %}{{ strftime_now('%Y') }}{% endif %}"
    assert re.fullmatch(r"20\d\d", render_chat(template, []))


def test_loops_know_their_length_and_neighbours():
    template = (
        "{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ loop.previtem.role if loop.previtem }}"
        "{{ loop.last }} {% endfor %}{% for k, v in {'a': 1}.items() if v %}{{ k ~ v }}{% else %}none{% endfor %}"
        "{% for x in nothing %}{% endfor %}"
    )
    assert render_chat(template, TALK[:2]) == "1/2False 2/2userTrue a1"


@pytest.mark.parametrize("template", [None, ""])
def test_without_a_template_there_is_a_clear_error(template):
    with pytest.raises(GGUFError, match="has no chat template"):
        render_chat(template, TALK)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("line\n{% for x in %}", "line 2"),
        ("{{ messages[0].content.nothing.more }}", "UndefinedError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{% include 'x' %}", "failed"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    ],
)
def test_templates_that_fail_say_so_in_one_line(template, message):
    with pytest.raises(GGUFError, match=message) as caught:
        render_chat(template, TALK)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'x' * 100000000000 }}",
        "{{ 100000000000 * [1] }}",
        "{{ 9 ** 99999999 }}",
        "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}",
        "{% set n = namespace(s='xxxxxxxx') %}{% for i in range(99) %}{% set n.s = n.s + n.s %}{% endfor %}",
        "{% set n = namespace(s='xxxxxxxx') %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
        "{% for i in range(9999) %}{{ 'x' * 100000 }}{% endfor %}",
        "x" * (chat.MAX_TEMPLATE + 1),
    ],
    ids=range(8),
)
def test_templates_are_bounded(template):
    with pytest.raises(GGUFError, match=r"tokenizer\.chat_template"):
        render_chat(template, TALK)


@pytest.mark.parametrize("messages", ["hi", [{"content": "x"}], ["x"], [{"role": 1}]])
def test_messages_are_checked(messages):
    with pytest.raises(RequestError, match="dict"):
        render_chat(CHATML, messages)
