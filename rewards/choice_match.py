"""Does an answer name the right option: its letter in the forms that people write, or its text."""

import re

from .value_match import normalise, same_value

# "B", "(b)", "B.", "B. Paris", "(B) Paris", "B - Paris"
OPTION = re.compile(r"[(\[]?([A-Za-z])(?:[)\].:]*+|(?:[)\].:]++|\s[-–])\s++(\S.*))", re.DOTALL)
WORDS = "so|thus|hence|therefore|the|my|final|correct|right|best|answer|option|choice|it|is|would|be"
LEAD = re.compile(rf"(?:(?:{WORDS})\b[\s:,=*]*+)*+", re.IGNORECASE)
HEAD = re.compile(r"[(\[*]*+([A-Z])\b(?!['’])")
# A letter that stands alone; "A" and "I" in front of a word are an article and a pronoun.
LETTER = re.compile(
    r"(?<![\w'’.@-])(?:\(([A-Za-z])\)|(?:[Oo]ption|[Cc]hoice)\s([A-Za-z])|([B-HJ-Z]|[AI](?!\s[a-z])))(?!\w|['’.-]\w)"
)
NEGATION = re.compile(r"\b(?:not|neither|nor|never|cannot|except)\b|n['’]t\b", re.IGNORECASE)
MARKS = " \t\r\n\"'`*.!“”‘’"


def same_choice(prediction: str, gold: str) -> bool:
    """Whether an answer names the right option and no other.

    A gold that begins with an option's letter ("B", "(b)", "B. Paris") is met by the letter, bare or bracketed, with
    its own text, behind "option" or in a sentence; where the gold has the text, by that text alone too. An answer
    that names two options, or puts another text behind the letter, is wrong. Any other gold ("yes", a column's name)
    is compared by ``same_value`` without tolerance.
    """
    if same_value(prediction, gold, tolerance=0.0):
        return True
    option = OPTION.fullmatch(gold.strip(MARKS))
    if option is None:
        return False
    letter, text = option[1].upper(), option[2] or ""
    said = prediction.strip(MARKS)
    start = LEAD.match(said)
    led = start is not None and start.end() > 0
    said = said[start.end() :].strip(MARKS) if start else said
    if text and same_value(said, text, tolerance=0.0):
        return True
    if given := OPTION.fullmatch(said):
        rest = given[2] or ""
        if rest and normalise(text) not in normalise(rest):
            return False
        return given[1].upper() == letter and _letters(rest) <= {letter}
    head = HEAD.match(said) if led else None
    named = _letters(said) | ({head[1]} if head else set())
    return named == {letter} and not _denied(said)


def _letters(text: str) -> set[str]:
    return {next(filter(None, match.groups())).upper() for match in LETTER.finditer(text)}


def _denied(text: str) -> bool:
    """Whether a negation stands in front of the first option."""
    first = LETTER.search(text)
    return first is not None and NEGATION.search(text, 0, first.start()) is not None
