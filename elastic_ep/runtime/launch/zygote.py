"""The zygote: a process that has imported the model libraries once and forks a rank in milliseconds; it waits for its children and reports.

It speaks JSON over a SOCK_SEQPACKET socket with the controller (one record a packet). It has one thread and touches no tensor, so that its
forks are sound. When the controller is gone it kills its ranks: they end by themselves, but one that a signal has stopped would stay.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from typing import Any

from elastic_ep.runtime.launch.lives import Lives
from elastic_ep.runtime.launch.process import signal_name

MAX_PACKET_BYTES = 1 << 16


def resolve(name: str) -> Callable[..., Any]:
    """`module:function` -> the function."""
    module, _, attribute = name.partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    return function


_PR_SET_PDEATHSIG = 1


def end_with_parent(number: int = signal.SIGKILL) -> None:
    """Be sent this signal when the controller ends, also while importing. Forked ranks do not inherit it."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


class Zygote:
    """Forks on request, reaps, reports."""

    def __init__(self, sock: socket.socket, lives: Lives) -> None:
        self.sock = sock
        self.lives = lives
        self.children: dict[int, tuple[int, int]] = {}
        self.wake_r, self.wake_w = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def send(self, **record: Any) -> None:
        self.sock.send(json.dumps(record).encode())

    def receive(self) -> dict[str, Any] | None:
        """The next order, None when the controller is gone."""
        try:
            packet = self.sock.recv(MAX_PACKET_BYTES)
        except ConnectionResetError:
            return None
        order: dict[str, Any] | None = json.loads(packet) if packet else None
        return order

    def serve(self) -> None:
        """Until the controller is gone; then no child is left running, or stopped. If we end otherwise they live on."""
        end_with_parent(signal.SIGCONT)  # to see the end of its channel, if stopped
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self.wake_w, warn_on_full_buffer=False)
        gc.freeze()  # children share the pages of everything imported so far
        try:
            self.send(event="ready")
        except OSError:
            return  # the controller is gone
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        poll.register(self.wake_r, select.POLLIN)
        while True:
            for fd, _ in poll.poll():
                if fd == self.wake_r:
                    os.read(self.wake_r, 4096)
                    self.reap()
                else:
                    order = self.receive()
                    if order is None:
                        for pid in self.children:
                            os.kill(pid, signal.SIGKILL)  # nobody else waits for it, so it is still that process
                        return
                    self.spawn(order)

    def reap(self) -> None:
        while self.children:
            try:
                info = os.waitid(os.P_ALL, 0, os.WEXITED | os.WSTOPPED | os.WNOHANG)
            except ChildProcessError:
                return
            if info is None:
                return
            rank, incarnation = self.children.get(info.si_pid, (-1, -1))
            event = "stopped" if info.si_code in (os.CLD_STOPPED, os.CLD_TRAPPED) else "exited"
            if event == "exited":
                self.children.pop(info.si_pid, None)
            signalled = info.si_code in (os.CLD_KILLED, os.CLD_DUMPED, os.CLD_STOPPED)
            status = f"signal {signal_name(info.si_status)}" if signalled else f"status {info.si_status}"
            self.send(event=event, rank=rank, incarnation=incarnation, pid=info.si_pid, status=status)

    def spawn(self, order: dict[str, Any]) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        which = {"rank": order["rank"], "incarnation": order["incarnation"]}
        try:
            holds_r, holds_w = os.pipe()
            try:
                pid = os.fork()
            except OSError:
                os.close(holds_w)
                os.close(holds_r)
                raise
        except OSError as error:  # no descriptor, process or memory is left
            self.send(event="exited", **which, pid=0, status=f"no process can be started: {error.strerror}")
            return
        if pid == 0:
            self._become(order, holds_r, holds_w)
        os.close(holds_w)
        os.read(holds_r, 1)  # until the child has its cell, or has ended
        os.close(holds_r)
        self.children[pid] = (order["rank"], order["incarnation"])
        self.send(event="spawned", **which, pid=pid)

    def _become(self, order: dict[str, Any], holds_r: int, holds_w: int) -> None:
        """In the child: forget the zygote and be a rank. Never returns."""
        status = 1
        try:
            self.lives.hold(order["cell"])
            os.close(holds_w)
            os.close(holds_r)
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.close(self.wake_r)
            os.close(self.wake_w)
            self.sock.close()
            os.setsid()  # Ctrl-C and Ctrl-Z in a terminal are for the controller alone
            status = resolve(order["target"])(order["config"])
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="elastic-ep-zygote", description="Internal: forks rank processes for a controller.")
    parser.add_argument("--fd", type=int, required=True, help="inherited socket to the controller")
    parser.add_argument("--lives-fd", type=int, required=True, help="inherited memory for signs of life")
    parser.add_argument("--preload", required=True, metavar="MODULE:FUNCTION", help="called once, before the first fork")
    parser.add_argument("--preload-argument", default="")
    options = parser.parse_args(argv)
    end_with_parent()
    resolve(options.preload)(options.preload_argument)
    Zygote(socket.socket(fileno=options.fd), Lives(options.lives_fd)).serve()


if __name__ == "__main__":
    main()
