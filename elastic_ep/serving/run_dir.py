"""The folder of one controller's sockets, and what controllers left behind that were killed."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from pathlib import Path

from elastic_ep.core.errors import InvalidInputError
from elastic_ep.runtime.control.address import MAX_UNIX_PATH_BYTES

PREFIX = "elastic-ep-"
LONGEST_NAME = "r9999.9999999.w"
"""of a socket: rank, and how many processes the seat has had"""
_YOUNG_S = 10.0
"""a folder that is newer may belong to a controller that has not locked it yet"""


def make_run_dir() -> tuple[Path, int]:
    """A new folder, and the file descriptor that keeps it locked as long as this process lives. Folders that nobody has locked are removed.

    A lock, not a process id in the name: containers that share a temporary folder do not see each other's processes. Raises
    InvalidInputError if sockets cannot lie there.
    """
    _remove_stale()
    folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-"))
    name = str(folder / LONGEST_NAME)
    if not _is_text(name) or len(os.fsencode(name)) > MAX_UNIX_PATH_BYTES:
        folder.rmdir()
        raise InvalidInputError(
            f"sockets cannot lie in {str(folder.parent)!a}: the system takes {MAX_UNIX_PATH_BYTES} bytes of text for the path of one, as "
            f"{name!a}; set TMPDIR to another folder"
        )
    return folder, lock_run_dir(folder)


def _is_text(name: str) -> bool:
    """Whether other processes can be told of it: not under a locale that does not know its characters."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def lock_run_dir(folder: Path) -> int:
    """The file descriptor that keeps it locked; the folder is made if it is not there."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return lock


def _remove_stale() -> None:
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}[0-9]*-*"):
        try:
            if time.time() - folder.stat().st_mtime < _YOUNG_S:
                continue
            lock = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            continue  # it is gone, or another user's
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except BlockingIOError:
            pass  # its controller lives
        finally:
            os.close(lock)
