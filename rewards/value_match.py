"""Do two texts say the same: numbers within a tolerance, everything else exactly after normalisation.

Every function takes any text and needs time linear in its length.
"""

import math
import re
import unicodedata
from datetime import datetime

ABSOLUTE = 1e-6  # around 0, where a share means nothing
ROUNDING = 1e-12  # of float64, between values that are meant to be equal

YES = frozenset({"yes", "y", "true"})
NO = frozenset({"no", "n", "false"})
SCALES = {"thousand": 1e3, "million": 1e6, "billion": 1e9, "trillion": 1e12}
DATE_FORMATS = (
    "%Y-%m-%d", "%Y/%m/%d", "%Y.%m.%d", "%Y-%m-%d %H:%M:%S", "%Y-%m-%dT%H:%M:%S",
    "%d %B %Y", "%d %b %Y", "%B %d %Y", "%b %d %Y",
)  # fmt: skip

NORMALISED = 500  # characters normalised at a time: Unicode sorts a run of combining marks in quadratic time
CURRENCY = r"[$€£¥₹]|(?:USD|EUR|GBP|JPY|CHF|INR)\b"
DIGITS = r"(?:\d{1,3}(?:[,'_ ]\d{3})+(?!\d)|\d{1,3}(?:\.\d{3})+(?=,\d)|\d+)"
NUMBER = re.compile(
    rf"(?<![\w.,@])(?<!\d[-/:])(?P<sign>[-+]?)\s?(?:{CURRENCY})?\s?(?P<inner>[-+]?)"
    rf"(?P<value>(?:{DIGITS}(?:[.,]\d+)?|\.\d+)(?:\s?%|(?:e[-+]?\d+)?))"
    rf"(?P<percent>\s?percent\b)?(?:\s?(?P<scale>{'|'.join(SCALES)})\b)?(?:\s?(?:{CURRENCY}))?"
    r"\.?(?!\w|[-.,/:]\d)",  # not the head of a date, a range or a version
    re.IGNORECASE,
)


def same_value(prediction: str, gold: str, *, tolerance: float) -> bool:
    """Whether two texts say the same: by number where either is a number, else exactly after normalisation.

    Lists are compared item by item, numbers in them by value and without tolerance: they may be identifiers. Yes and
    no may be followed by an explanation. Symmetric where `tolerance` is 0.

    Args:
        tolerance: largest difference of two numbers as a share of the right one.
    """
    if _same_list(prediction, gold):
        return True
    numeric = parse_number(prediction) is not None, parse_number(gold) is not None
    if any(numeric):
        return all(numeric) and same_number(prediction, gold, tolerance=tolerance)
    said, right = normalise(prediction), normalise(gold)
    if said == right:
        return bool(right) or prediction.strip() == gold.strip()
    for word, text in ((right, prediction), (said, gold)):
        if word in YES | NO:
            lead = _leading_word(text)
            return lead in YES | NO and (lead in YES) == (word in YES)
    day = parse_date(gold)
    return day is not None and day == parse_date(prediction)


def _leading_word(text: str) -> str:
    """The first word of a text if the text ends there or goes on behind a comma or a stop."""
    word = re.match(r"(\w++)(?:\s*+[,.;:!]|$)", normalise(text))
    return word[1] if word else ""


def _same_list(prediction: str, gold: str) -> bool:
    said, right = prediction.split(","), gold.split(",")
    return (
        len(said) == len(right) > 1
        and (parse_number(gold) is None or parse_number(prediction) is None)  # "1,234" is one number
        and all(same_value(one, other, tolerance=0.0) for one, other in zip(said, right, strict=True))
    )


def same_number(prediction: str, gold: str, *, tolerance: float) -> bool:
    """Whether the one number in ``prediction`` is within ``tolerance`` of the right one.

    Relative to ``gold``, and absolute within 1e-6 around 0; without a tolerance, whole numbers are compared exactly and
    others up to rounding. Where only one of both has a percent sign, 12 % is read as 12 and as 0.12, since tables hold
    both.
    """
    if not tolerance and all(re.fullmatch(r"\s*[0-9]+\s*", text) for text in (prediction, gold)):
        return prediction.strip().lstrip("0") == gold.strip().lstrip("0")  # identifiers may have more than 15 digits
    found, wanted = parse_numbers(prediction), parse_numbers(gold)
    if len(found) != 1 or len(wanted) != 1:
        return False
    (value, said_percent), (right, is_percent) = found[0], wanted[0]
    pairs = [(value, right)]
    if said_percent != is_percent:
        pairs.append((value / 100, right) if said_percent else (value, right / 100))
    if tolerance:
        return any(abs(a - b) <= max(tolerance * abs(b), ABSOLUTE) for a, b in pairs)
    return any(equal_up_to_rounding(a, b) for a, b in pairs)


def equal_up_to_rounding(one: float, other: float) -> bool:
    """Whether two finite numbers are equal: whole ones exactly, others within 1e-12 of the larger."""
    if float(one).is_integer() and float(other).is_integer():
        return one == other
    return abs(one - other) <= ROUNDING * max(abs(one), abs(other))


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
    if len(text) > 32 or not re.search(r"\d{4}", text):
        return None
    for form in DATE_FORMATS:
        try:
            return datetime.strptime(text, form)
        except ValueError:
            continue
    return None


def normalise(text: str) -> str:
    """Lower case, one form of each character, no quotes or brackets around, runs of space, _ and - as one space."""
    text = _one_form(text).casefold().strip()
    text = text.strip("\"'`*.!()[]{} \t\n“”‘’")
    text = re.sub(r"[\s_\-]+", " ", text)
    return re.sub(r"\s*([,;:/|])\s*", r"\1", text).strip()


def _one_form(text: str) -> str:
    if text.isascii():
        return text
    pieces = (text[start : start + NORMALISED] for start in range(0, len(text), NORMALISED))
    return "".join(unicodedata.normalize("NFKC", piece) for piece in pieces)


def _plain(text: str) -> str:
    text = _one_form(text).replace("−", "-").replace("–", "-").replace("’", "'")
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
