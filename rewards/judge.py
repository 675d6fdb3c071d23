"""The judge of free-text answers: a model behind an endpoint or a local one, with what it said kept on disk.

    judge = open_judge("qwen2.5-7b-instruct@http://127.0.0.1:8000/v1", run_folder / "verdicts.jsonl")
    judge.check()                                                     # before training: one sentence if it cannot judge
    verdicts = judge.verdicts([Question("Which year was best?", "1998", "It was 1998.")])          # [True]

A verdict is True, False or None. None, for an outage or a reply that is no verdict, is nothing about the answer: the
sample is left out of its group. Source: DataMind, arXiv 2509.25084, whose free-text answers a model judges.
"""

import logging
import time
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Protocol

import torch

from ..engine.errors import UserError
from .endpoint import one_line
from .kept import Kept
from .open import open_model
from .reply import Message, NoReply
from .verdict import SYSTEM, Question, parse, render

TRIVIAL = (
    (Question("What is the sum of two and two?", "four", "four"), True),
    (Question("What is the sum of two and two?", "four", "seven"), False),
)
REPLY_TOKENS = 32  # of a local model: a verdict takes 10

logger = logging.getLogger(__name__)


class Asked(Protocol):
    """A model that replies: its name in the cache, and what it says, or why it says nothing, see `Endpoint.replies`."""

    @property
    def identity(self) -> str: ...

    def replies(
        self, conversations: Sequence[Sequence[Message]], is_usable: Callable[[str], bool]
    ) -> list[str | NoReply]: ...


class Judge:
    """Verdicts from a cache and, where it has none, from a model.

    Args:
        model: what is asked.
        cache: what it said before.
        spec: how its user named it.
    """

    def __init__(self, model: Asked, cache: "VerdictCache", spec: str) -> None:
        self._model, self._cache, self._spec = model, cache, spec
        self._counts = dict.fromkeys(("judged", "cached", "failed"), 0)
        self._seconds = 0.0
        self._warned = False

    def check(self) -> None:
        """Has a trivial right and a trivial wrong answer judged anew.

        Raises:
            UserError: there is no verdict, or a wrong one.
        """
        found = self._ask([render(question) for question, _ in TRIVIAL])
        for verdict, (question, truth) in zip(found, TRIVIAL, strict=True):
            if isinstance(verdict, str):
                raise UserError(f"the judge {self._spec} gives no verdict ({verdict}); mend it or name another one")
            if verdict != truth:
                raise UserError(
                    f"the judge {self._spec} calls the answer {question.answer!r} to {question.question!r} "
                    f"{'correct' if verdict else 'incorrect'}; name a model that can judge"
                )

    def verdicts(self, questions: Sequence[Question]) -> list[bool | None]:
        """Whether each answer is right: True, False, or None where there is no verdict; equal questions are asked once.

        The first time that there is none, a warning says why.

        Raises:
            UserError: the cache cannot be read or written.
        """
        begin = time.perf_counter()
        prompts = [render(question) for question in questions]
        keys = [sha256(f"{self._model.identity}\n{SYSTEM}\n{prompt}".encode()).hexdigest() for prompt in prompts]
        self._cache.refresh()
        new = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if self._cache.get(key) is None}
        said = dict(zip(new, self._ask(list(new.values())) if new else [], strict=True))
        given = {key: verdict for key, verdict in said.items() if isinstance(verdict, bool)}
        self._cache.add(given)
        found = [self._cache.get(key) for key in keys]
        failed = found.count(None)
        if failed and not self._warned:
            self._warned = True
            reason = next(verdict for verdict in said.values() if isinstance(verdict, str))
            logger.warning(
                "the judge %s gave no verdict on %d of %d answers (%s); those are left out, as will be all that follow",
                self._spec,
                failed,
                len(found),
                reason,
            )
        self._counts["judged"] += len(given)
        self._counts["failed"] += failed
        self._counts["cached"] += len(found) - failed - len(given)
        self._seconds += time.perf_counter() - begin
        return found

    def _ask(self, prompts: Sequence[str]) -> list[bool | str]:
        """The model's verdict on each prompt, or the reason why there is none."""
        conversations: list[list[Message]] = [
            [{"role": "system", "content": SYSTEM}, {"role": "user", "content": prompt}] for prompt in prompts
        ]
        found: list[bool | str] = []
        for reply in self._model.replies(conversations, lambda text: parse(text) is not None):
            if isinstance(reply, NoReply):
                found.append(str(reply))
            else:
                verdict = parse(reply)
                found.append(f"its reply is no verdict: {one_line(reply)!r}" if verdict is None else verdict)
        return found

    def metrics(self) -> dict[str, float]:
        """Since the last call: answers that the model judged, those known from before or from a double, those without
        a verdict, and seconds."""
        metrics = {f"judge/{name}": float(value) for name, value in self._counts.items()}
        metrics["judge/seconds"] = self._seconds
        self._counts, self._seconds = dict.fromkeys(self._counts, 0), 0.0
        return metrics


class VerdictCache(Kept[bool]):
    """The judge's verdicts on disk, see `Kept`.

    Args:
        file: made if absent, with its folder.

    Raises:
        UserError: it cannot be read or written.
    """

    def __init__(self, file: Path) -> None:
        super().__init__(
            file, "the judge's verdicts", "verdict", bool, lambda value: value if isinstance(value, bool) else None
        )


def open_judge(
    spec: str,
    cache_file: Path,
    *,
    device: torch.device | None = None,
    concurrency: int = 8,
    timeout_s: float = 60.0,
) -> Judge:
    """A judge by its name; it is asked nothing yet.

    Args:
        spec: ``MODEL@http://HOST:PORT/v1`` or a Hugging Face folder, see ``open_model``.
        cache_file: its verdicts are kept there; ranks and runs may share it.
        device: of a local model; None: the CPU.
        concurrency: questions at once.
        timeout_s: seconds of one request.

    Raises:
        UserError: ``spec`` is neither, the folder does not hold a model, or the cache cannot be read.
    """
    cache = VerdictCache(cache_file)
    model = open_model(
        spec, "judge", device=device, concurrency=concurrency, timeout_s=timeout_s, max_tokens=REPLY_TOKENS
    )
    return Judge(model, cache, spec)
