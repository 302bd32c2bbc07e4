"""Who lives: one immutable record per epoch. A change of members makes a new epoch; nothing edits an old one."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Membership:
    """The ranks that take part, under one epoch.

    Attributes:
        epoch: grows by one with each change. What carries an older epoch is refused (a fencing token).
        active: 1 = alive, one entry per rank, length ``ep_size`` (dead ranks included).
    """

    epoch: int
    active: tuple[int, ...]

    @classmethod
    def all_active(cls, ep_size: int, epoch: int = 0) -> Membership:
        return cls(epoch, (1,) * ep_size)

    @property
    def ep_size(self) -> int:
        return len(self.active)

    @property
    def ranks(self) -> tuple[int, ...]:
        """Ids of the active ranks, ascending."""
        return tuple(r for r, a in enumerate(self.active) if a)

    def is_active(self, rank: int) -> bool:
        return 0 <= rank < len(self.active) and self.active[rank] == 1
