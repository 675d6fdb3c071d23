"""Ask a model about tables, and watch it think, run code and answer.

    python -m groupwise.recipes.chat --model DIR --file table.csv [--file ...] "question"

DIR is a Hugging Face folder such as ``RUN/grpo/model``. What happened is saved as a notebook that runs again. A mistake
of the user ends it with one sentence and status 2.
"""

from __future__ import annotations

import argparse
import itertools
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.text import Text

from ..data.reading import read_csv
from ..data.tables import describe
from ..engine.errors import UserError
from ..engine.hf import load_hf
from ..engine.model import Model
from ..engine.page import visible
from ..engine.tokenizer import Tokenizer
from ..rollout.agent import AgentLimits, run_agent
from ..rollout.cache import KVCache
from ..rollout.draw import SamplingParams
from ..rollout.generation import Completion
from ..rollout.grammar import GRAMMARS
from ..rollout.notebook import save_notebook
from ..rollout.sampler import Sampler
from ..rollout.sandbox import Sandbox
from ..rollout.task import MODES, Task
from ..rollout.trajectory import Trajectory, Writer
from ..rollout.view import Painter
from .command import Arguments, run_command

BLOCK_SIZE = 16


class Transcript:
    """Prints one trajectory as it comes."""

    def __init__(self, console: Console, mode: str) -> None:
        self._console, self._painter = console, Painter(mode)

    def show(self, writer: Writer, text: str, *, more: bool = False) -> None:
        """Prints a piece of text in its colours; ``more``: of this writer more follows."""
        self._console.print(self._painter.paint(writer, text, more=more), end="", soft_wrap=True)


