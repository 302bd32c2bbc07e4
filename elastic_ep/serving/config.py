"""What `elastic-ep serve` is told, checked once. Environment variables play no part."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from elastic_ep.brain.load_recorder import WINDOWS_USED
from elastic_ep.brain.planner import PlanSettings
from elastic_ep.brain.scheduler import SchedulerLimits
from elastic_ep.brain.settings import BrainSettings
from elastic_ep.core.errors import InvalidInputError
from elastic_ep.core.links import LinkSpeeds
from elastic_ep.core.topology import Topology
from elastic_ep.models.kernels import kernels
from elastic_ep.models.spec import ModelSpec
from elastic_ep.runtime.faults import RANK_POINTS, parse_fault
from elastic_ep.serving.remote import RemoteRanks

INTEGRATED = ("mooncake", "nixl")
"""dispatch backends that are other projects' libraries"""
TRACE_WINDOWS = 4096
"""windows of expert loads that are kept in memory for the trace file"""
GPU_SPEEDS = LinkSpeeds(same_node=2e9, other_node=1e9, host=50e9, checkpoint=5e9)
"""the same where slots are in GPU memory: a peer's experts come over sockets, the host's backup over PCIe"""
HOST_SPEEDS = LinkSpeeds(same_node=2e9, other_node=1e9, host=5e9, checkpoint=1.5e9)
"""bytes per second on a CPU host, assumed, with a checkpoint on a disk and not in the page cache; they only choose among sources"""
_FLAGS = {
    "kv_tokens": "--kv-tokens",
    "max_sequences": "--max-num-seqs",
    "max_batch_tokens": "--max-num-batched-tokens",
    "prefill_chunk": "--prefill-chunk",
    "max_waiting": "--max-waiting",
    "staging_bytes": "--staging-bytes",
    "step_timeout_s": "--step-timeout",
    "heartbeat_timeout_s": "--heartbeat-timeout",
    "start_timeout_s": "--start-timeout",
    "restart_backoff_s": "--restart-backoff",
    "restart_backoff_max_s": "--restart-backoff-max",
}


