"""`elastic-ep rank`: this host's ranks for a server on another host."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import signal
import socket

from elastic_ep.cli.token import TOKEN_VARIABLE, read_token
from elastic_ep.core.errors import InvalidInputError


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "rank",
        help="run ranks on this host for a server on another",
        description="Join a server that was started with `elastic-ep serve --remote-ranks`. It says how many ranks to run here; they end "
        "with this process, and start over after the network between the hosts was cut.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--controller", required=True, metavar="tcp://HOST:PORT", help="the server's --control-listen")
    parser.add_argument("--token-file", metavar="FILE", help=f"file with the token that both sides must know, or ${TOKEN_VARIABLE}")
    parser.add_argument("--node", metavar="LABEL", help="label of this host in the server's --remote-ranks; its name if not given")
    parser.add_argument("--ranks", type=int, metavar="N", help="ranks to run here; all of the node's that nobody else runs if not given")
    parser.add_argument("--checkpoint", metavar="DIR", help="where the server's checkpoint lies on this host; the same path if not given")
    parser.add_argument("--mesh-host", metavar="HOST", help="address where other hosts reach this one; by default the one it dials from")
    parser.add_argument("--wait", type=float, default=60.0, metavar="SECONDS", help="how long to wait for a server that is not there yet")
    reconnect_help = "how long to try to reach a server that a cut network hides"
    parser.add_argument("--reconnect-timeout", type=float, default=3600.0, metavar="SECONDS", help=reconnect_help)
    parser.add_argument("--fault-file", default="", metavar="FILE", help="for tests: a file of faults that is read whenever it changes")
    parser.add_argument("--log-level", choices=["DEBUG", "INFO", "WARNING", "ERROR"], default="WARNING", help="what to log")
    parser.add_argument("--json", action="store_true", help="print one JSON object whenever the server has given ranks, instead of a line")


def run(args: argparse.Namespace) -> int:
    """Run ranks until the server stops or SIGTERM or SIGINT comes. Returns 0 then; raises AgentError for every other end."""
    from elastic_ep.runtime.control.address import parse_address
    from elastic_ep.runtime.launch.agent import Agent, AgentConfig

    logging.basicConfig(level=args.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    if parse_address(args.controller)[0] is socket.AF_UNIX:
        raise InvalidInputError(f"--controller is {args.controller!r}; give tcp://HOST:PORT")
    if args.ranks is not None and args.ranks < 1:
        raise InvalidInputError(f"--ranks is {args.ranks}; give at least 1")
    for name, value in (("--wait", args.wait), ("--reconnect-timeout", args.reconnect_timeout)):
        if not 0 <= value < float("inf"):
            raise InvalidInputError(f"{name} is {value:g}; give 0 seconds or more")
    config = AgentConfig(
        controller=args.controller,
        token=read_token(args.token_file),
        node=args.node or socket.gethostname(),
        preload="elastic_ep.models.worker:preload",
        target="elastic_ep.models.worker:rank_main",
        ranks=args.ranks,
        checkpoint=args.checkpoint,
        mesh_host=args.mesh_host,
        wait_s=args.wait,
        reconnect_s=args.reconnect_timeout,
        fault_file=args.fault_file,
    )

    def announce(ranks: tuple[int, ...]) -> None:
        facts = {"controller": config.controller, "node": config.node, "ranks": list(ranks)}
        text = f"elastic-ep: node {config.node} runs ranks {', '.join(map(str, ranks))} for {config.controller}"
        print(json.dumps(facts) if args.json else text, flush=True)

    async def main() -> int:
        agent = Agent(config, announce)
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, agent.stop)
        return await agent.run()

    return asyncio.run(main())
