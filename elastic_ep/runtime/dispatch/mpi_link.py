"""One rank's side of one other MPI process: messages that go and come without ever blocking, and what the two have said of the mesh.

MPI cannot close a channel. A rank that drops another sends it a farewell, which the other takes for a closed channel when it reads it.

What one process has sent is not seen by the other until that one asks MPI, and perhaps not at its first asking. So no rank may hold a link
for open because it was open: in each `connect` each says hello with the epoch, and waits for the other's of that epoch or of a later one.
Whatever the other had said earlier, a farewell too, has been read by then, since the messages of a rank are read in order.
"""

from __future__ import annotations

import bisect
import struct
import sys
from typing import Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from elastic_ep.core.errors import InvalidInputError
from elastic_ep.runtime.dispatch.base import FailureKind
from elastic_ep.runtime.dispatch.frames import HEADER_BYTES, FrameError, FrameFormat, FrameKey, parse_foreign

TAG = 0x4550
"""of all our messages: one tag, so that the messages of a rank are read in the order it sent them"""
_NOTICE = struct.Struct("<IBxxxiiq")
"""magic, kind, the sender's seat, the receiver's seat, epoch"""
_MAGIC = 0x4D706546
HELLO, FAREWELL = 1, 2
MAX_BYTES = 2**31 - 1
_NEVER = -1
_MAX_HELD = 4
"""messages of later exchanges that wait for their turn; a rank that keeps in step is one ahead at most"""


def load_mpi() -> Any:
    """The module `mpi4py.MPI`; importing it joins the MPI job, and leaves it without MPI_Finalize, which can hang after a death."""
    try:
        if "mpi4py.MPI" not in sys.modules:
            import mpi4py

            mpi4py.rc.finalize = False
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise InvalidInputError(f"the mpi backend cannot load MPI: {error}; pip install 'elastic-ep[mpi]'") from error
    return MPI


class LinkGone(Exception):
    """The other end died, said farewell (both CLOSED) or sent what is no message of ours (PROTOCOL)."""

    def __init__(self, kind: FailureKind):
        self.kind = kind


class _Message(NamedTuple):
    """Bytes on their way, which must stay where they are until the request is done."""

    request: Any
    bytes: NDArray[np.uint8]


_unfinished: list[_Message] = []
"""of links that are closed; MPI may still be reading or writing their bytes"""


def _is_done(message: _Message) -> bool:
    try:
        return bool(message.request.Test())
    except Exception:  # of MPI: the other end has died
        return True


