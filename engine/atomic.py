"""A file that is there as a whole or not at all."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def write_atomically(file: str | Path, text: str | Iterable[str]) -> None:
    """Writes a text, or its pieces one after another, as ``replacing`` does."""
    with replacing(file) as stream:
        stream.writelines(piece.encode() for piece in ([text] if isinstance(text, str) else text))


@contextmanager
def replacing(file: str | Path) -> Iterator[BinaryIO]:
    """A temporary file beside ``file``, open for writing, which is flushed and takes its name at the end.

    What ends it leaves the old file, or none. Its folder is made if need be.
    """
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)
