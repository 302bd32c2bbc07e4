"""The seed's record of who lives, under its names, for engines that keep their mask in it. This project's own is `membership.Membership`.

Mended against the seed: it names an epoch, so that a mask which is older than what a rank knows can be refused; a mask never comes back
to life by a reset, only by `admit`; seats beyond the world are part of it from the start and stay empty; nothing is a singleton.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elastic_ep.core.errors import IllegalTransitionError, InvalidInputError
from elastic_ep.core.load import as_array
from elastic_ep.core.membership import Membership


def healthy_rank_state(ep_size: int, capacity: int | None = None) -> NDArray[np.int32]:
    """int32 [capacity]: the first ``ep_size`` seats taken, the others (none by default) empty."""
    capacity = ep_size if capacity is None else capacity
    if not 1 <= ep_size <= capacity:
        raise InvalidInputError(f"{ep_size} ranks for {capacity} seats; give at least one rank and a seat for each")
    return (np.arange(capacity) < ep_size).astype(np.int32)


@dataclass(eq=False)
class ElasticEPState:
    """Masks of one rank's view of the group.

    Example, rank 1 of three dies during a forward::

        state = ElasticEPState.healthy(3)
        state.observe([1, 0, 1])          # what the dispatcher reports
        state.is_active_equal_last()      # False: rebalance, run the forward again
        state.snapshot_active_to_last()
        state.sync_active_to_cpu()

    Attributes:
        active_ranks: int32 [ep_size], 1 = alive; what the dispatcher sees now. An array, or any tensor that NumPy can read.
        last_active_ranks: int32, as it was when the group last agreed.
        active_ranks_cpu: int32, the copy that plans are made from.
        epoch: grows with each agreed change.
    """

    active_ranks: Any
    last_active_ranks: NDArray[np.int32]
    active_ranks_cpu: NDArray[np.int32]
    epoch: int = 0

    @classmethod
    def healthy(cls, ep_size: int, capacity: int | None = None) -> ElasticEPState:
        """All ranks alive; ``capacity`` seats in all."""
        mask = healthy_rank_state(ep_size, capacity)
        return cls(mask, mask.copy(), mask.copy())

    @property
    def ep_size(self) -> int:
        """Seats, empty ones included."""
        return len(self.last_active_ranks)

    def observe(self, active_ranks: Any) -> bool:
        """Take over what a dispatcher reports. Returns whether it differs from what was agreed.

        Raises:
            InvalidInputError: another number of seats, or entries that are not 0 or 1.
            IllegalTransitionError: a rank would come back to life; `admit` does that.
        """
        mask = self._checked(active_ranks)
        back = np.flatnonzero((mask == 1) & (self._now() == 0))
        if len(back):
            raise IllegalTransitionError(f"ranks {back.tolist()} are masked in epoch {self.epoch} and cannot just come back; admit them")
        self._set(mask)
        return not self.is_active_equal_last()

    def admit(self, ranks: Iterable[int]) -> None:
        """Seat ranks that joined or came back, once they hold what the next placement gives them."""
        mask = self._now().copy()
        for rank in ranks:
            if not 0 <= rank < self.ep_size:
                raise InvalidInputError(f"rank {rank} has no seat; there are {self.ep_size}")
            mask[rank] = 1
        self._set(mask)

    def is_active_equal_last(self) -> bool:
        """Whether nothing changed since the last snapshot."""
        return bool(np.array_equal(self._now(), self.last_active_ranks))

    def snapshot_active_to_last(self) -> None:
        """The group agreed on what is seen now: the next epoch, if it is a change."""
        if not self.is_active_equal_last():
            self.epoch += 1
            self.last_active_ranks = self._now().copy()

    def sync_active_to_cpu(self) -> None:
        """Copy what is seen now to where plans are made."""
        self.active_ranks_cpu = self._now().copy()

    def membership(self) -> Membership:
        """What was agreed, as this project's record."""
        return Membership(self.epoch, tuple(int(a) for a in self.last_active_ranks))

    def _now(self) -> NDArray[np.int32]:
        return as_array(self.active_ranks).astype(np.int32)

    def _checked(self, active_ranks: Any) -> NDArray[np.int32]:
        mask = as_array(active_ranks)
        if mask.shape != (self.ep_size,):
            raise InvalidInputError(f"active_ranks has shape {mask.shape}; this group has {self.ep_size} seats")
        if not np.isin(mask, (0, 1)).all():
            raise InvalidInputError(f"active_ranks is {mask.tolist()}; entries are 1 for alive and 0 for not")
        return mask.astype(np.int32)

    def _set(self, mask: NDArray[np.int32]) -> None:
        """In place, so that a kernel that holds the array or tensor sees it."""
        if isinstance(self.active_ranks, np.ndarray):
            self.active_ranks[:] = mask
        else:
            self.active_ranks.copy_(self.active_ranks.new_tensor(mask))
