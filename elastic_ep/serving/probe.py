"""Asking a running server how it is, with nothing but the standard library."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any

from elastic_ep.core.errors import InvalidInputError


def fetch_status(url: str, timeout_s: float = 5.0) -> dict[str, Any]:
    """GET /elastic/status. Raises InvalidInputError when nobody answers there."""
    if not url.startswith(("http://", "https://")):
        raise InvalidInputError(f"--url is {url!r}; give http://HOST:PORT")
    try:
        with urllib.request.urlopen(url.rstrip("/") + "/elastic/status", timeout=timeout_s) as answer:
            status: dict[str, Any] = json.load(answer)
            return status
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise InvalidInputError(f"no elastic-ep server answers at {url}: {getattr(error, 'reason', error)}; check --url") from None
