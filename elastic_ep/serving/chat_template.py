"""Chat messages to one prompt text, by the checkpoint's own Jinja template, sandboxed."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from elastic_ep.core.errors import CheckpointError, InvalidInputError

FALLBACK = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
"""For a checkpoint that has a tokenizer but no chat template: one line per message, then the assistant's turn."""

_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class _GenerationBlock(Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's text for training; here it is only its content."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """One compiled template and the special tokens that it may name."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], *, is_fallback: bool = False):
        """Raises jinja2.TemplateError for a template that cannot be compiled."""
        self.is_fallback = is_fallback
        self._special_tokens = dict(special_tokens)
        self._template = _environment().from_string(source)

    @classmethod
    def fallback(cls) -> ChatTemplate:
        return cls(FALLBACK, {}, is_fallback=True)

    @classmethod
    def load(cls, folder: Path, tokenizer_config: Mapping[str, Any]) -> ChatTemplate | None:
        """From chat_template.jinja, else from the tokenizer's configuration; None if there is neither. Raises CheckpointError."""
        file = folder / "chat_template.jinja"
        source = file.read_text(encoding="utf-8") if file.is_file() else tokenizer_config.get("chat_template")
        if isinstance(source, list):
            named = {t.get("name"): t.get("template") for t in source if isinstance(t, dict)}
            source = named.get("default")
        if not isinstance(source, str):
            return None
        special = {}
        for name in _SPECIAL:
            token = tokenizer_config.get(name)
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                special[name] = token
        try:
            return cls(source, special)
        except jinja2.TemplateError as error:
            raise CheckpointError(f"the chat template in {folder} cannot be compiled: {error}; mend it or remove it") from None

    def render(self, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> str:
        """The prompt text, the assistant's turn opened. `options` are the template's own switches. Raises InvalidInputError."""
        fixed = {"messages": messages, "add_generation_prompt": True, "tools": None, "documents": None}
        try:
            return self._template.render(**{**options, **self._special_tokens, **fixed})
        except Exception as error:  # a template may raise anything: on messages it does not foresee that is the client's fault
            reason = " ".join(str(error).split())
            raise InvalidInputError(f"the model's chat template refuses these messages: {reason}; change their roles or order") from None


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda pattern: datetime.datetime.now().strftime(pattern)
    return environment


def _to_json(value: Any, indent: int | None = None, **_: Any) -> str:
    """As templates expect it: no HTML escapes, characters as they are."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
