"""A step of training on disk: what it was made of, and what came out of it.

Each rank writes ``RUN/capsules/PHASE/step-000050.rank0.safetensors``, for the GRPO steps of ``run.capture_steps`` and
for any step of any phase that was skipped because it was not finite. It is a safetensors file, whose tensor ``facts``
holds the bytes of a JSON text with all that is no tensor. ``recipes.replay`` runs it again.

Steps count from 0, as in ``PHASE.jsonl``: step 50 begins with the weights of a checkpoint that is named ``-step-50``.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..engine.atomic import replacing
from ..engine.batch import IGNORE, Batch, Example, pack
from ..engine.errors import UserError
from ..engine.mesh import Mesh
from ..engine.settings import step_numbers
from ..engine.shard import ShardedModel
from ..engine.step import Update, level
from ..engine.tensorfile import write_tensors
from ..engine.together import together
from ..kernels import dispatch
from ..kernels.linear import ROWS
from ..rollout.sandbox import Execution
from ..rollout.task import Task
from ..rollout.trajectory import Group, Span, Trajectory
from .run import Run

FORMAT = 1


class Capture:
    """Holds on to the parts of the step under way, and writes them where the step is listed or was skipped.

    Args:
        run: configuration and ranks.
        model: what is trained.
        phase: name of the stage.
    """

    def __init__(self, run: Run, model: ShardedModel, phase: str) -> None:
        self._run, self._model, self._phase = run, model, phase
        self._listed = step_numbers("run.capture_steps", run.config.run.capture_steps) if phase == "grpo" else ()
        self.begin(0)

    def begin(self, step: int) -> None:
        """Forgets the step before."""
        self._step = step
        self._rounds: list[tuple[int, list[Group]]] = []
        self._imitated: list[Example] = []
        self._minibatches: list[Sequence[Batch]] = []
        self._updates: list[tuple[int, Update]] = []  # with the number of its mini-batch
        self._first = 0  # of the updates, the one before which the weights were hashed
        self._weights: dict[str, str] = {}
        self._logprobs = torch.zeros(0)  # of all tokens of the trajectories, by these weights

    def add_round(self, seed: int, groups: list[Group]) -> None:
        """A round of a GRPO step: what was sampled by a seed, with its rewards and advantages."""
        self._rounds.append((seed, groups))

    def holds(self, imitated: Sequence[Example], minibatches: Sequence[Sequence[Batch]]) -> None:
        """What a GRPO step learns from, beside its rounds: expert examples, not weighed, and all that is packed."""
        self._imitated += imitated
        self._minibatches += minibatches

    def before(self) -> None:
        """An update is about to be made. Collective where the step is listed."""
        if self._step in self._listed and not self._weights:
            self._look()

    def keep(self, batches: Sequence[Batch], update: Update) -> Path:
        """An update was skipped, and the weights are what they were: writes the capsule. Collective."""
        if not self._weights:
            self._look()
        self._add(batches, update)
        path = self._write()
        self._updates.pop()  # ``after`` comes, unless the run ends here
        return path

    def after(self, batches: Sequence[Batch], update: Update) -> None:
        """An update was made or skipped."""
        self._add(batches, update)

    def end(self) -> None:
        """The step is over. Collective where it is kept."""
        if self._weights:
            self._write()

    def _look(self) -> None:
        """The weights before an update, and what they say of the trajectories."""
        self._first = len(self._updates)
        self._weights = hashes(self._model)
        if self._phase == "grpo":
            self._logprobs = token_logprobs(self._run, self._model, [groups for _, groups in self._rounds])

    def _add(self, batches: Sequence[Batch], update: Update) -> None:
        known = [number for number, other in enumerate(self._minibatches) if other is batches]
        if not known:
            self._minibatches.append(batches)
        self._updates.append((known[0] if known else len(self._minibatches) - 1, update))

    def _write(self) -> Path:
        run = self._run
        path = run.folder / "capsules" / self._phase / f"step-{self._step:06d}.rank{run.mesh.rank}.safetensors"
        facts = {
            "format": FORMAT,
            "phase": self._phase,
            "step": self._step,
            "rank": run.mesh.rank,
            "layout": layout(run.mesh),
            "config": run.config.to_dict(),
            "weights": self._weights,
            "first_update": self._first,
            "updates": [{"minibatch": number, **dataclasses.asdict(update)} for number, update in self._updates],
            "rounds": [{"seed": seed, "groups": list(map(_of_group, groups))} for seed, groups in self._rounds],
            "imitated": [len(example) for example in self._imitated],
            "minibatches": [[batch.max_seqlen for batch in batches] for batches in self._minibatches],
        }
        together(run.mesh, partial(write_capsule, path, facts, self._tensors()))
        return path

    def _tensors(self) -> dict[str, Tensor]:
        spans = [s for _, groups in self._rounds for g in groups for t in g.trajectories for s in t.spans]
        sampled = [span.logprobs or [0.0] * len(span.token_ids) for span in spans]
        found = {
            "token_ids": torch.tensor([i for span in spans for i in span.token_ids], dtype=torch.int64),
            "sampler_logprob": torch.tensor([value for part in sampled for value in part], dtype=torch.float64),
            "trainer_logprob": self._logprobs,
            "expert_ids": torch.tensor([i for example in self._imitated for i in example.token_ids], dtype=torch.int64),
            "expert_mask": torch.tensor([w for e in self._imitated for w in e.loss_mask], dtype=torch.float64),
        }
        for part, batches in enumerate(self._minibatches):
            for number, batch in enumerate(batches):
                found |= {f"batch/{part}/{number}/{name}": value for name, value in tensors_of(batch).items()}
        return found


def hashes(model: ShardedModel) -> dict[str, str]:
    """SHA-256 of this rank's part of every master weight, by name."""
    return {
        slot.name: hashlib.sha256(shard.data[here].cpu().contiguous().view(torch.uint8).numpy().data).hexdigest()
        for shard in model.shards
        for slot, here, _ in shard.overlaps()
    }


