"""What clients sent and received, and the judge of it: exactly once, in order, the same tokens as the run in which nothing failed.

A history is a list of events in the order in which the client saw them; a file has one JSON object per line. Requests with the same
`key` ask for the same tokens (prompt, parameters and seed); those marked `reference` ran while nothing failed. Pure: no clock, no file.
"""

from __future__ import annotations

import enum
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from elastic_ep.core.errors import InvalidInputError


class Kind(enum.Enum):
    """What happened, as the client saw it."""

    SENT = "sent"
    TOKENS = "tokens"
    FINISHED = "finished"
    """the server said that the stream is complete; `reason` is the finish reason"""
    FAILED = "failed"
    """an error, or the end of the connection, before the stream was complete"""
    REFUSED = "refused"
    """answered with an error status: nothing was begun"""
    CANCELLED = "cancelled"
    """the client hung up"""
    FAULT = "fault"
    """what was done to the server; of no request"""


ENDS = frozenset({Kind.FINISHED, Kind.FAILED, Kind.REFUSED, Kind.CANCELLED})


@dataclass(frozen=True, slots=True)
class Event:
    """One line of a history. `time` in seconds of the recorder's clock, never backwards within a request."""

    kind: Kind
    time: float
    request: str = ""
    key: str = ""
    reference: bool = False
    max_tokens: int | None = None
    token_ids: tuple[int, ...] = ()
    text: str = ""
    reason: str = ""

    def as_line(self) -> str:
        """JSON without what has its default."""
        record: dict[str, Any] = {"event": self.kind.value, "time": round(self.time, 6)}
        for name in ("request", "key", "reference", "max_tokens", "token_ids", "text", "reason"):
            value = getattr(self, name)
            if value not in ("", False, None, ()):
                record[name] = value
        return json.dumps(record)


def parse_line(line: str, number: int) -> Event:
    """One line of a file. Raises InvalidInputError naming the line."""
    try:
        record = json.loads(line)
        kind, time = Kind(record.pop("event")), float(record.pop("time"))
        record["token_ids"] = tuple(int(token) for token in record.get("token_ids", ()))
        return Event(kind, time, **record)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidInputError(f"line {number} of the history is no event of one ({error}): {line.strip()[:80]!r}") from None


class History:
    """Notes events. `sink`, if given, is handed each as a line at once, so that nothing is lost with the process that records."""

    def __init__(self, sink: Callable[[str], object] | None = None) -> None:
        self.events: list[Event] = []
        self._sink = sink

    def note(self, event: Event) -> None:
        self.events.append(event)
        if self._sink is not None:
            self._sink(event.as_line() + "\n")


@dataclass(frozen=True, slots=True)
class Violation:
    """One broken promise: its name, the request, and what was seen instead of what."""

    name: str
    request: str
    detail: str

    def __str__(self) -> str:
        return f"{self.name}: request {self.request}: {self.detail}"


@dataclass
class Verdict:
    """What a history shows.

    Attributes:
        checked: streams whose tokens were compared with those of their reference.
        tokens: of all streams.
        longest_gap_s: between two consecutive tokens of one stream that is no reference.
    """

    violations: list[Violation] = field(default_factory=list)
    requests: int = 0
    references: int = 0
    checked: int = 0
    finished: int = 0
    cancelled: int = 0
    refused: int = 0
    faults: int = 0
    tokens: int = 0
    longest_gap_s: float = 0.0

    @property
    def counts(self) -> dict[str, int]:
        """Violations by name."""
        return dict(Counter(violation.name for violation in self.violations))

    def as_json(self, shown: int = 20) -> dict[str, Any]:
        """An object to print, with the first `shown` violations."""
        names = ("requests", "references", "checked", "finished", "cancelled", "refused", "faults", "tokens")
        first = [{"name": v.name, "request": v.request, "detail": v.detail} for v in self.violations[:shown]]
        gap = round(self.longest_gap_s * 1e3, 1)
        own: dict[str, Any] = {"ok": not self.violations, "counts": self.counts, "violations": first, "longest_gap_ms": gap}
        return own | {name: getattr(self, name) for name in names}


@dataclass
class Stream:
    """One request's events. `surplus` are those that came after its end."""

    sent: Event
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    end: Event | None = None
    surplus: list[Event] = field(default_factory=list)
    last_token: float | None = None
    longest_gap_s: float = 0.0
    went_back: bool = False

    def take(self, event: Event) -> None:
        last = self.sent.time if self.last_token is None else self.last_token
        self.went_back |= event.time < last
        if self.end is not None:
            self.surplus.append(event)
        elif event.kind is Kind.TOKENS:
            if self.last_token is not None:
                self.longest_gap_s = max(self.longest_gap_s, event.time - self.last_token)
            self.last_token = event.time
            self.token_ids += event.token_ids
            self.text += event.text
        else:
            self.end = event