@dataclass(frozen=True)
class ServeConfig:
    """One server: a checkpoint over `ep_size` ranks, of this host unless `remote` says otherwise.

    Attributes:
        num_redundant_experts: physical slots per layer beyond one per expert; rounded up so that slots divide over the ranks.
        kv_tokens: positions of KV each rank can hold.
        when_short: with fewer live slots than experts, "stream" the rest through a spare buffer, or "refuse" with 503.
        restart: "always" gives a dead rank's seat a new process, which rejoins while the others serve; "never" leaves it empty.
        host_backup: "experts" keeps a copy of all experts in the host's memory; "off" does not.
        rebalance_bytes_per_s: what background loading may read on each rank; 0 is as fast as it goes.
        staging_bytes: what a rank may hold beside its slots while experts move in the background.
        scrub_bytes_per_s: how fast a rank looks whether its slots still hold what was verified; 0 never.
        peer_reads: "memory" copies experts out of the memory of ranks on the same host where the system permits; "socket" has them sent.
        rebalance_interval_s: how often to look whether another placement would serve the recorded load better; 0 never.
        rebalance_min_gain: by what share the busiest ranks must get faster for experts to be moved.
        load_trace: a .npz file for the recorded loads, [windows, L, E], written when the server stops.
        drain: what happens to the requests of a rank that is drained, unless the request says: "move" or "finish".
        remote: which of the ranks live on other hosts; None for none.
        device: "cpu", or "cuda": rank r on GPU r of its host, counted round.
        dispatch: the backend of dispatch and combine: "socket" (also between GPUs, through pinned memory), "cuda", "mooncake" or "nixl".
        mooncake_ib_device: RDMA devices for Mooncake (`parse_ib_devices`); "" for all.
        detect: False switches failure detection off (benchmarks only: what does being elastic cost?).
        faults: rank -> list of {"point", "action", "nth"}; for tests.
        fault_file: where running ranks look for faults (see `FaultFile`); for tests.
        start_timeout_s: for a rank's process to start and to read dense weights.
        restart_backoff_s: wait before a dead rank's seat gets a new process, doubled up to `restart_backoff_max_s` while they die quickly.
    """

    checkpoint: str
    ep_size: int
    num_redundant_experts: int = 0
    dtype: str | None = None
    fast_math: bool = False
    kv_tokens: int = 32768
    max_sequences: int = 64
    max_batch_tokens: int = 512
    prefill_chunk: int = 128
    max_waiting: int = 1024
    max_model_len: int | None = None
    served_model_name: str | None = None
    when_short: str = "stream"
    step_timeout_s: float = 10.0
    heartbeat_timeout_s: float = 0.9
    restart: str = "always"
    host_backup: str = "off"
    rebalance_bytes_per_s: float = 0.0
    staging_bytes: int = 1 << 30
    scrub_bytes_per_s: float = 32e6
    peer_reads: str = "memory"
    rebalance_interval_s: float = 60.0
    rebalance_min_gain: float = 0.05
    load_trace: str | None = None
    drain: str = "move"
    device: str = "cpu"
    dispatch: str = "socket"
    mooncake_ib_device: str = ""
    detect: bool = True
    log_level: str = "WARNING"
    remote: RemoteRanks | None = None
    faults: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    fault_file: str = ""
    start_timeout_s: float = 300.0
    restart_backoff_s: float = 0.5
    restart_backoff_max_s: float = 30.0

    def __post_init__(self) -> None:
        if self.ep_size < 1:
            raise InvalidInputError(f"--ep-size is {self.ep_size}; give at least 1")
        if self.dispatch == "cuda" and (self.device != "cuda" or self.remote is not None):
            raise InvalidInputError("--dispatch cuda is for ranks on the GPUs of this host: give --device cuda and no --remote-ranks")
        if self.dispatch in INTEGRATED and self.device != "cuda":
            raise InvalidInputError(f"--dispatch {self.dispatch} moves rows between GPUs: give --device cuda")
        if self.mooncake_ib_device and self.dispatch != "mooncake":
            raise InvalidInputError(f"--mooncake-ib-device is for --dispatch mooncake, not {self.dispatch}")
        if not 0 <= self.rebalance_bytes_per_s < float("inf"):
            raise InvalidInputError(f"--rebalance-bytes-per-second is {self.rebalance_bytes_per_s:g}; give 0 (no limit) or more")
        if not 0 <= self.scrub_bytes_per_s < float("inf"):
            raise InvalidInputError(f"--scrub-bytes-per-second is {self.scrub_bytes_per_s:g}; give 0 (never) or more")
        if self.peer_reads not in ("memory", "socket"):
            raise InvalidInputError(f"--peer-reads is {self.peer_reads!r}; give memory or socket")
        if not 0 <= self.rebalance_interval_s < float("inf"):
            raise InvalidInputError(f"--rebalance-interval is {self.rebalance_interval_s:g}; give seconds, or 0 for never")
        if not 0 <= self.rebalance_min_gain < float("inf"):
            raise InvalidInputError(f"--rebalance-min-gain is {self.rebalance_min_gain:g}; give a share of 0 or more, as 0.05")
        if self.load_trace is not None and not self.load_trace.endswith(".npz"):
            raise InvalidInputError(f"--load-trace is {self.load_trace!r}; give a file that ends in .npz")
        if self.load_trace is not None and not os.access(Path(self.load_trace).absolute().parent, os.W_OK | os.X_OK):
            raise InvalidInputError(f"--load-trace is {self.load_trace!r}, which we cannot write; give a file in another folder")
        at_least_one = ("kv_tokens", "max_sequences", "max_batch_tokens", "prefill_chunk", "max_waiting", "staging_bytes")
        for name, value in ((name, getattr(self, name)) for name in at_least_one):
            if value < 1:
                raise InvalidInputError(f"{_FLAGS[name]} is {value}; give at least 1")
        positive = ("step_timeout_s", "heartbeat_timeout_s", "start_timeout_s", "restart_backoff_s", "restart_backoff_max_s")
        for name, value in ((name, getattr(self, name)) for name in positive):
            if not 0 < value < float("inf"):
                raise InvalidInputError(f"{_FLAGS[name]} is {value:g}; give seconds above 0")
        if self.max_sequences > self.max_batch_tokens:
            raise InvalidInputError(
                f"--max-num-batched-tokens is {self.max_batch_tokens}, less than the {self.max_sequences} sequences that may decode "
                f"on a rank at once; give at least {self.max_sequences}, or a lower --max-num-seqs"
            )
        for rank, faults in self.faults.items():
            if rank >= self.ep_size:
                raise InvalidInputError(f"--fault names rank {rank}, --ep-size is {self.ep_size}; ranks are 0 to {self.ep_size - 1}")
            for fault in faults:
                if parse_fault(**fault).point not in RANK_POINTS:
                    raise InvalidInputError(f"--fault names {fault['point']!r}, no place in a rank; give it in a --fault-file")

    @property
    def num_seats(self) -> int:
        """Ranks that dispatch backends with buffers have seats for; cuda's also for those that join later."""
        return 2 * self.ep_size if self.dispatch == "cuda" else self.ep_size

    def topology(self, num_experts: int) -> Topology:
        """Slots evenly over the ranks: E + redundant, rounded up to a multiple of the ranks."""
        if self.ep_size > num_experts:
            raise InvalidInputError(f"--ep-size is {self.ep_size}, more than the model's {num_experts} experts; give at most {num_experts}")
        if self.num_redundant_experts < 0:
            raise InvalidInputError(f"--num-redundant-experts is {self.num_redundant_experts}; give 0 or more")
        per_rank = -(-(num_experts + self.num_redundant_experts) // self.ep_size)
        if per_rank > num_experts:
            most = (num_experts - 1) * self.ep_size
            raise InvalidInputError(
                f"--num-redundant-experts is {self.num_redundant_experts}: {per_rank} slots per rank, but only {num_experts} experts "
                f"to fill them; give at most {most}"
            )
        return Topology((per_rank,) * self.ep_size, {} if self.remote is None else {"node": self.remote.labels(self.ep_size)})

    def host_slots(self, num_experts: int) -> int:
        """Slots of a layer that this host's memory holds: none if they are on GPUs."""
        local = self.ep_size - (0 if self.remote is None else self.remote.num_ranks)
        return sum(self.topology(num_experts).slots_per_rank[:local]) if self.device == "cpu" else 0

    def model_len(self, spec: ModelSpec) -> int:
        """Longest prompt + completion: what the model, the KV and `--max-model-len` allow."""
        limit = min(spec.max_positions, self.limits().kv_tokens)
        if self.max_model_len is None:
            return limit
        if not 1 <= self.max_model_len <= limit:
            raise InvalidInputError(
                f"--max-model-len is {self.max_model_len}; give 1 to {limit} "
                f"(the model has {spec.max_positions} positions, a rank holds {self.kv_tokens} tokens of KV)"
            )
        return self.max_model_len

    def limits(self) -> SchedulerLimits:
        """KV in whole pages, as the engine has it."""
        page: int = kernels().TILE
        kv_tokens = -(-self.kv_tokens // page) * page
        return SchedulerLimits(kv_tokens, self.max_sequences, self.max_batch_tokens, self.prefill_chunk, page)

    def brain_settings(self, spec: ModelSpec) -> BrainSettings:
        if self.dispatch in INTEGRATED and (self.dtype or spec.dtype) != "bfloat16":
            raise InvalidInputError(
                f"--dispatch {self.dispatch} moves bfloat16 rows, the model computes in {self.dtype or spec.dtype}; give --dtype bfloat16"
            )
        slot_bytes = spec.slot_bytes(self.dtype)
        return BrainSettings(
            topology=self.topology(spec.num_experts),
            num_layers=spec.num_layers,
            bytes_per_expert=slot_bytes,
            plan=PlanSettings(
                spec.num_experts,
                stream_when_short=self.when_short == "stream",
                expert_bytes=slot_bytes,
                speeds=HOST_SPEEDS if self.device == "cpu" else GPU_SPEEDS,
                staging_slots=max(1, self.staging_bytes // slot_bytes),
                spread="rank" if self.remote is None else "node",
            ),
            limits=self.limits(),
            boot_timeout_s=self.start_timeout_s,
            install_timeout_s=self.step_timeout_s,
            heartbeat_timeout_s=self.heartbeat_timeout_s if self.detect else float("inf"),
            step_timeout_s=self.step_timeout_s,
            restart=self.restart == "always",
            restart_backoff_s=self.restart_backoff_s,
            restart_backoff_max_s=max(self.restart_backoff_s, self.restart_backoff_max_s),
            stage_bytes_per_s=self.rebalance_bytes_per_s,
            max_waiting=self.max_waiting,
            rebalance_interval_s=self.rebalance_interval_s,
            rebalance_min_gain=self.rebalance_min_gain,
            load_windows_kept=WINDOWS_USED if self.load_trace is None else TRACE_WINDOWS,
            load_window_s=max(1.0, self.rebalance_interval_s / 4) if self.rebalance_interval_s else 10.0,
        )
