"""What a world writes down for those who judge it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from elastic_ep.brain import events as ev
from elastic_ep.sim import tokens
from elastic_ep.sim.schedule import Request


@dataclass(slots=True)
class Heard:
    """One event that the brain was given, and what it answered. `fingerprint` is set where it came from a process given up before."""

    event: ev.Event
    commands: list[ev.Command]
    fingerprint: tuple[Any, ...] | None = None
    after: tuple[Any, ...] | None = None
    is_beat: bool = False
    """a sign of life that led to nothing"""
    has_installed: bool = False
    """an epoch has just come into force"""


@dataclass
class Client:
    """What one request has received."""

    request: Request
    tokens: list[int] = field(default_factory=list)
    finish: str = ""
    error: str = ""
    is_cancelled: bool = False

    @cached_property
    def wanted(self) -> list[int]:
        """What a run without faults gives."""
        return tokens.expected_tokens(self.request.prompt, self.request.max_tokens)


class Declared(NamedTuple):
    """What the placement in force is said to survive, and the members of which that was said; of nobody while an install is under way."""

    any_ranks: int
    any_node: bool
    members: frozenset[tuple[int, int]]


NOTHING = Declared(0, False, frozenset())
