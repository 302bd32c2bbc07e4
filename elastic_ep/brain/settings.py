"""Everything the brain is told once. Frozen; derived values are properties."""

from __future__ import annotations

from dataclasses import dataclass

from elastic_ep.brain.load_recorder import WINDOWS_USED
from elastic_ep.brain.planner import PlanSettings
from elastic_ep.brain.scheduler import SchedulerLimits
from elastic_ep.core.topology import Topology


@dataclass(frozen=True)
class BrainSettings:
    """One group of ranks and how patient to be with it. Times in seconds.

    Attributes:
        num_layers: MoE layers.
        heartbeat_timeout_s: silence after which a rank counts as failed.
        step_timeout_s: a step or exchange that takes longer has a wedged rank in it. Ranks wait half of it for their peers.
        boot_timeout_s: from the start of the processes to dense weights loaded.
        install_timeout_s: for matching the mesh and swapping tables; `load_bytes_per_s` adds time for what must be read.
        load_bytes_per_s: the slowest source that is not called wedged.
        fence_timeout_s: a process that has not ended by then is shut out by its epoch alone.
        verdict_window_s: how long to collect accusations before judging, when the accused still seems alive.
        restart: whether a dead rank's seat gets a new process.
        restart_backoff_s: wait before it, doubled with each process in a row that was not a member for `restart_reset_s`, up to
            `restart_backoff_max_s`.
        restart_limit: so many in a row that never became a member, and the seat stays empty.
        stage_bytes_per_s: what background loading may read on each rank; 0 is as fast as it goes.
        max_waiting: requests that may wait; one more is refused.
        load_window_s: how finely expert loads are recorded; `load_windows_kept` is how many windows stay in memory.
        rebalance_interval_s: how often to look whether another placement would serve the recorded load better; 0 never.
        rebalance_min_gain: by how much the busiest ranks must get faster for experts to be moved, as a share.
    """

    topology: Topology
    num_layers: int
    bytes_per_expert: int
    plan: PlanSettings
    limits: SchedulerLimits
    heartbeat_timeout_s: float = 0.9
    step_timeout_s: float = 10.0
    boot_timeout_s: float = 300.0
    install_timeout_s: float = 10.0
    load_bytes_per_s: float = 20e6
    fence_timeout_s: float = 2.0
    verdict_window_s: float = 0.02
    restart: bool = False
    restart_backoff_s: float = 0.5
    restart_backoff_max_s: float = 30.0
    restart_reset_s: float = 10.0
    restart_limit: int = 5
    stage_bytes_per_s: float = 0.0
    max_waiting: int = 1024
    load_window_s: float = 10.0
    load_windows_kept: int = WINDOWS_USED
    rebalance_interval_s: float = 0.0
    rebalance_min_gain: float = 0.05

    def stage_deadline_s(self, num_loads: int) -> float:
        """For background loads of one rank: twice what its budget, or the slowest source, needs."""
        rate = min(self.stage_bytes_per_s or self.load_bytes_per_s, self.load_bytes_per_s)
        return self.install_timeout_s + 2 * num_loads * self.bytes_per_expert / rate

    def install_deadline_s(self, num_loads: int) -> float:
        return self.install_timeout_s + num_loads * self.bytes_per_expert / self.load_bytes_per_s
