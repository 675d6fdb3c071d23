"""The recipes as their users run them: end to end on small tables, stopped, resumed, and given bad input."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from safetensors.torch import load_file, save_file

from groupwise.recipes.evaluate import evaluate
from groupwise.recipes.run import Run, launch

SMALL = [
    "data.num_trajectories=24",
    "data.num_prompts=8",
    "data.num_eval_tasks=6",
    "data.num_views=12",
    "model.hidden_size=32",
    "model.intermediate_size=48",
    "model.num_hidden_layers=2",
    "model.vocab_size=384",
    "rollout.max_tokens_per_turn=24",
    "rollout.kv_memory_gib=0.05",
    "sft.steps=4",
    "sft.sequences_per_step=4",
    "sft.warmup_steps=1",
    "grpo.steps=2",
    "grpo.prompts_per_step=2",
    "grpo.num_generations=4",
    "grpo.warmup_steps=0",
]


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six small tables in a folder with a space in its name."""
    folder = tmp_path_factory.mktemp("my tables")
    for number in range(6):
        rows = range(30)
        frame = pd.DataFrame(
            {
                f"price {number}": [((row * 7 + number) % 23) / 4 for row in rows],
                f"count_{number}": [(row * row + number) % 17 for row in rows],
                f"kind{number}": ["red", "green", "blue"][number % 3 :] * 30 if False else [["a", "b", "c"][row % 3] for row in rows],
            }
        )
        frame.to_csv(folder / f"table{number}.csv", index=False)
    return folder
