"""The judge of free-text answers: a model behind an endpoint or a local one, with what it said kept on disk.

    judge = open_judge("qwen2.5-7b-instruct@http://127.0.0.1:8000/v1", run_folder / "verdicts.jsonl")
    judge.check()                                                     # before training: one sentence if it cannot judge
    verdicts = judge.verdicts([Question("Which year was best?", "1998", "It was 1998.")])          # [True]

A verdict is True, False or None. None, for an outage or a reply that is no verdict, is nothing about the answer: the
sample is left out of its group. Source: DataMind, arXiv 2509.25084, whose free-text answers a model judges.
"""

import logging
import os
import re
import time
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Protocol

import torch

from ..engine.errors import UserError
from ..engine.hf import load_hf
from ..engine.tokenizer import Tokenizer
from ..rollout.cache import KVCache
from ..rollout.draw import SamplingParams
from ..rollout.sampler import Sampler
from .endpoint import Endpoint
from .verdict import SYSTEM, Question, parse, render

TRIVIAL = (
    (Question("What is the sum of two and two?", "four", "four"), True),
    (Question("What is the sum of two and two?", "four", "seven"), False),
)
REPLY_TOKENS = 32  # of a local model: a verdict takes 10
PROMPT_TOKENS = 8192  # of a local model, at most
BLOCK_SIZE = 16
ENTRY = re.compile(r'\{"key": "([0-9a-f]{64})", "verdict": (true|false)\}')

logger = logging.getLogger(__name__)


class Asked(Protocol):
    """A model that gives verdicts: its name in the cache, and what it says, or why it says nothing, on each prompt."""

    @property
    def identity(self) -> str: ...

    def verdicts(self, prompts: Sequence[str]) -> list[bool | str]: ...


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
        found = self._model.verdicts([render(question) for question, _ in TRIVIAL])
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
        said = dict(zip(new, self._model.verdicts(list(new.values())) if new else [], strict=True))
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

    def metrics(self) -> dict[str, float]:
        """Since the last call: answers that the model judged, those known from before or from a double, those without
        a verdict, and seconds."""
        metrics = {f"judge/{name}": float(value) for name, value in self._counts.items()}
        metrics["judge/seconds"] = self._seconds
        self._counts, self._seconds = dict.fromkeys(self._counts, 0), 0.0
        return metrics


class VerdictCache:
    """Verdicts by key on disk, one a line, appended whole: processes may share the file, and a torn line says nothing.

    Args:
        file: made if absent, with its folder.

    Raises:
        UserError: it cannot be read or written.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._verdicts: dict[str, bool] = {}
        self._read = 0  # bytes
        self.refresh()

    def get(self, key: str) -> bool | None:
        """None where there is no verdict."""
        return self._verdicts.get(key)

    def refresh(self) -> None:
        """Reads what other processes added."""
        try:
            with open(self._file, "rb") as file:
                file.seek(self._read)
                content = file.read()
        except FileNotFoundError:
            return
        except OSError as error:
            raise self._unusable(error) from error
        whole = content[: content.rfind(b"\n") + 1]  # another process may be writing the rest
        self._read += len(whole)
        for match in map(ENTRY.fullmatch, whole.decode(errors="replace").split("\n")):
            if match is not None:
                self._verdicts[match[1]] = match[2] == "true"

    def add(self, verdicts: dict[str, bool]) -> None:
        """Keeps verdicts, here and on disk."""
        self._verdicts |= verdicts
        lines = [f'{{"key": "{key}", "verdict": {str(verdict).lower()}}}\n' for key, verdict in verdicts.items()]
        if not lines:
            return
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with open(self._file, "ab", buffering=0) as file:
                file.write(("\n" + "".join(lines)).encode())  # the first break ends a line that a crash tore
        except OSError as error:
            raise self._unusable(error) from error

    def _unusable(self, error: OSError) -> UserError:
        return UserError(
            f"the judge's verdicts cannot be kept in {self._file}: {error.strerror}; free space or mend its permissions"
        )


class LocalModel:
    """A Hugging Face folder whose likeliest reply is the verdict.

    Args:
        folder: of an instruct model with ChatML prompts.
        device: where it computes; in bfloat16 on CUDA, else in float32.
        concurrency: prompts at once.

    Raises:
        UserError: the folder does not hold a model with its tokenizer.
    """

    def __init__(self, folder: Path, device: torch.device, concurrency: int) -> None:
        self._tokenizer = Tokenizer.from_folder(folder)
        model = load_hf(folder, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
        self._tokenizer.check_fits(model.config)
        self._prompt_tokens = max(1, min(PROMPT_TOKENS, model.config.max_position_embeddings - REPLY_TOKENS))
        blocks = concurrency * (-(-(self._prompt_tokens + REPLY_TOKENS) // BLOCK_SIZE) + 1)
        memory = blocks * KVCache.block_bytes(model.config, BLOCK_SIZE, model.output_weight.dtype)
        self._sampler = Sampler(
            model, self._tokenizer, kv_memory=memory / 2**30, block_size=BLOCK_SIZE, concurrency=concurrency
        )
        files = [(file.name, file.stat()) for file in sorted(folder.iterdir())]
        states = [(name, state.st_size, state.st_mtime_ns) for name, state in files]
        self.identity = f"{folder.resolve()} {states}"  # another model in the same place is another judge

    def verdicts(self, prompts: Sequence[str]) -> list[bool | str]:
        """The verdict on each prompt, or the reason why there is none."""
        ids = [self._tokenizer.encode(self._tokenizer.chat_prompt(SYSTEM, prompt)) for prompt in prompts]
        short = [prompt for prompt in ids if len(prompt) <= self._prompt_tokens]
        params = SamplingParams(temperature=0.0, max_tokens=REPLY_TOKENS)
        replies = iter(self._sampler.generate(short, params))
        self._sampler.flush()  # a policy in training has use for the cache's memory
        found: list[bool | str] = []
        for prompt in ids:
            if len(prompt) > self._prompt_tokens:
                found.append(f"the prompt has {len(prompt)} tokens, and the model reads {self._prompt_tokens}")
                continue
            reply = next(replies)
            text = self._tokenizer.decode([token for token in reply.token_ids if token != self._tokenizer.eos_id])
            verdict = None if reply.error else parse(text)
            found.append(reply.error or f"its reply is no verdict: {text!r}" if verdict is None else verdict)
        return found


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
        spec: ``MODEL@http://HOST:PORT/v1``, an OpenAI-compatible endpoint whose key, if it needs one, is in the
            environment variable OPENAI_API_KEY; or a Hugging Face folder.
        cache_file: its verdicts are kept there; ranks and runs may share it.
        device: of a local model; None: the CPU.
        concurrency: questions at once.
        timeout_s: seconds of one request.

    Raises:
        UserError: ``spec`` is neither, the folder does not hold a model, or the cache cannot be read.
    """
    cache = VerdictCache(cache_file)
    if match := re.fullmatch(r"(.+?)@(https?://.+)", spec):
        key = os.environ.get("OPENAI_API_KEY", "")
        endpoint = Endpoint(match[1], match[2], api_key=key, concurrency=concurrency, timeout_s=timeout_s)
        return Judge(endpoint, cache, spec)
    if not Path(spec).is_dir():
        raise UserError(f"the judge {spec!r} is neither MODEL@http://HOST:PORT/v1 nor a folder; name one of the two")
    return Judge(LocalModel(Path(spec), device or torch.device("cpu"), concurrency), cache, spec)
