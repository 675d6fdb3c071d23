"""The numbers of a curve: its points in the records, a running mean, points few enough to draw, and round ticks."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]
MAX_TICKS = 5


def series(records: Sequence[Mapping[str, Any]], name: str) -> tuple[Values, Values]:
    """(steps, values), each [N], of the records that have a number under this name; the first step is 1."""
    pairs = [(record["step"] + 1, record[name]) for record in records if record.get(name) is not None]
    steps, values = np.array(pairs, dtype=float).reshape(-1, 2).T
    return steps, values


def smooth(values: Values) -> Values:
    """A running mean over about a tenth of the series, cut off at both ends. [N] -> [N]"""
    half = len(values) // 20
    sums = np.concatenate([[0.0], np.cumsum(values)])
    centre = np.arange(len(values))
    first, last = np.maximum(centre - half, 0), np.minimum(centre + half + 1, len(values))
    return (sums[last] - sums[first]) / (last - first)


def thinned(values: Values, most: int) -> NDArray[np.intp]:
    """Indices of at most ``most`` points to draw, in order: the lowest and the highest of each stretch, and the ends.

    So a spike of one step stays, whatever is left out.
    """
    if len(values) <= most:
        return np.arange(len(values))
    stretches = np.array_split(np.arange(len(values)), (most - 2) // 2)
    extremes = [stretch[[values[stretch].argmin(), values[stretch].argmax()]] for stretch in stretches]
    return np.unique(np.concatenate([*extremes, [0, len(values) - 1]]))


def spread(count: int, most: int) -> list[int]:
    """At most ``most`` of the indices below ``count``, evenly spread, with the first and the last."""
    return sorted({round(place) for place in np.linspace(0, count - 1, min(count, most))}) if count else []


def ticks(low: float, high: float) -> list[float]:
    """Round numbers from ``low`` to ``high``, both inclusive: multiples of 1, 2 or 5 times a power of ten."""
    if not high - low > 1e-9 * max(abs(low), abs(high)):  # as good as one value
        return [low]
    rough = (high - low) / MAX_TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    unit = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    first, last = math.ceil(low / unit - 1e-9), math.floor(high / unit + 1e-9)
    return [float(f"{place * unit:.12g}") for place in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten from ``low`` to ``high``, at most MAX_TICKS + 1; under two of them round numbers as ``ticks``."""
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    if last - first < 1:
        return ticks(low, high)
    return [10.0**power for power in range(first, last + 1, -(-(last - first) // MAX_TICKS))]


def brief(value: float) -> str:
    """A number for an axis: four digits, in few characters."""
    text = f"{value:.4g}" if not value or abs(value) >= 1e-3 else f"{float(f'{value:.3e}'):e}"
    digits, letter, power = text.partition("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(power)}" if letter else text
