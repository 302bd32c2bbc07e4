"""Messages to prompt text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from elastic_ep.core.errors import CheckpointError, InvalidInputError
from elastic_ep.serving.chat_template import ChatTemplate
from elastic_ep.serving.text import TextTokenizer, load_tokenizer
from tests.serving.fakes import byte_level, sentencepiece

MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "<hi> & 你"}]
CHATML = """{{ bos_token }}
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' }}
    {%- generation %}{{ message.content }}{% endgeneration -%}
    {{ '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% if not think %}{{ '<think></think>' }}{% endif %}{% endif %}"""


def test_chatml() -> None:
    template = ChatTemplate(CHATML, {"bos_token": "<s>"})
    expected = "<s><|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\n<hi> & 你<|im_end|>\n<|im_start|>assistant\n<think></think>"
    assert template.render(MESSAGES, {}) == expected
    assert template.render(MESSAGES, {"think": True}) == expected.removesuffix("<think></think>")


def test_templates_see_what_they_expect() -> None:
    template = ChatTemplate(
        "{{ tools is none }} {{ {'a': '<é>'} | tojson }} {% for m in messages %}{% if loop.index == 2 %}{% break %}{% endif %}x{% endfor %}"
        "{{ strftime_now('%Y') | length }}",
        {},
    )
    assert template.render(MESSAGES, {}) == 'True {"a": "<é>"} x4'


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ raise_exception('roles must\nalternate') }}", "roles must alternate"),
        ("{{ messages[0].content + 1 }}", "can only concatenate str"),
        ("{{ messages.append(1) }}", "is not safely callable|unsafe"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
    ],
)
def test_a_refusing_template_is_the_clients_fault(source: str, reason: str) -> None:
    with pytest.raises(InvalidInputError, match=f"(?i)chat template refuses these messages: .*({reason})"):
        ChatTemplate(source, {}).render(MESSAGES, {})


def test_fallback_is_one_line_per_message() -> None:
    assert ChatTemplate.fallback().render(MESSAGES, {}) == "system: be brief\nuser: <hi> & 你\nassistant:"


def test_switches_cannot_replace_the_messages() -> None:
    assert (
        ChatTemplate("{{ messages | length }}{{ eos_token }}", {"eos_token": "e"}).render(MESSAGES, {"messages": [], "eos_token": ""})
        == "2e"
    )


@pytest.mark.parametrize("where", ["jinja", "config", "named"])
def test_where_the_template_comes_from(tmp_path: Path, where: str) -> None:
    byte_level().save(str(tmp_path / "tokenizer.json"))
    source = "{{ bos_token }}{{ messages[0].role }}"
    config: dict[str, object] = {"bos_token": {"content": "B"}, "chat_template": "unused"}
    if where == "jinja":
        (tmp_path / "chat_template.jinja").write_text(source)
    else:
        config["chat_template"] = (
            source if where == "config" else [{"name": "rag", "template": "x"}, {"name": "default", "template": source}]
        )
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(tmp_path).render_chat(MESSAGES, {}) == "Bsystem"


def test_a_broken_template_is_the_checkpoints_fault(tmp_path: Path) -> None:
    byte_level().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(CheckpointError, match=r"chat template in .* cannot be compiled"):
        load_tokenizer(tmp_path)


def test_a_template_writes_its_own_special_tokens() -> None:
    with_template = TextTokenizer(sentencepiece(), ChatTemplate("<s>{{ messages[0].content }}", {}))
    assert with_template.encode_chat(with_template.render_chat([{"role": "user", "content": "he"}], {})).count(1) == 1
    fallback = TextTokenizer(sentencepiece())
    assert fallback.encode_chat("he")[0] == 1