class Streaming(Sampler):
    """A sampler of one request that shows what is written while it is written.

    Args:
        model, tokenizer: as of `Sampler`.
        transcript: takes the text.
        result: name of the tag around observations, None without.
        max_tokens: of the request in all; there is room for no more.
    """

    def __init__(
        self, model: Model, tokenizer: Tokenizer, *, transcript: Transcript, result: str | None, max_tokens: int
    ) -> None:
        blocks = -(-max_tokens // BLOCK_SIZE) + 1  # one more, since GiB are rounded
        memory = blocks * KVCache.block_bytes(model.config, BLOCK_SIZE, model.output_weight.dtype)
        super().__init__(model, tokenizer, kv_memory=memory / 2**30, block_size=BLOCK_SIZE)
        self._transcript, self._result = transcript, result
        self._begun = 0  # where the present turn begins in the request's ids
        self._shown = 0  # characters of it

    def submit(self, prompt_ids: Sequence[int], params: SamplingParams, *, stream: tuple[int, int, int]) -> int:
        """As `Sampler.submit`."""
        self._begun, self._shown = len(prompt_ids), 0
        return super().submit(prompt_ids, params, stream=stream)

    def extend(self, request_id: int, token_ids: Sequence[int], params: SamplingParams) -> None:
        """As `Sampler.extend`; shows the tokens, which are a tag that was forced, if any, and an observation."""
        super().extend(request_id, token_ids, params)
        self._begun, self._shown = len(self.token_ids(request_id)), 0
        forced, opening, rest = self._tokenizer.decode(token_ids).partition(f"\n<{self._result}>")
        self._transcript.show("forced", forced)
        self._transcript.show("environment", opening + rest)

    def poll(self) -> list[Completion]:
        """As `Sampler.poll`; shows what is new."""
        done = super().poll()
        for number in self._requests:
            text = self._tokenizer.decode(self.token_ids(number)[self._begun :])
            if not done:
                text = text.rstrip("\ufffd")  # a character of which the last token holds the beginning
            self._transcript.show("model", text[self._shown :], more=not done)
            self._shown = len(text)
        return done


def chat(argv: Sequence[str], console: Console) -> Trajectory:
    """Answers the question of a command line on the console, and saves the notebook.

    Raises:
        UserError: a mistake in the command line or in what it names.
    """
    options = _parse(argv)
    task, notebook = _task(options), _notebook_path(options)
    params = SamplingParams(temperature=options.temperature)
    tokenizer = Tokenizer.from_folder(options.model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_hf(options.model, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    tokenizer.check_fits(model.config)
    max_tokens = min(AgentLimits.max_trajectory_tokens, model.config.max_position_embeddings)
    transcript, grammar = Transcript(console, task.mode), GRAMMARS[task.mode]
    sampler = Streaming(model, tokenizer, transcript=transcript, result=grammar.result, max_tokens=max_tokens)
    # A long observation must leave a small model room to answer.
    max_observation_tokens = min(AgentLimits.max_observation_tokens, max_tokens // 4)
    limits = AgentLimits(max_trajectory_tokens=max_tokens, max_observation_tokens=max_observation_tokens)
    transcript.show("prompt", f"{task.description}\n")
    with Sandbox(workers=1) as sandbox:
        [group] = run_agent(
            sampler, sandbox, [task], tokenizer=tokenizer, num_generations=1, params=params, limits=limits, seed=0
        )
    [trajectory] = group.trajectories
    if not trajectory.turns:
        raise UserError(
            f"the question with its tables takes {len(trajectory.token_ids)} tokens, and the model reads no more than "
            f"{max_tokens}; name fewer files, or give them fewer columns"
        )
    last = max(index for index, span in enumerate(trajectory.spans) if span.writer == "model")
    for span in trajectory.spans[last + 1 :]:  # no turn followed, so the sampler did not show them
        transcript.show(span.writer, tokenizer.decode(span.token_ids))
    _conclude(console, trajectory)
    save_notebook(notebook, trajectory, tokenizer)
    console.print(Text(f"notebook: {notebook}", "dim"), soft_wrap=True)
    return trajectory


def _conclude(console: Console, trajectory: Trajectory) -> None:
    answer = trajectory.answer
    end = Text(f"no answer: {trajectory.status}", "bold red") if answer is None else Text(visible(answer), "bold")
    console.print(Text("\n\n"), end, sep="", soft_wrap=True)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Arguments("chat", __doc__)
    parser.add_argument("question", help="in words, about the tables")
    parser.add_argument("--model", required=True, type=Path, metavar="DIR", help="a Hugging Face folder")
    parser.add_argument("--file", required=True, action="append", type=Path, help="a .csv file; may be repeated")
    parser.add_argument("--mode", choices=MODES, default="datamind", help="grammar in which the model was trained")
    parser.add_argument("--temperature", type=float, default=0.0, help="of the softmax; 0 takes the likeliest tokens")
    parser.add_argument("--notebook", type=Path, help="where it is saved; else it is named after the question")
    return parser.parse_args(argv)


def _task(options: argparse.Namespace) -> Task:
    question = options.question.strip()
    if not question:
        raise UserError("the question is empty; ask something about the tables")
    files = [file.absolute() for file in options.file]
    names = [file.name for file in files]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"two files are named {twice}, and code sees files by their names; rename one")
    description = "\n".join(describe(file.name, read_csv(file)) for file in files)
    paths = tuple(str(file) for file in files)
    return Task(
        "chat", question, paths, description, answer="", answer_type="text", task_type="chat", mode=options.mode
    )


def _notebook_path(options: argparse.Namespace) -> Path:
    """As named; else the first words of the question, with a number if that file is there already."""
    named: Path | None = options.notebook
    if named is not None:
        if not named.parent.is_dir():
            raise UserError(f"the folder {named.parent} of --notebook does not exist; make it or name another one")
        return named
    words = re.sub(r"\W+", "-", options.question.lower())[:40].strip("-") or "answer"
    names = itertools.chain([words], (f"{words}-{number}" for number in itertools.count(2)))
    return next(path for name in names if not (path := Path(f"{name}.ipynb")).exists())


if __name__ == "__main__":
    run_command(chat)
