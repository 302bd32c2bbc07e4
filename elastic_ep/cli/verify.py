"""`elastic-ep verify`: judge a recorded history of what clients sent and received."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from elastic_ep.core.errors import InvalidInputError
from elastic_ep.testing.history import Event, Verdict, judge, parse_line

SHOWN = 20


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "verify",
        help="judge a history of what clients sent and received",
        description="Reads a history (one JSON object per line, as `elastic-ep chaos --history` writes it) and checks that no request "
        "was lost or failed, no token was lost, doubled, reordered or changed compared with the run in which nothing failed, and "
        "nothing came after an end. Exit status 1 if anything did; the first violations are named.",
    )
    parser.add_argument("file", type=Path, help="the history")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    verdict = judge(read_history(args.file))
    print(json.dumps(verdict.as_json(SHOWN)) if args.json else describe(verdict))
    return 1 if verdict.violations else 0


def read_history(path: Path) -> list[Event]:
    """Raises InvalidInputError for a file that cannot be read, or is no history."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInputError(f"cannot read the history {path}: {error}; give a file that elastic-ep chaos --history wrote") from None
    events = [parse_line(line, number) for number, line in enumerate(lines, 1) if line.strip()]
    if not events:
        raise InvalidInputError(f"the history {path} is empty, nothing can be judged; give a file that elastic-ep chaos --history wrote")
    return events


def describe(verdict: Verdict) -> str:
    """For people: one line of numbers, then the first violations."""
    facts = (
        f"{verdict.requests} requests ({verdict.references} of them fault-free runs, {verdict.cancelled} cancelled, {verdict.refused} "
        f"refused), {verdict.tokens} tokens, {verdict.checked} streams compared, {verdict.faults} faults, longest gap "
        f"{verdict.longest_gap_s * 1e3:.0f} ms"
    )
    if not verdict.violations:
        return f"{facts}\nno violation"
    counts = ", ".join(f"{count} {name}" for name, count in sorted(verdict.counts.items()))
    return "\n".join([facts, f"VIOLATIONS: {counts}", *(f"  {violation}" for violation in verdict.violations[:SHOWN])])
