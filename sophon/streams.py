"""Standard output and error that never raise."""

from __future__ import annotations

import io
import select
import sys
from typing import cast


class _Unfailing(io.FileIO):
    """A file descriptor that takes everything: what a closed pipe or a full device refuses is lost."""

    def write(self, data: object) -> int:
        try:
            while (written := cast("int | None", super().write(data))) is None:  # type: ignore[arg-type]
                select.select([], [self], [])  # the other end reads, but not now
        except OSError:
            return len(cast(bytes, data))
        return written


def make_unfailing() -> None:
    """Replace ``sys.stdout`` and ``sys.stderr``: what cannot be encoded is escaped, what cannot be written is lost."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None:  # closed by whoever started this process: then nothing is printed
            buffer = io.BufferedWriter(_Unfailing(stream.fileno(), "w", closefd=False))
            # line by line, so that the two stay in order in one log
            wrapped = io.TextIOWrapper(buffer, encoding=stream.encoding, errors="backslashreplace", line_buffering=True)
            setattr(sys, name, wrapped)
