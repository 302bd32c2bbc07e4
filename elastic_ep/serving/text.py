"""Text on both sides of the model: prompts to ids, ids to text one token at a time, stop strings that span tokens.

Reads a checkpoint's `tokenizer.json` with the `tokenizers` library alone: the controller stays without torch and starts in milliseconds.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from elastic_ep.core.errors import CheckpointError, InvalidInputError
from elastic_ep.serving.chat_template import ChatTemplate

if TYPE_CHECKING:
    import tokenizers

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_level_alphabet() -> dict[str, int]:
    """Character -> byte of the byte-level BPE alphabet: printable Latin-1 stands for itself, the other bytes in order for U+0100 up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


_ALPHABET = _byte_level_alphabet()


class TokenLabel(NamedTuple):
    """A token as logprobs name it. `data` is its exact bytes, also where they are not a whole character."""

    text: str
    data: bytes


class Tokenizer:
    """What a checkpoint without one has: prompts are token ids, the text of every answer is empty. TextTokenizer does better."""

    has_text = False

    def __init__(self, eos_ids: frozenset[int] = frozenset()):
        self.eos_ids = eos_ids

    def encode(self, text: str) -> list[int]:
        raise InvalidInputError("this checkpoint has no tokenizer: send the prompt as a list of token ids to /v1/completions")

    def render_chat(self, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> str:
        return self.encode("")  # type: ignore[return-value]  # raises

    def encode_chat(self, text: str) -> list[int]:
        return self.encode(text)

    def piece(self, token: int) -> bytes:
        return b""

    def opening_piece(self, token: int) -> bytes:
        return b""

    def label(self, token: int) -> TokenLabel:
        return TokenLabel(f"token_id:{token}", b"")


class TextTokenizer(Tokenizer):
    """A checkpoint's tokenizer and chat template.

    A token's *piece* is the bytes it adds to a text that already has something before it; pieces of consecutive tokens, joined and
    decoded as UTF-8, are the text. So each token costs a dictionary look-up, whatever the tokenizer's decoder does.
    """

    has_text = True

    def __init__(self, tokenizer: tokenizers.Tokenizer, chat: ChatTemplate | None = None, eos_ids: frozenset[int] = frozenset()):
        super().__init__(eos_ids)
        self._tokenizer = tokenizer
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._chat = chat if chat is not None else ChatTemplate.fallback()
        self._pieces: dict[int, bytes] = {}
        self._labels: dict[int, TokenLabel] = {}
        self._anchor = self._find_anchor()

    def encode(self, text: str) -> list[int]:
        """Ids of a prompt, with the tokenizer's own beginning-of-sequence token if it adds one.

        Lets other threads run meanwhile: the library's `encode` does not, its batch call does.
        """
        return self._tokenizer.encode_batch([text])[0].ids

    def render_chat(self, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> str:
        """Raises InvalidInputError where the template refuses the messages."""
        return self._chat.render(messages, options)

    def encode_chat(self, text: str) -> list[int]:
        """Ids of a rendered chat: a template writes its special tokens itself, the fallback does not."""
        return self._tokenizer.encode_batch([text], add_special_tokens=self._chat.is_fallback)[0].ids

    def piece(self, token: int) -> bytes:
        """Bytes that `token` adds to the text; special tokens add none."""
        piece = self._pieces.get(token)
        if piece is None:
            piece = self._pieces[token] = self._bytes_of(token, skip_special=True, anchor=self._anchor)
        return piece

    def opening_piece(self, token: int) -> bytes:
        """As `piece` for a token that begins a text: a word's leading space mark is no space here where the tokenizer says so."""
        return self._bytes_of(token, skip_special=True, anchor=())

    def label(self, token: int) -> TokenLabel:
        label = self._labels.get(token)
        if label is None:
            data = self._bytes_of(token, skip_special=False, anchor=self._anchor)
            try:
                text = data.decode()
            except UnicodeDecodeError:
                text = "bytes:" + "".join(f"\\x{b:02x}" for b in data)
            label = self._labels[token] = TokenLabel(text, data)
        return label

    def _bytes_of(self, token: int, *, skip_special: bool, anchor: tuple[int, ...]) -> bytes:
        decode = self._tokenizer.decode
        before = decode([*anchor], skip_special_tokens=skip_special) if anchor else ""
        text = decode([*anchor, token], skip_special_tokens=skip_special)[len(before) :]
        if "\ufffd" not in text:
            return text.encode()
        name = self._tokenizer.id_to_token(token) or ""
        if match := _BYTE_TOKEN.fullmatch(name):
            return bytes((int(match[1], 16),))
        if all(c in _ALPHABET for c in name):
            return bytes(_ALPHABET[c] for c in name)
        return text.encode()

    def _find_anchor(self) -> tuple[int, ...]:
        """An ordinary word token (lowest id) to decode others after."""
        for token in range(self._tokenizer.get_vocab_size()):
            if self._tokenizer.decode([token], skip_special_tokens=True).isalnum():
                return (token,)
        return ()


class StopMatcher:
    """Finds the first stop string to be completed in a text that comes in parts; holds back what may yet become one.

    The parts' boundaries make no difference: of several stop strings the one that ends first counts, the longest if they end together.
    """

    def __init__(self, stops: Sequence[str]):
        self._stops = [(s, _borders(s)) for s in stops]
        self._matched = [0] * len(stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Takes more text; returns (text that may be given out, whether a stop string was met just behind it)."""
        if not self._stops:
            return text, False
        held = self._held + text
        for position in range(len(self._held), len(held)):
            char, longest = held[position], 0
            for i, (stop, borders) in enumerate(self._stops):
                state = self._matched[i]
                while state and stop[state] != char:
                    state = borders[state]
                state += stop[state] == char
                if state == len(stop):
                    longest = max(longest, state)
                    state = 0
                self._matched[i] = state
            if longest:
                self._held = ""
                return held[: position + 1 - longest], True
        keep = max(self._matched)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep], False

    def flush(self) -> str:
        """What is held back, at the end of the text."""
        held, self._held = self._held, ""
        return held


def _borders(stop: str) -> list[int]:
    """borders[k]: length of the longest proper prefix of stop[:k] that is also its suffix (Knuth-Morris-Pratt)."""
    borders = [0, 0]
    for i in range(1, len(stop)):
        k = borders[i]
        while k and stop[k] != stop[i]:
            k = borders[k]
        borders.append(k + 1 if stop[k] == stop[i] else 0)
    return borders


class TextBuilder:
    """The text of one choice as its tokens come: whole characters only, cut before the first stop string."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = (), *, opens_text: bool = False):
        """`opens_text`: the answer is a text of its own (chat), not the continuation of the prompt's."""
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._matcher = StopMatcher(stops) if stops else None
        self._opening = opens_text
        self.stopped = False

    def push(self, token: int) -> str:
        """Takes the next token; returns the text that is now certain. After `stopped` nothing more may be pushed."""
        piece = self._tokenizer.piece(token)
        if self._opening and piece:  # special tokens before the first word open nothing
            self._opening = False
            piece = self._tokenizer.opening_piece(token)
        text = self._decoder.decode(piece)
        if self._matcher is None or not text:
            return text
        text, self.stopped = self._matcher.push(text)
        return text

    def finish(self) -> str:
        """The rest: held text, and one replacement character for bytes that never became a whole one."""
        if self.stopped:
            return ""
        text = self._decoder.decode(b"", final=True)
        if self._matcher is None:
            return text
        text, self.stopped = self._matcher.push(text)
        return text if self.stopped else text + self._matcher.flush()


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder; one without text if it has none. Raises CheckpointError naming a file that cannot be read."""
    special = _read_json(folder / "tokenizer_config.json")
    tokenizer = _load_backend(folder)
    eos_ids = _eos_ids(folder)
    if tokenizer is None:
        return Tokenizer(eos_ids)
    chat = ChatTemplate.load(folder, special)
    if not eos_ids:
        eos = tokenizer.token_to_id(str(_content(special.get("eos_token")) or ""))
        eos_ids = frozenset() if eos is None else frozenset((eos,))
    return TextTokenizer(tokenizer, chat, eos_ids)


def _load_backend(folder: Path) -> tokenizers.Tokenizer | None:
    import tokenizers

    file = folder / "tokenizer.json"
    if file.is_file():
        try:
            return tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises plain Exception
            raise CheckpointError(f"{file} cannot be read as a tokenizer: {_one_line(error)}; copy it again from its source") from None
    if not any((folder / name).is_file() for name in ("tokenizer.model", "vocab.json", "spiece.model", "tekken.json")):
        return None
    from transformers import AutoTokenizer  # seconds, and it imports torch: only for checkpoints that need a conversion

    try:
        return AutoTokenizer.from_pretrained(folder).backend_tokenizer
    except Exception as error:
        raise CheckpointError(f"the tokenizer in {folder} cannot be converted: {_one_line(error)}; save it as tokenizer.json") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _eos_ids(folder: Path) -> frozenset[int]:
    """End-of-sequence ids as `generate()` takes them: generation_config.json, else config.json."""
    for name in ("generation_config.json", "config.json"):
        eos = _read_json(folder / name).get("eos_token_id")
        ids = eos if isinstance(eos, list) else [eos]
        if found := frozenset(i for i in ids if isinstance(i, int)):
            return found
    return frozenset()


def _content(token: Any) -> str | None:
    """A special token's text, written plainly or as an added-token object."""
    return token.get("content") if isinstance(token, dict) else token


def _read_json(file: Path) -> dict[str, Any]:
    """An optional JSON object; {} if the file is not there. Raises CheckpointError."""
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file} is not valid JSON: {error}; copy it again from its source") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} holds no JSON object; copy it again from its source")
    return value
