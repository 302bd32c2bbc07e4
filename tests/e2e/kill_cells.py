"""The cells of the kill matrix and the faults that each stands for, as data: which trigger must come first, and who is the victim."""

from __future__ import annotations

import enum
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from elastic_ep.runtime.faults import AGENT_POINTS, FRAME_POINTS, POINTS, SHELL_POINTS, FaultAction

EP_SIZE = 4
JOINER = EP_SIZE
"""the seat that an operation adds and takes away again"""
AGENT_RANKS = (2, 3)
"""each has an agent of its own, where there are agents"""

WHO = ("home", "another", "rank 0", "two at once", "in a recovery")
"""the last: a fault during the recovery of another rank, or in the process that takes a dead rank's place"""


class Setting(enum.Enum):
    """What a server must be started with for a point to be reached."""

    PLAIN = "ranks of one host"
    SOCKETS = "experts of other ranks sent over sockets"
    BACKUP = "with a backup in the host's memory"
    AGENTS = "two of the ranks on other hosts"


IN_STEP = ("step_begin", "dispatch_begin", *FRAME_POINTS, "dispatch_end", "combine_begin", "combine_end", "step_end", "step_told")
IN_INSTALL = ("install_begin", "install_connected", "install_end", "install_told")
IN_STAGE = ("stage_begin", "stage_expert", "stage_end", "stage_told")
IN_JOIN = ("hello_said", "dense_loaded", "dense_told", *IN_STAGE, "load_expert", "expert_loaded")
IN_SOCKET = ("serve_expert", "serve_length", "serve_end")
IN_PEER = ("serve_addresses", *IN_SOCKET)
IN_BACKUP = ("backup_begin", "backup_bytes", "backup_end")
SHELL_STEP = ("send_step", "step_sent", "commit", "emitted")
SHELL_RECOVERY = (
    *("fencing_begin", "fencing_end", "planning_begin", "planning_end", "installing_begin", "installing_end"),
    *("send_install", "install_sent", "resuming_begin", "resuming_end", "serving_begin", "serving_end"),
)
SHELL_JOIN = ("rank_start", "rank_asked", "rank_spawned", "rank_connected", "change_begin", "send_stage", "stage_sent")
SHELL_OPERATION = ("operation_begin", "operation_grow", "operation_retire", "operation_end")
SHELL_SEATS = ("seats_offered", "seats_given", "seats_lost")
AGENT_ARRIVES = ("agent_terms", "agent_offered", "agent_seated")
AGENT_WORKS = tuple(point for point in AGENT_POINTS if point not in AGENT_ARRIVES and point != "agent_beat")
GROUPS = (IN_STEP, IN_INSTALL, IN_JOIN, IN_PEER, IN_BACKUP, SHELL_STEP, SHELL_RECOVERY, SHELL_JOIN, SHELL_OPERATION, SHELL_SEATS)
GROUPS += (AGENT_ARRIVES, AGENT_WORKS, ("agent_beat",))

HARMLESS = {(point, "wedge") for point in ("stage_told", *IN_PEER, *IN_BACKUP)}
"""a thread that has nothing to do, or that nobody waits for, hangs: nobody has to notice"""


class Cell(NamedTuple):
    point: str
    action: str
    who: str

    def __str__(self) -> str:
        return f"{self.action} at {self.point}, {self.who}"

    @property
    def setting(self) -> Setting:
        if self.point in SHELL_SEATS or self.point in AGENT_POINTS:
            return Setting.AGENTS
        if self.point in IN_SOCKET:
            return Setting.SOCKETS
        return Setting.BACKUP if self.point in IN_BACKUP else Setting.PLAIN


def all_cells() -> list[Cell]:
    """Every point, action and choice of victims."""
    return [Cell(point, action.value, who) for point in POINTS for action in FaultAction for who in WHO]


def sample(seed: int, counts: dict[Setting, int]) -> list[Cell]:
    """So many cells of each setting, of different points as long as there are points."""
    rng = random.Random(seed)
    cells = []
    for setting, count in counts.items():
        names = [point for point in POINTS if Cell(point, "", "").setting is setting]
        points: list[str] = []
        while len(points) < count:
            points += rng.sample(names, len(names))
        cells += [Cell(point, rng.choice(list(FaultAction)).value, rng.choice(WHO)) for point in points[:count]]
    return cells


@dataclass(frozen=True)
class Cast:
    """Who is who in one cell.

    Attributes:
        home, another: a rank with requests and one without, as far as there are both.
        victims: those to whom the cell's fault is done; `bystanders` are the others, in some order.
        first_life: rank -> which process sits there when the cell begins.
    """

    home: int
    another: int
    victims: tuple[int, ...]
    bystanders: tuple[int, ...]
    first_life: tuple[int, ...]


def cast_of(cell: Cell, homes: Sequence[int], first_life: Sequence[int], rng: random.Random) -> Cast:
    """Choose. The ranks of `homes` have requests, the others none; an agent's part is its rank's."""
    ranks = AGENT_RANKS if cell.point in AGENT_POINTS else tuple(range(EP_SIZE))
    at_home = [rank for rank in ranks if rank in homes] or [*ranks]
    home = rng.choice(at_home)
    others = [rank for rank in ranks if rank != home]
    another = rng.choice([rank for rank in others if rank not in homes] or others)
    victims = {"home": (home,), "rank 0": (0,), "two at once": (home, another)}.get(cell.who, (another,))
    bystanders = [rank for rank in range(EP_SIZE) if rank not in victims]
    rng.shuffle(bystanders)
    return Cast(home, another, victims, tuple(bystanders), tuple(first_life))


