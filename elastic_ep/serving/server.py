"""One server process: listener, controller and HTTP app on one loop, from first check to last rank gone."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import uvicorn
import uvloop

from elastic_ep.core.errors import ElasticEPError, InvalidInputError
from elastic_ep.models.spec import ModelSpec, inspect_checkpoint
from elastic_ep.serving.api.app import create_app
from elastic_ep.serving.backend import Unavailable
from elastic_ep.serving.config import ServeConfig
from elastic_ep.serving.controller import Controller
from elastic_ep.serving.metrics import Metrics
from elastic_ep.serving.text import Tokenizer, load_tokenizer

Announce = Callable[[dict[str, Any]], None]

OWN_FILES, FILES_PER_RANK = 40, 4
"""that a server holds open: 20 and 2 were counted, a restart takes some more"""


class ServerError(ElasticEPError):
    """The server ended because it could not go on."""


class _Uvicorn(uvicorn.Server):
    """uvicorn without its own signal handlers: the order of stopping is ours."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises InvalidInputError naming the address and the cure."""
    if not 0 <= port <= 65535:
        raise InvalidInputError(f"--port is {port}; give 0 to 65535")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise InvalidInputError(f"cannot listen on {host}:{port}: {error}; give another --host") from None
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(2048)
    except OSError as error:
        sock.close()
        raise InvalidInputError(f"cannot listen on {host}:{port}: {error.strerror}; give another --port, or 0 for a free one") from None
    return sock


def serve(config: ServeConfig, host: str, port: int, shutdown_timeout_s: float, announce: Announce) -> int:
    """Run a server until it is told to stop. Returns the exit status.

    Raises InvalidInputError, CheckpointError before any process is started, ServerError when the ranks cannot be brought up.
    """
    if not 0 <= shutdown_timeout_s < float("inf"):
        raise InvalidInputError(f"--shutdown-timeout is {shutdown_timeout_s:g}; give 0 seconds or more")
    spec = inspect_checkpoint(config.checkpoint)
    config.brain_settings(spec)  # all values are checked before anything is started
    tokenizer = load_tokenizer(Path(config.checkpoint))
    _raise_open_files(config.ep_size)
    with listen(host, port) as sock:
        return uvloop.run(_serve(config, spec, tokenizer, sock, host, shutdown_timeout_s, announce))


def _raise_open_files(ep_size: int) -> None:
    """As many as the system lets this process have: each client takes one, and ranks must not be refused for them. Raises
    InvalidInputError where the ranks alone would not find enough."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = OWN_FILES + FILES_PER_RANK * ep_size
    if 0 <= hard < needed:
        raise InvalidInputError(
            f"the system lets this process open {hard} files; a server with --ep-size {ep_size} takes up to "
            f"{needed}, and one for each client: raise the limit (ulimit -Hn, LimitNOFILE in a systemd unit)"
        )
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


async def _serve(
    config: ServeConfig,
    spec: ModelSpec,
    tokenizer: Tokenizer,
    sock: socket.socket,
    host: str,
    shutdown_timeout_s: float,
    announce: Announce,
) -> int:
    metrics = Metrics()
    async with Controller(config, spec, metrics) as controller:
        app = create_app(controller, tokenizer, metrics)
        settings = uvicorn.Config(app, log_config=None, log_level="warning", access_log=False, lifespan="off", timeout_graceful_shutdown=5)
        http = _Uvicorn(settings)
        http_task = asyncio.create_task(http.serve(sockets=[sock]))
        _stop_on_signals(controller, shutdown_timeout_s)
        try:
            await controller.wait_serving()
            topology = controller.settings.topology
            announce(
                {
                    "url": f"http://{'[' + host + ']' if ':' in host else host}:{sock.getsockname()[1]}",
                    "model": controller.model_name,
                    "ep_size": topology.ep_size,
                    "slots": topology.num_slots,
                    "experts": spec.num_experts,
                    "layers": spec.num_layers,
                    "max_model_len": controller.max_model_len,
                }
            )
            await controller.stopped.wait()
        except Unavailable as error:
            if controller.error:
                raise ServerError(str(error)) from None
        finally:
            controller.end_streams()
            http.should_exit = True
            await http_task
    if controller.error:
        print(f"elastic-ep serve: error: {controller.error}", file=sys.stderr)
        return 1
    return 0


def _stop_on_signals(controller: Controller, timeout_s: float) -> None:
    """First signal: finish what runs, for at most `timeout_s`. Second signal: stop now."""
    loop = asyncio.get_running_loop()

    def stop() -> None:
        if controller.brain.state.stopping:
            controller.stopped.set()
            return
        controller.request_stop()
        loop.call_later(timeout_s, controller.stopped.set)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if number is not signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            loop.add_signal_handler(number, stop)
