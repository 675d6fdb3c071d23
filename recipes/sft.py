"""Supervised fine-tuning on expert trajectories: the loss is on what the expert wrote, not on what it read.

    torchrun --standalone --nproc-per-node 2 -m groupwise.recipes.sft train

Reads the trajectories that ``recipes.synthesize`` left in the run's folder (where ``sft.wordings`` is set, only those
that show an operation in its first wordings: the others are left to GRPO); starts from ``model.folder``, or from random
weights and a tokenizer trained on the same trajectories; writes ``RUN/sft/model``, a Hugging Face folder.
"""

from collections.abc import Sequence
from pathlib import Path

from ..data.trajectories import Expert
from ..engine.batch import balance, pack
from ..engine.objective import count, sft_loss, weigh
from ..engine.schedule import Schedule, fitting_rate
from ..engine.tokenizer import Tokenizer
from ..kernels.linear import ROWS
from ..rollout.grammar import all_tags
from .experts import Experts
from .policy import Policy, create_policy, load_policy, save_policy
from .run import Run, launch
from .training import Training, places

PROMPT_WEIGHT = 0.2  # of a prompt's tokens in the first step of a model made from nothing


def sft(run: Run) -> Path:
    """Fits the policy to the expert trajectories and returns the folder of the fitted model."""
    folder, settings, mesh = run.folder / "sft", run.config.sft, run.mesh
    if (folder / "model").exists():
        return folder / "model"
    experts = Experts(run)
    policy = first_policy(run, experts.all)
    shown = experts.in_wordings(settings.wordings)
    # A model made from nothing learns to copy on prompts too; later their random names are noise.
    weight = 0.0 if run.config.model.folder else PROMPT_WEIGHT
    prompt_weight = Schedule("linear", weight, 0.0, max(settings.steps // 5, 1))
    training = Training(run, policy, "sft", settings.steps, fitting_rate(settings.lr, settings.steps))
    for step in training.steps():
        drawn = places(step, settings.sequences_per_step, len(shown), run.config.run.seed)
        with training.pace("data"):
            examples = experts.examples([shown[i] for i in drawn], step, policy.tokenizer, prompt_weight(step))
            mine = balance(examples, mesh.world_size)[mesh.rank]
            weigh(mine, count(mine).summed(mesh))
            batches = pack(mine, run.config.optimizer.tokens_per_microbatch, mesh.device, ROWS)
        update = training.update(step, batches, sft_loss)
        training.log(step, {"loss": update.loss, "grad_norm": update.grad_norm, "lr": update.lr})
    save_policy(run, policy, folder / "model")
    return folder / "model"


def first_policy(run: Run, experts: Sequence[Expert]) -> Policy:
    """The configured checkpoint, or random weights with a tokenizer trained on the experts' texts."""
    if run.config.model.folder:
        return load_policy(run, Path(run.config.model.folder))
    folder = run.folder / "tokenizer"
    if run.is_main and not folder.exists():
        texts = [f"{e.task.description}\n{e.task.question}\n{''.join(text for _, text in e.spans)}" for e in experts]
        Tokenizer.train(texts, run.config.model.vocab_size, all_tags()).save(folder)
    run.mesh.barrier()
    return create_policy(run, Tokenizer.from_folder(folder))


def _recipe(run: Run) -> None:
    run.say(f"model: {sft(run)}")
    run.say(run.planned.report())


if __name__ == "__main__":
    launch(_recipe, phases=("load", "update", "checkpoint"), stages=("sft",))
