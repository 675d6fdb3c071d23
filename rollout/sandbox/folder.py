"""The working folder of an execution: the task's files in it, read-only; kept for a failed chunk; removed with all."""

from __future__ import annotations

import os
import shutil
import stat
from typing import Any

COPY_BYTES = 4 * 2**20  # Larger files are linked instead of copied where the kernel keeps them read-only.
KEPT_ENTRIES, KEPT_BYTES = 100, 64 * 2**20  # The server copies no more, since executions wait meanwhile.


class Folder:
    """A new folder.

    Args:
        path: where it is to be.
        files: absolute paths of the task's files.
        protected: the kernel keeps what links lead to read-only.
        owner: user id that gets the folder and what is in it, None if that is this process's.

    Attributes:
        linked: what the links lead to.

    Raises:
        OSError: no space, a file that is gone: nothing remains then.
    """

    def __init__(self, path: str, files: list[str], protected: bool, owner: int | None) -> None:
        self.path, self._saved, self._owner = path, path + ".saved", owner
        self.linked: list[str] = []
        try:
            os.mkdir(path, 0o700)
            for file in files:
                target = os.path.join(path, os.path.basename(file))
                if protected and os.path.getsize(file) > COPY_BYTES:
                    self.linked.append(os.path.realpath(file))
                    os.symlink(self.linked[-1], target)
                else:
                    shutil.copyfile(file, target)
                    os.chmod(target, 0o444)
            self._give(path)
        except BaseException:
            self.remove()
            raise

    def save(self) -> bool:
        """Keeps a copy of what is in it; False if that is too much to be copied."""
        remove_tree(self._saved)
        try:
            if not _is_small(self.path):
                return False
            shutil.copytree(self.path, self._saved, symlinks=True)
            self._give(self._saved)
        except (OSError, shutil.Error):
            return False  # Something there cannot be read or copied, such as a pipe.
        return True

    def restore(self) -> bool:
        """Puts back what was saved into the same folder, which processes may be in; False if that fails."""
        try:
            os.chmod(self.path, stat.S_IRWXU)
            for entry in list(os.scandir(self.path)):
                if entry.is_dir(follow_symlinks=False):
                    remove_tree(entry.path)
                else:
                    os.unlink(entry.path)
            for name in os.listdir(self._saved):
                os.rename(os.path.join(self._saved, name), os.path.join(self.path, name))
            shutil.copymode(self._saved, self.path)
        except OSError:
            return False
        return True

    def _give(self, path: str) -> None:
        if self._owner is not None:
            for folder, _, names in os.walk(path):
                for name in (".", *names):
                    os.chown(os.path.join(folder, name), self._owner, -1, follow_symlinks=False)

    def remove(self) -> None:
        """Removes it and what was saved."""
        for path in (self.path, self._saved):
            remove_tree(path)


def remove_tree(path: str) -> None:
    """Removes a folder, whatever its modes are; one that is not there is no error."""

    def retry(function: Any, name: str, error: Any) -> None:
        try:
            os.chmod(os.path.dirname(name), stat.S_IRWXU)
            if os.path.isdir(name) and not os.path.islink(name):
                os.chmod(name, stat.S_IRWXU)
                shutil.rmtree(name)
            else:
                os.unlink(name)
        except OSError:
            pass

    shutil.rmtree(path, onerror=retry)


def _is_small(path: str) -> bool:
    entries = size = 0
    waiting = [path]
    while waiting:
        for entry in os.scandir(waiting.pop()):
            entries += 1
            size += entry.stat(follow_symlinks=False).st_size
            if entries > KEPT_ENTRIES or size > KEPT_BYTES:
                return False
            if entry.is_dir(follow_symlinks=False):
                waiting.append(entry.path)
    return True
