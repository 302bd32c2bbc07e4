"""Other hosts for tests: an agent in a process of its own, a second network namespace, and a link that can be cut."""

from __future__ import annotations

import json
import os
import random
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from types import TracebackType
from typing import Any

from elastic_ep.core.errors import ElasticEPError


class AgentFailed(ElasticEPError):
    """The agent ended, or got no ranks in time; the message holds what it said on standard error."""


class AgentProcess:
    """`elastic-ep rank` in a process of its own, ended when the context ends. `prefix` may put it into another namespace."""

    def __init__(self, controller: str, *arguments: str, prefix: tuple[str, ...] = ()) -> None:
        self._command = [
            *prefix,
            sys.executable,
            "-P",
            "-m",
            "elastic_ep.cli.main",
            "rank",
            "--controller",
            controller,
            "--json",
            *arguments,
        ]

    def __enter__(self) -> AgentProcess:
        self._stderr = tempfile.TemporaryFile(mode="w+")
        self.process = subprocess.Popen(self._command, stdout=subprocess.PIPE, stderr=self._stderr, text=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.stop()
        self._stderr.close()

    @property
    def stderr(self) -> str:
        """What it and its ranks have said so far."""
        self._stderr.flush()
        with open(f"/proc/self/fd/{self._stderr.fileno()}") as file:
            return file.read()

    def wait_seated(self, timeout_s: float = 60.0) -> list[int]:
        """The ranks that the controller gives it next. Raises AgentFailed."""
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], timeout_s)
        line = self.process.stdout.readline() if ready else ""
        if not line:
            raise AgentFailed(f"no ranks after {timeout_s:g} s: {self.stderr}")
        facts: dict[str, Any] = json.loads(line)
        return list(facts["ranks"])

    def kill(self) -> None:
        """SIGKILL, and wait for it."""
        self.process.kill()
        self.process.wait()

    def wait(self, timeout_s: float) -> int:
        """Its exit status. Raises subprocess.TimeoutExpired."""
        return self.process.wait(timeout_s)

    def stop(self, timeout_s: float = 10.0) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()
        finally:
            assert self.process.stdout is not None
            self.process.stdout.close()


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as sock:
        sock.bind((host, 0))
        return int(sock.getsockname()[1])


class NotPermitted(ElasticEPError):
    """This machine does not let us make network namespaces. The message is what the system said."""


class NamespaceLink:
    """This host and a network namespace, joined by a pair of interfaces. `cut` takes one down, `heal` brings it up again.

    Attributes:
        host: address of this side; `listen` and `dial` are the controller's address, seen from both.
        prefix: what to put before a command to run it on the other side.
    """

    def __init__(self) -> None:
        name = f"eep{os.getpid() % 100000}{random.randrange(100)}"
        self._namespace, self._ours, self._theirs = name, f"{name}a", f"{name}b"
        third, fourth = random.randrange(256), 4 * random.randrange(63)
        self.host, self._peer = f"10.213.{third}.{fourth + 1}", f"10.213.{third}.{fourth + 2}"
        self.prefix = ("ip", "netns", "exec", name)

    def __enter__(self) -> NamespaceLink:
        try:
            _ip("netns", "add", self._namespace)
        except (OSError, NotPermitted) as error:
            raise NotPermitted(f"no network namespaces here: {error}") from None
        try:
            _ip("link", "add", self._ours, "type", "veth", "peer", "name", self._theirs, "netns", self._namespace)
            _ip("addr", "add", f"{self.host}/30", "dev", self._ours)
            _ip("link", "set", self._ours, "up")
            _ip("-n", self._namespace, "addr", "add", f"{self._peer}/30", "dev", self._theirs)
            _ip("-n", self._namespace, "link", "set", "lo", "up")
            _ip("-n", self._namespace, "link", "set", self._theirs, "up")
        except NotPermitted:
            self.__exit__()
            raise
        self.listen = self.dial = f"tcp://{self.host}:{free_port(self.host)}"
        return self

    def __exit__(self, *_: object) -> None:
        subprocess.run(["ip", "link", "del", self._ours], capture_output=True)
        subprocess.run(["ip", "netns", "del", self._namespace], capture_output=True)

    def cut(self) -> None:
        _ip("-n", self._namespace, "link", "set", self._theirs, "down")

    def heal(self) -> None:
        _ip("-n", self._namespace, "link", "set", self._theirs, "up")


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise NotPermitted(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


class ProxyLink:
    """A TCP proxy in this process between a controller and the agent and ranks of "another host". `cut` stops it forwarding what runs
    through it, for good, and connecting anybody; `heal` connects newcomers again. What was cut off is never told: nothing is closed, and
    whatever is sent is taken and lost. Traffic between ranks does not come through here."""

    prefix: tuple[str, ...] = ()
    host = "127.0.0.1"

    def __enter__(self) -> ProxyLink:
        self._target = ("127.0.0.1", free_port())
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.listen = f"tcp://127.0.0.1:{self._target[1]}"
        self.dial = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self._link_up = threading.Event()
        self._link_up.set()
        self._generation = 0
        self._sockets: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._generation += 1
        self._listener.close()
        for sock in self._sockets:
            sock.close()

    def cut(self) -> None:
        self._link_up.clear()
        self._generation += 1

    def heal(self) -> None:
        self._link_up.set()

    def _accept(self) -> None:
        while True:
            try:
                caller, _ = self._listener.accept()
            except OSError:
                return
            self._sockets.append(caller)
            if not self._link_up.is_set():
                continue  # it waits for an answer that does not come
            try:
                target = socket.create_connection(self._target)
            except OSError:
                caller.close()
                continue
            self._sockets.append(target)
            for source, sink in ((caller, target), (target, caller)):
                threading.Thread(target=self._pump, args=(source, sink, self._generation), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, generation: int) -> None:
        try:
            while data := source.recv(1 << 16):
                if generation == self._generation:
                    sink.sendall(data)
            if generation == self._generation:
                sink.shutdown(socket.SHUT_WR)
        except OSError:
            if generation == self._generation:
                for sock in (source, sink):
                    try:
                        sock.shutdown(socket.SHUT_RDWR)
                    except OSError:
                        pass


def wait_until(condition: Any, timeout_s: float, what: str) -> None:
    """Poll until `condition()` holds. Raises TimeoutError naming `what`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not after {timeout_s:g} s: {what}")
        time.sleep(0.02)
