"""What models said, kept on disk by key: no question that was answered is asked again, by no rank and no later run."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Generic, TypeVar

from ..engine.errors import UserError

V = TypeVar("V")


class Kept(Generic[V]):
    """Values by key on disk, one a line, appended whole: processes may share the file, and a torn line says nothing.

    Args:
        file: made if absent, with its folder.
        what: the values' name in errors.
        name: the value's name in a line, ``{"key": ..., NAME: ...}``.
        to_json, from_json: a value as JSON holds it, and back; None for what is no value.

    Raises:
        UserError: it cannot be read or written.
    """

    def __init__(
        self,
        file: Path,
        what: str,
        name: str,
        to_json: Callable[[V], object],
        from_json: Callable[[object], V | None],
    ) -> None:
        self._file, self._what, self._name = file, what, name
        self._to_json, self._from_json = to_json, from_json
        self._values: dict[str, V] = {}
        self._read = 0  # bytes
        self.refresh()

    def get(self, key: str) -> V | None:
        """None where there is no value."""
        return self._values.get(key)

    def refresh(self) -> None:
        """Reads what other processes added."""
        try:
            with open(self._file, "rb") as file:
                file.seek(self._read)
                content = file.read()
        except FileNotFoundError:
            return
        except OSError as error:
            raise self._unusable(error) from error
        whole = content[: content.rfind(b"\n") + 1]  # another process may be writing the rest
        self._read += len(whole)
        for line in whole.decode(errors="replace").split("\n"):
            try:
                entry = json.loads(line)
                key, value = entry["key"], self._from_json(entry[self._name])
            except (ValueError, TypeError, LookupError, RecursionError):
                continue
            if isinstance(key, str) and value is not None:
                self._values[key] = value

    def add(self, values: Mapping[str, V]) -> None:
        """Keeps values, here and on disk."""
        self._values.update(values)
        entries = [{"key": key, self._name: self._to_json(value)} for key, value in values.items()]
        if not entries:
            return
        lines = "".join(json.dumps(entry) + "\n" for entry in entries)
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with open(self._file, "ab", buffering=0) as file:
                file.write(f"\n{lines}".encode())  # the first break ends a line that a crash tore
        except OSError as error:
            raise self._unusable(error) from error

    def _unusable(self, error: OSError) -> UserError:
        return UserError(
            f"{self._what} cannot be kept in {self._file}: {error.strerror}; free space or mend its permissions"
        )
