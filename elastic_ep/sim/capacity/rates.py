"""What the field has published: how often GPUs fail, and how long a failure stops others."""

from __future__ import annotations

from typing import NamedTuple

from elastic_ep.core.errors import InvalidInputError

FAILURE_RATES = {"llama3": 1 / 50_700, "meta": 1 / 8_100}
"""failures per GPU-hour: 419 unexpected interruptions in 54 days of 16,384 GPUs; Meta's research clusters"""


class Published(NamedTuple):
    """How long one failure, and the return of a rank, stop the whole group elsewhere. Seconds."""

    name: str
    failure_s: float
    rejoin_s: float
    note: str


PUBLISHED = (
    Published("restart everything", 150.0, 0.0, "2 to 3 minutes; requests are lost"),
    Published("vLLM, scale down by an operator", 57.0, 0.0, "30 s to unhealthy, 26 s to act, 1 s to repair; requests are aborted"),
    Published("SGLang elastic EP", 16.8, 0.0, "10 s detection, 6.8 s repair; requests of the dead rank are lost"),
    Published("EEP (arXiv 2605.10670)", 11.0, 8.0, "pause at a failure, and at the return"),
)


def parse_rate(text: str) -> float:
    """Failures per GPU-hour from a name or a number."""
    if text in FAILURE_RATES:
        return FAILURE_RATES[text]
    try:
        rate = float(text)
    except ValueError:
        rate = -1.0
    if not 0 <= rate < 1:
        raise InvalidInputError(f"failure rate {text!r}: give {', '.join(FAILURE_RATES)}, or failures per GPU-hour such as 2e-5")
    return rate
