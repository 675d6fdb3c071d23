"""What a finished or running run has left in its folder, for those who look at it."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..engine.config import SECTIONS, Config
from ..engine.curves import series, spread
from ..engine.errors import UserError
from ..engine.metrics import read_records
from ..engine.planner import Plan, plan_memory
from ..engine.settings import build, settings_of
from ..rollout.record import read_records as read_trajectories
from ..rollout.trajectory import Status, masked_statuses
from .compare import read_result
from .memory import settled
from .scoreboard import sections
from .show import VIEWED, check_record

PHASES = ("sft", "hrm", "grpo")
READ_STEPS = 40  # of the trajectories: a long run has gigabytes of them
SHOWN_STEPS = 6  # a group of each is shown

NEEDED = VIEWED | {"sample", "executions", "scored", "error", "turns", "completion_tokens"}
GROUP_FILE = re.compile(r"(\d{6})(?:\.\d+)?\.rank\d+\.jsonl")

Record = dict[str, Any]


@dataclass
class Sampled:
    """Trajectories of some steps, counted; and a group of fewer.

    Args:
        steps: those read, of ``num_steps`` on disk; they count from 0.
        lengths, turns: what each trajectory of a step has, by step.
        endings, verdicts: how often trajectories and executions ended so, by step.
        groups: (step, members) of the group with the largest advantage, or else the widest rewards.
    """

    num_steps: int
    steps: list[int]
    lengths: dict[int, list[int]] = field(default_factory=dict)
    turns: dict[int, list[int]] = field(default_factory=dict)
    endings: dict[int, Counter[str]] = field(default_factory=dict)
    verdicts: dict[int, Counter[str]] = field(default_factory=dict)
    groups: list[tuple[int, list[Record]]] = field(default_factory=list)


class PastRun:
    """Reads a run's folder; what is not there is empty or None.

    Args:
        folder: of the run.

    Raises:
        UserError: it holds no run, or a file in it is broken.
    """

    def __init__(self, folder: Path) -> None:
        if not any((folder / name).exists() for name in ("config.json", *(f"{phase}.jsonl" for phase in PHASES))):
            raise UserError(
                f"{folder} holds no run: neither config.json nor sft.jsonl nor grpo.jsonl is there; "
                "give a folder such as runs/NAME"
            )
        self.folder, self.name = folder, folder.resolve().name
        self.records = {phase: _steps(folder / f"{phase}.jsonl") for phase in PHASES}
        self.findings = (
            _steps(folder / "grpo" / "doctor.jsonl") if (folder / "grpo" / "doctor.jsonl").exists() else None
        )
        self.summary = _object(folder / "summary.json")
        self.settings = _object(folder / "config.json")
        self.data = _object(folder / "data" / "report.json")
        self.results: dict[str, Record] = {}
        self.broken_results: list[str] = []  # a sentence on each
        for file in sorted((folder / "evaluate").glob("*.json"), key=_stage):
            if not file.name.endswith(".asked.json"):
                self._add_result(file)

    def _add_result(self, file: Path) -> None:
        try:
            result = read_result(file)
            list(sections(result))  # has all that is shown
            self.results[file.stem] = result
        except UserError as error:
            self.broken_results.append(str(error))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            self.broken_results.append(f"{file} is no result of this version of evaluate: {error!r}")

    @cached_property
    def masked(self) -> frozenset[Status]:
        """How trajectories end that bear no loss; without a configuration, by its defaults."""
        settings = {**Config().to_dict(), **self.settings}
        return masked_statuses(settings["grpo"]["mask_void"], settings["reward"]["overlong_buffer"] > 0)

    def plan(self) -> Plan | None:
        """The memory as it is planned; None until the run is finished, since only then its ranks are written down.

        The KV blocks are as large as they were.

        Raises:
            UserError: the settings are of another version of groupwise, or their model is gone.
        """
        share, used = (series(self.records["grpo"], f"sampling/kv_peak_{name}")[1] for name in ("share", "gib"))
        if not (self.settings and {"ranks", "device"} <= self.summary.keys() and len(share) and share[-1]):
            return None
        config = Config(**{name: build(name, cls, self._section(name)) for name, cls in SECTIONS.items()})
        rollout = dataclasses.replace(config.rollout, kv_memory=f"{used[-1] / share[-1]:.6g}")
        config = dataclasses.replace(config, rollout=rollout)
        device = str(self.summary["device"]).partition(":")[0]
        return plan_memory(settled(config, 0.0), int(self.summary["ranks"]), device)

    def _section(self, name: str) -> dict[str, Any]:
        """What can be set of a section; the rest of a model's shape is its folder's."""
        known = {setting.name for setting in settings_of(SECTIONS[name])}
        return {key: value for key, value in self.settings.get(name, {}).items() if key in known}

    @cached_property
    def sampled(self) -> Sampled:
        """The trajectories of GRPO, of at most READ_STEPS steps.

        Raises:
            UserError: a file of them is broken.
        """
        files: dict[int, list[Path]] = {}
        for file in sorted((self.folder / "trajectories" / "grpo").glob("*.jsonl")):
            if match := GROUP_FILE.fullmatch(file.name):
                files.setdefault(int(match[1]), []).append(file)
        steps = [list(files)[place] for place in spread(len(files), READ_STEPS)]
        found = Sampled(len(files), steps)
        shown = {steps[place] for place in spread(len(steps), SHOWN_STEPS)}
        for step in steps:
            groups = [group for file in files[step] for group in _groups(file)]
            records = [record for group in groups for record in group]
            found.lengths[step] = [record["completion_tokens"] for record in records]
            found.turns[step] = [record["turns"] for record in records]
            found.endings[step] = Counter(record["status"] for record in records)
            found.verdicts[step] = Counter(done["verdict"] for record in records for done in record["executions"])
            if step in shown and groups:
                found.groups.append((step, max(groups, key=_contrast)))
        return found


def _stage(file: Path) -> tuple[int, str]:
    """Orders results as a run makes them."""
    return PHASES.index(file.stem) if file.stem in PHASES else len(PHASES), file.stem


def _contrast(group: list[Record]) -> tuple[float, float]:
    rewards = [float(record["reward"]) for record in group]
    return max(abs(float(record["advantage"])) for record in group), max(rewards) - min(rewards)


def _groups(file: Path) -> Iterator[list[Record]]:
    """The groups of a file; while a step is under way its trajectories come in any order."""
    groups: dict[tuple[str, int], list[Record]] = {}
    seen: Counter[tuple[str, int]] = Counter()
    for record in read_trajectories(file):
        check_record(record, NEEDED, file)
        key = record["task"]["id"], record["sample"]
        seen[key] += 1  # a small pool gives a step the same task twice
        groups.setdefault((key[0], seen[key]), []).append(record)
    return (sorted(group, key=lambda record: record["sample"]) for group in groups.values())


def _steps(file: Path) -> list[Record]:
    records = read_records(file)
    for number, record in enumerate(records, 1):
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            raise UserError(
                f"{file}, line {number} is no record of a step: it has no whole number step; remove the line"
            )
    return records


def _object(file: Path) -> Record:
    """The object in a JSON file; an absent file has none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as JSON: {error}; remove it") from error
    if not isinstance(found, dict):
        raise UserError(f"{file} is no JSON object; remove it")
    return found
