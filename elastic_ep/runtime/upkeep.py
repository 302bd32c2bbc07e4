"""What a rank does for its weights when nothing else is asked of it: fill the host's backup, and look whether its slots still hold what
was verified. One expert at a time, at a pace, in the background thread."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

import torch

from elastic_ep.core.errors import CheckpointError, WrongExpertError
from elastic_ep.runtime.engine import Slots
from elastic_ep.runtime.weights.base import digest_of, read_verified, zeroed
from elastic_ep.runtime.weights.digest import copy
from elastic_ep.runtime.weights.host import HostBackup

FILLS_PER_SCRUB = 16
"""a backup that fills must not keep the slots from being looked at"""
IDLE_S = 0.25
"""how soon to look again when there is nothing to do"""


class Upkeep:
    """`step` does one piece of work and returns how long to wait before the next.

    Args:
        first_slot: physical id of this rank's slot 0.
        held: (layer, physical slot) -> (expert, digest); its owner takes an entry out before it overwrites the slot.
        turn: of how many ranks (rank, ep_size): each begins elsewhere with the experts that no slot here holds.
        fill_bytes_per_s, scrub_bytes_per_s: the pace; a scrub of 0 is none.
    """

    def __init__(
        self,
        slots: Slots,
        first_slot: int,
        held: Mapping[tuple[int, int], tuple[int, int]],
        turn: tuple[int, int],
        fill_bytes_per_s: float,
        scrub_bytes_per_s: float,
    ) -> None:
        self._slots = slots
        self._first_slot = first_slot
        self._held = held
        self._turn = turn
        self._fill_bytes_per_s = fill_bytes_per_s
        self._scrub_bytes_per_s = scrub_bytes_per_s
        self._to_scrub: Iterator[tuple[int, int]] = iter(())
        self._to_map = itertools.product(*map(range, slots.shape[:2]))
        self._spare: torch.Tensor | None = None
        self._steps = 0

    def step(self) -> float:
        """Raises WrongExpertError when a slot holds other bytes than those that were verified: the rank must stop."""
        if not self._held:
            return IDLE_S  # not a member yet: there is more urgent reading to do
        slot_bytes = self._slots.shape[2]
        self._steps += 1
        is_scrub_due = bool(self._scrub_bytes_per_s) and self._steps % FILLS_PER_SCRUB == 0
        if not is_scrub_due and isinstance(self._slots.backup, HostBackup) and self._fill(self._slots.backup):
            return slot_bytes / self._fill_bytes_per_s
        if self._scrub_bytes_per_s and self._scrub():
            return slot_bytes / self._scrub_bytes_per_s
        return IDLE_S

    def _fill(self, backup: HostBackup) -> bool:
        """Put one more expert into the backup: those of this rank's slots first. When none is missing, map one more of them. False when
        all are mapped."""
        missing = ~backup.experts
        if not missing.any():
            self._spare = None
            return self._map(backup)
        if self._spare is None:
            self._spare = zeroed(self._slots.shape[2])
        for key, held in list(self._held.items()):
            if missing[key[0], held[0]]:
                slot = self._slots.slot_bytes(key[0], key[1] - self._first_slot)
                if self._is_right(key, held, copy(self._spare.numpy(), slot.numpy()).digest):
                    backup.write(key[0], held[0], self._spare, held[1])
                return True
        places = missing.ravel().nonzero()[0]
        start = self._turn[0] * missing.size // self._turn[1]
        layer, expert = divmod(int(places[places.searchsorted(start) % len(places)]), missing.shape[1])
        try:
            loaded = read_verified((self._slots.checkpoint,), layer, expert, self._spare, None)
        except CheckpointError:
            return False  # whoever needs it is told why
        backup.write(layer, expert, self._spare, loaded.digest)
        return True

    def _map(self, backup: HostBackup) -> bool:
        place = next(self._to_map, None)
        if place is not None:
            backup.touch(*place)
        return place is not None

    def _scrub(self) -> bool:
        """Look at the next slot. False when none is held."""
        key = next(self._to_scrub, None)
        if key is None:
            self._to_scrub = iter(sorted(self._held))
            key = next(self._to_scrub, None)
        if key is None:
            return False
        before = self._held.get(key)
        if before is None:
            return True
        self._is_right(key, before, digest_of(self._slots.slot_bytes(key[0], key[1] - self._first_slot)))
        return True

    def _is_right(self, key: tuple[int, int], held: tuple[int, int], found: int) -> bool:
        """Whether a slot's bytes, of digest `found`, are those that were verified there. False if the slot was overwritten meanwhile;
        raises WrongExpertError if not."""
        if found != held[1] and self._held.get(key) is held:
            raise WrongExpertError(
                f"slot {key[1]} of MoE layer {key[0]} holds digest {found:016x}; expert {held[0]} was verified there with "
                f"{held[1]:016x}: a bit of this host's memory has changed"
            )
        return found == held[1]