Fault = dict[str, Any]


def fault(rank: int, point: str, action: str = "kill", nth: int = 1, after: int = -1, incarnation: int = 0) -> Fault:
    """As `FaultFile` takes it."""
    return {"rank": rank, "point": point, "action": action, "nth": nth, "after": after, "incarnation": incarnation}


def faults_of(cell: Cell, cast: Cast, rng: random.Random) -> list[Fault]:
    """The cell's faults: what leads to its point, then its own."""
    if cell.point in AGENT_POINTS:
        return _agent_faults(cell, cast, rng)
    if cell.point in SHELL_POINTS:
        return _shell_faults(cell, cast, rng)
    return _rank_faults(cell, cast, rng)


def _rank_faults(cell: Cell, cast: Cast, rng: random.Random) -> list[Fault]:
    point, action, victims, (by, by2, *_) = cell.point, cell.action, cast.victims, cast.bystanders
    nested = cell.who == "in a recovery"
    death = fault(by, "step_begin", nth=2)
    if point in IN_STEP or point in IN_BACKUP:
        first = [death] if nested else []
        nth = 1 if nested or point in IN_BACKUP else rng.randint(1, 20 if point in FRAME_POINTS else 6)
        return first + [fault(v, point, action, nth, len(first) - 1) for v in victims]
    if point in IN_INSTALL:
        first = [death, fault(by2, "install_begin", after=0)] if nested else [death]
        return first + [fault(v, point, action, after=len(first) - 1) for v in victims]
    if point in IN_PEER:
        # whichever rank is asked: who is, is the transfer plan's choice
        return [death] + [fault(-1, point, action, after=0) for _ in victims] + ([fault(by2, "step_begin", after=1)] if nested else [])
    deaths = [fault(v, "step_begin", nth=2) for v in victims]
    joiners = [fault(v, point, action, after=i) for i, v in enumerate(victims)]
    return deaths + joiners + ([fault(by, "step_begin", after=1)] if nested else [])


def _shell_faults(cell: Cell, cast: Cast, rng: random.Random) -> list[Fault]:
    """Done to a rank by the controller. "In a recovery" means, where there is one, the process that takes a dead rank's place."""
    point, action, victims, by = cell.point, cell.action, cast.victims, cast.bystanders[0]
    nested = cell.who == "in a recovery"
    victim = victims[0]
    death = fault(by, "step_begin", nth=2)
    replaced = [fault(victim, "step_begin", nth=2)]
    replacement = {"incarnation": cast.first_life[victim] + 1}
    if point in SHELL_OPERATION:
        if nested and point == "operation_retire":  # the leaver is given up already: another falls while one recovers
            return [fault(by, "operation_begin"), fault(victim, point, action, after=0)]
        return [fault(v, point, action) for v in ((JOINER,) if nested else victims)]
    if point in SHELL_SEATS:
        cut = rng.choice(AGENT_RANKS)
        standing = [rank for rank in range(EP_SIZE) if rank != cut]
        first = [fault(next(b for b in cast.bystanders if b != cut), "step_begin", nth=2)] if nested else []
        first.append(fault(cut, "agent_beat", "close", after=len(first) - 1))
        chosen = [v for v in victims if v != cut] or [next(rank for rank in standing if rank != first[0]["rank"])]
        if cell.who == "two at once":
            chosen = chosen[:1] + rng.sample([rank for rank in standing if rank not in chosen[:1]], 1)
        return first + [fault(v, point, action, after=len(first) - 1) for v in chosen]
    if nested and point in SHELL_RECOVERY:
        return [*replaced, fault(by, "rank_connected", after=0), fault(victim, point, action, after=1) | replacement]
    if nested:
        return [*replaced, fault(victim, point, action, after=0) | replacement]
    first = [] if point in SHELL_STEP else [death]
    nth = rng.randint(1, 6) if point in SHELL_STEP else 1
    return first + [fault(v, point, action, nth, len(first) - 1) for v in victims]


def _agent_faults(cell: Cell, cast: Cast, rng: random.Random) -> list[Fault]:
    """In an agent, named by its rank. With "rank 0" that rank, which has none, dies at the same time."""
    point, action = cell.point, cell.action
    agents = [rank for rank in cast.victims if rank in AGENT_RANKS] or [rng.choice(AGENT_RANKS)]
    zero = [fault(0, "step_begin", nth=2)] if cell.who == "rank 0" else []
    if cell.who == "in a recovery":
        zero = [fault(next(rank for rank in cast.bystanders if rank not in AGENT_RANKS), "step_begin", nth=2)]
    after = len(zero) - 1
    if point == "agent_beat":
        return zero + [fault(agent, point, action, after=after) for agent in agents]
    if point in AGENT_ARRIVES:
        first = [fault(agent, "agent_beat", "close", after=after) for agent in agents]
    else:
        first = [fault(agent, "step_begin", after=after) for agent in agents]
    return zero + first + [fault(agent, point, action, after=len(zero) + i) for i, agent in enumerate(agents)]
