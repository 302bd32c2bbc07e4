"""`elastic-ep status`: what a running server says of itself."""

from __future__ import annotations

import argparse
import json
from typing import Any

from elastic_ep.serving.probe import fetch_status


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("status", help="show ranks, epoch and recoveries of a running server")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the server's address (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the object of /elastic/status")


def run(args: argparse.Namespace) -> int:
    status = fetch_status(args.url)
    print(json.dumps(status) if args.json else "\n".join(describe(status)))
    return 0


def describe(status: dict[str, Any]) -> list[str]:
    """The status as lines for a terminal."""
    requests = status["requests"]
    lines = [
        f"epoch {status['epoch']}, {status['phase']}: {sum(status['active_ranks'])} of {status['ep_size']} ranks active",
        f"requests: {requests['running']} running, {requests['waiting']} waiting, {requests['finished']} finished, "
        f"{requests['failed']} failed; {status['tokens_committed']} tokens committed",
    ]
    for rank in status["ranks"]:
        failure = f"  {rank['failure']}" if rank["failure"] else ""
        lines.append(f"  rank {rank['rank']}  pid {rank['pid']}  {rank['state']:9} {rank['running_requests']} requests{failure}")
    for recovery in status["recoveries"]:
        stall = "in progress" if recovery["stall_ms"] is None else f"stall {recovery['stall_ms']:.1f} ms"
        lines.append(
            f"  recovery to epoch {recovery['epoch']}: ranks {recovery['ranks']} {recovery['kind']}, tier {recovery['tier']}, "
            f"{recovery['experts_lost']} experts lost, {stall}"
        )
    return lines
