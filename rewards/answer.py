"""Is the answer right: numbers within a tolerance, everything else exactly after normalisation.

A form that lists several candidates is wrong: two numbers where one was asked for, or one name with two values.
"""

import math
import re
import unicodedata
from datetime import datetime

from ..rollout.task import Task
from ..rollout.trajectory import Trajectory

RELATIVE = 0.03  # DataMind, arXiv 2509.25084: numbers agree within 3 % of the right one
ABSOLUTE = 1e-6  # around 0, where a share means nothing
ROUNDING = 1e-12  # of float64, between values that are meant to be equal

YES = frozenset({"yes", "y", "true"})
NO = frozenset({"no", "n", "false"})
SCALES = {"thousand": 1e3, "million": 1e6, "billion": 1e9, "trillion": 1e12}
DATE_FORMATS = (
    "%Y-%m-%d", "%Y/%m/%d", "%Y.%m.%d", "%Y-%m-%d %H:%M:%S", "%Y-%m-%dT%H:%M:%S",
    "%d %B %Y", "%d %b %Y", "%B %d %Y", "%b %d %Y",
)  # fmt: skip

NAMED = re.compile(r"@(\w+)\s*\[((?:[^\[\]]|\[[^\[\]]*\])*)\]")  # the value may be a list in brackets of its own
CURRENCY = r"[$€£¥₹]|(?:USD|EUR|GBP|JPY|CHF|INR)\b"
DIGITS = r"(?:\d{1,3}(?:[,'_ ]\d{3})+(?!\d)|\d{1,3}(?:\.\d{3})+(?=,\d)|\d+)"
NUMBER = re.compile(
    rf"(?<![\w.,@])(?<!\d[-/:])(?P<sign>[-+]?)\s?(?:{CURRENCY})?\s?(?P<inner>[-+]?)"
    rf"(?P<value>(?:{DIGITS}(?:[.,]\d+)?|\.\d+)(?:\s?%|(?:e[-+]?\d+)?))"
    rf"(?P<percent>\s?percent\b)?(?:\s?(?P<scale>{'|'.join(SCALES)})\b)?(?:\s?(?:{CURRENCY}))?"
    r"\.?(?!\w|[-.,/:]\d)",  # not the head of a date, a range or a version
    re.IGNORECASE,
)


def answer_correct(prediction: str | None, task: Task) -> bool:
    """Whether a trajectory's answer is the task's.

    Several named values, ``@name[value]``, must all be there and right. With ``answer_type`` "number" a number within
    3 % of the right one counts, in plain, percent, currency or thousands form, also as the only number of a sentence.
    Any other type is compared exactly after normalisation: numbers by value, yes and no by their synonyms, dates by
    the day, and names without regard to case, quotes, spaces, hyphens and underscores.

    Args:
        prediction: the answer's text, None where there is none.
        task: ``answer`` is the right one.
    """
    if prediction is None or not prediction.strip():
        return False
    if gold := named_values(task.answer):
        given = named_values(prediction)
        return all(
            name in given and given[name] is not None and same_value(str(given[name]), str(value), tolerance=RELATIVE)
            for name, value in gold.items()
        )
    if task.answer_type == "number" and len(parse_numbers(task.answer)) == 1:
        return same_number(prediction, task.answer, tolerance=RELATIVE)
    return same_value(prediction, task.answer, tolerance=0.0)


def trajectory_correct(trajectory: Trajectory) -> bool:
    """Whether the answer with which a trajectory ended is right, see ``answer_correct``."""
    return answer_correct(trajectory.answer, trajectory.task)


def needs_judge(prediction: str | None, task: Task) -> bool:
    """Whether only a judge can tell: the right answer is free text, and the prediction is another one."""
    return (
        task.answer_type == "free" and bool(prediction and prediction.strip()) and not answer_correct(prediction, task)
    )


def named_values(text: str) -> dict[str, str | None]:
    """The pairs of DABench's ``@name[value]`` by lower-case name; a list has no brackets, a name given twice None."""
    pairs: dict[str, str | None] = {}
    for name, value in NAMED.findall(text):
        pairs[name.lower()] = None if name.lower() in pairs else value.strip().strip("[]").strip()
    return pairs


