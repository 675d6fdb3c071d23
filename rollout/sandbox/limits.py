"""What one execution may use. The one place where these numbers live; the server gets them as JSON."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal


@dataclass(frozen=True)
class Limits:
    """Caps of one execution, replayed history included.

    Args:
        wall_s: seconds until the whole process tree is killed.
        cpu_s: CPU seconds of any one process, rounded up to whole ones.
        memory_gib: GiB beyond what the warm interpreter has: address space of each process, private memory of all.
        processes: processes alive at once.
        file_mib: MiB of any one file written.
        output_bytes: bytes of stdout and stderr kept, head and tail.
        sql_s: seconds until a query is stopped, in place of wall_s and cpu_s.
        isolation: "auto" refuses to start where the kernel grants neither namespaces nor Landlock; "none" goes on with
            resource limits alone.
    """

    wall_s: float = 20.0
    cpu_s: float = 20.0
    memory_gib: float = 1.0
    processes: int = 16
    file_mib: float = 64.0
    output_bytes: int = 65536
    sql_s: float = 60.0
    isolation: Literal["auto", "none"] = "auto"

    def __post_init__(self) -> None:
        if self.isolation not in ("auto", "none"):
            raise ValueError(f"isolation is {self.isolation!r}; expected 'auto' or 'none'")
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name != "isolation" and not value > 0:
                raise ValueError(f"{item.name} is {value}; expected a number above 0")
