"""`elastic-ep rank`, and what `serve` says about other hosts: bad input is one line with a cure."""

from __future__ import annotations

from pathlib import Path

import pytest

from elastic_ep.cli.main import main
from elastic_ep.cli.token import TOKEN_VARIABLE, read_token
from elastic_ep.core.errors import InvalidInputError
from elastic_ep.testing.hosts import free_port


@pytest.fixture(autouse=True)
def no_token_in_the_environment(monkeypatch):
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)


@pytest.fixture
def token_file(tmp_path: Path) -> str:
    path = tmp_path / "token"
    path.write_text("0123456789abcdef\n")
    return str(path)


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of an error."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    (line,) = err.strip().splitlines()
    assert out == ""
    assert line.startswith(f"elastic-ep {arguments[0]}: error: ")
    return line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--controller", "10.0.0.1:7000"), "bad address '10.0.0.1:7000'"),
        (("--controller", "unix:/x"), "give tcp://HOST:PORT"),
        (("--ranks", "0"), "--ranks is 0"),
        (("--wait", "-1"), "--wait is -1"),
        (("--reconnect-timeout", "nan"), "--reconnect-timeout is nan"),
        (("--token-file", "/nowhere"), "cannot read the token in /nowhere"),
    ],
)
def test_bad_arguments(capsys, token_file, arguments, words):
    assert words in said(capsys, "rank", "--controller", "tcp://127.0.0.1:9", "--token-file", token_file, *arguments)


def test_no_token(capsys):
    assert f"set {TOKEN_VARIABLE}" in said(capsys, "rank", "--controller", "tcp://127.0.0.1:9")


def test_no_controller(capsys, token_file):
    address = f"tcp://127.0.0.1:{free_port()}"
    line = said(capsys, "rank", "--controller", address, "--token-file", token_file, "--wait", "0")
    assert f"no controller at {address}" in line
    assert "refused" in line


def test_the_token_comes_from_the_file_or_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv(TOKEN_VARIABLE, " from the environment ")
    assert read_token(None) == "from the environment"
    (tmp_path / "token").write_text("from the file, blanks cut\n")
    assert read_token(str(tmp_path / "token")) == "from the file, blanks cut"
    (tmp_path / "token").write_text("short")
    with pytest.raises(InvalidInputError, match="5 characters; give at least 16"):
        read_token(str(tmp_path / "token"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--remote-ranks", "b=2"), "--remote-ranks needs --control-listen"),
        (("--control-listen", "tcp://127.0.0.1:9"), "--control-listen is for ranks on other hosts"),
        (("--remote-ranks", "b", "--control-listen", "tcp://127.0.0.1:9"), "give NODE=COUNT"),
        (("--remote-ranks", "b=2", "--control-listen", "tcp://0.0.0.0:9"), "--mesh-host"),
    ],
)
def test_what_serve_says(capsys, monkeypatch, arguments, words):
    monkeypatch.setenv(TOKEN_VARIABLE, "0123456789abcdef")
    assert words in said(capsys, "serve", "/nowhere", "--ep-size", "4", *arguments)
