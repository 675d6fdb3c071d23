"""A run of GRPO that costs next to nothing: a policy made by hand, of a few tokens, whose code is really executed.

The logits depend on the last token alone. A turn is ``<code>``, a character, ``</code>``, or ``<answer>``,
a digit, ``</answer>``, and each is drawn: some code fails, some answers are right, and now and then a token is one that
no turn has. All weights of the other parts are there, and are trained, but write nothing at first.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from groupwise.data.trajectories import Expert, write_experts
from groupwise.engine.config import ModelConfig
from groupwise.engine.hf import save_hf
from groupwise.engine.model import Model
from groupwise.engine.tokenizer import Tokenizer
from groupwise.rollout.grammar import GRAMMARS
from groupwise.rollout.task import Task

WIDTH = 16
CERTAIN = 11.0  # a logit: of some 300 other tokens any is drawn with probability 0.005
# token -> what may follow it, with odds; a prompt and an observation both end with a line break
FOLLOWERS = {
    "\n": {"<code>": 2, "<answer>": 1},
    "<code>": {"1": 3, "q": 1},  # q is no name in Python
    "1": {"</code>": 1},
    "q": {"</code>": 1},
    "<answer>": {"3": 1, "4": 1},
    "3": {"</answer>": 1},
    "4": {"</answer>": 1},
}
SETTINGS = (
    "data.modes=100/0/0",
    "grpo.prompts_per_step=2",
    "grpo.num_generations=2",
    "grpo.warmup_steps=0",
    "hrm.steps=0",
    "rollout.kv_memory=0.001",
    "rollout.max_turns=3",
    "rollout.max_tokens_per_turn=8",
    "rollout.max_trajectory_tokens=256",
)


def prepare(folder: Path, tasks: int = 12) -> list[str]:
    """Writes the model and the tasks of a run into a folder, and returns the settings of the run."""
    data = folder / "data"
    (data / "tables").mkdir(parents=True)
    table = data / "tables" / "t.csv"
    table.write_text("a\n1\n2\n")
    found = [
        Task(f"t{n}", "How many?", (str(table),), "", "34"[n % 2], "number", "counting", table="t")
        for n in range(tasks)
    ]
    spans = (("model", "<answer>3</answer>"),)
    write_experts(data / "experts-00000.jsonl", [Expert(task, spans, "success", "datamind") for task in found])
    (data / "report.json").write_text(json.dumps({"evaluation_headers": []}))
    save_policy(folder / "first")
    return [*SETTINGS, f"model.folder={folder / 'first'}", f"run.folder={folder.parent}", f"run.name={folder.name}"]


def save_policy(folder: Path) -> None:
    """Writes the policy with its tokenizer."""
    tags = GRAMMARS["datamind"].tags
    tokenizer = Tokenizer.train([], 256 + 3 + len(tags), tags)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=False,
        max_position_embeddings=512,
    )
    model = Model(config)
    model.init_weights(0)
    names = {name: number for number, name in enumerate(FOLLOWERS)}
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "embed_tokens.weight", "lm_head.weight")):
                weight.zero_()
        for before, followers in FOLLOWERS.items():
            model.get_parameter("model.embed_tokens.weight")[_id(tokenizer, before), names[before]] = 1.0
            for after, odds in followers.items():
                # The last norm makes of a unit vector one of the length sqrt(WIDTH).
                logit = CERTAIN + torch.tensor(float(odds)).log()
                model.get_parameter("lm_head.weight")[_id(tokenizer, after), names[before]] = logit / WIDTH**0.5
    save_hf(model, folder)
    tokenizer.save(folder)


def _id(tokenizer: Tokenizer, text: str) -> int:
    (token,) = tokenizer.encode(text)
    return token