def token_logprobs(run: Run, model: ShardedModel, rounds: Sequence[Sequence[Group]]) -> Tensor:
    """The trainer's log-probability of each token of this rank's trajectories, laid end to end; 0 for first tokens.

    [tokens] float32, on the CPU. Every rank calls it together.
    """
    trajectories = [one for groups in rounds for group in groups for one in group.trajectories]
    examples = [trajectory.to_example() for trajectory in trajectories]
    sizes = [len(example) for example in examples]
    starts = torch.tensor([0, *accumulate(sizes)])
    found = torch.zeros(sum(sizes))
    budget = max([run.config.optimizer.tokens_per_microbatch, *sizes])
    for batch in level(pack(examples, budget, run.mesh.device, ROWS), run.mesh):
        logprob = model.logprobs(batch, run.config.rollout.temperature).cpu()
        live = (batch.targets != IGNORE).cpu() & (batch.sequence_ids >= 0).cpu()
        places = starts[batch.sequence_ids.cpu()[live]] + batch.positions.cpu()[live] + 1
        found[places] = logprob[live]
    return found


def layout(mesh: Mesh) -> dict[str, Any]:
    """What must be the same for the same bits."""
    on_cpu = mesh.device.type == "cpu"
    return {
        "world_size": mesh.world_size,
        "shard_size": mesh.shard_size,
        "device": torch.backends.cpu.get_cpu_capability() if on_cpu else torch.cuda.get_device_name(mesh.device),
        "threads": torch.get_num_threads() if on_cpu else 0,
        "torch": str(torch.__version__),
        "kernels": dispatch.describe(mesh.device.type),
    }


def tensors_of(batch: Batch) -> dict[str, Tensor]:
    """The fields of a batch that are tensors."""
    fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    return {name: value for name, value in fields.items() if isinstance(value, Tensor)}


