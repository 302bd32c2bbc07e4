"""`elastic-ep`: one command, one module per subcommand. An error is one line on standard error and a non-zero status."""

from __future__ import annotations

import argparse
import importlib
import os
import select
import sys
from collections.abc import Sequence

from elastic_ep import __version__
from elastic_ep.core.errors import ElasticEPError

COMMANDS = ("chaos", "demo", "plan", "rank", "serve", "simulate", "status", "verify")
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="elastic-ep", description="Serve Mixture-of-Experts models with expert parallelism that survives its ranks."
    )
    parser.add_argument("--version", action="version", version=f"elastic-ep {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        importlib.import_module(f"elastic_ep.cli.{name}").add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, and turn what is our users' or the world's fault into one line."""
    args = build_parser().parse_args(argv)
    try:
        status: int = importlib.import_module(f"elastic_ep.cli.{args.command}").run(args)
        if sys.stdout is not None:
            sys.stdout.flush()
        return status
    except BrokenPipeError:
        if not _is_output_closed():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # whoever read it has enough
        return EXIT_BROKEN_PIPE
    except ElasticEPError as error:
        print(f"elastic-ep {args.command}: error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("elastic_ep"):
            raise
        print(f"elastic-ep {args.command}: error: {error}; install what it needs: pip install 'elastic-ep[serve]'", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _is_output_closed() -> bool:
    """Whether nobody reads standard output any more."""
    poll = select.poll()
    poll.register(sys.stdout, 0)
    return bool(poll.poll(0))


if __name__ == "__main__":
    sys.exit(main())
