"""What a rank process is started with: the configuration of `models/worker.py`'s `rank_main`, as plain data."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, NamedTuple

from elastic_ep.core.topology import Topology
from elastic_ep.runtime.control.address import tcp_address
from elastic_ep.runtime.rank_config import RankConfig
from elastic_ep.serving.config import INTEGRATED, ServeConfig

HEARTBEAT_INTERVAL_S = 0.1
NO_HEARTBEAT_S = 86400.0
GPU_FILL_BYTES_PER_S = 4e9
"""of the host backup, by each rank: the processor has little else to do"""


class RankPlace(NamedTuple):
    """Which process this is, and where it finds its controller."""

    rank: int
    incarnation: int
    controller: str
    run_dir: str
    token: str
    host_backup_fd: int
    store: str = ""
    """where ranks of a kernel-masked library meet"""


def rank_program(place: RankPlace, config: ServeConfig, topology: Topology, step_timeout_s: float) -> dict[str, Any]:
    """For one process. Faults are for a seat's first process only."""
    rank, incarnation = place.rank, place.incarnation
    listen = f"unix:{place.run_dir}/r{rank}.{incarnation}"
    if config.remote is not None:
        listen = f"{tcp_address(config.remote.host, 0)}#{incarnation}"  # an agent puts its own host here
    rank_config = RankConfig(
        rank,
        incarnation,
        place.controller,
        listen,
        place.token,
        int(topology.first_slot[rank]),
        exchange_timeout_s=step_timeout_s / 2,
        heartbeat_interval_s=HEARTBEAT_INTERVAL_S if config.detect else NO_HEARTBEAT_S,
        ep_size=topology.ep_size,
        host_backup_fd=place.host_backup_fd,
        fill_bytes_per_s=config.rebalance_bytes_per_s or (RankConfig.fill_bytes_per_s if config.device == "cpu" else GPU_FILL_BYTES_PER_S),
        scrub_bytes_per_s=config.scrub_bytes_per_s,
        reads_peer_memory=config.peer_reads == "memory" and config.device == "cpu" and config.remote is None,
    )
    engine = {
        "checkpoint_dir": str(config.checkpoint),
        "rank": rank,
        "local_slots": topology.slots_per_rank[rank],
        "dtype": config.dtype,
        "kv_tokens": config.kv_tokens,
        "fast_math": config.fast_math,
    }
    if config.device == "cuda":
        engine |= {"graph_tokens": config.max_batch_tokens, "max_sequences": config.max_sequences, "staging_bytes": config.staging_bytes}
    faults = config.faults.get(rank, []) if incarnation == 0 else []
    tests = {"faults": faults, "fault_file": config.fault_file}
    is_integrated = config.dispatch in INTEGRATED
    dispatch = {
        "backend": config.dispatch,
        "num_seats": config.num_seats,
        "max_tokens": config.max_batch_tokens,
        "factory": "elastic_ep.integrations.ranks:make_dispatcher" if is_integrated else "",
        "store": place.store,
        "ib_devices": config.mooncake_ib_device,
    }
    return {
        "rank": asdict(rank_config),
        "engine": engine,
        "device": config.device,
        "dispatch": dispatch,
        "log_level": config.log_level,
        **tests,
    }
