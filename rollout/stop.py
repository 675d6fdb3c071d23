"""Where a turn ends: stop strings, found as tokens come."""

from collections.abc import Sequence
from typing import Protocol


class Decodes(Protocol):
    """What sampling needs of ``engine.Tokenizer``."""

    vocab_size: int
    eos_id: int

    def decode(self, ids: Sequence[int]) -> str: ...


class StopFinder:
    """Tells whether the newest token of a turn completes a stop string, at the price of a set lookup for most tokens.

    Args:
        texts: the text of each token by itself.
        tokenizer: decodes the tail of a turn when a token raises the alarm.
        stop: the strings.
    """

    def __init__(self, texts: Sequence[str], tokenizer: Decodes, stop: tuple[str, ...]) -> None:
        self._texts = texts
        self._decode = tokenizer.decode
        self._stop = stop
        self._longest = max((len(text.encode()) for text in stop), default=0)
        last = {text[-1] for text in stop}
        # A token that is part of a character shows U+FFFD: it may complete any character.
        self.alarm = frozenset(i for i, text in enumerate(texts) if "\ufffd" in text or not last.isdisjoint(text))

    def found(self, token_ids: Sequence[int], start: int) -> bool:
        """Whether a stop string lies in ``token_ids[start:]``, given that none lay there before the last token."""
        begin, characters = len(token_ids), 0
        while begin > start and characters < self._longest:
            begin -= 1
            characters += len(self._texts[token_ids[begin]])
        tail = self._decode(token_ids[begin:])
        return any(text in tail for text in self._stop)
