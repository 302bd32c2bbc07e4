"""Ids to text, token by token."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from elastic_ep.core.errors import CheckpointError, InvalidInputError
from elastic_ep.serving.text import StopMatcher, TextBuilder, TextTokenizer, Tokenizer, load_tokenizer
from tests.serving.fakes import EOS, byte_level, sentencepiece

TEXTS = ["hello world", "你好，世界 🎉", "naïve émoji 🎊🎊", "a\n\n  b\t", "<think>yes</think>", "🏳️‍🌈 👩‍👩‍👧", "\ufffd kept"]


def built(tokenizer: Tokenizer, ids: list[int], **kwargs: object) -> list[str]:
    builder = TextBuilder(tokenizer, **kwargs)  # type: ignore[arg-type]
    return [*map(builder.push, ids), builder.finish()]


@pytest.mark.parametrize("text", TEXTS)
def test_parts_join_to_the_text_and_hold_only_whole_characters(text: str) -> None:
    inner = byte_level()
    ids = inner.encode(text).ids
    parts = built(TextTokenizer(inner), ids)
    assert "".join(parts) == text
    for part in parts:
        part.encode()
        if "\ufffd" not in text:
            assert "\ufffd" not in part


@pytest.mark.parametrize("text", [t for t in TEXTS if "<" not in t])
def test_byte_fallback_text(text: str) -> None:
    inner = sentencepiece()
    ids = inner.encode(text, add_special_tokens=False).ids
    tokenizer = TextTokenizer(inner)
    chat = built(tokenizer, ids, opens_text=True)
    assert "".join(chat) == inner.decode(ids)
    assert all("\ufffd" not in part for part in chat) or "\ufffd" in text
    assert "".join(built(tokenizer, ids)) == " " + inner.decode(ids)  # a completion goes on with a word: its space is part of it


def test_any_ids_give_what_the_whole_decoding_gives() -> None:
    """Also bytes that form no character, with the same replacement characters."""
    inner = byte_level()
    tokenizer = TextTokenizer(inner)
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    for _ in range(300):
        ids = [rng.randrange(inner.get_vocab_size()) for _ in range(rng.randrange(1, 40))]
        assert "".join(built(tokenizer, ids)) == inner.decode(ids, skip_special_tokens=True)


def test_an_unfinished_character_is_flushed_once_at_the_end() -> None:
    inner = byte_level()
    ids = inner.encode("☃").ids  # not in the corpus: one token per byte
    assert len(ids) == 3
    assert built(TextTokenizer(inner), ids[:2]) == ["", "", "\ufffd"]
    assert built(TextTokenizer(inner), ids) == ["", "", "☃", ""]


def test_special_tokens_are_no_text_but_have_labels() -> None:
    inner = byte_level()
    tokenizer = TextTokenizer(inner)
    eos, think = inner.token_to_id(EOS), inner.token_to_id("<think>")
    assert "".join(built(tokenizer, [eos, think])) == "<think>"
    assert tokenizer.label(eos) == (EOS, EOS.encode())


def test_labels_of_partial_characters_name_their_bytes() -> None:
    inner = byte_level()
    first = inner.encode("☃").ids[0]
    assert TextTokenizer(inner).label(first) == ("bytes:\\xe2", b"\xe2")
    spm = sentencepiece()
    assert TextTokenizer(spm).label(spm.token_to_id("<0xE2>")) == ("bytes:\\xe2", b"\xe2")
    assert TextTokenizer(spm).label(spm.token_to_id("▁w")) == (" w", b" w")


def test_ids_past_the_tokenizer_are_no_text() -> None:
    inner = byte_level()
    assert built(TextTokenizer(inner), [inner.get_vocab_size() + 5]) == ["", ""]


def by_brute_force(text: str, stops: list[str]) -> tuple[str, bool]:
    for end in range(1, len(text) + 1):
        matches = [s for s in stops if text[:end].endswith(s)]
        if matches:
            return text[: end - max(map(len, matches))], True
    return text, False


def test_stop_strings_whatever_the_parts() -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    for _ in range(2000):
        text = "".join(rng.choice("ab") for _ in range(rng.randrange(20)))
        stops = ["".join(rng.choice("ab") for _ in range(rng.randrange(1, 6))) for _ in range(rng.randrange(1, 4))]
        matcher, given, stopped, rest = StopMatcher(stops), "", False, text
        while rest and not stopped:
            size = rng.randrange(1, 5)
            part, rest = rest[:size], rest[size:]
            out, stopped = matcher.push(part)
            given += out
            expected, _ = by_brute_force(text, stops)
            assert expected.startswith(given)
        given += matcher.flush()
        assert (given, stopped) == by_brute_force(text, stops), (text, stops)


def test_nothing_is_held_that_cannot_become_a_stop_string() -> None:
    matcher = StopMatcher(["<|im_end|>", "\n\n"])
    assert matcher.push("so <b>") == ("so <b>", False)
    assert matcher.push(" and <|im") == (" and ", False)
    assert matcher.push("age|>") == ("<|image|>", False)
    assert matcher.push("\n") == ("", False)
    assert matcher.push("\nmore") == ("", True)


def test_builder_stops_at_a_stop_string_across_tokens() -> None:
    inner = byte_level()
    builder = TextBuilder(TextTokenizer(inner), ["wor", "xyz"])
    parts = []
    for token in inner.encode("hello, wooworld").ids:
        parts.append(builder.push(token))
        if builder.stopped:
            break
    assert builder.stopped
    assert "".join(parts) + builder.finish() == "hello, woo"


def test_checkpoint_without_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": [5, 7]}))
    tokenizer = load_tokenizer(tmp_path)
    assert not tokenizer.has_text
    assert tokenizer.eos_ids == {5, 7}
    with pytest.raises(InvalidInputError, match="no tokenizer: send the prompt as a list of token ids"):
        tokenizer.encode("hello")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"generation_config.json": {"eos_token_id": 3}, "config.json": {"eos_token_id": 4}}, {3}),
        ({"generation_config.json": {"max_length": 3}, "config.json": {"eos_token_id": 4}}, {4}),
        ({"tokenizer_config.json": {"eos_token": EOS}}, {0}),
        ({"tokenizer_config.json": {"eos_token": {"content": EOS}}}, {0}),
        ({}, set()),
    ],
)
def test_where_the_end_of_sequence_comes_from(tmp_path: Path, files: dict[str, dict[str, object]], expected: set[int]) -> None:
    byte_level().save(str(tmp_path / "tokenizer.json"))
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert load_tokenizer(tmp_path).eos_ids == expected


def test_truncation_in_the_file_does_not_cut_prompts(tmp_path: Path) -> None:
    inner = byte_level()
    inner.enable_truncation(2)
    inner.enable_padding(length=9)
    inner.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).encode("a b c d") == byte_level().encode("a b c d").ids


@pytest.mark.parametrize(
    ("name", "content"),
    [("tokenizer.json", "{"), ("tokenizer.json", "{}"), ("tokenizer_config.json", "{"), ("config.json", "[]")],
)
def test_broken_files_are_named(tmp_path: Path, name: str, content: str) -> None:
    byte_level().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError, match=name):
        load_tokenizer(tmp_path)


def test_a_checkpoint_with_only_a_vocabulary_is_converted(tmp_path: Path) -> None:
    inner = byte_level()
    inner.model.save(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer", "eos_token": EOS}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("hello world") == inner.encode("hello world").ids
    assert tokenizer.eos_ids == {0}
    (tmp_path / "vocab.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be converted"):
        load_tokenizer(tmp_path)