def streams_of(events: Iterable[Event]) -> dict[str, Stream]:
    """Request -> its stream. Raises InvalidInputError for events that no client can have seen."""
    streams: dict[str, Stream] = {}
    for number, event in enumerate(events, 1):
        if event.kind is Kind.FAULT:
            continue
        if event.kind is Kind.SENT:
            if event.request in streams:
                raise InvalidInputError(f"event {number}: request {event.request!r} is sent a second time; give each its own name")
            streams[event.request] = Stream(event)
        elif event.request not in streams:
            raise InvalidInputError(f"event {number}: {event.kind.value} of request {event.request!r}, which was never sent")
        else:
            streams[event.request].take(event)
    return streams


def judge(events: Sequence[Event]) -> Verdict:
    """Every violation, in the order in which the requests were sent. The history must be complete: what is open at its end is lost."""
    streams = streams_of(events)
    references: dict[str, Stream] = {}
    for stream in streams.values():
        if stream.sent.reference and stream.end is not None and stream.end.kind is Kind.FINISHED:
            references.setdefault(stream.sent.key, stream)
    verdict = Verdict(requests=len(streams), faults=sum(event.kind is Kind.FAULT for event in events))
    for request, stream in streams.items():
        reference = references.get(stream.sent.key)
        verdict.references += stream.sent.reference
        verdict.tokens += len(stream.token_ids)
        end = stream.end.kind if stream.end else None
        verdict.finished += end is Kind.FINISHED
        verdict.cancelled += end is Kind.CANCELLED
        verdict.refused += end is Kind.REFUSED
        verdict.checked += reference is not None and reference is not stream
        if not stream.sent.reference:
            verdict.longest_gap_s = max(verdict.longest_gap_s, stream.longest_gap_s)
        verdict.violations += [Violation(name, request, detail) for name, detail in _violations(stream, reference)]
    return verdict


def _violations(stream: Stream, reference: Stream | None) -> list[tuple[str, str]]:
    """(name, detail) of what is wrong with one stream."""
    found = []
    end, limit = stream.end, stream.sent.max_tokens
    if end is None:
        found.append(("lost_request", f"no end after {len(stream.token_ids)} tokens"))
    elif end.kind is Kind.FAILED:
        found.append(("failed_request", f"{end.reason or 'no reason'} after {len(stream.token_ids)} tokens"))
    for event in stream.surplus:
        name = "second_end" if event.kind in ENDS else "token_after_end"
        assert end is not None
        found.append((name, f"{event.kind.value} {list(event.token_ids) or event.reason} after {end.kind.value}"))
    if stream.went_back:
        found.append(("time_backwards", "an event is older than the one before it"))
    if limit is not None and len(stream.token_ids) > limit:
        found.append(("too_many_tokens", f"{len(stream.token_ids)} tokens, asked for at most {limit}"))
    if reference is stream or (end is not None and end.kind is Kind.REFUSED):
        return found
    if reference is None:
        return [*found, ("no_reference", f"no fault-free run of {stream.sent.key!r} to compare with")]
    return found + _compare(stream, reference)


def _compare(stream: Stream, reference: Stream) -> list[tuple[str, str]]:
    whole = stream.end is not None and stream.end.kind is Kind.FINISHED
    got, expected = stream.token_ids, reference.token_ids
    if not whole and expected[: len(got)] == got:
        return []
    if got != expected:
        at = next((i for i, (a, b) in enumerate(zip(got, expected, strict=False)) if a != b), min(len(got), len(expected)))
        return [(name_difference(got, expected, whole), f"at token {at}: {got[at : at + 4]}, without faults {expected[at : at + 4]}")]
    assert stream.end is not None
    assert reference.end is not None
    if stream.text != reference.text:
        return [("differing_text", f"{stream.text[-40:]!r}, without faults {reference.text[-40:]!r}")]
    if stream.end.reason != reference.end.reason:
        return [("differing_finish", f"{stream.end.reason!r}, without faults {reference.end.reason!r}")]
    return []


def name_difference(got: Sequence[int], expected: Sequence[int], whole: bool) -> str:
    """What became of tokens that differ from the expected ones. `whole`: the stream is complete; else only a beginning is expected."""
    if is_subsequence(got, expected):
        return "lost_token"
    if is_replay(got, expected, whole):
        return "duplicated_token"
    if whole and is_subsequence(expected, got):
        return "extra_token"
    if sorted(got) == sorted(expected[: len(got)]):
        return "reordered_tokens"
    return "differing_token"


def is_replay(got: Sequence[int], expected: Sequence[int], whole: bool) -> bool:
    """Whether `got` is `expected` (its beginning, unless `whole`) with one block of tokens twice, one after the other."""
    lengths = [len(got) - len(expected)] if whole else range(1, len(got))
    return any(
        [*expected[:end], *expected[end - length :]][: len(got)] == list(got)
        for length in lengths
        for end in range(max(1, length), len(expected) + 1)
        if length > 0
    )


def is_subsequence(part: Sequence[int], whole: Sequence[int]) -> bool:
    """Whether `part` is `whole` with some tokens left out."""
    rest = iter(whole)
    return all(token in rest for token in part)
