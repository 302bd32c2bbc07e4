"""Who lives: one immutable record per epoch. A change of members makes a new epoch; nothing edits an old one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from elastic_ep.core.errors import InvalidInputError


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
    def active_ranks(self) -> NDArray[np.int32]:
        """int32 [ep_size], 1 = alive."""
        return np.array(self.active, dtype=np.int32)

    @property
    def ranks(self) -> tuple[int, ...]:
        """Ids of the active ranks, ascending."""
        return tuple(r for r, a in enumerate(self.active) if a)

    def is_active(self, rank: int) -> bool:
        return 0 <= rank < len(self.active) and self.active[rank] == 1

    def without(self, ranks: Iterable[int]) -> Membership:
        """The next epoch, with ``ranks`` masked. Masking the last rank is refused: nobody would be left to serve."""
        gone = set(ranks)
        self._check_known(gone)
        active = tuple(0 if r in gone else a for r, a in enumerate(self.active))
        if not any(active):
            raise InvalidInputError(f"masking ranks {sorted(gone)} would leave no rank alive in epoch {self.epoch}")
        return Membership(self.epoch + 1, active)

    def with_ranks(self, ranks: Iterable[int]) -> Membership:
        """The next epoch, with ``ranks`` active (a rejoin, or a join when the rank lies past ``ep_size``)."""
        new = set(ranks)
        size = max([self.ep_size, *(r + 1 for r in new)])
        if any(r < 0 for r in new):
            raise InvalidInputError(f"rank ids are 0 or more, got {sorted(new)}")
        active = list(self.active) + [0] * (size - self.ep_size)
        for r in new:
            active[r] = 1
        return Membership(self.epoch + 1, tuple(active))

    def _check_known(self, ranks: set[int]) -> None:
        unknown = sorted(r for r in ranks if not 0 <= r < self.ep_size)
        if unknown:
            raise InvalidInputError(f"unknown ranks {unknown}; ep_size is {self.ep_size}")
