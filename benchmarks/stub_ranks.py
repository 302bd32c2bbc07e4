"""Ranks without a model: they say what a rank says and answer at once. Shared by the benchmarks of the control plane."""

from __future__ import annotations

import os
import threading
import time
from types import SimpleNamespace
from typing import Any

from elastic_ep.brain.messages import (
    DenseLoaded,
    Heartbeat,
    Hello,
    Install,
    Installed,
    LoadedSlot,
    RunStep,
    SampledToken,
    Stage,
    Staged,
    StepDone,
)
from elastic_ep.runtime.control.address import connect
from elastic_ep.runtime.control.wire import encode, receive
from elastic_ep.serving.controller import Controller
from elastic_ep.serving.local_ranks import LocalRanks


def spec(num_experts: int, num_layers: int = 4) -> Any:
    """A model that is nothing but numbers."""
    sizes = {"expert_bytes": 1, "max_positions": 1 << 20, "vocab_size": 100, "slot_bytes": lambda dtype: 1}
    return SimpleNamespace(num_experts=num_experts, num_layers=num_layers, **sizes)


def answer(message: Any) -> Any:
    """What a rank answers, None to what needs no answer."""
    match message:
        case Install():
            loaded = tuple(LoadedSlot(order.layer, order.slot, order.expert, 1) for order in message.loads)
            return Installed(message.epoch, loaded, {}, 0.0)
        case Stage():
            return Staged(message.change, {})
        case RunStep():
            tokens = tuple(SampledToken(work.seq_id, 7) for work in message.work if work.sample is not None)
            return StepDone(message.epoch, message.step, tokens, 0.0)


def preload(_: str) -> None:
    """Nothing to import."""


def stub_rank(config: dict[str, Any]) -> int:
    """A rank process (the launcher's target): one control channel, one heartbeat thread, steps of `step_s` seconds."""
    sock = connect(config["controller"], 10.0)
    lock = threading.Lock()

    def send(message: Any) -> None:
        with lock:
            sock.sendall(encode(message))

    def beat() -> None:
        while True:
            time.sleep(config["heartbeat_s"])
            try:
                send(Heartbeat(0))
            except OSError:
                os._exit(3)

    send(Hello(config["rank"], 0, os.getpid(), "stub", config["token"], f"unix:/stub{config['rank']}"))
    threading.Thread(target=beat, daemon=True).start()
    send(DenseLoaded(0, 0.0))
    try:
        while (message := receive(sock)) is not None:
            if isinstance(message, RunStep):
                time.sleep(config["step_s"])
            reply = answer(message)
            if reply is not None:
                send(reply)
    except OSError:
        pass  # the controller is gone
    return 0


class StubRanks(LocalRanks):
    preload, target = "stub_ranks:preload", "stub_ranks:stub_rank"


class StubProcessController(Controller):
    """The real controller and launcher over stub processes."""

    ranks_class = StubRanks
    step_s = 0.002
    heartbeat_s = 0.1

    def _rank_program(self, rank: int, incarnation: int) -> dict[str, Any]:
        config = {"rank": rank, "controller": self._local.control, "token": self._token}
        return config | {"step_s": self.step_s, "heartbeat_s": self.heartbeat_s}
