"""Locks between processes, each on a file; the system releases them with the process, however it dies.

They are ``flock``'s. On a network file system they hold between machines where it carries them to the server (NFS, as
it is mounted by default); mounted with ``nolock`` or ``local_lock=flock`` they hold between the processes of one
machine. Where there are none at all, that is said, and the work goes on without.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from sophon.paths import explained

# one who holds it only to take it away, or is just being killed, is waited for
_PATIENCE = 1.0
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)


@contextlib.contextmanager
def lock(path: Path, *, shared: bool = False, wait: bool = False) -> Iterator[None]:
    """Hold a lock while the block runs; its file is gone afterwards.

    Args:
        path: the lock's file, in a folder that exists.
        shared: let others hold it who share it too.
        wait: wait for it, instead of being refused.

    Raises:
        BlockingIOError: another holds it; `holder` says who.
        UserError: the file system refuses the file.
    """
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    file = _locked(path, kind if wait else kind | fcntl.LOCK_NB)
    _held.add(file)
    try:
        if not shared:
            os.ftruncate(file, 0)
            os.write(file, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        if file in _held:  # else this is a child, and it is not its lock
            _held.discard(file)
            with contextlib.suppress(OSError):  # the last one to leave takes the file away, while nobody can hold it
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
            os.close(file)


_held: set[int] = set()


def _let_go() -> None:
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_let_go)  # else a child that outlives its parent would keep the lock


def _locked(path: Path, kind: int) -> int:
    deadline = time.monotonic() + _PATIENCE
    while True:
        with explained(path, "write"):
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        kept = False
        try:
            fcntl.flock(file, kind)
            kept = _is_at(file, path)  # else whoever held it before has taken the file away
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            print(f"sophon: {path.parent} has no locks; start no second process on it", file=sys.stderr)
            kept = True
        finally:
            if not kept:
                os.close(file)
        if kept:
            return file


def _is_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def holder(path: Path) -> str:
    """Return who holds a lock that is not shared: ``process 12 on HOST``; empty if that cannot be said."""
    try:
        return path.read_text()
    except OSError:
        return ""
