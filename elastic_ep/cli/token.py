"""The secret that hosts of one server share. It comes from a file or the environment, never from the command line, which everybody sees."""

from __future__ import annotations

import os
from pathlib import Path

from elastic_ep.core.errors import InvalidInputError

TOKEN_VARIABLE = "ELASTIC_EP_TOKEN"
MIN_CHARS = 16


def read_token(path: str | None) -> str:
    """From the file, or the environment variable if there is none. Raises InvalidInputError when it is missing or too short."""
    if path is not None:
        try:
            token, origin = Path(path).read_text(), path
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is no text"
            raise InvalidInputError(f"cannot read the token in {path}: {reason}; check --token-file") from None
    else:
        token, origin = os.environ.get(TOKEN_VARIABLE, ""), f"${TOKEN_VARIABLE}"
        if not token:
            raise InvalidInputError(f"no token: give --token-file FILE, or set {TOKEN_VARIABLE}; the other hosts need the same one")
    token = token.strip()
    if len(token) < MIN_CHARS:
        cure = "for instance from: openssl rand -hex 32"
        raise InvalidInputError(f"the token in {origin} has {len(token)} characters; give at least {MIN_CHARS}, {cure}")
    return token
