"""The settings of a section of the configuration: fields with a description and bounds, read strictly, and described.

A section is a frozen dataclass. Its fields made by :func:`setting` are what a user may write.
"""

import dataclasses
import difflib
import json
import math
import tomllib
import types
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from .errors import UserError

Bound = float | None


def setting(
    default: Any, description: str, *, minimum: Bound = None, maximum: Bound = None, changeable: bool = False
) -> Any:
    """A dataclass field with its description and, for numbers, its inclusive bounds.

    ``changeable``: it says how a run computes and not what, so a run that is resumed may have another value.
    """
    metadata = {"help": description, "minimum": minimum, "maximum": maximum, "changeable": changeable}
    return dataclasses.field(default=default, metadata=metadata)


def settings_of(section: type) -> list[dataclasses.Field]:
    """The fields that are settings, in their order."""
    return [f for f in dataclasses.fields(section) if "help" in f.metadata]


def build(name: str, cls: type, values: dict[str, Any]) -> Any:
    """A section called ``name`` with these values.

    Raises:
        UserError: an unknown key, a wrong type, a value out of bounds.
    """
    hints = get_type_hints(cls)
    fields = {f.name: f for f in settings_of(cls)}
    for key, value in values.items():
        if key not in fields:
            raise UserError(f"unknown configuration key '{name}.{key}'{nearest(key, fields)}")
        values[key] = value = _convert(f"{name}.{key}", hints[key], value)
        low, high = fields[key].metadata["minimum"], fields[key].metadata["maximum"]
        if (low is not None and value < low) or (high is not None and value > high):
            bounds = f"at least {low:g}" if high is None else f"from {low:g} to {high:g}"
            raise UserError(f"{name}.{key} is {value}, expected {bounds}")
    return cls(**values)


def describe(name: str, section: type) -> list[str]:
    """The section and each of its settings with its type, default and description, a line each."""
    lines = [f"\n[{name}] {(section.__doc__ or '').strip()}"]
    for f in settings_of(section):
        key = f"{name}.{f.name}={spell(f.default)}"
        lines.append(f"  {key:<40} {type_name(section, f)}: {f.metadata['help']}")
    return lines


def type_name(section: type, field: dataclasses.Field) -> str:
    """The type of a setting in words."""
    return _type_name(get_type_hints(section)[field.name])


def _convert(key: str, hint: Any, value: Any) -> Any:
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise UserError(f"{key} is {value!r}, expected one of {', '.join(map(repr, get_args(hint)))}")
        return value
    if hint is float and type(value) is int:
        return float(value)
    if hint is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)  # an override such as run.name=7
    if type(value) is not hint or (hint is float and not math.isfinite(value)):
        raise UserError(f"{key} is {json.dumps(value, default=str)}, expected {_type_name(hint)}")
    return value


def nearest(key: str, known: Iterable[str]) -> str:
    """The end of an error about an unknown name: the known one that was meant, or all of them."""
    match = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else f"; known: {', '.join(sorted(known))[:300]}"


def read_toml(path: str | Path, configs: Path) -> dict[str, Any]:
    """The values of a TOML file, or of one in ``configs``, which is named without its ending.

    Raises:
        UserError: there is none, or it is malformed.
    """
    file = Path(path)
    if not file.is_file():
        packaged = configs / f"{file.name.removesuffix('.toml')}.toml"
        if file.parent != Path(".") or not packaged.is_file():
            known = sorted(p.stem for p in configs.glob("*.toml"))
            raise UserError(f"no configuration file {str(path)!r}; give a file or one of {', '.join(known)}")
        file = packaged
    try:
        return tomllib.loads(file.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{file} cannot be read as TOML: {error}") from error


def shares(key: str, text: str, names: Sequence[str]) -> dict[str, float]:
    """Shares by name, in all 1, of a setting such as "40/35/25".

    Raises:
        UserError: there is not a percentage for each name, or they do not add up to 100.
    """
    try:
        values = [float(part) for part in text.split("/")]
    except ValueError:
        values = []
    if len(values) != len(names) or not all(value >= 0 for value in values) or abs(sum(values) - 100) > 1e-6:
        raise UserError(f"{key} is {text!r}, expected {len(names)} percentages of {'/'.join(names)} that add up to 100")
    return {name: value / 100 for name, value in zip(names, values, strict=True)}


def step_numbers(key: str, text: str) -> frozenset[int]:
    """The steps of a setting such as "0,50,100".

    Raises:
        UserError: there is something else between the commas.
    """
    parts = [part.strip() for part in text.split(",")] if text.strip() else []
    wrong = [part for part in parts if not part.isdecimal()]
    if wrong:
        raise UserError(f'{key} is {text!r} and {wrong[0]!r} is no step; expected numbers from 0 on such as "0,50,100"')
    return frozenset(map(int, parts))


def kv_bytes(kv_memory: float | str, device_memory: float) -> int:
    """Bytes that ``rollout.kv_memory`` means on a device with so much memory: GiB, or a share such as "40%".

    Raises:
        UserError: it is neither.
    """
    text = str(kv_memory).strip()
    share = text.endswith("%")
    try:
        number = float(text.removesuffix("%"))
    except ValueError:
        number = -1.0
    if not 0 < number < (100 if share else math.inf):
        raise UserError(f'kv_memory is {kv_memory!r}, expected GiB such as 4, or a share of the device such as "40%"')
    return int(number / 100 * device_memory) if share else int(number * 2**30)


def _type_name(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "|".join(map(str, get_args(hint)))
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(map(_type_name, get_args(hint)))
    return {int: "a whole number", float: "a finite number", bool: "true or false", str: "a string"}[hint]


def spell(value: Any) -> str:
    """A value as a command line has it."""
    return json.dumps(value) if isinstance(value, (bool, str)) else str(value)
