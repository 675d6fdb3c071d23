"""One writer at a time: a lock on a file, which the kernel drops with the process that holds it, however that ends."""

import errno
import fcntl
import logging
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from .errors import UserError

PATIENCE_S = 1.0  # a reader holds a folder for less, and so does a process that is being killed

logger = logging.getLogger(__name__)


class Lock:
    """A lock on a file (flock) from here to :meth:`close`, the end of a ``with`` block or that of the process.

    Args:
        file: made if need be, but by no shared lock; its folder is what an error names.
        shared: others may share it; nobody can hold it alone meanwhile.
        patience_s: seconds to wait for who holds it.

    Raises:
        UserError: another process holds it, or another lock of this process does.
        OSError: the file cannot be opened.
    """

    def __init__(self, file: Path, shared: bool = False, patience_s: float = PATIENCE_S) -> None:
        self._handle = -1
        self._handle = os.open(file, os.O_RDONLY if shared else os.O_RDWR | os.O_CREAT, 0o666)
        deadline = time.monotonic() + patience_s
        while not self._try(fcntl.LOCK_SH if shared else fcntl.LOCK_EX, file):
            if time.monotonic() >= deadline:
                self.close()
                raise UserError(
                    f"{file.parent} is being written by another run at this moment; "
                    "wait until it has ended, or choose another folder."
                )
            time.sleep(0.02)

    def _try(self, kind: int, file: Path) -> bool:
        try:
            fcntl.flock(self._handle, kind | fcntl.LOCK_NB)
        except OSError as problem:
            if problem.errno in (errno.EWOULDBLOCK, errno.EACCES):
                return False
            if problem.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            logger.warning("%s cannot be locked (%s); let no two runs write there.", file.parent, problem.strerror)
        return True

    def close(self) -> None:
        """Let others have it; safe to call twice."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()
