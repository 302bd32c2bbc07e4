"""What a deployment is taken to be: shape, speeds, and how long the things take that are not simulated."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from elastic_ep.brain.planner import PlanSettings
from elastic_ep.brain.scheduler import SchedulerLimits
from elastic_ep.brain.settings import BrainSettings
from elastic_ep.core.links import LinkSpeeds
from elastic_ep.core.topology import Topology

NEVER_S = 1e9


@dataclass(frozen=True)
class Prices:
    """Seconds of what is not worked out from bytes.

    Attributes:
        detect_s: from the fault to the controller's knowledge: silence, or a step that hangs; an exit is seen in milliseconds.
        fence_s: until the process is gone.
        plan_s: solving and telling everyone.
        install_s: matching the mesh and swapping tables, besides loads.
        resume_s: the first step, with the prefills of requests whose home died.
        replace_s: until a healthy GPU takes the dead one's seat.
        dense_s: reading dense weights there.
    """

    detect_s: float = 1.0
    fence_s: float = 0.05
    plan_s: float = 0.3
    install_s: float = 0.1
    resume_s: float = 0.5
    replace_s: float = 600.0
    dense_s: float = 60.0


@dataclass(frozen=True)
class Setup:
    """A group to simulate.

    Attributes:
        num_layers, num_experts, expert_bytes: of the model.
        placed_layers: layers that are placed; where that is fewer than num_layers, each stands for several alike.
        load: float [placed_layers, E], None for an even one.
    """

    ep_size: int
    slots_per_rank: int
    ranks_per_node: int
    num_layers: int
    num_experts: int
    expert_bytes: int
    placed_layers: int
    load: NDArray[np.float64] | None = None
    speeds: LinkSpeeds = field(default_factory=LinkSpeeds)
    prices: Prices = field(default_factory=Prices)
    tokens_per_s: float = 1000.0
    """of one rank when all live"""

    @property
    def bytes_of_load(self) -> int:
        """Of one load of a placed layer, with all layers that it stands for."""
        return self.expert_bytes * self.num_layers // self.placed_layers

    def topology(self) -> Topology:
        nodes = tuple(f"node{rank // self.ranks_per_node}" for rank in range(self.ep_size))
        return Topology((self.slots_per_rank,) * self.ep_size, {"node": nodes})

    def brain_settings(self) -> BrainSettings:
        """Patience without end: what is slow here is slow by the prices, not because it hangs."""
        return BrainSettings(
            self.topology(),
            self.placed_layers,
            self.bytes_of_load,
            PlanSettings(self.num_experts, expert_bytes=self.bytes_of_load, speeds=self.speeds),
            SchedulerLimits(kv_tokens=1),
            heartbeat_timeout_s=NEVER_S,
            boot_timeout_s=NEVER_S,
            install_timeout_s=NEVER_S,
            restart=True,
            restart_limit=1 << 30,
        )
