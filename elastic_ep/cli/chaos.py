"""`elastic-ep chaos`: break a running server's ranks under load, and judge what clients saw."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from elastic_ep.core.errors import InvalidInputError

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


def duration(text: str) -> float:
    """Seconds of `5`, `5s`, `30m` or `2h`."""
    number, unit = (text[:-1], text[-1]) if text[-1:] in _UNITS else (text, "s")
    try:
        return float(number) * _UNITS[unit]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no time; give seconds, or a number with s, m or h") from None


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "chaos",
        help="kill and stop ranks of a running server under load, and judge what clients saw",
        description="For a server that runs on this host with --restart always: runs a mixed load (short, long, streaming, cancelled "
        "requests) while active ranks are killed and stopped at random, then checks that no request was lost and no token lost, doubled "
        "or changed. Exit status 1 if any was, or if a rank did not come back. THE SERVER'S RANKS ARE KILLED.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the server's address")
    parser.add_argument("--seed", type=int, help="of requests, victims and kinds of faults; drawn and printed if not given")
    parser.add_argument("--every", type=duration, default=5.0, metavar="TIME", help="time between faults, as 5s")
    parser.add_argument("--for", type=duration, default=1800.0, metavar="TIME", dest="for_s", help="how long, as 30m")
    parser.add_argument("--clients", type=int, default=8, metavar="N", help="requests in flight at once")
    parser.add_argument("--max-tokens", type=int, default=128, metavar="TOKENS", help="of the longest requests")
    parser.add_argument("--spare", type=int, default=1, metavar="N", help="active ranks that are always left alone")
    parser.add_argument("--history", type=Path, metavar="FILE", help="write what clients saw there; `elastic-ep verify` reads it")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")


def run(args: argparse.Namespace) -> int:
    from elastic_ep.cli.verify import describe
    from elastic_ep.testing.chaos import ChaosSettings, Soak
    from elastic_ep.testing.history import History

    seed = random.randrange(2**31) if args.seed is None else args.seed
    settings = ChaosSettings(
        args.url.rstrip("/"), seed, args.every, args.for_s, args.clients, max_tokens=args.max_tokens, spare=max(0, args.spare)
    )

    def say(line: str) -> None:
        if not args.json:
            print(line, file=sys.stderr, flush=True)

    with _sink(args.history) as sink:
        report = asyncio.run(Soak(settings, History(sink), say).run())
    result = report.as_json()
    if args.json:
        print(json.dumps(result))
    else:
        print(describe(report.verdict))
        for name in ("faults", "longest_stall_ms", "recoveries", "phases_ms", "changes", "change_pauses_ms", "resources"):
            print(f"{name}: {json.dumps(result[name])}")
        print(f"{report.final_active} of {report.ep_size} ranks active at the end")
    return 0 if not report.verdict.violations and report.final_active == report.ep_size else 1


@contextlib.contextmanager
def _sink(path: Path | None) -> Iterator[Callable[[str], object] | None]:
    """Where lines of the history go. Raises InvalidInputError for a file that cannot be written."""
    if path is None:
        yield None
        return
    try:
        file = path.open("w", buffering=1)
    except OSError as error:
        raise InvalidInputError(f"cannot write the history to {path}: {error.strerror}; give another file") from None
    with file:
        yield file.write
