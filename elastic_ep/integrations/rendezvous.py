"""Meeting of ranks over a key-value store that outlives them all, with a deadline: who came, and that all are here at the same time.

The store is a `torch.distributed.Store`. It must live in a process that is no rank (the controller's host starts one), or one rank's death
is everybody's. Nothing of a step goes through it.
"""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, NamedTuple

from elastic_ep.core.errors import InvalidInputError

_NAP_S = 0.002


class Rendezvous:
    """One process's end. `address` names it for as long as it lives, and never another one.

    A meeting is a handshake of each pair: I post a fresh number, and wait until the other has seen it. So whoever has met me is in the
    same call now; what a dead or an earlier process left in the store counts for nothing.
    """

    def __init__(self, store: Any, kind: str, rank: int, terms: str):
        self._store = store
        self._kind = kind
        self._terms = terms
        self.address = f"{kind}:{rank}:{os.getpid()}-{os.urandom(6).hex()}"

    def meet(self, place: str, peers: Mapping[int, str], deadline: float, is_interrupted: Callable[[], bool]) -> set[int] | None:
        """Wait until all peers are at this place, too. Returns the ranks that did not come before the deadline (`time.monotonic`), or None
        if interrupted. Raises InvalidInputError for one that was started with other buffer sizes."""
        number = os.urandom(6).hex()
        for address in peers.values():
            self._store.set(self._key(place, "here", self.address, address), f"{number} {self._terms}")
        missing, answered = dict(peers), dict.fromkeys(peers, "")
        while True:
            for rank, address in list(missing.items()):
                seen = self._read(self._key(place, "seen", address, self.address)) == number
                theirs, _, terms = self._read(self._key(place, "here", address, self.address)).partition(" ")
                if theirs and terms != self._terms:
                    raise InvalidInputError(f"rank {rank} has {terms}, this rank {self._terms}; give all ranks of a run the same")
                if theirs != answered[rank]:
                    self._store.set(self._key(place, "seen", self.address, address), theirs)
                    answered[rank] = theirs
                if seen and theirs:
                    del missing[rank]
            if not missing or time.monotonic() >= deadline:
                return set(missing)
            if is_interrupted():
                return None
            time.sleep(_NAP_S)

    def _key(self, place: str, what: str, sender: str, receiver: str) -> str:
        return f"elastic-ep/{self._kind}/{place}/{what}/{sender}/{receiver}"

    def _read(self, key: str) -> str:
        if not self._store.check([key]):
            return ""
        value: bytes = self._store.get(key)
        return value.decode()


class PeerStore:
    """The store as a library sees it that exchanges descriptions of memory by keys which end in a rank's number.

    Keys are prefixed with the address of the process that the rank is now, so that nobody reads what a dead one left there; waiting ends
    at our deadline; and nothing is deleted, as a slower peer may still have to read it.
    """

    def __init__(self, store: Any, rank: int, address: str):
        self._store = store
        self._addresses = {rank: address}
        self._deadline = 0.0

    def expect(self, peers: Mapping[int, str], deadline: float) -> None:
        """The processes behind the ranks, and until when (`time.monotonic`) they may be waited for."""
        self._addresses.update(peers)
        self._deadline = deadline

    def set(self, key: str, value: Any) -> None:
        self._store.set(self._own(key), value)

    def wait(self, keys: list[str], timeout: Any = None) -> None:
        """Raises TimeoutError."""
        wanted = [self._own(key) for key in keys]
        while not self._store.check(wanted):
            if time.monotonic() >= self._deadline:
                raise TimeoutError(f"no description of its memory from one of {keys}")
            time.sleep(_NAP_S)

    def multi_get(self, keys: list[str]) -> list[Any]:
        return [self._store.get(self._own(key)) for key in keys]

    def delete_key(self, key: str) -> bool:
        return False

    def _own(self, key: str) -> str:
        rank = int(key.rpartition("/")[2])
        return f"elastic-ep/{self._addresses[rank]}/{key}"


class HostedStore(NamedTuple):
    """A store in this process, and what ranks are given to find it. It ends with the object."""

    store: Any
    address: str


def host_store(host: str) -> HostedStore:
    """Start a store for ranks to meet over, at a free port; `host` is how they reach this machine. torch's store listens on every interface
    and asks for no token."""
    dist: Any = importlib.import_module("torch.distributed")
    store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
    return HostedStore(store, f"tcp:{host}:{store.port}")


def open_store(address: str, timeout_s: float = 10.0) -> Any:
    """The store behind "tcp:HOST:PORT". Raises InvalidInputError."""
    scheme, _, place = address.partition(":")
    host, _, port = place.rpartition(":")
    if scheme != "tcp" or not host or not port.isdecimal():
        raise InvalidInputError(f"{address!r} is no store; give tcp:HOST:PORT of a torch.distributed.TCPStore")
    dist: Any = importlib.import_module("torch.distributed")
    try:
        return dist.TCPStore(host, int(port), is_master=False, timeout=timedelta(seconds=timeout_s))
    except dist.DistError as error:
        raise InvalidInputError(f"no store answers at {address}: {error}; start it before the ranks") from error