class Link:
    """This rank's side of one process, kept for the life of the job: what an old epoch left in flight ends behind the new one's back."""

    def __init__(self, mpi: Any, comm: Any, place: int, own_seat: int):
        self.place = place
        self.own_seat = own_seat
        self.seat = -1
        self.dead = False
        self.stale_frames = 0
        self._epoch = _NEVER
        self._said = self._heard = _NEVER
        """epoch of our last hello and of its last, if nobody has said farewell since"""
        self._mpi = mpi
        self._comm = comm
        self._outgoing: list[_Message] = []
        self._incoming: list[_Message] = []
        self._held: list[tuple[FrameKey, NDArray[np.uint8]]] = []
        self._spare: dict[str, NDArray[np.uint8]] = {}

    def buffer(self, use: str, num_bytes: int) -> NDArray[np.uint8]:
        """Room for a message. Fresh pages cost more than the rows written to them: a buffer that was given back is used again."""
        spare = self._spare.pop(use, None)
        return (np.empty(num_bytes + num_bytes // 4, dtype=np.uint8) if spare is None or len(spare) < num_bytes else spare)[:num_bytes]

    def give_back(self, use: str, message: NDArray[np.uint8]) -> None:
        self._spare[use] = message if message.base is None else message.base

    def post(self, message: NDArray[np.uint8]) -> None:
        """Begin to send."""
        try:
            self._outgoing.append(_Message(self._comm.Isend([message, self._mpi.BYTE], self.place, TAG), message))
        except self._mpi.Exception as error:
            self._died(error)

    @property
    def is_open(self) -> bool:
        """Whether both have said hello in the epoch of the last `call`. The other may be further: it is done with this one then."""
        return self._said == self._epoch <= self._heard and not self.dead

    def call(self, epoch: int) -> None:
        """A `connect` begins: the link is shut until the other end has said hello in it."""
        self._epoch = epoch

    def greet(self) -> None:
        """Say hello, unless that is done."""
        if self._said != self._epoch:
            self._said = self._epoch
            self._notify(HELLO, self._epoch)

    def drop(self) -> None:
        """Say farewell, unless nothing was said since the last. Raises LinkGone if it has died."""
        was_linked = self._said != _NEVER or self._heard != _NEVER
        self._said = self._heard = _NEVER
        if was_linked and not self.dead:
            self._notify(FAREWELL, self._epoch)

    def close(self) -> None:
        """The dispatcher goes, MPI stays: what it still reads or writes has to outlive us."""
        _unfinished[:] = [message for message in _unfinished if not _is_done(message)]
        _unfinished.extend(self._outgoing + self._incoming)
        self._outgoing, self._incoming = [], []

    def _notify(self, kind: int, epoch: int) -> None:
        self.post(np.frombuffer(_NOTICE.pack(_MAGIC, kind, self.own_seat, self.seat, epoch), dtype=np.uint8))

    def is_sent(self) -> bool:
        """Whether all that was posted has left. A message to a process that is stopped stays, and keeps its buffer."""
        while self._outgoing:
            request, message = self._outgoing[0]
            try:
                if not request.Test():
                    return False
            except self._mpi.Exception as error:
                self._outgoing.pop(0)
                self._died(error)
            self._outgoing.pop(0)
            if len(message) > _NOTICE.size:
                self.give_back("out", message)
        return True

    def free_sent(self) -> None:
        """Let go of what has left by now, or never will because its receiver is dead."""
        while self._outgoing:
            try:
                if not self.is_sent():
                    return
            except LinkGone:
                continue

    def read(self, floor: FrameKey) -> bool:
        """Take the next message, if there is one: a notice is obeyed, a frame of `floor` or later held.

        What follows a large frame may be whole before it: a farewell is not to wait for rows that nobody sends any more.
        """
        try:
            message = self._received() or self._begun()
        except self._mpi.Exception as error:
            self.close()
            self._died(error)
        if message is None:
            return False
        if len(message.bytes) == _NOTICE.size:
            self._obey(*_NOTICE.unpack(message.bytes.data))
        else:
            self._hold(message.bytes, floor)
        return True

    def _received(self) -> _Message | None:
        """A message that has become whole."""
        for i, message in enumerate(self._incoming):
            if message.request.Test():
                return self._incoming.pop(i)
        return None

    def _begun(self) -> _Message | None:
        """Begin to receive what is there. Returns the first that is whole."""
        status = self._mpi.Status()
        while len(self._incoming) < _MAX_HELD and (found := self._comm.Improbe(self.place, TAG, status)) is not None:
            room = self.buffer("in", status.Get_count(self._mpi.BYTE))
            self._incoming.append(_Message(found.Irecv([room, self._mpi.BYTE]), room))
            if (message := self._received()) is not None:
                return message
        return None

    def _hold(self, message: NDArray[np.uint8], floor: FrameKey) -> None:
        self._forget(floor)
        try:
            if len(message) < HEADER_BYTES:
                raise FrameError(f"a message of {len(message)} bytes")
            form, header = parse_foreign(message.data, 0, MAX_BYTES)
            if len(message) != HEADER_BYTES + header.payload_bytes or header.in_outbox:
                raise FrameError(f"{len(message)} bytes for a payload of {header.payload_bytes}")
            if form.key < floor:
                self._discard(message)
                return
            if len(self._held) == _MAX_HELD:
                raise FrameError(f"{_MAX_HELD} frames are held")
        except FrameError as error:
            raise LinkGone(FailureKind.PROTOCOL) from error
        bisect.insort(self._held, (form.key, message), key=lambda held: held[0])

    def frame(self, form: FrameFormat) -> NDArray[np.uint8] | None:
        """The peer's frame of this exchange; None while it is not here."""
        self._forget(form.key)
        while not self._held or self._held[0][0] != form.key:
            if not self.read(form.key):
                return None
        _, message = self._held.pop(0)
        if message[: len(form.prefix)].tobytes() != form.prefix:
            raise LinkGone(FailureKind.PROTOCOL)
        return message

    def _forget(self, floor: FrameKey) -> None:
        while self._held and self._held[0][0] < floor:
            self._discard(self._held.pop(0)[1])

    def _discard(self, message: NDArray[np.uint8]) -> None:
        self.stale_frames += 1
        self.give_back("in", message)

    def _obey(self, magic: int, kind: int, sender: int, receiver: int, epoch: int) -> None:
        if magic != _MAGIC or kind not in (HELLO, FAREWELL):
            raise LinkGone(FailureKind.PROTOCOL)
        if kind == FAREWELL:
            self._said = self._heard = _NEVER
            raise LinkGone(FailureKind.CLOSED)
        if (sender, receiver) == (self.seat, self.own_seat):  # else it was for the seat that one of us had before
            self._heard = epoch

    def _died(self, error: Exception) -> NoReturn:
        """What MPI reports of one process is that process's failure."""
        self.dead = True
        raise LinkGone(FailureKind.CLOSED) from error
