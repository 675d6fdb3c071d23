"""The eighteen types of data-analysis tasks of DataMind (arXiv 2509.25084), what each knows, and what is asked of each.

A type's description and exemplars tell a teacher model what to ask; its workflow tells it how to go about the answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .asking.column_operations import COLUMN_OPERATIONS
from .asking.composition import COMPOSITIONS, Composition
from .asking.group_operations import GROUP_OPERATIONS
from .asking.operations import OPERATIONS, REFLECTIONS
from .asking.questions import Operation
from .asking.reflections import MORE_REFLECTIONS
from .asking.relation_operations import RELATION_OPERATIONS

# How much is asked and shown: what a model from nothing can learn, or everything.
Detail = Literal["short", "full"]
ALL_OPERATIONS = (*OPERATIONS, *COLUMN_OPERATIONS, *RELATION_OPERATIONS, *GROUP_OPERATIONS)
ALL_REFLECTIONS = (*REFLECTIONS, *MORE_REFLECTIONS)


@dataclass(frozen=True)
class TaskType:
    """One type of task.

    Args:
        name: the type's name.
        description: what is asked, in a few words.
        exemplars: questions of the type about tables of all kinds.
        workflow: sentences of advice: what to look at first, and the usual mistakes.
        operations: what can be asked and is answered by code.
        reflections: what can be asked and is answered from the table's description alone.
    """

    name: str
    description: str
    exemplars: tuple[str, ...]
    workflow: tuple[str, ...]
    operations: tuple[Operation | Composition, ...]
    reflections: tuple[Operation, ...]


@dataclass(frozen=True)
class _Knowledge:
    description: str
    exemplars: tuple[str, ...]
    workflow: tuple[str, ...]


_KNOWLEDGE = {
    "aggregation": _Knowledge(
        "one number that sums up the values of a column, such as a mean or a total",
        (
            "What is the average price of all houses?",
            "What is the total revenue of the shops in the north?",
            "Add up the rainfall of the first ten days.",
        ),
        (
            "Check that the column is numeric; numbers with units or separators must be converted first.",
            "Decide whether a mean, a sum or a weighted mean is asked for.",
            "Select the rows before you aggregate, not after.",
            "Missing values are left out of a mean, and they are not zeros.",
        ),
    ),
    "anomaly detection": _Knowledge(
        "values that lie far from the rest of their column",
        (
            "How many payments are more than three standard deviations above the mean?",
            "Which sensor reading is farthest from the average?",
            "By the interquartile rule, how many outliers does the delay have?",
        ),
        (
            "Use the rule that the question names: standard deviations, interquartile ranges or a fixed limit.",
            "Compute mean and deviation over all present values, the outliers among them.",
            "Look at both ends unless only one is asked for.",
            "A missing value is not an outlier.",
        ),
    ),
    "arithmetic": _Knowledge(
        "a difference, a ratio or a percentage of numbers taken from columns",
        (
            "What is the mean income minus the mean spending?",
            "How many times as large as the smallest order is the largest?",
            "By how many percent do boys outweigh girls on average?",
        ),
        (
            "Compute both numbers by themselves first, then combine them.",
            "Keep the order: a minus b is not b minus a, and the base of a percentage stands below the line.",
            "A ratio of means is not the mean of the ratios.",
            "Round only the last result.",
        ),
    ),
    "causal": _Knowledge(
        "the effect of one variable on another, with or without control for others",
        (
            "What is the average effect of the training on wages, as a difference in means?",
            "What is the effect of the dose on blood pressure when age is controlled for?",
            "Does the link of ice cream and sunburn vanish once temperature is held fixed?",
        ),
        (
            "Name the treatment, the outcome and what could confound them.",
            "Where the treatment was random a difference in means is enough; else adjust, by regression or by strata.",
            "Take every quantity over the same rows, those where all the variables are present.",
            "Control for common causes, not for what the treatment itself changes.",
            "A correlation alone is not an effect.",
        ),
    ),
    "comparison": _Knowledge(
        "which of several columns, groups or values is larger, smaller or more frequent",
        (
            "Which region has the highest mean temperature?",
            "Does height or weight vary more?",
            "Which payment method is more frequent, cash or card?",
        ),
        (
            "Compute the same measure for every candidate.",
            "Group first, then aggregate, then take the group at the extreme.",
            "Return the name of the group, not its value.",
            "Look for ties before you name one winner.",
        ),
    ),
    "correlation": _Knowledge(
        "whether and how strongly two columns move together",
        (
            "What is the correlation between age and income?",
            "Which measurement correlates most strongly with the price?",
            "Do taller plants tend to have more leaves?",
        ),
        (
            "Check that both columns are numeric and that neither is constant.",
            "Use the rows where both values are present.",
            "Pearson's coefficient is meant unless ranks or Spearman are named.",
            "A correlation is between -1 and 1; anything else is a covariance or a mistake.",
        ),
    ),
    "counting": _Knowledge(
        "how many rows meet a condition",
        (
            "How many passengers are older than 60?",
            "How many rows are from Spain and have a score above 80?",
            "How often does the most frequent colour occur?",
        ),
        (
            "Write the condition as a mask and sum it.",
            "Mind whether the limit itself is included: above is not at least.",
            "Use & and | with brackets around each comparison.",
            "Text must match exactly, with its case and its spaces.",
        ),
    ),
    "data preprocessing": _Knowledge(
        "what must be known or done before an analysis: missing values, repeated ones, scales",
        (
            "How many values of the age column are missing?",
            "After the gaps are filled with the median, what is the mean income?",
            "How many rows are left once every incomplete row is dropped?",
        ),
        (
            "Look at the types and at the number of missing values first.",
            "Do the steps in the order in which the question names them.",
            "Compute a filling value before you fill.",
            "Assign the result: most pandas methods return a new object.",
        ),
    ),
    "descriptive": _Knowledge(
        "the extremes of a column, its most common value, or what the table consists of",
        (
            "What is the highest score?",
            "What is the range of the daily temperatures?",
            "Which species is the most common?",
        ),
        (
            "Look at the first rows and at the types of the columns.",
            "Report the value itself, not the row in which it stands.",
            "The first row has index 0.",
        ),
    ),
    "distribution": _Knowledge(
        "where the values of a column lie: percentiles, shares, skewness",
        (
            "What is the 90th percentile of the waiting time?",
            "What percentage of the loans is above 10,000?",
            "How skewed are the incomes?",
        ),
        (
            "A share is a count by the number of rows; times 100 if percent are asked for.",
            "Quantiles take a number from 0 to 1, percentiles one from 0 to 100.",
            "Say whether missing values are part of the whole.",
            "Compare mean and median to see which way a column is skewed.",
        ),
    ),
    "domain specific": _Knowledge(
        "a measure that a field has a name for: growth rates, inequality, diversity, concentration",
        (
            "What is the compound annual growth rate of the sales from 2010 to 2020?",
            "What is the Gini coefficient of the incomes?",
            "How diverse are the species, by Shannon's entropy?",
        ),
        (
            "Write down the field's formula before you write code.",
            "Check what the formula needs: positive values, shares that add up to 1, a base of the logarithm.",
            "Give the result in the unit that is asked for, percent or a fraction.",
            "Check that the result lies where the measure can lie, such as from 0 to 1.",
        ),
    ),
    "fact checking": _Knowledge(
        "whether a statement about the table is true",
        (
            "Is the mean height above 170?",
            "Do more than half of the customers live in cities?",
            "Is it true that smokers have a higher average charge?",
        ),
        (
            "Turn the statement into one number or two and a comparison.",
            "Print the numbers as well as the verdict.",
            "Answer yes or no to the statement as it is worded, with care for above, below and negations.",
        ),
    ),
    "feature engineering": _Knowledge(
        "a new column made from others, and a number about it",
        (
            "Make a column price per square metre. What is its median?",
            "Flag the days with above-average sales. How many are there?",
            "What is the mean of the logarithm of the income?",
        ),
        (
            "Make the new column for all rows at once, not in a loop.",
            "A missing part makes the new value missing.",
            "Look out for division by zero and for logarithms of numbers that are not positive.",
            "Then compute the number that is asked for on the new column.",
        ),
    ),
    "impact": _Knowledge(
        "how much one column changes with another",
        (
            "By how much does the price change with one more room, by linear regression?",
            "What share of the variance of sales does advertising explain?",
            "How much does being in group B raise the mean score?",
        ),
        (
            "Decide which column is the cause and which the effect: the slope of y on x is not that of x on y.",
            "Use only rows where both are present.",
            "A slope has units; a correlation has none.",
            "Compare with the overall mean when the impact of a group is asked for.",
        ),
    ),
    "multi-hop numerical": _Knowledge(
        "a number that needs another result first, such as a number about the rows which that result selects",
        (
            "What is the average age in the city with the most customers?",
            "What is the median price of the rows whose weight is above the mean weight?",
            "Take the ten largest countries. What is their mean income?",
        ),
        (
            "Split the question into steps and print the result of each.",
            "Keep each result in a variable of its own.",
            "Check how many rows are selected before you compute on them.",
            "Mind whether a later step is about all rows or about those selected before.",
        ),
    ),
    "ranking": _Knowledge(
        "the row, the value or the group at a given place of an order",
        (
            "Which player has the third highest score?",
            "What is the second smallest weight?",
            "At which rank is Norway by life expectancy?",
        ),
        (
            "Sort in the direction that the question asks for.",
            "The nth place has index n - 1.",
            "Sorting puts missing values last; they have no rank.",
            "Look for ties around the place that is asked for.",
        ),
    ),
    "statistical": _Knowledge(
        "a statistic of a column: median, standard deviation, standard error, a test",
        (
            "What is the median income?",
            "What is the standard error of the mean weight?",
            "What is Welch's t statistic for the difference of the two groups?",
        ),
        (
            "Leave missing values out, and count only those that are present.",
            "pandas divides by n - 1, numpy by n unless told otherwise.",
            "Check the sizes of the groups before a test.",
            "The variance is the square of the standard deviation.",
        ),
    ),
    "time-based calculation": _Knowledge(
        "values at or after a point of time, changes and trends",
        (
            "By how much did the population change from 1990 to 2010?",
            "What was the mean price after 2005?",
            "What is the largest rise from one year to the next?",
        ),
        (
            "Look at how time is written: as a year, a date or a text.",
            "Order the rows by time before you take differences or moving averages.",
            "After a year excludes it, since a year includes it, unless the question says otherwise.",
            "Check that there is a row for each point of time that is named.",
        ),
    ),
}


def _types(operations: tuple[Operation | Composition, ...], reflections: tuple[Operation, ...]) -> dict[str, TaskType]:
    """The types that have an operation or a reflection among these."""
    found = {}
    for name, known in _KNOWLEDGE.items():
        of_code = tuple(operation for operation in operations if operation.task_type == name)
        of_thought = tuple(operation for operation in reflections if operation.task_type == name)
        if of_code or of_thought:
            found[name] = TaskType(name, known.description, known.exemplars, known.workflow, of_code, of_thought)
    return found


TASK_TYPES: dict[str, TaskType] = _types((*ALL_OPERATIONS, *COMPOSITIONS), ALL_REFLECTIONS)
_BASIC_TYPES = _types(OPERATIONS, REFLECTIONS)


def task_types(detail: Detail) -> dict[str, TaskType]:
    """The types with what is asked in short or in full form; the short one has the basic set alone."""
    return TASK_TYPES if detail == "full" else _BASIC_TYPES
