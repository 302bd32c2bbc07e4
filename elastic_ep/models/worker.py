"""The program of a rank process: a Hugging Face model behind the rank's loop. The launcher names `rank_main` and `preload` by path."""

from __future__ import annotations

import importlib
import json
import logging
import signal
import socket
from pathlib import Path
from typing import Any

import torch

from elastic_ep.models.engine import ElasticEngine
from elastic_ep.runtime.dispatch.base import MeshDispatcher
from elastic_ep.runtime.dispatch.faulty import FaultyDispatcher
from elastic_ep.runtime.dispatch.socket import SocketDispatcher
from elastic_ep.runtime.faults import FaultFile, FaultPlan, parse_fault
from elastic_ep.runtime.rank import run
from elastic_ep.runtime.rank_config import RankConfig


def preload(checkpoint: str) -> None:
    """Import, once and before any fork, what every rank of this checkpoint needs."""
    model_type = json.loads((Path(checkpoint) / "config.json").read_text())["model_type"]
    importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")


def rank_main(config: dict[str, Any]) -> int:
    """Be a rank. `config` holds the fields of RankConfig under "rank", of the engine under "engine", a list of faults and a fault file."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(level=config["log_level"], format=f"%(asctime)s rank {config['rank']['rank']} %(levelname)s %(message)s")
    torch.set_num_threads(1)
    rank = RankConfig(**config["rank"])
    faults = [parse_fault(**fault) for fault in config["faults"]]
    file = FaultFile(config["fault_file"]) if config.get("fault_file") else None

    def make_dispatcher(control: socket.socket, faults: FaultPlan) -> MeshDispatcher:
        watcher = faults or None
        inner = SocketDispatcher(
            rank.rank, rank.listen, token=rank.token, interrupt=control, deadline_s=rank.exchange_timeout_s, faults=watcher
        )
        return FaultyDispatcher(inner, faults) if watcher else inner

    return run(
        rank,
        make_engine=lambda: ElasticEngine(**config["engine"]),
        make_dispatcher=make_dispatcher,
        make_faults=lambda control: FaultPlan(faults, control, rank=rank.rank, file=file),
    )