def same_value(prediction: str, gold: str, *, tolerance: float) -> bool:
    """Whether two texts say the same: by number where the right one is a number, else exactly after normalisation.

    Lists are compared item by item, numbers in them by value and without tolerance: they may be identifiers.
    """
    if _same_list(prediction, gold):
        return True
    numeric = parse_number(prediction) is not None, parse_number(gold) is not None
    if any(numeric):
        return all(numeric) and same_number(prediction, gold, tolerance=tolerance)
    said, right = normalise(prediction), normalise(gold)
    if said == right:
        return bool(right) or prediction.strip() == gold.strip()
    if right in YES | NO:
        word = re.split(r"[\s,.;:!]", said, maxsplit=1)
        leads = word[0] in YES | NO and (len(word) == 1 or re.match(r"\w+\s*[,.;:!]", prediction.strip()) is not None)
        return leads and (word[0] in YES) == (right in YES)
    day = parse_date(gold)
    return day is not None and day == parse_date(prediction)


def _same_list(prediction: str, gold: str) -> bool:
    said, right = prediction.split(","), gold.split(",")
    return (
        len(said) == len(right) > 1
        and parse_number(gold) is None
        and all(same_value(one, other, tolerance=0.0) for one, other in zip(said, right, strict=True))
    )


def same_number(prediction: str, gold: str, *, tolerance: float) -> bool:
    """Whether the one number in ``prediction`` is within ``tolerance`` of the right one.

    Relative to ``gold``, and absolute within 1e-6 around 0. Where only one of both has a percent sign, 12 % is read as
    12 and as 0.12, since tables hold both.
    """
    found, wanted = parse_numbers(prediction), parse_numbers(gold)
    if len(found) != 1 or len(wanted) != 1:
        return False
    (value, said_percent), (right, is_percent) = found[0], wanted[0]
    pairs = [(value, right)]
    if said_percent != is_percent:
        pairs.append((value / 100, right) if said_percent else (value, right / 100))
    relative, absolute = (tolerance, ABSOLUTE) if tolerance else (ROUNDING, 0.0)
    return any(abs(a - b) <= max(relative * abs(b), absolute) for a, b in pairs)


def parse_number(text: str) -> float | None:
    """The value of a text that is one number and nothing else, percent signs left out; None where it is not."""
    text = _plain(text).strip("\"'`*!“”[]{} ")
    text = re.sub(r"^(?:~|≈|about|approximately|approx\.?)\s*", "", text, flags=re.IGNORECASE)
    match = NUMBER.fullmatch(text)
    bracketed = re.fullmatch(r"\(([^()]+)\)", text)
    if match is None and bracketed and (inner := parse_number(bracketed[1])) is not None:
        return -abs(inner)  # an accountant's minus
    return None if match is None else _value(match)[0]


def parse_numbers(text: str) -> list[tuple[float, bool]]:
    """Every number in a text with whether it is a percentage; a text that is one number gives just that."""
    text = _plain(text)
    whole = parse_number(text)
    if whole is not None:
        return [(whole, "%" in text or "percent" in text.lower())]
    values = [_value(match) for match in NUMBER.finditer(text)]
    return [(value, percent) for value, percent in values if value is not None]


def parse_date(text: str) -> datetime | None:
    """The day (and time, where given) of an ISO date or one with the month's name; None for anything else."""
    text = re.sub(r"\s+", " ", text.strip().strip("\"'`*.").replace(",", " "))
    if not re.search(r"\d{4}", text) or len(text) > 32:
        return None
    for form in DATE_FORMATS:
        try:
            return datetime.strptime(text, form)
        except ValueError:
            continue
    return None


def normalise(text: str) -> str:
    """Lower case, one form of each character, no quotes or brackets around, runs of space, _ and - as one space."""
    text = unicodedata.normalize("NFKC", text).casefold().strip()
    text = text.strip("\"'`*.!()[]{} \t\n“”‘’")
    text = re.sub(r"[\s_\-]+", " ", text)
    return re.sub(r"\s*([,;:/|])\s*", r"\1", text).strip()


def _plain(text: str) -> str:
    text = unicodedata.normalize("NFKC", text).replace("−", "-").replace("–", "-").replace("’", "'")
    return re.sub(r"\s+", " ", text).strip()


def _value(match: re.Match[str]) -> tuple[float | None, bool]:
    digits = match["value"].rstrip("% ").lower()
    percent = match["value"].endswith("%") or match["percent"] is not None
    comma, point = digits.rfind(","), digits.rfind(".")
    if comma >= 0 and (comma > point >= 0 or not re.match(r"\d{1,3}(?:,\d{3})+(?!\d)", digits)):
        digits = digits.replace(".", "").replace(",", ".")  # a decimal comma
    digits = re.sub(r"[,'_ ]", "", digits)
    try:
        value = float(digits) * SCALES.get((match["scale"] or "").lower(), 1.0)
    except ValueError:  # "1,23,45" has two decimal commas
        return None, percent
    signs = (match["sign"] + match["inner"]).count("-")
    return (-value if signs % 2 else value) if math.isfinite(value) else None, percent
