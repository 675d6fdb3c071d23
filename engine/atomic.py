"""A text file that is there as a whole or not at all."""

import os
from collections.abc import Iterable
from pathlib import Path


def write_atomically(file: str | Path, text: str | Iterable[str]) -> None:
    """Writes a text, or its pieces one after another: into a temporary file beside ``file``, then a rename.

    What ends it leaves the old file, or none. Its folder is made if need be.
    """
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8") as stream:
            stream.writelines([text] if isinstance(text, str) else text)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)
