"""`elastic-ep serve` in a process of its own, on a free loopback port, ended when the context ends."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from elastic_ep.core.errors import ElasticEPError, InvalidInputError
from elastic_ep.serving.probe import fetch_status


class ServerFailed(ElasticEPError):
    """The server process did not start, or ended; the message holds what it said on standard error."""


class ServerProcess:
    """Starts on entry, stops on exit: SIGTERM, and SIGKILL if that does not help.

    Attributes:
        facts: what `serve --json` printed: url, model, ep_size, slots, experts, layers, max_model_len.
        stderr: what it had printed there when it ended. Kept in a file until then: a pipe that nobody reads would hold it up when full.
    """

    def __init__(self, checkpoint: str | Path, *arguments: str, start_timeout_s: float = 120.0) -> None:
        self._command = [sys.executable, "-P", "-m", "elastic_ep.cli.main", "serve", str(checkpoint), "--port", "0", "--json", *arguments]
        self._start_timeout_s = start_timeout_s
        self.facts: dict[str, Any] = {}
        self.stderr = ""

    def __enter__(self) -> ServerProcess:
        self._errors = tempfile.TemporaryFile(mode="w+")
        self.process = subprocess.Popen(self._command, stdout=subprocess.PIPE, stderr=self._errors, text=True)
        assert self.process.stdout is not None
        try:
            ready, _, _ = select.select([self.process.stdout], [], [], self._start_timeout_s)
            line = self.process.stdout.readline() if ready else ""
        except BaseException:  # an interrupt, above all
            self.stop()
            raise
        if not line:
            self.process.kill()
            self._wait_end(None)
            raise ServerFailed(f"the server did not start: {self.stderr.strip() or f'nothing after {self._start_timeout_s:g} s'}")
        self.facts = json.loads(line)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.stop()

    @property
    def url(self) -> str:
        return str(self.facts["url"])

    def status(self) -> dict[str, Any]:
        """GET /elastic/status. Raises ServerFailed with what the server said if it has ended."""
        try:
            return fetch_status(self.url)
        except InvalidInputError:
            if self.process.poll() is None:
                raise
            self._wait_end(None)
            raise ServerFailed(f"the server ended with status {self.process.returncode}: {self.stderr.strip()}") from None

    def rank_pid(self, rank: int) -> int:
        return int(self.status()["ranks"][rank]["pid"])

    def signal_rank(self, rank: int, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to one rank's process, named by `/elastic/status`."""
        os.kill(self.rank_pid(rank), number)

    def wait_status(self, condition: Callable[[dict[str, Any]], bool], timeout_s: float = 30.0) -> dict[str, Any]:
        """Poll the status until `condition` holds. Raises TimeoutError with the last one."""
        deadline = time.monotonic() + timeout_s
        while True:
            status = self.status()
            if condition(status):
                return status
            if time.monotonic() > deadline:
                raise TimeoutError(f"after {timeout_s:g} s the status is {status}")
            time.sleep(0.01)

    def stop(self, timeout_s: float = 15.0) -> int:
        """End it gracefully. Returns its exit status; `stderr` then holds what it printed there."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self._wait_end(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self._wait_end(None)
        return self.process.returncode

    def _wait_end(self, timeout_s: float | None) -> None:
        """Raises subprocess.TimeoutExpired."""
        self.process.communicate(timeout=timeout_s)
        if not self._errors.closed:
            self._errors.seek(0)
            self.stderr = self._errors.read()
            self._errors.close()


def rank_processes(pids: Sequence[int]) -> list[int]:
    """Those of `pids` that still run (an ended process that nobody has waited for does not count)."""
    alive = []
    for pid in pids:
        try:
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rpartition(")")[2].split()[0] != "Z":
                    alive.append(pid)
        except OSError:
            pass
    return alive
