"""The program of a rank process: a Hugging Face model behind the rank's loop. The launcher names `rank_main` and `preload` by path."""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import signal
import socket
from pathlib import Path
from typing import Any, NamedTuple

import torch

from elastic_ep.core.errors import InvalidInputError
from elastic_ep.models.engine import ElasticEngine
from elastic_ep.models.spec import inspect_checkpoint
from elastic_ep.runtime.dispatch.base import MeshDispatcher
from elastic_ep.runtime.dispatch.faulty import FaultyDispatcher
from elastic_ep.runtime.dispatch.socket import SocketDispatcher
from elastic_ep.runtime.faults import FaultFile, FaultPlan, parse_fault
from elastic_ep.runtime.launch.zygote import resolve
from elastic_ep.runtime.rank import run
from elastic_ep.runtime.rank_config import RankConfig


def preload(checkpoint: str) -> None:
    """Import, once and before any fork, what every rank of this checkpoint needs. Touches no GPU: a driver does not survive a fork."""
    model_type = json.loads((Path(checkpoint) / "config.json").read_text())["model_type"]
    importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")
    if torch.version.cuda is not None and importlib.util.find_spec("triton") is not None:
        importlib.import_module("elastic_ep.models.gpu.engine")


class DispatchConfig(NamedTuple):
    """The dispatch backend of all ranks.

    Attributes:
        backend: "socket", "cuda", or another that `factory` makes (`module:function`, see integrations/ranks.py).
        num_seats, max_tokens: of backends with buffers: ranks at most, and tokens of one rank in a step.
        store: where ranks meet that need such a place, "tcp:HOST:PORT"; ib_devices: as given to the server.
    """

    backend: str
    num_seats: int
    max_tokens: int
    factory: str = ""
    store: str = ""
    ib_devices: str = ""


def make_engine(device: str, options: dict[str, Any]) -> ElasticEngine:
    """The engine of a rank on this kind of device; on GPUs, rank r takes number r of those that are visible, counted round."""
    if device == "cpu":
        return ElasticEngine(**options)
    from elastic_ep.models.gpu.engine import DeviceEngine

    return DeviceEngine(**options, device=gpu_of(options["rank"]))


def gpu_of(rank: int) -> int:
    """Raises InvalidInputError where there is none."""
    if not torch.cuda.is_available():
        raise InvalidInputError("--device cuda: torch sees no GPU in the rank's process; serve with --device cpu, or mend the driver")
    return rank % torch.cuda.device_count()


def make_backend(
    rank: RankConfig, dispatch: DispatchConfig, device: str, engine: dict[str, Any], control: socket.socket, faults: FaultPlan
) -> MeshDispatcher:
    """The dispatcher of a rank."""
    if dispatch.backend == "cuda":
        from elastic_ep.models.gpu.graphs import graph_size
        from elastic_ep.runtime.dispatch.cuda.dispatcher import CudaDispatcher
        from elastic_ep.runtime.dispatch.cuda.region import Capacity

        spec = inspect_checkpoint(engine["checkpoint_dir"])
        capacity = Capacity(
            dispatch.num_seats,
            spec.num_experts,
            spec.num_layers,
            graph_size(dispatch.max_tokens),
            spec.num_experts_per_tok,
            spec.hidden_size,
            2 if (engine["dtype"] or spec.dtype) == "bfloat16" else 4,
            max_replicas=dispatch.num_seats,
        )
        return CudaDispatcher(
            rank.rank,
            rank.listen,
            capacity,
            token=rank.token,
            device=gpu_of(rank.rank),
            interrupt=control,
            deadline_s=rank.exchange_timeout_s,
            shares=any(gpu_of(other) == gpu_of(rank.rank) for other in range(rank.ep_size) if other != rank.rank),
        )
    if dispatch.factory:
        spec = inspect_checkpoint(engine["checkpoint_dir"])
        sizes = {
            "ep_size": dispatch.num_seats,
            "experts_per_rank": spec.num_experts,  # the last rank serves all of them, from slots or streamed
            "max_tokens": dispatch.max_tokens,
            "top_k": spec.num_experts_per_tok,
            "hidden": spec.hidden_size,
        }
        made: MeshDispatcher = resolve(dispatch.factory)(
            dispatch.backend,
            rank.rank,
            sizes,
            store=dispatch.store,
            gpu=gpu_of(rank.rank),
            ib_devices=dispatch.ib_devices,
            timeout_s=rank.exchange_timeout_s,
            interrupt=control,
        )
        return made
    watcher = faults or None
    mesh = SocketDispatcher(rank.rank, rank.listen, token=rank.token, interrupt=control, deadline_s=rank.exchange_timeout_s, faults=watcher)
    if device == "cpu":
        return mesh
    from elastic_ep.runtime.dispatch.staged import StagedDispatcher

    return StagedDispatcher(mesh, torch.device("cuda", gpu_of(rank.rank)))


def rank_main(config: dict[str, Any]) -> int:
    """Be a rank. `config` holds the fields of RankConfig under "rank", of the engine under "engine", where to compute under "device" ("cpu"
    or "cuda"), the dispatch backend under "dispatch" (a `DispatchConfig`), a list of faults and a fault file."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(level=config["log_level"], format=f"%(asctime)s rank {config['rank']['rank']} %(levelname)s %(message)s")
    torch.set_num_threads(1)
    rank = RankConfig(**config["rank"])
    faults = [parse_fault(**fault) for fault in config["faults"]]
    file = FaultFile(config["fault_file"]) if config.get("fault_file") else None

    def make_dispatcher(control: socket.socket, faults: FaultPlan) -> MeshDispatcher:
        inner = make_backend(rank, DispatchConfig(**config["dispatch"]), config["device"], config["engine"], control, faults)
        return FaultyDispatcher(inner, faults) if faults else inner

    return run(
        rank,
        make_engine=lambda: make_engine(config["device"], config["engine"]),
        make_dispatcher=make_dispatcher,
        make_faults=lambda control: FaultPlan(faults, control, rank=rank.rank, file=file),
    )