def write_capsule(path: Path, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Writes one file, whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    try:
        with replacing(path) as file:
            text = torch.frombuffer(bytearray(json.dumps(facts).encode()), dtype=torch.uint8)
            tensors = {"facts": text, **tensors}
            shapes = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
            write_tensors(file, shapes, tensors.values(), {"format": "pt"})
    except OSError as error:
        raise UserError(f"the capsule {path} cannot be written: {error.strerror or error}; make room for it") from error


class Capsule:
    """One rank's file, read.

    Attributes:
        facts: all that is no tensor.
        tensors: by name, on the CPU.

    Raises:
        UserError: there is no such file, it is torn, or it is something else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise UserError(f"there is no capsule {path}; give a file of RUN/capsules/PHASE")
        try:
            with safe_open(path, framework="pt") as file:
                self.tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            self.facts: dict[str, Any] = json.loads(self.tensors.pop("facts").numpy().tobytes())
            if self.facts["format"] != FORMAT:
                raise ValueError(f"its format is {self.facts['format']} and this version reads {FORMAT}")
            self.rounds()
            self.minibatches("cpu")
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError, UserError) as error:
            raise UserError(f"{path} is no whole capsule ({type(error).__name__}: {error}); give another") from error

    def rounds(self) -> list[list[Group]]:
        """The groups of each round, made anew at each call."""
        token_ids, logprobs = self.tensors["token_ids"].tolist(), self.tensors["sampler_logprob"].tolist()
        place = 0

        def trajectory(task: Task, record: dict[str, Any]) -> Trajectory:
            nonlocal place
            record = dict(record)
            spans = []
            for writer, size in record.pop("spans"):
                here = slice(place, place + size)
                spans.append(Span(writer, token_ids[here], logprobs[here] if writer == "model" else []))
                place += size
            executions = [Execution(**execution) for execution in record.pop("executions")]
            return Trajectory(task=task, spans=spans, executions=executions, **record)

        found: list[list[Group]] = []
        for part in self.facts["rounds"]:
            found.append([])
            for group in part["groups"]:
                task = Task.from_dict(group["task"])
                found[-1].append(Group(task, [trajectory(task, record) for record in group["trajectories"]]))
        if place != len(token_ids):
            raise ValueError(f"{len(token_ids)} token ids for spans of {place}")
        return found

    def imitated(self) -> list[Example]:
        """The expert examples."""
        sizes = self.facts["imitated"]
        ids, masks = (self.tensors[name].split(sizes) for name in ("expert_ids", "expert_mask"))
        return [Example(i.tolist(), mask.tolist(), expert=True) for i, mask in zip(ids, masks, strict=True)]

    def minibatches(self, device: torch.device | str) -> list[list[Batch]]:
        """The micro-batches of each mini-batch."""
        names = [field.name for field in dataclasses.fields(Batch) if field.name != "max_seqlen"]
        return [
            [
                Batch(max_seqlen=longest, **{name: self._on(device, part, number, name) for name in names})
                for number, longest in enumerate(batches)
            ]
            for part, batches in enumerate(self.facts["minibatches"])
        ]

    def _on(self, device: torch.device | str, part: int, number: int, name: str) -> Any:
        key = f"batch/{part}/{number}/{name}"
        if name in ("prefix", "old_logprob", "ref_logprob") and key not in self.tensors:
            return None
        return self.tensors[key].to(device)


def _of_group(group: Group) -> dict[str, Any]:
    return {"task": group.task.to_dict(), "trajectories": [_of_trajectory(one) for one in group.trajectories]}


def _of_trajectory(trajectory: Trajectory) -> dict[str, Any]:
    names = ("sample", "status", "error", "answer", "rewards", "reward", "advantage", "scored")
    return {
        **{name: getattr(trajectory, name) for name in names},
        "spans": [(span.writer, len(span.token_ids)) for span in trajectory.spans],
        "executions": [dataclasses.asdict(execution) for execution in trajectory.executions],
    }
