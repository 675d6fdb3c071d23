"""The types of data-analysis tasks and the operations of each (DataMind, arXiv 2509.25084, names eighteen types)."""

from __future__ import annotations

from dataclasses import dataclass

from .operations import OPERATIONS, REFLECTIONS
from .questions import Operation

DESCRIPTIONS = {
    "aggregation": "one number that sums up all values of a column, such as a mean or a total",
    "anomaly detection": "values that lie far from the rest of their column",
    "arithmetic": "a difference or a ratio of numbers taken from columns",
    "comparison": "which of several columns or groups is larger or smaller",
    "correlation": "whether and how strongly two columns move together",
    "counting": "how many rows meet a condition",
    "data preprocessing": "what must be known before an analysis: missing and repeated values",
    "descriptive": "the extremes of a column, or what the table consists of",
    "distribution": "where the values of a column lie: percentiles and shares",
    "fact checking": "whether a statement about the table is true",
    "feature engineering": "a new column made from others, and a number about it",
    "impact": "how much one column changes with another",
    "multi-hop numerical": "a number about the rows that another column selects",
    "ranking": "the row or the value at a given place of an order",
    "statistical": "a statistic of a column: median, standard deviation",
    "time-based calculation": "values at or after a point of time",
}


@dataclass(frozen=True)
class TaskType:
    """One type: `operations` are answered by code, `reflections` from the table's description alone."""

    name: str
    description: str
    operations: tuple[Operation, ...]
    reflections: tuple[Operation, ...]


TASK_TYPES: dict[str, TaskType] = {
    name: TaskType(
        name,
        description,
        tuple(operation for operation in OPERATIONS if operation.task_type == name),
        tuple(operation for operation in REFLECTIONS if operation.task_type == name),
    )
    for name, description in DESCRIPTIONS.items()
}
